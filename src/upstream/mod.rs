//! PURE: another NBD server as the place where an image is. What clients ask for goes there, and what it has answered and
//! may still forget is kept, so that its absence costs them time and nothing else.
//!
//! ```text
//!            connected                  all of it answered
//!  Away ──────────────────> Replaying ─────────────────────> Open
//!   ^                           │ lost                        │ lost
//!   └───────────────────────────┴─────────────────────────────┘
//! ```
//!
//! A client with a connection of its own sees that the server has gone, and knows that what was not flushed may be lost.
//! Here it does not see that, so these promises are kept for it:
//!
//! 1. After the reply to a WRITE, reads see it.
//! 2. After the reply to a FLUSH, every write answered before it was sent is durable.
//! 3. After the reply to a request with FUA, its effect is durable.
//! 4. A request takes effect once, between its submission and its reply.
//!
//! The rules that keep them:
//!
//! 1. What changes the export and is answered without being durable is dirty (see `dirty`). A newer answer takes the place of
//!    an older one, also when it is durable and not kept itself: what is older must not be written again.
//! 2. A FLUSH makes clean what was answered before it was sent, and nothing later.
//! 3. In a new session everything dirty is written again and answered before anything else is asked; then come the
//!    operations that are not answered, in their order, then new ones.
//! 4. An operation that changes what an earlier, unanswered one changes waits for it. Sent together, the earlier one could
//!    be executed after the answer to the later one, when it is sent again.
//! 5. What is read ahead of clients (see `ahead`) is asked for only where no change is unanswered, and dropped when one is
//!    submitted: nobody reads there what is older than an answer.
//!
//! Nothing is sent twice in one session, and a session ends only when its connection has: that nobody answers is no
//! reason to ask again, because what was asked may still happen.

mod ahead;
mod command;
mod dirty;
mod task;

pub use command::{Abilities, Asked, Command, Counts, Fault, Replay, What};

use crate::work::{Done, Op};
use ahead::Ahead;
use command::For;
use dirty::Dirty;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::ops::Range;
use task::{overlap, Next, Task};

/// Commands that the server has not answered, at the most.
pub const COMMANDS_MAX: usize = 64;
/// Tasks that are looked at for the next command, at the most: all of them may be waiting for each other.
const LOOKS_MAX: usize = 256;
/// How much of the limit is dirty when a FLUSH is sent that nobody has asked for.
const FLUSH_AT: usize = 2;

/// The error value of a server that ends ("Error values").
const SHUTDOWN: u32 = 108;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Away,
    /// What is dirty and lies before `next` has been written again, or is unanswered.
    Replaying {
        next: u64,
    },
    Open,
}

/// Another server, and what it owes.
#[derive(Debug)]
pub struct Upstream {
    replay: Replay,
    /// Bound of what is dirty and of payloads that are not answered, in bytes.
    limit: usize,
    can: Abilities,
    stage: Stage,
    /// Commands that are not answered.
    in_flight: usize,
    /// What was submitted and is not done, by its number.
    tasks: BTreeMap<u64, Task>,
    /// The tasks that have something to ask.
    waiting: BTreeSet<u64>,
    next_number: u64,
    dirty: Dirty,
    ahead: Ahead,
    /// How many changes were answered.
    seq: u64,
    /// How many of them a FLUSH has covered.
    flushed_seq: u64,
    /// Payloads that were sent, with what keeping them will cost.
    reserved: usize,
    own_flush: OwnFlush,
    /// One was wanted while another was sent, which came too early for it.
    flush_again: bool,
    /// Nothing new is begun: what is unanswered ends first.
    settles: bool,
    done: VecDeque<Done>,
    counts: Counts,
}

/// This side's own FLUSH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OwnFlush {
    /// None is needed beyond what memory asks for.
    Idle,
    /// One is to be sent.
    Wanted,
    /// One was sent.
    Sent,
    /// The last one has failed, after the answer of this number.
    Failed(u64),
}

