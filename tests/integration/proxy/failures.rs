//! What can become of the server, and what its clients see of that.

use super::{before, door, PAIRS};
use crate::support::fading::{self, Fading, Nonsense, Style, Welcome};
use crate::support::newstyle::{address, serve, structured, PORT};
use crate::support::peers::wait_for_status;
use crate::support::shadow::{Habits, Shadowing};
use crate::support::{errno, flag, kind, pattern, request, wait_for, Client, Server, SOON};
use std::io::Read;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

const SIZE: usize = 1 << 20;
const A_MOMENT: Duration = Duration::from_millis(100);
const STYLES: [Style; 2] = [Style::Oldstyle, Style::Newstyle];
/// Makes the server count as silent after a second.
const IMPATIENT: [&str; 2] = ["env", "FLEXNBD_UPSTREAM_TIMEOUT=1"];
const ESHUTDOWN: u32 = 108;
/// What makes a server another one.
type Wrong = fn(&mut fading::Habits);

const ANYWHERE: Range<u64> = 0..u64::MAX;

/// Lines of the log at the level that is warned with, or above.
fn warnings(proxy: &Server) -> Vec<String> {
    proxy.log().lines().filter(|line| line.contains(":W:") || line.contains(":E:")).map(str::to_owned).collect()
}

fn lines_with(proxy: &Server, text: &str) -> usize {
    warnings(proxy).iter().filter(|line| line.contains(text)).count()
}

/// Sends writes of a page each, from the beginning on, with the cookies 0, 1, ...; the answers are awaited later.
fn send_writes(client: &mut Client, count: u64) {
    for n in 0..count {
        client.send_request(kind::WRITE, 0, n, n * 4096, 4096, &[n as u8 + 1; 4096]);
    }
}

#[track_caller]
fn expect_answers(client: &mut Client, count: u64) {
    let mut cookies: Vec<u64> = (0..count)
        .map(|_| {
            let (error, cookie) = client.read_reply();
            assert_eq!(error, 0);
            cookie
        })
        .collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..count).collect::<Vec<_>>());
}

#[test]
fn a_server_that_is_restarted_is_a_delay() {
    for style in STYLES {
        let mut server = Fading::start(style, SIZE, 1);
        let proxy = before(&server).start();
        let mut client = proxy.connect();
        assert_eq!(client.write(0, &[9; 4096]), 0);
        server.down();
        send_writes(&mut client, 4);
        wait_for_status(&proxy, "upstream_state", "connecting");
        wait_for("its requests", SOON, || (proxy.status().number("in_flight") == 4).then_some(()));
        client.expect_silence(A_MOMENT);
        let status = proxy.status();
        assert!(status.number("outage_ms") > 0 && status.number("replay_bytes") >= 4096, "{}", status.line());
        assert_eq!((status.get("num_clients"), status.get("reconnects")), ("1", "0"));
        server.up();
        expect_answers(&mut client, 4);
        let status = proxy.status();
        assert_eq!((status.get("upstream_state"), status.get("reconnects")), ("connected", "1"));
        assert!(status.number("last_outage_ms") > 0 && status.get("outage_ms") == "0", "{}", status.line());
        assert_eq!((lines_with(&proxy, ": lost: "), lines_with(&proxy, "connected again after")), (1, 1));
        assert_eq!(warnings(&proxy).len(), 2, "{}", proxy.log());
        assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
        drop(client);
        proxy.expect_healthy();
    }
}

