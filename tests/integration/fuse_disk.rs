//! The disk of the tests that is slow, fails or forgets does what it says.

use crate::support::fuse::calls::{
    drop_cache, fallocate, get_xattr, read_nowait, remove_xattr, seek, set_xattr, try_lock,
};
use crate::support::fuse::folder::{Change, Folder, FOLDER};
use crate::support::fuse::journal::{Journal, Sync};
use crate::support::fuse::{Disk, Op, Remains};
use crate::support::{pattern, program, run_command, wait_for, Mount, Process, TempDir, SOON};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u64 = 1 << 20;
const SECOND: u64 = 1 << 19;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;

/// With the kernel's cache and without.
const MOUNTS: [fn(u64) -> Option<Disk>; 2] = [Disk::mount, Disk::mount_direct];

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn read(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).map(|()| bytes)
}

fn error_of<T>(outcome: io::Result<T>) -> Option<i32> {
    outcome.err().and_then(|error| error.raw_os_error())
}

/// Thousands of random operations on a file there and on an ordinary one.
#[test]
fn a_file_is_as_on_any_disk() {
    for mount in MOUNTS {
        let Some(disk) = mount(8 * SIZE) else { return };
        let dir = TempDir::new();
        let (path, twin_path) = (disk.path("image"), dir.join("image"));
        let files = [&path, &twin_path].map(|path| File::create_new(path).map(|_| open(path)).unwrap());
        let mut seed = 7_u64;
        let mut below = |bound: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % bound
        };
        for step in 0..2000 {
            let (offset, length, what) = (below(SIZE), below(20_000) + 1, below(12));
            let range = offset..offset + length;
            let content = pattern(step, length as usize);
            let done = files.each_ref().map(|file| match what {
                0..4 => file.write_all_at(&content, offset).map(|()| Vec::new()),
                4 => fallocate(file, PUNCH, range.clone()).map(|()| Vec::new()),
                5 => fallocate(file, ZERO, range.clone()).map(|()| Vec::new()),
                6 => fallocate(file, ZERO | libc::FALLOC_FL_KEEP_SIZE, range.clone()).map(|()| Vec::new()),
                7 => fallocate(file, 0, range.clone()).map(|()| Vec::new()),
                8 if step % 8 == 0 => file.set_len(offset).map(|()| Vec::new()),
                _ => {
                    let mut bytes = vec![0; length as usize];
                    let count = file.read_at(&mut bytes, offset).unwrap();
                    Ok(bytes[..count].to_vec())
                }
            });
            let [there, here] = done.map(Result::unwrap);
            assert!(there == here, "step {step}: {what} {range:?}");
            assert_eq!(files[0].metadata().unwrap().len(), files[1].metadata().unwrap().len(), "step {step}");
        }
        let expected = fs::read(&twin_path).unwrap();
        assert!(fs::read(&path).unwrap() == expected);
        // Holes are zeroes, and data and holes take turns up to the end.
        let (mut at, mut allocated) = (0, 0);
        while let Some(data) = seek(&files[0], at, libc::SEEK_DATA).unwrap() {
            assert!(expected[at as usize..data as usize].iter().all(|&byte| byte == 0), "a hole at {at}");
            at = seek(&files[0], data, libc::SEEK_HOLE).unwrap().unwrap();
            assert!(at > data);
            allocated += (at - data).next_multiple_of(4096);
        }
        assert!(expected[at as usize..].iter().all(|&byte| byte == 0), "a hole at {at}");
        assert_eq!(files[0].metadata().unwrap().blocks() * 512, allocated);
        // What is durable is the same.
        files[0].sync_data().unwrap();
        File::open(disk.path("")).unwrap().sync_all().unwrap();
        assert!(disk.pending().is_empty());
        let remains: Vec<_> = disk.power_failures(0).collect();
        assert_eq!(remains.len(), 1);
        assert!(remains[0].content("image").unwrap() == expected);
    }
}

