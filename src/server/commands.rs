//! What control commands do to the server, and how a migration begins and ends.

use super::mirror::{self, Mirror};
use super::reason::Next;
use super::reason::Reason;
use super::shared::MAX_CONTROLS;
use super::slot::Slot;
use super::status;
use super::Server;
use crate::acl::{parse_ip, Entry};
use crate::command::{Action, Answer, Command};
use crate::event::slots::Key;
use crate::migrate::{Plan, Progress};
use log::info;
use std::net::SocketAddr;

/// How long clients should be paused at most when nobody says otherwise, in milliseconds.
const DEFAULT_PAUSE_MS: u64 = 100;

/// Control connections that may wait for a migration: half of all, so that there is always one for `break`.
const MAX_WAITERS: usize = MAX_CONTROLS / 2;

impl Server {
    /// Carries a command out for the control connection `from`. `None`: the answer comes later.
    pub(super) fn execute(&mut self, from: Key, command: Command) -> Option<Answer> {
        let outcome = match command {
            Command::Status(wanted) => Ok(status::answer(self, wanted)),
            Command::Acl(entries) => self.replace_acl(&entries),
            Command::Mirror(wanted) => match self.start_mirror(from, &wanted) {
                Ok(()) => return None,
                Err(why) => Err(Answer::failed(why)),
            },
            Command::MirrorMaxBps(limit) => self.limit_mirror(limit),
            Command::Break => self.break_mirror(),
            Command::Wait if self.waiters.len() >= MAX_WAITERS => Err(Answer::failed("too many wait already")),
            Command::Wait => {
                self.waiters.push(from);
                return None;
            }
        };
        Some(outcome.map_or_else(|refused| refused, Answer::ok))
    }

    fn replace_acl(&mut self, entries: &[String]) -> Result<String, Answer> {
        let parsed: Result<Vec<Entry>, _> =
            entries.iter().map(|entry| entry.parse().map_err(|_| Answer::bad_spec(entry))).collect();
        let parsed = parsed?;
        info!("access control list replaced: {} entries", parsed.len());
        self.shared.acl.replace(parsed);
        let acl = &self.shared.acl;
        let is_refused = |slot: &Slot| match slot {
            Slot::Client(client) => client.peer().ip().is_some_and(|ip| !acl.allows(ip)),
            _ => false,
        };
        let refused: Vec<Key> = self.slots.iter().filter(|(_, slot)| is_refused(slot)).map(|(key, _)| key).collect();
        for key in refused {
            self.settle(key, Some(Next::Close(Reason::AclChanged)));
        }
        Ok("updated".into())
    }

    /// Begins a migration; its start is answered when the destination has greeted.
    fn start_mirror(&mut self, from: Key, wanted: &crate::command::Mirror) -> Result<(), String> {
        let sh = &mut self.shared;
        if sh.inbound.is_some() {
            return Err("not serving yet: an inbound migration is awaited".into());
        }
        if self.mirror.is_some() {
            return Err("mirror already running".into());
        }
        let ip = parse_ip(&wanted.addr).map_err(|_| "bad IP address")?;
        let bind = wanted.bind.as_deref().map(parse_ip).transpose().map_err(|_| "bad bind address")?;
        if bind.is_some_and(|bind| bind.is_ipv4() != ip.is_ipv4()) {
            return Err("bad bind address".into());
        }
        let (size, tail) = (sh.disk.size(), sh.disk.tail());
        if size < mirror::SIZE_MIN {
            return Err(format!("files smaller than {} bytes cannot be mirrored", mirror::SIZE_MIN));
        }
        if wanted.action == Action::Unlink && tail > 0 {
            return Err(format!(
                "not unlinking: the last {tail} bytes of the file are no whole sector and would be lost"
            ));
        }
        if wanted.action == Action::Unlink && sh.disk.is_device() {
            return Err("not unlinking: this is a block device".into());
        }
        if wanted.action == Action::Unlink {
            sh.disk.named_path().map_err(|error| format!("not unlinking: {}: {error}", sh.disk.path().display()))?;
        }
        let settings = mirror::Settings {
            to: SocketAddr::new(ip, wanted.port),
            bind,
            export: wanted.export.clone(),
            action: wanted.action,
            request_limit_ms: sh.limits.request_limit_ms,
        };
        let registry = self.poll.registry();
        let key = self.slots.try_insert_with(|key| {
            Mirror::start(settings, from, key, registry, sh).map(|mirror| Slot::Mirror(Box::new(mirror)))
        })?;
        let max_pause_ms = wanted.max_pause_ms.unwrap_or(DEFAULT_PAUSE_MS);
        sh.plan = Some(Box::new(Plan::new(size, max_pause_ms, wanted.max_bytes_per_s, sh.now_ms)));
        self.mirror = Some(key);
        Ok(())
    }

    fn limit_mirror(&mut self, limit: Option<u64>) -> Result<String, Answer> {
        let now_ms = self.shared.now_ms;
        let plan = self.shared.plan.as_mut().ok_or_else(|| Answer::failed("Not currently mirroring"))?;
        plan.set_limit(limit, now_ms);
        // It may be waiting for a time that does not count any more.
        self.run.extend(self.mirror);
        Ok("updated".into())
    }

    fn break_mirror(&mut self) -> Result<String, Answer> {
        let slot = self.mirror.and_then(|key| self.slots.get_mut(key).map(|slot| (key, slot)));
        let Some((key, Slot::Mirror(mirror))) = slot else { return Err(Answer::failed("not mirroring")) };
        if !mirror.may_stop() {
            return Err(Answer::failed("mirror completed"));
        }
        self.settle(key, Some(Next::Close(Reason::Stopped)));
        Ok("mirror stopped".into())
    }

    /// A migration is over, one way or the other: everybody who waits for it hears so, and clients go on or are done.
    pub(super) fn mirror_ended(&mut self, mut mirror: Mirror, reason: &Reason) {
        self.mirror = None;
        let progress = self.shared.plan.as_deref().map(Plan::progress);
        let paused_at_ms = self.shared.plan.as_deref().map_or(0, Plan::paused_at_ms);
        if let Some(starter) = mirror.closed(&mut self.shared) {
            self.answer(starter, &Answer::failed(reason.to_string()));
        }
        self.shared.plan = None;
        let answer = if let (Reason::Migrated, Some(Progress { sent_bytes, zeroed_bytes, .. })) = (reason, progress) {
            let pause_ms = self.shared.now_ms.saturating_sub(paused_at_ms);
            let took_ms = self.shared.now_ms.saturating_sub(mirror.started_ms());
            info!(
                "{mirror}: complete: {sent_bytes} bytes sent, {zeroed_bytes} bytes zeroed, {}.{:03} s, clients paused \
                 for {pause_ms} ms",
                took_ms / 1000,
                took_ms % 1000
            );
            self.shared.over = mirror.action() != Action::Nothing;
            Answer::ok("migrated")
        } else {
            info!("{mirror}: ended: {reason}");
            Answer::failed(reason.to_string())
        };
        if !matches!(reason, Reason::NotStarted(_)) {
            for waiter in std::mem::take(&mut self.waiters) {
                self.answer(waiter, &answer);
            }
        }
        if !self.shared.over {
            self.resume_clients();
        }
    }

    /// Gives a control connection its answer, and sends it if it can go at once: the program may end after this turn.
    pub(super) fn answer(&mut self, key: Key, answer: &Answer) {
        let next = match self.slots.get_mut(key) {
            Some(Slot::Control(control)) => {
                control.answer(answer, key, &mut self.shared);
                Some(control.write_step())
            }
            _ => None,
        };
        self.settle(key, next);
    }
}
