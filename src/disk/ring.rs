//! What the kernel carries out while this thread goes on: reads of what is not cached, fdatasync, and what is in `changes`.
//!
//! The life of an operation: it waits for room, flies, and lands. A read that lands short waits again with its rest; a
//! verification goes back to the engine after each piece, because the next one may be cached.
//!
//! Invariant 1: at most [`FLYING_MAX`] reads and verifications fly, besides changes and an fdatasync of each group. The ring
//! has room for as many.
//!
//! Invariant 2: the buffer of a read that flies belongs to the ring; its job has an empty one meanwhile.

use super::changes::{self, Changes};
use super::image::FILES_MAX;
use super::kernel::{is_brief, Kernel, Landed};
use super::queue::{Job, Lanes};
use crate::buffer::Buffer;
use crate::sys::pages;
use crate::sys::ring::{Completion, Ring};
use crate::work::Action;
use slab::Slab;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::mem;
use std::os::fd::BorrowedFd;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};

/// The most reads and verifications that fly at once: fewer than a disk takes from the kernel (256 requests, as a rule),
/// because a ring that hands over more waits for the disk.
const FLYING_MAX: usize = 128;

/// The room that a ring needs.
const ROOM: u32 = 138;
const _: () =
    assert!(ROOM as usize == FLYING_MAX + changes::FLYING_MAX + FILES_MAX, "all that fly, and an fdatasync a file");

/// What reads cost the kernel, and what that says about changes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// The most threads that the kernel may take for reads and writes, if each takes one.
    threads_max: Option<u32>,
}

impl Cost {
    /// Where the file system starts a read and tells of its end. Only an fdatasync takes a thread, and no client has as
    /// many requests as may fly.
    pub(super) const NONE: Self = Self { threads_max: None };

    /// Where each read takes a thread as long as it lasts.
    pub(super) const THREAD: Self = Self { threads_max: Some(28) };

    /// The most reads and verifications of one owner that fly while so many of others do. If the disk hangs in what one owner
    /// reads, threads are left for the next, who may be the same client on a new connection, and for whoever comes after it.
    fn of_owner_max(self, others: usize) -> usize {
        let Some(threads) = self.threads_max else { return FLYING_MAX };
        ((threads as usize).saturating_sub(others) * 2 / 3).max(1)
    }

    /// A file system that starts reads without waiting reads what is cached without waiting, too.
    fn of(file: &File) -> Self {
        match pages::read_nowait(file, &mut [0], 0) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Self::THREAD,
            _ => Self::NONE,
        }
    }
}

/// The most verifications that fly at once. Each needs memory for what it reads.
const VERIFYING_MAX: usize = 8;

/// How much of a verification flies at once, in bytes.
const VERIFY_STEP: u64 = 128 << 10;

/// How often it is looked for the end of changes.
const LOOK: Duration = Duration::from_millis(1);

/// The numbers from here on are those of groups. Changes have numbers of their own; the others are indexes of `flying`.
const FIRST_GROUP: u32 = u32::MAX - 1;
const _: () = assert!((u32::MAX - FIRST_GROUP) as usize + 1 == FILES_MAX, "a number for each group");

/// The operations in the kernel's hands, and those that wait for their turn to be.
pub(super) struct Flights {
    kernel: Box<dyn Kernel>,
    cost: Cost,
    /// Each under the number by which the kernel knows it.
    flying: Slab<Flight>,
    reads: Lanes,
    verifications: Lanes,
    changes: Changes,
    /// An error of the ring itself was logged.
    has_complained: bool,
}

/// An operation in the kernel's hands.
struct Flight {
    job: Job,
    /// False when its owner is gone: what flies lands, and the rest of the operation does not fly.
    is_wanted: bool,
}

impl Flights {
    /// Opens a ring for a file and, if it is opened once more, that one. An error when the kernel has none, or forbids it.
    pub(super) fn open(file: &File, again: Option<Rc<File>>) -> io::Result<Self> {
        let cost = Cost::of(file);
        let mut ring = Ring::open(file, ROOM, cost.threads_max)?;
        ring.set_again(again);
        Ok(Self::of(Box::new(ring), cost))
    }

    pub(super) fn of(kernel: Box<dyn Kernel>, cost: Cost) -> Self {
        let (reads, verifications, changes) = (Lanes::default(), Lanes::default(), Changes::default());
        Self { kernel, cost, flying: Slab::new(), reads, verifications, changes, has_complained: false }
    }

