//! When another server was there, when it was not, and how long to wait before it is tried again.

/// The wait before the second attempt, in milliseconds; each one after it waits twice as long. The first does not wait.
const FIRST_WAIT_MS: u64 = 100;
/// The longest wait between two attempts, in milliseconds.
const WAIT_MAX_MS: u64 = 3_000;
/// How many different things may be found and said in one outage, so that it fills no log.
const FOUND_MAX: usize = 8;
/// A connection that has lasted so long was a good one, in milliseconds.
const LASTING_MS: u64 = 1_000;

/// The record of a server's absences.
#[derive(Debug)]
pub(super) struct Outage {
    /// Since when it has been away; `None` while it is there.
    since_ms: Option<u64>,
    /// Since when it is there, or was last.
    connected_ms: Option<u64>,
    /// Attempts to reach it since it has been of use.
    attempts: u32,
    reconnects: u64,
    last_ms: u64,
    last_error: Option<String>,
    /// What was found instead of it in this outage, and how often.
    found: Vec<(String, u32)>,
    /// A server was there that is not the one that clients know.
    is_refused: bool,
    has_given_up: bool,
}

impl Outage {
    /// It has not been there yet.
    pub(super) fn begin(now_ms: u64) -> Self {
        Self {
            since_ms: Some(now_ms),
            connected_ms: None,
            attempts: 0,
            reconnects: 0,
            last_ms: 0,
            last_error: None,
            found: Vec::new(),
            is_refused: false,
            has_given_up: false,
        }
    }

    /// An attempt begins.
    pub(super) fn note_attempt(&mut self) {
        self.attempts = self.attempts.saturating_add(1);
    }

    /// Attempts so far.
    pub(super) fn attempts(&self) -> u32 {
        self.attempts
    }

    /// It has gone, or could not be reached. True when this is where an outage begins.
    pub(super) fn begin_again(&mut self, was_there: bool, now_ms: u64) -> bool {
        let begins = was_there && self.since_ms.is_none();
        if begins {
            self.since_ms = Some(now_ms);
            if self.connected_ms.is_some_and(|at_ms| now_ms.saturating_sub(at_ms) >= LASTING_MS) {
                self.attempts = 0;
            }
        }
        begins
    }

    /// It has replied. Only when a client is answered it is back: one that greets and is gone at the first request would be
    /// asked again and again without a pause.
    pub(super) fn note_reply(&mut self, is_for_client: bool) {
        if is_for_client {
            self.attempts = 0;
        }
    }

    /// It is there; how long it was away, in milliseconds, unless this was the first time.
    pub(super) fn end(&mut self, now_ms: u64) -> Option<u64> {
        let since_ms = self.since_ms.take()?;
        self.is_refused = false;
        self.has_given_up = false;
        self.last_error = None;
        self.found.clear();
        let was_there = self.connected_ms.replace(now_ms).is_some();
        was_there.then(|| {
            self.reconnects += 1;
            self.last_ms = now_ms.saturating_sub(since_ms);
            self.last_ms
        })
    }

    /// Another server is tried from now on.
    pub(super) fn restart(&mut self) {
        self.attempts = 0;
        self.is_refused = false;
        self.found.clear();
    }

    /// How often this was found in this outage, this time included; 0 when it is one of too many different things.
    pub(super) fn count(&mut self, why: &str) -> u32 {
        if let Some((_, count)) = self.found.iter_mut().find(|(found, _)| found == why) {
            *count = count.saturating_add(1);
            return *count;
        }
        if self.found.len() >= FOUND_MAX {
            return 0;
        }
        self.found.push((why.to_owned(), 1));
        1
    }

    /// Notes why an attempt has failed.
    pub(super) fn note_failure(&mut self, why: String, is_refusal: bool) {
        self.last_error = Some(why);
        self.is_refused = is_refusal;
    }

    /// How long to wait before the next attempt, in milliseconds. Many proxies that have lost one server do not all come back
    /// in the same moment: a tenth more or less, as `random` decides.
    pub(super) fn wait_ms(&self, random: u64) -> u64 {
        match self.attempts {
            0 => 0,
            n => {
                let doubled = FIRST_WAIT_MS.saturating_mul(1 << n.saturating_sub(1).min(10));
                let wait_ms = doubled.min(WAIT_MAX_MS) * 9 / 10;
                wait_ms + random % (wait_ms / 9 * 2 + 1)
            }
        }
    }

