//! The bytes of the protocol: constants, and fixed arrays to structs and back. Nothing here decides anything.
//!
//! Specification: doc/proto.md, "Oldstyle negotiation", "Newstyle negotiation", "Request message", "Simple reply message",
//! "Structured reply chunk message", "Values".

/// The first eight bytes of every NBD server.
pub const NBDMAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// The second eight bytes of an oldstyle server.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// The second eight bytes of a newstyle server, and the start of every option.
pub const IHAVEOPT: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Starts every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Starts every request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Starts every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Starts every chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Length of the newstyle greeting, in bytes.
pub const NEWSTYLE_GREETING_LEN: usize = 18;
/// Zeroes behind the reply to `EXPORT_NAME`, unless they were agreed away, in bytes.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// Length of an option without its data, in bytes.
pub const OPTION_HEAD_LEN: usize = 16;
/// Length of an option reply without its data, in bytes.
pub const OPTION_REPLY_HEAD_LEN: usize = 20;
/// Length of the oldstyle greeting, in bytes, its 124 zeroes included.
pub const GREETING_LEN: usize = 152;
/// Length of a request without its payload, in bytes.
pub const REQUEST_LEN: usize = 28;
/// Length of a simple reply without its payload, in bytes.
pub const SIMPLE_REPLY_LEN: usize = 16;
/// Length of a chunk of a structured reply without its payload, in bytes.
pub const CHUNK_LEN: usize = 20;

/// The longest name or query, in bytes ("Conventions").
pub const STRING_MAX: usize = 4096;

/// Handshake flags and client flags ("Handshake flags", "Client flags"): both sides give the same bits.
pub mod handshake_flag {
    /// Fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zeroes behind the reply to `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Options ("Option types").
pub mod option {
    /// Choose an export and enter transmission; there is no way to say no.
    pub const EXPORT_NAME: u32 = 1;
    /// Leave.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Encrypt.
    pub const STARTTLS: u32 = 5;
    /// Say what an export is.
    pub const INFO: u32 = 6;
    /// Say what an export is and enter transmission.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options ("Option reply types").
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export.
    pub const SERVER: u32 = 2;
    /// A piece of information.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR: u32 = 1 << 31;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// The server does not allow it.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// The option is malformed, or not now.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The option is too long.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;

    /// The name of an error another server sent, for people.
    pub fn error_name(kind: u32) -> &'static str {
        match kind & !ERROR {
            1 => "ERR_UNSUP",
            2 => "ERR_POLICY",
            3 => "ERR_INVALID",
            4 => "ERR_PLATFORM",
            5 => "ERR_TLS_REQD",
            6 => "ERR_UNKNOWN",
            7 => "ERR_SHUTDOWN",
            8 => "ERR_BLOCK_SIZE_REQD",
            9 => "ERR_TOO_BIG",
            10 => "ERR_EXT_HEADER_REQD",
            _ => "an error the specification does not know",
        }
    }
}

/// Information about an export ("`NBD_INFO_EXPORT`" and its like).
pub mod info {
    /// Its size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Its block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Chunks of structured replies ("Structured reply types").
pub mod chunk {
    /// The flag of the last one.
    pub const DONE: u16 = 1;
    /// Nothing.
    pub const NONE: u16 = 0;
    /// Data at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeroes at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents.
    pub const BLOCK_STATUS: u16 = 5;
    /// The bit of every type that is an error.
    pub const IS_ERROR: u16 = 1 << 15;
    /// An error.
    pub const ERROR: u16 = IS_ERROR + 1;
    /// An error at an offset.
    pub const ERROR_OFFSET: u16 = IS_ERROR + 2;
}

/// Flags of an extent in `base:allocation` ("`base:allocation` metadata context").
pub mod extent {
    /// Not allocated, and it reads as zeroes.
    pub const HOLE_ZERO: u32 = 1 | 2;
}

/// Transmission flags: what an export offers ("Transmission flags").
pub mod transmission {
    /// Always set: the other bits mean something.
    pub const HAS_FLAGS: u16 = 1;
    /// Nothing can be written.
    pub const READ_ONLY: u16 = 2;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 4;
    /// The FUA command flag is understood.
    pub const SEND_FUA: u16 = 8;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 32;
    /// `WRITE_ZEROES` is understood.
    pub const SEND_WRITE_ZEROES: u16 = 64;
    /// The DF command flag is understood.
    pub const SEND_DF: u16 = 128;
    /// A flush on one connection covers all connections.
    pub const CAN_MULTI_CONN: u16 = 256;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1024;
    /// The `FAST_ZERO` command flag is understood.
    pub const SEND_FAST_ZERO: u16 = 2048;
}

/// Command flags of a request ("Command flags").
pub mod command {
    /// Reply only when the data is on stable storage.
    pub const FUA: u16 = 1;
    /// `WRITE_ZEROES` must leave the range allocated.
    pub const NO_HOLE: u16 = 2;
    /// A READ is answered in one piece.
    pub const DF: u16 = 4;
    /// `BLOCK_STATUS` is answered with one extent.
    pub const REQ_ONE: u16 = 8;
    /// `WRITE_ZEROES` must fail rather than be slow.
    pub const FAST_ZERO: u16 = 16;
}

/// Request types ("Request types").
pub mod kind {
    /// Read a range.
    pub const READ: u16 = 0;
    /// Write a range; the payload follows.
    pub const WRITE: u16 = 1;
    /// End the connection; no reply.
    pub const DISC: u16 = 2;
    /// Put everything written on stable storage.
    pub const FLUSH: u16 = 3;
    /// The range is not needed any more.
    pub const TRIM: u16 = 4;
    /// The range will be read soon.
    pub const CACHE: u16 = 5;
    /// Zero a range without a payload.
    pub const WRITE_ZEROES: u16 = 6;
    /// Say what is allocated.
    pub const BLOCK_STATUS: u16 = 7;

