//! Everything around a plan: the file, its clients, the link, the destination, the operator, and time.
//!
//! The file is cells of 512 bytes that hold the number of the write that was there last, 0 for zeroes. A write lands in
//! two halves at any time until it is done. The mirror reads in two halves too, and it hears where a hole is some time
//! after the file was looked at. So every order comes up in which an asynchronous engine could let them meet. The
//! destination carries requests out in any order, each for itself, and what it holds is durable when a flush asked for
//! after its answer was answered.

use crate::random::Random;
use flexnbd::migrate::{Abilities, Plan, Step, DATA_MAX, IN_FLIGHT_MAX};
use flexnbd::work::Extent;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::ops::Range;

/// What the file is made of, in bytes.
pub const CELL: u64 = 512;
/// What a cell of the destination holds before anything is written to it: not what the source has, and not zero.
const STALE: u32 = u32::MAX;
/// How often the plan may be asked in one millisecond before that is a loop without an end.
const STEPS_MAX: u32 = 100_000;
const MS: u64 = 1_000;
/// The longest that a write may be kept waiting, in milliseconds; what the plan promises.
const KEPT_MAX_MS: u64 = 10_000;

/// What a client does, over and over. Times are in microseconds.
#[derive(Debug, Clone)]
pub struct Client {
    /// Where it writes.
    pub area: Range<u64>,
    pub len: Range<u64>,
    /// From one write to the next; 0 for one after the other.
    pub every_us: u64,
    /// How many at once.
    pub depth: u64,
    /// Goes through its area in order, instead of jumping about.
    pub in_order: bool,
    /// One in so many is zeroes or a trim; 0 for none.
    pub zeroes: u64,
    /// Its zeroes leave no hole.
    pub no_hole: bool,
    pub until_ms: u64,
}

impl Client {
    /// Writes `len` bytes at random places of the area, `bytes_per_s` of them.
    pub fn steady(area: Range<u64>, len: u64, bytes_per_s: u64) -> Self {
        let every_us = len * 1_000_000 / bytes_per_s;
        Self { every_us, depth: 64, in_order: false, ..Self::full_speed(area, len, 0) }
    }

    /// Writes as fast as it can.
    pub fn full_speed(area: Range<u64>, len: u64, depth: u64) -> Self {
        let len = len..len + 1;
        Self { area, len, every_us: 0, depth, in_order: true, zeroes: 0, no_hole: false, until_ms: u64::MAX }
    }
}

#[derive(Debug, Clone)]
pub struct Setup {
    pub seed: u64,
    pub size: u64,
    /// One in so many stretches of the file is a hole.
    pub holes: u64,
    pub max_pause_ms: u64,
    /// What the destination offers.
    pub can: Abilities,
    /// It refuses the zeroes that it has offered to write.
    pub refuses_zeroes: bool,
    pub link_bytes_per_s: u64,
    /// The speed of the link from some millisecond on.
    pub link_changes: Vec<(u64, u64)>,
    /// There, or back.
    pub latency_us: u64,
    /// What the destination may take for a request, at random; many of these, and answers come in any order.
    pub jitter_us: u64,
    /// What a disk operation of the source may take, at random.
    pub disk_us: u64,
    /// What a question to the file system may take until it has looked, and again until it has answered; most take
    /// less.
    pub look_us: u64,
    /// One in so many of its answers is exact; others are cut short at any place.
    pub whole_extents: u64,
    /// What a client's write takes at least.
    pub write_us: u64,
    /// What a MiB of zeroes takes beyond that. The disk does them one after the other.
    pub zero_us_per_mib: u64,
    /// What every flush takes.
    pub flush_us: u64,
    /// What a flush takes for each MiB that was not flushed.
    pub flush_us_per_mib: u64,
    /// The destination does nothing else while it flushes, so that it does not greet either.
    pub flush_blocks: bool,
    /// The connection is lost when a flush is not answered in this time.
    pub answer_max_ms: u64,
    /// The image is marked as moved before the commit.
    pub marks: bool,
    /// What a flush of the source's disk may take, at random, and one in so many of those that make a mark durable fails.
    pub sync_us: u64,
    pub mark_fails: u64,
    pub clients: Vec<Client>,
    /// The limit at the start, and from some millisecond on.
    pub limit: Option<u64>,
    pub limits: Vec<(u64, Option<u64>)>,
    /// The connection is lost once in so many steps, at most so often.
    pub lost: (u64, u32),
    /// The connection is lost at this step.
    pub lost_at: Option<u64>,
    /// The operator stops the migration in this millisecond, and starts another a moment later.
    pub break_ms: Option<u64>,
    pub deadline_ms: u64,
}

