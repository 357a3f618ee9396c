//! What the README says of qemu: it waits for a server that is away, and must be told that an image is raw.

use super::client;
use crate::support::{has, program, reserved_port, wait_for, Need, Process, Server, SOON};
use std::fs::{self, File};
use std::io::Write;
use std::process::Stdio;

/// qemu holds requests for as long as its `reconnect-delay` while the server is away.
#[test]
fn qemu_waits_for_a_server_that_is_started_again() {
    if !has(&[Need::Program("qemu-io")]) {
        return;
    }
    let port = reserved_port();
    let newstyle = format!("--newstyle-port {port}");
    let mut server = Server::serve().size(1 << 20).args(&newstyle).start();
    let said = server.dir().join("said");
    let options = format!(
        "driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=127.0.0.1,file.server.port={port},\
         file.reconnect-delay=60"
    );
    let mut command = program("qemu-io");
    command.args(["--image-opts", &options]).stdin(Stdio::piped()).stdout(File::create(&said).unwrap());
    let mut qemu = Process::spawn(&mut command);
    let mut orders = qemu.0.stdin.take().unwrap();
    let wait_until_said = |words: &str| {
        wait_for(words, SOON, || fs::read_to_string(&said).unwrap().contains(words).then_some(()));
    };
    orders.write_all(b"write -P 7 0 64k\n").unwrap();
    wait_until_said("wrote 65536/65536 bytes at offset 0");
    server.process.0.kill().unwrap();
    server.process.wait(SOON);
    orders.write_all(b"read -P 7 0 64k\n").unwrap();
    let again = Server::serve().file(server.image.clone()).args(&newstyle).start();
    wait_until_said("read 65536/65536 bytes at offset 0");
    drop(orders);
    assert_eq!(qemu.wait(SOON).code(), Some(0));
    let said = fs::read_to_string(&said).unwrap();
    assert!(!said.contains("verification failed") && !said.contains("error"), "{said}");
    again.expect_healthy();
}

/// A guest may write a header that makes its disk another image, and name a file of the host in it. The server does not look.
#[test]
fn an_image_is_raw_whatever_a_guest_writes() {
    if !has(&[Need::Program("qemu-img")]) {
        return;
    }
    let server = Server::serve().size(1 << 20).args("--newstyle-port 0").start();
    let qcow2 = server.dir().join("qcow2").to_str().unwrap().to_owned();
    client(server.dir(), "qemu-img", &["create", "-q", "-f", "qcow2", &qcow2, "8M"]);
    assert_eq!(server.connect().write(0, &fs::read(&qcow2).unwrap()[..65536]), 0);
    let uri = format!("nbd://{}", server.status().get("newstyle_address"));
    let guessed = client(server.dir(), "qemu-img", &["info", &uri]);
    assert!(guessed.contains("file format: qcow2") && guessed.contains("virtual size: 8 MiB"), "{guessed}");
    let told = client(server.dir(), "qemu-img", &["info", "-f", "raw", &uri]);
    assert!(told.contains("file format: raw") && told.contains("virtual size: 1 MiB"), "{told}");
    server.expect_healthy();
}
