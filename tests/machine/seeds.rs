//! Replays what the fuzzers start from, `fuzz/seeds`, without a fuzzer.
//!
//! The seeds are made here, so that they follow the protocol when it grows: `FLEXNBD_WRITE_SEEDS=1` writes them anew.
//! `make fuzz-seeds` adds to their folder what a fuzzer has found, under other names, and it is replayed like the rest.

use crate::newstyle::{contexts, everything, option, option_reply, Talk};
use crate::oracles::{acl, client, control, haggling, newstyle_session, session, upstream, CHOICES};
use crate::plan::{head, Plan};
use crate::scripts::short;
use flexnbd::buffer::SLICE;
use flexnbd::proto::wire::{kind, option as opt, ChunkHead, Greeting, SimpleReply, CHUNK_LEN};
use std::fs;
use std::path::PathBuf;

/// An entry point, its name, and its seeds.
type Target = (&'static str, fn(&[u8]), Vec<Vec<u8>>);

/// Names the input that does not pass.
struct Replayed(PathBuf);

impl Drop for Replayed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("it was {}", self.0.display());
        }
    }
}

/// Choices unlike each other: a little of everything.
const MIXED: [u8; CHOICES] = [2, 0, 7, 30, 9, 1, 0x82, 55, 6, 0, 13, 4, 91, 3, 200, 10];
/// Choices that let the disk fail often.
const FAILING: [u8; CHOICES] = [0, 1, 3, 0xFF, 7, 0xFF, 2, 1, 0xFF, 11, 20, 3, 0xFF, 0, 1, 0xFF];

/// Choices of a client that takes hardly any answer, of a server without a pool.
const SILENT: [u8; CHOICES] = [0, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3];

fn input(choices: [u8; CHOICES], rest: &[u8]) -> Vec<u8> {
    [&choices, rest].concat()
}

fn sessions() -> Vec<Vec<u8>> {
    let mut long = Plan::new(0);
    for (kind, length) in [(kind::READ, 500_000), (kind::FLUSH, 0), (kind::WRITE_ZEROES, 400_000), (kind::TRIM, 70_000)]
    {
        long.stream.extend(head(kind, 1, 777, length).encode());
    }
    long.stream.extend(head(kind::WRITE, 1, 4000, 500_000).encode());
    let streams = short().into_iter().chain([long]).map(|plan| plan.stream);
    streams.flat_map(|stream| [[0; CHOICES], MIXED, FAILING].map(|choices| input(choices, &stream))).collect()
}

/// What newstyle servers say, with the replies to what is asked then.
fn negotiations() -> Vec<Vec<u8>> {
    let enter = |flags: u16, said: &[&[u8]]| [b"NBDMAGICIHAVEOPT", &flags.to_be_bytes()[..], &said.concat()].concat();
    let export = [&4096_u64.to_be_bytes()[..], &[0, 13]].concat();
    let info = option_reply(opt::GO, 3, &[&[0, 0], export.as_slice()].concat());
    let name = option_reply(opt::GO, 3, b"\0\x01disk");
    let ack = option_reply(opt::GO, 1, &[]);
    let unknown = option_reply(opt::GO, 0x8000_0001, b"what is GO?");
    let replies = [1, 2, 3].map(|cookie| SimpleReply { error: 5, cookie }.encode()).concat();
    vec![
        enter(3, &[&info, &name, &ack, &replies]),
        enter(1, &[&info, &ack, &replies]),
        enter(3, &[&unknown, &export, &replies]),
        enter(1, &[&unknown, &export, &[0; 124], &replies]),
        enter(0, &[&export, &[0; 124], &replies]),
        enter(3, &[&option_reply(opt::GO, 0x8000_0006, b"no such export")]),
        enter(3, &[&name.repeat(65)]),
        enter(3, &[&ack]),
    ]
}

fn clients() -> Vec<Vec<u8>> {
    let greeting = Greeting { size: 4096, flags: 13 }.encode();
    let reply = |error, cookie| SimpleReply { error, cookie }.encode().to_vec();
    // A READ of 33 bytes, a WRITE, a FLUSH, a DISC, a READ of 11 bytes; the rest asks for nothing.
    let mut choices = [2; CHOICES];
    choices[..5].copy_from_slice(&[3 << 3, 1, 3, 2, 1 << 3]);
    let answers = [
        greeting.to_vec(),
        [reply(0, 3), reply(0, 1), vec![b'a'; 33], reply(28, 2), reply(0, 4), vec![b'b'; 11]].concat(),
        [reply(5, 1), reply(0, 77)].concat(),
        [reply(0, 1), vec![b'a'; 20]].concat(),
        vec![0; 16],
    ];
    let garbage = input(choices, b"SSH-2.0-OpenSSH_10.0\r\n");
    let oldstyle = answers.iter().map(|answer| input(choices, &[&greeting, answer.as_slice()].concat()));
    let mut named = choices;
    named[CHOICES - 1] = 0xFF;
    let newstyle =
        negotiations().into_iter().flat_map(|stream| [choices, named].map(|choices| input(choices, &stream)));
    oldstyle.chain([garbage]).chain(newstyle).chain([input(named, &greeting)]).chain(structured()).collect()
}

