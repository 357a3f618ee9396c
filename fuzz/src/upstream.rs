//! PURE: the oracle of what a proxy makes of a hostile server.
//!
//! The server says what the input says, over one connection after the other. What is asked of it, when a connection is cut
//! and which client leaves is a matter of the choices. An honest server comes last, with which everything has to end.

use super::choices::Choices;
use super::client::take_sent;
use super::drive::feed;
use flexnbd::buffer::Buffer;
use flexnbd::proto::client::{ClientSession, Event, Wishes};
use flexnbd::proto::export::{Offer, SessionName};
use flexnbd::proto::wire::{command, extent, kind, transmission};
use flexnbd::upstream::{Abilities, Asked, Command, Replay, Upstream, What, COMMANDS_MAX};
use flexnbd::work::{Action, Done, Extent, Op};
use std::ops::Range;

/// The export; a server with less is not used.
const SIZE: u64 = LANES * LANE;
/// Two operations of one kind that are under way lie in different lanes, by which their commands are told apart.
const LANES: u64 = 16;
/// How long a lane is, in bytes.
const LANE: u64 = 2048;
/// Room for a few writes.
const LIMIT: usize = 12 << 10;
/// Operations of one input.
const OPS_MAX: u32 = 64;
/// Operations that the honest server is asked for at the end, at most.
const LAST_OPS: usize = 32;
/// Commands of the honest server, after which it counts as asked for ever.
const ENOUGH: usize = 10_000;
/// Stands for [`Action::Verify`], which is no command.
const VERIFY: u16 = 0xFF;

/// An operation that is not done, and what became of it over the connection that is in use.
struct Open {
    owner: u64,
    tag: u32,
    kind: u16,
    range: Range<u64>,
    durable: bool,
    sent: usize,
    answered: usize,
    /// So much of the range was answered.
    bytes: u64,
    is_durable: bool,
    /// What a READ was told of each byte.
    got: Vec<Option<u8>>,
}

impl Open {
    fn restart(&mut self) {
        (self.sent, self.answered, self.bytes, self.is_durable) = (0, 0, 0, false);
        self.got.fill(None);
    }

    fn bring(&mut self, offset: u64, bytes: impl Iterator<Item = u8>) {
        for (at, byte) in (offset - self.range.start..).zip(bytes) {
            self.got[at as usize] = Some(byte);
        }
    }
}

/// Names an operation: its owner, its tag, and where its range begins.
type Id = (u64, u32, u64);

/// A command of this connection that is not answered.
struct Sent {
    asked: Asked,
    /// The operation it is for; `None` for those that nobody has submitted.
    open: Option<Id>,
    length: u32,
    durable: bool,
    is_map: bool,
    /// What a READ that nobody has submitted was told, where it begins.
    ahead: Option<(u64, Vec<Option<u8>>)>,
}

struct World {
    core: Upstream,
    session: Option<ClientSession<Asked>>,
    can: Option<Abilities>,
    told_flush: bool,
    open: Vec<Open>,
    sent: Vec<Sent>,
    /// Whom the commands of this connection are for, once the first one is known.
    known: Vec<(Asked, Id)>,
    /// What the server has said of each byte in answer to a READ that nobody has submitted, since it was changed last.
    ahead: Vec<Option<u8>>,
    /// Something is asked of the place where the last READ ended, at times.
    goes_on: bool,
    read_end: u64,
    ops: u32,
}

/// The connection is of no use any more.
struct Lost;

fn abilities(offer: Offer, length_max: u32) -> Abilities {
    let has = |flag| offer.has(flag);
    Abilities {
        size: SIZE,
        flush: has(transmission::SEND_FLUSH),
        fua: has(transmission::SEND_FUA),
        trim: has(transmission::SEND_TRIM),
        zero: has(transmission::SEND_WRITE_ZEROES),
        fast_zero: has(transmission::SEND_FAST_ZERO),
        cache: has(transmission::SEND_CACHE),
        map: offer.agreed.allocation,
        length_max,
    }
}

