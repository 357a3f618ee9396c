//! Another server as the place where an image is, against a shadow of it: a server with a volatile cache that executes
//! what it is asked in any order, answers in any order, is killed, loses its machine with a part of what was not flushed,
//! fails and comes back able to do other things. After every step each byte is held to the promises of
//! [`flexnbd::upstream`].
//!
//! `FLEXNBD_SEED` and `FLEXNBD_SEEDS` are as for the other simulations.

use crate::random::Random;
use flexnbd::buffer::Buffer;
use flexnbd::upstream::{Abilities, Asked, Command, Fault, Replay, Upstream, What};
use flexnbd::work::{Action, Done, Extent, Op};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::thread;

/// How many histories there are in one run of the tests, unless `FLEXNBD_SEEDS` says otherwise.
const SEEDS: u64 = 2_000;
/// A cell has one value, which says who wrote it.
const CELL: u64 = 512;
const CELL_BYTES: usize = 512;
const _: () = assert!(CELL == CELL_BYTES as u64);
/// What a machine that fails forgets or keeps as a whole, in cells.
const PAGE: usize = 8;
const CELLS: usize = 64;
/// Room for a few of the longest writes.
const LIMIT: usize = 48 << 10;
const LONGEST: u64 = 12;

/// Says which seed it was when a test fails.
struct Again(u64);

impl Drop for Again {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("to run it again: FLEXNBD_SEED={} cargo test --test simulation histories", self.0);
        }
    }
}

/// A value that a cell has been given, and when: submitted and answered.
#[derive(Debug, Clone, Copy)]
struct Written {
    value: u32,
    submitted: u64,
    answered: u64,
    /// It is there for certain once it is answered. A TRIM is not, nor what has failed.
    counts: bool,
    /// From then on anything may be there that was there before.
    is_trim: bool,
    /// Since when it is durable for certain.
    durable: u64,
    /// Since when somebody has read it, so that it cannot be done later any more.
    seen: u64,
}

const NEVER: u64 = u64::MAX;

/// What was asked of the core and is not done.
#[derive(Debug, Clone)]
struct Open {
    kind: Kind,
    cells: Range<usize>,
    submitted: u64,
    value: u32,
    fua: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Zero,
    Trim,
    Flush,
    Other,
}

/// A command that the server has.
struct Pending {
    command: Command,
    is_executed: bool,
    /// What it read when it was executed.
    read: Vec<u32>,
    error: u32,
}

struct World {
    random: Random,
    core: Upstream,
    now: u64,
    volatile: Vec<u32>,
    durable: Vec<u32>,
    can: Option<Abilities>,
    pending: Vec<Pending>,
    history: Vec<Vec<Written>>,
    open: BTreeMap<(u64, u32), Open>,
    /// Requests of which a part has failed.
    failed: BTreeSet<(u64, u32)>,
    next_tag: u32,
    next_value: u32,
    /// Owners that are gone, whose operations nobody hears of.
    gone: Vec<u64>,
    next_owner: u64,
    owners: Vec<u64>,
    /// Clients that often go on reading where somebody has stopped, in this cell; `None` where nothing is read ahead.
    goes_on_at: Option<u64>,
    faults: u64,
    log: Vec<String>,
}

fn payload(value: u32, cells: usize) -> Buffer {
    let mut buffer = Buffer::with_capacity(cells * CELL_BYTES);
    buffer.append(&value.to_le_bytes().repeat(cells * CELL_BYTES / 4));
    buffer
}

fn cells_of(offset: u64, length: u64) -> Range<usize> {
    assert_eq!((offset % CELL, length % CELL), (0, 0));
    usize::try_from(offset / CELL).unwrap()..usize::try_from((offset + length) / CELL).unwrap()
}

/// True when a cell may have this value, of all that were written, where those that `stay` are there for certain. What was
/// read before something newer was asked for has been done before that, answered or not, and is not done twice.
fn may_be(history: &[Written], value: u32, stays: impl Fn(&Written) -> bool) -> bool {
    let is_old = |old: &Written| {
        history.iter().any(|new| new.counts && stays(new) && new.submitted > old.answered.min(old.seen))
    };
    let is_trimmed =
        |old: &Written| history.iter().any(|trim| trim.is_trim && trim.submitted > old.submitted && !is_old(trim));
    history.iter().any(|written| written.value == value && (!is_old(written) || is_trimmed(written)))
}

