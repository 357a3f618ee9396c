//! One fdatasync for all operations that wait for one, and its error, which sticks.
//!
//! Those that come while it runs are in the next group. Where the image is open twice, that group has a second fdatasync, which
//! runs beside the first: the disk has more to write at once. A third would gain no more.

use super::image::Image;
use super::queue::Job;
use crate::work::{Done, Op};
use std::collections::VecDeque;
use std::io;
use std::mem;

/// What the log says, once and at level E, after an fdatasync has failed.
const SYNC_LOST: &str = "fdatasync failed, written data may be lost; every later flush will fail until a restart";

/// An owner counts as alone when the last so many operations were its own.
const ALONE_OPS: u32 = 64;

/// How much may have been written since the last fdatasync when the next is a short one, in bytes.
const SHORT_BYTES: u64 = 64 << 10;

/// Operations whose fdatasync runs, or none.
#[derive(Debug, Default)]
struct Group {
    /// Invariant 1: each was done before that fdatasync began.
    jobs: Vec<Job>,
    /// It is an fsync.
    syncs_all: bool,
}

/// Operations that are done but for the fdatasync they share, and whether what was written is on stable storage.
///
/// Invariant 2: on each open file, at most one fdatasync runs at any time. The kernel reports an error once to each, so that
/// of two the second could succeed for what the first has failed to write.
#[derive(Debug, Default)]
pub(super) struct Commit {
    /// They are in the next group.
    gathering: Vec<Job>,
    /// Each has the open file of its number, of [`Image::files`].
    groups: Vec<Group>,
    /// The errno of the fdatasync that failed.
    errno: Option<i32>,
    syncs: u64,
    /// The owner of the last operation, and how many operations in a row were of that owner.
    company: (u64, u32),
    /// How much was to be written since the last fdatasync began, in bytes.
    written: u64,
    /// The mark on the image has changed since then. The next one is an fsync: an fdatasync need not cover it, and on ext4 it
    /// does not.
    is_marked: bool,
}

impl Commit {
    pub(super) fn new(image: &Image) -> Self {
        Self { groups: image.files().map(|_| Group::default()).collect(), ..Self::default() }
    }

    /// How many times fdatasync was called.
    pub(super) fn syncs(&self) -> u64 {
        self.syncs
    }

    /// An operation was submitted.
    pub(super) fn note(&mut self, op: &Op) {
        let (owner, row) = self.company;
        self.company = (op.owner, if op.owner == owner { row.saturating_add(1) } else { 1 });
        let bytes = op.action.touches().map_or(0, |range| range.end - range.start);
        self.written = self.written.saturating_add(bytes);
    }

    /// The mark on the image has changed.
    pub(super) fn note_mark(&mut self) {
        self.is_marked = true;
    }

    /// True when the sync of a group that has started is an fsync.
    pub(super) fn syncs_all(&self, group: usize) -> bool {
        self.groups.get(group).is_some_and(|group| group.syncs_all)
    }

    /// True when an fdatasync would be short, and only one owner would wait for it because no other has asked for
    /// anything lately.
    pub(super) fn serves_one(&self) -> bool {
        self.company.1 >= ALONE_OPS && self.written < SHORT_BYTES
    }

    pub(super) fn add(&mut self, job: Job) {
        self.gathering.push(job);
    }

    /// True when a group may start: somebody waits, and there is an open file on which no fdatasync runs.
    pub(super) fn may_start(&self) -> bool {
        !self.gathering.is_empty() && self.vacant().is_some()
    }

    /// The number of the next group.
    fn vacant(&self) -> Option<usize> {
        self.groups.iter().position(|group| group.jobs.is_empty())
    }

    /// Closes a group: its fdatasync begins, unless [`Commit::has_failed`]. The number of the group.
    pub(super) fn start(&mut self) -> Option<usize> {
        let number = self.vacant()?;
        let group = self.groups.get_mut(number)?;
        *group = Group { jobs: mem::take(&mut self.gathering), syncs_all: mem::take(&mut self.is_marked) };
        self.written = 0;
        self.syncs += u64::from(self.errno.is_none());
        Some(number)
    }

    /// True when no fdatasync will begin any more, because one has failed.
    pub(super) fn has_failed(&self) -> bool {
        self.errno.is_some()
    }

    /// The fdatasync of a group by this thread.
    pub(super) fn sync(&mut self, group: usize, image: &Image, done: &mut VecDeque<Done>) {
        let Some(file) = image.files().nth(group) else { return };
        let synced = if self.syncs_all(group) { file.sync_all() } else { file.sync_data() };
        self.ended(group, synced, done);
    }

    /// The fdatasync of a group has ended, or there was none. After one has failed there is no other: the kernel may have
    /// dropped the pages it could not write and count them as clean, so that the next one would succeed without them. Every
    /// later one fails the same way.
    pub(super) fn ended(&mut self, group: usize, result: io::Result<()>, done: &mut VecDeque<Done>) {
        if let (Err(error), None) = (result, self.errno) {
            log::error!("disk: {SYNC_LOST}: {error}");
            self.errno = Some(error.raw_os_error().unwrap_or(libc::EIO));
        }
        let result = || self.errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
        let jobs = self.groups.get_mut(group).map(|group| mem::take(&mut group.jobs)).unwrap_or_default();
        done.extend(jobs.into_iter().map(|job| job.finish(result())));
    }

    /// The owners of the operations whose fdatasync runs.
    pub(super) fn syncing(&self) -> impl Iterator<Item = u64> + '_ {
        self.groups.iter().flat_map(|group| &group.jobs).map(|job| job.op.owner)
    }

    /// True while an fdatasync runs.
    pub(super) fn is_syncing(&self) -> bool {
        self.groups.iter().any(|group| !group.jobs.is_empty())
    }

    /// Takes out what no fdatasync has begun for yet.
    pub(super) fn remove(&mut self, owner: u64) -> Vec<Job> {
        let (gone, stay) = mem::take(&mut self.gathering).into_iter().partition(|job| job.op.owner == owner);
        self.gathering = stay;
        gone
    }
}
