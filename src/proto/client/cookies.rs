//! The cookies that a client gives its commands.

/// How many there are.
const SPAN: u64 = 1 << 16;

/// So many cookies in a row, given out one after the other and then over again. No session has so many commands under way.
///
/// When the first one was chosen at random, a command is recognised by its cookie wherever it turns up: the chance that
/// another's cookie falls among them is 1 in 2^48.
#[derive(Debug, Clone, Copy)]
pub struct Cookies {
    first: u64,
}

impl Cookies {
    /// Those from `first` on.
    pub fn starting_at(first: u64) -> Self {
        Self { first }
    }

    /// The cookie of the command before which `n` were given.
    pub(super) fn nth(self, n: u64) -> u64 {
        self.first.wrapping_add(n % SPAN)
    }

    /// True for one of them.
    pub fn contains(self, cookie: u64) -> bool {
        cookie.wrapping_sub(self.first) < SPAN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_are_known_by_the_first_wherever_that_is() {
        for first in [0, 1, 0x1234_5678_9abc_def0, u64::MAX - 5, u64::MAX] {
            let cookies = Cookies::starting_at(first);
            for n in [0, 1, 6, SPAN - 1, SPAN, 3 * SPAN - 1, u64::MAX] {
                assert!(cookies.contains(cookies.nth(n)), "{n} from {first}");
            }
            assert_eq!(cookies.nth(SPAN + 7), cookies.nth(7));
            assert_ne!(cookies.nth(8), cookies.nth(7));
            assert!(!cookies.contains(first.wrapping_sub(1)) && !cookies.contains(first.wrapping_add(SPAN)));
        }
    }
}