impl World {
    fn new(seed: u64) -> Self {
        let first = Written { value: 0, submitted: 0, answered: 0, counts: true, is_trim: false, durable: 0, seen: 0 };
        let mut random = Random::new(seed ^ 0x0ff_5e7);
        let faults = random.pick(&[0, 0, 10, 40]);
        let read_ahead = random.pick(&[0, 3 << 10, 8 << 10, 20 << 10]);
        Self {
            random,
            core: Upstream::new(Replay::Dirty, LIMIT, read_ahead),
            now: 1,
            volatile: vec![0; CELLS],
            durable: vec![0; CELLS],
            can: None,
            pending: Vec::new(),
            history: vec![vec![first]; CELLS],
            open: BTreeMap::new(),
            failed: BTreeSet::new(),
            next_tag: 0,
            next_value: 1,
            gone: Vec::new(),
            next_owner: 4,
            owners: vec![1, 2, 3],
            goes_on_at: (read_ahead > 0).then_some(0),
            faults,
            log: Vec::new(),
        }
    }

    fn say(&mut self, what: String) {
        self.log.push(what);
    }

    // Clients.

    fn submit(&mut self) {
        let owner = self.random.pick(&self.owners.clone());
        let goes_on_at = self.goes_on_at.filter(|&at| at < CELLS as u64 && self.random.one_in(2));
        let (start, length) = if let Some(at) = goes_on_at {
            (at, self.random.within(1..4).min(CELLS as u64 - at))
        } else {
            let length = self.random.within(1..LONGEST + 1);
            // Some places are used again and again.
            let is_usual = self.random.one_in(2);
            (self.random.below(if is_usual { 8 } else { CELLS as u64 - length }), length)
        };
        let (offset, length) = (start * CELL, length * CELL);
        let cells = cells_of(offset, length);
        let fua = self.random.one_in(4);
        self.next_tag += 1;
        let tag = self.next_tag;
        let value = self.next_value;
        let choice = if goes_on_at.is_some() { 15 } else { self.random.below(16) };
        let (kind, action) = match choice {
            0..=5 => {
                self.next_value += 1;
                if cells.len() > 2 && self.random.one_in(3) {
                    // One request in two parts: the second brings FUA for both.
                    let half = cells.len() / 2;
                    let first = cells.start..cells.start + half;
                    let action = Action::Write { offset, payload: payload(value, half), fua: false, follows: false };
                    self.ask(owner, tag, action, Open { kind: Kind::Write, cells: first, submitted: 0, value, fua });
                    let rest = cells.start + half..cells.end;
                    let offset = rest.start as u64 * CELL;
                    let action = Action::Write { offset, payload: payload(value, rest.len()), fua, follows: true };
                    self.next_tag += 1;
                    let open = Open { kind: Kind::Write, cells: rest, submitted: 0, value, fua };
                    return self.ask_second(owner, tag, action, open);
                }
                (Kind::Write, Action::Write { offset, payload: payload(value, cells.len()), fua, follows: false })
            }
            6 => (Kind::Zero, Action::Zero { offset, length, fua, no_hole: self.random.one_in(2), fast: false }),
            7 => (Kind::Trim, Action::Trim { offset, length, fua }),
            8..=9 => (Kind::Flush, Action::Flush),
            10 => {
                let fast = Action::Zero { offset, length, fua, no_hole: false, fast: true };
                (Kind::Zero, fast)
            }
            11 if self.random.one_in(2) => (Kind::Other, Action::Cache { offset, length }),
            11 => (Kind::Other, Action::Map { offset, length, most: self.random.pick(&[1, 3]) }),
            _ => {
                self.goes_on_at = self.goes_on_at.map(|_| start + length / CELL);
                let buffer = Buffer::with_capacity(usize::try_from(length).unwrap());
                let skip_hole = self.random.one_in(2);
                let action = Action::Read { offset, length: usize::try_from(length).unwrap(), skip_hole, buffer };
                (Kind::Read, action)
            }
        };
        let value = if kind == Kind::Write { value } else { 0 };
        self.ask(owner, tag, action, Open { kind, cells, submitted: 0, value, fua });
    }

