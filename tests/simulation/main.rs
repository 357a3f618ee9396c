//! The plan of a migration against a shadow source and destination, in simulated time: no socket, no file, no clock.
//!
//! [`world`] is everything around the plan: a file that clients write, a link, a destination that answers in any order.
//! It holds the plan to its promises at every step. [`seeds`] makes worlds up, thousands of them; [`faults`] lets an
//! attempt fail at every step there is; [`marks`] kills either side at every moment and serves both; [`pace`] asks for figures: how long, how much, how late.
//!
//! A failed seed is printed; `FLEXNBD_SEED=that cargo test --test simulation seeds` runs it again. With
//! `FLEXNBD_SEEDS=200000` there are so many, instead of 2,000.
#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::indexing_slicing, reason = "a test fails by panic")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panic")]
#![allow(clippy::print_stderr, reason = "figures and seeds are said aloud")]

mod faults;
mod marks;
mod pace;
mod random;
mod seeds;
mod upstream;
mod world;
