//! Haggling with those who mean harm: memory stays bounded, time too, and other clients do not notice.

use crate::support::newstyle::{
    address, ends, opt, option, option_head, rep, serve, simple, structured, try_send, Haggler, Structured, PORT,
};
use crate::support::{kind, request, wait_for, Client, Server, SOON};
use std::fs::{self, File};
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u64 = 1 << 20;
/// How long a negotiation may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// A client that asks all the time; the longest it had to wait is returned when `over`.
fn steady(server: &Server, over: &AtomicBool) -> Duration {
    let mut client = simple(server);
    let mut longest = Duration::ZERO;
    while !over.load(Ordering::Relaxed) {
        let asked = Instant::now();
        client.expect_alive();
        longest = longest.max(asked.elapsed());
    }
    longest
}

/// Sends good options, a byte at a time, until the connection ends; returns how long that was.
fn drip(server: &Server, pause: Duration) -> Duration {
    let mut haggler = Haggler::new(server);
    let started = Instant::now();
    for byte in option(99, &[7; 4000]).repeat(3).chunks(1) {
        if !try_send(&mut haggler.client, byte) || started.elapsed() > HANDSHAKE * 2 {
            break;
        }
        // What it is about is this pace.
        thread::sleep(pause);
    }
    assert!(ends(&mut haggler.client));
    started.elapsed()
}

