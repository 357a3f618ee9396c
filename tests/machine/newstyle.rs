//! A newstyle conversation with structured replies: haggling and every request there is, cut up at every byte and by
//! chance. What must come back is worked out here, without the code under test.

use crate::disk::{extents, Fault, Faulty, BLOCK};
use crate::oracles::drive::{converse, Client, Schedule, Server};
use crate::pair::ROOMY;
use crate::plan::head;
use crate::scripts::{Fixed, EAGER, LATE};
use crate::simulation::{each_seed, Chance, Rng, Seed};
use flexnbd::buffer::SLICE;
use flexnbd::proto::error::{Errno, Violation};
use flexnbd::proto::server::request::Refusal;
use flexnbd::proto::server::{End, ServerSession};
use flexnbd::proto::wire::{command, kind, option, RequestHead};
use std::borrow::Cow;

/// The export of the scripts, in bytes: blocks of data and of nothing by turns.
const SIZE: usize = 32 << 10;
/// Pools from none at all to one that never binds.
const CAPS: [usize; 4] = [0, 12 << 10, SLICE, ROOMY];
/// How many conversations one run of the simulation holds.
const SEEDS: u64 = 1500;
/// What is offered: flags, FLUSH, FUA, TRIM, `WRITE_ZEROES`, DF, `MULTI_CONN`, CACHE, `FAST_ZERO`.
const FLAGS: u16 = 1 | 4 | 8 | 32 | 64 | 128 | 256 | 1024 | 2048;

/// How a request must be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Answer {
    Done,
    Error(u32),
    Data(Vec<u8>),
    /// Lengths and flags.
    Extents(Vec<(u32, u32)>),
}

#[derive(Debug, Clone)]
struct Ask {
    head: RequestHead,
    fault: Option<Fault>,
    answer: Answer,
}

/// What a client says, and what must come back. The requests have the cookies 0, 1, ...
#[derive(Debug, Clone)]
pub struct Talk {
    /// All that the client sends.
    pub stream: Vec<u8>,
    greeting: Vec<u8>,
    before: Vec<u8>,
    after: Vec<u8>,
    asks: Vec<Ask>,
    end: Result<End, Violation>,
}

fn bytes(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 5 + seed) as u8 | 1).collect()
}

/// An option with its data.
pub fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

/// The data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
pub fn contexts(queries: &[&str]) -> Vec<u8> {
    let mut data = [0_u32.to_be_bytes(), (queries.len() as u32).to_be_bytes()].concat();
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}

/// A reply to an option.
pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    for field in [option, kind, data.len() as u32] {
        bytes.extend(field.to_be_bytes());
    }
    bytes.extend(data);
    bytes
}

impl Talk {
    /// Haggles with something of everything, up to GO.
    pub fn new(size: usize) -> Self {
        let blocks = (0..size).map(|at| if at / BLOCK % 2 == 1 { 0 } else { (at ^ (at >> 8)) as u8 | 1 });
        let before: Vec<u8> = blocks.collect();
        let mut sent = 3_u32.to_be_bytes().to_vec();
        let mut said = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
        let context = [&1_u32.to_be_bytes(), b"base:allocation".as_slice()].concat();
        let info = [&[0; 2], (size as u64).to_be_bytes().as_slice(), &FLAGS.to_be_bytes()].concat();
        let sizes =
            [&[0, 3][..], &1_u32.to_be_bytes(), &4096_u32.to_be_bytes(), &(32_u32 << 20).to_be_bytes()].concat();
        let steps = [
            (99, vec![7; 9000], vec![(0x8000_0001, &[][..])]),
            (option::LIST, Vec::new(), vec![(2, &[0; 4][..]), (1, &[])]),
            (option::SET_META_CONTEXT, contexts(&["base:allocation"]), vec![(0x8000_0003, &[])]),
            (option::STRUCTURED_REPLY, Vec::new(), vec![(1, &[])]),
            (option::LIST_META_CONTEXT, contexts(&[]), vec![(4, &context), (1, &[])]),
            (option::SET_META_CONTEXT, contexts(&["x:", "base:allocation"]), vec![(4, &context), (1, &[])]),
            (option::INFO, b"\0\0\0\x04else\0\0".to_vec(), vec![(0x8000_0006, &[])]),
            (option::GO, b"\0\0\0\0\0\x02\0\x03\0\x09".to_vec(), vec![(3, &info), (3, &sizes), (1, &[])]),
        ];
        for (kind, data, replies) in steps {
            sent.extend(option(kind, &data));
            said.extend(replies.into_iter().flat_map(|(reply, data)| option_reply(kind, reply, data)));
        }
        let end = Ok(End::EndOfStream);
        Self { stream: sent, greeting: said, after: before.clone(), before, asks: Vec::new(), end }
    }

