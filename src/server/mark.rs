//! The mark on the image: when it is set and cleared, and the words of a server that finds one. What marks say is in
//! [`Mark`]; what is durable before what, in the module of it.
//!
//! All changes of the mark go through the queue of the disk, but for the one at the start, so that nobody else waits.

use super::config::{Destination, Fatal};
use super::effect::Effect;
use super::life::{Life, ARRIVED, ENDED, IMAGE, INCOMING, OWN, STAYS};
use super::shared::Shared;
use crate::disk::{Access, Disk};
use crate::event::slots::Key;
use crate::migrate::{Mark, Where};
use crate::printable;
use log::warn;
use std::io::{self, ErrorKind};
use std::time::{SystemTime, UNIX_EPOCH};

/// Lets an image be served that is marked as none to be served only where `adopt` says so, and then clears the mark.
pub(super) fn check(disk: &Disk, adopt: bool) -> Result<(), Fatal> {
    let Some(why) = refusal(disk.mark()) else { return Ok(()) };
    let path = disk.path().display().to_string();
    if !adopt {
        return Err(Fatal(format!("cannot serve {path:?}: {why}")));
    }
    if disk.access() == Access::ReadOnly {
        warn!("serving {path:?} as it is, with its mark: {why}");
        return Ok(());
    }
    disk.clear_mark().map_err(|error| Fatal(format!("cannot serve {path:?}: cannot clear its mark: {error}")))?;
    warn!("adopted {path:?} and cleared its mark: {why}");
    Ok(())
}

/// Why an image is not to be served, and what to do.
fn refusal(mark: io::Result<Option<Vec<u8>>>) -> Option<String> {
    let text = match mark {
        Ok(mark) => mark?,
        Err(error) => {
            return Some(format!(
            "its mark user.flexnbd.state cannot be read: {error}; --adopt serves it all the same and clears the mark"
        ))
        }
    };
    Some(match Mark::parse(&text) {
        Some(Mark::Sends(_)) => return None,
        Some(Mark::Moved(Where { to, time })) => format!(
            "the image has moved to {} at {time}, and what is here is old; serve it there. If it never arrived there, \
             --adopt serves this one and clears the mark",
            printable::escape(to.to_string().chars())
        ),
        Some(Mark::Incoming) => "a migration into it has begun and is not known to be complete, so that it may be a part of \
                                 an image; let listen take it again. If the source says that the image has moved here, \
                                 --adopt serves it and clears the mark"
            .into(),
        None => format!(
            "its mark user.flexnbd.state is \"{}\", which means nothing to this version; --adopt serves it all the same \
             and clears the mark",
            printable::escape(String::from_utf8_lossy(&text).chars())
        ),
    })
}

/// The mark of an image of which the destination has everything.
pub(super) fn moved(to: &Destination) -> String {
    Mark::Moved(now_at(to)).to_string()
}

/// Where the image goes now.
fn now_at(to: &Destination) -> Where {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Where::at(to.to.clone(), since_1970.as_secs())
}

