//! The slots of a server and the queues that say which of them has something to do.

use super::complaints::Complaint;
use super::config::Dialect;
use super::grace::Grace;
use super::reason::Next;
use super::shared::Shared;
use super::slot::Slot;
use crate::event::run_queue::RunQueue;
use crate::event::slots::{Key, Slots};
use crate::proto::export::SessionName;
use crate::sys;
use log::warn;
use mio::Poll;

/// The server: one loop, all of its connections.
pub(super) struct Reactor {
    /// Readiness of every descriptor.
    pub poll: Poll,
    /// Listeners, connections, the signals.
    pub slots: Slots<Slot>,
    /// Slots that have something to do in the next turn.
    pub run: RunQueue,
    /// Slots that may have something to send in this turn.
    pub out: RunQueue,
    /// Slots that can go on when the disk has done something.
    pub wait_disk: RunQueue,
    /// Connections that are gone and for which the kernel had an operation in hand then, by the names of their sessions.
    pub(super) ghosts: Vec<(SessionName, u64)>,
    /// Says whether deadlines are judged.
    pub(super) grace: Grace,
    /// What every slot is lent.
    pub shared: Shared,
    /// The slots that accept clients.
    pub listeners: Vec<Key>,
    /// The slot that accepts control connections.
    pub control_listener: Option<Key>,
    /// The connection to the server that has the image, where that is another one.
    pub link: Option<Key>,
    /// The slot of the supervisor, where one is to be told something.
    pub supervisor: Option<Key>,
    /// Where clients connect, and how those begin that do.
    pub addresses: Vec<(Dialect, String)>,
    /// When the server began.
    pub started_ms: u64,
    /// The same, in seconds since 1970: what is collected over time must not move with the time of day.
    pub started_s: u64,
    /// Numbers connections in the order in which they came.
    pub next_id: u64,
}

impl Reactor {
    /// Does what a slot wants next.
    pub(super) fn settle(&mut self, key: Key, next: Option<Next>) {
        match next {
            None | Some(Next::Idle) => {}
            Some(Next::Again) => self.run.push(key),
            Some(Next::WaitDisk) => self.wait_disk.push(key),
            Some(Next::Close(reason)) => {
                let Some(slot) = self.slots.remove(key) else { return };
                // Who only asks for the status leaves nothing behind.
                if !matches!(slot, Slot::Control(_)) {
                    self.shared.gate.quota.forget(key);
                    self.shared.backend.forget(key.to_u64());
                    // What was done for it may have to be made durable elsewhere.
                    self.run.extend(self.link);
                }
                // A listener may have stopped accepting for want of room.
                match slot {
                    Slot::Control(_) => self.run.extend(self.control_listener),
                    Slot::Client(_) if self.shared.admission.queues_clients() => {
                        self.run.extend(self.listeners.iter().copied());
                    }
                    _ => {}
                }
                if let Slot::Client(client) = &slot {
                    if let Some(name) = client.session_name() {
                        self.note_ghost(name, key.to_u64());
                    }
                }
                slot.closed(&reason, &mut self.shared);
            }
        }
    }

    fn note_ghost(&mut self, name: SessionName, owner: u64) {
        let flying = self.shared.backend.flying();
        self.ghosts.retain(|(_, owner)| flying.contains(owner));
        if flying.contains(&owner) {
            self.ghosts.push((name, owner));
        }
    }

    /// Where memory has run out: gives back what nobody uses, sets the reserve aside again if it can be had, and says so.
    pub(super) fn mind_memory(&mut self) {
        let sh = &mut self.shared;
        let is_short = sys::memory::is_short();
        if is_short {
            sh.pool.drop_free();
            sys::memory::keep_reserve();
        }
        let lacks = sh.pool.take_refusal() || is_short;
        if lacks && sh.admission.complaints.may_log(Complaint::Shortage, sh.now_ms) {
            warn!("memory has run out: requests wait and new clients are refused while there is none");
        }
    }

    /// The slots for which this is true, now.
    pub(super) fn keys_of(&self, is_one: impl Fn(&Slot) -> bool) -> Vec<Key> {
        self.slots.iter().filter(|(_, slot)| is_one(slot)).map(|(key, _)| key).collect()
    }

    /// Where clients connect, for a line of the log.
    pub(super) fn places(&self) -> String {
        let places: Vec<&str> = self.addresses.iter().map(|(_, address)| address.as_str()).collect();
        places.join(" and ")
    }

    /// The next number of a connection.
    pub(super) fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }
}
