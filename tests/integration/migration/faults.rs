//! Whatever a destination does wrong, whenever: clients go on without an error over the same connections, and the
//! migration succeeds in the end. Destinations and sources follow scripts.

use crate::support::newstyle::ENOTSUP;
use crate::support::peers::{
    expect_exit, expect_migrated, listen, listen_after, mirror, nowhere, offer, send_image, start_mirror, tell,
    wait_for_status, At, Fault, Script, Worker,
};
use crate::support::{
    errno, greeting, kind, not_tested, pattern, program, reply, request, run_command, uninterrupted, wait_for, Builder,
    Client, Mount, Server, SOON,
};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

const SIZE: usize = 4 << 20;

/// A source that takes a request without progress for lost after this many seconds.
fn source_with_limit(seconds: &str) -> Builder {
    let limit = format!("FLEXNBD_MS_REQUEST_LIMIT_SECS={seconds}");
    Server::serve().through(&["env", &limit]).content(&pattern(1, SIZE))
}

/// All of these, one after the other, against one source with a client at work; then a destination without fault.
fn survives(faults: &[(At, Fault)]) {
    let mut source = source_with_limit("1").start();
    let worker = Worker::on(&source);
    let bad = Script::new(SIZE).faults(faults).busy_with(&worker).start();
    start_mirror(&source, bad.address, "");
    bad.wait_until_gone();
    worker.expect_progress();
    let status = source.status();
    assert!(status.number("migration_attempts") >= faults.len() as u64, "{}", status.line());
    assert!(!status.get("migration_last_error").is_empty());
    worker.may_end();
    let mut good = listen(bad.address.port()).size(SIZE as u64).start();
    expect_migrated(&mut source, &mut good);
    worker.join().check(&good.image);
}

/// A kind of fault at every write that matters and every FLUSH.
fn survives_everywhere(fault: Fault) {
    let points = [At::FirstWrite, At::MiddleWrite, At::LastWrite, At::FirstFlush, At::LastFlush];
    survives(&points.map(|at| (at, fault)));
}

#[test]
fn a_destination_that_goes_away() {
    thread::scope(|scope| {
        scope.spawn(|| survives_everywhere(Fault::Close));
        scope.spawn(|| survives_everywhere(Fault::Reset));
        // To close after the last FLUSH is another matter: DISC may have gone out.
        let points = [At::FirstWrite, At::MiddleWrite, At::LastWrite, At::FirstFlush];
        scope.spawn(move || survives(&points.map(|at| (at, Fault::AnswerAndClose))));
    });
}

#[test]
fn a_destination_that_answers_wrongly() {
    thread::scope(|scope| {
        scope.spawn(|| survives_everywhere(Fault::Error));
        scope.spawn(|| survives_everywhere(Fault::WrongCookie));
        scope.spawn(|| survives_everywhere(Fault::Garbage));
    });
}

#[test]
fn a_destination_that_hangs_or_greets_wrongly() {
    let greetings = [Fault::Close, Fault::Garbage, Fault::WrongSize, Fault::Hang].map(|fault| (At::Greeting, fault));
    thread::scope(|scope| {
        scope.spawn(|| survives_everywhere(Fault::Hang));
        // The first attempt has to start.
        scope.spawn(move || survives(&[&[(At::FirstWrite, Fault::Close)], &greetings[..]].concat()));
    });
}

#[test]
fn a_destination_that_is_gone_for_a_while() {
    let mut source = source_with_limit("60").start();
    let worker = Worker::on(&source);
    let destination = listen(0).size(SIZE as u64).start();
    let address = destination.address();
    start_mirror(&source, address, "--max-speed 100000");
    drop(destination);
    wait_for("a refusal", SOON, || source.status().line().contains("refused").then_some(()));
    let attempts = source.status().number("migration_attempts");
    wait_for("more attempts", SOON, || (source.status().number("migration_attempts") > attempts + 1).then_some(()));
    let status = source.status();
    assert_eq!(status.get("is_mirroring"), "true");
    worker.expect_progress();
    worker.may_end();
    assert_eq!(tell("mirror-speed", &source, "--max-speed 0"), (Some(0), "updated\n".into()));
    let mut destination = listen(address.port()).size(SIZE as u64).start();
    expect_migrated(&mut source, &mut destination);
    worker.join().check(&destination.image);
}

