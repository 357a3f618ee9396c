//! What a session has received and not understood yet, and how long that has waited.

use crate::buffer::{Buffer, Pool};

/// How much is received at once besides a payload, in bytes: thousands of bare requests, fifteen writes of 4 KiB.
/// What is larger is received straight into the payload's buffer, so more here would only be copied once more.
const RECEIVE: usize = 64 << 10;

/// The bytes, in memory of the pool; without any, it owns none.
#[derive(Debug)]
pub(super) struct Inbox {
    buffer: Option<Buffer>,
    /// Since when the first message ages, and since when those behind it do.
    ages_ms: (u64, u64),
    received_ms: u64,
}

impl Inbox {
    pub(super) fn new(now_ms: u64) -> Self {
        Self { buffer: None, ages_ms: (now_ms, now_ms), received_ms: now_ms }
    }

    /// Where to receive into; empty when memory has run out.
    pub(super) fn space(&mut self, pool: &mut Pool) -> &mut [u8] {
        let buffer = match self.buffer.take() {
            // What is left of the last receive is the beginning of a message: little to move.
            Some(buffer) => Some(pool.grow(RECEIVE, buffer)),
            None => pool.take_up_to(RECEIVE).or_else(|| pool.take_reserve()),
        };
        self.buffer = buffer;
        self.spare()
    }

    /// Where to receive a message of up to `len` bytes that has to be looked at in one piece, also while others own all
    /// of the pool. Empty when memory has run out.
    pub(super) fn space_for(&mut self, len: usize, pool: &mut Pool) -> &mut [u8] {
        if self.buffer.as_ref().is_none_or(|buffer| buffer.capacity() < len) {
            let Some(mut larger) = pool.take_beyond(len) else { return <&mut [u8]>::default() };
            larger.append(self.filled());
            self.buffer.replace(larger).into_iter().for_each(|smaller| pool.give(smaller));
        }
        self.buffer.iter_mut().for_each(Buffer::compact);
        self.spare()
    }

    fn spare(&mut self) -> &mut [u8] {
        self.buffer.as_mut().map(Buffer::spare).unwrap_or_default()
    }

    /// Counts `n` bytes received into one of these spaces; 0 when all went elsewhere.
    pub(super) fn received(&mut self, n: usize, now_ms: u64) {
        if let Some(buffer) = &mut self.buffer {
            if buffer.is_empty() {
                self.ages_ms.0 = now_ms;
            }
            buffer.advance(n);
        }
        self.ages_ms.1 = now_ms;
        self.received_ms = now_ms;
    }

    /// What has been received.
    pub(super) fn filled(&self) -> &[u8] {
        self.buffer.as_ref().map(Buffer::filled).unwrap_or_default()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.filled().is_empty()
    }

    /// Drops the first `n` bytes, which continue a message that was taken before.
    pub(super) fn consume(&mut self, n: usize) {
        if let Some(buffer) = &mut self.buffer {
            buffer.consume(n);
        }
    }

    /// Drops the `n` bytes of the first message, or of its head; says since when it ages.
    pub(super) fn take_message(&mut self, n: usize) -> u64 {
        self.consume(n);
        std::mem::replace(&mut self.ages_ms.0, self.ages_ms.1)
    }

    /// Since when the first message ages, if there is any.
    pub(super) fn oldest_ms(&self) -> Option<u64> {
        (!self.is_empty()).then_some(self.ages_ms.0)
    }

    /// Everything here ages from `ms` later on.
    pub(super) fn excuse(&mut self, ms: u64) {
        self.ages_ms = (self.ages_ms.0.saturating_add(ms), self.ages_ms.1.saturating_add(ms));
    }

    /// When the peer was last heard of.
    pub(super) fn received_ms(&self) -> u64 {
        self.received_ms
    }

    /// Keeps no more memory than what is here needs.
    pub(super) fn park(&mut self, pool: &mut Pool) {
        match self.buffer.take() {
            Some(buffer) if buffer.is_empty() => pool.give(buffer),
            Some(buffer) => self.buffer = Some(pool.shrink(buffer)),
            None => {}
        }
    }

    /// Forgets everything.
    pub(super) fn release(&mut self, pool: &mut Pool) {
        if let Some(buffer) = self.buffer.take() {
            pool.give(buffer);
        }
    }
}
