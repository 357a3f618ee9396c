//! Clients and servers that others wrote, from Debian's packages, with ours at the other end. `make tools` installs them.

mod mirror;
mod newstyle;
mod oldstyle;
mod qemu;
mod tls;

use crate::support::{program, run_within, Output, TempDir};
use std::time::Duration;

/// How long one run of a client may take; only a hang takes that long.
const DEADLINE: Duration = Duration::from_secs(120);

/// Runs a client that must succeed, in a directory it may leave files in.
#[track_caller]
pub fn client(dir: &TempDir, name: &str, args: &[&str]) -> String {
    let mut command = program(name);
    let Output { code, stdout, stderr } = run_within(command.args(args).current_dir(dir.join("")), &[], DEADLINE);
    let stdout = String::from_utf8_lossy(&stdout).into_owned();
    assert_eq!(code, Some(0), "{name} {args:?}\n{stdout}\n{stderr}");
    stdout
}
