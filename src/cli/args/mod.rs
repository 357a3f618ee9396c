//! The command line as data: every mode, option and help text, and nothing else.
//!
//! The build script includes this file to make the manual pages and shell completions, so it imports only `std` and
//! `clap`. What takes the rest of the project to judge (addresses, access control entries) stays text; [`super`] checks it.
//! Help texts break their own lines (`verbatim_doc_comment`), because `clap` is built without its line wrapping.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "these docs are the help of the program, and brackets mean what they say"
)]
#![allow(clippy::doc_markdown, reason = "most comments here are help texts, where backticks would show")]

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// The most bytes one query reads or writes; the manual says so.
const SIZE_MAX: u64 = 1 << 30;
/// The largest offset; the manual says so. With it, offset plus size fits a signed 64-bit file offset.
const FROM_MAX: u64 = 1 << 62;
/// More clients than a process may have descriptors: a larger number is a typing error.
const CLIENTS_MAX: u64 = 1_000_000;
/// A year: a longer time limit would limit nothing.
const LIMIT_MAX_S: u64 = 365 * 24 * 60 * 60;
/// The longest name of an export, in bytes: that of any string ("Conventions" in the NBD specification).
pub(crate) const EXPORT_MAX: usize = 4096;
/// The longest pause that a server accepts, in milliseconds.
pub(crate) const PAUSE_MAX_MS: u64 = 60_000;

/// What `help` can explain: the names of all [`Mode`]s.
pub(crate) const MODES: [&str; 10] =
    ["serve", "listen", "mirror", "mirror-speed", "break", "acl", "status", "read", "write", "help"];

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
  0   a clean stop; of listen, only after it has received a whole image
  1   anything that ended the program abnormally; one line on stderr says what
  2   wrong usage; nothing was started
  The modes that take --sock SOCK of a running server (mirror, mirror-speed,
  break, acl, status) exit with the code of its answer: 0 done, 1 refused,
  9 missing command, 10 unknown command. mirror --wait exits with 0 when the
  migration is completed, with 1 when it ends otherwise.

The exit code of serve is 0 after a signal or a completed migration, and 1 if a
signal ended it during a migration. That of listen is 1 after a signal."
)]
pub(crate) struct CommandLine {
    /// Verbosity given before the mode.
    #[command(flatten)]
    pub log: LogFlags,
    /// What to do.
    #[command(subcommand)]
    pub mode: Mode,
}

