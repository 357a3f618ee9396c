//! PURE: the oracle of a client that listens to a hostile server.

use super::choices::Choices;
use super::drive::feed;
use super::CHOICES;
use flexnbd::buffer::Pool;
use flexnbd::proto::client::{ClientSession, Event, Wishes, DESCRIPTORS_MAX};
use flexnbd::proto::error::Violation;
use flexnbd::proto::export::{Offer, SessionName};
use flexnbd::proto::outbox::PIECES_MAX;
use flexnbd::proto::wire::kind;
use std::collections::BTreeMap;
use std::io::IoSlice;

/// The last choice of a client that asks for an export by name.
const NAMED: u8 = 0xFF;
/// The last choice of a client that wishes for all there is. Its session is named after it.
const WISHING: u8 = 0xFE;

/// Takes what a client wants sent, `piece()` bytes at once.
pub(super) fn take_sent<T>(client: &mut ClientSession<T>, mut piece: impl FnMut(usize) -> usize) -> Vec<u8> {
    let mut taken = Vec::new();
    while client.wants_send() {
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let filled = client.to_send(&mut slices);
        let bytes: Vec<u8> = slices[..filled].iter().flat_map(|slice| slice.to_vec()).collect();
        let n = piece(bytes.len());
        taken.extend(&bytes[..n]);
        client.sent(n, &mut Pool::new(0));
    }
    taken
}

/// A command that a client gives.
struct Command {
    kind: u16,
    length: u32,
}

/// Where all commands begin in the export.
const OFFSET: u64 = 1000;

impl Command {
    fn new(choice: u8) -> Self {
        Self { kind: u16::from(choice & 7), length: u32::from(choice >> 3) * 11 }
    }
}

/// What a [`ClientSession`] has understood; commands go by their numbers.
#[derive(Debug, Default, PartialEq, Eq)]
struct Understood {
    sent: Vec<u8>,
    export: Option<Offer>,
    replies: Vec<(usize, u32)>,
    /// The bytes of each READ by where they are in the export; those of a hole are zeroes.
    data: BTreeMap<usize, BTreeMap<u64, u8>>,
    extents: BTreeMap<usize, Vec<(u32, u32)>>,
    violation: Option<Violation>,
    /// What it would mean if the server closed the connection now.
    end: &'static str,
}

impl Understood {
    /// Lets the client receive; it gives its commands as soon as it may.
    fn hear(
        &mut self,
        client: &mut ClientSession<usize>,
        commands: &[Command],
        mut bytes: &[u8],
    ) -> Result<(), Violation> {
        while !bytes.is_empty() {
            bytes = feed(client, bytes);
            while let Some(event) = client.next_event()? {
                match event {
                    Event::Export(offer) => {
                        assert!(self.export.replace(offer).is_none(), "greeted twice");
                        for (number, &Command { kind, length }) in commands.iter().enumerate() {
                            match kind {
                                kind::DISC => client.disconnect(),
                                _ => client.command(kind, 0, OFFSET, length, number),
                            }
                        }
                    }
                    Event::Data { note, offset, bytes } => self.bring(*note, offset, bytes),
                    Event::Hole { note, offset, length } => self.bring(*note, offset, &vec![0; length as usize]),
                    Event::Extents { note, descriptors } => {
                        assert!(!descriptors.is_empty() && descriptors.len() <= DESCRIPTORS_MAX);
                        let found = descriptors.iter().map(|found| (found.length, found.flags)).collect();
                        assert!(self.extents.insert(*note, found).is_none(), "extents twice");
                    }
                    Event::Reply { note, error } => {
                        let Command { kind, length } = commands[note];
                        let brought = self.data.get(&note).map_or(0, BTreeMap::len);
                        if error == 0 {
                            let brings = if kind == kind::READ { length as usize } else { 0 };
                            assert_eq!(brought, brings, "all of the data comes with a good reply");
                        } else {
                            let chunks = self.export.is_some_and(|offer| offer.agreed.structured);
                            assert!(brought == 0 || chunks, "data of a simple reply with an error");
                        }
                        self.replies.push((note, error));
                    }
                }
            }
        }
        Ok(())
    }

    fn bring(&mut self, note: usize, offset: u64, bytes: &[u8]) {
        for (at, &byte) in (offset..).zip(bytes) {
            assert!(self.data.entry(note).or_default().insert(at, byte).is_none(), "the same byte twice");
        }
    }
}

/// Listens to `stream`, of which at most `piece()` bytes come at once; they are those of a server that is asked what the
/// choices say.
fn listen(choices: &[u8], stream: &[u8], mut piece: impl FnMut(usize) -> usize) -> Understood {
    let commands: Vec<Command> = choices.iter().map(|&choice| Command::new(choice)).collect();
    let name = if choices.last() == Some(&NAMED) { "other" } else { "" };
    let session = Some(SessionName([WISHING; 16]));
    let wishes =
        if choices.last() == Some(&WISHING) { Wishes { structured: true, session } } else { Wishes::default() };
    let mut client = ClientSession::with_wishes(name.into(), wishes);
    let mut understood = Understood::default();
    let mut rest = stream;
    while !rest.is_empty() && understood.violation.is_none() {
        let (next, later) = rest.split_at(piece(rest.len()));
        rest = later;
        understood.violation = understood.hear(&mut client, &commands, next).err();
        understood.sent.extend(take_sent(&mut client, &mut piece));
    }
    let asked = commands.iter().filter(|command| understood.export.is_some() && command.kind != kind::DISC);
    assert_eq!(client.unanswered() + understood.replies.len(), asked.count(), "each reply answers one command");
    for (&number, data) in &understood.data {
        let Command { kind, length } = commands[number];
        let inside = data.keys().all(|at| (OFFSET..OFFSET + u64::from(length)).contains(at));
        assert!(kind == kind::READ && inside, "data that was not asked for");
    }
    for &number in understood.extents.keys() {
        assert!(commands[number].kind == kind::BLOCK_STATUS, "extents that were not asked for");
    }
    understood.end = client.explain_end();
    understood
}

/// A conversation from the client's side: a greeting, a negotiation and replies, cut up.
///
/// # Panics
/// When it matters how they are cut up, or when something is understood that was not asked for.
pub fn client(data: &[u8]) {
    let (mut choices, stream) = Choices::split(data);
    let asked = data.get(..CHOICES).unwrap_or(data);
    let whole = listen(asked, stream, |most| most);
    assert_eq!(listen(asked, stream, |_| 1), whole, "byte by byte");
    assert_eq!(listen(asked, stream, |most| choices.piece(most)), whole);
}
