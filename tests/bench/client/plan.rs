//! What a run is to do, read from words such as `depth=32`.

use std::io;
use std::str::FromStr;
use std::time::Duration;

use super::flights::Kind;
use super::handshake;
use super::socket::Socket;

/// A whole run.
pub struct Plan {
    /// HOST:PORT, or a path.
    address: String,
    export: String,
    structured: bool,
    /// How long requests are made; without, until the counts of all jobs are reached.
    pub duration: Option<Duration>,
    /// How long the server may leave everything unanswered.
    pub stall: Duration,
    pub jobs: Vec<Job>,
}

/// What some connections do at the same time as those of the other jobs.
pub struct Job {
    pub connections: usize,
    pub depth: usize,
    pub block: u32,
    /// What every request is; without, they are reads and writes.
    pub command: Option<Kind>,
    pub write_percent: u64,
    pub fua_percent: u64,
    pub sequential: bool,
    pub from: u64,
    pub size: Option<u64>,
    pub pace_bytes_per_s: Option<u64>,
    pub flush_bytes: Option<u64>,
    pub ops: Option<u64>,
    pub data: Data,
    pub seed: u64,
}

/// What becomes of the data that is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Data {
    /// It is received.
    Copy,
    /// The kernel throws it away.
    Discard,
    /// It is compared with what this client writes there.
    Check,
}

impl Plan {
    /// Reads the words behind the program's name.
    pub fn parse(words: &[impl AsRef<str>]) -> io::Result<Self> {
        let mut groups = words.split(|word| word.as_ref() == "--");
        let (address, options) =
            groups.next().and_then(<[_]>::split_first).ok_or_else(|| invalid("usage: load ADDRESS ... -- JOB"))?;
        let mut plan = Self {
            address: address.as_ref().to_owned(),
            export: String::new(),
            structured: false,
            duration: None,
            stall: Duration::from_secs(30),
            jobs: groups.map(Job::parse).collect::<io::Result<_>>()?,
        };
        for word in options {
            match pair(word.as_ref())? {
                ("export", name) => name.clone_into(&mut plan.export),
                ("replies", "simple") => plan.structured = false,
                ("replies", "structured") => plan.structured = true,
                ("seconds", value) => plan.duration = Some(seconds(value)?),
                ("stall", value) => plan.stall = seconds(value)?,
                _ => return Err(unknown(word.as_ref())),
            }
        }
        if plan.jobs.is_empty() {
            return Err(invalid("no job"));
        }
        if plan.duration.is_none() && plan.jobs.iter().any(|job| job.ops.is_none()) {
            return Err(invalid("neither seconds nor the ops of each job"));
        }
        if !plan.structured && plan.jobs.iter().any(|job| job.command == Some(Kind::Status)) {
            return Err(invalid("command=status needs replies=structured"));
        }
        if plan.address.starts_with('/') && plan.jobs.iter().any(|job| job.data == Data::Discard) {
            return Err(invalid("data=discard needs TCP"));
        }
        Ok(plan)
    }

    /// Makes connections for a job, and says how large the export is.
    pub fn connect(&self, connections: usize) -> io::Result<(Vec<Socket>, handshake::Export)> {
        let mut sockets = Vec::new();
        let mut export = handshake::Export::default();
        let extents = self.jobs.iter().any(|job| job.command == Some(Kind::Status));
        for _ in 0..connections {
            let (socket, found) = Socket::connect(&self.address, self.stall, |stream| {
                handshake::shake(stream, &self.export, self.structured, extents)
            })?;
            sockets.push(socket);
            export = found;
        }
        Ok((sockets, export))
    }
}

impl Job {
    fn parse(words: &[impl AsRef<str>]) -> io::Result<Self> {
        let mut job = Self {
            connections: 1,
            depth: 1,
            block: 4096,
            command: None,
            write_percent: 0,
            fua_percent: 0,
            sequential: false,
            from: 0,
            size: None,
            pace_bytes_per_s: None,
            flush_bytes: None,
            ops: None,
            data: Data::Copy,
            seed: 1,
        };
        for word in words {
            match pair(word.as_ref())? {
                ("connections", value) => job.connections = number(value)?,
                ("depth", value) => job.depth = number(value)?,
                ("block", value) => job.block = u32::try_from(bytes(value)?).map_err(io::Error::other)?,
                ("command", "trim") => job.command = Some(Kind::Trim),
                ("command", "cache") => job.command = Some(Kind::Cache),
                ("command", "zeroes") => job.command = Some(Kind::Zeroes),
                ("command", "status") => job.command = Some(Kind::Status),
                ("write", value) => job.write_percent = number(value)?,
                ("fua", value) => job.fua_percent = number(value)?,
                ("order", "random") => job.sequential = false,
                ("order", "sequential") => job.sequential = true,
                ("from", value) => job.from = bytes(value)?,
                ("size", value) => job.size = Some(bytes(value)?),
                ("pace", value) => job.pace_bytes_per_s = Some(bytes(value)?),
                ("flush", value) => job.flush_bytes = Some(bytes(value)?),
                ("ops", value) => job.ops = Some(number(value)?),
                ("data", "copy") => job.data = Data::Copy,
                ("data", "discard") => job.data = Data::Discard,
                ("data", "check") => job.data = Data::Check,
                ("seed", value) => job.seed = number(value)?,
                _ => return Err(unknown(word.as_ref())),
            }
        }
        let positive = [job.connections as u64, job.depth as u64, job.block.into()];
        if positive.contains(&0) || job.pace_bytes_per_s == Some(0) || job.flush_bytes == Some(0) {
            return Err(invalid("a count, a size or a pace of a job is 0"));
        }
        if job.command.is_some() && (job.write_percent > 0 || job.data != Data::Copy) {
            return Err(invalid("a job with a command neither reads nor writes"));
        }
        Ok(job)
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

fn unknown(word: &str) -> io::Error {
    invalid(&format!("{word} is not understood"))
}

fn pair(word: &str) -> io::Result<(&str, &str)> {
    word.split_once('=').ok_or_else(|| unknown(word))
}

fn number<T: FromStr>(value: &str) -> io::Result<T> {
    value.parse().map_err(|_| invalid(&format!("{value} is no number, or too large")))
}

fn bytes(value: &str) -> io::Result<u64> {
    let (digits, shift) = match value.as_bytes().last() {
        Some(b'k') => (&value[..value.len() - 1], 10),
        Some(b'm') => (&value[..value.len() - 1], 20),
        Some(b'g') => (&value[..value.len() - 1], 30),
        _ => (value, 0),
    };
    let count: u64 = number(digits)?;
    count.checked_mul(1 << shift).ok_or_else(|| invalid(&format!("{value} is too large")))
}

fn seconds(value: &str) -> io::Result<Duration> {
    Duration::try_from_secs_f64(number(value)?).map_err(io::Error::other)
}
