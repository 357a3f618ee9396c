//! Finding out whether a range can be read, in steps, by reading it.

use super::image::Image;
use std::io;
use std::os::unix::fs::FileExt;

/// How much is read in one step, in bytes.
const STEP: u64 = 256 << 10;

/// How much of it one call reads, in bytes: little enough to stay in the cache of the processor.
const CALL: usize = 64 << 10;

/// Reads the front of a range and keeps nothing; returns how many bytes it was.
pub(super) fn step(image: &Image, offset: u64, length: u64) -> io::Result<u64> {
    let step = length.min(STEP);
    let mut scratch = vec![0; usize::try_from(step).unwrap_or(CALL).min(CALL)];
    let mut done = 0;
    while done < step {
        let n = usize::try_from(step - done).unwrap_or(CALL).min(CALL);
        image.file.read_exact_at(scratch.get_mut(..n).unwrap_or_default(), offset + done)?;
        done += n as u64;
    }
    Ok(step)
}
