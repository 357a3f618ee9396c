//! What a client may ask for: the export, the check of a request against it, and the work a good request means.
//!
//! Specification: "Request types", "Command flags", "Error values", "Transmission flags".

use super::error::Errno;
use super::wire::{command, kind, transmission, RequestHead};
use crate::buffer::Buffer;

/// What is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
}

impl Export {
    /// An export of `size` bytes with everything this server can do.
    pub fn new(size: u64) -> Self {
        use transmission::{CAN_MULTI_CONN, HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES};
        Self { size, flags: HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | CAN_MULTI_CONN }
    }
}

/// A piece of work for the disk. A long request becomes several, one after the other, with the same tag.
#[derive(Debug)]
pub struct Request {
    /// Names the request within its session until it is completed as often as it was handed out.
    pub tag: u32,
    /// What to do.
    pub action: Action,
}

/// What a request asks for; the range is inside the export. Offsets and lengths are in bytes.
#[derive(Debug)]
pub enum Action {
    /// Fill the empty buffer with `length` bytes from `offset`.
    Read {
        /// Where it begins.
        offset: u64,
        /// How many bytes.
        length: usize,
        /// What to fill.
        buffer: Buffer,
    },
    /// Write what the buffer holds. With `fua` it and every earlier piece of the request must be durable.
    Write {
        /// Where it begins.
        offset: u64,
        /// What to write.
        payload: Buffer,
        /// Reply only when it is durable.
        fua: bool,
    },
    /// Zero the range; with `no_hole` it must stay allocated.
    Zero {
        /// Where it begins.
        offset: u64,
        /// How many bytes.
        length: u64,
        /// Reply only when it is durable.
        fua: bool,
        /// Make no hole.
        no_hole: bool,
    },
    /// The range is not needed any more.
    Trim {
        /// Where it begins.
        offset: u64,
        /// How many bytes.
        length: u64,
        /// Reply only when it is durable.
        fua: bool,
    },
    /// Make everything durable that was answered before.
    Flush,
}

/// A request that is answered with an error without asking the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// The request.
    pub head: RequestHead,
    /// What its reply says.
    pub errno: Errno,
    /// Why, for people.
    pub why: &'static str,
}

/// Everything that can be wrong with a request before the disk is asked ("Error values", "Command flags").
pub fn refuse(head: &RequestHead, size: u64) -> Option<Refusal> {
    let no = |errno, why| Some(Refusal { head: *head, errno, why });
    let (allowed_flags, beyond) = match head.kind {
        // The predecessor's clients know ENOSPC for every request beyond the end of an oldstyle export.
        kind::READ | kind::WRITE => (command::FUA, Errno::NoSpc),
        kind::WRITE_ZEROES => (command::FUA | command::NO_HOLE, Errno::NoSpc),
        // Offset and length of a FLUSH are reserved; clients that leave something there mean nothing by it.
        kind::FLUSH if head.flags & !command::FUA == 0 => return None,
        kind::FLUSH | kind::TRIM => (command::FUA, Errno::Inval),
        _ => return no(Errno::Inval, "this server does not know the request type"),
    };
    if head.flags & !allowed_flags != 0 {
        return no(Errno::Inval, "the request type does not take these flags");
    }
    match head.end() {
        None => no(beyond, "offset + length does not fit 64 bits"),
        Some(end) if end > size => no(beyond, "the range goes beyond the end of the export"),
        Some(_) => None,
    }
}

/// The work of a request that has no payload and asks for none; `None` when it asks for nothing at all.
pub fn without_payload(head: &RequestHead) -> Option<Action> {
    let fua = head.flags & command::FUA != 0;
    let (offset, length) = (head.offset, u64::from(head.length));
    match head.kind {
        kind::FLUSH => Some(Action::Flush),
        _ if length == 0 => None,
        kind::TRIM => Some(Action::Trim { offset, length, fua }),
        kind::WRITE_ZEROES => Some(Action::Zero { offset, length, fua, no_hole: head.flags & command::NO_HOLE != 0 }),
        _ => None,
    }
}
