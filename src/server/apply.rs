//! What effects do, at the end of a turn.

use super::change::Settings;
use super::client::Client;
use super::complaints::Complaint;
use super::config::{Dialect, Fatal, Purpose};
use super::control::Control;
use super::effect::Effect;
use super::life::Life;
use super::mirror::Mirror;
use super::reactor::Reactor;
use super::reason::{Next, Reason};
use super::slot::Slot;
use super::socket::{Peer, Socket};
use crate::command::Answer;
use crate::event::slots::Key;
use crate::sys::net::Keepalive;
use log::{info, log};
use std::collections::VecDeque;
use std::fmt;
use std::io;

impl Reactor {
    /// Carries out what one slot asked of others.
    pub(super) fn apply(&mut self, effect: Effect) -> Result<(), Fatal> {
        match effect {
            Effect::Accepted(listener, socket, peer, purpose) => self.admit(listener, socket, peer, purpose),
            Effect::Command(key, command) => {
                if let Some(answer) = self.execute(key, command) {
                    self.answer(key, &answer);
                }
            }
            Effect::Answer(key, answer) => self.answer(key, &answer),
            Effect::AnswerWaiters(answer) => {
                for key in self.keys_of(|slot| matches!(slot, Slot::Control(control) if control.awaits_end())) {
                    self.answer(key, &answer);
                }
            }
            Effect::Named(key) => self.give_place(key),
            Effect::CameBack => {
                if let Some((key, next)) = self.met_itself(Mirror::sends) {
                    self.settle(key, Some(next));
                }
            }
            Effect::PauseClients => {
                for key in self.keys_of(|slot| matches!(slot, Slot::Client(_))) {
                    if let Some(Slot::Client(client)) = self.slots.get_mut(key) {
                        client.keep(self.shared.now_ms);
                    }
                }
            }
            // Each may have requests in its socket or inbox that no event will announce again.
            Effect::ResumeClients => {
                let clients = self.keys_of(|slot| matches!(slot, Slot::Client(_)));
                self.run.extend(clients);
            }
            Effect::Relay(to) => {
                let limit_ms = self.shared.limits.upstream_limit_ms;
                let settings = Settings { server: to, others: VecDeque::new(), limit_ms, give_up_ms: None };
                return self.add_link(settings);
            }
            Effect::CutClients => {
                for key in self.keys_of(|slot| matches!(slot, Slot::Client(_))) {
                    self.settle(key, Some(Next::Close(Reason::UpstreamAway)));
                }
            }
            Effect::Run(key) => self.run.push(key),
            Effect::Fail(why) => return Err(Fatal(why)),
        }
        Ok(())
    }

    /// A client has named its session: an older connection of that name ends, and what the kernel has in hand for those that
    /// are gone is waited for.
    fn give_place(&mut self, key: Key) {
        let Some(Slot::Client(client)) = self.slots.get_mut(key) else { return };
        if self.shared.life.awaits_image() {
            client.refuse();
            return self.run.push(key);
        }
        let Some(name) = client.session_name() else { return };
        let has_name = |slot: &Slot| matches!(slot, Slot::Client(client) if client.session_name() == Some(name));
        for older in self.keys_of(has_name).into_iter().filter(|&older| older != key) {
            self.settle(older, Some(Next::Close(Reason::WentOn)));
        }
        let owners = self.ghosts.iter().filter(|(of, _)| *of == name).map(|(_, owner)| *owner).collect();
        if let Some(Slot::Client(client)) = self.slots.get_mut(key) {
            client.await_disk(owners);
        }
        self.run.push(key);
    }

    /// The server ends: clients that have named their session, and ask again elsewhere, hear what was not executed. What has
    /// been is answered as ever.
    pub(super) fn part(&mut self) {
        while let Some(done) = self.shared.backend.pop_done() {
            if let Some(Slot::Client(client)) = self.slots.get_mut(Key::from_u64(done.owner)) {
                // It is closed anyway.
                let _ = client.disk_done(done, &mut self.shared);
            }
        }
        for key in self.keys_of(|slot| matches!(slot, Slot::Client(_))) {
            self.shared.backend.forget(key.to_u64());
        }
        let in_work = self.shared.backend.flying();
        for key in self.keys_of(|slot| matches!(slot, Slot::Client(_))) {
            if let Some(Slot::Client(client)) = self.slots.get_mut(key) {
                client.part(in_work.contains(&key.to_u64()));
            }
        }
    }

    /// The server ends. Those who wait for the end of a migration hear what that means for it, and who waits for a snapshot that
    /// there is none.
    pub(super) fn tell_waiters(&mut self, outcome: &Result<(), Fatal>) {
        let answer = match (outcome, &self.shared.life) {
            (Err(why), _) => Answer::failed(&*why.0),
            (Ok(()), Life::Sending { .. }) => Answer::ok("migrated"),
            (Ok(()), _) => Answer::failed("the server has been stopped"),
        };
        // That ends nothing but what has ended.
        let _ = self.apply(Effect::AnswerWaiters(answer));
        let stopped = self.slots.iter().find_map(|(_, slot)| match slot {
            Slot::Snapshot(snapshot) => snapshot.stopped(),
            _ => None,
        });
        if let Some((asker, answer)) = stopped {
            self.answer(asker, &answer);
        }
    }

