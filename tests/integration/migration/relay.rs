//! Migrations that no client notices: the source serves those who are connected from the destination, until they leave.

use crate::support::peers::{
    expect_exit, expect_same, listen, mirror, nowhere, start_mirror, tell, At, Fault, Script, Worker,
};
use crate::support::{kind, pattern, program, reserved_port, run_within, wait_for, Output, Server, Status, SOON};
use std::fs;
use std::thread;
use std::time::Duration;

/// How long fio may take.
const DEADLINE: Duration = Duration::from_secs(60);

const SIZE: usize = 8 << 20;

/// A listener that goes on as a server.
fn next(port: u16) -> Server {
    listen(port).size(SIZE as u64).arg("--serve").start()
}

fn wait_for_relay(source: &Server) -> Status {
    wait_for("the relay", SOON, || Some(source.status()).filter(|status| status.line().contains(" relaying=true ")))
}

/// A worker checks every byte it reads, and fails at the first error and at the end of its connection.
#[test]
fn a_client_at_work_notices_nothing() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut destination = next(0);
    let worker = Worker::on(&source);
    worker.expect_progress();
    start_mirror(&source, destination.address(), "--relay");
    let status = wait_for_relay(&source);
    assert!(status.line().contains(" is_mirroring=false "), "{}", status.line());
    assert_eq!(status.get("upstream"), destination.address().to_string());
    worker.expect_progress();
    worker.stop().check(&destination.image);
    expect_exit(&mut source, 0);
    assert!(destination.stop().success());
}

/// Twenty in a row, there and back, under one client; each relay ends when the one before it has left.
#[test]
fn there_and_back_ten_times() {
    let mut servers = vec![Server::serve().content(&pattern(1, SIZE)).start()];
    let worker = Worker::on(&servers[0]);
    worker.expect_progress();
    for _ in 0..20 {
        let destination = next(0);
        let source = servers.last().unwrap();
        start_mirror(source, destination.address(), "--relay");
        wait_for_relay(source);
        worker.expect_progress();
        servers.push(destination);
    }
    let mut last = servers.pop().unwrap();
    worker.stop().check(&last.image);
    for source in &mut servers {
        expect_exit(source, 0);
    }
    assert!(last.stop().success());
}

/// The file of the source is not its any more: its lock is gone, and another server may take the name.
#[test]
fn the_image_may_come_back_under_the_same_name() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut destination = next(0);
    let mut client = source.connect();
    start_mirror(&source, destination.address(), "--relay");
    wait_for_relay(&source);
    assert_eq!(client.write(4096, &pattern(2, 512)), 0);
    let mut again = Server::serve().file(source.image.clone()).arg("--adopt").start();
    assert_eq!(again.connect().read(4096, 512).unwrap(), pattern(1, SIZE)[4096..4608], "the relay does not touch it");
    assert_eq!(destination.connect().read(4096, 512).unwrap(), pattern(2, 512));
    drop(client);
    expect_exit(&mut source, 0);
    assert!(again.stop().success() && destination.stop().success());
}

#[test]
fn the_file_is_deleted_and_new_clients_are_relayed_too() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut destination = next(0);
    let mut first = source.connect();
    start_mirror(&source, destination.address(), "--relay --unlink");
    wait_for_relay(&source);
    assert!(!source.image.exists());
    let mut second = source.connect();
    assert_eq!(second.write(0, &pattern(3, 4096)), 0);
    assert_eq!(first.read(0, 4096).unwrap(), pattern(3, 4096));
    drop(first);
    second.expect_alive();
    drop(second);
    expect_exit(&mut source, 0);
    assert_eq!(fs::read(&destination.image).unwrap()[..4096], pattern(3, 4096));
    assert!(destination.stop().success());
}

#[test]
fn without_a_client_the_source_ends_as_ever() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut destination = next(0);
    let output = mirror(&source, destination.address(), "--relay --wait");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "Migration started\nMigration completed\n");
    expect_exit(&mut source, 0);
    expect_same(&source.image, &destination.image);
    assert!(destination.stop().success());
}

