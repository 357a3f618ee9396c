//! An outgoing connection to an NBD server: how it is made, how long that may take, and how it can fail. What is done over
//! it is its owner's business.
//!
//! ```text
//!  Connecting ─> Greeting ─> Open
//! ```

use super::config::Destination;
use super::shared::Shared;
use super::socket::{Received, Socket, Stream};
use crate::buffer::Pool;
use crate::endpoint::{check_socket_path, Endpoint};
use crate::event::slots::Key;
use crate::proto::client::{ClientSession, Event};
use crate::proto::error::Violation;
use crate::proto::outbox::PIECES_MAX;
use crate::proto::wire::option_reply;
use crate::sys;
use crate::sys::net::Keepalive;
use mio::net::{TcpStream, UnixStream};
use std::fmt;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};

/// How long a connection may take to be made, in milliseconds.
const CONNECT_MS: u64 = 15_000;
/// How long the server may take to greet, in milliseconds.
const GREETING_MS: u64 = 5_000;

/// Why a connection cannot be used.
#[derive(Debug)]
pub(super) enum Failure {
    /// No connection was made.
    Connect(String),
    /// The greeting did not come in time.
    NoGreeting,
    /// The export is not as large as it has to be.
    Size {
        /// What its greeting says, in bytes.
        remote: u64,
        /// What is needed, in bytes.
        local: u64,
    },
    /// There is no export of the name that was asked for.
    NoExport(Violation),
    /// The export cannot be written.
    ReadOnly,
    /// The server closed the connection; what that means, as [`ClientSession::explain_end`] says it.
    Closed(&'static str),
    /// The server is this one.
    Itself,
    /// The server is not what it has to be, as a sentence about it.
    Unfit(String),
    /// What else went wrong, as a sentence.
    Broken(String),
}

impl Failure {
    /// What a `mirror` that did not start is told. Scripts know it by its first words.
    pub(super) fn answer(&self) -> String {
        match self {
            Self::Connect(why) => format!("Mirror failed to connect: {why}"),
            Self::NoGreeting => "Remote server failed to respond".into(),
            Self::Size { .. } => "Remote size does not match local size".into(),
            Self::NoExport(_) | Self::ReadOnly | Self::Closed(_) | Self::Broken(_) | Self::Unfit(_) | Self::Itself => {
                format!("Mirror was rejected: {self}")
            }
        }
    }
}

impl From<Violation> for Failure {
    fn from(violation: Violation) -> Self {
        match violation {
            Violation::NoExportNames | Violation::OptionRefused(option_reply::ERR_UNKNOWN) => Self::NoExport(violation),
            _ => Self::Broken(violation.to_string()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(why) => write!(f, "cannot connect: {why}"),
            Self::NoGreeting => f.write_str("the destination did not greet in time"),
            Self::Size { remote, local } => write!(f, "the destination has {remote} bytes, the image {local}"),
            Self::NoExport(why) => write!(f, "the destination: {why}"),
            Self::ReadOnly => f.write_str("the export at the destination is read-only"),
            Self::Closed(why) => write!(f, "the destination {why}"),
            Self::Itself => f.write_str("the destination is this server itself"),
            Self::Broken(why) | Self::Unfit(why) => f.write_str(why),
        }
    }
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Connecting,
    Greeting,
    Open,
}

/// A connection, from the first attempt to reach the server on. Commands carry a note of the owner's.
#[derive(Debug)]
pub(super) struct Dial<T> {
    stage: Stage,
    socket: Socket,
    /// The conversation; commands may be given once its export has been named.
    pub session: ClientSession<T>,
    /// When the current stage counts as failed.
    deadline_ms: u64,
}

impl<T> Dial<T> {
    /// Begins to connect, as the socket of the slot `key`, for this conversation.
    pub(super) fn start(
        destination: &Destination,
        keepalive: Keepalive,
        session: ClientSession<T>,
        key: Key,
        sh: &Shared,
    ) -> Result<Self, Failure> {
        let failed = |error: io::Error| match destination.bind {
            Some(bind) if error.kind() == ErrorKind::AddrNotAvailable => {
                Failure::Connect(format!("{bind} is no address of this machine to connect from: {error}"))
            }
            _ => Failure::Connect(error.to_string()),
        };
        let stream = match &destination.to {
            Endpoint::Tcp(to) => {
                Stream::Tcp(TcpStream::from_std(sys::net::connect_tcp(destination.bind, *to).map_err(failed)?))
            }
            Endpoint::Unix(path) => {
                check_socket_path(path).map_err(failed)?;
                Stream::Unix(UnixStream::connect(path).map_err(failed)?)
            }
        };
        let mut socket = Socket::new(stream);
        socket.set_options(keepalive).map_err(failed)?;
        socket.register(&sh.registry, key.token()).map_err(failed)?;
        Ok(Self { stage: Stage::Connecting, socket, session, deadline_ms: sh.now_ms.saturating_add(CONNECT_MS) })
    }

