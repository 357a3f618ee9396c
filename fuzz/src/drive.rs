//! PURE: plays a peer and a disk against a session, each when the choices say so.

use super::choices::Choices;
use flexnbd::buffer::{Buffer, Pool, SLICE};
use flexnbd::proto::error::Violation;
use flexnbd::proto::outbox::PIECES_MAX;
use flexnbd::proto::server::{End, Pass, ServerSession, Step, BUFFERED_MAX, IN_FLIGHT_MAX};
use flexnbd::work::{Action, Done};
use std::collections::BTreeSet;
use std::io::{ErrorKind, IoSlice};

/// The most a session holds beside its payloads, in bytes: what it receives into.
const INBOX: usize = 64 << 10;

/// A piece of work that went well, and that nothing came of.
pub(super) fn done(tag: u32) -> Done {
    Done { owner: 0, tag, buffer: None, touched: None, extents: Vec::new(), result: Ok(()) }
}

/// Plays a peer that sends `stream` and takes what comes, and a disk, each when the choices say so. Returns how the
/// session ended; it holds no memory then.
pub(super) fn converse(
    mut session: ServerSession,
    stream: &[u8],
    choices: &mut Choices,
    cap: usize,
    work: impl Fn(u32, Action) -> Done,
    mut receive: impl FnMut(&[u8]),
) -> Result<End, Violation> {
    let mut input = stream;
    let mut pool = Pool::new(cap);
    let mut disk: Vec<Done> = Vec::new();
    let mut hung_up = false;
    let mut now_ms = 0;

    let end = loop {
        let step = session.next_step(Pass::Everything, &mut pool);
        let receives = matches!(step, Step::NeedBytes) && !hung_up;
        let goes_on = matches!(step, Step::Request(_) | Step::Refused(_));
        if let Step::Request(request) = step {
            disk.push(work(request.tag, request.action));
        }
        let tags: BTreeSet<u32> = disk.iter().map(|held| held.tag).collect();
        assert!(tags.len() <= IN_FLIGHT_MAX, "too many in flight");
        let held: usize = disk.iter().flat_map(|held| &held.buffer).map(Buffer::capacity).sum();
        assert!(
            held <= BUFFERED_MAX + SLICE && cap - pool.available() <= BUFFERED_MAX + SLICE + INBOX,
            "too much held"
        );
        // A read that begins in a hole is answered in two pieces.
        assert!(session.in_flight() <= 2 * IN_FLIGHT_MAX, "replies without a limit");
        assert!(session.oldest_ms().is_none_or(|oldest_ms| oldest_ms <= now_ms));
        if let Some(end) = session.finished() {
            break Ok(end);
        }
        now_ms += 1;
        let choice = choices.next();
        let can = [goes_on, receives, session.wants_send(), !disk.is_empty()];
        let act = (0..can.len()).map(|next| (choice + next) % can.len()).find(|&act| can.get(act) == Some(&true));
        assert!(act.is_some(), "stuck");
        match act {
            Some(0) => {}
            Some(1) if input.is_empty() => {
                hung_up = true;
                if let Err(violation) = session.end_of_stream() {
                    break Err(violation);
                }
            }
            Some(1) => {
                let mut n = choices.piece(input.len());
                let before = input.len();
                for space in session.recv_space(&mut pool) {
                    let (piece, rest) = input.split_at(n.min(space.len()));
                    space.iter_mut().zip(piece).for_each(|(to, from)| *to = *from);
                    n -= piece.len();
                    input = rest;
                }
                assert!(input.len() < before, "it needs bytes and has no space");
                session.received(before - input.len(), now_ms);
                if choice >= 0x80 {
                    session.park(&mut pool);
                }
            }
            Some(2) => {
                let mut slices = [IoSlice::new(&[]); PIECES_MAX];
                let pieces = session.to_send(&mut slices);
                let waiting = slices.iter().take(pieces).map(|slice| slice.len()).sum();
                let n = choices.piece(waiting);
                let mut left = n;
                for slice in slices.iter().take(pieces) {
                    let piece = slice.get(..left).unwrap_or(slice);
                    receive(piece);
                    left -= piece.len();
                }
                session.sent(n, &mut pool);
            }
            _ => {
                let mut done = disk.swap_remove(choice / can.len() % disk.len());
                if choices.next() == 0xFF {
                    done.result = Err(ErrorKind::Other.into());
                }
                let completed = session.complete(done, &mut pool);
                let failed = completed.and_then(|completed| completed.result.err());
                if let Some(violation) = failed.and_then(|failed| failed.violation) {
                    break Err(violation);
                }
            }
        }
    };

    session.release(&mut pool);
    disk.into_iter().filter_map(|held| held.buffer).for_each(|buffer| pool.give(buffer));
    assert_eq!(pool.available(), cap, "all memory comes back");
    end
}
