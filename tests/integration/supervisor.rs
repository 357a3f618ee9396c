//! What a supervisor passes to a server and is told by it: sockets, readiness, the journal, hang-ups.

use crate::support::{
    has, leave_stale_socket, peers, program, run_command, wait_for, Client, Need, Output, Process, Server, TempDir,
    BIN, GREETING_MAGICS, SOON,
};
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

/// What a newstyle server says first.
const NEWSTYLE_MAGICS: &[u8; 16] = b"NBDMAGICIHAVEOPT";

/// `flexnbd` with these words, which finds up to three descriptors where a supervisor puts them. The shell gets them as its
/// streams; `variables` come before the program.
fn activated(passed: Vec<OwnedFd>, variables: &str, words: &[&str]) -> Command {
    let script = format!("exec 3<&0 4<&1 5<&2 0</dev/null 1>&0 2>\"$LOG\"; {variables} exec \"$@\"");
    let mut command = program("sh");
    command.args(["-c", &script, "sh", BIN]).args(words);
    let mut streams = passed.into_iter().map(Stdio::from);
    let mut next = || streams.next().unwrap_or_else(Stdio::null);
    command.stdin(next()).stdout(next()).stderr(next());
    command
}

/// Runs it until it ends by itself; its stderr is what it wrote to the log.
fn refused(dir: &TempDir, passed: Vec<OwnedFd>, variables: &str, more: &[&str]) -> Output {
    let log = dir.join("log");
    let image = image(dir);
    let words = [&["serve", "--file", image.to_str().unwrap()], more].concat();
    let mut command = activated(passed, variables, &words);
    let mut process = Process::spawn(command.env("LOG", &log));
    let code = process.wait(SOON).code();
    Output { code, stdout: Vec::new(), stderr: fs::read_to_string(log).unwrap() }
}

fn image(dir: &TempDir) -> std::path::PathBuf {
    let path = dir.join("image");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    path
}

fn unix(path: &Path) -> OwnedFd {
    UnixListener::bind(path).unwrap().into()
}

#[test]
fn clients_start_it_themselves() {
    if !has(&[Need::Program("nbdinfo"), Need::Program("nbdcopy")]) {
        return;
    }
    let dir = TempDir::new();
    let image = image(&dir);
    fs::write(&image, vec![7; 1 << 20]).unwrap();
    let serve = ["--", "[", BIN, "serve", "--file", image.to_str().unwrap(), "]"];
    let size = run_command(program("nbdinfo").arg("--size").args(serve), &[]);
    assert_eq!((size.code, size.stdout.as_slice()), (Some(0), &b"1048576\n"[..]), "{size:?}");
    let copy = dir.join("copy");
    let copied = run_command(program("nbdcopy").args(serve).arg(&copy), &[]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    assert!(fs::read(&copy).unwrap() == fs::read(&image).unwrap());
}

#[test]
fn sockets_are_for_what_their_names_say() {
    let dir = TempDir::new();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = tcp.local_addr().unwrap();
    let (control, newstyle) = (dir.join("control"), dir.join("newstyle"));
    let passed = vec![tcp.into(), unix(&control), unix(&newstyle)];
    let log = dir.join("log");
    let variables = "LISTEN_PID=$$ LISTEN_FDS=3 LISTEN_FDNAMES=oldstyle:control:flexnbd.socket";
    let mut command = activated(passed, variables, &["serve", "-v", "--file", image(&dir).to_str().unwrap()]);
    let mut server = Process::spawn(command.env("LOG", &log));

    assert_eq!(Client::new(TcpStream::connect(address).unwrap()).read_bytes(16), GREETING_MAGICS);
    assert_eq!(Client::new(UnixStream::connect(&newstyle).unwrap()).read_bytes(16), NEWSTYLE_MAGICS);
    let status = run_command(program(BIN).arg("status").arg("--sock").arg(&control), &[]);
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains(&format!(" address={address} newstyle_socket={} ", newstyle.display())), "{status}");
    for fd in 3..6 {
        let info = fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", server.0.id())).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let flags = i32::from_str_radix(flags, 8).unwrap();
        let wanted = libc::O_CLOEXEC | libc::O_NONBLOCK;
        assert_eq!(flags & wanted, wanted, "descriptor {fd} is closed on exec and does not wait");
    }
    server.signal("TERM");
    assert_eq!(server.wait(SOON).code(), Some(0), "{}", fs::read_to_string(&log).unwrap());
    assert!(control.exists() && newstyle.exists(), "the supervisor's sockets stay");
}

