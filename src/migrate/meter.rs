//! PURE: a rate that is measured.

/// The length of a stretch, in milliseconds.
const STRETCH_MS: u64 = 200;

/// Measures how fast answers come, from stretches of time in which there was always something to answer.
#[derive(Debug)]
pub(super) struct Meter {
    since_ms: u64,
    bytes: u64,
    /// Less was in flight in this stretch than could have been, so it shows only a lower bound of the speed.
    is_idle: bool,
    bytes_per_s: Option<u64>,
}

impl Meter {
    pub(super) fn new(now_ms: u64) -> Self {
        Self { since_ms: now_ms, bytes: 0, is_idle: false, bytes_per_s: None }
    }

    /// The speed so far, in bytes per second, once there is one.
    pub(super) fn bytes_per_s(&self) -> Option<u64> {
        self.bytes_per_s
    }

    /// Less is in flight now than could be.
    pub(super) fn note_idle(&mut self) {
        self.is_idle = true;
    }

    /// Takes the speed for half of what was measured.
    pub(super) fn halve(&mut self) {
        self.bytes_per_s = self.bytes_per_s.map(|speed| speed / 2);
    }

    /// Counts bytes that were answered for.
    pub(super) fn note(&mut self, bytes: u64, now_ms: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        let elapsed_ms = now_ms.saturating_sub(self.since_ms);
        if elapsed_ms < STRETCH_MS {
            return;
        }
        let sample = self.bytes.saturating_mul(1000) / elapsed_ms;
        self.bytes_per_s = match self.bytes_per_s {
            None => Some(sample),
            Some(before) if self.is_idle => Some(before.max(sample)),
            Some(before) => Some(before.midpoint(sample)),
        };
        (self.since_ms, self.bytes, self.is_idle) = (now_ms, 0, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;

    /// So many answers of `bytes` each, one every millisecond.
    fn answers(meter: &mut Meter, times_ms: Range<u64>, bytes: u64) {
        times_ms.for_each(|now_ms| meter.note(bytes, now_ms));
    }

    #[test]
    fn a_meter_follows_the_way_and_not_the_pauses() {
        let mut meter = Meter::new(0);
        answers(&mut meter, 1..STRETCH_MS, 1_000);
        assert_eq!(meter.bytes_per_s, None);
        answers(&mut meter, STRETCH_MS..1_001, 1_000);
        assert_eq!(meter.bytes_per_s, Some(1_000_000));

        // Nobody wrote for a while: that says nothing.
        meter.note_idle();
        meter.note(1_000, 9_000);
        assert_eq!(meter.bytes_per_s, Some(1_000_000));
        // Even so, more is more.
        meter.note_idle();
        answers(&mut meter, 9_001..9_201, 3_000);
        assert_eq!(meter.bytes_per_s, Some(3_000_000));

        // The way is slower now, and it takes a few stretches to believe it.
        answers(&mut meter, 9_201..10_201, 1_000);
        let speed = meter.bytes_per_s.unwrap_or(0);
        assert!((1_000_000..1_100_000).contains(&speed), "{speed}");
    }
}
