//! A `ClientSession` that speaks for itself to a `ServerSession`, cut up at every byte in both directions: from the
//! greeting to the last reply, in both dialects.

use crate::disk::Faulty;
use crate::oracles::drive::{self, hear, Act, Can, Client, Schedule, Server};
use flexnbd::buffer::{Pool, SLICE};
use flexnbd::proto::client::{ClientSession, Descriptor, Event, Wishes};
use flexnbd::proto::error::{Errno, Violation};
use flexnbd::proto::export::{Agreed, Export, Offer, SessionName, Style};
use flexnbd::proto::outbox::PIECES_MAX;
use flexnbd::proto::server::{End, ServerSession};
use flexnbd::proto::wire::{command, kind, transmission, RequestHead};
use std::borrow::Cow;
use std::io::IoSlice;

/// The export, in bytes.
const SIZE: usize = 4096;
/// Either pool, in bytes.
const CAP: usize = 4 * SLICE;

/// What a client may want: kind, flags, offset, length, and the pieces of the payload.
type Wish = (u16, u16, u64, u32, &'static [&'static [u8]]);

/// Everything it may want, with payloads in one and in two pieces.
const COMMANDS: [Wish; 10] = [
    (kind::WRITE, 0, 100, 11, &[b"hello ", b"world"]),
    (kind::READ, 0, 98, 15, &[]),
    (kind::WRITE, command::FUA, 4090, 6, &[b"at end"]),
    (kind::READ, 0, 4090, 7, &[]),
    (kind::WRITE_ZEROES, command::NO_HOLE, 100, 5, &[]),
    (kind::TRIM, 0, 105, 1, &[]),
    (kind::FLUSH, 0, 0, 0, &[]),
    (kind::READ, 0, 99, 8, &[]),
    (kind::READ, 0, 0, 0, &[]),
    (kind::BLOCK_STATUS, 0, 96, 1000, &[]),
];

/// How many bytes may go one way at once: so many the first time, so many from then on.
#[derive(Debug, Clone, Copy)]
struct Cut {
    first: usize,
    then: usize,
}

const WHOLE: Cut = Cut { first: usize::MAX, then: usize::MAX };

impl Cut {
    fn next(&mut self) -> usize {
        std::mem::replace(&mut self.first, self.then)
    }
}

/// A schedule in which the server is idle when the client speaks, and the client when the server does.
struct Turns {
    out: Cut,
    back: Cut,
}

impl Schedule for Turns {
    fn choose(&mut self, can: &Can) -> Act {
        match can {
            Can { complete: 1.., .. } => Act::Complete(0),
            Can { go_on: true, .. } => Act::GoOn,
            Can { receive: most @ 1.., .. } => Act::Receive(self.out.next().min(*most)),
            Can { send: most @ 1.., .. } => Act::Send(self.back.next().min(*most)),
            _ => Act::HangUp,
        }
    }

    fn now_ms(&mut self) -> u64 {
        0
    }
}

/// What the client has heard of its commands, in the order of their numbers.
#[derive(Debug, Default, PartialEq, Eq)]
struct Heard {
    offer: Option<Offer>,
    replies: Vec<(usize, u32)>,
    /// The READs, and what they brought where.
    data: Vec<(usize, u64, Vec<u8>)>,
    extents: Vec<(usize, Vec<Descriptor>)>,
    /// Bytes that went each way.
    sent: usize,
    received: usize,
}

impl Heard {
    fn bring(&mut self, note: usize, offset: u64, bytes: &[u8]) {
        match self.data.last_mut() {
            Some((of, start, data)) if *of == note && *start + data.len() as u64 == offset => data.extend(bytes),
            _ => self.data.push((note, offset, bytes.to_vec())),
        }
    }
}

/// A client that gives its commands when it may, and leaves when they are answered.
struct Speaker {
    session: ClientSession<usize>,
    pool: Pool,
    heard: Heard,
    left: bool,
    violation: Option<Violation>,
}

impl Speaker {
    fn give_commands(&mut self) {
        for (number, (kind, flags, offset, length, payload)) in COMMANDS.into_iter().enumerate() {
            self.session.command(kind, flags, offset, length, number);
            for piece in payload {
                let mut buffer = self.pool.take(piece.len()).unwrap();
                buffer.append(piece);
                self.session.push_payload(buffer);
            }
        }
    }
}

impl Client for Speaker {
    fn says(&self) -> Cow<'_, [u8]> {
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let filled = if self.violation.is_none() { self.session.to_send(&mut slices) } else { 0 };
        slices[..filled].iter().flat_map(|slice| slice.to_vec()).collect()
    }

    fn said(&mut self, n: usize, _: u64) {
        self.session.sent(n, &mut self.pool);
        self.heard.sent += n;
    }

    fn is_done(&self) -> bool {
        self.left || self.violation.is_some()
    }

    fn hear(&mut self, bytes: &[u8]) {
        let (heard, mut entered) = (&mut self.heard, false);
        heard.received += bytes.len();
        let understood = hear(&mut self.session, bytes, |event| match event {
            Event::Export(offer) => {
                assert_eq!(heard.offer.replace(offer), None);
                entered = true;
            }
            Event::Data { note, offset, bytes } => heard.bring(*note, offset, bytes),
            Event::Hole { note, offset, length } => heard.bring(*note, offset, &vec![0; length as usize]),
            Event::Extents { note, descriptors } => heard.extents.push((*note, descriptors)),
            Event::Reply { note, error } => heard.replies.push((note, error)),
        });
        self.violation = understood.err();
        if entered {
            self.give_commands();
        } else if self.session.is_quiet() && self.heard.offer.is_some() && !self.left {
            self.left = true;
            self.session.disconnect();
        }
    }
}

