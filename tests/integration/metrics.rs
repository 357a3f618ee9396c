//! `status --prometheus`: the format to the letter, what is counted, and the unit that writes it for node-exporter.

#![allow(clippy::float_cmp, reason = "what is compared exactly is a whole number")]

use crate::support::fuse::{Disk, Op};
use crate::support::newstyle::{self, PORT};
use crate::support::peers::{listen, start_mirror};
use crate::support::{flag, kind, request, run, run_command, wait_for, Server, TempDir, BIN, SOON};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

const MIB: u64 = 1 << 20;

/// A page in the text format of Prometheus, version 0.0.4, of which every rule was checked.
struct Page {
    /// Samples by their names and labels.
    samples: BTreeMap<(String, BTreeMap<String, String>), f64>,
    kinds: BTreeMap<String, String>,
}

fn is_name(text: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    text.starts_with(first) && text.chars().all(|c| first(c) || c.is_ascii_digit())
}

/// The labels between braces, and what follows these.
#[track_caller]
fn labels(text: &str) -> (BTreeMap<String, String>, &str) {
    let mut labels = BTreeMap::new();
    let Some(mut rest) = text.strip_prefix('{') else { return (labels, text) };
    loop {
        let (name, value) = rest.split_once("=\"").unwrap_or_else(|| panic!("no label: {rest}"));
        assert!(is_name(name) && !name.starts_with("__"), "the name of a label: {name}");
        let (mut chars, mut found) = (value.chars(), String::new());
        loop {
            match chars.next() {
                Some('"') => break,
                Some('\\') => match chars.next() {
                    Some(c @ ('\\' | '"')) => found.push(c),
                    Some('n') => found.push('\n'),
                    other => panic!("no escape: {other:?} in {text}"),
                },
                Some(c) => found.push(c),
                None => panic!("no end: {text}"),
            }
        }
        assert!(labels.insert(name.to_owned(), found).is_none(), "twice: {name}");
        rest = chars.as_str();
        match rest.strip_prefix(',') {
            Some(more) => rest = more,
            None => return (labels, rest.strip_prefix('}').unwrap_or_else(|| panic!("no end of labels: {text}"))),
        }
    }
}

impl Page {
    #[track_caller]
    fn parse(text: &str) -> Self {
        assert!(text.ends_with('\n') && !text.contains("\n\n") && !text.contains('\r'), "lines: {text:?}");
        let (mut page, mut helped) = (Self { samples: BTreeMap::new(), kinds: BTreeMap::new() }, BTreeSet::new());
        let mut family = String::new();
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, words) = help.split_once(' ').unwrap();
                assert!(is_name(name) && name.starts_with("flexnbd_") && !words.is_empty(), "{line}");
                assert!(!words.contains('\\') && words.ends_with('.'), "{line}");
                assert!(helped.insert(name.to_owned()), "a second HELP: {line}");
                name.clone_into(&mut family);
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert_eq!(name, family, "TYPE behind its HELP");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                assert!(page.kinds.insert(name.to_owned(), kind.to_owned()).is_none(), "a second TYPE: {line}");
            } else {
                page.sample(line, &family);
            }
        }
        page.check_histograms();
        let empty: Vec<_> =
            page.kinds.keys().filter(|name| !page.samples.keys().any(|(of, _)| of.starts_with(*name))).collect();
        assert!(empty.is_empty(), "no samples of {empty:?}");
        page
    }

    #[track_caller]
    fn sample(&mut self, line: &str, family: &str) {
        let name_len = line.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap();
        let (name, rest) = line.split_at(name_len);
        let kind = self.kinds.get(family).unwrap_or_else(|| panic!("no TYPE before {line}"));
        let part = name.strip_prefix(family).unwrap_or_else(|| panic!("not of the family {family}: {line}"));
        let (labels, rest) = labels(rest);
        if kind == "histogram" {
            assert!(["_bucket", "_sum", "_count"].contains(&part), "{line}");
        } else {
            assert_eq!(part, "", "{line}");
        }
        assert_eq!(part == "_bucket", labels.contains_key("le"), "{line}");
        let value = rest.strip_prefix(' ').unwrap_or_else(|| panic!("no value: {line}"));
        assert!(value.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'), "{line}");
        // Units are base units, and stand at the end of the name.
        for word in ["ms", "us", "milliseconds", "microseconds", "kib", "mib", "percent"] {
            assert!(!name.split('_').any(|part| part == word), "{line}");
        }
        assert!(self.samples.insert((name.to_owned(), labels), value.parse().unwrap()).is_none(), "twice: {line}");
    }

    #[track_caller]
    fn check_histograms(&self) {
        for (family, _) in self.kinds.iter().filter(|(_, kind)| *kind == "histogram") {
            assert!(family.ends_with("_seconds"), "{family}");
            let of = |part: &str| {
                let name = format!("{family}_{part}");
                self.samples.iter().filter(move |((of, _), _)| *of == name)
            };
            let mut buckets: BTreeMap<_, Vec<(f64, f64)>> = BTreeMap::new();
            for ((_, labels), count) in of("bucket") {
                let mut labels = labels.clone();
                let bound = labels.remove("le").unwrap();
                let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().unwrap() };
                buckets.entry(labels).or_default().push((bound, *count));
            }
            let counts: BTreeMap<_, _> = of("count").map(|((_, labels), count)| (labels.clone(), *count)).collect();
            let sums: BTreeSet<_> = of("sum").map(|((_, labels), _)| labels.clone()).collect();
            assert!(buckets.keys().eq(counts.keys()) && buckets.keys().eq(sums.iter()), "{family}");
            for (labels, mut buckets) in buckets {
                buckets.sort_by(|one, other| one.0.total_cmp(&other.0));
                assert!(
                    buckets.is_sorted_by(|one, other| one.0 < other.0 && one.1 <= other.1),
                    "{labels:?}: {buckets:?}"
                );
                assert_eq!(*buckets.last().unwrap(), (f64::INFINITY, counts[&labels]), "{family} {labels:?}");
            }
        }
    }

    /// The sum of all samples of this name that have these labels.
    #[track_caller]
    fn get(&self, name: &str, wanted: &[(&str, &str)]) -> f64 {
        let name = format!("flexnbd_{name}");
        let has = |labels: &BTreeMap<String, String>| {
            wanted.iter().all(|(name, value)| labels.get(*name).is_some_and(|found| found == value))
        };
        let found = self.samples.iter().filter(|((of, labels), _)| *of == name && has(labels));
        let found: Vec<f64> = found.map(|(_, value)| *value).collect();
        assert!(!found.is_empty(), "no {name} {wanted:?}");
        found.iter().sum()
    }

    #[track_caller]
    fn of(&self, name: &str, command: &str) -> f64 {
        self.get(name, &[("command", command)])
    }
}

