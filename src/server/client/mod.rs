//! One NBD client: its socket, its session, its deadlines (in `deadlines`).

mod deadlines;

use super::complaints::Complaint;
use super::config::Dialect;
use super::effect::Effect;
use super::inbound;
use super::life::{Life, IMAGE, OWN};
use super::quota::Due;
use super::reason::{Next, Reason};
use super::shared::Shared;
use super::socket::{Peer, Received, Socket};
use super::watch::Watch;
use crate::disk;
use crate::event::alarm::Alarm;
use crate::event::slots::Key;
use crate::proto::error::Errno;
use crate::proto::export::{Agreed, Export, SessionName, Style};
use crate::proto::outbox::PIECES_MAX;
use crate::proto::server::request::{Refusal, Request};
use crate::proto::server::{Completed, End, Failed, ServerSession, Step, Tally};
use crate::proto::wire::RequestHead;
use crate::sys;
use crate::work::{Action, Done, Op};
use log::{debug, error, info, warn};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut};
use std::rc::Rc;

/// What a client that has named its session waits for.
#[derive(Debug)]
enum Wait {
    /// For nothing; it may not even have named one.
    Over,
    /// For the end of this turn, when older connections of the name go.
    Turn,
    /// Until the kernel has in hand no operation of these owners, who are gone.
    Disk(Vec<u64>),
}

/// A connected client.
#[derive(Debug)]
pub(super) struct Client {
    id: u64,
    peer: Peer,
    socket: Socket,
    session: ServerSession,
    opened_ms: u64,
    /// The session has no room for its next request: it gets another turn when something is completed or sent.
    stalled: bool,
    /// Since when the gate has kept its next request; that time does not count against the client.
    kept_since_ms: Option<u64>,
    /// How long the gate has kept requests of this client altogether, in milliseconds.
    kept_ms: u64,
    /// When its requests are due where all clients have a quota.
    due: Due,
    wait: Wait,
    watch: Watch,
    alarm: Alarm,
    /// When one of its requests was last complained of.
    warned_ms: Option<u64>,
}

impl Client {
    /// A client that has just been accepted.
    pub(super) fn new(id: u64, socket: Socket, peer: Peer, dialect: Dialect, sh: &Shared) -> Self {
        let export = Export { several: sh.admission.takes_several(), ..sh.backend.export() };
        let mut session = match dialect {
            Dialect::Newstyle => ServerSession::newstyle(export, sh.now_ms),
            Dialect::Oldstyle => ServerSession::oldstyle(export, sh.now_ms),
        };
        session.name_export(Rc::clone(&sh.limits.export_name));
        // A sender asks for durability when it needs it.
        if sh.limits.sync && !sh.life.awaits_image() {
            session.make_durable();
        }
        let client = Self {
            id,
            peer,
            socket,
            session,
            opened_ms: sh.now_ms,
            stalled: false,
            kept_since_ms: None,
            kept_ms: 0,
            due: Due::default(),
            wait: Wait::Over,
            watch: Watch::default(),
            alarm: Alarm::default(),
            warned_ms: None,
        };
        info!("{client}: connected");
        client
    }

    /// Its socket.
    pub(super) fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Who it is.
    pub(super) fn peer(&self) -> Peer {
        self.peer
    }

