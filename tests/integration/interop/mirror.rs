//! Migrations to servers that others wrote, from Debian's packages, and to the newstyle port of our own listener, each
//! under a client that writes all along. Then both images are compared.

use crate::support::newstyle::{address, PORT};
use crate::support::peers::{expect_migrated, expect_same, listen, mirror, start_mirror, tell, Worker};
use crate::support::{pattern, program, reserved_port, run_command, wait_for, Process, Server, TempDir, SOON};
use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

const SIZE: u64 = 24 << 20;

/// Another server, on a port of its own, and the image it writes.
struct Destination {
    process: Process,
    address: SocketAddr,
    image: PathBuf,
    dir: TempDir,
}

impl Destination {
    /// Starts a program; `args` gets the directory, the image and the port.
    #[track_caller]
    fn start(name: &str, args: impl FnOnce(&TempDir, &str, u16) -> Vec<String>) -> Self {
        let dir = TempDir::new();
        let image = dir.join("image");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        let port = reserved_port();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut command = program(name);
        command
            .args(args(&dir, image.to_str().unwrap(), port))
            .current_dir(dir.join(""))
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command.stderr(File::create(dir.join("stderr")).unwrap());
        let mut process = Process::spawn(&mut command);
        wait_for(format_args!("{name} to listen"), SOON, || {
            let failed = process.0.try_wait().unwrap().is_some_and(|status| !status.success());
            assert!(!failed, "{command:?}: {}", fs::read_to_string(dir.join("stderr")).unwrap_or_default());
            TcpStream::connect(address).ok()
        });
        Self { process, address, image, dir }
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        // nbd-server serves one client and no more unless it is a daemon.
        if let Ok(pid) = fs::read_to_string(self.dir.join("pid")) {
            let _ = Command::new("kill").arg(pid.trim()).status();
        }
    }
}

/// A source with data, holes, and zeroes that are data.
fn source() -> Server {
    let server = Server::serve().size(SIZE).arg(PORT).start();
    let file = File::options().write(true).open(&server.image).unwrap();
    for (at, length) in [(0, 3 << 20), (5 << 20, 4096), (9_000_000, 2_000_001), (SIZE - 70_000, 70_000)] {
        file.write_all_at(&pattern(at, length), at).unwrap();
    }
    file.write_all_at(&vec![0; 100_000], 2 << 20).unwrap();
    server
}

/// Migrates under a writing client, which is cut off at the end as all are; `more` are options of `mirror`.
fn migrate(source: &mut Server, to: SocketAddr, more: &str) {
    let worker = Worker::start(source.address(), 1 << 20..5 << 20);
    // Slow at first, so that the client is seen to go on while the image is copied.
    // On a machine so busy that it is not greeted in time, it tries again.
    let options = format!("{more} --max-speed 1000000");
    wait_for("the start", SOON * 2, || (mirror(source, to, &options).code == Some(0)).then_some(()));
    worker.expect_progress();
    worker.may_end();
    assert_eq!(tell("mirror-speed", source, "--max-speed 0").0, Some(0));
    let status = source.process.wait(SOON);
    assert_eq!(status.code(), Some(0), "{}", source.log());
    drop(worker.join());
}

#[test]
fn to_nbdkit_file() {
    let destination = Destination::start("nbdkit", |_, image, port| {
        ["-f", "-p", &port.to_string(), "-i", "127.0.0.1", "file", image].map(Into::into).to_vec()
    });
    let mut source = source();
    migrate(&mut source, destination.address, "");
    expect_same(&source.image, &destination.image);
}

/// The image of the memory plugin is gone when it ends, so it is read over NBD.
#[test]
fn to_nbdkit_memory_and_back() {
    let destination = Destination::start("nbdkit", |_, _, port| {
        ["-f", "-p", &port.to_string(), "-i", "127.0.0.1", "memory", &SIZE.to_string()].map(Into::into).to_vec()
    });
    let mut source = source();
    migrate(&mut source, destination.address, "");
    let mut command = program("nbdcopy");
    command.arg(format!("nbd://{}", destination.address)).arg(&destination.image);
    let copied = run_command(&mut command, &[]);
    assert_eq!(copied.code, Some(0), "{}", copied.stderr);
    expect_same(&source.image, &destination.image);
}

/// nbdkit with filters that take away zeroes, or make FUA a flush: what is not offered is not used.
#[test]
fn to_servers_that_offer_little() {
    for filter in ["nozero", "fua"] {
        let destination = Destination::start("nbdkit", |_, image, port| {
            let (filter, port) = (format!("--filter={filter}"), port.to_string());
            ["-f", "-p", &port, "-i", "127.0.0.1", &filter, "file", image].map(Into::into).to_vec()
        });
        let mut source = source();
        migrate(&mut source, destination.address, "");
        expect_same(&source.image, &destination.image);
    }
}

