//! What is on stable storage when, zeroes, trims, and hints ("Request types", "Command flags").

use crate::support::newstyle::{
    address, serve_content, simple, structured, traced, CACHE, DF, ENOTSUP, FAST_ZERO, PORT,
};
use crate::support::{allocated, errno, flag, kind, pattern, request, wait_for, Client, Server, SOON};
use std::fs;
use std::path::Path;

const SIZE: u64 = 1 << 20;

fn syncs(trace: &Path) -> usize {
    fs::read_to_string(trace).unwrap().matches("fdatasync(").count()
}

fn wait_for_syncs(trace: &Path, count: usize) {
    wait_for(format_args!("{count} syncs"), SOON, || (syncs(trace) >= count).then_some(()));
}

/// "Ordering of messages and writes".
#[test]
fn a_flush_covers_every_write_answered_before() {
    let builder = Server::serve().size(SIZE);
    let trace = builder.dir().join("trace");
    let words = ["strace", "-D", "-f", "-o", trace.to_str().unwrap(), "-e", "trace=pwrite64,fdatasync,writev,sendmsg"];
    let server = builder.engine("sync").arg(PORT).through(&words).start();
    let (mut a, mut b) = (simple(&server), simple(&server));
    for round in 1..=5_u8 {
        assert_eq!(a.write(u64::from(round) * 4096, &[round; 4096]), 0);
        assert_eq!(b.flush(), 0);
        wait_for_syncs(&trace, usize::from(round));
    }
    // Each write, then its reply, then the sync, then the reply to the flush.
    let text = fs::read_to_string(&trace).unwrap();
    let calls: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().nth(1)?.split('(').next()).collect();
    let first = calls.iter().position(|&call| call == "pwrite64").unwrap();
    let order: Vec<bool> = calls[first..].iter().map(|&call| call == "pwrite64" || call == "fdatasync").collect();
    assert_eq!(order[..4], [true, false, true, false], "{text}");
    server.expect_healthy();
}

/// "Command flags": `NBD_CMD_FLAG_FUA`.
#[test]
fn fua_is_valid_everywhere_and_makes_durable() {
    let (server, trace) = traced(Server::serve().size(SIZE), &["trace=fdatasync,pwrite64,fallocate"]);
    let mut client = structured(&server);
    let mut expected = 0;
    for (kind, flags, wanted) in [
        (kind::WRITE, 0, 1),
        (kind::WRITE_ZEROES, 0, 1),
        (kind::WRITE_ZEROES, flag::NO_HOLE, 1),
        (kind::WRITE_ZEROES, FAST_ZERO, 1),
        (kind::TRIM, 0, 1),
        (kind::FLUSH, 0, 1),
        (CACHE, 0, 0),
    ] {
        let payload = if kind == kind::WRITE { vec![7; 8192] } else { vec![] };
        assert_eq!(client.client.ask(kind, flag::FUA | flags, 0, 8192, &payload), 0, "type {kind}");
        expected += wanted;
        wait_for_syncs(&trace, expected);
    }
    client.read(flag::FUA, 0, 512).unwrap();
    client.read(flag::FUA | DF, 0, 512).unwrap();
    client.block_status(flag::FUA, 0, 512).unwrap();
    assert_eq!(syncs(&trace), expected, "and nothing more");
    server.expect_healthy();
}

/// "Transmission flags": `NBD_FLAG_CAN_MULTI_CONN`.
#[test]
fn connections_are_one() {
    let (server, trace) = traced(Server::serve().size(SIZE), &["trace=fdatasync"]);
    let mut old = server.connect();
    let mut clients: Vec<Client> = (0..4).map(|_| simple(&server)).collect();
    for round in 0..50_u8 {
        let at = u64::from(round) * 1000;
        let (writer, reader) = (usize::from(round) % 4, usize::from(round + 1) % 4);
        assert_eq!(clients[writer].write(at, &[round + 1; 999]), 0);
        assert_eq!(clients[reader].read(at, 999).unwrap(), [round + 1; 999], "at once");
        assert_eq!(old.read(at, 999).unwrap(), [round + 1; 999], "through the other door too");
    }
    assert_eq!(syncs(&trace), 0);
    assert_eq!(clients[3].flush(), 0, "one for all");
    wait_for_syncs(&trace, 1);
    assert_eq!(old.write(0, &[0xaa; 512]), 0);
    assert_eq!(clients[0].read(0, 512).unwrap(), [0xaa; 512]);
    server.expect_healthy();
}

