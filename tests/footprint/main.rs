//! What the server costs: memory that does not grow with requests, and few system calls. A test program of its own, which
//! measures one thing after the other, because what a turn of the loop finds depends on what else runs.

#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::indexing_slicing, reason = "a test fails by panic")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panic")]
#![allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]

#[path = "../integration/support/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the harness is that of the integration tests")]
mod support;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use support::{allocated, errno, kind, not_tested, request, wait_for, Client, Server, TempDir, SOON};

/// Waits until no other test measures.
fn alone() -> MutexGuard<'static, ()> {
    static MEASURING: Mutex<()> = Mutex::new(());
    MEASURING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls `work` with pieces of a buffer that make `length` bytes together.
fn in_pieces(length: u32, mut work: impl FnMut(&mut [u8])) {
    let mut buffer = vec![0; 1 << 20];
    let mut left = length as usize;
    while left > 0 {
        let piece = left.min(buffer.len());
        work(&mut buffer[..piece]);
        left -= piece;
    }
}

/// Sends `length` zero bytes.
fn send_zeroes(client: &mut Client, length: u32) {
    in_pieces(length, |piece| client.send(piece));
}

#[test]
fn the_longest_requests_are_streamed_both_ways() {
    let _alone = alone();
    // In memory a hole that is read takes no room.
    let memory = TempDir::within(Path::new("/dev/shm"));
    let image = memory.join("image");
    File::create(&image).unwrap().set_len((5 << 30) - 512).unwrap();
    let server = Server::serve().file(image).start();
    let mut client = server.connect();
    client.expect_alive();
    assert_eq!(client.write(0, &[1; 512]), 0);
    let before = server.memory_kib("VmHWM:");

    client.send(&request(kind::READ, 0, 9, 512, u32::MAX));
    assert_eq!(client.read_reply(), (0, 9));
    in_pieces(u32::MAX, |piece| {
        piece.iter_mut().take(64).for_each(|byte| *byte = 1);
        client.stream.read_exact(piece).unwrap();
        assert!(piece.iter().take(64).all(|&byte| byte == 0));
    });
    client.expect_alive();

    // Without optimisation, to look at each byte takes its time.
    let length = if cfg!(debug_assertions) { 1 << 30 } else { u32::MAX };
    client.send(&request(kind::WRITE, 0, 10, 512, length));
    send_zeroes(&mut client, length);
    assert_eq!(client.read_reply(), (0, 10));
    client.send(&request(kind::WRITE, 0, 11, 2 << 30, u32::MAX));
    send_zeroes(&mut client, u32::MAX);
    assert_eq!(client.read_reply(), (errno::ENOSPC, 11), "and one that is refused");
    client.expect_alive();
    let grown = server.memory_kib("VmHWM:") - before;
    assert!(grown <= 8 << 10, "{grown} KiB more");
    // The first block has data, the last one is not whole.
    assert!(allocated(&server.image) <= 2 * 4096, "and the zeroes left the hole");
}

#[test]
fn idle_clients_cost_next_to_nothing() {
    const CLIENTS: usize = 1000;
    let _alone = alone();
    // Beside the clients, the server keeps about 90 descriptors for itself.
    if flexnbd::sys::raise_descriptor_limit(4096).unwrap() < CLIENTS as u64 + 90 {
        return not_tested("a thousand clients need more descriptors than the hard limit allows (ulimit -Hn)");
    }
    // The server raises its limit of descriptors itself.
    let server =
        Server::serve().through(&["prlimit", "--nofile=1024:"]).size(1 << 20).arg("--max-clients=1000").start();
    server.connect().expect_alive();
    wait_for("it gone", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    let idle = server.memory_kib("VmRSS:");
    assert!(cfg!(debug_assertions) || idle <= 3 << 10, "{idle} KiB idle");
    // Two rounds: before and after each has had some work done.
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| server.connect()).collect();
    let grown = server.memory_kib("VmRSS:").saturating_sub(idle);
    assert!(grown <= 2 << 10, "{grown} KiB for 1000 idle clients");
    for client in &mut clients {
        client.read(0, 65_536).unwrap();
    }
    let grown = server.memory_kib("VmRSS:").saturating_sub(idle);
    assert!(grown <= 4 << 10, "{grown} KiB for 1000 clients that have read");
}