impl World {
    fn submit(&mut self, choices: &mut Choices) {
        let (choice, size) = (choices.next(), choices.next() as u64);
        if self.ops >= OPS_MAX {
            return;
        }
        self.ops += 1;
        let (owner, tag) = (u64::from(self.ops % 3), self.ops);
        let offset = if self.goes_on && choice & 0x20 != 0 {
            self.read_end % SIZE
        } else {
            u64::from(self.ops) * 5 % LANES * LANE + size % 8
        };
        let length = (1 + size * 7 % (LANE - 8)).min(LANE - offset % LANE);
        let durable = choice & 0x40 != 0;
        let payload = |length: u64| {
            let mut buffer = Buffer::with_capacity(length as usize);
            buffer.append(&vec![tag as u8; length as usize]);
            buffer
        };
        let (kind, action) = match choice % 11 {
            0 | 1 => (kind::WRITE, Action::Write { offset, payload: payload(length), fua: durable, follows: false }),
            2 if length > 1 => {
                (kind::WRITE, Action::Write { offset, payload: payload(length / 2), fua: false, follows: false })
            }
            3 => {
                (kind::WRITE_ZEROES, Action::Zero { offset, length, fua: durable, no_hole: size % 2 == 0, fast: false })
            }
            4 => (kind::WRITE_ZEROES, Action::Zero { offset, length, fua: durable, no_hole: false, fast: true }),
            5 => (kind::TRIM, Action::Trim { offset, length, fua: durable }),
            6 => (kind::FLUSH, Action::Flush),
            7 => (kind::CACHE, Action::Cache { offset, length }),
            8 => (kind::BLOCK_STATUS, Action::Map { offset, length, most: 1 + (size % 3) as usize }),
            9 if size > 250 => (VERIFY, Action::Verify { offset, length }),
            _ => {
                let buffer = Buffer::with_capacity(length as usize);
                (kind::READ, Action::Read { offset, length: length as usize, skip_hole: durable, buffer })
            }
        };
        let lane = |range: &Range<u64>| if kind == kind::FLUSH { 0 } else { range.start / LANE };
        let range = if kind == kind::FLUSH { 0..0 } else { offset..offset + length };
        if self.open.iter().any(|open| open.kind == kind && lane(&open.range) == lane(&range)) {
            return;
        }
        // A long WRITE comes in parts, the last of which may be durable.
        if let Action::Write { payload: first, fua: false, .. } = &action {
            let at = offset + first.len() as u64;
            if at < range.end {
                self.ask(owner, tag, kind, range.start..at, false, action);
                let action =
                    Action::Write { offset: at, payload: payload(range.end - at), fua: durable, follows: true };
                return self.ask(owner, tag, kind, at..range.end, durable, action);
            }
        }
        let durable = action.wants_sync();
        self.ask(owner, tag, kind, range, durable, action);
    }

    fn ask(&mut self, owner: u64, tag: u32, kind: u16, range: Range<u64>, durable: bool, action: Action) {
        let got = if kind == kind::READ { vec![None; (range.end - range.start) as usize] } else { Vec::new() };
        let (sent, answered, bytes, is_durable) = (0, 0, 0, false);
        if kind == kind::READ {
            self.read_end = range.end;
        }
        if let Some(range) = action.touches() {
            self.ahead[range.start as usize..range.end as usize].fill(None);
            for (start, told) in self.sent.iter_mut().filter_map(|sent| sent.ahead.as_mut()) {
                // It may be read before the change or after it.
                let is_changed = overlap(&range, &(*start..*start + told.len() as u64));
                told.truncate(if is_changed { 0 } else { told.len() });
            }
        }
        self.open.push(Open { owner, tag, kind, range, durable, sent, answered, bytes, is_durable, got });
        self.core.submit(Op { owner, tag, action });
    }

    fn find(&mut self, (owner, tag, start): Id) -> Option<&mut Open> {
        self.open.iter_mut().find(|open| (open.owner, open.tag, open.range.start) == (owner, tag, start))
    }

