//! The command line of the proxy, old ones included, and how it starts, ends, takes its clients and says what it does.

use super::{before, PAIRS};
use crate::support::fading::{Fading, Style, Welcome};
use crate::support::newstyle::{address, PORT};
use crate::support::peers::{nowhere, wait_for_status};
use crate::support::{kind, leave_stale_socket, request, run, run_command, wait_for, Server, TempDir, BIN, SOON};
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::symlink;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const SIZE: usize = 1 << 20;
const A_MOMENT: Duration = Duration::from_millis(100);

/// What a proxy is started with that is not to start.
fn words(upstream: SocketAddr, listen: SocketAddr, more: &str) -> Vec<String> {
    let (to, from) = (upstream.port(), listen.port());
    let line = format!("proxy -l 127.0.0.1 -p {from} -C 127.0.0.1 -P {to} {more}");
    line.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn all_letters_and_what_old_command_lines_say() {
    let server = Fading::start(Style::Oldstyle, SIZE, 1);
    let port = server.address.port();
    // The harness names the rest in full.
    for line in [
        "-b 127.0.0.1",
        "--cache",
        "-c",
        "-c=65536",
        "--cache=0",
        "--quiet",
        "-q",
        "--verbose",
        "-v",
        "-d 127.0.0.0/8",
        "-k=100",
    ] {
        let proxy = Server::proxy_to_nowhere().args(&format!("-C 127.0.0.1 -P {port} {line}")).start();
        let mut client = proxy.connect();
        assert_eq!(client.write(0, &[7; 512]), 0, "{line}");
        client.send(&request(kind::DISC, 0, 0, 0, 0));
        client.expect_closed();
        assert!(!proxy.log().contains(":W:"), "{line}: {}", proxy.log());
        proxy.expect_healthy();
    }
}

#[test]
fn a_unix_socket_at_either_end() {
    let builder = Server::serve().size(SIZE as u64);
    let path = builder.dir().join("nbd");
    let server = builder.addr(path.to_str().unwrap()).start();
    let builder = Server::proxy_to_nowhere().arg("--conn-addr").arg(&path);
    let own = builder.dir().join("own");
    leave_stale_socket(&own);
    let mut proxy = builder.addr(own.to_str().unwrap()).start();
    assert_eq!(proxy.connect().write(0, &[7; 512]), 0);
    assert_eq!(proxy.status().get("upstream"), path.to_str().unwrap());
    assert_eq!(proxy.stop().code(), Some(0));
    assert!(!own.exists() && !proxy.sock.exists(), "sockets are removed");
    server.expect_healthy();
}

#[test]
fn wrong_usage_starts_nothing() {
    let here = nowhere();
    let base = format!("proxy -l 127.0.0.1 -p {} -C 127.0.0.1 -P {}", here.port(), here.port());
    for (line, named) in [
        ("proxy".to_owned(), "--addr"),
        ("proxy -l 127.0.0.1 -p 1".to_owned(), "--conn-addr"),
        ("proxy -l 127.0.0.1 -p 1 -C 127.0.0.1".to_owned(), "--conn-port"),
        ("proxy -l 127.0.0.1 -C 127.0.0.1 -P 1".to_owned(), "--port"),
        ("proxy -l 127.0.0.1 -p 1 -C 10.0.0 -P 1".to_owned(), "--conn-addr"),
        ("proxy -l 127.0.0.1 -p 1 -C 127.0.0.1 -P 0".to_owned(), "--conn-port"),
        ("proxy -l 127.0.0.1 -p 1 -C 127.0.0.1 -P 65536".to_owned(), "--conn-port"),
        (format!("{base} --replay nonsense"), "--replay"),
        (format!("{base} --replay-limit 1"), "--replay-limit"),
        (format!("{base} --max-clients 0"), "--max-clients"),
        (format!("{base} --give-up -1"), "--give-up"),
        (format!("{base} --start-timeout x"), "--start-timeout"),
        (format!("{base} --cache=x"), "--cache"),
        (format!("{base} --cache=1073741825"), "--cache"),
        (format!("{base} --bind ::1"), "--bind"),
        (format!("{base} --file x"), "--file"),
        (format!("{base} nonsense"), "nonsense"),
        ("switch".to_owned(), "--sock"),
        ("switch --sock a".to_owned(), "--conn-addr"),
        ("switch --sock a -C 127.0.0.1".to_owned(), "--conn-port"),
    ] {
        let output = run(&line.split(' ').collect::<Vec<_>>(), &[]);
        assert_eq!((output.code, output.stdout.len()), (Some(2), 0), "{line}: {output:?}");
        assert!(output.stderr.contains(named), "{line}: {}", output.stderr);
    }
    for value in ["0", "-1", "1.5", "x", ""] {
        let mut command = Command::new(BIN);
        command.args(base.split(' ')).env("FLEXNBD_UPSTREAM_TIMEOUT", value);
        let output = run_command(&mut command, &[]);
        assert_eq!(output.code, Some(2), "{value}: {output:?}");
        assert!(output.stderr.contains("FLEXNBD_UPSTREAM_TIMEOUT"), "{}", output.stderr);
    }
}

#[test]
fn a_start_without_a_server_fails_with_one_line_and_opens_nothing() {
    let silent = Fading::start(Style::Oldstyle, SIZE, 1);
    let (closed, garbage) = (Fading::start(Style::Oldstyle, SIZE, 1), Fading::start(Style::Oldstyle, SIZE, 1));
    let (no_export, not_yet) = (Fading::start(Style::Newstyle, SIZE, 1), Fading::start(Style::Newstyle, SIZE, 1));
    silent.behave(|habits| habits.is_mute = true);
    closed.behave(|habits| habits.welcome = Welcome::Closed);
    garbage.behave(|habits| habits.welcome = Welcome::Garbage);
    no_export.behave(|habits| habits.welcome = Welcome::NoExport);
    not_yet.behave(|habits| habits.welcome = Welcome::NotYet);
    let dir = TempDir::new();
    let sock = dir.join("control");
    for (to, more) in [
        (nowhere(), ""),
        (silent.address, ""),
        (closed.address, ""),
        (garbage.address, ""),
        (no_export.address, ""),
        (not_yet.address, ""),
        (nowhere(), "--start-timeout 1"),
        (garbage.address, "--start-timeout 1"),
    ] {
        let listen = nowhere();
        let start = Instant::now();
        let output = run(&words(to, listen, &format!("{more} --sock {}", sock.display())), &[]);
        assert_eq!(output.code, Some(1), "{output:?}");
        assert_eq!(output.stderr.lines().count(), 1, "{}", output.stderr);
        assert!(output.stderr.contains(":F:") && output.stderr.contains(&to.to_string()), "{}", output.stderr);
        assert!(TcpStream::connect(listen).is_err() && !sock.exists());
        assert!(more.is_empty() || start.elapsed() >= Duration::from_millis(900));
    }
    silent.behave(|habits| habits.is_mute = false);
}

#[test]
fn with_a_start_timeout_the_server_may_come_later() {
    let mut server = Fading::start(Style::Newstyle, SIZE, 1);
    server.down();
    let to = server.address;
    thread::scope(|scope| {
        let proxy = scope.spawn(move || Server::proxy(to).args("--start-timeout 60").start());
        server.up();
        let proxy = proxy.join().unwrap();
        assert_eq!(proxy.connect().write(0, &[7; 512]), 0);
        proxy.expect_healthy();
    });
}

/// As the old program: its own name is the mode.
#[test]
fn a_program_called_flexnbd_proxy_is_the_proxy() {
    let server = Fading::start(Style::Oldstyle, SIZE, 1);
    let dir = TempDir::new();
    let link = dir.join("flexnbd-proxy");
    symlink(BIN, &link).unwrap();
    // The harness gives the mode, which this program does not take.
    let script = r#"link=$0; shift 2; exec "$link" "$@""#;
    let builder = Server::proxy(server.address).through(&["sh", "-c", script, link.to_str().unwrap()]);
    let proxy = builder.args("--cache --quiet").start();
    assert_eq!(proxy.connect().write(0, &[7; 512]), 0);
    proxy.expect_healthy();
    let output = run_command(Command::new(&link).arg("--help"), &[]);
    assert_eq!(output.code, Some(0));
    assert!(String::from_utf8(output.stdout).unwrap().contains("--conn-addr"));
    assert_eq!(run_command(&mut Command::new(&link), &[]).code, Some(2));
}

#[test]
fn a_second_client_waits_without_a_greeting() {
    let server = Fading::start(Style::Oldstyle, SIZE, 1);
    let proxy = before(&server).start();
    let mut first = proxy.connect();
    let mut second = proxy.connect_bare();
    second.expect_silence(A_MOMENT);
    first.expect_alive();
    assert_eq!(proxy.status().get("num_clients"), "1");
    first.send(&request(kind::DISC, 0, 0, 0, 0));
    first.expect_closed();
    second.read_greeting();
    second.expect_alive();
    // One that hangs up while it waits is in nobody's way.
    drop(proxy.connect_bare());
    let mut fourth = proxy.connect_bare();
    drop(second);
    fourth.read_greeting();
    fourth.expect_alive();
    drop(fourth);
    proxy.expect_healthy();
}

#[test]
fn more_clients_where_they_are_allowed() {
    let server = Fading::start(Style::Newstyle, SIZE, 1);
    let proxy = before(&server).args("--max-clients 3").start();
    let mut clients: Vec<_> = (0..3).map(|_| proxy.connect()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.write(n as u64 * 4096, &[n as u8 + 1; 4096]), 0);
    }
    server.crash();
    for (n, client) in clients.iter_mut().enumerate() {
        let other = (n + 1) % 3;
        assert_eq!(client.read(other as u64 * 4096, 4096).unwrap(), [other as u8 + 1; 4096]);
    }
    proxy.connect_bare().expect_silence(A_MOMENT);
    drop(clients);
    proxy.expect_healthy();
}

