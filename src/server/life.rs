//! What a server is doing, and every question about that.
//!
//! ```text
//!  serve:   Serving <──> Sending ──> Over, or Relaying ──> Over
//!           Serving <──> Snapshot
//!  listen:  Receiving ──> Sealing ──> Over, or Serving
//! ```

use crate::event::slots::Key;
use crate::migrate::{Incoming, Plan};

/// Owner of the operations of the server itself; no slot has this key. Their tags say what is so when they have ended.
pub(super) const OWN: u64 = u64::MAX;
/// A received image is durable.
pub(super) const IMAGE: u32 = 0;
/// It is durable that it is one: its mark is cleared.
pub(super) const ARRIVED: u32 = 1;
/// It is durable that an image comes.
pub(super) const INCOMING: u32 = 2;
/// It is durable that the image stays, which may have been marked as moved.
pub(super) const STAYS: u32 = 3;
/// The mark of a migration is gone that has ended without that.
pub(super) const ENDED: u32 = 4;

/// What a server is doing.
#[derive(Debug)]
pub(super) enum Life {
    /// It serves the image.
    Serving,
    /// It serves the image and copies it to another server.
    Sending {
        /// The slot of the migration.
        mirror: Key,
        /// What the migration sends next.
        plan: Box<Plan>,
    },
    /// It serves the image, and changes wait while a second file of it is made.
    Snapshot,
    /// It awaits an image from a sender, which may be connected.
    Receiving {
        /// What the sender has covered.
        incoming: Incoming,
        /// Go on as a server afterwards.
        then_serve: bool,
    },
    /// The sender has written every byte and said so, and the image is being made durable.
    Sealing {
        /// The slot of the sender. Its connection stays until all is durable: its end tells the sender so.
        sender: Key,
        /// Go on as a server afterwards.
        then_serve: bool,
        /// A signal has come: end, when the image is durable. DISC was accepted, so it has to be before we exit.
        stop: bool,
    },
    /// The image is at another server now, and the clients that are still here are served from there.
    Relaying,
    /// The work is done: the program ends after this turn, and nobody is served any more.
    Over,
}

impl Life {
    /// Why nothing can be begun that takes an image which is here, and stays; nothing speaks against it while it is only served.
    pub(super) fn only_serves(&self) -> Result<(), &'static str> {
        match self {
            Self::Serving => Ok(()),
            Self::Snapshot => Err("a snapshot is being made; try again when it is done"),
            Self::Sending { .. } => Err("a migration is running; stop it first, or wait"),
            Self::Receiving { .. } | Self::Sealing { .. } => Err("there is no image yet"),
            Self::Relaying | Self::Over => Err("the image is at another server"),
        }
    }

    /// The outgoing migration's plan.
    pub(super) fn plan(&mut self) -> Option<&mut Plan> {
        let Self::Sending { plan, .. } = self else { return None };
        Some(plan)
    }

    /// The slot of the outgoing migration.
    pub(super) fn mirror(&self) -> Option<Key> {
        let Self::Sending { mirror, .. } = self else { return None };
        Some(*mirror)
    }

    /// The sender has written every byte and said DISC.
    pub(super) fn seal(&mut self, sender: Key) {
        if let Self::Receiving { then_serve, .. } = self {
            *self = Self::Sealing { sender, then_serve: *then_serve, stop: false };
        }
    }

    /// True while what changes the image waits: until it is marked as one that comes, and while a snapshot is made.
    pub(super) fn keeps_changes(&self) -> bool {
        match self {
            Self::Snapshot => true,
            Self::Receiving { incoming, .. } => !incoming.may_change(),
            Self::Serving | Self::Sending { .. } | Self::Sealing { .. } | Self::Relaying | Self::Over => false,
        }
    }

    /// True while it is there to take an image, and serves none.
    pub(super) fn awaits_image(&self) -> bool {
        matches!(self, Self::Receiving { .. } | Self::Sealing { .. })
    }

    /// True when no request is taken: the migration is near its end, or past it, so that a change made now would be
    /// lost.
    pub(super) fn pauses_clients(&self) -> bool {
        match self {
            Self::Serving | Self::Snapshot | Self::Receiving { .. } | Self::Relaying => false,
            Self::Sending { plan, .. } => plan.pauses_clients(),
            Self::Sealing { .. } | Self::Over => true,
        }
    }
}
