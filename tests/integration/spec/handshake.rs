//! The handshake, byte for byte ("Handshake phase").

use crate::support::newstyle::{
    address, allocation_context, context_data, ends, export_info, info_data, opt, option, option_head, rep, serve,
    serve_content, string, try_send, Haggler, Structured, BLOCK_STATUS, FLAGS, FLAG_DF,
};
use crate::support::{errno, greeting, kind, pattern, request, uninterrupted, wait_for, Client, SOON};
use std::net::TcpStream;
use std::time::Duration;

const SIZE: u64 = 1 << 20;
/// Long enough for a server that wants to say more.
const A_MOMENT: Duration = Duration::from_millis(50);

/// "Newstyle negotiation", "Handshake flags".
#[test]
fn the_greeting_and_its_flags() {
    let server = serve(SIZE);
    let mut client = Client::new(TcpStream::connect(address(&server)).unwrap());
    assert_eq!(client.read_bytes(18), b"NBDMAGICIHAVEOPT\0\x03", "fixed newstyle, no zeroes");
    client.expect_silence(A_MOMENT);
    let oldstyle = server.connect_bare().read_greeting();
    assert_eq!(oldstyle[24..26], [0, 0], "no handshake flags in oldstyle");
    server.expect_healthy();
}

/// "Client flags".
#[test]
fn unknown_client_flags_end_the_connection() {
    let server = serve(SIZE);
    let mut other = Haggler::new(&server);
    for bit in 2..32 {
        for known in [0, 3] {
            let mut haggler = Haggler::with_flags(address(&server), 1 << bit | known);
            haggler.client.expect_closed();
        }
    }
    // What was offered may be taken, each by itself.
    for flags in 0..4 {
        Haggler::with_flags(address(&server), flags).expect_in_step();
    }
    other.expect_in_step();
    server.expect_healthy();
}

/// "Client flags", "Fixed newstyle negotiation".
#[test]
fn without_fixed_newstyle_export_name_is_enough() {
    let server = serve_content(&pattern(1, SIZE as usize));
    let mut haggler = Haggler::with_flags(address(&server), 0);
    haggler.client.send(&option(opt::EXPORT_NAME, b""));
    let answer = haggler.client.read_bytes(134);
    assert_eq!(answer[..10], [SIZE.to_be_bytes().as_slice(), &FLAGS.to_be_bytes()].concat());
    assert_eq!(answer[10..], [0; 124]);
    assert_eq!(haggler.client.read(0, 512).unwrap(), pattern(1, 512));
    // TLS stays off.
    let mut haggler = Haggler::with_flags(address(&server), 0);
    haggler.expect(opt::STARTTLS, &[], rep::ERR_UNSUP);
    haggler.expect_in_step();
    server.expect_healthy();
}

/// "Oldstyle negotiation".
#[test]
fn oldstyle_is_152_bytes_and_no_more() {
    let server = serve(SIZE);
    let mut client = server.connect_bare();
    let flags = u32::from(FLAGS & !(1024 | 2048));
    assert_eq!(client.read_greeting(), greeting(SIZE, flags));
    client.expect_silence(A_MOMENT);
    client.expect_alive();
    server.expect_healthy();
}

/// "Newstyle negotiation": `NBD_OPT_EXPORT_NAME`.
#[test]
fn export_name_is_answered_with_or_without_zeroes() {
    let server = serve_content(&pattern(2, SIZE as usize));
    for (flags, zeroes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let mut haggler = Haggler::with_flags(address(&server), flags);
        haggler.client.send(&option(opt::EXPORT_NAME, b""));
        let expected = [SIZE.to_be_bytes().as_slice(), &FLAGS.to_be_bytes(), &vec![0; zeroes]].concat();
        assert_eq!(haggler.client.read_bytes(10 + zeroes), expected);
        haggler.client.expect_silence(A_MOMENT);
        assert_eq!(haggler.client.read(7, 100).unwrap(), pattern(2, 107)[7..]);
    }
    // With structured replies there is one more flag, and READs come in chunks.
    let mut haggler = Haggler::new(&server).structured();
    haggler.client.send(&option(opt::EXPORT_NAME, b""));
    assert_eq!(haggler.client.read_bytes(10)[8..], (FLAGS | FLAG_DF).to_be_bytes());
    let mut client = Structured { client: haggler.client };
    assert_eq!(client.read(0, 0, 512).unwrap().0, pattern(2, 512));
    server.expect_healthy();
}

