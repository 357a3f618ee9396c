//! One NBD client: its socket, its session, its deadline.

use super::stream::{Peer, Stream};
use super::{Next, Reason, Shared};
use crate::disk;
use crate::event::ready::Ready;
use crate::event::slots::Key;
use crate::logging::Throttle;
use crate::proto::error::{Errno, Violation};
use crate::proto::outbox::PIECES;
use crate::proto::request::{Action, Export, Refusal, Request};
use crate::proto::session::{End, ServerSession, Step, Tally};
use log::{info, warn};
use std::fmt;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};

/// Failed requests of one client are logged at most this often, in milliseconds; those between are counted.
const FAILED_LOG_MS: u64 = 10_000;

/// A connected client.
#[derive(Debug)]
pub struct Client {
    id: u64,
    peer: Peer,
    stream: Stream,
    ready: Ready,
    session: ServerSession,
    opened_ms: u64,
    /// The session has found no room: it wants another turn when something is completed or sent.
    stalled: bool,
    /// The wheel holds an entry of this client.
    timer_armed: bool,
    failed: Throttle,
}

impl Client {
    /// A client that has just been accepted.
    pub fn new(id: u64, stream: Stream, peer: Peer, sh: &Shared) -> Self {
        let client = Self {
            id,
            peer,
            stream,
            ready: Ready::default(),
            session: ServerSession::oldstyle(Export::new(sh.disk.size()), sh.now_ms),
            opened_ms: sh.now_ms,
            stalled: false,
            timer_armed: false,
            failed: Throttle::new(FAILED_LOG_MS),
        };
        info!("{client}: connected");
        client
    }

    /// Its socket, to be registered.
    pub fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// The readiness of its socket.
    pub fn ready(&mut self) -> &mut Ready {
        &mut self.ready
    }

    /// Who it is.
    pub fn peer(&self) -> Peer {
        self.peer
    }

    /// What it has had done so far.
    pub fn tally(&self) -> Tally {
        self.session.tally()
    }

