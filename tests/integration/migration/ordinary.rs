//! Migrations that go as they should, and the modes that start, watch, limit and refuse them.

use crate::support::peers::{
    expect_exit, expect_migrated, expect_same, listen, mirror, nowhere, start_mirror, tell, wait_for_status, At, Fault,
    Script, Worker,
};
use crate::support::{
    allocated, has, kind, pattern, program, run, run_command, wait_for, Loop, Need, Process, Scripted, Server, TempDir,
    BIN, SOON,
};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

/// The example of the manual, pasted into a shell, with paths and ports of this test.
#[test]
fn the_example_of_the_manual() {
    const SCRIPT: &str = r#"
        set -e
        await() { for i in $(seq 3000); do [ -S "$1" ] && return; sleep 0.01; done; exit 99; }
        dd if=/dev/urandom of=$TMP/data bs=1024 count=1K 2>&1
        truncate -s 1M $TMP/data.copy
        flexnbd serve --file $TMP/data --addr 0.0.0.0 --port $SOURCE \
            --sock $TMP/flex-source.sock &
        SOURCE_PID=$!
        flexnbd listen --file $TMP/data.copy --addr 0.0.0.0 --port $DEST \
            --sock $TMP/flex-dest.sock &
        DEST_PID=$!
        await $TMP/flex-source.sock; await $TMP/flex-dest.sock
        flexnbd status --sock $TMP/flex-source.sock > $TMP/source.status
        flexnbd status --sock $TMP/flex-dest.sock > $TMP/dest.status
        grep -q "^pid=$SOURCE_PID is_mirroring=false has_control=true\b" $TMP/source.status
        grep -q "^pid=$DEST_PID is_mirroring=false has_control=false\b" $TMP/dest.status
        flexnbd mirror --addr 127.0.0.1 --port $DEST \
            --sock $TMP/flex-source.sock
        wait $SOURCE_PID && echo source done
        wait $DEST_PID && echo destination done
        cmp $TMP/data $TMP/data.copy && echo equal
    "#;
    let dir = TempDir::new();
    let folder = Path::new(BIN).parent().unwrap();
    let path = std::env::join_paths(
        [folder.to_path_buf()].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
    );
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT]).env("TMP", dir.join("")).env("PATH", path.unwrap());
    command.env("SOURCE", nowhere().port().to_string()).env("DEST", nowhere().port().to_string());
    let output = run_command(&mut command, &[]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.ends_with("Migration started\nsource done\ndestination done\nequal\n"), "{said}{}", output.stderr);
    assert_eq!((output.code, &*output.stderr), (Some(0), ""));
    for name in ["flex-source.sock", "flex-dest.sock"] {
        assert!(!dir.join(name).exists(), "{name} is left");
    }
}

/// Holes stay holes, and what was in the destination where the source has a hole is gone.
#[test]
fn holes_stay_holes_and_stale_data_goes() {
    const SIZE: usize = 32 << 20;
    let mut source = Server::serve().size(SIZE as u64).start();
    let file = File::options().write(true).open(&source.image).unwrap();
    for (number, offset) in [0, 5_000_000, 16 << 20, SIZE - 300_000].into_iter().enumerate() {
        file.write_all_at(&pattern(number as u64, 300_000), offset as u64).unwrap();
    }
    let mut destination = listen(0).content(&pattern(9, SIZE)).start();
    start_mirror(&source, destination.address(), "");
    expect_migrated(&mut source, &mut destination);
    assert_eq!(source.log(), "", "nothing went wrong");
    file.sync_all().unwrap();
    File::open(&destination.image).unwrap().sync_all().unwrap();
    let (before, after) = (allocated(&source.image), allocated(&destination.image));
    assert!(after <= before + (1 << 20), "{before} bytes became {after}");
}

