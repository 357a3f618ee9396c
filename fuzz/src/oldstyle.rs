//! PURE: the oracle of a whole oldstyle session.

use super::choices::Choices;
use super::client::take_sent;
use super::drive::{converse, hear, Client, Server};
use super::export::{check_data, check_error, Pattern, PAYLOAD_MAX, POOLS, SIZE};
use flexnbd::proto::client::{ClientSession, Event};
use flexnbd::proto::error::Violation;
use flexnbd::proto::export::{Offer, Style};
use flexnbd::proto::server::{End, ServerSession};
use flexnbd::proto::wire::{kind, RequestHead, REQUEST_LEN, REQUEST_MAGIC};
use std::borrow::Cow;

/// The client that [`session`] talks to: it knows what was asked, and so what may come back.
struct Oracle {
    /// Each request is noted with itself.
    client: ClientSession<RequestHead>,
    /// All that it sends, and how much of it has been received.
    stream: Vec<u8>,
    said: usize,
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
        let mut this = Self { client, stream: Vec::new(), said: 0, end: Ok(End::EndOfStream), data_bytes: 0 };
        let mut enough = PAYLOAD_MAX;
        while let Some((bytes, rest)) = input.split_first_chunk::<REQUEST_LEN>() {
            let (magic, mut head) = RequestHead::parse(bytes);
            let broken = magic != REQUEST_MAGIC;
            if broken {
                // It is answered as one of a kind that nobody knows.
                head.kind = u16::MAX;
            }
            match head.kind {
                kind::DISC => this.client.disconnect(),
                _ => this.client.command(head.kind, head.flags, head.offset, head.length, head),
            }
            this.stream.extend(magic.to_be_bytes());
            this.stream.extend(take_sent(&mut this.client, |most| most).iter().skip(4));
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
                kind::READ if payload <= SIZE => {}
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
}

impl Client for Oracle {
    fn says(&self) -> Cow<'_, [u8]> {
        self.stream[self.said..].into()
    }

    fn said(&mut self, n: usize, _: u64) {
        self.said += n;
    }

    fn is_done(&self) -> bool {
        true
    }

    fn hear(&mut self, bytes: &[u8]) {
        let data_bytes = &mut self.data_bytes;
        let heard = hear(&mut self.client, bytes, |event| match event {
            Event::Export(Offer { size, .. }) => assert_eq!(size, SIZE),
            Event::Data { note, offset, bytes } => {
                assert_eq!(offset, note.offset + *data_bytes);
                check_data(bytes, offset);
                *data_bytes += bytes.len() as u64;
            }
            Event::Hole { .. } | Event::Extents { .. } => unreachable!("nobody wished for it"),
            Event::Reply { note, error } => {
                check_error(&note, error, Style::Oldstyle);
                let brings = if note.kind == kind::READ && error == 0 { note.length } else { 0 };
                assert_eq!(std::mem::take(data_bytes), u64::from(brings), "all of the data comes with a good reply");
            }
        });
        assert_eq!(heard, Ok(()));
    }
}

/// A conversation from the server's side: requests, cut up, against a disk that is slow and fails now and then.
///
/// # Panics
/// When anything comes out that is no right answer to what was asked, when the disk is asked for what cannot be, and
/// when the session holds too much, keeps memory for itself or gets stuck.
pub fn session(data: &[u8]) {
    let (mut choices, input) = Choices::split(data);
    let cap = POOLS[choices.next() % POOLS.len()];
    let mut oracle = Oracle::new(input, choices.next() % 2 == 0);
    let server = Server { begin: ServerSession::oldstyle, size: SIZE, cap };
    let (end, _) = converse(server, &mut oracle, &mut Pattern, &mut choices.schedule());
    if !matches!(end, Err(Violation::ReplyCutShort(_))) {
        assert_eq!(end, oracle.end);
    }
    if end.is_ok() {
        assert!(oracle.client.is_quiet(), "everything is answered to the end");
    }
}
