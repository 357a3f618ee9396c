//! One client's conversation from the server's side: bytes in, requests out; outcomes in, bytes out.
//!
//! Owns the memory of the conversation (what was received, payloads on their way in, replies on their way out) and the
//! list of requests that are not answered yet. Never sees a socket, a file or a clock; time comes in as a parameter.
//!
//! Specification: "Transmission", "Request types", "Error values", "Terminating the transmission phase".
//!
//! Invariants:
//! 1. No request is taken while requests and the heads of replies that wait are together [`IN_FLIGHT_MAX`] or more; a
//!    structured READ may have two heads for each slice, a hole and the data behind it.
//! 2. `buffered` is the memory of all buffers that requests and replies of this session own; it exceeds [`BUFFERED_MAX`] only
//!    by one buffer.
//! 3. The slices of one simple reply follow each other on the wire: a read that needs several runs alone.

pub mod handshake;
mod read;
mod reply;
pub mod request;
mod tally;
mod write;

pub use tally::Tally;

use crate::buffer::{Buffer, Pool, SLICE};
use crate::proto::error::{Errno, Violation};
use crate::proto::export::{Agreed, Export, Style};
use crate::proto::outbox::{Outbox, PIECES_MAX};
use crate::proto::wire::{kind, Greeting, RequestHead, OPTION_HEAD_LEN, REQUEST_LEN, REQUEST_MAGIC};
use crate::work::{Action, Done};
use handshake::{Haggle, Haggled, OPTION_MAX};
use request::{refuse, without_payload, Refusal, Request};
use slab::Slab;
use std::io::{self, IoSlice};
use std::ops::Range;
use write::Incoming;

/// Requests of one client that may be unanswered; further ones wait in the socket.
pub const IN_FLIGHT_MAX: usize = 32;
/// Memory one client's payloads may take, in bytes: four slices, so that sixteen busy clients fit the pool.
pub const BUFFERED_MAX: usize = 4 * SLICE;
/// How much is received at once besides a payload, in bytes: thousands of bare requests, fifteen writes of 4 KiB.
/// What is larger is received straight into the payload's buffer, so more here would only be copied once more.
const RECEIVE: usize = 64 << 10;
/// Slices of a long read or write end on multiples of this, in bytes, so that zero blocks stay whole ones for the disk,
/// and holes for the client.
const BLOCK: u64 = 4096;

/// Why a conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The client sent DISC.
    Disconnect,
    /// The client ended the negotiation.
    Abort,
    /// The client closed its side between two requests.
    EndOfStream,
    /// The client broke the protocol; it has been answered where that is owed.
    Violation(Violation),
}

/// Which requests may pass now. The others are kept: they wait where they are, and so does what comes behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// All of them.
    Everything,
    /// Those that do not change the export.
    Reads,
}

/// What [`ServerSession::next_step`] found.
#[derive(Debug)]
pub enum Step {
    /// Work for the disk.
    Request(Request),
    /// A request was refused; its reply comes when its payload has been swallowed.
    Refused(Refusal),
    /// Nothing to do before more bytes are received.
    NeedBytes,
    /// Nothing to do before something of this session is completed or sent.
    NeedRoom,
    /// The next request, or the payload that is being received, may not pass now.
    Kept,
}

/// What [`ServerSession::complete`] has taken: one piece of the work of a request.
#[derive(Debug)]
pub struct Completed {
    /// The request.
    pub head: RequestHead,
    /// The bytes of the export that may have changed, also when it failed.
    pub touched: Option<Range<u64>>,
    /// How it ended.
    pub result: Result<(), Failed>,
}

/// Why a piece of work failed, and what that means to the client.
#[derive(Debug)]
pub struct Failed {
    /// What the disk says.
    pub error: io::Error,
    /// What the client is told.
    pub errno: Errno,
    /// Set when the client cannot be told, because a simple reply that says the opposite has begun: the connection has
    /// to be closed for this reason.
    pub violation: Option<Violation>,
}

/// A request that is not answered yet.
#[derive(Debug)]
struct Pending {
    head: RequestHead,
    since_ms: u64,
    /// Pieces the disk has.
    in_disk: u32,
    /// Bytes of a READ that are queued for the client, or known to it as a hole.
    replied: u32,
    error: Option<Errno>,
}