    fn ask(&mut self, mut head: RequestHead, payload: &[u8], error: Option<Errno>, fault: Option<u32>) -> &mut Self {
        head.cookie = self.asks.len() as u64;
        self.stream.extend(head.encode());
        self.stream.extend(payload);
        let (start, length) = (head.offset as usize, head.length as usize);
        let answer = match (error.or(fault.map(|_| Errno::Io)), head.kind) {
            (Some(errno), _) => Answer::Error(errno.to_wire()),
            (None, kind::READ) => Answer::Data(self.after[start..start + length].to_vec()),
            (None, kind::BLOCK_STATUS) => {
                let most = if head.flags & command::REQ_ONE != 0 { 1 } else { usize::MAX };
                let found = extents(&self.after, start..start + length).into_iter().take(most);
                Answer::Extents(found.map(|found| (found.length() as u32, if found.is_hole { 3 } else { 0 })).collect())
            }
            (None, _) => Answer::Done,
        };
        match head.kind {
            kind::WRITE if answer == Answer::Done => self.after[start..start + length].copy_from_slice(payload),
            kind::TRIM | kind::WRITE_ZEROES if answer == Answer::Done => self.after[start..start + length].fill(0),
            _ => {}
        }
        let fault = fault.map(|at| Fault { at, errno: Errno::Io });
        self.asks.push(Ask { head, fault, answer });
        self
    }

    fn good(&mut self, kind: u16, flags: u16, offset: u64, length: usize) -> &mut Self {
        let payload = if kind == kind::WRITE { bytes(length, self.asks.len()) } else { Vec::new() };
        self.ask(head(kind, flags, offset, length as u32), &payload, None, None)
    }

    fn disconnect(&mut self) -> &mut Self {
        self.stream.extend(head(kind::DISC, 0, 0, 0).encode());
        self.end = Ok(End::Disconnect);
        self
    }
}

/// Every request there is, good and bad.
pub fn everything() -> Talk {
    let end = SIZE as u64;
    let mut talk = Talk::new(SIZE);
    talk.good(kind::READ, 0, 4000, 200).good(kind::READ, command::DF, 4000, 200).good(kind::READ, 0, 5000, 90);
    talk.good(kind::READ, command::FUA, 8000, 300).good(kind::READ, 0, 9, 0).good(kind::WRITE, 0, 100, 70);
    talk.good(kind::READ, 0, 0, 9000).good(kind::BLOCK_STATUS, 0, 10, SIZE - 20);
    talk.good(kind::BLOCK_STATUS, command::REQ_ONE, 4096, 9000).good(kind::BLOCK_STATUS, 0, 9, 1);
    talk.good(kind::WRITE_ZEROES, command::NO_HOLE, 100, 50).good(kind::WRITE_ZEROES, command::FAST_ZERO, 0, 99);
    talk.good(kind::TRIM, command::FUA, 8192, 4096).good(kind::CACHE, 0, 0, SIZE).good(kind::FLUSH, 0, 0, 0);
    talk.good(kind::BLOCK_STATUS, command::FUA, 0, SIZE).good(kind::READ, 0, 0, 400);
    let inval = [
        head(kind::READ, 0, end, 1),
        head(kind::READ, command::NO_HOLE, 0, 1),
        head(kind::TRIM, command::DF, 0, 1),
        head(kind::CACHE, command::DF, 0, 1),
        head(kind::BLOCK_STATUS, 0, end - 1, 2),
        head(kind::BLOCK_STATUS, command::DF, 0, 1),
        head(99, 0, 0, 0),
    ];
    for head in inval {
        talk.ask(head, &[], Some(Errno::Inval), None);
    }
    talk.ask(head(kind::WRITE, 0, end - 1, 30), &[1; 30], Some(Errno::NoSpc), None);
    talk.ask(head(kind::READ, 0, 0, 700), &[], None, Some(600));
    talk.ask(head(kind::WRITE, 0, 0, 50), &[9; 50], None, Some(0));
    talk.ask(head(kind::BLOCK_STATUS, 0, 0, 50), &[], None, Some(0));
    talk.good(kind::READ, 0, 0, 60).disconnect();
    talk
}

