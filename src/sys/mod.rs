//! The only unsafe code: calls of the C library that std has no words for, behind safe signatures.
//!
//! It keeps no state but a [`SignalFd`], a [`ring::Ring`] and a reserve of memory, and does not know what its callers
//! want. This file has the clock, waiting, signals and limits of the process; the other files have the rest.

#![allow(unsafe_code, reason = "this is the place for it")]

pub mod clone;
pub mod file;
pub mod memory;
pub mod net;
pub mod pages;
pub mod passed;
pub mod ring;
#[cfg(test)]
mod scratch;

use std::ffi::{c_int, c_short};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, ErrorKind, Read};
use std::mem::{size_of, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::ptr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The signals that stop the program.
const STOP_SIGNALS: [c_int; 4] = [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGHUP];

/// The errno of a call that says -1 for failure.
fn check(result: c_int) -> io::Result<c_int> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Repeats a call that a signal interrupted before it did anything.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Milliseconds of the monotonic clock, which starts at boot and is never set.
pub fn monotonic_ms() -> u64 {
    let now = clock(libc::CLOCK_MONOTONIC);
    now.as_secs() * 1000 + u64::from(now.subsec_millis())
}

/// The same clock in microseconds.
pub fn monotonic_us() -> u64 {
    let now = clock(libc::CLOCK_MONOTONIC);
    now.as_secs() * 1_000_000 + u64::from(now.subsec_micros())
}

/// A number that nobody can foresee.
pub fn random() -> u64 {
    // The standard library takes the keys of its hash maps from the kernel, so that nobody can foresee their order.
    RandomState::new().build_hasher().finish()
}

/// The time that this thread has had a processor for.
pub fn thread_time() -> Duration {
    clock(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec for the call to fill. It cannot fail: Linux always has these clocks.
    unsafe { libc::clock_gettime(id, &raw mut now) };
    let nanoseconds = u32::try_from(now.tv_nsec).unwrap_or_default();
    Duration::new(u64::try_from(now.tv_sec).unwrap_or_default(), nanoseconds)
}

/// True when one of `events`, an error or a hang-up comes within `timeout_ms`.
fn poll_one(fd: BorrowedFd, events: c_short, timeout_ms: c_int) -> io::Result<bool> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
    // SAFETY: `entry` is one valid pollfd, as the count says, and its descriptor is open while it is borrowed.
    check(unsafe { libc::poll(&raw mut entry, 1, timeout_ms) }).map(|ready| ready > 0)
}

/// True when a write to `fd` would not wait: it has room, or it would fail at once.
pub fn writable_now(fd: BorrowedFd) -> bool {
    retry(|| poll_one(fd, libc::POLLOUT, 0)).unwrap_or(false)
}

/// Waits until something can be read from `fd`, or it fails; at most `timeout_ms`. False: the time is up.
pub fn wait_readable(fd: BorrowedFd, timeout_ms: u64) -> io::Result<bool> {
    wait(fd, libc::POLLIN, timeout_ms)
}

/// Waits until something can be written to `fd`, or it fails; at most `timeout_ms`. False: the time is up.
pub fn wait_writable(fd: BorrowedFd, timeout_ms: u64) -> io::Result<bool> {
    wait(fd, libc::POLLOUT, timeout_ms)
}

fn wait(fd: BorrowedFd, events: c_short, timeout_ms: u64) -> io::Result<bool> {
    let deadline_ms = monotonic_ms().saturating_add(timeout_ms);
    retry(|| {
        let left_ms = deadline_ms.saturating_sub(monotonic_ms());
        poll_one(fd, events, c_int::try_from(left_ms).unwrap_or(c_int::MAX))
    })
}

/// How many columns a terminal has; `None` for what is none, or does not say.
pub fn columns(terminal: BorrowedFd) -> Option<u16> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: `size` is a valid winsize for the call to fill, and the descriptor is open while it is borrowed.
    let known = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) } == 0;
    Some(size.ws_col).filter(|&columns| known && columns > 0)
}

/// When [`monotonic_ms`] was 0, by the time of day, in seconds since 1970.
pub fn clock_began_s() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since_1970.as_secs().saturating_sub(monotonic_ms() / 1000)
}

/// The stop signals (SIGINT, SIGQUIT, SIGTERM, SIGHUP) as something to poll and read.
#[derive(Debug)]
pub struct SignalFd {
    file: File,
}

impl SignalFd {
    /// Blocks the stop signals for good and makes them readable here, also those that the parent process has set to be
    /// ignored: a blocked signal is never ignored. Only a SIGHUP that is ignored stays so. Call it while the process has a
    /// single thread: any other would have to block them too.
    pub fn new() -> io::Result<Self> {
        // `nohup` ignores SIGHUP for a reason. A shell ignores SIGINT and SIGQUIT of what a script starts with `&` because of
        // its own terminal, and a server whose script sends them is meant to stop.
        let ignored = |&signal: &c_int| signal == libc::SIGHUP && is_ignored(signal);
        Self::of(STOP_SIGNALS.into_iter().filter(|signal| !ignored(signal)))
    }

