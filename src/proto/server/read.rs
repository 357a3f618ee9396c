//! READ: slices are handed out, and what comes back is queued behind the right heads.
//!
//! A READ that fits one slice runs beside others. One that needs several runs alone, because the slices of a simple
//! reply follow each other on the wire; up to [`SLICES_MAX`] of its own are in work together, and those that come back
//! early wait for their turn.
//!
//! A simple reply says that all is well before its first byte of data, and cannot take that back. So it begins when every
//! byte is known to be readable: has been read, or has been verified where there is no memory for all of it.
//! Specification: "Simple reply message".

use super::memory::{slice_len, Memory, SLICES_MAX};
use super::reply;
use super::unanswered::Pending;
use crate::buffer::{Buffer, Pool};
use crate::proto::export::Style;
use crate::proto::outbox::Outbox;
use crate::proto::wire::{command, RequestHead};
use crate::work::{Action, Extent};
use std::collections::VecDeque;

/// The longest READ that is verified, in bytes: as long as kernels make them. The first byte of a longer one would wait
/// for too much, so that one may fail half way.
pub(super) const VERIFIED_MAX: u32 = 4 << 20;

/// A part of a READ that has been read.
#[derive(Debug)]
pub(super) struct Slice {
    /// What it begins with.
    pub(super) hole: Vec<Extent>,
    /// What follows.
    pub(super) payload: Buffer,
}

/// Whether the reply may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// Not before all has been read.
    Awaited,
    /// What had no memory is being verified.
    Verifying,
    /// Not before the slices that are in work have been read.
    Verified,
    /// It may, or has begun.
    Free,
}

/// A READ that needs several slices.
#[derive(Debug)]
pub(super) struct LongRead {
    head: RequestHead,
    tag: u32,
    skip_hole: bool,
    start: Start,
    /// Bytes of it, from its beginning on, whose slices are handed out.
    handed_out: u32,
    /// The slices that are handed out and not queued for the client, in their order; `None` is in work.
    slices: VecDeque<Option<Slice>>,
    /// The first of them has this number.
    first: u32,
}

impl LongRead {
    pub(super) fn new(head: RequestHead, tag: u32, style: Style) -> Self {
        let start = if style.structured() || head.length > VERIFIED_MAX { Start::Free } else { Start::Awaited };
        let skip_hole = skips_hole(&head, style);
        Self { head, tag, skip_hole, start, handed_out: 0, slices: VecDeque::new(), first: 0 }
    }

    /// The tag of the request.
    pub(super) fn tag(&self) -> u32 {
        self.tag
    }

    /// The work to hand out next, and its tag; `None` when there is none before something is completed or sent.
    /// `all_sent`: nothing that waits to be sent will give memory back.
    pub(super) fn next(&mut self, all_sent: bool, memory: &mut Memory, pool: &mut Pool) -> Option<(u32, Action)> {
        let left = self.head.length - self.handed_out;
        if left == 0 {
            return None;
        }
        if self.slices.len() < SLICES_MAX as usize {
            if let Some(buffer) = memory.take(left as usize, pool) {
                return Some(self.next_slice(buffer));
            }
        }
        let verifies = self.start == Start::Awaited && all_sent;
        verifies.then(|| {
            self.start = Start::Verifying;
            let offset = self.head.offset + u64::from(self.handed_out);
            (self.tag + SLICES_MAX, Action::Verify { offset, length: u64::from(left) })
        })
    }

    /// The work of the next slice, as much as the buffer takes, and its tag.
    pub(super) fn next_slice(&mut self, buffer: Buffer) -> (u32, Action) {
        let number = self.first.wrapping_add(u32::try_from(self.slices.len()).unwrap_or_default());
        let offset = self.head.offset + u64::from(self.handed_out);
        let length = slice_len(offset, self.head.length - self.handed_out, buffer.capacity());
        self.handed_out += length;
        self.slices.push_back(None);
        let action = Action::Read { offset, length: length as usize, skip_hole: self.skip_hole, buffer };
        (self.tag + number % SLICES_MAX, action)
    }

    /// A slice has come back, with this tag.
    pub(super) fn arrived(&mut self, tag: u32, slice: Slice) {
        let place = (tag - self.tag).wrapping_sub(self.first) % SLICES_MAX;
        match self.slices.get_mut(place as usize) {
            Some(waits) if waits.is_none() => *waits = Some(slice),
            _ => debug_assert!(false, "a slice that is not in work"),
        }
    }

    /// What had no memory can be read.
    pub(super) fn verified(&mut self) {
        self.start = Start::Verified;
    }

    /// The next slice whose turn has come.
    pub(super) fn take(&mut self) -> Option<Slice> {
        let has_rest = match self.start {
            Start::Awaited => self.handed_out < self.head.length,
            Start::Verifying => true,
            Start::Verified | Start::Free => false,
        };
        if !has_rest && self.slices.iter().all(Option::is_some) {
            self.start = Start::Free;
        }
        if self.start != Start::Free || self.slices.front()?.is_none() {
            return None;
        }
        self.first = self.first.wrapping_add(1);
        self.slices.pop_front().flatten()
    }

    /// Gives back what waits for its turn: it will not be sent.
    pub(super) fn release(&mut self, memory: &mut Memory, pool: &mut Pool) {
        for slice in self.slices.drain(..).flatten() {
            memory.give(slice.payload, pool);
        }
    }
}

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
    if whole {
        memory.exchange(buffer, length, pool)
    } else {
        Some(buffer)
    }
}

/// The work of a READ that fits the buffer.
pub(super) fn whole(head: &RequestHead, buffer: Buffer, style: Style) -> Action {
    let (offset, length) = (head.offset, head.length as usize);
    Action::Read { offset, length, skip_hole: skips_hole(head, style), buffer }
}

fn skips_hole(head: &RequestHead, style: Style) -> bool {
    style.structured() && head.flags & command::DF == 0
}

/// Queues what was read: behind the head of the whole reply if it is the first slice, or each piece behind its own.
pub(super) fn queue(
    pending: &mut Pending,
    slice: Slice,
    style: Style,
    outbox: &mut Outbox,
    memory: &mut Memory,
    pool: &mut Pool,
) {
    let Slice { hole, payload } = slice;
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
    if payload.is_empty() {
        memory.give(payload, pool);
    } else {
        outbox.push_payload(payload, pending.since_ms);
    }
}
