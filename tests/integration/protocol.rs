//! The oldstyle protocol on the wire: every reply, every error, and what no client may do to another.

use crate::support::{errno, flag, greeting, kind, pattern, reply, request, uninterrupted, Client, Server, SOON};
use std::io::Read;
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

const SIZE: u64 = 1 << 20;
/// Flags, FLUSH, FUA, TRIM and `WRITE_ZEROES` are understood, and a flush covers all connections.
const FLAGS: u32 = 1 | 4 | 8 | 32 | 64 | 256;

#[test]
fn the_greeting_byte_for_byte() {
    let server = Server::serve().size(SIZE).start();
    let mut client = server.connect_bare();
    assert_eq!(client.read_greeting(), greeting(SIZE, FLAGS));
    client.expect_silence(Duration::from_millis(50));
}

#[test]
fn what_is_written_is_read() {
    let content = pattern(1, SIZE as usize);
    let server = Server::serve().content(&content).start();
    let mut client = server.connect();
    let mut expected = content;
    assert_eq!(client.read(0, SIZE as u32).unwrap(), expected);
    for (seed, offset, length) in [(2, 0, 1), (3, 511, 1026), (4, 4095, 2), (5, 300_001, 700_000), (6, SIZE - 1, 1)] {
        let payload = pattern(seed, length);
        assert_eq!(client.write(offset, &payload), 0);
        expected[offset as usize..][..length].copy_from_slice(&payload);
        assert_eq!(client.read(offset, length as u32).unwrap(), payload);
    }
    assert_eq!(server.connect().read(0, SIZE as u32).unwrap(), expected, "another client sees it");
    assert_eq!(std::fs::read(&server.image).unwrap(), expected);
}

#[test]
fn zeroing_and_trimming() {
    let content = pattern(7, SIZE as usize);
    let server = Server::serve().content(&content).start();
    let mut client = server.connect();
    for (flags, offset, length) in [(0, 1, 9999), (flag::FUA, 65_536, 65_536), (flag::NO_HOLE, 200_000, 123_457)] {
        assert_eq!(client.ask(kind::WRITE_ZEROES, flags, offset, length, &[]), 0);
        assert_eq!(client.read(offset, length).unwrap(), vec![0; length as usize]);
        let around = client.read(offset - 1, 1).unwrap();
        assert_eq!(around[0], content[offset as usize - 1], "nothing else is zeroed");
        let end = offset + u64::from(length);
        assert_eq!(client.read(end, 1).unwrap()[0], content[end as usize]);
    }
    for flags in [0, flag::FUA] {
        assert_eq!(client.ask(kind::TRIM, flags, 500_000, 100_000, &[]), 0);
        let trimmed = client.read(500_000, 100_000).unwrap();
        let as_before = &content[500_000..600_000];
        assert!(trimmed.iter().zip(as_before).all(|(now, was)| *now == 0 || now == was));
        assert_eq!(client.read(499_999, 1).unwrap()[0], content[499_999]);
        assert_eq!(client.read(600_000, 1).unwrap()[0], content[600_000]);
    }
}