/// The size of a hole costs neither time nor room.
#[test]
fn two_tebibytes_with_little_in_them() {
    const SIZE: u64 = 2 << 40;
    const PIECES: u64 = 64;
    const PIECE: usize = 1 << 20;
    let mut source = Server::serve().size(SIZE).arg("-v").start();
    let file = File::options().write(true).open(&source.image).unwrap();
    let offset = |number: u64| (SIZE - PIECE as u64) / (PIECES - 1) * number / 4096 * 4096;
    for number in 0..PIECES {
        file.write_all_at(&pattern(number, PIECE), offset(number)).unwrap();
    }
    let mut destination = listen(0).size(SIZE).start();
    let began = Instant::now();
    start_mirror(&source, destination.address(), "");
    expect_exit(&mut source, 0);
    expect_exit(&mut destination, 0);
    let took = began.elapsed();
    eprintln!("2 TiB with 64 MiB of data: {took:?}");
    let copy = File::open(&destination.image).unwrap();
    for number in 0..PIECES {
        let mut found = vec![0; PIECE];
        copy.read_exact_at(&mut found, offset(number)).unwrap();
        assert!(found == pattern(number, PIECE), "piece {number}");
    }
    copy.sync_all().unwrap();
    assert_eq!(copy.metadata().unwrap().len(), SIZE);
    assert!(allocated(&destination.image) < (64 << 20) + (4 << 20), "{}", allocated(&destination.image));
    let line = source.log().lines().find(|line| line.contains(": complete: ")).unwrap().to_owned();
    let sent: u64 = line.split(": complete: ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((64 << 20..(64 << 20) + (16 << 20)).contains(&sent), "{line}");
}

/// Odd sizes: one sector over, the smallest, and a tail that is not served.
#[test]
fn images_of_odd_sizes() {
    for size in [4096, 4608, 65_536, 65_536 + 512, (1 << 20) - 512] {
        let mut source = Server::serve().content(&pattern(1, size)).start();
        let mut destination = listen(0).size(size as u64).start();
        start_mirror(&source, destination.address(), "");
        expect_migrated(&mut source, &mut destination);
    }
    let mut source = Server::serve().content(&pattern(1, 5000)).start();
    let mut destination = listen(0).size(4608).start();
    start_mirror(&source, destination.address(), "");
    expect_exit(&mut source, 0);
    expect_exit(&mut destination, 0);
    assert!(fs::read(&destination.image).unwrap() == pattern(1, 5000)[..4608]);
    assert_eq!(fs::metadata(&source.image).unwrap().len(), 5000, "the tail is nobody's business");
}

#[test]
fn the_file_is_deleted_if_asked() {
    let mut source = Server::serve().content(&pattern(1, 1 << 20)).start();
    let mut destination = listen(0).size(1 << 20).start();
    start_mirror(&source, destination.address(), "--unlink");
    expect_exit(&mut source, 0);
    expect_exit(&mut destination, 0);
    assert!(!source.image.exists());
    assert!(fs::read(&destination.image).unwrap() == pattern(1, 1 << 20));
}

/// A file that is to be deleted is there until the destination has confirmed everything, and gone before it hears DISC.
#[test]
fn the_file_is_deleted_at_the_commit_only() {
    let source = Server::serve().content(&pattern(1, 1 << 20)).start();
    let refuses = Script::new(1 << 20).faults(&[(At::FirstFlush, Fault::Error), (At::Disc, Fault::Hang)]).start();
    start_mirror(&source, refuses.address, "--unlink");
    wait_for_status(&source, "migration_phase", "retrying");
    assert!(source.image.exists());
    wait_for_status(&source, "migration_phase", "finishing");
    assert!(!source.image.exists());
}

#[test]
fn what_cannot_be_migrated_is_refused() {
    let refused = |source: &Server, more: &str, text: &str| {
        // Before anybody is connected to.
        let output = mirror(source, nowhere(), more);
        assert_eq!(output.code, Some(1));
        assert!(output.stderr.contains(text) && output.stderr.lines().count() == 1, "{}", output.stderr);
        assert_eq!(source.status().get("is_mirroring"), "false");
        assert!(source.image.exists());
    };
    let source = Server::serve().content(&pattern(1, 5000)).start();
    refused(&source, "--unlink", "no whole sector");
    refused(&source, "-u", "not unlinking");
    source.expect_healthy();
    let source = Server::serve().content(&pattern(1, 3584)).start();
    refused(&source, "", "4096");
    source.expect_healthy();

    let dir = TempDir::new();
    let file = dir.join("disk");
    fs::write(&file, pattern(1, 1 << 20)).unwrap();
    let Some(device) = Loop::attach(&file) else { return };
    let mut source = Server::serve().file(device.path().into()).start();
    refused(&source, "--unlink", "device");
    let mut destination = listen(0).size(1 << 20).start();
    start_mirror(&source, destination.address(), "");
    expect_exit(&mut source, 0);
    expect_exit(&mut destination, 0);
    expect_same(&file, &destination.image);
}

/// With `nothing` as its action, the source goes on, with the clients it had; it can do it again.
#[test]
fn a_copy_is_made_and_the_source_goes_on() {
    let source = Server::serve().content(&pattern(1, 1 << 20)).start();
    let worker = Worker::on(&source);
    for _ in 0..3 {
        let mut destination = listen(0).size(1 << 20).start();
        let answer = source.control(format!("mirror\n127.0.0.1\n{}\nnothing\n\n", destination.port()));
        assert_eq!(answer, "0: Mirror started\n");
        expect_exit(&mut destination, 0);
        wait_for_status(&source, "is_mirroring", "false");
        worker.expect_progress();
    }
    worker.stop().check(&source.image);
    let mut destination = listen(0).size(1 << 20).start();
    let answer = source.control(format!("mirror\n127.0.0.1\n{}\nnothing\n\n", destination.port()));
    assert_eq!(answer, "0: Mirror started\n");
    expect_exit(&mut destination, 0);
    expect_same(&source.image, &destination.image);
    source.expect_healthy();
}

#[test]
fn the_address_to_connect_from() {
    let source = Server::serve().content(&pattern(1, 1 << 20)).start();
    let destination = listen(0).size(1 << 20).arg("127.0.0.2").start();
    let output = mirror(&source, destination.address(), "");
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.starts_with("Mirror was rejected: the destination "), "{output:?}");
    let answer = source.control(format!("mirror\n127.0.0.1\n{}\nexit\n::1\n\n", destination.port()));
    assert_eq!(answer, "1: bad bind address\n");
    // Of no interface here.
    let output = mirror(&source, destination.address(), "--bind 192.0.2.77");
    assert_eq!(output.code, Some(1));
    assert!(
        output.stderr.starts_with("Mirror failed to connect: 192.0.2.77 is no address of this machine"),
        "{output:?}"
    );
    source.wait_for_log("not started: cannot connect: 192.0.2.77 is no address of this machine");
    // The kernel says so at once, because the address is of a network that is not named.
    let output = run(&["mirror", "-l", "fe80::1", "-p", "1", "-s", source.sock.to_str().unwrap()], &[]);
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.starts_with("Mirror failed to connect: "), "{output:?}");
    source.wait_for_log("migration to [fe80::1]:1: not started: cannot connect: ");
    assert_eq!(source.status().get("is_mirroring"), "false");
    let (mut source, mut destination) = (source, destination);
    start_mirror(&source, destination.address(), "--bind 127.0.0.2");
    expect_migrated(&mut source, &mut destination);
}

