//! Newstyle negotiation from the server's side: options in, replies out, until the client enters transmission or leaves.
//!
//! There is one export, the default one, whose name is empty; it may have a second name. A client may name its session, and
//! waits then until its caller has ended an
//! older connection of that name. Every length here is hostile: an option is looked at only when it is whole
//! and at most [`OPTION_MAX`] bytes long, and a longer one is drained or ends the connection.
//!
//! Specification: "Newstyle negotiation", "Fixed newstyle negotiation", "Option types", "Option reply types".

use crate::printable;
use crate::proto::error::Violation;
use crate::proto::export::{Agreed, Export, SessionName, Style, ALLOCATION, ALLOCATION_ID, NOT_YET, SESSION_ID};
use crate::proto::wire::{
    handshake_flag, info, option, option_reply, Fields, EXPORT_NAME_ZEROES, IHAVEOPT, NBDMAGIC, OPTION_HEAD_LEN,
    OPTION_REPLY_MAGIC, STRING_MAX,
};
use std::rc::Rc;

/// The longest option that is looked at, in bytes: a name of 4096 bytes and plenty of queries.
pub const OPTION_MAX: usize = 8 << 10;
/// The longest option that is drained to stay in step with the client, in bytes. A longer one ends the connection.
const DRAIN_MAX: u32 = 64 << 10;
/// How many options a client may send; a handful is usual.
const OPTIONS_MAX: u32 = 64;
/// The block sizes that are announced, in bytes: minimum, preferred, maximum.
const BLOCK_SIZES: [u32; 3] = [1, 4096, 32 << 20];

/// What a step of a negotiation led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Haggled {
    /// It goes on.
    More,
    /// The client has named its session. Nothing of it is looked at before [`Haggle::go_on`] or [`Haggle::refuse`].
    Named,
    /// What comes next is a request.
    Transmission(Agreed),
    /// The client ends it.
    Leave,
}

#[derive(Debug, Clone, Copy)]
enum State {
    ClientFlags,
    Option,
    Drain { left: u32 },
}

/// One negotiation.
#[derive(Debug)]
pub struct Haggle {
    export: Export,
    /// The name it has beside the empty one; empty when it has none.
    name: Rc<str>,
    state: State,
    no_zeroes: bool,
    agreed: Agreed,
    options: u32,
    /// The name of the export that was asked for last and is not there, fit to be shown.
    unknown: Option<String>,
    /// The replies to a client that has named its session, until they may be given.
    held: Option<Vec<u8>>,
}

