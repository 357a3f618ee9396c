//! What another server offers: whether it is the one that clients know, what it can be asked and how.

use super::dial::Failure;
use crate::migrate;
use crate::proto::client::ClientSession;
use crate::proto::error::Errno;
use crate::proto::export::{Export, Offer};
use crate::proto::wire::{command, kind, transmission};
use crate::upstream::{Abilities, Asked, Command, Fault, What};
use log::{debug, error, warn};
use std::fmt;

/// The longest range of one command, in bytes, for a server that cannot say what it takes.
const LENGTH_MAX: u32 = 32 << 20;

/// What clients are told of a server that offers this.
pub(super) fn export(offer: Offer) -> Export {
    Export {
        size: offer.size,
        read_only: offer.has(transmission::READ_ONLY),
        flushes: offer.has(transmission::SEND_FLUSH),
        several: true,
    }
}

/// Fails unless clients who were `told` something else can go on with this export.
pub(super) fn check(export: Export, told: Export) -> Result<(), Failure> {
    if export.size != told.size {
        Err(Failure::Size { remote: export.size, local: told.size })
    } else if export.read_only && !told.read_only {
        Err(Failure::ReadOnly)
    } else if told.flushes && !export.flushes {
        Err(Failure::Unfit("it offers no FLUSH any more, which clients were told it does".into()))
    } else {
        Ok(())
    }
}

/// Fails unless an image of `size` bytes can be sent to a server that offers this, and its clients served from there if it is
/// to be `relayed`.
pub(super) fn check_destination(offer: Offer, size: u64, relayed: bool) -> Result<(), Failure> {
    if offer.size != size {
        Err(Failure::Size { remote: offer.size, local: size })
    } else if offer.has(transmission::READ_ONLY) {
        Err(Failure::ReadOnly)
    } else if relayed && !offer.has(transmission::SEND_FLUSH) {
        Err(Failure::Unfit("the destination offers no FLUSH, which the clients of a relay rely on".into()))
    } else {
        Ok(())
    }
}

/// What a migration can ask of it.
pub(super) fn abilities_of_destination(offer: Offer) -> migrate::Abilities {
    migrate::Abilities { zero: offer.has(transmission::SEND_WRITE_ZEROES), flush: offer.has(transmission::SEND_FLUSH) }
}

/// What the server can be asked.
pub(super) fn abilities(offer: Offer) -> Abilities {
    let has = |flag| offer.has(flag);
    Abilities {
        size: offer.size,
        flush: has(transmission::SEND_FLUSH),
        fua: has(transmission::SEND_FUA),
        trim: has(transmission::SEND_TRIM),
        zero: has(transmission::SEND_WRITE_ZEROES),
        fast_zero: has(transmission::SEND_FAST_ZERO),
        cache: has(transmission::SEND_CACHE),
        map: offer.agreed.allocation,
        length_max: LENGTH_MAX,
    }
}

/// Gives a command to the conversation.
pub(super) fn ask(session: &mut ClientSession<Asked>, asked: Command) {
    let Command { asked: note, what, fua, offset, length, payload } = asked;
    let (kind, flags) = match what {
        What::Read => (kind::READ, 0),
        What::Write => (kind::WRITE, 0),
        What::Trim => (kind::TRIM, 0),
        What::Flush => (kind::FLUSH, 0),
        What::Cache => (kind::CACHE, 0),
        What::Map { one } => (kind::BLOCK_STATUS, if one { command::REQ_ONE } else { 0 }),
        What::Zero { no_hole, fast } => {
            let flag = |is_set, flag| if is_set { flag } else { 0 };
            (kind::WRITE_ZEROES, flag(no_hole, command::NO_HOLE) | flag(fast, command::FAST_ZERO))
        }
    };
    session.command(kind, flags | if fua { command::FUA } else { 0 }, offset, length, note);
    if let Some(payload) = payload {
        session.push_shared(payload);
    }
}

/// Why a connection is of no use, for people.
pub(super) struct Why {
    /// What is wrong, as a sentence about the server.
    pub text: String,
    /// What that means to clients.
    pub weight: Weight,
}

/// What it means to clients that a server cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Weight {
    /// It is away, as servers are at times.
    Away,
    /// Something answers, and not as a server does that is back.
    Odd,
    /// A server is there, and is not the one that clients know.
    Refusal,
}

impl Why {
    /// Says it of a server, which it is found to be for the `count`th time in this outage, as loudly as it deserves.
    pub(super) fn tell(&self, of: &dyn fmt::Display, count: u32) {
        match (self.weight, count) {
            (Weight::Refusal, 1) => error!("{of}: refused: {self}; clients wait until the server is the one they know"),
            // Once may be a server that is just going or coming.
            (Weight::Odd, 2) => warn!("{of}: not back: {self}"),
            _ => debug!("{of}: {self}"),
        }
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Says why a connection to the server is of no use.
pub(super) fn describe(failure: &Failure) -> Why {
    use Weight::{Away, Odd, Refusal};
    let (text, weight) = match failure {
        Failure::Connect(why) => (format!("cannot connect: {why}"), Away),
        Failure::NoGreeting => ("it did not greet in time".into(), Odd),
        Failure::Size { remote, local } => (format!("it has {remote} bytes, and clients were told {local}"), Refusal),
        Failure::NoExport(why) => (why.to_string(), Refusal),
        Failure::ReadOnly => ("it is read-only, and clients were told that they may write".into(), Refusal),
        Failure::Closed(why) => (format!("it {why}"), Odd),
        Failure::Itself => ("it is this server itself".into(), Refusal),
        Failure::Broken(why) => (why.clone(), Odd),
        Failure::Unfit(why) => (why.clone(), Refusal),
    };
    Why { text, weight }
}

/// What a fault means to the connection.
pub(super) fn broken(fault: Fault) -> Failure {
    match fault {
        Fault::Replay(error) => {
            Failure::Unfit(format!("it answered what has to be written again with {} ({error})", Errno::name(error)))
        }
        Fault::Leaves | Fault::Early => Failure::Broken(fault.to_string()),
    }
}
