//! The mark on an image: an extended attribute of its file, which says what has become of the image. It goes where the file
//! goes in its file system, and stays when the machine crashes. What the mark says is the affair of others.
//!
//! To change it is a short call of this thread, as a write is, and like one it may have to wait for whoever else has the file
//! locked. So the engine sets marks when neither a sync nor a change is in the kernel's hands.

use super::commit::Commit;
use super::image::Image;
use super::queue::Job;
use crate::sys::file;
use crate::work::{Action, Done, Op};
use std::collections::VecDeque;
use std::ffi::CStr;
use std::io::{self, ErrorKind};
use std::mem;

/// The name of the attribute.
const NAME: &CStr = c"user.flexnbd.state";
/// The longest mark that is read, in bytes. Whoever may write the file may write anything there.
const LENGTH_MAX: usize = 256;

/// Changes of the mark that wait for their moment.
#[derive(Default)]
pub(super) struct Marks(VecDeque<NewMark>);

struct NewMark {
    /// A flush: what is left to do when the mark is set.
    job: Job,
    mark: Option<String>,
    durable: bool,
}

impl Marks {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn push(&mut self, owner: u64, tag: u32, mark: Option<String>, durable: bool) {
        let job = Job::new(Op { owner, tag, action: Action::Flush });
        self.0.push_back(NewMark { job, mark, durable });
    }

    /// Makes the changes, in their order. Each is done then, or waits for the next sync.
    pub(super) fn set(&mut self, image: &Image, commit: &mut Commit, done: &mut VecDeque<Done>) {
        for NewMark { job, mark, durable } in mem::take(&mut self.0) {
            match set(image, mark.as_deref()) {
                Ok(()) if durable => {
                    commit.note_mark();
                    commit.add(job);
                }
                set => done.push_back(job.finish(set)),
            }
        }
    }

    /// Takes out those of an owner.
    pub(super) fn remove(&mut self, owner: u64) -> Vec<Job> {
        let (gone, stay): (Vec<_>, _) = mem::take(&mut self.0).into_iter().partition(|mark| mark.job.op.owner == owner);
        self.0 = stay.into();
        gone.into_iter().map(|mark| mark.job).collect()
    }
}

/// As [`super::Disk::mark`].
pub(super) fn get(image: &Image) -> io::Result<Option<Vec<u8>>> {
    let mut mark = vec![0; LENGTH_MAX];
    match file::attribute(&image.file, NAME, &mut mark) {
        Ok(length) => {
            mark.truncate(length);
            Ok(Some(mark))
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP | libc::ENOSYS)) => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ERANGE) => {
            Err(io::Error::other(format!("it is longer than {LENGTH_MAX} bytes")))
        }
        Err(error) => Err(error),
    }
}

/// Sets the mark, or removes it. [`ErrorKind::Unsupported`]: there can be none.
pub(super) fn set(image: &Image, mark: Option<&str>) -> io::Result<()> {
    let changed = match mark {
        Some(mark) => file::set_attribute(&image.file, NAME, mark.as_bytes()),
        None => file::remove_attribute(&image.file, NAME),
    };
    match changed {
        Err(error) if mark.is_none() && error.raw_os_error() == Some(libc::ENODATA) => Ok(()),
        Err(error) if says_never(&error) => Err(ErrorKind::Unsupported.into()),
        changed => changed,
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
        if set(&image, Some("first")).is_err_and(|error| error.kind() == ErrorKind::Unsupported) {
            // The file system of temporary files has none; the tests of migrations say so.
            return;
        }
        for mark in ["second", ""] {
            set(&image, Some(mark)).unwrap();
            assert_eq!(get(&image).unwrap().unwrap(), mark.as_bytes());
        }
        for _ in 0..2 {
            set(&image, None).unwrap();
            assert_eq!(get(&image).unwrap(), None);
        }
        set(&image, Some(&"x".repeat(LENGTH_MAX))).unwrap();
        assert_eq!(get(&image).unwrap().unwrap().len(), LENGTH_MAX);
        set(&image, Some(&"x".repeat(LENGTH_MAX + 1))).unwrap();
        assert!(get(&image).unwrap_err().to_string().contains("longer than 256 bytes"));
    }

    #[test]
    fn where_there_can_be_none_there_is_none() {
        let temp = TempFile::new("device");
        let null = std::fs::File::options().read(true).write(true).open("/dev/null").unwrap();
        let image = Image::of(&null, temp.file.metadata().unwrap().len());
        assert_eq!(get(&image).unwrap(), None);
        for mark in [Some("mark"), None] {
            assert_eq!(set(&image, mark).unwrap_err().kind(), ErrorKind::Unsupported);
        }
    }
}
