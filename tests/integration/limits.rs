//! What all clients together may ask for per second: kept, shared fairly, changed while the server runs, and in nobody's way.

use crate::support::newstyle::{self, PORT};
use crate::support::peers::{expect_migrated, listen, mirror, start_mirror, tell};
use crate::support::{flag, kind, request, wait_for, Client, Server, SOON};
use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

const MIB: u32 = 1 << 20;

/// Reads 512 bytes so many times, in one go.
fn read_many(client: &mut Client, times: u32) {
    client.send(&request(kind::READ, 0, 7, 0, 512).repeat(times as usize));
    for _ in 0..times {
        assert_eq!((client.read_reply(), client.read_bytes(512).len()), ((0, 7), 512));
    }
}

#[test]
fn requests_per_second_are_those_of_all_clients_together() {
    const RATE: u32 = 100;
    let server = Server::serve().size(MIB.into()).args("--max-iops 100 --killswitch=0.5").start();
    let start = Instant::now();
    let began = server.processor_time();
    let all: u32 = std::thread::scope(|scope| {
        let clients = [10, 90, 150, 50].map(|times| {
            let mut client = server.connect();
            scope.spawn(move || {
                read_many(&mut client, times);
                times
            })
        });
        clients.into_iter().map(|client| client.join().unwrap()).sum()
    });
    let took = start.elapsed();
    // A second's worth is there at the start.
    assert!(took >= Duration::from_millis(u64::from(all - RATE) * 1000 / u64::from(RATE)), "{all} in {took:?}");
    let busy = server.processor_time().saturating_sub(began);
    assert!(busy < took / 4, "{busy:?} of {took:?}: it spins");
    assert!(!server.log().contains("killswitch"), "{}", server.log());
    // What is refused is not counted, and neither is what asks for no data.
    let mut client = server.connect();
    for _ in 0..3 * RATE {
        assert_eq!(client.read(u64::from(MIB), 1), Err(28));
    }
    server.expect_healthy();
}

#[test]
fn every_request_counts_and_only_data_counts_in_bytes() {
    let server = Server::serve().size(u64::from(MIB) * 64).args("--max-bytes-per-second 1M --max-iops 20").start();
    let mut client = server.connect();
    let start = Instant::now();
    for _ in 0..10 {
        assert_eq!(client.flush(), 0);
        assert_eq!(client.ask(kind::TRIM, 0, 0, 64 * MIB, &[]), 0);
        assert_eq!(client.ask(kind::WRITE_ZEROES, flag::FUA, 0, 64 * MIB, &[]), 0);
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(500), "30 requests at 20 per second in {took:?}");
    assert!(took < SOON, "the bytes of what moves none are not counted");
}

#[test]
fn what_is_larger_than_a_second_goes_alone_and_leaves_a_debt() {
    let server = Server::serve().size(u64::from(MIB) * 8).args("--max-bytes-per-second=1M --killswitch=1").start();
    let mut client = server.connect();
    let start = Instant::now();
    assert_eq!(client.write(0, &vec![7; 3 * MIB as usize]), 0);
    let mut second = server.connect();
    assert_eq!(second.read(0, 512).unwrap(), [7; 512]);
    let took = start.elapsed();
    assert!(took >= Duration::from_secs(2), "2 MiB of debt at 1 MiB per second: {took:?}");
    assert!(!server.log().contains("killswitch"), "{}", server.log());
    server.expect_healthy();
}

/// One that asks for a lot at once does not keep another one waiting until all of that is done.
#[test]
fn a_greedy_client_leaves_others_their_share() {
    const GREEDY: u64 = 32;
    let server = Server::serve().size(u64::from(MIB)).args("--max-bytes-per-second=512K").start();
    let mut greedy = server.connect();
    // Six seconds' worth.
    (0..GREEDY).for_each(|cookie| greedy.send(&request(kind::READ, 0, cookie, 0, 96 << 10)));
    let mut modest = server.connect();
    let start = Instant::now();
    read_many(&mut modest, 1);
    let took = start.elapsed();
    let done = server.status().number("read_bytes") / (96 << 10);
    assert!(done < GREEDY - 8, "{done} of {GREEDY} went first, in {took:?}");
    for cookie in 0..GREEDY {
        assert_eq!((greedy.read_reply(), greedy.read_bytes(96 << 10).len()), ((0, cookie), 96 << 10));
    }
}

