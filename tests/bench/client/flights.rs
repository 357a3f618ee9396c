//! The requests of a connection that are in flight, each in a slot that is found again by the cookie.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::time::Instant;

use super::replies::protocol_error;
use super::report::Report;
use super::walk;
use super::work::Request;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const HEAD_BYTES: usize = 28;
const FLAG_FUA: u16 = 1;
/// Zeroes take room: what is dearest for a server.
const FLAG_NO_HOLE: u16 = 2;
/// The low bits of a cookie are the slot, the others count.
const SLOT_BITS: u32 = 16;
/// What one call sends: parts, of which a write has two.
const PARTS_MAX: usize = 64;

/// What a request does; its number in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read = 0,
    Write = 1,
    Flush = 3,
    Trim = 4,
    Cache = 5,
    Zeroes = 6,
    Status = 7,
}

/// The last request of a connection, which has no reply.
pub fn disconnect() -> [u8; HEAD_BYTES] {
    encode(2, 0, 0, 0, 0)
}

struct Slot {
    /// None when free.
    cookie: Option<u64>,
    kind: Kind,
    at: u64,
    length: u32,
    /// Bytes of data that came, or holes.
    came: u32,
    failed: bool,
    since: Instant,
    head: [u8; HEAD_BYTES],
    /// What a write carries when it depends on the place.
    checked: Vec<u8>,
}

/// The requests in flight.
pub struct Flights {
    slots: Vec<Slot>,
    free: Vec<usize>,
    count: u64,
    /// Slots that are not sent yet, oldest first, and how much of the first is.
    unsent: VecDeque<usize>,
    sent: usize,
    /// What all writes carry otherwise: no zeroes, which a server might take for a hole.
    payload: Vec<u8>,
    /// Slots that were answered since the last look.
    answered: Vec<usize>,
    /// Bytes that are not what was written, since the last look.
    mismatches: u64,
    is_checked: bool,
}

impl Flights {
    /// For writes of up to `longest` bytes.
    pub fn new(depth: usize, longest: u32, is_checked: bool, seed: u64) -> io::Result<Self> {
        if depth >= 1 << SLOT_BITS {
            return Err(io::Error::other("the depth is too large"));
        }
        let mut payload = vec![0; longest as usize];
        walk::fill(&mut payload, walk::mix(seed) & !7 & (u64::MAX >> 1));
        let slot = |_| Slot {
            cookie: None,
            kind: Kind::Flush,
            at: 0,
            length: 0,
            came: 0,
            failed: false,
            since: Instant::now(),
            head: [0; HEAD_BYTES],
            checked: if is_checked { payload.clone() } else { Vec::new() },
        };
        Ok(Self {
            slots: (0..depth).map(slot).collect(),
            free: (0..depth).collect(),
            count: 0,
            unsent: VecDeque::with_capacity(depth),
            sent: 0,
            answered: Vec::with_capacity(depth),
            mismatches: 0,
            is_checked,
            payload,
        })
    }

    pub fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Takes a request, to be sent next. There must be room.
    pub fn add(&mut self, request: &Request, now: Instant) {
        let Some(index) = self.free.pop() else { return };
        let cookie = self.count << SLOT_BITS | index as u64;
        self.count += 1;
        let slot = &mut self.slots[index];
        slot.cookie = Some(cookie);
        (slot.kind, slot.at, slot.length) = (request.kind, request.at, request.length);
        (slot.came, slot.failed, slot.since) = (0, false, now);
        let flags = match request.kind {
            Kind::Zeroes => FLAG_NO_HOLE,
            _ if request.fua => FLAG_FUA,
            _ => 0,
        };
        slot.head = encode(request.kind as u16, flags, cookie, request.at, request.length);
        if self.is_checked && request.kind == Kind::Write {
            walk::fill(&mut slot.checked, request.at);
        }
        self.unsent.push_back(index);
    }

    pub fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Gives `send` what is unsent, as much as one call takes, and forgets what it says it has sent.
    pub fn send(&mut self, send: impl FnOnce(&[IoSlice]) -> io::Result<usize>) -> io::Result<usize> {
        let mut parts = [IoSlice::new(&[]); PARTS_MAX];
        let mut used = 0;
        for &index in self.unsent.iter().take(PARTS_MAX / 2) {
            let slot = &self.slots[index];
            parts[used] = IoSlice::new(&slot.head);
            parts[used + 1] = IoSlice::new(self.payload_of(slot));
            used += 2;
        }
        let mut window = &mut parts[..used];
        IoSlice::advance_slices(&mut window, self.sent);
        let moved = send(window)?;
        self.sent += moved;
        while let Some(&index) = self.unsent.front() {
            let slot = &self.slots[index];
            let length = HEAD_BYTES + self.payload_of(slot).len();
            if self.sent < length {
                break;
            }
            self.sent -= length;
            self.unsent.pop_front();
        }
        Ok(moved)
    }

