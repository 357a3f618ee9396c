//! The engine behind the queue: the thread that calls [`Engine::kick`] does each operation, with pread, pwrite, fallocate and
//! fdatasync. Where there is a ring, the kernel does what would keep this thread waiting: reads of what is not cached,
//! fdatasync, and changes of an image that other machines or another process keep.
//!
//! A kick begins with what is quick: reads of what is cached, short writes and, without a ring, hints to the kernel to read
//! what is not cached, so that a disk has many reads at once. What may take long is dear: reads of what is not cached,
//! questions for holes, long writes, ranges of zeroes, trims, hints for long ranges. It is done in steps, each owner in turn,
//! within the time that a kick has.
//!
//! Invariant 1: an operation is in `quick`, in `dear`, in `flights`, in `last_pieces`, in `marks`, in `commit` or, as its
//! `Done`, in `done`.
//!
//! Invariant 2: a step stays inside what is left of its range.
//!
//! Invariant 3: when an fdatasync that the ring carries out has ended in a kick, the next begins in a later one: the replies
//! have gone out by then and the sockets were looked at, so that many share it.

use super::changes::Changes;
use super::commit::Commit;
use super::hint::Hints;
use super::image::Image;
use super::kernel::Landed;
use super::mark::Marks;
use super::pace::Budget;
use super::queue::{Job, Lanes};
use super::reads::Way;
use super::ring::Flights;
use super::sparse::{self, Holes};
use super::verify;
use super::zero::Zeroes;
use crate::sys;
use crate::sys::pages::FileSystem;
use crate::work::{Action, Done, Extent, Op};
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::mem;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// The most bytes of a write that is quick. Of longer ones, many clients could fill a kick with more than its time.
const QUICK_MAX: usize = 64 << 10;

/// How long the end of the process waits for changes that the kernel has in hand. Most are over by then, and the next server
/// finds the image free.
const END: Duration = Duration::from_millis(100);

pub(super) struct Engine {
    /// Not looked at yet.
    quick: VecDeque<Job>,
    dear: Lanes,
    /// What the kernel does. `None`: this thread does all itself.
    pub(super) flights: Option<Flights>,
    /// Last pieces of requests that ask for stable storage. Their own work has ended, that of earlier pieces has not.
    last_pieces: Vec<Job>,
    marks: Marks,
    commit: Commit,
    done: VecDeque<Done>,
    pub(super) way: Way,
    holes: Holes,
    zeroes: Zeroes,
    hints: Hints,
    /// How many operations were submitted.
    submitted: u64,
    /// This thread has done a change in this kick, of an image that others keep.
    has_changed: bool,
}

/// What a step of a dear operation has come to.
enum Step {
    /// All of it is done.
    Done,
    /// There is more to do.
    More,
    /// What comes next would wait for the disk.
    Wait,
}

impl Step {
    fn new(is_all: bool) -> Self {
        if is_all {
            Self::Done
        } else {
            Self::More
        }
    }
}

impl Engine {
    pub(super) fn new(image: &Image, flights: Option<Flights>) -> Self {
        Self {
            quick: VecDeque::new(),
            dear: Lanes::default(),
            flights,
            last_pieces: Vec::new(),
            marks: Marks::default(),
            commit: Commit::new(image),
            done: VecDeque::new(),
            way: Way::of(image),
            holes: Holes::default(),
            zeroes: Zeroes::default(),
            hints: Hints::default(),
            submitted: 0,
            has_changed: false,
        }
    }

    pub(super) fn submit(&mut self, op: Op) {
        self.commit.note(&op);
        let mut job = Job::new(op);
        job.number = self.submitted;
        self.submitted += 1;
        self.quick.push_back(job);
    }

    /// As [`super::Disk::submit_mark`].
    pub(super) fn submit_mark(&mut self, owner: u64, tag: u32, mark: Option<String>, durable: bool) {
        self.marks.push(owner, tag, mark, durable);
    }

    /// Takes over what the kernel has done. Does what is quick, then what is dear as far as its time goes. Then begins the
    /// fdatasync for all that wait for one, and gives the kernel its work.
    pub(super) fn kick(&mut self, image: &Image) {
        self.has_changed = false;
        self.depart();
        let has_synced = self.land(image);
        for _ in 0..self.quick.len() {
            let Some(job) = self.quick.pop_front() else { break };
            self.quick_step(image, job);
        }
        let budget = Budget::begin();
        while let Some(job) = self.dear.pop() {
            self.turn(image, job);
            if budget.is_spent() {
                break;
            }
        }
        if self.may_mark() {
            self.marks.set(image, &mut self.commit, &mut self.done);
        }
        if self.may_sync() && !has_synced {
            self.start_sync(image);
        }
        self.depart();
        self.land(image);
    }

    /// True when a kick would move something.
    pub(super) fn has_work(&self) -> bool {
        !self.quick.is_empty()
            || !self.dear.is_empty()
            || self.may_sync()
            || self.may_mark()
            || self.flights.as_ref().is_some_and(|flights| flights.has_work(self.holds_changes()))
    }

    /// True when the kernel does what would keep this thread waiting.
    pub(super) fn has_ring(&self) -> bool {
        self.flights.is_some()
    }

