//! What the command line takes and what it refuses.

use super::args::MODES;
use super::*;
use crate::endpoint::{Endpoint, Place};
use std::net::{IpAddr, SocketAddr};

const SERVE: &str = "serve -l 127.0.0.1 -p 4777 -f disk";
const LISTEN: &str = "listen -l 127.0.0.1 -p 4777 -f disk";
const MIRROR: &str = "mirror -l 10.0.0.1 -p 4777 -s ctl";
const READ: &str = "read -l 127.0.0.1 -p 4777 -F 0 -S 512";

fn parsed_words<'a>(words: impl IntoIterator<Item = &'a str>) -> Result<(Verbosity, Job), clap::Error> {
    parse([PROGRAM].into_iter().chain(words).map(OsString::from).collect())
}

fn parsed(line: &str) -> Result<(Verbosity, Job), clap::Error> {
    // A lone `''` stands for an empty argument.
    parsed_words(line.split_whitespace().map(|word| if word == "''" { "" } else { word }))
}

fn job(line: &str) -> Job {
    parsed(line).unwrap_or_else(|error| panic!("{line}: {error}")).1
}

/// What a server with an image is told.
fn image(config: &server::Config) -> &server::Image {
    match &config.backing {
        server::Backing::Image(image) => image,
        server::Backing::Upstream(upstream) => panic!("no image: {upstream:?}"),
    }
}

fn config(line: &str) -> server::Config {
    let Job::Serve(config) = job(line) else { panic!("{line}: no server") };
    *config
}

/// The words a control mode sends, between spaces.
fn words(line: &str) -> String {
    let (sock, words) = match job(line) {
        Job::Control { sock, words } => (sock, words),
        Job::Mirror { sock, migration: Migration { to, words, .. }, .. } => {
            let (addr, port) = to.look_up(None).unwrap()[0].words();
            (sock, ["mirror".into(), addr, port].into_iter().chain(words).collect())
        }
        other => panic!("{line}: {other:?}"),
    };
    assert_eq!(sock, PathBuf::from("ctl"), "{line}");
    words.join(" ")
}

/// Where the server listens for NBD, with the letter of the style: `o` or `n`.
fn doors(line: &str) -> Vec<String> {
    let style = |dialect| if dialect == server::Dialect::Oldstyle { 'o' } else { 'n' };
    let doors = config(line).doors.into_iter().map(|(door, dialect)| match door {
        server::Door::At(endpoint) => format!("{}{endpoint}", style(dialect)),
        server::Door::Passed(passed) => panic!("nothing was passed: {passed:?}"),
    });
    doors.collect()
}

fn target(line: &str) -> Target {
    let (Job::Read(target) | Job::Write(target)) = job(line) else { panic!("{line}: neither read nor write") };
    target
}

/// Asserts exit code 2 and stderr, and returns the message.
fn refused(line: &str) -> String {
    let error = parsed(line).expect_err(line);
    assert_eq!((error.exit_code(), error.use_stderr()), (2, true), "{line}: {error}");
    error.to_string()
}

/// Asserts exit code 0 and stdout, and returns the text.
fn shown(line: &str) -> String {
    let error = parsed(line).expect_err(line);
    assert_eq!((error.exit_code(), error.use_stderr()), (0, false), "{line}: {error}");
    error.to_string()
}

/// Asserts that the message names the option and the value, and the usage of the mode.
#[track_caller]
fn refused_value(line: &str, option: &str, value: &str) {
    let message = refused(line);
    assert!(message.contains(&format!("invalid value '{value}' for '{option}': ")), "{line}: {message}");
}

#[test]
fn the_definitions_are_sound() {
    CommandLine::command().debug_assert();
}

#[test]
fn serve_takes_every_option_in_any_order() {
    let long = "serve 10.0.0.1 --addr 127.0.0.1 --port 4777 --file disk --sock ctl --default-deny --killswitch \
                --max-clients 7 10.0.0.2";
    let short = "serve -k -d -p4777 10.0.0.1 -s ctl 10.0.0.2 --max-clients=7 -l 127.0.0.1 -fdisk";
    let packed = "serve -dkp 4777 -l127.0.0.1 -f disk -sctl --max-clients 7 -- 10.0.0.1 10.0.0.2";
    let roles =
        [("serve", server::Role::Serve { adopt: false }), ("listen", server::Role::Listen { then_serve: false })];
    for (mode, role) in roles {
        for line in [long, short, packed] {
            let line = line.replacen("serve", mode, 1);
            let config = config(&line);
            assert_eq!(doors(&line), ["o127.0.0.1:4777"], "{line}");
            assert_eq!(image(&config).file, Path::new("disk"), "{line}");
            let Some(server::ControlDoor::At(sock)) = &config.control else { panic!("{line}") };
            assert_eq!(sock, Path::new("ctl"), "{line}");
            assert_eq!((config.killswitch_ms, config.max_clients), (Some(120_000), 7), "{line}");
            assert_eq!(image(&config).role, role, "{line}");
        }
    }
}

