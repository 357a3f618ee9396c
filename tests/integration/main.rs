//! Tests of the real binary: what the manual, the contract and the README promise to whoever runs it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panic")]
#![allow(clippy::print_stderr, reason = "what a machine cannot test is said aloud")]
#![allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]

mod acl;
mod cli;
mod control;
mod durability;
mod footprint;
mod interop;
mod interop_newstyle;
mod killswitch;
mod logs;
mod migration;
mod migration_faults;
mod migration_load;
mod migration_net;
mod mirror_interop;
mod newstyle;
mod peers;
mod protocol;
mod sparse;
mod spec_durability;
mod spec_handshake;
mod spec_hostile;
mod spec_structured;
mod spec_transmission;
mod start;
mod stop;
mod transfer;
mod util;
