//! What is asked of a ring, and what comes back from it.

use super::queue::Job;
use crate::buffer::Buffer;
use crate::sys::ring::{Completion, Ring};
use std::io;
use std::os::fd::BorrowedFd;

/// What is asked of a ring. Tests have one that does as it is told.
pub(super) trait Kernel {
    fn push_read(&mut self, id: u32, buffer: Buffer, offset: u64, len: usize) -> Result<(), Buffer>;
    fn push_write(&mut self, id: u32, buffer: Buffer, from: usize, offset: u64, len: usize) -> Result<(), Buffer>;
    fn push_punch_hole(&mut self, id: u32, offset: u64, length: u64) -> bool;
    fn push_sync(&mut self, id: u32, number: usize, all: bool) -> bool;
    fn enter(&mut self) -> io::Result<()>;
    fn pop(&mut self) -> Option<Completion>;
    fn is_stuck(&self) -> bool;
    fn notifier(&self) -> BorrowedFd<'_>;
    fn leak(self: Box<Self>);
}

impl Kernel for Ring {
    fn push_read(&mut self, id: u32, buffer: Buffer, offset: u64, len: usize) -> Result<(), Buffer> {
        self.push_read(id, buffer, 0, offset, len)
    }

    fn push_write(&mut self, id: u32, buffer: Buffer, from: usize, offset: u64, len: usize) -> Result<(), Buffer> {
        self.push_write(id, buffer, from, offset, len)
    }

    fn push_punch_hole(&mut self, id: u32, offset: u64, length: u64) -> bool {
        self.push_punch_hole(id, offset, length)
    }

    fn push_sync(&mut self, id: u32, number: usize, all: bool) -> bool {
        self.push_sync(id, number, all)
    }

    fn enter(&mut self) -> io::Result<()> {
        self.enter()
    }

    fn pop(&mut self) -> Option<Completion> {
        self.pop()
    }

    /// True when the kernel has nothing in hand and has not taken what was pushed: nothing but another try gets it on.
    fn is_stuck(&self) -> bool {
        self.queued() > 0 && self.queued() == self.in_flight()
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        self.notifier()
    }

    fn leak(self: Box<Self>) {
        (*self).leak();
    }
}

/// What has come back from the kernel.
pub(super) enum Landed {
    /// An operation has ended.
    Ended(Job, io::Result<()>),
    /// A piece of an operation is done, and the next may be cached.
    Onward(Job),
    /// The kernel gave the operation up without a try: it had no thread for it.
    Cancelled(Job),
    /// The fdatasync of a group has ended. `None`: the kernel gave it up, which says nothing about what was written.
    Synced(usize, Option<io::Result<()>>),
}

/// True for an error of the moment: the operation is tried again.
pub(super) fn is_brief(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR))
}
