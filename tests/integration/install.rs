//! `make install` and `make uninstall`, with the program that the tests run and the files that were built with it.

use crate::support::{has, must, program, run_command, Need, TempDir, BIN};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The paths of all files below a folder.
fn files(folder: &Path, below: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{below}{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            files(&entry.path(), &format!("{path}/"), found);
        } else {
            found.insert(path);
        }
    }
}

fn installed(root: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    files(root, "", &mut found);
    found
}

/// Runs `make` for what was built with the tests, below this folder; returns what it printed.
pub fn make(dir: &TempDir, what: &str, more: &[&str]) -> String {
    let built = Path::new(BIN).parent().unwrap().to_str().unwrap();
    let root = dir.join("");
    let (root, built) = (format!("DESTDIR={}", root.to_str().unwrap()), format!("RELEASE={built}"));
    // The program is taken as it is, whatever its sources.
    let args = ["-s", "-C", env!("CARGO_MANIFEST_DIR"), "-o", BIN, what, "PREFIX=/usr", &root, &built];
    must("make", &[&args, more].concat())
}

/// `make` says in one line what it cannot do without.
#[test]
fn without_a_compiler_it_says_what_to_install() {
    if !has(&[Need::Program("make")]) {
        return;
    }
    let dir = TempDir::new();
    let built = format!("RELEASE={}", dir.join("release").display());
    for target in ["all", "install", "test", "check"] {
        let args =
            ["-s", "-C", env!("CARGO_MANIFEST_DIR"), "CARGO=no-such-cargo", "-o", "tools", "-o", "tools-fuzz", &built];
        let output = run_command(program("make").args(args).arg(target), &[]);
        let first = output.stderr.lines().next().unwrap_or_default();
        assert!(
            output.code == Some(2) && first.starts_with("error: there is no no-such-cargo: install Rust 1.85"),
            "{output:?}"
        );
    }
    assert!(!dir.join("release").exists());
}

#[test]
fn what_is_installed_is_all_there_and_is_removed_again() {
    if !has(&[Need::Program("make")]) {
        return;
    }
    let dir = TempDir::new();
    make(&dir, "install", &[]);
    let found = installed(&dir.join(""));
    let modes = must(BIN, &["--help"]);
    let modes = modes.lines().skip_while(|line| *line != "Modes:").skip(1).take_while(|line| !line.is_empty());
    let pages = modes.map(|line| format!("flexnbd-{}", line.split_whitespace().next().unwrap()));
    let mut expected: BTreeSet<String> =
        pages.chain(["flexnbd".into()]).map(|page| format!("usr/share/man/man1/{page}.1")).collect();
    for name in ["flexnbd", "flexnbd-proxy"] {
        expected.insert(format!("usr/bin/{name}"));
        expected.insert(format!("usr/share/bash-completion/completions/{name}"));
        expected.insert(format!("usr/share/zsh/site-functions/_{name}"));
        expected.insert(format!("usr/share/fish/vendor_completions.d/{name}.fish"));
    }
    for unit in fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/dist")).unwrap() {
        let name = unit.unwrap().file_name().into_string().unwrap();
        if [".service", ".socket", ".timer"].iter().any(|kind| name.ends_with(kind)) {
            expected.insert(format!("usr/lib/systemd/system/{name}"));
        }
    }
    expected.insert("usr/lib/sysusers.d/flexnbd.conf".into());
    assert_eq!(found, expected);

    let link = dir.join("usr/bin/flexnbd-proxy");
    assert_eq!(fs::read_link(&link).unwrap(), Path::new("flexnbd"));
    let help = run_command(program(&link).arg("--help"), &[]);
    assert!(String::from_utf8_lossy(&help.stdout).contains("Usage: flexnbd-proxy --conn-addr"), "{help:?}");
    let page = fs::read_to_string(dir.join("usr/share/man/man1/flexnbd-proxy.1")).unwrap();
    assert!(page.contains("\n.SH SYNOPSIS\n\\fBflexnbd\\-proxy\\fR "), "{page}");
    for (completion, knows) in [
        ("bash-completion/completions/flexnbd-proxy", "--conn-addr"),
        ("zsh/site-functions/_flexnbd-proxy", "#compdef flexnbd-proxy"),
        ("fish/vendor_completions.d/flexnbd-proxy.fish", "complete -c flexnbd-proxy"),
    ] {
        let text = fs::read_to_string(dir.join("usr/share").join(completion)).unwrap();
        assert!(text.contains(knows), "{completion}: {text}");
    }

    // A second time is as good as once, and the page of another program stays.
    make(&dir, "install", &[]);
    fs::write(dir.join("usr/share/man/man1/flexnbd-other.1"), "").unwrap();
    make(&dir, "uninstall", &[]);
    let left: Vec<String> = installed(&dir.join("")).into_iter().collect();
    assert_eq!(left, ["usr/share/man/man1/flexnbd-other.1"]);
}
