//! The two ends of the protocol against each other in memory: no socket, no file, no clock.
//!
//! [`oracles::drive`] drives every conversation, here as in the fuzzers, and holds the rules of them all; [`disk`] does
//! the work. A [`plan::Plan`] is what an oldstyle client says and what must come back, [`pair`] has a `ClientSession`
//! take the answers; [`newstyle`] is the same with what haggling brings. [`scripts`] are written by hand and cut at every
//! byte, [`client`] lets a `ClientSession` say what it wants itself, [`simulation`] makes plans and schedules up from a
//! seed, [`seeds`] replays what the fuzzers start from. [`kept`] takes single steps instead.
#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::indexing_slicing, reason = "a test fails by panic")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panic")]
#![allow(clippy::print_stderr, reason = "the seed of a failure is said aloud")]
#![allow(clippy::cast_possible_truncation, reason = "patterns of bytes are made by cutting numbers short")]

mod client;
mod disk;
mod kept;
mod newstyle;
#[path = "../../fuzz/src/lib.rs"]
mod oracles;
mod pair;
mod plan;
mod reads;
mod scripts;
mod seeds;
mod simulation;
