//! What tests use of the system: its programs, devices and file systems. Where something is missing, the test is left
//! out, and that is told with the reason; what is there has to work.

use super::{run_command, wait_for, TempDir, SOON};
use flexnbd::sys::ring::Ring;
use socket2::{Domain, Socket, Type};
use std::env;
use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

/// Where programs of the system are; a user's path may leave out half of them.
const FOLDERS: [&str; 4] = ["/usr/bin", "/bin", "/usr/sbin", "/sbin"];

/// A program of the system, found whatever the path of whoever runs the tests.
pub fn program(name: impl AsRef<OsStr>) -> Command {
    // The folders of the system come first: nbdsh runs the first python3, and only the system's has its module.
    let users = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(FOLDERS.iter().map(PathBuf::from).chain(env::split_paths(&users)));
    let mut command = Command::new(name);
    command.env("PATH", path.unwrap());
    command
}

/// A port of 127.0.0.1 that nobody is given by chance while the tests run, but anybody may listen on. A source goes on
/// trying the port of a destination that is gone: it must not find the server of another test there.
pub fn reserved_port() -> u16 {
    static RESERVED: Mutex<Vec<Socket>> = Mutex::new(Vec::new());
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    // A socket that is bound and does not listen keeps the system from picking its port, and with this flag it is in
    // the way of nobody who asks for the port by number.
    socket.set_reuse_address(true).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let port = socket.local_addr().unwrap().as_socket().unwrap().port();
    RESERVED.lock().unwrap().push(socket);
    port
}

/// Leaves a socket on which nobody answers, as a process does that was killed.
pub fn leave_stale_socket(path: &Path) {
    drop(UnixListener::bind(path).unwrap());
    // A program that another test is starting may have it open for a moment.
    wait_for("a stale socket", SOON, || UnixStream::connect(path).is_err().then_some(()));
}

/// Runs a program that has to succeed; returns what it printed.
#[track_caller]
pub fn must(name: &str, args: &[&str]) -> String {
    let output = run_command(program(name).args(args), &[]);
    assert_eq!(output.code, Some(0), "{name} {args:?}: {}", output.stderr);
    String::from_utf8(output.stdout).unwrap()
}

/// What a test needs and not every machine has.
#[derive(Clone, Copy)]
pub enum Need<'a> {
    /// Rights over devices, mounts and networks: not every user is root, nor root of a container all of root.
    Root,
    /// A program.
    Program(&'a str),
    /// A file system in the kernel.
    FileSystem(&'a str),
    /// A ring, which `--disk-engine ring` asks for.
    Ring,
    /// A script that the kernel lets run; it needs root.
    Kernel(&'a str),
}

impl Need<'_> {
    /// Why the machine cannot satisfy it, if it cannot.
    fn lack(&self) -> Option<String> {
        match *self {
            Self::Root => {
                const NET_ADMIN: u64 = 1 << 12;
                const SYS_ADMIN: u64 = 1 << 21;
                let status = fs::read_to_string("/proc/self/status").unwrap();
                let rights = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
                let rights = u64::from_str_radix(rights.trim(), 16).unwrap();
                (rights & NET_ADMIN == 0 || rights & SYS_ADMIN == 0).then(|| "this user is not root".into())
            }
            Self::Program(name) => {
                let found = FOLDERS.iter().any(|folder| Path::new(folder).join(name).exists());
                (!found).then(|| format!("there is no program {name}"))
            }
            Self::FileSystem(kind) => {
                let known = || {
                    let all = fs::read_to_string("/proc/filesystems").unwrap();
                    all.lines().any(|line| line.split_whitespace().next_back() == Some(kind))
                };
                // The kernel may have it as a module.
                let found = known() || (program("modprobe").arg(kind).output().is_ok() && known());
                (!found).then(|| format!("the kernel has no {kind}"))
            }
            Self::Ring => {
                let dir = TempDir::new();
                let file = File::create(dir.join("file")).unwrap();
                Ring::open(&file, 1, None).err().map(|error| format!("there is no io_uring: {error}"))
            }
            Self::Kernel(script) => {
                let output = run_command(program("sh").args(["-c", script]), &[]);
                (output.code != Some(0)).then(|| format!("the kernel refuses `{script}`: {}", output.stderr.trim()))
            }
        }
    }
}

/// True when the machine has all that a test needs. Otherwise the test is to return, and `make test` lists it.
pub fn has(needs: &[Need]) -> bool {
    match needs.iter().find_map(Need::lack) {
        Some(why) => {
            not_tested(why);
            false
        }
        None => true,
    }
}

/// Tells that the test that runs here is left out, and why: for the list at the end of `make test`, or on stderr, past
/// the capture of what a test prints.
pub fn not_tested(why: impl Display) {
    let line = format!("{}: {why}\n", thread::current().name().unwrap_or("a thread of a test"));
    match env::var_os("FLEXNBD_NOT_TESTED") {
        Some(list) => File::options().append(true).create(true).open(list).unwrap().write_all(line.as_bytes()).unwrap(),
        None => drop(io::stderr().write_all(format!("not tested: {line}").as_bytes())),
    }
}

/// A loop device over a file, detached when dropped.
pub struct Loop(String);

impl Loop {
    /// `None` where the machine has none to give; that has been told then.
    #[track_caller]
    pub fn attach(file: &Path) -> Option<Self> {
        Self::attach_with(file, &[])
    }

    #[track_caller]
    fn attach_with(file: &Path, options: &[&str]) -> Option<Self> {
        let needs = [Need::Root, Need::Program("losetup"), Need::Kernel("losetup --find")];
        let args = [&["--find", "--show"], options, &[file.to_str().unwrap()]].concat();
        has(&needs).then(|| Self(must("losetup", &args).trim().to_owned()))
    }

    /// The device.
    pub fn path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = program("losetup").args(["--detach", &self.0]).status();
    }
}

