//! Where the image is served now, for writers who look for it.

use crate::support::{Server, SOON};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The ways into one server.
#[derive(Clone)]
pub struct Door {
    /// Tells this server from all others of the round.
    pub number: u64,
    /// The oldstyle address: `ADDRESS:PORT`, or a path.
    pub oldstyle: String,
    /// The newstyle port; a server on a UNIX socket has none.
    pub newstyle: Option<SocketAddr>,
    /// The newstyle UNIX socket.
    pub socket: PathBuf,
    control: PathBuf,
}

/// Where a server that has a door has its UNIX socket, in its directory.
pub const SOCKET: &str = "clients";

impl Door {
    /// True when the server answers.
    pub fn answers(&self) -> bool {
        status(&self.control).is_ok_and(|answer| answer.starts_with("0: "))
    }

    /// True when the server goes on. One that is in its last turn may still answer, but has no migration any more.
    pub fn goes_on(&self) -> bool {
        let give_up = Instant::now() + Duration::from_secs(2);
        while Instant::now() < give_up {
            match status(&self.control) {
                Ok(answer) if answer.contains(" is_mirroring=true ") => return true,
                Ok(answer) if answer.starts_with("0: ") => thread::sleep(Duration::from_millis(20)),
                _ => return false,
            }
        }
        true
    }
}

fn status(control: &Path) -> io::Result<String> {
    let mut stream = UnixStream::connect(control)?;
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"status\n\n")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Where the image is served, as far as the writers are told.
#[derive(Default)]
pub struct Place {
    door: Mutex<Option<Door>>,
    changed: Condvar,
    doors: AtomicU64,
    lists: AtomicU64,
    is_over: AtomicBool,
    has_failed: AtomicBool,
}

impl Place {
    /// The image is here now.
    #[track_caller]
    pub fn open(&self, server: &Server) {
        let status = server.status();
        let newstyle = status.line().split_whitespace().find_map(|pair| pair.strip_prefix("newstyle_address="));
        let door = Door {
            number: self.doors.fetch_add(1, Ordering::Relaxed),
            oldstyle: status.get("address").to_owned(),
            newstyle: newstyle.map(|address| address.parse().unwrap()),
            socket: server.dir().join(SOCKET),
            control: server.sock.clone(),
        };
        *self.lock() = Some(door);
        self.changed.notify_all();
    }

    /// Nobody serves the image now.
    pub fn close(&self) {
        *self.lock() = None;
    }

    /// The writers are to end.
    pub fn end(&self) {
        self.is_over.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// True when the writers are to end.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// A writer has failed.
    pub fn fail(&self) {
        self.has_failed.store(true, Ordering::Relaxed);
    }

    /// True when a writer has failed, which has told why.
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }

    /// The access control list is about to change: connections from before may be cut.
    pub fn change_list(&self) {
        self.lists.fetch_add(1, Ordering::Relaxed);
    }

    /// How many times the list was changed.
    pub fn lists(&self) -> u64 {
        self.lists.load(Ordering::Relaxed)
    }

    /// Waits until there is a door, and returns it. `None`: it is over.
    pub fn wait(&self) -> Option<Door> {
        let mut door = self.lock();
        loop {
            if self.is_over() {
                return None;
            }
            if door.is_some() {
                return door.clone();
            }
            door = self.changed.wait_timeout(door, SOON).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Door>> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
