//! What is read before anybody has asked for it: the bytes behind small READs that follow one another, for clients that ask
//! for one thing at a time and would wait for the way to the server and back each time.
//!
//! What is kept is what the export holds, and nobody has to look whether it still is: it is asked for only where nothing is
//! being changed, and a change drops it when it is submitted, long before it is answered.

use super::command::{Abilities, Asked, For};
use super::task::{overlap, Next, Task};
use std::ops::Range;

/// The longest READ that is small, in bytes. A longer one hides the way by itself, and may be a part of a longer request,
/// with which nothing need go on.
const SMALL_MAX: usize = 64 << 10;
/// Twice as many READs of the same length are asked for at first, and each time after that twice as many again, as far as it
/// may be: two READs that happen to be neighbours do not bring much that nobody needs.
const FIRST_READS: u64 = 2;

/// What becomes of the READ that was sent for this.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Awaited {
    /// There is none.
    Nothing,
    /// It brings the last `n` of the bytes.
    Bytes(usize),
    /// What it brings was dropped before it came.
    Dropped,
}

/// The bytes behind what was read last.
#[derive(Debug)]
pub(super) struct Ahead {
    /// How many they are at most, in bytes; 0 for none.
    limit: usize,
    /// Where the last small READ ended; nowhere at first.
    at: u64,
    /// How far ahead was asked for last, in bytes; 0 unless that READ went on where another one had ended, or lay in these
    /// bytes.
    window: usize,
    /// Where they begin in the export.
    start: u64,
    /// Those that are kept, then room for those that were asked for.
    bytes: Vec<u8>,
    awaited: Awaited,
}

impl Ahead {
    /// Reads so far ahead, in bytes; 0 for not at all.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, at: u64::MAX, window: 0, start: 0, bytes: Vec::new(), awaited: Awaited::Nothing }
    }

    /// A client asks for this.
    pub(super) fn note(&mut self, task: &Task) {
        let small = 1..=self.limit.min(SMALL_MAX) as u64;
        if let Some(range) = task.reads().filter(|range| small.contains(&(range.end - range.start))) {
            if range.start != self.at && self.place(&range).is_none() {
                self.window = 0;
            } else if self.window == 0 {
                let first = (range.end - range.start).saturating_mul(FIRST_READS);
                self.window = usize::try_from(first).unwrap_or(usize::MAX).min(self.limit);
            }
            self.at = range.end;
        }
        let bytes = self.start..self.start.saturating_add(self.bytes.len() as u64);
        if task.changes().is_some_and(|range| overlap(&range, &bytes)) {
            self.drop_bytes();
        }
    }

    /// Keeps nothing of what was read so far, nor of what was asked for, and asks for nothing before somebody reads on.
    pub(super) fn drop_bytes(&mut self) {
        self.bytes = Vec::new();
        self.window = 0;
        if let Awaited::Bytes(_) = self.awaited {
            self.awaited = Awaited::Dropped;
        }
    }

    /// The connection is gone, and what was asked for does not come.
    pub(super) fn lost(&mut self) {
        self.drop_bytes();
        self.awaited = Awaited::Nothing;
    }

    /// What to ask for next, if anything: its offset and length. `changes` is what is being changed.
    pub(super) fn next(
        &mut self,
        can: &Abilities,
        mut changes: impl Iterator<Item = Range<u64>>,
    ) -> Option<(u64, u32)> {
        if self.window == 0 || self.awaited != Awaited::Nothing {
            return None;
        }
        let read = self.at.checked_sub(self.start).and_then(|read| usize::try_from(read).ok());
        let read = read.unwrap_or(usize::MAX).min(self.bytes.len());
        let kept = self.bytes.len() - read;
        // While a client reads one half, the other comes.
        if kept > self.window / 2 {
            return None;
        }
        let window = self.window.saturating_mul(2).min(self.limit);
        let offset = self.at.saturating_add(kept as u64);
        let most = u64::from(can.length_max).min(can.size.saturating_sub(offset));
        let length = usize::try_from(most).unwrap_or(usize::MAX).min(window - kept);
        let range = offset..offset.saturating_add(length as u64);
        if length == 0 || changes.any(|change| overlap(&change, &range)) {
            return None;
        }
        self.bytes.drain(..read);
        self.start = self.at;
        // Without memory for it there is nothing to gain.
        self.bytes.try_reserve_exact(self.limit - kept).ok()?;
        self.bytes.resize(kept + length, 0);
        self.awaited = Awaited::Bytes(length);
        self.window = window;
        Some((offset, u32::try_from(length).unwrap_or(u32::MAX)))
    }

    /// Takes bytes that were asked for, from this offset of the export on.
    pub(super) fn data(&mut self, asked: Asked, offset: u64, bytes: &[u8]) {
        if let Some(to) = self.awaited(asked, &(offset..offset.saturating_add(bytes.len() as u64))) {
            to.copy_from_slice(bytes);
        }
    }

    /// Takes a hole in what was asked for.
    pub(super) fn hole(&mut self, asked: Asked, range: &Range<u64>) {
        if let Some(to) = self.awaited(asked, range) {
            to.fill(0);
        }
    }

    fn awaited(&mut self, asked: Asked, range: &Range<u64>) -> Option<&mut [u8]> {
        let place = self.place(range).filter(|place| asked.0 == For::Ahead && place.start >= self.kept())?;
        self.bytes.get_mut(place)
    }

    /// What was asked for has been answered; without an error, all of it has come. After one, whoever reads on will hear of
    /// it.
    pub(super) fn answered(&mut self, is_good: bool) {
        if !is_good {
            self.window = 0;
            self.bytes.truncate(self.kept());
        }
        self.awaited = Awaited::Nothing;
    }

    /// True for a READ that needs nothing but what is kept and what was asked for.
    pub(super) fn awaits(&self, task: &Task) -> bool {
        task.reads().and_then(|range| self.place(&range)).is_some_and(|place| place.end > self.kept())
    }

    /// Ends a READ of what is kept, if it was not sent.
    pub(super) fn answers(&self, task: &mut Task) -> Option<Next> {
        let range = task.reads().filter(|_| !task.is_begun)?;
        let place = self.place(&range).filter(|place| place.end <= self.kept())?;
        task.data(range.start, self.bytes.get(place)?);
        Some(Next::Finish(Ok(())))
    }

    /// How many of the bytes have come.
    fn kept(&self) -> usize {
        match self.awaited {
            Awaited::Bytes(awaited) => self.bytes.len().saturating_sub(awaited),
            Awaited::Nothing | Awaited::Dropped => self.bytes.len(),
        }
    }

    /// Where this part of the export is among the bytes, if all of it is.
    fn place(&self, range: &Range<u64>) -> Option<Range<usize>> {
        let start = usize::try_from(range.start.checked_sub(self.start)?).ok()?;
        let end = usize::try_from(range.end.checked_sub(self.start)?).ok()?;
        (start < end && end <= self.bytes.len()).then_some(start..end)
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]
mod tests {
    use super::super::{Command, Replay, Upstream, What};
    use super::*;
    use crate::buffer::Buffer;
    use crate::work::{Action, Done, Op};

