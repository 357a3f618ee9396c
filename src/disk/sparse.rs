//! Holes: where they are, and writes that keep them.
//!
//! The file is asked each time. What it says holds only until the next write, and a map built at start would cost
//! memory in proportion to the image, so no hole is remembered beyond one operation. An image that cannot tell (a block
//! device, a file system without holes or one that answers too early, a failing call) counts as data everywhere, which is
//! never wrong. A range about which the answer takes too long counts as data, too.

use super::image::Image;
use crate::sys;
use crate::sys::pages::FileSystem;
use crate::work::{Extent, BLOCK};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// [`BLOCK`] as a length in memory.
const BLOCK_LEN: usize = 4096;
const _: () = assert!(BLOCK_LEN as u64 == BLOCK, "one block");

/// How long a question may take. A longer one may have been about something that the file system has to walk through:
/// hundreds of thousands of extents, or the pages of a large file.
const SLOW: Duration = Duration::from_millis(2);

/// A range that is slow to walk counts as data for so many times as long as the walk took.
const PATIENCE: u32 = 1000;

/// How many such ranges are remembered. Each took many requests to make.
const SLOW_MAX: usize = 64;

/// How far one question about the end of data goes on an image in memory, in bytes: the kernel walks it page by page.
const MEMORY_STEP: u64 = 1 << 20;

/// Asks the file for holes, and remembers where that takes too long to be asked again soon: there all counts as data.
#[derive(Debug, Default)]
pub(super) struct Holes {
    slow: VecDeque<Slow>,
}

/// A range about which a question took long.
#[derive(Debug)]
struct Slow {
    range: Range<u64>,
    /// Until when it counts as data. `None`: the thread may have waited for a processor or for the disk, so the next
    /// question decides, by the processor time that it takes.
    until: Option<Instant>,
}

impl Holes {
    /// The hole or the data that begins at `offset`, up to `limit` (an offset, too) or the end of the image, whichever comes
    /// first, or up to where it is time to ask again. Empty only when that is at or before `offset`. Holes read as
    /// zeroes; what cannot be told is data.
    pub(super) fn extent(&mut self, image: &Image, offset: u64, limit: u64) -> Extent {
        let limit = limit.min(image.size).max(offset);
        let data = self.next_data(image, offset);
        if data > offset {
            return Extent { range: offset..data.min(limit), is_hole: true };
        }
        // A file that was cut short says that a hole is here. It must count as data, so that the read of it fails.
        let end = Some(self.next_hole(image, offset, limit)).filter(|&end| end > offset).unwrap_or(limit);
        Extent { range: offset..end.min(limit), is_hole: false }
    }

    /// The hole that the range begins with, if it does.
    pub(super) fn hole(&mut self, image: &Image, range: Range<u64>) -> Option<Extent> {
        let end = self.next_data(image, range.start).min(range.end);
        (end > range.start).then_some(Extent { range: range.start..end, is_hole: true })
    }

    /// Where data begins at or after `offset`; the end of the image if there is none.
    fn next_data(&mut self, image: &Image, offset: u64) -> u64 {
        if !image.knows_its_holes() || self.known_slow(offset).is_some() {
            return offset;
        }
        let size = image.size;
        let seek = || match sys::file::seek_data(&image.file, offset) {
            Ok(Some(data)) => data.min(size).max(offset),
            // Beyond the end of the file there is no data either, but that is no hole of the image: someone cut it short.
            Ok(None) if image.file.metadata().is_ok_and(|file| file.len() >= size) => size.max(offset),
            _ => offset,
        };
        self.ask(offset, seek, |&data| data)
    }

    /// Where a hole begins after `offset`, where data is; at most `limit`, and no hole where it is time to ask again.
    fn next_hole(&mut self, image: &Image, offset: u64, limit: u64) -> u64 {
        if let Some(end) = self.known_slow(offset) {
            return end;
        }
        if !image.knows_its_holes() {
            return limit;
        }
        if image.source == FileSystem::Memory {
            // What is in memory is data, so a question is asked only where it ends soon.
            let end = limit.min(offset.saturating_add(MEMORY_STEP));
            if sys::pages::is_cached(&image.file, offset, end.saturating_sub(offset)).unwrap_or(true) {
                return end;
            }
        }
        self.ask(offset, || sys::file::seek_hole(&image.file, offset).unwrap_or(limit), |&end| end)
    }

