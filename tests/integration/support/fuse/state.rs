//! What the requests of the kernel do to the folder, and those that wait for their time.

use super::folder::{Change, File, FileId, Fill, Folder, FOLDER};
use super::journal::{Journal, Sync};
use super::rules::{Op, Rules};
use super::wire::{self, Call, Node, Request};
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

/// How long a request is held when nobody lets it go: then it fails, so that nothing hangs for ever.
const HELD_MAX: Duration = Duration::from_secs(40);

/// How often it is looked whether somebody who waits is being killed.
const LOOK: Duration = Duration::from_millis(50);

/// What a reply says: a body, or an error number.
type Answer = Result<Vec<u8>, i32>;

/// A reply, and what it is known by.
pub type Reply = (u64, Answer);

/// The folder, what is arranged for it, and the requests that are not answered yet.
pub struct State {
    pub journal: Journal,
    pub rules: Rules,
    /// How much of what was written a sync of a file covers in a second, if that takes any time.
    pub sync_bytes_per_s: Option<u64>,
    /// What was written since the last sync of a file.
    unsynced_bytes: u64,
    /// In the order in which they came.
    waiting: Vec<Waiting>,
    /// The bytes that data may take.
    capacity: u64,
    /// Whether the kernel caches what it reads.
    is_cached: bool,
    /// How often each file is open.
    open: BTreeMap<FileId, u32>,
    /// The number given last.
    last_id: FileId,
    /// No more requests come.
    is_over: bool,
}

/// A request that is answered later.
struct Waiting {
    request: Request,
    op: Op,
    due: Instant,
    /// It waits until it is let go.
    is_held: bool,
    /// Also when its thread is being killed.
    is_stuck: bool,
    error: Option<i32>,
}

impl State {
    /// Of a disk with this content and this room for data, in bytes.
    pub fn new(folder: Folder, capacity: u64, is_cached: bool) -> Self {
        let (last_id, journal) = (folder.last_id(), Journal::new(folder));
        Self {
            journal,
            rules: Rules::default(),
            sync_bytes_per_s: None,
            unsynced_bytes: 0,
            waiting: Vec::new(),
            capacity,
            is_cached,
            open: BTreeMap::new(),
            last_id,
            is_over: false,
        }
    }

