//! A `ClientSession` and a `ServerSession`, the disk and the memory between them, and the rules that hold all along.

use crate::plan::{is_fua, Ask, Plan};
use flexnbd::buffer::{Pool, SLICE};
use flexnbd::proto::client::{ClientSession, Event};
use flexnbd::proto::error::{Errno, Violation};
use flexnbd::proto::export::{Export, Offer, Style};
use flexnbd::proto::outbox::PIECES_MAX;
use flexnbd::proto::server::request::Request;
use flexnbd::proto::server::{End, Failed, Pass, ServerSession, Step, Tally, BUFFERED_MAX, IN_FLIGHT_MAX};
use flexnbd::proto::wire::{kind, GREETING_LEN, REQUEST_LEN};
use flexnbd::work::{Action, Done};
use std::collections::HashSet;
use std::io::{ErrorKind, IoSlice};

/// The pool the server has: the bound of one session shows in it.
pub const ROOMY: usize = 16 << 20;
/// The most memory a session holds beside its payloads, in bytes: what it receives into.
const INBOX: usize = 64 << 10;

/// Zero blocks of this many bytes are kept out of files, so that a write must not be cut up inside one.
const BLOCK: u64 = 4096;

/// What may happen next.
#[derive(Debug, Clone, Copy)]
pub struct Can {
    /// The session has more steps.
    pub go_on: bool,
    /// Bytes that may be received.
    pub receive: usize,
    /// How many have been.
    pub received: usize,
    /// The end of the stream may be received.
    pub hang_up: bool,
    /// Pieces of work that may be completed.
    pub complete: usize,
    /// Bytes that may be sent.
    pub send: usize,
}

/// What happens next. Numbers are at most what [`Can`] says.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    GoOn,
    Receive(usize),
    HangUp,
    Complete(usize),
    Send(usize),
    /// Memory is given back while the session waits.
    Park,
    /// Which requests may pass from now on.
    Pass(Pass),
}

/// Decides how a conversation is cut up and interleaved.
pub trait Schedule {
    fn choose(&mut self, can: &Can) -> Act;
    /// The time, which never goes back.
    fn now_ms(&mut self) -> u64;
}

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// By request: the error and the data, as far as they came.
    pub replies: Vec<Option<(u32, Vec<u8>)>>,
    /// All that the server sent.
    pub wire: Vec<u8>,
    pub disk: Vec<u8>,
    pub tally: Tally,
    pub end: Option<Result<End, Violation>>,
}

/// What a disk says when its client shall be told this.
fn error(errno: Errno) -> ErrorKind {
    match errno {
        Errno::NoSpc => ErrorKind::StorageFull,
        Errno::Perm => ErrorKind::PermissionDenied,
        Errno::NoMem => ErrorKind::OutOfMemory,
        _ => ErrorKind::Other,
    }
}

/// What the client has made of the bytes sent to it, and when it should have been served.
struct Client<'a> {
    plan: &'a Plan,
    session: ClientSession<u64>,
    /// When the first byte of each request was received, until its reply is complete.
    since_ms: Vec<Option<u64>>,
    complete: Vec<bool>,
}

impl Client<'_> {
    fn receive(&mut self, mut bytes: &[u8], outcome: &mut Outcome) {
        outcome.wire.extend_from_slice(bytes);
        while !bytes.is_empty() {
            let n = std::io::Read::read(&mut bytes, self.session.recv_space()).unwrap();
            assert!(n > 0, "it needs bytes and has no space");
            self.session.received(n);
            while let Some(event) = self.session.next_event().expect("the server speaks NBD") {
                match event {
                    Event::Export(offer) => {
                        let export = Export { size: self.plan.before.len() as u64 };
                        assert_eq!(offer, Offer { size: export.size, flags: export.flags(Style::Oldstyle) });
                    }
                    Event::Data { note: &cookie, bytes } => {
                        outcome.replies[index(cookie)].get_or_insert_default().1.extend_from_slice(bytes);
                    }
                    Event::Reply { note: cookie, error } => {
                        let reply = outcome.replies[index(cookie)].get_or_insert_default();
                        assert!(reply.1.is_empty() || error == 0, "data of a READ that failed");
                        reply.0 = error;
                        self.since_ms[index(cookie)] = None;
                        assert!(!std::mem::replace(&mut self.complete[index(cookie)], true), "answered twice");
                    }
                }
            }
        }
    }

    fn note_received(&mut self, from: usize, to: usize, now_ms: u64) {
        for (ask, since_ms) in self.plan.asks.iter().zip(&mut self.since_ms) {
            if (from..to).contains(&ask.at) {
                *since_ms = Some(now_ms);
            }
            if !ask.is_answered() && to >= ask.at + REQUEST_LEN {
                *since_ms = None;
            }
        }
    }
}