    /// Where the range ends that `offset` is in and that counts as data because it is slow to walk.
    fn known_slow(&mut self, offset: u64) -> Option<u64> {
        if self.slow.is_empty() {
            return None;
        }
        let now = Instant::now();
        self.slow.retain(|slow| slow.until.is_none_or(|until| until > now));
        let known = self.slow.iter().find(|slow| slow.until.is_some() && slow.range.contains(&offset));
        known.map(|slow| slow.range.end)
    }

    /// Asks about a range that begins at `offset` and ends where `end_of` the answer says; notes how long that took.
    fn ask<T>(&mut self, offset: u64, call: impl FnOnce() -> T, end_of: impl FnOnce(&T) -> u64) -> T {
        let suspect = self.slow.iter().position(|slow| slow.until.is_none() && slow.range.contains(&offset));
        let (began, before) = (Instant::now(), suspect.map(|_| sys::thread_time()));
        let found = call();
        let took = before.map_or_else(|| began.elapsed(), |before| sys::thread_time().saturating_sub(before));
        let range = offset..end_of(&found);
        // A quick answer about what lies in front clears nothing of what was slow.
        let is_decided = |slow: &Slow| took >= SLOW || range.end >= slow.range.end;
        let suspect = suspect.filter(|&at| self.slow.get(at).is_some_and(is_decided));
        suspect.and_then(|at| self.slow.remove(at));
        if took >= SLOW && !range.is_empty() {
            // What lies in front of it is likely to be slow for the same reason, and would be walked through as well.
            let range = offset.saturating_sub(range.end - offset)..range.end;
            if self.slow.len() == SLOW_MAX {
                self.slow.pop_front();
            }
            let until = suspect.map(|_| Instant::now() + took.saturating_mul(PATIENCE));
            self.slow.push_back(Slow { range, until });
        }
        found
    }

    /// Writes `bytes` at `offset`, except for the blocks that are zero and lie over a hole.
    ///
    /// The question is always where data begins, never where it ends: that may walk every page of a large file (10 ms per
    /// GiB on tmpfs), while this one is answered from where it stands.
    pub(super) fn write(&mut self, image: &Image, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut written = 0;
        let mut data = 0;
        for Range { start: at, end: next } in zero_blocks(image, offset, bytes) {
            let (start, end) = (offset + at as u64, offset + next as u64);
            if data <= start {
                data = self.next_data(image, start);
            }
            if data >= end {
                write_part(image, offset, bytes, written..at)?;
                written = next;
            }
        }
        write_part(image, offset, bytes, written..bytes.len())
    }
}

/// True when [`Holes::write`] would ask for holes.
pub(super) fn has_zeroes(image: &Image, offset: u64, bytes: &[u8]) -> bool {
    image.knows_its_holes() && zero_blocks(image, offset, bytes).next().is_some()
}

/// True when what was read begins with a block of zeroes, or with less than a block and is zero: it may be a hole.
pub(super) fn begins_with_zeroes(image: &Image, bytes: &[u8]) -> bool {
    image.knows_its_holes() && !bytes.is_empty() && is_zero(bytes.get(..BLOCK_LEN).unwrap_or(bytes))
}

/// The whole blocks of the image that a payload covers with zeroes, as ranges of the payload.
fn zero_blocks<'a>(image: &Image, offset: u64, bytes: &'a [u8]) -> impl Iterator<Item = Range<usize>> + 'a {
    let size = image.size;
    let mut at = (offset.wrapping_neg() % BLOCK) as usize;
    bytes.get(at..).unwrap_or_default().chunks(BLOCK_LEN).filter_map(move |block| {
        let range = at..at + block.len();
        at = range.end;
        let is_whole = block.len() == BLOCK_LEN || offset + range.end as u64 == size;
        (is_whole && is_zero(block)).then_some(range)
    })
}

/// Writes the bytes `part` of a payload that belongs at `offset`.
fn write_part(image: &Image, offset: u64, bytes: &[u8], part: Range<usize>) -> io::Result<()> {
    let start = offset + part.start as u64;
    image.file.write_all_at(bytes.get(part).unwrap_or_default(), start)
}

/// True when every byte is zero. The first word is looked at on its own, because in data it is hardly ever zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Long enough to be compared in wide registers, short enough to stop soon.
    const STRIDE: usize = 256;
    bytes.first_chunk().is_none_or(|word| u64::from_ne_bytes(*word) == 0)
        && bytes.chunks(STRIDE).all(|stride| stride.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]
mod tests {
    use super::super::tests::{Random, TempFile};
    use super::*;
    use std::os::unix::fs::MetadataExt;

    const B: u64 = BLOCK;

