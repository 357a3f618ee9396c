//! What the server has answered and may still forget: it would be lost if its machine failed now.

use crate::buffer::Buffer;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// What one extent costs besides its bytes, in bytes: its node of the tree, and the heads of its memory.
pub(super) const ENTRY: usize = 128;
/// The longest extent of data, in bytes. Cutting one copies what is left of it.
pub(super) const DATA_MAX: usize = 64 << 10;

/// A range as it was written last.
#[derive(Debug, Clone)]
pub(super) struct Extent {
    end: u64,
    /// Its bytes; `None` for zeroes.
    content: Option<Rc<Buffer>>,
    /// Which answer this was.
    seq: u64,
}

/// Disjoint extents, by where they begin.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    extents: BTreeMap<u64, Extent>,
    memory: usize,
}

impl Dirty {
    /// Notes bytes written at `offset`. They take the place of what was there.
    pub(super) fn note_data(&mut self, offset: u64, bytes: &[u8], seq: u64) {
        self.cut(&(offset..offset.saturating_add(bytes.len() as u64)));
        let mut start = offset;
        for piece in bytes.chunks(DATA_MAX) {
            let end = start.saturating_add(piece.len() as u64);
            self.insert(start, Extent { end, content: Some(copy(piece)), seq });
            start = end;
        }
    }

    /// Notes a range that reads as zeroes. It takes the place of what was there.
    pub(super) fn note_zeroes(&mut self, range: &Range<u64>, seq: u64) {
        self.cut(range);
        if !range.is_empty() {
            self.insert(range.start, Extent { end: range.end, content: None, seq });
        }
    }

    /// Forgets what was noted of this range.
    pub(super) fn cut(&mut self, range: &Range<u64>) {
        if range.is_empty() {
            return;
        }
        let before = self.extents.range(..range.start).next_back().map(|(&start, extent)| (start, extent.end));
        if let Some((start, _)) = before.filter(|&(_, end)| end > range.start) {
            self.cut_one(start, range);
        }
        while let Some((&start, _)) = self.extents.range(range.clone()).next() {
            self.cut_one(start, range);
        }
    }

    /// Leaves of the extent at `start` what is outside of `range`.
    fn cut_one(&mut self, start: u64, range: &Range<u64>) {
        let Some(extent) = self.extents.remove(&start) else { return };
        self.memory -= extent.memory();
        if start < range.start {
            self.insert(start, extent.part(start, &(start..range.start)));
        }
        if extent.end > range.end {
            self.insert(range.end, extent.part(start, &(range.end..extent.end)));
        }
    }

    /// Forgets what was answered up to `seq`: it is on stable storage.
    pub(super) fn drop_until(&mut self, seq: u64) {
        let memory = &mut self.memory;
        self.extents.retain(|_, extent| {
            let stays = extent.seq > seq;
            if !stays {
                *memory -= extent.memory();
            }
            stays
        });
    }

    /// The first part at or behind `offset` that has to be written again, at most `zeroes_max` bytes of it where they are
    /// zeroes.
    pub(super) fn next(&self, offset: u64, zeroes_max: u64) -> Option<(Range<u64>, Option<Rc<Buffer>>)> {
        let inside = self.extents.range(..offset).next_back().filter(|(_, extent)| extent.end > offset);
        let (&start, extent) = inside.or_else(|| self.extents.range(offset..).next())?;
        if let Some(bytes) = &extent.content {
            return Some((start..extent.end, Some(Rc::clone(bytes))));
        }
        let start = start.max(offset);
        Some((start..extent.end.min(start.saturating_add(zeroes_max)), None))
    }

    /// Memory it takes, in bytes.
    pub(super) fn memory(&self) -> usize {
        self.memory
    }

    /// True when nothing could be lost.
    pub(super) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    fn insert(&mut self, start: u64, extent: Extent) {
        self.memory += extent.memory();
        let replaced = self.extents.insert(start, extent);
        debug_assert!(replaced.is_none(), "extents are disjoint");
    }
}

impl Extent {
    /// What it takes, in bytes.
    fn memory(&self) -> usize {
        ENTRY + self.content.as_ref().map_or(0, |bytes| bytes.len())
    }

