//! Finding out whether a range can be read, in steps, by reading it.

use super::image::Image;
use super::reads::Way;
use std::io;
use std::os::unix::fs::FileExt;

/// How much is read in one step, in bytes.
const STEP: u64 = 256 << 10;

/// How much of it one call reads, in bytes: little enough to stay in the cache of the processor.
const CALL: usize = 64 << 10;

/// Reads as much from the front of a range as needs no wait, and keeps nothing; returns how many bytes that was. Pages
/// of a read that has failed are in the cache, too, so this is a read and not a question.
pub(super) fn cached_step(image: &Image, way: &mut Way, offset: u64, length: u64) -> u64 {
    let mut scratch = scratch(length);
    let step = length.min(STEP);
    let mut done = 0;
    while done < step {
        let room = piece(&mut scratch, step - done);
        let (asked, n) = (room.len(), way.read(image, offset.saturating_add(done), room));
        done += n as u64;
        if n < asked {
            break;
        }
    }
    done
}

/// Reads the front of a range and keeps nothing; returns how many bytes it was. Waits for the disk.
pub(super) fn step(image: &Image, offset: u64, length: u64) -> io::Result<u64> {
    let mut scratch = scratch(length);
    let step = length.min(STEP);
    let mut done = 0;
    while done < step {
        let room = piece(&mut scratch, step - done);
        image.file.read_exact_at(room, offset.saturating_add(done))?;
        done += room.len() as u64;
    }
    Ok(step)
}

fn scratch(length: u64) -> Vec<u8> {
    vec![0; usize::try_from(length).unwrap_or(CALL).min(CALL)]
}

/// The memory for one call, of at most so many bytes.
fn piece(scratch: &mut [u8], left: u64) -> &mut [u8] {
    let n = usize::try_from(left).unwrap_or(CALL).min(scratch.len());
    scratch.get_mut(..n).unwrap_or_default()
}
