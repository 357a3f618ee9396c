//! The two ends of the protocol against each other in memory: no socket, no file, no clock.
//!
//! A [`plan::Plan`] is what a client says and what must come back, [`pair::run`] holds that conversation between a
//! `ClientSession` and a `ServerSession` as a [`pair::Schedule`] cuts it up. [`scripts`] are written by hand and cut at
//! every byte, [`client`] lets a `ClientSession` say what it wants itself, [`simulation`] makes plans and schedules up
//! from a seed, [`seeds`] replays what the fuzzers start from.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]
// Patterns of bytes are made by cutting numbers short.
#![allow(clippy::cast_possible_truncation)]

mod client;
mod kept;
mod newstyle;
#[path = "../../fuzz/src/lib.rs"]
mod oracles;
mod pair;
mod plan;
mod scripts;
mod seeds;

mod simulation;
