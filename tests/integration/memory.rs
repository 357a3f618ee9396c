//! A limit of memory (`ulimit -v`): clients wait or are refused, and the server goes on.

use crate::support::{
    kind, must, newstyle, pattern, peers, request, run_command, wait_for, Client, Server, TempDir, BIN, SOON,
};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::process::Command;

const BLOCK_STATUS: u16 = 7;
/// Data and holes in turn, so that there are more of them than one answer takes.
const PIECE: u64 = 64 << 10;
const SIZE: u64 = 64 << 20;

/// Lets the address space of a server grow by this from now on, in KiB.
fn limit(server: &Server, kib: u64) {
    let bytes = (server.memory_kib("VmSize:") + kib) << 10;
    must("prlimit", &["--pid", &server.pid().to_string(), &format!("--as={bytes}")]);
}

/// Connects and says all of this, unless it is refused.
fn say(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    // What does not fit into the socket stays here: who takes no answers may not be read for ever.
    stream.set_nonblocking(true).unwrap();
    let _ = stream.write_all(bytes);
    stream
}

/// A client, unless it is refused.
fn connect(server: &Server) -> Option<Client> {
    let mut client = Client::new(TcpStream::connect(server.address()).unwrap());
    client.stream.read_exact(&mut [0; 152]).is_ok().then_some(client)
}

/// Clients that ask for as much as they may and take nothing. They change what is in the first half.
fn storm(server: &Server, count: usize) -> Vec<TcpStream> {
    let many = |kind, length, every: u64| {
        (0..32).flat_map(move |n| request(kind, 0, n, n * every, length)).collect::<Vec<u8>>()
    };
    let half_a_write = [request(kind::WRITE, 0, 1, 0, 1 << 20), vec![7; 100_000]].concat();
    let maps = [
        &3_u32.to_be_bytes()[..],
        &newstyle::option(8, &[]),
        &newstyle::option(10, &newstyle::context_data(b"", &["base:allocation"])),
        &newstyle::option(7, &newstyle::info_data(b"", &[])),
        &many(BLOCK_STATUS, SIZE as u32, 0),
    ]
    .concat();
    let kinds = [
        (server.address(), half_a_write),
        (server.address(), many(kind::READ, 256 << 10, 1 << 20)),
        (newstyle::address(server), maps),
        (server.address(), request(kind::READ, 0, 1, 0, SIZE as u32)),
        (server.address(), many(kind::FLUSH, 0, 0)),
        (server.address(), many(kind::TRIM, 4096, 4096)),
    ];
    (0..count).map(|n| &kinds[n % kinds.len()]).map(|(address, bytes)| say(*address, bytes)).collect()
}

#[test]
fn clients_under_a_limit_of_memory_wait_and_the_server_goes_on() {
    for kib in [0, 256, 1 << 10, 2 << 10, 3 << 10, 5 << 10, 9 << 10] {
        let builder = Server::serve().size(SIZE).args("--newstyle-port 0 --max-clients 200");
        let image = File::options().write(true).open(builder.dir().join("image")).unwrap();
        for offset in (0..SIZE).step_by(2 * PIECE as usize) {
            image.write_all_at(&vec![1; PIECE as usize], offset).unwrap();
        }
        let mut server = builder.start();
        limit(&server, kib);
        let clients = storm(&server, 150);
        // It answers, and everybody who has come was looked at.
        wait_for("an answer", SOON, || server.try_status());
        let more = storm(&server, 30);
        wait_for("an answer", SOON, || server.try_status());
        assert!(server.process.is_running(), "{kib} KiB: {}", server.log());
        drop((clients, more));
        wait_for("the end of all clients", SOON, || (server.try_status()?.number("num_clients") == 0).then_some(()));

        // Whoever comes when the others have gone is served, if there is memory for anybody.
        if kib >= 1 << 10 {
            let bytes = pattern(kib, 3 << 20);
            let mut client = wait_for("a place", SOON, || connect(&server));
            assert_eq!(client.write(PIECE - 5, &bytes), 0);
            assert_eq!(client.read(PIECE - 5, bytes.len() as u32).unwrap(), bytes);
        }
        assert_eq!(server.stop().code(), Some(0), "{kib} KiB: {}", server.log());
        let log = server.log();
        let said = log.lines().any(|line| line.contains(":W:") && line.contains("memory has run out: requests wait"));
        assert!(said || !(1 << 10..=5 << 10).contains(&kib), "{kib} KiB: {log}");
        assert!(!log.contains(":F:"), "{log}");
    }
}