    /// As [`super::Disk::notifier`].
    pub(super) fn notifier(&self) -> Option<BorrowedFd<'_>> {
        self.flights.as_ref().map(Flights::notifier)
    }

    /// The owners of what the kernel has in hand, one for each operation.
    pub(super) fn flying(&self) -> Vec<u64> {
        self.flights.iter().flat_map(Flights::owners).chain(self.commit.syncing()).collect()
    }

    /// Leaves what the kernel has in hand to the kernel, with its memory: for the end of the process. True: a change of the
    /// image is among it.
    pub(super) fn leak(&mut self) -> bool {
        let Some(mut flights) = self.flights.take() else { return false };
        let is_changing = !flights.end_changes(END);
        flights.leak();
        is_changing
    }

    /// True when [`Engine::pop_done`] has something.
    pub(super) fn has_done(&self) -> bool {
        !self.done.is_empty()
    }

    pub(super) fn pop_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    pub(super) fn syncs(&self) -> u64 {
        self.commit.syncs()
    }

    /// Drops what is left of an owner's operations; each is done with an error. What the kernel has in hand goes on.
    pub(super) fn forget(&mut self, owner: u64) {
        let (gone, quick) = mem::take(&mut self.quick).into_iter().partition(|job| job.op.owner == owner);
        let (last, stay) = mem::take(&mut self.last_pieces).into_iter().partition(|job| job.op.owner == owner);
        let (gone, last): (VecDeque<Job>, Vec<Job>) = (gone, last);
        (self.quick, self.last_pieces) = (quick, stay);
        let waiting = self.flights.as_mut().map(|flights| flights.forget(owner)).unwrap_or_default();
        let rest = self.dear.remove(owner).into_iter().chain(waiting).chain(last).chain(self.commit.remove(owner));
        let rest = rest.chain(self.marks.remove(owner));
        self.done.extend(gone.into_iter().chain(rest).map(|job| job.finish(Err(ErrorKind::ConnectionAborted.into()))));
    }

    /// Does what is quick of an operation. The rest of it is dear.
    fn quick_step(&mut self, image: &Image, job: Job) {
        let Some(mut job) = self.fly(image, job) else { return };
        match &mut job.op.action {
            Action::Flush => return self.complete(job, Ok(())),
            Action::Write { offset, payload, .. }
                if payload.len() <= QUICK_MAX && !sparse::has_zeroes(image, *offset, payload.filled()) =>
            {
                let written = self.timed(image, |_| image.file.write_all_at(payload.filled(), *offset));
                return self.complete(job, written);
            }
            // To ask for holes is cheaper there than to read them.
            Action::Read { skip_hole: true, .. } if image.source == FileSystem::Memory => {}
            Action::Read { offset, length, skip_hole, buffer } => {
                let range = *offset..offset.saturating_add(*length as u64);
                let room = buffer.spare().get_mut(..*length).unwrap_or_default();
                let n = if self.is_locked(&range) { 0 } else { self.way.read(image, *offset, room) };
                buffer.advance(n);
                if n > 0 && !sparse::begins_with_zeroes(image, buffer.filled()) {
                    *skip_hole = false;
                }
                let missing = length.saturating_sub(n);
                if missing == 0 && !*skip_hole {
                    return self.complete(job, Ok(()));
                }
                match &mut self.flights {
                    Some(flights) if !*skip_hole => return flights.add(job),
                    None if missing > 0 => {
                        // All of them are on their way before the first is waited for.
                        let _ = sys::file::will_need(&image.file, *offset + n as u64, missing as u64);
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        self.dear.push(job);
    }

    /// Does a step of a dear operation.
    fn turn(&mut self, image: &Image, job: Job) {
        let Some(mut job) = self.fly(image, job) else { return };
        let is_change = job.op.action.touches().is_some();
        let mut step = if is_change {
            self.timed(image, |engine| engine.dear_step(image, &mut job.op.action, &mut job.extents))
        } else {
            self.dear_step(image, &mut job.op.action, &mut job.extents)
        };
        if let Ok(Step::Wait) = step {
            match &mut self.flights {
                Some(flights) => return flights.add(job),
                None => step = wait_step(image, &mut job.op.action),
            }
        }
        match step {
            Ok(Step::More | Step::Wait) => self.dear.push_front(job),
            Ok(Step::Done) => self.complete(job, Ok(())),
            Err(error) => self.complete(job, Err(error)),
        }
    }

    /// Does a step of what is dear of an action.
    fn dear_step(&mut self, image: &Image, action: &mut Action, extents: &mut Vec<Extent>) -> io::Result<Step> {
        match action {
            Action::Read { offset, length, skip_hole, buffer } => {
                if mem::take(skip_hole) {
                    if let Some(hole) = self.holes.hole(image, *offset..*offset + *length as u64) {
                        let skipped = usize::try_from(hole.length()).unwrap_or(*length);
                        buffer.consume(skipped.min(buffer.len()));
                        (*offset, *length) = (hole.range.end, *length - skipped);
                        extents.push(hole);
                    }
                }
                Ok(if buffer.len() == *length { Step::Done } else { Step::Wait })
            }
            Action::Write { offset, payload, .. } => {
                self.holes.write(image, *offset, payload.filled()).map(|()| Step::Done)
            }
            Action::Zero { offset, length, no_hole, fast, .. } => {
                let done = self.zeroes.zero_step(image, &mut self.holes, *offset, *length, *no_hole, *fast)?;
                Ok(proceed(offset, length, done))
            }
            Action::Trim { offset, length, .. } => {
                let done = self.zeroes.trim_step(image, *offset, *length)?;
                Ok(proceed(offset, length, done))
            }
            Action::Cache { offset, length } => {
                let done = self.hints.step(image, *offset, *length);
                Ok(proceed(offset, length, done))
            }
            Action::Verify { offset, length } => {
                let is_locked = self.is_locked(&(*offset..offset.saturating_add(*length)));
                let done = if is_locked { 0 } else { verify::cached_step(image, &mut self.way, *offset, *length) };
                Ok(if done == 0 && *length > 0 { Step::Wait } else { proceed(offset, length, done) })
            }
            Action::Map { offset, length, most } => {
                let found = self.holes.extent(image, *offset, *offset + *length);
                let n = found.length();
                // A client asks again for what is left out.
                let is_full = extents.len() >= *most || (!extents.is_empty() && sys::memory::is_short());
                match extents.last_mut() {
                    Some(last) if last.is_hole == found.is_hole => last.range.end = found.range.end,
                    _ if is_full => return Ok(Step::Done),
                    _ => extents.push(found),
                }
                // In memory, data comes in steps.
                let may_go_on = image.source == FileSystem::Memory && extents.last().is_some_and(|last| !last.is_hole);
                let is_enough = extents.len() >= *most && !may_go_on;
                Ok(if is_enough { Step::Done } else { proceed(offset, length, n) })
            }
            Action::Flush => Ok(Step::Done),
        }
    }

    /// Hands a change to the kernel where this thread would wait for it, and keeps a flush that is behind one. Gives back
    /// what is for this thread.
    fn fly(&mut self, image: &Image, job: Job) -> Option<Job> {
        let is_flush = matches!(job.op.action, Action::Flush);
        let is_change = job.op.action.touches().is_some_and(|range| !range.is_empty());
        if image.source != FileSystem::Distributed || !is_flush && !is_change {
            return Some(job);
        }
        // Of many that are quick the last would still be waited for.
        let is_held = self.has_changed || self.commit.is_syncing() || self.holds_changes();
        let flies =
            |changes: &Changes| is_flush && changes.precede(&job) || is_change && (is_held || changes.are_slow());
        match &mut self.flights {
            Some(flights) if flights.changes().is_some_and(flies) => {
                if is_flush {
                    flights.changes_mut().hold(job);
                } else {
                    flights.add(job);
                }
                None
            }
            _ => Some(job),
        }
    }

    /// Notes how long this thread is held by a change where that tells which way the next one takes.
    fn timed<T>(&mut self, image: &Image, change: impl FnOnce(&mut Self) -> T) -> T {
        if image.source != FileSystem::Distributed {
            return change(self);
        }
        let began = Instant::now();
        let changed = change(self);
        self.has_changed = true;
        if let Some(flights) = &mut self.flights {
            flights.changes_mut().note_inline(began.elapsed());
        }
        changed
    }

    /// True when a read of what is cached may have to wait for a change that the kernel has in hand.
    fn is_locked(&self, range: &Range<u64>) -> bool {
        self.flights.as_ref().and_then(Flights::changes).is_some_and(|changes| changes.lock(range))
    }

    /// Gives the kernel what it can take, and collects what has ended.
    fn depart(&mut self) {
        let holds_changes = self.holds_changes();
        self.flights.iter_mut().for_each(|flights| flights.depart(holds_changes));
    }

    /// Takes over what has ended of what the kernel had in hand. True: an fdatasync was among it.
    fn land(&mut self, image: &Image) -> bool {
        let mut has_synced = false;
        while let Some(landed) = self.flights.as_mut().and_then(Flights::land) {
            match landed {
                Landed::Ended(job, result) => self.complete(job, result),
                Landed::Onward(job) => self.dear.push_front(job),
                Landed::Cancelled(job) => self.waited_step(image, job),
                Landed::Synced(group, Some(result)) => {
                    self.commit.ended(group, result, &mut self.done);
                    has_synced = true;
                }
                Landed::Synced(group, None) => {
                    self.commit.sync(group, image, &mut self.done);
                    has_synced = true;
                }
            }
        }
        while let Some(flush) = self.flights.as_mut().and_then(|flights| flights.changes_mut().release()) {
            self.complete(flush, Ok(()));
        }
        has_synced
    }

    /// True while a mark waits: what changes the image and does not fly yet flies after it, so that its moment comes.
    fn holds_changes(&self) -> bool {
        !self.marks.is_empty()
    }

    /// True when a mark waits, and the call would wait for nothing.
    fn may_mark(&self) -> bool {
        let flies = self.flights.as_ref().is_some_and(Flights::flies_changes);
        !self.marks.is_empty() && !self.commit.is_syncing() && !flies
    }

    /// True when a group may be synced. While a mark waits none is, so that its moment comes.
    fn may_sync(&self) -> bool {
        self.marks.is_empty() && self.commit.may_start()
    }

    /// Does a step, waiting for the disk, of what the kernel has no thread for.
    fn waited_step(&mut self, image: &Image, mut job: Job) {
        let is_change = job.op.action.touches().is_some();
        let step = if is_change {
            self.dear_step(image, &mut job.op.action, &mut job.extents)
        } else {
            wait_step(image, &mut job.op.action)
        };
        match (step, &mut self.flights) {
            (Ok(Step::Done), _) => self.complete(job, Ok(())),
            (Ok(_), Some(flights)) if is_change => flights.put_back(job),
            (Ok(_), _) => self.dear.push_front(job),
            (Err(error), _) => self.complete(job, Err(error)),
        }
    }

    /// Begins the fdatasync for all that wait for one. This thread does it where that is cheaper and nobody has to wait for
    /// it.
    fn start_sync(&mut self, image: &Image) {
        let flies_none = self.flights.as_ref().is_none_or(Flights::is_empty) && !self.commit.is_syncing();
        let is_alone = flies_none && self.dear.is_empty() && self.commit.serves_one() && !image.is_copied;
        let is_inline = image.source == FileSystem::Memory || image.source == FileSystem::Local && is_alone;
        let Some(group) = self.commit.start() else { return };
        let all = self.commit.syncs_all(group);
        if self.commit.has_failed() {
            self.commit.ended(group, Ok(()), &mut self.done);
        } else if is_inline || !self.flights.as_mut().is_some_and(|flights| flights.push_sync(group, all)) {
            self.commit.sync(group, image, &mut self.done);
        }
    }

    /// The work of an operation has ended. One that asks for stable storage is done only after an fdatasync.
    fn complete(&mut self, job: Job, result: io::Result<()>) {
        let is_write = matches!(job.op.action, Action::Write { .. });
        if result.is_err() || !job.op.action.wants_sync() {
            self.done.push_back(job.finish(result));
        } else if is_write && self.has_pieces_of(&job) {
            self.last_pieces.push(job);
            return;
        } else {
            self.commit.add(job);
        }
        if is_write && !self.last_pieces.is_empty() {
            for job in mem::take(&mut self.last_pieces) {
                if self.has_pieces_of(&job) {
                    self.last_pieces.push(job);
                } else {
                    self.commit.add(job);
                }
            }
        }
    }

    /// True while pieces of the same request are under way. They were submitted before it.
    fn has_pieces_of(&self, last: &Job) -> bool {
        let mut flying = self.flights.iter().filter_map(Flights::changes).flat_map(Changes::iter);
        self.dear.iter().any(|job| job.is_of_request(last)) || flying.any(|job| job.is_of_request(last))
    }
}

/// Takes `done` bytes off the front of a range and says whether that was all of it.
fn proceed(offset: &mut u64, length: &mut u64, done: u64) -> Step {
    debug_assert!(done <= *length, "invariant 2");
    *offset = offset.saturating_add(done);
    *length = length.saturating_sub(done);
    Step::new(*length == 0)
}

/// Does the step for which [`Engine::dear_step`] has returned [`Step::Wait`]. This thread waits for the disk.
fn wait_step(image: &Image, action: &mut Action) -> io::Result<Step> {
    match action {
        Action::Read { offset, length, buffer, .. } => {
            let (at, rest) = (*offset + buffer.len() as u64, *length - buffer.len());
            let room = buffer.spare().get_mut(..rest).ok_or(ErrorKind::InvalidInput)?;
            image.file.read_exact_at(room, at)?;
            buffer.advance(rest);
            Ok(Step::Done)
        }
        Action::Verify { offset, length } => {
            let done = verify::step(image, *offset, *length)?;
            Ok(proceed(offset, length, done))
        }
        _ => Ok(Step::Done),
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]
mod tests {
    use super::super::tests::{buffer, Random, TempFile};
    use super::*;
    use crate::buffer::Buffer;
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::process::{Command, Stdio};

    fn image(temp: &TempFile, size: u64) -> Image {
        temp.file.set_len(size).unwrap();
        Image::of(&temp.file, size)
    }

    fn special(path: &str) -> Image {
        let file = File::options().read(true).write(true).open(path).unwrap();
        Image::of(&file, 1 << 20)
    }

    /// An engine whose image has only some of the ways to make zeroes.
    fn able(punch: bool, zero_range: bool) -> Engine {
        let zeroes = Zeroes::able(punch, zero_range);
        Engine { zeroes, ..Engine::new(&special("/dev/null"), None) }
    }

    /// An operation of owner 1.
    fn op(tag: u32, action: Action) -> Op {
        Op { owner: 1, tag, action }
    }

    fn write(offset: u64, bytes: &[u8], fua: bool) -> Action {
        Action::Write { offset, payload: buffer(bytes), fua, follows: false }
    }

    fn zero(offset: u64, length: u64) -> Action {
        Action::Zero { offset, length, fua: false, no_hole: false, fast: false }
    }

    /// The tags that are done, in order, with the kinds of their errors.
    fn done(engine: &mut Engine) -> Vec<(u32, Option<ErrorKind>)> {
        std::iter::from_fn(|| engine.pop_done()).map(|d| (d.tag, d.result.err().map(|e| e.kind()))).collect()
    }

    /// Kicks until one operation is done.
    fn run(engine: &mut Engine, image: &Image, action: Action) -> Done {
        engine.submit(op(0, action));
        loop {
            engine.kick(image);
            if let Some(done) = engine.pop_done() {
                return done;
            }
        }
    }

    /// Random operations at odd offsets against a plain vector.
    fn agrees_with_a_model(image: &Image, mut engine: Engine, seed: u64) {
        let mut model = vec![0_u8; image.size as usize];
        let mut random = Random::new(seed);
        for round in 0..800 {
            let offset = random.below(image.size);
            let longest = if random.below(20) == 0 { image.size } else { 20_000 };
            let length = random.below((image.size - offset).min(longest) + 1);
            let range = offset as usize..(offset + length) as usize;
            let fua = random.below(16) == 0;
            let is_read = random.below(3) == 0;
            let action = match random.below(4) {
                _ if is_read => Action::Read {
                    offset,
                    length: range.len(),
                    skip_hole: false,
                    buffer: Buffer::with_capacity(range.len() + 5),
                },
                0 => Action::Flush,
                1 => {
                    let bytes: Vec<u8> = range.clone().map(|_| random.below(256) as u8).collect();
                    model[range.clone()].copy_from_slice(&bytes);
                    write(offset, &bytes, fua)
                }
                2 => {
                    model[range.clone()].fill(0);
                    Action::Zero { offset, length, fua, no_hole: random.below(2) == 0, fast: false }
                }
                _ => Action::Trim { offset, length, fua },
            };
            let (is_trim, touches) = (matches!(action, Action::Trim { .. }), action.touches());
            let answer = run(&mut engine, image, action);
            answer.result.unwrap();
            assert_eq!(answer.touched, touches, "seed {seed}, round {round}");
            if is_read {
                assert_eq!(answer.buffer.unwrap().filled(), &model[range], "seed {seed}, round {round}");
            } else if is_trim {
                // What a trimmed byte reads as is open, but only zero or as before.
                let mut now = vec![0; range.len()];
                image.file.read_exact_at(&mut now, offset).unwrap();
                assert!(now.iter().zip(&model[range.clone()]).all(|(now, was)| now == was || *now == 0));
                model[range].copy_from_slice(&now);
            }
        }
        let mut all = vec![0; model.len()];
        image.file.read_exact_at(&mut all, 0).unwrap();
        assert!(all == model, "seed {seed}");
    }

    #[test]
    fn every_action_agrees_with_a_model() {
        for (seed, can_punch, can_zero_range, is_device) in
            [(11, true, true, false), (12, false, true, false), (13, false, false, false), (14, true, true, true)]
        {
            let temp = TempFile::new("model");
            let image = Image { is_device, ..image(&temp, 3_000_832) };
            agrees_with_a_model(&image, able(can_punch, can_zero_range), seed);
        }
    }

    #[test]
    fn with_a_ring_every_action_agrees_with_a_model_cached_and_not() {
        for (seed, way) in [(31, Way::Nowait), (32, Way::Blind)] {
            let temp = TempFile::new("ring");
            let image = image(&temp, 3_000_832);
            let Ok(flights) = Flights::open(&image.file, None) else { return };
            let engine = Engine { way, ..Engine::new(&image, Some(flights)) };
            agrees_with_a_model(&image, engine, seed);
        }
    }

    #[test]
    fn a_disk_that_is_dropped_waits_for_its_ring() {
        let temp = TempFile::new("dropped");
        let image = image(&temp, 4 << 20);
        image.file.write_all_at(&vec![7; 4 << 20], 0).unwrap();
        forget_pages(&temp);
        let Ok(flights) = Flights::open(&image.file, None) else { return };
        let mut engine = Engine::new(&image, Some(flights));
        for tag in 0..100 {
            engine.submit(op(tag, read(u64::from(tag) * 40_000, 4096, false)));
        }
        engine.submit(op(100, write(0, b"abc", true)));
        engine.kick(&image);
        // Were there a read under way in memory that is freed, the next to get that memory would see it change.
        drop(engine);
        let memory: Vec<Vec<u8>> = (0..100).map(|_| vec![0xa5; 4096]).collect();
        image.file.sync_data().unwrap();
        assert!(memory.iter().flatten().all(|&byte| byte == 0xa5));
    }

    #[test]
    fn a_file_system_that_lacks_a_call_is_asked_once() {
        // A tmpfs, if there is one, punches holes and cannot zero a range.
        let shm = Path::new("/dev/shm").to_owned();
        let folder = if shm.is_dir() { shm } else { std::env::temp_dir() };
        let temp = TempFile::within(&folder, "lacks");
        let image = image(&temp, 2_000_384);
        agrees_with_a_model(&image, able(true, true), 21);
        // No file system does it for this one.
        let mut engine = able(true, true);
        let null = special("/dev/null");
        run(&mut engine, &null, zero(0, 10)).result.unwrap();
        assert!(!engine.zeroes.punch.works && !engine.zeroes.zero_range.works);
        run(&mut engine, &null, Action::Trim { offset: 0, length: 10, fua: false }).result.unwrap();
    }

    #[test]
    fn zeroing_makes_a_hole_or_keeps_the_range() {
        let temp = TempFile::new("holes");
        let image = image(&temp, 1 << 20);
        let mut engine = able(true, true);
        let allocated = || temp.file.metadata().unwrap().blocks() * 512;
        image.file.write_all_at(&vec![9; 1 << 20], 0).unwrap();
        run(&mut engine, &image, zero(0, 1 << 19)).result.unwrap();
        assert_eq!(allocated(), 1 << 19);
        run(&mut engine, &image, Action::Trim { offset: 1 << 19, length: 1 << 18, fua: false }).result.unwrap();
        assert_eq!(allocated(), 1 << 18);
        let keep = Action::Zero { offset: 0, length: 1 << 20, fua: false, no_hole: true, fast: false };
        run(&mut engine, &image, keep).result.unwrap();
        assert_eq!(allocated(), 1 << 20);
        assert_eq!(temp.file.metadata().unwrap().len(), 1 << 20);
    }

    #[test]
    fn written_zeroes_keep_holes_too() {
        let temp = TempFile::new("written");
        let image = image(&temp, 8 << 20);
        let mut engine = able(false, false);
        run(&mut engine, &image, zero(0, 8 << 20)).result.unwrap();
        assert_eq!(temp.file.metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn fast_never_writes() {
        let temp = TempFile::new("fast");
        let image = image(&temp, 1 << 20);
        let fast = |no_hole| Action::Zero { offset: 0, length: 1 << 20, fua: false, no_hole, fast: true };
        let mut poor = able(false, false);
        for no_hole in [false, true] {
            let refused = run(&mut poor, &image, fast(no_hole));
            assert_eq!(refused.result.unwrap_err().kind(), ErrorKind::Unsupported);
        }
        run(&mut able(true, true), &image, fast(false)).result.unwrap();
        let device = Image { is_device: true, ..image };
        let refused = run(&mut able(true, true), &device, fast(true));
        assert_eq!(refused.result.unwrap_err().kind(), ErrorKind::Unsupported);
    }

    /// A read with room for it.
    fn read(offset: u64, length: usize, skip_hole: bool) -> Action {
        Action::Read { offset, length, skip_hole, buffer: Buffer::with_capacity(length) }
    }

    /// Zeroes that are written.
    fn keep(offset: u64, length: u64) -> Action {
        Action::Zero { offset, length, fua: false, no_hole: true, fast: false }
    }

    /// Drops what the page cache holds of a file.
    fn forget_pages(temp: &TempFile) {
        let mut dd = Command::new("dd");
        dd.arg(format!("of={}", temp.path.display())).args(["oflag=nocache", "conv=notrunc,fdatasync", "count=0"]);
        assert!(dd.stderr(Stdio::null()).status().unwrap().success());
    }

    #[test]
    fn a_long_range_lets_others_through() {
        let temp = TempFile::new("long");
        let image = image(&temp, 4 << 30);
        image.file.write_all_at(b"x", (4 << 30) - 1).unwrap();
        let mut engine = able(true, true);
        engine.submit(op(1, zero(1, (4 << 30) - 1)));
        engine.submit(op(2, write(0, b"y", false)));
        engine.kick(&image);
        assert_eq!(done(&mut engine)[0], (2, None));
        let mut steps = 0;
        while engine.done.is_empty() {
            assert!(engine.has_work());
            engine.kick(&image);
            steps += 1;
        }
        assert!(steps > 0, "there are 256 steps at least");
        assert_eq!(engine.pop_done().unwrap().touched, Some(1..4 << 30));
        let mut last = [1];
        image.file.read_exact_at(&mut last, (4 << 30) - 1).unwrap();
        assert_eq!(last, [0]);
    }

    #[test]
    fn many_long_ranges_do_not_hold_one_kick_and_nobody_waits_for_the_many_of_another() {
        let temp = TempFile::new("many");
        let image = image(&temp, 64 << 20);
        let mut engine = able(false, false);
        for tag in 0..100 {
            engine.submit(op(tag, keep(0, 8 << 20)));
        }
        let (other, third) = (write(4096, &[0; 4096], false), keep(0, 64 << 10));
        engine.submit(Op { owner: 2, tag: 1000, action: other });
        engine.submit(Op { owner: 3, tag: 1001, action: third });
        let mut finished = Vec::new();
        while finished.len() < 2 {
            engine.kick(&image);
            finished.extend(done(&mut engine).into_iter().map(|(tag, _)| tag));
        }
        finished.sort_unstable();
        assert_eq!(finished, [1000, 1001], "one step of the first owner came before each");
        assert_eq!(engine.dear.iter().count(), 100);
        let untouched =
            engine.dear.iter().filter(|job| matches!(job.op.action, Action::Zero { length: 0x80_0000, .. }));
        assert!(untouched.count() >= 99, "one after the other");
        engine.forget(1);
        assert!(!engine.has_work());
    }

    #[test]
    fn a_long_write_comes_after_all_that_is_quick() {
        let temp = TempFile::new("long-write");
        let image = image(&temp, 1 << 20);
        let mut engine = Engine::new(&image, None);
        engine.submit(op(1, write(0, &vec![7; QUICK_MAX + 1], true)));
        engine.submit(op(2, write(0, &vec![8; QUICK_MAX], false)));
        engine.submit(op(3, read(0, 4096, false)));
        engine.kick(&image);
        assert_eq!(done(&mut engine), [(2, None), (3, None), (1, None)]);
    }

    #[test]
    fn reads_of_what_is_not_cached_come_after_all_that_is_quick() {
        let temp = TempFile::new("cold");
        let image = image(&temp, 4 << 20);
        image.file.write_all_at(&vec![7; 4 << 20], 0).unwrap();
        forget_pages(&temp);
        let mut engine = able(true, true);
        for tag in 0..32_u32 {
            engine.submit(op(tag, read(u64::from(tag) * 100_000, 4096, tag % 2 == 0)));
        }
        engine.submit(op(99, write(0, b"abc", false)));
        let mut order = Vec::new();
        while order.len() < 33 {
            engine.kick(&image);
            while let Some(done) = engine.pop_done() {
                done.result.unwrap();
                if let Some(buffer) = done.buffer.filter(|_| done.tag < 32) {
                    let start = if done.tag == 0 { 3 } else { 0 };
                    assert!(buffer.len() == 4096 && buffer.filled()[start..].iter().all(|&byte| byte == 7));
                }
                order.push(done.tag);
            }
        }
        assert!(!engine.has_work());
    }

    #[test]
    fn a_read_that_is_cut_in_the_cache_goes_on_behind_it() {
        let temp = TempFile::new("partly");
        let image = image(&temp, 1 << 20);
        let bytes: Vec<u8> = (0..1_u32 << 20).map(|n| (n / 4096 + 1) as u8).collect();
        image.file.write_all_at(&bytes, 0).unwrap();
        forget_pages(&temp);
        image.file.read_exact_at(&mut [0; 4096], 8192).unwrap();
        for skip_hole in [false, true] {
            let answer = run(&mut able(true, true), &image, read(8292, 200_000, skip_hole));
            answer.result.unwrap();
            assert!(answer.buffer.unwrap().filled() == &bytes[8292..][..200_000] && answer.extents.is_empty());
        }
    }

    #[test]
    fn a_hole_is_one_also_when_its_zeroes_are_cached() {
        let temp = TempFile::new("skip");
        let image = image(&temp, 1 << 20);
        image.file.write_all_at(&[7; 4096], 8192).unwrap();
        image.file.read_exact_at(&mut vec![0; 1 << 20], 0).unwrap();
        let mut engine = able(true, true);
        for round in 0..2 {
            let answer = run(&mut engine, &image, read(100, 16_384, true));
            assert_eq!(answer.extents, [Extent { range: 100..8192, is_hole: true }], "round {round}");
            let buffer = answer.buffer.unwrap();
            assert_eq!((buffer.len(), buffer.filled()[4095], buffer.filled()[4096]), (8292, 7, 0));
            let whole = run(&mut engine, &image, read(65_536, 65_536, true));
            assert_eq!(whole.extents, [Extent { range: 65_536..131_072, is_hole: true }]);
            assert!(whole.buffer.unwrap().is_empty());
            let all = run(&mut engine, &image, read(0, 16_384, false));
            assert_eq!((all.extents.len(), all.buffer.unwrap().len()), (0, 16_384), "nobody asked for holes");
        }
    }

    #[test]
    fn the_last_piece_of_a_request_waits_for_the_others() {
        let temp = TempFile::new("pieces");
        let image = image(&temp, 8 << 20);
        let mut engine = able(false, false);
        // The zeroes ask for holes, so they wait for their turn, and this owner has more before them.
        for tag in 0..20 {
            engine.submit(op(tag, keep(0, 8 << 20)));
        }
        engine.submit(op(50, write(0, &[0; 8192], false)));
        engine.submit(op(50, write(8192, b"abc", true)));
        engine.submit(op(51, write(12_288, b"abc", true)));
        engine.kick(&image);
        assert_eq!(done(&mut engine), [(51, None)], "another request does not wait");
        let mut order = Vec::new();
        while order.len() < 22 {
            engine.kick(&image);
            order.extend(done(&mut engine).into_iter().map(|(tag, _)| tag));
        }
        assert_eq!(order[20..], [50, 50]);
        assert_eq!(engine.syncs(), 2);
        assert!(engine.last_pieces.is_empty() && !engine.has_work());
    }

    #[test]
    fn what_is_forgotten_is_done_with_an_error_and_does_nothing_more() {
        let temp = TempFile::new("forget");
        let image = image(&temp, 64 << 20);
        let mut engine = able(false, false);
        engine.submit(op(1, keep(0, 64 << 20)));
        engine.kick(&image);
        engine.submit(op(2, write(0, b"abc", true)));
        engine.submit(Op { owner: 2, tag: 3, action: write(9, b"abc", false) });
        engine.submit(op(4, read(0, 4096, false)));
        engine.submit(op(5, Action::Flush));
        engine.forget(1);
        let before = temp.file.metadata().unwrap().blocks();
        let mut dropped = Vec::new();
        while let Some(done) = engine.pop_done() {
            assert_eq!(done.result.unwrap_err().kind(), ErrorKind::ConnectionAborted);
            dropped.push((done.tag, done.touched, done.buffer.map(|buffer| buffer.capacity())));
        }
        dropped.sort_unstable_by_key(|(tag, ..)| *tag);
        let touched = |range| Some(range);
        assert_eq!(
            dropped,
            [(1, touched(0..64 << 20), None), (2, touched(0..3), Some(3)), (4, None, Some(4096)), (5, None, None)]
        );
        engine.kick(&image);
        assert_eq!(done(&mut engine), [(3, None)]);
        assert!(!engine.has_work() && engine.syncs() == 0);
        assert_eq!(temp.file.metadata().unwrap().blocks(), before, "no zeroes came after");
        engine.forget(1);
        assert!(engine.pop_done().is_none());
    }

    #[test]
    fn a_map_goes_on_until_it_has_as_many_extents_as_it_may() {
        let shm = Path::new("/dev/shm");
        let folder = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let temp = TempFile::within(&folder, "map");
        let mut image = image(&temp, 16 << 20);
        image.source = sys::pages::file_system(&temp.file).unwrap();
        image.file.write_all_at(&vec![7; 5 << 20], 0).unwrap();
        let data = Extent { range: 0..5 << 20, is_hole: false };
        let hole = Extent { range: 5 << 20..16 << 20, is_hole: true };
        for (length, most, found) in [
            (16 << 20, 9, vec![data.clone(), hole.clone()]),
            (16 << 20, 1, vec![data.clone()]),
            (5 << 20, 9, vec![data]),
            (4096, 1, vec![Extent { range: 0..4096, is_hole: false }]),
        ] {
            let answer = run(&mut Engine::new(&image, None), &image, Action::Map { offset: 0, length, most });
            assert_eq!(answer.extents, found, "{most} of {length}");
        }
    }

    #[test]
    fn one_sync_serves_all_that_ask() {
        let temp = TempFile::new("group");
        let image = image(&temp, 1 << 20);
        let mut engine = able(true, true);
        engine.submit(op(1, Action::Flush));
        engine.submit(op(2, write(0, b"abc", true)));
        engine.submit(op(3, write(9, b"abc", false)));
        engine.submit(op(4, Action::Flush));
        engine.kick(&image);
        let order: Vec<u32> = done(&mut engine).into_iter().map(|d| d.0).collect();
        assert_eq!(order, [3, 1, 2, 4], "done after the sync");
        assert_eq!(engine.syncs(), 1);
        run(&mut engine, &image, Action::Zero { offset: 5, length: 9, fua: true, no_hole: false, fast: false });
        run(&mut engine, &image, Action::Trim { offset: 0, length: 9, fua: true });
        assert_eq!(engine.syncs(), 3);
        engine.submit(op(7, write(0, b"abc", false)));
        engine.kick(&image);
        assert_eq!(engine.syncs(), 3, "nobody asked");
    }

    #[test]
    fn a_failed_sync_fails_all_that_ask_for_ever() {
        // It takes every write and knows no fdatasync.
        let null = special("/dev/null");
        let mut engine = able(true, true);
        engine.submit(op(1, write(0, b"abc", true)));
        engine.submit(op(2, Action::Flush));
        engine.submit(op(3, write(0, b"abc", false)));
        engine.kick(&null);
        let invalid = Some(ErrorKind::InvalidInput);
        assert_eq!(done(&mut engine), [(3, None), (1, invalid), (2, invalid)]);

        // Even where it would succeed now.
        let temp = TempFile::new("sticky");
        let image = image(&temp, 1 << 20);
        engine.submit(op(4, Action::Flush));
        engine.submit(op(5, write(0, b"abc", false)));
        engine.submit(op(6, write(3, b"def", true)));
        engine.kick(&image);
        assert_eq!(done(&mut engine), [(5, None), (4, invalid), (6, invalid)]);
        assert_eq!(engine.syncs(), 1);
    }

    #[test]
    fn an_operation_that_fails_says_what_it_may_have_touched() {
        let full = special("/dev/full");
        let mut engine = able(true, true);
        let failed = run(&mut engine, &full, write(512, b"abc", true));
        assert_eq!(failed.result.unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(failed.touched, Some(512..515));
        assert_eq!(failed.buffer.unwrap().filled(), b"abc");
        assert_eq!(engine.syncs(), 0, "there is nothing to put on stable storage");
        let failed = run(&mut engine, &full, zero(0, 4096));
        assert_eq!(failed.result.unwrap_err().kind(), ErrorKind::StorageFull);
    }

    #[test]
    fn what_is_verified_can_be_read_to_its_last_byte() {
        let temp = TempFile::new("verify");
        let image = image(&temp, 1 << 20);
        for (offset, length, end) in [(0, 1 << 20, 1 << 20), (5, 300_000, 300_005), (7, 1, 8)] {
            temp.file.set_len(end).unwrap();
            run(&mut able(true, true), &image, Action::Verify { offset, length }).result.unwrap();
            temp.file.set_len(end - 1).unwrap();
            let failed = run(&mut able(true, true), &image, Action::Verify { offset, length });
            assert_eq!(failed.result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn a_read_past_the_end_of_a_file_cut_short_is_an_error() {
        let temp = TempFile::new("short");
        let image = image(&temp, 1 << 20);
        temp.file.set_len(1000).unwrap();
        let read = Action::Read { offset: 990, length: 20, skip_hole: false, buffer: Buffer::with_capacity(20) };
        let failed = run(&mut able(true, true), &image, read);
        assert_eq!(failed.result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert!(failed.buffer.unwrap().is_empty());
    }
}
