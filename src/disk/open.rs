//! What can be served and how anything else is refused; and the other calls that bypass the queue.
//!
//! These calls are synchronous because each is rare and short. The image is opened and locked before it is served; a later
//! lock only downgrades the first. `fstat` of an open file, which the status of a migration takes, is answered from memory.
//! At the end of a migration the name of the file is removed while the image stays open, so no block is freed, and the fsync
//! of its folder writes one entry; clients are paused anyway.

use super::image::{Image, SECTOR};
use crate::sys;
use crate::sys::clone::Cloning;
use crate::sys::pages::FileSystem;
use std::fmt;
use std::fs::{self, File, FileType, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Whether an image is to be changed here, and what other servers of this machine may do meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It is changed, and no other server may change it.
    Alone,
    /// It is changed, and other servers may change it, too.
    Shared,
    /// It is not changed; what others do with it is their affair.
    ReadOnly,
}

/// Opens a regular file or a block device. Also returns the number of bytes beyond its last whole
/// sector.
pub(super) fn open(path: &Path, access: Access, claim: bool) -> Result<(Image, u64), OpenError> {
    try_open(path, access, claim).map_err(|problem| OpenError { path: path.to_owned(), problem })
}

fn try_open(path: &Path, access: Access, claim: bool) -> Result<(Image, u64), Problem> {
    // Look at the kind before opening: opening a FIFO or a character device can wait, or have an effect.
    let kind = fs::metadata(path).map_err(Problem::from_lookup)?.file_type();
    if let Some(name) = unfit(kind) {
        return Err(Problem::Kind(name));
    }
    let mut options = OpenOptions::new();
    let claims = if claim && kind.is_block_device() { libc::O_EXCL } else { 0 };
    // If it has become a FIFO meanwhile, O_NONBLOCK keeps this from waiting, and the seek fails.
    options.read(true).write(access != Access::ReadOnly).custom_flags(libc::O_NONBLOCK | claims);
    let mut file = options.open(path).map_err(|error| match File::open(path) {
        _ if claims != 0 && error.raw_os_error() == Some(libc::EBUSY) => Problem::Claimed,
        Ok(_) if access != Access::ReadOnly => Problem::NotWritable(error),
        Ok(_) => Problem::NotReadable(error),
        Err(error) => Problem::NotReadable(error),
    })?;
    let (size, tail) = measure(&mut file).map_err(Problem::NotReadable)?;
    if size == 0 {
        return Err(Problem::TooSmall(tail));
    }
    let source = sys::pages::file_system(&file).unwrap_or(FileSystem::Local);
    Ok((Image { file, again: None, size, is_device: kind.is_block_device(), source, is_copied: false }, tail))
}

/// Opens the same file once more, whatever its path names by now, where two open files can be synced as well as one. To be
/// synced, it need not be writable.
pub(super) fn again(image: &Image) -> Option<Rc<File>> {
    let path = format!("/proc/self/fd/{}", image.file.as_raw_fd());
    let is_safe = sys::pages::tells_each_open_file(&image.file).unwrap_or(false);
    is_safe.then(|| File::open(path).map(Rc::new).ok()).flatten()
}

/// The bytes of its whole sectors, and of the rest.
fn measure(mut file: impl Seek) -> io::Result<(u64, u64)> {
    // The metadata of a block device have no length.
    let bytes = file.seek(SeekFrom::End(0))?;
    Ok((bytes - bytes % SECTOR, bytes % SECTOR))
}

/// As [`super::Disk::grow`]. Also returns the number of bytes beyond the last whole sector.
pub(super) fn grow(image: &mut Image) -> Result<u64, String> {
    let (size, tail) = measure(&image.file).map_err(|error| format!("it cannot be looked at: {error}"))?;
    if size < image.size {
        let served = image.size;
        return Err(format!(
            "it has {size} bytes now and {served} are served, which may be in use; make it that large again"
        ));
    }
    image.size = size;
    Ok(tail)
}

