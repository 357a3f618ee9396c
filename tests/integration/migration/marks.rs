//! The mark on an image: a wrong one is never served, whatever was killed and when.

use crate::support::fuse::{Disk, Op};
use crate::support::peers::{
    expect_exit, expect_migrated, expect_same, listen, listen_after, mirror, nowhere, send_image, start_mirror, tell,
    wait_for_status, At, Fault, Script, Worker,
};
use crate::support::{
    errno, has, kind, not_tested, pattern, program, request, run_command, wait_for, Builder, Loop, Mount, Need, Output,
    Server, TempDir, BIN, SOON,
};
use flexnbd::sys::file;
use std::ffi::CStr;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

const SIZE: usize = 4 << 20;
const NAME: &CStr = c"user.flexnbd.state";

/// What is marked here as one that comes.
const INCOMING: &str = "a migration into it has begun and is not known to be complete";

fn mark_of(image: &Path) -> Option<String> {
    let mut room = [0; 1024];
    match file::attribute(&File::open(image).unwrap(), NAME, &mut room) {
        Ok(length) => Some(String::from_utf8_lossy(&room[..length]).into_owned()),
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::ENODATA));
            None
        }
    }
}

fn set_mark(image: &Path, mark: &[u8]) {
    file::set_attribute(&File::options().write(true).open(image).unwrap(), NAME, mark).unwrap();
}

/// Whether files here can be marked; if not, that has been told.
fn has_marks() -> bool {
    let dir = TempDir::new();
    let marked = file::set_attribute(&File::create(dir.join("file")).unwrap(), NAME, b"x");
    if let Err(error) = &marked {
        not_tested(format_args!("the file system of temporary files has no attributes of users: {error}"));
    }
    marked.is_ok()
}

/// Starts `serve` on an image, which has to refuse it; returns the one line that says why.
#[track_caller]
fn refused(image: &Path, options: &[&str]) -> String {
    let sock = image.with_extension("refused");
    let mut command = program(BIN);
    command.args(["serve", "--addr", "127.0.0.1", "--port", "0"]).args(options);
    command.arg("--file").arg(image).arg("--sock").arg(&sock);
    let Output { code, stdout, stderr } = run_command(&mut command, &[]);
    assert_eq!((code, &*stdout), (Some(1), &b""[..]), "{stderr}");
    assert!(!sock.exists());
    let lines: Vec<_> = stderr.lines().filter(|line| !line.contains(":I:")).collect();
    assert!(lines.len() == 1 && lines[0].contains(":F:") && lines[0].contains("--adopt"), "{stderr}");
    lines[0].to_owned()
}

fn serve(image: &Path) -> Builder {
    Server::serve().file(image.to_owned())
}

/// Whether `serve` takes an image.
#[track_caller]
fn is_served(image: &Path) -> bool {
    let is_moved_or_comes = mark_of(image).is_some_and(|mark| !mark.starts_with("sends "));
    if is_moved_or_comes {
        refused(image, &[]);
    } else {
        serve(image).start().expect_healthy();
    }
    !is_moved_or_comes
}

#[test]
fn an_image_that_has_moved_is_served_where_it_is() {
    if !has_marks() {
        return;
    }
    let content = pattern(1, SIZE);
    let mut source = Server::serve().content(&content).start();
    let mut destination = listen(0).size(SIZE as u64).start();
    let address = destination.address();
    start_mirror(&source, address, "");
    expect_migrated(&mut source, &mut destination);
    let mark = mark_of(&source.image).unwrap();
    let time = mark.strip_prefix(&format!("moved {address} ")).unwrap();
    // A supervisor tries it again and again.
    for options in [&[][..], &["--read-only"], &["--shared-image"], &[]] {
        let line = refused(&source.image, options);
        assert!(line.contains(&format!("the image has moved to {address} at {time}")), "{line}");
    }
    assert_eq!(mark_of(&source.image).unwrap(), mark);
    assert_eq!(mark_of(&destination.image), None);
    assert!(is_served(&destination.image));

    // Whoever looks at it changes nothing.
    let look = serve(&source.image).args("--read-only --adopt").start();
    look.wait_for_log(&format!("has moved to {address}"));
    assert_eq!(look.connect().read(0, 512).unwrap(), content[..512]);
    look.expect_healthy();
    assert_eq!(mark_of(&source.image).unwrap(), mark);

    let adopted = serve(&source.image).arg("--adopt").start();
    adopted.wait_for_log("cleared its mark");
    assert_eq!(mark_of(&source.image), None);
    adopted.expect_healthy();
    assert!(is_served(&source.image));
}

