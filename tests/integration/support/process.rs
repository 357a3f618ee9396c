//! Programs that run under a deadline and end with the test, and a directory for what they leave.

use super::{wait_for, BIN, POLL, SOON};
use std::ffi::OsStr;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A directory of one test, removed with everything in it when dropped, also by a panic.
pub struct TempDir(PathBuf);

impl TempDir {
    /// In the temporary directory of the system.
    pub fn new() -> Self {
        Self::within(&std::env::temp_dir())
    }

    /// In another directory.
    pub fn within(parent: &Path) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("flexnbd-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process that is killed when dropped.
pub struct Process(pub Child);

impl Process {
    /// Starts it.
    #[track_caller]
    pub fn spawn(command: &mut Command) -> Self {
        Self(command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}")))
    }

    /// Sends a signal, by its name (`TERM`).
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args(["-s", name, &self.0.id().to_string()]).status().unwrap();
        assert!(status.success(), "cannot send {name}");
    }

    /// Stops it until SIGCONT: when this returns, it does nothing more.
    #[track_caller]
    pub fn freeze(&self) {
        self.signal("STOP");
        wait_for("the process to stop", SOON, || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
            stat.rsplit_once(") ").unwrap().1.starts_with('T').then_some(())
        });
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        wait_for("the end of a process", deadline, || self.0.try_wait().unwrap())
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Output {
    /// The exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Everything it wrote to stdout.
    pub stdout: Vec<u8>,
    /// Everything it wrote to stderr.
    pub stderr: String,
}

/// Runs flexnbd with `stdin` piped to it, and kills it when it is not done [`SOON`].
#[track_caller]
pub fn run(args: &[impl AsRef<OsStr>], stdin: &[u8]) -> Output {
    let mut command = Command::new(BIN);
    command.args(args);
    run_command(&mut command, stdin)
}

/// As [`run`], any program.
#[track_caller]
pub fn run_command(command: &mut Command, stdin: &[u8]) -> Output {
    run_within(command, stdin, SOON)
}

/// As [`run_command`], with a deadline of its own.
#[track_caller]
pub fn run_within(command: &mut Command, stdin: &[u8], deadline: Duration) -> Output {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = Process::spawn(command);
    let mut input = process.0.stdin.take().unwrap();
    let mut stdout = process.0.stdout.take().unwrap();
    let mut stderr = process.0.stderr.take().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || match input.write_all(stdin) {
            // A program that fails early does not read all of it.
            Err(error) if error.kind() != ErrorKind::BrokenPipe => panic!("{error}"),
            _ => {}
        });
        let stdout = scope.spawn(move || {
            let mut bytes = Vec::new();
            stdout.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let stderr = scope.spawn(move || {
            let mut bytes = Vec::new();
            stderr.read_to_end(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        });
        let give_up = Instant::now() + deadline;
        let mut killed = false;
        let status = loop {
            if let Some(status) = process.0.try_wait().unwrap() {
                break status;
            }
            if !killed && Instant::now() >= give_up {
                process.0.kill().unwrap();
                killed = true;
            }
            thread::sleep(POLL);
        };
        let output = Output { code: status.code(), stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() };
        assert!(!killed, "{command:?}: not done within {deadline:?}; stderr: {}", output.stderr);
        output
    })
}
