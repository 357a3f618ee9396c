//! PURE: the language of the control socket. For a server: lines to a [`Command`], an [`Answer`] to a line; for a client,
//! the other way round.
//!
//! A command is its name and its arguments, one per line, ended by an empty line or by the end of the stream. Arguments
//! may also follow the name on the first line, separated by spaces. White space around a line is ignored, so a line of
//! nothing else counts as empty and a carriage return is harmless. The answer is one line: `CODE: text`.
//!
//! What the predecessor's servers do not know is either a command of its own or a keyword argument, `KEY=VALUE`, which
//! may stand anywhere among the optional arguments: no address, number or ending looks like one.
//!
//! Addresses stay text; whoever uses them parses them.

use crate::printable::{escape, shorten};
use std::fmt;
use std::str::FromStr;

/// The longest line of a command in bytes, without its end: several times as long as any argument that makes sense.
pub const LINE_MAX: usize = 1 << 10;

/// The longest command in bytes, without the empty line: enough for an access control list of a thousand long entries.
pub const COMMAND_MAX: usize = 64 << 10;

/// The longest pause a migration may be allowed, in milliseconds: most clients give up on a disk that is silent for
/// longer.
pub const PAUSE_MAX_MS: u64 = 60_000;

/// What a control client asks for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// `acl ENTRY...`: replace the access control list with these entries, which are not checked yet; without any, the
    /// list becomes empty.
    Acl(Vec<String>),
    /// `status [json|prometheus] [clients]`: report how the server is doing.
    Status(StatusForm),
    /// `mirror ADDR PORT [exit|unlink|nothing [BIND_ADDR [MAX_BYTES_PER_SECOND]]] [max_pause_ms=N] [export=NAME]
    /// [relay=yes]`: start a migration.
    Mirror(Mirror),
    /// `mirror_max_bps N`: limit the running migration to N bytes per second; 0 (`None`) lifts the limit.
    MirrorMaxBps(Option<u64>),
    /// `limit [max_iops=N] [max_bytes_per_second=N]`: limit what clients may ask for, from now on.
    Limit(Limit),
    /// `break`: stop the running migration.
    Break,
    /// `upstream ADDR PORT [now|when-lost]`: change a proxy to another server, at once or when its connection has ended.
    Upstream(Switch),
    /// `resize`: look at the file again, which has grown.
    Resize,
    /// `snapshot FILE`: make a second file of the image as it is now, at this absolute path.
    Snapshot(String),
    /// `wait`: answer when the running migration ends or, if there is none, when the next one does.
    Wait,
}

/// How a status is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StatusForm {
    /// How the facts are written down.
    pub notation: Notation,
    /// With a record of each client.
    pub clients: bool,
}

/// A notation of facts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Notation {
    /// key=value pairs.
    #[default]
    Pairs,
    /// `json`: a JSON object.
    Json,
    /// `prometheus`: the text format of Prometheus. The ends of its lines are escaped, as in every answer; nothing else in
    /// it looks like that.
    Prometheus,
}

/// Where to migrate to, and how.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mirror {
    /// The destination's address as it was written, not checked yet.
    pub addr: String,
    /// The destination's port, never 0.
    pub port: u16,
    /// What to do once the destination has everything.
    pub ending: Ending,
    /// The local address to connect from as it was written, not checked yet. `None` if it was left out or `0`: the
    /// system chooses.
    pub bind: Option<String>,
    /// The most bytes to send per second; `None` (no limit) if it was left out or 0.
    pub max_bytes_per_s: Option<u64>,
    /// How long clients may be paused at the end, in milliseconds, if it was given: a target, at most [`PAUSE_MAX_MS`].
    pub max_pause_ms: Option<u64>,
    /// The name of the export at the destination; empty for the default one.
    pub export: String,
    /// Serve the clients that are connected from there, once the destination has everything.
    pub relay: bool,
}

/// What all clients together may ask for per second. 0 is no limit, and what is `None` stays as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Limit {
    /// Requests.
    pub max_iops: Option<u64>,
    /// Bytes of data.
    pub max_bytes_per_s: Option<u64>,
}