    /// Receives once and hands everything understood to the disk.
    pub fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        let mut received = false;
        self.stalled = false;
        while sh.disk.has_room() {
            match self.session.next_step(&mut sh.pool) {
                Step::Request(request) => {
                    let taken = sh.disk.submit(disk_op(key, request));
                    debug_assert!(taken.is_ok(), "it had room");
                }
                Step::Refused(refusal) => self.log_refusal(&refusal, sh.now_ms),
                Step::NeedRoom => {
                    self.stalled = true;
                    return Next::Idle;
                }
                Step::NeedBytes if !self.ready.readable() => {
                    self.session.park(&mut sh.pool);
                    return Next::Idle;
                }
                // One receive a turn is the budget.
                Step::NeedBytes if received => return Next::Again,
                Step::NeedBytes => {
                    received = true;
                    if let Err(reason) = self.receive(key, sh) {
                        return Next::Close(reason);
                    }
                }
            }
        }
        Next::Again
    }

    fn receive(&mut self, key: Key, sh: &mut Shared) -> Result<(), Reason> {
        let spaces = self.session.recv_space(&mut sh.pool);
        let wanted: usize = spaces.iter().map(|space| space.len()).sum();
        match self.stream.read_vectored(&mut spaces.map(IoSliceMut::new)) {
            Ok(0) => {
                self.ready.note_end_of_stream();
                self.session.end_of_stream().map_err(Reason::Violation)?;
            }
            Ok(n) => {
                if n < wanted {
                    self.ready.clear_readable();
                }
                self.session.received(n, sh.now_ms);
                self.arm_killswitch(key, sh.now_ms, sh);
            }
            Err(error) => self.ready.failed_read(error).map_err(Reason::Socket)?,
        }
        Ok(())
    }

    /// Takes a completion. The data goes out in the write step of the same turn.
    pub fn disk_done(&mut self, done: disk::Done, sh: &mut Shared) -> Next {
        let result = done.result.map_err(|error| {
            let errno = errno_of(&error);
            self.log_failure(done.tag, &error, errno, sh.now_ms);
            errno
        });
        match self.session.complete(done.tag, result, done.buffer, &mut sh.pool) {
            Err(violation) => Next::Close(Reason::Violation(violation)),
            Ok(()) if self.stalled => Next::Again,
            Ok(()) => Next::Idle,
        }
    }

    /// Sends once, as many replies as wait.
    pub fn write_step(&mut self, sh: &mut Shared) -> Next {
        if self.session.wants_send() && self.ready.writable() {
            if let Err(error) = self.send(sh) {
                return Next::Close(Reason::Socket(error));
            }
            let more = self.session.wants_send() && self.ready.writable();
            if more || self.stalled {
                return Next::Again;
            }
        }
        self.session.finished().map_or(Next::Idle, |end| Next::Close(Reason::End(end)))
    }

    fn send(&mut self, sh: &mut Shared) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]); PIECES];
        let pieces = self.session.to_send(&mut slices);
        let slices = slices.get(..pieces).unwrap_or_default();
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        match self.stream.write_vectored(slices) {
            Ok(n) => {
                if n < wanted {
                    self.ready.clear_writable();
                }
                self.session.sent(n, &mut sh.pool);
                Ok(())
            }
            Err(error) => self.ready.failed_write(error),
        }
    }

    /// A wheel entry has fired: the killswitch looks at the oldest request.
    pub fn timeout(&mut self, key: Key, sh: &mut Shared) -> Next {
        self.timer_armed = false;
        let (Some(limit_ms), Some(oldest_ms)) = (sh.limits.killswitch_ms, self.session.oldest_ms()) else {
            return Next::Idle;
        };
        let age_ms = sh.now_ms.saturating_sub(oldest_ms);
        if age_ms >= limit_ms {
            return Next::Close(Reason::Killswitch { age_ms });
        }
        self.arm_killswitch(key, oldest_ms, sh);
        Next::Idle
    }

    /// The wheel holds at most one entry of a client; when it fires, the true deadline is looked up.
    fn arm_killswitch(&mut self, key: Key, since_ms: u64, sh: &mut Shared) {
        if let Some(limit_ms) = sh.limits.killswitch_ms.filter(|_| !self.timer_armed) {
            sh.wheel.arm(since_ms.saturating_add(limit_ms), key);
            self.timer_armed = true;
        }
    }

    /// Says why it went and gives its memory back.
    pub fn closed(&mut self, reason: &Reason, sh: &mut Shared) {
        let tally = self.session.tally();
        let seconds = sh.now_ms.saturating_sub(self.opened_ms) / 1000;
        let level = match reason {
            Reason::End(End::Disconnect | End::EndOfStream) | Reason::AclChanged => log::Level::Info,
            _ => log::Level::Warn,
        };
        log::log!(
            level,
            "{self}: closed: {reason}, {} reads, {} writes, {} errors, {seconds} s",
            tally.reads,
            tally.writes,
            tally.errors
        );
        sh.closed += tally;
        self.session.release(&mut sh.pool);
    }

    fn log_refusal(&mut self, refusal: &Refusal, now_ms: u64) {
        let Refusal { head, errno, why } = refusal;
        self.log_failed(&format_args!("refused {head} with {errno}: {why}"), now_ms);
    }

    fn log_failure(&mut self, tag: u32, error: &io::Error, errno: Errno, now_ms: u64) {
        let Some(head) = self.session.request(tag).copied() else { return };
        self.log_failed(&format_args!("{head} failed: {error}; answered {errno}"), now_ms);
    }

    fn log_failed(&mut self, what: &dyn fmt::Display, now_ms: u64) {
        match self.failed.pass(now_ms) {
            None => {}
            Some(0) => warn!("{self}: {what}"),
            Some(before) => warn!("{self}: {what} ({before} more failed since the last such line)"),
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {} {}", self.id, self.peer)
    }
}

/// What a request means to the disk.
fn disk_op(key: Key, request: Request) -> disk::Op {
    let action = match request.action {
        Action::Read { offset, length, buffer } => disk::Action::Read { offset, length, buffer },
        Action::Write { offset, payload, fua } => disk::Action::Write { offset, payload, fua },
        Action::Zero { offset, length, fua, no_hole } => {
            disk::Action::Zero { offset, length, fua, allocate: no_hole, fast: false }
        }
        Action::Trim { offset, length, fua } => disk::Action::Trim { offset, length, fua },
        Action::Flush => disk::Action::Flush,
    };
    disk::Op { owner: key.to_u64(), tag: request.tag, action }
}

/// What a client is told of an error of the disk ("Error values").
fn errno_of(error: &io::Error) -> Errno {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => Errno::NoSpc,
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Errno::Perm,
        ErrorKind::OutOfMemory => Errno::NoMem,
        _ => Errno::Io,
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::End(End::Disconnect) => f.write_str("peer sent DISC"),
            Self::End(End::EndOfStream) => f.write_str("peer hung up between requests"),
            Self::End(End::Violation(violation)) | Self::Violation(violation) => violation.fmt(f),
            Self::Socket(error) => error.fmt(f),
            Self::Killswitch { age_ms } => {
                write!(f, "killswitch: a request was not done after {}.{:03} s", age_ms / 1000, age_ms % 1000)
            }
            Self::AclChanged => f.write_str("the access control list does not allow it any more"),
            Self::Deadline => f.write_str("it took too long"),
            Self::Answered => f.write_str("answered"),
        }
    }
}

impl From<Violation> for Reason {
    fn from(violation: Violation) -> Self {
        Self::Violation(violation)
    }
}
