//! Changes of the image that the kernel carries out while this thread goes on: writes, zeroes and trims, where each may have
//! to wait for other machines or another process.
//!
//! As a rule the kernel lets one change of a file through at a time, and no fdatasync beside it. So while one flies, whatever
//! else changes the image takes the same way: this thread would wait for it. When none does, this thread carries one out
//! itself in each kick, as long as they are quick, because the way through a thread of the kernel costs a lone client as
//! much as a short write.
//!
//! A long change flies piece by piece; what is left of it goes before the other changes of its owner, and before those of
//! others that overlap it.
//!
//! Invariant 1: at most [`FLYING_MAX`] fly. One takes off only while its owner has less than half of what others leave of
//! that.
//!
//! Invariant 2: no two that fly or are begun overlap, and of one owner's that overlap the one that was submitted first goes
//! first: only the first of its owner's lane may fly.
//!
//! Invariant 3: the payload of a write that flies belongs to the ring; its job has an empty one meanwhile.

use super::kernel::{is_brief, Kernel, Landed};
use super::queue::{Job, Lanes};
use crate::buffer::Buffer;
use crate::work::Action;
use slab::Slab;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::mem;
use std::ops::Range;
use std::time::{Duration, Instant};

/// The most changes that fly at once: enough for the kernel always to have the next. Each takes a thread of the kernel, also
/// while it waits for the one before it, which may hang.
pub(super) const FLYING_MAX: usize = 8;

/// How much of a range is punched at once, in bytes. Other changes wait for it.
const PUNCH_MAX: u64 = 16 << 20;

/// How many zeroes are written at once, in bytes.
const ZEROES_MAX: u64 = 256 << 10;

/// A change that took longer, on average, holds everybody for too long when this thread does it.
const SLOW: Duration = Duration::from_micros(100);

/// Below this, this thread does changes again. It is measured by the ring, whose own way takes 20 to 40 microseconds of it:
/// a much lower bound would never be reached, and this one is as far below [`SLOW`] as it looks and the way on top of that.
const QUICK: Duration = Duration::from_micros(80);

/// How many changes a running mean is about.
const MEMORY: u32 = 8;

/// While a write flies, the kernel may have locked the pages around it, in bytes: pages may be so large.
const PAGE_MAX: u64 = 64 << 10;

/// The changes in the kernel's hands, and those that wait for their turn to be.
#[derive(Default)]
pub(super) struct Changes {
    waiting: Lanes,
    flying: Slab<Flight>,
    /// What ends without a flight, and how.
    ended: VecDeque<(Job, io::Result<()>)>,
    /// Flushes that wait for earlier changes of their owners.
    flushes: Vec<Job>,
    gauge: Gauge,
    /// The image has said that it cannot punch holes.
    is_solid: bool,
    /// Buffers full of zeroes that do not fly.
    blanks: Vec<Buffer>,
}

/// A change in the kernel's hands.
struct Flight {
    job: Job,
    /// What is left of it, this piece included.
    range: Range<u64>,
    piece: Piece,
    /// False: its owner is gone, and no more is done for it than what has begun.
    is_wanted: bool,
}

/// What flies of a change, and how many bytes of a range it is about.
#[derive(Clone, Copy)]
enum Piece {
    Write,
    Punch(u64),
    Zeroes(u64),
}

impl Changes {
    /// True when this thread would wait with a change, now or as a rule.
    pub(super) fn are_slow(&self) -> bool {
        self.gauge.is_slow || !self.is_empty()
    }

    /// True when none flies or waits.
    pub(super) fn is_empty(&self) -> bool {
        self.flying.is_empty() && self.waiting.is_empty()
    }

    /// This thread has done one, and was held so long.
    pub(super) fn note_inline(&mut self, took: Duration) {
        self.gauge.note(took);
    }

    /// The lanes of those that wait.
    pub(super) fn waiting(&mut self) -> &mut Lanes {
        &mut self.waiting
    }

    /// True when an earlier change of a flush's owner is not done yet.
    pub(super) fn precede(&self, flush: &Job) -> bool {
        self.iter().any(|job| job.op.owner == flush.op.owner && job.number < flush.number)
    }

