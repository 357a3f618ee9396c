//! What a client may ask for: the check of a request, and the work that a good one means.
//!
//! Specification: "Request types", "Command flags", "Error values".

use crate::buffer::SLICE;
use crate::proto::error::Errno;
use crate::proto::export::{Export, Style};
use crate::proto::wire::{command, kind, RequestHead};
use crate::work::Action;

/// The longest READ with DF, in bytes: the specification wants so much to work ("Command flags"). It is in memory as a
/// whole.
pub const DF_MAX: u32 = 64 << 10;
const _: () = assert!(DF_MAX as usize <= SLICE, "it fits one buffer");

/// The most extents in one reply; a client asks again for the rest.
pub const EXTENTS_MAX: usize = 512;

/// A piece of work that a request asks for; its range is inside the export. A long request becomes several.
#[derive(Debug)]
pub struct Request {
    /// The request as it came.
    pub head: RequestHead,
    /// Names the request within its session until all pieces of it are completed; of a READ, the piece too.
    pub tag: u32,
    /// What to do.
    pub action: Action,
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
pub fn refuse(head: &RequestHead, export: Export, style: Style) -> Option<Refusal> {
    let no = |errno, why| Some(Refusal { head: *head, errno, why });
    if export.read_only && head.changes_export() {
        return no(Errno::Perm, "the export is read-only");
    }
    let oldstyle = style == Style::Oldstyle;
    let (allowed_flags, beyond) = match head.kind {
        // The predecessor's clients know ENOSPC for every request beyond the end.
        kind::READ if oldstyle => (0, Errno::NoSpc),
        kind::READ if style.structured() => (command::DF, Errno::Inval),
        kind::WRITE => (0, Errno::NoSpc),
        kind::WRITE_ZEROES if oldstyle => (command::NO_HOLE, Errno::NoSpc),
        kind::WRITE_ZEROES => (command::NO_HOLE | command::FAST_ZERO, Errno::NoSpc),
        // Offset and length of a FLUSH are reserved: what a client leaves there is ignored.
        kind::FLUSH if head.flags & !command::FUA == 0 => return None,
        kind::READ | kind::TRIM | kind::FLUSH => (0, Errno::Inval),
        kind::CACHE if !oldstyle => (0, Errno::Inval),
        kind::BLOCK_STATUS if style.allocation() && head.length == 0 => {
            return no(Errno::Inval, "there is no extent without a length");
        }
        kind::BLOCK_STATUS if style.allocation() => (command::REQ_ONE, Errno::Inval),
        kind::CACHE | kind::BLOCK_STATUS => return no(Errno::Inval, "the request type was not negotiated"),
        _ => return no(Errno::Inval, "this server does not know the request type"),
    };
    // Where FUA is offered it is valid everywhere, also where it means nothing; where it is not, it does no harm.
    if head.flags & !(allowed_flags | command::FUA) != 0 {
        return no(Errno::Inval, "the request type does not take these flags");
    }
    match head.end() {
        None => return no(beyond, "offset + length does not fit 64 bits"),
        Some(end) if end > export.size => return no(beyond, "the range goes beyond the end of the export"),
        Some(_) => {}
    }
    if head.flags & command::DF != 0 && head.length > DF_MAX {
        return no(Errno::Overflow, "too long to be answered in one piece");
    }
    None
}

/// The work of a request that has no payload and asks for none; `None` when it asks for nothing at all.
pub fn without_payload(head: &RequestHead) -> Option<Action> {
    let has = |flag| head.flags & flag != 0;
    let fua = has(command::FUA);
    let (offset, length) = (head.offset, u64::from(head.length));
    match head.kind {
        kind::FLUSH => Some(Action::Flush),
        _ if length == 0 => None,
        kind::TRIM => Some(Action::Trim { offset, length, fua }),
        kind::WRITE_ZEROES => {
            Some(Action::Zero { offset, length, fua, no_hole: has(command::NO_HOLE), fast: has(command::FAST_ZERO) })
        }
        kind::CACHE => Some(Action::Cache { offset, length }),
        kind::BLOCK_STATUS => {
            Some(Action::Map { offset, length, most: if has(command::REQ_ONE) { 1 } else { EXTENTS_MAX } })
        }
        _ => None,
    }
}
