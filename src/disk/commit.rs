//! One fdatasync for all that wait for one, and its error, which stays.

use super::image::Image;

/// What the log says, once and at level E, when an fdatasync has failed.
pub const SYNC_LOST: &str = "fdatasync failed, written data may be lost; every later flush will fail until a restart";

/// Whether what was written is on stable storage.
#[derive(Default)]
pub(super) struct Commit {
    /// The errno of the fdatasync that failed.
    errno: Option<i32>,
    syncs: u64,
}

impl Commit {
    /// How many times fdatasync was called.
    pub(super) fn syncs(&self) -> u64 {
        self.syncs
    }

    /// One fdatasync. After one has failed there is no other: the kernel may have dropped the pages it could not write
    /// and count them as clean, so that the next one would succeed without them. Every later one fails the same way.
    pub(super) fn sync(&mut self, image: &Image) -> Result<(), i32> {
        if let Some(errno) = self.errno {
            return Err(errno);
        }
        self.syncs += 1;
        image.file.sync_data().map_err(|error| {
            log::error!("disk: {SYNC_LOST}: {error}");
            *self.errno.insert(error.raw_os_error().unwrap_or(libc::EIO))
        })
    }
}
