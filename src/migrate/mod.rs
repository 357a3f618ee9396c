//! PURE: what a migration sends next. Time comes in as a parameter, in milliseconds.
//!
//! ```text
//!  Copying ──> Quiescing ──> LastPass ──> Commit
//!     ^            │             │
//!     └────────────┴─────────────┘  the pause took too long: clients go on, the copy goes on
//!     lost(): everything is dirty again, from any phase
//! ```
//!
//! The image is a bitmap of dirty blocks, all of them at first. A pass goes over the dirty blocks in their order; what
//! clients write meanwhile is dirty again and part of the next pass. When another pass would gain nothing and what is
//! left can be sent within the pause target, clients are paused and the rest is sent. Where clients dirty blocks faster
//! than they can be sent, they are held back, twice as much with every pass that gained nothing.
//!
//! Invariants:
//! 1. No two requests in flight overlap: the destination may carry them out in any order.
//! 2. A block is cleared when it is taken, before it is read, and set when a write to it is done, before that write is
//!    answered: at every moment an answered write is at the destination, in flight, taken, or dirty.
//! 3. [`Step::Commit`] comes only after [`Plan::quiesced`], with nothing dirty, nothing in flight, and everything flushed
//!    where the destination can.

mod bucket;
mod holes;
mod meter;

use crate::bitmap::Bitmap;
use crate::work::Extent;
use bucket::Bucket;
use holes::Holes;
use meter::Meter;
use std::ops::Range;

/// A dirty block, in bytes: 2 MiB of memory per TiB.
const BLOCK: u64 = 64 << 10;
/// The most data of one request, in bytes: one buffer.
pub const DATA_MAX: u64 = 256 << 10;
/// The smallest piece a slow limit cuts data into, in bytes: a page. Also what a request without data is taken to cost.
const DATA_MIN: u64 = 4 << 10;
/// The longest range zeroed by one request, in bytes. A destination that has to write the zeroes must answer in time.
const ZERO_MAX: u64 = 128 << 20;
/// Requests in flight at the most; 32 MiB of data, which is 300 MB/s over 100 ms of round trip.
pub const MAX_IN_FLIGHT: usize = 128;
/// The least clients may dirty per second, in bytes, however slow the way is: a block every two seconds.
const WRITE_LIMIT_MIN: u64 = BLOCK / 2;
/// The longest that writes are kept waiting in one go, in milliseconds: they are slowed, not stopped. The disk drivers
/// of guests give up after 30 s.
const KEPT_MAX_MS: u64 = 10_000;
/// The most that one operation of a client counts against its limit, in bytes. What is longer than a buffer is zeroes.
const WRITE_MAX: u64 = DATA_MAX + BLOCK;
/// Clients are not held back twice within this time, in milliseconds: gradually.
const SLOWER_EVERY_MS: u64 = 500;
/// Data sent since the last flush that is worth another one before clients are paused, in bytes.
const UNFLUSHED_MAX: u64 = 16 << 20;
/// Data sent since the last flush that is worth another one at any time, in bytes. A destination that collects more in
/// its memory might need longer for the flush at the end than an answer may take.
const FLUSH_EVERY: u64 = 1 << 30;
/// Flushes just before the pause at the most; a destination whose flushes stay slow is paused for all the same.
const FLUSHES_MAX: u32 = 3;
/// The shortest time a pause may take before it is given up, in milliseconds.
const PAUSE_LIMIT_MIN_MS: u64 = 1_000;
/// The longest, in milliseconds, unless a longer target was asked for: each pause given up doubles the limit, so that a
/// slow destination is reached too. Guests report errors of a disk that is silent for 30 s.
const PAUSE_LIMIT_MAX_MS: u64 = 10_000;

