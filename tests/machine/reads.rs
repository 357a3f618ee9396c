//! READs of several slices: what is in work together, the order on the wire, and what a failure means.

use crate::newstyle::Talk;
use crate::plan::head;
use flexnbd::buffer::{Pool, SLICE};
use flexnbd::proto::error::Violation;
use flexnbd::proto::export::Export;
use flexnbd::proto::outbox::PIECES_MAX;
use flexnbd::proto::server::request::Request;
use flexnbd::proto::server::{Allowed, ServerSession, Step, BUFFERED_MAX};
use flexnbd::proto::wire::kind;
use flexnbd::work::{Action, Done};
use std::io::{ErrorKind, IoSlice, Read};
use std::sync::LazyLock;

const SIZE: usize = 40 * SLICE;
const ROOMY: usize = 16 << 20;
/// As long as kernels make READs.
const LONG: usize = 16 * SLICE;

/// What the disk holds.
static DISK: LazyLock<Vec<u8>> = LazyLock::new(|| (0..SIZE).map(|at| (at ^ (at >> 9)) as u8).collect());

fn content(offset: usize, length: usize) -> &'static [u8] {
    &DISK[offset..offset + length]
}

/// A session, and all that it has sent behind its greeting.
struct Reader {
    session: ServerSession,
    pool: Pool,
    cap: usize,
    wire: Vec<u8>,
}

impl Reader {
    fn simple(cap: usize) -> Self {
        Self::new(
            ServerSession::oldstyle(Export { size: SIZE as u64, read_only: false, flushes: true, several: true }, 0),
            cap,
            &[],
        )
    }

    fn structured(cap: usize) -> Self {
        Self::new(
            ServerSession::newstyle(Export { size: SIZE as u64, read_only: false, flushes: true, several: true }, 0),
            cap,
            &Talk::new(512).stream,
        )
    }

    fn new(session: ServerSession, cap: usize, haggling: &[u8]) -> Self {
        let mut reader = Self { session, pool: Pool::new(cap), cap, wire: Vec::new() };
        reader.receive(haggling);
        reader.send(usize::MAX);
        reader.wire.clear();
        reader
    }

    fn receive(&mut self, mut bytes: &[u8]) {
        assert!(matches!(self.step(), Step::NeedBytes));
        while !bytes.is_empty() {
            let mut n = 0;
            for space in self.session.recv_space(&mut self.pool) {
                n += bytes.read(space).unwrap();
            }
            self.session.received(n, 0);
            while bytes.is_empty() && self.session.is_negotiating() {
                // It also asks for an export that is not there.
                assert!(matches!(self.step(), Step::NeedBytes | Step::UnknownExport(_)));
            }
        }
    }

    fn ask(&mut self, offset: usize, length: usize) {
        let head = head(kind::READ, 0, offset as u64, length as u32).encode();
        let space = self.session.recv_space(&mut self.pool).into_iter().next_back().unwrap();
        space[..head.len()].copy_from_slice(&head);
        self.session.received(head.len(), 0);
    }

    fn step(&mut self) -> Step {
        let step = self.session.next_step(Allowed::Everything, &mut self.pool);
        let inbox = 64 << 10;
        assert!(self.cap < ROOMY || self.cap - self.pool.available() <= BUFFERED_MAX + inbox, "it owns too much");
        step
    }

    /// All that is handed out until there is no room for more.
    fn work(&mut self) -> Vec<Request> {
        let mut work = Vec::new();
        loop {
            match self.step() {
                Step::Request(request) => work.push(request),
                Step::NeedRoom | Step::NeedBytes => return work,
                other => panic!("{other:?}"),
            }
        }
    }

    fn complete(&mut self, request: Request, result: Result<(), ErrorKind>) -> Result<(), Violation> {
        let buffer = match request.action {
            Action::Read { offset, length, mut buffer, .. } => {
                if result.is_ok() {
                    assert_eq!(buffer.append(content(offset as usize, length)), length);
                }
                Some(buffer)
            }
            Action::Verify { .. } => None,
            other => panic!("{other:?}"),
        };
        let result = result.map_err(Into::into);
        let done = Done { owner: 0, tag: request.tag, buffer, touched: None, extents: Vec::new(), result };
        let completed = self.session.complete(done, &mut self.pool).unwrap();
        completed.result.err().and_then(|failed| failed.violation).map_or(Ok(()), Err)
    }

