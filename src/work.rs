//! PURE: what may be asked of an image, and what became of it. The one vocabulary of work between those who ask (the
//! sessions of clients, a migration) and whatever stands behind the requests.
//!
//! It owns no image and does nothing: an [`Op`] carries its own memory to whoever does the work, and [`Done`] brings
//! it back.

use crate::buffer::Buffer;
use std::io;
use std::ops::Range;

/// A block of this length, in bytes and aligned in the image, that is written as zeroes over a hole stays a hole. It is
/// the page of the kernel and the block of nearly every file system. Whoever cuts work up does not cut inside one.
pub const BLOCK: u64 = 4096;

/// One thing to do. `owner` and `tag` mean nothing to whoever does it and come back in [`Done`].
#[derive(Debug)]
pub struct Op {
    /// Whom it is for.
    pub owner: u64,
    /// Which one of that owner's it is.
    pub tag: u32,
    /// What to do.
    pub action: Action,
}

/// What can be done. Offsets and lengths are bytes of the image. `fua` means that it is done only when its effect is on
/// stable storage.
#[derive(Debug)]
pub enum Action {
    /// Reads exactly `length` bytes. [`io::ErrorKind::UnexpectedEof`] when the file was cut short; never fewer bytes.
    Read {
        /// Where to read.
        offset: u64,
        /// How much to read.
        length: usize,
        /// A hole at the beginning is not read: it comes back as the only extent of [`Done`], and the buffer holds
        /// what is behind it.
        skip_hole: bool,
        /// Comes empty, with room for `length` bytes, and goes back filled with them, or empty after an error.
        buffer: Buffer,
    },
    /// Writes what is filled in `payload`. A [`BLOCK`] of it that is all zero and lies over a hole leaves it.
    Write {
        /// Where to write.
        offset: u64,
        /// Goes back as it came.
        payload: Buffer,
        /// On stable storage when done, and so is every earlier piece of the same request.
        fua: bool,
        /// Not the first piece of its request.
        follows: bool,
    },
    /// Makes a range read as zeroes, by a hole if it can.
    Zero {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        length: u64,
        /// On stable storage when done.
        fua: bool,
        /// Keep the range allocated.
        no_hole: bool,
        /// Fail with [`io::ErrorKind::Unsupported`] rather than write the zeroes. Then nothing has changed.
        fast: bool,
    },
    /// Gives a range back to the file system or the device. It may read as zeroes or as before. Where the image
    /// cannot do that, nothing happens and it succeeds.
    Trim {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        length: u64,
        /// On stable storage when done.
        fua: bool,
    },
    /// Puts everything on stable storage that was done before this was submitted.
    Flush,
    /// Says that the range will be read soon. It is a hint.
    Cache {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        length: u64,
    },
    /// Reads the range once and keeps nothing of it: success means that every byte of it can be read.
    Verify {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        length: u64,
    },
    /// Finds out what is data and what is a hole, from the beginning of the range on.
    Map {
        /// Where it begins.
        offset: u64,
        /// How long it is.
        length: u64,
        /// How many extents at the most.
        most: usize,
    },
}

impl Action {
    /// The bytes of the image it may change.
    pub fn touches(&self) -> Option<Range<u64>> {
        let (offset, length) = match self {
            Self::Write { offset, payload, .. } => (*offset, payload.len() as u64),
            Self::Zero { offset, length, .. } | Self::Trim { offset, length, .. } => (*offset, *length),
            Self::Read { .. } | Self::Flush | Self::Cache { .. } | Self::Verify { .. } | Self::Map { .. } => {
                return None
            }
        };
        Some(offset..offset.saturating_add(length))
    }

    /// The memory it carries.
    pub fn into_buffer(self) -> Option<Buffer> {
        match self {
            Self::Read { buffer, .. } | Self::Write { payload: buffer, .. } => Some(buffer),
            _ => None,
        }
    }

