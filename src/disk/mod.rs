//! A disk image: a regular file or a block device, and a queue of operations on it.
//!
//! The way through is always [`Disk::submit`], [`Disk::kick`], [`Disk::pop_done`]. An operation owns its buffer until
//! it is done, so whoever asked may vanish meanwhile. The engine behind the queue (`sync`) can be replaced without a
//! change above. What holes are and how they stay is in `sparse`. There is no socket here and no word of a protocol.
//!
//! Operations that are queued together may be carried out in any order, and long ones in steps between others, so two
//! of them that overlap have no defined order unless the first was done when the second was submitted.
//!
//! Invariant 1: the range of an operation lies inside the image; its submitter has checked that.
//!
//! Invariant 2: `in_flight` is the number of operations submitted whose [`Done`] was not popped, at most [`MAX_OPS`].

mod sparse;
mod sync;

use crate::sys;
use crate::work::{Done, Extent, Op};
use std::fmt;
use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The unit of an image's size, in bytes: the smallest sector there is. A rest of the file is not served.
pub const SECTOR: u64 = 512;

/// The most operations in flight: more than 100 clients at 32 each, and under 1 MiB of queue.
pub const MAX_OPS: usize = 4096;

/// What the log says, once and at level E, when an fdatasync has failed.
pub const SYNC_LOST: &str = "fdatasync failed, written data may be lost; every later flush will fail until a restart";

/// An open image: what the engine and the search for holes work on.
struct Image {
    file: File,
    size: u64,
    is_device: bool,
}

/// An open image and the operations on it.
pub struct Disk {
    image: Image,
    path: PathBuf,
    tail: u64,
    engine: sync::Engine,
    in_flight: usize,
}

impl Disk {
    /// Opens a regular file or a block device for reading and writing.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::try_open(path).map_err(|problem| OpenError { path: path.to_owned(), problem })
    }

    fn try_open(path: &Path) -> Result<Self, Problem> {
        // The kind is looked at before it is opened: to open a FIFO or a character device can wait, or do things.
        let kind = fs::metadata(path).map_err(Problem::from_lookup)?.file_type();
        if let Some(name) = unfit(kind) {
            return Err(Problem::Kind(name));
        }
        let mut options = OpenOptions::new();
        // Should it have become a FIFO meanwhile, this still does not wait, and the seek then fails.
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
        let mut file = options.open(path).map_err(|error| match File::open(path) {
            Ok(_) => Problem::NotWritable(error),
            Err(error) => Problem::NotReadable(error),
        })?;
        // A block device says no length in its metadata.
        let bytes = file.seek(SeekFrom::End(0)).map_err(Problem::NotReadable)?;
        let tail = bytes % SECTOR;
        let size = bytes - tail;
        if size == 0 {
            return Err(Problem::TooSmall(bytes));
        }
        let image = Image { file, size, is_device: kind.is_block_device() };
        Ok(Self { image, path: path.to_owned(), tail, engine: sync::Engine::new(), in_flight: 0 })
    }

    /// Says to other processes that the image is served, or (`alone`) that it is being overwritten as a whole. Both at
    /// once are refused. A file system without locks has none.
    pub fn lock(&self, alone: bool) -> Result<(), OpenError> {
        match sys::file::try_lock(&self.image.file, alone) {
            Ok(false) => Err(OpenError { path: self.path.clone(), problem: Problem::InUse { alone } }),
            Ok(true) | Err(_) => Ok(()),
        }
    }

    /// The size of the image in bytes, a multiple of [`SECTOR`] and not zero.
    pub fn size(&self) -> u64 {
        self.image.size
    }

    /// The bytes of the file beyond [`Disk::size`], which are not part of the image.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// About how many bytes of the image are data, and not holes.
    pub fn allocated(&self) -> u64 {
        let blocks =
            if self.image.is_device { None } else { self.image.file.metadata().ok().map(|file| file.blocks()) };
        blocks.map_or(self.image.size, |blocks| blocks.saturating_mul(512).min(self.image.size))
    }

    /// True for a block device.
    pub fn is_device(&self) -> bool {
        self.image.is_device
    }

    /// The name of the file, not of a link to it. An error when the path names another file by now.
    pub fn named_path(&self) -> io::Result<PathBuf> {
        let path = fs::canonicalize(&self.path)?;
        let (named, open) = (fs::symlink_metadata(&path)?, self.image.file.metadata()?);
        if (named.dev(), named.ino()) != (open.dev(), open.ino()) {
            return Err(io::Error::other("the path names another file by now"));
        }
        Ok(path)
    }

    /// Removes the name of the file; what is open stays.
    pub fn unlink(&self) -> io::Result<()> {
        let path = self.named_path()?;
        fs::remove_file(&path)?;
        // Or else a power failure could bring the name back, when it counts that it is gone. It is gone already, so
        // this cannot fail the operation any more.
        let synced = path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all());
        synced.unwrap_or_else(|error| log::warn!("{}: the unlink may not be durable: {error}", path.display()));
        Ok(())
    }

    /// Queues an operation, or hands it back when [`MAX_OPS`] are in flight. It has to lie inside the image.
    pub fn submit(&mut self, op: Op) -> Result<(), Op> {
        debug_assert!(op.action.fits(self.image.size), "invariant 1");
        if !self.has_room() {
            return Err(op);
        }
        self.in_flight += 1;
        self.engine.submit(op);
        Ok(())
    }

    /// Works through the queue. Operations that ask for stable storage share one fdatasync at the end and are done
    /// after it. Long ranges take several kicks: as long as [`Disk::in_flight`] is not zero when everything done was
    /// popped, there is more to do.
    pub fn kick(&mut self) {
        self.engine.kick(&self.image);
    }

    /// The next operation that is done.
    pub fn pop_done(&mut self) -> Option<Done> {
        let done = self.engine.pop_done()?;
        debug_assert!(self.in_flight > 0, "invariant 2");
        self.in_flight = self.in_flight.saturating_sub(1);
        Some(done)
    }

    /// True when [`Disk::submit`] would take an operation.
    pub fn has_room(&self) -> bool {
        self.in_flight < MAX_OPS
    }

    /// How many operations were submitted and not popped.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// How many times fdatasync was called since the image was opened.
    pub fn syncs(&self) -> u64 {
        self.engine.syncs()
    }

    /// The hole or the data that begins at `offset`, up to `limit` (an offset, too) or the end of the image, whichever
    /// comes first. Empty only when that is at or before `offset`. Holes read as zeroes; what cannot be told is data.
    ///
    /// The end of data can take milliseconds to find in a large file, however near `limit` is, so whoever walks the
    /// image asks with a far limit and keeps the answer.
    pub fn extent(&self, offset: u64, limit: u64) -> Extent {
        sparse::extent(&self.image, offset, limit)
    }
}

