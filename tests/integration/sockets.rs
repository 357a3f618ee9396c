//! The paths of UNIX sockets: who gets one, when it is there, and what is left of it.

use crate::support::{leave_stale_socket, run, run_command, wait_for, Process, Server, TempDir, BIN, SOON};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;

/// A server of an image of its own in the folder, which writes its log beside it.
fn serve(dir: &TempDir, name: &str, sock: &Path) -> Command {
    let image = dir.join(name);
    fs::write(&image, [0; 4096]).unwrap();
    let mut command = Command::new(BIN);
    command.args(["serve", "--addr", "127.0.0.1", "--port", "0", "--file"]).arg(image).arg("--sock").arg(sock);
    command.stderr(File::create(dir.join(&format!("{name}.log"))).unwrap());
    command
}

/// What is in the folder besides the images and logs of [`serve`].
fn others(dir: &TempDir) -> Vec<OsString> {
    let names = fs::read_dir(dir.join("")).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| !["a", "a.log", "b", "b.log"].iter().any(|known| name == known)).collect()
}

/// Every other pair meets the socket of a server that was killed.
#[test]
fn of_two_servers_that_start_at_once_one_gets_the_control_socket() {
    let race = |is_stale: bool| {
        let dir = TempDir::new();
        let sock = dir.join("control");
        if is_stale {
            leave_stale_socket(&sock);
        }
        let mut racers = ["a", "b"].map(|name| (name, Process::spawn(&mut serve(&dir, name, &sock))));
        let (loser, status) = wait_for("the end of one of them", SOON, || {
            racers.iter_mut().find_map(|(name, process)| Some((*name, process.0.try_wait().unwrap()?)))
        });
        let log = fs::read_to_string(dir.join(&format!("{loser}.log"))).unwrap();
        let lines: Vec<_> = log.lines().collect();
        assert_eq!((status.code(), lines.len()), (Some(1), 1), "{log}");
        assert!(log.contains(":F:") && log.contains(sock.to_str().unwrap()), "{log}");

        let (_, winner) = racers.iter_mut().find(|(name, _)| *name != loser).unwrap();
        wait_for("the socket of the other", SOON, || UnixStream::connect(&sock).ok());
        let status = run(&["status", "--sock", sock.to_str().unwrap()], b"");
        let pid = format!("pid={} ", winner.0.id());
        assert!(String::from_utf8_lossy(&status.stdout).starts_with(&pid), "{pid}: {status:?}");
        assert_eq!(others(&dir), ["control"]);
        winner.signal("TERM");
        assert_eq!(winner.wait(SOON).code(), Some(0));
        assert!(others(&dir).is_empty(), "{:?}", others(&dir));
    };
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..15).for_each(|round| race(round % 2 == 0)));
        }
    });
}

/// Nobody takes the socket of a server that was killed for that of its successor for longer than it takes to start a
/// program; and that of a server that stops is gone before it stops listening.
#[test]
fn the_socket_of_a_server_that_was_killed_goes_first_of_all() {
    let mut old = Server::serve().size(4096).start();
    old.process.signal("KILL");
    old.process.wait(SOON);
    assert!(old.sock.exists());

    let trace = old.dir().join("trace");
    let mut command = Command::new("strace");
    command
        .args(["-D", "-f", "-y", "-e", "trace=openat,unlink,unlinkat,bind,listen,link,linkat,close", "-o"])
        .arg(&trace);
    command.arg(BIN).args(["serve", "-l", "127.0.0.1", "-p", "0", "-f"]).arg(&old.image).arg("-s").arg(&old.sock);
    let mut new = Process::spawn(&mut command);
    wait_for("an answer", SOON, || UnixStream::connect(&old.sock).ok());
    new.signal("TERM");
    assert_eq!(new.wait(SOON).code(), Some(0));

    let text = wait_for("the end of the trace", SOON, || {
        fs::read_to_string(&trace).ok().filter(|text| text.contains("+++ exited"))
    });
    let place = |what: &dyn Fn(&str) -> bool| {
        let found = text.lines().position(what);
        found.unwrap_or_else(|| panic!("not in the trace: {text}"))
    };
    let sock = old.sock.to_str().unwrap();
    let removes = |line: &str| line.contains("unlink") && line.contains(&format!("\"{sock}\""));
    let first_removal = place(&removes);
    let opened = place(&|line| line.contains("openat(") && line.contains(old.image.to_str().unwrap()));
    let bound = place(&|line| line.contains("bind("));
    assert!(first_removal < opened && first_removal < bound, "{text}");
    let named = place(&|line| line.contains("link") && line.contains(&format!(", \"{sock}\"")));
    let listens = text.lines().enumerate().filter(|(_, line)| line.contains("listen(")).map(|(at, _)| at).max();
    assert!(listens.unwrap() < named, "{text}");
    let last_removal = text.lines().enumerate().filter(|(_, line)| removes(line)).map(|(at, _)| at).max().unwrap();
    let fd = text.split("bind(").find(|call| call.contains("AF_UNIX")).and_then(|call| call.split('<').next()).unwrap();
    let closes = |line: &str| line.contains(&format!("close({fd}<"));
    let end = text.lines().enumerate().filter(|(_, line)| closes(line)).map(|(at, _)| at).max().unwrap();
    assert!(named < last_removal && last_removal < end, "{text}");
}