/// What the destination can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Abilities {
    /// It takes `WRITE_ZEROES`. If not, zeroes are sent as data.
    pub zero: bool,
    /// It takes FLUSH.
    pub flush: bool,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Ask the disk what begins at this offset, and say so with [`Plan::note_extent`] when it has answered. One question
    /// at a time; what goes on meanwhile does not depend on it.
    Look(u64),
    /// Read the range, then send it.
    Data(Range<u64>),
    /// Make the range zero.
    Zero(Range<u64>),
    /// Flush the destination.
    Flush,
    /// Nothing before an answer comes.
    Wait,
    /// Nothing before this time, or an answer.
    WaitUntil(u64),
    /// Pause clients and, when none of their operations is in flight, say so with [`Plan::quiesced`].
    Quiesce,
    /// Everything is there: end the connection in the way that says so.
    Commit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Copying,
    Quiescing,
    LastPass,
    Committed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flush {
    /// None was asked for since enough was sent to want one.
    Due,
    /// Until it is answered, there should not be more than this much for the next one.
    Asked {
        at_ms: u64,
        unflushed_max: u64,
    },
    Answered {
        took_ms: u64,
    },
}

/// What a migration has done and has left, for status and log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Passes begun in this attempt, the last one included.
    pub pass: u32,
    /// Bytes of data sent and confirmed in this attempt.
    pub sent_bytes: u64,
    /// Bytes zeroed and confirmed in this attempt, without having been sent.
    pub zeroed_bytes: u64,
    /// Bytes not confirmed yet.
    pub left_bytes: u64,
    /// Bytes of dirty blocks that were not taken yet.
    pub dirty_bytes: u64,
    /// The measured speed, in bytes per second; 0 before there is one.
    pub bytes_per_s: u64,
    /// The limit, if there is one.
    pub limit_bytes_per_s: Option<u64>,
    /// How much clients may dirty per second, when they are held back.
    pub write_limit_bytes_per_s: Option<u64>,
}

/// One migration, over all of its attempts.
#[derive(Debug)]
pub struct Plan {
    size: u64,
    max_pause_ms: u64,
    can: Abilities,
    phase: Phase,
    dirty: Bitmap,
    /// Where the pass is.
    cursor: u64,
    /// What was taken from the bitmap and not sent yet.
    taken: Range<u64>,
    holes: Holes,
    /// Requests in flight: the range, and whether it is data.
    in_flight: Vec<(Range<u64>, bool)>,
    flush: Flush,
    /// How often it was flushed just before a pause.
    flushes: u32,
    /// What the last flush does not cover.
    unflushed_bytes: u64,
    pass: u32,
    /// Dirty bytes when the pass began.
    pass_dirty_bytes: u64,
    /// The pass began with hardly less than the one before: there is nothing to gain by another.
    settled: bool,
    /// When clients were held back last.
    slower_ms: u64,
    limit: Option<Bucket>,
    write_limit: Option<Bucket>,
    /// What clients have paid for and not dirtied yet, in bytes.
    paid_bytes: u64,
    meter: Meter,
    sent_bytes: u64,
    zeroed_bytes: u64,
    paused_ms: u64,
    /// The time before which there is no other pause.
    pause_from_ms: u64,
    pauses_given_up: u32,
}

impl Plan {
    /// A plan for an image of `size` bytes, all of it dirty. `max_pause_ms` is how long clients should be paused at most.
    pub fn new(size: u64, max_pause_ms: u64, limit_bytes_per_s: Option<u64>, now_ms: u64) -> Self {
        let mut plan = Self {
            size,
            max_pause_ms,
            can: Abilities::default(),
            phase: Phase::Copying,
            dirty: Bitmap::new(size, BLOCK),
            cursor: 0,
            taken: 0..0,
            holes: Holes::default(),
            in_flight: Vec::with_capacity(MAX_IN_FLIGHT),
            flush: Flush::Due,
            flushes: 0,
            unflushed_bytes: 0,
            pass: 1,
            pass_dirty_bytes: size,
            settled: false,
            slower_ms: now_ms,
            limit: limit_bytes_per_s.map(|limit| Bucket::new(limit, now_ms)),
            write_limit: None,
            paid_bytes: 0,
            meter: Meter::new(now_ms),
            sent_bytes: 0,
            zeroed_bytes: 0,
            paused_ms: now_ms,
            pause_from_ms: now_ms,
            pauses_given_up: 0,
        };
        plan.dirty.set_range(0, size);
        plan
    }

    /// A destination is there, and nothing is: an attempt begins.
    pub fn begin(&mut self, can: Abilities, now_ms: u64) {
        self.lost(now_ms);
        self.can = can;
    }