    /// Its number, in the order of connecting.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// How it speaks, for people.
    pub(super) fn style(&self) -> &'static str {
        match self.session.style() {
            _ if self.session.is_negotiating() => "negotiating",
            Style::Oldstyle => "oldstyle",
            Style::Newstyle(Agreed { structured: true, .. }) => "newstyle-structured",
            Style::Newstyle(_) => "newstyle",
        }
    }

    /// When it connected, in milliseconds of the server's clock.
    pub(super) fn opened_ms(&self) -> u64 {
        self.opened_ms
    }

    /// Requests that are not answered yet.
    pub(super) fn in_flight(&self) -> usize {
        self.session.in_flight()
    }

    /// Since when its oldest request ages that is not wholly answered.
    pub(super) fn oldest_ms(&self) -> Option<u64> {
        self.session.oldest_ms()
    }

    /// What it has had done so far.
    pub(super) fn tally(&self) -> Tally {
        self.session.tally()
    }

    /// Receives once and hands everything understood to the disk.
    pub(super) fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        self.excuse(sh.now_ms);
        self.kept_since_ms = None;
        self.stalled = false;
        self.session.note_time(sh.admission.timings.now_us());
        let mut received = false;
        while sh.backend.has_room() {
            // What is small cannot be refused, so that each client asks for little while memory is short.
            if sys::memory::is_short() && self.session.may_wait() {
                return self.wait_for_memory(key, sh);
            }
            let Some(allowed) = sh.gate.allows(&mut sh.life, sh.now_ms) else {
                self.keep(sh.now_ms);
                return Next::Idle;
            };
            if !self.may_ask(key, sh) {
                self.keep(sh.now_ms);
                if self.socket.hung_up() {
                    return Next::Close(Reason::HungUp);
                }
                // It may have to wait for long, and with many others.
                self.session.park(&mut sh.pool);
                return Next::Idle;
            }
            let step = self.session.next_step(allowed, &mut sh.pool);
            let load = self.session.take_load();
            if !sh.life.awaits_image() {
                sh.gate.quota.charge(&mut self.due, load);
            }
            match step {
                Step::Request(Request { head, action, .. }) if sh.gate.is_own(&head) => {
                    action.into_buffer().into_iter().for_each(|buffer| sh.pool.give(buffer));
                    sh.effects.push_back(Effect::CameBack);
                    return Next::Close(Reason::CameBack);
                }
                // Such a client asks again over another connection, which may be here already: done now, this would be done
                // twice. After a while in which the process was stopped, both are found at once.
                Step::Request(Request { action, .. }) if self.has_left() => {
                    action.into_buffer().into_iter().for_each(|buffer| sh.pool.give(buffer));
                    return Next::Close(Reason::HungUp);
                }
                Step::Request(Request { tag, action, .. }) => {
                    if let Some(range) = action.touches() {
                        sh.gate.passed(&mut sh.life, &range);
                    }
                    if let Life::Receiving { incoming, .. } = &mut sh.life {
                        inbound::note_submitted(incoming, &action, sh.backend.in_flight() == 0);
                    }
                    let taken = sh.backend.submit(Op { owner: key.to_u64(), tag, action });
                    debug_assert!(taken.is_ok(), "it had room");
                }
                Step::Refused(Refusal { head, errno, why }) => {
                    self.warn_of(Complaint::RefusedRequest, &format_args!("refused {head} with {errno}: {why}"), sh);
                }
                // Perhaps nothing of its own is under way whose end would wake it.
                Step::NeedRoom if sh.pool.is_refused() => return self.wait_for_memory(key, sh),
                Step::NeedRoom => {
                    self.stalled = true;
                    return Next::Idle;
                }
                Step::Kept => {
                    self.keep(sh.now_ms);
                    sh.gate.keep(key);
                    sh.mark_incoming();
                    return Next::Idle;
                }
                Step::UnknownExport(name) => {
                    if sh.admission.complaints.may_log(Complaint::UnknownExport, sh.now_ms) {
                        warn!("{self}: asked for an export that is not there: \"{name}\"");
                    }
                }
                Step::Named => {
                    if let Some(next) = self.wait_for_place(key, sh) {
                        return next;
                    }
                }
                Step::NeedBytes if !self.socket.readable() => {
                    self.session.park(&mut sh.pool);
                    return Next::Idle;
                }
                // One receive a turn is the budget.
                Step::NeedBytes if received => return Next::Again,
                Step::NeedBytes => match self.receive(key, sh) {
                    Ok(true) => received = true,
                    Ok(false) => return self.wait_for_memory(key, sh),
                    Err(reason) => return Next::Close(reason),
                },
            }
        }
        Next::WaitDisk
    }

    /// False when its next request has to wait for the quota. A sender has none.
    fn may_ask(&mut self, key: Key, sh: &mut Shared) -> bool {
        if !sh.gate.quota.is_set() || sh.life.awaits_image() {
            return true;
        }
        self.session.upcoming().is_none_or(|load| sh.gate.quota.admits(key, &mut self.due, load, sh.now_ms))
    }

    /// It has named its session, and is answered when nothing of an older connection of that name can happen any more. `None`:
    /// it goes on.
    fn wait_for_place(&mut self, key: Key, sh: &mut Shared) -> Option<Next> {
        match &self.wait {
            Wait::Over => {
                sh.effects.push_back(Effect::Named(key));
                self.wait = Wait::Turn;
                Some(Next::Idle)
            }
            Wait::Turn => Some(Next::Idle),
            Wait::Disk(owners) if sh.backend.flying().iter().any(|owner| owners.contains(owner)) => {
                Some(Next::WaitDisk)
            }
            Wait::Disk(_) => {
                self.wait = Wait::Over;
                self.session.go_on();
                None
            }
        }
    }

    /// Older connections of its session have gone, and these owners of operations with them.
    pub(super) fn await_disk(&mut self, owners: Vec<u64>) {
        self.wait = Wait::Disk(owners);
    }

    /// The image has this size from now on, in bytes.
    pub(super) fn resize(&mut self, size: u64) {
        self.session.resize_export(size);
    }

    /// It has named its session, and there is nothing to serve yet.
    pub(super) fn refuse(&mut self) {
        self.session.refuse();
    }

    /// What it has named its session.
    pub(super) fn session_name(&self) -> Option<SessionName> {
        self.session.name()
    }

    /// The server ends, and a client that has named its session asks again elsewhere: it is told what was not executed, as far
    /// as that goes without waiting. `in_work`: the disk has requests of it in hand.
    pub(super) fn part(&mut self, in_work: bool) {
        if self.session.name().is_none() {
            return;
        }
        self.session.part(in_work);
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let pieces = self.session.to_send(&mut slices);
        // Nobody is left to whom an error would matter.
        let _ = self.socket.send(slices.get(..pieces).unwrap_or_default());
    }

    /// True when it has named its session and closed this connection of it.
    fn has_left(&self) -> bool {
        self.session.name().is_some() && self.socket.closed_by_peer()
    }

    /// Receives once. False: there was no memory to receive into.
    fn receive(&mut self, key: Key, sh: &mut Shared) -> Result<bool, Reason> {
        let spaces = self.session.recv_space(&mut sh.pool);
        if spaces.iter().all(|space| space.is_empty()) {
            return Ok(false);
        }
        match self.socket.receive(&mut spaces.map(IoSliceMut::new)).map_err(Reason::Socket)? {
            Received::End => {
                self.session.end_of_stream().map_err(Reason::Violation)?;
                // A sender that has closed its side completes no migration. It must not keep the next sender out until
                // the disk is done with what it asked for.
                if matches!(sh.life, Life::Receiving { .. }) {
                    return Err(Reason::End(End::EndOfStream));
                }
            }
            Received::Nothing => {}
            Received::Bytes(n) => {
                self.session.received(n, sh.now_ms);
                if let Some(limit_ms) = sh.limits.killswitch_ms {
                    self.arm(sh.now_ms.saturating_add(limit_ms), key, sh);
                }
            }
        }
        Ok(true)
    }

    /// Takes a completion. The data goes out in the write step of the same turn.
    pub(super) fn disk_done(&mut self, done: Done, sh: &mut Shared) -> Next {
        self.session.note_time(sh.admission.timings.now_us());
        let completed = self.session.complete(done, &mut sh.pool);
        if let Some(Completed { head, took: Some(took), .. }) = &completed {
            sh.admission.timings.note(head.kind, *took);
        }
        if let (Life::Receiving { incoming, .. }, Some(completed)) = (&mut sh.life, &completed) {
            if let Err(why) = inbound::note(incoming, completed) {
                sh.effects.push_back(Effect::Fail(why));
            }
        }
        if let Some(Completed { head, result: Err(Failed { error, errno, violation }), .. }) = completed {
            self.tell_failure(&head, &error, errno, sh);
            if let Some(violation) = violation {
                return Next::Close(Reason::Violation(violation));
            }
        }
        self.unless_stalled()
    }

    /// Nothing to do, unless it waits for room that there may be now.
    fn unless_stalled(&self) -> Next {
        if self.stalled {
            Next::Again
        } else {
            Next::Idle
        }
    }

    /// Sends once, as many replies as wait.
    pub(super) fn write_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        if self.session.wants_send() && self.socket.writable() {
            if let Err(error) = self.send(key, sh) {
                return Next::Close(Reason::Socket(error));
            }
            let more = self.session.wants_send() && self.socket.writable();
            if more || self.stalled {
                return Next::Again;
            }
        }
        match (self.session.finished(), &sh.life) {
            (None, _) | (Some(_), Life::Sealing { .. }) => Next::Idle,
            (Some(End::Disconnect), Life::Receiving { incoming, .. }) if incoming.is_complete() => {
                sh.life.seal(key);
                // The loop takes the completion, because it has to be taken even if this slot is gone by then.
                let taken = sh.backend.submit(Op { owner: OWN, tag: IMAGE, action: Action::Flush });
                debug_assert!(taken.is_ok(), "one sender does not fill the queue");
                Next::Idle
            }
            (Some(end), _) => Next::Close(Reason::End(end)),
        }
    }

    fn send(&mut self, key: Key, sh: &mut Shared) -> io::Result<()> {
        let mut slices = [IoSlice::new(&[]); PIECES_MAX];
        let pieces = self.session.to_send(&mut slices);
        let slices = slices.get(..pieces).unwrap_or_default();
        let sent = self.socket.send(slices)?;
        self.session.sent(sent, &mut sh.pool);
        self.watch.note_sent(sh.now_ms);
        self.arm_watch(key, sh);
        Ok(())
    }

    /// Says why it went and gives its memory back.
    pub(super) fn closed(&mut self, reason: &Reason, sh: &mut Shared) {
        let tally = self.session.tally();
        let seconds = sh.now_ms.saturating_sub(self.opened_ms) / 1000;
        let Tally { reads, writes, errors, .. } = tally;
        let did = format_args!("{reads} reads, {writes} writes, {errors} errors, {seconds} s");
        // Whoever only looks whether somebody listens goes as it likes.
        let has_asked = tally != Tally::default() || self.session.in_flight() > 0;
        let only_looked = !has_asked && reason.is_leaving() || !self.session.has_received();
        if reason.is_orderly() || only_looked {
            info!("{self}: closed: {reason}, {did}");
        } else if sh.admission.complaints.may_log(Complaint::BadEnd, sh.now_ms) {
            warn!("{self}: closed: {reason}, {did}");
        }
        let is_sender = !matches!(reason, Reason::End(End::NotYet));
        if let (Life::Receiving { incoming, .. }, true) = (&sh.life, is_sender) {
            sh.gate.sender_left();
            let what = format!("this was no complete migration: {}; waiting for a sender", incoming.describe());
            if !incoming.has_begun() {
                info!("{self}: {what}");
            } else if sh.admission.complaints.may_log(Complaint::IncompleteMigration, sh.now_ms) {
                warn!("{self}: {what}");
            }
        }
        sh.admission.client_left(tally);
        self.session.release(&mut sh.pool);
    }

    /// Says that a request has failed. Who hears that zeroes are not to be had fast writes them, and nothing is wrong.
    fn tell_failure(&mut self, head: &RequestHead, error: &io::Error, errno: Errno, sh: &mut Shared) {
        let why = disk::explain(error);
        let what = format_args!("{head} failed: {why}; answered {errno}");
        let of = match errno {
            Errno::NotSup => return debug!("{self}: {what}"),
            Errno::NoSpc => Complaint::DiskFull,
            Errno::Io => Complaint::DiskError,
            _ => return self.warn_of(Complaint::FailedRequest, &what, sh),
        };
        if sh.admission.complaints.may_log(of, sh.now_ms) {
            error!("{self}: {what}");
        }
    }

    /// Complains of one of its requests.
    fn warn_of(&mut self, of: Complaint, what: &dyn fmt::Display, sh: &mut Shared) {
        if sh.admission.complaints.may_log_again(of, &mut self.warned_ms, sh.now_ms) {
            warn!("{self}: {what}");
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "client {} {}", self.id, self.peer)
    }
}
