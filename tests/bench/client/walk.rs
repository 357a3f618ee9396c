//! PURE: which block of the range a request is about.

/// The order of the blocks.
pub enum Walk {
    /// Each connection goes through a part of its own, over and over.
    Sequential { parts: Vec<Part> },
    /// All connections together meet each block once, then once more in another order.
    Random { blocks: u64, bits: u32, key: u64, next: u64 },
}

/// The blocks of a connection and where it is.
pub struct Part {
    first: u64,
    end: u64,
    next: u64,
}

impl Walk {
    pub fn sequential(blocks: u64, connections: usize) -> Self {
        let each = blocks / connections as u64;
        let part = |number: u64| Part { first: number * each, end: (number + 1) * each, next: number * each };
        Self::Sequential { parts: (0..connections as u64).map(part).collect() }
    }

    pub fn random(blocks: u64, seed: u64) -> Self {
        Self::Random { blocks, bits: blocks.next_power_of_two().trailing_zeros(), key: mix(seed), next: 0 }
    }

    /// The next block for a connection.
    pub fn next(&mut self, connection: usize) -> u64 {
        match self {
            Self::Sequential { parts } => {
                let part = &mut parts[connection];
                let block = part.next;
                part.next = if block + 1 == part.end { part.first } else { block + 1 };
                block
            }
            Self::Random { blocks, bits, key, next } => loop {
                let block = shuffle(*next, *bits, *key);
                *next += 1;
                if *next >> *bits != 0 {
                    (*next, *key) = (0, mix(*key));
                }
                // At least every second one is within.
                if block < *blocks {
                    break block;
                }
            },
        }
    }
}

/// One of the permutations of the numbers of `bits` bits: each step can be undone.
fn shuffle(number: u64, bits: u32, key: u64) -> u64 {
    let mask = (1 << bits) - 1;
    let fold = bits / 2 + 1;
    let mut number = (number ^ key) & mask;
    for factor in [0x9e37_79b9_7f4a_7c15, 0xd6e8_feb8_6659_fd93, key | 1] {
        number = number.wrapping_mul(factor) & mask;
        number ^= number >> fold;
    }
    number
}

/// A number in which each bit depends on all bits of `number` (splitmix64).
pub fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

/// What `data=check` writes at `at` and after.
pub fn fill(bytes: &mut [u8], at: u64) {
    for (place, byte) in (at..).zip(bytes) {
        *byte = expected(place);
    }
}

/// How many bytes are not what `data=check` writes at `at` and after.
pub fn differing(bytes: &[u8], at: u64) -> u64 {
    (at..).zip(bytes).filter(|&(place, &byte)| byte != expected(place)).count() as u64
}

/// Never 0, so that a hole is never what was written.
fn expected(place: u64) -> u8 {
    mix(place / 8).to_le_bytes()[(place % 8) as usize] | 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_meets_each_block_once_and_then_once_more_in_another_order() {
        for blocks in [1, 2, 3, 7, 64, 1000, 65_536, 100_001] {
            let mut walk = Walk::random(blocks, blocks);
            let mut rounds = [(); 2].map(|()| (0..blocks).map(|_| walk.next(0)).collect::<Vec<_>>());
            if blocks > 100 {
                assert_ne!(rounds[0], rounds[1]);
                // No order: about half of the steps go up, and hardly any goes to the neighbour.
                let steps =
                    |found: fn(u64, u64) -> bool| rounds[0].windows(2).filter(|w| found(w[0], w[1])).count() as u64;
                assert!((4..=6).contains(&((steps(|from, to| from < to) * 10 + blocks / 2) / blocks)));
                assert!(steps(|from, to| from.abs_diff(to) == 1) < 10 + blocks / 100);
            }
            for round in &mut rounds {
                round.sort_unstable();
                assert!(round.iter().copied().eq(0..blocks), "{blocks}");
            }
        }
    }

    #[test]
    fn sequential_goes_through_a_part_each() {
        let mut walk = Walk::sequential(9, 2);
        let mut take = |connection| [(); 6].map(|()| walk.next(connection));
        assert_eq!((take(0), take(1)), ([0, 1, 2, 3, 0, 1], [4, 5, 6, 7, 4, 5]));
    }
}
