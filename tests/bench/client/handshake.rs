//! The fixed newstyle negotiation of the NBD protocol: structured replies if they are asked for, then GO.

use std::io;

use super::flights::Kind;
use super::socket::Stream;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FIXED_NEWSTYLE: u16 = 1;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const INFO_EXPORT: u16 = 0;
/// More than any answer to these options takes.
const ANSWER_MAX: u32 = 64 << 10;
/// What `BLOCK_STATUS` tells: data and holes.
const CONTEXT: &str = "base:allocation";

/// What the server says of the export.
#[derive(Default, Clone, Copy)]
pub struct Export {
    pub size: u64,
    flags: u16,
    has_context: bool,
}

impl Export {
    pub fn is_read_only(self) -> bool {
        self.flags & 1 << 1 != 0
    }

    pub fn has_flush(self) -> bool {
        self.flags & 1 << 2 != 0
    }

    pub fn has_fua(self) -> bool {
        self.flags & 1 << 3 != 0
    }

    pub fn takes(self, command: Kind) -> bool {
        match command {
            Kind::Read => true,
            Kind::Write => !self.is_read_only(),
            Kind::Flush => self.has_flush(),
            Kind::Trim => self.flags & 1 << 5 != 0,
            Kind::Cache => self.flags & 1 << 10 != 0,
            Kind::Zeroes => self.flags & 1 << 6 != 0,
            Kind::Status => self.has_context,
        }
    }
}

/// Negotiates, up to where requests may be sent. `extents` asks for what `BLOCK_STATUS` needs, `structured` for the replies
/// without which there is no such thing.
pub fn shake(stream: &mut dyn Stream, export: &str, structured: bool, extents: bool) -> io::Result<Export> {
    if (u64::from_be_bytes(take(stream)?), u64::from_be_bytes(take(stream)?)) != (NBDMAGIC, IHAVEOPT) {
        return Err(io::Error::other("no newstyle server"));
    }
    if u16::from_be_bytes(take(stream)?) & FIXED_NEWSTYLE == 0 {
        return Err(io::Error::other("no fixed newstyle server"));
    }
    stream.write_all(&u32::from(FIXED_NEWSTYLE).to_be_bytes())?;
    let mut has_context = false;
    let name = |name: &str| -> io::Result<Vec<u8>> {
        let length = u32::try_from(name.len()).map_err(io::Error::other)?;
        Ok([&length.to_be_bytes(), name.as_bytes()].concat())
    };
    if structured {
        ask(stream, OPT_STRUCTURED_REPLY, &[], |_, _| {})?;
    }
    if extents {
        let one_context = [name(export)?, 1_u32.to_be_bytes().to_vec(), name(CONTEXT)?].concat();
        ask(stream, OPT_SET_META_CONTEXT, &one_context, |kind, _| has_context |= kind == REP_META_CONTEXT)?;
    }
    // Behind the name comes that no information is asked for: the export's comes in any case.
    let go = [name(export)?, vec![0, 0]].concat();
    let mut found = None;
    ask(stream, OPT_GO, &go, |kind, answer| {
        if let (REP_INFO, Some((&[kind_0, kind_1, ref size @ .., flags_0, flags_1], _))) =
            (kind, answer.split_first_chunk::<12>())
        {
            if u16::from_be_bytes([kind_0, kind_1]) == INFO_EXPORT {
                let size = size.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
                found = Some(Export { size, flags: u16::from_be_bytes([flags_0, flags_1]), has_context });
            }
        }
    })?;
    found.ok_or_else(|| io::Error::other("the server said nothing of the export"))
}

/// Sends an option and hands over its replies, each with its kind, up to the acknowledgement.
fn ask(stream: &mut dyn Stream, option: u32, data: &[u8], mut take_reply: impl FnMut(u32, &[u8])) -> io::Result<()> {
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    let head = [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), data].concat();
    stream.write_all(&head)?;
    loop {
        let magic = u64::from_be_bytes(take(stream)?);
        let [about, kind, length] = [take(stream)?, take(stream)?, take(stream)?].map(u32::from_be_bytes);
        if magic != OPTION_REPLY_MAGIC || about != option || length > ANSWER_MAX {
            return Err(io::Error::other("not a reply to an option"));
        }
        let mut answer = vec![0; length as usize];
        stream.read_exact(&mut answer)?;
        match kind {
            REP_ACK => return Ok(()),
            REP_INFO | REP_META_CONTEXT => take_reply(kind, &answer),
            _ => {
                let said = String::from_utf8_lossy(&answer);
                return Err(io::Error::other(format!("option {option} was answered with {kind:#x}: {said}")));
            }
        }
    }
}

fn take<const N: usize>(stream: &mut dyn Stream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}