#[test]
fn listen_may_go_on_as_a_server() {
    for line in
        [format!("{LISTEN} --serve"), LISTEN.replace("listen", "listen --serve"), format!("{LISTEN} --serve ::1")]
    {
        assert_eq!(image(&config(&line)).role, server::Role::Listen { then_serve: true }, "{line}");
    }
    assert!(refused(&format!("{SERVE} --serve")).contains("--serve"));
}

#[test]
fn a_marked_image_is_served_where_that_is_asked_for() {
    assert_eq!(image(&config(&format!("{SERVE} --adopt"))).role, server::Role::Serve { adopt: true });
    assert_eq!(image(&config(&format!("{SERVE} --adopt --read-only"))).role, server::Role::Serve { adopt: true });
    assert!(refused(&format!("{LISTEN} --adopt")).contains("--adopt does not go with listen"));
}

#[test]
fn the_request_limit_comes_from_the_environment() {
    assert_eq!(request_limit_ms(None), Ok(60_000));
    for (value, ms) in [("60", 60_000), ("0.5", 500), ("1.05", 1_050), ("31536000", 31_536_000_000)] {
        assert_eq!(request_limit_ms(Some(OsStr::new(value))), Ok(ms), "{value}");
    }
    for value in ["", "0", "-1", "1e3", "5s", " 5", "inf", "31536001"] {
        let message = request_limit_ms(Some(OsStr::new(value))).expect_err(value);
        let start = format!("invalid value '{value}' for 'FLEXNBD_MS_REQUEST_LIMIT_SECS': expected decimal seconds");
        assert!(message.starts_with(&start), "{message}");
    }
}

#[test]
fn limits_take_suffixes_and_0_is_none() {
    for mode in [SERVE, LISTEN] {
        assert_eq!(config(mode).rates, server::Rates::default());
        assert_eq!(config(&format!("{mode} --max-iops 0")).rates, server::Rates::default());
        let both = config(&format!("{mode} --max-iops 2k --max-bytes-per-second 16777215T")).rates;
        assert_eq!(both, server::Rates { requests: Some(2048), bytes: Some(16_777_215 << 40) });
        for bad in ["", "K", "-1", "+1", "1.5M", "1KB", "16777216T", "18446744073709551616", "1é"] {
            refused_value(&format!("{mode} --max-iops={bad}"), "--max-iops <N>", bad);
        }
    }
    assert!(refused("limit -s ctl").contains("--max-iops <N>"));
}

#[test]
fn serve_has_defaults() {
    let config = config(SERVE);
    assert!(config.control.is_none());
    assert_eq!((config.killswitch_ms, config.max_clients), (None, 100));
    assert_eq!(image(&config).disk_engine, EngineChoice::Auto);
}

#[test]
fn the_disk_engine_is_one_of_three() {
    for (name, choice) in [("auto", EngineChoice::Auto), ("sync", EngineChoice::Sync), ("ring", EngineChoice::Ring)] {
        for mode in [SERVE, LISTEN] {
            assert_eq!(image(&config(&format!("{mode} --disk-engine {name}"))).disk_engine, choice);
        }
    }
    for name in ["", "uring", "Ring", "ring,sync"] {
        let message = refused(&format!("{SERVE} --disk-engine={name}"));
        assert!(message.contains("--disk-engine <ENGINE>") && message.contains("auto, sync, ring"), "{message}");
    }
}

