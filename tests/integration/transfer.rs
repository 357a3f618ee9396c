//! The modes `read` and `write`: one query each, all of it or one line and exit code 1.

use crate::support::{
    greeting, kind, pattern, reply, reserved_port, run, run_command, Client, Output, Scripted, Server, BIN,
};
use std::fs::{self, File};
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Arguments of a transfer with a server on 127.0.0.1.
fn args(mode: &str, port: u16, offset: u64, size: u64) -> Vec<String> {
    let (port, offset, size) = (port.to_string(), offset.to_string(), size.to_string());
    [mode, "--addr", "127.0.0.1", "--port", &port, "--from", &offset, "--size", &size].map(str::to_owned).into()
}

#[track_caller]
fn expect_one_line(output: &Output, words: &str) {
    assert_eq!((output.code, output.stderr.lines().count()), (Some(1), 1), "{output:?}");
    assert!(output.stderr.contains(":F:") && output.stderr.contains(words), "{output:?}");
}

#[test]
fn what_one_writes_the_other_reads() {
    let content = pattern(1, 1 << 20);
    let server = Server::serve().content(&content).start();
    let mut expected = content;
    for (offset, size) in [(0, 7), (1, 511), (4095, 300_002), (1 << 19, 1 << 19), (0, 1 << 20), (9, 0), (1 << 20, 0)] {
        let payload = pattern(offset + size, size as usize);
        let output = run(&args("write", server.port(), offset, size), &payload);
        assert_eq!((output.code, output.stdout.len(), output.stderr.as_str()), (Some(0), 0, ""));
        expected[offset as usize..][..size as usize].copy_from_slice(&payload);
        assert!(fs::read(&server.image).unwrap() == expected);
        let output = run(&args("read", server.port(), offset, size), &[]);
        assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""));
        assert!(output.stdout == payload);
    }
    let status = server.status();
    assert_eq!((status.number("reads"), status.number("writes")), (7, 7), "a single query each");
}

#[test]
fn every_way_to_a_server() {
    let mut server = Server::serve().size(4096).addr("::1").start();
    let port = server.port().to_string();
    for addr in ["::1", "[::1]"] {
        let output = run(&["read", "-l", addr, "-p", &port, "-F0", "-S", "16", "-b", "::1"], &[]);
        assert_eq!((output.code, output.stdout.len()), (Some(0), 16), "{output:?}");
    }
    assert_eq!(server.stop().code(), Some(0));
    let nbd = server.dir().join("nbd");
    let nbd = nbd.to_str().unwrap();
    let server = Server::serve().size(4096).addr(nbd).start();
    assert_eq!(run(&["write", "-l", nbd, "-F", "5", "-S", "5"], b"hello").code, Some(0));
    assert_eq!(run(&["read", "-l", nbd, "-F", "4", "-S", "7"], &[]).stdout, b"\0hello\0");
    server.expect_healthy();
}

#[test]
fn beyond_the_end() {
    let content = pattern(2, 4096);
    let server = Server::serve().content(&content).start();
    for (offset, size) in [(4096, 1), (4095, 2), (0, 4097), (1 << 62, 1), (1 << 62, 1 << 30), (0, 1 << 30)] {
        for mode in ["read", "write"] {
            let output = run(&args(mode, server.port(), offset, size), &[9; 4097]);
            expect_one_line(&output, "");
            assert!(output.stdout.is_empty());
        }
    }
    assert_eq!(fs::read(&server.image).unwrap(), content);
}

#[test]
fn nobody_there() {
    let port = reserved_port();
    for mode in ["read", "write"] {
        expect_one_line(&run(&args(mode, port, 0, 1), b"x"), &format!("127.0.0.1:{port}"));
    }
    let output = run(&["read", "-l", "127.0.0.1", "-p", "1", "-F", "0", "-S", "1", "-b", "192.0.2.1"], &[]);
    expect_one_line(&output, "192.0.2.1");
}