#[test]
fn many_busy_clients_share_what_there_is() {
    let _alone = alone();
    let server = Server::serve().size(1 << 30).start();
    let mut clients: Vec<_> = (0..100).map(|_| server.connect()).collect();
    let before = server.memory_kib("VmHWM:");
    for client in &mut clients {
        client.send(&request(kind::READ, 0, 1, 0, 64 << 20));
        client.send(&request(kind::WRITE, 0, 2, 0, 1 << 20));
        client.send(&vec![0; 1 << 20][..100_000]);
    }
    for client in &mut clients {
        client.read_reply();
    }
    let grown = server.memory_kib("VmHWM:") - before;
    assert!(grown <= 24 << 10, "{grown} KiB for 100 busy clients");
    drop(clients);
    wait_for("all gone", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    server.expect_healthy();
}

/// Counts the system calls of a server between two marks: their names, in order.
fn calls(work: impl FnOnce(&Server, &dyn Fn())) -> Vec<String> {
    let _alone = alone();
    let builder = Server::serve().content(&support::pattern(1, 1 << 20));
    let trace = builder.dir().join("trace");
    let words = ["strace", "-D", "-f", "-o", trace.to_str().unwrap()];
    let server = builder.through(&words).start();
    let read = || fs::read_to_string(&trace).unwrap();
    let settled = || {
        // The server sleeps, and its tracer has written all it saw.
        let mut last = String::new();
        wait_for("a quiet server", SOON, || {
            thread::sleep(Duration::from_millis(50));
            let now = read();
            let quiet =
                now == last && now.lines().last().is_some_and(|line| line.contains("epoll_") && !line.contains(") = "));
            last = now;
            quiet.then_some(())
        });
    };
    let start = std::cell::Cell::new(0);
    work(&server, &|| {
        settled();
        start.set(read().len());
    });
    settled();
    let text = read()[start.get()..].to_owned();
    let names = text.lines().filter_map(|line| line.split_once(' ')?.1.trim_start().split_once('('));
    names.map(|(name, _)| name.trim_start_matches("<... ").split(' ').next().unwrap().to_owned()).collect()
}

#[test]
fn a_lone_read_is_at_most_five_system_calls() {
    let calls = calls(|server, mark| {
        let mut client = server.connect();
        client.expect_alive();
        mark();
        for n in 0..10 {
            client.read(n * 4096, 4096).unwrap();
        }
        std::mem::forget(client);
    });
    let reads = calls.iter().filter(|name| name.starts_with("pread")).count();
    assert_eq!(reads, 10, "{calls:?}");
    assert!(calls.len() <= 51, "more than 5 each: {calls:?}");
}

/// What was sent is looked after by a timer of seconds.
#[test]
fn after_a_reply_the_server_sleeps() {
    let calls = calls(|server, mark| {
        let mut client = server.connect();
        client.expect_alive();
        mark();
        thread::sleep(Duration::from_secs(2));
        std::mem::forget(client);
    });
    assert!(calls.len() <= 2, "{calls:?}");
}

#[test]
fn a_burst_of_reads_costs_its_disk_reads_and_six_calls() {
    let calls = calls(|server, mark| {
        let mut client = server.connect();
        client.expect_alive();
        mark();
        let burst: Vec<u8> = (0..32).flat_map(|n| request(kind::READ, 0, n, n * 8192, 4096)).collect();
        client.send(&burst);
        client.read_bytes(32 * (16 + 4096));
        std::mem::forget(client);
    });
    let reads = calls.iter().filter(|name| name.starts_with("pread")).count();
    assert!(reads <= 32, "{calls:?}");
    assert!(calls.len() - reads <= 6, "{calls:?}");
}

#[test]
fn the_killswitch_costs_no_system_call() {
    let _alone = alone();
    // The epoll_wait whose timeout it sets is there anyway; what must not appear is a timer of the kernel.
    let builder = Server::serve().size(1 << 20).arg("-k");
    let trace = builder.dir().join("trace");
    let server = builder.through(&["strace", "-D", "-f", "-o", trace.to_str().unwrap()]).start();
    let mut client = server.connect();
    (0..20).for_each(|_| client.expect_alive());
    let text = wait_for("the reads", SOON, || {
        fs::read_to_string(&trace).ok().filter(|text| text.matches("preadv2(").count() >= 20)
    });
    assert!(!text.contains("timer"), "{text}");
}
