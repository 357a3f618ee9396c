//! PURE: which blocks are still to be sent, pass by pass. A block is clean, dirty, or taken to be sent; what was sent
//! is in flight until it is answered. Invariants are numbered as in the docs of `migrate`.

use crate::bitmap::Bitmap;
use std::ops::Range;

/// What is clean or dirty as a whole, in bytes. The bitmap takes 2 MiB per TiB.
pub(super) const BLOCK: u64 = 64 << 10;
/// The most that is taken at once, in bytes, and so the longest range zeroed by one request. A destination that has to
/// write the zeroes must answer in time.
const TAKEN_MAX: u64 = 128 << 20;
/// The most requests in flight: 32 MiB of data, which is 300 MB/s over 100 ms of round trip.
pub const IN_FLIGHT_MAX: usize = 128;

/// A request in flight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) range: Range<u64>,
    /// False for zeroes that are sent without their bytes.
    pub(super) is_data: bool,
}

impl Sent {
    pub(super) fn bytes(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }
}

/// What came of [`Pass::take`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// There is nothing that could be sent before an answer comes.
    Nothing,
    /// More of the pass.
    More,
    /// The first blocks of another pass.
    NewPass,
}

/// The blocks of the image in the current pass.
#[derive(Debug)]
pub(super) struct Pass {
    size: u64,
    /// Passes begun, this one included.
    number: u32,
    /// Bytes that were dirty when this one began.
    began_with: u64,
    /// It began with hardly fewer dirty bytes than the pass before, so another pass would gain nothing.
    is_settled: bool,
    dirty: Bitmap,
    /// Where it is.
    cursor: u64,
    /// What was taken from the bitmap and not sent yet.
    taken: Range<u64>,
    in_flight: Vec<Sent>,
}

impl Pass {
    /// The first pass over an image of `size` bytes, all of it dirty.
    pub(super) fn new(size: u64) -> Self {
        let mut dirty = Bitmap::new(size, BLOCK);
        dirty.set_range(0, size);
        Self {
            size,
            number: 1,
            began_with: size,
            is_settled: false,
            dirty,
            cursor: 0,
            taken: 0..0,
            in_flight: Vec::with_capacity(IN_FLIGHT_MAX),
        }
    }

