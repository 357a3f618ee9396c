//! A raw client of the oldstyle protocol, what both styles have in common, and a listener that hands each connection to a
//! script.

use super::SOON;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

/// Request types.
pub mod kind {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
}

/// Command flags.
pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
}

/// Error values of replies.
pub mod errno {
    pub const EIO: u32 = 5;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
}

/// `NBDMAGIC` and the magic of the oldstyle greeting.
pub const GREETING_MAGICS: [u8; 16] = *b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53";

/// The greeting of an oldstyle server.
pub fn greeting(size: u64, flags: u32) -> Vec<u8> {
    let mut bytes = [&GREETING_MAGICS[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    bytes.resize(152, 0);
    bytes
}

/// The head of a request.
pub fn request(kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// A simple reply.
pub fn reply(error: u32, cookie: u64) -> Vec<u8> {
    let mut bytes = 0x6744_6698_u32.to_be_bytes().to_vec();
    bytes.extend(error.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

/// Repeats a call that a signal interrupted. A program that ends while its thread starts another one has its SIGCHLD
/// handed to any other thread, and a wait for a socket with a deadline does not go on by itself after that.
pub fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// A raw client of the oldstyle protocol. Every read and write has a deadline of [`SOON`].
pub struct Client {
    /// The socket; it may be one of another family, which makes no difference to what is done with it.
    pub stream: TcpStream,
}

impl Client {
    /// From a connected socket.
    pub fn new(stream: impl Into<OwnedFd>) -> Self {
        let stream = TcpStream::from(stream.into());
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        Self { stream }
    }

    /// Sends bytes.
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends a request and its payload in one go.
    #[track_caller]
    pub fn send_request(&mut self, kind: u16, flags: u16, cookie: u64, offset: u64, length: u32, payload: &[u8]) {
        self.send(&[&request(kind, flags, cookie, offset, length), payload].concat());
    }

    /// Receives exactly `length` bytes.
    #[track_caller]
    pub fn read_bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Receives the greeting, as it comes.
    #[track_caller]
    pub fn read_greeting(&mut self) -> Vec<u8> {
        self.read_bytes(152)
    }

    /// Receives the head of a reply: the error and the cookie.
    #[track_caller]
    pub fn read_reply(&mut self) -> (u32, u64) {
        let bytes = self.read_bytes(16);
        assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes(), "the magic of a simple reply");
        let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(bytes[8..].try_into().unwrap()))
    }

    /// A request without data in its reply, answered: the error.
    #[track_caller]
    pub fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> u32 {
        let cookie = 0x0123_4567_89ab_cdef ^ offset;
        self.send_request(kind, flags, cookie, offset, length, payload);
        let (error, answered) = self.read_reply();
        assert_eq!(answered, cookie);
        error
    }

    /// Reads; an error is returned as such.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        match self.ask(kind::READ, 0, offset, length, &[]) {
            0 => Ok(self.read_bytes(length as usize)),
            error => Err(error),
        }
    }

    /// Writes; 0 when it went well.
    #[track_caller]
    pub fn write(&mut self, offset: u64, payload: &[u8]) -> u32 {
        self.ask(kind::WRITE, 0, offset, payload.len().try_into().unwrap(), payload)
    }

    /// Flushes; 0 when it went well.
    #[track_caller]
    pub fn flush(&mut self) -> u32 {
        self.ask(kind::FLUSH, 0, 0, 0, &[])
    }

    /// Fails unless a read at the beginning is answered.
    #[track_caller]
    pub fn expect_alive(&mut self) {
        self.read(0, 512).unwrap();
    }

    /// Waits until the server has closed the connection, and returns what came before.
    #[track_caller]
    pub fn read_to_close(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.stream.read_to_end(&mut bytes) {
            // What the server has not read of ours turns its close into a reset.
            Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("not closed: {error}"),
            _ => bytes,
        }
    }

    /// Fails unless the server closes the connection without another byte.
    #[track_caller]
    pub fn expect_closed(&mut self) {
        let bytes = self.read_to_close();
        assert!(bytes.is_empty(), "unexpected before the close: {bytes:?}");
    }

    /// Fails if the server closes the connection or sends something within `time`.
    #[track_caller]
    pub fn expect_silence(&mut self, time: Duration) {
        self.stream.set_read_timeout(Some(time)).unwrap();
        let outcome = uninterrupted(|| self.stream.peek(&mut [0]));
        let error = outcome.expect_err("bytes or a close where there should be silence");
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
        self.stream.set_read_timeout(Some(SOON)).unwrap();
    }
}

/// A peer that follows a script: one thread that accepts connections and hands each to the script, with its number.
pub struct Scripted {
    /// Where it listens.
    pub address: SocketAddr,
}

impl Scripted {
    /// Starts it. It ends with the test program; a script must not wait without a deadline.
    pub fn start(mut script: impl FnMut(usize, Client) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                script(number, Client::new(stream.unwrap()));
            }
        });
        Self { address }
    }
}
