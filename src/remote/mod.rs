//! The modes that only talk to a server, one step after the other: `read`, `write`, and every control command.
//!
//! They block, each step under a deadline, so that a server that hangs does not hang them. Only the wait for the end of a
//! migration has no deadline: it ends when the server does, at the latest.
//!
//! This file sends control commands and prints what comes back.

mod connect;
mod progress;
mod transfer;

pub use connect::Error;
pub use progress::ProgressForm;
pub use transfer::{read, write, Target};

use crate::command::{encode_command, encode_end, parse_answer, Answer, Notation, StatusForm};
use crate::endpoint::{Endpoint, Place};
use crate::sys::{self, SignalFd};
use connect::{connect_unix, explain, set_limits};
use progress::{ProgressLine, Report};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

/// How long the answer to a control command may take: that to `mirror` comes after a connection and a greeting.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How long a status may take for `mirror --wait`, which hears of Ctrl-C in between.
const LOOK_LIMIT: Duration = Duration::from_secs(1);
/// How often `mirror --wait` asks for the status, in milliseconds: often enough for a line that seems to move.
const LOOK_EVERY_MS: u64 = 250;
/// How the answer to `mirror` begins when the destination cannot be connected to.
const NOT_CONNECTED: &str = "Mirror failed to connect";
/// The answer to `mirror` when there is a migration.
const RUNNING: &str = "mirror already running";
/// How many columns a terminal has that does not say.
const COLUMNS: usize = 80;
/// The longest answer that is read, in bytes: more than the status of as many clients as a server lists.
const ANSWER_MAX: usize = 4 << 20;

/// Sends a command to a control socket. Prints the text of a good answer to `out`, that of any other to `err`; returns
/// the code of the answer.
pub fn control(path: &Path, words: &[String], out: &mut impl Write, err: &mut impl Write) -> Result<u8, Error> {
    let answer = ask(path, words)?;
    print_answer(&answer, &answer.text, out, err)
}

/// Asks a control socket for the status of its server and prints it to `out`; as key=value pairs, each client is on a line of
/// its own. Prints any other answer to `err`; returns the code of the answer.
pub fn status(path: &Path, form: StatusForm, out: &mut impl Write, err: &mut impl Write) -> Result<u8, Error> {
    let notation = match form.notation {
        Notation::Pairs => None,
        Notation::Json => Some("json"),
        Notation::Prometheus => Some("prometheus"),
    };
    let words: Vec<_> = ["status"].into_iter().chain(notation).chain(form.clients.then_some("clients")).collect();
    let answer = ask(path, &words)?;
    let text = match form.notation {
        // No value contains a space, so this separates the clients and nothing else.
        Notation::Pairs => answer.text.replace(" client=", "\nclient="),
        Notation::Json => answer.text.clone(),
        Notation::Prometheus => unfold(&answer.text),
    };
    print_answer(&answer, &text, out, err)
}

/// A migration to be started.
#[derive(Debug)]
pub struct Migration {
    /// The destination: an address and a port, or a name with several of them, which are tried in turn.
    pub to: Place,
    /// The local address to connect from.
    pub bind: Option<IpAddr>,
    /// What follows the address and the port in the command.
    pub words: Vec<String>,
}

/// Ends lines where an answer has escaped that. A backslash that is escaped itself begins nothing.
fn unfold(text: &str) -> String {
    let mut unfolded = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, chars.clone().next()) {
            ('\\', Some('n')) => unfolded.push('\n'),
            ('\\', Some(next)) => unfolded.extend([c, next]),
            _ => {
                unfolded.push(c);
                continue;
            }
        }
        chars.next();
    }
    unfolded
}

