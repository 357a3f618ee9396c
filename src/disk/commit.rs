//! One fdatasync for all operations that wait for one, and its error, which sticks.

use super::image::Image;

/// What the log says, once and at level E, after an fdatasync has failed.
const SYNC_LOST: &str = "fdatasync failed, written data may be lost; every later flush will fail until a restart";

/// Puts on stable storage what was written.
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

    /// Calls fdatasync, unless it has failed before: then every later call fails in the same way. The kernel may count the
    /// pages that it could not write as clean and drop them, so that another fdatasync would succeed without them.
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
