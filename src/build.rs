//! Makes the manual pages and shell completions from the definitions with which the program parses its arguments.
//!
//! They go to `target/<profile>/assets`, which `make install` can name, unlike the build script's own folder.

use std::error::Error;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

#[path = "cli/args/mod.rs"]
mod args;

fn main() -> Result<(), Box<dyn Error>> {
    for source in ["src/build.rs", "src/cli/args"] {
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

    let programs = [args::CommandLine::command(), args::proxy_program()];
    for program in &programs {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            clap_complete::generate_to(shell, &mut program.clone(), program.get_name(), &assets)?;
        }
    }
    let [mut command, mut proxy] = programs;
    command.build();
    proxy.build();
    // The page of the mode `proxy` has the name of the program, and is the program's.
    let modes = command.get_subcommands().filter(|mode| mode.get_display_name() != Some(args::PROXY_PROGRAM));
    for page in modes.chain([&command, &proxy]) {
        let name = page.get_display_name().unwrap_or(page.get_name());
        fs::write(assets.join(format!("{name}.1")), manual_page(page)?)?;
    }
    Ok(())
}

/// The manual page of a mode, or of the program. The notes behind the options keep their line breaks.
fn manual_page(command: &clap::Command) -> std::io::Result<Vec<u8>> {
    let notes = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    // Without a date a page is the same in every build; an empty date would be replaced by the source.
    let man = Man::new(command.clone().after_help("")).date(" ").source(concat!("flexnbd ", env!("CARGO_PKG_VERSION")));
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    page.extend(b".SH NOTES\n.nf\n");
    for line in notes.lines() {
        // To the formatter, a backslash means something, and so does a period or quote at the beginning of a line.
        page.extend(format!("\\&{}\n", line.replace('\\', "\\e").replace('-', "\\-")).bytes());
    }
    page.extend(b".fi\n");
    Ok(page)
}
