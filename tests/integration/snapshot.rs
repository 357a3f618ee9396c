//! `snapshot`: a second file with the image as it is at one moment, while clients go on.

use crate::support::newstyle::PORT;
use crate::support::peers::{listen, start_mirror};
use crate::support::{
    has, kind, must, pattern, program, run, run_command, wait_for, Builder, Loop, Mount, Need, Output, Process, Server,
    TempDir, BIN, SOON,
};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

const SIZE: usize = 4 << 20;
const KINDS: [&str; 2] = ["btrfs", "xfs"];

fn arguments<'a>(server: &'a Server, to: &'a Path) -> [&'a str; 5] {
    ["snapshot", "--sock", server.sock.to_str().unwrap(), "--to", to.to_str().unwrap()]
}

fn snapshot(server: &Server, to: &Path) -> Output {
    run(&arguments(server, to), &[])
}

#[track_caller]
fn refused(server: &Server, to: &Path, why: &str) {
    let output = snapshot(server, to);
    assert!(output.code == Some(1) && output.stderr.contains(why) && output.stdout.is_empty(), "{output:?}");
}

/// A server of an image on a file system where files can share blocks.
fn serve_on(mount: &Mount, content: &[u8]) -> Builder {
    let image = mount.join("image");
    fs::write(&image, content).unwrap();
    Server::serve().file(image)
}

#[test]
fn it_has_what_was_answered_and_nothing_that_comes_later() {
    for mount in KINDS.into_iter().filter_map(Mount::make) {
        let mut content = pattern(1, SIZE + 100);
        let server = serve_on(&mount, &content).start();
        fs::set_permissions(&server.image, PermissionsExt::from_mode(0o640)).unwrap();
        let mut client = server.connect();
        let (first, second) = (pattern(2, 9000), pattern(3, 9000));
        assert_eq!(client.write(12_345, &first), 0);
        content[12_345..12_345 + 9000].copy_from_slice(&first);
        // With a blank, and from the folder in which the command runs.
        let copy = mount.join("the copy");
        let mut command = program(BIN);
        command.args(["snapshot", "--to", "the copy", "--sock"]).arg(&server.sock).current_dir(mount.join(""));
        let output = run_command(&mut command, &[]);
        assert!(output.code == Some(0) && output.stdout.starts_with(b"snapshot made"), "{output:?}");
        assert_eq!(client.write(12_000, &second), 0);
        assert_eq!(client.flush(), 0);
        assert!(fs::read(&copy).unwrap() == content);
        assert_eq!(fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o640, "nobody else may read it");
        content[12_000..21_000].copy_from_slice(&second);
        assert!(fs::read(&server.image).unwrap() == content);
        // The copy is an image like any other, and what is written there stays there.
        let other = Server::serve().file(copy.clone()).start();
        assert_eq!(other.connect().write(0, &second), 0);
        assert_eq!(client.read(0, 9000).unwrap(), content[..9000]);
        refused(&server, &copy, "exists, and stays as it is");
        let copied = fs::read(&copy).unwrap();
        assert!(copied[..9000] == second && copied.len() == SIZE + 100);
        assert!(server.log().is_empty() || server.log().contains("not made"), "{}", server.log());
        other.expect_healthy();
        server.expect_healthy();
    }
}

/// Files that btrfs writes in place share blocks with files of their kind alone.
#[test]
fn images_that_are_written_in_place() {
    if !has(&[Need::Program("chattr")]) {
        return;
    }
    let Some(mount) = Mount::make("btrfs") else { return };
    let image = mount.join("image");
    File::create(&image).unwrap();
    must("chattr", &["+C", image.to_str().unwrap()]);
    let content = pattern(1, SIZE);
    fs::write(&image, &content).unwrap();
    let server = Server::serve().file(image).start();
    let output = snapshot(&server, &mount.join("copy"));
    assert_eq!(output.code, Some(0), "{output:?}");
    assert!(fs::read(mount.join("copy")).unwrap() == content);
}

