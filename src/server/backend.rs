//! What stands behind the requests: an image on a disk, or another server that has it. Whoever asks does not know which.

use crate::disk::{Access, Disk, OPS_MAX};
use crate::proto::export::Export;
use crate::upstream::Upstream;
use crate::work::{Done, Op};
use std::os::fd::BorrowedFd;

/// Where operations go.
pub(super) enum Backend {
    /// An image.
    Disk(Box<Disk>),
    /// Another server.
    Upstream(Box<Standby>),
}

/// Another server as a backend. Its connection is a slot of the loop, which comes and goes; this stays.
pub(super) struct Standby {
    /// What it owes.
    pub core: Upstream,
    /// How people name it.
    pub name: String,
    /// What clients were told it is; nothing (0 bytes) before it was reached for the first time.
    pub export: Export,
}

impl Backend {
    /// What clients see of it.
    pub(super) fn export(&self) -> Export {
        match self {
            Self::Disk(disk) => {
                Export { size: disk.size(), read_only: disk.access() == Access::ReadOnly, flushes: true, several: true }
            }
            Self::Upstream(upstream) => upstream.export,
        }
    }

    /// How people name it: by its path or its address.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Disk(disk) => disk.path().display().to_string(),
            Self::Upstream(upstream) => upstream.name.clone(),
        }
    }

    /// The image, where it is one.
    pub(super) fn disk(&self) -> Option<&Disk> {
        match self {
            Self::Disk(disk) => Some(disk),
            Self::Upstream(_) => None,
        }
    }

    /// The same, to change it.
    pub(super) fn disk_mut(&mut self) -> Option<&mut Disk> {
        match self {
            Self::Disk(disk) => Some(disk),
            Self::Upstream(_) => None,
        }
    }

    /// What the other server owes, where it is one.
    pub(super) fn upstream(&mut self) -> Option<&mut Standby> {
        match self {
            Self::Disk(_) => None,
            Self::Upstream(upstream) => Some(upstream),
        }
    }

    /// True when [`Backend::submit`] would take an operation.
    pub(super) fn has_room(&self) -> bool {
        self.in_flight() < OPS_MAX
    }

    /// How many operations were submitted and not popped.
    pub(super) fn in_flight(&self) -> usize {
        match self {
            Self::Disk(disk) => disk.in_flight(),
            Self::Upstream(upstream) => upstream.core.len(),
        }
    }

    /// Takes an operation, or hands it back when there is no room. It has to lie inside the export.
    pub(super) fn submit(&mut self, op: Op) -> Result<(), Op> {
        match self {
            Self::Disk(disk) => disk.submit(op),
            Self::Upstream(upstream) if upstream.core.len() < OPS_MAX => {
                upstream.core.submit(op);
                Ok(())
            }
            Self::Upstream(_) => Err(op),
        }
    }

    /// Takes a change of the mark on the image, as [`Disk::submit_mark`] does. False: there is no room, or no image.
    #[must_use]
    pub(super) fn submit_mark(&mut self, owner: u64, tag: u32, mark: Option<String>, durable: bool) -> bool {
        match self {
            Self::Disk(disk) => disk.submit_mark(owner, tag, mark, durable),
            Self::Upstream(_) => false,
        }
    }

    /// Works for a while. What another server is asked, its slot sends.
    pub(super) fn kick(&mut self) {
        match self {
            Self::Disk(disk) => disk.kick(),
            Self::Upstream(_) => {}
        }
    }

    /// True when there is something to kick or to pop.
    pub(super) fn has_work(&self) -> bool {
        match self {
            Self::Disk(disk) => disk.has_work(),
            Self::Upstream(upstream) => upstream.core.has_done(),
        }
    }

    /// The next operation that is done.
    pub(super) fn pop_done(&mut self) -> Option<Done> {
        match self {
            Self::Disk(disk) => disk.pop_done(),
            Self::Upstream(upstream) => upstream.core.pop_done(),
        }
    }

    /// Drops the operations of an owner that is gone; what others have in hand goes on ([`Backend::flying`]).
    pub(super) fn forget(&mut self, owner: u64) {
        match self {
            Self::Disk(disk) => disk.forget(owner),
            Self::Upstream(upstream) => upstream.core.forget(owner),
        }
    }

    /// The owners of the operations that the kernel or the other server has in hand, one for each operation.
    pub(super) fn flying(&self) -> Vec<u64> {
        match self {
            Self::Disk(disk) => disk.flying(),
            Self::Upstream(upstream) => upstream.core.flying(),
        }
    }

    /// Becomes readable when an operation has completed by itself, if one can.
    pub(super) fn notifier(&self) -> Option<BorrowedFd<'_>> {
        self.disk().and_then(Disk::notifier)
    }

    /// Waits for nothing, at the end of the process.
    pub(super) fn leak(self) {
        match self {
            Self::Disk(disk) => disk.leak(),
            Self::Upstream(_) => {}
        }
    }
}