    /// Takes an operation that would wait: a read, a verification or a change. It flies with the next [`Flights::depart`].
    pub(super) fn add(&mut self, job: Job) {
        self.lane_of(&job).push(job);
    }

    /// Takes back what is left of one, before the others of its owner.
    pub(super) fn put_back(&mut self, job: Job) {
        self.lane_of(&job).push_front(job);
    }

    /// Where reads take threads, changes may take as long, and fly.
    pub(super) fn changes(&self) -> Option<&Changes> {
        self.cost.threads_max.map(|_| &self.changes)
    }

    /// The same, to be changed.
    pub(super) fn changes_mut(&mut self) -> &mut Changes {
        &mut self.changes
    }

    /// Pushes what there is room for, hands it to the kernel, and collects what has ended. Changes stay, if they are held.
    pub(super) fn depart(&mut self, holds_changes: bool) {
        if !holds_changes {
            self.changes.depart(&mut *self.kernel);
        }
        while self.flying.len() < FLYING_MAX {
            let Some(job) = self.next() else { break };
            if let Some(job) = self.push(job) {
                self.lane_of(&job).push_front(job);
                break;
            }
        }
        if let Err(error) = self.kernel.enter() {
            // This does not happen on a sound kernel. What was pushed goes with the next try.
            if !mem::replace(&mut self.has_complained, true) {
                log::error!("disk: the ring does not take operations: {error}");
            }
        }
    }

    /// Pushes the fdatasync of a group or, when `all` is true, an fsync. False: the ring is full.
    pub(super) fn push_sync(&mut self, group: usize, all: bool) -> bool {
        let id = u32::try_from(group).ok().and_then(|group| FIRST_GROUP.checked_add(group));
        id.is_some_and(|id| self.kernel.push_sync(id, group, all))
    }

    /// The next that has ended, of what was collected. The rest of a short read waits again.
    pub(super) fn land(&mut self) -> Option<Landed> {
        loop {
            if let Some(ended) = self.changes.pop_ended() {
                return Some(ended);
            }
            let Some(Completion { id, result, buffer }) = self.kernel.pop() else {
                self.changes.measure();
                return None;
            };
            if let Some(group) = id.checked_sub(FIRST_GROUP) {
                let result = result.map(drop);
                let verdict = if says_nothing(&result) { None } else { Some(result) };
                return Some(Landed::Synced(group as usize, verdict));
            }
            if let Some(key) = changes::key_of(id) {
                match self.changes.land(key, result, buffer) {
                    None => continue,
                    landed => return landed,
                }
            }
            let flight = usize::try_from(id).ok().and_then(|id| self.flying.try_remove(id));
            debug_assert!(flight.is_some(), "the kernel ends what flies, once");
            let Some(Flight { mut job, is_wanted }) = flight else { continue };
            if let (Action::Read { buffer: place, .. }, Some(buffer)) = (&mut job.op.action, buffer) {
                *place = buffer;
            }
            if !is_wanted {
                return Some(Landed::Ended(job, Err(ErrorKind::ConnectionAborted.into())));
            }
            match result {
                Err(error) if error.raw_os_error() == Some(libc::ECANCELED) => return Some(Landed::Cancelled(job)),
                Err(error) if is_brief(&error) => self.lane_of(&job).push_front(job),
                Err(error) => return Some(Landed::Ended(job, Err(error))),
                Ok(0) => return Some(Landed::Ended(job, Err(ErrorKind::UnexpectedEof.into()))),
                Ok(n) => match &mut job.op.action {
                    Action::Read { length, buffer, .. } => {
                        buffer.advance(n);
                        if buffer.len() >= *length {
                            return Some(Landed::Ended(job, Ok(())));
                        }
                        self.lane_of(&job).push_front(job);
                    }
                    Action::Verify { offset, length } => {
                        let n = (n as u64).min(*length);
                        (*offset, *length) = (offset.saturating_add(n), *length - n);
                        let is_all = *length == 0;
                        return Some(if is_all { Landed::Ended(job, Ok(())) } else { Landed::Onward(job) });
                    }
                    _ => return Some(Landed::Cancelled(job)),
                },
            }
        }
    }

    /// True when [`Flights::depart`] would get something on its way.
    pub(super) fn has_work(&self, holds_changes: bool) -> bool {
        let mut waiting = self.reads.heads().chain(self.verifications.heads().filter(|_| self.may_verify()));
        self.flying.len() < FLYING_MAX && waiting.any(|job| may_fly(&self.flying, self.cost, job))
            || !holds_changes && self.changes.has_work()
            || self.kernel.is_stuck()
    }

