//! The modes that only talk to a server, one step after the other: `read`, `write`, and every control command.
//!
//! They block, each step under a deadline, so that none hangs on a server that does. Only to wait for the end of a
//! migration has no deadline: it ends with the server at the latest.

mod progress;

use crate::buffer::{Pool, SLICE};
use crate::command::{encode_command, parse_answer, Answer};
use crate::endpoint::Endpoint;
use crate::proto::client::{ClientSession, Event};
use crate::proto::error::Errno;
use crate::proto::export::Offer;
use crate::proto::outbox::PIECES_MAX;
use crate::proto::wire::{command, kind, transmission, RequestHead};
use crate::sys;
pub use progress::Style;
use progress::{Progress, Report};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice, Read, Seek, SeekFrom, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long a connection may take to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// How long a server may take to greet.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// How long a request may go without a byte moving.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// How long the answer to a control command may take: a `mirror` waits for a connection and a greeting.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How often a migration that is waited for is looked at, in milliseconds: often enough for a line that seems to move.
const LOOK_EVERY_MS: u64 = 250;
/// How often a control socket whose backlog is full is tried again.
const BACKLOG_RETRY: Duration = Duration::from_millis(20);
/// The longest answer line that is read, in bytes: the status of more clients than a server lists.
const MAX_ANSWER: usize = 4 << 20;

/// Why a mode failed: the text of its one line.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A range of an export of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where the server is.
    pub server: Endpoint,
    /// The local address to connect from.
    pub bind: Option<IpAddr>,
    /// The name of the export, at most 4096 bytes; empty for the default one.
    pub export: String,
    /// Where the range starts, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u32,
}

/// Reads the range in one request and writes it to `out`.
pub fn read(target: &Target, out: &mut impl Write) -> Result<(), Error> {
    let mut server = Connection::open(target)?;
    server.request(kind::READ, 0, target)?;
    server
        .await_reply(|bytes| out.write_all(bytes).map_err(|error| Error(format!("cannot write to stdout: {error}"))))?;
    out.flush().map_err(|error| Error(format!("cannot write to stdout: {error}")))?;
    server.disconnect()
}

/// Writes the range in one request from standard input. Durable when it returns, where the server offers that.
///
/// All of the input is there before the first byte is sent: a request that ends in the middle would leave the export
/// half written.
pub fn write(target: &Target) -> Result<(), Error> {
    let mut server = Connection::open(target)?;
    if server.offer.has(transmission::READ_ONLY) {
        return Err(Error(format!("{}: the export is read-only; nothing was written", server.server)));
    }
    let mut input = whole_input(u64::from(target.length))?;
    let fua = if server.offer.has(transmission::SEND_FUA) { command::FUA } else { 0 };
    server.request(kind::WRITE, fua, target)?;
    let mut left = target.length as usize;
    while left > 0 {
        let n = left.min(SLICE);
        let mut piece = server.pool.take_beyond(n);
        let room = piece.spare().get_mut(..n).unwrap_or_default();
        input.read_exact(room).map_err(|error| Error(format!("cannot read the input: {error}")))?;
        piece.advance(n);
        server.session.push_payload(piece);
        server.send()?;
        left -= n;
    }
    server.await_reply(|_| Ok(()))?;
    server.disconnect()
}

/// Sends a command to a control socket. Prints the text of a good answer to `out`, of another one to `err`; returns the
/// code of the answer.
pub fn control(path: &Path, words: &[String], out: &mut impl Write, err: &mut impl Write) -> Result<u8, Error> {
    let answer = ask(path, words)?;
    print_answer(&answer, &answer.text, out, err)
}

/// Asks a control socket for the status of its server, as key=value pairs or as JSON, and prints it to `out`; with
/// `clients` that of each client too, which has a line of its own unless it is JSON. Prints another answer to `err`;
/// returns the code of the answer.
pub fn status(path: &Path, json: bool, clients: bool, out: &mut impl Write, err: &mut impl Write) -> Result<u8, Error> {
    let words: Vec<_> = [(true, "status"), (json, "json"), (clients, "clients")]
        .into_iter()
        .filter_map(|(wanted, word)| wanted.then_some(word))
        .collect();
    let answer = ask(path, &words)?;
    // No value of a key=value pair holds a space.
    let text = if json { answer.text.clone() } else { answer.text.replace(" client=", "\nclient=") };
    print_answer(&answer, &text, out, err)
}

