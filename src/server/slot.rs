//! The kinds of slot, and what each step of a turn is to them.

use super::client::Client;
use super::control::Control;
use super::listener::Listener;
use super::mirror::Mirror;
use super::reason::Next;
use super::shared::Shared;
use crate::event::slots::Key;
use crate::sys::SignalFd;

#[derive(Debug)]
pub enum Slot {
    Listener(Listener),
    // Boxed, so that the table is not as wide as the widest of them.
    Client(Box<Client>),
    Control(Box<Control>),
    Mirror(Box<Mirror>),
    Signals(SignalFd),
}

impl Slot {
    pub fn read_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        match self {
            Self::Listener(listener) => listener.read_step(key, sh),
            Self::Client(client) => client.read_step(key, sh),
            Self::Control(control) => control.read_step(key, sh),
            Self::Mirror(mirror) => sh.with_plan(|plan, sh| mirror.read_step(key, plan, sh)),
            Self::Signals(_) => Next::Idle,
        }
    }

    pub fn write_step(&mut self, key: Key, sh: &mut Shared) -> Next {
        match self {
            Self::Client(client) => client.write_step(sh),
            Self::Control(control) => control.write_step(),
            Self::Mirror(mirror) => sh.with_plan(|plan, sh| mirror.write_step(key, plan, sh)),
            Self::Listener(_) | Self::Signals(_) => Next::Idle,
        }
    }

    pub fn timeout(&mut self, key: Key, sh: &mut Shared) -> Next {
        match self {
            Self::Client(client) => client.timeout(key, sh),
            Self::Control(control) => control.timeout(sh),
            Self::Mirror(mirror) => sh.with_plan(|plan, sh| mirror.timeout(key, plan, sh)),
            // Accepting has rested.
            Self::Listener(_) => Next::Again,
            Self::Signals(_) => Next::Idle,
        }
    }
}
