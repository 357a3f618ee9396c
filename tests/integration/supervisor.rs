//! Sockets that a supervisor passes to a server.

use crate::support::{
    has, program, run_command, wait_for, Client, Need, Output, Process, TempDir, BIN, GREETING_MAGICS, SOON,
};
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
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
fn refused(dir: &TempDir, passed: Vec<OwnedFd>, variables: &str) -> Output {
    let log = dir.join("log");
    let mut command = activated(passed, variables, &["serve", "--file", image(dir).to_str().unwrap()]);
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
        let output = refused(&dir, vec![passed], one);
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
        let output = refused(&dir, passed, variables);
        assert!(output.code == Some(2) && output.stderr.contains(why), "{variables}: {output:?}");
    }
    let passed = vec![unix(&dir.join("a")), unix(&dir.join("b"))];
    let output = refused(&dir, passed, "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=control:control");
    assert!(output.code == Some(2) && output.stderr.contains("two sockets are called control"), "{output:?}");
}
