//! The killswitch: from the first byte of a request to the last byte of its reply; never an idle client.

use crate::support::peers::{listen, start_mirror, Worker};
use crate::support::{kind, request, wait_for, Client, Server, SOON};
use std::time::{Duration, Instant};

/// Fails unless the server cuts the client no sooner than `limit` after `since`, and not much later.
#[track_caller]
fn cut_after(what: &str, client: &mut Client, since: Instant, limit: Duration) {
    client.stream.set_read_timeout(Some(limit + SOON)).unwrap();
    client.read_to_close();
    let took = since.elapsed();
    assert!(took >= limit.mul_f32(0.98), "{what}: cut after {took:?}, before {limit:?}");
    assert!(took < limit + Duration::from_secs(5), "{what}: cut after {took:?} only");
}

fn stuck_clients_are_cut(option: &str, limit: Duration) {
    let server = Server::serve().size(256 << 20).args(option).start();
    let mut idle = server.connect();
    let mut used = server.connect();
    used.expect_alive();
    let since = Instant::now();
    let mut half_head = server.connect();
    half_head.send(&request(kind::READ, 0, 1, 0, 512)[..1]);
    let mut half_payload = server.connect();
    half_payload.send(&request(kind::WRITE, 0, 1, 0, 1 << 20));
    half_payload.send(&[1; 5000]);
    let mut half_refused = server.connect();
    half_refused.send(&request(kind::WRITE, 0, 1, u64::MAX, 1 << 20));
    let mut half_second = server.connect();
    half_second.send(&[request(kind::FLUSH, 0, 1, 0, 0), request(kind::FLUSH, 0, 1, 0, 0)[..27].to_vec()].concat());
    let mut never_reads = server.connect();
    never_reads.send(&request(kind::READ, 0, 1, 0, 256 << 20));
    cut_after("half a head", &mut half_head, since, limit);
    cut_after("half a payload", &mut half_payload, since, limit);
    cut_after("half a refused payload", &mut half_refused, since, limit);
    cut_after("half of the second request", &mut half_second, since, limit);
    // What the sockets hold can still be read.
    let held = never_reads.read_to_close().len();
    assert!(held < 256 << 20, "a reply that nobody took was cut off");
    wait_for("the others gone", SOON, || (server.status().number("num_clients") == 2).then_some(()));
    let lines = server.log().lines().filter(|line| line.contains(":W:") && line.contains("killswitch")).count();
    assert_eq!(lines, 5, "{}", server.log());
    idle.expect_alive();
    used.expect_alive();
}

#[test]
fn a_short_killswitch() {
    stuck_clients_are_cut("--killswitch=0.6", Duration::from_millis(600));
    stuck_clients_are_cut("-k=1", Duration::from_secs(1));
}

/// The real one. `cargo test -- --ignored two_minutes`
#[test]
#[ignore = "takes two minutes"]
fn a_killswitch_of_two_minutes() {
    stuck_clients_are_cut("-k", Duration::from_secs(120));
}

#[test]
fn a_client_that_trickles_is_cut_too() {
    let server = Server::serve().size(4096).arg("--killswitch=0.5").start();
    let mut client = server.connect();
    let since = Instant::now();
    client.send(&request(kind::WRITE, 0, 1, 0, 4096));
    // A byte now and then is progress, but the request still takes too long.
    let error = wait_for("the cut", SOON, || {
        std::thread::sleep(Duration::from_millis(20));
        std::io::Write::write_all(&mut client.stream, &[1]).err()
    });
    assert!(since.elapsed() >= Duration::from_millis(490), "{error}");
}

#[test]
fn idle_and_busy_clients_stay() {
    let server = Server::serve().size(4096).arg("--killswitch=0.2").start();
    let mut greeted_only = server.connect_bare();
    let mut idle = server.connect();
    let mut busy = server.connect();
    let start = Instant::now();
    // Many requests one after the other, each quick, for several times the limit.
    while start.elapsed() < Duration::from_secs(1) {
        busy.send(&request(kind::READ, 0, 1, 0, 512).repeat(3));
        (0..3).for_each(|_| drop((busy.read_reply(), busy.read_bytes(512))));
    }
    idle.expect_alive();
    greeted_only.read_greeting();
    greeted_only.expect_alive();
    assert!(!server.log().contains("killswitch"), "{}", server.log());
}

#[test]
fn without_it_nobody_is_cut() {
    let server = Server::serve().size(4096).start();
    let mut client = server.connect();
    let head = request(kind::READ, 0, 1, 0, 512);
    client.send(&head[..20]);
    client.expect_silence(Duration::from_secs(1));
    client.send(&head[20..]);
    assert_eq!(client.read_reply(), (0, 1));
}

/// A migration over a slow link keeps writers waiting, and what comes behind their writes. That time is not theirs; everybody
/// else's goes on, and readers do not wait at all.
#[test]
fn only_what_a_migration_keeps_waiting_is_excused() {
    const SIZE: u64 = 4 << 20;
    let limit = Duration::from_secs(1);
    let source = Server::serve().size(SIZE).arg("--killswitch=1").start();
    let worker = Worker::start(source.address(), 0..SIZE / 2);
    // The migration may come to its end before the test does.
    worker.may_end();
    let destination = listen(0).size(SIZE).start();
    start_mirror(&source, destination.address(), "--max-speed 400000");
    wait_for("writers to be slowed", SOON, || source.status().line().contains("migration_write_limit=").then_some(()));
    let since = Instant::now();
    let mut half_head = source.connect();
    half_head.send(&request(kind::READ, 0, 1, 0, 512)[..27]);
    // More than the sockets hold.
    let mut never_reads = source.connect();
    (0..64).for_each(|cookie| never_reads.send(&request(kind::READ, 0, cookie, 0, SIZE as u32)));
    let mut kept = source.connect();
    let mut writes = Vec::new();
    for number in 0..4 {
        writes.extend(request(kind::WRITE, 0, number, SIZE / 2 + (number << 18), 1 << 18));
        writes.extend(vec![7; 1 << 18]);
    }
    writes.extend(request(kind::READ, 0, 4, SIZE / 2, 512));
    kept.send(&writes);
    let mut reader = source.connect();
    assert_eq!(reader.read(SIZE - 512, 512).unwrap(), [0; 512]);
    cut_after("half a head", &mut half_head, since, limit);
    cut_after("replies that nobody takes", &mut never_reads, since, limit);
    assert!(source.status().line().contains("migration_write_limit="), "{}", source.log());
    let mut answered: Vec<u64> = Vec::new();
    for _ in 0..5 {
        let (error, cookie) = kept.read_reply();
        assert_eq!(error, 0, "request {cookie}, which was kept for {:?}", since.elapsed());
        if cookie == 4 {
            assert_eq!(kept.read_bytes(512), [7; 512]);
        }
        answered.push(cookie);
    }
    let took = since.elapsed();
    assert!(took > limit.mul_f32(1.5), "{took:?} are no test of a killswitch of {limit:?}");
    // The read may overtake the last write, which takes the disk longer, and nothing else changes places.
    assert!([[0, 1, 2, 3, 4], [0, 1, 2, 4, 3]].contains(&answered[..].try_into().unwrap()), "{answered:?}");
    reader.expect_alive();
    let cut = source.log().lines().filter(|line| line.contains("killswitch")).count();
    assert_eq!(cut, 2, "{}", source.log());
}
