//! Chunks of structured replies, from bytes to meaning. Whether a chunk fits what was asked is not known here.
//!
//! Specification: "Structured reply chunk message", "Structured reply types".

use crate::proto::error::Violation;
use crate::proto::wire::{chunk, ChunkHead, Fields, CHUNK_LEN, STRING_MAX};

/// The longest payload of a chunk of extents or of an error of an unknown type, in bytes.
const PAYLOAD_MAX: u32 = 16 << 20;
/// How many extents of a chunk are looked at. A server may say less than it was asked for, so its client has to ask again
/// anyway.
pub const DESCRIPTORS_MAX: usize = 1024;

/// An extent as the server describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// How many bytes it has.
    pub length: u32,
    /// Its flags, which depend on the context.
    pub flags: u32,
}

/// What a chunk says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    Nothing,
    /// So many bytes of data follow.
    Data {
        offset: u64,
        length: u32,
    },
    Hole {
        offset: u64,
        length: u32,
    },
    Extents {
        context: u32,
        descriptors: Vec<Descriptor>,
    },
    Error {
        error: u32,
        offset: Option<u64>,
    },
}

/// A chunk, and what stands around it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parsed {
    pub(super) cookie: u64,
    /// The reply ends with it.
    pub(super) is_last: bool,
    pub(super) chunk: Chunk,
    /// How many bytes were looked at.
    pub(super) used: usize,
    /// How many bytes of its payload come behind them.
    pub(super) left: u32,
}

/// Reads a chunk off the front, its magic included; `None` when it needs more.
pub(super) fn parse(input: &[u8]) -> Result<Option<Parsed>, Violation> {
    let mut fields = Fields(input);
    let head = fields.u32().and_then(|_| ChunkHead::parse(&mut fields));
    let Some(ChunkHead { flags, kind, cookie, length }) = head else { return Ok(None) };
    let is_last = flags & chunk::DONE != 0;
    let senseless = Violation::SenselessChunk { kind, length };
    let chunk = match kind {
        chunk::NONE if length == 0 && is_last => Some(Chunk::Nothing),
        chunk::OFFSET_DATA if length > 8 => fields.u64().map(|offset| Chunk::Data { offset, length: length - 8 }),
        chunk::OFFSET_HOLE if length == 12 => {
            fields.u64().zip(fields.u32()).map(|(offset, length)| Chunk::Hole { offset, length })
        }
        chunk::BLOCK_STATUS if length >= 12 && length % 8 == 4 && length <= PAYLOAD_MAX => {
            extents(&mut fields, length as usize / 8)
        }
        _ if kind & chunk::IS_ERROR != 0 && (6..=PAYLOAD_MAX).contains(&length) => {
            error(&mut fields, kind, length).map_err(|Senseless| senseless)?
        }
        _ => return Err(senseless),
    };
    if matches!(chunk, Some(Chunk::Error { error: 0, .. } | Chunk::Hole { length: 0, .. })) {
        return Err(senseless);
    }
    let used = input.len().saturating_sub(fields.0.len());
    let left = length.saturating_sub(u32::try_from(used.saturating_sub(CHUNK_LEN)).unwrap_or(u32::MAX));
    Ok(chunk.map(|chunk| Parsed { cookie, is_last, chunk, used, left }))
}

fn extents(fields: &mut Fields, count: usize) -> Option<Chunk> {
    let context = fields.u32()?;
    let described = (0..count.min(DESCRIPTORS_MAX))
        .map(|_| fields.u32().zip(fields.u32()).map(|(length, flags)| Descriptor { length, flags }));
    Some(Chunk::Extents { context, descriptors: described.collect::<Option<_>>()? })
}

/// The lengths of a chunk contradict each other.
struct Senseless;

fn error(fields: &mut Fields, kind: u16, length: u32) -> Result<Option<Chunk>, Senseless> {
    let Some((error, text)) = fields.u32().zip(fields.u16()) else { return Ok(None) };
    let text = usize::from(text);
    let has_offset = kind == chunk::ERROR_OFFSET;
    let said = 6 + text + if has_offset { 8 } else { 0 };
    if said > length as usize || text > STRING_MAX {
        return Err(Senseless);
    }
    if !has_offset {
        return Ok(Some(Chunk::Error { error, offset: None }));
    }
    let Some(rest) = fields.0.get(text..) else { return Ok(None) };
    fields.0 = rest;
    Ok(fields.u64().map(|offset| Chunk::Error { error, offset: Some(offset) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_extents_the_first_are_looked_at() {
        let (count, extent) = (5000_u32, [0, 0, 0, 9, 0, 0, 0, 3]);
        let head = ChunkHead { flags: 0, kind: chunk::BLOCK_STATUS, cookie: 1, length: 4 + count * 8 };
        let enough = [head.encode::<24>().put(&[0, 0, 0, 7]).filled(), &extent.repeat(DESCRIPTORS_MAX)].concat();
        assert_eq!(parse(&enough[..enough.len() - 1]), Ok(None));
        let parsed = parse(&enough).unwrap().unwrap();
        let descriptors = vec![Descriptor { length: 9, flags: 3 }; DESCRIPTORS_MAX];
        assert_eq!(parsed.chunk, Chunk::Extents { context: 7, descriptors });
        assert_eq!((parsed.used, parsed.left), (enough.len(), (count - 1024) * 8));
        let endless = ChunkHead { length: 4 + (2 << 23), ..head }.encode::<20>();
        let senseless = Violation::SenselessChunk { kind: chunk::BLOCK_STATUS, length: 4 + (2 << 23) };
        assert_eq!(parse(endless.filled()), Err(senseless));
    }
}
