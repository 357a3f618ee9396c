//! A second file that shares the blocks of a first one, made by a child process: `FICLONE` may take seconds, and nothing but
//! another process takes them without this one.

use super::check;
use std::ffi::{c_int, c_long, c_uint, c_ulong, CStr, CString};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::{process, ptr};

/// `FICLONE` of `linux/fs.h`, `_IOW(0x94, 9, int)`.
const FICLONE: c_ulong = 0x4004_9409;
/// `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS` of `linux/fs.h`, for `long`, as programs are compiled; the value is an `int`.
const GET_FLAGS: c_ulong = 0x8000_6601 | ((size_of::<c_long>() as c_ulong) << 16);
const SET_FLAGS: c_ulong = 0x4000_6602 | ((size_of::<c_long>() as c_ulong) << 16);
/// `FS_NOCOW_FL`: btrfs writes the blocks of such a file in place, and two files share blocks when both have it or none.
const NOCOW: c_int = 0x0080_0000;

/// A child process that makes a copy. It is told to end with this process, and with this value.
#[derive(Debug)]
pub struct Cloning {
    pid: libc::pid_t,
    pidfd: OwnedFd,
}

/// Lets this process hear how its children ended, also when its parent has set that to be ignored.
pub fn expect_children() {
    // SAFETY: SIG_DFL is a valid disposition, and no handler of this process is replaced.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

impl Cloning {
    /// Starts to make `copy`, an absolute path where nothing may be yet, with the content and the permissions of `file`. It
    /// appears whole and durable, or not at all.
    pub fn start(file: &File, copy: &Path) -> io::Result<Self> {
        let folder = copy.parent().ok_or(ErrorKind::InvalidInput)?;
        let (folder, copy) = (path(folder)?, path(copy)?);
        let mode = file.metadata()?.mode() & 0o777;
        let parent = process::id();
        // Without a descriptor for the child, nobody would hear of its end: better before there is one.
        drop(pidfd_of(parent)?);
        // SAFETY: the child calls nothing but `make`, which takes no lock and no memory, and ends.
        let pid = check(unsafe { libc::fork() })?;
        if pid == 0 {
            let result = make(parent, file.as_raw_fd(), &folder, &copy, mode);
            let errno = result.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0);
            // SAFETY: ends the child at once, without what the parent wants done at its own end.
            unsafe { libc::_exit(errno) }
        }
        // The child is not waited for yet, so its number is its own. One that is killed here stays a zombie: to wait for it
        // would be to wait for the disk.
        pidfd_of(pid.unsigned_abs()).map(|pidfd| Self { pid, pidfd }).inspect_err(|_| {
            // SAFETY: takes two numbers; as above.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        })
    }

    /// How it ended, once; `None` while it works. The error is the operating system's, or `Interrupted` when that is not known:
    /// then there may be a copy.
    pub fn take_end(&self) -> Option<io::Result<()>> {
        let status = match reap(self.pid, libc::WNOHANG) {
            Ok(status) => status?,
            Err(_) => return Some(Err(ErrorKind::Interrupted.into())),
        };
        Some(match libc::WEXITSTATUS(status) {
            _ if !libc::WIFEXITED(status) => Err(ErrorKind::Interrupted.into()),
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        })
    }

    /// Tells it to end, which it does when the kernel lets it go. It may have made the copy by then.
    pub fn cancel(&self) {
        let info: *const libc::siginfo_t = ptr::null();
        // SAFETY: the descriptor is open, and no information is passed with the signal. Who has ended gets none.
        unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.pidfd.as_raw_fd(), libc::SIGKILL, info, 0) };
    }
}

impl Drop for Cloning {
    fn drop(&mut self) {
        self.cancel();
        let _ = reap(self.pid, libc::WNOHANG);
    }
}

/// Readable when it has ended.
impl AsFd for Cloning {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// A descriptor of a process.
fn pidfd_of(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: takes two numbers.
    let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = check(c_int::try_from(opened).unwrap_or(-1))?;
    // SAFETY: it is open and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

/// The status of a child that has ended; with `WNOHANG`, `None` while it has not.
fn reap(pid: libc::pid_t, options: c_int) -> io::Result<Option<c_int>> {
    let mut status = 0;
    // SAFETY: `status` is a valid int for the call to fill.
    let ended = super::retry(|| check(unsafe { libc::waitpid(pid, &raw mut status, options) }))?;
    Ok((ended == pid).then_some(status))
}

/// What the child does. The copy has no name before it is whole and durable, so that whatever happens to the child, nothing
/// is left behind.
fn make(parent: u32, file: RawFd, folder: &CStr, copy: &CStr, mode: libc::mode_t) -> io::Result<()> {
    const IMAGE: RawFd = 0;
    const COPY: RawFd = 1;
    // SAFETY: these calls take numbers, strings that live until they return, and an int to fill; descriptors are this
    // process's own. None of them touches memory that another thread of the parent could have held locked.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        if u32::try_from(libc::getppid()) != Ok(parent) {
            return Err(io::Error::from_raw_os_error(libc::EINTR));
        }
        // What clients are connected by must end when the parent closes it, and not with this process.
        check(libc::dup2(file, IMAGE))?;
        let rest: c_uint = 1;
        check(c_int::try_from(libc::syscall(libc::SYS_close_range, rest, c_uint::MAX, 0)).unwrap_or(-1))?;
        let unnamed = check(libc::open(folder.as_ptr(), libc::O_TMPFILE | libc::O_RDWR, mode))?;
        check(libc::dup2(unnamed, COPY))?;
        check(libc::fchmod(COPY, mode))?;
        let folder = check(libc::open(folder.as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY))?;
        let mut flags: c_int = 0;
        if libc::ioctl(IMAGE, GET_FLAGS as _, &raw mut flags) == 0 && flags & NOCOW != 0 {
            let wanted = NOCOW;
            check(libc::ioctl(COPY, SET_FLAGS as _, &raw const wanted))?;
        }
        check(libc::ioctl(COPY, FICLONE as _, IMAGE))?;
        check(libc::fsync(COPY))?;
        let link = c"/proc/self/fd/1".as_ptr();
        let name = copy.as_ptr();
        check(libc::linkat(libc::AT_FDCWD, link, libc::AT_FDCWD, name, libc::AT_SYMLINK_FOLLOW))?;
        if let Err(error) = check(libc::fsync(folder)) {
            libc::unlink(name);
            return Err(error);
        }
    }
    Ok(())
}
