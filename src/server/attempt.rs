//! One attempt of a migration: a connection to the destination and everything that is under way over it. Dropping the
//! attempt forgets all of that.

use super::config::Destination;
use super::dial::{Dial, Failure};
use super::mark;
use super::reason::Next;
use super::shared::Shared;
use crate::buffer::{Buffer, SLICE};
use crate::command::Ending;
use crate::disk;
use crate::event::slots::Key;
use crate::migrate::{Plan, DATA_MAX};
use crate::proto::error::Errno;
use crate::proto::wire::kind;
use crate::work::{Action, Done, Extent, Op};
use log::info;
use std::fmt;
use std::io;
use std::ops::Range;

const _: () = assert!(DATA_MAX == SLICE as u64, "a piece of data fills one buffer");

/// How a destination says that it does not do what it was asked for, as opposed to that it has failed.
const NOT_DONE: [u32; 2] = [Errno::NotSup as u32, Errno::Inval as u32];

/// What an unanswered request was for.
#[derive(Debug)]
pub(super) enum Asked {
    /// A WRITE of this range.
    Data(Range<u64>),
    /// A `WRITE_ZEROES` of this range.
    Zeroes(Range<u64>),
    /// A FLUSH.
    Flush,
}

/// Where an attempt stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The connection is being made, or the greeting has not come.
    Dialling,
    /// The plan is carried out.
    Copying,
    /// DISC is on its way to the socket. Where the file is gone, the copy at the destination counts already.
    Committing {
        /// The file here is gone.
        unlinked: bool,
    },
    /// DISC has gone, and the destination has to close.
    Leaving,
}

/// What an operation of the disk is for.
#[derive(Debug)]
pub(super) enum Task {
    /// Data of this range.
    Read(Range<u64>),
    /// The answer to a [`crate::migrate::Step::Look`] at this offset.
    Look(u64),
    /// A [`crate::migrate::Step::Settle`].
    Settle,
    /// A [`crate::migrate::Step::Mark`].
    Mark,
}

/// One connection to the destination, and what is under way on its behalf.
#[derive(Debug)]
pub(super) struct Attempt {
    /// The connection.
    pub dial: Dial<Asked>,
    /// Where it stands.
    pub stage: Stage,
    /// Operations the disk has, by their tags.
    tasks: Vec<(u32, Task)>,
    /// Memory of data that the disk fills, in bytes.
    reading: usize,
}

impl Attempt {
    /// An attempt over a connection that is being made.
    pub(super) fn new(dial: Dial<Asked>) -> Self {
        Self { dial, stage: Stage::Dialling, tasks: Vec::new(), reading: 0 }
    }

