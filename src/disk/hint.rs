//! Hints that a range will be read soon, in steps, as far as the disk takes them without being waited for.

use super::image::Image;
use super::pace::Stride;
use crate::sys;
use std::time::{Duration, Instant};

/// The longest range of one hint, in bytes. Hints about cached ranges take no time, but that must not make the next one
/// longer than this.
const STEP_MAX: u64 = 1 << 20;

/// A step that takes so long has waited for the disk, whose queue is full: most take a hundredth of it.
const SLOW: Duration = Duration::from_millis(2);

/// After such a step, hints are dropped for so many times as long as it took, so that they take a twentieth of the
/// loop's time at most.
const PATIENCE: u32 = 20;

/// Gives hints, and drops them while the disk has no room for more.
#[derive(Debug)]
pub(super) struct Hints {
    stride: Stride,
    rest_until: Option<Instant>,
}

impl Default for Hints {
    fn default() -> Self {
        Self { stride: Stride::new(STEP_MAX), rest_until: None }
    }
}

impl Hints {
    /// Hints at the front of a range; returns how many bytes are dealt with.
    pub(super) fn step(&mut self, image: &Image, offset: u64, length: u64) -> u64 {
        let began = Instant::now();
        if self.rests(began) {
            return length;
        }
        let n = self.stride.of(length);
        // A hint that is not taken harms nobody.
        let _ = sys::file::will_need(&image.file, offset, n);
        self.note(n, began, began.elapsed());
        n
    }

    fn rests(&self, now: Instant) -> bool {
        self.rest_until.is_some_and(|until| now < until)
    }

    /// A step of so many bytes began then and took so long.
    fn note(&mut self, bytes: u64, began: Instant, took: Duration) {
        self.stride.note(bytes, took);
        if took >= SLOW {
            self.rest_until = Some(began + took.saturating_mul(1 + PATIENCE));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::TempFile;
    use super::*;

    #[test]
    fn hints_rest_when_one_has_waited() {
        let temp = TempFile::new("hints");
        let image = Image::of(&temp.file, 1 << 30);
        let (mut hints, now) = (Hints::default(), Instant::now());
        hints.note(STEP_MAX, now, SLOW / 2);
        assert!(!hints.rests(now), "it had much to do");
        hints.note(STEP_MAX, now, SLOW);
        assert!(hints.rests(now + SLOW * PATIENCE) && !hints.rests(now + SLOW * (PATIENCE + 1)));
        hints.rest_until = Some(now + Duration::from_secs(3600));
        assert_eq!(hints.step(&image, 0, 1 << 30), 1 << 30, "all of it is dropped");
        hints.rest_until = None;
        assert!(hints.step(&image, 0, 1 << 30) < 1 << 30, "a step of it");
    }
}
