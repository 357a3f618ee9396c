//! The command line: raw arguments -> checked configuration -> the mode's entry point -> exit code.
//!
//! `args` defines the options. This file checks what `clap` cannot judge, such as addresses, and the environment,
//! before anything starts. Whatever is wrong there is a usage error with exit code 2, like `clap`'s own. An error of the
//! mode itself is one `F` line and exit code 1.

mod address;
mod args;
mod doors;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::error::{ContextKind, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser};

use crate::acl::Acl;
use crate::command::{self, Notation, StatusForm};
use crate::disk::{Access, EngineChoice};
use crate::logging::{self, fatal, Verbosity};
use crate::proto::wire;
use crate::remote::{self, Migration, ProgressForm, Switch, Target};
use crate::server;
use crate::sys;
use crate::upstream::Replay;
use address::{acl_entry, invalid, Options};
use args::common::{AccessArgs, DoorArgs, LimitArgs, LogFlags};
use args::control::{AclArgs, LimitModeArgs, MirrorSpeedArgs, SnapshotArgs, SockArgs, StatusArgs};
use args::proxy::{ProxyArgs, ReplayKind, SwitchArgs};
use args::values;
use args::{CommandLine, HelpArgs, ListenArgs, MirrorArgs, Mode, ServeArgs, TransferArgs};

/// Fills the place of the program's name in a command line that is made here; help shows the one in [`args`].
const PROGRAM: &str = "flexnbd";
/// The environment variable with the longest time a migration goes on without progress, in decimal seconds.
const REQUEST_LIMIT: &str = "FLEXNBD_MS_REQUEST_LIMIT_SECS";
/// The default of [`REQUEST_LIMIT`], in milliseconds: that of the predecessor.
const REQUEST_LIMIT_MS: u64 = 60_000;
/// The environment variable with the longest time a proxy's server may be silent, in whole seconds.
const UPSTREAM_LIMIT: &str = "FLEXNBD_UPSTREAM_TIMEOUT";
/// The default of [`UPSTREAM_LIMIT`], in milliseconds: that of the predecessor.
const UPSTREAM_LIMIT_MS: u64 = 30_000;

// `args` imports nothing of the project, because the build script includes it.
const _: () = assert!(values::EXPORT_MAX == wire::STRING_MAX, "the longest name of an export");
const _: () = assert!(values::PAUSE_MAX_MS == command::PAUSE_MAX_MS, "the longest pause a server accepts");
const _: () = assert!(command::LINE_MAX <= wire::STRING_MAX, "a name that fits a command's line is not too long");

/// What a command line asks for, checked.
#[derive(Debug)]
enum Job {
    Serve(Box<server::Config>),
    Switch { sock: PathBuf, switch: Switch, wait: bool },
    Read(Target),
    Write(Target),
    Control { sock: PathBuf, words: Vec<String> },
    Status { sock: PathBuf, form: StatusForm },
    Mirror { sock: PathBuf, migration: Migration, wait: bool },
}

/// Does what the arguments ask for, the first of which is the program's name, and returns the exit code: 0 for a clean
/// stop, 1 for an abnormal end, 2 for wrong usage; in a control mode, the code of the server's answer.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    match if is_proxy(&args) { parse_proxy(args) } else { parse(args) } {
        Ok((verbosity, job)) => {
            logging::init(verbosity);
            perform(job, verbosity)
        }
        Err(answer) => {
            // Help goes to stdout, a usage error to stderr. If that is closed, there is nobody to tell.
            let _ = answer.print();
            u8::try_from(answer.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
        }
    }
}

/// True when the program was called by the name that stands for its mode `proxy`.
fn is_proxy(args: &[OsString]) -> bool {
    let name = args.first().and_then(|program| Path::new(program).file_name());
    name.is_some_and(|name| name == args::PROXY_PROGRAM)
}