#[test]
fn every_signal_ends_it_well_also_while_the_server_is_away() {
    for is_away in [false, true] {
        for signal in ["TERM", "INT", "QUIT"] {
            let mut server = Fading::start(Style::Newstyle, SIZE, 1);
            let builder = before(&server);
            let path = builder.dir().join("newstyle");
            let mut proxy = builder.arg("--newstyle-sock").arg(&path).start();
            let mut client = proxy.connect();
            assert_eq!(client.write(0, &[7; 512]), 0);
            if is_away {
                server.down();
                client.send(&request(kind::READ, 0, 5, 0, 512));
                wait_for_status(&proxy, "upstream_state", "connecting");
            }
            assert_eq!(proxy.stop_by(signal).code(), Some(0), "{signal}: {}", proxy.log());
            assert!(!path.exists() && !proxy.sock.exists(), "{signal}");
            client.expect_closed();
        }
    }
}

/// A signal is heard also before there is a server.
#[test]
fn a_signal_ends_the_wait_for_the_server() {
    let to = nowhere();
    let listen = nowhere();
    let mut command = Command::new(BIN);
    let mut proxy = crate::support::Process::spawn(command.args(words(to, listen, "--start-timeout 60 --quiet")));
    // It has taken the signals over when it has looked for the server.
    wait_for("the mask of its signals", SOON, || {
        let status = fs::read_to_string(format!("/proc/{}/status", proxy.0.id())).ok()?;
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:"))?.trim().to_owned();
        (u64::from_str_radix(&mask, 16).ok()? != 0).then_some(())
    });
    proxy.signal("TERM");
    assert_eq!(proxy.wait(SOON).code(), Some(0));
}

