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
