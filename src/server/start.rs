//! How a server comes to be: everything is opened, in the order in which others may see it.

use super::admit::{Admission, Places, CONTROLS_MAX};
use super::backend::{Backend, Standby};
use super::bind;
use super::change::Settings;
use super::config::{Backing, Config, ControlDoor, Destination, Dialect, Door, Fatal, Image, Role};
use super::gate::Gate;
use super::grace::Grace;
use super::life::Life;
use super::listener::Listener;
use super::mark;
use super::quota::Quota;
use super::reactor::Reactor;
use super::shared::{warn_of_tail, Limits, Shared};
use super::signals::Signals;
use super::slot::Slot;
use super::supervisor::Supervisor;
use super::upstream::Link;
use crate::buffer::Pool;
use crate::disk::{Access, Disk};
use crate::event::run_queue::RunQueue;
use crate::event::slots::{Key, Slots};
use crate::event::wheel::Wheel;
use crate::migrate::Incoming;
use crate::proto::client::Cookies;
use crate::proto::export::Export;
use crate::sys;
use crate::upstream::Upstream;
use log::warn;
use mio::unix::SourceFd;
use mio::{Interest, Poll, Token};
use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Memory for the payloads of all clients together, in bytes.
const POOL_BYTES: usize = 16 << 20;
/// Descriptors of what is opened later and is no connection from outside that has a place: the control socket and its folder,
/// a migration's connection and the file that it unlinks (or a snapshot's process), a client for each listener that has to
/// be refused.
const LATER_DESCRIPTORS: u64 = 8;
/// Descriptors that are open at the start where that cannot be counted, because there is no /proc.
const OPEN_DESCRIPTORS: u64 = 20;

/// What opening everything may take, in bytes: the zeroes that a disk writes, and tables.
const OPEN_BYTES: usize = (1 << 20) + (256 << 10);

/// What a server says that cannot have its reserve.
const NO_MEMORY: &str = "there is not enough memory for a server";

/// The disk's notifier; no slot has this token.
const NOTIFIER: Token = Token(usize::MAX);

impl Reactor {
    /// Opens what stands behind the requests, and what says that a signal has come. That of the control socket which a
    /// server that was killed has left goes first of all.
    pub(super) fn start(config: &Config) -> Result<Self, Fatal> {
        if let Some(ControlDoor::At(path)) = &config.control {
            bind::clear(path)?;
        }
        keep_reserve()?;
        sys::ignore_file_size_signal();
        sys::clone::expect_children();
        let signals = Signals::new().map_err(|error| Fatal(format!("cannot take signals: {error}")))?;
        if !sys::memory::has_room(OPEN_BYTES) {
            return Err(Fatal(NO_MEMORY.into()));
        }
        let backend = match &config.backing {
            Backing::Image(image) => Backend::Disk(Box::new(
                Disk::open(&image.file, image.access, is_listener(image), image.disk_engine)
                    .map_err(|error| Fatal(error.to_string()))?,
            )),
            Backing::Upstream(upstream) => Backend::Upstream(Box::new(Standby {
                core: Upstream::new(upstream.replay, upstream.replay_limit, upstream.read_ahead),
                name: upstream.server.to_string(),
                export: Export { size: 0, read_only: false, flushes: false, several: true },
            })),
        };
        Self::new(backend, signals, config)
    }

    /// The same with what stands behind the requests.
    pub(super) fn new(backend: Backend, signals: Signals, config: &Config) -> Result<Self, Fatal> {
        let poll = Poll::new().map_err(cannot_wait)?;
        let now_ms = sys::monotonic_ms();
        let registry = poll.registry().try_clone().map_err(cannot_wait)?;
        let (life, request_limit_ms, sync) = match &config.backing {
            Backing::Image(image) => (life_with(&backend, image)?, image.request_limit_ms, image.sync),
            Backing::Upstream(_) => (Life::Serving, config.upstream_limit_ms, false),
        };
        let queues_clients = matches!(config.backing, Backing::Upstream(_));
        let mut server = Self {
            poll,
            slots: Slots::default(),
            run: RunQueue::default(),
            out: RunQueue::default(),
            wait_disk: RunQueue::default(),
            ghosts: Vec::new(),
            grace: Grace::default(),
            shared: Shared {
                now_ms,
                registry,
                pool: Pool::with_source(POOL_BYTES, sys::memory::zeroed),
                backend,
                wheel: Wheel::new(now_ms),
                limits: Limits {
                    killswitch_ms: config.killswitch_ms,
                    request_limit_ms,
                    upstream_limit_ms: config.upstream_limit_ms,
                    sync,
                    export_name: config.export_name.as_str().into(),
                },
                admission: Admission::new(config.acl.clone(), places(config.max_clients)?, queues_clients),
                life,
                gate: Gate::new(Cookies::starting_at(sys::random()), Quota::new(config.rates, now_ms)),
                effects: VecDeque::new(),
            },
            listeners: Vec::new(),
            control_listener: None,
            link: None,
            supervisor: None,
            addresses: Vec::new(),
            started_ms: now_ms,
            started_s: sys::clock_began_s().saturating_add(now_ms / 1000),
            next_id: 1,
        };
        server.add_first_slots(signals, config)?;
        Ok(server)
    }

