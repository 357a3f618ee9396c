//! `flexnbd proxy`: clients do not notice that the server behind it goes away.

mod ahead;
mod failures;
mod interop;
mod killed;
mod lost;
mod net;
mod options;
mod points;
mod requests;
mod switch;

use crate::support::fading::{Fading, Style};
use crate::support::newstyle::{address, PORT};
use crate::support::{Builder, Server};
use std::net::SocketAddr;

/// All pairs of what a client and the server speak.
const PAIRS: [(Style, Style); 4] = [
    (Style::Oldstyle, Style::Oldstyle),
    (Style::Oldstyle, Style::Newstyle),
    (Style::Newstyle, Style::Oldstyle),
    (Style::Newstyle, Style::Newstyle),
];

/// A proxy with doors for both styles.
fn before(server: &Fading) -> Builder {
    Server::proxy(server.address).arg(PORT)
}

/// Its door for clients of this style.
fn door(proxy: &Server, style: Style) -> SocketAddr {
    match style {
        Style::Oldstyle => proxy.address(),
        Style::Newstyle => address(proxy),
    }
}
