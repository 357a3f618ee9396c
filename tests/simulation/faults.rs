//! An attempt that fails at every step there is, from the first to the commit.

use crate::world::{run, Client, Setup};
use flexnbd::migrate::Abilities;

#[test]
fn an_attempt_may_fail_at_every_step() {
    for (zero, flush) in [(true, true), (false, true), (true, false), (false, false)] {
        let size = 3 * 65_536 + 4_608;
        let clients = vec![Client { zeroes: 4, ..Client::steady(0..size, 2_048, 200_000) }];
        let can = Abilities { zero, flush };
        let mut setup = Setup { can, holes: 2, link_bytes_per_s: 20_000_000, clients, ..Setup::new(7, size) };
        let steps = run(&setup).steps;
        assert!((10..2_000).contains(&steps), "{steps} steps");
        for step in 0..steps {
            setup.lost_at = Some(step);
            assert_eq!(run(&setup).attempts, 2, "lost at step {step}");
        }
    }
}

#[test]
fn zeroes_that_are_refused_are_sent_as_data_in_the_same_attempt() {
    for (holes, zeroes) in [(1, 0), (2, 4)] {
        let size = 64 << 20;
        let clients = vec![Client { zeroes, ..Client::steady(0..size, 64 << 10, 5_000_000) }];
        let out = run(&Setup { refuses_zeroes: true, holes, clients, ..Setup::new(3, size) });
        assert_eq!(out.attempts, 1);
        assert!((size..size * 2).contains(&out.sent_bytes), "{out:?}");
    }
}
