//! Conversations made up from a seed: what is asked, what the disk refuses, how everything is cut up, in which order
//! work is reported, how time passes, and how much memory there is.
//!
//! A failing run prints its seed; `FLEXNBD_SEED=N` runs that one alone, `FLEXNBD_SEEDS=N` so many.

use crate::disk::Fault;
use crate::oracles::drive::{Act, Can, Schedule};
use crate::pair::{run, ROOMY};
use crate::plan::{head, Plan};
use flexnbd::proto::error::Errno;
use flexnbd::proto::server::Allowed;
use flexnbd::proto::wire::{command, kind, RequestHead};

/// How many conversations one run of the test holds.
const SEEDS: u64 = 3000;

/// The generator `SplitMix64`: every seed gives a sequence of its own.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// A number from 0 to `most` that is about as often of each order of magnitude.
    pub fn magnitude(&mut self, most: usize) -> usize {
        let bits = self.below(most.checked_ilog2().map_or(1, |log| log as usize + 2));
        self.below((1 << bits).min(most + 1))
    }
}

/// A schedule of chance.
pub struct Chance {
    rng: Rng,
    now_ms: u64,
    /// How eager each side is: 1 acts whenever it can.
    receiver: usize,
    disk: usize,
    sender: usize,
    allowed: Allowed,
}

impl Chance {
    pub fn new(mut rng: Rng) -> Self {
        let [receiver, disk, sender] = [1, 2, 3].map(|_| rng.pick(&[1, 1, 2, 5, 20]));
        Self { now_ms: rng.next() >> 20, rng, receiver, disk, sender, allowed: Allowed::Everything }
    }
}

impl Schedule for Chance {
    fn choose(&mut self, can: &Can) -> Act {
        loop {
            let rng = &mut self.rng;
            match rng.below(4) {
                0 if can.complete > 0 && rng.one_in(self.disk) => return Act::Complete(rng.below(can.complete)),
                1 if can.send > 0 && rng.one_in(self.sender) => return Act::Send(rng.magnitude(can.send - 1) + 1),
                2 if can.go_on && rng.one_in(self.receiver) => return Act::GoOn,
                2 if can.receive > 0 && rng.one_in(self.receiver) => {
                    return Act::Receive(rng.magnitude(can.receive - 1) + 1);
                }
                2 if can.hang_up => return Act::HangUp,
                3 if can.receive > 0 && rng.one_in(8) => return Act::Park,
                3 if self.allowed == Allowed::Reads && rng.one_in(8) => {
                    self.allowed = Allowed::Everything;
                    return Act::Allowed(self.allowed);
                }
                3 if self.allowed == Allowed::Everything && rng.one_in(500) => {
                    self.allowed = Allowed::Reads;
                    return Act::Allowed(self.allowed);
                }
                _ => {}
            }
        }
    }

    fn now_ms(&mut self) -> u64 {
        if self.rng.one_in(3) {
            self.now_ms += self.rng.magnitude(200_000) as u64;
        }
        self.now_ms
    }
}

fn fault(rng: &mut Rng, length: usize) -> Option<Fault> {
    let errno = rng.pick(&[Errno::Io, Errno::NoSpc, Errno::Perm, Errno::NoMem]);
    rng.one_in(12).then(|| Fault { at: u32::try_from(rng.below(length)).unwrap(), errno })
}

/// A request that must be refused, and how.
fn refused(rng: &mut Rng, size: usize) -> (Errno, RequestHead) {
    let length = rng.magnitude(size);
    let beyond = (size - rng.below(length + 1) + 1) as u64 + (rng.next() >> rng.below(64)) / 2;
    let reads = [(kind::READ, Errno::NoSpc), (kind::WRITE_ZEROES, Errno::NoSpc), (kind::TRIM, Errno::Inval)];
    let wire = u32::try_from(length).unwrap();
    match rng.below(4) {
        0 => (Errno::NoSpc, head(kind::WRITE, rng.pick(&[0, command::FUA]), beyond.max(size as u64 + 1), wire)),
        1 => {
            let (kind, errno) = rng.pick(&reads);
            (errno, head(kind, 0, beyond.max(size as u64 + 1), u32::try_from(rng.next() >> 32).unwrap()))
        }
        2 => (Errno::Inval, head(rng.pick(&[5, 7, 8, 99, 0x100, 0xFFFF]), 0, rng.next(), wire)),
        _ => {
            (Errno::Inval, head(rng.pick(&[kind::READ, kind::WRITE, kind::FLUSH]), 1 << rng.pick(&[2, 7, 15]), 0, wire))
        }
    }
}