/// Before «started», a failure is an answer, and the only thing that happens.
#[test]
fn refusals_before_the_start() {
    let source = Server::serve().content(&pattern(1, 1 << 20)).start();
    let worker = Worker::on(&source);
    let refused = |to: std::net::SocketAddr, text: &str| {
        let output = mirror(&source, to, "");
        assert_eq!((output.code, output.stderr.strip_suffix('\n')), (Some(1), Some(text)));
        assert!(output.stdout.is_empty());
        assert_eq!(source.status().get("is_mirroring"), "false");
        worker.expect_progress();
    };
    // Scripts know the first words.
    refused(nowhere(), "Mirror failed to connect: Connection refused (os error 111)");
    let rejected = |greeting: &'static [u8], why: &str| {
        let peer = Scripted::start(move |_, mut client| client.send(greeting));
        refused(peer.address, &format!("Mirror was rejected: {why}"));
    };
    rejected(&[0x47; 152], "not an NBD greeting: it starts with 0x4747474747474747 0x4747474747474747");
    let closed = "the destination closed the connection";
    let no_greeting =
        "before its greeting: its access control list may refuse this address, or it has no room for a client";
    rejected(b"", &format!("{closed} {no_greeting}"));
    rejected(b"NBDMAGIC", &format!("{closed} {no_greeting}"));
    rejected(b"NBDMAGICIHAVEOPT\0\x03", &format!("{closed} in the middle of the negotiation"));
    for size in [1 << 19, (1 << 20) - 512, (1 << 20) + 512, 0] {
        refused(Script::new(size).start().address, "Remote size does not match local size");
    }
    refused(listen(0).size(1 << 19).start().address(), "Remote size does not match local size");

    // Silent for 5 s; meanwhile, it is running.
    let silent = Script::new(1 << 20).faults(&[(At::Greeting, Fault::Hang)]).start();
    let busy = Script::new(1 << 20).start();
    thread::scope(|scope| {
        let began = Instant::now();
        let starting = scope.spawn(|| mirror(&source, silent.address, "--wait"));
        wait_for_status(&source, "migration_phase", "connecting");
        let output = mirror(&source, busy.address, "");
        assert_eq!((output.code, &*output.stderr), (Some(1), "mirror already running\n"));
        let output = starting.join().unwrap();
        assert_eq!((output.code, &*output.stderr), (Some(1), "Remote server failed to respond\n"));
        let took = began.elapsed().as_millis();
        assert!((4_900..9_000).contains(&took), "{took} ms");
    });
    assert_eq!(busy.seen.lock().unwrap().attempts, 0);

    for (words, answer) in [
        ("127.0.0.256\n4779", "1: bad IP address\n"),
        ("localhost\n4779", "1: bad IP address\n"),
        ("127.0.0.1\n0", "1: bad IP port number\n"),
        ("127.0.0.1\n65536", "1: bad IP port number\n"),
        ("127.0.0.1\nnbd", "1: bad IP port number\n"),
        ("127.0.0.1\n4779\nexit\n127.0.0.256", "1: bad bind address\n"),
    ] {
        assert_eq!(source.control(format!("mirror\n{words}\n\n")), answer, "{words}");
    }
    for words in ["", "127.0.0.1\n", "127.0.0.1\n4779\nexplode\n", "127.0.0.1\n4779\nexit\n127.0.0.1\nfast\n"] {
        let answer = source.control(format!("mirror\n{words}\n"));
        assert!(answer.starts_with("1: ") && answer.lines().count() == 1, "{words}: {answer}");
    }
    // A second one while one runs.
    start_mirror(&source, busy.address, "--max-speed 1000");
    let output = mirror(&source, nowhere(), "--wait");
    assert_eq!((output.code, &*output.stderr), (Some(1), "mirror already running\n"));
    assert_eq!(tell("break", &source, ""), (Some(0), "mirror stopped\n".into()));
    worker.stop().check(&source.image);
    source.expect_healthy();
}

