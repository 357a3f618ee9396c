//! READ: slices are handed out one after the other, and what comes back is queued behind the right heads.
//!
//! A READ that fits one slice runs beside others. One that needs several runs alone, because the slices of a simple reply
//! follow each other on the wire (invariant 3).

use super::{reply, slice_len, Pending, ServerSession, Step, IN_FLIGHT_MAX};
use crate::buffer::{Buffer, Pool};
use crate::proto::wire::{command, RequestHead};
use crate::work::{Action, Extent};

impl ServerSession {
    /// Starts a READ whose head is still in the inbox.
    pub(super) fn start_read(&mut self, head: RequestHead, pool: &mut Pool) -> Step {
        let Some(mut buffer) = self.take_buffer(head.length as usize, pool) else { return Step::NeedRoom };
        let whole = buffer.capacity() >= head.length as usize;
        if !whole && !self.pending.is_empty() {
            self.buffered -= buffer.capacity();
            pool.give(buffer);
            return Step::NeedRoom;
        }
        if !whole && head.flags & command::DF != 0 {
            // One piece has to be one piece; it is a short one.
            self.buffered -= buffer.capacity();
            let larger = pool.take_beyond(head.length as usize);
            pool.give(std::mem::replace(&mut buffer, larger));
            self.buffered += buffer.capacity();
        }
        let tag = self.accept(head);
        let length = slice_len(head.offset, head.length, buffer.capacity()) as usize;
        self.long_read = (length < head.length as usize).then_some(tag);
        self.hand_out_read(tag, head, head.offset, length, buffer)
    }

    /// The next slice of the read that runs alone.
    pub(super) fn read_on(&mut self, tag: u32, pool: &mut Pool) -> Step {
        let Some(&Pending { head, in_disk: 0, replied, .. }) = self.pending.get(tag as usize) else {
            return Step::NeedRoom;
        };
        if self.outbox.replies() >= IN_FLIGHT_MAX {
            // Chunks of holes take no memory of the pool, so that nothing else would bound them.
            return Step::NeedRoom;
        }
        let left = head.length - replied;
        let offset = head.offset + u64::from(replied);
        let Some(buffer) = self.take_buffer(left as usize, pool) else { return Step::NeedRoom };
        let length = slice_len(offset, left, buffer.capacity()) as usize;
        self.hand_out_read(tag, head, offset, length, buffer)
    }

    fn hand_out_read(&mut self, tag: u32, head: RequestHead, offset: u64, length: usize, buffer: Buffer) -> Step {
        let skip_hole = self.style.structured() && head.flags & command::DF == 0;
        self.hand_out(tag, head, Action::Read { offset, length, skip_hole, buffer })
    }

    /// Queues what was read: behind the head of the reply if it is the first slice, or each piece behind its own head.
    pub(super) fn queue_read(&mut self, tag: u32, hole: &[Extent], payload: Buffer, pool: &mut Pool) {
        let Some(pending) = self.pending.get_mut(tag as usize) else { return };
        let RequestHead { cookie, offset, length, .. } = pending.head;
        let since_ms = pending.since_ms;
        let data_bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if self.style.structured() {
            let hole_bytes: u64 = hole.iter().map(Extent::length).sum();
            let hole_bytes = u32::try_from(hole_bytes).unwrap_or(u32::MAX);
            let at = offset.saturating_add(u64::from(pending.replied));
            let last = |replied: u32| replied == length;
            if hole_bytes > 0 {
                pending.replied = pending.replied.saturating_add(hole_bytes);
                let head = reply::hole(cookie, at, hole_bytes, last(pending.replied));
                self.outbox.push_head(head.filled(), since_ms);
            }
            if data_bytes > 0 {
                pending.replied = pending.replied.saturating_add(data_bytes);
                let at = at.saturating_add(u64::from(hole_bytes));
                self.outbox.push_head(reply::data(cookie, at, data_bytes, last(pending.replied)).filled(), since_ms);
            }
        } else {
            if pending.replied == 0 {
                self.outbox.push_head(reply::read_begins(&pending.head).filled(), since_ms);
            }
            pending.replied = pending.replied.saturating_add(data_bytes);
        }
        debug_assert!(pending.replied <= length, "a reply as long as its request");
        if pending.replied == length {
            self.tally.reads += 1;
            self.tally.read_bytes += u64::from(length);
            self.pending.remove(tag as usize);
            self.long_read = None;
        }
        if payload.is_empty() {
            self.buffered -= payload.capacity();
            pool.give(payload);
        } else {
            self.outbox.push_payload(payload, since_ms);
        }
    }
}