#[derive(Debug)]
enum State {
    Handshake(Box<Haggle>),
    Request,
    Payload(Incoming),
    Closing(End),
}

/// One client's conversation.
#[derive(Debug)]
pub struct ServerSession {
    export: Export,
    style: Style,
    state: State,
    inbox: Option<Buffer>,
    /// From when on the message at the head of the inbox ages, and from when on those behind it do.
    inbox_ms: (u64, u64),
    /// When the peer was last heard of.
    received_ms: u64,
    pending: Slab<Pending>,
    /// The read that runs alone (invariant 3).
    long_read: Option<u32>,
    buffered: usize,
    outbox: Outbox,
    tally: Tally,
}

impl ServerSession {
    /// A session that greets in the oldstyle way ("Oldstyle negotiation").
    pub fn oldstyle(export: Export, now_ms: u64) -> Self {
        let flags = u32::from(export.flags(Style::Oldstyle));
        let greeting = Greeting { size: export.size, flags }.encode().to_vec();
        Self::new(export, Style::Oldstyle, State::Request, greeting, now_ms)
    }

    /// A session that negotiates first ("Newstyle negotiation").
    pub fn newstyle(export: Export, now_ms: u64) -> Self {
        let (haggle, greeting) = Haggle::begin(export);
        let style = Style::Newstyle(Agreed::default());
        Self::new(export, style, State::Handshake(Box::new(haggle)), greeting, now_ms)
    }

    fn new(export: Export, style: Style, state: State, greeting: Vec<u8>, now_ms: u64) -> Self {
        let mut outbox = Outbox::default();
        outbox.push_text(greeting, now_ms);
        Self {
            export,
            style,
            state,
            inbox: None,
            inbox_ms: (now_ms, now_ms),
            received_ms: now_ms,
            pending: Slab::new(),
            long_read: None,
            buffered: 0,
            outbox,
            tally: Tally::default(),
        }
    }

    /// Where to receive into, in this order: the rest of the payload's slice, then what follows it. At least one is not
    /// empty when the last step was [`Step::NeedBytes`].
    pub fn recv_space(&mut self, pool: &mut Pool) -> [&mut [u8]; 2] {
        if self.is_negotiating() {
            return [<&mut [u8]>::default(), self.handshake_space(pool)];
        }
        let (slice, followed_by_payload) = match &mut self.state {
            State::Payload(Incoming { slice: Some((buffer, room)), left, .. }) => {
                (buffer.spare().get_mut(..*room).unwrap_or_default(), *left > 0)
            }
            _ => (<&mut [u8]>::default(), false),
        };
        if followed_by_payload {
            return [slice, <&mut [u8]>::default()];
        }
        let inbox = match self.inbox.take() {
            // What is left of the last receive is the beginning of a message: little to move.
            Some(inbox) => pool.grow(RECEIVE, inbox),
            None => pool.take_up_to(RECEIVE).unwrap_or_else(|| pool.take_reserve()),
        };
        [slice, self.inbox.insert(inbox).spare()]
    }

    /// Room for a whole option, which has to be looked at in one piece, also while others hold all of the pool.
    fn handshake_space(&mut self, pool: &mut Pool) -> &mut [u8] {
        let mut inbox = self.inbox.take().unwrap_or_else(|| pool.take_beyond(OPTION_HEAD_LEN + OPTION_MAX));
        if inbox.capacity() < OPTION_HEAD_LEN + OPTION_MAX {
            let mut larger = pool.take_beyond(OPTION_HEAD_LEN + OPTION_MAX);
            larger.append(inbox.filled());
            pool.give(std::mem::replace(&mut inbox, larger));
        }
        inbox.compact();
        self.inbox.insert(inbox).spare()
    }

    /// Counts `n` bytes received into [`ServerSession::recv_space`] at `now_ms`.
    pub fn received(&mut self, mut n: usize, now_ms: u64) {
        if let State::Payload(Incoming { slice: Some((buffer, room)), .. }) = &mut self.state {
            let taken = n.min(*room);
            buffer.advance(taken);
            *room -= taken;
            n -= taken;
        }
        if let Some(inbox) = &mut self.inbox {
            if inbox.is_empty() {
                self.inbox_ms.0 = now_ms;
            }
            inbox.advance(n);
        }
        self.inbox_ms.1 = now_ms;
        self.received_ms = now_ms;
    }

