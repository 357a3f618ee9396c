//! `flexnbd switch`: a proxy goes over to another server.

use super::{before, PAIRS};
use crate::support::fading::{Fading, Style};
use crate::support::peers::{tell, wait_for_status};
use crate::support::shadow::{Habits, Shadowing};
use crate::support::{kind, wait_for, Server, SOON};
use std::net::SocketAddr;
use std::time::Duration;

const SIZE: usize = 1 << 20;

/// Runs the mode; returns its code and what it said.
#[track_caller]
fn switch(proxy: &Server, to: SocketAddr, more: &str) -> (Option<i32>, String) {
    tell("switch", proxy, &format!("--conn-addr {} --conn-port {} {more}", to.ip(), to.port()))
}

/// What one server has, the other gets while nobody writes, as if it were the same disk.
fn copy(from: &Fading, to: &Fading) {
    to.overwrite(&from.content());
}

#[test]
fn now_while_a_client_waits_between_two_requests() {
    for (style, other_style) in PAIRS {
        let (old, new) = (Fading::start(style, SIZE, 1), Fading::start(other_style, SIZE, 2));
        let proxy = before(&old).start();
        let mut client = proxy.connect();
        assert_eq!(client.write(0, &[7; 4096]), 0);
        copy(&old, &new);
        let (code, said) = switch(&proxy, new.address, "--wait");
        assert_eq!((code, &*said), (Some(0), "switched\n"), "{}", proxy.log());
        // The old one has all of it on stable storage, and was told goodbye.
        assert_eq!(old.durable()[..4096], [7; 4096]);
        assert_eq!(client.write(4096, &[8; 4096]), 0);
        assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
        assert_eq!((old.count(kind::WRITE), new.count(kind::WRITE)), (1, 1));
        let status = proxy.status();
        assert_eq!(status.get("upstream"), new.address.to_string());
        assert_eq!((status.get("upstream_state"), status.get("num_clients")), ("connected", "1"));
        drop(client);
        proxy.expect_healthy();
    }
}

/// Both doors lead to one disk, so that no request may be lost on the way.
#[test]
fn now_to_itself_under_load() {
    for (client_style, server_style) in PAIRS {
        let server = Fading::start(server_style, SIZE, 1);
        let proxy = before(&server).start();
        let client = Shadowing::start(super::door(&proxy, client_style), SIZE, 3, Habits::usual(client_style));
        for round in 1..=5 {
            assert!(client.goes_on(30), "{}", proxy.log());
            let (code, said) = switch(&proxy, server.address, "");
            assert_eq!((code, &*said), (Some(0), "switching\n"), "{}", proxy.log());
            wait_for("another connection", SOON, || (server.connections() == round + 1).then_some(()));
            wait_for_status(&proxy, "upstream_state", "connected");
        }
        let shadow = client.stop().unwrap_or_else(|why| panic!("{why}; {}", proxy.log()));
        assert_eq!(shadow.differs(&server.durable()), None);
        proxy.expect_healthy();
    }
}

#[test]
fn when_lost_waits_for_the_end_of_the_connection() {
    let (mut old, new) = (Fading::start(Style::Oldstyle, SIZE, 1), Fading::start(Style::Newstyle, SIZE, 2));
    let proxy = before(&old).start();
    let mut client = proxy.connect();
    assert_eq!(client.write(0, &[7; 4096]), 0);
    let (code, said) = switch(&proxy, new.address, "--when-lost");
    assert_eq!((code, &*said), (Some(0), "armed\n"));
    assert_eq!(client.write(4096, &[8; 4096]), 0);
    assert_eq!((new.connections(), proxy.status().get("upstream")), (0, &*old.address.to_string()));
    old.down();
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096], "what was not durable was written again");
    assert_eq!(client.read(4096, 4096).unwrap(), [8; 4096]);
    assert_eq!(proxy.status().get("upstream"), new.address.to_string());
    // It is used once.
    old.up();
    new.crash();
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
    assert_eq!((old.connections(), proxy.status().get("upstream")), (1, &*new.address.to_string()));
    drop(client);
    proxy.expect_healthy();
}

#[test]
fn when_lost_the_old_server_may_be_the_first_that_serves() {
    let (old, mut new) = (Fading::start(Style::Oldstyle, SIZE, 1), Fading::start(Style::Newstyle, SIZE, 2));
    new.down();
    let proxy = before(&old).start();
    let mut client = proxy.connect();
    assert_eq!(client.write(0, &[7; 4096]), 0);
    assert_eq!(switch(&proxy, new.address, "--when-lost").0, Some(0));
    old.crash();
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
    assert_eq!((old.connections(), proxy.status().get("upstream")), (2, &*old.address.to_string()));
    drop(client);
    proxy.expect_healthy();
}

#[test]
fn a_server_of_another_size_is_refused() {
    let (old, new) = (Fading::start(Style::Oldstyle, SIZE, 1), Fading::start(Style::Oldstyle, 2 * SIZE, 2));
    let proxy = before(&old).start();
    let mut client = proxy.connect();
    assert_eq!(client.write(0, &[7; 4096]), 0);
    assert_eq!(switch(&proxy, new.address, "").0, Some(0));
    wait_for_status(&proxy, "upstream_state", "refused");
    let errors = proxy.log().lines().filter(|line| line.contains(":E:")).count();
    assert_eq!(errors, 1, "{}", proxy.log());
    // The operator goes back.
    assert_eq!(switch(&proxy, old.address, "--wait").0, Some(0));
    assert_eq!(client.read(0, 4096).unwrap(), [7; 4096]);
    assert_eq!(new.executed().len(), 0);
    drop(client);
    proxy.expect_healthy();
}

