//! The log: the manual's line format, the levels of each verbosity, no floods, and never a wait for stderr.

use crate::support::fuse::{Disk, Op};
use crate::support::newstyle::{self, info_data, opt, option, string, Haggler, PORT};
use crate::support::peers::{At, Fault, Script};
use crate::support::{errno, kind, peers, request, run, wait_for, Server, SOON};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::TcpStream;
use std::process::Stdio;
use std::time::Instant;

/// `<TIMESTAMP>:<LEVEL>:<PID> <THREAD> <SOURCEFILE:SOURCELINE>: <MSG>`; the level, or what is wrong.
fn level_of(line: &str, pid: u32) -> Result<char, &'static str> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let (timestamp, rest) = line.split_once(':').ok_or("no timestamp")?;
    let (level, rest) = rest.split_once(':').ok_or("no level")?;
    let (process, rest) = rest.split_once(' ').ok_or("no process")?;
    let (thread, rest) = rest.split_once(' ').ok_or("no thread")?;
    let (source, message) = rest.split_once(": ").ok_or("no message")?;
    let (file, number) = source.split_once(':').ok_or("no source line")?;
    let sound = digits(timestamp) && digits(number) && process == pid.to_string() && !thread.is_empty();
    let is_file = file.strip_suffix(".rs").is_some() && !file.contains(' ') && !message.is_empty();
    match level {
        "D" | "I" | "W" | "E" | "F" if sound && is_file => Ok(level.chars().next().unwrap()),
        _ => Err("a field is wrong"),
    }
}

/// The levels of all lines, each of which must have the format.
#[track_caller]
fn levels(server: &Server) -> String {
    let log = server.log();
    log.lines().map(|line| level_of(line, server.pid()).unwrap_or_else(|why| panic!("{why}: {line}"))).collect()
}

/// A client that does well, one that asks for what is not there, one that breaks the protocol.
fn three_clients(server: &Server) {
    let mut good = server.connect();
    good.expect_alive();
    assert_ne!(good.read(u64::MAX, 1), Ok(vec![]));
    good.send(&request(kind::DISC, 0, 0, 0, 0));
    good.expect_closed();
    let mut bad = server.connect();
    bad.send(&[0; 28]);
    bad.read_to_close();
}

#[test]
fn every_line_has_the_format_and_every_verbosity_its_levels() {
    for (options, expected, unexpected) in [
        ("", "W", "DI"),
        ("-v", "IW", ""),
        ("--verbose", "IW", ""),
        ("-q", "", "DIWE"),
        ("--quiet", "", "DIWE"),
        ("-q -v", "IW", ""),
        ("-v -q", "", "DIWE"),
        ("-vqv", "IW", ""),
        ("--quiet --verbose --quiet", "", "DIWE"),
    ] {
        let mut server = Server::serve().size(4096).args(options).start();
        three_clients(&server);
        assert_eq!(server.stop().code(), Some(0));
        let found = levels(&server);
        assert!(expected.chars().all(|level| found.contains(level)), "{options}: {found}");
        assert!(!unexpected.chars().any(|level| found.contains(level)), "{options}: {}", server.log());
        if cfg!(debug_assertions) {
            assert_ne!(unexpected.contains('D'), found.contains('D'), "{options}: {found}");
        }
    }
}

#[test]
fn a_failed_start_is_told_even_when_quiet() {
    for option in ["-q", "-v", "--"] {
        let output = run(&["serve", "-l", "127.0.0.1", "-p", "0", "-f", "/no/where", option], &[]);
        let last = output.stderr.lines().last().unwrap();
        let pid = last.split(':').nth(2).unwrap().split(' ').next().unwrap().parse().unwrap();
        assert_eq!(level_of(last, pid), Ok('F'), "{last}");
        assert!(last.contains("/no/where"));
    }
}

#[test]
fn timestamps_are_monotonic_milliseconds() {
    // In seconds with two decimals.
    let now = || {
        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        uptime.split(' ').next().unwrap().replace('.', "").parse::<u64>().unwrap() * 10
    };
    let before = now();
    let mut server = Server::serve().size(4096).arg("-v").start();
    server.connect().expect_alive();
    server.stop();
    let times: Vec<u64> = server.log().lines().map(|line| line.split(':').next().unwrap().parse().unwrap()).collect();
    assert!(times.is_sorted() && times.len() > 2);
    // The clock of /proc counts sleep as well, and in hundredths.
    assert!(times[0] <= now() + 20 && times[times.len() - 1] + 60_000 >= before, "{times:?} around {before}");
}