/// After DISC there is no way back: whatever the destination does then, the source ends, and clients do not go on there.
#[test]
fn whatever_a_destination_does_with_disc() {
    for fault in [Fault::Close, Fault::Reset, Fault::Garbage, Fault::Error, Fault::AnswerAndClose] {
        let mut source = source_with_limit("60").start();
        let worker = Worker::on(&source);
        worker.may_end();
        let destination = Script::new(SIZE).faults(&[(At::Disc, fault)]).busy_with(&worker).start();
        start_mirror(&source, destination.address, "");
        let status = source.process.wait(SOON);
        assert_eq!(status.code(), Some(0), "{fault:?}: {}", source.log());
        let outcome = worker.join();
        let seen = destination.seen.lock().unwrap();
        outcome.expect(&seen.image);
        assert!(fs::read(&source.image).unwrap() == seen.image, "{fault:?}");
    }
}

/// A destination that does not close after DISC is waited for, but not for ever; it is too late to stop it then.
#[test]
fn a_destination_that_hangs_at_disc() {
    let mut source = source_with_limit("60").start();
    let worker = Worker::on(&source);
    worker.may_end();
    let destination = Script::new(SIZE).faults(&[(At::Disc, Fault::Hang)]).busy_with(&worker).start();
    start_mirror(&source, destination.address, "");
    wait_for_status(&source, "migration_phase", "finishing");
    assert_eq!(tell("break", &source, ""), (Some(1), "mirror completed\n".into()));
    let rounds = worker.rounds().load(Ordering::Relaxed);
    expect_exit(&mut source, 0);
    assert_eq!(worker.rounds().load(Ordering::Relaxed), rounds, "a client was answered after DISC");
    worker.join().expect(&destination.seen.lock().unwrap().image);
}

/// Where the image stays, too, nobody waits for what the destination does with DISC.
#[test]
fn a_destination_that_hangs_at_disc_keeps_nobody_where_the_image_stays() {
    let source = source_with_limit("60").start();
    let worker = Worker::on(&source);
    let destination = Script::new(SIZE).faults(&[(At::Disc, Fault::Hang)]).busy_with(&worker).start();
    let (ip, port) = (destination.address.ip(), destination.address.port());
    assert_eq!(source.control(format!("mirror\n{ip}\n{port}\nnothing\n\n")), "0: Mirror started\n");
    wait_for_status(&source, "migration_phase", "finishing");
    let goal = worker.rounds().load(Ordering::Relaxed) + 20;
    wait_for("answers while the destination hangs", SOON, || {
        let answered = worker.rounds().load(Ordering::Relaxed) >= goal;
        assert_eq!(source.status().get("is_mirroring"), "true", "{}", source.log());
        answered.then_some(())
    });
    assert_eq!(tell("break", &source, ""), (Some(1), "mirror completed\n".into()));
    wait_for_status(&source, "is_mirroring", "false");
    worker.expect_progress();
    worker.stop().check(&source.image);
    assert_eq!(destination.seen.lock().unwrap().fired, 1, "{}", source.log());
    source.expect_healthy();
}

/// A destination that offers `WRITE_ZEROES` and does not do it is sent data, in the same attempt.
#[test]
fn a_destination_that_does_not_write_the_zeroes_it_offers() {
    for answer in [ENOTSUP, errno::EINVAL] {
        let mut source = Server::serve().size(SIZE as u64).arg("-v").start();
        let worker = Worker::on(&source);
        worker.may_end();
        let destination = Script::new(SIZE).zeroes_answer(answer).start();
        start_mirror(&source, destination.address, "");
        expect_exit(&mut source, 0);
        let outcome = worker.join();
        let seen = destination.seen.lock().unwrap();
        assert!(seen.disc && seen.attempts == 1, "{}", source.log());
        outcome.expect(&seen.image);
        assert!(fs::read(&source.image).unwrap() == seen.image, "answered {answer}");
        assert_eq!(source.log().matches("sending zeroes as data").count(), 1, "{}", source.log());
    }
}

