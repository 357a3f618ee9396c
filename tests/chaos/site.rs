//! Where the images of a round are, and the servers over them.

use crate::place::SOCKET;
use crate::plan::{Host, Medium, REQUEST_LIMIT_MS};
use crate::support::fuse::{Disk, Op};
use crate::support::newstyle::PORT;
use crate::support::peers::listen_after;
use crate::support::{pattern, Builder, Server, TempDir};
use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

/// The disks of a round. They go with it, after its servers.
pub struct Site {
    disks: RefCell<Vec<Disk>>,
    files: Cell<u64>,
    dir: TempDir,
    size: u64,
}

impl Site {
    /// For images of this size.
    pub fn new(size: u64) -> Self {
        Self { disks: RefCell::default(), files: Cell::new(0), dir: TempDir::new(), size }
    }

    /// An image on a disk of this kind.
    pub fn image(&self, disk: Medium, content: &[u8]) -> PathBuf {
        let path = match (disk, can_mount()) {
            (Medium::Slow(write_us), true) => {
                let disk = Disk::mount(4 * self.size).unwrap();
                disk.delay(Op::Write, .., Duration::from_micros(write_us));
                disk.delay(Op::Fsync, .., Duration::from_micros(100 * write_us));
                self.add_disk(disk)
            }
            (Medium::Full(room), true) => self.add_disk(Disk::mount(room).unwrap()),
            _ => {
                self.files.set(self.files.get() + 1);
                let path = self.dir.join(&format!("image-{}", self.files.get()));
                File::create(&path).unwrap().set_len(self.size).unwrap();
                path
            }
        };
        let file = File::options().write(true).open(&path).unwrap();
        for (number, piece) in content.chunks(4096).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, number as u64 * 4096).unwrap();
            }
        }
        path
    }

    fn add_disk(&self, disk: Disk) -> PathBuf {
        let path = disk.furnish_sparse("image", self.size);
        self.disks.borrow_mut().push(disk);
        path
    }

    /// What a listener finds in its file: not a byte of it is of any use.
    pub fn empty(&self, disk: Medium) -> PathBuf {
        let is_small = matches!(disk, Medium::Full(_));
        let content = if is_small { Vec::new() } else { pattern(self.files.get() + 7, self.size as usize) };
        self.image(disk, &content)
    }

    /// The image where there is room for all of it.
    pub fn with_room(&self, disk: Medium, image: PathBuf) -> PathBuf {
        match disk {
            Medium::Full(_) => self.image(Medium::Plain, &fs::read(image).unwrap()),
            _ => image,
        }
    }

    /// The size of its images, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// Serves an image, whatever its mark says: which one it is was decided.
#[track_caller]
pub fn serve(image: &Path, host: Host) -> Server {
    let limit = format!("FLEXNBD_MS_REQUEST_LIMIT_SECS={}", REQUEST_LIMIT_MS / 1000);
    let server = open_to_clients(Server::serve().through(&["env", &limit]));
    let server = if host.is_local {
        let path = server.dir().join("oldstyle");
        server.addr(path.to_str().unwrap())
    } else {
        server.arg(PORT)
    };
    server.file(image.to_owned()).arg("--adopt").start()
}

/// Awaits an image.
#[track_caller]
pub fn listen(image: &Path, disk: Medium, serves: bool) -> Server {
    let room = match disk {
        Medium::Limited(room) => room,
        Medium::Full(room) if !can_mount() => room,
        Medium::Plain | Medium::Slow(_) | Medium::Full(_) => u64::MAX,
    };
    let limit = if room == u64::MAX { String::new() } else { format!("ulimit -f {};", room / 512) };
    let command = format!("export FLEXNBD_MS_REQUEST_LIMIT_SECS={}; {limit} exec", REQUEST_LIMIT_MS / 1000);
    let listener = listen_after(0, &command).file(image.to_owned());
    if serves {
        open_to_clients(listener).arg(PORT).arg("--serve").start()
    } else {
        listener.arg("-v").start()
    }
}

fn open_to_clients(server: Builder) -> Builder {
    let socket = server.dir().join(SOCKET);
    server.arg("-v").arg("--newstyle-sock").arg(socket)
}

/// Whether there are disks of our own on this machine; said once if not.
fn can_mount() -> bool {
    static CAN: OnceLock<bool> = OnceLock::new();
    *CAN.get_or_init(|| Disk::mount(1 << 20).is_some())
}