#[track_caller]
fn page(server: &Server) -> Page {
    let output = run(&["status", "--prometheus", "--sock", server.sock.to_str().unwrap()], &[]);
    assert_eq!((output.code, &*output.stderr), (Some(0), ""));
    Page::parse(&String::from_utf8(output.stdout).unwrap())
}

#[test]
fn every_command_has_a_counter_and_a_histogram() {
    let server = newstyle::serve(MIB);
    let mut client = newstyle::structured(&server);
    for _ in 0..3 {
        client.read(0, 0, 4096).unwrap();
    }
    client.block_status(0, 0, 4096).unwrap();
    let mut simple = newstyle::simple(&server);
    assert_eq!((simple.write(0, &[7; 1000]), simple.flush()), (0, 0));
    assert_eq!(simple.ask(kind::WRITE_ZEROES, flag::NO_HOLE, 4096, 4096, &[]), 0);
    assert_eq!((simple.ask(kind::TRIM, 0, 8192, 4096, &[]), simple.ask(5, 0, 0, 4096, &[])), (0, 0));
    // Refused, and of no length: nothing of that was carried out.
    assert_eq!((simple.read(MIB, 1), simple.ask(kind::TRIM, 0, 0, 0, &[])), (Err(22), 0));
    let page = page(&server);
    for (command, count) in [
        ("read", 3.0),
        ("write", 1.0),
        ("flush", 1.0),
        ("trim", 1.0),
        ("cache", 1.0),
        ("write_zeroes", 1.0),
        ("block_status", 1.0),
    ] {
        assert_eq!(page.of("requests_total", command), count, "{command}");
        assert_eq!(page.of("request_duration_seconds_count", command), count, "{command}");
        let (all, disk) = (page.of("request_duration_seconds_sum", command), page.of("disk_seconds_total", command));
        assert!(disk <= all && all < SOON.as_secs_f64(), "{command}: {disk} of {all}");
    }
    assert_eq!((page.get("errors_total", &[]), page.get("clients", &[])), (1.0, 2.0));
    assert_eq!((page.get("read_bytes_total", &[]), page.get("written_bytes_total", &[])), (3.0 * 4096.0, 5096.0));
    let image = server.image.to_str().unwrap();
    assert!(page.samples.keys().all(|(_, labels)| labels["file"] == image), "each says of what it is");
    assert!(page.get("info", &[("version", env!("CARGO_PKG_VERSION"))]) == 1.0);
    assert!(page.get("longest_turn_seconds", &[]) > 0.0 && page.get("start_time_seconds", &[]) > 1.6e9);
    // What is gone stays counted.
    drop((client, simple));
    wait_for("them gone", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    assert_eq!(self::page(&server).of("requests_total", "read"), 3.0);
    let json = server.control("status json\n\n");
    for part in
        [r#""commands":{"read":{"requests":3,"us":"#, r#","disk_us":"#, r#","buckets":{""#, r#""cache":{"requests":1,"#]
    {
        assert!(json.contains(part), "{part}: {json}");
    }
    assert!(server.status().number("longest_turn_us") > 0);
}

#[test]
fn a_time_is_that_from_the_receipt_and_shows_what_the_disk_had_of_it() {
    let Some(disk) = Disk::mount(4 * MIB) else { return };
    let server = Server::serve().file(disk.furnish("image", &vec![1; MIB as usize])).engine("sync").start();
    let mut client = server.connect();
    disk.hold(Op::Read, ..);
    client.send(&request(kind::READ, 0, 1, 512 << 10, 512));
    disk.wait_for_waiting(Op::Read, 1);
    std::thread::sleep(std::time::Duration::from_millis(300));
    disk.heal(Op::Read);
    assert_eq!((client.read_reply(), client.read_bytes(512).len()), ((0, 1), 512));
    let page = page(&server);
    let slow = |name| page.of(name, "read");
    assert!(slow("disk_seconds_total") >= 0.3 && slow("request_duration_seconds_sum") >= 0.3);
    assert_eq!(page.get("request_duration_seconds_bucket", &[("command", "read"), ("le", "0.262144")]), 0.0);
    assert!(page.get("longest_turn_seconds", &[]) >= 0.3, "the loop was held by it");
}

#[test]
fn what_a_limit_keeps_waiting_takes_time_but_not_of_the_disk() {
    let server = Server::serve().size(MIB).args("--max-iops 1").start();
    let mut client = server.connect();
    client.send(&request(kind::READ, 0, 1, 0, 512).repeat(2));
    (0..2).for_each(|_| assert_eq!((client.read_reply(), client.read_bytes(512).len()), ((0, 1), 512)));
    let page = page(&server);
    let (all, disk) = (page.of("request_duration_seconds_sum", "read"), page.of("disk_seconds_total", "read"));
    assert!(all - disk >= 0.9, "{disk} of {all}");
    assert_eq!((page.get("max_iops", &[]), page.get("max_bytes_per_second", &[])), (1.0, 0.0));
}

#[test]
fn names_are_escaped() {
    let builder = Server::serve();
    let image = builder.dir().join("a \"disk\" of \\n\\\\mine\n# TYPE forged\t");
    fs::write(&image, vec![0; 4096]).unwrap();
    let server = builder.file(image.clone()).start();
    let page = page(&server);
    // A control character is shown as the log shows it.
    let shown = image.to_str().unwrap().replace('\n', "\\n").replace('\t', "\\t");
    assert!(page.samples.keys().all(|(_, labels)| labels["file"] == shown), "{:?}", page.samples.keys().next());
}

#[test]
fn migrations_and_proxies_have_theirs() {
    let server = Server::serve().content(&crate::support::pattern(1, 4 << 20)).args(PORT).start();
    let proxy = Server::proxy(newstyle::address(&server)).args(PORT).start();
    newstyle::simple(&proxy).expect_alive();
    let of_proxy = page(&proxy);
    let upstream = newstyle::address(&server).to_string();
    assert!(of_proxy.samples.keys().all(|(_, labels)| labels["upstream"] == upstream));
    assert_eq!((of_proxy.get("upstream_connected", &[]), of_proxy.of("requests_total", "read")), (1.0, 1.0));
    assert_eq!(page(&server).get("migrating", &[]), 0.0);
    let destination = listen(0).size(4 << 20).start();
    start_mirror(&server, destination.address(), "--max-speed 1000");
    let migrating = page(&server);
    assert_eq!((migrating.get("migrating", &[]), migrating.get("migration_attempts_total", &[])), (1.0, 1.0));
    assert!(migrating.get("migration_left_bytes", &[]) > 0.0);
}

/// What the unit runs, with systemd's two rules for it: a dollar sign is doubled, and `%i` is the instance.
#[test]
fn the_unit_writes_a_whole_file_or_none() {
    let unit = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/src/dist/flexnbd-metrics@.service")).unwrap();
    let unit = unit.replace("\\\n", "");
    let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/bin/sh -c '")).unwrap();
    let (script, name) = command.rsplit_once("' ").unwrap();
    assert_eq!(name, "%i");
    let (dir, server) = (TempDir::new(), Server::serve().size(4096).start());
    let path = format!("{}:/usr/bin:/bin", Path::new(BIN).parent().unwrap().display());
    let run_unit = || {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &script.replace("$$", "$"), r"a\x2ddisk"]);
        shell.env("PATH", &path).env("SOCK", &server.sock).env("FOLDER", dir.join(""));
        run_command(&mut shell, &[])
    };
    let files = || {
        let names = fs::read_dir(dir.join("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<Vec<_>>()
    };
    let first = run_unit();
    assert_eq!((first.code, &*first.stderr), (Some(0), ""));
    assert_eq!(files(), [r"flexnbd-a\x2ddisk.prom"]);
    let whole = fs::read_to_string(dir.join(r"flexnbd-a\x2ddisk.prom")).unwrap();
    assert_eq!(Page::parse(&whole).get("size_bytes", &[]), 4096.0);
    assert_eq!(run_unit().code, Some(0), "again");
    server.process.signal("TERM");
    wait_for("the end of the server", SOON, || (!server.sock.exists()).then_some(()));
    assert_eq!((run_unit().code, files()), (Some(1), vec![]), "of a server that is gone there are no figures");
}
