//! Sockets that a supervisor has opened and passes to the process it starts (`sd_listen_fds(3)`).

use super::check;
use super::net::option;
use std::env;
use std::ffi::c_int;
use std::io;
use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::process;

/// The number of the first descriptor.
const FIRST: RawFd = 3;

/// A socket that accepts connections.
#[derive(Debug)]
pub enum Passed {
    /// On an address.
    Tcp(TcpListener),
    /// On a path or an abstract name, which stay when it is closed: they are the supervisor's.
    Unix(UnixListener),
}

/// Takes the sockets that were passed to this process, non-blocking and closed on exec, each with its name (empty where it has
/// none), and removes the variables that announce them, so that this happens once. Call it before anything is opened. An error
/// is a sentence about what was passed that is no socket to accept connections from.
pub fn take_passed() -> Result<Vec<(String, Passed)>, String> {
    let [pid, count, names] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"].map(|name| {
        let value = env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        env::remove_var(name);
        value
    });
    // A parent may have left its own behind.
    let (Some(count), true) = (count, pid == Some(process::id().to_string())) else { return Ok(Vec::new()) };
    let end = count.parse().ok().and_then(|count: u16| FIRST.checked_add(count.into()));
    let end = end.ok_or_else(|| format!("LISTEN_FDS={count}: expected a number of descriptors"))?;
    let names = names.unwrap_or_default();
    let mut names = names.split(':');
    (FIRST..end)
        .map(|fd| {
            let name = names.next().unwrap_or_default().to_owned();
            let passed = take(fd).map_err(|why| format!("LISTEN_FDS={count}: descriptor {fd} {name:?}: {why}"))?;
            Ok((name, passed))
        })
        .collect()
}

fn take(fd: RawFd) -> Result<Passed, String> {
    let owned = own(fd).map_err(|error| error.to_string())?;
    let is = |name, value: c_int| option(&owned, libc::SOL_SOCKET, name).is_ok_and(|found| found == value);
    if !is(libc::SO_TYPE, libc::SOCK_STREAM) || !is(libc::SO_ACCEPTCONN, 1) {
        return Err("not a listening stream socket; a socket unit needs ListenStream= and Accept=no".into());
    }
    let (passed, nonblocking) = if is(libc::SO_DOMAIN, libc::AF_UNIX) {
        let socket = UnixListener::from(owned);
        let set = socket.set_nonblocking(true);
        (Passed::Unix(socket), set)
    } else if is(libc::SO_DOMAIN, libc::AF_INET) || is(libc::SO_DOMAIN, libc::AF_INET6) {
        let socket = TcpListener::from(owned);
        let set = socket.set_nonblocking(true);
        (Passed::Tcp(socket), set)
    } else {
        return Err("neither a TCP nor a UNIX socket".into());
    };
    nonblocking.map(|()| passed).map_err(|error| error.to_string())
}

fn own(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed, and a number that is no open descriptor is an error.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, as the call says, and the variables said that it is for this process; they are gone now, so nobody
    // else takes it, and nothing of the process's own was opened before.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