#[test]
fn who_asks_again_for_the_migration_that_runs_waits_for_its_end() {
    let mut source = Server::serve().content(&pattern(1, 2 << 20)).start();
    let mut destination = listen(0).size(2 << 20).start();
    start_mirror(&source, destination.address(), "--max-speed 1000");
    let output = mirror(&source, nowhere(), "--wait");
    assert_eq!((output.code, &*output.stderr), (Some(1), "mirror already running\n"), "another place");

    let said = source.dir().join("said");
    let port = destination.port().to_string();
    let mut again = program(BIN);
    again.args(["mirror", "--addr", "127.0.0.1", "--port", &port, "--wait", "--sock"]).arg(&source.sock);
    let mut again = Process::spawn(again.stdout(File::create(&said).unwrap()).stderr(Stdio::null()));
    wait_for("the one who asks again", SOON, || {
        (fs::read(&said).unwrap() == b"Migration is running already\n").then_some(())
    });
    assert_eq!(tell("mirror-speed", &source, "--max-speed 0").0, Some(0));
    assert!(again.wait(SOON).success());
    assert!(fs::read(&said).unwrap().ends_with(b"already\nMigration completed\n"));
    expect_migrated(&mut source, &mut destination);
}

#[test]
fn waiting_for_the_end() {
    // Good: what is on stderr is progress, in lines.
    let mut source = Server::serve().content(&pattern(1, 2 << 20)).start();
    let mut destination = listen(0).size(2 << 20).start();
    let output = mirror(&source, destination.address(), "--wait --max-speed 2000000");
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!((output.code, &*said), (Some(0), "Migration started\nMigration completed\n"), "{}", output.stderr);
    assert!(output.stderr.starts_with("copying: "), "{}", output.stderr);
    assert!(!output.stderr.contains(['\r', '\x1b']), "{}", output.stderr);
    expect_migrated(&mut source, &mut destination);

    // Stopped, by break or by a signal; or gone.
    for how in ["break", "TERM", "KILL"] {
        let mut source = Server::serve().content(&pattern(1, 1 << 20)).start();
        let slow = Script::new(1 << 20).start();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| mirror(&source, slow.address, "--wait --max-speed 1000"));
            wait_for_status(&source, "migration_phase", "copying");
            wait_for("some data", SOON, || (slow.seen.lock().unwrap().data > 0).then_some(()));
            match how {
                "break" => assert_eq!(tell("break", &source, "").0, Some(0)),
                signal => source.process.signal(signal),
            }
            let output = waiting.join().unwrap();
            let said = String::from_utf8(output.stdout).unwrap();
            assert_eq!((output.code, &*said), (Some(1), "Migration started\n"), "{how}: {}", output.stderr);
            let why = output.stderr.lines().last().unwrap();
            match how {
                "break" => assert_eq!(why, "migration stopped"),
                "TERM" => assert!(why.starts_with("stopped by a signal while a migration was running; "), "{why}"),
                _ => assert!(why.contains("whether the migration was completed is not known"), "{why}"),
            }
            assert!(!why.starts_with("copying"), "{how}: no reason: {why}");
        });
        if how != "break" {
            source.process.wait(SOON);
        }
    }

    // A failed attempt is not the end.
    let mut source = Server::serve().content(&pattern(1, 1 << 20)).start();
    let closes = Script::new(1 << 20).faults(&[(At::MiddleWrite, Fault::Close)]).start();
    let (to, port) = (closes.address, closes.address.port());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| mirror(&source, to, "--wait"));
        closes.wait_until_gone();
        wait_for_status(&source, "migration_phase", "retrying");
        let mut destination = listen(port).size(1 << 20).start();
        let output = waiting.join().unwrap();
        assert_eq!(output.code, Some(0), "{}", output.stderr);
        assert!(output.stderr.contains("retrying"), "{}", output.stderr);
        expect_exit(&mut destination, 0);
        expect_same(&source.image, &destination.image);
    });
    expect_exit(&mut source, 0);
}

