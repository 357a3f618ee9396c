//! Clients that hide the absence of a server from others: they name their session, so that a new connection takes the place
//! of the old one, and hear from a server that ends what they have to ask for again.

use crate::support::fuse::{Disk, Op};
use crate::support::newstyle::{
    allocation_context, context_data, opt, option, rep, serve, Haggler, Structured, BLOCK_STATUS, PORT,
};
use crate::support::peers::{expect_exit, expect_migrated, listen, send_image, start_mirror};
use crate::support::{errno, flag, has, kind, pattern, request, wait_for, Client, Need, Server, SOON};
use std::fs;
use std::time::{Duration, Instant};

const SIZE: u64 = 1 << 20;
const ESHUTDOWN: u32 = 108;
const A_MOMENT: Duration = Duration::from_millis(100);

fn name(n: u8) -> String {
    format!("flexnbd:session:{}", format!("{n:02x}").repeat(16))
}

/// The context of a session, as its reply holds it.
fn session_context(name: &str) -> Vec<u8> {
    [&2_u32.to_be_bytes(), name.as_bytes()].concat()
}

/// Has structured replies, and asks for these contexts; whether and how it is answered is left to the caller.
#[track_caller]
fn asks(server: &Server, queries: &[&str]) -> Haggler {
    let mut haggler = Haggler::new(server);
    haggler.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
    haggler.client.send(&option(opt::SET_META_CONTEXT, &context_data(b"", queries)));
    haggler
}

/// A client that has named its session and may read, write and ask for the allocation.
#[track_caller]
fn named(server: &Server, n: u8) -> Structured {
    let mut haggler = asks(server, &["base:allocation", &name(n)]);
    let contexts = [allocation_context(), session_context(&name(n))];
    let expected = contexts.into_iter().map(|context| (rep::META_CONTEXT, context)).collect();
    assert_eq!(haggler.replies(opt::SET_META_CONTEXT), (expected, rep::ACK));
    Structured { client: haggler.go() }
}

fn expect_alive(client: &mut Structured) {
    client.read(0, 0, 512).unwrap();
}

#[test]
fn a_session_is_named_by_a_metadata_context() {
    let server = serve(SIZE);
    let mut haggler = asks(&server, &[&name(7)]);
    let context = vec![(rep::META_CONTEXT, session_context(&name(7)))];
    assert_eq!(haggler.replies(opt::SET_META_CONTEXT), (context, rep::ACK));
    // It asked for nothing else, so there is no allocation.
    let mut client = haggler.go();
    client.send(&request(BLOCK_STATUS, 0, 9, 0, 4096));
    let mut client = Structured { client };
    assert_eq!(Structured::error_of(&client.chunk()), errno::EINVAL);
    expect_alive(&mut client);

    for ill_formed in ["flexnbd:", "flexnbd:session:", "flexnbd:session:12", &name(7)[1..], &(name(7) + "0"), "x:y"] {
        let mut haggler = asks(&server, &[ill_formed]);
        assert_eq!(haggler.replies(opt::SET_META_CONTEXT), (vec![], rep::ACK), "{ill_formed}");
        haggler.expect_in_step();
    }
    for query in ["flexnbd:", "flexnbd:session:", &name(7)] {
        let mut haggler = Haggler::new(&server);
        haggler.expect(opt::SET_META_CONTEXT, &context_data(b"", &[query]), rep::ERR_INVALID);
        haggler.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
        haggler.expect(opt::LIST_META_CONTEXT, &context_data(b"", &[query]), rep::ACK);
    }
    // A later SET takes the name back: it is nobody's then.
    let mut haggler = asks(&server, &[&name(8)]);
    haggler.replies(opt::SET_META_CONTEXT);
    haggler.expect(opt::SET_META_CONTEXT, &context_data(b"", &[]), rep::ACK);
    let other = named(&server, 8);
    haggler.expect_in_step();
    drop(other);
    server.expect_healthy();
}

#[test]
fn a_new_connection_takes_the_place_of_the_old_one_and_of_no_other() {
    let server = Server::serve().size(SIZE).arg(PORT).arg("-v").start();
    let mut strangers = [named(&server, 1), named(&server, 2)];
    let mut plain = server.connect();
    let mut old = named(&server, 3);
    assert_eq!(old.client.write(0, &[3; 4096]), 0);
    // Half a request, of which nothing is done any more.
    old.client.send_request(kind::WRITE, 0, 5, 8192, 4096, &[5; 1000]);
    for _ in 0..3 {
        let mut new = named(&server, 3);
        // It was gone before the answer.
        assert_eq!(old.client.read_to_close(), b"");
        assert_eq!(new.read(0, 0, 4096).unwrap().0, [3; 4096]);
        old = new;
    }
    let mut pending = asks(&server, &[&name(9)]);
    pending.replies(opt::SET_META_CONTEXT);
    let mut latest = named(&server, 9);
    pending.client.expect_closed();
    strangers.iter_mut().chain([&mut old, &mut latest]).for_each(expect_alive);
    plain.expect_alive();
    let line = server.wait_for_log("its session goes on over a new connection");
    assert!(line.contains(":I:"), "{line}");
    assert_eq!(fs::read(&server.image).unwrap()[8192..12288], [0; 4096]);
    server.expect_healthy();
}

