//! Peers of a migration: the real listener, destinations that follow a script, and a client that never stops checking.

use crate::support::{
    flag, kind, pattern, reply, request, run, wait_for, Builder, Client, Output, Server, GREETING_MAGICS, SOON,
};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Transmission flags.
pub mod offer {
    /// What the predecessor's listener offers: flags, FLUSH, FUA.
    pub const PREDECESSOR: u32 = 1 | 4 | 8;
    /// Nothing but that there are flags.
    pub const NOTHING: u32 = 1;
    /// FLUSH, FUA, TRIM and `WRITE_ZEROES`.
    pub const ALL: u32 = 1 | 4 | 8 | 32 | 64;
}

/// `flexnbd listen`, on this port; 0 picks one.
pub fn listen(port: u16) -> Builder {
    listen_after(port, "exec")
}

/// As [`listen`]; the command, `exec` and what goes before or behind it, becomes the listener. The harness starts `serve` on port 0: the shell puts
/// the words of a listener in place of those, and becomes it.
pub fn listen_after(port: u16, command: &str) -> Builder {
    let script = format!(
        r#"bin=$1 addr=$4 file=$6; shift 8; {command} "$bin" listen --addr "$addr" --port "$0" --file "$file" "$@""#
    );
    Server::serve().through(&["sh", "-c", &script, &port.to_string()])
}

/// Runs `flexnbd mirror` with more options, separated by spaces.
#[track_caller]
pub fn mirror(source: &Server, to: SocketAddr, more: &str) -> Output {
    let (addr, port) = (to.ip().to_string(), to.port().to_string());
    let mut args = vec!["mirror", "--addr", &addr, "--port", &port, "--sock", source.sock.to_str().unwrap()];
    args.extend(more.split_whitespace());
    run(&args, &[])
}

/// Starts a migration; fails unless it is started.
#[track_caller]
pub fn start_mirror(source: &Server, to: SocketAddr, more: &str) {
    let output = mirror(source, to, more);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!((output.code, &*said, &*output.stderr), (Some(0), "Migration started\n", ""), "{}", source.log());
}

/// Runs a mode that takes nothing but a control socket and options; returns its code and what it printed to either side.
#[track_caller]
pub fn tell(mode: &str, server: &Server, options: &str) -> (Option<i32>, String) {
    let mut args = vec![mode, "--sock", server.sock.to_str().unwrap()];
    args.extend(options.split_whitespace());
    let output = run(&args, &[]);
    (output.code, String::from_utf8(output.stdout).unwrap() + &output.stderr)
}

/// Fails unless the server ends by itself with this code.
#[track_caller]
pub fn expect_exit(server: &mut Server, code: i32) {
    let status = server.process.wait(SOON);
    assert_eq!(status.code(), Some(code), "{}", server.log());
}

/// Fails unless a migration in progress ends well on both sides, and both files are the same.
#[track_caller]
pub fn expect_migrated(source: &mut Server, destination: &mut Server) {
    expect_exit(source, 0);
    expect_exit(destination, 0);
    expect_same(&source.image, &destination.image);
}

/// Fails unless both files have the same bytes.
#[track_caller]
pub fn expect_same(a: &Path, b: &Path) {
    const PIECE: usize = 1 << 20;
    let (left, right) = (File::open(a).unwrap(), File::open(b).unwrap());
    let size = left.metadata().unwrap().len();
    assert_eq!(size, right.metadata().unwrap().len(), "the size of {} and {}", a.display(), b.display());
    let (mut one, mut other) = (vec![0; PIECE], vec![0; PIECE]);
    for offset in (0..size).step_by(PIECE) {
        let length = PIECE.min((size - offset) as usize);
        left.read_exact_at(&mut one[..length], offset).unwrap();
        right.read_exact_at(&mut other[..length], offset).unwrap();
        if one[..length] != other[..length] {
            let at = (0..length).find(|&at| one[at] != other[at]).unwrap();
            panic!("{} and {} differ at {}", a.display(), b.display(), offset + at as u64);
        }
    }
}

/// Waits until a key of the status has this value.
#[track_caller]
pub fn wait_for_status(server: &Server, key: &str, value: &str) {
    let pair = format!(" {key}={value} ");
    wait_for(format_args!("the status{pair}"), SOON, || server.status().line().contains(&pair).then_some(()));
}

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

/// When a destination does something wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Instead of greeting.
    Greeting,
    /// At the first write.
    FirstWrite,
    /// At the write that makes half of the image.
    MiddleWrite,
    /// At a write after the first FLUSH: while clients are paused, or just before. At the second FLUSH if there is none.
    LastWrite,
    /// At the FLUSH before clients are paused.
    FirstFlush,
    /// At the FLUSH after: while clients are paused.
    LastFlush,
    /// At the end.
    Disc,
}

