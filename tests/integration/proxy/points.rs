//! The server closes the connection at every point of a conversation, and its machine forgets what was not durable.

use super::{before, door, PAIRS};
use crate::support::fading::{Cut, Fading, Point, Style};
use crate::support::newstyle::{structured, BLOCK_STATUS, CACHE};
use crate::support::shadow::{Habits, Shadowing};
use crate::support::{kind, wait_for, SOON};

const SIZE: usize = 1 << 20;

/// Where the server closes at a request of this type.
fn points(kind: u16) -> Vec<Cut> {
    let mut points = [0, 1, 8, 27].map(Point::Head).to_vec();
    points.extend([Point::Request, Point::Reply(0), Point::Reply(1), Point::Reply(15)]);
    match kind {
        kind::WRITE => points.push(Point::Payload),
        kind::READ | BLOCK_STATUS => points.push(Point::Data),
        _ => {}
    }
    points.into_iter().map(|point| Cut { point, kind, spared: 2 }).collect()
}

#[test]
fn the_server_closes_at_every_point_of_every_request() {
    for (client_style, server_style) in PAIRS {
        for depth in [1, 8] {
            let server = Fading::start(server_style, SIZE, 1);
            let proxy = before(&server).start();
            let habits = Habits { depth, flushes: 8, ..Habits::usual(client_style) };
            let client = Shadowing::start(door(&proxy, client_style), SIZE, 3, habits);
            for cut in
                [kind::READ, kind::WRITE, kind::FLUSH, kind::TRIM, kind::WRITE_ZEROES].into_iter().flat_map(points)
            {
                server.behave(|habits| {
                    habits.forgets = true;
                    habits.cuts = vec![cut];
                });
                wait_for("a cut", SOON, || (server.has_cut() || !client.goes_on(1)).then_some(()));
                if !client.goes_on(1) {
                    break;
                }
            }
            let shadow = client.stop().unwrap_or_else(|why| panic!("{why}; {}", proxy.log()));
            assert_eq!(shadow.differs(&server.durable()), None, "{client_style:?}, {server_style:?}, depth {depth}");
            proxy.expect_healthy();
        }
    }
}

#[test]
fn the_server_closes_at_every_point_of_its_greeting() {
    for (style, bytes) in [
        (Style::Oldstyle, &[0, 1, 16, 151][..]),
        // The greeting; then the replies to STRUCTURED_REPLY, SET_META_CONTEXT and GO.
        (Style::Newstyle, &[0, 1, 17, 18, 37, 38, 77, 96, 97, 130, 148][..]),
    ] {
        for &bytes in bytes {
            let server = Fading::start(style, SIZE, 1);
            let proxy = before(&server).start();
            let client = Shadowing::start(proxy.address(), SIZE, 3, Habits::usual(Style::Oldstyle));
            assert!(client.goes_on(10));
            let cut = Cut { point: Point::Greeting(bytes), kind: kind::DISC, spared: 0 };
            server.behave(|habits| habits.cuts = vec![cut; 2]);
            server.crash();
            assert!(client.goes_on(20), "{style:?}, {bytes}");
            assert!(server.has_cut() && server.connections() == 4, "{style:?}, {bytes}: {}", proxy.log());
            let shadow = client.stop().unwrap_or_else(|why| panic!("{why}; {}", proxy.log()));
            assert_eq!(shadow.differs(&server.durable()), None, "{style:?}, {bytes}");
        }
    }
}

/// What oldstyle clients and most others do not ask.
#[test]
fn the_server_closes_at_every_point_of_cache_and_block_status() {
    let server = Fading::start(Style::Newstyle, SIZE, 1);
    let proxy = before(&server).start();
    let mut client = structured(&proxy);
    assert_eq!(client.client.write(8192, &[7; 4096]), 0);
    for cut in points(CACHE).into_iter().chain(points(BLOCK_STATUS)) {
        server.behave(|habits| {
            habits.forgets = true;
            habits.cuts = vec![Cut { spared: 0, ..cut }];
        });
        assert_eq!(client.client.ask(CACHE, 0, 0, 65_536, &[]), 0, "{cut:?}");
        let extents = vec![(8192, 3), (4096, 0), (SIZE as u32 - 12_288, 3)];
        assert_eq!(client.block_status(0, 0, SIZE as u32), Ok(extents), "{cut:?}");
        assert!(server.has_cut(), "{cut:?}");
    }
    drop(client);
    proxy.expect_healthy();
}