/// Sends a command that starts a migration to a control socket; with a style of `progress`, waits until the migration
/// ends. Prints what was done to `out`, a refusal or why the migration failed to `err`, where the progress goes too;
/// returns the code of the last answer.
///
/// The server is told to wait before it is told to start: a small image may be gone, and the server with it, before a
/// command sent later arrives.
pub fn mirror(
    path: &Path,
    words: &[String],
    progress: Option<Style>,
    out: &mut impl Write,
    err: &mut impl Write,
) -> Result<u8, Error> {
    let waiting = progress.map(|style| Ok((style, send_command(path, &["wait"])?))).transpose()?;
    let started = ask(path, words)?;
    let code = print_answer(&started, "Migration started", out, err)?;
    let Some((style, connection)) = waiting.filter(|_| code == 0) else { return Ok(code) };
    let ended = watch(path, connection, &mut Progress::new(style, &mut *err))
        .map_err(|error| Error(format!("{error}; whether the migration was completed is not known")))?;
    if ended == Answer::unknown_command() {
        let why = "this server cannot say when a migration ends; look at its status";
        return Err(Error(format!("{}: {why}", path.display())));
    }
    print_answer(&ended, "Migration completed", out, err)
}

/// Waits for the answer to `wait`, and shows what the status says meanwhile.
fn watch(path: &Path, waiting: UnixStream, progress: &mut Progress<impl Write>) -> Result<Answer, Error> {
    let failed = |error| Error(format!("{}: cannot wait: {error}", path.display()));
    while !sys::wait_readable(waiting.as_fd(), LOOK_EVERY_MS).map_err(failed)? {
        // A status that does not come is no reason to stop: if the server is gone, `waiting` says so.
        if let Ok(status) = ask(path, &["status"]) {
            if let Some(report) = Report::parse(&status.text) {
                progress.show(&report, sys::monotonic_ms());
            }
        }
    }
    progress.clear();
    receive_answer(path, waiting)
}

/// Prints `done` to `out` for a good answer, the text of another one to `err`; returns the code.
fn print_answer(answer: &Answer, done: &str, out: &mut impl Write, err: &mut impl Write) -> Result<u8, Error> {
    let printed = if answer.code == 0 { writeln!(out, "{done}") } else { writeln!(err, "{}", answer.text) };
    printed.map_err(|error| Error(format!("cannot print the answer: {error}")))?;
    Ok(answer.code)
}

fn ask(path: &Path, words: &[impl AsRef<str>]) -> Result<Answer, Error> {
    receive_answer(path, send_command(path, words)?)
}

fn send_command(path: &Path, words: &[impl AsRef<str>]) -> Result<UnixStream, Error> {
    let failed = |what: &str, error: &io::Error| Error(format!("{}: {what}: {}", path.display(), explain(error)));
    let words: Vec<_> = words.iter().map(AsRef::as_ref).collect();
    let mut stream = connect_unix(path, ANSWER_LIMIT)?;
    set_limits(&stream, ANSWER_LIMIT).map_err(|error| failed("cannot set a limit", &error))?;
    stream.write_all(&encode_command(&words)).map_err(|error| failed("cannot send the command", &error))?;
    Ok(stream)
}

fn receive_answer(path: &Path, mut stream: UnixStream) -> Result<Answer, Error> {
    let failed = |why: &dyn fmt::Display| Error(format!("{}: no answer: {why}", path.display()));
    let mut line = Vec::new();
    let mut piece = [0; 4096];
    while !line.contains(&b'\n') && line.len() < MAX_ANSWER {
        match stream.read(&mut piece).map_err(|error| failed(&explain(&error)))? {
            0 if line.is_empty() => return Err(failed(&"the server closed the connection")),
            0 => break,
            n => line.extend_from_slice(piece.get(..n).unwrap_or_default()),
        }
    }
    parse_answer(&line).map_err(|error| Error(format!("{}: {error}", path.display())))
}