    fn ask(&mut self, owner: u64, tag: u32, action: Action, open: Open) {
        self.note(&open);
        self.say(format!(
            "{} submit {owner}/{tag} {:?} {:?} value {} fua {}",
            self.now, open.kind, open.cells, open.value, open.fua
        ));
        self.open.insert((owner, tag), Open { submitted: self.now, ..open });
        self.core.submit(Op { owner, tag, action });
    }

    /// The second part of a request has the tag of the first, as sessions give it; here it is told apart by its range.
    fn ask_second(&mut self, owner: u64, tag: u32, action: Action, open: Open) {
        self.note(&open);
        self.say(format!("{} submit {owner}/{tag} second part {:?} value {}", self.now, open.cells, open.value));
        self.open.insert((owner, tag | SECOND), Open { submitted: self.now, ..open });
        self.core.submit(Op { owner, tag, action });
    }

    fn note(&mut self, open: &Open) {
        self.now += 1;
        if matches!(open.kind, Kind::Write | Kind::Zero | Kind::Trim) {
            for cell in open.cells.clone() {
                self.history[cell].push(Written {
                    value: open.value,
                    submitted: self.now,
                    answered: NEVER,
                    counts: false,
                    is_trim: open.kind == Kind::Trim,
                    durable: NEVER,
                    seen: NEVER,
                });
            }
        }
    }

    fn leave(&mut self) {
        let at = usize::try_from(self.random.below(3)).unwrap();
        let owner = std::mem::replace(&mut self.owners[at], self.next_owner);
        self.next_owner += 1;
        self.say(format!("{} owner {owner} leaves", self.now));
        self.core.forget(owner);
        self.gone.push(owner);
    }

    fn take_done(&mut self) {
        while let Some(done) = self.core.pop_done() {
            self.done(done);
        }
    }

    fn done(&mut self, done: Done) {
        self.now += 1;
        let Done { owner, tag, touched, result, buffer, extents } = done;
        let is_second = |open: &Open, range: &Range<u64>| open.cells == cells_of(range.start, range.end - range.start);
        let key = match &touched {
            Some(range) if self.open.get(&(owner, tag | SECOND)).is_some_and(|open| is_second(open, range)) => {
                (owner, tag | SECOND)
            }
            _ => (owner, tag),
        };
        let open = self.open.remove(&key).expect("it was asked, once");
        self.say(format!("{} done {owner}/{tag} {:?} {:?} {result:?}", self.now, open.kind, open.cells));
        if self.gone.contains(&owner) {
            return self.settle_history(&open, false);
        }
        match open.kind {
            Kind::Read => {
                assert!(buffer.is_some(), "its memory comes back");
                if result.is_ok() {
                    let mut bytes = vec![0; open.cells.len() * CELL_BYTES];
                    let hole: u64 = extents.iter().map(Extent::length).sum();
                    let buffer = buffer.unwrap();
                    bytes[usize::try_from(hole).unwrap()..].copy_from_slice(buffer.filled());
                    self.check_read(&open, &bytes);
                }
            }
            Kind::Write => {
                assert!(buffer.is_some(), "its memory comes back");
                self.settle_history(&open, result.is_ok());
                let has_other = self.open.contains_key(&(owner, tag)) || self.open.contains_key(&(owner, tag | SECOND));
                if result.is_err() {
                    self.failed.insert((owner, tag));
                }
                if open.fua && !self.failed.contains(&(owner, tag)) && !has_other {
                    self.durable(&open);
                }
            }
            Kind::Zero | Kind::Trim => {
                self.settle_history(&open, result.is_ok() && open.kind == Kind::Zero);
                if open.fua && result.is_ok() && open.kind == Kind::Zero {
                    self.durable(&open);
                }
            }
            Kind::Flush if result.is_ok() => {
                for written in self.history.iter_mut().flatten() {
                    if written.answered < open.submitted {
                        written.durable = written.durable.min(self.now);
                    }
                }
            }
            Kind::Flush | Kind::Other => {}
        }
    }

    /// What was submitted then, has been answered now.
    fn settle_history(&mut self, open: &Open, counts: bool) {
        if !matches!(open.kind, Kind::Write | Kind::Zero | Kind::Trim) {
            return;
        }
        for cell in open.cells.clone() {
            for written in &mut self.history[cell] {
                if (written.value, written.submitted) == (open.value, open.submitted) {
                    (written.answered, written.counts) = (self.now, counts);
                }
            }
        }
    }

