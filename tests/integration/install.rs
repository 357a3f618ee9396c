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

#[test]
fn what_is_installed_is_all_there_and_is_removed_again() {
    if !has(&[Need::Program("make")]) {
        return;
    }
    let dir = TempDir::new();
    let built = Path::new(BIN).parent().unwrap().to_str().unwrap();
    let make = |what: &str| {
        let root = dir.join("");
        let (root, built) = (format!("DESTDIR={}", root.to_str().unwrap()), format!("RELEASE={built}"));
        // The program is taken as it is, whatever its sources.
        must("make", &["-C", env!("CARGO_MANIFEST_DIR"), "-o", BIN, what, "PREFIX=/usr", &root, &built]);
    };
    make("install");
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
    make("install");
    fs::write(dir.join("usr/share/man/man1/flexnbd-other.1"), "").unwrap();
    make("uninstall");
    let left: Vec<String> = installed(&dir.join("")).into_iter().collect();
    assert_eq!(left, ["usr/share/man/man1/flexnbd-other.1"]);
}