    fn payload_of<'a>(&'a self, slot: &'a Slot) -> &'a [u8] {
        match slot.kind {
            Kind::Write if self.is_checked => &slot.checked,
            Kind::Write => &self.payload,
            _ => &[],
        }
    }

    fn find(&mut self, cookie: u64) -> io::Result<&mut Slot> {
        let index = (cookie & ((1 << SLOT_BITS) - 1)) as usize;
        self.slots
            .get_mut(index)
            .filter(|slot| slot.cookie == Some(cookie))
            .ok_or_else(|| protocol_error("a reply to nothing"))
    }

    /// How much data comes behind a simple reply without an error.
    pub fn data_of(&mut self, cookie: u64) -> io::Result<u32> {
        let slot = self.find(cookie)?;
        Ok(if slot.kind == Kind::Read { slot.length } else { 0 })
    }

    /// A piece of a read comes, or a hole, which is not in the request's order.
    pub fn piece(&mut self, cookie: u64, at: u64, length: u32, is_hole: bool) -> io::Result<()> {
        let slot = self.find(cookie)?;
        let end = at.checked_add(length.into()).filter(|&end| end <= slot.at + u64::from(slot.length));
        if slot.kind != Kind::Read || at < slot.at || end.is_none() {
            return Err(protocol_error("data that was not asked for"));
        }
        slot.came = slot.came.saturating_add(length);
        if is_hole && self.is_checked {
            self.mismatches += u64::from(length);
        }
        Ok(())
    }

    /// Where a simple reply's data belongs.
    pub fn place_of(&mut self, cookie: u64) -> io::Result<u64> {
        self.find(cookie).map(|slot| slot.at)
    }

    /// Data has come.
    pub fn data(&mut self, at: u64, bytes: &[u8]) {
        if self.is_checked {
            self.mismatches += walk::differing(bytes, at);
        }
    }

    /// Extents come, which nobody looks at.
    pub fn extents(&mut self, cookie: u64) -> io::Result<()> {
        if self.find(cookie)?.kind != Kind::Status {
            return Err(protocol_error("extents that were not asked for"));
        }
        Ok(())
    }

    /// The request has failed.
    pub fn fail(&mut self, cookie: u64) -> io::Result<()> {
        self.find(cookie)?.failed = true;
        Ok(())
    }

    /// Nothing more comes for a request.
    pub fn finish(&mut self, cookie: u64) -> io::Result<()> {
        let slot = self.find(cookie)?;
        if slot.kind == Kind::Read && !slot.failed && slot.came != slot.length {
            return Err(protocol_error("less data than was asked for, or more"));
        }
        slot.cookie = None;
        self.answered.push((cookie & ((1 << SLOT_BITS) - 1)) as usize);
        Ok(())
    }

    /// Counts what was answered, and frees its slots.
    pub fn count(&mut self, report: &mut Report, now: Instant) {
        if self.answered.is_empty() {
            return;
        }
        report.last = now;
        report.mismatches += std::mem::take(&mut self.mismatches);
        for index in self.answered.drain(..) {
            let slot = &self.slots[index];
            let took = now - slot.since;
            report.errors += u64::from(slot.failed);
            match slot.kind {
                Kind::Read => report.reads += 1,
                Kind::Write => report.writes += 1,
                Kind::Flush => report.count_flush(took),
                Kind::Trim | Kind::Cache | Kind::Zeroes | Kind::Status => report.commands += 1,
            }
            if slot.kind != Kind::Flush {
                report.count_transfer(took);
                report.bytes += if slot.failed { 0 } else { u64::from(slot.length) };
            }
            self.free.push(index);
        }
    }
}

fn encode(kind: u16, flags: u16, cookie: u64, at: u64, length: u32) -> [u8; HEAD_BYTES] {
    let mut head = [0; HEAD_BYTES];
    head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    head[4..6].copy_from_slice(&flags.to_be_bytes());
    head[6..8].copy_from_slice(&kind.to_be_bytes());
    head[8..16].copy_from_slice(&cookie.to_be_bytes());
    head[16..24].copy_from_slice(&at.to_be_bytes());
    head[24..].copy_from_slice(&length.to_be_bytes());
    head
}
