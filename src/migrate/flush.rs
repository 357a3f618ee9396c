//! PURE: when the destination is flushed: on the way, just before clients are paused, and before the commit.
//!
//! A destination may take at once what its disk needs minutes for, and has to be done with all of that before it can
//! answer a flush. So how much is sent before the next flush follows from how long the last one took.

use super::pass::Sent;

/// A range without data adds to the work of a flush its length divided by this. Most destinations only note that there
/// is a hole; one that writes the zeroes still answers the first flush after many of them in time.
const ZERO_PART: u64 = 8;
/// While data is copied, a flush should take as long as an answer may take at most, divided by this. A destination that
/// has to write the zeroes takes up to `ZERO_PART` times as long, and still answers in time.
const AIM_PART: u64 = 12;
/// When a flush takes longer than an answer may take at most, divided by this, less is sent before the next one. That is
/// no help where even a flush of little takes long, so this limit is far above the aim.
const LATE_PART: u64 = 4;
/// How much is sent before the first flush, in bytes, while nothing has shown how long a flush takes. It is more than
/// may be in flight, so that even over a long link the first flush holds nothing up.
const AMOUNT_FIRST: u64 = 64 << 20;
/// The least, in bytes. A flush takes some time even when there is little to do.
const AMOUNT_MIN: u64 = 1 << 20;
/// The most, in bytes: even a fast destination should not collect more.
const AMOUNT_MAX: u64 = 1 << 30;
/// Data sent since the last flush that is worth another one before clients are paused, in bytes.
const BEFORE_PAUSE_AMOUNT: u64 = 16 << 20;
/// The most flushes just before the pause; a destination whose flushes stay slow is paused for all the same.
const BEFORE_PAUSE_MAX: u32 = 3;

const _: () = assert!(ZERO_PART < AIM_PART, "the flush of zeroes that have to be written is answered in time");

/// What a flush is for. This decides when it is worth one, and how much may be sent before it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    Copying,
    /// So that the flush in the pause is short.
    Pause {
        target_ms: u64,
    },
    Commit,
}

/// What has to come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    Nothing,
    /// One is to be asked for.
    Flush,
    /// One was asked for.
    Answer,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// The destination knows no FLUSH.
    Unknown,
    /// None was asked for yet.
    Due,
    /// Until it is answered, no more than `unflushed_max` may pile up for the next one.
    Asked {
        at_ms: u64,
        /// What the destination may have to do for it.
        bytes: u64,
        unflushed_max: u64,
    },
    Answered {
        took_ms: u64,
    },
}

/// The flushes of an attempt.
#[derive(Debug)]
pub(super) struct Flushes {
    state: State,
    /// How long an answer may take.
    answer_max_ms: u64,
    /// How much is sent before a flush while data is copied, in bytes: what takes as long to flush as it should.
    amount: u64,
    /// What the last one does not cover.
    unflushed_bytes: u64,
    /// How many there were just before a pause.
    before_pause: u32,
}

impl Flushes {
    /// Before the first attempt. A destination has to answer within `answer_max_ms`.
    pub(super) fn new(answer_max_ms: u64) -> Self {
        Self { state: State::Unknown, answer_max_ms, amount: AMOUNT_FIRST, unflushed_bytes: 0, before_pause: 0 }
    }

    /// The flushes of the next attempt. Before its first one, no more is sent than this attempt has shown to be flushed
    /// in time.
    pub(super) fn of_next_attempt(&self, can_flush: bool, now_ms: u64) -> Self {
        let amount = match self.state {
            State::Asked { at_ms, bytes, .. } => self.next_amount(bytes, now_ms.saturating_sub(at_ms)),
            State::Unknown | State::Due | State::Answered { .. } => self.amount,
        };
        let state = if can_flush { State::Due } else { State::Unknown };
        let amount = amount.min(AMOUNT_FIRST);
        Self { state, answer_max_ms: self.answer_max_ms, amount, unflushed_bytes: 0, before_pause: 0 }
    }

    /// Something is sent, and the last flush does not cover it.
    pub(super) fn note_sent(&mut self, sent: &Sent) {
        self.unflushed_bytes = self.unflushed_bytes.saturating_add(cost(sent));
    }

    /// True when nothing more may be sent before the flush is answered: the next one would take even longer.
    pub(super) fn is_full(&self) -> bool {
        matches!(self.state, State::Asked { unflushed_max, .. } if self.unflushed_bytes >= unflushed_max)
    }

