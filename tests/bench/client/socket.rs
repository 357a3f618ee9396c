//! A stream to the server, TCP or UNIX, that never blocks once it is connected.

use std::io::{self, IoSlice, Read, Write};
use std::net;
use std::os::fd::AsRawFd;
use std::os::unix::net as unix;
use std::time::Duration;

use mio::event::Source;
use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};

/// What a handshake needs of a stream.
pub trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A connected stream.
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Connects, and shakes hands with blocking calls that take `patience` each at most.
    pub fn connect<T>(
        address: &str,
        patience: Duration,
        shake: impl FnOnce(&mut dyn Stream) -> io::Result<T>,
    ) -> io::Result<(Self, T)> {
        if address.starts_with('/') {
            let mut stream = unix::UnixStream::connect(address)?;
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))?;
            let found = shake(&mut stream)?;
            stream.set_nonblocking(true)?;
            return Ok((Self::Unix(UnixStream::from_std(stream)), found));
        }
        let mut stream = net::TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        let found = shake(&mut stream)?;
        stream.set_nonblocking(true)?;
        Ok((Self::Tcp(TcpStream::from_std(stream)), found))
    }

    /// Receives what is there; 0 when nothing is.
    pub fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let received = match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        };
        some_or_none(received)
    }

    /// Lets the kernel throw away up to `length` bytes of what is there, and says how many; 0 when nothing is.
    pub fn discard(&mut self, length: usize) -> io::Result<usize> {
        let Self::Tcp(stream) = self else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        // SAFETY: with MSG_TRUNC, TCP stores nothing, so that there is no memory to point to (tcp(7)).
        #[expect(unsafe_code, reason = "no safe interface has MSG_TRUNC")]
        let received = unsafe { libc::recv(stream.as_raw_fd(), std::ptr::null_mut(), length, libc::MSG_TRUNC) };
        some_or_none(usize::try_from(received).map_err(|_| io::Error::last_os_error()))
    }

    /// Sends as much of this as there is room for; 0 when there is none.
    pub fn send(&mut self, slices: &[IoSlice]) -> io::Result<usize> {
        let sent = match self {
            Self::Tcp(stream) => stream.write_vectored(slices),
            Self::Unix(stream) => stream.write_vectored(slices),
        };
        some_or_none(sent)
    }

    fn source(&mut self) -> &mut dyn Source {
        match self {
            Self::Tcp(stream) => stream,
            Self::Unix(stream) => stream,
        }
    }

    /// Has readiness told under this token.
    pub fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        self.source().register(registry, token, Interest::READABLE)
    }

    /// Has room for sending told too, or not any more.
    pub fn watch_room(&mut self, registry: &Registry, token: Token, watch: bool) -> io::Result<()> {
        let interest = if watch { Interest::READABLE | Interest::WRITABLE } else { Interest::READABLE };
        self.source().reregister(registry, token, interest)
    }
}

/// Nothing for a call that would block, an error for the end of the stream.
fn some_or_none(moved: io::Result<usize>) -> io::Result<usize> {
    match moved {
        Ok(0) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        moved => moved,
    }
}
