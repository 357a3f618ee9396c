//! GLUE: the loop, and the only folder that sees sockets, the disk, the protocol and the clock together.
//!
//! A turn is a one-way pipe; each step runs over every slot that needs it, then the next step starts:
//!
//! ```text
//! wait ──> note readiness ──> READ + parse ──> deadlines ──> disk ──> COMPLETE ──> WRITE ──> effects ──> wait
//! ```
//!
//! Invariants:
//! 1. Only `Reactor::settle` removes a slot, and it does not recurse. A slot never touches another one: it
//!    pushes an `Effect`.
//! 2. A key of an old generation finds no slot: stale events, timers and completions are dropped by that one rule.
//! 3. What a slot has asked of the disk ends with it: nothing that is queued for it is done any more.
//! 4. A slot that could do something without a new event is in the run queue; one that waits for the disk is woken when
//!    the disk has done something.
//!
//! The files, top down; each imports from those below it only:
//!
//! ```text
//!  mod          the turn                     start, apply, commands, status   opening; effects; what commands do; facts
//!  metrics                                   facts for those who collect them
//!  reactor      the slots and their queues   slot                             the kinds of slot
//!  client, control, mirror, upstream, listener, supervisor                    one kind each
//!  attempt      one try of a migration       trials                           all of them, counted
//!  dial         an outgoing connection       snapshot   a second file of the image
//!  mark         what the image is marked as
//!  offer, change, outage                        what another server is like; how it is changed; when it is away
//!  shared       what every slot is lent         backend     what stands behind the requests
//!  gate, quota, life, admit, effect          what may pass; how much of it; what the server does; who is let in; what slots
//!                                            ask of others
//!  timings                                   how long requests and turns take
//!  reason, grace, complaints                 why a slot closes; when deadlines count; how often peers are complained of
//!  watch, socket, bind, signals, config      is a peer still there; a peer; listening; what stops the server; what to do
//! ```

mod admit;
mod apply;
mod attempt;
mod backend;
mod bind;
mod change;
mod client;
mod commands;
mod complaints;
mod config;
mod control;
mod dial;
mod effect;
mod gate;
mod grace;
mod inbound;
mod life;
mod listener;
mod mark;
mod metrics;
mod mirror;
mod offer;
mod outage;
mod quota;
mod reactor;
mod reason;
mod shared;
mod signals;
mod slot;
mod snapshot;
mod socket;
mod start;
mod status;
mod supervisor;
#[cfg(test)]
mod tests;
mod timings;
mod trials;
mod upstream;
mod watch;

pub use config::{Backing, Config, ControlDoor, Destination, Dialect, Door, Fatal, Image, Rates, Role, Upstream};

use crate::event::slots::Key;
use crate::sys;
use crate::work::Done;
use life::Life;
use log::info;
use mio::Events;
use reactor::Reactor;
use slot::Slot;
use std::io::ErrorKind;
use std::time::Duration;
use supervisor::Supervisor;

/// Events taken from the kernel in one turn; more wait for the next.
const EVENTS_MAX: usize = 256;

/// What a listener says when it has to stop.
const NOT_MIGRATED: &str = "stopped by a signal before a migration was complete";
/// What it adds when every byte has come but no DISC: the source may have sent one, and may have unlinked its file
/// before that.
const ALL_HERE: &str =
    "every byte of the image is here and durable, but this file is the image only if the source's is gone";

enum Flow {
    Continue,
    Stop,
}

/// Serves until a signal comes. An error is what ended it abnormally.
pub fn serve(config: Config) -> Result<(), Fatal> {
    let supervisor = Supervisor::from_environment();
    let mut server = Reactor::start(&config)?;
    let mut events = Events::with_capacity(EVENTS_MAX);
    let mut batch = Vec::new();
    if let Backing::Upstream(upstream) = &config.backing {
        if let Flow::Stop = server.reach_upstream(upstream.start_timeout_ms, &mut events, &mut batch)? {
            return Ok(());
        }
    }
    if !server.open(config.doors, config.control)? {
        return stopped_early(&config.backing);
    }
    let doing = if server.shared.life.awaits_image() { "awaiting a migration to" } else { "serving" };
    info!("{doing} {} on {}", server.shared.backend.name(), server.places());
    supervisor.map_or(Ok(()), |supervisor| server.supervise(supervisor))?;
    let outcome = loop {
        match server.turn(&mut events, &mut batch) {
            Ok(Flow::Continue) => {}
            Ok(Flow::Stop) => break Ok(()),
            Err(fatal) => break Err(fatal),
        }
    };
    if let Some(Slot::Supervisor(supervisor)) = server.supervisor.and_then(|key| server.slots.get(key)) {
        supervisor.tell_stop();
    }
    server.tell_waiters(&outcome);
    server.part();
    server.shared.admission.complaints.tell();
    server.leave_upstream();
    // A disk that hangs must not keep the process from ending.
    server.shared.backend.leak();
    outcome
}

