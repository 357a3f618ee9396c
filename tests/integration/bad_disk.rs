//! What the server makes of a disk that fails or forgets. The disk is real to it: a file system of the test's own.

use crate::support::fuse::{Disk, Op, Remains};
use crate::support::newstyle::{structured, PORT};
use crate::support::peers::{expect_migrated, listen, start_mirror};
use crate::support::{errno, flag, has, kind, pattern, request, Client, Loop, Need, Server};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;

const SIZE: u64 = 4 << 20;
const MIB: u64 = 1 << 20;

/// What a client has changed: the content after each request.
struct Shadow {
    client: Client,
    contents: Vec<Vec<u8>>,
}

impl Shadow {
    fn new(client: Client, content: Vec<u8>) -> Self {
        Self { client, contents: vec![content] }
    }

    /// A request that changes this range, answered.
    #[track_caller]
    fn change(&mut self, kind: u16, flags: u16, offset: u64, length: u32) {
        let mut content = self.contents.last().unwrap().clone();
        let range = &mut content[offset as usize..][..length as usize];
        let payload =
            if kind == kind::WRITE { pattern(self.contents.len() as u64 + offset, range.len()) } else { vec![] };
        assert_eq!(self.client.ask(kind, flags, offset, length, &payload), 0);
        match kind {
            kind::WRITE => range.copy_from_slice(&payload),
            _ => range.fill(0),
        }
        self.contents.push(content);
    }

    /// All so far is durable: what it was before cannot come back.
    fn settle(&mut self) {
        self.contents.drain(..self.contents.len() - 1);
    }

    /// The first byte that is neither as it was when everything was durable nor as one of the later changes made it.
    fn lost(&self, remains: &Remains) -> Option<usize> {
        let found = remains.content("image").unwrap();
        assert_eq!(found.len(), self.contents[0].len(), "{remains}");
        (0..found.len()).find(|&at| self.contents.iter().all(|content| content[at] != found[at]))
    }
}

#[test]
fn an_error_in_a_range_is_an_error_of_that_request_alone() {
    for mount in [Disk::mount, Disk::mount_direct] {
        let Some(disk) = mount(2 * SIZE) else { return };
        let content = pattern(1, SIZE as usize);
        let server = Server::serve().file(disk.furnish("image", &content)).start();
        let mut client = server.connect();
        disk.fail(Op::Read, MIB..2 * MIB, libc::EIO);
        disk.fail(Op::Write, 3 * MIB.., libc::ENOSPC);
        let pieces: Vec<u64> = (0..SIZE).step_by(64 << 10).collect();
        let requests = pieces.iter().map(|&offset| request(kind::READ, 0, offset, offset, 64 << 10));
        client.send(&requests.collect::<Vec<_>>().concat());
        for _ in &pieces {
            let (error, offset) = client.read_reply();
            if (MIB..2 * MIB).contains(&offset) {
                assert_eq!(error, errno::EIO, "at {offset}");
            } else {
                assert_eq!(error, 0, "at {offset}");
                assert!(client.read_bytes(64 << 10) == content[offset as usize..][..64 << 10], "at {offset}");
            }
        }
        assert_eq!(client.write(3 * MIB - 512, &[7; 1024]), errno::ENOSPC);
        assert_eq!(client.write(3 * MIB - 512, &[7; 512]), 0);
        assert_eq!(client.read(2 * MIB - 512, 1024), Err(errno::EIO));
        disk.heal(Op::Read);
        disk.heal(Op::Write);
        assert!(client.read(2 * MIB - 512, 1024).unwrap() == content[2 * MIB as usize - 512..][..1024]);
        assert_eq!(client.write(3 * MIB, &[7; 1024]), 0);
        assert_eq!(client.flush(), 0);
        server.expect_healthy();
    }
}

