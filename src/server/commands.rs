//! What control commands do.

use super::config::{Destination, Rates};
use super::life::{Life, OWN};
use super::metrics;
use super::mirror::{self, Mirror};
use super::reactor::Reactor;
use super::reason::Next;
use super::reason::Reason;
use super::shared::warn_of_tail;
use super::slot::Slot;
use super::snapshot::Snapshot;
use super::status;
use crate::acl::{parse_ip, Entry};
use crate::command::{Answer, Command, Ending, Limit, Notation, StatusForm, Switch};
use crate::disk::Access;
use crate::endpoint::Endpoint;
use crate::event::slots::Key;
use crate::migrate::Plan;
use log::info;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;

/// How long clients should be paused at most when nobody says otherwise, in milliseconds.
const DEFAULT_PAUSE_MS: u64 = 100;

/// What a proxy says that is asked to do something with an image.
const NO_IMAGE_HERE: &str = "this is a proxy, and the image is where it is connected to";

/// What the record of a client takes on its way to the answer, in bytes.
const RECORD_BYTES: usize = 2 << 10;
/// What a migration takes beside its map of the image, in bytes.
const MIGRATION_BYTES: usize = 256 << 10;

impl Reactor {
    /// Carries a command out for the control connection `from`. `None`: the answer comes later.
    pub(super) fn execute(&mut self, from: Key, command: Command) -> Option<Answer> {
        let outcome = match command {
            Command::Status(StatusForm { clients: true, .. }) if !self.has_memory_for_records() => {
                Err(Answer::failed("there is no memory for a record of each client"))
            }
            Command::Status(StatusForm { notation: Notation::Prometheus, .. }) => Ok(metrics::page(self)),
            Command::Status(wanted) => Ok(status::answer(self, wanted)),
            Command::Acl(entries) => match self.replace_acl(&entries) {
                Ok(()) => return self.fenced(from),
                Err(refused) => Err(refused),
            },
            Command::Mirror(wanted) => match self.start_mirror(from, &wanted) {
                Ok(()) => return None,
                Err(why) => Err(Answer::failed(why)),
            },
            Command::MirrorMaxBps(limit) => self.limit_mirror(limit),
            Command::Limit(limit) => Ok(self.limit_clients(limit)),
            Command::Break => self.break_mirror(),
            Command::Upstream(wanted) => self.change_upstream(&wanted).map_err(Answer::failed),
            Command::Resize => self.resize().map_err(|why| Answer::failed(format!("not resizing: {why}"))),
            Command::Snapshot(path) => match self.start_snapshot(from, path.into()) {
                Ok(()) => return None,
                Err(why) => Err(Answer::failed(format!("no snapshot: {why}"))),
            },
            Command::Wait => match self.await_end(from) {
                Ok(()) => return None,
                Err(why) => Err(Answer::failed(why)),
            },
        };
        Some(outcome.map_or_else(|refused| refused, Answer::ok))
    }

    fn has_memory_for_records(&mut self) -> bool {
        let sh = &mut self.shared;
        sh.has_memory(sh.admission.clients().saturating_mul(RECORD_BYTES))
    }

    fn replace_acl(&mut self, entries: &[String]) -> Result<(), Answer> {
        let parsed: Result<Vec<Entry>, _> =
            entries.iter().map(|entry| entry.parse().map_err(|_| Answer::bad_spec(entry))).collect();
        let parsed = parsed?;
        info!("access control list replaced: {} entries", parsed.len());
        self.shared.admission.acl.replace(parsed);
        let acl = &self.shared.admission.acl;
        let is_refused = |slot: &Slot| match slot {
            Slot::Client(client) => client.peer().ip().is_some_and(|ip| !acl.allows(ip)),
            _ => false,
        };
        for key in self.keys_of(is_refused) {
            self.settle(key, Some(Next::Close(Reason::AclChanged)));
        }
        Ok(())
    }

    /// The answer to `acl` means that nobody who is out changes the image any more. `None`: it waits for what the kernel has in
    /// hand for clients that are gone.
    fn fenced(&mut self, from: Key) -> Option<Answer> {
        let mut owners = self.shared.backend.flying();
        owners.retain(|&owner| owner != OWN && self.slots.get(Key::from_u64(owner)).is_none());
        owners.sort_unstable();
        owners.dedup();
        if owners.is_empty() {
            return Some(Answer::ok("updated"));
        }
        if let Some(Slot::Control(control)) = self.slots.get_mut(from) {
            control.await_disk(owners, from, &mut self.shared);
            self.wait_disk.push(from);
        }
        None
    }