#[test]
fn refused_requests_are_answered_and_the_connection_goes_on() {
    use errno::{EINVAL, ENOSPC};
    let content = pattern(8, SIZE as usize);
    let server = Server::serve().content(&content).start();
    let mut client = server.connect();
    let end = SIZE;
    let cases = [
        ("read beyond", kind::READ, 0, end, 1, ENOSPC),
        ("read across the end", kind::READ, 0, end - 1, 2, ENOSPC),
        ("read that wraps", kind::READ, 0, u64::MAX - 4095, 4096, ENOSPC),
        ("longest read", kind::READ, 0, 0, u32::MAX, ENOSPC),
        ("write beyond", kind::WRITE, 0, end, 512, ENOSPC),
        ("write across the end", kind::WRITE, 0, end - 511, 512, ENOSPC),
        ("write that wraps", kind::WRITE, 0, u64::MAX - 4095, 4096, ENOSPC),
        ("write at the last offset", kind::WRITE, 0, u64::MAX, 1, ENOSPC),
        ("write at 2^63", kind::WRITE, 0, 1 << 63, 70_000, ENOSPC),
        ("long write beyond", kind::WRITE, flag::FUA, end - 1, 5 << 20, ENOSPC),
        ("write with an unknown flag", kind::WRITE, 1 << 15, 0, 600, EINVAL),
        ("read with an unknown flag", kind::READ, 4, 0, 600, EINVAL),
        ("zeroes beyond", kind::WRITE_ZEROES, 0, end - 1, 2, ENOSPC),
        ("zeroes that wrap", kind::WRITE_ZEROES, 0, u64::MAX, u32::MAX, ENOSPC),
        ("fast zeroes, not offered", kind::WRITE_ZEROES, 1 << 4, 0, 512, EINVAL),
        ("trim beyond", kind::TRIM, 0, end, 1, EINVAL),
        ("trim that wraps", kind::TRIM, 0, u64::MAX, 1, EINVAL),
        ("CACHE, not offered", 5, 0, 0, 512, EINVAL),
        ("BLOCK_STATUS, not offered", 7, 0, 0, 512, EINVAL),
        ("type 8", 8, 0, 0, 512, EINVAL),
        ("type 65535", u16::MAX, u16::MAX, u64::MAX, u32::MAX, EINVAL),
    ];
    let refused = cases.len() as u64;
    for (what, kind, flags, offset, length, errno) in cases {
        let payload = if kind == kind::WRITE { vec![0xee; length as usize] } else { Vec::new() };
        assert_eq!(client.ask(kind, flags, offset, length, &payload), errno, "{what}");
        assert_eq!(client.read(7, 9).unwrap(), content[7..16], "{what}: then the connection goes on");
    }
    assert_eq!(server.status().number("errors"), refused);
    assert_eq!(std::fs::read(&server.image).unwrap(), content, "nothing was written");
    server.expect_healthy();
}

#[test]
fn a_refused_reply_is_a_head_and_no_more() {
    let server = Server::serve().size(SIZE).start();
    let mut client = server.connect();
    client.send(&[request(kind::READ, 0, 0xfeed, SIZE, 4), request(99, 0, u64::MAX, 0, 0)].concat());
    assert_eq!(client.read_bytes(16), reply(errno::ENOSPC, 0xfeed));
    assert_eq!(client.read_bytes(16), reply(errno::EINVAL, u64::MAX));
    client.expect_silence(Duration::from_millis(50));
}

#[test]
fn requests_of_no_length() {
    let server = Server::serve().size(SIZE).start();
    let mut client = server.connect();
    for kind in [kind::READ, kind::WRITE, kind::TRIM, kind::WRITE_ZEROES, kind::FLUSH] {
        for flags in [0, flag::FUA] {
            assert_eq!(client.ask(kind, flags, 0, 0, &[]), 0, "type {kind}");
            assert_eq!(client.ask(kind, flags, SIZE, 0, &[]), 0, "type {kind} at the end");
        }
    }
    assert_eq!(client.ask(kind::READ, 0, SIZE + 1, 0, &[]), errno::ENOSPC);
    client.expect_alive();
}

#[test]
fn a_bad_magic_is_answered_and_closed() {
    let server = Server::serve().size(SIZE).start();
    let mut other = server.connect();
    for behind in [0, 1, 100_000] {
        let mut client = server.connect();
        let mut bytes = request(kind::READ, 0, 0x1122_3344_5566_7788, 0, 512);
        bytes[3] ^= 1;
        bytes.resize(28 + behind, 0xaa);
        client.send(&bytes);
        let answer = client.read_bytes(16);
        assert_eq!(answer, reply(errno::EINVAL, 0x1122_3344_5566_7788), "{behind} bytes behind it");
        client.expect_closed();
    }
    other.expect_alive();
    // Requests before it are answered first.
    let mut client = server.connect();
    client.send(&[request(kind::FLUSH, 0, 5, 0, 0), vec![0; 28]].concat());
    let answers = client.read_to_close();
    assert!(
        answers == [reply(0, 5), reply(errno::EINVAL, 0)].concat()
            || answers == [reply(errno::EINVAL, 0), reply(0, 5)].concat()
    );
    server.expect_healthy();
}

