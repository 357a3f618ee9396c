//! Worlds made up from a seed.

use crate::random::Random;
use crate::world::{run, Client, Setup, CELL};
use flexnbd::migrate::Abilities;
use std::ops::Range;
use std::thread;

/// How many worlds there are in one run of the tests, unless `FLEXNBD_SEEDS` says otherwise.
const SEEDS: u64 = 2_000;

/// Says which seed it was when a test fails.
struct Replay(u64);

impl Drop for Replay {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("to run it again: FLEXNBD_SEED={} cargo test --test simulation seeds", self.0);
        }
    }
}

fn client(random: &mut Random, size: u64) -> Client {
    let start = random.below(size / CELL) * CELL;
    let len = random.magnitude(CELL..size + 1).div_ceil(CELL) * CELL;
    let area = if random.one_in(2) { 0..size } else { start..(start + len).min(size) };
    let most = random.magnitude(CELL..(1 << 20) + 1);
    let every_us = if random.one_in(4) { 0 } else { random.magnitude(1_000..1_000_000) };
    Client {
        area,
        len: if random.one_in(3) { most..most + 1 } else { 1..most + 1 },
        every_us,
        depth: random.magnitude(1..9),
        in_order: random.one_in(2),
        zeroes: random.pick(&[0, 0, 1, 2, 10]),
        no_hole: random.one_in(2),
        until_ms: random.pick(&[100, 2_000, u64::MAX, u64::MAX]),
    }
}

fn limits(random: &mut Random, link_bytes_per_s: u64) -> Vec<(u64, Option<u64>)> {
    let mut limits: Vec<_> = (0..random.below(4))
        .map(|_| {
            let limit = random.pick(&[1, 4_000, 300_000, 5_000_000]);
            (random.below(3_000), Some(limit).filter(|_| !random.one_in(4)))
        })
        .collect();
    limits.sort_by_key(|(at_ms, _)| *at_ms);
    limits.push((3_000, Some(link_bytes_per_s.max(2_000_000)).filter(|_| random.one_in(3))));
    limits
}

fn world(seed: u64) -> Setup {
    let mut random = Random::new(seed ^ 0x5eed);
    let sizes: [Range<u64>; 5] = [8..9, 8..300, 100..8_192, 1_024..8_192, 8_192..65_537];
    let size = random.pick(&[0, 1, 2, 3, 3, 3, 3, 3, 3, 4].map(|at: usize| (sizes[at].start, sizes[at].end)));
    let size = random.within(size.0..size.1) * CELL;
    let mut setup = Setup::new(seed, size);
    setup.holes = random.pick(&[0, 1, 2, 4]);
    setup.max_pause_ms = random.pick(&[0, 1, 20, 100, 100, 1_000, 60_000]);
    setup.can = Abilities { zero: !random.one_in(4), flush: !random.one_in(4) };
    setup.link_bytes_per_s = random.magnitude((size / 2).max(2_000_000)..1_000_000_000);
    setup.latency_us = random.magnitude(10..100_000);
    setup.jitter_us = random.pick(&[0, 100, 1_000, 50_000]);
    setup.disk_us = random.pick(&[1, 100, 1_000, 10_000]);
    setup.look_us = random.pick(&[1, 100, 1_000]);
    setup.whole_extents = random.pick(&[1, 16]);
    setup.write_us = random.magnitude(1_000..5_000);
    setup.zero_us_per_mib = random.pick(&[0, 0, 1_000, 20_000]);
    setup.flush_us = random.magnitude(10..200_000);
    setup.flush_us_per_mib = random.magnitude(10..20_000);
    setup.flush_blocks = random.one_in(2);
    setup.marks = !random.one_in(4);
    setup.sync_us = random.magnitude(10..5_000_000);
    setup.mark_fails = random.pick(&[0, 0, 2]);
    setup.clients = (0..random.below(4)).map(|_| client(&mut random, size)).collect();
    setup.limits = if random.one_in(3) { limits(&mut random, setup.link_bytes_per_s) } else { Vec::new() };
    if random.one_in(3) {
        setup.lost = (random.magnitude(2..1_000), 1 + u32::try_from(random.below(4)).unwrap());
    }
    setup.break_ms = random.one_in(8).then(|| random.below(2_000));
    setup.deadline_ms = 120_000;
    if random.one_in(4) {
        // Small writes fall everywhere while the disk is asked for holes and takes its time.
        setup.holes = 2;
        setup.look_us = random.magnitude(2_000..30_000);
        setup.whole_extents = 1;
        setup.clients = (0..=random.below(3))
            .map(|_| Client {
                until_ms: 500,
                in_order: false,
                ..Client::full_speed(0..size, CELL, 1 + random.below(8))
            })
            .collect();
    }
    setup.refuses_zeroes = setup.can.zero && random.one_in(5);
    setup
}

#[test]
fn seeds() {
    if let Ok(seed) = std::env::var("FLEXNBD_SEED") {
        let setup = world(seed.parse().unwrap());
        eprintln!("{setup:#?}");
        let out = run(&setup);
        return eprintln!("{out:#?}");
    }
    let seeds = std::env::var("FLEXNBD_SEEDS").map_or(SEEDS, |seeds| seeds.parse().unwrap());
    let workers = thread::available_parallelism().map_or(1, |workers| workers.get() as u64);
    thread::scope(|scope| {
        for worker in 0..workers {
            scope.spawn(move || {
                for seed in (worker..seeds).step_by(usize::try_from(workers).unwrap()) {
                    let _replay = Replay(seed);
                    run(&world(seed));
                }
            });
        }
    });
    eprintln!("{seeds} seeds: every migration has come to its end, and nothing was lost");
}
