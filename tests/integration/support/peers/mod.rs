//! Peers of a migration: the real listener, destinations that follow a script, and a client that never stops checking.

mod destination;
mod worker;

pub use destination::{At, Fault, Script};
pub use worker::{Random, Worker};

use super::{reserved_port, run, wait_for, Builder, Client, Output, Server, SOON};
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Transmission flags.
pub mod offer {
    /// What the predecessor's listener offers: flags, FLUSH, FUA.
    pub const PREDECESSOR: u32 = 1 | 4 | 8;
    /// Nothing but that there are flags.
    pub const NOTHING: u32 = 1;
    /// FLUSH, FUA, TRIM and `WRITE_ZEROES`.
    pub const ALL: u32 = 1 | 4 | 8 | 32 | 64;
}

/// `flexnbd listen`, on this port; 0 is a port that stays its own.
pub fn listen(port: u16) -> Builder {
    listen_after(port, "exec")
}

/// As [`listen`]; the command, `exec` and what goes before or behind it, becomes the listener. The harness starts `serve` on port 0: the shell puts
/// the words of a listener in place of those, and becomes it.
pub fn listen_after(port: u16, command: &str) -> Builder {
    let port = if port == 0 { reserved_port() } else { port };
    let script = format!(
        r#"bin=$1 addr=$4 file=$6; shift 8; {command} "$bin" listen --addr "$addr" --port "$0" --file "$file" "$@""#
    );
    Server::serve().through(&["sh", "-c", &script, &port.to_string()])
}

/// Runs `flexnbd mirror` with more options, separated by spaces.
#[track_caller]
pub fn mirror(source: &Server, to: SocketAddr, more: &str) -> Output {
    let (addr, port) = (to.ip().to_string(), to.port().to_string());
    let mut args = vec!["mirror", "--addr", &addr, "--port", &port, "--sock", source.sock.to_str().unwrap()];
    args.extend(more.split_whitespace());
    run(&args, &[])
}

/// Starts a migration; fails unless it is started.
#[track_caller]
pub fn start_mirror(source: &Server, to: SocketAddr, more: &str) {
    let output = mirror(source, to, more);
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!((output.code, &*said, &*output.stderr), (Some(0), "Migration started\n", ""), "{}", source.log());
}

/// Runs a mode that takes nothing but a control socket and options; returns its code and what it printed to either side.
#[track_caller]
pub fn tell(mode: &str, server: &Server, options: &str) -> (Option<i32>, String) {
    let mut args = vec![mode, "--sock", server.sock.to_str().unwrap()];
    args.extend(options.split_whitespace());
    let output = run(&args, &[]);
    (output.code, String::from_utf8(output.stdout).unwrap() + &output.stderr)
}

/// Fails unless the server ends by itself with this code.
#[track_caller]
pub fn expect_exit(server: &mut Server, code: i32) {
    let status = server.process.wait(SOON);
    assert_eq!(status.code(), Some(code), "{}", server.log());
}

/// Fails unless a migration in progress ends well on both sides, and both files are the same.
#[track_caller]
pub fn expect_migrated(source: &mut Server, destination: &mut Server) {
    expect_exit(source, 0);
    expect_exit(destination, 0);
    expect_same(&source.image, &destination.image);
}

/// Fails unless both files have the same bytes.
#[track_caller]
pub fn expect_same(a: &Path, b: &Path) {
    const PIECE: usize = 1 << 20;
    let (left, right) = (File::open(a).unwrap(), File::open(b).unwrap());
    let size = left.metadata().unwrap().len();
    assert_eq!(size, right.metadata().unwrap().len(), "the size of {} and {}", a.display(), b.display());
    let (mut one, mut other) = (vec![0; PIECE], vec![0; PIECE]);
    for offset in (0..size).step_by(PIECE) {
        let length = PIECE.min((size - offset) as usize);
        left.read_exact_at(&mut one[..length], offset).unwrap();
        right.read_exact_at(&mut other[..length], offset).unwrap();
        if one[..length] != other[..length] {
            let at = (0..length).find(|&at| one[at] != other[at]).unwrap();
            panic!("{} and {} differ at {}", a.display(), b.display(), offset + at as u64);
        }
    }
}

/// Waits until a key of the status has this value.
#[track_caller]
pub fn wait_for_status(server: &Server, key: &str, value: &str) {
    let pair = format!(" {key}={value} ");
    wait_for(format_args!("the status{pair}"), SOON, || server.status().line().contains(&pair).then_some(()));
}

/// An address where nobody listens.
pub fn nowhere() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], reserved_port()))
}

/// Sends the whole image as the predecessor does: large writes, one at a time, no FLUSH, and waits for the end after DISC.
#[track_caller]
pub fn send_image(client: &mut Client, image: &[u8]) {
    for (number, piece) in image.chunks(8 << 20).enumerate() {
        assert_eq!(client.write((number * (8 << 20)) as u64, piece), 0);
    }
}
