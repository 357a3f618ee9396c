//! What `serve` does before it serves: addresses, files, sockets, limits, and the errors of all of them.

use crate::support::{
    greeting, has, leave_stale_socket, must, peers, program, run, run_command, wait_for, Need, Process, Server,
    TempDir, BIN, SOON,
};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Asserts that a start fails: exit 1, one F line that names `what` and holds `why`, and no control socket.
#[track_caller]
fn refused(command: &mut Command, sock: &Path, what: &str, why: &str) {
    let output = run_command(command, &[]);
    assert_eq!((output.code, output.stdout.len()), (Some(1), 0), "{command:?}: {}", output.stderr);
    let lines: Vec<_> = output.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{command:?}: {}", output.stderr);
    assert!(lines[0].contains(":F:") && lines[0].contains(what) && lines[0].contains(why), "{}", lines[0]);
    assert!(!sock.exists(), "a control socket is left");
}

fn serve(file: &Path, sock: &Path) -> Command {
    let mut command = Command::new(BIN);
    command.args(["serve", "--addr", "127.0.0.1", "--port", "0", "--file"]).arg(file).arg("--sock").arg(sock);
    command
}

#[test]
fn files_that_cannot_be_served() {
    let dir = TempDir::new();
    let sock = dir.join("control");
    let path = |name: &str| dir.join(name);
    fs::write(path("empty"), []).unwrap();
    fs::write(path("small"), [1; 511]).unwrap();
    fs::create_dir(path("directory")).unwrap();
    assert!(Command::new("mkfifo").arg(path("fifo")).status().unwrap().success());
    let _listener = UnixListener::bind(path("socket")).unwrap();
    std::os::unix::fs::symlink(path("nowhere"), path("dangling")).unwrap();
    for (name, why) in [
        ("empty", "512"),
        ("small", "512"),
        ("directory", "directory"),
        ("fifo", "FIFO"),
        ("socket", "socket"),
        ("missing", "not exist"),
        ("dangling", "not exist"),
        ("small/below", "Not a directory"),
    ] {
        refused(&mut serve(&path(name), &sock), &sock, name, why);
    }
    refused(&mut serve(Path::new("/dev/null"), &sock), &sock, "/dev/null", "device");
}

/// As a user without privileges: root may write whatever its mode says.
#[test]
fn a_file_without_permission_cannot_be_served() {
    let dir = TempDir::new();
    let program = dir.join("flexnbd");
    // By a process of its own: what this one writes, a child of another test may hold open, and then it does not start.
    must("cp", &[BIN, program.to_str().unwrap()]);
    fs::set_permissions(dir.join(""), fs::Permissions::from_mode(0o777)).unwrap();
    let sock = dir.join("control");
    for (mode, why) in [(0o444, "writ"), (0o000, "read")] {
        let image = dir.join(&format!("image{mode:o}"));
        fs::write(&image, [1; 4096]).unwrap();
        fs::set_permissions(&image, fs::Permissions::from_mode(mode)).unwrap();
        let is_root = fs::read_to_string("/proc/self/status").unwrap().contains("\nUid:\t0\t");
        let mut command = Command::new(if is_root { Path::new("setpriv") } else { &program });
        if is_root {
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
        }
        command.args(["serve", "-l", "127.0.0.1", "-p", "0", "-f"]).arg(&image).arg("-s").arg(&sock);
        refused(&mut command, &sock, image.to_str().unwrap(), why);
    }
}

#[test]
fn the_tail_of_a_file_is_not_served() {
    for (length, served) in [(512, 512), (1023, 512), (1300, 1024), (4097, 4096)] {
        let content: Vec<u8> = (0..length).map(|n| n as u8 | 1).collect();
        let server = Server::serve().content(&content).start();
        let mut client = server.connect_bare();
        let sent = client.read_greeting();
        assert_eq!(sent, greeting(served, u32::from_be_bytes(sent[24..28].try_into().unwrap())));
        assert_eq!(server.status().number("size"), served);
        assert_eq!(client.read(served - 1, 2), Err(28));
        assert_eq!(client.write(served, &[0]), 28);
        assert_eq!(client.write(served - 1, &[0xaa]), 0);
        let mut expected = content;
        expected[served as usize - 1] = 0xaa;
        assert_eq!(fs::read(&server.image).unwrap(), expected, "the tail is as it was");
        let warnings = server.log().lines().filter(|line| line.contains(":W:") && line.contains("image")).count();
        assert_eq!(warnings, usize::from(length != served), "{}", server.log());
    }
}

