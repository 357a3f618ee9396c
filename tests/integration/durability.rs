//! FLUSH and FUA: on stable storage before the reply, one fdatasync for all that ask in one turn, errors told.

use crate::support::newstyle::{simple, PORT};
use crate::support::{errno, flag, kind, request, wait_for, Builder, Client, Mount, Server, SOON, UNCACHED};
use std::fs;
use std::path::PathBuf;

/// A server under strace, which may be told to make calls fail, and the path of the trace. What a ring does strace does not
/// see, so there is none.
fn traced(builder: Builder, expressions: &[&str]) -> (Server, PathBuf) {
    let trace = builder.dir().join("trace");
    let mut words = vec!["strace", "-D", "-f", "-o", trace.to_str().unwrap()];
    words.extend(expressions.iter().flat_map(|expression| ["-e", expression]));
    let server = builder.engine("sync").through(&words).start();
    (server, trace)
}

fn syncs(trace: &PathBuf) -> usize {
    fs::read_to_string(trace).unwrap().matches("fdatasync(").count()
}

#[test]
fn flush_and_fua_sync_before_the_reply_and_nothing_else_does() {
    let (server, trace) =
        traced(Server::serve().size(1 << 20), &["trace=fdatasync,fsync,write,writev,sendto,sendmsg,pwrite64"]);
    let mut client = server.connect();
    let mut expected = 0;
    for (what, kind, flags, length, wanted) in [
        ("a write", kind::WRITE, 0, 600, 0),
        ("a write with FUA", kind::WRITE, flag::FUA, 600, 1),
        ("a long write with FUA", kind::WRITE, flag::FUA, 900_000, 1),
        ("a flush", kind::FLUSH, 0, 0, 1),
        ("zeroes", kind::WRITE_ZEROES, 0, 4096, 0),
        ("zeroes with FUA", kind::WRITE_ZEROES, flag::FUA, 4096, 1),
        ("a trim", kind::TRIM, 0, 4096, 0),
        ("a trim with FUA", kind::TRIM, flag::FUA, 4096, 1),
        ("a read with FUA", kind::READ, flag::FUA, 0, 0),
    ] {
        let payload = if kind == kind::WRITE { vec![1; length as usize] } else { vec![] };
        assert_eq!(client.ask(kind, flags, 0, length, &payload), 0, "{what}");
        expected += wanted;
        // The reply has come, so the sync is in the trace already or never.
        wait_for(what, SOON, || (syncs(&trace) >= expected).then_some(()));
        assert_eq!(syncs(&trace), expected, "{what}");
    }
    let text = fs::read_to_string(&trace).unwrap();
    let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1.trim_start()).collect();
    let sync = lines.iter().position(|line| line.starts_with("fdatasync")).unwrap();
    assert!(lines[sync - 1].starts_with("pwrite64"), "first the write: {lines:?}");
    assert!(lines[sync + 1].contains("gDf\\230"), "then the reply: {lines:?}");
}

/// Pipelined or not, however it arrives.
#[test]
fn a_long_write_is_one_call_of_the_disk() {
    const LENGTH: usize = 1 << 20;
    let (server, trace) = traced(Server::serve().size(8 << 20), &["trace=pwrite64"]);
    let mut client = server.connect();
    let payload = crate::support::pattern(1, LENGTH);
    for cookie in 0..8 {
        client.send_request(kind::WRITE, 0, cookie, cookie * LENGTH as u64, LENGTH as u32, &payload);
    }
    (0..8).for_each(|_| assert_eq!(client.read_reply().0, 0));
    let text = fs::read_to_string(&trace).unwrap();
    let whole = format!(", {LENGTH}, ");
    assert_eq!(text.lines().filter(|line| line.contains(&whole)).count(), 8, "{text}");
    server.expect_healthy();
}

#[test]
fn with_sync_every_change_is_durable_before_the_reply() {
    for style in ["oldstyle", "newstyle"] {
        let builder = Server::serve().size(1 << 20).arg("--sync").arg(PORT);
        let (server, trace) = traced(builder, &["trace=fdatasync,fsync,write,writev,sendto,sendmsg,pwrite64"]);
        assert_eq!(server.status().get("sync"), "true");
        let mut client = if style == "oldstyle" { server.connect() } else { simple(&server) };
        let mut expected = 0;
        for (what, kind, flags, length, wanted) in [
            ("a write", kind::WRITE, 0, 600, 1),
            ("a long write", kind::WRITE, 0, 900_000, 1),
            ("a write with FUA", kind::WRITE, flag::FUA, 600, 1),
            ("zeroes", kind::WRITE_ZEROES, 0, 4096, 1),
            ("a trim", kind::TRIM, 0, 4096, 1),
            ("a read", kind::READ, 0, 0, 0),
            ("a flush", kind::FLUSH, 0, 0, 1),
        ] {
            let payload = if kind == kind::WRITE { vec![1; length as usize] } else { vec![] };
            assert_eq!(client.ask(kind, flags, 0, length, &payload), 0, "{what}");
            expected += wanted;
            wait_for(what, SOON, || (syncs(&trace) >= expected).then_some(()));
            assert_eq!(syncs(&trace), expected, "{what}");
        }
        let text = fs::read_to_string(&trace).unwrap();
        let lines: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap().1.trim_start()).collect();
        let sync = lines.iter().position(|line| line.starts_with("fdatasync")).unwrap();
        assert!(lines[sync - 1].starts_with("pwrite64"), "first the write: {lines:?}");
        assert!(lines[sync + 1].contains("gDf\\230"), "then the reply: {lines:?}");
        server.expect_healthy();
    }
}