#[test]
fn a_server_that_is_silent_is_waited_for_and_asked_nothing_twice() {
    for style in STYLES {
        let server = Fading::start(style, SIZE, 1);
        let proxy = before(&server).through(&IMPATIENT).start();
        let mut client = proxy.connect();
        client.expect_alive();
        server.behave(|habits| habits.is_mute = true);
        send_writes(&mut client, 16);
        let line = proxy.wait_for_log("has been silent for 1 s");
        assert!(line.contains(":W:"), "{line}");
        wait_for_status(&proxy, "upstream_state", "silent");
        // It stays so, and is said once. What is sent to it is no sign of life.
        client.send_request(kind::READ, 0, 99, 0, 512, &[]);
        client.expect_silence(Duration::from_millis(1500));
        assert_eq!(proxy.status().get("upstream_state"), "silent");
        assert_eq!(warnings(&proxy).len(), 1, "{}", proxy.log());
        server.behave(|habits| habits.is_mute = false);
        let mut cookies: Vec<u64> = (0..17)
            .map(|_| {
                let (error, cookie) = client.read_reply();
                assert_eq!(error, 0);
                if cookie == 99 {
                    client.read_bytes(512);
                }
                cookie
            })
            .collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..16).chain([99]).collect::<Vec<_>>());
        wait_for_status(&proxy, "upstream_state", "connected");
        assert_eq!((server.count(kind::WRITE), server.connections()), (16, 1));
        drop(client);
        proxy.expect_healthy();
    }
}

/// What lies in the connection that was given up is not executed when the server goes on, only what came over the new one.
fn stop_a_fenced_server(silent_after_s: u32, stopped: Duration) {
    let server = serve(SIZE as u64);
    let limit = format!("FLEXNBD_UPSTREAM_TIMEOUT={silent_after_s}");
    let proxy = Server::proxy(address(&server)).arg(PORT).through(&["env", &limit]).start();
    let mut client = proxy.connect();
    client.expect_alive();
    let since = Instant::now();
    server.process.freeze();
    send_writes(&mut client, 32);
    let line = wait_for("the end of patience", stopped + SOON, || {
        proxy
            .log()
            .lines()
            .find(|line| line.contains(&format!("it was silent for {silent_after_s} s")))
            .map(str::to_owned)
    });
    assert!(line.contains(":W:"), "{line}");
    wait_for_status(&proxy, "upstream_state", "connecting");
    thread::sleep(stopped.saturating_sub(since.elapsed()));
    server.process.signal("CONT");
    expect_answers(&mut client, 32);
    for n in 0..32 {
        assert_eq!(client.read(n * 4096, 4096).unwrap(), [n as u8 + 1; 4096]);
    }
    assert_eq!(proxy.status().number("reconnects"), 1, "{}", proxy.log());
    assert_eq!(server.status().number("writes"), 32, "{}", server.log());
    drop(client);
    proxy.expect_healthy();
    server.expect_healthy();
}

#[test]
fn a_fenced_server_that_is_silent_is_connected_to_anew() {
    stop_a_fenced_server(1, Duration::ZERO);
}

#[test]
#[ignore = "takes a minute"]
fn a_fenced_server_that_was_stopped_for_a_minute() {
    stop_a_fenced_server(30, Duration::from_secs(60));
}

#[test]
fn a_server_that_does_not_greet_as_it_should_is_tried_again() {
    for (style, welcome, refused) in [
        (Style::Oldstyle, Welcome::Closed, false),
        (Style::Oldstyle, Welcome::Garbage, false),
        (Style::Newstyle, Welcome::NoExport, true),
        (Style::Newstyle, Welcome::NotYet, false),
    ] {
        let server = Fading::start(style, SIZE, 1);
        let proxy = before(&server).start();
        let mut client = proxy.connect();
        assert_eq!(client.write(0, &[9; 4096]), 0);
        server.behave(|habits| habits.welcome = welcome);
        server.crash();
        send_writes(&mut client, 4);
        wait_for("some attempts", SOON, || (server.connections() >= 4).then_some(()));
        wait_for_status(&proxy, "upstream_state", if refused { "refused" } else { "connecting" });
        assert!(proxy.status().get("last_error") != "none", "{}", proxy.status().line());
        client.expect_silence(A_MOMENT);
        // The loss, and what was found instead of the server.
        assert_eq!(warnings(&proxy).len(), 2, "{welcome:?}: {}", proxy.log());
        assert_eq!(lines_with(&proxy, ":E:"), usize::from(refused), "{welcome:?}: {}", proxy.log());
        server.behave(|habits| habits.welcome = Welcome::Usual);
        expect_answers(&mut client, 4);
        drop(client);
        proxy.expect_healthy();
    }
}

