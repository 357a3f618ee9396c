//! A hierarchical timer wheel: deadlines in milliseconds, found in order, armed in constant time.
//!
//! Level `l` has 64 slots of 64^l ms each. An entry lies on the lowest level on which its slot is not that of the present.
//! When the present reaches a slot of a higher level, its entries move down, in the end to level 0, where a slot is one
//! millisecond.
//!
//! The wheel is lazy: an entry is never cancelled or postponed. Whoever armed it keeps the true deadline, compares when the
//! entry fires, and arms again if that was too early (see [`super::alarm`]). So postponing a deadline costs one store.
//!
//! - Invariant 1: no entry lies before the present; [`Wheel::arm`] raises a deadline that has passed.
//! - Invariant 2: on levels above 0, the slot of the present is empty. So every occupied slot of a level lies ahead, and
//!   before every occupied slot of the levels above.
//! - Invariant 3: bit `s` of `occupied` is set exactly when `heads[s]` names an entry.

use slab::Slab;

use super::slots::Key;

/// Slots of a level: as many as a word has bits, so that the next occupied one is one instruction away.
const SLOTS: u64 = 64;

/// log2 of [`SLOTS`].
const SLOT_BITS: usize = 6;

const _: () =
    assert!(SLOTS == u64::BITS as u64 && SLOTS == 1 << SLOT_BITS, "one bit a slot, and so many bits of a time");

/// Five levels reach 12 days ahead, further than any deadline of a server.
const LEVELS: usize = 5;

/// How far ahead an entry can lie, in milliseconds: all slots of the last level but the present one (invariant 2).
const SPAN_MS: u64 = (SLOTS - 1) << (SLOT_BITS * (LEVELS - 1));

/// The end of a slot's list.
const NONE: usize = usize::MAX;

#[derive(Debug)]
struct Entry {
    deadline_ms: u64,
    key: Key,
    next: usize,
}

#[derive(Debug, Clone, Copy)]
struct Level {
    occupied: u64,
    heads: [usize; 1 << SLOT_BITS],
}

/// Deadlines and the keys they belong to.
///
/// The entries of a slot form a list. All of them are in one piece of memory, as large as the most entries there ever were.
#[derive(Debug)]
pub struct Wheel {
    now_ms: u64,
    levels: [Level; LEVELS],
    entries: Slab<Entry>,
}

impl Wheel {
    /// A wheel without entries, whose present is `now_ms`.
    pub fn new(now_ms: u64) -> Self {
        Self { now_ms, levels: [Level { occupied: 0, heads: [NONE; 1 << SLOT_BITS] }; LEVELS], entries: Slab::new() }
    }

    /// Lets `key` fire at `deadline_ms`; at the next [`Wheel::expire`] if that has passed, and after 12 days if it is
    /// further away than that. A key may have any number of entries.
    pub fn arm(&mut self, deadline_ms: u64, key: Key) {
        let deadline_ms = deadline_ms.clamp(self.now_ms, self.now_ms.saturating_add(SPAN_MS));
        let entry = self.entries.insert(Entry { deadline_ms, key, next: NONE });
        self.link(entry);
    }

    /// When to call [`Wheel::expire`] next, in milliseconds, or `None` without entries. It is never after the earliest
    /// deadline. While that lies on a higher level, it is the start of its slot: entries move down then, and perhaps none
    /// fires. An entry costs at most one such wake-up a level, that is four.
    pub fn next_expiry(&self) -> Option<u64> {
        self.levels.iter().enumerate().find_map(|(number, level)| {
            let present = self.now_ms >> shift(number);
            // Rotated so that bit 0 is the present and the others are what follows it, in order (invariant 2).
            let ahead = level.occupied.rotate_right(slot_of(present));
            (ahead != 0).then(|| (present + u64::from(ahead.trailing_zeros())) << shift(number))
        })
    }

