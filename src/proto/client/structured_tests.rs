//! What a client wishes for beyond the export, and replies in chunks.

use super::*;
use crate::proto::export::SessionName;
use crate::proto::wire::{chunk, info, option, option_reply, ChunkHead, CHUNK_LEN, OPTION_REPLY_MAGIC};

const SIZE: u64 = 1 << 40;
const FLAGS: u16 = 0x5ed;
const NAME: SessionName = SessionName([0xab; 16]);
const ALL: Wishes = Wishes { structured: true, session: Some(NAME) };
/// The id that the server gives `base:allocation`.
const ID: u32 = 7;

/// What a server has said.
#[derive(Debug, Default, PartialEq, Eq)]
struct Said {
    offer: Option<Offer>,
    /// The READ, where, and what; pieces that follow each other are joined, and zeroes are what a hole brings.
    data: Vec<(char, u64, Vec<u8>)>,
    extents: Vec<(char, Vec<(u32, u32)>)>,
    replies: Vec<(char, u32)>,
    sent: Vec<u8>,
}

impl Said {
    fn bring(&mut self, note: char, offset: u64, bytes: &[u8]) {
        match self.data.last_mut() {
            Some((of, at, data)) if *of == note && *at + data.len() as u64 == offset => data.extend(bytes),
            _ => self.data.push((note, offset, bytes.to_vec())),
        }
    }
}

/// Feeds the stream in pieces of `step` bytes to a client that gives its commands when it may: a READ `r` of 10 bytes at
/// 100, a READ `s` of 4 at 200, a WRITE `w`, a `BLOCK_STATUS` `b` of 1000 at 300, a READ `e` of nothing.
fn talk(wishes: Wishes, stream: &[u8], step: usize) -> Result<Said, Violation> {
    let mut session = ClientSession::with_wishes("disk".into(), wishes);
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
            while let Some(event) = session.next_event()? {
                match event {
                    Event::Export(offer) => {
                        said.offer = Some(offer);
                        said.sent.extend(send(&mut session, &mut pool));
                        session.command(kind::READ, 0, 100, 10, 'r');
                        session.command(kind::READ, 0, 200, 4, 's');
                        session.command(kind::WRITE, 0, 0, 0, 'w');
                        session.command(kind::BLOCK_STATUS, 0, 300, 1000, 'b');
                        session.command(kind::READ, 0, 5, 0, 'e');
                        send(&mut session, &mut pool);
                    }
                    Event::Data { note, offset, bytes } => said.bring(*note, offset, bytes),
                    Event::Hole { note, offset, length } => said.bring(*note, offset, &vec![0; length as usize]),
                    Event::Extents { note, descriptors } => {
                        let found = descriptors.iter().map(|found| (found.length, found.flags)).collect();
                        said.extents.push((*note, found));
                    }
                    Event::Reply { note, error } => said.replies.push((note, error)),
                }
            }
            said.sent.extend(send(&mut session, &mut pool));
        }
    }
    Ok(said)
}

fn send(session: &mut ClientSession<char>, pool: &mut Pool) -> Vec<u8> {
    let mut slices = [IoSlice::new(&[]); PIECES_MAX];
    let pieces = session.to_send(&mut slices);
    let bytes: Vec<u8> = slices[..pieces].iter().flat_map(|slice| slice.to_vec()).collect();
    session.sent(bytes.len(), pool);
    bytes
}

/// The same in whatever pieces it comes.
fn talk_all(wishes: Wishes, parts: &[Vec<u8>]) -> Result<Said, Violation> {
    let stream = parts.concat();
    let whole = talk(wishes, &stream, usize::MAX);
    for step in (1..=stream.len().min(400)).chain([stream.len() / 2 + 1]) {
        assert_eq!(talk(wishes, &stream, step), whole, "pieces of {step}");
    }
    whole
}