#[test]
fn the_life_of_a_client_is_two_lines() {
    let mut server = Server::serve().size(4096).arg("-v").start();
    let mut client = server.connect();
    (0..100).for_each(|_| client.expect_alive());
    let local = client.stream.local_addr().unwrap().to_string();
    drop(client);
    wait_for("it gone", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    server.stop();
    let log = server.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains(&local) && line.contains(":I:")).collect();
    assert_eq!(lines.len(), 2, "{log}");
    assert!(lines[1].contains("closed") && lines[1].contains("100 reads"), "{}", lines[1]);
}

#[test]
fn a_refused_request_is_one_line_and_repeats_are_counted() {
    let server = Server::serve().size(4096).start();
    let mut client = server.connect();
    let local = client.stream.local_addr().unwrap().to_string();
    assert_eq!(client.write(4096, &[1; 100]), 28);
    let line = server.wait_for_log(&local);
    assert_eq!(level_of(&line, server.pid()), Ok('W'));
    for part in ["WRITE", "4096", "100", "beyond"] {
        assert!(line.contains(part), "no {part} in {line}");
    }
    for n in 0..2000 {
        client.send(&request(kind::READ, 0, n, 1 << 40, 512).repeat(2));
        assert_eq!((client.read_reply().0, client.read_reply().0), (28, 28));
    }
    assert!(server.log().lines().count() <= 5, "no flood: {}", server.log());
    // Another client has a line of its own.
    let mut other = server.connect();
    assert_eq!(other.ask(99, 0, 0, 0, &[]), 22);
    server.wait_for_log(&other.stream.local_addr().unwrap().to_string());
}