    /// The destination is gone, and what it has is worth nothing any more. Clients go on. Even [`Step::Commit`] may fail
    /// like this, up to the moment in which the destination could have been told.
    pub fn lost(&mut self, now_ms: u64) {
        self.dirty.set_range(0, self.size);
        self.phase = Phase::Copying;
        (self.cursor, self.taken, self.holes) = (0, 0..0, Holes::default());
        self.in_flight.clear();
        (self.flush, self.flushes, self.unflushed_bytes) = (Flush::Due, 0, 0);
        (self.pass, self.pass_dirty_bytes, self.settled, self.slower_ms) = (1, self.size, false, now_ms);
        (self.sent_bytes, self.zeroed_bytes) = (0, 0);
        (self.pause_from_ms, self.pauses_given_up) = (now_ms, 0);
        (self.write_limit, self.paid_bytes) = (None, 0);
        self.meter = Meter::new(now_ms);
    }

    /// Limits what is sent, in bytes per second, from now on; `None` ends the limit.
    pub fn set_limit(&mut self, limit_bytes_per_s: Option<u64>, now_ms: u64) {
        self.limit = limit_bytes_per_s.map(|limit| Bucket::new(limit, now_ms));
        self.meter = Meter::new(now_ms);
    }

    /// A client's operation that may change the range goes to the disk: the write limit is charged what that will cost to
    /// send, which is the blocks that are clean now.
    pub fn note_submitted(&mut self, range: &Range<u64>) {
        if self.write_limit.is_some() {
            let bytes = self.dirty.clear_bytes(range.start, range.end.saturating_sub(range.start));
            self.charge(bytes);
            self.paid_bytes = self.paid_bytes.saturating_add(bytes);
        }
    }

    fn charge(&mut self, dirtied_bytes: u64) {
        if let Some(limit) = &mut self.write_limit {
            // Zeroes that cost one request when they are sent cost no more here.
            limit.take(if self.can.zero { dirtied_bytes.min(WRITE_MAX) } else { dirtied_bytes });
            limit.forgive_beyond(KEPT_MAX_MS);
        }
    }

    /// A client may have changed the range. To be called before it is told so (invariant 2).
    pub fn note_write(&mut self, range: &Range<u64>) {
        let before = self.dirty.set_bytes();
        // What is taken will be read with this write in it.
        for part in [range.start..range.end.min(self.taken.start), range.start.max(self.taken.end)..range.end] {
            self.dirty.set_range(part.start, part.end.saturating_sub(part.start));
        }
        // Blocks that were dirty when this was submitted cost nothing then. Those that were taken since are sent again.
        let dirtied = self.dirty.set_bytes() - before;
        self.charge(dirtied.saturating_sub(self.paid_bytes));
        self.paid_bytes = self.paid_bytes.saturating_sub(dirtied);
        self.holes.note_write(range);
    }

    /// What the disk says of the offset asked for with [`Step::Look`]; data, if it cannot say. An answer to an attempt that
    /// was lost must not get here.
    pub fn note_extent(&mut self, extent: Extent) {
        self.holes.note_extent(extent);
    }

    /// True while clients have to wait with everything.
    pub fn pauses_clients(&self) -> bool {
        self.phase != Phase::Copying
    }

    /// The time until which requests of clients that change something have to wait, if they have to. To be asked before
    /// each of them, because each makes the next wait ([`Plan::note_submitted`]).
    pub fn keeps_changes_until(&mut self, now_ms: u64) -> Option<u64> {
        self.write_limit.as_mut().map(|limit| limit.open_at(now_ms)).filter(|&at_ms| at_ms > now_ms)
    }

    /// Clients are paused, and none of their operations is in flight.
    pub fn quiesced(&mut self) {
        if self.phase == Phase::Quiescing {
            self.phase = Phase::LastPass;
        }
    }

    /// True between [`Step::Quiesce`] and [`Plan::quiesced`].
    pub fn is_quiescing(&self) -> bool {
        self.phase == Phase::Quiescing
    }

    /// The time at which the pause has to end, if there is one that can end without a commit.
    pub fn pause_ends_ms(&self) -> Option<u64> {
        matches!(self.phase, Phase::Quiescing | Phase::LastPass).then(|| {
            let least = self.max_pause_ms.saturating_mul(5).max(PAUSE_LIMIT_MIN_MS);
            let limit_ms = least.saturating_mul(1 << self.pauses_given_up.min(16));
            self.paused_ms.saturating_add(limit_ms.min(PAUSE_LIMIT_MAX_MS.max(self.max_pause_ms)))
        })
    }

