//! PURE: drives a `ServerSession` between a client and a disk, one act at a time, and holds the rules of every
//! conversation: what may be in flight, how much memory a session owns, what it must never hand out, and that it never
//! gets stuck.
//!
//! What is said and what must come back is up to the [`Client`], what the work brings up to the [`Disk`], and how all of
//! it is cut up and interleaved up to the [`Schedule`].

use flexnbd::buffer::{Buffer, Pool, SLICE};
use flexnbd::proto::client::{ClientSession, Event};
use flexnbd::proto::error::Violation;
use flexnbd::proto::export::Export;
use flexnbd::proto::outbox::PIECES_MAX;
use flexnbd::proto::server::request::{Refusal, Request};
use flexnbd::proto::server::{Allowed, Completed, End, ServerSession, Step, Tally, BUFFERED_MAX, IN_FLIGHT_MAX};
use flexnbd::proto::wire::{kind, RequestHead};
use flexnbd::work::{Action, Done, Extent};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::io::{self, ErrorKind, IoSlice};

/// The most memory a session owns beside its payloads, in bytes: what it receives into.
const INBOX_BYTES: usize = 64 << 10;

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
    /// Pieces of work that may be reported.
    pub complete: usize,
    /// Bytes that may be sent.
    pub send: usize,
}

/// What happens next. Numbers are at most what [`Can`] says.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    /// The session takes its next step.
    GoOn,
    /// The session receives so many bytes.
    Receive(usize),
    /// The session receives the end of the stream.
    HangUp,
    /// This piece of work is reported as the disk left it.
    Complete(usize),
    /// This piece of work is reported as one that failed.
    Fail(usize),
    /// The client takes so many bytes.
    Send(usize),
    /// Memory is given back while the session waits.
    Park,
    /// Which requests may pass from now on.
    Allowed(Allowed),
}

/// Decides how a conversation is cut up and interleaved.
pub trait Schedule {
    /// What happens next.
    fn choose(&mut self, can: &Can) -> Act;
    /// The time, which never goes back.
    fn now_ms(&mut self) -> u64;
}

/// The client: what it says, and what it makes of the answers.
pub trait Client {
    /// What it says next, as far as it knows. It hangs up when that is nothing and [`Client::is_done`].
    fn says(&self) -> Cow<'_, [u8]>;
    /// The first `n` bytes of that have been received at `now_ms`.
    fn said(&mut self, n: usize, now_ms: u64);
    /// False while it waits for an answer before it says more.
    fn is_done(&self) -> bool;
    /// Takes what the server sends.
    fn hear(&mut self, bytes: &[u8]);
    /// The server refuses one of its requests.
    fn refused(&mut self, _refusal: &Refusal) {}
    /// The server waits for bytes; its session began at `opened_ms`.
    fn is_waited_for(&mut self, _session: &ServerSession, _opened_ms: u64) {}
}

/// The disk: it does its work at once, in the order in which it is handed out; it is reported later.
pub trait Disk {
    /// Does one piece of a request.
    fn work(&mut self, head: &RequestHead, action: Action) -> Worked;
    /// A piece has been reported.
    fn reported(&mut self, _completed: &Completed) {}
}

/// What became of a piece of work; the fields are those of [`Done`].
#[derive(Debug)]
pub struct Worked {
    /// The buffer of a read or a write.
    pub buffer: Option<Buffer>,
    /// What was found.
    pub extents: Vec<Extent>,
    /// How it ended.
    pub result: io::Result<()>,
}

/// The server's side of a conversation.
#[derive(Debug, Clone, Copy)]
pub struct Server {
    /// How a session begins.
    pub begin: fn(Export, u64) -> ServerSession,
    /// The size of the export, in bytes.
    pub size: u64,
    /// The memory of the pool beside reserve buffers, in bytes.
    pub cap: usize,
}

/// Lets a client's session receive what it has space for; returns the rest.
pub fn feed<'a, T>(client: &mut ClientSession<T>, bytes: &'a [u8]) -> &'a [u8] {
    let space = client.recv_space();
    let (next, later) = bytes.split_at(bytes.len().min(space.len()));
    assert!(!next.is_empty(), "it needs bytes and has no space");
    space[..next.len()].copy_from_slice(next);
    client.received(next.len());
    later
}

