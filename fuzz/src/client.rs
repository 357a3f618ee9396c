//! PURE: the oracle of a client that listens to a hostile server.

use super::choices::Choices;
use super::drive::hear;
use super::CHOICES;
use flexnbd::buffer::Pool;
use flexnbd::proto::client::{ClientSession, Event};
use flexnbd::proto::error::Violation;
use flexnbd::proto::export::Offer;
use flexnbd::proto::outbox::PIECES_MAX;
use flexnbd::proto::wire::kind;
use std::io::IoSlice;

/// Takes what a client wants sent.
pub(super) fn take_sent<T>(client: &mut ClientSession<T>) -> Vec<u8> {
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
