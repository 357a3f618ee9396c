//! PURE: the oracle of a whole newstyle session.

use super::choices::Choices;
use super::drive::{converse, Client, Server};
use super::export::{check_data, check_error, content, Pattern, PAYLOAD_MAX, POOLS, SIZE};
use super::haggling::{haggle, Negotiation, NAME};
use flexnbd::proto::error::Violation;
use flexnbd::proto::export::{Agreed, Export, Style};
use flexnbd::proto::server::handshake::Haggled;
use flexnbd::proto::server::{End, ServerSession};
use flexnbd::proto::wire::{
    chunk, command, extent, kind, Fields, RequestHead, CHUNK_LEN, REQUEST_LEN, REQUEST_MAGIC, SIMPLE_REPLY_LEN,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use std::borrow::Cow;

/// One request, and what came back so far.
struct Asked {
    head: RequestHead,
    /// The ranges of its data, in the order in which they came.
    content: Vec<(u64, u64)>,
    error: Option<u32>,
    answered: bool,
}

/// The client that [`newstyle_session`] talks to: it knows what was asked, and so what may come back.
struct Oracle {
    agreed: Agreed,
    /// What must come before the first reply.
    greeting: Vec<u8>,
    /// The request with the cookie 1, 2, ...
    asked: Vec<Asked>,
    /// All that it sends, and how much of it has been received.
    stream: Vec<u8>,
    said: usize,
    /// How the conversation should end.
    end: Result<End, Violation>,
    unparsed: Vec<u8>,
}

impl Oracle {
    /// Haggles as `input` does, then reads its requests as a server would and asks them with cookies of its own. A
    /// payload that is cut off is made up if `made_up`.
    fn new(input: &[u8], made_up: bool) -> Self {
        let Negotiation { said, end, used } = haggle(input, |most| most);
        let (taken, rest) = input.split_at(used);
        let mut this = Self {
            agreed: Agreed::default(),
            greeting: said,
            asked: Vec::new(),
            stream: taken.to_vec(),
            said: 0,
            end: Ok(End::EndOfStream),
            unparsed: Vec::new(),
        };
        match end {
            Ok(Some(Haggled::Transmission(agreed))) => {
                this.agreed = agreed;
                this.ask(rest, made_up);
                return this;
            }
            Err(violation) => this.end = Ok(End::Violation(violation)),
            Ok(Some(_)) => this.end = Ok(End::Abort),
            Ok(None) if !rest.is_empty() => this.end = Err(Violation::Truncated),
            Ok(None) => {}
        }
        this.stream.extend(rest);
        this
    }

    fn ask(&mut self, mut input: &[u8], made_up: bool) {
        let mut enough = PAYLOAD_MAX;
        while let Some((bytes, rest)) = input.split_first_chunk::<REQUEST_LEN>() {
            let (magic, head) = RequestHead::parse(bytes);
            let head = RequestHead { cookie: self.asked.len() as u64 + 1, ..head };
            let payload = u64::from(head.length);
            let reads = head.kind == kind::READ && payload <= SIZE;
            if head.kind != kind::WRITE && reads && payload > enough {
                return;
            }
            self.stream.extend(magic.to_be_bytes());
            self.stream.extend(head.encode().iter().skip(4));
            input = rest;
            if magic != REQUEST_MAGIC || head.kind == kind::DISC {
                let broken = magic != REQUEST_MAGIC;
                let violation = End::Violation(Violation::BadRequestMagic(magic));
                self.end = Ok(if broken { violation } else { End::Disconnect });
                self.stream.extend(input);
                return;
            }
            self.asked.push(Asked { head, content: Vec::new(), error: None, answered: false });
            if head.kind == kind::WRITE {
                let (payload, rest) = input.split_at(input.len().min(head.length as usize));
                self.stream.extend(payload);
                let missing = head.length as usize - payload.len();
                if made_up && missing as u64 <= enough {
                    self.stream.resize(self.stream.len() + missing, 0xA5);
                } else if missing > 0 {
                    self.end = Err(Violation::Truncated);
                }
                input = rest;
            }
            if head.kind == kind::WRITE || reads {
                let Some(left) = enough.checked_sub(payload) else { return };
                enough = left;
            }
        }
        if self.end == Ok(End::EndOfStream) && !input.is_empty() {
            self.end = Err(Violation::Truncated);
        }
        self.stream.extend(input);
    }

    /// Takes one whole message; its length in bytes.
    fn message(&mut self) -> Option<usize> {
        let mut fields = Fields(&self.unparsed);
        match fields.u32()? {
            SIMPLE_REPLY_MAGIC => {
                let (error, cookie) = (fields.u32()?, fields.u64()?);
                let structured = self.agreed.structured;
                let asked = self.asked.get_mut(usize::try_from(cookie).ok()?.checked_sub(1)?)?;
                let reads = asked.head.kind == kind::READ;
                let length = if reads && error == 0 { asked.head.length as usize } else { 0 };
                let data = self.unparsed.get(SIMPLE_REPLY_LEN..SIMPLE_REPLY_LEN + length)?;
                assert!(!structured || !reads && (asked.head.kind != kind::BLOCK_STATUS || error != 0));
                check_data(data, asked.head.offset);
                check_error(&asked.head, error, Style::Newstyle(self.agreed));
                assert!(!std::mem::replace(&mut asked.answered, true), "answered twice");
                Some(SIMPLE_REPLY_LEN + length)
            }
            STRUCTURED_REPLY_MAGIC => {
                assert!(self.agreed.structured, "nobody asked for structured replies");
                let (flags, kind, cookie, length) = (fields.u16()?, fields.u16()?, fields.u64()?, fields.u32()?);
                let payload = self.unparsed.get(CHUNK_LEN..CHUNK_LEN + length as usize)?;
                let asked = self.asked.get_mut(usize::try_from(cookie).ok()?.checked_sub(1)?)?;
                asked.chunk(flags, kind, payload, self.agreed);
                Some(CHUNK_LEN + length as usize)
            }
            magic => unreachable!("no reply begins with {magic:#x}"),
        }
    }
}

impl Client for Oracle {
    fn says(&self) -> Cow<'_, [u8]> {
        self.stream[self.said..].into()
    }

    fn said(&mut self, n: usize, _: u64) {
        self.said += n;
    }

    fn is_done(&self) -> bool {
        true
    }

    fn hear(&mut self, bytes: &[u8]) {
        self.unparsed.extend(bytes);
        let expected = self.greeting.len().min(self.unparsed.len());
        assert_eq!(self.unparsed.get(..expected), self.greeting.get(..expected), "what haggling alone would say");
        self.unparsed.drain(..expected);
        self.greeting.drain(..expected);
        while let Some(used) = self.message() {
            self.unparsed.drain(..used);
        }
    }
}

