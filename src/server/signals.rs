//! The signals that stop the server, as one more descriptor of the loop.

use crate::sys::{self, SignalFd};
use log::info;
use std::io;

/// Takes the signal that came, if one did, and says so.
pub(super) fn take_stop(signals: &SignalFd) -> io::Result<bool> {
    let signal = signals.read()?;
    if let Some(signal) = signal {
        info!("stopping: {}", sys::signal_name(signal));
    }
    Ok(signal.is_some())
}
