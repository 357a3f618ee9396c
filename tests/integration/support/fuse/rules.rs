//! PURE: What goes wrong with which requests.

use std::collections::BTreeMap;
use std::ops::{Bound, Range, RangeBounds};
use std::time::Duration;

/// The kinds of requests that something can be arranged for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// What the page cache does not hold.
    Read,
    /// Each write(2), cut into pieces of at most 1 MiB.
    Write,
    /// fallocate(2), whatever it makes of the range.
    Fallocate,
    /// The search for data or a hole; its range is where it begins.
    Seek,
    /// fdatasync(2) of a file.
    Fsync,
    /// fsync(2) of a file, which covers its extended attributes, too.
    FsyncAll,
    /// fsync(2) of the folder.
    FsyncFolder,
    /// ftruncate(2).
    Resize,
    /// stat(2), as far as the kernel does not know the answer.
    Stat,
    /// Also of a file that is made.
    Open,
    Unlink,
    Rename,
    /// Setting, getting, listing and removing extended attributes.
    Xattr,
}

/// What happens to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is carried out and answered after a time.
    Delay(Duration),
    /// The same, but when it is let go, or fails when whoever waits for it is killed.
    Hold,
    /// The same, and whoever is killed waits, too.
    Stick,
    /// It fails with this error number.
    Fail(i32),
    /// The same, and only the first one.
    FailOnce(i32),
}

struct Rule {
    op: Op,
    range: Range<u64>,
    fault: Fault,
}

/// What is arranged.
#[derive(Default)]
pub struct Rules {
    rules: Vec<Rule>,
    counts: BTreeMap<Op, u64>,
}

/// What is to happen to one request.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// How long it takes.
    pub delay: Duration,
    /// It waits until it is let go.
    pub is_held: bool,
    /// Also when whoever waits for it is killed.
    pub is_stuck: bool,
    /// What it fails with.
    pub error: Option<i32>,
}

impl Rules {
    /// Arranges something for all requests of a kind that touch a range of a file, or have none.
    pub fn add(&mut self, op: Op, range: impl RangeBounds<u64>, fault: Fault) {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&before) => before + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last + 1,
            Bound::Excluded(&end) => end,
            Bound::Unbounded => u64::MAX,
        };
        self.rules.push(Rule { op, range: start..end, fault });
    }

    /// Drops what is arranged for a kind.
    pub fn remove(&mut self, op: Op) {
        self.rules.retain(|rule| rule.op != op);
    }

    /// Counts a request and says what is to happen to it: the longest delay, the error that was arranged last.
    pub fn judge(&mut self, op: Op, range: Option<&Range<u64>>) -> Verdict {
        *self.counts.entry(op).or_default() += 1;
        let mut verdict = Verdict::default();
        let mut used = None;
        for (number, rule) in self.rules.iter().enumerate() {
            let touches = range.is_none_or(|range| range.start < rule.range.end && rule.range.start < range.end);
            if rule.op != op || !touches {
                continue;
            }
            match rule.fault {
                Fault::Delay(delay) => verdict.delay = verdict.delay.max(delay),
                Fault::Hold => verdict.is_held = true,
                Fault::Stick => (verdict.is_held, verdict.is_stuck) = (true, true),
                Fault::Fail(error) => (verdict.error, used) = (Some(error), None),
                Fault::FailOnce(error) => (verdict.error, used) = (Some(error), Some(number)),
            }
        }
        used.map(|number| self.rules.remove(number));
        verdict
    }

    /// How many requests of a kind there were.
    pub fn count(&self, op: Op) -> u64 {
        self.counts.get(&op).copied().unwrap_or(0)
    }
}