    /// When clients were paused last.
    pub fn paused_at_ms(&self) -> u64 {
        self.paused_ms
    }

    /// Lets clients go on although the end was near: it took too long. They get as much time as they were paused.
    pub fn give_up_pause(&mut self) {
        let Some(end_ms) = self.pause_ends_ms() else { return };
        self.pause_from_ms = end_ms.saturating_add(end_ms - self.paused_ms);
        self.phase = Phase::Copying;
        self.pauses_given_up += 1;
        self.flushes = 0;
        // What was to fit did not, so the way may not be as fast as it was.
        self.meter.bytes_per_s = self.meter.bytes_per_s.map(|speed| speed / 2);
    }

    /// The destination has done what a [`Step::Data`] or [`Step::Zero`] asked for.
    pub fn acked(&mut self, range: &Range<u64>, now_ms: u64) {
        let Some(at) = self.in_flight.iter().position(|(sent, _)| sent == range) else { return };
        let (range, is_data) = self.in_flight.swap_remove(at);
        let bytes = range.end - range.start;
        if is_data {
            self.sent_bytes += bytes;
            self.meter.note(bytes, now_ms);
        } else {
            self.zeroed_bytes += bytes;
        }
    }

    /// The destination has answered a [`Step::Flush`].
    pub fn flushed(&mut self, now_ms: u64) {
        if let Flush::Asked { at_ms, .. } = self.flush {
            self.flush = Flush::Answered { took_ms: now_ms.saturating_sub(at_ms) };
        }
    }

    /// What to do next; to be asked until it says to wait.
    pub fn next(&mut self, now_ms: u64) -> Step {
        match self.phase {
            Phase::Copying => {
                if let Some(step) = self.approach_end(now_ms) {
                    return step;
                }
                if self.can.flush && self.unflushed_bytes >= FLUSH_EVERY && !matches!(self.flush, Flush::Asked { .. }) {
                    return self.ask_flush(FLUSH_EVERY, now_ms);
                }
            }
            Phase::Quiescing | Phase::Committed => return Step::Wait,
            Phase::LastPass if self.left_bytes() == 0 => return self.finish(now_ms),
            Phase::LastPass => {}
        }
        self.send(now_ms)
    }

    /// The end of the copy: a flush while clients still go on, so that the one in the pause is short; then the pause.
    fn approach_end(&mut self, now_ms: u64) -> Option<Step> {
        let left = self.left_bytes();
        if left > 0 && !(self.settled && self.fits_pause()) {
            return None;
        }
        if self.can.flush {
            match self.flush {
                Flush::Asked { .. } => return None,
                Flush::Answered { .. } if self.unflushed_bytes == 0 || self.flushes >= FLUSHES_MAX => {}
                Flush::Answered { took_ms }
                    if took_ms <= self.max_pause_ms / 2 && self.unflushed_bytes <= UNFLUSHED_MAX => {}
                Flush::Due | Flush::Answered { .. } => {
                    self.flushes += 1;
                    return Some(self.ask_flush(UNFLUSHED_MAX / 2, now_ms));
                }
            }
        }
        if now_ms < self.pause_from_ms {
            return (left == 0).then_some(Step::WaitUntil(self.pause_from_ms));
        }
        self.phase = Phase::Quiescing;
        self.paused_ms = now_ms;
        Some(Step::Quiesce)
    }

    /// Flushes; not much more than `more` is sent before that is done, or the flush after it would take even longer.
    fn ask_flush(&mut self, more: u64, now_ms: u64) -> Step {
        // A flush covers what was answered before it, not what is on its way beside it.
        self.unflushed_bytes = self.in_flight.iter().map(|(range, is_data)| flush_cost(range, *is_data)).sum();
        self.flush = Flush::Asked { at_ms: now_ms, unflushed_max: self.unflushed_bytes.saturating_add(more) };
        Step::Flush
    }