/// Starts a migration by way of a control socket; with `progress`, waits until it ends, also when it runs already. Prints what
/// was done to `out`; the
/// progress, a refusal and why the migration failed go to `err`. Returns the code of the last answer.
///
/// `wait` is sent before `mirror`: a small image may have moved, and the server be gone, before a later command arrives.
pub fn mirror(
    path: &Path,
    migration: &Migration,
    progress: Option<ProgressForm>,
    out: &mut impl Write,
    err: &mut impl Write,
) -> Result<u8, Error> {
    let begin = |to: &Endpoint| {
        let waiting = progress.map(|form| Ok((form, send_command(path, &["wait"], ANSWER_LIMIT)?))).transpose()?;
        let (addr, port) = to.words();
        let words = ["mirror".into(), addr, port].into_iter().chain(migration.words.iter().cloned());
        Ok((waiting, ask(path, &words.collect::<Vec<_>>())?))
    };
    let addresses = migration.to.look_up(migration.bind).map_err(Error)?;
    let (first, others) = addresses.split_first().ok_or_else(|| Error(format!("{} has no address", migration.to)))?;
    let (mut waiting, mut started) = begin(first)?;
    for next in others {
        if !started.text.starts_with(NOT_CONNECTED) {
            break;
        }
        (waiting, started) = begin(next)?;
    }
    let code = if progress.is_some() && started.text == RUNNING && goes_to_one_of(path, &addresses)? {
        print_answer(&Answer::ok(""), "Migration is running already", out, err)?
    } else {
        print_answer(&started, "Migration started", out, err)?
    };
    let Some((form, connection)) = waiting.filter(|_| code == 0) else { return Ok(code) };
    let ended = watch(path, connection, &mut ProgressLine::new(form, &mut *err))
        .map_err(|error| Error(format!("{error}; whether the migration was completed is not known")))?;
    if ended == Answer::unknown_command() {
        let why = "this server cannot say when a migration ends; look at its status";
        return Err(Error(format!("{}: {why}", path.display())));
    }
    print_answer(&ended, "Migration completed", out, err)
}

/// Whether the migration that runs has one of these destinations.
fn goes_to_one_of(path: &Path, places: &[Endpoint]) -> Result<bool, Error> {
    let status = ask(path, &["status"])?.text;
    let destination = status.split(' ').find_map(|fact| fact.strip_prefix("migration_destination="));
    Ok(places.iter().any(|place| destination == Some(place.to_string().as_str())))
}

/// A change of a proxy to another server.
#[derive(Debug)]
pub struct Switch {
    /// The server; a name must have one address.
    pub to: Place,
    /// Only when the connection to the present server has ended.
    pub when_lost: bool,
}

/// Changes a proxy to another server by way of a control socket; with `wait`, stays until the proxy is connected to it.
/// Prints what was done to `out`, a refusal to `err`; returns the code of the answer.
pub fn switch(
    path: &Path,
    switch: &Switch,
    wait: bool,
    out: &mut impl Write,
    err: &mut impl Write,
) -> Result<u8, Error> {
    let found = switch.to.look_up(None).map_err(Error)?;
    let [to] = found.as_slice() else {
        let all: Vec<_> = found.iter().map(ToString::to_string).collect();
        return Err(Error(format!("{} is at {}; name one of them", switch.to, all.join(" and at "))));
    };
    let (addr, port) = to.words();
    let when = if switch.when_lost { "when-lost" } else { "now" };
    let answer = ask(path, &["upstream", &addr, &port, when])?;
    if !wait || answer.code != 0 {
        return print_answer(&answer, &answer.text, out, err);
    }
    let server = to.to_string();
    let server = server.as_str();
    let is_there = |status: &str| {
        status.split(' ').any(|fact| fact.strip_prefix("upstream=") == Some(server))
            && status.split(' ').any(|fact| fact == "upstream_state=connected")
    };
    loop {
        let status = ask(path, &["status"])?.text;
        if is_there(&status) {
            break;
        }
        let is_meant = status.split(' ').any(|fact| fact.strip_prefix("upstream=") == Some(server));
        if !switch.when_lost && !is_meant && !status.split(' ').any(|fact| fact == "upstream_state=switching") {
            return Err(Error(format!("{}: not switched; its log says why", path.display())));
        }
        thread::sleep(Duration::from_millis(LOOK_EVERY_MS));
    }
    print_answer(&answer, "switched", out, err)
}