    /// What has to come first.
    pub(super) fn need(&self, why: Why) -> Need {
        match (self.state, why) {
            (State::Unknown, _) => Need::Nothing,
            (State::Asked { .. }, _) => Need::Answer,
            (_, Why::Copying) if self.unflushed_bytes < self.amount => Need::Nothing,
            (State::Answered { .. }, Why::Pause { .. } | Why::Commit) if self.unflushed_bytes == 0 => Need::Nothing,
            (State::Answered { .. }, Why::Pause { .. }) if self.before_pause >= BEFORE_PAUSE_MAX => Need::Nothing,
            (State::Answered { took_ms }, Why::Pause { target_ms })
                if took_ms <= target_ms / 2 && self.unflushed_bytes <= self.before_pause_amount() =>
            {
                Need::Nothing
            }
            (State::Due | State::Answered { .. }, _) => Need::Flush,
        }
    }

    /// One is asked for. It covers what was answered before it, not what is in flight beside it.
    pub(super) fn ask(&mut self, why: Why, in_flight: &[Sent], now_ms: u64) {
        let more = match why {
            Why::Copying => self.amount,
            Why::Pause { .. } | Why::Commit => self.before_pause_amount() / 2,
        };
        self.before_pause += u32::from(matches!(why, Why::Pause { .. }));
        let bytes = self.unflushed_bytes;
        self.unflushed_bytes = in_flight.iter().map(cost).sum();
        self.state = State::Asked { at_ms: now_ms, bytes, unflushed_max: self.unflushed_bytes.saturating_add(more) };
    }

    /// It is answered.
    pub(super) fn answered(&mut self, now_ms: u64) {
        if let State::Asked { at_ms, bytes, .. } = self.state {
            let took_ms = now_ms.saturating_sub(at_ms);
            self.amount = self.next_amount(bytes, took_ms);
            self.state = State::Answered { took_ms };
        }
    }

    /// A pause was given up: the next may be preceded by as many flushes again.
    pub(super) fn note_given_up(&mut self) {
        self.before_pause = 0;
    }

    /// How much to send before the next flush, when that of so many bytes took so long.
    fn next_amount(&self, bytes: u64, took_ms: u64) -> u64 {
        let aim_ms = self.answer_max_ms / AIM_PART;
        let in_aim = bytes.saturating_mul(aim_ms) / took_ms.max(1);
        if took_ms > self.answer_max_ms / LATE_PART {
            in_aim.min(self.amount).max(AMOUNT_MIN)
        } else if bytes >= self.amount / 2 {
            in_aim.clamp(self.amount, self.amount * 2).min(AMOUNT_MAX)
        } else {
            // A short flush of little says little.
            self.amount
        }
    }

    fn before_pause_amount(&self) -> u64 {
        BEFORE_PAUSE_AMOUNT.min(self.amount)
    }
}

