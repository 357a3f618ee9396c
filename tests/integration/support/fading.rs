//! A server that forgets. It holds its export twice, as it is read and as it would survive a failure of its machine; a crash
//! loses a part of the difference. It executes and answers what it is asked in any order, as a seed decides, and does wrong
//! what a test tells it to, when it is told.

use super::newstyle::{opt, rep, string, BLOCK_STATUS, CACHE, REQ_ONE};
use super::peers::Random;
use super::{flag, greeting, kind, reply, reserved_port, uninterrupted, wait_for, SOON};
use socket2::SockRef;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What is forgotten or kept as a whole, in bytes.
const PAGE: usize = 4096;
/// Requests in hand, at most.
const IN_HAND: usize = 16;
/// Between two looks at whether what is held may go on.
const LOOK: Duration = Duration::from_millis(2);
/// What is sent or received at once where there is a pace, in bytes.
const PIECE: usize = 16 << 10;

/// How it speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    Oldstyle,
    Newstyle,
}

/// Where a connection is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// After so many bytes of the greeting and of the negotiation.
    Greeting(usize),
    /// With so many bytes of the head of a request.
    Head(usize),
    /// With half of the payload.
    Payload,
    /// With the whole request, of which nothing is done.
    Request,
    /// After so many bytes of the reply; the request is executed.
    Reply(usize),
    /// After half of the reply, data included.
    Data,
}

/// A connection is closed at this point, once.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    pub point: Point,
    /// Of a request of this type.
    pub kind: u16,
    /// After so many that are spared.
    pub spared: usize,
}

/// How a newcomer is received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Welcome {
    Usual,
    /// Closed at once.
    Closed,
    /// With bytes that are no greeting.
    Garbage,
    /// There is no such export.
    NoExport,
    /// As a listener does that awaits its image.
    NotYet,
}

/// What a reply is instead of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nonsense {
    Magic,
    Cookie,
}

/// How it behaves from now on.
pub struct Habits {
    pub welcome: Welcome,
    /// What its greeting says, whatever the export is.
    pub size: u64,
    pub flags: u16,
    /// Takes a session's name, as if a new connection ended an older one.
    pub is_fenced: bool,
    /// Neither reads nor answers, and keeps its connections.
    pub is_mute: bool,
    /// Types of requests that wait until they are not in here any more.
    pub held: Vec<u16>,
    /// Errors by type and range.
    pub errors: Vec<(u16, Range<u64>, u32)>,
    /// Bytes a second, either way; to be set before there is a connection.
    pub pace: Option<u64>,
    pub cuts: Vec<Cut>,
    /// A cut is a crash.
    pub forgets: bool,
    /// The next reply.
    pub nonsense: Option<Nonsense>,
}

/// A request that was executed.
#[derive(Debug, Clone, Copy)]
pub struct Executed {
    pub kind: u16,
    pub flags: u16,
}

struct State {
    habits: Habits,
    volatile: Vec<u8>,
    durable: Vec<u8>,
    random: Random,
    /// Counts the times that all connections were cut. What an older one has in hand is not executed any more.
    life: u64,
    streams: Vec<TcpStream>,
    connections: usize,
    executed: Vec<Executed>,
    is_down: bool,
}

struct Common {
    state: Mutex<State>,
    changed: Condvar,
    style: Style,
}

/// The server. It goes with the test.
pub struct Fading {
    /// Where it listens.
    pub address: SocketAddr,
    common: Arc<Common>,
    listening: Option<JoinHandle<()>>,
}

impl Fading {
    /// FLUSH, FUA, TRIM, `WRITE_ZEROES`, CACHE, `FAST_ZERO`.
    pub const FLAGS: u16 = 1 | 4 | 8 | 32 | 64 | 1024 | 2048;

    /// Of an export of zeroes.
    pub fn start(style: Style, size: usize, seed: u64) -> Self {
        let habits = Habits {
            welcome: Welcome::Usual,
            size: size as u64,
            flags: Self::FLAGS,
            is_fenced: false,
            is_mute: false,
            held: Vec::new(),
            errors: Vec::new(),
            pace: None,
            cuts: Vec::new(),
            forgets: false,
            nonsense: None,
        };
        let state = State {
            habits,
            volatile: vec![0; size],
            durable: vec![0; size],
            random: Random::new(seed),
            life: 0,
            streams: Vec::new(),
            connections: 0,
            executed: Vec::new(),
            is_down: true,
        };
        let common = Arc::new(Common { state: Mutex::new(state), changed: Condvar::new(), style });
        let address = SocketAddr::from(([127, 0, 0, 1], reserved_port()));
        let mut server = Self { address, common, listening: None };
        server.up();
        server
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.common.lock()
    }

