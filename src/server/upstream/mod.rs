//! The connection to another server that has the image: one more slot of the loop. It is made, lost and made again, while
//! what that server owes stays in the backend ([`Standby`]); that decides what is asked, this file sends it, takes the
//! answers, judges greetings and keeps the deadlines.
//!
//! ```text
//!              accepted
//!  Dialling ────────────> in use ──> lost, or given up for another server
//!     ^                                │
//!     └──── 0, 0.1, 0.2 ... 3 s ───────┘
//! ```

mod deadlines;

use super::backend::Standby;
use super::change::{Change, Settings};
use super::config::Destination;
use super::dial::{Dial, Failure};
use super::effect::Effect;
use super::offer::{self, Weight};
use super::outage::Outage;
use super::reason::Next;
use super::shared::Shared;
use super::watch::Watch;
use crate::event::alarm::Alarm;
use crate::event::slots::Key;
use crate::proto::client::{ClientSession, Event, Wishes};
use crate::proto::export::{Offer, SessionName};
use crate::proto::wire::extent;
use crate::sys;
use crate::sys::net::Keepalive;
use crate::upstream::{Asked, Replay};
use log::{info, warn};
use std::fmt;

/// How often what the server sends is received in one turn: clients come first.
const RECEIVES_MAX: usize = 16;
/// How long unanswered requests may go without progress when the server is changed, in milliseconds.
const SETTLE_MS: u64 = 10_000;
/// When a FLUSH of this side's own has failed, the next one goes so much later, in milliseconds.
const FLUSH_AGAIN_MS: u64 = 10_000;

/// The connection, and what is known of the server.
#[derive(Debug)]
pub(super) struct Link {
    settings: Settings,
    /// By this name a server knows that a new connection takes the place of an older one.
    session: SessionName,
    /// `None` between two attempts.
    dial: Option<Dial<Asked>>,
    /// Where the attempt goes that is under way, or the connection that is in use.
    current: Destination,
    /// What was agreed on in this connection.
    style: &'static str,
    /// The server ends an older connection of this session before it greets a new one.
    is_fenced: bool,
    /// When the next attempt begins.
    retry_ms: u64,
    /// When anything has moved last while something was awaited.
    progress_ms: u64,
    is_silent: bool,
    outage: Outage,
    /// When a FLUSH that has failed is tried again.
    flush_again_ms: Option<u64>,
    change: Option<Change>,
    watch: Watch,
    alarm: Alarm,
}

impl Link {
    /// The first attempt begins with the next turn.
    pub(super) fn new(settings: Settings, now_ms: u64) -> Self {
        let random = (u128::from(sys::random()) << 64) | u128::from(sys::random());
        Self {
            current: settings.server.clone(),
            settings,
            session: SessionName(random.to_be_bytes()),
            dial: None,
            style: "unknown",
            is_fenced: false,
            retry_ms: now_ms,
            progress_ms: now_ms,
            is_silent: false,
            outage: Outage::begin(now_ms),
            flush_again_ms: None,
            change: None,
            watch: Watch::default(),
            alarm: Alarm::default(),
        }
    }

    /// Notes what an event says of its socket.
    pub(super) fn note(&mut self, event: &mio::event::Event) {
        self.dial.iter_mut().for_each(|dial| dial.note(event));
    }

    /// True while the connection is in use.
    pub(super) fn is_open(&self) -> bool {
        self.dial.as_ref().is_some_and(Dial::is_open)
    }

    /// The server, or the one that is being tried.
    pub(super) fn server(&self) -> &Destination {
        &self.current
    }

    /// True when an attempt at each of its addresses has failed since it was last of use.
    pub(super) fn has_tried_all(&self) -> bool {
        let failed = self.outage.attempts().saturating_sub(self.dial.is_some().into());
        failed as usize > self.settings.others.len()
    }

