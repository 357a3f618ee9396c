//! PURE: a bit for each block of a file. A range sets every block it touches, and clears only blocks that lie in it as
//! a whole: whoever wants to be exact has to pass whole blocks.
//!
//! Offsets and lengths are bytes of the file. What lies beyond its end is ignored, so no range can overflow.

use std::ops::Range;

/// Bits of a word of the map.
const WORD: u64 = u64::BITS as u64;

/// A bit for each block of a file.
///
/// - Invariant 1: no bit beyond the last block is set.
/// - Invariant 2: `set_blocks` is the number of bits set.
#[derive(Debug, Clone)]
pub struct Bitmap {
    words: Vec<u64>,
    size: u64,
    block_shift: u32,
    set_blocks: u64,
}

impl Bitmap {
    /// The memory of a map, in bytes.
    pub fn memory_for(size: u64, block: u64) -> usize {
        memory_index(size.div_ceil(block).div_ceil(WORD)).saturating_mul(size_of::<u64>())
    }

    /// A map of a file of `size` bytes with nothing set, a bit for each `block` bytes, which is a power of two. The
    /// memory is taken at once: 2 MiB per TiB with blocks of 64 KiB.
    pub fn new(size: u64, block: u64) -> Self {
        debug_assert!(block.is_power_of_two(), "offsets are shifted to block numbers");
        let blocks = size.div_ceil(block);
        Self { words: vec![0; memory_index(blocks.div_ceil(WORD))], size, block_shift: block.ilog2(), set_blocks: 0 }
    }

    /// Sets every block that the range touches.
    pub fn set_range(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        if offset < end {
            for (at, mask) in masks(self.blocks_touched(offset..end)) {
                if let Some(word) = self.words.get_mut(at) {
                    self.set_blocks += u64::from((mask & !*word).count_ones());
                    *word |= mask;
                }
            }
        }
        debug_assert!(self.set_blocks <= self.blocks(), "invariants 1 and 2");
    }

    /// Clears every block that lies in the range as a whole. One that only touches it keeps its bit, because the rest
    /// of it still counts.
    pub fn clear_range(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.size);
        let end_block = if end == self.size { self.blocks() } else { end >> self.block_shift };
        for (at, mask) in masks(offset.div_ceil(self.block())..end_block) {
            if let Some(word) = self.words.get_mut(at) {
                let cleared = u64::from((mask & *word).count_ones());
                debug_assert!(cleared <= self.set_blocks, "invariant 2");
                self.set_blocks = self.set_blocks.saturating_sub(cleared);
                *word &= !mask;
            }
        }
    }

    /// True when the block that holds the byte at `offset` is set.
    pub fn is_set(&self, offset: u64) -> bool {
        offset < self.size && self.is_block_set(offset >> self.block_shift)
    }

    /// How many bytes the set blocks hold. Costs the same for every map.
    pub fn set_bytes(&self) -> u64 {
        self.bytes_of(self.set_blocks, self.is_set(self.size.saturating_sub(1)))
    }

    /// How many bytes the clear blocks hold that the range touches: what [`Bitmap::set_range`] would add. Costs a step
    /// for every 64 blocks of the range.
    pub fn clear_bytes(&self, offset: u64, len: u64) -> u64 {
        let end = offset.saturating_add(len).min(self.size);
        if offset >= end {
            return 0;
        }
        let clear = masks(self.blocks_touched(offset..end))
            .map(|(at, mask)| u64::from((mask & !self.words.get(at).copied().unwrap_or(u64::MAX)).count_ones()))
            .sum();
        self.bytes_of(clear, end > self.last_block_start() && !self.is_set(self.size - 1))
    }

    /// The first run of set blocks from the block on that holds `from`, as a range of bytes that ends with the file at
    /// the latest. It is cut to as many whole blocks as fit in `max_len` bytes, but one at least.
    pub fn next_set_range(&self, from: u64, max_len: u64) -> Option<Range<u64>> {
        if from >= self.size {
            return None;
        }
        let first = self.find(from >> self.block_shift, self.blocks(), 0)?;
        let most = (max_len >> self.block_shift).max(1);
        let limit = first.saturating_add(most).min(self.blocks());
        let end = self.find(first, limit, u64::MAX).unwrap_or(limit);
        let end_offset = if end == self.blocks() { self.size } else { end << self.block_shift };
        Some(first << self.block_shift..end_offset)
    }

    fn block(&self) -> u64 {
        1 << self.block_shift
    }

    fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block())
    }

    /// The blocks that a range touches, which is not empty.
    fn blocks_touched(&self, range: Range<u64>) -> Range<u64> {
        range.start >> self.block_shift..((range.end - 1) >> self.block_shift) + 1
    }

    fn last_block_start(&self) -> u64 {
        self.blocks().saturating_sub(1) << self.block_shift
    }

    /// How many bytes `blocks` blocks hold. `with_last`: the last block of the file is one of them, which may be
    /// shorter.
    fn bytes_of(&self, blocks: u64, with_last: bool) -> u64 {
        if with_last {
            (blocks.saturating_sub(1) << self.block_shift) + (self.size - self.last_block_start())
        } else {
            blocks << self.block_shift
        }
    }

    fn is_block_set(&self, block: u64) -> bool {
        self.words.get(memory_index(block / WORD)).is_some_and(|word| word >> (block % WORD) & 1 == 1)
    }

    /// The first block in `from..to` whose bit is set in the map with every word flipped by `flip`: 0 finds what is
    /// set, all ones what is clear.
    fn find(&self, from: u64, to: u64, flip: u64) -> Option<u64> {
        let first_word = from / WORD;
        let words = self.words.get(memory_index(first_word)..memory_index(to.div_ceil(WORD)))?;
        let mut ahead = u64::MAX << (from % WORD);
        for (number, word) in (first_word..).zip(words) {
            let found = (word ^ flip) & ahead;
            if found != 0 {
                return Some(number * WORD + u64::from(found.trailing_zeros())).filter(|&block| block < to);
            }
            ahead = u64::MAX;
        }
        None
    }
}

