//! The control socket: its commands, its limits, and what no peer of it may do to another.

use crate::support::{kind, leave_stale_socket, request, run, wait_for, Server, TempDir, SOON};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

const STATUS: &[u8] = b"status\n\n";

fn connect(server: &Server) -> UnixStream {
    let stream = UnixStream::connect(&server.sock).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    stream
}

fn read_all(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => panic!("{error}"),
        _ => String::from_utf8_lossy(&bytes).into_owned(),
    }
}

#[test]
fn every_spelling_of_a_command() {
    let server = Server::serve().size(4096).start();
    for good in
        ["status\n\n", "status\n", "status", "status\r\n\r\n", "  status  \n\n", "status\n\nrubbish\nbehind it\n\n"]
    {
        let answer = server.control(good);
        assert!(
            answer.starts_with("0: pid=") && answer.ends_with('\n') && answer.lines().count() == 1,
            "{good:?}: {answer}"
        );
    }
    for (bad, expected) in [
        ("", "9: missing command\n"),
        ("\n", "9: missing command\n"),
        ("\n\nstatus\n\n", "9: missing command\n"),
        ("   \n\n", "9: missing command\n"),
        ("nonsense\n\n", "10: unknown command\n"),
        ("STATUS\n\n", "10: unknown command\n"),
        ("statu", "10: unknown command\n"),
        ("statuss\n\n", "10: unknown command\n"),
        ("\0\n\n", "10: unknown command\n"),
        ("break\n\n", "1: not mirroring\n"),
        ("mirror_max_bps\n1000\n\n", "1: Not currently mirroring\n"),
    ] {
        assert_eq!(server.control(bad), expected, "{bad:?}");
    }
    server.expect_healthy();
}

/// The modes say until when they wait for an answer. What a server finds later than that is carried out by nobody's wish.
#[test]
fn a_command_that_nobody_waits_for_is_not_carried_out() {
    let server = Server::serve().size(4096).start();
    let clock = flexnbd::sys::clock_began_s();
    let other = clock - 10;
    for (behind, answer) in [
        (format!("until=1 {clock}\n"), ""),
        (format!("until={} {clock}\n", u64::MAX), "0: updated\n"),
        (format!("until=-1 {clock}\n"), "0: updated\n"),
        (format!("until=1 {other}\n"), "0: updated\n"),
        (String::new(), "0: updated\n"),
    ] {
        assert_eq!(server.control("acl\n127.0.0.1\n\n"), "0: updated\n");
        assert_eq!(server.control(format!("acl\n127.0.0.0/8\n\n{behind}")), answer, "{behind}");
        let expected = if answer.is_empty() { "127.0.0.1" } else { "127.0.0.0/8" };
        assert_eq!(server.status().get("acl"), expected, "{behind}");
    }
    assert!(server.log().contains("waits no more: it is not carried out"), "{}", server.log());
    server.expect_healthy();
}

/// What the modes send is that.
#[test]
fn the_modes_say_until_when_they_wait() {
    let dir = TempDir::new();
    let path = dir.join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut said = [0; 4096];
        let n = stream.read(&mut said).unwrap();
        stream.write_all(b"0: done\n").unwrap();
        String::from_utf8_lossy(&said[..n]).into_owned()
    });
    let before = flexnbd::sys::monotonic_ms();
    assert_eq!(run(&["break", "--sock", path.to_str().unwrap()], &[]).code, Some(0));
    let said = answering.join().unwrap();
    let (until, clock) = said.strip_prefix("break\n\nuntil=").unwrap().trim_end().split_once(' ').unwrap();
    assert!(clock.parse::<u64>().unwrap().abs_diff(flexnbd::sys::clock_began_s()) <= 2, "{said}");
    let until: u64 = until.parse().unwrap();
    assert!((before + 30_000..=flexnbd::sys::monotonic_ms() + 30_000).contains(&until), "{said}");
}

#[test]
fn the_answer_comes_without_the_end_of_the_stream() {
    let server = Server::serve().size(4096).start();
    let mut stream = connect(&server);
    stream.write_all(STATUS).unwrap();
    // The server closes first.
    assert!(read_all(&mut stream).starts_with("0: pid="));
}

