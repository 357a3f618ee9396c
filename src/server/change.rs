//! Which server a proxy is connected to, and how it changes to another one.

use super::config::Destination;
use crate::endpoint::Endpoint;
use std::collections::VecDeque;

/// Which server has the image, and how patient to be with it.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// The server.
    pub server: Destination,
    /// Other addresses of it, in the order in which they are to be tried.
    pub others: VecDeque<Endpoint>,
    /// How long nothing may move, in milliseconds, before the server counts as silent, or as gone where its kernel is.
    pub limit_ms: u64,
    /// After how long an outage clients are cut, in milliseconds; `None` is never.
    pub give_up_ms: Option<u64>,
}

impl Settings {
    /// The next attempt goes to the next address of the server.
    pub(super) fn next_address(&mut self) {
        if let Some(next) = self.others.pop_front() {
            self.others.push_back(std::mem::replace(&mut self.server.to, next));
        }
    }

    /// It is this server from now on.
    pub(super) fn use_server(&mut self, server: &Destination) {
        if self.server != *server {
            self.server = server.clone();
            self.others.clear();
        }
    }
}

/// A change to another server.
#[derive(Debug)]
pub(super) enum Change {
    /// At once: what is unanswered ends, what is dirty is flushed. It fails when nothing has moved until `give_up_ms`.
    Now { to: Destination, give_up_ms: u64 },
    /// When the connection has ended: whichever of the two serves first.
    WhenLost { to: Destination },
}

impl Change {
    /// The other server, if it is to be used now.
    pub(super) fn now(&self) -> Option<&Destination> {
        match self {
            Self::Now { to, .. } => Some(to),
            Self::WhenLost { .. } => None,
        }
    }

    /// When the change has failed.
    pub(super) fn gives_up_at_ms(&self) -> Option<u64> {
        match self {
            Self::Now { give_up_ms, .. } => Some(*give_up_ms),
            Self::WhenLost { .. } => None,
        }
    }
}