    /// What was answered with FUA, and every other part of its request.
    fn durable(&mut self, open: &Open) {
        for written in self.history.iter_mut().flatten() {
            let is_part = open.value != 0 && written.value == open.value;
            if (is_part || written.submitted == open.submitted) && written.counts {
                written.durable = self.now;
            }
        }
    }

    /// Promise 1: nothing is read that was not there between the question and the answer.
    fn check_read(&mut self, open: &Open, bytes: &[u8]) {
        for (cell, bytes) in open.cells.clone().zip(bytes.chunks(CELL_BYTES)) {
            let value = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            assert!(bytes.chunks(4).all(|word| word == value.to_le_bytes()), "a cell is whole");
            let history = &mut self.history[cell];
            let was_there = may_be(history, value, |new| new.answered < open.submitted);
            assert!(was_there, "cell {cell} reads as {value}: {history:#?}");
            // Many have written zero.
            for written in history.iter_mut().filter(|written| value != 0 && written.value == value) {
                written.seen = written.seen.min(self.now);
            }
        }
    }

    /// Promises 2 and 3: what is durable for certain is there, or something newer.
    fn check_durable(&self) {
        for (cell, (&value, history)) in self.durable.iter().zip(&self.history).enumerate() {
            let may_be = may_be(history, value, |new| new.durable <= self.now);
            assert!(may_be, "cell {cell} is {value} on the disk: {history:#?}");
        }
        assert!(self.core.dirty_bytes() <= self.core.limit(), "the map is bounded");
    }

    // The server.

    fn connect(&mut self) {
        let mut can = Abilities {
            size: CELLS as u64 * CELL,
            flush: true,
            fua: self.random.one_in(2),
            trim: self.random.one_in(2),
            zero: self.random.one_in(2),
            fast_zero: self.random.one_in(2),
            cache: self.random.one_in(2),
            map: self.random.one_in(2),
            length_max: self.random.pick(&[8 << 10, 1 << 20]),
        };
        can.fast_zero &= can.zero;
        self.say(format!("{} connected {can:?}", self.now));
        self.can = Some(can);
        self.core.connected(can);
    }

    fn send(&mut self) {
        for _ in 0..self.random.within(1..8) {
            let Some(mut command) = self.core.next_command() else { break };
            let can = self.can.expect("nothing is asked while nobody is there");
            match command.what {
                What::Zero { fast, .. } => assert!(can.zero && (can.fast_zero || !fast)),
                What::Trim => assert!(can.trim),
                What::Cache => assert!(can.cache),
                What::Map { .. } => assert!(can.map),
                What::Read | What::Write | What::Flush => {}
            }
            assert!(!command.fua || can.fua);
            // The socket has a copy; what the core keeps is its own again.
            command.payload = command.payload.map(|bytes| {
                let mut copy = Buffer::with_capacity(bytes.len());
                copy.append(bytes.filled());
                Rc::new(copy)
            });
            self.say(format!(
                "{} command {:?} {:?} fua {} at {} {}",
                self.now, command.asked, command.what, command.fua, command.offset, command.length
            ));
            let error = if self.random.one_in(self.faults) { self.random.pick(&[5, 28, 108]) } else { 0 };
            self.pending.push(Pending { command, is_executed: false, read: Vec::new(), error });
        }
        self.take_done();
    }

    fn execute(&mut self, at: usize) {
        let partly = self.pending[at].error != 0;
        let Pending { command, is_executed, read, .. } = &mut self.pending[at];
        if *is_executed {
            return;
        }
        *is_executed = true;
        let cells = cells_of(command.offset, command.length.into());
        match command.what {
            What::Read => *read = self.volatile[cells].to_vec(),
            What::Write => {
                let bytes = command.payload.as_ref().unwrap().filled().to_vec();
                for (cell, bytes) in cells.clone().zip(bytes.chunks(CELL_BYTES)) {
                    if !partly || self.random.one_in(2) {
                        self.volatile[cell] = u32::from_le_bytes(bytes[..4].try_into().unwrap());
                    }
                }
            }
            What::Zero { .. } => self.volatile[cells.clone()].fill(0),
            What::Trim if self.random.one_in(2) => self.volatile[cells.clone()].fill(0),
            What::Flush if !partly => self.durable.clone_from(&self.volatile),
            What::Trim | What::Flush | What::Cache | What::Map { .. } => return,
        }
        let Pending { command, .. } = &self.pending[at];
        if command.fua && !partly {
            let cells = cells_of(command.offset, command.length.into());
            self.durable[cells.clone()].copy_from_slice(&self.volatile[cells]);
        }
    }

