//! How a listening socket gets its address or its path.

use super::config::Fatal;
use crate::sys::{self, SignalFd};
use log::{debug, warn};
use mio::net::{TcpListener, UnixListener};
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};

/// How long to wait for an address that this machine does not have yet, in milliseconds.
const ADDRESS_WAIT_MS: u64 = 10_000;
/// How often to try meanwhile, in milliseconds.
const ADDRESS_RETRY_MS: u64 = 250;
/// A listening socket, and the path that goes with it.
#[derive(Debug)]
pub(super) enum Bound {
    /// On an address.
    Tcp(TcpListener),
    /// On a path.
    Unix(UnixListener, SocketFile),
}

/// The path of a UNIX socket this process made; it is removed with the value, unless it is another's by then.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    device_and_inode: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), device_and_inode: Self::identify(path)? })
    }

    /// The path, while it is ours.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn identify(path: &Path) -> io::Result<(u64, u64)> {
        fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if Self::identify(&self.path).is_ok_and(|found| found == self.device_and_inode) {
            if let Err(error) = fs::remove_file(&self.path) {
                debug!("{}: {error}", self.path.display());
            }
        }
    }
}

/// `None`: a signal has ended the wait for the address.
pub(super) fn tcp(addr: SocketAddr, signals: &SignalFd) -> Result<Option<Bound>, Fatal> {
    let give_up_ms = sys::monotonic_ms().saturating_add(ADDRESS_WAIT_MS);
    let mut said = false;
    loop {
        match TcpListener::bind(addr) {
            Ok(socket) => return Ok(Some(Bound::Tcp(socket))),
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable && sys::monotonic_ms() < give_up_ms => {
                if !std::mem::replace(&mut said, true) {
                    warn!("{addr}: this machine does not have the address; trying for {ADDRESS_WAIT_MS} ms");
                }
                // Nothing is served yet, so waiting stalls nobody.
                if sys::wait_readable(signals.as_fd(), ADDRESS_RETRY_MS).unwrap_or(false) {
                    return Ok(None);
                }
            }
            Err(error) => return Err(Fatal(format!("cannot listen on {addr}: {error}"))),
        }
    }
}

/// Binds a UNIX socket. A path on which nobody answers is left from a process that died, and is replaced.
pub(super) fn unix(path: &Path, bind: impl FnOnce(&Path) -> io::Result<net::UnixListener>) -> Result<Bound, Fatal> {
    let fatal = |why: &dyn fmt::Display| Fatal(format!("cannot listen on {}: {why}", path.display()));
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(fatal(&"the path exists and is not a socket; remove it or choose another"));
        }
        Ok(_) => match mio::net::UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                debug!("{}: left by a process that is gone", path.display());
            }
            Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(fatal(&error)),
            _ => return Err(fatal(&"another server answers there; stop it or choose another path")),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(fatal(&error)),
    }
    // Nobody could connect to a path that does not fit an address.
    net::SocketAddr::from_pathname(path).map_err(|error| fatal(&error))?;
    // A socket refuses connections until it listens. It gets its name only then, because the name says «ready».
    // It has to fit where the real one does.
    let unready = path.with_file_name(format!(".{:x}", std::process::id()));
    let socket = bind(&unready).map_err(|error| fatal(&error))?;
    let mut file = SocketFile::new(&unready).map_err(|error| fatal(&error))?;
    fs::rename(&unready, path).map_err(|error| fatal(&error))?;
    path.clone_into(&mut file.path);
    socket.set_nonblocking(true).map_err(|error| fatal(&error))?;
    Ok(Bound::Unix(UnixListener::from_std(socket), file))
}