/// What a request adds to the work of the next flush, in bytes.
fn cost(sent: &Sent) -> u64 {
    if sent.is_data {
        sent.bytes()
    } else {
        sent.bytes().div_ceil(ZERO_PART)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const PAUSE: Why = Why::Pause { target_ms: 100 };
    /// The longest that an answer may take here, and a flush should.
    const ANSWER_MAX_MS: u64 = 60_000;
    const AIM_MS: u64 = 5_000;

    fn flushes() -> Flushes {
        Flushes::new(ANSWER_MAX_MS).of_next_attempt(true, 0)
    }

    fn sent(bytes: u64) -> Sent {
        Sent { range: 0..bytes, is_data: true }
    }

    fn flush(flushes: &mut Flushes, why: Why, took_ms: u64) {
        assert_eq!(flushes.need(why), Need::Flush);
        flushes.ask(why, &[], 1_000);
        assert_eq!(flushes.need(why), Need::Answer);
        flushes.answered(1_000 + took_ms);
    }

    /// Copies as much as is worth a flush, which takes a while for each MiB; says how much that was, in MiB.
    fn copy(flushes: &mut Flushes, ms_per_mib: u64) -> u64 {
        let mut mib = 0;
        while flushes.need(Why::Copying) == Need::Nothing {
            flushes.note_sent(&sent(MIB));
            mib += 1;
        }
        flush(flushes, Why::Copying, mib * ms_per_mib);
        mib
    }

    #[test]
    fn a_destination_without_flush_is_never_asked() {
        let mut flushes = Flushes::new(ANSWER_MAX_MS).of_next_attempt(false, 0);
        flushes.note_sent(&sent(2 * AMOUNT_MAX));
        assert_eq!([Why::Copying, PAUSE, Why::Commit].map(|why| flushes.need(why)), [Need::Nothing; 3]);
        assert!(!flushes.is_full());
    }

    #[test]
    fn what_the_last_flush_took_sets_how_much_comes_before_the_next() {
        let mut quick = flushes();
        assert_eq!([(); 6].map(|()| copy(&mut quick, 1)), [64, 128, 256, 512, 1024, 1024]);
        // A disk of 20 MB/s becomes slower, and quick again.
        let mut slow = flushes();
        assert_eq!([(); 3].map(|()| copy(&mut slow, 50)), [64, 100, 100]);
        assert_eq!([(); 3].map(|()| copy(&mut slow, 150)), [100, 100, 100], "this is still in time");
        assert_eq!([(); 3].map(|()| copy(&mut slow, 1_000)), [100, 5, 5]);
        assert_eq!([(); 3].map(|()| copy(&mut slow, 100_000)), [5, 1, 1], "there is a least amount");
        assert_eq!([(); 5].map(|()| copy(&mut slow, 150)), [1, 2, 4, 8, 16]);
    }

    #[test]
    fn a_flush_of_little_says_little() {
        let mut flushes = flushes();
        flushes.note_sent(&sent(MIB));
        flush(&mut flushes, PAUSE, 1);
        assert_eq!(copy(&mut flushes, 1), 64);
        flushes.note_sent(&sent(MIB));
        flush(&mut flushes, PAUSE, AIM_MS);
        assert_eq!(copy(&mut flushes, 1), 128);
    }

    #[test]
    fn an_answer_that_never_came_counts_for_the_next_attempt() {
        let mut flushes = flushes();
        assert_eq!([(); 2].map(|()| copy(&mut flushes, 1)), [64, 128]);
        assert_eq!(copy(&mut flushes.of_next_attempt(true, 0), 1), 64, "it is another destination, perhaps");
        flushes.note_sent(&sent(256 * MIB));
        flushes.ask(Why::Copying, &[], 1_000);
        assert_eq!(copy(&mut flushes.of_next_attempt(true, 1_000 + ANSWER_MAX_MS / LATE_PART), 1), 64);
        let mut next = flushes.of_next_attempt(true, 1_000 + ANSWER_MAX_MS);
        assert_eq!([(); 2].map(|()| copy(&mut next, 1)), [22, 43], "a twelfth of 256, rounded up");
        assert_eq!(flushes.of_next_attempt(false, 0).need(Why::Commit), Need::Nothing);
    }

    #[test]
    fn zeroes_that_have_to_be_written_are_flushed_in_time() {
        // With 1 GiB worth a flush, which a disk of 205 MB/s needs five seconds for.
        let mut flushes = flushes();
        while flushes.amount < AMOUNT_MAX {
            copy(&mut flushes, 1);
        }
        let mut mib = 0;
        while flushes.need(Why::Copying) == Need::Nothing {
            flushes.note_sent(&Sent { range: 0..128 * MIB, is_data: false });
            mib += 128;
        }
        assert_eq!(mib, 8 << 10);
        assert!(mib * AIM_MS / 1024 < ANSWER_MAX_MS);
    }

    #[test]
    fn a_commit_wants_everything_flushed() {
        let mut flushes = flushes();
        flush(&mut flushes, Why::Commit, 0);
        assert_eq!(flushes.need(Why::Commit), Need::Nothing);
        flushes.note_sent(&Sent { range: 0..MIB, is_data: false });
        flush(&mut flushes, Why::Commit, 0);
        flushes.note_sent(&sent(1));
        flushes.ask(Why::Commit, &[sent(1)], 0);
        flushes.answered(0);
        assert_eq!(flushes.need(Why::Commit), Need::Flush, "what was in flight is not covered");
    }

    #[test]
    fn a_pause_wants_flushes_that_are_short_but_not_for_ever() {
        let mut flushes = flushes();
        flush(&mut flushes, PAUSE, 50);
        flushes.note_sent(&sent(BEFORE_PAUSE_AMOUNT));
        assert_eq!(flushes.need(PAUSE), Need::Nothing);
        flushes.note_sent(&sent(1));
        flush(&mut flushes, PAUSE, 51);
        assert_eq!(flushes.need(PAUSE), Need::Nothing, "nothing was sent since");
        flushes.note_sent(&sent(1));
        flush(&mut flushes, PAUSE, 51);
        flushes.note_sent(&sent(BEFORE_PAUSE_AMOUNT));
        assert_eq!(flushes.need(PAUSE), Need::Nothing, "these were enough");
        flushes.note_given_up();
        assert_eq!(flushes.need(PAUSE), Need::Flush);
    }

    #[test]
    fn what_may_be_sent_beside_a_flush_is_bounded() {
        for (why, more) in [(Why::Copying, AMOUNT_FIRST), (PAUSE, BEFORE_PAUSE_AMOUNT / 2)] {
            let mut flushes = flushes();
            flushes.note_sent(&sent(AMOUNT_FIRST));
            assert_eq!((flushes.need(why), flushes.is_full()), (Need::Flush, false));
            flushes.ask(why, &[sent(MIB)], 0);
            flushes.note_sent(&sent(more - 1));
            assert!(!flushes.is_full());
            flushes.note_sent(&sent(1));
            assert!(flushes.is_full());
            flushes.answered(0);
            assert!(!flushes.is_full());
        }
    }
}
