//! System calls on files that the standard library has no interface for.

#![expect(unsafe_code, reason = "no safe interface has these calls")]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// fallocate(2) with these modes.
pub fn fallocate(file: &File, mode: i32, range: Range<u64>) -> io::Result<()> {
    let (offset, length) = (signed(range.start), signed(range.end - range.start));
    // SAFETY: the descriptor is open; nothing else is passed.
    some(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) } as isize).map(drop)
}

/// lseek(2), to data or a hole; `None` where there is none.
pub fn seek(file: &File, offset: u64, whence: i32) -> io::Result<Option<u64>> {
    // SAFETY: the descriptor is open; nothing else is passed.
    match some(unsafe { libc::lseek(file.as_raw_fd(), signed(offset), whence) } as isize) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        found => found.map(|offset| Some(offset as u64)),
    }
}

/// preadv2(2) that does not wait.
pub fn read_nowait(file: &File, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let slice = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the descriptor is open, and the one slice is memory that may be written during the call.
    some(unsafe { libc::preadv2(file.as_raw_fd(), &raw const slice, 1, signed(offset), libc::RWF_NOWAIT) })
}

/// Makes the kernel forget what it has cached of a file, as far as that was written.
pub fn drop_cache(file: &File) {
    // SAFETY: the descriptor is open; nothing else is passed.
    let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(error, 0);
}

/// flock(2), alone and without waiting.
pub fn try_lock(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open; nothing else is passed.
    some(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } as isize).map(drop)
}

/// setxattr(2), with flags.
pub fn set_xattr(path: &Path, key: &str, value: &[u8], flags: i32) -> io::Result<()> {
    let (path, key) = (CString::new(path.as_os_str().as_bytes())?, CString::new(key)?);
    let (value, length) = (value.as_ptr().cast(), value.len());
    // SAFETY: strings that end with a zero and a value of that length, all alive during the call.
    some(unsafe { libc::setxattr(path.as_ptr(), key.as_ptr(), value, length, flags) } as isize).map(drop)
}

/// getxattr(2) of a value that is not long.
pub fn get_xattr(path: &Path, key: &str) -> io::Result<Vec<u8>> {
    let (path, key) = (CString::new(path.as_os_str().as_bytes())?, CString::new(key)?);
    let mut value = vec![0; 256];
    // SAFETY: strings that end with a zero and memory of that length, all alive during the call.
    let length = some(unsafe { libc::getxattr(path.as_ptr(), key.as_ptr(), value.as_mut_ptr().cast(), value.len()) })?;
    value.truncate(length);
    Ok(value)
}

/// removexattr(2).
pub fn remove_xattr(path: &Path, key: &str) -> io::Result<()> {
    let (path, key) = (CString::new(path.as_os_str().as_bytes())?, CString::new(key)?);
    // SAFETY: strings that end with a zero, alive during the call.
    some(unsafe { libc::removexattr(path.as_ptr(), key.as_ptr()) } as isize).map(drop)
}

/// What a call returned.
fn some(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// An offset, as the calls take it.
fn signed(offset: u64) -> i64 {
    offset.try_into().unwrap()
}
