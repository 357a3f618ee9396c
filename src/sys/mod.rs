//! The only unsafe code: calls of the C library that std has no words for, behind safe signatures.
//!
//! Nothing here keeps state besides the descriptor of a [`SignalFd`], and nothing knows what its callers are for.

#![allow(unsafe_code)]
// The kernel's types for lengths and address families are narrower than those of their constants.
#![allow(clippy::cast_possible_truncation)]

use std::ffi::{c_int, c_short};
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::mem::{size_of, MaybeUninit};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::Duration;

/// Seconds a connection is silent before the kernel asks whether its peer is still there.
const KEEPALIVE_IDLE_S: c_int = 30;

/// Seconds between two such questions.
const KEEPALIVE_INTERVAL_S: c_int = 10;

/// Unanswered questions after which the connection is dead: with the above, a lost host is noticed within a minute.
const KEEPALIVE_PROBES: c_int = 3;

/// The signals that stop the program.
const STOP_SIGNALS: [c_int; 4] = [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGHUP];

/// The errno of a call that says -1 for failure.
fn check(result: c_int) -> io::Result<c_int> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Repeats a call that a signal cut short before it did anything.
fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// A file offset or length as the C library takes it.
fn off(value: u64) -> io::Result<libc::off_t> {
    value.try_into().map_err(|_| ErrorKind::InvalidInput.into())
}

/// Milliseconds of the monotonic clock (it starts at boot and is never set).
pub fn monotonic_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec for the call to fill. It cannot fail: Linux always has this clock.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or_default();
    seconds * 1000 + nanoseconds / 1_000_000
}

/// True when one of `events`, an error or a hang-up is there within `timeout_ms`.
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

/// The stop signals (SIGINT, SIGQUIT, SIGTERM) as something to poll and read.
#[derive(Debug)]
pub struct SignalFd {
    file: File,
}

