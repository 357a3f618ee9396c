//! How long a kick may take, and how much of a long operation goes into one step.

use crate::work::BLOCK;
use std::time::{Duration, Instant};

/// How long a kick spends on dear steps, of all owners together. Replies, signals and commands wait as long.
const KICK: Duration = Duration::from_millis(1);

/// How long a step shall take: so that several owners have their turn in one kick.
const STEP: Duration = Duration::from_micros(250);

/// The shortest step of a long operation, in bytes. Below it the call itself costs more than its work.
pub(super) const STEP_MIN: u64 = 64 << 10;

/// The time that a kick has for dear steps: those that may take long.
#[derive(Debug)]
pub(super) struct Budget {
    began: Instant,
}

impl Budget {
    pub(super) fn begin() -> Self {
        Self { began: Instant::now() }
    }

    pub(super) fn is_spent(&self) -> bool {
        self.began.elapsed() >= KICK
    }
}

/// How long the next step of one kind is, in bytes: it follows what the last one took.
#[derive(Debug)]
pub(super) struct Stride {
    bytes: u64,
    max: u64,
}

impl Stride {
    pub(super) const fn new(max: u64) -> Self {
        Self { bytes: if max < 1 << 20 { max } else { 1 << 20 }, max }
    }

    /// How much of so many bytes goes into one step.
    pub(super) fn of(&self, bytes: u64) -> u64 {
        bytes.min(self.bytes)
    }

    /// A step of so many bytes took so long.
    pub(super) fn note(&mut self, bytes: u64, took: Duration) {
        if took > STEP {
            let fits = u128::from(bytes) * STEP.as_nanos() / took.as_nanos();
            let fits = u64::try_from(fits).unwrap_or(u64::MAX) / BLOCK * BLOCK;
            self.bytes = fits.clamp(STEP_MIN, self.bytes.max(STEP_MIN));
        } else if took < STEP / 2 && bytes >= self.bytes {
            self.bytes = self.bytes.saturating_mul(2).min(self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_as_long_as_its_time_allows() {
        let max = 16 << 20;
        let mut stride = Stride::new(max);
        assert_eq!((stride.of(u64::MAX), stride.of(512)), (1 << 20, 512));
        for _ in 0..8 {
            stride.note(stride.of(u64::MAX), Duration::from_micros(3));
        }
        assert_eq!(stride.of(u64::MAX), max);
        stride.note(512, Duration::from_micros(3));
        assert_eq!(stride.of(u64::MAX), max, "a short one says nothing");
        stride.note(max, Duration::from_millis(5));
        let shorter = stride.of(u64::MAX);
        assert_eq!((shorter, shorter % BLOCK), (max / 20 / BLOCK * BLOCK, 0));
        stride.note(shorter, STEP);
        assert_eq!(stride.of(u64::MAX), shorter, "that was right");
        stride.note(shorter, Duration::from_secs(2));
        assert_eq!(stride.of(u64::MAX), STEP_MIN);
        stride.note(STEP_MIN, Duration::from_secs(2));
        assert_eq!(stride.of(u64::MAX), STEP_MIN);
        stride.note(STEP_MIN, Duration::ZERO);
        assert_eq!(stride.of(u64::MAX), 2 * STEP_MIN);
    }

    #[test]
    fn a_budget_is_spent_when_its_time_is_over() {
        let budget = Budget::begin();
        std::thread::sleep(KICK);
        assert!(budget.is_spent());
    }
}