impl Shared {
    /// A migration begins that makes the image another server's. The first completion of its slot says what came of the mark.
    pub(super) fn mark_sending(&mut self, to: &Destination, mirror: Key) -> Result<(), &'static str> {
        let mark = Mark::Sends(now_at(to)).to_string();
        let taken = self.backend.submit_mark(mirror.to_u64(), 0, Some(mark), false);
        taken.then_some(()).ok_or("the disk has too much to do; try again")
    }

    /// That has ended. An error: the migration cannot begin.
    pub(super) fn marked_sending(&mut self, result: io::Result<()>) -> io::Result<()> {
        if let (true, Some(plan)) = (self.is_set(result)?, self.life.plan()) {
            plan.mark_at_end();
        }
        Ok(())
    }

    /// Whether a mark is set. If there can be none, that has been said.
    fn is_set(&self, result: io::Result<()>) -> io::Result<bool> {
        match result {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                warn!(
                    "{}: no mark can be set on it (user.flexnbd.state): nothing keeps it from being served when a migration \
                     has made it the wrong image",
                    self.backend.name()
                );
                Ok(false)
            }
            result => result.map(|()| true),
        }
    }

    /// True unless the image has no mark for certain.
    fn is_marked(&self) -> bool {
        self.backend.disk().is_some_and(|disk| !matches!(disk.mark(), Ok(None)))
    }

    /// No attempt to migrate the image has come to its end. If it may be marked as moved, clients wait until that is gone for
    /// good. To be called before the plan hears of it.
    pub(super) fn keep_image(&mut self) {
        let is_marked = self.life.plan().is_some_and(|plan| plan.is_marked());
        if self.backend.submit_mark(OWN, if is_marked { STAYS } else { ENDED }, None, is_marked) && is_marked {
            self.gate.take_back();
        }
    }

    /// A sender wants to change the image, which is allowed once it is marked.
    pub(super) fn mark_incoming(&mut self) {
        if let Life::Receiving { incoming, .. } = &mut self.life {
            if incoming.wants_mark() {
                let taken = self.backend.submit_mark(OWN, INCOMING, Some(Mark::Incoming.to_string()), true);
                debug_assert!(taken, "one sender does not fill the queue");
            }
        }
    }

    /// A change of the mark of its own has ended, or a flush. True: a received image is durable, and so is that it is one.
    pub(super) fn flushed(&mut self, tag: u32, result: io::Result<()>) -> Result<bool, Fatal> {
        match tag {
            INCOMING => {
                self.is_set(result).map_err(|error| Fatal(cannot_mark(&error)))?;
                if let Life::Receiving { incoming, .. } = &mut self.life {
                    incoming.marked();
                }
            }
            IMAGE => {
                result.map_err(|error| Fatal(format!("cannot make the migrated image durable: {error}")))?;
                let taken = self.backend.submit_mark(OWN, ARRIVED, None, true);
                debug_assert!(taken, "one sender does not fill the queue");
            }
            ARRIVED => match result {
                Err(error) if error.kind() != ErrorKind::Unsupported || self.is_marked() => {
                    return Err(Fatal(format!(
                        "the image is here and durable, but the mark that it is not cannot be cleared: {error}; serve --adopt \
                         does that"
                    )));
                }
                _ => return Ok(true),
            },
            STAYS => {
                // Where only the sync has failed, no FLUSH succeeds any more, so that no client is promised anything that
                // would be lost with the image.
                if let (Err(error), true) = (result, self.is_marked()) {
                    return Err(Fatal(format!(
                        "cannot clear the mark that the image has moved: {error}; it has not, and what clients wrote would be \
                         found nowhere. serve --adopt clears it"
                    )));
                }
                self.gate.taken_back();
                self.effects.push_back(Effect::ResumeClients);
            }
            // A mark that stays after a migration that has ended is none that refuses.
            _ => {}
        }
        Ok(false)
    }
}

/// The sentence for whoever has asked.
pub(super) fn cannot_mark(error: &io::Error) -> String {
    format!("cannot mark the image (user.flexnbd.state): {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_says_why_it_refuses_an_image_in_one_line() {
        let refuses = |text: &[u8]| refusal(Ok(Some(text.to_vec())));
        assert_eq!(refusal(Ok(None)), None);
        assert_eq!(refuses(b"sends 10.0.0.2:4779 2026-11-30T08:15:00Z"), None);
        for (text, part) in [
            (&b"moved 10.0.0.2:4779 2026-11-30T08:15:00Z"[..], "moved to 10.0.0.2:4779 at 2026-11-30T08:15:00Z"),
            (b"moved /run/\x1b[2J\n.nbd 2026-11-30T08:15:00Z", "/run/\\u001b[2J\\n.nbd"),
            (b"incoming", "a migration into it has begun"),
            (b"gone\nF: forged\x1b[2J\xff", "is \"gone\\nF: forged\\u001b[2J\u{fffd}\""),
            (b"", "is \"\""),
        ] {
            let why = refuses(text).unwrap();
            assert!(why.contains(part) && why.contains("--adopt") && !why.contains(char::is_control), "{why}");
        }
        assert!(refusal(Err(io::Error::other("it is odd"))).unwrap().contains("cannot be read: it is odd"));
    }
}
