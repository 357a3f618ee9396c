//! The harness: the real binary with everything it needs in a directory that goes with the test, a raw client of the
//! oldstyle protocol, and waits for conditions. Nothing here sleeps a guess, and nothing waits without a deadline.

pub mod newstyle;
pub mod peers;

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The program under test.
pub const BIN: &str = env!("CARGO_BIN_EXE_flexnbd");
/// How long anything may take that should take no time, on a machine that is busy with the other tests.
pub const SOON: Duration = Duration::from_secs(30);
/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(2);

/// Request types.
pub mod kind {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
}

/// Command flags.
pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
}

/// Error values of replies.
pub mod errno {
    pub const EIO: u32 = 5;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
}

/// Asks `probe` until it has an answer; fails the test when there is none within `deadline`.
#[track_caller]
pub fn wait_for<T>(what: impl Display, deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + deadline;
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(Instant::now() < give_up, "{what}: not within {deadline:?}");
        thread::sleep(POLL);
    }
}

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

/// How a server is to be started. The image is sparse unless there is content for it.
pub struct Builder {
    dir: TempDir,
    mode: &'static str,
    addr: String,
    image: Option<PathBuf>,
    wrapper: Vec<OsString>,
    args: Vec<OsString>,
    stderr: Option<Stdio>,
}

impl Builder {
    fn new(mode: &'static str) -> Self {
        let dir = TempDir::new();
        let (addr, wrapper, args) = ("127.0.0.1".into(), Vec::new(), Vec::new());
        Self { dir, mode, addr, image: None, wrapper, args, stderr: None }
    }

    /// The directory of the server, also its working directory.
    pub fn dir(&self) -> &TempDir {
        &self.dir
    }

    /// Serves a file of `size` bytes that is one hole.
    pub fn size(self, size: u64) -> Self {
        let path = self.dir.join("image");
        File::create(&path).unwrap().set_len(size).unwrap();
        self.file(path)
    }

    /// Serves a file with this content.
    pub fn content(self, content: &[u8]) -> Self {
        let path = self.dir.join("image");
        fs::write(&path, content).unwrap();
        self.file(path)
    }

    /// Serves this file.
    pub fn file(mut self, path: PathBuf) -> Self {
        self.image = Some(path);
        self
    }

    /// Listens on another address than 127.0.0.1, as `--addr` takes it; the port is always picked by the system.
    pub fn addr(mut self, addr: impl Into<String>) -> Self {
        self.addr = addr.into();
        self
    }

    /// One more argument: an option, its value, an ACL entry.
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// More arguments, separated by spaces.
    pub fn args(mut self, args: &str) -> Self {
        self.args.extend(args.split_whitespace().map(OsString::from));
        self
    }