/// "Option types": `NBD_OPT_EXPORT_NAME`.
#[test]
fn export_name_of_an_unknown_export_ends_the_connection() {
    let server = serve(SIZE);
    for name in [&b"x"[..], b"default", b"\0", b" ", b"\xff\xfe", &[b'n'; 4096], &[b'n'; 4097]] {
        let mut haggler = Haggler::new(&server);
        haggler.client.send(&option(opt::EXPORT_NAME, name));
        haggler.client.expect_closed();
    }
    server.expect_healthy();
}

/// "Fixed newstyle negotiation", "Baseline".
#[test]
fn an_unknown_option_is_answered_and_its_data_consumed() {
    let server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    for unknown in [0, 4, 11, 12, 99, 1 << 31, u32::MAX] {
        for length in [0, 1, 100, 4096, 8192, 8193, 65_536] {
            // Its data looks like options.
            let mut data = option(opt::ABORT, &[]).repeat(length / 16 + 1);
            data.truncate(length);
            haggler.expect(unknown, &data, rep::ERR_UNSUP);
        }
        haggler.expect_in_step();
        haggler = Haggler::new(&server);
    }
    server.expect_healthy();
}

/// "Option types": `NBD_OPT_LIST`, `NBD_OPT_STRUCTURED_REPLY`, `NBD_OPT_STARTTLS`.
#[test]
fn data_where_none_is_allowed_is_invalid() {
    let server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    for length in [1, 4, 8, 100, 8192] {
        for option in [opt::LIST, opt::STRUCTURED_REPLY, opt::STARTTLS] {
            haggler.expect(option, &vec![0; length], rep::ERR_INVALID);
        }
        haggler.expect_in_step();
    }
    assert_eq!(haggler.info(opt::INFO).1 & FLAG_DF, 0, "nothing was agreed on");
    server.expect_healthy();
}

/// "Option types": `NBD_OPT_ABORT`.
#[test]
fn abort_is_acknowledged() {
    let server = serve(SIZE);
    for data in [&b""[..], b"bye", &[1; 4096]] {
        let mut haggler = Haggler::new(&server);
        haggler.expect(opt::ABORT, data, rep::ACK);
        haggler.client.expect_closed();
        // Some do not wait.
        let mut haggler = Haggler::new(&server);
        haggler.client.send(&option(opt::ABORT, data));
    }
    // Abrupt ends leave nothing behind.
    for bytes in [&b"IHAVE"[..], b"IHAVEOPT\0\0\0\x03\0\0\0\x09half", b""] {
        Haggler::new(&server).client.send(bytes);
    }
    wait_for("all gone", SOON, || (server.status().number("num_clients") == 0).then_some(()));
    server.expect_healthy();
}

/// "Option types": `NBD_OPT_LIST`; "Option reply types": `NBD_REP_SERVER`.
#[test]
fn list_names_the_one_export() {
    let server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    // The length of the name, which is empty, and nothing behind it.
    for _ in 0..3 {
        assert_eq!(haggler.ask(opt::LIST, &[]), (vec![(rep::SERVER, vec![0; 4])], rep::ACK));
    }
    server.expect_healthy();
}

