//! The attempts of a migration, counted, and why they have failed.

use super::dial::Failure;

/// What came of the attempts so far.
#[derive(Debug, Default)]
pub(super) struct Trials {
    begun: u32,
    last_error: Option<String>,
}

impl Trials {
    /// Another one begins.
    pub(super) fn begin(&mut self) {
        self.begun += 1;
    }

    /// How many have begun.
    pub(super) fn begun(&self) -> u32 {
        self.begun
    }

    /// Why the last one that failed did, if one has.
    pub(super) fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    /// The last one has failed.
    pub(super) fn failed(&mut self, why: &Failure) {
        self.last_error = Some(why.to_string());
    }
}
