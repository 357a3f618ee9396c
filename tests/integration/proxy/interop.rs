//! Clients and servers that others wrote, and the other modes, with a proxy in between; either style to either style.

use super::{before, door, PAIRS};
use crate::interop::client;
use crate::support::fading::{Fading, Style};
use crate::support::newstyle::{address, PORT};
use crate::support::peers::{expect_exit, listen, start_mirror, tell, Worker};
use crate::support::{pattern, program, reserved_port, run, wait_for, Process, Server, SOON};
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const MIB: usize = 1 << 20;

/// The door for clients of this style, as they take it.
fn uri(proxy: &Server, style: Style) -> String {
    format!("nbd://{}", door(proxy, style))
}

/// Where `flexnbd serve` listens for a proxy that speaks this style.
fn of_server(server: &Server, style: Style) -> SocketAddr {
    match style {
        Style::Oldstyle => server.address(),
        Style::Newstyle => address(server),
    }
}

#[test]
fn qemu_io_nbdcopy_and_nbdinfo_find_what_they_find_without_it() {
    for (client_style, server_style) in PAIRS {
        let server = Server::serve().size(4 * MIB as u64).arg(PORT).start();
        let proxy = Server::proxy(of_server(&server, server_style)).arg(PORT).args("--max-clients 4").start();
        let uri = uri(&proxy, client_style);
        let mut shadow = vec![0; 4 * MIB];
        let mut args = vec!["-f".to_owned(), "raw".into(), uri.clone()];
        for (byte, offset, length) in [(1, 0, 1), (2, 511, 2), (3, 4095, 8195), (4, MIB - 3, 2 * MIB + 5)] {
            shadow[offset..offset + length].fill(byte);
            args.extend(["-c".into(), format!("write -f -P {byte} {offset} {length}")]);
            args.extend(["-c".into(), format!("read -P {byte} {offset} {length}")]);
        }
        for (command, offset, length) in [("write -z", MIB + 1, 70_000), ("discard", 2 * MIB, 65_536)] {
            shadow[offset..offset + length].fill(0);
            args.extend(["-c".into(), format!("{command} {offset} {length}")]);
            args.extend(["-c".into(), format!("read -P 0 {offset} {length}")]);
        }
        args.extend(["-c".into(), "flush".into()]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let said = client(proxy.dir(), "qemu-io", &args);
        assert!(!said.contains("failed"), "{said}");
        assert!(fs::read(&server.image).unwrap() == shadow, "{client_style:?}, {server_style:?}");
        let copy = proxy.dir().join("copy");
        client(proxy.dir(), "nbdcopy", &[&uri, copy.to_str().unwrap()]);
        assert!(fs::read(&copy).unwrap() == shadow, "{client_style:?}, {server_style:?}");
        let other = pattern(3, 4 * MIB);
        fs::write(&copy, &other).unwrap();
        client(proxy.dir(), "nbdcopy", &["--flush", copy.to_str().unwrap(), &uri]);
        assert!(fs::read(&server.image).unwrap() == other, "{client_style:?}, {server_style:?}");
        assert_eq!(client(proxy.dir(), "nbdinfo", &["--size", &uri]), "4194304\n");
        proxy.expect_healthy();
        server.expect_healthy();
    }
}

#[test]
fn fio_verifies_while_the_server_crashes() {
    for (client_style, server_style) in PAIRS {
        let server = Fading::start(server_style, 2 * MIB, 1);
        let proxy = before(&server).start();
        let uri = format!("--uri={}", uri(&proxy, client_style));
        let line = "--name=verify --ioengine=nbd --thread --size=2m --rw=randwrite --bsrange=512-32k --bs_unaligned=0 \
                    --iodepth=16 --fsync=64 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --do_verify=1";
        let mut args: Vec<&str> = line.split_whitespace().collect();
        args.push(&uri);
        let done = AtomicBool::new(false);
        let mut crashes = 0;
        thread::scope(|scope| {
            scope.spawn(|| {
                client(proxy.dir(), "fio", &args);
                done.store(true, Ordering::Relaxed);
            });
            while !done.load(Ordering::Relaxed) && crashes < 8 {
                let seen = server.executed().len();
                wait_for("fio", SOON * 2, || {
                    (done.load(Ordering::Relaxed) || server.executed().len() > seen + 20).then_some(())
                });
                server.crash();
                crashes += 1;
            }
        });
        assert!(crashes > 3, "{crashes}");
        proxy.expect_healthy();
    }
}

#[test]
fn nbdkit_is_a_server_too() {
    let port = reserved_port();
    // Where nbdkit speaks oldstyle, it offers FLUSH and then refuses it.
    for (style, flush) in [("--newstyle", &["--flush"][..]), ("--oldstyle", &[])] {
        let port_option = format!("--port={port}");
        let mut command = program("nbdkit");
        command.args(["-f", style, "-i", "127.0.0.1", &port_option, "memory", "size=4M"]);
        let mut nbdkit = Process::spawn(&mut command);
        let to = SocketAddr::from(([127, 0, 0, 1], port));
        wait_for("nbdkit", SOON, || TcpStream::connect(to).ok());
        let proxy = Server::proxy(to).arg(PORT).start();
        let image = pattern(5, 4 * MIB);
        let source = proxy.dir().join("source");
        fs::write(&source, &image).unwrap();
        for client_style in [Style::Oldstyle, Style::Newstyle] {
            let (uri, copy) = (uri(&proxy, client_style), proxy.dir().join("copy"));
            let there = [flush, &["--connections=1", source.to_str().unwrap(), &uri]].concat();
            client(proxy.dir(), "nbdcopy", &there);
            client(proxy.dir(), "nbdcopy", &["--connections=1", &uri, copy.to_str().unwrap()]);
            assert!(fs::read(&copy).unwrap() == image, "{style}, {client_style:?}");
        }
        assert_eq!(proxy.status().get("upstream_style"), &style[2..]);
        proxy.expect_healthy();
        nbdkit.signal("TERM");
        nbdkit.wait(SOON);
    }
}

/// Its names of exports, and that there is none of another name.
#[test]
fn an_export_by_its_name() {
    let port = reserved_port();
    let port_option = format!("--port={port}");
    let mut command = program("nbdkit");
    let serves = "case $2 in disk) echo 1048576;; *) exit 1;; esac";
    let size = format!("get_size={serves}");
    command.args(["-f", "-i", "127.0.0.1", &port_option, "eval", "open=[ \"$3\" = disk ] && echo disk"]);
    command.args([&size, "pread=head -c $3 /dev/zero", "flush=", "pwrite=cat > /dev/null"]);
    let mut nbdkit = Process::spawn(&mut command);
    let to = SocketAddr::from(([127, 0, 0, 1], port));
    wait_for("nbdkit", SOON, || TcpStream::connect(to).ok());
    let proxy = Server::proxy(to).args("--export disk").start();
    assert_eq!(proxy.status().get("size"), "1048576");
    proxy.expect_healthy();
    let line = format!("proxy -l 127.0.0.1 -p 0 -C 127.0.0.1 -P {port} --export other");
    let output = run(&line.split(' ').collect::<Vec<_>>(), &[]);
    assert_eq!((output.code, output.stderr.lines().count()), (Some(1), 1), "{output:?}");
    nbdkit.signal("TERM");
    nbdkit.wait(SOON);
}

#[test]
fn read_and_write_work_through_it() {
    for (client_style, server_style) in PAIRS {
        let server = Fading::start(server_style, MIB, 1);
        let proxy = before(&server).start();
        let port = door(&proxy, client_style).port().to_string();
        let target = ["-l", "127.0.0.1", "-p", &port, "-F", "4095", "-S", "70000"];
        let payload = pattern(1, 70_000);
        let output = run(&[&["write"][..], &target].concat(), &payload);
        assert_eq!((output.code, &*output.stderr), (Some(0), ""));
        server.crash();
        let output = run(&[&["read"][..], &target].concat(), &[]);
        assert_eq!((output.code, &*output.stderr), (Some(0), ""));
        assert!(output.stdout == payload, "{client_style:?}, {server_style:?}");
        proxy.expect_healthy();
    }
}

/// The destination of a migration is reached through a proxy.
#[test]
fn a_migration_into_a_server_behind_it() {
    for (client_style, server_style) in PAIRS {
        let server = Fading::start(server_style, 4 * MIB, 1);
        let proxy = before(&server).start();
        let image = pattern(7, 4 * MIB);
        let mut source = Server::serve().content(&image).start();
        start_mirror(&source, door(&proxy, client_style), "");
        server.crash();
        expect_exit(&mut source, 0);
        assert!(server.durable() == image, "{client_style:?}, {server_style:?}");
        proxy.expect_healthy();
    }
}

/// The address moves: the source ends, and another server takes its port.
#[test]
fn a_migration_behind_it_is_a_delay() {
    let mut source = Server::serve().size(MIB as u64).arg(PORT).start();
    let to = source.address();
    let proxy = Server::proxy(to).start();
    let worker = Worker::start(proxy.address(), 0..MIB as u64);
    worker.expect_progress();
    let mut destination = listen(0).size(MIB as u64).arg("--serve").start();
    start_mirror(&source, destination.address(), "");
    expect_exit(&mut source, 0);
    let next = destination.address();
    let (code, said) = tell("switch", &proxy, &format!("-C {} -P {} --wait", next.ip(), next.port()));
    assert_eq!((code, &*said), (Some(0), "switched\n"), "{}", proxy.log());
    worker.expect_progress();
    worker.stop();
    assert!(destination.process.is_running());
    proxy.expect_healthy();
}
