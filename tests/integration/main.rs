//! Tests of the real binary: what the manual pages, the README and the specification of NBD promise to whoever runs it.

#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::indexing_slicing, reason = "a test fails by panic")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panic")]
#![allow(clippy::print_stderr, reason = "what a machine cannot test is said aloud")]
#![allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]

mod acl;
mod bad_disk;
mod bench_client;
mod cli;
mod control;
mod disk_engine;
mod durability;
mod fuse_disk;
mod gone;
mod install;
mod interop;
mod killswitch;
mod limits;
mod logs;
mod manual;
mod memory;
mod metrics;
mod migration;
mod names;
mod package;
mod power_failure;
mod protocol;
mod proxy;
mod read_only;
mod reconnect;
mod resize;
mod slow_changes;
mod snapshot;
mod sockets;
mod sparse;
mod spec;
mod stalled;
mod start;
mod stop;
mod supervisor;
mod support;
mod transfer;
mod units;
mod vanished;