/// Where a proxy is to connect to, and when.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Switch {
    /// The server's address as it was written, not checked yet; or the path of its UNIX socket, which begins with '/'.
    pub addr: String,
    /// The server's port, never 0; of no meaning beside a path.
    pub port: u16,
    /// When the connection has ended, instead of now.
    pub when_lost: bool,
}

/// What the source does once the destination has everything.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ending {
    /// `exit`: end, with success.
    #[default]
    Exit,
    /// `unlink`: delete the file, then end.
    Unlink,
    /// `nothing`: go on serving.
    Nothing,
}

/// The one line a command is answered with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// 0 for success; anything else is the exit code of the client.
    pub code: u8,
    /// What to tell the user.
    pub text: String,
}

impl Answer {
    /// The command succeeded.
    pub fn ok(text: impl Into<String>) -> Self {
        Self { code: 0, text: text.into() }
    }

    /// The command was understood and failed.
    pub fn failed(text: impl Into<String>) -> Self {
        Self { code: 1, text: text.into() }
    }

    /// An entry of an access control list does not parse.
    pub fn bad_spec(entry: &str) -> Self {
        Self::failed(format!("bad spec: {}", shorten(entry)))
    }

    fn bad_argument(argument: &str) -> Self {
        Self::failed(format!("bad argument: {}", shorten(argument)))
    }

    fn missing_command() -> Self {
        Self { code: 9, text: "missing command".into() }
    }

    /// There is no command of this name.
    pub fn unknown_command() -> Self {
        Self { code: 10, text: "unknown command".into() }
    }

    /// The answer as bytes: one line whatever is in the text, because control characters are escaped.
    pub fn encode(&self) -> Vec<u8> {
        format!("{}: {}\n", self.code, escape(self.text.chars())).into_bytes()
    }
}

/// The bytes a server sent are not an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MalformedAnswer;

impl fmt::Display for MalformedAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the server's answer is incomplete or not of the form CODE: TEXT")
    }
}

impl std::error::Error for MalformedAnswer {}

/// Parses everything that a server sent before it closed the connection. Only the first line counts; without its end it
/// was cut off and is no answer. Its text may be shown: control characters are escaped, such that JSON stays JSON.
pub fn parse_answer(bytes: &[u8]) -> Result<Answer, MalformedAnswer> {
    let end = bytes.iter().position(|&byte| byte == b'\n').ok_or(MalformedAnswer)?;
    let line = String::from_utf8_lossy(bytes.get(..end).unwrap_or_default());
    let (code, text) = line.split_once(':').ok_or(MalformedAnswer)?;
    let code = parse_number(code).ok_or(MalformedAnswer)?;
    Ok(Answer { code, text: escape(text.trim().chars()) })
}

/// A command and its arguments as bytes, for a client to send. No word may be empty or contain a line break.
pub fn encode_command(words: &[&str]) -> Vec<u8> {
    debug_assert!(words.iter().all(|word| !word.trim().is_empty() && !word.contains('\n')), "a word is a line");
    let mut bytes = words.join("\n").into_bytes();
    bytes.extend(b"\n\n");
    bytes
}

/// What stands before the time at which a client stops waiting for its answer.
const END: &str = "until=";

/// Says behind a command when its client stops waiting for the answer, in milliseconds of a clock that began at `began_s`, in
/// seconds since 1970. A server that was stopped for longer does not carry the command out; those that do not know this drop
/// it.
pub fn encode_end(at_ms: u64, began_s: u64) -> Vec<u8> {
    format!("{END}{at_ms} {began_s}\n").into_bytes()
}

/// When the client stops waiting, and when its clock began, if the bytes with the end of its command say so.
pub fn parse_end(bytes: &[u8]) -> Option<(u64, u64)> {
    let line = bytes.strip_suffix(b"\n")?.rsplit(|&byte| byte == b'\n').next()?;
    let (at_ms, began_s) = std::str::from_utf8(line).ok()?.strip_prefix(END)?.split_once(' ')?;
    Some((parse_number(at_ms)?, parse_number(began_s)?))
}

/// Collects the bytes of one command. A new one has seen nothing and owns no memory.
///
/// Invariant 1: `text` is at most [`COMMAND_MAX`] bytes, and the last line in it, which begins at `line_start`, at most
/// [`LINE_MAX`].
#[derive(Debug, Default)]
pub struct Reader {
    text: Vec<u8>,
    line_start: usize,
}