/// The modes, one of which every command line names.
#[derive(Debug, Subcommand)]
pub(crate) enum Mode {
    /// Serve a file until a signal, or until it was migrated.
    #[command(after_help = "\
The server runs until SIGINT, SIGQUIT, SIGTERM or SIGHUP, which stop it at once.

Environment:
  FLEXNBD_MS_REQUEST_LIMIT_SECS  Seconds, such as 60 or 0.5, without progress on
          a request after which an attempt at a migration has failed and the
          next one is made. [default: 60]

Example: serve disk.img to one address and one network, with a control socket:
  flexnbd serve --addr 0.0.0.0 --port 4777 --file disk.img \\
      --sock /run/disk.sock 192.0.2.7 10.0.0.0/8")]
    Serve(ServeArgs),
    /// Receive a migration into a file, then exit with 0.
    #[command(after_help = "\
One sender at a time is taken. Until one has sent the whole image and said that
it is complete, every attempt that fails is followed by waiting for the next;
what was received so far is not an image to use. When the image is complete and
on stable storage, the exit code is 0. After SIGINT, SIGQUIT, SIGTERM or SIGHUP,
or an error of the file, it is 1. The file must exist and have the size of the
image that comes.

The options are those of serve. --killswitch bounds what one request of the
sender may take; --max-clients matters after --serve only.

Example: receive an image from one host:
  flexnbd listen --addr 0.0.0.0 --port 4779 --file disk.img \\
      --sock /run/disk.sock 192.0.2.7
Example: the same, and serve the image from then on:
  flexnbd listen --addr 0.0.0.0 --port 4779 --file disk.img \\
      --sock /run/disk.sock --serve 192.0.2.7 10.0.0.0/8")]
    Listen(ListenArgs),
    /// Migrate what a running server serves to another NBD server.
    #[command(after_help = "\
Prints 'Migration started' once the destination is connected and has the right
size. The server then copies the image while its clients go on, and exits with 0
when the destination has everything. A failure before 'Migration started' is
reported. After it, every failure is followed by another attempt from the start,
until one succeeds, the break mode, or a signal; clients do not notice. Images
smaller than 4096 bytes cannot be migrated.

Besides a server in listen mode the destination may be any NBD server, oldstyle
or newstyle, with an export of the same size that takes writes. One that offers
no FLUSH cannot be asked to put the copy on stable storage; the log and the
status (migration_durability=destination) say so.

Example: migrate, see how far it is, and give it less of the network:
  flexnbd mirror --addr 192.0.2.8 --port 4779 --sock /run/disk.sock
  flexnbd status --sock /run/disk.sock
  flexnbd mirror-speed --sock /run/disk.sock --max-speed 50000000
Example: stay until the image is at the destination and the file deleted:
  flexnbd mirror --addr 192.0.2.8 --port 4779 --sock /run/disk.sock \\
      --unlink --wait")]
    Mirror(MirrorArgs),
    /// Change the speed limit of a running migration.
    // With [OPTIONS], it would not fit a terminal.
    #[command(override_usage = "flexnbd mirror-speed --sock <SOCK> --max-speed <BYTES_PER_SECOND>")]
    #[command(after_help = "\
Example: at most 100 MB/s from now on, then as fast as possible:
  flexnbd mirror-speed --sock /run/disk.sock --max-speed 100000000
  flexnbd mirror-speed --sock /run/disk.sock --max-speed 0")]
    MirrorSpeed(MirrorSpeedArgs),
    /// Stop a running migration; the server and its clients go on.
    #[command(after_help = "\
Example:
  flexnbd break --sock /run/disk.sock")]
    Break(SockArgs),
    /// Replace the access control list of a running server.
    #[command(after_help = "\
Connected clients that the new list refuses are disconnected, and what they
have asked for and is not answered yet is dropped: once this is done, they
change the image no more. When the disk has not ended some of it within 10 s,
that is an error; the new list is in force all the same.

Example: from now on, only this host and one network:
  flexnbd acl --sock /run/disk.sock 127.0.0.1 ::1 10.0.0.0/8")]
    Acl(AclArgs),
    /// Print the status of a running server, a line of key=value pairs.
    #[command(after_help = "\
Example:
  flexnbd status --sock /run/disk.sock
Example: how many bytes each client has moved, with jq:
  flexnbd status --sock /run/disk.sock --json --clients |
      jq '.clients[] | .address, .bytes'")]
    Status(StatusArgs),
    /// Read bytes from a server to stdout, in a single NBD query.
    #[command(after_help = "\
Example: the first 512 bytes of a served image:
  flexnbd read --addr 127.0.0.1 --port 4777 --from 0 --size 512 > head.bin
Example: the same of an export that has a name, of any NBD server:
  flexnbd read --addr 192.0.2.8 --port 10809 --export disk \\
      --from 0 --size 512 > head.bin")]
    Read(TransferArgs),
    /// Write bytes from stdin to a server, in a single NBD query.
    #[command(after_help = "\
Example: put those 512 bytes back:
  flexnbd write --addr 127.0.0.1 --port 4777 --from 0 --size 512 < head.bin")]
    Write(TransferArgs),
    /// Explain flexnbd, or one of its modes.
    #[command(after_help = "\
Example:
  flexnbd help serve")]
    Help(HelpArgs),
}

/// How much to log; given before the mode, after it, or both.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct LogFlags {
    /// Log all there is to stderr, not only what goes wrong.
    #[arg(short, long, overrides_with_all = ["verbose", "quiet"], help_heading = "Global options")]
    pub verbose: bool,
    /// Log nothing to stderr but what ends the program abnormally.
    #[arg(short, long, overrides_with_all = ["verbose", "quiet"], help_heading = "Global options")]
    pub quiet: bool,
}