#[test]
fn a_server_that_is_not_the_one_clients_know_is_refused_until_it_is() {
    for style in STYLES {
        let wrongs: [(&str, Wrong); 3] = [
            ("bytes, and clients were told", |habits| habits.size += 512),
            ("read-only", |habits| habits.flags |= 2),
            ("no FLUSH any more", |habits| habits.flags &= !4),
        ];
        for (said, wrong) in wrongs {
            let server = Fading::start(style, SIZE, 1);
            let proxy = before(&server).start();
            let mut client = proxy.connect();
            assert_eq!(client.write(0, &[9; 4096]), 0);
            server.behave(wrong);
            server.crash();
            send_writes(&mut client, 4);
            wait_for("some attempts", SOON, || (server.connections() >= 4).then_some(()));
            wait_for_status(&proxy, "upstream_state", "refused");
            client.expect_silence(A_MOMENT);
            assert_eq!((lines_with(&proxy, ":E:"), lines_with(&proxy, said)), (1, 1), "{}", proxy.log());
            server.behave(|habits| (habits.size, habits.flags) = (SIZE as u64, Fading::FLAGS));
            expect_answers(&mut client, 4);
            assert_eq!(warnings(&proxy).len(), 3, "{}", proxy.log());
            drop(client);
            proxy.expect_healthy();
        }
    }
}

#[test]
fn another_size_is_accepted_when_nobody_knows_the_old_one() {
    let server = Fading::start(Style::Oldstyle, SIZE, 1);
    let proxy = before(&server).start();
    let mut client = proxy.connect();
    assert_eq!(client.write(0, &[9; 4096]), 0);
    client.send(&request(kind::DISC, 0, 0, 0, 0));
    client.expect_closed();
    wait_for("its FLUSH", SOON, || (proxy.status().get("replay_bytes") == "0").then_some(()));
    assert_eq!(server.count(kind::FLUSH), 1, "what it wrote is made durable when it leaves");
    server.resize(2 * SIZE);
    server.restart();
    wait_for_status(&proxy, "size", &(2 * SIZE).to_string());
    let mut client = proxy.connect_bare();
    assert_eq!(client.read_greeting()[16..24], (2 * SIZE as u64).to_be_bytes());
    assert_eq!(client.write(2 * SIZE as u64 - 512, &[3; 512]), 0);
    drop(client);
    proxy.expect_healthy();
}

#[test]
fn a_replay_that_finds_no_space_is_repeated_until_there_is_some() {
    for style in STYLES {
        let server = Fading::start(style, SIZE, 1);
        let proxy = before(&server).start();
        let mut client = proxy.connect();
        let image = pattern(1, 32 * 4096);
        assert_eq!(client.write(0, &image), 0);
        server.behave(|habits| habits.errors = vec![(kind::WRITE, 65_536..u64::MAX, errno::ENOSPC)]);
        server.crash();
        client.send(&request(kind::READ, 0, 5, 0, image.len() as u32));
        wait_for("some attempts", SOON, || (server.connections() >= 4).then_some(()));
        wait_for_status(&proxy, "upstream_state", "refused");
        client.expect_silence(A_MOMENT);
        assert_eq!((lines_with(&proxy, ":E:"), lines_with(&proxy, "ENOSPC")), (1, 1), "{}", proxy.log());
        assert!(proxy.status().number("replay_bytes") >= image.len() as u64);
        server.behave(|habits| habits.errors.clear());
        assert_eq!(client.read_reply(), (0, 5));
        assert!(client.read_bytes(image.len()) == image);
        assert_eq!(client.flush(), 0);
        assert!(server.durable()[..image.len()] == image);
        drop(client);
        proxy.expect_healthy();
    }
}