    /// A received image is durable, and so is that it is one.
    pub(super) fn sealed(&mut self) {
        let places = self.places();
        let sh = &mut self.shared;
        let Life::Sealing { sender, then_serve, stop } = sh.life else { return };
        let level = sh.admission.complaints.level_of_end(Complaint::IncompleteMigration);
        log!(level, "the migration is complete: {} bytes are here and durable", sh.backend.export().size);
        if then_serve {
            sh.share_image();
            info!("serving {} on {places}", sh.backend.name());
        }
        sh.life = if then_serve && !stop { Life::Serving } else { Life::Over };
        self.settle(sender, Some(Next::Close(Reason::Received)));
    }

    /// Gives a control connection its answer, and sends it if it can go at once: the program may end after this turn.
    fn answer(&mut self, key: Key, answer: &Answer) {
        let next = match self.slots.get_mut(key) {
            Some(Slot::Control(control)) => {
                control.answer(answer, key, &mut self.shared);
                Some(control.write_step())
            }
            _ => None,
        };
        self.settle(key, next);
    }

    /// Serves a connection, or drops it, which closes it without a word.
    fn admit(&mut self, listener: Key, socket: Socket, peer: Peer, purpose: Purpose) {
        let Purpose::Nbd(dialect) = purpose else {
            if let Err(error) = self.add_control(socket) {
                let what = format_args!("lost a control connection before it was served: {error}");
                self.warn_of(Complaint::LostConnection, listener, &what);
            }
            return;
        };
        if let Some((key, next)) = self.met_itself(|mirror| mirror.is_other_end(&socket)) {
            return self.settle(key, Some(next));
        }
        let sh = &mut self.shared;
        let awaits_sender = sh.life.awaits_image();
        if !sh.has_memory_for_client() {
            let what = format_args!("refused {peer}: memory has run out");
            self.warn_of(Complaint::RefusedConnection, listener, &what);
        } else if self.has_given_up() {
            let what = format_args!("refused {peer}: {}", Reason::UpstreamAway);
            self.warn_of(Complaint::RefusedConnection, listener, &what);
        } else if let Err(why) = self.shared.admission.admit_client(peer.ip(), awaits_sender) {
            self.warn_of(Complaint::RefusedConnection, listener, &format_args!("refused {peer}: {why}"));
        } else if let Err(error) = self.add_client(socket, peer, dialect) {
            self.shared.admission.client_left(crate::proto::server::Tally::default());
            let what = format_args!("lost {peer} before it was served: {error}");
            self.warn_of(Complaint::LostConnection, listener, &what);
        }
    }

    /// True while the server that has the image is away for so long that clients were cut.
    fn has_given_up(&self) -> bool {
        matches!(self.link.and_then(|key| self.slots.get(key)), Some(Slot::Upstream(link)) if link.outage().has_given_up())
    }

    /// The migration, if it is the one whose destination is this server, and what it wants next.
    fn met_itself(&mut self, is_it: impl Fn(&Mirror) -> bool) -> Option<(Key, Next)> {
        let key = self.shared.life.mirror()?;
        match self.slots.get_mut(key) {
            Some(Slot::Mirror(mirror)) if is_it(mirror) => Some((key, mirror.met_itself(key, &mut self.shared))),
            _ => None,
        }
    }

    fn warn_of(&mut self, of: Complaint, listener: Key, what: &dyn fmt::Display) {
        if let Some(Slot::Listener(listener)) = self.slots.get(listener) {
            listener.warn_of(of, what, &mut self.shared);
        }
    }

    fn add_client(&mut self, socket: Socket, peer: Peer, dialect: Dialect) -> io::Result<()> {
        socket.set_options(Keepalive::PEER)?;
        let mut client = Box::new(Client::new(self.take_id(), socket, peer, dialect, &self.shared));
        let sh = &mut self.shared;
        self.slots.try_insert_with(|key| -> io::Result<Slot> {
            client.socket().register(&sh.registry, key.token())?;
            client.opened(key, sh);
            Ok(Slot::Client(client))
        })?;
        if let Life::Receiving { incoming, .. } = &mut self.shared.life {
            incoming.begin();
        }
        Ok(())
    }

    fn add_control(&mut self, socket: Socket) -> io::Result<()> {
        let id = self.take_id();
        let sh = &mut self.shared;
        self.slots.try_insert_with(|key| -> io::Result<Slot> {
            let mut control = Box::new(Control::new(id, socket, key, sh));
            control.socket().register(&sh.registry, key.token())?;
            Ok(Slot::Control(control))
        })?;
        self.shared.admission.admit_control();
        Ok(())
    }
}
