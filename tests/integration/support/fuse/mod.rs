//! A disk that is slow, fails or forgets, as the test tells it: a file system of one folder, in memory, that speaks
//! FUSE with the kernel. The program under test sees ordinary files in [`Disk::path`].
//!
//! - Slow: requests of a kind, in a range of a file, are answered after a time ([`Disk::delay`]) or when they are let go
//!   ([`Disk::hold`]); a sync may take as long as what was written ([`Disk::limit_syncs`]). All others are answered
//!   meanwhile. Whoever is killed does not wait, unless it is for [`Disk::stick`].
//! - Failing: [`Disk::fail`], [`Disk::fail_once`], and a full disk by its size.
//! - Forgetting: [`Disk::power_failures`] are all the contents that a power failure may leave.
//!
//! The kernel caches what it reads, as it does for every disk ([`Disk::mount`]), or each read and write comes here
//! ([`Disk::mount_direct`]). Writes always come here at once, before write(2) is over. `RWF_NOWAIT` is refused.
//!
//! The kernel lets only one write, fallocate, seek or sync of a file through at a time; reads go beside them.

pub mod calls;
pub mod folder;
pub mod journal;
mod mount;
mod rules;
mod state;
mod wire;

pub use journal::{PowerFailures, Remains};
pub use rules::Op;

use crate::support::{has, wait_for, Need, TempDir, SOON};
use folder::Folder;
use rules::Fault;
use state::{Reply, State};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::ops::RangeBounds;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use wire::Request;

/// A mounted disk. When it is dropped, whoever still waits for it gets an error, and it is gone.
pub struct Disk {
    common: Arc<Common>,
    threads: Vec<JoinHandle<()>>,
    dir: TempDir,
}

/// What the test and the two threads of the disk share.
struct Common {
    state: Mutex<State>,
    /// Something changed that the answering thread has to know.
    changed: Condvar,
    device: File,
    point: PathBuf,
}

impl Disk {
    /// A disk with room for `size` bytes of data, which the kernel caches. `None` where the machine
    /// does not allow it; that has been told then.
    pub fn mount(size: u64) -> Option<Self> {
        Self::mount_folder(Folder::default(), size, true)
    }

    /// The same, and nothing is cached.
    pub fn mount_direct(size: u64) -> Option<Self> {
        Self::mount_folder(Folder::default(), size, false)
    }

    /// What a power failure has left, mounted again.
    pub fn mount_remains(remains: &Remains, size: u64) -> Option<Self> {
        Self::mount_folder(remains.folder(), size, true)
    }

    fn mount_folder(folder: Folder, size: u64, is_cached: bool) -> Option<Self> {
        if !has(&[Need::Root, Need::FileSystem("fuse"), Need::Kernel(": <>/dev/fuse")]) {
            return None;
        }
        let dir = TempDir::new();
        let point = dir.join("disk");
        std::fs::create_dir(&point).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        mount::attach(&device, &point).unwrap();
        let state = Mutex::new(State::new(folder, size, is_cached));
        let common = Arc::new(Common { state, changed: Condvar::new(), device, point });
        let threads = [Common::receive, Common::answer_in_time].map(|work| {
            let common = Arc::clone(&common);
            thread::spawn(move || {
                // Should the thread fail, nobody waits for it.
                let _gone = Gone(&common);
                work(&common);
            })
        });
        Some(Self { common, threads: threads.into(), dir })
    }