    /// Keeps a flush until its owner's earlier changes are done.
    pub(super) fn hold(&mut self, flush: Job) {
        self.flushes.push(flush);
    }

    /// A flush that need not wait any more.
    pub(super) fn release(&mut self) -> Option<Job> {
        let free = self.flushes.iter().position(|flush| !self.precede(flush))?;
        Some(self.flushes.remove(free))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Job> {
        self.waiting.iter().chain(self.flying.iter().map(|(_, flight)| &flight.job))
    }

    /// The owners of what flies, one for each change.
    pub(super) fn owners(&self) -> impl Iterator<Item = u64> + '_ {
        self.flying.iter().map(|(_, flight)| flight.job.op.owner)
    }

    /// True when a read of a range may have to wait for a change that flies.
    pub(super) fn lock(&self, range: &Range<u64>) -> bool {
        self.flying.iter().any(|(_, flight)| {
            let start = flight.range.start / PAGE_MAX * PAGE_MAX;
            let end = flight.range.end.div_ceil(PAGE_MAX).saturating_mul(PAGE_MAX);
            overlap(range, &(start..end))
        })
    }

    /// True when [`Changes::depart`] would get something on its way.
    pub(super) fn has_work(&self) -> bool {
        let begun = self.begun();
        self.waiting.heads().any(|job| may_fly(&self.flying, &begun, job))
    }

    /// Pushes what may fly and what there is room for.
    pub(super) fn depart(&mut self, kernel: &mut dyn Kernel) {
        if self.flying.is_empty() {
            self.gauge.begin();
        }
        loop {
            let (begun, flying) = (self.begun(), &self.flying);
            let Some(mut job) = self.waiting.pop_if(|job| may_fly(flying, &begun, job)) else { break };
            job.is_begun = true;
            match self.next_piece(&job.op.action) {
                Ok(piece) => {
                    if let Some(job) = self.push(kernel, job, piece) {
                        self.waiting.push_front(job);
                        break;
                    }
                }
                Err(result) => self.ended.push_back((job, result)),
            }
        }
    }

    /// What has ended without a flight.
    pub(super) fn pop_ended(&mut self) -> Option<Landed> {
        self.ended.pop_front().map(|(job, result)| Landed::Ended(job, result))
    }

    /// A piece has come back. `None`: what is left of its change waits again.
    pub(super) fn land(&mut self, key: usize, result: io::Result<usize>, buffer: Option<Buffer>) -> Option<Landed> {
        let flight = self.flying.try_remove(key);
        debug_assert!(flight.is_some(), "the kernel ends what flies, once");
        let Flight { mut job, piece, is_wanted, .. } = flight?;
        self.gauge.landed += 1;
        match (&mut job.op.action, buffer) {
            (Action::Write { payload, .. }, Some(buffer)) => *payload = buffer,
            (_, Some(blank)) => self.blanks.push(blank),
            _ => {}
        }
        if !is_wanted {
            return Some(Landed::Ended(job, Err(ErrorKind::ConnectionAborted.into())));
        }
        let n = match (result, piece) {
            (Err(error), _) if error.raw_os_error() == Some(libc::ECANCELED) => return Some(Landed::Cancelled(job)),
            (Err(error), _) if is_brief(&error) => 0,
            (Err(error), Piece::Punch(_)) if is_refusal(&error) => {
                self.is_solid = true;
                0
            }
            (Err(error), _) => return Some(Landed::Ended(job, Err(error))),
            (Ok(_), Piece::Punch(n)) => n,
            // What a disk that is full says, if it says nothing.
            (Ok(0), _) => return Some(Landed::Ended(job, Err(io::Error::from_raw_os_error(libc::ENOSPC)))),
            (Ok(n), Piece::Write) => n as u64,
            (Ok(n), Piece::Zeroes(asked)) => asked.min(n as u64),
        };
        let left = match &mut job.op.action {
            Action::Zero { offset, length, .. } | Action::Trim { offset, length, .. } => {
                (*offset, *length) = (offset.saturating_add(n), length.saturating_sub(n));
                *length
            }
            action => {
                job.written = job.written.saturating_add(n);
                action.touches().map_or(0, |range| range.end - range.start).saturating_sub(job.written)
            }
        };
        if left == 0 {
            return Some(Landed::Ended(job, Ok(())));
        }
        self.waiting.push_front(job);
        None
    }

