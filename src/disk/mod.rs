//! A disk image: a regular file or a block device, and a queue of operations on it.
//!
//! The way through is always [`Disk::submit`], [`Disk::kick`], [`Disk::pop_done`]. An operation owns its buffer until
//! it is done, so whoever asked may vanish meanwhile. What becomes of it is in `engine`; what the kernel does of it while
//! this thread goes on, in `ring` and `changes`; what waits is in `queue`; how long a step may take, in `pace`; what can be
//! read at once, in `reads`. The mark on its file is in `mark`. What holes are and how they stay is in `sparse`; what is called
//! beside the queue, and why that may be, is in `open`. There is no socket here and no word of a protocol.
//!
//! Operations that are queued together may be carried out in any order, and long ones in steps between others, so two
//! of them that overlap have no defined order unless the first was done when the second was submitted.
//!
//! Invariant 1: the range of an operation lies inside the image; its submitter has checked that.
//!
//! Invariant 2: `in_flight` is the number of operations submitted whose [`Done`] was not popped, at most [`OPS_MAX`].

mod changes;
mod commit;
mod engine;
mod hint;
mod image;
mod kernel;
mod mark;
mod open;
mod pace;
mod queue;
mod reads;
mod ring;
#[cfg(test)]
mod scripted;
#[cfg(test)]
mod scripted_changes;
#[cfg(test)]
mod slow;
mod sparse;
mod verify;
mod zero;

pub use image::SECTOR;
pub use open::{Access, OpenError};
pub use sparse::is_zero;

use crate::sys::clone::Cloning;
use crate::sys::pages::FileSystem;
use crate::work::{Done, Op};
use image::Image;
use log::info;
use ring::Flights;
use std::io;
use std::mem;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// The most operations in flight: more than 100 clients at 32 each, and under 1 MiB of queue.
pub const OPS_MAX: usize = 4096;

/// What an error of an operation means, for people.
pub fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the file has become shorter than the image".into(),
        _ => error.to_string(),
    }
}

/// Who waits for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineChoice {
    /// The kernel where it can (`io_uring`), else the thread that kicks.
    Auto,
    /// The thread that kicks.
    Sync,
    /// The kernel; without a ring the image does not open.
    Ring,
}

/// What carries operations out.
enum Engine {
    Real(Box<engine::Engine>),
    #[cfg(test)]
    Slow(Box<slow::Engine>),
}

/// An open image and the operations on it.
pub struct Disk {
    image: Image,
    path: PathBuf,
    access: Access,
    tail: u64,
    engine: Engine,
    in_flight: usize,
}

impl Disk {
    /// Opens a regular file or a block device. Where it is to be overwritten (`claim`), a block device must be in nobody's use,
    /// and nobody mounts it as long as it is open.
    pub fn open(path: &Path, access: Access, claim: bool, choice: EngineChoice) -> Result<Self, OpenError> {
        let (mut image, tail) = open::open(path, access, claim)?;
        let flights = Self::flights(&mut image, access, choice).map_err(|error| OpenError::no_ring(path, error))?;
        let engine = Engine::Real(Box::new(engine::Engine::new(&image, flights)));
        Ok(Self { image, path: path.to_owned(), access, tail, engine, in_flight: 0 })
    }

    /// A ring, where one is wanted and to be had; says so in the log. An image that is changed is opened once more for it.
    fn flights(image: &mut Image, access: Access, choice: EngineChoice) -> io::Result<Option<Flights>> {
        let why = match choice {
            EngineChoice::Sync => "as it was told".into(),
            EngineChoice::Auto if image.source == FileSystem::Memory => "because the image lies in memory".into(),
            EngineChoice::Auto | EngineChoice::Ring => {
                let again = if access == Access::ReadOnly { None } else { open::again(image) };
                match Flights::open(&image.file, again.clone()) {
                    Ok(flights) => {
                        info!("disk: engine ring");
                        image.again = again;
                        return Ok(Some(flights));
                    }
                    Err(error) if choice == EngineChoice::Ring => return Err(error),
                    Err(error) => format!("because there is no io_uring: {error}"),
                }
            }
        };
        info!("disk: engine sync, {why}");
        Ok(None)
    }

    /// An image of which each operation takes so long, and the thread that kicks does not wait.
    #[cfg(test)]
    pub(crate) fn open_slow(path: &Path, delay: std::time::Duration) -> Self {
        let disk = Self::open(path, Access::Alone, false, EngineChoice::Sync).unwrap();
        Self { engine: Engine::Slow(Box::new(slow::Engine::new(delay, &disk.image))), ..disk }
    }

    /// The size of the image in bytes, a multiple of [`SECTOR`] and not zero.
    pub fn size(&self) -> u64 {
        self.image.size
    }

