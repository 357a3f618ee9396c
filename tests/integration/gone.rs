//! A client that is gone is gone: what it has asked of the disk ends with it, and nobody waits for that.

use crate::support::fuse::{Disk, Op};
use crate::support::{allocated, flag, kind, pattern, request, wait_for, Client, Server, TempDir, SOON};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
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

/// A client that is dropped with a reset: the kernel sends one when bytes have come that nobody has read, as the greeting.
fn connect_to_reset(address: impl ToSocketAddrs) -> Client {
    let client = Client::new(TcpStream::connect(address).unwrap());
    client.stream.peek(&mut [0]).unwrap();
    client
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
    let mut goes = connect_to_reset((Ipv6Addr::LOCALHOST, server.port()));
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
    writes_after_the_cut_stay("", |_, goes| drop(goes));
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
        let mut goes = connect_to_reset(server.address());
        goes.send(&long_requests(SIZE));
        wait_for_all_taken(&server);
        drop(goes);
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

/// Clients leave while the disk reads for them; it is slow, and goes on when they are gone.
#[test]
fn who_vanishes_with_reads_in_flight_disturbs_nobody() {
    const SIZE: u64 = 4 * MIB;
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let content = pattern(2, SIZE as usize);
    let server = Server::serve().file(disk.furnish("image", &content)).start();
    let mut stays = server.connect();
    for _ in 0..24 {
        disk.drop_cache("image");
        disk.hold(Op::Read, MIB..);
        let mut goes = connect_to_reset(server.address());
        // As much as one client may have in memory.
        let requests = (0..4).flat_map(|n| request(kind::READ, 0, n, MIB + (n << 18), 1 << 18));
        goes.send(&requests.collect::<Vec<_>>());
        disk.wait_for_waiting(Op::Read, 1);
        drop(goes);
        disk.heal(Op::Read);
        assert!(stays.read(0, MIB as u32).unwrap() == content[..MIB as usize]);
    }
    wait_for("one client", SOON, || (server.status().number("num_clients") == 1).then_some(()));
    assert!(stays.read(0, SIZE as u32).unwrap() == content);
    server.expect_healthy();
}

#[test]
fn acl_waits_for_what_the_disk_has_begun() {
    let Some(disk) = Disk::mount(8 * MIB) else { return };
    let content = pattern(5, 4 * MIB as usize);
    let server = Server::serve().file(disk.furnish("image", &content)).addr("::").start();
    let has_ring = server.status().get("disk_engine") == "ring";
    let mut goes = connect_to_reset((Ipv6Addr::LOCALHOST, server.port()));
    disk.hold(Op::Read, ..);
    goes.send(&request(kind::READ, 0, 1, MIB, 4096));
    disk.wait_for_waiting(Op::Read, 1);
    let mut acl = UnixStream::connect(&server.sock).unwrap();
    acl.set_read_timeout(Some(SOON)).unwrap();
    acl.write_all(b"acl\n127.0.0.1\n\n").unwrap();
    if has_ring {
        goes.read_to_close();
        // Another command is answered meanwhile.
        assert_eq!(server.status().number("num_clients"), 0);
        acl.set_nonblocking(true).unwrap();
        assert_eq!(acl.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock, "it is not answered yet");
        acl.set_nonblocking(false).unwrap();
    }
    disk.heal(Op::Read);
    let mut answer = String::new();
    acl.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "0: updated\n");
}

/// The disk holds a client's requests for longer than the killswitch allows. Nobody else is harmed, then or afterwards.
#[test]
fn the_killswitch_fires_while_the_disk_holds_the_requests() {
    const SIZE: u64 = 4 * MIB;
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let content = pattern(3, SIZE as usize);
    let server = Server::serve().file(disk.furnish("image", &content)).arg("--killswitch=1").start();
    let has_ring = server.status().get("disk_engine") == "ring";
    let mut idle = server.connect();
    disk.hold(Op::Read, MIB..);
    let mut stuck = server.connect();
    stuck.send(&request(kind::READ, 0, 1, MIB, 4096));
    disk.wait_for_waiting(Op::Read, 1);
    if has_ring {
        stuck.expect_closed();
        idle.expect_alive();
        disk.heal(Op::Read);
    } else {
        // The time that the killswitch allows has to pass. The server waits for the disk, and has the data when it looks.
        thread::sleep(Duration::from_millis(1500));
        disk.heal(Op::Read);
        assert_eq!(stuck.read_reply(), (0, 1));
        assert!(stuck.read_bytes(4096) == content[MIB as usize..][..4096]);
    }
    assert!(idle.read(0, SIZE as u32).unwrap() == content);
    server.expect_healthy();
}
