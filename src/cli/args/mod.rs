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

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

pub(crate) mod common;
pub(crate) mod control;
pub(crate) mod proxy;
pub(crate) mod values;

use common::{AccessArgs, DoorArgs, LimitArgs, LogFlags};
use control::{AclArgs, LimitModeArgs, MirrorSpeedArgs, SnapshotArgs, SockArgs, StatusArgs};
use proxy::{ProxyArgs, SwitchArgs};
use values::{client_count, export, offset, pause, remote_port, size, speed};

/// What `help` can explain: the names of all [`Mode`]s.
pub(crate) const MODES: [&str; 15] = [
    "serve",
    "listen",
    "mirror",
    "mirror-speed",
    "break",
    "proxy",
    "switch",
    "resize",
    "snapshot",
    "limit",
    "acl",
    "status",
    "read",
    "write",
    "help",
];

/// The program of this name is the mode `proxy` alone.
pub(crate) const PROXY_PROGRAM: &str = "flexnbd-proxy";

/// What stands behind its name. On one line, it would not fit a terminal.
const PROXY_USAGE: &str = "--conn-addr <CONN_ADDR> --conn-port <CONN_PORT>
           --addr <ADDR> --port <PORT> [OPTIONS] [ACL_ENTRY]...";

/// What stands behind the name of a mode that serves an image; `--port` is not always required, but mostly wanted.
const SERVE_USAGE: &str = "--file <FILE> --addr <ADDR> --port <PORT> [OPTIONS]
           [ACL_ENTRY]...";

/// What stands behind the name of a mode that transfers bytes.
const TRANSFER_USAGE: &str = "--addr <ADDR> --port <PORT> --from <OFFSET>
           --size <SIZE> [OPTIONS]";

/// What that program takes.
pub(crate) fn proxy_program() -> clap::Command {
    let mut flexnbd = CommandLine::command();
    let mode = flexnbd.find_subcommand_mut("proxy").map(std::mem::take).unwrap_or_default();
    let notes = mode.get_after_help().map(|notes| notes.to_string().replace("flexnbd proxy ", "flexnbd-proxy "));
    mode.name(PROXY_PROGRAM)
        .bin_name(PROXY_PROGRAM)
        .version(env!("CARGO_PKG_VERSION"))
        .override_usage(format!("{PROXY_PROGRAM} {PROXY_USAGE}"))
        .after_help(notes.unwrap_or_default())
}

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
  break, switch, resize, snapshot, limit, acl, status) exit with the code of its
  answer: 0 done, 1 refused, 9 missing command, 10 unknown command. mirror
  --wait exits with 0 when the migration is completed, with 1 when it ends
  otherwise.

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
    #[command(override_usage = format!("flexnbd serve {SERVE_USAGE}"))]
    #[command(after_help = "\
The server runs until SIGINT, SIGQUIT or SIGTERM, which stop it at once. So does
SIGHUP where there is a terminal; without one it is ignored.

--port is not needed with --newstyle-port, and neither it nor --addr with
--newstyle-sock or with sockets that systemd passes (LISTEN_FDS). The names of
those say what they are for: oldstyle, control, and newstyle or any other.

An image that has been migrated away, and one that a migration has not filled,
are marked (extended attribute user.flexnbd.state). They are refused with exit
code 1 and a line that says where the image is; see --adopt.

Environment:
  FLEXNBD_MS_REQUEST_LIMIT_SECS  Seconds, such as 60 or 0.5, without progress on
          a request after which an attempt at a migration has failed and the
          next one is made. [default: 60]

Example: serve disk.img to one address and one network, with a control socket:
  flexnbd serve --addr 0.0.0.0 --port 4777 --file disk.img \\
      --sock /run/disk.sock 192.0.2.7 10.0.0.0/8")]
    Serve(ServeArgs),
    /// Receive a migration into a file, then exit with 0.
    #[command(override_usage = format!("flexnbd listen {SERVE_USAGE}"))]
    #[command(after_help = "\
One sender at a time is taken. Until one has sent the whole image and said that
it is complete, every attempt that fails is followed by waiting for the next;
what was received so far is not an image to use, and serve refuses the file from
its first change on. When the image is complete and on stable storage, serve
takes it, and the exit code is 0. After a signal that stops it, as with serve,
or an error of the file, it is 1. The file must exist and have the size of the
image that comes.

The options are those of serve. --killswitch bounds what one request of the
sender may take; --max-clients, --max-iops and --max-bytes-per-second matter
after --serve only.

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
  flexnbd mirror-speed --sock /run/disk.sock --max-speed 50M
