//! Conversations written by hand, cut up at every byte in both directions.

use crate::disk::Fault;
use crate::oracles::drive::{Act, Can, Schedule};
use crate::pair::{run, Outcome, ROOMY};
use crate::plan::{head, Plan};
use flexnbd::buffer::{BULK, SLICE};
use flexnbd::proto::error::Errno;
use flexnbd::proto::wire::{command, kind};

/// The image of the scripts, in bytes.
const SIZE: usize = 32 << 10;
/// Pools from none at all, where everything goes through reserve buffers, to one that never binds.
const CAPS: [usize; 6] = [0, 4 << 10, 12 << 10, 64 << 10, SLICE, ROOMY];

/// When the disk reports its work and the client takes what is sent.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// At once, so that replies come in the order of the requests.
    Eager,
    /// Only when nothing else goes on, the last first.
    Late,
}

/// A schedule without chance.
#[derive(Debug, Clone, Copy)]
pub struct Fixed {
    /// The first receive ends at the latest at this byte of the stream.
    pub cut: usize,
    /// Bytes received at once.
    pub receive: usize,
    /// Bytes sent at once.
    pub send: usize,
    pub pace: Pace,
    pub now_ms: u64,
}

/// As eagerly as can be, whole.
pub const EAGER: Fixed = Fixed { cut: 0, receive: usize::MAX, send: usize::MAX, pace: Pace::Eager, now_ms: 0 };
/// As late as can be, whole.
pub const LATE: Fixed = Fixed { pace: Pace::Late, ..EAGER };

impl Schedule for Fixed {
    fn choose(&mut self, can: &Can) -> Act {
        let before_cut = if can.received < self.cut { self.cut - can.received } else { usize::MAX };
        let input = match can {
            Can { go_on: true, .. } => Some(Act::GoOn),
            Can { hang_up: true, .. } => Some(Act::HangUp),
            Can { receive: 0, .. } => None,
            Can { receive, .. } => Some(Act::Receive(self.receive.min(before_cut).min(*receive))),
        };
        let send = (can.send > 0).then(|| Act::Send(self.send.min(can.send)));
        match self.pace {
            Pace::Eager => (can.complete > 0).then_some(Act::Complete(0)).or(send).or(input),
            Pace::Late => input.or_else(|| can.complete.checked_sub(1).map(Act::Complete)).or(send),
        }
        .expect("something is left to do")
    }

    fn now_ms(&mut self) -> u64 {
        self.now_ms += 1;
        self.now_ms
    }
}

fn bytes(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 5 + seed) as u8).collect()
}

fn plan(say: impl FnOnce(&mut Plan)) -> Plan {
    let mut plan = Plan::new(SIZE);
    say(&mut plan);
    plan
}

