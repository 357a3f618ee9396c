//! What a server is told to do, and what ends it.

use crate::acl::Acl;
use crate::disk::{Access, EngineChoice};
use crate::endpoint::{Endpoint, Place};
use crate::sys::passed::Passed;
use crate::upstream::Replay;
use std::fmt;
use std::net::IpAddr;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

/// What to serve, and how.
#[derive(Debug)]
pub struct Config {
    /// Where NBD clients connect, and how those begin that do.
    pub doors: Vec<(Door, Dialect)>,
    /// The name under which those that negotiate find the export, beside the empty one; empty for none.
    pub export_name: String,
    /// Where commands come in, if anywhere.
    pub control: Option<ControlDoor>,
    /// Who may connect.
    pub acl: Acl,
    /// How long a request may take, in milliseconds; `None` is for ever.
    pub killswitch_ms: Option<u64>,
    /// How many clients may be connected at once.
    pub max_clients: usize,
    /// What all of them together may ask for.
    pub rates: Rates,
    /// How long another server that has the image may be silent, or its machine unreachable, in milliseconds.
    pub upstream_limit_ms: u64,
    /// What stands behind their requests.
    pub backing: Backing,
}

/// Where NBD clients connect.
#[derive(Debug)]
pub enum Door {
    /// A socket that the server opens.
    At(Endpoint),
    /// One that its supervisor has opened.
    Passed(Passed),
}

/// Where commands come in.
#[derive(Debug)]
pub enum ControlDoor {
    /// A socket that the server opens at this path when it is ready.
    At(PathBuf),
    /// One that its supervisor has opened.
    Passed(UnixListener),
}

/// What stands behind the requests of clients.
#[derive(Debug)]
pub enum Backing {
    /// An image of this machine.
    Image(Image),
    /// Another server.
    Upstream(Upstream),
}

/// An image, and what it is served for.
#[derive(Debug)]
pub struct Image {
    /// The image: a regular file or a block device.
    pub file: PathBuf,
    /// Who waits for the disk that it lies on.
    pub disk_engine: EngineChoice,
    /// Whether clients may change the image, and who else may.
    pub access: Access,
    /// No change is answered before it is on stable storage.
    pub sync: bool,
    /// What the server is there for.
    pub role: Role,
    /// How long a request of a migration may go without progress, in milliseconds.
    pub request_limit_ms: u64,
}

/// Another server, and how to do without it for a while.
#[derive(Debug)]
pub struct Upstream {
    /// Where it is. A name is looked up once, at the start.
    pub server: Place,
    /// The local address to connect from, where that is a matter of addresses.
    pub bind: Option<IpAddr>,
    /// The name of the export; empty for the default one.
    pub export: String,
    /// What is kept of what it has answered.
    pub replay: Replay,
    /// The bound of that, in bytes.
    pub replay_limit: usize,
    /// How far small READs that follow one another are read ahead of, in bytes; 0 is not at all.
    pub read_ahead: usize,
    /// How long an outage may take before clients are cut, in milliseconds; `None` is for ever.
    pub give_up_ms: Option<u64>,
    /// How long to try at the start, in milliseconds; 0 is once.
    pub start_timeout_ms: u64,
}

/// What may be asked for per second; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Requests.
    pub requests: Option<u64>,
    /// Bytes of data, read and written.
    pub bytes: Option<u64>,
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (requests, bytes) = (self.requests.unwrap_or(0), self.bytes.unwrap_or(0));
        write!(f, "{requests} requests and {bytes} bytes per second (0 is no limit)")
    }
}

/// Where to connect to, and from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    /// The server.
    pub to: Endpoint,
    /// The local address to connect from, where that is a matter of addresses.
    pub bind: Option<IpAddr>,
    /// The name of the export; empty for the default one.
    pub export: String,
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to)?;
        if !self.export.is_empty() {
            write!(f, " export {:?}", self.export)?;
        }
        Ok(())
    }
}

/// What connections of a listener are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The block device.
    Nbd(Dialect),
    /// Commands.
    Control,
}

/// How clients of a listener begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// They are told the size, and ask.
    Oldstyle,
    /// They negotiate first.
    Newstyle,
}

/// What a server is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// To serve the image.
    Serve {
        /// Even if its mark says that it is not to be served.
        adopt: bool,
    },
    /// To take an image from another server, and then to end or to serve it.
    Listen {
        /// Serve it.
        then_serve: bool,
    },
}

/// What ends the program: the text of its `F` line.
#[derive(Debug)]
pub struct Fatal(pub String);

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
