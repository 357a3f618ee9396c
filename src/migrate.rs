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
//! clients write meanwhile is dirty again and part of the next pass. When what is left can be sent within the pause
//! target, clients are paused and the rest is sent. Where clients dirty blocks faster than they can be sent, they are
//! held back, twice as much with every pass that gained nothing.
//!
//! Invariants:
//! 1. No two requests in flight overlap: the destination may carry them out in any order.
//! 2. A block is cleared when it is taken, before it is read, and set when a write to it is done, before that write is
//!    answered: at every moment an answered write is at the destination, in flight, taken, or dirty.
//! 3. [`Step::Commit`] comes only after [`Plan::quiesced`], with nothing dirty, nothing in flight, and everything flushed
//!    where the destination can.

use crate::bitmap::Bitmap;
use std::ops::Range;

/// A dirty block, in bytes: 2 MiB of memory per TiB.
const BLOCK: u64 = 64 << 10;
/// The most data of one request, in bytes: one buffer.
pub const DATA_MAX: u64 = 256 << 10;
/// The smallest piece a slow limit cuts data into, in bytes: a page.
const DATA_MIN: u64 = 4 << 10;
/// The longest range zeroed by one request, in bytes. A destination that has to write the zeroes must answer in time.
const ZERO_MAX: u64 = 128 << 20;
/// Blocks taken from the bitmap at once, in bytes. A multiple of what one request may be.
const TAKE_MAX: u64 = 1 << 30;
/// Requests in flight at the most.
pub const MAX_IN_FLIGHT: usize = 128;
/// Data in flight at the most, in bytes: 300 MB/s over 100 ms of round trip.
const UNANSWERED_MAX: u64 = 32 << 20;
/// How long the speed is measured before it counts, in milliseconds.
const METER_MS: u64 = 200;
/// The least clients may dirty per second, in bytes, however slow the way is: they are slowed, not stopped.
const WRITE_LIMIT_MIN: u64 = 2 * BLOCK;
/// Clients are not held back twice within this time, in milliseconds: gradually.
const SLOWER_EVERY_MS: u64 = 500;
/// Data sent since the last flush that is worth another one before clients are paused, in bytes.
const UNFLUSHED_MAX: u64 = 16 << 20;
/// Flushes before the pause at the most; a destination whose flushes stay slow is paused for all the same.
const FLUSHES_MAX: u32 = 3;
/// The shortest time a pause may take before it is given up, in milliseconds.
const PAUSE_LIMIT_MIN_MS: u64 = 1_000;
/// The longest, in milliseconds: each pause given up doubles the limit, so that a slow destination is reached too.
const PAUSE_LIMIT_MAX_MS: u64 = 60_000;

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
    /// Ask the file what begins at this offset, and say so with [`Plan::note_extent`].
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
    Asked {
        at_ms: u64,
    },
    Answered {
        took_ms: u64,
    },
}

/// Lets so many bytes per second pass; what is over is waited for afterwards.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    bytes_per_s: u64,
    left: i64,
    at_ms: u64,
}

impl Bucket {
    fn new(bytes_per_s: u64, now_ms: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), left: 0, at_ms: now_ms }
    }

    /// The time from which on something may pass: now, or later.
    fn open_at(&mut self, now_ms: u64) -> u64 {
        let rate = i64::try_from(self.bytes_per_s).unwrap_or(i64::MAX);
        let elapsed = i64::try_from(now_ms.saturating_sub(self.at_ms)).unwrap_or(i64::MAX);
        let earned = rate.saturating_mul(elapsed) / 1000;
        if earned > 0 {
            // What was not used is kept for a tenth of a second, so that a late timer does not cost speed.
            self.left = self.left.saturating_add(earned).min(rate / 10);
            self.at_ms = now_ms;
        }
        if self.left >= 0 {
            return now_ms;
        }
        let wait = self.left.unsigned_abs().saturating_mul(1000).div_ceil(self.bytes_per_s);
        self.at_ms.saturating_add(wait.max(1))
    }

    fn take(&mut self, bytes: u64) {
        self.left = self.left.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}

/// How fast answers come, while there is always something in flight.
#[derive(Debug, Clone, Copy)]
struct Meter {
    since_ms: u64,
    bytes: u64,
    /// There was a moment without anything in flight: this stretch says nothing about the way.
    idle: bool,
    bytes_per_s: Option<u64>,
}

