//! Reads of what needs no wait: what the page cache holds, and all of an image that lies in memory.

use super::image::Image;
use crate::sys::pages::{self, FileSystem};
use std::io;
use std::os::unix::fs::FileExt;

/// How to find out what needs no wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Nothing does.
    InMemory,
    /// By a read that takes only that.
    Nowait,
    /// By a question before the read.
    Ask,
    /// Not at all: every read may wait.
    Blind,
}

impl Way {
    pub(super) fn of(image: &Image) -> Self {
        match image.source {
            FileSystem::Memory => Self::InMemory,
            FileSystem::Local | FileSystem::Distributed => Self::Nowait,
        }
    }

    /// Reads what needs no wait, from the beginning of `room` on; says how many bytes that were. Zero may also be the end
    /// of the file or an error: a read that waits finds that out.
    pub(super) fn read(&mut self, image: &Image, offset: u64, room: &mut [u8]) -> usize {
        loop {
            let refused = match self {
                Self::InMemory => return image.file.read_at(room, offset).unwrap_or(0),
                Self::Nowait => match pages::read_nowait(&image.file, room, offset) {
                    Ok(n) => return n,
                    Err(error) => error,
                },
                Self::Ask => match pages::is_cached(&image.file, offset, room.len() as u64) {
                    Ok(true) => return image.file.read_at(room, offset).unwrap_or(0),
                    Ok(false) => return 0,
                    Err(error) => error,
                },
                Self::Blind => return 0,
            };
            if !is_refusal(&refused) {
                return 0;
            }
            *self = if *self == Self::Nowait { Self::Ask } else { Self::Blind };
        }
    }
}

/// True for the errors by which a kernel says that it cannot do this here, or does not allow it.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EPERM | libc::EINVAL))
}

#[cfg(test)]
mod tests {
    use super::super::tests::TempFile;
    use super::*;
    use std::path::Path;

    fn image(temp: &TempFile, source: FileSystem) -> Image {
        temp.file.set_len(1 << 20).unwrap();
        temp.file.write_all_at(&[7; 8192], 0).unwrap();
        Image { source, ..Image::of(&temp.file, 1 << 20) }
    }

    #[test]
    fn what_is_refused_is_not_asked_again() {
        let shm = Path::new("/dev/shm");
        if !shm.is_dir() {
            return;
        }
        let temp = TempFile::within(shm, "refused");
        let image = image(&temp, FileSystem::Local);
        let mut way = Way::of(&image);
        let mut room = [0; 4096];
        let n = way.read(&image, 100, &mut room);
        assert!(matches!((way, n), (Way::Ask, 4096) | (Way::Blind, 0)), "{way:?} {n}");
        way = Way::Blind;
        assert_eq!((way.read(&image, 100, &mut room), way), (0, Way::Blind));
    }

    #[test]
    fn what_is_cached_is_read_at_once_and_the_end_is_a_miss() {
        let temp = TempFile::new("cached");
        for source in [FileSystem::Local, FileSystem::Memory] {
            let image = image(&temp, source);
            for mut way in [Way::of(&image), Way::Ask] {
                let mut room = [0; 4096];
                let n = way.read(&image, 100, &mut room);
                assert!(n == 4096 && room == [7; 4096] || way == Way::Blind, "{way:?} {n}");
                assert_eq!(way.read(&image, 1 << 20, &mut room), 0);
            }
        }
    }
}
