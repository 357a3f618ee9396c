//! Requests that may not pass now: which they are, and that only they do not age meanwhile. And when a peer wrote last.

use crate::plan::head;
use flexnbd::buffer::{Pool, SLICE};
use flexnbd::proto::error::Errno;
use flexnbd::proto::export::Export;
use flexnbd::proto::outbox::PIECES_MAX;
use flexnbd::proto::server::request::Request;
use flexnbd::proto::server::{Allowed, Load, ServerSession, Step, Took, IN_FLIGHT_MAX};
use flexnbd::proto::wire::{kind, RequestHead, REQUEST_LEN};
use flexnbd::work::{Action, Done};
use std::io::IoSlice;

const SIZE: u64 = 1 << 20;

/// A session whose greeting has gone, and the memory it takes.
struct Kept {
    session: ServerSession,
    pool: Pool,
}

impl Kept {
    fn new() -> Self {
        let mut kept = Self {
            session: ServerSession::oldstyle(Export { size: SIZE, read_only: false, flushes: true, several: true }, 0),
            // Too little for a buffer that is larger than a slice.
            pool: Pool::new(4 * SLICE),
        };
        kept.send_all();
        kept
    }

    fn receive(&mut self, mut bytes: &[u8], now_ms: u64) {
        while !bytes.is_empty() {
            let mut n = 0;
            for space in self.session.recv_space(&mut self.pool) {
                n += std::io::Read::read(&mut bytes, space).unwrap();
            }
            self.session.received(n, now_ms);
        }
    }

    fn step(&mut self, allowed: Allowed) -> Step {
        self.session.next_step(allowed, &mut self.pool)
    }

    /// The request that must come next.
    fn request(&mut self, allowed: Allowed, kind: u16) -> Request {
        match self.step(allowed) {
            Step::Request(request) if request.head.kind == kind => request,
            other => panic!("{other:?}"),
        }
    }

    fn complete(&mut self, request: Request) {
        let Request { tag, action, .. } = request;
        let touched = action.touches();
        let buffer = match action {
            Action::Read { length, mut buffer, .. } => {
                buffer.advance(length);
                Some(buffer)
            }
            Action::Write { payload, .. } => Some(payload),
            _ => None,
        };
        let done = Done { owner: 0, tag, buffer, touched, extents: Vec::new(), result: Ok(()) };
        assert!(self.session.complete(done, &mut self.pool).is_some_and(|completed| completed.result.is_ok()));
    }

    fn send_all(&mut self) {
        while self.session.wants_send() {
            let mut slices = [IoSlice::new(&[]); PIECES_MAX];
            let pieces = self.session.to_send(&mut slices);
            let n = slices[..pieces].iter().map(|slice| slice.len()).sum();
            self.session.sent(n, &mut self.pool);
        }
    }
}

/// Requests with their payloads, one after the other.
fn stream(heads: &[RequestHead]) -> Vec<u8> {
    let payload = |head: &RequestHead| if head.kind == kind::WRITE { head.length as usize } else { 0 };
    heads.iter().flat_map(|head| [head.encode().to_vec(), vec![7; payload(head)]].concat()).collect()
}

#[test]
fn only_what_changes_the_export_is_kept() {
    for changes in [kind::WRITE, kind::WRITE_ZEROES, kind::TRIM] {
        let mut kept = Kept::new();
        let refused = RequestHead { offset: SIZE, ..head(changes, 0, 0, 9) };
        let asks = [head(kind::READ, 0, 0, 9), refused, head(kind::FLUSH, 0, 0, 0), head(changes, 0, 0, 9)];
        kept.receive(&stream(&[&asks[..], &[head(kind::READ, 0, 0, 9)]].concat()), 1);
        let read = kept.request(Allowed::Reads, kind::READ);
        let Step::Refused(refusal) = kept.step(Allowed::Reads) else { panic!("it is refused whatever may pass") };
        assert!(matches!(refusal.errno, Errno::NoSpc | Errno::Inval));
        let flush = kept.request(Allowed::Reads, kind::FLUSH);
        assert!(matches!(kept.step(Allowed::Reads), Step::Kept));
        kept.complete(read);
        kept.complete(flush);
        kept.send_all();
        assert!(matches!(kept.step(Allowed::Reads), Step::Kept), "room makes no difference");
        let change = kept.request(Allowed::Everything, changes);
        let behind = kept.request(Allowed::Reads, kind::READ);
        assert!(matches!(kept.step(Allowed::Reads), Step::NeedBytes));
        kept.complete(change);
        kept.complete(behind);
    }
}

