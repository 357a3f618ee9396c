//! The commands of a client that are not answered, in the order in which they were given.

use super::cookies::Cookies;
use std::collections::VecDeque;

#[derive(Debug)]
struct Command<T> {
    cookie: u64,
    /// How much data a good reply brings, in bytes.
    data_bytes: u32,
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

    /// Adds a command to which a good reply brings so much data; returns its cookie.
    pub(super) fn push(&mut self, data_bytes: u32, note: T) -> u64 {
        let cookie = self.cookies.nth(self.given);
        self.given += 1;
        self.commands.push_back(Command { cookie, data_bytes, note });
        cookie
    }

    pub(super) fn len(&self) -> usize {
        self.commands.len()
    }

    /// The note of the command that has waited longest.
    pub(super) fn oldest(&self) -> Option<&T> {
        self.commands.front().map(|command| &command.note)
    }

    /// How much data a good reply to the command with this cookie brings, in bytes, and its note.
    pub(super) fn get(&self, cookie: u64) -> Option<(u32, &T)> {
        self.commands.iter().find(|command| command.cookie == cookie).map(|command| (command.data_bytes, &command.note))
    }

    /// Takes the command with this cookie out: it is answered.
    pub(super) fn take(&mut self, cookie: u64) -> Option<T> {
        let at = self.commands.iter().position(|command| command.cookie == cookie)?;
        self.commands.remove(at).map(|command| command.note)
    }
}