fn perform(job: Job, verbosity: Verbosity) -> ExitCode {
    match job {
        Job::Serve(config) => ended(server::serve(*config).map(|()| 0)),
        Job::Switch { sock, switch, wait } => {
            ended(remote::switch(&sock, &switch, wait, &mut io::stdout(), &mut io::stderr()))
        }
        Job::Read(target) => ended(remote::read(&target, &mut io::stdout()).map(|()| 0)),
        Job::Write(target) => ended(remote::write(&target).map(|()| 0)),
        Job::Control { sock, words } => ended(remote::control(&sock, &words, &mut io::stdout(), &mut io::stderr())),
        Job::Status { sock, form } => ended(remote::status(&sock, form, &mut io::stdout(), &mut io::stderr())),
        Job::Mirror { sock, migration, wait } => {
            let progress = wait.then(|| match verbosity {
                Verbosity::Quiet => ProgressForm::Silent,
                _ if io::stderr().is_terminal() => ProgressForm::Redrawn,
                _ => ProgressForm::Lines,
            });
            ended(remote::mirror(&sock, &migration, progress, &mut io::stdout(), &mut io::stderr()))
        }
    }
}

fn ended(outcome: Result<u8, impl Display>) -> ExitCode {
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            fatal!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// The error is what `clap` wants printed, requested help included.
fn parse(args: Vec<OsString>) -> Result<(Verbosity, Job), clap::Error> {
    let line = match CommandLine::try_parse_from(args) {
        // Options without a mode get the same help on stderr as no arguments at all.
        Err(error) if error.kind() == ErrorKind::MissingSubcommand => return parse(vec![PROGRAM.into()]),
        parsed => parsed.map_err(without_tip)?,
    };
    let (mode, log, job) = match line.mode {
        Mode::Serve(args) => ("serve", args.log, server(args, None)),
        Mode::Listen(ListenArgs { then_serve, serve }) => {
            ("listen", serve.log, server(serve, Some(server::Role::Listen { then_serve })))
        }
        Mode::Mirror(args) => ("mirror", args.log, mirror(args)),
        Mode::MirrorSpeed(MirrorSpeedArgs { sock, max_speed, log }) => (
            "mirror-speed",
            log,
            Ok(Job::Control { sock, words: vec!["mirror_max_bps".into(), max_speed.to_string()] }),
        ),
        Mode::Break(SockArgs { sock, log }) => ("break", log, Ok(Job::Control { sock, words: vec!["break".into()] })),
        Mode::Resize(SockArgs { sock, log }) => {
            ("resize", log, Ok(Job::Control { sock, words: vec!["resize".into()] }))
        }
        Mode::Snapshot(args) => ("snapshot", args.log, snapshot(args)),
        Mode::Proxy(args) => ("proxy", args.log, proxy(args)),
        Mode::Switch(args) => ("switch", args.log, switch(args)),
        Mode::Limit(LimitModeArgs { sock, limit, log }) => {
            ("limit", log, Ok(Job::Control { sock, words: limit_words(limit) }))
        }
        Mode::Acl(args) => ("acl", args.log, replace_acl(args)),
        Mode::Status(StatusArgs { sock, json, prometheus, clients, log }) => {
            let notation = match (json, prometheus) {
                (true, _) => Notation::Json,
                (false, true) => Notation::Prometheus,
                (false, false) => Notation::Pairs,
            };
            ("status", log, Ok(Job::Status { sock, form: StatusForm { notation, clients } }))
        }
        Mode::Read(args) => ("read", args.log, transfer(args).map(Job::Read)),
        Mode::Write(args) => ("write", args.log, transfer(args).map(Job::Write)),
        Mode::Help(HelpArgs { mode, .. }) => {
            let words = [Some(PROGRAM.into()), mode, Some("--help".into())];
            return parse(words.into_iter().flatten().map(OsString::from).collect());
        }
    };
    Ok((verbosity(line.log, log), job.map_err(|why| usage_error(mode, why))?))
}

/// The same for the program that is the mode `proxy` alone.
fn parse_proxy(args: Vec<OsString>) -> Result<(Verbosity, Job), clap::Error> {
    let mut program = args::proxy_program();
    let matches = program.try_get_matches_from_mut(args).map_err(without_tip)?;
    let args = ProxyArgs::from_arg_matches(&matches)?;
    let verbosity = verbosity(args.log, args.log);
    let job = proxy(args).map_err(|why| program.error(ErrorKind::ValueValidation, why))?;
    Ok((verbosity, job))
}

/// The last flag wins. Within each group `clap` keeps only the last one, and those after the mode are the later group.
fn verbosity(before: LogFlags, after: LogFlags) -> Verbosity {
    let last = if after.verbose || after.quiet { after } else { before };
    match last {
        LogFlags { quiet: true, .. } => Verbosity::Quiet,
        LogFlags { verbose: true, .. } => Verbosity::Verbose,
        LogFlags { .. } => Verbosity::Normal,
    }
}

fn server(args: ServeArgs, listens: Option<server::Role>) -> Result<Job, String> {
    if args.adopt && listens.is_some() {
        return Err(
            "--adopt does not go with listen, which takes a new image whatever the old one is; leave it out".into()
        );
    }
    let role = listens.unwrap_or(server::Role::Serve { adopt: args.adopt });
    let image = server::Image {
        file: args.file,
        disk_engine: match args.disk_engine {
            args::Engine::Auto => EngineChoice::Auto,
            args::Engine::Sync => EngineChoice::Sync,
            args::Engine::Ring => EngineChoice::Ring,
        },
        access: match (args.read_only, args.shared_image) {
            (true, _) if listens.is_some() => {
                return Err("--read-only does not go with listen, which writes the image; leave it out".into());
            }
            (true, _) => Access::ReadOnly,
            (false, true) => Access::Shared,
            (false, false) => Access::Alone,
        },
        sync: args.sync,
        role,
        request_limit_ms: request_limit_ms(env::var_os(REQUEST_LIMIT).as_deref())?,
    };
    serving(args.doors, args.access, args.max_clients, args.limit, server::Backing::Image(image))
}

fn proxy(args: ProxyArgs) -> Result<Job, String> {
    let server = address::server(Options::CONN, args.conn_addr, args.conn_port)?;
    let bind = address::bind_for(&server, args.bind.as_deref(), Options::CONN)?;
    let upstream = server::Upstream {
        server,
        bind,
        export: args.export.unwrap_or_default(),
        replay: match args.replay {
            ReplayKind::Dirty => Replay::Dirty,
            ReplayKind::Inflight => Replay::Unanswered,
            ReplayKind::None => Replay::Nothing,
        },
        replay_limit: args.replay_limit,
        read_ahead: args.cache.unwrap_or_default(),
        give_up_ms: Some(args.give_up_ms).filter(|&ms| ms > 0),
        start_timeout_ms: args.start_timeout_ms,
    };
    serving(args.doors, args.access, args.max_clients, args.limit, server::Backing::Upstream(upstream))
}

/// To serve, with what servers of both kinds are told.
fn serving(
    mut doors: DoorArgs,
    access: AccessArgs,
    max_clients: usize,
    limit: LimitArgs,
    backing: server::Backing,
) -> Result<Job, String> {
    let export_name = doors.export_name.take();
    let doors = doors::doors(doors, access.sock, sys::passed::take_passed()?)?;
    let config = server::Config {
        doors: doors.nbd,
        export_name: export_name.unwrap_or_default(),
        control: doors.control,
        acl: Acl::new(access.acl.iter().map(|text| acl_entry(text)).collect::<Result<_, _>>()?, access.default_deny),
        killswitch_ms: access.killswitch_ms,
        max_clients,
        rates: server::Rates {
            requests: limit.max_iops.filter(|&rate| rate > 0),
            bytes: limit.max_bytes_per_second.filter(|&rate| rate > 0),
        },
        upstream_limit_ms: upstream_limit_ms(env::var_os(UPSTREAM_LIMIT).as_deref())?,
        backing,
    };
    Ok(Job::Serve(Box::new(config)))
}

/// The whole seconds of [`UPSTREAM_LIMIT`], in milliseconds.
fn upstream_limit_ms(value: Option<&OsStr>) -> Result<u64, String> {
    value.map_or(Ok(UPSTREAM_LIMIT_MS), |value| {
        let text = value.to_string_lossy();
        if text.contains('.') {
            return Err(invalid(UPSTREAM_LIMIT, &text, "expected whole seconds above 0"));
        }
        values::seconds_to_ms(&text).map_err(|why| invalid(UPSTREAM_LIMIT, &text, why))
    })
}

fn switch(args: SwitchArgs) -> Result<Job, String> {
    let to = address::server(Options::CONN, args.conn_addr, args.conn_port)?;
    Ok(Job::Switch { sock: args.sock, switch: Switch { to, when_lost: args.when_lost }, wait: args.wait })
}

fn request_limit_ms(value: Option<&OsStr>) -> Result<u64, String> {
    value.map_or(Ok(REQUEST_LIMIT_MS), |value| {
        let text = value.to_string_lossy();
        values::seconds_to_ms(&text).map_err(|why| invalid(REQUEST_LIMIT, &text, why))
    })
}

fn mirror(args: MirrorArgs) -> Result<Job, String> {
    if args.addr.starts_with('/') {
        let why = "a migration goes to an IP address; the path of a UNIX socket will not do";
        return Err(invalid(Options::MAIN.addr, &args.addr, why));
    }
    let to = address::server(Options::MAIN, args.addr, Some(args.port))?;
    let bind = address::bind_for(&to, args.bind.as_deref(), Options::MAIN)?;
    let max_speed = args.max_speed.filter(|&speed| speed != 0);
    let action = if args.unlink { "unlink" } else { "exit" };
    let mut words = vec![action.into()];
    // The predecessor's servers know only positional arguments and refuse keywords: send no more than what is needed.
    if bind.is_some() || max_speed.is_some() {
        words.push(bind.map_or_else(|| "0".into(), |bind| bind.to_string()));
    }
    words.extend(max_speed.map(|speed| speed.to_string()));
    words.extend(args.max_pause_ms.map(|ms| format!("max_pause_ms={ms}")));
    words.extend(args.relay.then(|| "relay=yes".into()));
    words.extend(args.export.filter(|name| !name.is_empty()).map(|name| export_keyword(&name)).transpose()?);
    Ok(Job::Mirror { sock: args.sock, migration: Migration { to, bind, words }, wait: args.wait })
}

fn snapshot(args: SnapshotArgs) -> Result<Job, String> {
    let invalid = |why: String| invalid("--to <FILE>", &args.to.to_string_lossy(), why);
    let path = std::path::absolute(&args.to).map_err(|error| invalid(error.to_string()))?;
    let path = path.to_str().filter(|path| is_line(path)).ok_or_else(|| {
        let most = command::LINE_MAX;
        invalid(format!(
            "expected UTF-8, at most {most} bytes from the root, on one line, without white space at its end"
        ))
    })?;
    Ok(Job::Control { sock: args.sock, words: vec!["snapshot".into(), path.into()] })
}

/// True for what arrives as it is sent, as a line of its own.
fn is_line(text: &str) -> bool {
    text.len() <= command::LINE_MAX && text.trim() == text && !text.contains('\n')
}

/// A keyword argument is a line of the control socket, where white space around a line is lost.
fn export_keyword(name: &str) -> Result<String, String> {
    let line = format!("export={name}");
    if is_line(&line) {
        return Ok(line);
    }
    let most = command::LINE_MAX - "export=".len();
    let why = format!("expected at most {most} bytes, on one line, without white space at the end");
    Err(invalid("--export <NAME>", name, why))
}

fn transfer(args: TransferArgs) -> Result<Target, String> {
    let server = address::server(Options::MAIN, args.addr, args.port)?;
    let bind = address::bind_for(&server, args.bind.as_deref(), Options::MAIN)?;
    Ok(Target { server, bind, export: args.export.unwrap_or_default(), offset: args.from, length: args.size })
}

fn limit_words(limit: LimitArgs) -> Vec<String> {
    let requests = limit.max_iops.map(|rate| format!("max_iops={rate}"));
    let bytes = limit.max_bytes_per_second.map(|rate| format!("max_bytes_per_second={rate}"));
    std::iter::once("limit".into()).chain(requests).chain(bytes).collect()
}

fn replace_acl(args: AclArgs) -> Result<Job, String> {
    args.acl.iter().try_for_each(|text| acl_entry(text).map(drop))?;
    // No entry at all would mean what --default-deny says.
    let entries = if args.any { vec!["0.0.0.0/0".into(), "::/0".into()] } else { args.acl };
    Ok(Job::Control { sock: args.sock, words: std::iter::once("acl".into()).chain(entries).collect() })
}

fn usage_error(mode: &str, why: String) -> clap::Error {
    let mut command = CommandLine::command();
    command.build();
    match command.find_subcommand_mut(mode) {
        Some(mode) => mode.error(ErrorKind::ValueValidation, why),
        None => command.error(ErrorKind::ValueValidation, why),
    }
}

/// Without the tip of `clap` to write `-- --OPTION`: that would make an option of another mode an ACL entry.
fn without_tip(mut error: clap::Error) -> clap::Error {
    if error.kind() == ErrorKind::UnknownArgument && error.get(ContextKind::SuggestedArg).is_none() {
        error.remove(ContextKind::Suggested);
    }
    error
}

#[cfg(test)]
mod tests;