/// Also where the file goes: another name of it may be left.
#[test]
fn an_image_that_is_unlinked_is_marked_before_that() {
    if !has_marks() {
        return;
    }
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let other = source.dir().join("other name");
    fs::hard_link(&source.image, &other).unwrap();
    let mut destination = listen(0).size(SIZE as u64).start();
    start_mirror(&source, destination.address(), "--unlink");
    expect_exit(&mut source, 0);
    expect_exit(&mut destination, 0);
    assert!(!source.image.exists());
    refused(&other, &[]);
    expect_same(&other, &destination.image);
}

#[test]
fn an_image_that_is_relayed_has_moved() {
    if !has_marks() {
        return;
    }
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut destination = listen(0).size(SIZE as u64).arg("--serve").start();
    let client = source.connect();
    start_mirror(&source, destination.address(), "--relay");
    wait_for("the relay", SOON, || source.status().line().contains(" relaying=true").then_some(()));
    refused(&source.image, &[]);
    assert_eq!(mark_of(&destination.image), None);
    drop(client);
    expect_exit(&mut source, 0);
    assert!(destination.stop().success());
    assert!(is_served(&destination.image) && !is_served(&source.image));
}

#[test]
fn an_image_that_stays_is_not_marked() {
    if !has_marks() {
        return;
    }
    // It goes on being served.
    let source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut destination = listen(0).size(SIZE as u64).start();
    let port = destination.port();
    assert_eq!(source.control(format!("mirror\n127.0.0.1\n{port}\nnothing\n\n")), "0: Mirror started\n");
    expect_exit(&mut destination, 0);
    assert_eq!((mark_of(&source.image), mark_of(&destination.image)), (None, None));

    // The migration is stopped, while it runs.
    let destination = listen(0).size(SIZE as u64).start();
    start_mirror(&source, destination.address(), "--max-speed 100000");
    assert!(mark_of(&source.image).unwrap().starts_with(&format!("sends {} ", destination.address())));
    assert_eq!(tell("break", &source, ""), (Some(0), "mirror stopped\n".into()));
    assert_eq!(mark_of(&source.image), None);

    // It does not start.
    assert_eq!(mirror(&source, nowhere(), "").code, Some(1));
    assert_eq!(mark_of(&source.image), None);

    // The source is stopped, or killed: what is left then refuses nothing.
    let mut source = source;
    assert!(source.stop().success());
    for signal in ["TERM", "KILL"] {
        let mut again = serve(&source.image).start();
        start_mirror(&again, destination.address(), "--max-speed 100000");
        again.stop_by(signal);
        assert!(mark_of(&source.image).unwrap().starts_with("sends "));
    }
    assert!(is_served(&source.image));
}