/// Whoever the server is and whatever it does: one line, exit code 1, no hang.
#[test]
fn servers_that_misbehave() {
    type Script = fn(Client);
    let scripts: [(&str, Script); 9] = [
        ("closes", |_| {}),
        ("half a greeting", |mut c| c.send(&greeting(4096, 13)[..100])),
        ("no NBD", |mut c| {
            c.send(&[b'x'; 200]);
            c.read_to_close();
        }),
        ("newstyle", |mut c| {
            c.send(b"NBDMAGICIHAVEOPT\0\x03");
            c.read_to_close();
        }),
        ("closes after the greeting", |mut c| c.send(&greeting(4096, 13))),
        ("half a reply", |mut c| {
            c.send(&greeting(4096, 13));
            c.read_bytes(28);
            c.send(&[0x67, 0x44, 0x66]);
        }),
        ("half the data", |mut c| {
            c.send(&greeting(4096, 13));
            let cookie = u64::from_be_bytes(c.read_bytes(28)[8..16].try_into().unwrap());
            c.send(&[reply(0, cookie), vec![1; 100]].concat());
        }),
        ("another cookie", |mut c| {
            c.send(&greeting(4096, 13));
            let cookie = u64::from_be_bytes(c.read_bytes(28)[8..16].try_into().unwrap());
            c.send(&[reply(0, cookie ^ 1), vec![1; 512]].concat());
            c.read_to_close();
        }),
        ("an error", |mut c| {
            c.send(&greeting(4096, 13));
            let cookie = u64::from_be_bytes(c.read_bytes(28)[8..16].try_into().unwrap());
            c.send(&reply(5, cookie));
            c.read_to_close();
        }),
    ];
    for (what, script) in scripts {
        let peer = Scripted::start(move |_, client| script(client));
        let output = run(&args("read", peer.address.port(), 0, 512), &[]);
        assert_eq!((output.code, output.stderr.lines().count()), (Some(1), 1), "{what}: {output:?}");
        assert!(output.stdout.len() < 512, "{what}");
        if what == "half the data" {
            continue; // A reply without data is all that a write waits for.
        }
        let output = run(&args("write", peer.address.port(), 0, 512), &[7; 512]);
        assert_eq!((output.code, output.stderr.lines().count()), (Some(1), 1), "{what}: {output:?}");
    }
}

#[test]
fn a_server_that_says_nothing_is_given_up_after_five_seconds() {
    let peer = Scripted::start(|_, mut client| drop(client.read_to_close()));
    let start = Instant::now();
    expect_one_line(&run(&args("read", peer.address.port(), 0, 1), &[]), &peer.address.to_string());
    let took = start.elapsed();
    assert!((4..15).contains(&took.as_secs()), "{took:?}");
}

#[test]
fn a_server_that_goes_in_the_middle_of_a_write() {
    let peer = Scripted::start(|_, mut client| {
        client.send(&greeting(1 << 30, 13));
        client.read_bytes(28 + 100_000);
    });
    let output = run(&args("write", peer.address.port(), 0, 64 << 20), &vec![1; 64 << 20]);
    expect_one_line(&output, &peer.address.to_string());
}

#[test]
fn too_little_input_writes_nothing() {
    let content = pattern(3, 1 << 20);
    let server = Server::serve().content(&content).start();
    let port = server.port();
    for (given, size) in [(0, 1), (511, 512), (500_000, 1 << 20)] {
        // From a pipe.
        expect_one_line(&run(&args("write", port, 0, size), &vec![0xaa; given]), &format!("{given} of {size}"));
        // From a file, from its beginning and from further on.
        let path = server.dir().join("input");
        fs::write(&path, vec![0xaa; given]).unwrap();
        let from_file = |skip: &str| {
            let mut command = Command::new("sh");
            let script = format!("exec 3<\"$0\"; head -c {skip} <&3 >/dev/null; exec \"$@\" <&3");
            command.args(["-c", &script]).arg(&path).arg(BIN).args(args("write", port, 0, size));
            run_command(&mut command, &[])
        };
        expect_one_line(&from_file("0"), "");
        if given > 0 {
            expect_one_line(&from_file("5"), "");
        }
    }
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" <&-", "sh", BIN]).args(args("write", port, 0, 512));
    expect_one_line(&run_command(&mut command, &[]), "");
    assert!(fs::read(&server.image).unwrap() == content, "nothing was written");
    assert_eq!(server.status().number("writes"), 0);
}

