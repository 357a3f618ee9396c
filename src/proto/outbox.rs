//! What waits to be written to one connection: message heads and payloads in their order, and how much of the first
//! has gone already. One vectored write takes many replies.

use crate::buffer::{Buffer, Pool};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::rc::Rc;

/// The longest head of a message, in bytes: that of a chunk of data or of an error, or of a request.
pub const HEAD_MAX: usize = 32;

/// How many pieces one vectored write takes at most: a head and a payload for each request a client may have in flight.
pub const PIECES_MAX: usize = 64;

#[derive(Debug)]
enum Piece {
    Head { bytes: [u8; HEAD_MAX], start: usize, end: usize },
    Text { bytes: Vec<u8>, start: usize },
    Payload(Buffer),
    Shared { buffer: Rc<Buffer>, start: usize },
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Head { bytes, start, end } => bytes.get(*start..*end).unwrap_or_default(),
            Self::Text { bytes, start } => bytes.get(*start..).unwrap_or_default(),
            Self::Payload(buffer) => buffer.filled(),
            Self::Shared { buffer, start } => buffer.filled().get(*start..).unwrap_or_default(),
        }
    }

    fn consume(&mut self, n: usize) {
        match self {
            Self::Head { start, .. } | Self::Text { start, .. } | Self::Shared { start, .. } => *start += n,
            Self::Payload(buffer) => buffer.consume(n),
        }
    }
}

/// The queue of bytes for one connection. What waits ages from the `since_ms` that it is given.
#[derive(Debug, Default)]
pub struct Outbox {
    pieces: VecDeque<(u64, Piece)>,
    heads: usize,
}

impl Outbox {
    /// Queues bytes that are neither the head of a message nor a payload of the pool: of a handshake, or extents.
    pub fn push_text(&mut self, bytes: Vec<u8>, since_ms: u64) {
        self.pieces.push_back((since_ms, Piece::Text { bytes, start: 0 }));
    }

    /// Queues the head of a message, which is at most [`HEAD_MAX`] bytes long. A reply ages from when its request came.
    pub fn push_head(&mut self, head: &[u8], since_ms: u64) {
        let mut bytes = [0; HEAD_MAX];
        let len = head.len().min(HEAD_MAX);
        debug_assert_eq!(len, head.len(), "a head is at most HEAD_MAX bytes long");
        if let (Some(to), Some(from)) = (bytes.get_mut(..len), head.get(..len)) {
            to.copy_from_slice(from);
        }
        self.pieces.push_back((since_ms, Piece::Head { bytes, start: 0, end: len }));
        self.heads += 1;
    }

    /// Queues payload bytes behind what is queued already.
    pub fn push_payload(&mut self, payload: Buffer, since_ms: u64) {
        self.pieces.push_back((since_ms, Piece::Payload(payload)));
    }

    /// The same with bytes that others keep as well. They do not go to the pool: what has gone is let go of.
    pub fn push_shared(&mut self, buffer: Rc<Buffer>, since_ms: u64) {
        self.pieces.push_back((since_ms, Piece::Shared { buffer, start: 0 }));
    }

    /// True when nothing waits.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// How many heads wait.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Since when the oldest message ages that is not sent to its end.
    pub fn oldest_ms(&self) -> Option<u64> {
        self.pieces.iter().map(|(since_ms, _)| *since_ms).min()
    }

