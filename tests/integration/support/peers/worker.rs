//! A client that works on an image all through a migration, and fails at the first byte that is not what it should be.

use crate::support::{kind, reply, request, wait_for, Server, SOON};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Numbers that look random, the same ones for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// From 0 up to and without `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }
}

/// What a [`Worker`] shares with the test.
struct Common {
    /// Requests answered.
    rounds: AtomicU64,
    /// A connection that ends is no failure.
    may_end: AtomicBool,
    /// To end by itself.
    stop: AtomicBool,
    /// Who serves the image; where to go when a connection has ended. `None`: nowhere.
    next: Mutex<Option<SocketAddr>>,
}

/// A client that writes, reads, zeroes and flushes without a pause, in a range of its own, and knows what has to be
/// there. It fails on an error, on a byte that is wrong, and on the end of its connection unless that was allowed.
pub struct Worker {
    common: Arc<Common>,
    thread: Option<JoinHandle<Outcome>>,
}

/// What a [`Worker`] knows at its end.
pub struct Outcome {
    /// Where its range begins.
    start: u64,
    /// What was acknowledged, from there.
    model: Vec<u8>,
    /// What was sent and not answered: where, from there, and the bytes.
    pending: Option<(usize, Vec<u8>)>,
    /// The longest time an answer took.
    pub longest: Duration,
    /// Requests answered.
    pub rounds: u64,
}

impl Worker {
    /// Works on a range of what is served at `address` until the connection ends.
    pub fn start(address: SocketAddr, range: Range<u64>) -> Self {
        Self::begin(address, range, None)
    }

    /// As [`Worker::start`], on the whole image of a server.
    pub fn on(server: &Server) -> Self {
        Self::start(server.address(), 0..server.status().number("size"))
    }

    /// As [`Worker::start`]; goes to where it is sent each time its connection ends.
    pub fn roaming(address: SocketAddr, range: Range<u64>) -> Self {
        Self::begin(address, range, Some(address))
    }

    fn begin(address: SocketAddr, range: Range<u64>, next: Option<SocketAddr>) -> Self {
        let may_end = AtomicBool::new(next.is_some());
        let common = Arc::new(Common {
            rounds: AtomicU64::new(0),
            may_end,
            stop: AtomicBool::new(false),
            next: Mutex::new(next),
        });
        let shared = Arc::clone(&common);
        let thread = thread::spawn(move || Outcome::work(address, range, &shared));
        let worker = Self { common, thread: Some(thread) };
        worker.expect_progress();
        worker
    }

    /// Fails unless it has some more answers soon.
    #[track_caller]
    pub fn expect_progress(&self) {
        let goal = self.rounds().load(Ordering::Relaxed) + 20;
        wait_for("answers to a client", SOON, || {
            assert!(!self.has_ended(), "the client has ended");
            (self.rounds().load(Ordering::Relaxed) >= goal).then_some(())
        });
    }

    /// How many answers it has had; grows.
    pub fn rounds(&self) -> &AtomicU64 {
        &self.common.rounds
    }

    /// As [`Worker::rounds`], for a thread that may outlive it.
    pub fn counter(&self) -> impl Fn() -> u64 + Send + 'static {
        let common = Arc::clone(&self.common);
        move || common.rounds.load(Ordering::Relaxed)
    }

    /// From now on its connection may end.
    pub fn may_end(&self) {
        self.common.may_end.store(true, Ordering::Relaxed);
    }

    /// Sends it elsewhere when its connection ends.
    pub fn send_to(&self, address: SocketAddr) {
        *self.common.next.lock().unwrap() = Some(address);
    }

    /// True when its connection has ended, or it has failed.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Lets it end by itself.
    #[track_caller]
    pub fn stop(self) -> Outcome {
        self.common.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn join(mut self) -> Outcome {
        wait_for("the end of a client", SOON, || self.has_ended().then_some(()));
        match self.thread.take().unwrap().join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Of a test that has failed: the thread would go on for ever.
        self.common.may_end.store(true, Ordering::Relaxed);
        self.common.stop.store(true, Ordering::Relaxed);
    }
}

impl Outcome {
    fn work(address: SocketAddr, range: Range<u64>, common: &Common) -> Self {
        let mut stream = Self::connect(address).unwrap();
        let length = usize::try_from(range.end - range.start).unwrap();
        let mut work =
            Self { start: range.start, model: vec![0; length], pending: None, longest: Duration::ZERO, rounds: 0 };
        work.ask(&mut stream, kind::READ, 0..length, None).unwrap();
        let mut random = Random::new(range.start + 1);
        while !common.stop.load(Ordering::Relaxed) {
            match work.round(&mut stream, &mut random) {
                Ok(()) => {
                    work.rounds += 1;
                    common.rounds.store(work.rounds, Ordering::Relaxed);
                }
                Err(error) => {
                    assert!(common.may_end.load(Ordering::Relaxed), "a client was cut off: {error}");
                    let timeout = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
                    assert!(!timeout, "a client had no answer in {SOON:?}");
                    match work.move_on(common) {
                        Some(next) => stream = next,
                        None => return work,
                    }
                }
            }
        }
        work
    }

