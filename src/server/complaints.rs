//! The log lines that peers cause: a few of each kind in an interval, over all peers, and then how many more there were. So
//! a peer that comes again and again fills no log, and hides nothing but its like.

use log::{log, Level};
use std::collections::BTreeMap;
use std::mem;

/// How long an interval is, in milliseconds. It begins with the first complaint after the last one.
const INTERVAL_MS: u64 = 10_000;

/// What is complained of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Complaint {
    /// A client asked for what is not there or not allowed.
    RefusedRequest,
    /// The disk had no room for what a client wrote.
    DiskFull,
    /// The disk failed a client's request.
    DiskError,
    /// A client's request could not be done for another reason.
    FailedRequest,
    /// A client asked for an export that is not there.
    UnknownExport,
    /// A client did not end in good order.
    BadEnd,
    /// A sender left before its image was complete.
    IncompleteMigration,
    /// A client was not let in.
    RefusedConnection,
    /// A connection could not be served.
    LostConnection,
    /// An attempt to migrate the image away failed.
    FailedAttempt,
    /// A turn in which memory had run out for somebody.
    Shortage,
}

impl Complaint {
    /// The most lines in an interval. Attempts fail for the same reason, as a rule, and a shortage lasts.
    fn lines_max(self) -> u32 {
        match self {
            Self::FailedAttempt | Self::Shortage => 1,
            _ => 10,
        }
    }

    /// How loud: what is wrong here and not with a peer is an error.
    fn level(self) -> Level {
        match self {
            Self::DiskFull | Self::DiskError => Level::Error,
            _ => Level::Warn,
        }
    }

    /// Several of them.
    fn plural(self) -> &'static str {
        match self {
            Self::RefusedRequest => "refused requests",
            Self::DiskFull => "requests for which the disk had no room",
            Self::DiskError => "requests that the disk failed",
            Self::FailedRequest => "failed requests",
            Self::UnknownExport => "clients that asked for an export that is not there",
            Self::BadEnd => "clients that ended badly",
            Self::IncompleteMigration => "incomplete migrations",
            Self::RefusedConnection => "refused connections",
            Self::LostConnection => "connections that could not be served",
            Self::FailedAttempt => "failed attempts of a migration",
            Self::Shortage => "turns without memory",
        }
    }
}

/// The complaints of the current interval.
#[derive(Debug, Default)]
pub(super) struct Complaints {
    /// `None`: the interval begins with the next one.
    began_ms: Option<u64>,
    counts: BTreeMap<Complaint, Count>,
    /// What was complained of in the log, and may be over some time.
    open: Vec<Complaint>,
}

#[derive(Debug, Default)]
struct Count {
    logged: u32,
    left_out: u64,
}

impl Complaints {
    /// True when a line may be logged; otherwise it is counted as left out.
    pub(super) fn may_log(&mut self, of: Complaint, now_ms: u64) -> bool {
        let count = self.count(of, now_ms);
        let may = count.logged < of.lines_max();
        if may {
            count.logged += 1;
            if !self.open.contains(&of) {
                self.open.push(of);
            }
        } else {
            count.left_out += 1;
        }
        may
    }

    /// How loud it is to be said that something is over: as loud as the last complaint of it was, and once.
    pub(super) fn level_of_end(&mut self, of: Complaint) -> Level {
        let Some(place) = self.open.iter().position(|&open| open == of) else { return Level::Info };
        self.open.swap_remove(place).level()
    }

    /// As [`Complaints::may_log`], for a client whose last line was logged at `last_ms`: it has one in an interval's time.
    pub(super) fn may_log_again(&mut self, of: Complaint, last_ms: &mut Option<u64>, now_ms: u64) -> bool {
        if last_ms.is_some_and(|last_ms| now_ms.saturating_sub(last_ms) < INTERVAL_MS) {
            self.count(of, now_ms).left_out += 1;
            return false;
        }
        let may = self.may_log(of, now_ms);
        if may {
            *last_ms = Some(now_ms);
        }
        may
    }

    fn count(&mut self, of: Complaint, now_ms: u64) -> &mut Count {
        self.began_ms.get_or_insert(now_ms);
        self.counts.entry(of).or_default()
    }