/// "Option types": `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[test]
fn the_lengths_in_go_and_info_must_match() {
    let server = serve(SIZE);
    for option in [opt::INFO, opt::GO] {
        let mut haggler = Haggler::new(&server);
        for length in 0..6 {
            haggler.expect(option, &vec![0; length], rep::ERR_INVALID);
        }
        let with_counts = |name_length: u32, name: &[u8], infos: u16, rest: usize| {
            [&name_length.to_be_bytes(), name, &infos.to_be_bytes(), &vec![0; rest]].concat()
        };
        for (name_length, name, infos, rest) in [
            (1, &b""[..], 0, 0),
            (3, b"", 0, 0),
            (u32::MAX, b"", 0, 0),
            (u32::MAX - 5, b"abc", 0, 8),
            (4, b"abc", 0, 0),
            (2, b"abc", 0, 0),
            (0, b"", 1, 0),
            (0, b"", 1, 1),
            (0, b"", 1, 3),
            (0, b"", 0, 1),
            (0, b"", 0, 2),
            (0, b"", 2, 2),
            (0, b"", u16::MAX, 2),
            (0, b"", 0x8000, 0),
        ] {
            haggler.expect(option, &with_counts(name_length, name, infos, rest), rep::ERR_INVALID);
        }
        haggler.expect_in_step();
    }
    server.expect_healthy();
}

/// "Option types": `NBD_OPT_GO`; "Option reply types": `NBD_REP_INFO`.
#[test]
fn go_brings_the_size_and_no_zeroes() {
    let server = serve_content(&pattern(3, SIZE as usize));
    for flags in [1, 3] {
        let mut haggler = Haggler::with_flags(address(&server), flags);
        assert_eq!(haggler.info(opt::GO), (SIZE, FLAGS), "unasked");
        haggler.client.expect_silence(A_MOMENT);
        assert_eq!(haggler.client.read(0, 512).unwrap(), pattern(3, 512));
    }
    // Asked for, it comes once all the same.
    let mut haggler = Haggler::new(&server);
    let (found, last) = haggler.ask(opt::GO, &info_data(b"", &[0]));
    assert_eq!((found, last), (vec![(rep::INFO, export_info(SIZE, FLAGS))], rep::ACK));
    server.expect_healthy();
}

/// "Option types": `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[test]
fn info_says_what_go_says() {
    for size in [512, 4096, SIZE, (5 << 30) + 512] {
        // Less than a sector is not served, and not announced.
        let server = serve(size + 100);
        for structured in [false, true] {
            let mut haggler = Haggler::new(&server);
            if structured {
                haggler = haggler.structured();
            }
            let flags = FLAGS | if structured { FLAG_DF } else { 0 };
            assert_eq!(haggler.info(opt::INFO), (size, flags), "the real size");
            assert_eq!(haggler.info(opt::GO), (size, flags));
        }
    }
}

/// "Option types": `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[test]
fn an_unknown_name_is_an_answer_and_unknown_infos_are_ignored() {
    let server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    for option in [opt::INFO, opt::GO] {
        for name in [&b"x"[..], b"default", b"/", "größe".as_bytes()] {
            haggler.expect(option, &info_data(name, &[3]), rep::ERR_UNKNOWN);
        }
        haggler.expect_in_step();
    }
    let unknown = [1, 2, 4, 5, 0x8000, u16::MAX];
    let (found, last) = haggler.ask(opt::GO, &info_data(b"", &unknown));
    assert_eq!((&found[0], last), (&(rep::INFO, export_info(SIZE, FLAGS)), rep::ACK));
    assert_eq!(found.len(), 1);
    haggler.client.expect_alive();
    server.expect_healthy();
}

/// "Conventions".
#[test]
fn names_of_all_lengths() {
    let server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    let data = |option: u32, name: &[u8]| match option {
        opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => context_data(name, &["base:allocation"]),
        _ => info_data(name, &[]),
    };
    haggler.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
    for option in [opt::INFO, opt::GO, opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        for length in [1, 255, 256, 257, 4096] {
            haggler.expect(option, &data(option, &vec![b'n'; length]), rep::ERR_UNKNOWN);
        }
        for name in [&[b'n'; 4097][..], &[b'n'; 8000], b"nul\0", b"\0", b"\xc3", b"\xff\xff"] {
            let (before, last) = haggler.ask(option, &data(option, name));
            assert!(before.is_empty() && [rep::ERR_INVALID, rep::ERR_TOO_BIG].contains(&last), "{last:#x}");
        }
        let mut lying = data(option, b"name");
        lying[..4].fill(0xff);
        haggler.expect(option, &lying, rep::ERR_INVALID);
    }
    assert_eq!(haggler.info(opt::GO), (SIZE, FLAGS | FLAG_DF), "the empty name is the default export");
    server.expect_healthy();
}