/// The values of `--disk-engine`; comments of their own would show in its help.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Engine {
    Auto,
    Sync,
    Ring,
}

/// Options of `serve`, and of `listen` with more.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
#[allow(clippy::struct_excessive_bools, reason = "each is an option of its own")]
pub(crate) struct ServeArgs {
    /// Address to listen on: IPv4, IPv6 (also as [IPv6]), 0 for all IPv4
    /// addresses, or the path of a UNIX socket, which begins with '/'.
    #[arg(short = 'l', long, verbatim_doc_comment)]
    pub addr: String,
    /// TCP port to listen on, 0 to 65535; 0 picks a free one, which status
    /// shows. Required, unless ADDR is a path, where it is ignored.
    #[arg(short, long, value_parser = listen_port, allow_hyphen_values = true, verbatim_doc_comment)]
    pub port: Option<u16>,
    /// File or block device with the image. It must exist, be writable and
    /// hold at least 512 bytes; a tail of less than 512 bytes is left out.
    #[arg(short, long, verbatim_doc_comment)]
    pub file: PathBuf,
    /// TCP port for newstyle clients, which most of today are (nbd-client,
    /// qemu, libnbd), at ADDR, 0 to 65535; 0 picks a free one, which status
    /// shows. They find the same image under the same rules; its export has
    /// no name. PORT above is for oldstyle clients. [default: none]
    #[arg(long, value_name = "PORT", value_parser = listen_port, allow_hyphen_values = true, verbatim_doc_comment)]
    pub newstyle_port: Option<u16>,
    /// UNIX socket to open for newstyle clients. [default: none]
    #[arg(long, value_name = "PATH")]
    pub newstyle_sock: Option<PathBuf>,
    /// Who waits for the disk: with ring the kernel (io_uring), so that no
    /// client waits for what another has asked of the disk; with sync the
    /// server; with auto the kernel where it can. ring fails where it cannot.
    /// [default: auto]
    #[arg(
        long,
        value_name = "ENGINE",
        value_enum,
        default_value_t = Engine::Auto,
        hide_default_value = true,
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub disk_engine: Engine,
    /// Let other servers of this machine have the image open, too; each of
    /// them needs this option. Without it, a second one is refused. While
    /// one migrates the image it has to be the only one.
    #[arg(long, verbatim_doc_comment)]
    pub shared_image: bool,
    /// Let nobody change the image: it is opened for reading only, and may
    /// be open in other servers, one of which may write it.
    #[arg(long, conflicts_with = "shared_image", verbatim_doc_comment)]
    pub read_only: bool,
    /// Answer no write, zeroing or trim before it is on stable storage, as
    /// if its client had set the FUA flag. For clients that reconnect by
    /// themselves and forget which of their writes were not flushed.
    #[arg(long, verbatim_doc_comment)]
    pub sync: bool,
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
    /// 0.5, behind '='; 120 if left out. Idle clients stay. [default: none]
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

/// Options of `listen`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub(crate) struct ListenArgs {
    /// All that `serve` takes.
    #[command(flatten)]
    pub serve: ServeArgs,
    /// Go on as a server on the same address and sockets once the migration
    /// is completed, instead of exiting; the port is never closed.
    #[arg(long = "serve", verbatim_doc_comment)]
    pub then_serve: bool,
}

