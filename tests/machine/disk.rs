//! The disk of the conversations: bytes in memory, with faults where the plan wants them.

use crate::oracles::drive::{Disk, Worked};
use flexnbd::proto::error::Errno;
use flexnbd::proto::server::{Completed, Failed};
use flexnbd::proto::wire::{command, kind, RequestHead};
use flexnbd::work::{Action, Extent};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::Range;

/// A block of this many bytes is a hole when it holds zeroes, and no write is cut up inside one.
pub const BLOCK: usize = 4096;

/// A fault: the piece of the request that holds the byte `at` fails, and no piece of it has an effect.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// Which byte of the request's range.
    pub at: u32,
    /// How it fails.
    pub errno: Errno,
}

/// A request that must come, and what becomes of it.
#[derive(Debug)]
struct Due {
    head: RequestHead,
    fault: Option<Fault>,
    /// Whether its last piece was to be on stable storage when done.
    synced: bool,
}

/// A disk that knows what it will be asked for.
#[derive(Debug)]
pub struct Faulty {
    pub bytes: Vec<u8>,
    /// By cookie.
    due: BTreeMap<u64, Due>,
}

impl Faulty {
    /// A disk that holds `bytes`, for these requests.
    pub fn new(bytes: Vec<u8>, requests: impl IntoIterator<Item = (RequestHead, Option<Fault>)>) -> Self {
        let due = |(head, fault): (RequestHead, _)| (head.cookie, Due { head, fault, synced: false });
        Self { bytes, due: requests.into_iter().map(due).collect() }
    }

    /// Fails unless a change that was answered well is on stable storage if its client wanted that, and only then.
    pub fn check_synced(&self, cookie: u64) {
        let Due { head, synced, .. } = &self.due[&cookie];
        let changes = matches!(head.kind, kind::WRITE | kind::TRIM | kind::WRITE_ZEROES) && head.length > 0;
        assert!(!changes || *synced == (head.flags & command::FUA != 0), "{head}");
    }
}

/// What `bytes` say of a range: a hole, or data, in pieces as long as can be.
pub fn extents(bytes: &[u8], range: Range<usize>) -> Vec<Extent> {
    let mut found: Vec<Extent> = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let start = at - at % BLOCK;
        let next = (start + BLOCK).min(range.end);
        let is_hole = bytes[start..(start + BLOCK).min(bytes.len())].iter().all(|&byte| byte == 0);
        match found.last_mut() {
            Some(before) if before.is_hole == is_hole => before.range.end = next as u64,
            _ => found.push(Extent { range: at as u64..next as u64, is_hole }),
        }
        at = next;
    }
    found
}

/// What a disk says when its client shall be told this.
fn error(errno: Errno) -> ErrorKind {
    match errno {
        Errno::NoSpc => ErrorKind::StorageFull,
        Errno::Perm => ErrorKind::PermissionDenied,
        Errno::NoMem => ErrorKind::OutOfMemory,
        _ => ErrorKind::Other,
    }
}

impl Disk for Faulty {
    fn work(&mut self, head: &RequestHead, action: Action) -> Worked {
        let Due { head: due, fault, synced } = self.due.get_mut(&head.cookie).expect("a request that was made");
        assert_eq!(head, due);
        let place = |offset: u64, length: u64| usize::try_from(offset).unwrap()..(offset + length) as usize;
        let fails = |place: &Range<usize>| {
            fault.filter(|fault| place.contains(&(head.offset as usize + fault.at as usize))).map(|fault| fault.errno)
        };
        let mut worked = Worked { buffer: None, extents: Vec::new(), result: Ok(()) };
        if matches!(action, Action::Write { .. } | Action::Zero { .. } | Action::Trim { .. }) {
            *synced = action.wants_sync();
        }
        let failed = match action {
            Action::Read { offset, length, skip_hole, mut buffer } => {
                let mut place = place(offset, length as u64);
                let failed = fails(&place);
                if skip_hole {
                    let first = extents(&self.bytes, place.clone()).into_iter().next();
                    worked.extents.extend(first.filter(|first| first.is_hole));
                    place.start = worked.extents.first().map_or(place.start, |hole| hole.range.end as usize);
                }
                if failed.is_none() {
                    buffer.append(&self.bytes[place]);
                }
                worked.buffer = Some(buffer);
                failed
            }
            Action::Write { offset, payload, fua, follows } => {
                assert_eq!(follows, offset != head.offset, "all pieces but the first");
                let place = place(offset, payload.len() as u64);
                let is_last = Some(place.end as u64) == head.end();
                assert!(is_last || place.end % BLOCK == 0 && !fua, "blocks stay whole, and the last piece syncs");
                let failed = fails(&place);
                if fault.is_none() {
                    self.bytes[place].copy_from_slice(payload.filled());
                }
                worked.buffer = Some(payload);
                failed
            }
            Action::Zero { offset, length, .. } | Action::Trim { offset, length, .. } => {
                let place = place(offset, length);
                let failed = fails(&place);
                if fault.is_none() {
                    self.bytes[place].fill(0);
                }
                failed
            }
            Action::Map { offset, length, most } => {
                let place = place(offset, length);
                worked.extents = extents(&self.bytes, place.clone());
                worked.extents.truncate(most);
                fails(&place)
            }
            Action::Cache { offset, length } | Action::Verify { offset, length } => fails(&place(offset, length)),
            Action::Flush => fault.map(|fault| fault.errno),
        };
        worked.result = failed.map_or(Ok(()), |errno| Err(error(errno).into()));
        worked
    }

    fn reported(&mut self, completed: &Completed) {
        if let Err(Failed { errno, .. }) = completed.result {
            let fault = self.due.get(&completed.head.cookie).and_then(|due| due.fault);
            assert_eq!(Some(errno), fault.map(|fault| fault.errno));
        }
    }
}
