//! PURE: the oracles of the fuzzers, each a function from bytes to nothing that panics when a promise is broken.
//!
//! This is a library of the fuzz targets and a module of `tests/machine`, which replays the seeds under `fuzz/seeds`
//! without a fuzzer; it therefore names `flexnbd` and its own modules alone.
//! The first [`CHOICES`] bytes of an input decide what a peer does not: how its bytes are cut up, in which order work is
//! done, what fails. The rest is what the peer sends.
//!
//! A target is added in four places: its oracle, in a file here, exported below; `fuzz_targets/NAME.rs`, which calls it;
//! its `[[bin]]` in `Cargo.toml`; the seeds that `tests/machine/seeds.rs` makes for it, and its line in the table there.
//! `FLEXNBD_WRITE_SEEDS=1 cargo test --test machine seeds` then writes those seeds, as `fuzz/seeds/NAME/made-*`, which
//! nobody edits.
//!
//! `make fuzz-seeds` adds what fuzzing has found and no seed reaches, as `fuzz/seeds/NAME/found-*`. An input that has
//! shown a fault is added by hand, under a name that says what it does. Nothing else is needed: the tests replay every
//! file there, and the fuzzer starts from them.

mod acl;
mod choices;
mod client;
mod control;
pub mod drive;
mod export;
mod haggling;
mod newstyle;
mod oldstyle;
mod upstream;

pub use acl::acl;
pub use client::client;
pub use control::control;
pub use haggling::haggling;
pub use newstyle::newstyle_session;
pub use oldstyle::session;
pub use upstream::upstream;

/// How many bytes of choices stand before what the peer sends.
pub const CHOICES: usize = 16;