/// What came back to one request, and whether that was all.
#[derive(Default)]
struct Reply {
    pieces: Vec<(u64, Vec<u8>)>,
    extents: Option<Vec<(u32, u32)>>,
    error: Option<u32>,
    done: bool,
}

/// Takes the next bytes off the front.
fn take<'a>(wire: &mut &'a [u8], length: usize) -> &'a [u8] {
    let (taken, rest) = wire.split_at(length);
    *wire = rest;
    taken
}

fn number(wire: &mut &[u8], length: usize) -> u64 {
    take(wire, length).iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Fails unless the wire holds the greeting and the right answer to each request, and says how each was answered.
fn check(talk: &Talk, wire: &[u8]) {
    let mut wire = wire.strip_prefix(&*talk.greeting).expect("the greeting and all that haggling brings");
    let mut replies: Vec<Reply> = talk.asks.iter().map(|_| Reply::default()).collect();
    while !wire.is_empty() {
        let magic = number(&mut wire, 4);
        if magic == 0x6744_6698 {
            let error = number(&mut wire, 4) as u32;
            let at = number(&mut wire, 8) as usize;
            assert_ne!(talk.asks[at].head.kind, kind::READ, "a READ is answered in chunks");
            assert!(!std::mem::replace(&mut replies[at].done, true));
            replies[at].error = (error != 0).then_some(error);
            continue;
        }
        assert_eq!(magic, 0x668e_33ef);
        let (flags, kind) = (number(&mut wire, 2), number(&mut wire, 2));
        let at = number(&mut wire, 8) as usize;
        let length = number(&mut wire, 4) as usize;
        let mut payload = take(&mut wire, length);
        let reply = &mut replies[at];
        assert!(flags < 2 && !reply.done);
        reply.done = flags == 1;
        match kind {
            0 => assert!(payload.is_empty() && reply.done),
            1 => {
                let offset = number(&mut payload, 8);
                assert!(!payload.is_empty());
                reply.pieces.push((offset, payload.to_vec()));
            }
            2 => {
                let offset = number(&mut payload, 8);
                let length = number(&mut payload, 4) as usize;
                assert!(length > 0 && payload.is_empty() && talk.asks[at].head.flags & command::DF == 0);
                reply.pieces.push((offset, vec![0; length]));
            }
            5 => {
                assert_eq!(number(&mut payload, 4), 1);
                let extents: Vec<(u32, u32)> = payload
                    .chunks(8)
                    .map(|mut extent| (number(&mut extent, 4) as u32, number(&mut extent, 4) as u32))
                    .collect();
                assert!(reply.extents.replace(extents).is_none());
            }
            0x8001 => {
                reply.error = Some(number(&mut payload, 4) as u32);
                assert_eq!(number(&mut payload, 2) as usize, payload.len());
            }
            _ => panic!("a chunk of type {kind}"),
        }
    }
    for (ask, mut reply) in talk.asks.iter().zip(replies) {
        assert!(reply.done, "{} is not answered", ask.head);
        assert!(ask.head.flags & command::DF == 0 || reply.pieces.len() <= 1);
        reply.pieces.sort();
        let answer = match (reply.error, reply.extents) {
            (Some(error), _) => Answer::Error(error),
            (None, Some(extents)) => Answer::Extents(extents),
            (None, None) if ask.head.kind == kind::READ => {
                let mut at = ask.head.offset;
                for (offset, piece) in &reply.pieces {
                    assert_eq!(*offset, at, "each byte once: {}", ask.head);
                    at += piece.len() as u64;
                }
                Answer::Data(reply.pieces.into_iter().flat_map(|(_, piece)| piece).collect())
            }
            (None, None) => Answer::Done,
        };
        assert_eq!(answer, ask.answer, "{}", ask.head);
    }
}

/// What the client says, and all that it is told.
struct Listener<'a> {
    talk: &'a Talk,
    said: usize,
    wire: Vec<u8>,
}