/// The end of the stream after the last FLUSH: DISC has gone out, and all is there, or there is another attempt.
#[test]
fn a_destination_that_closes_instead_of_awaiting_disc() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let worker = Worker::on(&source);
    worker.may_end();
    let destination = Script::new(SIZE).faults(&[(At::LastFlush, Fault::AnswerAndClose)]).busy_with(&worker).start();
    start_mirror(&source, destination.address, "");
    destination.wait_until_gone();
    let ended = wait_for("the end, or a failed attempt", SOON, || {
        if source.log().contains("attempt 1 failed") {
            return Some(false);
        }
        (!source.process.is_running()).then_some(true)
    });
    if ended {
        expect_exit(&mut source, 0);
        worker.join().expect(&destination.seen.lock().unwrap().image);
        return;
    }
    worker.expect_progress();
    let mut good = listen(destination.address.port()).size(SIZE as u64).start();
    expect_migrated(&mut source, &mut good);
    worker.join().check(&good.image);
}

/// An image that cannot be read now may be readable later.
#[test]
fn a_source_that_cannot_read_its_image() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut destination = listen(0).size(SIZE as u64).start();
    let file = File::options().write(true).open(&source.image).unwrap();
    file.set_len(SIZE as u64 / 2).unwrap();
    start_mirror(&source, destination.address(), "");
    wait_for("a failed attempt", SOON, || source.status().line().contains("migration_last_error=").then_some(()));
    assert!(destination.process.is_running());
    file.set_len(SIZE as u64).unwrap();
    expect_migrated(&mut source, &mut destination);
}

#[test]
fn break_at_every_phase() {
    let mut source = source_with_limit("60").start();
    let worker = Worker::on(&source);
    let stop = |source: &Server| {
        assert_eq!(tell("break", source, ""), (Some(0), "mirror stopped\n".into()));
        assert_eq!(source.status().get("is_mirroring"), "false");
        assert_eq!(tell("break", source, ""), (Some(1), "not mirroring\n".into()));
        worker.expect_progress();
    };
    let phase = |source: &Server, phase: &str| wait_for_status(source, "migration_phase", phase);
    assert_eq!(tell("break", &source, ""), (Some(1), "not mirroring\n".into()));
    assert_eq!(tell("mirror-speed", &source, "-m 1"), (Some(1), "Not currently mirroring\n".into()));

    // Connecting: the one who started it is told.
    let silent = Script::new(SIZE).faults(&[(At::Greeting, Fault::Hang)]).start();
    thread::scope(|scope| {
        let starting = scope.spawn(|| mirror(&source, silent.address, ""));
        phase(&source, "connecting");
        stop(&source);
        let output = starting.join().unwrap();
        assert_eq!((output.code, &*output.stderr), (Some(1), "migration stopped\n"));
    });

    // Copying.
    let slow = Script::new(SIZE).start();
    start_mirror(&source, slow.address, "--max-speed 200000");
    phase(&source, "copying");
    wait_for("some data", SOON, || (slow.seen.lock().unwrap().data > 0).then_some(()));
    stop(&source);
    slow.close();

    // Converging: clients write faster than the limit lets it send.
    let slow = Script::new(SIZE).start();
    start_mirror(&source, slow.address, "--max-speed 4000000 --max-pause 0");
    phase(&source, "converging");
    stop(&source);
    slow.close();

    // Paused, with everything there but the last FLUSH.
    let hangs = Script::new(SIZE).faults(&[(At::LastFlush, Fault::Hang)]).busy_with(&worker).start();
    start_mirror(&source, hangs.address, "--max-pause 10000");
    phase(&source, "paused");
    stop(&source);
    hangs.close();

    // Between two attempts.
    let closes = Script::new(SIZE).faults(&[(At::FirstWrite, Fault::Close)]).start();
    start_mirror(&source, closes.address, "");
    phase(&source, "retrying");
    stop(&source);
    assert!(!closes.seen.lock().unwrap().disc);

    worker.may_end();
    let mut destination = listen(0).size(SIZE as u64).start();
    start_mirror(&source, destination.address(), "");
    expect_migrated(&mut source, &mut destination);
    worker.join().check(&destination.image);
}

