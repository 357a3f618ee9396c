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

mod client;
mod control;
mod effect;
mod listener;
mod signals;
mod status;
mod stream;

use crate::acl::{Acl, Entry};
use crate::buffer::Pool;
use crate::command::{Answer, Command};
use crate::disk::Disk;
use crate::endpoint::Endpoint;
use crate::event::ready::RunQueue;
use crate::event::slots::{Key, Slots};
use crate::event::wheel::Wheel;
use crate::proto::error::Violation;
use crate::proto::session::{End, Tally};
use crate::sys::{self, SignalFd};
use client::Client;
use control::Control;
use effect::Effect;
use listener::Listener;
use log::{info, warn};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token};
use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::time::Duration;
use stream::{Peer, Stream};

/// Memory for the payloads of all clients together, in bytes.
const POOL_BYTES: usize = 16 << 20;
/// Control connections served at once; further ones wait in the backlog.
const MAX_CONTROLS: usize = 64;
/// Events taken from the kernel in one turn; more wait for the next.
const EVENTS: usize = 256;
/// Descriptors besides those of clients: standard streams, poll, signals, image, listeners, control connections.
const OTHER_DESCRIPTORS: u64 = 16 + MAX_CONTROLS as u64;

/// What to serve, and how.
#[derive(Debug)]
pub struct Config {
    /// Where NBD clients connect.
    pub listen: Endpoint,
    /// The image: a regular file or a block device.
    pub file: PathBuf,
    /// The path of the control socket, if there is one.
    pub control: Option<PathBuf>,
    /// Who may connect.
    pub acl: Acl,
    /// How long a request may take, in milliseconds; `None` is for ever.
    pub killswitch_ms: Option<u64>,
    /// How many clients may be connected at once.
    pub max_clients: usize,
}

/// What ends the program: the text of its `F` line.
#[derive(Debug)]
pub struct Fatal(pub String);

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a slot wants next.
#[derive(Debug)]
enum Next {
    /// Nothing before an event, a completion or a timer.
    Idle,
    /// Another turn: it used its budget and could go on.
    Again,
    /// To be closed.
    Close(Reason),
}

/// Why a slot is closed.
#[derive(Debug)]
enum Reason {
    /// The conversation came to its end.
    End(End),
    /// The peer broke the protocol in a way that is owed no answer.
    Violation(Violation),
    /// The socket failed.
    Socket(io::Error),
    /// A request took longer than the killswitch allows.
    Killswitch { age_ms: u64 },
    /// The access control list has changed.
    AclChanged,
    /// A control connection took too long.
    Deadline,
    /// A control connection has its answer.
    Answered,
}

/// The limits of the configuration that slots ask for while they run.
#[derive(Debug)]
struct Limits {
    killswitch_ms: Option<u64>,
    max_clients: usize,
}

/// What all slots share.
struct Shared {
    /// When this turn began; the only clock there is.
    now_ms: u64,
    pool: Pool,
    disk: Disk,
    wheel: Wheel,
    acl: Acl,
    limits: Limits,
    effects: Vec<Effect>,
    /// Clients connected or just accepted.
    clients: usize,
    /// Control connections open or just accepted.
    controls: usize,
    /// What clients that are gone have had done.
    closed: Tally,
}

impl Shared {
    fn controls_full(&self) -> bool {
        self.controls >= MAX_CONTROLS
    }
}

#[derive(Debug)]
enum Slot {
    Listener(Listener),
    // Boxed, so that the table is not as wide as the widest of them.
    Client(Box<Client>),
    Control(Box<Control>),
    Signals(SignalFd),
}

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
    address: String,
    /// Numbers connections in the order in which they came.
    next_id: u64,
}

/// Serves until a signal comes. An error is what ended it abnormally.
pub fn serve(config: Config) -> Result<(), Fatal> {
    let mut server = Server::start(config)?;
    info!("serving {} on {}", server.shared.disk.path().display(), server.address);
    let mut events = Events::with_capacity(EVENTS);
    let mut batch = Vec::new();
    loop {
        if let Flow::Stop = server.turn(&mut events, &mut batch)? {
            return Ok(());
        }
    }
}