    /// A part of the extent that begins at `start`.
    fn part(&self, start: u64, range: &Range<u64>) -> Self {
        let at = |offset: u64| usize::try_from(offset.saturating_sub(start)).unwrap_or(usize::MAX);
        let part = |bytes: &Rc<Buffer>| copy(bytes.filled().get(at(range.start)..at(range.end)).unwrap_or_default());
        Self { end: range.end, content: self.content.as_ref().map(part), seq: self.seq }
    }
}

fn copy(bytes: &[u8]) -> Rc<Buffer> {
    let mut buffer = Buffer::with_capacity(bytes.len());
    buffer.append(bytes);
    Rc::new(buffer)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]
mod tests {
    use super::*;

    /// A number that seems to be random.
    fn random(state: &mut u64) -> u64 {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        *state
    }

    /// The map as a byte an offset: `None` is not noted, `Some(None)` zero.
    fn content(dirty: &Dirty, size: u64) -> Vec<Option<u8>> {
        let mut bytes = vec![None; usize::try_from(size).unwrap()];
        let mut at = 0;
        while let Some((range, found)) = dirty.next(at, 7) {
            assert!(range.start >= at && !range.is_empty());
            for offset in range.clone() {
                let byte = found.as_ref().map_or(0, |bytes| bytes.filled()[(offset - range.start) as usize]);
                bytes[offset as usize] = Some(byte);
            }
            at = range.end;
        }
        bytes
    }

    #[test]
    fn it_is_what_a_byte_by_byte_model_is() {
        const SIZE: u64 = 96;
        let mut state = 0x9e37_79b9_7f4a_7c15;
        for _ in 0..2_000 {
            let mut dirty = Dirty::default();
            let mut model: Vec<Option<(u8, u64)>> = vec![None; SIZE as usize];
            for seq in 1..20 {
                let start = random(&mut state) % SIZE;
                let end = start + random(&mut state) % (SIZE - start + 1);
                let range = start..end;
                let places = start as usize..end as usize;
                match random(&mut state) % 5 {
                    0 | 1 => {
                        let bytes: Vec<u8> = (start..end).map(|_| random(&mut state) as u8 | 1).collect();
                        dirty.note_data(start, &bytes, seq);
                        places.zip(bytes).for_each(|(place, byte)| model[place] = Some((byte, seq)));
                    }
                    2 => {
                        dirty.note_zeroes(&range, seq);
                        model[places].fill(Some((0, seq)));
                    }
                    3 => {
                        dirty.cut(&range);
                        model[places].fill(None);
                    }
                    _ => {
                        let mark = random(&mut state) % 20;
                        dirty.drop_until(mark);
                        for byte in &mut model {
                            *byte = byte.filter(|&(_, seq)| seq > mark);
                        }
                    }
                }
                let expected: Vec<Option<u8>> = model.iter().map(|byte| byte.map(|(byte, _)| byte)).collect();
                assert_eq!(content(&dirty, SIZE), expected);
                let data = dirty.extents.values().filter_map(|extent| extent.content.as_ref()).map(|b| b.len());
                assert_eq!(dirty.memory(), dirty.extents.len() * ENTRY + data.sum::<usize>());
                assert_eq!(dirty.is_empty(), expected.iter().all(Option::is_none));
            }
        }
    }

    #[test]
    fn data_is_kept_in_pieces_and_zeroes_are_handed_out_in_pieces() {
        let mut dirty = Dirty::default();
        dirty.note_data(10, &vec![7; DATA_MAX + 1], 1);
        let (range, bytes) = dirty.next(0, 100).unwrap();
        assert_eq!((range, bytes.unwrap().len()), (10..10 + DATA_MAX as u64, DATA_MAX));
        dirty.note_zeroes(&(0..u64::MAX), 2);
        assert_eq!((dirty.memory(), dirty.next(5, 100).unwrap().0), (ENTRY, 5..105));
        assert_eq!(dirty.next(u64::MAX - 1, 100).unwrap().0, u64::MAX - 1..u64::MAX);
        assert!(dirty.next(u64::MAX, 100).is_none());
    }
}
