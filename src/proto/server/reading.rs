//! The READs of a session: how they are started, go on, and are queued for the client.

use super::read::{self, LongRead, Slice};
use super::unanswered::Pending;
use super::{Load, ServerSession, Step, IN_FLIGHT_MAX};
use crate::buffer::Pool;
use crate::proto::wire::RequestHead;

impl ServerSession {
    /// Starts a READ whose head is still in the inbox.
    pub(super) fn start_read(&mut self, head: RequestHead, pool: &mut Pool) -> Step {
        let is_alone = self.unanswered.is_empty();
        let Some(buffer) = read::first_buffer(&head, is_alone, &mut self.memory, pool) else { return Step::NeedRoom };
        let tag = self.accept(head);
        self.load += Load::of(&head);
        let (tag, action) = if buffer.capacity() < head.length as usize {
            self.long_read.insert(LongRead::new(head, tag, self.style)).next_slice(buffer)
        } else {
            (tag, read::whole(&head, buffer, self.style))
        };
        self.hand_out(tag, head, action)
    }

    /// More work of the READ that runs alone.
    pub(super) fn read_on(&mut self, pool: &mut Pool) -> Option<Step> {
        let long = self.long_read.as_mut()?;
        let &Pending { head, error: None, .. } = self.unanswered.get(long.tag())? else { return None };
        // Chunks of holes take no memory of the pool, so that nothing but the number of replies bounds them.
        if self.outbox.heads() >= IN_FLIGHT_MAX {
            return None;
        }
        let (tag, action) = long.next(self.outbox.is_empty(), &mut self.memory, pool)?;
        Some(self.hand_out(tag, head, action))
    }

    /// A READ, or a slice of one, has been read.
    pub(super) fn read_arrived(&mut self, tag: u32, slice: Slice, pool: &mut Pool) {
        if let Some(long) = &mut self.long_read {
            long.arrived(tag, slice);
            self.queue_long_read(pool);
        } else {
            self.queue_read(tag, slice, pool);
        }
    }

    /// Queues what of the READ that runs alone has its turn.
    pub(super) fn queue_long_read(&mut self, pool: &mut Pool) {
        while let Some((tag, slice)) = self.long_read.as_mut().and_then(|long| Some((long.tag(), long.take()?))) {
            self.queue_read(tag, slice, pool);
        }
    }

    fn queue_read(&mut self, tag: u32, slice: Slice, pool: &mut Pool) {
        let Some(pending) = self.unanswered.get_mut(tag) else { return };
        read::queue(pending, slice, self.style, &mut self.outbox, &mut self.memory, pool);
        if pending.replied == pending.head.length {
            self.note_answered(tag, None);
        }
    }
}