/// Conversations of at most a few hundred bytes, with every request there is and everything that can be wrong with one.
pub fn short() -> Vec<Plan> {
    let end = SIZE as u64;
    let mut failing = Plan::new(SIZE);
    for (kind, payload) in [(kind::READ, 0), (kind::WRITE, 60), (kind::TRIM, 0), (kind::WRITE_ZEROES, 0)] {
        let fault = Some(Fault { at: 59, errno: Errno::Io });
        failing.ask(head(kind, 0, 100, 60), &bytes(payload, 9), 0, fault).read(90, 80);
    }
    failing.ask(head(kind::FLUSH, 0, 0, 0), &[], 0, Some(Fault { at: 0, errno: Errno::NoSpc })).flush();
    vec![
        plan(|_| {}),
        plan(|plan| {
            plan.read(0, 1).write(0, 0, &bytes(50, 1)).read(0, 70).write(0, 25, &bytes(50, 2)).read(0, 100);
            plan.write(0, end - 1, &[7]).read(end - 9, 9).disconnect(&[]);
        }),
        plan(|plan| {
            plan.write(command::FUA, 4000, &bytes(200, 3)).flush().trim(0, 4010, 20).zero(command::NO_HOLE, 4040, 20);
            plan.trim(command::FUA, 4070, 20).zero(command::FUA, 4100, 20).read(4000, 200);
        }),
        plan(|plan| {
            plan.read(5, 0).write(0, 5, &[]).trim(0, 5, 0).zero(command::FUA, 5, 0).read(end, 0).flush();
        }),
        plan(|plan| {
            plan.refused(Errno::NoSpc, head(kind::WRITE, 0, end - 10, 11)).read(end - 10, 10);
            plan.refused(Errno::NoSpc, head(kind::WRITE, 0, u64::MAX - 19, 20));
            plan.refused(Errno::NoSpc, head(kind::WRITE, 0, u64::MAX, 0));
            plan.refused(Errno::NoSpc, head(kind::READ, 0, u64::MAX - 4095, u32::MAX));
            plan.refused(Errno::NoSpc, head(kind::READ, 0, end, 1));
            plan.refused(Errno::NoSpc, head(kind::WRITE_ZEROES, 0, 1, u32::MAX));
            plan.refused(Errno::Inval, head(kind::TRIM, 0, end - 1, 2));
            plan.write(command::FUA, 5, &bytes(30, 4)).read(0, 40);
        }),
        plan(|plan| {
            plan.refused(Errno::Inval, head(kind::WRITE, command::NO_HOLE, 0, 33));
            plan.refused(Errno::Inval, head(kind::WRITE, 0x8000, 0, 0));
            for unknown in [5, 7, 8, 0xFFFF] {
                plan.refused(Errno::Inval, head(unknown, 0, 0, 512));
            }
            plan.read(0, 10).disconnect(b"not looked at");
        }),
        plan(|plan| {
            plan.write(0, 1, &bytes(40, 5)).read(0, 50).flush().broken(&[0xFF; 28]);
            plan.stream.extend([0x25; 40]);
        }),
        plan(|plan| {
            plan.broken(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n");
        }),
        plan(|plan| {
            for at in 0..40 {
                plan.read(at, 5);
            }
        }),
        failing,
    ]
}

fn check(plan: &Plan, outcome: &Outcome, how: &dyn std::fmt::Debug) {
    assert_eq!(outcome.end, plan.end, "{how:?}");
    for (ask, reply) in plan.asks.iter().zip(&outcome.replies) {
        let expected = ask.is_answered().then(|| (ask.error, ask.data.clone()));
        assert_eq!(*reply, expected, "{:?} {how:?}", ask.head);
    }
    assert!(outcome.disk == plan.after, "{how:?}");
    assert_eq!(outcome.tally, plan.tally(), "{how:?}");
}

/// Runs the plan whole, then as `schedules` say: what comes must be right, and in the eager ones the same bytes.
fn check_all(plan: &Plan, cap: usize, schedules: impl IntoIterator<Item = Fixed>) {
    let whole = run(plan, cap, &mut EAGER.clone());
    check(plan, &whole, &cap);
    for mut schedule in schedules {
        let how = (cap, schedule);
        let outcome = run(plan, cap, &mut schedule);
        match schedule.pace {
            Pace::Eager => assert!(outcome == whole, "{how:?}"),
            Pace::Late => check(plan, &outcome, &how),
        }
    }
}

#[test]
fn the_stream_may_be_split_anywhere() {
    for plan in short() {
        for cap in CAPS {
            let cuts = 1..plan.stream.len();
            check_all(&plan, cap, cuts.flat_map(|cut| [Fixed { cut, ..EAGER }, Fixed { cut, ..LATE }]));
        }
    }
}

#[test]
fn pieces_may_have_any_size_in_both_directions() {
    for plan in short() {
        let lengths = 1..=plan.stream.len();
        let receives = lengths.flat_map(|receive| [Fixed { receive, ..EAGER }, Fixed { receive, ..LATE }]);
        let sends = (1..=1000).flat_map(|send| [Fixed { send, ..EAGER }, Fixed { send, ..LATE }]);
        let both = (1..=30).flat_map(|receive| (1..=30).map(move |send| Fixed { receive, send, ..LATE }));
        check_all(&plan, 0, receives.chain(sends).chain(both));
    }
}

#[test]
fn the_client_may_hang_up_anywhere() {
    for plan in short() {
        for length in 0..=plan.stream.len() {
            let plan = plan.cut(length);
            let outcome = run(&plan, ROOMY, &mut EAGER.clone());
            assert_eq!(outcome.end, plan.end, "{length}");
            for (ask, reply) in plan.asks.iter().zip(outcome.replies) {
                let whole = ask.end <= length || reply.is_some() && ask.error != 0;
                let expected = (whole && ask.is_answered()).then(|| (ask.error, ask.data.clone()));
                assert_eq!(reply, expected, "{length}");
            }
            assert!(outcome.disk == plan.after, "{length}");
            run(&plan, 0, &mut Fixed { receive: 1, send: 1, ..LATE });
        }
    }
}

#[test]
fn slices_may_be_split_anywhere() {
    let plan = plan(|plan| {
        plan.write(command::FUA, 333, &bytes(9001, 6)).read(100, 9500).zero(0, 4000, 5000).read(0, 8193);
    });
    for cap in [0, 12 << 10] {
        let cuts = 1..plan.stream.len();
        check_all(&plan, cap, cuts.flat_map(|cut| [Fixed { cut, ..EAGER }, Fixed { cut, ..LATE }]));
    }
}

#[test]
fn a_long_write_that_fails_or_is_refused_is_swallowed_whole() {
    let fault = |at| Some(Fault { at, errno: Errno::NoSpc });
    let plan = plan(|plan| {
        plan.ask(head(kind::WRITE, command::FUA, 10, 9000), &bytes(9000, 7), 0, fault(0)).read(0, 100);
        plan.ask(head(kind::WRITE, 0, 10, 9000), &bytes(9000, 8), 0, fault(5000)).read(0, 100);
        plan.ask(head(kind::WRITE, 0, 10, 9000), &bytes(9000, 9), 0, fault(8999)).read(0, 100);
        plan.refused(Errno::NoSpc, head(kind::WRITE, 0, SIZE as u64, 9000)).read(0, 100);
    });
    for cap in CAPS {
        let cuts = (1..plan.stream.len()).step_by(61);
        check_all(&plan, cap, cuts.flat_map(|cut| [Fixed { cut, ..EAGER }, Fixed { cut, ..LATE }]));
        check_all(&plan, cap, [1, 27, 28, 29, 4095, 4096, 4097].map(|receive| Fixed { receive, ..LATE }));
    }
}

#[test]
fn requests_may_be_longer_than_any_buffer() {
    let length = 2 * SLICE + 777;
    let mut plan = Plan::new(length + 2000);
    plan.write(0, 0, &bytes(100, 1)).write(command::FUA, 123, &bytes(length, 2)).read(7, 90);
    plan.read(1, u32::try_from(length).unwrap() + 1000).flush().read(length as u64, 2000);
    let borders = (0..3).flat_map(|slice| [0, 28, 128, 156, 156 - 123, 4096].map(|at| slice * SLICE + at));
    let cuts: Vec<usize> = borders.flat_map(|at| [at.saturating_sub(1), at, at + 1]).collect();
    for cap in CAPS {
        check_all(&plan, cap, cuts.iter().flat_map(|&cut| [Fixed { cut, ..EAGER }, Fixed { cut, ..LATE }]));
        check_all(&plan, cap, [4095, 65_536, SLICE - 1].map(|piece| Fixed { receive: piece, send: piece, ..LATE }));
    }
}

/// The first piece of it is received into a large buffer, where there is one; one that does not come back holds up the rest.
#[test]
fn a_payload_may_be_longer_than_a_large_buffer() {
    let length = BULK + SLICE + 777;
    let mut plan = Plan::new(length + 2000);
    plan.write(0, 123, &bytes(length, 2)).write(command::FUA, 5, &bytes(BULK, 3)).read(0, 4096);
    let borders = [28, 28 + BULK - 123, 28 + BULK, 28 + BULK + SLICE - 123, 28 + length];
    let cuts = borders.iter().flat_map(|&at| [at - 1, at, at + 1]);
    check_all(&plan, ROOMY, cuts.flat_map(|cut| [Fixed { cut, ..EAGER }, Fixed { cut, ..LATE }]));
}

#[test]
fn many_large_requests_wait_for_memory() {
    let mut plan = Plan::new(SLICE + 1);
    for at in 0..9 {
        plan.read(0, SLICE as u32).write(0, 1, &bytes(SLICE, at));
    }
    for cap in CAPS {
        check_all(&plan, cap, [LATE, Fixed { send: 100_000, ..LATE }]);
    }
}

#[test]
fn a_long_read_that_fails_is_an_error_of_that_read_alone() {
    for at in [0, 4086, 4087, 5000, 9999] {
        let plan = plan(|plan| {
            plan.ask(head(kind::READ, 0, 9, 10_000), &[], 0, Some(Fault { at, errno: Errno::Io })).read(0, 5000);
        });
        for cap in CAPS {
            let sends = [1, 1000, usize::MAX];
            check_all(&plan, cap, sends.iter().flat_map(|&send| [Fixed { send, ..EAGER }, Fixed { send, ..LATE }]));
        }
    }
}
