//! What the status says of a migration.

use super::Mirror;
use crate::migrate::Plan;
use crate::server::attempt::Stage;
use crate::server::config::Destination;
use crate::server::trials::Trials;

impl Mirror {
    /// Where it goes.
    pub(in super::super) fn destination(&self) -> &Destination {
        &self.settings.destination
    }

    /// What it is doing, in one word.
    pub(in super::super) fn phase(&self, plan: &Plan) -> &'static str {
        match &self.attempt {
            Some(attempt) => attempt.phase(plan),
            None if self.starter.is_some() => "connecting",
            None => "retrying",
        }
    }

    /// True when the destination offers no FLUSH, so that only it knows how durable the copy is.
    pub(in super::super) fn lacks_flush(&self, plan: &Plan) -> bool {
        self.attempt.as_ref().is_some_and(|attempt| attempt.stage != Stage::Dialling && !plan.can().flush)
    }

    /// Its attempts.
    pub(in super::super) fn trials(&self) -> &Trials {
        &self.trials
    }

    /// When it was asked for.
    pub(in super::super) fn started_ms(&self) -> u64 {
        self.started_ms
    }

    /// For how long the destination has owed an answer and given no sign of life, in milliseconds.
    pub(in super::super) fn stalled_ms(&self, now_ms: u64) -> u64 {
        let Some(attempt) = &self.attempt else { return 0 };
        if attempt.stage != Stage::Copying || attempt.dial.session.unanswered() == 0 {
            return 0;
        }
        now_ms.saturating_sub(self.deadline_ms.saturating_sub(self.settings.request_limit_ms))
    }
}
