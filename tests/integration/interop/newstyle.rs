//! Clients that others wrote, speaking newstyle to ours.

use super::client;
use crate::support::newstyle::{address, serve, serve_content, uri, PORT};
use crate::support::{allocated, pattern, program, run_command, Server};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

const MIB: usize = 1 << 20;

/// A sparse file of `size` bytes with these pieces of data.
fn sparse_file(path: &Path, size: usize, pieces: &[(usize, usize)]) -> Vec<u8> {
    let file = File::create(path).unwrap();
    file.set_len(size as u64).unwrap();
    let mut content = vec![0; size];
    for &(offset, length) in pieces {
        let bytes = pattern(offset as u64, length);
        file.write_all_at(&bytes, offset as u64).unwrap();
        content[offset..offset + length].copy_from_slice(&bytes);
    }
    content
}

/// A few pieces in 64 MiB of nothing, on blocks and off them.
const SIZE: usize = 64 * MIB;
const PIECES: [(usize, usize); 4] = [(0, MIB), (8 * MIB, 4096), (20 * MIB + 8192, 300_000), (SIZE - 8192, 8192)];

#[test]
fn nbdinfo_sees_everything_that_is_offered() {
    let server = Server::serve().size(MIB as u64).arg(PORT).start();
    File::options().write(true).open(&server.image).unwrap().write_all_at(&pattern(1, 65_536), 65_536).unwrap();
    let uri = uri(&server);
    assert_eq!(client(server.dir(), "nbdinfo", &["--size", &uri]), "1048576\n");
    let described = client(server.dir(), "nbdinfo", &["--json", &uri]);
    for (key, value) in [
        ("protocol", "\"newstyle-fixed\""),
        ("structured", "true"),
        ("export-size", "1048576"),
        ("is_read_only", "false"),
        ("is_rotational", "false"),
        ("can_flush", "true"),
        ("can_fua", "true"),
        ("can_trim", "true"),
        ("can_zero", "true"),
        ("can_multi_conn", "true"),
        ("can_cache", "true"),
        ("can_df", "true"),
        ("can_fast_zero", "true"),
        ("block_size_minimum", "1"),
        ("block_size_preferred", "4096"),
        ("block_size_maximum", "33554432"),
    ] {
        let line = described.lines().find(|line| line.trim().starts_with(&format!("\"{key}\":")));
        let found = line.unwrap_or_else(|| panic!("no {key}: {described}")).split_once(": ").unwrap().1;
        assert_eq!(found.trim_end_matches(','), value, "{key}: {described}");
    }
    assert!(described.contains("\"base:allocation\""), "{described}");
    let listed = client(server.dir(), "nbdinfo", &["--list", "--json", &uri]);
    assert_eq!(listed.matches("\"export-name\"").count(), 1, "{listed}");
    assert!(listed.contains("\"export-name\": \"\""), "{listed}");
    let map = client(server.dir(), "nbdinfo", &["--map", &uri]);
    let rows: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    let expected = [["0", "65536", "3"], ["65536", "65536", "0"], ["131072", "917504", "3"]];
    assert_eq!(rows.len(), 3, "{map}");
    rows.iter().zip(expected).for_each(|(row, expected)| assert_eq!(row[..3], expected, "{map}"));
    server.expect_healthy();
}

#[test]
fn an_export_has_its_name_beside_the_empty_one() {
    let content = pattern(3, MIB);
    let server = Server::serve().content(&content).args("--export-name vm/ä-1 -v").arg(PORT).start();
    let (default, named, other) = (uri(&server), uri(&server) + "/vm/%C3%A4-1", uri(&server) + "/vm");
    let listed = client(server.dir(), "nbdinfo", &["--list", "--json", &default]);
    assert_eq!(listed.matches("\"export-name\"").count(), 2, "{listed}");
    for name in ["", "vm/ä-1"] {
        assert!(listed.contains(&format!("\"export-name\": \"{name}\"")), "{listed}");
    }
    for uri in [&default, &named] {
        let copy = server.dir().join("copy");
        client(server.dir(), "nbdcopy", &[uri, copy.to_str().unwrap()]);
        assert!(fs::read(&copy).unwrap() == content, "{uri}");
        assert_eq!(client(server.dir(), "qemu-img", &["info", "--output=json", uri]).matches("1048576").count(), 1);
    }
    assert_ne!(run_command(program("nbdinfo").args(["--size", &other]), b"").code, Some(0));
    server.expect_healthy();
}

