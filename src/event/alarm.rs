//! A deadline and its one entry in the wheel.
//!
//! The wheel never forgets an entry, so a slot that armed it with every change of its deadline would leave entries behind.
//! Instead the slot keeps its true deadline to itself, and arms the wheel only for a time before that of its entry. When
//! the entry fires, the slot looks at the true deadline and arms again.

use super::slots::Key;
use super::wheel::Wheel;

/// The earliest entry of a slot in the wheel.
#[derive(Debug, Clone, Copy)]
pub struct Alarm {
    armed_ms: u64,
}

impl Default for Alarm {
    fn default() -> Self {
        Self { armed_ms: u64::MAX }
    }
}

impl Alarm {
    /// Makes sure that an entry fires at `at_ms` or before.
    pub fn arm(&mut self, at_ms: u64, key: Key, wheel: &mut Wheel) {
        if at_ms < self.armed_ms {
            wheel.arm(at_ms, key);
            self.armed_ms = at_ms;
        }
    }

    /// An entry has fired. True when it is the one that counts; false when an earlier one has overtaken it.
    pub fn fired(&mut self, now_ms: u64) -> bool {
        let counts = self.armed_ms <= now_ms;
        if counts {
            self.armed_ms = u64::MAX;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::super::slots::Slots;
    use super::*;

    #[test]
    fn only_the_earliest_entry_counts() {
        let key = Slots::default().try_insert_with(|_| Ok::<_, ()>(())).unwrap();
        let mut wheel = Wheel::new(0);
        let mut alarm = Alarm::default();
        alarm.arm(500, key, &mut wheel);
        alarm.arm(900, key, &mut wheel);
        alarm.arm(200, key, &mut wheel);
        let mut fired = Vec::new();
        wheel.expire(300, &mut fired);
        assert_eq!((fired.drain(..).count(), alarm.fired(300)), (1, true));
        alarm.arm(900, key, &mut wheel);
        wheel.expire(600, &mut fired);
        assert_eq!((fired.drain(..).count(), alarm.fired(600)), (1, false), "overtaken");
        wheel.expire(1000, &mut fired);
        assert_eq!((fired.drain(..).count(), alarm.fired(1000)), (1, true));
    }
}
