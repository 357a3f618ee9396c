//! What comes with the program for people at a terminal: manual pages and completions.

use crate::support::{has, peers, program, run_command, Need, Server, TempDir, BIN};
use std::fs;
use std::path::{Path, PathBuf};

fn assets() -> PathBuf {
    Path::new(BIN).with_file_name("assets")
}

/// A page as the formatter shows it, on one line, so that it does not matter where lines break.
fn shown(name: &str) -> Option<String> {
    if !has(&[Need::Program("man")]) {
        return None;
    }
    let mut command = program("man");
    command.args(["--warnings", "-E", "ascii", "--no-hyphenation", "--no-justification", "-l"]);
    let output = run_command(command.arg(assets().join(format!("{name}.1"))).env("MANWIDTH", "200"), &[]);
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{name}");
    let text = String::from_utf8(output.stdout).unwrap();
    Some(text.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[test]
fn each_page_has_what_one_looks_for() {
    let pages = fs::read_dir(assets()).unwrap().map(|entry| entry.unwrap().path());
    let pages: Vec<_> = pages.filter(|path| path.extension().is_some_and(|extension| extension == "1")).collect();
    assert!(pages.len() >= 13, "{pages:?}");
    for path in pages {
        let text = fs::read_to_string(&path).unwrap();
        let is_program = path.ends_with("flexnbd.1");
        for section in ["SYNOPSIS", "EXIT STATUS", "SEE ALSO", if is_program { "LOG" } else { "EXAMPLES" }] {
            assert_eq!(text.matches(&format!(".SH {section}\n")).count(), 1, "{section} in {}", path.display());
        }
    }
    let Some(serve) = shown("flexnbd-serve") else { return };
    let synopsis = "SYNOPSIS flexnbd serve --file FILE [--addr ADDR] [--port PORT] ";
    assert!(serve.contains(synopsis) && serve.contains("[--killswitch[=SECONDS]]"), "{serve}");
    assert!(serve.contains("[ACL_ENTRY] ... "), "{serve}");
    assert!(
        serve.contains("ENVIRONMENT FLEXNBD_MS_REQUEST_LIMIT_SECS ") && serve.contains("flexnbd-listen(1), "),
        "{serve}"
    );
}

/// The page of the program names all there is in a status, and explains the rest that goes for all modes.
#[test]
fn the_page_of_the_program_explains_what_all_modes_share() {
    let Some(page) = shown("flexnbd") else { return };
    for words in [
        "<TIMESTAMP>:<LEVEL>:<PID> <THREAD> <SOURCEFILE:SOURCELINE>: <MSG>",
        "A control socket takes one command per connection",
        "nbd-client since 3.10 (the Linux kernel) oldstyle port: no; newstyle port: yes",
        "2 wrong usage; nothing was started",
    ] {
        assert!(page.contains(words), "{words:?} is not in {page}");
    }
    let server = Server::serve().size(4 << 20).args("--newstyle-port 0 --newstyle-sock new").start();
    let destination = peers::listen(0).size(4 << 20).start();
    assert_eq!(server.connect().write(0, &vec![1; 4 << 20]), 0);
    peers::start_mirror(&server, destination.address(), "--max-speed 1k");
    let proxy = Server::proxy(server.address()).start();
    for status in [server.control("status\nclients\n\n"), proxy.control("status\n\n")] {
        let pairs = status.strip_prefix("0: ").unwrap().split_whitespace();
        for key in pairs.map(|pair| pair.split_once('=').unwrap().0) {
            let is_named = page.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|word| word == key);
            assert!(is_named, "{key} of {status} is not explained");
        }
    }
}

/// What bash offers for the last of these words, and what it is told of them.
fn completed(dir: &TempDir, words: &[&str]) -> Vec<String> {
    let script = format!(
        r#"source {}/flexnbd.bash
        compopt() {{ echo "compopt $*"; }}
        COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        _flexnbd flexnbd "${{@: -1}}" "${{@: -2:1}}"
        printf '%s\n' "${{COMPREPLY[@]}}""#,
        assets().display()
    );
    let mut command = program("bash");
    let output = run_command(command.args(["-c", &script, "bash"]).args(words).current_dir(dir.join("")), &[]);
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{words:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn bash_offers_files_where_files_go() {
    if !has(&[Need::Program("bash")]) {
        return;
    }
    let dir = TempDir::new();
    fs::create_dir(dir.join("imgs")).unwrap();
    for name in ["imgs/a disk", "imgs/other", "4777"] {
        fs::write(dir.join(name), "").unwrap();
    }
    // With that option bash quotes names, and goes on after a folder.
    let files = "compopt -o filenames";
    for option in ["--file", "-f", "--sock", "-s", "--newstyle-sock", "--addr"] {
        assert_eq!(completed(&dir, &["flexnbd", "serve", option, "im"]), [files, "imgs"], "{option}");
        assert_eq!(completed(&dir, &["flexnbd", "serve", option, "imgs/a"]), [files, "imgs/a disk"], "{option}");
    }
    for option in ["--port", "-p", "--newstyle-port", "--max-clients"] {
        assert_eq!(completed(&dir, &["flexnbd", "serve", option, "47"]), ["compopt -o nospace", "47"], "{option}");
    }
    assert_eq!(completed(&dir, &["flexnbd", "serve", "--file", "imgs/other", "im"]), [""], "no list of files");
    assert_eq!(completed(&dir, &["flexnbd", "mir"]), ["mirror", "mirror-speed"]);
    for name in ["flexnbd", "flexnbd-proxy"] {
        let script = fs::read_to_string(assets().join(format!("{name}.bash"))).unwrap();
        assert!(script.contains("complete -F") && !script.contains("-o default"), "{script}");
    }
}