/// A connection to an NBD server whose greeting has come.
struct Connection {
    stream: File,
    /// Each request is noted with itself.
    session: ClientSession<RequestHead>,
    offer: Offer,
    /// For what is written, one slice at a time.
    pool: Pool,
    server: String,
}

impl Connection {
    fn open(target: &Target) -> Result<Self, Error> {
        let server = target.server.to_string();
        let fd = match &target.server {
            Endpoint::Tcp(_) => connect_tcp(target)?,
            Endpoint::Unix(path) => connect_unix(path, CONNECT_LIMIT)?.into(),
        };
        let failed = |error: io::Error| Error(format!("{server}: cannot set a limit: {error}"));
        set_limits(&fd.as_fd(), GREETING_LIMIT).map_err(failed)?;
        let mut connection = Self {
            stream: File::from(fd),
            session: ClientSession::new(target.export.clone()),
            offer: Offer { size: 0, flags: 0 },
            pool: Pool::new(SLICE),
            server,
        };
        let give_up = Instant::now() + GREETING_LIMIT;
        let mut offer = None;
        while offer.is_none() {
            // Each byte has its own limit; one now and then must not make a handshake endless.
            if Instant::now() >= give_up {
                let limit_s = GREETING_LIMIT.as_secs();
                return Err(Error(format!("{}: the handshake took longer than {limit_s} s", connection.server)));
            }
            connection.events(|event| {
                if let Event::Export(found) = event {
                    offer = Some(found);
                }
                Ok(())
            })?;
        }
        connection.offer = offer.unwrap_or(connection.offer);
        set_limits(&connection.stream.as_fd(), REQUEST_LIMIT)
            .map_err(|error| Error(format!("{}: cannot set a limit: {error}", connection.server)))?;
        let size = connection.offer.size;
        if target.offset.saturating_add(u64::from(target.length)) > size {
            return Err(Error(format!(
                "{}: {} bytes at offset {} go beyond the end of the export, which has {size} bytes",
                connection.server, target.length, target.offset
            )));
        }
        Ok(connection)
    }

    fn request(&mut self, kind: u16, flags: u16, target: &Target) -> Result<(), Error> {
        let Target { offset, length, .. } = *target;
        let head = RequestHead { flags, kind, cookie: 0, offset, length };
        self.session.command(kind, flags, offset, length, head);
        self.send()
    }