    /// The bytes of the file beyond [`Disk::size`], which are not part of the image.
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Looks at the file again, which may have grown: from then on operations may go up to its new size. When it is smaller
    /// than before that is refused, with a sentence that says so, and all stays as it was.
    pub fn grow(&mut self) -> Result<(), String> {
        let grown = open::grow(&mut self.image);
        self.tail = grown.map_err(|why| format!("{}: {why}", self.path.display()))?;
        Ok(())
    }

    /// Starts to make a second file, at an absolute path, that shares the blocks of the image as it is now. What was written is
    /// in it when it is durable.
    pub fn clone_to(&mut self, copy: &Path) -> io::Result<Cloning> {
        let cloning = open::clone_to(&self.image, copy)?;
        self.image.is_copied = true;
        Ok(cloning)
    }

    /// That has ended.
    pub fn clone_ended(&mut self) {
        self.image.is_copied = false;
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it was opened for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// True for a block device.
    pub fn is_device(&self) -> bool {
        self.image.is_device
    }

    /// Says to other servers of this machine that the image is open here for writing, as the only one (`alone`) or as one of
    /// several. When that is refused, the lock that was there before stays. A file system without locks has none.
    pub fn lock(&self, alone: bool) -> Result<(), OpenError> {
        open::lock(&self.image, &self.path, alone)
    }

    /// About how many bytes of the image are data, and not holes.
    pub fn allocated(&self) -> u64 {
        open::allocated(&self.image)
    }

    /// The name of the file, not of a link to it. An error when the path names another file by now.
    pub fn named_path(&self) -> io::Result<PathBuf> {
        open::named_path(&self.image, &self.path)
    }

    /// Removes the name of the file; what is open stays.
    pub fn unlink(&self) -> io::Result<()> {
        open::unlink(&self.image, &self.path)
    }

    /// The mark on the image, if there is one and it can be had.
    pub fn mark(&self) -> io::Result<Option<Vec<u8>>> {
        mark::get(&self.image)
    }

    /// Removes the mark, durably. The thread waits for that: it is for the start, when there are no clients.
    pub fn clear_mark(&self) -> io::Result<()> {
        mark::set(&self.image, None)?;
        self.image.file.sync_all()
    }

    /// Queues a change of the mark, or its removal: one more operation, which is done when it is on stable storage with all
    /// that was done before, or, where it need not be `durable`, at once. False: [`OPS_MAX`] are in flight.
    /// [`io::ErrorKind::Unsupported`]: there can be no mark, on a block device and on some file systems.
    #[must_use]
    pub fn submit_mark(&mut self, owner: u64, tag: u32, mark: Option<String>, durable: bool) -> bool {
        let has_room = self.has_room();
        if has_room {
            self.in_flight += 1;
            match &mut self.engine {
                Engine::Real(engine) => engine.submit_mark(owner, tag, mark, durable),
                #[cfg(test)]
                Engine::Slow(engine) => engine.submit_mark(owner, tag, mark, durable),
            }
        }
        has_room
    }

    /// Queues an operation, or hands it back when [`OPS_MAX`] are in flight. It has to lie inside the image.
    pub fn submit(&mut self, op: Op) -> Result<(), Op> {
        debug_assert!(op.action.fits(self.image.size), "invariant 1");
        if !self.has_room() {
            return Err(op);
        }
        self.in_flight += 1;
        match &mut self.engine {
            Engine::Real(engine) => engine.submit(op),
            #[cfg(test)]
            Engine::Slow(engine) => engine.submit(op),
        }
        Ok(())
    }

    /// Works through the queue for about a millisecond, each owner in turn. Operations that ask for stable storage share an
    /// fdatasync at the end and are done after it. While [`Disk::has_work`], there is more to do.
    pub fn kick(&mut self) {
        match &mut self.engine {
            Engine::Real(engine) => engine.kick(&self.image),
            #[cfg(test)]
            Engine::Slow(engine) => engine.kick(&self.image),
        }
    }

    /// True when there is something to kick, or to pop: an operation that [`Disk::forget`] has dropped is done at once. What
    /// is in flight without that completes by itself, and [`Disk::notifier`] says when.
    pub fn has_work(&self) -> bool {
        match &self.engine {
            Engine::Real(engine) => engine.has_work() || engine.has_done(),
            #[cfg(test)]
            Engine::Slow(engine) => engine.has_work(),
        }
    }

    /// Becomes readable, anew each time, when an operation has completed by itself and a kick would hand it over. `None`:
    /// no operation completes by itself.
    pub fn notifier(&self) -> Option<BorrowedFd<'_>> {
        match &self.engine {
            Engine::Real(engine) => engine.notifier(),
            #[cfg(test)]
            Engine::Slow(engine) => Some(engine.notifier()),
        }
    }