/// To end the waiting does not end the migration, and does not wait for a server that answers nothing.
#[test]
fn who_waits_may_leave() {
    leave(false);
    leave(true);
}

fn leave(is_frozen: bool) {
    let mut source = Server::serve().content(&pattern(1, 1 << 20)).start();
    let mut destination = listen(0).size(1 << 20).start();
    let mut command = Command::new(BIN);
    let port = destination.port().to_string();
    command.args(["mirror", "--addr", "127.0.0.1", "--port", &port, "--wait", "--max-speed", "1000", "--sock"]);
    let said = source.dir().join("said");
    command.arg(&source.sock).stdout(Stdio::null()).stderr(File::create(&said).unwrap());
    let mut waiting = Process::spawn(&mut command);
    wait_for("the first progress", SOON, || fs::read_to_string(&said).unwrap().contains("copying: ").then_some(()));
    if is_frozen {
        source.process.freeze();
    }
    waiting.signal("INT");
    assert_eq!(waiting.wait(SOON / 3).signal(), Some(libc::SIGINT), "as a shell expects it of Ctrl-C");
    source.process.signal("CONT");
    let last = format!("the migration goes on; flexnbd break --sock {} stops it\n", source.sock.display());
    assert!(fs::read_to_string(&said).unwrap().ends_with(&last));
    wait_for_status(&source, "is_mirroring", "true");
    assert_eq!(tell("mirror-speed", &source, "--max-speed 0").0, Some(0));
    expect_migrated(&mut source, &mut destination);
}