#[test]
fn addresses_come_in_every_form() {
    for (text, address) in [
        ("127.0.0.1", "127.0.0.1:0"),
        ("localhost", "127.0.0.1:0"),
        ("0", "0.0.0.0:0"),
        ("*", "0.0.0.0:0"),
        ("::1", "[::1]:0"),
        ("[::1]", "[::1]:0"),
    ] {
        assert_eq!(doors(&format!("serve -p 0 -f disk --addr {text}")), [format!("o{address}")]);
    }
    assert_eq!(doors("serve -f disk -l /run/nbd"), ["o/run/nbd"]);
    assert_eq!(doors("serve -f disk -l /run/nbd -p 4777"), ["o/run/nbd"]);
    let at = |line: &str| target(line).server;
    assert_eq!(at("read -l /run/nbd -F 0 -S 1"), Place::At(Endpoint::Unix("/run/nbd".into())));
    let named = |host: &str| Place::Named { host: host.into(), port: 4777 };
    for host in ["localhost", "disks.example.org", "node-1", "x."] {
        assert_eq!(at(&format!("write -l {host} -p 4777 -F 0 -S 1")), named(host));
    }
    for text in ["1.2.3", "0x7f", "1.2.3.4.5", "a..b", "-a", "fe80::1%lo", "", ".", "a b"] {
        let words = ["read", "-p", "1", "-F", "0", "-S", "1", "-l", text];
        assert!(parsed_words(words).is_err(), "{text}");
    }
}

/// What people type where an address is wanted, and what they are told.
#[test]
fn addresses_that_are_none_are_told_what_to_write() {
    let conn = "proxy -l 127.0.0.1 -p 4777 --conn-port 4778 --conn-addr";
    for (addr, told) in [
        ("10.0.0.1:4777", "the port goes to --port <PORT>"),
        ("[::1]:4777", "the port goes to --port <PORT>"),
        ("host:4777", "the port goes to --port <PORT>"),
        ("nbd://10.0.0.1:4777", "not an address but a URI; --addr <ADDR> takes the host"),
        ("./x.sock", "the path of a UNIX socket begins with '/'"),
        ("x.sock", "the path of a UNIX socket begins with '/'"),
        ("10.0.0.0/8", "a network; expected one address"),
    ] {
        for line in ["serve -p 1 -f disk", "read -p 1 -F 0 -S 1", "mirror -p 1 -s ctl"] {
            let message = refused(&format!("{line} --addr {addr}"));
            assert!(
                message.contains(&format!("'{addr}' for '--addr <ADDR>': ")) && message.contains(told),
                "{message}"
            );
        }
        let message = refused(&format!("{conn} {addr}"));
        let told = told
            .replace("--port <PORT>", "--conn-port <CONN_PORT>")
            .replace("--addr <ADDR>", "--conn-addr <CONN_ADDR>");
        assert!(message.contains(&told), "{message}");
    }
    assert!(
        refused("serve -p 1 -f disk -l disks.example.org").contains("expected an IP address of this machine, 0 or *")
    );
    assert!(refused("read -p 1 -F 0 -S 1 -l *").contains("expected the address of one server"));
    assert!(refused("mirror -p 1 -s ctl -l /run/nbd").contains("the path of a UNIX socket will not do"));
    assert!(refused("read -l ::1 -p 1 -F 0 -S 1 -b eth0").contains("expected one of this machine"));
}

#[test]
fn entries_that_are_none_are_told_what_to_write() {
    for (entry, told) in [
        ("30", "stands behind '=', as in --killswitch=30"),
        ("/srv/second.img", "another file needs a server of its own"),
        ("Cargo.toml", "another file needs a server of its own"),
        ("10.0.0.1:4777", "an entry has no port"),
        ("localhost", "names are not looked up here"),
        ("vm1.example.org", "names are not looked up here"),
        ("*", "0.0.0.0/0 and ::/0"),
        ("10.0.0.0/33", "from 0 to 32"),
    ] {
        for line in [&format!("{SERVE} -k"), "acl -s ctl"] {
            let message = refused(&format!("{line} {entry}"));
            assert!(message.contains(&format!("'{entry}' for '[ACL_ENTRY]': ")) && message.contains(told), "{message}");
        }
    }
    assert_eq!(words("acl -s ctl [::1] 10.0.0.0/0"), "acl [::1] 10.0.0.0/0");
    assert_eq!(words("acl -s ctl --any"), "acl 0.0.0.0/0 ::/0");
    assert!(refused("acl -s ctl --any ::1").contains("--any"));
    assert!(refused("acl -s ctl").contains("ACL_ENTRY"));
}

/// An option of another mode is not made an entry of the list.
#[test]
fn no_tip_makes_an_option_an_entry() {
    for line in [&format!("{SERVE} --unlink"), "acl -s ctl ::1 --read-only", "proxy --read-only"] {
        let message = refused(line);
        assert!(message.contains("unexpected argument") && !message.contains("-- --"), "{message}");
    }
    assert!(refused(&format!("{SERVE} --kilswitch")).contains("a similar argument exists: '--killswitch'"));
}