impl Server {
    /// Opens everything; what listens for clients listens before the control socket appears.
    fn start(config: Config) -> Result<Self, Fatal> {
        let signals = SignalFd::new().map_err(|error| Fatal(format!("cannot take signals: {error}")))?;
        let disk = Disk::open(&config.file).map_err(|error| Fatal(error.to_string()))?;
        if disk.tail() > 0 {
            let (size, tail) = (disk.size(), disk.tail());
            warn!("{}: serving {size} bytes; the last {tail} are no whole sector of 512", disk.path().display());
        }
        let wanted = OTHER_DESCRIPTORS.saturating_add(config.max_clients as u64);
        match sys::raise_descriptor_limit(wanted) {
            Ok(limit) if limit < wanted => {
                warn!("--max-clients {} needs {wanted} descriptors and the limit is {limit}", config.max_clients);
            }
            Ok(_) => {}
            Err(error) => warn!("cannot raise the limit of descriptors to {wanted}: {error}"),
        }
        let listener = Listener::nbd(&config.listen, &signals)?;
        let address = listener.to_string();
        let poll = Poll::new().map_err(|error| Fatal(format!("cannot wait for events: {error}")))?;
        let now_ms = sys::monotonic_ms();
        let mut server = Self {
            poll,
            slots: Slots::default(),
            run: RunQueue::default(),
            out: RunQueue::default(),
            shared: Shared {
                now_ms,
                pool: Pool::new(POOL_BYTES),
                disk,
                wheel: Wheel::new(now_ms),
                acl: config.acl,
                limits: Limits { killswitch_ms: config.killswitch_ms, max_clients: config.max_clients },
                effects: Vec::new(),
                clients: 0,
                controls: 0,
                closed: Tally::default(),
            },
            control_listener: None,
            address,
            next_id: 1,
        };
        server.open_slots(listener, config.control, signals)?;
        Ok(server)
    }

    fn open_slots(&mut self, nbd: Listener, control: Option<PathBuf>, signals: SignalFd) -> Result<(), Fatal> {
        let failed = |error: io::Error| Fatal(format!("cannot wait for events: {error}"));
        let registry = self.poll.registry();
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
        add(&mut self.slots, nbd).map_err(failed)?;
        if let Some(path) = control {
            self.control_listener = Some(add(&mut self.slots, Listener::control(&path)?).map_err(failed)?);
        }
        Ok(())
    }

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

        self.run.take_batch(batch);
        for key in batch.drain(..) {
            if let Some(Slot::Signals(signals)) = self.slots.get_mut(key) {
                if signals::take_stop(signals).map_err(|error| Fatal(format!("cannot read a signal: {error}")))? {
                    return Ok(Flow::Stop);
                }
                continue;
            }
            self.out.push(key);
            let next = self.slots.get_mut(key).map(|slot| slot.read_step(key, &mut self.shared));
            self.settle(key, next);
        }

        self.shared.disk.kick();
        while let Some(done) = self.shared.disk.pop_done() {
            let key = Key::from_u64(done.owner);
            self.out.push(key);
            let next = if let Some(Slot::Client(client)) = self.slots.get_mut(key) {
                Some(client.disk_done(done, &mut self.shared))
            } else {
                // The client is gone; only its memory comes back.
                done.buffer.into_iter().for_each(|buffer| self.shared.pool.give(buffer));
                None
            };
            self.settle(key, next);
        }

        self.out.take_batch(batch);
        for key in batch.drain(..) {
            let next = self.slots.get_mut(key).map(|slot| slot.write_step(&mut self.shared));
            self.settle(key, next);
        }