#[test]
fn names_and_attributes() {
    let Some(disk) = Disk::mount(SIZE) else { return };
    let (a, b) = (disk.path("a"), disk.path("b"));
    disk.furnish("a", b"always there");
    fs::write(&b, "new").unwrap();
    assert_eq!(fs::read(&a).unwrap(), b"always there");
    let names = || -> BTreeSet<_> {
        fs::read_dir(disk.path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!(names(), BTreeSet::from(["a", "b"].map(str::to_owned)));
    assert_eq!(error_of(File::create_new(&a)), Some(libc::EEXIST));
    assert_eq!(error_of(File::open(disk.path("c"))), Some(libc::ENOENT));

    set_xattr(&a, "user.mark", b"one", libc::XATTR_CREATE).unwrap();
    assert_eq!(error_of(set_xattr(&a, "user.mark", b"two", libc::XATTR_CREATE)), Some(libc::EEXIST));
    set_xattr(&a, "user.mark", b"three", 0).unwrap();
    assert_eq!(get_xattr(&a, "user.mark").unwrap(), b"three");
    remove_xattr(&a, "user.mark").unwrap();
    assert_eq!(error_of(get_xattr(&a, "user.mark")), Some(libc::ENODATA));
    assert_eq!(error_of(remove_xattr(&a, "user.mark")), Some(libc::ENODATA));

    // Locks are the kernel's.
    let (one, two) = (open(&a), open(&a));
    try_lock(&one).unwrap();
    assert_eq!(error_of(try_lock(&two)), Some(libc::EWOULDBLOCK));
    drop(one);
    // A program that another test starts has it for a moment.
    wait_for("the lock", SOON, || try_lock(&two).ok());

    // A file that is open has its content, whatever becomes of its name.
    let (unlinked, replaced) = (open(&a), open(&b));
    fs::remove_file(&a).unwrap();
    fs::write(&a, "another").unwrap();
    fs::rename(&a, &b).unwrap();
    assert_eq!(read(&unlinked, 0, 12).unwrap(), b"always there");
    assert_eq!(read(&replaced, 0, 3).unwrap(), b"new");
    assert_eq!(fs::read(&b).unwrap(), b"another");
    assert_eq!(names(), BTreeSet::from(["b".to_owned()]));
    let expected = [
        "create b",
        "write b 0..3",
        "setxattr a user.mark",
        "setxattr a user.mark",
        "removexattr a user.mark",
        "unlink a",
        "create a",
        "write a 0..7",
        "rename a b",
    ];
    assert_eq!(disk.log(), expected);
    assert_eq!(disk.pending(), expected);
}

#[test]
fn a_disk_is_full_at_its_size() {
    for mount in MOUNTS {
        let Some(disk) = mount(SIZE) else { return };
        let file = open(&disk.furnish_sparse("image", 8 * SIZE));
        file.write_all_at(&vec![1; SIZE as usize - 8192], 4 * SIZE).unwrap();
        assert_eq!(error_of(file.write_all_at(&[1; 8193], 0)), Some(libc::ENOSPC));
        assert_eq!(error_of(fallocate(&file, ZERO, 0..8193)), Some(libc::ENOSPC));
        let room = run_command(program("stat").args(["-f", "-c", "%S %b %f"]).arg(disk.path("")), &[]);
        assert_eq!(room.stdout, b"4096 256 2\n");
        fallocate(&file, PUNCH, 4 * SIZE..5 * SIZE).unwrap();
        file.write_all_at(&vec![2; SIZE as usize], 1).unwrap_err();
        file.write_all_at(&vec![2; SIZE as usize], 0).unwrap();
        // A file goes when it has neither a name nor a user.
        fs::remove_file(disk.path("image")).unwrap();
        assert_eq!(error_of(fs::write(disk.path("other"), [3; 4096])), Some(libc::ENOSPC));
        drop(file);
        wait_for("room", SOON, || fs::write(disk.path("other"), [3; 4096]).ok());
    }
}

#[test]
fn what_is_held_waits_and_holds_nobody() {
    for mount in MOUNTS {
        let Some(disk) = mount(4 * SIZE) else { return };
        let content = pattern(1, 2 * SIZE as usize);
        let file = open(&disk.furnish("image", &content));
        disk.hold(Op::Read, SIZE..=SIZE);
        thread::scope(|scope| {
            let held = scope.spawn(|| read(&file, SIZE - 100, 512).unwrap());
            disk.wait_for_waiting(Op::Read, 1);
            for offset in [0, SIZE / 2, SIZE + 4096] {
                assert!(read(&file, offset, 4096).unwrap() == content[offset as usize..][..4096]);
            }
            assert!(!held.is_finished());
            disk.heal(Op::Read);
            assert!(held.join().unwrap() == content[SIZE as usize - 100..][..512]);
        });
        read(&file, SIZE, 512).unwrap();
    }
}

#[test]
fn what_is_delayed_comes_late_and_out_of_order() {
    for mount in MOUNTS {
        let Some(disk) = mount(4 * SIZE) else { return };
        let content = pattern(2, 2 * SIZE as usize);
        let file = open(&disk.furnish("image", &content));
        let (slow, fast) = (Duration::from_millis(1500), Duration::from_millis(50));
        disk.delay(Op::Read, ..SIZE, slow);
        disk.delay(Op::Read, SIZE.., fast);
        let (sender, receiver) = mpsc::channel();
        thread::scope(|scope| {
            for (offset, delay, waiting) in [(0, slow, 1), (SIZE, fast, 0), (SIZE + SECOND, fast, 0)] {
                let (file, content, sender) = (&file, &content, sender.clone());
                scope.spawn(move || {
                    let start = Instant::now();
                    assert!(read(file, offset, 4096).unwrap() == content[offset as usize..][..4096]);
                    assert!(start.elapsed() >= delay, "{:?}", start.elapsed());
                    sender.send(offset).unwrap();
                });
                disk.wait_for_waiting(Op::Read, waiting);
            }
        });
        assert_eq!(receiver.try_iter().last(), Some(0));
    }
}

/// A slow disk does things at the end of their time. The kernel keeps changes of a file waiting meanwhile, not reads.
#[test]
fn what_is_under_way_has_not_happened() {
    for mount in MOUNTS {
        let Some(disk) = mount(2 * SIZE) else { return };
        let file = open(&disk.furnish_sparse("image", SIZE));
        file.write_all_at(&[1; 4096], 0).unwrap();
        disk.hold(Op::Fsync, ..);
        thread::scope(|scope| {
            let sync = scope.spawn(|| file.sync_data().unwrap());
            disk.wait_for_waiting(Op::Fsync, 1);
            assert_eq!(disk.pending(), ["write image 0..4096"]);
            assert_eq!(read(&file, 0, 512).unwrap(), [1; 512]);
            let write = scope.spawn(|| file.write_all_at(&[2; 4096], SECOND).unwrap());
            assert_eq!(read(&file, SECOND, 512).unwrap(), [0; 512]);
            disk.hold(Op::Write, ..);
            disk.heal(Op::Fsync);
            sync.join().unwrap();
            disk.wait_for_waiting(Op::Write, 1);
            assert!(disk.pending().is_empty());
            assert_eq!(disk.log(), ["write image 0..4096", "fdatasync image"]);
            disk.heal(Op::Write);
            write.join().unwrap();
            assert_eq!(disk.pending(), [format!("write image {SECOND}..{}", SECOND + 4096)]);
            assert_eq!(read(&file, SECOND, 512).unwrap(), [2; 512]);
        });
    }
}

#[test]
fn what_fails_fails_there_and_then() {
    for mount in MOUNTS {
        let Some(disk) = mount(4 * SIZE) else { return };
        let path = disk.furnish("image", &pattern(3, 2 * SIZE as usize));
        let file = open(&path);
        disk.fail(Op::Read, SIZE..SIZE + 4096, libc::EIO);
        assert_eq!(error_of(read(&file, SIZE, 512)), Some(libc::EIO));
        read(&file, SIZE - 4096, 4096).unwrap();
        read(&file, SIZE + 4096, 4096).unwrap();
        assert_eq!(error_of(read(&file, SIZE, 512)), Some(libc::EIO), "again");
        disk.heal(Op::Read);
        read(&file, SIZE - 4096, 12288).unwrap();

        disk.fail(Op::Write, 4096..8192, libc::ENOSPC);
        assert_eq!(error_of(file.write_all_at(&[9; 512], 4096)), Some(libc::ENOSPC));
        file.write_all_at(&[9; 4096], 0).unwrap();
        assert_eq!(disk.pending(), ["write image 0..4096"], "what failed was not done");
        disk.heal(Op::Write);

        disk.fail_once(Op::Fsync, .., libc::EIO);
        assert_eq!(error_of(file.sync_data()), Some(libc::EIO));
        file.sync_data().unwrap();
        assert_eq!(disk.count(Op::Fsync), 2);

        disk.fail(Op::Fallocate, .., libc::EOPNOTSUPP);
        assert_eq!(error_of(fallocate(&file, PUNCH, 0..4096)), Some(libc::EOPNOTSUPP));
        disk.fail(Op::Seek, .., libc::EIO);
        assert_eq!(error_of(seek(&file, 0, libc::SEEK_DATA)), Some(libc::EIO));
        disk.fail(Op::Resize, .., libc::EIO);
        assert_eq!(error_of(file.set_len(0)), Some(libc::EIO));
        disk.fail(Op::Xattr, .., libc::EDQUOT);
        assert_eq!(error_of(set_xattr(&path, "user.mark", b"", 0)), Some(libc::EDQUOT));
        disk.fail(Op::Rename, .., libc::EIO);
        assert_eq!(error_of(fs::rename(&path, disk.path("other"))), Some(libc::EIO));
        disk.fail(Op::Unlink, .., libc::EROFS);
        assert_eq!(error_of(fs::remove_file(&path)), Some(libc::EROFS));
        disk.fail(Op::FsyncFolder, .., libc::EIO);
        assert_eq!(error_of(File::open(disk.path("")).unwrap().sync_all()), Some(libc::EIO));
        disk.fail(Op::Open, .., libc::EMFILE);
        assert_eq!(error_of(File::open(&path)), Some(libc::EMFILE));
    }
}

#[test]
fn the_page_cache_holds_what_was_read_or_nothing() {
    for (mount, is_cached) in [(MOUNTS[0], true), (MOUNTS[1], false)] {
        let Some(disk) = mount(SIZE) else { return };
        let path = disk.furnish("image", &pattern(4, SIZE as usize));
        let file = open(&path);
        let reads = |read: &dyn Fn()| {
            let before = disk.count(Op::Read);
            read();
            disk.count(Op::Read) - before
        };
        let one = || drop(read(&file, SECOND, 4096).unwrap());
        assert_eq!(reads(&one), 1, "cold");
        let again = u64::from(!is_cached);
        assert_eq!(reads(&one), again);
        assert_eq!(reads(&|| drop(read(&open(&path), SECOND, 4096).unwrap())), again, "opened again");
        // What was written is in the cache, and here, at once.
        file.write_all_at(&[5; 4096], 0).unwrap();
        assert_eq!(disk.pending(), ["write image 0..4096"]);
        assert_eq!(reads(&|| drop(read(&file, 0, 4096).unwrap())), again);
        disk.drop_cache("image");
        assert_eq!(reads(&one), 1, "cold again");
        // Where the kernel cannot tell whether it has to wait, it refuses.
        assert_eq!(error_of(read_nowait(&file, SECOND, &mut [0; 512])), Some(libc::EOPNOTSUPP));
    }
}

#[test]
fn what_a_power_failure_left_can_be_mounted() {
    let Some(disk) = Disk::mount(SIZE) else { return };
    let path = disk.furnish("image", &[1; 8192]);
    let file = open(&path);
    file.write_all_at(&[2; 4096], 0).unwrap();
    file.sync_data().unwrap();
    file.write_all_at(&[3; 4096], 4096).unwrap();
    fs::rename(&path, disk.path("renamed")).unwrap();
    let mut found = BTreeSet::new();
    for remains in disk.power_failures(0) {
        let again = Disk::mount_remains(&remains, SIZE).unwrap();
        for entry in fs::read_dir(again.path("")).unwrap() {
            let path = entry.unwrap().path();
            let content = fs::read(&path).unwrap();
            assert!(content[..4096] == [2; 4096]);
            found.insert((path.file_name().unwrap().to_owned(), content[4096]));
        }
        assert!(again.log().is_empty() && again.pending().is_empty());
    }
    let all = [("image", 1), ("image", 3), ("renamed", 1), ("renamed", 3)];
    assert_eq!(found, all.map(|(name, byte)| (name.into(), byte)).into());
}

/// So there is also a slow disk below a local file system, where `RWF_NOWAIT` says whether a read has to wait.
#[test]
fn a_local_file_system_can_lie_on_it() {
    let Some(disk) = Disk::mount_direct(64 * SIZE) else { return };
    let Some(mount) = Mount::over("ext4", &disk.furnish_sparse("disk", 64 * SIZE)) else { return };
    let content = pattern(8, SIZE as usize);
    fs::write(mount.join("image"), &content).unwrap();
    let file = open(&mount.join("image"));
    file.sync_all().unwrap();
    drop_cache(&file);
    disk.hold(Op::Read, ..);
    thread::scope(|scope| {
        let mut bytes = [0; 4096];
        assert_eq!(error_of(read_nowait(&file, SECOND, &mut bytes)), Some(libc::EAGAIN));
        let held = scope.spawn(|| read(&file, SECOND, 4096).unwrap());
        disk.wait_for_waiting(Op::Read, 1);
        assert_eq!(error_of(read_nowait(&file, SECOND, &mut bytes)), Some(libc::EAGAIN));
        disk.heal(Op::Read);
        assert!(held.join().unwrap() == content[SECOND as usize..][..4096]);
        assert_eq!(read_nowait(&file, SECOND, &mut bytes).unwrap(), 4096);
        assert!(bytes == content[SECOND as usize..][..4096]);
    });
    // What a loop device asks of its file.
    disk.fail(Op::FsyncAll, .., libc::EIO);
    file.write_all_at(&[1; 512], 0).unwrap();
    assert_eq!(error_of(file.sync_data()), Some(libc::EIO));
    disk.heal(Op::FsyncAll);
}

/// Whoever waits for what is held can be killed, as is true of disks that are worth it.
#[test]
fn who_waits_can_be_killed() {
    for mount in MOUNTS {
        let Some(disk) = mount(SIZE) else { return };
        let path = disk.furnish("image", &pattern(5, SIZE as usize));
        let operand = |word: &str| format!("{word}={}", path.display());
        for (op, arguments) in [
            (Op::Read, [operand("if"), "of=/dev/null".into(), "count=1".into()]),
            (Op::Write, ["if=/dev/zero".into(), operand("of"), "count=1".into()]),
            (Op::Fsync, ["count=0".into(), operand("of"), "conv=notrunc,fdatasync".into()]),
        ] {
            disk.hold(op, ..);
            let mut process = Process::spawn(program("dd").args(arguments).arg("status=none"));
            disk.wait_for_waiting(op, 1);
            process.signal("STOP");
            process.signal("CONT");
            process.0.kill().unwrap();
            process.wait(SOON);
            disk.heal(op);
        }
    }
}

#[test]
fn nothing_is_left_after_a_panic() {
    for mount in MOUNTS {
        let Some(disk) = mount(SIZE) else { return };
        let path = disk.furnish("image", &pattern(6, SIZE as usize));
        let file = open(&path);
        disk.hold(Op::Read, ..);
        let waiting = thread::spawn(move || read(&file, 0, 512));
        disk.wait_for_waiting(Op::Read, 1);
        let outcome = catch_unwind(AssertUnwindSafe(move || {
            let _disk = disk;
            // As a panic, but without its message.
            std::panic::resume_unwind(Box::new(()));
        }));
        outcome.unwrap_err();
        assert!(error_of(waiting.join().unwrap()).is_some());
        let folder = path.parent().unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(folder.to_str().unwrap()));
        assert!(!folder.parent().unwrap().exists());
    }
}

fn write(file: u64, number: u8) -> Change {
    Change::Write { file, offset: u64::from(number), bytes: vec![number] }
}

fn create(name: &str, file: u64) -> Change {
    Change::Create { name: name.to_owned(), file }
}

/// A journal of one file, `image`, with eight zeroes.
fn journal() -> (Journal, u64) {
    let (mut journal, file) = (Journal::new(Folder::default()), FOLDER + 1);
    journal.furnish(&[create("image", file), Change::Resize { file, size: 8 }]);
    (journal, file)
}

/// All contents of `image` that are possible now.
fn contents(journal: &Journal) -> BTreeSet<Option<Vec<u8>>> {
    journal.power_failures(0).map(|remains| remains.content("image")).collect()
}

#[test]
fn a_power_failure_leaves_any_set_of_what_is_not_durable() {
    let (mut journal, file) = journal();
    assert_eq!(contents(&journal), BTreeSet::from([Some(vec![0; 8])]));
    journal.change(write(file, 1));
    journal.sync(Sync::Data(file), true);
    for number in 2..5 {
        journal.change(write(file, number));
    }
    let mut expected = BTreeSet::new();
    for set in 0..8_u8 {
        expected.insert(Some(vec![0, 1, 2 * (set & 1), 3 * (set >> 1 & 1), 4 * (set >> 2), 0, 0, 0]));
    }
    assert_eq!(contents(&journal), expected);
    // What comes after a sync stays open.
    journal.sync(Sync::File(file), true);
    journal.change(write(file, 5));
    assert_eq!(contents(&journal), [0, 5].map(|last| Some(vec![0, 1, 2, 3, 4, last, 0, 0])).into());
    // Of another file, or of names: not this content.
    journal.sync(Sync::Data(file + 1), true);
    journal.sync(Sync::Names, true);
    assert_eq!(journal.pending(), ["write image 5..6"]);
    let lost = journal.power_failures(0).next().unwrap();
    assert_eq!(lost.to_string(), "after a power failure that lost [\"write image 5..6\"]");
}

#[test]
fn a_sync_that_failed_is_not_made_good_by_the_next() {
    let (mut journal, file) = journal();
    journal.change(write(file, 1));
    journal.sync(Sync::Data(file), false);
    journal.change(write(file, 2));
    journal.sync(Sync::Data(file), true);
    assert_eq!(journal.log().last().unwrap(), "fdatasync image");
    assert_eq!(contents(&journal), [0, 1].map(|first| Some(vec![0, first, 2, 0, 0, 0, 0, 0])).into());
    // What is durable behind it stays durable.
    journal.change(Change::Resize { file, size: 2 });
    journal.sync(Sync::Data(file), true);
    assert_eq!(contents(&journal), [0, 1].map(|first| Some(vec![0, first])).into());
}

#[test]
fn names_are_durable_by_the_folder_and_attributes_by_fsync() {
    let (mut journal, file) = journal();
    let states = |journal: &Journal| -> BTreeSet<String> {
        let describe = |remains: Remains| {
            let files = remains.names().into_iter().map(|name| {
                let mark = remains.xattr(name, "user.mark").map(|value| String::from_utf8(value.to_vec()).unwrap());
                format!("{name}:{}:{}", remains.content(name).unwrap().len(), mark.unwrap_or_default())
            });
            files.collect::<Vec<_>>().join(" ")
        };
        journal.power_failures(0).map(describe).collect()
    };
    let set = |states: &[&str]| -> BTreeSet<String> { states.iter().map(ToString::to_string).collect() };
    journal.change(Change::SetXattr { file, key: "user.mark".into(), value: b"new".into() });
    journal.sync(Sync::Data(file), true);
    assert_eq!(states(&journal), set(&["image:8:", "image:8:new"]));
    journal.sync(Sync::File(file), true);
    assert_eq!(states(&journal), set(&["image:8:new"]));

    // A new file that takes the place of the old one: empty, if nobody synced it; and both may be there.
    let other = file + 1;
    journal.change(create("temp", other));
    journal.change(Change::Resize { file: other, size: 4 });
    let rename = Change::Rename { from: "temp".into(), to: "image".into(), file: other };
    journal.change(rename);
    let all = ["image:8:new", "image:8:new temp:0:", "image:8:new temp:4:", "image:0:", "image:4:"];
    assert_eq!(states(&journal), set(&all));
    journal.sync(Sync::Data(other), true);
    assert_eq!(states(&journal), set(&["image:8:new", "image:8:new temp:4:", "image:4:"]));
    journal.sync(Sync::Names, true);
    assert_eq!(states(&journal), set(&["image:4:"]));

    journal.change(Change::Unlink { name: "image".into(), file: other });
    assert_eq!(states(&journal), set(&["image:4:", ""]));
    journal.sync(Sync::File(other), true);
    assert_eq!(states(&journal), set(&["image:4:", ""]), "the name is not the file's");
    journal.sync(Sync::Names, true);
    assert_eq!(states(&journal), set(&[""]));
}

#[test]
fn of_many_changes_every_beginning_and_200_sets_are_tried() {
    let (mut journal, file) = journal();
    let sets = |journal: &Journal, seed| -> Vec<Vec<u8>> {
        journal.power_failures(seed).map(|remains| remains.content("image").unwrap()).collect()
    };
    (1..=10).for_each(|number| journal.change(write(file, number)));
    assert_eq!(sets(&journal, 0).into_iter().collect::<BTreeSet<_>>().len(), 1 << 10);
    (11..=40).for_each(|number| journal.change(write(file, number)));
    let found = sets(&journal, 1);
    assert_eq!(found.len(), 41 + 200);
    for (count, beginning) in found[..41].iter().enumerate() {
        let expected: Vec<u8> = (0..=count.max(7) as u8).map(|n| if usize::from(n) <= count { n } else { 0 }).collect();
        assert_eq!(*beginning, expected);
    }
    assert!(found == sets(&journal, 1), "the same for the same seed");
    let others = found[41..].iter().chain(&sets(&journal, 2)[41..]).collect::<BTreeSet<_>>().len();
    assert_eq!(others, 400, "and others for another");
    // Each change is there about as often as not.
    for number in 1..=40 {
        let there = found[41..].iter().filter(|content| content.get(number).is_some_and(|&byte| byte != 0)).count();
        assert!((60..140).contains(&there), "{number}: {there}");
    }
}
