//! A `ClientSession` that speaks for itself to a `ServerSession`, cut up at every byte in both directions: from the
//! greeting to the last reply, in both dialects.

use flexnbd::buffer::{Pool, SLICE};
use flexnbd::proto::client::{ClientSession, Event};
use flexnbd::proto::error::{Errno, Violation};
use flexnbd::proto::export::{Export, Offer, Style};
use flexnbd::proto::outbox::PIECES_MAX;
use flexnbd::proto::server::request::Request;
use flexnbd::proto::server::{End, Pass, ServerSession, Step};
use flexnbd::proto::wire::{command, kind, transmission};
use flexnbd::work::{Action, Done};
use std::io::{IoSlice, Read};

/// The export, in bytes.
const SIZE: usize = 4096;

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

/// What the client has heard of its commands, in the order of their numbers.
#[derive(Debug, Default, PartialEq, Eq)]
struct Heard {
    offer: Option<Offer>,
    replies: Vec<(usize, u32)>,
    data: Vec<(usize, Vec<u8>)>,
    /// Bytes that went each way.
    sent: usize,
    received: usize,
}

/// Both sides, and the disk behind the server.
struct Both {
    client: ClientSession<usize>,
    server: ServerSession,
    pool: Pool,
    disk: Vec<u8>,
    heard: Heard,
}

/// Everything a client may want, with payloads in one and in two pieces.
fn give_commands(client: &mut ClientSession<usize>, pool: &mut Pool) {
    let mut payload = |bytes: &[u8]| {
        let mut buffer = pool.take(bytes.len()).unwrap();
        buffer.append(bytes);
        buffer
    };
    client.command(kind::WRITE, 0, 100, 11, 0);
    client.push_payload(payload(b"hello "));
    client.push_payload(payload(b"world"));
    client.command(kind::READ, 0, 98, 15, 1);
    client.command(kind::WRITE, command::FUA, 4090, 6, 2);
    client.push_payload(payload(b"at end"));
    client.command(kind::READ, 0, 4090, 7, 3);
    client.command(kind::WRITE_ZEROES, command::NO_HOLE, 100, 5, 4);
    client.command(kind::TRIM, 0, 105, 1, 5);
    client.command(kind::FLUSH, 0, 0, 0, 6);
    client.command(kind::READ, 0, 99, 8, 7);
    client.command(kind::READ, 0, 0, 0, 8);
}

impl Both {
    /// Does all the work that the server has understood.
    fn serve(&mut self) -> Option<End> {
        loop {
            match self.server.next_step(Pass::Everything, &mut self.pool) {
                Step::Request(Request { tag, action, .. }) => {
                    let touched = action.touches();
                    let buffer = match action {
                        Action::Read { offset, length, mut buffer, .. } => {
                            buffer.append(&self.disk[offset as usize..][..length]);
                            Some(buffer)
                        }
                        Action::Write { offset, payload, .. } => {
                            self.disk[offset as usize..][..payload.len()].copy_from_slice(payload.filled());
                            Some(payload)
                        }
                        Action::Zero { offset, length, .. } | Action::Trim { offset, length, .. } => {
                            self.disk[offset as usize..][..length as usize].fill(0);
                            None
                        }
                        _ => None,
                    };
                    let done = Done { owner: 0, tag, buffer, touched, extents: Vec::new(), result: Ok(()) };
                    self.server.complete(done, &mut self.pool).expect("not answered yet");
                }
                Step::Refused(_) => {}
                Step::NeedBytes => return self.server.finished(),
                step => panic!("{step:?}"),
            }
        }
    }

    /// Takes all that the server has said.
    fn hear(&mut self) -> Result<(), Violation> {
        let mut entered = false;
        while let Some(event) = self.client.next_event()? {
            match event {
                Event::Export(offer) => {
                    assert_eq!(self.heard.offer.replace(offer), None);
                    entered = true;
                }
                Event::Data { note, bytes } => match self.heard.data.last_mut() {
                    Some((of, data)) if of == note => data.extend(bytes),
                    _ => self.heard.data.push((*note, bytes.to_vec())),
                },
                Event::Reply { note, error } => self.heard.replies.push((note, error)),
            }
        }
        if entered {
            give_commands(&mut self.client, &mut self.pool);
        }
        Ok(())
    }