        let mut effects = std::mem::take(&mut self.shared.effects);
        for effect in effects.drain(..) {
            self.apply(effect);
        }
        self.shared.effects = effects;
        Ok(Flow::Continue)
    }

    /// Sleeps until an event, a timer, or not at all when there is work. The only place where the process waits.
    fn wait(&mut self, events: &mut Events) -> Result<(), Fatal> {
        let timeout = if !self.run.is_empty() || self.shared.disk.in_flight() > 0 {
            Some(Duration::ZERO)
        } else {
            let next = self.shared.wheel.next_expiry();
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
            Slot::Client(client) => client.ready().note(event),
            Slot::Control(control) => control.ready().note(event),
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
                Some(Slot::Client(mut client)) => {
                    self.shared.clients -= 1;
                    client.closed(&reason, &mut self.shared);
                }
                Some(Slot::Control(control)) => {
                    self.shared.controls -= 1;
                    control.closed(&reason);
                    // It may have stopped accepting for want of room.
                    self.control_listener.into_iter().for_each(|key| self.run.push(key));
                }
                Some(Slot::Listener(_) | Slot::Signals(_)) | None => {}
            },
        }
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::Connected(stream, peer) => self.add_client(stream, peer),
            Effect::ControlConnected(stream) => self.add_control(stream),
            Effect::Command(key, command) => {
                let answer = self.execute(command);
                if let Some(Slot::Control(control)) = self.slots.get_mut(key) {
                    control.answer(&answer);
                    self.run.push(key);
                }
            }
        }
    }

    fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn add_client(&mut self, stream: Stream, peer: Peer) {
        let mut client = Box::new(Client::new(self.take_id(), stream, peer, &self.shared));
        let registry = self.poll.registry();
        let added = self.slots.try_insert_with(|key| -> io::Result<Slot> {
            register(registry, client.stream(), key.token())?;
            Ok(Slot::Client(client))
        });
        if let Err(error) = added {
            warn!("lost {peer} before it was served: {error}");
            self.shared.clients -= 1;
        }
    }

    fn add_control(&mut self, stream: Stream) {
        let id = self.take_id();
        let registry = self.poll.registry();
        let added = self.slots.try_insert_with(|key| -> io::Result<Slot> {
            let mut control = Box::new(Control::new(id, stream, key, &mut self.shared));
            register(registry, control.stream(), key.token())?;
            Ok(Slot::Control(control))
        });
        if let Err(error) = added {
            warn!("lost control {id} before it was served: {error}");
            self.shared.controls -= 1;
        }
    }

    /// Carries a command out.
    fn execute(&mut self, command: Command) -> Answer {
        match command {
            Command::Status => Answer::ok(status::line(self)),
            Command::Acl(entries) => self.replace_acl(&entries),
            Command::Break => Answer::failed("not mirroring"),
            Command::MirrorMaxBps(_) => Answer::failed("Not currently mirroring"),
            Command::Mirror(_) => Answer::failed("not there yet"),
        }
    }

    fn replace_acl(&mut self, entries: &[String]) -> Answer {
        let mut parsed = Vec::with_capacity(entries.len());
        for entry in entries {
            match entry.parse::<Entry>() {
                Ok(entry) => parsed.push(entry),
                Err(_) => return Answer::bad_spec(entry),
            }
        }
        info!("access control list replaced: {} entries", parsed.len());
        self.shared.acl.replace(parsed);
        let acl = &self.shared.acl;
        let refused: Vec<Key> = self
            .slots
            .iter()
            .filter(|(_, slot)| match slot {
                Slot::Client(client) => client.peer().ip().is_some_and(|ip| !acl.allows(ip)),
                _ => false,
            })
            .map(|(key, _)| key)
            .collect();
        for key in refused {
            self.settle(key, Some(Next::Close(Reason::AclChanged)));
        }
        Answer::ok("updated")
    }
}

impl Slot {
    fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        match self {
            Self::Listener(listener) => listener.read_step(key, sh),
            Self::Client(client) => client.read_step(key, sh),
            Self::Control(control) => control.read_step(key, sh),
            Self::Signals(_) => Next::Idle,
        }
    }

    fn write_step(&mut self, sh: &mut Shared) -> Next {
        match self {
            Self::Client(client) => client.write_step(sh),
            Self::Control(control) => control.write_step(),
            Self::Listener(_) | Self::Signals(_) => Next::Idle,
        }
    }

    fn timeout(&mut self, key: Key, sh: &mut Shared) -> Next {
        match self {
            Self::Client(client) => client.timeout(key, sh),
            Self::Control(_) => Next::Close(Reason::Deadline),
            // Accepting has rested.
            Self::Listener(_) => Next::Again,
            Self::Signals(_) => Next::Idle,
        }
    }
}

/// Registers once, for both directions: the loop is edge-triggered.
fn register(registry: &Registry, stream: &mut Stream, token: Token) -> io::Result<()> {
    registry.register(stream, token, Interest::READABLE | Interest::WRITABLE)
}
