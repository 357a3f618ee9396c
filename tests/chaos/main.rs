//! Migrations of the real binary under clients that never stop writing, while everything goes wrong that a seed decides:
//! connections are cut at chosen messages, servers are killed, stopped and told to break off, disks are slow or full.
//!
//! A [`plan`] is all that a seed decides; a [`round`] plays it: [`writer`]s, each with the [`shadow`] of its bytes, follow
//! the image from [`place`] to place, while one [`migration`] after the other goes through a [`forwarder`]. At the end of
//! each, the rules of the README say where the image is. It has to hold all that was acknowledged, nobody else may claim
//! it, and nothing may take for ever.
//!
//! `make chaos ROUNDS=1000 SEED=1` plays so many, from that seed on. What a seed decides is the same each time; what
//! the machine makes of it is not, so a seed may need to be played some times to fail again.
#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::indexing_slicing, reason = "a test fails by panic")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panic")]
#![allow(clippy::print_stderr, reason = "figures and seeds are said aloud")]
#![allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]

mod conversation;
mod forwarder;
mod migration;
mod place;
mod plan;
#[allow(dead_code, reason = "what the simulation draws is more than this needs")]
#[path = "../simulation/random.rs"]
mod random;
mod round;
mod shadow;
mod site;
#[allow(dead_code, unused_imports, reason = "the harness of the integration tests is more than this needs")]
#[path = "../integration/support/mod.rs"]
mod support;
mod writer;

use plan::Plan;
use round::Report;
use std::collections::BTreeMap;
use std::env;
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::Instant;

/// How many rounds there are unless `FLEXNBD_ROUNDS` says otherwise.
const ROUNDS: u64 = 50;
/// How many are played at once: most of the time of each is waiting.
const AT_ONCE: usize = 8;

#[test]
fn rounds() {
    let setting = |name: &str| env::var(name).ok().map(|value| value.parse::<u64>().expect(name));
    let seed = setting("FLEXNBD_SEED");
    let first = seed.unwrap_or(1);
    let end = first + setting("FLEXNBD_ROUNDS").unwrap_or(if seed.is_some() { 1 } else { ROUNDS });
    let began = Instant::now();
    let next = AtomicU64::new(first);
    let (total, failed) = (Mutex::new(Report::default()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= end {
                    break;
                }
                match play(seed) {
                    Some(report) => total.lock().unwrap().add(report),
                    None => failed.lock().unwrap().push(seed),
                }
            });
        }
    });
    let total = total.into_inner().unwrap();
    eprintln!("{} rounds in {:?}: {total}", end - first, began.elapsed());
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {} rounds failed: seeds {failed:?}", failed.len(), end - first);
}

/// Plays one round; `None` when it has failed, which has been told then.
fn play(seed: u64) -> Option<Report> {
    // A panic says which seed it was by the name of its thread.
    let thread = thread::Builder::new().name(format!("seed {seed}"));
    let played = thread.spawn(move || catch_unwind(move || round::play(&Plan::new(seed)))).unwrap().join().unwrap();
    if played.is_err() {
        eprintln!("{:#?}", Plan::new(seed));
        eprintln!("to play it again: make chaos SEED={seed} ROUNDS=1");
    }
    played.ok()
}

impl Report {
    fn add(&mut self, other: Self) {
        self.moved += other.moved;
        self.stayed += other.stayed;
        self.requests += other.requests;
        self.happened.extend(other.happened);
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut counts: BTreeMap<String, u64> = BTreeMap::new();
        for act in &self.happened {
            let name = format!("{act:?}");
            *counts.entry(name.split('(').next().unwrap_or_default().to_owned()).or_default() += 1;
        }
        write!(
            f,
            "{} images moved, {} stayed, {} requests answered; {counts:?}",
            self.moved, self.stayed, self.requests
        )
    }
}
