//! PURE: the destination of a migration: which bytes of the image its sender has written, and whether all of it is durable.

use crate::bitmap::Bitmap;
use std::collections::BTreeMap;
use std::ops::Range;

/// The smallest block that is counted as a whole, in bytes: what file systems and most senders align to.
const BLOCK_MIN: u64 = 4 << 10;
/// The most blocks: 2 MiB of memory. Images over 64 GiB get larger blocks instead of a larger map.
const BLOCKS_MAX: u64 = 1 << 24;
/// The most pieces of blocks that are remembered: about 128 KiB of memory. A sender that writes in sequence needs two
/// for each request in flight.
const PIECES_MAX: usize = 4096;

/// Whether the image is on stable storage as a whole, as one sender has brought it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Durable {
    No,
    /// A FLUSH is under way that covers all of it.
    Flushing,
    Yes,
}

/// Whether the image is marked as one that comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Marking {
    /// Nobody has changed it.
    Due,
    /// It is being marked.
    Asked,
    /// It is, or it can have no mark.
    Over,
}

/// What has come of an image, exact to the byte, whatever the order and the sizes of the writes.
///
/// It never claims a byte that was not noted. When a sender leaves more unfinished blocks behind than are remembered,
/// it forgets some of their bytes: those must be written again before the image counts as complete.
///
/// - Invariant 1: a block is set in `whole` only when each of its bytes has been noted.
/// - Invariant 2: a piece (`start -> end`) is a part of one block that is not set. It is not empty, not the whole
///   block, and does not overlap or touch another of that block.
/// - Invariant 3: there are at most `PIECES_MAX` pieces.
#[derive(Debug)]
pub struct Incoming {
    size: u64,
    /// The size of a block in bytes, a power of two.
    block: u64,
    whole: Bitmap,
    pieces: BTreeMap<u64, u64>,
    durable: Durable,
    mark: Marking,
}

impl Incoming {
    /// The most memory that this takes, in bytes.
    pub fn memory_for(size: u64) -> usize {
        Bitmap::memory_for(size, Self::block_of(size)).saturating_add(PIECES_MAX * 64)
    }

    fn block_of(size: u64) -> u64 {
        size.div_ceil(BLOCKS_MAX).max(BLOCK_MIN).next_power_of_two()
    }

    /// Awaits an image of `size` bytes.
    pub fn new(size: u64) -> Self {
        let block = Self::block_of(size);
        Self {
            size,
            block,
            whole: Bitmap::new(size, block),
            pieces: BTreeMap::new(),
            durable: Durable::No,
            mark: Marking::Due,
        }
    }

    /// A sender has come: nothing of an earlier one counts. What that has made durable stays so until it is changed.
    pub fn begin(&mut self) {
        self.whole.clear_range(0, self.size);
        self.pieces.clear();
    }

    /// True when the image may be changed: it is durable that it is marked, or there can be no mark.
    pub fn may_change(&self) -> bool {
        self.mark == Marking::Over
    }

    /// A sender wants to change the image. True: mark it, make that durable, and say so with [`Incoming::marked`].
    pub fn wants_mark(&mut self) -> bool {
        let is_due = self.mark == Marking::Due;
        if is_due {
            self.mark = Marking::Asked;
        }
        is_due
    }

    /// The mark is durable, or there can be none.
    pub fn marked(&mut self) {
        self.mark = Marking::Over;
    }

    /// The disk begins to change the image.
    pub fn note_change(&mut self) {
        self.durable = Durable::No;
    }

    /// The disk begins a FLUSH, and has nothing else to do.
    pub fn note_flush(&mut self) {
        if self.is_complete() {
            self.durable = Durable::Flushing;
        }
    }

    /// The disk has flushed.
    pub fn flushed(&mut self) {
        if self.durable == Durable::Flushing {
            self.durable = Durable::Yes;
        }
    }

    /// True when the image is here and durable as a whole, and nothing has been asked to change it since.
    pub fn is_durable(&self) -> bool {
        self.durable == Durable::Yes
    }