impl Reader {
    /// Takes the next bytes. `Ok(None)` asks for more. A client says nothing after its command, so whatever follows it is
    /// dropped. An error is the answer to send instead of carrying out a command. After a command or an error the reader
    /// is as good as new.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<Option<Command>, Answer> {
        while let Some(newline) = bytes.iter().position(|&byte| byte == b'\n') {
            let (piece, rest) = bytes.split_at(newline);
            self.append(piece)?;
            if self.line().trim_ascii().is_empty() {
                return self.end_of_stream().map(Some);
            }
            if self.text.len() == COMMAND_MAX {
                return Err(self.refuse("command too long"));
            }
            self.text.push(b'\n');
            self.line_start = self.text.len();
            bytes = rest.get(1..).unwrap_or_default();
        }
        self.append(bytes)?;
        Ok(None)
    }

    /// Takes the end of the stream for the end of the command. The reader is as good as new afterwards.
    pub fn end_of_stream(&mut self) -> Result<Command, Answer> {
        parse_command(&std::mem::take(self).text)
    }

    /// Adds a piece of the current line. The limit that an error names does not depend on how the input was cut up.
    fn append(&mut self, piece: &[u8]) -> Result<(), Answer> {
        let line_room = LINE_MAX.saturating_sub(self.line().len());
        let command_room = COMMAND_MAX.saturating_sub(self.text.len());
        if piece.len() > line_room.min(command_room) {
            return Err(self.refuse(if line_room <= command_room { "line too long" } else { "command too long" }));
        }
        self.text.extend(piece);
        debug_assert!(self.text.len() <= COMMAND_MAX && self.line().len() <= LINE_MAX, "invariant 1");
        Ok(())
    }

    fn line(&self) -> &[u8] {
        self.text.get(self.line_start..).unwrap_or_default()
    }

    fn refuse(&mut self, why: &str) -> Answer {
        *self = Self::default();
        Answer::failed(why)
    }
}

/// Parses the lines of one command, without the empty line.
fn parse_command(text: &[u8]) -> Result<Command, Answer> {
    let mut lines = text.split(|&byte| byte == b'\n');
    let first = lines.next().unwrap_or_default();
    let words = first.split(u8::is_ascii_whitespace).chain(lines.map(<[u8]>::trim_ascii));
    let mut words = words.filter(|word| !word.is_empty());
    let name = words.next().ok_or_else(Answer::missing_command)?;
    let mut arguments = words.map(readable);
    let command = match name {
        b"acl" => Command::Acl(arguments.by_ref().collect()),
        b"status" => Command::Status(parse_status(&mut arguments)?),
        b"mirror" => Command::Mirror(parse_mirror(&mut arguments)?),
        b"mirror_max_bps" => Command::MirrorMaxBps(parse_speed(&arguments.next().unwrap_or_default())?),
        b"limit" => Command::Limit(parse_limit(&mut arguments)?),
        b"break" => Command::Break,
        b"upstream" => Command::Upstream(parse_switch(&mut arguments)?),
        b"resize" => Command::Resize,
        b"snapshot" => Command::Snapshot(parse_path(&mut arguments)?),
        b"wait" => Command::Wait,
        _ => return Err(Answer::unknown_command()),
    };
    end_of(arguments).map(|()| command)
}

fn end_of(mut arguments: impl Iterator<Item = String>) -> Result<(), Answer> {
    arguments.next().map_or(Ok(()), |_| Err(Answer::failed("too many arguments")))
}

/// Takes all arguments of `status`, in any order.
fn parse_status(arguments: &mut impl Iterator<Item = String>) -> Result<StatusForm, Answer> {
    let mut form = StatusForm::default();
    for argument in arguments {
        match argument.as_str() {
            "json" => form.notation = Notation::Json,
            "prometheus" => form.notation = Notation::Prometheus,
            "clients" => form.clients = true,
            _ => return Err(Answer::bad_argument(&argument)),
        }
    }
    Ok(form)
}

