//! What all slots share. It is lent to one slot at a time.

use super::admit::Admission;
use super::backend::{Backend, Standby};
use super::config::Destination;
use super::effect::Effect;
use super::gate::Gate;
use super::life::Life;
use crate::buffer::Pool;
use crate::disk::{Access, Disk, OpenError};
use crate::event::wheel::Wheel;
use crate::sys;
use crate::upstream::{Replay, Upstream};
use log::warn;
use mio::Registry;
use std::collections::VecDeque;
use std::rc::Rc;

/// What a client takes of memory that may run out, in bytes: two buffers of its own, its part of tables that grow by
/// doubling, and what its requests are noted in.
const CLIENT_BYTES: usize = 16 << 10;
/// What tables take besides, in bytes.
const TABLES_BYTES: usize = 64 << 10;
/// How long whoever found that memory has run out waits before it asks again, in milliseconds.
pub(super) const MEMORY_RETRY_MS: u64 = 50;

/// Memory for what a relay may have to write again, in bytes: as a proxy has by default.
const RELAY_LIMIT: usize = 64 << 20;

/// What the configuration sets, for slots that ask while they run.
#[derive(Debug)]
pub(super) struct Limits {
    /// How long a request may take, in milliseconds.
    pub killswitch_ms: Option<u64>,
    /// How long a request of a migration may go without progress, in milliseconds.
    pub request_limit_ms: u64,
    /// How long another server that has the image may be silent, in milliseconds.
    pub upstream_limit_ms: u64,
    /// No change is answered before it is on stable storage, once there is an image to serve.
    pub sync: bool,
    /// The name of the export beside the empty one; empty when it has none.
    pub export_name: Rc<str>,
}

/// What all slots share.
pub(super) struct Shared {
    /// When this turn began; the only clock there is.
    pub now_ms: u64,
    /// Where new sockets are registered.
    pub registry: Registry,
    /// Memory for payloads.
    pub pool: Pool,
    /// What stands behind the requests.
    pub backend: Backend,
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
        if let Some(disk) = self.backend.disk().filter(|disk| disk.access() == Access::Shared) {
            // Downgrade the exclusive lock to a shared one; giving rights up cannot fail.
            let _ = disk.lock(false);
        }
    }

    /// Makes sure that no other server has the image open for writing.
    pub(super) fn lock_image(&self) -> Result<(), OpenError> {
        self.backend.disk().map_or(Ok(()), |disk| disk.lock(true))
    }

    /// Removes the name of the image; an error is a sentence.
    pub(super) fn unlink_image(&self) -> Result<(), String> {
        let unlinked = self.backend.disk().map_or(Ok(()), Disk::unlink);
        unlinked.map_err(|error| format!("cannot unlink {}: {error}", self.backend.name()))
    }

    /// The image is at `to` now: what clients ask goes there from now on. The file is closed, so that it may come back under
    /// the same name.
    pub(super) fn relay_to(&mut self, to: Destination) {
        let core = Upstream::new(Replay::Dirty, RELAY_LIMIT, 0);
        let (name, export) = (to.to.to_string(), self.backend.export());
        // No operation is in flight: clients were paused, and the last pass of the migration has been answered.
        self.backend = Backend::Upstream(Box::new(Standby { core, name, export }));
        self.life = Life::Relaying;
        self.effects.push_back(Effect::Relay(to));
        self.effects.push_back(Effect::ResumeClients);
    }

    /// True when a relay is needed no more: its last client has left, and what it has written is durable.
    pub(super) fn has_relayed(&self) -> bool {
        matches!((&self.life, &self.backend), (Life::Relaying, Backend::Upstream(standby))
            if self.admission.clients() == 0 && standby.core.is_settled())
    }

    /// True when there is memory for so many bytes more, if need be that of buffers which nobody uses.
    pub(super) fn has_memory(&mut self, bytes: usize) -> bool {
        let has_room = || !sys::memory::is_short() && sys::memory::has_room(bytes);
        has_room() || {
            self.pool.drop_free();
            has_room()
        }
    }

    /// True when there is memory for one more client, and for those that are here to go on. From then on it is kept for them.
    pub(super) fn has_memory_for_client(&mut self) -> bool {
        let clients = self.admission.clients().saturating_add(1);
        let bytes = clients.saturating_mul(CLIENT_BYTES).saturating_add(TABLES_BYTES);
        self.pool.keep_back(bytes);
        self.has_memory(bytes)
    }
}

/// Says that the end of the file is not served, where that is so.
pub(super) fn warn_of_tail(disk: &Disk) {
    if disk.tail() > 0 {
        let (path, size, tail) = (disk.path().display(), disk.size(), disk.tail());
        warn!("{path}: serving {size} bytes; the last {tail} are no whole sector of 512");
    }
}
