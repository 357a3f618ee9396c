//! What one slot asks of others. Slots never touch each other: they push an effect, and the turn applies it last.

use super::config::{Destination, Purpose};
use super::socket::{Peer, Socket};
use crate::command::{Answer, Command};
use crate::event::slots::Key;

/// Something to do when every slot has had its turn.
#[derive(Debug)]
pub(super) enum Effect {
    /// This listener has accepted a connection.
    Accepted(Key, Socket, Peer, Purpose),
    /// A control connection has sent a command and waits for the answer.
    Command(Key, Command),
    /// The command of this control connection has been carried out.
    Answer(Key, Answer),
    /// The migration has ended: the answer for every control connection that waits for that.
    AnswerWaiters(Answer),
    /// This client has named its session and waits for the answer.
    Named(Key),
    /// A client brings a request of this server's own migration.
    CameBack,
    /// Clients are paused from now on.
    PauseClients,
    /// Clients that were paused or kept waiting may go on.
    ResumeClients,
    /// The image is at this server now, and what clients ask goes there.
    Relay(Destination),
    /// The server that has the image has been away for too long: clients are closed.
    CutClients,
    /// A slot wants another turn.
    Run(Key),
    /// This process cannot go on; why.
    Fail(String),
}