#[test]
fn from_a_server_that_is_away_what_is_kept_goes_to_the_other() {
    let (mut old, new) = (Fading::start(Style::Oldstyle, SIZE, 1), Fading::start(Style::Newstyle, SIZE, 2));
    let proxy = before(&old).start();
    let mut client = proxy.connect();
    assert_eq!(client.write(0, &[7; 4096]), 0);
    old.down();
    client.send_request(kind::WRITE, 0, 3, 4096, 4096, &[8; 4096]);
    wait_for_status(&proxy, "upstream_state", "connecting");
    assert_eq!(switch(&proxy, new.address, "").0, Some(0));
    assert_eq!(client.read_reply(), (0, 3));
    assert_eq!(client.read(0, 8192).unwrap(), [[7; 4096], [8; 4096]].concat());
    drop(client);
    proxy.expect_healthy();
}

/// Ten seconds without an answer, and everything is as before.
#[test]
fn a_server_that_does_not_finish_is_kept() {
    let (old, new) = (Fading::start(Style::Oldstyle, SIZE, 1), Fading::start(Style::Oldstyle, SIZE, 2));
    let proxy = before(&old).start();
    let mut client = proxy.connect();
    assert_eq!(client.write(0, &[7; 4096]), 0);
    old.behave(|habits| habits.held = vec![kind::WRITE]);
    client.send_request(kind::WRITE, 0, 3, 4096, 4096, &[8; 4096]);
    wait_for("its request", SOON, || (proxy.status().number("in_flight") == 1).then_some(()));
    assert_eq!(switch(&proxy, new.address, "").0, Some(0));
    wait_for_status(&proxy, "upstream_state", "switching");
    let (code, said) = switch(&proxy, new.address, "");
    assert_eq!(code, Some(1), "{said}");
    proxy.wait_for_log("not switched");
    // Who waits for it hears that, too.
    let (code, said) = switch(&proxy, new.address, "--wait");
    assert!(code == Some(1) && said.contains("not switched"), "{code:?} {said}");
    old.behave(|habits| habits.held.clear());
    assert_eq!(client.read_reply(), (0, 3));
    assert_eq!((new.connections(), proxy.status().get("upstream_state")), (0, "connected"));
    drop(client);
    proxy.expect_healthy();
}

#[test]
fn a_server_that_dies_before_it_has_finished_is_left_at_once() {
    let (mut old, new) = (Fading::start(Style::Oldstyle, SIZE, 1), Fading::start(Style::Oldstyle, SIZE, 2));
    let proxy = before(&old).start();
    let mut client = proxy.connect();
    old.behave(|habits| habits.held = vec![kind::WRITE]);
    client.send_request(kind::WRITE, 0, 3, 4096, 4096, &[8; 4096]);
    wait_for("its request", SOON, || (proxy.status().number("in_flight") == 1).then_some(()));
    assert_eq!(switch(&proxy, new.address, "").0, Some(0));
    wait_for_status(&proxy, "upstream_state", "switching");
    old.down();
    assert_eq!(client.read_reply(), (0, 3));
    assert_eq!(client.read(4096, 4096).unwrap(), [8; 4096]);
    assert_eq!(proxy.status().get("upstream"), new.address.to_string());
    assert!(!proxy.log().contains("not switched"), "{}", proxy.log());
    drop(client);
    proxy.expect_healthy();
}

/// What is not kept is flushed all the same before the server is left: a FLUSH of the other one would not do that.
#[test]
fn the_old_server_is_flushed_whatever_is_kept() {
    for replay in ["dirty", "inflight", "none"] {
        let (old, new) = (Fading::start(Style::Oldstyle, SIZE, 1), Fading::start(Style::Oldstyle, SIZE, 2));
        let proxy = before(&old).args(&format!("--replay {replay}")).start();
        let mut client = proxy.connect();
        assert_eq!(client.write(0, &[7; 4096]), 0);
        assert_eq!(switch(&proxy, new.address, "--wait").0, Some(0));
        assert_eq!(old.durable()[..4096], [7; 4096], "{replay}");
        drop(client);
        proxy.expect_healthy();
    }
}

#[test]
fn a_server_that_is_no_proxy_says_so() {
    let server = Server::serve().size(SIZE as u64).start();
    let (code, said) = switch(&server, server.address(), "");
    assert_eq!(code, Some(1));
    assert!(said.contains("no proxy"), "{said}");
    for (line, code) in [
        ("upstream\n\n", 1),
        ("upstream\n127.0.0.1\n\n", 1),
        ("upstream\nx\n1\n\n", 1),
        ("upstream\n127.0.0.1\n0\n\n", 1),
        ("upstream\n127.0.0.1\n1\nsoon\n\n", 1),
    ] {
        let answer = server.control(line);
        assert!(answer.starts_with(&format!("{code}: ")), "{line:?}: {answer}");
    }
    server.connect().expect_silence(Duration::from_millis(10));
    server.expect_healthy();
}
