//! The `flexnbd` program: hands its arguments to [`flexnbd::cli::run`] and exits with what comes back.

use std::process::ExitCode;

fn main() -> ExitCode {
    flexnbd::cli::run(std::env::args_os())
}