/// A server and a client with the name 3, for which the kernel has an fdatasync in hand that the disk holds.
fn with_a_sync_in_hand() -> Option<(Disk, Server, Structured)> {
    if !has(&[Need::Ring]) {
        return None;
    }
    let disk = Disk::mount(4 * SIZE)?;
    let builder = Server::serve().file(disk.furnish("image", &pattern(1, SIZE as usize))).arg(PORT).engine("ring");
    let server = builder.start();
    let mut old = named(&server, 3);
    disk.hold(Op::Fsync, ..);
    old.client.send_request(kind::WRITE, flag::FUA, 1, 0, 4096, &[9; 4096]);
    disk.wait_for_waiting(Op::Fsync, 1);
    Some((disk, server, old))
}

/// What the kernel has in hand for the old connection ends before the new one is answered.
#[test]
fn the_answer_waits_for_what_the_disk_has_in_hand() {
    let Some((disk, server, mut old)) = with_a_sync_in_hand() else { return };
    let mut new = asks(&server, &[&name(3)]);
    assert_eq!(old.client.read_to_close(), b"");
    new.client.expect_silence(A_MOMENT);
    // Others do not wait.
    expect_alive(&mut named(&server, 4));
    new.client.expect_silence(A_MOMENT);
    disk.heal(Op::Fsync);
    assert_eq!(new.replies(opt::SET_META_CONTEXT).1, rep::ACK);
    expect_alive(&mut Structured { client: new.go() });
    server.expect_healthy();
}

#[test]
fn a_disk_that_hangs_keeps_the_answer_until_the_negotiation_has_taken_too_long() {
    let Some((disk, server, _old)) = with_a_sync_in_hand() else { return };
    let start = Instant::now();
    let mut new = asks(&server, &[&name(3)]);
    wait_for("the end of its negotiation", Duration::from_secs(20), || {
        server.log().contains("the negotiation took too long").then_some(())
    });
    assert_eq!(new.client.read_to_close(), b"");
    assert!(start.elapsed() > Duration::from_secs(8));
    disk.heal(Op::Fsync);
    expect_alive(&mut named(&server, 3));
    server.expect_healthy();
}

#[test]
fn a_listener_serves_nobody_before_it_has_its_image() {
    let image = pattern(1, SIZE as usize);
    let server = listen(0).size(SIZE).arg(PORT).arg("--serve").arg("-v").start();
    for _ in 0..3 {
        let mut haggler = asks(&server, &["base:allocation", &name(3)]);
        assert_eq!(haggler.reply(opt::SET_META_CONTEXT), (rep::ERR_POLICY, b"not yet".to_vec()));
        haggler.client.expect_closed();
    }
    wait_for("its place", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    let log = server.log();
    assert!(!log.contains("no complete migration"), "{log}");
    assert!(log.contains("it wants to be served, and there is no image yet"), "{log}");
    let mut sender = server.connect();
    send_image(&mut sender, &image);
    sender.send(&request(kind::DISC, 0, 0, 0, 0));
    assert_eq!(sender.read_to_close(), b"");
    let mut client = named(&server, 3);
    assert_eq!(client.read(0, 0, SIZE as u32).unwrap().0, image);
    drop(client);
    server.expect_healthy();
}

/// A client that has asked for what is not done: half a WRITE, and a read behind it that cannot be parsed yet.
fn half_asks(client: &mut Client) {
    client.send_request(kind::WRITE, 0, 77, 0, 8192, &[5; 4096]);
}

#[test]
fn a_server_that_ends_says_what_is_not_executed_to_those_that_named_their_session() {
    let mut server = serve(SIZE);
    let (mut client, mut plain, mut idle) = (named(&server, 3), server.connect(), named(&server, 4));
    half_asks(&mut client.client);
    half_asks(&mut plain);
    wait_for("both of them", SOON, || {
        let status = server.control("status json clients\n\n");
        (status.matches("\"in_flight\":1").count() == 2).then_some(())
    });
    assert_eq!(server.stop().code(), Some(0));
    assert_eq!(client.client.read_reply(), (ESHUTDOWN, 77));
    assert_eq!(client.client.read_to_close(), b"");
    assert_eq!((plain.read_to_close(), idle.client.read_to_close()), (vec![], vec![]));
}

#[test]
fn a_migration_ends_with_the_same_word() {
    let mut source = Server::serve().content(&pattern(1, SIZE as usize)).arg(PORT).start();
    let mut destination = listen(0).size(SIZE).start();
    let (mut client, mut plain) = (named(&source, 3), source.connect());
    half_asks(&mut client.client);
    half_asks(&mut plain);
    wait_for("both of them", SOON, || {
        let status = source.control("status json clients\n\n");
        (status.matches("\"in_flight\":1").count() == 2).then_some(())
    });
    start_mirror(&source, destination.address(), "");
    expect_migrated(&mut source, &mut destination);
    assert_eq!(client.client.read_reply(), (ESHUTDOWN, 77));
    assert_eq!(client.client.read_to_close(), b"");
    assert_eq!(plain.read_to_close(), b"");
    expect_exit(&mut source, 0);
}