/// "Option reply types": errors.
#[test]
fn error_texts_are_short_whatever_was_asked() {
    let server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    haggler.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
    let name = "x".repeat(4096);
    for (kind, data) in [
        (opt::INFO, info_data(name.as_bytes(), &[])),
        (opt::GO, info_data(&name.as_bytes()[1..], &[3])),
        (opt::SET_META_CONTEXT, context_data(name.as_bytes(), &["x"])),
        (opt::LIST_META_CONTEXT, context_data(b"x", &[&name])),
        (0x00ff_ffff, name.clone().into_bytes()),
        (opt::LIST, name.clone().into_bytes()),
    ] {
        haggler.client.send(&option(kind, &data));
        let (reply, text) = haggler.reply(kind);
        assert!(reply >> 31 == 1 && text.len() <= 4096, "{reply:#x}: {} bytes", text.len());
    }
    // A query may be as long as a name, and brings nothing that depends on it.
    let (before, last) = haggler.ask(opt::LIST_META_CONTEXT, &context_data(b"", &[&name, &name[..3000]]));
    assert_eq!((before, last), (vec![], rep::ACK));
    haggler.expect_in_step();
    server.expect_healthy();
}

/// "Option reply types": `NBD_REP_ERR_TOO_BIG`.
#[test]
fn huge_options_cost_nothing() {
    let server = serve(SIZE);
    let mut other = Haggler::new(&server);
    let before = server.memory_kib("VmHWM:");
    for kind in [1, 2, 3, 5, 6, 7, 8, 9, 10, 99] {
        for length in [(64 << 10) + 1, 1 << 20, 32 << 20, 1 << 31, u32::MAX] {
            let mut haggler = Haggler::new(&server);
            haggler.client.send(&option_head(kind, length));
            // It may hang up before it has seen much of it, and must not read all of it.
            for _ in 0..64 {
                if !try_send(&mut haggler.client, &[0; 4096]) {
                    break;
                }
            }
            assert!(ends(&mut haggler.client), "option {kind} of {length} bytes");
        }
        other.expect_in_step();
    }
    // What is only somewhat too long is answered, and then the next option.
    for kind in [2, 3, 6, 7, 8, 9, 10] {
        let mut haggler = Haggler::new(&server);
        haggler.expect(kind, &vec![0; 8193], rep::ERR_TOO_BIG);
        haggler.expect(kind, &vec![0; 65_536], rep::ERR_TOO_BIG);
        haggler.expect_in_step();
    }
    let grown = server.memory_kib("VmHWM:") - before;
    assert!(grown <= 2 << 10, "{grown} KiB more");
    server.expect_healthy();
}

/// "Option types"; how often a client may repeat itself is left open by the specification.
#[test]
fn options_may_not_be_repeated_for_ever() {
    let server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    haggler.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
    haggler.expect(opt::STRUCTURED_REPLY, &[], rep::ERR_INVALID);
    assert_eq!(haggler.info(opt::INFO).1, FLAGS | FLAG_DF, "the first one holds");
    for _ in 0..60 {
        haggler.expect(99, &[], rep::ERR_UNSUP);
    }
    // A sensible number passes, a thousand do not; those in time are answered.
    let mut haggler = Haggler::new(&server);
    try_send(&mut haggler.client, &option(opt::LIST, &[]).repeat(1000));
    let answered = haggler.client.read_to_close().len();
    assert!(answered <= 100 * 44, "{answered} bytes of answers");
    let mut haggler = Haggler::new(&server);
    let answered = (0..1000)
        .take_while(|_| {
            try_send(&mut haggler.client, &option(99, &[]))
                && uninterrupted(|| haggler.client.stream.peek(&mut [0])).is_ok_and(|n| n > 0)
                && {
                    haggler.reply(99);
                    true
                }
        })
        .count();
    assert!((32..200).contains(&answered), "{answered} were answered");
    server.expect_healthy();
}

