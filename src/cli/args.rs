//! The command line as data: every mode, option and help text, and nothing else.
//!
//! The build script includes this file to make the manual pages and shell completions, so it imports only `std` and
//! `clap`. What needs the project to judge (addresses, access control entries) stays text here; [`super`] checks it.
//! Help texts break their own lines (`verbatim_doc_comment`), because `clap` is built without its line wrapping.

#![allow(clippy::doc_markdown, reason = "most comments here are help texts, where backticks would show")]

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// The manual's bound on what one query carries, read or written.
const SIZE_MAX: u64 = 1 << 30;
/// The manual's bound; with it, offset plus size fits a signed 64-bit file offset.
const FROM_MAX: u64 = 1 << 62;
/// More connections than any process may have descriptors; keeps a slip of the finger from looking like a limit.
const CLIENTS_MAX: u64 = 1_000_000;
/// A year; a longer time limit limits nothing.
const KILLSWITCH_MAX_S: u64 = 365 * 24 * 60 * 60;

/// What `help` can explain: the names of all [`Mode`]s.
pub const MODES: [&str; 6] = ["serve", "read", "write", "acl", "status", "help"];

/// A fast NBD server.
#[derive(Debug, Parser)]
#[command(
    name = "flexnbd",
    version,
    disable_help_subcommand = true,
    subcommand_value_name = "MODE",
    subcommand_help_heading = "Modes",
    after_help = "\
Global options may stand before or after the mode. Of --verbose and --quiet the
last one wins. 'flexnbd help MODE' explains a mode and its options.

Exit codes:
  0   a clean stop
  1   anything that ended the program abnormally; one line on stderr says what
  2   wrong usage; nothing was started
  The control modes (acl, status) exit with the code of the server's answer:
  0 done, 1 refused, 9 missing command, 10 unknown command."
)]
pub struct CommandLine {
    /// Verbosity given before the mode.
    #[command(flatten)]
    pub log: LogFlags,
    /// What to do.
    #[command(subcommand)]
    pub mode: Mode,
}

/// The modes, one of which every command line names.
#[derive(Debug, Subcommand)]
pub enum Mode {
    /// Serve a file until SIGINT, SIGQUIT or SIGTERM.
    #[command(after_help = "\
Example: serve disk.img to one address and one network, with a control socket:
  flexnbd serve --addr 0.0.0.0 --port 4777 --file disk.img \\
      --sock /run/disk.sock 192.0.2.7 10.0.0.0/8")]
    Serve(ServeArgs),
    /// Read bytes from a server to stdout, in a single NBD query.
    #[command(after_help = "\
Example: the first 512 bytes of a served image:
  flexnbd read --addr 127.0.0.1 --port 4777 --from 0 --size 512 > head.bin")]
    Read(TransferArgs),
    /// Write bytes from stdin to a server, in a single NBD query.
    #[command(after_help = "\
Example: put those 512 bytes back:
  flexnbd write --addr 127.0.0.1 --port 4777 --from 0 --size 512 < head.bin")]
    Write(TransferArgs),
    /// Replace the access control list of a running server.
    #[command(after_help = "\
Connected clients that the new list refuses are disconnected.

Example: from now on, only this host and one network:
  flexnbd acl --sock /run/disk.sock 127.0.0.1 ::1 10.0.0.0/8")]
    Acl(AclArgs),
    /// Print the status of a running server, a line of key=value pairs.
    #[command(after_help = "\
Example:
  flexnbd status --sock /run/disk.sock")]
    Status(StatusArgs),
    /// Explain flexnbd, or one of its modes.
    #[command(after_help = "\
Example:
  flexnbd help serve")]
    Help(HelpArgs),
}

/// How much to log; given before the mode, after it, or both.
#[derive(Debug, Clone, Copy, Args)]
pub struct LogFlags {
    /// Log all there is to stderr, not only what goes wrong.
    #[arg(short, long, overrides_with_all = ["verbose", "quiet"], help_heading = "Global options")]
    pub verbose: bool,
    /// Log nothing to stderr but what ends the program abnormally.
    #[arg(short, long, overrides_with_all = ["verbose", "quiet"], help_heading = "Global options")]
    pub quiet: bool,
}

