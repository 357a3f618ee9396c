//! The modes that only talk to a server, one step after the other: `read`, `write`, and every control command.
//!
//! They block, each step under a deadline, so that none hangs on a server that does. Only to wait for the end of a
//! migration has no deadline: it ends with the server at the latest.

mod connect;
mod progress;
mod transfer;

pub use connect::Error;
pub use progress::Style;
pub use transfer::{read, write, Target};

use crate::command::{encode_command, parse_answer, Answer};
use crate::sys;
use connect::{connect_unix, explain, set_limits};
use progress::{Progress, Report};
use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long the answer to a control command may take: a `mirror` waits for a connection and a greeting.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How often a migration that is waited for is looked at, in milliseconds: often enough for a line that seems to move.
const LOOK_EVERY_MS: u64 = 250;
/// The longest answer line that is read, in bytes: the status of more clients than a server lists.
const MAX_ANSWER: usize = 4 << 20;

/// Sends a command to a control socket. Prints the text of a good answer to `out`, of another one to `err`; returns the
/// code of the answer.
pub fn control(path: &Path, words: &[String], out: &mut impl Write, err: &mut impl Write) -> Result<u8, Error> {
    let answer = ask(path, words)?;
    print_answer(&answer, &answer.text, out, err)
}

/// Asks a control socket for the status of its server, as key=value pairs or as JSON, and prints it to `out`; with
/// `clients` that of each client too, which has a line of its own unless it is JSON. Prints another answer to `err`;
/// returns the code of the answer.
pub fn status(path: &Path, json: bool, clients: bool, out: &mut impl Write, err: &mut impl Write) -> Result<u8, Error> {
    let words: Vec<_> = [(true, "status"), (json, "json"), (clients, "clients")]
        .into_iter()
        .filter_map(|(wanted, word)| wanted.then_some(word))
        .collect();
    let answer = ask(path, &words)?;
    // No value of a key=value pair holds a space.
    let text = if json { answer.text.clone() } else { answer.text.replace(" client=", "\nclient=") };
    print_answer(&answer, &text, out, err)
}

/// Sends a command that starts a migration to a control socket; with a style of `progress`, waits until the migration
/// ends. Prints what was done to `out`, a refusal or why the migration failed to `err`, where the progress goes too;
/// returns the code of the last answer.
///
/// The server is told to wait before it is told to start: a small image may be gone, and the server with it, before a
/// command sent later arrives.
pub fn mirror(
    path: &Path,
    words: &[String],
    progress: Option<Style>,
    out: &mut impl Write,
    err: &mut impl Write,
) -> Result<u8, Error> {
    let waiting = progress.map(|style| Ok((style, send_command(path, &["wait"])?))).transpose()?;
    let started = ask(path, words)?;
    let code = print_answer(&started, "Migration started", out, err)?;
    let Some((style, connection)) = waiting.filter(|_| code == 0) else { return Ok(code) };
    let ended = watch(path, connection, &mut Progress::new(style, &mut *err))
        .map_err(|error| Error(format!("{error}; whether the migration was completed is not known")))?;
    if ended == Answer::unknown_command() {
        let why = "this server cannot say when a migration ends; look at its status";
        return Err(Error(format!("{}: {why}", path.display())));
    }
    print_answer(&ended, "Migration completed", out, err)
}

/// Waits for the answer to `wait`, and shows what the status says meanwhile.
fn watch(path: &Path, waiting: UnixStream, progress: &mut Progress<impl Write>) -> Result<Answer, Error> {
    let failed = |error| Error(format!("{}: cannot wait: {error}", path.display()));
    while !sys::wait_readable(waiting.as_fd(), LOOK_EVERY_MS).map_err(failed)? {
        // A status that does not come is no reason to stop: if the server is gone, `waiting` says so.
        if let Ok(status) = ask(path, &["status"]) {
            if let Some(report) = Report::parse(&status.text) {
                progress.show(&report, sys::monotonic_ms());
            }
        }
    }
    progress.clear();
    receive_answer(path, waiting)
}

/// Prints `done` to `out` for a good answer, the text of another one to `err`; returns the code.
fn print_answer(answer: &Answer, done: &str, out: &mut impl Write, err: &mut impl Write) -> Result<u8, Error> {
    let printed = if answer.code == 0 { writeln!(out, "{done}") } else { writeln!(err, "{}", answer.text) };
    printed.map_err(|error| Error(format!("cannot print the answer: {error}")))?;
    Ok(answer.code)
}

fn ask(path: &Path, words: &[impl AsRef<str>]) -> Result<Answer, Error> {
    receive_answer(path, send_command(path, words)?)
}

fn send_command(path: &Path, words: &[impl AsRef<str>]) -> Result<UnixStream, Error> {
    let failed = |what: &str, error: &io::Error| Error(format!("{}: {what}: {}", path.display(), explain(error)));
    let words: Vec<_> = words.iter().map(AsRef::as_ref).collect();
    let mut stream = connect_unix(path, ANSWER_LIMIT)?;
    set_limits(&stream, ANSWER_LIMIT).map_err(|error| failed("cannot set a limit", &error))?;
    stream.write_all(&encode_command(&words)).map_err(|error| failed("cannot send the command", &error))?;
    Ok(stream)
}

fn receive_answer(path: &Path, mut stream: UnixStream) -> Result<Answer, Error> {
    let failed = |why: &dyn fmt::Display| Error(format!("{}: no answer: {why}", path.display()));
    let mut line = Vec::new();
    let mut piece = [0; 4096];
    while !line.contains(&b'\n') && line.len() < MAX_ANSWER {
        match stream.read(&mut piece).map_err(|error| failed(&explain(&error)))? {
            0 if line.is_empty() => return Err(failed(&"the server closed the connection")),
            0 => break,
            n => line.extend_from_slice(piece.get(..n).unwrap_or_default()),
        }
    }
    parse_answer(&line).map_err(|error| Error(format!("{}: {error}", path.display())))
}
