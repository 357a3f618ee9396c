//! How long things take: the requests of all clients, by command, and the turns of the loop. The loop tells the time, a few
//! times a turn, and nobody reads a clock for a request.

use crate::proto::server::Took;
use crate::proto::wire::kind;

/// The commands whose times are counted, by their names.
pub(super) const COMMANDS: [(u16, &str); 7] = [
    (kind::READ, "read"),
    (kind::WRITE, "write"),
    (kind::FLUSH, "flush"),
    (kind::TRIM, "trim"),
    (kind::CACHE, "cache"),
    (kind::WRITE_ZEROES, "write_zeroes"),
    (kind::BLOCK_STATUS, "block_status"),
];
/// The first bucket is of what takes up to 2^4 microseconds: a read from memory.
const FIRST_BITS: usize = 4;
/// As many buckets, each twice as wide as the one before: the last but one ends at 16.8 s, and the last has no end.
pub(super) const BUCKETS: usize = 22;

/// What the requests of one command took.
#[derive(Debug, Default)]
pub(super) struct Times {
    /// How many took as long, up to [`bound_us`].
    pub buckets: [u64; BUCKETS],
    /// All of them together, in microseconds.
    pub all_us: u64,
    /// Of that, in the disk.
    pub disk_us: u64,
}

/// The longest time of a bucket, in microseconds; `None` of the last one.
pub(super) fn bound_us(bucket: usize) -> Option<u64> {
    (bucket + 1 < BUCKETS).then(|| 1 << (FIRST_BITS + bucket))
}

fn bucket_of(us: u64) -> usize {
    // What takes just as long as a bucket's bound is in it.
    let bits = us.saturating_sub(1).checked_ilog2().map_or(0, |bits| bits as usize + 1);
    bits.saturating_sub(FIRST_BITS).min(BUCKETS - 1)
}

/// All times since the start.
#[derive(Debug, Default)]
pub(super) struct Timings {
    now_us: u64,
    /// When the present turn began.
    began_us: Option<u64>,
    longest_turn_us: u64,
    times: Box<[Times; COMMANDS.len()]>,
}

impl Timings {
    /// The time, as far as it was told.
    pub(super) fn now_us(&self) -> u64 {
        self.now_us
    }

    /// Tells the time.
    pub(super) fn note_time(&mut self, now_us: u64) {
        self.now_us = now_us;
    }

    /// A turn begins.
    pub(super) fn begin_turn(&mut self, now_us: u64) {
        self.now_us = now_us;
        self.began_us = Some(now_us);
    }

    /// The turn is over, and the loop waits.
    pub(super) fn end_turn(&mut self, now_us: u64) {
        let took_us = self.began_us.take().map_or(0, |began_us| now_us.saturating_sub(began_us));
        self.longest_turn_us = self.longest_turn_us.max(took_us);
    }

    /// How long the longest turn of all took, in microseconds.
    pub(super) fn longest_turn_us(&self) -> u64 {
        self.longest_turn_us
    }

    /// A request was carried out and is answered.
    pub(super) fn note(&mut self, kind: u16, took: Took) {
        let place = COMMANDS.iter().position(|(command, _)| *command == kind);
        let Some(times) = place.and_then(|place| self.times.get_mut(place)) else { return };
        if let Some(count) = times.buckets.get_mut(bucket_of(took.all_us)) {
            *count += 1;
        }
        times.all_us = times.all_us.saturating_add(took.all_us);
        times.disk_us = times.disk_us.saturating_add(took.disk_us);
    }

    /// The commands, with what their requests took.
    pub(super) fn by_command(&self) -> impl Iterator<Item = (&'static str, &Times)> {
        COMMANDS.iter().map(|(_, name)| *name).zip(self.times.iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_has_the_bucket_whose_bound_it_does_not_exceed() {
        assert_eq!((bound_us(0), bound_us(1), bound_us(BUCKETS - 2)), (Some(16), Some(32), Some(1 << 24)));
        assert_eq!(bound_us(BUCKETS - 1), None);
        for us in (0..5_000).chain([1 << 20, (1 << 20) + 1, 1 << 24, (1 << 24) + 1, u64::MAX]) {
            let bucket = bucket_of(us);
            assert!(bound_us(bucket).is_none_or(|bound| us <= bound), "{us}");
            assert!(bucket == 0 || bound_us(bucket - 1).is_some_and(|bound| us > bound), "{us}");
        }
    }

    #[test]
    fn times_are_counted_by_command_and_turns_by_the_longest() {
        let mut timings = Timings::default();
        timings.end_turn(7_000_000);
        assert_eq!(timings.longest_turn_us(), 0, "there was none yet");
        for (began_us, ended_us) in [(100, 150), (200, 1_200), (1_300, 1_301)] {
            timings.begin_turn(began_us);
            timings.end_turn(ended_us);
        }
        assert_eq!(timings.longest_turn_us(), 1_000);
        timings.note(kind::FLUSH, Took { all_us: 17, disk_us: 9 });
        timings.note(kind::FLUSH, Took { all_us: 3, disk_us: 1 });
        timings.note(99, Took { all_us: 3, disk_us: 1 });
        for (name, times) in timings.by_command() {
            let expected = if name == "flush" { (2, 20, 10) } else { (0, 0, 0) };
            assert_eq!((times.buckets.iter().sum::<u64>(), times.all_us, times.disk_us), expected, "{name}");
        }
    }
}
