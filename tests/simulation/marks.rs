//! Both sides of a migration, whose images are marked: at every moment, whatever of both may be left is served or not, and
//! never are two, nor is a part of one.
//!
//! The image is blocks of 4 KiB that hold a number each. A disk has what its processes see, and what a power failure may
//! leave: for the mark and for each block, any value since the last sync. Killing a process leaves what it saw.

use crate::random::Random;
use flexnbd::migrate::{Abilities, Incoming, Plan, Step};
use flexnbd::work::Extent;
use std::collections::BTreeSet;
use std::ops::Range;

const BLOCK: u64 = 4096;
const BLOCKS: usize = 40;
const SIZE: u64 = BLOCKS as u64 * BLOCK;
/// What the destination holds before.
const OLD: u32 = u32::MAX;

/// What is at one place, and what a power failure may leave there.
#[derive(Clone)]
struct Cell<T> {
    seen: T,
    left: BTreeSet<T>,
}

impl<T: Copy + Ord> Cell<T> {
    fn new(value: T) -> Self {
        Self { seen: value, left: BTreeSet::from([value]) }
    }

    fn set(&mut self, value: T) {
        self.seen = value;
        self.left.insert(value);
    }

    fn sync(&mut self) {
        self.left = BTreeSet::from([self.seen]);
    }

    /// Whether this may be so, after the process was killed or the power failed.
    fn may(&self, is_so: impl Fn(T) -> bool) -> bool {
        self.left.iter().any(|&value| is_so(value))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Mark {
    Nothing,
    Incoming,
    Moved,
}

struct Disk {
    blocks: Vec<Cell<u32>>,
    mark: Cell<Mark>,
}

impl Disk {
    fn new(value: u32) -> Self {
        Self { blocks: vec![Cell::new(value); BLOCKS], mark: Cell::new(Mark::Nothing) }
    }

    /// fdatasync; fsync with the mark.
    fn sync(&mut self, all: bool) {
        self.blocks.iter_mut().for_each(Cell::sync);
        if all {
            self.mark.sync();
        }
    }

    /// Whether `serve` may take it.
    fn may_serve(&self) -> bool {
        self.mark.may(|mark| mark == Mark::Nothing)
    }
}

fn blocks(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start / BLOCK).unwrap()..usize::try_from(range.end.div_ceil(BLOCK)).unwrap()
}

/// What the destination does in which order. Only the first is right; the others show that this finds what is wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Order {
    Right,
    ChangesBeforeTheMark,
    ClearsBeforeTheSync,
    SaysDiscBeforeTheMark,
    GoesOnBeforeTheMarkIsGone,
}

struct Sides {
    order: Order,
    random: Random,
    can: Abilities,
    plan: Plan,
    incoming: Incoming,
    source: Disk,
    destination: Disk,
    /// What clients were answered, by block.
    answered: Vec<u32>,
    version: u32,
    has_said_disc: bool,
    moments: u32,
}

impl Sides {
    fn new(seed: u64, order: Order) -> Self {
        let mut random = Random::new(seed);
        let can = Abilities { zero: true, flush: random.one_in(2) };
        let mut plan = Plan::new(SIZE, 100, 60_000, None, 0);
        plan.mark_at_end();
        plan.begin(can, 0);
        Self {
            order,
            random,
            can,
            plan,
            incoming: Incoming::new(SIZE),
            source: Disk::new(1),
            destination: Disk::new(OLD),
            answered: vec![1; BLOCKS],
            version: 1,
            has_said_disc: false,
            moments: 0,
        }
    }

    /// Whatever is killed now, or loses power. False: there may be two, or a part of one.
    fn is_sound(&mut self) -> bool {
        self.moments += 1;
        let is_touched = self.destination.blocks.iter().any(|block| block.may(|value| value != OLD));
        if !is_touched || !self.destination.may_serve() {
            return true;
        }
        let is_whole = self.destination.blocks.iter().zip(&self.answered);
        let is_whole = is_whole.into_iter().all(|(block, answered)| !block.may(|value| value != *answered));
        is_whole && self.has_said_disc && !self.source.may_serve()
    }

    /// A client writes, if it may.
    fn client(&mut self) -> bool {
        if self.plan.pauses_clients() || !self.random.one_in(3) {
            return true;
        }
        // What it is answered would be lost with an image that is refused.
        let may_go_on = !self.source.mark.may(|mark| mark == Mark::Moved);
        let at = usize::try_from(self.random.below(BLOCKS as u64)).unwrap();
        let range = at as u64 * BLOCK..(at as u64 + 1) * BLOCK;
        self.version += 1;
        self.plan.note_submitted(&range);
        self.source.blocks[at].set(self.version);
        self.plan.note_write(&range);
        self.answered[at] = self.version;
        may_go_on
    }

