//! How long requests take, in microseconds. What time it is, the caller tells; until it does, nothing takes any.

/// How long a request took that was carried out and is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Took {
    /// From when its head was received until its reply was ready to be sent.
    pub all_us: u64,
    /// Of that, from when the disk was first asked until it was done.
    pub disk_us: u64,
}

/// When a request came, and when the disk was asked.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Times {
    pub(super) received_us: u64,
    pub(super) asked_us: Option<u64>,
}

/// The time, as far as a session knows it.
#[derive(Debug, Default)]
pub(super) struct Stopwatch {
    pub(super) now_us: u64,
    /// When something was received last.
    pub(super) received_us: u64,
}

impl Stopwatch {
    /// What a request took that is answered now; `None` when the disk was not asked.
    pub(super) fn took(&self, times: Times) -> Option<Took> {
        let since = |at_us| self.now_us.saturating_sub(at_us);
        Some(Took { all_us: since(times.received_us), disk_us: since(times.asked_us?) })
    }
}
