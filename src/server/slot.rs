//! The kinds of slot, and what each step of a turn is to them.

use super::client::Client;
use super::control::Control;
use super::listener::Listener;
use super::mirror::Mirror;
use super::reason::{Next, Reason};
use super::shared::Shared;
use super::signals::Signals;
use super::snapshot::Snapshot;
use super::supervisor::Supervisor;
use super::upstream::Link;
use crate::event::slots::Key;
use crate::work::Done;
use mio::event::Event;

/// What the loop takes turns with.
#[derive(Debug)]
pub(super) enum Slot {
    /// Accepts connections.
    Listener(Listener),
    // Boxed, so that the table is not as wide as the widest of them.
    /// An NBD client.
    Client(Box<Client>),
    /// A control connection.
    Control(Box<Control>),
    /// The outgoing migration.
    Mirror(Box<Mirror>),
    /// The connection to the server that has the image.
    Upstream(Box<Link>),
    /// A second file of the image that is being made.
    Snapshot(Box<Snapshot>),
    /// The signals that stop the server.
    Signals(Signals),
    /// The supervisor, which is told what the server does.
    Supervisor(Box<Supervisor>),
}

impl Slot {
    /// Notes what its descriptor is ready for.
    pub(super) fn note(&mut self, event: &Event) {
        match self {
            Self::Listener(listener) => listener.note(event),
            Self::Client(client) => client.socket().note(event),
            Self::Control(control) => control.socket().note(event),
            Self::Mirror(mirror) => mirror.note(event),
            Self::Upstream(link) => link.note(event),
            Self::Snapshot(_) | Self::Signals(_) | Self::Supervisor(_) => {}
        }
    }

    /// READ: receives and parses.
    pub(super) fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        match self {
            Self::Listener(listener) => listener.read_step(key, sh),
            Self::Client(client) => client.read_step(key, sh),
            Self::Control(control) => control.read_step(key, sh),
            Self::Mirror(mirror) => mirror.read_step(key, sh),
            Self::Upstream(link) => link.read_step(key, sh),
            Self::Snapshot(snapshot) => snapshot.read_step(key, sh),
            Self::Signals(_) | Self::Supervisor(_) => Next::Idle,
        }
    }

    /// COMPLETE: takes what the disk has done for it.
    pub(super) fn disk_done(&mut self, done: Done, key: Key, sh: &mut Shared) -> Next {
        match self {
            Self::Client(client) => client.disk_done(done, sh),
            Self::Mirror(mirror) => mirror.disk_done(done, key, sh),
            Self::Snapshot(snapshot) => snapshot.disk_done(done, key, sh),
            Self::Listener(_) | Self::Control(_) | Self::Upstream(_) | Self::Signals(_) | Self::Supervisor(_) => {
                debug_assert!(false, "clients, migrations and snapshots use the disk");
                Next::Idle
            }
        }
    }

    /// WRITE: sends.
    pub(super) fn write_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        match self {
            Self::Client(client) => client.write_step(key, sh),
            Self::Control(control) => control.write_step(),
            Self::Mirror(mirror) => mirror.write_step(key, sh),
            Self::Upstream(link) => link.write_step(key, sh),
            Self::Listener(_) | Self::Snapshot(_) | Self::Signals(_) | Self::Supervisor(_) => Next::Idle,
        }
    }

    /// A wheel entry of its own has fired.
    pub(super) fn timeout(&mut self, key: Key, sh: &mut Shared) -> Next {
        match self {
            Self::Client(client) => client.timeout(key, sh),
            Self::Control(control) => control.timeout(key, sh),
            Self::Mirror(mirror) => mirror.timeout(key, sh),
            Self::Upstream(link) => link.timeout(key, sh),
            Self::Snapshot(snapshot) => snapshot.timeout(sh),
            // Accepting has rested.
            Self::Listener(_) => Next::Again,
            Self::Supervisor(supervisor) => supervisor.timeout(key, sh),
            Self::Signals(_) => Next::Idle,
        }
    }

    /// It was removed: says why, gives back what it had, and leaves the rest to effects.
    pub(super) fn closed(self, reason: &Reason, sh: &mut Shared) {
        match self {
            Self::Client(mut client) => client.closed(reason, sh),
            Self::Control(control) => control.closed(reason, sh),
            Self::Mirror(mut mirror) => mirror.closed(reason, sh),
            Self::Listener(_) | Self::Upstream(_) | Self::Snapshot(_) | Self::Signals(_) | Self::Supervisor(_) => {}
        }
    }
}
