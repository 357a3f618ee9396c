//! A raw client of the newstyle protocol: haggling byte for byte, then requests, with every rule that holds for all
//! replies checked on the way. And how a server gets a newstyle listener.

use super::{kind, request, uninterrupted, Builder, Client, Server, SOON};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;

/// What gives a server a newstyle listener on a port that the system picks.
pub const PORT: &str = "--newstyle-port=0";

/// Option types.
pub mod opt {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of option replies.
pub mod rep {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_POLICY: u32 = 0x8000_0002;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
}

/// Request types beside those of [`kind`].
pub const CACHE: u16 = 5;
pub const BLOCK_STATUS: u16 = 7;

/// Command flags beside those of `flag`.
pub const DF: u16 = 4;
pub const REQ_ONE: u16 = 8;
pub const FAST_ZERO: u16 = 16;

/// Error values beside those of `errno`.
pub const EPERM: u32 = 1;
pub const EOVERFLOW: u32 = 75;
pub const ENOTSUP: u32 = 95;
/// All that the specification knows.
pub const ERRORS: [u32; 8] = [1, 5, 12, 22, 28, 75, 95, 108];

/// Transmission flags: flags, FLUSH, FUA, TRIM, `WRITE_ZEROES`, `MULTI_CONN`, CACHE, `FAST_ZERO`.
pub const FLAGS: u16 = 1 | 4 | 8 | 32 | 64 | 256 | 1024 | 2048;
/// With structured replies there is DF too.
pub const FLAG_DF: u16 = 128;

/// A server of this image with a newstyle listener beside the oldstyle one.
#[track_caller]
pub fn serve(size: u64) -> Server {
    Server::serve().size(size).arg(PORT).start()
}

/// As [`serve`], with content.
#[track_caller]
pub fn serve_content(content: &[u8]) -> Server {
    Server::serve().content(content).arg(PORT).start()
}

/// Starts the server under strace, which traces what happens to the image (and `more` calls) and may make calls fail. What
/// a ring does strace does not see, so there is none. The path of the trace comes too.
#[track_caller]
pub fn traced(builder: Builder, expressions: &[&str]) -> (Server, PathBuf) {
    let path = builder.dir().join("image");
    let trace = builder.dir().join("trace");
    let mut words = vec!["strace", "-D", "-f", "-o", trace.to_str().unwrap(), "-P", path.to_str().unwrap()];
    words.extend(expressions.iter().flat_map(|expression| ["-e", expression]));
    (builder.engine("sync").arg(PORT).through(&words).start(), trace)
}

/// Where the newstyle listener is.
#[track_caller]
pub fn address(server: &Server) -> SocketAddr {
    server.status().get("newstyle_address").parse().unwrap()
}

/// The same for clients that take a URI.
#[track_caller]
pub fn uri(server: &Server) -> String {
    format!("nbd://{}", address(server))
}

/// An option without its data.
pub fn option_head(kind: u32, length: u32) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &kind.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// An option.
pub fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    [option_head(kind, data.len() as u32), data.to_vec()].concat()
}

/// A length and a string.
pub fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text].concat()
}

/// The data of INFO and GO.
pub fn info_data(name: &[u8], wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|info| info.to_be_bytes()));
    data
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
pub fn context_data(name: &[u8], queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query.as_bytes())));
    data
}

/// The data of the information that every good INFO and GO has.
pub fn export_info(size: u64, flags: u16) -> Vec<u8> {
    [&[0; 2], size.to_be_bytes().as_slice(), &flags.to_be_bytes()].concat()
}

/// The one metadata context, as its reply holds it.
pub fn allocation_context() -> Vec<u8> {
    [&1_u32.to_be_bytes(), b"base:allocation".as_slice()].concat()
}

/// A client that haggles.
pub struct Haggler {
    pub client: Client,
}

impl Haggler {
    /// Has read the greeting and said that it knows all that was offered.
    #[track_caller]
    pub fn new(server: &Server) -> Self {
        Self::to(address(server))
    }

    /// As [`Haggler::new`].
    #[track_caller]
    pub fn to(address: SocketAddr) -> Self {
        Self::with_flags(address, 3)
    }

    /// Has read the greeting and sent these client flags.
    #[track_caller]
    pub fn with_flags(address: SocketAddr, flags: u32) -> Self {
        let mut client = Client::new(TcpStream::connect(address).unwrap());
        assert_eq!(client.read_bytes(18), b"NBDMAGICIHAVEOPT\0\x03");
        client.send(&flags.to_be_bytes());
        Self { client }
    }

