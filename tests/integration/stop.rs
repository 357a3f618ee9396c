//! Stopping: at once, whatever peers are doing, with nothing left behind.

use crate::support::fuse::{Disk, Op};
use crate::support::{kind, pattern, peers, request, run_command, wait_for, Client, Process, Server, BIN, SOON};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn signals_stop_it_whatever_clients_do() {
    for signal in ["INT", "QUIT", "TERM"] {
        let mut server = Server::serve().size(64 << 20).arg("-v").start();
        let mut half_head = server.connect();
        half_head.send(&request(kind::READ, 0, 1, 0, 512)[..13]);
        let mut half_payload = server.connect();
        half_payload.send(&request(kind::WRITE, 0, 1, 0, 1 << 20));
        half_payload.send(&[1; 1000]);
        let mut never_reads = server.connect();
        never_reads.send(&request(kind::READ, 0, 1, 0, 64 << 20).repeat(10));
        let half_closed = server.connect();
        half_closed.stream.shutdown(Shutdown::Write).unwrap();
        let mut idle = server.connect();
        let mut half_command = UnixStream::connect(&server.sock).unwrap();
        half_command.write_all(b"stat").unwrap();
        idle.expect_alive();

        let start = Instant::now();
        let status = server.stop_by(signal);
        assert_eq!(status.code(), Some(0), "{signal}: {}", server.log());
        assert!(start.elapsed() < Duration::from_secs(5), "{signal}: at once");
        assert!(!server.sock.exists(), "{signal}: the control socket is removed");
        idle.expect_closed();
        assert!(server.log().contains(signal), "{}", server.log());
    }
}

/// A script's `&` makes SIGINT and SIGQUIT ignored, and `trap '' TERM` does the same for SIGTERM; `nohup` is meant.
#[test]
fn signals_that_are_inherited_as_ignored_stop_it_all_the_same() {
    let ignore = "trap '' INT QUIT TERM HUP; exec";
    for signal in ["INT", "QUIT", "TERM"] {
        let script = format!("{ignore} \"$@\"");
        let mut server = Server::serve().size(4096).through(&["sh", "-c", &script, "sh"]).start();
        server.process.signal("HUP");
        server.connect().expect_alive();
        assert_eq!(server.stop_by(signal).code(), Some(0), "{signal}: {}", server.log());
        let mut listener = peers::listen_after(0, ignore).size(4096).start();
        listener.process.signal("HUP");
        listener.connect().expect_alive();
        assert_eq!(listener.stop_by(signal).code(), Some(1), "{signal}: nothing has been migrated");
        assert!(listener.log().contains(":F:"), "{}", listener.log());
    }
}

#[test]
fn it_stops_in_the_middle_of_much_work() {
    let mut server = Server::serve().size(1 << 30).start();
    let mut clients: Vec<Client> = (0..8).map(|_| server.connect()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        let kind = if n % 2 == 0 { kind::WRITE_ZEROES } else { kind::READ };
        client.send(&request(kind, 2 * u16::from(n % 2 == 0), 1, 0, 1 << 30).repeat(20));
    }
    let start = Instant::now();
    assert_eq!(server.stop().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(5), "took {:?}", start.elapsed());
}

/// What was answered before the signal is there, and nothing is changed after the end.
#[test]
fn it_stops_with_operations_in_the_disk() {
    const SIZE: u64 = 8 << 20;
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    let mut server = Server::serve().file(disk.furnish_sparse("image", SIZE)).start();
    let mut client = server.connect();
    let payload = pattern(1, 4096);
    assert_eq!(client.write(SIZE - 4096, &payload), 0);
    // Of the rest it is minutes to the end.
    disk.delay(Op::Fallocate, .., Duration::from_millis(20));
    let mut others: Vec<Client> = (0..4).map(|_| server.connect()).collect();
    for other in &mut others {
        other.send(&request(kind::WRITE_ZEROES, 0, 1, 0, (SIZE - 4096) as u32).repeat(32));
    }
    disk.wait_for_waiting(Op::Fallocate, 1);
    assert_eq!(server.stop().code(), Some(0), "{}", server.log());
    let changes = disk.log();
    client.expect_closed();
    assert_eq!(std::fs::read(disk.path("image")).unwrap()[SIZE as usize - 4096..], payload);
    assert_eq!(disk.log(), changes, "the server is gone");
}

#[test]
fn a_hangup_of_every_peer_is_no_reason_to_stop() {
    let server = Server::serve().size(64 << 20).start();
    for _ in 0..20 {
        let mut client = server.connect();
        // It goes with replies unread, so that the server writes into a reset connection.
        client.send(&request(kind::READ, 0, 1, 0, 8 << 20));
        client.read_bytes(1000);
    }
    server.expect_healthy();
}

#[test]
fn the_socket_of_another_server_is_left_alone() {
    let mut old = Server::serve().size(4096).start();
    // Someone moves it out of the way and starts another server in its place.
    std::fs::rename(&old.sock, old.dir().join("moved")).unwrap();
    let image = old.dir().join("other");
    std::fs::write(&image, [0; 4096]).unwrap();
    let mut command = Command::new(BIN);
    command.args(["serve", "-l", "127.0.0.1", "-p", "0", "-f"]).arg(image).arg("-s").arg(&old.sock);
    let _new = Process::spawn(&mut command);
    wait_for("the new server", SOON, || UnixStream::connect(&old.sock).ok());
    assert_eq!(old.stop().code(), Some(0));
    UnixStream::connect(&old.sock).expect("the new server is still to be reached");
}

#[test]
fn without_a_control_socket_it_runs_and_stops_too() {
    let dir = crate::support::TempDir::new();
    std::fs::write(dir.join("image"), [3; 4096]).unwrap();
    let nbd = dir.join("nbd");
    let mut command = Command::new("timeout");
    command.args(["-s", "INT", "1", BIN, "serve", "-v", "-l"]).arg(&nbd).arg("-f").arg(dir.join("image"));
    let output = run_command(&mut command, &[]);
    // `timeout` says 124 when it had to send its signal, and with --preserve-status what the program said.
    assert_eq!(output.code, Some(124), "{}", output.stderr);
    assert!(output.stderr.contains("INT") && !nbd.exists(), "{}", output.stderr);
}