impl Setup {
    /// A link of 1 GB/s to a good destination, and no client.
    pub fn new(seed: u64, size: u64) -> Self {
        Self {
            seed,
            size,
            holes: 0,
            max_pause_ms: 100,
            can: Abilities { zero: true, flush: true },
            refuses_zeroes: false,
            link_bytes_per_s: 1_000_000_000,
            link_changes: Vec::new(),
            latency_us: 100,
            jitter_us: 100,
            disk_us: 50,
            look_us: 50,
            whole_extents: 1,
            write_us: 50,
            zero_us_per_mib: 0,
            flush_us: 2_000,
            flush_us_per_mib: 100,
            flush_blocks: true,
            answer_max_ms: 60_000,
            marks: true,
            sync_us: 1_000,
            mark_fails: 0,
            clients: Vec::new(),
            limit: None,
            limits: Vec::new(),
            lost: (0, 0),
            lost_at: None,
            break_ms: None,
            deadline_ms: 60_000,
        }
    }
}

/// What came of it. Times are in milliseconds.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub committed_ms: u64,
    pub attempts: u32,
    /// Attempts that were lost because a flush was not answered in time.
    pub late: u64,
    pub steps: u64,
    /// The pause that ended with the commit.
    pub pause_ms: u64,
    /// Pauses that ended without it.
    pub given_up: u32,
    pub flushes: u32,
    pub flushes_in_pause: u32,
    /// How often the image was flushed before a pause.
    pub settles: u32,
    /// How often the mark was taken back.
    pub taken_back: u32,
    pub passes: u32,
    /// The longest a write waited because writes were limited.
    pub kept_ms: u64,
    /// The longest a client waited for its answer.
    pub longest_ms: u64,
    /// The least that clients were allowed to dirty per second, if they were limited.
    pub write_limit: Option<u64>,
    /// Data sent in each tenth of a second.
    pub sent: BTreeMap<u64, u64>,
    pub sent_bytes: u64,
    pub writes: u64,
}

#[derive(Clone, Copy)]
enum Event {
    Issue(usize),
    Land { op: u64, half: bool },
    Done { op: u64 },
    Read { request: u64, half: bool, is_last: bool },
    Look { number: u64 },
    Looked { number: u64 },
    Execute { request: u64 },
    Ack { request: u64 },
    Flushed { attempt: u32 },
    Late { flush: u32 },
    Settled { attempt: u32 },
    Synced { change: u64 },
    Limit(Option<u64>),
    Link(u64),
    Break,
    Begin { timer: u64 },
    Wake,
}

struct Op {
    since_us: u64,
    client: usize,
    range: Range<u64>,
    version: u32,
    punches: bool,
}

/// A question to the file system.
struct Look {
    number: u64,
    offset: u64,
    /// What it has seen.
    found: Option<Extent>,
}

struct Request {
    range: Range<u64>,
    data: Option<Vec<u32>>,
}

/// What the mark on the source's image says: moved, or nothing that matters.
#[derive(Default)]
struct Mark {
    is_moved: bool,
    /// Whether a crash may leave it as moved, and whether it is sure to.
    may_be_moved: bool,
    must_be_moved: bool,
    /// Counts its changes; a sync is about the last one before it.
    changes: u64,
    /// The changes that clients wait for.
    taken_back: BTreeSet<u64>,
}

impl Mark {
    fn set(&mut self, is_moved: bool) {
        self.changes += 1;
        self.is_moved = is_moved;
        self.may_be_moved |= is_moved;
        self.must_be_moved &= is_moved;
    }
}