/// Lets a client's session receive, and passes on what it understands.
pub fn hear<T>(
    client: &mut ClientSession<T>,
    mut bytes: &[u8],
    mut take: impl FnMut(Event<'_, T>),
) -> Result<(), Violation> {
    while !bytes.is_empty() {
        bytes = feed(client, bytes);
        while let Some(event) = client.next_event()? {
            take(event);
        }
    }
    Ok(())
}

/// A piece of work that the disk has done and not reported.
struct Piece {
    head: RequestHead,
    done: Done,
}

/// A session and what is around it.
struct Drive {
    server: Server,
    session: ServerSession,
    pool: Pool,
    opened_ms: u64,
    now_ms: u64,
    /// Bytes that it has received, and whether the end of the stream too.
    received: usize,
    ended: bool,
    allowed: Allowed,
    pieces: Vec<Piece>,
}

/// Holds the conversation. Returns how it ended and what the session has counted; no memory is missing then.
///
/// # Panics
/// When the session breaks a rule.
pub fn converse(
    server: Server,
    client: &mut dyn Client,
    disk: &mut dyn Disk,
    schedule: &mut dyn Schedule,
) -> (Result<End, Violation>, Tally) {
    let opened_ms = schedule.now_ms();
    let mut drive = Drive {
        server,
        session: (server.begin)(
            Export { size: server.size, read_only: false, flushes: true, several: true },
            opened_ms,
        ),
        pool: Pool::new(server.cap),
        opened_ms,
        now_ms: opened_ms,
        received: 0,
        ended: false,
        allowed: Allowed::Everything,
        pieces: Vec::new(),
    };
    let end = loop {
        let can = drive.step(client, disk);
        if let Some(end) = drive.session.finished() {
            assert_eq!((can.complete, can.send), (0, 0), "nothing is owed");
            break Ok(end);
        }
        drive.now_ms = schedule.now_ms();
        if let Err(violation) = drive.act(schedule.choose(&can), client, disk) {
            break Err(violation);
        }
    };
    let tally = drive.session.tally();
    drive.release();
    (end, tally)
}

impl Drive {
    /// Lets the session take one step, and says what may happen then.
    fn step(&mut self, client: &mut dyn Client, disk: &mut dyn Disk) -> Can {
        let step = self.session.next_step(self.allowed, &mut self.pool);
        let go_on = matches!(step, Step::Request(_) | Step::Refused(_) | Step::UnknownExport(_) | Step::Named);
        let (needs_bytes, kept) = (matches!(step, Step::NeedBytes), matches!(step, Step::Kept));
        match step {
            Step::Request(request) => self.work(request, disk),
            Step::Refused(refusal) => client.refused(&refusal),
            // At most 128 characters and three dots, each character escaped as six at the most.
            Step::UnknownExport(name) => assert!(name.chars().count() <= 128 * 6 + 3 && !name.contains('\n')),
            Step::Named => self.session.go_on(),
            Step::NeedBytes => client.is_waited_for(&self.session, self.opened_ms),
            Step::NeedRoom => {
                assert!(!self.pieces.is_empty() || self.session.wants_send(), "nothing can ever make room");
            }
            Step::Kept => assert_eq!(self.allowed, Allowed::Reads, "everything may pass"),
        }
        self.check_limits();
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let filled = self.session.to_send(&mut slices);
        let send = slices.iter().take(filled).map(|slice| slice.len()).sum();
        assert_eq!(send > 0, self.session.wants_send());
        let left = client.says().len();
        let can = Can {
            go_on,
            receive: if needs_bytes && !self.ended { left } else { 0 },
            received: self.received,
            hang_up: needs_bytes && left == 0 && client.is_done() && !self.ended,
            complete: self.pieces.len(),
            send,
        };
        let stuck = !can.go_on && !can.hang_up && can.receive.max(can.complete).max(can.send) == 0;
        assert!(!stuck || kept || self.session.finished().is_some(), "stuck");
        can
    }

    /// Has a piece of a request done.
    fn work(&mut self, Request { head, tag, action }: Request, disk: &mut dyn Disk) {
        let touched = action.touches();
        assert!(self.allowed == Allowed::Everything || touched.is_none(), "only reads may pass");
        let range = match &action {
            Action::Read { offset, length, buffer, .. } => {
                assert!(buffer.is_empty() && buffer.capacity() >= *length, "an empty buffer that is large enough");
                Some((*offset, *length as u64))
            }
            Action::Write { offset, payload, .. } => Some((*offset, payload.len() as u64)),
            Action::Zero { offset, length, .. }
            | Action::Trim { offset, length, .. }
            | Action::Cache { offset, length }
            | Action::Verify { offset, length }
            | Action::Map { offset, length, .. } => Some((*offset, *length)),
            Action::Flush => None,
        };
        if let Some((offset, length)) = range {
            let end = offset.checked_add(length);
            assert!(length > 0 && end.is_some_and(|end| end <= self.server.size), "inside the export");
            assert!(offset >= head.offset && end <= head.end(), "a piece of the request");
        }
        let Worked { buffer, extents, result } = disk.work(&head, action);
        self.pieces.push(Piece { head, done: Done { owner: 0, tag, buffer, touched, extents, result } });
    }

    fn check_limits(&self) {
        let mut tags = BTreeSet::new();
        for Piece { head, done } in &self.pieces {
            assert!(
                tags.insert(done.tag) || head.kind == kind::WRITE,
                "each piece of other requests has a tag of its own"
            );
        }
        assert!(tags.len() <= IN_FLIGHT_MAX, "too many in flight");
        // A read that begins in a hole is answered in two pieces.
        assert!(self.session.in_flight() <= 2 * IN_FLIGHT_MAX, "replies without a limit");
        let in_disk = self.pieces.iter().filter_map(|piece| piece.done.buffer.as_ref()).map(Buffer::capacity).sum();
        let owned = self.server.cap - self.pool.available();
        assert!(owned.max(in_disk) <= BUFFERED_MAX + SLICE + INBOX_BYTES, "it owns {owned} bytes");
        assert!(in_disk <= BUFFERED_MAX + SLICE, "{in_disk} bytes of payloads");
        assert!(self.session.oldest_ms().is_none_or(|oldest_ms| oldest_ms <= self.now_ms));
    }

    fn act(&mut self, act: Act, client: &mut dyn Client, disk: &mut dyn Disk) -> Result<(), Violation> {
        match act {
            Act::GoOn => {}
            Act::Allowed(allowed) => self.allowed = allowed,
            Act::Park => {
                self.session.park(&mut self.pool);
                let idle = self.session.oldest_ms().is_none();
                assert!(!idle || self.pool.available() == self.server.cap, "an idle connection owns no buffer");
            }
            Act::Receive(most) => {
                let n = self.receive(&client.says()[..most]);
                self.session.received(n, self.now_ms);
                self.received += n;
                client.said(n, self.now_ms);
            }
            Act::HangUp => {
                self.ended = true;
                self.session.end_of_stream()?;
            }
            Act::Complete(at) => {
                let piece = self.pieces.remove(at);
                self.report(piece, disk)?;
            }
            Act::Fail(at) => {
                let mut piece = self.pieces.remove(at);
                piece.done.result = Err(ErrorKind::Other.into());
                self.report(piece, disk)?;
            }
            Act::Send(n) => {
                let mut slices = [IoSlice::new(&[]); PIECES_MAX];
                let filled = self.session.to_send(&mut slices);
                let mut left = n;
                for slice in slices.iter().take(filled) {
                    let piece = &slice[..left.min(slice.len())];
                    client.hear(piece);
                    left -= piece.len();
                }
                self.session.sent(n, &mut self.pool);
            }
        }
        Ok(())
    }

    /// Receives what there is space for; the length in bytes.
    fn receive(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        for space in self.session.recv_space(&mut self.pool) {
            let (piece, later) = rest.split_at(rest.len().min(space.len()));
            space[..piece.len()].copy_from_slice(piece);
            rest = later;
        }
        let n = bytes.len() - rest.len();
        assert!(n > 0, "it needs bytes and has no space");
        n
    }

    fn report(&mut self, Piece { head, done }: Piece, disk: &mut dyn Disk) -> Result<(), Violation> {
        let touched = done.touched.clone();
        let completed = self.session.complete(done, &mut self.pool);
        let Some(completed) = completed else { unreachable!("{head} is not answered yet") };
        assert_eq!((completed.head, &completed.touched), (head, &touched));
        disk.reported(&completed);
        completed.result.err().and_then(|failed| failed.violation).map_or(Ok(()), Err)
    }

    /// Ends the session. Work outlives it: whoever drives it gives the buffers back.
    fn release(mut self) {
        self.session.release(&mut self.pool);
        self.pieces.into_iter().filter_map(|piece| piece.done.buffer).for_each(|buffer| self.pool.give(buffer));
        assert_eq!(self.pool.available(), self.server.cap, "all memory comes back");
    }
}