    /// The path of a file on it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join("disk").join(name)
    }

    /// Puts a file on it that was always there, with this content. The kernel has none of it in its cache.
    #[track_caller]
    pub fn furnish(&self, name: &str, content: &[u8]) -> PathBuf {
        self.common.lock().furnish(name, content.len() as u64, content);
        self.path(name)
    }

    /// The same with a file that is one hole.
    #[track_caller]
    pub fn furnish_sparse(&self, name: &str, size: u64) -> PathBuf {
        self.common.lock().furnish(name, size, &[]);
        self.path(name)
    }

    /// From now on, requests of a kind that touch the range are carried out and answered after a time.
    pub fn delay(&self, op: Op, range: impl RangeBounds<u64>, delay: Duration) {
        self.common.lock().rules.add(op, range, Fault::Delay(delay));
    }

    /// From now on, a sync of a file takes as long as a disk of this speed needs for what was written since the last one.
    pub fn limit_syncs(&self, bytes_per_s: u64) {
        self.common.lock().sync_bytes_per_s = Some(bytes_per_s);
    }

    /// From now on, requests of a kind that touch the range wait until [`Disk::heal`].
    pub fn hold(&self, op: Op, range: impl RangeBounds<u64>) {
        self.common.lock().rules.add(op, range, Fault::Hold);
    }

    /// The same, and whoever is killed waits, too: a disk that does not even answer to that.
    pub fn stick(&self, op: Op, range: impl RangeBounds<u64>) {
        self.common.lock().rules.add(op, range, Fault::Stick);
    }

    /// From now on, requests of a kind that touch the range fail.
    pub fn fail(&self, op: Op, range: impl RangeBounds<u64>, error: i32) {
        self.common.lock().rules.add(op, range, Fault::Fail(error));
    }

    /// The next request of a kind that touches the range fails.
    pub fn fail_once(&self, op: Op, range: impl RangeBounds<u64>, error: i32) {
        self.common.lock().rules.add(op, range, Fault::FailOnce(error));
    }

    /// Ends all that was arranged for a kind, and lets go what is held of it.
    pub fn heal(&self, op: Op) {
        let mut state = self.common.lock();
        state.rules.remove(op);
        state.release(op);
        drop(state);
        self.common.changed.notify_all();
    }

    /// How many requests of a kind came, whatever became of them.
    pub fn count(&self, op: Op) -> u64 {
        self.common.lock().rules.count(op)
    }

    /// How many requests of a kind wait for their time.
    pub fn waiting(&self, op: Op) -> usize {
        self.common.lock().waiting(op)
    }

    /// The threads that have made the requests of a kind that wait.
    pub fn threads(&self, op: Op) -> Vec<u32> {
        self.common.lock().threads(op)
    }

    /// Waits until this many requests of a kind wait for their time.
    #[track_caller]
    pub fn wait_for_waiting(&self, op: Op, count: usize) {
        let what = format_args!("{count} times {op:?} in the disk");
        wait_for(what, SOON, || (self.waiting(op) >= count).then_some(()));
    }

    /// Every change and sync that was carried out, in their order: `write image 0..4096`, `fdatasync image`.
    pub fn log(&self) -> Vec<String> {
        self.common.lock().journal.log()
    }

    /// Of those, the changes that are not durable.
    pub fn pending(&self) -> Vec<String> {
        self.common.lock().journal.pending()
    }

    /// What a power failure at this moment may leave: everything durable and any set of the other changes. All sets of
    /// up to 10 changes; of more, every beginning of the list and 200 sets that the seed decides about.
    pub fn power_failures(&self, seed: u64) -> PowerFailures {
        self.common.lock().journal.power_failures(seed)
    }

    /// Makes the kernel forget what it has cached of a file. Waits for reads of it that are under way.
    #[track_caller]
    pub fn drop_cache(&self, name: &str) {
        let file = self.common.lock().journal.folder().id(name).unwrap();
        match (&self.common.device).write(&wire::forget_cache(file)) {
            // It does not know the file yet.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            written => drop(written.unwrap()),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        mount::detach(&self.common.point);
        for thread in self.threads.drain(..) {
            let outcome = thread.join();
            if !thread::panicking() {
                outcome.unwrap();
            }
        }
    }
}

/// Ends the mount with the thread that owns it.
struct Gone<'a>(&'a Common);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        mount::detach(&self.0.point);
        self.0.lock().end();
        self.0.changed.notify_all();
    }
}

impl Common {
    /// A thread that failed has said so, and the disk is gone: that is enough for the others.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes requests until the mount is gone.
    fn receive(&self) {
        let mut buffer = vec![0; wire::REQUEST_MAX];
        loop {
            let length = match (&self.device).read(&mut buffer) {
                Ok(length) => length,
                Err(error) => match error.raw_os_error() {
                    // Also while a request was being read.
                    Some(libc::ENODEV | libc::ECONNABORTED) => return,
                    // The request was taken back.
                    Some(libc::ENOENT | libc::EINTR | libc::EAGAIN) => continue,
                    _ => panic!("/dev/fuse: {error}"),
                },
            };
            let request = Request::parse(&buffer[..length]);
            let reply = self.lock().take(request);
            match reply {
                Some(reply) => self.send(reply),
                None => self.changed.notify_all(),
            }
        }
    }

    /// Answers what was delayed, each at its time.
    fn answer_in_time(&self) {
        let mut state = self.lock();
        while !state.is_over() {
            if let Some(reply) = state.pop_due().or_else(|| state.pop_killed()) {
                drop(state);
                self.send(reply);
                state = self.lock();
                continue;
            }
            let idle_time = state.idle_time();
            let woken = self.changed.wait_timeout(state, idle_time);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn send(&self, (unique, answer): Reply) {
        match (&self.device).write(&wire::reply(unique, answer)) {
            // Nobody waits any more.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            written => drop(written.unwrap()),
        }
    }
}