    /// The same of SIGINT alone, which is what Ctrl-C sends. Where it is ignored, it does not come.
    pub fn interrupt() -> io::Result<Self> {
        Self::of([libc::SIGINT].into_iter().filter(|&signal| !is_ignored(signal)))
    }

    fn of(signals: impl Iterator<Item = c_int>) -> io::Result<Self> {
        let mut set = no_signals();
        for signal in signals {
            // SAFETY: `set` is initialised, `signal` is a valid number.
            check(unsafe { libc::sigaddset(&raw mut set, signal) })?;
        }
        // SAFETY: `set` is initialised; the old mask is not asked for.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) } {
            0 => {}
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
        // SAFETY: `set` is initialised; -1 asks for a new descriptor.
        let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) })?;
        // SAFETY: `fd` is open and nobody else owns it.
        Ok(Self { file: unsafe { File::from_raw_fd(fd) } })
    }

    /// The number of the next signal that has arrived, if any.
    pub fn read(&self) -> io::Result<Option<i32>> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match retry(|| (&self.file).read(&mut info)) {
            // The kernel hands out whole records, and the number is a record's first field.
            Ok(_) => Ok(info.first_chunk().map(|number| i32::from_ne_bytes(*number))),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn no_signals() -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `sigemptyset` initialises the set it is given, and cannot fail on a valid pointer.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    }
}

/// Ends the process by SIGINT, blocked or not, as if nobody had read one: a shell asks whether a program ended like that to
/// know whether its script is to end, too.
pub fn end_by_interrupt() {
    // SAFETY: `raise` takes a number. The signal stays pending while it is blocked.
    unsafe { libc::raise(libc::SIGINT) };
    let none = no_signals();
    // SAFETY: `none` is initialised; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) };
}

/// True for a signal that the parent process has set to be ignored.
fn is_ignored(signal: c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: no action is set, and `action` is valid for the old one, which is plain data.
    let known = unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) } == 0;
    // SAFETY: zeroed memory is a valid sigaction, and the call may have filled it.
    known && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The name of a signal that [`SignalFd`] reports.
pub fn signal_name(signal: i32) -> &'static str {
    match signal {
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGTERM => "SIGTERM",
        libc::SIGHUP => "SIGHUP",
        _ => "a signal",
    }
}

/// Makes a write beyond the limit of file sizes (`ulimit -f`) an error like any other, not the end of the process.
pub fn ignore_file_size_signal() {
    // SAFETY: SIG_IGN is a valid disposition, and no handler of this process is replaced.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Lets the process open `wanted` descriptors, or as many as it may without privileges. Never lowers the limit. Returns
/// the limit that holds then.
pub fn raise_descriptor_limit(wanted: u64) -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for the call to fill.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    let before = limit.rlim_cur;
    limit.rlim_cur = before.max(wanted.min(limit.rlim_max));
    // SAFETY: `limit` is initialised, and only read.
    let raised = limit.rlim_cur > before && unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } == 0;
    Ok(if raised { limit.rlim_cur } else { before })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_thread_that_sleeps_has_no_processor() {
        let before = thread_time();
        std::thread::sleep(Duration::from_millis(30));
        assert!(thread_time().saturating_sub(before) < Duration::from_millis(15));
        let start = thread_time();
        while thread_time().saturating_sub(start) < Duration::from_millis(2) {}
    }

    #[test]
    fn the_clock_goes_forward_and_a_wait_ends_in_time() {
        let (reader, mut writer) = UnixStream::pair().unwrap();
        let before = monotonic_ms();
        assert!(!wait_readable(reader.as_fd(), 20).unwrap());
        let waited = monotonic_ms() - before;
        assert!((20..5000).contains(&waited), "waited {waited} ms");
        writer.write_all(b"x").unwrap();
        assert!(wait_readable(reader.as_fd(), u64::MAX).unwrap());
    }

    #[test]
    fn a_full_socket_is_not_writable_until_it_fails() {
        let (reader, mut writer) = UnixStream::pair().unwrap();
        assert!(writable_now(writer.as_fd()));
        writer.set_nonblocking(true).unwrap();
        while writer.write(&[0; 4096]).is_ok() {}
        assert!(!writable_now(writer.as_fd()));
        drop(reader);
        assert!(writable_now(writer.as_fd()), "a write would fail at once");
    }

    #[test]
    fn stop_signals_are_read_one_by_one() {
        let signals = SignalFd::new().unwrap();
        assert_eq!(signals.read().unwrap(), None);
        for signal in STOP_SIGNALS {
            // SAFETY: this thread has the signal blocked, so it stays pending for the read below.
            check(unsafe { libc::raise(signal) }).unwrap();
            assert_eq!(signals.read().unwrap(), Some(signal));
        }
        assert_eq!(signals.read().unwrap(), None);
        assert_eq!(STOP_SIGNALS.map(signal_name), ["SIGINT", "SIGQUIT", "SIGTERM", "SIGHUP"]);
    }

    #[test]
    fn the_descriptor_limit_only_rises() {
        let now = raise_descriptor_limit(0).unwrap();
        assert!(now > 0);
        let most = raise_descriptor_limit(u64::MAX).unwrap();
        assert!(most >= now);
        assert_eq!(raise_descriptor_limit(1).unwrap(), most);
    }
}
