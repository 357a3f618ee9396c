//! One connection of a writer: both styles, several requests at once. What breaks the protocol fails; the end of the
//! connection is an error of the socket.

use crate::place::Door;
use crate::support::newstyle::{info_data, opt, option, rep};
use crate::support::{kind, request, uninterrupted, Client};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::os::unix::net::UnixStream;

/// How a client connects and what it negotiates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// Oldstyle, over TCP or a UNIX socket.
    Oldstyle,
    /// Newstyle, with simple replies, over TCP where there is a port.
    Simple,
    /// The same with structured replies.
    Structured,
    /// The same over a UNIX socket.
    Socket,
}

/// A request that was sent and not answered, or not all of it.
struct Asked {
    cookie: u64,
    kind: u16,
    offset: u64,
    data: Vec<u8>,
    missing: usize,
}

/// A request that was answered.
pub struct Answer {
    /// Its cookie.
    pub cookie: u64,
    /// What it was.
    pub kind: u16,
    /// Its offset.
    pub offset: u64,
    /// The data of a READ.
    pub data: Vec<u8>,
}

/// One connection.
pub struct Conversation {
    stream: TcpStream,
    asked: Vec<Asked>,
    last_cookie: u64,
}

impl Conversation {
    /// Connects and negotiates. An error is that the server did not want us.
    pub fn open(door: &Door, style: Style) -> io::Result<Self> {
        let client = match style {
            Style::Oldstyle if door.oldstyle.starts_with('/') => Client::new(UnixStream::connect(&door.oldstyle)?),
            Style::Oldstyle => Client::new(TcpStream::connect(&door.oldstyle)?),
            Style::Simple | Style::Structured | Style::Socket => match door.newstyle {
                Some(address) if style != Style::Socket => Client::new(TcpStream::connect(address)?),
                _ => Client::new(UnixStream::connect(&door.socket)?),
            },
        };
        let mut conversation = Self { stream: client.stream, asked: Vec::new(), last_cookie: 0x0123_4567_0000_0000 };
        if style == Style::Oldstyle {
            conversation.read(152)?;
            return Ok(conversation);
        }
        assert_eq!(conversation.read(18)?, b"NBDMAGICIHAVEOPT\0\x03");
        conversation.stream.write_all(&3_u32.to_be_bytes())?;
        if style != Style::Simple {
            conversation.negotiate(opt::STRUCTURED_REPLY, &[])?;
        }
        conversation.negotiate(opt::GO, &info_data(b"", &[]))?;
        Ok(conversation)
    }

    fn negotiate(&mut self, kind: u32, data: &[u8]) -> io::Result<()> {
        self.stream.write_all(&option(kind, data))?;
        loop {
            let head = self.read(20)?;
            let [reply, length] = [12, 16].map(|at| u32::from_be_bytes(head[at..at + 4].try_into().unwrap()));
            self.read(length as usize)?;
            assert!(matches!(reply, rep::INFO | rep::ACK), "option {kind} was answered with {reply:#x}");
            if reply == rep::ACK {
                return Ok(());
            }
        }
    }

    /// The cookie of the next request.
    pub fn next_cookie(&self) -> u64 {
        self.last_cookie + 1
    }

    /// How many requests are under way.
    pub fn unanswered(&self) -> usize {
        self.asked.len()
    }

    /// True when some of these bytes are being read.
    pub fn is_reading(&self, range: Range<u64>) -> bool {
        self.asked.iter().any(|asked| {
            asked.kind == kind::READ && asked.offset < range.end && range.start < asked.offset + asked.data.len() as u64
        })
    }

    /// Sends a request.
    pub fn send(&mut self, kind: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> io::Result<()> {
        self.last_cookie += 1;
        let data = vec![0; if kind == kind::READ { length as usize } else { 0 }];
        self.asked.push(Asked { cookie: self.last_cookie, kind, offset, missing: data.len(), data });
        self.stream.write_all(&[&request(kind, flags, self.last_cookie, offset, length), payload].concat())
    }

    /// Receives a simple reply, or a chunk; `None` when there is more to come.
    pub fn receive(&mut self) -> io::Result<Option<Answer>> {
        let magic = self.read(4)?;
        match u32::from_be_bytes(magic.try_into().unwrap()) {
            0x6744_6698 => {
                let head = self.read(12)?;
                let at = self.find(&head[4..12]);
                assert_eq!(head[..4], [0; 4], "the error of a {}", self.asked[at].kind);
                let asked = &mut self.asked[at];
                assert_eq!(asked.missing, asked.data.len(), "a simple reply after a chunk");
                let data = &mut asked.data;
                self.stream.read_exact(data)?;
                asked.missing = 0;
                Ok(Some(self.finish(at)))
            }
            0x668e_33ef => self.receive_chunk(),
            magic => panic!("{magic:#x} is the magic of no reply"),
        }
    }

    fn receive_chunk(&mut self) -> io::Result<Option<Answer>> {
        let head = self.read(16)?;
        let at = self.find(&head[4..12]);
        let length = u32::from_be_bytes(head[12..].try_into().unwrap()) as usize;
        let payload = self.read(length)?;
        let asked = &mut self.asked[at];
        let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        match u16::from_be_bytes([head[2], head[3]]) {
            0 => {}
            chunk @ (1 | 2) => {
                let offset = u64::from_be_bytes(payload[..8].try_into().unwrap());
                let start = (offset - asked.offset) as usize;
                let bytes = if chunk == 1 { payload.len() - 8 } else { number(8) as usize };
                let place = &mut asked.data[start..start + bytes];
                if chunk == 1 {
                    place.copy_from_slice(&payload[8..]);
                } else {
                    place.fill(0);
                }
                asked.missing -= bytes;
            }
            chunk => panic!("chunk {chunk:#x} with error {} for a {}", number(0), asked.kind),
        }
        let is_done = head[1] & 1 != 0;
        Ok(is_done.then(|| self.finish(at)))
    }

    #[track_caller]
    fn find(&self, cookie: &[u8]) -> usize {
        let cookie = u64::from_be_bytes(cookie.try_into().unwrap());
        let found = self.asked.iter().position(|asked| asked.cookie == cookie);
        found.unwrap_or_else(|| panic!("a reply to {cookie:#x}, which is not under way"))
    }

    #[track_caller]
    fn finish(&mut self, at: usize) -> Answer {
        let Asked { cookie, kind, offset, data, missing } = self.asked.swap_remove(at);
        assert_eq!(missing, 0, "bytes of a READ that did not come");
        Answer { cookie, kind, offset, data }
    }

    fn read(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let mut filled = 0;
        while filled < length {
            match uninterrupted(|| self.stream.read(&mut bytes[filled..]))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                more => filled += more,
            }
        }
        Ok(bytes)
    }
}
