//! Newstyle negotiation from the client's side: choose an export with GO, or by its name alone where the server knows no
//! better.
//!
//! The server is not trusted: what was not asked for is skipped, and both the length and the number of its replies are
//! bounded.
//!
//! Specification: "Newstyle negotiation", "Fixed newstyle negotiation", "`NBD_OPT_INFO` and `NBD_OPT_GO`".

use crate::proto::error::Violation;
use crate::proto::wire::{
    handshake_flag, info, option, option_reply, Fields, Greeting, IHAVEOPT, OPTION_REPLY_HEAD_LEN, OPTION_REPLY_MAGIC,
};

/// The longest reply to an option that is skipped, in bytes: texts and names have at most 4096.
const REPLY_MAX: u32 = 64 << 10;
/// How many replies the server may send; sensible ones send two or three.
const REPLIES_MAX: u32 = 64;
/// Zeroes behind the reply to `EXPORT_NAME`, unless they were agreed away, in bytes.
const ZEROES: usize = 124;

/// What the server was asked.
#[derive(Debug, Clone, Copy)]
enum Asked {
    /// GO; it may have said what the export is.
    Go(Option<Greeting>),
    /// `EXPORT_NAME`.
    ByName,
}

/// One negotiation.
#[derive(Debug)]
pub(super) struct Haggle {
    export: String,
    no_zeroes: bool,
    asked: Asked,
    replies: u32,
    /// Bytes to come of a reply that nobody needs.
    skip: u32,
    output: Vec<u8>,
}

impl Haggle {
    /// A negotiation about the export of this name with a server that offers these handshake flags.
    pub(super) fn begin(export: String, offered: u16) -> Self {
        let agreed = offered & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        let no_zeroes = agreed & handshake_flag::NO_ZEROES != 0;
        let output = u32::from(agreed).to_be_bytes().to_vec();
        let mut haggle = Self { export, no_zeroes, asked: Asked::Go(None), replies: 0, skip: 0, output };
        if agreed & handshake_flag::FIXED_NEWSTYLE == 0 {
            haggle.ask_by_name();
        } else {
            let name = haggle.export.as_bytes();
            // No information is asked for: what is always sent is enough.
            let data = [&length(name).to_be_bytes(), name, &0_u16.to_be_bytes()].concat();
            haggle.ask(option::GO, &data);
        }
        haggle
    }

    /// The bytes to send next; none when there are none.
    pub(super) fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// True when the server's only way to refuse is to hang up.
    pub(super) fn asked_by_name(&self) -> bool {
        matches!(self.asked, Asked::ByName)
    }

    /// Looks at what was received: how many bytes it took, and the export once it is chosen; `None` when it needs more.
    pub(super) fn step(&mut self, input: &[u8]) -> Result<Option<(usize, Option<Greeting>)>, Violation> {
        if self.skip > 0 {
            let taken = input.len().min(self.skip as usize);
            self.skip = self.skip.saturating_sub(u32::try_from(taken).unwrap_or(self.skip));
            return Ok((taken > 0).then_some((taken, None)));
        }
        match self.asked {
            Asked::Go(export) => self.answer_to_go(export, input),
            Asked::ByName => Ok(self.answer_to_name(input)),
        }
    }

    fn answer_to_go(
        &mut self,
        export: Option<Greeting>,
        input: &[u8],
    ) -> Result<Option<(usize, Option<Greeting>)>, Violation> {
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
                return export.ok_or(unexpected).map(|export| Some((OPTION_REPLY_HEAD_LEN, Some(export))));
            }
            option_reply::INFO if length >= 2 => match fields.u16() {
                None => return Ok(None),
                Some(info::EXPORT) if length == 12 => {
                    let (Some(size), Some(flags)) = (fields.u64(), fields.u16()) else { return Ok(None) };
                    self.asked = Asked::Go(Some(Greeting { size, flags: flags.into() }));
                }
                Some(info::EXPORT) => return Err(unexpected),
                Some(_) => {}
            },
            option_reply::ERR_UNSUP => self.ask_by_name(),
            kind if kind & option_reply::ERROR != 0 => return Err(Violation::OptionRefused(kind)),
            _ => return Err(unexpected),
        }
        self.replies += 1;
        self.skip = length;
        Ok(Some((OPTION_REPLY_HEAD_LEN, None)))
    }

    /// Size and flags without a head ("`NBD_OPT_EXPORT_NAME`").
    fn answer_to_name(&self, input: &[u8]) -> Option<(usize, Option<Greeting>)> {
        let mut fields = Fields(input);
        let (size, flags) = fields.u64().zip(fields.u16())?;
        let zeroes = if self.no_zeroes { 0 } else { ZEROES };
        let whole = fields.0.len() >= zeroes;
        whole.then_some((8 + 2 + zeroes, Some(Greeting { size, flags: flags.into() })))
    }

    fn ask_by_name(&mut self) {
        self.asked = Asked::ByName;
        let name = std::mem::take(&mut self.export);
        self.ask(option::EXPORT_NAME, name.as_bytes());
    }

    fn ask(&mut self, option: u32, data: &[u8]) {
        self.output.extend(IHAVEOPT.to_be_bytes());
        self.output.extend(option.to_be_bytes());
        self.output.extend(length(data).to_be_bytes());
        self.output.extend(data);
    }
}

