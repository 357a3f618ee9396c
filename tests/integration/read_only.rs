//! `serve --read-only`: nobody changes the image through it, and it is in nobody's way.

use crate::support::newstyle::{address, export_info, info_data, opt, rep, Haggler, EPERM, PORT};
use crate::support::peers::{mirror, nowhere};
use crate::support::{flag, kind, must, pattern, program, run, run_command, Builder, Mount, Server};
use std::fs;

const SIZE: usize = 1 << 20;
/// Flags, `READ_ONLY`, `MULTI_CONN`.
const OLDSTYLE_FLAGS: u16 = 1 | 2 | 256;
/// And CACHE.
const NEWSTYLE_FLAGS: u16 = OLDSTYLE_FLAGS | 1024;

fn read_only(builder: Builder) -> Server {
    builder.args("--read-only").arg(PORT).start()
}

#[test]
fn both_styles_are_told() {
    let server = read_only(Server::serve().size(SIZE as u64));
    assert_eq!(server.status().get("read_only"), "true");
    let mut oldstyle = crate::support::Client::new(std::net::TcpStream::connect(server.address()).unwrap());
    assert_eq!(oldstyle.read_greeting()[24..28], u32::from(OLDSTYLE_FLAGS).to_be_bytes());
    let mut newstyle = Haggler::new(&server);
    let (told, last) = newstyle.ask(opt::INFO, &info_data(b"", &[]));
    assert_eq!((told, last), (vec![(rep::INFO, export_info(SIZE as u64, NEWSTYLE_FLAGS))], rep::ACK));
    let info = run_command(program("nbdinfo").args(["--json", &format!("nbd://{}", address(&server))]), &[]);
    let info = String::from_utf8(info.stdout).unwrap();
    assert!(info.contains("\"is_read_only\": true"), "{info}");
}

/// Each changing request is refused whole, and the connection stays in step.
#[test]
fn changes_are_refused() {
    let content = pattern(1, SIZE);
    let server = read_only(Server::serve().content(&content));
    let mut client = server.connect();
    for flags in [0, flag::FUA] {
        assert_eq!(client.ask(kind::WRITE, flags, 0, 300_000, &vec![0; 300_000]), EPERM);
        assert_eq!(client.ask(kind::WRITE, flags, u64::MAX, 7, &[0; 7]), EPERM, "wherever");
        assert_eq!(client.ask(kind::WRITE_ZEROES, flags, 0, 4096, &[]), EPERM);
        assert_eq!(client.ask(kind::TRIM, flags, 0, 4096, &[]), EPERM);
    }
    assert_eq!(client.flush(), 0, "what nobody needs does no harm");
    assert_eq!(client.read(0, SIZE as u32).unwrap(), content);
    assert!(fs::read(&server.image).unwrap() == content);
    assert_eq!(server.status().number("errors"), 8);
}

/// Several readers and one writer may have the image open, in any order.
#[test]
fn it_is_in_nobodys_way() {
    let first = read_only(Server::serve().content(&pattern(1, SIZE)));
    let image = || first.image.clone();
    let writer = Server::serve().file(image()).start();
    let second = read_only(Server::serve().file(image()));
    let payload = pattern(2, 4096);
    assert_eq!(writer.connect().write(8192, &payload), 0);
    for reader in [&first, &second] {
        assert_eq!(reader.connect().read(8192, 4096).unwrap(), payload);
    }
}

/// Others may write the image meanwhile, so the copy would be worth nothing; and what a listener is there for is to write.
#[test]
fn it_takes_no_part_in_a_migration() {
    let source = read_only(Server::serve().size(SIZE as u64));
    let refused = mirror(&source, nowhere(), "");
    assert!(refused.code == Some(1) && refused.stderr.contains("read-only"), "{refused:?}");
    let image = source.image.to_str().unwrap();
    let output = run(&["listen", "--addr", "127.0.0.1", "--port", "0", "--file", image, "--read-only"], &[]);
    assert!(output.code == Some(2) && output.stderr.contains("--read-only"), "{output:?}");
    let output = run(&["serve", "-l", "::1", "-p", "0", "-f", image, "--read-only", "--shared-image"], &[]);
    assert!(output.code == Some(2) && output.stderr.contains("--shared-image"), "{output:?}");
}

/// A file system that is mounted read-only has images that nobody could open for writing.
#[test]
fn a_read_only_file_system() {
    let Some(mount) = Mount::tmpfs("4m") else { return };
    let image = mount.join("image");
    let content = pattern(1, SIZE);
    fs::write(&image, &content).unwrap();
    must("mount", &["-o", "remount,ro", mount.join("").to_str().unwrap()]);
    let file = image.to_str().unwrap();
    let output = run(&["serve", "--addr", "127.0.0.1", "--port", "0", "--file", file], &[]);
    assert!(output.code == Some(1) && output.stderr.contains("--read-only"), "{output:?}");
    let server = read_only(Server::serve().file(image));
    assert_eq!(server.connect().read(0, SIZE as u32).unwrap(), content);
}
