//! Addresses as people type them: what is meant, or what to write instead.

use crate::acl::{self, parse_ip, AddressError};
use crate::endpoint::{Endpoint, Place};
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

/// The longest host name, in bytes.
const HOST_NAME_MAX: usize = 253;

/// The two options that say where a server is, as usage shows them.
#[derive(Clone, Copy)]
pub(super) struct Options {
    /// The address.
    pub addr: &'static str,
    /// The port.
    pub port: &'static str,
}

impl Options {
    /// Those of most modes.
    pub(super) const MAIN: Self = Self { addr: "--addr <ADDR>", port: "--port <PORT>" };
    /// Those that say where a proxy connects to.
    pub(super) const CONN: Self = Self { addr: "--conn-addr <CONN_ADDR>", port: "--conn-port <CONN_PORT>" };
}

/// An address to listen on.
pub(super) fn to_listen(text: &str) -> Result<IpAddr, String> {
    match text {
        "localhost" => Ok(Ipv4Addr::LOCALHOST.into()),
        "*" => Ok(Ipv4Addr::UNSPECIFIED.into()),
        _ => parse_ip(text).map_err(|_| {
            let instead = advice(text, Options::MAIN).unwrap_or_else(|| {
                "expected an IP address of this machine, 0 or * for all of IPv4, :: for all, localhost, or the path of a \
                 UNIX socket, which begins with '/'"
                    .into()
            });
            invalid(Options::MAIN.addr, text, instead)
        }),
    }
}

/// Where a server is, by an address or a name; the latter is looked up later.
pub(super) fn server(options: Options, addr: String, port: Option<u16>) -> Result<Place, String> {
    if addr.starts_with('/') {
        return Ok(Place::At(Endpoint::Unix(addr.into())));
    }
    let ip = parse_ip(&addr);
    if ip.is_err() && !is_host_name(&addr) {
        let instead = advice(&addr, options).unwrap_or_else(|| {
            "expected an IP address, a host name, or the path of a UNIX socket, which begins with '/'".into()
        });
        return Err(invalid(options.addr, &addr, instead));
    }
    let port = port
        .ok_or_else(|| format!("{} is required, unless {} is the path of a UNIX socket", options.port, options.addr))?;
    Ok(match ip {
        Ok(ip) => Place::At(Endpoint::Tcp(SocketAddr::new(ip, port))),
        Err(_) => Place::Named { host: addr, port },
    })
}

/// The local address to connect to a server from.
pub(super) fn bind_for(server: &Place, bind: Option<&str>, options: Options) -> Result<Option<IpAddr>, String> {
    let Some(text) = bind else { return Ok(None) };
    let local = parse_ip(text)
        .map_err(|_| invalid("--bind <BIND_ADDR>", text, "not an IP address; expected one of this machine"))?;
    match server {
        Place::At(Endpoint::Unix(_)) => Err("--bind <BIND_ADDR> does not go with a UNIX socket; leave it out".into()),
        Place::At(Endpoint::Tcp(remote)) if remote.is_ipv4() != local.is_ipv4() => {
            let option = options.addr.split(' ').next().unwrap_or_default();
            Err(format!("--bind {local} cannot reach {option} {}; both must be IPv4 or both IPv6", remote.ip()))
        }
        // Of the addresses of a name, those are tried that can be reached from there.
        Place::At(Endpoint::Tcp(_)) | Place::Named { .. } => Ok(Some(local)),
    }
}

/// An entry of the access control list.
pub(super) fn acl_entry(text: &str) -> Result<acl::Entry, String> {
    text.parse().map_err(|why| {
        let instead = match why {
            AddressError::Address => acl_advice(text),
            AddressError::Mask { .. } => None,
        };
        invalid("[ACL_ENTRY]", text, instead.map_or_else(|| why.to_string(), |instead| format!("{why}; {instead}")))
    })
}

fn acl_advice(text: &str) -> Option<&'static str> {
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some("a number of seconds stands behind '=', as in --killswitch=30");
    }
    if matches!(text, "*" | "any" | "all") {
        return Some("for everybody write no entry, or 0.0.0.0/0 and ::/0");
    }
    if is_path(text) || (!text.is_empty() && Path::new(text).exists()) {
        return Some("a server has one image; another file needs a server of its own");
    }
    if has_port(text) {
        return Some("an entry has no port: clients may come from any");
    }
    is_host_name(text).then_some("names are not looked up here; write the address, or a network such as 10.0.0.0/8")
}

/// What to write instead of an address that is none.
fn advice(text: &str, options: Options) -> Option<String> {
    let (addr, port) = (options.addr, options.port);
    if text.contains("://") {
        return Some(format!(
            "not an address but a URI; {addr} takes the host or the path of the socket alone, {port} its port"
        ));
    }
    if has_port(text) {
        return Some(format!("the port goes to {port}"));
    }
    if text.split_once('/').is_some_and(|(address, _)| parse_ip(address).is_ok()) {
        return Some("a network; expected one address".into());
    }
    if is_path(text) {
        return Some("not an IP address; the path of a UNIX socket begins with '/'".into());
    }
    (text == "*").then(|| "expected the address of one server".into())
}

/// True for `host:port` and `[IPv6]:port`.
fn has_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        is_number && !host.is_empty() && (!host.contains(':') || host.ends_with(']'))
    })
}

fn is_path(text: &str) -> bool {
    text.contains('/') || text.starts_with(['.', '~']) || is_socket_name(text)
}

/// True for a name that sockets of the file system are given, and hosts are not.
fn is_socket_name(text: &str) -> bool {
    Path::new(text).extension().is_some_and(|extension| extension == "sock")
}

/// Whether a text can be looked up. What looks like a number is no name: the system's resolver takes `1.2.3` for 1.2.0.3.
fn is_host_name(text: &str) -> bool {
    let is_in_names = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let last = text.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    text.len() <= HOST_NAME_MAX
        && text.chars().all(is_in_names)
        && !text.starts_with(['.', '-'])
        && !text.contains("..")
        && !is_socket_name(text)
        && last.starts_with(|c: char| c.is_ascii_alphabetic())
}

/// In the words of `clap`'s own errors.
pub(super) fn invalid(option: &str, value: &str, why: impl Display) -> String {
    format!("invalid value '{value}' for '{option}': {why}")
}
