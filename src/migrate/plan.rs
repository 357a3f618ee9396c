//! PURE: the source of a migration: what comes next, over all of its attempts.

use super::changes::Changes;
use super::flush::{Flushes, Need, Why};
use super::holes::Holes;
use super::pace::Pace;
use super::pass::{Pass, Taken, BLOCK, IN_FLIGHT_MAX};
use super::pause::{Pause, Phase};
use super::settle::Settling;
use crate::bitmap::Bitmap;
use crate::bucket::Bucket;
use crate::work::Extent;
use std::mem;
use std::ops::Range;

/// The most data of one request, in bytes: one buffer.
pub const DATA_MAX: u64 = 256 << 10;
/// The smallest piece that a slow limit cuts data into, in bytes: a page.
const DATA_MIN: u64 = 4 << 10;
/// The most that one operation of a client is charged for, in bytes, where zeroes go as one request: whatever is longer
/// than a buffer is zeroes.
const CHARGE_MAX: u64 = DATA_MAX + BLOCK;
/// The speed to reckon with while nothing but zeroes has been sent, in bytes per second.
const SPEED_UNKNOWN: u64 = 10_000_000;

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
    /// Ask the disk what begins at this offset, and say so with [`Plan::note_extent`] when it has answered. One
    /// question at a time; whatever does not depend on the answer goes on meanwhile.
    Look(u64),
    /// Read the range, then send it.
    Data(Range<u64>),
    /// Make the range zero.
    Zero(Range<u64>),
    /// Flush the destination.
    Flush,
    /// Nothing before an answer comes.
    Wait,
    /// Nothing before an operation of a client is done: there is nothing else left.
    WaitForClients,
    /// Nothing before this time, or an answer.
    WaitUntil(u64),
    /// Pause clients and, when none of their operations is in flight, say so with [`Plan::quiesced`].
    Quiesce,
    /// Flush the image here, and say so with [`Plan::settled`].
    Settle,
    /// Everything is there: mark the image here as moved, make that durable, and say so with [`Plan::marked`].
    Mark,
    /// End the connection in the way that says that everything is there.
    Commit,
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
    /// How much clients may dirty per second, while they are slowed down.
    pub write_limit_bytes_per_s: Option<u64>,
}

/// One migration, over all of its attempts.
#[derive(Debug)]
pub struct Plan {
    size: u64,
    /// How long clients should be paused at most, in milliseconds.
    pause_target_ms: u64,
    limit: Option<Bucket>,
    changes: Changes,
    attempt: Attempt,
}

/// All that belongs to one attempt and is worth nothing after it.
#[derive(Debug)]
struct Attempt {
    can: Abilities,
    pass: Pass,
    holes: Holes,
    flushes: Flushes,
    pause: Pause,
    /// `None`: the image stays here, or can have no mark.
    settling: Option<Settling>,
    pace: Pace,
    sent_bytes: u64,
    zeroed_bytes: u64,
}

impl Plan {
    /// The most memory that a plan takes, in bytes.
    pub fn memory_for(size: u64) -> usize {
        Bitmap::memory_for(size, BLOCK)
    }

    /// A plan for an image of `size` bytes, all of it dirty. `pause_target_ms` is how long clients should be paused at
    /// most, `answer_max_ms` how long a destination may take to answer a flush before it is lost.
    pub fn new(
        size: u64,
        pause_target_ms: u64,
        answer_max_ms: u64,
        limit_bytes_per_s: Option<u64>,
        now_ms: u64,
    ) -> Self {
        let flushes = Flushes::new(answer_max_ms);
        Self {
            size,
            pause_target_ms,
            limit: limit_bytes_per_s.map(|limit| Bucket::new(limit, now_ms)),
            changes: Changes::default(),
            attempt: Attempt::new(Pass::new(size), pause_target_ms, Abilities::default(), flushes, now_ms),
        }
    }

    /// The image is marked as moved before the commit.
    pub fn mark_at_end(&mut self) {
        self.attempt.settling = Some(Settling::default());
    }

    /// Starts an attempt with a destination that holds nothing yet.
    pub fn begin(&mut self, can: Abilities, now_ms: u64) {
        let flushes = self.attempt.flushes.of_next_attempt(can.flush, now_ms);
        let pass = mem::replace(&mut self.attempt.pass, Pass::new(0)).again();
        let settling = self.attempt.settling.take();
        self.attempt = Attempt::new(pass, self.pause_target_ms, can, flushes, now_ms);
        self.attempt.settling = settling.map(|_| Settling::default());
    }