#[test]
fn nbdcopy_keeps_holes_both_ways() {
    for connections in ["1", "4"] {
        let server = serve(SIZE as u64);
        let uri = uri(&server);
        let (source, copy) = (server.dir().join("source"), server.dir().join("copy"));
        let content = sparse_file(&source, SIZE, &PIECES);
        let options = ["--connections", connections, "--flush", "--requests", "32"];
        client(server.dir(), "nbdcopy", &[&options[..], &[source.to_str().unwrap(), &uri]].concat());
        assert!(fs::read(&server.image).unwrap() == content, "the copy on the server differs");
        assert_eq!(allocated(&server.image), allocated(&source), "and takes as much");
        client(server.dir(), "nbdcopy", &[&options[..], &[&uri, copy.to_str().unwrap()]].concat());
        assert!(fs::read(&copy).unwrap() == content, "the copy from the server differs");
        assert_eq!(allocated(&copy), allocated(&source), "and takes as much");
        let status = server.status();
        assert!(status.number("read_bytes") < 2 * SIZE as u64 && status.number("errors") == 0, "{}", status.line());
        server.expect_healthy();
    }
    // From one server to another.
    let (from, to) = (serve(SIZE as u64), serve(SIZE as u64));
    let content = sparse_file(&from.image, SIZE, &PIECES);
    client(from.dir(), "nbdcopy", &["--flush", &uri(&from), &uri(&to)]);
    assert!(fs::read(&to.image).unwrap() == content);
    assert_eq!(allocated(&to.image), allocated(&from.image));
}

/// Every command and flag of the library, on 1 MiB that is a hole.
const EVERYTHING: &str = r"
B = 4096
size = h.get_size()
assert size == 1 << 20
assert h.get_protocol() == 'newstyle-fixed'
structured = h.get_structured_replies_negotiated()
assert structured == STRUCTURED, structured
assert h.can_meta_context('base:allocation') == structured
assert h.can_df() == structured
for can in (h.can_flush, h.can_fua, h.can_trim, h.can_zero, h.can_fast_zero, h.can_cache, h.can_multi_conn):
    assert can(), can
assert not h.is_read_only() and not h.is_rotational()
assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20

FUA = nbd.CMD_FLAG_FUA
data = bytes(range(1, 256)) * 257
h.pwrite(data, 1)
h.pwrite(data, 100000, FUA)
assert h.pread(len(data) + 2, 0) == b'\0' + data + b'\0'
assert h.pread(len(data), 100000) == data
h.flush()
h.cache(size, 0)
h.cache(100, 3)

def extents(count, offset, flags=0):
    found = []
    def note(context, at, entries, error):
        assert context == 'base:allocation' and at == offset and error.value == 0
        found.extend(entries)
    h.block_status(count, offset, note, flags)
    return list(zip(found[::2], found[1::2]))

if structured:
    pieces = []
    def note(buf, offset, status, error):
        pieces.append((offset, len(buf), status))
    assert h.pread_structured(size, 0, note)[1:1 + len(data)] == data
    assert sum(length for _, length, _ in pieces) == size
    assert any(status == nbd.READ_HOLE for _, _, status in pieces)
    pieces.clear()
    assert len(h.pread_structured(65536, 200000, note, nbd.CMD_FLAG_DF)) == 65536
    assert len(pieces) == 1 and pieces[0][:2] == (200000, 65536)
    all = extents(size, 0)
    assert sum(length for length, _ in all) == size
    assert all[-1][1] == 3
    assert extents(size, 0, nbd.CMD_FLAG_REQ_ONE) == all[:1]
    try:
        h.pread_structured(size, 0, note, nbd.CMD_FLAG_DF)
    except nbd.Error as error:
        assert error.errno == 'EOVERFLOW', error.errno

NO_HOLE, FAST = nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO
for flags in (0, FUA, NO_HOLE, FAST, NO_HOLE | FAST, FUA | NO_HOLE | FAST):
    h.pwrite(data, 300000)
    h.zero(10000, 300007, flags)
    assert h.pread(10003, 300006) == data[6:7] + bytes(10000) + data[10007:10009], flags
for flags in (0, FUA):
    h.trim(50000, 310000, flags)
    kept = h.pread(7 + len(data) - 60000, 360000)
    assert kept == data[60000:] + b'\0' * 7
h.zero(size, 0)
assert h.pread(size, 0) == bytes(size)
if structured:
    assert extents(size, 0) == [(size, 3)]

