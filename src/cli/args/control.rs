//! Options of the modes that tell a running server something and say no more than its control socket and a few values.

use std::path::PathBuf;

use clap::Args;

use super::common::{LimitArgs, LogFlags};
use super::values::speed;

/// Options of `mirror-speed`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub(crate) struct MirrorSpeedArgs {
    /// Control socket of the server.
    #[arg(short, long)]
    pub sock: PathBuf,
    /// Bytes to send per second at the most, from now on, also with K, M, G
    /// or T (1024) behind the number; 0 is no limit.
    #[arg(
        short = 'm',
        long,
        value_name = "BYTES_PER_SECOND",
        value_parser = speed,
        allow_hyphen_values = true,
        verbatim_doc_comment
    )]
    pub max_speed: u64,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `limit`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
#[group(id = "limits", required = true, multiple = true, args = ["max_iops", "max_bytes_per_second"])]
pub(crate) struct LimitModeArgs {
    /// Control socket of the server.
    #[arg(short, long)]
    pub sock: PathBuf,
    /// The limits.
    #[command(flatten)]
    pub limit: LimitArgs,
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
    /// 2001:db8::/32. At least one, unless --any is given.
    #[arg(value_name = "ACL_ENTRY", required_unless_present = "any", verbatim_doc_comment)]
    pub acl: Vec<String>,
    /// Open to everybody again, instead of a list; the entries 0.0.0.0/0 and
    /// ::/0 mean the same.
    #[arg(long, conflicts_with = "acl", verbatim_doc_comment)]
    pub any: bool,
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
    /// Print metrics for Prometheus instead: counters, latencies of each
    /// command and what is going on, without the clients one by one.
    #[arg(long, conflicts_with_all = ["json", "clients"], verbatim_doc_comment)]
    pub prometheus: bool,
    /// Show every client too: its number, address, style of protocol, since
    /// when it is connected (in seconds since 1970), requests, bytes, reads,
    /// writes and errors so far, requests in flight, and the age of the
    /// oldest. A line each, or an array in JSON.
    #[arg(long, verbatim_doc_comment)]
    pub clients: bool,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}

/// Options of `break` and `resize`, which say nothing but which server is meant.
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

/// Options of `snapshot`.
#[derive(Debug, Args)]
#[command(next_line_help = true)]
pub(crate) struct SnapshotArgs {
    /// Control socket of the server.
    #[arg(short, long)]
    pub sock: PathBuf,
    /// File to make. It must not exist.
    #[arg(short, long, value_name = "FILE")]
    pub to: PathBuf,
    /// Verbosity given after the mode.
    #[command(flatten)]
    pub log: LogFlags,
}
