//! Files for the tests of this module.

use super::check;
use std::fs::{self, File, OpenOptions};
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

/// An empty file without a name in the folder for temporary files.
pub(super) fn file() -> File {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("flexnbd-sys-{}-{}.img", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
    fs::remove_file(path).unwrap();
    file
}

/// An empty file in memory.
pub(super) fn memory_file() -> File {
    // SAFETY: the name is a string that ends in zero.
    let fd = check(unsafe { libc::memfd_create(c"flexnbd".as_ptr(), libc::MFD_CLOEXEC) }).unwrap();
    // SAFETY: `fd` is open and nobody else owns it.
    unsafe { File::from_raw_fd(fd) }
}