#[test]
fn a_flush_that_fails_is_told_and_forgets_nothing() {
    for style in STYLES {
        let server = Fading::start(style, SIZE, 1);
        let proxy = before(&server).start();
        let mut client = proxy.connect();
        let image = pattern(1, 65_536);
        assert_eq!(client.write(0, &image), 0);
        server.behave(|habits| habits.errors = vec![(kind::FLUSH, ANYWHERE, errno::EIO)]);
        assert_eq!(client.flush(), errno::EIO);
        assert!(proxy.status().number("replay_bytes") >= 65_536);
        server.crash();
        assert!(client.read(0, 65_536).unwrap() == image);
        server.behave(|habits| habits.errors.clear());
        assert_eq!(client.flush(), 0);
        assert_eq!(proxy.status().get("replay_bytes"), "0");
        assert!(server.durable()[..65_536] == image);
        drop(client);
        proxy.expect_healthy();
    }
}

#[test]
fn what_a_server_has_not_done_because_it_ends_is_asked_again() {
    for style in STYLES {
        let server = Fading::start(style, SIZE, 1);
        let proxy = before(&server).start();
        let mut client = proxy.connect();
        assert_eq!(client.write(65_536, &[9; 4096]), 0);
        server.behave(|habits| habits.errors = vec![(kind::WRITE, 0..4096, ESHUTDOWN)]);
        send_writes(&mut client, 1);
        wait_for("another connection", SOON, || (server.connections() >= 2).then_some(()));
        // It does not ask without a pause.
        client.expect_silence(Duration::from_secs(1));
        let (connections, lines) = (server.connections(), warnings(&proxy).len());
        assert!(connections < 20 && lines < 20, "{connections} connections, {lines} lines: {}", proxy.log());
        server.behave(|habits| habits.errors.clear());
        expect_answers(&mut client, 1);
        assert_eq!(client.read(0, 4096).unwrap(), [1; 4096]);
        drop(client);
        proxy.expect_healthy();
    }
}

#[test]
fn nonsense_ends_the_connection_and_is_no_answer() {
    for style in STYLES {
        for (nonsense, said) in [(Nonsense::Magic, "not an NBD reply"), (Nonsense::Cookie, "cookie")] {
            let server = Fading::start(style, SIZE, 1);
            let proxy = before(&server).start();
            let mut client = proxy.connect();
            assert_eq!(client.write(0, &[9; 4096]), 0);
            server.behave(|habits| habits.nonsense = Some(nonsense));
            send_writes(&mut client, 4);
            expect_answers(&mut client, 4);
            assert!(server.has_cut() && server.connections() == 2);
            assert_eq!(lines_with(&proxy, said), 1, "{}", proxy.log());
            assert_eq!(warnings(&proxy).len(), 2, "{}", proxy.log());
            drop(client);
            proxy.expect_healthy();
        }
    }
}

#[test]
fn clients_are_cut_when_the_server_is_given_up() {
    let mut server = Fading::start(Style::Oldstyle, SIZE, 1);
    let proxy = before(&server).args("--give-up 1").start();
    let mut client = proxy.connect();
    assert_eq!(client.write(0, &[9; 4096]), 0);
    server.down();
    let start = Instant::now();
    client.send(&request(kind::READ, 0, 5, 0, 512));
    client.expect_closed();
    assert!(start.elapsed() >= Duration::from_millis(900), "{:?}", start.elapsed());
    assert_eq!((lines_with(&proxy, ":E:"), lines_with(&proxy, "away for too long")), (1, 1), "{}", proxy.log());
    assert_eq!(proxy.status().number("replay_bytes"), 0, "its client knows that it may be lost");
    // Somebody else has written there since.
    server.overwrite(&vec![3; SIZE]);
    server.up();
    wait_for_status(&proxy, "upstream_state", "connected");
    assert_eq!(proxy.connect().read(0, 4096).unwrap(), [3; 4096]);
    assert_eq!(server.count(kind::WRITE), 1);
    proxy.expect_healthy();
}

