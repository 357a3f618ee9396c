//! PURE: The messages of the FUSE protocol (linux/fuse.h, version 7), as far as one folder of files needs them.

use super::folder::{FileId, Fill};
use std::ops::Range;

/// The version whose messages these are: the first with a limit on answers.
const MINOR: u32 = 43;
/// The longest payload of a write, in bytes.
const WRITE_MAX: u32 = 1 << 20;
/// The length of a buffer that takes every request: the longest write, and room for its head.
pub const REQUEST_MAX: usize = WRITE_MAX as usize + 4096;
/// Bytes before the body of a request.
const HEAD_LEN: usize = 40;
/// How long the kernel may keep names and attributes, in seconds: nobody else changes them.
const VALID_S: u64 = 3600;
/// How long the kernel waits for an answer before it gives the mount up, in seconds (Linux 6.15): longer than any is
/// kept back, and the end of a test program that was killed with requests of its own in its hands.
const ANSWER_MAX_S: u16 = 60;

/// A request.
pub struct Request {
    /// What its reply is known by.
    pub unique: u64,
    /// The file or the folder.
    pub node: FileId,
    /// The thread that waits for it.
    pub thread: u32,
    /// What is wanted.
    pub call: Call,
}

/// What a request wants. There is one folder, so none is named.
pub enum Call {
    Init {
        minor: u32,
        readahead: u32,
        flags: u32,
    },
    /// No reply: the kernel forgets something, or the thread of a request got a signal.
    Notice,
    Lookup {
        name: String,
    },
    Stat,
    SetAttributes {
        size: Option<u64>,
    },
    Open,
    Create {
        name: String,
    },
    Release,
    Read {
        range: Range<u64>,
    },
    Write {
        offset: u64,
        bytes: Vec<u8>,
    },
    Fallocate {
        range: Range<u64>,
        fill: Option<Fill>,
        keep_size: bool,
    },
    Seek {
        offset: u64,
        whence: i32,
    },
    Fsync {
        data_only: bool,
    },
    FsyncFolder,
    Unlink {
        name: String,
    },
    Rename {
        from: String,
        to: String,
        flags: u32,
    },
    StatFs,
    SetXattr {
        key: String,
        value: Vec<u8>,
        flags: i32,
    },
    GetXattr {
        key: String,
        room: u32,
    },
    ListXattr {
        room: u32,
    },
    RemoveXattr {
        key: String,
    },
    OpenFolder,
    List {
        behind: FileId,
        room: u32,
    },
    ReleaseFolder,
    Unknown,
}

/// Takes a message apart, field after field.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes(&mut self, length: usize) -> &[u8] {
        let (bytes, rest) = self.0.split_at(length);
        self.0 = rest;
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_ne_bytes(self.bytes(4).try_into().unwrap())
    }

    fn i32(&mut self) -> i32 {
        i32::from_ne_bytes(self.bytes(4).try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        u64::from_ne_bytes(self.bytes(8).try_into().unwrap())
    }

    fn text(&mut self) -> String {
        let end = self.0.iter().position(|&byte| byte == 0).unwrap();
        let text = String::from_utf8(self.bytes(end).to_vec()).unwrap();
        self.bytes(1);
        text
    }

    fn skip(mut self, length: usize) -> Self {
        self.bytes(length);
        self
    }
}

impl Request {
    /// From a message of the kernel.
    pub fn parse(message: &[u8]) -> Self {
        let mut head = Fields(message);
        let (_length, opcode, unique, node) = (head.u32(), head.u32(), head.u64(), head.u64());
        let (_user, _group, thread) = (head.u32(), head.u32(), head.u32());
        let call = parse_call(opcode, Fields(&message[HEAD_LEN..]));
        Self { unique, node, thread, call }
    }
}