fn index(cookie: u64) -> usize {
    usize::try_from(cookie).unwrap() - 1
}

/// Does the work at once, in the order it is handed out, as an engine in a queue does; it is reported later.
fn work(ask: &Ask, request: Request, disk: &mut [u8], durable: &mut bool) -> Done {
    let Request { head, tag, action } = request;
    assert_eq!(head, ask.head);
    let touched = action.touches();
    let fails = |offset: u64, length: usize| {
        let from = offset.checked_sub(ask.head.offset).expect("a piece of the request");
        assert!(from + length as u64 <= u64::from(ask.head.length), "a piece of the request");
        ask.fault.filter(|fault| (from..from + length as u64).contains(&u64::from(fault.at))).map(|fault| fault.errno)
    };
    let place =
        |offset: u64, length: usize| usize::try_from(offset).unwrap()..usize::try_from(offset).unwrap() + length;
    let untouched = ask.fault.is_some();
    let (failed, buffer) = match action {
        Action::Read { offset, length, mut buffer, .. } => {
            let error = fails(offset, length);
            if error.is_none() {
                assert_eq!((buffer.len(), buffer.append(&disk[place(offset, length)])), (0, length));
            }
            (error, Some(buffer))
        }
        Action::Write { offset, payload, fua } => {
            *durable = fua;
            let end = offset + payload.len() as u64;
            let last = Some(end) == ask.head.end();
            assert!(last || end % BLOCK == 0 && !fua, "blocks stay whole, and what is durable is so at the end");
            let error = fails(offset, payload.len());
            if !untouched {
                disk[place(offset, payload.len())].copy_from_slice(payload.filled());
            }
            (error, Some(payload))
        }
        Action::Zero { offset, length, fua, .. } | Action::Trim { offset, length, fua } => {
            *durable = fua;
            let length = usize::try_from(length).unwrap();
            let error = fails(offset, length);
            if !untouched {
                disk[place(offset, length)].fill(0);
            }
            (error, None)
        }
        Action::Cache { .. } | Action::Map { .. } => panic!("an oldstyle client cannot ask for that"),
        Action::Flush => (ask.fault.map(|fault| fault.errno), None),
    };
    let result = failed.map_or(Ok(()), |errno| Err(error(errno).into()));
    Done { owner: 0, tag, buffer, touched, extents: Vec::new(), result }
}

/// The two sessions and what is between them.
struct Pair<'a> {
    plan: &'a Plan,
    cap: usize,
    pool: Pool,
    server: ServerSession,
    client: Client<'a>,
    opened_ms: u64,
    /// Bytes of the stream that the server has received, and whether its end too.
    received: usize,
    ended: bool,
    pass: Pass,
    done: Vec<Done>,
    /// Whether the last piece of each request was to be made durable.
    durable: Vec<bool>,
    outcome: Outcome,
}

/// Holds the conversation. The pool owns at most `cap` bytes besides reserve buffers.
pub fn run(plan: &Plan, cap: usize, schedule: &mut dyn Schedule) -> Outcome {
    let opened_ms = schedule.now_ms();
    let requests = plan.asks.len();
    let mut pair = Pair {
        plan,
        cap,
        pool: Pool::new(cap),
        server: ServerSession::oldstyle(Export { size: plan.before.len() as u64 }, opened_ms),
        client: Client {
            plan,
            session: plan.client(),
            since_ms: vec![None; requests],
            complete: vec![false; requests],
        },
        opened_ms,
        received: 0,
        ended: false,
        pass: Pass::Everything,
        done: Vec::new(),
        durable: vec![false; requests],
        outcome: Outcome { disk: plan.before.clone(), replies: vec![None; requests], ..Outcome::default() },
    };
    loop {
        let can = pair.step();
        if let Some(end) = pair.server.finished() {
            assert_eq!((can.complete, can.send), (0, 0), "nothing is owed");
            return pair.finish(Ok(end));
        }
        let now_ms = schedule.now_ms();
        if let Err(violation) = pair.act(schedule.choose(&can), now_ms) {
            return pair.finish(Err(violation));
        }
    }
}