fn option_answer(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let fields = [option, kind, data.len() as u32];
    [&OPTION_REPLY_MAGIC.to_be_bytes()[..], fields.map(u32::to_be_bytes).as_flattened(), data].concat()
}

fn ack(option: u32) -> Vec<u8> {
    option_answer(option, option_reply::ACK, &[])
}

fn context(id: u32, name: &[u8]) -> Vec<u8> {
    option_answer(option::SET_META_CONTEXT, option_reply::META_CONTEXT, &[&id.to_be_bytes(), name].concat())
}

fn greeting() -> Vec<u8> {
    [&NBDMAGIC.to_be_bytes()[..], &IHAVEOPT.to_be_bytes(), &[0, 3]].concat()
}

fn size_and_flags() -> Vec<u8> {
    [&SIZE.to_be_bytes()[..], &FLAGS.to_be_bytes()].concat()
}

/// The good answer to GO.
fn enter() -> Vec<u8> {
    let export = [&info::EXPORT.to_be_bytes()[..], &size_and_flags()].concat();
    [option_answer(option::GO, option_reply::INFO, &export), ack(option::GO)].concat()
}

/// All that a server says before its first reply which gives everything.
fn give_all() -> Vec<u8> {
    [
        greeting(),
        ack(option::STRUCTURED_REPLY),
        context(99, NAME.context().as_bytes()),
        context(ID, b"base:allocation"),
        ack(option::SET_META_CONTEXT),
        enter(),
    ]
    .concat()
}