/// An abstract name is told as the kernel's tools do, and what the server opens itself comes beside what it was given.
#[test]
fn sockets_of_both_kinds_go_together() {
    let dir = TempDir::new();
    let name = format!("flexnbd-test-{}", std::process::id());
    let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
    let passed = vec![UnixListener::bind_addr(&abstract_name).unwrap().into()];
    let (sock, image) = (dir.join("control"), image(&dir));
    let words = ["serve", "-l", "127.0.0.1", "-p", "0", "-s", sock.to_str().unwrap(), "-f", image.to_str().unwrap()];
    let mut command = activated(passed, "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=unknown", &words);
    let mut server = Process::spawn(command.env("LOG", dir.join("log")));
    wait_for("the control socket", SOON, || sock.exists().then_some(()));
    let status = run_command(program(BIN).arg("status").arg("--sock").arg(&sock), &[]);
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(
        status.contains(" address=127.0.0.1:") && status.contains(&format!(" newstyle_socket=@{name} ")),
        "{status}"
    );
    assert_eq!(Client::new(UnixStream::connect_addr(&abstract_name).unwrap()).read_bytes(16), NEWSTYLE_MAGICS);
    server.signal("TERM");
    assert_eq!(server.wait(SOON).code(), Some(0));
}

#[test]
fn what_is_no_listening_socket_is_refused() {
    let dir = TempDir::new();
    let one = "LISTEN_PID=$$ LISTEN_FDS=1";
    let (stream, _other) = UnixStream::pair().unwrap();
    for (passed, why) in [
        (OwnedFd::from(File::open("/dev/null").unwrap()), "descriptor 3 \"\": not a listening stream socket"),
        (stream.into(), "not a listening stream socket"),
        (UdpSocket::bind("127.0.0.1:0").unwrap().into(), "not a listening stream socket"),
    ] {
        let output = refused(&dir, vec![passed], one, &[]);
        assert!(output.code == Some(2) && output.stderr.contains(why), "{output:?}");
    }
    let tcp = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    for (passed, variables, why) in [
        (vec![tcp()], "LISTEN_PID=$$ LISTEN_FDS=9", "descriptor 4"),
        (vec![tcp()], "LISTEN_PID=$$ LISTEN_FDS=-1", "LISTEN_FDS=-1: expected a number"),
        (vec![tcp()], "LISTEN_PID=$$ LISTEN_FDS=99999999999", "expected a number"),
        (vec![tcp()], &format!("{one} LISTEN_FDNAMES=control"), "is not a UNIX socket"),
        // What was meant for another process is none of its business.
        (vec![tcp()], "LISTEN_PID=1 LISTEN_FDS=1", "--addr <ADDR> is required"),
        (vec![tcp()], "LISTEN_FDS=1", "--addr <ADDR> is required"),
    ] {
        let output = refused(&dir, passed, variables, &[]);
        assert!(output.code == Some(2) && output.stderr.contains(why), "{variables}: {output:?}");
    }
    let passed = vec![unix(&dir.join("a")), unix(&dir.join("b"))];
    let output = refused(&dir, passed, "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=control:control", &[]);
    assert!(output.code == Some(2) && output.stderr.contains("two sockets are called control"), "{output:?}");
    let passed = vec![unix(&dir.join("c"))];
    let output =
        refused(&dir, passed, &format!("{one} LISTEN_FDNAMES=control"), &["--sock", "d", "--newstyle-sock", "e"]);
    assert!(output.code == Some(2) && output.stderr.contains("a control socket was passed, too"), "{output:?}");
    assert!(!dir.join("d").exists() && !dir.join("e").exists());
}

/// The socket of a supervisor that reads nothing by itself.
fn notified(name: &str) -> (UnixDatagram, [String; 2]) {
    let address = match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name).unwrap(),
        None => SocketAddr::from_pathname(name).unwrap(),
    };
    let socket = UnixDatagram::bind_addr(&address).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    (socket, ["env".into(), format!("NOTIFY_SOCKET={name}")])
}