    /// The name of a request type, for people.
    pub fn name(kind: u16) -> &'static str {
        match kind {
            READ => "READ",
            WRITE => "WRITE",
            DISC => "DISC",
            FLUSH => "FLUSH",
            TRIM => "TRIM",
            CACHE => "CACHE",
            WRITE_ZEROES => "WRITE_ZEROES",
            BLOCK_STATUS => "BLOCK_STATUS",
            _ => "unknown request",
        }
    }
}

/// Reads big-endian numbers off the front of a slice; `None` once it is used up.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
}

/// Writes big-endian numbers one after the other into an array that starts as zeroes.
#[derive(Debug)]
pub struct Encoder<const N: usize> {
    pub(super) bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Encoder<N> {
    pub(super) fn new() -> Self {
        Self { bytes: [0; N], at: 0 }
    }

    /// What was put so far.
    pub fn filled(&self) -> &[u8] {
        self.bytes.get(..self.at).unwrap_or_default()
    }

    pub(super) fn put(mut self, field: &[u8]) -> Self {
        let end = self.at + field.len();
        if let Some(to) = self.bytes.get_mut(self.at..end) {
            to.copy_from_slice(field);
        }
        debug_assert!(end <= N, "the message is longer than its array");
        self.at = end;
        self
    }
}

/// The oldstyle greeting: all a server says before the first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// Size of the export in bytes.
    pub size: u64,
    /// Transmission flags; oldstyle has room for 32 bits.
    pub flags: u32,
}

impl Greeting {
    /// The 152 bytes of it.
    pub fn encode(&self) -> [u8; GREETING_LEN] {
        Encoder::new()
            .put(&NBDMAGIC.to_be_bytes())
            .put(&OLDSTYLE_MAGIC.to_be_bytes())
            .put(&self.size.to_be_bytes())
            .put(&self.flags.to_be_bytes())
            .bytes
    }
}

/// A request without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHead {
    /// Command flags.
    pub flags: u16,
    /// Request type, as it came: it may be unknown.
    pub kind: u16,
    /// What the reply repeats; opaque.
    pub cookie: u64,
    /// Where in the export, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub length: u32,
}

impl RequestHead {
    /// The 28 bytes of it.
    pub fn encode(&self) -> [u8; REQUEST_LEN] {
        Encoder::new()
            .put(&REQUEST_MAGIC.to_be_bytes())
            .put(&self.flags.to_be_bytes())
            .put(&self.kind.to_be_bytes())
            .put(&self.cookie.to_be_bytes())
            .put(&self.offset.to_be_bytes())
            .put(&self.length.to_be_bytes())
            .bytes
    }

    /// Reads the 28 bytes: the magic as it came, and the rest.
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> (u32, Self) {
        let mut fields = Fields(bytes);
        let magic = fields.u32().unwrap_or(0);
        let head = Self {
            flags: fields.u16().unwrap_or(0),
            kind: fields.u16().unwrap_or(0),
            cookie: fields.u64().unwrap_or(0),
            offset: fields.u64().unwrap_or(0),
            length: fields.u32().unwrap_or(0),
        };
        (magic, head)
    }

