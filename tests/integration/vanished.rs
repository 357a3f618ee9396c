//! Peers that vanish while something is on its way to them, and peers that only do not read.

use crate::support::peers::{expect_migrated, listen_after, start_mirror, tell};
use crate::support::{kind, pattern, program, request, run_command, wait_for, Link, Process, Server, BIN, SOON};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// More than all sockets and pipes between a server and a reader hold.
const LARGE: u64 = 64 << 20;
/// How long the server may take to miss a peer.
const MISSED: Duration = Duration::from_secs(60);

/// `flexnbd read` at the far end, from one of its addresses.
fn reader(link: &Link, server: &Server, from: &str, size: u64) -> Command {
    let words = link.inside(1);
    let mut command = program(words[0]);
    command.args(&words[1..]).arg(BIN).args(["read", "--addr", Link::NEAR, "--port", &server.port().to_string()]);
    command.args(["--from", "0", "--size", &size.to_string(), "--bind", from]);
    command
}

/// Waits until nobody but so many peers is connected; returns how long that took.
#[track_caller]
fn until_missed(server: &Server, left: u64) -> Duration {
    let began = Instant::now();
    wait_for("a peer to be missed", MISSED + SOON, || (server.status().number("num_clients") == left).then_some(()));
    eprintln!("missed after {:?}: {}", began.elapsed(), server.log());
    began.elapsed()
}

#[test]
#[ignore = "takes a minute"]
fn a_client_that_vanishes_makes_room_and_one_that_is_stopped_stays() {
    const OTHER: &str = "10.77.0.3";
    let Some(link) = Link::new("client") else { return };
    link.add_far(OTHER);
    let server = Server::serve().through(&link.inside(0)).addr(Link::NEAR).size(LARGE).arg("--max-clients=2").start();
    // Nobody reads these pipes, so that the readers read no more than fits into them.
    let [mut stays, goes] = [Link::FAR, OTHER]
        .map(|from| Process::spawn(reader(&link, &server, from, LARGE).stdin(Stdio::null()).stdout(Stdio::piped())));
    wait_for("two replies on their way", SOON, || {
        (tell("status", &server, "--clients").1.matches("in_flight=1").count() == 2).then_some(())
    });
    stays.signal("STOP");
    goes.signal("STOP");
    link.remove_far(OTHER);
    until_missed(&server, 1);
    let log = server.log();
    let why = log.lines().find(|text| text.contains(OTHER)).unwrap();
    assert!(why.contains(":W:") && why.contains("it is gone: nothing was acknowledged for "), "{log}");

    // Whoever comes back gets in again.
    link.add_far(OTHER);
    let again = run_command(&mut reader(&link, &server, OTHER, 512), &[]);
    assert_eq!((again.code, again.stdout.len()), (Some(0), 512), "{}", again.stderr);
    // The other one has not noticed anything.
    stays.signal("CONT");
    let read = io::copy(&mut stays.0.stdout.take().unwrap(), &mut io::sink()).unwrap();
    assert_eq!((read, stays.wait(SOON).code()), (LARGE, Some(0)), "{}", server.log());
}

#[test]
#[ignore = "takes a minute"]
fn a_sender_that_vanishes_gets_in_again_when_it_comes_back() {
    const SIZE: usize = 32 << 20;
    let Some(link) = Link::new("sender") else { return };
    // What is still on the link then is answered, and the answers find nobody.
    if !link.shape(4_000_000) {
        return;
    }
    let limit = ["env", "FLEXNBD_MS_REQUEST_LIMIT_SECS=2"];
    let source = Server::serve().through(&[&link.inside(1)[..], &limit].concat()).addr(Link::FAR);
    let mut source = source.content(&pattern(1, SIZE)).start();
    let command = format!("exec {}", link.inside(0).join(" "));
    let mut listener = listen_after(0, &command).addr(Link::NEAR).size(SIZE as u64).start();
    start_mirror(&source, listener.address(), "");
    wait_for("data", SOON, || (listener.status().number("written_bytes") >= 1 << 20).then_some(()));
    link.remove_far(Link::FAR);
    until_missed(&listener, 0);
    assert_eq!(listener.status().get("has_control"), "false");
    link.add_far(Link::FAR);
    expect_migrated(&mut source, &mut listener);
}

/// A server that is idle sleeps, whoever is connected.
#[test]
fn only_peers_to_whom_something_is_on_its_way_are_looked_at() {
    let builder = Server::serve().size(LARGE);
    let trace = builder.dir().join("trace");
    let words = ["strace", "-D", "-f", "-o", trace.to_str().unwrap(), "-e", "trace=getsockopt"];
    let server = builder.through(&words).start();
    let mut idle = server.connect();
    idle.expect_alive();
    let mut stuck = server.connect();
    stuck.send(&request(kind::READ, 0, 1, 0, LARGE as u32));
    // Each has a descriptor of its own.
    let looks = wait_for("three looks", MISSED, || {
        let mut looks = BTreeMap::new();
        let text = fs::read_to_string(&trace).unwrap();
        for (call, _) in text.lines().filter_map(|text| text.split_once(", SOL_TCP, TCP_INFO")) {
            *looks.entry(call.rsplit('(').next().unwrap().to_owned()).or_insert(0) += 1;
        }
        looks.values().any(|&n| n >= 3).then_some(looks)
    });
    let mut counts: Vec<_> = looks.into_values().collect();
    counts.sort_unstable();
    assert!(counts.len() <= 2 && counts.iter().rev().skip(1).all(|&n| n <= 2), "{counts:?}");
    assert_eq!(stuck.read_reply(), (0, 1));
    let read = io::copy(&mut Read::by_ref(&mut stuck.stream).take(LARGE), &mut io::sink()).unwrap();
    assert_eq!(read, LARGE);
    idle.expect_alive();
    assert!(!server.log().contains("closed"), "{}", server.log());
    server.expect_healthy();
}
