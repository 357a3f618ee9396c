//! What a request of a sender means for the image it brings: when it goes to the disk, and when it is done.

use crate::migrate::Incoming;
use crate::proto::server::{Completed, Failed};
use crate::proto::wire::kind;
use crate::work::Action;
use std::io::ErrorKind;

/// Notes what goes to the disk for the sender. `alone`: the disk has nothing else to do.
pub(super) fn note_submitted(incoming: &mut Incoming, action: &Action, alone: bool) {
    match action {
        Action::Flush if alone => incoming.note_flush(),
        _ if action.touches().is_some() => incoming.note_change(),
        _ => {}
    }
}

/// Notes what the disk has done for the sender. An error says why the process has to end: it cannot repair a disk that
/// fails.
pub(super) fn note(incoming: &mut Incoming, completed: &Completed) -> Result<(), String> {
    let Completed { head, touched, result, .. } = completed;
    match result {
        Ok(()) if head.kind == kind::FLUSH => incoming.flushed(),
        // A TRIM says nothing about what the bytes are now.
        Ok(()) if !head.writes() => {}
        Ok(()) => touched.iter().for_each(|range| incoming.note(range)),
        // Reads and hints lose nothing, and neither does a request that was only too slow to be done.
        Err(Failed { error, .. })
            if head.kind == kind::FLUSH || touched.is_some() && error.kind() != ErrorKind::Unsupported =>
        {
            return Err(format!("the image cannot take the migration: {head} failed: {error}"));
        }
        Err(_) => {}
    }
    Ok(())
}
