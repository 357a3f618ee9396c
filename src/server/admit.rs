//! Who is let in: the rules, and the counts they go by. Every connection that is accepted passes here once.

use super::complaints::Complaints;
use crate::acl::Acl;
use crate::proto::server::Tally;
use std::net::IpAddr;

/// Control connections served at once; further ones wait in the backlog.
pub(super) const CONTROLS_MAX: usize = 64;

/// Who may connect, and who has.
#[derive(Debug)]
pub(super) struct Admission {
    /// The access control list.
    pub acl: Acl,
    /// How many clients may be connected when the server serves.
    clients_max: usize,
    clients: usize,
    controls: usize,
    /// What was done for clients that are gone.
    closed: Tally,
    /// Bounds what is logged about those who misbehave.
    pub complaints: Complaints,
}

impl Admission {
    /// Nobody is connected yet.
    pub(super) fn new(acl: Acl, clients_max: usize) -> Self {
        let (closed, complaints) = (Tally::default(), Complaints::default());
        Self { acl, clients_max, clients: 0, controls: 0, closed, complaints }
    }

    /// Counts a client in, or says why not. A listener that awaits an image takes one sender at a time.
    pub(super) fn admit_client(&mut self, ip: Option<IpAddr>, awaits_sender: bool) -> Result<(), &'static str> {
        if ip.is_some_and(|ip| !self.acl.allows(ip)) {
            return Err("the access control list does not allow it");
        }
        if !self.has_room(awaits_sender) {
            return Err(if awaits_sender {
                "another sender is connected"
            } else {
                "the last client --max-clients allows is connected"
            });
        }
        self.clients += 1;
        Ok(())
    }

    /// Counts a control connection in. Listeners accept no more of them than [`Admission::controls_left`].
    pub(super) fn admit_control(&mut self) {
        debug_assert!(self.controls < CONTROLS_MAX, "the listener has looked");
        self.controls += 1;
    }

    /// True when the counts leave room for one more client, whatever the list says.
    pub(super) fn has_room(&self, awaits_sender: bool) -> bool {
        self.clients < if awaits_sender { 1 } else { self.clients_max }
    }

    /// How many clients are connected.
    pub(super) fn clients(&self) -> usize {
        self.clients
    }

    /// How many more control connections may be accepted.
    pub(super) fn controls_left(&self) -> usize {
        CONTROLS_MAX.saturating_sub(self.controls)
    }

    /// What was done for clients that are gone.
    pub(super) fn closed(&self) -> Tally {
        self.closed
    }

    /// A client is gone; this was done for it.
    pub(super) fn client_left(&mut self, tally: Tally) {
        self.closed += tally;
        self.clients -= 1;
    }

    /// A control connection is gone.
    pub(super) fn control_left(&mut self) {
        self.controls -= 1;
    }
}