    /// When clients are to be cut.
    pub(super) fn gives_up_at_ms(&self, give_up_ms: Option<u64>) -> Option<u64> {
        let since_ms = self.since_ms.filter(|_| !self.has_given_up && self.connected_ms.is_some())?;
        Some(since_ms.saturating_add(give_up_ms?))
    }

    /// True once, when clients are to be cut.
    pub(super) fn gives_up(&mut self, give_up_ms: Option<u64>, now_ms: u64) -> bool {
        let gives_up = self.gives_up_at_ms(give_up_ms).is_some_and(|at_ms| at_ms <= now_ms);
        self.has_given_up |= gives_up;
        gives_up
    }

    /// True from then on until the server is there again.
    pub(super) fn has_given_up(&self) -> bool {
        self.has_given_up
    }

    /// True while it is away.
    pub(super) fn is_on(&self) -> bool {
        self.since_ms.is_some()
    }

    /// True when the last attempt has found a server that is not the one that clients know.
    pub(super) fn is_refused(&self) -> bool {
        self.is_refused
    }

    /// How long it has been away, in milliseconds; 0 while it is there.
    pub(super) fn on_for_ms(&self, now_ms: u64) -> u64 {
        self.since_ms.map_or(0, |since_ms| now_ms.saturating_sub(since_ms))
    }

    /// How long the last outage took, in milliseconds.
    pub(super) fn last_ms(&self) -> u64 {
        self.last_ms
    }

    /// Since when it is there, by the server's clock.
    pub(super) fn connected_ms(&self) -> Option<u64> {
        self.connected_ms
    }

    /// How often it has come back.
    pub(super) fn reconnects(&self) -> u64 {
        self.reconnects
    }

    /// Why the last attempt has failed.
    pub(super) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_attempt_is_made_at_once_and_the_others_further_and_further_apart() {
        let mut outage = Outage::begin(0);
        outage.end(0);
        assert!(
            outage.begin_again(true, 1_000) && !outage.begin_again(true, 1_000) && !outage.begin_again(false, 1_000)
        );
        let mut waits = Vec::new();
        for _ in 0..9 {
            waits.push((outage.wait_ms(0), outage.wait_ms(u64::MAX / 2)));
            outage.note_attempt();
        }
        assert_eq!(waits[0], (0, 0));
        let least: Vec<u64> = waits.iter().map(|wait| wait.0).collect();
        assert_eq!(least, [0, 90, 180, 360, 720, 1_440, 2_700, 2_700, 2_700]);
        for random in (0..u64::MAX).step_by(usize::MAX / 1_000) {
            assert!((2_700..=3_300).contains(&outage.wait_ms(random)), "a tenth more or less");
        }
        assert_eq!(outage.end(61_000), Some(60_000));
        assert_eq!((outage.reconnects(), outage.last_ms()), (1, 60_000));
        // It was there for a moment only, and nobody had anything of it.
        assert!(outage.begin_again(true, 61_999) && outage.wait_ms(0) == 2_700);
        outage.end(70_000);
        outage.note_reply(false);
        assert_eq!(outage.wait_ms(0), 2_700);
        outage.note_reply(true);
        assert!(outage.begin_again(true, 70_001) && outage.wait_ms(7) == 0);
        outage.note_attempt();
        outage.end(80_000);
        assert!(outage.begin_again(true, 81_000) && outage.wait_ms(7) == 0);
    }

    #[test]
    fn clients_are_cut_once_in_an_outage() {
        let mut outage = Outage::begin(0);
        assert_eq!((outage.gives_up_at_ms(Some(5)), outage.end(10)), (None, None), "nobody was told anything");
        outage.begin_again(true, 100);
        assert!(!outage.gives_up(None, 1_000_000) && !outage.gives_up(Some(50), 149));
        assert!(outage.gives_up(Some(50), 150) && outage.has_given_up() && !outage.gives_up(Some(50), 151));
        outage.end(200);
        assert!(!outage.has_given_up());
        outage.begin_again(true, 300);
        assert!(outage.gives_up(Some(50), 350));
    }
}