#[test]
fn status_has_its_keys_in_order() {
    let server = Server::serve().size(123 << 9).arg("--max-clients=1").start();
    let status = server.status();
    let keys: Vec<_> = status.line().trim_end().split(' ').map(|pair| pair.split_once('=').unwrap().0).collect();
    assert_eq!(keys[..6], ["pid", "is_mirroring", "has_control", "size", "clients_allowed", "num_clients"]);
    for counter in ["reads", "writes", "flushes", "read_bytes", "written_bytes", "errors"] {
        assert_eq!(status.number(counter), 0);
    }
    assert_eq!(status.number("pid"), u64::from(server.pid()));
    assert_eq!((status.get("is_mirroring"), status.get("has_control")), ("false", "true"));
    assert_eq!((status.number("size"), status.number("num_clients")), (123 << 9, 0));
    assert_eq!(status.get("clients_allowed"), "true");
    assert_eq!(status.get("address"), server.address().to_string());

    let output = run(&["status", "--sock", server.sock.to_str().unwrap()], &[]);
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.lines().count() == 1 && printed.ends_with('\n'), "one line, ended by a newline: {printed}");
    // What time changes may have another value.
    let same = |pair: &&str| !pair.starts_with("uptime=") && !pair.starts_with("longest_turn_us=");
    assert!(printed.split(' ').filter(same).eq(status.line().split(' ').filter(same)), "{printed}{}", status.line());
}

/// What was there before the newer keys stays where it was.
#[test]
fn status_says_what_is_in_force() {
    const SETTINGS: [&str; 8] =
        ["version", "uptime", "killswitch", "max_clients", "default_deny", "acl", "max_iops", "max_bytes_per_second"];
    let builder = Server::serve();
    let image = builder.dir().join("a disk\tof\n\\mine");
    std::fs::File::create(&image).unwrap().set_len(4096).unwrap();
    let options = "-d --killswitch=0.50 --max-clients 7 --max-iops 9K 127.0.0.1 10.1.2.3/8 2001:db8::/32";
    let server = builder.file(image.clone()).args(options).start();
    let status = server.status();
    let keys: Vec<_> = status.line().trim_end().split(' ').map(|pair| pair.split_once('=').unwrap().0).collect();
    assert_eq!(keys[keys.len() - 11..keys.len() - 1], [&["sync", "file"][..], &SETTINGS].concat());
    let escaped = image.to_str().unwrap().replace('\\', "\\\\");
    let escaped = escaped.replace(' ', "\\u0020").replace('\t', "\\u0009").replace('\n', "\\u000a");
    assert_eq!(status.get("file"), escaped);
    let found = SETTINGS.map(|key| status.get(key));
    assert_eq!(found[0], env!("CARGO_PKG_VERSION"));
    assert!(found[1].parse::<u64>().unwrap() < 3600, "{}", status.line());
    assert_eq!(found[2..], ["0.5", "7", "true", "127.0.0.1,10.0.0.0/8,2001:db8::/32", "9216", "0"]);
    assert_eq!(server.control("acl\n::1\n\n"), "0: updated\n");
    assert_eq!(server.status().get("acl"), "::1");
    assert_eq!(server.control("acl\n\n"), "0: updated\n");
    assert_eq!(server.status().get("acl"), "none");
    let json = server.control("status json\n\n");
    assert!(json.contains(&format!("\"file\":\"{}", server.dir().join("").display())), "{json}");
    assert!(json.contains("/a disk\\tof\\n\\\\mine\","), "{json}");

    let plain = Server::serve().size(4096).start();
    let status = plain.status();
    assert_eq!(
        SETTINGS[2..].iter().map(|key| status.get(key)).collect::<Vec<_>>(),
        ["none", "100", "false", "none", "0", "0"]
    );
    // Whoever runs it may have named the image from where it was.
    let named = Server::serve().size(4096).start();
    let relative = Server::serve().file("image".into());
    std::fs::copy(&named.image, relative.dir().join("image")).unwrap();
    let relative = relative.start();
    assert_eq!(relative.status().get("file"), relative.dir().join("image").to_str().unwrap());
}

#[test]
fn every_client_has_a_record() {
    let server = Server::serve().size(1 << 20).start();
    let mut client = server.connect();
    (0..3).for_each(|_| client.expect_alive());
    assert_eq!((client.write(0, &[1; 512]), client.write(1 << 20, &[1; 512])), (0, 28));
    let mut late = server.connect();
    late.send(&request(kind::WRITE, 0, 1, 0, 4096));
    let records = || {
        let answer = server.control("status clients\n\n");
        let records = answer.split(" client=").skip(1).map(|record| format!("client={}", record.trim_end()));
        records.collect::<Vec<_>>()
    };
    let value = |record: &str, key: &str| {
        let pair = record.split(' ').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('=')).unwrap();
        pair.parse::<u64>().unwrap()
    };
    wait_for("a request that grows old", SOON, || (value(&records()[1], "oldest_request_ms") >= 100).then_some(()));
    let records = records();
    let counts = ["reads", "writes", "errors", "in_flight"].map(|key| value(&records[0], key));
    assert_eq!(counts, [3, 2, 1, 0], "{records:?}");
    assert_eq!(value(&records[0], "oldest_request_ms"), 0, "{records:?}");
    assert_eq!(["reads", "writes", "errors", "in_flight"].map(|key| value(&records[1], key)), [0, 0, 0, 1]);
}

