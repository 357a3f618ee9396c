//! Newstyle negotiation from the client's side: it chooses an export with GO, or with `EXPORT_NAME` where the server does
//! not know GO. Before that it asks for what its caller wishes, and a server that knows nothing of it is asked without.
//!
//! The server is not trusted: what was not asked for is skipped, and both the length and the number of its replies are
//! bounded.
//!
//! Specification: "Newstyle negotiation", "Fixed newstyle negotiation", "`NBD_OPT_INFO` and `NBD_OPT_GO`",
//! "`NBD_OPT_STRUCTURED_REPLY`", "Metadata querying".

use crate::proto::error::Violation;
use crate::proto::export::{Agreed, Offer, SessionName, ALLOCATION, NOT_YET};
use crate::proto::wire::{
    handshake_flag, info, option, option_reply, Fields, EXPORT_NAME_ZEROES, IHAVEOPT, OPTION_REPLY_HEAD_LEN,
    OPTION_REPLY_MAGIC,
};

/// The longest reply to an option, in bytes; texts and names in it have at most 4096.
const REPLY_MAX: u32 = 64 << 10;
/// How many replies a server may send; two or three are usual.
const REPLIES_MAX: u32 = 64;

/// What a client wants beyond the export. Nothing of it is sure: [`Offer::agreed`] says what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wishes {
    /// Structured replies and `base:allocation`.
    pub structured: bool,
    /// The name of its session, which needs structured replies, too.
    pub session: Option<SessionName>,
}

/// What a step of a negotiation led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Haggled {
    /// It goes on.
    More,
    /// What comes next is a reply to a command.
    Transmission(Offer),
}

/// What the server was asked.
#[derive(Debug, Clone, Copy)]
enum State {
    /// `STRUCTURED_REPLY`.
    Structured,
    /// `SET_META_CONTEXT`.
    Contexts,
    /// GO; it may have said what size and flags the export has.
    Go(Option<(u64, u16)>),
    /// `EXPORT_NAME`.
    ByName,
}

/// One negotiation.
#[derive(Debug)]
pub(super) struct Haggle {
    export: String,
    wishes: Wishes,
    structured: bool,
    allocation_id: Option<u32>,
    session_id: Option<u32>,
    no_zeroes: bool,
    state: State,
    replies: u32,
    /// Bytes to come of a reply that nobody needs.
    skip: u32,
}

impl Haggle {
    /// A negotiation about the export of this name with a server that offers these handshake flags, and the bytes that
    /// begin it.
    pub(super) fn begin(export: String, wishes: Wishes, offered: u16) -> (Self, Vec<u8>) {
        let agreed = offered & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        let mut out = u32::from(agreed).to_be_bytes().to_vec();
        let mut haggle = Self {
            export,
            wishes,
            structured: false,
            allocation_id: None,
            session_id: None,
            no_zeroes: agreed & handshake_flag::NO_ZEROES != 0,
            state: State::Structured,
            replies: 0,
            skip: 0,
        };
        if agreed & handshake_flag::FIXED_NEWSTYLE == 0 {
            haggle.ask_by_name(&mut out);
        } else if wishes == Wishes::default() {
            haggle.ask_go(&mut out);
        } else {
            ask(option::STRUCTURED_REPLY, &[], &mut out);
        }
        (haggle, out)
    }

    /// The id that the server has given `base:allocation`, if it has that.
    pub(super) fn allocation_id(&self) -> Option<u32> {
        self.allocation_id
    }

    /// True when the server's only way to refuse is to hang up.
    pub(super) fn asked_by_name(&self) -> bool {
        matches!(self.state, State::ByName)
    }

