//! Who may connect: the entries given at start, and those of `flexnbd acl`.

use crate::support::{kind, run, wait_for, Client, Output, Server, SOON};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::Instant;

#[track_caller]
fn set_acl(server: &Server, entries: &str) -> Output {
    let mut args = vec!["acl", "--sock", server.sock.to_str().unwrap()];
    args.extend(entries.split_whitespace());
    run(&args, &[])
}

/// Fails unless the server closes a new connection without a greeting, at once.
#[track_caller]
fn expect_refused(server: &Server) {
    server.connect_bare().expect_closed();
}

/// Connects from 127.0.0.x.
fn connect_from(server: &Server, last: u8) -> Client {
    // The standard library cannot choose the local address; another way to come from elsewhere is to ask for elsewhere.
    let address = SocketAddr::new(IpAddr::from([127, 0, 0, last]), server.port());
    Client::new(TcpStream::connect(address).unwrap())
}

#[test]
fn entries_given_at_start() {
    for (addr, entries, allowed) in [
        ("127.0.0.1", "", true),
        ("127.0.0.1", "--default-deny", false),
        ("127.0.0.1", "-d 127.0.0.1", true),
        ("127.0.0.1", "127.0.0.1", true),
        ("127.0.0.1", "127.0.0.2", false),
        ("127.0.0.1", "127.0.0.0/8", true),
        ("127.0.0.1", "127.0.0.1/32", true),
        ("127.0.0.1", "10.0.0.0/8 192.168.0.0/16", false),
        ("127.0.0.1", "10.0.0.0/8 127.0.0.0/31", true),
        ("127.0.0.1", "0.0.0.0/1", true),
        ("127.0.0.1", "128.0.0.0/1", false),
        ("127.0.0.1", "::1", false),
        ("::1", "::1", true),
        ("::1", "::/1", true),
        ("::1", "127.0.0.1", false),
        ("::1", "2001:db8::/32", false),
        ("::1", "::1/128", true),
        ("::1", "8000::/1", false),
    ] {
        let server = Server::serve().size(4096).addr(addr).args(entries).start();
        if allowed {
            server.connect().expect_alive();
        } else {
            expect_refused(&server);
            let line = server.wait_for_log("refused");
            assert!(line.contains(":W:"), "{line}");
        }
    }
}

#[test]
fn ipv4_clients_of_an_ipv6_socket_match_ipv4_entries() {
    for (entries, v4, v6) in [
        ("127.0.0.1", true, false),
        ("127.0.0.0/8", true, false),
        ("::1", false, true),
        ("::ffff:127.0.0.1", true, false),
        ("127.0.0.1 ::1", true, true),
        ("10.0.0.1", false, false),
    ] {
        let server = Server::serve().size(4096).addr("::").args(entries).start();
        for (ip, allowed) in [("127.0.0.1", v4), ("::1", v6)] {
            let address = SocketAddr::new(ip.parse().unwrap(), server.port());
            let mut client = Client::new(TcpStream::connect(address).unwrap());
            if allowed {
                client.read_greeting();
                client.expect_alive();
            } else {
                client.expect_closed();
            }
        }
    }
}

#[test]
fn a_new_list_counts_for_who_comes_and_who_is_there() {
    let server = Server::serve().size(1 << 20).addr("0").start();
    let mut one = connect_from(&server, 1);
    one.read_greeting();
    one.expect_alive();
    // A client that is refused in the middle of a request goes as well.
    let mut half = connect_from(&server, 1);
    half.read_greeting();
    half.send_request(kind::WRITE, 0, 1, 0, 4096, &[1; 100]);

    let output = set_acl(&server, "127.0.0.1 10.0.0.0/8");
    assert_eq!((output.code, &output.stdout[..], output.stderr.as_str()), (Some(0), &b"updated\n"[..], ""));
    one.expect_alive();
    half.expect_silence(std::time::Duration::from_millis(50));

    let output = set_acl(&server, "10.0.0.0/8 ::1");
    assert_eq!(output.code, Some(0));
    one.expect_closed();
    half.expect_closed();
    expect_refused(&server);
    assert_eq!(server.status().number("num_clients"), 0);

    assert_eq!(set_acl(&server, "127.0.0.0/8").code, Some(0));
    server.connect().expect_alive();
    server.expect_healthy();
}

#[test]
fn a_bad_entry_changes_nothing() {
    let server = Server::serve().size(4096).arg("127.0.0.1").start();
    let mut client = server.connect();
    for entry in [
        "nonsense",
        "10.0.0.0/33",
        "::/129",
        "10.0.0",
        "1.2.3.4/",
        "1.2.3.4/-1",
        "/8",
        "localhost",
        "10.0.0.1 10.0.0.2",
    ] {
        let answer = server.control(format!("acl\n10.0.0.1\n{entry}\n\n"));
        assert_eq!(answer, format!("1: bad spec: {entry}\n"));
        client.expect_alive();
        server.connect().expect_alive();
    }
    // The mode finds it before it asks the server.
    let output = set_acl(&server, "10.0.0.1 nonsense");
    assert!(matches!(output.code, Some(1 | 2)) && output.stderr.contains("nonsense"), "{output:?}");
    client.expect_alive();
    server.expect_healthy();
}

#[test]
fn an_empty_list_means_what_default_deny_says() {
    for (option, allowed) in [("", true), ("--default-deny", false)] {
        let server = Server::serve().size(4096).args(option).arg("127.0.0.1").start();
        server.connect().expect_alive();
        assert_eq!(server.control("acl\n\n"), "0: updated\n");
        if allowed {
            server.connect().expect_alive();
        } else {
            expect_refused(&server);
            wait_for("nobody", SOON, || (server.status().number("num_clients") == 0).then_some(()));
        }
    }
}

#[test]
fn read_and_write_are_refused_in_one_line() {
    let server = Server::serve().content(&[7; 4096]).arg("127.0.0.2").start();
    let port = server.port().to_string();
    for mode in ["read", "write"] {
        let args = [mode, "-l", "127.0.0.1", "-p", &port, "-F", "0", "-S", "512"];
        let output = run(&args, &[1; 512]);
        assert_eq!((output.code, output.stdout.len(), output.stderr.lines().count()), (Some(1), 0, 1), "{output:?}");
        assert!(output.stderr.contains(":F:") && output.stderr.contains("access control list"), "{output:?}");
        // With the address that the list asks for.
        let output = run(&[&args[..], &["--bind", "127.0.0.2"]].concat(), &[7; 512]);
        assert_eq!(output.code, Some(0), "{output:?}");
    }
    assert_eq!(std::fs::read(&server.image).unwrap(), [7; 4096]);
}

#[test]
fn refused_connections_do_not_flood_the_log() {
    let server = Server::serve().size(4096).arg("10.0.0.1").start();
    let start = Instant::now();
    for _ in 0..200 {
        expect_refused(&server);
    }
    let lines = server.log().lines().filter(|line| line.contains("refused 127.0.0.1")).count() as u64;
    let intervals = start.elapsed().as_secs() / 10 + 1;
    assert!((1..=10 * intervals).contains(&lines), "{lines} lines: {}", server.log());
    assert!(Command::new("kill").args(["-0", &server.pid().to_string()]).status().unwrap().success());
}
