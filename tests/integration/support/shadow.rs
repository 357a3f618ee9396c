//! A client that changes an export all the time, reads it back, and knows what has to be there. It has one connection, which
//! must not end, and hears of no error.

use super::fading::Style;
use super::newstyle::Haggler;
use super::peers::Random;
use super::{flag, kind, request, wait_for, Client, SOON};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// The unit in which it writes, in bytes.
const SECTOR: usize = 512;
/// The longest request, in sectors. What is in flight has to fit into the buffers of the sockets.
const LENGTH_MAX: u64 = 32;

/// What it does.
#[derive(Clone, Copy)]
pub struct Habits {
    pub style: Style,
    /// Requests in flight.
    pub depth: usize,
    /// Of 64 requests, how many are a FLUSH.
    pub flushes: u64,
    /// Of 64 changes, how many have FUA.
    pub fua: u64,
}

impl Habits {
    /// Much of everything.
    pub fn usual(style: Style) -> Self {
        Self { style, depth: 8, flushes: 2, fua: 6 }
    }
}

/// What has to be in the export, by sectors: 64 times this number, or anything.
pub struct Shadow(Vec<Option<u64>>);

impl Shadow {
    /// The first sector that is not what it has to be.
    pub fn differs(&self, image: &[u8]) -> Option<usize> {
        assert_eq!(image.len(), self.0.len() * SECTOR, "the size of the image");
        self.differs_in(0, image)
    }

    /// The same of what begins at this byte.
    fn differs_in(&self, start: usize, found: &[u8]) -> Option<usize> {
        let is_wrong =
            |at: usize, byte: u8| self.0[at / SECTOR].is_some_and(|stamp| stamp.to_le_bytes()[at % 8] != byte);
        (start..).zip(found).find(|&(at, &byte)| is_wrong(at, byte)).map(|(at, _)| at / SECTOR)
    }
}

/// The client, in a thread of its own.
pub struct Shadowing {
    stop: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Shadow, String>>>,
}

impl Shadowing {
    /// Starts it on an export of zeroes of `size` bytes.
    #[track_caller]
    pub fn start(address: SocketAddr, size: usize, seed: u64, habits: Habits) -> Self {
        let client = match habits.style {
            Style::Oldstyle => {
                let mut client = Client::new(TcpStream::connect(address).unwrap());
                client.read_greeting();
                client
            }
            Style::Newstyle => Haggler::to(address).structured().go(),
        };
        let (stop, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let work = Work {
            client,
            habits,
            shadow: Shadow(vec![Some(0); size / SECTOR]),
            flights: BTreeMap::new(),
            random: Random::new(seed),
            cookie: 0,
            answers: Arc::clone(&answers),
        };
        let stopping = Arc::clone(&stop);
        let thread = Some(thread::spawn(move || work.run(&stopping)));
        Self { stop, answers, thread }
    }

    /// Answers so far; grows, until it has failed.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Waits for so many more answers. False: it has failed.
    #[track_caller]
    pub fn goes_on(&self, more: u64) -> bool {
        let goal = self.answers() + more;
        wait_for("a client to go on", SOON, || {
            (self.has_failed() || self.answers() >= goal).then(|| !self.has_failed())
        })
    }

    fn has_failed(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends it, with a FLUSH. What has to be in the export, durable, or what went wrong.
    #[track_caller]
    pub fn stop(mut self) -> Result<Shadow, String> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().unwrap();
        wait_for("the end of a client", SOON, || thread.is_finished().then_some(()));
        thread.join().unwrap()
    }
}

impl Drop for Shadowing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Work {
    client: Client,
    habits: Habits,
    shadow: Shadow,
    /// By their cookies, what waits for an answer: its type and its sectors.
    flights: BTreeMap<u64, (u16, Range<usize>)>,
    random: Random,
    cookie: u64,
    answers: Arc<AtomicU64>,
}

impl Work {
    fn run(mut self, stop: &AtomicBool) -> Result<Shadow, String> {
        let cut = |error: io::Error| format!("it was cut off: {error}");
        while !stop.load(Ordering::Relaxed) {
            while self.flights.len() < self.habits.depth {
                self.ask().map_err(cut)?;
            }
            self.answer()?;
        }
        while !self.flights.is_empty() {
            self.answer()?;
        }
        let sectors = self.shadow.0.len();
        for first in (0..sectors).step_by(LENGTH_MAX as usize) {
            self.send(kind::READ, 0, first..sectors.min(first + LENGTH_MAX as usize), &[]).map_err(cut)?;
            self.answer()?;
        }
        self.send(kind::FLUSH, 0, 0..0, &[]).map_err(cut)?;
        self.answer()?;
        self.client.send(&request(kind::DISC, 0, 0, 0, 0));
        Ok(self.shadow)
    }