    /// The next command, with whom it is for.
    fn next_command(&mut self) -> Option<Command> {
        let (replays, before) = (self.core.is_replaying(), self.core.counts());
        let command = self.core.next_command()?;
        // What ended without the server has ended before this.
        while let Some(done) = self.core.pop_done() {
            self.done(&done);
        }
        let (own, ahead) = (self.core.counts().own_flushes, self.core.counts().reads_ahead);
        let can = self.can.expect("nothing is asked while nobody is there");
        let is_zero = |bytes: &Buffer| bytes.filled().iter().all(|&byte| byte == 0);
        let kind = match command.what {
            What::Read => kind::READ,
            What::Write if command.payload.as_ref().is_some_and(|bytes| is_zero(bytes)) => kind::WRITE_ZEROES,
            What::Write => kind::WRITE,
            What::Zero { .. } => kind::WRITE_ZEROES,
            What::Trim => kind::TRIM,
            What::Flush => kind::FLUSH,
            What::Cache => kind::CACHE,
            What::Map { .. } => kind::BLOCK_STATUS,
        };
        let may = match command.what {
            What::Read | What::Write => true,
            What::Zero { fast, .. } => can.zero && (can.fast_zero || !fast),
            What::Trim => can.trim,
            What::Flush => can.flush,
            What::Cache => can.cache,
            What::Map { .. } => can.map,
        };
        assert!(may && (can.fua || !command.fua), "the server does not know it");
        let asked = command.asked;
        let range = command.offset..command.offset + u64::from(command.length);
        let mut told = None;
        let open = if ahead > before.reads_ahead {
            let changes =
                self.open.iter().filter(|open| matches!(open.kind, kind::WRITE | kind::WRITE_ZEROES | kind::TRIM));
            assert!(!replays && range.end <= SIZE && changes.into_iter().all(|open| !overlap(&open.range, &range)));
            assert!(command.what == What::Read && !self.sent.iter().any(|sent| sent.ahead.is_some()), "one at a time");
            told = Some((range.start, vec![None; command.length as usize]));
            None
        } else if replays || own > before.own_flushes {
            None
        } else if let Some(&(_, id)) = self.known.iter().find(|known| known.0 == asked) {
            Some(id)
        } else {
            let at = command.offset;
            let mine = |open: &&Open| open.kind == kind && (kind == kind::FLUSH || open.range.contains(&at));
            let open = self.open.iter().find(mine).expect("it is for an operation");
            let id = (open.owner, open.tag, open.range.start);
            self.known.push((asked, id));
            Some(id)
        };
        if let Some(open) = open.and_then(|id| self.find(id)) {
            open.sent += 1;
        }
        let durable = command.fua || command.what == What::Flush;
        let is_map = matches!(command.what, What::Map { .. });
        self.sent.push(Sent { asked, open, length: command.length, durable, is_map, ahead: told });
        Some(command)
    }

    /// Asks what there is to ask, over the connection.
    fn send(&mut self, mut piece: impl FnMut(usize) -> usize, leaves: bool) {
        while let Some(Command { asked, what, fua, offset, length, payload }) = self.next_command() {
            let Some(session) = &mut self.session else { return };
            let (kind, flags) = match what {
                What::Read => (kind::READ, 0),
                What::Write => (kind::WRITE, 0),
                What::Zero { no_hole, .. } => (kind::WRITE_ZEROES, if no_hole { command::NO_HOLE } else { 0 }),
                What::Trim => (kind::TRIM, 0),
                What::Flush => (kind::FLUSH, 0),
                What::Cache => (kind::CACHE, 0),
                What::Map { one } => (kind::BLOCK_STATUS, if one { command::REQ_ONE } else { 0 }),
            };
            session.command(kind, flags | if fua { command::FUA } else { 0 }, offset, length, asked);
            if let Some(payload) = payload {
                session.push_shared(payload);
            }
        }
        if let Some(session) = self.session.as_mut().filter(|_| leaves) {
            take_sent(session, &mut piece);
        }
        self.take_done();
    }

    /// What the server says next.
    fn hear(&mut self, mut bytes: &[u8], length_max: u32) -> Result<(), Lost> {
        let mut session = self.session.take().ok_or(Lost)?;
        while !bytes.is_empty() {
            bytes = feed(&mut session, bytes);
            while let Some(event) = session.next_event().map_err(|_| Lost)? {
                match event {
                    Event::Export(offer) => self.greeted(offer, length_max)?,
                    Event::Data { note, offset, bytes } => {
                        self.told(*note, offset, bytes.iter().copied());
                        self.core.data(*note, offset, bytes);
                    }
                    Event::Hole { note, offset, length } => {
                        self.told(*note, offset, std::iter::repeat_n(0, length as usize));
                        self.core.hole(*note, &(offset..offset + u64::from(length)));
                    }
                    Event::Extents { note, descriptors } => {
                        for found in descriptors {
                            self.core.extent(*note, found.length.into(), found.flags & extent::HOLE_ZERO != 0);
                        }
                    }
                    Event::Reply { note, error } => self.answered(note, error)?,
                }
                assert!(session.unanswered() <= COMMANDS_MAX && session.unanswered() == self.sent.len());
            }
        }
        self.session = Some(session);
        Ok(())
    }

