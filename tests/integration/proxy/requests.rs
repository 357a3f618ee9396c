//! What becomes of single requests: too large ones, half ones, those of clients that leave, and those that the server knows
//! nothing of.

use super::before;
use crate::support::fading::{Cut, Fading, Point, Style};
use crate::support::newstyle::{structured, BLOCK_STATUS, CACHE, DF, ENOTSUP, FAST_ZERO};
use crate::support::{flag, kind, pattern, request, wait_for, SOON};
use socket2::SockRef;
use std::time::Duration;

const SIZE: usize = 1 << 20;

/// A client may ask for more than the server can be asked at once; the end of it is durable when all of it is.
#[test]
fn a_large_durable_write_is_durable_as_a_whole_also_when_the_server_crashes_half_way() {
    const LENGTH: usize = 34 << 20;
    for style in [Style::Oldstyle, Style::Newstyle] {
        let server = Fading::start(style, LENGTH + 8192, 1);
        let proxy = before(&server).start();
        let mut client = proxy.connect();
        for (seed, spared) in [(1, 0), (2, 5), (3, 1000)] {
            let image = pattern(seed, LENGTH);
            server.behave(|habits| {
                habits.forgets = true;
                habits.cuts = vec![Cut { point: Point::Reply(0), kind: kind::WRITE, spared }];
            });
            assert_eq!(client.ask(kind::WRITE, flag::FUA, 4096, LENGTH as u32, &image), 0, "{}", proxy.log());
            let durable = server.durable();
            assert!(durable[4096..4096 + LENGTH] == image, "{style:?}, {spared}");
            server.behave(|habits| habits.cuts.clear());
            assert!(client.read(4096, LENGTH as u32).unwrap() == image, "{style:?}, {spared}");
        }
        drop(client);
        proxy.expect_healthy();
    }
}

#[test]
fn half_a_write_of_a_client_that_is_gone_is_not_sent() {
    let server = Fading::start(Style::Newstyle, SIZE, 1);
    let proxy = before(&server).start();
    let mut client = proxy.connect();
    client.send_request(kind::WRITE, 0, 1, 0, 16_384, &[7; 16_383]);
    wait_for("its request", SOON, || {
        proxy.control("status json clients\n\n").contains("\"in_flight\":1").then_some(())
    });
    drop(client);
    wait_for("its end", SOON, || (proxy.status().get("num_clients") == "0").then_some(()));
    assert_eq!((server.count(kind::WRITE), proxy.status().get("in_flight")), (0, "0"));
    proxy.expect_healthy();
}

#[test]
fn what_a_client_has_asked_before_it_leaves_is_done_and_made_durable() {
    for style in [Style::Oldstyle, Style::Newstyle] {
        let server = Fading::start(style, SIZE, 1);
        let proxy = before(&server).start();
        let mut client = proxy.connect();
        server.behave(|habits| habits.held = vec![kind::WRITE]);
        for n in 0..8 {
            client.send_request(kind::WRITE, 0, n, n * 4096, 4096, &[n as u8 + 1; 4096]);
        }
        client.send(&request(kind::DISC, 0, 0, 0, 0));
        wait_for("its requests", SOON, || (proxy.status().number("in_flight") == 8).then_some(()));
        server.crash();
        server.behave(|habits| habits.held.clear());
        for _ in 0..8 {
            assert_eq!(client.read_reply().0, 0);
        }
        client.expect_closed();
        wait_for("a FLUSH", SOON, || (proxy.status().get("replay_bytes") == "0").then_some(()));
        let expected: Vec<u8> = (1..=8).flat_map(|n| [n; 4096]).collect();
        assert!(server.durable()[..expected.len()] == expected);
        proxy.expect_healthy();
    }
}

