//! Changes of an image that another process keeps, and that take long there: with a ring they hold nobody who has not asked
//! for them, and not the end of the process.

use crate::support::fuse::{Disk, Op};
use crate::support::{errno, flag, has, kind, pattern, request, wait_for, Builder, Client, Need, Server, SOON};
use flexnbd::sys::file::try_lock;
use std::fs::File;
use std::thread;
use std::time::Duration;

const SIZE: u64 = 4 << 20;
const MIB: u64 = 1 << 20;

/// A disk, what its image holds, and a server with a ring. `None` where the machine does not allow it; that has been told
/// then.
fn far() -> Option<(Disk, Vec<u8>, Server)> {
    if !has(&[Need::Ring]) {
        return None;
    }
    let disk = Disk::mount(2 * SIZE)?;
    let content = pattern(1, SIZE as usize);
    let server = serve(&disk, &content).start();
    Some((disk, content, server))
}

fn serve(disk: &Disk, content: &[u8]) -> Builder {
    Server::serve().file(disk.furnish("image", content)).engine("ring")
}

fn open(disk: &Disk) -> File {
    File::options().read(true).write(true).open(disk.path("image")).unwrap()
}

/// The next server of an image, as soon as the kernel has let go of what another one has left behind.
fn serve_again(disk: &Disk) -> Server {
    wait_for("the end of a lock", SOON, || try_lock(&open(disk), true).unwrap().then_some(()));
    Server::serve().file(disk.path("image")).engine("ring").start()
}

fn ask_to_write(client: &mut Client, cookie: u64, offset: u64, payload: &[u8]) {
    client.send_request(kind::WRITE, 0, cookie, offset, payload.len().try_into().unwrap(), payload);
}

/// Some replies of a client, in the order of their cookies.
fn replies(client: &mut Client, count: usize) -> Vec<(u64, u32)> {
    let mut replies: Vec<(u64, u32)> = (0..count).map(|_| client.read_reply()).map(|(error, n)| (n, error)).collect();
    replies.sort_unstable();
    replies
}

#[test]
fn a_change_that_hangs_holds_no_read() {
    let Some((disk, content, server)) = far() else { return };
    let (mut slow, mut other) = (server.connect(), server.connect());
    // From now on it is cached.
    assert!(other.read(MIB, 256 << 10).unwrap() == content[MIB as usize..][..256 << 10]);
    disk.delay(Op::Write, .., Duration::from_millis(20));
    for n in 0..20 {
        ask_to_write(&mut slow, n, n * 4096, &[7; 4096]);
    }
    for n in 0..100 {
        let offset = MIB + n % 64 * 4096;
        assert!(other.read(offset, 4096).unwrap() == content[offset as usize..][..4096]);
    }
    assert_eq!(replies(&mut slow, 20), (0..20).map(|n| (n, 0)).collect::<Vec<_>>());
    for (op, kind, flags) in
        [(Op::Write, kind::WRITE, 0), (Op::Write, kind::WRITE_ZEROES, flag::NO_HOLE), (Op::Fallocate, kind::TRIM, 0)]
    {
        disk.hold(op, ..MIB);
        let payload: &[u8] = if kind == kind::WRITE { &[8; 4096] } else { &[] };
        slow.send_request(kind, flags, 1, 0, 4096, payload);
        disk.wait_for_waiting(op, 1);
        // What is behind it is not done either, and holds nobody.
        ask_to_write(&mut slow, 2, 512 << 10, &[9; 512]);
        for n in 0..30 {
            let offset = MIB + n * 4096;
            assert!(other.read(offset, 4096).unwrap() == content[offset as usize..][..4096]);
        }
        let cold = 2 * MIB + u64::from(kind) * 65_536;
        assert!(other.read(cold, 4096).unwrap() == content[cold as usize..][..4096]);
        assert_eq!(disk.waiting(op), 1);
        disk.heal(op);
        assert_eq!(replies(&mut slow, 2), [(1, 0), (2, 0)]);
    }
    assert_eq!(slow.flush(), 0);
    server.expect_healthy();
}

#[test]
fn a_change_that_overlaps_waits_for_the_one_before_it_and_wins() {
    let Some((disk, mut content, server)) = far() else { return };
    let (mut client, mut other) = (server.connect(), server.connect());
    for is_others in [false, true] {
        let before = disk.log().len();
        disk.hold(Op::Write, ..4096);
        ask_to_write(&mut client, 1, 0, &[1; 4096]);
        disk.wait_for_waiting(Op::Write, 1);
        let later = if is_others { &mut other } else { &mut client };
        ask_to_write(later, 2, 2048, &[2; 4096]);
        later.send(&request(kind::WRITE_ZEROES, flag::NO_HOLE, 3, 3072, 512));
        later.expect_silence(Duration::from_millis(100));
        assert_eq!(disk.log().len(), before);
        disk.heal(Op::Write);
        let (count, rest) = if is_others { (1, 2) } else { (3, 0) };
        assert!(replies(&mut client, count).iter().all(|&(_, error)| error == 0));
        assert!(replies(&mut other, rest).iter().all(|&(_, error)| error == 0));
        content[..2048].fill(1);
        content[2048..6144].fill(2);
        content[3072..3584].fill(0);
        assert!(client.read(0, 8192).unwrap() == content[..8192]);
    }
    assert_eq!(client.flush(), 0);
    assert!(disk.pending().is_empty());
    server.expect_healthy();
}