    /// When the loop has to look here next: when something was left out and is to be told.
    pub(super) fn due_ms(&self) -> Option<u64> {
        let ends_ms = self.began_ms?.saturating_add(INTERVAL_MS);
        self.counts.values().any(|count| count.left_out > 0).then_some(ends_ms)
    }

    /// Ends the interval if its time is over, and tells what was left out.
    pub(super) fn look(&mut self, now_ms: u64) {
        if self.began_ms.is_some_and(|began_ms| now_ms.saturating_sub(began_ms) >= INTERVAL_MS) {
            self.tell();
        }
    }

    /// Ends the interval and tells what was left out.
    pub(super) fn tell(&mut self) {
        if let Some((level, what)) = self.end() {
            log!(level, "not logged: {what}");
        }
    }

    /// Ends the interval; what was left out, in words, and as loud as the loudest of it.
    fn end(&mut self) -> Option<(Level, String)> {
        self.began_ms = None;
        let counts = mem::take(&mut self.counts);
        let left_out = || counts.iter().filter(|(_, count)| count.left_out > 0);
        let words: Vec<_> = left_out().map(|(of, count)| format!("{} more {}", count.left_out, of.plural())).collect();
        let level = left_out().map(|(of, _)| of.level()).min()?;
        Some((level, words.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_counted_by_kind() {
        let mut complaints = Complaints::default();
        assert_eq!((complaints.due_ms(), complaints.end()), (None, None));
        let logged = (0..1000).filter(|&n| complaints.may_log(Complaint::RefusedRequest, 5_000 + n)).count();
        assert_eq!(logged, 10);
        assert!(complaints.may_log(Complaint::BadEnd, 6_000), "another kind");
        assert!(complaints.may_log(Complaint::FailedAttempt, 6_000));
        assert!(!complaints.may_log(Complaint::FailedAttempt, 7_000));
        complaints.look(14_999);
        assert_eq!(complaints.due_ms(), Some(15_000), "an interval begins with its first complaint");
        let left_out = "990 more refused requests, 1 more failed attempts of a migration";
        assert_eq!(complaints.end().unwrap(), (Level::Warn, left_out.into()));
        assert!(complaints.may_log(Complaint::RefusedRequest, 15_000));
        assert_eq!(complaints.due_ms(), None, "nothing to be told");
        complaints.look(25_000);
        assert_eq!((complaints.began_ms, complaints.counts.len()), (None, 0));
    }

    #[test]
    fn an_end_is_as_loud_as_what_it_ends() {
        let mut complaints = Complaints::default();
        let end = |complaints: &mut Complaints| complaints.level_of_end(Complaint::Shortage);
        assert_eq!(end(&mut complaints), Level::Info);
        assert!(complaints.may_log(Complaint::Shortage, 0) && complaints.may_log(Complaint::DiskFull, 0));
        assert_eq!((end(&mut complaints), end(&mut complaints)), (Level::Warn, Level::Info));
        assert!(!complaints.may_log(Complaint::Shortage, 1));
        assert_eq!(end(&mut complaints), Level::Info, "nobody has heard of it");
        assert_eq!(complaints.level_of_end(Complaint::DiskFull), Level::Error);
        assert!((0..10).all(|_| complaints.may_log(Complaint::DiskError, 2)));
        assert!(!complaints.may_log(Complaint::DiskError, 3));
        let left_out = "1 more requests that the disk failed, 1 more turns without memory";
        assert_eq!(complaints.end().unwrap(), (Level::Error, left_out.into()));
    }

    #[test]
    fn one_client_does_not_take_the_lines_of_all() {
        let mut complaints = Complaints::default();
        let mut clients = [None; 12];
        let mut logged = [0; 12];
        for now_ms in 0..100 {
            for (last_ms, logged) in clients.iter_mut().zip(&mut logged) {
                *logged += u32::from(complaints.may_log_again(Complaint::FailedRequest, last_ms, now_ms));
            }
        }
        assert_eq!(logged, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
        assert_eq!(complaints.end().unwrap(), (Level::Warn, "1190 more failed requests".into()));
        let again = clients.map(|mut last_ms| complaints.may_log_again(Complaint::FailedRequest, &mut last_ms, 9_999));
        assert_eq!(again.iter().filter(|&&again| again).count(), 2, "those that had no line yet");
        assert!(complaints.may_log_again(Complaint::FailedRequest, &mut clients[0], 10_000));
    }
}
