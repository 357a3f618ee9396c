//! What a client says in one conversation, and what must come back, worked out without the code under test.

use crate::disk::Fault;
use flexnbd::proto::client::ClientSession;
use flexnbd::proto::error::{Errno, Violation};
use flexnbd::proto::server::{End, Tally};
use flexnbd::proto::wire::{kind, RequestHead, REQUEST_LEN};

/// One request and its reply.
#[derive(Debug, Clone)]
pub struct Ask {
    pub head: RequestHead,
    /// Where its first byte is in the stream.
    pub at: usize,
    /// Where the first byte behind it and its payload is.
    pub end: usize,
    pub fault: Option<Fault>,
    /// The error of its reply, 0 for none.
    pub error: u32,
    /// What a READ brings.
    pub data: Vec<u8>,
}

impl Ask {
    /// False for a DISC, to which nothing comes back.
    pub fn is_answered(&self) -> bool {
        self.head.kind != kind::DISC
    }

    /// Does to `disk` what the request does.
    fn apply(&self, stream: &[u8], disk: &mut [u8]) {
        if self.error != 0 || self.head.length == 0 {
            return;
        }
        let start = usize::try_from(self.head.offset).unwrap();
        match self.head.kind {
            kind::WRITE => disk[start..][..self.head.length as usize]
                .copy_from_slice(&stream[self.at + REQUEST_LEN..][..self.head.length as usize]),
            kind::TRIM | kind::WRITE_ZEROES => disk[start..][..self.head.length as usize].fill(0),
            _ => {}
        }
    }
}

/// A conversation. The requests have the cookies 1, 2, ..., as a `ClientSession` gives them out.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What the disk holds before.
    pub before: Vec<u8>,
    /// What the disk holds after.
    pub after: Vec<u8>,
    pub asks: Vec<Ask>,
    /// All that the client sends.
    pub stream: Vec<u8>,
    /// How it ends.
    pub end: Result<End, Violation>,
}

impl Plan {
    /// A conversation about an image of `size` bytes, in which nothing is said yet.
    pub fn new(size: usize) -> Self {
        let before: Vec<u8> = (0..size).map(|at| (at ^ (at >> 8).wrapping_mul(31)) as u8).collect();
        Self { after: before.clone(), before, asks: Vec::new(), stream: Vec::new(), end: Ok(End::EndOfStream) }
    }

    /// The client's side of it, all requests asked and noted with their cookies.
    pub fn client(&self) -> ClientSession<u64> {
        let mut client = ClientSession::new(String::new());
        for Ask { head, .. } in &self.asks {
            match head.kind {
                kind::DISC => client.disconnect(),
                _ => client.command(head.kind, head.flags, head.offset, head.length, head.cookie),
            }
        }
        client
    }

    /// Says something. `error` is what must come back; what a good READ must bring is looked up.
    pub fn ask(&mut self, mut head: RequestHead, payload: &[u8], error: u32, fault: Option<Fault>) -> &mut Self {
        head.cookie = self.asks.len() as u64 + 1;
        let at = self.stream.len();
        self.stream.extend(head.encode());
        self.stream.extend_from_slice(payload);
        let error = fault.map_or(error, |fault| fault.errno.to_wire());
        let mut ask = Ask { head, at, end: self.stream.len(), fault, error, data: Vec::new() };
        if head.kind == kind::READ && error == 0 {
            ask.data = self.after[usize::try_from(head.offset).unwrap()..][..head.length as usize].to_vec();
        }
        ask.apply(&self.stream, &mut self.after);
        self.asks.push(ask);
        self
    }

    pub fn read(&mut self, offset: u64, length: u32) -> &mut Self {
        self.ask(head(kind::READ, 0, offset, length), &[], 0, None)
    }

    pub fn write(&mut self, flags: u16, offset: u64, payload: &[u8]) -> &mut Self {
        self.ask(head(kind::WRITE, flags, offset, u32::try_from(payload.len()).unwrap()), payload, 0, None)
    }

