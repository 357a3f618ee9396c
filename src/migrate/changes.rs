//! PURE: what operations of clients in flight will change: it has to be sent, too, before the end.

use std::collections::VecDeque;
use std::ops::Range;

/// Operations of clients that the disk has and that may change the image.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// In the order in which they were submitted; they are done in any order.
    ranges: VecDeque<Range<u64>>,
    /// How many more there are, of which nothing else is known.
    unknown: usize,
}

impl Changes {
    /// So many were submitted before anybody noted their ranges.
    pub(super) fn note_unknown(&mut self, count: usize) {
        self.unknown = count;
    }

    /// One is submitted.
    pub(super) fn note_submitted(&mut self, range: &Range<u64>) {
        self.ranges.push_back(range.clone());
    }

    /// One is done.
    pub(super) fn note_done(&mut self, range: &Range<u64>) {
        // Of two with the same range it does not matter which one that was.
        if let Some(at) = self.ranges.iter().position(|submitted| submitted == range) {
            self.ranges.remove(at);
        } else {
            self.unknown = self.unknown.saturating_sub(1);
        }
    }

    /// True when all of them together cost no more than `room`, each as much as `cost` says. What is unknown never fits.
    pub(super) fn fit(&self, room: u64, cost: impl Fn(&Range<u64>) -> u64) -> bool {
        let rest = self.ranges.iter().try_fold(room, |room, range| room.checked_sub(cost(range)));
        self.unknown == 0 && rest.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fits(changes: &Changes, room: u64) -> bool {
        changes.fit(room, |range| range.end - range.start)
    }

    #[test]
    fn what_is_in_flight_has_to_fit_together() {
        let mut changes = Changes::default();
        assert!(fits(&changes, 0));
        for range in [0..10, 5..8, 0..10] {
            changes.note_submitted(&range);
        }
        assert!(fits(&changes, 23) && !fits(&changes, 22));
        changes.note_done(&(0..10));
        assert!(fits(&changes, 13) && !fits(&changes, 12));
        changes.note_done(&(5..8));
        changes.note_done(&(0..10));
        assert!(fits(&changes, 0));
    }

    #[test]
    fn what_was_submitted_before_is_waited_for() {
        let mut changes = Changes::default();
        changes.note_unknown(2);
        changes.note_submitted(&(0..10));
        // Two that were there before, and one of them looks like the one that was not.
        for range in [3..4, 0..10] {
            changes.note_done(&range);
            assert!(!fits(&changes, u64::MAX));
        }
        changes.note_done(&(0..10));
        assert!(fits(&changes, 0));
        changes.note_done(&(0..10));
        assert!(fits(&changes, 0), "one too many does no harm");
    }
}