    fn connect(address: SocketAddr) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SOON))?;
        stream.set_write_timeout(Some(SOON))?;
        stream.read_exact(&mut [0; 152])?;
        Ok(stream)
    }

    /// Goes to where the image is now, if it roams; what was not answered may have happened there or not.
    fn move_on(&mut self, common: &Common) -> Option<TcpStream> {
        let give_up = Instant::now() + SOON;
        loop {
            let next = (*common.next.lock().unwrap())?;
            if common.stop.load(Ordering::Relaxed) {
                return None;
            }
            assert!(Instant::now() < give_up, "nobody serves the image at {next}");
            let Ok(mut stream) = Self::connect(next) else {
                thread::sleep(Duration::from_millis(2));
                continue;
            };
            let before = std::mem::take(&mut self.model);
            self.model = vec![0; before.len()];
            let everything = 0..before.len();
            if self.ask(&mut stream, kind::READ, everything, None).is_err() {
                self.model = before;
                continue;
            }
            let found = std::mem::replace(&mut self.model, before);
            self.expect(&found);
            (self.model, self.pending) = (found, None);
            return Some(stream);
        }
    }

    fn round(&mut self, stream: &mut TcpStream, random: &mut Random) -> io::Result<()> {
        let size = self.model.len() as u64;
        let mut length = 1 + random.below(16 << 10).min(size - 1);
        let mut start = random.below(size - length + 1);
        if random.below(4) > 0 {
            // Most clients have blocks.
            (start, length) = (start & !4095, length.next_multiple_of(4096).min(size - (start & !4095)));
        }
        let range = start as usize..(start + length) as usize;
        let began = Instant::now();
        match random.below(16) {
            0 => self.ask(stream, kind::FLUSH, 0..0, None)?,
            1 => self.ask(stream, kind::WRITE_ZEROES, range.clone(), Some(vec![0; range.len()]))?,
            2..=5 => {
                let expected = self.model[range.clone()].to_vec();
                self.ask(stream, kind::READ, range.clone(), None)?;
                assert!(self.model[range] == expected, "a client read something else than it wrote");
            }
            _ => {
                let stamp = (self.rounds + 1).wrapping_mul(0x0101_0101_0101_0101) ^ random.0;
                let mut payload = stamp.to_le_bytes().repeat(range.len().div_ceil(8));
                payload.truncate(range.len());
                self.ask(stream, kind::WRITE, range, Some(payload))?;
            }
        }
        self.longest = self.longest.max(began.elapsed());
        Ok(())
    }

    /// One request, answered. What is read, or was written, is in the model then.
    fn ask(
        &mut self,
        stream: &mut TcpStream,
        kind: u16,
        range: Range<usize>,
        payload: Option<Vec<u8>>,
    ) -> io::Result<()> {
        let offset = if kind == kind::FLUSH { 0 } else { self.start + range.start as u64 };
        let cookie = self.rounds ^ 0x5555_0000;
        let mut bytes = request(kind, 0, cookie, offset, range.len() as u32);
        if kind == kind::WRITE {
            bytes.extend_from_slice(payload.as_deref().unwrap());
        }
        self.pending = payload.map(|payload| (range.start, payload));
        stream.write_all(&bytes)?;
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        assert!(head[..] == reply(0, cookie), "an error, or no reply: {head:?}");
        if kind == kind::READ {
            stream.read_exact(&mut self.model[range])?;
        } else if let Some((at, payload)) = self.pending.take() {
            self.model[at..][..payload.len()].copy_from_slice(&payload);
        }
        Ok(())
    }

    /// Fails unless the image file holds everything that was acknowledged.
    #[track_caller]
    pub fn check(&self, image: &Path) {
        let mut found = vec![0; self.model.len()];
        File::open(image).unwrap().read_exact_at(&mut found, self.start).unwrap();
        self.expect(&found);
    }

    /// Fails unless `found`, the bytes of its range, hold everything that was acknowledged.
    #[track_caller]
    pub fn expect(&self, found: &[u8]) {
        let mut expected = self.model.clone();
        if let Some((at, payload)) = &self.pending {
            for (at, byte) in (*at..).zip(payload) {
                if found[at] == *byte {
                    expected[at] = *byte;
                }
            }
        }
        if found != expected {
            let wrong: Vec<usize> = (0..found.len()).filter(|&at| found[at] != expected[at]).collect();
            let (first, last) = (wrong[0], wrong[wrong.len() - 1]);
            panic!("{} acknowledged bytes are lost, between {first} and {last} of {}", wrong.len(), found.len());
        }
    }
}