/// "TLS support".
#[test]
fn tls_is_refused_and_never_required() {
    let server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    for _ in 0..2 {
        let (before, last) = haggler.ask(opt::STARTTLS, &[]);
        assert!(before.is_empty() && [rep::ERR_UNSUP, rep::ERR_POLICY].contains(&last), "{last:#x}");
    }
    haggler.expect(opt::STARTTLS, b"x", rep::ERR_INVALID);
    // Every other option goes on in clear; none asks for TLS.
    for kind in [2_u32, 3, 4, 6, 8, 9, 10, 99] {
        let mut haggler = Haggler::new(&server);
        haggler.expect(opt::STARTTLS, &[], rep::ERR_UNSUP);
        haggler.ask(kind, &[]);
    }
    haggler.go().expect_alive();
    server.expect_healthy();
}

/// "Option reply types": `NBD_INFO_BLOCK_SIZE`; "Size constraints".
#[test]
fn block_sizes() {
    let server = serve(SIZE);
    for option in [opt::INFO, opt::GO] {
        let mut haggler = Haggler::new(&server);
        let (found, last) = haggler.ask(option, &info_data(b"", &[3, 0, 3, 9]));
        assert_eq!(last, rep::ACK);
        let sizes: Vec<_> = found.iter().filter(|(_, data)| data[..2] == [0, 3]).collect();
        assert_eq!((found.len(), sizes.len()), (2, 1), "once, however often it was asked for");
        let data = &sizes[0].1;
        assert_eq!(data.len(), 14);
        let [min, preferred, max] = [2, 6, 10].map(|at| u32::from_be_bytes(data[at..at + 4].try_into().unwrap()));
        assert_eq!((min, preferred, max), (1, 4096, 32 << 20));
        assert!(min.is_power_of_two() && min <= 65_536 && SIZE % u64::from(min) == 0);
        assert!(preferred.is_power_of_two() && preferred >= min.max(512));
        assert!(max >= preferred && max >= 1 << 20 && max % min == 0);
    }
    server.expect_healthy();
}

/// "Size constraints".
#[test]
fn who_does_not_ask_for_block_sizes_may_have_any() {
    let content = pattern(4, 40 << 20);
    let server = serve_content(&content);
    // With and without having been told, and through both doors.
    let mut told = Haggler::new(&server);
    told.ask(opt::GO, &info_data(b"", &[3]));
    for mut client in [Haggler::new(&server).go(), told.client] {
        for (offset, length) in [(0, 1), (1, 1), (511, 3), (4095, 2), (65_537, 99_999), (7, 32 << 20)] {
            let read = client.read(offset, length).unwrap();
            assert!(read == content[offset as usize..][..length as usize], "{length} bytes at {offset}");
            assert_eq!(client.write(offset, &read), 0);
        }
        assert!(client.read(0, 40 << 20).unwrap() == content, "more than was announced");
    }
    server.expect_healthy();
}

/// "Option types": `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[test]
fn contexts_take_structured_replies_and_honest_lengths() {
    let server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    for option in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        haggler.expect(option, &context_data(b"", &["base:allocation"]), rep::ERR_INVALID);
    }
    haggler.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
    for option in [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        for length in 0..8 {
            haggler.expect(option, &vec![0; length], rep::ERR_INVALID);
        }
        let queries = |count: u32, rest: &[u8]| [&[0; 4], count.to_be_bytes().as_slice(), rest].concat();
        let good = string(b"base:allocation");
        for (what, data) in [
            ("a query past the end", queries(1, &[0, 0, 0, 1])),
            ("a length past the end", queries(1, &[0, 0, 0])),
            ("the longest query", queries(1, &[0xff; 4])),
            ("a query that is nearly there", queries(1, &good[..good.len() - 1])),
            ("one query too few", queries(2, &good)),
            ("one query too many", queries(1, &good.repeat(2))),
            ("as many as can be", queries(u32::MAX, &good)),
            ("a byte behind them", queries(1, &[good.as_slice(), &[0]].concat())),
            ("a name past the end", [&99_u32.to_be_bytes(), good.as_slice()].concat()),
        ] {
            let (before, last) = haggler.ask(option, &data);
            assert_eq!((before, last), (vec![], rep::ERR_INVALID), "{what}");
        }
        haggler.expect_in_step();
        if option == opt::LIST_META_CONTEXT {
            haggler = Haggler::new(&server);
            haggler.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
        }
    }
    server.expect_healthy();
}