    /// The sender has written the range, and the disk has it. What lies beyond the end of the image is ignored.
    pub fn note(&mut self, range: &Range<u64>) {
        let range = range.start..range.end.min(self.size);
        if range.is_empty() {
            return;
        }
        let first = self.block_around(range.start);
        if range.end <= first.end {
            return self.note_within(&first, range);
        }
        let last = self.block_around(range.end - 1);
        self.note_within(&first, range.start..first.end);
        self.note_whole(first.end..last.start);
        self.note_within(&last, last.start..range.end);
    }

    /// True when every byte of the image has been written.
    pub fn is_complete(&self) -> bool {
        self.whole.set_bytes() == self.size
    }

    /// True when something has been written.
    pub fn has_begun(&self) -> bool {
        self.bytes() > 0
    }

    /// How much of the image has been written, for people.
    pub fn describe(&self) -> String {
        format!("{} of {} bytes were written", self.bytes(), self.size)
    }

    /// How many bytes have been written and are remembered.
    fn bytes(&self) -> u64 {
        let pieces: u64 = self.pieces.iter().map(|(start, end)| end - start).sum();
        self.whole.set_bytes() + pieces
    }

    /// The block that holds the byte at `offset`. The last one ends with the image.
    fn block_around(&self, offset: u64) -> Range<u64> {
        let start = offset & !(self.block - 1);
        start..start.saturating_add(self.block).min(self.size)
    }

    /// Notes blocks as a whole, and forgets their pieces.
    fn note_whole(&mut self, blocks: Range<u64>) {
        self.whole.set_range(blocks.start, blocks.end - blocks.start);
        while let Some((&piece, _)) = self.pieces.range(blocks.clone()).next() {
            self.pieces.remove(&piece);
        }
    }