impl Asked {
    /// Takes one chunk of a structured reply.
    fn chunk(&mut self, flags: u16, kind: u16, payload: &[u8], agreed: Agreed) {
        assert!(!self.answered, "behind the last chunk");
        assert!(flags & !chunk::DONE == 0);
        let done = flags & chunk::DONE != 0;
        let mut fields = Fields(payload);
        match kind {
            chunk::NONE => assert!(done && payload.is_empty()),
            chunk::OFFSET_DATA | chunk::OFFSET_HOLE => {
                let offset = fields.u64().unwrap_or(u64::MAX);
                let length = if kind == chunk::OFFSET_HOLE {
                    assert_eq!(payload.len(), 12);
                    let length = u64::from(fields.u32().unwrap_or_default());
                    assert!((offset..offset + length).all(|at| content(at) == 0), "a hole where data is");
                    length
                } else {
                    check_data(fields.0, offset);
                    fields.0.len() as u64
                };
                let head = &self.head;
                assert!(head.kind == kind::READ && self.error.is_none() && length > 0);
                assert!(offset >= head.offset && head.end().is_some_and(|end| offset + length <= end), "inside");
                let overlaps = self.content.iter().any(|&(start, end)| offset < end && start < offset + length);
                assert!(!overlaps, "the same bytes twice");
                self.content.push((offset, offset + length));
            }
            chunk::BLOCK_STATUS => {
                assert!(agreed.allocation && self.head.kind == kind::BLOCK_STATUS && fields.u32() == Some(1));
                let mut at = self.head.offset;
                let mut before = None;
                while let Some((length, status)) = fields.u32().zip(fields.u32()) {
                    assert!(length > 0 && (before != Some(status)), "an extent of its own");
                    let zero = status == extent::HOLE_ZERO;
                    let end = at + u64::from(length);
                    assert!(zero || status == 0);
                    assert!(!zero || content(at) == 0 && content(end - 1) == 0, "a hole where data is");
                    at = end;
                    before = Some(status);
                }
                assert!(fields.0.is_empty() && before.is_some() && self.head.end().is_some_and(|end| at <= end));
                let one = self.head.flags & command::REQ_ONE != 0;
                assert!(!one || payload.len() == 12);
            }
            chunk::ERROR => {
                let (error, text) = (fields.u32().unwrap_or_default(), fields.u16().unwrap_or_default());
                assert!(error != 0 && fields.0.len() == usize::from(text) && text <= 4096);
                assert!(self.error.replace(error).is_none());
                check_error(&self.head, error, Style::Newstyle(agreed));
            }
            _ => unreachable!("chunks of type {kind} mean nothing here"),
        }
        if self.head.flags & command::DF != 0 {
            assert!(self.content.len() <= 1 && kind != chunk::OFFSET_HOLE, "in one piece");
        }
        if done {
            self.answered = true;
            let covered: u64 = self.content.iter().map(|(start, end)| end - start).sum();
            let all = self.head.kind != kind::READ || covered == u64::from(self.head.length);
            assert!(self.error.is_some() || all, "all of it");
        }
    }
}

/// A session whose export has a name, as that has which [`haggle`] knows.
fn named(export: Export, now_ms: u64) -> ServerSession {
    let mut session = ServerSession::newstyle(export, now_ms);
    session.name_export(NAME.into());
    session
}

/// A newstyle conversation from the server's side: haggling and requests, cut up, against a disk that has holes, is slow
/// and fails now and then.
///
/// # Panics
/// When anything comes out that is no right answer to what was asked, when the disk is asked for what cannot be, and
/// when the session holds too much, keeps memory for itself or gets stuck.
pub fn newstyle_session(data: &[u8]) {
    let (mut choices, input) = Choices::split(data);
    let cap = POOLS[choices.next() % POOLS.len()];
    let mut oracle = Oracle::new(input, choices.next() % 2 == 0);
    let server = Server { begin: named, size: SIZE, cap };
    let (end, _) = converse(server, &mut oracle, &mut Pattern, &mut choices.schedule());
    if !matches!(end, Err(Violation::ReplyCutShort(_))) {
        assert_eq!(end, oracle.end);
    }
    if end.is_ok() {
        let unanswered = oracle.asked.iter().filter(|asked| !asked.answered).count();
        assert_eq!((unanswered, oracle.unparsed.len(), oracle.greeting.len()), (0, 0, 0), "everything is answered");
    }
}