    /// Moves the present on to `now_ms` and appends to `fired` the key of every entry that is due, in no particular order.
    /// What it costs depends on the entries that fire or move, not on the time that has passed. A `now_ms` before the
    /// present counts as the present.
    pub fn expire(&mut self, now_ms: u64, fired: &mut Vec<Key>) {
        let before_ms = self.now_ms;
        self.now_ms = now_ms.max(before_ms);
        for number in 0..LEVELS {
            let mut reached = self.reached(number, before_ms);
            while reached != 0 {
                self.empty_slot(number, reached.trailing_zeros(), fired);
                reached &= reached - 1;
            }
        }
    }

    /// The occupied slots of a level that the present has reached since `before_ms`, one bit each.
    fn reached(&self, number: usize, before_ms: u64) -> u64 {
        let (from, to) = (before_ms >> shift(number), self.now_ms >> shift(number));
        let others = (to - from).min(SLOTS - 1);
        let passed = (u64::MAX >> (SLOTS - 1 - others)).rotate_left(slot_of(from));
        self.levels.get(number).map_or(0, |level| level.occupied & passed)
    }

    /// Fires the entries of a slot that are due and moves the others to lower levels (invariant 2).
    fn empty_slot(&mut self, number: usize, slot: u32, fired: &mut Vec<Key>) {
        let Some(level) = self.levels.get_mut(number) else { return };
        let Some(head) = level.heads.get_mut(slot as usize) else { return };
        level.occupied &= !(1 << slot);
        let mut cursor = std::mem::replace(head, NONE);
        while let Some(&Entry { deadline_ms, key, next }) = self.entries.get(cursor) {
            if deadline_ms <= self.now_ms {
                self.entries.remove(cursor);
                fired.push(key);
            } else {
                debug_assert!(level_of(self.now_ms, deadline_ms) < number, "invariant 2");
                self.link(cursor);
            }
            cursor = next;
        }
    }

    /// Puts an entry at the head of the slot where it belongs, as seen from the present.
    fn link(&mut self, index: usize) {
        let Some(entry) = self.entries.get_mut(index) else { return };
        debug_assert!(self.now_ms <= entry.deadline_ms, "invariant 1");
        let number = level_of(self.now_ms, entry.deadline_ms);
        let slot = slot_of(entry.deadline_ms >> shift(number));
        let Some(level) = self.levels.get_mut(number) else { return };
        let Some(head) = level.heads.get_mut(slot as usize) else { return };
        debug_assert!((*head == NONE) == (level.occupied & 1 << slot == 0), "invariant 3");
        entry.next = std::mem::replace(head, index);
        level.occupied |= 1 << slot;
    }
}

/// log2 of the milliseconds of a slot of a level.
const fn shift(level: usize) -> usize {
    level * SLOT_BITS
}

/// The slot of a time counted in slots of its level.
fn slot_of(time: u64) -> u32 {
    (time % SLOTS) as u32
}

