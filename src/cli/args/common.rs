//! Options that several modes have.

use std::path::PathBuf;

use clap::Args;

use super::values::{export, listen_port, seconds_to_ms, speed};

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

/// Where clients connect.
#[derive(Debug, Args)]
pub(crate) struct DoorArgs {
    /// Address to listen on: IPv4, IPv6 (also as [IPv6]), 0 or * for all IPv4
    /// addresses, localhost for 127.0.0.1, or the path of a UNIX socket,
    /// which begins with '/'. Required, unless --newstyle-sock is given or
    /// the supervisor passes a socket (LISTEN_FDS).
    #[arg(short = 'l', long, verbatim_doc_comment)]
    pub addr: Option<String>,
    /// TCP port to listen on, 0 to 65535; 0 picks a free one, which status
    /// shows. Required, unless --newstyle-port is given or ADDR is a path,
    /// where it is ignored.
    #[arg(short, long, value_parser = listen_port, allow_hyphen_values = true, verbatim_doc_comment)]
    pub port: Option<u16>,
    /// TCP port for newstyle clients, which most of today are (nbd-client,
    /// qemu, libnbd), at ADDR, 0 to 65535; 0 picks a free one, which status
    /// shows. They find the same image under the same rules; it is the
    /// default export. PORT above is for oldstyle clients. [default: none]
    #[arg(long, value_name = "PORT", value_parser = listen_port, allow_hyphen_values = true, verbatim_doc_comment)]
    pub newstyle_port: Option<u16>,
    /// UNIX socket to open for newstyle clients. [default: none]
    #[arg(long, value_name = "PATH")]
    pub newstyle_sock: Option<PathBuf>,
    /// Name by which newstyle clients may ask for the image, at most 4096
    /// bytes; the default export, which has no name, stays. [default: none]
    #[arg(long, value_name = "NAME", value_parser = export, verbatim_doc_comment)]
    pub export_name: Option<String>,
}

/// What all clients together may ask for.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct LimitArgs {
    /// Requests per second, of all clients together; 0 is no limit. What
    /// was not used for up to a second may follow in one go.
    #[arg(long, value_name = "N", value_parser = speed, allow_hyphen_values = true, verbatim_doc_comment)]
    pub max_iops: Option<u64>,
    /// Bytes per second that are read and written, of all clients together;
    /// K, M, G and T (1024 each) may follow the number; 0 is no limit.
    #[arg(long, value_name = "N", value_parser = speed, allow_hyphen_values = true, verbatim_doc_comment)]
    pub max_bytes_per_second: Option<u64>,
}

/// Who may connect, and for how long they may take.
#[derive(Debug, Args)]
pub(crate) struct AccessArgs {
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
    /// Clients to admit: IP addresses or networks such as 10.0.0.0/8 and
    /// 2001:db8::/32; names are not looked up. Without any, see
    /// --default-deny.
    #[arg(value_name = "ACL_ENTRY", verbatim_doc_comment)]
    pub acl: Vec<String>,
}