    /// The peer has closed its side. [`Violation::Truncated`] when it did so inside a request.
    pub fn end_of_stream(&mut self) -> Result<(), Violation> {
        let between = self.inbox.as_ref().is_none_or(Buffer::is_empty);
        match self.state {
            State::Handshake(_) | State::Request if between => self.state = State::Closing(End::EndOfStream),
            State::Closing(_) => {}
            State::Handshake(_) | State::Request | State::Payload(_) => return Err(Violation::Truncated),
        }
        Ok(())
    }

    /// What to do next, of what may pass. To be called until it needs something.
    pub fn next_step(&mut self, pass: Pass, pool: &mut Pool) -> Step {
        if let Some(tag) = self.long_read {
            return self.read_on(tag, pool);
        }
        loop {
            let step = match &mut self.state {
                State::Handshake(_) => self.negotiate(),
                State::Request => self.take_request(pass, pool),
                State::Payload(_) => self.take_payload(pass, pool),
                // What comes behind the last request is not looked at, only kept from filling the socket.
                State::Closing(_) => {
                    self.drop_inbox(pool);
                    Some(Step::NeedBytes)
                }
            };
            if let Some(step) = step {
                return step;
            }
        }
    }

    /// Takes what became of one piece of work, and queues the reply or its next part. `None` when the tag is not one of
    /// this session.
    pub fn complete(&mut self, done: Done, pool: &mut Pool) -> Option<Completed> {
        let Done { tag, buffer, touched, extents, result, .. } = done;
        let Some(pending) = self.pending.get_mut(tag as usize) else {
            debug_assert!(false, "a tag nobody waits for");
            if let Some(buffer) = buffer {
                pool.give(buffer);
            }
            return None;
        };
        let head = pending.head;
        // A simple reply that has begun cannot take back that it is a good one.
        let has_begun = pending.replied > 0 && !self.style.structured();
        let result = result.map_err(|error| {
            let errno = Errno::of(&error, head.asks_for_fast_zero());
            Failed { error, errno, violation: has_begun.then_some(Violation::ReplyCutShort(errno)) }
        });
        pending.in_disk -= 1;
        pending.error = pending.error.or(result.as_ref().err().map(|failed| failed.errno));
        match (buffer, pending.error) {
            (Some(payload), None) if head.kind == kind::READ => self.queue_read(tag, &extents, payload, pool),
            (None, None) if head.kind == kind::BLOCK_STATUS => {
                let payload = reply::block_status(&extents);
                let begins = reply::block_status_begins(head.cookie, &payload);
                self.outbox.push_head(begins.filled(), pending.since_ms);
                self.outbox.push_text(payload, pending.since_ms);
                self.pending.remove(tag as usize);
            }
            (buffer, _) => {
                if let Some(buffer) = buffer {
                    self.buffered -= buffer.capacity();
                    pool.give(buffer);
                }
                if !has_begun {
                    self.finish_if_done(tag);
                }
            }
        }
        Some(Completed { head, touched, result })
    }

    /// The bytes to write next, for one vectored write; says how many slices it filled.
    pub fn to_send<'a>(&'a self, slices: &mut [IoSlice<'a>; PIECES_MAX]) -> usize {
        self.outbox.slices(slices)
    }

    /// The socket has taken the first `n` of those bytes.
    pub fn sent(&mut self, n: usize, pool: &mut Pool) {
        self.buffered -= self.outbox.sent(n, pool);
    }

