//! What has to be in an image after a power failure, and clients that keep writing into it.
//!
//! A [`Ledger`] knows of each sector the last content that was acknowledged as durable, and everything that was sent after
//! that. One of these has to be there, whatever the moment; which one is the disk's affair.

use super::{flag, kind, request, wait_for, Client, SOON};
use crate::support::peers::Random;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// The unit in which clients write, in bytes.
pub const SECTOR: usize = 512;
/// The longest request of a [`Writer`], in sectors.
const LENGTH_MAX: u64 = 32;
/// The cookie of a FLUSH; those of changes are their stamps, which are smaller.
const FLUSH: u64 = 1 << 63;

/// A content that a sector may have: 64 times the number `stamp`.
#[derive(Clone, Copy)]
struct Version {
    stamp: u64,
    /// What the clock showed when it was acknowledged.
    answered: Option<u64>,
}

/// Of each sector, what it may hold after a power failure. The first version is the last durable one.
#[derive(Clone)]
pub struct Expected(Vec<Vec<Version>>);

impl Expected {
    /// The first sector that holds nothing that it may hold.
    pub fn lost(&self, image: &[u8]) -> Option<usize> {
        assert_eq!(image.len(), self.0.len() * SECTOR, "the size of the image");
        self.0.iter().zip(image.chunks(SECTOR)).position(|(versions, found)| {
            let is_whole = found[8..] == found[..SECTOR - 8];
            let stamp = u64::from_le_bytes(found[..8].try_into().unwrap());
            !is_whole || versions.iter().all(|version| version.stamp != stamp)
        })
    }
}

/// What clients of one image have sent and what they were answered.
pub struct Ledger {
    expected: Mutex<Expected>,
    /// Counts what happens, so that it has an order.
    clock: AtomicU64,
    /// How often a client was told that something is durable.
    promises: AtomicU64,
}

impl Ledger {
    /// Of an image of so many sectors with [`Ledger::content`].
    pub fn new(sectors: usize) -> Arc<Self> {
        let first = |stamp| vec![Version { stamp, answered: Some(0) }];
        let expected = Mutex::new(Expected((1..=sectors as u64).map(first).collect()));
        // Stamps are readings of the clock, and those of the first content are taken.
        Arc::new(Self { expected, clock: AtomicU64::new(sectors as u64), promises: AtomicU64::new(0) })
    }

    /// What is in the image before anybody writes.
    pub fn content(&self) -> Vec<u8> {
        let expected = self.expected.lock().unwrap();
        expected.0.iter().flat_map(|versions| versions[0].stamp.to_le_bytes().repeat(SECTOR / 8)).collect()
    }

    /// Takes something while nobody sends a request or sees an answer, and what has to be in the image at that moment.
    pub fn at_once<T>(&self, take: impl FnOnce() -> T) -> (Expected, T) {
        let expected = self.expected.lock().unwrap();
        let taken = take();
        (expected.clone(), taken)
    }

    /// How often a client was told that something is durable; grows.
    pub fn promises(&self) -> u64 {
        self.promises.load(Ordering::Relaxed)
    }

    /// A write of these sectors, answered.
    #[track_caller]
    pub fn write(&self, client: &mut Client, sectors: Range<usize>) {
        let stamp = self.tick();
        self.send(sectors.clone(), stamp);
        let payload = stamp.to_le_bytes().repeat(sectors.len() * SECTOR / 8);
        assert_eq!(client.write((sectors.start * SECTOR) as u64, &payload), 0);
        self.answered(sectors, false);
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Sectors are about to be changed.
    fn send(&self, sectors: Range<usize>, stamp: u64) {
        let mut expected = self.expected.lock().unwrap();
        expected.0[sectors].iter_mut().for_each(|versions| versions.push(Version { stamp, answered: None }));
    }

    /// The last change of these sectors was acknowledged.
    fn answered(&self, sectors: Range<usize>, is_durable: bool) {
        let mut expected = self.expected.lock().unwrap();
        let now = self.tick();
        for versions in &mut expected.0[sectors] {
            let last = versions.len() - 1;
            versions[last].answered = Some(now);
            versions.drain(..if is_durable { last } else { 0 });
        }
        self.promises.fetch_add(is_durable.into(), Ordering::Relaxed);
    }

    /// A FLUSH that was sent at this time was acknowledged: what was acknowledged before is durable, whoever wrote it.
    fn flushed(&self, sent: u64) {
        let mut expected = self.expected.lock().unwrap();
        for versions in &mut expected.0 {
            let is_covered = |version: &Version| version.answered.is_some_and(|answered| answered < sent);
            versions.drain(..versions.iter().rposition(is_covered).unwrap_or(0));
        }
        self.promises.fetch_add(1, Ordering::Relaxed);
    }
}

/// How a [`Writer`] behaves.
#[derive(Clone, Copy)]
pub struct Habits {
    /// Requests in flight.
    pub depth: usize,
    /// Of 64 requests, how many are a FLUSH.
    pub flushes: u64,
    /// Of 64 changes, how many have FUA.
    pub fua: u64,
    /// The connection may end: then the writer does.
    pub may_end: bool,
}

/// A client that changes a range of sectors all the time, with requests that do not overlap in flight.
pub struct Writer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Client>>,
}