impl Client for Listener<'_> {
    fn says(&self) -> Cow<'_, [u8]> {
        self.talk.stream[self.said..].into()
    }

    fn said(&mut self, n: usize, _: u64) {
        self.said += n;
    }

    fn is_done(&self) -> bool {
        true
    }

    fn hear(&mut self, bytes: &[u8]) {
        self.wire.extend(bytes);
    }

    fn refused(&mut self, refusal: &Refusal) {
        let ask = &self.talk.asks[refusal.head.cookie as usize];
        assert_eq!((ask.head, &ask.answer), (refusal.head, &Answer::Error(refusal.errno.to_wire())));
    }
}

/// Holds the conversation; returns how it ends, all that the server sent, and the disk.
fn hold(talk: &Talk, cap: usize, schedule: &mut dyn Schedule) -> (Result<End, Violation>, Vec<u8>, Faulty) {
    let mut client = Listener { talk, said: 0, wire: Vec::new() };
    let mut disk = Faulty::new(talk.before.clone(), talk.asks.iter().map(|ask| (ask.head, ask.fault)));
    let server = Server { begin: ServerSession::newstyle, size: talk.before.len() as u64, cap };
    let (end, _) = converse(server, &mut client, &mut disk, schedule);
    (end, client.wire, disk)
}

/// Holds the conversation to its end; returns all that the server sent.
fn run(talk: &Talk, cap: usize, schedule: &mut dyn Schedule) -> Vec<u8> {
    let (end, wire, disk) = hold(talk, cap, schedule);
    assert_eq!(end, talk.end);
    assert!(disk.bytes == talk.after, "the disk differs from its shadow");
    for ask in talk.asks.iter().filter(|ask| !matches!(ask.answer, Answer::Error(_))) {
        disk.check_synced(ask.head.cookie);
    }
    wire
}

#[test]
fn haggling_and_structured_replies_may_be_cut_anywhere() {
    let talk = everything();
    for cap in CAPS {
        let whole = run(&talk, cap, &mut EAGER.clone());
        check(&talk, &whole);
        for cut in 1..talk.stream.len() {
            // The long option that is drained is like itself all along.
            if (400..8900).contains(&cut) && cut % 97 != 0 {
                continue;
            }
            assert!(run(&talk, cap, &mut Fixed { cut, ..EAGER }) == whole, "cut at {cut}");
            check(&talk, &run(&talk, cap, &mut Fixed { cut, ..LATE }));
        }
        for piece in [1, 2, 15, 16, 17, 27, 28, 29, 4096] {
            assert!(run(&talk, cap, &mut Fixed { receive: piece, ..EAGER }) == whole, "{piece} bytes at once");
            check(&talk, &run(&talk, cap, &mut Fixed { receive: piece, send: piece, ..LATE }));
        }
        for send in 1..200 {
            assert!(run(&talk, cap, &mut Fixed { send, ..EAGER }) == whole, "{send} bytes sent at once");
        }
    }
}