h.set_strict_mode(0)
for mistake, expected in (
    (lambda: h.pread(512, size), 'EINVAL'),
    (lambda: h.pwrite(data, size - 1), 'ENOSPC'),
    (lambda: h.zero(2, size - 1), 'ENOSPC'),
    (lambda: h.trim(2, size - 1), 'EINVAL'),
    (lambda: h.cache(2, size - 1), 'EINVAL'),
    (lambda: h.flush(1 << 14), 'EINVAL'),
):
    try:
        mistake()
        raise AssertionError(expected)
    except nbd.Error as error:
        assert error.errno == expected, (error.errno, expected)
assert h.pread(512, 0) == bytes(512)
h.shutdown()
";

#[test]
fn nbdsh_does_everything_with_and_without_structured_replies() {
    for (agreed, request) in [("True", true), ("False", false)] {
        let server = serve(MIB as u64);
        let connect = format!(
            "h.set_request_structured_replies({})\nh.add_meta_context('base:allocation')\nh.connect_uri('{}')\n",
            if request { "True" } else { "False" },
            uri(&server)
        );
        let script = format!("STRUCTURED = {agreed}\n{connect}{EVERYTHING}");
        client(server.dir(), "nbdsh", &["-c", &script]);
        server.expect_healthy();
    }
}

#[test]
fn nbdsh_haggles_step_by_step() {
    let server = serve(MIB as u64);
    let script = format!(
        r"
h.set_opt_mode(True)
h.connect_uri('{}')
names = []
h.opt_list(lambda name, description: names.append(name))
assert names == [''], names
contexts = []
h.add_meta_context('base:')
h.opt_list_meta_context(lambda name: contexts.append(name))
assert contexts == ['base:allocation'], contexts
h.opt_info()
size = h.get_size()
for name in ('x', 'n' * 4096):
    h.set_export_name(name)
    for ask in (h.opt_info, h.opt_go):
        try:
            ask()
            raise AssertionError(name)
        except nbd.Error as error:
            assert error.errno == 'ENOENT', error.errno
h.set_export_name('')
h.opt_go()
assert h.get_size() == size == 1 << 20
assert h.pread(512, 0) == bytes(512)
h.shutdown()
a = nbd.NBD()
a.set_opt_mode(True)
a.connect_uri('{}')
a.opt_abort()
",
        uri(&server),
        uri(&server)
    );
    client(server.dir(), "nbdsh", &["-c", &script]);
    server.expect_healthy();
}