/// A signal ends it at any phase, with an exit code that says where the image is: here, until DISC has gone.
#[test]
fn a_signal_during_a_migration() {
    for (at, fault) in [(At::FirstWrite, Fault::Hang), (At::FirstWrite, Fault::Close), (At::Disc, Fault::Hang)] {
        let mut source = Server::serve().content(&pattern(1, SIZE)).start();
        let destination = Script::new(SIZE).faults(&[(at, fault)]).start();
        start_mirror(&source, destination.address, "");
        let phase = match (at, fault) {
            (At::Disc, _) => "finishing",
            (_, Fault::Close) => "retrying",
            _ => "copying",
        };
        wait_for_status(&source, "migration_phase", phase);
        let status = source.stop();
        let log = source.log();
        let moved = phase == "finishing";
        assert_eq!(status.code(), Some(i32::from(!moved)), "{phase}: {log}");
        assert_eq!(log.lines().any(|line| line.contains(":F:")), !moved, "{phase}: {log}");
        assert!(source.image.exists() && !source.sock.exists());
    }
}

/// A destination that takes everything, tells when DISC has come and from where, and closes when it is told to.
struct Patient {
    address: SocketAddr,
    disc: mpsc::Receiver<SocketAddr>,
    close: mpsc::Sender<()>,
}

impl Patient {
    fn start(size: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (disc_came, disc) = mpsc::channel();
        let (close, closed) = mpsc::channel();
        thread::spawn(move || -> io::Result<()> {
            let (mut stream, peer) = listener.accept()?;
            stream.write_all(&greeting(size, 1 | 4 | 8 | 32 | 64))?;
            loop {
                let mut head = [0; 28];
                stream.read_exact(&mut head)?;
                let length = u32::from_be_bytes(head[24..].try_into().unwrap());
                match head[7] {
                    1 => stream.read_exact(&mut vec![0; length as usize])?,
                    2 => break,
                    _ => {}
                }
                stream.write_all(&reply(0, u64::from_be_bytes(head[8..16].try_into().unwrap())))?;
            }
            disc_came.send(peer).unwrap();
            let _ = closed.recv_timeout(SOON);
            Ok(())
        });
        Self { address, disc, close }
    }
}

/// Whatever falls into the moment in which the destination closes: what is answered is at the destination.
#[test]
fn nothing_is_answered_after_the_end() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let mut client = source.connect();
    let destination = Patient::start(SIZE as u64);
    start_mirror(&source, destination.address, "");
    destination.disc.recv_timeout(SOON).unwrap();
    wait_for_status(&source, "migration_phase", "finishing");
    // Stopped, the source finds the end of the stream and the request in one turn.
    source.process.signal("STOP");
    destination.close.send(()).unwrap();
    client.send_request(kind::WRITE, 1, 7, 0, 4096, &[0x5a; 4096]);
    thread::sleep(Duration::from_millis(100)); // Both have to have arrived, which nobody can see from outside.
    source.process.signal("CONT");
    assert_eq!(source.process.wait(SOON).code(), Some(0));
    assert!(client.stream.read_exact(&mut [0; 16]).is_err(), "a write was answered that is nowhere");
    assert!(fs::read(&source.image).unwrap() == pattern(1, SIZE), "a write was done after the end");
}

/// A client may have the address of the migration's own connection, because that goes elsewhere.
#[test]
fn a_client_from_the_same_address_is_a_client() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let destination = Patient::start(SIZE as u64);
    start_mirror(&source, destination.address, "");
    let own = destination.disc.recv_timeout(SOON).unwrap();
    // IP_LOCAL_PORT_RANGE chooses a port without binding to it, which would be refused.
    let script = format!(
        "import errno, socket, sys\ns = socket.socket()\n\
         try: s.setsockopt(0, 51, ({0} << 16 | {0}).to_bytes(4, sys.byteorder))\n\
         except OSError as error: sys.exit(77 if error.errno == errno.ENOPROTOOPT else str(error))\n\
         s.connect(('127.0.0.1', {1}))\nprint(s.getsockname()[1], len(s.recv(152, socket.MSG_WAITALL)))",
        own.port(),
        source.port()
    );
    let connected = run_command(program("python3").args(["-c", &script]), &[]);
    if connected.code == Some(77) {
        return not_tested("Linux before 6.3 lets nobody choose a port without binding to it");
    }
    assert_eq!(
        String::from_utf8_lossy(&connected.stdout).trim(),
        format!("{} 152", own.port()),
        "{}",
        connected.stderr
    );
    assert_eq!(source.status().get("migration_phase"), "finishing");
    destination.close.send(()).unwrap();
    assert_eq!(source.process.wait(SOON).code(), Some(0), "{}", source.log());
}