/// The length of a name or of an option that holds one, which is far from 4 GiB.
fn length(data: &[u8]) -> u32 {
    debug_assert!(data.len() <= 64 << 10, "a name has at most 4096 bytes");
    u32::try_from(data.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::client::{ClientSession, Event};
    use crate::proto::wire::{kind, SimpleReply, NBDMAGIC};

    const FIXED: u16 = handshake_flag::FIXED_NEWSTYLE;
    const NO_ZEROES: u16 = handshake_flag::NO_ZEROES;
    const EXPORT: Greeting = Greeting { size: 1 << 40, flags: 0x16d };

    fn greeting(flags: u16) -> Vec<u8> {
        [&NBDMAGIC.to_be_bytes()[..], &IHAVEOPT.to_be_bytes(), &flags.to_be_bytes()].concat()
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend([option::GO, kind, data.len() as u32].iter().flat_map(|field| field.to_be_bytes()));
        [&bytes, data].concat()
    }

    fn size_and_flags() -> Vec<u8> {
        [&EXPORT.size.to_be_bytes()[..], &0x16d_u16.to_be_bytes()].concat()
    }

    fn info_export() -> Vec<u8> {
        reply(option_reply::INFO, &[&info::EXPORT.to_be_bytes()[..], &size_and_flags()].concat())
    }

    fn asked(option: u32, data: &[u8]) -> Vec<u8> {
        [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &length(data).to_be_bytes(), data].concat()
    }

    fn go(name: &str) -> Vec<u8> {
        asked(option::GO, &[&length(name.as_bytes()).to_be_bytes(), name.as_bytes(), &[0, 0]].concat())
    }

    /// What the session makes of the parts in pieces of `step` bytes with one reply behind them: the export, and what it
    /// has sent. It never sees more than it has to: what is left of a piece comes again with the next.
    fn run(name: &str, parts: &[Vec<u8>], step: usize) -> Result<(Option<Greeting>, Vec<u8>), Violation> {
        let mut stream = parts.concat();
        stream.extend(SimpleReply { error: 0, cookie: 1 }.encode());
        let mut session = ClientSession::new(name.into());
        let (mut export, mut sent, mut input, mut replies) = (None, Vec::new(), Vec::new(), 0);
        for piece in stream.chunks(step) {
            input.extend_from_slice(piece);
            while let Some((event, used)) = session.parse(&input)? {
                assert!(used > 0 && used <= input.len());
                match event {
                    Event::Handshake => assert_eq!(export, None),
                    Event::Greeting(found) => {
                        assert_eq!(export.replace(found), None);
                        session.request(kind::FLUSH, 0, 0, 0);
                    }
                    Event::Reply { .. } => replies += 1,
                    Event::Data { .. } => unreachable!("nothing was read"),
                }
                input.drain(..used);
                sent.extend(session.take_output());
            }
        }
        assert_eq!(replies, u32::from(export.is_some()));
        Ok((export, sent))
    }

    /// The same in whatever pieces it comes.
    fn run_all(name: &str, parts: &[Vec<u8>]) -> Result<(Option<Greeting>, Vec<u8>), Violation> {
        let whole = run(name, parts, usize::MAX);
        let length = parts.concat().len() + 16;
        for step in (1..=length.min(300)).chain([length / 2, length - 1]) {
            assert_eq!(run(name, parts, step), whole, "pieces of {step}");
        }
        whole
    }

    #[test]
    fn go_chooses_the_export_and_skips_what_it_did_not_ask_for() {
        let ack = reply(option_reply::ACK, &[]);
        let sizes = reply(option_reply::INFO, &[0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
        let long = reply(option_reply::INFO, &vec![0xEE; 64 << 10]);
        let sent = [vec![0, 0, 0, 3], go("a disk")].concat();
        for infos in [
            vec![info_export()],
            vec![sizes.clone(), info_export()],
            vec![info_export(), reply(option_reply::INFO, &[0, 1]), sizes],
            vec![info_export(), long],
        ] {
            let parts = [vec![greeting(FIXED | NO_ZEROES)], infos, vec![ack.clone()]].concat();
            assert_eq!(run_all("a disk", &parts), Ok((Some(EXPORT), sent.clone())));
        }
    }

    #[test]
    fn flags_are_as_offered_and_unknown_ones_are_not_repeated() {
        let parts = |flags| [greeting(flags), info_export(), reply(option_reply::ACK, &[])];
        for (offered, given) in [(FIXED, 1), (FIXED | NO_ZEROES, 3), (0xfff9, 1)] {
            let sent = [vec![0, 0, 0, given], go("")].concat();
            assert_eq!(run_all("", &parts(offered)), Ok((Some(EXPORT), sent)));
        }
    }

    #[test]
    fn a_server_that_does_not_know_go_is_asked_by_name() {
        let text = b"no such option".to_vec();
        for (flags, zeroes) in [(FIXED, 124), (FIXED | NO_ZEROES, 0)] {
            let refusal = reply(option_reply::ERR_UNSUP, &text);
            let parts = [greeting(flags), refusal, size_and_flags(), vec![0; zeroes]];
            let by_name = asked(option::EXPORT_NAME, b"disk");
            let sent = [u32::from(flags).to_be_bytes().to_vec(), go("disk"), by_name].concat();
            assert_eq!(run_all("disk", &parts), Ok((Some(EXPORT), sent)));
        }
    }

    #[test]
    fn a_server_without_fixed_newstyle_is_asked_by_name_at_once() {
        for (flags, zeroes) in [(0, 124), (NO_ZEROES, 0)] {
            let parts = [greeting(flags), size_and_flags(), vec![0; zeroes]];
            let sent = [u32::from(flags).to_be_bytes().to_vec(), asked(option::EXPORT_NAME, b"disk")].concat();
            assert_eq!(run_all("disk", &parts), Ok((Some(EXPORT), sent)));
        }
    }

    #[test]
    fn refusals_are_named() {
        for (kind, text) in [
            (option_reply::ERR_UNKNOWN, "there is no export of this name (ERR_UNKNOWN)"),
            (option_reply::ERROR | 5, "the server refused the export: ERR_TLS_REQD (0x80000005)"),
            (option_reply::ERROR | 8, "the server refused the export: ERR_BLOCK_SIZE_REQD (0x80000008)"),
            (u32::MAX, "the server refused the export: an error the specification does not know (0xffffffff)"),
        ] {
            let why = run_all("x", &[greeting(FIXED), reply(kind, b"text of the server")]).unwrap_err();
            assert_eq!((why, why.to_string().as_str()), (Violation::OptionRefused(kind), text));
        }
    }

    #[test]
    fn an_oldstyle_server_has_no_names() {
        let parts = [EXPORT.encode().to_vec()];
        assert_eq!(run_all("", &parts), Ok((Some(EXPORT), Vec::new())));
        assert_eq!(run_all("x", &parts), Err(Violation::NoExportNames));
    }

    #[test]
    fn senseless_replies_end_the_conversation() {
        let unexpected = |kind, length| Violation::UnexpectedOptionReply { option: option::GO, kind, length };
        let mut other_option = reply(option_reply::ACK, &[]);
        other_option[11] = 6;
        let mut magic = reply(option_reply::ACK, &[]);
        magic[0] = 1;
        let mut endless = reply(option_reply::INFO, &[]);
        endless[16..].copy_from_slice(&u32::MAX.to_be_bytes());
        for (replies, violation) in [
            (reply(option_reply::ACK, &[]), unexpected(option_reply::ACK, 0)),
            ([info_export(), reply(option_reply::ACK, &[0])].concat(), unexpected(option_reply::ACK, 1)),
            (reply(option_reply::INFO, &[0]), unexpected(option_reply::INFO, 1)),
            (reply(option_reply::INFO, &[0; 11]), unexpected(option_reply::INFO, 11)),
            (reply(option_reply::SERVER, &[0; 4]), unexpected(option_reply::SERVER, 4)),
            (other_option, Violation::UnexpectedOptionReply { option: 6, kind: option_reply::ACK, length: 0 }),
            (magic, Violation::BadOptionReplyMagic(OPTION_REPLY_MAGIC | 1 << 56)),
            (endless, Violation::OptionReplyTooLong(u32::MAX)),
            (reply(option_reply::INFO, &vec![1; (64 << 10) + 1]), Violation::OptionReplyTooLong((64 << 10) + 1)),
            (reply(option_reply::ERR_UNSUP, &vec![1; (64 << 10) + 1]), Violation::OptionReplyTooLong((64 << 10) + 1)),
            (reply(option_reply::INFO, &[1, 1]).repeat(65), Violation::TooManyOptionReplies(64)),
        ] {
            assert_eq!(run_all("", &[greeting(FIXED), replies]), Err(violation));
        }
    }

    #[test]
    fn an_end_is_explained_by_where_it_comes() {
        let ends = |parts: &[Vec<u8>]| {
            let mut session = ClientSession::default();
            let (input, mut at) = (parts.concat(), 0);
            while let Some((_, used)) = session.parse(&input[at..]).unwrap() {
                at += used;
            }
            session.explain_end()
        };
        assert!(ends(&[]).starts_with("closed the connection before its greeting"));
        assert!(ends(&[greeting(FIXED)]).ends_with("in the middle of the negotiation"));
        assert!(ends(&[greeting(0)]).contains("when asked for the export"));
        assert!(ends(&[EXPORT.encode().to_vec()]).ends_with("half-way"));
    }
}
