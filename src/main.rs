//! The `flexnbd` program: hands its arguments to [`flexnbd::cli::run`] and exits with what comes back.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: flexnbd::sys::memory::Allocator = flexnbd::sys::memory::Allocator::of_program();

fn main() -> ExitCode {
    flexnbd::cli::run(std::env::args_os())
}