/// Somebody cuts the file short while clients read it. What is gone is an error; the rest is as before. A read that was under
/// way may also have what was there, or the zeroes that this file system fills in until it knows where the file ends.
#[test]
fn a_file_cut_short_under_reads_in_flight_is_an_error_of_those_reads() {
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let content = pattern(4, SIZE as usize);
    let image = disk.furnish("image", &content);
    let server = Server::serve().file(image.clone()).arg(PORT).start();
    let (mut client, mut newer) = (server.connect(), structured(&server));
    disk.hold(Op::Read, ..);
    let pieces: Vec<u64> = (0..SIZE).step_by(256 << 10).collect();
    let requests = pieces.iter().map(|&offset| request(kind::READ, 0, offset, offset, 4096));
    client.send(&requests.collect::<Vec<_>>().concat());
    disk.wait_for_waiting(Op::Read, 1);
    let cut = thread::spawn({
        let image = image.clone();
        // It may have to wait for the reads.
        move || File::options().write(true).open(image).unwrap().set_len(SIZE / 2).unwrap()
    });
    disk.heal(Op::Read);
    cut.join().unwrap();
    for _ in &pieces {
        let (error, offset) = client.read_reply();
        assert!(error == 0 || offset >= SIZE / 2 && error == errno::EIO, "{error} at {offset}");
        if error == 0 {
            let found = client.read_bytes(4096);
            let is_gone = offset >= SIZE / 2 && found == [0; 4096];
            assert!(is_gone || found == content[offset as usize..][..4096], "at {offset}");
        }
    }
    // From now on it is known where the file ends.
    assert_eq!(client.read(SIZE / 2, 4096), Err(errno::EIO));
    assert_eq!(client.read(SIZE / 2 - 512, 1024), Err(errno::EIO));
    assert!(client.read(SIZE / 2 - 512, 512).unwrap() == content[SIZE as usize / 2 - 512..][..512]);
    assert_eq!(newer.read(0, SIZE / 2, 4096).map(drop), Err(errno::EIO));
    File::options().write(true).open(&image).unwrap().set_len(SIZE).unwrap();
    assert_eq!(client.read(SIZE / 2, 4096).unwrap(), [0; 4096]);
    server.expect_healthy();
}

#[test]
fn a_failing_fdatasync_sticks() {
    for mount in [Disk::mount, Disk::mount_direct] {
        let Some(disk) = mount(2 * SIZE) else { return };
        let server = Server::serve().file(disk.furnish_sparse("image", SIZE)).start();
        let (mut client, mut other) = (server.connect(), server.connect());
        assert_eq!(client.write(0, &[1; 4096]), 0);
        assert_eq!(client.flush(), 0);
        disk.fail_once(Op::Fsync, .., libc::EIO);
        assert_eq!(client.write(4096, &[2; 4096]), 0);
        assert_eq!(client.flush(), errno::EIO);
        // The disk is well again, and would say so: the write is lost all the same.
        for client in [&mut client, &mut other] {
            assert_eq!(client.flush(), errno::EIO);
            assert_eq!(client.ask(kind::WRITE, flag::FUA, 8192, 512, &[3; 512]), errno::EIO);
            assert_eq!(client.write(8192, &[3; 512]), 0);
            assert_eq!(client.read(8192, 512).unwrap(), [3; 512]);
        }
        assert_eq!(server.connect().flush(), errno::EIO);
        assert_eq!(disk.count(Op::Fsync), 2, "not tried again");
        server.expect_healthy();
    }
}

/// Two fdatasyncs run at once, each on an open file of its own. That is sound because of what the kernel promises here.
#[test]
fn a_lost_write_is_told_to_each_open_file() {
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let Some(device) = Loop::attach(&disk.furnish("disk", &pattern(1, SIZE as usize))) else { return };
    let files = [true, false].map(|write| File::options().read(true).write(write).open(device.path()).unwrap());
    for first in [0, 1] {
        disk.fail_once(Op::Write, .., libc::EIO);
        files[0].write_all_at(&[2; 4096], 4096).unwrap();
        for file in [first, 1 - first] {
            assert_eq!(files[file].sync_data().unwrap_err().raw_os_error(), Some(libc::EIO), "{first} {file}");
        }
        assert!(files.iter().all(|file| file.sync_data().is_ok()), "the kernel says it once to each");
    }
}

#[test]
fn a_lost_write_fails_all_that_are_being_synced() {
    if !has(&[Need::Ring]) {
        return;
    }
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let Some(device) = Loop::attach(&disk.furnish("disk", &pattern(1, SIZE as usize))) else { return };
    let server = Server::serve().file(device.path().to_owned()).engine("ring").start();
    let mut clients = [server.connect(), server.connect(), server.connect()];
    for client in &mut clients {
        assert_eq!(client.ask(kind::WRITE, flag::FUA, 0, 512, &[1; 512]), 0);
    }
    disk.hold(Op::Write, ..MIB);
    disk.fail(Op::Write, ..MIB, libc::EIO);
    for (number, client) in clients.iter_mut().enumerate() {
        let at = number as u64 * MIB;
        client.send(&request(kind::WRITE, flag::FUA, number as u64, at, 4096));
        client.send(&[2; 4096]);
        if number == 0 {
            disk.wait_for_waiting(Op::Write, 1);
        }
    }
    // When this is answered, the second has an fdatasync of its own, and the third waits for one of the two.
    assert_eq!(server.connect().read(0, 512).unwrap(), [2; 512]);
    disk.heal(Op::Write);
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.read_reply(), (errno::EIO, number as u64));
        assert_eq!(client.flush(), errno::EIO);
        assert_eq!(client.write(0, &[3; 512]), 0);
    }
    server.expect_healthy();
}

