//! A job while it runs: which request comes next, and when.

use std::io;
use std::time::{Duration, Instant};

use super::flights::Kind;
use super::handshake::Export;
use super::plan::{Data, Job};
use super::report::Report;
use super::walk::{mix, Walk};

/// A job while it runs.
pub struct Work<'plan> {
    pub plan: &'plan Job,
    pub report: Report,
    walk: Walk,
    random: u64,
    begun: Instant,
    /// Requests that were made but for FLUSH, and their bytes.
    ops: u64,
    bytes: u64,
    /// Bytes of writes since the last FLUSH.
    unflushed: u64,
    stopped: bool,
}

/// A request to be made.
pub struct Request {
    pub kind: Kind,
    pub fua: bool,
    pub at: u64,
    pub length: u32,
}

impl<'plan> Work<'plan> {
    /// Checks that the job fits the export.
    pub fn new(plan: &'plan Job, export: Export) -> io::Result<Self> {
        let left = export.size.checked_sub(plan.from).ok_or_else(|| io::Error::other("from is past the export"))?;
        let size = plan.size.unwrap_or(left);
        let blocks = size / u64::from(plan.block);
        let parts = if plan.sequential { plan.connections as u64 } else { 1 };
        if size > left || blocks < parts {
            return Err(io::Error::other(format!("{size} bytes are too few for the job, or more than the export has")));
        }
        if plan.write_percent > 0 && export.is_read_only() {
            return Err(io::Error::other("the export is read-only"));
        }
        if plan.command.is_some_and(|command| !export.takes(command)) {
            return Err(io::Error::other("the server does not take the command of the job"));
        }
        if plan.fua_percent > 0 && !export.has_fua() || plan.flush_bytes.is_some() && !export.has_flush() {
            return Err(io::Error::other("the server has not what the job needs: FUA or FLUSH"));
        }
        let walk =
            if plan.sequential { Walk::sequential(blocks, plan.connections) } else { Walk::random(blocks, plan.seed) };
        let begun = Instant::now();
        let report = Report::new(begun);
        let random = mix(plan.seed);
        Ok(Self { plan, report, walk, random, begun, ops: 0, bytes: 0, unflushed: 0, stopped: false })
    }

    /// From now on time counts.
    pub fn begin(&mut self, now: Instant) {
        self.begun = now;
        self.report = Report::new(now);
    }

    /// No more requests.
    pub fn stop(&mut self) {
        self.stopped = true;
    }

    /// Whether there will be no more requests.
    pub fn is_over(&self) -> bool {
        self.stopped || self.plan.ops == Some(self.ops)
    }

    /// When the next request may be made, if the pace says so and there will be one.
    pub fn due(&self) -> Option<Instant> {
        let pace = self.plan.pace_bytes_per_s.filter(|_| !self.is_over())?;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
        let after = self.bytes as f64 / pace as f64;
        Some(self.begun + Duration::from_secs_f64(after))
    }

    /// The next request of a connection, if one may be made now.
    pub fn next(&mut self, connection: usize, now: Instant) -> Option<Request> {
        if self.plan.flush_bytes.is_some_and(|bytes| self.unflushed >= bytes) {
            self.unflushed = 0;
            return Some(Request { kind: Kind::Flush, fua: false, at: 0, length: 0 });
        }
        if self.is_over() || self.due().is_some_and(|due| due > now) {
            return None;
        }
        let length = self.plan.block;
        let at = self.plan.from + self.walk.next(connection) * u64::from(length);
        self.ops += 1;
        self.bytes += u64::from(length);
        if let Some(kind) = self.plan.command {
            return Some(Request { kind, fua: false, at, length });
        }
        if self.percent(self.plan.write_percent) {
            self.unflushed += u64::from(length);
            let fua = self.percent(self.plan.fua_percent);
            return Some(Request { kind: Kind::Write, fua, at, length });
        }
        Some(Request { kind: Kind::Read, fua: false, at, length })
    }

    /// True in so many of 100 times.
    fn percent(&mut self, percent: u64) -> bool {
        if percent == 0 || percent >= 100 {
            return percent != 0;
        }
        self.random = mix(self.random);
        self.random % 100 < percent
    }

    /// Whether what is read must be what `data=check` writes.
    pub fn is_checked(&self) -> bool {
        self.plan.data == Data::Check
    }
}