pub struct World {
    setup: Setup,
    random: Random,
    now_us: u64,
    events: BinaryHeap<Reverse<(u64, u64)>>,
    what: BTreeMap<u64, Event>,
    /// When a wake is due.
    wakes: BTreeSet<u64>,
    last_number: u64,
    plan: Plan,
    connected: bool,
    /// The timer that begins the next attempt; those before it were cancelled.
    timer: u64,
    running: bool,
    source: Vec<u32>,
    hole: Vec<bool>,
    target: Vec<u32>,
    /// Operations of clients on their way.
    ops: BTreeMap<u64, Op>,
    /// When the disk is done with the zeroes that it has to write.
    zeroing_until_us: u64,
    waiting: VecDeque<Op>,
    in_order_at: Vec<u64>,
    outstanding: Vec<u64>,
    version: u32,
    requests: BTreeMap<u64, Request>,
    look: Option<Look>,
    link_free_us: u64,
    busy_until_us: u64,
    /// Answered, and not covered by the answer of a flush.
    not_durable: BTreeSet<u64>,
    /// Data that the disk of the destination does not have, whoever sent it.
    cached_bytes: u64,
    /// What the flush on its way covers.
    covered: Option<BTreeSet<u64>>,
    mark: Mark,
    /// The source's disk is flushed before a pause.
    settling: bool,
    paused_us: Option<u64>,
    resumed: Option<(u64, u64)>,
    sent_before: u64,
    out: Outcome,
}

fn cells(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start / CELL).unwrap()..usize::try_from(range.end.div_ceil(CELL)).unwrap()
}

/// The first or the second half of a range.
fn half_of(range: &Range<u64>, second: bool) -> Range<u64> {
    let middle = range.start + (range.end - range.start) / 2 / CELL * CELL;
    if second {
        middle..range.end
    } else {
        range.start..middle
    }
}

/// A new migration. It knows nothing of the one before.
fn plan_of(setup: &Setup, now_ms: u64) -> Plan {
    let mut plan = Plan::new(setup.size, setup.max_pause_ms, setup.answer_max_ms, setup.limit, now_ms);
    if setup.marks {
        plan.mark_at_end();
    }
    plan
}

/// Runs a migration until it is done, and checks at every step what has to hold.
pub fn run(setup: &Setup) -> Outcome {
    let mut world = World::new(setup.clone());
    while !world.turn() {}
    world.out
}

impl World {
    fn new(setup: Setup) -> Self {
        let mut random = Random::new(setup.seed);
        let count = cells(&(0..setup.size)).end;
        let (mut source, mut hole) = (Vec::with_capacity(count), Vec::with_capacity(count));
        while source.len() < count {
            let is_hole = random.one_in(setup.holes);
            let run = usize::try_from(random.magnitude(8..4096)).unwrap().min(count - source.len());
            let is_zero = is_hole || setup.holes > 0 && random.one_in(4);
            source.extend(std::iter::repeat_n(u32::from(!is_zero), run));
            hole.extend(std::iter::repeat_n(is_hole, run));
        }
        let clients = setup.clients.len();
        let mut world = Self {
            plan: plan_of(&setup, 0),
            random,
            now_us: 0,
            events: BinaryHeap::new(),
            what: BTreeMap::new(),
            wakes: BTreeSet::new(),
            last_number: 0,
            connected: false,
            timer: 0,
            running: true,
            source,
            hole,
            target: vec![STALE; count],
            ops: BTreeMap::new(),
            zeroing_until_us: 0,
            waiting: VecDeque::new(),
            in_order_at: vec![0; clients],
            outstanding: vec![0; clients],
            version: 1,
            requests: BTreeMap::new(),
            look: None,
            link_free_us: 0,
            busy_until_us: 0,
            not_durable: BTreeSet::new(),
            cached_bytes: 0,
            covered: None,
            mark: Mark::default(),
            settling: false,
            paused_us: None,
            resumed: None,
            sent_before: 0,
            out: Outcome::default(),
            setup,
        };
        world.begin_in(0);
        for client in 0..clients {
            world.at(0, Event::Issue(client));
        }
        for (at_ms, limit) in world.setup.limits.clone() {
            world.at(at_ms * MS, Event::Limit(limit));
        }
        for (at_ms, rate) in world.setup.link_changes.clone() {
            world.at(at_ms * MS, Event::Link(rate));
        }
        if let Some(at_ms) = world.setup.break_ms {
            world.at(at_ms * MS, Event::Break);
        }
        world
    }

