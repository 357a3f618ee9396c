//! The memory of a session's payloads, and the slices that long ones are cut into.
//!
//! Invariant: `buffered` is the memory of all buffers that requests and replies of the session own. It exceeds
//! [`BUFFERED_MAX`] only by one buffer.

use crate::buffer::{Buffer, Pool, BULK, SLICE};
use crate::work::BLOCK;

/// Slices of one READ that are in work, or wait for their turn: as many as one client has memory for.
pub(super) const SLICES_MAX: u32 = 4;

/// Memory one client's payloads may take, in bytes: four slices, so that sixteen busy clients fit the pool.
pub const BUFFERED_MAX: usize = SLICES_MAX as usize * SLICE;
const _: () = assert!(BULK <= BUFFERED_MAX, "a session may own a large buffer");

/// What a session has taken from the pool for its payloads.
#[derive(Debug, Default)]
pub(super) struct Memory {
    buffered: usize,
}

impl Memory {
    /// A buffer for up to `len` bytes of payload, if the session may own one more. A session that owns none gets one while
    /// there is memory, however small, so that it goes on.
    pub(super) fn take(&mut self, len: usize, pool: &mut Pool) -> Option<Buffer> {
        let want = len.min(SLICE);
        if self.buffered > 0 && self.buffered + want > BUFFERED_MAX {
            return None;
        }
        let reserve = self.buffered == 0;
        let buffer = pool.take_up_to(want).or_else(|| reserve.then(|| pool.take_reserve()).flatten())?;
        self.buffered += buffer.capacity();
        Some(buffer)
    }

    /// As [`Memory::take`], for a payload that the disk will not keep: a session that owns nothing may get a [`BULK`], and
    /// receives no other payload before that is back.
    pub(super) fn take_bulk(&mut self, len: usize, pool: &mut Pool) -> Option<Buffer> {
        let bulk = if len > SLICE && self.buffered == 0 { pool.take_bulk() } else { None };
        let Some(buffer) = bulk else { return self.take(len, pool) };
        self.buffered += buffer.capacity();
        Some(buffer)
    }

    /// Exchanges an empty buffer for one of at least `len` bytes, beyond the cap of the pool if need be. `None`, and the
    /// buffer is gone, when memory has run out.
    pub(super) fn exchange(&mut self, buffer: Buffer, len: usize, pool: &mut Pool) -> Option<Buffer> {
        self.give(buffer, pool);
        let larger = pool.take_beyond(len)?;
        self.buffered += larger.capacity();
        Some(larger)
    }

    /// Takes a buffer back.
    pub(super) fn give(&mut self, buffer: Buffer, pool: &mut Pool) {
        self.note_given(buffer.capacity());
        pool.give(buffer);
    }

    /// Notes that so much memory is back in the pool already.
    pub(super) fn note_given(&mut self, bytes: usize) {
        debug_assert!(bytes <= self.buffered, "the invariant");
        self.buffered = self.buffered.saturating_sub(bytes);
    }
}

/// How many of the `left` bytes at `offset` go into a slice of `capacity` bytes: all, or as many as end on a block, so
/// that zero blocks stay whole for the disk, and holes for the client.
pub(super) fn slice_len(offset: u64, left: u32, capacity: usize) -> u32 {
    let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
    if left <= capacity {
        return left;
    }
    let over = u32::try_from(offset.wrapping_add(u64::from(capacity)) % BLOCK).unwrap_or(0);
    if over < capacity {
        capacity - over
    } else {
        capacity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_that_owns_nothing_always_gets_a_buffer() {
        let (mut memory, mut pool) = (Memory::default(), Pool::new(0));
        let buffer = memory.take(SLICE, &mut pool).unwrap();
        assert_eq!(buffer.capacity(), 4096);
        assert!(memory.take(1, &mut pool).is_none());
        memory.give(buffer, &mut pool);
        assert!(memory.take(1, &mut pool).is_some());
    }

    #[test]
    fn a_session_owns_four_slices_at_the_most() {
        let (mut memory, mut pool) = (Memory::default(), Pool::new(2 * BUFFERED_MAX));
        let slices: Vec<Buffer> = (0..5).filter_map(|_| memory.take(10 * SLICE, &mut pool)).collect();
        assert_eq!(slices.len(), 4);
        assert!(memory.take(1, &mut pool).is_none());
        memory.note_given(SLICE);
        assert!(memory.take(1, &mut pool).is_some());
    }

    #[test]
    fn a_large_buffer_is_all_that_a_session_owns() {
        let (mut memory, mut pool) = (Memory::default(), Pool::new(16 * BULK));
        let slice = memory.take_bulk(SLICE, &mut pool).unwrap();
        assert_eq!(slice.capacity(), SLICE, "what fits a slice needs no more");
        let other = memory.take_bulk(2 * BULK, &mut pool).unwrap();
        assert_eq!(other.capacity(), SLICE, "not beside another");
        memory.give(slice, &mut pool);
        memory.give(other, &mut pool);
        for _ in 0..2 {
            let bulk = memory.take_bulk(SLICE + 1, &mut pool).unwrap();
            assert_eq!(bulk.capacity(), BULK);
            memory.give(bulk, &mut pool);
        }
    }

    #[test]
    fn slices_end_on_blocks_where_they_can() {
        assert_eq!(slice_len(5, 4096, 4096), 4096, "what fits is not cut");
        assert_eq!(slice_len(5, 4097, 4096), 4091);
        assert_eq!(slice_len(4096, 1 << 30, SLICE), SLICE as u32);
        assert_eq!(slice_len(4097, 1 << 30, SLICE), SLICE as u32 - 1);
        assert_eq!(slice_len(1, 3000, 2000), 2000, "no block ends in so small a slice");
    }
}
