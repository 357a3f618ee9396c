//! A slab whose keys are never mistaken for those of a slot that came later.
//!
//! Invariant 1: no two keys of one [`Slots`] are equal, as long as fewer than 2^32 insertions lie between them. A key would
//! have to be kept that long, and its index be in use just then, to find a slot that is not its own.

use std::fmt;

use mio::Token;
use slab::Slab;

/// Names one slot for as long as it lives, and nothing afterwards.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct Key {
    index: u32,
    generation: u32,
}

impl Key {
    /// The key as a number, for interfaces that pass a number along.
    pub fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    /// The key from which [`Key::to_u64`] made this number.
    pub fn from_u64(number: u64) -> Self {
        Self { index: (number & 0xffff_ffff) as u32, generation: (number >> 32) as u32 }
    }

    /// The key as the token under which its slot is registered with poll.
    pub fn token(self) -> Token {
        // By way of bytes, so that this does not compile for a target whose usize is not 64 bits wide.
        Token(usize::from_ne_bytes(self.to_u64().to_ne_bytes()))
    }

    /// The key from which [`Key::token`] made this token.
    pub fn from_token(token: Token) -> Self {
        Self::from_u64(u64::from_ne_bytes(token.0.to_ne_bytes()))
    }

    /// The place of its slot: a small number that is soon used again.
    pub(super) fn index(self) -> usize {
        self.index as usize
    }
}

/// Only the index: short, and unique among the slots that are there.
impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.index.fmt(f)
    }
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: T,
}

/// Values by [`Key`], each reached in constant time.
#[derive(Debug)]
pub struct Slots<T> {
    slab: Slab<Slot<T>>,
    next_generation: u32,
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self { slab: Slab::new(), next_generation: 0 }
    }
}

impl<T> Slots<T> {
    /// Inserts the value that `make` makes for its key, such as a socket registered under it. When `make` fails, nothing is
    /// inserted, the error is returned and the key is not used again.
    pub fn try_insert_with<E>(&mut self, make: impl FnOnce(Key) -> Result<T, E>) -> Result<Key, E> {
        let generation = self.next_generation;
        self.next_generation = generation.wrapping_add(1);
        let vacant = self.slab.vacant_entry();
        let key = key_at(vacant.key(), generation);
        vacant.insert(Slot { generation, value: make(key)? });
        Ok(key)
    }

    /// The value of `key`, if it is still there.
    pub fn get(&self, key: Key) -> Option<&T> {
        self.slab.get(key.index()).filter(|slot| slot.generation == key.generation).map(|slot| &slot.value)
    }

    /// The value of `key`, if it is still there.
    pub fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        self.slab.get_mut(key.index()).filter(|slot| slot.generation == key.generation).map(|slot| &mut slot.value)
    }

    /// Removes the value of `key`, if it is still there. From then on the key finds nothing.
    pub fn remove(&mut self, key: Key) -> Option<T> {
        self.get(key)?;
        self.slab.try_remove(key.index()).map(|slot| slot.value)
    }

    /// All values with their keys, in the order of their indices.
    pub fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slab.iter().map(|(index, slot)| (key_at(index, slot.generation), &slot.value))
    }
}

/// The key of the slot at `index`.
fn key_at(index: usize, generation: u32) -> Key {
    let index = u32::try_from(index);
    debug_assert!(index.is_ok(), "memory ends long before 2^32 slots");
    Key { index: index.unwrap_or(u32::MAX), generation }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    fn insert<T>(slots: &mut Slots<T>, make: impl FnOnce(Key) -> T) -> Key {
        slots.try_insert_with(|key| Ok::<_, Infallible>(make(key))).unwrap()
    }

    #[test]
    fn a_key_survives_the_way_through_numbers_and_tokens() {
        for (index, generation) in [(0, 0), (1, 2), (u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
            let key = Key { index, generation };
            assert_eq!(Key::from_u64(key.to_u64()), key);
            assert_eq!(Key::from_token(key.token()), key);
            assert_eq!(key.to_string(), index.to_string());
        }
    }

    #[test]
    fn an_old_key_finds_nothing() {
        let mut slots = Slots::default();
        let old = insert(&mut slots, |_| "old");
        assert_eq!(slots.remove(old), Some("old"));
        let new = insert(&mut slots, |_| "new");
        assert_eq!(new.index(), old.index());
        assert_eq!(slots.get(old), None);
        assert_eq!(slots.get_mut(old), None);
        assert_eq!(slots.remove(old), None);
        assert_eq!((slots.get(new), slots.iter().count()), (Some(&"new"), 1));
    }

    #[test]
    fn a_failed_insertion_leaves_nothing_and_uses_up_its_key() {
        let mut slots = Slots::<u8>::default();
        let mut seen = None;
        assert_eq!(slots.try_insert_with(|key| Err::<u8, _>(seen.insert(key).index())), Err(0));
        assert_eq!(slots.iter().count(), 0);
        let key = insert(&mut slots, |_| 7);
        assert_ne!(Some(key), seen);
    }

    #[test]
    fn generations_wrap() {
        let mut slots = Slots { next_generation: u32::MAX, ..Slots::default() };
        let last = insert(&mut slots, |key| key);
        slots.remove(last);
        let first = insert(&mut slots, |key| key);
        assert_eq!((last.generation, first.generation), (u32::MAX, 0));
        assert_eq!((slots.get(last), slots.get(first)), (None, Some(&first)));
    }

    #[test]
    fn an_iterator_yields_every_value_with_its_key() {
        let mut slots = Slots::default();
        let keys: Vec<Key> = (0..5).map(|n| insert(&mut slots, |_| n)).collect();
        slots.remove(keys[2]);
        let seen: Vec<(Key, i32)> = slots.iter().map(|(key, &value)| (key, value)).collect();
        assert_eq!(seen, [(keys[0], 0), (keys[1], 1), (keys[3], 3), (keys[4], 4)]);
    }
}