    fn now_ms(&self) -> u64 {
        self.now_us / MS
    }

    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    fn at(&mut self, at_us: u64, event: Event) {
        let number = self.number();
        self.events.push(Reverse((at_us.max(self.now_us), number)));
        self.what.insert(number, event);
    }

    fn wake_at(&mut self, at_ms: u64) {
        if self.wakes.insert(at_ms) {
            self.at(at_ms.saturating_mul(MS), Event::Wake);
        }
    }

    fn after(&mut self, us: u64, event: Event) {
        self.at(self.now_us + us, event);
    }

    /// One event and what follows from it. True when the migration is done.
    fn turn(&mut self) -> bool {
        let Some(Reverse((at_us, number))) = self.events.pop() else { panic!("nothing would ever happen again") };
        self.now_us = at_us;
        assert!(self.now_ms() <= self.setup.deadline_ms, "not done in time: {:?} {:?}", self.plan.progress(), self.out);
        let event = self.what.remove(&number).unwrap();
        self.handle(event);
        self.admit();
        let done = self.running && self.connected && self.drive();
        self.watch_pause();
        done
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Issue(client) => self.issue(client),
            Event::Land { op, half } => self.land(op, half),
            Event::Done { op } => self.done(op),
            Event::Read { request, half, is_last } => self.read(request, half, is_last),
            Event::Look { number } => self.look_at_file(number),
            Event::Looked { number } => self.looked(number),
            Event::Execute { request } => self.execute(request),
            Event::Ack { request } => self.ack(request),
            Event::Flushed { attempt } if attempt == self.out.attempts && self.connected => {
                let covered = self.covered.take().unwrap();
                self.not_durable.retain(|request| !covered.contains(request));
                self.plan.flushed(self.now_ms());
            }
            Event::Late { flush } if flush == self.out.flushes && self.covered.is_some() => {
                self.out.late += 1;
                self.lose();
            }
            Event::Limit(limit) => {
                let now_ms = self.now_ms();
                self.plan.set_limit(limit, now_ms);
            }
            Event::Link(rate) => self.setup.link_bytes_per_s = rate,
            Event::Settled { attempt } if attempt == self.out.attempts && self.connected => {
                self.settling = false;
                self.plan.settled(self.now_ms());
            }
            Event::Synced { change } => self.synced(change),
            Event::Break => {
                self.disconnect();
                self.keep_image();
                self.running = false;
                self.begin_in(500);
            }
            Event::Begin { timer } if timer == self.timer && self.now_us < self.busy_until_us => self.begin_in(6_000),
            Event::Begin { timer } if timer == self.timer => self.begin(),
            Event::Wake => {
                self.wakes.remove(&self.now_ms());
            }
            Event::Begin { .. } | Event::Flushed { .. } | Event::Late { .. } | Event::Settled { .. } => {}
        }
    }

    fn begin_in(&mut self, ms: u64) {
        self.timer = self.number();
        self.after(ms * MS, Event::Begin { timer: self.timer });
    }

    fn begin(&mut self) {
        if !self.running {
            self.plan = plan_of(&self.setup, self.now_ms());
            self.plan.note_earlier_changes(self.ops.len());
            self.running = true;
        }
        self.connected = true;
        self.out.attempts += 1;
        self.link_free_us = self.now_us;
        self.sent_before = 0;
        self.plan.begin(self.setup.can, self.now_ms());
    }

    /// The destination goes, with what it has not done, and with what it has.
    fn disconnect(&mut self) {
        self.connected = false;
        self.requests.clear();
        self.look = None;
        self.settling = false;
        self.not_durable.clear();
        self.covered = None;
        self.target.fill(STALE);
    }

    fn lose(&mut self) {
        self.disconnect();
        self.keep_image();
        self.plan.lost(self.now_ms());
        assert!(!self.plan.pauses_clients(), "clients go on after a failure");
        assert_eq!(self.plan.pause_ends_ms(), None);
        self.begin_in(1_000);
    }

    // The mark.

    /// The plan wants the image marked as moved.
    fn mark(&mut self) {
        self.check_copy();
        assert!(self.plan.is_marked() && self.plan.pauses_clients());
        self.mark.set(true);
        self.sync();
    }

    /// The image stays here. What the server does then: it takes the mark back, and clients wait until that is durable.
    fn keep_image(&mut self) {
        if self.plan.is_marked() {
            self.mark.set(false);
            self.mark.taken_back.insert(self.mark.changes);
            self.out.taken_back += 1;
            self.sync();
        }
        assert!(!self.mark.is_moved, "the plan forgets that the image is marked");
    }

    fn sync(&mut self) {
        let sync_us = self.random.below(self.setup.sync_us);
        self.after(sync_us, Event::Synced { change: self.mark.changes });
    }

    /// The mark is durable as it was after a change, unless that has failed.
    fn synced(&mut self, change: u64) {
        let is_awaited = self.mark.taken_back.remove(&change);
        if change != self.mark.changes {
            return;
        }
        if self.mark.is_moved && self.random.one_in(self.setup.mark_fails) {
            return self.lose();
        }
        (self.mark.may_be_moved, self.mark.must_be_moved) = (self.mark.is_moved, self.mark.is_moved);
        if !is_awaited && self.mark.is_moved {
            self.plan.marked();
        }
    }

    // The clients.

    fn issue(&mut self, client: usize) {
        let what = self.setup.clients[client].clone();
        if self.now_ms() >= what.until_ms || self.outstanding[client] >= what.depth {
            return;
        }
        let len = (self.random.within(what.len.clone()).div_ceil(CELL) * CELL).min(what.area.end - what.area.start);
        let last = what.area.end - len;
        let start = if what.in_order {
            let at = what.area.start + self.in_order_at[client];
            let at = if at > last { what.area.start } else { at };
            self.in_order_at[client] = at + len - what.area.start;
            at
        } else {
            self.random.within(what.area.start..last + 1) / CELL * CELL
        };
        let zero = self.random.one_in(what.zeroes);
        let punches = zero && !what.no_hole && self.random.one_in(2);
        self.version += 1;
        let version = if zero { 0 } else { self.version };
        self.outstanding[client] += 1;
        self.waiting.push_back(Op { client, range: start..start + len, version, punches, since_us: self.now_us });
        if what.every_us > 0 {
            self.after(what.every_us, Event::Issue(client));
        } else if self.outstanding[client] < what.depth {
            self.after(0, Event::Issue(client));
        }
    }

    /// Lets the operations begin that wait, if they may.
    fn admit(&mut self) {
        let now_ms = self.now_ms();
        while !self.waiting.is_empty() {
            if self.running && self.plan.pauses_clients() || !self.mark.taken_back.is_empty() {
                return;
            }
            assert!(!self.mark.may_be_moved, "a client goes on, and a crash would leave its image refused");
            let kept = if self.running { self.plan.keeps_changes_until(now_ms) } else { None };
            if let Some(until_ms) = kept {
                assert!(until_ms > now_ms && until_ms <= now_ms + KEPT_MAX_MS, "kept until {until_ms} at {now_ms}");
                return self.wake_at(until_ms);
            }
            let Some(op) = self.waiting.pop_front() else { return };
            if self.running {
                self.plan.note_submitted(&op.range);
                if self.plan.progress().write_limit_bytes_per_s.is_some() {
                    self.out.kept_ms = self.out.kept_ms.max((self.now_us - op.since_us) / MS);
                }
            }
            let done_us = self.setup.write_us + self.random.below(self.setup.disk_us) + self.zeroing_us(&op);
            let number = self.number();
            self.ops.insert(number, op);
            self.out.writes += 1;
            for half in [false, true] {
                let lands_us = self.random.below(done_us);
                self.after(lands_us, Event::Land { op: number, half });
            }
            self.after(done_us, Event::Done { op: number });
        }
    }

    /// How long an operation waits for the disk to write zeroes, its own included.
    fn zeroing_us(&mut self, op: &Op) -> u64 {
        if op.version != 0 {
            return 0;
        }
        let own_us = (op.range.end - op.range.start) * self.setup.zero_us_per_mib / (1 << 20);
        self.zeroing_until_us = self.zeroing_until_us.max(self.now_us) + own_us;
        self.zeroing_until_us - self.now_us
    }

    fn land(&mut self, op: u64, half: bool) {
        let op = &self.ops[&op];
        let range = cells(&half_of(&op.range, half));
        self.source[range.clone()].fill(op.version);
        self.hole[range].fill(op.punches);
    }

    fn done(&mut self, op: u64) {
        let op = self.ops.remove(&op).unwrap();
        if self.running {
            self.plan.note_write(&op.range);
        }
        self.out.longest_ms = self.out.longest_ms.max((self.now_us - op.since_us) / MS);
        self.outstanding[op.client] -= 1;
        if self.setup.clients[op.client].every_us == 0 {
            self.after(0, Event::Issue(op.client));
        }
    }

    // The mirror.

    /// Asks the plan until it waits. True after the commit.
    fn drive(&mut self) -> bool {
        for _ in 0..STEPS_MAX {
            self.check_figures();
            if self.plan.is_quiescing() && self.ops.is_empty() {
                self.plan.quiesced();
            }
            let now_ms = self.now_ms();
            let step = self.plan.next(now_ms);
            if self.fails() {
                // What the plan wanted does not come to anything, be it the commit.
                self.lose();
                return false;
            }
            match step {
                Step::Look(offset) => self.look(offset),
                Step::Data(range) => self.send(range, true),
                Step::Zero(range) => {
                    self.check_is_zero(&range);
                    let data = !self.plan.can().zero;
                    self.send(range, data);
                }
                Step::Flush => self.flush(),
                Step::WaitForClients => {
                    assert!(!self.ops.is_empty(), "stuck: {:?}", self.plan);
                    return false;
                }
                Step::Settle => self.settle(),
                Step::Mark => self.mark(),
                Step::Wait => {
                    let waits_for_itself = self.settling || self.mark.is_moved;
                    let waits_for_clients = self.plan.is_quiescing() && !self.ops.is_empty();
                    let waits_for_answers = !self.requests.is_empty() || self.covered.is_some() || self.look.is_some();
                    assert!(waits_for_clients || waits_for_answers || waits_for_itself, "stuck: {:?}", self.plan);
                    return false;
                }
                Step::WaitUntil(at_ms) => {
                    assert!(at_ms > now_ms, "a wait until now");
                    self.wake_at(at_ms);
                    return false;
                }
                Step::Quiesce => self.quiesce(),
                Step::Commit => {
                    self.commit();
                    return true;
                }
            }
        }
        panic!("the plan never waits");
    }

    fn fails(&mut self) -> bool {
        let (every, most) = self.setup.lost;
        self.out.steps += 1;
        (self.out.attempts <= most && self.random.one_in(every)) || self.setup.lost_at == Some(self.out.steps - 1)
    }

    fn look(&mut self, offset: u64) {
        assert!(offset < self.setup.size && offset % CELL == 0);
        assert!(self.look.is_none(), "one question at a time");
        let number = self.number();
        self.look = Some(Look { number, offset, found: None });
        let looks_us = self.random.magnitude(1..self.setup.look_us + 1);
        self.after(looks_us, Event::Look { number });
        let answers_us = looks_us + self.random.magnitude(1..self.setup.look_us + 1);
        self.after(answers_us, Event::Looked { number });
    }

    /// What the file system says.
    fn look_at_file(&mut self, number: u64) {
        let Some(look) = self.look.as_mut().filter(|look| look.number == number) else { return };
        let offset = look.offset;
        let cut = self.random.pick(&[4 << 10, 64 << 10, 256 << 10, 1 << 20]);
        let most = if self.random.one_in(self.setup.whole_extents) { u64::from(u32::MAX) } else { cut };
        let rest = &self.hole[cells(&(offset..self.setup.size.min(offset + most)))];
        let run = rest.iter().take_while(|&&hole| hole == rest[0]).count() as u64;
        let range = offset..self.setup.size.min(offset + run * CELL);
        look.found = Some(Extent { range, is_hole: rest[0] });
    }

    fn looked(&mut self, number: u64) {
        // The answer to an attempt that is over is for nobody.
        if let Some(look) = self.look.take_if(|look| look.number == number) {
            self.plan.note_extent(look.found.unwrap());
        }
    }

    /// Nothing that was answered is where zeroes are sent: that would be lost.
    fn check_is_zero(&self, range: &Range<u64>) {
        for cell in cells(range).filter(|&cell| self.source[cell] != 0) {
            let is_in_flight = self.ops.values().any(|op| cells(&op.range).contains(&cell));
            assert!(is_in_flight, "zeroes where a write was answered, in cell {cell}");
        }
    }

    fn send(&mut self, range: Range<u64>, is_data: bool) {
        assert!(range.start < range.end && range.end <= self.setup.size);
        for other in self.requests.values() {
            assert!(other.range.end <= range.start || range.end <= other.range.start, "requests in flight overlap");
        }
        assert!(self.requests.len() < IN_FLIGHT_MAX, "too many in flight");
        let len = range.end - range.start;
        let number = self.number();
        if is_data {
            assert!(len <= DATA_MAX);
            self.requests.insert(number, Request { data: Some(vec![STALE; cells(&(0..len)).end]), range });
            let disk_us = self.setup.disk_us;
            let (first, second) = (self.random.below(disk_us), self.random.below(disk_us));
            let (half, last_us) = (first > second, first.max(second));
            self.after(first.min(second), Event::Read { request: number, half, is_last: false });
            self.after(last_us, Event::Read { request: number, half: !half, is_last: true });
        } else {
            self.requests.insert(number, Request { data: None, range });
            self.leave(number, 0);
        }
    }

    /// Puts a request on the link.
    fn leave(&mut self, number: u64, len: u64) {
        let execute_us = self.arrives_us(len) + self.random.below(self.setup.jitter_us);
        self.at(execute_us, Event::Execute { request: number });
    }

    /// When something has come over the link that leaves the source now.
    fn arrives_us(&mut self, len: u64) -> u64 {
        let on_the_link_us = (len + 28) * 1_000_000 / self.setup.link_bytes_per_s;
        self.link_free_us = self.link_free_us.max(self.now_us) + on_the_link_us;
        self.link_free_us + self.setup.latency_us
    }

    fn read(&mut self, number: u64, half: bool, is_last: bool) {
        let Some(request) = self.requests.get_mut(&number) else { return };
        let range = half_of(&request.range, half);
        let within = range.start - request.range.start..range.end - request.range.start;
        let data = request.data.as_mut().unwrap();
        data[cells(&within)].copy_from_slice(&self.source[cells(&range)]);
        if !is_last {
            return;
        }
        if self.plan.can().zero && data.iter().all(|&cell| cell == 0) {
            request.data = None;
            self.plan.note_zeroes(&request.range);
            return self.leave(number, 0);
        }
        let len = request.range.end - request.range.start;
        *self.out.sent.entry(self.now_ms() / 100).or_default() += len;
        self.out.sent_bytes += len;
        self.cached_bytes += len;
        self.leave(number, len);
    }

    fn execute(&mut self, number: u64) {
        let Some(request) = self.requests.get(&number) else { return };
        if self.busy_until_us > self.now_us {
            return self.at(self.busy_until_us, Event::Execute { request: number });
        }
        match &request.data {
            Some(data) => self.target[cells(&request.range)].copy_from_slice(data),
            None if self.setup.refuses_zeroes => {}
            None => self.target[cells(&request.range)].fill(0),
        }
        self.after(self.setup.latency_us, Event::Ack { request: number });
    }

    fn ack(&mut self, number: u64) {
        let Some(request) = self.requests.remove(&number) else { return };
        if request.data.is_none() && self.setup.refuses_zeroes {
            return self.plan.zeroes_refused(&request.range);
        }
        self.not_durable.insert(number);
        self.plan.acked(&request.range, self.now_ms());
    }

    fn flush(&mut self) {
        assert!(self.setup.can.flush, "a flush that the destination does not know");
        assert!(self.covered.is_none(), "one flush at a time");
        self.covered = Some(self.not_durable.clone());
        self.out.flushes += 1;
        self.out.flushes_in_pause += u32::from(self.plan.pauses_clients());
        self.after(self.setup.answer_max_ms * MS, Event::Late { flush: self.out.flushes });
        let bytes = std::mem::take(&mut self.cached_bytes);
        let arrives_us = self.arrives_us(0);
        let done_us = arrives_us + self.setup.flush_us + bytes * self.setup.flush_us_per_mib / (1 << 20);
        if self.setup.flush_blocks {
            self.busy_until_us = done_us;
        }
        self.at(done_us + self.setup.latency_us, Event::Flushed { attempt: self.out.attempts });
    }

    fn quiesce(&mut self) {
        assert!(self.plan.is_quiescing() && self.plan.pauses_clients());
        assert_eq!(self.plan.paused_ms(self.now_ms() + 7), 7);
        assert!(self.paused_us.is_none(), "a pause within a pause");
        if let Some((resumed_us, paused_us)) = self.resumed {
            let went_on_us = self.now_us - resumed_us;
            assert!(went_on_us + MS >= paused_us, "{went_on_us} us between pauses, after one of {paused_us} us");
        }
        self.paused_us = Some(self.now_us);
    }

    /// Lets clients go on when it takes too long.
    fn watch_pause(&mut self) {
        if !self.running || !self.plan.pauses_clients() {
            self.paused_us = None;
            return;
        }
        let Some(ends_ms) = self.plan.pause_ends_ms() else { return };
        let paused_us = self.paused_us.unwrap();
        let now_ms = self.now_ms();
        if now_ms >= ends_ms {
            self.plan.give_up_pause();
            assert!(!self.plan.pauses_clients());
            self.resumed = Some((self.now_us, self.now_us - paused_us));
            self.paused_us = None;
            self.out.given_up += 1;
            self.wake_at(now_ms + 1);
        } else {
            self.wake_at(ends_ms);
        }
    }

    fn settle(&mut self) {
        assert!(self.setup.marks && !self.plan.pauses_clients());
        self.out.settles += 1;
        self.settling = true;
        let sync_us = self.random.below(self.setup.sync_us);
        self.after(sync_us, Event::Settled { attempt: self.out.attempts });
    }

    /// The copy is the image, and nothing is on its way that could change that.
    fn check_copy(&self) {
        assert!(self.ops.is_empty(), "a client's operation is still on its way");
        assert!(self.requests.is_empty() && self.covered.is_none(), "an answer is still on its way");
        assert!(self.look.is_none(), "a question is still on its way");
        assert!(!self.setup.can.flush || self.not_durable.is_empty(), "something is not durable");
        let differs = self.source.iter().zip(&self.target).position(|(source, target)| source != target);
        assert_eq!(differs, None, "the first cell that is not what it was");
    }

    fn commit(&mut self) {
        self.check_copy();
        assert_eq!(self.mark.must_be_moved, self.setup.marks, "whatever crashes, the image here is refused");
        let now_ms = self.now_ms();
        assert_eq!(self.plan.next(now_ms), Step::Wait, "nothing comes after the commit");
        assert!(self.plan.pauses_clients() && self.plan.pause_ends_ms().is_none(), "no way back");
        let progress = self.plan.progress();
        assert_eq!((progress.left_bytes, progress.dirty_bytes), (0, 0));
        assert!(progress.sent_bytes + progress.zeroed_bytes >= self.setup.size);
        assert!(progress.zeroed_bytes == 0 || !self.setup.refuses_zeroes);
        self.out.committed_ms = now_ms;
        self.out.pause_ms = (self.now_us - self.paused_us.unwrap()) / MS;
        self.out.passes = progress.pass;
    }

    /// What status shows has to make sense at any moment.
    fn check_figures(&mut self) {
        let progress = self.plan.progress();
        assert!(progress.left_bytes <= self.setup.size && progress.dirty_bytes <= self.setup.size);
        assert!(progress.dirty_bytes <= progress.left_bytes);
        let sent = progress.sent_bytes + progress.zeroed_bytes;
        assert!(sent >= self.sent_before, "what was confirmed stays so");
        assert!(sent + progress.left_bytes >= self.setup.size, "a byte is neither confirmed nor left");
        self.sent_before = sent;
        if let Some(limit) = progress.write_limit_bytes_per_s {
            self.out.write_limit = Some(self.out.write_limit.map_or(limit, |least| least.min(limit)));
        }
    }
}
