//! The units for systemd: its own analyzers, the commands in them, and what they leave a server without.

use crate::install::make;
use crate::support::{
    has, must, peers, program, run_command, wait_for, Client, Loop, Need, Process, Server, TempDir, BIN, SOON,
};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{chown, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// The most that `systemd-analyze security` may say of a unit, in tenths.
const EXPOSURE_MAX: &str = "20";

/// The units as they are installed.
fn units() -> Vec<PathBuf> {
    let found =
        fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src/dist")).unwrap().map(|entry| entry.unwrap().path());
    let mut units: Vec<_> = found.filter(|path| path.is_file() && path.extension().unwrap() != "conf").collect();
    units.sort();
    units
}

fn unit(name: &str) -> String {
    let path = units().into_iter().find(|path| path.file_name().unwrap() == name).unwrap();
    fs::read_to_string(path).unwrap()
}

/// The values of a setting, in their order.
fn settings<'a>(unit: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    unit.lines().filter_map(move |line| line.strip_prefix(name)?.strip_prefix('='))
}

#[test]
fn systemd_finds_nothing_wrong_with_them() {
    if !has(&[Need::Program("systemd-analyze"), Need::Program("make")]) {
        return;
    }
    let dir = TempDir::new();
    make(&dir, "install", &[]);
    let folder = dir.join("usr/lib/systemd/system");
    // Of an instance of each, with the program where it is.
    let at = format!("ExecStart={}", dir.join("usr/bin/").display());
    let mut instances = Vec::new();
    for path in units() {
        let name = path.file_name().unwrap().to_str().unwrap();
        let installed = folder.join(name);
        let text = fs::read_to_string(&installed).unwrap();
        fs::write(&installed, text.replace("ExecStart=flexnbd", &format!("{at}flexnbd"))).unwrap();
        instances.push(folder.join(name.replace('@', "@disk")).to_str().unwrap().to_owned());
    }
    assert!(instances.len() >= 3, "{instances:?}");
    let verified = run_command(program("systemd-analyze").args(["verify", "--man=no"]).args(&instances), &[]);
    assert_eq!((verified.code, verified.stderr.as_str()), (Some(0), ""), "{instances:?}");
    for service in instances.iter().filter(|path| path.ends_with(".service")) {
        let limit = format!("--threshold={EXPOSURE_MAX}");
        let judged = run_command(program("systemd-analyze").args(["security", "--offline=true", &limit, service]), &[]);
        assert_eq!(judged.code, Some(0), "{}{}", String::from_utf8_lossy(&judged.stdout), judged.stderr);
    }
}

#[test]
fn nothing_starts_over_and_over_or_takes_an_image_that_may_be_wrong() {
    for name in ["flexnbd@.service", "flexnbd-proxy@.service"] {
        let unit = unit(name);
        assert_eq!(settings(&unit, "Type").collect::<Vec<_>>(), ["notify"], "{name}");
        assert_eq!(settings(&unit, "Restart").collect::<Vec<_>>(), ["on-failure"], "{name}");
        assert_eq!(settings(&unit, "StartLimitBurst").collect::<Vec<_>>(), ["3"], "{name}");
        assert_eq!(settings(&unit, "SystemCallErrorNumber").collect::<Vec<_>>(), ["EPERM"], "{name}");
        assert!(!unit.contains("--adopt"), "{name}");
    }
}

/// The command of a unit, as a shell runs it for the instance `disk`: `/run` is below `run`, and the program is that of the tests.
fn command(unit: &str, run: &Path) -> String {
    let joined = unit.replace("\\\n", "");
    let command = settings(&joined, "ExecStart").next().unwrap().replace("%i", "disk");
    let words = command.strip_prefix("flexnbd").unwrap();
    let words = words.strip_prefix("-proxy").map_or_else(|| words.to_owned(), |words| format!(" proxy {words}"));
    format!("exec {BIN} {}", words.replace("/run/", &format!("{}/", run.display())))
}

