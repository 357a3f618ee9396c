//! GLUE: the loop, and the only folder that sees sockets, the disk, the protocol and the clock together.
//!
//! A turn is a one-way pipe; each step runs over every slot that needs it, then the next step starts:
//!
//! ```text
//! wait ──> note readiness ──> READ + parse ──> disk ──> COMPLETE ──> WRITE ──> effects ──> wait
//! ```
//!
//! Invariants:
//! 1. Only [`Server::settle`] removes a slot. A slot never touches another one: it pushes an [`Effect`].
//! 2. A key of an old generation finds no slot: stale events, timers and completions are dropped by that one rule.
//! 3. A slot that still could do something without a new event is in the run queue.

mod bind;
mod client;
mod commands;
mod config;
mod control;
mod dial;
mod effect;
mod inbound;
mod listener;
mod mirror;
mod reason;
mod shared;
mod signals;
mod slot;
mod socket;
mod start;
mod status;

pub use config::{Config, Fatal, Role};

use crate::event::ready::RunQueue;
use crate::event::slots::{Key, Slots};
use crate::proto::server::End;
use crate::sys::{self};
use crate::work::{Action, Done, Op};
use client::Client;
use config::Dialect;
use control::Control;
use effect::Effect;
use inbound::Inbound;
use log::{info, warn};
use mio::{Events, Poll};
use reason::{Next, Reason};
use shared::Shared;
use slot::Slot;
use socket::{Peer, Socket};
use std::io::{self, ErrorKind};
use std::time::Duration;

/// Events taken from the kernel in one turn; more wait for the next.
const EVENTS: usize = 256;
/// Owner of the operation that makes a received image durable; no slot has this key.
const RECEIVED: u64 = u64::MAX;

/// What a listener says when it has to stop.
const NOT_MIGRATED: &str = "stopped by a signal before a migration was complete";

enum Flow {
    Continue,
    Stop,
}

/// The server: one loop, all of its connections.
struct Server {
    poll: Poll,
    slots: Slots<Slot>,
    /// Slots that have something to do in the next turn.
    run: RunQueue,
    /// Slots that may have something to send in this turn.
    out: RunQueue,
    shared: Shared,
    control_listener: Option<Key>,
    /// The outgoing migration.
    mirror: Option<Key>,
    /// Control connections that wait for a migration to end.
    waiters: Vec<Key>,
    /// A sender that has sent everything and waits for it to be durable.
    leaving: Option<Box<Client>>,
    /// Where clients connect: the oldstyle address, then those that negotiate.
    addresses: Vec<String>,
    /// Numbers connections in the order in which they came.
    next_id: u64,
}

/// Serves until a signal comes. An error is what ended it abnormally.
pub fn serve(config: Config) -> Result<(), Fatal> {
    let role = config.role;
    let Some(mut server) = Server::start(config)? else { return stopped_early(role) };
    let doing = if server.shared.inbound.is_some() { "awaiting a migration to" } else { "serving" };
    info!("{doing} {} on {}", server.shared.disk.path().display(), server.addresses.join(" and "));
    let mut events = Events::with_capacity(EVENTS);
    let mut batch = Vec::new();
    loop {
        if let Flow::Stop = server.turn(&mut events, &mut batch)? {
            return Ok(());
        }
    }
}

/// A signal came before anything was served.
fn stopped_early(role: Role) -> Result<(), Fatal> {
    match role {
        Role::Serve => Ok(()),
        Role::Listen { .. } => Err(Fatal(NOT_MIGRATED.into())),
    }
}

impl Server {
    /// One pass through the pipe. `batch` is scratch space, empty between turns.
    fn turn(&mut self, events: &mut Events, batch: &mut Vec<Key>) -> Result<Flow, Fatal> {
        self.wait(events)?;
        for event in events.iter() {
            self.note(event);
        }
        self.shared.wheel.expire(self.shared.now_ms, batch);
        for key in batch.drain(..) {
            let next = self.slots.get_mut(key).map(|slot| slot.timeout(key, &mut self.shared));
            self.settle(key, next);
        }
        if self.shared.pauses_clients() || self.shared.holds_writes() {
            self.shared.kept_waiting_ms = self.shared.now_ms;
        }
        if !self.shared.held.is_empty() && !self.shared.holds_writes() {
            self.shared.held.take_batch(batch);
            self.run.extend(batch.drain(..));
        }

        self.run.take_batch(batch);
        for key in batch.drain(..) {
            self.out.push(key);
            let next = match self.slots.get_mut(key) {
                Some(Slot::Signals(signals)) => {
                    if signals::take_stop(signals).map_err(|error| Fatal(format!("cannot read a signal: {error}")))? {
                        return self.stopped_by_signal();
                    }
                    None
                }
                Some(slot) => Some(slot.read_step(key, &mut self.shared)),
                None => None,
            };
            self.settle(key, next);
            self.reconnect_mirror(key);
        }

        self.shared.disk.kick();
        while let Some(done) = self.shared.disk.pop_done() {
            self.finish_op(done)?;
        }

        self.out.take_batch(batch);
        for key in batch.drain(..) {
            let next = self.slots.get_mut(key).map(|slot| slot.write_step(key, &mut self.shared));
            self.settle(key, next);
        }

        let mut effects = std::mem::take(&mut self.shared.effects);
        for effect in effects.drain(..) {
            self.apply(effect)?;
        }
        // Nothing is lost of what was pushed meanwhile.
        effects.append(&mut self.shared.effects);
        self.shared.effects = effects;
        Ok(if self.shared.over { Flow::Stop } else { Flow::Continue })
    }

