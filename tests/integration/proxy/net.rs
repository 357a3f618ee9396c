//! What happens to the network between a proxy and its server, in namespaces of these tests.

use crate::support::{kind, pattern, request, wait_for, Client, Link, Server, SOON};
use std::fs;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const SIZE: usize = 1 << 20;
/// `FLEXNBD_UPSTREAM_TIMEOUT` of these proxies.
const TIMEOUT: &str = "FLEXNBD_UPSTREAM_TIMEOUT=5";

/// A server at the far end, on a port that a later one can have, too.
fn far_server(link: &Link, image: Option<&Server>, port: &str) -> Server {
    let restart =
        r#"bin=$1 addr=$4 file=$6; shift 8; exec "$bin" serve --addr "$addr" --port "$0" --file "$file" "$@""#;
    let words = [&link.inside(1)[..], &["sh", "-c", restart, port]].concat();
    let server = Server::serve().through(&words).addr(Link::FAR).engine("sync");
    match image {
        Some(before) => server.file(before.image.clone()).start(),
        None => server.content(&pattern(1, SIZE)).start(),
    }
}

/// A proxy at the near end and a client of it. A UNIX socket belongs to no network.
fn near_proxy(link: &Link, port: &str) -> (Server, Client) {
    let words = [&link.inside(0)[..], &["env", TIMEOUT]].concat();
    let proxy = Server::proxy_to_nowhere().through(&words);
    let path = proxy.dir().join("nbd");
    let to = format!("--conn-addr {} --conn-port {port}", Link::FAR);
    let proxy = proxy.addr(path.display().to_string()).args(&to).start();
    let mut client = Client::new(UnixStream::connect(&path).unwrap());
    client.read_greeting();
    (proxy, client)
}

/// How many lines of its log are of this level.
fn lines(proxy: &Server, level: &str) -> usize {
    proxy.log().lines().filter(|line| line.contains(level)).count()
}

/// The processor time that a process has had, in hundredths of a second.
fn ticks(server: &Server) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", server.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// A connection that fails at once is tried again after a pause, like any other.
#[test]
fn without_a_route_it_neither_spins_nor_fills_the_log() {
    let Some(link) = Link::new("route") else { return };
    let mut server = far_server(&link, None, "7801");
    let (proxy, mut client) = near_proxy(&link, "7801");
    assert_eq!(client.write(0, &pattern(2, 4096)), 0);
    link.remove_near();
    server.stop_by("KILL");
    // What is sent now finds no way.
    client.send(&request(kind::READ, 0, 1, 0, 4096));
    wait_for("an error that comes at once", SOON, || proxy.status().line().contains("unreachable").then_some(()));
    let (before, began) = (ticks(&proxy), Instant::now());
    wait_for("some attempts", SOON, || (began.elapsed() > Duration::from_secs(3)).then_some(()));
    let spent = ticks(&proxy) - before;
    assert!(spent < 50, "{spent} hundredths of a second of processor time in 3 s");
    assert!(lines(&proxy, ":W:") <= 2, "{}", proxy.log());

    link.add_near();
    let mut again = far_server(&link, Some(&server), "7801");
    assert_eq!(client.read_reply(), (0, 1));
    assert_eq!(client.read_bytes(4096), pattern(2, 4096));
    assert!(lines(&proxy, ":W:") <= 3, "{}", proxy.log());
    assert!(again.stop().success());
}

/// Nothing comes through either way, and nobody says so: the kernel's silence ends the connection, not the server's.
#[test]
fn a_path_that_swallows_everything_is_given_up_and_tried_again() {
    let Some(link) = Link::new("hole") else { return };
    let mut server = far_server(&link, None, "7802");
    let (proxy, mut client) = near_proxy(&link, "7802");
    assert_eq!(client.write(0, &pattern(2, 4096)), 0);
    link.remove_far(Link::FAR);
    client.send(&[request(kind::WRITE, 0, 1, 4096, 4096), pattern(3, 4096)].concat());
    wait_for("the connection to be given up", Duration::from_secs(60), || {
        (proxy.status().get("upstream_state") == "connecting").then_some(())
    });
    client.expect_silence(Duration::from_millis(100));
    link.add_far(Link::FAR);
    assert_eq!(client.read_reply(), (0, 1));
    assert_eq!(client.flush(), 0);
    assert_eq!(client.read(0, 8192).unwrap(), [pattern(2, 4096), pattern(3, 4096)].concat());
    assert_eq!(proxy.status().number("reconnects"), 1);
    drop(client);
    assert!(server.stop().success());
}

/// The address moves to a machine that knows nothing of the connection, and says so.
#[test]
fn the_address_moves_to_another_machine() {
    let Some(mut link) = Link::new("move") else { return };
    let mut server = far_server(&link, None, "7803");
    let (proxy, mut client) = near_proxy(&link, "7803");
    assert_eq!(client.write(0, &pattern(2, 4096)), 0);
    // The machine is gone; what its file was has been brought to the other one.
    link.replace_far();
    server.stop_by("KILL");
    let mut other = far_server(&link, Some(&server), "7803");
    assert_eq!(client.write(4096, &pattern(3, 4096)), 0);
    assert_eq!(client.read(0, 8192).unwrap(), [pattern(2, 4096), pattern(3, 4096)].concat());
    assert_eq!(client.flush(), 0);
    assert!(proxy.status().number("replayed_bytes") >= 4096, "what was not flushed was written again");
    drop(client);
    assert!(other.stop().success());
}