/// Options of `mirror`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub(crate) struct MirrorArgs {
    /// IP address of the destination: IPv4, or IPv6 (also as [IPv6]).
    #[arg(short = 'l', long)]
    pub addr: String,
    /// TCP port of the destination, 1 to 65535.
    #[arg(short, long, value_parser = remote_port, allow_hyphen_values = true)]
    pub port: u16,
    /// Control socket of the local server to migrate from.
    #[arg(short, long)]
    pub sock: PathBuf,
    /// Delete the file of the local server when the destination has all of
    /// it, so that there is never a doubt which copy is the current one.
    #[arg(short, long, verbatim_doc_comment)]
    pub unlink: bool,
    /// Name of the export at the destination, at most 1017 bytes. Leave it
    /// out for the default export, and for an oldstyle server, which has no
    /// names. [default: none]
    #[arg(long, value_name = "NAME", value_parser = export, verbatim_doc_comment)]
    pub export: Option<String>,
    /// Local IP address to connect from, where the destination's access
    /// control list asks for a certain one. [default: the system's choice]
    #[arg(short, long, value_name = "BIND_ADDR", verbatim_doc_comment)]
    pub bind: Option<String>,
    /// Bytes to send per second at the most; 0 is no limit. mirror-speed
    /// changes it later. [default: 0]
    #[arg(
        short = 'm',
        long,
        value_name = "BYTES_PER_SECOND",
        value_parser = speed,
        allow_hyphen_values = true,
        verbatim_doc_comment
    )]
    pub max_speed: Option<u64>,
    /// Milliseconds that clients may be paused at the end, 0 to 60000. It is
    /// a target: they are paused once what is left can probably be sent in
    /// that time. [default: 100]
    #[arg(
        long = "max-pause",
        value_name = "MS",
        value_parser = pause,
        allow_hyphen_values = true,
        verbatim_doc_comment
    )]
    pub max_pause_ms: Option<u64>,
    /// Stay until the migration ends, and show its progress on stderr. Exit
    /// with 0 when it is completed; else say why not and exit with 1. To end
    /// the waiting (Ctrl-C) does not end the migration.
    #[arg(short, long, verbatim_doc_comment)]
    pub wait: bool,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `mirror-speed`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub(crate) struct MirrorSpeedArgs {
    /// Control socket of the server.
    #[arg(short, long)]
    pub sock: PathBuf,
    /// Bytes to send per second at the most, from now on; 0 is no limit.
    #[arg(short = 'm', long, value_name = "BYTES_PER_SECOND", value_parser = speed, allow_hyphen_values = true)]
    pub max_speed: u64,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `read` and `write`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub(crate) struct TransferArgs {
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
    /// Name of the export, at most 4096 bytes. Leave it out for the default
    /// export, and for an oldstyle server, which has no names.
    /// [default: none]
    #[arg(long, value_name = "NAME", value_parser = export, verbatim_doc_comment)]
    pub export: Option<String>,
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
pub(crate) struct AclArgs {
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
pub(crate) struct StatusArgs {
    /// Control socket of the server.
    #[arg(short, long)]
    pub sock: PathBuf,
    /// Print one JSON object instead, on one line.
    #[arg(long)]
    pub json: bool,
    /// Show every client too: its number, address, style of protocol, since
    /// when it is connected (in seconds since 1970), requests and bytes so
    /// far, and requests in flight. A line each, or an array in JSON.
    #[arg(long, verbatim_doc_comment)]
    pub clients: bool,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `break`, which says nothing but which server is meant.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub(crate) struct SockArgs {
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
pub(crate) struct HelpArgs {
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

fn speed(text: &str) -> Result<u64, String> {
    whole(text, 0..=u64::MAX)
}

fn export(text: &str) -> Result<String, String> {
    if text.len() <= EXPORT_MAX && !text.contains('\0') {
        return Ok(text.into());
    }
    Err(format!("expected at most {EXPORT_MAX} bytes, none of them NUL"))
}

fn pause(text: &str) -> Result<u64, String> {
    whole(text, 0..=PAUSE_MAX_MS)
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
pub(crate) fn seconds_to_ms(text: &str) -> Result<u64, String> {
    let parse = || {
        let (seconds, fraction) = text.split_once('.').unwrap_or((text, "0"));
        let fraction_ms = digits(&format!("{fraction:0<3}")).filter(|_| (1..=3).contains(&fraction.len()))?;
        digits(seconds)?.checked_mul(1000)?.checked_add(fraction_ms)
    };
    parse().filter(|ms| (1..=LIMIT_MAX_S * 1000).contains(ms)).ok_or_else(|| {
        format!("expected decimal seconds from 0.001 to {LIMIT_MAX_S}, with at most 3 places after the point")
    })
}
