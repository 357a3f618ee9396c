use super::*;
use crate::buffer::SLICE;
use crate::proto::wire::{
    command, handshake_flag, info, option, option_reply, Greeting, OPTION_REPLY_MAGIC, REQUEST_LEN,
};

/// What a server has said, and what was sent.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    export: Option<Offer>,
    replies: Vec<(u64, u32)>,
    /// By the notes of the READs, joined.
    data: Vec<(u64, Vec<u8>)>,
    sent: Vec<u8>,
}

/// Takes what waits to be sent.
fn send<T>(session: &mut ClientSession<T>, most: usize, pool: &mut Pool) -> Vec<u8> {
    let mut slices = [IoSlice::new(&[]); PIECES_MAX];
    let pieces = session.to_send(&mut slices);
    let mut bytes: Vec<u8> = slices[..pieces].iter().flat_map(|slice| slice.to_vec()).collect();
    bytes.truncate(most);
    session.sent(bytes.len(), pool);
    bytes
}

/// Feeds the stream in pieces of `step` bytes. Gives the command with the note 1, a FLUSH, when the export is there and
/// none was given before.
fn talk(session: &mut ClientSession<u64>, stream: &[u8], step: usize) -> Result<Said, Violation> {
    let (mut said, mut pool) = (Said::default(), Pool::new(0));
    for piece in stream.chunks(step.min(RECEIVE)) {
        let mut rest = piece;
        while !rest.is_empty() {
            let space = session.recv_space();
            let n = space.len().min(rest.len());
            assert!(n > 0, "it needs bytes and has no space");
            space[..n].copy_from_slice(&rest[..n]);
            session.received(n);
            rest = &rest[n..];
            let mut entered = false;
            while let Some(event) = session.next_event()? {
                match event {
                    Event::Export(offer) => {
                        assert_eq!(said.export.replace(offer), None);
                        entered = true;
                    }
                    Event::Data { note, bytes, .. } => match said.data.last_mut() {
                        Some((of, data)) if of == note => data.extend(bytes),
                        _ => said.data.push((*note, bytes.to_vec())),
                    },
                    Event::Hole { .. } | Event::Extents { .. } => unreachable!("nobody wished for it"),
                    Event::Reply { note, error } => said.replies.push((note, error)),
                }
                if std::mem::take(&mut entered) && session.unanswered() == 0 {
                    said.sent.extend(send(session, usize::MAX, &mut pool));
                    session.command(kind::FLUSH, 0, 0, 0, 1);
                    send(session, usize::MAX, &mut pool);
                }
            }
            said.sent.extend(send(session, usize::MAX, &mut pool));
        }
    }
    Ok(said)
}

fn reply(error: u32, cookie: u64) -> Vec<u8> {
    SimpleReply { error, cookie }.encode().to_vec()
}

fn oldstyle() -> Vec<u8> {
    Greeting { size: EXPORT.size, flags: EXPORT.flags.into() }.encode().to_vec()
}

#[test]
fn replies_in_any_order_and_any_pieces() {
    let stream = [oldstyle(), reply(0, 2), reply(0, 1), b"0123456789".to_vec(), reply(28, 3), reply(0, 4)].concat();
    for step in 1..=stream.len() {
        let mut session = ClientSession::new(String::new());
        session.command(kind::READ, 0, 0, 10, 71);
        session.command(kind::FLUSH, 0, 0, 0, 72);
        session.command(kind::WRITE, command::FUA, 0, 99, 73);
        session.command(kind::READ, 0, 0, 0, 74);
        assert_eq!((session.unanswered(), session.oldest()), (4, Some(&71)));
        let said = talk(&mut session, &stream, step).unwrap();
        assert_eq!(said.export, Some(EXPORT));
        assert_eq!(said.data, [(71, b"0123456789".to_vec())]);
        assert_eq!(said.replies, [(72, 0), (71, 0), (73, 28), (74, 0)]);
        assert!(session.is_quiet());
    }
}