#[test]
fn a_newstyle_client_may_hang_up_anywhere() {
    let talk = everything();
    for cut in 0..talk.stream.len() {
        if (400..8900).contains(&cut) && cut % 97 != 0 {
            continue;
        }
        // Inside a message or between two: either way it ends.
        let talk = Talk { stream: talk.stream[..cut].to_vec(), ..talk.clone() };
        for mut schedule in [EAGER, LATE] {
            let (end, _, _) = hold(&talk, ROOMY, &mut schedule);
            assert!(matches!(end, Ok(End::EndOfStream) | Err(Violation::Truncated)), "cut at {cut}: {end:?}");
        }
    }
}

#[test]
fn long_structured_reads_come_in_slices_beside_others() {
    let mut talk = Talk::new(2 * SLICE + 700);
    talk.good(kind::READ, 0, 0, 100).good(kind::READ, 0, 9, 2 * SLICE + 500).good(kind::READ, 0, 5000, 100);
    talk.good(kind::READ, command::DF, 1, 65_536).good(kind::WRITE, 0, 7, SLICE + 99).good(kind::READ, 0, 0, SLICE * 2);
    talk.ask(head(kind::READ, 0, 0, 2 * SLICE as u32), &[], None, Some(SLICE as u32 + 5000));
    talk.good(kind::READ, 0, 0, 500);
    for cap in CAPS {
        check(&talk, &run(&talk, cap, &mut EAGER.clone()));
        for piece in [4095, 65_536, SLICE] {
            check(&talk, &run(&talk, cap, &mut Fixed { receive: piece, send: piece, ..LATE }));
        }
    }
}

/// A conversation made up.
fn talk(rng: &mut Rng) -> Talk {
    let size = rng.pick(&[512, 5000, 40_000, 40_000, 600_000]);
    let mut talk = Talk::new(size);
    for _ in 0..rng.magnitude(if size > 100_000 { 8 } else { 80 }) {
        let length = rng.magnitude(size);
        let offset = rng.below(size - length + 1) as u64;
        let fault = (length > 0 && rng.one_in(12)).then(|| rng.below(length) as u32);
        let fua = rng.pick(&[0, command::FUA]);
        let (kind, flags) = match rng.below(12) {
            0..=3 if length <= 65_536 => (kind::READ, rng.pick(&[0, 0, command::DF])),
            0..=3 => (kind::READ, 0),
            4..=6 => (kind::WRITE, 0),
            7 => (kind::WRITE_ZEROES, rng.pick(&[0, command::NO_HOLE, command::FAST_ZERO])),
            8 => (kind::TRIM, 0),
            9 if length > 0 => (kind::BLOCK_STATUS, rng.pick(&[0, command::REQ_ONE])),
            10 => (kind::CACHE, 0),
            _ => (kind::FLUSH, 0),
        };
        let length = if kind == kind::FLUSH { 0 } else { length };
        let payload = if kind == kind::WRITE { bytes(length, rng.below(999)) } else { Vec::new() };
        let request = head(kind, flags | fua, offset, length as u32);
        if rng.one_in(10) {
            let beyond = RequestHead { offset: (size + 1) as u64 + (rng.next() >> 1), ..request };
            let errno = match kind {
                kind::WRITE | kind::WRITE_ZEROES => Errno::NoSpc,
                _ => Errno::Inval,
            };
            if kind != kind::FLUSH {
                talk.ask(beyond, &payload, Some(errno), None);
            }
        } else {
            talk.ask(request, &payload, None, fault.filter(|_| kind != kind::FLUSH));
        }
    }
    if rng.one_in(2) {
        talk.disconnect();
    }
    talk
}

fn simulate(seed: u64) {
    let _named = Seed(seed);
    let mut rng = Rng(seed ^ 0x6e65_7773);
    let talk = talk(&mut rng);
    let cap = rng.pick(&[0, 4 << 10, 12 << 10, 64 << 10, 300 << 10, ROOMY]);
    check(&talk, &run(&talk, cap, &mut Chance::new(rng)));
}

#[test]
fn a_newstyle_conversation_keeps_its_promises_whatever_happens() {
    each_seed(SEEDS, simulate);
}