#[test]
fn nothing_to_replay_cuts_clients_with_the_server() {
    let server = Fading::start(Style::Newstyle, SIZE, 1);
    let proxy = before(&server).args("--replay none").start();
    let mut client = proxy.connect();
    assert_eq!(client.write(0, &[9; 4096]), 0);
    server.crash();
    client.expect_closed();
    wait_for_status(&proxy, "upstream_state", "connected");
    proxy.expect_healthy();
}

#[test]
fn writes_wait_when_the_map_is_full_and_the_server_does_not_flush() {
    const PIECE: usize = 256 << 10;
    const COUNT: u64 = 64;
    let size = COUNT as usize * PIECE;
    for style in STYLES {
        let server = Fading::start(style, size, 1);
        let proxy = before(&server).args("--replay-limit 4194304").start();
        let mut client = proxy.connect();
        let mut sender = Client::new(client.stream.try_clone().unwrap());
        server.behave(|habits| habits.held = vec![kind::FLUSH]);
        let image = pattern(1, size);
        thread::scope(|scope| {
            scope.spawn(|| {
                for (n, piece) in image.chunks(PIECE).enumerate() {
                    sender.send_request(kind::WRITE, 0, n as u64, (n * PIECE) as u64, PIECE as u32, piece);
                }
            });
            // Nothing moves any more when it is full.
            let mut answered = 0;
            client.stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            while let Ok(()) = client.stream.read_exact(&mut [0; 16]) {
                answered += 1;
            }
            assert!((4..16).contains(&answered), "{answered}: {}", proxy.status().line());
            let status = proxy.status();
            assert!(status.number("replay_bytes") <= 4 << 20, "{}", status.line());
            assert_eq!(status.number("own_flushes"), 1, "{}", status.line());
            let memory = proxy.memory_kib("VmRSS");
            assert!(memory < 20 << 10, "{memory} KiB");
            server.behave(|habits| habits.held.clear());
            client.stream.set_read_timeout(Some(SOON)).unwrap();
            for _ in answered..COUNT {
                assert_eq!(client.read_reply().0, 0);
            }
        });
        assert_eq!(client.flush(), 0);
        assert!(server.durable() == image);
        drop((client, sender));
        proxy.expect_healthy();
    }
}

#[test]
fn a_read_that_fails_is_told_and_the_connection_goes_on() {
    for (client_style, server_style) in PAIRS {
        let server = Fading::start(server_style, SIZE, 1);
        let proxy = before(&server).start();
        server.behave(|habits| habits.errors = vec![(kind::READ, 4096..8192, errno::EIO)]);
        if client_style == Style::Newstyle {
            let mut client = structured(&proxy);
            assert_eq!(client.read(0, 4096, 4096).unwrap_err(), errno::EIO);
            assert_eq!(client.read(0, 0, 4096).unwrap().0, [0; 4096]);
        } else {
            let mut client = proxy.connect();
            assert_eq!(client.read(4096, 4096), Err(errno::EIO));
            assert_eq!(client.read(0, 4096).unwrap(), [0; 4096]);
            assert_eq!(client.read(4096, 512), Err(errno::EIO));
        }
        assert_eq!(server.connections(), 1, "{}", proxy.log());
        proxy.expect_healthy();
    }
}

/// Also where a server that is silent would be connected to anew.
#[test]
fn a_large_request_over_a_slow_link_takes_its_time() {
    const LENGTH: usize = 2 << 20;
    for (style, is_fenced) in [(Style::Oldstyle, false), (Style::Newstyle, false), (Style::Newstyle, true)] {
        let mut server = Fading::start(style, LENGTH, 1);
        server.down();
        server.behave(|habits| (habits.is_fenced, habits.pace) = (is_fenced, Some(1 << 20)));
        server.up();
        let proxy = before(&server).through(&IMPATIENT).start();
        let mut client = proxy.connect();
        let image = pattern(1, LENGTH);
        assert_eq!(client.write(0, &image), 0);
        assert!(client.read(0, LENGTH as u32).unwrap() == image);
        assert_eq!((server.connections(), lines_with(&proxy, ": lost: ")), (1, 0), "{style:?}: {}", proxy.log());
        server.behave(|habits| habits.pace = None);
        drop(client);
        proxy.expect_healthy();
    }
}