/// A signal came before anything was served.
fn stopped_early(backing: &Backing) -> Result<(), Fatal> {
    match backing {
        Backing::Image(Image { role: Role::Listen { .. }, .. }) => Err(Fatal(NOT_MIGRATED.into())),
        Backing::Image(Image { role: Role::Serve { .. }, .. }) | Backing::Upstream(_) => Ok(()),
    }
}

impl Reactor {
    /// Takes turns until the server that has the image has greeted, for so long at the most; 0 is one attempt.
    fn reach_upstream(&mut self, limit_ms: u64, events: &mut Events, batch: &mut Vec<Key>) -> Result<Flow, Fatal> {
        let give_up_ms = self.shared.now_ms.saturating_add(limit_ms);
        loop {
            if let Flow::Stop = self.turn(events, batch)? {
                return Ok(Flow::Stop);
            }
            let Some(Slot::Upstream(link)) = self.link.and_then(|key| self.slots.get(key)) else { break };
            match link.outage().last_error() {
                _ if link.is_open() => break,
                Some(why) if self.shared.now_ms >= give_up_ms && link.has_tried_all() => {
                    return Err(Fatal(format!("cannot use the server {}: {why}", link.server())));
                }
                _ => {}
            }
        }
        Ok(Flow::Continue)
    }

    /// Says goodbye to the server that has the image.
    fn leave_upstream(&mut self) {
        if let Some(Slot::Upstream(link)) = self.link.and_then(|key| self.slots.get_mut(key)) {
            link.leave(&mut self.shared);
        }
    }

    /// One pass through the pipe. `batch` is scratch space, empty between turns.
    fn turn(&mut self, events: &mut Events, batch: &mut Vec<Key>) -> Result<Flow, Fatal> {
        self.wait(events)?;
        for event in events.iter() {
            self.note(event);
        }
        let sh = &mut self.shared;
        sh.gate.wake(&mut sh.life, sh.now_ms, &mut self.run);
        sh.admission.complaints.look(sh.now_ms);

        self.run.take_batch(batch);
        // The migration comes last: what it reads is behind what clients ask for.
        if let Some(at) = self.shared.life.mirror().and_then(|mirror| batch.iter().position(|&key| key == mirror)) {
            let mirror = batch.remove(at);
            batch.push(mirror);
        }
        for key in batch.drain(..) {
            self.out.push(key);
            let next = match self.slots.get_mut(key) {
                Some(Slot::Signals(signals)) => {
                    let stop = signals.take_stop();
                    if stop.map_err(|error| Fatal(format!("cannot read a signal: {error}")))? {
                        if let Flow::Stop = self.stop()? {
                            return Ok(Flow::Stop);
                        }
                    }
                    None
                }
                Some(slot) => Some(slot.read_step(key, &mut self.shared)),
                None => None,
            };
            self.settle(key, next);
        }

        // What has arrived was looked at first: a peer is not late because this server was.
        if self.grace.is_over(self.shared.wheel.next_expiry(), self.shared.now_ms) {
            self.shared.wheel.expire(self.shared.now_ms, batch);
            for key in batch.drain(..) {
                let next = self.slots.get_mut(key).map(|slot| slot.timeout(key, &mut self.shared));
                self.settle(key, next);
            }
        }

        self.shared.backend.kick();
        if let Some(mut done) = self.shared.backend.pop_done() {
            self.shared.admission.timings.note_time(sys::monotonic_us());
            loop {
                self.finish(done)?;
                let Some(next) = self.shared.backend.pop_done() else { break };
                done = next;
            }
        }

        // Whatever was submitted in this turn goes to the server that has the image.
        self.out.extend(self.link);
        self.out.take_batch(batch);
        for key in batch.drain(..) {
            let next = self.slots.get_mut(key).map(|slot| slot.write_step(key, &mut self.shared));
            self.settle(key, next);
        }

        self.mind_memory();
        while let Some(effect) = self.shared.effects.pop_front() {
            self.apply(effect)?;
        }
        self.report();
        let is_over = matches!(self.shared.life, Life::Over) || self.shared.has_relayed();
        Ok(if is_over { Flow::Stop } else { Flow::Continue })
    }