#[test]
fn status_counts_since_the_start() {
    let server = Server::serve().size(1 << 20).start();
    let mut client = server.connect();
    (0..3).for_each(|_| assert!(client.read(0, 1000).is_ok()));
    (0..2).for_each(|_| assert_eq!(client.write(0, &[1; 700]), 0));
    assert_eq!(client.ask(kind::WRITE_ZEROES, 0, 0, 512, &[]), 0);
    assert_eq!(client.flush(), 0);
    assert_ne!(client.write(1 << 20, &[1; 10]), 0);
    assert_ne!(client.ask(99, 0, 0, 0, &[]), 0);
    let check = |clients| {
        let status = server.status();
        assert_eq!(status.number("num_clients"), clients);
        assert_eq!((status.number("reads"), status.number("read_bytes")), (3, 3000));
        assert_eq!(status.number("written_bytes"), 1400 + 512);
        assert!((3..=4).contains(&status.number("writes")), "{}", status.line());
        assert_eq!((status.number("flushes"), status.number("errors")), (1, 2));
    };
    check(1);
    client.send(&request(kind::DISC, 0, 0, 0, 0));
    client.expect_closed();
    check(0);
}

#[test]
fn slow_huge_and_binary_commands_do_no_harm() {
    let server = Server::serve().size(4096).start();
    let mut slow = connect(&server);
    for byte in STATUS {
        slow.write_all(&[*byte]).unwrap();
        assert!(server.control(STATUS).starts_with("0: "), "another one is not held up");
    }
    assert!(read_all(&mut slow).starts_with("0: pid="));

    let long_line = [b"acl ".to_vec(), vec![b'x'; 100_000], b"\n\n".to_vec()].concat();
    let many_lines = [b"acl\n".to_vec(), b"10.0.0.1\n".repeat(1_000_000)].concat();
    let binary: Vec<u8> = (0..100_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (what, bytes) in
        [("a long line", long_line), ("many lines", many_lines), ("zeroes", vec![0; 1 << 20]), ("binary", binary)]
    {
        let mut stream = connect(&server);
        // The server may close before it has taken all of it.
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let answer = read_all(&mut stream);
        assert!(answer.is_empty() || answer.lines().count() == 1 && !answer.starts_with("0: "), "{what}: {answer}");
        assert!(answer.len() < 1000, "{what} is not repeated as a whole");
    }
    // The longest list that fits is taken.
    let list = format!("acl\n{}\n", "127.0.0.1\n".repeat(6000));
    assert_eq!(server.control(list), "0: updated\n");
    assert!(server.memory_kib("VmHWM:") < 64 << 10);
    server.expect_healthy();
}

#[test]
fn a_peer_that_does_not_take_its_answer_does_no_harm() {
    let server = Server::serve().size(4096).start();
    for _ in 0..100 {
        let mut stream = connect(&server);
        stream.write_all(STATUS).unwrap();
    }
    let mut gone = connect(&server);
    gone.write_all(b"sta").unwrap();
    drop(gone);
    server.expect_healthy();
}

#[test]
fn hundreds_at_once() {
    let server = Server::serve().size(4096).start();
    let mut streams: Vec<_> = (0..120).map(|_| connect(&server)).collect();
    for stream in &mut streams {
        stream.write_all(&STATUS[..6]).unwrap();
    }
    for stream in &mut streams {
        stream.write_all(&STATUS[6..]).unwrap();
    }
    for stream in &mut streams {
        assert!(read_all(stream).starts_with("0: pid="));
    }
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..50).for_each(|_| assert!(server.control(STATUS).starts_with("0: "))));
        }
    });
    server.expect_healthy();
}

/// 64 connections that say nothing hold up the 65th until their deadline, and nobody else.
#[test]
fn silent_connections_are_closed_after_ten_seconds() {
    let server = Server::serve().size(4096).start();
    let mut client = server.connect();
    let start = Instant::now();
    let mut silent: Vec<_> = (0..64).map(|_| connect(&server)).collect();
    silent[0].write_all(b"acl\n127.0.0.1\n").unwrap();
    let mut trickle = silent.pop().unwrap();
    let trickling = std::thread::spawn(move || {
        wait_for("the end of a trickle", SOON, || {
            std::thread::sleep(Duration::from_millis(100));
            trickle.write_all(b"x").err()
        });
        start.elapsed()
    });
    let mut next = connect(&server);
    next.write_all(STATUS).unwrap();
    client.expect_alive();
    assert!(read_all(&mut next).starts_with("0: pid="), "served when there is room");
    let took = start.elapsed();
    assert!((9..20).contains(&took.as_secs()), "{took:?}");
    for stream in &mut silent {
        assert_eq!(read_all(stream), "", "closed without an answer");
    }
    assert!(trickling.join().unwrap() < Duration::from_secs(20), "the deadline is one of the whole command");
    server.expect_healthy();
}

