//! What the proxy reads ahead (`--cache`): fewer requests for who reads one block after the other, and nothing else that a
//! client could notice.

use super::{before, door, PAIRS};
use crate::support::fading::{Fading, Style};
use crate::support::peers::{tell, wait_for_status};
use crate::support::shadow::{Habits, Shadowing};
use crate::support::{errno, flag, kind, wait_for, Client, SOON};

const SIZE: usize = 1 << 20;
const BLOCK: usize = 4096;

/// A server whose blocks can be told apart, and what it has.
fn server(style: Style, seed: u8) -> (Fading, Vec<u8>) {
    let server = Fading::start(style, SIZE, 1);
    let content: Vec<u8> = (0..SIZE).map(|at| (at / BLOCK) as u8 ^ (at / 512 % 8) as u8 ^ seed).collect();
    server.overwrite(&content);
    (server, content)
}

#[track_caller]
fn expect_blocks(client: &mut Client, blocks: impl IntoIterator<Item = usize>, length: usize, content: &[u8]) {
    for block in blocks {
        let at = block * length;
        let read = client.read(at as u64, length as u32).unwrap();
        assert!(read == content[at..at + length], "block {block}");
    }
}

#[test]
fn one_block_after_the_other_takes_few_requests() {
    for style in [Style::Oldstyle, Style::Newstyle] {
        for (option, length, most) in [
            // At first it is less, then a half each time.
            ("--cache=65536", BLOCK, 6 + SIZE / 32_768),
            ("--cache=4194304", BLOCK, 16),
            ("--cache", 512, 6 + SIZE / 2048),
        ] {
            let (server, content) = server(style, 0);
            let proxy = before(&server).args(option).start();
            let mut client = proxy.connect();
            expect_blocks(&mut client, 0..SIZE / length, length, &content);
            let (count, status) = (server.count(kind::READ), proxy.status());
            assert!(count <= most, "{option}: {count}");
            assert_eq!(status.number("reads_ahead"), count as u64 - 2, "the first two are the client's");
            assert_eq!(status.get("in_flight"), "0");
            drop(client);
            proxy.expect_healthy();
        }
        let (server, content) = server(style, 0);
        let proxy = before(&server).args("--cache=0").start();
        let mut client = proxy.connect();
        expect_blocks(&mut client, 0..SIZE / BLOCK, BLOCK, &content);
        assert_eq!(server.count(kind::READ), SIZE / BLOCK);
        drop(client);
        proxy.expect_healthy();
    }
}

/// One client reads, and the other changes what it will read soon, in all ways.
#[test]
fn what_is_changed_in_between_is_read_by_every_client() {
    for style in [Style::Oldstyle, Style::Newstyle] {
        let (server, mut content) = server(style, 0);
        let proxy = before(&server).args("--cache=65536 --max-clients 2").start();
        let (mut reader, mut other) = (proxy.connect(), proxy.connect());
        for block in 0..SIZE / BLOCK {
            expect_blocks(&mut reader, [block], BLOCK, &content);
            let changed = (block + 1 + block % 7) % (SIZE / BLOCK);
            let (at, place) = ((changed * BLOCK) as u64, changed * BLOCK..(changed + 1) * BLOCK);
            match block % 3 {
                0 => {
                    content[place.clone()].fill(block as u8);
                    assert_eq!(other.write(at, &content[place]), 0);
                }
                1 => {
                    content[place.clone()].fill(!block as u8);
                    assert_eq!(reader.ask(kind::WRITE, flag::FUA, at, BLOCK as u32, &content[place]), 0);
                }
                _ => {
                    content[place].fill(0);
                    assert_eq!(other.ask(kind::WRITE_ZEROES, 0, at, BLOCK as u32, &[]), 0);
                }
            }
            if block % 5 == 0 {
                expect_blocks(&mut other, [changed], BLOCK, &content);
            }
        }
        assert!(proxy.status().number("reads_ahead") > 0);
        drop((reader, other));
        proxy.expect_healthy();
    }
}

/// What is read ahead is gone with the connection to the server, with the server, and with the client: whatever is behind the
/// proxy then is what is read.
#[test]
fn nothing_outlives_the_connection_the_server_or_the_client() {
    for (style, other_style) in PAIRS {
        let (old, content) = server(style, 0);
        let (new, new_content) = server(other_style, 3);
        let proxy = before(&old).args("--cache=4194304").start();
        let mut client = proxy.connect();
        expect_blocks(&mut client, 0..3, BLOCK, &content);

        let content: Vec<u8> = content.iter().map(|byte| !byte).collect();
        old.overwrite(&content);
        old.restart();
        wait_for("another connection", SOON, || (old.connections() == 2).then_some(()));
        wait_for_status(&proxy, "upstream_state", "connected");
        expect_blocks(&mut client, 3..6, BLOCK, &content);

        let to = format!("--conn-addr {} --conn-port {} --wait", new.address.ip(), new.address.port());
        assert_eq!(tell("switch", &proxy, &to).0, Some(0), "{}", proxy.log());
        expect_blocks(&mut client, 6..9, BLOCK, &new_content);

        drop(client);
        wait_for_status(&proxy, "num_clients", "0");
        new.overwrite(&content);
        expect_blocks(&mut proxy.connect(), 9..12, BLOCK, &content);
        proxy.expect_healthy();
    }
}

/// An error is that of who asks for what cannot be read.
#[test]
fn what_cannot_be_read_is_an_error_when_somebody_asks_for_it() {
    let (server, content) = server(Style::Newstyle, 0);
    let bad = 4 * BLOCK as u64..6 * BLOCK as u64;
    server.behave(|habits| habits.errors = vec![(kind::READ, bad, errno::EIO)]);
    let proxy = before(&server).args("--cache=8192").start();
    let mut client = proxy.connect();
    expect_blocks(&mut client, 0..4, BLOCK, &content);
    for block in [4, 5] {
        assert_eq!(client.read(block * BLOCK as u64, BLOCK as u32), Err(errno::EIO));
    }
    expect_blocks(&mut client, 6..20, BLOCK, &content);
    drop(client);
    proxy.expect_healthy();
}

/// As without it: nothing is lost, and nothing old is read.
#[test]
fn nothing_answered_is_lost_in_crashes_while_reading_ahead() {
    for (client_style, server_style) in PAIRS {
        let server = Fading::start(server_style, SIZE, 1);
        let proxy = before(&server).args("--cache=262144").start();
        let client = Shadowing::start(door(&proxy, client_style), SIZE, 1, Habits::usual(client_style));
        for _ in 0..5 {
            assert!(client.goes_on(50), "{}", proxy.log());
            server.crash();
        }
        let shadow = client.stop().unwrap_or_else(|why| panic!("{why}; {}", proxy.log()));
        assert_eq!(shadow.differs(&server.durable()), None);
        proxy.expect_healthy();
    }
}
