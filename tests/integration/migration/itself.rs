//! Migrations whose destination is their source. A block that comes back may be older than what a client has written since.

use crate::support::peers::{start_mirror, tell, wait_for_status, Worker};
use crate::support::{greeting, kind, pattern, request, wait_for, Client, Server, SOON};
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

const SIZE: usize = 4 << 20;

/// An image copied onto itself would never be done, whichever family the connection came by.
#[test]
fn a_server_is_no_destination_of_its_own() {
    for (listens, connects) in [("127.0.0.1", "127.0.0.1"), ("::", "127.0.0.1"), ("::", "::1")] {
        let source = Server::serve().addr(listens).content(&pattern(1, SIZE)).start();
        let port = source.port();
        let (code, text) = tell("mirror", &source, &format!("--addr {connects} --port {port}"));
        assert_eq!((code, text.as_str()), (Some(1), "Mirror was rejected: the destination is this server itself\n"));
        assert_eq!(source.status().get("is_mirroring"), "false");
        assert_eq!(source.status().number("writes"), 0);
    }
}

/// Carries whatever comes to `to` and back, as somebody else's forwarder does. Ends with the test program.
fn forwarder(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), TcpStream::connect(to).unwrap());
            for (mut from, mut to) in [(near.try_clone().unwrap(), far.try_clone().unwrap()), (far, near)] {
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut to);
                    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                });
            }
        }
    });
    address
}

/// Behind a forwarder nothing but what is sent tells that it comes back. None of it is done, nobody is paused for it, and
/// the migration is tried again: the address may be on its way to another machine.
#[test]
fn a_server_behind_a_forwarder_is_no_destination_of_its_own() {
    let mut content = pattern(1, SIZE);
    content[SIZE / 2..].fill(0);
    for sparse in [false, true] {
        let source = Server::serve().arg("-v");
        let source = if sparse { source.size(SIZE as u64) } else { source.content(&content) }.start();
        start_mirror(&source, forwarder(source.address()), "");
        wait_for_status(&source, "migration_last_error", "the_destination_is_this_server_itself");
        wait_for_status(&source, "migration_attempts", "2");
        assert_eq!(source.status().number("writes"), 0, "{}", source.log());
        let worker = Worker::on(&source);
        let attempts = source.status().number("migration_attempts");
        wait_for("another attempt", SOON, || (source.status().number("migration_attempts") > attempts).then_some(()));
        worker.expect_progress();
        assert_eq!(tell("break", &source, ""), (Some(0), "mirror stopped\n".into()));
        worker.stop().check(&source.image);
        assert!(source.log().contains("it brings back what the migration of this server sends"), "{}", source.log());
        assert!(!source.log().contains("pausing clients"), "{}", source.log());
        source.expect_healthy();
    }
}

/// What was on its way when a migration was stopped is no write either, however late it comes.
#[test]
fn what_comes_back_late_is_not_done() {
    let source = Server::serve().content(&pattern(1, SIZE)).start();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let holding = thread::spawn(move || {
        let mut near = Client::new(listener.accept().unwrap().0);
        near.send(&greeting(SIZE as u64, 1 | 4 | 8));
        let head = near.read_bytes(28);
        let length = u32::from_be_bytes(head[24..].try_into().unwrap());
        [head, near.read_bytes(length as usize)].concat()
    });
    start_mirror(&source, address, "");
    let held = holding.join().unwrap();
    assert_eq!(held[..8], request(kind::WRITE, 0, 0, 0, 0)[..8]);
    assert_eq!(tell("break", &source, ""), (Some(0), "mirror stopped\n".into()));
    let mut client = source.connect();
    let newer = pattern(2, held.len());
    assert_eq!(client.write(0, &newer), 0);
    let mut late = source.connect();
    late.send(&held);
    late.expect_closed();
    assert!(client.read(0, newer.len() as u32).unwrap() == newer, "an old block came back: {}", source.log());
    source.expect_healthy();
}
