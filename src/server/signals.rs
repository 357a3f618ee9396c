//! The signals that stop the server, as one more descriptor of the loop.

use crate::sys::{self, SignalFd};
use log::info;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

/// The signals, and whether there is a terminal that may hang up.
#[derive(Debug)]
pub(super) struct Signals {
    fd: SignalFd,
    /// At the start: once the terminal has hung up, it cannot be opened any more.
    has_terminal: bool,
}

impl Signals {
    /// As [`SignalFd::new`].
    pub(super) fn new() -> io::Result<Self> {
        let terminal = File::options().read(true).custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK).open("/dev/tty");
        Ok(Self { fd: SignalFd::new()?, has_terminal: terminal.is_ok() })
    }

    /// Takes the signals that came, up to one that stops the server, and says which. True: there was one. Without a terminal
    /// a SIGHUP is none: it is a supervisor's word for «read your configuration again», and there is no configuration.
    pub(super) fn take_stop(&self) -> io::Result<bool> {
        while let Some(signal) = self.fd.read()? {
            if signal != libc::SIGHUP || self.has_terminal {
                info!("stopping: {}", sys::signal_name(signal));
                return Ok(true);
            }
            info!("SIGHUP is ignored: there is no terminal that could hang up; SIGTERM stops the server");
        }
        Ok(false)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