#[test]
fn a_socket_that_cannot_be_made_leaves_nothing() {
    for failing in ["listen:error=EIO:when=2", "?link,?linkat:error=EIO", "ioctl:error=EIO"] {
        let dir = TempDir::new();
        let (image, sock) = (dir.join("a"), dir.join("control"));
        fs::write(&image, [0; 4096]).unwrap();
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("inject={failing}"), BIN, "serve"]);
        command.args(["-l", "127.0.0.1", "-p", "0", "-f"]).arg(&image).arg("-s").arg(&sock);
        let output = run_command(&mut command, &[]);
        assert_eq!(output.code, Some(1), "{failing}: {output:?}");
        assert!(output.stderr.contains(":F:") && output.stderr.contains(sock.to_str().unwrap()), "{output:?}");
        assert!(others(&dir).is_empty(), "{failing}: {:?}", others(&dir));
    }
}

/// The address of a UNIX socket has room for 107 bytes.
#[test]
fn a_path_may_be_as_long_as_an_address() {
    let dir = TempDir::new();
    for (total, works) in [(106, true), (107, true), (108, false)] {
        for name in ["s", "a-name-of-a-usual-length"] {
            let start = dir.join("").to_str().unwrap().len();
            let folder = dir.join(&"f".repeat(total - start - 1 - name.len()));
            fs::create_dir(&folder).unwrap();
            let sock = folder.join(name);
            assert_eq!(sock.to_str().unwrap().len(), total);
            let mut command = serve(&dir, "a", &sock);
            if works {
                let mut process = Process::spawn(&mut command);
                wait_for("an answer", SOON, || UnixStream::connect(&sock).ok());
                assert_eq!(fs::metadata(&sock).unwrap().permissions().mode() & 0o777, 0o600);
                process.signal("TERM");
                assert_eq!(process.wait(SOON).code(), Some(0));
            } else {
                let output = run_command(&mut command, &[]);
                assert!(output.code == Some(1) && output.stderr.contains(":F:"), "{output:?}");
                assert!(output.stderr.contains(sock.to_str().unwrap()), "{output:?}");
            }
            assert_eq!(fs::read_dir(&folder).unwrap().count(), 0, "nothing is left");
            fs::remove_dir(folder).unwrap();
        }
    }
}

/// A folder that somebody else keeps locked holds a start up for a moment only, and one that cannot be read not at all.
#[test]
fn a_folder_that_cannot_be_locked_does_no_harm() {
    let dir = TempDir::new();
    let folder = dir.join("folder");
    fs::create_dir(&folder).unwrap();
    let sock = folder.join("control");
    leave_stale_socket(&sock);
    let locked = File::open(&folder).unwrap();
    assert!(flexnbd::sys::file::try_lock_folder(&locked).unwrap());
    let mut process = Process::spawn(&mut serve(&dir, "a", &sock));
    wait_for("an answer", SOON, || UnixStream::connect(&sock).ok());
    let log = fs::read_to_string(dir.join("a.log")).unwrap();
    assert!(log.contains(":W:") && log.contains("cannot lock this folder"), "{log}");
    process.signal("TERM");
    assert_eq!(process.wait(SOON).code(), Some(0));
    assert!(!sock.exists());
}
