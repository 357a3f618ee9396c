//! What one slot asks of others. Slots never touch each other: they push an effect, and the turn applies it last.

use super::config::Dialect;
use super::socket::{Peer, Socket};
use crate::command::{Answer, Command};
use crate::event::slots::Key;

/// Something to do when every slot has had its turn.
#[derive(Debug)]
pub enum Effect {
    /// A client was accepted, by a listener that speaks so.
    Connected(Socket, Peer, Dialect),
    /// A control connection was accepted.
    ControlConnected(Socket),
    /// A control connection has sent a command and waits for the answer.
    Command(Key, Command),
    /// What a control connection asked for has come to its end.
    Answer(Key, Answer),
    /// Clients that were paused or held back may go on.
    ResumeClients,
    /// A slot wants another turn.
    Run(Key),
    /// This process cannot go on; why.
    Fail(String),
}
