//! What a session has done, counted.

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
    /// Requests answered with an error.
    pub errors: u64,
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