    /// The destination takes a change: it is marked before that.
    fn take(&mut self, range: &Range<u64>, value: impl Fn(usize) -> u32) -> bool {
        if !self.incoming.may_change() && self.order != Order::ChangesBeforeTheMark {
            assert!(self.incoming.wants_mark());
            self.destination.mark.set(Mark::Incoming);
            if !self.is_sound() {
                return false;
            }
            self.destination.sync(true);
            self.incoming.marked();
        }
        self.incoming.note_change();
        for block in blocks(range) {
            self.destination.blocks[block].set(value(block));
            if !self.is_sound() {
                return false;
            }
        }
        self.incoming.note(range);
        true
    }

    /// The destination has read DISC.
    fn arrive(&mut self) -> bool {
        assert!(self.incoming.is_complete(), "it has all of it");
        if self.order == Order::ClearsBeforeTheSync {
            self.destination.mark.set(Mark::Nothing);
            if !self.is_sound() {
                return false;
            }
        }
        self.destination.sync(false);
        self.is_sound() && {
            self.destination.mark.set(Mark::Nothing);
            self.is_sound() && {
                self.destination.sync(true);
                self.is_sound()
            }
        }
    }

    /// The connection is lost: what was marked is taken back before a client goes on.
    fn lose(&mut self) -> bool {
        let is_marked = self.plan.is_marked();
        if is_marked {
            self.source.mark.set(Mark::Nothing);
            if self.order != Order::GoesOnBeforeTheMarkIsGone {
                self.source.sync(true);
            }
        }
        self.plan.lost(0);
        self.incoming.begin();
        self.plan.begin(self.can, 0);
        self.is_sound()
    }

    /// A migration from its beginning to its end, with so many attempts that are lost anywhere. False: it was wrong at some
    /// moment.
    fn run(&mut self) -> bool {
        let (mut lost, mut now_ms) = (self.random.below(4), 0);
        loop {
            now_ms += 1;
            if !self.client() || !self.is_sound() {
                return false;
            }
            if lost > 0 && self.random.one_in(60) {
                lost -= 1;
                if !self.lose() {
                    return false;
                }
            }
            let step = self.plan.next(now_ms);
            // The step that tells the destination may fail as well as any other.
            if lost > 0 && matches!(step, Step::Mark | Step::Commit) && self.random.one_in(2) {
                if step == Step::Mark {
                    self.source.mark.set(Mark::Moved);
                }
                lost -= 1;
                if !self.lose() {
                    return false;
                }
                continue;
            }
            match step {
                Step::Look(offset) => self.plan.note_extent(Extent { range: offset..SIZE, is_hole: false }),
                Step::Data(range) => {
                    let values: Vec<u32> = self.source.blocks.iter().map(|block| block.seen).collect();
                    if !self.take(&range, |block| values[block]) {
                        return false;
                    }
                    self.plan.acked(&range, now_ms);
                }
                Step::Zero(range) => panic!("there are no holes in {range:?}"),
                Step::Flush => {
                    self.destination.sync(false);
                    self.plan.flushed(now_ms);
                }
                Step::Settle => {
                    self.source.sync(false);
                    self.plan.settled(now_ms);
                }
                Step::Quiesce => self.plan.quiesced(),
                Step::Mark => {
                    if self.order == Order::SaysDiscBeforeTheMark {
                        self.has_said_disc = true;
                        return self.arrive();
                    }
                    self.source.mark.set(Mark::Moved);
                    if !self.is_sound() {
                        return false;
                    }
                    self.source.sync(true);
                    self.plan.marked();
                }
                Step::Commit => {
                    self.has_said_disc = true;
                    return self.is_sound() && self.arrive() && self.destination.may_serve();
                }
                Step::WaitUntil(at_ms) => now_ms = at_ms - 1,
                Step::Wait | Step::WaitForClients => {}
            }
        }
    }
}

#[test]
fn never_two_and_never_a_part() {
    let mut moments = 0;
    for seed in 0..500 {
        let mut sides = Sides::new(seed, Order::Right);
        assert!(sides.run(), "seed {seed}, moment {}", sides.moments);
        moments += sides.moments;
    }
    assert!(moments > 50_000, "{moments}");
}

/// The same finds an order that is wrong.
#[test]
fn a_wrong_order_is_found() {
    for order in [
        Order::ChangesBeforeTheMark,
        Order::ClearsBeforeTheSync,
        Order::SaysDiscBeforeTheMark,
        Order::GoesOnBeforeTheMarkIsGone,
    ] {
        assert!((0..500).any(|seed| !Sides::new(seed, order).run()), "{order:?}");
    }
}