#[test]
fn a_part_of_an_image_is_not_served() {
    if !has_marks() {
        return;
    }
    let (old, new) = (pattern(1, SIZE), pattern(2, SIZE));
    let mut listener = listen(0).content(&old).start();
    let image = listener.image.clone();
    let mut sender = listener.connect();
    assert_eq!(sender.write(0, &new[..4096]), 0);
    assert_eq!(mark_of(&image).as_deref(), Some("incoming"));
    listener.stop_by("KILL");
    for options in [&[][..], &["--read-only"]] {
        let line = refused(&image, options);
        assert!(line.contains(INCOMING), "{line}");
    }

    // Who sends all of it and does not say so leaves a part, too, as far as anybody knows.
    let mut listener = listen(0).file(image.clone()).start();
    let mut sender = listener.connect();
    send_image(&mut sender, &new);
    assert_eq!(sender.flush(), 0);
    drop(sender);
    assert_eq!(listener.stop().code(), Some(1));
    assert!(refused(&image, &[]).contains(INCOMING));

    let mut listener = listen(0).file(image.clone()).start();
    let mut sender = listener.connect();
    send_image(&mut sender, &new);
    sender.send(&request(kind::DISC, 0, 0, 0, 0));
    sender.expect_closed();
    expect_exit(&mut listener, 0);
    assert_eq!(mark_of(&image), None);
    assert!(is_served(&image) && fs::read(&image).unwrap() == new);
}

#[test]
fn a_listener_that_nobody_wrote_to_leaves_the_mark() {
    if !has_marks() {
        return;
    }
    for mark in [None, Some("moved 10.0.0.2:4779 2026-11-30T08:15:00Z"), Some("incoming"), Some("whatever it is")] {
        let mut listener = listen(0).content(&pattern(1, SIZE)).start();
        let image = listener.image.clone();
        if let Some(mark) = mark {
            set_mark(&image, mark.as_bytes());
        }
        let mut sender = listener.connect();
        assert_eq!(sender.write(SIZE as u64, &[7; 512]), errno::ENOSPC);
        assert_eq!(sender.flush(), 0);
        assert_eq!(sender.read(0, 512).unwrap(), pattern(1, SIZE)[..512]);
        assert_eq!(mark_of(&image).as_deref(), mark);
        listener.stop_by("KILL");
        assert_eq!(mark_of(&image).as_deref(), mark);
        assert_eq!(is_served(&image), mark.is_none());

        let mut listener = listen(0).file(image.clone()).start();
        let mut source = Server::serve().content(&pattern(2, SIZE)).start();
        start_mirror(&source, listener.address(), "");
        expect_migrated(&mut source, &mut listener);
        assert_eq!(mark_of(&image), None);
    }
}

/// Whoever may write the file may write there what he likes.
#[test]
fn what_is_no_mark_is_refused_in_one_line() {
    if !has_marks() {
        return;
    }
    let source = Server::serve().content(&pattern(1, 8192)).start();
    let image = source.dir().join("other");
    fs::copy(&source.image, &image).unwrap();
    let long = [b'x'; 300];
    let values: [(&[u8], &str); 7] = [
        (b"", "is \"\""),
        (b"moved", "is \"moved\""),
        (b"moved 10.0.0.2:4779 yesterday", "yesterday"),
        (b"sends 10.0.0.2:4779 2026-11-30T08:15:00Z\n", "08:15:00Z\\n\""),
        (b"x\n1:F:1 main x.rs:1: forged \x1b[2J\x07", "x\\n1:F:1 main x.rs:1: forged \\u001b[2J\\u0007"),
        (b"\xff\xfe", "\u{fffd}\u{fffd}"),
        (&long, "longer than 256 bytes"),
    ];
    for (value, part) in values {
        set_mark(&image, value);
        let line = refused(&image, &[]);
        assert!(line.contains(part) && !line.contains(char::is_control), "{line:?}");
        let adopted = serve(&image).arg("--adopt").start();
        adopted.expect_healthy();
        assert_eq!(mark_of(&image), None);
    }
    set_mark(&image, b"sends 10.0.0.2:4779 2026-11-30T08:15:00Z");
    serve(&image).start().expect_healthy();
}

