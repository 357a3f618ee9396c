//! PURE: the bytes of a server, cut up anywhere, told to [`Flights`] as replies. Both simple replies and the chunks of
//! structured ones.

use std::io;

use super::flights::Flights;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const SIMPLE_BYTES: usize = 16;
const CHUNK_BYTES: usize = 20;
const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_STATUS: u16 = 5;
const CHUNK_ERROR: u16 = 1 << 15;
/// The longest: of a chunk with a hole.
const HEAD_MAX: usize = CHUNK_BYTES + 12;
/// More than any message of an error takes.
const ERROR_MAX: u32 = 8 << 10;

/// A server that breaks the protocol ends the run.
pub fn protocol_error(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server sent {what}"))
}

/// Where in the stream of replies a connection is.
pub struct Replies {
    state: State,
    head: [u8; HEAD_MAX],
    filled: usize,
}

#[derive(Clone, Copy)]
enum State {
    /// In a header of which so many bytes are to be known next.
    Head { needed: usize },
    /// In the data of a read that belongs at `at`.
    Data { cookie: u64, at: u64, left: u32, is_last: bool },
    /// In bytes that nobody looks at.
    Skip { cookie: u64, left: u32, is_last: bool },
}

impl Replies {
    pub fn new() -> Self {
        Self { state: State::Head { needed: SIMPLE_BYTES }, head: [0; HEAD_MAX], filled: 0 }
    }

    /// How many bytes of data come next that nobody needs to see.
    pub fn data_left(&self) -> usize {
        match self.state {
            State::Head { .. } => 0,
            State::Data { left, .. } | State::Skip { left, .. } => left as usize,
        }
    }

    /// How many bytes of a header come next at least.
    pub fn head_left(&self) -> usize {
        match self.state {
            State::Head { needed } => needed - self.filled,
            _ => 0,
        }
    }

    /// Takes what was received.
    pub fn feed(&mut self, mut bytes: &[u8], flights: &mut Flights) -> io::Result<()> {
        while !bytes.is_empty() {
            let taken;
            match self.state {
                State::Head { needed } => {
                    taken = bytes.len().min(needed - self.filled);
                    self.head[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
                    self.filled += taken;
                    if self.filled == needed {
                        self.read_head(flights)?;
                    }
                }
                State::Data { at, left, .. } => {
                    taken = bytes.len().min(left as usize);
                    flights.data(at, &bytes[..taken]);
                    self.pass(taken, flights)?;
                }
                State::Skip { left, .. } => {
                    taken = bytes.len().min(left as usize);
                    self.pass(taken, flights)?;
                }
            }
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    /// So many bytes of [`Replies::data_left`] are over.
    pub fn pass(&mut self, passed: usize, flights: &mut Flights) -> io::Result<()> {
        let (State::Data { cookie, left, is_last, .. } | State::Skip { cookie, left, is_last }) = &mut self.state
        else {
            return Ok(());
        };
        let (cookie, is_last) = (*cookie, *is_last);
        *left -= u32::try_from(passed).map_err(io::Error::other)?;
        if *left == 0 {
            return self.end(cookie, is_last, flights);
        }
        if let State::Data { at, .. } = &mut self.state {
            *at += passed as u64;
        }
        Ok(())
    }

    /// A reply or chunk is over.
    fn end(&mut self, cookie: u64, is_last: bool, flights: &mut Flights) -> io::Result<()> {
        self.filled = 0;
        self.state = State::Head { needed: SIMPLE_BYTES };
        if is_last {
            flights.finish(cookie)?;
        }
        Ok(())
    }

    /// All that was needed of a header is there: what comes next?
    fn read_head(&mut self, flights: &mut Flights) -> io::Result<()> {
        match u32::from_be_bytes(self.field(0)) {
            SIMPLE_MAGIC => self.read_simple(flights),
            CHUNK_MAGIC if self.filled < CHUNK_BYTES => {
                self.state = State::Head { needed: CHUNK_BYTES };
                Ok(())
            }
            CHUNK_MAGIC => self.read_chunk(flights),
            _ => Err(protocol_error("no reply")),
        }
    }

    fn read_simple(&mut self, flights: &mut Flights) -> io::Result<()> {
        let (error, cookie) = (u32::from_be_bytes(self.field(4)), u64::from_be_bytes(self.field(8)));
        if error != 0 {
            flights.fail(cookie)?;
            return self.end(cookie, true, flights);
        }
        let length = flights.data_of(cookie)?;
        if length == 0 {
            return self.end(cookie, true, flights);
        }
        let at = flights.place_of(cookie)?;
        flights.piece(cookie, at, length, false)?;
        self.state = State::Data { cookie, at, left: length, is_last: true };
        Ok(())
    }

    fn read_chunk(&mut self, flights: &mut Flights) -> io::Result<()> {
        let (flags, kind) = (u16::from_be_bytes(self.field(4)), u16::from_be_bytes(self.field(6)));
        let (cookie, length) = (u64::from_be_bytes(self.field(8)), u32::from_be_bytes(self.field(16)));
        let is_last = flags & CHUNK_DONE != 0;
        let fixed = match kind {
            CHUNK_DATA if length > 8 => 8,
            CHUNK_HOLE if length == 12 => 12,
            CHUNK_NONE if length == 0 => 0,
            CHUNK_STATUS if length > 4 && length % 8 == 4 => 0,
            kind if kind & CHUNK_ERROR != 0 && (6..=ERROR_MAX).contains(&length) => 0,
            _ => return Err(protocol_error("an unknown chunk")),
        };
        if self.filled < CHUNK_BYTES + fixed {
            self.state = State::Head { needed: CHUNK_BYTES + fixed };
            return Ok(());
        }
        match kind {
            CHUNK_DATA => {
                let (at, left) = (u64::from_be_bytes(self.field(CHUNK_BYTES)), length - 8);
                flights.piece(cookie, at, left, false)?;
                self.state = State::Data { cookie, at, left, is_last };
                Ok(())
            }
            CHUNK_HOLE => {
                let at = u64::from_be_bytes(self.field(CHUNK_BYTES));
                flights.piece(cookie, at, u32::from_be_bytes(self.field(CHUNK_BYTES + 8)), true)?;
                self.end(cookie, is_last, flights)
            }
            CHUNK_NONE => self.end(cookie, is_last, flights),
            // What it says of the blocks is skipped.
            CHUNK_STATUS => {
                flights.extents(cookie)?;
                self.state = State::Skip { cookie, left: length, is_last };
                Ok(())
            }
            _ => {
                flights.fail(cookie)?;
                self.state = State::Skip { cookie, left: length, is_last };
                Ok(())
            }
        }
    }

    fn field<const N: usize>(&self, from: usize) -> [u8; N] {
        let mut bytes = [0; N];
        bytes.copy_from_slice(&self.head[from..from + N]);
        bytes
    }
}