fn plan(rng: &mut Rng) -> Plan {
    // The last is more than a client has memory for.
    let size =
        if rng.one_in(20) { rng.pick(&[1 << 20, 1_500_000]) } else { rng.pick(&[512, 5000, 5000, 40_000, 40_000]) };
    let mut plan = Plan::new(size);
    for _ in 0..rng.magnitude(if size > 100_000 { 8 } else { 90 }) {
        let length = rng.magnitude(size);
        let offset = rng.below(size - length + 1) as u64;
        let fua = rng.pick(&[0, command::FUA]);
        let fault = if length > 0 { fault(rng, length) } else { None };
        let wire = u32::try_from(length).unwrap();
        match rng.below(12) {
            0..=4 => plan.ask(head(kind::READ, fua, offset, wire), &[], 0, fault),
            5..=7 => {
                let seed = rng.next();
                let payload: Vec<u8> = (0..length as u64).map(|at| (seed >> (at % 57)) as u8).collect();
                plan.ask(head(kind::WRITE, fua, offset, wire), &payload, 0, fault)
            }
            8 => {
                let no_hole = rng.pick(&[0, command::NO_HOLE]);
                plan.ask(head(kind::WRITE_ZEROES, fua | no_hole, offset, wire), &[], 0, fault)
            }
            9 => plan.ask(head(kind::TRIM, fua, offset, wire), &[], 0, fault),
            10 => {
                let fault = fault.map(|fault| Fault { at: 0, ..fault });
                plan.ask(head(kind::FLUSH, 0, rng.next(), 0), &[], 0, fault)
            }
            _ => {
                let (errno, head) = refused(rng, size);
                plan.refused(errno, head)
            }
        };
    }
    match rng.below(6) {
        0 => drop(plan.disconnect(&[0xA5; 100][..rng.below(101)])),
        1 => drop(plan.broken(&[rng.pick(&[0, 0x24, 0xFF]); 28])),
        2 => plan = plan.cut(rng.below(plan.stream.len() + 1)),
        _ => {}
    }
    plan
}

/// Names the seed of the conversation that does not end well.
pub struct Seed(pub u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay this conversation alone with FLEXNBD_SEED={}", self.0);
        }
    }
}

/// Simulates the seed that the environment names, or so many seeds.
pub fn each_seed(seeds: u64, simulate: fn(u64)) {
    let number = |name| std::env::var(name).ok().map(|value| value.parse().expect("a seed is a number"));
    match number("FLEXNBD_SEED") {
        Some(seed) => simulate(seed),
        None => (0..number("FLEXNBD_SEEDS").unwrap_or(seeds)).for_each(simulate),
    }
}

fn simulate(seed: u64) {
    let _named = Seed(seed);
    let mut rng = Rng(seed);
    let plan = plan(&mut rng);
    let cap = rng.pick(&[0, 4 << 10, 12 << 10, 64 << 10, 300 << 10, ROOMY, ROOMY]);
    let outcome = run(&plan, cap, &mut Chance::new(rng));

    assert_eq!(outcome.end, plan.end);
    let whole = outcome.end.is_ok();
    for (ask, reply) in plan.asks.iter().zip(&outcome.replies) {
        match reply {
            // Those behind what broke the protocol need not have been sent whole.
            Some((0, data)) if !whole => assert!(ask.error == 0 && ask.data.starts_with(data), "{:?}", ask.head),
            Some(reply) => assert!(*reply == (ask.error, ask.data.clone()), "{:?}: {}", ask.head, reply.0),
            None => assert!(!whole || !ask.is_answered(), "{:?} is not answered", ask.head),
        }
    }
    if whole {
        assert!(outcome.disk == plan.after, "the disk differs from its shadow");
        assert_eq!(outcome.tally, plan.tally());
    }
}

#[test]
fn a_conversation_keeps_its_promises_whatever_happens() {
    each_seed(SEEDS, simulate);
}