/// As [`super::Disk::clone_to`].
pub(super) fn clone_to(image: &Image, copy: &Path) -> io::Result<Cloning> {
    Cloning::start(&image.file, copy)
}

/// As [`super::Disk::lock`].
pub(super) fn lock(image: &Image, path: &Path, alone: bool) -> Result<(), OpenError> {
    match sys::file::try_lock(&image.file, alone) {
        Ok(false) => Err(OpenError { path: path.to_owned(), problem: Problem::InUse { alone } }),
        Ok(true) | Err(_) => Ok(()),
    }
}

/// Ends the lock on the image.
pub(super) fn unlock(image: &Image) {
    // If it cannot be ended now, it ends with the open file.
    let _ = sys::file::unlock(&image.file);
}

/// As [`super::Disk::allocated`].
pub(super) fn allocated(image: &Image) -> u64 {
    let blocks = if image.is_device { None } else { image.file.metadata().ok().map(|file| file.blocks()) };
    blocks.map_or(image.size, |blocks| blocks.saturating_mul(512).min(image.size))
}

/// As [`super::Disk::named_path`].
pub(super) fn named_path(image: &Image, path: &Path) -> io::Result<PathBuf> {
    let path = fs::canonicalize(path)?;
    let (named, open) = (fs::symlink_metadata(&path)?, image.file.metadata()?);
    if (named.dev(), named.ino()) != (open.dev(), open.ino()) {
        return Err(io::Error::other("the path names another file by now"));
    }
    Ok(path)
}

/// As [`super::Disk::unlink`].
pub(super) fn unlink(image: &Image, path: &Path) -> io::Result<()> {
    let path = named_path(image, path)?;
    fs::remove_file(&path)?;
    // Without this a power failure could bring the name back, when somebody relies on it being gone. It is gone by now, so
    // an error does not fail the operation.
    let synced = path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all());
    synced.unwrap_or_else(|error| log::warn!("{}: the unlink may not be durable: {error}", path.display()));
    Ok(())
}

/// What kind of file it is if it cannot be served, `None` if it can.
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
    Claimed,
    NoRing(io::Error),
}

impl OpenError {
    /// The ring that was asked for is not to be had.
    pub(super) fn no_ring(path: &Path, error: io::Error) -> Self {
        Self { path: path.to_owned(), problem: Problem::NoRing(error) }
    }
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
        // Quoted, so that the message stays one line even with a line break in the path.
        write!(f, "cannot open {:?}: ", self.path.display())?;
        match &self.problem {
            Problem::Missing => f.write_str("it does not exist; create it first, with the size the disk shall have"),
            Problem::Kind(kind) => write!(f, "it is {kind}; give a regular file or a block device"),
            Problem::NotReadable(error) => write!(f, "it cannot be read: {error}; let this user read and write it"),
            Problem::NotWritable(error) => {
                write!(f, "it cannot be written: {error}; let this user write it, or serve it with --read-only")
            }
            Problem::InUse { alone: true } => f.write_str(
                "another server has it open; stop that one, or give another file. Several servers of one image \
                             need --shared-image, each of them",
            ),
            Problem::InUse { alone: false } => f.write_str(
                "another server has it open as the only one; stop that one, or start it with --shared-image, too",
            ),
            Problem::Claimed => f.write_str(
                "it is a block device in use: mounted, swapped to, a part of a volume, or open in a program that wants it \
                 alone. lsblk may show by what; free it, or give another",
            ),
            Problem::NoRing(error) => write!(
                f,
                "--disk-engine ring needs io_uring, and there is none: {error}; it takes Linux 6.1, which neither the \
                 sysctl kernel.io_uring_disabled nor the policy of a container may forbid it. Without the option, the \
                 image is served all the same"
            ),
            Problem::TooSmall(bytes) => {
                write!(f, "its size is {bytes} bytes, less than one sector of {SECTOR}; make it larger")
            }
        }
    }
}

impl std::error::Error for OpenError {}