#[test]
fn sizes_have_units() {
    let size = |text: &str| target(&READ.replace("512", text)).length;
    for (text, bytes) in [("4k", 4096), ("4K", 4096), ("1M", 1 << 20), ("1G", 1 << 30), ("0", 0), ("0T", 0)] {
        assert_eq!(size(text), bytes, "{text}");
    }
    assert_eq!(target(&READ.replace("-F 0", "-F 4194304T")).offset, 1 << 62);
    assert_eq!(words("mirror-speed -s ctl -m 10M"), "mirror_max_bps 10485760");
    assert_eq!(words(&format!("{MIRROR} -m 1k")), "mirror 10.0.0.1 4777 exit 0 1024");
    for text in
        ["k", "4kb", "4KiB", "4 k", "+4k", "1.5M", "-1M", "4P", "k4", "4kk", "1é", "2G", "18446744073709551615K"]
    {
        let line = READ.split(' ').chain(["-S", text]).filter(|word| *word != "512");
        let line: Vec<_> = line.enumerate().filter(|(n, _)| *n != 7).map(|(_, word)| word).collect();
        let error = parsed_words(line).expect_err(text);
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("with K, M, G or T"), "{error}");
    }
}

#[test]
fn the_killswitch_takes_seconds_only_with_an_equals_sign() {
    for (option, ms) in [
        ("-k", 120_000),
        ("--killswitch", 120_000),
        ("--killswitch=120", 120_000),
        ("--killswitch=0.5", 500),
        ("-k=0.5", 500),
        ("-k=1.05", 1_050),
        ("-k=0.001", 1),
        ("-k=31536000", 31_536_000_000),
    ] {
        assert_eq!(config(&format!("{SERVE} {option}")).killswitch_ms, Some(ms), "{option}");
        assert_eq!(config(&format!("{SERVE} {option} 10.0.0.1")).killswitch_ms, Some(ms), "{option}");
    }
    let bad = ["0", "0.0", "0.0004", "-1", "+1", "1e3", "0x10", "5s", "1.", ".5", ".", "1.2.3", "inf", "NaN"];
    for value in bad.into_iter().chain(["31536000.001", "18446744073709551615", "99999999999999999999"]) {
        refused_value(&format!("{SERVE} --killswitch={value}"), "--killswitch[=<SECONDS>]", value);
    }
    assert!(refused(&format!("{SERVE} --killswitch=")).contains("--killswitch"));
}

#[test]
fn transfers_take_every_option() {
    let expected = Target {
        server: Place::At(Endpoint::Tcp(SocketAddr::from(([127, 0, 0, 1], 4777)))),
        bind: Some(IpAddr::from([127, 0, 0, 2])),
        export: "a disk".into(),
        offset: 1 << 62,
        length: 1 << 30,
    };
    for options in [
        "--addr 127.0.0.1 --port 4777 --from 4611686018427387904 --size 1073741824 --bind 127.0.0.2",
        "-b 127.0.0.2 -S 1073741824 -F 4611686018427387904 -p 4777 -l 127.0.0.1",
    ] {
        for mode in ["read", "write"] {
            let line = format!("{mode} {options}");
            let words = line.split_whitespace().chain(["--export", "a disk"]);
            let (Job::Read(found) | Job::Write(found)) = parsed_words(words).unwrap().1 else { panic!("{line}") };
            assert_eq!(found, expected, "{line}");
        }
    }
    assert_eq!(target(READ).export, "");
    let longest = "x".repeat(4096);
    assert_eq!(target(&format!("{READ} --export {longest}")).export, longest);
    refused_value(&format!("{READ} --export {longest}x"), "--export <NAME>", &format!("{longest}x"));
    refused_value(&format!("{READ} --export a\0"), "--export <NAME>", "a\0");
    assert!(matches!(job(READ), Job::Read(Target { bind: None, offset: 0, length: 512, .. })));
    assert!(matches!(job(&READ.replace("read", "write")), Job::Write(_)));
}

#[test]
fn a_local_address_must_suit_the_remote_one() {
    assert!(refused("read -l /run/nbd -F 0 -S 1 -b 127.0.0.1").contains("--bind <BIND_ADDR> does not go with"));
    assert!(refused(&format!("{READ} -b ::1")).contains("--bind ::1 cannot reach --addr 127.0.0.1"));
    assert!(refused(&format!("{MIRROR} -b ::1")).contains("--bind ::1 cannot reach --addr 10.0.0.1"));
}