    /// Changes how it behaves.
    pub fn behave(&self, change: impl FnOnce(&mut Habits)) {
        change(&mut self.state().habits);
        self.common.changed.notify_all();
    }

    /// All connections are cut, and what is not durable may be lost.
    pub fn crash(&self) {
        {
            let mut state = self.state();
            state.cut();
            state.forget();
        }
        self.common.changed.notify_all();
    }

    /// All connections are cut, and nothing is lost: the process was killed and started again.
    pub fn restart(&self) {
        self.state().cut();
        self.common.changed.notify_all();
    }

    /// All connections are cut, and nobody listens any more.
    pub fn down(&mut self) {
        let Some(listening) = self.listening.take() else { return };
        {
            let mut state = self.state();
            state.is_down = true;
            state.cut();
        }
        self.common.changed.notify_all();
        // So that it looks.
        let _ = TcpStream::connect(self.address);
        listening.join().unwrap();
    }

    /// Listens again.
    pub fn up(&mut self) {
        assert!(self.listening.is_none(), "it listens");
        self.state().is_down = false;
        // A program that another test is starting may have the old socket open for a moment.
        let listener = wait_for("its port", SOON, || TcpListener::bind(self.address).ok());
        let common = Arc::clone(&self.common);
        self.listening = Some(thread::spawn(move || common.listen(&listener)));
    }

    /// How many connections there were.
    pub fn connections(&self) -> usize {
        self.state().connections
    }

    /// What was executed so far, in its order.
    pub fn executed(&self) -> Vec<Executed> {
        self.state().executed.clone()
    }

    /// How many requests of this type were executed.
    pub fn count(&self, kind: u16) -> usize {
        self.state().executed.iter().filter(|executed| executed.kind == kind).count()
    }

    /// Whether everything that it was told to do once was done.
    pub fn has_cut(&self) -> bool {
        let state = self.state();
        state.habits.cuts.is_empty() && state.habits.nonsense.is_none()
    }

    /// The export as it is read.
    pub fn content(&self) -> Vec<u8> {
        self.state().volatile.clone()
    }

    /// What a failure of its machine leaves of the export for certain.
    pub fn durable(&self) -> Vec<u8> {
        self.state().durable.clone()
    }

    /// Gives it this content, durable.
    pub fn overwrite(&self, content: &[u8]) {
        let mut state = self.state();
        state.volatile.copy_from_slice(content);
        state.durable.copy_from_slice(content);
    }

    /// Another export of this size, of zeroes.
    pub fn resize(&self, size: usize) {
        let mut state = self.state();
        state.habits.size = size as u64;
        (state.volatile, state.durable) = (vec![0; size], vec![0; size]);
    }
}

impl Drop for Fading {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.down();
        }
    }
}

impl State {
    fn cut(&mut self) {
        self.life += 1;
        for stream in self.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn forget(&mut self) {
        let Self { volatile, durable, random, .. } = self;
        for (read, kept) in volatile.chunks_mut(PAGE).zip(durable.chunks_mut(PAGE)) {
            if read != kept {
                if random.below(2) == 0 {
                    read.copy_from_slice(kept);
                } else {
                    kept.copy_from_slice(read);
                }
            }
        }
    }

    /// True when this is where a connection is to be closed.
    fn closes(&mut self, kind: u16, matches: impl Fn(Point) -> bool) -> Option<Point> {
        let at = self.habits.cuts.iter().position(|cut| cut.kind == kind && matches(cut.point))?;
        if self.habits.cuts[at].spared > 0 {
            self.habits.cuts[at].spared -= 1;
            return None;
        }
        let point = self.habits.cuts.remove(at).point;
        if self.habits.forgets {
            self.forget();
        }
        Some(point)
    }
}

impl Common {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn listen(self: &Arc<Self>, listener: &TcpListener) {
        for stream in listener.incoming() {
            let mut state = self.lock();
            if state.is_down {
                return;
            }
            let stream = stream.unwrap();
            stream.set_nodelay(true).unwrap();
            if state.habits.pace.is_some() {
                // What is not read yet waits at the other end.
                SockRef::from(&stream).set_recv_buffer_size(PIECE).unwrap();
            }
            state.connections += 1;
            state.streams.push(stream.try_clone().unwrap());
            let seed = state.random.below(u64::MAX);
            let mut talk = Talk {
                common: Arc::clone(self),
                life: state.life,
                stream,
                random: Random::new(seed),
                greeting_left: None,
                structured: false,
                pending: Vec::new(),
                answers: Vec::new(),
            };
            drop(state);
            // It ends with its connection.
            thread::spawn(move || {
                let _ = talk.run();
                let _ = talk.stream.shutdown(Shutdown::Both);
            });
        }
    }
}

#[derive(Clone)]
struct Request {
    kind: u16,
    flags: u16,
    cookie: u64,
    offset: u64,
    length: u32,
    payload: Vec<u8>,
}

struct Talk {
    common: Arc<Common>,
    life: u64,
    stream: TcpStream,
    random: Random,
    greeting_left: Option<usize>,
    structured: bool,
    pending: Vec<Request>,
    /// Replies to what was executed, with its type.
    answers: Vec<(u16, Vec<u8>)>,
}

fn ended() -> io::Error {
    ErrorKind::ConnectionAborted.into()
}

impl Talk {
    /// The state, as soon as it is not mute; an error when this connection is one of the past.
    fn state(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.common.lock();
        while state.habits.is_mute && state.life == self.life {
            state = self.common.changed.wait(state).unwrap();
        }
        if state.life == self.life {
            Ok(state)
        } else {
            Err(ended())
        }
    }

