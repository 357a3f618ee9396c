//! Structured replies and block status ("Structured reply chunk message", "Metadata querying").

use crate::support::newstyle::{
    serve, serve_content, structured, traced, Content, Structured, BLOCK_STATUS, CACHE, DF, EOVERFLOW, REQ_ONE,
};
use crate::support::{errno, flag, kind, pattern, request, Server, UNCACHED};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const SIZE: u64 = 1 << 20;
const B: u64 = 4096;
/// HOLE and ZERO.
const HOLE: u32 = 3;

/// A server of 64 blocks of 64 KiB, of which the odd ones are holes, and what it serves.
fn sparse() -> (Server, Vec<u8>) {
    let server = serve(4 << 20);
    let mut content = vec![0; 4 << 20];
    let file = File::options().write(true).open(&server.image).unwrap();
    for at in (0..4 << 20).step_by(128 << 10) {
        content[at..at + (64 << 10)].copy_from_slice(&pattern(at as u64, 64 << 10));
        file.write_all_at(&content[at..at + (64 << 10)], at as u64).unwrap();
    }
    (server, content)
}

/// "Structured reply chunk message".
#[test]
fn every_read_is_answered_in_chunks_errors_too() {
    let server = serve_content(&pattern(49, SIZE as usize));
    let mut client = structured(&server);
    // Client::chunk fails on a simple reply.
    assert_eq!(client.read(0, 0, 100).unwrap().0, pattern(49, 100));
    assert_eq!(client.read(0, SIZE, 1), Err(errno::EINVAL));
    assert_eq!(client.read(1 << 15, 0, 1), Err(errno::EINVAL), "an early one");
    assert_eq!(client.read(REQ_ONE | flag::NO_HOLE, u64::MAX, 0), Err(errno::EINVAL));
    assert_eq!(client.read(0, 0, 0), Ok((vec![], vec![])));
    assert_eq!(client.block_status(1 << 15, 0, 1), Err(errno::EINVAL));
    client.expect_alive();
    server.expect_healthy();
    let (server, _) =
        traced(Server::serve().content(&pattern(49, SIZE as usize)), &["inject=pread64:error=EIO:when=1", UNCACHED]);
    let mut client = structured(&server);
    assert_eq!(client.read(0, 0, 100), Err(errno::EIO), "a late one");
    client.expect_alive();
    server.expect_healthy();
}

/// "Structured reply flags", "Structured reply types".
#[test]
fn chunks_cover_the_request_once_and_the_last_says_so() {
    let (server, content) = sparse();
    let mut client = structured(&server);
    for (offset, length) in [
        (0, 4 << 20),
        (0, 1),
        (65_535, 2),
        (131_071, 2),
        (65_536, 65_536),
        (70_000, 100),
        (60_000, 200_000),
        (1, (4 << 20) - 2),
        ((4 << 20) - 1, 1),
    ] {
        let (data, found) = client.read(0, offset, length).unwrap();
        assert!(data == content[offset as usize..][..length as usize], "{length} bytes at {offset}");
        for Content { offset: at, length: bytes, .. } in &found {
            assert!(at % 512 == 0 || *at == offset, "{found:?}");
            assert!((at + bytes) % 512 == 0 || at + bytes == offset + u64::from(length), "{found:?}");
        }
    }
    let (_, found) = client.read(0, 65_536, 65_536).unwrap();
    assert_eq!(found, [Content { offset: 65_536, length: 65_536, is_hole: true }]);
    server.expect_healthy();
    // Large holes go as holes.
    let server = serve(16 << 20);
    let mut client = structured(&server);
    assert_eq!(client.client.write(0, &pattern(1, 1 << 20)), 0);
    assert_eq!(client.client.write(8 << 20, &pattern(2, 4096)), 0);
    let (data, found) = client.read(0, 0, 16 << 20).unwrap();
    assert!(data == fs::read(&server.image).unwrap());
    let holes: u64 = found.iter().filter(|content| content.is_hole).map(|content| content.length).sum();
    assert!(holes >= 14 << 20, "{holes} bytes of holes");
    server.expect_healthy();
}

