//! The client of `make bench`: what it writes and reads back is right, what it is asked to send is what a server gets,
//! and a server that fails or says nothing is found out.

#[path = "../bench/client/mod.rs"]
mod client;

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::support::newstyle::{address, PORT};
use crate::support::{program, wait_for, Process, Server, TempDir, SOON};
use client::{Plan, Report};

const SIZE: u64 = 6 << 20;

fn load(words: &str) -> io::Result<Vec<Report>> {
    let words: Vec<&str> = words.split_whitespace().collect();
    client::run(&Plan::parse(&words)?)
}

/// The figures of a run of one job that none of its requests failed.
#[track_caller]
fn one_job(words: &str) -> Report {
    let mut reports = load(words).unwrap();
    assert_eq!(reports.len(), 1);
    assert_eq!(reports[0].errors, 0, "{words}");
    reports.remove(0)
}

fn figure(report: &Report, name: &str) -> f64 {
    let json = report.json();
    let (_, behind) = json.split_once(&format!("\"{name}\": ")).unwrap();
    behind[..behind.find([',', '}']).unwrap()].parse().unwrap()
}

/// nbdkit with `memory` of 4 MiB behind a filter, until it is dropped.
struct Nbdkit {
    socket: PathBuf,
    dir: TempDir,
    _process: Process,
}

impl Nbdkit {
    fn start(filter: &str, settings: &str) -> Self {
        let dir = TempDir::new();
        let (socket, pid) = (dir.join("socket"), dir.join("pid"));
        let mut command = program("nbdkit");
        command.arg("-f").arg("-U").arg(&socket).arg("-P").arg(&pid).arg(format!("--filter={filter}"));
        command.args(["memory", "4M"]).args(settings.split_whitespace());
        command.current_dir(dir.join("")).stdin(Stdio::null());
        command.stderr(File::create(dir.join("stderr")).unwrap());
        let mut process = Process::spawn(&mut command);
        wait_for("nbdkit", SOON, || {
            assert!(process.is_running(), "{command:?}");
            pid.exists().then_some(())
        });
        Self { socket, dir, _process: process }
    }

    fn address(&self) -> &str {
        self.socket.to_str().unwrap()
    }
}

/// Writes each block once, in any order, then reads all; with more connections, and with blocks of another size.
#[track_caller]
fn write_and_read_back(address: &str, image: &Path) {
    let written = one_job(&format!("{address} -- write=100 data=check depth=8 connections=3 ops={}", SIZE / 4096));
    assert_eq!((written.writes, written.bytes), (SIZE / 4096, SIZE));
    for replies in ["simple", "structured"] {
        for job in ["block=64k depth=5 order=sequential", "block=1m depth=4 order=sequential connections=2", "depth=32"]
        {
            let ops = if job == "depth=32" { SIZE / 4096 } else { SIZE >> if job.contains("1m") { 20 } else { 16 } };
            let words = format!("{address} replies={replies} -- data=check ops={ops} {job}");
            let read = one_job(&words);
            assert_eq!((read.reads, read.bytes, read.mismatches), (ops, SIZE, 0), "{words}");
        }
        // One byte that is wrong is found, wherever it is.
        let file = File::options().read(true).write(true).open(image).unwrap();
        for at in [0, 123_457, SIZE - 1] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[!byte[0]], at).unwrap();
            let words = format!("{address} replies={replies} -- data=check ops={} block=64k depth=3", SIZE >> 16);
            assert_eq!(one_job(&words).mismatches, 1, "{words}, byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
    }
}

#[test]
fn what_is_written_is_read_back_over_tcp_and_over_a_unix_socket() {
    let server = Server::serve().size(SIZE).arg(PORT);
    let socket = server.dir().join("newstyle");
    let server = server.arg("--newstyle-sock").arg(&socket).start();
    // What is not written is found too, as data and as a hole.
    for replies in ["simple", "structured"] {
        let read = one_job(&format!("{} replies={replies} -- data=check ops=3 depth=2", address(&server)));
        assert_eq!(read.mismatches, 3 * 4096);
    }
    write_and_read_back(&address(&server).to_string(), &server.image);
    File::options().write(true).open(&server.image).unwrap().set_len(0).unwrap();
    File::options().write(true).open(&server.image).unwrap().set_len(SIZE).unwrap();
    write_and_read_back(socket.to_str().unwrap(), &server.image);
    server.expect_healthy();
}

#[test]
fn discarded_data_is_counted_like_any() {
    let server = Server::serve().size(SIZE).arg(PORT).start();
    let read = one_job(&format!("{} -- block=1m depth=4 order=sequential data=discard ops=60", address(&server)));
    assert_eq!((read.reads, read.bytes), (60, 60 << 20));
    server.expect_healthy();
}

#[test]
fn a_server_gets_what_the_job_says() {
    let nbdkit = Nbdkit::start("log", "logfile=log");
    let words = "seconds=30 -- write=70 fua=40 ops=2000 depth=16 flush=1m from=1m size=2m block=8k seed=7";
    let report = one_job(&format!("{} {words}", nbdkit.address()));
    let log = std::fs::read_to_string(nbdkit.dir.join("log")).unwrap();
    let count = |what: &str| log.lines().filter(|line| line.contains(what)).count() as u64;
    let counted = [" Read id=", " Write id=", " Flush id="].map(count);
    assert_eq!(counted, [report.reads, report.writes, report.flushes]);
    assert_eq!((report.reads + report.writes, report.bytes), (2000, 2000 * 8192));
    assert!((1300..1500).contains(&report.writes), "{}", report.writes);
    let fua_percent = count("fua=1") * 100 / report.writes;
    assert!((34..46).contains(&fua_percent), "{fua_percent} %");
    assert_eq!(report.flushes, report.writes * 8192 / (1 << 20));
    for line in log.lines().filter(|line| line.contains("offset=")) {
        let (_, at) = line.split_once("offset=0x").unwrap();
        let at = u64::from_str_radix(at.split(' ').next().unwrap(), 16).unwrap();
        assert!((1 << 20..3 << 20).contains(&at), "{line}");
    }
}

