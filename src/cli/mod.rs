//! The command line: raw arguments -> checked configuration -> the mode's entry point -> exit code.
//!
//! `args` defines the options. This file checks what `clap` cannot judge, such as addresses, and the environment,
//! before anything starts. Whatever is wrong there is a usage error with exit code 2, like `clap`'s own. An error of the
//! mode itself is one `F` line and exit code 1.

mod args;

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io::{self, IsTerminal};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use crate::acl::{self, Acl};
use crate::command;
use crate::disk::{Access, EngineChoice};
use crate::endpoint::Endpoint;
use crate::logging::{self, fatal, Verbosity};
use crate::proto::wire;
use crate::remote::{self, ProgressForm, Target};
use crate::server;
use args::{
    AclArgs, CommandLine, HelpArgs, ListenArgs, LogFlags, MirrorArgs, MirrorSpeedArgs, Mode, ServeArgs, SockArgs,
    StatusArgs, TransferArgs,
};

/// Fills the place of the program's name in a command line that is made here; help shows the one in [`args`].
const PROGRAM: &str = "flexnbd";
/// The environment variable with the longest time a migration goes on without progress, in decimal seconds.
const REQUEST_LIMIT: &str = "FLEXNBD_MS_REQUEST_LIMIT_SECS";
/// The default of [`REQUEST_LIMIT`], in milliseconds: that of the predecessor.
const REQUEST_LIMIT_MS: u64 = 60_000;

// `args` imports nothing of the project, because the build script includes it.
const _: () = assert!(args::EXPORT_MAX == wire::STRING_MAX, "the longest name of an export");
const _: () = assert!(args::PAUSE_MAX_MS == command::PAUSE_MAX_MS, "the longest pause a server accepts");
const _: () = assert!(command::LINE_MAX <= wire::STRING_MAX, "a name that fits a command's line is not too long");

/// What a command line asks for, checked.
#[derive(Debug)]
enum Job {
    Serve(server::Config),
    Read(Target),
    Write(Target),
    Control { sock: PathBuf, words: Vec<String> },
    Status { sock: PathBuf, json: bool, clients: bool },
    Mirror { sock: PathBuf, words: Vec<String>, wait: bool },
}

/// Does what the arguments ask for, the first of which is the program's name, and returns the exit code: 0 for a clean
/// stop, 1 for an abnormal end, 2 for wrong usage; in a control mode, the code of the server's answer.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match parse(args) {
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

