//! One client's conversation from the server's side: bytes in, requests out; outcomes in, bytes out.
//!
//! Owns what was received and not understood yet, the requests that are not answered, the payloads on their way in and
//! the replies on their way out. Never sees a socket, a file or a clock; time comes in as a parameter.
//!
//! Specification: "Transmission", "Request types", "Error values", "Terminating the transmission phase".
//!
//! Invariants:
//! 1. No request is taken while requests and the heads of replies that wait are together [`IN_FLIGHT_MAX`] or more; a
//!    structured READ may have two heads for each slice, a hole and the data behind it.
//! 2. The slices of one simple reply follow each other on the wire: a READ that needs several runs alone.
//! 3. A simple reply to a READ of up to 4 MiB begins only when all of it can be read.

pub mod handshake;
mod inbox;
mod load;
mod memory;
mod negotiation;
mod parting;
mod read;
mod reading;
mod reply;
pub mod request;
mod step;
mod stopwatch;
mod tally;
mod unanswered;
mod write;

pub use load::Load;
pub use memory::BUFFERED_MAX;
pub use step::{Allowed, Completed, End, Failed, Step};
pub use stopwatch::Took;
pub use tally::Tally;

use crate::buffer::Pool;
use crate::proto::error::{Errno, Violation};
use crate::proto::export::{Agreed, Export, Style};
use crate::proto::outbox::{Outbox, PIECES_MAX};
use crate::proto::wire::{command, kind, Greeting, RequestHead, OPTION_HEAD_LEN, REQUEST_LEN, REQUEST_MAGIC};
use crate::work::{Action, Done};
use handshake::{Haggle, OPTION_MAX};
use inbox::Inbox;
use memory::Memory;
use read::{LongRead, Slice};
use request::{refuse, without_payload, Request};
use std::io::IoSlice;
use std::rc::Rc;
use stopwatch::Stopwatch;
use unanswered::{Pending, Unanswered};
use write::{Arriving, Piece};

/// Requests of one client that may be unanswered; further ones wait in the socket.
pub const IN_FLIGHT_MAX: usize = 32;
const _: () = assert!(PIECES_MAX >= 2 * IN_FLIGHT_MAX, "one write takes a head and a payload for each request");

#[derive(Debug)]
enum State {
    Handshake(Box<Haggle>),
    Request,
    Payload(Arriving),
    Closing(End),
}

/// One client's conversation.
#[derive(Debug)]
pub struct ServerSession {
    export: Export,
    style: Style,
    state: State,
    inbox: Inbox,
    unanswered: Unanswered,
    /// The READ that runs alone (invariant 2).
    long_read: Option<LongRead>,
    memory: Memory,
    outbox: Outbox,
    tally: Tally,
    /// Of the requests that were taken and not refused since [`ServerSession::take_load`].
    load: Load,
    stopwatch: Stopwatch,
    /// What the request took that was answered last.
    took: Option<Took>,
    /// When something came last of a WRITE or `WRITE_ZEROES` that was not refused.
    wrote_ms: Option<u64>,
    /// Every change is done as if FUA were set.
    durable: bool,
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

    /// A client that negotiates finds the export by this name, too.
    pub fn name_export(&mut self, name: Rc<str>) {
        if let State::Handshake(haggle) = &mut self.state {
            haggle.name_export(name);
        }
    }

    fn new(export: Export, style: Style, state: State, greeting: Vec<u8>, now_ms: u64) -> Self {
        let mut outbox = Outbox::default();
        outbox.push_text(greeting, now_ms);
        Self {
            export,
            style,
            state,
            inbox: Inbox::new(now_ms),
            unanswered: Unanswered::default(),
            long_read: None,
            memory: Memory::default(),
            outbox,
            tally: Tally::default(),
            load: Load::default(),
            stopwatch: Stopwatch::default(),
            took: None,
            wrote_ms: None,
            durable: false,
        }
    }

    /// From now on no change is answered before it is on stable storage, whether its FUA flag is set or not.
    pub fn make_durable(&mut self) {
        self.durable = true;
    }

    /// The export has this size from now on, in bytes: requests may go up to it.
    pub fn resize_export(&mut self, size: u64) {
        self.export.size = size;
        if let State::Handshake(haggle) = &mut self.state {
            haggle.resize_export(size);
        }
    }

