//! A server that was itself stopped for a while: no peer pays for that.

use crate::support::newstyle::{opt, option, rep, Haggler, PORT};
use crate::support::{kind, request, wait_for, Client, Server, SOON};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

/// Stops the server, does `meanwhile`, and lets it go on after `pause`.
fn stall(server: &Server, pause: Duration, meanwhile: impl FnOnce()) {
    server.process.signal("STOP");
    wait_for("the server to stand still", SOON, || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", server.pid())).unwrap();
        stat.contains(") T ").then_some(())
    });
    meanwhile();
    thread::sleep(pause);
    server.process.signal("CONT");
}

/// Every deadline of those that are connected passes meanwhile: of a negotiation, a request, a command.
#[test]
fn what_lay_there_all_the_time_is_in_time() {
    let server = Server::serve().size(1 << 20).arg(PORT).arg("--killswitch=2").start();
    let mut haggler = Haggler::new(&server);
    haggler.expect_in_step();
    let mut writer = server.connect();
    writer.send(&request(kind::WRITE, 0, 7, 0, 200_000)[..20]);
    let mut command = UnixStream::connect(&server.sock).unwrap();
    command.set_read_timeout(Some(SOON)).unwrap();
    command.write_all(b"acl\n").unwrap();
    wait_for("all of them", SOON, || (server.status().number("num_clients") == 2).then_some(()));

    // Longer than the 10 s that a negotiation and a command may take.
    stall(&server, Duration::from_secs(12), || {
        haggler.client.send(&option(opt::LIST, &[]));
        // More than is received at once.
        writer.send(&[&request(kind::WRITE, 0, 7, 0, 200_000)[20..], &vec![0x5a; 200_000]].concat());
        command.write_all(&[b"127.0.0.1\n".repeat(2000), b"\n".to_vec()].concat()).unwrap();
    });
    // Not what lay there alone: a peer has time for what it says next.
    assert_eq!(haggler.replies(opt::LIST), (vec![(rep::SERVER, vec![0; 4])], rep::ACK), "{}", server.log());
    haggler.expect_in_step();
    haggler.go().expect_alive();
    assert_eq!(writer.read_reply(), (0, 7), "{}", server.log());
    let mut answer = String::new();
    command.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "0: updated\n");
    assert!(!server.log().contains("closed"), "{}", server.log());
}

/// A short one makes nobody late who is not; and whoever stays away is cut all the same.
#[test]
fn a_deadline_that_passed_meanwhile_still_counts() {
    let server = Server::serve().size(1 << 20).arg("--killswitch=2").start();
    let begin = |client: &mut Client| client.send(&request(kind::WRITE, 0, 7, 0, 100_000)[..20]);
    let (mut slow, mut gone) = (server.connect(), server.connect());
    begin(&mut slow);
    begin(&mut gone);
    server.connect().expect_alive();
    stall(&server, Duration::from_secs(3), || {
        slow.send(&[&request(kind::WRITE, 0, 7, 0, 100_000)[20..], &vec![1; 100_000]].concat());
    });
    assert_eq!(slow.read_reply(), (0, 7), "{}", server.log());
    slow.expect_alive();
    gone.read_to_close();
    assert!(server.log().contains("killswitch"), "{}", server.log());
    server.expect_healthy();
}
