//! The mark on the image: when it is set and cleared, and the words of a server that finds one. What marks say is in
//! [`Mark`]; what is durable before what, in the module of it.
//!
//! To set a mark is a call that changes memory; a flush of the disk's queue makes it durable, so that nobody else waits.

use super::config::{Destination, Fatal};
use super::effect::Effect;
use super::life::{Life, ARRIVED, INCOMING, OWN, STAYS};
use super::shared::Shared;
use crate::disk::{Access, Disk};
use crate::migrate::{Mark, Where};
use crate::printable;
use crate::work::{Action, Op};
use log::warn;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// What a server of an image without a mark says when a migration begins.
const UNPROTECTED: &str = "no mark can be set on it (user.flexnbd.state): nothing keeps it from being served when a \
                           migration has made it the wrong image";

/// Lets an image be served that is marked as none to be served only where `adopt` says so, and then clears the mark.
pub(super) fn check(disk: &mut Disk, adopt: bool) -> Result<(), Fatal> {
    let Some(why) = refusal(disk.mark()) else { return Ok(()) };
    let path = disk.path().display().to_string();
    if !adopt {
        return Err(Fatal(format!("cannot serve {path:?}: {why}")));
    }
    if disk.access() == Access::ReadOnly {
        warn!("serving {path:?} as it is, with its mark: {why}");
        return Ok(());
    }
    let cleared = disk.set_mark(None).and_then(|_| disk.sync_mark());
    cleared.map_err(|error| Fatal(format!("cannot serve {path:?}: cannot clear its mark: {error}")))?;
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

impl Shared {
    /// A migration begins that makes the image another server's. False: there can be no mark. An error is a sentence: nothing
    /// has changed.
    pub(super) fn mark_sending(&mut self, to: &Destination) -> Result<bool, String> {
        let can_be = self.set_mark(Some(&Mark::Sends(now_at(to)))).map_err(cannot_mark)?;
        if !can_be {
            warn!("{}: {UNPROTECTED}", self.backend.name());
        }
        Ok(can_be)
    }

    /// The destination has everything, and is told so once this mark is durable. An error is a sentence.
    pub(super) fn mark_moved(&mut self, to: &Destination) -> Result<(), String> {
        self.set_mark(Some(&Mark::Moved(now_at(to)))).map(drop).map_err(cannot_mark)
    }

    /// The image stays here: it may be migrated to `next` again, or is not migrated any more. Where it may be marked as moved,
    /// clients wait until that is durable. To be called before the plan hears of it.
    pub(super) fn keep_image(&mut self, next: Option<&Destination>) {
        let is_marked = self.life.plan().is_some_and(|plan| plan.is_marked());
        if !is_marked && next.is_some() {
            return;
        }
        let sends = next.map(|to| Mark::Sends(now_at(to)));
        let kept = self.set_mark(sends.as_ref()).or_else(|_| self.set_mark(None));
        if !is_marked {
            // What is left then is no mark that refuses.
            return;
        }
        if let Err(error) = kept {
            return self.effects.push_back(Effect::Fail(format!(
                "cannot clear the mark that the image has moved: {error}; it has not, and clients would write what no server \
                 finds again. serve --adopt clears it"
            )));
        }
        self.gate.take_back();
        self.flush(STAYS);
    }

    /// A sender wants to change the image, which is allowed once it is marked.
    pub(super) fn mark_incoming(&mut self) {
        let Life::Receiving { incoming, .. } = &mut self.life else { return };
        if !incoming.wants_mark() {
            return;
        }
        match self.set_mark(Some(&Mark::Incoming)) {
            Ok(true) => self.flush(INCOMING),
            Ok(false) => {
                warn!("{}: {UNPROTECTED}", self.backend.name());
                self.marked_incoming();
            }
            Err(error) => self.effects.push_back(Effect::Fail(cannot_mark(error))),
        }
    }

    /// The sender may change the image.
    pub(super) fn marked_incoming(&mut self) {
        if let Life::Receiving { incoming, .. } = &mut self.life {
            incoming.marked();
        }
    }

    /// The image has arrived and is durable. False: there was no mark that says that it has not.
    pub(super) fn clear_incoming(&mut self) -> io::Result<bool> {
        let was_marked = self.set_mark(None)?;
        if was_marked {
            self.flush(ARRIVED);
        }
        Ok(was_marked)
    }

    fn set_mark(&mut self, mark: Option<&Mark>) -> io::Result<bool> {
        let text = mark.map(ToString::to_string);
        self.backend.disk_mut().map_or(Ok(false), |disk| disk.set_mark(text.as_deref()))
    }

    /// Makes durable what was done until now; the loop takes the completion, which is never dropped.
    pub(super) fn flush(&mut self, tag: u32) {
        let taken = self.backend.submit(Op { owner: OWN, tag, action: Action::Flush });
        debug_assert!(taken.is_ok(), "one sender does not fill the queue, and in a pause it is empty");
    }
}

/// Where the image goes now.
fn now_at(to: &Destination) -> Where {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Where::at(to.to.clone(), since_1970.as_secs())
}

#[allow(clippy::needless_pass_by_value, reason = "as `map_err` calls it")]
fn cannot_mark(error: io::Error) -> String {
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
