//! The deadlines of a connection to another server: when it counts as silent, its machine as gone, and what is given up then.

use super::{Link, SETTLE_MS};
use crate::event::slots::Key;
use crate::server::change::Change;
use crate::server::dial::{Dial, Failure};
use crate::server::effect::Effect;
use crate::server::reason::Next;
use crate::server::shared::Shared;
use log::{error, warn};

impl Link {
    /// A wheel entry has fired.
    pub(in super::super) fn timeout(&mut self, key: Key, sh: &mut Shared) -> Next {
        if !self.alarm.fired(sh.now_ms) {
            return Next::Idle;
        }
        let next = match self.check_deadlines(sh) {
            Ok(()) if self.dial.is_none() && sh.now_ms >= self.retry_ms => Next::Again,
            Ok(()) => Next::Idle,
            Err(why) => self.lost(&why, sh),
        };
        self.arm(key, sh);
        next
    }

    fn check_deadlines(&mut self, sh: &mut Shared) -> Result<(), Failure> {
        if self.change.as_ref().and_then(Change::gives_up_at_ms).is_some_and(|at_ms| at_ms <= sh.now_ms) {
            warn!("{self}: not switched: the server did not finish what it was asked in {SETTLE_MS} ms");
            self.change = None;
            if let Some(standby) = sh.backend.upstream() {
                standby.core.settle(false);
            }
        }
        if self.outage.gives_up(self.settings.give_up_ms, sh.now_ms) {
            let lost = sh.backend.upstream().map_or(0, |standby| standby.core.give_up());
            error!(
                "{self}: the server has been away for too long; clients are cut, {lost} bytes are not written again"
            );
            sh.effects.push_back(Effect::CutClients);
        }
        if self.flush_again_ms.is_some_and(|due_ms| due_ms <= sh.now_ms) {
            self.flush_again_ms = None;
            if let Some(standby) = sh.backend.upstream() {
                standby.core.flush();
            }
        }
        let Some(dial) = &self.dial else { return Ok(()) };
        dial.check_deadline(sh.now_ms)?;
        if self.watch.due_ms().is_some_and(|due_ms| due_ms <= sh.now_ms) {
            let delivery = dial.socket().delivery().unwrap_or_default();
            if self.watch.is_gone(delivery, self.settings.limit_ms, sh.now_ms) {
                let s = delivery.acked_ms_ago / 1000;
                return Err(Failure::Broken(format!("its machine has acknowledged nothing for {s} s")));
            }
        }
        if self.silent_due_ms(sh).is_some_and(|due_ms| due_ms <= sh.now_ms) {
            // Over a slow link, what the kernel here has taken is on its way for long.
            if self.watch.takes_slowly(dial.socket().delivery().unwrap_or_default()) {
                self.progress_ms = sh.now_ms;
                return Ok(());
            }
            let s = self.settings.limit_ms / 1000;
            if self.is_fenced {
                return Err(Failure::Broken(format!("it was silent for {s} s")));
            }
            warn!("{self}: the server has been silent for {s} s; it is waited for, because what it was asked may still happen");
            self.is_silent = true;
        }
        Ok(())
    }

    /// When the server counts as silent.
    fn silent_due_ms(&self, sh: &mut Shared) -> Option<u64> {
        let awaits = self.is_open() && sh.backend.upstream().is_some_and(|standby| standby.core.in_flight() > 0);
        (awaits && !self.is_silent).then(|| self.progress_ms.saturating_add(self.settings.limit_ms))
    }

    pub(super) fn arm(&mut self, key: Key, sh: &mut Shared) {
        let times = [
            self.change.as_ref().and_then(Change::gives_up_at_ms),
            self.dial.as_ref().map_or(Some(self.retry_ms), Dial::deadline_ms),
            self.watch.due_ms(),
            self.silent_due_ms(sh),
            self.outage.gives_up_at_ms(self.settings.give_up_ms),
            self.flush_again_ms,
        ];
        if let Some(at_ms) = times.into_iter().flatten().min() {
            self.alarm.arm(at_ms, key, &mut sh.wheel);
        }
    }
}