/// The FLUSH after the first one that leaves comes too early for the second one.
#[test]
fn what_the_last_of_two_clients_has_written_is_made_durable_too() {
    let server = Fading::start(Style::Newstyle, SIZE, 1);
    let proxy = before(&server).args("--max-clients 2").start();
    let (mut first, mut second) = (proxy.connect(), proxy.connect());
    server.behave(|habits| habits.held = vec![kind::FLUSH]);
    assert_eq!(first.write(0, &[1; 4096]), 0);
    drop(first);
    wait_for("a FLUSH", SOON, || (proxy.status().get("own_flushes") == "1").then_some(()));
    assert_eq!(second.write(4096, &[2; 4096]), 0);
    drop(second);
    wait_for("its end", SOON, || (proxy.status().get("num_clients") == "0").then_some(()));
    server.behave(|habits| habits.held.clear());
    wait_for("another FLUSH", SOON, || (proxy.status().get("replay_bytes") == "0").then_some(()));
    assert_eq!(server.durable()[..8192], [[1; 4096], [2; 4096]].concat());
    proxy.expect_healthy();
}

/// Its process was killed: what the server has in hand is done, and does not keep its place.
#[test]
fn a_client_that_vanishes_leaves_its_place_to_the_next() {
    let server = Fading::start(Style::Oldstyle, SIZE, 1);
    let proxy = before(&server).start();
    let mut client = proxy.connect();
    server.behave(|habits| habits.held = vec![kind::WRITE]);
    client.send_request(kind::WRITE, 0, 1, 0, 4096, &[7; 4096]);
    wait_for("its request", SOON, || (proxy.status().number("in_flight") == 1).then_some(()));
    SockRef::from(&client.stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let mut next = proxy.connect();
    assert_eq!(next.read(65_536, 4096).unwrap(), [0; 4096]);
    // It changes what an unanswered one changes, and comes after it.
    next.send_request(kind::WRITE, 0, 2, 0, 512, &[9; 512]);
    server.behave(|habits| habits.held.clear());
    assert_eq!(next.read_reply(), (0, 2));
    assert_eq!(next.read(0, 1024).unwrap(), [[9; 512], [7; 512]].concat());
    drop(next);
    proxy.expect_healthy();
}

#[test]
fn what_an_oldstyle_server_knows_nothing_of_is_done_without_it() {
    let mut server = Fading::start(Style::Oldstyle, SIZE, 1);
    server.down();
    server.behave(|habits| habits.flags = 1 | 4);
    server.up();
    let proxy = before(&server).start();
    let mut client = structured(&proxy);
    assert_eq!(client.client.write(0, &[7; 8192]), 0);
    assert_eq!(client.block_status(0, 0, SIZE as u32), Ok(vec![(SIZE as u32, 0)]), "all of it is data");
    assert_eq!(client.client.ask(CACHE, 0, 0, 4096, &[]), 0);
    assert_eq!(client.client.ask(kind::WRITE_ZEROES, FAST_ZERO, 0, 4096, &[]), ENOTSUP);
    assert_eq!(client.read(0, 0, 8192).unwrap().0, [7; 8192]);
    assert_eq!(client.client.ask(kind::WRITE_ZEROES, flag::NO_HOLE, 0, 4096, &[]), 0);
    assert_eq!(client.read(DF, 0, 8192).unwrap().0, [[0; 4096], [7; 4096]].concat());
    let kinds: Vec<u16> = server.executed().iter().map(|executed| executed.kind).collect();
    assert!(!kinds.contains(&CACHE) && !kinds.contains(&BLOCK_STATUS) && !kinds.contains(&kind::WRITE_ZEROES));
    drop(client);
    proxy.expect_healthy();
}

#[test]
fn holes_of_the_server_are_passed_on() {
    let server = Fading::start(Style::Newstyle, SIZE, 1);
    let proxy = before(&server).start();
    let mut client = structured(&proxy);
    assert_eq!(client.client.write(65_536, &[7; 4096]), 0);
    let extents = vec![(65_536, 3), (4096, 0), (SIZE as u32 - 69_632, 3)];
    assert_eq!(client.block_status(0, 0, SIZE as u32), Ok(extents));
    let (data, found) = client.read(0, 0, 131_072).unwrap();
    let (before, behind) = data.split_at(65_536);
    assert!(behind[..4096] == [7; 4096] && before.iter().chain(&behind[4096..]).all(|&byte| byte == 0));
    assert!(found.iter().any(|content| content.is_hole), "what is a hole there is one here");
    drop(client);
    proxy.expect_healthy();
}
