//! The client's side of a conversation: what `read`, `write` and a migration speak. Requests in, bytes out; bytes in,
//! events out. Never sees a socket, a file or a clock.
//!
//! The greeting tells oldstyle from newstyle. Structured replies are never asked for, so every reply is a simple one.
//!
//! Specification: "Oldstyle negotiation", "Newstyle negotiation", "Request message", "Simple reply message".

mod handshake;

use crate::proto::error::Violation;
use crate::proto::wire::{
    kind, Fields, Greeting, RequestHead, SimpleReply, GREETING_LEN, IHAVEOPT, NBDMAGIC, NEWSTYLE_GREETING_LEN,
    OLDSTYLE_MAGIC, REQUEST_LEN, SIMPLE_REPLY_LEN, SIMPLE_REPLY_MAGIC,
};
use handshake::Haggle;
use std::collections::VecDeque;

/// What the server said.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// A part of a newstyle handshake; there may be something to send ([`ClientSession::take_output`]).
    Handshake,
    /// The export, before anything but [`Event::Handshake`]. From now on requests may be sent.
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

#[derive(Debug)]
enum State {
    /// The export to ask for.
    Greeting(String),
    Haggle(Haggle),
    Reply,
    Payload {
        cookie: u64,
        left: u32,
    },
}

/// One conversation with a server.
#[derive(Debug)]
pub struct ClientSession {
    state: State,
    next_cookie: u64,
    /// Requests without a reply: their cookies, and how many bytes a good reply brings.
    waiting: VecDeque<(u64, u32)>,
}

impl Default for ClientSession {
    /// A conversation about the export without a name.
    fn default() -> Self {
        Self::new(String::new())
    }
}

impl ClientSession {
    /// A conversation about the export of this name, which is at most 4096 bytes long; an empty one is the default
    /// export.
    pub fn new(export: String) -> Self {
        Self { state: State::Greeting(export), next_cookie: 1, waiting: VecDeque::new() }
    }

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

    /// What the handshake wants sent, once; empty when it wants nothing.
    pub fn take_output(&mut self) -> Vec<u8> {
        match &mut self.state {
            State::Haggle(haggle) => haggle.take_output(),
            State::Greeting(_) | State::Reply | State::Payload { .. } => Vec::new(),
        }
    }

    /// What it means that the server ends the connection here, for people: how a sentence goes on that begins with the
    /// server.
    pub fn explain_end(&self) -> &'static str {
        match &self.state {
            State::Greeting(_) => {
                "closed the connection before its greeting: its access control list may refuse this address, or it has \
                 no room for a client"
            }
            State::Haggle(haggle) if haggle.asked_by_name() => {
                "closed the connection when asked for the export, as a server does that has none of this name"
            }
            State::Haggle(_) => "closed the connection in the middle of the negotiation",
            State::Reply | State::Payload { .. } => "closed the connection half-way",
        }
    }

    /// Looks at what was received: the next event and how many bytes it took, or `None` when it needs more: never more
    /// than [`GREETING_LEN`].
    pub fn parse<'a>(&mut self, input: &'a [u8]) -> Result<Option<(Event<'a>, usize)>, Violation> {
        match &mut self.state {
            State::Greeting(_) => self.greeting(input),
            State::Haggle(haggle) => Ok(haggle.step(input)?.map(|(used, export)| match export {
                None => (Event::Handshake, used),
                Some(export) => {
                    self.state = State::Reply;
                    (Event::Greeting(export), used)
                }
            })),
            State::Reply => {
                let Some(bytes) = input.first_chunk::<SIMPLE_REPLY_LEN>() else { return Ok(None) };
                let (magic, SimpleReply { error, cookie }) = SimpleReply::parse(bytes);
                if magic != SIMPLE_REPLY_MAGIC {
                    return Err(Violation::BadReplyMagic(magic));
                }
                let found = self.waiting.iter().position(|&(waiting, _)| waiting == cookie);
                let (_, length) =
                    found.and_then(|at| self.waiting.remove(at)).ok_or(Violation::UnknownCookie(cookie))?;
                if error == 0 && length > 0 {
                    self.state = State::Payload { cookie, left: length };
                }
                Ok(Some((Event::Reply { cookie, error }, SIMPLE_REPLY_LEN)))
            }
            State::Payload { .. } if input.is_empty() => Ok(None),
            &mut State::Payload { cookie, left } => {
                let bytes = input.get(..left as usize).unwrap_or(input);
                let left = left.saturating_sub(u32::try_from(bytes.len()).unwrap_or(left));
                self.state = if left == 0 { State::Reply } else { State::Payload { cookie, left } };
                Ok(Some((Event::Data { cookie, bytes }, bytes.len())))
            }
        }
    }

    /// The first 16 bytes tell what the server speaks. They are judged as soon as they are there, because something else
    /// than an NBD server often says less than a greeting and then waits.
    fn greeting<'a>(&mut self, input: &'a [u8]) -> Result<Option<(Event<'a>, usize)>, Violation> {
        let State::Greeting(export) = &mut self.state else { return Ok(None) };
        let mut fields = Fields(input);
        match fields.u64().zip(fields.u64()) {
            None => Ok(None),
            Some((NBDMAGIC, OLDSTYLE_MAGIC)) if !export.is_empty() => Err(Violation::NoExportNames),
            Some((NBDMAGIC, OLDSTYLE_MAGIC)) => {
                let (Some(size), Some(flags), true) = (fields.u64(), fields.u32(), input.len() >= GREETING_LEN) else {
                    return Ok(None);
                };
                self.state = State::Reply;
                Ok(Some((Event::Greeting(Greeting { size, flags }), GREETING_LEN)))
            }
            Some((NBDMAGIC, IHAVEOPT)) => {
                let Some(offered) = fields.u16() else { return Ok(None) };
                self.state = State::Haggle(Haggle::begin(std::mem::take(export), offered));
                Ok(Some((Event::Handshake, NEWSTYLE_GREETING_LEN)))
            }
            Some((first, second)) => Err(Violation::NotNbd(first, second)),
        }
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
        assert!(matches!(run(&mut ClientSession::default(), ssh, 1), Err(Violation::NotNbd(..))));
        let mut stream = Greeting { size: 4096, flags: 13 }.encode().to_vec();
        stream.extend(reply(0, 77));
        assert_eq!(run(&mut ClientSession::default(), &stream, 1), Err(Violation::UnknownCookie(77)));
        let mut stream = Greeting { size: 4096, flags: 13 }.encode().to_vec();
        stream.extend([0; 16]);
        assert_eq!(run(&mut ClientSession::default(), &stream, 5), Err(Violation::BadReplyMagic(0)));
    }
}
