//! Names of hosts: what looks them up, and what does not.

use crate::support::{has, peers, program, reserved_port, run, run_command, Need, Server, TempDir, BIN, SOON};
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};

/// To be at `localhost` is to be at `127.0.0.1` and mostly at `::1`, too, which comes first; the servers here are at the former.
#[test]
fn clients_look_names_up() {
    let server = Server::serve().size(1 << 20).start();
    let port = server.port().to_string();
    let target = ["-l", "localhost", "-p", &port, "-F", "4k", "-S", "1K"];
    let written = run(&[&["write"][..], &target].concat(), &[7; 1024]);
    assert_eq!(written.code, Some(0), "{written:?}");
    let read = run(&[&["read", "-b", "127.0.0.1"][..], &target].concat(), &[]);
    assert!(read.code == Some(0) && read.stdout == [7; 1024], "{read:?}");
    let wrong = run(&[&["read", "-b", "fe80::1"][..], &target].concat(), &[]);
    assert!(wrong.code == Some(1) && wrong.stderr.contains("cannot"), "{wrong:?}");

    let proxy = Server::proxy_to_nowhere().args(&format!("--conn-addr localhost --conn-port {port}")).start();
    assert_eq!(proxy.status().get("upstream"), format!("127.0.0.1:{port}"));
    assert_eq!(proxy.connect().read(4096, 1), Ok(vec![7]));
    proxy.expect_healthy();

    let (mut source, mut listener) = (server, peers::listen(0).size(1 << 20).start());
    let port = listener.port().to_string();
    let words =
        ["mirror", "--addr", "localhost", "--port", &port, "--wait", "-q", "--sock", source.sock.to_str().unwrap()];
    let moved = run(&words, &[]);
    assert!(moved.code == Some(0) && moved.stdout.ends_with(b"Migration completed\n"), "{moved:?}");
    peers::expect_migrated(&mut source, &mut listener);
}

/// In a file system where a name has two addresses, and the server is at the one that comes last.
#[test]
fn of_several_addresses_the_next_is_tried() {
    let needs = [Need::Root, Need::Program("unshare"), Need::Program("mount"), Need::Program("getent")];
    if !has(&needs) || !has(&[Need::Kernel("unshare --mount true")]) {
        return;
    }
    let dir = TempDir::new();
    let hosts = dir.join("hosts").to_str().unwrap().to_owned();
    fs::write(&hosts, "127.0.0.2 disks.test\n127.0.0.1 disks.test\n").unwrap();
    let with_hosts = ["unshare", "--mount", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\"", &hosts];
    let output = |words: &[&str]| run_command(program(with_hosts[0]).args(&with_hosts[1..]).args(words), &[]);
    let listed = String::from_utf8(output(&["getent", "ahostsv4", "disks.test"]).stdout).unwrap();
    let last = listed.lines().next_back().unwrap().split_whitespace().next().unwrap();
    assert!(!listed.starts_with(last), "two of them: {listed}");

    let mut server = Server::serve().content(&[7; 4096]).addr(last).start();
    let port = server.port().to_string();
    let read = output(&[BIN, "read", "-l", "disks.test", "-p", &port, "-F", "0", "-S", "1"]);
    assert_eq!((read.code, read.stdout), (Some(0), vec![7]), "{}", read.stderr);
    // At the start, one attempt is one at each address.
    let conn = format!("--conn-addr disks.test --conn-port {port}");
    let proxy = Server::proxy_to_nowhere().args(&conn).through(&with_hosts).start();
    assert_eq!(proxy.status().get("upstream"), format!("{last}:{port}"));
    proxy.expect_healthy();
    let switched = output(&[BIN, "switch", "-s", "nothing", "-C", "disks.test", "-P", &port]);
    assert!(switched.code == Some(1) && switched.stderr.contains("name one of them"), "{switched:?}");

    let mut listener = peers::listen(0).size(4096).addr(last).start();
    let (port, sock) = (listener.port().to_string(), server.sock.to_str().unwrap().to_owned());
    let moved = output(&[BIN, "mirror", "-l", "disks.test", "-p", &port, "-s", &sock, "--wait", "-q"]);
    assert!(moved.code == Some(0) && moved.stdout.ends_with(b"Migration completed\n"), "{moved:?}");
    peers::expect_migrated(&mut server, &mut listener);
}

