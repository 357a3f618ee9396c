//! PURE: the choices at the beginning of an input.

use super::CHOICES;

/// The choices, again and again.
pub(super) struct Choices<'a>(std::iter::Cycle<std::slice::Iter<'a, u8>>);

impl<'a> Choices<'a> {
    /// Splits an input into its choices and the rest.
    pub(super) fn split(data: &'a [u8]) -> (Self, &'a [u8]) {
        let (choices, rest) = data.split_at(data.len().min(CHOICES));
        (Self(choices.iter().cycle()), rest)
    }

    pub(super) fn next(&mut self) -> usize {
        self.0.next().copied().map_or(0, usize::from)
    }

    /// A number from 1 to `most`, more often a small one.
    pub(super) fn piece(&mut self, most: usize) -> usize {
        match self.next() {
            0 => most,
            choice => most.min(choice * choice),
        }
    }
}