/// Only what was to be written and is lost ends a listener.
#[test]
fn a_listener_survives_a_read_that_fails() {
    let mut destination = listen(0).size(SIZE as u64).start();
    let file = File::options().write(true).open(&destination.image).unwrap();
    file.set_len(1 << 20).unwrap();
    let mut client = destination.connect();
    assert_eq!(client.read(2 << 20, 4096), Err(5));
    drop(client);
    file.set_len(SIZE as u64).unwrap();
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    wait_for("room for a sender", SOON, || (destination.status().number("num_clients") == 0).then_some(()));
    start_mirror(&source, destination.address(), "");
    expect_migrated(&mut source, &mut destination);
}

/// The predecessor's listener, and less than that.
#[test]
fn destinations_that_offer_little() {
    for flags in [offer::PREDECESSOR, offer::NOTHING, 0] {
        let mut content = pattern(1, SIZE);
        content[1 << 20..3 << 20].fill(0);
        let mut source = Server::serve().size(SIZE as u64).start();
        let mut client = source.connect();
        assert_eq!(client.write(0, &content[..1 << 20]), 0);
        assert_eq!(client.write(3 << 20, &content[3 << 20..]), 0);
        let worker = Worker::start(source.address(), 0..1 << 20);
        worker.may_end();
        let destination = Script::new(SIZE).flags(flags).start();
        start_mirror(&source, destination.address, "");
        expect_exit(&mut source, 0);
        let outcome = worker.join();
        let seen = destination.seen.lock().unwrap();
        assert!(seen.disc && seen.attempts == 1);
        assert!(seen.requests.iter().all(|&(kind, _, length)| kind != kind::WRITE || length <= 1 << 20));
        outcome.expect(&seen.image[..1 << 20]);
        assert!(fs::read(&source.image).unwrap() == seen.image, "with flags {flags}");
        assert!(seen.image[1 << 20..] == content[1 << 20..]);
    }
}

/// Not a zero crosses the wire where the destination takes `WRITE_ZEROES`, be it of a hole or of data, and it is flushed
/// before DISC.
#[test]
fn a_destination_that_offers_all() {
    let mut source = Server::serve().size(64 << 20).start();
    let mut image = File::options().write(true).open(&source.image).unwrap();
    image.write_all(&vec![0; 16 << 20]).unwrap();
    assert_eq!(source.connect().write(32 << 20, &pattern(1, 1 << 20)), 0);
    let destination = Script::new(64 << 20).start();
    start_mirror(&source, destination.address, "");
    expect_exit(&mut source, 0);
    let seen = destination.seen.lock().unwrap();
    assert_eq!(seen.data, 1 << 20);
    let kinds: Vec<u16> = seen.requests.iter().map(|(kind, _, _)| *kind).collect();
    assert_eq!(kinds[kinds.len() - 2..], [kind::FLUSH, kind::DISC]);
    assert!(fs::read(&source.image).unwrap() == seen.image);
}

/// Round trips do not add up: 64 requests of 5 ms each, one after the other, but sent all at once.
#[test]
fn a_slow_destination() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let worker = Worker::on(&source);
    worker.may_end();
    let destination = Script::new(SIZE).delay(Duration::from_millis(5)).start();
    start_mirror(&source, destination.address, "");
    expect_exit(&mut source, 0);
    let outcome = worker.join();
    let seen = destination.seen.lock().unwrap();
    assert!(seen.attempts == 1, "{}", source.log());
    outcome.expect(&seen.image);
    eprintln!("slow destination: the longest answer to a client took {:?}", outcome.longest);
}

/// A source like the predecessor.
#[test]
fn a_source_that_knows_little() {
    let content = pattern(1, (20 << 20) + 512);
    let mut destination = listen(0).content(&pattern(2, content.len())).start();
    let mut source = destination.connect();
    send_image(&mut source, &content);
    source.send_request(kind::DISC, 0, 7, 0, 0, &[]);
    source.expect_closed();
    expect_exit(&mut destination, 0);
    assert!(fs::read(&destination.image).unwrap() == content);
}

