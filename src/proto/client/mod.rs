//! One conversation with a server from the client's side: commands in, bytes out; bytes in, events out. What `read`,
//! `write` and a migration speak.
//!
//! Owns what was received and not understood yet, what waits to be sent, and the commands that are not answered. Never
//! sees a socket, a file or a clock.
//!
//! The greeting tells oldstyle from newstyle. Every reply is a simple one unless its caller wishes for more
//! ([`Wishes`]) and gets it; then those to READ and `BLOCK_STATUS` come in chunks, and each chunk is held against what was
//! asked before its caller hears of it.
//!
//! Specification: "Oldstyle negotiation", "Newstyle negotiation", "Request message", "Simple reply message", "Structured
//! reply chunk message".

mod account;
mod chunk;
mod cookies;
mod handshake;
#[cfg(test)]
mod structured_tests;
#[cfg(test)]
mod tests;
mod unanswered;

pub use chunk::{Descriptor, DESCRIPTORS_MAX};
pub use cookies::Cookies;
pub use handshake::Wishes;

use crate::buffer::{Buffer, Pool};
use crate::proto::error::Violation;
use crate::proto::export::{Agreed, Offer};
use crate::proto::outbox::{Outbox, PIECES_MAX};
use crate::proto::wire::{
    kind, Fields, RequestHead, SimpleReply, GREETING_LEN, IHAVEOPT, NBDMAGIC, NEWSTYLE_GREETING_LEN, OLDSTYLE_MAGIC,
    SIMPLE_REPLY_LEN, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};
use account::Asked;
use chunk::{Chunk, Parsed};
use handshake::{Haggle, Haggled};
use std::io::IoSlice;
use std::rc::Rc;
use unanswered::Unanswered;

/// How much is received at once, in bytes: thousands of replies, or a piece of data.
const RECEIVE: usize = 64 << 10;

/// Commands do not age here; their caller keeps the deadlines.
const AGELESS: u64 = 0;

/// What the server said.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a, T> {
    /// What the export is. It comes once and first; from now on commands may be given.
    Export(Offer),
    /// Bytes that a READ brings. Simple replies bring them in their order, structured ones in any; none comes twice. Until
    /// the reply has come, it may still fail.
    Data {
        /// What was noted with the READ.
        note: &'a T,
        /// Where in the export they are.
        offset: u64,
        /// What was read.
        bytes: &'a [u8],
    },
    /// Zeroes that a READ brings.
    Hole {
        /// What was noted with the READ.
        note: &'a T,
        /// Where in the export they are.
        offset: u64,
        /// How many there are.
        length: u32,
    },
    /// What a `BLOCK_STATUS` brings about `base:allocation`, from its beginning on: at most [`DESCRIPTORS_MAX`] extents. The
    /// last one may go beyond what was asked, and all of them may end before that.
    Extents {
        /// What was noted with the command.
        note: &'a T,
        /// The extents, one behind the other, none of them empty.
        descriptors: Vec<Descriptor>,
    },
    /// A command is answered, and all of its data has come unless there is an error.
    Reply {
        /// What was noted with the command.
        note: T,
        /// 0, or the error of the specification.
        error: u32,
    },
}

#[derive(Debug)]
enum State {
    /// With the name of the export to ask for.
    Greeting(String),
    Handshake(Haggle),
    Reply,
    /// Data of the READ with this cookie, and where in the export it is.
    Payload {
        cookie: u64,
        offset: u64,
        left: u32,
        /// The reply ends with it.
        is_last: bool,
    },
    /// The rest of a chunk, which nobody needs.
    Skip {
        cookie: u64,
        left: u32,
        is_last: bool,
    },
}

