//! Listening sockets: they accept, and nothing else.

use super::bind::{self, Bound};
use super::complaints::Complaint;
use super::config::{ControlDoor, Dialect, Door, Fatal, Purpose};
use super::effect::Effect;
use super::reason::Next;
use super::shared::Shared;
use super::signals::Signals;
use super::socket::{Peer, Socket, Stream};
use crate::endpoint::Endpoint;
use crate::event::ready::Ready;
use crate::event::slots::Key;
use crate::sys;
use crate::sys::passed::Passed;
use log::{log, warn};
use mio::event::{Event, Source};
use mio::{Interest, Registry, Token};
use std::fmt;
use std::io::{self, ErrorKind};
use std::mem;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net;

/// Connections accepted in one turn: a burst of them must not keep clients waiting.
const ACCEPTS_MAX: usize = 16;
/// How long to wait before accepting again when descriptors have run out, in milliseconds.
const REST_MS: u64 = 200;

/// A listening socket.
#[derive(Debug)]
pub(super) struct Listener {
    bound: Bound,
    purpose: Purpose,
    ready: Ready,
    /// When accepting may be tried again, in milliseconds.
    rests_until_ms: u64,
}

impl Listener {
    /// Listens for NBD clients, once this machine has the address. `None`: a signal has ended the wait for that.
    pub(super) fn nbd(door: Door, dialect: Dialect, signals: &Signals) -> Result<Option<Self>, Fatal> {
        let bound = match door {
            Door::At(Endpoint::Tcp(addr)) => bind::tcp(addr, signals)?,
            Door::At(Endpoint::Unix(path)) => Some(bind::unix(&path, |path| net::UnixListener::bind(path))?),
            Door::Passed(socket) => Some(socket.into()),
        };
        Ok(bound.map(|bound| Self::new(bound, Purpose::Nbd(dialect))))
    }

    /// Listens for commands, on a path of its own if only this user may open it.
    pub(super) fn control(door: ControlDoor) -> Result<Self, Fatal> {
        let bound = match door {
            ControlDoor::At(path) => {
                bind::unix(&path, |path| sys::file::with_private_umask(|| net::UnixListener::bind(path)))?
            }
            ControlDoor::Passed(socket) => Passed::Unix(socket).into(),
        };
        Ok(Self::new(bound, Purpose::Control))
    }

    fn new(bound: Bound, purpose: Purpose) -> Self {
        Self { bound, purpose, ready: Ready::default(), rests_until_ms: 0 }
    }

    /// Registers the socket under `token`.
    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        match &mut self.bound {
            Bound::Tcp(socket) => socket.register(registry, token, Interest::READABLE),
            Bound::Unix(_, socket) => socket.register(registry, token, Interest::READABLE),
        }
    }

    /// Notes what an event says.
    pub(super) fn note(&mut self, event: &Event) {
        self.ready.note(event);
    }

    /// Accepts what has come.
    pub(super) fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        if sh.now_ms < self.rests_until_ms {
            return Next::Idle;
        }
        let room = match self.purpose {
            Purpose::Control => sh.admission.controls_left(),
            Purpose::Nbd(_) if sh.admission.queues_clients() => {
                let is_client = |effect: &Effect| matches!(effect, Effect::Accepted(_, _, _, Purpose::Nbd(_)));
                if sh.effects.iter().any(is_client) {
                    // Another listener has accepted one in this turn, which has no place yet.
                    return Next::Again;
                }
                sh.admission.clients_left(false)
            }
            // A client without a place is accepted, to be refused, but only one in a turn: each takes a descriptor.
            Purpose::Nbd(_) => sh.admission.clients_left(sh.life.awaits_image()).saturating_add(1),
        };
        if room == 0 {
            // Woken when a connection has gone.
            return Next::Idle;
        }
        // Of senders that came while this server was busy, the first may have given up: it makes room in the next turn.
        let most = if sh.life.awaits_image() { 1 } else { ACCEPTS_MAX };
        for _ in 0..room.min(most) {
            if !self.ready.readable() {
                return Next::Idle;
            }
            match self.accept() {
                Ok((socket, peer)) => {
                    if mem::take(&mut self.rests_until_ms) > 0 {
                        log!(sh.admission.complaints.level_of_end(Complaint::LostConnection), "{self}: accepts again");
                    }
                    sh.effects.push_back(Effect::Accepted(key, socket, peer, self.purpose));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.ready.clear_readable(),
                // The peer gave up before it was accepted, or a signal came: the next one may be fine.
                Err(error) if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                Err(error) => {
                    let what = format_args!("cannot accept: {error}; trying again every {REST_MS} ms");
                    self.warn_of(Complaint::LostConnection, &what, sh);
                    self.rests_until_ms = sh.now_ms.saturating_add(REST_MS);
                    sh.wheel.arm(self.rests_until_ms, key);
                    return Next::Idle;
                }
            }
        }
        Next::Again
    }

    fn accept(&self) -> io::Result<(Socket, Peer)> {
        match &self.bound {
            Bound::Tcp(socket) => {
                socket.accept().map(|(stream, addr)| (Socket::new(Stream::Tcp(stream)), Peer::Net(addr)))
            }
            Bound::Unix(_, socket) => {
                socket.accept().map(|(stream, _)| (Socket::new(Stream::Unix(stream)), Peer::Local))
            }
        }
    }

    /// Complains that a connection was not served.
    pub(super) fn warn_of(&self, of: Complaint, what: &dyn fmt::Display, sh: &mut Shared) {
        if sh.admission.complaints.may_log(of, sh.now_ms) {
            warn!("{self}: {what}");
        }
    }
}

impl fmt::Display for Listener {
    /// The address as a peer would write it: with the port that was picked, or the path, or @ and an abstract name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.bound {
            Bound::Tcp(socket) => match socket.local_addr() {
                Ok(addr) => addr.fmt(f),
                Err(error) => error.fmt(f),
            },
            Bound::Unix(Some(file), _) => file.path().display().fmt(f),
            Bound::Unix(None, socket) => match socket.local_addr() {
                Ok(addr) => match (addr.as_pathname(), addr.as_abstract_name()) {
                    (Some(path), _) => path.display().fmt(f),
                    (None, name) => write!(f, "@{}", String::from_utf8_lossy(name.unwrap_or_default())),
                },
                Err(error) => error.fmt(f),
            },
        }
    }
}