/// What is no complete migration: the listener goes on waiting, and says so.
#[test]
fn attempts_that_are_no_migration() {
    const SIZE: usize = 1 << 20;
    let content = pattern(1, SIZE);
    let mut destination = listen(0).content(&pattern(2, SIZE)).arg("-v").start();
    let warnings = |destination: &Server| destination.log().matches("no complete migration").count();
    let mut attempt = |what: &str, act: &dyn Fn(&mut Client)| {
        let before = warnings(&destination);
        let mut client = wait_for("to be let in", SOON, || {
            let mut client = destination.connect_bare();
            // While the one before is not gone, there is no greeting.
            let greeted = uninterrupted(|| client.stream.peek(&mut [0; 1])).is_ok_and(|n| n == 1);
            greeted.then(|| {
                client.read_greeting();
                client
            })
        });
        act(&mut client);
        drop(client);
        wait_for(format_args!("a warning after {what}"), SOON, || (warnings(&destination) > before).then_some(()));
        assert!(destination.process.is_running(), "{what} ended it");
        assert_eq!(destination.status().get("has_control"), "false");
    };
    attempt("a probe", &|_| {});
    attempt("garbage", &|client| client.send(&[0x2a; 28]));
    attempt("half a request", &|client| client.send(&[0x25, 0x60]));
    attempt("a bare DISC", &|client| {
        client.send_request(kind::DISC, 0, 1, 0, 0, &[]);
        client.expect_closed();
    });
    attempt("a partial copy", &|client| {
        assert_eq!(client.write(0, &content[..SIZE - 512]), 0);
        client.send_request(kind::DISC, 0, 1, 0, 0, &[]);
        client.expect_closed();
    });
    attempt("the other part in another session", &|client| {
        assert_eq!(client.write(SIZE as u64 - 512, &content[SIZE - 512..]), 0);
        client.send_request(kind::DISC, 0, 1, 0, 0, &[]);
        client.expect_closed();
    });
    attempt("a copy without DISC", &|client| {
        assert_eq!(client.write(0, &content), 0);
        client.stream.shutdown(Shutdown::Write).unwrap();
        client.expect_closed();
    });
    attempt("half of the last write", &|client| {
        assert_eq!(client.write(0, &content[..SIZE - 4096]), 0);
        client.send_request(kind::WRITE, 0, 1, SIZE as u64 - 4096, 4096, &content[..100]);
    });
    attempt("TRIM", &|client| {
        assert_eq!(client.ask(kind::TRIM, 0, 0, SIZE as u32, &[]), 0);
        client.send_request(kind::DISC, 0, 1, 0, 0, &[]);
        client.expect_closed();
    });
    attempt("reads", &|client| {
        client.read(0, SIZE as u32).unwrap();
        client.send_request(kind::DISC, 0, 1, 0, 0, &[]);
        client.expect_closed();
    });
    attempt("writes that were refused", &|client| {
        assert_ne!(client.write(SIZE as u64 - 512, &content[..1024]), 0);
        assert_eq!(client.write(0, &content[..SIZE - 512]), 0);
        client.send_request(kind::DISC, 0, 1, 0, 0, &[]);
        client.expect_closed();
    });
    let mut source = Server::serve().content(&content).start();
    start_mirror(&source, destination.address(), "");
    expect_migrated(&mut source, &mut destination);
}

/// What makes a migration: every byte written or zeroed, in any order, more than once, then DISC, at once.
#[test]
fn a_migration_in_pieces() {
    const SIZE: usize = 1 << 20;
    let content = [pattern(1, SIZE / 2 + 1), vec![0; SIZE / 2 - 1]].concat();
    let mut destination = listen(0).content(&pattern(2, SIZE)).start();
    let mut source = destination.connect();
    assert_eq!(source.ask(kind::WRITE_ZEROES, 0, SIZE as u64 / 4, (SIZE / 4 * 3) as u32, &[]), 0);
    assert_eq!(source.write(SIZE as u64 / 2 - 7, &content[SIZE / 2 - 7..][..8]), 0);
    // The rest without waiting for an answer.
    let mut bytes = Vec::new();
    for (cookie, range) in [(1, 1..SIZE / 2), (2, 0..1)] {
        let length = range.len() as u32;
        bytes.extend(request(kind::WRITE, 0, cookie, range.start as u64, length));
        bytes.extend(&content[range]);
    }
    bytes.extend(request(kind::DISC, 0, 3, 0, 0));
    source.send(&bytes);
    let mut answered = [source.read_reply(), source.read_reply()];
    answered.sort_unstable();
    assert_eq!(answered, [(0, 1), (0, 2)]);
    source.expect_closed();
    expect_exit(&mut destination, 0);
    assert!(fs::read(&destination.image).unwrap() == content);
}