#[test]
fn a_command_is_all_that_a_job_sends() {
    let nbdkit = Nbdkit::start("log", "logfile=log");
    for (command, replies, logged) in [
        ("zeroes", "simple", "Zero"),
        ("trim", "simple", "Trim"),
        ("cache", "structured", "Cache"),
        ("status", "structured", "Extents"),
    ] {
        let words = format!("{} replies={replies} -- command={command} ops=100 depth=5 block=64k", nbdkit.address());
        let report = one_job(&words);
        assert_eq!((report.commands, report.bytes, report.reads + report.writes), (100, 100 << 16, 0), "{words}");
        assert!(figure(&report, "p99_us") > 0.0, "{}", report.json());
        let log = std::fs::read_to_string(nbdkit.dir.join("log")).unwrap();
        let sent = log.lines().filter(|line| line.contains(&format!(" {logged} id=")));
        assert_eq!(sent.filter(|line| line.contains("count=0x10000 ")).count(), 100, "{log}");
    }
    // Room is what zeroes are to take.
    let log = std::fs::read_to_string(nbdkit.dir.join("log")).unwrap();
    assert!(log.lines().filter(|line| line.contains(" Zero id=")).all(|line| line.contains(" trim=0 ")), "{log}");
}

#[test]
fn extents_of_a_real_image_are_taken() {
    let server = Server::serve().size(SIZE).arg(PORT).start();
    let address = address(&server).to_string();
    one_job(&format!("{address} -- write=100 ops={}", SIZE / 8192));
    for block in ["4k", "1m"] {
        let report = one_job(&format!("{address} replies=structured -- command=status ops=50 depth=8 block={block}"));
        assert_eq!(report.commands, 50);
    }
    server.expect_healthy();
}

#[test]
fn errors_are_counted_and_do_not_end_the_run() {
    let nbdkit = Nbdkit::start("error", "error-pwrite-rate=100%");
    for replies in ["simple", "structured"] {
        let address = nbdkit.address();
        let reports = load(&format!("{address} replies={replies} -- write=100 ops=100 depth=4 -- ops=50")).unwrap();
        assert_eq!((reports[0].writes, reports[0].errors, reports[0].bytes), (100, 100, 0));
        assert_eq!((reports[1].reads, reports[1].errors, reports[1].bytes), (50, 0, 50 * 4096));
    }
}

#[test]
fn times_are_what_the_server_took() {
    let nbdkit = Nbdkit::start("delay", "delay-read=50ms");
    let report = one_job(&format!("{} -- ops=10", nbdkit.address()));
    let [p50, p999, longest] = ["p50_us", "p999_us", "longest_us"].map(|name| figure(&report, name));
    assert!(50_000.0 <= p50 && p50 <= p999 && p999 <= longest, "{}", report.json());
    assert!(figure(&report, "seconds") >= 0.5 && figure(&report, "ops_per_s") <= 20.0, "{}", report.json());
}

#[test]
fn a_pace_is_kept_beside_a_job_that_has_none() {
    let server = Server::serve().size(SIZE).arg(PORT).start();
    let reports =
        load(&format!("{} seconds=1 -- size=1m -- from=1m write=100 pace=1m depth=4", address(&server))).unwrap();
    let paced = reports[1].bytes;
    assert!(paced <= (1 << 20) + 4096, "{paced} bytes in a second");
    // On a machine that is busy it may be late, but not much.
    assert!(paced >= 1 << 19, "{paced} bytes in a second");
    assert!(reports[0].reads > 100, "{}", reports[0].json());
    server.expect_healthy();
}

#[test]
fn a_server_that_says_nothing_is_given_up() {
    let nbdkit = Nbdkit::start("delay", "delay-read=1000");
    let error = load(&format!("{} seconds=0.1 stall=0.3 -- depth=2", nbdkit.address())).err().unwrap();
    assert!(error.to_string().contains("no reply"), "{error}");

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = listener.local_addr().unwrap();
    let error = load(&format!("{silent} seconds=0.1 stall=0.2 -- depth=2")).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
    // Not one that was free a moment ago, which another test may have taken.
    assert!(load("127.0.0.1:1 seconds=1 --").is_err(), "nobody listens there");
}

#[test]
fn words_that_make_no_sense_are_refused() {
    let words =
        ["", "x", "x --", "x seconds=1", "x seconds=1 -- depth=0", "x seconds=1 -- block=4q", "x seconds=-1 --"];
    for words in words
        .iter()
        .chain(&["x seconds=1 -- dept=1", "/x seconds=1 -- data=discard", "x replies=no --"])
        .chain(&["x seconds=1 -- command=status", "x seconds=1 -- command=trim write=1", "x -- command=no"])
    {
        let error = load(words).err().unwrap();
        assert!([io::ErrorKind::InvalidInput, io::ErrorKind::Other].contains(&error.kind()), "{words:?}: {error}");
    }
}
