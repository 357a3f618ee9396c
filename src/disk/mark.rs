//! The mark on an image: an extended attribute of its file, which says what has become of the image. It goes where the file
//! goes in its file system, and stays when the machine crashes. What the mark says is the affair of others.
//!
//! These calls are synchronous: a few of each in a migration, and they change what the file system has in memory. To make a
//! change durable is the affair of the queue, and what may take long of it.

use super::image::Image;
use crate::sys::file;
use std::ffi::CStr;
use std::io;

/// The name of the attribute.
const NAME: &CStr = c"user.flexnbd.state";
/// The longest mark that is read, in bytes. Whoever may write the file may write anything there.
const LENGTH_MAX: usize = 256;

/// As [`super::Disk::mark`].
pub(super) fn get(image: &Image) -> io::Result<Option<Vec<u8>>> {
    let mut mark = vec![0; LENGTH_MAX];
    match file::attribute(&image.file, NAME, &mut mark) {
        Ok(length) => {
            mark.truncate(length);
            Ok(Some(mark))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENODATA) || says_never(&error) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ERANGE) => {
            Err(io::Error::other(format!("it is longer than {LENGTH_MAX} bytes")))
        }
        Err(error) => Err(error),
    }
}

/// As [`super::Disk::set_mark`].
pub(super) fn set(image: &Image, mark: Option<&str>) -> io::Result<bool> {
    let changed = match mark {
        Some(mark) => file::set_attribute(&image.file, NAME, mark.as_bytes()),
        None => file::remove_attribute(&image.file, NAME),
    };
    match changed {
        Ok(()) => Ok(true),
        Err(error) if mark.is_none() && error.raw_os_error() == Some(libc::ENODATA) => Ok(true),
        Err(error) if says_never(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// True when there can be no such attribute: the file system knows none, this is a block device, or the call is forbidden.
fn says_never(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM | libc::ENOSYS))
}

#[cfg(test)]
mod tests {
    use super::super::tests::TempFile;
    use super::*;

    #[test]
    fn a_mark_is_what_was_set_last() {
        let temp = TempFile::new("mark");
        let image = Image::of(&temp.file, 512);
        if !set(&image, Some("first")).unwrap() {
            // The file system of temporary files has none; tests/integration/marks.rs says so.
            return;
        }
        for mark in ["second", ""] {
            assert!(set(&image, Some(mark)).unwrap());
            assert_eq!(get(&image).unwrap().unwrap(), mark.as_bytes());
        }
        for _ in 0..2 {
            assert!(set(&image, None).unwrap());
            assert_eq!(get(&image).unwrap(), None);
        }
        assert!(set(&image, Some(&"x".repeat(LENGTH_MAX))).unwrap());
        assert_eq!(get(&image).unwrap().unwrap().len(), LENGTH_MAX);
        assert!(set(&image, Some(&"x".repeat(LENGTH_MAX + 1))).unwrap());
        assert!(get(&image).unwrap_err().to_string().contains("longer than 256 bytes"));
    }

    #[test]
    fn where_there_can_be_none_there_is_none() {
        let temp = TempFile::new("device");
        let null = std::fs::File::options().read(true).write(true).open("/dev/null").unwrap();
        let image = Image::of(&null, temp.file.metadata().unwrap().len());
        assert_eq!(get(&image).unwrap(), None);
        for mark in [Some("mark"), None] {
            assert!(!set(&image, mark).unwrap());
        }
    }
}