    /// The destination is gone, and what it has is worth nothing any more. Clients go on. Even [`Step::Commit`] may
    /// fail like this, up to the moment in which the destination could have been told. Where the image
    /// [is marked](Plan::is_marked), the mark has to be gone, and durably so, before a client goes on.
    pub fn lost(&mut self, now_ms: u64) {
        self.begin(Abilities::default(), now_ms);
    }

    /// Limits what is sent, in bytes per second, from now on; `None` ends the limit.
    pub fn set_limit(&mut self, limit_bytes_per_s: Option<u64>, now_ms: u64) {
        self.limit = limit_bytes_per_s.map(|limit| Bucket::new(limit, now_ms));
        self.attempt.pace.forget_speed(now_ms);
    }

    /// So many operations of clients that may change the image went to the disk before there was a migration, and are not
    /// done yet.
    pub fn note_earlier_changes(&mut self, count: usize) {
        self.changes.note_unknown(count);
    }

    /// A client's operation that may change the range goes to the disk. The clients' write limit is charged for what it
    /// will cost to send.
    pub fn note_submitted(&mut self, range: &Range<u64>) {
        self.changes.note_submitted(range);
        if let Some(limit) = self.attempt.pace.write_limit() {
            limit.note_submitted(self.attempt.pass.clean_bytes(range));
        }
    }

    /// A client's operation is done and may have changed the range. To be called before the client is told so (invariant 2).
    pub fn note_write(&mut self, range: &Range<u64>) {
        self.changes.note_done(range);
        let dirtied = self.attempt.pass.note_write(range);
        self.attempt.holes.note_write(range);
        if let Some(limit) = self.attempt.pace.write_limit() {
            limit.note_dirtied(dirtied);
        }
    }

    /// What the disk says of the offset asked for with [`Step::Look`]; data, if it cannot say. An answer to an attempt
    /// that was lost must not get here.
    pub fn note_extent(&mut self, extent: Extent) {
        self.attempt.holes.note_extent(extent);
    }

    /// True while no request of a client may pass.
    pub fn pauses_clients(&self) -> bool {
        self.attempt.pause.pauses_clients()
    }

    /// Until when clients' requests that change something are kept, if they are. Ask before each of them: each that
    /// passes may keep the next ([`Plan::note_submitted`]).
    pub fn keeps_changes_until(&mut self, now_ms: u64) -> Option<u64> {
        let limit = self.attempt.pace.write_limit()?;
        Some(limit.open_at(now_ms)).filter(|&at_ms| at_ms > now_ms)
    }

    /// True between [`Step::Quiesce`] and [`Plan::quiesced`].
    pub fn is_quiescing(&self) -> bool {
        matches!(self.attempt.pause.phase(), Phase::Quiescing { .. })
    }

    /// Clients are paused, and none of their operations is in flight.
    pub fn quiesced(&mut self) {
        self.attempt.pause.quiesced();
    }

    /// From [`Step::Mark`] on: the image here may be marked as moved.
    pub fn is_marked(&self) -> bool {
        let phase = self.attempt.pause.phase();
        let is_late = matches!(phase, Phase::Marking { .. } | Phase::Marked { .. } | Phase::Committed { .. });
        self.attempt.settling.is_some() && is_late
    }

    /// The mark is durable.
    pub fn marked(&mut self) {
        self.attempt.pause.marked();
    }

    /// The image here is flushed, or cannot be.
    pub fn settled(&mut self, now_ms: u64) {
        self.attempt.settling.iter_mut().for_each(|settling| settling.answered(now_ms));
    }

    /// When the pause has to end, if there is one that can end without a commit.
    pub fn pause_ends_ms(&self) -> Option<u64> {
        self.attempt.pause.ends_ms()
    }

    /// How long clients have been paused or, once they go on after the commit, how long they were; else 0.
    pub fn paused_ms(&self, now_ms: u64) -> u64 {
        self.attempt.pause.lasted_ms(now_ms)
    }

    /// Lets clients go on after the commit, because the image stays here, too. What they write now is no part of the copy.
    pub fn release_clients(&mut self, now_ms: u64) {
        self.attempt.pause.release(now_ms);
        self.attempt.pace.release_clients();
    }

    /// Lets clients go on, because the end takes too long. They get as much time as they were paused.
    pub fn give_up_pause(&mut self) {
        if self.attempt.pause.give_up() {
            self.attempt.flushes.note_given_up();
            self.attempt.settling.iter_mut().for_each(|settling| *settling = Settling::default());
            // What should have fitted did not, so the way may have become slower.
            self.attempt.pace.meter().halve();
        }
    }

