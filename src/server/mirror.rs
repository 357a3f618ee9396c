//! The outgoing migration: one more slot of the loop. The [`Plan`] decides what goes next; this file connects, reads
//! from the disk, sends, receives, keeps the deadlines, and tells clients to pause and to go on.
//!
//! ```text
//!  Connecting ─> Greeting ─> Copying ─> Leaving ─> done
//!      ^            │           │          └ DISC has gone: there is no way back
//!      │            v           v
//!      └── 1 s ── Retrying <────┘  once started; a failure before that is answered and ends it
//! ```

use super::dial::{Asked, Failure, Link, Stage};
use super::effect::Effect;
use super::life::Life;
use super::reason::Next;
use super::reason::Reason;
use super::shared::Shared;
use super::socket::{Received, Socket, Stream};
use crate::buffer::SLICE;
use crate::command::{Action, Answer};
use crate::event::slots::Key;
use crate::logging::Throttle;
use crate::migrate::{Abilities, Plan, Progress, Step, DATA_MAX};
use crate::proto::client;
use crate::proto::export::Offer;
use crate::proto::wire::{kind, transmission};
use crate::sys;
use crate::work::{self, Done, Op};
use log::{info, warn};
use mio::event::Event;
use mio::net::TcpStream;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

/// How long a connection may take to be made, in milliseconds.
const CONNECT_MS: u64 = 15_000;
/// How long the destination may take to greet, in milliseconds.
const GREETING_MS: u64 = 5_000;
/// How long after a failure the next attempt begins, in milliseconds.
const RETRY_MS: u64 = 1_000;
/// How long the destination may take to close after DISC, in milliseconds. It has flushed before.
const LEAVING_MS: u64 = 10_000;
/// Memory for data between the disk and the socket, in bytes: four slices, as for a client.
const BUFFERED_MAX: usize = 4 * SLICE;
/// Pieces of the image looked at in one turn: clients come first.
const STEPS_PER_TURN: usize = 64;
/// How many failed attempts are logged, one by one, in so many milliseconds; more are counted.
const FAILURES_LOGGED: u32 = 3;
const FAILURES_LOG_MS: u64 = 30_000;
/// The smallest image that can be migrated, in bytes; the manual says so.
pub const SIZE_MIN: u64 = 4096;

/// Where to migrate to, and how.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The destination.
    pub to: SocketAddr,
    /// The local address to connect from.
    pub bind: Option<IpAddr>,
    /// The name of the export to write to; empty for the default one.
    pub export: String,
    /// What to do once the destination has everything.
    pub action: Action,
    /// How long a request may go without progress, in milliseconds.
    pub request_limit_ms: u64,
}

/// The migration.
#[derive(Debug)]
pub struct Mirror {
    settings: Settings,
    /// `None` between two attempts.
    link: Option<Link>,
    /// Who waits to hear that it has started; `None` once it has.
    starter: Option<Key>,
    attempts: u32,
    last_error: Option<String>,
    started_ms: u64,
    /// When the current stage has failed.
    deadline_ms: u64,
    /// When the plan wants to be asked again.
    wake_ms: Option<u64>,
    /// The earliest wheel entry of this slot.
    armed_ms: u64,
    /// Reads the disk has: their tags and ranges; without a range, of an attempt that is over.
    reads: Vec<(u32, Option<Range<u64>>)>,
    next_tag: u32,
    failures: Throttle,
}

