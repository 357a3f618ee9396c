//! One migration through a forwarder, with all that goes wrong on the way, until it is over on both sides. Then the rules
//! of the README say where the image is, and it has to be there, whole.

use crate::forwarder::Forwarder;
use crate::place::Place;
use crate::plan::{Act, Heir, Hop, Medium, Moment, Trouble};
use crate::site::{self, Site};
use crate::support::peers::{expect_same, tell};
use crate::support::{kind, request, wait_for, Process, Server, BIN, SOON};
use crate::writer::{check_all, Writer};
use flexnbd::sys::file;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant};

/// How long a migration may take, whatever happens to it.
const LONG: Duration = Duration::from_secs(300);
/// Between two looks at everything.
const LOOK: Duration = Duration::from_millis(5);
/// Between two tries to start it.
const AGAIN: Duration = Duration::from_millis(50);

/// What the one who wants the migration does.
enum Mirror {
    /// It is not running; it may be started again from this time on.
    Idle(Instant),
    /// `flexnbd mirror` is running.
    Asked(Process),
    /// It was started, and nobody waits for its end.
    Begun,
}

/// How it ended.
pub struct Ended {
    /// The image has moved.
    pub moved: bool,
    /// The file that is the image.
    pub image: PathBuf,
    /// The server that serves it already.
    pub server: Option<Server>,
    /// What has not happened yet.
    pub left: Vec<Trouble>,
    /// What has happened.
    pub happened: Vec<Act>,
}

/// A migration that is going on.
pub struct Migration<'a> {
    site: &'a Site,
    plan: &'a Hop,
    place: &'a Place,
    forwarder: Forwarder,
    source: Server,
    listener: Server,
    disk: Medium,
    /// Disks of the listeners that come when one has failed by its disk.
    disks: std::slice::Iter<'a, Medium>,
    /// The files of all listeners there were.
    files: Vec<(SocketAddr, PathBuf, Medium)>,
    mirror: Mirror,
    /// The source was sent a signal.
    signal: Option<&'static str>,
    /// What happens at a time.
    timed: Vec<Trouble>,
    happened: Vec<Act>,
    began: Instant,
}

impl<'a> Migration<'a> {
    /// Begins to move the image from a server that writers know.
    #[track_caller]
    pub fn start(site: &'a Site, plan: &'a Hop, troubles: &[Trouble], place: &'a Place, source: Server) -> Self {
        let is_timed = |trouble: &&Trouble| matches!(trouble.moment, Moment::Time(_));
        let timed = troubles.iter().filter(is_timed).copied().collect();
        let forwarder = Forwarder::start(site.size(), troubles.iter().filter(|trouble| !is_timed(trouble)).copied());
        let mut disks = plan.disks.iter();
        let disk = *disks.next().unwrap();
        let listener = listen(plan, disk, &site.empty(disk));
        forwarder.lead_to(listener.address());
        let files = vec![(listener.address(), listener.image.clone(), disk)];
        let (mirror, began) = (Mirror::Idle(Instant::now()), Instant::now());
        let (signal, happened) = (None, Vec::new());
        Self {
            site,
            plan,
            place,
            forwarder,
            source,
            listener,
            disk,
            disks,
            files,
            mirror,
            signal,
            timed,
            happened,
            began,
        }
    }