/// How many lines hold `what`, and how many more are said to have been left out as `called`.
fn logged_and_left_out(log: &str, what: &str, called: &str) -> (u64, u64) {
    let lines = log.lines().filter(|line| line.contains(":W:") && line.contains(what)).count() as u64;
    let told = log.lines().filter_map(|line| line.split_once("not logged: ")?.1.split_once(&format!(" more {called}")));
    let left_out = told.map(|(before, _)| before.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum();
    (lines, left_out)
}

/// The most lines of a kind since `start`: ten in ten seconds.
fn lines_max(start: Instant) -> u64 {
    10 * (start.elapsed().as_secs() / 10 + 1)
}

/// One bad request per connection: counted over all of them, and nothing else is lost with them.
#[test]
fn a_peer_that_comes_again_and_again_fills_no_log() {
    const TIMES: u64 = 500;
    let mut server = Server::serve().size(4096).start();
    let start = Instant::now();
    for _ in 0..TIMES {
        let mut client = server.connect();
        assert_eq!(client.write(4096, &[1; 512]), 28);
        client.send(&request(kind::DISC, 0, 0, 0, 0));
    }
    let mut bad = server.connect();
    let local = bad.stream.local_addr().unwrap().to_string();
    bad.send(&[0; 28]);
    bad.read_to_close();
    let line = server.wait_for_log(&local);
    assert!(line.contains("closed"), "another kind has lines of its own: {line}");
    let line = server.wait_for_log("not logged: ");
    assert_eq!(level_of(&line, server.pid()), Ok('W'));
    // The rest is told at the end.
    assert_eq!(server.stop().code(), Some(0));
    let log = server.log();
    let (lines, left_out) = logged_and_left_out(&log, "refused WRITE", "refused requests");
    assert!(lines <= lines_max(start), "{log}");
    assert_eq!(lines + left_out, TIMES, "{log}");
}

/// Half a migration each.
#[test]
fn senders_that_leave_again_and_again_fill_no_log() {
    const TIMES: u64 = 200;
    let mut listener = peers::listen(0).size(1 << 20).start();
    let start = Instant::now();
    for _ in 0..TIMES {
        let mut sender = wait_for("to be let in", SOON, || {
            let mut sender = listener.connect_bare();
            // While the one before is not gone, there is no greeting.
            sender.stream.peek(&mut [0; 1]).is_ok_and(|n| n == 1).then(|| {
                sender.read_greeting();
                sender
            })
        });
        assert_eq!(sender.write(0, &[1; 4096]), 0);
    }
    wait_for("the last one gone", SOON, || (listener.status().number("num_clients") == 0).then_some(()));
    assert_eq!(listener.stop().code(), Some(1));
    let log = listener.log();
    let (lines, left_out) = logged_and_left_out(&log, "no complete migration", "incomplete migrations");
    assert!(lines <= lines_max(start), "{log}");
    assert_eq!(lines + left_out, TIMES, "{log}");
    assert!(log.lines().last().unwrap().contains(":F:"), "{log}");
}

#[test]
fn a_broken_protocol_is_a_warning_that_names_the_client() {
    let server = Server::serve().size(4096).start();
    for bytes in [vec![0; 28], request(kind::WRITE, 0, 0, 0, 512)] {
        let mut client = server.connect();
        let local = client.stream.local_addr().unwrap().to_string();
        client.send(&bytes);
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        client.read_to_close();
        let line = server.wait_for_log(&local);
        assert_eq!(level_of(&line, server.pid()), Ok('W'), "{line}");
    }
    // A client that goes in good order is none.
    let mut client = server.connect();
    let local = client.stream.local_addr().unwrap().to_string();
    client.send(&request(kind::DISC, 0, 0, 0, 0));
    client.expect_closed();
    wait_for("it gone", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    assert!(!server.log().contains(&local), "{}", server.log());
}

#[test]
fn a_name_cannot_forge_lines() {
    let output =
        run(&["serve", "-l", "127.0.0.1", "-p", "0", "-f", "/no/such\n1:F:1 main a.rs:1: forged\u{1b}[2J"], &[]);
    assert_eq!((output.code, output.stderr.lines().count()), (Some(1), 1), "{}", output.stderr);
    assert!(!output.stderr.contains('\u{1b}'));
}

#[test]
fn a_full_stderr_does_not_hold_the_server() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let server = Server::serve().size(4096).arg("-v").stderr(writer).start();
    // Far more lines than a pipe holds.
    for _ in 0..1500 {
        server.connect().expect_alive();
    }
    assert_eq!(server.status().number("reads"), 1500);
    // Once somebody reads again, it says how many are missing.
    let mut bytes = vec![0; 1 << 20];
    let mut text = String::new();
    wait_for("the count of lost lines", SOON, || {
        server.connect().expect_alive();
        let n = reader.read(&mut bytes).unwrap();
        text.push_str(&String::from_utf8_lossy(&bytes[..n]));
        text.contains("log lines lost").then_some(())
    });
    let complete = &text[..text.rfind('\n').unwrap()];
    for line in complete.lines() {
        level_of(line, server.pid()).unwrap_or_else(|why| panic!("{why}: {line}"));
    }
    // And when the reader goes for good, the server stays.
    drop(reader);
    for _ in 0..10 {
        server.connect().expect_alive();
    }
    server.expect_healthy();
}

#[test]
fn a_full_disk_under_stderr_does_not_end_the_server() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let server = Server::serve().size(4096).arg("-v").stderr(full).start();
    three_clients(&server);
    server.expect_healthy();
}

#[test]
fn several_programs_may_share_a_log() {
    let server = Server::serve().size(4096).start();
    let shared = server.dir().join("shared");
    let mut file = File::options().create(true).append(true).read(true).open(&shared).unwrap();
    let first = Server::serve().size(4096).arg("-v").stderr(Stdio::from(file.try_clone().unwrap())).start();
    let second = Server::serve().size(4096).arg("-v").stderr(Stdio::from(file.try_clone().unwrap())).start();
    (0..50).for_each(|_| [&first, &second].into_iter().for_each(three_clients));
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut text).unwrap();
    for line in text.lines() {
        let sound = [&first, &second].iter().any(|server| level_of(line, server.pid()).is_ok());
        assert!(sound, "torn: {line}");
    }
}

