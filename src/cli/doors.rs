//! Where a server lets clients and commands in: what the options say, and what its supervisor has opened for it.

use super::address::{self, invalid, Options};
use super::args::common::DoorArgs;
use crate::endpoint::Endpoint;
use crate::server::{ControlDoor, Dialect, Door};
use crate::sys::passed::Passed;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// All ways into a server.
#[derive(Debug)]
pub(super) struct Doors {
    /// For NBD.
    pub nbd: Vec<(Door, Dialect)>,
    /// For commands.
    pub control: Option<ControlDoor>,
}

/// What the options `args` and `sock` ask for, and what was passed, each socket with its name.
pub(super) fn doors(args: DoorArgs, sock: Option<PathBuf>, passed: Vec<(String, Passed)>) -> Result<Doors, String> {
    differ(&args, sock.as_deref())?;
    let passed = sort(passed)?;
    if let (Some(path), Some(_)) = (&sock, &passed.control) {
        let why = "a control socket was passed, too; leave one of them out";
        return Err(invalid("--sock <SOCK>", &path.to_string_lossy(), why));
    }
    let mut nbd = opened(args, passed.nbd.is_empty())?;
    nbd.extend(passed.nbd);
    Ok(Doors { nbd, control: sock.map(ControlDoor::At).or(passed.control) })
}

/// The sockets that the server opens for NBD itself; where none was passed, there must be one.
fn opened(args: DoorArgs, must_be_one: bool) -> Result<Vec<(Door, Dialect)>, String> {
    let DoorArgs { addr, port, newstyle_port, newstyle_sock, export_name: _ } = args;
    let at = |endpoint, dialect| (Door::At(endpoint), dialect);
    let newstyle_unix = newstyle_sock.map(|path| at(Endpoint::Unix(path), Dialect::Newstyle));
    let Some(addr) = addr else {
        if port.is_some() || newstyle_port.is_some() {
            return Err("--addr <ADDR> is required where a port is given".into());
        }
        if newstyle_unix.is_none() && must_be_one {
            return Err(
                "--addr <ADDR> is required, with a port or as the path of a UNIX socket, unless --newstyle-sock \
                        <PATH> is given or a supervisor passes a socket (LISTEN_FDS)"
                    .into(),
            );
        }
        return Ok(newstyle_unix.into_iter().collect());
    };
    if addr.starts_with('/') {
        if newstyle_port.is_some() {
            return Err("--newstyle-port <PORT> needs an IP address as --addr <ADDR>; for a UNIX socket there is \
                        --newstyle-sock <PATH>"
                .into());
        }
        return Ok([at(Endpoint::Unix(addr.into()), Dialect::Oldstyle)].into_iter().chain(newstyle_unix).collect());
    }
    let ip = address::to_listen(&addr)?;
    match (port, newstyle_port) {
        (None, None) => {
            return Err(format!(
                "{} is required, or --newstyle-port <PORT>, unless {} is the path of a UNIX socket",
                Options::MAIN.port,
                Options::MAIN.addr
            ));
        }
        (Some(port @ 1..), Some(same)) if port == same => {
            let why = "this is --port <PORT>, for oldstyle";
            return Err(invalid("--newstyle-port <PORT>", &port.to_string(), why));
        }
        _ => {}
    }
    let tcp = |port: Option<u16>, dialect| port.map(|port| at(Endpoint::Tcp(SocketAddr::new(ip, port)), dialect));
    let all = [tcp(port, Dialect::Oldstyle), tcp(newstyle_port, Dialect::Newstyle), newstyle_unix];
    Ok(all.into_iter().flatten().collect())
}

/// Tells what passed sockets are for by their names. A name that says nothing is that of a unit, or of a library.
fn sort(passed: Vec<(String, Passed)>) -> Result<Doors, String> {
    let mut nbd = Vec::new();
    let mut control = None;
    for (name, socket) in passed {
        match (name.as_str(), socket) {
            ("control", Passed::Unix(socket)) if control.is_none() => control = Some(ControlDoor::Passed(socket)),
            ("control", Passed::Unix(_)) => {
                return Err("LISTEN_FDNAMES: two sockets are called control; expected one".into());
            }
            ("control", Passed::Tcp(_)) => {
                return Err(
                    "LISTEN_FDNAMES: the socket called control is not a UNIX socket: anybody could give commands"
                        .into(),
                );
            }
            ("oldstyle", socket) => nbd.push((Door::Passed(socket), Dialect::Oldstyle)),
            (_, socket) => nbd.push((Door::Passed(socket), Dialect::Newstyle)),
        }
    }
    Ok(Doors { nbd, control })
}

/// Makes sure that each UNIX socket has a path of its own: the server would find itself there.
fn differ(args: &DoorArgs, sock: Option<&Path>) -> Result<(), String> {
    let addr = args.addr.as_deref().filter(|addr| addr.starts_with('/')).map(Path::new);
    let all = [("--addr", addr), ("--newstyle-sock", args.newstyle_sock.as_deref()), ("--sock", sock)];
    let given: Vec<_> = all.into_iter().filter_map(|(option, path)| Some((option, path?))).collect();
    for (n, (option, path)) in given.iter().enumerate() {
        if let Some((other, _)) = given.iter().skip(n + 1).find(|(_, other)| same(path, other)) {
            return Err(format!("{option} and {other} are both {}; each needs a path of its own", path.display()));
        }
    }
    Ok(())
}

/// True when both paths name the same socket, which need not exist yet.
fn same(a: &Path, b: &Path) -> bool {
    let resolved = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        folder.canonicalize().ok().zip(path.file_name().map(ToOwned::to_owned))
    };
    a == b || resolved(a).is_some_and(|a| resolved(b) == Some(a))
}