    /// True while a change is in the kernel's hands.
    pub(super) fn flies_changes(&self) -> bool {
        self.changes.owners().next().is_some()
    }

    /// True when nothing flies or waits, apart from an fdatasync.
    pub(super) fn is_empty(&self) -> bool {
        self.flying.is_empty() && self.reads.is_empty() && self.verifications.is_empty() && self.changes.is_empty()
    }

    /// Takes out what waits of an owner. What flies of it ends with an error, and what is left of it does not fly.
    pub(super) fn forget(&mut self, owner: u64) -> VecDeque<Job> {
        for (_, flight) in self.flying.iter_mut().filter(|(_, flight)| flight.job.op.owner == owner) {
            flight.is_wanted = false;
        }
        let mut waiting = self.reads.remove(owner);
        waiting.append(&mut self.verifications.remove(owner));
        waiting.append(&mut self.changes.forget(owner));
        waiting
    }

    /// The owners of what flies, one for each operation, apart from an fdatasync.
    pub(super) fn owners(&self) -> impl Iterator<Item = u64> + '_ {
        self.flying.iter().map(|(_, flight)| flight.job.op.owner).chain(self.changes.owners())
    }

    /// Waits until no change flies, but no longer than this; says whether none does. What else lands meanwhile is dropped.
    pub(super) fn end_changes(&mut self, patience: Duration) -> bool {
        let began = Instant::now();
        while self.flies_changes() {
            if began.elapsed() >= patience {
                return false;
            }
            thread::sleep(LOOK);
            let _ = self.kernel.enter();
            while self.land().is_some() {}
        }
        true
    }

    /// As [`Ring::notifier`].
    pub(super) fn notifier(&self) -> BorrowedFd<'_> {
        self.kernel.notifier()
    }

    /// As [`Ring::leak`].
    pub(super) fn leak(self) {
        self.kernel.leak();
    }

    fn lane_of(&mut self, job: &Job) -> &mut Lanes {
        match job.op.action {
            Action::Verify { .. } => &mut self.verifications,
            Action::Write { .. } | Action::Zero { .. } | Action::Trim { .. } => self.changes.waiting(),
            _ => &mut self.reads,
        }
    }

    /// The next operation that may fly.
    fn next(&mut self) -> Option<Job> {
        let may_verify = self.may_verify();
        let may_fly = |job: &Job| may_fly(&self.flying, self.cost, job);
        let read = self.reads.pop_if(may_fly);
        read.or_else(|| if may_verify { self.verifications.pop_if(may_fly) } else { None })
    }

    fn may_verify(&self) -> bool {
        let is_one = |flight: &Flight| matches!(flight.job.op.action, Action::Verify { .. });
        self.flying.iter().filter(|(_, flight)| is_one(flight)).count() < VERIFYING_MAX
    }

    /// Pushes what is left of an operation. Hands it back when the ring is full.
    fn push(&mut self, mut job: Job) -> Option<Job> {
        let place = self.flying.vacant_entry();
        let id = u32::try_from(place.key()).unwrap_or(FIRST_GROUP);
        let pushed = match &mut job.op.action {
            Action::Read { offset, length, buffer, .. } => {
                let (at, rest) = (offset.saturating_add(buffer.len() as u64), length.saturating_sub(buffer.len()));
                let lent = mem::replace(buffer, Buffer::with_capacity(0));
                self.kernel.push_read(id, lent, at, rest).map_err(|lent| *buffer = lent)
            }
            Action::Verify { offset, length } => {
                let n = usize::try_from((*length).min(VERIFY_STEP)).unwrap_or_default();
                self.kernel.push_read(id, Buffer::with_capacity(n), *offset, n).map_err(drop)
            }
            _ => Err(()),
        };
        if pushed.is_err() {
            return Some(job);
        }
        place.insert(Flight { job, is_wanted: true });
        None
    }
}

/// True when an operation of this owner may fly.
fn may_fly(flying: &Slab<Flight>, cost: Cost, job: &Job) -> bool {
    let of_owner = flying.iter().filter(|(_, flight)| flight.job.op.owner == job.op.owner).count();
    of_owner < cost.of_owner_max(flying.len() - of_owner)
}

/// True when an fdatasync never began or was given up: that says nothing about what was written.
fn says_nothing(result: &io::Result<()>) -> bool {
    result.as_ref().is_err_and(|error| is_brief(error) || error.raw_os_error() == Some(libc::ECANCELED))
}