    /// What a [`Step::Data`] asked for is all zero, and goes without its bytes.
    pub fn note_zeroes(&mut self, range: &Range<u64>) {
        if let (true, Some(limit)) = (self.attempt.pass.note_zeroes(range), &mut self.limit) {
            limit.give_back(range.end - range.start);
        }
    }

    /// The destination has done what a [`Step::Data`] or [`Step::Zero`] asked for.
    pub fn acked(&mut self, range: &Range<u64>, now_ms: u64) {
        let Some(sent) = self.attempt.pass.acked(range) else { return };
        if sent.is_data {
            self.attempt.sent_bytes += sent.bytes();
            self.attempt.pace.meter().note(sent.bytes(), now_ms);
        } else {
            self.attempt.zeroed_bytes += sent.bytes();
        }
    }

    /// The destination does not do what a [`Step::Zero`] asked for, although it has offered to: this range and all others
    /// are sent as data.
    pub fn zeroes_refused(&mut self, range: &Range<u64>) {
        self.attempt.can.zero = false;
        self.attempt.pass.refused(range);
    }

    /// The destination has answered a [`Step::Flush`].
    pub fn flushed(&mut self, now_ms: u64) {
        self.attempt.flushes.answered(now_ms);
    }

    /// What to do next; to be asked until it says to wait.
    pub fn next(&mut self, now_ms: u64) -> Step {
        self.attempt.next(self.limit.as_mut(), &self.changes, now_ms)
    }

    /// What the destination of this attempt can do, as far as is known by now.
    pub fn can(&self) -> Abilities {
        self.attempt.can
    }

    /// What was done and what is left.
    pub fn progress(&self) -> Progress {
        let Attempt { pass, pace, .. } = &self.attempt;
        let limit_bytes_per_s = self.limit.as_ref().map(Bucket::per_s);
        Progress {
            pass: pass.number(),
            sent_bytes: self.attempt.sent_bytes,
            zeroed_bytes: self.attempt.zeroed_bytes,
            // What is in flight and dirty again is not twice as much for whoever looks at it.
            left_bytes: pass.left_bytes().min(self.size),
            dirty_bytes: pass.dirty_bytes(),
            bytes_per_s: pace.speed(limit_bytes_per_s).unwrap_or(0),
            limit_bytes_per_s,
            write_limit_bytes_per_s: pace.write_limit_bytes_per_s(),
        }
    }
}

impl Attempt {
    fn new(pass: Pass, pause_target_ms: u64, can: Abilities, flushes: Flushes, now_ms: u64) -> Self {
        Self {
            can,
            pass,
            holes: Holes::default(),
            flushes,
            pause: Pause::new(pause_target_ms, now_ms),
            settling: None,
            pace: Pace::new(now_ms),
            sent_bytes: 0,
            zeroed_bytes: 0,
        }
    }

    fn next(&mut self, limit: Option<&mut Bucket>, changes: &Changes, now_ms: u64) -> Step {
        match self.pause.phase() {
            Phase::Copying => {
                let most_bytes = self.most_in_pause(limit.as_deref());
                if let Some(step) = self.approach_end(most_bytes, changes, now_ms) {
                    return step;
                }
                if self.flushes.need(Why::Copying) == Need::Flush {
                    return self.flush(Why::Copying, now_ms);
                }
            }
            Phase::LastPass { .. } if self.pass.left_bytes() == 0 => return self.finish(now_ms),
            Phase::LastPass { .. } => {}
            Phase::Marked { .. } => return self.commit(),
            Phase::Quiescing { .. } | Phase::Marking { .. } | Phase::Committed { .. } | Phase::Released { .. } => {
                return Step::Wait
            }
        }
        self.send(limit, changes, now_ms)
    }

    /// The end of the copy: flushes of both images while clients still go on, so that those in the pause are short; then
    /// the pause.
    fn approach_end(&mut self, most_bytes: u64, changes: &Changes, now_ms: u64) -> Option<Step> {
        let is_all_there = self.pass.left_bytes() == 0;
        let is_near = is_all_there || self.pass.is_settled();
        if !is_near || !self.fits(most_bytes, changes) {
            return is_all_there.then_some(Step::WaitForClients);
        }
        let target_ms = self.pause.target_ms();
        let settles = self.settling.as_ref().map_or(Need::Nothing, |settling| settling.need(target_ms, now_ms));
        if let (Need::Flush, Some(settling)) = (settles, &mut self.settling) {
            settling.ask(now_ms);
            return Some(Step::Settle);
        }
        match self.flushes.need(Why::Pause { target_ms }) {
            Need::Answer => return None,
            Need::Flush => return Some(self.flush(Why::Pause { target_ms }, now_ms)),
            Need::Nothing if settles == Need::Answer => return None,
            Need::Nothing => {}
        }
        let not_before_ms = self.pause.not_before_ms();
        if now_ms < not_before_ms {
            return is_all_there.then_some(Step::WaitUntil(not_before_ms));
        }
        self.pause.begin(now_ms);
        Some(Step::Quiesce)
    }