#[test]
fn control_modes_become_words() {
    for (line, expected) in [
        ("acl --sock ctl 10.0.0.1 10.0.0.0/8", "acl 10.0.0.1 10.0.0.0/8"),
        ("acl 10.0.0.1 -s ctl 10.0.0.0/8", "acl 10.0.0.1 10.0.0.0/8"),
        ("break --sock ctl", "break"),
        ("mirror-speed --sock ctl --max-speed 1000", "mirror_max_bps 1000"),
        ("mirror-speed -m0 -s ctl", "mirror_max_bps 0"),
        ("limit -s ctl --max-iops 100", "limit max_iops=100"),
        ("limit --max-bytes-per-second=3m -s ctl", "limit max_bytes_per_second=3145728"),
        ("limit --max-iops 0 -s ctl --max-bytes-per-second 2T", "limit max_iops=0 max_bytes_per_second=2199023255552"),
    ] {
        assert_eq!(words(line), expected, "{line}");
    }
}

#[test]
fn mirror_sends_no_argument_that_is_not_needed() {
    for (options, expected) in [
        ("", "exit"),
        ("--unlink", "unlink"),
        ("-u --max-speed 0", "unlink"),
        ("--bind 127.0.0.2", "exit 127.0.0.2"),
        ("--max-speed 1000", "exit 0 1000"),
        ("-m 18446744073709551615 -b 127.0.0.2", "exit 127.0.0.2 18446744073709551615"),
        ("--max-pause 100", "exit max_pause_ms=100"),
        ("--max-pause=0 -u -m 1", "unlink 0 1 max_pause_ms=0"),
        ("--max-pause 60000 -b 127.0.0.2", "exit 127.0.0.2 max_pause_ms=60000"),
        ("--export disk --max-pause 1 -u", "unlink max_pause_ms=1 export=disk"),
        ("--export ''", "exit"),
    ] {
        assert_eq!(words(&format!("{MIRROR} {options}")), format!("mirror 10.0.0.1 4777 {expected}"), "{options}");
    }
    assert_eq!(words("mirror --addr [::1] --port 1 --sock ctl --bind ::1"), "mirror ::1 1 exit ::1");
    assert!(matches!(job(MIRROR), Job::Mirror { wait: false, .. }));
    for option in ["-w", "--wait", "-uw"] {
        assert!(matches!(job(&format!("{MIRROR} {option}")), Job::Mirror { wait: true, .. }), "{option}");
    }
}

#[test]
fn an_export_of_a_mirror_fits_a_line() {
    let longest = "x".repeat(1017);
    assert!(words(&format!("{MIRROR} --export {longest}")).ends_with(&format!("exit export={longest}")));
    refused_value(&format!("{MIRROR} --export {longest}x"), "--export <NAME>", &format!("{longest}x"));
    for (name, fits) in [(" a b=c", true), ("a ", false), ("a\r", false), ("a\nb", false), ("\n", false)] {
        assert_eq!(export_keyword(name).is_ok(), fits, "{name:?}");
    }
}

#[test]
fn status_has_three_forms() {
    for (options, form) in [
        ("", (Notation::Pairs, false)),
        ("--json", (Notation::Json, false)),
        ("--clients", (Notation::Pairs, true)),
        ("--clients --json", (Notation::Json, true)),
        ("--prometheus", (Notation::Prometheus, false)),
    ] {
        let Job::Status { sock, form: found } = job(&format!("status -s ctl {options}")) else { panic!() };
        assert_eq!((sock, (found.notation, found.clients)), ("ctl".into(), form), "{options}");
    }
    for other in ["--json", "--clients"] {
        assert!(refused(&format!("status -s ctl --prometheus {other}")).contains(other));
    }
}