#[test]
fn what_has_no_room_is_not_kept() {
    let mut kept = Kept::new();
    let mut asks = vec![head(kind::READ, 0, 0, 9); IN_FLIGHT_MAX];
    asks.push(head(kind::WRITE, 0, 0, 9));
    kept.receive(&stream(&asks), 1);
    let reads: Vec<_> = (0..IN_FLIGHT_MAX).map(|_| kept.request(Allowed::Reads, kind::READ)).collect();
    assert!(matches!(kept.step(Allowed::Reads), Step::NeedRoom));
    for read in reads {
        kept.complete(read);
    }
    kept.send_all();
    assert!(matches!(kept.step(Allowed::Reads), Step::Kept));
}

#[test]
fn a_payload_that_is_being_received_is_kept_too() {
    let mut kept = Kept::new();
    let write = stream(&[head(kind::WRITE, 0, 0, 2 * SLICE as u32)]);
    let (first, rest) = write.split_at(28 + SLICE);
    assert!(matches!(kept.step(Allowed::Everything), Step::NeedBytes));
    kept.receive(&first[..28], 1);
    assert!(matches!(kept.step(Allowed::Everything), Step::NeedBytes));
    kept.receive(&first[28..], 1);
    assert!(matches!(kept.step(Allowed::Reads), Step::Kept));
    let slice = kept.request(Allowed::Everything, kind::WRITE);
    assert!(matches!(kept.step(Allowed::Reads), Step::Kept));
    assert!(matches!(kept.step(Allowed::Everything), Step::NeedBytes));
    kept.receive(rest, 2);
    let last = kept.request(Allowed::Everything, kind::WRITE);
    kept.complete(last);
    kept.complete(slice);
    assert_eq!(kept.session.tally().writes, 1);
}

#[test]
fn a_payload_that_does_not_come_is_not_kept() {
    let mut kept = Kept::new();
    let write = stream(&[head(kind::WRITE, 0, 0, 2 * SLICE as u32)]);
    let (first, rest) = write.split_at(28 + SLICE / 2);
    kept.receive(&first[..28], 1);
    assert!(matches!(kept.step(Allowed::Everything), Step::NeedBytes));
    kept.receive(&first[28..], 1);
    assert!(matches!(kept.step(Allowed::Reads), Step::NeedBytes), "it waits for its client, not for permission");
    kept.receive(&rest[..SLICE / 2], 1);
    for _ in 0..2 {
        assert!(matches!(kept.step(Allowed::Reads), Step::Kept));
    }
    let slice = kept.request(Allowed::Everything, kind::WRITE);
    assert!(matches!(kept.step(Allowed::Reads), Step::Kept), "no memory is taken for what may not pass");
    assert!(matches!(kept.step(Allowed::Everything), Step::NeedBytes));
    kept.receive(&rest[SLICE / 2..], 2);
    assert!(matches!(kept.step(Allowed::Reads), Step::Kept));
    let last = kept.request(Allowed::Everything, kind::WRITE);
    kept.complete(slice);
    kept.complete(last);
    assert_eq!(kept.session.tally().written_bytes, 2 * SLICE as u64);
}

