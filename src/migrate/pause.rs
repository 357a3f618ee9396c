//! PURE: where the copy stands, and how long clients are paused for its end.

/// The shortest time a pause may take before it is given up, in milliseconds.
const GIVE_UP_MIN_MS: u64 = 1_000;
/// The longest, in milliseconds, unless a longer target was asked for: each pause given up doubles the limit, so that a
/// slow destination is reached too. Guests report errors of a disk that is silent for 30 s.
const GIVE_UP_MAX_MS: u64 = 10_000;

/// Where the copy stands. Clients are paused in every phase but the first and the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Copying,
    /// Operations of clients are still in flight.
    Quiescing {
        since_ms: u64,
    },
    /// Nothing changes any more.
    LastPass {
        since_ms: u64,
    },
    /// The mark that the image has moved is being made durable.
    Marking {
        since_ms: u64,
    },
    /// It is durable.
    Marked {
        since_ms: u64,
    },
    Committed {
        since_ms: u64,
    },
    /// The destination has been told, and the image stays here, too.
    Released {
        paused_ms: u64,
    },
}

/// The pauses of an attempt.
#[derive(Debug)]
pub(super) struct Pause {
    phase: Phase,
    /// How long clients should be paused at most.
    target_ms: u64,
    /// The time before which there is no other pause.
    not_before_ms: u64,
    given_up: u32,
}

impl Pause {
    pub(super) fn new(target_ms: u64, now_ms: u64) -> Self {
        Self { phase: Phase::Copying, target_ms, not_before_ms: now_ms, given_up: 0 }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    pub(super) fn target_ms(&self) -> u64 {
        self.target_ms
    }

    /// The time before which there is no other pause.
    pub(super) fn not_before_ms(&self) -> u64 {
        self.not_before_ms
    }

    /// True while no request of a client may pass.
    pub(super) fn pauses_clients(&self) -> bool {
        self.since_ms().is_some()
    }

    /// How long clients have been paused or, once they go on after the commit, how long they were; else 0.
    pub(super) fn lasted_ms(&self, now_ms: u64) -> u64 {
        match self.phase {
            Phase::Released { paused_ms } => paused_ms,
            _ => self.since_ms().map_or(0, |since_ms| now_ms.saturating_sub(since_ms)),
        }
    }

    /// When clients were paused, if they are.
    fn since_ms(&self) -> Option<u64> {
        match self.phase {
            Phase::Copying | Phase::Released { .. } => None,
            Phase::Quiescing { since_ms }
            | Phase::LastPass { since_ms }
            | Phase::Marking { since_ms }
            | Phase::Marked { since_ms }
            | Phase::Committed { since_ms } => Some(since_ms),
        }
    }

    /// When the pause has to end, if it can end without a commit.
    pub(super) fn ends_ms(&self) -> Option<u64> {
        match self.phase {
            Phase::Copying
            | Phase::Marking { .. }
            | Phase::Marked { .. }
            | Phase::Committed { .. }
            | Phase::Released { .. } => None,
            Phase::Quiescing { since_ms } | Phase::LastPass { since_ms } => {
                let least_ms = self.target_ms.saturating_mul(5).max(GIVE_UP_MIN_MS);
                let limit_ms = least_ms.saturating_mul(1 << self.given_up.min(16));
                Some(since_ms.saturating_add(limit_ms.min(GIVE_UP_MAX_MS.max(self.target_ms))))
            }
        }
    }

    pub(super) fn begin(&mut self, now_ms: u64) {
        self.phase = Phase::Quiescing { since_ms: now_ms };
    }

    pub(super) fn quiesced(&mut self) {
        if let Phase::Quiescing { since_ms } = self.phase {
            self.phase = Phase::LastPass { since_ms };
        }
    }

    pub(super) fn mark(&mut self) {
        if let Phase::LastPass { since_ms } = self.phase {
            self.phase = Phase::Marking { since_ms };
        }
    }

    pub(super) fn marked(&mut self) {
        if let Phase::Marking { since_ms } = self.phase {
            self.phase = Phase::Marked { since_ms };
        }
    }

    pub(super) fn commit(&mut self) {
        if let Phase::LastPass { since_ms } | Phase::Marked { since_ms } = self.phase {
            self.phase = Phase::Committed { since_ms };
        }
    }

    /// Clients go on after the commit.
    pub(super) fn release(&mut self, now_ms: u64) {
        if let Phase::Committed { since_ms } = self.phase {
            self.phase = Phase::Released { paused_ms: now_ms.saturating_sub(since_ms) };
        }
    }

    /// Gives the pause up: clients go on for at least as long as they were paused. False when there is none.
    pub(super) fn give_up(&mut self) -> bool {
        let (Some(since_ms), Some(ends_ms)) = (self.since_ms(), self.ends_ms()) else { return false };
        self.not_before_ms = ends_ms.saturating_add(ends_ms - since_ms);
        self.phase = Phase::Copying;
        self.given_up += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pause_given_up_doubles_the_next_within_bounds() {
        for (target_ms, limits_ms) in [
            (0, [1_000, 2_000, 4_000, 8_000, 10_000, 10_000]),
            (1_000, [5_000, 10_000, 10_000, 10_000, 10_000, 10_000]),
            (60_000, [60_000; 6]),
        ] {
            let mut pause = Pause::new(target_ms, 0);
            let mut now_ms = 7;
            for limit_ms in limits_ms {
                pause.begin(now_ms);
                assert_eq!((pause.since_ms(), pause.ends_ms()), (Some(now_ms), Some(now_ms + limit_ms)));
                assert!(pause.give_up());
                now_ms += 2 * limit_ms;
                assert_eq!((pause.phase(), pause.not_before_ms()), (Phase::Copying, now_ms));
            }
        }
    }

    #[test]
    fn nobody_goes_on_between_the_mark_and_the_commit() {
        let mut pause = Pause::new(100, 0);
        pause.mark();
        assert_eq!(pause.phase(), Phase::Copying);
        pause.begin(5);
        pause.quiesced();
        pause.mark();
        pause.commit();
        assert_eq!((pause.phase(), pause.ends_ms()), (Phase::Marking { since_ms: 5 }, None));
        assert!(!pause.give_up());
        pause.marked();
        assert_eq!((pause.pauses_clients(), pause.ends_ms(), pause.lasted_ms(8)), (true, None, 3));
        pause.commit();
        assert_eq!(pause.phase(), Phase::Committed { since_ms: 5 });
    }

    #[test]
    fn there_is_no_way_back_from_the_commit() {
        let mut pause = Pause::new(100, 0);
        pause.quiesced();
        pause.commit();
        pause.release(3);
        assert_eq!((pause.phase(), pause.since_ms(), pause.ends_ms()), (Phase::Copying, None, None));
        assert!(!pause.give_up());
        pause.begin(5);
        pause.commit();
        assert_eq!(pause.phase(), Phase::Quiescing { since_ms: 5 });
        pause.quiesced();
        assert_eq!((pause.phase(), pause.ends_ms()), (Phase::LastPass { since_ms: 5 }, Some(1_005)));
        pause.commit();
        assert_eq!((pause.phase(), pause.ends_ms()), (Phase::Committed { since_ms: 5 }, None));
        assert!(!pause.give_up());
        assert_eq!((pause.pauses_clients(), pause.lasted_ms(8)), (true, 3));
        pause.release(9);
        assert_eq!((pause.pauses_clients(), pause.lasted_ms(700), pause.ends_ms()), (false, 4, None));
    }
}