    /// Begins a migration; its start is answered when the destination has greeted.
    fn start_mirror(&mut self, from: Key, wanted: &crate::command::Mirror) -> Result<(), String> {
        let sh = &mut self.shared;
        match sh.life {
            Life::Serving => {}
            Life::Receiving { .. } | Life::Sealing { .. } => {
                return Err("not serving yet: an inbound migration is awaited".into());
            }
            Life::Snapshot => return Err("a snapshot is being made; try again when it is done".into()),
            Life::Relaying => return Err("the image is at another server already, and this one relays to it".into()),
            Life::Sending { .. } | Life::Over => return Err("mirror already running".into()),
        }
        let ip = parse_ip(&wanted.addr).map_err(|_| "bad IP address")?;
        let bind = wanted.bind.as_deref().map(parse_ip).transpose().map_err(|_| "bad bind address")?;
        if bind.is_some_and(|bind| bind.is_ipv4() != ip.is_ipv4()) {
            return Err("bad bind address".into());
        }
        let Some(disk) = sh.backend.disk() else {
            return Err(format!("not mirroring: {NO_IMAGE_HERE}"));
        };
        if disk.access() == Access::ReadOnly {
            return Err(
                "not mirroring: this server is read-only and does not keep others from writing the image".into()
            );
        }
        let (size, tail) = (disk.size(), disk.tail());
        if size < mirror::SIZE_MIN {
            return Err(format!("files smaller than {} bytes cannot be mirrored", mirror::SIZE_MIN));
        }
        if wanted.relay && wanted.ending == Ending::Nothing {
            return Err("a server that goes on serving its image does not relay".into());
        }
        if wanted.ending == Ending::Unlink && tail > 0 {
            return Err(format!(
                "not unlinking: the last {tail} bytes of the file are no whole sector and would be lost"
            ));
        }
        if wanted.ending == Ending::Unlink && disk.is_device() {
            return Err("not unlinking: this is a block device".into());
        }
        if wanted.ending == Ending::Unlink {
            disk.named_path().map_err(|error| format!("not unlinking: {}: {error}", disk.path().display()))?;
        }
        if !sh.has_memory(Plan::memory_for(size).saturating_add(MIGRATION_BYTES)) {
            return Err("there is no memory for a map of the image".into());
        }
        sh.lock_image().map_err(|_| {
            "another server has the image open, and what its clients write would be lost; stop that server first"
        })?;
        let settings = mirror::Settings {
            destination: Destination {
                to: Endpoint::Tcp(SocketAddr::new(ip, wanted.port)),
                bind,
                export: wanted.export.clone(),
            },
            ending: wanted.ending,
            relay: wanted.relay,
            request_limit_ms: sh.limits.request_limit_ms,
        };
        let started = self
            .slots
            .try_insert_with(|key| Mirror::start(settings, from, key, sh).map(|mirror| Slot::Mirror(Box::new(mirror))));
        let mirror = started.inspect_err(|_| sh.share_image())?;
        let max_pause_ms = wanted.max_pause_ms.unwrap_or(DEFAULT_PAUSE_MS);
        let answer_max_ms = sh.limits.request_limit_ms;
        let mut plan = Box::new(Plan::new(size, max_pause_ms, answer_max_ms, wanted.max_bytes_per_s, sh.now_ms));
        plan.note_earlier_changes(sh.gate.changing());
        sh.life = Life::Sending { mirror, plan };
        Ok(())
    }

