//! Makes the manual pages and shell completions from the definitions with which the program parses its arguments, and what the
//! page of the program explains besides from the README.
//!
//! They go to `target/<profile>/assets`, which `make install` can name, unlike the build script's own folder.

use std::error::Error;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use clap::{Arg, ArgAction, CommandFactory, ValueHint};
use clap_complete::Shell;
use clap_mangen::Man;

#[path = "cli/args/mod.rs"]
mod args;
#[path = "manual.rs"]
mod manual;

/// What of the README the page of the program has: the headings there and here.
const CHAPTERS: [(&str, &str); 4] = [
    ("Which client uses which port", "WHICH CLIENT USES WHICH PORT"),
    ("Control and status", "CONTROL AND STATUS"),
    ("The log", "LOG"),
    ("Exit codes", "EXIT STATUS"),
];

fn main() -> Result<(), Box<dyn Error>> {
    for source in ["src/build.rs", "src/manual.rs", "src/cli/args", "README.md"] {
        println!("cargo::rerun-if-changed={source}");
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let profile = out
        .ancestors()
        .find(|folder| folder.file_name() == Some(OsStr::new("build")))
        .and_then(Path::parent)
        .ok_or("OUT_DIR has no build folder above it")?;
    let assets = profile.join("assets");
    fs::create_dir_all(&assets)?;

    let programs = [args::CommandLine::command(), args::proxy_program()].map(with_hints);
    for program in &programs {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let path = clap_complete::generate_to(shell, &mut program.clone(), program.get_name(), &assets)?;
            // Where nothing fits, bash would offer files: of a port, or of an access control list.
            let script = fs::read_to_string(&path)?.replace(" -o bashdefault -o default", "");
            fs::write(path, script)?;
        }
    }
    let [mut command, mut proxy] = programs;
    command.build();
    proxy.build();
    let readme = fs::read_to_string("README.md")?;
    let chapters: String =
        CHAPTERS.iter().map(|(heading, title)| manual::chapter(&readme, heading, title)).collect::<Result<_, _>>()?;
    let names: Vec<&str> = command.get_subcommands().filter_map(clap::Command::get_display_name).collect();
    // The page of the mode `proxy` has the name of the program, and is the program's.
    let modes = command.get_subcommands().filter(|mode| mode.get_display_name() != Some(args::PROXY_PROGRAM));
    for page in modes.chain([&command, &proxy]) {
        let name = page.get_display_name().unwrap_or(page.get_name());
        let explained = if page.has_subcommands() { &chapters } else { EXIT_STATUS };
        let others = names.iter().copied().chain(["flexnbd"]).filter(|other| *other != name);
        fs::write(assets.join(format!("{name}.1")), manual_page(page, explained, others)?)?;
    }
    Ok(())
}

/// The same with what a shell is to offer for values: files where there may be a path, and nothing for a port. The program does
/// without.
fn with_hints(command: clap::Command) -> clap::Command {
    let name = command.get_name().to_owned();
    let hinted = command.mut_args(|arg| {
        // A migration does not go to a UNIX socket.
        let is_address = ["addr", "conn_addr"].iter().any(|id| arg.get_id() == *id) && name != "mirror";
        let is_path = arg.get_value_hint() == ValueHint::AnyPath;
        let is_free = arg.get_action().takes_values() && arg.get_possible_values().is_empty();
        match (is_address || is_path, is_free) {
            (true, _) => arg.value_hint(ValueHint::FilePath),
            (false, true) => arg.value_hint(ValueHint::Other),
            (false, false) => arg,
        }
    });
    hinted.mut_subcommands(with_hints)
}

/// What a page of a mode says of exit codes.
const EXIT_STATUS: &str = "\
.SH EXIT STATUS
.TP
\\fB0\\fR
What was asked for is done, or the server has stopped as it should.
.TP
\\fB1\\fR
It failed, and one line on stderr says why; of a mode with a control socket, the server has refused it.
.TP
\\fB2\\fR
Wrong usage; nothing was started.
.P
flexnbd(1) has the rest of them, and explains the log, the status and the control socket.
";

/// The manual page of a mode, or of the program: `explained` is what follows its options. The notes behind the options keep
/// their line breaks.
fn manual_page<'a>(
    command: &clap::Command,
    explained: &str,
    others: impl Iterator<Item = &'a str>,
) -> std::io::Result<Vec<u8>> {
    let notes = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    // Without a date a page is the same in every build; an empty date would be replaced by the source.
    let man = Man::new(command.clone().after_help("")).date(" ").source(concat!("flexnbd ", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    page.extend(synopsis(command).bytes());
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let paragraphs: Vec<&str> = notes.split("\n\n").collect();
    let is_example = |paragraph: &&str| paragraph.starts_with("Example");
    // The page of the program has them in full.
    let is_exit = |paragraph: &&str| paragraph.starts_with("Exit codes:") || paragraph.starts_with("The exit code of");
    let is_environment = |paragraph: &&str| paragraph.starts_with("Environment:");
    let is_note = |paragraph: &&str| !is_example(paragraph) && !is_exit(paragraph) && !is_environment(paragraph);
    let of = |wanted: &dyn Fn(&&str) -> bool| paragraphs.iter().copied().filter(|one| wanted(one)).collect::<Vec<_>>();
    let environment = of(&is_environment).join("\n").replace("Environment:\n", "");
    for (title, text) in
        [("NOTES", of(&is_note).join("\n\n")), ("ENVIRONMENT", environment), ("EXAMPLES", of(&is_example).join("\n\n"))]
    {
        if !text.is_empty() {
            page.extend(manual::verbatim(title, &text).bytes());
        }
    }
    page.extend(explained.bytes());
    let others: Vec<_> =
        others.map(|name| format!("{name}(1)")).chain(["nbd-client(8)".into(), "nbdinfo(1)".into()]).collect();
    page.extend(format!(".SH SEE ALSO\n{}\n", manual::escape(&others.join(", "))).bytes());
    Ok(page)
}

/// All options with their values, those that may be left out in brackets.
fn synopsis(command: &clap::Command) -> String {
    let mut text =
        format!(".SH SYNOPSIS\n\\fB{}\\fR", manual::escape(command.get_bin_name().unwrap_or(command.get_name())));
    let args =
        command.get_arguments().filter(|arg| !arg.is_hide_set() && arg.get_id() != "help" && arg.get_id() != "version");
    let (positional, options): (Vec<&Arg>, Vec<&Arg>) = args.partition(|arg| arg.is_positional());
    for arg in options.into_iter().chain(positional) {
        let mut words =
            arg.get_long().map(|long| format!("\\fB{}\\fR", manual::escape(&format!("--{long}")))).unwrap_or_default();
        if arg.get_action().takes_values() {
            let value = arg.get_value_names().and_then(|names| names.first()).map_or("VALUE", |name| name.as_str());
            let shown = match (arg.is_positional(), arg.get_num_args().is_some_and(|number| number.min_values() == 0)) {
                (true, _) => format!("\\fI{value}\\fR"),
                (false, true) => format!("[=\\fI{value}\\fR]"),
                (false, false) => format!(" \\fI{value}\\fR"),
            };
            words.push_str(&shown);
        }
        let many = if arg.is_positional() && matches!(arg.get_action(), ArgAction::Append) { " ..." } else { "" };
        let (open, close) = if arg.is_required_set() { ("", "") } else { ("[", "]") };
        text.extend([" ", open, &words, close, many]);
    }
    if command.has_subcommands() {
        text += " \\fIMODE\\fR ...";
    }
    text + "\n"
}
