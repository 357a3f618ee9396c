//! PURE: the oracle of a newstyle negotiation.

use super::choices::Choices;
use super::export::SIZE;
use flexnbd::proto::error::Violation;
use flexnbd::proto::export::Export;
use flexnbd::proto::server::handshake::{Haggle, Haggled, OPTION_MAX};
use flexnbd::proto::wire::{
    option, option_reply, Fields, IHAVEOPT, NEWSTYLE_GREETING_LEN, OPTION_HEAD_LEN, OPTION_REPLY_HEAD_LEN,
    OPTION_REPLY_MAGIC,
};

/// The most that one option may make a server say, in bytes.
const MOST_SAID: usize = 256;

/// The name that the export has beside the empty one, and what a list says of it.
pub(super) const NAME: &str = "disk";
const NAME_LISTED: &[u8] = b"\0\0\0\x04disk";

/// What came of a negotiation.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Negotiation {
    pub(super) said: Vec<u8>,
    pub(super) end: Result<Option<Haggled>, Violation>,
    pub(super) used: usize,
}

/// Haggles over `input`, of which at most `piece()` bytes more are known at each step.
pub(super) fn haggle(input: &[u8], mut piece: impl FnMut(usize) -> usize) -> Negotiation {
    let (mut haggle, said) = Haggle::begin(Export { size: SIZE, read_only: false, flushes: true, several: true });
    haggle.name_export(NAME.into());
    let mut haggled = Negotiation { said, end: Ok(None), used: 0 };
    let mut known = 0;
    loop {
        let before = haggled.said.len();
        let window = input.get(haggled.used..known).unwrap_or_default();
        match haggle.step(window, &mut haggled.said) {
            Ok(Some((used, progress))) => {
                assert!(used > 0 && used <= window.len(), "it takes what is there, and something");
                assert!(haggled.said.len() - before <= MOST_SAID, "an answer without a limit");
                haggled.used += used;
                if progress == Haggled::Named {
                    assert_eq!(before, haggled.said.len(), "an answer before the session is the client's");
                    haggle.go_on(&mut haggled.said);
                } else if progress != Haggled::More {
                    haggled.end = Ok(Some(progress));
                    return haggled;
                }
            }
            Ok(None) if known == input.len() => return haggled,
            Ok(None) => {
                assert!(window.len() < OPTION_HEAD_LEN + OPTION_MAX, "it wants more than a session holds");
                assert_eq!(before, haggled.said.len(), "an answer before the question");
                known += piece(input.len() - known);
            }
            Err(violation) => {
                haggled.end = Err(violation);
                return haggled;
            }
        }
    }
}

/// One reply to an option: the option, the type and the data.
fn take_option_reply<'a>(said: &mut &'a [u8]) -> Option<(u32, u32, &'a [u8])> {
    let mut fields = Fields(said.get(..OPTION_REPLY_HEAD_LEN)?);
    assert_eq!(fields.u64(), Some(OPTION_REPLY_MAGIC));
    let (option, kind, length) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let data = said.get(OPTION_REPLY_HEAD_LEN..OPTION_REPLY_HEAD_LEN + length as usize)?;
    *said = said.get(OPTION_REPLY_HEAD_LEN + length as usize..)?;
    Some((option, kind, data))
}

/// Fails unless `said` answers the options of `input`, the first `used` bytes of which were taken, one by one.
fn check_answers(input: &[u8], haggled: &Negotiation) {
    let mut input = input.get(4..haggled.used).unwrap_or_default();
    let mut said = haggled.said.get(NEWSTYLE_GREETING_LEN..).unwrap_or_default();
    while let Some(head) = input.get(..OPTION_HEAD_LEN) {
        let mut fields = Fields(head);
        assert_eq!(fields.u64(), Some(IHAVEOPT));
        let (asked, length) = (fields.u32().unwrap_or_default(), fields.u32().unwrap_or_default());
        input = input.get(OPTION_HEAD_LEN + length as usize..).unwrap_or_default();
        if asked == option::EXPORT_NAME {
            assert!(input.is_empty() && matches!(said.len(), 10 | 134), "a size, flags, and zeroes or none");
            return;
        }
        let mut informed = false;
        let last = loop {
            let reply = take_option_reply(&mut said);
            let Some((option, kind, data)) = reply else { unreachable!("an option without its last reply") };
            assert_eq!(option, asked);
            match kind {
                option_reply::ACK => assert!(data.is_empty()),
                option_reply::SERVER => {
                    assert!(asked == option::LIST && [b"\0\0\0\0".as_slice(), NAME_LISTED].contains(&data));
                }
                option_reply::INFO => informed |= data.len() == 12,
                option_reply::META_CONTEXT => {
                    assert!(matches!(asked, option::LIST_META_CONTEXT | option::SET_META_CONTEXT));
                }
                _ => assert!(kind & option_reply::ERROR != 0 && data.len() <= 4096, "{kind:#x}"),
            }
            if kind == option_reply::ACK || kind & option_reply::ERROR != 0 {
                break kind;
            }
        };
        let describes = matches!(asked, option::INFO | option::GO);
        assert_eq!(describes && last == option_reply::ACK, informed, "the size goes with success");
    }
    assert!(said.is_empty(), "an answer to nothing");
}

/// The client's half of a negotiation, cut up.
///
/// # Panics
/// When it matters how it is cut up, when an option is not answered as it must be, or without a limit.
pub fn haggling(data: &[u8]) {
    let (mut choices, input) = Choices::split(data);
    let whole = haggle(input, |most| most);
    assert_eq!(haggle(input, |most| choices.piece(most)), whole);
    if whole.end.is_ok() {
        check_answers(input, &whole);
    }
}