/// A load balancer looks whether the port is open, closes with what it was sent unread, and is no peer that did wrong.
#[test]
fn a_connection_that_asks_for_nothing_is_no_warning() {
    let mut server = Server::serve().size(4096).arg(PORT).arg("-v").start();
    let mut local = Vec::new();
    for _ in 0..3 {
        let client = server.connect_bare();
        // The greeting has come and is not read: the close is a reset.
        assert_eq!(client.stream.peek(&mut [0]).unwrap(), 1);
        local.push(client.stream.local_addr().unwrap().to_string());
        drop(client);
        let haggler = Haggler::new(&server);
        local.push(haggler.client.stream.local_addr().unwrap().to_string());
    }
    let mut reader = server.connect();
    let reader_local = reader.stream.local_addr().unwrap().to_string();
    reader.send(&request(kind::READ, 0, 1, 0, 512));
    // Its reply has come, too.
    wait_for("the reply", SOON, || (reader.stream.peek(&mut [0; 528]).unwrap() == 528).then_some(()));
    drop(reader);
    // Nobody who says nothing is one; who stops half-way is.
    let silent = TcpStream::connect(newstyle::address(&server)).unwrap();
    local.push(silent.local_addr().unwrap().to_string());
    let mut stopped = Haggler::new(&server);
    stopped.client.send(b"IHAVE");
    let half_way = stopped.client.stream.local_addr().unwrap().to_string();
    let closed = |who: &str| {
        server.log().lines().find(|line| line.contains(who) && line.contains("closed: ")).map(str::to_owned)
    };
    for who in &local {
        let line = wait_for("its end", SOON, || closed(who));
        assert_eq!(level_of(&line, server.pid()), Ok('I'), "{line}");
    }
    let line = wait_for("its end", SOON, || closed(&half_way));
    assert_eq!(level_of(&line, server.pid()), Ok('W'), "{line}");
    let line = wait_for("its end", SOON, || closed(&reader_local));
    assert_eq!(level_of(&line, server.pid()), Ok('W'), "it had asked for something: {line}");
    assert_eq!(server.stop().code(), Some(0));
}

/// What is wrong here is an error, and what peers do wrong takes none of its lines.
#[test]
fn a_full_or_failing_disk_is_an_error_of_its_own() {
    let Some(disk) = Disk::mount(8 << 20) else { return };
    let mut server = Server::serve().file(disk.furnish("image", &vec![1; 1 << 20])).start();
    let mut client = server.connect();
    assert_eq!(client.write(1 << 20, &[1; 100]), errno::ENOSPC);
    assert!(server.wait_for_log("refused WRITE").contains(":W:"));
    disk.fail(Op::Write, .., libc::ENOSPC);
    disk.fail(Op::Read, ..4096, libc::EIO);
    disk.drop_cache("image");
    let (start, times) = (Instant::now(), 50);
    for _ in 0..times {
        assert_eq!(client.write(8192, &[7; 4096]), errno::ENOSPC);
        assert_eq!(client.read(0, 512), Err(errno::EIO));
    }
    disk.heal(Op::Write);
    disk.heal(Op::Read);
    assert_eq!(server.stop().code(), Some(0));
    let log = server.log();
    for (what, called) in [
        ("failed: No space left", "requests for which the disk had no room"),
        ("failed: Input/output", "requests that the disk failed"),
    ] {
        let lines = log.lines().filter(|line| line.contains(":E:") && line.contains(what)).count() as u64;
        let told = log.lines().filter(|line| line.contains(":E:")).filter_map(|line| {
            let (before, _) = line.split_once("not logged: ")?.1.split_once(&format!(" more {called}"))?;
            before.rsplit(' ').next()?.parse::<u64>().ok()
        });
        assert_eq!(lines + told.sum::<u64>(), times, "{what}: {log}");
        assert!(lines > 0 && lines <= lines_max(start), "{what}: {log}");
    }
}

#[test]
fn a_file_that_became_shorter_is_called_that() {
    let server = Server::serve().content(&[7; 8192]).start();
    let mut client = server.connect();
    File::options().write(true).open(&server.image).unwrap().set_len(4096).unwrap();
    assert_eq!(client.read(4096, 512), Err(errno::EIO));
    let line = server.wait_for_log("READ");
    assert!(line.contains(":E:") && line.contains("failed: the file has become shorter than the image; "), "{line}");
}