/// The lowest level on which the slot of the deadline is not that of the present; 0 if there is none. The last level also
/// takes what differs only beyond it: within [`SPAN_MS`] the slots of that level differ too.
fn level_of(now_ms: u64, deadline_ms: u64) -> usize {
    let highest_bit = (now_ms ^ deadline_ms).checked_ilog2().unwrap_or(0) as usize;
    (highest_bit / SLOT_BITS).min(LEVELS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY_MS: u64 = 24 * 60 * 60 * 1000;

    fn key(number: u64) -> Key {
        Key::from_u64(number)
    }

    fn expire(wheel: &mut Wheel, now_ms: u64) -> Vec<Key> {
        let mut fired = Vec::new();
        wheel.expire(now_ms, &mut fired);
        fired.sort();
        fired
    }

    /// Follows `next_expiry` until the only entry fires and says when that was and how many wake-ups it took.
    fn run(wheel: &mut Wheel) -> (u64, usize) {
        for wakes in 1.. {
            let now_ms = wheel.next_expiry().unwrap();
            if !expire(wheel, now_ms).is_empty() {
                return (now_ms, wakes);
            }
        }
        unreachable!()
    }

    #[test]
    fn every_short_deadline_fires_on_time_from_every_phase() {
        for start in (0..300).chain([4095, 4096, 262_143, (1 << 30) - 1, (1 << 30) - 64, u64::MAX - 9000]) {
            for delay in (0..300).chain([4095, 4096, 4097, 8191]) {
                let mut wheel = Wheel::new(start);
                wheel.arm(start + delay, key(1));
                let (fired_ms, wakes) = run(&mut wheel);
                assert_eq!(fired_ms, start + delay);
                assert!(wakes <= LEVELS);
                assert_eq!(wheel.next_expiry(), None);
                assert!(wheel.entries.is_empty());
            }
        }
    }

    #[test]
    fn long_deadlines_fire_on_time_and_longer_ones_at_the_end_of_the_span() {
        for start in [0, 1, 63, 64, (1 << 30) - 1, 123_456_789_012] {
            for delay in [4 * DAY_MS, 12 * DAY_MS, SPAN_MS - 1, SPAN_MS, SPAN_MS + 1, 1 << 30, u64::MAX - start] {
                let mut wheel = Wheel::new(start);
                wheel.arm(start + delay, key(1));
                assert_eq!(run(&mut wheel).0, start + delay.min(SPAN_MS));
            }
        }
    }

    #[test]
    fn what_is_due_fires_at_the_next_call_even_without_a_tick() {
        let mut wheel = Wheel::new(1000);
        wheel.arm(5, key(1));
        wheel.arm(1000, key(2));
        wheel.arm(1001, key(3));
        assert_eq!(wheel.next_expiry(), Some(1000));
        assert_eq!(expire(&mut wheel, 1000), [key(1), key(2)]);
        wheel.arm(999, key(4));
        assert_eq!(expire(&mut wheel, 1000), [key(4)]);
        assert_eq!(expire(&mut wheel, 0), []);
        assert_eq!(wheel.next_expiry(), Some(1001));
        assert_eq!(expire(&mut wheel, 1001), [key(3)]);
    }

    #[test]
    fn one_key_may_be_armed_many_times() {
        let mut wheel = Wheel::new(0);
        (0..200).for_each(|deadline| wheel.arm(deadline, key(9)));
        assert_eq!(expire(&mut wheel, 99).len(), 100);
        assert_eq!(expire(&mut wheel, 10_000), [key(9); 100]);
    }

    #[test]
    fn memory_is_that_of_the_most_entries() {
        let mut wheel = Wheel::new(0);
        for now_ms in (0..10_000).map(|round| round * 150_001) {
            assert_eq!(expire(&mut wheel, now_ms).len(), if now_ms == 0 { 0 } else { 8 });
            (0..8).for_each(|n| wheel.arm(now_ms + n * 20_000, key(n)));
        }
        assert!(wheel.entries.capacity() <= 16);
    }

    #[test]
    fn it_agrees_with_a_naive_model() {
        for seed in 1..=60_u64 {
            // Xorshift: reproducible, and enough to reach every corner.
            let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut random = |below: u64| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state % below
            };
            let mut now_ms = random(1 << 32);
            let mut wheel = Wheel::new(now_ms);
            let mut model: Vec<(u64, Key)> = Vec::new();
            for step in 0..3000 {
                let reach = 1 << random(31);
                match random(4) {
                    0..=1 => {
                        let deadline_ms = (now_ms + random(reach)).saturating_sub(random(10));
                        wheel.arm(deadline_ms, key(step));
                        model.push((deadline_ms.clamp(now_ms, now_ms + SPAN_MS), key(step)));
                    }
                    2 => {
                        let fewer = random(12);
                        now_ms += random((reach >> fewer).max(1));
                    }
                    _ => now_ms = now_ms.max(wheel.next_expiry().unwrap_or(0)),
                }
                let earliest = model.iter().map(|&(deadline_ms, _)| deadline_ms).min();
                let next = wheel.next_expiry();
                assert_eq!(next.is_some(), earliest.is_some(), "seed {seed}");
                assert!(next <= earliest, "seed {seed}: {next:?} is after {earliest:?}");
                let mut due: Vec<Key> =
                    model.iter().filter(|&&(deadline_ms, _)| deadline_ms <= now_ms).map(|&(_, key)| key).collect();
                due.sort();
                model.retain(|&(deadline_ms, _)| deadline_ms > now_ms);
                assert_eq!(expire(&mut wheel, now_ms), due, "seed {seed} step {step}");
            }
        }
    }
}
