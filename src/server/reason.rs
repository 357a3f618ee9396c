//! What a slot wants next; why it is closed, and the words for it.

use crate::proto::error::Violation;
use crate::proto::server::End;
use std::fmt;
use std::io;

/// What a slot wants next.
#[derive(Debug)]
pub(super) enum Next {
    /// Nothing before an event, a completion or a timer.
    Idle,
    /// Another turn: it used its budget and could go on.
    Again,
    /// Another turn when the disk has done something.
    WaitDisk,
    /// To be closed.
    Close(Reason),
}

/// Why a slot is closed.
#[derive(Debug)]
pub(super) enum Reason {
    /// The conversation came to its end.
    End(End),
    /// The peer broke the protocol in a way that is owed no answer.
    Violation(Violation),
    /// The socket failed.
    Socket(io::Error),
    /// A request took longer than the killswitch allows.
    Killswitch {
        /// How long, in milliseconds.
        age_ms: u64,
    },
    /// There was no memory for its request for too long.
    NoMemory,
    /// A negotiation took too long.
    Handshake,
    /// It brings back what this server's own migration sends.
    CameBack,
    /// It does not acknowledge what is sent to it.
    Vanished {
        /// For how long, in milliseconds.
        silent_ms: u64,
    },
    /// A sender wrote nothing for too long.
    Silent,
    /// The access control list has changed.
    AclChanged,
    /// Its session goes on over a newer connection.
    WentOn,
    /// A control connection took too long.
    Deadline,
    /// A control connection has its answer.
    Answered,
    /// A control connection's peer does not wait for the answer.
    HungUp,
    /// The image has arrived and is durable.
    Received,
    /// The migration is complete.
    Migrated,
    /// The migration did not start; the answer to who asked for it.
    NotStarted(String),
    /// Somebody asked for the migration to end.
    Stopped,
    /// The server that has the image is away.
    UpstreamAway,
}

impl Reason {
    /// True when nobody did anything wrong.
    pub(super) fn is_orderly(&self) -> bool {
        matches!(
            self,
            Self::End(End::Disconnect | End::Abort | End::EndOfStream | End::NotYet)
                | Self::AclChanged
                | Self::WentOn
                | Self::Received
        )
    }

    /// True when the peer went, or seems to have gone.
    pub(super) fn is_leaving(&self) -> bool {
        matches!(self, Self::Socket(_) | Self::HungUp | Self::Vanished { .. })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End(End::Disconnect) => f.write_str("peer sent DISC"),
            Self::End(End::Abort) => f.write_str("peer ended the negotiation"),
            Self::End(End::NotYet) => f.write_str("it wants to be served, and there is no image yet"),
            Self::End(End::EndOfStream) => f.write_str("peer hung up between requests"),
            Self::End(End::Violation(violation)) | Self::Violation(violation) => violation.fmt(f),
            Self::Socket(error) => error.fmt(f),
            Self::Killswitch { age_ms } => {
                write!(f, "killswitch: a request was not done after {}.{:03} s", age_ms / 1000, age_ms % 1000)
            }
            Self::NoMemory => f.write_str("memory has run out, and its request has waited for too long"),
            Self::Handshake => f.write_str("the negotiation took too long"),
            Self::CameBack => f.write_str("it brings back what the migration of this server sends"),
            Self::Vanished { silent_ms } => {
                write!(f, "it is gone: nothing was acknowledged for {} s", silent_ms / 1000)
            }
            Self::Silent => f.write_str("it was silent and kept other senders out"),
            Self::AclChanged => f.write_str("the access control list does not allow it any more"),
            Self::WentOn => f.write_str("its session goes on over a new connection"),
            Self::Deadline => f.write_str("it took too long"),
            Self::Answered => f.write_str("answered"),
            Self::HungUp => f.write_str("it does not wait for its answer"),
            Self::Received => f.write_str("its image has arrived and is durable"),
            Self::Migrated => f.write_str("migrated"),
            Self::NotStarted(why) => f.write_str(why),
            Self::Stopped => f.write_str("migration stopped"),
            Self::UpstreamAway => f.write_str("the server behind this proxy is away"),
        }
    }
}
