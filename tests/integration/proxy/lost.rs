//! Nothing that was answered is lost, however often the server crashes.

use super::{before, door, PAIRS};
use crate::support::fading::{Fading, Style};
use crate::support::peers::Random;
use crate::support::shadow::{Habits, Shadowing};

const SIZE: usize = 1 << 20;

/// A client works through a proxy while the server crashes so often. What went wrong, if anything did.
fn crash(pair: (Style, Style), seed: u64, crashes: usize, options: &str) -> Result<(), String> {
    let (client_style, server_style) = pair;
    let server = Fading::start(server_style, SIZE, seed);
    let proxy = before(&server).args(options).start();
    let client = Shadowing::start(door(&proxy, client_style), SIZE, seed, Habits::usual(client_style));
    let mut random = Random::new(seed + 1);
    for _ in 0..crashes {
        if !client.goes_on(1 + random.below(100)) {
            break;
        }
        server.crash();
    }
    let shadow = client.stop().map_err(|why| format!("{why}; {}", proxy.log()))?;
    match shadow.differs(&server.durable()) {
        None => {}
        Some(sector) => return Err(format!("sector {sector} is not durable after a FLUSH")),
    }
    proxy.expect_healthy();
    Ok(())
}

#[test]
fn nothing_answered_is_lost_in_sixty_crashes() {
    for (seed, pair) in PAIRS.into_iter().enumerate() {
        assert_eq!(crash(pair, seed as u64, 15, ""), Ok(()), "{pair:?}");
    }
}

/// The map is full again and again, and nobody but the proxy asks for a FLUSH.
#[test]
fn nothing_answered_is_lost_when_the_map_is_too_small() {
    const SIZE: usize = 16 << 20;
    let server = Fading::start(Style::Newstyle, SIZE, 1);
    let proxy = before(&server).args("--replay-limit 4194304").start();
    let habits = Habits { flushes: 0, fua: 0, ..Habits::usual(Style::Oldstyle) };
    let client = Shadowing::start(proxy.address(), SIZE, 1, habits);
    for _ in 0..6 {
        if !client.goes_on(300) {
            break;
        }
        server.crash();
    }
    let status = proxy.status();
    assert!(status.number("own_flushes") > 0, "{}", status.line());
    let shadow = client.stop().unwrap_or_else(|why| panic!("{why}; {}", proxy.log()));
    assert_eq!(shadow.differs(&server.durable()), None);
    proxy.expect_healthy();
}

#[test]
#[ignore = "takes a while"]
fn nothing_answered_is_lost_in_two_hundred_crashes() {
    for (seed, pair) in PAIRS.into_iter().enumerate() {
        assert_eq!(crash(pair, 100 + seed as u64, 200, ""), Ok(()), "{pair:?}");
    }
}

/// The proof of the tests above.
#[test]
fn without_the_map_of_what_is_dirty_the_loss_is_found() {
    let pair = (Style::Newstyle, Style::Oldstyle);
    let found = (0..8).find_map(|seed| crash(pair, seed, 10, "--replay inflight").err());
    let why = found.expect("a loss");
    assert!(why.contains("sector"), "{why}");
}