/// Waits for the answer to `wait` and shows the status meanwhile.
fn watch(path: &Path, waiting: UnixStream, progress: &mut ProgressLine<impl Write>) -> Result<Answer, Error> {
    let failed = |error| Error(format!("{}: cannot wait: {error}", path.display()));
    let interrupt = SignalFd::interrupt().map_err(failed)?;
    while !sys::wait_readable(waiting.as_fd(), LOOK_EVERY_MS).map_err(failed)? {
        if interrupt.read().map_err(failed)?.is_some() {
            progress.clear();
            progress.write(&format!("the migration goes on; flexnbd break --sock {} stops it\n", path.display()));
            sys::end_by_interrupt();
        }
        // A status that does not come is no reason to stop: if the server is gone, `waiting` becomes readable.
        let status = send_command(path, &["status"], LOOK_LIMIT).and_then(|asked| receive_answer(path, asked));
        if let Ok(status) = status {
            if let Some(report) = Report::parse(&status.text) {
                let columns = sys::columns(io::stderr().as_fd()).map_or(COLUMNS, usize::from);
                progress.show(&report, sys::monotonic_ms(), columns.saturating_sub(1));
            }
        }
    }
    progress.clear();
    receive_answer(path, waiting)
}

/// Prints `done` to `out` for a good answer, the text of any other to `err`; returns the code.
fn print_answer(answer: &Answer, done: &str, out: &mut impl Write, err: &mut impl Write) -> Result<u8, Error> {
    let printed = if answer.code == 0 { writeln!(out, "{done}") } else { writeln!(err, "{}", answer.text) };
    printed.map_err(|error| Error(format!("cannot print the answer: {error}")))?;
    Ok(answer.code)
}

fn ask(path: &Path, words: &[impl AsRef<str>]) -> Result<Answer, Error> {
    receive_answer(path, send_command(path, words, ANSWER_LIMIT)?)
}

fn send_command(path: &Path, words: &[impl AsRef<str>], limit: Duration) -> Result<UnixStream, Error> {
    let failed = |what: &str, error: &io::Error| Error(format!("{}: {what}: {}", path.display(), explain(error)));
    let words: Vec<_> = words.iter().map(AsRef::as_ref).collect();
    let mut stream = connect_unix(path, limit)?;
    set_limits(&stream, limit).map_err(|error| failed("cannot set a limit", &error))?;
    let mut command = encode_command(&words);
    // The end of a migration is waited for without a limit.
    if words != ["wait"] {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        command.extend(encode_end(sys::monotonic_ms().saturating_add(limit_ms), sys::clock_began_s()));
    }
    stream.write_all(&command).map_err(|error| failed("cannot send the command", &error))?;
    Ok(stream)
}

fn receive_answer(path: &Path, mut stream: UnixStream) -> Result<Answer, Error> {
    let failed = |why: &dyn fmt::Display| Error(format!("{}: no answer: {why}", path.display()));
    let mut line = Vec::new();
    let mut piece = [0; 4096];
    while !line.contains(&b'\n') && line.len() < ANSWER_MAX {
        match stream.read(&mut piece).map_err(|error| failed(&explain(&error)))? {
            0 if line.is_empty() => return Err(failed(&"the server closed the connection")),
            0 => break,
            n => line.extend_from_slice(piece.get(..n).unwrap_or_default()),
        }
    }
    parse_answer(&line).map_err(|error| Error(format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_where_an_answer_has_escaped_that() {
        for (text, unfolded) in [
            ("", ""),
            (r"a\nb\n", "a\nb\n"),
            (r#"x{f="/a\\nb\"\\"} 1\ny"#, "x{f=\"/a\\\\nb\\\"\\\\\"} 1\ny"),
            (r"\\\n\\n\", "\\\\\n\\\\n\\"),
            ("é\\n🦀", "é\n🦀"),
        ] {
            assert_eq!(unfold(text), unfolded, "{text}");
        }
    }
}