fn asked(option: u32, data: &[u8]) -> Vec<u8> {
    [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

/// What is sent: the client flags, and these options.
fn sent(options: &[u32]) -> Vec<u8> {
    let query = |query: &str| [&(query.len() as u32).to_be_bytes(), query.as_bytes()].concat();
    let options = options.iter().flat_map(|&option| match option {
        option::STRUCTURED_REPLY => asked(option, &[]),
        option::SET_META_CONTEXT => {
            let queries = [query("base:allocation"), query(&NAME.context())].concat();
            asked(option, &[query("disk"), vec![0, 0, 0, 2], queries].concat())
        }
        option::GO => asked(option, &[query("disk"), vec![0, 0]].concat()),
        _ => asked(option, b"disk"),
    });
    [0, 0, 0, 3].into_iter().chain(options).collect()
}

const EVERYTHING: [u32; 3] = [option::STRUCTURED_REPLY, option::SET_META_CONTEXT, option::GO];

#[test]
fn what_is_wished_for_is_asked_in_turn_and_what_was_agreed_is_told() {
    let agreed =
        |structured, allocation, session: bool| Agreed { structured, allocation, session: session.then_some(NAME) };
    let set = ack(option::SET_META_CONTEXT);
    let (structured, allocation) = (ack(option::STRUCTURED_REPLY), context(ID, b"base:allocation"));
    let session = context(1, NAME.context().as_bytes());
    for (contexts, agreed) in [
        (vec![allocation.clone(), session.clone()], agreed(true, true, true)),
        (vec![session.clone(), allocation.clone()], agreed(true, true, true)),
        (vec![allocation.clone()], agreed(true, true, false)),
        (vec![session], agreed(true, false, true)),
        (vec![], agreed(true, false, false)),
        // Others are skipped, whatever their length.
        (vec![context(3, b"base:allocatioN"), context(3, b""), allocation.clone()], agreed(true, true, false)),
        (vec![context(3, &[b'x'; 5000]), allocation], agreed(true, true, false)),
    ] {
        let parts = [greeting(), structured.clone(), contexts.concat(), set.clone(), enter()];
        let said = talk_all(ALL, &parts).unwrap();
        assert_eq!(said.offer, Some(Offer { size: SIZE, flags: FLAGS, agreed }));
        assert_eq!(said.sent, sent(&EVERYTHING));
    }
}

#[test]
fn nothing_is_asked_for_without_a_wish_or_a_word_for_it() {
    let offer = Some(Offer { size: SIZE, flags: FLAGS, agreed: Agreed::default() });
    let said = talk_all(Wishes::default(), &[greeting(), enter()]).unwrap();
    assert_eq!((said.offer, said.sent), (offer, sent(&[option::GO])));
    let mut not_fixed = greeting();
    not_fixed[17] = 2;
    let said = talk_all(ALL, &[not_fixed, size_and_flags()]).unwrap();
    assert_eq!((said.offer, &said.sent[..4], &said.sent[4..]), (offer, &[0, 0, 0, 2][..], &sent(&[1])[4..]));
}

#[test]
fn a_refusal_of_anything_but_the_export_is_no_failure() {
    let allocation = context(ID, b"base:allocation");
    for kind in [option_reply::ERR_UNSUP, option_reply::ERR_POLICY, option_reply::ERR_INVALID, u32::MAX] {
        for text in [b"".as_slice(), b"not yex", b"no such option"] {
            let refusal = |option| option_answer(option, kind, text);
            let parts = [greeting(), refusal(option::STRUCTURED_REPLY), enter()];
            let said = talk_all(ALL, &parts).unwrap();
            assert_eq!(said.offer.unwrap().agreed, Agreed::default());
            assert_eq!(said.sent, sent(&[option::STRUCTURED_REPLY, option::GO]));

            let refusal = [allocation.clone(), refusal(option::SET_META_CONTEXT)].concat();
            let parts = [greeting(), ack(option::STRUCTURED_REPLY), refusal, enter()];
            let said = talk_all(ALL, &parts).unwrap();
            assert_eq!(said.offer.unwrap().agreed, Agreed { structured: true, ..Agreed::default() });
            assert_eq!(said.sent, sent(&EVERYTHING));
        }
    }
    let by_name = option_answer(option::GO, option_reply::ERR_UNSUP, b"");
    let contexts = [allocation, ack(option::SET_META_CONTEXT)].concat();
    let parts = [greeting(), ack(option::STRUCTURED_REPLY), contexts, by_name, size_and_flags()];
    let said = talk_all(ALL, &parts).unwrap();
    assert_eq!(said.offer.unwrap().agreed, Agreed { structured: true, allocation: true, session: None });
    assert_eq!(said.sent, sent(&[&EVERYTHING[..], &[option::EXPORT_NAME]].concat()));
}

#[test]
fn a_server_that_awaits_its_image_is_no_server_yet() {
    let not_yet = |option| option_answer(option, option_reply::ERR_POLICY, b"not yet");
    let structured = ack(option::STRUCTURED_REPLY);
    let parts = [greeting(), structured.clone(), not_yet(option::SET_META_CONTEXT)];
    assert_eq!(talk_all(ALL, &parts), Err(Violation::NotYet));
    let parts = [greeting(), structured, ack(option::SET_META_CONTEXT), not_yet(option::GO)];
    assert_eq!(talk_all(ALL, &parts), Err(Violation::NotYet));
    assert_eq!(Violation::NotYet.to_string(), "the server awaits an image and does not serve yet");
}

#[test]
fn senseless_answers_to_wishes_end_the_conversation() {
    let structured = ack(option::STRUCTURED_REPLY);
    let allocation = context(ID, b"base:allocation");
    for replies in [
        vec![option_answer(option::STRUCTURED_REPLY, option_reply::ACK, &[0])],
        vec![context(ID, b"base:allocation")],
        vec![enter()],
        vec![structured.clone(), structured.clone()],
        vec![structured.clone(), enter()],
        vec![structured.clone(), allocation.clone(), allocation],
        vec![structured.clone(), option_answer(option::SET_META_CONTEXT, option_reply::META_CONTEXT, &[0; 3])],
        vec![structured, option_answer(option::SET_META_CONTEXT, option_reply::INFO, &[0; 4])],
    ] {
        let violation = talk_all(ALL, &[vec![greeting()], replies].concat()).unwrap_err();
        assert!(matches!(violation, Violation::UnexpectedOptionReply { .. }), "{violation}");
    }
}

fn simple(error: u32, cookie: u64) -> Vec<u8> {
    SimpleReply { error, cookie }.encode().to_vec()
}

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let head = ChunkHead { flags, kind, cookie, length: payload.len() as u32 };
    [head.encode::<CHUNK_LEN>().filled(), payload].concat()
}

fn data(flags: u16, cookie: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(flags, chunk::OFFSET_DATA, cookie, &[&offset.to_be_bytes(), bytes].concat())
}

fn hole(flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let payload = [&offset.to_be_bytes()[..], &length.to_be_bytes()].concat();
    chunk(flags, chunk::OFFSET_HOLE, cookie, &payload)
}

fn status(flags: u16, id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = id.to_be_bytes().to_vec();
    payload.extend(extents.iter().flat_map(|&(length, flags)| [length, flags]).flat_map(u32::to_be_bytes));
    chunk(flags, chunk::BLOCK_STATUS, 4, &payload)
}

fn error(flags: u16, cookie: u64, error: u32, text: &[u8]) -> Vec<u8> {
    let payload = [&error.to_be_bytes()[..], &(text.len() as u16).to_be_bytes(), text].concat();
    chunk(flags, chunk::ERROR, cookie, &payload)
}

fn error_offset(flags: u16, cookie: u64, error: u32, text: &[u8], offset: u64) -> Vec<u8> {
    let payload = [&error.to_be_bytes()[..], &(text.len() as u16).to_be_bytes(), text, &offset.to_be_bytes()].concat();
    chunk(flags, chunk::ERROR_OFFSET, cookie, &payload)
}

const DONE: u16 = chunk::DONE;

#[test]
fn chunks_of_several_replies_may_come_in_any_order() {
    let none = |cookie| chunk(DONE, chunk::NONE, cookie, &[]);
    let replies = [
        data(0, 1, 105, b"fghij"),
        data(0, 2, 202, b"34"),
        hole(0, 1, 100, 2),
        none(5),
        simple(28, 3),
        status(0, ID, &[(400, 3), (601, 0)]),
        data(0, 1, 102, b"cde"),
        none(4),
        hole(DONE, 2, 200, 2),
        none(1),
    ];
    let said = talk_all(ALL, &[vec![give_all()], replies.to_vec()].concat()).unwrap();
    let data = [
        ('r', 105, b"fghij".to_vec()),
        ('s', 202, b"34".to_vec()),
        ('r', 100, b"\0\0cde".to_vec()),
        ('s', 200, vec![0; 2]),
    ];
    assert_eq!(said.data, data);
    assert_eq!(said.extents, [('b', vec![(400, 3), (601, 0)])]);
    assert_eq!(said.replies, [('e', 0), ('w', 28), ('b', 0), ('s', 0), ('r', 0)]);
}

#[test]
fn a_reply_that_fails_may_have_brought_something() {
    let replies = [
        data(0, 1, 100, b"abc"),
        error_offset(0, 1, 5, b"bad sector", 103),
        data(0, 1, 108, b"ij"),
        error(DONE, 1, 22, b""),
        error(DONE, 2, 108, &[b'x'; 4096]),
        error(0, 4, 95, b""),
        status(DONE, ID, &[(1, 0)]),
        chunk(DONE, chunk::IS_ERROR + 77, 3, b"\0\0\0\x1c\0\x02hi and more"),
    ];
    let said = talk_all(ALL, &[vec![give_all()], replies.to_vec()].concat()).unwrap();
    assert_eq!(said.data, [('r', 100, b"abc".to_vec()), ('r', 108, b"ij".to_vec())]);
    assert_eq!(said.replies, [('r', 5), ('s', 108), ('b', 95), ('w', 28)]);
    // Only a READ has to fail with a chunk.
    let said = talk_all(ALL, &[give_all(), simple(22, 4), simple(5, 3)]).unwrap();
    assert_eq!(said.replies, [('b', 22), ('w', 5)]);
}

#[test]
fn simple_replies_say_where_their_data_is() {
    let parts = [greeting(), enter(), simple(0, 2), b"1234".to_vec(), simple(0, 1), b"abcdefghij".to_vec()];
    let said = talk_all(Wishes::default(), &parts).unwrap();
    assert_eq!(said.data, [('s', 200, b"1234".to_vec()), ('r', 100, b"abcdefghij".to_vec())]);
}

#[test]
fn only_the_last_extent_may_go_beyond_what_was_asked() {
    let large: Vec<(u32, u32)> = [(500, 0), (400, 3), (u32::MAX, 0)].to_vec();
    let said = talk_all(ALL, &[give_all(), status(DONE, ID, &large)]).unwrap();
    assert_eq!(said.extents, [('b', large)]);
    let many: Vec<(u32, u32)> = (0..5000).map(|n| (1, n % 4)).collect();
    let stream = [give_all(), status(DONE, ID, &many)].concat();
    for step in [1, 7, 8191, usize::MAX] {
        assert_eq!(talk(ALL, &stream, step), Err(Violation::UnexpectedChunk(kind::BLOCK_STATUS)));
    }
}

#[test]
fn hostile_chunks_end_the_conversation() {
    let senseless = |kind, length| Violation::SenselessChunk { kind, length };
    let range = |offset, length| Violation::ChunkRange { offset, length };
    let none = chunk(DONE, chunk::NONE, 1, &[]);
    let (r, s, b) = (1, 2, 4);
    for (replies, violation) in [
        // In themselves.
        (vec![chunk(0, chunk::NONE, r, &[])], senseless(0, 0)),
        (vec![chunk(DONE, chunk::NONE, r, &[1])], senseless(0, 1)),
        (vec![chunk(0, chunk::OFFSET_DATA, r, &[0; 8])], senseless(1, 8)),
        (vec![chunk(0, chunk::OFFSET_HOLE, r, &[0; 13])], senseless(2, 13)),
        (vec![hole(0, r, 100, 0)], senseless(2, 12)),
        (vec![chunk(0, 3, r, &[0; 8])], senseless(3, 8)),
        (vec![chunk(0, chunk::BLOCK_STATUS, b, &[0; 4])], senseless(5, 4)),
        (vec![chunk(0, chunk::BLOCK_STATUS, b, &[0; 13])], senseless(5, 13)),
        (vec![chunk(0, chunk::ERROR, r, &[0, 0, 0, 5, 0])], senseless(0x8001, 5)),
        (vec![error(DONE, r, 0, b"fine")], senseless(0x8001, 10)),
        (vec![chunk(0, chunk::ERROR, r, &[0, 0, 0, 5, 0, 1])], senseless(0x8001, 6)),
        (vec![chunk(0, chunk::ERROR_OFFSET, r, &[0, 0, 0, 5, 0, 1, 7])], senseless(0x8002, 7)),
        (vec![error(0, r, 5, &[b'x'; 4097])], senseless(0x8001, 4103)),
        // Against what was asked.
        (vec![none.clone()], Violation::IncompleteReply(1)),
        (vec![data(DONE, r, 100, b"abc")], Violation::IncompleteReply(1)),
        (vec![data(0, r, 100, b"abc"), data(0, r, 104, b"efghij"), none.clone()], Violation::IncompleteReply(1)),
        (vec![chunk(DONE, chunk::NONE, b, &[])], Violation::IncompleteReply(4)),
        (vec![data(0, r, 99, b"a")], range(99, 1)),
        (vec![data(0, r, 109, b"ab")], range(109, 2)),
        (vec![data(0, r, u64::MAX, b"ab")], range(u64::MAX, 2)),
        (vec![hole(0, r, 100, u32::MAX)], range(100, u32::MAX)),
        (vec![data(0, r, 100, b"abc"), hole(0, r, 102, 1)], range(102, 1)),
        (vec![data(0, r, 105, b"abc"), hole(0, r, 100, 10)], range(100, 10)),
        (vec![error_offset(0, r, 5, b"", 99)], range(99, 0)),
        (vec![error_offset(0, s, 5, b"", 205)], range(205, 0)),
        (vec![data(0, 3, 0, b"a")], Violation::UnexpectedChunk(kind::WRITE)),
        (vec![data(0, b, 300, b"a")], Violation::UnexpectedChunk(kind::BLOCK_STATUS)),
        (vec![chunk(0, chunk::BLOCK_STATUS, r, &[0; 12])], Violation::UnexpectedChunk(kind::READ)),
        (vec![status(0, ID + 1, &[(5, 0)])], Violation::UnexpectedChunk(kind::BLOCK_STATUS)),
        (vec![status(0, 99, &[(5, 0)])], Violation::UnexpectedChunk(kind::BLOCK_STATUS)),
        (vec![status(0, ID, &[(5, 0), (0, 0)])], Violation::UnexpectedChunk(kind::BLOCK_STATUS)),
        (vec![status(0, ID, &[(1000, 0), (1, 0)])], Violation::UnexpectedChunk(kind::BLOCK_STATUS)),
        (vec![status(0, ID, &[(5, 0)]), status(0, ID, &[(5, 0)])], Violation::UnexpectedChunk(kind::BLOCK_STATUS)),
        (vec![chunk(DONE, chunk::NONE, 6, &[])], Violation::UnknownCookie(6)),
        (vec![chunk(DONE, chunk::NONE, 5, &[]).repeat(2)], Violation::UnknownCookie(5)),
        // Simple ones.
        (vec![simple(0, r)], Violation::SimpleReply(1)),
        (vec![simple(5, r)], Violation::SimpleReply(1)),
        (vec![simple(0, b)], Violation::SimpleReply(4)),
        (vec![status(0, ID, &[(5, 0)]), simple(5, b)], Violation::SimpleReply(4)),
        (vec![vec![0x66; 20]], Violation::BadReplyMagic(0x6666_6666)),
    ] {
        assert_eq!(talk_all(ALL, &[vec![give_all()], replies].concat()), Err(violation));
    }
    let violation = talk_all(Wishes::default(), &[greeting(), enter(), none]).unwrap_err();
    assert_eq!(violation, Violation::BadReplyMagic(0x668e_33ef), "nobody asked for chunks");
    let parts = [greeting(), ack(option::STRUCTURED_REPLY), ack(option::SET_META_CONTEXT), enter()];
    let violation = talk_all(ALL, &[&parts[..], &[status(DONE, 0, &[(5, 0)])]].concat()).unwrap_err();
    assert_eq!(violation, Violation::UnexpectedChunk(kind::BLOCK_STATUS), "there is no allocation");
}

#[test]
fn shared_payloads_leave_in_order_and_are_let_go_of() {
    let mut pool = Pool::new(4096);
    let mut session = ClientSession::new(String::new());
    let mut bytes = Buffer::with_capacity(4);
    bytes.append(b"2345");
    let bytes = Rc::new(bytes);
    session.command(kind::WRITE, 0, 0, 8, 'w');
    session.push_shared(bytes.clone());
    let mut own = pool.take(4).unwrap();
    own.append(b"own!");
    session.push_payload(own);
    session.disconnect();
    assert_eq!((session.buffered(), Rc::strong_count(&bytes)), (4096, 2));
    let sent = send(&mut session, &mut pool);
    assert_eq!((&sent[28..36], sent.len()), (b"2345own!".as_slice(), 28 + 8 + 28));
    assert_eq!((session.buffered(), pool.available(), Rc::strong_count(&bytes)), (0, 4096, 1));
}