    /// Tells the time, in microseconds, by which it is measured how long requests take.
    pub fn note_time(&mut self, now_us: u64) {
        self.stopwatch.now_us = now_us;
    }

    /// Where to receive into, in this order: the rest of the payload's slice, then what follows it. Both are empty after
    /// [`Step::NeedBytes`] only when memory has run out.
    pub fn recv_space(&mut self, pool: &mut Pool) -> [&mut [u8]; 2] {
        let (slice, may_follow) = match &mut self.state {
            State::Handshake(_) => {
                return [<&mut [u8]>::default(), self.inbox.space_for(OPTION_HEAD_LEN + OPTION_MAX, pool)];
            }
            State::Payload(incoming) => incoming.space(),
            State::Request | State::Closing(_) => (<&mut [u8]>::default(), true),
        };
        [slice, if may_follow { self.inbox.space(pool) } else { <&mut [u8]>::default() }]
    }

    /// Counts `n` bytes received into [`ServerSession::recv_space`] at `now_ms`.
    pub fn received(&mut self, n: usize, now_ms: u64) {
        let taken = match &mut self.state {
            State::Payload(incoming) => {
                if self.unanswered.get(incoming.tag()).is_some_and(|pending| pending.error.is_none()) {
                    self.wrote_ms = Some(now_ms);
                }
                incoming.received(n)
            }
            State::Handshake(_) | State::Request | State::Closing(_) => 0,
        };
        self.inbox.received(n - taken, now_ms);
        self.stopwatch.received_us = self.stopwatch.now_us;
    }

    /// The peer has closed its side. [`Violation::Truncated`] when it did so inside a request.
    pub fn end_of_stream(&mut self) -> Result<(), Violation> {
        match self.state {
            State::Handshake(_) | State::Request if self.inbox.is_empty() => {
                self.state = State::Closing(End::EndOfStream);
            }
            State::Closing(_) => {}
            State::Handshake(_) | State::Request | State::Payload(_) => return Err(Violation::Truncated),
        }
        Ok(())
    }