/// The variables that a unit sets itself, in the words of a shell.
fn defaults(unit: &str, run: &Path) -> String {
    let all: Vec<_> = settings(unit, "Environment").collect();
    all.join(" ").replace("%i", "disk").replace("/run/", &format!("{}/", run.display()))
}

#[test]
fn their_commands_serve_a_disk() {
    let dir = TempDir::new();
    let run = dir.join("run");
    for folder in ["flexnbd/disk", "flexnbd-proxy/disk"] {
        fs::create_dir_all(run.join(folder)).unwrap();
    }
    let image = dir.join("image");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let newstyle = dir.join("newstyle");
    let start = |name: &str, variables: &str| {
        let unit = unit(name);
        let line = format!("{}; {variables} {}", defaults(&unit, &run), command(&unit, &run));
        Process::spawn(program("sh").args(["-c", &line.replace("; ", "\n").replace(" exec ", "\nexec ")]))
    };
    let serve = format!("FILE={} OPTIONS='--newstyle-sock {} -q'", image.display(), newstyle.display());
    let mut server = start("flexnbd@.service", &serve);
    let (nbd, control) = (run.join("flexnbd/disk/nbd"), run.join("flexnbd/disk/control"));
    wait_for("the control socket", SOON, || control.exists().then_some(()));
    let connect = |path: &Path| Client::new(UnixStream::connect(path).unwrap());
    assert_eq!(connect(&nbd).read_greeting().len(), 152);
    assert_eq!(connect(&newstyle).read_bytes(16), b"NBDMAGICIHAVEOPT");

    let mut proxy = start("flexnbd-proxy@.service", &format!("CONN_ADDR={} OPTIONS=-q", newstyle.display()));
    let (nbd, control) = (run.join("flexnbd-proxy/disk/nbd"), run.join("flexnbd-proxy/disk/control"));
    wait_for("the control socket", SOON, || control.exists().then_some(()));
    let mut client = connect(&nbd);
    client.read_greeting();
    assert_eq!((client.write(0, b"through both"), client.flush()), (0, 0));
    assert!(fs::read(&image).unwrap().starts_with(b"through both"));
    for process in [&mut proxy, &mut server] {
        process.signal("TERM");
        assert_eq!(process.wait(SOON).code(), Some(0));
    }
}

/// All calls of a set, and of the sets in it.
fn expand(set: &str, calls: &mut BTreeSet<String>) {
    if !set.starts_with('@') {
        calls.insert(set.to_owned());
        return;
    }
    for line in must("systemd-analyze", &["--no-pager", "syscall-filter", set]).lines().skip(1) {
        let name = line.trim();
        if line.starts_with(' ') && !name.starts_with('#') {
            expand(name, calls);
        }
    }
}

/// The calls that a unit lets a program make.
fn allowed(unit: &str) -> BTreeSet<String> {
    let mut allowed = BTreeSet::new();
    for filter in settings(unit, "SystemCallFilter") {
        let mut named = BTreeSet::new();
        filter.trim_start_matches('~').split_whitespace().for_each(|set| expand(set, &mut named));
        if filter.starts_with('~') {
            allowed.retain(|call| !named.contains(call));
        } else {
            allowed.extend(named);
        }
    }
    allowed
}

