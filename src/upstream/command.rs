//! What a server can be asked, what it may be like, and how it is dealt with.

use crate::buffer::Buffer;
use std::fmt;
use std::rc::Rc;

/// What is kept of what the server has answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replay {
    /// All that is not durable.
    Dirty,
    /// Nothing, but what is not answered is sent again.
    Unanswered,
    /// Nothing: clients are cut with the connection.
    Nothing,
}

/// What a supervisor may want to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// How many times FLUSH was asked that no client has asked for.
    pub own_flushes: u64,
    /// Bytes that were written again, zeroes included.
    pub replayed_bytes: u64,
    /// How many READs were sent that no client has asked for.
    pub reads_ahead: u64,
}

/// What the server can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::struct_excessive_bools, reason = "each is an ability of its own")]
pub struct Abilities {
    /// The length of the export, in bytes.
    pub size: u64,
    /// FLUSH. Without it nothing is ever known to be durable.
    pub flush: bool,
    /// FUA.
    pub fua: bool,
    /// TRIM.
    pub trim: bool,
    /// `WRITE_ZEROES`.
    pub zero: bool,
    /// `WRITE_ZEROES` that fails rather than be slow.
    pub fast_zero: bool,
    /// CACHE.
    pub cache: bool,
    /// `BLOCK_STATUS`.
    pub map: bool,
    /// The longest range of a command, in bytes.
    pub length_max: u32,
}

/// What a command asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// READ.
    Read,
    /// WRITE; the payload comes with the command.
    Write,
    /// `WRITE_ZEROES`.
    Zero {
        /// With `NO_HOLE`.
        no_hole: bool,
        /// With `FAST_ZERO`.
        fast: bool,
    },
    /// TRIM.
    Trim,
    /// FLUSH.
    Flush,
    /// CACHE.
    Cache,
    /// `BLOCK_STATUS`.
    Map {
        /// With `REQ_ONE`.
        one: bool,
    },
}

/// What a command is for; it comes back with the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked(pub(super) For);

/// That, for this side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum For {
    /// The task with this number.
    Task(u64),
    /// What is dirty.
    Replay,
    /// This side's own FLUSH, sent after the answer of this number.
    OwnFlush(u64),
    /// What clients may read next.
    Ahead,
}

/// A command for the server.
#[derive(Debug)]
pub struct Command {
    /// Names it.
    pub asked: Asked,
    /// What it asks for.
    pub what: What,
    /// With FUA.
    pub fua: bool,
    /// Where its range begins.
    pub offset: u64,
    /// How long its range is, in bytes.
    pub length: u32,
    /// What a WRITE brings. It has to be dropped when it has been sent, and with the connection.
    pub payload: Option<Rc<Buffer>>,
}

/// Why the connection is of no use any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The server ends and says so; it has not done what it was asked.
    Leaves,
    /// What is dirty cannot be written again: the error value.
    Replay(u32),
    /// The server has answered what it cannot have read.
    Early,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leaves => f.write_str("the server says that it ends"),
            Self::Replay(error) => {
                write!(f, "the server refuses to write again what it has forgotten: error {error}")
            }
            Self::Early => f.write_str("the server answered what it cannot have read yet"),
        }
    }
}
