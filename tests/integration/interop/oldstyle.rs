//! Clients and servers that others wrote, speaking oldstyle with ours.

use super::client;
use crate::support::{allocated, pattern, Server, BIN};
use std::fs;

const MIB: usize = 1 << 20;

fn tcp_uri(server: &Server) -> String {
    format!("nbd://{}", server.address())
}

fn serve_on_unix(size: usize) -> (Server, String) {
    let builder = Server::serve().size(size as u64);
    let path = builder.dir().join("nbd").display().to_string();
    let uri = format!("nbd+unix:///?socket={path}");
    (builder.addr(path).start(), uri)
}

/// Writes patterns with qemu-io at offsets and lengths of no alignment, overlapping ones too, and checks them as it
/// sees them and as the file has them.
fn qemu_io_round_trip(server: &Server, uri: &str) {
    let writes: [(usize, usize, u8); 6] =
        [(0, 1, 1), (511, 2, 2), (4095, 8195, 3), (5000, 77, 4), (MIB - 3, 2 * MIB + 5, 5), (4 * MIB - 13, 13, 6)];
    let mut shadow = vec![0_u8; 4 * MIB];
    let mut commands = Vec::new();
    for (offset, length, byte) in writes {
        shadow[offset..offset + length].fill(byte);
        // -f asks for FUA.
        commands.push(format!("write -f -P {byte} {offset} {length}"));
        commands.push(format!("read -P {byte} {offset} {length}"));
    }
    let (zeroed, discarded) = (MIB + 1..MIB + 70_000, 2 * MIB..2 * MIB + 65_536);
    for (command, range) in [("write -z", &zeroed), ("discard", &discarded)] {
        shadow[range.clone()].fill(0);
        commands.push(format!("{command} {} {}", range.start, range.len()));
        commands.push(format!("read -P 0 {} {}", range.start, range.len()));
    }
    commands.push("flush".to_owned());

    let mut args = vec!["-f", "raw", uri];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    let said = client(server.dir(), "qemu-io", &args);
    assert!(!said.contains("failed"), "{said}");
    assert!(fs::read(&server.image).unwrap() == shadow, "the file is not what was written");
}

#[test]
fn qemu_io_reads_back_what_it_wrote_at_odd_alignments() {
    let server = Server::serve().size(4 * MIB as u64).start();
    qemu_io_round_trip(&server, &tcp_uri(&server));
    assert_eq!(server.status().number("errors"), 0);
    server.expect_healthy();
}

#[test]
fn qemu_io_works_over_a_unix_socket() {
    let (server, uri) = serve_on_unix(4 * MIB);
    qemu_io_round_trip(&server, &uri);
    server.expect_healthy();
}

#[test]
fn nbdinfo_sees_the_size_and_what_is_offered() {
    // The last 100 bytes are no whole sector and are not served.
    let server = Server::serve().size(5 * 512 + 100).start();
    let uri = tcp_uri(&server);
    assert_eq!(client(server.dir(), "nbdinfo", &["--size", &uri]), "2560\n");
    let described = client(server.dir(), "nbdinfo", &["--json", &uri]);
    let expected = [
        ("protocol", "\"oldstyle\""),
        ("export-size", "2560"),
        ("is_read_only", "false"),
        ("is_rotational", "false"),
        ("can_flush", "true"),
        ("can_fua", "true"),
        ("can_trim", "true"),
        ("can_zero", "true"),
        ("can_multi_conn", "true"),
        ("can_cache", "false"),
        ("can_df", "false"),
        ("can_fast_zero", "false"),
    ];
    for (key, value) in expected {
        assert!(described.contains(&format!("\"{key}\": {value},")), "{key} is not {value}: {described}");
    }
    server.expect_healthy();
}

#[test]
fn nbdcopy_copies_both_ways_and_holes_stay_holes() {
    const SIZE: usize = 64 * MIB;
    let server = Server::serve().size(SIZE as u64).start();
    let uri = tcp_uri(&server);
    let (source, copy) = (server.dir().join("source"), server.dir().join("copy"));
    let mut content = vec![0_u8; SIZE];
    for (seed, (offset, length)) in [(0, MIB), (20 * MIB + 7, 300_001), (SIZE - 5000, 5000)].into_iter().enumerate() {
        content[offset..offset + length].copy_from_slice(&pattern(seed as u64, length));
    }
    // Written whole: that its zeroes are to be holes is for nbdcopy and the server to find out.
    fs::write(&source, &content).unwrap();

    client(server.dir(), "nbdcopy", &["--flush", source.to_str().unwrap(), &uri]);
    assert!(fs::read(&server.image).unwrap() == content, "the copy on the server differs");
    assert!(allocated(&server.image) < 4 * MIB as u64, "the image holds {} bytes", allocated(&server.image));

    client(server.dir(), "nbdcopy", &[&uri, copy.to_str().unwrap()]);
    assert!(fs::read(&copy).unwrap() == content, "the copy from the server differs");
    assert!(allocated(&copy) < 4 * MIB as u64, "the copy holds {} bytes", allocated(&copy));
    server.expect_healthy();
}