    /// Nothing is left: a last flush covers what was sent since the one before, then come the mark and the commit.
    fn finish(&mut self, now_ms: u64) -> Step {
        match self.flushes.need(Why::Commit) {
            Need::Answer => Step::Wait,
            Need::Flush => self.flush(Why::Commit, now_ms),
            Need::Nothing if self.settling.is_some() => {
                self.pause.mark();
                Step::Mark
            }
            Need::Nothing => self.commit(),
        }
    }

    fn commit(&mut self) -> Step {
        debug_assert!(self.pass.left_bytes() == 0, "invariant 4");
        self.pause.commit();
        Step::Commit
    }

    fn flush(&mut self, why: Why, now_ms: u64) -> Step {
        self.flushes.ask(why, self.pass.in_flight(), now_ms);
        Step::Flush
    }

    /// The next piece of the image.
    fn send(&mut self, limit: Option<&mut Bucket>, changes: &Changes, now_ms: u64) -> Step {
        if self.pass.in_flight().len() >= IN_FLIGHT_MAX {
            return Step::Wait;
        }
        if self.flushes.is_full() || !self.take(limit.as_deref(), changes, now_ms) {
            self.pace.meter().note_idle();
            return Step::Wait;
        }
        let Range { start, end } = self.pass.taken();
        let Some(&Extent { range: Range { end: known_end, .. }, is_hole }) = self.holes.at(start) else {
            return if self.holes.ask(start) { Step::Look(start) } else { Step::Wait };
        };
        let mut end = end.min(known_end);
        let is_data = !(is_hole && self.can.zero);
        if is_data {
            end = end.min(start.saturating_add(data_max(limit.as_deref())));
            if let Some(limit) = limit {
                let at_ms = limit.open_at(now_ms);
                if at_ms > now_ms {
                    return Step::WaitUntil(at_ms);
                }
                limit.take(end - start);
            }
            if !self.pass.in_flight().iter().any(|sent| sent.is_data) {
                self.pace.meter().note_idle();
            }
        }
        let sent = self.pass.send(end, is_data);
        self.flushes.note_sent(&sent);
        if is_hole {
            Step::Zero(sent.range)
        } else {
            Step::Data(sent.range)
        }
    }

    /// Takes blocks, unless some are taken. False when there is nothing that could be sent now.
    fn take(&mut self, limit: Option<&Bucket>, changes: &Changes, now_ms: u64) -> bool {
        if !self.pass.taken().is_empty() {
            return true;
        }
        match self.pass.take() {
            Taken::Nothing => return false,
            Taken::More => {}
            Taken::NewPass => {
                // The pass before has gained nothing, and the end is not near: clients dirty blocks too fast.
                if self.pass.is_settled() && !self.fits(self.most_in_pause(limit), changes) {
                    self.pace.slow_clients(self.speed(limit), self.charge_max(), now_ms);
                }
            }
        }
        true
    }

    /// The most bytes that one operation of a client is charged for.
    fn charge_max(&self) -> u64 {
        if self.can.zero {
            CHARGE_MAX
        } else {
            u64::MAX
        }
    }

    /// How much can be sent within half of the pause target, in bytes; the other half is for the flush. Where the write
    /// limit makes clients wait longer than that for each block, the pause may take as long.
    fn most_in_pause(&self, limit: Option<&Bucket>) -> u64 {
        let most_ms = (self.pause.target_ms() / 2).max(self.pace.kept_ms_per_block());
        self.speed(limit).saturating_mul(most_ms) / 1000
    }

    /// True when `most_bytes` is enough for what is left and for what the operations of clients in flight will add to
    /// it.
    fn fits(&self, most_bytes: u64, changes: &Changes) -> bool {
        let Some(room) = most_bytes.checked_sub(self.pass.left_bytes()) else { return false };
        let dirty_bytes = self.pass.dirty_bytes();
        changes.fit(room, |range| {
            // A range longer than all that is dirty has at least the difference clean. Where that is too much already,
            // its blocks need not be counted.
            let least = (range.end - range.start).saturating_sub(dirty_bytes);
            if least > room {
                least
            } else {
                self.pass.clean_bytes(range)
            }
        })
    }

