//! Who waits for the disk: `--disk-engine`, and that with a ring neither a client nor the end of the process waits for what
//! another has asked of the disk.

use crate::support::fuse::{Disk, Op};
use crate::support::peers::{expect_migrated, listen, start_mirror, Worker};
use crate::support::{
    errno, flag, has, kind, pattern, program, request, run, run_command, wait_for, Builder, Client, Loop, Mount, Need,
    Server, TempDir, Throttle, BIN, SOON,
};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u64 = 4 << 20;
const MIB: u64 = 1 << 20;

/// A server under strace, which traces these calls or makes them fail, and the path of the trace.
fn traced(builder: Builder, expression: &str) -> (Server, PathBuf) {
    let trace = builder.dir().join("trace");
    let server = builder.through(&["strace", "-D", "-f", "-o", trace.to_str().unwrap(), "-e", expression]).start();
    (server, trace)
}

fn turns(trace: &Path) -> usize {
    fs::read_to_string(trace).unwrap().matches("epoll_wait(").count()
}

/// The server shows the engine wherever it shows one.
#[track_caller]
fn expect_engine(server: &Server, engine: &str) -> String {
    assert_eq!(server.status().get("disk_engine"), engine);
    let json = server.control("status\njson\n\n");
    assert!(json.contains(&format!(r#""disk_engine":"{engine}""#)), "{json}");
    let log = server.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains(" disk: engine ")).collect();
    assert!(lines.len() == 1 && lines[0].contains(&format!("engine {engine}")), "{log}");
    lines[0].to_owned()
}

#[test]
fn the_engine_is_the_one_that_was_asked_for() {
    let serve = |engine| Server::serve().size(SIZE).arg("-v").engine(engine).start();
    let server = serve("sync");
    expect_engine(&server, "sync");
    server.expect_healthy();
    if has(&[Need::Ring]) {
        let server = serve("ring");
        expect_engine(&server, "ring");
        server.connect().expect_alive();
        server.expect_healthy();
    }
}

#[test]
fn auto_is_a_ring_on_a_disk_and_none_in_memory() {
    let Some(mount) = Mount::tmpfs("8m") else { return };
    let image = mount.join("image");
    fs::write(&image, [7; 8192]).unwrap();
    let server = Server::serve().file(image.clone()).arg("-v").engine("auto").start();
    assert!(expect_engine(&server, "sync").contains("memory"));
    server.expect_healthy();
    if !has(&[Need::Ring]) {
        return;
    }
    let server = Server::serve().file(image).engine("ring").start();
    let mut client = server.connect();
    assert_eq!(client.ask(kind::WRITE, flag::FUA, 100, 512, &[1; 512]), 0);
    assert_eq!(client.read(0, 8192).unwrap()[99..103], [7, 1, 1, 1]);
    server.expect_healthy();
    let Some(disk) = Disk::mount(SIZE) else { return };
    let server = Server::serve().file(disk.furnish_sparse("image", SIZE)).arg("-v").engine("auto").start();
    expect_engine(&server, "ring");
    server.expect_healthy();
}

#[test]
fn where_there_is_no_ring_the_other_engine_serves_unless_one_was_demanded() {
    for (call, error) in [
        ("io_uring_setup", "ENOSYS"),
        ("io_uring_setup", "EPERM"),
        ("io_uring_setup", "EINVAL"),
        ("io_uring_enter", "EPERM"),
    ] {
        let inject = format!("inject={call}:error={error}");
        let (server, _) = traced(Server::serve().content(&pattern(1, 8192)).arg("-v").engine("auto"), &inject);
        assert!(expect_engine(&server, "sync").contains("io_uring"));
        let mut client = server.connect();
        assert!(client.read(0, 8192).unwrap() == pattern(1, 8192) && client.flush() == 0);
        server.expect_healthy();

        let dir = TempDir::new();
        let image = dir.join("image");
        fs::write(&image, [0; 4096]).unwrap();
        let mut demand = program("strace");
        demand.args(["-f", "-o", "/dev/null", "-e", &inject, BIN, "serve", "--addr", "127.0.0.1", "--port", "0"]);
        let output = run_command(demand.args(["--disk-engine", "ring", "--file"]).arg(&image), &[]);
        assert_eq!(output.code, Some(1), "{}", output.stderr);
        for word in [":F:", image.to_str().unwrap(), "--disk-engine ring", "kernel.io_uring_disabled"] {
            assert!(output.stderr.contains(word), "{}", output.stderr);
        }
    }
}

/// A read of a range, sent.
fn ask_to_read(client: &mut Client, offset: u64, length: u32) {
    client.send(&request(kind::READ, 0, offset, offset, length));
}

#[track_caller]
fn expect_read(client: &mut Client, content: &[u8], offset: u64, length: usize) {
    assert_eq!(client.read_reply(), (0, offset));
    assert!(client.read_bytes(length) == content[offset as usize..][..length], "at {offset}");
}

/// A disk, what its image holds, and a server with a ring whose turns are counted in a trace. `None` where the machine does not
/// allow it; that has been told then.
fn counted() -> Option<(Disk, Vec<u8>, Server, PathBuf)> {
    if !has(&[Need::Ring]) {
        return None;
    }
    let disk = Disk::mount(2 * SIZE)?;
    let content = pattern(1, SIZE as usize);
    let builder = Server::serve().file(disk.furnish("image", &content)).engine("ring");
    let (server, trace) = traced(builder, "trace=epoll_wait");
    Some((disk, content, server, trace))
}

#[test]
fn reads_that_hang_hold_no_other_and_cost_no_turns() {
    const OTHERS: u64 = 100;
    let Some((disk, content, server, trace)) = counted() else { return };
    let (mut slow, mut other) = (server.connect(), server.connect());
    other.expect_alive();
    disk.hold(Op::Read, MIB..2 * MIB);
    for n in 0..4 {
        ask_to_read(&mut slow, MIB + n * (256 << 10), 4096);
    }
    disk.wait_for_waiting(Op::Read, 1);
    let before = turns(&trace);
    for n in 0..OTHERS {
        // From the disk, and from the cache.
        let offset = 2 * MIB + n / 2 * 8192;
        assert!(other.read(offset, 4096).unwrap() == content[offset as usize..][..4096]);
    }
    thread::sleep(Duration::from_millis(500));
    // A turn for each request, one for each completion, and status.
    let turns = turns(&trace) - before;
    assert!(turns < 1000, "{turns} turns for {OTHERS} requests");
    disk.heal(Op::Read);
    let mut offsets: Vec<u64> = (0..4).map(|n| MIB + n * (256 << 10)).collect();
    for _ in 0..4 {
        let (error, offset) = slow.read_reply();
        assert_eq!(error, 0);
        offsets.retain(|&other| other != offset);
        assert!(slow.read_bytes(4096) == content[offset as usize..][..4096]);
    }
    assert!(offsets.is_empty());
    server.expect_healthy();
}

/// Others are done long before those who wait for a device that is read twice in a second.
#[test]
fn reads_of_a_throttled_device_hold_no_other() {
    if !has(&[Need::Ring]) {
        return;
    }
    let (dir, content) = (TempDir::new(), pattern(3, SIZE as usize));
    fs::write(dir.join("disk"), &content).unwrap();
    let Some(device) = Loop::attach(&dir.join("disk")) else { return };
    let Some(throttle) = Throttle::reads(device.path(), 2) else { return };
    // Only what others ask for is cached, as long as the device is open.
    let cached = fs::File::open(device.path()).unwrap();
    cached.read_exact_at(&mut vec![0; 2 * MIB as usize], 2 * MIB).unwrap();
    let builder = Server::serve().file(device.path().to_owned()).engine("ring").through(&throttle.joining());
    let server = builder.start();
    let (mut slow, mut other) = (server.connect(), server.connect());
    for n in 0..4 {
        ask_to_read(&mut slow, MIB + n * (128 << 10), 4096);
    }
    let slow = thread::spawn(move || {
        let began = Instant::now();
        for _ in 0..4 {
            assert_eq!(slow.read_reply().0, 0);
            slow.read_bytes(4096);
        }
        assert!(began.elapsed() > Duration::from_millis(500), "the kernel lets more through");
        Instant::now()
    });
    let mut longest = Duration::ZERO;
    for n in 0..200 {
        let began = Instant::now();
        let offset = 2 * MIB + n * 8192;
        assert!(other.read(offset, 4096).unwrap() == content[offset as usize..][..4096]);
        assert_eq!(other.write(offset + 4096, &[7; 4096]), 0);
        longest = longest.max(began.elapsed());
    }
    let (is_over, busy) = (Instant::now(), server.processor_time());
    let end = slow.join().unwrap();
    assert!(is_over < end, "they waited for the device; the longest {longest:?}");
    let (busy, took) = (server.processor_time().saturating_sub(busy), end.duration_since(is_over));
    assert!(busy < took / 4, "{busy:?} of {took:?}: it spins");
    server.expect_healthy();
}

#[test]
fn a_read_that_takes_a_thread_is_not_tried_in_the_loop() {
    if !has(&[Need::Ring]) {
        return;
    }
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let content = pattern(1, SIZE as usize);
    let server = Server::serve().file(disk.furnish("image", &content)).engine("ring").start();
    let mut client = server.connect();
    disk.hold(Op::Read, ..);
    ask_to_read(&mut client, 0, 4096);
    disk.wait_for_waiting(Op::Read, 1);
    // The kernel would have tried it 128 times before it took a thread, and sent it with the first.
    assert!(!disk.threads(Op::Read).contains(&server.pid()));
    disk.heal(Op::Read);
    expect_read(&mut client, &content, 0, 4096);
    server.expect_healthy();
}

#[test]
fn an_fdatasync_that_hangs_holds_no_read_and_costs_no_turns() {
    let Some((disk, content, server, trace)) = counted() else { return };
    let (mut slow, mut other) = (server.connect(), server.connect());
    assert_eq!(slow.write(0, &[9; 4096]), 0);
    disk.hold(Op::Fsync, ..);
    slow.send(&request(kind::FLUSH, 0, 1, 0, 0));
    disk.wait_for_waiting(Op::Fsync, 1);
    // It joins the next group, whose fdatasync begins after this one.
    other.send(&request(kind::FLUSH, 0, 2, 0, 0));
    let before = turns(&trace);
    for n in 0..20 {
        let offset = MIB + n * 8192;
        ask_to_read(&mut other, offset, 4096);
        expect_read(&mut other, &content, offset, 4096);
    }
    thread::sleep(Duration::from_millis(500));
    let turns = turns(&trace) - before;
    // A loop that spins has many thousands in that time.
    assert!(turns < 1000, "{turns} turns for 20 requests");
    assert_eq!((disk.count(Op::Fsync), server.status().number("syncs")), (1, 1));
    disk.heal(Op::Fsync);
    assert_eq!((slow.read_reply(), other.read_reply()), ((0, 1), (0, 2)));
    assert_eq!(disk.count(Op::Fsync), 2);
    server.expect_healthy();
}

#[test]
fn it_stops_at_once_whatever_the_disk_does() {
    if !has(&[Need::Ring]) {
        return;
    }
    for hold in [&[Op::Read][..], &[Op::Fsync], &[Op::Read, Op::Fsync]] {
        let Some(disk) = Disk::mount(2 * SIZE) else { return };
        let mut server = Server::serve().file(disk.furnish("image", &pattern(1, SIZE as usize))).engine("ring").start();
        let mut client = server.connect();
        for &op in hold {
            disk.hold(op, ..);
        }
        for n in 0..16 {
            ask_to_read(&mut client, n * 65536, 4096);
        }
        client.send(&request(kind::FLUSH, 0, 99, 0, 0));
        for &op in hold {
            disk.wait_for_waiting(op, 1);
        }
        // What is held would fail after 40 s. Threads of the kernel may wait for it even then, and a process whose own
        // thread has ended is not gone before they are; but it has given the image up.
        server.process.signal("TERM");
        let stat = format!("/proc/{}/stat", server.pid());
        wait_for("the end of its thread", SOON / 2, || {
            fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z ")).then_some(())
        });
        assert!(!server.sock.exists());
        for &op in hold {
            disk.heal(op);
        }
        Server::serve().file(disk.path("image")).engine("ring").start().expect_healthy();
        assert_eq!(server.process.wait(SOON).code(), Some(0), "{}", server.log());
    }
}

#[test]
fn a_migration_waits_for_what_flies_and_loses_nothing() {
    if !has(&[Need::Ring]) {
        return;
    }
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let content = pattern(1, SIZE as usize);
    let mut source = Server::serve().file(disk.furnish("image", &content)).engine("ring").start();
    disk.delay(Op::Read, .., Duration::from_millis(2));
    disk.delay(Op::Fsync, .., Duration::from_millis(20));
    let worker = Worker::start(source.address(), 0..SIZE / 2);
    worker.may_end();
    let mut reader = source.connect();
    disk.hold(Op::Read, 3 * MIB..3 * MIB + 4096);
    ask_to_read(&mut reader, 3 * MIB, 4096);
    disk.wait_for_waiting(Op::Read, 1);
    let mut destination = listen(0).size(SIZE).start();
    start_mirror(&source, destination.address(), "");
    worker.expect_progress();
    disk.heal(Op::Read);
    expect_read(&mut reader, &content, 3 * MIB, 4096);
    expect_migrated(&mut source, &mut destination);
    worker.join().check(&destination.image);
    let moved = fs::read(&destination.image).unwrap();
    assert!(moved[SIZE as usize / 2..] == content[SIZE as usize / 2..]);
}

/// One that ends early has not read the last of it.
#[test]
fn a_file_that_is_cut_short_is_an_error_of_the_read() {
    if !has(&[Need::Ring]) {
        return;
    }
    let Some(disk) = Disk::mount_direct(2 * SIZE) else { return };
    let server = Server::serve().file(disk.furnish("image", &pattern(1, SIZE as usize))).engine("ring").start();
    let mut client = server.connect();
    fs::File::options().write(true).open(disk.path("image")).unwrap().set_len(MIB).unwrap();
    assert_eq!(client.read(MIB - 512, 1024), Err(errno::EIO));
    assert_eq!(client.read(2 * MIB, 4096), Err(errno::EIO));
    assert_eq!(client.read(MIB - 512, 512).unwrap().len(), 512);
    server.expect_healthy();
}

#[test]
fn an_unknown_engine_is_wrong_usage() {
    let output = run(&["serve", "-l", "127.0.0.1", "-p", "0", "-f", "x", "--disk-engine", "fast"], &[]);
    assert_eq!(output.code, Some(2));
    assert!(["auto", "sync", "ring"].iter().all(|name| output.stderr.contains(name)), "{}", output.stderr);
}
