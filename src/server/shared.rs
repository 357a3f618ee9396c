//! What all slots share. It is lent to one slot at a time.

use super::admit::Admission;
use super::effect::Effect;
use super::gate::Gate;
use super::life::Life;
use crate::buffer::Pool;
use crate::disk::{Access, Disk};
use crate::event::wheel::Wheel;
use mio::Registry;
use std::collections::VecDeque;

/// What the configuration sets, for slots that ask while they run.
#[derive(Debug)]
pub(super) struct Limits {
    /// How long a request may take, in milliseconds.
    pub killswitch_ms: Option<u64>,
    /// How long a request of a migration may go without progress, in milliseconds.
    pub request_limit_ms: u64,
}

/// What all slots share.
pub(super) struct Shared {
    /// When this turn began; the only clock there is.
    pub now_ms: u64,
    /// Where new sockets are registered.
    pub registry: Registry,
    /// Memory for payloads.
    pub pool: Pool,
    /// The image.
    pub disk: Disk,
    /// Deadlines.
    pub wheel: Wheel,
    /// What the configuration bounds.
    pub limits: Limits,
    /// Who may connect, and who has.
    pub admission: Admission,
    /// What the server is doing.
    pub life: Life,
    /// Requests that a migration keeps waiting.
    pub gate: Gate,
    /// What slots ask of others; applied at the end of the turn.
    pub effects: VecDeque<Effect>,
}

impl Shared {
    /// Lets other servers have the image open, too, if that is meant.
    pub(super) fn share_image(&self) {
        if self.disk.access() == Access::Shared {
            // Downgrade the exclusive lock to a shared one; giving rights up cannot fail.
            let _ = self.disk.lock(false);
        }
    }
}