    /// The first pass of another attempt, in the memory of this one: there may be no other.
    pub(super) fn again(self) -> Self {
        let Self { size, mut dirty, mut in_flight, .. } = self;
        dirty.set_range(0, size);
        in_flight.clear();
        Self { size, number: 1, began_with: size, is_settled: false, dirty, cursor: 0, taken: 0..0, in_flight }
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// True when another pass would gain nothing.
    pub(super) fn is_settled(&self) -> bool {
        self.is_settled
    }

    pub(super) fn dirty_bytes(&self) -> u64 {
        self.dirty.set_bytes()
    }

    /// Bytes that are not confirmed: what is in flight and dirty again counts twice, because it goes twice.
    pub(super) fn left_bytes(&self) -> u64 {
        let in_flight: u64 = self.in_flight.iter().map(Sent::bytes).sum();
        self.dirty_bytes() + (self.taken.end - self.taken.start) + in_flight
    }

    /// How many bytes a write to the range would dirty.
    pub(super) fn clean_bytes(&self, range: &Range<u64>) -> u64 {
        self.dirty.clear_bytes(range.start, range.end.saturating_sub(range.start))
    }

    /// A write to the range is done. Says how many bytes that has dirtied.
    pub(super) fn note_write(&mut self, range: &Range<u64>) -> u64 {
        let before = self.dirty_bytes();
        // What is taken will be read with this write in it.
        for part in [range.start..range.end.min(self.taken.start), range.start.max(self.taken.end)..range.end] {
            self.dirty.set_range(part.start, part.end.saturating_sub(part.start));
        }
        self.dirty_bytes() - before
    }

    /// What was taken and not sent yet.
    pub(super) fn taken(&self) -> Range<u64> {
        self.taken.clone()
    }

    /// Takes the next dirty blocks; only when everything taken before was sent.
    pub(super) fn take(&mut self) -> Taken {
        debug_assert!(self.taken.is_empty(), "invariant 2");
        let ahead = self.dirty.next_set_range(self.cursor, TAKEN_MAX);
        let is_new_pass = ahead.is_none();
        let Some(mut range) = ahead.or_else(|| self.dirty.next_set_range(0, TAKEN_MAX)) else {
            // End the pass here, or it would follow a client that writes in order through all of the image.
            self.cursor = self.size;
            return Taken::Nothing;
        };
        for sent in &self.in_flight {
            if overlap(&sent.range, &range) {
                // Take only the blocks before it (invariant 1); its answer comes soon.
                range.end = range.end.min((sent.range.start / BLOCK * BLOCK).max(range.start));
            }
        }
        if range.is_empty() {
            return Taken::Nothing;
        }
        if is_new_pass {
            self.is_settled = self.dirty_bytes() > self.began_with / 4 * 3;
            self.began_with = self.dirty_bytes();
            self.number += 1;
        }
        self.dirty.clear_range(range.start, range.end - range.start);
        self.cursor = range.end;
        self.taken = range;
        if is_new_pass {
            Taken::NewPass
        } else {
            Taken::More
        }
    }

    /// Sends what is taken, up to `end`.
    pub(super) fn send(&mut self, end: u64, is_data: bool) -> Sent {
        let sent = Sent { range: self.taken.start..end, is_data };
        debug_assert!(self.in_flight.iter().all(|other| !overlap(&other.range, &sent.range)), "invariant 1");
        self.taken.start = end;
        self.in_flight.push(sent.clone());
        sent
    }

    /// A range in flight as data turns out to be zero and goes without its bytes. False when it is not in flight.
    pub(super) fn note_zeroes(&mut self, range: &Range<u64>) -> bool {
        let sent = self.in_flight.iter_mut().find(|sent| sent.range == *range);
        sent.map(|sent| sent.is_data = false).is_some()
    }

    /// The destination has done what was sent; `None` for what is not in flight.
    pub(super) fn acked(&mut self, range: &Range<u64>) -> Option<Sent> {
        let at = self.in_flight.iter().position(|sent| sent.range == *range)?;
        Some(self.in_flight.swap_remove(at))
    }

    /// The destination refuses what was sent: it is dirty again.
    pub(super) fn refused(&mut self, range: &Range<u64>) {
        if let Some(sent) = self.acked(range) {
            self.dirty.set_range(sent.range.start, sent.bytes());
        }
    }

    pub(super) fn in_flight(&self) -> &[Sent] {
        &self.in_flight
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_is_taken_and_not_read_yet_does_not_become_dirty() {
        let mut pass = Pass::new(4 * MIB);
        assert_eq!((pass.take(), pass.taken()), (Taken::More, 0..4 * MIB));
        pass.send(MIB, true);
        assert_eq!(pass.note_write(&(2 * MIB..3 * MIB)), 0);
        assert_eq!((pass.clean_bytes(&(MIB - 1..2 * MIB)), pass.note_write(&(MIB - 1..2 * MIB))), (MIB + BLOCK, BLOCK));
        assert_eq!((pass.dirty_bytes(), pass.left_bytes()), (BLOCK, 4 * MIB + BLOCK));
    }

    #[test]
    fn what_is_in_flight_is_not_taken_before_it_is_answered() {
        let mut pass = Pass::new(4 * MIB);
        pass.take();
        for end in [MIB, 2 * MIB, 4 * MIB] {
            pass.send(end, true);
        }
        pass.note_write(&(0..4 * MIB));
        assert_eq!(pass.take(), Taken::Nothing);
        assert_eq!(pass.acked(&(0..MIB)), Some(Sent { range: 0..MIB, is_data: true }));
        assert_eq!(pass.acked(&(0..MIB)), None);
        assert_eq!((pass.take(), pass.taken()), (Taken::NewPass, 0..MIB));
    }

    #[test]
    fn a_pass_that_began_with_hardly_less_settles_it() {
        let mut pass = Pass::new(64 * MIB);
        let all = |pass: &mut Pass, dirty: u64| {
            pass.note_write(&(0..dirty));
            assert_eq!(pass.take(), Taken::NewPass);
            let sent = pass.send(dirty, true);
            pass.acked(&sent.range);
            assert_eq!(pass.take(), Taken::Nothing);
            (pass.number(), pass.is_settled())
        };
        pass.take();
        let first = pass.send(64 * MIB, true);
        pass.acked(&first.range);
        assert_eq!(all(&mut pass, 32 * MIB), (2, false));
        assert_eq!(all(&mut pass, 24 * MIB), (3, false));
        assert_eq!(all(&mut pass, 19 * MIB), (4, true));
        assert_eq!(all(&mut pass, 10 * MIB), (5, false));
    }
}