impl Writer {
    /// Starts it.
    pub fn start(ledger: &Arc<Ledger>, client: Client, sectors: Range<usize>, habits: Habits) -> Self {
        let (ledger, stop) = (Arc::clone(ledger), Arc::new(AtomicBool::new(false)));
        let work = Work { ledger, client, habits, flights: BTreeMap::new(), random: Random::new(sectors.end as u64) };
        let stopping = Arc::clone(&stop);
        let thread = thread::spawn(move || work.run(&sectors, &stopping));
        Self { stop, thread: Some(thread) }
    }

    /// Ends it when nothing is in flight any more, and returns its connection. Fails when it has failed.
    #[track_caller]
    pub fn stop(mut self) -> Client {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().unwrap();
        wait_for("the end of a writer", SOON, || thread.is_finished().then_some(()));
        thread.join().unwrap()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Work {
    ledger: Arc<Ledger>,
    client: Client,
    habits: Habits,
    /// By their cookies, what waits for an answer: the sectors that change, and whether with FUA; none of a FLUSH.
    flights: BTreeMap<u64, (Range<usize>, bool)>,
    random: Random,
}

impl Work {
    fn run(mut self, sectors: &Range<usize>, stop: &AtomicBool) -> Client {
        while !(stop.load(Ordering::Relaxed) && self.flights.is_empty()) {
            match self.round(sectors, stop.load(Ordering::Relaxed)) {
                Ok(()) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    panic!("no answer within {SOON:?}")
                }
                Err(_) if self.habits.may_end => break,
                Err(error) => panic!("a writer was cut off: {error}"),
            }
        }
        self.client
    }

    /// Sends as much as there may be in flight, and takes one answer.
    fn round(&mut self, sectors: &Range<usize>, is_last: bool) -> io::Result<()> {
        while !is_last && self.flights.len() < self.habits.depth {
            self.ask(sectors)?;
        }
        let mut head = [0; 16];
        self.client.stream.read_exact(&mut head)?;
        assert_eq!(head[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a reply without an error");
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        let (changed, is_durable) = self.flights.remove(&cookie).expect("a request that is in flight");
        if cookie & FLUSH == 0 {
            self.ledger.answered(changed, is_durable);
        } else {
            self.ledger.flushed(cookie - FLUSH);
        }
        Ok(())
    }

    fn ask(&mut self, sectors: &Range<usize>) -> io::Result<()> {
        let now = self.ledger.tick();
        if self.random.below(64) < self.habits.flushes {
            self.flights.insert(FLUSH | now, (0..0, true));
            return self.client.stream.write_all(&request(kind::FLUSH, 0, FLUSH | now, 0, 0));
        }
        let changed = self.choose(sectors);
        let is_durable = self.random.below(64) < self.habits.fua;
        let (kind, stamp) = match self.random.below(8) {
            0 => (kind::TRIM, 0),
            1 => (kind::WRITE_ZEROES, 0),
            _ => (kind::WRITE, now),
        };
        let (offset, length) = (changed.start * SECTOR, changed.len() * SECTOR);
        let flags = if is_durable { flag::FUA } else { 0 };
        let mut bytes = request(kind, flags, now, offset as u64, length as u32);
        if kind == kind::WRITE {
            bytes.extend(stamp.to_le_bytes().repeat(length / 8));
        }
        self.ledger.send(changed.clone(), stamp);
        self.flights.insert(now, (changed, is_durable));
        self.client.stream.write_all(&bytes)
    }

    /// Sectors that nothing in flight is about.
    fn choose(&mut self, sectors: &Range<usize>) -> Range<usize> {
        loop {
            let length = 1 + self.random.below(LENGTH_MAX) as usize;
            let start = sectors.start + self.random.below((sectors.len() - length) as u64) as usize;
            let chosen = start..start + length;
            let overlaps = |other: &Range<usize>| chosen.start < other.end && other.start < chosen.end;
            if !self.flights.values().any(|(other, _)| overlaps(other)) {
                return chosen;
            }
        }
    }
}
