//! Blocking connections, each step under a deadline.

use crate::endpoint::check_socket_path;
use crate::sys;
use crate::sys::net::Keepalive;
use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long a connection may take to be made.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// How long to wait before another try when the backlog of a UNIX socket is full.
const BACKLOG_RETRY: Duration = Duration::from_millis(20);

/// Why a mode failed: the text of its one line.
#[derive(Debug)]
pub struct Error(pub(super) String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Connects to `addr`, from the address `bind` if given.
pub(super) fn connect_tcp(bind: Option<IpAddr>, addr: SocketAddr) -> Result<TcpStream, Error> {
    let from = bind.map(|bind| format!(" from {bind}")).unwrap_or_default();
    let failed = |error: &dyn fmt::Display| Error(format!("cannot connect to {addr}{from}: {error}"));
    let stream = sys::net::connect_tcp(bind, addr).map_err(|error| failed(&error))?;
    let limit_ms = u64::try_from(CONNECT_LIMIT.as_millis()).unwrap_or(u64::MAX);
    if !sys::wait_writable(stream.as_fd(), limit_ms).map_err(|error| failed(&error))? {
        return Err(failed(&format_args!("no answer in {} s", CONNECT_LIMIT.as_secs())));
    }
    if let Some(error) = stream.take_error().map_err(|error| failed(&error))? {
        return Err(failed(&error));
    }
    stream.set_nonblocking(false).map_err(|error| failed(&error))?;
    sys::net::set_tcp_options(stream.as_fd(), Keepalive::PEER).map_err(|error| failed(&error))?;
    Ok(stream)
}

/// Connects to a UNIX socket. If its backlog is full, tries again for up to `limit`.
pub(super) fn connect_unix(path: &Path, limit: Duration) -> Result<UnixStream, Error> {
    let failed = |error: &dyn fmt::Display| Error(format!("cannot connect to {}: {error}", path.display()));
    check_socket_path(path).map_err(|error| failed(&error))?;
    let give_up = Instant::now() + limit;
    loop {
        match mio::net::UnixStream::connect(path) {
            Ok(stream) => {
                let stream = UnixStream::from(OwnedFd::from(stream));
                stream.set_nonblocking(false).map_err(|error| failed(&error))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < give_up => {
                thread::sleep(BACKLOG_RETRY);
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                return Err(failed(&"nobody listens there; is it the socket of a running server?"));
            }
            Err(error) => return Err(failed(&error)),
        }
    }
}

/// Bounds how long each read and each write may take.
pub(super) fn set_limits(fd: &impl AsFd, limit: Duration) -> io::Result<()> {
    sys::net::set_io_timeout(fd.as_fd(), limit)
}

/// The error in words for a person: a socket whose time is up says no more than «would block».
pub(super) fn explain(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock => "the server did not move a byte in time".into(),
        ErrorKind::UnexpectedEof => "the server closed the connection".into(),
        _ => error.to_string(),
    }
}
