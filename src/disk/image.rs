//! The open file that an image is in.

use std::fs::File;

/// The unit of an image's size, in bytes: the smallest sector there is. A shorter rest of the file is not served.
pub const SECTOR: u64 = 512;

/// What the engines and the search for holes work on.
pub(super) struct Image {
    pub(super) file: File,
    /// In bytes, a multiple of [`SECTOR`] and not zero.
    pub(super) size: u64,
    pub(super) is_device: bool,
}