/// A server without FLUSH promises nothing, and neither does the proxy.
#[test]
fn a_server_without_flush_is_warned_about_and_clients_are_not_offered_any() {
    let mut server = Fading::start(Style::Oldstyle, SIZE, 1);
    server.down();
    server.behave(|habits| habits.flags = 1);
    server.up();
    let proxy = before(&server).start();
    assert_eq!((warnings(&proxy).len(), lines_with(&proxy, "offers no FLUSH")), (1, 1), "{}", proxy.log());
    let mut client = proxy.connect_bare();
    let flags = u32::from_be_bytes(client.read_greeting()[24..28].try_into().unwrap());
    assert_eq!(flags & (4 | 8), 0, "neither FLUSH nor FUA");
    assert_eq!(client.write(0, &[9; 4096]), 0);
    assert_eq!(proxy.status().get("replay_bytes"), "0");
    assert_eq!(client.ask(kind::WRITE_ZEROES, 0, 0, 512, &[]), 0, "writes of zeroes");
    assert_eq!(client.ask(kind::TRIM, 0, 0, 512, &[]), 0, "done");
    assert_eq!(server.executed().iter().map(|executed| executed.kind).collect::<Vec<_>>(), [kind::WRITE; 2]);
    drop(client);
    proxy.expect_healthy();
}

/// A FUA write goes to a server that has no FUA as a write and a FLUSH.
#[test]
fn what_a_server_lacks_is_made_of_what_it_has() {
    for style in STYLES {
        let mut server = Fading::start(style, SIZE, 1);
        server.down();
        server.behave(|habits| habits.flags = 1 | 4);
        server.up();
        let proxy = before(&server).start();
        let client = Shadowing::start(door(&proxy, style), SIZE, 5, Habits::usual(style));
        for _ in 0..5 {
            assert!(client.goes_on(100), "{}", proxy.log());
            server.crash();
        }
        let shadow = client.stop().unwrap();
        assert_eq!(shadow.differs(&server.durable()), None);
        assert!(server.executed().iter().all(|executed| executed.flags == 0));
        assert_eq!(server.count(kind::WRITE_ZEROES) + server.count(kind::TRIM), 0);
        proxy.expect_healthy();
    }
}

/// Nobody else would ask for it: a relay would never end.
#[test]
fn a_flush_of_its_own_that_fails_is_tried_again() {
    let server = Fading::start(Style::Newstyle, SIZE, 1);
    let proxy = before(&server).start();
    let mut client = proxy.connect();
    assert_eq!(client.write(0, &[9; 4096]), 0);
    server.behave(|habits| habits.errors = vec![(kind::FLUSH, ANYWHERE, errno::EIO)]);
    drop(client);
    let line = proxy.wait_for_log("a FLUSH of this side's own has failed");
    assert!(line.contains(":W:"), "{line}");
    server.behave(|habits| habits.errors.clear());
    wait_for("another one", SOON, || (proxy.status().number("replay_bytes") == 0).then_some(()));
    assert_eq!(server.durable()[..4096], [9; 4096]);
    assert_eq!(proxy.status().number("own_flushes"), 2);
    proxy.expect_healthy();
}

/// A WRITE that is one piece has its FUA, also when its client asks one thing at a time.
#[test]
fn fua_stays_fua() {
    let server = Fading::start(Style::Newstyle, SIZE, 1);
    let proxy = before(&server).start();
    let mut client = proxy.connect();
    for n in 0..5 {
        assert_eq!(client.ask(kind::WRITE, flag::FUA, n * 4096, 4096, &[9; 4096]), 0);
    }
    assert_eq!((server.count(kind::WRITE), server.count(kind::FLUSH)), (5, 0));
    assert!(server.executed().iter().all(|request| request.flags == flag::FUA), "{:?}", server.executed());
    drop(client);
    proxy.expect_healthy();
}