#[test]
fn progress_fits_the_terminal() {
    if !has(&[Need::Program("script"), Need::Program("stty")]) {
        return;
    }
    let mut source = Server::serve().content(&pattern(1, 1 << 20)).start();
    let mut destination = listen(0).size(1 << 20).start();
    let (port, sock) = (destination.port(), source.sock.display());
    let line = format!(
        "stty cols 30; exec {BIN} mirror --addr 127.0.0.1 --port {port} --sock {sock} --wait --max-speed 1000000"
    );
    let output = run_command(program("script").args(["-qec", &line, "/dev/null"]), &[]);
    assert_eq!(output.code, Some(0), "{}", output.stderr);
    let text = String::from_utf8(output.stdout).unwrap();
    let drawn: Vec<_> = text.split('\r').filter_map(|line| line.strip_suffix("\x1b[K")).collect();
    assert!(drawn.iter().any(|line| line.starts_with("copying: ") && line.len() == 29), "{text:?}");
    assert!(drawn.iter().all(|line| line.len() <= 29), "{text:?}");
    expect_migrated(&mut source, &mut destination);
}

/// The limit holds, and each change of it counts at once.
#[test]
fn the_speed_is_limited() {
    const SIZE: u64 = 8 << 20;
    let mut source = Server::serve().content(&pattern(1, SIZE as usize)).start();
    let mut destination = listen(0).size(SIZE).start();
    let received = || destination.status().number("written_bytes");
    let speed = |from: u64, to: u64| {
        // From one arrival to another one, so that where it begins does not matter. Never more than it was: the time it
        // takes to ask counts.
        let (began, first) = wait_for("the first of it", SOON, || {
            let asked = Instant::now();
            Some((asked, received())).filter(|&(_, n)| n >= from)
        });
        let last = wait_for("the last of it", SOON, || Some(received()).filter(|&n| n >= to));
        u128::from(last - first) * 1_000_000 / began.elapsed().as_micros()
    };
    let expect = |measured: u128, limit: u128| {
        assert!((limit / 4..limit / 4 * 5).contains(&measured), "{measured} bytes/s with a limit of {limit}");
    };
    start_mirror(&source, destination.address(), "--max-speed 1000000");
    assert_eq!(source.status().number("migration_speed_limit"), 1_000_000);
    expect(speed(200_000, 1_200_000), 1_000_000);
    assert_eq!(tell("mirror-speed", &source, "--max-speed 2000000"), (Some(0), "updated\n".into()));
    assert_eq!(source.status().number("migration_speed_limit"), 2_000_000);
    let at = received();
    expect(speed(at + 200_000, at + 2_200_000), 2_000_000);
    // As good as stopped, which must not keep the next change from counting.
    assert_eq!(tell("mirror-speed", &source, "-m 1"), (Some(0), "updated\n".into()));
    wait_for("what is on its way", SOON, || {
        let before = received();
        thread::sleep(std::time::Duration::from_millis(100));
        (received() == before).then_some(())
    });
    assert!(received() < SIZE);
    assert_eq!(source.control("mirror_max_bps\n0\n\n"), "0: updated\n");
    let began = Instant::now();
    expect_exit(&mut source, 0);
    assert!(began.elapsed() < SOON / 3, "{:?}", began.elapsed());
    expect_exit(&mut destination, 0);
    expect_same(&source.image, &destination.image);
    assert_eq!(tell("mirror-speed", &source, "-m 1").0, Some(1), "it is gone");
}