#[test]
fn what_was_kept_ages_later_and_nothing_else_does() {
    let mut kept = Kept::new();
    kept.receive(&stream(&[head(kind::READ, 0, 0, 9)]), 10);
    let read = kept.request(Allowed::Everything, kind::READ);
    kept.receive(&stream(&[head(kind::WRITE, 0, 0, 9), head(kind::TRIM, 0, 0, 9)]), 20);
    assert!(matches!(kept.step(Allowed::Reads), Step::Kept));
    kept.session.excuse(100);
    assert_eq!(kept.session.oldest_ms(), Some(10), "the READ waits for the disk, not for anybody's permission");
    kept.complete(read);
    assert_eq!(kept.session.oldest_ms(), Some(10), "and its reply for the client");
    kept.send_all();
    assert_eq!(kept.session.oldest_ms(), Some(120));
    let write = kept.request(Allowed::Everything, kind::WRITE);
    kept.complete(write);
    kept.send_all();
    assert_eq!(kept.session.oldest_ms(), Some(120), "what stood behind it could not overtake it");
    let trim = kept.request(Allowed::Everything, kind::TRIM);
    kept.receive(&stream(&[head(kind::FLUSH, 0, 0, 0)]), 130);
    kept.complete(trim);
    kept.send_all();
    assert_eq!(kept.session.oldest_ms(), Some(130), "what comes later is as old as it is");
}

#[test]
fn a_write_whose_payload_was_kept_ages_later() {
    let mut kept = Kept::new();
    kept.receive(&stream(&[head(kind::READ, 0, 0, 9)]), 5);
    let read = kept.request(Allowed::Everything, kind::READ);
    let write = stream(&[head(kind::WRITE, 0, 0, 100)]);
    kept.receive(&write[..28], 10);
    assert!(matches!(kept.step(Allowed::Everything), Step::NeedBytes));
    kept.receive(&write[28..], 20);
    assert!(matches!(kept.step(Allowed::Reads), Step::Kept));
    kept.session.excuse(1000);
    assert_eq!(kept.session.oldest_ms(), Some(5), "the READ");
    kept.complete(read);
    kept.send_all();
    assert_eq!(kept.session.oldest_ms(), Some(1010), "the WRITE");
    let last = kept.request(Allowed::Everything, kind::WRITE);
    assert_eq!(kept.session.oldest_ms(), Some(1010));
    kept.complete(last);
    kept.send_all();
    assert_eq!(kept.session.oldest_ms(), None);
}

/// What a quota counts is known before a request is taken, and is that of all requests that were.
#[test]
fn a_load_is_that_of_what_was_taken() {
    let mut kept = Kept::new();
    let load = |requests, bytes| Load { requests, bytes };
    let stream = stream(&[
        RequestHead { offset: SIZE, ..head(kind::READ, 0, 0, 9) },
        head(kind::READ, 0, 0, 100),
        head(kind::TRIM, 0, 0, 4096),
        head(kind::READ, 0, 0, 0),
        head(kind::WRITE, 0, 0, 3 * SLICE as u32),
    ]);
    kept.receive(&stream[..27], 0);
    assert_eq!(kept.session.upcoming(), None, "it is not all there");
    kept.receive(&stream[27..28], 0);
    assert_eq!(kept.session.upcoming(), None, "it will be refused");
    assert!(matches!(kept.step(Allowed::Everything), Step::Refused(_)));
    assert_eq!(kept.session.take_load(), load(0, 0));
    // The payload of the WRITE stays away.
    kept.receive(&stream[28..5 * 28], 0);
    assert_eq!(kept.session.upcoming(), Some(load(1, 100)));
    kept.request(Allowed::Everything, kind::READ);
    assert_eq!((kept.session.take_load(), kept.session.upcoming()), (load(1, 100), Some(load(1, 0))));
    assert!(matches!(kept.step(Allowed::Reads), Step::Kept));
    assert_eq!(kept.session.take_load(), load(0, 0));
    kept.request(Allowed::Everything, kind::TRIM);
    // A READ of nothing is answered on the way to the next request.
    assert!(matches!(kept.step(Allowed::Everything), Step::NeedBytes));
    assert_eq!(kept.session.take_load(), load(3, 3 * SLICE as u64));
    assert_eq!(kept.session.upcoming(), None, "a payload goes on");
}