    /// Sends all that waits.
    fn send(&mut self) -> Result<(), Error> {
        let failed = |error: io::Error| Error(format!("{}: cannot send: {}", self.server, explain(&error)));
        while self.session.wants_send() {
            let mut slices = [IoSlice::new(&[]); PIECES_MAX];
            let pieces = self.session.to_send(&mut slices);
            match self.stream.write_vectored(slices.get(..pieces).unwrap_or_default()) {
                Ok(0) => return Err(failed(ErrorKind::WriteZero.into())),
                Ok(n) => self.session.sent(n, &mut self.pool),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    /// Receives once, passes on what it means, and sends what the handshake answers.
    fn events(&mut self, mut take: impl FnMut(Event<'_, RequestHead>) -> Result<(), Error>) -> Result<(), Error> {
        match self.stream.read(self.session.recv_space()) {
            Ok(0) => return Err(Error(format!("{}: the server {}", self.server, self.session.explain_end()))),
            Ok(n) => self.session.received(n),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(Error(format!("{}: cannot receive: {}", self.server, explain(&error)))),
        }
        let violated = |violation| Error(format!("{}: {violation}", self.server));
        while let Some(event) = self.session.next_event().map_err(violated)? {
            take(event)?;
        }
        self.send()
    }

    /// Waits for the reply to the only request there is, and passes on the data it brings.
    fn await_reply(&mut self, mut data: impl FnMut(&[u8]) -> Result<(), Error>) -> Result<(), Error> {
        let server = self.server.clone();
        while self.session.unanswered() > 0 {
            self.events(|event| match event {
                Event::Reply { error: 0, .. } | Event::Export(_) => Ok(()),
                Event::Reply { note: head, error } => {
                    Err(Error(format!("{server}: the server refused {head}: {} ({error})", Errno::name(error))))
                }
                Event::Data { bytes, .. } => data(bytes),
            })?;
        }
        Ok(())
    }

    fn disconnect(mut self) -> Result<(), Error> {
        self.session.disconnect();
        self.send()
    }
}

fn connect_tcp(target: &Target) -> Result<OwnedFd, Error> {
    let Endpoint::Tcp(addr) = target.server else { return Err(Error("not a network address".into())) };
    let from = target.bind.map(|bind| format!(" from {bind}")).unwrap_or_default();
    let failed = |error: &dyn fmt::Display| Error(format!("cannot connect to {addr}{from}: {error}"));
    let stream = sys::net::connect_tcp(target.bind, addr).map_err(|error| failed(&error))?;
    let limit_ms = u64::try_from(CONNECT_LIMIT.as_millis()).unwrap_or(u64::MAX);
    if !sys::wait_writable(stream.as_fd(), limit_ms).map_err(|error| failed(&error))? {
        return Err(failed(&format_args!("no answer in {} s", CONNECT_LIMIT.as_secs())));
    }
    if let Some(error) = stream.take_error().map_err(|error| failed(&error))? {
        return Err(failed(&error));
    }
    stream.set_nonblocking(false).map_err(|error| failed(&error))?;
    sys::net::set_tcp_options(stream.as_fd()).map_err(|error| failed(&error))?;
    Ok(stream.into())
}

/// Connects to a UNIX socket; a full backlog is waited for, up to `limit`.
fn connect_unix(path: &Path, limit: Duration) -> Result<UnixStream, Error> {
    let failed = |error: &dyn fmt::Display| Error(format!("cannot connect to {}: {error}", path.display()));
    let give_up = Instant::now() + limit;
    loop {
        match mio::net::UnixStream::connect(path) {
            Ok(stream) => {
                let stream = UnixStream::from(OwnedFd::from(stream));
                stream.set_nonblocking(false).map_err(|error| failed(&error))?;
                return Ok(stream);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < give_up => {
                thread::sleep(BACKLOG_RETRY);
            }
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                return Err(failed(&"nobody listens there; is it the control socket of a running server?"));
            }
            Err(error) => return Err(failed(&error)),
        }
    }
}

fn set_limits(fd: &impl AsFd, limit: Duration) -> io::Result<()> {
    sys::net::set_io_timeout(fd.as_fd(), limit)
}

/// A socket whose time is up says «would block»; a person wants to hear what that means.
fn explain(error: &io::Error) -> String {
    match error.kind() {
        ErrorKind::WouldBlock => "the server did not move a byte in time".into(),
        ErrorKind::UnexpectedEof => "the server closed the connection".into(),
        _ => error.to_string(),
    }
}

/// Standard input, once it is known to hold `length` bytes: a file is asked, anything else is kept in a file first.
fn whole_input(length: u64) -> Result<File, Error> {
    let failed = |error: io::Error| Error(format!("cannot read the input: {error}"));
    let fd = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let mut input = File::from(fd);
    let metadata = input.metadata().map_err(failed)?;
    let (file, found) = if metadata.is_file() {
        let position = input.stream_position().map_err(failed)?;
        (input, metadata.len().saturating_sub(position))
    } else {
        let mut spool = spool_file().map_err(|error| Error(format!("cannot keep the input in a file: {error}")))?;
        let found = io::copy(&mut input.take(length), &mut spool).map_err(failed)?;
        spool.seek(SeekFrom::Start(0)).map_err(failed)?;
        (spool, found)
    };
    if found < length {
        return Err(Error(format!("the input ended after {found} of {length} bytes; nothing was written")));
    }
    Ok(file)
}

/// A file without a name in the temporary directory; it goes with the process.
fn spool_file() -> io::Result<File> {
    let name = format!("flexnbd-write-{}-{}", std::process::id(), sys::monotonic_ms());
    let path = std::env::temp_dir().join(name);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}
