//! Zeroes and trims, in steps: the front of a range by one call, and then the rest.

use super::image::Image;
use super::pace::Stride;
use super::sparse::Holes;
use crate::sys;
use crate::work::BLOCK;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::time::Instant;

/// How much one call of fallocate takes at most, in bytes. Where there is much to free it takes milliseconds, also when those
/// before it were about holes and took none; and a device may write the zeroes itself, at the speed of the medium.
const STEP_MAX: u64 = 4 << 20;

/// How many zeroes are written in one step at most, in bytes.
const WRITE_MAX: usize = 1 << 20;

/// What is known of the image's ways to make zeroes.
pub(super) struct Zeroes {
    pub(super) punch: Way,
    pub(super) zero_range: Way,
    write: Stride,
    /// From the heap and never written, so it costs neither memory nor room in the program.
    blank: Box<[u8]>,
}

/// A mode of fallocate.
pub(super) struct Way {
    call: fn(&File, u64, u64) -> io::Result<()>,
    /// False once the image has said that it does not know the call.
    pub(super) works: bool,
    stride: Stride,
}

impl Way {
    fn new(call: fn(&File, u64, u64) -> io::Result<()>) -> Self {
        Self { call, works: true, stride: Stride::new(STEP_MAX) }
    }

    /// Makes the call for the front of a range; says for how many bytes, or `None` where the image does not know it.
    fn step(&mut self, image: &Image, offset: u64, length: u64) -> io::Result<Option<u64>> {
        if !self.works {
            return Ok(None);
        }
        let n = self.bytes(image, length);
        let began = Instant::now();
        let result = (self.call)(&image.file, offset, n);
        self.stride.note(n, began.elapsed());
        self.judge(result).map(|works| works.then_some(n))
    }

    /// How much of a range goes into one call. A device takes whole blocks only.
    pub(super) fn bytes(&self, image: &Image, length: u64) -> u64 {
        let n = self.stride.of(length);
        if image.is_device {
            n - n % BLOCK
        } else {
            n
        }
    }

    /// Whether a call has worked; false if it is not to be had here, which is remembered.
    pub(super) fn judge(&mut self, result: io::Result<()>) -> io::Result<bool> {
        let Err(error) = result else { return Ok(true) };
        match error.raw_os_error() {
            Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV) => self.works = false,
            // This range does not suit a device with unusually large blocks; the next one may.
            Some(libc::EINVAL) => {}
            _ => return Err(error),
        }
        Ok(false)
    }
}

impl Default for Zeroes {
    fn default() -> Self {
        Self {
            punch: Way::new(sys::file::punch_hole),
            zero_range: Way::new(sys::file::zero_range),
            write: Stride::new(WRITE_MAX as u64),
            blank: vec![0; WRITE_MAX].into_boxed_slice(),
        }
    }
}

impl Zeroes {
    /// Of an image that has only some of the ways.
    #[cfg(test)]
    pub(super) fn able(punch: bool, zero_range: bool) -> Self {
        let mut zeroes = Self::default();
        (zeroes.punch.works, zeroes.zero_range.works) = (punch, zero_range);
        zeroes
    }

    /// Zeroes the front of a range; returns how many bytes.
    pub(super) fn zero_step(
        &mut self,
        image: &Image,
        holes: &mut Holes,
        offset: u64,
        length: u64,
        no_hole: bool,
        fast: bool,
    ) -> io::Result<u64> {
        if fast && image.is_device && (offset | length) % BLOCK != 0 {
            // The ragged ends would have to be written before it is known whether the rest can be zeroed without
            // writing.
            return Err(ErrorKind::Unsupported.into());
        }
        if let Some(n) = ragged(image, offset, length) {
            return self.write_step(image, holes, offset, n, no_hole);
        }
        if !no_hole {
            if let Some(n) = self.punch.step(image, offset, length)? {
                return Ok(n);
            }
        }
        // On a device this call may mean that the kernel writes the zeroes, so it is no way to be fast.
        if image.zeroes_ranges() && !(fast && image.is_device) {
            if let Some(n) = self.zero_range.step(image, offset, length)? {
                return Ok(n);
            }
        }
        if fast {
            return Err(ErrorKind::Unsupported.into());
        }
        self.write_step(image, holes, offset, length, no_hole)
    }

    /// Writes zeroes at the front of a range; returns how many. Holes stay holes, unless `no_hole` asks for an
    /// allocated range.
    fn write_step(
        &mut self,
        image: &Image,
        holes: &mut Holes,
        offset: u64,
        length: u64,
        no_hole: bool,
    ) -> io::Result<u64> {
        let began = Instant::now();
        let n = usize::try_from(self.write.of(length)).unwrap_or(WRITE_MAX);
        let zeroes = self.blank.get(..n).unwrap_or_default();
        if no_hole {
            image.file.write_all_at(zeroes, offset)?;
        } else {
            holes.write(image, offset, zeroes)?;
        }
        self.write.note(n as u64, began.elapsed());
        Ok(n as u64)
    }

    /// Gives the front of a range back where the image can; returns how many bytes are dealt with.
    pub(super) fn trim_step(&mut self, image: &Image, offset: u64, length: u64) -> io::Result<u64> {
        if let Some(n) = ragged(image, offset, length) {
            return Ok(n);
        }
        let n = self.punch.bytes(image, length);
        // Where it is not to be had, nothing happens.
        Ok(self.punch.step(image, offset, length)?.unwrap_or(n))
    }
}

/// The part of a block that a range on a device begins with, in bytes: a device takes whole ones only.
fn ragged(image: &Image, offset: u64, length: u64) -> Option<u64> {
    let past = offset % BLOCK;
    (image.is_device && (past != 0 || length < BLOCK)).then(|| length.min(BLOCK - past))
}