#[test]
fn a_power_failure_loses_nothing_that_was_flushed() {
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let content = pattern(2, MIB as usize);
    let server = Server::serve().file(disk.furnish("image", &content)).start();
    let mut shadow = Shadow::new(server.connect(), content);
    for (kind, offset, length) in [
        (kind::WRITE, 0, 4096),
        (kind::WRITE, 100_001, 300_003),
        (kind::WRITE_ZEROES, 200_000, 65_536),
        (kind::TRIM, 300_000, 65_536),
        (kind::WRITE, 310_000, 512),
    ] {
        shadow.change(kind, 0, offset, length);
    }
    assert!(
        disk.power_failures(0).all(|remains| shadow.lost(&remains).is_none()),
        "one or the other, never anything else"
    );
    assert_eq!(shadow.client.flush(), 0);
    shadow.settle();
    assert!(disk.pending().is_empty());
    // What comes after is there or not, and takes nothing with it.
    shadow.change(kind::WRITE, 0, 2048, 4096);
    shadow.change(kind::WRITE_ZEROES, 0, 90_000, 20_000);
    shadow.change(kind::TRIM, 0, 310_000, 8192);
    let pending = disk.pending().len();
    assert!((3..=10).contains(&pending), "{:?}", disk.pending());
    let mut count = 0;
    for remains in disk.power_failures(0) {
        assert_eq!(shadow.lost(&remains), None, "{remains}");
        count += 1;
    }
    assert_eq!(count, 1 << pending, "all sets");
    // FUA covers its own request at least.
    shadow.settle();
    shadow.change(kind::WRITE, flag::FUA, 500_000, 70_000);
    let after = shadow.contents.last().unwrap()[500_000..][..70_000].to_vec();
    for remains in disk.power_failures(0) {
        assert!(remains.content("image").unwrap()[500_000..][..70_000] == after, "{remains}");
    }
    let remains = disk.power_failures(0).next().unwrap();
    server.expect_healthy();
    // And what is left can be served.
    let disk = Disk::mount_remains(&remains, 2 * SIZE).unwrap();
    let server = Server::serve().file(disk.path("image")).start();
    assert!(server.connect().read(500_000, 70_000).unwrap() == after);
    server.expect_healthy();
}

/// The test above would find a server that says it has flushed and has not.
#[test]
fn a_flush_that_lies_is_found() {
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let content = pattern(3, MIB as usize);
    let builder = Server::serve().engine("sync").file(disk.furnish("image", &content));
    let trace = builder.dir().join("trace");
    let words = ["strace", "-D", "-f", "-o", trace.to_str().unwrap(), "-e", "inject=fdatasync:retval=0"];
    let server = builder.through(&words).start();
    let mut shadow = Shadow::new(server.connect(), content);
    shadow.change(kind::WRITE, 0, 4096, 4096);
    assert_eq!(shadow.client.flush(), 0);
    shadow.settle();
    assert_eq!(disk.count(Op::Fsync), 0);
    assert_eq!(disk.pending(), ["write image 4096..8192"]);
    assert!(disk.power_failures(0).any(|remains| shadow.lost(&remains) == Some(4096)));
    server.expect_healthy();
}

/// What a file system that asks others makes of holes: `GlusterFS` takes for one what was written a moment ago, and says that
/// it has zeroed a range when it has not.
#[test]
fn what_other_machines_keep_is_not_believed_about_holes_and_zeroes() {
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    disk.fail(Op::Seek, .., libc::ENXIO);
    let mut content = pattern(4, SIZE as usize);
    let image = disk.furnish("image", &content);
    let mut source = Server::serve().file(image).arg(PORT).start();
    let mut client = structured(&source);
    assert_eq!(client.client.ask(kind::WRITE, 0, 0, 8192, &[0; 8192]), 0);
    content[..8192].fill(0);
    disk.fail(Op::Fallocate, .., libc::EIO);
    assert_eq!(client.client.ask(kind::WRITE_ZEROES, flag::NO_HOLE, MIB, 65_536, &[]), 0);
    content[MIB as usize..][..65_536].fill(0);
    assert!(client.read(0, 0, SIZE as u32).unwrap().0 == content);
    for (length, flags) in client.block_status(0, 0, SIZE as u32).unwrap() {
        assert_eq!(flags, 0, "{length} bytes may be data");
    }
    let mut destination = listen(0).size(SIZE).start();
    start_mirror(&source, destination.address(), "");
    expect_migrated(&mut source, &mut destination);
}