fn told(supervisor: &UnixDatagram) -> String {
    let mut words = [0; 4096];
    let n = supervisor.recv(&mut words).unwrap();
    String::from_utf8(words[..n].to_vec()).unwrap()
}

/// What it is told next that begins so, whatever comes before.
fn wait_until_told(supervisor: &UnixDatagram, beginning: &str) -> String {
    wait_for(format_args!("{beginning:?}"), SOON, || {
        Some(told(supervisor)).filter(|words| words.starts_with(beginning))
    })
}

#[test]
fn a_supervisor_is_told_what_the_server_does() {
    let dir = TempDir::new();
    let path = dir.join("notify");
    let abstract_name = format!("@flexnbd-notify-{}", std::process::id());
    for name in [path.to_str().unwrap(), &abstract_name] {
        let (supervisor, through) = notified(name);
        let mut server = Server::serve().size(4 << 20).through(&through).start();
        let serving = format!("READY=1\nSTATUS=serving {} on {}", server.image.display(), server.address());
        assert_eq!(told(&supervisor), serving);
        server.connect().expect_alive();

        // Slow enough to be told more than once.
        let destination = peers::listen(0).size(4 << 20).start();
        let mut client = server.connect();
        assert_eq!(client.write(0, &vec![1; 3 << 20]), 0);
        peers::start_mirror(&server, destination.address(), "--max-speed 100k");
        let migrating = format!("READY=1\nSTATUS=migration to {}: copying, pass 1, ", destination.address());
        let first = wait_until_told(&supervisor, &migrating);
        let second = wait_until_told(&supervisor, &migrating);
        assert!(first.ends_with(" MiB left") && first != second, "{first} {second}");
        assert_eq!(peers::tell("break", &server, "").0, Some(0));
        assert_eq!(wait_until_told(&supervisor, "READY=1\nSTATUS=serving"), serving);

        assert_eq!(server.stop().code(), Some(0));
        assert_eq!(told(&supervisor), "STOPPING=1");
    }
    let (supervisor, through) = notified(&format!("{abstract_name}-2"));
    let words = peers::listen_after(0, &format!("exec {}", through.join(" ")));
    let mut listener = words.size(4096).start();
    let awaiting = format!("READY=1\nSTATUS=awaiting a migration to {} on ", listener.image.display());
    assert!(told(&supervisor).starts_with(&awaiting));
    assert_eq!(listener.stop().code(), Some(1));
    assert_eq!(told(&supervisor), "STOPPING=1");
}

#[test]
fn a_supervisor_is_told_that_the_loop_goes_on() {
    let dir = TempDir::new();
    let name = dir.join("notify");
    let (supervisor, [env, variable]) = notified(name.to_str().unwrap());
    let through = |pid| [&env, "-u", "WATCHDOG_PID", &variable, "WATCHDOG_USEC=100000", pid].map(str::to_owned);
    let server = Server::serve().size(4096).through(&through("OF=this")).start();
    for _ in 0..5 {
        wait_until_told(&supervisor, "WATCHDOG=1");
    }
    // It is not told that when the loop does not go on.
    server.process.signal("STOP");
    supervisor.set_nonblocking(true).unwrap();
    while supervisor.recv(&mut [0; 100]).is_ok() {}
    supervisor.set_nonblocking(false).unwrap();
    server.process.signal("CONT");
    wait_until_told(&supervisor, "WATCHDOG=1");
    server.expect_healthy();

    while !told(&supervisor).starts_with("STOPPING") {}
    let server = Server::serve().size(4096).through(&through("WATCHDOG_PID=1")).start();
    assert!(told(&supervisor).starts_with("READY=1"));
    server.expect_healthy();
    assert_eq!(told(&supervisor), "STOPPING=1", "another process is watched");
}