#[test]
fn bytes_that_are_no_nbd_close_that_client_only() {
    let server = Server::serve().size(SIZE).start();
    let mut other = server.connect();
    for garbage in
        [&b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"[..], &[0xff; 5000], &[0; 28], b"\x16\x03\x01"]
    {
        let mut client = server.connect();
        client.send(garbage);
        let _ = client.stream.shutdown(Shutdown::Write);
        assert!(client.read_to_close().len() <= 16, "at most one reply");
        other.expect_alive();
    }
    // A peer that goes away without a word, at once and half-way.
    for length in [0, 1, 27, 28, 29, 600] {
        let mut client = server.connect_bare();
        client.send(&[request(kind::WRITE, 0, 1, 0, 1000), vec![7; 999]].concat()[..length]);
        drop(client);
    }
    other.expect_alive();
    server.expect_healthy();
}

#[test]
fn many_requests_in_one_piece() {
    let content = pattern(9, SIZE as usize);
    let server = Server::serve().content(&content).start();
    let mut client = server.connect();
    let count = 1000;
    let bytes: Vec<u8> = (0..count).flat_map(|n| request(kind::READ, 0, n, n * 512, 512)).collect();
    client.send(&bytes);
    let mut answered = vec![false; count as usize];
    for _ in 0..count {
        let (error, cookie) = client.read_reply();
        assert_eq!(error, 0);
        assert!(!std::mem::replace(&mut answered[cookie as usize], true), "answered twice");
        assert_eq!(client.read_bytes(512), content[cookie as usize * 512..][..512]);
    }
    assert_eq!(server.status().number("reads"), count);
}

#[test]
fn good_and_bad_requests_mixed_in_one_piece() {
    let server = Server::serve().size(SIZE).start();
    let mut client = server.connect();
    let mut bytes = Vec::new();
    for n in 0..300_u64 {
        let (head, payload) = match n % 6 {
            0 => (request(kind::WRITE, 0, n, n * 512, 512), vec![n as u8; 512]),
            1 => (request(kind::WRITE, 0, n, SIZE, 700), vec![9; 700]),
            2 => (request(42, 0, n, 0, 0), vec![]),
            3 => (request(kind::FLUSH, 0, n, 0, 0), vec![]),
            4 => (request(kind::READ, 0, n, u64::MAX, 1), vec![]),
            _ => (request(kind::WRITE_ZEROES, flag::FUA, n, SIZE - 512, 512), vec![]),
        };
        bytes.extend(head);
        bytes.extend(payload);
    }
    client.send(&bytes);
    for _ in 0..300 {
        let (error, cookie) = client.read_reply();
        let expected = [0, errno::ENOSPC, errno::EINVAL, 0, errno::ENOSPC, 0][cookie as usize % 6];
        assert_eq!(error, expected, "request {cookie}");
    }
    for n in (0..300_u64).step_by(6) {
        assert_eq!(client.read(n * 512, 512).unwrap(), vec![n as u8; 512]);
    }
}

#[test]
fn requests_that_come_byte_by_byte() {
    let server = Server::serve().size(SIZE).start();
    let mut client = server.connect();
    client.stream.set_nodelay(true).unwrap();
    let write = [request(kind::WRITE, 0, 1, 3, 5), b"hello".to_vec()].concat();
    for byte in write.iter().chain(&request(kind::READ, 0, 2, 3, 5)) {
        client.send(&[*byte]);
    }
    assert_eq!(client.read_bytes(16 + 16 + 5), [reply(0, 1), reply(0, 2), b"hello".to_vec()].concat());
}

#[test]
fn a_client_that_reads_late_gets_everything() {
    let content = pattern(10, SIZE as usize);
    let server = Server::serve().content(&content).start();
    let mut client = server.connect();
    let mut sender = Client::new(client.stream.try_clone().unwrap());
    // More than the sockets hold: the server must stop reading, and go on later.
    let sending = thread::spawn(move || {
        for n in 0..3000 {
            sender.send(&request(kind::READ, 0, n, n % 17, 65_536));
        }
    });
    thread::sleep(Duration::from_millis(200));
    server.connect().expect_alive();
    for _ in 0..3000 {
        let (error, cookie) = client.read_reply();
        assert_eq!(error, 0);
        assert!(client.read_bytes(65_536) == content[cookie as usize % 17..][..65_536]);
    }
    sending.join().unwrap();
}

#[test]
fn a_half_close_is_answered_first() {
    let server = Server::serve().size(SIZE).start();
    let mut client = server.connect();
    let bytes: Vec<u8> = (0..100).flat_map(|n| request(kind::READ, 0, n, 0, 10_000)).collect();
    client.send(&bytes);
    client.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.read_to_close().len(), 100 * (16 + 10_000));
}

