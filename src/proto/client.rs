//! The client's side of a conversation: what `read`, `write` and a migration speak. Requests in, bytes out; bytes in,
//! events out. Never sees a socket, a file or a clock.
//!
//! Specification: "Oldstyle negotiation", "Request message", "Simple reply message".

use super::error::Violation;
use super::wire::{kind, Greeting, RequestHead, SimpleReply, GREETING_LEN, REQUEST_LEN, SIMPLE_REPLY_LEN};
use std::collections::VecDeque;

/// What the server said.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// The export, before anything else.
    Greeting(Greeting),
    /// The request with this cookie is answered: 0, or the error of the specification. Data of a READ follows.
    Reply {
        /// Of the request.
        cookie: u64,
        /// 0, or what went wrong.
        error: u32,
    },
    /// The next bytes of the READ with this cookie.
    Data {
        /// Of the READ.
        cookie: u64,
        /// What was read, in its order.
        bytes: &'a [u8],
    },
}

#[derive(Debug, Clone, Copy)]
enum Phase {
    Greeting,
    Reply,
    Payload { cookie: u64, left: u32 },
}

/// One conversation with a server.
#[derive(Debug)]
pub struct ClientSession {
    phase: Phase,
    next_cookie: u64,
    /// Requests without a reply: their cookies, and how many bytes a good reply brings.
    waiting: VecDeque<(u64, u32)>,
}

impl Default for ClientSession {
    fn default() -> Self {
        Self { phase: Phase::Greeting, next_cookie: 1, waiting: VecDeque::new() }
    }
}

impl ClientSession {
    /// The bytes of a request, and the cookie its reply will carry. A WRITE's payload is the caller's to send behind it.
    pub fn request(&mut self, kind: u16, flags: u16, offset: u64, length: u32) -> ([u8; REQUEST_LEN], u64) {
        let cookie = self.next_cookie;
        self.next_cookie = self.next_cookie.wrapping_add(1);
        if kind != kind::DISC {
            self.waiting.push_back((cookie, if kind == kind::READ { length } else { 0 }));
        }
        (RequestHead { flags, kind, cookie, offset, length }.encode(), cookie)
    }

    /// How many requests have no reply yet.
    pub fn unanswered(&self) -> usize {
        self.waiting.len()
    }

    /// Looks at what was received: the next event and how many bytes it took, or `None` when it needs more.
    pub fn parse<'a>(&mut self, input: &'a [u8]) -> Result<Option<(Event<'a>, usize)>, Violation> {
        match self.phase {
            Phase::Greeting => {
                let Some(bytes) = input.first_chunk::<GREETING_LEN>() else { return Self::refuse_early(input) };
                let greeting = Greeting::parse(bytes)?;
                self.phase = Phase::Reply;
                Ok(Some((Event::Greeting(greeting), GREETING_LEN)))
            }
            Phase::Reply => {
                let Some(bytes) = input.first_chunk::<SIMPLE_REPLY_LEN>() else { return Ok(None) };
                let SimpleReply { error, cookie } = SimpleReply::parse(bytes)?;
                let found = self.waiting.iter().position(|&(waiting, _)| waiting == cookie);
                let (_, length) =
                    found.and_then(|at| self.waiting.remove(at)).ok_or(Violation::UnknownCookie(cookie))?;
                if error == 0 && length > 0 {
                    self.phase = Phase::Payload { cookie, left: length };
                }
                Ok(Some((Event::Reply { cookie, error }, SIMPLE_REPLY_LEN)))
            }
            Phase::Payload { .. } if input.is_empty() => Ok(None),
            Phase::Payload { cookie, left } => {
                let bytes = input.get(..left as usize).unwrap_or(input);
                let left = left.saturating_sub(u32::try_from(bytes.len()).unwrap_or(left));
                self.phase = if left == 0 { Phase::Reply } else { Phase::Payload { cookie, left } };
                Ok(Some((Event::Data { cookie, bytes }, bytes.len())))
            }
        }
    }

    /// Something else than an NBD server often says less than a greeting and then waits: its first 16 bytes tell.
    fn refuse_early<'a>(input: &[u8]) -> Result<Option<(Event<'a>, usize)>, Violation> {
        let Some(start) = input.first_chunk::<16>() else { return Ok(None) };
        let mut bytes = [0; GREETING_LEN];
        if let Some(to) = bytes.first_chunk_mut() {
            *to = *start;
        }
        Greeting::parse(&bytes).map(|_| None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::wire::command;

    /// Feeds the stream in pieces of `step` bytes and collects what comes out, data joined.
    fn run(session: &mut ClientSession, stream: &[u8], step: usize) -> Result<(Vec<String>, Vec<u8>), Violation> {
        let (mut events, mut data, mut input) = (Vec::new(), Vec::new(), Vec::new());
        for piece in stream.chunks(step) {
            input.extend_from_slice(piece);
            while let Some((event, used)) = session.parse(&input)? {
                match event {
                    Event::Data { bytes, .. } => data.extend_from_slice(bytes),
                    other => events.push(format!("{other:?}")),
                }
                input.drain(..used);
            }
        }
        Ok((events, data))
    }

    fn reply(error: u32, cookie: u64) -> Vec<u8> {
        SimpleReply { error, cookie }.encode().to_vec()
    }

    #[test]
    fn replies_in_any_order_and_any_pieces() {
        let mut stream = Greeting { size: 4096, flags: 13 }.encode().to_vec();
        stream.extend(reply(0, 2));
        stream.extend(reply(0, 1));
        stream.extend(b"0123456789");
        stream.extend(reply(28, 3));
        for step in 1..=stream.len() {
            let mut session = ClientSession::default();
            assert_eq!(session.request(kind::READ, 0, 0, 10).1, 1);
            assert_eq!(session.request(kind::FLUSH, 0, 0, 0).1, 2);
            assert_eq!(session.request(kind::WRITE, command::FUA, 0, 99).1, 3);
            session.request(kind::DISC, 0, 0, 0);
            assert_eq!(session.unanswered(), 3);
            let (events, data) = run(&mut session, &stream, step).unwrap();
            assert_eq!(data, b"0123456789");
            assert_eq!(
                events,
                [
                    "Greeting(Greeting { size: 4096, flags: 13 })",
                    "Reply { cookie: 2, error: 0 }",
                    "Reply { cookie: 1, error: 0 }",
                    "Reply { cookie: 3, error: 28 }"
                ]
            );
            assert_eq!(session.unanswered(), 0);
        }
    }

    #[test]
    fn garbage_ends_the_conversation() {
        let ssh = b"SSH-2.0-Something";
        assert!(matches!(run(&mut ClientSession::default(), ssh, 1), Err(Violation::NotOldstyle(..))));
        let mut stream = Greeting { size: 4096, flags: 13 }.encode().to_vec();
        stream.extend(reply(0, 77));
        assert_eq!(run(&mut ClientSession::default(), &stream, 1), Err(Violation::UnknownCookie(77)));
        let mut stream = Greeting { size: 4096, flags: 13 }.encode().to_vec();
        stream.extend([0; 16]);
        assert_eq!(run(&mut ClientSession::default(), &stream, 5), Err(Violation::BadReplyMagic(0)));
    }
}