    fn answer(&mut self, at: usize) {
        self.execute(at);
        let Pending { command, read, error, .. } = self.pending.swap_remove(at);
        let Command { asked, what, offset, length, .. } = command;
        drop(command.payload);
        self.say(format!("{} answer {asked:?} {error}", self.now));
        if error == 0 {
            self.answer_data(asked, what, offset, length.into(), &read);
        }
        match self.core.reply(asked, error) {
            Ok(()) => {}
            Err(Fault::Early) => panic!("the payload was gone"),
            Err(Fault::Leaves | Fault::Replay(_)) => self.disconnect(),
        }
        self.take_done();
    }

    fn answer_data(&mut self, asked: Asked, what: What, offset: u64, length: u64, read: &[u32]) {
        match what {
            What::Read => {
                let mut chunks: Vec<(u64, Vec<u32>)> = read
                    .chunk_by(|a, b| (*a == 0) == (*b == 0))
                    .scan(offset, |at, chunk| {
                        let start = *at;
                        *at += chunk.len() as u64 * CELL;
                        Some((start, chunk.to_vec()))
                    })
                    .collect();
                if self.random.one_in(2) {
                    chunks.reverse();
                }
                for (start, values) in chunks {
                    let end = start + values.len() as u64 * CELL;
                    if values[0] == 0 && self.random.one_in(2) {
                        self.core.hole(asked, &(start..end));
                    } else {
                        let bytes: Vec<u8> =
                            values.iter().flat_map(|value| value.to_le_bytes().repeat(CELL_BYTES / 4)).collect();
                        self.core.data(asked, start, &bytes);
                    }
                }
            }
            What::Map { .. } if self.random.one_in(2) => self.core.extent(asked, length + CELL, true),
            _ => {}
        }
    }

    fn disconnect(&mut self) {
        self.pending.clear();
        self.can = None;
        self.core.lost();
        self.take_done();
    }

    /// The server ends. What it was asked it has done, or not, or in part; its machine goes on, or forgets.
    fn end(&mut self, machine_fails: bool) {
        self.say(format!("{} the server ends, its machine too: {machine_fails}", self.now));
        for at in 0..self.pending.len() {
            match self.random.below(4) {
                0 => self.execute(at),
                1 => {
                    self.pending[at].error = 5;
                    self.execute(at);
                }
                _ => {}
            }
        }
        if machine_fails {
            for page in (0..CELLS).step_by(PAGE) {
                if self.random.one_in(2) {
                    self.durable[page..page + PAGE].copy_from_slice(&self.volatile[page..page + PAGE]);
                }
            }
            self.volatile.clone_from(&self.durable);
        }
        if self.can.is_some() {
            self.disconnect();
        }
    }

    fn step(&mut self) {
        match self.random.below(60) {
            0 => self.end(true),
            1 => self.end(false),
            2 => self.leave(),
            3..=6 if self.can.is_none() => self.connect(),
            7..=22 => self.submit(),
            23..=39 if self.can.is_some() => self.send(),
            40..=48 if !self.pending.is_empty() => {
                let at = usize::try_from(self.random.below(self.pending.len() as u64)).unwrap();
                self.execute(at);
            }
            _ if !self.pending.is_empty() => {
                let at = usize::try_from(self.random.below(self.pending.len() as u64)).unwrap();
                self.answer(at);
            }
            _ => {}
        }
        self.take_done();
        self.check_durable();
    }

    /// The server does what it is asked, without an error.
    fn serve_well(&mut self) {
        if self.can.is_none() {
            self.connect();
        }
        self.send();
        self.pending.iter_mut().filter(|pending| !pending.is_executed).for_each(|pending| pending.error = 0);
        while !self.pending.is_empty() {
            self.answer(0);
        }
    }

    /// Everything that was asked is answered in the end, and can be flushed.
    fn come_to_rest(&mut self) {
        self.faults = 0;
        self.core.settle(false);
        for _ in 0..100_000 {
            if self.open.is_empty() {
                return;
            }
            self.serve_well();
            self.check_durable();
        }
        panic!("never answered: {:#?}", self.open);
    }