    const SIZE: u64 = 100_000;
    const LIMIT: usize = 16 << 10;
    /// The length of a READ.
    const READ: u64 = 1 << 10;
    const READER: u64 = 1;
    const WRITER: u64 = 2;

    /// A core, and the export of the server behind it.
    struct Both {
        core: Upstream,
        export: Vec<u8>,
    }

    impl Both {
        fn new(limit: usize) -> Self {
            let mut core = Upstream::new(Replay::Dirty, 1 << 20, limit);
            core.connected(abilities());
            Self { core, export: (0..SIZE).map(|at| (at / 100) as u8).collect() }
        }

        fn read(&mut self, offset: u64, length: u64) {
            let length = length as usize;
            let buffer = Buffer::with_capacity(length);
            let action = Action::Read { offset, length, skip_hole: true, buffer };
            self.core.submit(Op { owner: READER, tag: 0, action });
        }

        fn write(&mut self, offset: u64) {
            let mut payload = Buffer::with_capacity(10);
            payload.append(&[0xEE; 10]);
            let action = Action::Write { offset, payload, fua: false, follows: false };
            self.core.submit(Op { owner: WRITER, tag: 0, action });
        }

        /// The ranges that the server is asked to read, and the commands.
        fn ask(&mut self) -> (Vec<(u64, u32)>, Vec<Command>) {
            let commands: Vec<Command> = std::iter::from_fn(|| self.core.next_command()).collect();
            let reads = commands.iter().filter(|command| command.what == What::Read);
            (reads.map(|command| (command.offset, command.length)).collect(), commands)
        }