impl Meter {
    fn new(now_ms: u64) -> Self {
        Self { since_ms: now_ms, bytes: 0, idle: false, bytes_per_s: None }
    }

    fn note(&mut self, bytes: u64, now_ms: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        let elapsed_ms = now_ms.saturating_sub(self.since_ms);
        if elapsed_ms < METER_MS {
            return;
        }
        let sample = self.bytes.saturating_mul(1000) / elapsed_ms;
        self.bytes_per_s = match self.bytes_per_s {
            None => Some(sample),
            Some(before) if self.idle => Some(before.max(sample)),
            Some(before) => Some(before.midpoint(sample)),
        };
        (self.since_ms, self.bytes, self.idle) = (now_ms, 0, false);
    }
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
    /// What is known of the file: a range, and whether it is a hole.
    extent: Option<(Range<u64>, bool)>,
    /// Requests in flight: the range, and whether it is data.
    in_flight: Vec<(Range<u64>, bool)>,
    unanswered_bytes: u64,
    flush: Flush,
    flushes: u32,
    unflushed_bytes: u64,
    pass: u32,
    /// Dirty bytes when the pass began.
    pass_dirty_bytes: u64,
    slower_ms: u64,
    limit: Option<Bucket>,
    write_limit: Option<Bucket>,
    meter: Meter,
    sent_bytes: u64,
    zeroed_bytes: u64,
    paused_ms: u64,
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
            extent: None,
            in_flight: Vec::with_capacity(MAX_IN_FLIGHT),
            unanswered_bytes: 0,
            flush: Flush::Due,
            flushes: 0,
            unflushed_bytes: 0,
            pass: 1,
            pass_dirty_bytes: size,
            slower_ms: now_ms,
            limit: limit_bytes_per_s.map(|limit| Bucket::new(limit, now_ms)),
            write_limit: None,
            meter: Meter::new(now_ms),
            sent_bytes: 0,
            zeroed_bytes: 0,
            paused_ms: now_ms,
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

    /// The destination is gone, and what it has is worth nothing any more. Clients go on. This may be so even after
    /// [`Step::Commit`], as long as the destination has not been told.
    pub fn lost(&mut self, now_ms: u64) {
        self.dirty.set_range(0, self.size);
        self.phase = Phase::Copying;
        (self.cursor, self.taken, self.extent) = (0, 0..0, None);
        self.in_flight.clear();
        (self.unanswered_bytes, self.unflushed_bytes) = (0, 0);
        (self.flush, self.flushes) = (Flush::Due, 0);
        (self.pass, self.pass_dirty_bytes, self.slower_ms) = (1, self.size, now_ms);
        (self.sent_bytes, self.zeroed_bytes, self.pauses_given_up) = (0, 0, 0);
        self.write_limit = None;
        self.meter = Meter::new(now_ms);
    }

    /// Limits what is sent, in bytes per second, from now on; `None` ends the limit.
    pub fn set_limit(&mut self, limit_bytes_per_s: Option<u64>, now_ms: u64) {
        self.limit = limit_bytes_per_s.map(|limit| Bucket::new(limit, now_ms));
        self.meter = Meter::new(now_ms);
    }

    /// A client may have changed the range. To be called before it is told so (invariant 2).
    pub fn note_write(&mut self, range: &Range<u64>) {
        let before = self.dirty.set_bytes();
        self.dirty.set_range(range.start, range.end.saturating_sub(range.start));
        if let Some(limit) = &mut self.write_limit {
            limit.take(self.dirty.set_bytes().saturating_sub(before));
        }
        if self.extent.as_ref().is_some_and(|(known, _)| overlap(known, range)) {
            self.extent = None;
        }
    }

    /// What the file says of an offset asked for with [`Step::Look`].
    pub fn note_extent(&mut self, range: Range<u64>, is_hole: bool) {
        self.extent = Some((range, is_hole));
    }

    /// True while clients have to wait with everything.
    pub fn pauses_clients(&self) -> bool {
        self.phase != Phase::Copying
    }