#[test]
fn a_hung_peer_does_not_hold_up_the_others() {
    let server = Server::serve().size(4096).start();
    let _hung: Vec<_> = (0..10).map(|_| connect(&server)).collect();
    let start = Instant::now();
    assert!(server.control(STATUS).starts_with("0: "));
    assert_eq!(server.control("acl\n127.0.0.1\n\n"), "0: updated\n");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn the_modes_say_when_nobody_answers() {
    let server = Server::serve().size(4096).start();
    let missing = server.dir().join("missing");
    let stale = server.dir().join("stale");
    leave_stale_socket(&stale);
    for sock in [&missing, &stale, &server.image] {
        let sock = sock.to_str().unwrap();
        for args in [&["status", "-s", sock][..], &["acl", "-s", sock, "::1"]] {
            let output = run(args, &[]);
            assert_eq!(
                (output.code, output.stdout.len(), output.stderr.lines().count()),
                (Some(1), 0, 1),
                "{output:?}"
            );
            assert!(output.stderr.contains(sock), "{output:?}");
        }
    }
}

/// What a control socket answers goes to a terminal, and whoever listens there may not drive it.
#[test]
fn answers_cannot_drive_a_terminal() {
    const DRIVES: &str = "\u{1b}]0;title\u{7}\u{1b}[2J\u{9b}31m\r\u{8}";
    const SHOWN: &str = r"\u001b]0;title\u0007\u001b[2J\u009b31m\r\u0008";
    let dir = TempDir::new();
    let path = dir.join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let script = std::thread::spawn(move || {
        let mut waiting = None;
        loop {
            let mut stream = listener.accept().unwrap().0;
            let mut command = Vec::new();
            while !command.ends_with(b"\n\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                command.extend(byte);
            }
            let answer = match command.strip_suffix(b"\n\n").unwrap() {
                b"wait" => {
                    waiting = Some(stream);
                    continue;
                }
                b"status" if waiting.is_some() => {
                    format!("0: is_mirroring=true migration_phase=x{DRIVES}x migration_attempts=1\n")
                }
                b"status" => format!("0: pid=1 address={DRIVES}.\n"),
                b"status\njson" => format!("0: {{\"address\":\"{DRIVES}.\"}}\n"),
                b"break" => format!("1: not {DRIVES} mirroring\n"),
                b"mirror_max_bps\n7" => return,
                command if command.starts_with(b"mirror\n") => "0: Mirror started\n".into(),
                command => panic!("{}", String::from_utf8_lossy(command)),
            };
            stream.write_all(answer.as_bytes()).unwrap();
            // Once the progress has been shown, the migration ends.
            if let (b"status\n\n", Some(mut waiting)) = (&command[..], waiting.take_if(|_| answer.contains("_phase=")))
            {
                waiting.write_all(format!("1: it {DRIVES} broke\n").as_bytes()).unwrap();
            }
        }
    });
    let control = |mode: &str, options: &str| {
        let args: Vec<_> = [mode, "--sock", path.to_str().unwrap()].into_iter().chain(options.split(' ')).collect();
        let args: Vec<_> = args.into_iter().filter(|arg| !arg.is_empty()).collect();
        let output = run(&args, &[]);
        (output.code, String::from_utf8(output.stdout).unwrap(), output.stderr)
    };
    assert_eq!(control("status", ""), (Some(0), format!("pid=1 address={SHOWN}.\n"), String::new()));
    let json = format!("{{\"address\":\"{SHOWN}.\"}}\n");
    assert_eq!(control("status", "--json"), (Some(0), json, String::new()));
    assert_eq!(control("break", ""), (Some(1), String::new(), format!("not {SHOWN} mirroring\n")));
    assert_eq!(
        control("mirror", "--addr 127.0.0.1 --port 1 --wait"),
        (Some(1), "Migration started\n".into(), format!("x{SHOWN}x\nit {SHOWN} broke\n"))
    );
    // No answer at all is an error, which ends the script, too.
    let (code, out, err) = control("mirror-speed", "--max-speed 7");
    assert_eq!((code, out.as_str(), err.lines().count()), (Some(1), "", 1), "{err}");
    script.join().unwrap();
}
