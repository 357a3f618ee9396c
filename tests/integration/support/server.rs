//! A server of the real binary, with everything it needs in a directory that goes with the test.

use super::{program, wait_for, Client, Process, TempDir, BIN, GREETING_MAGICS, SOON};
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

/// The environment variable with the `--disk-engine` of all servers that are not told another.
const DISK_ENGINE: &str = "FLEXNBD_TEST_DISK_ENGINE";

/// How a server is to be started. The image is sparse unless there is content for it.
pub struct Builder {
    dir: TempDir,
    mode: &'static str,
    addr: String,
    image: Option<PathBuf>,
    wrapper: Vec<OsString>,
    args: Vec<OsString>,
    stderr: Option<Stdio>,
    engine: Option<String>,
}

impl Builder {
    fn new(mode: &'static str) -> Self {
        // As far as it may go: one test has a thousand clients, and several run at once.
        let _ = flexnbd::sys::raise_descriptor_limit(4096);
        let dir = TempDir::new();
        let (addr, wrapper, args) = ("127.0.0.1".into(), Vec::new(), Vec::new());
        let engine = env::var(DISK_ENGINE).ok();
        Self { dir, mode, addr, image: None, wrapper, args, stderr: None, engine }
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

    /// Who waits for the disk, as `--disk-engine` takes it, whatever [`DISK_ENGINE`] says.
    pub fn engine(mut self, engine: &str) -> Self {
        self.engine = Some(engine.to_owned());
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
        let is_proxy = self.mode == "proxy";
        let image = if is_proxy { PathBuf::new() } else { self.image.expect("an image") };
        let sock = self.dir.join("control");
        let log = self.dir.join("log");
        let mut words = self.wrapper;
        words.push(BIN.into());
        let mut command = program(&words[0]);
        command.args(&words[1..]).arg(self.mode).args(["--addr", &self.addr]);
        if !is_proxy {
            command.arg("--file").arg(&image);
        }
        if !self.addr.starts_with('/') {
            command.args(["--port", "0"]);
        }
        if let Some(engine) = self.engine.as_ref().filter(|_| !is_proxy) {
            command.args(["--disk-engine", engine]);
        }
        command.arg("--sock").arg(&sock).args(&self.args).current_dir(self.dir.join("")).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(self.stderr.unwrap_or_else(|| File::create(&log).unwrap().into()));
        let process = Process::spawn(&mut command);
        let mut server = Server { process, image, sock, log, address: String::new(), dir: self.dir };
        // A listener whose sender has waited for it may be done before anybody has looked.
        let done = wait_for("the control socket", SOON, || match server.process.0.try_wait().unwrap() {
            Some(status) if status.success() => Some(true),
            Some(status) => panic!("{command:?}: {status}: {}", server.log()),
            None => server.sock.exists().then_some(false),
        });
        match server.try_status() {
            Some(status) => status.get("address").clone_into(&mut server.address),
            None => assert!(done || server.process.wait(SOON).success(), "{command:?}: {}", server.log()),
        }
        server
    }
}

/// A running server.
pub struct Server {
    /// The process; its id is the server's.
    pub process: Process,
    /// The file it serves; a proxy has none.
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

    /// `flexnbd proxy`, in front of this server.
    pub fn proxy(upstream: SocketAddr) -> Builder {
        let (addr, port) = (upstream.ip().to_string(), upstream.port().to_string());
        Self::proxy_to_nowhere().args(&format!("--conn-addr {addr} --conn-port {port}"))
    }

    /// The same; which server it is is left to the caller.
    pub fn proxy_to_nowhere() -> Builder {
        Builder::new("proxy")
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
        self.try_control(bytes.as_ref()).unwrap()
    }

    fn try_control(&self, bytes: &[u8]) -> io::Result<String> {
        let mut stream = UnixStream::connect(&self.sock)?;
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(bytes)?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// Its status.
    #[track_caller]
    pub fn status(&self) -> Status {
        let answer = self.control("status\n\n");
        Status(answer.strip_prefix("0: ").unwrap_or_else(|| panic!("not a status: {answer:?}")).to_owned())
    }

    /// Its status, unless it is at its end.
    pub fn try_status(&self) -> Option<Status> {
        let answer = self.try_control(b"status\n\n").ok()?;
        Some(Status(answer.strip_prefix("0: ")?.to_owned()))
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

    /// The time that it has had a processor for, the kernel's threads of it included.
    pub fn processor_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        let ticks: u64 = [11, 12].iter().map(|&field| fields[field].parse::<u64>().unwrap()).sum();
        // A hundred of them are a second, on every machine that Linux runs on.
        Duration::from_millis(ticks * 10)
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
