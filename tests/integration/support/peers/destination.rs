//! A destination that follows a script: what it offers, how slow it is, and what it does wrong, and when.

use super::{offer, Worker};
use crate::support::{flag, kind, pattern, reply, reserved_port, uninterrupted, wait_for, GREETING_MAGICS, SOON};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

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
    /// What it answers to `WRITE_ZEROES`; unless that is 0, it does not do it.
    pub zeroes_answer: u32,
    /// What goes wrong, one after the other.
    pub faults: Vec<(At, Fault)>,
    /// Answers the first FLUSH of a connection only once this has grown: there is something left for the pause then.
    pub flush_after: Option<Box<dyn Fn() -> u64 + Send>>,
}

impl Script {
    /// Nothing goes wrong.
    pub fn new(size: usize) -> Self {
        let (flags, delay, zeroes_answer) = (offer::ALL, Duration::ZERO, 0);
        Self { size, flags, delay, zeroes_answer, faults: Vec::new(), flush_after: None }
    }

    /// With these flags.
    pub fn flags(self, flags: u32) -> Self {
        Self { flags, ..self }
    }

    /// With this delay.
    pub fn delay(self, delay: Duration) -> Self {
        Self { delay, ..self }
    }

    /// With this answer to `WRITE_ZEROES`.
    pub fn zeroes_answer(self, zeroes_answer: u32) -> Self {
        Self { zeroes_answer, ..self }
    }

    /// With these faults.
    pub fn faults(self, faults: &[(At, Fault)]) -> Self {
        Self { faults: faults.to_vec(), ..self }
    }

    /// So that `worker` writes something between the first FLUSH and its answer.
    pub fn busy_with(self, worker: &Worker) -> Self {
        Self { flush_after: Some(Box::new(worker.counter())), ..self }
    }

    /// Starts it.
    pub fn start(self) -> Destination {
        let listener = TcpListener::bind(("127.0.0.1", reserved_port())).unwrap();
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

    /// True when the client that is busy all the time has no answer for a while, but for one that was on its way: it is
    /// paused. A source whose first FLUSH took long asks for more of them before it pauses anybody.
    fn clients_rest(&self) -> bool {
        let Some(counter) = &self.flush_after else { return true };
        let (before, give_up) = (counter(), Instant::now() + Duration::from_millis(300));
        while Instant::now() < give_up {
            if counter() > before + 1 {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        true
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
            uninterrupted(|| stream.peek(&mut head[27..]))?;
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
                At::LastFlush => asked == kind::FLUSH && flushes > 0 && self.clients_rest(),
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
                kind::WRITE_ZEROES if self.zeroes_answer != 0 => {}
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
                _ if asked == kind::WRITE_ZEROES => stream.write_all(&reply(self.zeroes_answer, cookie))?,
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
        // A program that another test is starting may have the listening socket open for a moment.
        wait_for("a free port", SOON, || TcpStream::connect(self.address).is_err().then_some(()));
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
