//! The two ways the protocol says no: an [`Errno`] goes into a reply, a [`Violation`] ends the connection.

use super::wire::{kind, option_reply};
use std::fmt;
use std::io::{self, ErrorKind};

/// The error values of the specification ("Error values"). No other value leaves this server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Operation not permitted.
    Perm = 1,
    /// Input/output error.
    Io = 5,
    /// Out of memory.
    NoMem = 12,
    /// Invalid argument.
    Inval = 22,
    /// No space left on the device.
    NoSpc = 28,
    /// Too much for one piece.
    Overflow = 75,
    /// Not supported.
    NotSup = 95,
    /// The server ends.
    Shutdown = 108,
}

impl Errno {
    /// What a client is told of an error of the disk. Only a request that asked for a fast zero may hear that something
    /// is not supported.
    pub fn of(error: &io::Error, fast_zero: bool) -> Self {
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Self::NoSpc,
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Self::Perm,
            ErrorKind::OutOfMemory => Self::NoMem,
            ErrorKind::Unsupported if fast_zero => Self::NotSup,
            _ => Self::Io,
        }
    }

    /// The number on the wire.
    pub fn to_wire(self) -> u32 {
        self as u32
    }

    /// The name of a number another server sent, for people.
    pub fn name(error: u32) -> &'static str {
        match error {
            1 => "EPERM",
            5 => "EIO",
            12 => "ENOMEM",
            22 => "EINVAL",
            28 => "ENOSPC",
            75 => "EOVERFLOW",
            95 => "ENOTSUP",
            108 => "ESHUTDOWN",
            _ => "an error the specification does not know",
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", Self::name(self.to_wire()), self.to_wire())
    }
}