    fn greeted(&mut self, offer: Offer, length_max: u32) -> Result<(), Lost> {
        let can = abilities(offer, length_max);
        if offer.size < SIZE || offer.has(transmission::READ_ONLY) || self.told_flush && !can.flush {
            return Err(Lost);
        }
        self.told_flush = can.flush;
        self.can = Some(can);
        self.core.connected(can);
        Ok(())
    }

    /// Some bytes of a READ are known.
    fn told(&mut self, asked: Asked, offset: u64, bytes: impl Iterator<Item = u8>) {
        let sent = self.sent.iter_mut().find(|sent| sent.asked == asked).expect("it was asked");
        if let Some((start, told)) = &mut sent.ahead {
            let place = (offset - *start) as usize..;
            told.get_mut(place).into_iter().flatten().zip(bytes).for_each(|(told, byte)| *told = Some(byte));
            return;
        }
        let id = sent.open;
        if let Some(open) = id.and_then(|id| self.find(id)) {
            open.bring(offset, bytes);
        }
    }

    fn answered(&mut self, asked: Asked, error: u32) -> Result<(), Lost> {
        let at = self.sent.iter().position(|sent| sent.asked == asked).expect("it was asked");
        let Sent { open, length, durable, is_map, ahead, .. } = self.sent.remove(at);
        if let Some((start, told)) = ahead.filter(|_| error == 0) {
            self.ahead[start as usize..][..told.len()].copy_from_slice(&told);
        }
        if let Some(open) = open.filter(|_| error == 0).and_then(|id| self.find(id)) {
            open.answered += 1;
            open.bytes += if is_map { open.range.end - open.range.start } else { u64::from(length) };
            open.is_durable |= durable;
        }
        self.core.reply(asked, error).map_err(|_| Lost)?;
        self.take_done();
        Ok(())
    }

    fn take_done(&mut self) {
        while let Some(done) = self.core.pop_done() {
            self.done(&done);
        }
        assert!(self.core.dirty_bytes() <= self.core.limit(), "what is kept is bounded");
        assert!(self.core.in_flight() == self.sent.len(), "each command is answered once");
    }

    fn done(&mut self, done: &Done) {
        let is_it = |open: &Open| {
            (open.owner, open.tag) == (done.owner, done.tag)
                && done.touched.as_ref().is_none_or(|range| *range == open.range)
        };
        let at = self.open.iter().position(is_it).expect("it was submitted, and is done once");
        let open = self.open.remove(at);
        let brings_back = matches!(open.kind, kind::READ | kind::WRITE);
        assert!(done.buffer.is_some() == brings_back, "memory comes back, also without an answer");
        if done.result.is_err() {
            return;
        }
        let can = self.can.expect("nothing is done well while nobody is there");
        let length = open.range.end - open.range.start;
        let is_asked = match open.kind {
            kind::TRIM => can.trim,
            kind::CACHE => can.cache,
            kind::BLOCK_STATUS => can.map,
            VERIFY => false,
            _ => true,
        };
        let is_ahead = open.kind == kind::READ && open.sent == 0;
        if is_asked && !is_ahead {
            let has_all = open.sent > 0 && open.sent == open.answered && open.bytes >= length;
            assert!(has_all, "done without all of its replies");
            assert!(open.is_durable || !open.durable, "not durable");
        }
        match open.kind {
            kind::READ => {
                let hole: u64 = done.extents.iter().map(Extent::length).sum();
                let mut read = vec![0; hole as usize];
                read.extend(done.buffer.iter().flat_map(Buffer::filled));
                let got =
                    if is_ahead { &self.ahead[open.range.start as usize..open.range.end as usize] } else { &open.got };
                let told: Option<Vec<u8>> = got.iter().copied().collect();
                assert_eq!(Some(read), told, "what is read is what the server has said");
            }
            kind::BLOCK_STATUS => {
                let mut at = open.range.start;
                for found in &done.extents {
                    assert!(found.range.start == at && !found.range.is_empty() && found.range.end <= open.range.end);
                    at = found.range.end;
                }
                assert!(at > open.range.start, "an answer says something");
            }
            _ => {}
        }
    }

