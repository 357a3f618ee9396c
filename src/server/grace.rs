//! When deadlines count. A server that was stopped for a while comes back to find that they have passed, and with them
//! lies what its peers sent in time. One turn does not read and answer all of that, so deadlines wait a moment for it.

/// A loop that comes to a deadline later than this, in milliseconds, was not only busy but kept from running.
const AWAY_MS: u64 = 1_000;
/// How long deadlines wait then, in milliseconds: time for a few more rounds with a peer.
const GRACE_MS: u64 = 1_000;

/// Says whether deadlines are judged. Every other time they are, even where the loop always comes late.
#[derive(Debug, Default)]
pub(super) struct Grace {
    until_ms: Option<u64>,
}

impl Grace {
    /// True when deadlines count now; the first of them was due at `due_ms`.
    pub(super) fn is_over(&mut self, due_ms: Option<u64>, now_ms: u64) -> bool {
        match self.until_ms {
            Some(until_ms) if now_ms < until_ms => false,
            Some(_) => {
                self.until_ms = None;
                true
            }
            None => {
                let was_away = due_ms.is_some_and(|due_ms| now_ms.saturating_sub(due_ms) > AWAY_MS);
                self.until_ms = was_away.then(|| now_ms.saturating_add(GRACE_MS));
                !was_away
            }
        }
    }

    /// When the loop has to look at deadlines next, if the first of them is due at `due_ms`.
    pub(super) fn wakes_at_ms(&self, due_ms: Option<u64>) -> Option<u64> {
        self.until_ms.or(due_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_wait_once_for_a_loop_that_was_away() {
        let mut grace = Grace::default();
        assert!(grace.is_over(None, 5_000));
        assert!(grace.is_over(Some(5_000), 5_000 + AWAY_MS), "busy");
        assert_eq!(grace.wakes_at_ms(Some(7_000)), Some(7_000));
        assert!(!grace.is_over(Some(5_000), 20_000), "away");
        assert_eq!(grace.wakes_at_ms(Some(5_000)), Some(20_000 + GRACE_MS));
        assert!(!grace.is_over(Some(5_000), 20_000 + GRACE_MS - 1));
        assert!(grace.is_over(Some(5_000), 20_000 + GRACE_MS), "once");
        // A loop that is always late judges all the same.
        let judged = (0..10).filter(|n| grace.is_over(Some(0), 100_000 + n * 5_000)).count();
        assert_eq!(judged, 5);
    }
}