/// Holds the conversation. A client that hears what it must not hangs up.
fn converse(
    begin: fn(Export, u64) -> ServerSession,
    session: ClientSession<usize>,
    mut turns: Turns,
) -> Result<Heard, Violation> {
    let mut client = Speaker { session, pool: Pool::new(CAP), heard: Heard::default(), left: false, violation: None };
    let heads = (1..)
        .zip(COMMANDS)
        .map(|(cookie, (kind, flags, offset, length, _))| (RequestHead { flags, kind, cookie, offset, length }, None));
    let mut disk = Faulty::new((0..SIZE).map(|at| at as u8).collect(), heads);
    let server = Server { begin, size: SIZE as u64, cap: CAP };
    let (end, _) = drive::converse(server, &mut client, &mut disk, &mut turns);
    client.session.release(&mut client.pool);
    assert_eq!(client.pool.available(), CAP, "all memory comes back");
    if let Some(violation) = client.violation {
        assert_eq!(end, Ok(End::EndOfStream));
        return Err(violation);
    }
    assert_eq!(end, Ok(End::Disconnect));
    assert!(client.session.is_quiet());
    assert_eq!(client.session.buffered(), 0);
    Ok(client.heard)
}

fn check(style: Style, heard: &Heard) {
    let beyond = if style == Style::Oldstyle { Errno::NoSpc } else { Errno::Inval };
    let export = Export { size: SIZE as u64, read_only: false, flushes: true, several: true };
    let agreed = if let Style::Newstyle(agreed) = style { agreed } else { Agreed::default() };
    assert_eq!(heard.offer, Some(Offer { size: export.size, flags: export.flags(style), agreed }));
    assert!(heard.offer.is_some_and(|offer| offer.has(transmission::SEND_FLUSH)));
    let mut replies = heard.replies.clone();
    replies.sort_unstable();
    let errors: Vec<u32> = replies.iter().map(|(_, error)| *error).collect();
    let status = if style.allocation() { 0 } else { Errno::Inval.to_wire() };
    assert_eq!(errors, [0, 0, 0, beyond.to_wire(), 0, 0, 0, 0, 0, status]);
    let data = [(1, 98, b"\x62\x63hello world\x6f\x70".to_vec()), (7, 99, b"\x63\0\0\0\0\0\0w".to_vec())];
    assert_eq!(heard.data, data);
    if style.allocation() {
        assert_eq!(heard.extents, [(9, vec![Descriptor { length: 1000, flags: 0 }])]);
    } else {
        assert_eq!(heard.extents, []);
    }
}

#[test]
fn both_sides_understand_each_other_wherever_they_are_cut() {
    type Begin = fn(Export, u64) -> ServerSession;
    let structured = Agreed { structured: true, allocation: true, session: None };
    let nothing = Wishes::default();
    for (style, wishes, begin) in [
        (Style::Oldstyle, nothing, ServerSession::oldstyle as Begin),
        (Style::Newstyle(Agreed::default()), nothing, ServerSession::newstyle),
        (Style::Oldstyle, Wishes { structured: true, ..nothing }, ServerSession::oldstyle),
        (Style::Newstyle(structured), Wishes { structured: true, session: None }, ServerSession::newstyle),
        (
            Style::Newstyle(Agreed { session: Some(SessionName([7; 16])), ..structured }),
            Wishes { session: Some(SessionName([7; 16])), ..nothing },
            ServerSession::newstyle,
        ),
    ] {
        let session = || ClientSession::with_wishes(String::new(), wishes);
        let run = |out, back| converse(begin, session(), Turns { out, back }).unwrap();
        let whole = run(WHOLE, WHOLE);
        check(style, &whole);
        for first in 1..whole.sent {
            assert_eq!(run(Cut { first, ..WHOLE }, WHOLE), whole, "the client cut at {first}");
        }
        for first in 1..whole.received {
            assert_eq!(run(WHOLE, Cut { first, ..WHOLE }), whole, "the server cut at {first}");
        }
        let pieces = |then| Cut { first: then, then };
        for length in 1..whole.received.max(whole.sent) {
            assert_eq!(run(pieces(length), WHOLE), whole, "{length} bytes at once from the client");
            assert_eq!(run(WHOLE, pieces(length)), whole, "{length} bytes at once from the server");
            check(style, &run(pieces(length), pieces(length % 29 + 1)));
        }
    }
}

#[test]
fn a_name_that_is_not_there_is_refused_wherever_it_is_cut() {
    for then in 1..200 {
        let cut = Cut { first: then, then };
        let session = || ClientSession::new("other".into());
        let converse = |begin| converse(begin, session(), Turns { out: cut, back: cut });
        assert_eq!(converse(ServerSession::oldstyle), Err(Violation::NoExportNames));
        assert_eq!(converse(ServerSession::newstyle), Err(Violation::OptionRefused(0x8000_0006)));
    }
}
