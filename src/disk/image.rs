//! The open file that an image is in.

use crate::sys::pages::FileSystem;
use std::fs::File;
use std::iter;
use std::rc::Rc;

/// The unit of an image's size, in bytes: the smallest sector there is. A shorter rest of the file is not served.
pub const SECTOR: u64 = 512;

/// How many open files an image is, at most.
pub(super) const FILES_MAX: usize = 2;

/// What the engines and the search for holes work on.
pub(super) struct Image {
    pub(super) file: File,
    /// The same file, opened once more, to be synced beside `file`.
    pub(super) again: Option<Rc<File>>,
    /// In bytes, a multiple of [`SECTOR`] and not zero.
    pub(super) size: u64,
    pub(super) is_device: bool,
    pub(super) source: FileSystem,
    /// Another process makes a copy of the file and may have it locked.
    pub(super) is_copied: bool,
}

impl Image {
    /// True when it can be asked where its holes are, and answers at once. A file system that asks others may not have told
    /// them yet what was written: on `GlusterFS` 10, what was written to a hole a moment ago is still said to be one.
    pub(super) fn knows_its_holes(&self) -> bool {
        !self.is_device && self.source != FileSystem::Distributed && !self.is_copied
    }

    /// The open files that it is.
    pub(super) fn files(&self) -> impl Iterator<Item = &File> {
        iter::once(&self.file).chain(self.again.as_deref())
    }

    /// True when fallocate(2) zeroes a range or fails. `GlusterFS` 10 says that it has, and changes nothing.
    pub(super) fn zeroes_ranges(&self) -> bool {
        self.source != FileSystem::Distributed
    }

    /// A file on a disk of this machine.
    #[cfg(test)]
    pub(super) fn of(file: &File, size: u64) -> Self {
        Self {
            file: file.try_clone().unwrap(),
            again: None,
            size,
            is_device: false,
            source: FileSystem::Local,
            is_copied: false,
        }
    }
}