/// A writer counts in two blocks, the second after the first was answered: at any one moment they differ by one at most.
#[test]
fn it_is_one_moment_of_a_writer() {
    for mount in KINDS.into_iter().filter_map(Mount::make) {
        let server = serve_on(&mount, &vec![0; SIZE]).arg(PORT).start();
        let (answered, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        let block = |count: u64| count.to_be_bytes().repeat(512);
        thread::scope(|scope| {
            let mut client = server.connect();
            let (answered, stop) = (&answered, &stop);
            scope.spawn(move || {
                for count in 1_u64.. {
                    assert_eq!(client.write(0, &block(count)), 0);
                    assert_eq!(client.write(SIZE as u64 - 4096, &block(count)), 0);
                    answered.store(count, Ordering::Release);
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
            for number in 0..20 {
                let before = answered.load(Ordering::Acquire);
                let copy = mount.join(&format!("copy-{number}"));
                let output = snapshot(&server, &copy);
                stop.store(number == 19 || output.code != Some(0), Ordering::Relaxed);
                assert_eq!(output.code, Some(0), "{output:?}");
                let copied = fs::read(copy).unwrap();
                let counts = [&copied[..4096], &copied[SIZE - 4096..]].map(|found| {
                    let count = u64::from_be_bytes(found[..8].try_into().unwrap());
                    assert!(found == block(count), "half a block");
                    count
                });
                let [first, second] = counts;
                assert!(first == second || first == second + 1, "{counts:?} in snapshot {number}");
                assert!(second >= before, "{before} had been answered, and {second} is there");
                wait_for("the writer", SOON, || (answered.load(Ordering::Acquire) > before).then_some(()));
            }
        });
        server.expect_healthy();
    }
}

/// A server whose child process takes `seconds` before the file is durable.
fn slow(mount: &Mount, content: &[u8], seconds: u32) -> Option<Server> {
    let delay = format!("inject=fsync:delay_enter={seconds}000000");
    let strace = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fsync", "-e", &delay];
    let needs = [Need::Program("strace"), Need::Kernel("strace -qq -o /dev/null true")];
    has(&needs).then(|| serve_on(mount, content).through(&strace).arg("-v").start())
}

fn start(server: &Server, to: &Path) -> Process {
    let mut command = program(BIN);
    command.args(arguments(server, to)).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
    let process = Process::spawn(&mut command);
    server.wait_for_log("being made");
    process
}

#[test]
fn changes_wait_and_reads_go_on() {
    let Some(mount) = Mount::make("btrfs") else { return };
    let content = pattern(1, SIZE);
    let Some(server) = slow(&mount, &content, 3) else { return };
    let copy = mount.join("copy");
    let (mut writer, mut reader) = (server.connect(), server.connect());
    let mut made = start(&server, &copy);
    let payload = pattern(2, 4096);
    writer.send_request(kind::WRITE, 0, 7, 0, 4096, &payload);
    assert_eq!(reader.read(0, 4096).unwrap(), content[..4096], "it has not changed");
    assert_eq!(reader.flush(), 0);
    refused(&server, &mount.join("other"), "a snapshot is being made");
    let output = run(&["resize", "--sock", server.sock.to_str().unwrap()], &[]);
    assert!(output.stderr.contains("a snapshot is being made"), "{output:?}");
    assert!(made.is_running() && !copy.exists(), "this machine took more than 3 s for a few requests");
    assert!(made.wait(SOON).success());
    assert_eq!(writer.read_reply(), (0, 7));
    assert!(fs::read(&copy).unwrap() == content);
    assert_eq!(reader.read(0, 4096).unwrap(), payload);
}

/// No stage of it keeps the server from stopping, and none leaves anything behind.
#[test]
fn whatever_ends_the_server_leaves_no_half_file() {
    let Some(mount) = Mount::make("btrfs") else { return };
    for signal in ["TERM", "KILL"] {
        let Some(mut server) = slow(&mount, &pattern(1, SIZE), 60) else { return };
        let mut made = start(&server, &mount.join("copy"));
        let ended = server.stop_by(signal);
        assert_eq!(ended.code(), (signal == "TERM").then_some(0), "{}", server.log());
        assert_eq!(made.wait(SOON).code(), Some(1));
        let mut said = String::new();
        made.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said == "no snapshot: the server has been stopped\n", signal == "TERM", "{said}");
        let names: Vec<_> = fs::read_dir(mount.join("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["image"]);
    }
}

/// Clients are not kept for ever by a file system that hangs.
#[test]
#[ignore = "it takes 20 s"]
fn what_takes_too_long_is_given_up() {
    let Some(mount) = Mount::make("btrfs") else { return };
    let Some(server) = slow(&mount, &pattern(1, SIZE), 25) else { return };
    let mut made = start(&server, &mount.join("copy"));
    let mut client = server.connect();
    let payload = pattern(2, 4096);
    client.send_request(kind::WRITE, 0, 7, 0, 4096, &payload);
    assert_eq!(made.wait(2 * SOON).code(), Some(1));
    assert_eq!(client.read_reply(), (0, 7));
    assert!(server.log().contains("not done within 20 s"), "{}", server.log());
    assert!(!mount.join("copy").exists());
    server.expect_healthy();
}

#[test]
fn where_it_cannot_be_the_reason_is_said() {
    let server = Server::serve().size(SIZE as u64).start();
    let copy = server.dir().join("copy");
    if let Some(mount) = Mount::tmpfs("16m") {
        let on_tmpfs = serve_on(&mount, &pattern(1, SIZE)).start();
        refused(&on_tmpfs, &mount.join("copy"), "cannot let two files share blocks; btrfs can");
        refused(&on_tmpfs, &copy, "another file system");
        refused(&on_tmpfs, &mount.join("there/copy"), "there is no folder");
        fs::write(mount.join("copy"), b"mine").unwrap();
        assert_eq!(snapshot(&on_tmpfs, &mount.join("copy")).code, Some(1));
        assert_eq!(fs::read(mount.join("copy")).unwrap(), b"mine");
        on_tmpfs.expect_healthy();
    }
    assert_eq!(server.control("snapshot\ncopy\n\n"), "1: bad path: copy: it has to begin with '/'\n");
    let listener = listen(0).size(SIZE as u64).start();
    refused(&listener, &copy, "there is no image yet");
    let proxy = Server::proxy(server.address()).start();
    refused(&proxy, &copy, "this is a proxy");
    let reader = Server::serve().file(server.image.clone()).arg("--read-only").start();
    refused(&reader, &copy, "read-only");
    let source = Server::serve().content(&pattern(1, SIZE)).start();
    start_mirror(&source, listener.address(), "--max-speed 1000");
    refused(&source, &copy, "a migration is running");
    let shared = TempDir::new();
    let image = shared.join("image");
    fs::write(&image, pattern(1, SIZE)).unwrap();
    let two = [(); 2].map(|()| Server::serve().file(image.clone()).arg("--shared-image").start());
    refused(&two[0], &copy, "another server has the image open");
    if let Some(device) = Loop::attach(&image) {
        refused(&Server::serve().file(device.path().to_owned()).start(), &copy, "a block device");
    }
    assert!(!copy.exists());
}