/// What a file is that cannot be served, or `None` for one that can.
fn unfit(kind: FileType) -> Option<&'static str> {
    if kind.is_file() || kind.is_block_device() {
        None
    } else if kind.is_dir() {
        Some("a directory")
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else if kind.is_socket() {
        Some("a socket")
    } else {
        Some("a character device")
    }
}

/// Why an image could not be opened. Its text is one line that names the path, what is wrong and what to do.
#[derive(Debug)]
pub struct OpenError {
    path: PathBuf,
    problem: Problem,
}

#[derive(Debug)]
enum Problem {
    Missing,
    Kind(&'static str),
    NotReadable(io::Error),
    NotWritable(io::Error),
    TooSmall(u64),
    InUse { alone: bool },
}

impl Problem {
    fn from_lookup(error: io::Error) -> Self {
        match error.kind() {
            ErrorKind::NotFound => Self::Missing,
            _ => Self::NotReadable(error),
        }
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Quoted, so that a path with a line break in it still makes one line.
        write!(f, "cannot open {:?}: ", self.path.display())?;
        match &self.problem {
            Problem::Missing => f.write_str("it does not exist; create it first, with the size the disk shall have"),
            Problem::Kind(kind) => write!(f, "it is {kind}; give a regular file or a block device"),
            Problem::NotReadable(error) => write!(f, "it cannot be read: {error}; let this user read and write it"),
            Problem::NotWritable(error) => write!(f, "it cannot be written: {error}; let this user write it"),
            Problem::InUse { alone: true } => {
                f.write_str("another server has it open, and a migration would overwrite it; give another file")
            }
            Problem::InUse { alone: false } => {
                f.write_str("another server waits for a migration to overwrite it; stop that, or give another file")
            }
            Problem::TooSmall(bytes) => {
                write!(f, "its size is {bytes} bytes, less than one sector of {SECTOR}; make it larger")
            }
        }
    }
}

impl std::error::Error for OpenError {}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // of sizes that the tests chose
mod tests {
    use super::*;
    use crate::buffer::Buffer;
    use crate::work::Action;
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A file that is removed with its test.
    pub(super) struct TempFile {
        pub(super) path: PathBuf,
        pub(super) file: File,
    }

    impl TempFile {
        pub(super) fn new(name: &str) -> Self {
            Self::within(&std::env::temp_dir(), name)
        }

        pub(super) fn within(folder: &Path, name: &str) -> Self {
            static COUNT: AtomicU32 = AtomicU32::new(0);
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            let path = folder.join(format!("flexnbd-disk-{}-{count}-{name}", std::process::id()));
            let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
            Self { path, file }
        }
    }