    pub fn flush(&mut self) -> &mut Self {
        self.ask(head(kind::FLUSH, 0, 0, 0), &[], 0, None)
    }

    pub fn trim(&mut self, flags: u16, offset: u64, length: u32) -> &mut Self {
        self.ask(head(kind::TRIM, flags, offset, length), &[], 0, None)
    }

    pub fn zero(&mut self, flags: u16, offset: u64, length: u32) -> &mut Self {
        self.ask(head(kind::WRITE_ZEROES, flags, offset, length), &[], 0, None)
    }

    /// Asks for something that must be refused.
    pub fn refused(&mut self, errno: Errno, head: RequestHead) -> &mut Self {
        let payload = if head.kind == kind::WRITE { vec![0xEE; head.length as usize] } else { Vec::new() };
        self.ask(head, &payload, errno.to_wire(), None)
    }

    /// Says DISC, and then something that must not be looked at.
    pub fn disconnect(&mut self, behind: &[u8]) -> &mut Self {
        self.ask(head(kind::DISC, 0, 0, 0), &[], 0, None);
        self.stream.extend(behind);
        self.end = Ok(End::Disconnect);
        self
    }

    /// Sends what is no request. The reply repeats what stands where the cookie of one would.
    pub fn broken(&mut self, bytes: &[u8]) -> &mut Self {
        self.ask(head(kind::FLUSH, 0, 0, 0), &[], Errno::Inval.to_wire(), None);
        let ask = self.asks.last_mut().unwrap();
        let cookie = ask.head.cookie.to_be_bytes();
        self.stream.truncate(ask.at);
        self.stream.extend(bytes);
        self.stream[ask.at + 8..][..8].copy_from_slice(&cookie);
        let magic = u32::from_be_bytes(*bytes.first_chunk().unwrap());
        self.end = Ok(End::Violation(Violation::BadRequestMagic(magic)));
        self
    }

    /// The same conversation when the client hangs up after `length` bytes.
    pub fn cut(&self, length: usize) -> Self {
        let mut cut = self.clone();
        cut.stream.truncate(length);
        cut.asks.retain(|ask| ask.end <= length);
        let whole = cut.asks.last().map_or(0, |ask| ask.end);
        let over = cut.asks.len() == self.asks.len() && self.end != Ok(End::EndOfStream);
        cut.end = match () {
            () if over => self.end,
            () if whole == length => Ok(End::EndOfStream),
            () => Err(Violation::Truncated),
        };
        // A request that is cut off is still one that the killswitch sees and the disk may see a part of.
        cut.asks.extend(self.asks.iter().filter(|ask| ask.at < length && ask.end > length).cloned());
        cut.after.copy_from_slice(&self.before);
        for ask in cut.asks.iter().filter(|ask| ask.end <= length) {
            ask.apply(&cut.stream, &mut cut.after);
        }
        cut
    }

    /// What a session counts that has answered all of it.
    pub fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        let broken = matches!(self.end, Ok(End::Violation(_)));
        for (at, Ask { head, error, .. }) in self.asks.iter().enumerate() {
            let good = if *error == 0 { u64::from(head.length) } else { 0 };
            tally.errors += u64::from(*error != 0);
            match head.kind {
                _ if broken && at + 1 == self.asks.len() => {}
                kind::READ => {
                    tally.reads += 1;
                    tally.read_bytes += good;
                }
                kind::WRITE | kind::WRITE_ZEROES => {
                    tally.writes += 1;
                    tally.written_bytes += good;
                }
                kind::TRIM => tally.trims += 1,
                kind::FLUSH => tally.flushes += 1,
                _ => {}
            }
        }
        tally
    }
}

/// A request without its cookie.
pub fn head(kind: u16, flags: u16, offset: u64, length: u32) -> RequestHead {
    RequestHead { flags, kind, cookie: 0, offset, length }
}
