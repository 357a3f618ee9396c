//! Zeroes and trims in steps: each deals with the front of a range, by one call that does not take long.

use super::image::Image;
use super::sparse;
use crate::sys;
use crate::work::BLOCK;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

/// How much of a file one fallocate deals with, in bytes: few calls for a range of many GiB, each of some milliseconds.
pub(super) const FILE_STEP: u64 = 256 << 20;

/// The same for a block device, where the kernel may write zeroes, at the speed of the medium.
const DEVICE_STEP: u64 = 16 << 20;

/// How many zeroes are written in one step.
const WRITE_STEP: usize = 1 << 20;

/// How the image can be zeroed, as far as it is known.
pub(super) struct Zeroes {
    /// False once the image has turned out not to support the call.
    pub(super) can_punch: bool,
    pub(super) can_zero_range: bool,
    /// On the heap and never written to, so it takes up neither memory nor space in the program.
    pub(super) blank: Box<[u8]>,
}

impl Default for Zeroes {
    fn default() -> Self {
        Self { can_punch: true, can_zero_range: true, blank: vec![0; WRITE_STEP].into_boxed_slice() }
    }
}

impl Zeroes {
    /// For an image that can only be zeroed by writing.
    #[cfg(test)]
    pub(super) fn unable() -> Self {
        Self { can_punch: false, can_zero_range: false, ..Self::default() }
    }

    /// Zeroes the front of a range; returns how many bytes.
    pub(super) fn zero_step(
        &mut self,
        image: &Image,
        offset: u64,
        length: u64,
        no_hole: bool,
        fast: bool,
    ) -> io::Result<u64> {
        if fast && image.is_device && (offset | length) % BLOCK != 0 {
            // Its ends would have to be written before it is known whether the rest can do without writing.
            return Err(ErrorKind::Unsupported.into());
        }
        let piece = match piece(image, offset, length) {
            Piece::Ragged(n) => return self.write_zeroes(image, offset, n, no_hole),
            Piece::Whole(n) => n,
        };
        if !no_hole && supported(sys::file::punch_hole, &mut self.can_punch, image, offset, piece)? {
            return Ok(piece);
        }
        // On a device this call may make the kernel write zeroes, which is not fast.
        let may_zero = !(fast && image.is_device);
        if may_zero && supported(sys::file::zero_range, &mut self.can_zero_range, image, offset, piece)? {
            return Ok(piece);
        }
        if fast {
            return Err(ErrorKind::Unsupported.into());
        }
        self.write_zeroes(image, offset, piece, no_hole)
    }

    /// Writes zeroes to the front of a range; returns how many. Holes stay, unless `no_hole`.
    fn write_zeroes(&self, image: &Image, offset: u64, length: u64, no_hole: bool) -> io::Result<u64> {
        let n = usize::try_from(length).unwrap_or(usize::MAX).min(self.blank.len());
        let zeroes = self.blank.get(..n).unwrap_or_default();
        if no_hole {
            image.file.write_all_at(zeroes, offset)?;
        } else {
            sparse::write(image, offset, zeroes)?;
        }
        Ok(n as u64)
    }

    /// Deallocates the front of a range if the image can do that; returns how many bytes are dealt with.
    pub(super) fn trim_step(&mut self, image: &Image, offset: u64, length: u64) -> io::Result<u64> {
        match piece(image, offset, length) {
            Piece::Ragged(n) => Ok(n),
            Piece::Whole(n) => supported(sys::file::punch_hole, &mut self.can_punch, image, offset, n).map(|_| n),
        }
    }
}

/// The front of a range, in bytes.
enum Piece {
    /// What one fallocate may deal with.
    Whole(u64),
    /// A part of a block of a device, which deals with whole blocks only.
    Ragged(u64),
}

fn piece(image: &Image, offset: u64, length: u64) -> Piece {
    if !image.is_device {
        return Piece::Whole(length.min(FILE_STEP));
    }
    match offset % BLOCK {
        0 if length >= BLOCK => Piece::Whole((length - length % BLOCK).min(DEVICE_STEP)),
        past => Piece::Ragged(length.min(BLOCK - past)),
    }
}

/// Tries a mode of fallocate; false if this image does not support it, which `can` remembers.
fn supported(
    call: fn(&File, u64, u64) -> io::Result<()>,
    can: &mut bool,
    image: &Image,
    offset: u64,
    length: u64,
) -> io::Result<bool> {
    if !*can {
        return Ok(false);
    }
    let Err(error) = call(&image.file, offset, length) else { return Ok(true) };
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => *can = false,
        // A device with unusually large blocks does not take this range; it may take the next one.
        Some(libc::EINVAL) => {}
        _ => return Err(error),
    }
    Ok(false)
}