#[test]
fn a_read_that_fails_brings_nothing() {
    let mut session = ClientSession::new(String::new());
    session.command(kind::READ, 0, 0, 10, 7);
    session.command(kind::READ, 0, 0, 3, 8);
    let said = talk(&mut session, &[oldstyle(), reply(5, 1), reply(0, 2), b"abc".to_vec()].concat(), 1).unwrap();
    assert_eq!((said.replies, said.data), (vec![(7, 5), (8, 0)], vec![(8, b"abc".to_vec())]));
}

#[test]
fn commands_leave_with_their_payloads_in_whatever_pieces() {
    let heads = [
        RequestHead { flags: 0, kind: kind::WRITE, cookie: 1, offset: 4096, length: 9 },
        RequestHead { flags: command::FUA, kind: kind::TRIM, cookie: 2, offset: 7, length: 8 },
        RequestHead { flags: 0, kind: kind::DISC, cookie: 0, offset: 0, length: 0 },
    ];
    let [write, trim, disc] = heads.map(|head| head.encode());
    let all = [&write[..], b"first", b"last", &trim[..], &disc[..]].concat();
    for step in 1..=all.len() {
        let mut pool = Pool::new(SLICE);
        let mut session = ClientSession::new(String::new());
        session.command(kind::WRITE, 0, 4096, 9, ());
        for piece in [b"first".as_slice(), b"last"] {
            let mut payload = pool.take(piece.len()).unwrap();
            payload.append(piece);
            session.push_payload(payload);
        }
        session.command(kind::TRIM, command::FUA, 7, 8, ());
        session.disconnect();
        assert_eq!((session.buffered(), session.unanswered()), (2 * 4096, 2));
        let mut sent = Vec::new();
        while session.wants_send() {
            sent.extend(send(&mut session, step, &mut pool));
            let waiting = usize::from(sent.len() < REQUEST_LEN + 5) + usize::from(sent.len() < REQUEST_LEN + 9);
            assert_eq!(session.buffered(), waiting * 4096, "memory comes back when its bytes have left");
        }
        assert_eq!((sent, pool.available()), (all.clone(), SLICE));
    }
}

#[test]
fn a_connection_that_goes_gives_its_memory_back() {
    let mut pool = Pool::new(SLICE);
    let mut session = ClientSession::new(String::new());
    session.command(kind::WRITE, 0, 0, SLICE as u32, ());
    session.push_payload(pool.take(SLICE).unwrap());
    assert_eq!((session.buffered(), pool.available(), session.is_quiet()), (SLICE, 0, false));
    session.release(&mut pool);
    assert_eq!((session.buffered(), pool.available()), (0, SLICE));
}

#[test]
fn what_nobody_asked_for_is_not_quiet() {
    let mut session = ClientSession::new(String::new());
    talk(&mut session, &[oldstyle(), reply(0, 1)].concat(), 1).unwrap();
    assert!(session.is_quiet());
    session.recv_space()[0] = 0x67;
    session.received(1);
    assert!(!session.is_quiet());
}

#[test]
fn garbage_ends_the_conversation() {
    let talk = |stream: &[u8]| talk(&mut ClientSession::new(String::new()), stream, 5).unwrap_err();
    assert!(matches!(talk(b"SSH-2.0-Something"), Violation::NotNbd(..)));
    assert_eq!(talk(&[oldstyle(), reply(0, 77)].concat()), Violation::UnknownCookie(77));
    assert_eq!(talk(&[oldstyle(), reply(0, 1), reply(0, 1)].concat()), Violation::UnknownCookie(1));
    assert_eq!(talk(&[oldstyle(), vec![0; 16]].concat()), Violation::BadReplyMagic(0));
}

const FIXED: u16 = handshake_flag::FIXED_NEWSTYLE;
const NO_ZEROES: u16 = handshake_flag::NO_ZEROES;
const NOTHING: Agreed = Agreed { structured: false, allocation: false, session: None };
const EXPORT: Offer = Offer { size: 1 << 40, flags: 0x16d, agreed: NOTHING };