/// "Metadata querying", "The `base:` metadata namespace".
#[test]
fn which_queries_find_the_context() {
    let server = serve(SIZE);
    let mut haggler = Haggler::new(&server);
    haggler.expect(opt::STRUCTURED_REPLY, &[], rep::ACK);
    let both = [opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT];
    let list_only = [opt::LIST_META_CONTEXT];
    for (queries, finding) in [
        (&[][..], &list_only[..]),
        (&["base:"], &list_only),
        (&["base:allocation"], &both),
        (&["qemu:dirty-bitmap:x", "base:allocation", "x:y"], &both),
        (&["base:allocation", "base:allocation"], &both),
        (&["base:allocation:"], &[]),
        (&["base:alloc"], &[]),
        (&["base"], &[]),
        (&[""], &[]),
        (&["qemu:"], &[]),
        (&["x:allocation", "größe:"], &[]),
    ] {
        for option in both {
            let (found, last) = haggler.ask(option, &context_data(b"", queries));
            let expected = vec![(rep::META_CONTEXT, allocation_context()); usize::from(finding.contains(&option))];
            assert_eq!((found, last), (expected, rep::ACK), "{queries:?} in option {option}");
        }
    }
    server.expect_healthy();
}

/// "Option types": `NBD_OPT_SET_META_CONTEXT`.
#[test]
fn each_set_replaces_the_one_before() {
    let server = serve(SIZE);
    let good = context_data(b"", &["base:allocation"]);
    for (what, second, reply) in [
        ("none", context_data(b"", &[]), rep::ACK),
        ("others only", context_data(b"", &["x:y"]), rep::ACK),
        ("a wildcard", context_data(b"", &["base:"]), rep::ACK),
        ("another export", context_data(b"x", &["base:allocation"]), rep::ERR_UNKNOWN),
        ("garbage", vec![0xff; 9], rep::ERR_INVALID),
        ("too long", vec![0; 9000], rep::ERR_TOO_BIG),
    ] {
        let mut haggler = Haggler::new(&server).structured();
        haggler.expect(opt::SET_META_CONTEXT, &second, reply);
        let mut client = Structured { client: haggler.go() };
        assert_eq!(client.block_status(0, 0, 512), Err(errno::EINVAL), "{what}");
        client.expect_alive();
        // And it can be set again.
        let mut haggler = Haggler::new(&server).structured();
        haggler.expect(opt::SET_META_CONTEXT, &second, reply);
        assert_eq!(haggler.ask(opt::SET_META_CONTEXT, &good).1, rep::ACK);
        Structured { client: haggler.go() }.block_status(0, 0, 512).unwrap();
    }
    // LIST changes nothing.
    let mut haggler = Haggler::new(&server).structured();
    haggler.expect(opt::LIST_META_CONTEXT, &context_data(b"x", &["x:"]), rep::ERR_UNKNOWN);
    haggler.expect(opt::LIST_META_CONTEXT, &context_data(b"", &["x:"]), rep::ACK);
    Structured { client: haggler.go() }.block_status(0, 0, 512).unwrap();
    // Without structured replies there is nothing to ask for.
    let mut client = Haggler::new(&server).go();
    client.send(&request(BLOCK_STATUS, 0, 1, 0, 512));
    assert_eq!(client.read_reply(), (errno::EINVAL, 1));
    assert_eq!(client.ask(kind::FLUSH, 0, 0, 0, &[]), 0);
    server.expect_healthy();
}
