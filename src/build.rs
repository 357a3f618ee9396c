//! Makes the manual pages and shell completions from the definitions the program itself parses with.
//!
//! They land in `target/<profile>/assets`, a place `make install` can name, unlike the build script's own folder.

use std::error::Error;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

#[path = "cli/args.rs"]
mod args;

fn main() -> Result<(), Box<dyn Error>> {
    for source in ["src/build.rs", "src/cli/args.rs"] {
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

    let mut command = args::CommandLine::command();
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command.clone(), "flexnbd", &assets)?;
    }
    command.build();
    for page in command.get_subcommands().chain([&command]) {
        // A page without a date is the same in every build; an empty date would let the source take its place.
        Man::new(page.clone()).date(" ").source(concat!("flexnbd ", env!("CARGO_PKG_VERSION"))).generate_to(&assets)?;
    }
    Ok(())
}