    /// The bytes to write next, for one vectored write; says how many slices it filled.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; PIECES_MAX]) -> usize {
        let waiting = self.pieces.iter().map(|(_, piece)| piece.bytes());
        slices.iter_mut().zip(waiting).map(|(slice, bytes)| *slice = IoSlice::new(bytes)).count()
    }

    /// Drops the first `n` bytes: the socket has taken them. Payloads that have gone go back to the pool; says how much
    /// memory that was.
    pub fn sent(&mut self, mut n: usize, pool: &mut Pool) -> usize {
        let mut freed = 0;
        while let Some((_, piece)) = self.pieces.front_mut() {
            let len = piece.bytes().len();
            if n < len {
                piece.consume(n);
                break;
            }
            n -= len;
            match self.pieces.pop_front() {
                Some((_, Piece::Payload(buffer))) => {
                    freed += buffer.capacity();
                    pool.give(buffer);
                }
                Some((_, Piece::Head { .. })) => self.heads -= 1,
                Some((_, Piece::Text { .. } | Piece::Shared { .. })) | None => {}
            }
        }
        freed
    }

    /// Forgets everything: the connection is gone.
    pub fn release(&mut self, pool: &mut Pool) {
        for (_, piece) in self.pieces.drain(..) {
            if let Piece::Payload(buffer) = piece {
                pool.give(buffer);
            }
        }
        self.heads = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::SLICE;

    fn written(outbox: &Outbox) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let n = outbox.slices(&mut slices);
        slices[..n].iter().flat_map(|slice| slice.to_vec()).collect()
    }

    #[test]
    fn a_write_may_stop_at_every_byte() {
        let all: &[u8] = b"greeting-head1payload-head2";
        for step in 1..=all.len() {
            let mut pool = Pool::new(SLICE);
            let mut outbox = Outbox::default();
            outbox.push_text(b"greeting".to_vec(), 5);
            outbox.push_head(b"-head1", 3);
            let mut payload = pool.take(7).unwrap();
            payload.append(b"payload");
            outbox.push_payload(payload, 3);
            outbox.push_head(b"-head2", 9);
            assert_eq!((outbox.heads(), outbox.oldest_ms()), (2, Some(3)));
            let (mut seen, mut freed) = (Vec::new(), 0);
            while !outbox.is_empty() {
                let bytes = written(&outbox);
                let n = step.min(bytes.len());
                seen.extend_from_slice(&bytes[..n]);
                freed += outbox.sent(n, &mut pool);
            }
            assert_eq!(seen, all);
            assert_eq!((freed, outbox.heads(), pool.available()), (4096, 0, SLICE));
        }
    }

    #[test]
    fn shared_bytes_are_let_go_of_when_they_have_gone() {
        let shared = |text: &[u8]| {
            let mut buffer = Buffer::with_capacity(text.len());
            buffer.append(text);
            Rc::new(buffer)
        };
        let (load, pay) = (shared(b"load"), shared(b"pay"));
        for step in 1..=8 {
            let (mut outbox, mut pool) = (Outbox::default(), Pool::new(0));
            outbox.push_head(b"head", 0);
            outbox.push_shared(load.clone(), 0);
            outbox.push_shared(pay.clone(), 0);
            let mut seen = Vec::new();
            while !outbox.is_empty() {
                let keepers = (1 + usize::from(seen.len() < 8), 1 + usize::from(seen.len() < 11));
                assert_eq!((Rc::strong_count(&load), Rc::strong_count(&pay)), keepers);
                let next = written(&outbox);
                let n = step.min(next.len());
                seen.extend_from_slice(&next[..n]);
                assert_eq!(outbox.sent(n, &mut pool), 0);
            }
            assert_eq!((seen.as_slice(), Rc::strong_count(&pay)), (b"headloadpay".as_slice(), 1));
            outbox.push_shared(pay.clone(), 0);
            outbox.release(&mut pool);
            assert_eq!((outbox.is_empty(), Rc::strong_count(&pay)), (true, 1));
        }
    }

    #[test]
    fn a_dropped_outbox_returns_its_memory() {
        let mut pool = Pool::new(SLICE);
        let mut outbox = Outbox::default();
        outbox.push_head(b"head", 0);
        outbox.push_payload(pool.take(SLICE).unwrap(), 0);
        assert_eq!(pool.available(), 0);
        outbox.release(&mut pool);
        assert_eq!((pool.available(), outbox.is_empty(), outbox.heads()), (SLICE, true, 0));
    }
}