    /// Goes on until the source has ended, and judges.
    #[track_caller]
    pub fn finish(mut self, writers: &[Writer]) -> Ended {
        while self.source.process.is_running() || self.forwarder.carries() {
            assert!(!self.place.has_failed(), "a writer has failed; {self}");
            assert!(self.began.elapsed() < LONG, "no end within {LONG:?}; {self}");
            self.look_at_listener();
            self.happen_in_time();
            self.drive_mirror();
            match self.forwarder.calls.recv_timeout(LOOK) {
                Ok(call) => {
                    self.happen(call.act);
                    let _ = call.done.send(());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => panic!("the forwarder has failed; {self}"),
            }
        }
        self.judge(writers)
    }

    /// Where the image is by the rules of the README; it has to be there.
    #[track_caller]
    fn judge(mut self, writers: &[Writer]) -> Ended {
        self.place.close();
        let code = self.source.process.wait(SOON).code();
        let (last, told) = self.forwarder.account();
        let is_complete = if told == Some(self.listener.address()) {
            let what = format!("a listener that was told DISC is not done; {self}");
            wait_for(what, SOON, || self.has_completed().then_some(true))
        } else {
            self.look_at_listener();
            let code = self.listener.stop().code();
            assert_eq!(code, Some(1), "a listener that was not told DISC says how it ended; {self}");
            false
        };
        let is_there = self.source.image.exists();
        let moved = match (is_complete, self.signal, code) {
            // The last one says 0 of any clean stop.
            (true, None | Some("TERM"), Some(0)) | (true, Some("KILL"), None) | (false, None, Some(0)) => true,
            (false, Some("TERM"), Some(1)) if is_there => false,
            (false, Some("TERM"), Some(0)) | (false, Some("KILL"), None) => !is_there,
            (_, signal, code) => {
                panic!("the source, after {signal:?}, ended with {code:?}; listener complete: {is_complete}; {self}")
            }
        };
        let (image, disk) = if moved {
            let found = self.files.iter().find(|(address, ..)| Some(*address) == last);
            let (_, image, disk) = found.unwrap_or_else(|| panic!("it has moved, but nowhere; {self}"));
            (image.clone(), *disk)
        } else {
            (self.source.image.clone(), Medium::Plain)
        };
        check_all(writers, &image);
        if moved && is_there {
            assert!(!(self.plan.unlinks && code == Some(0)), "the file of the source is not deleted; {self}");
            expect_same(&self.source.image, &image);
            assert!(is_marked(&self.source.image), "the file of the source would be served again; {self}");
        }
        if let Mirror::Asked(asked) = &mut self.mirror {
            let said = asked.wait(SOON).code();
            let must_know = self.plan.waits && moved && self.signal.is_none();
            let is_right = if said == Some(0) { !self.plan.waits || moved } else { !must_know };
            assert!(is_right, "whoever waited for the migration was told {said:?}; moved: {moved}; {self}");
        }
        let happened = [self.forwarder.happened(), self.happened].concat();
        let left = [self.forwarder.end(), self.timed].concat();
        let serves = moved && is_complete && self.listener.process.is_running();
        let image = if serves { image } else { self.site.with_room(disk, image) };
        Ended { moved, image, server: serves.then_some(self.listener), left, happened }
    }

    /// True when the listener says that its file is the image.
    fn has_completed(&mut self) -> bool {
        match self.listener.process.0.try_wait().unwrap() {
            Some(status) => status.code() == Some(0),
            // Without --serve it ends then.
            None if !serves(self.plan, self.disk) => false,
            None => self.listener.try_status().is_some_and(|status| status.get("has_control") == "true"),
        }
    }

    /// Two sides never claim the image, and only a bad disk ends a listener.
    #[track_caller]
    fn look_at_listener(&mut self) {
        let ended = self.listener.process.0.try_wait().unwrap();
        if ended.is_some_and(|status| !status.success()) {
            assert!(self.disk.may_fail() && self.listener.log().contains(":F:"), "the listener has ended; {self}");
            self.disk = *self.disks.next().unwrap();
            self.replace_listener(None);
        } else if self.has_completed() {
            let Some(status) = self.source.try_status() else { return };
            // In its last turn it has no migration any more.
            let goes_on = status.get("is_mirroring") == "true" && status.get("migration_phase") != "finishing";
            assert!(!goes_on, "both sides claim the image: {}; {self}", status.line());
        }
    }

    /// Another listener takes the place of one that has ended, on its file or another one.
    #[track_caller]
    fn replace_listener(&mut self, file: Option<PathBuf>) {
        let file = file.unwrap_or_else(|| self.site.empty(self.disk));
        self.listener = listen(self.plan, self.disk, &file);
        self.files.push((self.listener.address(), file, self.disk));
        self.forwarder.lead_to(self.listener.address());
    }

    /// Starts the migration, again when it did not start or was stopped.
    fn drive_mirror(&mut self) {
        let is_due = match &mut self.mirror {
            Mirror::Idle(from) => Instant::now() >= *from,
            Mirror::Asked(asked) => {
                match asked.0.try_wait().unwrap() {
                    Some(status) if status.success() => self.mirror = Mirror::Begun,
                    Some(_) => self.mirror = Mirror::Idle(Instant::now() + AGAIN),
                    None => {}
                }
                false
            }
            Mirror::Begun => false,
        };
        if !is_due || !self.source.process.is_running() {
            return;
        }
        let address = self.forwarder.address;
        let mut command = Command::new(BIN);
        command.args(["mirror", "--addr", &address.ip().to_string(), "--port", &address.port().to_string()]);
        command.arg("--sock").arg(&self.source.sock);
        command.args(["--max-speed", &self.plan.speed.to_string(), "--max-pause", &self.plan.pause_ms.to_string()]);
        command.args(self.plan.unlinks.then_some("--unlink")).args(self.plan.waits.then_some("--wait"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.mirror = Mirror::Asked(Process::spawn(&mut command));
    }

    fn happen_in_time(&mut self) {
        let now_ms = self.began.elapsed().as_millis() as u64;
        let is_due = |trouble: &Trouble| matches!(trouble.moment, Moment::Time(at_ms) if at_ms <= now_ms);
        let due: Vec<Trouble> = self.timed.iter().filter(|trouble| is_due(trouble)).copied().collect();
        self.timed.retain(|trouble| !is_due(trouble));
        for trouble in due {
            self.happen(trouble.act);
        }
    }

    fn happen(&mut self, act: Act) {
        self.happened.push(act);
        match act {
            Act::Cut | Act::CutWithDisc | Act::Hold(_) => self.forwarder.cut(),
            Act::SignalListener(signal) => {
                if self.listener.process.is_running() {
                    self.listener.process.signal(signal);
                    if !self.listener.process.wait(SOON).success() {
                        let file = (self.plan.heir == Heir::SameFile).then(|| self.listener.image.clone());
                        self.replace_listener(file);
                    }
                }
            }
            Act::SignalSource(signal) => {
                if self.signal.is_none() && self.source.process.is_running() {
                    self.source.process.signal(signal);
                    let was_killed = self.source.process.wait(SOON).code().is_none();
                    // It may have ended by itself before.
                    self.signal = Some(signal).filter(|_| was_killed || signal == "TERM");
                }
            }
            Act::StopListener(ms) => stop_for(&mut self.listener, ms),
            Act::StopSource(ms) => stop_for(&mut self.source, ms),
            Act::Break => {
                let (code, _) = tell("break", &self.source, "");
                if code == Some(0) {
                    // Whoever started it may not have heard that it was started, and waits no longer.
                    if let Mirror::Asked(asked) = &mut self.mirror {
                        asked.wait(SOON);
                    }
                    self.mirror = Mirror::Idle(Instant::now());
                }
            }
            Act::Speed(speed) => drop(tell("mirror-speed", &self.source, &format!("--max-speed {speed}"))),
            Act::List => {
                self.place.change_list();
                cut_by_list(&mut self.source);
            }
            Act::ListListener => cut_by_list(&mut self.listener),
            Act::Rogue => self.send_rogue(),
        }
    }

    /// Somebody who has nothing to do with it says DISC, and waits until that is heard.
    fn send_rogue(&self) {
        let Ok(mut stream) = TcpStream::connect(self.listener.address()) else { return };
        stream.set_read_timeout(Some(SOON)).unwrap();
        if stream.write_all(&request(kind::DISC, 0, 1, 0, 0)).is_ok() && stream.shutdown(Shutdown::Write).is_ok() {
            let _ = stream.read_to_end(&mut Vec::new());
        }
    }
}

impl std::fmt::Display for Migration<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let said =
            |server: &Server| server.log().lines().filter(|line| !line.contains(":D:")).collect::<Vec<_>>().join("\n");
        let (source, listener) = (said(&self.source), said(&self.listener));
        write!(
            f,
            "happened: {:?} {:?}\nthe source:\n{source}\nthe listener:\n{listener}",
            self.forwarder.happened(),
            self.happened
        )
    }
}

#[track_caller]
/// Whether an image says that it has moved, or can have no mark.
fn is_marked(image: &Path) -> bool {
    let mut mark = [0; 256];
    match file::attribute(&File::open(image).unwrap(), c"user.flexnbd.state", &mut mark) {
        Ok(_) => mark.starts_with(b"moved "),
        Err(error) => error.raw_os_error() != Some(libc::ENODATA),
    }
}

fn listen(plan: &Hop, disk: Medium, file: &Path) -> Server {
    site::listen(file, disk, serves(plan, disk))
}

/// Whether a listener goes on as the server. One whose disk fails its clients would be no end of a migration.
fn serves(plan: &Hop, disk: Medium) -> bool {
    plan.serves && !disk.may_fail()
}

/// Stops a server for a while, if it has not ended.
fn stop_for(server: &mut Server, ms: u64) {
    if server.process.is_running() {
        server.process.signal("STOP");
        thread::sleep(Duration::from_millis(ms));
        server.process.signal("CONT");
    }
}

/// Cuts whoever is connected over TCP, then lets everybody in again. A server at its end does neither.
fn cut_by_list(server: &mut Server) {
    for list in ["192.0.2.1", "127.0.0.0/8"] {
        wait_for(format_args!("acl {list}"), SOON, || {
            (tell("acl", server, list).0 == Some(0) || !server.process.is_running()).then_some(())
        });
    }
}