/// The words that hold a bit of `bits`: their places in memory, and the mask of those bits.
fn masks(bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let words = if bits.is_empty() { 0..0 } else { bits.start / WORD..(bits.end - 1) / WORD + 1 };
    words.map(move |word| {
        let first = bits.start.saturating_sub(word * WORD);
        let last = (bits.end - 1 - word * WORD).min(WORD - 1);
        (memory_index(word), (u64::MAX << first) & (u64::MAX >> (WORD - 1 - last)))
    })
}

/// A word's place in memory. A word beyond what memory can address has none.
fn memory_index(word: u64) -> usize {
    usize::try_from(word).unwrap_or(usize::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Xorshift: reproducible, and enough to reach every corner.
    pub(crate) struct Random(u64);

    impl Random {
        pub(crate) fn new(seed: u64) -> Self {
            Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
        }

        pub(crate) fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }
    }

    /// Sizes of files: none, odd, and around what blocks and words of blocks end at.
    pub(crate) const SIZES: [u64; 12] =
        [0, 1, 511, 512, 513, 4096, 32_768, 32_769, 65_535, 100_000, 1 << 17, (1 << 17) + 700];

    #[test]
    fn a_bitmap_agrees_with_a_naive_model() {
        for (seed, size) in (1_u64..).zip(SIZES.into_iter().cycle().take(96)) {
            let mut random = Random::new(seed);
            let block = size.div_ceil(2048).max(1).next_power_of_two() << random.below(8);
            let mut map = Bitmap::new(size, block);
            let mut model = vec![false; memory_index(size.div_ceil(block))];
            let bytes = |number: usize| number as u64 * block..(number as u64 + 1).saturating_mul(block).min(size);
            for _ in 0..200 {
                let offset = random.below(size + 10);
                let len = random.below(size + 10) >> random.below(16);
                let end = (offset + len).min(size);
                match random.below(8) {
                    0..=3 => {
                        map.set_range(offset, len);
                        for (number, bit) in model.iter_mut().enumerate() {
                            *bit |= bytes(number).start < end && offset < bytes(number).end && offset < end;
                        }
                    }
                    4..=6 => {
                        map.clear_range(offset, len);
                        for (number, bit) in model.iter_mut().enumerate() {
                            *bit &= !(offset <= bytes(number).start && bytes(number).end <= end);
                        }
                    }
                    _ => {}
                }
                let set = |number: &usize| model.get(*number) == Some(&true);
                let total: u64 = (0..model.len()).filter(set).map(|n| bytes(n).end - bytes(n).start).sum();
                assert_eq!(map.set_bytes(), total, "seed {seed}");
                let (from, max_len) = (random.below(size + 10), random.below(block * 100));
                let expected = (0..model.len()).find(|n| bytes(*n).end > from && set(n)).map(|first| {
                    let most = memory_index((max_len / block).max(1));
                    let last = (first..first + most).take_while(set).last().unwrap();
                    bytes(first).start..bytes(last).end
                });
                assert_eq!(map.next_set_range(from, max_len), expected, "seed {seed} from {from} max {max_len}");
                assert_eq!(map.is_set(from), from < size && set(&memory_index(from / block)));
                let touches = |n: &usize| bytes(*n).start < end && offset < bytes(*n).end && offset < end;
                let clear = (0..model.len()).filter(|n| touches(n) && !set(n)).map(|n| bytes(n).end - bytes(n).start);
                assert_eq!(map.clear_bytes(offset, len), clear.sum(), "seed {seed} offset {offset} len {len}");
            }
        }
    }

    #[test]
    fn ranges_at_the_edge_of_numbers_do_no_harm() {
        let size = (1 << 62) + 5;
        let mut map = Bitmap::new(size, 1 << 50);
        map.set_range(u64::MAX, u64::MAX);
        map.set_range(size, 1);
        map.set_range(0, 0);
        assert_eq!((map.set_bytes(), map.next_set_range(0, u64::MAX)), (0, None));
        assert_eq!((map.clear_bytes(0, u64::MAX), map.clear_bytes(u64::MAX, u64::MAX)), (size, 0));
        map.set_range(size - 1, u64::MAX);
        assert_eq!((map.clear_bytes(size - 1, 1), map.clear_bytes(size - 6, 1)), (0, 1 << 50));
        assert_eq!((map.set_bytes(), map.next_set_range(0, 0)), (5, Some(1 << 62..size)));
        map.set_range(0, u64::MAX);
        assert_eq!((map.set_bytes(), map.next_set_range(0, u64::MAX)), (size, Some(0..size)));
        map.clear_range(u64::MAX, u64::MAX);
        map.clear_range(1, u64::MAX - 1);
        assert_eq!(map.set_bytes(), 1 << 50);
    }
}