/// The keys of the status, and the phases it goes through.
#[test]
fn the_status_of_a_migration() {
    const SIZE: usize = 4 << 20;
    let mut source = Server::serve().content(&pattern(1, SIZE)).arg("-v").start();
    let worker = Worker::on(&source);
    worker.may_end();
    let idle = source.status().line().to_owned();
    assert!(!idle.contains("migration_"), "{idle}");
    let faults = [(At::FirstWrite, Fault::Close), (At::LastFlush, Fault::Hang), (At::Disc, Fault::Hang)];
    let destination = Script::new(SIZE).faults(&faults).busy_with(&worker).start();
    // So much that the second FLUSH is the one of the pause, however slowly the first pass went.
    start_mirror(&source, destination.address, "--max-pause 1000");
    wait_for_status(&source, "migration_phase", "retrying");
    let status = source.status();
    assert!(!status.get("migration_last_error").is_empty());
    for pair in status.line().split(' ') {
        assert!(pair.split_once('=').is_some_and(|(key, _)| !key.is_empty()), "{}", status.line());
    }
    // In the pause, with everything sent and the last FLUSH not answered.
    let status = wait_for("the pause", SOON, || {
        let status = source.status();
        (status.get("migration_phase") == "paused" && status.number("migration_dirty_bytes") == 0).then_some(status)
    });
    let prefix = format!("pid={} is_mirroring=true has_control=true size={SIZE} clients_allowed=", source.pid());
    assert!(status.line().starts_with(&prefix), "{}", status.line());
    assert_eq!(status.number("num_clients"), 1);
    for key in ["migration_speed", "migration_duration", "migration_seconds_left", "migration_bytes_left"] {
        status.number(key);
    }
    assert!(status.number("migration_pass") >= 1);
    assert!(status.number("migration_attempts") >= 2);
    // The pause is bounded: clients go on although the destination hangs.
    source.wait_for_log("clients go on");
    worker.expect_progress();
    assert_eq!(tell("break", &source, ""), (Some(0), "mirror stopped\n".into()));
    let log = source.log();
    for milestone in ["copying", "pausing clients", "ended: migration stopped"] {
        assert!(log.lines().any(|line| line.contains(":I:") && line.contains(milestone)), "{milestone}: {log}");
    }
    drop(destination);

    let mut destination = listen(0).size(SIZE as u64).arg("-v").start();
    start_mirror(&source, destination.address(), "");
    expect_migrated(&mut source, &mut destination);
    worker.join().check(&destination.image);
    let log = source.log();
    let line = log.lines().rfind(|line| line.contains(": complete: ")).unwrap();
    for word in [":I:", " bytes sent, ", " bytes zeroed, ", " s, clients paused for ", " ms"] {
        assert!(line.contains(word), "{word}: {line}");
    }
    assert!(destination.log().contains("durable"));
}

/// A listener that goes on as a server: its port is never closed, and what it has can be migrated on.
#[test]
fn a_listener_that_serves_afterwards() {
    const SIZE: usize = 4 << 20;
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut second = listen(0).size(SIZE as u64).arg("--serve").start();
    assert_eq!(second.status().get("has_control"), "false");
    let address = second.address();
    let done = AtomicBool::new(false);
    let outcome = thread::scope(|scope| {
        // Slow enough for some connections before the end.
        start_mirror(&source, address, "--max-speed 8000000");
        let knocking = scope.spawn(|| {
            let mut knocks = 0_u32;
            while !done.load(Ordering::Relaxed) {
                match TcpStream::connect(address) {
                    Ok(_) => knocks += 1,
                    Err(error) => assert_ne!(error.kind(), ErrorKind::ConnectionRefused, "after {knocks} connections"),
                }
            }
            knocks
        });
        expect_exit(&mut source, 0);
        wait_for("to have control", SOON, || (second.status().get("has_control") == "true").then_some(()));
        let worker = Worker::on(&second);
        worker.expect_progress();
        done.store(true, Ordering::Relaxed);
        assert!(knocking.join().unwrap() > 10);
        worker.may_end();
        let mut third = listen(0).size(SIZE as u64).start();
        start_mirror(&second, third.address(), "");
        expect_migrated(&mut second, &mut third);
        let outcome = worker.join();
        outcome.check(&third.image);
        outcome
    });
    assert!(outcome.rounds > 0);
    assert!(!second.sock.exists());
}

