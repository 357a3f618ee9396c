//! PURE: the choices at the beginning of an input.

use super::drive::{Act, Can, Schedule};
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

    /// A schedule that they make.
    pub(super) fn schedule(self) -> Chosen<'a> {
        Chosen { choices: self, now_ms: 0, parks: false }
    }
}

/// A schedule made of choices.
pub(super) struct Chosen<'a> {
    choices: Choices<'a>,
    now_ms: u64,
    /// Memory is given back next.
    parks: bool,
}

impl Schedule for Chosen<'_> {
    fn choose(&mut self, can: &Can) -> Act {
        if std::mem::take(&mut self.parks) {
            return Act::Park;
        }
        let choice = self.choices.next();
        let acts = [can.go_on, can.receive > 0 || can.hang_up, can.send > 0, can.complete > 0];
        match (0..acts.len()).map(|next| (choice + next) % acts.len()).find(|&act| acts[act]) {
            Some(1) if can.hang_up => Act::HangUp,
            Some(1) => {
                self.parks = choice >= 0x80;
                Act::Receive(self.choices.piece(can.receive))
            }
            Some(2) => Act::Send(self.choices.piece(can.send)),
            Some(3) => {
                let piece = choice / acts.len() % can.complete;
                if self.choices.next() == 0xFF {
                    Act::Fail(piece)
                } else {
                    Act::Complete(piece)
                }
            }
            _ => Act::GoOn,
        }
    }

    fn now_ms(&mut self) -> u64 {
        self.now_ms += 1;
        self.now_ms
    }
}
