//! Zero blocks over holes leave holes, on every file system this machine can make; block devices can be served too.

use crate::support::{allocated, flag, kind, pattern, Loop, Mount, Server, TempDir};
use std::fs::{self, File};
use std::path::Path;

const SIZE: usize = 16 << 20;

/// All that is promised about holes, on the file system of `folder`.
fn holes_stay(folder: &Path) {
    let dir = TempDir::within(folder);
    let path = dir.join("image");
    File::create(&path).unwrap().set_len(SIZE as u64).unwrap();
    let server = Server::serve().file(path.clone()).start();
    let mut client = server.connect();
    let mut model = vec![0; SIZE];
    let mut write = |offset: usize, bytes: &[u8]| {
        assert_eq!(client.write(offset as u64, bytes), 0);
        model[offset..][..bytes.len()].copy_from_slice(bytes);
    };
    // File systems count what was delayed only when it is on the disk.
    let used = || {
        File::open(&path).unwrap().sync_all().unwrap();
        allocated(&path)
    };
    let empty = used();

    write(0, &vec![0; SIZE]);
    write(4096, &[0; 4096]);
    write(SIZE - 8192, &[0; 8192]);
    assert_eq!(used(), empty, "zeroes over a hole");

    // Data with zero blocks between: only the data takes room.
    let mut mixed = vec![0; 1 << 20];
    for block in [0, 7, 200] {
        mixed[block * 4096..][..4096].copy_from_slice(&pattern(block as u64, 4096));
    }
    write(1 << 20, &mixed);
    assert!(used() <= empty + 3 * 4096 + 8192, "{} bytes for three blocks", used() - empty);

    // Zeroes over data are written.
    write(0, &pattern(1, 1 << 20));
    let full = used();
    write(65_536, &vec![0; 65_536]);
    assert_eq!(used(), full, "what was allocated stays so");

    // At odd offsets and lengths; and what reaches over the edge of data and hole.
    for (offset, length) in [
        (3, 5000),
        ((1 << 20) - 5000, 100_000),
        ((2 << 20) + 1, 4095),
        ((1 << 20) + 7 * 4096 - 1, 3),
        (SIZE - 4097, 4097),
    ] {
        write(offset, &vec![0; length]);
        write(offset, &pattern(offset as u64, length));
        write(offset + 1, &vec![0; length - 2]);
    }
    // Both bytes of a block's edge, in one request with much zero.
    let mut edges = vec![0; 3 << 20];
    edges[(1 << 20) - 1] = 1;
    edges[2 << 20] = 1;
    write(8 << 20, &edges);

    assert!(client.read(0, SIZE as u32).unwrap() == model);
    let zeroed = &mut model[5 << 20..9 << 20];
    zeroed.fill(0);
    assert_eq!(client.ask(kind::WRITE_ZEROES, 0, 5 << 20, 4 << 20, &[]), 0);
    let before = used();
    assert_eq!(client.ask(kind::WRITE_ZEROES, flag::NO_HOLE | flag::FUA, 12 << 20, 1 << 20, &[]), 0);
    model[12 << 20..13 << 20].fill(0);
    assert!(used() >= before + (1 << 20) - 65_536, "NO_HOLE allocates: {before} to {}", used());
    assert_eq!(client.ask(kind::WRITE_ZEROES, 0, 12 << 20, 1 << 20, &[]), 0);
    assert!(used() <= before + 65_536, "and without it the room comes back");
    assert!(client.read(0, SIZE as u32).unwrap() == model);
    assert!(fs::read(&path).unwrap() == model);
    drop(server);
}

#[test]
fn holes_stay_here() {
    holes_stay(&std::env::temp_dir());
}

#[test]
fn holes_stay_on_tmpfs() {
    holes_stay(Path::new("/dev/shm"));
}

fn holes_stay_on(kind: &str) {
    if let Some(mount) = Mount::make(kind) {
        holes_stay(&mount.join(""));
    }
}

#[test]
fn holes_stay_on_ext4() {
    holes_stay_on("ext4");
}

#[test]
fn holes_stay_on_xfs() {
    holes_stay_on("xfs");
}

#[test]
fn holes_stay_on_btrfs() {
    holes_stay_on("btrfs");
}

#[test]
fn a_block_device_is_served() {
    let dir = TempDir::new();
    let path = dir.join("disk");
    let content = pattern(1, 4 << 20);
    fs::write(&path, &content).unwrap();
    let Some(device) = Loop::attach(&path) else { return };
    let server = Server::serve().file(device.path().into()).start();
    assert_eq!(server.status().number("size"), 4 << 20);
    let mut client = server.connect();
    let mut model = content;
    assert!(client.read(0, 4 << 20).unwrap() == model);
    for (offset, length) in [(0, 512), (513, 70_001), (1 << 20, 1 << 20)] {
        let payload = pattern(offset as u64, length);
        assert_eq!(client.ask(kind::WRITE, flag::FUA, offset as u64, length as u32, &payload), 0);
        model[offset..][..length].copy_from_slice(&payload);
        assert_eq!(client.write(offset as u64 + 5, &vec![0; length - 9]), 0);
        model[offset + 5..offset + length - 4].fill(0);
    }
    for (flags, offset, length) in [(0, 2_000_001, 300_003), (flag::NO_HOLE, 3 << 20, 65_536), (flag::FUA, 7, 3)] {
        assert_eq!(client.ask(kind::WRITE_ZEROES, flags, offset as u64, length as u32, &[]), 0);
        model[offset..][..length].fill(0);
    }
    assert_eq!(client.ask(kind::TRIM, 0, 3_500_001, 9999, &[]), 0);
    let trimmed = client.read(3_500_001, 9999).unwrap();
    model[3_500_001..][..9999].copy_from_slice(&trimmed);
    assert_eq!(client.write(4 << 20, &[1]), crate::support::errno::ENOSPC);
    assert_eq!(client.flush(), 0);
    assert!(client.read(0, 4 << 20).unwrap() == model);
    server.expect_healthy();
    assert!(fs::read(&path).unwrap() == model, "on the device");
}
