//! What a session has done, counted.

use crate::proto::error::Errno;
use crate::proto::wire::{kind, RequestHead};

/// What a session has done since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// READs answered.
    pub reads: u64,
    /// WRITEs and `WRITE_ZEROES` answered.
    pub writes: u64,
    /// TRIMs answered.
    pub trims: u64,
    /// `FLUSH`es answered.
    pub flushes: u64,
    /// Bytes of successful READs.
    pub read_bytes: u64,
    /// Bytes of successful WRITEs and `WRITE_ZEROES`.
    pub written_bytes: u64,
    /// Requests answered with an error. That zeroes are not to be had fast is none.
    pub errors: u64,
}

impl Tally {
    /// Counts a request that is answered now.
    pub(super) fn note(&mut self, head: &RequestHead, error: Option<Errno>) {
        let bytes = if error.is_none() { u64::from(head.length) } else { 0 };
        self.errors += u64::from(error.is_some_and(|errno| errno != Errno::NotSup));
        match head.kind {
            kind::READ => {
                self.reads += 1;
                self.read_bytes += bytes;
            }
            kind::WRITE | kind::WRITE_ZEROES => {
                self.writes += 1;
                self.written_bytes += bytes;
            }
            kind::TRIM => self.trims += 1,
            kind::FLUSH => self.flushes += 1,
            _ => {}
        }
    }
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.trims += other.trims;
        self.flushes += other.flushes;
        self.read_bytes += other.read_bytes;
        self.written_bytes += other.written_bytes;
        self.errors += other.errors;
    }
}