/// The deadline of a handshake, which the specification leaves open. It holds for those who say nothing, who say it byte
/// by byte, who stop at any place, and who never stop; all at once, and nobody else is slower for it.
#[test]
fn a_handshake_has_ten_seconds() {
    let server = Server::serve().size(SIZE).args("--max-clients=300").arg(PORT).start();
    let before = server.memory_kib("VmRSS:");
    let over = AtomicBool::new(false);
    let started = Instant::now();
    thread::scope(|scope| {
        let steady = scope.spawn(|| steady(&server, &over));
        let mut silent: Vec<Client> =
            (0..100).map(|_| Client::new(TcpStream::connect(address(&server)).unwrap())).collect();
        let mut stopped: Vec<Haggler> = (0..100).map(|_| Haggler::new(&server)).collect();
        for (n, haggler) in stopped.iter_mut().enumerate() {
            let whole = option(opt::GO, &[0; 8000]);
            haggler.client.send(&whole[..(n * 83).min(whole.len() - 1)]);
        }
        let server = &server;
        let drips = [1000, 100].map(|pause_ms| scope.spawn(move || drip(server, Duration::from_millis(pause_ms))));
        for client in silent.iter_mut().chain(stopped.iter_mut().map(|haggler| &mut haggler.client)) {
            assert!(ends(client));
        }
        let took = started.elapsed();
        assert!(took + Duration::from_secs(1) >= HANDSHAKE && took < HANDSHAKE + Duration::from_secs(5), "{took:?}");
        for drip in drips {
            let took = drip.join().unwrap();
            assert!(took < HANDSHAKE + Duration::from_secs(5), "one byte at a time: {took:?}");
        }
        over.store(true, Ordering::Relaxed);
        let longest = steady.join().unwrap();
        assert!(longest < Duration::from_secs(5), "another client waited {longest:?}");
    });
    wait_for("all gone", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    let grown = server.memory_kib("VmRSS:").saturating_sub(before);
    assert!(grown <= 8 << 10, "{grown} KiB more");
    assert!(server.log().contains("the negotiation took too long"), "{}", server.log());
    server.expect_healthy();
}

/// Once it has haggled, a client may think as long as it likes.
#[test]
fn an_idle_client_has_no_deadline() {
    let server = serve(SIZE);
    let mut idle = simple(&server);
    let mut chunked = structured(&server);
    let mut waits = Haggler::new(&server);
    // The deadline of the third, who has not come that far, shows that the time is over.
    assert!(ends(&mut waits.client));
    idle.expect_alive();
    chunked.expect_alive();
    server.expect_healthy();
}

#[test]
fn many_large_options_at_once_cost_little() {
    let server = Server::serve().size(SIZE).args("--max-clients=300").arg(PORT).start();
    let before = server.memory_kib("VmHWM:");
    let mut hagglers: Vec<Haggler> = (0..200).map(|_| Haggler::new(&server)).collect();
    for haggler in &mut hagglers {
        haggler.client.send(&option_head(opt::INFO, 8192));
        haggler.client.send(&[0xff; 8191]);
    }
    let mut other = simple(&server);
    other.expect_alive();
    for haggler in &mut hagglers {
        haggler.client.send(&[0xff]);
        assert_eq!(haggler.reply(opt::INFO), (rep::ERR_INVALID, vec![]));
    }
    let grown = server.memory_kib("VmHWM:") - before;
    assert!(grown <= 8 << 10, "{grown} KiB more");
    drop(hagglers);
    server.expect_healthy();
}

#[test]
fn random_bytes_in_haggling_harm_nobody() {
    let server = serve(SIZE);
    let mut other = structured(&server);
    let before = server.memory_kib("VmHWM:");
    for seed in 0..300_u64 {
        let mut noise = crate::support::pattern(seed, 3000);
        let mut haggler = Haggler::new(&server);
        // Half of them begin like an option.
        if seed % 2 == 0 {
            let kinds = [1_u32, 3, 6, 7, 8, 9, 10, 99];
            noise.splice(..16, option_head(kinds[(seed / 2) as usize % 8], (seed * 37 % 9000) as u32));
        }
        try_send(&mut haggler.client, &noise);
        if seed % 20 == 0 {
            other.expect_alive();
        }
    }
    wait_for("all gone", SOON, || (server.status().number("num_clients") == 1).then_some(()));
    let grown = server.memory_kib("VmHWM:") - before;
    assert!(grown <= 4 << 10, "{grown} KiB more");
    other.expect_alive();
    server.expect_healthy();
}

/// A hole of 4 GiB goes as thousands of chunks, and as many more when others hold all of the buffers. What is owed to
/// those who do not take it stays bounded all the same.
#[test]
fn holes_that_nobody_takes_do_not_pile_up() {
    let server = Server::serve().size(8 << 30).args("--max-clients=100").arg(PORT).start();
    let file = File::options().write(true).open(&server.image).unwrap();
    file.write_all_at(&vec![1; 32 << 20], 6 << 30).unwrap();
    let before = server.memory_kib("VmRSS:");
    let ask = |offset, length| {
        let mut client = structured(&server);
        client.client.send(&request(kind::READ, 0, 1, offset, length).repeat(31));
        client
    };
    let hoarders: Vec<Structured> = (0..20).map(|_| ask(6 << 30, 32 << 20)).collect();
    let mut greedy: Vec<Structured> = (0..8).map(|_| ask(0, u32::MAX)).collect();
    // Until the server has nothing more to do for them.
    let ticks = || {
        fs::read_to_string(format!("/proc/{}/stat", server.pid()))
            .unwrap()
            .split(' ')
            .skip(13)
            .take(2)
            .collect::<String>()
    };
    let mut seen = (ticks(), Instant::now());
    wait_for("an idle server", SOON, || {
        let grown = server.memory_kib("VmRSS:").saturating_sub(before);
        assert!(grown <= 24 << 10, "{grown} KiB more, of which 16 MiB are buffers");
        let now = ticks();
        if now != seen.0 {
            seen = (now, Instant::now());
        }
        (seen.1.elapsed() > Duration::from_millis(300)).then_some(())
    });
    simple(&server).expect_alive();
    // And it is still right.
    drop(hoarders);
    let mut at = 0;
    while at < u64::from(u32::MAX) {
        let chunk = greedy[0].chunk();
        assert_eq!((chunk.kind, &chunk.payload[..8]), (2, &at.to_be_bytes()[..]));
        at += u64::from(u32::from_be_bytes(chunk.payload[8..].try_into().unwrap()));
    }
    drop(greedy);
    server.expect_healthy();
}

#[test]
fn a_burst_of_connections_that_hang_up_leaves_nothing() {
    let server = serve(SIZE);
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap().count();
    simple(&server).expect_alive();
    wait_for("it gone", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    let before = descriptors();
    for n in 0..300 {
        let mut stream = TcpStream::connect(address(&server)).unwrap();
        if n % 3 > 0 {
            stream.read_exact(&mut [0; 18]).unwrap();
        }
        if n % 3 > 1 {
            try_send(&mut Client::new(stream), &[0, 0, 0, 3, b'I', b'H']);
        }
    }
    wait_for("all gone", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    assert_eq!(descriptors(), before);
    server.expect_healthy();
}