    /// How the server speaks, for people.
    pub(super) fn style(&self) -> &'static str {
        self.style
    }

    /// When the server was there, and when it was not.
    pub(super) fn outage(&self) -> &Outage {
        &self.outage
    }

    /// What it is doing, in one word.
    pub(super) fn state(&self, standby: &Standby) -> &'static str {
        match (&self.change, self.is_open()) {
            (Some(Change::Now { .. }), _) => "switching",
            (_, true) if standby.core.is_replaying() => "replaying",
            (_, true) if self.is_silent => "silent",
            (_, true) => "connected",
            (_, false) if self.outage.is_refused() => "refused",
            (_, false) => "connecting",
        }
    }

    /// Receives what the server says; between two connections, begins the next when it is time.
    pub(super) fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        let outcome = match &self.dial {
            Some(_) => self.receive(sh),
            None if sh.now_ms >= self.retry_ms => self.connect(key, sh),
            None => Ok(Next::Idle),
        };
        let next = outcome.unwrap_or_else(|why| self.lost(&why, sh));
        self.arm(key, sh);
        next
    }

    fn connect(&mut self, key: Key, sh: &mut Shared) -> Result<Next, Failure> {
        let other = match &self.change {
            // The two take turns, the new one first.
            Some(Change::WhenLost { to }) if self.outage.attempts() % 2 == 0 => Some(to),
            _ => None,
        };
        self.current = other.unwrap_or(&self.settings.server).clone();
        self.outage.note_attempt();
        let wishes = Wishes { structured: true, session: Some(self.session) };
        let session = ClientSession::with_wishes(self.current.export.clone(), wishes);
        self.dial = Some(Dial::start(&self.current, Keepalive::UPSTREAM, session, key, sh)?);
        Ok(Next::Idle)
    }

    fn receive(&mut self, sh: &mut Shared) -> Result<Next, Failure> {
        for _ in 0..RECEIVES_MAX {
            let Some(dial) = &mut self.dial else { return Ok(Next::Idle) };
            if !dial.receive(sh.now_ms)? {
                return Ok(Next::Idle);
            }
            self.progress(sh.now_ms);
            self.take_events(sh)?;
        }
        Ok(Next::Again)
    }

    fn take_events(&mut self, sh: &mut Shared) -> Result<(), Failure> {
        let Some(standby) = sh.backend.upstream() else { return Ok(()) };
        let was_replaying = standby.core.is_replaying();
        loop {
            let Some(dial) = &mut self.dial else { return Ok(()) };
            let Some(event) = dial.next_event()? else { break };
            match event {
                Event::Export(offer) => self.greeted(offer, sh.admission.clients() > 0, standby, sh.now_ms)?,
                Event::Data { note, offset, bytes } => standby.core.data(*note, offset, bytes),
                Event::Hole { note, offset, length } => {
                    standby.core.hole(*note, &(offset..offset.saturating_add(length.into())));
                }
                Event::Extents { note, descriptors } => {
                    for found in descriptors {
                        let is_hole = found.flags & extent::HOLE_ZERO == extent::HOLE_ZERO;
                        standby.core.extent(*note, found.length.into(), is_hole);
                    }
                }
                Event::Reply { note, error } => {
                    standby.core.reply(note, error).map_err(offer::broken)?;
                    self.outage.note_reply(standby.core.has_done());
                }
            }
        }
        if self.is_open() && (was_replaying || self.outage.is_on()) && !standby.core.is_replaying() {
            self.recovered(standby, sh.now_ms);
        }
        Ok(())
    }

    /// Judges what the server offers, and opens the connection for what is owed.
    fn greeted(&mut self, offer: Offer, has_clients: bool, to: &mut Standby, now_ms: u64) -> Result<(), Failure> {
        // Nobody relies on what was told before, and nothing of it is kept.
        let is_free = to.export.size == 0 || (!has_clients && to.core.is_empty() && to.core.dirty_bytes() == 0);
        let export = offer::export(offer);
        if is_free {
            to.export = export;
            if !export.flushes && !export.read_only {
                warn!(
                    "{self}: the server offers no FLUSH: nothing is known to be durable, and what it forgets is lost"
                );
            }
        } else {
            offer::check(export, to.export)?;
        }
        let is_newstyle = self.dial.as_ref().is_some_and(|dial| dial.session.is_newstyle());
        self.style = if is_newstyle { "newstyle" } else { "oldstyle" };
        self.is_fenced = offer.agreed.session.is_some();
        to.name = self.current.to.to_string();
        to.core.connected(offer::abilities(offer));
        self.settings.use_server(&self.current);
        if matches!(&self.change, Some(Change::WhenLost { to }) if *to == self.current) {
            self.change = None;
        }
        self.progress(now_ms);
        Ok(())
    }

    /// Sends what the backend wants to ask, as much as the socket takes.
    pub(super) fn write_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        let Some(dial) = &mut self.dial else { return Next::Idle };
        if dial.is_open() {
            if let Some(standby) = sh.backend.upstream() {
                if standby.core.in_flight() == 0 {
                    self.progress_ms = sh.now_ms;
                }
                while let Some(command) = standby.core.next_command() {
                    offer::ask(&mut dial.session, command);
                }
            }
        }
        let mut next = Next::Idle;
        if dial.can_send() {
            match dial.send(&mut sh.pool) {
                Ok(sent) => {
                    if sent > 0 {
                        self.watch.note_sent(sh.now_ms);
                    }
                    // The server takes what is large bit by bit; a small request fits the socket whoever is there.
                    if sent > 0 && dial.session.wants_send() && !self.is_silent {
                        self.progress_ms = sh.now_ms;
                    }
                    if dial.can_send() {
                        next = Next::Again;
                    }
                }
                Err(error) => next = self.lost(&Failure::Broken(format!("cannot send: {error}")), sh),
            }
        }
        if let Some(done) = self.change_when_settled(sh) {
            next = done;
        }
        if self.flush_again_ms.is_none() && sh.backend.upstream().is_some_and(|to| to.core.has_failed_to_flush()) {
            warn!("{self}: a FLUSH of this side's own has failed; the next one goes in {FLUSH_AGAIN_MS} ms");
            self.flush_again_ms = Some(sh.now_ms.saturating_add(FLUSH_AGAIN_MS));
        }
        self.arm(key, sh);
        next
    }

    fn progress(&mut self, now_ms: u64) {
        self.progress_ms = now_ms;
        if let Some(Change::Now { give_up_ms, .. }) = &mut self.change {
            *give_up_ms = now_ms.saturating_add(SETTLE_MS);
        }
        if std::mem::take(&mut self.is_silent) {
            // As loud as what it ends.
            warn!("{self}: the server answers again");
        }
    }

    /// The server is there, and has what it had.
    fn recovered(&mut self, standby: &Standby, now_ms: u64) {
        if let Some(took_ms) = self.outage.end(now_ms) {
            warn!(
                "{self}: connected again after {}.{:03} s; {} bytes written again in all, {} requests wait",
                took_ms / 1000,
                took_ms % 1000,
                standby.core.counts().replayed_bytes,
                standby.core.len()
            );
        } else {
            info!("{self}: connected");
        }
    }

    /// The connection is of no use any more: what is not answered will be asked again over the next one.
    fn lost(&mut self, why: &Failure, sh: &mut Shared) -> Next {
        let was_open = self.is_open();
        if let Some(dial) = &self.dial {
            // What is on its way there will be asked again, and must not be done twice.
            dial.socket().reset_at_close();
        }
        self.drop_dial(sh);
        let Some(standby) = sh.backend.upstream() else { return Next::Idle };
        standby.core.lost();
        let why = offer::describe(why);
        if self.outage.begin_again(was_open, sh.now_ms) {
            let waiting = standby.core.len();
            let kept = standby.core.dirty_bytes();
            warn!("{self}: lost: {why}; {waiting} requests wait, {kept} bytes are kept to be written again");
        } else {
            // Before clients were told anything, the start fails and says why.
            let count = if standby.export.size > 0 { self.outage.count(&why.text) } else { 0 };
            why.tell(self, count);
            self.settings.next_address();
        }
        self.outage.note_failure(why.text, why.weight == Weight::Refusal);
        if was_open && standby.core.replay() == Replay::Nothing {
            sh.effects.push_back(Effect::CutClients);
        }
        if let Some(to) = self.change.as_ref().and_then(Change::now).cloned() {
            // There is nobody who could finish anything; the other server is asked.
            standby.core.settle(false);
            self.turn_to(to, sh.now_ms);
            return Next::Again;
        }
        let wait_ms = self.outage.wait_ms(sys::random());
        self.retry_ms = sh.now_ms.saturating_add(wait_ms);
        if wait_ms == 0 {
            Next::Again
        } else {
            Next::Idle
        }
    }

    fn drop_dial(&mut self, sh: &mut Shared) {
        if let Some(mut dial) = self.dial.take() {
            dial.session.release(&mut sh.pool);
        }
        self.watch = Watch::default();
        self.is_silent = false;
        self.is_fenced = false;
    }

    /// Changes to another server: now, or when the connection to this one has ended.
    pub(super) fn change(&mut self, to: Destination, when_lost: bool, sh: &mut Shared) -> Result<(), &'static str> {
        if let Some(Change::Now { .. }) = self.change {
            return Err("already switching");
        }
        let Some(standby) = sh.backend.upstream() else { return Ok(()) };
        if when_lost {
            info!("{self}: {to} is tried, too, when this connection ends");
            self.change = Some(Change::WhenLost { to });
        } else if self.is_open() {
            info!("{self}: switching to {to}");
            standby.core.settle(true);
            self.change = Some(Change::Now { to, give_up_ms: sh.now_ms.saturating_add(SETTLE_MS) });
        } else {
            // Nobody is there to be asked; what it owes is asked of the other.
            info!("{self}: switching to {to}");
            self.drop_dial(sh);
            self.turn_to(to, sh.now_ms);
        }
        Ok(())
    }

    fn turn_to(&mut self, to: Destination, now_ms: u64) {
        self.change = None;
        self.settings.use_server(&to);
        self.current = to;
        self.retry_ms = now_ms;
        self.outage.restart();
    }

    /// Goes over to the other server when this one owes nothing any more.
    fn change_when_settled(&mut self, sh: &mut Shared) -> Option<Next> {
        let to = self.change.as_ref().and_then(Change::now).cloned()?;
        if self.is_open() && !sh.backend.upstream()?.core.is_settled() {
            return None;
        }
        self.leave(sh);
        self.drop_dial(sh);
        let standby = sh.backend.upstream()?;
        standby.core.lost();
        standby.core.settle(false);
        self.turn_to(to, sh.now_ms);
        self.outage.begin_again(true, sh.now_ms);
        Some(Next::Again)
    }

    /// Says goodbye, if the socket takes it at once: the server ends when it has this, or when the connection has closed.
    pub(super) fn leave(&mut self, sh: &mut Shared) {
        if let Some(dial) = self.dial.as_mut().filter(|dial| dial.is_open() && !dial.session.wants_send()) {
            dial.session.disconnect();
            let _ = dial.send(&mut sh.pool);
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "upstream {}", self.current)
    }
}
