//! The mount of a FUSE file system, without a helper program.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Mounts what is spoken through the device at a folder.
pub fn attach(device: &File, point: &Path) -> io::Result<()> {
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let (point, options) = (path(point), CString::new(options).unwrap());
    let (source, kind): (&CStr, &CStr) = (c"flexnbd-test", c"fuse");
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOATIME;
    // SAFETY: five values that are alive during the call; the strings end with a zero.
    #[expect(unsafe_code, reason = "no safe interface has mount(2)")]
    let outcome =
        unsafe { libc::mount(source.as_ptr(), point.as_ptr(), kind.as_ptr(), flags, options.as_ptr().cast()) };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Ends it at once: every request fails, also those that are under way, and the folder is an ordinary one again. A
/// second time does nothing.
pub fn detach(point: &Path) {
    let (point, flags) = (path(point), libc::MNT_FORCE | libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW);
    // SAFETY: a string that is alive during the call and ends with a zero.
    #[expect(unsafe_code, reason = "no safe interface has umount2(2)")]
    unsafe {
        libc::umount2(point.as_ptr(), flags)
    };
}

fn path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}