    fn complete_all(&mut self, work: Vec<Request>) {
        for request in work {
            self.complete(request, Ok(())).unwrap();
        }
    }

    fn send(&mut self, most: usize) {
        let mut left = most;
        while self.session.wants_send() && left > 0 {
            let mut slices = [IoSlice::new(&[]); PIECES_MAX];
            let pieces = self.session.to_send(&mut slices);
            let mut sent = 0;
            for slice in &slices[..pieces] {
                let n = slice.len().min(left - sent);
                self.wire.extend(&slice[..n]);
                sent += n;
            }
            self.session.sent(sent, &mut self.pool);
            left -= sent;
        }
    }

    /// Goes on until nothing is owed.
    fn finish(&mut self) {
        loop {
            let work = self.work();
            if work.is_empty() && !self.session.wants_send() {
                break;
            }
            self.complete_all(work);
            self.send(usize::MAX);
        }
        assert_eq!(self.session.in_flight(), 0);
        self.session.park(&mut self.pool);
        assert_eq!(self.pool.available(), self.cap, "all memory comes back");
    }
}

/// A good simple reply.
fn good(offset: usize, length: usize) -> Vec<u8> {
    [&reply(0)[..], content(offset, length)].concat()
}

/// The head of a simple reply.
fn reply(error: u32) -> Vec<u8> {
    [0x6744_6698_u32.to_be_bytes(), error.to_be_bytes(), [0; 4], [0; 4]].concat()
}

/// What chunks of data bring, in the order in which they come.
fn data_of(mut wire: &[u8]) -> Vec<(usize, Vec<u8>)> {
    let mut found = Vec::new();
    while !wire.is_empty() {
        let (chunk, rest) = wire.split_at(20);
        assert_eq!((&chunk[..4], &chunk[6..8]), (&0x668e_33ef_u32.to_be_bytes()[..], &[0, 1][..]), "a chunk of data");
        let length = u32::from_be_bytes(chunk[16..].try_into().unwrap()) as usize;
        let (payload, rest) = rest.split_at(length);
        assert_eq!(chunk[5] == 1, rest.is_empty(), "the last one says so");
        let offset = u64::from_be_bytes(payload[..8].try_into().unwrap()) as usize;
        found.push((offset, payload[8..].to_vec()));
        wire = rest;
    }
    found
}

/// Every order of `n` things.
fn orders(n: usize) -> Vec<Vec<usize>> {
    let Some(last) = n.checked_sub(1) else { return vec![Vec::new()] };
    let shorter = orders(last);
    (0..n).flat_map(|at| shorter.iter().map(move |order| [&order[..at], &[last], &order[at..]].concat())).collect()
}

fn range(request: &Request) -> std::ops::Range<usize> {
    let (offset, length) = match request.action {
        Action::Read { offset, length, .. } => (offset, length),
        Action::Verify { offset, length } => (offset, length as usize),
        _ => panic!("{request:?}"),
    };
    offset as usize..offset as usize + length
}

/// Takes the work out in this order.
fn in_order(work: Vec<Request>, order: &[usize]) -> impl Iterator<Item = (usize, Request)> {
    let mut work: Vec<Option<Request>> = work.into_iter().map(Some).collect();
    let taken: Vec<_> = order.iter().map(|&at| (at, work[at].take().unwrap())).collect();
    taken.into_iter()
}

#[test]
fn four_slices_are_in_work_together_and_go_out_in_one_piece() {
    for order in orders(4) {
        let mut reader = Reader::simple(ROOMY);
        reader.ask(4096, 4 * SLICE - 5);
        let work = reader.work();
        assert_eq!(work.len(), 4);
        assert!(work.iter().all(|request| matches!(request.action, Action::Read { .. })), "no need to verify");
        for (_, request) in in_order(work, &order) {
            assert!(!reader.session.wants_send(), "it is not known yet that all is well: {order:?}");
            reader.complete(request, Ok(())).unwrap();
        }
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        assert_eq!(reader.session.to_send(&mut slices), 5, "a head and four slices leave together");
        reader.send(usize::MAX);
        assert!(reader.wire == good(4096, 4 * SLICE - 5), "{order:?}");
        reader.finish();
    }
}