    /// Looks at what was received: how many bytes it took, and where that leads; `None` when it needs more. What has to
    /// be sent is appended to `out`.
    pub(super) fn step(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Option<(usize, Haggled)>, Violation> {
        if self.skip > 0 {
            let taken = input.len().min(self.skip as usize);
            self.skip = self.skip.saturating_sub(u32::try_from(taken).unwrap_or(self.skip));
            return Ok((taken > 0).then_some((taken, Haggled::More)));
        }
        match self.state {
            State::Structured => self.answer(option::STRUCTURED_REPLY, input, out),
            State::Contexts => self.answer(option::SET_META_CONTEXT, input, out),
            State::Go(_) => self.answer(option::GO, input, out),
            State::ByName => Ok(self.answer_to_name(input)),
        }
    }

    fn answer(&mut self, asked: u32, input: &[u8], out: &mut Vec<u8>) -> Result<Option<(usize, Haggled)>, Violation> {
        let mut fields = Fields(input);
        let magic = fields.u64();
        let (Some(magic), Some(to), Some(kind), Some(length)) = (magic, fields.u32(), fields.u32(), fields.u32())
        else {
            return Ok(None);
        };
        if magic != OPTION_REPLY_MAGIC {
            return Err(Violation::BadOptionReplyMagic(magic));
        }
        if length > REPLY_MAX {
            return Err(Violation::OptionReplyTooLong(length));
        }
        if self.replies >= REPLIES_MAX {
            return Err(Violation::TooManyOptionReplies(REPLIES_MAX));
        }
        let unexpected = Violation::UnexpectedOptionReply { option: to, kind, length };
        if to != asked {
            return Err(unexpected);
        }
        let data = fields.0.get(..length as usize);
        match (self.state, kind) {
            (_, option_reply::ERR_POLICY) if length as usize == NOT_YET.len() => match data {
                None => return Ok(None),
                Some(NOT_YET) => return Err(Violation::NotYet),
                Some(_) => self.refused(kind, out)?,
            },
            (_, kind) if kind & option_reply::ERROR != 0 => self.refused(kind, out)?,
            (State::Structured, option_reply::ACK) if length == 0 => {
                self.structured = true;
                self.ask_contexts(out);
            }
            (State::Contexts, option_reply::ACK) if length == 0 => self.ask_go(out),
            (State::Contexts, option_reply::META_CONTEXT) if length >= 4 => {
                let session = self.wishes.session.map(SessionName::context);
                let is_session = |name: &[u8]| session.as_ref().is_some_and(|session| session.as_bytes() == name);
                let longest = ALLOCATION.len().max(session.as_ref().map_or(0, String::len));
                if length as usize <= 4 + longest {
                    let Some(id) = fields.u32().filter(|_| data.is_some()) else { return Ok(None) };
                    let name = data.and_then(|data| data.get(4..)).unwrap_or_default();
                    let slot = match name {
                        ALLOCATION => Some(&mut self.allocation_id),
                        name if is_session(name) => Some(&mut self.session_id),
                        _ => None,
                    };
                    if slot.is_some_and(|slot| slot.replace(id).is_some()) {
                        return Err(unexpected);
                    }
                }
            }
            (State::Go(Some((size, flags))), option_reply::ACK) if length == 0 => {
                return Ok(Some((OPTION_REPLY_HEAD_LEN, Haggled::Transmission(self.offer(size, flags)))));
            }
            (State::Go(_), option_reply::INFO) if length >= 2 => match fields.u16() {
                None => return Ok(None),
                Some(info::EXPORT) if length == 12 => {
                    let (Some(size), Some(flags)) = (fields.u64(), fields.u16()) else { return Ok(None) };
                    self.state = State::Go(Some((size, flags)));
                }
                Some(info::EXPORT) => return Err(unexpected),
                Some(_) => {}
            },
            _ => return Err(unexpected),
        }
        self.replies += 1;
        self.skip = length;
        Ok(Some((OPTION_REPLY_HEAD_LEN, Haggled::More)))
    }

    /// Goes on without what the server refuses, unless that is the export.
    fn refused(&mut self, kind: u32, out: &mut Vec<u8>) -> Result<(), Violation> {
        match self.state {
            State::Structured => self.ask_go(out),
            State::Contexts => {
                (self.allocation_id, self.session_id) = (None, None);
                self.ask_go(out);
            }
            State::Go(_) if kind == option_reply::ERR_UNSUP => self.ask_by_name(out),
            State::Go(_) | State::ByName => return Err(Violation::OptionRefused(kind)),
        }
        Ok(())
    }

    fn offer(&self, size: u64, flags: u16) -> Offer {
        let session = self.wishes.session.filter(|_| self.session_id.is_some());
        let agreed = Agreed { structured: self.structured, allocation: self.allocation_id.is_some(), session };
        Offer { size, flags, agreed }
    }

    /// Size and flags without a head ("`NBD_OPT_EXPORT_NAME`").
    fn answer_to_name(&self, input: &[u8]) -> Option<(usize, Haggled)> {
        let mut fields = Fields(input);
        let (size, flags) = fields.u64().zip(fields.u16())?;
        let zeroes = if self.no_zeroes { 0 } else { EXPORT_NAME_ZEROES };
        let whole = fields.0.len() >= zeroes;
        whole.then(|| (8 + 2 + zeroes, Haggled::Transmission(self.offer(size, flags))))
    }

    /// Both contexts at once, because every SET replaces what the one before has selected.
    fn ask_contexts(&mut self, out: &mut Vec<u8>) {
        self.state = State::Contexts;
        let session = self.wishes.session.map(|session| session.context().into_bytes());
        let export = self.export.as_bytes();
        let count = 1 + u32::from(session.is_some());
        let mut data = [&length(export).to_be_bytes(), export, &count.to_be_bytes()].concat();
        for query in [ALLOCATION.to_vec()].into_iter().chain(session) {
            data.extend(length(&query).to_be_bytes());
            data.extend(query);
        }
        ask(option::SET_META_CONTEXT, &data, out);
    }

    /// No information is asked for: what is always sent is enough.
    fn ask_go(&mut self, out: &mut Vec<u8>) {
        self.state = State::Go(None);
        let export = self.export.as_bytes();
        let data = [&length(export).to_be_bytes(), export, &0_u16.to_be_bytes()].concat();
        ask(option::GO, &data, out);
    }

    fn ask_by_name(&mut self, out: &mut Vec<u8>) {
        self.state = State::ByName;
        ask(option::EXPORT_NAME, std::mem::take(&mut self.export).as_bytes(), out);
    }
}

/// Appends an option.
fn ask(option: u32, data: &[u8], out: &mut Vec<u8>) {
    out.extend(IHAVEOPT.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(length(data).to_be_bytes());
    out.extend(data);
}

/// The length of a name or of an option that holds one, which is far from 4 GiB.
fn length(data: &[u8]) -> u32 {
    debug_assert!(data.len() <= 64 << 10, "a name has at most 4096 bytes");
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}