    fn pause(pace: Option<u64>, bytes: usize) {
        if let Some(pace) = pace {
            thread::sleep(Duration::from_micros(bytes as u64 * 1_000_000 / pace));
        }
    }

    fn receive(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        for piece in bytes.chunks_mut(PIECE) {
            let pace = self.state()?.habits.pace;
            self.stream.read_exact(piece)?;
            Self::pause(pace, piece.len());
        }
        Ok(())
    }

    fn receive_u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.receive(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let sent = bytes.len().min(self.greeting_left.unwrap_or(usize::MAX));
        for piece in bytes[..sent].chunks(PIECE) {
            let pace = self.state()?.habits.pace;
            self.stream.write_all(piece)?;
            Self::pause(pace, piece.len());
        }
        if let Some(left) = &mut self.greeting_left {
            *left -= sent;
            if *left == 0 {
                return Err(ended());
            }
        }
        Ok(())
    }

    fn run(&mut self) -> io::Result<()> {
        let (cut, welcome, size, flags) = {
            let mut state = self.state()?;
            let cut = state.closes(kind::DISC, |point| matches!(point, Point::Greeting(_)));
            (cut, state.habits.welcome, state.habits.size, state.habits.flags)
        };
        match cut {
            Some(Point::Greeting(0)) => return Ok(()),
            Some(Point::Greeting(bytes)) => self.greeting_left = Some(bytes),
            _ => {}
        }
        match (welcome, self.common.style) {
            (Welcome::Closed, _) => return Ok(()),
            (Welcome::Garbage, _) => return self.send(&[0x47; 152]),
            (_, Style::Oldstyle) => self.send(&greeting(size, flags.into()))?,
            (_, Style::Newstyle) => self.haggle(welcome, size, flags)?,
        }
        self.greeting_left = None;
        self.serve()
    }

