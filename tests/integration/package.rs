//! `make deb`: the package is installed below another root, where it cannot find systemd, used, upgraded and purged.

use crate::install::make;
use crate::support::{has, must, program, run_command, wait_for, Client, Need, Process, TempDir, SOON};
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;

#[test]
fn a_package_is_installed_used_upgraded_and_purged() {
    let programs = ["make", "dpkg", "dpkg-deb"].map(Need::Program);
    if !has(&[Need::Root, programs[0], programs[1], programs[2]]) {
        return;
    }
    let dir = TempDir::new();
    let staged = format!("PACKAGE_ROOT={}", dir.join("staged").display());
    // The program of the tests is large, and to compress it would take longer than all the rest.
    let package = make(&dir, "deb", &[&staged, "COMPRESSION=none"]);
    let package = package.lines().last().unwrap();

    let root = dir.join("root");
    let state = root.join("var/lib/dpkg");
    for folder in ["info", "updates", "triggers"] {
        fs::create_dir_all(state.join(folder)).unwrap();
    }
    fs::write(state.join("status"), "").unwrap();
    fs::create_dir_all(root.join("etc")).unwrap();
    // The scripts run outside, with the path of the root in their environment, because there is no shell inside; the
    // package's dependencies are not there either.
    let dpkg = |what: &str, of: &str| {
        let mut command = program("dpkg");
        command.args(["--force-script-chrootless", "--force-depends", "--log=/dev/null", "--root"]).arg(&root);
        let output = run_command(command.args([what, of]), &[]);
        assert_eq!(output.code, Some(0), "{what}: {}", output.stderr);
    };
    dpkg("--install", package);
    for path in ["usr/bin/flexnbd-proxy", "usr/share/man/man1/flexnbd.1", "usr/lib/systemd/system/flexnbd@.service"] {
        assert!(root.join(path).exists(), "{path}");
    }
    assert!(root.join("etc/flexnbd").is_dir());
    if has(&[Need::Program("systemd-sysusers")]) {
        let users = fs::read_to_string(root.join("etc/passwd")).unwrap();
        assert!(users.lines().any(|line| line.starts_with("flexnbd:") && line.contains("nologin")), "{users}");
    }

    let (image, sock, nbd) = (dir.join("image"), dir.join("control"), dir.join("nbd"));
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let mut server = Process::spawn(
        program(root.join("usr/bin/flexnbd"))
            .arg("serve")
            .arg("-l")
            .arg(&nbd)
            .arg("-f")
            .arg(&image)
            .arg("-s")
            .arg(&sock),
    );
    wait_for("the control socket", SOON, || sock.exists().then_some(()));
    let mut client = Client::new(UnixStream::connect(&nbd).unwrap());
    client.read_greeting();
    client.expect_alive();
    dpkg("--install", package);
    client.expect_alive();
    server.signal("TERM");
    assert_eq!(server.wait(SOON).code(), Some(0));

    fs::write(root.join("etc/flexnbd/disk.conf"), "FILE=/srv/disk.img\n").unwrap();
    dpkg("--remove", "flexnbd");
    dpkg("--purge", "flexnbd");
    assert!(!root.join("usr/bin/flexnbd").exists());
    assert!(root.join("etc/flexnbd/disk.conf").exists(), "what names the disks is the administrator's");
    fs::remove_file(root.join("etc/flexnbd/disk.conf")).unwrap();
    dpkg("--install", package);
    dpkg("--purge", "flexnbd");
    assert!(
        !root.join("etc/flexnbd").exists() && !fs::read_to_string(state.join("status")).unwrap().contains("flexnbd")
    );
}

/// The scripts of the package where there is no systemd at all, nor a program to make users with.
#[test]
fn its_scripts_do_without_systemd() {
    let dir = TempDir::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/dist/deb");
    must("ln", &["-s", "/bin/grep", dir.join("grep").to_str().unwrap()]);
    for (script, action) in [("postinst", "configure"), ("prerm", "upgrade"), ("prerm", "remove"), ("postrm", "purge")]
    {
        let mut command = program("/bin/sh");
        command.arg(folder.join(script)).arg(action).env("PATH", dir.join("")).env("DPKG_ROOT", dir.join("root"));
        let output = run_command(&mut command, &[]);
        assert_eq!(output.code, Some(0), "{script} {action}: {}", output.stderr);
        assert_eq!(output.stderr.contains("the units need a user"), script == "postinst", "{}", output.stderr);
    }
}
