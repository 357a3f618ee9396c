//! Migrations over a link of a known speed, between two network namespaces.

use crate::support::peers::{expect_migrated, listen_after, start_mirror};
use crate::support::{pattern, wait_for, Link, Server, SOON};
use std::time::Instant;

/// The speed of the link, in bytes per second.
const LINK: u64 = 40_000_000;
/// The size of the image.
const SIZE: u64 = 48 << 20;

/// Bytes per second of a migration over the link, in the middle of it: how it begins, and how long the disk of the
/// destination takes to flush, says nothing about the link. Never more than it was: the time it takes to ask counts.
fn speed(test: &str, options: &str) -> Option<u64> {
    let link = Link::new(test)?;
    if !link.shape(LINK) {
        return None;
    }
    let source = Server::serve().through(&link.inside(0)).addr(Link::NEAR).content(&pattern(1, SIZE as usize));
    let mut source = source.start();
    let command = format!("exec {}", link.inside(1).join(" "));
    let mut destination = listen_after(0, &command).addr(Link::FAR).size(SIZE).start();
    start_mirror(&source, destination.address(), options);
    let arrival = |least: u64| {
        wait_for("data", SOON, || {
            let asked = Instant::now();
            let received = destination.status().number("written_bytes");
            (received >= least).then_some((received, asked))
        })
    };
    let (first, began) = arrival(SIZE / 8);
    let (last, _) = arrival(SIZE / 8 * 7);
    let ended = Instant::now();
    expect_migrated(&mut source, &mut destination);
    let micros = u64::try_from((ended - began).as_micros()).unwrap();
    let speed = (last - first) * 1_000_000 / micros;
    eprintln!("over a link of {LINK} bytes/s {options}: {speed} bytes/s");
    Some(speed)
}

/// Requests that wait for each other, or for a window that is too small, would leave most of the link idle. How near to
/// all of it a migration comes is no matter for a test that shares its machine.
#[test]
fn a_link_is_used() {
    if let Some(speed) = speed("full", "") {
        assert!(speed >= LINK / 2, "{speed} of {LINK} bytes/s");
    }
}

#[test]
fn a_limit_is_held() {
    const LIMIT: u64 = 16_000_000;
    if let Some(speed) = speed("limit", &format!("--max-speed {LIMIT}")) {
        assert!((LIMIT / 2..LIMIT / 10 * 11).contains(&speed), "{speed} with a limit of {LIMIT} bytes/s");
    }
}
