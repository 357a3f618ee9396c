//! The harness: the real binary, raw clients, scripted peers, and waits for conditions. Nothing here sleeps a guess, and
//! nothing waits without a deadline.

pub mod fading;
pub mod fuse;
pub mod ledger;
pub mod newstyle;
pub mod peers;
pub mod shadow;

mod client;
mod link;
mod process;
mod server;
mod system;

pub use client::{errno, flag, greeting, kind, reply, request, uninterrupted, Client, Scripted, GREETING_MAGICS};
pub use link::Link;
pub use process::{run, run_command, run_within, Output, Process, TempDir};
pub use server::{Builder, Server, Status};
pub use system::{has, leave_stale_socket, must, not_tested, program, reserved_port, Loop, Mount, Need, Throttle};

use std::fmt::Display;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// The program under test.
pub const BIN: &str = env!("CARGO_BIN_EXE_flexnbd");
/// How long anything may take that should take no time, on a machine that is busy with the other tests.
pub const SOON: Duration = Duration::from_secs(30);
/// Makes strace keep a server from finding anything in the page cache, so that each read is a `pread64`.
pub const UNCACHED: &str = "inject=preadv2:error=EAGAIN";
/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(2);

/// Asks `probe` until it has an answer; fails the test when there is none within `deadline`.
#[track_caller]
pub fn wait_for<T>(what: impl Display, deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + deadline;
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(Instant::now() < give_up, "{what}: not within {deadline:?}");
        thread::sleep(POLL);
    }
}

/// Bytes a file takes on its file system; holes take none.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// `length` bytes that look random, are never zero, and are the same for the same seed.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8 | 1
    };
    (0..length).map(|_| next()).collect()
}