    /// The time until which clients have to wait with writes, if they have to.
    pub fn holds_writes_until(&mut self, now_ms: u64) -> Option<u64> {
        self.write_limit.as_mut().map(|limit| limit.open_at(now_ms)).filter(|&at_ms| at_ms > now_ms)
    }

    /// Clients are paused, and none of their operations is in flight.
    pub fn quiesced(&mut self) {
        if self.phase == Phase::Quiescing {
            self.phase = Phase::LastPass;
            // Only now does nothing change any more.
            self.extent = None;
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
            self.paused_ms.saturating_add(limit_ms.min(PAUSE_LIMIT_MAX_MS.max(least)))
        })
    }

    /// When clients were paused last.
    pub fn paused_at_ms(&self) -> u64 {
        self.paused_ms
    }

    /// Lets clients go on although the end was near: it took too long.
    pub fn give_up_pause(&mut self) {
        if self.phase != Phase::Committed {
            self.phase = Phase::Copying;
            self.pauses_given_up += 1;
            self.flushes = 0;
        }
    }

    /// The destination has done what a [`Step::Data`] or [`Step::Zero`] asked for.
    pub fn acked(&mut self, range: &Range<u64>, now_ms: u64) {
        let Some(at) = self.in_flight.iter().position(|(sent, _)| sent == range) else { return };
        let (range, is_data) = self.in_flight.swap_remove(at);
        let bytes = range.end - range.start;
        if is_data {
            self.unanswered_bytes -= bytes;
            self.sent_bytes += bytes;
            self.meter.note(bytes, now_ms);
        } else {
            self.zeroed_bytes += bytes;
        }
    }

    /// The destination has answered a [`Step::Flush`].
    pub fn flushed(&mut self, now_ms: u64) {
        if let Flush::Asked { at_ms } = self.flush {
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
            }
            Phase::Quiescing | Phase::Committed => return Step::Wait,
            Phase::LastPass if self.left_bytes() == 0 => return self.finish(now_ms),
            Phase::LastPass => {}
        }
        self.send(now_ms)
    }

    /// The end of the copy: a flush while clients still go on, so that the one in the pause is short; then the pause.
    fn approach_end(&mut self, now_ms: u64) -> Option<Step> {
        if !self.fits_pause() {
            return None;
        }
        if self.can.flush {
            if self.unflushed_bytes > UNFLUSHED_MAX {
                (self.flush, self.flushes) = (self.flush_if_due(), 0);
            }
            match self.flush {
                Flush::Asked { .. } => return None,
                Flush::Answered { took_ms } if took_ms <= self.max_pause_ms / 2 || self.flushes >= FLUSHES_MAX => {}
                Flush::Due | Flush::Answered { .. } => return Some(self.ask_flush(now_ms)),
            }
        }
        self.phase = Phase::Quiescing;
        self.paused_ms = now_ms;
        Some(Step::Quiesce)
    }

    /// A flush that is on its way is not forgotten.
    fn flush_if_due(&self) -> Flush {
        match self.flush {
            asked @ Flush::Asked { .. } => asked,
            _ => Flush::Due,
        }
    }

    fn ask_flush(&mut self, now_ms: u64) -> Step {
        self.flush = Flush::Asked { at_ms: now_ms };
        self.flushes += 1;
        // A flush covers what was answered before it, not what is on its way beside it.
        self.unflushed_bytes = self.in_flight_bytes();
        Step::Flush
    }

    /// Nothing is left: a last flush covers what was sent since the one before, then the commit.
    fn finish(&mut self, now_ms: u64) -> Step {
        match self.flush {
            _ if !self.can.flush => {}
            Flush::Asked { .. } => return Step::Wait,
            Flush::Answered { .. } if self.unflushed_bytes == 0 => {}
            Flush::Due | Flush::Answered { .. } => return self.ask_flush(now_ms),
        }
        self.phase = Phase::Committed;
        debug_assert!(self.left_bytes() == 0 && self.in_flight.is_empty(), "invariant 3");
        Step::Commit
    }

    /// The next piece of the image.
    fn send(&mut self, now_ms: u64) -> Step {
        if self.in_flight.len() >= MAX_IN_FLIGHT || self.unanswered_bytes >= UNANSWERED_MAX {
            return Step::Wait;
        }
        if self.taken.is_empty() && !self.take(now_ms) {
            self.meter.idle |= self.in_flight.is_empty();
            return Step::Wait;
        }
        let start = self.taken.start;
        let Some((known, is_hole)) = self.extent.as_ref().filter(|(known, _)| known.contains(&start)) else {
            return Step::Look(start);
        };
        let (known_end, is_hole) = (known.end, *is_hole);
        let zero = is_hole && self.can.zero;
        let most = if zero { ZERO_MAX } else { self.data_max() };
        let end = self.taken.end.min(known_end).min(start.saturating_add(most));
        if !zero {
            if let Some(at_ms) = self.limit.as_mut().map(|limit| limit.open_at(now_ms)).filter(|&at_ms| at_ms > now_ms)
            {
                return Step::WaitUntil(at_ms);
            }
            let bytes = end - start;
            self.limit.iter_mut().for_each(|limit| limit.take(bytes));
            self.unanswered_bytes += bytes;
        }
        debug_assert!(self.in_flight.iter().all(|(sent, _)| !overlap(sent, &(start..end))), "invariant 1");
        self.taken.start = end;
        self.unflushed_bytes = self.unflushed_bytes.saturating_add(if zero { DATA_MIN } else { end - start });
        self.in_flight.push((start..end, !zero));
        if is_hole {
            Step::Zero(start..end)
        } else {
            Step::Data(start..end)
        }
    }

    /// Takes the next dirty blocks from the bitmap. False when there are none that could be sent now.
    fn take(&mut self, now_ms: u64) -> bool {
        let found = self.dirty.next_set_range(self.cursor, TAKE_MAX);
        let Some(mut range) = found.or_else(|| {
            let first = self.dirty.next_set_range(0, TAKE_MAX)?;
            self.begin_pass(now_ms);
            Some(first)
        }) else {
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
        self.dirty.clear_range(range.start, range.end - range.start);
        self.cursor = range.end;
        self.taken = range;
        true
    }

    /// Looks back at a pass: if it gained nothing, clients are held back.
    fn begin_pass(&mut self, now_ms: u64) {
        let dirty_bytes = self.dirty.set_bytes();
        let gained = dirty_bytes <= self.pass_dirty_bytes / 4 * 3;
        let early = now_ms < self.slower_ms.saturating_add(SLOWER_EVERY_MS);
        self.cursor = 0;
        if early && self.pass > 1 {
            return;
        }
        if !gained && !self.fits_pause() {
            let before = self.write_limit.map_or(self.meter.bytes_per_s.unwrap_or(u64::MAX), |limit| limit.bytes_per_s);
            self.write_limit = Some(Bucket::new((before / 2).max(WRITE_LIMIT_MIN), now_ms));
        }
        self.pass += 1;
        (self.pass_dirty_bytes, self.slower_ms) = (dirty_bytes, now_ms);
    }

    /// How much one request may carry: less when the limit is slow, so that it is held evenly.
    fn data_max(&self) -> u64 {
        let most = self.limit.map_or(DATA_MAX, |limit| limit.bytes_per_s / 20);
        most.clamp(DATA_MIN, DATA_MAX) / DATA_MIN * DATA_MIN
    }

    /// True when what is left can be sent within the pause target.
    fn fits_pause(&self) -> bool {
        let left = self.left_bytes();
        let speed = self.meter.bytes_per_s.unwrap_or(0);
        left == 0 || left.saturating_mul(1000) <= speed.saturating_mul(self.max_pause_ms)
    }

    fn left_bytes(&self) -> u64 {
        self.dirty.set_bytes() + (self.taken.end - self.taken.start) + self.in_flight_bytes()
    }

    fn in_flight_bytes(&self) -> u64 {
        self.in_flight.iter().map(|(range, _)| range.end - range.start).sum()
    }

    /// What was done and what is left.
    pub fn progress(&self) -> Progress {
        Progress {
            pass: self.pass,
            sent_bytes: self.sent_bytes,
            zeroed_bytes: self.zeroed_bytes,
            left_bytes: self.left_bytes(),
            dirty_bytes: self.dirty.set_bytes(),
            bytes_per_s: self.meter.bytes_per_s.unwrap_or(0),
            limit_bytes_per_s: self.limit.map(|limit| limit.bytes_per_s),
            write_limit_bytes_per_s: self.write_limit.map(|limit| limit.bytes_per_s),
        }
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