impl SignalFd {
    /// Takes the stop signals away from their default action, for good, and makes them readable here. To be called
    /// while the process has one thread: others would have to block the signals themselves.
    pub fn new() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigemptyset` initialises the set it is given, and cannot fail on a valid pointer.
        let mut set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        };
        for signal in STOP_SIGNALS.into_iter().filter(|&signal| !is_ignored(signal)) {
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

/// True for a signal that whoever started the process wants ignored, as `nohup` does with SIGHUP. Blocked, it would come
/// all the same.
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

fn fallocate(file: &File, mode: c_int, offset: u64, length: u64) -> io::Result<()> {
    let (offset, length) = (off(offset)?, off(length)?);
    // SAFETY: no memory is passed, and the descriptor is open while `file` is borrowed.
    retry(|| check(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) })).map(drop)
}

/// Deallocates a range of a file, which then reads as zeroes; its size stays. EOPNOTSUPP where the file system has no
/// holes; EINVAL when a block device is asked for a part of a block.
pub fn punch_hole(file: &File, offset: u64, length: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length)
}

/// Makes a range of a file read as zeroes and keeps it allocated; its size stays. Errors as for [`punch_hole`].
pub fn zero_range(file: &File, offset: u64, length: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, length)
}

/// Locks a whole file until it is closed (`flock`): together with others, or alone, which also ends an own lock together
/// with others. False: somebody else's lock is in the way.
pub fn try_lock(file: &File, alone: bool) -> io::Result<bool> {
    let operation = if alone { libc::LOCK_EX } else { libc::LOCK_SH } | libc::LOCK_NB;
    // SAFETY: no memory is passed, and the descriptor is open while `file` is borrowed.
    match retry(|| check(unsafe { libc::flock(file.as_raw_fd(), operation) })) {
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

/// Where data begins at or after `offset`, or `None` when there is none up to the end of the file. A file system that
/// knows no holes says `offset`. Moves the position of the file.
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

fn set_option<T: Copy>(fd: BorrowedFd, level: c_int, name: c_int, value: T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes of `value`, which is that long, and judges them by the option.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), length) }).map(drop)
}

/// What every TCP connection gets: small replies leave at once, and a peer that vanished is noticed within a minute.
pub fn set_tcp_options(fd: BorrowedFd) -> io::Result<()> {
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1 as c_int)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, KEEPALIVE_IDLE_S)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, KEEPALIVE_PROBES)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1 as c_int)
}

/// Bounds how long one blocking read or write of a socket may wait. Over it, they fail with
/// [`ErrorKind::WouldBlock`].
pub fn set_io_timeout(fd: BorrowedFd, limit: Duration) -> io::Result<()> {
    let seconds = libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX);
    let value = libc::timeval { tv_sec: seconds, tv_usec: libc::suseconds_t::from(limit.subsec_micros()) };
    set_option(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, value)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_SNDTIMEO, value)
}

/// Runs `call` on the address in the form the kernel takes; the pointer is good for the length, while `call` runs.
fn with_raw_address<T>(address: SocketAddr, call: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> T) -> T {
    match address {
        SocketAddr::V4(v4) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                sin_zero: [0; 8],
            };
            call((&raw const raw).cast(), size_of_val(&raw) as libc::socklen_t)
        }
        SocketAddr::V6(v6) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            call((&raw const raw).cast(), size_of_val(&raw) as libc::socklen_t)
        }
    }
}

/// Starts a connection to `to`, from the address `bind` if given, and does not wait for it: the stream is non-blocking
/// and may still be connecting. It becomes writable when that has ended; `TcpStream::take_error` then says how.
pub fn connect_tcp(bind: Option<IpAddr>, to: SocketAddr) -> io::Result<TcpStream> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::socket(family, kind, 0) })?;
    // SAFETY: `fd` is open and nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if let Some(ip) = bind {
        with_raw_address(SocketAddr::new(ip, 0), |address, length| {
            // SAFETY: `address` is good for `length` bytes while this runs.
            check(unsafe { libc::bind(socket.as_raw_fd(), address, length) })
        })?;
    }
    let started = with_raw_address(to, |address, length| {
        // SAFETY: `address` is good for `length` bytes while this runs.
        check(unsafe { libc::connect(socket.as_raw_fd(), address, length) })
    });
    match started {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket.into()),
    }
}

/// Runs `create` so that what it creates in the file system is this user's alone.
pub fn with_private_umask<T>(create: impl FnOnce() -> T) -> T {
    // SAFETY: `umask` takes a number, gives one back, and cannot fail.
    let previous = unsafe { libc::umask(0o177) };
    let created = create();
    // SAFETY: as above.
    unsafe { libc::umask(previous) };
    created
}

/// Makes a write beyond the limit on file sizes (`ulimit -f`) an error, as any other, rather than the end of the process.
pub fn ignore_file_size_signal() {
    // SAFETY: SIG_IGN is a valid disposition, and no handler of this process is replaced.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Lets the process open `wanted` descriptors, or as many as it may without privileges. Never lowers the limit. Returns
/// the limit that now holds.
pub fn raise_descriptor_limit(wanted: u64) -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is a valid rlimit for the call to fill.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    let target = wanted.min(limit.rlim_max);
    if target > limit.rlim_cur {
        limit.rlim_cur = target;
        // SAFETY: `limit` is initialised, and only read.
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    }
    Ok(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

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
    fn a_connection_comes_from_the_bound_address() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap();
        let stream = connect_tcp(Some("127.0.0.2".parse().unwrap()), to).unwrap();
        let (_peer, from) = listener.accept().unwrap();
        assert_eq!(from, stream.local_addr().unwrap());
        assert_eq!(from.ip().to_string(), "127.0.0.2");
        assert!(stream.take_error().unwrap().is_none());
        assert_eq!((&stream).read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);

        set_tcp_options(stream.as_fd()).unwrap();
        assert!(stream.nodelay().unwrap());
    }

    #[test]
    fn a_connection_that_cannot_start_is_an_error() {
        let to = "127.0.0.1:1".parse().unwrap();
        let foreign = connect_tcp(Some("192.0.2.1".parse().unwrap()), to).unwrap_err();
        assert_eq!(foreign.kind(), ErrorKind::AddrNotAvailable);
        assert!(connect_tcp(Some("::1".parse().unwrap()), to).is_err(), "the families differ");
    }

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
    fn the_descriptor_limit_only_rises() {
        let now = raise_descriptor_limit(0).unwrap();
        assert!(now > 0);
        let most = raise_descriptor_limit(u64::MAX).unwrap();
        assert!(most >= now);
        assert_eq!(raise_descriptor_limit(1).unwrap(), most);
    }

    #[test]
    fn an_offset_beyond_what_the_kernel_takes_is_refused() {
        let file = File::open("/dev/null").unwrap();
        assert_eq!(seek_hole(&file, u64::MAX).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(punch_hole(&file, 0, u64::MAX).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
