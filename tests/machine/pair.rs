//! A `ClientSession` against a `ServerSession`, as a [`Plan`] says.

use crate::disk::Faulty;
use crate::oracles::drive::{converse, hear, Client, Schedule, Server};
use crate::plan::Plan;
use flexnbd::proto::client::{ClientSession, Event};
use flexnbd::proto::error::Violation;
use flexnbd::proto::export::{Agreed, Export, Offer, Style};
use flexnbd::proto::server::request::Refusal;
use flexnbd::proto::server::{End, ServerSession, Tally, IN_FLIGHT_MAX};
use flexnbd::proto::wire::{GREETING_LEN, REQUEST_LEN};
use std::borrow::Cow;

/// A pool that never binds, in bytes.
pub const ROOMY: usize = 16 << 20;

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// By request: the error and the data, as far as they came.
    pub replies: Vec<Option<(u32, Vec<u8>)>>,
    /// All that the server sent.
    pub wire: Vec<u8>,
    pub disk: Vec<u8>,
    pub tally: Tally,
    pub end: Result<End, Violation>,
}

/// What the client has made of the bytes sent to it, and when it should have been served.
struct Listener<'a> {
    plan: &'a Plan,
    session: ClientSession<u64>,
    /// How much of the stream the server has received, in bytes.
    said: usize,
    /// When the first byte of each request was received, until its reply is complete.
    since_ms: Vec<Option<u64>>,
    complete: Vec<bool>,
    replies: Vec<Option<(u32, Vec<u8>)>>,
    wire: Vec<u8>,
}

impl Client for Listener<'_> {
    fn says(&self) -> Cow<'_, [u8]> {
        self.plan.stream[self.said..].into()
    }

    fn said(&mut self, n: usize, now_ms: u64) {
        let (from, to) = (self.said, self.said + n);
        for (ask, since_ms) in self.plan.asks.iter().zip(&mut self.since_ms) {
            if (from..to).contains(&ask.at) {
                *since_ms = Some(now_ms);
            }
            if !ask.is_answered() && to >= ask.at + REQUEST_LEN {
                *since_ms = None;
            }
        }
        self.said = to;
    }

    fn is_done(&self) -> bool {
        true
    }

    fn hear(&mut self, bytes: &[u8]) {
        self.wire.extend_from_slice(bytes);
        let heard = hear(&mut self.session, bytes, |event| match event {
            Event::Export(offer) => {
                let export =
                    Export { size: self.plan.before.len() as u64, read_only: false, flushes: true, several: true };
                let (flags, agreed) = (export.flags(Style::Oldstyle), Agreed::default());
                assert_eq!(offer, Offer { size: export.size, flags, agreed });
            }
            Event::Data { note: &cookie, bytes, .. } => {
                self.replies[index(cookie)].get_or_insert_default().1.extend_from_slice(bytes);
            }
            Event::Hole { .. } | Event::Extents { .. } => unreachable!("nobody wished for it"),
            Event::Reply { note: cookie, error } => {
                let reply = self.replies[index(cookie)].get_or_insert_default();
                assert!(reply.1.is_empty() || error == 0, "data of a READ that failed");
                reply.0 = error;
                self.since_ms[index(cookie)] = None;
                assert!(!std::mem::replace(&mut self.complete[index(cookie)], true), "answered twice");
            }
        });
        assert_eq!(heard, Ok(()), "the server speaks NBD");
    }

    fn refused(&mut self, refusal: &Refusal) {
        let ask = &self.plan.asks[index(refusal.head.cookie)];
        assert_eq!((ask.head, ask.error), (refusal.head, refusal.errno.to_wire()));
    }

    fn is_waited_for(&mut self, session: &ServerSession, opened_ms: u64) {
        let greeting = (self.wire.len() < GREETING_LEN).then_some(opened_ms);
        let oldest_ms = self.since_ms.iter().flatten().copied().chain(greeting).min();
        assert_eq!(session.oldest_ms(), oldest_ms, "what the killswitch sees");
        let taken = self.plan.asks.iter().take_while(|ask| ask.at + REQUEST_LEN <= self.said);
        let unanswered = taken.zip(&self.since_ms).filter(|(_, since_ms)| since_ms.is_some()).count();
        // The reply whose data is on its way does not count any more.
        assert!(unanswered <= IN_FLIGHT_MAX + 1, "{unanswered} are in flight or wait to be sent");
    }
}

fn index(cookie: u64) -> usize {
    usize::try_from(cookie).unwrap() - 1
}

/// Holds the conversation. The pool owns at most `cap` bytes besides reserve buffers.
pub fn run(plan: &Plan, cap: usize, schedule: &mut dyn Schedule) -> Outcome {
    let requests = plan.asks.len();
    let mut client = Listener {
        plan,
        session: plan.client(),
        said: 0,
        since_ms: vec![None; requests],
        complete: vec![false; requests],
        replies: vec![None; requests],
        wire: Vec::new(),
    };
    let mut disk = Faulty::new(plan.before.clone(), plan.asks.iter().map(|ask| (ask.head, ask.fault)));
    let server = Server { begin: ServerSession::oldstyle, size: plan.before.len() as u64, cap };
    let (end, tally) = converse(server, &mut client, &mut disk, schedule);
    for (ask, complete) in plan.asks.iter().zip(client.complete) {
        if complete && ask.error == 0 {
            disk.check_synced(ask.head.cookie);
        }
    }
    Outcome { replies: client.replies, wire: client.wire, disk: disk.bytes, tally, end }
}
