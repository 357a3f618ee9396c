//! Power failures: what a client was told is durable stays, and at every moment there is one whole copy of an image.
//!
//! A moment is what the disks may hold and what the clients know, taken at once. It is looked at later, so that nobody
//! waits for that.

use crate::support::fuse::{Disk, Op, PowerFailures, Remains};
use crate::support::ledger::{Expected, Habits, Ledger, Writer, SECTOR};
use crate::support::peers::{expect_exit, listen, start_mirror, wait_for_status};
use crate::support::{kind, request, wait_for, Server, SOON};
use std::io::ErrorKind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{mpsc, Arc};
use std::thread;

const SECTORS: usize = 1024;
const SIZE: u64 = (SECTORS * SECTOR) as u64;

/// With more changes than this that may be lost, not all sets of them are tried.
const ALL_SETS_MAX: usize = 10;

/// How often the two ways of trying were taken.
#[derive(Default)]
struct Tried {
    /// Moments with several changes of which all sets were tried.
    all: usize,
    /// Moments with more changes.
    many: usize,
}

/// The first power failure of this moment that loses what was promised.
fn loss(expected: &Expected, mut failures: impl Iterator<Item = Remains>) -> Option<String> {
    failures.find_map(|remains| {
        let image = remains.content("image").expect("the file is there");
        let sector = expected.lost(&image)?;
        Some(format!("sector {sector} is lost {remains}"))
    })
}

/// Fails unless every power failure of this moment keeps what was promised.
#[track_caller]
fn expect_kept(ledger: &Ledger, disk: &Disk, seed: u64, tried: &mut Tried) {
    let (expected, (pending, failures)) = ledger.at_once(|| (disk.pending().len(), disk.power_failures(seed)));
    assert_eq!(loss(&expected, failures), None);
    tried.all += usize::from((2..=ALL_SETS_MAX).contains(&pending));
    tried.many += usize::from(pending > ALL_SETS_MAX);
}

/// Clients that each write to a part of the image.
fn writers(ledger: &Arc<Ledger>, server: &Server, habits: [Habits; 4]) -> Vec<Writer> {
    const PART: usize = SECTORS / 4;
    let start = |(n, habits)| Writer::start(ledger, server.connect(), n * PART..(n + 1) * PART, habits);
    habits.into_iter().enumerate().map(start).collect()
}

/// Moments in the life of a server whose clients write: in a sync, and after something was promised.
#[track_caller]
fn watch(ledger: &Ledger, disk: &Disk, moments: u64, tried: &mut Tried) {
    for seed in 0..moments {
        disk.hold(Op::Fsync, ..);
        disk.wait_for_waiting(Op::Fsync, 1);
        let promises = ledger.promises();
        expect_kept(ledger, disk, seed, tried);
        disk.heal(Op::Fsync);
        wait_for("a promise", SOON, || (ledger.promises() > promises).then_some(()));
        expect_kept(ledger, disk, seed, tried);
    }
}

/// What is left can be served.
#[track_caller]
fn expect_served(ledger: &Ledger, disk: &Disk, seed: u64) {
    let (expected, failures) = ledger.at_once(|| disk.power_failures(seed));
    let remains = failures.last().unwrap();
    let disk = Disk::mount_remains(&remains, 4 * SIZE).unwrap();
    let server = Server::serve().file(disk.path("image")).start();
    assert_eq!(expected.lost(&server.connect().read(0, SIZE as u32).unwrap()), None, "{remains}");
    server.expect_healthy();
}

#[test]
fn a_server_keeps_what_it_promised() {
    let Some(disk) = Disk::mount(4 * SIZE) else { return };
    let ledger = Ledger::new(SECTORS);
    let server = Server::serve().file(disk.furnish("image", &ledger.content())).start();
    let mut tried = Tried::default();
    for (depth, flushes, fua) in [(1, 0, 64), (1, 64, 64), (4, 1, 0), (4, 0, 1), (16, 8, 8)] {
        let habits = Habits { depth, flushes, fua, may_end: false };
        // Where some only flush, others have to write.
        let busy = Habits { flushes: flushes / 2, ..habits };
        let clients = writers(&ledger, &server, [habits, busy, busy, habits]);
        watch(&ledger, &disk, 6, &mut tried);
        clients.into_iter().map(Writer::stop).for_each(drop);
        expect_kept(&ledger, &disk, depth as u64, &mut tried);
    }
    assert!(tried.all > 0 && tried.many > 0, "both ways of trying: {} and {}", tried.all, tried.many);
    expect_served(&ledger, &disk, 1);
    server.expect_healthy();
}