    fn image(temp: &TempFile, size: u64) -> Image {
        temp.file.set_len(size).unwrap();
        Image::of(&temp.file, size)
    }

    fn contents(image: &Image) -> Vec<u8> {
        let mut bytes = vec![0xaa; image.size as usize];
        image.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn one_byte_anywhere_is_not_zero() {
        for length in [0, 1, 7, 8, 9, 255, 256, 257, 512, 4096] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for i in 0..length {
                bytes[i] = 1 << (i % 8);
                assert!(!is_zero(&bytes), "byte {i} of {length}");
                bytes[i] = 0;
            }
        }
    }

    #[test]
    fn zero_blocks_over_a_hole_leave_it() {
        let temp = TempFile::new("keep");
        let image = image(&temp, 16 * B);
        let mut payload = vec![0; 8 * BLOCK_LEN];
        payload[3 * BLOCK_LEN + 17] = 1;
        Holes::default().write(&image, 4 * B, &payload).unwrap();
        assert_eq!(temp.file.metadata().unwrap().blocks() * 512, B, "one block is allocated");
        assert_eq!(Holes::default().extent(&image, 0, u64::MAX), Extent { range: 0..7 * B, is_hole: true });
        assert_eq!(Holes::default().extent(&image, 7 * B, u64::MAX), Extent { range: 7 * B..8 * B, is_hole: false });
        assert_eq!(Holes::default().extent(&image, 8 * B, u64::MAX), Extent { range: 8 * B..16 * B, is_hole: true });
        assert_eq!(
            Holes::default().extent(&image, B, 3 * B),
            Extent { range: B..3 * B, is_hole: true },
            "the limit holds"
        );
    }

    #[test]
    fn zeroes_over_data_are_written() {
        let temp = TempFile::new("data");
        let image = image(&temp, 8 * B);
        image.file.write_all_at(&vec![7; 4 * BLOCK_LEN], 2 * B).unwrap();
        Holes::default().write(&image, 100, &vec![0; 7 * BLOCK_LEN]).unwrap();
        assert!(is_zero(&contents(&image)));
        // The two ends of the payload are no whole blocks, so they are written too.
        assert_eq!(Holes::default().extent(&image, 0, u64::MAX), Extent { range: 0..B, is_hole: false });
        assert_eq!(Holes::default().extent(&image, B, u64::MAX), Extent { range: B..2 * B, is_hole: true });
        assert_eq!(Holes::default().extent(&image, 2 * B, u64::MAX), Extent { range: 2 * B..6 * B, is_hole: false });
    }

    #[test]
    fn the_short_last_block_counts_when_it_is_covered() {
        let temp = TempFile::new("last");
        let image = image(&temp, 2 * B + 512);
        Holes::default().write(&image, 2 * B, &[0; 512]).unwrap();
        Holes::default().write(&image, 0, &vec![0; 2 * BLOCK_LEN + 512]).unwrap();
        assert_eq!(temp.file.metadata().unwrap().blocks(), 0);
        Holes::default().write(&image, 2 * B, &[0; 511]).unwrap();
        assert_ne!(temp.file.metadata().unwrap().blocks(), 0, "a part of a block is written");
    }

    #[test]
    fn a_file_cut_short_has_no_hole_behind_its_end() {
        let temp = TempFile::new("cut");
        let image = image(&temp, 8 * B);
        temp.file.set_len(4 * B).unwrap();
        assert_eq!(Holes::default().extent(&image, 4 * B, u64::MAX), Extent { range: 4 * B..8 * B, is_hole: false });
        assert!(!Holes::default().extent(&image, 0, u64::MAX).is_hole);
        Holes::default().write(&image, 6 * B, &[0; BLOCK_LEN]).unwrap();
        assert_eq!(temp.file.metadata().unwrap().len(), 7 * B, "an answered write is in the file");
    }

    #[test]
    fn an_image_that_cannot_tell_is_data() {
        let temp = TempFile::new("device");
        let device = Image { is_device: true, ..image(&temp, 4 * B) };
        assert_eq!(Holes::default().extent(&device, B, u64::MAX), Extent { range: B..4 * B, is_hole: false });
        Holes::default().write(&device, 0, &vec![0; 4 * BLOCK_LEN]).unwrap();
        assert_eq!(temp.file.metadata().unwrap().blocks() * 512, 4 * B);
        assert_eq!(Holes::default().extent(&device, 9 * B, u64::MAX).range, 9 * B..9 * B, "nothing behind the end");
    }