#[test]
fn each_style_has_listeners_of_its_own() {
    let (tcp, new) = ("o127.0.0.1:4777", "nnew");
    for (options, expected) in [
        ("-l 127.0.0.1 -p 4777", vec![tcp]),
        ("-l 127.0.0.1 -p 4777 --newstyle-port 10809", vec![tcp, "n127.0.0.1:10809"]),
        ("-l 127.0.0.1 -p 4777 --newstyle-port 0", vec![tcp, "n127.0.0.1:0"]),
        ("-l 127.0.0.1 -p 4777 --newstyle-sock new", vec![tcp, new]),
        ("-l 127.0.0.1 -p 4777 --newstyle-sock=new --newstyle-port=1", vec![tcp, "n127.0.0.1:1", new]),
        ("-l 0 -p 0 --newstyle-port 0", vec!["o0.0.0.0:0", "n0.0.0.0:0"]),
        ("-l /run/nbd --newstyle-sock new", vec!["o/run/nbd", new]),
        ("-l 127.0.0.1 --newstyle-port 1", vec!["n127.0.0.1:1"]),
        ("-l 127.0.0.1 --newstyle-port 1 --newstyle-sock new", vec!["n127.0.0.1:1", new]),
        ("--newstyle-sock new", vec![new]),
    ] {
        for mode in ["serve -f disk", "listen -f disk", "proxy -C ::1 -P 1"] {
            let line = format!("{mode} {options}");
            let config = match job(&line) {
                Job::Serve(config) => config,
                other => panic!("{other:?}"),
            };
            assert_eq!(config.doors.len(), expected.len(), "{line}");
            if !mode.starts_with("proxy") {
                assert_eq!(doors(&line), expected, "{line}");
            }
        }
    }
    for (options, told) in [
        ("-l /run/nbd --newstyle-port 1", "--newstyle-port <PORT> needs an IP address"),
        ("", "--addr <ADDR> is required"),
        ("-p 1", "--addr <ADDR> is required where a port is given"),
        ("--newstyle-port 1 --newstyle-sock new", "--addr <ADDR> is required where a port is given"),
        ("-l ::1", "--port <PORT> is required, or --newstyle-port <PORT>"),
        ("-l ::1 --newstyle-sock new", "--port <PORT> is required, or --newstyle-port <PORT>"),
        ("--newstyle-sock ctl -s ctl", "--newstyle-sock and --sock are both ctl"),
        ("-l /tmp/nbd --newstyle-sock /tmp/../tmp/nbd", "--addr and --newstyle-sock are both /tmp/nbd"),
        ("--newstyle-sock ''", "--newstyle-sock <PATH>"),
    ] {
        let message = refused(&format!("serve -f disk {options}"));
        assert!(message.contains(told), "{options}: {message}");
    }
    refused_value(&format!("{SERVE} --newstyle-port 4777"), "--newstyle-port <PORT>", "4777");
    refused_value(&format!("{SERVE} --newstyle-port 65536"), "--newstyle-port <PORT>", "65536");
}

#[test]
fn the_last_of_verbose_and_quiet_wins() {
    use Verbosity::{Normal, Quiet, Verbose};
    for (before, after, expected) in [
        ("", "", Normal),
        ("-v", "", Verbose),
        ("", "-v", Verbose),
        ("--quiet", "", Quiet),
        ("", "--quiet", Quiet),
        ("-q", "-v", Verbose),
        ("-v", "-q", Quiet),
        ("-vq", "", Quiet),
        ("-q -v -q -v", "", Verbose),
        ("", "-vvqqv", Verbose),
        ("", "-v -q --verbose --quiet", Quiet),
        ("-v -q", "-q -v", Verbose),
        ("-v -q", "-v -q", Quiet),
        ("-v -v", "-v -v", Verbose),
    ] {
        let control = ["acl -s ctl ::1", "status -s ctl", "break -s ctl", "mirror-speed -s ctl -m 1"];
        for mode in [SERVE, LISTEN, MIRROR, READ].into_iter().chain(control) {
            let line = format!("{before} {mode} {after}");
            assert_eq!(parsed(&line).unwrap().0, expected, "{line}");
        }
    }
    assert_eq!(parsed(&format!("serve -q {} -v", &SERVE[6..])).unwrap().0, Verbose);
}

#[test]
fn missing_options_are_named() {
    for (line, missing) in [
        ("serve -f disk", "--addr <ADDR>"),
        ("serve", "--file <FILE>"),
        ("serve -p 1 -f disk", "--addr <ADDR>"),
        ("serve -l ::1 -p 1", "--file <FILE>"),
        ("serve -l ::1 -f disk", "--port <PORT>"),
        ("read -l ::1 -F 0 -S 1", "--port <PORT>"),
        ("read -p 1 -F 0 -S 1", "--addr <ADDR>"),
        ("read -l ::1 -p 1 -S 1", "--from <OFFSET>"),
        ("write -l ::1 -p 1 -F 0", "--size <SIZE>"),
        ("acl ::1", "--sock <SOCK>"),
        ("acl -s ctl", "<ACL_ENTRY>"),
        ("status", "--sock <SOCK>"),
        ("break", "--sock <SOCK>"),
        ("listen -p 1 -f disk", "--addr <ADDR>"),
        ("listen -l ::1 -f disk", "--port <PORT>"),
        ("mirror -p 1 -s ctl", "--addr <ADDR>"),
        ("mirror -l ::1 -s ctl", "--port <PORT>"),
        ("mirror -l ::1 -p 1", "--sock <SOCK>"),
        ("mirror-speed -s ctl", "--max-speed <BYTES_PER_SECOND>"),
        ("mirror-speed -m 1", "--sock <SOCK>"),
        ("serve -p 1 -f disk -l", "--addr <ADDR>"),
    ] {
        let message = refused(line);
        assert!(message.contains(missing), "{line}: {message}");
        let mode = line.split(' ').next().unwrap();
        let described = message.contains(&format!("Usage: flexnbd {mode}")) || message.contains("--help");
        assert!(described, "{line}: {message}");
    }
}