#[test]
fn the_status_has_every_key() {
    const KEYS: &str =
        "pid size num_clients upstream upstream_style upstream_state upstream_since reconnects outage_ms \
                        last_outage_ms replay_bytes replay_limit in_flight own_flushes replayed_bytes \
                        reads_ahead";
    for (_, style) in PAIRS.into_iter().take(2) {
        let server = Fading::start(style, SIZE, 1);
        let proxy = before(&server).args("--replay-limit 8388608").start();
        let mut client = proxy.connect();
        assert_eq!(client.write(0, &[7; 512]), 0);
        let status = proxy.status();
        let json = proxy.control("status json\n\n");
        for key in KEYS.split_whitespace() {
            assert!(!status.get(key).is_empty());
            assert!(json.contains(&format!("\"{key}\":")), "{key}: {json}");
        }
        assert!(json.contains("\"last_error\":"), "{json}");
        let style_name = if style == Style::Oldstyle { "oldstyle" } else { "newstyle" };
        for (key, value) in [
            ("size", SIZE.to_string()),
            ("num_clients", "1".into()),
            ("upstream", server.address.to_string()),
            ("upstream_style", style_name.into()),
            ("upstream_state", "connected".into()),
            ("replay_limit", "8388608".into()),
            ("in_flight", "0".into()),
        ] {
            assert_eq!(status.get(key), value, "{}", status.line());
        }
        assert!(status.number("replay_bytes") >= 512 && status.number("upstream_since") > 1_700_000_000);
        let clients = proxy.control("status clients\n\n");
        assert!(clients.lines().count() > 1 || clients.contains("client"), "{clients}");
        drop(client);
        proxy.expect_healthy();
    }
}

#[test]
fn whom_the_list_does_not_allow_is_refused_and_does_not_wait() {
    let server = Fading::start(Style::Oldstyle, SIZE, 1);
    let proxy = Server::proxy(server.address).args("--default-deny 10.0.0.1").arg(PORT).start();
    proxy.connect_bare().expect_closed();
    let mut other = crate::support::Client::new(TcpStream::connect(address(&proxy)).unwrap());
    other.expect_closed();
    let answer = proxy.control("acl\n127.0.0.1\n\n");
    assert!(answer.starts_with("0: "), "{answer}");
    proxy.connect().expect_alive();
    proxy.expect_healthy();
}
