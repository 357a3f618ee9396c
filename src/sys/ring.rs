//! A ring of operations on one file that the kernel carries out while this thread goes on: `io_uring(7)`.
//!
//! A [`Ring`] owns the buffer of each operation from push to completion, which is what makes its signatures safe: nobody
//! else can touch or free memory that the kernel reads or writes. It decides nothing: the rest of a short read, what an
//! error means, and which operations may be under way together are its caller's business.
//!
//! The life of an operation: `push_*` describes it in memory shared with the kernel, [`Ring::enter`] hands over what was
//! pushed and collects what has ended, [`Ring::pop`] gives the result and the buffer back. [`Ring::notifier`] becomes
//! readable when there is something to collect.
//!
//! Invariant 1: each operation that was pushed and not popped has its entry in `flights`, under the index that the kernel
//! knows it by, and its buffer lies there untouched.
//!
//! Invariant 2: there are never more than `in_flight_max` of them. Neither queue is shorter, so neither is ever full.

use super::{check, file, retry};
use crate::buffer::Buffer;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{opcode, squeue, EnterFlags, IoUring};
use slab::Slab;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::iter;
use std::marker::PhantomData;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::rc::Rc;

/// The most threads that the kernel may take for what it cannot do without waiting, apart from reads and writes that take one
/// each.
const WORKERS_MAX: u32 = 4;

/// The most threads of the kind that carries out what may never end, of a ring without such operations. The kernel takes zero
/// for «as many as you like».
const UNBOUND_WORKERS_MAX: u32 = 1;

/// Operations on one file that are under way in the kernel, and their buffers.
///
/// Dropping it waits until the kernel is done with every operation, those that were only pushed included. At the end of
/// the process, when a disk may hang, [`Ring::leak`] does not wait.
pub struct Ring {
    uring: IoUring,
    file: Rc<File>,
    /// The same file, opened once more.
    again: Option<Rc<File>>,
    notifier: OwnedFd,
    flights: Slab<Flight>,
    in_flight_max: usize,
    /// Of each read and write.
    flags: squeue::Flags,
    /// The kernel takes calls from the thread alone that opened the ring.
    _one_thread: PhantomData<*const ()>,
}

/// An operation that was pushed and not popped.
struct Flight {
    id: u32,
    buffer: Option<Buffer>,
}

/// The end of an operation.
#[derive(Debug)]
pub struct Completion {
    /// The number that it was pushed with.
    pub id: u32,
    /// The bytes read or written, which may be fewer than were asked for; zero for what moves no bytes.
    pub result: io::Result<usize>,
    /// The buffer that it was pushed with. What was read lies in its spare room and does not count as filled yet.
    pub buffer: Option<Buffer>,
}

