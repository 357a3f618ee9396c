//! The log: the manual's line format on stderr, through `log` and `fern`.
//!
//! ```text
//! <TIMESTAMP>:<LEVEL>:<PID> <THREAD> <SOURCEFILE:SOURCELINE>: <MSG>
//! ```
//!
//! Where stderr is systemd's journal, its own number of the level stands before that (`<4>`, see sd-daemon(3)); the journal
//! takes it off.
//!
//! Invariants:
//!
//! 1. A record is one line of at most [`LINE_MAX`] bytes, whatever a path or a peer put into its message.
//! 2. A write to stderr never waits: a line that finds no room is dropped and counted; the count is logged once there is
//!    room.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::panic::{Location, PanicHookInfo};
use std::sync::atomic::{AtomicU64, Ordering};

use log::{Level, LevelFilter, Record};

use crate::printable;
use crate::sys;

/// The longest line in bytes, with its newline. No other writer's output gets into the middle of a write of that size to
/// a pipe, and a pipe that polls as writable has room for it (see pipe(7)).
pub const LINE_MAX: usize = libc::PIPE_BUF;

/// The target of records that say why the program ends abnormally; `log` has no level for them.
pub const FATAL: &str = "fatal";

/// Logs why the program is about to end abnormally: level `F`, shown even when quiet.
macro_rules! fatal {
    ($($message:tt)+) => { log::error!(target: $crate::logging::FATAL, $($message)+) };
}
pub(crate) use fatal;

/// How much to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verbosity {
    /// Only `F`.
    Quiet,
    /// `W` and above.
    Normal,
    /// `I` and above; in a debug build `D` as well.
    Verbose,
}

/// Starts the log and makes a panic end the program as any other fatal error does: one `F` line and exit code 1, no
/// SIGABRT. Only the first call in a process has an effect.
pub fn init(verbosity: Verbosity) {
    if dispatch(verbosity, is_journal()).apply().is_ok() {
        std::panic::set_hook(Box::new(exit_on_panic));
    }
}

/// True when stderr is the stream to the journal that `JOURNAL_STREAM` names, by its device and inode. A program that was given
/// another stderr may have inherited the variable all the same.
fn is_journal() -> bool {
    let found = io::stderr().as_fd().try_clone_to_owned().and_then(|stderr| File::from(stderr).metadata());
    let named = std::env::var("JOURNAL_STREAM");
    found.is_ok_and(|stderr| named.is_ok_and(|named| named == format!("{}:{}", stderr.dev(), stderr.ino())))
}

fn dispatch(verbosity: Verbosity, for_journal: bool) -> fern::Dispatch {
    let level = match verbosity {
        Verbosity::Quiet => LevelFilter::Error,
        Verbosity::Normal => LevelFilter::Warn,
        Verbosity::Verbose if cfg!(debug_assertions) => LevelFilter::Debug,
        Verbosity::Verbose => LevelFilter::Info,
    };
    fern::Dispatch::new()
        .level(level)
        .filter(move |metadata| verbosity != Verbosity::Quiet || metadata.target() == FATAL)
        .chain(fern::Output::call(move |record| emit(record, for_journal)))
}

fn exit_on_panic(info: &PanicHookInfo) {
    let payload = info.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let message = text.or_else(|| payload.downcast_ref().map(String::as_str)).unwrap_or("no message");
    log::logger().log(
        &Record::builder()
            .level(Level::Error)
            .target(FATAL)
            .file(info.location().map(Location::file))
            .line(info.location().map(Location::line))
            .args(format_args!("internal error: {message}"))
            .build(),
    );
    std::process::exit(1);
}

