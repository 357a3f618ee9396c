//! The fixed newstyle negotiation of the NBD protocol: structured replies if they are asked for, then GO.

use std::io;

use super::socket::Stream;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FIXED_NEWSTYLE: u16 = 1;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
/// More than any answer to these options takes.
const ANSWER_MAX: u32 = 64 << 10;

/// What the server says of the export.
#[derive(Default, Clone, Copy)]
pub struct Export {
    pub size: u64,
    flags: u16,
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
}

/// Negotiates, up to where requests may be sent.
pub fn shake(stream: &mut dyn Stream, export: &str, structured: bool) -> io::Result<Export> {
    if (u64::from_be_bytes(take(stream)?), u64::from_be_bytes(take(stream)?)) != (NBDMAGIC, IHAVEOPT) {
        return Err(io::Error::other("no newstyle server"));
    }
    if u16::from_be_bytes(take(stream)?) & FIXED_NEWSTYLE == 0 {
        return Err(io::Error::other("no fixed newstyle server"));
    }
    stream.write_all(&u32::from(FIXED_NEWSTYLE).to_be_bytes())?;
    if structured {
        ask(stream, OPT_STRUCTURED_REPLY, &[])?;
    }
    let length = u32::try_from(export.len()).map_err(io::Error::other)?;
    // Behind the name comes that no information is asked for: the export's comes in any case.
    let go = [&length.to_be_bytes(), export.as_bytes(), &[0, 0]].concat();
    ask(stream, OPT_GO, &go)?.ok_or_else(|| io::Error::other("the server said nothing of the export"))
}

/// Sends an option and reads its replies up to the acknowledgement.
fn ask(stream: &mut dyn Stream, option: u32, data: &[u8]) -> io::Result<Option<Export>> {
    let length = u32::try_from(data.len()).map_err(io::Error::other)?;
    let head = [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes(), data].concat();
    stream.write_all(&head)?;
    let mut export = None;
    loop {
        let magic = u64::from_be_bytes(take(stream)?);
        let [about, kind, length] = [take(stream)?, take(stream)?, take(stream)?].map(u32::from_be_bytes);
        if magic != OPTION_REPLY_MAGIC || about != option || length > ANSWER_MAX {
            return Err(io::Error::other("not a reply to an option"));
        }
        let mut answer = vec![0; length as usize];
        stream.read_exact(&mut answer)?;
        match kind {
            REP_ACK => return Ok(export),
            REP_INFO => {
                if let Some((&[kind_0, kind_1, ref size @ .., flags_0, flags_1], _)) = answer.split_first_chunk::<12>()
                {
                    if u16::from_be_bytes([kind_0, kind_1]) == INFO_EXPORT {
                        let size = size.iter().fold(0, |sum, &byte| sum << 8 | u64::from(byte));
                        export = Some(Export { size, flags: u16::from_be_bytes([flags_0, flags_1]) });
                    }
                }
            }
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