/// One line at the beginning of a migration says that nothing protects the image, and that is all.
#[test]
fn where_there_are_no_marks_nothing_else_is_different() {
    let (Some(here), Some(there)) = (Disk::mount(4 * SIZE as u64), Disk::mount(4 * SIZE as u64)) else { return };
    for disk in [&here, &there] {
        disk.fail(Op::Xattr, .., libc::EOPNOTSUPP);
    }
    let images = [here.furnish("image", &pattern(1, SIZE)), there.furnish_sparse("image", SIZE as u64)];
    migrate_unprotected(&images);
    assert_eq!([&here, &there].map(|disk| disk.count(Op::FsyncAll)), [0, 0]);
}

#[test]
fn block_devices_have_no_marks() {
    let dir = TempDir::new();
    let files = ["source", "destination"].map(|name| dir.join(name));
    for (seed, file) in (1..).zip(&files) {
        fs::write(file, pattern(seed, SIZE)).unwrap();
    }
    let [Some(from), Some(to)] = [&files[0], &files[1]].map(|file| Loop::attach(file)) else { return };
    migrate_unprotected(&[from.path().to_owned(), to.path().to_owned()]);
}

#[track_caller]
fn migrate_unprotected([from, to]: &[PathBuf; 2]) {
    let mut source = serve(from).start();
    let mut destination = listen(0).file(to.clone()).start();
    start_mirror(&source, destination.address(), "");
    for server in [&mut source, &mut destination] {
        expect_exit(server, 0);
        let log = server.log();
        let warnings: Vec<_> = log.lines().filter(|line| line.contains(":W:")).collect();
        assert!(warnings.len() == 1 && warnings[0].contains("no mark can be set on it"), "{log}");
    }
    for image in [from, to] {
        serve(image).start().expect_healthy();
    }
}

/// A disk that has no room for the mark says so before anything has been sent, or changed.
#[test]
fn a_disk_without_room_for_the_mark() {
    let (Some(here), Some(there)) = (Disk::mount(4 * SIZE as u64), Disk::mount(4 * SIZE as u64)) else { return };
    let mut source = serve(&here.furnish("image", &pattern(1, SIZE))).start();
    let mut listener = listen(0).file(there.furnish_sparse("image", SIZE as u64)).start();
    let port = listener.port();
    here.fail(Op::Xattr, .., libc::ENOSPC);
    let refusal = mirror(&source, listener.address(), "");
    assert_eq!(refusal.code, Some(1));
    assert!(
        refusal.stderr.contains("cannot mark the image") && refusal.stderr.contains("No space"),
        "{}",
        refusal.stderr
    );
    assert_eq!(source.status().get("is_mirroring"), "false");
    here.heal(Op::Xattr);

    there.fail(Op::Xattr, .., libc::ENOSPC);
    start_mirror(&source, listener.address(), "--max-speed 2000000");
    expect_exit(&mut listener, 1);
    let log = listener.log();
    let last = log.lines().last().unwrap();
    assert!(last.contains(":F:") && last.contains("cannot mark the image"), "{log}");
    assert_eq!(there.count(Op::Write), 0);
    there.heal(Op::Xattr);

    // It gets full on the way: that attempt fails, and clients notice nothing. (Nothing else asks for attributes: the kernel
    // does before it writes, but nobody does that.)
    let mut client = source.connect();
    let mut listener = listen(port).file(listener.image.clone()).start();
    wait_for_status(&source, "migration_phase", "copying");
    here.fail_once(Op::Xattr, .., libc::ENOSPC);
    wait_for("the failure", SOON, || source.status().line().contains("=cannot_mark_the_image").then_some(()));
    client.expect_alive();
    expect_migrated(&mut source, &mut listener);
}

