//! `read` and `write`: one request to an NBD server, and its data.

use super::connect::{connect_tcp, connect_unix, explain, set_limits, Error, CONNECT_LIMIT};
use crate::buffer::{Pool, SLICE};
use crate::endpoint::{Endpoint, Place};
use crate::proto::client::{ClientSession, Event};
use crate::proto::error::Errno;
use crate::proto::export::Offer;
use crate::proto::outbox::PIECES_MAX;
use crate::proto::wire::{command, kind, transmission, RequestHead};
use crate::sys;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, IoSlice, Read, Seek, SeekFrom, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// How long a server may take to greet.
const GREETING_LIMIT: Duration = Duration::from_secs(5);
/// How long a request may go on without a byte moving.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// A range of an export of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Where the server is; of several addresses, the first that can be connected to is used.
    pub server: Place,
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
    let (mut server, _) = Connection::open(target)?;
    server.request(kind::READ, 0, target)?;
    server
        .await_reply(|bytes| out.write_all(bytes).map_err(|error| Error(format!("cannot write to stdout: {error}"))))?;
    out.flush().map_err(|error| Error(format!("cannot write to stdout: {error}")))?;
    server.disconnect()
}

/// Writes the range in one request from standard input. The data is durable when it returns, if the server offers FUA.
///
/// It reads all of the input before it sends the first byte: a request that breaks off would leave the range half written.
pub fn write(target: &Target) -> Result<(), Error> {
    let (mut server, offer) = Connection::open(target)?;
    if offer.has(transmission::READ_ONLY) {
        return Err(Error(format!("{}: the export is read-only; nothing was written", server.server)));
    }
    let mut input = whole_input(u64::from(target.length))?;
    let fua = if offer.has(transmission::SEND_FUA) { command::FUA } else { 0 };
    server.request(kind::WRITE, fua, target)?;
    let mut left = target.length as usize;
    while left > 0 {
        let n = left.min(SLICE);
        let Some(mut piece) = server.pool.take_beyond(n) else {
            return Err(Error(format!("there is no memory for {n} bytes of the input")));
        };
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

/// A connection to an NBD server whose greeting has come.
struct Connection {
    stream: File,
    /// Each request is noted with itself.
    session: ClientSession<RequestHead>,
    /// For what is written, one slice at a time.
    pool: Pool,
    server: String,
}

impl Connection {
    /// Connects, and returns what the server offers, which the range lies inside.
    fn open(target: &Target) -> Result<(Self, Offer), Error> {
        let mut connected = Err(Error(format!("{} has no address", target.server)));
        for endpoint in target.server.look_up(target.bind).map_err(Error)? {
            connected = match &endpoint {
                Endpoint::Tcp(addr) => connect_tcp(target.bind, *addr).map(OwnedFd::from),
                Endpoint::Unix(path) => connect_unix(path, CONNECT_LIMIT).map(OwnedFd::from),
            }
            .map(|fd| (fd, endpoint.to_string()));
            if connected.is_ok() {
                break;
            }
        }
        let (fd, server) = connected?;
        let failed = |error: io::Error| Error(format!("{server}: cannot set a limit: {error}"));
        set_limits(&fd.as_fd(), GREETING_LIMIT).map_err(failed)?;
        let mut connection = Self {
            stream: File::from(fd),
            session: ClientSession::new(target.export.clone()),
            pool: Pool::new(SLICE),
            server,
        };
        let offer = connection.handshake()?;
        set_limits(&connection.stream.as_fd(), REQUEST_LIMIT)
            .map_err(|error| Error(format!("{}: cannot set a limit: {error}", connection.server)))?;
        if target.offset.saturating_add(u64::from(target.length)) > offer.size {
            return Err(Error(format!(
                "{}: {} bytes at offset {} go beyond the end of the export, which has {} bytes",
                connection.server, target.length, target.offset, offer.size
            )));
        }
        Ok((connection, offer))
    }

    fn handshake(&mut self) -> Result<Offer, Error> {
        let give_up = Instant::now() + GREETING_LIMIT;
        let mut offer = None;
        loop {
            if let Some(offer) = offer {
                return Ok(offer);
            }
            // The limit of the socket is one for each byte; a byte now and then must not make the handshake endless.
            if Instant::now() >= give_up {
                let limit_s = GREETING_LIMIT.as_secs();
                return Err(Error(format!("{}: the handshake took longer than {limit_s} s", self.server)));
            }
            self.events(|event| {
                if let Event::Export(found) = event {
                    offer = Some(found);
                }
                Ok(())
            })?;
        }
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
                // Holes and extents were not wished for.
                Event::Reply { error: 0, .. } | Event::Export(_) | Event::Hole { .. } | Event::Extents { .. } => Ok(()),
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

/// Standard input, once it is known that `length` bytes can be read from it: the length of a file is looked up, anything
/// else is copied to a file first.
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

/// A file in the temporary directory, without a name, so that it goes with the process.
fn spool_file() -> io::Result<File> {
    let name = format!("flexnbd-write-{}-{}", std::process::id(), sys::monotonic_ms());
    let path = std::env::temp_dir().join(name);
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    Ok(file)
}
