//! The negotiation of a session, and what a client hears that has named its own.

use super::handshake::Haggled;
use super::{End, ServerSession, State, Step};
use crate::proto::export::{SessionName, Style};

impl ServerSession {
    /// One step of the negotiation. `None`: look again.
    pub(super) fn negotiate(&mut self) -> Option<Step> {
        let State::Handshake(haggle) = &mut self.state else { return None };
        if haggle.is_held() {
            return Some(Step::Named);
        }
        let mut replies = Vec::new();
        let found = haggle.step(self.inbox.filled(), &mut replies);
        let unknown = haggle.take_unknown();
        if !replies.is_empty() {
            self.outbox.push_text(replies, self.inbox.received_ms());
        }
        match found {
            Err(violation) => self.state = State::Closing(End::Violation(violation)),
            Ok(None) => return Some(Step::NeedBytes),
            Ok(Some((used, haggled))) => {
                self.inbox.take_message(used);
                match haggled {
                    Haggled::More | Haggled::Named => {}
                    Haggled::Leave => self.state = State::Closing(End::Abort),
                    Haggled::Transmission(agreed) => {
                        self.style = Style::Newstyle(agreed);
                        self.state = State::Request;
                    }
                }
            }
        }
        unknown.map(Step::UnknownExport)
    }

    /// What the client has named its session.
    pub fn name(&self) -> Option<SessionName> {
        match &self.state {
            State::Handshake(haggle) => haggle.session(),
            State::Request | State::Payload(_) | State::Closing(_) => self.style.session(),
        }
    }

    /// The session is the client's that has named it ([`Step::Named`]).
    pub fn go_on(&mut self) {
        let State::Handshake(haggle) = &mut self.state else { return };
        let mut replies = Vec::new();
        haggle.go_on(&mut replies);
        self.outbox.push_text(replies, self.inbox.received_ms());
    }

    /// There is nothing to serve yet: the client that has named its session ([`Step::Named`]) is told so, and the conversation
    /// is over.
    pub fn refuse(&mut self) {
        let State::Handshake(haggle) = &mut self.state else { return };
        let mut replies = Vec::new();
        haggle.refuse(&mut replies);
        self.outbox.push_text(replies, self.inbox.received_ms());
        self.state = State::Closing(End::NotYet);
    }
}