    impl Drop for TempFile {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.path);
        }
    }

    /// A small generator (xorshift), so that a test can be repeated from its seed.
    pub(super) struct Random(u64);

    impl Random {
        pub(super) fn new(seed: u64) -> Self {
            Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
        }

        pub(super) fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 11) % bound
        }
    }

    /// A buffer filled with `bytes`.
    pub(super) fn buffer(bytes: &[u8]) -> Buffer {
        let mut buffer = Buffer::with_capacity(bytes.len());
        buffer.append(bytes);
        buffer
    }

    fn error(path: &Path) -> String {
        let text = Disk::open(path).err().unwrap().to_string();
        assert!(text.starts_with(&format!("cannot open {:?}: ", path.display())) && !text.contains('\n'), "{text}");
        text
    }

    #[test]
    fn a_rest_of_a_sector_is_not_served() {
        let temp = TempFile::new("tail");
        temp.file.set_len(2 * SECTOR + 100).unwrap();
        let disk = Disk::open(&temp.path).unwrap();
        assert_eq!((disk.size(), disk.tail(), disk.path()), (1024, 100, temp.path.as_path()));
        assert_eq!(disk.extent(0, u64::MAX), Extent { range: 0..1024, is_hole: true });
    }

    #[test]
    fn what_goes_in_comes_out() {
        let temp = TempFile::new("through");
        temp.file.set_len(8192).unwrap();
        let mut disk = Disk::open(&temp.path).unwrap();
        let write = Action::Write { offset: 5, payload: buffer(b"abc"), fua: true };
        disk.submit(Op { owner: 7, tag: 1, action: write }).unwrap();
        assert!(disk.pop_done().is_none(), "nothing happens before a kick");
        disk.kick();
        let done = disk.pop_done().unwrap();
        assert_eq!((done.owner, done.tag, done.touched), (7, 1, Some(5..8)));
        done.result.unwrap();
        assert_eq!((disk.in_flight(), disk.syncs()), (0, 1));
        let read = Action::Read { offset: 4, length: 5, skip_hole: false, buffer: Buffer::with_capacity(16) };
        disk.submit(Op { owner: 8, tag: 2, action: read }).unwrap();
        disk.kick();
        let done = disk.pop_done().unwrap();
        assert_eq!((done.owner, done.tag, done.touched), (8, 2, None));
        assert_eq!(done.buffer.unwrap().filled(), b"\0abc\0");
    }

    #[test]
    fn a_full_queue_hands_the_operation_back() {
        let temp = TempFile::new("full");
        temp.file.set_len(4096).unwrap();
        let mut disk = Disk::open(&temp.path).unwrap();
        let op = |tag| Op { owner: 0, tag, action: Action::Trim { offset: 0, length: 0, fua: false } };
        for tag in 0..MAX_OPS as u32 {
            disk.submit(op(tag)).unwrap();
        }
        assert_eq!(disk.submit(op(9999)).unwrap_err().tag, 9999);
        disk.kick();
        assert!(disk.submit(op(9999)).is_err(), "what is done counts until it is popped");
        assert_eq!(disk.pop_done().unwrap().tag, 0);
        disk.submit(op(9999)).unwrap();
        assert_eq!(disk.in_flight(), MAX_OPS);
    }

    #[test]
    #[should_panic(expected = "invariant 1")]
    fn a_range_beyond_the_end_is_a_mistake_of_the_caller() {
        let temp = TempFile::new("beyond");
        temp.file.set_len(4096).unwrap();
        let action = Action::Trim { offset: u64::MAX - 4, length: 8, fua: false };
        let _ = Disk::open(&temp.path).unwrap().submit(Op { owner: 0, tag: 0, action });
    }

    #[test]
    fn what_cannot_be_served_is_said_clearly() {
        let folder = std::env::temp_dir();
        assert!(error(&folder).contains("it is a directory"));
        assert!(error(Path::new("/dev/null")).contains("it is a character device"));
        assert!(error(&folder.join("flexnbd no such\nfile")).contains("does not exist"));

        let temp = TempFile::new("small");
        assert!(error(&temp.path).contains("0 bytes"));
        temp.file.set_len(511).unwrap();
        assert!(error(&temp.path).contains("511 bytes, less than one sector of 512"));
        assert!(error(&temp.path.join("below")).contains("cannot be read"));

        fs::remove_file(&temp.path).unwrap();
        let socket = UnixListener::bind(&temp.path).unwrap();
        assert!(error(&temp.path).contains("it is a socket"));
        drop(socket);

        fs::remove_file(&temp.path).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&temp.path).status().unwrap().success());
        assert!(error(&temp.path).contains("it is a FIFO"));

        // A program that runs cannot be written, not even by root.
        assert!(error(&std::env::current_exe().unwrap()).contains("cannot be written"));
    }
}
