//! An engine for tests of what is above the queue: every operation takes a while, and the thread that kicked does not wait.

use super::image::Image;
use super::sync;
use crate::work::{Done, Op};
use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

pub(super) struct Engine {
    inner: sync::Engine,
    delay: Duration,
    /// What is done, and when that may be known.
    flying: VecDeque<(Instant, Done)>,
    theirs: UnixStream,
    ours: UnixStream,
}

impl Engine {
    pub(super) fn new(delay: Duration) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        Self { inner: sync::Engine::default(), delay, flying: VecDeque::new(), theirs, ours }
    }

    pub(super) fn submit(&mut self, op: Op) {
        self.inner.submit(op);
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