    /// True while there are bytes to write.
    pub fn wants_send(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Why the conversation is over, once everything owed has been sent.
    pub fn finished(&self) -> Option<End> {
        match self.state {
            State::Closing(end) if self.pending.is_empty() && self.outbox.is_empty() => Some(end),
            _ => None,
        }
    }

    /// When the oldest request came that is not wholly answered, its first byte counting; `None` when idle.
    pub fn oldest_ms(&self) -> Option<u64> {
        let partial = self.inbox.as_ref().filter(|inbox| !inbox.is_empty()).map(|_| self.inbox_ms.0);
        let taken = self.pending.iter().map(|(_, pending)| pending.since_ms).min();
        [partial, taken, self.outbox.oldest_ms()].into_iter().flatten().min()
    }

    /// What was kept ([`Step::Kept`]) has been for `ms` milliseconds that do not count: it ages from so much later on,
    /// and so does what was received behind it. Everything else keeps its age.
    pub fn excuse(&mut self, ms: u64) {
        let later = |since_ms: &mut u64| *since_ms = since_ms.saturating_add(ms);
        later(&mut self.inbox_ms.0);
        later(&mut self.inbox_ms.1);
        if let State::Payload(Incoming { tag, .. }) = self.state {
            if let Some(pending) = self.pending.get_mut(tag as usize) {
                later(&mut pending.since_ms);
            }
        }
    }

    /// Gives back memory that the session does not need while it waits for its peer.
    pub fn park(&mut self, pool: &mut Pool) {
        match self.inbox.take() {
            Some(inbox) if inbox.is_empty() => pool.give(inbox),
            Some(inbox) => self.inbox = Some(pool.shrink(inbox)),
            None => {}
        }
    }

    /// Gives back all memory: the connection is gone.
    pub fn release(&mut self, pool: &mut Pool) {
        self.drop_inbox(pool);
        self.outbox.release(pool);
        if let State::Payload(Incoming { slice: Some((buffer, _)), .. }) =
            std::mem::replace(&mut self.state, State::Closing(End::EndOfStream))
        {
            pool.give(buffer);
        }
    }

    /// When the peer was last heard of, in milliseconds of whoever says what time it is.
    pub fn received_ms(&self) -> u64 {
        self.received_ms
    }

    /// True once the peer has begun to change the export.
    pub fn has_written(&self) -> bool {
        self.tally.writes > 0 || self.pending.iter().any(|(_, pending)| pending.head.changes_export())
    }

    /// What it has done so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    fn drop_inbox(&mut self, pool: &mut Pool) {
        if let Some(inbox) = self.inbox.take() {
            pool.give(inbox);
        }
    }

    /// True while no request can come yet.
    pub fn is_negotiating(&self) -> bool {
        matches!(self.state, State::Handshake(_))
    }

    /// How it speaks.
    pub fn style(&self) -> Style {
        self.style
    }

    /// Requests that are not answered yet.
    pub fn in_flight(&self) -> usize {
        self.pending.len() + self.outbox.replies()
    }

    /// One step of the negotiation. `None`: look again.
    fn negotiate(&mut self) -> Option<Step> {
        let State::Handshake(haggle) = &mut self.state else { return None };
        let mut replies = Vec::new();
        let found = haggle.step(self.inbox.as_ref().map(Buffer::filled).unwrap_or_default(), &mut replies);
        if !replies.is_empty() {
            self.outbox.push_text(replies, self.inbox_ms.1);
        }
        match found {
            Err(violation) => self.state = State::Closing(End::Violation(violation)),
            Ok(None) => return Some(Step::NeedBytes),
            Ok(Some((used, haggled))) => {
                if let Some(inbox) = &mut self.inbox {
                    inbox.consume(used);
                }
                self.inbox_ms.0 = self.inbox_ms.1;
                match haggled {
                    Haggled::More => {}
                    Haggled::Leave => self.state = State::Closing(End::Abort),
                    Haggled::Transmission(agreed) => {
                        self.style = Style::Newstyle(agreed);
                        self.state = State::Request;
                    }
                }
            }
        }
        None
    }