#[test]
fn a_request_takes_from_its_receipt_until_its_answer() {
    let mut kept = Kept::new();
    kept.session.note_time(1_000);
    kept.receive(&stream(&[head(kind::FLUSH, 0, 0, 0), head(kind::READ, 0, 0, 0)]), 1);
    kept.session.note_time(1_500);
    let flush = kept.request(Allowed::Everything, kind::FLUSH);
    assert!(matches!(kept.step(Allowed::Everything), Step::NeedBytes));
    kept.session.note_time(4_000);
    let done = Done { owner: 0, tag: flush.tag, buffer: None, touched: None, extents: Vec::new(), result: Ok(()) };
    let completed = kept.session.complete(done, &mut kept.pool).unwrap();
    assert_eq!(completed.took, Some(Took { all_us: 3_000, disk_us: 2_500 }));

    // A WRITE of two pieces takes until the second is done.
    let write = stream(&[head(kind::WRITE, 0, 0, SLICE as u32 + 1)]);
    let mut pieces = Vec::new();
    for part in [&write[..28], &write[28..28 + SLICE], &write[28 + SLICE..]] {
        kept.receive(part, 4);
        match kept.step(Allowed::Everything) {
            Step::Request(piece) => pieces.push(piece),
            step => assert!(matches!(step, Step::NeedBytes), "{step:?}"),
        }
    }
    let took = pieces.into_iter().map(|piece| {
        let Action::Write { payload, .. } = piece.action else { panic!("{piece:?}") };
        let (tag, buffer) = (piece.tag, Some(payload));
        let done = Done { owner: 0, tag, buffer, touched: None, extents: Vec::new(), result: Ok(()) };
        kept.session.note_time(5_000);
        kept.session.complete(done, &mut kept.pool).unwrap().took
    });
    assert!(took.eq([None, Some(Took { all_us: 1_000, disk_us: 1_000 })]));
}

/// A sender keeps its place by writing: what is refused, or says nothing of any byte, is no write.
#[test]
fn only_what_is_written_counts_as_such() {
    let mut kept = Kept::new();
    let beyond = head(kind::WRITE, 0, SIZE - 9, 10);
    let no_write = [
        head(kind::READ, 0, 0, 9),
        head(kind::FLUSH, 0, 0, 0),
        head(kind::TRIM, 0, 0, 9),
        head(kind::WRITE, 0, 0, 0),
        head(kind::WRITE_ZEROES, 0, 0, 0),
        head(kind::WRITE_ZEROES, 0, SIZE, 1),
        beyond,
    ];
    kept.receive(&stream(&no_write)[..no_write.len() * REQUEST_LEN], 10);
    let mut refused = 0;
    loop {
        match kept.step(Allowed::Everything) {
            Step::Request(request) => kept.complete(request),
            Step::Refused(_) => refused += 1,
            step => break assert!(matches!(step, Step::NeedBytes), "{step:?}"),
        }
    }
    // The payload of the last one is swallowed.
    kept.receive(&[1; 9], 20);
    assert!(matches!(kept.step(Allowed::Everything), Step::NeedBytes));
    assert_eq!((refused, kept.session.wrote_ms()), (2, None));
    kept.receive(&[1], 30);

    kept.receive(&head(kind::WRITE, 0, 0, 3).encode(), 40);
    assert!(matches!(kept.step(Allowed::Everything), Step::NeedBytes));
    assert_eq!(kept.session.wrote_ms(), Some(40));
    kept.receive(&[1], 50);
    assert_eq!(kept.session.wrote_ms(), Some(50));
    kept.receive(&[1, 1], 60);
    let write = kept.request(Allowed::Everything, kind::WRITE);
    kept.receive(&stream(&no_write[..1]), 70);
    assert_eq!(kept.session.wrote_ms(), Some(60));
    kept.complete(write);
    kept.request(Allowed::Everything, kind::READ);
    kept.receive(&head(kind::WRITE_ZEROES, 0, 0, 1).encode(), 80);
    kept.request(Allowed::Everything, kind::WRITE_ZEROES);
    assert_eq!(kept.session.wrote_ms(), Some(80));
}