/// Options of a mode that serves a file.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub struct ServeArgs {
    /// Address to listen on: IPv4, IPv6 (also as [IPv6]), 0 for all IPv4
    /// addresses, or the path of a UNIX socket, which begins with '/'.
    #[arg(short = 'l', long, verbatim_doc_comment)]
    pub addr: String,
    /// TCP port to listen on, 0 to 65535; 0 picks a free one, which status
    /// shows. Required, unless ADDR is a path, where it is ignored.
    #[arg(short, long, value_parser = listen_port, allow_hyphen_values = true, verbatim_doc_comment)]
    pub port: Option<u16>,
    /// File or block device to serve. It must exist, be writable and hold at
    /// least 512 bytes; a tail of less than 512 bytes is not served.
    #[arg(short, long, verbatim_doc_comment)]
    pub file: PathBuf,
    /// Control socket to open, for modes such as status. It appears once
    /// the server is ready and is removed when it stops. [default: none]
    #[arg(short, long, verbatim_doc_comment)]
    pub sock: Option<PathBuf>,
    /// Let an empty access control list admit no client; without this option
    /// it admits every client.
    #[arg(short, long, verbatim_doc_comment)]
    pub default_deny: bool,
    /// Disconnect a client whose request takes longer than SECONDS, from its
    /// first byte to the last byte of the reply. A decimal above 0, such as
    /// 0.5; 120 if left out. Idle clients stay. [default: no limit]
    #[arg(
        short,
        long = "killswitch",
        value_name = "SECONDS",
        value_parser = seconds_to_ms,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "120",
        verbatim_doc_comment
    )]
    pub killswitch_ms: Option<u64>,
    /// Clients served at the same time, 1 to 1000000.
    #[arg(long, value_name = "N", default_value = "100", value_parser = client_count, allow_hyphen_values = true)]
    pub max_clients: usize,
    /// Clients to admit: IP addresses or networks such as 10.0.0.0/8 and
    /// 2001:db8::/32. Without any, see --default-deny.
    #[arg(value_name = "ACL_ENTRY", verbatim_doc_comment)]
    pub acl: Vec<String>,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `read` and `write`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub struct TransferArgs {
    /// Address of the server: IPv4, IPv6 (also as [IPv6]), or the path of its
    /// UNIX socket, which begins with '/'.
    #[arg(short = 'l', long, verbatim_doc_comment)]
    pub addr: String,
    /// TCP port of the server, 1 to 65535. Required, unless ADDR is a path,
    /// where it is ignored.
    #[arg(short, long, value_parser = remote_port, allow_hyphen_values = true, verbatim_doc_comment)]
    pub port: Option<u16>,
    /// Offset in the image to start at, in bytes; at most 2^62.
    #[arg(short = 'F', long, value_name = "OFFSET", value_parser = offset, allow_hyphen_values = true)]
    pub from: u64,
    /// Bytes to transfer; at most 2^30.
    #[arg(short = 'S', long, value_parser = size, allow_hyphen_values = true)]
    pub size: u32,
    /// Local IP address to connect from, where the server's access control
    /// list asks for a certain one. [default: the system's choice]
    #[arg(short, long, value_name = "BIND_ADDR", verbatim_doc_comment)]
    pub bind: Option<String>,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `acl`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub struct AclArgs {
    /// Control socket of the server.
    #[arg(short, long)]
    pub sock: PathBuf,
    /// The new list: IP addresses or networks such as 10.0.0.0/8 and
    /// 2001:db8::/32. At least one.
    #[arg(value_name = "ACL_ENTRY", required = true, verbatim_doc_comment)]
    pub acl: Vec<String>,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `status`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub struct StatusArgs {
    /// Control socket of the server.
    #[arg(short, long)]
    pub sock: PathBuf,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `help`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub struct HelpArgs {
    /// Mode to explain; without one, flexnbd as a whole.
    #[arg(value_parser = MODES, hide_possible_values = true)]
    pub mode: Option<String>,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

fn listen_port(text: &str) -> Result<u16, String> {
    whole(text, 0..=u64::from(u16::MAX))
}

fn remote_port(text: &str) -> Result<u16, String> {
    whole(text, 1..=u64::from(u16::MAX))
}

fn client_count(text: &str) -> Result<usize, String> {
    whole(text, 1..=CLIENTS_MAX)
}

fn offset(text: &str) -> Result<u64, String> {
    whole(text, 0..=FROM_MAX)
}

fn size(text: &str) -> Result<u32, String> {
    whole(text, 0..=SIZE_MAX)
}

/// Parses decimal digits and nothing else: unlike `str::parse`, no `+`.
fn whole<T: TryFrom<u64>>(text: &str, range: RangeInclusive<u64>) -> Result<T, String> {
    digits(text)
        .filter(|number| range.contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| format!("expected a whole decimal number from {} to {}", range.start(), range.end()))
}

fn digits(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Parses seconds with up to three decimal places, above zero, into milliseconds.
fn seconds_to_ms(text: &str) -> Result<u64, String> {
    let parse = || {
        let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
        let fraction_ms = digits(&format!("{fraction:0<3}")).filter(|_| (1..=3).contains(&fraction.len()))?;
        digits(seconds)?.checked_mul(1000)?.checked_add(fraction_ms)
    };
    parse().filter(|ms| (1..=KILLSWITCH_MAX_S * 1000).contains(ms)).ok_or_else(|| {
        format!("expected decimal seconds from 0.001 to {KILLSWITCH_MAX_S}, with at most 3 places after the point")
    })
}
