//! One control connection: a command comes in, one answer line goes out, the connection ends.

use super::effect::Effect;
use super::reason::Next;
use super::reason::Reason;
use super::shared::Shared;
use super::socket::{Received, Socket};
use crate::command::{parse_end, Answer, Reader};
use crate::event::slots::Key;
use crate::sys;
use log::{debug, warn};
use std::fmt;
use std::io::{IoSlice, IoSliceMut};

/// How long a control connection may take to send its command, and then to take its answer, in milliseconds.
const DEADLINE_MS: u64 = 10_000;
/// How far apart two clocks may have begun that are the same, in seconds: the time of day is corrected now and then.
const SAME_CLOCK_S: u64 = 2;
/// How much is received at once, in bytes: a whole command, as a rule.
const RECEIVE_MAX: usize = 4096;

#[derive(Debug)]
enum State {
    Reading(Reader),
    /// The command is being carried out.
    Executing,
    /// `wait`: the answer comes with the end of a migration.
    AwaitingEnd,
    /// `acl`: the answer comes when the kernel has in hand no operation of these owners.
    AwaitingDisk {
        owners: Vec<u64>,
    },
    Answering {
        line: Vec<u8>,
        sent: usize,
    },
}

/// A control connection.
#[derive(Debug)]
pub(super) struct Control {
    id: u64,
    socket: Socket,
    state: State,
    deadline_ms: u64,
}

impl Control {
    /// A connection that has just been accepted; its deadline runs from now.
    pub(super) fn new(id: u64, socket: Socket, key: Key, sh: &mut Shared) -> Self {
        let deadline_ms = sh.now_ms.saturating_add(DEADLINE_MS);
        sh.wheel.arm(deadline_ms, key);
        Self { id, socket, state: State::Reading(Reader::default()), deadline_ms }
    }

    /// Its socket.
    pub(super) fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Receives once; a complete command becomes an effect.
    pub(super) fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        let State::Reading(reader) = &mut self.state else {
            // A client that waits for its answer may give up, and others want its place.
            return if self.socket.hung_up() { Next::Close(Reason::HungUp) } else { self.look_at_disk(key, sh) };
        };
        if !self.socket.readable() {
            return Next::Idle;
        }
        let mut bytes = [0; RECEIVE_MAX];
        let received = match self.socket.receive(&mut [IoSliceMut::new(&mut bytes)]) {
            Ok(received) => received,
            Err(error) => return Next::Close(Reason::Socket(error)),
        };
        let bytes = match received {
            Received::Nothing => return Next::Idle,
            Received::End => None,
            Received::Bytes(n) => bytes.get(..n),
        };
        let command = match bytes {
            None => reader.end_of_stream().map(Some),
            Some(bytes) => reader.push(bytes),
        };
        match command {
            Ok(None) => return Next::Again,
            Ok(Some(_))
                if bytes.and_then(parse_end).is_some_and(|(end_ms, began_s)| is_over(end_ms, began_s, sh.now_ms)) =>
            {
                warn!("{self}: whoever sent this command waits no more: it is not carried out");
                return Next::Close(Reason::HungUp);
            }
            Ok(Some(command)) => {
                self.state = State::Executing;
                sh.effects.push_back(Effect::Command(key, command));
            }
            Err(answer) => self.answer(&answer, key, sh),
        }
        Next::Idle
    }

    /// Queues the answer; it goes out in the next write step.
    pub(super) fn answer(&mut self, answer: &Answer, key: Key, sh: &mut Shared) {
        self.state = State::Answering { line: answer.encode(), sent: 0 };
        self.deadline_ms = sh.now_ms.saturating_add(DEADLINE_MS);
        sh.wheel.arm(self.deadline_ms, key);
    }

    /// The command was `wait`: the answer comes with the end of a migration.
    pub(super) fn await_end(&mut self) {
        self.state = State::AwaitingEnd;
    }

    /// The command was `acl`: the answer comes when the kernel has in hand no operation of these owners, who are gone. It
    /// waits no longer than for a command.
    pub(super) fn await_disk(&mut self, owners: Vec<u64>, key: Key, sh: &mut Shared) {
        self.state = State::AwaitingDisk { owners };
        self.deadline_ms = sh.now_ms.saturating_add(DEADLINE_MS);
        sh.wheel.arm(self.deadline_ms, key);
    }

    /// Answers when the kernel has nothing in hand any more of what is awaited, or when that has taken too long.
    fn look_at_disk(&mut self, key: Key, sh: &mut Shared) -> Next {
        let State::AwaitingDisk { owners } = &self.state else { return Next::Idle };
        let left = sh.backend.flying().iter().filter(|owner| owners.contains(owner)).count();
        if left == 0 {
            self.answer(&Answer::ok("updated"), key, sh);
        } else if sh.now_ms >= self.deadline_ms {
            self.answer(&Answer::failed(format!("{left} operations are still in the disk")), key, sh);
        } else {
            return Next::WaitDisk;
        }
        Next::Again
    }

    /// True while it waits for a migration to end.
    pub(super) fn awaits_end(&self) -> bool {
        matches!(self.state, State::AwaitingEnd)
    }

    /// A wheel entry has fired. There is no deadline while the command is being carried out.
    pub(super) fn timeout(&mut self, key: Key, sh: &mut Shared) -> Next {
        if sh.now_ms < self.deadline_ms {
            return Next::Idle;
        }
        match self.state {
            State::Reading(_) | State::Answering { .. } => Next::Close(Reason::Deadline),
            State::AwaitingDisk { .. } => self.look_at_disk(key, sh),
            State::Executing | State::AwaitingEnd => Next::Idle,
        }
    }

    /// Sends the answer.
    pub(super) fn write_step(&mut self) -> Next {
        let State::Answering { line, sent } = &mut self.state else { return Next::Idle };
        if !self.socket.writable() {
            return Next::Idle;
        }
        match self.socket.send(&[IoSlice::new(line.get(*sent..).unwrap_or_default())]) {
            Ok(n) => *sent += n,
            Err(error) => return Next::Close(Reason::Socket(error)),
        }
        if *sent >= line.len() {
            Next::Close(Reason::Answered)
        } else if self.socket.writable() {
            Next::Again
        } else {
            Next::Idle
        }
    }

    /// Says why it went.
    pub(super) fn closed(&self, reason: &Reason, sh: &mut Shared) {
        debug!("{self}: closed: {reason}");
        sh.admission.control_left();
    }
}

/// True when this time has passed, by a clock that began when this server's did: a socket may be forwarded to another machine.
fn is_over(at_ms: u64, began_s: u64, now_ms: u64) -> bool {
    at_ms <= now_ms && began_s.abs_diff(sys::clock_began_s()) <= SAME_CLOCK_S
}

impl fmt::Display for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "control {}", self.id)
    }
}