#[test]
fn the_first_byte_changes_when_the_mark_is_durable() {
    if !has(&[Need::Ring]) {
        return;
    }
    let Some(disk) = Disk::mount(4 * SIZE as u64) else { return };
    let old = pattern(1, SIZE);
    let mut listener = listen(0).file(disk.furnish("image", &old)).engine("ring").start();
    disk.hold(Op::FsyncAll, ..);
    let mut sender = listener.connect();
    for (kind, payload) in [(kind::WRITE, &[7_u8; 512][..]), (kind::TRIM, &[])] {
        sender.send(&request(kind, 0, 1, 4096, 512));
        sender.send(payload);
    }
    disk.wait_for_waiting(Op::FsyncAll, 1);
    // A server that did more would have by now.
    (0..3).for_each(|_| drop(listener.status()));
    assert_eq!((disk.count(Op::Write), disk.count(Op::Fallocate)), (0, 0));
    assert!(fs::read(&listener.image).unwrap() == old);
    disk.heal(Op::FsyncAll);
    for _ in 0..2 {
        assert_eq!(sender.read_reply().0, 0);
    }
    for remains in disk.power_failures(1) {
        assert_eq!(remains.xattr("image", "user.flexnbd.state"), Some(&b"incoming"[..]));
    }

    // At its end, the image is durable before the mark goes, and that is before anybody hears of it.
    send_image(&mut sender, &pattern(2, SIZE));
    disk.hold(Op::Fsync, ..);
    disk.hold(Op::FsyncAll, ..);
    sender.send(&request(kind::DISC, 0, 0, 0, 0));
    disk.wait_for_waiting(Op::Fsync, 1);
    assert_eq!(mark_of(&listener.image).as_deref(), Some("incoming"));
    disk.heal(Op::Fsync);
    disk.wait_for_waiting(Op::FsyncAll, 1);
    assert_eq!(disk.pending(), ["removexattr image user.flexnbd.state"]);
    assert!(listener.process.is_running() && !listener.log().contains("complete"));
    disk.heal(Op::FsyncAll);
    sender.expect_closed();
    expect_exit(&mut listener, 0);
    assert!(disk.pending().is_empty());
}

/// A server of an image on a disk, with a ring, so that it goes on while the disk is held.
fn serve_on(disk: &Disk) -> Server {
    disk.furnish("image", &pattern(1, SIZE));
    serve(&disk.path("image")).engine("ring").start()
}

/// Starts a migration, and stops it where the source's mark is being made durable.
#[track_caller]
fn stop_at_mark(disk: &Disk, source: &Server, destination: SocketAddr) {
    disk.hold(Op::FsyncAll, ..);
    start_mirror(source, destination, "");
    disk.wait_for_waiting(Op::FsyncAll, 1);
    assert!(mark_of(&source.image).unwrap().starts_with(&format!("moved {destination} ")));
}

/// Whether a power failure may leave an image that has moved.
fn may_be_moved(disk: &Disk) -> bool {
    disk.power_failures(1).any(|remains| {
        let mark = remains.xattr("image", "user.flexnbd.state");
        mark.is_some_and(|mark| mark.starts_with(b"moved "))
    })
}

#[test]
fn clients_go_on_when_it_is_durable_that_the_image_stays() {
    if !has(&[Need::Ring]) {
        return;
    }
    for is_broken in [true, false] {
        let Some(disk) = Disk::mount(4 * SIZE as u64) else { return };
        let source = serve_on(&disk);
        let mut client = source.connect();
        let worker = Worker::on(&source);
        let faults: &[_] = if is_broken { &[] } else { &[(At::LastFlush, Fault::AnswerAndClose)] };
        let destination = Script::new(SIZE).faults(faults).busy_with(&worker).start();
        stop_at_mark(&disk, &source, destination.address);
        if is_broken {
            assert_eq!(tell("break", &source, ""), (Some(0), "mirror stopped\n".into()));
        } else {
            source.wait_for_log("attempt 1 failed");
        }
        assert!(may_be_moved(&disk));
        client.send(&request(kind::READ, 0, 1, 0, 512));
        // A server that answered would have by now.
        (0..3).for_each(|_| drop(source.status()));
        client.stream.set_nonblocking(true).unwrap();
        assert!(client.stream.peek(&mut [0]).is_err());
        client.stream.set_nonblocking(false).unwrap();
        disk.heal(Op::FsyncAll);
        assert_eq!(client.read_reply().0, 0);
        assert!(!may_be_moved(&disk));
        if !is_broken {
            assert_eq!(tell("break", &source, ""), (Some(0), "mirror stopped\n".into()));
        }
        drop(client);
        worker.stop();
        assert_eq!(mark_of(&source.image), None);
        source.expect_healthy();
    }
}