/// "Request types": `NBD_CMD_FLUSH`.
#[test]
fn flush_and_its_reserved_fields() {
    let (server, trace) = traced(Server::serve().size(SIZE), &["inject=fdatasync:error=EIO:when=4"]);
    let mut client = simple(&server);
    // They are ignored: no client means anything by them.
    for (n, (offset, length)) in [(0, 512), (u64::MAX, u32::MAX), (SIZE, 1)].into_iter().enumerate() {
        assert_eq!(client.ask(kind::FLUSH, 0, offset, length, &[]), 0);
        wait_for_syncs(&trace, n + 1);
    }
    assert_eq!(client.write(0, &[1; 512]), 0);
    assert_eq!(client.flush(), errno::EIO);
    // The kernel may have dropped what it could not write: a second try that succeeds would lie.
    assert_eq!(client.flush(), errno::EIO);
    assert_eq!(simple(&server).ask(kind::WRITE, flag::FUA, 0, 512, &[1; 512]), errno::EIO);
    assert_eq!(syncs(&trace), 4, "not tried again");
    server.wait_for_log("fdatasync");
    server.expect_healthy();
}

/// "Request types": `NBD_CMD_WRITE_ZEROES`; "Command flags": `NBD_CMD_FLAG_NO_HOLE`.
#[test]
fn zeroes_are_zeroes_to_the_byte() {
    let content = pattern(45, SIZE as usize);
    let server = serve_content(&content);
    let mut client = simple(&server);
    let mut shadow = content;
    for (n, (offset, length)) in
        [(0, 1), (4095, 2), (8192, 4096), (20_481, 12_287), (65_535, 131_075), (300_000, 1), (SIZE - 5000, 5000)]
            .into_iter()
            .enumerate()
    {
        for flags in [0, flag::NO_HOLE, FAST_ZERO, flag::FUA | flag::NO_HOLE | FAST_ZERO] {
            let range = offset as usize..offset as usize + length as usize;
            assert_eq!(client.write(offset, &pattern(n as u64, length as usize)), 0);
            assert_eq!(client.ask(kind::WRITE_ZEROES, flags, offset, length, &[]), 0, "flags {flags:#x}");
            shadow[range].fill(0);
            assert!(client.read(0, SIZE as u32).unwrap() == shadow, "{length} bytes at {offset}, flags {flags:#x}");
        }
    }
    assert_eq!(client.ask(kind::WRITE_ZEROES, 0, 0, SIZE as u32, &[]), 0);
    assert_eq!(allocated(&server.image), 0, "a hole, where none was forbidden");
    assert_eq!(client.ask(kind::WRITE_ZEROES, flag::NO_HOLE, 100_000, 500_000, &[]), 0);
    assert!(allocated(&server.image) >= 500_000, "and none where one was: {}", allocated(&server.image));
    assert!(fs::read(&server.image).unwrap().iter().all(|&byte| byte == 0));
    server.expect_healthy();
}

/// "Command flags": `NBD_CMD_FLAG_FAST_ZERO`.
#[test]
fn fast_zero_is_fast_or_nothing() {
    let content = pattern(46, SIZE as usize);
    // A file system that can neither punch nor zero.
    let (server, trace) =
        traced(Server::serve().content(&content), &["trace=pwrite64,fallocate", "inject=fallocate:error=EOPNOTSUPP"]);
    let mut client = simple(&server);
    for (offset, length) in [(0, 4096), (1, 4096), (511, 300_001), (SIZE - 1, 1), (0, SIZE as u32)] {
        for more in [0, flag::NO_HOLE, flag::FUA] {
            assert_eq!(client.ask(kind::WRITE_ZEROES, FAST_ZERO | more, offset, length, &[]), ENOTSUP);
        }
        assert!(client.read(0, SIZE as u32).unwrap() == content, "unchanged");
    }
    assert!(!fs::read_to_string(&trace).unwrap().contains("pwrite64"), "at once");
    // Without the flag there is a slow way.
    assert_eq!(client.ask(kind::WRITE_ZEROES, 0, 511, 300_001, &[]), 0);
    assert_eq!(client.read(510, 300_003).unwrap()[1..300_002], vec![0; 300_001]);
    server.expect_healthy();
    // Where it can, it is fast, and true.
    let server = serve_content(&content);
    let mut client = simple(&server);
    assert_eq!(client.ask(kind::WRITE_ZEROES, FAST_ZERO, 0, SIZE as u32, &[]), 0);
    assert_eq!(allocated(&server.image), 0);
    // Oldstyle does not offer it.
    assert_eq!(server.connect().ask(kind::WRITE_ZEROES, FAST_ZERO, 0, 512, &[]), errno::EINVAL);
    server.expect_healthy();
}

