//! The end of a conversation that the server ends, for a client that asks again elsewhere.

use super::{reply, ServerSession, State, IN_FLIGHT_MAX};
use crate::proto::error::Errno;
use crate::proto::wire::{kind, RequestHead, REQUEST_LEN, REQUEST_MAGIC};

impl ServerSession {
    /// The server ends: queues ESHUTDOWN for the requests that were not executed and are not going to be. `in_work`: pieces of
    /// this client's requests are in the disk, and nobody knows what will become of those; such requests stay without an
    /// answer. What comes behind in the socket does as well. Nothing else may be asked of the session but what to send.
    pub fn part(&mut self, in_work: bool) {
        // A simple reply that has begun cannot be anything else any more.
        if self.long_read.is_some() && !self.style.structured() {
            return;
        }
        let open = self.unanswered.iter().filter(|pending| pending.in_work == 0 || !in_work);
        let mut refused: Vec<_> = open.map(|pending| (pending.head, pending.error, pending.since_ms)).collect();
        let mut rest = if let State::Request = self.state { self.inbox.filled() } else { Default::default() };
        while let Some((bytes, behind)) = rest.split_first_chunk::<REQUEST_LEN>() {
            let (magic, head) = RequestHead::parse(bytes);
            if magic != REQUEST_MAGIC || head.kind == kind::DISC || refused.len() >= IN_FLIGHT_MAX {
                break;
            }
            refused.push((head, None, self.inbox.received_ms()));
            let payload = if head.kind == kind::WRITE { head.length as usize } else { 0 };
            rest = behind.get(payload..).unwrap_or_default();
        }
        for (head, error, since_ms) in refused {
            let reply = reply::failed(&head, error.unwrap_or(Errno::Shutdown), self.style);
            self.outbox.push_head(reply.filled(), since_ms);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Pool;
    use crate::proto::export::Export;
    use crate::proto::outbox::PIECES_MAX;
    use crate::proto::server::{Allowed, Step};
    use crate::proto::wire::{SimpleReply, GREETING_LEN, SIMPLE_REPLY_LEN};
    use std::io::IoSlice;

    /// The errors and cookies of what is said to these requests, of which the first is in the disk, when the server ends.
    fn answers(in_work: bool) -> Vec<(u32, u64)> {
        let mut pool = Pool::new(1 << 20);
        let mut session =
            ServerSession::oldstyle(Export { size: 1 << 20, read_only: false, flushes: true, several: true }, 0);
        let head = |kind, cookie, length| RequestHead { flags: 0, kind, cookie, offset: 0, length }.encode().to_vec();
        let stream = [
            head(kind::READ, 1, 512),
            head(kind::WRITE, 2, 4),
            b"1234".to_vec(),
            head(kind::FLUSH, 3, 0),
            head(kind::WRITE, 4, 100),
            b"half".to_vec(),
        ]
        .concat();
        let [_, space] = session.recv_space(&mut pool);
        space[..stream.len()].copy_from_slice(&stream);
        session.received(stream.len(), 0);
        assert!(matches!(session.next_step(Allowed::Everything, &mut pool), Step::Request(_)));
        session.part(in_work);
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let pieces = session.to_send(&mut slices);
        let sent: Vec<u8> = slices[..pieces].iter().flat_map(|slice| slice.to_vec()).collect();
        let replies = sent[GREETING_LEN..].chunks_exact(SIMPLE_REPLY_LEN);
        replies
            .map(|reply| SimpleReply::parse(reply.try_into().unwrap()).1)
            .map(|reply| (reply.error, reply.cookie))
            .collect()
    }

    #[test]
    fn only_what_the_disk_has_in_hand_stays_without_an_answer() {
        assert_eq!(answers(false), [(108, 1), (108, 2), (108, 3), (108, 4)]);
        assert_eq!(answers(true), [(108, 2), (108, 3), (108, 4)]);
    }
}
