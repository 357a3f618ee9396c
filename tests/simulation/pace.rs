//! How long it takes, how much goes over the link, and how late clients are answered.

use crate::world::{run, Client, Outcome, Setup};
use flexnbd::migrate::{Abilities, Plan, Step};
use flexnbd::work::Extent;

const MIB: u64 = 1 << 20;
const MB: u64 = 1_000_000;

/// A steady client of 50 MB/s on 256 MiB over 1 GB/s, which is a quarter of a second for a copy.
fn steady(in_order: bool) -> Setup {
    let size = 256 * MIB;
    let client = Client { in_order, ..Client::steady(0..size, 64 << 10, 50 * MB) };
    Setup { clients: vec![client], ..Setup::new(1, size) }
}

#[test]
fn nobody_notices_when_nobody_writes() {
    // A pause target of a minute is no reason for a pause.
    for (max_pause_ms, latency_us) in [(100, 100), (0, 100), (60_000, 100), (100, 50_000)] {
        let out = run(&Setup { max_pause_ms, latency_us, ..Setup::new(1, 64 * MIB) });
        assert!(out.pause_ms <= 1 && out.flushes_in_pause == 0, "{max_pause_ms} {latency_us}: {out:?}");
        assert!(out.committed_ms <= 80 + latency_us / 100, "{latency_us}: {out:?}");
        assert_eq!(out.sent_bytes, 64 * MIB);
    }
}

#[test]
fn a_steady_client_is_neither_slowed_nor_paused_for_long() {
    for in_order in [true, false] {
        for (max_pause_ms, latency_us) in [(100, 100), (100, 10_000), (0, 100)] {
            let out = run(&Setup { max_pause_ms, latency_us, ..steady(in_order) });
            assert!(out.committed_ms <= 500, "{max_pause_ms} {latency_us}: {out:?}");
            assert!(out.pause_ms <= 10 + latency_us / 250, "{max_pause_ms} {latency_us}: {out:?}");
            assert_eq!(out.write_limit, None);
        }
    }
}

#[test]
fn a_slow_flush_costs_time_and_not_the_end() {
    for flush_blocks in [true, false] {
        for flush_us in [300_000, 1_000_000, 3_000_000] {
            let out = run(&Setup { flush_us, flush_blocks, ..steady(false) });
            assert!(out.committed_ms <= 500 + 10 * flush_us / 1_000, "{flush_us}: {out:?}");
            assert!(out.pause_ms <= 100 + flush_us / 1_000, "{flush_us}: {out:?}");
            assert!(out.given_up <= 1, "{flush_us}: {out:?}");
        }
    }
}

#[test]
fn a_slow_disk_behind_a_large_memory_gets_everything() {
    // All of the image would fit into the memory, and its flush would take longer than an answer may.
    for (mib, disk_bytes_per_s, late) in [(1_100, 10 * MB, 0), (120, MB, 2), (100, MB / 4, 4)] {
        for flush_blocks in [true, false] {
            let size = mib * MIB;
            let flush_us_per_mib = MIB * 1_000_000 / disk_bytes_per_s;
            let clients = vec![Client::steady(0..size, 64 << 10, disk_bytes_per_s / 10)];
            let new = Setup { flush_us_per_mib, flush_blocks, clients, ..Setup::new(1, size) };
            let disk_ms = size * 1_000 / disk_bytes_per_s;
            let out = run(&Setup { deadline_ms: 10 * disk_ms, ..new });
            // What was sent in vain has to be flushed, too.
            assert!(out.committed_ms <= (2 + 2 * out.late) * disk_ms, "{disk_bytes_per_s}: {out:?}");
            assert!(out.late <= late, "{disk_bytes_per_s}: {out:?}");
            assert!(out.pause_ms <= 2_000, "{disk_bytes_per_s}: {out:?}");
        }
    }
}

