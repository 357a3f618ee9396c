//! The outgoing migration: one more slot of the loop. The [`crate::migrate::Plan`] decides what goes next; this file reads
//! from the disk, sends, takes answers, keeps the deadlines, and tells clients to pause and to go on.
//!
//! ```text
//!  Dialling ─> Copying ─> Committing ─> Leaving ─> done
//!     ^           │            │           └ DISC has gone: there is no way back
//!     │           v            v
//!     └── 1 s ─ no attempt <───┘  once started; a failure before that is answered and ends it
//! ```

mod facts;

use super::attempt::{Asked, Attempt, Stage, Task};
use super::complaints::Complaint;
use super::config::Destination;
use super::dial::{Dial, Failure};
use super::effect::Effect;
use super::life::Life;
use super::mark;
use super::offer;
use super::reason::{Next, Reason};
use super::shared::{Shared, MEMORY_RETRY_MS};
use super::socket::Socket;
use super::trials::Trials;
use crate::buffer::SLICE;
use crate::command::{Answer, Ending};
use crate::event::alarm::Alarm;
use crate::event::slots::Key;
use crate::migrate::{Progress, Step};
use crate::proto::client::{ClientSession, Event};
use crate::proto::export::Offer;
use crate::proto::wire::kind;
use crate::sys::net::Keepalive;
use crate::work::{Action, Done};
use log::{info, log, warn, Level};
use std::fmt;
use std::io;

/// How long after a failure the next attempt begins, in milliseconds.
const RETRY_MS: u64 = 1_000;
/// How long the destination may take to close after DISC, in milliseconds. It has flushed before.
const LEAVING_MS: u64 = 10_000;
/// Memory for data between the disk and the socket, in bytes: four slices, as for a client.
const BUFFERED_MAX: usize = 4 * SLICE;
/// Steps of the plan in one turn: clients come first.
const STEPS_MAX: usize = 64;
/// The smallest image that can be migrated, in bytes; the manual says so.
pub(super) const SIZE_MIN: u64 = 4096;

/// Where to migrate to, and how.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// The server that takes the image.
    pub destination: Destination,
    /// What to do once the destination has everything.
    pub ending: Ending,
    /// Serve the clients that are connected from there, once the destination has everything.
    pub relay: bool,
    /// How long a request may go without progress, in milliseconds.
    pub request_limit_ms: u64,
}

/// The migration.
#[derive(Debug)]
pub(super) struct Mirror {
    settings: Settings,
    /// `None` between two attempts.
    attempt: Option<Attempt>,
    /// Who waits to hear that it has started; `None` once it has.
    starter: Option<Key>,
    trials: Trials,
    started_ms: u64,
    /// When the current stage counts as failed; between two attempts, when the next one begins.
    deadline_ms: u64,
    /// When the plan wants to be asked again.
    wake_ms: Option<u64>,
    alarm: Alarm,
    /// The tag of the last operation. Tags are not reused, so that operations of an earlier attempt are told apart.
    last_tag: u32,
}

impl Mirror {
    /// Marks the image, then begins to connect. The error is what the one who asked is told.
    pub(super) fn start(settings: Settings, starter: Key, key: Key, sh: &mut Shared) -> Result<Self, String> {
        let mut mirror = Self {
            settings,
            attempt: None,
            starter: Some(starter),
            trials: Trials::default(),
            started_ms: sh.now_ms,
            deadline_ms: u64::MAX,
            wake_ms: None,
            alarm: Alarm::default(),
            last_tag: 0,
        };
        if mirror.settings.ending == Ending::Nothing {
            mirror.connect(key, sh).map_err(|why| mirror.not_started(&why))?;
            return Ok(mirror);
        }
        sh.mark_sending(&mirror.settings.destination, key)?;
        Ok(mirror)
    }