    /// The next operation that is done.
    pub fn pop_done(&mut self) -> Option<Done> {
        let done = match &mut self.engine {
            Engine::Real(engine) => engine.pop_done(),
            #[cfg(test)]
            Engine::Slow(engine) => engine.pop_done(),
        }?;
        debug_assert!(self.in_flight > 0, "invariant 2");
        self.in_flight = self.in_flight.saturating_sub(1);
        Some(done)
    }

    /// Drops the operations of an owner that is gone: what is queued changes the image no more. Each is done with an error, and
    /// its buffer comes back with [`Disk::pop_done`]. What the kernel has in hand goes on ([`Disk::flying`]).
    pub fn forget(&mut self, owner: u64) {
        match &mut self.engine {
            Engine::Real(engine) => engine.forget(owner),
            #[cfg(test)]
            Engine::Slow(engine) => engine.forget(owner),
        }
    }

    /// The owners of the operations that the kernel has in hand now, one for each operation. Nothing stops those.
    pub fn flying(&self) -> Vec<u64> {
        match &self.engine {
            Engine::Real(engine) => engine.flying(),
            #[cfg(test)]
            Engine::Slow(engine) => engine.flying(),
        }
    }

    /// True when [`Disk::submit`] would take an operation.
    pub fn has_room(&self) -> bool {
        self.in_flight < OPS_MAX
    }

    /// How many operations were submitted and not popped.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The name of what carries operations out: `ring` where the kernel does what would keep this thread waiting, else `sync`.
    pub fn engine(&self) -> &'static str {
        match &self.engine {
            Engine::Real(engine) if engine.has_ring() => "ring",
            Engine::Real(_) => "sync",
            #[cfg(test)]
            Engine::Slow(_) => "sync",
        }
    }

    /// Hardly waits for what the kernel has in hand: for the end of the process, when the disk may hang. The memory of such
    /// operations is never used again. The image's lock ends here and not with them, unless one of them changes the image:
    /// then it ends with the last of them. Without this, to drop the disk waits until the kernel is done with it.
    pub fn leak(mut self) {
        let is_changing = match &mut self.engine {
            Engine::Real(engine) => engine.leak(),
            #[cfg(test)]
            Engine::Slow(_) => false,
        };
        if !is_changing {
            open::unlock(&self.image);
        }
        // To close a file of another process may wait for a change of it; the kernel does that at the end of this one.
        mem::forget(self.image);
    }

    /// How many times fdatasync was called since the image was opened.
    pub fn syncs(&self) -> u64 {
        match &self.engine {
            Engine::Real(engine) => engine.syncs(),
            #[cfg(test)]
            Engine::Slow(_) => 0,
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]
mod tests {
    use super::*;
    use crate::buffer::Buffer;
    use crate::work::Action;
    use std::fs;
    use std::fs::File;
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

    fn open(path: &Path) -> Result<Disk, OpenError> {
        Disk::open(path, Access::Alone, false, EngineChoice::Sync)
    }

    fn error(path: &Path) -> String {
        let text = open(path).err().unwrap().to_string();
        assert!(text.starts_with(&format!("cannot open {:?}: ", path.display())) && !text.contains('\n'), "{text}");
        text
    }

    #[test]
    fn a_rest_of_a_sector_is_not_served() {
        let temp = TempFile::new("tail");
        temp.file.set_len(2 * SECTOR + 100).unwrap();
        let disk = open(&temp.path).unwrap();
        assert_eq!((disk.size(), disk.tail(), disk.path()), (1024, 100, temp.path.as_path()));
    }

    #[test]
    fn what_goes_in_comes_out() {
        let temp = TempFile::new("through");
        temp.file.set_len(8192).unwrap();
        let mut disk = open(&temp.path).unwrap();
        let write = Action::Write { offset: 5, payload: buffer(b"abc"), fua: true, follows: false };
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
        let mut disk = open(&temp.path).unwrap();
        let op = |tag| Op { owner: 0, tag, action: Action::Trim { offset: 0, length: 0, fua: false } };
        for tag in 0..OPS_MAX as u32 {
            disk.submit(op(tag)).unwrap();
        }
        assert_eq!(disk.submit(op(9999)).unwrap_err().tag, 9999);
        disk.kick();
        assert!(disk.submit(op(9999)).is_err(), "what is done counts until it is popped");
        assert_eq!(disk.pop_done().unwrap().tag, 0);
        disk.submit(op(9999)).unwrap();
        assert_eq!(disk.in_flight(), OPS_MAX);
    }

    #[test]
    #[should_panic(expected = "invariant 1")]
    fn a_range_beyond_the_end_is_a_mistake_of_the_caller() {
        let temp = TempFile::new("beyond");
        temp.file.set_len(4096).unwrap();
        let action = Action::Trim { offset: u64::MAX - 4, length: 8, fua: false };
        let _ = open(&temp.path).unwrap().submit(Op { owner: 0, tag: 0, action });
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
