//! Requests, replies, errors, and how a connection ends ("Transmission phase").

use crate::support::newstyle::{
    opt, serve, serve_content, simple, structured, traced, Haggler, BLOCK_STATUS, CACHE, DF, EPERM, FAST_ZERO, FLAGS,
    FLAG_DF, PORT, REQ_ONE,
};
use crate::support::peers::{expect_migrated, listen, start_mirror, tell};
use crate::support::{
    errno::{EINVAL, EIO, ENOSPC},
    flag, kind, pattern, reply, request, wait_for, Client, Server, SOON, UNCACHED,
};
use std::collections::BTreeSet;
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u64 = 1 << 20;

/// "Protocol phases", "Request message".
#[test]
fn no_delay_and_no_resynchronising() {
    let builder = Server::serve().size(SIZE).arg(PORT);
    let trace = builder.dir().join("trace");
    let words = ["strace", "-D", "-f", "-o", trace.to_str().unwrap(), "-e", "trace=setsockopt"];
    let server = builder.through(&words).start();
    simple(&server).expect_alive();
    let text = std::fs::read_to_string(&trace).unwrap();
    assert!(text.contains("TCP_NODELAY, [1]"), "{text}");

    let mut other = simple(&server);
    let good = request(kind::READ, 0, 1, 0, 512);
    for at in 0..4 {
        let mut bad = good.clone();
        bad[at] ^= 0x80;
        let mut client = simple(&server);
        client.send(&[bad, good.repeat(3)].concat());
        client.expect_closed();
        // What was asked before it is answered.
        let mut client = simple(&server);
        client.send(&[request(kind::FLUSH, 0, 9, 0, 0), vec![0; 28]].concat());
        assert_eq!(client.read_to_close(), reply(0, 9));
    }
    other.expect_alive();
    server.expect_healthy();
}

/// "Request message", "Ordering of messages and writes".
#[test]
fn cookies_come_back_and_replies_stay_whole() {
    let content = pattern(26, SIZE as usize);
    let server = serve_content(&content);
    thread::scope(|scope| {
        for seed in 0..4_u64 {
            let (server, content) = (&server, &content);
            scope.spawn(move || {
                let mut client = structured(server);
                for round in 0..20 {
                    let asked: Vec<(u64, u64, u32)> = (0..31)
                        .map(|n| {
                            let mixed = (round * 31 + n + seed * 7919).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                            (mixed, mixed % (SIZE / 2), 1 + (mixed >> 40) as u32 % 30_000)
                        })
                        .collect();
                    let all: Vec<u8> = asked
                        .iter()
                        .flat_map(|&(cookie, at, length)| request(kind::READ, 0, cookie, at, length))
                        .collect();
                    client.client.send(&all);
                    let mut open: BTreeSet<u64> = asked.iter().map(|asked| asked.0).collect();
                    while !open.is_empty() {
                        let chunk = client.chunk();
                        let (_, at, length) = asked[asked.iter().position(|asked| asked.0 == chunk.cookie).unwrap()];
                        assert_eq!((chunk.kind, &chunk.payload[..8]), (1, &at.to_be_bytes()[..]));
                        assert!(chunk.payload[8..] == content[at as usize..][..length as usize]);
                        assert!(chunk.done && open.remove(&chunk.cookie), "one answer each");
                    }
                }
            });
        }
    });
    // The cookie means nothing, and may be that of another.
    let mut client = simple(&server);
    for cookie in [0, u64::MAX, 0x6744_6698_0000_0000, 7, 7, 7] {
        client.send(&request(kind::FLUSH, 0, cookie, 0, 0));
    }
    let cookies: Vec<u64> = (0..6).map(|_| client.read_reply().1).collect();
    assert_eq!(cookies.iter().filter(|&&cookie| cookie == 7).count(), 3, "{cookies:?}");
    server.expect_healthy();
}

/// "Transmission flags".
#[test]
fn flags_tell_what_is_there() {
    let server = serve(SIZE);
    let (_, flags) = Haggler::new(&server).info(opt::INFO);
    assert_eq!(flags, FLAGS);
    assert!(flags & 1 == 1 && flags & FLAG_DF == 0 && flags & 2 == 0 && flags >> 12 == 0);
    let (_, flags) = Haggler::new(&server).structured().info(opt::INFO);
    assert_eq!(flags, FLAGS | FLAG_DF);
    // Everything that is offered is answered well.
    let mut client = structured(&server);
    for (kind, flags) in [
        (kind::FLUSH, 0),
        (kind::TRIM, flag::FUA),
        (kind::WRITE_ZEROES, flag::FUA),
        (kind::WRITE_ZEROES, FAST_ZERO),
        (CACHE, 0),
    ] {
        assert_eq!(client.client.ask(kind, flags, 0, 512, &[]), 0, "type {kind}");
    }
    client.read(DF, 0, 512).unwrap();
    server.expect_healthy();
}

