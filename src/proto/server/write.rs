//! WRITE: a payload is handed on in slices as it arrives, or swallowed once its request has failed.

use super::inbox::Inbox;
use super::memory::{slice_len, Memory};
use super::step::Allowed;
use crate::buffer::{Buffer, Pool};
use crate::proto::wire::{command, RequestHead};
use crate::work::Action;

/// What has come of a payload.
#[derive(Debug)]
pub(super) enum Piece {
    /// Nothing before more bytes are received.
    NeedBytes,
    /// Nothing before memory comes back.
    NeedRoom,
    /// The next slice may not pass now.
    Kept,
    /// A whole slice, the last one or not.
    Slice { action: Action, is_last: bool },
}

/// The payload of a WRITE on its way in.
#[derive(Debug)]
pub(super) struct Arriving {
    tag: u32,
    fua: bool,
    /// Where the next slice goes, in bytes.
    offset: u64,
    /// A slice has been handed on.
    follows: bool,
    /// Payload bytes that belong to later slices.
    left: u32,
    /// The slice being filled, and how many bytes it still takes.
    slice: Option<(Buffer, usize)>,
}

impl Arriving {
    /// The payload of the request with this tag.
    pub(super) fn new(tag: u32, head: &RequestHead) -> Self {
        let fua = head.flags & command::FUA != 0;
        Self { tag, fua, offset: head.offset, follows: false, left: head.length, slice: None }
    }

    pub(super) fn tag(&self) -> u32 {
        self.tag
    }

    /// Where to receive into, which is the rest of the slice if there is one, and whether what follows it need not be
    /// payload.
    pub(super) fn space(&mut self) -> (&mut [u8], bool) {
        match &mut self.slice {
            Some((buffer, room)) => (buffer.spare().get_mut(..*room).unwrap_or_default(), self.left == 0),
            None => (<&mut [u8]>::default(), true),
        }
    }

    /// Counts up to `n` bytes received into that space; says how many they are.
    pub(super) fn received(&mut self, n: usize) -> usize {
        let Some((buffer, room)) = &mut self.slice else { return 0 };
        let taken = n.min(*room);
        buffer.advance(taken);
        *room -= taken;
        taken
    }

    /// Goes on with what was received. With FUA, all of the payload is durable when the last slice is done. A slice
    /// that may not pass is kept only when all of it has come: until then it waits for its client.
    pub(super) fn step(&mut self, allowed: Allowed, inbox: &mut Inbox, memory: &mut Memory, pool: &mut Pool) -> Piece {
        if allowed == Allowed::Reads && self.slice.is_none() {
            return Piece::Kept;
        }
        let Some((mut buffer, room)) = self.slice.take().or_else(|| self.next_slice(memory, pool)) else {
            return Piece::NeedRoom;
        };
        let come = inbox.filled();
        let n = buffer.append(come.get(..room).unwrap_or(come));
        inbox.consume(n);
        if n < room {
            self.slice = Some((buffer, room - n));
            return Piece::NeedBytes;
        }
        if allowed == Allowed::Reads {
            self.slice = Some((buffer, 0));
            return Piece::Kept;
        }
        let (offset, is_last) = (self.offset, self.left == 0);
        self.offset += buffer.len() as u64;
        let follows = std::mem::replace(&mut self.follows, true);
        let action = Action::Write { offset, payload: buffer, fua: is_last && self.fua, follows };
        Piece::Slice { action, is_last }
    }

    /// A slice for the next bytes, and how many go there.
    fn next_slice(&mut self, memory: &mut Memory, pool: &mut Pool) -> Option<(Buffer, usize)> {
        let left = self.left as usize;
        // A buffer of a payload with FUA is not free before its data is durable. Slices leave memory for the next
        // payload meanwhile.
        let buffer = if self.fua { memory.take(left, pool) } else { memory.take_bulk(left, pool) }?;
        let room = slice_len(self.offset, self.left, buffer.capacity());
        self.left -= room;
        Some((buffer, room as usize))
    }

    /// Drops what was received; true when that was all of the payload.
    pub(super) fn swallow(&mut self, inbox: &mut Inbox, memory: &mut Memory, pool: &mut Pool) -> bool {
        if let Some((buffer, room)) = self.slice.take() {
            self.left += u32::try_from(room).unwrap_or(u32::MAX);
            memory.give(buffer, pool);
        }
        let n = inbox.filled().len().min(self.left as usize);
        inbox.consume(n);
        self.left -= u32::try_from(n).unwrap_or(u32::MAX);
        self.left == 0
    }

    /// Gives its memory back.
    pub(super) fn release(self, memory: &mut Memory, pool: &mut Pool) {
        if let Some((buffer, _)) = self.slice {
            memory.give(buffer, pool);
        }
    }
}