    fn stopped_by_signal(&mut self) -> Result<Flow, Fatal> {
        while self.leaving.is_some() {
            // The sender has said that its copy counts here now: that has to become true first.
            self.shared.disk.kick();
            while let Some(done) = self.shared.disk.pop_done() {
                self.finish_op(done)?;
            }
        }
        let leaves = |slot: &Slot| matches!(slot, Slot::Mirror(mirror) if !mirror.may_stop());
        if self.shared.over {
            Ok(Flow::Stop)
        } else if self.shared.inbound.is_some() {
            Err(Fatal(NOT_MIGRATED.into()))
        } else if self.mirror.and_then(|key| self.slots.get(key)).is_some_and(leaves) {
            info!("the image has moved; not waiting for the destination to close");
            Ok(Flow::Stop)
        } else if self.mirror.is_some() {
            Err(Fatal(
                "stopped by a signal while a migration was running; the image here is the one that counts".into(),
            ))
        } else {
            Ok(Flow::Stop)
        }
    }

    /// Hands a completion to the slot it is for.
    fn finish_op(&mut self, done: Done) -> Result<(), Fatal> {
        if let (Some(plan), Some(range)) = (&mut self.shared.plan, &done.touched) {
            plan.note_write(range);
        }
        if done.owner == RECEIVED {
            return self.received(done.result);
        }
        let key = Key::from_u64(done.owner);
        self.out.push(key);
        let next = match self.slots.get_mut(key) {
            Some(Slot::Client(client)) => Some(client.disk_done(done, &mut self.shared)),
            Some(Slot::Mirror(mirror)) => Some(self.shared.with_plan(|plan, sh| mirror.disk_done(done, key, plan, sh))),
            _ => {
                // Whoever asked is gone; only the memory comes back.
                done.buffer.into_iter().for_each(|buffer| self.shared.pool.give(buffer));
                None
            }
        };
        self.settle(key, next);
        Ok(())
    }

