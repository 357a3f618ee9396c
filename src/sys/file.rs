//! Files: holes, locks, hints, extended attributes, and the permissions of what is created.

use super::{check, retry};
use std::ffi::{c_int, CStr};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

/// What [`punch_hole`] asks of `fallocate(2)`.
pub(super) const PUNCH_HOLE: c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// What [`zero_range`] asks of `fallocate(2)`.
pub(super) const ZERO_RANGE: c_int = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// A file offset or length as the C library takes it.
pub(super) fn off(value: u64) -> io::Result<libc::off_t> {
    value.try_into().map_err(|_| ErrorKind::InvalidInput.into())
}

fn fallocate(file: &File, mode: c_int, offset: u64, length: u64) -> io::Result<()> {
    let (offset, length) = (off(offset)?, off(length)?);
    // SAFETY: no memory is passed, and the descriptor is open while `file` is borrowed.
    retry(|| check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) })).map(drop)
}

/// Deallocates a range of a file, which then reads as zeroes; the size stays. EOPNOTSUPP where the file system has no
/// holes; EINVAL for a part of a block of a block device.
pub fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    fallocate(file, PUNCH_HOLE, offset, length)
}

/// Makes a range of a file read as zeroes and keeps it allocated; the size stays. Errors as for [`punch_hole`].
pub fn zero_range(file: &File, offset: u64, length: u64) -> io::Result<()> {
    fallocate(file, ZERO_RANGE, offset, length)
}

/// Locks a file as one of several (`alone` is false) or as the only one, for as long as the open file lives. Does not wait:
/// false when somebody else's lock is in the way, and then the lock that was there before stays.
///
/// It is an open-file-description lock on the first byte (`fcntl_locking(2)`): `flock` gives up a shared lock before it tries
/// to get an exclusive one. Programs that lock other bytes of images, as qemu does, are not in the way.
pub fn try_lock(file: &File, alone: bool) -> io::Result<bool> {
    match set_lock(file, if alone { libc::F_WRLCK } else { libc::F_RDLCK }) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Ends a lock of [`try_lock`], whoever else has the open file.
pub fn unlock(file: &File) -> io::Result<()> {
    set_lock(file, libc::F_UNLCK)
}

fn set_lock(file: &File, kind: c_int) -> io::Result<()> {
    let lock = libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the kernel reads `lock`, which is a valid flock, and the descriptor is open while `file` is borrowed.
    retry(|| check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) })).map(drop)
}

/// Locks a folder against others that do the same (`flock(2)`), for as long as the open file lives. Does not wait: false
/// when somebody else has it locked. [`try_lock`] needs a file that may be written, and a folder is none.
pub fn try_lock_folder(folder: &File) -> io::Result<bool> {
    // SAFETY: no memory is passed, and the descriptor is open while `folder` is borrowed.
    match retry(|| check(unsafe { libc::flock(folder.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) })) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Says that a range will be read soon (`POSIX_FADV_WILLNEED`).
pub fn will_need(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let (offset, length) = (off(offset)?, off(length)?);
    // SAFETY: no memory is passed, and the descriptor is open while `file` is borrowed.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, length, libc::POSIX_FADV_WILLNEED) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn seek(file: &File, offset: u64, whence: c_int) -> io::Result<u64> {
    let offset = off(offset)?;
    // SAFETY: no memory is passed, and the descriptor is open while `file` is borrowed.
    let position = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    u64::try_from(position).map_err(|_| io::Error::last_os_error())
}

/// Where data begins at or after `offset`, or `None` when there is none up to the end of the file. On a file system without
/// holes that is `offset`. Moves the position of the file.
pub fn seek_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match seek(file, offset, libc::SEEK_DATA) {
        Ok(position) => Ok(Some(position)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where a hole begins at or after `offset`; the end of the file counts as one. Moves the position of the file.
pub fn seek_hole(file: &File, offset: u64) -> io::Result<u64> {
    seek(file, offset, libc::SEEK_HOLE)
}

/// Reads an extended attribute into `room` and says how long it is, in bytes. ENODATA where there is none, ERANGE where it is
/// longer than the room.
pub fn attribute(file: &File, name: &CStr, room: &mut [u8]) -> io::Result<usize> {
    let (to, most) = (room.as_mut_ptr(), room.len());
    // SAFETY: the kernel writes at most `most` bytes to `room`, and the name ends with a zero.
    let length = unsafe { libc::fgetxattr(file.as_raw_fd(), name.as_ptr(), to.cast(), most) };
    usize::try_from(length).map_err(|_| io::Error::last_os_error())
}

/// Sets an extended attribute.
pub fn set_attribute(file: &File, name: &CStr, value: &[u8]) -> io::Result<()> {
    let (from, length) = (value.as_ptr(), value.len());
    // SAFETY: the kernel reads `length` bytes of `value`, and the name ends with a zero.
    check(unsafe { libc::fsetxattr(file.as_raw_fd(), name.as_ptr(), from.cast(), length, 0) }).map(drop)
}

/// Removes an extended attribute; ENODATA where there is none.
pub fn remove_attribute(file: &File, name: &CStr) -> io::Result<()> {
    // SAFETY: the name ends with a zero.
    check(unsafe { libc::fremovexattr(file.as_raw_fd(), name.as_ptr()) }).map(drop)
}

/// Runs `create` so that only this user may use what it creates in the file system.
pub fn with_private_umask<T>(create: impl FnOnce() -> T) -> T {
    // SAFETY: `umask` takes a number, gives one back, and cannot fail.
    let previous = unsafe { libc::umask(0o177) };
    let created = create();
    // SAFETY: as above.
    unsafe { libc::umask(previous) };
    created
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    #[test]
    fn what_is_created_privately_is_private() {
        let path = std::env::temp_dir().join(format!("flexnbd-sys-{}.sock", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = with_private_umask(|| UnixListener::bind(&path)).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(mode & 0o777, 0o600);
        drop(listener);
    }

    #[test]
    fn a_folder_is_locked_by_one_open_file_at_a_time() {
        let path = std::env::temp_dir().join(format!("flexnbd-sys-{}.folder", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        let (first, second) = (File::open(&path).unwrap(), File::open(&path).unwrap());
        std::fs::remove_dir(&path).unwrap();
        assert!(try_lock_folder(&first).unwrap());
        assert!(!try_lock_folder(&second).unwrap());
        drop(first);
        assert!(try_lock_folder(&second).unwrap());
    }

    #[test]
    fn an_offset_beyond_what_the_kernel_takes_is_refused() {
        let file = File::open("/dev/null").unwrap();
        assert_eq!(seek_hole(&file, u64::MAX).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(punch_hole(&file, 0, u64::MAX).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
