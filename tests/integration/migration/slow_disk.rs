//! A destination whose disk is slower than the way to it.

use crate::support::fuse::Disk;
use crate::support::peers::{expect_same, listen, start_mirror, Worker};
use crate::support::{pattern, Server};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

/// How long the longest of these migrations may take, on a machine that is busy with other tests.
const LATEST: Duration = Duration::from_secs(180);

/// The destination takes all of the image at once, and a sync of all of it takes longer than an answer may. The source
/// learns from that: each attempt sends less before it flushes.
#[test]
fn a_disk_that_needs_longer_than_an_answer_may_take() {
    const SIZE: u64 = 32 * MIB;
    let Some(disk) = Disk::mount(2 * SIZE) else { return };
    disk.limit_syncs(4 * MIB);
    let image = disk.furnish_sparse("image", SIZE);
    let limit = ["env", "FLEXNBD_MS_REQUEST_LIMIT_SECS=3"];
    let mut source = Server::serve().through(&limit).content(&pattern(1, SIZE as usize)).start();
    let worker = Worker::start(source.address(), 0..SIZE / 8);
    let mut destination = listen(0).file(image).start();
    let began = Instant::now();
    start_mirror(&source, destination.address(), "");
    worker.may_end();
    for server in [&mut source, &mut destination] {
        let status = server.process.wait(LATEST);
        assert!(status.success(), "{status}: {}", server.log());
    }
    expect_same(&source.image, &destination.image);
    let outcome = worker.join();
    outcome.check(&destination.image);
    let failed = source.log().lines().filter(|line| line.contains(" failed: ")).count();
    assert!(failed > 0, "one flush for all is no test: {}", source.log());
    eprintln!(
        "{} MiB to a disk of 4 MiB/s: {:?}, {failed} attempts failed, the longest answer took {:?}",
        SIZE / MIB,
        began.elapsed(),
        outcome.longest
    );
}