/// What a libnbd program does with a 1 MiB export that reads as zeroes.
const PIPELINED: &str = r"
import os
BLOCK, COUNT = 4096, 64
blocks = [os.urandom(BLOCK) for _ in range(COUNT)]

def settle(cookies):
    while cookies:
        h.poll(-1)
        cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]

# Many at once, the last ones first.
settle([h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(blocks[i])), i * BLOCK) for i in reversed(range(COUNT))])
h.flush()
buffers = [nbd.Buffer(BLOCK) for _ in range(COUNT)]
settle([h.aio_pread(buffers[i], i * BLOCK) for i in range(COUNT)])
assert [bytes(buffer.to_bytearray()) for buffer in buffers] == blocks

# Reads and writes of different places in one pipeline, durable, with a flush between.
other = nbd.Buffer(BLOCK)
settle([
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(b'x' * 700)), 500_001, flags=nbd.CMD_FLAG_FUA),
    h.aio_pread(other, 3 * BLOCK),
    h.aio_flush(),
])
assert bytes(other.to_bytearray()) == blocks[3]
assert h.pread(702, 500_000) == b'\0' + b'x' * 700 + b'\0'

h.trim(BLOCK, 0)
h.zero(BLOCK, BLOCK)
h.zero(BLOCK, 2 * BLOCK, flags=nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.zero(10, 3 * BLOCK + 1)
assert h.pread(3 * BLOCK, 0) == bytearray(3 * BLOCK)
assert h.pread(BLOCK, 3 * BLOCK) == blocks[3][:1] + bytes(10) + blocks[3][11:]

# A mistake is answered, and the connection goes on.
h.set_strict_mode(0)
for mistake in (lambda: h.pread(512, h.get_size()), lambda: h.pwrite(b'y' * 512, h.get_size() - 511)):
    try:
        mistake()
        raise AssertionError('beyond the end')
    except nbd.Error as error:
        assert error.errno == 'ENOSPC', error.errno
assert h.pread(BLOCK, 5 * BLOCK) == blocks[5]
h.shutdown()
";

#[test]
fn nbdsh_pipelines_asynchronous_commands() {
    let server = Server::serve().size(MIB as u64).start();
    client(server.dir(), "nbdsh", &["-u", &tcp_uri(&server), "-c", PIPELINED]);
    assert_eq!(server.status().number("errors"), 2, "the two mistakes");
    server.expect_healthy();
}

#[test]
fn nbdsh_works_over_a_unix_socket() {
    let (server, uri) = serve_on_unix(MIB);
    client(server.dir(), "nbdsh", &["-u", &uri, "-c", PIPELINED]);
    server.expect_healthy();
}

/// Random writes of sectors at depth, on several connections, each verified by its checksum.
fn fio_verify(server: &Server, uri: &str) {
    let uri = format!("--uri={uri}");
    let args = "--name=verify --ioengine=nbd --thread --numjobs=3 --size=8m --offset_increment=8m --rw=randwrite \
                --bsrange=512-128k --bs_unaligned=0 --iodepth=16 --fsync=32 --verify=crc32c --verify_fatal=1 \
                --verify_state_save=0 --do_verify=1";
    let mut args: Vec<&str> = args.split_whitespace().collect();
    args.push(&uri);
    client(server.dir(), "fio", &args);
    assert_eq!(server.status().number("errors"), 0);
    assert!(server.status().number("flushes") > 0, "fio did flush");
}

#[test]
fn fio_verifies_what_it_wrote() {
    let server = Server::serve().size(24 * MIB as u64).start();
    fio_verify(&server, &tcp_uri(&server));
    server.expect_healthy();
}

#[test]
fn fio_works_over_a_unix_socket() {
    let (server, uri) = serve_on_unix(24 * MIB);
    fio_verify(&server, &uri);
    server.expect_healthy();
}

/// Our client on nbdkit speaking oldstyle, over the UNIX socket nbdkit makes for the command it runs. Without FUA:
/// nbdkit offers it on oldstyle and then refuses it, to any client.
#[test]
fn read_and_write_speak_to_nbdkit() {
    let script = format!(
        "head -c 70001 {BIN} | {BIN} write --addr $unixsocket --from 4097 --size 70001 && \
         {BIN} read --addr $unixsocket --from 4096 --size 70003 >back"
    );
    let server = Server::serve().size(512).start();
    client(server.dir(), "nbdkit", &["-o", "-U", "-", "--filter=fua", "memory", "1M", "--run", &script]);
    let expected = [&[0], &fs::read(BIN).unwrap()[..70_001], &[0]].concat();
    assert!(fs::read(server.dir().join("back")).unwrap() == expected, "other bytes came back");
}
