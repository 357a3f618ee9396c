//! What all slots share. It is lent to one slot at a time.

use super::effect::Effect;
use super::inbound::Inbound;
use super::reason::Next;
use crate::acl::Acl;
use crate::buffer::Pool;
use crate::disk::Disk;
use crate::event::ready::RunQueue;
use crate::event::wheel::Wheel;
use crate::logging::Throttle;
use crate::migrate::Plan;
use crate::proto::server::Tally;
use std::ops::Range;

/// Control connections served at once; further ones wait in the backlog.
pub const MAX_CONTROLS: usize = 64;
/// The limits of the configuration that slots ask for while they run.
#[derive(Debug)]
pub struct Limits {
    /// How long a request may take, in milliseconds.
    pub killswitch_ms: Option<u64>,
    /// How many clients may be connected.
    pub max_clients: usize,
    /// How long a request of a migration may go without progress, in milliseconds.
    pub request_limit_ms: u64,
}

/// What all slots share.
pub struct Shared {
    /// When this turn began; the only clock there is.
    pub now_ms: u64,
    /// Memory for payloads.
    pub pool: Pool,
    /// The image.
    pub disk: Disk,
    /// Deadlines.
    pub wheel: Wheel,
    /// Who may connect.
    pub acl: Acl,
    /// What the configuration bounds.
    pub limits: Limits,
    /// What slots ask of others; applied at the end of the turn.
    pub effects: Vec<Effect>,
    /// The outgoing migration, if there is one.
    pub plan: Option<Box<Plan>>,
    /// The inbound migration that is awaited, if this is a listener.
    pub inbound: Option<Inbound>,
    /// Clients with a write that has to wait for the migration.
    pub held: RunQueue,
    /// The work is done: the program ends after this turn, and nobody is served any more.
    pub over: bool,
    /// When clients last had to wait for the migration, in milliseconds: that time is not theirs.
    pub kept_waiting_ms: u64,
    /// Clients that end badly are logged, but not as fast as they can come.
    pub bad_ends: Throttle,
    /// Clients connected or just accepted.
    pub clients: usize,
    /// Control connections open or just accepted.
    pub controls: usize,
    /// What clients that are gone have had done.
    pub closed: Tally,
}

impl Shared {
    /// True when no further control connection is served.
    pub fn controls_full(&self) -> bool {
        self.controls >= MAX_CONTROLS
    }

    /// How many clients may be connected: only one sender at a time.
    pub fn clients_max(&self) -> usize {
        if self.inbound.is_some() {
            1
        } else {
            self.limits.max_clients
        }
    }

    /// True while the disk still works for a sender that is gone: the next one must not write what that changes later.
    pub fn finishes_lost_sender(&self) -> bool {
        self.inbound.is_some() && self.clients == 0 && self.disk.in_flight() > 0
    }

    /// True while the migration is near its end, or past it, and no request is taken: what were done now would be lost.
    pub fn pauses_clients(&self) -> bool {
        self.over || self.plan.as_ref().is_some_and(|plan| plan.pauses_clients())
    }

    /// The time until which writes have to wait for the migration, if they have to.
    pub fn writes_held_until(&mut self) -> Option<u64> {
        let now_ms = self.now_ms;
        self.plan.as_mut().and_then(|plan| plan.keeps_changes_until(now_ms))
    }

    /// A client's operation that may change the range goes to the disk.
    pub fn note_submitted(&mut self, range: &Range<u64>) {
        self.plan.iter_mut().for_each(|plan| plan.note_submitted(range));
    }

    /// True while writes have to wait for the migration.
    pub fn holds_writes(&mut self) -> bool {
        self.writes_held_until().is_some()
    }

    /// Lends the plan to its slot, beside everything else.
    pub fn with_plan(&mut self, step: impl FnOnce(&mut Plan, &mut Self) -> Next) -> Next {
        let Some(mut plan) = self.plan.take() else { return Next::Idle };
        let next = step(&mut plan, self);
        self.plan = Some(plan);
        next
    }
}
