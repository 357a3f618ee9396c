//! The command line: help in every form, and every wrong usage, which starts nothing and exits 2.

use crate::support::{run, TempDir};
use std::fs;

/// Exit code 2, something about it on stderr, nothing on stdout.
#[track_caller]
fn wrong(line: &str, named: &str) {
    // A lone `''` stands for an empty argument.
    let words: Vec<_> = line.split_whitespace().map(|word| if word == "''" { "" } else { word }).collect();
    let output = run(&words, &[]);
    assert_eq!((output.code, output.stdout.len()), (Some(2), 0), "{line}: {output:?}");
    assert!(output.stderr.contains(named), "{line}: {named:?} is not in {}", output.stderr);
}

#[test]
fn help_in_every_form() {
    for mode in ["serve", "read", "write", "acl", "status", "help"] {
        let texts =
            [vec![mode, "--help"], vec![mode, "-h"], vec!["help", mode], vec!["help", mode, "-v"]].map(|args| {
                let output = run(&args, &[]);
                assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{args:?}");
                String::from_utf8(output.stdout).unwrap()
            });
        assert!(texts.iter().all(|text| *text == texts[0]), "{mode}: all the same");
        assert!(texts[0].contains(&format!("flexnbd {mode}")), "{}", texts[0]);
        assert!(texts[0].lines().all(|line| line.len() <= 100), "{}", texts[0]);
    }
    let general = [&["help"][..], &["--help"], &["-h"], &["help", "--quiet"]].map(|args| run(args, &[]));
    for output in &general {
        assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""));
        assert_eq!(output.stdout, general[0].stdout);
    }
    let text = String::from_utf8_lossy(&general[0].stdout).into_owned();
    for word in
        ["serve", "read", "write", "acl", "status", "help", "Exit codes", "--verbose", "--quiet", "abnormally", "usage"]
    {
        assert!(text.contains(word), "no {word} in {text}");
    }
    for (mode, options) in [
        ("serve", "--addr -l --port -p --file -f --sock -s --default-deny -d --killswitch -k --max-clients 100 120 --verbose -v --quiet -q --help -h"),
        ("read", "--addr -l --port -p --from -F --size -S --bind -b 2^62 2^30 --verbose --quiet"),
        ("write", "--addr -l --port -p --from -F --size -S --bind -b"),
        ("acl", "--sock -s"),
        ("status", "--sock -s"),
    ] {
        let text = String::from_utf8(run(&["help", mode], &[]).stdout).unwrap();
        for option in options.split(' ') {
            assert!(text.contains(option), "no {option} in {text}");
        }
    }
}

#[test]
fn wrong_usage_of_everything() {
    wrong("", "Usage");
    wrong("-v", "Usage");
    wrong("nonsense", "nonsense");
    wrong("help nonsense", "nonsense");
    wrong("--nonsense", "--nonsense");
    wrong("status", "--sock");
    wrong("status --sock", "--sock");
    wrong("status --sock a --sock b", "--sock");
    wrong("status --sock a extra", "extra");
    wrong("acl --sock a", "ACL_ENTRY");
    wrong("acl --sock a nonsense", "nonsense");
    wrong("acl 10.0.0.1", "--sock");
}

#[test]
fn wrong_usage_of_serve() {
    // It would be served if it were not for the usage.
    let dir = TempDir::new();
    let (image, sock) = (dir.join("image"), dir.join("control"));
    fs::write(&image, [0; 512]).unwrap();
    let (image, sock) = (image.to_str().unwrap(), sock.to_str().unwrap());
    let base = format!("serve --file {image} --sock {sock}");
    wrong(&base, "--addr");
    wrong(&format!("{base} -l 127.0.0.1"), "--port");
    wrong(&format!("{base} -p 0"), "--addr");
    wrong(&format!("{base} --newstyle-sock {sock}"), "are both");
    wrong("serve -l 127.0.0.1 -p 0", "--file");
    let base = format!("{base} -l 127.0.0.1");
    for port in ["65536", "-1", "''", "x", "1.5", "+1", "0x10", "99999999999999999999", "1e3"] {
        wrong(&format!("{base} -p {port}"), "--port");
    }
    let base = format!("{base} -p 0");
    for option in
        ["--port 1", "--addr ::1", "--file x", "--sock y", "--unknown", "-z", "--unlink", "--from 0", "--bind ::1"]
    {
        wrong(&format!("{base} {option}"), option.split(' ').next().unwrap());
    }
    for clients in ["0", "-1", "''", "x", "1.5", "99999999999999999999"] {
        wrong(&format!("{base} --max-clients {clients}"), "--max-clients");
    }
    for seconds in ["0", "-1", "x", "''", "1e9999", "nan", "inf", "-0.5", "1:30"] {
        wrong(&format!("{base} --killswitch={}", seconds.trim_matches('\'')), "--killswitch");
    }
    for entry in [
        "10.0.0.0/33",
        "10.0.0.0/",
        "::/129",
        "10.0.0",
        "10.0.0.256",
        "nonsense",
        "''",
        "fe80::1%lo",
        "10.0.0.0/8/8",
        "1.2.3.4:5",
    ] {
        wrong(&format!("{base} 127.0.0.1 {entry}"), entry.trim_matches('\''));
    }
    for addr in [
        "''",
        "nonsense",
        "1.2.3",
        "1.2.3.4.5",
        "256.0.0.1",
        "[127.0.0.1]",
        "[::1",
        "::1]",
        "[]",
        "1.2.3.4:80",
        "00",
        "relative/path",
    ] {
        wrong(&format!("serve -f {image} -s {sock} -p 0 -l {addr}"), "--addr");
    }
    assert!(!fs::exists(sock).unwrap(), "nothing was started");
}