#[test]
fn an_export_that_is_not_there_is_named() {
    let server = Server::serve().size(4096).arg(PORT).start();
    let mut haggler = Haggler::new(&server);
    let local = haggler.client.stream.local_addr().unwrap().to_string();
    haggler.expect(opt::GO, &info_data(b"disk one\n\x1b[2J", &[]), newstyle::rep::ERR_UNKNOWN);
    let line = server.wait_for_log("asked for an export");
    assert_eq!(level_of(&line, server.pid()), Ok('W'));
    assert!(line.contains(&local) && line.ends_with(r#": "disk one\n\u001b[2J""#), "{line}");
    // It may go on, and one that has no other way to be told is closed.
    haggler.expect_in_step();
    let mut haggler = Haggler::new(&server);
    haggler.client.send(&option(opt::EXPORT_NAME, &b"x".repeat(4000)));
    haggler.client.read_to_close();
    let line = server.wait_for_log("xxx");
    assert!(line.ends_with(&format!(": \"{}...\"", "x".repeat(128))), "{line}");
    let lines = server.log().lines().count();
    let mut haggler = Haggler::new(&server);
    for _ in 0..60 {
        haggler.expect(opt::INFO, &[string(b"other"), vec![0, 0]].concat(), newstyle::rep::ERR_UNKNOWN);
    }
    assert!(server.log().lines().count() <= lines + 20, "no flood: {}", server.log());
}

/// Whoever asks for it is told, and writes the zeroes.
#[test]
fn a_fast_zero_that_is_refused_is_no_error() {
    const FAST_ZERO: u16 = 16;
    let Some(disk) = Disk::mount(8 << 20) else { return };
    // To this file system each range is one to write.
    disk.fail(Op::Fallocate, .., libc::EOPNOTSUPP);
    let mut server = Server::serve().file(disk.furnish("image", &vec![1; 1 << 20])).arg(PORT).start();
    let mut client = newstyle::simple(&server);
    assert_eq!(client.ask(kind::WRITE_ZEROES, FAST_ZERO, 0, 4096, &[]), 95);
    assert_eq!(client.ask(kind::WRITE_ZEROES, 0, 0, 4096, &[]), 0);
    assert_eq!(server.status().number("errors"), 0);
    assert_eq!(server.stop().code(), Some(0));
    assert!(!server.log().lines().any(|line| line.contains(":W:") || line.contains(":E:")), "{}", server.log());
}

/// Who was told of failures without `--verbose` is told of the success, too; who was not, is not.
#[test]
fn a_success_is_as_loud_as_the_failures_before_it() {
    let mut quiet = Server::serve().size(1 << 20).start();
    let mut listener = peers::listen(0).size(1 << 20).start();
    peers::start_mirror(&quiet, listener.address(), "");
    peers::expect_migrated(&mut quiet, &mut listener);
    assert_eq!((&*quiet.log(), &*listener.log()), ("", ""));

    let mut source = Server::serve().size(1 << 20).start();
    let destination = Script::new(1 << 20).faults(&[(At::FirstFlush, Fault::Close)]).start();
    peers::start_mirror(&source, destination.address, "");
    destination.wait_until_gone();
    let mut listener = peers::listen(destination.address.port()).size(1 << 20).start();
    peers::expect_migrated(&mut source, &mut listener);
    assert!(source.log().contains(":W:") && source.log().contains("attempt 1 failed"), "{}", source.log());
    let last = source.log().lines().last().unwrap().to_owned();
    assert!(last.contains(":W:") && last.contains(": complete: "), "{last}");

    let mut listener = peers::listen(0).size(1 << 20).start();
    let mut sender = listener.connect();
    assert_eq!(sender.write(0, &[1; 4096]), 0);
    drop(sender);
    listener.wait_for_log("no complete migration");
    let mut source = Server::serve().size(1 << 20).start();
    peers::start_mirror(&source, listener.address(), "");
    peers::expect_migrated(&mut source, &mut listener);
    let last = listener.log().lines().last().unwrap().to_owned();
    assert!(last.contains(":W:") && last.contains("the migration is complete"), "{last}");
}
