//! Who is let in: the rules, and the counts they go by. Every connection that is accepted passes here once.

use super::complaints::Complaints;
use super::timings::Timings;
use crate::acl::Acl;
use crate::proto::server::Tally;
use std::net::IpAddr;

/// Control connections served at once, where there are descriptors for them; further ones wait in the backlog.
pub(super) const CONTROLS_MAX: usize = 64;
/// As many have to be possible: one that waits for a migration, and one that ends it.
const CONTROLS_MIN: usize = 2;

/// How many connections of each kind may be there at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Places {
    /// Clients, when the server serves.
    pub clients: usize,
    /// Control connections.
    pub controls: usize,
}

impl Places {
    /// Shares descriptors out, so that clients never take the last: where there are few, every fourth is for control.
    /// `None` when there are too few for a client.
    pub(super) fn share(descriptors: u64, clients_wanted: usize) -> Option<Self> {
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let beside_clients = descriptors.saturating_sub(clients_wanted);
        let controls = beside_clients.max(descriptors / 4).clamp(CONTROLS_MIN, CONTROLS_MAX);
        let clients = descriptors.saturating_sub(controls).min(clients_wanted);
        (clients > 0).then_some(Self { clients, controls })
    }
}

/// Who may connect, and who has.
#[derive(Debug)]
pub(super) struct Admission {
    /// The access control list.
    pub acl: Acl,
    places: Places,
    /// Who has no place waits for one, instead of being refused.
    queues_clients: bool,
    clients: usize,
    controls: usize,
    /// What was done for clients that are gone.
    closed: Tally,
    /// How long it took, for all of them.
    pub timings: Timings,
    /// Bounds what is logged about those who misbehave.
    pub complaints: Complaints,
}

impl Admission {
    /// Nobody is connected yet.
    pub(super) fn new(acl: Acl, places: Places, queues_clients: bool) -> Self {
        let (closed, timings, complaints) = (Tally::default(), Timings::default(), Complaints::default());
        Self { acl, places, queues_clients, clients: 0, controls: 0, closed, timings, complaints }
    }

    /// True when who has no place waits in the backlog of the listener, without a greeting.
    pub(super) fn queues_clients(&self) -> bool {
        self.queues_clients
    }

    /// False when a second connection would wait for the end of the first.
    pub(super) fn takes_several(&self) -> bool {
        !self.queues_clients || self.places.clients > 1
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
                "as many clients are connected as --max-clients or the limit of descriptors allow"
            });
        }
        self.clients += 1;
        Ok(())
    }

    /// Counts a control connection in. Listeners accept no more of them than [`Admission::controls_left`].
    pub(super) fn admit_control(&mut self) {
        debug_assert!(self.controls < self.places.controls, "the listener has looked");
        self.controls += 1;
    }

    /// True when the counts leave room for one more client, whatever the list says.
    pub(super) fn has_room(&self, awaits_sender: bool) -> bool {
        self.clients_left(awaits_sender) > 0
    }

    /// How many more clients the counts leave room for.
    pub(super) fn clients_left(&self, awaits_sender: bool) -> usize {
        let most = if awaits_sender { 1 } else { self.places.clients };
        most.saturating_sub(self.clients)
    }

    /// How many clients there may be at once.
    pub(super) fn clients_max(&self) -> usize {
        self.places.clients
    }

    /// How many clients are connected.
    pub(super) fn clients(&self) -> usize {
        self.clients
    }

    /// How many more control connections may be accepted.
    pub(super) fn controls_left(&self) -> usize {
        self.places.controls.saturating_sub(self.controls)
    }

    /// How many control connections may wait for a migration: half of all, so that there is always one for `break`.
    pub(super) fn waiters_max(&self) -> usize {
        self.places.controls / 2
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_would_wait_for_himself_is_not_invited() {
        let takes = |clients, queues| {
            Admission::new(Acl::new(Vec::new(), false), Places { clients, controls: 1 }, queues).takes_several()
        };
        assert_eq!([takes(1, true), takes(2, true), takes(1, false), takes(2, false)], [false, true, true, true]);
    }

    #[test]
    fn clients_never_take_the_descriptors_of_control() {
        let share = |descriptors, wanted| Places::share(descriptors, wanted).map(|p| (p.clients, p.controls));
        assert_eq!(share(164, 100), Some((100, 64)));
        assert_eq!(share(1 << 20, 100), Some((100, 64)));
        assert_eq!(share(u64::MAX, usize::MAX), Some((usize::MAX - 64, 64)));
        assert_eq!(share(163, 100), Some((100, 63)));
        assert_eq!(share(120, 100), Some((90, 30)));
        assert_eq!(share(8, 100), Some((6, 2)));
        assert_eq!(share(3, 100), Some((1, 2)));
        assert_eq!(share(2, 100), None);
        assert_eq!(share(0, 1), None);
        for descriptors in 3..300 {
            let (clients, controls) = share(descriptors, 100).unwrap();
            assert!((clients + controls) as u64 <= descriptors, "{descriptors}");
        }
    }
}
