//! Between clients and a migration: whether a client's request may pass now, and which clients wait for that.
//!
//! Where clients have a quota ([`Quota`]), their requests wait at the gate for that, each in its turn.
//!
//! A snapshot keeps what changes the image, and lets the rest pass. A migration closes the gate in two ways. Before its end
//! nothing passes at all ([`Life::pauses_clients`]). While clients change the image faster than it can be sent, what changes
//! the image waits, and the rest passes. A listener closes it in the second way, too, until the image is marked as one that
//! comes, and while its disk still works for a sender that is gone: the next one is greeted and waits. Time in which a
//! request is kept does not count against its client.
//!
//! An image that was marked as moved and stays nevertheless keeps it closed until the mark is gone for good.
//!
//! A request of this server's own migration never passes: it comes when the destination is this server, behind a
//! forwarder or under another name. What it writes may be older than what clients have written meanwhile. It is known by
//! its cookie, also when it comes late, after its attempt.

use super::life::Life;
use super::quota::Quota;
use crate::event::run_queue::RunQueue;
use crate::event::slots::Key;
use crate::proto::client::Cookies;
use crate::proto::server::Allowed;
use crate::proto::wire::RequestHead;
use std::ops::Range;

/// Whose requests never pass, which clients wait at the gate, and what has passed and is not done.
#[derive(Debug)]
pub(super) struct Gate {
    /// What all clients together may ask for.
    pub quota: Quota,
    /// Those of the requests that the migrations of this process send.
    own_cookies: Cookies,
    /// Clients whose next request changes the image and may not pass.
    kept: RunQueue,
    /// Operations that may change the image and are in the disk.
    changing: usize,
    /// Of these, the operations of a sender that is gone. While there are some, no other change passes.
    orphans: usize,
    /// Flushes that make durable that the image stays.
    taking_back: usize,
}

impl Gate {
    /// Nobody waits. The cookies have to be as good as random.
    pub(super) fn new(own_cookies: Cookies, quota: Quota) -> Self {
        Self { quota, own_cookies, kept: RunQueue::default(), changing: 0, orphans: 0, taking_back: 0 }
    }

    /// What a migration of this process gives its requests.
    pub(super) fn own_cookies(&self) -> Cookies {
        self.own_cookies
    }

    /// True for a request that a migration of this process has sent.
    pub(super) fn is_own(&self, head: &RequestHead) -> bool {
        self.own_cookies.contains(head.cookie)
    }

    /// What may pass now. `None`: nothing, and clients are not read from.
    pub(super) fn allows(&self, life: &mut Life, now_ms: u64) -> Option<Allowed> {
        if life.pauses_clients() || self.takes_back() {
            return None;
        }
        let keeps_changes = self.orphans > 0
            || life.keeps_changes()
            || life.plan().is_some_and(|plan| plan.keeps_changes_until(now_ms).is_some());
        Some(if keeps_changes { Allowed::Reads } else { Allowed::Everything })
    }

    /// An operation that may change this range has passed and goes to the disk. A migration charges for what it will cost to
    /// send the range again.
    pub(super) fn passed(&mut self, life: &mut Life, range: &Range<u64>) {
        self.changing += 1;
        if let Some(plan) = life.plan() {
            plan.note_submitted(range);
        }
    }

    /// The disk is done with it.
    pub(super) fn done(&mut self, life: &mut Life, range: &Range<u64>) {
        debug_assert!(self.changing > 0, "it has passed");
        self.changing = self.changing.saturating_sub(1);
        self.orphans = self.orphans.saturating_sub(1);
        if let Some(plan) = life.plan() {
            plan.note_write(range);
        }
    }

    /// The sender of an image is gone. What the disk still does for it comes before all that the next one changes.
    pub(super) fn sender_left(&mut self) {
        self.orphans = self.changing;
    }

    /// The mark that the image has moved is taken back; nothing passes until that is durable.
    pub(super) fn take_back(&mut self) {
        self.taking_back += 1;
    }

    /// It is durable.
    pub(super) fn taken_back(&mut self) {
        debug_assert!(self.taking_back > 0, "it was taken back");
        self.taking_back = self.taking_back.saturating_sub(1);
    }

    /// True while the mark that the image has moved is being taken back.
    pub(super) fn takes_back(&self) -> bool {
        self.taking_back > 0
    }

    /// How many operations have passed that may change the image and are not done yet.
    pub(super) fn changing(&self) -> usize {
        self.changing
    }

    /// A client's next request may not pass; it gets another turn when the gate opens.
    pub(super) fn keep(&mut self, key: Key) {
        self.kept.push(key);
    }

    /// True when a client waits.
    #[cfg(test)]
    pub(super) fn keeps_somebody(&self) -> bool {
        !self.kept.is_empty()
    }

    /// When a client that waits may pass, as far as can be told now; that is now when the gate has opened since the last
    /// [`Gate::wake`].
    pub(super) fn opens_at_ms(&mut self, life: &mut Life, now_ms: u64) -> Option<u64> {
        // The completion of an orphan wakes the loop, and so does that of a mark or a snapshot.
        let keeps_somebody = !self.kept.is_empty() && self.orphans == 0 && !life.keeps_changes();
        let kept_ms =
            keeps_somebody.then(|| life.plan().and_then(|plan| plan.keeps_changes_until(now_ms)).unwrap_or(now_ms));
        kept_ms.into_iter().chain(self.quota.opens_at_ms(now_ms)).min()
    }

    /// Wakes the clients that wait, if the gate is open now.
    pub(super) fn wake(&mut self, life: &mut Life, now_ms: u64, run: &mut RunQueue) {
        if !self.kept.is_empty() && !matches!(self.allows(life, now_ms), Some(Allowed::Reads)) {
            run.append(&mut self.kept);
        }
        self.quota.wake(now_ms, run);
    }
}
