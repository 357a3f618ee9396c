//! TLS as the README recommends it: nbdkit stands in front, and hands on what it has decrypted.

use crate::support::{has, pattern, program, run_command, wait_for, Need, Process, Server, SOON};
use std::fs;

#[test]
fn nbdkit_in_front_encrypts() {
    if !has(&[Need::Program("nbdkit"), Need::Program("nbdinfo"), Need::Program("nbdcopy")]) {
        return;
    }
    let built_with_tls = run_command(program("nbdkit").arg("--dump-config"), &[]);
    if !String::from_utf8_lossy(&built_with_tls.stdout).contains("tls=yes") {
        return crate::support::not_tested("this nbdkit has no TLS");
    }
    let builder = Server::serve().content(&pattern(1, 1 << 20));
    let (inner, outer, keys) = (builder.dir().join("inner"), builder.dir().join("outer"), builder.dir().join("keys"));
    let server = builder.arg("--newstyle-sock").arg(&inner).start();
    fs::write(&keys, format!("vm1:{}\n", "5a".repeat(32))).unwrap();
    let mut command = program("nbdkit");
    command.args(["--foreground", "--exit-with-parent", "--tls=require"]).arg(format!("--tls-psk={}", keys.display()));
    command.arg("--unix").arg(&outer).arg("nbd").arg(format!("socket={}", inner.display()));
    let _front = Process::spawn(&mut command);
    wait_for("a socket", SOON, || outer.exists().then_some(()));

    let uri =
        |scheme: &str, user: &str, more: &str| format!("{scheme}+unix://{user}/?socket={}{more}", outer.display());
    let key = format!("&tls-psk-file={}", keys.display());
    let with_key = uri("nbds", "vm1@", &key);
    let info = run_command(program("nbdinfo").arg(&with_key), &[]);
    let text = String::from_utf8_lossy(&info.stdout);
    assert!(info.code == Some(0) && text.contains("with TLS") && text.contains("export-size: 1048576"), "{info:?}");
    let copy = server.dir().join("copy");
    let copied = run_command(program("nbdcopy").arg(&with_key).arg(&copy), &[]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    assert!(fs::read(&copy).unwrap() == pattern(1, 1 << 20), "what was read is the image");
    fs::write(&copy, pattern(2, 1 << 20)).unwrap();
    let copied = run_command(program("nbdcopy").arg("--flush").arg(&copy).arg(&with_key), &[]);
    assert_eq!(copied.code, Some(0), "{copied:?}");
    assert!(fs::read(&server.image).unwrap() == pattern(2, 1 << 20), "what was written is in the image");

    // Nobody gets in who does not encrypt, or has another key.
    let others = server.dir().join("others");
    fs::write(&others, format!("vm1:{}\n", "a5".repeat(32))).unwrap();
    let wrong_key = format!("&tls-psk-file={}", others.display());
    for uri in [uri("nbd", "", ""), uri("nbds", "vm1@", &wrong_key)] {
        let refused = run_command(program("nbdinfo").arg(&uri), &[]);
        assert!(
            refused.code == Some(1) && !String::from_utf8_lossy(&refused.stdout).contains("export-size"),
            "{uri}: {refused:?}"
        );
    }
    server.expect_healthy();
}