/// One conversation with a server. Each command carries a note of the caller's, which comes back with its reply.
#[derive(Debug)]
pub struct ClientSession<T> {
    state: State,
    wishes: Wishes,
    is_newstyle: bool,
    structured: bool,
    allocation_id: Option<u32>,
    inbox: Buffer,
    unanswered: Unanswered<T>,
    outbox: Outbox,
    /// Memory of the payloads that wait to be sent.
    buffered: usize,
}

impl<T> ClientSession<T> {
    /// A conversation about the export of this name, which is at most 4096 bytes long; an empty one is the default
    /// export. Its commands have the cookies 1, 2, ...
    pub fn new(export: String) -> Self {
        Self::with_cookies(export, Cookies::starting_at(1))
    }

    /// The same with these cookies.
    pub fn with_cookies(export: String, cookies: Cookies) -> Self {
        Self {
            state: State::Greeting(export),
            wishes: Wishes::default(),
            is_newstyle: false,
            structured: false,
            allocation_id: None,
            inbox: Buffer::with_capacity(RECEIVE),
            unanswered: Unanswered::new(cookies),
            outbox: Outbox::default(),
            buffered: 0,
        }
    }

    /// The same, which asks a newstyle server for more.
    pub fn with_wishes(export: String, wishes: Wishes) -> Self {
        Self { wishes, ..Self::new(export) }
    }

    /// Where to receive into. It is not empty when [`ClientSession::next_event`] has nothing more to say.
    pub fn recv_space(&mut self) -> &mut [u8] {
        self.inbox.compact();
        self.inbox.spare()
    }

    /// Counts `n` bytes received into [`ClientSession::recv_space`].
    pub fn received(&mut self, n: usize) {
        self.inbox.advance(n);
    }