/// A large request needs no more memory than there is, and what waits for memory goes on when others give theirs back.
#[test]
fn a_client_that_waits_for_memory_goes_on_when_another_leaves() {
    let server = Server::serve().size(SIZE).args("--newstyle-port 0").start();
    let mut waits = server.connect();
    waits.expect_alive();
    limit(&server, 2 << 10);
    let others = storm(&server, 40);
    server.wait_for_log("memory has run out");
    let bytes = pattern(1, 1 << 20);
    waits.send_request(kind::WRITE, 0, 5, SIZE / 2, bytes.len() as u32, &bytes[..1000]);
    drop(others);
    waits.send(&bytes[1000..]);
    assert_eq!(waits.read_reply(), (0, 5));
    assert_eq!(waits.read(SIZE / 2, bytes.len() as u32).unwrap(), bytes);
    wait_for("a place", SOON, || connect(&server)).expect_alive();
}

/// A map of a large image is a matter of memory, too: whoever asks for it hears that there is none.
#[test]
fn a_map_for_which_there_is_no_memory_is_refused() {
    const LARGE: u64 = 8 << 40;
    let server = Server::serve().size(LARGE).start();
    let mut client = server.connect();
    limit(&server, 4 << 10);
    let destination = peers::listen(0).size(SIZE).start();
    let answer = server.control(format!("mirror 127.0.0.1 {}\n\n", destination.port()));
    assert_eq!(answer, "1: there is no memory for a map of the image\n");
    client.expect_alive();

    let dir = TempDir::new();
    let image = dir.join("image");
    File::create(&image).unwrap().set_len(LARGE).unwrap();
    let limit = format!("--as={}", (server.memory_kib("VmSize:") + 512) << 10);
    let mut command = Command::new("prlimit");
    command.args([&limit, BIN, "listen", "--addr", "127.0.0.1", "--port", "0", "--file"]).arg(&image);
    let output = run_command(&mut command, &[]);
    assert!(output.code == Some(1) && output.stderr.contains(":F:"), "{output:?}");
    assert!(output.stderr.contains("no memory for the map"), "{output:?}");
    drop(client);
    server.expect_healthy();
}

/// A server that cannot have the memory that it keeps in reserve does not start, and says so.
#[test]
fn a_start_without_memory_is_an_error() {
    let dir = TempDir::new();
    let image = dir.join("image");
    File::create(&image).unwrap().set_len(4096).unwrap();
    // A start needs more than is left of it.
    let peak = Server::serve().size(4096).start().memory_kib("VmPeak:");
    let serve = |wrapper: &[&str], kib: u64| {
        let limit = format!("--as={}", kib << 10);
        let words = [wrapper, &["prlimit", &limit, BIN, "serve", "-q", "-l", "127.0.0.1", "-p", "0", "-f"]].concat();
        run_command(Command::new(words[0]).args(&words[1..]).arg(&image), &[])
    };
    let output = serve(&[], peak - (1 << 10));
    assert!(output.code == Some(1) && output.stderr.contains(":F:"), "{output:?}");
    assert!(output.stderr.contains("not enough memory"), "{output:?}");
    assert_eq!(serve(&["timeout", "1"], peak + 256).code, Some(124), "it runs until it is stopped");
}