    /// Sleeps until an event, a timer, or not at all when there is work. The only place where the process waits.
    fn wait(&mut self, events: &mut Events) -> Result<(), Fatal> {
        let busy = !self.run.is_empty() || !self.shared.effects.is_empty() || self.shared.disk.in_flight() > 0;
        let timeout = if busy {
            Some(Duration::ZERO)
        } else {
            let held = if self.shared.held.is_empty() { None } else { self.shared.writes_held_until() };
            let next = held.into_iter().chain(self.shared.wheel.next_expiry()).min();
            next.map(|at_ms| Duration::from_millis(at_ms.saturating_sub(sys::monotonic_ms())))
        };
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() != ErrorKind::Interrupted => {
                return Err(Fatal(format!("cannot wait for events: {error}")));
            }
            _ => {}
        }
        self.shared.now_ms = sys::monotonic_ms();
        Ok(())
    }

    /// Notes what a socket is ready for; nothing is done about it yet.
    fn note(&mut self, event: &mio::event::Event) {
        let key = Key::from_token(event.token());
        let Some(slot) = self.slots.get_mut(key) else { return };
        match slot {
            Slot::Listener(listener) => listener.ready().note(event),
            Slot::Client(client) => client.socket().note(event),
            Slot::Control(control) => control.socket().note(event),
            Slot::Mirror(mirror) => mirror.socket().into_iter().for_each(|socket| socket.note(event)),
            Slot::Signals(_) => {}
        }
        self.run.push(key);
    }

    /// Does what a slot wants next.
    fn settle(&mut self, key: Key, next: Option<Next>) {
        match next {
            None | Some(Next::Idle) => {}
            Some(Next::Again) => self.run.push(key),
            Some(Next::Close(reason)) => match self.slots.remove(key) {
                Some(Slot::Client(client)) => self.close_client(client, &reason),
                Some(Slot::Control(control)) => {
                    self.shared.controls -= 1;
                    control.closed(&reason);
                    self.waiters.retain(|&waiter| waiter != key);
                    // It may have stopped accepting for want of room.
                    self.run.extend(self.control_listener);
                }
                Some(Slot::Mirror(mirror)) => self.mirror_ended(*mirror, &reason),
                Some(Slot::Listener(_) | Slot::Signals(_)) | None => {}
            },
        }
    }

    fn close_client(&mut self, mut client: Box<Client>, reason: &Reason) {
        client.closed(reason, &mut self.shared);
        if let Some(inbound) = &self.shared.inbound {
            if matches!(reason, Reason::End(End::Disconnect)) && inbound.is_complete() {
                // The connection stays until everything is durable: its end tells the sender so. Nobody else is let in.
                let op = Op { owner: RECEIVED, tag: 0, action: Action::Flush };
                if self.shared.disk.submit(op).is_ok() {
                    self.leaving = Some(client);
                    return;
                }
            }
            let what = format!("this was no complete migration: {}; waiting for a sender", inbound.describe());
            if inbound.has_begun() {
                warn!("{client}: {what}");
            } else {
                info!("{client}: {what}");
            }
        }
        self.shared.clients -= 1;
    }

    /// What a sender has sent is durable, or cannot be made so.
    fn received(&mut self, result: io::Result<()>) -> Result<(), Fatal> {
        result.map_err(|error| Fatal(format!("cannot make the migrated image durable: {error}")))?;
        let then_serve = self.shared.inbound.take().is_some_and(|inbound| inbound.then_serve());
        if let Some(client) = self.leaving.take() {
            self.shared.clients -= 1;
            info!("{client}: the migration is complete: {} bytes are here and durable", self.shared.disk.size());
        }
        if then_serve {
            // Alone or together: to have less than before cannot fail.
            let _ = self.shared.disk.lock(false);
            info!("serving {} on {}", self.shared.disk.path().display(), self.addresses.join(" and "));
        }
        self.shared.over = !then_serve;
        Ok(())
    }

    fn apply(&mut self, effect: Effect) -> Result<(), Fatal> {
        match effect {
            Effect::Connected(socket, peer, dialect) => self.add_client(socket, peer, dialect),
            Effect::ControlConnected(socket) => self.add_control(socket),
            Effect::Command(key, command) => {
                if let Some(answer) = self.execute(key, command) {
                    self.answer(key, &answer);
                }
            }
            Effect::Answer(key, answer) => self.answer(key, &answer),
            Effect::ResumeClients => self.resume_clients(),
            Effect::Run(key) => self.run.push(key),
            Effect::Fail(why) => return Err(Fatal(why)),
        }
        Ok(())
    }

    /// Clients may have waited for the migration, each with requests that no event will announce again.
    fn resume_clients(&mut self) {
        let clients = self.slots.iter().filter(|(_, slot)| matches!(slot, Slot::Client(_))).map(|(key, _)| key);
        self.run.extend(clients);
    }

    /// Begins the next attempt of the migration when its time has come.
    fn reconnect_mirror(&mut self, key: Key) {
        if let Some(Slot::Mirror(mirror)) = self.slots.get_mut(key) {
            if mirror.wants_connect(self.shared.now_ms) {
                mirror.reconnect(key, self.poll.registry(), &mut self.shared);
            }
        }
    }

    fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn add_client(&mut self, socket: Socket, peer: Peer, dialect: Dialect) {
        if let Some((key, Slot::Mirror(mirror))) = self.mirror.and_then(|key| Some((key, self.slots.get_mut(key)?))) {
            if mirror.is_other_end(&socket) {
                self.shared.clients -= 1;
                let next = self.shared.with_plan(|plan, sh| mirror.met_itself(key, plan, sh));
                return self.settle(key, Some(next));
            }
        }
        if !peer.ip().is_none_or(|ip| self.shared.acl.allows(ip)) {
            // The list has changed in the turn in which it was accepted.
            self.shared.clients -= 1;
            return;
        }
        let mut client = Box::new(Client::new(self.take_id(), socket, peer, dialect, &self.shared));
        self.shared.inbound.iter_mut().for_each(Inbound::begin);
        let registry = self.poll.registry();
        let added = self.slots.try_insert_with(|key| -> io::Result<Slot> {
            client.socket().register(registry, key.token())?;
            client.opened(key, &mut self.shared);
            Ok(Slot::Client(client))
        });
        if let Err(error) = added {
            warn!("lost {peer} before it was served: {error}");
            self.shared.clients -= 1;
        }
    }

    fn add_control(&mut self, socket: Socket) {
        let id = self.take_id();
        let registry = self.poll.registry();
        let added = self.slots.try_insert_with(|key| -> io::Result<Slot> {
            let mut control = Box::new(Control::new(id, socket, key, &mut self.shared));
            control.socket().register(registry, key.token())?;
            Ok(Slot::Control(control))
        });
        if let Err(error) = added {
            warn!("lost control {id} before it was served: {error}");
            self.shared.controls -= 1;
        }
    }
}