/// A proxy has looked the name up once, and comes back to the address where the server was.
#[test]
fn a_proxy_comes_back_to_an_address_of_the_name() {
    let port = reserved_port();
    let newstyle = format!("--newstyle-port {port}");
    let mut server = Server::serve().size(1 << 20).args(&newstyle).start();
    let proxy = Server::proxy_to_nowhere().args(&format!("--conn-addr localhost --conn-port {port}")).start();
    let mut client = proxy.connect();
    assert_eq!(client.write(0, &[7; 512]), 0);
    server.process.0.kill().unwrap();
    server.process.wait(SOON);
    let again = Server::serve().file(server.image.clone()).args(&newstyle).start();
    assert_eq!(client.read(0, 1), Ok(vec![7]));
    assert_eq!(proxy.status().get("upstream"), format!("127.0.0.1:{port}"));
    again.expect_healthy();
}

#[test]
fn a_name_that_is_not_known_is_an_error_of_the_start() {
    // A part of a name has 63 characters at most, so nobody has to be asked.
    let name = format!("{}.invalid", "x".repeat(64));
    let (dir, server) = (TempDir::new(), Server::serve().size(4096).start());
    let (sock, nbd) = (server.sock.to_str().unwrap().to_owned(), dir.join("nbd"));
    let nbd = nbd.to_str().unwrap();
    for words in [
        vec!["read", "-l", &name, "-p", "1", "-F", "0", "-S", "1"],
        vec!["mirror", "-l", &name, "-p", "1", "-s", &sock],
        vec!["proxy", "-l", nbd, "-C", &name, "-P", "1"],
        vec!["switch", "-s", &sock, "-C", &name, "-P", "1"],
    ] {
        let output = run(&words, &[]);
        assert_eq!((output.code, output.stdout.len(), output.stderr.lines().count()), (Some(1), 0, 1), "{output:?}");
        let why = format!("cannot look up {name}: ");
        assert!(output.stderr.contains(":F:") && output.stderr.contains(&why), "{output:?}");
    }
    server.expect_healthy();
}

#[test]
fn a_server_listens_on_localhost_and_on_all() {
    for (addr, ip) in [("localhost", Ipv4Addr::LOCALHOST), ("*", Ipv4Addr::UNSPECIFIED)] {
        let server = Server::serve().size(4096).addr(addr).start();
        assert_eq!(server.address().ip(), ip, "{addr}");
        server.expect_healthy();
    }
}

/// `--any` opens the server whatever an empty list means; a mask of 0 is everybody of a kind.
#[test]
fn a_server_can_be_opened_to_everybody_again() {
    let both = |server: &Server| (server.connect(), server.port());
    let server = Server::serve().size(4096).addr("::").args("--default-deny ::1/128 127.0.0.1").start();
    let (mut client, port) = both(&server);
    client.expect_alive();
    let is_open = |ip: std::net::IpAddr| {
        let addr = ip.to_string();
        let port = port.to_string();
        run(&["read", "-l", &addr, "-p", &port, "-F", "0", "-S", "1"], &[]).code == Some(0)
    };
    let (v4, v6) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
    for (options, open) in [
        ("10.0.0.1", (false, false)),
        ("0.0.0.0/0", (true, false)),
        ("[::]/0", (false, true)),
        ("[::1] 10.0.0.1", (false, true)),
        ("--any", (true, true)),
    ] {
        assert_eq!(peers::tell("acl", &server, options), (Some(0), "updated\n".into()), "{options}");
        assert_eq!((is_open(v4), is_open(v6)), open, "{options}");
    }
    server.expect_healthy();
}