    fn speed(&self, limit: Option<&Bucket>) -> u64 {
        let most = limit.map(Bucket::per_s);
        self.pace.speed(most).unwrap_or(SPEED_UNKNOWN.min(most.unwrap_or(u64::MAX)))
    }
}

/// How much one request may carry: less when the limit is low, so that data leaves evenly.
fn data_max(limit: Option<&Bucket>) -> u64 {
    let most = limit.map_or(DATA_MAX, |limit| limit.per_s() / 20);
    most.clamp(DATA_MIN, DATA_MAX) / DATA_MIN * DATA_MIN
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn begun(size: u64) -> Plan {
        let mut plan = Plan::new(size, 100, 60_000, None, 0);
        plan.begin(Abilities { zero: true, flush: true }, 0);
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
    fn a_long_copy_is_flushed_on_its_way() {
        let mut plan = begun(5 * GIB);
        let mut sent = 0;
        for mib in [64, 192, 448, 960, 1984, 3008, 4032, 5056] {
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
            assert_eq!(sent, mib * MIB);
        }
    }

    #[test]
    fn a_flush_that_is_not_answered_holds_up_the_copy() {
        let mut plan = begun(5 * GIB);
        let sent_until_wait = |plan: &mut Plan| {
            let (mut sent, mut flushes) = (0, 0);
            loop {
                match next(plan, u64::MAX, 0) {
                    Step::Data(range) => {
                        sent += range.end - range.start;
                        plan.acked(&range, 0);
                    }
                    Step::Flush => flushes += 1,
                    step => break assert_eq!(step, Step::Wait),
                }
            }
            assert_eq!(flushes, 1);
            sent / MIB
        };
        assert_eq!(sent_until_wait(&mut plan), 2 * 64);
        // It took far too long, so that there is less from now on.
        plan.flushed(20_000);
        assert_eq!(sent_until_wait(&mut plan), 16);
    }

    #[test]
    fn time_that_went_into_zeroes_is_not_counted_as_slow() {
        let mut plan = begun(1 << 30);
        for now_ms in 0..250 {
            let Step::Data(range) = next(&mut plan, 100 * MIB, now_ms) else { panic!("data first") };
            plan.acked(&range, now_ms);
        }
        let speed = plan.progress().bytes_per_s;
        assert!(speed > 0);
        for now_ms in 250..10_000 {
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
        let mut plan = Plan::new(BLOCK, 100, 60_000, None, 0);
        plan.begin(Abilities::default(), 0);
        let mut limit_ms = 1_000;
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
            limit_ms = (2 * limit_ms).min(10_000);
        }
    }

    #[test]
    fn one_question_at_a_time_and_none_outlives_its_attempt() {
        let mut plan = begun(MIB);
        assert_eq!(plan.next(0), Step::Look(0));
        assert_eq!(plan.next(0), Step::Wait);
        plan.note_write(&(DATA_MAX..MIB));
        plan.note_extent(Extent { range: 0..MIB, is_hole: true });
        assert_eq!(plan.next(0), Step::Zero(0..DATA_MAX));
        assert_eq!(plan.next(0), Step::Look(DATA_MAX));
        plan.lost(0);
        plan.begin(Abilities::default(), 0);
        assert_eq!(plan.next(0), Step::Look(0), "the question of an attempt that was lost is forgotten");
    }

    #[test]
    fn clients_pay_for_what_they_dirty_and_no_more_than_it_costs_to_send() {
        for (zero, kept_ms) in [(true, CHARGE_MAX.div_ceil(1_000)), (false, 10_000)] {
            let mut plan = begun(GIB);
            let Attempt { can, pass, .. } = &mut plan.attempt;
            can.zero = zero;
            while pass.take() == Taken::More {
                let sent = pass.send(pass.taken().end, true);
                pass.acked(&sent.range);
            }
            plan.note_submitted(&(0..MIB));
            plan.note_write(&(0..MIB));
            assert_eq!(plan.keeps_changes_until(1_000), None, "there is no limit");
            let charge_max = plan.attempt.charge_max();
            plan.attempt.pace.slow_clients(2_000_000, charge_max, 1_000);
            plan.note_submitted(&(0..MIB));
            plan.note_write(&(0..MIB));
            assert_eq!(plan.keeps_changes_until(1_000), None, "what is dirty costs nothing");
            plan.note_submitted(&(0..GIB));
            assert_eq!(plan.keeps_changes_until(1_000), Some(1_000 + kept_ms));
        }
    }
}
