//! Migrations over a link of a known speed, between two network namespaces.

use crate::support::peers::{expect_migrated, listen_after, start_mirror};
use crate::support::{pattern, wait_for, Server, SOON};
use std::process::{Command, Stdio};
use std::time::Instant;

/// The speed of the link, in bytes per second.
const LINK: u64 = 40_000_000;
/// The size of the image.
const SIZE: u64 = 48 << 20;

/// Two network namespaces and a pair of devices between them; gone when dropped.
struct Link {
    names: [String; 2],
}

fn tool(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

impl Link {
    /// `None` where the machine does not allow it.
    fn new(test: &str) -> Option<Self> {
        let names = ["a", "b"].map(|end| format!("flexnbd-{}-{test}-{end}", std::process::id()));
        let link = Self { names };
        let [a, b] = &link.names;
        let made = tool(&format!("ip netns add {a}"))
            && tool(&format!("ip netns add {b}"))
            && tool(&format!("ip -n {a} link add veth0 type veth peer name veth0 netns {b}"));
        let ends = [(a, "10.77.0.1/24"), (b, "10.77.0.2/24")];
        let ready = made
            && ends.iter().all(|(name, address)| {
                tool(&format!("ip -n {name} address add {address} dev veth0"))
                    && tool(&format!("ip -n {name} link set veth0 up"))
                    && tool(&format!("ip -n {name} link set lo up"))
                    && tool(&format!(
                        "tc -n {name} qdisc add dev veth0 root tbf rate {}bit burst 256kb latency 50ms",
                        LINK * 8
                    ))
            });
        ready.then_some(link)
    }

    fn inside(&self, end: usize) -> [&str; 4] {
        ["ip", "netns", "exec", &self.names[end]]
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        for name in &self.names {
            tool(&format!("ip netns delete {name}"));
        }
    }
}

/// Bytes per second of a migration over the link, in the middle of it: how it begins, and how long the disk of the
/// destination takes to flush, says nothing about the link.
fn speed(test: &str, options: &str) -> Option<u64> {
    let Some(link) = Link::new(test) else {
        eprintln!("not tested: a limited link takes root, network namespaces and tc");
        return None;
    };
    let source = Server::serve().through(&link.inside(0)).addr("10.77.0.1").content(&pattern(1, SIZE as usize));
    let mut source = source.start();
    let command = format!("exec {}", link.inside(1).join(" "));
    let mut destination = listen_after(0, &command).addr("10.77.0.2").size(SIZE).start();
    start_mirror(&source, destination.address(), options);
    let arrival = |least: u64| {
        wait_for("data", SOON, || {
            let received = destination.status().number("written_bytes");
            (received >= least).then(|| (received, Instant::now()))
        })
    };
    let ((first, began), (last, ended)) = (arrival(SIZE / 8), arrival(SIZE / 8 * 7));
    expect_migrated(&mut source, &mut destination);
    let micros = u64::try_from((ended - began).as_micros()).unwrap();
    let speed = (last - first) * 1_000_000 / micros;
    eprintln!("over a link of {LINK} bytes/s {options}: {speed} bytes/s");
    Some(speed)
}

#[test]
fn a_link_is_used() {
    if let Some(speed) = speed("full", "") {
        assert!(speed >= LINK / 10 * 9, "{speed} of {LINK} bytes/s");
    }
}

#[test]
fn a_limit_is_held() {
    const LIMIT: u64 = 16_000_000;
    if let Some(speed) = speed("limit", &format!("--max-speed {LIMIT}")) {
        assert!((LIMIT / 10 * 9..LIMIT / 10 * 11).contains(&speed), "{speed} with a limit of {LIMIT} bytes/s");
    }
}