#[test]
fn slices_that_overtake_wait_for_their_turn() {
    for order in orders(4) {
        // Longer than what is verified: it begins with its first slice.
        let length = LONG + 2 * SLICE;
        let mut reader = Reader::simple(ROOMY);
        reader.ask(5, length);
        let mut come = [false; 4];
        for (at, request) in in_order(reader.work(), &order) {
            reader.complete(request, Ok(())).unwrap();
            come[at] = true;
            reader.send(usize::MAX);
            let turns = come.iter().take_while(|come| **come).count();
            let sent = reader.wire.len().saturating_sub(16);
            // The first slice ends on a block.
            assert_eq!(sent, if turns == 0 { 0 } else { turns * SLICE - 5 }, "{order:?}");
        }
        reader.finish();
        assert!(reader.wire == good(5, length), "{order:?}");
    }
}

#[test]
fn chunks_begin_at_once_and_in_order() {
    for order in orders(4) {
        let mut reader = Reader::structured(ROOMY);
        reader.ask(3 * SLICE, 4 * SLICE);
        let work = reader.work();
        assert_eq!(work.len(), 4);
        let mut come = [false; 4];
        for (at, request) in in_order(work, &order) {
            reader.complete(request, Ok(())).unwrap();
            come[at] = true;
            reader.send(usize::MAX);
            let turns = come.iter().take_while(|come| **come).count();
            assert_eq!(reader.wire.len(), turns * (28 + SLICE), "{order:?}");
        }
        let found = data_of(&reader.wire);
        assert!(found.is_sorted_by_key(|(offset, _)| *offset), "{order:?}");
        assert!(
            found.into_iter().flat_map(|(_, bytes)| bytes).eq(content(3 * SLICE, 4 * SLICE).iter().copied()),
            "{order:?}"
        );
        reader.finish();
    }
}

#[test]
fn what_there_is_no_memory_for_is_verified_before_the_reply_begins() {
    for order in orders(5) {
        let mut reader = Reader::simple(ROOMY);
        reader.ask(9, LONG);
        let work = reader.work();
        let ranges: Vec<_> = work.iter().map(range).collect();
        assert!(ranges.windows(2).all(|two| two[0].end == two[1].start), "{ranges:?}");
        assert_eq!((ranges.len(), ranges[0].start, ranges[4].end), (5, 9, 9 + LONG));
        assert!(matches!(work[4].action, Action::Verify { .. }), "{work:?}");
        for (_, request) in in_order(work, &order) {
            assert!(!reader.session.wants_send(), "it is not known yet that all is well: {order:?}");
            reader.complete(request, Ok(())).unwrap();
        }
        assert!(reader.session.wants_send(), "all is well: {order:?}");
        reader.finish();
        assert!(reader.wire == good(9, LONG), "{order:?}");
    }
}

#[test]
fn what_fails_before_the_reply_begins_is_an_error_of_that_read_alone() {
    let long = |reader: &mut Reader, order: &[usize], fails: usize| {
        reader.ask(0, LONG);
        for (at, request) in in_order(reader.work(), order) {
            assert!(!reader.session.wants_send());
            let result = if at == fails { Err(ErrorKind::Other) } else { Ok(()) };
            reader.complete(request, result).unwrap();
            assert!(reader.work().is_empty(), "nothing more is read for it");
        }
    };
    for order in orders(5) {
        for fails in 0..5 {
            let mut reader = Reader::simple(ROOMY);
            long(&mut reader, &order, fails);
            reader.send(usize::MAX);
            assert_eq!(reader.wire, reply(5), "{order:?}, {fails} fails");
            reader.wire.clear();
            reader.ask(1, 300);
            reader.finish();
            assert!(reader.wire == good(1, 300), "{order:?}, {fails} fails");
            assert_eq!((reader.session.tally().reads, reader.session.tally().errors), (2, 1));
        }
    }
}

