//! What an edge-triggered poll has reported about one socket.
//!
//! Poll reports each change once; [`Ready`] keeps the report until an operation has met its end.

use mio::event::Event;
use std::io::{self, ErrorKind};

/// What one socket is known to be ready for.
///
/// Invariant 1: a bit that is clear is set again by an event. So `readable` stays set once the peer has closed its
/// side, because nothing happens to the socket after that: the end of stream must be read without being announced.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // bits that a poll reports, independent of each other
pub struct Ready {
    readable: bool,
    writable: bool,
    read_closed: bool,
    hung_up: bool,
}

impl Ready {
    /// Adds what `event` reports. An error counts as ready for both: the next operation meets it and says which.
    ///
    /// A socket that connects is registered only once the connection is under way; before that it looks closed.
    pub fn note(&mut self, event: &Event) {
        self.read_closed |= event.is_read_closed();
        self.hung_up |= event.is_write_closed();
        self.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
        self.writable |= event.is_writable() || event.is_write_closed() || event.is_error();
    }

    /// True when the peer is gone: it takes nothing any more.
    pub fn hung_up(self) -> bool {
        self.hung_up
    }

    /// True when reading may succeed.
    pub fn readable(self) -> bool {
        self.readable
    }

    /// True when writing may succeed.
    pub fn writable(self) -> bool {
        self.writable
    }

    /// Notes that a read would block, or that a stream gave less than was asked for, which means the same unless the
    /// peer has closed (invariant 1).
    pub fn clear_readable(&mut self) {
        self.readable = self.read_closed;
    }

    /// Notes that a write would block, or that a stream took less than was offered, which means the same.
    pub fn clear_writable(&mut self) {
        self.writable = false;
    }

    /// The end of the stream has been read: nothing more will come.
    pub fn note_end_of_stream(&mut self) {
        (self.readable, self.read_closed) = (false, false);
    }

    /// Takes an error of a read that was tried. What only means «later» is noted; anything else is given back.
    pub fn failed_read(&mut self, error: io::Error) -> io::Result<()> {
        match error.kind() {
            ErrorKind::WouldBlock => (self.readable, self.read_closed) = (false, false),
            ErrorKind::Interrupted => {}
            _ => return Err(error),
        }
        Ok(())
    }

    /// Takes an error of a write that was tried. What only means «later» is noted; anything else is given back.
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
