//! One operation, and the commands that it takes.

use super::command::{Abilities, What};
use super::dirty::{DATA_MAX, ENTRY};
use crate::buffer::Buffer;
use crate::work::{Action, Done, Extent, Op};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::rc::Rc;

/// The longest WRITE of zeroes, in bytes, where the server knows no other way.
pub(super) const ZEROES_MAX: u32 = 256 << 10;

/// What a task does next.
pub(super) enum Next {
    /// This command.
    Ask { what: What, fua: bool, offset: u64, length: u32, payload: Option<Rc<Buffer>> },
    /// Nothing: it has ended.
    Finish(io::Result<()>),
}

/// What the operation is; the range is the task's.
#[derive(Debug)]
enum Kind {
    Read { buffer: Buffer, skip_hole: bool, leading_hole: u64 },
    Write { payload: Rc<Buffer> },
    Zero { no_hole: bool, fast: bool },
    Trim,
    Flush,
    Cache,
    Verify,
    Map { most: usize, extents: Vec<Extent> },
}

/// One operation on its way.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "what was asked for, and what has become of it so far")]
pub(super) struct Task {
    pub(super) owner: u64,
    tag: u32,
    kind: Kind,
    range: Range<u64>,
    /// It is done only when it is durable.
    durable: bool,
    /// Earlier parts of the same request went before it, and have to be durable, too.
    follows: bool,
    /// So much of the range is answered, from its beginning on.
    done_bytes: u64,
    /// What was asked last: with FUA or not, and how much of the range that was.
    asked: (What, bool, u32),
    /// All that it has changed is durable.
    is_durable: bool,
    /// A command was sent in this session.
    pub(super) is_begun: bool,
    /// Whoever asked is gone.
    pub(super) is_orphan: bool,
    /// Which answers came before its last command.
    pub(super) mark: u64,
}

impl Task {
    /// Takes an operation.
    pub(super) fn new(op: Op) -> Self {
        let durable = op.action.wants_sync();
        let follows = matches!(op.action, Action::Write { follows: true, .. });
        let (kind, offset, length) = match op.action {
            Action::Read { offset, length, skip_hole, buffer } => {
                (Kind::Read { buffer, skip_hole, leading_hole: 0 }, offset, length as u64)
            }
            Action::Write { offset, payload, .. } => {
                let length = payload.len() as u64;
                (Kind::Write { payload: Rc::new(payload) }, offset, length)
            }
            Action::Zero { offset, length, no_hole, fast, .. } => (Kind::Zero { no_hole, fast }, offset, length),
            Action::Trim { offset, length, .. } => (Kind::Trim, offset, length),
            Action::Flush => (Kind::Flush, 0, 0),
            Action::Cache { offset, length } => (Kind::Cache, offset, length),
            Action::Verify { offset, length } => (Kind::Verify, offset, length),
            Action::Map { offset, length, most } => (Kind::Map { most, extents: Vec::new() }, offset, length),
        };
        Self {
            owner: op.owner,
            tag: op.tag,
            kind,
            range: offset..offset.saturating_add(length),
            durable,
            follows,
            done_bytes: 0,
            asked: (What::Flush, false, 0),
            is_durable: false,
            is_begun: false,
            is_orphan: false,
            mark: 0,
        }
    }