Example: stay until the image is at the destination and the file deleted:
  flexnbd mirror --addr 192.0.2.8 --port 4779 --sock /run/disk.sock \\
      --unlink --wait")]
    Mirror(MirrorArgs),
    /// Change the speed limit of a running migration.
    // With [OPTIONS], it would not fit a terminal.
    #[command(override_usage = "flexnbd mirror-speed --sock <SOCK> --max-speed <BYTES_PER_SECOND>")]
    #[command(after_help = "\
Example: at most 100 MiB/s from now on, then as fast as possible:
  flexnbd mirror-speed --sock /run/disk.sock --max-speed 100M
  flexnbd mirror-speed --sock /run/disk.sock --max-speed 0")]
    MirrorSpeed(MirrorSpeedArgs),
    /// Stop a running migration; the server and its clients go on.
    #[command(after_help = "\
Example:
  flexnbd break --sock /run/disk.sock")]
    Break(SockArgs),
    /// Stand between clients and a server, and hide that it is away.
    #[command(override_usage = format!("flexnbd proxy {PROXY_USAGE}"))]
    #[command(after_help = "\
The proxy connects to the server first and listens when that has greeted; it
exits with 1 when that fails. From then on clients do not notice when the server
goes away: they wait, and nothing that was answered is lost, even when the
server's machine has crashed, as long as the proxy lives. It never asks the
server again only because an answer takes long. flexnbd-proxy is the mode proxy
of flexnbd under a name of its own.

Environment:
  FLEXNBD_UPSTREAM_TIMEOUT  Seconds without progress, a whole number above 0,
          after which the server counts as silent, and its machine as gone when
          nothing is acknowledged either. [default: 30]

Example: one client on a UNIX socket, the server on another host:
  flexnbd proxy --addr /run/disk.nbd --conn-addr 192.0.2.8 --conn-port 4777 \\
      --sock /run/proxy.sock")]
    Proxy(ProxyArgs),
    /// Change a running proxy to another server that has the image now.
    #[command(after_help = "\
The image must be the same, as after a migration; that is not checked but for
its size. What is asked of the present server is finished and flushed first,
unless that makes no progress for 10 s, which ends the attempt.

Example: go over to the server to which the image was migrated:
  flexnbd switch --sock /run/proxy.sock --conn-addr 192.0.2.9 --conn-port 4777
Example: before a migration, so that the proxy follows it by itself:
  flexnbd switch --sock /run/proxy.sock --conn-addr 192.0.2.9 \\
      --conn-port 4777 --when-lost")]
    Switch(SwitchArgs),
    /// Let a running server see that its file has grown.
    #[command(after_help = "\
Make the file or the block device larger first. Clients that connect from then
on see the new size; those that are connected may use it, once they have learnt
of it elsewhere. A file that has become smaller is refused, and so is a resize
during a migration. Prints the size that is served, in bytes.

Example:
  truncate --size +10G disk.img
  flexnbd resize --sock /run/disk.sock")]
    Resize(SockArgs),
    /// Copy the image of a running server, sharing its blocks.
    #[command(after_help = "\
The copy has the image as it is at one moment: all writes that were answered
before are in it, and none that comes later. Changes of clients wait until it is
made, which is given up after 20 s; reads go on. That takes a file system where
files can share blocks, such as btrfs and xfs, and FILE has to be on the same
one. It appears when it is whole and on stable storage, or not at all. What a
guest has not flushed is missing in it, as after a power failure.

Example:
  flexnbd snapshot --sock /run/disk.sock --to /srv/disk.monday.img")]
    Snapshot(SnapshotArgs),
    /// Limit what the clients of a running server may ask for.
    // With the options that are required, it would not fit a terminal.
    #[command(override_usage = "flexnbd limit [OPTIONS] --sock <SOCK>")]
    #[command(after_help = "\
The limits hold for all clients together, at once, and in the place of those
before; what is left out stays as it was. Clients that ask for more wait, each
in its turn, and none is cut for that by a killswitch. A request that is larger
than what a second allows goes alone, and the next one waits for as long as it
would have taken. Migrations are not limited by this; see mirror-speed.

Example: at most 1000 requests and 50 MiB per second, then as much as there is:
  flexnbd limit --sock /run/disk.sock --max-iops 1000 \\
      --max-bytes-per-second 50M
  flexnbd limit --sock /run/disk.sock --max-iops 0 --max-bytes-per-second 0")]
    Limit(LimitModeArgs),
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
      jq '.clients[] | .address, .bytes'