impl Ring {
    /// A ring for at most `in_flight_max` operations at once on `file`, which needs Linux 6.1. With `threads_max`, the kernel
    /// carries out each read and write in a thread of its own, and takes at most so many for them. Without, it tries first,
    /// in this thread; a file on FUSE counts as ready at any time, so it tries 128 times.
    ///
    /// Only regular files and block devices are taken: operations on those always end. `file` loses `O_NONBLOCK`, under
    /// which the kernel waits for file systems without non-blocking reads in [`Ring::enter`] instead of in a thread. The
    /// limits are those of the thread that opens the ring: another ring of it changes them.
    pub fn open(file: &File, in_flight_max: u32, threads_max: Option<u32>) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ErrorKind::InvalidInput.into());
        }
        // The ring has a descriptor of its own rather than a registered file: the kernel lets go of registered files some
        // time after the process has ended, and until then a lock on the file would bar the next server.
        let file = Rc::new(file.try_clone()?);
        clear_nonblock(&file)?;
        let notifier = event_fd()?;
        let mut uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(in_flight_max)?;
        // Of a read or write that goes straight to a thread the kernel does not know the file yet, so it counts it among those
        // that may never end.
        uring.submitter().register_iowq_max_workers(&mut [WORKERS_MAX, threads_max.unwrap_or(UNBOUND_WORKERS_MAX)])?;
        try_out(&mut uring)?;
        uring.submitter().register_eventfd(notifier.as_raw_fd())?;
        let in_flight_max = in_flight_max as usize;
        let flights = Slab::with_capacity(in_flight_max);
        let flags = threads_max.map_or(squeue::Flags::empty(), |_| squeue::Flags::ASYNC);
        Ok(Self { uring, file, again: None, notifier, flights, in_flight_max, flags, _one_thread: PhantomData })
    }

    /// Takes the same file, opened once more, to be synced beside the first.
    pub fn set_again(&mut self, again: Option<Rc<File>>) {
        self.again = again;
    }

    /// Pushes a read of at most `len` bytes at `offset` of the file into the spare room of `buffer`, from `at` on, and of
    /// at most as many as there is room for. Hands the buffer back when the ring is full.
    pub fn push_read(&mut self, id: u32, buffer: Buffer, at: usize, offset: u64, len: usize) -> Result<(), Buffer> {
        let (fd, flags) = (self.fd(), self.flags);
        let Some((index, place)) = self.place(id) else { return Err(buffer) };
        let room = place.insert(buffer).spare().get_mut(at..).unwrap_or_default();
        let len = length(len.min(room.len()));
        let read = opcode::Read::new(fd, room.as_mut_ptr(), len).offset(position(offset)).build().flags(flags);
        // SAFETY: the memory is the room of the buffer in the place of `index`, and no longer than it.
        unsafe { self.push(index, read) };
        Ok(())
    }

    /// Pushes a write of at most `len` of the filled bytes of `buffer`, from `from` on, at `offset` of the file. Hands the
    /// buffer back when the ring is full.
    pub fn push_write(&mut self, id: u32, buffer: Buffer, from: usize, offset: u64, len: usize) -> Result<(), Buffer> {
        let (fd, flags) = (self.fd(), self.flags);
        let Some((index, place)) = self.place(id) else { return Err(buffer) };
        let bytes = place.insert(buffer).filled().get(from..).unwrap_or_default();
        let len = length(len.min(bytes.len()));
        let write = opcode::Write::new(fd, bytes.as_ptr(), len).offset(position(offset)).build().flags(flags);
        // SAFETY: the memory is what is filled of the buffer in the place of `index`, and the kernel only reads it.
        unsafe { self.push(index, write) };
        Ok(())
    }

    /// Pushes an fdatasync or, when `all` is true, an fsync, of the open file of that number: 0, or 1 for that of
    /// [`Ring::set_again`]. False: the ring is full, or there is no such file.
    #[must_use]
    pub fn push_sync(&mut self, id: u32, number: usize, all: bool) -> bool {
        let Some(file) = iter::once(&self.file).chain(self.again.as_ref()).nth(number) else { return false };
        let flags = if all { FsyncFlags::empty() } else { FsyncFlags::DATASYNC };
        let sync = opcode::Fsync::new(Fd(file.as_raw_fd())).flags(flags).build();
        // SAFETY: no memory is named.
        unsafe { self.push_bare(id, sync) }
    }

    /// Pushes what [`file::punch_hole`] does. False: the ring is full.
    #[must_use]
    pub fn push_punch_hole(&mut self, id: u32, offset: u64, length: u64) -> bool {
        let punch = opcode::Fallocate::new(self.fd(), length).offset(offset).mode(file::PUNCH_HOLE).build();
        // SAFETY: no memory is named.
        unsafe { self.push_bare(id, punch) }
    }

    /// Hands over what was pushed and collects what has ended. It does not wait for the disk. What the kernel has no
    /// memory for just now stays queued, buffers and all, and goes with the next call; so it does after an error.
    pub fn enter(&mut self) -> io::Result<()> {
        while self.queued() > 0 {
            match retry(|| self.uring.submit()) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => break,
                Err(error) => return Err(error),
            }
        }
        // One call collects one batch. A flag says that more has ended, for which no event will come, so we call again
        // while it is set. It may be stale and never clear, so the calls are counted: each collects one operation at
        // least, and as many calls as operations collect them all.
        let collected = self.uring.completion().len();
        for _ in collected..self.in_flight() {
            if !self.uring.submission().taskrun() {
                break;
            }
            let (to_submit, min_complete, flags) = (0, 0, EnterFlags::GETEVENTS.bits());
            // SAFETY: no memory is passed, and nothing is submitted.
            retry(|| unsafe { self.uring.submitter().enter::<libc::sigset_t>(to_submit, min_complete, flags, None) })?;
        }
        Ok(())
    }

    /// The next operation that has ended, of those that were collected.
    pub fn pop(&mut self) -> Option<Completion> {
        let flights = &mut self.flights;
        self.uring.completion().find_map(|ended| {
            let flight = usize::try_from(ended.user_data()).ok().and_then(|index| flights.try_remove(index));
            debug_assert!(flight.is_some(), "invariant 1");
            let Flight { id, buffer } = flight?;
            let errno = ended.result().saturating_neg();
            let result = usize::try_from(ended.result()).map_err(|_| io::Error::from_raw_os_error(errno));
            Some(Completion { id, result, buffer })
        })
    }

    /// Hands over what was pushed, and waits until there is something to pop. Returns at once when nothing is in flight.
    pub fn wait(&mut self) -> io::Result<()> {
        while self.in_flight() > 0 && self.uring.completion().is_empty() {
            retry(|| self.uring.submit_and_wait(1))?;
        }
        Ok(())
    }

    /// Becomes readable when something has ended. Whoever polls for edges need not read it: once [`Ring::enter`] has
    /// collected, what ends next is a new edge.
    pub fn notifier(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }

    /// How many operations were pushed and not popped.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// How many operations were pushed that the kernel has not taken yet: there is something to [`Ring::enter`] for.
    pub fn queued(&self) -> usize {
        // SAFETY: no other handle of the submission queue exists: each lives and ends within a method of this type, which
        // does not leave its thread.
        unsafe { self.uring.submission_shared() }.len()
    }

    /// Gives up the ring and the buffers of what is in flight, and waits for nothing. For the end of the process: the
    /// memory is never used again, for the kernel may still write to it.
    pub fn leak(self) {
        mem::forget(self);
    }

    fn fd(&self) -> Fd {
        Fd(self.file.as_raw_fd())
    }

    /// An index for one more operation and the place for its buffer, or `None` when the ring is full.
    fn place(&mut self, id: u32) -> Option<(usize, &mut Option<Buffer>)> {
        if self.flights.len() >= self.in_flight_max {
            return None;
        }
        let vacant = self.flights.vacant_entry();
        let index = vacant.key();
        Some((index, &mut vacant.insert(Flight { id, buffer: None }).buffer))
    }

    /// Pushes an operation without a buffer. False: the ring is full.
    ///
    /// # Safety
    ///
    /// `operation` names no memory.
    unsafe fn push_bare(&mut self, id: u32, operation: squeue::Entry) -> bool {
        let Some((index, _)) = self.place(id) else { return false };
        // SAFETY: the caller says that no memory is named.
        unsafe { self.push(index, operation) };
        true
    }

    /// Queues an operation under an index from [`Ring::place`].
    ///
    /// # Safety
    ///
    /// The memory that `operation` names, if any, lies within the buffer in the place of `index`. It is a piece of the heap
    /// that the buffer owns and never moves or reallocates. From here on nothing touches the buffer (invariant 1): it
    /// leaves its place in [`Ring::pop`] only, which takes an index from the kernel after its last access, and `flights`
    /// neither grows (invariant 2) nor is freed before the kernel is done: see `Drop` and [`Ring::leak`].
    unsafe fn push(&mut self, index: usize, operation: squeue::Entry) {
        let operation = operation.user_data(index as u64);
        // SAFETY: as above. The file stays open until the kernel is done: it looks the descriptor up when it begins.
        let pushed = unsafe { self.uring.submission().push(&operation) };
        debug_assert!(pushed.is_ok(), "invariant 2");
    }
}