    /// What the server said next. To be called until there is nothing more: `None` needs more bytes. After a
    /// [`Violation`] the connection has to be closed.
    pub fn next_event(&mut self) -> Result<Option<Event<'_, T>>, Violation> {
        loop {
            match &mut self.state {
                State::Greeting(_) => match self.take_greeting()? {
                    Greeted::NeedBytes => return Ok(None),
                    Greeted::Oldstyle(offer) => return Ok(Some(Event::Export(offer))),
                    Greeted::Newstyle => {}
                },
                State::Handshake(haggle) => {
                    let mut said = Vec::new();
                    let Some((used, haggled)) = haggle.step(self.inbox.filled(), &mut said)? else { return Ok(None) };
                    let allocation_id = haggle.allocation_id();
                    self.inbox.consume(used);
                    self.say(said);
                    if let Haggled::Transmission(offer) = haggled {
                        self.structured = offer.agreed.structured;
                        self.allocation_id = allocation_id;
                        self.state = State::Reply;
                        return Ok(Some(Event::Export(offer)));
                    }
                }
                State::Reply => {
                    let Some(bytes) = self.inbox.filled().first_chunk::<SIMPLE_REPLY_LEN>() else { return Ok(None) };
                    match SimpleReply::parse(bytes) {
                        (SIMPLE_REPLY_MAGIC, reply) => {
                            if let Some((note, error)) = self.take_simple(reply)? {
                                return Ok(Some(Event::Reply { note, error }));
                            }
                        }
                        (STRUCTURED_REPLY_MAGIC, _) if self.structured => {
                            let Some((cookie, chunk)) = self.take_chunk()? else { return Ok(None) };
                            match chunk {
                                Chunk::Hole { offset, length } => {
                                    let note = self.unanswered.note(cookie)?;
                                    return Ok(Some(Event::Hole { note, offset, length }));
                                }
                                Chunk::Extents { descriptors, .. } => {
                                    let note = self.unanswered.note(cookie)?;
                                    return Ok(Some(Event::Extents { note, descriptors }));
                                }
                                Chunk::Nothing | Chunk::Data { .. } | Chunk::Error { .. } => {}
                            }
                        }
                        (magic, _) => return Err(Violation::BadReplyMagic(magic)),
                    }
                }
                &mut (State::Payload { cookie, left: 0, is_last, .. } | State::Skip { cookie, left: 0, is_last }) => {
                    self.state = State::Reply;
                    if is_last {
                        let (note, error) = self.unanswered.finish(cookie)?;
                        return Ok(Some(Event::Reply { note, error }));
                    }
                }
                State::Payload { .. } | State::Skip { .. } if self.inbox.is_empty() => return Ok(None),
                State::Payload { cookie, offset, left, .. } => {
                    let note = self.unanswered.note(*cookie)?;
                    let bytes = self.inbox.take(*left as usize);
                    let taken = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    *left = left.saturating_sub(taken);
                    let behind = offset.saturating_add(taken.into());
                    return Ok(Some(Event::Data { note, offset: std::mem::replace(offset, behind), bytes }));
                }
                State::Skip { left, .. } => {
                    let taken = u32::try_from(self.inbox.take(*left as usize).len()).unwrap_or(u32::MAX);
                    *left = left.saturating_sub(taken);
                }
            }
        }
    }

    /// Queues a command. The payload of a WRITE has to follow before the next one ([`ClientSession::push_payload`]).
    pub fn command(&mut self, kind: u16, flags: u16, offset: u64, length: u32, note: T) {
        let cookie = self.unanswered.push(Asked { kind, offset, length }, note);
        self.outbox.push_head(&RequestHead { flags, kind, cookie, offset, length }.encode(), AGELESS);
    }

    /// Queues the payload of the last command, or the next piece of it.
    pub fn push_payload(&mut self, payload: Buffer) {
        self.buffered += payload.capacity();
        self.outbox.push_payload(payload, AGELESS);
    }

    /// The same with bytes that the caller keeps as well, until they are answered. They are let go of when they have left;
    /// their memory is the caller's, not the pool's, and counts for nothing here.
    pub fn push_shared(&mut self, payload: Rc<Buffer>) {
        self.outbox.push_shared(payload, AGELESS);
    }

    /// Queues DISC. A server does not answer that, it closes the connection.
    pub fn disconnect(&mut self) {
        let head = RequestHead { flags: 0, kind: kind::DISC, cookie: 0, offset: 0, length: 0 };
        self.outbox.push_head(&head.encode(), AGELESS);
    }

    /// The bytes to write next, for one vectored write; says how many slices it filled.
    pub fn to_send<'a>(&'a self, slices: &mut [IoSlice<'a>; PIECES_MAX]) -> usize {
        self.outbox.slices(slices)
    }

    /// The socket has taken the first `n` of those bytes.
    pub fn sent(&mut self, n: usize, pool: &mut Pool) {
        self.buffered -= self.outbox.sent(n, pool);
    }

    /// True when the server negotiates.
    pub fn is_newstyle(&self) -> bool {
        self.is_newstyle
    }

    /// True while there are bytes to write.
    pub fn wants_send(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Memory of the payloads that wait to be sent, in bytes.
    pub fn buffered(&self) -> usize {
        self.buffered
    }

    /// How many commands are not answered.
    pub fn unanswered(&self) -> usize {
        self.unanswered.len()
    }

    /// What was noted with the command that has waited longest for its answer.
    pub fn oldest(&self) -> Option<&T> {
        self.unanswered.oldest()
    }

    /// True when nothing is under way: every command has left and is answered, and not a byte has come that nobody
    /// asked for.
    pub fn is_quiet(&self) -> bool {
        self.outbox.is_empty() && self.unanswered.len() == 0 && self.inbox.is_empty()
    }

    /// Completes a sentence "the server …" that says what closing at this point means.
    pub fn explain_end(&self) -> &'static str {
        match &self.state {
            State::Greeting(_) => {
                "closed the connection before its greeting: its access control list may refuse this address, or it has \
                 no room for a client"
            }
            State::Handshake(haggle) if haggle.asked_by_name() => {
                "closed the connection when asked for the export, as a server does that has none of this name"
            }
            State::Handshake(_) => "closed the connection in the middle of the negotiation",
            State::Reply | State::Payload { .. } | State::Skip { .. } => "closed the connection half-way",
        }
    }

    /// Gives back all memory of the pool: the connection is gone.
    pub fn release(&mut self, pool: &mut Pool) {
        self.outbox.release(pool);
        self.buffered = 0;
    }

    /// The first 16 bytes tell what the server speaks. They are judged as soon as they are there, because something else
    /// than an NBD server often says less than a greeting and then waits.
    fn take_greeting(&mut self) -> Result<Greeted, Violation> {
        let State::Greeting(export) = &mut self.state else { return Ok(Greeted::NeedBytes) };
        let mut fields = Fields(self.inbox.filled());
        match fields.u64().zip(fields.u64()) {
            None => Ok(Greeted::NeedBytes),
            Some((NBDMAGIC, OLDSTYLE_MAGIC)) if !export.is_empty() => Err(Violation::NoExportNames),
            Some((NBDMAGIC, OLDSTYLE_MAGIC)) => {
                // Oldstyle has room for 32 bits of flags, of which the lower 16 mean something.
                let (Some(size), Some(_), Some(flags)) = (fields.u64(), fields.u16(), fields.u16()) else {
                    return Ok(Greeted::NeedBytes);
                };
                if self.inbox.len() < GREETING_LEN {
                    return Ok(Greeted::NeedBytes);
                }
                self.inbox.consume(GREETING_LEN);
                self.state = State::Reply;
                Ok(Greeted::Oldstyle(Offer { size, flags, agreed: Agreed::default() }))
            }
            Some((NBDMAGIC, IHAVEOPT)) => {
                let Some(offered) = fields.u16() else { return Ok(Greeted::NeedBytes) };
                self.inbox.consume(NEWSTYLE_GREETING_LEN);
                self.is_newstyle = true;
                let (haggle, said) = Haggle::begin(std::mem::take(export), self.wishes, offered);
                self.state = State::Handshake(haggle);
                self.say(said);
                Ok(Greeted::Newstyle)
            }
            Some((first, second)) => Err(Violation::NotNbd(first, second)),
        }
    }

    /// Queues a part of the handshake.
    fn say(&mut self, bytes: Vec<u8>) {
        if !bytes.is_empty() {
            self.outbox.push_text(bytes, AGELESS);
        }
    }

    /// Takes the simple reply that was received: the answer, unless data follows first.
    fn take_simple(&mut self, SimpleReply { error, cookie }: SimpleReply) -> Result<Option<(T, u32)>, Violation> {
        self.inbox.consume(SIMPLE_REPLY_LEN);
        let Asked { kind, offset, length } = self.unanswered.take_simple(cookie, error, self.structured)?;
        if error == 0 && kind == kind::READ && length > 0 {
            self.state = State::Payload { cookie, offset, left: length, is_last: true };
            return Ok(None);
        }
        let (note, _) = self.unanswered.finish(cookie)?;
        Ok(Some((note, error)))
    }

    /// Takes a chunk, once enough of it was received, and goes on to the rest of its payload.
    fn take_chunk(&mut self) -> Result<Option<(u64, Chunk)>, Violation> {
        let parsed = chunk::parse(self.inbox.filled())?;
        let Some(Parsed { cookie, is_last, chunk, used, left }) = parsed else { return Ok(None) };
        self.unanswered.take_chunk(cookie, &chunk, self.allocation_id)?;
        self.inbox.consume(used);
        self.state = match chunk {
            Chunk::Data { offset, .. } => State::Payload { cookie, offset, left, is_last },
            _ => State::Skip { cookie, left, is_last },
        };
        Ok(Some((cookie, chunk)))
    }
}

/// What a greeting led to.
enum Greeted {
    NeedBytes,
    Oldstyle(Offer),
    Newstyle,
}