/// What newstyle servers say to a client that wishes for all there is, and the chunks that they answer with then.
fn structured() -> Vec<Vec<u8>> {
    // READs of 33 bytes and of none, a BLOCK_STATUS of 33, a WRITE, a FLUSH, and a READ of 11; the rest asks for nothing.
    let mut choices = [2; CHOICES];
    choices[..6].copy_from_slice(&[3 << 3, 0, 3 << 3 | 7, 1, 3, 1 << 3]);
    choices[CHOICES - 1] = 0xFE;
    let export = option_reply(opt::GO, 3, &[&[0, 0], &4096_u64.to_be_bytes()[..], &[0, 13]].concat());
    let ack = |option| option_reply(option, 1, &[]);
    let context = |id: u32, name: &[u8]| option_reply(opt::SET_META_CONTEXT, 4, &[&id.to_be_bytes(), name].concat());
    let session = ["flexnbd:session:", &"fe".repeat(16)].concat();
    let contexts = [context(9, b"base:allocation"), context(4, session.as_bytes()), context(5, b"qemu:other")].concat();
    let enter = |selected: &[u8]| {
        let greeting = [b"NBDMAGICIHAVEOPT", &3_u16.to_be_bytes()[..]].concat();
        [&greeting, &ack(opt::STRUCTURED_REPLY), selected, &export, &ack(opt::GO)].concat()
    };
    let all = enter(&[contexts.as_slice(), &ack(opt::SET_META_CONTEXT)].concat());
    let refused = enter(&option_reply(opt::SET_META_CONTEXT, 0x8000_0001, b"what?"));
    let not_yet = enter(&option_reply(opt::SET_META_CONTEXT, 0x8000_0002, b"not yet"));
    let chunk = |flags, kind, cookie, payload: &[u8]| {
        let length = payload.len() as u32;
        let head = ChunkHead { flags, kind, cookie, length }.encode::<CHUNK_LEN>();
        [head.filled(), payload].concat()
    };
    let data = |flags, offset: u64, bytes: &[u8]| chunk(flags, 1, 1, &[&offset.to_be_bytes(), bytes].concat());
    let hole = chunk(0, 2, 1, &[&1020_u64.to_be_bytes()[..], &5_u32.to_be_bytes()].concat());
    let simple = |error, cookie| SimpleReply { error, cookie }.encode().to_vec();
    let status = |id: u32| [id, 20, 3, 30, 0].iter().flat_map(|field| field.to_be_bytes()).collect::<Vec<u8>>();
    let error = [&5_u32.to_be_bytes()[..], &[0, 3], b"bad"].concat();
    let error_offset = [error.as_slice(), &1002_u64.to_be_bytes()].concat();
    let good = [
        data(0, 1025, b"12345678"),
        chunk(1, 0, 2, &[]),
        data(0, 1000, &[b'a'; 20]),
        simple(0, 4),
        hole.clone(),
        chunk(1, 5, 3, &status(9)),
        chunk(1, 0, 5, &[]),
        chunk(1, 0, 1, &[]),
        chunk(0, 0x8002, 6, &error_offset),
        chunk(1, 0x8009, 6, &error),
    ];
    let bad = [
        simple(0, 1),
        data(1, 1000, &[b'a'; 20]),
        data(0, 1000, &[b'a'; 34]),
        [data(0, 1000, b"aaaa"), data(0, 1003, b"aaaa")].concat(),
        chunk(1, 5, 3, &status(4)),
        chunk(1, 0x8001, 3, &[0; 6]),
        chunk(1, 7, 1, &[]),
        [hole, simple(5, 1)].concat(),
    ];
    let answers = [good.concat()].into_iter().chain(bad);
    let said = answers.map(|answer| [all.as_slice(), &answer].concat()).chain([refused, not_yet]);
    said.map(|said| input(choices, &said)).collect()
}