impl Mirror {
    /// Begins to connect. The error is what the one who asked is told.
    pub fn start(settings: Settings, starter: Key, key: Key, sh: &mut Shared) -> Result<Self, &'static str> {
        let mut mirror = Self {
            settings,
            link: None,
            starter: Some(starter),
            attempts: 0,
            last_error: None,
            started_ms: sh.now_ms,
            deadline_ms: 0,
            wake_ms: None,
            armed_ms: u64::MAX,
            reads: Vec::new(),
            next_tag: 0,
            failures: Throttle::new(FAILURES_LOG_MS, FAILURES_LOGGED),
        };
        mirror.connect(key, sh).map_err(|error| Failure::Connect(error.to_string()).answer())?;
        Ok(mirror)
    }

    fn connect(&mut self, key: Key, sh: &mut Shared) -> io::Result<()> {
        self.attempts += 1;
        let stream = sys::connect_tcp(self.settings.bind, self.settings.to)?;
        let mut socket = Socket::new(Stream::Tcp(TcpStream::from_std(stream)));
        socket.set_options()?;
        socket.register(&sh.registry, key.token())?;
        self.link = Some(Link::new(socket, self.settings.export.clone()));
        self.deadline_ms = sh.now_ms.saturating_add(CONNECT_MS);
        self.arm(key, sh);
        Ok(())
    }

    /// Notes what an event says of its socket.
    pub fn note(&mut self, event: &Event) {
        if let Some(link) = &mut self.link {
            link.socket.note(event);
        }
    }

    /// Receives answers, then asks the plan what goes next.
    pub fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        let outcome = match self.link.as_ref().map(|link| link.stage) {
            None if sh.now_ms < self.deadline_ms => return Next::Idle,
            None => self.connect(key, sh).map(|()| Next::Idle).map_err(|error| Failure::Connect(error.to_string())),
            Some(Stage::Connecting) => self.connected(sh),
            Some(Stage::Copying) => self.receive(key, sh).and_then(|next| match next {
                Next::Close(reason) => Ok(Next::Close(reason)),
                next => self.copy(key, sh).map(|more| if matches!(more, Next::Idle) { next } else { more }),
            }),
            Some(Stage::Greeting | Stage::Leaving) => self.receive(key, sh),
        };
        let next = outcome.unwrap_or_else(|why| self.failed(&why, key, sh));
        self.arm_for(key, sh);
        next
    }

    /// Data that was read goes out in the write step of the same turn.
    pub fn disk_done(&mut self, done: Done, key: Key, sh: &mut Shared) -> Next {
        let at = self.reads.iter().position(|(tag, _)| *tag == done.tag);
        let range = at.and_then(|at| self.reads.swap_remove(at).1);
        let Some(buffer) = done.buffer else { return Next::Idle };
        let (Some(range), Some(link)) = (range, &mut self.link) else {
            sh.pool.give(buffer);
            return Next::Idle;
        };
        link.reading -= buffer.capacity();
        if let Err(error) = done.result {
            sh.pool.give(buffer);
            let why = format!("cannot read the image at offset {}: {error}", range.start);
            return self.failed(&Failure::Broken(why), key, sh);
        }
        link.send_data(range, buffer);
        Next::Idle
    }

    /// Sends once.
    pub fn write_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        let Some(link) = &mut self.link else { return Next::Idle };
        if link.stage == Stage::Connecting || !link.session.wants_send() || !link.socket.writable() {
            return Next::Idle;
        }
        match link.send(sh) {
            Ok(0) => Next::Idle,
            // Sending is no sign of life while we wait for the greeting or a FLUSH reply: keep the deadline.
            Ok(_) if link.stage == Stage::Greeting || !link.counts_progress() => Next::Again,
            Ok(_) => {
                self.deadline_ms = sh.now_ms.saturating_add(self.settings.request_limit_ms);
                Next::Again
            }
            Err(error) => self.failed(&Failure::Broken(format!("cannot send: {error}")), key, sh),
        }
    }

    /// A wheel entry has fired: something may be due.
    pub fn timeout(&mut self, key: Key, sh: &mut Shared) -> Next {
        if self.armed_ms > sh.now_ms {
            // An entry that an earlier one has overtaken.
            return Next::Idle;
        }
        (self.armed_ms, self.wake_ms) = (u64::MAX, None);
        if let Some(plan) = sh.life.plan().filter(|plan| plan.pause_ends_ms().is_some_and(|end_ms| end_ms <= sh.now_ms))
        {
            let paused_ms = sh.now_ms.saturating_sub(plan.paused_at_ms());
            warn!("{self}: the destination did not take the rest within {paused_ms} ms; clients go on");
            plan.give_up_pause();
            sh.effects.push_back(Effect::ResumeClients);
        }
        let late = sh.now_ms >= self.deadline_ms;
        let next = match &self.link {
            Some(link) if late => match link.stage {
                Stage::Connecting => self.failed(&Failure::Connect(format!("no answer in {CONNECT_MS} ms")), key, sh),
                Stage::Greeting => self.failed(&Failure::NoGreeting, key, sh),
                Stage::Copying if link.session.unanswered() > 0 => {
                    let limit_ms = self.settings.request_limit_ms;
                    self.failed(&Failure::Broken(format!("no progress in {limit_ms} ms")), key, sh)
                }
                Stage::Copying => {
                    self.deadline_ms = sh.now_ms.saturating_add(self.settings.request_limit_ms);
                    Next::Again
                }
                Stage::Leaving => {
                    warn!("{self}: the destination has everything and does not close; not waiting any longer");
                    Next::Close(Reason::Migrated)
                }
            },
            // Without a link, the read step begins the next attempt.
            _ => Next::Again,
        };
        self.arm_for(key, sh);
        next
    }

    /// True when `socket` is the other end of its own connection: both addresses are the same, the other way round.
    pub fn is_other_end(&self, socket: &Socket) -> bool {
        let own = self.link.as_ref().and_then(|link| link.socket.ends());
        own.is_some() && own == socket.ends().map(|(near, far)| (far, near))
    }

    /// The destination is this server: fail, because the copy would dirty itself for ever.
    pub fn met_itself(&mut self, key: Key, sh: &mut Shared) -> Next {
        self.failed(&Failure::Itself, key, sh)
    }

    /// True as long as it can be stopped, wherever it is.
    pub fn may_stop(&self) -> bool {
        self.link.as_ref().is_none_or(|link| link.stage != Stage::Leaving)
    }

    /// The migration is over, one way or the other: everybody who waits for it hears so, and clients go on or are done.
    pub fn closed(&mut self, reason: &Reason, sh: &mut Shared) {
        self.drop_link(sh);
        if let Some(starter) = self.starter.take() {
            sh.effects.push_back(Effect::Answer(starter, Answer::failed(reason.to_string())));
        }
        let migrated = matches!(reason, Reason::Migrated);
        if let (true, Some(plan)) = (migrated, sh.life.plan()) {
            let Progress { sent_bytes, zeroed_bytes, .. } = plan.progress();
            let pause_ms = sh.now_ms.saturating_sub(plan.paused_at_ms());
            let took_ms = sh.now_ms.saturating_sub(self.started_ms);
            info!(
                "{self}: complete: {sent_bytes} bytes sent, {zeroed_bytes} bytes zeroed, {}.{:03} s, clients paused \
                 for {pause_ms} ms",
                took_ms / 1000,
                took_ms % 1000
            );
        } else {
            info!("{self}: ended: {reason}");
        }
        if !matches!(reason, Reason::NotStarted(_)) {
            let answer = if migrated { Answer::ok("migrated") } else { Answer::failed(reason.to_string()) };
            sh.effects.push_back(Effect::AnswerWaiters(answer));
        }
        if migrated && self.settings.action != Action::Nothing {
            sh.life = Life::Over;
        } else {
            sh.life = Life::Serving;
            sh.effects.push_back(Effect::ResumeClients);
        }
    }

    /// What it is doing, in one word.
    pub fn phase(&self, plan: &Plan) -> &'static str {
        match self.link.as_ref().map(|link| link.stage) {
            None => "retrying",
            Some(Stage::Connecting | Stage::Greeting) => "connecting",
            Some(Stage::Leaving) => "finishing",
            Some(Stage::Copying) if plan.pauses_clients() => "paused",
            Some(Stage::Copying) if plan.progress().pass > 1 => "converging",
            Some(Stage::Copying) => "copying",
        }
    }

    /// True when the destination keeps to itself how durable what it has is: it offers no FLUSH.
    pub fn lacks_flush(&self) -> bool {
        let greeted = self.link.as_ref().filter(|link| matches!(link.stage, Stage::Copying | Stage::Leaving));
        greeted.is_some_and(|link| !link.can.flush)
    }

    /// Attempts begun.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Why the last attempt failed, if one has.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// When it was asked for.
    pub fn started_ms(&self) -> u64 {
        self.started_ms
    }

    fn connected(&mut self, sh: &Shared) -> Result<Next, Failure> {
        let Some(link) = self.link.as_mut().filter(|link| link.socket.writable()) else { return Ok(Next::Idle) };
        link.socket.check_connected().map_err(|error| Failure::Connect(error.to_string()))?;
        link.stage = Stage::Greeting;
        self.deadline_ms = sh.now_ms.saturating_add(GREETING_MS);
        Ok(Next::Again)
    }

    /// Receives once and takes what it means.
    fn receive(&mut self, key: Key, sh: &mut Shared) -> Result<Next, Failure> {
        let Some(link) = self.link.as_mut().filter(|link| link.socket.readable()) else { return Ok(Next::Idle) };
        match link.socket.receive(&mut [IoSliceMut::new(link.session.recv_space())]) {
            Ok(Received::End) => return Err(Failure::Closed(link.session.explain_end())),
            Ok(Received::Nothing) => return Ok(Next::Idle),
            Ok(Received::Bytes(n)) => link.session.received(n),
            Err(error) => return Err(Failure::Broken(format!("cannot receive: {error}"))),
        }
        self.deadline_ms = match link.stage {
            Stage::Copying if link.counts_progress() => sh.now_ms.saturating_add(self.settings.request_limit_ms),
            // One byte at a time does not make a greeting or an end later.
            Stage::Connecting | Stage::Greeting | Stage::Copying | Stage::Leaving => self.deadline_ms,
        };
        loop {
            let Some(link) = &mut self.link else { return Ok(Next::Idle) };
            match link.session.next_event()? {
                None => return Ok(Next::Again),
                Some(client::Event::Export(offer)) => self.greeted(offer, key, sh)?,
                Some(client::Event::Reply { note, error }) => {
                    if let Some(plan) = sh.life.plan() {
                        note.answered(error, plan, sh.now_ms)?;
                    }
                }
                // Nothing is read from the destination.
                Some(client::Event::Data { .. }) => {}
            }
        }
    }

    fn greeted(&mut self, offer: Offer, key: Key, sh: &mut Shared) -> Result<(), Failure> {
        let size = sh.disk.size();
        if offer.size != size {
            return Err(Failure::Size { remote: offer.size, local: size });
        }
        let Some(link) = &mut self.link else { return Ok(()) };
        if offer.has(transmission::READ_ONLY) {
            return Err(Failure::ReadOnly);
        }
        link.can =
            Abilities { zero: offer.has(transmission::SEND_WRITE_ZEROES), flush: offer.has(transmission::SEND_FLUSH) };
        link.stage = Stage::Copying;
        self.deadline_ms = sh.now_ms.saturating_add(self.settings.request_limit_ms);
        if let Some(plan) = sh.life.plan() {
            plan.begin(link.can, sh.now_ms);
        }
        if !link.can.flush {
            warn!("{self}: the destination offers no FLUSH; how durable the copy is, is its own affair");
        }
        info!("{self}: attempt {}: copying {size} bytes", self.attempts);
        if let Some(starter) = self.starter.take() {
            sh.effects.push_back(Effect::Answer(starter, Answer::ok("Mirror started")));
        }
        // The plan wants to be asked, and no event will say so.
        sh.effects.push_back(Effect::Run(key));
        Ok(())
    }

    /// Does what the plan says, as far as memory and this turn's share go.
    fn copy(&mut self, key: Key, sh: &mut Shared) -> Result<Next, Failure> {
        self.wake_ms = None;
        let Some(plan) = sh.life.plan() else { return Ok(Next::Idle) };
        if plan.is_quiescing() && sh.disk.in_flight() > self.reads.len() {
            return Ok(Next::WaitDisk);
        }
        if plan.is_quiescing() {
            plan.quiesced();
        }
        for _ in 0..STEPS_PER_TURN {
            let Some(link) = &mut self.link else { return Ok(Next::Idle) };
            if !sh.disk.has_room() {
                return Ok(Next::WaitDisk);
            }
            if link.buffered() >= BUFFERED_MAX {
                return Ok(Next::Idle);
            }
            // It has to be there before the plan is asked, because what the plan says is to be done has to be done.
            let buffer = if link.buffered() == 0 { Some(sh.pool.take_beyond(SLICE)) } else { sh.pool.take(SLICE) };
            let Some(mut buffer) = buffer else { return Ok(Next::Idle) };
            match plan.next(sh.now_ms) {
                Step::Data(range) => {
                    link.reading += buffer.capacity();
                    let length = usize::try_from(range.end - range.start).unwrap_or(SLICE);
                    let action = work::Action::Read { offset: range.start, length, skip_hole: false, buffer };
                    let taken = sh.disk.submit(Op { owner: key.to_u64(), tag: self.next_tag, action });
                    debug_assert!(taken.is_ok(), "it had room");
                    self.reads.push((self.next_tag, Some(range)));
                    self.next_tag = self.next_tag.wrapping_add(1);
                }
                Step::Zero(range) if !link.can.zero => {
                    let length = usize::try_from(range.end - range.start).unwrap_or(SLICE);
                    debug_assert!(range.end - range.start <= DATA_MAX, "zeroes as data come in pieces of data");
                    if let Some(zeroes) = buffer.spare().get_mut(..length) {
                        zeroes.fill(0);
                    }
                    buffer.advance(length);
                    link.send_data(range, buffer);
                }
                step => {
                    sh.pool.give(buffer);
                    match step {
                        Step::Look(offset) => {
                            let extent = sh.disk.extent(offset, u64::MAX);
                            plan.note_extent(extent.range, extent.is_hole);
                        }
                        Step::Zero(range) => link.send_request(kind::WRITE_ZEROES, Asked::Range(range)),
                        Step::Flush => {
                            self.deadline_ms = sh.now_ms.saturating_add(self.settings.request_limit_ms);
                            link.send_request(kind::FLUSH, Asked::Flush);
                        }
                        Step::Quiesce => {
                            info!("{self}: {} bytes left; pausing clients", plan.progress().left_bytes);
                            sh.effects.push_back(Effect::PauseClients);
                            return Ok(Next::Again);
                        }
                        Step::WaitUntil(at_ms) => {
                            self.wake_ms = Some(at_ms);
                            return Ok(Next::Idle);
                        }
                        Step::Commit => return self.commit(sh),
                        Step::Data(_) | Step::Wait => return Ok(Next::Idle),
                    }
                }
            }
        }
        Ok(Next::Again)
    }

    /// Everything is at the destination and durable there. What happens here happens at once: the file goes, if asked,
    /// and DISC says that the copy counts. From then on there is no way back; where the file goes, from that on.
    fn commit(&mut self, sh: &mut Shared) -> Result<Next, Failure> {
        let Some(link) = &mut self.link else { return Ok(Next::Idle) };
        link.check_quiet()?;
        let unlinks = self.settings.action == Action::Unlink;
        if unlinks {
            let path = sh.disk.path().display();
            sh.disk.unlink().map_err(|error| Failure::Broken(format!("cannot unlink {path}: {error}")))?;
        }
        link.session.disconnect();
        let sent = match link.send(sh) {
            Ok(_) if !link.session.wants_send() => Ok(()),
            Ok(n) => Err(format!("sent only {n} bytes of DISC")),
            Err(error) => Err(format!("cannot send DISC: {error}")),
        };
        match sent {
            Err(why) if !unlinks => return Err(Failure::Broken(why)),
            Err(why) => warn!("{self}: {why}; it has everything, and the file here is gone, so that its copy counts"),
            Ok(()) => {}
        }
        if let Some(link) = &mut self.link {
            link.stage = Stage::Leaving;
        }
        self.deadline_ms = sh.now_ms.saturating_add(LEAVING_MS);
        Ok(Next::Again)
    }

    /// An attempt is over. Before the start, that is the answer; after it, there is another attempt, unless the
    /// destination has been told that its copy counts.
    fn failed(&mut self, why: &Failure, key: Key, sh: &mut Shared) -> Next {
        if !self.may_stop() {
            // It has everything and has been told so: how it goes does not matter.
            return Next::Close(Reason::Migrated);
        }
        if self.starter.is_some() {
            warn!("{self}: not started: {why}");
            return Next::Close(Reason::NotStarted(why.answer().into()));
        }
        if let Some(plan) = sh.life.plan() {
            plan.lost(sh.now_ms);
        }
        sh.effects.push_back(Effect::ResumeClients);
        self.retry(why, key, sh);
        Next::Idle
    }

    fn retry(&mut self, why: &Failure, key: Key, sh: &mut Shared) {
        let attempts = self.attempts;
        match self.failures.pass(sh.now_ms) {
            None => {}
            Some(0) => {
                warn!("{self}: attempt {attempts} failed: {why}; clients go on, the next begins in {RETRY_MS} ms");
            }
            Some(before) => {
                warn!("{self}: attempt {attempts} failed: {why} ({before} more failed since the last line)");
            }
        }
        self.last_error = Some(why.to_string());
        self.drop_link(sh);
        self.deadline_ms = sh.now_ms.saturating_add(RETRY_MS);
        self.arm(key, sh);
    }

    fn drop_link(&mut self, sh: &mut Shared) {
        if let Some(mut link) = self.link.take() {
            link.session.release(&mut sh.pool);
        }
        self.reads.iter_mut().for_each(|(_, range)| *range = None);
        self.wake_ms = None;
    }

    /// Makes sure that this slot is woken when the first of its times comes.
    fn arm_for(&mut self, key: Key, sh: &mut Shared) {
        let pause_ends_ms = sh.life.plan().and_then(|plan| plan.pause_ends_ms());
        self.wake_ms = self.wake_ms.into_iter().chain(pause_ends_ms).min();
        self.arm(key, sh);
    }

    fn arm(&mut self, key: Key, sh: &mut Shared) {
        let at_ms = self.wake_ms.map_or(self.deadline_ms, |wake_ms| wake_ms.min(self.deadline_ms));
        if at_ms < self.armed_ms {
            sh.wheel.arm(at_ms, key);
            self.armed_ms = at_ms;
        }
    }
}

impl fmt::Display for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "migration to {}", self.settings.to)?;
        if !self.settings.export.is_empty() {
            write!(f, " export {:?}", self.settings.export)?;
        }
        Ok(())
    }
}