    fn lose(&mut self) {
        // Payloads that have not left go with the connection.
        (self.session, self.can) = (None, None);
        self.sent.clear();
        self.known.clear();
        self.ahead.fill(None);
        self.open.iter_mut().for_each(Open::restart);
        self.core.lost();
        self.take_done();
    }

    /// A server that answers everything, one command after the other, until nothing is left to ask; then it is asked for more,
    /// one operation at a time.
    fn come_to_rest(&mut self, choices: &mut Choices) {
        self.lose();
        let can = Abilities {
            size: SIZE,
            flush: true,
            fua: self.ops % 2 == 0,
            trim: true,
            zero: self.ops % 3 == 0,
            fast_zero: false,
            cache: true,
            map: true,
            length_max: 700,
        };
        self.can = Some(can);
        self.core.connected(can);
        self.core.settle(false);
        self.serve();
        for _ in 0..LAST_OPS {
            self.submit(choices);
            self.serve();
        }
        self.core.settle(true);
        self.serve();
        assert!(self.core.is_settled(), "nothing is left to lose");
    }

    fn serve(&mut self) {
        for step in 0.. {
            assert!(step < ENOUGH, "asked for ever");
            let Some(Command { asked, what, offset, length, payload, .. }) = self.next_command() else {
                if !self.core.has_done() {
                    break;
                }
                // What waited for what has ended without the server goes on.
                self.take_done();
                continue;
            };
            drop(payload);
            if what == What::Read {
                let bytes: Vec<u8> = (self.ops..).take(length as usize).map(|byte| byte as u8).collect();
                self.told(asked, offset, bytes.iter().copied());
                self.core.data(asked, offset, &bytes);
            }
            assert!(self.answered(asked, 0).is_ok(), "an honest server does nothing wrong");
        }
        assert!(self.open.is_empty() && self.core.is_empty(), "everything ends");
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// What a proxy does with what servers say, one connection after the other.
///
/// # Panics
/// When something is done that no server has answered, when what is read is not what was said, when too much is kept, and
/// when an honest server cannot end it.
pub fn upstream(data: &[u8]) {
    let (mut choices, mut stream) = Choices::split(data);
    let first = choices.next();
    let replay = if first & 7 == 7 { Replay::Unanswered } else { Replay::Dirty };
    let length_max = if first & 8 == 0 { 32 << 20 } else { 600 };
    let goes_on = first & 64 != 0;
    let read_ahead = if goes_on { LANE as usize * 3 } else { 0 };
    let mut world = World {
        core: Upstream::new(replay, LIMIT, read_ahead),
        session: None,
        can: None,
        told_flush: false,
        open: Vec::new(),
        sent: Vec::new(),
        known: Vec::new(),
        ahead: vec![None; SIZE as usize],
        goes_on,
        read_end: 0,
        ops: 0,
    };
    while !stream.is_empty() {
        if world.session.is_none() {
            let session = (first & 16 == 0).then_some(SessionName([0xFE; 16]));
            let wishes = Wishes { structured: first & 32 == 0, session };
            world.session = Some(ClientSession::with_wishes(String::new(), wishes));
        }
        for _ in 0..choices.next() % 4 {
            world.submit(&mut choices);
        }
        let leaves = choices.next() < 0xF0;
        world.send(|most| choices.piece(most), leaves);
        let (next, later) = stream.split_at(choices.piece(stream.len()));
        stream = later;
        let act = choices.next();
        if world.hear(next, length_max).is_err() || act == 0xFF {
            world.lose();
        }
        match act {
            0xF0..=0xF2 => world.core.forget((act - 0xF0) as u64),
            0xF3 | 0xF4 => world.core.settle(act == 0xF3),
            0xF5 => world.core.flush(),
            _ => {}
        }
        world.take_done();
    }
    world.come_to_rest(&mut choices);
}