    fn haggle(&mut self, welcome: Welcome, size: u64, flags: u16) -> io::Result<()> {
        self.send(b"NBDMAGICIHAVEOPT\0\x03")?;
        self.receive_u32()?;
        loop {
            let mut magic = [0; 8];
            self.receive(&mut magic)?;
            assert_eq!(&magic, b"IHAVEOPT");
            let option = self.receive_u32()?;
            let mut data = vec![0; self.receive_u32()? as usize];
            self.receive(&mut data)?;
            let answer = |kind: u32, data: &[u8]| {
                let head = [&0x0003_e889_0455_65a9_u64.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()];
                [&head.concat()[..], &string(data)].concat()
            };
            match option {
                opt::SET_META_CONTEXT | opt::GO if welcome == Welcome::NotYet => {
                    self.send(&answer(rep::ERR_POLICY, b"not yet"))?;
                }
                opt::GO if welcome == Welcome::NoExport => self.send(&answer(rep::ERR_UNKNOWN, b""))?,
                opt::STRUCTURED_REPLY => {
                    self.structured = true;
                    self.send(&answer(rep::ACK, b""))?;
                }
                opt::SET_META_CONTEXT => {
                    let context = [&1_u32.to_be_bytes()[..], b"base:allocation"].concat();
                    self.send(&answer(rep::META_CONTEXT, &context))?;
                    if self.state()?.habits.is_fenced {
                        let at = data.windows(8).position(|bytes| bytes == b"flexnbd:").expect("a name");
                        let context = [&2_u32.to_be_bytes()[..], &data[at..]].concat();
                        self.send(&answer(rep::META_CONTEXT, &context))?;
                    }
                    self.send(&answer(rep::ACK, b""))?;
                }
                opt::GO => {
                    let info = [&[0; 2][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
                    return self.send(&[answer(rep::INFO, &info), answer(rep::ACK, b"")].concat());
                }
                _ => self.send(&answer(rep::ERR_UNSUP, b""))?,
            }
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let held = self.state()?.habits.held.clone();
            let ready: Vec<usize> =
                (0..self.pending.len()).filter(|&n| !held.contains(&self.pending[n].kind)).collect();
            let choices = ready.len() + self.answers.len();
            let has_room = self.pending.len() + self.answers.len() < IN_HAND;
            if choices == 0 {
                let limit = if self.pending.is_empty() { None } else { Some(LOOK) };
                if has_room && self.has_more(limit)? {
                    self.take()?;
                } else if !has_room {
                    thread::sleep(LOOK);
                }
            } else if has_room && self.random.below(2) == 0 && self.has_more(Some(Duration::ZERO))? {
                self.take()?;
            } else {
                let chosen = self.random.below(choices as u64) as usize;
                if let Some(&n) = ready.get(chosen) {
                    let request = self.pending.swap_remove(n);
                    self.execute(&request)?;
                } else {
                    let (kind, bytes) = self.answers.swap_remove(chosen - ready.len());
                    self.answer(kind, &bytes)?;
                }
            }
        }
    }

    /// Whether something can be received, the end included, within so long.
    fn has_more(&mut self, limit: Option<Duration>) -> io::Result<bool> {
        let is_now = limit == Some(Duration::ZERO);
        self.stream.set_nonblocking(is_now)?;
        if !is_now {
            self.stream.set_read_timeout(limit)?;
        }
        let found = uninterrupted(|| self.stream.peek(&mut [0]));
        self.stream.set_nonblocking(false)?;
        self.stream.set_read_timeout(None)?;
        match found {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn closes(&self, kind: u16, matches: impl Fn(Point) -> bool) -> io::Result<Option<Point>> {
        Ok(self.state()?.closes(kind, matches))
    }

    /// Receives a request.
    fn take(&mut self) -> io::Result<()> {
        // Its type decides whether the rest is to be read at all.
        let mut head = [0; 28];
        while uninterrupted(|| self.stream.peek(&mut head))? < 8 {
            if self.stream.take_error()?.is_some() || uninterrupted(|| self.stream.peek(&mut [0]))? == 0 {
                return Err(ended());
            }
        }
        let kind = u16::from_be_bytes([head[6], head[7]]);
        if let Some(Point::Head(bytes)) = self.closes(kind, |point| matches!(point, Point::Head(_)))? {
            let _ = self.stream.read_exact(&mut head[..bytes]);
            return Err(ended());
        }
        self.receive(&mut head)?;
        assert_eq!(head[..4], 0x2560_9513_u32.to_be_bytes(), "the magic of a request");
        let number = |range: Range<usize>| head[range].iter().fold(0_u64, |n, &byte| n << 8 | u64::from(byte));
        let (flags, cookie, offset, length) =
            (number(4..6) as u16, number(8..16), number(16..24), number(24..28) as u32);
        if kind == kind::DISC {
            return Err(ended());
        }
        let mut payload = vec![0; if kind == kind::WRITE { length as usize } else { 0 }];
        if self.closes(kind, |point| point == Point::Payload)?.is_some() {
            let half = payload.len() / 2;
            let _ = self.stream.read_exact(&mut payload[..half]);
            return Err(ended());
        }
        self.receive(&mut payload)?;
        if self.closes(kind, |point| point == Point::Request)?.is_some() {
            return Err(ended());
        }
        self.pending.push(Request { kind, flags, cookie, offset, length, payload });
        Ok(())
    }

    fn execute(&mut self, request: &Request) -> io::Result<()> {
        let &Request { kind, flags, offset, length, .. } = request;
        let (error, data) = {
            let mut guard = self.state()?;
            let state = &mut *guard;
            let range = offset..offset + u64::from(length);
            let is_told = |(of, where_, _): &&(u16, Range<u64>, u32)| {
                *of == kind && where_.start <= range.start && range.start < where_.end
            };
            let place = range.start as usize..range.end as usize;
            let told = state.habits.errors.iter().find(is_told).map_or(0, |&(_, _, error)| error);
            if told == 0 {
                state.executed.push(Executed { kind, flags });
            }
            let mut data = Vec::new();
            match kind {
                _ if told != 0 => {}
                kind::READ | BLOCK_STATUS => data.extend(&state.volatile[place]),
                kind::WRITE => state.volatile[place].copy_from_slice(&request.payload),
                kind::WRITE_ZEROES => state.volatile[place].fill(0),
                // It may do something, or not.
                kind::TRIM if state.random.below(2) == 0 => state.volatile[place].fill(0),
                kind::FLUSH => state.durable.copy_from_slice(&state.volatile),
                kind::TRIM | CACHE => {}
                other => panic!("requests of type {other} were not offered"),
            }
            if flags & flag::FUA != 0 && told == 0 {
                let place = range.start as usize..range.end as usize;
                state.durable[place.clone()].copy_from_slice(&state.volatile[place]);
            }
            (told, data)
        };
        let bytes = match kind {
            kind::READ if self.structured => structured_read(request, error, &data),
            BLOCK_STATUS => block_status(request, error, &data),
            _ => [reply(error, request.cookie), data].concat(),
        };
        self.answers.push((kind, bytes));
        Ok(())
    }

    fn answer(&mut self, kind: u16, bytes: &[u8]) -> io::Result<()> {
        let nonsense = self.state()?.habits.nonsense.take();
        match nonsense {
            Some(Nonsense::Magic) => self.send(&[0xa5; 16])?,
            Some(Nonsense::Cookie) => self.send(&reply(0, u64::MAX - 7))?,
            None => {}
        }
        let cut = self.common.lock().closes(kind, |point| matches!(point, Point::Reply(_) | Point::Data));
        match cut {
            Some(point) => {
                let sent = if let Point::Reply(bytes) = point { bytes } else { bytes.len() / 2 };
                let _ = self.stream.write_all(&bytes[..sent.min(bytes.len())]);
                Err(ended())
            }
            None => self.send(bytes),
        }
    }
}

/// A chunk of a structured reply.
fn chunk(is_last: bool, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(u16::from(is_last).to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn error_chunk(cookie: u64, error: u32) -> Vec<u8> {
    chunk(true, 1 << 15 | 1, cookie, &[&error.to_be_bytes()[..], &[0; 2]].concat())
}

/// The data in two pieces, the second one first; zeroes are a hole.
fn structured_read(request: &Request, error: u32, data: &[u8]) -> Vec<u8> {
    if error != 0 {
        return error_chunk(request.cookie, error);
    }
    let middle = data.len() / 2;
    let mut bytes = Vec::new();
    for (start, piece, is_last) in [(middle, &data[middle..], middle == 0), (0, &data[..middle], true)] {
        if piece.is_empty() {
            continue;
        }
        let offset = (request.offset + start as u64).to_be_bytes();
        bytes.extend(if piece.iter().all(|&byte| byte == 0) {
            let payload = [&offset[..], &(piece.len() as u32).to_be_bytes()].concat();
            chunk(is_last, 2, request.cookie, &payload)
        } else {
            chunk(is_last, 1, request.cookie, &[&offset[..], piece].concat())
        });
    }
    bytes
}

/// Zeroes are holes.
fn block_status(request: &Request, error: u32, data: &[u8]) -> Vec<u8> {
    if error != 0 {
        return error_chunk(request.cookie, error);
    }
    let mut extents: Vec<(u32, u32)> = Vec::new();
    for piece in data.chunks(PAGE) {
        let flags = if piece.iter().all(|&byte| byte == 0) { 3 } else { 0 };
        match extents.last_mut() {
            Some((length, last)) if *last == flags => *length += piece.len() as u32,
            _ => extents.push((piece.len() as u32, flags)),
        }
    }
    extents.truncate(if request.flags & REQ_ONE == 0 { 16 } else { 1 });
    let descriptors = extents.iter().flat_map(|(length, flags)| [length.to_be_bytes(), flags.to_be_bytes()]).flatten();
    let payload: Vec<u8> = 1_u32.to_be_bytes().into_iter().chain(descriptors).collect();
    chunk(true, 5, request.cookie, &payload)
}