    /// What it does next with a server that can do this.
    pub(super) fn next(&self, can: &Abilities) -> Next {
        let left = (self.range.end - self.range.start).saturating_sub(self.done_bytes);
        let what = match &self.kind {
            Kind::Flush if self.is_durable => return Next::Finish(Ok(())),
            Kind::Flush => return flush(can),
            // To read it twice would cost more than a reply that ends half-way when the second time fails.
            Kind::Verify => return Next::Finish(Ok(())),
            // What the server does not have costs nothing to leave out.
            Kind::Cache if !can.cache => return Next::Finish(Ok(())),
            Kind::Trim if !can.trim => return Next::Finish(Ok(())),
            Kind::Map { .. } if !can.map => return Next::Finish(Ok(())),
            Kind::Zero { fast: true, .. } if !can.fast_zero || !can.zero => {
                return Next::Finish(Err(unsupported("the server has no fast way to write zeroes")));
            }
            _ if left == 0 => {
                return if self.durable && !self.is_durable { flush(can) } else { Next::Finish(Ok(())) };
            }
            Kind::Read { .. } => What::Read,
            &Kind::Zero { no_hole, fast } if can.zero => What::Zero { no_hole, fast },
            Kind::Write { .. } | Kind::Zero { .. } => What::Write,
            Kind::Trim => What::Trim,
            Kind::Cache => What::Cache,
            Kind::Map { most, .. } => What::Map { one: *most == 1 },
        };
        let payload = match &self.kind {
            Kind::Write { payload } => Some(Rc::clone(payload)),
            Kind::Zero { .. } if what == What::Write => {
                Some(zeroes(u32::try_from(left).unwrap_or(u32::MAX).min(ZEROES_MAX)))
            }
            _ => None,
        };
        let most = payload.as_ref().map_or(u64::from(can.length_max), |bytes| bytes.len() as u64);
        let length = left.min(most);
        // One command that is all of it can be durable by itself.
        let fua = self.durable && can.fua && !self.follows && length == self.range.end - self.range.start;
        let offset = self.range.start + self.done_bytes;
        Next::Ask { what, fua, offset, length: u32::try_from(length).unwrap_or(u32::MAX), payload }
    }

    /// This command has been sent for it, after `mark` answers.
    pub(super) fn sent(&mut self, what: What, fua: bool, length: u32, mark: u64) {
        self.is_begun = true;
        self.asked = (what, fua, length);
        self.mark = mark;
    }

    /// The last command was answered without an error; says what it was.
    pub(super) fn answered(&mut self) -> What {
        let (what, fua, length) = self.asked;
        match what {
            What::Flush => self.is_durable = true,
            // A server may say less than it was asked.
            What::Map { .. } => self.done_bytes = self.length(),
            _ => {
                self.done_bytes = self.done_bytes.saturating_add(u64::from(length));
                self.is_durable |= fua;
            }
        }
        what
    }

    /// True when nothing has to be asked any more.
    pub(super) fn is_complete(&self) -> bool {
        self.done_bytes >= self.length() && (self.is_durable || !self.durable)
    }

    /// True when its next command is a FLUSH that makes earlier parts of the same request durable as well.
    pub(super) fn flushes_for_others(&self) -> bool {
        self.follows && self.durable && self.done_bytes >= self.length()
    }

    /// True when both are parts of one request.
    pub(super) fn is_of_same_request(&self, other: &Self) -> bool {
        (self.owner, self.tag) == (other.owner, other.tag)
    }

    /// The connection is gone: all of it has to be asked again.
    pub(super) fn restart(&mut self) {
        self.is_begun = false;
        self.done_bytes = 0;
        self.is_durable = false;
        match &mut self.kind {
            Kind::Read { leading_hole, .. } => *leading_hole = 0,
            Kind::Map { extents, .. } => extents.clear(),
            _ => {}
        }
    }

    /// False when the server cannot have read yet what it answers.
    pub(super) fn may_be_answered(&self) -> bool {
        match &self.kind {
            Kind::Write { payload } => Rc::strong_count(payload) == 1,
            _ => true,
        }
    }

    /// The bytes of the export that it changes.
    pub(super) fn changes(&self) -> Option<Range<u64>> {
        matches!(self.kind, Kind::Write { .. } | Kind::Zero { .. } | Kind::Trim).then(|| self.range.clone())
    }

    /// The bytes of the export that it reads.
    pub(super) fn reads(&self) -> Option<Range<u64>> {
        matches!(self.kind, Kind::Read { .. }).then(|| self.range.clone())
    }

    /// What keeping its effect may cost, in bytes of memory. Where it cuts another extent in two, there is one more.
    pub(super) fn cost(&self) -> usize {
        match &self.kind {
            Kind::Write { payload } => payload.len() + 2 * ENTRY * (1 + payload.len() / DATA_MAX),
            Kind::Zero { .. } => 2 * ENTRY,
            Kind::Trim => ENTRY,
            _ => 0,
        }
    }

