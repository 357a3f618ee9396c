//! Holes: where they are, and writes that keep them.
//!
//! Every operation asks the file anew: an answer is good only until the next write, and a map of all holes would take memory
//! in proportion to the image. An image that cannot tell (a block device, a file system without holes, a failing call)
//! counts as data everywhere, which is never wrong.

use super::image::Image;
use crate::sys;
use crate::work::{Extent, BLOCK};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// [`BLOCK`] as a length in memory.
const BLOCK_LEN: usize = 4096;
const _: () = assert!(BLOCK_LEN as u64 == BLOCK, "one block");

/// The hole or the data that begins at `offset`, cut at the offset `limit` and at the end of the image. Empty only when one
/// of those is not after `offset`.
///
/// It takes one `SEEK_DATA` and at most one `SEEK_HOLE`. In a large file the latter may take milliseconds, however near `limit`
/// is, so whoever walks through the image asks with a far limit and keeps the answer.
pub(super) fn extent(image: &Image, offset: u64, limit: u64) -> Extent {
    let limit = limit.min(image.size).max(offset);
    let data = next_data(image, offset);
    if data > offset {
        return Extent { range: offset..data.min(limit), is_hole: true };
    }
    let end = if image.is_device { limit } else { sys::file::seek_hole(&image.file, offset).unwrap_or(limit) };
    // A file that was cut short has its end here. That must count as data, so that reading it fails.
    let end = if end > offset { end.min(limit) } else { limit };
    Extent { range: offset..end, is_hole: false }
}

/// The hole at the beginning of the range, if there is one.
pub(super) fn hole(image: &Image, range: Range<u64>) -> Option<Extent> {
    let end = next_data(image, range.start).min(range.end);
    (end > range.start).then_some(Extent { range: range.start..end, is_hole: true })
}

/// The extents of the range, in order.
pub(super) fn map(image: &Image, range: Range<u64>) -> impl Iterator<Item = Extent> + '_ {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let found = (at < range.end).then(|| extent(image, at, range.end))?;
        at = found.range.end;
        Some(found)
    })
}

/// Where data begins at or after `offset`; the end of the image if there is none.
fn next_data(image: &Image, offset: u64) -> u64 {
    if image.is_device {
        return offset;
    }
    match sys::file::seek_data(&image.file, offset) {
        Ok(Some(data)) => data.min(image.size).max(offset),
        // Not so if the file was cut short: beyond its end there is no data either, but that is no hole of the image.
        Ok(None) if image.file.metadata().is_ok_and(|file| file.len() >= image.size) => image.size.max(offset),
        _ => offset,
    }
}

/// Writes `bytes` at `offset`, except for blocks that are zero and lie over a hole.
///
/// It only ever asks where data begins, never where data ends: to find that, the kernel may visit every page of a large
/// file (10 ms per GiB on tmpfs).
pub(super) fn write(image: &Image, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let to_block = (offset.wrapping_neg() % BLOCK) as usize;
    let mut written = 0;
    let mut at = to_block;
    let mut data = 0;
    for block in bytes.get(to_block..).unwrap_or_default().chunks(BLOCK_LEN) {
        let next = at + block.len();
        let (start, end) = (offset + at as u64, offset + next as u64);
        let is_whole = block.len() == BLOCK_LEN || end == image.size;
        if is_whole && is_zero(block) {
            if data <= start {
                data = next_data(image, start);
            }
            if data >= end {
                write_part(image, offset, bytes, written..at)?;
                written = next;
            }
        }
        at = next;
    }
    write_part(image, offset, bytes, written..bytes.len())
}

/// Writes the bytes `part` of a payload whose place is at `offset`.
fn write_part(image: &Image, offset: u64, bytes: &[u8], part: Range<usize>) -> io::Result<()> {
    let start = offset + part.start as u64;
    image.file.write_all_at(bytes.get(part).unwrap_or_default(), start)
}

