//! What of a file can be had without waiting for its disk, and the kind of file system, which says how to find out.

use super::file::off;
use super::{check, retry};
use std::ffi::{c_long, c_uint};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

/// The number of the system call `cachestat`, for which the C library has no function.
const SYS_CACHESTAT: c_long = 451;

/// File systems that keep their files in memory.
const MEMORY: [u32; 2] = [
    0x0102_1994, // tmpfs
    0x8584_58f6, // ramfs
];

/// File systems that ask another process or another machine, if only for a lock.
const DISTRIBUTED: [u32; 9] = [
    0x6573_5546, // FUSE
    0x0000_6969, // NFS
    0x00c3_6400, // Ceph
    0x0102_1997, // 9p
    0x0000_517b, // SMB, in three generations
    0xff53_4d42,
    0xfe53_4d42,
    0x0116_1970, // GFS2
    0x7461_636f, // OCFS2
];

/// File systems that tell each open file of an error of writing back, as the kernel does for them.
const TOLD_EACH: [u32; 4] = [
    0x0000_ef53, // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // btrfs
    0xf2f5_2010, // F2FS
];

/// Where the bytes of a file come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// A disk under a file system of this kernel, or a block device.
    Local,
    /// Memory.
    Memory,
    /// Other machines or another process: every call may wait for them.
    Distributed,
}

/// The range that `cachestat` is asked about, in bytes.
#[repr(C)]
struct CacheRange {
    offset: u64,
    length: u64,
}

/// What `cachestat` answers, in pages.
#[repr(C)]
#[derive(Default)]
struct CacheStat {
    cached: u64,
    dirty: u64,
    in_writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Reads what is in the page cache, up to the first byte that is not. [`io::ErrorKind::WouldBlock`] when there is none;
/// some kernels say zero instead, so zero does not mean the end of the file. EOPNOTSUPP where the file system cannot do
/// it. It may still wait for the metadata that says where the bytes lie.
pub fn read_nowait(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let offset = off(offset)?;
    let target = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    retry(|| {
        // SAFETY: `target` is one valid iovec, as the count says, and its memory is that of `bytes`, to be written. The
        // descriptor is open while `file` is borrowed.
        let read = unsafe { libc::preadv2(file.as_raw_fd(), &raw const target, 1, offset, libc::RWF_NOWAIT) };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    })
}

/// True when every page of a range is in the page cache. A page counts from the moment that a read of it began, so a
/// caller has to know of those that it began itself. ENOSYS before Linux 6.5.
pub fn is_cached(file: &File, offset: u64, length: u64) -> io::Result<bool> {
    // The kernel takes no bytes for «all up to the end of the file».
    let Some(last) = length.checked_sub(1).map(|beyond_first| offset.saturating_add(beyond_first)) else {
        return Ok(true);
    };
    let range = CacheRange { offset, length };
    let mut answer = CacheStat::default();
    let flags: c_uint = 0;
    // SAFETY: both structures are laid out as the kernel's own; it reads the first and fills the second. The descriptor
    // is open while `file` is borrowed.
    let result = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut answer, flags) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    let page = page_bytes();
    Ok(answer.cached > last / page - offset / page)
}

/// The size of a page of memory in bytes.
fn page_bytes() -> u64 {
    // SAFETY: no memory is passed.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4096).max(1)
}

/// Where the bytes of a file come from. What is not known is a disk.
pub fn file_system(file: &File) -> io::Result<FileSystem> {
    if !file.metadata()?.is_file() {
        // A device lies in the file system of its node, which says nothing about it.
        return Ok(FileSystem::Local);
    }
    let magic = magic(file)?;
    Ok(match magic {
        _ if MEMORY.contains(&magic) => FileSystem::Memory,
        _ if DISTRIBUTED.contains(&magic) => FileSystem::Distributed,
        _ => FileSystem::Local,
    })
}

/// True when a lost write is known to fail the next sync of each open file: on a block device and on some file systems.
/// Others may tell the first that asks, and no other.
pub fn tells_each_open_file(file: &File) -> io::Result<bool> {
    Ok(!file.metadata()?.is_file() || TOLD_EACH.contains(&magic(file)?))
}

/// The number of the kind of file system that a file lies in.
fn magic(file: &File) -> io::Result<u32> {
    let mut found = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `found` is a valid statfs for the call to fill, and the descriptor is open while `file` is borrowed.
    retry(|| check(unsafe { libc::fstatfs(file.as_raw_fd(), found.as_mut_ptr()) }))?;
    // SAFETY: zeroed memory is a valid statfs, and the call has filled it.
    let found = unsafe { found.assume_init() };
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "the numbers have 32 bits; the type of the field differs between architectures"
    )]
    let magic = found.f_type as u32;
    Ok(magic)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::scratch;
    use std::io::ErrorKind;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_read_that_does_not_wait_reads_what_is_cached_and_no_further_than_the_end() {
        let file = scratch::file();
        file.write_all_at(&[7; 5000], 0).unwrap();
        let mut bytes = [0; 4096];
        match read_nowait(&file, &mut bytes, 1000) {
            Ok(n) => assert_eq!((n, bytes[..4000] == [7; 4000], bytes[4000]), (4000, true, 0)),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP)),
        }
        assert_eq!(read_nowait(&file, &mut bytes, u64::MAX).unwrap_err().kind(), ErrorKind::InvalidInput);
    }

    #[test]
    fn a_range_is_cached_when_all_of_its_pages_are() {
        let file = scratch::file();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&vec![7; 65536], 0).unwrap();
        let cached = match is_cached(&file, 0, 65536) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => return,
            cached => cached.unwrap(),
        };
        assert!(cached);
        assert!(is_cached(&file, 65535, 1).unwrap());
        assert!(!is_cached(&file, 65535, 2).unwrap(), "the last byte is in another page");
        assert!(!is_cached(&file, 65536, 4096).unwrap());
        assert!(is_cached(&file, 1 << 19, 0).unwrap(), "nothing is not everything up to the end");
        assert!(!is_cached(&file, u64::MAX, u64::MAX).unwrap_or(false));
    }

    #[test]
    fn a_file_comes_from_where_its_file_system_has_it() {
        assert_eq!(file_system(&scratch::memory_file()).unwrap(), FileSystem::Memory);
        assert_eq!(file_system(&File::open("/proc/self/status").unwrap()).unwrap(), FileSystem::Local);
        // It lies in a tmpfs, but is none of its files.
        assert_eq!(file_system(&File::open("/dev/null").unwrap()).unwrap(), FileSystem::Local);
    }

    #[test]
    fn only_of_some_it_is_known_that_they_tell_each_open_file() {
        assert!(!tells_each_open_file(&scratch::memory_file()).unwrap());
        assert!(tells_each_open_file(&File::open("/dev/null").unwrap()).unwrap(), "a device is the kernel's own");
    }
}