impl Pair<'_> {
    /// Takes one step of the server and says what may happen then.
    fn step(&mut self) -> Can {
        let (mut go_on, mut needs_bytes) = (false, false);
        match self.server.next_step(self.pass, &mut self.pool) {
            Step::Request(request) => {
                let at = index(request.head.cookie);
                assert!(self.pass == Pass::Everything || request.action.touches().is_none(), "only reads may pass");
                let (disk, durable) = (&mut self.outcome.disk, &mut self.durable[at]);
                self.done.push(work(&self.plan.asks[at], request, disk, durable));
                go_on = true;
            }
            Step::Refused(refusal) => {
                assert_eq!(self.plan.asks[index(refusal.head.cookie)].error, refusal.errno.to_wire());
                go_on = true;
            }
            Step::NeedBytes => {
                needs_bytes = true;
                let greeting = (self.outcome.wire.len() < GREETING_LEN).then_some(self.opened_ms);
                let oldest_ms = self.client.since_ms.iter().flatten().copied().chain(greeting).min();
                assert_eq!(self.server.oldest_ms(), oldest_ms, "what the killswitch sees");
                let taken = self.plan.asks.iter().take_while(|ask| ask.at + REQUEST_LEN <= self.received);
                let unanswered = taken.zip(&self.client.since_ms).filter(|(_, since_ms)| since_ms.is_some()).count();
                // The reply whose data is on its way does not count any more.
                assert!(unanswered <= IN_FLIGHT_MAX + 1, "{unanswered} are in flight or wait to be sent");
            }
            Step::NeedRoom => {
                assert!(!self.done.is_empty() || self.server.wants_send(), "nothing can ever make room");
            }
            Step::Kept => assert_eq!(self.pass, Pass::Reads, "everything may pass"),
        }
        let owned = self.cap - self.pool.available();
        // In a small pool reserve buffers hide what a session owns.
        assert!(self.cap < ROOMY || owned <= BUFFERED_MAX + SLICE + INBOX, "it owns {owned} bytes");
        let in_flight: HashSet<u32> = self.done.iter().map(|done| done.tag).collect();
        assert!(in_flight.len() <= IN_FLIGHT_MAX);

        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let pieces = self.server.to_send(&mut slices);
        let send: usize = slices[..pieces].iter().map(|slice| slice.len()).sum();
        assert_eq!(send > 0, self.server.wants_send());
        let left = self.plan.stream.len() - self.received;
        Can {
            go_on,
            receive: if needs_bytes { left } else { 0 },
            received: self.received,
            hang_up: needs_bytes && left == 0 && !self.ended,
            complete: self.done.len(),
            send,
        }
    }

    fn act(&mut self, act: Act, now_ms: u64) -> Result<(), Violation> {
        match act {
            Act::GoOn => {}
            Act::Pass(pass) => self.pass = pass,
            Act::Park => {
                self.server.park(&mut self.pool);
                let idle = self.server.oldest_ms().is_none();
                assert!(!idle || self.pool.available() == self.cap, "an idle connection owns no buffer");
            }
            Act::Receive(most) => {
                let before = self.received;
                for space in self.server.recv_space(&mut self.pool) {
                    let n = space.len().min(most - (self.received - before));
                    space[..n].copy_from_slice(&self.plan.stream[self.received..][..n]);
                    self.received += n;
                }
                assert!(self.received > before, "it needs bytes and has no space");
                self.client.note_received(before, self.received, now_ms);
                self.server.received(self.received - before, now_ms);
            }
            Act::HangUp => {
                self.ended = true;
                self.server.end_of_stream()?;
            }
            Act::Complete(n) => {
                let done = self.done.remove(n);
                let touched = done.touched.clone();
                let completed = self.server.complete(done, &mut self.pool).expect("not answered yet");
                let ask = &self.plan.asks[index(completed.head.cookie)];
                assert_eq!((completed.head, completed.touched), (ask.head, touched));
                if let Err(Failed { errno, violation, .. }) = completed.result {
                    assert_eq!(Some(errno), ask.fault.map(|fault| fault.errno));
                    violation.map_or(Ok(()), Err)?;
                }
            }
            Act::Send(n) => {
                let mut slices = [IoSlice::new(&[]); PIECES_MAX];
                let pieces = self.server.to_send(&mut slices);
                let mut left = n;
                for slice in &slices[..pieces] {
                    let (piece, _) = slice.split_at(left.min(slice.len()));
                    self.client.receive(piece, &mut self.outcome);
                    left -= piece.len();
                }
                self.server.sent(n, &mut self.pool);
            }
        }
        Ok(())
    }

    fn finish(mut self, end: Result<End, Violation>) -> Outcome {
        self.outcome.tally = self.server.tally();
        self.server.release(&mut self.pool);
        // Work outlives its client; the loop gives its buffers back.
        for buffer in self.done.into_iter().filter_map(|done| done.buffer) {
            self.pool.give(buffer);
        }
        assert_eq!(self.pool.available(), self.cap, "all memory comes back");
        for ((Ask { head, error, .. }, complete), durable) in
            self.plan.asks.iter().zip(self.client.complete).zip(self.durable)
        {
            let writes = matches!(head.kind, kind::WRITE | kind::TRIM | kind::WRITE_ZEROES) && head.length > 0;
            assert!(!complete || !writes || *error != 0 || durable == is_fua(head), "{head}");
        }
        self.outcome.end = Some(end);
        self.outcome
    }
}