/// It does not wait for the disk, but says what it leaves.
#[test]
fn a_source_that_is_stopped_at_its_mark() {
    if !has(&[Need::Ring]) {
        return;
    }
    let Some(disk) = Disk::mount(4 * SIZE as u64) else { return };
    let mut source = serve_on(&disk);
    let listener = listen(0).size(SIZE as u64).start();
    stop_at_mark(&disk, &source, listener.address());
    source.process.signal("TERM");
    let line = source.wait_for_log(":F:");
    assert!(line.contains("the image here is the one that counts, once serve --adopt has cleared its mark"), "{line}");
    disk.heal(Op::FsyncAll);
    expect_exit(&mut source, 1);
    refused(&source.image, &[]);
    assert_eq!(mark_of(&listener.image).as_deref(), Some("incoming"));
}

/// What the disk cannot make durable is no mark; the server goes on as with any disk that fails.
#[test]
fn a_mark_that_cannot_be_made_durable_fails_the_attempt() {
    if !has(&[Need::Ring]) {
        return;
    }
    let Some(here) = Disk::mount(4 * SIZE as u64) else { return };
    let source = serve_on(&here);
    let listener = listen(0).size(SIZE as u64).start();
    here.fail(Op::FsyncAll, .., libc::EIO);
    start_mirror(&source, listener.address(), "");
    source.wait_for_log("failed: cannot mark the image");
    assert_eq!(source.connect().write(0, &[7; 512]), 0);
    assert_eq!(tell("break", &source, ""), (Some(0), "mirror stopped\n".into()));
    assert_eq!(mark_of(&source.image), None);
    source.expect_healthy();
}

#[test]
fn a_block_device_that_is_in_use_is_not_overwritten() {
    let dir = TempDir::new();
    let file = dir.join("disk");
    fs::write(&file, pattern(1, SIZE)).unwrap();
    let Some(device) = Loop::attach(&file) else { return };
    // As mount, LVM and others do.
    let user = File::options().read(true).custom_flags(libc::O_EXCL).open(device.path()).unwrap();
    let path = device.path().to_str().unwrap();
    let listen_there = || {
        let mut command = program(BIN);
        command.args(["listen", "--addr", "127.0.0.1", "--port", "0", "--file", path]);
        run_command(&mut command, &[])
    };
    let refusal = listen_there();
    assert_eq!(refusal.code, Some(1));
    let line = format!("cannot open \"{path}\": it is a block device in use");
    assert!(refusal.stderr.lines().count() == 1 && refusal.stderr.contains(&line), "{}", refusal.stderr);
    // It may be served: its owner may mean that.
    serve(device.path()).start().expect_healthy();
    drop(user);
    let listener = listen(0).file(device.path().to_owned()).start();
    let taken = File::options().read(true).custom_flags(libc::O_EXCL).open(device.path());
    assert_eq!(taken.unwrap_err().raw_os_error(), Some(libc::EBUSY), "nobody mounts it meanwhile");
    drop(listener);
}