fn parse_call(opcode: u32, mut body: Fields) -> Call {
    match opcode {
        1 => Call::Lookup { name: body.text() },
        2 | 36 | 42 => Call::Notice,
        3 => Call::Stat,
        4 => {
            const HAS_SIZE: u32 = 1 << 3;
            let has_size = body.u32() & HAS_SIZE != 0;
            let size = body.skip(12).u64();
            Call::SetAttributes { size: has_size.then_some(size) }
        }
        10 => Call::Unlink { name: body.text() },
        12 => {
            let mut names = body.skip(8);
            Call::Rename { from: names.text(), to: names.text(), flags: 0 }
        }
        14 => Call::Open,
        15 => {
            let mut body = body.skip(8);
            let (offset, length) = (body.u64(), body.u32());
            Call::Read { range: offset..offset + u64::from(length) }
        }
        16 => {
            let mut body = body.skip(8);
            let (offset, length) = (body.u64(), body.u32());
            Call::Write { offset, bytes: body.skip(20).bytes(length as usize).to_vec() }
        }
        17 => Call::StatFs,
        18 => Call::Release,
        20 => Call::Fsync { data_only: body.skip(8).u32() & 1 != 0 },
        21 => {
            let (length, flags) = (body.u32(), body.i32());
            Call::SetXattr { key: body.text(), value: body.bytes(length as usize).to_vec(), flags }
        }
        22 => {
            let room = body.u32();
            Call::GetXattr { room, key: body.skip(4).text() }
        }
        23 => Call::ListXattr { room: body.u32() },
        24 => Call::RemoveXattr { key: body.text() },
        26 => {
            assert_eq!(body.u32(), 7, "the major version of the protocol");
            Call::Init { minor: body.u32(), readahead: body.u32(), flags: body.u32() }
        }
        27 => Call::OpenFolder,
        28 => {
            let mut body = body.skip(8);
            Call::List { behind: body.u64(), room: body.u32() }
        }
        29 => Call::ReleaseFolder,
        30 => Call::FsyncFolder,
        35 => Call::Create { name: body.skip(16).text() },
        43 => {
            let mut body = body.skip(8);
            let (offset, length, mode) = (body.u64(), body.u64(), body.i32());
            let fill = match mode & !libc::FALLOC_FL_KEEP_SIZE {
                0 => Some(Fill::Allocate),
                libc::FALLOC_FL_PUNCH_HOLE => Some(Fill::Punch),
                libc::FALLOC_FL_ZERO_RANGE => Some(Fill::Zero),
                _ => None,
            };
            let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
            Call::Fallocate { range: offset..offset + length, fill, keep_size }
        }
        45 => {
            let mut body = body.skip(8);
            let flags = body.u32();
            let mut names = body.skip(4);
            Call::Rename { from: names.text(), to: names.text(), flags }
        }
        46 => {
            let mut body = body.skip(8);
            Call::Seek { offset: body.u64(), whence: body.i32() }
        }
        _ => Call::Unknown,
    }
}

/// Puts a message together, field after field.
#[derive(Default)]
pub struct Message(Vec<u8>);

