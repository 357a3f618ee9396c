//! A connected socket, TCP or UNIX, with what it is ready for: the only door to a peer. The rules of receiving and sending
//! under edge-triggered readiness are here, once.

use crate::event::ready::Ready;
use crate::sys;
use crate::sys::net::{Delivery, Keepalive};
use mio::event::Event;
use mio::net::{TcpStream, UnixStream};
use mio::{Interest, Registry, Token};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

/// The two kinds of stream.
#[derive(Debug)]
pub(super) enum Stream {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a UNIX socket.
    Unix(UnixStream),
}

/// What one receive gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// So many bytes, at least one.
    Bytes(usize),
    /// None now; an event will say when there are more.
    Nothing,
    /// The peer has closed its side.
    End,
}

/// A connected non-blocking socket.
#[derive(Debug)]
pub(super) struct Socket {
    stream: Stream,
    ready: Ready,
}

impl Socket {
    /// A socket that is ready for nothing until an event says so.
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, ready: Ready::default() }
    }

    /// Sets what every NBD socket has: no delay, and keepalive so that a vanished peer is noticed.
    pub(super) fn set_options(&self, keepalive: Keepalive) -> io::Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => sys::net::set_tcp_options(stream.as_fd(), keepalive),
            Stream::Unix(_) => Ok(()),
        }
    }

    /// Whoever closes it does so at once, and drops what was not sent. A UNIX socket keeps what is on its way.
    pub(super) fn reset_at_close(&self) {
        if let Stream::Tcp(stream) = &self.stream {
            // Else the peer hears of the end behind what is on its way, as ever.
            let _ = sys::net::reset_at_close(stream.as_fd());
        }
    }

    /// How the peer takes what is sent to it. `None` for a UNIX socket, whose peer cannot vanish.
    pub(super) fn delivery(&self) -> Option<Delivery> {
        match &self.stream {
            Stream::Tcp(stream) => sys::net::delivery(stream.as_fd()).ok(),
            Stream::Unix(_) => None,
        }
    }

    /// Registers once, for both directions: the loop is edge-triggered.
    pub(super) fn register(&mut self, registry: &Registry, token: Token) -> io::Result<()> {
        let both = Interest::READABLE | Interest::WRITABLE;
        match &mut self.stream {
            Stream::Tcp(stream) => registry.register(stream, token, both),
            Stream::Unix(stream) => registry.register(stream, token, both),
        }
    }

    /// Notes what an event says.
    pub(super) fn note(&mut self, event: &Event) {
        self.ready.note(event);
    }

    /// True when there may be something to receive.
    pub(super) fn readable(&self) -> bool {
        self.ready.readable()
    }

    /// True when there may be room to send.
    pub(super) fn writable(&self) -> bool {
        self.ready.writable()
    }

    /// True when the peer takes nothing any more.
    pub(super) fn hung_up(&self) -> bool {
        self.ready.hung_up()
    }

    /// True when the peer has closed its side: what is to be received was sent before that.
    pub(super) fn closed_by_peer(&self) -> bool {
        self.ready.read_closed()
    }

    /// Receives once. Fewer bytes than there was room for mean that the socket is empty.
    pub(super) fn receive(&mut self, spaces: &mut [IoSliceMut<'_>]) -> io::Result<Received> {
        let room: usize = spaces.iter().map(|space| space.len()).sum();
        let received = match &mut self.stream {
            Stream::Tcp(stream) => stream.read_vectored(spaces),
            Stream::Unix(stream) => stream.read_vectored(spaces),
        };
        match received {
            Ok(0) => {
                self.ready.note_end_of_stream();
                Ok(Received::End)
            }
            Ok(n) => {
                if n < room {
                    self.ready.clear_readable();
                }
                Ok(Received::Bytes(n))
            }
            Err(error) => self.ready.failed_read(error).map(|()| Received::Nothing),
        }
    }

    /// Sends once, as much as the socket takes; says how much that was. Less than there was means that the socket is full.
    pub(super) fn send(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        let sent = match &mut self.stream {
            Stream::Tcp(stream) => stream.write_vectored(slices),
            Stream::Unix(stream) => stream.write_vectored(slices),
        };
        match sent {
            Ok(n) => {
                if n < wanted {
                    self.ready.clear_writable();
                }
                Ok(n)
            }
            Err(error) => self.ready.failed_write(error).map(|()| 0),
        }
    }

    /// The near and the far end of a TCP connection.
    pub(super) fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        match &self.stream {
            Stream::Tcp(stream) => stream
                .local_addr()
                .ok()
                .zip(stream.peer_addr().ok())
                .map(|(near, far)| (canonical(near), canonical(far))),
            Stream::Unix(_) => None,
        }
    }

    /// Says whether a connection that was begun has been made, once the socket is writable.
    pub(super) fn check_connected(&self) -> io::Result<()> {
        let (error, peer) = match &self.stream {
            Stream::Tcp(stream) => (stream.take_error()?, stream.peer_addr().map(drop)),
            Stream::Unix(stream) => (stream.take_error()?, stream.peer_addr().map(drop)),
        };
        error.map_or(peer, Err)
    }
}

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// An address of the network.
    Net(SocketAddr),
    /// A process of this machine, over a UNIX socket.
    Local,
}

impl Peer {
    /// The address that an access control list judges, IPv4 unmapped; a local peer has none.
    pub(super) fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Net(address) => Some(address.ip().to_canonical()),
            Self::Local => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(address) => canonical(*address).fmt(f),
            Self::Local => f.write_str("local"),
        }
    }
}

/// A listener of both families sees IPv4 addresses in their IPv6 form; this is the usual one.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