#[test]
fn a_flush_is_answered_after_the_changes_before_it() {
    let Some((disk, _, server)) = far() else { return };
    let mut client = server.connect();
    disk.hold(Op::Write, ..MIB);
    for n in 0..12 {
        ask_to_write(&mut client, n, n * 8192, &[5; 8192]);
    }
    client.send(&request(kind::FLUSH, 0, 99, 0, 0));
    client.send_request(kind::WRITE, flag::FUA, 100, 2 * MIB, 512, &[6; 512]);
    disk.wait_for_waiting(Op::Write, 1);
    client.expect_silence(Duration::from_millis(200));
    assert_eq!(disk.count(Op::Fsync), 0);
    disk.heal(Op::Write);
    let mut open = 12;
    for _ in 0..14 {
        match client.read_reply() {
            (0, 99) => assert_eq!(open, 0, "before the writes"),
            (0, 100) => {}
            (error, _) => open -= i32::from(error == 0),
        }
    }
    assert!(disk.pending().is_empty(), "{:?}", disk.pending());
    server.expect_healthy();
}

#[test]
fn an_error_of_a_change_is_one_of_its_request_alone() {
    let Some((disk, mut content, server)) = far() else { return };
    let mut client = server.connect();
    disk.fail(Op::Write, MIB..MIB + 4096, libc::EIO);
    disk.fail(Op::Write, 2 * MIB..2 * MIB + 4096, libc::ENOSPC);
    disk.fail(Op::Fallocate, 3 * MIB..3 * MIB + 4096, libc::EIO);
    for (cookie, offset) in [0, 512 << 10, MIB, MIB + 8192, 2 * MIB, 2 * MIB + 8192].into_iter().enumerate() {
        ask_to_write(&mut client, cookie as u64, offset, &[3; 4096]);
        if offset != MIB && offset != 2 * MIB {
            content[offset as usize..][..4096].fill(3);
        }
    }
    client.send(&request(kind::TRIM, 0, 6, 3 * MIB, 4096));
    let (eio, full) = (errno::EIO, errno::ENOSPC);
    assert_eq!(replies(&mut client, 7), [(0, 0), (1, 0), (2, eio), (3, 0), (4, full), (5, 0), (6, eio)]);
    // Of a long one that fails in its middle, too.
    assert_eq!(client.ask(kind::WRITE_ZEROES, flag::NO_HOLE, MIB - 4096, 8192, &[]), eio);
    disk.heal(Op::Write);
    assert_eq!(client.flush(), 0);
    for offset in [0, MIB + 8192, 2 * MIB + 8192] {
        assert!(client.read(offset, 8192).unwrap() == content[offset as usize..][..8192]);
    }
    server.expect_healthy();
}

#[test]
fn of_a_client_that_vanishes_only_what_the_kernel_has_is_done() {
    let Some((disk, content, server)) = far() else { return };
    // It never reads the greeting, so that its end is a reset.
    let mut client = server.connect_bare();
    disk.hold(Op::Write, ..);
    for n in 0..3 {
        // Each waits for the first.
        ask_to_write(&mut client, n, n * 100, &[n as u8; 4096]);
    }
    disk.wait_for_waiting(Op::Write, 1);
    let mut other = server.connect();
    ask_to_write(&mut other, 9, MIB, &[9; 512]);
    drop(client);
    wait_for("the end of a client", SOON, || (server.status().number("num_clients") == 1).then_some(()));
    assert!(other.read(2 * MIB, 4096).is_ok_and(|read| read == content[2 * MIB as usize..][..4096]));
    disk.heal(Op::Write);
    assert_eq!(other.read_reply(), (0, 9));
    let found = other.read(0, 8192).unwrap();
    assert!(found[..4096] == [0; 4096] && found[4096..] == content[4096..8192]);
    assert_eq!(disk.count(Op::Write), 2);
    server.expect_healthy();
}

#[test]
fn it_stops_at_once_where_whoever_is_killed_need_not_wait() {
    let Some((disk, content, mut server)) = far() else { return };
    let mut client = server.connect();
    disk.hold(Op::Write, ..);
    for n in 0..12 {
        ask_to_write(&mut client, n, n * 4096, &[1; 4096]);
    }
    disk.wait_for_waiting(Op::Write, 1);
    server.process.signal("TERM");
    assert_eq!(server.process.wait(SOON / 2).code(), Some(0), "{}", server.log());
    client.expect_closed();
    disk.heal(Op::Write);
    let server = serve_again(&disk);
    assert!(server.connect().read(0, 65_536).unwrap() == content[..65_536], "nothing is written any more");
    server.expect_healthy();
}

/// Even the kernel waits for the write then, with all of the process; nobody may serve the image before.
#[test]
fn a_change_that_nothing_ends_keeps_the_image_locked() {
    let Some((disk, _, mut server)) = far() else { return };
    let mut client = server.connect();
    disk.stick(Op::Write, ..);
    ask_to_write(&mut client, 1, 0, &[1; 4096]);
    disk.wait_for_waiting(Op::Write, 1);
    server.process.signal("TERM");
    wait_for("the end of its socket", SOON / 2, || (!server.sock.exists()).then_some(()));
    client.expect_closed();
    let image = open(&disk);
    for _ in 0..20 {
        assert!(!try_lock(&image, true).unwrap() && disk.waiting(Op::Write) == 1);
        thread::sleep(Duration::from_millis(10));
    }
    disk.heal(Op::Write);
    assert_eq!(server.process.wait(SOON).code(), Some(0), "{}", server.log());
    drop(image);
    let server = serve_again(&disk);
    assert_eq!(server.connect().read(0, 4096).unwrap(), [1; 4096]);
    server.expect_healthy();
}