    /// True for a request after which the export may hold other bytes than before.
    pub fn changes_export(&self) -> bool {
        matches!(self.kind, kind::WRITE | kind::WRITE_ZEROES | kind::TRIM)
    }

    /// True for a request that says what bytes of the export are from now on.
    pub fn writes(&self) -> bool {
        matches!(self.kind, kind::WRITE | kind::WRITE_ZEROES) && self.length > 0
    }

    /// True for a request that may be answered with ENOTSUP.
    pub fn asks_for_fast_zero(&self) -> bool {
        self.kind == kind::WRITE_ZEROES && self.flags & command::FAST_ZERO != 0
    }

    /// The first byte behind the range, or `None` when that does not fit 64 bits.
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(u64::from(self.length))
    }
}

impl std::fmt::Display for RequestHead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (type {}, flags {:#x}) ", kind::name(self.kind), self.kind, self.flags)?;
        write!(f, "of {} bytes at offset {}", self.length, self.offset)
    }
}

/// A chunk of a structured reply without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHead {
    /// [`chunk::DONE`] on the last one.
    pub flags: u16,
    /// What it holds.
    pub kind: u16,
    /// The cookie of the request.
    pub cookie: u64,
    /// How many bytes follow.
    pub length: u32,
}

impl ChunkHead {
    /// The 20 bytes of it, and room for what belongs to the head of its payload.
    pub fn encode<const N: usize>(&self) -> Encoder<N> {
        Encoder::new()
            .put(&STRUCTURED_REPLY_MAGIC.to_be_bytes())
            .put(&self.flags.to_be_bytes())
            .put(&self.kind.to_be_bytes())
            .put(&self.cookie.to_be_bytes())
            .put(&self.length.to_be_bytes())
    }

    /// Reads what follows the magic.
    pub fn parse(fields: &mut Fields) -> Option<Self> {
        Some(Self { flags: fields.u16()?, kind: fields.u16()?, cookie: fields.u64()?, length: fields.u32()? })
    }
}

/// A simple reply without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0, or why the request failed.
    pub error: u32,
    /// The cookie of the request.
    pub cookie: u64,
}

impl SimpleReply {
    /// The 16 bytes of it.
    pub fn encode(&self) -> [u8; SIMPLE_REPLY_LEN] {
        Encoder::new()
            .put(&SIMPLE_REPLY_MAGIC.to_be_bytes())
            .put(&self.error.to_be_bytes())
            .put(&self.cookie.to_be_bytes())
            .bytes
    }

    /// Reads the 16 bytes: the magic as it came, and the rest.
    pub fn parse(bytes: &[u8; SIMPLE_REPLY_LEN]) -> (u32, Self) {
        let mut fields = Fields(bytes);
        let magic = fields.u32().unwrap_or(0);
        (magic, Self { error: fields.u32().unwrap_or(0), cookie: fields.u64().unwrap_or(0) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_is_the_predecessors() {
        let bytes = Greeting { size: 0x0102_0304_0506_0708, flags: 0x6d }.encode();
        assert_eq!(&bytes[..8], b"NBDMAGIC");
        assert_eq!(bytes[8..16], [0x00, 0x00, 0x42, 0x02, 0x81, 0x86, 0x12, 0x53]);
        assert_eq!(bytes[16..24], [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(bytes[24..28], [0, 0, 0, 0x6d]);
        assert!(bytes[28..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_request_is_28_bytes_in_the_order_of_the_specification() {
        let head = RequestHead { flags: 0x0102, kind: 0x0304, cookie: 0x1122_3344_5566_7788, offset: 9, length: 10 };
        let bytes = head.encode();
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 1, 2, 3, 4]);
        assert_eq!(bytes[8..16], [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88]);
        assert_eq!(bytes[16..], [0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 10]);
        assert_eq!(RequestHead::parse(&bytes), (REQUEST_MAGIC, head));
    }

    #[test]
    fn a_range_that_wraps_has_no_end() {
        let head = RequestHead { flags: 0, kind: 1, cookie: 0, offset: u64::MAX - 4095, length: 4096 };
        assert_eq!(head.end(), None);
        assert_eq!(RequestHead { length: 4095, ..head }.end(), Some(u64::MAX));
    }

    #[test]
    fn a_simple_reply_goes_both_ways() {
        let reply = SimpleReply { error: 28, cookie: 7 };
        let bytes = reply.encode();
        assert_eq!(bytes, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 0, 0, 0, 0, 0, 0, 0, 7]);
        assert_eq!(SimpleReply::parse(&bytes), (SIMPLE_REPLY_MAGIC, reply));
    }
}