#[test]
fn those_that_ask_in_one_turn_share_one_sync() {
    // While the first sync is held up, the others gather.
    let (server, trace) =
        traced(Server::serve().size(1 << 20), &["trace=fdatasync", "inject=fdatasync:delay_enter=300000"]);
    let mut clients: Vec<_> = (0..16).map(|_| server.connect()).collect();
    for round in 0..2 {
        clients[0].send(&request(kind::FLUSH, 0, 0, 0, 0));
        wait_for("the first sync", SOON, || (syncs(&trace) > round * 2).then_some(()));
        for (n, client) in clients.iter_mut().enumerate().skip(1) {
            match n % 3 {
                0 => client.send(&request(kind::FLUSH, 0, 1, 0, 0)),
                _ => client.send_request(kind::WRITE, flag::FUA, 1, n as u64 * 4096, 100, &[n as u8; 100]),
            }
        }
        for client in &mut clients {
            assert_eq!(client.read_reply().0, 0);
        }
        assert_eq!(syncs(&trace), (round + 1) * 2, "one for the first, one for the fifteen others");
    }
}

#[test]
fn pipelined_flushes_of_one_client_share_one_sync() {
    let (server, trace) = traced(Server::serve().size(1 << 20), &["trace=fdatasync"]);
    let mut client = server.connect();
    client.send(&request(kind::FLUSH, 0, 7, 0, 0).repeat(30));
    (0..30).for_each(|_| assert_eq!(client.read_reply(), (0, 7)));
    assert_eq!(syncs(&trace), 1);
}

#[test]
fn a_failed_sync_is_told_and_never_forgotten() {
    let (server, _) = traced(Server::serve().size(1 << 20), &["trace=fdatasync", "inject=fdatasync:error=EIO:when=2"]);
    let mut client = server.connect();
    assert_eq!(client.flush(), 0);
    assert_eq!(client.ask(kind::WRITE, flag::FUA, 0, 100, &[1; 100]), errno::EIO);
    // Pages that could not be written may count as clean now: a later sync would succeed without them.
    assert_eq!(client.flush(), errno::EIO);
    assert_eq!(server.connect().flush(), errno::EIO);
    // Everything else goes on.
    assert_eq!(client.write(0, &[2; 100]), 0);
    assert_eq!(client.read(0, 100).unwrap(), [2; 100]);
    let line = server.wait_for_log("fdatasync");
    assert!(line.contains(":E:"), "{line}");
    assert_eq!(server.status().number("errors"), 3);
    server.expect_healthy();
}

/// Every call of the disk, made to fail: an error reply, and the server goes on.
#[test]
fn io_errors_are_replies() {
    type Work = fn(&mut Client) -> u32;
    let read: Work = |client| client.read(0, 100_000).err().unwrap_or(0);
    let write: Work = |client| client.write(512, &vec![7; 300_000]);
    let zeroes: Work = |client| client.ask(kind::WRITE_ZEROES, 0, 0, 4096, &[]);
    let trim: Work = |client| client.ask(kind::TRIM, 0, 0, 4096, &[]);
    for (call, error, work, expected) in [
        ("pread64", "EIO", read, errno::EIO),
        ("pwrite64", "EIO", write, errno::EIO),
        ("pwrite64", "ENOSPC", write, errno::ENOSPC),
        ("pwrite64", "EDQUOT", write, errno::ENOSPC),
        ("fallocate", "EIO", zeroes, errno::EIO),
        ("fallocate", "ENOSPC", zeroes, errno::ENOSPC),
        ("fallocate", "EOPNOTSUPP", zeroes, 0),
        ("fallocate", "EOPNOTSUPP", trim, 0),
        ("fallocate", "EIO", trim, errno::EIO),
        ("pwrite64", "EINTR", write, 0),
        ("pread64", "EINTR", read, 0),
    ] {
        let content = crate::support::pattern(1, 1 << 20);
        // The first call of each kind fails; the loader's own preads come before and are on other files.
        let inject = format!("inject={call}:error={error}:when=1");
        let builder = Server::serve().content(&content);
        let path = builder.dir().join("image");
        let trace = builder.dir().join("trace");
        let words = [
            "strace",
            "-D",
            "-f",
            "-o",
            trace.to_str().unwrap(),
            "-P",
            path.to_str().unwrap(),
            "-e",
            &inject,
            "-e",
            UNCACHED,
        ];
        let server = builder.engine("sync").through(&words).start();
        let mut client = server.connect();
        assert_eq!(work(&mut client), expected, "{call} {error}");
        assert_eq!(client.write(0, &[5; 512]), 0, "{call} {error}: then it goes on");
        assert_eq!(client.read(0, 512).unwrap(), [5; 512]);
        if expected != 0 {
            let line = server.wait_for_log(&client.stream.local_addr().unwrap().to_string());
            assert!(line.contains(":E:"), "{line}");
        }
        server.expect_healthy();
    }
}