#[test]
fn disc_is_answered_by_a_close() {
    let server = Server::serve().size(SIZE).start();
    let mut client = server.connect();
    client.send(&request(kind::DISC, 0, 1, 0, 0));
    client.expect_closed();
    // What was asked before it is answered; what comes behind it is not.
    let mut client = server.connect();
    let mut bytes: Vec<u8> = (0..100).flat_map(|n| request(kind::READ, 0, n, 0, 10_000)).collect();
    bytes.extend(request(kind::DISC, 0, 0, 0, 0));
    bytes.extend(request(kind::READ, 0, 0, 0, 10_000));
    client.send(&bytes);
    assert_eq!(client.read_to_close().len(), 100 * (16 + 10_000));
    assert_eq!(server.status().number("num_clients"), 0);
}

#[test]
fn a_long_refused_payload_is_swallowed() {
    let server = Server::serve().size(SIZE).start();
    let mut client = server.connect();
    let length = 200 << 20;
    client.send(&request(kind::WRITE, 0, 77, 0, length));
    let piece = vec![0x55; 1 << 20];
    (0..200).for_each(|_| client.send(&piece));
    assert_eq!(client.read_reply(), (errno::ENOSPC, 77));
    client.expect_alive();
}

#[test]
fn busy_clients_do_not_starve_others() {
    let server = Server::serve().size(64 << 20).start();
    let busy: Vec<_> = (0..4)
        .map(|_| {
            let mut client = server.connect();
            client.send(&request(kind::READ, 0, 0, 0, 64 << 20).repeat(30));
            thread::spawn(move || {
                let mut bytes = vec![0; 1 << 20];
                while uninterrupted(|| client.stream.read(&mut bytes)).is_ok_and(|n| n > 0) {}
            })
        })
        .collect();
    let mut client = server.connect();
    for n in 0..50 {
        assert_eq!(client.write(n * 4096, &[n as u8 + 1; 4096]), 0);
        assert_eq!(client.read(n * 4096, 4096).unwrap(), [n as u8 + 1; 4096]);
    }
    server.process.signal("TERM");
    for thread in busy {
        thread.join().unwrap();
    }
}

#[test]
fn a_thousand_connections_come_and_go() {
    // Whoever has gone counts until the server has noticed it.
    let server = Server::serve().size(SIZE).arg("--max-clients=1000").start();
    for round in 0..20 {
        let mut clients: Vec<_> = (0..50).map(|_| server.connect_bare()).collect();
        for (n, client) in clients.iter_mut().enumerate() {
            client.read_greeting();
            if (n + round) % 2 == 0 {
                client.expect_alive();
            }
        }
    }
    crate::support::wait_for("all clients gone", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    server.expect_healthy();
}