impl Drop for Ring {
    /// Closing a ring does not wait for its operations, so this does: no buffer is freed while the kernel may write to it.
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                // Nobody can say when the kernel is done, so the buffers are never freed, and the descriptors never closed.
                mem::forget(mem::take(&mut self.flights));
                mem::forget((Rc::clone(&self.file), self.again.take()));
                return;
            }
            while self.pop().is_some() {}
        }
    }
}

/// Sends one operation through that does nothing: a ring that can be set up may still be forbidden to work.
fn try_out(uring: &mut IoUring) -> io::Result<()> {
    // SAFETY: no memory is named.
    let pushed = unsafe { uring.submission().push(&opcode::Nop::new().build()) };
    pushed.map_err(io::Error::other)?;
    retry(|| uring.submit_and_wait(1))?;
    match uring.completion().next().map(|ended| ended.result()) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
        None => Err(io::Error::other("the ring lost an operation")),
    }
}

fn event_fd() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = check(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: `fd` is open and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes `O_NONBLOCK` from a file and whoever shares it.
fn clear_nonblock(file: &File) -> io::Result<()> {
    // SAFETY: no memory is passed, and the descriptor is open while `file` is borrowed.
    let flags = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) }).map(drop)
}

/// A position as the kernel takes it: no file is longer, and the largest numbers of all mean «where the file stands».
fn position(offset: u64) -> u64 {
    offset.min(i64::MAX as u64)
}

