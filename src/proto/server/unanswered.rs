//! The requests of a client that are not answered, by their tags.

use crate::proto::error::Errno;
use crate::proto::wire::RequestHead;
use slab::Slab;

/// A request that is not answered.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) head: RequestHead,
    /// From when on it ages, in milliseconds.
    pub(super) since_ms: u64,
    /// Pieces of its work that are under way.
    pub(super) in_work: u32,
    /// Bytes of a READ that are queued for the client, or known to it as a hole.
    pub(super) replied: u32,
    /// Why it fails.
    pub(super) error: Option<Errno>,
}

/// All of them. A tag names one until it is answered.
#[derive(Debug, Default)]
pub(super) struct Unanswered(Slab<Pending>);

impl Unanswered {
    /// Adds a request that came at `since_ms`; returns its tag.
    pub(super) fn push(&mut self, head: RequestHead, since_ms: u64) -> u32 {
        let tag = self.0.insert(Pending { head, since_ms, in_work: 0, replied: 0, error: None });
        u32::try_from(tag).unwrap_or(u32::MAX)
    }

    pub(super) fn get(&self, tag: u32) -> Option<&Pending> {
        self.0.get(tag as usize)
    }

    pub(super) fn get_mut(&mut self, tag: u32) -> Option<&mut Pending> {
        self.0.get_mut(tag as usize)
    }

    /// Takes a request out: it is answered.
    pub(super) fn take(&mut self, tag: u32) -> Option<Pending> {
        self.0.try_remove(tag as usize)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// From when on the one that has waited longest ages.
    pub(super) fn oldest_ms(&self) -> Option<u64> {
        self.0.iter().map(|(_, pending)| pending.since_ms).min()
    }

    /// True when one of them changes the export.
    pub(super) fn changes_export(&self) -> bool {
        self.0.iter().any(|(_, pending)| pending.head.changes_export())
    }
}
