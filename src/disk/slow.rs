//! An engine for tests of what is above the queue: each operation completes a while after the kick, which does not wait.

use super::engine;
use super::image::Image;
use crate::work::{Done, Op};
use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

pub(super) struct Engine {
    inner: engine::Engine,
    delay: Duration,
    /// What is done, and when that may be known.
    flying: VecDeque<(Instant, Done)>,
    theirs: UnixStream,
    ours: UnixStream,
}

impl Engine {
    pub(super) fn new(delay: Duration, image: &Image) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        Self { inner: engine::Engine::new(image, None), delay, flying: VecDeque::new(), theirs, ours }
    }

    pub(super) fn submit(&mut self, op: Op) {
        self.inner.submit(op);
    }

    pub(super) fn submit_mark(&mut self, owner: u64, tag: u32, mark: Option<String>, durable: bool) {
        self.inner.submit_mark(owner, tag, mark, durable);
    }

    pub(super) fn kick(&mut self, image: &Image) {
        while self.inner.has_work() {
            self.inner.kick(image);
        }
        while let Some(done) = self.inner.pop_done() {
            self.flying.push_back((Instant::now() + self.delay, done));
            let (delay, mut notifier) = (self.delay, self.theirs.try_clone().unwrap());
            // Nobody listens any more once the test is over.
            thread::spawn(move || {
                thread::sleep(delay);
                let _ = notifier.write_all(&[1]);
            });
        }
    }

    /// What it drops is done at once.
    pub(super) fn forget(&mut self, owner: u64) {
        self.inner.forget(owner);
        while let Some(done) = self.inner.pop_done() {
            self.flying.push_front((Instant::now(), done));
        }
    }

    /// The owners of what is not done yet.
    pub(super) fn flying(&self) -> Vec<u64> {
        self.flying.iter().filter(|(due, _)| *due > Instant::now()).map(|(_, done)| done.owner).collect()
    }

    pub(super) fn has_work(&self) -> bool {
        self.inner.has_work() || self.flying.front().is_some_and(|(due, _)| *due <= Instant::now())
    }

    pub(super) fn pop_done(&mut self) -> Option<Done> {
        let (due, _) = self.flying.front()?;
        if *due > Instant::now() {
            return None;
        }
        self.flying.pop_front().map(|(_, done)| done)
    }

    pub(super) fn notifier(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }
}

mod tests {
    use super::super::tests::{buffer, TempFile};
    use super::super::Disk;
    use super::Duration;
    use crate::sys;
    use crate::work::{Action, Op};

    #[test]
    fn what_flies_is_no_work_until_the_notifier_says_so() {
        const DELAY_MS: u64 = 300;
        let temp = TempFile::new("slow");
        temp.file.set_len(8192).unwrap();
        let mut disk = Disk::open_slow(&temp.path, Duration::from_millis(DELAY_MS));
        assert!(!disk.has_work());
        for tag in 0..2 {
            let action = Action::Write { offset: 0, payload: buffer(b"abc"), fua: false, follows: false };
            disk.submit(Op { owner: 7, tag, action }).unwrap();
        }
        assert!(disk.has_work(), "a kick would start them");
        let kicked_ms = sys::monotonic_ms();
        disk.kick();
        assert_eq!((disk.in_flight(), disk.has_work(), disk.pop_done().is_none()), (2, false, true));
        assert!(sys::wait_readable(disk.notifier().unwrap(), 60_000).unwrap());
        assert!(sys::monotonic_ms() >= kicked_ms + DELAY_MS);
        assert!(disk.has_work());
        disk.kick();
        assert_eq!(disk.pop_done().unwrap().tag, 0);
        while disk.in_flight() > 0 {
            disk.kick();
            if let Some(done) = disk.pop_done() {
                assert_eq!((done.tag, done.result.is_ok()), (1, true));
            }
        }
        assert!(!disk.has_work());
    }
}
