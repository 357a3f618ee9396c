//! PURE: a rate that is not exceeded.

/// For how long an unused rate is saved up, in milliseconds, so that a late timer costs no speed.
const UNUSED_MAX_MS: u64 = 100;

/// Lets so many bytes per second pass. Whatever is too much passes too, and is paid back by a wait afterwards.
#[derive(Debug)]
pub(super) struct Bucket {
    bytes_per_s: u64,
    /// What may pass at once or, when negative, what has to be paid back. In thousandths of bytes, because a slow rate
    /// earns less than a byte in a millisecond.
    left: i64,
    at_ms: u64,
}

impl Bucket {
    pub(super) fn new(bytes_per_s: u64, now_ms: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), left: 0, at_ms: now_ms }
    }

    pub(super) fn bytes_per_s(&self) -> u64 {
        self.bytes_per_s
    }

    /// When something may pass: now, or later.
    pub(super) fn open_at(&mut self, now_ms: u64) -> u64 {
        let earned = self.worth(now_ms.saturating_sub(self.at_ms));
        self.left = self.left.saturating_add(earned).min(self.worth(UNUSED_MAX_MS));
        self.at_ms = now_ms;
        let debt = self.left.min(0).unsigned_abs();
        now_ms.saturating_add(debt.div_ceil(self.bytes_per_s))
    }

    /// Counts bytes that pass, whether there was room for them or not.
    pub(super) fn take(&mut self, bytes: u64) {
        self.left = self.left.saturating_sub_unsigned(bytes.saturating_mul(1000));
    }

    /// What was counted did not pass.
    pub(super) fn give_back(&mut self, bytes: u64) {
        self.left = self.left.saturating_add_unsigned(bytes.saturating_mul(1000));
    }

    /// Reduces the debt to what this much time pays back.
    pub(super) fn forgive_beyond(&mut self, ms: u64) {
        self.left = self.left.max(-self.worth(ms));
    }

    /// What this much time earns, in thousandths of bytes.
    fn worth(&self, ms: u64) -> i64 {
        i64::try_from(self.bytes_per_s.saturating_mul(ms)).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;

    /// What passes in so many milliseconds, when it is asked every `every_ms` and takes `piece` bytes.
    fn passed(bucket: &mut Bucket, times_ms: Range<u64>, every_ms: u64, piece: u64) -> u64 {
        let mut bytes = 0;
        for now_ms in times_ms.filter(|now_ms| now_ms % every_ms == 0) {
            while bucket.open_at(now_ms) <= now_ms {
                bucket.take(piece);
                bytes += piece;
            }
        }
        bytes
    }

    #[test]
    fn a_bucket_lets_its_rate_pass_however_often_it_is_asked() {
        for rate in [1, 3, 999, 1_999, 65_537, 10_000_000] {
            for every_ms in [1, 7, 90] {
                let seconds = 400_000 / rate.clamp(1_000, 40_000);
                let piece = (rate / 20).max(1);
                let bytes = passed(&mut Bucket::new(rate, 0), 0..seconds * 1_000, every_ms, piece);
                let expected = rate * seconds;
                assert!(
                    bytes.abs_diff(expected) <= expected / 100 + rate / 5 + piece,
                    "{rate}: {bytes} not {expected}"
                );
            }
        }
    }

    #[test]
    fn a_bucket_keeps_a_tenth_of_a_second() {
        let mut bucket = Bucket::new(1_000_000, 0);
        assert_eq!(passed(&mut bucket, 60_000..60_001, 1, 1_000), 101_000);
        bucket.take(5_000_000);
        assert_eq!(bucket.open_at(60_000), 65_001);
        bucket.forgive_beyond(1_000);
        assert_eq!(bucket.open_at(60_000), 61_000);
        assert_eq!((bucket.open_at(60_999), bucket.open_at(61_000)), (61_000, 61_000));
        bucket.take(3_000_000);
        bucket.give_back(2_000_000);
        assert_eq!(bucket.open_at(61_000), 62_000);
    }

    #[test]
    fn a_bucket_bears_any_number() {
        for rate in [0, 1, u64::MAX] {
            let mut bucket = Bucket::new(rate, 0);
            assert_eq!(bucket.open_at(0), 0);
            bucket.take(u64::MAX);
            bucket.take(u64::MAX);
            assert!(bucket.open_at(u64::MAX) >= u64::MAX - 1);
            bucket.forgive_beyond(u64::MAX);
        }
        let mut slow = Bucket::new(1, 0);
        slow.take(1 << 40);
        assert_eq!(slow.open_at(10), 1_000 << 40);
    }
}