    /// Nothing is left: a last flush covers what was sent since the one before, then the commit.
    fn finish(&mut self, now_ms: u64) -> Step {
        match self.flush {
            _ if !self.can.flush => {}
            Flush::Asked { .. } => return Step::Wait,
            Flush::Answered { .. } if self.unflushed_bytes == 0 => {}
            Flush::Due | Flush::Answered { .. } => return self.ask_flush(UNFLUSHED_MAX / 2, now_ms),
        }
        self.phase = Phase::Committed;
        debug_assert!(self.left_bytes() == 0 && self.in_flight.is_empty(), "invariant 3");
        Step::Commit
    }

    /// The next piece of the image.
    fn send(&mut self, now_ms: u64) -> Step {
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return Step::Wait;
        }
        let enough = matches!(self.flush, Flush::Asked { unflushed_max, .. } if self.unflushed_bytes >= unflushed_max);
        if enough || (self.taken.is_empty() && !self.take(now_ms)) {
            self.meter.idle = true;
            return Step::Wait;
        }
        let start = self.taken.start;
        let Some(&Extent { range: Range { end: known_end, .. }, is_hole }) = self.holes.at(start) else {
            return if self.holes.ask(start) { Step::Look(start) } else { Step::Wait };
        };
        let zero = is_hole && self.can.zero;
        let most = if zero { ZERO_MAX } else { self.data_max() };
        let end = self.taken.end.min(known_end).min(start.saturating_add(most));
        if !zero {
            if let Some(at_ms) = self.limit.as_mut().map(|limit| limit.open_at(now_ms)).filter(|&at_ms| at_ms > now_ms)
            {
                return Step::WaitUntil(at_ms);
            }
            self.limit.iter_mut().for_each(|limit| limit.take(end - start));
            self.meter.idle |= !self.in_flight.iter().any(|(_, is_data)| *is_data);
        }
        debug_assert!(self.in_flight.iter().all(|(sent, _)| !overlap(sent, &(start..end))), "invariant 1");
        self.taken.start = end;
        self.unflushed_bytes = self.unflushed_bytes.saturating_add(flush_cost(&(start..end), !zero));
        self.in_flight.push((start..end, !zero));
        if is_hole {
            Step::Zero(start..end)
        } else {
            Step::Data(start..end)
        }
    }

    /// Takes the next dirty blocks from the bitmap. False when there are none that could be sent now.
    fn take(&mut self, now_ms: u64) -> bool {
        let ahead = self.dirty.next_set_range(self.cursor, ZERO_MAX);
        let is_new_pass = ahead.is_none();
        let Some(mut range) = ahead.or_else(|| self.dirty.next_set_range(0, ZERO_MAX)) else {
            // The pass ends here, or it would follow a client that writes in order through all of the image.
            self.cursor = self.size;
            return false;
        };
        for (sent, _) in &self.in_flight {
            if overlap(sent, &range) {
                // The answer comes soon; blocks before it need not wait.
                range.end = range.end.min((sent.start / BLOCK * BLOCK).max(range.start));
            }
        }
        if range.is_empty() {
            return false;
        }
        if is_new_pass {
            self.begin_pass(now_ms);
        }
        self.dirty.clear_range(range.start, range.end - range.start);
        self.cursor = range.end;
        self.taken = range;
        true
    }

    /// Looks back at a pass: if it gained nothing, the end is near, or clients are held back.
    fn begin_pass(&mut self, now_ms: u64) {
        let dirty_bytes = self.dirty.set_bytes();
        self.settled = dirty_bytes > self.pass_dirty_bytes / 4 * 3;
        self.pass += 1;
        self.pass_dirty_bytes = dirty_bytes;
        if !self.settled || self.fits_pause() || now_ms < self.slower_ms.saturating_add(SLOWER_EVERY_MS) {
            return;
        }
        let Some(speed) = self.speed() else { return };
        let before = self.write_limit.map_or(speed, |limit| limit.bytes_per_s.min(speed));
        self.write_limit = Some(Bucket::new((before / 2).max(WRITE_LIMIT_MIN), now_ms));
        self.paid_bytes = 0;
        self.slower_ms = now_ms;
    }

    /// How much one request may carry: less when the limit is slow, so that it is held evenly.
    fn data_max(&self) -> u64 {
        let most = self.limit.map_or(DATA_MAX, |limit| limit.bytes_per_s / 20);
        most.clamp(DATA_MIN, DATA_MAX) / DATA_MIN * DATA_MIN
    }

    /// True when what is left can be sent within half of the pause target. The other half is for the flush. Clients that
    /// are held back for longer than that with every block may be paused for as long.
    fn fits_pause(&self) -> bool {
        let held_ms = self.write_limit.map_or(0, |limit| BLOCK * 1000 / limit.bytes_per_s);
        let target_ms = (self.max_pause_ms / 2).max(held_ms);
        self.left_bytes().saturating_mul(1000) <= self.speed().unwrap_or(0).saturating_mul(target_ms)
    }

    /// How fast data goes, in bytes per second, once there is a measure.
    fn speed(&self) -> Option<u64> {
        let most = self.limit.map_or(u64::MAX, |limit| limit.bytes_per_s);
        self.meter.bytes_per_s.map(|speed| speed.min(most))
    }

    fn left_bytes(&self) -> u64 {
        let in_flight: u64 = self.in_flight.iter().map(|(range, _)| range.end - range.start).sum();
        self.dirty.set_bytes() + (self.taken.end - self.taken.start) + in_flight
    }

    /// True when a hole costs one small request, whatever its size.
    pub fn sends_no_holes(&self) -> bool {
        self.can.zero
    }

    /// What was done and what is left.
    pub fn progress(&self) -> Progress {
        Progress {
            pass: self.pass,
            sent_bytes: self.sent_bytes,
            zeroed_bytes: self.zeroed_bytes,
            // What is in flight and dirty again is not twice as much for whoever looks at it.
            left_bytes: self.left_bytes().min(self.size),
            dirty_bytes: self.dirty.set_bytes(),
            bytes_per_s: self.speed().unwrap_or(0),
            limit_bytes_per_s: self.limit.map(|limit| limit.bytes_per_s),
            write_limit_bytes_per_s: self.write_limit.map(|limit| limit.bytes_per_s),
        }
    }
}

