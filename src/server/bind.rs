//! How a listening socket gets its address, its path, or its descriptor from the supervisor.

use super::config::Fatal;
use super::signals::Signals;
use crate::endpoint::check_socket_path;
use crate::sys;
use crate::sys::passed::Passed;
use log::{debug, warn};
use mio::net::{TcpListener, UnixListener};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

/// The first port that everybody may listen on.
const FREE_PORT: u16 = 1024;
/// How long to wait for an address that this machine does not have yet, in milliseconds.
const ADDRESS_WAIT_MS: u64 = 10_000;
/// How often to try meanwhile, in milliseconds.
const ADDRESS_RETRY_MS: u64 = 250;
/// How long to wait for servers that start in the same folder at the same time, in milliseconds. Each takes a few system
/// calls, so what takes longer is no server.
const FOLDER_WAIT_MS: u64 = 2_000;
/// How often to try meanwhile, in milliseconds.
const FOLDER_RETRY_MS: u64 = 5;

/// A listening socket, and the path that goes with it.
#[derive(Debug)]
pub(super) enum Bound {
    /// On an address.
    Tcp(TcpListener),
    /// On a path, which goes before the socket closes: what answers there is alive, so no other server has taken the path
    /// for its own meanwhile. `None`: the path is the supervisor's, and stays.
    Unix(Option<SocketFile>, UnixListener),
}

impl From<Passed> for Bound {
    fn from(socket: Passed) -> Self {
        match socket {
            Passed::Tcp(socket) => Self::Tcp(TcpListener::from_std(socket)),
            Passed::Unix(socket) => Self::Unix(None, UnixListener::from_std(socket)),
        }
    }
}

/// The name of a UNIX socket that this process made. It is removed with the value, unless it is another's by then.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    device_and_inode: (u64, u64),
}

impl SocketFile {
    /// Gives the socket that is at `unready` this path. Nothing is replaced: it is an error when there is something.
    fn name(unready: &Path, path: &Path) -> io::Result<Self> {
        let device_and_inode = Self::identify(unready)?;
        fs::hard_link(unready, path)?;
        Ok(Self { path: path.to_owned(), device_and_inode })
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

/// The folder of a socket. While the value lives, no other server looks for a socket there, removes one or makes one.
///
/// The lock is on the folder itself (`flock(2)`), so it leaves nothing behind and has no name that somebody could take first.
/// Whoever may read the folder can hold it up, so the wait for it is short: without it, two servers that start at the
/// same moment may both find the socket of a dead one and the slower remove what the faster has made.
struct Folder {
    path: PathBuf,
    /// `None`: it may not be read.
    file: Option<File>,
}

impl Folder {
    fn lock(socket: &Path) -> io::Result<Self> {
        let path = match socket.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let file = match File::options().read(true).custom_flags(libc::O_DIRECTORY).open(&path) {
            Ok(file) => Some(file),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => None,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(io::Error::other(format!("there is no folder {}; make it first", path.display())));
            }
            Err(error) => return Err(error),
        };
        let locked = file.as_ref().map_or(Err(ErrorKind::PermissionDenied.into()), Self::wait_for_lock);
        if let Err(error) = locked {
            warn!("{}: cannot lock this folder against other servers that start now: {error}", path.display());
        }
        Ok(Self { path, file })
    }

    fn wait_for_lock(file: &File) -> io::Result<()> {
        let give_up_ms = sys::monotonic_ms().saturating_add(FOLDER_WAIT_MS);
        while !sys::file::try_lock_folder(file)? {
            if sys::monotonic_ms() >= give_up_ms {
                return Err(io::Error::new(ErrorKind::TimedOut, "another program keeps it locked"));
            }
            // Nothing is served yet, so waiting stalls nobody.
            thread::sleep(Duration::from_millis(FOLDER_RETRY_MS));
        }
        Ok(())
    }

    /// A name in the folder that nobody can foresee, short enough for the address of a socket.
    fn unforeseeable_name(&self) -> PathBuf {
        let name = format!(".{:016x}", sys::random());
        let path = self.path.join(&name);
        match &self.file {
            // The folder may have a name as long as an address may be.
            Some(file) if net::SocketAddr::from_pathname(&path).is_err() => {
                PathBuf::from(format!("/proc/self/fd/{}/{name}", file.as_raw_fd()))
            }
            _ => path,
        }
    }
}

/// `None`: a signal has ended the wait for the address.
pub(super) fn tcp(addr: SocketAddr, signals: &Signals) -> Result<Option<Bound>, Fatal> {
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
                let came = sys::wait_readable(signals.as_fd(), ADDRESS_RETRY_MS).unwrap_or(false);
                if came && signals.take_stop().unwrap_or(true) {
                    return Ok(None);
                }
            }
            Err(error) if error.kind() == ErrorKind::PermissionDenied && addr.port() < FREE_PORT => {
                return Err(Fatal(format!(
                    "cannot listen on {addr}: {error}; ports below {FREE_PORT} are for root and CAP_NET_BIND_SERVICE, choose \
                     another, such as 10809"
                )));
            }
            Err(error) => return Err(Fatal(format!("cannot listen on {addr}: {error}"))),
        }
    }
}

/// Removes the socket that a process left when it died, before the server opens anything: a path that exists says that the
/// server is ready. An error when the path cannot be had.
pub(super) fn clear(path: &Path) -> Result<(), Fatal> {
    let refused = cannot_listen(path);
    let _folder = Folder::lock(path).map_err(&refused)?;
    remove_stale(path)
}

/// Binds a UNIX socket. A path on which nobody answers is left from a process that died, and is replaced.
pub(super) fn unix(path: &Path, bind: impl FnOnce(&Path) -> io::Result<net::UnixListener>) -> Result<Bound, Fatal> {
    let refused = cannot_listen(path);
    let folder = Folder::lock(path).map_err(&refused)?;
    remove_stale(path)?;
    // A socket refuses connections until it listens. It gets its name only then, because the name says «ready».
    let unready = folder.unforeseeable_name();
    let named = bind(&unready).and_then(|socket| {
        socket.set_nonblocking(true)?;
        Ok((socket, SocketFile::name(&unready, path)?))
    });
    // The socket has its own name by now or, after a failure, this is what is left of it.
    match fs::remove_file(&unready) {
        Err(error) if error.kind() != ErrorKind::NotFound => debug!("{}: {error}", unready.display()),
        _ => {}
    }
    let (socket, file) = named.map_err(&refused)?;
    Ok(Bound::Unix(Some(file), UnixListener::from_std(socket)))
}

/// Removes a socket on which nobody answers.
fn remove_stale(path: &Path) -> Result<(), Fatal> {
    let refused = cannot_listen(path);
    let fatal = |why: &str| refused(io::Error::other(why));
    // Nobody could connect to a path that does not fit an address.
    check_socket_path(path).map_err(&refused)?;
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(fatal("the path exists and is not a socket; remove it or choose another"));
        }
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused(error)),
    }
    match mio::net::UnixStream::connect(path) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            debug!("{}: left by a process that is gone", path.display());
            match fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => Err(refused(error)),
                _ => Ok(()),
            }
        }
        // Its process has ended meanwhile.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(refused(error)),
        _ => Err(fatal("another server answers there; stop it or choose another path")),
    }
}

fn cannot_listen(path: &Path) -> impl Fn(io::Error) -> Fatal + '_ {
    move |error| Fatal(format!("cannot listen on {}: {error}", path.display()))
}