impl Haggle {
    /// A negotiation about `export`, and the bytes that begin it.
    pub fn begin(export: Export) -> (Self, Vec<u8>) {
        let mut greeting = Vec::with_capacity(18);
        greeting.extend(NBDMAGIC.to_be_bytes());
        greeting.extend(IHAVEOPT.to_be_bytes());
        greeting.extend((handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
        let agreed = Agreed::default();
        let (name, state) = (Rc::from(""), State::ClientFlags);
        let unknown = None;
        (Self { export, name, state, no_zeroes: false, agreed, options: 0, unknown, held: None }, greeting)
    }

    /// The export has this name, too.
    pub fn name_export(&mut self, name: Rc<str>) {
        self.name = name;
    }

    /// The export has this size from now on, in bytes.
    pub fn resize_export(&mut self, size: u64) {
        self.export.size = size;
    }

    /// Looks at what was received: how many bytes it took, and where that leads; `None` when it needs more. Replies are
    /// appended to `out`.
    pub fn step(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Option<(usize, Haggled)>, Violation> {
        match self.state {
            State::ClientFlags => {
                let Some(flags) = Fields(input).u32() else { return Ok(None) };
                let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
                if flags & !known != 0 {
                    return Err(Violation::ClientFlags(flags));
                }
                self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
                self.state = State::Option;
                Ok(Some((4, Haggled::More)))
            }
            State::Option => self.option(input, out),
            State::Drain { .. } if input.is_empty() => Ok(None),
            State::Drain { left } => {
                let taken = input.len().min(left as usize);
                let left = left.saturating_sub(u32::try_from(taken).unwrap_or(left));
                self.state = if left == 0 { State::Option } else { State::Drain { left } };
                Ok(Some((taken, Haggled::More)))
            }
        }
    }

    fn option(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Option<(usize, Haggled)>, Violation> {
        let mut fields = Fields(input);
        let (Some(magic), Some(kind), Some(length)) = (fields.u64(), fields.u32(), fields.u32()) else {
            return Ok(None);
        };
        if magic != IHAVEOPT {
            return Err(Violation::BadOptionMagic(magic));
        }
        if self.options >= OPTIONS_MAX {
            return Err(Violation::TooManyOptions(OPTIONS_MAX));
        }
        if length as usize > OPTION_MAX {
            // EXPORT_NAME has no reply that says no.
            if length > DRAIN_MAX || kind == option::EXPORT_NAME {
                return Err(Violation::OptionTooLong(length));
            }
            self.options += 1;
            self.unselect(kind);
            let error = if is_known(kind) { option_reply::ERR_TOO_BIG } else { option_reply::ERR_UNSUP };
            reply(out, kind, error, &[]);
            self.state = State::Drain { left: length };
            return Ok(Some((OPTION_HEAD_LEN, Haggled::More)));
        }
        let Some(data) = fields.0.get(..length as usize) else { return Ok(None) };
        self.options += 1;
        let before = out.len();
        let mut haggled = self.answer(kind, data, out)?;
        if kind == option::SET_META_CONTEXT && self.agreed.session.is_some() {
            self.held = Some(out.split_off(before));
            haggled = Haggled::Named;
        }
        Ok(Some((OPTION_HEAD_LEN + data.len(), haggled)))
    }

    /// The name of an export that was asked for in this step and is not there, fit to be shown.
    pub fn take_unknown(&mut self) -> Option<String> {
        self.unknown.take()
    }

    /// What the client has named its session.
    pub fn session(&self) -> Option<SessionName> {
        self.agreed.session
    }

    /// True while a client that has named its session waits for the answer.
    pub fn is_held(&self) -> bool {
        self.held.is_some()
    }

    /// The session is the client's: answers it.
    pub fn go_on(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.held.take().unwrap_or_default());
    }

    /// There is nothing to serve yet: refuses the client that has named its session.
    pub fn refuse(&mut self, out: &mut Vec<u8>) {
        self.held = None;
        self.unselect(option::SET_META_CONTEXT);
        reply(out, option::SET_META_CONTEXT, option_reply::ERR_POLICY, NOT_YET);
    }

    fn answer(&mut self, kind: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Haggled, Violation> {
        let outcome = match kind {
            option::EXPORT_NAME => return self.export_name(data, out),
            option::ABORT => {
                reply(out, kind, option_reply::ACK, &[]);
                return Ok(Haggled::Leave);
            }
            option::LIST => self.list(data, out),
            option::INFO | option::GO => self.info(kind, data, out),
            option::STRUCTURED_REPLY => self.structured_reply(data),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(kind, data, out),
            option::STARTTLS if !data.is_empty() => Err(option_reply::ERR_INVALID),
            _ => Err(option_reply::ERR_UNSUP),
        };
        match outcome {
            Ok(()) => reply(out, kind, option_reply::ACK, &[]),
            Err(error) => reply(out, kind, error, &[]),
        }
        let enters = kind == option::GO && outcome.is_ok();
        Ok(if enters { Haggled::Transmission(self.agreed) } else { Haggled::More })
    }

    /// `NBD_OPT_EXPORT_NAME`: no reply can say no, so another name ends the connection.
    fn export_name(&mut self, name: &[u8], out: &mut Vec<u8>) -> Result<Haggled, Violation> {
        if !self.has_name(name) {
            self.unknown = Some(shown(name));
            return Err(Violation::UnknownExport);
        }
        out.extend(self.export.size.to_be_bytes());
        out.extend(self.export.flags(Style::Newstyle(self.agreed)).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; EXPORT_NAME_ZEROES]);
        }
        Ok(Haggled::Transmission(self.agreed))
    }

    /// `NBD_OPT_LIST`: the one export, by each of its names.
    fn list(&self, data: &[u8], out: &mut Vec<u8>) -> Result<(), u32> {
        if !data.is_empty() {
            return Err(option_reply::ERR_INVALID);
        }
        for name in std::iter::once("").chain(Some(&*self.name).filter(|name| !name.is_empty())) {
            let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
            reply(out, option::LIST, option_reply::SERVER, &[&length.to_be_bytes(), name.as_bytes()].concat());
        }
        Ok(())
    }

    fn has_name(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    /// `NBD_OPT_STRUCTURED_REPLY`, once.
    fn structured_reply(&mut self, data: &[u8]) -> Result<(), u32> {
        if !data.is_empty() || self.agreed.structured {
            return Err(option_reply::ERR_INVALID);
        }
        self.agreed.structured = true;
        Ok(())
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`: what the export is.
    fn info(&mut self, kind: u32, data: &[u8], out: &mut Vec<u8>) -> Result<(), u32> {
        let mut fields = Fields(data);
        let name = string(&mut fields);
        let wanted = fields.u16().zip(Some(fields.0)).filter(|(count, rest)| rest.len() == usize::from(*count) * 2);
        let (name, (_, wanted)) = name.zip(wanted).ok_or(option_reply::ERR_INVALID)?;
        self.check_name(name)?;
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend(self.export.size.to_be_bytes());
        export.extend(self.export.flags(Style::Newstyle(self.agreed)).to_be_bytes());
        reply(out, kind, option_reply::INFO, &export);
        if wanted.chunks_exact(2).any(|asked| asked == info::BLOCK_SIZE.to_be_bytes()) {
            let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
            sizes.extend(BLOCK_SIZES.iter().flat_map(|size| size.to_be_bytes()));
            reply(out, kind, option_reply::INFO, &sizes);
        }
        Ok(())
    }

    /// A name that the export does not have is unknown; what is no valid name at all is invalid.
    fn check_name(&mut self, name: &[u8]) -> Result<(), u32> {
        if self.has_name(name) {
            return Ok(());
        }
        self.unknown = Some(shown(name));
        let is_valid = name.len() <= STRING_MAX && !name.contains(&0) && std::str::from_utf8(name).is_ok();
        Err(if is_valid { option_reply::ERR_UNKNOWN } else { option_reply::ERR_INVALID })
    }

    /// A SET replaces what was selected before, also when it fails.
    fn unselect(&mut self, kind: u32) {
        if kind == option::SET_META_CONTEXT {
            (self.agreed.allocation, self.agreed.session) = (false, None);
        }
    }

    /// `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
    fn meta_context(&mut self, kind: u32, data: &[u8], out: &mut Vec<u8>) -> Result<(), u32> {
        let set = kind == option::SET_META_CONTEXT;
        self.unselect(kind);
        if !self.agreed.structured {
            return Err(option_reply::ERR_INVALID);
        }
        let mut fields = Fields(data);
        let (name, count) = string(&mut fields).zip(fields.u32()).ok_or(option_reply::ERR_INVALID)?;
        let mut found = count == 0 && !set;
        let mut session = None;
        for _ in 0..count {
            // Each query takes at least four bytes, so a false count ends with the data.
            let query = string(&mut fields).ok_or(option_reply::ERR_INVALID)?;
            found |= query == ALLOCATION || (!set && query == b"base:");
            // Others cannot be told of a name that they do not know.
            session = session.or(SessionName::parse(query).filter(|_| set).zip(Some(query)));
        }
        if !fields.0.is_empty() {
            return Err(option_reply::ERR_INVALID);
        }
        self.check_name(name)?;
        if found {
            let mut context = ALLOCATION_ID.to_be_bytes().to_vec();
            context.extend(ALLOCATION);
            reply(out, kind, option_reply::META_CONTEXT, &context);
        }
        if let Some((session, query)) = session {
            reply(out, kind, option_reply::META_CONTEXT, &[&SESSION_ID.to_be_bytes(), query].concat());
            self.agreed.session = Some(session);
        }
        self.agreed.allocation |= set && found;
        Ok(())
    }
}

fn is_known(kind: u32) -> bool {
    matches!(
        kind,
        option::EXPORT_NAME
            | option::ABORT
            | option::LIST
            | option::INFO
            | option::GO
            | option::STRUCTURED_REPLY
            | option::LIST_META_CONTEXT
            | option::SET_META_CONTEXT
    )
}

/// A length and as many bytes; `None` when they are not there.
fn string<'a>(fields: &mut Fields<'a>) -> Option<&'a [u8]> {
    let length = fields.u32()? as usize;
    let (string, rest) = fields.0.split_at_checked(length)?;
    fields.0 = rest;
    Some(string)
}

/// A name that somebody else has chosen, as it may be shown.
fn shown(name: &[u8]) -> String {
    printable::shorten(&String::from_utf8_lossy(name))
}

/// Appends an option reply. Its data is this server's own and short.
fn reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    out.extend(data);
}