/// Takes all arguments of `mirror`: the positional ones, of which the first two are required, and the keywords, of which
/// the last one of a name wins.
fn parse_mirror(arguments: &mut impl Iterator<Item = String>) -> Result<Mirror, Answer> {
    let addr = arguments.next().ok_or_else(|| Answer::failed("bad IP address"))?;
    let port = arguments.next().and_then(|port| parse_number(&port)).filter(|&port| port != 0);
    let port = port.ok_or_else(|| Answer::failed("bad IP port number"))?;
    let (keywords, places): (Vec<_>, Vec<_>) = arguments.partition(|argument| argument.contains('='));
    let mut places = places.into_iter();
    let ending = match places.next().as_deref() {
        None => Ending::default(),
        Some("exit") => Ending::Exit,
        Some("unlink") => Ending::Unlink,
        Some("nothing") => Ending::Nothing,
        Some(_) => return Err(Answer::failed("bad action")),
    };
    let bind = places.next().filter(|bind| bind != "0");
    let max_bytes_per_s = places.next().map_or(Ok(None), |speed| parse_speed(&speed))?;
    end_of(places)?;
    let (max_pause_ms, export) = (None, String::new());
    let mut mirror = Mirror { addr, port, ending, bind, max_bytes_per_s, max_pause_ms, export, relay: false };
    for keyword in keywords {
        let bad = || Answer::bad_argument(&keyword);
        match keyword.split_once('=') {
            Some(("relay", "yes")) => mirror.relay = true,
            Some(("max_pause_ms", ms)) => mirror.max_pause_ms = Some(parse_pause(ms).ok_or_else(bad)?),
            // No length to check: a line is far shorter than the longest name the protocol allows.
            Some(("export", name)) if !name.contains('\0') => mirror.export = name.into(),
            _ => return Err(bad()),
        }
    }
    Ok(mirror)
}

/// Takes all arguments of `limit`, in any order; the last one of a name wins.
fn parse_limit(arguments: &mut impl Iterator<Item = String>) -> Result<Limit, Answer> {
    let mut limit = Limit::default();
    for argument in arguments {
        let (name, number) = argument.split_once('=').unwrap_or_default();
        let number = parse_number(number);
        match name {
            "max_iops" if number.is_some() => limit.max_iops = number,
            "max_bytes_per_second" if number.is_some() => limit.max_bytes_per_s = number,
            _ => return Err(Answer::bad_argument(&argument)),
        }
    }
    if limit == Limit::default() {
        return Err(Answer::failed("no limit is named: max_iops=N, max_bytes_per_second=N or both"));
    }
    Ok(limit)
}

/// Takes the arguments of `upstream`.
fn parse_switch(arguments: &mut impl Iterator<Item = String>) -> Result<Switch, Answer> {
    let addr = arguments.next().ok_or_else(|| Answer::failed("bad IP address"))?;
    let port = arguments.next().and_then(|port| parse_number(&port));
    let port = port.filter(|&port| port != 0 || addr.starts_with('/'));
    let port = port.ok_or_else(|| Answer::failed("bad IP port number"))?;
    let when_lost = match arguments.next().as_deref() {
        None | Some("now") => false,
        Some("when-lost") => true,
        Some(other) => return Err(Answer::bad_argument(other)),
    };
    Ok(Switch { addr, port, when_lost })
}

/// The path of a file, from the root: the server may be in another folder than who asks.
fn parse_path(arguments: &mut impl Iterator<Item = String>) -> Result<String, Answer> {
    let path = arguments.next().ok_or_else(|| Answer::failed("bad path: none was given"))?;
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(path);
    }
    Err(Answer::failed(format!("bad path: {}: it has to begin with '/'", shorten(&path))))
}

fn parse_pause(text: &str) -> Option<u64> {
    parse_number(text).filter(|&ms| ms <= PAUSE_MAX_MS)
}

/// Bytes per second, where 0 means no limit.
fn parse_speed(text: &str) -> Result<Option<u64>, Answer> {
    let speed = parse_number(text).ok_or_else(|| Answer::failed("bad speed"))?;
    Ok(Some(speed).filter(|&speed| speed != 0))
}

