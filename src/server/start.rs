//! How a server comes to be: everything is opened, in the order in which others may see it.

use super::admit::{Admission, Places, CONTROLS_MAX};
use super::bind;
use super::config::Dialect;
use super::config::{Config, Fatal, Role};
use super::gate::Gate;
use super::grace::Grace;
use super::life::Life;
use super::listener::Listener;
use super::reactor::Reactor;
use super::shared::{Limits, Shared};
use super::slot::Slot;
use crate::buffer::Pool;
use crate::disk::{Access, Disk};
use crate::event::run_queue::RunQueue;
use crate::event::slots::Slots;
use crate::event::wheel::Wheel;
use crate::migrate::Incoming;
use crate::proto::client::Cookies;
use crate::sys::{self, SignalFd};
use log::warn;
use mio::unix::SourceFd;
use mio::{Interest, Poll, Token};
use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;

/// Memory for the payloads of all clients together, in bytes.
const POOL_BYTES: usize = 16 << 20;
/// Descriptors of what is opened later and is no connection from outside that has a place: the control socket and its folder,
/// a migration's connection and the file that it unlinks, a client for each listener that has to be refused.
const LATER_DESCRIPTORS: u64 = 8;
/// Descriptors that are open at the start where that cannot be counted, because there is no /proc.
const OPEN_DESCRIPTORS: u64 = 20;

/// What a server says that cannot have its reserve.
const NO_MEMORY: &str = "there is not enough memory for a server";

/// The disk's notifier; no slot has this token.
const NOTIFIER: Token = Token(usize::MAX);

impl Reactor {
    /// Opens everything; what listens for clients listens before the control socket appears, and that of a server that was
    /// killed goes first of all. `None`: a signal has ended the wait for an address.
    pub(super) fn start(config: Config) -> Result<Option<Self>, Fatal> {
        config.control.as_deref().map_or(Ok(()), bind::clear)?;
        let has_reserve = || sys::memory::keep_reserve().then_some(()).ok_or_else(|| Fatal(NO_MEMORY.into()));
        has_reserve()?;
        sys::ignore_file_size_signal();
        let signals = SignalFd::new().map_err(|error| Fatal(format!("cannot take signals: {error}")))?;
        let disk =
            Disk::open(&config.file, config.access, config.disk_engine).map_err(|error| Fatal(error.to_string()))?;
        let server = Self::start_with(disk, signals, config)?;
        // Opening everything may have used the reserve up.
        has_reserve()?;
        Ok(server)
    }

    /// The same with an image that is open.
    pub(super) fn start_with(disk: Disk, signals: SignalFd, config: Config) -> Result<Option<Self>, Fatal> {
        // A listener overwrites the image, so it is alone with it until it serves it.
        let alone = config.role != Role::Serve || config.access == Access::Alone;
        if config.access != Access::ReadOnly {
            disk.lock(alone).map_err(|error| Fatal(error.to_string()))?;
        }
        if disk.tail() > 0 {
            let (size, tail) = (disk.size(), disk.tail());
            warn!("{}: serving {size} bytes; the last {tail} are no whole sector of 512", disk.path().display());
        }
        let oldstyle = std::iter::once((&config.listen, Dialect::Oldstyle));
        let newstyle = config.newstyle.iter().map(|endpoint| (endpoint, Dialect::Newstyle));
        let mut listeners = Vec::new();
        for (endpoint, dialect) in oldstyle.chain(newstyle) {
            let Some(listener) = Listener::nbd(endpoint, dialect, &signals)? else { return Ok(None) };
            listeners.push(listener);
        }
        let addresses = listeners.iter().map(Listener::to_string).collect();
        let poll = Poll::new().map_err(|error| Fatal(format!("cannot wait for events: {error}")))?;
        let now_ms = sys::monotonic_ms();
        let failed = |error: io::Error| Fatal(format!("cannot wait for events: {error}"));
        let registry = poll.registry().try_clone().map_err(failed)?;
        let places = places(config.max_clients)?;
        let life = match config.role {
            Role::Serve => Life::Serving,
            Role::Listen { .. } if !sys::memory::has_room(Incoming::memory_for(disk.size())) => {
                return Err(Fatal("there is no memory for the map of what has come of the image".into()));
            }
            Role::Listen { then_serve } => Life::Receiving { incoming: Incoming::new(disk.size()), then_serve },
        };
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
                disk,
                wheel: Wheel::new(now_ms),
                limits: Limits {
                    killswitch_ms: config.killswitch_ms,
                    request_limit_ms: config.request_limit_ms,
                    sync: config.sync,
                },
                admission: Admission::new(config.acl, places),
                life,
                gate: Gate::new(Cookies::starting_at(sys::random())),
                effects: VecDeque::new(),
            },
            control_listener: None,
            addresses,
            next_id: 1,
        };
        server.open_slots(listeners, config.control, signals)?;
        Ok(Some(server))
    }

    fn open_slots(&mut self, nbd: Vec<Listener>, control: Option<PathBuf>, signals: SignalFd) -> Result<(), Fatal> {
        let failed = |error: io::Error| Fatal(format!("cannot wait for events: {error}"));
        let registry = self.poll.registry();
        if let Some(notifier) = self.shared.disk.notifier() {
            registry.register(&mut SourceFd(&notifier.as_raw_fd()), NOTIFIER, Interest::READABLE).map_err(failed)?;
        }
        let add = |slots: &mut Slots<Slot>, mut listener: Listener| {
            slots.try_insert_with(|key| {
                listener.register(registry, key.token())?;
                Ok(Slot::Listener(listener))
            })
        };
        self.slots
            .try_insert_with(|key| {
                let fd = signals.as_fd().as_raw_fd();
                registry.register(&mut SourceFd(&fd), key.token(), Interest::READABLE)?;
                Ok(Slot::Signals(signals))
            })
            .map_err(failed)?;
        for listener in nbd {
            add(&mut self.slots, listener).map_err(failed)?;
        }
        if let Some(path) = control {
            self.control_listener = Some(add(&mut self.slots, Listener::control(&path)?).map_err(failed)?);
        }
        Ok(())
    }
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