/// What servers of a proxy say, over one connection after the other.
fn upstreams() -> Vec<Vec<u8>> {
    const SIZE: u64 = 1 << 20;
    let choices = |first: u8, rest: [u8; 5]| {
        let mut choices = [9; CHOICES];
        choices[0] = first;
        choices[1..6].copy_from_slice(&rest);
        choices
    };
    let oldstyle = |flags| Greeting { size: SIZE, flags }.encode().to_vec();
    let ack = |option| option_reply(option, 1, &[]);
    let newstyle = |flags: u32| {
        let context = option_reply(opt::SET_META_CONTEXT, 4, &[&9_u32.to_be_bytes()[..], b"base:allocation"].concat());
        let export =
            option_reply(opt::GO, 3, &[&[0, 0], &SIZE.to_be_bytes()[..], &(flags as u16).to_be_bytes()].concat());
        let greeting = [b"NBDMAGICIHAVEOPT", &3_u16.to_be_bytes()[..]].concat();
        let context = [context, ack(opt::SET_META_CONTEXT)].concat();
        [greeting, ack(opt::STRUCTURED_REPLY), context, export, ack(opt::GO)].concat()
    };
    let simple = |error, cookie| SimpleReply { error, cookie }.encode().to_vec();
    let chunk = |kind, cookie| ChunkHead { flags: 1, kind, cookie, length: 0 }.encode::<CHUNK_LEN>().filled().to_vec();
    let answers = |error| (1..40).flat_map(|cookie| simple(error, cookie)).collect::<Vec<u8>>();
    let chunks = (1..40).flat_map(|cookie| chunk(0, cookie)).collect::<Vec<u8>>();
    let all = 0xD6D;
    let mut streams = vec![
        [oldstyle(all), answers(0)].concat(),
        [oldstyle(13), answers(0)].concat(),
        [oldstyle(1), answers(0)].concat(),
        [oldstyle(all), answers(28)].concat(),
        [oldstyle(all), simple(0, 77)].concat(),
        [oldstyle(3), oldstyle(13)].concat(),
        [newstyle(all), answers(0)].concat(),
        [newstyle(all), chunks].concat(),
        [newstyle(13), answers(108)].concat(),
        [newstyle(all), chunk(1, 1), vec![0; 64]].concat(),
        b"SSH-2.0-OpenSSH_10.0\r\n".repeat(4),
    ];
    // The server ends and comes back; the bytes that are no reply end the connection.
    streams.push([oldstyle(all), simple(0, 1), simple(0, 2), vec![0; 16], oldstyle(13), answers(0)].concat());
    let chosen = [
        choices(0, [3, 0, 40, 0x41, 90]),
        choices(8, [2, 2, 0x4D, 6, 200]),
        choices(7, [3, 3, 5, 0xF0, 17]),
        choices(32, [3, 14, 9, 0xFF, 77]),
        MIXED,
    ];
    streams.iter().flat_map(|stream| chosen.map(|choices| input(choices, stream))).collect()
}

fn controls() -> Vec<Vec<u8>> {
    let long_line = ["acl\n", &"x".repeat(1025)].concat();
    let long_command = ["acl\n", &["x".repeat(1000), "\n".into()].concat().repeat(66)].concat();
    [
        "status\n\n",
        "acl\n10.0.0.0/8\n2001:db8::1\n\n",
        "acl 10.0.0.1 ::ffff:10.0.0.0/104\r\n\r\n",
        "acl\nno address\n\x1b[2J\n\n",
        "mirror\n10.0.0.1\n4777\nunlink\n0\n1000000\n\n",
        "mirror 10.0.0.1 0 exit\n\n",
        "mirror_max_bps\n1000\n\n",
        "break\n\nstatus\n\n",
        "statu",
        " \t\n",
        "0: updated\n",
        "10: unknown command\r\nmore",
        &long_line,
        &long_command,
    ]
    .iter()
    .map(|text| input(MIXED, text.as_bytes()))
    .chain([input(MIXED, b"acl\n\xFF\xFE\0\n\n")])
    .collect()
}

fn acls() -> Vec<Vec<u8>> {
    let v4 = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, 10, 1, 2, 3];
    let v6 = [0x20, 1, 0xD, 0xB8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    ["10.1.2.3\n10.0.0.0/8\n10.1.2.3/31", "2001:db8::1\n2001:db8::/32\n::/1", "::ffff:10.1.2.3\n::ffff:10.0.0.0/104"]
        .into_iter()
        .chain(["0\n[::1]\n::\n127.0.0.1", "10.0.0.0/33\n10.0.0.0/0\n::/129\n10.0.0.0/+8\n1.2.3\n", ""])
        .flat_map(|text| [v4, v6].map(|visitor| input(visitor, text.as_bytes())))
        .collect()
}