#[test]
fn one_block_that_never_rests_is_migrated() {
    for size in [4_096, 4 * MIB] {
        for link_bytes_per_s in [300_000, MB, 100 * MB] {
            for latency_us in [100, 10_000, 150_000] {
                for max_pause_ms in [0, 100] {
                    let clients = vec![Client::full_speed(0..4_096, 4_096, 1)];
                    let new = Setup::new(1, size);
                    let out =
                        run(&Setup { link_bytes_per_s, latency_us, max_pause_ms, clients, write_us: 1_000, ..new });
                    let copy_ms = size * 1_000 / link_bytes_per_s;
                    assert!(out.committed_ms <= copy_ms + 3_500 + 10 * latency_us / 1_000, "{out:?}");
                    // The block, once more if it was on its way, a flush, and a round trip for each.
                    let block_ms = size.min(64 << 10) * 1_000 / link_bytes_per_s;
                    assert!(out.pause_ms <= 2 * block_ms + 6 * latency_us / 1_000 + 50, "{out:?}");
                }
            }
        }
    }
}

#[test]
fn blocks_that_are_always_being_written_are_migrated() {
    let size = 8 * MIB;
    for (depth, link_bytes_per_s, write_us) in [
        (4, MB, 2_000),
        (8, MB, 20_000),
        (32, MB, 20_000),
        (128, MB, 20_000),
        (8, 10 * MB, 2_000),
        (32, 10 * MB, 50_000),
        (128, 10 * MB, 2_000),
    ] {
        // Each block has a write on its way at any time, so that many find it dirty and pay only when they are done.
        let clients = vec![Client::full_speed(0..depth * (64 << 10), 64 << 10, depth)];
        let out = run(&Setup { link_bytes_per_s, write_us, clients, ..Setup::new(1, size) });
        let copy_ms = size * 1_000 / link_bytes_per_s;
        assert!(out.committed_ms <= 6 * copy_ms + 3_000, "{depth} {link_bytes_per_s}: {out:?}");
        assert!(out.pause_ms <= 100, "{depth} {link_bytes_per_s}: {out:?}");
        assert!(out.write_limit.is_some());
    }
}

#[test]
fn clients_faster_than_the_link_are_slowed_until_it_ends() {
    for (link_bytes_per_s, flush_us) in [(MB, 2_000), (10 * MB, 200_000), (10 * MB, 2_000), (100 * MB, 200_000)] {
        let size = 8 * MIB;
        let clients = vec![
            Client::full_speed(0..size / 2, 256 << 10, 8),
            Client { in_order: false, ..Client::full_speed(0..size, 64 << 10, 8) },
        ];
        let new = Setup::new(1, size);
        let out = run(&Setup { link_bytes_per_s, flush_us, clients, write_us: 2_000, deadline_ms: 120_000, ..new });
        let copy_ms = size * 1_000 / link_bytes_per_s;
        assert!(out.committed_ms <= 6 * copy_ms + 3_000, "{link_bytes_per_s} {copy_ms}: {out:?}");
        assert!(out.pause_ms <= 100 + flush_us / 1_000, "{link_bytes_per_s}: {out:?}");
        assert!(out.write_limit.is_some());
    }
}

#[test]
fn trims_of_half_the_image_do_not_stop_other_writes() {
    for zero in [true, false] {
        let clients = vec![
            Client { zeroes: 1, ..Client::full_speed(0..64 * MIB, 32 * MIB, 1) },
            Client::steady(0..64 * MIB, 64 << 10, 5 * MB),
        ];
        let can = Abilities { zero, flush: true };
        let new = Setup::new(1, 64 * MIB);
        let out = run(&Setup { can, link_bytes_per_s: 100 * MB, write_us: 5_000, clients, ..new });
        assert!(out.committed_ms <= 6_000 && out.longest_ms <= 2_000, "{out:?}");
    }
}

#[test]
fn long_zeroes_do_not_keep_a_migration_from_its_end() {
    // Three clients write zeroes over all of the image again and again, with half a minute of work for the disk always on its
    // way, also before there is a migration; another client writes a little.
    for break_ms in [None, Some(1)] {
        let size = 768 * MIB;
        let zeroing = Client { zeroes: 1, no_hole: true, ..Client::full_speed(0..size, size, 32) };
        let clients = vec![zeroing.clone(), zeroing.clone(), zeroing, Client::steady(0..size, 64 << 10, MB)];
        let new = Setup { link_bytes_per_s: 50 * MB, zero_us_per_mib: 500, clients, ..Setup::new(1, size) };
        let out = run(&Setup { break_ms, deadline_ms: 120_000, ..new });
        assert!(out.committed_ms <= 90_000 && out.given_up == 0 && out.pause_ms <= 100, "{out:?}");
    }
}

