//! Sockets: options, deadlines, and connections that start without waiting.

#![allow(clippy::cast_possible_truncation, reason = "types of the kernel are narrower than those of their constants")]

use super::check;
use std::ffi::c_int;
use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

/// When the kernel asks whether a silent peer is still there, and when it gives it up.
#[derive(Debug, Clone, Copy)]
pub struct Keepalive {
    /// Seconds of silence before it asks.
    idle_s: c_int,
    /// Seconds between two questions.
    interval_s: c_int,
    /// Questions without an answer after which the connection is dead.
    probes: c_int,
}

impl Keepalive {
    /// For clients, and for the other end of a migration: a lost machine is noticed within a minute.
    pub const PEER: Self = Self { idle_s: 30, interval_s: 10, probes: 3 };
    /// For a server that clients wait for: within half a minute.
    pub const UPSTREAM: Self = Self { idle_s: 10, interval_s: 5, probes: 3 };
}

/// The option that bounds how long the kernel waits before it tries again what was not acknowledged; since Linux 6.15.
const TCP_RTO_MAX_MS: c_int = 44;

/// That bound: without it a peer that has not read for a while is asked every two minutes whether it is there, and cannot
/// be missed before.
const RETRY_MAX_MS: c_int = 15_000;

fn set_option<T: Copy>(fd: BorrowedFd, level: c_int, name: c_int, value: T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes of `value`, which is that long, and judges them by the option.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), length) }).map(drop)
}

/// The value of an option that is a number.
pub(super) fn option(fd: &impl AsRawFd, level: c_int, name: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the kernel fills up to `length` bytes of `value`, which is that long.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut length) })?;
    Ok(value)
}

/// Sets up a TCP connection: small replies leave at once, and a peer that vanished is noticed; while data
/// is on its way to it, only [`delivery`] can tell.
pub fn set_tcp_options(fd: BorrowedFd, keepalive: Keepalive) -> io::Result<()> {
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1 as c_int)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, keepalive.idle_s)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, keepalive.interval_s)?;
    set_option(fd, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, keepalive.probes)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1 as c_int)?;
    // A kernel that does not know it is no reason to refuse the peer.
    let _ = set_option(fd, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, RETRY_MAX_MS);
    Ok(())
}

/// Makes the end of a TCP connection a reset: the peer hears of it at once, and not behind what it has not read yet.
pub fn reset_at_close(fd: BorrowedFd) -> io::Result<()> {
    set_option(fd, libc::SOL_SOCKET, libc::SO_LINGER, libc::linger { l_onoff: 1, l_linger: 0 })
}

/// How a TCP peer takes what is sent to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Delivery {
    /// What was sent or waits to be sent, and is not acknowledged, in bytes.
    pub pending_bytes: u32,
    /// How long ago the last acknowledgement came, in milliseconds.
    pub acked_ms_ago: u64,
    /// How often the kernel has sent something again, or asked for room, since the peer has taken anything; up to 15.
    pub tries: u32,
    /// How often it has asked since the last acknowledgement.
    pub probes: u32,
}

/// Asks how the peer of a TCP connection takes what is sent to it.
pub fn delivery(fd: BorrowedFd) -> io::Result<Delivery> {
    let mut pending: c_int = 0;
    // SAFETY: `pending` is valid for the kernel to fill.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut pending) })?;
    // SAFETY: the struct has only numbers, of which all are valid with each bit zero.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    let (to, room) = ((&raw mut info).cast(), &raw mut length);
    // SAFETY: the kernel fills up to `length` bytes of `info`, which is that long.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, to, room) })?;
    Ok(Delivery {
        pending_bytes: pending.unsigned_abs(),
        acked_ms_ago: info.tcpi_last_ack_recv.into(),
        tries: info.tcpi_backoff.into(),
        probes: info.tcpi_probes.into(),
    })
}

/// Bounds how long one blocking read or write of a socket may wait. After that it fails with [`io::ErrorKind::WouldBlock`].
pub fn set_io_timeout(fd: BorrowedFd, limit: Duration) -> io::Result<()> {
    let seconds = libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX);
    let value = libc::timeval { tv_sec: seconds, tv_usec: libc::suseconds_t::from(limit.subsec_micros()) };
    set_option(fd, libc::SOL_SOCKET, libc::SO_RCVTIMEO, value)?;
    set_option(fd, libc::SOL_SOCKET, libc::SO_SNDTIMEO, value)
}

/// Runs `call` on the address in the kernel's form. The pointer is valid for the length, while `call` runs.
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
/// and may still be connecting. When it becomes writable, that is over, and `TcpStream::take_error` says how it went.
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read, Write};
    use std::net::TcpListener;
    use std::os::fd::AsFd;
    use std::thread;
    use std::time::Instant;

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

        set_tcp_options(stream.as_fd(), Keepalive::PEER).unwrap();
        assert!(stream.nodelay().unwrap());
    }

    /// A peer that reads nothing acknowledges that it has no room, each time it is asked.
    #[test]
    fn what_a_peer_does_not_take_is_pending() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        set_tcp_options(stream.as_fd(), Keepalive::PEER).unwrap();
        let wait_for = |what: &str, is_so: &dyn Fn(&Delivery) -> bool| {
            let began = Instant::now();
            while !is_so(&delivery(stream.as_fd()).unwrap()) {
                assert!(began.elapsed() < Duration::from_secs(30), "{what}: {:?}", delivery(stream.as_fd()));
                thread::sleep(Duration::from_millis(5));
            }
        };
        wait_for("nothing was sent", &|now| now.pending_bytes == 0 && now.tries == 0);
        stream.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(n) = (&stream).write(&[1; 4_096]) {
            sent += n;
        }
        wait_for("it is asked, and answers", &|now| now.tries >= 2 && now.probes == 0 && now.acked_ms_ago < 300);
        assert!(delivery(stream.as_fd()).unwrap().pending_bytes > 0);
        peer.read_exact(&mut vec![0; sent]).unwrap();
        wait_for("all of it is taken", &|now| now.pending_bytes == 0);
    }

    #[test]
    fn a_connection_that_cannot_start_is_an_error() {
        let to = "127.0.0.1:1".parse().unwrap();
        let foreign = connect_tcp(Some("192.0.2.1".parse().unwrap()), to).unwrap_err();
        assert_eq!(foreign.kind(), ErrorKind::AddrNotAvailable);
        assert!(connect_tcp(Some("::1".parse().unwrap()), to).is_err(), "the families differ");
    }
}