/// Neither a supervisor that is gone, nor one that reads nothing, nor a socket that is none.
#[test]
fn a_supervisor_that_does_not_listen_does_no_harm() {
    let dir = TempDir::new();
    let (deaf, gone) = (dir.join("deaf"), dir.join("gone"));
    let (_supervisor, [env, full]) = notified(deaf.to_str().unwrap());
    leave_stale_socket(&gone);
    let gone = format!("NOTIFY_SOCKET={}", gone.display());
    for variable in [full.as_str(), &gone, "NOTIFY_SOCKET=/nowhere", "NOTIFY_SOCKET=nonsense", "NOTIFY_SOCKET="] {
        let server = Server::serve().size(4096).through(&[&env, variable, "WATCHDOG_USEC=2000"]).start();
        let mut client = server.connect();
        for _ in 0..50 {
            client.expect_alive();
        }
        let warned = server.log().contains(":W:");
        assert_eq!(warned, !variable.contains("=/"), "{variable}: {}", server.log());
        server.expect_healthy();
    }
}

#[test]
fn the_journal_is_told_the_level() {
    let stream = "JOURNAL_STREAM=$(stat -Lc %d:%i /proc/self/fd/2)";
    for (variables, prefixed) in [(stream, true), ("JOURNAL_STREAM=1:2", false), ("JOURNAL_STREAM=", false)] {
        let script = format!("{variables} exec \"$@\"");
        let builder = Server::serve().size(4097).arg("-v");
        let mut server = builder.through(&["sh", "-c", &script, "sh"]).start();
        assert_eq!(server.stop().code(), Some(0));
        for line in server.log().lines() {
            let expected = match line.split(':').nth(1) {
                Some("W") => "<4>",
                Some("I") => "<6>",
                Some("D") => "<7>",
                other => panic!("{other:?}: {line}"),
            };
            assert_eq!(line.starts_with(expected), prefixed, "{variables}: {line}");
            assert!(prefixed || line.starts_with(|c: char| c.is_ascii_digit()), "{line}");
        }
        assert!(server.log().contains(":W:") && server.log().contains(":I:"), "{}", server.log());
    }
    let dir = TempDir::new();
    let image = dir.join("nothing");
    let script = format!("exec 2>\"$0\"; {stream} exec \"$@\"");
    let log = dir.join("log");
    let words = ["serve", "-l", "127.0.0.1", "-p", "0", "-f", image.to_str().unwrap()];
    let output = run_command(program("sh").arg("-c").arg(script).arg(&log).arg(BIN).args(words), &[]);
    let line = fs::read_to_string(&log).unwrap();
    assert!(output.code == Some(1) && line.starts_with("<3>") && line.contains(":F:"), "{line}");
}

/// A supervisor's SIGHUP says «read your configuration again».
#[test]
fn a_hang_up_without_a_terminal_is_ignored() {
    let server = Server::serve().size(4096).arg("-v").through(&["setsid"]).start();
    let mut client = server.connect();
    for n in 1..3 {
        server.process.signal("HUP");
        wait_for("a line", SOON, || (server.log().matches("SIGHUP is ignored").count() == n).then_some(()));
        client.expect_alive();
    }
    assert!(!server.log().contains(":W:"), "{}", server.log());
    server.expect_healthy();
}

/// With a terminal it ends the server, sent by hand or because the terminal is gone.
#[test]
fn a_hang_up_of_the_terminal_stops_it() {
    if !has(&[Need::Program("script")]) {
        return;
    }
    for by_hand in [true, false] {
        let dir = TempDir::new();
        let (sock, log) = (dir.join("control"), dir.join("log"));
        let server = format!(
            "exec {BIN} serve -v -l 127.0.0.1 -p 0 -f {} -s {} 2>{}",
            image(&dir).display(),
            sock.display(),
            log.display()
        );
        let mut command = program("script");
        command.args(["-qec", &server, "/dev/null"]).env("SHELL", "/bin/sh");
        let mut terminal = Process::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()));
        wait_for("the control socket", SOON, || sock.exists().then_some(()));
        let status = run_command(program(BIN).arg("status").arg("--sock").arg(&sock), &[]);
        let status = String::from_utf8(status.stdout).unwrap();
        let pid = status.split_once("pid=").unwrap().1.split(' ').next().unwrap();
        if by_hand {
            assert!(program("kill").args(["-s", "HUP", pid]).status().unwrap().success());
        } else {
            terminal.0.kill().unwrap();
        }
        wait_for("the end of the server", SOON, || (!sock.exists()).then_some(()));
        let said =
            wait_for("a line", SOON, || fs::read_to_string(&log).ok().filter(|text| text.contains("stopping: SIGHUP")));
        assert!(!said.contains("ignored"), "{said}");
    }
}
