//! What the chunks of one reply have brought, held against what was asked.
//!
//! Specification: "Structured reply types", "Structured reply chunk message".

use super::chunk::{Chunk, Descriptor};
use crate::proto::error::Violation;
use crate::proto::wire::kind;
use std::ops::Range;

/// How many gaps there may be in the data of a READ. Servers send it in order or in a few large pieces.
const GAPS_MAX: usize = 1024;

/// What was asked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) kind: u16,
    pub(super) offset: u64,
    pub(super) length: u32,
}

/// What has come.
///
/// Invariant: the ranges of `covered` are in order, and between two of them is a gap.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// Relative to what was asked.
    covered: Vec<Range<u64>>,
    has_extents: bool,
    /// The first one, or 0.
    error: u32,
}

impl Account {
    /// Adds a chunk; `allocation_id` is the context that extents have to be of.
    pub(super) fn note(&mut self, asked: Asked, chunk: &Chunk, allocation_id: Option<u32>) -> Result<(), Violation> {
        match (chunk, asked.kind) {
            (Chunk::Nothing, _) => {}
            (&Chunk::Data { offset, length } | &Chunk::Hole { offset, length }, kind::READ) => {
                let out_of_range = Violation::ChunkRange { offset, length };
                let start = offset.checked_sub(asked.offset).ok_or(out_of_range)?;
                let end = start.checked_add(length.into()).filter(|&end| end <= asked.length.into());
                self.cover(start..end.ok_or(out_of_range)?).ok_or(out_of_range)?;
                if self.covered.len() > GAPS_MAX {
                    return Err(Violation::TooManyGaps(GAPS_MAX));
                }
            }
            (Chunk::Extents { context, descriptors }, kind::BLOCK_STATUS)
                if Some(*context) == allocation_id && !self.has_extents && fit(descriptors, asked.length) =>
            {
                self.has_extents = true;
            }
            (&Chunk::Error { error, offset }, _) => {
                let end = asked.offset.saturating_add(asked.length.into());
                if let Some(offset) = offset.filter(|offset| !(asked.offset..=end).contains(offset)) {
                    return Err(Violation::ChunkRange { offset, length: 0 });
                }
                if self.error == 0 {
                    self.error = error;
                }
            }
            (_, kind) => return Err(Violation::UnexpectedChunk(kind)),
        }
        Ok(())
    }

    /// The error of the whole reply, which has ended, or 0; `None` when something is missing.
    pub(super) fn close(&self, asked: Asked) -> Option<u32> {
        let is_whole = match asked.kind {
            kind::READ if asked.length > 0 => {
                matches!(self.covered.as_slice(), [all] if *all == (0..u64::from(asked.length)))
            }
            kind::BLOCK_STATUS => self.has_extents,
            _ => true,
        };
        (is_whole || self.error != 0).then_some(self.error)
    }

    /// Counts a range as covered; `None` when a part of it has been already.
    fn cover(&mut self, range: Range<u64>) -> Option<()> {
        let at = self.covered.partition_point(|before| before.end <= range.start);
        if self.covered.get(at).is_some_and(|behind| behind.start < range.end) {
            return None;
        }
        let joins_behind = self.covered.get(at).is_some_and(|behind| behind.start == range.end);
        let before = at.checked_sub(1).and_then(|at| self.covered.get_mut(at));
        if let Some(before) = before.filter(|before| before.end == range.start) {
            before.end = range.end;
            if joins_behind {
                let behind = self.covered.remove(at);
                if let Some(before) = self.covered.get_mut(at - 1) {
                    before.end = behind.end;
                }
            }
        } else if let Some(behind) = self.covered.get_mut(at).filter(|_| joins_behind) {
            behind.start = range.start;
        } else {
            self.covered.insert(at, range);
        }
        Some(())
    }
}

/// Each extent has bytes, and only the last one may go beyond what was asked.
fn fit(descriptors: &[Descriptor], length: u32) -> bool {
    let mut start = 0;
    descriptors.iter().all(|&Descriptor { length: bytes, .. }| {
        let fits = bytes > 0 && start < u64::from(length);
        start += u64::from(bytes);
        fits
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_any_order_become_the_whole_and_none_comes_twice() {
        let asked = Asked { kind: kind::READ, offset: 1000, length: 6 };
        // All orders of six bytes, one by one.
        for order in 0..720_usize {
            let (mut left, mut rest) = ((0..6).collect::<Vec<u64>>(), order);
            let mut account = Account::default();
            let mut came = Vec::new();
            for ways in (1..=6).rev() {
                let at = left.remove(rest % ways);
                rest /= ways;
                assert_eq!(account.close(asked), None);
                account.note(asked, &Chunk::Data { offset: 1000 + at, length: 1 }, None).unwrap();
                came.push(at);
                for &again in &came {
                    let chunk = Chunk::Hole { offset: 1000 + again, length: 1 };
                    assert!(account.note(asked, &chunk, None).is_err());
                }
                assert!(account.covered.windows(2).all(|pair| pair[0].end < pair[1].start), "{:?}", account.covered);
            }
            assert_eq!(account.close(asked), Some(0));
        }
    }

    #[test]
    fn gaps_are_bounded() {
        let asked = Asked { kind: kind::READ, offset: 0, length: 1 << 20 };
        let mut account = Account::default();
        let mut note = |at| account.note(asked, &Chunk::Data { offset: at, length: 1 }, None);
        assert!((0..1024).all(|n| note(n * 2).is_ok()));
        assert_eq!(note(5000), Err(Violation::TooManyGaps(1024)));
    }
}