#[test]
fn a_limit_is_changed_while_clients_wait_for_it() {
    let mut server = Server::serve().size(u64::from(MIB) * 4).start();
    assert_eq!((server.status().get("max_iops"), server.status().get("max_bytes_per_second")), ("0", "0"));
    let mut client = server.connect();
    client.expect_alive();
    assert_eq!(tell("limit", &server, "--max-bytes-per-second 1K --max-iops 5k"), (Some(0), "updated\n".into()));
    let status = server.status();
    assert_eq!((status.number("max_iops"), status.number("max_bytes_per_second")), (5 << 10, 1 << 10));
    // An hour of debt.
    assert_eq!(client.read(0, 4 * MIB).unwrap().len(), 4 << 20);
    let waiting = request(kind::READ, 0, 7, 0, 512);
    client.send(&waiting);
    client.expect_silence(Duration::from_millis(300));
    assert_eq!(tell("limit", &server, "--max-iops 0"), (Some(0), "updated\n".into()), "commands do not wait");
    assert_eq!(server.status().number("max_bytes_per_second"), 1 << 10, "what is left out stays");
    // The debt ends with every change; a second's worth is there.
    assert_eq!((client.read_reply(), client.read_bytes(512).len()), ((0, 7), 512));
    assert_eq!(client.read(0, 4 * MIB).unwrap().len(), 4 << 20);
    client.send(&waiting);
    client.expect_silence(Duration::from_millis(300));
    assert_eq!(tell("limit", &server, "--max-bytes-per-second 0"), (Some(0), "updated\n".into()));
    assert_eq!((client.read_reply(), client.read_bytes(512).len()), ((0, 7), 512));
    read_many(&mut client, 1000);

    // Somebody who waits holds no signal up either, whether it is still there or not.
    assert_eq!(server.control("limit max_bytes_per_second=1\n\n"), "0: updated\n");
    assert_eq!(client.read(0, MIB).unwrap().len(), 1 << 20);
    for _ in 0..50 {
        let mut gone = server.connect();
        gone.send(&waiting);
        gone.send(&request(kind::DISC, 0, 0, 0, 0));
    }
    client.send(&waiting);
    assert_eq!(server.stop().code(), Some(0));

    let proxy = Server::serve().size(4096).start();
    for (line, answer) in [
        ("limit\n\n", "1: no limit is named: max_iops=N, max_bytes_per_second=N or both\n"),
        ("limit\nmax_iops=x\n\n", "1: bad argument: max_iops=x\n"),
        ("limit max_iops=18446744073709551615 max_bytes_per_second=18446744073709551615\n\n", "0: updated\n"),
    ] {
        assert_eq!(proxy.control(line), answer);
    }
    proxy.expect_healthy();
}

#[test]
fn migrations_are_neither_counted_nor_held() {
    const SIZE: u64 = 4 << 20;
    let content = crate::support::pattern(3, SIZE as usize);
    let mut source = Server::serve().content(&content).args("--max-bytes-per-second 1 --max-iops 1").start();
    let mut client = source.connect();
    assert_eq!(client.write(0, &content[..4096]), 0);
    // This one waits for an hour.
    client.send(&request(kind::READ, 0, 7, 0, 512));
    client.expect_silence(Duration::from_millis(100));
    let mut destination = listen(0).size(SIZE).args("--serve --max-iops 1 --max-bytes-per-second 1").start();
    start_mirror(&source, destination.address(), "");
    wait_for("the source to end", SOON, || (!source.process.is_running()).then_some(()));
    assert_eq!(source.process.wait(SOON).code(), Some(0), "{}", source.log());
    assert_eq!(fs::read(&destination.image).unwrap(), content);
    // Now it serves, and has a limit.
    let mut client = destination.connect();
    assert_eq!(client.read(0, 4096).unwrap(), content[..4096]);
    client.send(&request(kind::READ, 0, 7, 0, 512));
    client.expect_silence(Duration::from_millis(300));
    assert_eq!(destination.stop().code(), Some(0));

    // Without a limit at the destination the plain way goes as ever.
    let mut source = Server::serve().content(&content).args("--max-iops 1").start();
    let mut destination = listen(0).size(SIZE).start();
    assert_eq!(mirror(&source, destination.address(), "--wait").code, Some(0));
    expect_migrated(&mut source, &mut destination);
}

#[test]
fn a_proxy_and_a_negotiated_client_have_limits_too() {
    let server = Server::serve().size(u64::from(MIB)).args(PORT).start();
    let proxy = Server::proxy(newstyle::address(&server)).args(PORT).args("--max-iops 50 --max-clients 2").start();
    let mut client = newstyle::simple(&proxy);
    let start = Instant::now();
    // The first fifty at once; one more, because the proxy counts in whole milliseconds.
    read_many(&mut client, 101);
    assert!(start.elapsed() >= Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(tell("limit", &proxy, "--max-iops 0"), (Some(0), "updated\n".into()));
    read_many(&mut client, 1000);
    // A request that has half arrived waits for its client and not for the limit.
    assert_eq!(proxy.control("limit max_iops=2\n\n"), "0: updated\n");
    let head = request(kind::READ, 0, 9, 0, 512);
    client.send(&head[..20]);
    client.expect_silence(Duration::from_millis(50));
    client.stream.write_all(&head[20..]).unwrap();
    assert_eq!((client.read_reply(), client.read_bytes(512).len()), ((0, 9), 512));
}
