//! A client that is gone is gone: what it has asked of the disk ends with it, and nobody waits for that.

use crate::support::fuse::{Disk, Op};
use crate::support::{allocated, flag, kind, pattern, request, wait_for, Client, Server, TempDir, SOON};
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Zeroes that take room, over this many bytes, as many requests as a client may have in flight.
fn long_requests(length: u64) -> Vec<u8> {
    let request = |cookie| request(kind::WRITE_ZEROES, flag::NO_HOLE, cookie, 0, length as u32);
    (0..32).flat_map(request).collect()
}

/// Waits until the server has taken 32 requests of one client.
#[track_caller]
fn wait_for_all_taken(server: &Server) {
    wait_for("32 requests in flight", SOON, || {
        server.control("status clients\n\n").contains(" in_flight=32").then_some(())
    });
}

/// Ends the connection with a reset: the kernel does so when bytes have come that nobody has read.
fn reset(client: Client) {
    client.stream.peek(&mut [0]).unwrap();
    drop(client);
}

/// A client asks for zeroes all over the image, which take the disk minutes, and is cut off. What another one writes after
/// that stays.
#[track_caller]
fn writes_after_the_cut_stay(option: &str, cut: impl FnOnce(&Server, Client)) {
    const SIZE: u64 = 8 * MIB;
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let image = disk.furnish_sparse("image", SIZE);
    disk.delay(Op::Fallocate, .., Duration::from_millis(20));
    let mut server = Server::serve().file(image).addr("::").args(option).start();
    // One over IPv4 and one over IPv6, so that a list tells them apart.
    let mut stays = Client::new(TcpStream::connect((Ipv4Addr::LOCALHOST, server.port())).unwrap());
    stays.read_greeting();
    let mut goes = Client::new(TcpStream::connect((Ipv6Addr::LOCALHOST, server.port())).unwrap());
    goes.send(&long_requests(SIZE));
    wait_for_all_taken(&server);
    cut(&server, goes);
    wait_for("one client", SOON, || (server.status().number("num_clients") == 1).then_some(()));

    let last = pattern(1, 4096);
    assert_eq!(stays.write(SIZE - 4096, &last), 0);
    let before = disk.log().len();
    // The server would go on with what is left meanwhile.
    for _ in 0..100 {
        stays.expect_alive();
    }
    let after = disk.log().split_off(before);
    assert!(after.len() <= 32, "{} changes of a client that is gone, the first: {}", after.len(), after[0]);
    assert!(stays.read(SIZE - 4096, 4096).unwrap() == last);
    assert_eq!(server.stop().code(), Some(0), "{}", server.log());
}

#[test]
fn acl_is_a_fence() {
    writes_after_the_cut_stay("", |server, mut goes| {
        assert_eq!(server.control("acl\n127.0.0.1\n\n"), "0: updated\n");
        goes.read_to_close();
    });
}

#[test]
fn the_killswitch_is_a_fence() {
    writes_after_the_cut_stay("--killswitch=2", |_, mut goes| drop(goes.read_to_close()));
}

#[test]
fn a_reset_is_a_fence() {
    writes_after_the_cut_stay("", |_, goes| reset(goes));
}

/// All of them together have asked for more than the queue holds.
#[test]
fn who_comes_asks_and_leaves_over_and_over_keeps_nobody_waiting() {
    const SIZE: u64 = 512 * MIB;
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { TempDir::within(memory) } else { TempDir::new() };
    let image = dir.join("image");
    File::create(&image).unwrap().set_len(SIZE).unwrap();
    let server = Server::serve().file(image.clone()).start();
    let mut stays = server.connect();
    for _ in 0..140 {
        let mut goes = server.connect_bare();
        goes.send(&long_requests(SIZE));
        wait_for_all_taken(&server);
        reset(goes);
        stays.expect_alive();
    }
    wait_for("one client", SOON, || (server.status().number("num_clients") == 1).then_some(()));
    let before = allocated(&image);
    for _ in 0..100 {
        stays.expect_alive();
    }
    assert_eq!(allocated(&image), before, "nothing goes on");
    server.expect_healthy();
}
