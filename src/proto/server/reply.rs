//! The heads of replies: simple ones, and the chunks of structured ones.
//!
//! Specification: "Simple reply message", "Structured reply chunk message", "Structured reply types".

use crate::proto::error::Errno;
use crate::proto::export::{Style, ALLOCATION_ID};
use crate::proto::outbox::HEAD_MAX;
use crate::proto::wire::{chunk, extent, kind, ChunkHead, Encoder, RequestHead, SimpleReply};
use crate::work::Extent;

/// A head: the bytes of a message that are not payload.
pub(super) type Head = Encoder<HEAD_MAX>;

/// A good reply without data.
pub(super) fn done(head: &RequestHead, style: Style) -> Head {
    if head.kind == kind::READ && style.structured() {
        return chunk_head(head.cookie, chunk::DONE, chunk::NONE, 0);
    }
    simple(head.cookie, 0)
}

/// A reply that says what went wrong. Once structured replies are agreed on, READ and `BLOCK_STATUS` fail with a chunk.
pub(super) fn failed(head: &RequestHead, errno: Errno, style: Style) -> Head {
    if matches!(head.kind, kind::READ | kind::BLOCK_STATUS) && style.structured() {
        // The error, and a message of no length.
        let error = errno.to_wire().to_be_bytes();
        return chunk_head(head.cookie, chunk::DONE, chunk::ERROR, 6).put(&error).put(&[0, 0]);
    }
    simple(head.cookie, errno.to_wire())
}

/// What stands before all the data of a READ.
pub(super) fn read_begins(head: &RequestHead) -> Head {
    simple(head.cookie, 0)
}

/// What stands before `length` bytes of data at `offset`.
pub(super) fn data(cookie: u64, offset: u64, length: u32, last: bool) -> Head {
    let flags = if last { chunk::DONE } else { 0 };
    chunk_head(cookie, flags, chunk::OFFSET_DATA, length.saturating_add(8)).put(&offset.to_be_bytes())
}

/// A hole of `length` bytes at `offset`.
pub(super) fn hole(cookie: u64, offset: u64, length: u32, last: bool) -> Head {
    let flags = if last { chunk::DONE } else { 0 };
    chunk_head(cookie, flags, chunk::OFFSET_HOLE, 12).put(&offset.to_be_bytes()).put(&length.to_be_bytes())
}

/// What stands before the extents of [`block_status`].
pub(super) fn block_status_begins(cookie: u64, payload: &[u8]) -> Head {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    chunk_head(cookie, chunk::DONE, chunk::BLOCK_STATUS, length)
}

/// The context and its extents, from the beginning of the request on.
pub(super) fn block_status(extents: &[Extent]) -> Vec<u8> {
    let mut payload = ALLOCATION_ID.to_be_bytes().to_vec();
    for found in extents {
        let length = u32::try_from(found.length()).unwrap_or(u32::MAX);
        let flags = if found.is_hole { extent::HOLE_ZERO } else { 0 };
        payload.extend(length.to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    payload
}

fn simple(cookie: u64, error: u32) -> Head {
    Encoder::new().put(&SimpleReply { error, cookie }.encode())
}

fn chunk_head(cookie: u64, flags: u16, kind: u16, length: u32) -> Head {
    ChunkHead { flags, kind, cookie, length }.encode()
}
