//! What waits: operations on their way, and lanes that are fair to those who asked for them.

use crate::work::{Action, Done, Extent, Op};
use std::collections::VecDeque;
use std::io;
use std::ops::Range;

/// An operation on its way. What is left of a long one is in its action.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) op: Op,
    touched: Option<Range<u64>>,
    pub(super) extents: Vec<Extent>,
    /// Which one of all it is, in the order in which they were submitted.
    pub(super) number: u64,
    /// How much of a payload the kernel has written, in bytes.
    pub(super) written: u64,
    /// A part of the change that it is may have been made.
    pub(super) is_begun: bool,
}

impl Job {
    pub(super) fn new(op: Op) -> Self {
        Self { touched: op.action.touches(), op, extents: Vec::new(), number: 0, written: 0, is_begun: false }
    }

    /// True when both are pieces of one request.
    pub(super) fn is_of_request(&self, other: &Self) -> bool {
        (self.op.owner, self.op.tag) == (other.op.owner, other.op.tag)
    }

    pub(super) fn finish(self, result: io::Result<()>) -> Done {
        let Op { owner, tag, action } = self.op;
        let buffer = match action {
            Action::Read { mut buffer, .. } => {
                if result.is_err() {
                    buffer.clear();
                }
                Some(buffer)
            }
            Action::Write { payload, .. } => Some(payload),
            _ => None,
        };
        Done { owner, tag, buffer, touched: self.touched, extents: self.extents, result }
    }
}

/// Jobs that are taken one at a time, of each owner in turn, so that nobody waits for the many of another.
///
/// Invariant 1: no lane is empty, and no two have one owner.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    lanes: VecDeque<Lane>,
}

#[derive(Debug)]
struct Lane {
    owner: u64,
    jobs: VecDeque<Job>,
}

impl Lanes {
    pub(super) fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Queues a job behind the others of its owner.
    pub(super) fn push(&mut self, job: Job) {
        self.add(job, VecDeque::push_back);
    }

    /// Queues a job before the others of its owner: it goes on when its owner's turn comes again.
    pub(super) fn push_front(&mut self, job: Job) {
        self.add(job, VecDeque::push_front);
    }

    /// The first job of the owner whose turn it is.
    pub(super) fn pop(&mut self) -> Option<Job> {
        self.pop_if(|_| true)
    }

    /// The same of those owners of whose first job this is true.
    pub(super) fn pop_if(&mut self, may: impl Fn(&Job) -> bool) -> Option<Job> {
        let at = self.lanes.iter().position(|lane| lane.jobs.front().is_some_and(&may))?;
        let mut lane = self.lanes.remove(at)?;
        let job = lane.jobs.pop_front();
        if !lane.jobs.is_empty() {
            self.lanes.push_back(lane);
        }
        job
    }

    /// The first job of each owner.
    pub(super) fn heads(&self) -> impl Iterator<Item = &Job> {
        self.lanes.iter().filter_map(|lane| lane.jobs.front())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Job> {
        self.lanes.iter().flat_map(|lane| &lane.jobs)
    }

    /// Those that are begun. They come first in their lanes.
    pub(super) fn begun(&self) -> impl Iterator<Item = &Job> {
        self.lanes.iter().flat_map(|lane| lane.jobs.iter().take_while(|job| job.is_begun))
    }

    /// Takes out all jobs of an owner.
    pub(super) fn remove(&mut self, owner: u64) -> VecDeque<Job> {
        let at = self.lanes.iter().position(|lane| lane.owner == owner);
        at.and_then(|at| self.lanes.remove(at)).map(|lane| lane.jobs).unwrap_or_default()
    }

    /// Adds a job to the lane of its owner, which may be a new one.
    fn add(&mut self, job: Job, push: fn(&mut VecDeque<Job>, Job)) {
        let owner = job.op.owner;
        if let Some(lane) = self.lanes.iter_mut().find(|lane| lane.owner == owner) {
            push(&mut lane.jobs, job);
        } else {
            self.lanes.push_back(Lane { owner, jobs: VecDeque::from([job]) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(owner: u64, tag: u32) -> Job {
        Job::new(Op { owner, tag, action: Action::Flush })
    }

    fn names(lanes: &mut Lanes) -> Vec<(u64, u32)> {
        std::iter::from_fn(|| lanes.pop()).map(|job| (job.op.owner, job.op.tag)).collect()
    }

    #[test]
    fn each_owner_has_its_turn() {
        let mut lanes = Lanes::default();
        (0..3).for_each(|tag| lanes.push(job(1, tag)));
        lanes.push(job(2, 0));
        let first = lanes.pop().unwrap();
        lanes.push_front(first);
        lanes.push(job(3, 0));
        assert!(lanes.pop_if(|job| job.op.owner == 4).is_none() && lanes.heads().map(|job| job.op.owner).eq([2, 1, 3]));
        assert_eq!(names(&mut lanes), [(2, 0), (1, 0), (3, 0), (1, 1), (1, 2)]);
        (0..6).for_each(|n| lanes.push(job(u64::from(n % 3), n)));
        assert_eq!(lanes.pop_if(|job| job.op.owner == 1).map(|job| job.op.tag), Some(1));
        assert_eq!(names(&mut lanes), [(0, 0), (2, 2), (1, 4), (0, 3), (2, 5)]);
        assert!(lanes.is_empty());
    }

    #[test]
    fn what_is_removed_is_all_of_an_owner_and_of_no_other() {
        let mut lanes = Lanes::default();
        (0..6).for_each(|n| lanes.push(job(u64::from(n % 2), n)));
        let removed: Vec<u32> = lanes.remove(1).into_iter().map(|job| job.op.tag).collect();
        assert_eq!((removed, lanes.remove(7).len()), (vec![1, 3, 5], 0));
        assert_eq!(names(&mut lanes), [(0, 0), (0, 2), (0, 4)]);
    }
}