    /// What it is doing, in one word.
    pub(super) fn phase(&self, plan: &Plan) -> &'static str {
        match self.stage {
            Stage::Dialling => "connecting",
            Stage::Committing { .. } | Stage::Leaving => "finishing",
            Stage::Copying if plan.pauses_clients() => "paused",
            Stage::Copying if plan.progress().pass > 1 => "converging",
            Stage::Copying => "copying",
        }
    }

    /// Memory of data that the disk fills or that waits to be sent, in bytes.
    pub(super) fn buffered(&self) -> usize {
        self.reading + self.dial.session.buffered()
    }

    /// True when a byte that moves shows that the destination is alive. It does not while the oldest request is a FLUSH,
    /// which has a deadline of its own.
    pub(super) fn counts_progress(&self) -> bool {
        self.stage == Stage::Copying && !matches!(self.dial.session.oldest(), Some(Asked::Flush))
    }

    /// Queues a `WRITE_ZEROES`.
    pub(super) fn ask_for_zeroes(&mut self, range: Range<u64>) {
        let length = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
        self.dial.session.command(kind::WRITE_ZEROES, 0, range.start, length, Asked::Zeroes(range));
    }

    /// Queues a WRITE of what is filled in `buffer`.
    fn send_data(&mut self, range: Range<u64>, buffer: Buffer) {
        let length = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
        self.dial.session.command(kind::WRITE, 0, range.start, length, Asked::Data(range));
        self.dial.session.push_payload(buffer);
    }

    /// Hands an operation to the disk, which has room for it.
    pub(super) fn submit(&mut self, action: Action, task: Task, tag: u32, key: Key, sh: &mut Shared) {
        let taken = sh.backend.submit(Op { owner: key.to_u64(), tag, action });
        debug_assert!(taken.is_ok(), "it had room");
        self.tasks.push((tag, task));
    }

    /// Has the image marked as moved. The disk has room for that.
    pub(super) fn mark_moved(&mut self, to: &Destination, tag: u32, key: Key, sh: &mut Shared) {
        let taken = sh.backend.submit_mark(key.to_u64(), tag, Some(mark::moved(to)), true);
        debug_assert!(taken, "it had room");
        self.tasks.push((tag, Task::Mark));
    }

    /// How many operations the disk has for it.
    pub(super) fn in_disk(&self) -> usize {
        self.tasks.len()
    }

    /// Takes what the disk has done. Data goes out in the write step of the same turn.
    pub(super) fn disk_done(&mut self, done: Done, sh: &mut Shared) -> Result<Next, Failure> {
        let (now_ms, task) = (sh.now_ms, self.take_task(done.tag));
        match (task, done.buffer, sh.life.plan()) {
            (Some(Task::Read(range)), Some(buffer), _) => {
                self.read_done(range, buffer, done.result, sh)?;
                return Ok(Next::Idle);
            }
            (Some(Task::Look(offset)), _, Some(plan)) => {
                // What the disk cannot tell counts as data.
                let found = done.extents.into_iter().next();
                plan.note_extent(found.unwrap_or(Extent { range: offset..u64::MAX, is_hole: false }));
            }
            // Where it cannot be flushed, to mark it will fail and say why.
            (Some(Task::Settle), _, Some(plan)) => plan.settled(now_ms),
            (Some(Task::Mark), _, Some(plan)) => {
                done.result.map_err(|error| Failure::Broken(mark::cannot_mark(&error)))?;
                plan.marked();
            }
            // It belongs to an attempt that is over.
            (_, buffer, _) => {
                if let Some(buffer) = buffer {
                    sh.pool.give(buffer);
                }
                return Ok(Next::Idle);
            }
        }
        Ok(Next::Again)
    }

    /// Everything is at the destination and durable there: the file goes, if asked, and DISC says that the copy counts.
    /// Once DISC has gone there is no way back; with `--unlink`, there is none once the file is gone.
    pub(super) fn commit(&mut self, ending: Ending, sh: &mut Shared) -> Result<(), Failure> {
        self.dial.check_quiet()?;
        let unlinked = ending == Ending::Unlink;
        if unlinked {
            sh.unlink_image().map_err(Failure::Broken)?;
        }
        self.dial.session.disconnect();
        self.stage = Stage::Committing { unlinked };
        Ok(())
    }

    /// Takes what a finished operation was for; `None` when it belonged to an earlier attempt.
    fn take_task(&mut self, tag: u32) -> Option<Task> {
        let at = self.tasks.iter().position(|(own, _)| *own == tag)?;
        Some(self.tasks.swap_remove(at).1)
    }

    /// Hands a read of the image to the disk, which has room for it.
    pub(super) fn read(&mut self, range: Range<u64>, buffer: Buffer, tag: u32, key: Key, sh: &mut Shared) {
        self.reading += buffer.capacity();
        let length = usize::try_from(range.end - range.start).unwrap_or(SLICE);
        let action = Action::Read { offset: range.start, length, skip_hole: false, buffer };
        self.submit(action, Task::Read(range), tag, key, sh);
    }

    /// Takes what was read, and queues it as a WRITE, or without its bytes when they are zero.
    fn read_done(
        &mut self,
        range: Range<u64>,
        buffer: Buffer,
        result: io::Result<()>,
        sh: &mut Shared,
    ) -> Result<(), Failure> {
        self.reading -= buffer.capacity();
        if let Err(error) = result {
            sh.pool.give(buffer);
            let why = disk::explain(&error);
            return Err(Failure::Broken(format!("cannot read the image at offset {}: {why}", range.start)));
        }
        match sh.life.plan() {
            Some(plan) if plan.can().zero && disk::is_zero(buffer.filled()) => {
                plan.note_zeroes(&range);
                sh.pool.give(buffer);
                self.ask_for_zeroes(range);
            }
            _ => self.send_data(range, buffer),
        }
        Ok(())
    }

    /// Queues zeroes as a WRITE, for a destination that knows no other way.
    pub(super) fn send_zeroes(&mut self, range: Range<u64>, mut buffer: Buffer) {
        debug_assert!(range.end - range.start <= DATA_MAX, "zeroes as data come in pieces of data");
        let length = usize::try_from(range.end - range.start).unwrap_or(SLICE);
        if let Some(zeroes) = buffer.spare().get_mut(..length) {
            zeroes.fill(0);
        }
        buffer.advance(length);
        self.send_data(range, buffer);
    }
}

impl Asked {
    /// Tells the plan what the destination has answered.
    pub(super) fn answered(&self, error: u32, by: &Destination, sh: &mut Shared) -> Result<(), Failure> {
        let Some(plan) = sh.life.plan() else { return Ok(()) };
        match self {
            Self::Zeroes(range) if NOT_DONE.contains(&error) => {
                if plan.can().zero {
                    let name = Errno::name(error);
                    info!("migration to {by}: the destination answered {self} with {name}; sending zeroes as data");
                }
                plan.zeroes_refused(range);
            }
            _ if error != 0 => {
                let name = Errno::name(error);
                return Err(Failure::Broken(format!("the destination answered {self} with {name} ({error})")));
            }
            Self::Data(range) | Self::Zeroes(range) => plan.acked(range, sh.now_ms),
            Self::Flush => plan.flushed(sh.now_ms),
        }
        Ok(())
    }
}

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(range) => write!(f, "a write of {} bytes at offset {}", range.end - range.start, range.start),
            Self::Zeroes(range) => {
                write!(f, "WRITE_ZEROES of {} bytes at offset {}", range.end - range.start, range.start)
            }
            Self::Flush => f.write_str("FLUSH"),
        }
    }
}