    /// Receives one reply to `option`: its type and its data.
    #[track_caller]
    pub fn reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        let head = self.client.read_bytes(20);
        assert_eq!(head[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes(), "the magic of an option reply");
        assert_eq!(head[8..12], option.to_be_bytes(), "the option it is for");
        let [kind, length] = [12, 16].map(|at| u32::from_be_bytes(head[at..at + 4].try_into().unwrap()));
        assert!(length <= 4096 + 4, "a reply of {length} bytes");
        (kind, self.client.read_bytes(length as usize))
    }

    /// Receives all replies to `option`: what came before the last one, and the type of that.
    #[track_caller]
    pub fn replies(&mut self, option: u32) -> (Vec<(u32, Vec<u8>)>, u32) {
        let mut before = Vec::new();
        loop {
            let (kind, data) = self.reply(option);
            match kind {
                rep::ACK => assert!(data.is_empty()),
                rep::SERVER | rep::INFO | rep::META_CONTEXT => {
                    before.push((kind, data));
                    continue;
                }
                _ => assert!(kind >> 31 == 1 && data.len() <= 4096, "{kind:#x}"),
            }
            assert_ne!(kind, rep::ERR_TLS_REQD, "there is no TLS here");
            return (before, kind);
        }
    }

    /// Sends an option and receives all replies to it.
    #[track_caller]
    pub fn ask(&mut self, option_kind: u32, data: &[u8]) -> (Vec<(u32, Vec<u8>)>, u32) {
        self.client.send(&option(option_kind, data));
        self.replies(option_kind)
    }

    /// Sends an option that must bring no more than this one reply.
    #[track_caller]
    pub fn expect(&mut self, option_kind: u32, data: &[u8], reply: u32) {
        let (before, last) = self.ask(option_kind, data);
        assert_eq!((before, last), (vec![], reply), "option {option_kind}, {} bytes of data", data.len());
    }

    /// Fails unless the next option is understood.
    #[track_caller]
    pub fn expect_in_step(&mut self) {
        assert_eq!(self.ask(opt::LIST, &[]), (vec![(rep::SERVER, vec![0; 4])], rep::ACK));
    }

    /// The size and flags that INFO or GO tell.
    #[track_caller]
    pub fn info(&mut self, option: u32) -> (u64, u16) {
        let (found, last) = self.ask(option, &info_data(b"", &[]));
        assert_eq!((found.len(), last), (1, rep::ACK), "the size, even unasked, and no more");
        let data = &found[0].1;
        assert_eq!((data.len(), &data[..2]), (12, &[0; 2][..]));
        let size = u64::from_be_bytes(data[2..10].try_into().unwrap());
        (size, u16::from_be_bytes(data[10..].try_into().unwrap()))
    }

    /// Agrees on structured replies and block status.
    #[track_caller]
    pub fn structured(mut self) -> Self {
        self.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
        let found = self.ask(opt::SET_META_CONTEXT, &context_data(b"", &["base:allocation"]));
        assert_eq!(found, (vec![(rep::META_CONTEXT, allocation_context())], rep::ACK));
        self
    }

    /// Enters transmission.
    #[track_caller]
    pub fn go(mut self) -> Client {
        self.info(opt::GO);
        self.client
    }
}

/// A client that has haggled for simple replies.
#[track_caller]
pub fn simple(server: &Server) -> Client {
    Haggler::new(server).go()
}

/// A client that has haggled for structured replies and block status.
#[track_caller]
pub fn structured(server: &Server) -> Structured {
    Structured { client: Haggler::new(server).structured().go() }
}

/// A chunk of a structured reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub done: bool,
    pub kind: u16,
    pub cookie: u64,
    pub payload: Vec<u8>,
}

/// What a READ brought: where each content chunk begins, how long it is, and whether it was a hole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    pub offset: u64,
    pub length: u64,
    pub is_hole: bool,
}

/// A client whose READs and block status requests are answered in chunks. Other requests are asked of `client`.
pub struct Structured {
    pub client: Client,
}

impl Structured {
    /// Receives a chunk.
    #[track_caller]
    pub fn chunk(&mut self) -> Chunk {
        let head = self.client.read_bytes(20);
        assert_eq!(head[..4], 0x668e_33ef_u32.to_be_bytes(), "the magic of a chunk");
        let flags = u16::from_be_bytes([head[4], head[5]]);
        assert!(flags < 2, "unknown chunk flags {flags:#x}");
        let length = u32::from_be_bytes(head[16..].try_into().unwrap()) as usize;
        assert!(length <= (32 << 20) + 8, "a chunk of {length} bytes");
        let kind = u16::from_be_bytes([head[6], head[7]]);
        let cookie = u64::from_be_bytes(head[8..16].try_into().unwrap());
        Chunk { done: flags == 1, kind, cookie, payload: self.client.read_bytes(length) }
    }