impl Upstream {
    /// Nothing is connected yet. `limit` is that of [`Upstream::limit`]; small READs that follow one another are read
    /// `read_ahead` bytes ahead of.
    pub fn new(replay: Replay, limit: usize, read_ahead: usize) -> Self {
        Self {
            replay,
            limit,
            can: Abilities::default(),
            stage: Stage::Away,
            in_flight: 0,
            tasks: BTreeMap::new(),
            waiting: BTreeSet::new(),
            next_number: 0,
            dirty: Dirty::default(),
            ahead: Ahead::new(read_ahead),
            seq: 0,
            flushed_seq: 0,
            reserved: 0,
            own_flush: OwnFlush::Idle,
            flush_again: false,
            settles: false,
            done: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    /// A connection to a server that can do this. What is dirty goes first.
    pub fn connected(&mut self, can: Abilities) {
        debug_assert_eq!((self.stage, self.in_flight), (Stage::Away, 0), "one connection at a time");
        self.can = can;
        self.stage = Stage::Replaying { next: 0 };
        self.go_on();
    }

    /// The connection has ended, and what was not sent of it is dropped. What is not answered will be asked again; what is
    /// there for nobody is not.
    pub fn lost(&mut self) {
        self.stage = Stage::Away;
        self.in_flight = 0;
        self.reserved = 0;
        self.own_flush = if self.dirty.is_empty() { OwnFlush::Idle } else { OwnFlush::Wanted };
        self.flush_again = false;
        self.ahead.lost();
        for (&number, task) in &mut self.tasks {
            task.restart();
            self.waiting.insert(number);
        }
        let orphans: Vec<u64> = self.tasks.iter().filter(|(_, task)| task.is_orphan).map(|(&n, _)| n).collect();
        for number in orphans {
            self.finish(number, Err(gone()));
        }
    }

    /// Takes an operation. It has to lie inside the export.
    pub fn submit(&mut self, op: Op) {
        let number = self.next_number;
        self.next_number += 1;
        let task = Task::new(op);
        self.ahead.note(&task);
        self.tasks.insert(number, task);
        self.waiting.insert(number);
    }

    /// The next command for the server; `None` when there is none before something is answered or submitted. What can be done
    /// without the server is done on the way.
    pub fn next_command(&mut self) -> Option<Command> {
        if self.in_flight >= COMMANDS_MAX {
            return None;
        }
        let command = match self.stage {
            Stage::Away => None,
            Stage::Replaying { next } => self.next_replay(next),
            Stage::Open => self.next_own_flush().or_else(|| self.next_of_tasks()).or_else(|| self.next_ahead()),
        }?;
        self.in_flight += 1;
        Some(command)
    }

    fn next_replay(&mut self, next: u64) -> Option<Command> {
        let zeroes_max = if self.can.zero { u64::from(self.can.length_max) } else { u64::from(task::ZEROES_MAX) };
        let (range, bytes) = self.dirty.next(next, zeroes_max)?;
        self.stage = Stage::Replaying { next: range.end };
        let length = range.end - range.start;
        self.counts.replayed_bytes = self.counts.replayed_bytes.saturating_add(length);
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        let (what, payload) = match bytes {
            Some(bytes) => (What::Write, Some(bytes)),
            None if self.can.zero => (What::Zero { no_hole: false, fast: false }, None),
            None => (What::Write, Some(task::zeroes(length))),
        };
        Some(Command { asked: Asked(For::Replay), what, fua: false, offset: range.start, length, payload })
    }

    /// A FLUSH that nobody has asked for: when much is dirty, when a client has left, and before the server is changed.
    fn next_own_flush(&mut self) -> Option<Command> {
        let is_due = match self.own_flush {
            OwnFlush::Idle => self.dirty.memory() >= self.limit / FLUSH_AT || self.is_drained(),
            OwnFlush::Wanted => true,
            // It would only fail again, unless there is something new.
            OwnFlush::Failed(seq) => self.seq > seq && self.dirty.memory() >= self.limit / FLUSH_AT,
            OwnFlush::Sent => false,
        };
        if !is_due || !self.owes_flush() {
            return None;
        }
        self.own_flush = OwnFlush::Sent;
        self.counts.own_flushes += 1;
        let asked = Asked(For::OwnFlush(self.seq));
        Some(Command { asked, what: What::Flush, fua: false, offset: 0, length: 0, payload: None })
    }

    fn is_drained(&self) -> bool {
        self.settles && self.in_flight == 0 && self.owes_flush()
    }

    /// True when a FLUSH would make something durable that may not be. Where nothing is kept, that is not known of each
    /// change.
    fn owes_flush(&self) -> bool {
        self.can.flush && (!self.dirty.is_empty() || (!self.keeps_dirty() && self.seq > self.flushed_seq))
    }

    /// Notes that what was answered before `mark` is durable.
    fn flushed(&mut self, mark: u64) {
        self.dirty.drop_until(mark);
        self.flushed_seq = self.flushed_seq.max(mark);
    }

    fn next_of_tasks(&mut self) -> Option<Command> {
        // What is changed by tasks that were begun, or that come first.
        let mut ahead: Vec<Range<u64>> =
            self.tasks.values().filter(|task| task.is_begun).filter_map(Task::changes).collect();
        let looks: Vec<u64> = self.waiting.iter().copied().take(LOOKS_MAX).collect();
        for number in looks {
            let Some(task) = self.tasks.get(&number) else { continue };
            if !task.is_begun {
                let has_room = self.has_room_for(task);
                let range = task.changes();
                let waits = self.settles
                    || !has_room
                    || self.ahead.awaits(task)
                    || range.as_ref().is_some_and(|range| ahead.iter().any(|other| overlap(range, other)));
                if waits {
                    if !has_room {
                        self.make_room(number);
                    }
                    ahead.extend(range);
                    continue;
                }
                ahead.extend(range);
            }
            if self.awaits_earlier_parts(number) {
                continue;
            }
            let Some(task) = self.tasks.get_mut(&number) else { continue };
            match self.ahead.answers(task).unwrap_or_else(|| task.next(&self.can)) {
                Next::Ask { what, fua, offset, length, payload } => {
                    if !task.is_begun {
                        self.reserved += task.cost();
                    }
                    task.sent(what, fua, length, self.seq);
                    self.waiting.remove(&number);
                    let asked = Asked(For::Task(number));
                    return Some(Command { asked, what, fua, offset, length, payload });
                }
                Next::Finish(result) => {
                    self.waiting.remove(&number);
                    self.finish(number, result);
                }
            }
        }
        None
    }

    /// A READ that nobody has asked for, behind all that somebody has.
    fn next_ahead(&mut self) -> Option<Command> {
        if self.settles {
            return None;
        }
        let changes = self.tasks.values().filter_map(Task::changes);
        let (offset, length) = self.ahead.next(&self.can, changes)?;
        self.counts.reads_ahead += 1;
        Some(Command { asked: Asked(For::Ahead), what: What::Read, fua: false, offset, length, payload: None })
    }

    /// True when the FLUSH of a task would come too early for a part of the same request.
    fn awaits_earlier_parts(&self, number: u64) -> bool {
        let Some(task) = self.tasks.get(&number).filter(|task| task.flushes_for_others()) else { return false };
        self.tasks.range(..number).any(|(_, earlier)| earlier.is_of_same_request(task))
    }

    /// True when what the task brings could be kept.
    fn has_room_for(&self, task: &Task) -> bool {
        let cost = task.cost();
        cost == 0 || !self.keeps_dirty() || self.dirty.memory() + self.reserved + cost <= self.limit
    }

    /// A task waits until something is durable. Where that has failed, it fails.
    fn make_room(&mut self, number: u64) {
        match self.own_flush {
            OwnFlush::Idle => self.own_flush = OwnFlush::Wanted,
            OwnFlush::Wanted | OwnFlush::Sent => {}
            OwnFlush::Failed(_) if self.dirty.is_empty() => self.own_flush = OwnFlush::Idle,
            OwnFlush::Failed(_) => {
                self.own_flush = OwnFlush::Wanted;
                self.waiting.remove(&number);
                self.finish(number, Err(io::Error::other("a FLUSH that makes room for it has failed")));
            }
        }
    }

    fn keeps_dirty(&self) -> bool {
        self.replay == Replay::Dirty && self.can.flush
    }

    /// Bytes that a READ has brought, from this offset of the export on.
    pub fn data(&mut self, asked: Asked, offset: u64, bytes: &[u8]) {
        match self.task(asked) {
            Some(task) => task.data(offset, bytes),
            None => self.ahead.data(asked, offset, bytes),
        }
    }

    /// A hole that a READ has found.
    pub fn hole(&mut self, asked: Asked, range: &Range<u64>) {
        match self.task(asked) {
            Some(task) => task.hole(range),
            None => self.ahead.hole(asked, range),
        }
    }

    /// The next extent that a `BLOCK_STATUS` has found, its length and whether it is a hole.
    pub fn extent(&mut self, asked: Asked, length: u64, is_hole: bool) {
        if let Some(task) = self.task(asked) {
            task.extent(length, is_hole);
        }
    }

    fn task(&mut self, asked: Asked) -> Option<&mut Task> {
        match asked.0 {
            For::Task(number) => self.tasks.get_mut(&number),
            For::Replay | For::OwnFlush(_) | For::Ahead => None,
        }
    }

    /// The answer to a command: 0, or an error value.
    pub fn reply(&mut self, asked: Asked, error: u32) -> Result<(), Fault> {
        if error == SHUTDOWN {
            return Err(Fault::Leaves);
        }
        debug_assert!(self.in_flight > 0, "it was sent");
        self.in_flight = self.in_flight.saturating_sub(1);
        match asked.0 {
            For::Replay if error != 0 => return Err(Fault::Replay(error)),
            For::Replay => self.go_on(),
            For::Ahead => self.ahead.answered(error == 0),
            For::OwnFlush(mark) if error == 0 => {
                self.flushed(mark);
                self.own_flush = OwnFlush::Idle;
                if std::mem::take(&mut self.flush_again) {
                    self.flush();
                }
            }
            For::OwnFlush(_) => {
                self.own_flush = OwnFlush::Failed(self.seq);
                self.flush_again = false;
            }
            For::Task(number) => {
                let Some(task) = self.tasks.get_mut(&number) else { return Ok(()) };
                if !task.may_be_answered() {
                    return Err(Fault::Early);
                }
                if error != 0 {
                    self.finish(number, Err(io::Error::from_raw_os_error(i32::try_from(error).unwrap_or(5))));
                    return Ok(());
                }
                let flushed = (task.answered() == What::Flush).then_some(task.mark);
                let is_complete = task.is_complete();
                if let Some(mark) = flushed {
                    self.flushed(mark);
                }
                if is_complete {
                    self.finish(number, Ok(()));
                } else {
                    self.waiting.insert(number);
                }
            }
        }
        Ok(())
    }

    /// Opens for clients when all that is dirty has been written again.
    fn go_on(&mut self) {
        if let Stage::Replaying { next } = self.stage {
            if self.in_flight == 0 && self.dirty.next(next, 1).is_none() {
                self.stage = Stage::Open;
            }
        }
    }

    /// A task is done, one way or the other. What it has changed is dirty from now on.
    fn finish(&mut self, number: u64, result: io::Result<()>) {
        let Some(task) = self.tasks.remove(&number) else { return };
        self.waiting.remove(&number);
        if task.is_begun {
            self.reserved = self.reserved.saturating_sub(task.cost());
        }
        if let (Ok(()), Some(range)) = (&result, task.changes()) {
            self.seq += 1;
            match task.leaves() {
                Some(bytes) if self.keeps_dirty() => self.dirty.note_data(range.start, bytes, self.seq),
                None if task.leaves_zeroes() && self.keeps_dirty() => self.dirty.note_zeroes(&range, self.seq),
                _ => self.dirty.cut(&range),
            }
        }
        if task.is_orphan {
            self.flush();
        }
        self.done.push_back(task.into_done(result));
    }

    /// The next operation that is done.
    pub fn pop_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    /// True when [`Upstream::pop_done`] has something.
    pub fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    /// The owner is gone: what was not sent for it is dropped, the rest is for nobody. What it has written is flushed, for
    /// nobody else may ask for that. Before the next client comes, others may use the image: nothing is kept of it.
    pub fn forget(&mut self, owner: u64) {
        self.ahead.drop_bytes();
        let own: Vec<u64> = self.tasks.iter().filter(|(_, task)| task.owner == owner).map(|(&n, _)| n).collect();
        for number in own {
            match self.tasks.get_mut(&number) {
                Some(task) if task.is_begun => task.is_orphan = true,
                _ => self.finish(number, Err(gone())),
            }
        }
        self.flush();
    }

    /// Sends a FLUSH soon, if there is something to make durable.
    pub fn flush(&mut self) {
        match self.own_flush {
            _ if !self.owes_flush() => {}
            OwnFlush::Idle | OwnFlush::Failed(_) => self.own_flush = OwnFlush::Wanted,
            OwnFlush::Sent => self.flush_again = true,
            OwnFlush::Wanted => {}
        }
    }

    /// How many operations were submitted and not popped.
    pub fn len(&self) -> usize {
        self.tasks.len() + self.done.len()
    }

    /// True when none was.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The owners of what the server has in hand, one for each operation.
    pub fn flying(&self) -> Vec<u64> {
        self.tasks.values().filter(|task| task.is_begun).map(|task| task.owner).collect()
    }

    /// True when this side's own FLUSH has failed, so that what is dirty stays so until there is another one.
    pub fn has_failed_to_flush(&self) -> bool {
        matches!(self.own_flush, OwnFlush::Failed(_)) && !self.dirty.is_empty()
    }

    /// Forgets what would be written again: clients were cut, and know that it may be lost. Returns how much that was, in
    /// bytes of memory.
    pub fn give_up(&mut self) -> usize {
        let lost = std::mem::take(&mut self.dirty).memory();
        // It may have been on its way to the server just now.
        self.go_on();
        lost
    }

    /// Begins nothing new (`true`) until told to go on: what is unanswered ends, then what is dirty is flushed.
    pub fn settle(&mut self, settles: bool) {
        self.settles = settles;
        if let OwnFlush::Failed(_) = self.own_flush {
            self.own_flush = OwnFlush::Idle;
        }
    }

    /// True when the server owes nothing and could forget nothing.
    pub fn is_settled(&self) -> bool {
        self.in_flight == 0 && !self.owes_flush() && self.tasks.values().all(|task| !task.is_begun)
    }

    /// Commands that are not answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// True while what is dirty is written again.
    pub fn is_replaying(&self) -> bool {
        matches!(self.stage, Stage::Replaying { .. })
    }

    /// What is kept to be written again, in bytes of memory.
    pub fn dirty_bytes(&self) -> usize {
        self.dirty.memory()
    }

    /// The bound of that, in bytes.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// How clients are kept from noticing that the server has gone.
    pub fn replay(&self) -> Replay {
        self.replay
    }

    /// What was counted so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }
}

/// What becomes of an operation that is for nobody.
fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::Interrupted, "whoever asked is gone")
}
