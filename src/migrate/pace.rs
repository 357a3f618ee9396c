//! PURE: how fast data goes, and how fast clients may dirty blocks for that.

use super::meter::Meter;
use super::pass::BLOCK;
use crate::bucket::Bucket;

/// The least that clients may dirty per second, in bytes, however slow the way is: a block every two seconds.
const LIMIT_MIN_BYTES_PER_S: u64 = BLOCK / 2;
/// Minimum time between two cuts of the clients' write limit, in milliseconds.
const SLOWER_EVERY_MS: u64 = 500;
/// The longest that changes are kept waiting in one go, in milliseconds: they are slowed, not stopped. The disk drivers
/// of guests give up after 30 s.
const KEPT_MAX_MS: u64 = 10_000;

/// The speed of an attempt, and the limit it sets to clients.
#[derive(Debug)]
pub(super) struct Pace {
    meter: Meter,
    write_limit: Option<WriteLimit>,
    /// When the limit was cut last or, before that, when the attempt began.
    cut_ms: u64,
}

impl Pace {
    pub(super) fn new(now_ms: u64) -> Self {
        Self { meter: Meter::new(now_ms), write_limit: None, cut_ms: now_ms }
    }

    pub(super) fn meter(&mut self) -> &mut Meter {
        &mut self.meter
    }

    /// Forgets what was measured, because it says nothing about what comes.
    pub(super) fn forget_speed(&mut self, now_ms: u64) {
        self.meter = Meter::new(now_ms);
    }

    /// How fast data goes within a limit, in bytes per second, once there is a measure.
    pub(super) fn speed(&self, limit_bytes_per_s: Option<u64>) -> Option<u64> {
        let most = limit_bytes_per_s.unwrap_or(u64::MAX);
        self.meter.bytes_per_s().map(|speed| speed.min(most))
    }

    pub(super) fn write_limit(&mut self) -> Option<&mut WriteLimit> {
        self.write_limit.as_mut()
    }

    pub(super) fn write_limit_bytes_per_s(&self) -> Option<u64> {
        self.write_limit.as_ref().map(|limit| limit.bucket.per_s())
    }

    /// Ends the limit.
    pub(super) fn release_clients(&mut self) {
        self.write_limit = None;
    }

    /// How long the limit makes clients wait for each block they dirty, in milliseconds.
    pub(super) fn kept_ms_per_block(&self) -> u64 {
        self.write_limit_bytes_per_s().map_or(0, |limit| BLOCK * 1000 / limit)
    }

    /// Allows clients half of what they may dirty now, or half of the speed when they have no limit yet. None of their
    /// operations is charged for more than `charge_max` bytes.
    pub(super) fn slow_clients(&mut self, speed: u64, charge_max: u64, now_ms: u64) {
        if now_ms < self.cut_ms.saturating_add(SLOWER_EVERY_MS) {
            return;
        }
        let before = self.write_limit_bytes_per_s().map_or(speed, |limit| limit.min(speed));
        let bucket = Bucket::new((before / 2).max(LIMIT_MIN_BYTES_PER_S), now_ms);
        self.write_limit = Some(WriteLimit { bucket, charge_max, paid_bytes: 0 });
        self.cut_ms = now_ms;
    }
}

/// What clients pay with for the blocks they dirty.
#[derive(Debug)]
pub(super) struct WriteLimit {
    bucket: Bucket,
    charge_max: u64,
    /// Bytes that were charged for and are not dirty yet.
    paid_bytes: u64,
}

impl WriteLimit {
    /// The time from which on a change may pass: now, or later.
    pub(super) fn open_at(&mut self, now_ms: u64) -> u64 {
        self.bucket.open_at(now_ms)
    }

    /// Charges an operation that goes to the disk for the clean blocks it touches.
    pub(super) fn note_submitted(&mut self, clean_bytes: u64) {
        self.charge(clean_bytes);
        self.paid_bytes = self.paid_bytes.saturating_add(clean_bytes);
    }

    /// Charges an operation that is done for the blocks it has dirtied without having paid: those that were dirty when
    /// it was submitted, and were sent before it was done.
    pub(super) fn note_dirtied(&mut self, dirtied_bytes: u64) {
        self.charge(dirtied_bytes.saturating_sub(self.paid_bytes));
        self.paid_bytes = self.paid_bytes.saturating_sub(dirtied_bytes);
    }

    fn charge(&mut self, bytes: u64) {
        self.bucket.take(bytes.min(self.charge_max));
        self.bucket.forgive_beyond(KEPT_MAX_MS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limit(bytes_per_s: u64, charge_max: u64) -> WriteLimit {
        WriteLimit { bucket: Bucket::new(bytes_per_s, 0), charge_max, paid_bytes: 0 }
    }

    #[test]
    fn clients_are_kept_waiting_for_a_bounded_time() {
        let mut charged_little = limit(MIB, 2 * MIB);
        charged_little.note_submitted(1 << 39);
        assert_eq!(charged_little.open_at(0), 2_000);
        let mut charged_all = limit(MIB, u64::MAX);
        charged_all.note_submitted(1 << 39);
        assert_eq!(charged_all.open_at(0), KEPT_MAX_MS);
        charged_all.note_dirtied(1 << 40);
        assert_eq!((charged_all.open_at(0), charged_all.open_at(KEPT_MAX_MS)), (KEPT_MAX_MS, KEPT_MAX_MS));
    }

    #[test]
    fn each_byte_that_becomes_dirty_is_charged_once() {
        let mut limit = limit(1_000, u64::MAX);
        limit.note_submitted(3);
        limit.note_submitted(2);
        assert_eq!(limit.open_at(0), 5);
        limit.note_dirtied(4);
        assert_eq!(limit.open_at(0), 5, "paid for when it was submitted");
        limit.note_dirtied(4);
        assert_eq!(limit.open_at(0), 8, "one byte was paid for, three were dirty when it was submitted");
    }

    #[test]
    fn the_limit_is_halved_again_and_again_but_not_at_once() {
        let mut pace = Pace::new(0);
        pace.slow_clients(MIB, 0, SLOWER_EVERY_MS - 1);
        assert_eq!((pace.write_limit_bytes_per_s(), pace.kept_ms_per_block()), (None, 0));
        pace.slow_clients(MIB, 0, SLOWER_EVERY_MS);
        assert_eq!((pace.write_limit_bytes_per_s(), pace.kept_ms_per_block()), (Some(MIB / 2), 125));
        pace.slow_clients(MIB, 0, 2 * SLOWER_EVERY_MS - 1);
        assert_eq!(pace.write_limit_bytes_per_s(), Some(MIB / 2));
        pace.slow_clients(MIB, 0, 2 * SLOWER_EVERY_MS);
        assert_eq!(pace.write_limit_bytes_per_s(), Some(MIB / 4));
        pace.slow_clients(100_000, 0, 3 * SLOWER_EVERY_MS);
        assert_eq!(pace.write_limit_bytes_per_s(), Some(50_000), "the way has become slower than the limit");
        pace.slow_clients(0, 0, 4 * SLOWER_EVERY_MS);
        assert_eq!(pace.write_limit_bytes_per_s(), Some(LIMIT_MIN_BYTES_PER_S));
    }
}