    /// All that has ended so far has landed: now it shows how long each took.
    pub(super) fn measure(&mut self) {
        self.gauge.measure();
    }

    /// Takes out what waits of an owner. What flies of it ends with an error, and what is left of it does not fly.
    pub(super) fn forget(&mut self, owner: u64) -> VecDeque<Job> {
        for (_, flight) in self.flying.iter_mut().filter(|(_, flight)| flight.job.op.owner == owner) {
            flight.is_wanted = false;
        }
        let (gone, stay): (Vec<Job>, _) =
            mem::take(&mut self.flushes).into_iter().partition(|job| job.op.owner == owner);
        self.flushes = stay;
        let mut gone = VecDeque::from(gone);
        gone.append(&mut self.waiting.remove(owner));
        gone
    }

    /// What is left of those that are begun and do not fly: few, because they are the first to fly again.
    fn begun(&self) -> Vec<(u64, Range<u64>)> {
        self.waiting.begun().filter_map(|job| Some((job.number, job.op.action.touches()?))).collect()
    }

    /// What flies next of a change. An error says how the change ends when nothing does.
    fn next_piece(&self, action: &Action) -> Result<Piece, io::Result<()>> {
        match *action {
            Action::Write { .. } => Ok(Piece::Write),
            Action::Zero { length, no_hole: false, .. } | Action::Trim { length, .. } if !self.is_solid => {
                Ok(Piece::Punch(length.min(PUNCH_MAX)))
            }
            Action::Zero { length, fast: false, .. } => Ok(Piece::Zeroes(length.min(ZEROES_MAX))),
            Action::Zero { .. } => Err(Err(ErrorKind::Unsupported.into())),
            // A trim that is not to be had succeeds.
            _ => Err(Ok(())),
        }
    }

    /// Pushes a piece of a change. Hands the change back when the ring is full.
    fn push(&mut self, kernel: &mut dyn Kernel, mut job: Job, piece: Piece) -> Option<Job> {
        let range = job.op.action.touches().unwrap_or_default();
        let place = self.flying.vacant_entry();
        let id = id_of(place.key());
        let written = job.written;
        let pushed = match (piece, &mut job.op.action) {
            (Piece::Write, Action::Write { offset, payload, .. }) => {
                let lent = mem::replace(payload, Buffer::with_capacity(0));
                let (at, from) = (offset.saturating_add(written), usize::try_from(written).unwrap_or(usize::MAX));
                let rest = lent.len().saturating_sub(from);
                kernel.push_write(id, lent, from, at, rest).map_err(|lent| *payload = lent)
            }
            (Piece::Punch(length), _) => {
                if kernel.push_punch_hole(id, range.start, length) {
                    Ok(())
                } else {
                    Err(())
                }
            }
            (Piece::Zeroes(length), _) => {
                let blank = self.blanks.pop().unwrap_or_else(blank);
                let n = usize::try_from(length).unwrap_or(usize::MAX);
                kernel.push_write(id, blank, 0, range.start, n).map_err(|blank| self.blanks.push(blank))
            }
            (Piece::Write, _) => Err(()),
        };
        if pushed.is_err() {
            return Some(job);
        }
        place.insert(Flight { job, range, piece, is_wanted: true });
        None
    }
}

/// What the kernel knows a change by: reads have the small numbers.
const FIRST_ID: u32 = 1 << 31;

fn id_of(key: usize) -> u32 {
    FIRST_ID | u32::try_from(key).unwrap_or(u32::MAX)
}

/// The key of the change that the kernel knows by this number, if it is one.
pub(super) fn key_of(id: u32) -> Option<usize> {
    id.checked_sub(FIRST_ID).and_then(|key| usize::try_from(key).ok())
}

