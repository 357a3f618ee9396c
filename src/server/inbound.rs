//! What a listener knows of the migration that comes in: which bytes of the image its sender has written.

use crate::bitmap::Covered;
use crate::proto::server::{Completed, Failed};
use crate::proto::wire::kind;
use std::io::ErrorKind;

/// An inbound migration that is awaited or under way.
#[derive(Debug)]
pub struct Incoming {
    size: u64,
    covered: Covered,
}

impl Incoming {
    /// Awaits an image of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self { size, covered: Covered::new(size) }
    }

    /// A sender has come: nothing of an earlier one counts.
    pub fn begin(&mut self) {
        self.covered.reset();
    }

    /// Notes what the disk has done for the sender. An error of the disk is one this process cannot repair; its text is
    /// why the process ends.
    pub fn note(&mut self, completed: &Completed) -> Result<(), String> {
        let Completed { head, touched, result } = completed;
        match result {
            // Reads and hints lose nothing, and neither does a request that was only too slow to be done.
            Err(Failed { error, .. })
                if head.kind == kind::FLUSH || touched.is_some() && error.kind() != ErrorKind::Unsupported =>
            {
                return Err(format!("the image cannot take the migration: {head} failed: {error}"));
            }
            Err(_) => {}
            Ok(()) => match touched {
                Some(range) if matches!(head.kind, kind::WRITE | kind::WRITE_ZEROES) => {
                    self.covered.note(range.start, range.end - range.start);
                }
                // A TRIM says nothing about what the bytes are now.
                _ => {}
            },
        }
        Ok(())
    }

    /// True when the sender has written every byte.
    pub fn is_complete(&self) -> bool {
        self.covered.is_complete()
    }

    /// True when the sender has written something.
    pub fn has_begun(&self) -> bool {
        self.covered.bytes() > 0
    }

    /// How much of the image the sender has written, for people.
    pub fn describe(&self) -> String {
        format!("{} of {} bytes were written", self.covered.bytes(), self.size)
    }
}
