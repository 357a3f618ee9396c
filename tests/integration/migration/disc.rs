//! DISC says that the copy counts. Where it does not arrive, the source's file decides, and the listener says so.

use crate::support::peers::{listen, send_image, start_mirror, Worker};
use crate::support::{kind, pattern, wait_for, Client, Server, SOON};
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::thread;

const SIZE: usize = 4 << 20;
/// The end of the line with which a listener ends that may have the only image there is.
const ALL_HERE: &str =
    "every byte of the image is here and durable, but this file is the image only if the source's is gone";

/// Stops a listener that goes on waiting; returns the line that says why it ends.
#[track_caller]
fn last_line(listener: &mut Server) -> String {
    wait_for("its sender to be gone", SOON, || (listener.status().number("num_clients") == 0).then_some(()));
    assert_eq!(listener.status().get("has_control"), "false");
    assert_eq!(listener.stop().code(), Some(1));
    let log = listener.log();
    let line = log.lines().last().unwrap();
    assert!(line.contains(":F:"), "{log}");
    line.to_owned()
}

#[test]
fn a_source_that_is_killed_between_unlink_and_disc() {
    let content = pattern(1, SIZE);
    let source = Server::serve();
    // The folder is synced in between.
    let folder = source.dir().join("");
    let folder = folder.to_str().unwrap().trim_end_matches('/');
    let killer = ["strace", "-D", "-f", "-o", "/dev/null", "-P", folder, "-e", "inject=fsync:signal=KILL"];
    let mut source = source.through(&killer).content(&content).start();
    let mut listener = listen(0).size(SIZE as u64).start();
    start_mirror(&source, listener.address(), "--unlink");
    assert_eq!(source.process.wait(SOON).signal(), Some(9), "{}", source.log());
    assert!(!source.image.exists());
    let line = last_line(&mut listener);
    assert!(line.ends_with(ALL_HERE), "{line}");
    assert!(fs::read(&listener.image).unwrap() == content);
}

/// Carries one connection to `to`, but ends it instead of passing DISC on.
fn without_disc(to: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || -> io::Result<()> {
        let (mut near, mut far) = (listener.accept()?.0, TcpStream::connect(to)?);
        let (mut replies, mut source) = (far.try_clone()?, near.try_clone()?);
        thread::spawn(move || io::copy(&mut replies, &mut source));
        loop {
            let mut head = [0; 28];
            near.read_exact(&mut head)?;
            let length = u32::from_be_bytes(head[24..].try_into().unwrap());
            let payload = match u16::from_be_bytes(head[6..8].try_into().unwrap()) {
                kind::DISC => break near.shutdown(Shutdown::Both).and(far.shutdown(Shutdown::Both)),
                kind::WRITE => u64::from(length),
                _ => 0,
            };
            far.write_all(&head)?;
            io::copy(&mut Read::by_ref(&mut near).take(payload), &mut far)?;
        }
    });
    address
}

#[test]
fn a_network_that_dies_with_disc_on_its_way() {
    let mut source = Server::serve().content(&pattern(1, SIZE)).start();
    let worker = Worker::on(&source);
    worker.may_end();
    let mut listener = listen(0).size(SIZE as u64).start();
    start_mirror(&source, without_disc(listener.address()), "--unlink");
    assert_eq!(source.process.wait(SOON).code(), Some(0), "{}", source.log());
    assert!(!source.image.exists());
    let line = last_line(&mut listener);
    assert!(line.ends_with(ALL_HERE), "{line}");
    worker.join().check(&listener.image);
}

/// A listener says it of no file that may be anything else.
#[test]
fn only_a_whole_and_durable_image_may_be_the_only_one() {
    type Act<'a> = &'a dyn Fn(&mut Client);
    const SIZE: u64 = 1 << 20;
    let content = pattern(1, SIZE as usize);
    let write = |sender: &mut Client, offset: usize| assert_eq!(sender.write(offset as u64, &content[offset..]), 0);
    let flush = |sender: &mut Client| assert_eq!(sender.flush(), 0);
    let done = |sender: &mut Client| {
        send_image(sender, &content);
        flush(sender);
    };
    let nothing = |_: &mut Client| {};
    let cases: [(&str, bool, Act, Act); 9] = [
        ("all of it, flushed", true, &done, &nothing),
        ("and flushed again", true, &done, &flush),
        ("not flushed", false, &|sender| send_image(sender, &content), &nothing),
        ("flushed by another", false, &|sender| send_image(sender, &content), &flush),
        ("a byte is missing", false, &|sender| (write(sender, 1), flush(sender)).1, &nothing),
        (
            "the last write is not flushed",
            false,
            &|sender| (write(sender, 1), flush(sender), write(sender, 0)).2,
            &nothing,
        ),
        ("written to after that", false, &|sender| (done(sender), write(sender, 512)).1, &nothing),
        ("written to by another", false, &done, &|sender| write(sender, 512)),
        ("trimmed by another", false, &done, &|sender| assert_eq!(sender.ask(kind::TRIM, 0, 0, 4096, &[]), 0)),
    ];
    for (what, expected, first, second) in cases {
        let mut listener = listen(0).size(SIZE).start();
        first(&mut listener.connect());
        wait_for("room", SOON, || (listener.status().number("num_clients") == 0).then_some(()));
        second(&mut listener.connect());
        let line = last_line(&mut listener);
        assert_eq!(line.ends_with(ALL_HERE), expected, "{what}: {line}");
        assert!(line.contains("stopped by a signal before a migration was complete"), "{what}: {line}");
    }
}