    #[test]
    fn any_mixture_reads_back_and_extents_tile_the_image() {
        let temp = TempFile::new("mixture");
        let image = image(&temp, 64 * B + 1536);
        let mut model = vec![0; image.size as usize];
        let mut random = Random::new(0x5eed_0001);
        for _ in 0..600 {
            let offset = random.below(image.size);
            let length = random.below((image.size - offset).min(9 * B) + 1) as usize;
            let mut payload = vec![0; length];
            for block in payload.chunks_mut(1 + random.below(3 * B) as usize) {
                if random.below(3) == 0 {
                    block.fill(random.below(256) as u8);
                }
            }
            Holes::default().write(&image, offset, &payload).unwrap();
            model[offset as usize..][..length].copy_from_slice(&payload);
            if random.below(8) == 0 {
                let hole = random.below(60) * B;
                sys::file::punch_hole(&image.file, hole, 4 * B).unwrap();
                model[hole as usize..][..4 * BLOCK_LEN].fill(0);
            }
        }
        assert_eq!(contents(&image), model);
        let mut offset = 0;
        while offset < image.size {
            let found = Holes::default().extent(&image, offset, u64::MAX);
            assert!(found.range.start == offset && found.range.end > offset && found.range.end <= image.size);
            let bytes = &model[found.range.start as usize..found.range.end as usize];
            assert!(!found.is_hole || is_zero(bytes), "{found:?}");
            offset = found.range.end;
        }
    }

    #[test]
    fn where_a_question_takes_long_all_is_data_for_a_while() {
        let temp = TempFile::new("slow");
        let image = image(&temp, 16 * B);
        let mut holes = Holes::default();
        let sleep = |end| {
            move || {
                std::thread::sleep(2 * SLOW);
                end
            }
        };
        let work = |end| {
            move || {
                let start = sys::thread_time();
                while sys::thread_time().saturating_sub(start) < 2 * SLOW {}
                end
            }
        };
        let known = Extent { range: B..8 * B, is_hole: false };
        let ask = |holes: &mut Holes, range: Range<u64>, is_work| {
            if is_work {
                holes.ask(range.start, work(range.end), |&end| end);
            } else {
                holes.ask(range.start, sleep(range.end), |&end| end);
            }
        };
        ask(&mut holes, 0..8 * B, true);
        assert!(holes.known_slow(B).is_none(), "it may have been chance");
        ask(&mut holes, 0..8 * B, false);
        assert!(holes.slow.is_empty(), "it was");
        ask(&mut holes, 0..8 * B, false);
        ask(&mut holes, 0..8 * B, true);
        assert_eq!(holes.extent(&image, B, u64::MAX), known);
        assert_eq!(holes.extent(&image, 8 * B, u64::MAX), Extent { range: 8 * B..16 * B, is_hole: true });
        assert!(holes.hole(&image, B..2 * B).is_none());
        holes.write(&image, 0, &[0; BLOCK_LEN]).unwrap();
        assert_eq!(temp.file.metadata().unwrap().blocks() * 512, B, "it is written");
        holes.slow.iter_mut().for_each(|slow| slow.until = Some(Instant::now()));
        assert!(holes.hole(&image, B..2 * B).is_some());
        (0..100).for_each(|n| ask(&mut holes, n..n + 1, true));
        assert_eq!(holes.slow.len(), SLOW_MAX);

        // Who asks further in front each time would have it walked each time.
        holes = Holes::default();
        ask(&mut holes, 5 * B..8 * B, true);
        holes.ask(3 * B, || 4 * B, |&end| end);
        ask(&mut holes, 5 * B..8 * B, true);
        assert_eq!([2 * B - 1, 2 * B, 8 * B].map(|at| holes.known_slow(at)), [None, Some(8 * B), None]);
    }

    #[test]
    fn what_is_in_memory_is_walked_in_steps() {
        let shm = std::path::Path::new("/dev/shm");
        if !shm.is_dir() {
            return;
        }
        let temp = TempFile::within(shm, "memory");
        let image = Image { source: FileSystem::Memory, ..image(&temp, 4 << 20) };
        image.file.write_all_at(&vec![7; 2 << 20], 0).unwrap();
        let first = Holes::default().extent(&image, 0, u64::MAX);
        assert_eq!(first, Extent { range: 0..MEMORY_STEP, is_hole: false });
        let at = (2 << 20) - B;
        let last = Holes::default().extent(&image, at, at + 2 * B);
        assert!(!last.is_hole && (last.range.end == 2 << 20 || last.range.end == at + 2 * B), "{last:?}");
    }
}