/// What clients say before they ask: the usual, and what bad ones try.
fn hagglings() -> Vec<Vec<u8>> {
    let flags = 3_u32.to_be_bytes().to_vec();
    let long_name = [&4097_u32.to_be_bytes(), [b'x'; 4097].as_slice(), &[0, 0]].concat();
    let session = ["flexnbd:session:", &"0f".repeat(16)].concat();
    let lying = b"\xFF\xFF\xFF\xFF\0\0";
    let mut huge = option(opt::LIST, &[]);
    huge[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    let haggle = Talk::new(512).stream;
    let mut streams = vec![haggle.clone(), haggle[..haggle.len() - 9].to_vec(), vec![0xFF; 4], Vec::new()];
    let ends = [
        option(opt::EXPORT_NAME, &[]),
        option(opt::EXPORT_NAME, b"other"),
        option(opt::ABORT, b"bye"),
        option(opt::STARTTLS, &[]),
        option(opt::GO, &long_name),
        option(opt::INFO, lying),
        option(opt::LIST, b"data"),
        option(opt::STRUCTURED_REPLY, &[]).repeat(2),
        [option(opt::STRUCTURED_REPLY, &[]), option(opt::SET_META_CONTEXT, &contexts(&["base:", ""]))].concat(),
        [option(opt::STRUCTURED_REPLY, &[]), option(opt::LIST_META_CONTEXT, lying)].concat(),
        [option(opt::STRUCTURED_REPLY, &[]), option(opt::SET_META_CONTEXT, &contexts(&[&session, "base:allocation"]))]
            .concat(),
        [option(opt::STRUCTURED_REPLY, &[]), option(opt::SET_META_CONTEXT, &contexts(&[&session])).repeat(2)].concat(),
        option(99, &[]).repeat(65),
        option(99, &[0; 9000]),
        huge,
    ];
    streams.extend(ends.into_iter().map(|end| [flags.clone(), end].concat()));
    streams.into_iter().map(|stream| input(MIXED, &stream)).collect()
}

fn newstyle_sessions() -> Vec<Vec<u8>> {
    let everything = everything().stream;
    let enter = |options: &[Vec<u8>]| [3_u32.to_be_bytes().to_vec(), options.concat()].concat();
    let structured = option(opt::STRUCTURED_REPLY, &[]);
    let go = option(opt::GO, &[0; 6]);
    let mut streams = vec![everything, enter(&[structured.clone(), go]), enter(&[option(opt::EXPORT_NAME, &[])])];
    let asks: [(u16, u16, u32); 6] =
        [(0, 0, 300_000), (0, 4, 65_536), (5, 0, 9), (6, 16, 9000), (1, 1, 70_000), (4, 0, 9)];
    for stream in &mut streams[1..] {
        for (kind, flags, length) in asks {
            stream.extend(head(kind, flags, 777, length).encode());
            stream.resize(stream.len() + if kind == kind::WRITE { length as usize } else { 0 }, 7);
        }
    }
    streams.push(enter(&[structured.clone(), option(opt::ABORT, &[])]));
    let hole = head(kind::READ, 0, SLICE as u64, SLICE as u32 + 512).encode();
    streams.push([enter(&[structured, option(opt::GO, &[0; 6])]), hole.to_vec()].concat());
    streams
        .iter()
        .flat_map(|stream| [[0; CHOICES], MIXED, FAILING, SILENT].map(|choices| input(choices, stream)))
        .collect()
}

#[test]
fn the_seeds_of_the_fuzzers_pass() {
    let targets: [Target; 7] = [
        ("haggling", haggling, hagglings()),
        ("newstyle_session", newstyle_session, newstyle_sessions()),
        ("session", session, sessions()),
        ("client", client, clients()),
        ("upstream", upstream, upstreams()),
        ("control", control, controls()),
        ("acl", acl, acls()),
    ];
    let write = std::env::var_os("FLEXNBD_WRITE_SEEDS").is_some();
    for (name, target, seeds) in targets {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
        if write {
            fs::create_dir_all(&folder).unwrap();
        }
        for (number, seed) in seeds.iter().enumerate() {
            let path = folder.join(format!("made-{number:02}"));
            if write {
                fs::write(&path, seed).unwrap();
            }
            assert!(fs::read(&path).is_ok_and(|stored| stored == *seed), "{} is out of date", path.display());
        }
        for file in fs::read_dir(folder).unwrap() {
            let replayed = Replayed(file.unwrap().path());
            target(&fs::read(&replayed.0).unwrap());
        }
    }
}