    /// A change of servers: nothing is begun, everything ends, nothing is dirty.
    fn settle(&mut self) {
        self.core.settle(true);
        for _ in 0..1_000 {
            if self.core.is_settled() {
                return;
            }
            self.serve_well();
        }
        panic!("it does not settle");
    }
}

const SECOND: u32 = 1 << 31;

fn run(seed: u64) {
    let _again = Again(seed);
    let mut world = World::new(seed);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        for _ in 0..world.random.pick(&[100, 400]) {
            world.step();
        }
        world.come_to_rest();
        if world.random.one_in(2) {
            world.settle();
            world.check_durable();
        }
    }));
    if let Err(why) = outcome {
        if std::env::var_os("FLEXNBD_SEED").is_some() {
            eprintln!("{}", world.log.join("\n"));
        }
        std::panic::resume_unwind(why);
    }
}

#[test]
fn histories() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    if let Some(seed) = number("FLEXNBD_SEED") {
        return run(seed);
    }
    (0..number("FLEXNBD_SEEDS").unwrap_or(SEEDS)).for_each(run);
}

/// A server that can do nothing but what every one can, TRIM and `WRITE_ZEROES`.
fn plain(flush: bool) -> Abilities {
    Abilities { size: 1 << 20, flush, trim: true, zero: true, length_max: 1 << 20, ..Abilities::default() }
}

/// Clients are cut while what is dirty is on its way back to the server: there is nothing more to wait for.
#[test]
fn who_is_given_up_in_the_middle_of_a_replay_keeps_nobody_waiting() {
    let mut core = Upstream::new(Replay::Dirty, LIMIT, 0);
    core.connected(plain(true));
    core.submit(Op {
        owner: 1,
        tag: 0,
        action: Action::Write { offset: 0, payload: payload(7, 1), fua: false, follows: false },
    });
    let Command { asked, payload, .. } = core.next_command().unwrap();
    drop(payload);
    core.reply(asked, 0).unwrap();
    assert!(core.pop_done().is_some());
    core.lost();
    core.connected(plain(true));
    assert!(core.is_replaying());
    assert!(core.give_up() > 0);
    assert!(!core.is_replaying() && core.next_command().is_none() && core.is_settled());
    core.submit(Op { owner: 2, tag: 0, action: Action::Flush });
    assert_eq!(core.next_command().unwrap().what, What::Flush);
}

/// A server that never answers a FLUSH, and a client that cuts what is dirty into smaller and smaller pieces.
#[test]
fn trims_keep_to_the_bound_of_what_is_dirty() {
    let mut core = Upstream::new(Replay::Dirty, LIMIT, 0);
    core.connected(plain(true));
    core.submit(Op {
        owner: 1,
        tag: 0,
        action: Action::Zero { offset: 0, length: 1 << 20, fua: false, no_hole: false, fast: false },
    });
    let (mut tag, mut trimmed) = (0, 0);
    for offset in (CELL..1 << 20).step_by(2 * CELL_BYTES) {
        tag += 1;
        core.submit(Op { owner: 1, tag, action: Action::Trim { offset, length: CELL, fua: false } });
        while let Some(Command { asked, what, .. }) = core.next_command() {
            if what != What::Flush {
                core.reply(asked, 0).unwrap();
                trimmed += 1;
            }
        }
        while core.pop_done().is_some() {}
        assert!(core.dirty_bytes() <= core.limit(), "{} bytes", core.dirty_bytes());
    }
    assert!(trimmed > 100 && trimmed < tag, "{trimmed} of {tag}: the rest waits");
}

/// A client may ask for FUA although it was told that there is none.
#[test]
fn what_cannot_be_made_durable_fails_and_asks_nothing_that_the_server_does_not_know() {
    let mut core = Upstream::new(Replay::Dirty, LIMIT, 0);
    core.connected(plain(false));
    core.submit(Op {
        owner: 1,
        tag: 1,
        action: Action::Write { offset: 0, payload: payload(7, 1), fua: true, follows: false },
    });
    core.submit(Op { owner: 1, tag: 2, action: Action::Flush });
    let Command { asked, what, payload, .. } = core.next_command().unwrap();
    assert_eq!(what, What::Write);
    drop(payload);
    core.reply(asked, 0).unwrap();
    assert!(core.next_command().is_none());
    let failed = std::iter::from_fn(|| core.pop_done()).filter(|done| done.result.is_err()).count();
    assert_eq!((failed, core.len()), (2, 0));
}