#[test]
fn a_link_that_becomes_slow_is_noticed() {
    // How long it takes depends on where the writes of a few milliseconds fall.
    let mut committed_ms = 0;
    for seed in 0..8 {
        let clients = vec![Client::steady(0..64 * MIB, 64 << 10, 20 * MB)];
        let new = Setup { clients, link_bytes_per_s: 500 * MB, ..Setup::new(seed, 64 * MIB) };
        let out = run(&Setup { link_changes: vec![(130, 5 * MB)], ..new.clone() });
        assert!(out.committed_ms <= 40_000 && out.pause_ms <= 100 && out.given_up <= 1, "{out:?}");
        committed_ms += out.committed_ms;
        let out = run(&Setup { link_changes: vec![(130, 5 * MB), (2_000, 500 * MB)], ..new });
        assert!(out.committed_ms <= 7_000 && out.pause_ms <= 100, "{out:?}");
    }
    assert!(committed_ms / 8 <= 30_000, "{committed_ms}");
}

/// Data sent in every stretch of two seconds, in thousandths of what the limit allows.
fn shares(out: &Outcome, limit: u64) -> Vec<u64> {
    let tenths: Vec<u64> = (0..out.committed_ms / 100).map(|at| out.sent.get(&at).copied().unwrap_or(0)).collect();
    tenths.windows(20).map(|sent| sent.iter().sum::<u64>() * 500 / limit).collect()
}

#[test]
fn the_limit_is_observed_and_used() {
    for limit in [100_000, MB, 7_777_777, 100 * MB] {
        for latency_us in [100, 20_000] {
            let size = limit * 5 / 512 * 512;
            let out = run(&Setup { limit: Some(limit), latency_us, ..Setup::new(1, size) });
            for (at, share) in shares(&out, limit).into_iter().enumerate() {
                // What is left at the end is no full stretch.
                assert!(share <= 1_100 && (share >= 900 || at > 25), "{limit}: {share} from tenth {at} on: {out:?}");
            }
            assert!((4_500..5_300).contains(&out.committed_ms), "{limit}: {out:?}");
        }
    }
}

/// What comes next in a file that is all data.
fn next_of_data(plan: &mut Plan, now_ms: u64) -> Step {
    match plan.next(now_ms) {
        Step::Look(offset) => {
            plan.note_extent(Extent { range: offset..u64::MAX, is_hole: false });
            plan.next(now_ms)
        }
        step => step,
    }
}

#[test]
fn a_new_limit_counts_at_once() {
    let mut plan = Plan::new(100 * MIB, 100, 60_000, Some(1), 5);
    plan.begin(Abilities { zero: true, flush: true }, 5);
    assert_eq!(next_of_data(&mut plan, 5), Step::Data(0..4_096));
    assert_eq!(next_of_data(&mut plan, 5), Step::WaitUntil(5 + 4_096_000));
    plan.set_limit(None, 1_000);
    assert_eq!(next_of_data(&mut plan, 1_000), Step::Data(4_096..4_096 + (256 << 10)));
    plan.set_limit(Some(1), 1_000);
    assert!(matches!(next_of_data(&mut plan, 1_000), Step::Data(range) if range.end - range.start == 4_096));
    assert_eq!(next_of_data(&mut plan, 1_001), Step::WaitUntil(1_000 + 4_096_000));
    plan.set_limit(Some(4_096_000), 1_001);
    assert!(matches!(next_of_data(&mut plan, 1_001), Step::Data(_)));
    assert!(matches!(next_of_data(&mut plan, 1_001), Step::WaitUntil(1_002..=1_070)));
}

#[test]
fn an_empty_image_of_terabytes_takes_as_many_requests_as_it_must() {
    let size = 2 << 40;
    let mut plan = Plan::new(size, 100, 60_000, None, 0);
    plan.begin(Abilities { zero: true, flush: true }, 0);
    let mut requests = 0;
    loop {
        match plan.next(0) {
            Step::Look(offset) => plan.note_extent(Extent { range: offset..size, is_hole: true }),
            Step::Zero(range) => {
                plan.acked(&range, 0);
                requests += 1;
            }
            Step::Flush => plan.flushed(0),
            Step::Quiesce => plan.quiesced(),
            Step::Commit => break,
            step => panic!("{step:?}"),
        }
    }
    assert_eq!(requests, size / (128 * MIB));
    assert_eq!(plan.progress().zeroed_bytes, size);
}
