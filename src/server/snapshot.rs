//! A snapshot: a second file that has the image as it is at one moment and shares its blocks with it.
//!
//! ```text
//!  Draining ──> Flushing ──> Copying ──> answered
//!      └────────────┴────────────┴─────> failed, answered: there is no file
//! ```
//!
//! Changes wait meanwhile, and reads go on. Every write that was answered is in the file, and none that is begun later.

use super::effect::Effect;
use super::life::Life;
use super::reason::{Next, Reason};
use super::shared::Shared;
use crate::command::Answer;
use crate::disk::Disk;
use crate::event::slots::Key;
use crate::sys::clone::Cloning;
use crate::work::{Action, Done, Op};
use log::{debug, info, warn};
use mio::unix::SourceFd;
use mio::Interest;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};

/// How long it may take, in milliseconds: less than clients and the command that asked have patience.
const LIMIT_MS: u64 = 20_000;

#[derive(Debug)]
enum Stage {
    /// What has passed the gate is not done yet.
    Draining,
    /// It is made durable.
    Flushing,
    /// A child process makes the file.
    Copying(Cloning),
    /// That took too long, and it was told to end. Before it has, a change would wait in the kernel for the file that it has
    /// locked, and everybody with it.
    GivenUp(Cloning),
}

/// A snapshot that is being made.
#[derive(Debug)]
pub(super) struct Snapshot {
    /// The control connection that waits for the answer.
    asker: Key,
    to: PathBuf,
    began_ms: u64,
    stage: Stage,
}

impl Snapshot {
    /// Begins one; from now on changes wait.
    pub(super) fn start(asker: Key, to: PathBuf, key: Key, sh: &mut Shared) -> Self {
        sh.life = Life::Snapshot;
        sh.wheel.arm(sh.now_ms.saturating_add(LIMIT_MS), key);
        Self { asker, to, began_ms: sh.now_ms, stage: Stage::Draining }
    }

    /// Goes on as far as it can.
    pub(super) fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        match &mut self.stage {
            Stage::Draining if sh.gate.changing() > 0 || !sh.backend.has_room() => Next::WaitDisk,
            Stage::Draining => {
                self.stage = Stage::Flushing;
                let taken = sh.backend.submit(Op { owner: key.to_u64(), tag: 0, action: Action::Flush });
                debug_assert!(taken.is_ok(), "it had room");
                Next::Idle
            }
            Stage::Copying(cloning) => match cloning.take_end() {
                Some(ended) => self.end(ended.map_err(|error| explain(&error, &self.to)), sh),
                None => Next::Idle,
            },
            Stage::GivenUp(cloning) => match cloning.take_end() {
                Some(ended) => {
                    if ended.is_ok() {
                        // It was told that there is none. The name is this server's own, and new.
                        let _ = fs::remove_file(&self.to);
                    }
                    self.resume(sh)
                }
                None => Next::Idle,
            },
            Stage::Flushing => Next::Idle,
        }
    }

    /// What was answered is durable: starts the child process.
    pub(super) fn disk_done(&mut self, done: Done, key: Key, sh: &mut Shared) -> Next {
        match done.result.and_then(|()| self.copy(key, sh)) {
            Ok(cloning) => {
                debug!("snapshot {}: being made", self.to.display());
                self.stage = Stage::Copying(cloning);
                Next::Again
            }
            Err(error) => self.end(Err(explain(&error, &self.to)), sh),
        }
    }

    fn copy(&self, key: Key, sh: &mut Shared) -> io::Result<Cloning> {
        let disk = sh.backend.disk_mut().ok_or(ErrorKind::NotFound)?;
        let cloning = disk.clone_to(&self.to)?;
        let fd = cloning.as_fd().as_raw_fd();
        sh.registry.register(&mut SourceFd(&fd), key.token(), Interest::READABLE)?;
        Ok(cloning)
    }

    /// A wheel entry has fired: changes have waited for long enough.
    pub(super) fn timeout(&mut self, sh: &mut Shared) -> Next {
        let why = || {
            Err(format!(
                "it was not done within {} s; changes of clients wait until the kernel has let go of it",
                LIMIT_MS / 1000
            ))
        };
        match std::mem::replace(&mut self.stage, Stage::Flushing) {
            Stage::Draining | Stage::Flushing => self.end(why(), sh),
            Stage::Copying(cloning) => {
                cloning.cancel();
                self.stage = Stage::GivenUp(cloning);
                self.answer(why(), sh);
                Next::Again
            }
            Stage::GivenUp(cloning) => {
                self.stage = Stage::GivenUp(cloning);
                Next::Idle
            }
        }
    }

    /// The server stops: whoever waits for the answer gets one.
    pub(super) fn stopped(&self) -> Option<(Key, Answer)> {
        let answer = Answer::failed("no snapshot: the server has been stopped");
        (!matches!(self.stage, Stage::GivenUp(_))).then_some((self.asker, answer))
    }

    /// Answers, and lets clients go on.
    fn end(&self, outcome: Result<(), String>, sh: &mut Shared) -> Next {
        self.answer(outcome, sh);
        self.resume(sh)
    }

    fn answer(&self, outcome: Result<(), String>, sh: &mut Shared) {
        let (to, ms) = (self.to.display(), sh.now_ms.saturating_sub(self.began_ms));
        let answer = match outcome {
            Ok(()) => {
                info!("snapshot {to}: made; changes waited for {ms} ms");
                Answer::ok(format!("snapshot made; changes waited for {ms} ms"))
            }
            Err(why) => {
                warn!("snapshot {to}: not made: {why}; changes waited for {ms} ms");
                Answer::failed(format!("no snapshot: {why}"))
            }
        };
        sh.effects.push_back(Effect::Answer(self.asker, answer));
    }

    fn resume(&self, sh: &mut Shared) -> Next {
        info!("snapshot {}: clients go on", self.to.display());
        sh.backend.disk_mut().into_iter().for_each(Disk::clone_ended);
        sh.effects.push_back(Effect::ResumeClients);
        sh.life = Life::Serving;
        sh.share_image();
        Next::Close(Reason::Answered)
    }
}

/// What is wrong, and what to do.
fn explain(error: &io::Error, to: &Path) -> String {
    let (to, folder) = (to.display(), to.parent().unwrap_or(to).display());
    match error.raw_os_error() {
        Some(libc::EEXIST) => format!("{to} exists, and stays as it is; give another name"),
        Some(libc::ENOENT) => format!("there is no folder {folder}; create it first"),
        Some(libc::EXDEV) => {
            format!("{folder} is on another file system than the image, and only on one can files share blocks")
        }
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::EISDIR) => {
            "the file system of the image cannot let two files share blocks; btrfs can, and xfs".into()
        }
        Some(libc::ENOSYS) => "it takes Linux 5.9 or newer".into(),
        _ => format!("cannot make {to}: {error}"),
    }
}