    fn ask(&mut self) -> io::Result<()> {
        if self.random.below(64) < self.habits.flushes {
            return self.send(kind::FLUSH, 0, 0..0, &[]);
        }
        let sectors = self.choose();
        let flags = if self.random.below(64) < self.habits.fua { flag::FUA } else { 0 };
        let (kind, flags, stamp) = match self.random.below(16) {
            0 => (kind::TRIM, flags, None),
            1 | 2 => (kind::WRITE_ZEROES, flags, Some(0)),
            3..=7 => return self.send(kind::READ, 0, sectors, &[]),
            _ => (kind::WRITE, flags, Some(self.cookie + 1)),
        };
        self.shadow.0[sectors.clone()].fill(stamp);
        let payload = match (kind, stamp) {
            (kind::WRITE, Some(stamp)) => stamp.to_le_bytes().repeat(sectors.len() * SECTOR / 8),
            _ => Vec::new(),
        };
        self.send(kind, flags, sectors, &payload)
    }

    fn send(&mut self, kind: u16, flags: u16, sectors: Range<usize>, payload: &[u8]) -> io::Result<()> {
        self.cookie += 1;
        let (offset, length) = (sectors.start * SECTOR, sectors.len() * SECTOR);
        self.flights.insert(self.cookie, (kind, sectors));
        let head = request(kind, flags, self.cookie, offset as u64, length as u32);
        self.client.stream.write_all(&[&head, payload].concat())
    }

    /// Sectors that nothing in flight is about.
    fn choose(&mut self) -> Range<usize> {
        loop {
            let length = 1 + self.random.below(LENGTH_MAX) as usize;
            let start = self.random.below((self.shadow.0.len() - length) as u64) as usize;
            let chosen = start..start + length;
            if !self.flights.values().any(|(_, other)| chosen.start < other.end && other.start < chosen.end) {
                return chosen;
            }
        }
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.receive(&mut bytes)?;
        Ok(bytes)
    }

    fn receive(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        self.client.stream.read_exact(bytes).map_err(|error| format!("it was cut off, or not answered: {error}"))
    }

    /// Takes one answer.
    fn answer(&mut self) -> Result<(), String> {
        loop {
            let (cookie, is_last) = match self.bytes::<4>()? {
                [0x67, 0x44, 0x66, 0x98] => self.simple()?,
                [0x66, 0x8e, 0x33, 0xef] => self.chunk()?,
                other => return Err(format!("the magic {other:x?}")),
            };
            if is_last {
                self.flights.remove(&cookie);
                self.answers.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
        }
    }

    fn flight(&self, cookie: u64) -> Result<(u16, Range<usize>), String> {
        self.flights.get(&cookie).cloned().ok_or_else(|| format!("an answer to {cookie}, which is not in flight"))
    }

    fn simple(&mut self) -> Result<(u64, bool), String> {
        let error = u32::from_be_bytes(self.bytes()?);
        let cookie = u64::from_be_bytes(self.bytes()?);
        let (kind, sectors) = self.flight(cookie)?;
        if error != 0 {
            return Err(format!("the error {error} for a request of type {kind}"));
        }
        if kind == kind::READ {
            let mut data = vec![0; sectors.len() * SECTOR];
            self.receive(&mut data)?;
            self.check(sectors.start * SECTOR, &data)?;
        }
        Ok((cookie, true))
    }

    fn chunk(&mut self) -> Result<(u64, bool), String> {
        let [flags, kind] = [self.bytes::<2>()?, self.bytes::<2>()?].map(u16::from_be_bytes);
        let cookie = u64::from_be_bytes(self.bytes()?);
        let mut payload = vec![0; u32::from_be_bytes(self.bytes()?) as usize];
        self.receive(&mut payload)?;
        self.flight(cookie)?;
        let number = |bytes: &[u8]| bytes.iter().fold(0_usize, |n, &byte| n << 8 | usize::from(byte));
        match kind {
            0 => {}
            1 => self.check(number(&payload[..8]), &payload[8..])?,
            2 => self.check(number(&payload[..8]), &vec![0; number(&payload[8..])])?,
            other => return Err(format!("a chunk of type {other}: {payload:?}")),
        }
        Ok((cookie, flags & 1 != 0))
    }

    fn check(&self, start: usize, data: &[u8]) -> Result<(), String> {
        match self.shadow.differs_in(start, data) {
            None => Ok(()),
            Some(at) => Err(format!("sector {at} is not what was written last")),
        }
    }
}
