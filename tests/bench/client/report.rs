//! What a job did and how long it took.

use std::time::{Duration, Instant};

/// Each power of two of nanoseconds has so many buckets, so that a percentile is right to 1.6 %.
const BUCKETS_BITS: u32 = 6;
const BUCKETS: usize = 1 << BUCKETS_BITS;

/// Counts and times of one job.
pub struct Report {
    begun: Instant,
    /// When the last reply came.
    pub last: Instant,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    /// Requests that neither carry data nor wait for it: trims, zeroes, hints, questions about extents.
    pub commands: u64,
    pub bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Bytes that are not what was written, with `data=check`.
    pub mismatches: u64,
    longest: Duration,
    longest_flush: Duration,
    histogram: Vec<u64>,
}

impl Report {
    pub fn new(begun: Instant) -> Self {
        Self {
            begun,
            last: begun,
            reads: 0,
            writes: 0,
            flushes: 0,
            commands: 0,
            bytes: 0,
            errors: 0,
            mismatches: 0,
            longest: Duration::ZERO,
            longest_flush: Duration::ZERO,
            histogram: vec![0; BUCKETS * (u64::BITS - BUCKETS_BITS + 1) as usize],
        }
    }

    /// Counts the time of any request but a flush.
    pub fn count_transfer(&mut self, took: Duration) {
        self.longest = self.longest.max(took);
        self.histogram[bucket_of(nanoseconds(took))] += 1;
    }

    /// Counts the time of a flush.
    pub fn count_flush(&mut self, took: Duration) {
        self.flushes += 1;
        self.longest_flush = self.longest_flush.max(took);
    }

    /// All requests but flushes.
    fn transfers(&self) -> u64 {
        self.reads + self.writes + self.commands
    }

    /// The time that `share` of them took at most, in microseconds.
    fn percentile_us(&self, share: f64) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
        let within = |count: u64| count as f64 >= share * self.transfers() as f64;
        let mut count = 0;
        for (bucket, &here) in self.histogram.iter().enumerate() {
            count += here;
            if here > 0 && within(count) {
                return microseconds(Duration::from_nanos(end_of(bucket)).min(self.longest));
            }
        }
        0.0
    }

    /// One line.
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
    pub fn json(&self) -> String {
        let seconds = (self.last - self.begun).as_secs_f64();
        let per_s = |count: u64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
        format!(
            "{{\"seconds\": {seconds:.6}, \"ops_per_s\": {:.1}, \"bytes_per_s\": {:.0}, \"p50_us\": {:.1}, \
             \"p99_us\": {:.1}, \"p999_us\": {:.1}, \"longest_us\": {:.1}, \"longest_flush_us\": {:.1}, \"reads\": {}, \
             \"writes\": {}, \"flushes\": {}, \"commands\": {}, \"bytes\": {}, \"errors\": {}, \"mismatches\": {}}}",
            per_s(self.transfers()),
            per_s(self.bytes),
            self.percentile_us(0.5),
            self.percentile_us(0.99),
            self.percentile_us(0.999),
            microseconds(self.longest),
            microseconds(self.longest_flush),
            self.reads,
            self.writes,
            self.flushes,
            self.commands,
            self.bytes,
            self.errors,
            self.mismatches,
        )
    }
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Small times have a bucket each; of greater ones the highest bits count.
#[expect(clippy::cast_possible_truncation, reason = "what is left after the shift is small")]
fn bucket_of(ns: u64) -> usize {
    let shift = (u64::BITS - BUCKETS_BITS - 1).saturating_sub(ns.leading_zeros());
    shift as usize * BUCKETS + (ns >> shift) as usize
}

/// The greatest time in a bucket.
fn end_of(bucket: usize) -> u64 {
    let shift = (bucket / BUCKETS).saturating_sub(1);
    let top = (bucket - shift * BUCKETS) as u64;
    (top << shift) + ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_right_to_one_of_64() {
        let times = (0..64).flat_map(|bit| [0, 1, 3].map(|more| (1 << bit) + (more << bit >> 2))).chain([0, u64::MAX]);
        for ns in times {
            let end = end_of(bucket_of(ns));
            assert!(end >= ns && end - ns <= ns / 64, "{ns} is in a bucket up to {end}");
            assert!(bucket_of(ns) < Report::new(Instant::now()).histogram.len());
        }
        let mut report = Report::new(Instant::now());
        for ms in 1..=1000 {
            report.reads += 1;
            report.count_transfer(Duration::from_millis(ms));
        }
        for (share, ms) in [(0.5, 500.0), (0.99, 990.0), (0.999, 999.0), (1.0, 1000.0)] {
            let found = report.percentile_us(share) / 1000.0;
            assert!(found >= ms && found <= ms * 1.016, "{share}: {found} ms");
        }
    }
}