    /// Starts it through another program, which must become the server (`prlimit`, `strace -D`).
    pub fn through(mut self, words: &[impl AsRef<OsStr>]) -> Self {
        self.wrapper.extend(words.iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// Gives it this stderr instead of a file, so that [`Server::log`] stays empty.
    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Self {
        self.stderr = Some(stderr.into());
        self
    }

    /// Starts it and waits until it is ready.
    #[track_caller]
    pub fn start(self) -> Server {
        let image = self.image.expect("an image");
        let sock = self.dir.join("control");
        let log = self.dir.join("log");
        let mut words = self.wrapper;
        words.push(BIN.into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(self.mode).args(["--addr", &self.addr]).arg("--file").arg(&image);
        if !self.addr.starts_with('/') {
            command.args(["--port", "0"]);
        }
        command.arg("--sock").arg(&sock).args(&self.args).current_dir(&self.dir.0).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(self.stderr.unwrap_or_else(|| File::create(&log).unwrap().into()));
        let process = Process::spawn(&mut command);
        let mut server = Server { process, image, sock, log, address: String::new(), dir: self.dir };
        wait_for("the control socket", SOON, || {
            assert!(server.process.is_running(), "{command:?} ended: {}", server.log());
            server.sock.exists().then_some(())
        });
        server.status().get("address").clone_into(&mut server.address);
        server
    }
}

/// A running server.
pub struct Server {
    /// The process; its id is the server's.
    pub process: Process,
    /// The file it serves.
    pub image: PathBuf,
    /// Its control socket.
    pub sock: PathBuf,
    log: PathBuf,
    address: String,
    // Last, so that the files go after the process.
    dir: TempDir,
}

impl Server {
    /// `flexnbd serve`, on 127.0.0.1 unless told otherwise.
    pub fn serve() -> Builder {
        Builder::new("serve")
    }

    /// Its directory.
    pub fn dir(&self) -> &TempDir {
        &self.dir
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Where it listens, as status tells it.
    pub fn address(&self) -> SocketAddr {
        self.address.parse().unwrap_or_else(|_| panic!("{} is no address and port", self.address))
    }

    /// The port it listens on.
    pub fn port(&self) -> u16 {
        self.address().port()
    }

    /// A client that has read the greeting.
    #[track_caller]
    pub fn connect(&self) -> Client {
        let mut client = self.connect_bare();
        let greeting = client.read_greeting();
        assert_eq!(greeting[..16], GREETING_MAGICS);
        client
    }

    /// A client that has read nothing yet. A wildcard address is reached on the loopback of its kind.
    #[track_caller]
    pub fn connect_bare(&self) -> Client {
        if self.address.starts_with('/') {
            return Client::new(UnixStream::connect(&self.address).unwrap());
        }
        let mut address = self.address();
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() { [127, 0, 0, 1].into() } else { [0, 0, 0, 0, 0, 0, 0, 1].into() });
        }
        Client::new(TcpStream::connect(address).unwrap())
    }

    /// Sends raw bytes to the control socket, shuts down that side, and returns all that comes back.
    #[track_caller]
    pub fn control(&self, bytes: impl AsRef<[u8]>) -> String {
        let mut stream = UnixStream::connect(&self.sock).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(bytes.as_ref()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Its status.
    #[track_caller]
    pub fn status(&self) -> Status {
        let answer = self.control("status\n\n");
        Status(answer.strip_prefix("0: ").unwrap_or_else(|| panic!("not a status: {answer:?}")).to_owned())
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits for a log line that holds `text` and returns it.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) -> String {
        wait_for(format_args!("a log line with {text:?}"), SOON, || {
            self.log().lines().find(|line| line.contains(text)).map(str::to_owned)
        })
    }

    /// A figure of /proc/PID/status in KiB, `VmRSS` or `VmHWM`.
    #[track_caller]
    pub fn memory_kib(&self, key: &str) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap()
    }

    /// Stops it with SIGTERM and returns how it ended.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.stop_by("TERM")
    }

    /// Stops it with a signal and returns how it ended.
    #[track_caller]
    pub fn stop_by(&mut self, signal: &str) -> ExitStatus {
        self.process.signal(signal);
        self.process.wait(SOON)
    }

    /// Fails unless it is alive, answers, and stops cleanly.
    #[track_caller]
    pub fn expect_healthy(mut self) {
        assert!(self.process.is_running(), "the server ended: {}", self.log());
        self.connect().expect_alive();
        let status = self.stop();
        assert_eq!((status.code(), status.signal()), (Some(0), None), "{}", self.log());
    }
}

/// The line of `status`.
pub struct Status(String);

impl Status {
    /// The line as it came.
    pub fn line(&self) -> &str {
        &self.0
    }

    /// The value of a key.
    #[track_caller]
    pub fn get(&self, key: &str) -> &str {
        let pair = self.0.split_whitespace().find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='));
        pair.unwrap_or_else(|| panic!("no {key} in {}", self.0))
    }

    /// The value of a key that counts.
    #[track_caller]
    pub fn number(&self, key: &str) -> u64 {
        self.get(key).parse().unwrap()
    }
}

/// `NBDMAGIC` and the magic of the oldstyle greeting.
pub const GREETING_MAGICS: [u8; 16] = *b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53";

/// The greeting of an oldstyle server.
pub fn greeting(size: u64, flags: u32) -> Vec<u8> {
    let mut bytes = [&GREETING_MAGICS[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    bytes.resize(152, 0);
    bytes
}

/// The head of a request.
pub fn request(kind: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// A simple reply.
pub fn reply(error: u32, cookie: u64) -> Vec<u8> {
    let mut bytes = 0x6744_6698_u32.to_be_bytes().to_vec();
    bytes.extend(error.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

/// A raw client of the oldstyle protocol. Every read and write has a deadline of [`SOON`].
pub struct Client {
    /// The socket; it may be one of another family, which makes no difference to what is done with it.
    pub stream: TcpStream,
}

impl Client {
    /// From a connected socket.
    pub fn new(stream: impl Into<OwnedFd>) -> Self {
        let stream = TcpStream::from(stream.into());
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        Self { stream }
    }

    /// Sends bytes.
    #[track_caller]
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends a request and its payload in one go.
    #[track_caller]
    pub fn send_request(&mut self, kind: u16, flags: u16, cookie: u64, offset: u64, length: u32, payload: &[u8]) {
        self.send(&[&request(kind, flags, cookie, offset, length), payload].concat());
    }

    /// Receives exactly `length` bytes.
    #[track_caller]
    pub fn read_bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Receives the greeting, as it comes.
    #[track_caller]
    pub fn read_greeting(&mut self) -> Vec<u8> {
        self.read_bytes(152)
    }

    /// Receives the head of a reply: the error and the cookie.
    #[track_caller]
    pub fn read_reply(&mut self) -> (u32, u64) {
        let bytes = self.read_bytes(16);
        assert_eq!(bytes[..4], 0x6744_6698_u32.to_be_bytes(), "the magic of a simple reply");
        let error = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(bytes[8..].try_into().unwrap()))
    }

    /// A request without data in its reply, answered: the error.
    #[track_caller]
    pub fn ask(&mut self, kind: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> u32 {
        let cookie = 0x0123_4567_89ab_cdef ^ offset;
        self.send_request(kind, flags, cookie, offset, length, payload);
        let (error, answered) = self.read_reply();
        assert_eq!(answered, cookie);
        error
    }

    /// Reads; an error is returned as such.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        match self.ask(kind::READ, 0, offset, length, &[]) {
            0 => Ok(self.read_bytes(length as usize)),
            error => Err(error),
        }
    }

    /// Writes; 0 when it went well.
    #[track_caller]
    pub fn write(&mut self, offset: u64, payload: &[u8]) -> u32 {
        self.ask(kind::WRITE, 0, offset, payload.len().try_into().unwrap(), payload)
    }

    /// Flushes; 0 when it went well.
    #[track_caller]
    pub fn flush(&mut self) -> u32 {
        self.ask(kind::FLUSH, 0, 0, 0, &[])
    }

    /// Fails unless a read at the beginning is answered.
    #[track_caller]
    pub fn expect_alive(&mut self) {
        self.read(0, 512).unwrap();
    }

    /// Waits until the server has closed the connection, and returns what came before.
    #[track_caller]
    pub fn read_to_close(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self.stream.read_to_end(&mut bytes) {
            // What the server has not read of ours turns its close into a reset.
            Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("not closed: {error}"),
            _ => bytes,
        }
    }

    /// Fails unless the server closes the connection without another byte.
    #[track_caller]
    pub fn expect_closed(&mut self) {
        let bytes = self.read_to_close();
        assert!(bytes.is_empty(), "unexpected before the close: {bytes:?}");
    }

    /// Fails if the server closes the connection or sends something within `time`.
    #[track_caller]
    pub fn expect_silence(&mut self, time: Duration) {
        self.stream.set_read_timeout(Some(time)).unwrap();
        let outcome = self.stream.peek(&mut [0]);
        let error = outcome.expect_err("bytes or a close where there should be silence");
        assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
        self.stream.set_read_timeout(Some(SOON)).unwrap();
    }
}

/// A peer that follows a script: one thread that accepts connections and hands each to the script, with its number.
pub struct Scripted {
    /// Where it listens.
    pub address: SocketAddr,
}

impl Scripted {
    /// Starts it. It ends with the test program; a script must not wait without a deadline.
    pub fn start(mut script: impl FnMut(usize, Client) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                script(number, Client::new(stream.unwrap()));
            }
        });
        Self { address }
    }
}

/// Says what this machine cannot test, past the capture of what a test prints.
pub fn not_tested(what: impl Display) {
    let _ = writeln!(std::io::stderr(), "not tested: {what}");
}

/// Bytes a file takes on its file system; holes take none.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// `length` bytes that look random, are never zero, and are the same for the same seed.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8 | 1
    };
    (0..length).map(|_| next()).collect()
}
