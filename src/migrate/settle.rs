//! PURE: the flushes of the image here, before clients are paused. The mark that it has moved is made durable while they are,
//! and so is all that they have written until then: that should be little.

use super::flush::Need;

/// The most flushes before a pause; for an image whose flushes stay slow, clients are paused all the same.
const FLUSHES_MAX: u32 = 3;
/// For how long after a flush little has been written since, in milliseconds.
const FRESH_MS: u64 = 1_000;
/// A flush counts for so many times as long as it took: a slow one must not be asked for again before there was a chance of
/// a pause.
const FRESH_TIMES: u64 = 10;

#[derive(Debug, Clone, Copy, Default)]
enum State {
    #[default]
    Due,
    Asked {
        at_ms: u64,
    },
    Answered {
        at_ms: u64,
        took_ms: u64,
    },
}

/// The flushes of the image here before a pause.
#[derive(Debug, Default)]
pub(super) struct Settling {
    state: State,
    flushes: u32,
}

impl Settling {
    /// What has to come before a pause that should be as short as this.
    pub(super) fn need(&self, target_ms: u64, now_ms: u64) -> Need {
        match self.state {
            State::Asked { .. } => Need::Answer,
            State::Answered { at_ms, took_ms }
                if now_ms.saturating_sub(at_ms) <= FRESH_MS.max(took_ms.saturating_mul(FRESH_TIMES))
                    && (took_ms <= target_ms / 2 || self.flushes >= FLUSHES_MAX) =>
            {
                Need::Nothing
            }
            State::Due | State::Answered { .. } => Need::Flush,
        }
    }

    /// One is asked for.
    pub(super) fn ask(&mut self, now_ms: u64) {
        self.state = State::Asked { at_ms: now_ms };
        self.flushes = self.flushes.saturating_add(1);
    }

    /// It is answered.
    pub(super) fn answered(&mut self, now_ms: u64) {
        if let State::Asked { at_ms } = self.state {
            self.state = State::Answered { at_ms: now_ms, took_ms: now_ms.saturating_sub(at_ms) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_flush_is_followed_by_another_and_an_old_one_too() {
        let mut settling = Settling::default();
        let mut now_ms = 0;
        for took_ms in [5_000, 500, 60] {
            assert_eq!(settling.need(100, now_ms), Need::Flush);
            settling.ask(now_ms);
            assert_eq!(settling.need(100, now_ms), Need::Answer);
            now_ms += took_ms;
            settling.answered(now_ms);
        }
        assert_eq!(settling.need(100, now_ms), Need::Nothing, "these are enough");
        assert_eq!(settling.need(100, now_ms + FRESH_MS), Need::Nothing);
        assert_eq!(settling.need(100, now_ms + FRESH_MS + 1), Need::Flush);
        settling.ask(now_ms);
        settling.answered(now_ms + 3_000);
        assert_eq!(settling.need(100, now_ms + 33_000), Need::Nothing, "a slow one counts for longer");
        assert_eq!(settling.need(100, now_ms + 33_001), Need::Flush);
        let mut settling = Settling::default();
        settling.ask(7);
        settling.answered(57);
        assert_eq!((settling.need(100, 60), settling.need(98, 60)), (Need::Nothing, Need::Flush));
    }
}
