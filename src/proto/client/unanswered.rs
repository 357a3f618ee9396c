//! The commands of a client that are not answered, in the order in which they were given.

use super::account::{Account, Asked};
use super::chunk::Chunk;
use super::cookies::Cookies;
use crate::proto::error::Violation;
use crate::proto::wire::kind;
use std::collections::VecDeque;

#[derive(Debug)]
struct Command<T> {
    cookie: u64,
    asked: Asked,
    /// What chunks have brought, once one has come.
    account: Option<Account>,
    note: T,
}

/// The commands without a whole reply. Each has a cookie of its own.
#[derive(Debug)]
pub(super) struct Unanswered<T> {
    commands: VecDeque<Command<T>>,
    cookies: Cookies,
    /// Commands given.
    given: u64,
}

impl<T> Unanswered<T> {
    pub(super) fn new(cookies: Cookies) -> Self {
        Self { commands: VecDeque::new(), cookies, given: 0 }
    }

    /// Adds a command; returns its cookie.
    pub(super) fn push(&mut self, asked: Asked, note: T) -> u64 {
        let cookie = self.cookies.nth(self.given);
        self.given += 1;
        self.commands.push_back(Command { cookie, asked, account: None, note });
        cookie
    }

    pub(super) fn len(&self) -> usize {
        self.commands.len()
    }

    /// The note of the command that has waited longest.
    pub(super) fn oldest(&self) -> Option<&T> {
        self.commands.front().map(|command| &command.note)
    }

    /// What was noted with the command with this cookie.
    pub(super) fn note(&self, cookie: u64) -> Result<&T, Violation> {
        let command = self.commands.iter().find(|command| command.cookie == cookie);
        command.map(|command| &command.note).ok_or(Violation::UnknownCookie(cookie))
    }

    /// Adds a chunk to what has come for this cookie.
    pub(super) fn take_chunk(
        &mut self,
        cookie: u64,
        chunk: &Chunk,
        allocation_id: Option<u32>,
    ) -> Result<(), Violation> {
        let command = self.commands.iter_mut().find(|command| command.cookie == cookie);
        let command = command.ok_or(Violation::UnknownCookie(cookie))?;
        command.account.get_or_insert_default().note(command.asked, chunk, allocation_id)
    }

    /// What is asked by the command with this cookie, to which a simple reply has come. Where chunks were agreed on, a READ
    /// has to be answered with them, and so has whatever brings extents.
    pub(super) fn take_simple(&self, cookie: u64, error: u32, structured: bool) -> Result<Asked, Violation> {
        let command = self.commands.iter().find(|command| command.cookie == cookie);
        let Command { asked, account, .. } = command.ok_or(Violation::UnknownCookie(cookie))?;
        let needs_chunks = match asked.kind {
            kind::READ => structured,
            kind::BLOCK_STATUS => structured && error == 0,
            _ => false,
        };
        if needs_chunks || account.is_some() {
            return Err(Violation::SimpleReply(cookie));
        }
        Ok(*asked)
    }

    /// Takes the command with this cookie out, to which a whole reply has come: its note, and the error of its chunks or 0.
    pub(super) fn finish(&mut self, cookie: u64) -> Result<(T, u32), Violation> {
        let unknown = Violation::UnknownCookie(cookie);
        let at = self.commands.iter().position(|command| command.cookie == cookie).ok_or(unknown)?;
        let error = match self.commands.get(at) {
            Some(Command { asked, account: Some(account), .. }) => account.close(*asked),
            _ => Some(0),
        };
        let error = error.ok_or(Violation::IncompleteReply(cookie))?;
        let Command { note, .. } = self.commands.remove(at).ok_or(unknown)?;
        Ok((note, error))
    }
}
