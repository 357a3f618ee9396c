//! Newstyle negotiation from the client's side: it chooses an export with GO, or with `EXPORT_NAME` where the server does
//! not know GO.
//!
//! The server is not trusted: what was not asked for is skipped, and both the length and the number of its replies are
//! bounded.
//!
//! Specification: "Newstyle negotiation", "Fixed newstyle negotiation", "`NBD_OPT_INFO` and `NBD_OPT_GO`".

use crate::proto::error::Violation;
use crate::proto::export::Offer;
use crate::proto::wire::{
    handshake_flag, info, option, option_reply, Fields, EXPORT_NAME_ZEROES, IHAVEOPT, OPTION_REPLY_HEAD_LEN,
    OPTION_REPLY_MAGIC,
};

/// The longest reply to an option, in bytes; texts and names in it have at most 4096.
const REPLY_MAX: u32 = 64 << 10;
/// How many replies a server may send; two or three are usual.
const REPLIES_MAX: u32 = 64;

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
    /// GO; it may have said what the export is.
    Go(Option<Offer>),
    /// `EXPORT_NAME`.
    ByName,
}

/// One negotiation.
#[derive(Debug)]
pub(super) struct Haggle {
    export: String,
    no_zeroes: bool,
    state: State,
    replies: u32,
    /// Bytes to come of a reply that nobody needs.
    skip: u32,
}

impl Haggle {
    /// A negotiation about the export of this name with a server that offers these handshake flags, and the bytes that
    /// begin it.
    pub(super) fn begin(export: String, offered: u16) -> (Self, Vec<u8>) {
        let agreed = offered & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        let no_zeroes = agreed & handshake_flag::NO_ZEROES != 0;
        let mut out = u32::from(agreed).to_be_bytes().to_vec();
        let mut haggle = Self { export, no_zeroes, state: State::Go(None), replies: 0, skip: 0 };
        if agreed & handshake_flag::FIXED_NEWSTYLE == 0 {
            haggle.ask_by_name(&mut out);
        } else {
            let name = haggle.export.as_bytes();
            // No information is asked for: what is always sent is enough.
            let data = [&length(name).to_be_bytes(), name, &0_u16.to_be_bytes()].concat();
            ask(option::GO, &data, &mut out);
        }
        (haggle, out)
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
            State::Go(offer) => self.answer_to_go(offer, input, out),
            State::ByName => Ok(self.answer_to_name(input)),
        }
    }

    fn answer_to_go(
        &mut self,
        offer: Option<Offer>,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<(usize, Haggled)>, Violation> {
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
        match kind {
            _ if to != option::GO => return Err(unexpected),
            option_reply::ACK if length == 0 => {
                let offer = offer.ok_or(unexpected)?;
                return Ok(Some((OPTION_REPLY_HEAD_LEN, Haggled::Transmission(offer))));
            }
            option_reply::INFO if length >= 2 => match fields.u16() {
                None => return Ok(None),
                Some(info::EXPORT) if length == 12 => {
                    let (Some(size), Some(flags)) = (fields.u64(), fields.u16()) else { return Ok(None) };
                    self.state = State::Go(Some(Offer { size, flags }));
                }
                Some(info::EXPORT) => return Err(unexpected),
                Some(_) => {}
            },
            option_reply::ERR_UNSUP => self.ask_by_name(out),
            kind if kind & option_reply::ERROR != 0 => return Err(Violation::OptionRefused(kind)),
            _ => return Err(unexpected),
        }
        self.replies += 1;
        self.skip = length;
        Ok(Some((OPTION_REPLY_HEAD_LEN, Haggled::More)))
    }

    /// Size and flags without a head ("`NBD_OPT_EXPORT_NAME`").
    fn answer_to_name(&self, input: &[u8]) -> Option<(usize, Haggled)> {
        let mut fields = Fields(input);
        let (size, flags) = fields.u64().zip(fields.u16())?;
        let zeroes = if self.no_zeroes { 0 } else { EXPORT_NAME_ZEROES };
        let whole = fields.0.len() >= zeroes;
        whole.then_some((8 + 2 + zeroes, Haggled::Transmission(Offer { size, flags })))
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
