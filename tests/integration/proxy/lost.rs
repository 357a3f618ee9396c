//! Nothing that was answered is lost, however often the server crashes.

use super::{before, door, PAIRS};
use crate::support::fading::{Fading, Style};
use crate::support::peers::Random;
use crate::support::shadow::{Habits, Shadowing};
use crate::support::{program, wait_for, Process, TempDir, SOON};
use std::fs::{self, File};
use std::io::Write;
use std::net::SocketAddr;
use std::process::Stdio;

const SIZE: usize = 1 << 20;

/// A client works through a proxy while the server crashes so often. What went wrong, if anything did.
fn crash(pair: (Style, Style), seed: u64, crashes: usize, options: &str) -> Result<(), String> {
    let (client_style, server_style) = pair;
    let server = Fading::start(server_style, SIZE, seed);
    let proxy = before(&server).args(options).start();
    let client = Shadowing::start(door(&proxy, client_style), SIZE, seed, Habits::usual(client_style));
    let mut random = Random::new(seed + 1);
    for _ in 0..crashes {
        if !client.goes_on(1 + random.below(100)) {
            break;
        }
        server.crash();
    }
    let shadow = client.stop().map_err(|why| format!("{why}; {}", proxy.log()))?;
    match shadow.differs(&server.durable()) {
        None => {}
        Some(sector) => return Err(format!("sector {sector} is not durable after a FLUSH")),
    }
    proxy.expect_healthy();
    Ok(())
}

#[test]
fn nothing_answered_is_lost_in_sixty_crashes() {
    for (seed, pair) in PAIRS.into_iter().enumerate() {
        assert_eq!(crash(pair, seed as u64, 15, ""), Ok(()), "{pair:?}");
    }
}

/// The map is full again and again, and nobody but the proxy asks for a FLUSH.
#[test]
fn nothing_answered_is_lost_when_the_map_is_too_small() {
    const SIZE: usize = 16 << 20;
    let server = Fading::start(Style::Newstyle, SIZE, 1);
    let proxy = before(&server).args("--replay-limit 4194304").start();
    let habits = Habits { flushes: 0, fua: 0, ..Habits::usual(Style::Oldstyle) };
    let client = Shadowing::start(proxy.address(), SIZE, 1, habits);
    for _ in 0..6 {
        if !client.goes_on(300) {
            break;
        }
        server.crash();
    }
    let status = proxy.status();
    assert!(status.number("own_flushes") > 0, "{}", status.line());
    let shadow = client.stop().unwrap_or_else(|why| panic!("{why}; {}", proxy.log()));
    assert_eq!(shadow.differs(&server.durable()), None);
    proxy.expect_healthy();
}

#[test]
#[ignore = "takes a while"]
fn nothing_answered_is_lost_in_two_hundred_crashes() {
    for (seed, pair) in PAIRS.into_iter().enumerate() {
        assert_eq!(crash(pair, 100 + seed as u64, 200, ""), Ok(()), "{pair:?}");
    }
}

/// The proof of the tests above.
#[test]
fn without_the_map_of_what_is_dirty_the_loss_is_found() {
    let pair = (Style::Newstyle, Style::Oldstyle);
    let found = (0..8).find_map(|seed| crash(pair, seed, 10, "--replay inflight").err());
    let why = found.expect("a loss");
    assert!(why.contains("sector"), "{why}");
}

/// qemu, which connects again by itself when it is told to. It is given commands and answers them one by one.
struct Qemu {
    process: Process,
    said: File,
    dir: TempDir,
}

impl Qemu {
    fn start(address: SocketAddr) -> Self {
        let dir = TempDir::new();
        let (ip, port) = (address.ip(), address.port());
        let disk = format!("driver=nbd,server.type=inet,server.host={ip},server.port={port},reconnect-delay=60");
        let said = File::options().create(true).append(true).open(dir.join("said")).unwrap();
        let mut command = program("stdbuf");
        // Else its answers wait until there are many of them.
        command.args(["-oL", "qemu-io", "-t", "writeback", "--image-opts", &disk]);
        command.stdin(Stdio::piped()).stdout(said.try_clone().unwrap()).stderr(said.try_clone().unwrap());
        Self { process: Process::spawn(&mut command), said, dir }
    }

    /// What it says to this, up to the line that tells how much was done.
    fn ask(&mut self, what: &str) -> String {
        self.said.set_len(0).unwrap();
        writeln!(self.process.0.stdin.as_ref().unwrap(), "{what}").unwrap();
        wait_for(format_args!("the answer to {what:?}"), SOON, || {
            let said = String::from_utf8_lossy(&fs::read(self.dir.join("said")).unwrap()).into_owned();
            said.contains("ops; ").then_some(said)
        })
    }
}

/// A client that connects again by itself forgets what it has not flushed. The tests above would find that.
#[test]
fn what_qemu_loses_alone_it_keeps_through_a_proxy() {
    for (has_proxy, seed) in [(false, 1), (true, 1), (true, 2), (true, 3)] {
        let server = Fading::start(Style::Newstyle, SIZE, seed);
        let proxy = has_proxy.then(|| before(&server).start());
        let mut qemu = Qemu::start(proxy.as_ref().map_or(server.address, |proxy| door(proxy, Style::Newstyle)));
        for pattern in 1..4 {
            let wrote = qemu.ask(&format!("write -P {pattern} 0 {SIZE}"));
            assert!(wrote.contains(&format!("wrote {SIZE}/{SIZE} bytes")), "{wrote}");
            server.crash();
            let read = qemu.ask(&format!("read -P {pattern} 0 {SIZE}"));
            assert!(read.contains(&format!("read {SIZE}/{SIZE} bytes")), "{read}");
            assert_eq!(read.contains("Pattern verification failed"), !has_proxy, "{read}");
        }
    }
}