#[test]
fn every_form_of_address() {
    for (addr, shown) in [
        ("127.0.0.1", "127.0.0.1:"),
        ("0", "0.0.0.0:"),
        ("0.0.0.0", "0.0.0.0:"),
        ("::1", "[::1]:"),
        ("[::1]", "[::1]:"),
        ("::", "[::]:"),
    ] {
        let server = Server::serve().size(4096).addr(addr).arg("-v").start();
        let address = server.status().get("address").to_owned();
        assert!(address.starts_with(shown), "{addr}: {address}");
        assert_ne!(server.port(), 0);
        server.wait_for_log(&address);
        assert!(server.log().contains(":I:"), "the port is told at level I");
        server.expect_healthy();
    }
}

#[test]
fn a_unix_socket_serves_nbd() {
    let builder = Server::serve().size(4096);
    let path = builder.dir().join("nbd");
    // One that a dead server has left is replaced.
    leave_stale_socket(&path);
    let mut server = builder.addr(path.to_str().unwrap()).start();
    assert!(fs::metadata(&path).unwrap().file_type().is_socket());
    assert_eq!(server.status().get("address"), path.to_str().unwrap());
    let mut client = server.connect();
    assert_eq!(client.write(7, b"over a UNIX socket"), 0);
    assert_eq!(client.read(7, 18).unwrap(), b"over a UNIX socket");

    let (sock, image) = (server.dir().join("second"), server.dir().join("other"));
    fs::write(&image, [0; 4096]).unwrap();
    let mut second = Command::new(BIN);
    second.args(["serve", "--addr"]).arg(&path).arg("--file").arg(image).arg("--sock").arg(&sock);
    refused(&mut second, &sock, path.to_str().unwrap(), "");
    client.expect_alive();
    server.connect().expect_alive();

    assert_eq!(server.stop().code(), Some(0));
    assert!(!path.exists(), "removed at exit");
    fs::write(&path, "precious").unwrap();
    refused(&mut second, &sock, path.to_str().unwrap(), "not a socket");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_port_in_use_is_fatal() {
    let dir = TempDir::new();
    fs::write(dir.join("image"), [0; 512]).unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, sock) = (taken.local_addr().unwrap().to_string(), dir.join("control"));
    let mut command = Command::new(BIN);
    command.args(["serve", "-l", "127.0.0.1", "-p", address.rsplit(':').next().unwrap(), "-f"]);
    command.arg(dir.join("image")).arg("-s").arg(&sock);
    let start = Instant::now();
    refused(&mut command, &sock, &address, "in use");
    assert!(start.elapsed() < Duration::from_secs(5), "without waiting");
}

#[test]
fn a_port_is_free_again_at_once() {
    let mut server = Server::serve().size(4096).start();
    let (port, mut client) = (server.port(), server.connect());
    client.expect_alive();
    // The server closes first, so that its end of the connection stays in TIME_WAIT.
    assert_eq!(server.stop().code(), Some(0));
    client.expect_closed();
    drop(client);
    let (sock, image) = (server.sock.clone(), server.image.clone());
    let mut command = Command::new(BIN);
    command.args(["serve", "-l", "127.0.0.1", "-p", &port.to_string(), "-f"]).arg(image).arg("-s").arg(&sock);
    let mut again = Process::spawn(command.stderr(Stdio::null()));
    wait_for("the second server", SOON, || {
        assert!(again.is_running());
        sock.exists().then_some(())
    });
    TcpStream::connect(("127.0.0.1", port)).unwrap();
}

#[test]
fn control_paths_that_cannot_be_used() {
    let dir = TempDir::new();
    let image = dir.join("image");
    fs::write(&image, [0; 512]).unwrap();
    let path = |name: &str| dir.join(name);
    fs::write(path("file"), "precious").unwrap();
    fs::create_dir(path("directory")).unwrap();
    let long = path(&"x".repeat(150));
    for (sock, why) in [
        (path("file"), "not a socket"),
        (path("directory"), "not a socket"),
        (path("no/where"), "make it first"),
        (long, "that of a UNIX socket at most 107; choose a shorter one"),
    ] {
        let existed = sock.exists();
        let output = run_command(&mut serve(&image, &sock), &[]);
        assert_eq!(output.code, Some(1), "{}", output.stderr);
        let lines: Vec<_> = output.stderr.lines().collect();
        assert!(
            lines.len() == 1
                && lines[0].contains(":F:")
                && lines[0].contains(sock.to_str().unwrap())
                && lines[0].contains(why),
            "{lines:?}"
        );
        assert_eq!(sock.exists(), existed);
    }
    assert_eq!(fs::read(path("file")).unwrap(), b"precious");

    // A live one, of whatever program.
    let live = UnixListener::bind(path("live")).unwrap();
    let output = run_command(&mut serve(&image, &path("live")), &[]);
    assert_eq!(output.code, Some(1));
    assert!(
        output.stderr.contains(":F:") && output.stderr.contains(path("live").to_str().unwrap()),
        "{}",
        output.stderr
    );
    UnixStream::connect(path("live")).unwrap();
    drop(live);
}

