//! Migrations under load: clients that write faster than the way, many migrations in a row, and processes that are
//! killed at random moments.

use crate::support::peers::{
    expect_exit, expect_migrated, expect_same, listen, mirror, start_mirror, wait_for_status, Random, Worker,
};
use crate::support::{pattern, wait_for, Server, Status, TempDir, SOON};
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

/// How long a client may wait for an answer because of a migration, on a machine that is busy with other tests. What is
/// aimed at is a tenth of a second.
const PAUSE: Duration = Duration::from_secs(2);

/// Two clients write faster than the limit lets it send, also on a busy machine: they are slowed until it ends.
#[test]
fn two_writers_do_not_prevent_the_end() {
    const SIZE: u64 = 4 << 20;
    let mut source = Server::serve().content(&pattern(1, SIZE as usize)).arg("-v").start();
    let workers = [0..SIZE / 2, SIZE / 2..SIZE].map(|range| Worker::start(source.address(), range));
    workers.iter().for_each(Worker::may_end);
    let mut destination = listen(0).size(SIZE).start();
    let began = Instant::now();
    start_mirror(&source, destination.address(), "--max-speed 1000000");
    wait_for_status(&source, "migration_phase", "converging");
    wait_for("clients to be slowed", SOON, || source.status().line().contains("migration_write_limit=").then_some(()));
    expect_migrated(&mut source, &mut destination);
    let outcomes = workers.map(Worker::join);
    for outcome in &outcomes {
        outcome.check(&destination.image);
        assert!(outcome.longest < PAUSE, "{:?}", outcome.longest);
    }
    let longest = outcomes.iter().map(|outcome| outcome.longest).max().unwrap();
    let took = began.elapsed();
    eprintln!("4 MiB at 1 MB/s with two writers at full speed: {took:?}, the longest answer took {longest:?}");
    eprintln!("{}", source.log().lines().rfind(|line| line.contains("complete: ")).unwrap());
}

/// The same without a limit: loopback is fast enough for both.
#[test]
fn two_writers_at_full_speed() {
    const SIZE: u64 = 64 << 20;
    let mut source = Server::serve().content(&pattern(1, SIZE as usize)).start();
    let workers = [0..SIZE / 2, SIZE / 2..SIZE].map(|range| Worker::start(source.address(), range));
    workers.iter().for_each(Worker::may_end);
    let mut destination = listen(0).size(SIZE).start();
    start_mirror(&source, destination.address(), "");
    expect_migrated(&mut source, &mut destination);
    for outcome in workers.map(Worker::join) {
        outcome.check(&destination.image);
        assert!(outcome.longest < PAUSE, "{:?}", outcome.longest);
        eprintln!("64 MiB without a limit: the longest answer took {:?}", outcome.longest);
    }
}

/// Back and forth between two images, each over what is left of the time before, with a client that follows.
#[test]
fn twenty_migrations_in_a_row() {
    const SIZE: u64 = 4 << 20;
    let dir = TempDir::new();
    let images = [dir.join("one"), dir.join("other")];
    images.iter().zip(1..).for_each(|(image, seed)| fs::write(image, pattern(seed, SIZE as usize)).unwrap());
    let mut owner = Server::serve().file(images[0].clone()).start();
    let worker = Worker::roaming(owner.address(), 0..SIZE);
    for number in 1..=20 {
        let next = listen(0).file(images[number % 2].clone()).arg("--serve").start();
        start_mirror(&owner, next.address(), "");
        expect_exit(&mut owner, 0);
        wait_for_status(&next, "has_control", "true");
        owner = next;
        worker.send_to(owner.address());
        worker.expect_progress();
    }
    let outcome = worker.stop();
    outcome.check(&owner.image);
    assert!(outcome.longest < PAUSE, "{:?}", outcome.longest);
    eprintln!("20 migrations: {} requests, the longest answer took {:?}", outcome.rounds, outcome.longest);
    owner.expect_healthy();
}