    /// Sleeps until an event, a timer, or not at all when a step would move something. The only place where the process
    /// waits.
    fn wait(&mut self, events: &mut Events) -> Result<(), Fatal> {
        let ended_us = sys::monotonic_us();
        self.shared.admission.timings.end_turn(ended_us);
        let timeout = if !self.run.is_empty() || self.shared.backend.has_work() {
            Some(Duration::ZERO)
        } else {
            let sh = &mut self.shared;
            let gate = sh.gate.opens_at_ms(&mut sh.life, sh.now_ms);
            let deadline = self.grace.wakes_at_ms(sh.wheel.next_expiry());
            let next = gate.into_iter().chain(deadline).chain(sh.admission.complaints.due_ms()).min();
            next.map(|at_ms| Duration::from_millis(at_ms.saturating_sub(ended_us / 1000)))
        };
        match self.poll.poll(events, timeout) {
            Err(error) if error.kind() != ErrorKind::Interrupted => {
                return Err(Fatal(format!("cannot wait for events: {error}")));
            }
            _ => {}
        }
        let now_us = sys::monotonic_us();
        self.shared.now_ms = now_us / 1000;
        self.shared.admission.timings.begin_turn(now_us);
        Ok(())
    }

    /// Notes what a socket is ready for; nothing is done about it yet. The disk's notifier has no slot: that it woke the
    /// loop is all it has to do.
    fn note(&mut self, event: &mio::event::Event) {
        let key = Key::from_token(event.token());
        if let Some(slot) = self.slots.get_mut(key) {
            slot.note(event);
            self.run.push(key);
        }
    }

    /// Hands a completion to the slot it is for.
    fn finish(&mut self, done: Done) -> Result<(), Fatal> {
        if let Some(range) = &done.touched {
            self.shared.gate.done(&mut self.shared.life, range);
        }
        self.run.append(&mut self.wait_disk);
        if done.owner == life::OWN {
            if self.shared.flushed(done.tag, done.result)? {
                self.sealed();
            }
            return Ok(());
        }
        let key = Key::from_u64(done.owner);
        self.out.push(key);
        if let Some(slot) = self.slots.get_mut(key) {
            let next = slot.disk_done(done, key, &mut self.shared);
            self.settle(key, Some(next));
        } else {
            // Whoever asked is gone; only the memory comes back.
            done.buffer.into_iter().for_each(|buffer| self.shared.pool.give(buffer));
        }
        Ok(())
    }

    /// A signal has come.
    fn stop(&mut self) -> Result<Flow, Fatal> {
        if self.shared.gate.takes_back() {
            return Err(Fatal(
                "stopped by a signal while the mark was taken back that the image has moved; the image here is the one that \
                 counts, and serve --adopt clears the mark if it is still there"
                    .into(),
            ));
        }
        match &mut self.shared.life {
            Life::Serving | Life::Snapshot | Life::Relaying | Life::Over => Ok(Flow::Stop),
            Life::Receiving { incoming, .. } if incoming.is_durable() => {
                Err(Fatal(format!("{NOT_MIGRATED}; {ALL_HERE}")))
            }
            Life::Receiving { .. } => Err(Fatal(NOT_MIGRATED.into())),
            Life::Sealing { stop, .. } => {
                *stop = true;
                Ok(Flow::Continue)
            }
            Life::Sending { mirror, .. } => match self.slots.get(*mirror) {
                Some(Slot::Mirror(mirror)) if !mirror.may_stop() => {
                    info!("the destination has everything; not waiting for it to close");
                    Ok(Flow::Stop)
                }
                _ if self.shared.life.plan().is_some_and(|plan| plan.is_marked()) => Err(Fatal(
                    "stopped by a signal after the image was marked as moved, and before the destination was told; the image \
                     here is the one that counts, once serve --adopt has cleared its mark"
                        .into(),
                )),
                _ => Err(Fatal(
                    "stopped by a signal while a migration was running; the image here is the one that counts".into(),
                )),
            },
        }
    }
}
