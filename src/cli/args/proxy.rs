//! The options of `proxy` and `switch`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::common::{AccessArgs, DoorArgs, LimitArgs, LogFlags};
use super::values::{client_count, export, read_ahead, remote_port, replay_limit, seconds_or_none};

/// The values of `--replay`; comments of their own would show in its help.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ReplayKind {
    Dirty,
    Inflight,
    None,
}

/// Options of `proxy`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub(crate) struct ProxyArgs {
    /// Address of the server: IPv4, IPv6 (also as [IPv6]), a name, which is
    /// looked up once, or the path of its UNIX socket, which begins with '/'.
    #[arg(short = 'C', long, verbatim_doc_comment)]
    pub conn_addr: String,
    /// TCP port of the server, 1 to 65535. Required, unless CONN_ADDR is a
    /// path, where it is ignored.
    #[arg(short = 'P', long, value_parser = remote_port, allow_hyphen_values = true, verbatim_doc_comment)]
    pub conn_port: Option<u16>,
    /// Local IP address to connect from. [default: the system's choice]
    #[arg(short, long, value_name = "BIND_ADDR", verbatim_doc_comment)]
    pub bind: Option<String>,
    /// Name of the server's export, at most 4096 bytes. Leave it out for the
    /// default export, and for an oldstyle server, which has no names.
    /// [default: none]
    #[arg(long, value_name = "NAME", value_parser = export, verbatim_doc_comment)]
    pub export: Option<String>,
    /// Where clients connect.
    #[command(flatten)]
    pub doors: DoorArgs,
    /// Who may connect.
    #[command(flatten)]
    pub access: AccessArgs,
    /// Clients served at the same time, 1 to 1000000. More of them wait,
    /// without a greeting, until one has left.
    #[arg(
        long,
        value_name = "N",
        default_value = "1",
        value_parser = client_count,
        allow_hyphen_values = true,
        verbatim_doc_comment
    )]
    pub max_clients: usize,
    /// What they may ask for.
    #[command(flatten)]
    pub limit: LimitArgs,
    /// What is sent again when the server comes back: with dirty what it has
    /// answered and may have lost, and what it has not answered; with
    /// inflight only the latter, so that a crash of its machine may lose
    /// answered writes; with none nothing: clients are cut when the server is
    /// lost. Where others write the same image beside this proxy, only none
    /// is safe.
    /// [default: dirty]
    #[arg(
        long,
        value_name = "WHAT",
        value_enum,
        default_value_t = ReplayKind::Dirty,
        hide_default_value = true,
        hide_possible_values = true,
        verbatim_doc_comment
    )]
    pub replay: ReplayKind,
    /// Memory for that, 4M to 16G. At half of it the proxy asks the server to
    /// flush; when it is full, writes wait for that. [default: 64M]
    #[arg(
        long,
        value_name = "BYTES",
        default_value = "64M",
        hide_default_value = true,
        value_parser = replay_limit,
        allow_hyphen_values = true,
        verbatim_doc_comment
    )]
    pub replay_limit: usize,
    /// Seconds that the server may be away before clients are cut; 0 is for
    /// ever. [default: 0]
    #[arg(
        long = "give-up",
        value_name = "SECONDS",
        default_value = "0",
        hide_default_value = true,
        value_parser = seconds_or_none,
        allow_hyphen_values = true,
        verbatim_doc_comment
    )]
    pub give_up_ms: u64,
    /// Seconds to try to reach the server at the start; 0 is one attempt.
    /// [default: 0]
    #[arg(
        long = "start-timeout",
        value_name = "SECONDS",
        default_value = "0",
        hide_default_value = true,
        value_parser = seconds_or_none,
        allow_hyphen_values = true,
        verbatim_doc_comment
    )]
    pub start_timeout_ms: u64,
    /// Read ahead so many bytes behind small reads that follow one another,
    /// behind '='; 4096 without. More than 4M counts as 4M. It is for clients
    /// that ask for one thing at a time. Where others write the same image
    /// beside this proxy, what is read may be older than what they wrote.
    /// [default: 0]
    #[arg(
        short,
        long,
        value_name = "BYTES",
        value_parser = read_ahead,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "4096",
        verbatim_doc_comment
    )]
    pub cache: Option<usize>,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `switch`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub(crate) struct SwitchArgs {
    /// Control socket of the proxy.
    #[arg(short, long)]
    pub sock: PathBuf,
    /// Address of the other server, a name that has one, or the path of its
    /// UNIX socket.
    #[arg(short = 'C', long, verbatim_doc_comment)]
    pub conn_addr: String,
    /// TCP port of the other server, 1 to 65535. Required, unless CONN_ADDR
    /// is a path, where it is ignored.
    #[arg(short = 'P', long, value_parser = remote_port, allow_hyphen_values = true, verbatim_doc_comment)]
    pub conn_port: Option<u16>,
    /// Not now, but when the connection to the present server has ended: then
    /// whichever of the two serves first is used.
    #[arg(long, verbatim_doc_comment)]
    pub when_lost: bool,
    /// Stay until the proxy is connected to the other server.
    #[arg(short, long)]
    pub wait: bool,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}