/// What a request adds to the work of the next flush, in bytes.
fn flush_cost(range: &Range<u64>, is_data: bool) -> u64 {
    if is_data {
        range.end - range.start
    } else {
        DATA_MIN
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const ALL: Abilities = Abilities { zero: true, flush: true };

    fn begun(size: u64) -> Plan {
        let mut plan = Plan::new(size, 100, None, 0);
        plan.begin(ALL, 0);
        plan
    }

    /// What comes next, in a file that is a hole from some offset on.
    fn next(plan: &mut Plan, hole_from: u64, now_ms: u64) -> Step {
        loop {
            match plan.next(now_ms) {
                Step::Look(offset) if offset < hole_from => {
                    plan.note_extent(Extent { range: offset..hole_from, is_hole: false });
                }
                Step::Look(offset) => plan.note_extent(Extent { range: offset..u64::MAX, is_hole: true }),
                step => return step,
            }
        }
    }

    #[test]
    fn what_is_taken_and_not_read_yet_does_not_become_dirty() {
        let mut plan = begun(4 * MIB);
        assert_eq!(next(&mut plan, u64::MAX, 0), Step::Data(0..DATA_MAX));
        plan.note_write(&(MIB..2 * MIB));
        assert_eq!(plan.progress().dirty_bytes, 0);
        plan.note_write(&(DATA_MAX - 1..MIB));
        assert_eq!(plan.progress().dirty_bytes, BLOCK);
    }

    #[test]
    fn clients_are_kept_waiting_for_a_bounded_time() {
        let mut plan = begun(1 << 40);
        plan.dirty.clear();
        plan.write_limit = Some(Bucket::new(MIB, 0));
        // Zeroes without end cost no more than a buffer of data where they are one request, and less than for ever where not.
        plan.note_submitted(&(0..1 << 39));
        assert_eq!(plan.keeps_changes_until(0), Some(WRITE_MAX * 1000 / MIB + 1));
        plan.can.zero = false;
        plan.note_submitted(&(1 << 39..1 << 40));
        assert_eq!(plan.keeps_changes_until(0), Some(KEPT_MAX_MS));
        assert_eq!(plan.keeps_changes_until(KEPT_MAX_MS), None);
    }

    #[test]
    fn each_block_that_becomes_dirty_is_paid_for_once() {
        let mut plan = begun(1 << 30);
        plan.dirty.clear();
        plan.note_submitted(&(0..MIB));
        plan.note_write(&(0..MIB));
        assert_eq!(plan.keeps_changes_until(0), None, "there is no limit");
        plan.write_limit = Some(Bucket::new(1000 * BLOCK, 0));
        plan.note_submitted(&(0..MIB));
        plan.note_write(&(0..MIB));
        assert_eq!(plan.keeps_changes_until(0), None, "what is dirty costs nothing more");
        plan.note_submitted(&(MIB - 1..MIB + 1));
        assert_eq!(plan.keeps_changes_until(0), Some(1), "one block is clean");
        plan.note_write(&(MIB - 1..MIB + 1));
        assert_eq!(plan.keeps_changes_until(0), Some(1), "it was paid for");
        plan.note_submitted(&(0..MIB));
        plan.dirty.clear();
        plan.note_write(&(0..2 * BLOCK));
        assert_eq!(
            plan.keeps_changes_until(0),
            Some(3),
            "two blocks were dirty when this was submitted, and then taken"
        );
    }

    #[test]
    fn a_long_copy_is_flushed_on_its_way() {
        let mut plan = begun(5 << 30);
        let mut sent = 0;
        for flush in 1..=4 {
            loop {
                match next(&mut plan, u64::MAX, 0) {
                    Step::Data(range) => {
                        sent += range.end - range.start;
                        plan.acked(&range, 0);
                    }
                    Step::Flush => break plan.flushed(0),
                    step => panic!("{step:?}"),
                }
            }
            assert_eq!(sent, flush * FLUSH_EVERY);
        }
    }

    #[test]
    fn a_flush_that_is_not_answered_holds_up_the_copy() {
        let mut plan = begun(5 << 30);
        let (mut sent, mut flushes) = (0, 0);
        while next(&mut plan, u64::MAX, 0) != Step::Wait {
            sent = plan.cursor - (plan.taken.end - plan.taken.start);
            flushes += u32::from(matches!(plan.flush, Flush::Asked { .. }) && plan.unflushed_bytes == 0);
            plan.in_flight.clear();
        }
        assert_eq!((sent, flushes), (2 * FLUSH_EVERY, 1));
    }

    #[test]
    fn time_that_went_into_zeroes_is_not_counted_as_slow() {
        let mut plan = begun(1 << 30);
        for now_ms in 0..400 {
            let Step::Data(range) = next(&mut plan, 100 * MIB, now_ms) else { panic!("data first") };
            plan.acked(&range, now_ms);
        }
        let speed = plan.progress().bytes_per_s;
        assert!(speed > 0);
        for now_ms in 400..10_000 {
            match next(&mut plan, 100 * MIB, now_ms * 10) {
                Step::Zero(range) => plan.acked(&range, now_ms * 10),
                Step::Flush => break,
                _ => {}
            }
        }
        plan.note_write(&(0..DATA_MAX));
        let Step::Data(range) = next(&mut plan, 100 * MIB, 100_000) else { panic!("what is dirty") };
        plan.acked(&range, 100_001);
        assert_eq!(plan.progress().bytes_per_s, speed);
    }

    #[test]
    fn after_a_pause_that_took_too_long_clients_go_on_for_as_long() {
        let mut plan = Plan::new(BLOCK, 100, None, 0);
        plan.begin(Abilities::default(), 0);
        let mut limit_ms = PAUSE_LIMIT_MIN_MS;
        let Step::Data(range) = next(&mut plan, u64::MAX, 0) else { panic!("data first") };
        plan.acked(&range, 10);
        let mut now_ms = 10;
        for _ in 0..9 {
            assert_eq!(next(&mut plan, u64::MAX, now_ms), Step::Quiesce);
            now_ms += limit_ms;
            assert_eq!(plan.pause_ends_ms(), Some(now_ms));
            plan.give_up_pause();
            assert!(!plan.pauses_clients());
            assert_eq!(next(&mut plan, u64::MAX, now_ms), Step::WaitUntil(now_ms + limit_ms));
            now_ms += limit_ms;
            limit_ms = (2 * limit_ms).min(PAUSE_LIMIT_MAX_MS);
        }
    }
}