/// What it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Closes, everything read.
    Close,
    /// Closes with something unread, which is a reset.
    Reset,
    /// Neither reads nor answers nor closes.
    Hang,
    /// Answers with EIO.
    Error,
    /// Answers somebody else.
    WrongCookie,
    /// Answers with something that is no reply.
    Garbage,
    /// Answers, then closes.
    AnswerAndClose,
    /// Greets for another size.
    WrongSize,
}

/// What a [`Destination`] has seen.
#[derive(Default)]
pub struct Seen {
    /// The image it holds.
    pub image: Vec<u8>,
    /// Faults that came to be.
    pub fired: usize,
    /// Connections.
    pub attempts: usize,
    /// Requests of the last connection: type, flags, length.
    pub requests: Vec<(u16, u16, u32)>,
    /// Bytes of data in all writes of the last connection.
    pub data: u64,
    /// A DISC came.
    pub disc: bool,
}

/// A destination that keeps the image in memory, answers in order, and follows a list of faults: each connection gets
/// the first one that has not come to be. After the last one it is gone, and its port free.
pub struct Destination {
    /// Where it listens.
    pub address: SocketAddr,
    /// What it has seen so far.
    pub seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    // It returns the connections that hang, so that they do so until the end.
    thread: Option<JoinHandle<Vec<TcpStream>>>,
}

/// How a [`Destination`] behaves.
pub struct Script {
    /// The size in its greeting.
    pub size: usize,
    /// The flags in its greeting.
    pub flags: u32,
    /// How long it takes over each request.
    pub delay: Duration,
    /// What goes wrong, one after the other.
    pub faults: Vec<(At, Fault)>,
    /// Answers the first FLUSH of a connection only once this has grown: there is something left for the pause then.
    pub flush_after: Option<Box<dyn Fn() -> u64 + Send>>,
}

impl Script {
    /// Nothing goes wrong.
    pub fn new(size: usize) -> Self {
        Self { size, flags: offer::ALL, delay: Duration::ZERO, faults: Vec::new(), flush_after: None }
    }

    /// With these flags.
    pub fn flags(self, flags: u32) -> Self {
        Self { flags, ..self }
    }

