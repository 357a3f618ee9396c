//! PURE: when the destination is flushed: on the way, just before clients are paused, and before the commit.

use super::pass::Sent;

/// What the flush of a range without data is taken to cost, in bytes: a page.
const ZERO_COST: u64 = 4 << 10;
/// Data sent since the last flush that is worth another one before clients are paused, in bytes.
const UNFLUSHED_MAX: u64 = 16 << 20;
/// Data sent since the last flush that is worth another one at any time, in bytes. A destination that collects more in
/// its memory might need longer for the flush at the end than an answer may take.
const UNFLUSHED_COPYING_MAX: u64 = 1 << 30;
/// The most flushes just before the pause; a destination whose flushes stay slow is paused for all the same.
const BEFORE_PAUSE_MAX: u32 = 3;

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
    /// What the last one does not cover.
    unflushed_bytes: u64,
    /// How many there were just before a pause.
    before_pause: u32,
}

impl Flushes {
    pub(super) fn new(can_flush: bool) -> Self {
        let state = if can_flush { State::Due } else { State::Unknown };
        Self { state, unflushed_bytes: 0, before_pause: 0 }
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
            (_, Why::Copying) if self.unflushed_bytes < UNFLUSHED_COPYING_MAX => Need::Nothing,
            (State::Answered { .. }, Why::Pause { .. } | Why::Commit) if self.unflushed_bytes == 0 => Need::Nothing,
            (State::Answered { .. }, Why::Pause { .. }) if self.before_pause >= BEFORE_PAUSE_MAX => Need::Nothing,
            (State::Answered { took_ms }, Why::Pause { target_ms })
                if took_ms <= target_ms / 2 && self.unflushed_bytes <= UNFLUSHED_MAX =>
            {
                Need::Nothing
            }
            (State::Due | State::Answered { .. }, _) => Need::Flush,
        }
    }

    /// One is asked for. It covers what was answered before it, not what is in flight beside it.
    pub(super) fn ask(&mut self, why: Why, in_flight: &[Sent], now_ms: u64) {
        let more = match why {
            Why::Copying => UNFLUSHED_COPYING_MAX,
            Why::Pause { .. } | Why::Commit => UNFLUSHED_MAX / 2,
        };
        self.before_pause += u32::from(matches!(why, Why::Pause { .. }));
        self.unflushed_bytes = in_flight.iter().map(cost).sum();
        self.state = State::Asked { at_ms: now_ms, unflushed_max: self.unflushed_bytes.saturating_add(more) };
    }

    /// It is answered.
    pub(super) fn answered(&mut self, now_ms: u64) {
        if let State::Asked { at_ms, .. } = self.state {
            self.state = State::Answered { took_ms: now_ms.saturating_sub(at_ms) };
        }
    }

    /// A pause was given up: the next may be preceded by as many flushes again.
    pub(super) fn note_given_up(&mut self) {
        self.before_pause = 0;
    }
}

/// What a request adds to the work of the next flush, in bytes.
fn cost(sent: &Sent) -> u64 {
    if sent.is_data {
        sent.bytes()
    } else {
        ZERO_COST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const PAUSE: Why = Why::Pause { target_ms: 100 };

    fn sent(bytes: u64) -> Sent {
        Sent { range: 0..bytes, is_data: true }
    }

    fn flush(flushes: &mut Flushes, why: Why, took_ms: u64) {
        assert_eq!(flushes.need(why), Need::Flush);
        flushes.ask(why, &[], 1_000);
        assert_eq!(flushes.need(why), Need::Answer);
        flushes.answered(1_000 + took_ms);
    }

    #[test]
    fn a_destination_without_flush_is_never_asked() {
        let mut flushes = Flushes::new(false);
        flushes.note_sent(&sent(2 * UNFLUSHED_COPYING_MAX));
        assert_eq!([Why::Copying, PAUSE, Why::Commit].map(|why| flushes.need(why)), [Need::Nothing; 3]);
        assert!(!flushes.is_full());
    }

    #[test]
    fn a_commit_wants_everything_flushed() {
        let mut flushes = Flushes::new(true);
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
        let mut flushes = Flushes::new(true);
        flush(&mut flushes, PAUSE, 50);
        flushes.note_sent(&sent(UNFLUSHED_MAX));
        assert_eq!(flushes.need(PAUSE), Need::Nothing);
        flushes.note_sent(&sent(1));
        flush(&mut flushes, PAUSE, 51);
        assert_eq!(flushes.need(PAUSE), Need::Nothing, "nothing was sent since");
        flushes.note_sent(&sent(1));
        flush(&mut flushes, PAUSE, 51);
        flushes.note_sent(&sent(UNFLUSHED_MAX));
        assert_eq!(flushes.need(PAUSE), Need::Nothing, "these were enough");
        flushes.note_given_up();
        assert_eq!(flushes.need(PAUSE), Need::Flush);
    }

    #[test]
    fn what_may_be_sent_beside_a_flush_is_bounded() {
        for (why, more) in [(Why::Copying, UNFLUSHED_COPYING_MAX), (PAUSE, UNFLUSHED_MAX / 2)] {
            let mut flushes = Flushes::new(true);
            flushes.note_sent(&sent(UNFLUSHED_COPYING_MAX));
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