#[test]
fn one_sender_at_a_time() {
    let mut destination = listen(0).size(1 << 20).start();
    let mut sender = destination.connect();
    for _ in 0..3 {
        destination.connect_bare().expect_closed();
    }
    assert_eq!(sender.write(0, &pattern(1, 1 << 20)), 0);
    sender.send_request(kind::DISC, 0, 1, 0, 0, &[]);
    sender.expect_closed();
    expect_exit(&mut destination, 0);
}

/// A listener cannot migrate what it does not have.
#[test]
fn a_listener_does_not_mirror() {
    let mut destination = listen(0).size(1 << 20).start();
    let output = mirror(&destination, nowhere(), "");
    assert_eq!(output.code, Some(1));
    assert!(output.stderr.starts_with("not serving yet"), "{}", output.stderr);
    let status = destination.stop();
    assert_eq!(status.code(), Some(1));
    assert!(destination.log().contains(":F:"), "{}", destination.log());
}

/// Whoever writes nothing keeps nobody out for more than a minute, whatever else it sends.
#[test]
#[ignore = "takes a minute"]
fn a_sender_that_writes_nothing_makes_room() {
    const SIZE: u64 = 1 << 20;
    type Act = fn(&mut Client);
    let senders = [
        ("silent", (|_| {}) as Act),
        ("a refused write", |sender| assert_eq!(sender.write(SIZE, &[1; 512]), errno::ENOSPC)),
        ("half of a refused write", |sender| sender.send(&request(kind::WRITE, 0, 1, SIZE, 512))),
        ("an empty write", |sender| assert_eq!(sender.write(0, &[]), 0)),
        ("a trim", |sender| assert_eq!(sender.ask(kind::TRIM, 0, 0, 4096, &[]), 0)),
    ];
    thread::scope(|scope| {
        for (what, act) in senders {
            scope.spawn(move || {
                let mut destination = listen(0).size(SIZE).start();
                let mut sender = destination.connect();
                act(&mut sender);
                sender.stream.set_read_timeout(Some(Duration::from_secs(60) + SOON)).unwrap();
                sender.expect_closed();
                assert!(destination.log().contains("kept other senders out"), "{what}: {}", destination.log());
                let mut source = Server::serve().content(&pattern(1, SIZE as usize)).start();
                start_mirror(&source, destination.address(), "");
                expect_migrated(&mut source, &mut destination);
            });
        }
    });
}

/// What a listener cannot repair ends it, with a line; the source tries again for ever, and succeeds with the next.
fn local_failure(destination: Builder) {
    let mut source = Server::serve().content(&pattern(1, 8 << 20)).start();
    let worker = Worker::on(&source);
    let mut destination = destination.start();
    start_mirror(&source, destination.address(), "");
    expect_exit(&mut destination, 1);
    let log = destination.log();
    assert!(log.lines().last().unwrap().contains(":F:"), "{log}");
    wait_for_status(&source, "is_mirroring", "true");
    worker.expect_progress();
    worker.may_end();
    let mut good = listen(destination.port()).size(8 << 20).start();
    expect_migrated(&mut source, &mut good);
    worker.join().check(&good.image);
}

#[test]
fn a_destination_whose_disk_is_full() {
    let Some(mount) = Mount::tmpfs("4m") else { return };
    let image = mount.join("image");
    File::create(&image).unwrap().set_len(8 << 20).unwrap();
    local_failure(listen(0).file(image));
}

#[test]
fn a_destination_whose_file_may_not_grow() {
    // In blocks of 512 bytes: half of the image.
    local_failure(listen_after(0, "ulimit -f 8192; exec").size(8 << 20));
}
