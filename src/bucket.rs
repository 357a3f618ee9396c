//! PURE: a rate that is not exceeded.

/// For how long an unused rate is saved up where nobody says otherwise, in milliseconds: a late timer costs no speed.
const UNUSED_MAX_MS: u64 = 100;

/// Lets so much of something pass per second: bytes, or requests. Whatever is too much passes too, and is paid back by a wait
/// afterwards.
#[derive(Debug)]
pub struct Bucket {
    per_s: u64,
    /// For how long an unused rate is saved up.
    unused_max_ms: u64,
    /// What may pass at once or, when negative, what has to be paid back. In thousandths, because a slow rate earns less
    /// than one in a millisecond.
    left: i64,
    at_ms: u64,
}

impl Bucket {
    /// An empty one. A rate of 0 counts as 1 per second.
    pub fn new(per_s: u64, now_ms: u64) -> Self {
        Self { per_s: per_s.max(1), unused_max_ms: UNUSED_MAX_MS, left: 0, at_ms: now_ms }
    }

    /// A full one, which saves an unused rate up for so many milliseconds.
    pub fn full(per_s: u64, unused_max_ms: u64, now_ms: u64) -> Self {
        let mut bucket = Self { unused_max_ms, ..Self::new(per_s, now_ms) };
        bucket.left = bucket.worth(unused_max_ms);
        bucket
    }

    /// The rate.
    pub fn per_s(&self) -> u64 {
        self.per_s
    }

    /// When something may pass: now, or later.
    pub fn open_at(&mut self, now_ms: u64) -> u64 {
        self.open_for(0, now_ms)
    }

    /// When there is room for so much, or when the bucket is full and there will never be more: now, or later.
    pub fn open_for(&mut self, amount: u64, now_ms: u64) -> u64 {
        let most = self.worth(self.unused_max_ms);
        let earned = self.worth(now_ms.saturating_sub(self.at_ms));
        self.left = self.left.saturating_add(earned).min(most);
        self.at_ms = now_ms;
        let needed = i64::try_from(amount.saturating_mul(1000)).unwrap_or(i64::MAX).min(most);
        let missing = needed.saturating_sub(self.left).max(0).unsigned_abs();
        now_ms.saturating_add(missing.div_ceil(self.per_s))
    }

    /// Whether there is room for so much, as of the last time that was asked.
    pub fn holds(&self, amount: u64) -> bool {
        i64::try_from(amount.saturating_mul(1000)).is_ok_and(|amount| amount <= self.left)
    }

    /// Counts what passes, whether there was room for it or not.
    pub fn take(&mut self, amount: u64) {
        self.left = self.left.saturating_sub_unsigned(amount.saturating_mul(1000));
    }

    /// What was counted did not pass.
    pub fn give_back(&mut self, amount: u64) {
        self.left = self.left.saturating_add_unsigned(amount.saturating_mul(1000));
    }

    /// Reduces the debt to what this much time pays back.
    pub fn forgive_beyond(&mut self, ms: u64) {
        self.left = self.left.max(-self.worth(ms));
    }

    /// What this much time earns, in thousandths.
    fn worth(&self, ms: u64) -> i64 {
        i64::try_from(self.per_s.saturating_mul(ms)).unwrap_or(i64::MAX)
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
    fn what_is_larger_than_a_bucket_passes_when_it_is_full_and_leaves_a_debt() {
        let mut bucket = Bucket::full(1_000, 1_000, 0);
        assert_eq!((bucket.open_for(1_000, 0), bucket.open_for(5_000, 0)), (0, 0));
        bucket.take(400);
        assert_eq!((bucket.open_for(600, 0), bucket.open_for(601, 0), bucket.open_for(5_000, 0)), (0, 1, 400));
        assert_eq!(bucket.open_for(5_000, 400), 400);
        bucket.take(5_000);
        assert_eq!((bucket.open_at(400), bucket.open_for(10, 400)), (4_400, 4_410));
        assert_eq!(bucket.open_for(1_000, 1_000_000), 1_000_000);
        bucket.take(1_000);
        assert_eq!(bucket.open_for(1, 1_000_000), 1_000_001, "no more is saved up than a second's worth");
        let mut slow = Bucket::full(1, 1_000, 0);
        slow.take(1);
        assert_eq!((slow.open_for(1, 0), slow.open_for(1, 999), slow.open_for(1, 1_000)), (1_000, 1_000, 1_000));
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
            assert!(Bucket::full(rate, u64::MAX, 0).open_for(u64::MAX, u64::MAX) >= u64::MAX - 1);
        }
        let mut slow = Bucket::new(1, 0);
        slow.take(1 << 40);
        assert_eq!(slow.open_at(10), 1_000 << 40);
    }
}