/// What people type, and what they are told to write instead.
#[test]
fn wrong_usage_is_told_what_is_right() {
    for (line, told) in [
        ("serve -f x -p 1 -l 127.0.0.1:4777", "the port goes to --port <PORT>"),
        ("serve -f x -p 1 -l ./x.sock", "the path of a UNIX socket begins with '/'"),
        ("serve -f x -p 1 -l nbd://127.0.0.1:4777", "not an address but a URI"),
        ("serve -f x -p 1 -l vm1.example.org", "expected an IP address of this machine"),
        ("serve -f x -p 1 -l ::1 -k 30", "stands behind '=', as in --killswitch=30"),
        ("serve -f x -p 1 -l ::1 /srv/second.img", "another file needs a server of its own"),
        ("listen -f x -p 1 -l ::1 vm1.example.org", "names are not looked up here"),
        ("serve -f x -p 1 -l ::1 127.0.0.1:4777", "an entry has no port"),
        ("read -l vm1:4777 -p 1 -F 0 -S 1", "the port goes to --port <PORT>"),
        ("write -l * -p 1 -F 0 -S 1", "expected the address of one server"),
        ("mirror -l /run/x -p 1 -s x", "the path of a UNIX socket will not do"),
        ("proxy -l ::1 -p 1 -C vm1:4777", "the port goes to --conn-port <CONN_PORT>"),
        ("acl -s x localhost", "names are not looked up here"),
        ("acl -s x --any ::1", "cannot be used with"),
        ("mirror-speed -s x -m 10MB", "with K, M, G or T (of 1024) behind it"),
        ("serve -f x --addr /run/a --sock /run/a", "each needs a path of its own"),
    ] {
        wrong(line, told);
    }
    let tip = run(&["status", "-s", "x", "--read-only"], &[]);
    assert!(tip.code == Some(2) && !tip.stderr.contains("-- --read-only"), "{tip:?}");
}

#[test]
fn wrong_usage_of_read_and_write() {
    for mode in ["read", "write"] {
        let given = |addr: &str, port: &str, from: &str, size: &str, more: &str| {
            format!("{mode} -l {addr} -p {port} -F {from} -S {size} {more}")
        };
        for port in ["0", "65536", "-1", "''", "x"] {
            wrong(&given("127.0.0.1", port, "0", "1", ""), "--port");
        }
        for from in ["4611686018427387905", "18446744073709551616", "-1", "''", "x", "1kb", "0x10", "1.0"] {
            wrong(&given("127.0.0.1", "1", from, "1", ""), "--from");
        }
        for size in ["1073741825", "4294967296", "18446744073709551616", "-1", "''", "x", "2G"] {
            wrong(&given("127.0.0.1", "1", "0", size, ""), "--size");
        }
        for bind in ["''", "x", "lo", "1.2.3.4/8", "::1"] {
            wrong(&given("127.0.0.1", "1", "0", "1", &format!("-b {bind}")), "--bind");
        }
        wrong(&given("127.0.0.1", "1", "0", "1", "extra"), "extra");
        wrong(&given("127.0.0.1", "1", "0", "1", "--sock x"), "--sock");
        wrong(&format!("{mode} -l 127.0.0.1 -p 1 -F 0"), "--size");
        wrong(&format!("{mode} -l 127.0.0.1 -p 1 -S 1"), "--from");
        wrong(&format!("{mode} -p 1 -F 0 -S 1"), "--addr");
        wrong(&format!("{mode} -l 127.0.0.1 -F 0 -S 1"), "--port");
    }
}

#[test]
fn limits_of_the_manual_are_within() {
    // Exit code 1: it got as far as trying to connect.
    let output = run(&["read", "-l", "127.0.0.1", "-p", "1", "-F", "4611686018427387904", "-S", "1073741824"], &[]);
    assert_eq!(output.code, Some(1), "{output:?}");
}

#[test]
fn arguments_that_are_no_text() {
    use std::os::unix::ffi::OsStrExt;
    let bad = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    for before in [&["serve", "-l"][..], &["read", "-p"], &["acl", "-s", "x"], &[]] {
        let mut args: Vec<_> = before.iter().map(std::ffi::OsStr::new).collect();
        args.push(bad);
        assert_eq!(run(&args, &[]).code, Some(2), "{args:?}");
    }
    // A path need not be text.
    let output = run(&[std::ffi::OsStr::new("status"), "-s".as_ref(), bad], &[]);
    assert_eq!((output.code, output.stderr.lines().count()), (Some(1), 1), "{output:?}");
}
