//! What a session is told, what it wants next, and what it says of work that is done.

use super::request::{Refusal, Request};
use super::stopwatch::Took;
use crate::proto::error::{Errno, Violation};
use crate::proto::wire::RequestHead;
use std::io;
use std::ops::Range;

/// Why a conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client sent DISC.
    Disconnect,
    /// The client ended the negotiation.
    Abort,
    /// The client wants to be served, and there is nothing to serve yet.
    NotYet,
    /// The client closed its side between two requests.
    EndOfStream,
    /// The client broke the protocol; it has been answered where that is owed.
    Violation(Violation),
}

/// Which requests may pass now. The others are kept: they wait where they are, and so does what comes behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowed {
    /// All of them.
    Everything,
    /// Those that do not change the export.
    Reads,
}

/// What [`next_step`](super::ServerSession::next_step) found.
#[derive(Debug)]
pub enum Step {
    /// Work for the disk.
    Request(Request),
    /// A request was refused; its reply comes when its payload has been swallowed.
    Refused(Refusal),
    /// Nothing to do before more bytes are received.
    NeedBytes,
    /// Nothing to do before something of this session is completed or sent or, if memory has run out, some comes back.
    NeedRoom,
    /// The client has asked for an export that is not there, and is answered as that wants. The name, fit to be shown.
    UnknownExport(String),
    /// The client has named its session. Nothing more of it is looked at before [`go_on`](super::ServerSession::go_on) or
    /// [`refuse`](super::ServerSession::refuse).
    Named,
    /// The next request, or the payload that is being received, may not pass now.
    Kept,
}

/// What [`complete`](super::ServerSession::complete) has taken: one piece of the work of a request.
#[derive(Debug)]
pub struct Completed {
    /// The request.
    pub head: RequestHead,
    /// The bytes of the export that may have changed, also when it failed.
    pub touched: Option<Range<u64>>,
    /// How it ended.
    pub result: Result<(), Failed>,
    /// How long the request took, if that is what has answered it.
    pub took: Option<Took>,
}

/// Why a piece of work failed, and what that means to the client.
#[derive(Debug)]
pub struct Failed {
    /// What the disk says.
    pub error: io::Error,
    /// What the client is told.
    pub errno: Errno,
    /// Set when the client cannot be told, because a simple reply that says the opposite has begun: the connection has
    /// to be closed for this reason.
    pub violation: Option<Violation>,
}