/// Killed at whatever moment, a destination is replaced by the next one, and the clients of the source do not notice.
fn kill_destinations(seed: u64, rounds: usize) {
    const SIZE: u64 = 4 << 20;
    let mut random = Random::new(seed);
    let mut source = Server::serve().content(&pattern(seed, SIZE as usize)).start();
    // The migration may be complete before its destination is killed, and then its client is cut.
    let client = |source: &Server| {
        let worker = Worker::on(source);
        worker.may_end();
        worker
    };
    let mut worker = client(&source);
    let mut destination = listen(0).size(SIZE).start();
    let port = destination.port();
    start_mirror(&source, destination.address(), "--max-speed 40000000");
    let mut killed = 0;
    while killed < rounds {
        let goal = random.below(SIZE + SIZE / 8);
        let mut complete = false;
        wait_for("data", SOON, || {
            // At its end, it has no status any more.
            complete = !destination.process.is_running() || !source.process.is_running();
            if complete {
                return Some(());
            }
            (written(&destination) >= goal).then_some(())
        });
        let attempts = |status: &Status| status.number("migration_attempts");
        let before = source.try_status().map_or(0, |status| attempts(&status));
        destination.process.0.kill().unwrap();
        destination.process.0.wait().unwrap();
        killed += 1;
        let over = wait_for("the end, or the next attempt", SOON, || {
            if !source.process.is_running() {
                return Some(true);
            }
            let status = source.try_status()?;
            (status.get("migration_phase") == "retrying" || attempts(&status) > before).then_some(false)
        });
        if over {
            expect_exit(&mut source, 0);
            worker.join().check(&destination.image);
            expect_same(&source.image, &destination.image);
            source = Server::serve().content(&pattern(seed, SIZE as usize)).start();
            worker = client(&source);
            destination = listen(port).size(SIZE).start();
            start_mirror(&source, destination.address(), "--max-speed 40000000");
        } else {
            worker.expect_progress();
            destination = listen(port).size(SIZE).start();
        }
    }
    expect_migrated(&mut source, &mut destination);
    worker.join().check(&destination.image);
}

/// How much a listener has got; nothing when it is at its end.
fn written(server: &Server) -> u64 {
    server.try_status().map_or(0, |status| status.number("written_bytes"))
}

#[test]
fn destinations_are_killed() {
    // Fifty times, several at once: after each there is the second until the next attempt.
    thread::scope(|scope| {
        for seed in 0..5 {
            scope.spawn(move || kill_destinations(seed + 1, 10));
        }
    });
}

/// Killed at whatever moment, a source leaves a file with everything that was acknowledged; the next one migrates it to
/// the same listener.
#[test]
fn sources_are_killed() {
    const SIZE: u64 = 4 << 20;
    let mut random = Random::new(3);
    let mut destination = listen(0).size(SIZE).start();
    let mut source = Server::serve().content(&pattern(1, SIZE as usize)).start();
    for _ in 0..10 {
        let worker = Worker::on(&source);
        // Slow enough that it is not complete when it is killed, however busy the machine is.
        let goal = written(&destination) + random.below(SIZE / 2);
        wait_for("the start", SOON, || {
            (mirror(&source, destination.address(), "--max-speed 1000000").code == Some(0)).then_some(())
        });
        wait_for("data", SOON, || (written(&destination) >= goal).then_some(()));
        worker.may_end();
        source.process.0.kill().unwrap();
        source.process.0.wait().unwrap();
        worker.join().check(&source.image);
        assert!(destination.process.is_running(), "a listener took a part for the whole");
        let content = fs::read(&source.image).unwrap();
        source = Server::serve().content(&content).start();
    }
    wait_for("the start", SOON, || (mirror(&source, destination.address(), "").code == Some(0)).then_some(()));
    expect_migrated(&mut source, &mut destination);
}