    /// No more requests come.
    pub fn end(&mut self) {
        self.is_over = true;
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Takes a request. Its reply, unless that comes later or never.
    pub fn take(&mut self, request: Request) -> Option<Reply> {
        let Some((op, range)) = kind_of(&request.call) else {
            let is_answered = !matches!(request.call, Call::Notice);
            return is_answered.then(|| (request.unique, self.answer(&request)));
        };
        let verdict = self.rules.judge(op, range.as_ref());
        let delay = verdict.delay.max(self.work_of(&request.call));
        if delay.is_zero() && !verdict.is_held {
            return Some((request.unique, self.carry_out(&request, verdict.error)));
        }
        let due = Instant::now() + if verdict.is_held { HELD_MAX } else { delay };
        let (is_held, is_stuck) = (verdict.is_held, verdict.is_stuck);
        self.waiting.push(Waiting { request, op, due, is_held, is_stuck, error: verdict.error });
        None
    }

    /// How long a sync takes for what was written before it.
    fn work_of(&mut self, call: &Call) -> Duration {
        match (call, self.sync_bytes_per_s) {
            (Call::Write { bytes, .. }, _) => self.unsynced_bytes += bytes.len() as u64,
            (Call::Fsync { .. }, Some(bytes_per_s)) => {
                let bytes = std::mem::take(&mut self.unsynced_bytes);
                return Duration::from_micros(bytes * 1_000_000 / bytes_per_s);
            }
            _ => {}
        }
        Duration::ZERO
    }

    /// How long nothing has to be done if nothing happens.
    pub fn idle_time(&self) -> Duration {
        let next = self.waiting.iter().map(|waiting| waiting.due.saturating_duration_since(Instant::now())).min();
        next.map_or(Duration::MAX, |time| time.min(LOOK))
    }

    /// The reply of a request whose thread is being killed: it does not wait for a disk. The kernel tells that it got a
    /// signal, but of the first one only, and that may have been another.
    pub fn pop_killed(&mut self) -> Option<Reply> {
        let is_killed = |waiting: &Waiting| !waiting.is_stuck && is_killed(waiting.request.thread);
        let killed = self.waiting.iter().position(is_killed)?;
        Some((self.waiting.remove(killed).request.unique, Err(libc::EINTR)))
    }

    /// The reply that has been due longest, if one is.
    pub fn pop_due(&mut self) -> Option<Reply> {
        let due = self.waiting.iter().map(|waiting| waiting.due).min().filter(|&due| due <= Instant::now())?;
        let next = self.waiting.iter().position(|waiting| waiting.due == due)?;
        let waiting = self.waiting.remove(next);
        let error = if waiting.is_held { Some(libc::EIO) } else { waiting.error };
        Some((waiting.request.unique, self.carry_out(&waiting.request, error)))
    }

    /// The threads that have made the requests of a kind that wait.
    pub fn threads(&self, op: Op) -> Vec<u32> {
        self.waiting.iter().filter(|waiting| waiting.op == op).map(|waiting| waiting.request.thread).collect()
    }

    /// How many requests of a kind wait.
    pub fn waiting(&self, op: Op) -> usize {
        self.waiting.iter().filter(|waiting| waiting.op == op).count()
    }

    /// Lets go what is held of a kind.
    pub fn release(&mut self, op: Op) {
        for waiting in self.waiting.iter_mut().filter(|waiting| waiting.op == op && waiting.is_held) {
            (waiting.is_held, waiting.due) = (false, Instant::now());
        }
    }

    /// Makes a file that was always there.
    pub fn furnish(&mut self, name: &str, size: u64, content: &[u8]) {
        assert_eq!(self.journal.folder().id(name), None, "{name} is there already");
        let file = self.unused_id();
        self.journal.furnish(&[
            Change::Create { name: name.to_owned(), file },
            Change::Resize { file, size },
            Change::Write { file, offset: 0, bytes: content.to_vec() },
        ]);
    }

    fn unused_id(&mut self) -> FileId {
        self.last_id += 1;
        self.last_id
    }

    fn carry_out(&mut self, request: &Request, error: Option<i32>) -> Answer {
        let Some(error) = error else {
            return self.answer(request);
        };
        if let Some(sync) = sync_of(request) {
            self.journal.sync(sync, false);
        }
        Err(error)
    }

    /// Does what a request asks for.
    fn answer(&mut self, request: &Request) -> Answer {
        let file = request.node;
        match &request.call {
            Call::Init { minor, readahead, flags } => return Ok(wire::welcome(*minor, *readahead, *flags)),
            Call::Lookup { name } => return Ok(wire::entry(&self.node(self.id(name)?)?).into()),
            Call::Stat => return Ok(wire::attributes(&self.node(file)?)),
            Call::SetAttributes { size } => {
                size.inspect(|&size| self.journal.change(Change::Resize { file, size }));
                return Ok(wire::attributes(&self.node(file)?));
            }
            Call::Open => {
                *self.open.entry(file).or_default() += 1;
                return Ok(wire::opened(self.is_cached));
            }
            Call::Create { name } => {
                let file = self.unused_id();
                self.journal.change(Change::Create { name: name.clone(), file });
                *self.open.entry(file).or_default() += 1;
                return Ok(wire::created(wire::entry(&self.node(file)?), self.is_cached));
            }
            Call::Release => {
                let left = self.open.get(&file).map_or(0, |open| open - 1);
                self.open.insert(file, left);
                self.forget_unused(file);
            }
            Call::Read { range } => return Ok(self.file(file)?.read(range.clone())),
            Call::Write { offset, bytes } => {
                self.expect_room(file, *offset..*offset + bytes.len() as u64)?;
                self.journal.change(Change::Write { file, offset: *offset, bytes: bytes.clone() });
                return Ok(wire::written(bytes.len()));
            }
            Call::Fallocate { range, fill, keep_size } => {
                let made = fill.ok_or(libc::EOPNOTSUPP)?;
                if made != Fill::Punch {
                    self.expect_room(file, range.clone())?;
                }
                self.journal.change(Change::Fill { file, range: range.clone(), fill: made, grow: !keep_size });
            }
            Call::Seek { offset, whence } => {
                let file = self.file(file)?;
                let found = if *whence == libc::SEEK_DATA { file.seek_data(*offset) } else { file.seek_hole(*offset) };
                return found.map(wire::offset);
            }
            Call::Fsync { .. } | Call::FsyncFolder => {
                if let Some(sync) = sync_of(request) {
                    self.journal.sync(sync, true);
                }
            }
            Call::Unlink { name } => {
                let file = self.id(name)?;
                self.journal.change(Change::Unlink { name: name.clone(), file });
                self.forget_unused(file);
            }
            Call::Rename { from, to, flags } => {
                let (file, replaced) = (self.id(from)?, self.id(to).ok());
                match *flags {
                    0 => {}
                    libc::RENAME_NOREPLACE if replaced.is_some() => return Err(libc::EEXIST),
                    libc::RENAME_NOREPLACE => {}
                    _ => return Err(libc::EINVAL),
                }
                self.journal.change(Change::Rename { from: from.clone(), to: to.clone(), file });
                replaced.inspect(|&file| self.forget_unused(file));
            }
            Call::StatFs => {
                let used = self.journal.folder().allocated();
                return Ok(wire::statfs(self.capacity, self.capacity.saturating_sub(used)));
            }
            Call::SetXattr { key, value, flags } => {
                let is_there = self.file(file)?.xattrs.contains_key(key);
                match *flags {
                    libc::XATTR_CREATE if is_there => return Err(libc::EEXIST),
                    libc::XATTR_REPLACE if !is_there => return Err(libc::ENODATA),
                    _ => self.journal.change(Change::SetXattr { file, key: key.clone(), value: value.clone() }),
                }
            }
            Call::GetXattr { key, room } => {
                return wire::xattr(self.file(file)?.xattrs.get(key).ok_or(libc::ENODATA)?, *room);
            }
            Call::ListXattr { room } => {
                let keys: String = self.file(file)?.xattrs.keys().flat_map(|key| [key, "\0"]).collect();
                return wire::xattr(keys.as_bytes(), *room);
            }
            Call::RemoveXattr { key } => {
                self.file(file)?.xattrs.get(key).ok_or(libc::ENODATA)?;
                self.journal.change(Change::RemoveXattr { file, key: key.clone() });
            }
            Call::OpenFolder => return Ok(wire::opened(false)),
            Call::List { behind, room } => {
                let mut files: Vec<_> = self.journal.folder().names().filter(|&(_, file)| file > *behind).collect();
                files.sort_by_key(|&(_, file)| file);
                return Ok(wire::list(&files, *room));
            }
            Call::ReleaseFolder => {}
            Call::Notice | Call::Unknown => return Err(libc::ENOSYS),
        }
        Ok(Vec::new())
    }

    fn id(&self, name: &str) -> Result<FileId, i32> {
        self.journal.folder().id(name).ok_or(libc::ENOENT)
    }

    fn file(&self, file: FileId) -> Result<&File, i32> {
        // The folder has neither content nor attributes.
        self.journal.folder().file(file).ok_or(if file == FOLDER { libc::EOPNOTSUPP } else { libc::ESTALE })
    }

    fn node(&self, id: FileId) -> Result<Node, i32> {
        if id == FOLDER {
            return Ok(Node { id, is_folder: true, size: 0, allocated: 0 });
        }
        let file = self.file(id)?;
        Ok(Node { id, is_folder: false, size: file.size, allocated: file.allocated() })
    }

    fn expect_room(&self, file: FileId, range: Range<u64>) -> Result<(), i32> {
        let needed = self.journal.folder().allocated() + self.file(file)?.missing(range);
        if needed > self.capacity {
            Err(libc::ENOSPC)
        } else {
            Ok(())
        }
    }

    fn forget_unused(&mut self, file: FileId) {
        if self.open.get(&file).is_none_or(|&open| open == 0) {
            self.open.remove(&file);
            self.journal.forget(file);
        }
    }
}

/// What a request counts as, and the range that it is about.
fn kind_of(call: &Call) -> Option<(Op, Option<Range<u64>>)> {
    Some(match call {
        Call::Read { range } => (Op::Read, Some(range.clone())),
        Call::Write { offset, bytes } => (Op::Write, Some(*offset..*offset + bytes.len() as u64)),
        Call::Fallocate { range, .. } => (Op::Fallocate, Some(range.clone())),
        Call::Seek { offset, .. } => (Op::Seek, Some(*offset..*offset + 1)),
        Call::Fsync { data_only: true } => (Op::Fsync, None),
        Call::Fsync { data_only: false } => (Op::FsyncAll, None),
        Call::FsyncFolder => (Op::FsyncFolder, None),
        Call::SetAttributes { size: Some(_) } => (Op::Resize, None),
        Call::Stat => (Op::Stat, None),
        Call::Open | Call::Create { .. } => (Op::Open, None),
        Call::Unlink { .. } => (Op::Unlink, None),
        Call::Rename { .. } => (Op::Rename, None),
        Call::SetXattr { .. } | Call::GetXattr { .. } | Call::ListXattr { .. } | Call::RemoveXattr { .. } => {
            (Op::Xattr, None)
        }
        _ => return None,
    })
}

/// What a request makes durable.
fn sync_of(request: &Request) -> Option<Sync> {
    match request.call {
        Call::Fsync { data_only: true } => Some(Sync::Data(request.node)),
        Call::Fsync { data_only: false } => Some(Sync::File(request.node)),
        Call::FsyncFolder => Some(Sync::Names),
        _ => None,
    }
}

/// Whether SIGKILL is on its way to a thread.
fn is_killed(thread: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    pending.is_some_and(|bits| u64::from_str_radix(bits.trim(), 16).unwrap() >> (libc::SIGKILL - 1) & 1 == 1)
}