/// A length as the kernel takes it; a longer one is a short read or write.
fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::file::{punch_hole, try_lock, unlock};
    use crate::sys::{monotonic_ms, scratch, wait_readable};
    use std::fs;
    use std::io::Read;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    const BLOCK: usize = 4096;

    /// Long enough for any disk, and an end for a test that would wait for ever.
    const PATIENCE_MS: u64 = 20_000;

    /// A ring, or `None` where the kernel has none or forbids it.
    fn open(file: &File, in_flight_max: u32) -> Option<Ring> {
        open_with(file, in_flight_max, None)
    }

    fn open_with(file: &File, in_flight_max: u32, threads_max: Option<u32>) -> Option<Ring> {
        match Ring::open(file, in_flight_max, threads_max) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => None,
            ring => Some(ring.unwrap()),
        }
    }

    /// A file of so many blocks, each full of its own number.
    fn numbered(blocks: u32) -> File {
        let file = scratch::file();
        let bytes: Vec<u8> = (0..blocks).flat_map(block).collect();
        file.write_all_at(&bytes, 0).unwrap();
        file.sync_all().unwrap();
        file
    }

    fn block(number: u32) -> Vec<u8> {
        number.to_le_bytes().repeat(BLOCK / 4)
    }

    /// Makes the next reads of a file wait for the disk, if it lies on one.
    fn forget(file: &File) {
        // SAFETY: no memory is passed, and the file is open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }

    fn filled(bytes: &[u8]) -> Buffer {
        let mut buffer = Buffer::with_capacity(bytes.len());
        buffer.append(bytes);
        buffer
    }

    /// Pops everything that was pushed, as an event loop does: enters when the notifier says so, and else sleeps.
    fn finish(ring: &mut Ring) -> Vec<Completion> {
        let deadline_ms = monotonic_ms() + PATIENCE_MS;
        let mut counter = File::from(ring.notifier().try_clone_to_owned().unwrap());
        let mut ended = Vec::new();
        ring.enter().unwrap();
        loop {
            ended.extend(iter::from_fn(|| ring.pop()));
            if ring.in_flight() == 0 {
                return ended;
            }
            let left_ms = deadline_ms.saturating_sub(monotonic_ms());
            assert!(wait_readable(ring.notifier(), left_ms).unwrap(), "{} never ended", ring.in_flight());
            // What waits here takes levels, not edges.
            counter.read_exact(&mut [0; 8]).unwrap();
            ring.enter().unwrap();
        }
    }

    /// The one operation that was pushed, ended.
    fn finish_one(ring: &mut Ring) -> Completion {
        let mut ended = finish(ring);
        assert_eq!(ended.len(), 1);
        ended.remove(0)
    }

    fn errno(result: io::Result<usize>) -> Option<i32> {
        result.unwrap_err().raw_os_error()
    }

    #[test]
    fn as_many_reads_as_there_is_room_for_fly_together_from_the_disk_and_from_the_cache() {
        const READS: u32 = 128;
        let file = numbered(1024);
        let number = |id: u32| id * 389 % 1024;
        for (threads_max, cold) in [(None, true), (None, false), (Some(4), true), (Some(4), false)] {
            let Some(mut ring) = open_with(&file, READS, threads_max) else { return };
            if cold {
                forget(&file);
            }
            for id in 0..READS {
                let offset = u64::from(number(id)) * BLOCK as u64;
                ring.push_read(id, Buffer::with_capacity(BLOCK), 0, offset, BLOCK).unwrap();
            }
            let refused = ring.push_read(READS, filled(b"mine"), 0, 0, BLOCK).unwrap_err();
            assert_eq!(refused.filled(), b"mine", "a full ring hands the buffer back");
            assert!(!ring.push_sync(READS, 0, false));
            assert_eq!((ring.in_flight(), ring.queued()), (128, 128));

            let mut ended = finish(&mut ring);
            ended.sort_by_key(|completion| completion.id);
            assert!(ended.iter().map(|completion| completion.id).eq(0..READS), "each ends once");
            for Completion { id, result, buffer } in ended {
                assert_eq!(result.unwrap(), BLOCK);
                let mut buffer = buffer.unwrap();
                assert!(buffer.is_empty(), "the caller says what is filled");
                assert_eq!(buffer.spare(), block(number(id)), "operation {id}");
            }
        }
    }

    #[test]
    fn a_read_goes_where_it_was_told_to_and_no_further() {
        let file = numbered(2);
        let Some(mut ring) = open(&file, 8) else { return };
        let mut buffer = Buffer::with_capacity(64);
        buffer.append(b"before");
        buffer.spare().fill(0xff);
        // Six bytes are filled and two are left out; eight follow.
        ring.push_read(7, buffer, 2, BLOCK as u64, 8).unwrap();
        let ended = finish_one(&mut ring);
        let mut buffer = ended.buffer.unwrap();
        assert_eq!((ended.id, ended.result.unwrap(), buffer.filled()), (7, 8, &b"before"[..]));
        assert_eq!(buffer.spare()[..12], [255, 255, 1, 0, 0, 0, 1, 0, 0, 0, 255, 255]);

        ring.push_read(8, buffer, 50, 0, usize::MAX).unwrap();
        let ended = finish_one(&mut ring);
        assert_eq!(ended.result.unwrap(), 8, "there was no room for more");
        ring.push_read(9, ended.buffer.unwrap(), 59, 0, 1).unwrap();
        assert_eq!(finish_one(&mut ring).result.unwrap(), 0);
    }

    #[test]
    fn a_read_ends_with_the_file() {
        let file = scratch::file();
        file.write_all_at(&[1; 5000], 0).unwrap();
        let Some(mut ring) = open(&file, 8) else { return };
        for (id, offset) in [(904, 4096), (0, 5000), (0, 8192)] {
            ring.push_read(id, Buffer::with_capacity(BLOCK), 0, offset, BLOCK).unwrap();
        }
        for ended in finish(&mut ring) {
            assert_eq!(ended.result.unwrap(), ended.id as usize);
        }
        // The kernel takes -1 for the position of the file, from where it could read.
        ring.push_read(0, Buffer::with_capacity(BLOCK), 0, u64::MAX, BLOCK).unwrap();
        assert!(!matches!(finish_one(&mut ring).result, Ok(1..)));
    }

    #[test]
    fn writes_and_what_changes_holes_are_as_without_a_ring() {
        [None, Some(4)].into_iter().for_each(change);
    }

    fn change(threads_max: Option<u32>) {
        let file = numbered(4);
        let Some(mut ring) = open_with(&file, 8, threads_max) else { return };
        ring.push_write(1, filled(b"--written--"), 2, 100, 7).unwrap();
        let ended = finish_one(&mut ring);
        assert_eq!((ended.id, ended.result.unwrap(), ended.buffer.unwrap().filled()), (1, 7, &b"--written--"[..]));
        let mut bytes = [0; 9];
        file.read_exact_at(&mut bytes, 99).unwrap();
        assert_eq!(bytes, *b"\0written\0");

        assert!(ring.push_sync(2, 0, false));
        let ended = finish_one(&mut ring);
        assert_eq!((ended.id, ended.result.unwrap(), ended.buffer.is_none()), (2, 0, true));
        assert!(!ring.push_sync(2, 1, false), "the file is open once");
        ring.set_again(Some(Rc::new(file.try_clone().unwrap())));
        assert!(ring.push_sync(2, 0, true) && ring.push_sync(2, 1, true) && !ring.push_sync(2, 2, true));
        assert!(finish(&mut ring).into_iter().map(|ended| ended.result.unwrap()).eq([0, 0]));

        let block_bytes = BLOCK as u64;
        let inline = punch_hole(&file, block_bytes, block_bytes).map(|()| 0);
        assert!(ring.push_punch_hole(3, 2 * block_bytes, block_bytes));
        let ended = finish_one(&mut ring).result;
        assert_eq!(ended.as_ref().map_err(io::Error::raw_os_error), inline.as_ref().map_err(io::Error::raw_os_error));
        if ended.is_ok() {
            let mut all = vec![0; 4 * BLOCK];
            file.read_exact_at(&mut all, 0).unwrap();
            assert_eq!(all[BLOCK..], [vec![0; 2 * BLOCK], block(3)].concat());
        }

        assert_eq!(file.metadata().unwrap().len(), 4 * block_bytes, "the size stays");
    }

    #[test]
    fn what_fails_fails_alone() {
        let file = numbered(1);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let (readable, writable) =
            (File::open(&path).unwrap(), fs::OpenOptions::new().write(true).open(&path).unwrap());
        let Some(mut ring) = open(&readable, 8) else { return };
        ring.push_write(0, filled(b"x"), 0, 0, 1).unwrap();
        ring.push_read(1, Buffer::with_capacity(BLOCK), 0, 0, BLOCK).unwrap();
        assert!(ring.push_punch_hole(2, 0, 0));
        let mut ended = finish(&mut ring);
        ended.sort_by_key(|completion| completion.id);
        let [write, read, punch] = ended.try_into().unwrap();
        assert_eq!((errno(write.result), write.buffer.unwrap().filled()), (Some(libc::EBADF), &b"x"[..]));
        assert_eq!(read.result.unwrap(), BLOCK);
        assert!(punch.result.is_err());

        let mut ring = open(&writable, 8).unwrap();
        ring.push_read(1, Buffer::with_capacity(BLOCK), 0, 0, BLOCK).unwrap();
        assert_eq!(errno(finish_one(&mut ring).result), Some(libc::EBADF));
    }

    #[test]
    fn a_wait_is_for_something_that_ends() {
        let file = numbered(1);
        let Some(mut ring) = open(&file, 8) else { return };
        ring.wait().unwrap();
        assert!(ring.pop().is_none());
        for id in 0..2 {
            ring.push_read(id, Buffer::with_capacity(BLOCK), 0, 0, BLOCK).unwrap();
        }
        ring.wait().unwrap();
        assert!(ring.pop().is_some());
        ring.wait().unwrap();
        assert!(ring.pop().is_some());
        assert_eq!((ring.in_flight(), ring.queued()), (0, 0));
        ring.wait().unwrap();
        assert!(ring.pop().is_none());
    }

    #[test]
    fn a_drop_waits_until_the_kernel_is_done() {
        let file = numbered(1024);
        let Some(mut ring) = open(&file, 128) else { return };
        forget(&file);
        for id in 0..100 {
            ring.push_read(id, Buffer::with_capacity(65536), 0, u64::from(id) * 40960, 65536).unwrap();
        }
        ring.enter().unwrap();
        ring.push_write(100, filled(b"late"), 0, 0, 4).unwrap();
        drop(ring);
        // Memory that was freed too early would be handed out here, and written to by the kernel.
        let memory: Vec<Vec<u8>> = (0..100).map(|_| vec![0xa5; 65536]).collect();
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, *b"late", "what was pushed last is done as well");
        thread::sleep(Duration::from_millis(20));
        assert!(memory.iter().flatten().all(|&byte| byte == 0xa5));
    }

    #[test]
    fn a_ring_that_is_leaked_is_not_waited_for() {
        let file = numbered(1);
        let Some(mut ring) = open(&file, 8) else { return };
        ring.push_write(0, filled(b"late"), 0, 0, 4).unwrap();
        ring.leak();
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [0; 4], "nothing that was pushed is done");
    }

    #[test]
    fn a_lock_on_the_file_ends_with_the_last_who_has_it_open() {
        let file = numbered(1);
        let again = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
        assert!(try_lock(&file, true).unwrap());
        let Some(mut ring) = open(&file, 8) else { return };
        ring.push_read(0, Buffer::with_capacity(BLOCK), 0, 0, BLOCK).unwrap();
        finish_one(&mut ring);
        drop(file);
        assert!(!try_lock(&again, true).unwrap(), "the ring has it open");
        drop(ring);
        assert!(try_lock(&again, true).unwrap());
        let third = File::options().write(true).open(format!("/proc/self/fd/{}", again.as_raw_fd())).unwrap();
        unlock(&again).unwrap();
        assert!(try_lock(&third, true).unwrap(), "or when it is given up");
    }

    #[test]
    fn what_would_wait_does_so_in_a_thread_of_the_kernel() {
        thread::spawn(|| {
            let file = scratch::memory_file();
            file.set_len(BLOCK as u64).unwrap();
            // As the disk opens its image: the kernel would wait in `enter`.
            let file = fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
                .unwrap();
            let Some(mut ring) = open(&file, 8) else { return };
            ring.push_read(0, Buffer::with_capacity(BLOCK), 0, 0, BLOCK).unwrap();
            assert_eq!(finish_one(&mut ring).result.unwrap(), BLOCK);
            assert_eq!(threads(), 1, "tmpfs reads in a thread");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_takes_a_thread_takes_at_most_so_many() {
        thread::spawn(|| {
            let file = numbered(4096);
            let Some(mut ring) = open_with(&file, 64, Some(2)) else { return };
            for cold in [false, true] {
                if cold {
                    forget(&file);
                }
                for id in 0..64 {
                    let offset = u64::from(id) * 64 * BLOCK as u64;
                    ring.push_read(id, Buffer::with_capacity(BLOCK), 0, offset, BLOCK).unwrap();
                }
                assert_eq!(finish(&mut ring).len(), 64);
                assert!((1..=2).contains(&threads()), "{}", threads());
            }
        })
        .join()
        .unwrap();
    }

    /// How many threads the kernel has for what this one has asked of it.
    fn threads() -> usize {
        // SAFETY: no memory is passed, and it cannot fail.
        let name = format!("iou-wrk-{}\n", unsafe { libc::gettid() });
        let tasks = fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok);
        tasks.filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|other| other == name)).count()
    }

    #[test]
    fn what_is_not_a_file_or_forbidden_is_an_error_of_open() {
        let refused = |result: io::Result<Ring>| result.err().unwrap();
        let (socket, _peer) = UnixStream::pair().unwrap();
        let socket = File::from(OwnedFd::from(socket));
        assert_eq!(refused(Ring::open(&socket, 8, None)).kind(), ErrorKind::InvalidInput, "a read of it may never end");
        let file = numbered(1);
        assert_eq!(refused(Ring::open(&file, 0, None)).raw_os_error(), Some(libc::EINVAL));
        for call in [libc::SYS_io_uring_setup, libc::SYS_io_uring_register, libc::SYS_io_uring_enter] {
            let file = file.try_clone().unwrap();
            let forbidden = thread::spawn(move || {
                forbid(call);
                refused(Ring::open(&file, 8, None)).raw_os_error()
            });
            assert_eq!(forbidden.join().unwrap(), Some(libc::EPERM), "system call {call}");
        }
    }

    /// Makes a system call fail with EPERM in this thread from now on, as the policy of a container does.
    fn forbid(call: libc::c_long) {
        let call = u32::try_from(call).unwrap();
        let denied = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).unwrap();
        let step = |code: u32, jf: u8, k: u32| libc::sock_filter { code: code.try_into().unwrap(), jt: 0, jf, k };
        // The number of the call is the first word of what a filter sees.
        let mut filter = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, call),
            step(libc::BPF_RET | libc::BPF_K, 0, denied),
            step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: filter.len().try_into().unwrap(), filter: filter.as_mut_ptr() };
        // SAFETY: no memory is passed. This thread gains no privileges any more, which a filter asks for.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }).unwrap();
        // SAFETY: `program` names `filter` and its length; both outlive the call, which copies them.
        check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) }).unwrap();
    }
}
