//! PURE: the export of the oracles: what it holds, and what may come of a request.

use super::drive::{Disk, Worked};
use flexnbd::buffer::SLICE;
use flexnbd::proto::error::Errno;
use flexnbd::proto::export::{Export, Style};
use flexnbd::proto::server::request::refuse;
use flexnbd::proto::wire::RequestHead;
use flexnbd::work::{Action, Extent};

/// Its size, in bytes: several slices, the last of them short.
pub(super) const SIZE: u64 = 2 * SLICE as u64 + 512;
/// The pools of the sessions, in bytes: from one of reserve buffers alone to one that never binds.
pub(super) const POOLS: [usize; 4] = [0, 12 << 10, SLICE, 16 << 20];
/// The most payload one conversation asks for, in bytes, so that no input takes seconds.
pub(super) const PAYLOAD_MAX: u64 = 1 << 20;
/// The unit of its holes, in bytes.
const HOLE: u64 = 4096;

/// Fails unless the request may be answered like that: what must be refused is, what must not is at most unlucky.
pub(super) fn check_error(head: &RequestHead, error: u32, style: Style) {
    match refuse(head, Export { size: SIZE, read_only: false, flushes: true, several: true }, style) {
        Some(refusal) => assert_eq!(error, refusal.errno.to_wire(), "{head}"),
        None => assert!(error == 0 || error == Errno::Io.to_wire(), "{head}: {error}"),
    }
}

/// Fails unless the export holds these bytes at `offset`.
pub(super) fn check_data(bytes: &[u8], offset: u64) {
    assert!(bytes.iter().zip(offset..).all(|(&byte, at)| byte == content(at)), "other data");
}

/// The byte of the export at `offset`.
pub(super) fn content(offset: u64) -> u8 {
    if is_hole(offset) {
        0
    } else {
        (offset ^ (offset >> 8)).to_le_bytes()[0] | 1
    }
}

/// Every third block of the first slice is a hole, and all that is behind it.
fn is_hole(offset: u64) -> bool {
    offset >= SLICE as u64 || (offset / HOLE) % 3 == 1
}

/// The extents of a range.
fn extents(mut offset: u64, length: u64) -> Vec<Extent> {
    let end = offset + length;
    let mut found = Vec::new();
    while offset < end {
        let block = offset / HOLE;
        // Blocks 1, 4, 7, ... are holes, the two between are one piece of data.
        let border = match is_hole(offset) {
            true if offset >= SLICE as u64 => end,
            true => (block + 1) * HOLE,
            false => ((block + 1) / 3 * 3 + 1) * HOLE,
        };
        let next = border.min(end);
        found.push(Extent { range: offset..next, is_hole: is_hole(offset) });
        offset = next;
    }
    found
}

/// The disk behind it, which holds the same whatever is written.
pub(super) struct Pattern;

impl Disk for Pattern {
    fn work(&mut self, _: &RequestHead, action: Action) -> Worked {
        let mut worked = Worked { buffer: None, extents: Vec::new(), result: Ok(()) };
        match action {
            Action::Read { offset, length, skip_hole, mut buffer } => {
                let first = extents(offset, length as u64).into_iter().next();
                let hole = first.filter(|extent| skip_hole && extent.is_hole);
                let skipped = hole.as_ref().map_or(0, Extent::length);
                let bytes: Vec<u8> = (offset + skipped..offset + length as u64).map(content).collect();
                buffer.append(&bytes);
                worked.extents.extend(hole);
                worked.buffer = Some(buffer);
            }
            Action::Write { payload, .. } => worked.buffer = Some(payload),
            Action::Map { offset, length, most } => {
                worked.extents = extents(offset, length);
                worked.extents.truncate(most);
            }
            Action::Zero { .. }
            | Action::Trim { .. }
            | Action::Cache { .. }
            | Action::Verify { .. }
            | Action::Flush => {}
        }
        worked
    }
}
