//! One connection of a migration to its destination: what is asked, what waits to be sent, and how it can fail.

use super::shared::Shared;
use super::socket::{Received, Socket};
use crate::buffer::Buffer;
use crate::migrate::{Abilities, Plan};
use crate::proto::client::ClientSession;
use crate::proto::error::{Errno, Violation};
use crate::proto::outbox::PIECES_MAX;
use crate::proto::wire::{kind, option_reply};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;

/// Why an attempt is over.
#[derive(Debug)]
pub enum Failure {
    /// There was no connection.
    Connect(String),
    /// There was no greeting in time.
    NoGreeting,
    /// The destination is not as large as the image.
    Size {
        /// What its greeting says, in bytes.
        remote: u64,
        /// The image, in bytes.
        local: u64,
    },
    /// The destination has no export of the name that was asked for.
    NoExport(Violation),
    /// The export at the destination cannot be written.
    ReadOnly,
    /// The destination closed the connection; what that means, as [`ClientSession::explain_end`] says it.
    Closed(&'static str),
    /// The destination is this server.
    Itself,
    /// Anything else, in words.
    Broken(String),
}

impl Failure {
    /// What the one who asked for the migration is told when this keeps it from starting.
    pub fn answer(&self) -> &'static str {
        match self {
            Self::Connect(_) => "Mirror failed to connect",
            Self::NoGreeting => "Remote server failed to respond",
            Self::Size { .. } => "Remote size does not match local size",
            Self::NoExport(_) => "Remote export does not exist",
            Self::ReadOnly => "Remote export is read-only",
            Self::Closed(_) | Self::Broken(_) => "Mirror was rejected",
            Self::Itself => "Mirror was rejected: the destination is this server itself",
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
            Self::Broken(why) => f.write_str(why),
        }
    }
}

/// What an unanswered request was for.
#[derive(Debug)]
pub enum Asked {
    Range(Range<u64>),
    Flush,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Connecting,
    Greeting,
    Copying,
    Leaving,
}

/// A connection to the destination: one attempt.
#[derive(Debug)]
pub struct Link {
    pub(super) stage: Stage,
    pub(super) socket: Socket,
    pub(super) session: ClientSession<Asked>,
    pub(super) can: Abilities,
    /// Memory of data that the disk fills, in bytes.
    pub(super) reading: usize,
}

impl Link {
    /// A connection that is being made, to the export of this name.
    pub fn new(socket: Socket, export: String) -> Self {
        Self {
            stage: Stage::Connecting,
            socket,
            session: ClientSession::new(export),
            can: Abilities::default(),
            reading: 0,
        }
    }

    /// Memory of data that the disk fills or that waits to be sent, in bytes.
    pub fn buffered(&self) -> usize {
        self.reading + self.session.buffered()
    }

    /// True when something that moves says that the destination is alive. A FLUSH that everything else has overtaken is
    /// waited for by itself.
    pub fn counts_progress(&self) -> bool {
        !matches!(self.session.oldest(), Some(Asked::Flush))
    }

    /// Queues a request without a payload.
    pub fn send_request(&mut self, kind: u16, asked: Asked) {
        let (offset, length) = match &asked {
            Asked::Range(range) => (range.start, u32::try_from(range.end - range.start).unwrap_or(u32::MAX)),
            Asked::Flush => (0, 0),
        };
        self.session.command(kind, 0, offset, length, asked);
    }

    /// Queues a WRITE of what is filled in `buffer`.
    pub fn send_data(&mut self, range: Range<u64>, buffer: Buffer) {
        self.send_request(kind::WRITE, Asked::Range(range));
        self.session.push_payload(buffer);
    }

    /// Sends once, as much as the socket takes; says how much that was.
    pub fn send(&mut self, sh: &mut Shared) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let pieces = self.session.to_send(&mut slices);
        let slices = slices.get(..pieces).unwrap_or_default();
        let sent = self.socket.send(slices)?;
        self.session.sent(sent, &mut sh.pool);
        Ok(sent)
    }

    /// An error when the destination has closed, or when something is on its way although nothing should be.
    pub fn check_quiet(&mut self) -> Result<(), Failure> {
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

impl Asked {
    /// Takes the reply.
    pub fn answered(&self, error: u32, plan: &mut Plan, now_ms: u64) -> Result<(), Failure> {
        match self {
            _ if error != 0 => {
                let why = format!("the destination answered {self} with {} ({error})", Errno::name(error));
                return Err(Failure::Broken(why));
            }
            Self::Range(range) => plan.acked(range, now_ms),
            Self::Flush => plan.flushed(now_ms),
        }
        Ok(())
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Range(range) => write!(f, "a write of {} bytes at offset {}", range.end - range.start, range.start),
            Self::Flush => f.write_str("FLUSH"),
        }
    }
}