    /// True once the server has greeted.
    pub(super) fn is_open(&self) -> bool {
        self.stage == Stage::Open
    }

    /// The socket.
    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Notes what an event says of the socket.
    pub(super) fn note(&mut self, event: &mio::event::Event) {
        self.socket.note(event);
    }

    /// When the connection has failed unless it is open by then.
    pub(super) fn deadline_ms(&self) -> Option<u64> {
        (self.stage != Stage::Open).then_some(self.deadline_ms)
    }

    /// Fails when the deadline has passed.
    pub(super) fn check_deadline(&self, now_ms: u64) -> Result<(), Failure> {
        match self.stage {
            Stage::Connecting if now_ms >= self.deadline_ms => {
                Err(Failure::Connect(format!("no answer in {CONNECT_MS} ms")))
            }
            Stage::Greeting if now_ms >= self.deadline_ms => Err(Failure::NoGreeting),
            Stage::Connecting | Stage::Greeting | Stage::Open => Ok(()),
        }
    }

    /// Learns whether the connection was made, or receives once. False: nothing has come yet, and an event will say when.
    pub(super) fn receive(&mut self, now_ms: u64) -> Result<bool, Failure> {
        if self.stage == Stage::Connecting {
            if !self.socket.writable() {
                return Ok(false);
            }
            self.socket.check_connected().map_err(|error| Failure::Connect(error.to_string()))?;
            // One deadline for all of the greeting: one byte at a time does not put it off.
            (self.stage, self.deadline_ms) = (Stage::Greeting, now_ms.saturating_add(GREETING_MS));
            return Ok(true);
        }
        if !self.socket.readable() {
            return Ok(false);
        }
        match self.socket.receive(&mut [IoSliceMut::new(self.session.recv_space())]) {
            Ok(Received::Bytes(n)) => {
                self.session.received(n);
                Ok(true)
            }
            Ok(Received::Nothing) => Ok(false),
            Ok(Received::End) => Err(Failure::Closed(self.session.explain_end())),
            Err(error) => Err(Failure::Broken(format!("cannot receive: {error}"))),
        }
    }

    /// What the server said next; `None` when more has to be received.
    pub(super) fn next_event(&mut self) -> Result<Option<Event<'_, T>>, Failure> {
        let event = self.session.next_event()?;
        if let Some(Event::Export(_)) = event {
            self.stage = Stage::Open;
        }
        Ok(event)
    }

    /// True when something waits to be sent and the socket may take it.
    pub(super) fn can_send(&self) -> bool {
        self.stage != Stage::Connecting && self.session.wants_send() && self.socket.writable()
    }

    /// Sends once, as much as the socket takes; says how much that was.
    pub(super) fn send(&mut self, pool: &mut Pool) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let pieces = self.session.to_send(&mut slices);
        let sent = self.socket.send(slices.get(..pieces).unwrap_or_default())?;
        self.session.sent(sent, pool);
        Ok(sent)
    }

    /// True when `socket` is the other end of this connection: both addresses are the same, the other way round.
    pub(super) fn is_other_end(&self, socket: &Socket) -> bool {
        let own = self.socket.ends();
        own.is_some() && own == socket.ends().map(|(near, far)| (far, near))
    }

    /// Fails when the server has closed, or when something is on its way although nothing should be.
    pub(super) fn check_quiet(&mut self) -> Result<(), Failure> {
        if !self.session.is_quiet() {
            return Err(Failure::Broken("the destination answered what it cannot have read yet".into()));
        }
        match self.socket.receive(&mut [IoSliceMut::new(&mut [0])]) {
            Ok(Received::Nothing) => Ok(()),
            Ok(Received::End) => Err(Failure::Closed(self.session.explain_end())),
            Ok(Received::Bytes(_)) => Err(Failure::Broken("the destination says something nobody asked for".into())),
            Err(error) => Err(Failure::Broken(format!("cannot receive: {error}"))),
        }
    }
}