/// True when every byte is zero. The first word is looked at on its own, because in data it is hardly ever zero.
fn is_zero(bytes: &[u8]) -> bool {
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
        Image { file: temp.file.try_clone().unwrap(), size, is_device: false }
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
        write(&image, 4 * B, &payload).unwrap();
        assert_eq!(temp.file.metadata().unwrap().blocks() * 512, B, "one block is allocated");
        assert_eq!(extent(&image, 0, u64::MAX), Extent { range: 0..7 * B, is_hole: true });
        assert_eq!(extent(&image, 7 * B, u64::MAX), Extent { range: 7 * B..8 * B, is_hole: false });
        assert_eq!(extent(&image, 8 * B, u64::MAX), Extent { range: 8 * B..16 * B, is_hole: true });
        assert_eq!(extent(&image, B, 3 * B), Extent { range: B..3 * B, is_hole: true }, "the limit holds");
    }

    #[test]
    fn zeroes_over_data_are_written() {
        let temp = TempFile::new("data");
        let image = image(&temp, 8 * B);
        image.file.write_all_at(&vec![7; 4 * BLOCK_LEN], 2 * B).unwrap();
        write(&image, 100, &vec![0; 7 * BLOCK_LEN]).unwrap();
        assert!(is_zero(&contents(&image)));
        // The two ends of the payload are no whole blocks, so they are written too.
        assert_eq!(extent(&image, 0, u64::MAX), Extent { range: 0..B, is_hole: false });
        assert_eq!(extent(&image, B, u64::MAX), Extent { range: B..2 * B, is_hole: true });
        assert_eq!(extent(&image, 2 * B, u64::MAX), Extent { range: 2 * B..6 * B, is_hole: false });
    }

    #[test]
    fn the_short_last_block_counts_when_it_is_covered() {
        let temp = TempFile::new("last");
        let image = image(&temp, 2 * B + 512);
        write(&image, 2 * B, &[0; 512]).unwrap();
        write(&image, 0, &vec![0; 2 * BLOCK_LEN + 512]).unwrap();
        assert_eq!(temp.file.metadata().unwrap().blocks(), 0);
        write(&image, 2 * B, &[0; 511]).unwrap();
        assert_ne!(temp.file.metadata().unwrap().blocks(), 0, "a part of a block is written");
    }

    #[test]
    fn a_file_cut_short_has_no_hole_behind_its_end() {
        let temp = TempFile::new("cut");
        let image = image(&temp, 8 * B);
        temp.file.set_len(4 * B).unwrap();
        assert_eq!(extent(&image, 4 * B, u64::MAX), Extent { range: 4 * B..8 * B, is_hole: false });
        assert!(!extent(&image, 0, u64::MAX).is_hole);
        write(&image, 6 * B, &[0; BLOCK_LEN]).unwrap();
        assert_eq!(temp.file.metadata().unwrap().len(), 7 * B, "an answered write is in the file");
    }

    #[test]
    fn an_image_that_cannot_tell_is_data() {
        let temp = TempFile::new("device");
        let device = Image { is_device: true, ..image(&temp, 4 * B) };
        assert_eq!(extent(&device, B, u64::MAX), Extent { range: B..4 * B, is_hole: false });
        write(&device, 0, &vec![0; 4 * BLOCK_LEN]).unwrap();
        assert_eq!(temp.file.metadata().unwrap().blocks() * 512, 4 * B);
        assert_eq!(extent(&device, 9 * B, u64::MAX).range, 9 * B..9 * B, "nothing behind the end");
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
            write(&image, offset, &payload).unwrap();
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
            let found = extent(&image, offset, u64::MAX);
            assert!(found.range.start == offset && found.range.end > offset && found.range.end <= image.size);
            let bytes = &model[found.range.start as usize..found.range.end as usize];
            assert!(!found.is_hole || is_zero(bytes), "{found:?}");
            offset = found.range.end;
        }
    }
}