/// "Error values".
#[test]
fn unknown_commands_and_flags_are_invalid() {
    let server = serve_content(&pattern(28, SIZE as usize));
    let mut client = simple(&server);
    for unknown in [8, 9, 99, 0x100, 0x8000, u16::MAX] {
        assert_eq!(client.ask(unknown, 0, 0, 512, &[]), EINVAL, "type {unknown}");
        assert_eq!(client.ask(unknown, u16::MAX, u64::MAX, u32::MAX, &[]), EINVAL, "type {unknown}");
        client.expect_alive();
    }
    let valid = |kind, structured| match kind {
        kind::READ if structured => DF,
        kind::WRITE_ZEROES => flag::NO_HOLE | FAST_ZERO,
        BLOCK_STATUS => REQ_ONE,
        _ => 0,
    };
    for kind in [kind::READ, kind::WRITE, kind::FLUSH, kind::TRIM, CACHE, kind::WRITE_ZEROES] {
        for bad in (1..16).map(|bit| 1 << bit).filter(|bit| valid(kind, false) & bit == 0) {
            let payload = if kind == kind::WRITE { vec![0xbb; 64] } else { vec![] };
            assert_eq!(client.ask(kind, bad, 0, 64, &payload), EINVAL, "type {kind}, flags {bad:#x}");
        }
        client.expect_alive();
    }
    let mut client = structured(&server);
    for bad in (1..16).map(|bit| 1 << bit) {
        if valid(kind::READ, true) & bad == 0 {
            assert_eq!(client.read(bad, 0, 64), Err(EINVAL), "READ, flags {bad:#x}");
        }
        if valid(BLOCK_STATUS, true) & bad == 0 {
            assert_eq!(client.block_status(bad, 0, 64), Err(EINVAL), "BLOCK_STATUS, flags {bad:#x}");
        }
    }
    assert!(std::fs::read(&server.image).unwrap() == pattern(28, SIZE as usize), "nothing was done");
    server.expect_healthy();
}

/// "Request types": `NBD_CMD_WRITE`.
#[test]
fn the_payload_of_a_refused_write_is_consumed() {
    let content = pattern(29, SIZE as usize);
    let server = serve_content(&content);
    for mut client in [simple(&server), structured(&server).client] {
        for (flags, offset, length, expected) in [
            (0, SIZE, 1, ENOSPC),
            (0, SIZE - 1, 70_000, ENOSPC),
            (0, u64::MAX, 5 << 20, ENOSPC),
            (1 << 9, 0, 4096, EINVAL),
            (DF, 0, 1 << 20, EINVAL),
        ] {
            // The payload looks like requests.
            let mut payload = request(kind::DISC, 0, 0, 0, 0).repeat(length / 28 + 1);
            payload.truncate(length);
            assert_eq!(client.ask(kind::WRITE, flags, offset, length as u32, &payload), expected);
            assert_eq!(client.flush(), 0);
        }
    }
    assert!(std::fs::read(&server.image).unwrap() == content);
    server.expect_healthy();
}

/// "Size constraints".
#[test]
fn offset_and_length_do_not_wrap() {
    let content = pattern(30, SIZE as usize);
    let server = serve_content(&content);
    let mut client = structured(&server);
    for (offset, length) in [
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (u64::MAX - 4095, 4096),
        (u64::MAX - 4095, 8192),
        (1 << 63, 4096),
        ((1 << 63) - 1, 4096),
        (1 << 32, 1),
        ((1 << 32) - 1, 1),
        (0_u64.wrapping_sub(u64::from(u32::MAX)), u32::MAX),
    ] {
        assert_eq!(client.read(0, offset, 0), Err(EINVAL), "nothing, but nowhere: {offset}");
        assert_eq!(client.block_status(0, offset, length), Err(EINVAL));
        assert_eq!(client.client.ask(kind::TRIM, 0, offset, length, &[]), EINVAL);
        assert_eq!(client.client.ask(CACHE, 0, offset, length, &[]), EINVAL);
        assert_eq!(client.client.ask(kind::WRITE_ZEROES, 0, offset, length, &[]), ENOSPC);
        if length <= 8192 {
            assert_eq!(client.read(0, offset, length), Err(EINVAL));
            let payload = vec![0xbb; length as usize];
            assert_eq!(client.client.ask(kind::WRITE, 0, offset, length, &payload), ENOSPC);
        }
        client.expect_alive();
    }
    assert!(std::fs::read(&server.image).unwrap() == content);
    server.expect_healthy();
}