    /// Moves what waits at the client to the server.
    fn send(&mut self, most: usize) {
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let pieces = self.client.to_send(&mut slices);
        let mut bytes: Vec<u8> = slices[..pieces].iter().flat_map(|slice| slice.to_vec()).collect();
        bytes.truncate(most);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let mut n = 0;
            for space in self.server.recv_space(&mut self.pool) {
                n += rest.read(space).unwrap();
            }
            self.server.received(n, 0);
            self.serve();
        }
        self.heard.sent += bytes.len();
        self.client.sent(bytes.len(), &mut self.pool);
    }

    /// Moves what waits at the server to the client.
    fn receive(&mut self, most: usize) -> Result<(), Violation> {
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let pieces = self.server.to_send(&mut slices);
        let mut bytes: Vec<u8> = slices[..pieces].iter().flat_map(|slice| slice.to_vec()).collect();
        bytes.truncate(most);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let n = rest.read(self.client.recv_space()).unwrap();
            assert!(n > 0, "it needs bytes and has no space");
            self.client.received(n);
            self.hear()?;
        }
        self.heard.received += bytes.len();
        self.server.sent(bytes.len(), &mut self.pool);
        Ok(())
    }
}

/// Holds the conversation; the client leaves when everything is answered.
fn converse(server: ServerSession, name: &str, mut out: Cut, mut back: Cut) -> Result<Heard, Violation> {
    let disk = (0..SIZE).map(|at| at as u8).collect();
    let client = ClientSession::new(name.into());
    let mut both = Both { client, server, pool: Pool::new(4 * SLICE), disk, heard: Heard::default() };
    let mut left = false;
    loop {
        if both.client.wants_send() {
            both.send(out.next());
        } else if both.server.wants_send() {
            both.receive(back.next())?;
        } else if let Some(end) = both.serve() {
            assert_eq!((end, left), (End::Disconnect, true));
            assert!(both.client.is_quiet());
            assert_eq!(both.client.buffered(), 0);
            both.server.release(&mut both.pool);
            both.client.release(&mut both.pool);
            assert_eq!(both.pool.available(), 4 * SLICE, "all memory comes back");
            return Ok(both.heard);
        } else {
            assert!(!left && both.client.is_quiet(), "stuck");
            left = true;
            both.client.disconnect();
        }
    }
}

fn check(style: Style, heard: &Heard) {
    let beyond = if style == Style::Oldstyle { Errno::NoSpc } else { Errno::Inval };
    let export = Export { size: SIZE as u64 };
    assert_eq!(heard.offer, Some(Offer { size: export.size, flags: export.flags(style) }));
    assert!(heard.offer.is_some_and(|offer| offer.has(transmission::SEND_FLUSH)));
    let mut replies = heard.replies.clone();
    replies.sort_unstable();
    let errors: Vec<u32> = replies.iter().map(|(_, error)| *error).collect();
    assert_eq!(errors, [0, 0, 0, beyond.to_wire(), 0, 0, 0, 0, 0]);
    let data = [(1, b"\x62\x63hello world\x6f\x70".to_vec()), (7, b"\x63\0\0\0\0\0\0w".to_vec())];
    assert_eq!(heard.data, data);
}

#[test]
fn both_sides_understand_each_other_wherever_they_are_cut() {
    type Begin = fn(Export, u64) -> ServerSession;
    let newstyle = Style::Newstyle(flexnbd::proto::export::Agreed::default());
    for (style, begin) in [(Style::Oldstyle, ServerSession::oldstyle as Begin), (newstyle, ServerSession::newstyle)] {
        let run = |out, back| converse(begin(Export { size: SIZE as u64 }, 0), "", out, back).unwrap();
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
    let export = Export { size: SIZE as u64 };
    for then in 1..200 {
        let cut = Cut { first: then, then };
        let oldstyle = converse(ServerSession::oldstyle(export, 0), "other", cut, cut);
        assert_eq!(oldstyle, Err(Violation::NoExportNames));
        let newstyle = converse(ServerSession::newstyle(export, 0), "other", cut, cut);
        assert_eq!(newstyle, Err(Violation::OptionRefused(0x8000_0006)));
    }
}