fn blank() -> Buffer {
    let mut blank = Buffer::with_capacity(usize::try_from(ZEROES_MAX).unwrap_or_default());
    blank.advance(blank.capacity());
    blank
}

/// True when this change may fly.
fn may_fly(flying: &Slab<Flight>, begun: &[(u64, Range<u64>)], job: &Job) -> bool {
    let range = job.op.action.touches().unwrap_or_default();
    let of_owner = flying.iter().filter(|(_, flight)| flight.job.op.owner == job.op.owner).count();
    let of_others = flying.len() - of_owner;
    // If the disk hangs in them, there is room for those of the next owner, and of whoever comes after it.
    of_owner < FLYING_MAX.saturating_sub(of_others).div_ceil(2)
        && !flying.iter().any(|(_, flight)| overlap(&flight.range, &range))
        && !begun.iter().any(|(number, left)| *number != job.number && overlap(left, &range))
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// True for what an image says that cannot punch holes.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::EINVAL))
}

/// How long changes take, as a running mean. They are slow until it is known that they are not.
struct Gauge {
    mean: Duration,
    is_slow: bool,
    /// When the kernel began with what lands next.
    since: Instant,
    /// How many have landed since.
    landed: u32,
}

impl Default for Gauge {
    fn default() -> Self {
        Self { mean: SLOW, is_slow: true, since: Instant::now(), landed: 0 }
    }
}

impl Gauge {
    /// Nothing flies, and something is about to.
    fn begin(&mut self) {
        self.since = Instant::now();
    }

    /// What has landed counts as carried out one after the other. Where the kernel has done it at once, each took up to
    /// [`FLYING_MAX`] times as long as this says.
    fn measure(&mut self) {
        if let Some(took) = self.since.elapsed().checked_div(mem::take(&mut self.landed)) {
            self.begin();
            self.note(took);
        }
    }

    fn note(&mut self, took: Duration) {
        self.mean = (self.mean * (MEMORY - 1)).saturating_add(took) / MEMORY;
        self.is_slow = self.mean > if self.is_slow { QUICK } else { SLOW };
    }
}

#[cfg(test)]
impl Changes {
    /// From now on they count as slow, or as quick, whatever they take.
    pub(super) fn count_as(&mut self, slow: bool) {
        (self.gauge.is_slow, self.gauge.mean) =
            (slow, if slow { Duration::from_secs(1 << 30) } else { Duration::ZERO });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_slow_until_they_are_known_to_be_quick_and_between_the_bounds_as_before() {
        let mut gauge = Gauge::default();
        assert!(gauge.is_slow);
        let note = |gauge: &mut Gauge, took: Duration, times: u32| {
            (0..times).for_each(|_| gauge.note(took));
            gauge.is_slow
        };
        let between = (SLOW + QUICK) / 2;
        assert!(note(&mut gauge, between, 100), "not quick enough");
        assert!(note(&mut gauge, QUICK / 2, 1));
        assert!(!note(&mut gauge, QUICK / 2, 10));
        assert!(!note(&mut gauge, between, 100), "not slow enough");
        assert!(note(&mut gauge, Duration::from_millis(20), 1), "one that hangs is enough");
        assert!(!note(&mut gauge, QUICK / 4, 100));
        assert!(note(&mut gauge, Duration::MAX / MEMORY, 1));
    }

    #[test]
    fn what_lands_together_has_shared_the_time() {
        let mut gauge = Gauge::default();
        gauge.begin();
        gauge.measure();
        assert_eq!(gauge.mean, SLOW, "nothing has landed");
        gauge.since -= Duration::from_secs(8);
        gauge.landed = 8;
        gauge.measure();
        assert!((125_000..2_000_000).contains(&gauge.mean.as_micros()), "{:?}", gauge.mean);
        assert!(gauge.landed == 0 && gauge.since.elapsed() < Duration::from_secs(8));
    }

    #[test]
    fn the_numbers_of_changes_are_no_others() {
        assert_eq!([0, 15].map(|key| key_of(id_of(key))), [Some(0), Some(15)]);
        assert_eq!([0, 128, FIRST_ID - 1].map(key_of), [None; 3]);
    }
}
