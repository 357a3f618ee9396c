//! What a supervisor is told that asks for it (`sd_notify(3)`): that the server is ready, what it does, that its loop goes on,
//! and that it stops. Nothing that goes wrong with that is of consequence to clients.

use super::life::Life;
use super::reason::Next;
use super::shared::Shared;
use crate::event::alarm::Alarm;
use crate::event::slots::Key;
use crate::printable;
use log::warn;
use std::env;
use std::ffi::OsStr;
use std::io::{self, ErrorKind};
use std::mem::{discriminant, Discriminant};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// How often the progress of a migration is told, and how long until what could not be sent is tried again, in milliseconds.
const AGAIN_MS: u64 = 1_000;

/// The supervisor, and what it knows.
#[derive(Debug)]
pub(super) struct Supervisor {
    socket: UnixDatagram,
    to: SocketAddr,
    /// How often it is told that the loop goes on, in milliseconds.
    sign_every_ms: Option<u64>,
    sign_due_ms: Option<u64>,
    /// What the server did when the status was last told, and what was told.
    life: Option<Discriminant<Life>>,
    status: String,
    /// When to look at the status again although the server does the same.
    look_ms: Option<u64>,
    alarm: Alarm,
}

impl Supervisor {
    /// The one that the environment names.
    pub(super) fn from_environment() -> Option<Self> {
        let name = env::var_os("NOTIFY_SOCKET")?;
        let opened = address(&name).and_then(|to| {
            let socket = UnixDatagram::unbound()?;
            socket.set_nonblocking(true)?;
            Ok((socket, to))
        });
        let (socket, to) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                warn!("NOTIFY_SOCKET={}: the supervisor is told nothing: {error}", name.to_string_lossy());
                return None;
            }
        };
        let sign_every_ms = sign_every_ms();
        // The first sign comes with the first timeout.
        let sign_due_ms = sign_every_ms.map(|_| 0);
        let (life, status, look_ms, alarm) = (None, String::new(), None, Alarm::default());
        Some(Self { socket, to, sign_every_ms, sign_due_ms, life, status, look_ms, alarm })
    }

    /// True when the status may be another one than was told last. This is asked in every turn.
    pub(super) fn wants_status(&self, sh: &Shared) -> bool {
        self.life != Some(discriminant(&sh.life)) || self.look_ms.is_some_and(|look_ms| look_ms <= sh.now_ms)
    }

    /// Tells that the server is ready and does this.
    pub(super) fn tell_status(&mut self, status: &str, key: Key, sh: &mut Shared) {
        self.life = Some(discriminant(&sh.life));
        let is_told =
            self.status == status || self.send(&format!("READY=1\nSTATUS={}", printable::escape(status.chars())));
        if is_told {
            status.clone_into(&mut self.status);
        }
        let looks_again = !is_told || matches!(sh.life, Life::Sending { .. });
        self.look_ms = looks_again.then(|| sh.now_ms.saturating_add(AGAIN_MS));
        self.arm(key, sh);
    }

    /// Tells that the server stops.
    pub(super) fn tell_stop(&self) {
        self.send("STOPPING=1");
    }

    /// A wheel entry has fired. The status is looked at in every turn, so to have one is enough.
    pub(super) fn timeout(&mut self, key: Key, sh: &mut Shared) -> Next {
        if self.alarm.fired(sh.now_ms) {
            if self.sign_due_ms.is_some_and(|due_ms| due_ms <= sh.now_ms) {
                self.send("WATCHDOG=1");
                self.sign_due_ms = self.sign_every_ms.map(|ms| sh.now_ms.saturating_add(ms));
            }
            self.arm(key, sh);
        }
        Next::Idle
    }

    fn arm(&mut self, key: Key, sh: &mut Shared) {
        // A look that is due is taken at the end of this turn.
        let look_ms = self.look_ms.filter(|&look_ms| look_ms > sh.now_ms);
        if let Some(at_ms) = self.sign_due_ms.into_iter().chain(look_ms).min() {
            self.alarm.arm(at_ms, key, &mut sh.wheel);
        }
    }

    /// False when the supervisor's socket has no room now. One that is gone is told nothing, and not tried again.
    fn send(&self, words: &str) -> bool {
        let sent = self.socket.send_to_addr(words.as_bytes(), &self.to);
        !sent.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }
}

/// The address of a socket that has a path or, behind @, an abstract name.
fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => Err(io::Error::other("expected a path or an abstract name")),
    }
}

/// Half of the time after which the supervisor misses a sign, if it looks for signs of this process.
fn sign_every_ms() -> Option<u64> {
    let is_other = |pid: String| pid != std::process::id().to_string();
    if env::var("WATCHDOG_PID").is_ok_and(is_other) {
        return None;
    }
    let limit_us: u64 = env::var("WATCHDOG_USEC").ok()?.parse().ok().filter(|&us| us > 0)?;
    Some((limit_us / 2_000).max(1))
}