/// A decimal number of digits alone: no sign, no white space.
fn parse_number<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// An argument as text. One that is not UTF-8 is escaped as a whole, `=` included, so that no address, keyword or number
/// looks like it and it is refused wherever it is used.
fn readable(argument: &[u8]) -> String {
    let escaped = |_| argument.escape_ascii().to_string().replace('=', "\\x3d");
    std::str::from_utf8(argument).map_or_else(escaped, str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How much of a client's input an answer repeats.
    const SHORT_MAX: usize = 128;

    fn parse(bytes: &[u8]) -> Result<Command, Answer> {
        let mut reader = Reader::default();
        match reader.push(bytes)? {
            Some(command) => Ok(command),
            None => reader.end_of_stream(),
        }
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.into()).collect()
    }

    fn mirror(ending: Ending, bind: Option<&str>, max_bytes_per_s: Option<u64>) -> Command {
        let bind = bind.map(str::to_owned);
        let (max_pause_ms, export) = (None, String::new());
        Command::Mirror(Mirror {
            addr: "10.0.0.1".into(),
            port: 4777,
            ending,
            bind,
            max_bytes_per_s,
            max_pause_ms,
            export,
            relay: false,
        })
    }

    #[test]
    fn commands_parse_in_every_form() {
        for text in ["status\n\n", "status", "status\n", " status \r\n\r\n", "status\n \n", "\tstatus\n\nbreak\n\n"] {
            assert_eq!(parse(text.as_bytes()), Ok(Command::Status(StatusForm::default())), "{text:?}");
        }
        let both = Ok(Command::Acl(strings(&["10.0.0.0/8", "::1"])));
        for text in
            ["acl\n10.0.0.0/8\n::1\n\n", "acl 10.0.0.0/8 ::1\n\n", "acl  10.0.0.0/8\r\n\t::1", "acl\n10.0.0.0/8\n::1\n"]
        {
            assert_eq!(parse(text.as_bytes()), both, "{text:?}");
        }
        assert_eq!(parse(b"acl\n\n"), Ok(Command::Acl(Vec::new())));
        assert_eq!(parse(b"acl\na b\n\n"), Ok(Command::Acl(strings(&["a b"]))));
        assert_eq!(parse(b"break\n\n"), Ok(Command::Break));
        assert_eq!(parse(b"wait\n\n"), Ok(Command::Wait));
        assert_eq!(parse(b"resize\n\n"), Ok(Command::Resize));
        assert_eq!(parse(b"snapshot\n/a b \n\n"), Ok(Command::Snapshot("/a b".into())));
        assert_eq!(parse(b"mirror_max_bps\n1000\n\n"), Ok(Command::MirrorMaxBps(Some(1000))));
        assert_eq!(parse(b"mirror_max_bps 0\n\n"), Ok(Command::MirrorMaxBps(None)));
        let limit = |max_iops, max_bytes_per_s| Ok(Command::Limit(Limit { max_iops, max_bytes_per_s }));
        assert_eq!(parse(b"limit max_iops=5\n\n"), limit(Some(5), None));
        assert_eq!(parse(b"limit\nmax_bytes_per_second=7\nmax_iops=0\n\n"), limit(Some(0), Some(7)));
    }

    #[test]
    fn mirror_takes_its_arguments_in_order() {
        assert_eq!(parse(b"mirror\n10.0.0.1\n4777\n\n"), Ok(mirror(Ending::Exit, None, None)));
        assert_eq!(parse(b"mirror 10.0.0.1 4777 exit\n\n"), Ok(mirror(Ending::Exit, None, None)));
        assert_eq!(parse(b"mirror\n10.0.0.1\n4777\nunlink\n\n"), Ok(mirror(Ending::Unlink, None, None)));
        assert_eq!(parse(b"mirror 10.0.0.1 4777 nothing ::1\n\n"), Ok(mirror(Ending::Nothing, Some("::1"), None)));
        assert_eq!(parse(b"mirror 10.0.0.1 4777 exit 0 5\n\n"), Ok(mirror(Ending::Exit, None, Some(5))));
        assert_eq!(parse(b"mirror 10.0.0.1 4777 exit ::1 0\n\n"), Ok(mirror(Ending::Exit, Some("::1"), None)));
    }

    #[test]
    fn a_keyword_of_mirror_stands_anywhere_after_the_port() {
        for (text, ending, bind, pause_ms) in [
            ("mirror\n10.0.0.1\n4777\nmax_pause_ms=0\n\n", Ending::Exit, None, 0),
            ("mirror 10.0.0.1 4777 max_pause_ms=60000 nothing ::1\n\n", Ending::Nothing, Some("::1"), 60_000),
            ("mirror 10.0.0.1 4777 unlink max_pause_ms=7 ::1\n\n", Ending::Unlink, Some("::1"), 7),
            ("mirror 10.0.0.1 4777 exit 0 0 max_pause_ms=7\n\n", Ending::Exit, None, 7),
            ("mirror 10.0.0.1 4777 max_pause_ms=7 max_pause_ms=8\n\n", Ending::Exit, None, 8),
        ] {
            let Command::Mirror(mut expected) = mirror(ending, bind, None) else { unreachable!() };
            expected.max_pause_ms = Some(pause_ms);
            assert_eq!(parse(text.as_bytes()), Ok(Command::Mirror(expected)), "{text:?}");
        }
    }

    #[test]
    fn the_export_is_the_rest_of_its_line() {
        for (line, name) in [
            ("export=disk", "disk"),
            ("export=", ""),
            ("export=a=b c/\u{e9}", "a=b c/\u{e9}"),
            ("export=first\nexport=\\x3d ", "\\x3d"),
        ] {
            let Command::Mirror(mut expected) = mirror(Ending::Unlink, None, None) else { unreachable!() };
            expected.export = name.into();
            let text = format!("mirror 10.0.0.1 4777 unlink\n{line}\n\n");
            assert_eq!(parse(text.as_bytes()), Ok(Command::Mirror(expected)), "{text:?}");
        }
    }

    #[test]
    fn status_takes_its_forms_in_any_order() {
        for (text, notation, clients) in [
            ("status json", Notation::Json, false),
            ("status\nclients", Notation::Pairs, true),
            ("status clients json", Notation::Json, true),
            ("status json\nclients", Notation::Json, true),
            ("status json json", Notation::Json, false),
            ("status prometheus", Notation::Prometheus, false),
        ] {
            assert_eq!(parse(text.as_bytes()), Ok(Command::Status(StatusForm { notation, clients })), "{text:?}");
        }
    }

    #[test]
    fn bad_commands_get_their_answer() {
        for (text, code, answer) in [
            ("", 9, "missing command"),
            ("\n", 9, "missing command"),
            ("  \n\n", 9, "missing command"),
            ("\r\nstatus\n\n", 9, "missing command"),
            ("statu\n\n", 10, "unknown command"),
            ("STATUS\n\n", 10, "unknown command"),
            ("status\0\n\n", 10, "unknown command"),
            ("status\nx\n\n", 1, "bad argument: x"),
            ("status json clients JSON\n\n", 1, "bad argument: JSON"),
            ("break x\n\n", 1, "too many arguments"),
            ("mirror_max_bps\n\n", 1, "bad speed"),
            ("mirror_max_bps -1\n\n", 1, "bad speed"),
            ("mirror_max_bps +1\n\n", 1, "bad speed"),
            ("mirror_max_bps 18446744073709551616\n\n", 1, "bad speed"),
            ("mirror_max_bps 1 2\n\n", 1, "too many arguments"),
            ("mirror\n\n", 1, "bad IP address"),
            ("mirror 10.0.0.1\n\n", 1, "bad IP port number"),
            ("mirror 10.0.0.1 0\n\n", 1, "bad IP port number"),
            ("mirror 10.0.0.1 65536\n\n", 1, "bad IP port number"),
            ("mirror 10.0.0.1 nbd\n\n", 1, "bad IP port number"),
            ("mirror 10.0.0.1 4777 delete\n\n", 1, "bad action"),
            ("mirror 10.0.0.1 4777 exit ::1 fast\n\n", 1, "bad speed"),
            ("mirror 10.0.0.1 4777 exit ::1 5 more\n\n", 1, "too many arguments"),
            ("mirror 10.0.0.1 4777 exit ::1 5 max_pause_ms=1 more\n\n", 1, "too many arguments"),
            ("mirror max_pause_ms=1 10.0.0.1 4777\n\n", 1, "bad IP port number"),
            ("mirror 10.0.0.1 4777 max_pause=1\n\n", 1, "bad argument: max_pause=1"),
            ("mirror 10.0.0.1 4777 =\n\n", 1, "bad argument: ="),
            ("mirror 10.0.0.1 4777 max_pause_ms=\n\n", 1, "bad argument: max_pause_ms="),
            ("mirror 10.0.0.1 4777 max_pause_ms=-1\n\n", 1, "bad argument: max_pause_ms=-1"),
            ("mirror 10.0.0.1 4777 max_pause_ms=1=1\n\n", 1, "bad argument: max_pause_ms=1=1"),
            ("mirror 10.0.0.1 4777 max_pause_ms=60001\n\n", 1, "bad argument: max_pause_ms=60001"),
            ("mirror 10.0.0.1 4777\nexport=a\0b\n\n", 1, "bad argument: export=a\\u0000b"),
            ("mirror 10.0.0.1 4777 Export=a\n\n", 1, "bad argument: Export=a"),
            ("wait 1\n\n", 1, "too many arguments"),
            ("snapshot\n\n", 1, "bad path: none was given"),
            ("snapshot a/b\n\n", 1, "bad path: a/b: it has to begin with '/'"),
            ("snapshot\n/a\n/b\n\n", 1, "too many arguments"),
            ("resize 2048\n\n", 1, "too many arguments"),
            ("limit\n\n", 1, "no limit is named: max_iops=N, max_bytes_per_second=N or both"),
            ("limit 5\n\n", 1, "bad argument: 5"),
            ("limit max_iops=\n\n", 1, "bad argument: max_iops="),
            ("limit max_iops=-1\n\n", 1, "bad argument: max_iops=-1"),
            ("limit max_iops=1 max_bytes_per_second=1K\n\n", 1, "bad argument: max_bytes_per_second=1K"),
            ("limit max_bps=1\n\n", 1, "bad argument: max_bps=1"),
        ] {
            assert_eq!(parse(text.as_bytes()), Err(Answer { code, text: answer.into() }), "{text:?}");
        }
        assert_eq!(parse(b"\xff\xfe\n\n"), Err(Answer::unknown_command()));
        assert_eq!(parse(b"mirror 10.0.0.1 4777 export=\xff\n\n"), Err(Answer::failed("bad action")));
    }

    #[test]
    fn arguments_that_are_no_text_are_escaped() {
        assert_eq!(parse(b"acl\n\xff\x80x\n\n"), Ok(Command::Acl(strings(&["\\xff\\x80x"]))));
        assert_eq!(Answer::bad_spec("\\xff\u{1b}[2J\n\u{85}").text, "bad spec: \\xff\\u001b[2J\\n\\u0085");
        let long = Answer::bad_spec(&"é".repeat(500));
        assert_eq!(long.text, format!("bad spec: {}...", "é".repeat(SHORT_MAX)));
        assert_eq!(Answer::bad_spec(&"x".repeat(SHORT_MAX)).text.len(), "bad spec: ".len() + SHORT_MAX);
    }

    /// What the reader says when it gets the input in these pieces.
    fn parse_pieces<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Result<Command, Answer> {
        let mut reader = Reader::default();
        for piece in pieces {
            if let Some(command) = reader.push(piece)? {
                return Ok(command);
            }
        }
        reader.end_of_stream()
    }

    #[test]
    fn every_split_gives_the_same() {
        for text in [
            &b"mirror\r\n10.0.0.1\r\n4777\r\nexit\r\n\r\nstatus\n\n"[..],
            b"acl 10.0.0.1\n  ::1  \n\n\n",
            b"acl\n10.0.0.1",
            b"\n\n",
            b"",
            b"nonsense \xff\n\n",
        ] {
            let whole = parse(text);
            assert_eq!(parse_pieces(text.chunks(1)), whole);
            for first in 0..=text.len() {
                for second in first..=text.len() {
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    assert_eq!(parse_pieces(pieces.into_iter()), whole, "{pieces:?}");
                }
            }
        }
    }

    #[test]
    fn limits_are_exact_and_the_same_for_every_split() {
        let entry = "x".repeat(LINE_MAX);
        let fits = format!("acl\n{entry}\n\n");
        assert_eq!(parse(fits.as_bytes()), Ok(Command::Acl(vec![entry.clone()])));
        let line = "y".repeat(1023);
        let full = format!("acl{}\n{}", " ".repeat(1020), format!("{line}\n").repeat(63));
        assert_eq!(full.len(), COMMAND_MAX);
        let too_long = Err(Answer::failed("line too long"));
        let too_much = Err(Answer::failed("command too long"));
        for (text, expected) in [
            (format!("acl\n{entry}x\n\n"), too_long.clone()),
            (format!("acl\n{entry}x"), too_long.clone()),
            (format!("acl\n{entry}\r\n\n"), too_long.clone()),
            (entry.repeat(1000), too_long),
            (format!("{full}\n"), Ok(Command::Acl(vec![line; 63]))),
            (format!("{full}x\n\n"), too_much.clone()),
            (format!("{full}{entry}x\n\n"), too_much.clone()),
            (format!("{}x\n\n", &full[..COMMAND_MAX - 1]), too_much.clone()),
            ("acl\n".to_owned() + &"1\n".repeat(COMMAND_MAX), too_much),
        ] {
            assert_eq!(parse(text.as_bytes()), expected);
            for size in [1, 2, 7, 1000, 1024, 1025, 4096, 65_535, 65_536] {
                assert_eq!(parse_pieces(text.as_bytes().chunks(size)), expected, "pieces of {size}");
            }
        }
    }

    #[test]
    fn a_reader_is_as_new_after_an_answer() {
        let mut reader = Reader::default();
        assert!(reader.push(&[b'x'; LINE_MAX + 1]).is_err());
        assert_eq!(reader.push(b"status\n\n"), Ok(Some(Command::Status(StatusForm::default()))));
        assert_eq!(reader.text.capacity(), 0);
        assert_eq!(reader.push(b"break\n"), Ok(None));
        assert_eq!(reader.end_of_stream(), Ok(Command::Break));
        assert_eq!(reader.end_of_stream(), Err(Answer::missing_command()));
    }

    #[test]
    fn answers_survive_the_way_there_and_back() {
        for answer in
            [Answer::ok("updated"), Answer::failed("bad spec: a: b"), Answer::missing_command(), Answer::ok("")]
        {
            assert_eq!(parse_answer(&answer.encode()), Ok(answer));
        }
        assert_eq!(Answer::unknown_command().encode(), b"10: unknown command\n");
        assert_eq!(Answer::ok("a\nb\r\u{7f}").encode(), b"0: a\\nb\\r\\u007f\n");
        assert_eq!(parse_answer(b"0: pid=1 x=y\r\nmore\n"), Ok(Answer::ok("pid=1 x=y")));
        assert_eq!(parse_answer(b"1:\xff\n"), Ok(Answer::failed("\u{fffd}")));
        let driving = parse_answer("0: {\"a\":\"\u{1b}]0;x\u{7}\u{9b}2J\r\"}\r\n".as_bytes());
        assert_eq!(driving, Ok(Answer::ok(r#"{"a":"\u001b]0;x\u0007\u009b2J\r"}"#)));
        for bad in [&b""[..], b"\n", b"0: cut", b"updated\n", ": x\n".as_bytes(), b"256: x\n", b"-1: x\n", b"x: y\n"] {
            assert_eq!(parse_answer(bad), Err(MalformedAnswer), "{bad:?}");
        }
    }

    #[test]
    fn a_client_may_say_when_it_stops_waiting() {
        let mut command = encode_command(&["acl", "127.0.0.1"]);
        assert_eq!(parse_end(&command), None);
        command.extend(encode_end(17, 4));
        assert_eq!(parse_end(&command), Some((17, 4)));
        let mut reader = Reader::default();
        assert_eq!(reader.push(&command), Ok(Some(Command::Acl(strings(&["127.0.0.1"])))), "no part of the command");
        for none in [&b""[..], b"until=17 4", b"\nuntil=17\n", b"\nuntil= 4\n", b"\nuntil=-1 4\n", b"\nuntil=1 x\n"] {
            assert_eq!(parse_end(none), None, "{none:?}");
        }
    }

    #[test]
    fn encoded_commands_parse_as_what_they_say() {
        let words = ["mirror", "10.0.0.1", "4777", "unlink", "0", "7"];
        assert_eq!(encode_command(&words), b"mirror\n10.0.0.1\n4777\nunlink\n0\n7\n\n");
        assert_eq!(parse(&encode_command(&words)), Ok(mirror(Ending::Unlink, None, Some(7))));
        assert_eq!(parse(&encode_command(&["status"])), Ok(Command::Status(StatusForm::default())));
    }
}