/// "Error values".
#[test]
fn beyond_the_end() {
    let server = serve(SIZE);
    let (mut plain, mut chunked) = (simple(&server), structured(&server));
    for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (SIZE - 512, 1024), (0, SIZE as u32 + 1), (SIZE + 1, 512)] {
        assert_eq!(plain.read(offset, length), Err(EINVAL));
        assert_eq!(chunked.read(0, offset, length), Err(EINVAL));
        assert_eq!(chunked.block_status(0, offset, length), Err(EINVAL));
        for client in [&mut plain, &mut chunked.client] {
            assert_eq!(client.ask(kind::TRIM, 0, offset, length, &[]), EINVAL);
            assert_eq!(client.ask(kind::WRITE, 0, offset, length, &vec![1; length as usize]), ENOSPC);
            assert_eq!(client.ask(kind::WRITE_ZEROES, 0, offset, length, &[]), ENOSPC);
        }
    }
    // Up to the end is not beyond it.
    assert_eq!(plain.write(SIZE - 1, &[1]), 0);
    assert_eq!(chunked.block_status(0, SIZE - 1, 1).unwrap().len(), 1);
    server.expect_healthy();
}

/// Makes a system call of the image fail, and returns what a WRITE, a READ, a TRIM, zeroes or a FLUSH is told then.
fn told(call: &str, error: &str, kind: u16) -> u32 {
    let inject = format!("inject={call}:error={error}:when=1");
    let (server, _) = traced(Server::serve().content(&pattern(32, SIZE as usize)), &[&inject, UNCACHED]);
    let mut client = simple(&server);
    let payload = if kind == kind::WRITE { vec![1; 4096] } else { vec![] };
    let length = if kind == kind::FLUSH { 0 } else { 4096 };
    let said = client.ask(kind, 0, 0, length, &payload);
    if kind != kind::READ || said != 0 {
        assert!(client.flush() == 0 || call == "fdatasync", "then it goes on");
    }
    server.expect_healthy();
    said
}

/// "Error values".
#[test]
fn only_defined_errors_leave_the_server() {
    let io = [
        ("EROFS", EPERM),
        ("EACCES", EPERM),
        ("EPERM", EPERM),
        ("EDQUOT", ENOSPC),
        ("EFBIG", ENOSPC),
        ("ENOSPC", ENOSPC),
        ("EBADMSG", EIO),
        ("EPIPE", EIO),
        ("EAGAIN", EIO),
        ("ENXIO", EIO),
        ("EILSEQ", EIO),
        // ENOTSUP is for FAST_ZERO alone, EOVERFLOW for reads in one piece.
        ("EOPNOTSUPP", EIO),
        ("ENOSYS", EIO),
        ("EOVERFLOW", EIO),
        ("ESTALE", EIO),
    ];
    let mut wrong = Vec::new();
    let mut check = |call, error, kind, expected| {
        let said = told(call, error, kind);
        if said != expected {
            wrong.push(format!("{call}, {error}: {said}, not {expected}"));
        }
    };
    for (error, expected) in io {
        check("pwrite64", error, kind::WRITE, expected);
    }
    for error in ["EIO", "EBADMSG", "EOPNOTSUPP", "EOVERFLOW"] {
        check("pread64", error, kind::READ, EIO);
        check("fdatasync", error, kind::FLUSH, EIO);
    }
    assert!(wrong.is_empty(), "{wrong:?}");
    // Without FAST_ZERO and for TRIM there is always another way.
    assert_eq!(told("fallocate", "EOPNOTSUPP", kind::WRITE_ZEROES), 0);
    assert_eq!(told("fallocate", "EOPNOTSUPP", kind::TRIM), 0);
    assert_eq!(told("fallocate", "EPERM", kind::TRIM), EPERM);
}