fn perform(job: Job, verbosity: Verbosity) -> ExitCode {
    match job {
        Job::Serve(config) => ended(server::serve(config).map(|()| 0)),
        Job::Read(target) => ended(remote::read(&target, &mut io::stdout()).map(|()| 0)),
        Job::Write(target) => ended(remote::write(&target).map(|()| 0)),
        Job::Control { sock, words } => ended(remote::control(&sock, &words, &mut io::stdout(), &mut io::stderr())),
        Job::Status { sock, json, clients } => {
            ended(remote::status(&sock, json, clients, &mut io::stdout(), &mut io::stderr()))
        }
        Job::Mirror { sock, words, wait } => {
            let progress = wait.then(|| match verbosity {
                Verbosity::Quiet => ProgressForm::Silent,
                _ if io::stderr().is_terminal() => ProgressForm::Redrawn,
                _ => ProgressForm::Lines,
            });
            ended(remote::mirror(&sock, &words, progress, &mut io::stdout(), &mut io::stderr()))
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
fn parse(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<(Verbosity, Job), clap::Error> {
    let line = match CommandLine::try_parse_from(args) {
        // Options without a mode get the same help on stderr as no arguments at all.
        Err(error) if error.kind() == ErrorKind::MissingSubcommand => return parse([PROGRAM]),
        parsed => parsed?,
    };
    let (mode, log, job) = match line.mode {
        Mode::Serve(args) => ("serve", args.log, server(args, server::Role::Serve)),
        Mode::Listen(ListenArgs { then_serve, serve }) => {
            ("listen", serve.log, server(serve, server::Role::Listen { then_serve }))
        }
        Mode::Mirror(args) => ("mirror", args.log, mirror(args)),
        Mode::MirrorSpeed(MirrorSpeedArgs { sock, max_speed, log }) => (
            "mirror-speed",
            log,
            Ok(Job::Control { sock, words: vec!["mirror_max_bps".into(), max_speed.to_string()] }),
        ),
        Mode::Break(SockArgs { sock, log }) => ("break", log, Ok(Job::Control { sock, words: vec!["break".into()] })),
        Mode::Acl(args) => ("acl", args.log, replace_acl(args)),
        Mode::Status(StatusArgs { sock, json, clients, log }) => {
            ("status", log, Ok(Job::Status { sock, json, clients }))
        }
        Mode::Read(args) => ("read", args.log, transfer(args).map(Job::Read)),
        Mode::Write(args) => ("write", args.log, transfer(args).map(Job::Write)),
        Mode::Help(HelpArgs { mode: Some(mode), .. }) => return parse([PROGRAM, &mode, "--help"]),
        Mode::Help(HelpArgs { mode: None, .. }) => return parse([PROGRAM, "--help"]),
    };
    Ok((verbosity(line.log, log), job.map_err(|why| usage_error(mode, why))?))
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

fn server(args: ServeArgs, role: server::Role) -> Result<Job, String> {
    let listen = endpoint(args.addr, args.port)?;
    Ok(Job::Serve(server::Config {
        newstyle: newstyle(&listen, args.newstyle_port, args.newstyle_sock)?,
        listen,
        file: args.file,
        disk_engine: match args.disk_engine {
            args::Engine::Auto => EngineChoice::Auto,
            args::Engine::Sync => EngineChoice::Sync,
            args::Engine::Ring => EngineChoice::Ring,
        },
        control: args.sock,
        access: match (args.read_only, args.shared_image) {
            (true, _) if role != server::Role::Serve => {
                return Err("--read-only does not go with listen, which writes the image; leave it out".into());
            }
            (true, _) => Access::ReadOnly,
            (false, true) => Access::Shared,
            (false, false) => Access::Alone,
        },
        acl: Acl::new(args.acl.iter().map(|text| acl_entry(text)).collect::<Result<_, _>>()?, args.default_deny),
        killswitch_ms: args.killswitch_ms,
        max_clients: args.max_clients,
        sync: args.sync,
        role,
        request_limit_ms: request_limit_ms(env::var_os(REQUEST_LIMIT).as_deref())?,
    }))
}

/// Where newstyle clients connect, beside the main `listen`.
fn newstyle(listen: &Endpoint, port: Option<u16>, sock: Option<PathBuf>) -> Result<Vec<Endpoint>, String> {
    let tcp = match (port, listen) {
        (None, _) => None,
        (Some(_), Endpoint::Unix(_)) => {
            return Err("--newstyle-port <PORT> needs an IP address as --addr <ADDR>; for a UNIX socket there is \
                        --newstyle-sock <PATH>"
                .into());
        }
        (Some(port @ 1..), Endpoint::Tcp(addr)) if port == addr.port() => {
            return Err(invalid("--newstyle-port <PORT>", &port.to_string(), "this is --port <PORT>, for oldstyle"));
        }
        (Some(port), Endpoint::Tcp(addr)) => Some(Endpoint::Tcp(SocketAddr::new(addr.ip(), port))),
    };
    Ok(tcp.into_iter().chain(sock.map(Endpoint::Unix)).collect())
}

fn request_limit_ms(value: Option<&OsStr>) -> Result<u64, String> {
    value.map_or(Ok(REQUEST_LIMIT_MS), |value| {
        let text = value.to_string_lossy();
        args::seconds_to_ms(&text).map_err(|why| invalid(REQUEST_LIMIT, &text, why))
    })
}

fn mirror(args: MirrorArgs) -> Result<Job, String> {
    let addr = ip("--addr <ADDR>", &args.addr)?;
    let bind = local_address(args.bind.as_deref())?;
    bind.map_or(Ok(()), |bind| check_reach(bind, addr))?;
    let max_speed = args.max_speed.filter(|&speed| speed != 0);
    let action = if args.unlink { "unlink" } else { "exit" };
    let mut words = vec!["mirror".into(), addr.to_string(), args.port.to_string(), action.into()];
    // The predecessor's servers know only positional arguments and refuse keywords: send no more than what is needed.
    if bind.is_some() || max_speed.is_some() {
        words.push(bind.map_or_else(|| "0".into(), |bind| bind.to_string()));
    }
    words.extend(max_speed.map(|speed| speed.to_string()));
    words.extend(args.max_pause_ms.map(|ms| format!("max_pause_ms={ms}")));
    words.extend(args.export.filter(|name| !name.is_empty()).map(|name| export_keyword(&name)).transpose()?);
    Ok(Job::Mirror { sock: args.sock, words, wait: args.wait })
}

/// A keyword argument is a line of the control socket, where white space around a line is lost.
fn export_keyword(name: &str) -> Result<String, String> {
    let line = format!("export={name}");
    if line.len() <= command::LINE_MAX && name.trim_end() == name && !name.contains('\n') {
        return Ok(line);
    }
    let most = command::LINE_MAX - "export=".len();
    let why = format!("expected at most {most} bytes, on one line, without white space at the end");
    Err(invalid("--export <NAME>", name, why))
}

fn transfer(args: TransferArgs) -> Result<Target, String> {
    let server = endpoint(args.addr, args.port)?;
    let bind = local_address(args.bind.as_deref())?;
    match (&server, bind) {
        (Endpoint::Unix(_), Some(_)) => {
            return Err("--bind <BIND_ADDR> does not go with a UNIX socket; leave it out".into());
        }
        (Endpoint::Tcp(remote), Some(bind)) => check_reach(bind, remote.ip())?,
        (_, None) => {}
    }
    Ok(Target { server, bind, export: args.export.unwrap_or_default(), offset: args.from, length: args.size })
}

fn local_address(bind: Option<&str>) -> Result<Option<IpAddr>, String> {
    bind.map(|text| ip("--bind <BIND_ADDR>", text)).transpose()
}

fn check_reach(local: IpAddr, remote: IpAddr) -> Result<(), String> {
    if local.is_ipv4() == remote.is_ipv4() {
        return Ok(());
    }
    Err(format!("--bind {local} cannot reach --addr {remote}; both must be IPv4 or both IPv6"))
}

fn replace_acl(args: AclArgs) -> Result<Job, String> {
    args.acl.iter().try_for_each(|text| acl_entry(text).map(drop))?;
    Ok(Job::Control { sock: args.sock, words: std::iter::once("acl".into()).chain(args.acl).collect() })
}

fn endpoint(addr: String, port: Option<u16>) -> Result<Endpoint, String> {
    if addr.starts_with('/') {
        return Ok(Endpoint::Unix(addr.into()));
    }
    let ip = ip("--addr <ADDR>", &addr)?;
    let port = port.ok_or("--port <PORT> is required, unless --addr <ADDR> is the path of a UNIX socket")?;
    Ok(Endpoint::Tcp(SocketAddr::new(ip, port)))
}

fn ip(option: &str, text: &str) -> Result<IpAddr, String> {
    acl::parse_ip(text).map_err(|why| invalid(option, text, why))
}

fn acl_entry(text: &str) -> Result<acl::Entry, String> {
    text.parse().map_err(|why| invalid("[ACL_ENTRY]", text, why))
}

/// In the words of `clap`'s own errors.
fn invalid(option: &str, value: &str, why: impl Display) -> String {
    format!("invalid value '{value}' for '{option}': {why}")
}

fn usage_error(mode: &str, why: String) -> clap::Error {
    let mut command = CommandLine::command();
    command.build();
    command.find_subcommand(mode).cloned().unwrap_or(command).error(ErrorKind::ValueValidation, why)
}

#[cfg(test)]
mod tests;