    /// Lets a control connection wait for the end of a migration.
    fn await_end(&mut self, from: Key) -> Result<(), &'static str> {
        let waits = |slot: &Slot| matches!(slot, Slot::Control(control) if control.awaits_end());
        if self.keys_of(waits).len() >= self.shared.admission.waiters_max() {
            return Err("too many wait already");
        }
        if let Some(Slot::Control(control)) = self.slots.get_mut(from) {
            control.await_end();
        }
        Ok(())
    }

    fn limit_mirror(&mut self, limit: Option<u64>) -> Result<String, Answer> {
        let now_ms = self.shared.now_ms;
        let plan = self.shared.life.plan().ok_or_else(|| Answer::failed("Not currently mirroring"))?;
        plan.set_limit(limit, now_ms);
        // The migration may be waiting for a time that the old limit had set.
        self.run.extend(self.shared.life.mirror());
        Ok("updated".into())
    }

    /// Looks at the size of the file again. New clients are told it, and those that are here may use it.
    fn resize(&mut self) -> Result<String, String> {
        let sh = &mut self.shared;
        sh.life.only_serves()?;
        let disk = sh.backend.disk_mut().ok_or(NO_IMAGE_HERE)?;
        let before = disk.size();
        disk.grow()?;
        let size = disk.size();
        if size > before {
            info!("{}: grown from {before} to {size} bytes", disk.path().display());
            warn_of_tail(disk);
        }
        for key in self.keys_of(|slot| matches!(slot, Slot::Client(_))) {
            if let Some(Slot::Client(client)) = self.slots.get_mut(key) {
                client.resize(size);
            }
        }
        Ok(format!("size={size}"))
    }

    /// Begins a snapshot; it is answered when the file is there.
    fn start_snapshot(&mut self, from: Key, to: PathBuf) -> Result<(), String> {
        let sh = &mut self.shared;
        sh.life.only_serves()?;
        let disk = sh.backend.disk().ok_or(NO_IMAGE_HERE)?;
        if disk.is_device() {
            return Err("this is a block device; what it lies on, such as LVM, may have snapshots".into());
        }
        if disk.access() == Access::ReadOnly {
            return Err("this server is read-only and does not keep others from writing the image".into());
        }
        if sh.gate.takes_back() {
            // To set the mark, too, waits for whoever has the file locked.
            return Err("a migration has just ended, and the mark on the image is being taken back; try again".into());
        }
        sh.lock_image().map_err(|_| "another server has the image open and may write it; stop that server first")?;
        let added = self
            .slots
            .try_insert_with(|key| Ok::<_, Infallible>(Slot::Snapshot(Box::new(Snapshot::start(from, to, key, sh)))));
        self.run.extend(added);
        Ok(())
    }

    /// Limits what clients may ask for.
    fn limit_clients(&mut self, limit: Limit) -> String {
        let sh = &mut self.shared;
        let before = sh.gate.quota.rates();
        let rate = |wanted: Option<u64>, before| wanted.map_or(before, |rate| Some(rate).filter(|&rate| rate > 0));
        let rates =
            Rates { requests: rate(limit.max_iops, before.requests), bytes: rate(limit.max_bytes_per_s, before.bytes) };
        sh.gate.quota.set(rates, sh.now_ms, &mut self.run);
        info!("clients may ask for {rates}");
        "updated".into()
    }

    /// Changes a proxy to another server.
    fn change_upstream(&mut self, wanted: &Switch) -> Result<String, &'static str> {
        let slot = self.link.and_then(|key| self.slots.get_mut(key).map(|slot| (key, slot)));
        let Some((key, Slot::Upstream(link))) = slot else { return Err("this is no proxy") };
        let to = if wanted.addr.starts_with('/') {
            Endpoint::Unix(wanted.addr.clone().into())
        } else {
            let ip = parse_ip(&wanted.addr).map_err(|_| "bad IP address")?;
            Endpoint::Tcp(SocketAddr::new(ip, wanted.port))
        };
        let bind = link.server().bind.filter(|bind| matches!(&to, Endpoint::Tcp(to) if to.is_ipv4() == bind.is_ipv4()));
        let export = link.server().export.clone();
        link.change(Destination { to, bind, export }, wanted.when_lost, &mut self.shared)?;
        self.run.push(key);
        Ok(if wanted.when_lost { "armed".into() } else { "switching".into() })
    }

    fn break_mirror(&mut self) -> Result<String, Answer> {
        let slot = self.shared.life.mirror().and_then(|key| self.slots.get_mut(key).map(|slot| (key, slot)));
        let Some((key, Slot::Mirror(mirror))) = slot else { return Err(Answer::failed("not mirroring")) };
        if !mirror.may_stop() {
            return Err(Answer::failed("mirror completed"));
        }
        self.settle(key, Some(Next::Close(Reason::Stopped)));
        Ok("mirror stopped".into())
    }
}