#[test]
fn a_long_read_that_fails_half_way_cuts_the_connection() {
    let builder = Server::serve().size(8 << 20);
    let path = builder.dir().join("image");
    let trace = builder.dir().join("trace");
    let words = [
        "strace",
        "-D",
        "-f",
        "-o",
        trace.to_str().unwrap(),
        "-P",
        path.to_str().unwrap(),
        "-e",
        "inject=pread64:error=EIO:when=5",
        "-e",
        UNCACHED,
    ];
    let server = builder.engine("sync").through(&words).start();
    let mut client = server.connect();
    client.send(&request(kind::READ, 0, 1, 0, 8 << 20));
    let received = client.read_to_close().len();
    assert!(received < 16 + (8 << 20), "a success that was said cannot be taken back: {received}");
    server.wait_for_log(":E:");
    server.expect_healthy();
}

#[test]
fn a_file_that_was_cut_short_is_an_error_reply() {
    let server = Server::serve().content(&vec![1; 1 << 20]).start();
    let mut client = server.connect();
    fs::File::options().write(true).open(&server.image).unwrap().set_len(100_000).unwrap();
    assert_eq!(client.read(90_000, 20_000), Err(errno::EIO));
    assert_eq!(client.read(500_000, 512), Err(errno::EIO));
    client.read(0, 512).unwrap();
    server.expect_healthy();
}

#[test]
fn what_fails_in_a_long_read_is_an_error_of_that_read_alone() {
    let content = crate::support::pattern(3, 4 << 20);
    let server = Server::serve().content(&content).start();
    let mut client = server.connect();
    assert!(client.read(0, 4 << 20).unwrap() == content);
    // Beyond the first slice; beyond what is read before the reply begins; in the last block.
    for cut in [300_000, 3 << 20, (4 << 20) - 1] {
        fs::File::options().write(true).open(&server.image).unwrap().set_len(cut).unwrap();
        for (offset, length) in [(0, 4 << 20), (cut - 40_000, 1 << 20), (cut - 299_999, 300_000)] {
            let length = length.min((4 << 20) - offset);
            assert_eq!(
                client.read(offset, u32::try_from(length).unwrap()),
                Err(errno::EIO),
                "{cut}: {length} at {offset}"
            );
        }
        assert!(client.read(0, 300_000).unwrap() == content[..300_000], "it goes on");
        fs::write(&server.image, &content).unwrap();
        assert!(client.read(0, 4 << 20).unwrap() == content);
    }
    server.expect_healthy();
}

#[test]
fn a_full_disk_is_an_error_reply() {
    let Some(mount) = Mount::tmpfs("1m") else { return };
    let path = mount.join("image");
    fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    let server = Server::serve().file(path).start();
    let mut client = server.connect();
    let mut other = server.connect();
    assert_eq!(client.write(0, &vec![1; 65_536]), 0);
    assert_eq!(client.write(1 << 20, &vec![2; 4 << 20]), errno::ENOSPC);
    assert_eq!(client.write(0, &[3; 4096]), 0, "what is there can be written again");
    assert_eq!(other.read(0, 4096).unwrap(), [3; 4096]);
    assert_eq!(client.ask(kind::TRIM, 0, 1 << 20, 8 << 20, &[]), 0);
    assert_eq!(client.write(1 << 20, &vec![2; 65_536]), 0, "room again");
    server.expect_healthy();
}

#[test]
fn a_limit_on_file_sizes_is_an_error_reply() {
    // SIGXFSZ would end a program that does not mind it.
    let server = Server::serve().size(1 << 20).through(&["prlimit", "--fsize=500000:500000"]).start();
    let mut client = server.connect();
    assert_eq!(client.write(400_000, &[1; 1000]), 0);
    assert_eq!(client.write(600_000, &[1; 1000]), errno::ENOSPC);
    assert_eq!(client.write(499_000, &[1; 2000]), errno::ENOSPC);
    server.expect_healthy();
}

#[test]
fn what_was_flushed_survives_a_kill() {
    let mut server = Server::serve().size(1 << 20).start();
    let mut client = server.connect();
    assert_eq!(client.write(1000, b"survives"), 0);
    assert_eq!(client.flush(), 0);
    server.process.signal("KILL");
    server.process.wait(SOON);
    assert_eq!(&fs::read(&server.image).unwrap()[1000..1008], b"survives");
}
