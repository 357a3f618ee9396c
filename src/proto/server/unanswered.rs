//! The requests of a client that are not answered, by their tags.

use super::memory::SLICES_MAX;
use super::stopwatch::Times;
use crate::proto::error::Errno;
use crate::proto::wire::RequestHead;
use slab::Slab;

/// How many tags a request has: its own, which is the lowest, and those of what else of a READ is in work beside that.
const TAGS: u32 = SLICES_MAX + 1;

/// A request that is not answered.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) head: RequestHead,
    /// Since when it ages, in milliseconds.
    pub(super) since_ms: u64,
    pub(super) times: Times,
    /// Pieces of its work that are under way.
    pub(super) in_work: u32,
    /// Bytes of a READ that are queued for the client, or known to it as a hole.
    pub(super) replied: u32,
    /// Why it fails.
    pub(super) error: Option<Errno>,
}

/// All of them. Each of its tags names one until it is answered.
#[derive(Debug, Default)]
pub(super) struct Unanswered(Slab<Pending>);

impl Unanswered {
    /// Adds a request that ages from `since_ms` on, and was received at `received_us`; returns its own tag.
    pub(super) fn push(&mut self, head: RequestHead, since_ms: u64, received_us: u64) -> u32 {
        let times = Times { received_us, asked_us: None };
        let place = self.0.insert(Pending { head, since_ms, times, in_work: 0, replied: 0, error: None });
        u32::try_from(place).unwrap_or(u32::MAX / TAGS) * TAGS
    }

    pub(super) fn get(&self, tag: u32) -> Option<&Pending> {
        self.0.get(place(tag))
    }

    pub(super) fn get_mut(&mut self, tag: u32) -> Option<&mut Pending> {
        self.0.get_mut(place(tag))
    }

    /// Takes a request out: it is answered.
    pub(super) fn take(&mut self, tag: u32) -> Option<Pending> {
        self.0.try_remove(place(tag))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Pending> {
        self.0.iter().map(|(_, pending)| pending)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Since when the one that has waited longest ages.
    pub(super) fn oldest_ms(&self) -> Option<u64> {
        self.0.iter().map(|(_, pending)| pending.since_ms).min()
    }
}

/// Where the request is that a tag names.
fn place(tag: u32) -> usize {
    (tag / TAGS) as usize
}