#[test]
fn unknown_arguments_are_refused() {
    for line in [
        "frobnicate",
        "--frobnicate",
        "serve --frobnicate",
        "serve -x",
        "status -s ctl extra",
        "read -l ::1 -p 1 -F 0 -S 1 extra",
        "status -s ctl -s ctl",
        "serve --from 1",
        "help serve read",
        "help --addr ::1",
    ] {
        assert!(refused(line).contains("--help"), "{line}");
    }
}

#[test]
fn bad_numbers_are_refused() {
    let junk = ["-1", "-x", "+1", "''", "0x10", "1k", "1.5", "1_000", "ten", "99999999999999999999"];
    for (line, option, limit) in [
        ("serve -l ::1 -f disk --port", "--port <PORT>", "65536"),
        ("serve -l ::1 -f disk -p 1 --max-clients", "--max-clients <N>", "1000001"),
        ("serve -l ::1 -f disk -p 1 --max-clients", "--max-clients <N>", "0"),
        ("mirror -l ::1 -s ctl --port", "--port <PORT>", "0"),
        ("mirror -l ::1 -s ctl -p 1 --max-pause", "--max-pause <MS>", "60001"),
        ("mirror -l ::1 -s ctl -p 1 --max-speed", "--max-speed <BYTES_PER_SECOND>", "18446744073709551616"),
        ("mirror-speed -s ctl --max-speed", "--max-speed <BYTES_PER_SECOND>", "18446744073709551616"),
        ("read -l ::1 -F 0 -S 1 --port", "--port <PORT>", "0"),
        ("write -l ::1 -F 0 -S 1 --port", "--port <PORT>", "65536"),
        ("read -l ::1 -p 1 -F 0 --size", "--size <SIZE>", "1073741825"),
        ("write -l ::1 -p 1 -S 0 --from", "--from <OFFSET>", "4611686018427387905"),
    ] {
        let is_size = ["<BYTES_PER_SECOND>", "<SIZE>", "<OFFSET>"].iter().any(|name| option.ends_with(name));
        for value in junk.into_iter().chain([limit]).filter(|value| !is_size || *value != "1k") {
            let shown = if value == "''" { "" } else { value };
            refused_value(&format!("{line} {value}"), option, shown);
            refused_value(&format!("{line}={shown}"), option, shown);
        }
    }
}

#[test]
fn bad_addresses_are_refused() {
    for value in ["1.2.3", "1.2.3.4.5", "300.0.0.1", "::g", "[::1", "1.2.3.4:5", "fe80::1%lo", "./sock"] {
        refused_value(&format!("serve -p 1 -f disk -l {value}"), "--addr <ADDR>", value);
        refused_value(&format!("read -p 1 -F 0 -S 1 -l {value}"), "--addr <ADDR>", value);
        refused_value(&format!("{READ} -b {value}"), "--bind <BIND_ADDR>", value);
        refused_value(&format!("mirror -p 1 -s ctl -l {value}"), "--addr <ADDR>", value);
        refused_value(&format!("{MIRROR} -b {value}"), "--bind <BIND_ADDR>", value);
    }
    refused_value("mirror -p 1 -s ctl -l /run/nbd", "--addr <ADDR>", "/run/nbd");
    refused_value("serve -p 1 -f disk -l ''", "--addr <ADDR>", "");
    refused_value("read -p 1 -F 0 -S 1 -b ::1 -l ''", "--addr <ADDR>", "");
}

#[test]
fn bad_acl_entries_are_refused() {
    for value in ["host", "10.0.0.0/x", "10.0.0.0/", "10.0.0/8", "''"] {
        let shown = if value == "''" { "" } else { value };
        refused_value(&format!("{SERVE} 10.0.0.1 {value}"), "[ACL_ENTRY]", shown);
        let message = refused(&format!("acl -s ctl ::1 {value}"));
        assert!(message.contains("Usage: flexnbd acl"), "{message}");
    }
}