        fn answer(&mut self, command: Command) {
            let Command { asked, what, offset, length, payload, .. } = command;
            let place = offset as usize..offset as usize + length as usize;
            match what {
                What::Write => self.export[place].copy_from_slice(payload.unwrap().filled()),
                // The second half comes first.
                What::Read => {
                    let middle = place.start + place.len() / 2;
                    self.core.data(asked, middle as u64, &self.export[middle..place.end]);
                    self.core.data(asked, offset, &self.export[place.start..middle]);
                }
                _ => {}
            }
            self.core.reply(asked, 0).unwrap();
        }

        fn answer_all(&mut self, commands: impl IntoIterator<Item = Command>) {
            for command in commands {
                self.answer(command);
            }
        }

        /// The server answers all that it is asked, until it is asked nothing more; what it was asked to read.
        fn serve(&mut self) -> Vec<(u64, u32)> {
            let mut all = Vec::new();
            loop {
                let (reads, commands) = self.ask();
                if commands.is_empty() {
                    return all;
                }
                all.extend(reads);
                self.answer_all(commands);
            }
        }

        /// The next READ that is done has read what is there.
        fn expect_read(&mut self, offset: u64, length: u64) {
            let mut done = std::iter::from_fn(|| self.core.pop_done());
            let Done { result, buffer, .. } = done.find(|done| done.owner == READER).expect("an answer");
            result.unwrap();
            assert!(
                buffer.unwrap().filled() == &self.export[offset as usize..(offset + length) as usize],
                "at {offset}"
            );
        }

        /// Reads, and is answered; what the server was asked to read for it.
        fn read_well(&mut self, offset: u64) -> Vec<(u64, u32)> {
            self.read(offset, READ);
            let asked = self.serve();
            self.expect_read(offset, READ);
            assert!(!self.core.has_done());
            asked
        }
    }

    fn abilities() -> Abilities {
        Abilities { size: SIZE, flush: true, length_max: 1 << 20, ..Abilities::default() }
    }

    /// What is asked for first, for the second READ and behind it.
    const FIRST: [(u64, u32); 2] = [(READ, READ as u32), (2 * READ, 4 * READ as u32)];
    /// Where that ends.
    const FIRST_END: u64 = 6 * READ;

    #[test]
    fn more_and_more_is_asked_for_and_the_next_half_when_one_has_been_read() {
        let mut both = Both::new(LIMIT);
        assert_eq!(both.read_well(0), [(0, READ as u32)]);
        assert_eq!(both.read_well(READ), FIRST);
        let (mut end, mut lengths) = (FIRST_END, Vec::new());
        for offset in (2 * READ..SIZE - READ).step_by(READ as usize) {
            for (start, length) in both.read_well(offset) {
                assert_eq!(start, end, "what nobody has asked for");
                end += u64::from(length);
                lengths.push(length);
            }
            assert!(both.core.ahead.bytes.capacity() <= LIMIT, "more memory than it may take");
        }
        let last = lengths.pop().unwrap();
        assert_eq!(lengths[..2], [6 * READ as u32, 12 * READ as u32]);
        assert!(lengths[2..].iter().all(|&length| length as usize == LIMIT / 2) && last as usize <= LIMIT / 2);
        assert_eq!(end, SIZE, "to the end and no further");
        assert_eq!(both.core.counts().reads_ahead, lengths.len() as u64 + 2);
    }

    #[test]
    fn what_was_asked_for_is_waited_for_and_what_a_client_asks_for_goes_first() {
        let mut both = Both::new(LIMIT);
        both.read_well(0);
        both.read(READ, READ);
        both.write(50_000);
        let (reads, mut commands) = both.ask();
        assert_eq!(reads, FIRST);
        assert_eq!(commands[1].what, What::Write, "it came later, and goes before what nobody has asked for");
        // A part of it, the rest of it, and more than all of it.
        both.read(2 * READ, 10);
        both.read(2 * READ + 10, 4 * READ - 10);
        both.read(2 * READ, LIMIT as u64 + 1);
        assert_eq!(both.ask().0, [(2 * READ, LIMIT as u32 + 1)]);
        both.answer(commands.pop().unwrap());
        assert_eq!(both.ask().0, [(FIRST_END, 8 * READ as u32)], "the next piece");
        both.expect_read(2 * READ, 10);
        both.expect_read(2 * READ + 10, 4 * READ - 10);
        assert!(!both.core.has_done());
    }