    /// The error of an error chunk.
    #[track_caller]
    pub fn error_of(chunk: &Chunk) -> u32 {
        assert_eq!(chunk.kind, 0x8001, "an error chunk");
        let payload = &chunk.payload;
        assert!(payload.len() >= 6);
        let text = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
        assert!(text <= 4096 && text <= payload.len() - 6);
        let error = u32::from_be_bytes(payload[..4].try_into().unwrap());
        assert!(ERRORS.contains(&error), "error {error}");
        error
    }

    /// Reads; checks what holds for all structured replies; an error is returned as such.
    #[track_caller]
    pub fn read(&mut self, flags: u16, offset: u64, length: u32) -> Result<(Vec<u8>, Vec<Content>), u32> {
        let cookie = 0xfeed_0000_0000_0001 ^ offset;
        self.client.send(&request(kind::READ, flags, cookie, offset, length));
        self.collect(cookie, offset, length)
    }

    /// Receives the chunks of a READ that was sent.
    #[track_caller]
    pub fn collect(&mut self, cookie: u64, offset: u64, length: u32) -> Result<(Vec<u8>, Vec<Content>), u32> {
        let mut data = Vec::new();
        let mut found: Vec<Content> = Vec::new();
        let mut error = None;
        loop {
            let chunk = self.chunk();
            assert_eq!(chunk.cookie, cookie);
            let number = |at: usize, length: usize| {
                chunk.payload[at..at + length].iter().fold(0_u64, |number, &byte| number << 8 | u64::from(byte))
            };
            match chunk.kind {
                0 => assert!(chunk.done && chunk.payload.is_empty()),
                1 | 2 => {
                    let at = number(0, 8);
                    let is_hole = chunk.kind == 2;
                    let bytes = chunk.payload.len() as u64 - 8;
                    assert!(bytes > 0 && (!is_hole || bytes == 4));
                    let bytes = if is_hole { number(8, 4) } else { bytes };
                    assert!(bytes > 0, "a hole of nothing");
                    assert!(at >= offset && at + bytes <= offset + u64::from(length), "inside the request");
                    let overlaps = |other: &Content| at < other.offset + other.length && other.offset < at + bytes;
                    assert!(!found.iter().any(overlaps), "the same bytes twice");
                    let start = (at - offset) as usize;
                    let end = start + bytes as usize;
                    data.resize(data.len().max(end), 0);
                    let place = &mut data[start..end];
                    if is_hole {
                        place.fill(0);
                    } else {
                        place.copy_from_slice(&chunk.payload[8..]);
                    }
                    found.push(Content { offset: at, length: bytes, is_hole });
                }
                _ => assert!(error.replace(Self::error_of(&chunk)).is_none(), "one error"),
            }
            if chunk.done {
                break;
            }
        }
        let Some(error) = error else {
            let covered: u64 = found.iter().map(|content| content.length).sum();
            assert_eq!(covered, u64::from(length), "all of it");
            return Ok((data, found));
        };
        Err(error)
    }

    /// Asks for block status: lengths and flags, or an error.
    #[track_caller]
    pub fn block_status(&mut self, flags: u16, offset: u64, length: u32) -> Result<Vec<(u32, u32)>, u32> {
        self.client.send(&request(BLOCK_STATUS, flags, 77, offset, length));
        let chunk = self.chunk();
        assert_eq!((chunk.cookie, chunk.done), (77, true), "one context, so one chunk");
        if chunk.kind != 5 {
            return Err(Self::error_of(&chunk));
        }
        assert_eq!(chunk.payload[..4], 1_u32.to_be_bytes(), "the id of the context");
        assert_eq!((chunk.payload.len() - 4) % 8, 0);
        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
        Ok(chunk.payload[4..].chunks(8).map(|extent| (number(&extent[..4]), number(&extent[4..]))).collect())
    }

    /// Fails unless a read at the beginning is answered.
    #[track_caller]
    pub fn expect_alive(&mut self) {
        self.read(0, 0, 512).unwrap();
    }
}

/// Sends what the server may not want to read to the end: it closes, or takes it.
pub fn try_send(client: &mut Client, bytes: &[u8]) -> bool {
    client.stream.write_all(bytes).is_ok()
}

/// Whether the connection ends within [`SOON`]; what comes before is dropped.
pub fn ends(client: &mut Client) -> bool {
    client.stream.set_read_timeout(Some(SOON)).unwrap();
    let mut bytes = [0; 4096];
    loop {
        match uninterrupted(|| client.stream.read(&mut bytes)) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
