//! What requests ask for, as far as a quota counts it.

use crate::proto::wire::{kind, RequestHead};
use std::ops::{Add, AddAssign};

/// What some requests ask for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Load {
    /// How many they are.
    pub requests: u64,
    /// The bytes of data that go over the wire for them. What zeroes, trims or looks ahead moves none.
    pub bytes: u64,
}

impl Load {
    pub(super) fn of(head: &RequestHead) -> Self {
        let has_data = matches!(head.kind, kind::READ | kind::WRITE);
        Self { requests: 1, bytes: if has_data { head.length.into() } else { 0 } }
    }
}

impl Add for Load {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let bytes = self.bytes.saturating_add(other.bytes);
        Self { requests: self.requests.saturating_add(other.requests), bytes }
    }
}

impl AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}
