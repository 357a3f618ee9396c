//! The deadlines of a client, and what does not count against it: the time in which the gate keeps its requests.

use super::Client;
use crate::event::slots::Key;
use crate::server::life::Life;
use crate::server::reason::{Next, Reason};
use crate::server::shared::{Shared, MEMORY_RETRY_MS};
use crate::server::watch::GONE_MS;

/// How long a negotiation may take, in milliseconds.
const HANDSHAKE_MS: u64 = 10_000;
/// How long a sender may be connected before its first write, in milliseconds.
const FIRST_WRITE_MS: u64 = 60_000;
/// How long a sender may be silent after a write, in milliseconds. Even a migration limited to a few bytes per second
/// sends more often than that.
const NEXT_WRITE_MS: u64 = 600_000;
/// How old a request may be that waits for memory, in milliseconds.
const MEMORY_WAIT_MS: u64 = 30_000;
/// How far ahead the wheel may hold an entry of a client, in milliseconds.
const ARM_MS: u64 = 1_000;

impl Client {
    /// Notes that the gate keeps the next request of this client from now on.
    pub(in super::super) fn keep(&mut self, now_ms: u64) {
        self.kept_since_ms = self.kept_since_ms.or(Some(now_ms));
    }

    /// Subtracts from the age of the next request the time for which the gate has kept it.
    pub(super) fn excuse(&mut self, now_ms: u64) {
        if let Some(since_ms) = &mut self.kept_since_ms {
            let ms = now_ms.saturating_sub(std::mem::replace(since_ms, now_ms));
            self.session.excuse(ms);
            self.kept_ms = self.kept_ms.saturating_add(ms);
        }
    }

    /// Asks for memory again after a while. Closes the connection, so that others get its memory, when its peer is
    /// gone, and when it has waited for long while no operation of the disk will give memory back: all clients may be
    /// waiting for each other.
    pub(super) fn wait_for_memory(&mut self, key: Key, sh: &mut Shared) -> Next {
        if self.socket.hung_up() {
            return Next::Close(Reason::HungUp);
        }
        let is_old = self.session.oldest_ms().is_some_and(|ms| sh.now_ms.saturating_sub(ms) > MEMORY_WAIT_MS);
        if is_old && sh.backend.in_flight() == 0 {
            return Next::Close(Reason::NoMemory);
        }
        self.stalled = true;
        self.arm(sh.now_ms.saturating_add(MEMORY_RETRY_MS), key, sh);
        Next::Idle
    }

    /// A wheel entry has fired: looks at the true deadlines and arms the wheel again.
    pub(in super::super) fn timeout(&mut self, key: Key, sh: &mut Shared) -> Next {
        if !self.alarm.fired(sh.now_ms) {
            return Next::Idle;
        }
        if matches!(sh.life, Life::Sealing { .. }) {
            // The end of this connection will say that the image is durable, so that no deadline may end it before.
            return Next::Idle;
        }
        self.excuse(sh.now_ms);
        if let Err(reason) = self.look(key, sh) {
            return Next::Close(reason);
        }
        if let Some((due_ms, reason)) = self.first_step_due(sh) {
            if due_ms <= sh.now_ms {
                return Next::Close(reason);
            }
            self.arm(due_ms, key, sh);
        }
        let (Some(limit_ms), Some(oldest_ms)) = (sh.limits.killswitch_ms, self.session.oldest_ms()) else {
            return self.unless_stalled();
        };
        let age_ms = sh.now_ms.saturating_sub(oldest_ms);
        if age_ms >= limit_ms {
            return Next::Close(Reason::Killswitch { age_ms });
        }
        self.arm(oldest_ms.saturating_add(limit_ms), key, sh);
        self.unless_stalled()
    }

    /// Looks whether the peer is still there, if it is time to.
    fn look(&mut self, key: Key, sh: &mut Shared) -> Result<(), Reason> {
        if self.watch.due_ms().is_some_and(|due_ms| due_ms <= sh.now_ms) {
            let delivery = self.socket.delivery().unwrap_or_default();
            if self.watch.is_gone(delivery, GONE_MS, sh.now_ms) {
                return Err(Reason::Vanished { silent_ms: delivery.acked_ms_ago });
            }
        }
        self.arm_watch(key, sh);
        Ok(())
    }

    /// Armed for the due time itself: in steps of [`ARM_MS`], as the other deadlines are, an idle server would wake
    /// again and again.
    pub(super) fn arm_watch(&mut self, key: Key, sh: &mut Shared) {
        if let Some(due_ms) = self.watch.due_ms() {
            self.alarm.arm(due_ms, key, &mut sh.wheel);
        }
    }

    /// Starts the deadlines that run from the moment of connecting.
    pub(in super::super) fn opened(&mut self, key: Key, sh: &mut Shared) {
        if let Some((due_ms, _)) = self.first_step_due(sh) {
            self.arm(due_ms, key, sh);
        }
    }

    /// The deadline of a negotiation; of a sender, that of its first write, then of its next one. A sender that only
    /// connects, or stops, would keep the real one out.
    fn first_step_due(&self, sh: &Shared) -> Option<(u64, Reason)> {
        let since_ms = self.opened_ms.saturating_add(self.kept_ms);
        if self.session.is_negotiating() {
            return Some((since_ms.saturating_add(HANDSHAKE_MS), Reason::Handshake));
        }
        let due_ms = match self.session.wrote_ms() {
            None => since_ms.saturating_add(FIRST_WRITE_MS),
            Some(wrote_ms) => wrote_ms.saturating_add(NEXT_WRITE_MS),
        };
        sh.life.awaits_image().then_some((due_ms, Reason::Silent))
    }

    /// Makes sure that the wheel looks at this client at `at_ms`. Armed at most [`ARM_MS`] ahead, so that entries of closed
    /// connections expire soon.
    pub(super) fn arm(&mut self, at_ms: u64, key: Key, sh: &mut Shared) {
        self.alarm.arm(at_ms.min(sh.now_ms.saturating_add(ARM_MS)), key, &mut sh.wheel);
    }
}
