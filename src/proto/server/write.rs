//! WRITE: a payload is handed on in slices as it arrives, or swallowed once the request has failed.

use super::{slice_len, Pass, ServerSession, State, Step};
use crate::buffer::{Buffer, Pool};
use crate::proto::wire::command;
use crate::work::Action;

/// The payload of a WRITE on its way in.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) tag: u32,
    /// Where the next slice goes, in bytes.
    pub(super) offset: u64,
    /// Payload bytes that belong to later slices.
    pub(super) left: u32,
    /// The slice being filled, and how many bytes it still takes.
    pub(super) slice: Option<(Buffer, usize)>,
}

impl ServerSession {
    /// Moves payload bytes from the inbox on to the disk. `None`: look again, the state has changed.
    pub(super) fn take_payload(&mut self, pass: Pass, pool: &mut Pool) -> Option<Step> {
        let State::Payload(incoming) = &mut self.state else { return None };
        let tag = incoming.tag;
        let wanted = self.pending.get(tag as usize).filter(|pending| pending.error.is_none());
        let Some(head) = wanted.map(|pending| pending.head) else { return self.swallow_payload(pool) };
        if pass == Pass::Reads {
            return Some(Step::Kept);
        }
        let Some((mut buffer, room)) = incoming.slice.take() else {
            let (offset, left) = (incoming.offset, incoming.left);
            let Some(buffer) = self.take_buffer(left as usize, pool) else { return Some(Step::NeedRoom) };
            let room = slice_len(offset, left, buffer.capacity());
            if let State::Payload(incoming) = &mut self.state {
                incoming.left -= room;
                incoming.slice = Some((buffer, room as usize));
            }
            return None;
        };
        let mut room = room;
        if let Some(inbox) = &mut self.inbox {
            let n = buffer.append(inbox.filled().get(..room.min(inbox.len())).unwrap_or_default());
            inbox.consume(n);
            room -= n;
        }
        if room > 0 {
            incoming.slice = Some((buffer, room));
            return Some(Step::NeedBytes);
        }
        let (offset, last) = (incoming.offset, incoming.left == 0);
        incoming.offset += buffer.len() as u64;
        if last {
            self.state = State::Request;
        }
        let fua = last && head.flags & command::FUA != 0;
        Some(self.hand_out(tag, head, Action::Write { offset, payload: buffer, fua }))
    }

    /// Drops what has come of a payload whose request has failed. `None`: look again, that was all of it.
    fn swallow_payload(&mut self, pool: &mut Pool) -> Option<Step> {
        let State::Payload(incoming) = &mut self.state else { return None };
        let tag = incoming.tag;
        if let Some((buffer, room)) = incoming.slice.take() {
            incoming.left += u32::try_from(room).unwrap_or(u32::MAX);
            self.buffered -= buffer.capacity();
            pool.give(buffer);
        }
        if let Some(inbox) = &mut self.inbox {
            let n = inbox.len().min(incoming.left as usize);
            inbox.consume(n);
            incoming.left -= u32::try_from(n).unwrap_or(u32::MAX);
        }
        if incoming.left > 0 {
            return Some(Step::NeedBytes);
        }
        self.state = State::Request;
        self.finish_if_done(tag);
        None
    }
}
