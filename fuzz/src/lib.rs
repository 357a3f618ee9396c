//! PURE: the oracles of the fuzzers, each a function from bytes to nothing that panics when a promise is broken.
//!
//! This is a library of the fuzz targets and a module of `tests/machine`, which replays the seeds under `fuzz/seeds`
//! without a fuzzer; it therefore names `flexnbd` and its own modules alone.
//! The first [`CHOICES`] bytes of an input decide what a peer does not: how its bytes are cut up, in which order work is
//! done, what fails. The rest is what the peer sends.

mod newstyle;

pub use newstyle::{haggling, newstyle_session};

use flexnbd::acl::{parse_ip, Acl, AddressError, Entry};
use flexnbd::buffer::{Buffer, Pool, SLICE};
use flexnbd::command::{encode_command, parse_answer, Answer, Command, Reader};
use flexnbd::proto::client::{ClientSession, Event};
use flexnbd::proto::error::Violation;
use flexnbd::proto::export::{Export, Offer};
use flexnbd::proto::outbox::PIECES_MAX;
use flexnbd::proto::server::{End, Pass, ServerSession, Step, BUFFERED_MAX, IN_FLIGHT_MAX};
use flexnbd::proto::wire::{kind, RequestHead, REQUEST_LEN, REQUEST_MAGIC};
use flexnbd::work::{Action, Done};
use std::collections::BTreeSet;
use std::io::{ErrorKind, IoSlice};
use std::net::IpAddr;

/// How many bytes of choices stand before what the peer sends.
pub const CHOICES: usize = 16;
/// The export of [`session`], in bytes: several slices, the last of them short.
const EXPORT: u64 = 2 * SLICE as u64 + 512;
/// The pools of [`session`], in bytes: from one of reserve buffers alone to one that never binds.
const POOLS: [usize; 4] = [0, 12 << 10, SLICE, 16 << 20];
/// The most a session holds beside its payloads, in bytes: what it receives into.
const INBOX: usize = 64 << 10;
/// The most payload one conversation asks for, in bytes, so that no input takes seconds.
const ENOUGH: u64 = 1 << 20;

/// The choices, again and again.
struct Choices<'a>(std::iter::Cycle<std::slice::Iter<'a, u8>>);

impl<'a> Choices<'a> {
    /// Splits an input into its choices and the rest.
    fn split(data: &'a [u8]) -> (Self, &'a [u8]) {
        let (choices, rest) = data.split_at(data.len().min(CHOICES));
        (Self(choices.iter().cycle()), rest)
    }

    fn next(&mut self) -> usize {
        self.0.next().copied().map_or(0, usize::from)
    }

    /// A number from 1 to `most`, more often a small one.
    fn piece(&mut self, most: usize) -> usize {
        match self.next() {
            0 => most,
            choice => most.min(choice * choice),
        }
    }
}

/// Takes what a client wants sent.
fn take_sent<T>(client: &mut ClientSession<T>) -> Vec<u8> {
    let mut bytes = Vec::new();
    while client.wants_send() {
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let pieces = client.to_send(&mut slices);
        let before = bytes.len();
        slices.iter().take(pieces).for_each(|slice| bytes.extend_from_slice(slice));
        client.sent(bytes.len() - before, &mut Pool::new(0));
    }
    bytes
}

