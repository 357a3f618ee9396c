//! Where a server is reached: an address and a port, or the path of a UNIX socket; and where one is said to be.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};

/// The longest path of a UNIX socket, in bytes.
const SOCKET_PATH_MAX: usize = 107;

/// Whether a socket may have this path, and if not, why. The system's own words name a constant of C.
pub fn check_socket_path(path: &Path) -> io::Result<()> {
    let length = path.as_os_str().len();
    if length <= SOCKET_PATH_MAX {
        return Ok(());
    }
    let why =
        format!("the path has {length} bytes, that of a UNIX socket at most {SOCKET_PATH_MAX}; choose a shorter one");
    Err(io::Error::other(why))
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// An address and a port; to listen on port 0 picks a free one.
    Tcp(SocketAddr),
    /// The path of a UNIX socket.
    Unix(PathBuf),
}

impl Endpoint {
    /// The address or the path, and the port, as words of a control command; the port of a path is 0.
    pub fn words(&self) -> (String, String) {
        match self {
            Self::Tcp(addr) => (addr.ip().to_string(), addr.port().to_string()),
            Self::Unix(path) => (path.display().to_string(), "0".into()),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

/// Where a server is said to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// There.
    At(Endpoint),
    /// At the addresses of a name, which has to be looked up.
    Named {
        /// The name.
        host: String,
        /// The port.
        port: u16,
    },
}

impl Place {
    /// Where that is: one endpoint or more, in the order in which they are to be tried. From the address `bind`, only those
    /// of its kind can be reached. To look a name up may take seconds; an error is a sentence.
    pub fn look_up(&self, bind: Option<IpAddr>) -> Result<Vec<Endpoint>, String> {
        let (host, port) = match self {
            Self::At(endpoint) => return Ok(vec![endpoint.clone()]),
            Self::Named { host, port } => (host.as_str(), *port),
        };
        let found = (host, port).to_socket_addrs().map_err(|error| format!("cannot look up {host}: {error}"))?;
        let found: Vec<_> = found.collect();
        let reached: Vec<_> = found
            .iter()
            .filter(|found| bind.is_none_or(|bind| bind.is_ipv4() == found.is_ipv4()))
            .map(|found| Endpoint::Tcp(*found))
            .collect();
        match (found.first(), bind) {
            (Some(found), Some(bind)) if reached.is_empty() => {
                Err(format!("--bind {bind} cannot reach {host}, which is {}", found.ip()))
            }
            (None, _) => Err(format!("{host} has no address")),
            _ => Ok(reached),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(endpoint) => endpoint.fmt(f),
            Self::Named { host, port } => write!(f, "{host}:{port}"),
        }
    }
}