    /// The bytes that are dirty after it.
    pub(super) fn leaves(&self) -> Option<&[u8]> {
        match &self.kind {
            Kind::Write { payload } if !self.is_durable => Some(payload.filled()),
            _ => None,
        }
    }

    /// True when its range is dirty after it, and zero.
    pub(super) fn leaves_zeroes(&self) -> bool {
        matches!(self.kind, Kind::Zero { .. }) && !self.is_durable
    }

    /// Takes bytes of a READ.
    pub(super) fn data(&mut self, offset: u64, bytes: &[u8]) {
        if let Some(to) = self.place(offset, bytes.len() as u64) {
            to.copy_from_slice(bytes);
        }
    }

    /// Takes a hole of a READ.
    pub(super) fn hole(&mut self, range: &Range<u64>) {
        let start = self.range.start;
        match &mut self.kind {
            Kind::Read { skip_hole: true, leading_hole, .. } if range.start == start => {
                *leading_hole = range.end.saturating_sub(range.start);
            }
            _ => {
                if let Some(to) = self.place(range.start, range.end.saturating_sub(range.start)) {
                    to.fill(0);
                }
            }
        }
    }

    /// The memory of a READ for this part of the export.
    fn place(&mut self, offset: u64, length: u64) -> Option<&mut [u8]> {
        let start = usize::try_from(offset.checked_sub(self.range.start)?).ok()?;
        let end = start.checked_add(usize::try_from(length).ok()?)?;
        match &mut self.kind {
            Kind::Read { buffer, .. } => buffer.spare().get_mut(start..end),
            _ => None,
        }
    }

    /// Takes the next extent of a `BLOCK_STATUS`.
    pub(super) fn extent(&mut self, length: u64, is_hole: bool) {
        let range = self.range.clone();
        if let Kind::Map { most, extents } = &mut self.kind {
            let start = extents.last().map_or(range.start, |last| last.range.end);
            let end = start.saturating_add(length).min(range.end);
            if extents.len() < *most && start < end {
                extents.push(Extent { range: start..end, is_hole });
            }
        }
    }

    fn length(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// What it became.
    pub(super) fn into_done(self, result: io::Result<()>) -> Done {
        let touched = self.changes();
        let length = usize::try_from(self.length()).unwrap_or(usize::MAX);
        let (buffer, extents) = match self.kind {
            Kind::Read { mut buffer, leading_hole, .. } => {
                let mut extents = Vec::new();
                if result.is_ok() {
                    buffer.advance(length);
                    if leading_hole > 0 {
                        buffer.consume(usize::try_from(leading_hole).unwrap_or(usize::MAX));
                        let start = self.range.start;
                        extents.push(Extent { range: start..start.saturating_add(leading_hole), is_hole: true });
                    }
                }
                (Some(buffer), extents)
            }
            Kind::Write { payload } => (Rc::into_inner(payload), Vec::new()),
            Kind::Map { extents, .. } if result.is_ok() && extents.is_empty() => {
                (None, vec![Extent { range: self.range, is_hole: false }])
            }
            Kind::Map { extents, .. } => (None, extents),
            _ => (None, Vec::new()),
        };
        Done { owner: self.owner, tag: self.tag, buffer, touched, extents, result }
    }
}

fn flush(can: &Abilities) -> Next {
    if !can.flush {
        return Next::Finish(Err(unsupported("the server offers no FLUSH")));
    }
    Next::Ask { what: What::Flush, fua: false, offset: 0, length: 0, payload: None }
}

/// So many zeroes.
pub(super) fn zeroes(length: u32) -> Rc<Buffer> {
    let length = length as usize;
    let mut buffer = Buffer::with_capacity(length);
    buffer.advance(length);
    Rc::new(buffer)
}

/// True when both have a byte in common.
pub(super) fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

fn unsupported(why: &'static str) -> io::Error {
    io::Error::new(ErrorKind::Unsupported, why)
}