/// "Request types": `NBD_CMD_TRIM`.
#[test]
fn trim_touches_nothing_outside() {
    let content = pattern(47, SIZE as usize);
    let server = serve_content(&content);
    let mut client = simple(&server);
    for (offset, length) in [(1, 1), (4095, 2), (4097, 8190), (70_001, 200_003), (SIZE - 1, 1), (0, 4096)] {
        let before = client.read(0, SIZE as u32).unwrap();
        assert_eq!(client.ask(kind::TRIM, 0, offset, length, &[]), 0);
        let after = client.read(0, SIZE as u32).unwrap();
        let (start, end) = (offset as usize, offset as usize + length as usize);
        assert!(after[..start] == before[..start] && after[end..] == before[end..], "{length} bytes at {offset}");
        let inside = after[start..end].iter().zip(&before[start..end]);
        assert!(inside.into_iter().all(|(now, was)| *now == 0 || now == was), "zero or as before");
    }
    // Sums of more than 32 bits, near the end of a large export.
    let size = (9 << 30) + 512;
    let server = Server::serve().size(size).arg(PORT).start();
    let mut client = simple(&server);
    for at in [0, 4 << 30, (8 << 30) - 512, size - 512] {
        assert_eq!(client.write(at, &pattern(at, 512)), 0);
    }
    assert_eq!(client.ask(kind::TRIM, 0, (4 << 30) + 4096, u32::MAX - 4095 - 512, &[]), 0);
    for at in [0, 4 << 30, (8 << 30) - 512, size - 512] {
        assert_eq!(client.read(at, 512).unwrap(), pattern(at, 512), "at {at}");
    }
    assert_eq!(client.ask(kind::TRIM, 0, size - 512, 513, &[]), errno::EINVAL);
    server.expect_healthy();
}

/// "Request types": `NBD_CMD_CACHE`.
#[test]
fn cache_is_a_hint() {
    let content = pattern(48, SIZE as usize);
    let server = serve_content(&content);
    let mut client = simple(&server);
    assert_eq!(client.ask(CACHE, 0, 0, SIZE as u32, &[]), 0);
    assert_eq!(client.ask(CACHE, flag::FUA, 511, 3, &[]), 0);
    for bit in 1..16 {
        assert_eq!(client.ask(CACHE, 1 << bit, 0, 512, &[]), errno::EINVAL, "flag {bit}");
    }
    assert_eq!(client.ask(CACHE, 0, SIZE - 1, 2, &[]), errno::EINVAL);
    assert_eq!(client.ask(CACHE, 0, u64::MAX, u32::MAX, &[]), errno::EINVAL);
    assert!(client.read(0, SIZE as u32).unwrap() == content);
    // It was not offered to oldstyle clients.
    assert_eq!(server.connect().ask(CACHE, 0, 0, 512, &[]), errno::EINVAL);
    server.expect_healthy();
}

/// Requests of one connection run together: a flush that takes long holds up nothing that came with it for ever, and
/// every reply comes.
#[test]
fn requests_of_one_connection_run_together() {
    let (server, _) = traced(Server::serve().size(SIZE), &["inject=fdatasync:delay_enter=100000"]);
    let mut client = simple(&server);
    let mut all = Vec::new();
    for cookie in 0..30_u64 {
        match cookie % 3 {
            0 => all.extend(request(kind::FLUSH, 0, cookie, 0, 0)),
            1 => all.extend([request(kind::WRITE, flag::FUA, cookie, cookie * 512, 512), vec![1; 512]].concat()),
            _ => all.extend(request(kind::TRIM, 0, cookie, cookie * 512, 512)),
        }
    }
    client.send(&all);
    let mut cookies: Vec<u64> = (0..30)
        .map(|_| {
            let (error, cookie) = client.read_reply();
            assert_eq!(error, 0);
            cookie
        })
        .collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..30).collect::<Vec<_>>());
    assert_ne!(address(&server).port(), server.port());
    server.expect_healthy();
}