#[test]
fn a_mounted_device_is_not_overwritten() {
    let Some(mount) = Mount::make("ext4") else { return };
    fs::write(mount.join("precious"), "data").unwrap();
    let devices = fs::read_to_string("/proc/mounts").unwrap();
    let point = mount.join("");
    let point = point.to_str().unwrap().trim_end_matches('/');
    let device = devices.lines().find_map(|line| {
        let mut words = line.split(' ');
        let device = words.next()?;
        (words.next() == Some(point)).then_some(device)
    });
    let mut command = program(BIN);
    command.args(["listen", "--addr", "127.0.0.1", "--port", "0", "--file", device.unwrap()]);
    let refusal = run_command(&mut command, &[]);
    assert_eq!(refusal.code, Some(1));
    assert!(refusal.stderr.contains("in use: mounted"), "{}", refusal.stderr);
    assert_eq!(fs::read_to_string(mount.join("precious")).unwrap(), "data");
}

/// Kills one side at a system call, then the other, and serves both images.
#[test]
fn whoever_is_killed_at_most_one_image_is_served_and_no_part_of_one() {
    if !has_marks() || !has(&[Need::Program("strace")]) {
        return;
    }
    let content = pattern(1, SIZE);
    // The last two are met with --unlink alone; an unlink at the start is that of a file beside the control socket.
    let at_source = ["fsetxattr:1", "fdatasync:1", "fsetxattr:2", "fsync:1", "exit_group:1", "unlink:2", "fsync:2"];
    let at_destination = [
        "fsetxattr:1",
        "fsync:1",
        "pwrite64:1",
        "pwrite64:2",
        "pwrite64:9",
        "fdatasync:1",
        "fdatasync:2",
        "fremovexattr:1",
        "fsync:2",
        "exit_group:1",
    ];
    let (mut killed, mut ends) = (0, [0; 3]);
    for (n, point) in at_source.iter().chain(&at_destination).enumerate() {
        for unlinks in [false, true] {
            let (call, when) = point.split_once(':').unwrap();
            let inject = format!("inject={call}:signal=KILL:when={when}");
            let trace = format!("trace={call}");
            let strace = ["strace", "-D", "-f", "-o", "/dev/null", "-e", &trace, "-e", &inject];
            let is_source = n < at_source.len();
            let source = Server::serve().content(&content);
            // What a ring does strace does not see, and the kernel unlocks the image some time after a killed server's end.
            let (mut source, mut destination) = if is_source {
                let destination = listen(0).engine("sync").size(SIZE as u64);
                (source.engine("sync").through(&strace).start(), destination.start())
            } else {
                let killed = listen_after(0, &format!("exec {}", strace.join(" "))).engine("sync");
                (source.engine("sync").start(), killed.size(SIZE as u64).start())
            };
            mirror(&source, destination.address(), if unlinks { "--unlink" } else { "" });
            let victim = if is_source { &mut source } else { &mut destination };
            let status = victim.process.wait(SOON);
            killed += usize::from(status.signal() == Some(9));
            for server in [&mut source, &mut destination] {
                if server.process.is_running() {
                    server.stop_by("KILL");
                }
            }
            let (here, there) = (&source.image, &destination.image);
            let is_blank = fs::read(there).unwrap().iter().all(|&byte| byte == 0);
            let old_serves = here.exists() && is_served(here);
            let copy_serves = !is_blank && is_served(there);
            assert!(!(old_serves && copy_serves), "{point}: two");
            if copy_serves {
                assert!(fs::read(there).unwrap() == content, "{point}: a part");
            }
            if old_serves {
                assert!(fs::read(here).unwrap() == content, "{point}: the source has changed");
            }
            if !old_serves && !copy_serves {
                // Where the source says that it has moved, the copy is whole.
                assert!(!here.exists() || mark_of(here).unwrap().starts_with("moved "), "{point}");
                serve(there).arg("--adopt").start().expect_healthy();
                assert!(fs::read(there).unwrap() == content, "{point}: a part was adopted");
            }
            ends[usize::from(old_serves) + 2 * usize::from(copy_serves)] += 1;
        }
    }
    eprintln!("{killed} were killed; then neither, the source, the destination was served: {ends:?}");
    assert!(killed >= 28 && ends.iter().all(|&times| times > 0), "{killed} {ends:?}");
}