/// "Request types".
#[test]
fn requests_of_no_length_are_harmless() {
    let server = serve(SIZE);
    let mut plain = simple(&server);
    let mut chunked = structured(&server);
    for offset in [0, 1, SIZE] {
        for client in [&mut plain, &mut chunked.client] {
            for kind in [kind::WRITE, kind::TRIM, kind::WRITE_ZEROES, kind::FLUSH, CACHE] {
                assert_eq!(client.ask(kind, 0, offset, 0, &[]), 0, "type {kind}");
            }
        }
        assert_eq!(plain.read(offset, 0), Ok(vec![]));
        for flags in [0, DF] {
            assert_eq!(chunked.read(flags, offset, 0), Ok((vec![], vec![])), "no chunk of no length");
        }
        // There is no extent without a length, and a reply needs one.
        assert_eq!(chunked.block_status(0, offset, 0), Err(EINVAL));
    }
    server.expect_healthy();
}

/// "Size constraints".
#[test]
fn more_than_was_announced_is_served() {
    let server = serve(5 << 30);
    let mut client = simple(&server);
    let payload = pattern(35, (33 << 20) + 5);
    assert_eq!(client.write(7, &payload), 0);
    assert!(client.read(7, payload.len() as u32).unwrap() == payload);
    for kind in [kind::TRIM, kind::WRITE_ZEROES, CACHE] {
        assert_eq!(client.ask(kind, 0, 513, u32::MAX, &[]), 0, "type {kind}");
        client.expect_alive();
    }
    assert_eq!(client.read(7, 600).unwrap()[506..], [0; 94]);
    let found = structured(&server).block_status(0, 0, u32::MAX).unwrap();
    assert_eq!(found.last().unwrap().1, 3, "the rest is a hole");
    server.expect_healthy();
}

/// "Terminating the transmission phase".
#[test]
fn disc_comes_last() {
    let content = pattern(36, SIZE as usize);
    let server = serve_content(&content);
    for (flags, offset, length) in [(0, 0, 0), (u16::MAX, u64::MAX, u32::MAX)] {
        // More than a socket takes at once, so that most is still owed when DISC comes.
        let mut client = simple(&server);
        let mut all = request(kind::READ, 0, 1, 0, SIZE as u32).repeat(12);
        all.extend(request(kind::WRITE, flag::FUA, 2, 512, 512));
        all.extend(&content[512..1024]);
        all.extend(request(kind::FLUSH, 0, 3, 0, 0));
        all.extend(request(kind::DISC, flags, 4, offset, length));
        client.send(&all);
        let mut got = client.read_to_close();
        assert_eq!(got.len(), 12 * (16 + SIZE as usize) + 2 * 16, "all that was asked before, and no reply to DISC");
        let tail = got.split_off(got.len() - 32);
        assert_eq!(BTreeSet::from([tail[15], tail[31]]), BTreeSet::from([2, 3]));

        let mut client = structured(&server);
        let all = request(kind::READ, 0, 1, 0, SIZE as u32).repeat(3);
        client.client.send(&[all, request(kind::DISC, flags, 4, offset, length)].concat());
        for _ in 0..3 {
            assert!(client.collect(1, 0, SIZE as u32).unwrap().0 == content);
        }
        client.client.expect_closed();
    }
    // Also while the disk is slow.
    let (server, _) = traced(Server::serve().size(SIZE), &["inject=fdatasync:delay_enter=300000"]);
    let mut client = simple(&server);
    let mut writes: Vec<u8> = Vec::new();
    for cookie in 1..=8_u64 {
        writes.extend(request(kind::WRITE, flag::FUA, cookie, cookie * 512, 512));
        writes.extend([cookie as u8; 512]);
    }
    writes.extend(request(kind::DISC, 0, 0, 0, 0));
    client.send(&writes);
    let got = client.read_to_close();
    let cookies: BTreeSet<u8> = got.chunks(16).map(|reply| reply[15]).collect();
    assert_eq!(cookies, (1..=8).collect());
    assert_eq!(std::fs::read(&server.image).unwrap()[8 * 512..][..512], [8; 512]);
    server.expect_healthy();
}

