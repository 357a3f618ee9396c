//! What an edge-triggered poll has reported, and which slots have work left.
//!
//! Poll reports each change once. [`Ready`] keeps the report until an operation has met its end, and [`RunQueue`]
//! keeps the slots that could go on although no event will say so.

use mio::event::Event;
use std::io::{self, ErrorKind};

use super::slots::Key;

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

/// The slots that have work, in the order in which they came.
///
/// Invariant 2: `queued[i]` is the key pushed last of those in `queue` whose index is `i`, and `None` when there is
/// none. So a live key is in the queue at most once; one of an older generation does not keep its successor out.
#[derive(Debug, Default)]
pub struct RunQueue {
    queue: Vec<Key>,
    queued: Vec<Option<Key>>,
}

impl RunQueue {
    /// Puts `key` at the end, unless it is queued already. The keys are those of one [`super::slots::Slots`], so that
    /// their indices are small.
    pub fn push(&mut self, key: Key) {
        if self.queued.len() <= key.index() {
            self.queued.resize(key.index() + 1, None);
        }
        if let Some(queued) = self.queued.get_mut(key.index()) {
            if *queued != Some(key) {
                *queued = Some(key);
                self.queue.push(key);
            }
        }
    }

    /// Moves all keys into `batch`, in order, in place of what it held. What is pushed from now on belongs to the next
    /// batch. The two exchange their memory, so that a caller who keeps `batch` allocates nothing.
    pub fn take_batch(&mut self, batch: &mut Vec<Key>) {
        batch.clear();
        std::mem::swap(&mut self.queue, batch);
        for key in batch {
            if let Some(queued) = self.queued.get_mut(key.index()) {
                *queued = None;
            }
        }
    }

    /// Queues everything that another queue holds, which is empty then.
    pub fn append(&mut self, other: &mut Self) {
        for key in other.queue.drain(..) {
            if let Some(queued) = other.queued.get_mut(key.index()) {
                *queued = None;
            }
            self.push(key);
        }
    }

    /// True when no slot has work.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

impl Extend<Key> for RunQueue {
    fn extend<T: IntoIterator<Item = Key>>(&mut self, keys: T) {
        keys.into_iter().for_each(|key| self.push(key));
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Shutdown;
    use std::time::Duration;

    use mio::net::UnixStream;
    use mio::{Events, Interest, Poll, Token};

    use super::super::slots::Slots;
    use super::*;

    fn insert(slots: &mut Slots<()>) -> Key {
        slots.try_insert_with(|_| Ok::<_, ()>(())).unwrap()
    }

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

    fn push_all(run: &mut RunQueue, keys: &[Key]) {
        for &key in keys {
            run.push(key);
        }
    }

    #[test]
    fn each_key_runs_once_a_batch_in_order() {
        let mut slots = Slots::default();
        let [a, b, c] = [(); 3].map(|()| insert(&mut slots));
        let mut run = RunQueue::default();
        let mut batch = Vec::new();
        push_all(&mut run, &[c, a, c, a]);
        run.take_batch(&mut batch);
        assert_eq!(batch, [c, a]);
        assert!(run.is_empty());
        push_all(&mut run, &[b, c]);
        assert!(!run.is_empty());
        run.take_batch(&mut batch);
        assert_eq!(batch, [b, c]);
        run.take_batch(&mut batch);
        assert_eq!(batch, []);
    }

    #[test]
    fn a_stale_key_does_not_keep_its_successor_out() {
        let mut slots = Slots::default();
        let old = insert(&mut slots);
        let mut run = RunQueue::default();
        run.push(old);
        slots.remove(old);
        let new = insert(&mut slots);
        push_all(&mut run, &[new, new]);
        let mut batch = Vec::new();
        run.take_batch(&mut batch);
        assert_eq!(batch, [old, new]);
        run.push(new);
        assert!(!run.is_empty());
    }

    #[test]
    fn batches_reuse_their_memory() {
        let mut slots = Slots::default();
        let keys: Vec<Key> = (0..100).map(|_| insert(&mut slots)).collect();
        let (mut run, mut batch) = (RunQueue::default(), Vec::new());
        for _ in 0..2 {
            push_all(&mut run, &keys);
            run.take_batch(&mut batch);
        }
        let capacities = [run.queue.capacity(), batch.capacity()];
        for _ in 0..10 {
            push_all(&mut run, &keys);
            run.take_batch(&mut batch);
        }
        assert_eq!([run.queue.capacity(), batch.capacity()], capacities);
    }
}