    #[test]
    fn a_change_drops_what_it_changes_when_it_is_submitted() {
        // While it is kept.
        let mut both = Both::new(LIMIT);
        both.read_well(0);
        both.read_well(READ);
        both.write(FIRST_END - 1);
        both.read(2 * READ, READ);
        let (reads, commands) = both.ask();
        assert_eq!(reads, [(2 * READ, READ as u32)], "and nothing that is being changed");
        both.answer_all(commands);
        both.expect_read(2 * READ, READ);
        assert_eq!(both.serve(), [(3 * READ, 4 * READ as u32)]);

        // While it is on its way, also to who waits for it.
        let mut both = Both::new(LIMIT);
        both.read_well(0);
        both.read(READ, READ);
        let (_, mut commands) = both.ask();
        let ahead = commands.pop().unwrap();
        both.answer_all(commands);
        both.expect_read(READ, READ);
        both.read(2 * READ, READ);
        assert!(both.core.next_command().is_none());
        both.write(2 * READ);
        let (reads, commands) = both.ask();
        assert_eq!(reads, [(2 * READ, READ as u32)], "itself, and no second one beside what is on its way");
        both.answer(ahead);
        assert!(!both.core.has_done(), "it would be old");
        assert!(both.core.next_command().is_none(), "nobody reads on");
        // The READ comes last, and sees what was written.
        both.answer_all(commands.into_iter().rev());
        both.expect_read(2 * READ, READ);

        // What lies elsewhere changes nothing.
        assert_eq!(both.read_well(3 * READ), [(3 * READ, READ as u32), (4 * READ, 4 * READ as u32)]);
        both.write(0);
        both.write(8 * READ);
        both.read(4 * READ, READ);
        assert_eq!(both.serve(), []);
        both.expect_read(4 * READ, READ);
    }

    #[test]
    fn an_error_is_that_of_whoever_asks_himself() {
        let mut both = Both::new(LIMIT);
        both.read_well(0);
        both.read(READ, READ);
        let (_, mut commands) = both.ask();
        both.core.reply(commands.pop().unwrap().asked, 5).unwrap();
        both.answer_all(commands);
        both.expect_read(READ, READ);
        assert!(both.core.next_command().is_none(), "it is not asked again and again");
        assert_eq!(both.read_well(2 * READ), [(2 * READ, READ as u32), (3 * READ, 4 * READ as u32)]);
    }

    #[test]
    fn nothing_outlives_the_connection_or_a_client() {
        let mut both = Both::new(LIMIT);
        both.read_well(0);
        both.read_well(READ);
        both.core.lost();
        both.read(2 * READ, READ);
        assert!(both.core.next_command().is_none());
        both.core.connected(abilities());
        both.export.fill(9);
        let asked = [(2 * READ, READ as u32), (3 * READ, 4 * READ as u32)];
        assert_eq!(both.ask().0, asked);
        // What is on its way is lost as well.
        both.core.lost();
        both.core.connected(abilities());
        assert_eq!(both.serve()[0], asked[0]);
        both.expect_read(2 * READ, READ);
        both.core.forget(7);
        assert!(both.core.next_command().is_none(), "nobody reads on");
        both.export.fill(8);
        assert_eq!(both.read_well(3 * READ)[0], (3 * READ, READ as u32));
    }

    #[test]
    fn nothing_is_begun_before_a_change_of_servers() {
        let mut both = Both::new(LIMIT);
        both.read_well(0);
        both.read(READ, READ);
        let (_, commands) = both.ask();
        both.core.settle(true);
        both.read(2 * READ, 4 * READ);
        both.answer_all(commands);
        assert!(both.core.next_command().is_none() && both.core.is_settled());
        both.core.settle(false);
        assert_eq!(both.ask().0, [(FIRST_END, 8 * READ as u32)]);
        both.expect_read(READ, READ);
        both.expect_read(2 * READ, 4 * READ);
    }

    #[test]
    fn only_small_reads_that_follow_one_another_are_read_ahead_of() {
        let mut both = Both::new(1 << 20);
        for (offset, length) in [(0, READ), (9_000, READ), (9_000 + READ, SMALL_MAX as u64 + 1), (20_000, READ)] {
            both.read(offset, length);
            assert_eq!(both.serve(), [(offset, length as u32)], "it goes on where nothing has ended, or is long");
            both.expect_read(offset, length);
        }
        assert_eq!(both.read_well(20_000 + READ).len(), 2);
        // Somebody else in between, elsewhere.
        both.read_well(1_000);
        assert_eq!(both.read_well(20_000 + 2 * READ), []);
        let mut both = Both::new(0);
        assert_eq!((both.read_well(0).len(), both.read_well(READ).len()), (1, 1));
    }
}