    /// True when it is done only when its effect is on stable storage.
    pub fn wants_sync(&self) -> bool {
        match self {
            Self::Write { fua, .. } | Self::Zero { fua, .. } | Self::Trim { fua, .. } => *fua,
            Self::Flush => true,
            Self::Read { .. } | Self::Cache { .. } | Self::Verify { .. } | Self::Map { .. } => false,
        }
    }

    /// True when its range lies inside an image of `size` bytes, and a read has room.
    pub fn fits(&self, size: u64) -> bool {
        let (offset, length) = match self {
            Self::Read { buffer, length, .. } if !buffer.is_empty() || *length > buffer.capacity() => return false,
            Self::Read { offset, length, .. } => (*offset, *length as u64),
            Self::Write { offset, payload, .. } => (*offset, payload.len() as u64),
            Self::Zero { offset, length, .. }
            | Self::Trim { offset, length, .. }
            | Self::Cache { offset, length }
            | Self::Verify { offset, length }
            | Self::Map { offset, length, .. } => (*offset, *length),
            Self::Flush => return true,
        };
        offset.checked_add(length).is_some_and(|end| end <= size)
    }
}

/// What became of an [`Op`].
#[derive(Debug)]
pub struct Done {
    /// As submitted.
    pub owner: u64,
    /// As submitted.
    pub tag: u32,
    /// The buffer of a read or a write.
    pub buffer: Option<Buffer>,
    /// The bytes of the image that may have changed, also when it failed.
    pub touched: Option<Range<u64>>,
    /// What a map has found, or the hole at the beginning of a read that skips one.
    pub extents: Vec<Extent>,
    /// How it ended. Success means all of it.
    pub result: io::Result<()>,
}

/// A part of the image that is a hole throughout, or counts as data throughout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Its bytes in the image.
    pub range: Range<u64>,
    /// True when it is a hole: it is not allocated and reads as zeroes.
    pub is_hole: bool,
}

impl Extent {
    /// How long it is, in bytes.
    pub fn length(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn filled(length: usize) -> Buffer {
        let mut buffer = Buffer::with_capacity(length);
        buffer.advance(length);
        buffer
    }

    /// Every action over `offset..offset + length`, and whether it changes the image.
    fn all(offset: u64, length: usize, fua: bool) -> Vec<(Action, bool)> {
        let bytes = length as u64;
        vec![
            (Action::Read { offset, length, skip_hole: false, buffer: Buffer::with_capacity(length) }, false),
            (Action::Write { offset, payload: filled(length), fua, follows: false }, true),
            (Action::Zero { offset, length: bytes, fua, no_hole: false, fast: false }, true),
            (Action::Trim { offset, length: bytes, fua }, true),
            (Action::Cache { offset, length: bytes }, false),
            (Action::Verify { offset, length: bytes }, false),
            (Action::Map { offset, length: bytes, most: 1 }, false),
        ]
    }

    #[test]
    fn what_changes_the_image_says_where() {
        for (action, changes) in all(4096, 512, false) {
            assert_eq!(action.touches(), changes.then_some(4096..4608), "{action:?}");
            assert!(!action.wants_sync());
        }
        for (action, changes) in all(4096, 512, true) {
            assert_eq!(action.wants_sync(), changes, "{action:?}");
        }
        assert_eq!((Action::Flush.touches(), Action::Flush.wants_sync()), (None, true));
    }

    #[test]
    fn what_reaches_beyond_the_image_does_not_fit() {
        for (offset, fits) in [(0, true), (MIB - 512, true), (MIB - 511, false), (MIB + 1, false), (u64::MAX, false)] {
            for (action, _) in all(offset, 512, false) {
                assert_eq!(action.fits(MIB), fits, "{action:?}");
            }
        }
        assert!(Action::Flush.fits(0));
    }

    #[test]
    fn a_read_needs_an_empty_buffer_with_room_for_all_of_it() {
        let read = |length, buffer| Action::Read { offset: 0, length, skip_hole: false, buffer };
        assert!(read(8, Buffer::with_capacity(8)).fits(8));
        assert!(!read(9, Buffer::with_capacity(8)).fits(MIB));
        assert!(!read(4, filled(8)).fits(MIB));
    }
}