#[test]
fn a_read_that_is_too_long_to_be_verified_may_fail_half_way() {
    let mut reader = Reader::simple(ROOMY);
    reader.ask(0, LONG + 1);
    let mut work = reader.work();
    assert!(work.iter().all(|request| matches!(request.action, Action::Read { .. })));
    let last = work.pop().unwrap();
    reader.complete_all(work);
    assert!(matches!(reader.complete(last, Err(ErrorKind::Other)), Err(Violation::ReplyCutShort(_))));
    let mut reader = Reader::simple(ROOMY);
    reader.ask(0, LONG + 1);
    let mut work = reader.work();
    let first = work.remove(0);
    reader.complete_all(work);
    reader.complete(first, Err(ErrorKind::Other)).unwrap();
    reader.send(usize::MAX);
    assert_eq!(reader.wire, reply(5), "it had not begun");
}

#[test]
fn a_read_waits_for_the_memory_of_the_reply_before_it() {
    let mut reader = Reader::simple(ROOMY);
    reader.ask(0, 4 * SLICE);
    let work = reader.work();
    reader.complete_all(work);
    reader.ask(SLICE, 4 * SLICE);
    assert!(reader.work().is_empty());
    reader.send(16 + SLICE);
    let mut work = reader.work();
    assert_eq!(work.len(), 1, "as much as has been sent");
    assert!(reader.work().is_empty(), "and nothing is verified that there will be memory for");
    reader.send(usize::MAX);
    work.extend(reader.work());
    assert!(work.len() == 4 && work.iter().all(|request| matches!(request.action, Action::Read { .. })));
    reader.complete_all(work);
    reader.finish();
    assert!(reader.wire == [good(0, 4 * SLICE), good(SLICE, 4 * SLICE)].concat());
}

#[test]
fn one_that_has_no_memory_but_its_reserve_goes_on() {
    for (cap, slices) in [(0, 1), (8 << 10, 1), (SLICE, 3), (3 * SLICE, 4)] {
        let mut reader = Reader::simple(cap);
        reader.ask(0, 4 * SLICE);
        let mut work = reader.work();
        assert!(matches!(work.pop().unwrap().action, Action::Verify { .. }), "{cap}");
        assert_eq!(work.len(), slices, "{cap}: {work:?}");
        reader.session.release(&mut reader.pool);
        let mut reader = Reader::simple(cap);
        reader.ask(0, 4 * SLICE);
        reader.finish();
        assert!(reader.wire == good(0, 4 * SLICE), "{cap}");
    }
}

#[test]
fn memory_that_others_give_back_meanwhile_is_used() {
    let mut reader = Reader::simple(4 * SLICE);
    let others = reader.pool.take(SLICE).unwrap();
    reader.ask(0, 4 * SLICE);
    let mut work = reader.work();
    let verify = work.pop().unwrap();
    assert!(matches!(verify.action, Action::Verify { .. }));
    reader.complete(work.pop().unwrap(), Ok(())).unwrap();
    reader.pool.give(others);
    work.extend(reader.work());
    reader.complete_all(work);
    assert!(!reader.session.wants_send(), "what was asked of the disk comes back before its READ is answered");
    reader.complete(verify, Ok(())).unwrap();
    reader.finish();
    assert!(reader.wire == good(0, 4 * SLICE));
}

#[test]
fn a_client_that_vanishes_leaves_no_slice_behind() {
    for order in orders(4) {
        for come in 0..4 {
            let mut reader = Reader::simple(ROOMY);
            reader.ask(0, 4 * SLICE);
            let mut work = in_order(reader.work(), &order);
            for (_, request) in work.by_ref().take(come) {
                reader.complete(request, Ok(())).unwrap();
            }
            reader.session.release(&mut reader.pool);
            for (_, Request { action, .. }) in work {
                let Action::Read { buffer, .. } = action else { panic!("{action:?}") };
                reader.pool.give(buffer);
            }
            assert_eq!(reader.pool.available(), ROOMY);
        }
    }
}