    /// Takes one request head from the inbox. `None`: look again, the state has changed.
    fn take_request(&mut self, pass: Pass, pool: &mut Pool) -> Option<Step> {
        let Some(bytes) = self.inbox.as_ref().and_then(|inbox| inbox.filled().first_chunk::<REQUEST_LEN>()) else {
            return Some(Step::NeedBytes);
        };
        if self.in_flight() >= IN_FLIGHT_MAX {
            return Some(Step::NeedRoom);
        }
        let (magic, head) = RequestHead::parse(bytes);
        if magic != REQUEST_MAGIC {
            if self.style == Style::Oldstyle {
                let reply = reply::failed(&head, Errno::Inval, self.style);
                self.outbox.push_head(reply.filled(), self.inbox_ms.0);
                self.tally.errors += 1;
            }
            self.state = State::Closing(End::Violation(Violation::BadRequestMagic(magic)));
            return None;
        }
        if head.kind == kind::DISC {
            self.state = State::Closing(End::Disconnect);
            return None;
        }
        let refusal = refuse(&head, self.export.size, self.style);
        if pass == Pass::Reads && refusal.is_none() && head.changes_export() {
            return Some(Step::Kept);
        }
        if refusal.is_none() && head.kind == kind::READ && head.length > 0 {
            return Some(self.start_read(head, pool));
        }
        let tag = self.accept(head);
        if let Some(refusal) = refusal {
            if let Some(pending) = self.pending.get_mut(tag as usize) {
                pending.error = Some(refusal.errno);
            }
            if head.kind == kind::WRITE && head.length > 0 {
                self.state = State::Payload(Incoming { tag, offset: head.offset, left: head.length, slice: None });
            } else {
                self.finish_if_done(tag);
            }
            return Some(Step::Refused(refusal));
        }
        if head.kind == kind::WRITE && head.length > 0 {
            self.state = State::Payload(Incoming { tag, offset: head.offset, left: head.length, slice: None });
            return None;
        }
        let action = without_payload(&head);
        if action.is_none() {
            self.finish_if_done(tag);
        }
        action.map(|action| self.hand_out(tag, head, action))
    }

    /// Moves a request head from the inbox to the list of those in flight.
    fn accept(&mut self, head: RequestHead) -> u32 {
        if let Some(inbox) = &mut self.inbox {
            inbox.consume(REQUEST_LEN);
        }
        let since_ms = std::mem::replace(&mut self.inbox_ms.0, self.inbox_ms.1);
        let tag = self.pending.insert(Pending { head, since_ms, in_disk: 0, replied: 0, error: None });
        debug_assert!(self.pending.len() <= IN_FLIGHT_MAX, "invariant 1");
        u32::try_from(tag).unwrap_or(u32::MAX)
    }

    fn hand_out(&mut self, tag: u32, head: RequestHead, action: Action) -> Step {
        if let Some(pending) = self.pending.get_mut(tag as usize) {
            pending.in_disk += 1;
        }
        Step::Request(Request { head, tag, action })
    }

    /// A buffer for up to `len` bytes of payload, if this session may hold one more.
    fn take_buffer(&mut self, len: usize, pool: &mut Pool) -> Option<Buffer> {
        let want = len.min(SLICE);
        if self.buffered > 0 && self.buffered + want > BUFFERED_MAX {
            return None;
        }
        let reserve = self.buffered == 0;
        let buffer = pool.take_up_to(want).or_else(|| reserve.then(|| pool.take_reserve()))?;
        self.buffered += buffer.capacity();
        Some(buffer)
    }

    /// Answers a request of which the disk has no piece any more and whose payload has arrived.
    fn finish_if_done(&mut self, tag: u32) {
        let receiving = matches!(&self.state, State::Payload(incoming) if incoming.tag == tag);
        let waits = self.pending.get(tag as usize).is_none_or(|pending| pending.in_disk > 0);
        if receiving || waits {
            return;
        }
        let Pending { head, since_ms, error, .. } = self.pending.remove(tag as usize);
        self.long_read = self.long_read.filter(|&long| long != tag);
        let reply = match error {
            None => reply::done(&head, self.style),
            Some(errno) => reply::failed(&head, errno, self.style),
        };
        self.outbox.push_head(reply.filled(), since_ms);
        let bytes = if error.is_none() { u64::from(head.length) } else { 0 };
        self.tally.errors += u64::from(error.is_some());
        match head.kind {
            kind::READ => self.tally.reads += 1,
            kind::WRITE | kind::WRITE_ZEROES => {
                self.tally.writes += 1;
                self.tally.written_bytes += bytes;
            }
            kind::TRIM => self.tally.trims += 1,
            kind::FLUSH => self.tally.flushes += 1,
            _ => {}
        }
    }
}

/// How many of the `left` bytes at `offset` go into a slice of `capacity` bytes: all, or as many as end on a block.
fn slice_len(offset: u64, left: u32, capacity: usize) -> u32 {
    let capacity = u32::try_from(capacity).unwrap_or(u32::MAX);
    if left <= capacity {
        return left;
    }
    let over = (offset.wrapping_add(u64::from(capacity)) % BLOCK) as u32;
    if over < capacity {
        capacity - over
    } else {
        capacity
    }
}
