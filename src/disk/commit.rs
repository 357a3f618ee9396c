//! One fdatasync for all operations that wait for one, and its error, which sticks.

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

/// Operations that are done but for the fdatasync they share, and whether what was written is on stable storage.
///
/// Invariant 1: at most one fdatasync runs at any time. Its error is reported once per open file, so that of two the
/// second could succeed for what the first has failed to write.
///
/// Invariant 2: each member of `syncing` was done before that fdatasync began.
#[derive(Debug, Default)]
pub(super) struct Commit {
    /// They are in the next group.
    gathering: Vec<Job>,
    /// The group whose fdatasync runs.
    syncing: Vec<Job>,
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
    /// The one that runs is an fsync.
    syncs_all: bool,
}

impl Commit {
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

    /// True when the sync that has begun is an fsync.
    pub(super) fn syncs_all(&self) -> bool {
        self.syncs_all
    }

    /// True when an fdatasync would be short, and only one owner would wait for it because no other has asked for
    /// anything lately.
    pub(super) fn serves_one(&self) -> bool {
        self.company.1 >= ALONE_OPS && self.written < SHORT_BYTES
    }

    pub(super) fn add(&mut self, job: Job) {
        self.gathering.push(job);
    }

    /// True when a group may start: somebody waits, and no fdatasync runs.
    pub(super) fn may_start(&self) -> bool {
        self.syncing.is_empty() && !self.gathering.is_empty()
    }

    /// Closes the group: its fdatasync begins. False: there is none any more, because one has failed.
    pub(super) fn start(&mut self) -> bool {
        debug_assert!(self.syncing.is_empty(), "invariant 1");
        self.syncing = mem::take(&mut self.gathering);
        self.written = 0;
        self.syncs_all = mem::take(&mut self.is_marked);
        let begins = self.errno.is_none();
        self.syncs += u64::from(begins);
        begins
    }

    /// The fdatasync of the group by this thread.
    pub(super) fn sync(&mut self, image: &Image, done: &mut VecDeque<Done>) {
        let synced = if self.syncs_all { image.file.sync_all() } else { image.file.sync_data() };
        self.ended(synced, done);
    }

    /// The fdatasync of the group has ended, or there was none. After one has failed there is no other: the kernel may have
    /// dropped the pages it could not write and count them as clean, so that the next one would succeed without them. Every
    /// later one fails the same way.
    pub(super) fn ended(&mut self, result: io::Result<()>, done: &mut VecDeque<Done>) {
        if let (Err(error), None) = (result, self.errno) {
            log::error!("disk: {SYNC_LOST}: {error}");
            self.errno = Some(error.raw_os_error().unwrap_or(libc::EIO));
        }
        let result = || self.errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)));
        done.extend(self.syncing.drain(..).map(|job| job.finish(result())));
    }

    /// The owners of the operations whose fdatasync runs.
    pub(super) fn syncing(&self) -> impl Iterator<Item = u64> + '_ {
        self.syncing.iter().map(|job| job.op.owner)
    }

    /// True while an fdatasync runs.
    pub(super) fn is_syncing(&self) -> bool {
        !self.syncing.is_empty()
    }

    /// Takes out what no fdatasync has begun for yet.
    pub(super) fn remove(&mut self, owner: u64) -> Vec<Job> {
        let (gone, stay) = mem::take(&mut self.gathering).into_iter().partition(|job| job.op.owner == owner);
        self.gathering = stay;
        gone
    }
}