/// In a network of its own, where no port below 1024 is free for everybody.
#[test]
fn a_port_for_root_is_told_to_be_one() {
    if !has(&[Need::Root, Need::Program("setpriv"), Need::Kernel("unshare --net true")]) {
        return;
    }
    let dir = TempDir::new();
    let program_of_all = dir.join("flexnbd");
    must("cp", &[BIN, program_of_all.to_str().unwrap()]);
    fs::set_permissions(dir.join(""), fs::Permissions::from_mode(0o777)).unwrap();
    let image = dir.join("image");
    fs::write(&image, [0; 512]).unwrap();
    fs::set_permissions(&image, fs::Permissions::from_mode(0o666)).unwrap();
    let mut command = program("unshare");
    command.args(["--net", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program_of_all);
    command.args(["serve", "-l", "0", "-p", "80", "-f"]).arg(&image);
    refused(&mut command, &dir.join("control"), "0.0.0.0:80", "ports below 1024 are for root and CAP_NET_BIND_SERVICE");
}

#[test]
fn a_stale_control_socket_is_replaced() {
    let builder = Server::serve().size(4096);
    leave_stale_socket(&builder.dir().join("control"));
    let dir = builder.dir().join("");
    // The harness waits for the path, which is there already.
    let mut command = serve(&dir.join("image"), &dir.join("control"));
    let mut process = Process::spawn(command.stderr(Stdio::null()));
    wait_for("an answer", SOON, || UnixStream::connect(dir.join("control")).ok());
    process.signal("TERM");
    assert_eq!(process.wait(SOON).code(), Some(0));
    assert!(!dir.join("control").exists());
}

#[test]
fn a_server_that_was_killed_can_be_started_again() {
    let mut server = Server::serve().size(4096).start();
    server.process.signal("KILL");
    // Its sockets may be closed before the image is.
    server.process.wait(SOON);
    let mut command = serve(&server.image, &server.sock);
    let _again = Process::spawn(command.stderr(Stdio::null()));
    wait_for("an answer", SOON, || UnixStream::connect(&server.sock).ok());
}

#[test]
fn the_control_socket_says_ready() {
    // As it comes, and with every system call that could leave a gap drawn out.
    let delayed = ["strace", "-D", "-f", "-o", "/dev/null", "-e", "inject=listen,chmod:delay_enter=200000"];
    for wrapper in [&[][..], &[], &[], &delayed] {
        let dir = TempDir::new();
        let (image, sock, nbd) = (dir.join("image"), dir.join("control"), dir.join("nbd"));
        File::create(&image).unwrap().set_len(4096).unwrap();
        let words = [wrapper, &[BIN, "serve", "-l"]].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).arg(&nbd).arg("-f").arg(&image).arg("-s").arg(&sock);
        let _process = Process::spawn(&mut command);
        let give_up = Instant::now() + SOON;
        while !sock.exists() {
            assert!(Instant::now() < give_up);
        }
        UnixStream::connect(&nbd).expect("the NBD socket listens already");
        UnixStream::connect(&sock).expect("the control socket answers already");
        assert_eq!(fs::metadata(&sock).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn sockets_have_keepalive_and_no_delay() {
    let mut server = Server::serve().size(4096);
    let trace = server.dir().join("trace");
    let calls = "-e trace=socket,setsockopt,bind,listen,connect,fcntl".split(' ').map(Into::into);
    let words: Vec<std::ffi::OsString> =
        ["strace", "-D", "-f", "-o"].map(Into::into).into_iter().chain([trace.clone().into()]).chain(calls).collect();
    server = server.through(&words);
    let server = server.start();
    server.connect().expect_alive();
    let text = wait_for("the options of a client", SOON, || {
        fs::read_to_string(&trace).ok().filter(|text| text.contains("TCP_KEEPCNT"))
    });
    for option in [
        "TCP_NODELAY, [1]",
        "SO_KEEPALIVE, [1]",
        "TCP_KEEPIDLE, [30]",
        "TCP_KEEPINTVL, [10]",
        "TCP_KEEPCNT, [3]",
        "SO_REUSEADDR, [1]",
    ] {
        assert!(text.contains(option), "no {option} in {text}");
    }
    let listens = text.find("listen(").unwrap();
    let control = text.find("AF_UNIX, sun_path").unwrap();
    assert!(listens < control, "the control socket is bound after the other one listens: {text}");
}

#[test]
fn an_address_that_never_comes_is_given_up() {
    let dir = TempDir::new();
    fs::write(dir.join("image"), [0; 512]).unwrap();
    let image = dir.join("image");
    let start = Instant::now();
    let output = run(&["serve", "-q", "-l", "192.0.2.1", "-p", "0", "-f", image.to_str().unwrap()], &[]);
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.contains(":F:") && output.stderr.contains("192.0.2.1"), "{}", output.stderr);
    let took = start.elapsed();
    assert!((9..16).contains(&took.as_secs()), "tried for 10 s, not {took:?}");
}

#[test]
fn a_signal_ends_the_wait_for_an_address() {
    let dir = TempDir::new();
    fs::write(dir.join("image"), [0; 512]).unwrap();
    let mut command = Command::new(BIN);
    command.args(["serve", "-l", "192.0.2.1", "-p", "0", "-f"]).arg(dir.join("image"));
    let log = dir.join("log");
    let mut process = Process::spawn(command.stderr(File::create(&log).unwrap()));
    wait_for("the warning", SOON, || fs::read_to_string(&log).unwrap().contains(":W:").then_some(()));
    process.signal("TERM");
    assert_eq!(
        process.wait(Duration::from_secs(5)).code(),
        Some(0),
        "a clean stop: {}",
        fs::read_to_string(&log).unwrap()
    );
}

/// In a network of its own, to which the address is added later.
#[test]
fn an_address_that_is_on_its_way_is_waited_for() {
    let programs = ["unshare", "nsenter", "ip"].map(Need::Program);
    if !has(&[&[Need::Root], &programs[..], &[Need::Kernel("unshare -n true")]].concat()) {
        return;
    }
    let dir = TempDir::new();
    let (image, sock, log) = (dir.join("image"), dir.join("control"), dir.join("log"));
    fs::write(&image, [0; 512]).unwrap();
    let mut command = program("unshare");
    // A network whose loopback was never up takes every address.
    command.args(["-n", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh", BIN]);
    command.args(["serve", "-l", "10.77.0.1", "-p", "4777", "-f"]).arg(&image).arg("-s").arg(&sock);
    let process = Process::spawn(command.stderr(File::create(&log).unwrap()));
    wait_for("the warning", SOON, || fs::read_to_string(&log).unwrap().contains(":W:").then_some(()));
    assert!(!sock.exists());
    let pid = process.0.id().to_string();
    must("nsenter", &["-n", "-t", &pid, "ip", "address", "add", "10.77.0.1/32", "dev", "lo"]);
    wait_for("the control socket", SOON, || sock.exists().then_some(()));
}

#[test]
fn max_clients() {
    for (option, max) in [("", 100), ("--max-clients 2", 2), ("--max-clients=1", 1), ("--max-clients 200", 200)] {
        let server = Server::serve().size(4096).args(option).start();
        let mut clients: Vec<_> = (0..max).map(|_| server.connect()).collect();
        for client in &mut clients {
            client.expect_alive();
        }
        assert_eq!(server.status().number("num_clients"), max);
        for _ in 0..3 {
            server.connect_bare().expect_closed();
        }
        let line = server.wait_for_log("--max-clients");
        assert!(line.contains(":W:"), "{line}");
        clients[0].expect_alive();
        clients.pop();
        wait_for("room for a client", SOON, || (server.status().number("num_clients") == max - 1).then_some(()));
        server.connect().expect_alive();
    }
}

#[test]
fn clients_leave_descriptors_to_control_and_to_a_migration() {
    let server = Server::serve().size(1 << 20).through(&["prlimit", "--nofile=64:64"]).start();
    let line = server.wait_for_log("--max-clients 100");
    assert!(line.contains(":W:") && line.contains("the limit is 64"), "{line}");
    let word_before = |what: &str| line.split(what).next().unwrap().rsplit(' ').next().unwrap().parse::<u64>().unwrap();
    let (clients_max, controls) = (word_before(" clients and"), word_before(" control connections"));
    assert!(clients_max >= 20 && controls >= 2, "{line}");

    let mut clients: Vec<_> = (0..100).map(|_| server.connect_bare()).collect();
    clients[0].read_greeting();
    for client in &mut clients[clients_max as usize..] {
        client.expect_closed();
    }
    let status = server.status();
    assert_eq!((status.number("num_clients"), status.get("clients_allowed")), (clients_max, "false"));
    clients[0].expect_alive();
    let mut waiting: Vec<_> = (0..controls).map(|_| UnixStream::connect(&server.sock).unwrap()).collect();
    for stream in &mut waiting {
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(b"status\n\n").unwrap();
    }
    for mut stream in waiting {
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("0: pid="), "{answer}");
    }

    // A descriptor for the destination is left, too.
    let mut destination = peers::listen(0).size(1 << 20).start();
    assert_eq!(server.control(format!("mirror 127.0.0.1 {}\n\n", destination.port())), "0: Mirror started\n");
    assert_eq!(destination.process.wait(SOON).code(), Some(0));
    assert!(!server.log().contains("cannot accept"), "{}", server.log());
}

#[test]
fn a_limit_that_leaves_no_descriptor_for_a_client_is_said() {
    let dir = TempDir::new();
    let (image, sock) = (dir.join("image"), dir.join("control"));
    fs::write(&image, [0; 512]).unwrap();
    let mut command = program("prlimit");
    command.args(["--nofile=12:12", BIN, "serve", "-l", "127.0.0.1", "-p", "0", "-f"]).arg(&image).arg("-s").arg(&sock);
    refused(&mut command, &sock, "descriptors", "12");
}

#[test]
fn out_of_descriptors_accepting_pauses_and_resumes() {
    let server = Server::serve().size(4096).start();
    // Lower than the server has been promised.
    must("prlimit", &["--pid", &server.pid().to_string(), "--nofile=24:24"]);
    let mut clients: Vec<_> = (0..40).map(|_| server.connect_bare()).collect();
    let line = server.wait_for_log("cannot accept");
    assert!(line.contains(":W:"), "{line}");
    clients[0].read_greeting();
    clients[0].expect_alive();
    let stat = || fs::read_to_string(format!("/proc/{}/stat", server.pid())).unwrap();
    let ticks = || {
        stat().rsplit(") ").next().unwrap().split(' ').skip(11).take(2).map(|n| n.parse::<u64>().unwrap()).sum::<u64>()
    };
    let before = ticks();
    std::thread::sleep(Duration::from_secs(1));
    assert!(ticks() - before < 30, "it rests meanwhile and does not spin");
    let later = clients.split_off(10);
    drop(clients);
    for mut client in later {
        // Those that wait are served as descriptors come back.
        client.read_greeting();
        client.expect_alive();
    }
    server.expect_healthy();
}

/// A listener overwrites its file, so it does not take one that is served, nor the other way round; servers share one only
/// if each of them was told so.
#[test]
fn what_is_served_is_not_overwritten() {
    let server = Server::serve().size(1 << 20).start();
    let image = server.image.to_str().unwrap();
    let listen = run(&["listen", "--addr", "127.0.0.1", "--port", "0", "--file", image], b"");
    assert_eq!(listen.code, Some(1));
    assert!(listen.stderr.contains("another server has it open"), "{}", listen.stderr);
    for shared in ["", "--shared-image"] {
        let second = run(
            &["serve", "--addr", "127.0.0.1", "--port", "0", "--file", image]
                .into_iter()
                .chain((!shared.is_empty()).then_some(shared))
                .collect::<Vec<_>>(),
            b"",
        );
        assert_eq!(second.code, Some(1));
        assert!(second.stderr.contains("another server has it open"), "{}", second.stderr);
    }

    let shared = Server::serve().size(1 << 20).arg("--shared-image").start();
    let _second = Server::serve().file(shared.image.clone()).arg("--shared-image").start();
    let image = shared.image.to_str().unwrap();
    for mode in ["serve", "listen"] {
        let third = run(&[mode, "--addr", "127.0.0.1", "--port", "0", "--file", image], b"");
        assert!(third.code == Some(1) && third.stderr.contains("--shared-image"), "{}", third.stderr);
    }

    let destination = peers::listen(0).size(1 << 20).start();
    let image = destination.image.to_str().unwrap();
    let serve = run(&["serve", "--addr", "127.0.0.1", "--port", "0", "--file", image], b"");
    assert_eq!(serve.code, Some(1));
    assert!(serve.stderr.contains("another server has it open"), "{}", serve.stderr);
}