impl Message {
    fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn i32(mut self, value: i32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn zeroes(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }

    fn attributes(self, node: &Node) -> Self {
        let mode = if node.is_folder { libc::S_IFDIR | 0o755 } else { libc::S_IFREG | 0o644 };
        // Three times with their nanoseconds are always zero.
        let sizes = self.u64(node.id).u64(node.size).u64(node.allocated / 512).zeroes(3 * 8 + 3 * 4);
        // One name, root's, no device, blocks of a page, no flags.
        sizes.u32(mode).u32(1).zeroes(3 * 4).u32(4096).u32(0)
    }
}

/// A file or the folder, as stat(2) tells it.
pub struct Node {
    pub id: FileId,
    pub is_folder: bool,
    pub size: u64,
    pub allocated: u64,
}

/// A reply: an error number, or a body.
pub fn reply(unique: u64, outcome: Result<Vec<u8>, i32>) -> Vec<u8> {
    let (error, body) = outcome.map_or_else(|error| (error, Vec::new()), |body| (0, body));
    let mut message = Message::default().u32((16 + body.len()) as u32).i32(-error).u64(unique).0;
    message.extend(body);
    message
}

/// Makes the kernel forget what it has cached of a file.
pub fn forget_cache(node: FileId) -> Vec<u8> {
    const INVALIDATE: u32 = 2;
    // From 0 to the end.
    Message::default().u32(40).u32(INVALIDATE).u64(0).u64(node).u64(0).u64(0).0
}

/// What both sides can do: no requests for locks, so that they stay in the kernel; reads and `O_DIRECT` with depth.
pub fn welcome(minor: u32, readahead: u32, offered: u32) -> Vec<u8> {
    const ASYNC_READ: u32 = 1 << 0;
    const BIG_WRITES: u32 = 1 << 5;
    const ASYNC_DIO: u32 = 1 << 15;
    const PARALLEL_DIROPS: u32 = 1 << 18;
    const MAX_PAGES: u32 = 1 << 22;
    // Or else each write asks for an extended attribute.
    const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
    const INIT_EXT: u32 = 1 << 30;
    const REQUEST_TIMEOUT: u32 = 1 << (42 - 32);
    // Above what any test has in flight, for the kernel keeps back what is more.
    const BACKGROUND_MAX: u16 = 4096;
    let known = ASYNC_READ | BIG_WRITES | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | HANDLE_KILLPRIV_V2 | INIT_EXT;
    let message = Message::default().u32(7).u32(minor.min(MINOR)).u32(readahead).u32(known & offered);
    let limits = message.u16(BACKGROUND_MAX).u16(BACKGROUND_MAX).u32(WRITE_MAX).u32(1);
    limits.u16((WRITE_MAX / 4096) as u16).u16(0).u32(REQUEST_TIMEOUT).u32(0).u16(ANSWER_MAX_S).zeroes(22).0
}

/// What a name stands for.
pub fn entry(node: &Node) -> Message {
    Message::default().u64(node.id).u64(0).u64(VALID_S).u64(VALID_S).zeroes(8).attributes(node)
}

/// The answer to stat(2).
pub fn attributes(node: &Node) -> Vec<u8> {
    Message::default().u64(VALID_S).zeroes(8).attributes(node).0
}

/// An open file, whose data the kernel caches or not.
pub fn opened(cached: bool) -> Vec<u8> {
    created(Message::default(), cached)
}

/// A file that was made and opened.
pub fn created(entry: Message, cached: bool) -> Vec<u8> {
    const DIRECT_IO: u32 = 1 << 0;
    const KEEP_CACHE: u32 = 1 << 1;
    // A program that ends has nothing to say to the disk.
    const NO_FLUSH: u32 = 1 << 5;
    entry.u64(0).u32(NO_FLUSH | if cached { KEEP_CACHE } else { DIRECT_IO }).u32(0).0
}

impl From<Message> for Vec<u8> {
    fn from(message: Message) -> Self {
        message.0
    }
}

/// How much of a write was taken.
pub fn written(length: usize) -> Vec<u8> {
    Message::default().u32(length as u32).u32(0).0
}

/// Where a seek ends.
pub fn offset(offset: u64) -> Vec<u8> {
    Message::default().u64(offset).0
}

/// The size of the file system and what is free, in bytes; it counts no files.
pub fn statfs(size: u64, free: u64) -> Vec<u8> {
    let blocks = Message::default().u64(size / 4096).u64(free / 4096).u64(free / 4096).zeroes(2 * 8);
    blocks.u32(4096).u32(255).u32(4096).zeroes(4 + 6 * 4).0
}

/// An attribute or a list of them, or how long it is when the asker has no room yet.
pub fn xattr(value: &[u8], room: u32) -> Result<Vec<u8>, i32> {
    match room {
        0 => Ok(Message::default().u32(value.len() as u32).u32(0).0),
        room if value.len() <= room as usize => Ok(value.to_vec()),
        _ => Err(libc::ERANGE),
    }
}

/// As many of these files as there is room for. A listing goes on behind the number of the last one.
pub fn list(files: &[(&str, FileId)], room: u32) -> Vec<u8> {
    let mut message = Message::default();
    for &(name, file) in files {
        let length = (24 + name.len()).next_multiple_of(8);
        if message.0.len() + length > room as usize {
            break;
        }
        message = message.u64(file).u64(file).u32(name.len() as u32).u32(u32::from(libc::DT_REG));
        message.0.extend(name.as_bytes());
        message = message.zeroes(length - 24 - name.len());
    }
    message.0
}