#[test]
fn empty_paths_are_refused() {
    assert!(refused("serve -l ::1 -p 1 -f ''").contains("--file <FILE>"));
    assert!(refused("status -s ''").contains("--sock <SOCK>"));
}

#[test]
fn help_comes_in_all_forms() {
    let whole = shown("help");
    assert_eq!([shown("--help"), shown("-h"), shown("help -q -v"), shown("-v help")], [(); 4].map(|()| whole.clone()));
    for expected in ["Exit codes:", "--verbose", "--quiet", "--help", "flexnbd help MODE"] {
        assert!(whole.contains(expected), "{expected}");
    }
    for mode in MODES {
        assert!(whole.contains(&format!("\n  {mode} ")), "{mode}");
        let text = shown(&format!("help {mode}"));
        assert!(text.contains(&format!("Usage: flexnbd {mode}")) && text.contains("Example"), "{text}");
        assert!(text.contains("--verbose") && text.contains("--quiet") && text.contains("--help"), "{text}");
        for line in [
            format!("{mode} --help"),
            format!("{mode} -h"),
            format!("-q {mode} -v -h"),
            format!("help {mode} -v"),
            format!("help -q {mode}"),
            format!("-v help {mode}"),
        ] {
            assert_eq!(shown(&line), text, "{line}");
        }
    }
}

#[test]
fn help_fits_a_terminal() {
    for mode in MODES.into_iter().chain([""]) {
        for line in shown(&format!("help {mode}")).lines() {
            assert!(line.len() <= 80, "{mode}: {line}");
        }
    }
}

#[test]
fn help_knows_all_modes_and_no_others() {
    assert_eq!(CommandLine::command().get_subcommands().map(clap::Command::get_name).collect::<Vec<_>>(), MODES);
    for (mode, value) in [("frobnicate", "frobnicate"), ("''", ""), ("-- -v", "-v"), ("-- --version", "--version")] {
        let message = refused(&format!("help {mode}"));
        assert!(value.is_empty() || message.contains(&format!("invalid value '{value}' for '[MODE]'")), "{message}");
        assert!(MODES.iter().all(|mode| message.contains(mode)), "{message}");
    }
}

#[test]
fn no_mode_gets_help_on_stderr() {
    assert_eq!(refused(""), refused("-v -q"));
    assert!(refused("").contains("Exit codes:"));
}

#[test]
fn the_version_is_shown() {
    assert_eq!(shown("--version"), format!("flexnbd {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_program_of_the_proxy_is_a_program_of_its_own() {
    let args = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
    assert!(is_proxy(&args("/usr/bin/flexnbd-proxy")) && is_proxy(&args("flexnbd-proxy -v")));
    assert!(!is_proxy(&args("flexnbd")) && !is_proxy(&args("flexnbd flexnbd-proxy")) && !is_proxy(&[]));
    let answer = |line| parse_proxy(args(line)).expect_err(line).to_string();
    let (help, mode) = (answer("flexnbd-proxy --help"), shown("help proxy"));
    assert!(help.contains("Usage: flexnbd-proxy --conn-addr <CONN_ADDR> --conn-port <CONN_PORT>"), "{help}");
    assert!(help.contains("\n  flexnbd-proxy --addr ") && !help.contains("flexnbd proxy "), "{help}");
    let options = |text: &str| text.matches("\n  -").count();
    assert_eq!(options(&help), options(&mode) + 1, "the version is asked of the program");
    assert!(help.lines().all(|line| line.len() <= 80), "{help}");
    assert_eq!(answer("flexnbd-proxy -V"), format!("flexnbd-proxy {}\n", env!("CARGO_PKG_VERSION")));
    for line in ["flexnbd-proxy -l ::1 -p 1", "flexnbd-proxy -l ::1 -p 1 -C nobody:1 -P 1", "flexnbd-proxy proxy"] {
        let message = answer(line);
        assert!(message.contains("Usage: flexnbd-proxy ") && message.contains("error: "), "{line}: {message}");
    }
    let (verbosity, job) = parse_proxy(args("flexnbd-proxy -q -l /run/nbd -C ::1 -P 4777 -v")).unwrap();
    assert!(verbosity == Verbosity::Verbose && matches!(job, Job::Serve(_)), "{job:?}");
}