    /// The image is marked as one that is sent, unless it can have no mark: then the migration begins.
    fn marked(&mut self, result: io::Result<()>, key: Key, sh: &mut Shared) -> Next {
        match sh.marked_sending(result) {
            Ok(()) => self.connect(key, sh).unwrap_or_else(|why| self.failed(&why, key, sh)),
            Err(error) => Next::Close(Reason::NotStarted(mark::cannot_mark(&error))),
        }
    }

    /// Says why there is no migration; returns what the one who asked for it is told.
    fn not_started(&self, why: &Failure) -> String {
        warn!("{self}: not started: {why}");
        why.answer()
    }

    fn connect(&mut self, key: Key, sh: &mut Shared) -> Result<Next, Failure> {
        self.trials.begin();
        let session = ClientSession::with_cookies(self.settings.destination.export.clone(), sh.gate.own_cookies());
        self.attempt = Some(Attempt::new(Dial::start(&self.settings.destination, Keepalive::PEER, session, key, sh)?));
        self.arm(key, sh);
        Ok(Next::Idle)
    }

    /// Notes what an event says of its socket.
    pub(super) fn note(&mut self, event: &mio::event::Event) {
        if let Some(attempt) = &mut self.attempt {
            attempt.dial.note(event);
        }
    }

    /// Receives answers, then asks the plan what goes next; between two attempts, begins the next when it is time.
    pub(super) fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        let outcome = match &self.attempt {
            Some(_) => self.receive(key, sh).and_then(|came| {
                let next = self.copy(key, sh)?;
                Ok(if came && matches!(next, Next::Idle) { Next::Again } else { next })
            }),
            None if sh.now_ms >= self.deadline_ms => self.connect(key, sh),
            None => Ok(Next::Idle),
        };
        let next = outcome.unwrap_or_else(|why| self.failed(&why, key, sh));
        self.arm(key, sh);
        next
    }

    /// Takes what the disk has done.
    pub(super) fn disk_done(&mut self, done: Done, key: Key, sh: &mut Shared) -> Next {
        if self.trials.begun() == 0 {
            return self.marked(done.result, key, sh);
        }
        let Some(attempt) = &mut self.attempt else {
            done.buffer.into_iter().for_each(|buffer| sh.pool.give(buffer));
            return Next::Idle;
        };
        attempt.disk_done(done, sh).unwrap_or_else(|why| self.failed(&why, key, sh))
    }

    /// Sends once.
    pub(super) fn write_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        let Some(attempt) = self.attempt.as_mut().filter(|attempt| attempt.dial.can_send()) else { return Next::Idle };
        match attempt.dial.send(&mut sh.pool) {
            Ok(0) => Next::Idle,
            Ok(_) => {
                if matches!(attempt.stage, Stage::Committing { .. }) && !attempt.dial.session.wants_send() {
                    attempt.stage = Stage::Leaving;
                    self.leaving(sh);
                }
                // Sending is no sign of life while we wait for the greeting or a FLUSH reply: keep the deadline.
                if self.attempt.as_ref().is_some_and(Attempt::counts_progress) {
                    self.deadline_ms = sh.now_ms.saturating_add(self.settings.request_limit_ms);
                }
                Next::Again
            }
            Err(error) => self.failed(&Failure::Broken(format!("cannot send: {error}")), key, sh),
        }
    }

    /// A wheel entry has fired: something may be due.
    pub(super) fn timeout(&mut self, key: Key, sh: &mut Shared) -> Next {
        if !self.alarm.fired(sh.now_ms) {
            return Next::Idle;
        }
        self.wake_ms = None;
        self.end_pause(sh);
        let next = match self.check_deadline(sh) {
            Ok(next) => next,
            Err(why) => self.failed(&why, key, sh),
        };
        self.arm(key, sh);
        next
    }

    /// Lets clients go on when the destination takes too long to take the rest.
    fn end_pause(&mut self, sh: &mut Shared) {
        let Some(plan) = sh.life.plan() else { return };
        if plan.pause_ends_ms().is_none_or(|end_ms| end_ms > sh.now_ms) {
            return;
        }
        let paused_ms = plan.paused_ms(sh.now_ms);
        warn!("{self}: the destination did not take the rest within {paused_ms} ms; clients go on");
        plan.give_up_pause();
        sh.effects.push_back(Effect::ResumeClients);
    }

    fn check_deadline(&mut self, sh: &mut Shared) -> Result<Next, Failure> {
        let now_ms = sh.now_ms;
        let Some(attempt) = &self.attempt else { return Ok(Next::Again) };
        attempt.dial.check_deadline(now_ms)?;
        if attempt.stage == Stage::Dialling || now_ms < self.deadline_ms {
            return Ok(Next::Again);
        }
        let limit_ms = self.settings.request_limit_ms;
        match attempt.stage {
            Stage::Leaving => {
                warn!("{self}: the destination has everything and does not close; not waiting any longer");
                Ok(Next::Close(Reason::Migrated))
            }
            Stage::Copying if attempt.dial.session.unanswered() == 0 => {
                if let Some(plan) = sh.life.plan().filter(|plan| plan.is_marked()) {
                    let ms = plan.paused_ms(now_ms);
                    warn!("{self}: clients are paused for {ms} ms: the disk here does not make the mark durable");
                }
                self.deadline_ms = now_ms.saturating_add(limit_ms);
                Ok(Next::Again)
            }
            Stage::Dialling | Stage::Copying | Stage::Committing { .. } => {
                Err(Failure::Broken(format!("no progress in {limit_ms} ms")))
            }
        }
    }

    /// True when `socket` is the other end of its own connection.
    pub(super) fn is_other_end(&self, socket: &Socket) -> bool {
        self.attempt.as_ref().is_some_and(|attempt| attempt.dial.is_other_end(socket))
    }

    /// True while it sends requests. One that comes back in any other state belongs to an earlier attempt.
    pub(super) fn sends(&self) -> bool {
        self.attempt.as_ref().is_some_and(|attempt| attempt.stage == Stage::Copying)
    }

    /// The destination is this server: fail, because the copy would dirty itself for ever.
    pub(super) fn met_itself(&mut self, key: Key, sh: &mut Shared) -> Next {
        self.failed(&Failure::Itself, key, sh)
    }

    /// True as long as the migration can be stopped: the copy here still counts.
    pub(super) fn may_stop(&self) -> bool {
        let stage = self.attempt.as_ref().map(|attempt| attempt.stage);
        !matches!(stage, Some(Stage::Leaving | Stage::Committing { unlinked: true }))
    }

    /// Receives once and takes what it means. False: nothing came.
    fn receive(&mut self, key: Key, sh: &mut Shared) -> Result<bool, Failure> {
        let Some(attempt) = &mut self.attempt else { return Ok(false) };
        if !attempt.dial.receive(sh.now_ms)? {
            return Ok(false);
        }
        if attempt.counts_progress() {
            self.deadline_ms = sh.now_ms.saturating_add(self.settings.request_limit_ms);
        }
        loop {
            let Some(attempt) = &mut self.attempt else { return Ok(true) };
            match attempt.dial.next_event()? {
                None => return Ok(true),
                Some(Event::Export(offer)) => self.greeted(offer, key, sh)?,
                Some(Event::Reply { note, error }) => note.answered(error, &self.settings.destination, sh)?,
                // Nothing is read from the destination.
                Some(Event::Data { .. } | Event::Hole { .. } | Event::Extents { .. }) => {}
            }
        }
    }

    fn greeted(&mut self, offer: Offer, key: Key, sh: &mut Shared) -> Result<(), Failure> {
        let size = sh.backend.export().size;
        offer::check_destination(offer, size, self.settings.relay)?;
        let (Some(attempt), Some(plan)) = (&mut self.attempt, sh.life.plan()) else { return Ok(()) };
        let can = offer::abilities_of_destination(offer);
        attempt.stage = Stage::Copying;
        self.deadline_ms = sh.now_ms.saturating_add(self.settings.request_limit_ms);
        plan.begin(can, sh.now_ms);
        if !can.flush {
            warn!("{self}: the destination offers no FLUSH; how durable the copy is, is its own affair");
        }
        info!("{self}: attempt {}: copying {size} bytes", self.trials.begun());
        if let Some(starter) = self.starter.take() {
            sh.effects.push_back(Effect::Answer(starter, Answer::ok("Mirror started")));
        }
        // The plan has its first step ready, and no event will say so.
        sh.effects.push_back(Effect::Run(key));
        Ok(())
    }

    /// Does what the plan says, as far as memory and this turn's share go.
    fn copy(&mut self, key: Key, sh: &mut Shared) -> Result<Next, Failure> {
        let (Some(attempt), Some(plan)) = (&mut self.attempt, sh.life.plan()) else { return Ok(Next::Idle) };
        if attempt.stage != Stage::Copying {
            return Ok(Next::Idle);
        }
        self.wake_ms = None;
        if plan.is_quiescing() {
            if sh.backend.in_flight() > attempt.in_disk() {
                return Ok(Next::WaitDisk);
            }
            plan.quiesced();
        }
        for _ in 0..STEPS_MAX {
            if !sh.backend.has_room() {
                return Ok(Next::WaitDisk);
            }
            let buffered = attempt.buffered();
            if buffered >= BUFFERED_MAX {
                return Ok(Next::Idle);
            }
            // The buffer has to be there before the plan is asked, because a step that the plan has given out has to be done.
            let buffer = if buffered == 0 { sh.pool.take_beyond(SLICE) } else { sh.pool.take(SLICE) };
            let Some(buffer) = buffer else {
                // No data is under way whose completion would bring us back here, so a timer has to.
                self.wake_ms = (buffered == 0).then(|| sh.now_ms.saturating_add(MEMORY_RETRY_MS));
                return Ok(Next::Idle);
            };
            let Some(plan) = sh.life.plan() else { return Ok(Next::Idle) };
            self.last_tag = self.last_tag.wrapping_add(1);
            let step = match plan.next(sh.now_ms) {
                Step::Data(range) => {
                    attempt.read(range, buffer, self.last_tag, key, sh);
                    continue;
                }
                Step::Zero(range) if !plan.can().zero => {
                    attempt.send_zeroes(range, buffer);
                    continue;
                }
                step => step,
            };
            sh.pool.give(buffer);
            match step {
                Step::Look(offset) => {
                    let length = sh.backend.export().size.saturating_sub(offset);
                    let action = Action::Map { offset, length, most: 1 };
                    attempt.submit(action, Task::Look(offset), self.last_tag, key, sh);
                }
                Step::Zero(range) => attempt.ask_for_zeroes(range),
                Step::Flush => {
                    self.deadline_ms = sh.now_ms.saturating_add(self.settings.request_limit_ms);
                    attempt.dial.session.command(kind::FLUSH, 0, 0, 0, Asked::Flush);
                }
                Step::Quiesce => {
                    let left_bytes = plan.progress().left_bytes;
                    info!("{self}: {left_bytes} bytes left; pausing clients");
                    sh.effects.push_back(Effect::PauseClients);
                    return Ok(Next::Again);
                }
                Step::WaitUntil(at_ms) => {
                    self.wake_ms = Some(at_ms);
                    return Ok(Next::Idle);
                }
                Step::Settle => attempt.submit(Action::Flush, Task::Settle, self.last_tag, key, sh),
                Step::Mark => attempt.mark_moved(&self.settings.destination, self.last_tag, key, sh),
                Step::Commit => {
                    attempt.commit(self.settings.ending, sh)?;
                    self.deadline_ms = sh.now_ms.saturating_add(LEAVING_MS);
                    return Ok(Next::Idle);
                }
                Step::WaitForClients => return Ok(Next::WaitDisk),
                Step::Data(_) | Step::Wait => return Ok(Next::Idle),
            }
        }
        Ok(Next::Again)
    }

    /// DISC has gone. Where the image stays here, too, nobody has to wait for what the destination does now.
    fn leaving(&self, sh: &mut Shared) {
        if let (Ending::Nothing, Some(plan)) = (self.settings.ending, sh.life.plan()) {
            plan.release_clients(sh.now_ms);
            sh.effects.push_back(Effect::ResumeClients);
        }
    }

    /// An attempt is over. Before the start, that is the answer; after it, there is another attempt, unless the
    /// destination's copy counts already.
    fn failed(&mut self, why: &Failure, key: Key, sh: &mut Shared) -> Next {
        match self.attempt.as_ref().map(|attempt| attempt.stage) {
            // The destination has everything and has been told so: how the connection ends does not matter.
            Some(Stage::Leaving) => return Next::Close(Reason::Migrated),
            Some(Stage::Committing { unlinked: true }) => {
                warn!("{self}: {why}; it has everything, and the file here is gone, so that its copy counts");
                return Next::Close(Reason::Migrated);
            }
            Some(Stage::Dialling | Stage::Copying | Stage::Committing { unlinked: false }) | None => {}
        }
        if self.starter.is_some() {
            return Next::Close(Reason::NotStarted(self.not_started(why)));
        }
        let begun = self.trials.begun();
        if sh.admission.complaints.may_log(Complaint::FailedAttempt, sh.now_ms) {
            warn!("{self}: attempt {begun} failed: {why}; clients go on, the next begins in {RETRY_MS} ms");
        }
        self.trials.failed(why);
        self.drop_attempt(sh);
        sh.keep_image();
        if let Some(plan) = sh.life.plan() {
            plan.lost(sh.now_ms);
        }
        sh.effects.push_back(Effect::ResumeClients);
        self.deadline_ms = sh.now_ms.saturating_add(RETRY_MS);
        self.arm(key, sh);
        Next::Idle
    }

    fn drop_attempt(&mut self, sh: &mut Shared) {
        if let Some(mut attempt) = self.attempt.take() {
            attempt.dial.session.release(&mut sh.pool);
        }
        self.wake_ms = None;
    }

    /// Makes sure that this slot is woken when the first of its times comes.
    fn arm(&mut self, key: Key, sh: &mut Shared) {
        let dialling_ms = self.attempt.as_ref().and_then(|attempt| attempt.dial.deadline_ms());
        let pause_ends_ms = sh.life.plan().and_then(|plan| plan.pause_ends_ms());
        let times = [dialling_ms.or(Some(self.deadline_ms)), self.wake_ms, pause_ends_ms];
        if let Some(at_ms) = times.into_iter().flatten().min() {
            self.alarm.arm(at_ms, key, &mut sh.wheel);
        }
    }

    /// The migration is over, one way or the other: everybody who waits for it hears so, and clients go on or are done.
    pub(super) fn closed(&mut self, reason: &Reason, sh: &mut Shared) {
        self.drop_attempt(sh);
        if let Some(starter) = self.starter.take() {
            sh.effects.push_back(Effect::Answer(starter, Answer::failed(reason.to_string())));
        }
        let migrated = matches!(reason, Reason::Migrated);
        if let (true, Some(plan)) = (migrated, sh.life.plan()) {
            let Progress { sent_bytes, zeroed_bytes, .. } = plan.progress();
            let pause_ms = plan.paused_ms(sh.now_ms);
            let took_ms = sh.now_ms.saturating_sub(self.started_ms);
            // As loud as the failures were.
            let level = if self.trials.last_error().is_some() { Level::Warn } else { Level::Info };
            log!(
                level,
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
        if migrated && self.settings.relay && sh.admission.clients() > 0 {
            info!("{self}: relaying {} clients", sh.admission.clients());
            sh.relay_to(self.settings.destination.clone());
        } else if migrated && self.settings.ending != Ending::Nothing {
            sh.life = Life::Over;
        } else {
            sh.keep_image();
            sh.life = Life::Serving;
            sh.share_image();
            sh.effects.push_back(Effect::ResumeClients);
        }
    }
}

impl fmt::Display for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "migration to {}", self.settings.destination)
    }
}