    fn add_first_slots(&mut self, signals: Signals, config: &Config) -> Result<(), Fatal> {
        let registry = self.poll.registry();
        if let Some(notifier) = self.shared.backend.notifier() {
            registry
                .register(&mut SourceFd(&notifier.as_raw_fd()), NOTIFIER, Interest::READABLE)
                .map_err(cannot_wait)?;
        }
        self.slots
            .try_insert_with(|key| {
                let fd = signals.as_fd().as_raw_fd();
                registry.register(&mut SourceFd(&fd), key.token(), Interest::READABLE)?;
                Ok(Slot::Signals(signals))
            })
            .map_err(cannot_wait)?;
        if let Backing::Upstream(wanted) = &config.backing {
            let mut others = VecDeque::from(wanted.server.look_up(wanted.bind).map_err(Fatal)?);
            let Some(to) = others.pop_front() else { return Err(Fatal(format!("{} has no address", wanted.server))) };
            let server = Destination { to, bind: wanted.bind, export: wanted.export.clone() };
            let limit_ms = config.upstream_limit_ms;
            self.add_link(Settings { server, others, limit_ms, give_up_ms: wanted.give_up_ms })?;
        }
        Ok(())
    }

    /// Begins to connect to another server that has the image.
    pub(super) fn add_link(&mut self, settings: Settings) -> Result<(), Fatal> {
        let link = Box::new(Link::new(settings, self.shared.now_ms));
        let key = self.slots.try_insert_with(|_| Ok(Slot::Upstream(link))).map_err(cannot_wait)?;
        self.link = Some(key);
        self.run.push(key);
        Ok(())
    }

    /// Lets clients in, then commands: that the control socket is there says that the server is ready. False: a signal has
    /// ended the wait for an address.
    pub(super) fn open(&mut self, doors: Vec<(Door, Dialect)>, control: Option<ControlDoor>) -> Result<bool, Fatal> {
        for (door, dialect) in doors {
            let Some(signals) = self.signals() else { return Ok(false) };
            let Some(listener) = Listener::nbd(door, dialect, signals)? else { return Ok(false) };
            self.addresses.push((dialect, listener.to_string()));
            let key = self.add_listener(listener)?;
            self.listeners.push(key);
        }
        if let Some(door) = control {
            self.control_listener = Some(self.add_listener(Listener::control(door)?)?);
        }
        // Opening everything may have used the reserve up.
        keep_reserve()?;
        sys::memory::trim();
        Ok(true)
    }

    /// Tells a supervisor from now on what the server does.
    pub(super) fn supervise(&mut self, supervisor: Supervisor) -> Result<(), Fatal> {
        let supervisor = Slot::Supervisor(Box::new(supervisor));
        self.supervisor = Some(self.slots.try_insert_with(|_| Ok(supervisor)).map_err(cannot_wait)?);
        self.report();
        Ok(())
    }

    fn signals(&self) -> Option<&Signals> {
        self.slots.iter().find_map(|(_, slot)| match slot {
            Slot::Signals(signals) => Some(signals),
            _ => None,
        })
    }

    fn add_listener(&mut self, mut listener: Listener) -> Result<Key, Fatal> {
        let registry = self.poll.registry();
        let added = self.slots.try_insert_with(|key| {
            listener.register(registry, key.token())?;
            Ok(Slot::Listener(listener))
        });
        added.map_err(cannot_wait)
    }
}

#[allow(clippy::needless_pass_by_value, reason = "as `map_err` calls it")]
fn cannot_wait(error: io::Error) -> Fatal {
    Fatal(format!("cannot wait for events: {error}"))
}

fn keep_reserve() -> Result<(), Fatal> {
    sys::memory::keep_reserve().then_some(()).ok_or_else(|| Fatal(NO_MEMORY.into()))
}

fn is_listener(image: &Image) -> bool {
    matches!(image.role, Role::Listen { .. })
}

/// What a server with an image begins with. It says to others that the image is open here.
fn life_with(backend: &Backend, image: &Image) -> Result<Life, Fatal> {
    let size = backend.export().size;
    if let Some(disk) = backend.disk() {
        // A listener overwrites the image, so it is alone with it until it serves it.
        let alone = is_listener(image) || image.access == Access::Alone;
        if image.access != Access::ReadOnly {
            disk.lock(alone).map_err(|error| Fatal(error.to_string()))?;
        }
        if let Role::Serve { adopt } = image.role {
            mark::check(disk, adopt)?;
        }
        warn_of_tail(disk);
    }
    Ok(match image.role {
        Role::Serve { .. } => Life::Serving,
        Role::Listen { .. } if !sys::memory::has_room(Incoming::memory_for(size)) => {
            return Err(Fatal("there is no memory for the map of what has come of the image".into()));
        }
        Role::Listen { then_serve } => Life::Receiving { incoming: Incoming::new(size), then_serve },
    })
}

/// How many connections there are descriptors for, besides those that are open, once their limit is as high as it may be.
fn places(max_clients: usize) -> Result<Places, Fatal> {
    let open = fs::read_dir("/proc/self/fd").map_or(OPEN_DESCRIPTORS, |all| all.count() as u64);
    let others = open.saturating_add(LATER_DESCRIPTORS);
    let wanted = others.saturating_add(CONTROLS_MAX as u64).saturating_add(max_clients as u64);
    let limit = sys::raise_descriptor_limit(wanted)
        .map_err(|error| Fatal(format!("cannot learn the limit of descriptors: {error}")))?;
    let places = Places::share(limit.saturating_sub(others), max_clients).ok_or_else(|| {
        Fatal(format!(
            "the limit of descriptors is {limit}, and none is left for a client beside {others} for other things"
        ))
    })?;
    if limit < wanted {
        let Places { clients, controls } = places;
        warn!(
            "--max-clients {max_clients} needs {wanted} descriptors and the limit is {limit}: at most {clients} clients and \
             {controls} control connections at once"
        );
    }
    Ok(places)
}