/// A listener that serves afterwards ends as a server does.
#[test]
fn a_listener_that_serves_ends_well() {
    let mut source = Server::serve().content(&pattern(1, 1 << 20)).start();
    let destination = listen(0).size(1 << 20).arg("--serve").start();
    let mut client = destination.connect();
    assert_eq!(client.ask(kind::FLUSH, 0, 0, 0, &[]), 0);
    drop(client);
    // The client may not be gone yet, and only one is let in.
    wait_for("the start", SOON, || (mirror(&source, destination.address(), "").code == Some(0)).then_some(()));
    expect_exit(&mut source, 0);
    wait_for_status(&destination, "has_control", "true");
    destination.expect_healthy();
}

/// IPv6, and both ends of it.
#[test]
fn over_ipv6() {
    let mut source = Server::serve().addr("::1").content(&pattern(1, 1 << 20)).start();
    let mut destination = listen(0).addr("::1").size(1 << 20).arg("::1").start();
    start_mirror(&source, destination.address(), "--bind ::1");
    expect_migrated(&mut source, &mut destination);
}

/// What the clients of another server of the same image write would be missing at the destination, so the image is not
/// migrated while another one has it open; and a refusal costs the server nothing of its own lock.
#[test]
fn an_image_that_another_server_has_open_stays() {
    let mut source = Server::serve().content(&pattern(1, 1 << 20)).arg("--shared-image").start();
    let other = Server::serve().file(source.image.clone()).arg("--shared-image").start();
    let mut destination = listen(0).size(1 << 20).start();
    let refused = mirror(&source, destination.address(), "");
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("another server has the image open"), "{}", refused.stderr);
    drop(other);
    let image = source.image.to_str().unwrap();
    let listener = run(&["listen", "--addr", "127.0.0.1", "--port", "0", "--file", image], b"");
    assert!(listener.code == Some(1) && listener.stderr.contains("has it open"), "the lock is still there");

    // While it migrates nobody joins; when that has ended, they may again.
    start_mirror(&source, destination.address(), "--max-speed 100000");
    let join = ["serve", "--addr", "127.0.0.1", "--port", "0", "--file", image, "--shared-image"];
    assert_eq!(run(&join, b"").code, Some(1));
    assert_eq!(tell("break", &source, "").0, Some(0));
    drop(Server::serve().file(source.image.clone()).arg("--shared-image").start());
    start_mirror(&source, destination.address(), "");
    expect_migrated(&mut source, &mut destination);
}

/// What was measured before says nothing of a destination that stands still.
#[test]
fn the_speed_of_a_destination_that_stands_still_is_none() {
    const SIZE: usize = 16 << 20;
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut destination = listen(0).size(SIZE as u64).start();
    start_mirror(&source, destination.address(), "--max-speed 4000000");
    assert_eq!(source.status().get("migration_destination"), destination.address().to_string());
    wait_for("a speed", SOON, || (source.status().number("migration_speed") > 0).then_some(()));
    destination.process.signal("STOP");
    let status = wait_for("a stalled migration", SOON, || {
        let status = source.status();
        (status.number("migration_stalled_seconds") >= 2).then_some(status)
    });
    assert_eq!(
        (status.number("migration_speed"), status.number("migration_seconds_left")),
        (0, 0),
        "{}",
        status.line()
    );
    assert!(status.number("migration_bytes_left") > 0, "{}", status.line());
    destination.process.signal("CONT");
    wait_for("it to go on", SOON, || match source.try_status() {
        Some(status) if status.get("is_mirroring") == "true" => {
            (status.number("migration_speed") > 0 && status.number("migration_stalled_seconds") == 0).then_some(())
        }
        _ => Some(()),
    });
    expect_migrated(&mut source, &mut destination);
}