#[test]
fn input_beyond_the_size_is_left_alone() {
    let server = Server::serve().size(4096).start();
    let path = server.dir().join("input");
    fs::write(&path, b"0123456789").unwrap();
    let mut command = Command::new("sh");
    let write = args("write", server.port(), 0, 4).join(" ");
    let script = format!("exec 3<\"$0\"; {BIN} {write} <&3 && cat <&3");
    command.args(["-c", &script]).arg(&path);
    let output = run_command(&mut command, &[]);
    assert_eq!((output.code, output.stdout), (Some(0), b"456789".to_vec()), "{}", output.stderr);
    assert_eq!(server.connect().read(0, 5).unwrap(), b"0123\0");
    // A pipe that goes on for ever.
    let mut command = Command::new("sh");
    command.args(["-c", &format!("yes | {BIN} {write}")]);
    assert_eq!(run_command(&mut command, &[]).code, Some(0));
    assert_eq!(server.connect().read(0, 5).unwrap(), b"y\ny\n\0");
}

#[test]
fn a_slow_pipe_is_waited_for() {
    let server = Server::serve().size(4096).start();
    let mut command = Command::new(BIN);
    command.args(args("write", server.port(), 0, 6)).stdin(Stdio::piped());
    let mut process = crate::support::Process::spawn(&mut command);
    let mut stdin = process.0.stdin.take().unwrap();
    stdin.write_all(b"abc").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(process.is_running());
    stdin.write_all(b"def").unwrap();
    drop(stdin);
    assert_eq!(process.wait(crate::support::SOON).code(), Some(0));
    assert_eq!(server.connect().read(0, 6).unwrap(), b"abcdef");
}

#[test]
fn stdout_that_takes_no_more() {
    let server = Server::serve().size(8 << 20).start();
    let read = args("read", server.port(), 0, 8 << 20).join(" ");
    for redirect in [">&-", ">/dev/full"] {
        let mut command = Command::new("sh");
        command.args(["-c", &format!("exec {BIN} {read} {redirect}")]);
        let output = run_command(&mut command, &[]);
        if redirect == ">&-" {
            // A descriptor that was closed before the start is /dev/null to every Rust program.
            assert!(matches!(output.code, Some(0 | 1)) && output.stderr.lines().count() <= 1, "{output:?}");
        } else {
            expect_one_line(&output, "stdout");
        }
    }
    let mut command = Command::new("bash");
    command.args(["-c", &format!("{BIN} {read} | head -c 1 >/dev/null; exit ${{PIPESTATUS[0]}}")]);
    expect_one_line(&run_command(&mut command, &[]), "stdout");
    // The answers of the control modes, too.
    let sock = server.sock.to_str().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", &format!("exec {BIN} status -s {sock} >/dev/full")]);
    expect_one_line(&run_command(&mut command, &[]), "");
    server.expect_healthy();
}

#[test]
fn a_write_is_durable_when_it_returns() {
    let (sender, receiver) = std::sync::mpsc::channel();
    let peer = Scripted::start(move |number, mut client| {
        client.send(&greeting(4096, if number == 0 { 1 | 4 | 8 } else { 1 }));
        let head = client.read_bytes(28);
        client.read_bytes(512);
        client.send(&reply(0, u64::from_be_bytes(head[8..16].try_into().unwrap())));
        let disc = client.read_bytes(28);
        sender.send((head[4..8].to_vec(), disc[6..8].to_vec())).unwrap();
    });
    for fua in [1, 0] {
        assert_eq!(run(&args("write", peer.address.port(), 0, 512), &[1; 512]).code, Some(0));
        let (command, disc) = receiver.recv_timeout(crate::support::SOON).unwrap();
        assert_eq!(command, [0, fua, 0, 1], "FUA where it is offered");
        assert_eq!(disc, kind::DISC.to_be_bytes(), "and DISC at the end");
    }
}

#[test]
fn a_gibibyte_in_one_query() {
    let server = Server::serve().size(1 << 30).start();
    let sink = server.dir().join("copy");
    let port = server.port();
    let read = args("read", port, 0, 1 << 30);
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" | cksum", "sh", BIN]).args(&read);
    let output = run_command(&mut command, &[]);
    assert_eq!(output.code, Some(0));
    assert!(String::from_utf8(output.stdout).unwrap().ends_with(" 1073741824\n"));
    File::create(&sink).unwrap().set_len(1 << 30).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" <\"$0\""]).arg(&sink).arg(BIN).args(args("write", port, 0, 1 << 30));
    let output = run_command(&mut command, &[]);
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""));
    assert_eq!(server.status().number("written_bytes"), 1 << 30);
}