    /// What to do next, of what may pass. To be called until it needs something.
    pub fn next_step(&mut self, allowed: Allowed, pool: &mut Pool) -> Step {
        if self.long_read.is_some() {
            return self.read_on(pool).unwrap_or(Step::NeedRoom);
        }
        loop {
            let step = match &self.state {
                State::Handshake(_) => self.negotiate(),
                State::Request => self.take_request(allowed, pool),
                State::Payload(_) => self.take_payload(allowed, pool),
                // What comes behind the last request is drained, so that it does not fill the socket.
                State::Closing(_) => {
                    self.inbox.release(pool);
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
        let Some(pending) = self.unanswered.get_mut(tag) else {
            debug_assert!(false, "a tag nobody waits for");
            if let Some(buffer) = buffer {
                pool.give(buffer);
            }
            return None;
        };
        let Pending { head, since_ms, .. } = *pending;
        // A simple reply that has begun cannot take back that it is a good one.
        let has_begun = pending.replied > 0 && !self.style.structured();
        let result = result.map_err(|error| {
            let errno = Errno::of(&error, head.asks_for_fast_zero());
            Failed { error, errno, violation: has_begun.then_some(Violation::ReplyCutShort(errno)) }
        });
        self.took = None;
        pending.in_work -= 1;
        pending.error = pending.error.or(result.as_ref().err().map(|failed| failed.errno));
        match (buffer, pending.error) {
            (Some(payload), None) if head.kind == kind::READ => {
                self.read_arrived(tag, Slice { hole: extents, payload }, pool);
            }
            (None, None) if head.kind == kind::READ => {
                if let Some(long) = &mut self.long_read {
                    long.verified();
                }
                self.queue_long_read(pool);
            }
            (None, None) if head.kind == kind::BLOCK_STATUS => {
                let payload = reply::block_status(&extents);
                self.outbox.push_head(reply::block_status_begins(head.cookie, &payload).filled(), since_ms);
                self.outbox.push_text(payload, since_ms);
                self.note_answered(tag, None);
            }
            (buffer, _) => {
                if let Some(buffer) = buffer {
                    self.memory.give(buffer, pool);
                }
                if let Some(long) = self.long_read.as_mut().filter(|_| head.kind == kind::READ) {
                    long.release(&mut self.memory, pool);
                }
                if !has_begun {
                    self.answer_if_done(tag);
                }
            }
        }
        Some(Completed { head, touched, result, took: self.took.take() })
    }

    /// The bytes to write next, for one vectored write; says how many slices it filled.
    pub fn to_send<'a>(&'a self, slices: &mut [IoSlice<'a>; PIECES_MAX]) -> usize {
        self.outbox.slices(slices)
    }

    /// The socket has taken the first `n` of those bytes.
    pub fn sent(&mut self, n: usize, pool: &mut Pool) {
        self.memory.note_given(self.outbox.sent(n, pool));
    }

    /// True while there are bytes to write.
    pub fn wants_send(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Why the conversation is over, once everything owed has been sent.
    pub fn finished(&self) -> Option<End> {
        match self.state {
            State::Closing(end) if self.unanswered.is_empty() && self.outbox.is_empty() => Some(end),
            _ => None,
        }
    }

    /// When the oldest request came that is not wholly answered, its first byte counting; `None` when idle.
    pub fn oldest_ms(&self) -> Option<u64> {
        [self.inbox.oldest_ms(), self.unanswered.oldest_ms(), self.outbox.oldest_ms()].into_iter().flatten().min()
    }

    /// The request that was kept ([`Step::Kept`]) starts to age `ms` milliseconds later, and so does what was received
    /// behind it, which could not pass either. Everything else keeps its age.
    pub fn excuse(&mut self, ms: u64) {
        self.inbox.excuse(ms);
        if let State::Payload(incoming) = &self.state {
            if let Some(pending) = self.unanswered.get_mut(incoming.tag()) {
                pending.since_ms = pending.since_ms.saturating_add(ms);
            }
        }
    }

    /// Gives back memory that the session does not need while it waits for its peer.
    pub fn park(&mut self, pool: &mut Pool) {
        self.inbox.park(pool);
    }

    /// Gives back all memory: the connection is gone.
    pub fn release(&mut self, pool: &mut Pool) {
        self.inbox.release(pool);
        self.outbox.release(pool);
        if let Some(mut long) = self.long_read.take() {
            long.release(&mut self.memory, pool);
        }
        if let State::Payload(incoming) = std::mem::replace(&mut self.state, State::Closing(End::EndOfStream)) {
            incoming.release(&mut self.memory, pool);
        }
    }

    /// When something came last of a WRITE or `WRITE_ZEROES` that has a length and was not refused; `None` before the first.
    pub fn wrote_ms(&self) -> Option<u64> {
        self.wrote_ms
    }

    /// What it has done so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// What the next request asks for, if one has come that could be taken. `None` inside a payload or a READ that runs alone:
    /// those go on.
    pub fn upcoming(&self) -> Option<Load> {
        let (State::Request, None) = (&self.state, &self.long_read) else { return None };
        let (magic, head) = RequestHead::parse(self.inbox.filled().first_chunk()?);
        let is_good = magic == REQUEST_MAGIC && head.kind != kind::DISC;
        (is_good && refuse(&head, self.export, self.style).is_none()).then(|| Load::of(&head))
    }

    /// What the requests ask for that were taken since this was called last, and not refused.
    pub fn take_load(&mut self) -> Load {
        std::mem::take(&mut self.load)
    }

    /// True when what comes next is a request, and others are not answered yet.
    pub fn may_wait(&self) -> bool {
        matches!(self.state, State::Request) && self.in_flight() > 0
    }

    /// True when the client has said anything, of what was measured ([`ServerSession::note_time`]).
    pub fn has_received(&self) -> bool {
        self.stopwatch.received_us > 0
    }

    /// True while no request can come yet.
    pub fn is_negotiating(&self) -> bool {
        matches!(self.state, State::Handshake(_))
    }

    /// What was agreed on.
    pub fn style(&self) -> Style {
        self.style
    }

    /// Requests that are not answered yet.
    pub fn in_flight(&self) -> usize {
        self.unanswered.len() + self.outbox.heads()
    }

    /// Takes one request head from the inbox. `None`: look again, the state has changed.
    fn take_request(&mut self, allowed: Allowed, pool: &mut Pool) -> Option<Step> {
        let Some(bytes) = self.inbox.filled().first_chunk::<REQUEST_LEN>() else { return Some(Step::NeedBytes) };
        if self.in_flight() >= IN_FLIGHT_MAX {
            return Some(Step::NeedRoom);
        }
        let (magic, mut head) = RequestHead::parse(bytes);
        if magic != REQUEST_MAGIC {
            if self.style == Style::Oldstyle {
                let reply = reply::failed(&head, Errno::Inval, self.style);
                self.outbox.push_head(reply.filled(), self.inbox.take_message(REQUEST_LEN));
                self.tally.errors += 1;
            }
            self.state = State::Closing(End::Violation(Violation::BadRequestMagic(magic)));
            return None;
        }
        if head.kind == kind::DISC {
            self.state = State::Closing(End::Disconnect);
            return None;
        }
        let refusal = refuse(&head, self.export, self.style);
        if self.durable && head.changes_export() {
            head.flags |= command::FUA;
        }
        if allowed == Allowed::Reads && refusal.is_none() && head.changes_export() {
            return Some(Step::Kept);
        }
        if refusal.is_none() && head.kind == kind::READ && head.length > 0 {
            return Some(self.start_read(head, pool));
        }
        if refusal.is_none() && head.writes() {
            self.wrote_ms = Some(self.inbox.received_ms());
        }
        let tag = self.accept(head);
        if let (Some(refusal), Some(pending)) = (refusal, self.unanswered.get_mut(tag)) {
            pending.error = Some(refusal.errno);
        } else {
            self.load += Load::of(&head);
        }
        if head.kind == kind::WRITE && head.length > 0 {
            self.state = State::Payload(Arriving::new(tag, &head));
            return refusal.map(Step::Refused);
        }
        if let Some(action) = without_payload(&head).filter(|_| refusal.is_none()) {
            return Some(self.hand_out(tag, head, action));
        }
        self.answer_if_done(tag);
        refusal.map(Step::Refused)
    }

    /// Moves a request from the inbox to those that are not answered; returns its tag.
    fn accept(&mut self, head: RequestHead) -> u32 {
        let since_ms = self.inbox.take_message(REQUEST_LEN);
        let tag = self.unanswered.push(head, since_ms, self.stopwatch.received_us);
        debug_assert!(self.unanswered.len() <= IN_FLIGHT_MAX, "invariant 1");
        tag
    }

    fn hand_out(&mut self, tag: u32, head: RequestHead, action: Action) -> Step {
        if let Some(pending) = self.unanswered.get_mut(tag) {
            pending.in_work += 1;
            pending.times.asked_us.get_or_insert(self.stopwatch.now_us);
        }
        Step::Request(Request { head, tag, action })
    }

    /// Hands on what has come of a payload. `None`: look again, the state has changed.
    fn take_payload(&mut self, allowed: Allowed, pool: &mut Pool) -> Option<Step> {
        let State::Payload(incoming) = &mut self.state else { return None };
        let tag = incoming.tag();
        let Some(&Pending { head, error: None, .. }) = self.unanswered.get(tag) else {
            if !incoming.swallow(&mut self.inbox, &mut self.memory, pool) {
                return Some(Step::NeedBytes);
            }
            self.state = State::Request;
            self.answer_if_done(tag);
            return None;
        };
        match incoming.step(allowed, &mut self.inbox, &mut self.memory, pool) {
            Piece::NeedBytes => Some(Step::NeedBytes),
            Piece::NeedRoom => Some(Step::NeedRoom),
            Piece::Kept => Some(Step::Kept),
            Piece::Slice { action, is_last } => {
                if is_last {
                    self.state = State::Request;
                }
                Some(self.hand_out(tag, head, action))
            }
        }
    }

    /// Answers a request of which no piece is in work any more and whose payload has arrived.
    fn answer_if_done(&mut self, tag: u32) {
        let is_arriving = matches!(&self.state, State::Payload(incoming) if incoming.tag() == tag);
        let Some(Pending { head, since_ms, in_work: 0, error, .. }) = self.unanswered.get(tag) else { return };
        if is_arriving {
            return;
        }
        let reply = match error {
            None => reply::done(head, self.style),
            Some(errno) => reply::failed(head, *errno, self.style),
        };
        self.outbox.push_head(reply.filled(), *since_ms);
        let error = *error;
        self.note_answered(tag, error);
    }

    /// The reply to a request is queued to its end.
    fn note_answered(&mut self, tag: u32, error: Option<Errno>) {
        // It ran alone.
        self.long_read = None;
        if let Some(answered) = self.unanswered.take(tag) {
            self.tally.note(&answered.head, error);
            self.took = self.stopwatch.took(answered.times);
        }
    }
}
