//! PURE: where the image has holes, as far as that can be relied on while clients go on writing.
//!
//! One extent is known, and one question may be on its way to the disk. The answer may or may not show a write that is
//! done meanwhile. So both what is known and the answer count only up to where something was written.

use crate::work::Extent;
use std::ops::Range;

/// What is known of the image, and what was asked.
#[derive(Debug, Default)]
pub(super) struct Holes {
    known: Option<Extent>,
    asked: Option<Asked>,
}

/// A question on its way.
#[derive(Debug)]
struct Asked {
    offset: u64,
    /// What was written since, at or after the offset: the part that begins first.
    written: Option<Range<u64>>,
}

impl Holes {
    /// What begins at the offset, if that is known. What is before it is of no use any more.
    pub(super) fn at(&mut self, offset: u64) -> Option<&Extent> {
        let known = self.known.as_mut().filter(|known| known.range.contains(&offset))?;
        known.range.start = offset;
        Some(known)
    }

    /// True when the disk is to be asked what begins at the offset; false while it has a question already.
    pub(super) fn ask(&mut self, offset: u64) -> bool {
        let asks = self.asked.is_none();
        if asks {
            self.asked = Some(Asked { offset, written: None });
        }
        asks
    }

    /// A write to the range is done.
    pub(super) fn note_write(&mut self, range: &Range<u64>) {
        if range.is_empty() {
            return;
        }
        self.known = self.known.take().and_then(|known| before(known, range));
        if let Some(Asked { offset, written }) = &mut self.asked {
            let start = range.start.max(*offset);
            let is_first = written.as_ref().is_none_or(|first| (start, first.end) < (first.start, range.end));
            if start < range.end && is_first {
                *written = Some(start..range.end);
            }
        }
    }

    /// The disk has answered.
    pub(super) fn note_extent(&mut self, extent: Extent) {
        let Some(Asked { offset, written }) = self.asked.take() else { return };
        self.known = match written {
            // Data may become a hole meanwhile, and it is right all the same to send it as data.
            Some(written) if extent.is_hole && written.start == offset => {
                Some(Extent { range: written, is_hole: false })
            }
            Some(written) if extent.is_hole => before(extent, &written),
            _ => Some(extent),
        };
    }
}

/// The part of an extent before what was written, if there is one.
fn before(mut extent: Extent, written: &Range<u64>) -> Option<Extent> {
    if written.end > extent.range.start {
        extent.range.end = extent.range.end.min(written.start);
    }
    Some(extent).filter(|extent| !extent.range.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hole(range: Range<u64>) -> Extent {
        Extent { range, is_hole: true }
    }

    fn data(range: Range<u64>) -> Extent {
        Extent { range, is_hole: false }
    }

    /// What is known at 100 when these ranges were written while the question for it was on its way.
    fn asked_and(writes: &[(u64, u64)], answer: Extent) -> Option<Extent> {
        let mut holes = Holes::default();
        assert!(holes.ask(100));
        for &(start, end) in writes {
            holes.note_write(&(start..end));
        }
        assert_eq!(holes.at(100), None);
        holes.note_extent(answer);
        holes.at(100).cloned()
    }

    #[test]
    fn what_was_written_while_the_question_was_on_its_way_is_no_hole() {
        for (writes, expected) in [
            (&[] as &[(u64, u64)], hole(100..900)),
            (&[(0, 100), (900, 1000), (500, 500)], hole(100..900)),
            (&[(300, 400)], hole(100..300)),
            (&[(300, 400), (200, 500), (250, 300)], hole(100..200)),
            (&[(300, 400), (899, 2000)], hole(100..300)),
            (&[(100, 101)], data(100..101)),
            (&[(99, 200), (100, 150), (300, 400)], data(100..200)),
            (&[(100, 150), (99, 200)], data(100..200)),
            (&[(300, 400), (0, 2000)], data(100..2000)),
        ] {
            assert_eq!(asked_and(writes, hole(100..900)), Some(expected), "{writes:?}");
            assert_eq!(asked_and(writes, data(100..900)), Some(data(100..900)));
        }
    }

    #[test]
    fn what_is_known_ends_where_something_is_written() {
        let mut holes = Holes::default();
        assert!(holes.ask(0));
        holes.note_extent(hole(0..1000));
        assert_eq!(holes.at(400), Some(&hole(400..1000)));
        assert_eq!(holes.at(1000), None);
        holes.note_write(&(0..400));
        holes.note_write(&(1000..2000));
        assert_eq!(holes.at(400), Some(&hole(400..1000)));
        holes.note_write(&(700..701));
        assert_eq!(holes.at(400), Some(&hole(400..700)));
        holes.note_write(&(0..401));
        assert_eq!(holes.at(400), None);
    }

    #[test]
    fn there_is_one_question_at_a_time() {
        let mut holes = Holes::default();
        holes.note_extent(hole(0..1000));
        assert_eq!(holes.at(0), None, "nobody has asked");
        assert!(holes.ask(0));
        assert!(!holes.ask(500));
        holes.note_extent(hole(0..1000));
        assert_eq!(holes.at(500), Some(&hole(500..1000)));
        assert!(holes.ask(1000));
    }
}