/// What was answered and not flushed is written again when the destination has been killed.
#[test]
fn the_destination_may_be_killed_afterwards() {
    let port = reserved_port();
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    // After a kill, the kernel's threads of a ring hold the lock of the image a moment longer.
    let mut destination = listen(port).size(SIZE as u64).engine("sync").arg("--serve").start();
    let worker = Worker::on(&source);
    worker.expect_progress();
    start_mirror(&source, destination.address(), "--relay");
    wait_for_relay(&source);
    let mut gone = Vec::new();
    for _ in 0..3 {
        worker.expect_progress();
        destination.stop_by("KILL");
        let restart =
            format!(r#"bin=$1 file=$6; shift 8; exec "$bin" serve --addr 127.0.0.1 --port {port} --file "$file" "$@""#);
        let again = Server::serve()
            .file(destination.image.clone())
            .engine("sync")
            .through(&["sh", "-c", &restart, "sh"])
            .start();
        // The folder of the first one holds the image.
        gone.push(std::mem::replace(&mut destination, again));
        worker.expect_progress();
    }
    worker.stop().check(&destination.image);
    expect_exit(&mut source, 0);
    let status = destination.status();
    assert!(status.number("writes") > 0);
    assert!(destination.stop().success());
}

/// Before the commit a failure is that of every migration: clients go on as if nothing had been.
#[test]
fn a_failure_before_the_end_is_no_relay() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let refused = mirror(&source, nowhere(), "--relay");
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.starts_with("Mirror failed to connect: "), "{refused:?}");
    let worker = Worker::on(&source);
    let faults = [(At::LastFlush, Fault::Close); 100];
    let destination = Script::new(SIZE).faults(&faults).busy_with(&worker).start();
    start_mirror(&source, destination.address, "--relay");
    wait_for("the second attempt", SOON, || (source.status().number("migration_attempts") >= 2).then_some(()));
    worker.expect_progress();
    assert_eq!(tell("break", &source, ""), (Some(0), "mirror stopped\n".into()));
    worker.expect_progress();
    worker.stop().check(&source.image);
    assert!(source.stop().success());
}

#[test]
fn what_a_relay_does_not_do() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    assert_eq!(
        source.control("mirror\n127.0.0.1\n9\nnothing\nrelay=yes\n\n"),
        "1: a server that goes on serving its image does not relay\n"
    );
    let mut destination = next(0);
    let client = source.connect();
    start_mirror(&source, destination.address(), "--relay");
    wait_for_relay(&source);
    let refused = mirror(&source, nowhere(), "");
    let why = "the image is at another server already, and this one relays to it\n";
    assert_eq!((refused.code, &*refused.stderr), (Some(1), why));
    assert_eq!(tell("break", &source, ""), (Some(1), "not mirroring\n".into()));
    assert!(source.stop().success(), "a signal ends a relay");
    drop(client);
    assert!(destination.stop().success());
}

/// A request of each kind reaches the destination, and what it answers comes back.
#[test]
fn every_request_goes_through() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut destination = next(0);
    let mut client = source.connect();
    start_mirror(&source, destination.address(), "--relay");
    wait_for_relay(&source);
    assert_eq!(client.write(0, &pattern(2, 1 << 20)), 0);
    assert_eq!(client.ask(kind::WRITE_ZEROES, 0, 4096, 8192, &[]), 0);
    assert_eq!(client.ask(kind::TRIM, 0, 1 << 20, 4096, &[]), 0);
    assert_eq!(client.flush(), 0);
    let mut expected = pattern(2, 1 << 20);
    expected[4096..4096 + 8192].fill(0);
    assert_eq!(client.read(0, 1 << 20).unwrap(), expected);
    assert_eq!(client.ask(kind::READ, 0, SIZE as u64, 512, &[]), 28, "as the source has always answered it");
    drop(client);
    expect_exit(&mut source, 0);
    assert_eq!(fs::read(&destination.image).unwrap()[..1 << 20], expected);
    assert!(destination.stop().success());
}

/// fio verifies what it has written, on connections that it never makes again, while the image moves twice.
#[test]
fn fio_verifies_across_two_moves() {
    const BYTES: u64 = 64 << 20;
    let mut source = Server::serve().size(BYTES).start();
    let mut second = listen(0).size(BYTES).arg("--serve").start();
    let mut third = listen(0).size(BYTES).arg("--serve").start();
    let uri = format!("--uri=nbd://{}", source.address());
    let args = "--name=verify --ioengine=nbd --thread --numjobs=2 --size=32m --offset_increment=32m --rw=randrw \
                --bsrange=512-64k --bs_unaligned=0 --iodepth=8 --fsync=64 --verify=crc32c --verify_fatal=1 \
                --verify_backlog=128 --verify_state_save=0 --time_based --runtime=8";
    let mut fio = program("fio");
    fio.args(args.split_whitespace()).arg(uri).current_dir(source.dir().join(""));
    let fio = thread::spawn(move || run_within(&mut fio, &[], DEADLINE));
    wait_for("what fio writes", SOON, || (source.status().number("writes") > 100).then_some(()));
    for (from, to) in [(&source, &second), (&second, &third)] {
        start_mirror(from, to.address(), "--relay");
        wait_for_relay(from);
        let before = to.status().number("writes");
        wait_for("what fio writes", SOON, || (to.status().number("writes") > before + 100).then_some(()));
    }
    let Output { code, stdout, stderr } = fio.join().unwrap();
    assert_eq!(code, Some(0), "{}{stderr}", String::from_utf8_lossy(&stdout));
    expect_exit(&mut source, 0);
    expect_exit(&mut second, 0);
    assert!(third.stop().success());
}