#[test]
fn they_refuse_no_call_that_a_server_makes() {
    if !has(&[Need::Program("systemd-analyze"), Need::Program("strace")]) {
        return;
    }
    let builder = Server::serve().size(4 << 20);
    let trace = builder.dir().join("trace");
    let mut server = builder.through(&["strace", "-D", "-f", "-o", trace.to_str().unwrap()]).start();
    let mut client = server.connect();
    assert_eq!((client.write(0, &[7; 8192]), client.flush()), (0, 0));
    assert_eq!(client.read(0, 2), Ok(vec![7; 2]));
    for kind in [crate::support::kind::TRIM, crate::support::kind::WRITE_ZEROES] {
        assert_eq!(client.ask(kind, 0, 0, 4096, &[]), 0);
    }
    assert_eq!(peers::tell("acl", &server, "127.0.0.1").0, Some(0));
    // Whether files can share blocks there or not.
    let copy = server.dir().join("copy");
    peers::tell("snapshot", &server, &format!("--to {}", copy.display()));
    let mut destination = peers::listen(0).size(4 << 20).start();
    peers::start_mirror(&server, destination.address(), "");
    peers::expect_migrated(&mut server, &mut destination);
    let made: BTreeSet<String> = fs::read_to_string(trace)
        .unwrap()
        .lines()
        .filter_map(|line| line.split_whitespace().nth(1)?.split_once('(').map(|(name, _)| name.to_owned()))
        .filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase()))
        .collect();
    assert!(made.contains("fdatasync") || made.contains("io_uring_enter"), "{made:?}");
    assert!(made.contains("close_range"), "there was no child process: {made:?}");
    let unit = unit("flexnbd@.service");
    let allowed = allowed(&unit);
    let refused: Vec<_> = made.difference(&allowed).collect();
    assert!(refused.is_empty(), "{refused:?}");
}

/// A user without any right of root's, a system that cannot be written: what is left is enough for images in `/srv` and for block
/// devices of the group that the unit names.
#[test]
fn they_leave_enough_for_images_and_devices() {
    let needs = ["unshare", "setpriv", "mount"].map(Need::Program);
    if !has(&[Need::Root, needs[0], needs[1], needs[2], Need::Kernel("unshare --mount true && test -d /srv")]) {
        return;
    }
    let unit = unit("flexnbd@.service");
    let group = settings(&unit, "SupplementaryGroups").next().unwrap();
    assert_eq!(settings(&unit, "ProtectSystem").next(), Some("full"));
    let gid = fs::read_to_string("/etc/group").unwrap();
    let gid = gid.lines().find_map(|line| line.strip_prefix(&format!("{group}:x:"))?.split(':').next()).unwrap();
    let gid: u32 = gid.parse().unwrap();

    let srv = TempDir::within(Path::new("/srv"));
    let (user, image) = (Some(65_534), srv.join("image"));
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    chown(srv.join(""), user, user).unwrap();
    chown(&image, user, user).unwrap();
    let bin = srv.join("flexnbd");
    must("cp", &[BIN, bin.to_str().unwrap()]);
    let backing = TempDir::new();
    let disk = backing.join("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let device = Loop::attach(&disk);
    if let Some(device) = &device {
        chown(device.path(), Some(0), Some(gid)).unwrap();
        fs::set_permissions(device.path(), fs::Permissions::from_mode(0o660)).unwrap();
    }
    let script = format!(
        "for d in /usr /etc /boot; do [ ! -d $d ] || {{ mount --bind $d $d && mount -o remount,bind,ro $d; }} || exit 9; done
         exec setpriv --reuid=65534 --regid=65534 --groups={gid} --no-new-privs --bounding-set=-all --inh-caps=-all -- \"$@\""
    );
    for file in [Some(image.as_path()), device.as_ref().map(Loop::path)].into_iter().flatten() {
        let sock = srv.join("control");
        let mut command = program("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh"]).arg(&bin).args(["serve", "-l"]).arg(srv.join("nbd"));
        let mut server = Process::spawn(command.arg("-f").arg(file).arg("-s").arg(&sock));
        wait_for(format_args!("a server of {}", file.display()), SOON, || {
            assert!(server.is_running(), "{}", file.display());
            sock.exists().then_some(())
        });
        let mut client = Client::new(UnixStream::connect(srv.join("nbd")).unwrap());
        client.read_greeting();
        assert_eq!((client.write(4096, &[7; 4096]), client.flush()), (0, 0), "{}", file.display());
        assert_eq!(client.read(4096, 4096), Ok(vec![7; 4096]));
        server.signal("TERM");
        assert_eq!(server.wait(SOON).code(), Some(0));
    }
}