/// Lets a client receive, and passes on what it understands.
fn hear<T>(
    client: &mut ClientSession<T>,
    mut bytes: &[u8],
    mut take: impl FnMut(Event<'_, T>),
) -> Result<(), Violation> {
    while !bytes.is_empty() {
        let space = client.recv_space();
        let (next, later) = bytes.split_at(bytes.len().min(space.len()));
        assert!(!next.is_empty(), "it needs bytes and has no space");
        space.iter_mut().zip(next).for_each(|(to, from)| *to = *from);
        client.received(next.len());
        bytes = later;
        while let Some(event) = client.next_event()? {
            take(event);
        }
    }
    Ok(())
}

/// The client that [`session`] talks to: it knows what was asked, and so what may come back.
struct Oracle {
    /// Each request is noted with itself.
    client: ClientSession<RequestHead>,
    /// All that it sends.
    stream: Vec<u8>,
    /// How the conversation should end.
    end: Result<End, Violation>,
    /// How much has come of the data of a READ, in bytes.
    data_bytes: u64,
}

impl Oracle {
    /// Reads the requests of `input` as a server would and asks them with cookies of its own. A payload that is cut off
    /// is made up if `made_up`.
    fn new(mut input: &[u8], made_up: bool) -> Self {
        let client = ClientSession::new(String::new());
        let mut this = Self { client, stream: Vec::new(), end: Ok(End::EndOfStream), data_bytes: 0 };
        let mut enough = ENOUGH;
        while let Some((bytes, rest)) = input.split_first_chunk::<REQUEST_LEN>() {
            let (magic, mut head) = RequestHead::parse(bytes);
            let broken = magic != REQUEST_MAGIC;
            if broken {
                head.kind = kind::FLUSH;
            }
            match head.kind {
                kind::DISC => this.client.disconnect(),
                _ => this.client.command(head.kind, head.flags, head.offset, head.length, head),
            }
            this.stream.extend(magic.to_be_bytes());
            this.stream.extend(take_sent(&mut this.client).iter().skip(4));
            input = rest;
            if broken {
                this.end = Ok(End::Violation(Violation::BadRequestMagic(magic)));
                break;
            }
            let payload = u64::from(head.length);
            match head.kind {
                kind::DISC => {
                    this.end = Ok(End::Disconnect);
                    break;
                }
                kind::WRITE => {
                    let (payload, rest) = input.split_at(input.len().min(head.length as usize));
                    this.stream.extend(payload);
                    let missing = head.length as usize - payload.len();
                    if made_up && missing as u64 <= enough {
                        this.stream.resize(this.stream.len() + missing, 0xA5);
                    } else if missing > 0 {
                        this.end = Err(Violation::Truncated);
                    }
                    input = rest;
                }
                kind::READ if payload <= EXPORT => {}
                _ => continue,
            }
            let Some(left) = enough.checked_sub(payload) else {
                input = &[];
                break;
            };
            enough = left;
        }
        if this.end == Ok(End::EndOfStream) && !input.is_empty() {
            this.end = Err(Violation::Truncated);
        }
        this.stream.extend(input);
        this
    }

    /// Takes what the server sends.
    fn receive(&mut self, bytes: &[u8]) {
        let data_bytes = &mut self.data_bytes;
        let heard = hear(&mut self.client, bytes, |event| match event {
            Event::Export(Offer { size, .. }) => assert_eq!(size, EXPORT),
            Event::Data { note, bytes } => {
                let offset = note.offset + *data_bytes;
                assert!(bytes.iter().zip(offset..).all(|(&byte, at)| byte == content(at)), "other data");
                *data_bytes += bytes.len() as u64;
            }
            Event::Reply { note, error } => {
                let brings = if note.kind == kind::READ && error == 0 { note.length } else { 0 };
                assert_eq!(std::mem::take(data_bytes), u64::from(brings), "all of the data comes with a good reply");
            }
        });
        assert_eq!(heard, Ok(()));
    }
}

/// The byte of the export at `offset`.
fn content(offset: u64) -> u8 {
    (offset ^ (offset >> 8)).to_le_bytes()[0]
}

/// A piece of work that went well, and that nothing came of.
fn done(tag: u32) -> Done {
    Done { owner: 0, tag, buffer: None, touched: None, extents: Vec::new(), result: Ok(()) }
}

/// Does what a disk would.
fn work(tag: u32, action: Action) -> Done {
    let (offset, length, buffer) = match action {
        Action::Read { offset, length, mut buffer, .. } => {
            let bytes: Vec<u8> = (offset..).take(length).map(content).collect();
            assert_eq!((buffer.len(), buffer.append(&bytes)), (0, length), "an empty buffer that is large enough");
            (offset, length as u64, Some(buffer))
        }
        Action::Write { offset, payload, .. } => (offset, payload.len() as u64, Some(payload)),
        Action::Zero { offset, length, .. }
        | Action::Trim { offset, length, .. }
        | Action::Cache { offset, length }
        | Action::Map { offset, length, .. } => (offset, length, None),
        Action::Flush => return done(tag),
    };
    assert!(length > 0 && offset.checked_add(length).is_some_and(|end| end <= EXPORT), "inside the export");
    Done { buffer, ..done(tag) }
}

/// Plays a peer that sends `stream` and takes what comes, and a disk, each when the choices say so. Returns how the
/// session ended; it holds no memory then.
fn converse(
    mut session: ServerSession,
    stream: &[u8],
    choices: &mut Choices,
    cap: usize,
    work: impl Fn(u32, Action) -> Done,
    mut receive: impl FnMut(&[u8]),
) -> Result<End, Violation> {
    let mut input = stream;
    let mut pool = Pool::new(cap);
    let mut disk: Vec<Done> = Vec::new();
    let mut hung_up = false;
    let mut now_ms = 0;

    let end = loop {
        let step = session.next_step(Pass::Everything, &mut pool);
        let receives = matches!(step, Step::NeedBytes) && !hung_up;
        let goes_on = matches!(step, Step::Request(_) | Step::Refused(_));
        if let Step::Request(request) = step {
            disk.push(work(request.tag, request.action));
        }
        let tags: BTreeSet<u32> = disk.iter().map(|held| held.tag).collect();
        assert!(tags.len() <= IN_FLIGHT_MAX, "too many in flight");
        let held: usize = disk.iter().flat_map(|held| &held.buffer).map(Buffer::capacity).sum();
        assert!(
            held <= BUFFERED_MAX + SLICE && cap - pool.available() <= BUFFERED_MAX + SLICE + INBOX,
            "too much held"
        );
        // A read that begins in a hole is answered in two pieces.
        assert!(session.in_flight() <= 2 * IN_FLIGHT_MAX, "replies without a limit");
        assert!(session.oldest_ms().is_none_or(|oldest_ms| oldest_ms <= now_ms));
        if let Some(end) = session.finished() {
            break Ok(end);
        }
        now_ms += 1;
        let choice = choices.next();
        let can = [goes_on, receives, session.wants_send(), !disk.is_empty()];
        let act = (0..can.len()).map(|next| (choice + next) % can.len()).find(|&act| can.get(act) == Some(&true));
        assert!(act.is_some(), "stuck");
        match act {
            Some(0) => {}
            Some(1) if input.is_empty() => {
                hung_up = true;
                if let Err(violation) = session.end_of_stream() {
                    break Err(violation);
                }
            }
            Some(1) => {
                let mut n = choices.piece(input.len());
                let before = input.len();
                for space in session.recv_space(&mut pool) {
                    let (piece, rest) = input.split_at(n.min(space.len()));
                    space.iter_mut().zip(piece).for_each(|(to, from)| *to = *from);
                    n -= piece.len();
                    input = rest;
                }
                assert!(input.len() < before, "it needs bytes and has no space");
                session.received(before - input.len(), now_ms);
                if choice >= 0x80 {
                    session.park(&mut pool);
                }
            }
            Some(2) => {
                let mut slices = [IoSlice::new(&[]); PIECES_MAX];
                let pieces = session.to_send(&mut slices);
                let waiting = slices.iter().take(pieces).map(|slice| slice.len()).sum();
                let n = choices.piece(waiting);
                let mut left = n;
                for slice in slices.iter().take(pieces) {
                    let piece = slice.get(..left).unwrap_or(slice);
                    receive(piece);
                    left -= piece.len();
                }
                session.sent(n, &mut pool);
            }
            _ => {
                let mut done = disk.swap_remove(choice / can.len() % disk.len());
                if choices.next() == 0xFF {
                    done.result = Err(ErrorKind::Other.into());
                }
                let completed = session.complete(done, &mut pool);
                let failed = completed.and_then(|completed| completed.result.err());
                if let Some(violation) = failed.and_then(|failed| failed.violation) {
                    break Err(violation);
                }
            }
        }
    };

    session.release(&mut pool);
    disk.into_iter().filter_map(|held| held.buffer).for_each(|buffer| pool.give(buffer));
    assert_eq!(pool.available(), cap, "all memory comes back");
    end
}

/// A conversation from the server's side: requests, cut up, against a disk that is slow and fails now and then.
///
/// # Panics
/// When anything comes out that is no right answer to what was asked, when the disk is asked for what cannot be, and
/// when the session holds too much, keeps memory for itself or gets stuck.
pub fn session(data: &[u8]) {
    let (mut choices, input) = Choices::split(data);
    let cap = POOLS.get(choices.next() % POOLS.len()).copied().unwrap_or_default();
    let mut oracle = Oracle::new(input, choices.next() % 2 == 0);
    let stream = std::mem::take(&mut oracle.stream);
    let session = ServerSession::oldstyle(Export { size: EXPORT }, 0);
    let end = converse(session, &stream, &mut choices, cap, work, |piece| oracle.receive(piece));
    if !matches!(end, Err(Violation::ReplyCutShort(_))) {
        assert_eq!(end, oracle.end);
    }
    if end.is_ok() {
        assert!(oracle.client.is_quiet(), "everything is answered to the end");
    }
}

/// What a [`ClientSession`] has understood.
#[derive(Debug, Default, PartialEq, Eq)]
struct Understood {
    /// What it has sent in the handshake.
    sent: Vec<u8>,
    export: Option<Offer>,
    replies: Vec<(usize, u32)>,
    data: Vec<u8>,
    violation: Option<Violation>,
}

/// Asks what the choices say and takes `stream` for the answers, at most `piece()` bytes at once.
fn listen(choices: &[u8], stream: &[u8], mut piece: impl FnMut(usize) -> usize) -> Understood {
    let mut client = ClientSession::new(String::new());
    let mut most_data = 0;
    for (number, &choice) in choices.iter().enumerate() {
        let length = u32::from(choice >> 3) * 11;
        match u16::from(choice & 7) {
            kind::DISC => client.disconnect(),
            kind => client.command(kind, 0, 0, length, number),
        }
        most_data += length as usize;
    }
    take_sent(&mut client);
    let asked = client.unanswered();
    let mut understood = Understood::default();
    let mut rest = stream;
    while !rest.is_empty() && understood.violation.is_none() {
        let (next, later) = rest.split_at(piece(rest.len()));
        rest = later;
        let heard = hear(&mut client, next, |event| match event {
            Event::Export(offer) => assert!(understood.export.replace(offer).is_none(), "greeted twice"),
            Event::Reply { note, error } => understood.replies.push((note, error)),
            Event::Data { bytes, .. } => understood.data.extend(bytes),
        });
        understood.violation = heard.err();
        understood.sent.extend(take_sent(&mut client));
    }
    assert_eq!(client.unanswered() + understood.replies.len(), asked, "each reply answers one request");
    assert!(understood.data.len() <= most_data, "more data than was asked for");
    understood
}

/// A conversation from the client's side: a greeting and replies, cut up.
///
/// # Panics
/// When it matters how they are cut up, or when something is understood that was not asked for.
pub fn client(data: &[u8]) {
    let (mut choices, stream) = Choices::split(data);
    let asked = data.get(..CHOICES).unwrap_or(data);
    let whole = listen(asked, stream, |most| most);
    assert_eq!(listen(asked, stream, |most| choices.piece(most)), whole);
}

/// Reads one command, at most `piece()` bytes at once.
fn read_command(text: &[u8], mut piece: impl FnMut(usize) -> usize) -> Result<Command, Answer> {
    let (mut reader, mut rest) = (Reader::new(), text);
    while !rest.is_empty() {
        let (next, later) = rest.split_at(piece(rest.len()));
        if let Some(command) = reader.push(next)? {
            return Ok(command);
        }
        rest = later;
    }
    reader.end_of_stream()
}

/// The answer as a client reads it.
fn transmit(answer: &Answer) -> Option<Answer> {
    let line = answer.encode();
    assert_eq!(line.iter().position(u8::is_ascii_control), Some(line.len() - 1), "one clean line");
    parse_answer(&line).ok().filter(|parsed| parsed.code == answer.code)
}

/// A control command, cut up; and the same bytes as an answer.
///
/// # Panics
/// When it matters how they are cut up, or when an answer or a good list of entries does not survive being sent.
pub fn control(data: &[u8]) {
    let (mut choices, text) = Choices::split(data);
    let command = read_command(text, |most| most);
    assert_eq!(read_command(text, |most| choices.piece(most)), command);
    match &command {
        Err(answer) => assert_eq!(transmit(answer).as_ref().map(|sent| sent.text.as_str()), Some(answer.text.trim())),
        Ok(Command::Acl(entries)) => {
            if let Some(bad) = entries.iter().find(|entry| entry.parse::<Entry>().is_err()) {
                assert!(transmit(&Answer::bad_spec(bad)).is_some());
            } else {
                let words: Vec<&str> = ["acl"].into_iter().chain(entries.iter().map(String::as_str)).collect();
                assert_eq!(read_command(&encode_command(&words), |most| most), command);
            }
        }
        Ok(_) => {}
    }
    if let Ok(answer) = parse_answer(text) {
        let once = transmit(&answer);
        assert!(once.is_some() && once == once.as_ref().and_then(transmit), "what is escaped stays as it is");
    }
}

/// The address as a number, and how many bits it has.
fn bits(address: IpAddr) -> (u128, u32) {
    match address {
        IpAddr::V4(ip) => (ip.to_bits().into(), u32::BITS),
        IpAddr::V6(ip) => (ip.to_bits(), u128::BITS),
    }
}

/// Lines of an access control list, each also taken for an address; the choices are the address of a client.
///
/// # Panics
/// When an address or an entry changes by being shown and parsed, or when a list lets in whom it should not, or not
/// whom it should.
pub fn acl(data: &[u8]) {
    let (mut choices, text) = Choices::split(data);
    let visitor = IpAddr::from([(); CHOICES].map(|()| u8::try_from(choices.next()).unwrap_or_default())).to_canonical();
    let mut entries = Vec::new();
    let mut expected = false;
    for line in String::from_utf8_lossy(text).lines() {
        match parse_ip(line) {
            Ok(ip) => assert_eq!(parse_ip(&ip.to_string()), Ok(ip)),
            Err(error) => assert_eq!(error, AddressError::Address),
        }
        let Ok(entry) = line.parse::<Entry>() else { continue };
        let shown = entry.to_string();
        assert_eq!(shown.parse(), Ok(entry), "{shown}");
        let (address, prefix) = shown.split_once('/').unwrap_or((&shown, ""));
        let Ok(address) = address.parse::<IpAddr>() else { continue };
        let (network, length) = bits(address);
        let beyond = prefix.parse().map_or(0, |prefix: u32| length - prefix);
        let (visitor_bits, visitor_length) = bits(visitor);
        let matches = visitor_length == length && visitor_bits >> beyond == network >> beyond;
        assert_eq!(Acl::new(vec![entry], true).allows(visitor), matches, "{shown} {visitor}");
        assert!(Acl::new(vec![entry], true).allows(address), "{shown} holds its own address");
        expected |= matches;
        entries.push(entry);
    }
    expected |= entries.is_empty();
    assert_eq!(Acl::new(entries, false).allows(visitor), expected);
}