Example: metrics for the textfile collector of node-exporter:
  flexnbd status --sock /run/disk.sock --prometheus > disk.prom.new &&
      mv disk.prom.new disk.prom")]
    Status(StatusArgs),
    /// Read bytes from a server to stdout, in a single NBD query.
    #[command(override_usage = format!("flexnbd read {TRANSFER_USAGE}"))]
    #[command(after_help = "\
Example: the first 512 bytes of a served image:
  flexnbd read --addr 127.0.0.1 --port 4777 --from 0 --size 512 > head.bin
Example: the same of an export that has a name, of any NBD server:
  flexnbd read --addr 192.0.2.8 --port 10809 --export disk \\
      --from 0 --size 512 > head.bin")]
    Read(TransferArgs),
    /// Write bytes from stdin to a server, in a single NBD query.
    #[command(override_usage = format!("flexnbd write {TRANSFER_USAGE}"))]
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
    /// File or block device with the image. It must exist, be writable and
    /// hold at least 512 bytes; a tail of less than 512 bytes is left out.
    #[arg(short, long, verbatim_doc_comment)]
    pub file: PathBuf,
    /// Where clients connect.
    #[command(flatten)]
    pub doors: DoorArgs,
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
    /// Serve an image although its mark says that it has moved, or that
    /// not all of it may have come, and clear the mark (with --read-only,
    /// leave it). Be sure first that nothing serves the other copy: what
    /// clients write to two copies of a disk is lost with one of them. A
    /// person has to decide that; no unit or script should.
    #[arg(long, verbatim_doc_comment)]
    pub adopt: bool,
    /// Answer no write, zeroing or trim before it is on stable storage, as
    /// if its client had set the FUA flag. For clients that reconnect by
    /// themselves and forget which of their writes were not flushed.
    #[arg(long, verbatim_doc_comment)]
    pub sync: bool,
    /// Who may connect.
    #[command(flatten)]
    pub access: AccessArgs,
    /// Clients served at the same time, 1 to 1000000.
    #[arg(long, value_name = "N", default_value = "100", value_parser = client_count, allow_hyphen_values = true)]
    pub max_clients: usize,
    /// What they may ask for.
    #[command(flatten)]
    pub limit: LimitArgs,
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
    /// Address of the destination: IPv4, IPv6 (also as [IPv6]), or a name,
    /// which is looked up once.
    #[arg(short = 'l', long, verbatim_doc_comment)]
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
    /// Do not cut the clients at the end: those that are connected are served
    /// through the local server, from the destination, until they leave. Then
    /// the local server exits. The destination has to run listen --serve, or
    /// be a server that goes on.
    #[arg(long, verbatim_doc_comment)]
    pub relay: bool,
    /// Name of the export at the destination, at most 1017 bytes. Leave it
    /// out for the default export, and for an oldstyle server, which has no
    /// names. [default: none]
    #[arg(long, value_name = "NAME", value_parser = export, verbatim_doc_comment)]
    pub export: Option<String>,
    /// Local IP address to connect from, where the destination's access
    /// control list asks for a certain one. [default: the system's choice]
    #[arg(short, long, value_name = "BIND_ADDR", verbatim_doc_comment)]
    pub bind: Option<String>,
    /// Bytes to send per second at the most, also with K, M, G or T (1024)
    /// behind the number; 0 is no limit. mirror-speed changes it later.
    /// [default: 0]
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
    /// the waiting (Ctrl-C) does not end the migration; the same command, or
    /// another one to the same place, waits again.
    #[arg(short, long, verbatim_doc_comment)]
    pub wait: bool,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `read` and `write`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub(crate) struct TransferArgs {
    /// Address of the server: IPv4, IPv6 (also as [IPv6]), a name, or the
    /// path of its UNIX socket, which begins with '/'.
    #[arg(short = 'l', long, verbatim_doc_comment)]
    pub addr: String,
    /// TCP port of the server, 1 to 65535. Required, unless ADDR is a path,
    /// where it is ignored.
    #[arg(short, long, value_parser = remote_port, allow_hyphen_values = true, verbatim_doc_comment)]
    pub port: Option<u16>,
    /// Offset in the image to start at, in bytes, or with K, M, G or T (1024)
    /// behind it; at most 2^62.
    #[arg(
        short = 'F',
        long,
        value_name = "OFFSET",
        value_parser = offset,
        allow_hyphen_values = true,
        verbatim_doc_comment
    )]
    pub from: u64,
    /// Name of the export, at most 4096 bytes. Leave it out for the default
    /// export, and for an oldstyle server, which has no names.
    /// [default: none]
    #[arg(long, value_name = "NAME", value_parser = export, verbatim_doc_comment)]
    pub export: Option<String>,
    /// Bytes to transfer, also with K, M or G behind the number; at most 2^30.
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