#[test]
fn nbdsh_multi_conn_is_true() {
    let server = serve(MIB as u64);
    let uri = uri(&server);
    let script = format!(
        r"
hs = [nbd.NBD() for _ in range(4)]
for one in hs:
    one.connect_uri('{uri}')
for n in range(100):
    hs[n % 4].pwrite(bytes([n]) * 1000, n * 1000)
    assert hs[(n + 1) % 4].pread(1000, n * 1000) == bytes([n]) * 1000
hs[2].flush()
for one in hs:
    one.shutdown()
"
    );
    client(server.dir(), "nbdsh", &["-c", &script]);
    server.expect_healthy();
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let server = serve(SIZE as u64);
    let (source, uri) = (server.dir().join("source"), uri(&server));
    let source_path = source.to_str().unwrap();
    let content = sparse_file(&source, SIZE, &PIECES);
    client(server.dir(), "qemu-img", &["convert", "-n", "-p", "-f", "raw", "-O", "raw", source_path, &uri]);
    assert!(fs::read(&server.image).unwrap() == content);
    assert_eq!(allocated(&server.image), allocated(&source), "holes stay holes");
    client(server.dir(), "qemu-img", &["compare", "-f", "raw", "-F", "raw", source_path, &uri]);
    let (map, other) =
        (["map", "--output=json", "-f", "raw", &uri], ["map", "--output=json", "-f", "raw", source_path]);
    let rows = |map: &str| -> Vec<(String, String)> {
        let field = |line: &str, key: &str| {
            let rest = line.split_once(&format!("\"{key}\": ")).unwrap().1;
            rest.split([',', '}']).next().unwrap().to_owned()
        };
        map.lines()
            .filter(|line| line.contains("start"))
            .map(|line| (field(line, "start"), field(line, "data")))
            .collect()
    };
    let (ours, theirs) = (client(server.dir(), "qemu-img", &map), client(server.dir(), "qemu-img", &other));
    assert_eq!(rows(&ours), rows(&theirs), "what is data and what is not");
    client(server.dir(), "qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, "copy.qcow2"]);
    client(server.dir(), "qemu-img", &["compare", "-f", "qcow2", "-F", "raw", "copy.qcow2", source_path]);
    client(server.dir(), "qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, "copy.raw"]);
    assert!(fs::read(server.dir().join("copy.raw")).unwrap() == content);
    assert!(allocated(&server.dir().join("copy.raw")) <= allocated(&source) + 65_536);
    assert_eq!(server.status().number("errors"), 0);
    server.expect_healthy();
}

#[test]
fn qemu_io_reads_back_what_it_wrote() {
    let server = serve(4 * MIB as u64);
    let uri = uri(&server);
    let mut shadow = vec![0_u8; 4 * MIB];
    let mut commands = Vec::new();
    for (byte, (offset, length)) in
        [(0, 1), (511, 2), (4095, 8195), (5000, 77), (MIB - 3, 2 * MIB + 5), (4 * MIB - 13, 13)].into_iter().enumerate()
    {
        let byte = byte as u8 + 1;
        shadow[offset..offset + length].fill(byte);
        commands.push(format!("write -f -P {byte} {offset} {length}"));
        commands.push(format!("aio_read -P {byte} {offset} {length}"));
    }
    for (command, start, length) in [
        ("write -z", MIB + 1, 70_000),
        ("write -z -u", MIB + 200_000, 65_536),
        ("write -z -n", MIB + 300_000, 5),
        ("discard", 2 * MIB, 65_536),
    ] {
        shadow[start..start + length].fill(0);
        commands.push(format!("{command} {start} {length}"));
        commands.push(format!("read -P 0 {start} {length}"));
    }
    commands.extend(["aio_flush".to_owned(), "flush".to_owned(), "map".to_owned()]);
    let mut args = vec!["-f", "raw", &uri];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    let said = client(server.dir(), "qemu-io", &args);
    assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    assert!(fs::read(&server.image).unwrap() == shadow, "the file is not what was written");
    server.expect_healthy();
}

#[test]
fn fio_verifies_at_depth_over_four_connections() {
    let server = serve(32 * MIB as u64);
    let uri = format!("--uri={}", uri(&server));
    let args = "--name=verify --ioengine=nbd --thread --numjobs=4 --size=8m --offset_increment=8m --rw=randwrite \
                --bsrange=512-128k --bs_unaligned=0 --iodepth=32 --fsync=64 --verify=crc32c --verify_fatal=1 \
                --verify_state_save=0 --do_verify=1";
    let mut args: Vec<&str> = args.split_whitespace().collect();
    args.push(&uri);
    client(server.dir(), "fio", &args);
    let status = server.status();
    assert!(status.number("errors") == 0 && status.number("flushes") > 0, "{}", status.line());
    server.expect_healthy();
}

#[test]
fn nbdkit_is_a_client_too() {
    let content = pattern(9, 4 * MIB);
    let server = serve_content(&content);
    let address = address(&server);
    let (host, port) = (format!("hostname={}", address.ip()), format!("port={}", address.port()));
    let script = "nbdcopy \"$uri\" copy && nbdsh -u \"$uri\" -c 'h.pwrite(b\"through\", 3); h.zero(9000, 5000); \
                  h.trim(4096, 65536); h.flush(); assert h.pread(7, 3) == b\"through\"' && nbdinfo --map \"$uri\"";
    client(server.dir(), "nbdkit", &["-U", "-", "nbd", &host, &port, "shared=true", "--run", script]);
    assert!(fs::read(server.dir().join("copy")).unwrap() == content);
    let image = fs::read(&server.image).unwrap();
    assert_eq!((&image[3..10], &image[5000..14_000]), (&b"through"[..], &[0; 9000][..]));
    server.expect_healthy();
}

/// Over a UNIX socket everything is the same.
#[test]
fn newstyle_works_over_a_unix_socket() {
    let builder = Server::serve().size(MIB as u64);
    let path = builder.dir().join("newstyle");
    let server = builder.arg("--newstyle-sock").arg(&path).start();
    let uri = format!("nbd+unix:///?socket={}", path.display());
    assert_eq!(server.status().get("newstyle_socket"), path.to_str().unwrap());
    let script =
        format!("STRUCTURED = True\nh.add_meta_context('base:allocation')\nh.connect_uri('{uri}')\n{EVERYTHING}");
    client(server.dir(), "nbdsh", &["-c", &script]);
    client(server.dir(), "nbdinfo", &["--map", &uri]);
    server.expect_healthy();
    assert!(!path.exists(), "it goes with the server");
}

/// nbd-client lists the exports, as far as it goes without a kernel.
#[test]
fn nbd_client_lists() {
    let server = serve(MIB as u64);
    let address = address(&server);
    let said =
        client(server.dir(), "nbd-client", &["-l", &address.ip().to_string(), "-p", &address.port().to_string()]);
    assert!(said.contains("Negotiation"), "{said}");
    server.expect_healthy();
}