/// A control group whose processes may read so often in a second from a device, removed when dropped.
pub struct Throttle(PathBuf);

impl Throttle {
    /// `None` where the machine has none to give; that has been told then.
    #[track_caller]
    pub fn reads(device: &Path, per_second: u32) -> Option<Self> {
        let id = fs::metadata(device).unwrap().rdev();
        let device = format!("{}:{}", libc::major(id), libc::minor(id));
        Self::make(&device, per_second)
            .map_err(|why| not_tested(format_args!("no control group for disks: {why}")))
            .ok()
    }

    fn make(device: &str, per_second: u32) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let found = mounts.find_map(|mount| match mount[2] {
            "cgroup" if mount[3].split(',').any(|option| option == "blkio") => {
                Some((mount[1].to_owned(), "blkio.throttle.read_iops_device", format!("{device} {per_second}")))
            }
            "cgroup2" if fs::write(format!("{}/cgroup.subtree_control", mount[1]), "+io").is_ok() => {
                Some((mount[1].to_owned(), "io.max", format!("{device} riops={per_second}")))
            }
            _ => None,
        });
        let (root, file, limit) = found.ok_or(ErrorKind::NotFound)?;
        let group = Self(Path::new(&root).join(format!("flexnbd-test-{}-{device}", std::process::id())));
        // One that was killed has left it.
        let _ = fs::remove_dir(&group.0);
        fs::create_dir(&group.0)?;
        fs::write(group.0.join(file), limit)?;
        Ok(group)
    }

    /// The words of a command that joins it and becomes the command behind them.
    pub fn joining(&self) -> [String; 4] {
        let script = format!("echo $$ >'{}' && exec \"$@\"", self.0.join("cgroup.procs").display());
        ["sh".into(), "-c".into(), script, "sh".into()]
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// A mounted file system, unmounted when dropped.
pub struct Mount {
    point: PathBuf,
    // In this order: unmounted, then detached, then removed.
    _loop: Option<Loop>,
    _dir: TempDir,
}

impl Mount {
    /// A tmpfs of this size. `None` where the machine does not allow it; that has been told then.
    #[track_caller]
    pub fn tmpfs(size: &str) -> Option<Self> {
        if !has(&[Need::Root, Need::Program("mount"), Need::FileSystem("tmpfs")]) {
            return None;
        }
        let dir = TempDir::new();
        let size = format!("size={size}");
        Some(Self::on(dir, None, &["-t", "tmpfs", "-o", &size, "flexnbd-test"]))
    }

    /// A new file system of this kind, on a loop device. `None` as in [`Mount::tmpfs`].
    #[track_caller]
    pub fn make(kind: &str) -> Option<Self> {
        let dir = TempDir::new();
        let disk = dir.join("disk");
        File::create(&disk).unwrap().set_len(512 << 20).unwrap();
        Self::format(kind, &disk, &[], dir)
    }

    /// A new file system of this kind, on a loop device over this file, of which the kernel caches nothing more than
    /// what the file system does. `None` as in [`Mount::tmpfs`].
    #[track_caller]
    pub fn over(kind: &str, file: &Path) -> Option<Self> {
        Self::format(kind, file, &["--direct-io=on"], TempDir::new())
    }

    #[track_caller]
    fn format(kind: &str, file: &Path, options: &[&str], dir: TempDir) -> Option<Self> {
        let mkfs = format!("mkfs.{kind}");
        if !has(&[Need::Root, Need::Program("mount"), Need::Program(&mkfs), Need::FileSystem(kind)]) {
            return None;
        }
        let device = Loop::attach_with(file, options)?;
        must(&mkfs, &[&device.0]);
        let path = device.0.clone();
        Some(Self::on(dir, Some(device), &["-t", kind, &path]))
    }

    #[track_caller]
    fn on(dir: TempDir, device: Option<Loop>, what: &[&str]) -> Self {
        let point = dir.join("mount");
        fs::create_dir(&point).unwrap();
        must("mount", &[what, &[point.to_str().unwrap()]].concat());
        Self { point, _loop: device, _dir: dir }
    }

    /// A path in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.point.join(name)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // At the latest when programs that other tests are starting have closed the files they inherited.
        let _ = program("umount").arg("--lazy").arg(&self.point).status();
    }
}