fn greeting(flags: u16) -> Vec<u8> {
    [&NBDMAGIC.to_be_bytes()[..], &IHAVEOPT.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn option_answer(kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend([option::GO, kind, data.len() as u32].iter().flat_map(|field| field.to_be_bytes()));
    [&bytes, data].concat()
}

fn size_and_flags() -> Vec<u8> {
    [&EXPORT.size.to_be_bytes()[..], &0x16d_u16.to_be_bytes()].concat()
}

fn info_export() -> Vec<u8> {
    option_answer(option_reply::INFO, &[&info::EXPORT.to_be_bytes()[..], &size_and_flags()].concat())
}

fn asked(option: u32, data: &[u8]) -> Vec<u8> {
    [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn go(name: &str) -> Vec<u8> {
    asked(option::GO, &[&(name.len() as u32).to_be_bytes(), name.as_bytes(), &[0, 0]].concat())
}

/// What the session makes of the parts in pieces of `step` bytes with one reply behind them: the export, and what it
/// has sent.
fn haggle(name: &str, parts: &[Vec<u8>], step: usize) -> Result<(Option<Offer>, Vec<u8>), Violation> {
    let mut stream = parts.concat();
    stream.extend(reply(0, 1));
    let mut session = ClientSession::new(name.into());
    let said = talk(&mut session, &stream, step)?;
    assert_eq!(said.replies.len(), usize::from(said.export.is_some()));
    Ok((said.export, said.sent))
}

/// The same in whatever pieces it comes.
fn haggle_all(name: &str, parts: &[Vec<u8>]) -> Result<(Option<Offer>, Vec<u8>), Violation> {
    let whole = haggle(name, parts, usize::MAX);
    let length = parts.concat().len() + 16;
    for step in (1..=length.min(300)).chain([length / 2, length - 1]) {
        assert_eq!(haggle(name, parts, step), whole, "pieces of {step}");
    }
    whole
}

#[test]
fn go_chooses_the_export_and_skips_what_it_did_not_ask_for() {
    let ack = option_answer(option_reply::ACK, &[]);
    let sizes = option_answer(option_reply::INFO, &[0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]);
    let long = option_answer(option_reply::INFO, &vec![0xEE; 64 << 10]);
    let sent = [vec![0, 0, 0, 3], go("a disk")].concat();
    for infos in [
        vec![info_export()],
        vec![sizes.clone(), info_export()],
        vec![info_export(), option_answer(option_reply::INFO, &[0, 1]), sizes],
        vec![info_export(), long],
    ] {
        let parts = [vec![greeting(FIXED | NO_ZEROES)], infos, vec![ack.clone()]].concat();
        assert_eq!(haggle_all("a disk", &parts), Ok((Some(EXPORT), sent.clone())));
    }
}

#[test]
fn flags_are_as_offered_and_unknown_ones_are_not_repeated() {
    let parts = |flags| [greeting(flags), info_export(), option_answer(option_reply::ACK, &[])];
    for (offered, given) in [(FIXED, 1), (FIXED | NO_ZEROES, 3), (0xfff9, 1)] {
        let sent = [vec![0, 0, 0, given], go("")].concat();
        assert_eq!(haggle_all("", &parts(offered)), Ok((Some(EXPORT), sent)));
    }
}

#[test]
fn a_server_that_does_not_know_go_is_asked_by_name() {
    let text = b"no such option".to_vec();
    for (flags, zeroes) in [(FIXED, 124), (FIXED | NO_ZEROES, 0)] {
        let refusal = option_answer(option_reply::ERR_UNSUP, &text);
        let parts = [greeting(flags), refusal, size_and_flags(), vec![0; zeroes]];
        let by_name = asked(option::EXPORT_NAME, b"disk");
        let sent = [u32::from(flags).to_be_bytes().to_vec(), go("disk"), by_name].concat();
        assert_eq!(haggle_all("disk", &parts), Ok((Some(EXPORT), sent)));
    }
}

#[test]
fn a_server_without_fixed_newstyle_is_asked_by_name_at_once() {
    for (flags, zeroes) in [(0, 124), (NO_ZEROES, 0)] {
        let parts = [greeting(flags), size_and_flags(), vec![0; zeroes]];
        let sent = [u32::from(flags).to_be_bytes().to_vec(), asked(option::EXPORT_NAME, b"disk")].concat();
        assert_eq!(haggle_all("disk", &parts), Ok((Some(EXPORT), sent)));
    }
}

#[test]
fn refusals_are_named() {
    for (kind, text) in [
        (option_reply::ERR_UNKNOWN, "there is no export of this name (ERR_UNKNOWN)"),
        (option_reply::ERROR | 5, "the server refused the export: ERR_TLS_REQD (0x80000005)"),
        (option_reply::ERROR | 8, "the server refused the export: ERR_BLOCK_SIZE_REQD (0x80000008)"),
        (u32::MAX, "the server refused the export: an error the specification does not know (0xffffffff)"),
    ] {
        let why = haggle_all("x", &[greeting(FIXED), option_answer(kind, b"text of the server")]).unwrap_err();
        assert_eq!((why, why.to_string().as_str()), (Violation::OptionRefused(kind), text));
    }
}

#[test]
fn an_oldstyle_server_has_no_names() {
    let parts = [oldstyle()];
    assert_eq!(haggle_all("", &parts), Ok((Some(EXPORT), Vec::new())));
    assert_eq!(haggle_all("x", &parts), Err(Violation::NoExportNames));
}

#[test]
fn senseless_replies_end_the_conversation() {
    let unexpected = |kind, length| Violation::UnexpectedOptionReply { option: option::GO, kind, length };
    let mut other_option = option_answer(option_reply::ACK, &[]);
    other_option[11] = 6;
    let mut magic = option_answer(option_reply::ACK, &[]);
    magic[0] = 1;
    let mut endless = option_answer(option_reply::INFO, &[]);
    endless[16..].copy_from_slice(&u32::MAX.to_be_bytes());
    for (replies, violation) in [
        (option_answer(option_reply::ACK, &[]), unexpected(option_reply::ACK, 0)),
        ([info_export(), option_answer(option_reply::ACK, &[0])].concat(), unexpected(option_reply::ACK, 1)),
        (option_answer(option_reply::INFO, &[0]), unexpected(option_reply::INFO, 1)),
        (option_answer(option_reply::INFO, &[0; 11]), unexpected(option_reply::INFO, 11)),
        (option_answer(option_reply::SERVER, &[0; 4]), unexpected(option_reply::SERVER, 4)),
        (other_option, Violation::UnexpectedOptionReply { option: 6, kind: option_reply::ACK, length: 0 }),
        (magic, Violation::BadOptionReplyMagic(OPTION_REPLY_MAGIC | 1 << 56)),
        (endless, Violation::OptionReplyTooLong(u32::MAX)),
        (option_answer(option_reply::INFO, &vec![1; (64 << 10) + 1]), Violation::OptionReplyTooLong((64 << 10) + 1)),
        (
            option_answer(option_reply::ERR_UNSUP, &vec![1; (64 << 10) + 1]),
            Violation::OptionReplyTooLong((64 << 10) + 1),
        ),
        (option_answer(option_reply::INFO, &[1, 1]).repeat(65), Violation::TooManyOptionReplies(64)),
    ] {
        assert_eq!(haggle_all("", &[greeting(FIXED), replies]), Err(violation));
    }
}

#[test]
fn an_end_is_explained_by_where_it_comes() {
    let ends = |parts: &[Vec<u8>]| {
        let mut session = ClientSession::<u64>::new(String::new());
        talk(&mut session, &parts.concat(), usize::MAX).unwrap();
        session.explain_end()
    };
    assert!(ends(&[]).starts_with("closed the connection before its greeting"));
    assert!(ends(&[greeting(FIXED)]).ends_with("in the middle of the negotiation"));
    assert!(ends(&[greeting(0)]).contains("when asked for the export"));
    assert!(ends(&[oldstyle()]).ends_with("half-way"));
}
