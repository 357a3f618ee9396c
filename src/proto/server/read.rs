//! READ: slices are handed out one after the other, and what comes back is queued behind the right heads.
//!
//! A READ that fits one slice runs beside others. One that needs several runs alone, because the slices of a simple
//! reply follow each other on the wire.

use super::memory::{slice_len, Memory};
use super::reply;
use super::unanswered::Pending;
use crate::buffer::{Buffer, Pool};
use crate::proto::export::Style;
use crate::proto::outbox::Outbox;
use crate::proto::wire::{command, RequestHead};
use crate::work::{Action, Extent};

/// Memory for the first slice of a READ, if there is room; for one that needs several, only when it is alone.
pub(super) fn first_buffer(head: &RequestHead, alone: bool, memory: &mut Memory, pool: &mut Pool) -> Option<Buffer> {
    let length = head.length as usize;
    let buffer = memory.take(length, pool)?;
    if buffer.capacity() >= length {
        return Some(buffer);
    }
    if !alone {
        memory.give(buffer, pool);
        return None;
    }
    // One piece has to be one piece; it is a short one.
    let whole = head.flags & command::DF != 0;
    Some(if whole { memory.exchange(buffer, length, pool) } else { buffer })
}

/// The work of the next slice, as much as the buffer takes; so many bytes before it are replied.
pub(super) fn slice(head: &RequestHead, replied: u32, buffer: Buffer, style: Style) -> Action {
    let offset = head.offset + u64::from(replied);
    let length = slice_len(offset, head.length - replied, buffer.capacity()) as usize;
    let skip_hole = style.structured() && head.flags & command::DF == 0;
    Action::Read { offset, length, skip_hole, buffer }
}

/// Queues the heads of what was read: of the whole reply if it is the first slice, or of each piece. The payload has to
/// follow.
pub(super) fn queue_heads(pending: &mut Pending, hole: &[Extent], payload: &Buffer, style: Style, outbox: &mut Outbox) {
    let RequestHead { cookie, offset, length, .. } = pending.head;
    let data_bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    if style.structured() {
        let hole_bytes: u64 = hole.iter().map(Extent::length).sum();
        let hole_bytes = u32::try_from(hole_bytes).unwrap_or(u32::MAX);
        let at = offset.saturating_add(u64::from(pending.replied));
        if hole_bytes > 0 {
            pending.replied = pending.replied.saturating_add(hole_bytes);
            let head = reply::hole(cookie, at, hole_bytes, pending.replied == length);
            outbox.push_head(head.filled(), pending.since_ms);
        }
        if data_bytes > 0 {
            pending.replied = pending.replied.saturating_add(data_bytes);
            let at = at.saturating_add(u64::from(hole_bytes));
            let head = reply::data(cookie, at, data_bytes, pending.replied == length);
            outbox.push_head(head.filled(), pending.since_ms);
        }
    } else {
        if pending.replied == 0 {
            outbox.push_head(reply::read_begins(&pending.head).filled(), pending.since_ms);
        }
        pending.replied = pending.replied.saturating_add(data_bytes);
    }
    debug_assert!(pending.replied <= length, "a reply as long as its request");
}
