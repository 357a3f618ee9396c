//! `resize`: a file that has grown is served as far as it goes now.

use crate::support::newstyle::{address, export_info, info_data, opt, rep, Haggler, FLAGS, PORT};
use crate::support::peers::{expect_migrated, listen, start_mirror};
use crate::support::{errno, must, pattern, program, run, run_command, Loop, Output, Server, TempDir};
use std::fs::File;
use std::os::unix::fs::FileExt;

const MIB: u64 = 1 << 20;

fn resize(server: &Server) -> Output {
    run(&["resize", "--sock", server.sock.to_str().unwrap()], &[])
}

fn refused(server: &Server, why: &str) {
    let output = resize(server);
    assert!(output.code == Some(1) && output.stderr.contains(why) && output.stdout.is_empty(), "{output:?}");
}

fn set_len(server: &Server, size: u64) {
    File::options().write(true).open(&server.image).unwrap().set_len(size).unwrap();
}

#[test]
fn who_is_connected_may_use_what_was_added_and_who_comes_is_told() {
    let server = Server::serve().size(MIB).arg(PORT).start();
    let mut before = server.connect();
    // One that is still negotiating.
    let mut haggler = Haggler::new(&server);
    let payload = pattern(1, 4096);
    assert_eq!(before.write(2 * MIB - 4096, &payload), errno::ENOSPC, "it is not there yet");
    set_len(&server, 2 * MIB + 100);
    assert_eq!(before.write(2 * MIB - 4096, &payload), errno::ENOSPC, "nobody has said so yet");
    let output = resize(&server);
    assert_eq!((output.code, &*output.stdout), (Some(0), &b"size=2097152\n"[..]), "{output:?}");
    let said = server.log();
    assert!(said.contains("the last 100 are no whole sector"), "{said}");

    assert_eq!(before.write(2 * MIB - 4096, &payload), 0);
    assert_eq!(before.read(2 * MIB - 4096, 4096).unwrap(), payload);
    assert_eq!(before.write(2 * MIB - 4095, &payload), errno::ENOSPC);
    let (told, last) = haggler.ask(opt::INFO, &info_data(b"", &[]));
    assert_eq!((told, last), (vec![(rep::INFO, export_info(2 * MIB, FLAGS))], rep::ACK));
    let seen = run_command(program("nbdinfo").args(["--size", &format!("nbd://{}", address(&server))]), &[]);
    assert_eq!(String::from_utf8_lossy(&seen.stdout), "2097152\n");
    assert_eq!(server.status().number("size"), 2 * MIB);
    assert_eq!(server.control("resize\n\n"), "0: size=2097152\n", "nothing has changed");
    server.expect_healthy();
}

/// What clients have is not taken from them.
#[test]
fn a_file_that_became_smaller_is_refused_until_it_is_as_large_again() {
    let server = Server::serve().content(&pattern(1, 1 << 20)).start();
    set_len(&server, MIB / 2);
    refused(&server, "524288 bytes now and 1048576 are served");
    assert_eq!(server.status().number("size"), MIB);
    set_len(&server, MIB);
    assert_eq!(resize(&server).code, Some(0));
    server.expect_healthy();
}

#[test]
fn a_block_device_grows() {
    let dir = TempDir::new();
    let file = dir.join("disk");
    File::create(&file).unwrap().set_len(MIB).unwrap();
    let Some(device) = Loop::attach(&file) else { return };
    let server = Server::serve().file(device.path().to_owned()).start();
    File::options().write(true).open(&file).unwrap().set_len(3 * MIB).unwrap();
    must("losetup", &["--set-capacity", device.path().to_str().unwrap()]);
    assert_eq!(resize(&server).stdout, b"size=3145728\n");
    let mut client = server.connect();
    assert_eq!(client.write(3 * MIB - 4096, &pattern(2, 4096)), 0);
    assert_eq!(client.flush(), 0);
    let mut found = vec![0; 4096];
    File::open(&file).unwrap().read_exact_at(&mut found, 3 * MIB - 4096).unwrap();
    assert!(found == pattern(2, 4096));
}

/// The size of an image is part of its migration.
#[test]
fn not_during_a_migration_and_not_where_there_is_no_image() {
    let listener = listen(0).size(MIB).start();
    refused(&listener, "there is no image yet");
    let source = Server::serve().content(&pattern(1, 1 << 20)).start();
    start_mirror(&source, listener.address(), "--max-speed 1000");
    set_len(&source, 2 * MIB);
    refused(&source, "a migration is running");
    assert_eq!(source.control("break\n\n"), "0: mirror stopped\n");
    assert_eq!(resize(&source).code, Some(0));
    let proxy = Server::proxy(source.address()).start();
    refused(&proxy, "this is a proxy");
}

/// What was added is part of a migration that begins later.
#[test]
fn a_migration_takes_what_was_added() {
    let mut source = Server::serve().size(MIB).start();
    set_len(&source, 2 * MIB);
    assert_eq!(resize(&source).code, Some(0));
    assert_eq!(source.connect().write(2 * MIB - 512, &pattern(5, 512)), 0);
    let mut destination = listen(0).size(2 * MIB).start();
    start_mirror(&source, destination.address(), "");
    expect_migrated(&mut source, &mut destination);
}