/// What a peer did after which its bytes mean nothing any more. The connection must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Violation {
    /// A request does not start with the request magic.
    BadRequestMagic(u32),
    /// A reply does not start with the reply magic.
    BadReplyMagic(u32),
    /// A reply carries a cookie nobody waits for.
    UnknownCookie(u64),
    /// The first 16 bytes are no greeting.
    NotNbd(u64, u64),
    /// An export was named, and an oldstyle server has but one, without a name.
    NoExportNames,
    /// A reply to an option does not start with the magic of those.
    BadOptionReplyMagic(u64),
    /// A reply to an option that makes no sense where it came.
    UnexpectedOptionReply {
        /// The option it says it is for.
        option: u32,
        /// Its type.
        kind: u32,
        /// How many bytes of data it has.
        length: u32,
    },
    /// A reply to an option is longer than is skipped, in bytes.
    OptionReplyTooLong(u32),
    /// More than this many replies to options.
    TooManyOptionReplies(u32),
    /// The server does not give the export: the type of its reply.
    OptionRefused(u32),
    /// The server will serve when it has got its image.
    NotYet,
    /// A chunk of a reply that makes no sense, whatever it answers.
    SenselessChunk {
        /// Its type.
        kind: u16,
        /// How many bytes of payload it has.
        length: u32,
    },
    /// A chunk of a reply does not fit what was asked: the type of the request.
    UnexpectedChunk(u16),
    /// A chunk of a reply to a READ is about bytes that were not asked for, or have come already.
    ChunkRange {
        /// Where they are in the export.
        offset: u64,
        /// How many they are.
        length: u32,
    },
    /// The chunks of a reply leave more than this many gaps.
    TooManyGaps(usize),
    /// A reply ended before it said all that it had to: its cookie.
    IncompleteReply(u64),
    /// A simple reply where only chunks may come: its cookie.
    SimpleReply(u64),
    /// Client flags with a bit nobody knows.
    ClientFlags(u32),
    /// An option does not start with the option magic.
    BadOptionMagic(u64),
    /// An option is longer than is drained, in bytes.
    OptionTooLong(u32),
    /// More than this many options.
    TooManyOptions(u32),
    /// The client chose an export that is not there with `EXPORT_NAME`, which has no reply that says so.
    UnknownExport,
    /// The end of the stream came inside a message.
    Truncated,
    /// A read failed when its reply had begun; a simple reply cannot take that back.
    ReplyCutShort(Errno),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadRequestMagic(magic) => write!(f, "not an NBD request: it starts with {magic:#010x}"),
            Self::BadReplyMagic(magic) => write!(f, "not an NBD reply: it starts with {magic:#010x}"),
            Self::UnknownCookie(cookie) => write!(f, "a reply with a cookie nobody waits for: {cookie:#018x}"),
            Self::NotNbd(first, second) => {
                write!(f, "not an NBD greeting: it starts with {first:#018x} {second:#018x}")
            }
            Self::NoExportNames => write!(f, "an oldstyle NBD server, whose only export has no name"),
            Self::BadOptionReplyMagic(magic) => write!(f, "not an NBD option reply: it starts with {magic:#018x}"),
            Self::UnexpectedOptionReply { option, kind, length } => {
                write!(f, "a senseless reply to option {option}: type {kind:#x}, {length} bytes")
            }
            Self::OptionReplyTooLong(length) => write!(f, "a reply to an option of {length} bytes"),
            Self::TooManyOptionReplies(most) => write!(f, "more than {most} replies to options"),
            Self::OptionRefused(option_reply::ERR_UNKNOWN) => {
                write!(f, "there is no export of this name (ERR_UNKNOWN)")
            }
            Self::OptionRefused(kind) => {
                write!(f, "the server refused the export: {} ({kind:#x})", option_reply::error_name(*kind))
            }
            Self::NotYet => write!(f, "the server awaits an image and does not serve yet"),
            Self::SenselessChunk { kind, length } => {
                write!(f, "a senseless chunk of a reply: type {kind:#x}, {length} bytes")
            }
            Self::UnexpectedChunk(kind) => write!(f, "a chunk that does not answer {}", kind::name(*kind)),
            Self::ChunkRange { offset, length } => {
                write!(f, "a chunk of {length} bytes at offset {offset} that nobody asked for, or has come already")
            }
            Self::TooManyGaps(most) => write!(f, "the chunks of a reply leave more than {most} gaps"),
            Self::IncompleteReply(cookie) => write!(f, "an incomplete reply; its cookie is {cookie:#018x}"),
            Self::SimpleReply(cookie) => {
                write!(f, "a simple reply where chunks were agreed on; its cookie is {cookie:#018x}")
            }
            Self::ClientFlags(flags) => write!(f, "unknown client flags: {flags:#x}"),
            Self::BadOptionMagic(magic) => write!(f, "not an NBD option: it starts with {magic:#018x}"),
            Self::OptionTooLong(length) => write!(f, "an option of {length} bytes"),
            Self::TooManyOptions(most) => write!(f, "more than {most} options"),
            Self::UnknownExport => {
                write!(f, "asked for an export that is not there; the default one has an empty name")
            }
            Self::Truncated => write!(f, "hung up in the middle of a message"),
            Self::ReplyCutShort(errno) => write!(f, "a read failed with {errno} in the middle of its reply"),
        }
    }
}

impl std::error::Error for Violation {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_disk_become_those_of_the_specification() {
        for (kind, errno) in [
            (ErrorKind::StorageFull, Errno::NoSpc),
            (ErrorKind::QuotaExceeded, Errno::NoSpc),
            (ErrorKind::FileTooLarge, Errno::NoSpc),
            (ErrorKind::PermissionDenied, Errno::Perm),
            (ErrorKind::ReadOnlyFilesystem, Errno::Perm),
            (ErrorKind::OutOfMemory, Errno::NoMem),
            (ErrorKind::UnexpectedEof, Errno::Io),
        ] {
            assert_eq!((Errno::of(&kind.into(), false), Errno::of(&kind.into(), true)), (errno, errno), "{kind}");
        }
        let unsupported = ErrorKind::Unsupported.into();
        assert_eq!(Errno::of(&unsupported, false), Errno::Io, "only who asked for a fast zero knows ENOTSUP");
        assert_eq!(Errno::of(&unsupported, true), Errno::NotSup);
    }
}
