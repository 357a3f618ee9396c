//! Puts load on an NBD server, so that the server is the bottleneck, and says how it did: one line of JSON for each job.
//!
//! ```text
//! load ADDRESS [export=NAME] [replies=simple|structured] [seconds=S] [stall=S] -- JOB [-- JOB ...]
//! ```
//!
//! ADDRESS is HOST:PORT or the path of a UNIX socket. The jobs run at the same time, in one thread, each on connections
//! of its own. Times are in seconds; `stall` is how long the server may leave everything unanswered. Of a JOB:
//!
//! | word | default | |
//! |---|---|---|
//! | `connections=N` | 1 | |
//! | `depth=N` | 1 | requests in flight on each connection |
//! | `block=BYTES` | 4k | of a request; bytes may end in k, m or g |
//! | `write=PERCENT` | 0 | share of writes, the rest are reads |
//! | `command=zeroes\|trim\|cache\|status` | none | every request asks for zeroes that take room, a trim, a hint to cache, or extents (which needs `replies=structured`) |
//! | `fua=PERCENT` | 0 | share of FUA among the writes |
//! | `order=random\|sequential` | random | random: no block twice before each was there once |
//! | `from=BYTES`, `size=BYTES` | the export | the range; sequential connections have a part of it each |
//! | `pace=BYTES` | none | per second, at most |
//! | `flush=BYTES` | none | one FLUSH after so many bytes of writes |
//! | `ops=N` | none | requests but for FLUSH, at most; the job ends with them or with `seconds` |
//! | `data=copy\|discard\|check` | copy | what is read is received, or thrown away by the kernel (TCP only), or compared with what `check` writes |
//! | `seed=N` | 1 | |
//!
//! The exit code is 0 when every request was answered, be it with an error (`errors`) or with other data than was
//! written (`mismatches`, with `data=check`).
#![allow(unreachable_pub, reason = "a test binary has no outside")]
#![allow(clippy::indexing_slicing, reason = "a test fails by panic")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program")]

mod client;

use std::process::ExitCode;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match client::Plan::parse(&words).and_then(|plan| client::run(&plan)) {
        Ok(reports) => {
            for report in reports {
                println!("{}", report.json());
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::FAILURE
        }
    }
}