/// Also when its clients ask for nothing: each answer is a promise with `--sync`.
#[test]
fn a_server_with_sync_has_what_it_answered() {
    let Some(disk) = Disk::mount(4 * SIZE) else { return };
    let server = Server::serve().file(disk.furnish("image", &vec![0; SIZE as usize])).arg("--sync").start();
    let mut client = server.connect();
    for n in 0..20_u8 {
        let at = u64::from(n) * 4096;
        assert_eq!(client.write(at, &[n + 1; 4096]), 0);
        assert_eq!(client.ask(kind::WRITE_ZEROES, 0, at + 512, 512, &[]), 0);
        for remains in disk.power_failures(n.into()) {
            let image = remains.content("image").expect("the file is there");
            let kept = &image[at as usize..][..4096];
            assert!(kept[..512] == [n + 1; 512] && kept[512..1024] == [0; 512] && kept[1024..] == [n + 1; 3072]);
        }
    }
    server.expect_healthy();
}

/// The end of the connection after DISC is the promise of a listener that it has the image.
#[test]
fn a_listener_is_done_when_all_is_durable() {
    let Some(disk) = Disk::mount(4 * SIZE) else { return };
    let ledger = Ledger::new(SECTORS);
    let mut listener = listen(0).file(disk.furnish("image", &ledger.content())).start();
    let mut tried = Tried::default();
    let habits = Habits { depth: 8, flushes: 1, fua: 1, may_end: false };
    let writer = Writer::start(&ledger, listener.connect(), 0..SECTORS, habits);
    watch(&ledger, &disk, 6, &mut tried);
    let mut sender = writer.stop();
    for start in (0..SECTORS).step_by(64) {
        ledger.write(&mut sender, start..start + 64);
    }
    expect_kept(&ledger, &disk, 6, &mut tried);
    disk.hold(Op::Fsync, ..);
    sender.send(&request(kind::DISC, 0, 0, 0, 0));
    disk.wait_for_waiting(Op::Fsync, 1);
    assert!(!disk.pending().is_empty(), "no FLUSH came before");
    sender.stream.set_nonblocking(true).unwrap();
    assert_eq!(sender.stream.peek(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock, "not over yet");
    sender.stream.set_nonblocking(false).unwrap();
    disk.heal(Op::Fsync);
    sender.expect_closed();
    assert!(disk.pending().is_empty(), "{:?}", disk.pending());
    expect_exit(&mut listener, 0);
    expect_kept(&ledger, &disk, 7, &mut tried);
    expect_served(&ledger, &disk, 7);
}

/// Whether the image is there, and `serve` takes it.
fn is_served(remains: &Remains) -> bool {
    let mark = remains.xattr("image", "user.flexnbd.state").map(String::from_utf8_lossy);
    remains.names().contains(&"image") && mark.is_none_or(|mark| mark.starts_with("sends "))
}

/// Whether nothing was written to the image.
fn is_blank(remains: &Remains) -> bool {
    remains.content("image").is_none_or(|image| image.iter().all(|&byte| byte == 0))
}

/// Both disks and the promises of one moment of a migration.
struct Moment {
    expected: Expected,
    at_source: PowerFailures,
    at_destination: PowerFailures,
    unlinks: bool,
    /// The source removes its file, or makes it durable that it has.
    is_removing: bool,
}

impl Moment {
    /// Fails unless everything promised is on one side whatever the power failures leave, and at most one side would be served.
    fn check(self) {
        let Self { expected, at_source, at_destination, unlinks, is_removing } = self;
        let (mut serves_there, mut destination_lost) = (false, None);
        for remains in at_destination {
            let is_copy = is_served(&remains) && !is_blank(&remains);
            serves_there |= is_copy;
            if is_copy || destination_lost.is_none() {
                let lost = loss(&expected, std::iter::once(remains));
                assert!(!is_copy || lost.is_none(), "a part would be served: {lost:?}");
                destination_lost = destination_lost.or(lost);
            }
        }
        let (mut source_lost, mut is_gone) = (None, false);
        for remains in at_source {
            assert!(!(serves_there && is_served(&remains)), "there would be two: {remains}");
            match remains.content("image") {
                Some(image) => source_lost = source_lost.or(expected.lost(&image).map(|at| (at, remains.to_string()))),
                None => is_gone = true,
            }
        }
        // With `--unlink`, the source's file is the image as long as it is there. Else it is left behind at the end.
        let is_left = is_gone || is_removing;
        assert!(!is_left || unlinks && destination_lost.is_none(), "the file is gone too early: {destination_lost:?}");
        let has_moved = !unlinks && destination_lost.is_none();
        assert!(source_lost.is_none() || has_moved, "lost: {source_lost:?}; at the destination: {destination_lost:?}");
    }
}

/// A migration between two disks that both lose power at every moment that matters, and in between. Clients write all the
/// time, to whoever has the image.
fn is_whole_somewhere(options: &str) {
    let (Some(here), Some(there)) = (Disk::mount(4 * SIZE), Disk::mount(4 * SIZE)) else { return };
    let ledger = Ledger::new(SECTORS);
    let mut source = Server::serve().file(here.furnish("image", &ledger.content())).start();
    let destination = listen(0).file(there.furnish_sparse("image", SIZE)).arg("--serve").start();
    let habits = Habits { depth: 4, flushes: 2, fua: 2, may_end: true };
    let clients = writers(&ledger, &source, [habits; 4]);
    let unlinks = options.contains("--unlink");
    let held = [
        (&there, Op::Fsync),
        (&here, Op::Unlink),
        (&here, Op::FsyncFolder),
        (&there, Op::FsyncAll),
        (&here, Op::FsyncAll),
    ];
    let (mut seed, mut met) = (0, [false; 5]);
    for (disk, op) in held {
        disk.hold(op, ..);
    }
    start_mirror(&source, destination.address(), options);
    // What is looked at meanwhile must not keep a flush waiting: the migration would wait for a better time to end.
    let unchecked = AtomicUsize::new(0);
    thread::scope(|scope| {
        let (moments, taken) = mpsc::channel::<Moment>();
        let unchecked = &unchecked;
        scope.spawn(move || {
            for moment in taken {
                moment.check();
                unchecked.fetch_sub(1, Ordering::Relaxed);
            }
        });
        let mut is_over = false;
        while !is_over {
            let written = there.count(Op::Write);
            wait_for("the migration to go on", SOON, || {
                is_over = !source.process.is_running();
                let is_held = held.iter().any(|(disk, op)| disk.waiting(*op) > 0);
                (is_over || is_held || there.count(Op::Write) > written).then_some(())
            });
            let waiting = held.map(|(disk, op)| disk.waiting(op) > 0);
            // The moments that matter, and others when there is time.
            if is_over || waiting.contains(&true) || unchecked.load(Ordering::Relaxed) == 0 {
                let take = || [&here, &there].map(|disk| disk.power_failures(seed));
                let (expected, [at_source, at_destination]) = ledger.at_once(take);
                let is_removing = waiting[1] || waiting[2];
                unchecked.fetch_add(1, Ordering::Relaxed);
                // It fails when the other side has, which tells why.
                let _ = moments.send(Moment { expected, at_source, at_destination, unlinks, is_removing });
                seed += 1;
            }
            for ((disk, op), _) in held.iter().zip(waiting).filter(|(_, is_waiting)| *is_waiting) {
                disk.heal(*op);
                disk.hold(*op, ..);
            }
            (0..5).for_each(|n| met[n] |= waiting[n]);
        }
    });
    for (disk, op) in held {
        disk.heal(op);
    }
    assert_eq!(met, [true, unlinks, unlinks, true, true], "the moments that matter");
    expect_exit(&mut source, 0);
    clients.into_iter().map(Writer::stop).for_each(drop);
    // The destination's copy counts.
    let mut tried = Tried::default();
    expect_kept(&ledger, &there, seed, &mut tried);
    assert_eq!(here.power_failures(seed).any(|remains| remains.content("image").is_none()), unlinks);
    assert_eq!(here.power_failures(seed).all(|remains| remains.content("image").is_none()), unlinks);
    wait_for_status(&destination, "has_control", "true");
    let clients = writers(&ledger, &destination, [Habits { may_end: false, ..habits }; 4]);
    watch(&ledger, &there, 3, &mut tried);
    clients.into_iter().map(Writer::stop).for_each(drop);
    expect_kept(&ledger, &there, seed, &mut tried);
    destination.expect_healthy();
}

#[test]
fn a_migration_has_a_whole_copy_somewhere() {
    is_whole_somewhere("--max-speed 2000000");
}

#[test]
fn a_migration_that_unlinks_has_a_whole_copy_somewhere() {
    is_whole_somewhere("--max-speed 2000000 --unlink");
}

/// What a destination had answered, and lost with its power, is sent again.
#[test]
fn a_destination_that_lost_power_is_filled_anew() {
    let Some(mut disk) = Disk::mount(4 * SIZE) else { return };
    disk.hold(Op::Fsync, ..);
    let ledger = Ledger::new(SECTORS);
    let mut source = Server::serve().content(&ledger.content()).start();
    let mut listener = listen(0).file(disk.furnish_sparse("image", SIZE)).start();
    let port = listener.port();
    let clients = writers(&ledger, &source, [Habits { depth: 4, flushes: 2, fua: 2, may_end: true }; 4]);
    start_mirror(&source, listener.address(), "--max-speed 2000000");
    for seed in 0..3 {
        // With some of it there; with all of it, before the first FLUSH is answered.
        if seed == 0 {
            wait_for("a write", SOON, || (disk.count(Op::Write) > 0).then_some(()));
        } else {
            disk.wait_for_waiting(Op::Fsync, 1);
        }
        let remains = disk.power_failures(seed).next().unwrap();
        listener.process.signal("KILL");
        listener.process.wait(SOON);
        disk = Disk::mount_remains(&remains, 4 * SIZE).unwrap();
        if seed < 2 {
            disk.hold(Op::Fsync, ..);
        }
        listener = listen(port).file(disk.path("image")).start();
    }
    expect_exit(&mut source, 0);
    expect_exit(&mut listener, 0);
    clients.into_iter().map(Writer::stop).for_each(drop);
    expect_kept(&ledger, &disk, 0, &mut Tried::default());
    expect_served(&ledger, &disk, 0);
}