/// Writes a record to stderr, or counts it as lost (invariant 2).
fn emit(record: &Record, for_journal: bool) {
    static LOST: AtomicU64 = AtomicU64::new(0);
    let lost = LOST.swap(0, Ordering::Relaxed);
    let told = lost == 0
        || write_now(
            &Record::builder()
                .level(Level::Warn)
                .file(Some(file!()))
                .line(Some(line!()))
                .args(format_args!("{lost} log lines lost, because stderr took no more"))
                .build(),
            for_journal,
        );
    if !told {
        LOST.fetch_add(lost + 1, Ordering::Relaxed);
    } else if !write_now(record, for_journal) {
        LOST.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes a record if stderr has room, and says whether it had. Errors are ignored: there is no place to report them.
fn write_now(record: &Record, for_journal: bool) -> bool {
    let mut stderr = io::stderr().lock();
    let room = sys::writable_now(stderr.as_fd());
    if room {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let line = line(record, for_journal, sys::monotonic_ms(), std::process::id(), thread);
        let _ = stderr.write_all(line.as_bytes());
    }
    room
}

/// A record in the manual's format, newline included.
fn line(record: &Record, for_journal: bool, now_ms: u64, pid: u32, thread: &str) -> String {
    let (level, priority) = match record.level() {
        Level::Error if record.target() == FATAL => ('F', 3),
        Level::Error => ('E', 3),
        Level::Warn => ('W', 4),
        Level::Info => ('I', 6),
        Level::Debug | Level::Trace => ('D', 7),
    };
    let file = record.file().unwrap_or("unknown");
    let number = record.line().unwrap_or(0);
    let mut line = OneLine(if for_journal { format!("<{priority}>") } else { String::new() });
    // Only a Display implementation can fail here; what it wrote before that is still worth a line.
    let _ = write!(line, "{now_ms}:{level}:{pid} {thread} {file}:{number}: {}", record.args());
    let mut line = line.0;
    while line.len() >= LINE_MAX {
        line.pop();
    }
    line.push('\n');
    debug_assert!(line.len() <= LINE_MAX && line.matches('\n').count() == 1, "invariant 1");
    line
}

/// Collects text up to the length of a line or a little more, with its control characters escaped.
struct OneLine(String);

impl fmt::Write for OneLine {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for character in text.chars() {
            if self.0.len() >= LINE_MAX {
                break;
            }
            printable::push(&mut self.0, character);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line_of(level: Level, target: &str, message: &str) -> String {
        let args = format_args!("{message}");
        line(
            &Record::builder().level(level).target(target).file(Some("src/x.rs")).line(Some(7)).args(args).build(),
            false,
            1234,
            42,
            "main",
        )
    }

    #[test]
    fn lines_have_the_format_of_the_manual() {
        let cases = [
            (Level::Error, FATAL, 'F'),
            (Level::Error, "flexnbd", 'E'),
            (Level::Warn, "flexnbd", 'W'),
            (Level::Info, "flexnbd", 'I'),
            (Level::Debug, "flexnbd", 'D'),
        ];
        for (level, target, letter) in cases {
            assert_eq!(
                line_of(level, target, "all is well"),
                format!("1234:{letter}:42 main src/x.rs:7: all is well\n")
            );
        }
    }

    #[test]
    fn control_characters_are_escaped() {
        let line = line_of(Level::Warn, "", "a\nb\r\t\0\u{1b}[2J\u{7f}\u{85}é");
        assert_eq!(line, "1234:W:42 main src/x.rs:7: a\\nb\\r\\t\\u0000\\u001b[2J\\u007f\\u0085é\n");
    }

    #[test]
    fn lines_are_cut_at_a_character() {
        let head = line_of(Level::Warn, "", "").len();
        for length in LINE_MAX - head - 1..LINE_MAX - head + 2 {
            let line = line_of(Level::Warn, "", &"x".repeat(length));
            assert_eq!(line.len(), (head + length).min(LINE_MAX));
            assert!(line.ends_with("x\n"));
        }
        for shift in 0..4 {
            let line = line_of(Level::Warn, "", &("x".repeat(shift) + &"\u{1f600}".repeat(LINE_MAX)));
            assert!(line.len() > LINE_MAX - 4 && line.len() <= LINE_MAX && line.ends_with("\u{1f600}\n"));
        }
        assert!(line_of(Level::Warn, "", &"\n".repeat(LINE_MAX)).len() <= LINE_MAX);
    }

    #[test]
    fn each_verbosity_shows_its_levels() {
        let debug = if cfg!(debug_assertions) { "FEWID" } else { "FEWI" };
        for (verbosity, shown) in [(Verbosity::Quiet, "F"), (Verbosity::Normal, "FEW"), (Verbosity::Verbose, debug)] {
            let (max, log) = dispatch(verbosity, false).into_log();
            let levels = [
                ('F', Level::Error, FATAL),
                ('E', Level::Error, "flexnbd::server"),
                ('W', Level::Warn, "flexnbd::server"),
                ('I', Level::Info, "flexnbd::server"),
                ('D', Level::Debug, "flexnbd::server"),
                ('T', Level::Trace, "mio::poll"),
            ];
            let enabled = levels.into_iter().filter(|(_, level, target)| {
                *level <= max && log.enabled(&log::Metadata::builder().level(*level).target(target).build())
            });
            assert_eq!(enabled.map(|(letter, ..)| letter).collect::<String>(), shown, "{verbosity:?}");
        }
    }
}