    /// With this delay.
    pub fn delay(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// With these faults.
    pub fn faults(self, faults: &[(At, Fault)]) -> Self {
        Self { faults: faults.to_vec(), ..self }
    }

    /// So that `worker` writes something between the first FLUSH and its answer.
    pub fn busy_with(self, worker: &Worker) -> Self {
        let common = Arc::clone(&worker.common);
        Self { flush_after: Some(Box::new(move || common.rounds.load(Ordering::Relaxed))), ..self }
    }

    /// Starts it.
    pub fn start(self) -> Destination {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // What was there before must go.
        let seen = Seen { image: pattern(99, self.size), ..Seen::default() };
        let (seen, stop) = (Arc::new(Mutex::new(seen)), Arc::new(AtomicBool::new(false)));
        let (shared, stopping) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut hung = Vec::new();
            for stream in listener.incoming() {
                if stopping.load(Ordering::Relaxed) {
                    break;
                }
                let stream = stream.unwrap();
                stream.set_read_timeout(Some(SOON)).unwrap();
                stream.set_nodelay(true).unwrap();
                // An error is that the source has gone.
                if let Ok(Some(stream)) = self.converse(stream, &shared) {
                    hung.push(stream);
                }
                if !self.faults.is_empty() && shared.lock().unwrap().fired == self.faults.len() {
                    break;
                }
            }
            hung
        });
        Destination { address, seen, stop, thread: Some(thread) }
    }

    /// One connection. Returns it when it is to stay open without a word.
    fn converse(&self, mut stream: TcpStream, seen: &Mutex<Seen>) -> io::Result<Option<TcpStream>> {
        let mut fault = {
            let mut seen = seen.lock().unwrap();
            (seen.requests, seen.data) = (Vec::new(), 0);
            seen.attempts += 1;
            self.faults.get(seen.fired).copied()
        };
        let fire = || seen.lock().unwrap().fired += 1;
        let mut size = self.size as u64;
        if let Some((_, fault)) = fault.take_if(|(at, _)| *at == At::Greeting) {
            fire();
            match fault {
                Fault::Hang => return Ok(Some(stream)),
                Fault::WrongSize => size += 512,
                Fault::Garbage => stream.write_all(&[0x47; 152])?,
                _ => return Ok(None),
            }
        }
        let mut greeting = GREETING_MAGICS.to_vec();
        greeting.extend(size.to_be_bytes());
        greeting.extend(self.flags.to_be_bytes());
        greeting.resize(152, 0);
        stream.write_all(&greeting)?;
        let (mut written, mut flushes) = (0, 0);
        loop {
            // The last byte stays unread until it is known whether it is to be read at all.
            let mut head = [0; 28];
            stream.read_exact(&mut head[..27])?;
            stream.peek(&mut head[27..])?;
            assert_eq!(head[..4], 0x2560_9513_u32.to_be_bytes(), "the magic of a request");
            let flags = u16::from_be_bytes(head[4..6].try_into().unwrap());
            let asked = u16::from_be_bytes(head[6..8].try_into().unwrap());
            let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
            let offset = u64::from_be_bytes(head[16..24].try_into().unwrap()) as usize;
            let length = u32::from_be_bytes(head[24..].try_into().unwrap());
            let bytes = length as usize;
            let writes = matches!(asked, kind::WRITE | kind::WRITE_ZEROES);
            let now = fault.take_if(|(at, _)| match at {
                At::Greeting => false,
                At::FirstWrite => writes,
                At::MiddleWrite => writes && written + bytes >= self.size / 2,
                At::LastWrite => flushes > 0 && (writes || asked == kind::FLUSH),
                At::FirstFlush => asked == kind::FLUSH,
                At::LastFlush => asked == kind::FLUSH && flushes > 0,
                At::Disc => asked == kind::DISC,
            });
            if now.is_some() {
                fire();
            }
            let how = now.map(|(_, how)| how);
            match how {
                Some(Fault::Reset) => return Ok(None),
                Some(Fault::Hang) => return Ok(Some(stream)),
                _ => stream.read_exact(&mut [0])?,
            }
            let mut payload = vec![0; if asked == kind::WRITE { bytes } else { 0 }];
            stream.read_exact(&mut payload)?;
            let mut seen = seen.lock().unwrap();
            seen.requests.push((asked, flags, length));
            match asked {
                kind::WRITE => {
                    seen.image[offset..][..bytes].copy_from_slice(&payload);
                    seen.data += bytes as u64;
                    written += bytes;
                }
                kind::WRITE_ZEROES => {
                    assert!(self.flags & 64 != 0, "WRITE_ZEROES was not offered");
                    seen.image[offset..][..bytes].fill(0);
                    written += bytes;
                }
                kind::FLUSH => {
                    assert!(self.flags & 4 != 0, "FLUSH was not offered");
                    flushes += 1;
                }
                kind::DISC => seen.disc = true,
                other => panic!("a migration has no use for requests of type {other}"),
            }
            assert!(flags == 0 || (flags == flag::FUA && self.flags & 8 != 0), "command flags {flags}");
            drop(seen);
            thread::sleep(self.delay);
            if asked == kind::FLUSH && flushes == 1 {
                if let Some(counter) = &self.flush_after {
                    let goal = counter() + 20;
                    wait_for("clients to go on", SOON, || (counter() >= goal).then_some(()));
                }
            }
            match how {
                Some(Fault::Close) => return Ok(None),
                Some(Fault::Garbage) => stream.write_all(&[0xa5; 64])?,
                Some(Fault::Error) => stream.write_all(&reply(5, cookie))?,
                Some(Fault::WrongCookie) => stream.write_all(&reply(0, !cookie))?,
                Some(Fault::AnswerAndClose) => {
                    stream.write_all(&reply(0, cookie))?;
                    return Ok(None);
                }
                _ if asked == kind::DISC => return Ok(None),
                _ => stream.write_all(&reply(0, cookie))?,
            }
        }
    }
}

impl Destination {
    /// Waits until every fault has come to be, and the port is free.
    #[track_caller]
    pub fn wait_until_gone(&self) {
        // Each of some ten faults takes a second or two until the next attempt.
        wait_for("all faults", SOON * 2, || self.thread.as_ref().is_none_or(JoinHandle::is_finished).then_some(()));
    }

    /// Closes the port.
    pub fn close(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // So that it looks. While it talks to somebody, it does not, and there is nothing to wait for.
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let outcome = thread.join();
            if !thread::panicking() {
                outcome.unwrap();
            }
        }
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.end();
        }
    }
}

/// An address where nobody listens.
pub fn nowhere() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Sends the whole image as the predecessor does: large writes, one at a time, no FLUSH, and waits for the end after DISC.
#[track_caller]
pub fn send_image(client: &mut Client, image: &[u8]) {
    for (number, piece) in image.chunks(8 << 20).enumerate() {
        assert_eq!(client.write((number * (8 << 20)) as u64, piece), 0);
    }
}