/// A destination that offers no FLUSH is taken; that durability is its own affair is said in the log.
#[test]
fn to_a_server_without_flush() {
    let destination = Destination::start("nbdkit", |_, image, port| {
        ["-f", "-p", &port.to_string(), "-i", "127.0.0.1", "eval", &format!("get_size=stat -c %s {image}")]
            .map(Into::into)
            .into_iter()
            .chain([
                format!("pread=dd if={image} skip=$4 count=$3 iflag=count_bytes,skip_bytes status=none"),
                format!("pwrite=dd of={image} seek=$4 oflag=seek_bytes conv=notrunc status=none bs=1M"),
            ])
            .collect()
    });
    let mut source = source();
    start_mirror(&source, destination.address, "");
    let status = source.process.wait(SOON);
    assert_eq!(status.code(), Some(0), "{}", source.log());
    expect_same(&source.image, &destination.image);
    assert!(source.log().contains("FLUSH"), "{}", source.log());
}

#[test]
fn to_qemu_nbd() {
    let destination = Destination::start("qemu-nbd", |_, image, port| {
        let port = port.to_string();
        ["-f", "raw", "-t", "-e", "8", "-b", "127.0.0.1", "-p", &port, "-x", "disk", image].map(Into::into).to_vec()
    });
    let mut source = source();
    let refused = mirror(&source, destination.address, "--export other");
    assert_ne!(refused.code, Some(0), "there is no such export");
    assert!(!refused.stderr.is_empty());
    migrate(&mut source, destination.address, "--export disk");
    expect_same(&source.image, &destination.image);
}

#[test]
fn to_nbd_server() {
    let destination = Destination::start("nbd-server", |dir, image, port| {
        let config = format!(
            "[generic]\nport = {port}\nlistenaddr = 127.0.0.1\nallowlist = true\n[disk]\nexportname = {image}\nflush = true\n\
             fua = true\ntrim = true\n"
        );
        let path = dir.join("config");
        fs::write(&path, config).unwrap();
        ["-C", path.to_str().unwrap(), "-p", dir.join("pid").to_str().unwrap()].map(Into::into).to_vec()
    });
    let mut source = source();
    migrate(&mut source, destination.address, "--export disk");
    expect_same(&source.image, &destination.image);
}

#[test]
fn to_the_newstyle_port_of_a_listener() {
    let mut destination = listen(0).size(SIZE).arg(PORT).start();
    let mut source = source();
    let worker = Worker::start(source.address(), 1 << 20..5 << 20);
    worker.may_end();
    start_mirror(&source, address(&destination), "");
    expect_migrated(&mut source, &mut destination);
    drop(worker.join());
}

/// A name for a server that has none but the default one is an error that is told, and nothing starts.
#[test]
fn an_export_that_is_not_there_is_told() {
    let destination = listen(0).size(SIZE).arg(PORT).start();
    let source = source();
    let refused = mirror(&source, address(&destination), "--export nowhere");
    assert_ne!(refused.code, Some(0), "{refused:?}");
    assert_eq!(source.status().get("is_mirroring"), "false");
    let refused = mirror(&source, destination.address(), "--export nowhere");
    assert_ne!(refused.code, Some(0), "oldstyle has no names: {refused:?}");
    source.expect_healthy();
}

/// Killed in the middle, another server in its place: the migration begins again and ends well.
#[test]
fn a_destination_that_dies_is_tried_again() {
    let mut first = Destination::start("nbdkit", |_, image, port| {
        ["-f", "-p", &port.to_string(), "-i", "127.0.0.1", "file", image].map(Into::into).to_vec()
    });
    let mut source = source();
    start_mirror(&source, first.address, "--max-speed 2000000");
    wait_for("some of it", SOON, || (source.status().number("migration_bytes_left") < SIZE - 100_000).then_some(()));
    first.process.signal("KILL");
    first.process.wait(SOON);
    wait_for("another attempt", SOON, || (source.status().number("migration_attempts") > 1).then_some(()));
    let mut command = program("nbdkit");
    let port = first.address.port().to_string();
    command.args(["-f", "-p", &port, "-i", "127.0.0.1", "file"]).arg(&first.image);
    let _second = Process::spawn(command.stdin(Stdio::null()));
    assert_eq!(tell("mirror-speed", &source, "--max-speed 0").0, Some(0));
    let status = source.process.wait(SOON);
    assert_eq!(status.code(), Some(0), "{}", source.log());
    expect_same(&source.image, &first.image);
}