/// Left open by the specification: a client that leaves is nobody else's business, and no migration's.
#[test]
fn one_client_leaving_is_nothing_to_the_others() {
    let mut destination = listen(0).size(16 << 20).start();
    let mut source = Server::serve().content(&pattern(37, 16 << 20)).arg(PORT).start();
    start_mirror(&source, destination.address(), "--max-speed 2000000");
    let mut stays = structured(&source);
    let mut oldstyle = source.connect();
    for round in 0..20 {
        let mut leaves = structured(&source);
        leaves.client.send(&request(kind::READ, 0, 1, 0, 300_000));
        match round % 4 {
            0 => leaves.client.send(&request(kind::DISC, 0, 0, 0, 0)),
            1 => leaves.client.send(&[1; 28]),
            2 => leaves.client.send(&request(kind::WRITE, 0, 1, 0, 300_000)),
            _ => {}
        }
        drop(leaves);
        stays.expect_alive();
        oldstyle.expect_alive();
    }
    let status = source.status();
    assert_eq!((status.get("is_mirroring"), status.get("migration_attempts")), ("true", "1"));
    assert_eq!(tell("mirror-speed", &source, "--max-speed 0").0, Some(0));
    stays.client.send(&request(kind::DISC, 0, 0, 0, 0));
    expect_migrated(&mut source, &mut destination);
}

/// "Error values": `NBD_ESHUTDOWN`; "Terminating the transmission phase".
#[test]
fn shutdown_tears_no_reply() {
    let (mut server, trace) = traced(Server::serve().size(SIZE), &["inject=fdatasync:delay_enter=300000"]);
    let mut clients: Vec<Client> = (0..3).map(|_| simple(&server)).collect();
    for client in &mut clients {
        client.send(&request(kind::WRITE, flag::FUA, 5, 0, 512));
        client.send(&[1; 512]);
    }
    let syncs = || std::fs::read_to_string(&trace).unwrap().contains("fdatasync(");
    wait_for("the first sync", SOON, || syncs().then_some(()));
    assert_eq!(server.stop().code(), Some(0));
    for client in &mut clients {
        let got = client.read_to_close();
        assert!(got.is_empty() || got == reply(0, 5) || got == reply(108, 5), "{got:?}");
    }
}

/// "Request types": `NBD_CMD_READ`, errors after a simple reply has begun.
#[test]
fn a_read_error_behind_a_good_head_cuts_the_connection() {
    let content = pattern(39, 8 << 20);
    // A piece of a READ that is as long as kernels make them: nothing was said yet, so the error can be, and the connection
    // goes on.
    for when in [1, 4, 6, 16] {
        let inject = format!("inject=pread64:error=EIO:when={when}");
        let (server, _) = traced(Server::serve().content(&content), &[&inject, UNCACHED]);
        let mut client = simple(&server);
        assert_eq!(client.read(0, 4 << 20), Err(EIO), "{inject}");
        assert!(client.read(0, 4 << 20).unwrap() == content[..4 << 20], "{inject}");
        server.expect_healthy();
    }
    // A longer one begins with its first slice: what has come is right, and there is no more.
    let (server, _) = traced(Server::serve().content(&content), &["inject=pread64:error=EIO:when=4", UNCACHED]);
    let mut client = simple(&server);
    client.send(&request(kind::READ, 0, 1, 0, 8 << 20));
    let got = client.read_to_close();
    assert!(got.len() < 16 + (8 << 20), "{} bytes", got.len());
    assert!(got.is_empty() || got[16..] == content[..got.len() - 16]);
    server.expect_healthy();
}

/// Left open by the specification: half a request is bounded by the killswitch, and does not hold up a stop.
#[test]
fn half_a_request_waits_for_nobody() {
    let server = Server::serve().size(SIZE).args("--newstyle-port=0 --killswitch=0.5").start();
    let started = Instant::now();
    let mut halves: Vec<Client> = Vec::new();
    for sent in [1, 4, 27] {
        let mut client = simple(&server);
        client.send(&request(kind::READ, 0, 1, 0, 512)[..sent]);
        halves.push(client);
    }
    let mut client = simple(&server);
    client.send_request(kind::WRITE, 0, 1, 0, 4096, &[1; 4095]);
    halves.push(client);
    let mut idle = simple(&server);
    for client in &mut halves {
        client.expect_closed();
    }
    assert!(started.elapsed() >= Duration::from_millis(400), "not before its time");
    idle.expect_alive();
    // Without a limit they stay, and a shutdown does not wait for them, nor for one that haggles.
    let mut server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    haggler.client.send(b"IHAVEOPT\0\0\0\x07\0\0\0\x06\0\0");
    let mut client = simple(&server);
    client.send_request(kind::WRITE, 0, 1, 0, 4096, &[1; 100]);
    let started = Instant::now();
    assert_eq!(server.stop().code(), Some(0));
    assert!(started.elapsed() < Duration::from_secs(5));
}