/// "Command flags": `NBD_CMD_FLAG_DF`.
#[test]
fn df_is_one_piece() {
    let (server, content) = sparse();
    let mut client = structured(&server);
    for (offset, length) in [(0, 65_536), (65_536, 65_536), (32_768, 65_536), (131_000, 65_536), (7, 1), (98_304, 4096)]
    {
        let (data, found) = client.read(DF, offset, length).unwrap();
        assert!(data == content[offset as usize..][..length as usize]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(!found[0].is_hole || data.iter().all(|&byte| byte == 0));
    }
    for length in [65_537, 1 << 20, 4 << 20] {
        match client.read(DF, 0, length) {
            Ok((_, found)) => assert_eq!(found.len(), 1),
            Err(error) => assert_eq!(error, EOVERFLOW),
        }
    }
    assert_eq!(client.read(DF, 4 << 20, u32::MAX), Err(errno::EINVAL));
    // Between many others, each is still one piece.
    let all: Vec<u8> = (0..30_u64).flat_map(|n| request(kind::READ, DF, n, n * 100_000, 65_536)).collect();
    client.client.send(&all);
    for _ in 0..30 {
        let chunk = client.chunk();
        let at = chunk.cookie as usize * 100_000;
        assert!(chunk.done && chunk.kind == 1 && chunk.payload[8..] == content[at..at + 65_536]);
    }
    server.expect_healthy();
}

/// "Structured reply types": `NBD_REPLY_TYPE_ERROR` and `NBD_REPLY_TYPE_ERROR_OFFSET`.
#[test]
fn an_error_behind_data_is_a_chunk_of_its_own() {
    let content = pattern(53, 4 << 20);
    for when in 1..8 {
        let inject = format!("inject=pread64:error=EIO:when={when}");
        let (server, _) = traced(Server::serve().content(&content), &[&inject, UNCACHED]);
        let mut client = structured(&server);
        client.client.send(&request(kind::READ, 0, 5, 0, 4 << 20));
        let mut good = 0;
        let last = loop {
            let chunk = client.chunk();
            if chunk.kind != 1 {
                break chunk;
            }
            assert!(!chunk.done, "there may still be an error");
            let at = u64::from_be_bytes(chunk.payload[..8].try_into().unwrap()) as usize;
            assert!(chunk.payload[8..] == content[at..at + chunk.payload.len() - 8]);
            good += chunk.payload.len() - 8;
        };
        assert!(last.done && good < content.len());
        assert_eq!(Structured::error_of(&last), errno::EIO);
        assert!(client.read(0, 0, 4 << 20).unwrap().0 == content, "the connection goes on");
        server.expect_healthy();
    }
}

/// "Structured reply types": errors; "Size constraints".
#[test]
fn errors_and_chunks_have_bounds() {
    let server = serve_content(&pattern(54, 34 << 20));
    let mut client = structured(&server);
    // error_of checks the message of an error chunk, and chunk that none is longer than was announced.
    for kind in [kind::READ, BLOCK_STATUS] {
        client.client.send(&request(kind, 1 << 13, 3, 0, 512));
        let chunk = client.chunk();
        assert_eq!((Structured::error_of(&chunk), chunk.done), (errno::EINVAL, true));
    }
    assert!(client.read(0, 0, 34 << 20).unwrap().0 == pattern(54, 34 << 20));
    server.expect_healthy();
}

/// "Request types": `NBD_CMD_BLOCK_STATUS`.
#[test]
fn block_status_takes_a_context_and_brings_one_chunk() {
    let (server, _) = sparse();
    // Structured replies alone are not enough.
    let mut haggler = crate::support::newstyle::Haggler::new(&server);
    haggler.expect(crate::support::newstyle::opt::STRUCTURED_REPLY, &[], crate::support::newstyle::rep::ACK);
    let mut client = Structured { client: haggler.go() };
    assert_eq!(client.block_status(0, 0, 512), Err(errno::EINVAL));
    client.expect_alive();
    let mut client = structured(&server);
    assert_eq!(client.block_status(0, 0, 1 << 20).unwrap().len(), 16);
    client.expect_alive();
    server.expect_healthy();
}

/// "Structured reply types": `NBD_REPLY_TYPE_BLOCK_STATUS`.
#[test]
fn extents_fit_the_request_and_neighbours_differ() {
    let (server, _) = sparse();
    let mut client = structured(&server);
    for (offset, length) in
        [(0, 4 << 20), (1, 70_000), (65_535, 2), (65_536, 1), (0, 1), ((4 << 20) - 1, 1), (100_000, 500)]
    {
        let found = client.block_status(0, offset, length).unwrap();
        assert!(!found.is_empty() && found.iter().all(|extent| extent.0 > 0));
        let all: u64 = found.iter().map(|extent| u64::from(extent.0)).sum();
        let but_last = all - u64::from(found.last().unwrap().0);
        assert!(but_last < u64::from(length) && offset + all <= 4 << 20, "{found:?}");
        assert!(found.windows(2).all(|pair| pair[0].1 != pair[1].1), "equal neighbours are one: {found:?}");
        let mut at = offset;
        for (length, flags) in &found {
            assert!(*flags == 0 || *flags == HOLE, "no other bits: {flags:#x}");
            at += u64::from(*length);
            assert!(at % 512 == 0 || *length == found.last().unwrap().0, "{found:?}");
        }
    }
    let expected: Vec<(u32, u32)> = (0..64).map(|n| (65_536, if n % 2 == 0 { 0 } else { HOLE })).collect();
    assert_eq!(client.block_status(0, 0, 4 << 20).unwrap(), expected);
    server.expect_healthy();
}

/// "Command flags": `NBD_CMD_FLAG_REQ_ONE`; "Structured reply types": `NBD_REPLY_TYPE_BLOCK_STATUS`.
#[test]
fn one_extent_and_never_too_many() {
    let (server, _) = sparse();
    let mut client = structured(&server);
    for (offset, length, expected) in [
        (0, 4 << 20, (65_536, 0)),
        (65_536, 4 << 16, (65_536, HOLE)),
        (65_000, 536, (536, 0)),
        (65_000, 100, (100, 0)),
        (70_000, 9, (9, HOLE)),
    ] {
        assert_eq!(client.block_status(REQ_ONE, offset, length), Ok(vec![expected]), "{length} at {offset}");
    }
    server.expect_healthy();
    // Every second block of an image: more extents than one reply has, which begin at the beginning.
    let server = serve(64 << 20);
    let file = File::options().write(true).open(&server.image).unwrap();
    for at in (0..64 << 20).step_by(8192) {
        file.write_all_at(&[1; 4096], at).unwrap();
    }
    let mut client = structured(&server);
    let (mut at, mut rounds) = (0_u64, 0);
    while at < 64 << 20 {
        let found = client.block_status(0, at, (64 << 20) - at as u32).unwrap();
        assert!(found.len() <= 1 << 20);
        for (length, flags) in found {
            let expected = if at % 8192 == 0 { 0 } else { HOLE };
            assert_eq!((length, flags), (4096, expected), "at {at}");
            at += u64::from(length);
        }
        rounds += 1;
    }
    assert!(rounds < 1000, "{rounds} rounds");
    server.expect_healthy();
}

/// "The `base:allocation` metadata context".
#[test]
fn what_is_said_is_true() {
    let server = serve(SIZE);
    let mut client = structured(&server);
    assert_eq!(client.block_status(0, 0, SIZE as u32), Ok(vec![(SIZE as u32, HOLE)]));
    // Data that has been answered is no hole, on no connection, even if it is on no disk yet.
    let mut other = structured(&server);
    for n in 0..20 {
        let at = n * 12 * B;
        assert_eq!(client.client.write(at, &[1; 4096]), 0);
        assert_eq!(other.block_status(REQ_ONE, at, 4096), Ok(vec![(4096, 0)]));
        assert_eq!(other.read(0, at, 4096).unwrap().0, [1; 4096]);
    }
    // What was trimmed or zeroed reads as zeroes where it is called a hole.
    assert_eq!(client.client.ask(kind::WRITE_ZEROES, 0, 0, 3 * B as u32, &[]), 0);
    assert_eq!(client.client.ask(kind::TRIM, 0, 12 * B, B as u32, &[]), 0);
    assert_eq!(client.client.ask(kind::WRITE_ZEROES, flag::NO_HOLE, 24 * B, B as u32, &[]), 0);
    assert_eq!(client.client.ask(CACHE, 0, 0, SIZE as u32, &[]), 0);
    let content = fs::read(&server.image).unwrap();
    let mut at = 0;
    for (length, flags) in other.block_status(0, 0, SIZE as u32).unwrap() {
        let bytes = &content[at..at + length as usize];
        assert!(flags == 0 || bytes.iter().all(|&byte| byte == 0));
        at += length as usize;
    }
    assert_eq!(at, SIZE as usize);
    assert_eq!(other.block_status(REQ_ONE, 0, 3 * B as u32), Ok(vec![(3 * B as u32, HOLE)]));
    // Under a writer, too: a hole that is told is one of before the write or none.
    let mut reads = Vec::new();
    for n in 0..200_u64 {
        let at = (n * 7 % 128) * 2 * B;
        client.client.send_request(kind::WRITE, 0, 900 + n, at, 4096, &[2; 4096]);
        let asked = other.block_status(REQ_ONE, at, 4096).unwrap();
        assert_eq!(client.client.read_reply(), (0, 900 + n));
        assert_eq!(other.block_status(REQ_ONE, at, 4096), Ok(vec![(4096, 0)]), "once it is answered");
        reads.push(asked);
    }
    assert!(reads.iter().all(|asked| asked.len() == 1));
    server.expect_healthy();
}