    /// Notes a range that lies in one block, joined with the pieces it overlaps or touches.
    fn note_within(&mut self, block: &Range<u64>, mut range: Range<u64>) {
        if self.whole.is_set(block.start) {
            return;
        }
        while let Some((&start, &end)) = self.pieces.range(block.start..=range.end.min(block.end - 1)).next_back() {
            if end < range.start {
                break;
            }
            range = range.start.min(start)..range.end.max(end);
            self.pieces.remove(&start);
        }
        if range == *block {
            self.whole.set_range(block.start, block.end - block.start);
            return;
        }
        if self.pieces.len() >= PIECES_MAX {
            // Senders go upwards, so the lowest piece is the one that has waited longest for its other half.
            self.pieces.pop_first();
        }
        self.pieces.insert(range.start, range.end);
        debug_assert!(self.pieces.len() <= PIECES_MAX, "invariant 3");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bitmap::tests::{Random, SIZES};

    fn place(offset: u64) -> usize {
        usize::try_from(offset).unwrap()
    }

    #[test]
    fn nothing_is_complete_when_there_is_nothing() {
        assert!(Incoming::new(0).is_complete());
        assert!(!Incoming::new(1).is_complete());
    }

    #[test]
    fn it_agrees_with_a_naive_model() {
        for (seed, size) in (1_u64..).zip(SIZES.into_iter().skip(1).cycle().take(110)) {
            let mut random = Random::new(seed);
            let mut incoming = Incoming::new(size);
            let mut model = vec![false; place(size)];
            for _ in 0..300 {
                let offset = random.below(size + 10);
                let end = offset + (random.below(size + 10) >> random.below(16));
                incoming.note(&(offset..end));
                model.get_mut(place(offset)..place(end.min(size))).unwrap_or_default().fill(true);
                assert_eq!(incoming.is_complete(), !model.contains(&false), "seed {seed}");
                assert_eq!(incoming.has_begun(), model.contains(&true), "seed {seed}");
                let written = model.iter().filter(|written| **written).count() as u64;
                assert_eq!(incoming.bytes(), written, "seed {seed}");
            }
            for (start, chunk) in (0..).step_by(64).zip(model.chunks(64)) {
                for (at, _) in (start..).zip(chunk).filter(|(_, written)| !**written) {
                    assert!(!incoming.is_complete());
                    incoming.note(&(at..at + 1));
                }
            }
            assert!(incoming.is_complete(), "seed {seed}");
            assert!(incoming.pieces.is_empty());
            assert_eq!(incoming.describe(), format!("{size} of {size} bytes were written"));
            incoming.begin();
            assert!(!incoming.is_complete() && !incoming.has_begun());
        }
    }

    #[test]
    fn an_image_is_durable_when_a_flush_has_covered_all_of_it() {
        const SIZE: u64 = 10_000;
        let write = |incoming: &mut Incoming, range: Range<u64>| {
            incoming.note_change();
            incoming.note(&range);
        };
        let flush = |incoming: &mut Incoming| {
            incoming.note_flush();
            incoming.flushed();
            incoming.is_durable()
        };
        let mut incoming = Incoming::new(SIZE);
        assert!(!incoming.may_change() && incoming.wants_mark() && !incoming.may_change() && !incoming.wants_mark());
        incoming.marked();
        incoming.begin();
        assert!(incoming.may_change() && !incoming.wants_mark(), "one mark is for all senders");
        write(&mut incoming, 0..SIZE - 1);
        assert!(!flush(&mut incoming), "a byte is missing");
        write(&mut incoming, SIZE - 1..SIZE);
        assert!(!incoming.is_durable(), "nothing has flushed the last one");
        assert!(flush(&mut incoming));
        incoming.begin();
        assert!(incoming.is_durable() && !incoming.is_complete(), "somebody has connected and done nothing");
        assert!(flush(&mut incoming));
        incoming.note_change();
        assert!(!incoming.is_durable() && !flush(&mut incoming), "what it has changed may be anything");

        let mut incoming = Incoming::new(SIZE);
        write(&mut incoming, 0..SIZE);
        incoming.note_flush();
        write(&mut incoming, 0..1);
        incoming.flushed();
        assert!(!incoming.is_durable(), "it was changed meanwhile");
        assert!(flush(&mut incoming));
    }

    #[test]
    fn odd_writes_that_meet_within_blocks_count() {
        let size = 100_003;
        for step in [1, 7, 511, 513, 4095, 4097, 65_537, size] {
            let mut incoming = Incoming::new(size);
            let offsets: Vec<u64> = (0..size).step_by(place(step)).collect();
            for &offset in offsets.iter().rev().filter(|&&offset| offset != 0) {
                incoming.note(&(offset..offset + step));
            }
            assert!(!incoming.is_complete());
            incoming.note(&(0..step));
            assert!(incoming.is_complete());
        }
    }

    #[test]
    fn memory_is_bounded_and_what_is_forgotten_is_missing() {
        let blocks = PIECES_MAX as u64 + 100;
        let mut incoming = Incoming::new(blocks * BLOCK_MIN);
        for block in 0..blocks {
            incoming.note(&(block * BLOCK_MIN..block * BLOCK_MIN + 100));
        }
        assert_eq!(incoming.pieces.len(), PIECES_MAX);
        for block in 0..blocks {
            incoming.note(&(block * BLOCK_MIN + 100..(block + 1) * BLOCK_MIN));
        }
        assert!(!incoming.is_complete());
        incoming.note(&(0..blocks * BLOCK_MIN / 2));
        assert!(incoming.is_complete());
        assert!((1_u64 << 62).div_ceil(Incoming::new(1 << 62).block) <= BLOCKS_MAX);
    }

    #[test]
    fn ranges_at_the_edge_of_numbers_do_no_harm() {
        let size = (1 << 62) + 5;
        let mut incoming = Incoming::new(size);
        incoming.note(&(1..u64::MAX));
        incoming.note(&(u64::MAX - 1..u64::MAX));
        incoming.note(&(size..size + 1));
        assert!(!incoming.is_complete());
        incoming.note(&(0..1));
        assert!(incoming.is_complete());
    }
}
