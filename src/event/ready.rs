//! What an edge-triggered poll has reported about one socket.
//!
//! Poll reports each change once; [`Ready`] remembers it until an operation finds that it no longer holds.

use mio::event::Event;
use std::io::{self, ErrorKind};

/// What one socket is known to be ready for.
///
/// Invariant 1: an event will set a bit that is clear. No event follows once the peer has closed its side, so from then on
/// `readable` stays set until the end of stream was read.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "a poll reports each on its own")]
pub struct Ready {
    readable: bool,
    writable: bool,
    read_closed: bool,
    hung_up: bool,
}

impl Ready {
    /// Adds what `event` reports. An error counts as ready for both: the next operation meets it and says which.
    ///
    /// Register a socket only once it has started to connect: before that it looks closed.
    pub fn note(&mut self, event: &Event) {
        self.read_closed |= event.is_read_closed();
        self.hung_up |= event.is_write_closed();
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
    }

    /// True when the peer is gone and takes nothing any more.
    pub fn hung_up(self) -> bool {
        self.hung_up
    }

    /// True when the peer has closed its side, and what it sent before is not all read.
    pub fn read_closed(self) -> bool {
        self.read_closed
    }

    /// True when reading may succeed.
    pub fn readable(self) -> bool {
        self.readable
    }

    /// True when writing may succeed.
    pub fn writable(self) -> bool {
        self.writable
    }

    /// Notes that a stream gave less than was asked for: the next read would block, unless the peer has closed
    /// (invariant 1).
    pub fn clear_readable(&mut self) {
        self.readable = self.read_closed;
    }

    /// Notes that a stream took less than was offered: the next write would block.
    pub fn clear_writable(&mut self) {
        self.writable = false;
    }

    /// Notes that the end of stream was read: nothing more will come.
    pub fn note_end_of_stream(&mut self) {
        (self.readable, self.read_closed) = (false, false);
    }

    /// Takes the error of a read. «Later» and «again» are dealt with; anything else is returned.
    pub fn failed_read(&mut self, error: io::Error) -> io::Result<()> {
        match error.kind() {
            ErrorKind::WouldBlock => (self.readable, self.read_closed) = (false, false),
            ErrorKind::Interrupted => {}
            _ => return Err(error),
        }
        Ok(())
    }

    /// Takes the error of a write. «Later» and «again» are dealt with; anything else is returned.
    pub fn failed_write(&mut self, error: io::Error) -> io::Result<()> {
        match error.kind() {
            ErrorKind::WouldBlock => self.writable = false,
            ErrorKind::Interrupted => {}
            _ => return Err(error),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::time::Duration;

    use mio::net::UnixStream;
    use mio::{Events, Interest, Poll, Token};

    use super::*;

    struct Pair {
        poll: Poll,
        ours: UnixStream,
        theirs: UnixStream,
        ready: Ready,
    }

    impl Pair {
        fn new() -> Self {
            let poll = Poll::new().unwrap();
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            poll.registry().register(&mut ours, Token(0), Interest::READABLE | Interest::WRITABLE).unwrap();
            Self { poll, ours, theirs, ready: Ready::default() }
        }

        fn poll(&mut self) -> Ready {
            let mut events = Events::with_capacity(4);
            self.poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
            events.iter().for_each(|event| self.ready.note(event));
            self.ready
        }
    }

    #[test]
    fn bits_last_until_they_are_cleared() {
        let mut pair = Pair::new();
        assert_eq!(pair.poll(), Ready { writable: true, ..Ready::default() });
        pair.ready.clear_writable();
        assert_eq!(pair.poll(), Ready::default());
        pair.theirs.write_all(b"x").unwrap();
        assert!(pair.poll().readable());
        assert!(pair.poll().readable());
        pair.ready.clear_readable();
        assert!(!pair.poll().readable());
        assert!(!pair.ready.read_closed);
    }

    #[test]
    fn the_end_of_stream_stays_readable() {
        let mut pair = Pair::new();
        pair.theirs.write_all(b"x").unwrap();
        pair.theirs.shutdown(Shutdown::Write).unwrap();
        let ready = pair.poll();
        assert!(ready.readable() && ready.read_closed);
        assert_eq!(pair.ours.read(&mut [0; 8]).unwrap(), 1);
        pair.ready.clear_readable();
        assert!(pair.poll().readable());
        assert_eq!(pair.ours.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn a_peer_that_is_gone_makes_both_ready() {
        let mut pair = Pair::new();
        pair.poll();
        pair.ready.clear_writable();
        pair.theirs = UnixStream::pair().unwrap().0;
        let ready = pair.poll();
        assert!(ready.readable() && ready.writable() && ready.read_closed);
    }
}
