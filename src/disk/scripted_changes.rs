//! Changes of the image by a ring that does as it is told.

#![allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]

use super::changes::FLYING_MAX;
use super::mark;
use super::reads::Way;
use super::ring::Cost;
use super::scripted::{bytes, read, write, House, SIZE};
use super::tests::{buffer, Random};
use crate::sys::pages::FileSystem;
use crate::work::Action;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

const MIB: u64 = 1 << 20;

/// An image that another process keeps. Changes of it count as slow.
fn far() -> House {
    let mut house = House::costly(Cost::THREAD);
    house.image.source = FileSystem::Distributed;
    count_as(&mut house, true);
    house
}

fn count_as(house: &mut House, slow: bool) {
    house.engine.flights.as_mut().unwrap().changes_mut().count_as(slow);
}

fn fill(offset: u64, length: usize, byte: u8) -> Action {
    Action::Write { offset, payload: buffer(&vec![byte; length]), fua: false, follows: false }
}

fn zero(offset: u64, length: u64, no_hole: bool, fast: bool) -> Action {
    Action::Zero { offset, length, fua: false, no_hole, fast }
}

fn trim(offset: u64, length: u64) -> Action {
    Action::Trim { offset, length, fua: false }
}

fn content(house: &House, offset: u64, length: usize) -> Vec<u8> {
    let mut found = vec![0; length];
    house.image.file.read_exact_at(&mut found, offset).unwrap();
    found
}

/// Kicks while that moves something.
fn settle(house: &mut House) {
    house.kick();
    while house.engine.has_work() {
        house.kick();
    }
}

/// The tags of what is done, with the kinds of their errors.
fn done(house: &mut House) -> Vec<(u32, Option<ErrorKind>)> {
    std::iter::from_fn(|| house.engine.pop_done())
        .map(|done| (done.tag, done.result.err().map(|error| error.kind())))
        .collect()
}

/// Ends all that flies, one after the other.
fn end_all(house: &mut House) {
    while house.taken() > 0 {
        let length = house.range(0).1;
        house.end(0, Ok(length));
        settle(house);
    }
}

#[test]
fn changes_end_in_every_order() {
    for mut order in 0..24 {
        let mut house = far();
        house.submit(1, 0, fill(0, 4096, 7));
        house.submit(1, 1, zero(10_000, 5000, true, false));
        house.submit(2, 2, trim(20_000, 5000));
        house.submit(2, 3, zero(30_000, 5000, false, true));
        house.kick();
        assert_eq!((house.taken(), house.engine.has_work(), house.engine.flying().len()), (4, false, 4));
        for left in (1..=4).rev() {
            let index = order % left;
            order /= left;
            let (offset, length) = house.range(index);
            assert_eq!(house.is_punch(index), offset >= 20_000);
            house.end(index, Ok(length));
            house.kick();
            assert_eq!(done(&mut house), [((offset / 10_000) as u32, None)]);
            assert_eq!((house.taken(), house.engine.has_work()), (left - 1, false));
        }
        assert!(house.engine.flying().is_empty());
        assert_eq!(content(&house, 0, 4096), [7; 4096]);
        for offset in [10_000, 20_000, 30_000] {
            assert_eq!(content(&house, offset, 5000), [0; 5000]);
            assert_eq!(content(&house, offset - 1, 1), bytes(offset - 1, 1));
        }
    }
}

#[test]
fn a_write_that_ends_short_goes_on_with_the_rest() {
    const LENGTH: usize = 40;
    for first in 1..LENGTH {
        for second in 1..LENGTH - first {
            for is_zero in [false, true] {
                let mut house = far();
                let action = if is_zero { zero(123, LENGTH as u64, true, false) } else { fill(123, LENGTH, 7) };
                house.submit(1, 7, action);
                house.kick();
                let mut at = 0;
                for cut in [first, second, LENGTH - first - second] {
                    assert!(done(&mut house).is_empty());
                    assert_eq!(house.range(0), (123 + at as u64, LENGTH - at));
                    house.end(0, Ok(cut));
                    settle(&mut house);
                    at += cut;
                }
                let done = house.engine.pop_done().unwrap();
                assert!(done.result.is_ok() && done.touched == Some(123..123 + LENGTH as u64));
                assert_eq!(done.buffer.map(|buffer| buffer.len()), (!is_zero).then_some(LENGTH));
                let byte = if is_zero { 0 } else { 7 };
                assert_eq!(content(&house, 123, LENGTH), [byte; LENGTH]);
                assert!(house.taken() == 0 && !house.engine.has_work());
            }
        }
    }
}

#[test]
fn each_error_is_one_of_its_own_change() {
    let others = [libc::EAGAIN, libc::EINTR, libc::ECANCELED];
    for errno in (1..134).filter(|errno| !others.contains(errno)) {
        let mut house = far();
        house.submit(1, 1, fill(0, 4096, 7));
        house.submit(1, 2, fill(4096, 4096, 8));
        house.kick();
        house.end(0, Err(errno));
        house.end(0, Ok(4096));
        settle(&mut house);
        assert_eq!(done(&mut house), [(1, Some(io::Error::from_raw_os_error(errno).kind())), (2, None)], "{errno}");
    }
    let mut house = far();
    house.submit(1, 1, fill(0, 4096, 7));
    house.submit(1, 2, zero(8192, 4096, true, false));
    house.kick();
    house.end(0, Ok(0));
    house.end(0, Ok(0));
    settle(&mut house);
    let full = Some(ErrorKind::StorageFull);
    assert_eq!(done(&mut house), [(1, full), (2, full)], "a disk that takes nothing is full");
}

#[test]
fn what_was_not_tried_is_tried_again() {
    for errno in [libc::EAGAIN, libc::EINTR] {
        let mut house = far();
        house.submit(1, 1, fill(0, 4096, 7));
        house.submit(1, 2, trim(8192, 4096));
        house.kick();
        house.end(0, Ok(96));
        settle(&mut house);
        for _ in 0..3 {
            house.end(0, Err(errno));
            house.end(0, Err(errno));
            settle(&mut house);
            assert_eq!((done(&mut house), house.taken()), (vec![], 2));
        }
        end_all(&mut house);
        assert_eq!(done(&mut house).len(), 2);
        assert_eq!(content(&house, 0, 4096), [7; 4096]);
    }
    // The kernel had no thread: this thread does a step.
    let mut house = far();
    house.submit(1, 1, fill(0, 4096, 7));
    house.submit(1, 2, zero(8192, 4096, true, false));
    house.submit(1, 3, trim(16_384, 4096));
    house.submit(1, 4, zero(0, 8 * MIB, true, false));
    house.kick();
    for _ in 0..3 {
        house.end(0, Err(libc::ECANCELED));
    }
    house.kick();
    assert_eq!(done(&mut house), [(1, None), (2, None), (3, None)]);
    assert_eq!((content(&house, 0, 4096), content(&house, 8192, 4096)), (vec![7; 4096], vec![0; 4096]));
    settle(&mut house);
    assert_eq!(house.range(0).0, 0);
    house.end(0, Err(libc::ECANCELED));
    settle(&mut house);
    assert!(house.range(0).0 > 0, "and the kernel gets the next");
}

#[test]
fn changes_that_overlap_are_kept_apart() {
    let mut house = far();
    house.submit(1, 1, fill(0, 4096, 1));
    house.submit(1, 2, fill(4095, 4096, 2));
    house.submit(1, 3, fill(4000, 4096, 3));
    house.submit(2, 4, fill(100, 1, 4));
    house.submit(3, 5, fill(100_000, 10, 5));
    house.kick();
    assert_eq!((house.taken(), house.engine.has_work()), (2, false));
    assert_eq!((house.range(0), house.range(1)), ((0, 4096), (100_000, 10)));
    // What is left of a short one still comes first.
    house.end(0, Ok(50));
    settle(&mut house);
    assert_eq!((house.taken(), house.range(1)), (2, (50, 4046)));
    end_all(&mut house);
    assert_eq!(done(&mut house).len(), 5);
    let expected = [&[1; 100][..], &[4], &[1; 3899], &[3; 4096], &[2; 95]].concat();
    assert!(content(&house, 0, expected.len()) == expected);
}

#[test]
fn whatever_the_order_of_their_ends_the_later_change_wins() {
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let mut house = far();
        let mut expected = content(&house, 0, SIZE as usize);
        let (mut submitted, mut ended) = (0, 0);
        while submitted < 60 || house.taken() > 0 {
            if submitted < 60 && random.below(2) == 0 {
                // Each owner has a range of its own: nobody orders the changes of two.
                let owner = random.below(3);
                let (offset, length) = (owner * 200_000 + random.below(5000), random.below(3000) + 1);
                let action = match random.below(4) {
                    0 => zero(offset, length, random.below(2) == 0, false),
                    1 => trim(offset, length),
                    _ => fill(offset, length as usize, submitted as u8 + 1),
                };
                let byte = if let Action::Write { .. } = &action { submitted as u8 + 1 } else { 0 };
                expected[offset as usize..][..length as usize].fill(byte);
                house.submit(owner, submitted, action);
                submitted += 1;
            } else if house.taken() > 0 {
                let index = random.below(house.taken() as u64) as usize;
                let length = house.range(index).1;
                let end = match random.below(4) {
                    0 => Err(libc::EAGAIN),
                    1 if !house.is_punch(index) => Ok(random.below(length as u64) as usize + 1),
                    _ => Ok(length),
                };
                house.end(index, end);
            }
            settle(&mut house);
            let ranges: Vec<_> = (0..house.taken()).map(|index| house.range(index)).collect();
            for (at, one) in ranges.iter().enumerate() {
                for other in &ranges[at + 1..] {
                    let apart = one.0 + one.1 as u64 <= other.0 || other.0 + other.1 as u64 <= one.0;
                    assert!(apart, "seed {seed}: {one:?} and {other:?}");
                }
            }
            ended += done(&mut house).len();
        }
        assert_eq!(ended, 60, "seed {seed}");
        assert!(content(&house, 0, SIZE as usize) == expected, "seed {seed}");
    }
}

#[test]
fn few_fly_and_no_owner_takes_the_room_of_others() {
    let mut house = far();
    for tag in 0..40 {
        house.submit(1, tag, fill(u64::from(tag) * 10, 10, 1));
    }
    house.kick();
    assert_eq!((house.taken(), house.engine.has_work()), (4, false));
    for owner in 2..6 {
        for tag in 0..3 {
            house.submit(owner, 100 + tag, fill(1000 * owner + u64::from(tag) * 10, 10, 1));
        }
    }
    house.submit(9, 200, read(0, 10));
    house.kick();
    assert_eq!((house.taken(), house.engine.has_work()), (FLYING_MAX + 1, false), "and reads beside them");
    end_all(&mut house);
    assert_eq!(done(&mut house).len(), 53);

    // A full ring hands everything back.
    let mut house = far();
    house.script.borrow_mut().room = 2;
    for tag in 0..3 {
        house.submit(1, tag, fill(u64::from(tag) * 10, 10, 9));
        house.submit(1, 10 + tag, zero(1000 + u64::from(tag) * 10, 10, true, false));
        house.submit(1, 20 + tag, trim(2000 + u64::from(tag) * 10, 10));
    }
    house.kick();
    while house.taken() > 0 {
        let length = house.range(0).1;
        house.end(0, Ok(length));
        house.kick();
    }
    assert_eq!(done(&mut house).len(), 9);
    assert_eq!(content(&house, 0, 30), [9; 30]);
}

#[test]
fn long_ranges_go_in_pieces_and_zeroes_are_written_where_holes_are_not_to_be_had() {
    let mut house = far();
    house.submit(1, 1, zero(5, 40 * MIB, false, false));
    house.submit(1, 2, fill(4 + 40 * MIB, 6, 7));
    let mut pieces = Vec::new();
    house.kick();
    while house.range(0).1 > 6 {
        assert!(house.taken() == 1 && house.is_punch(0), "the write waits for all of it");
        pieces.push(house.range(0));
        let length = house.range(0).1;
        house.end(0, Ok(length));
        settle(&mut house);
    }
    assert_eq!(pieces, [(5, 16 << 20), (5 + 16 * MIB, 16 << 20), (5 + 32 * MIB, 8 << 20)]);
    end_all(&mut house);
    assert_eq!((done(&mut house), content(&house, 4 + 40 * MIB, 6)), (vec![(1, None), (2, None)], vec![7; 6]));

    for errno in [libc::EOPNOTSUPP, libc::EINVAL] {
        let mut house = far();
        house.submit(1, 1, zero(0, MIB, false, false));
        house.submit(2, 2, zero(2 * MIB, MIB, false, true));
        house.submit(3, 3, trim(4 * MIB, MIB));
        house.kick();
        for _ in 0..3 {
            house.end(0, Err(errno));
        }
        settle(&mut house);
        assert_eq!(done(&mut house), [(2, Some(ErrorKind::Unsupported)), (3, None)]);
        house.submit(2, 4, zero(2 * MIB, MIB, true, true));
        house.submit(3, 5, trim(4 * MIB, MIB));
        settle(&mut house);
        assert_eq!(done(&mut house), [(4, Some(ErrorKind::Unsupported)), (5, None)], "nothing is tried again");
        let mut pieces = 0;
        while house.taken() > 0 {
            let (offset, length) = house.range(0);
            assert_eq!((offset, length, house.is_punch(0)), (pieces * (256 << 10), 256 << 10, false));
            house.end(0, Ok(length));
            pieces += 1;
            settle(&mut house);
        }
        assert_eq!((pieces, done(&mut house)), (4, vec![(1, None)]));
        assert!(content(&house, 0, MIB as usize) == vec![0; MIB as usize]);
    }
}

#[test]
fn stable_storage_is_asked_for_after_the_last_piece() {
    let mut house = far();
    // One request in three pieces, the last of which asks.
    house.submit(1, 1, write(0, 100, false));
    house.submit(1, 1, write(100, 100, false));
    house.submit(1, 1, write(200, 100, true));
    house.kick();
    assert_eq!(house.taken(), 3);
    house.end(2, Ok(100));
    settle(&mut house);
    house.end(0, Ok(60));
    settle(&mut house);
    assert_eq!(house.done(), []);
    assert!((0..house.taken()).all(|index| !house.is_sync(index)), "two pieces are under way");
    end_all(&mut house);
    assert_eq!(house.done(), [(1, None), (1, None), (1, None)]);
    assert_eq!(house.engine.syncs(), 1);

    // A long one, and one that fails.
    house.submit(1, 2, Action::Zero { offset: 0, length: 512 << 10, fua: true, no_hole: true, fast: false });
    house.submit(2, 3, write(700_000, 100, true));
    house.kick();
    assert_eq!(house.taken(), 2);
    house.end(1, Err(libc::EIO));
    house.end(0, Ok(256 << 10));
    settle(&mut house);
    assert_eq!((done(&mut house).len(), house.taken(), house.is_sync(0)), (1, 1, false));
    house.end(0, Ok(256 << 10));
    settle(&mut house);
    assert!(house.taken() == 1 && house.is_sync(0) && done(&mut house).is_empty());
    house.end(0, Ok(0));
    settle(&mut house);
    assert_eq!(done(&mut house), [(2, None)]);
}

#[test]
fn a_flush_waits_for_what_its_owner_sent_before_it() {
    let mut house = far();
    for tag in 0..10 {
        house.submit(1, tag, write(u64::from(tag) * 100, 100, false));
    }
    house.submit(1, 50, Action::Flush);
    house.submit(1, 11, write(5000, 100, false));
    house.submit(2, 60, Action::Flush);
    house.kick();
    let sync = (0..house.taken()).find(|&index| house.is_sync(index)).unwrap();
    house.end(sync, Ok(0));
    settle(&mut house);
    assert_eq!(done(&mut house), [(60, None)], "the other's does not");
    for left in (0..10).rev() {
        assert!((0..house.taken()).all(|index| !house.is_sync(index)));
        house.end(0, Ok(100));
        settle(&mut house);
        assert_eq!(done(&mut house).len(), 1, "{left}");
    }
    let sync = (0..house.taken()).find(|&index| house.is_sync(index)).unwrap();
    assert_eq!((house.taken(), house.engine.syncs()), (2, 2), "and not for what came behind it");
    house.end(sync, Ok(0));
    settle(&mut house);
    assert_eq!(done(&mut house), [(50, None)]);
    end_all(&mut house);
    assert_eq!(done(&mut house), [(11, None)]);
}

#[test]
fn what_flies_of_an_owner_that_is_gone_goes_no_further() {
    // Whole, short, failed, not tried, and without a thread.
    forget_four([Ok(100), Ok(3), Err(libc::EIO), Err(libc::EAGAIN)]);
    forget_four([Err(libc::ECANCELED), Ok(100), Err(libc::EAGAIN), Err(libc::ECANCELED)]);
}

/// Four fly, and end like this.
fn forget_four(ends: [Result<usize, i32>; 4]) {
    let mut house = far();
    for tag in 0..12 {
        house.submit(1, tag, write(u64::from(tag) * 100, 100, tag == 3));
    }
    house.submit(1, 20, Action::Flush);
    house.kick();
    house.submit(2, 30, write(50_000, 100, false));
    house.kick();
    assert_eq!(house.taken(), 5);
    let flying = house.engine.flying();
    house.engine.forget(1);
    let gone = done(&mut house);
    assert!(gone.len() == 9 && gone.iter().all(|(_, error)| *error == Some(ErrorKind::ConnectionAborted)));
    assert_eq!(house.engine.flying(), flying, "what flies flies on");
    for end in ends {
        house.end(0, end);
        settle(&mut house);
        let done = house.engine.pop_done().unwrap();
        assert_eq!(done.result.unwrap_err().kind(), ErrorKind::ConnectionAborted);
        assert!(done.touched.is_some() && done.buffer.unwrap().len() == 100, "its memory is back");
    }
    assert_eq!((house.taken(), house.engine.syncs()), (1, 0), "none of them flies again");
    end_all(&mut house);
    assert_eq!(done(&mut house).iter().filter(|(_, error)| error.is_none()).count(), 1);
    assert!(house.engine.flying().is_empty() && !house.engine.has_work());
}

#[test]
fn this_thread_does_what_is_quick_unless_it_would_wait_for_what_flies() {
    // Elsewhere it does all.
    let mut house = far();
    house.image.source = FileSystem::Local;
    house.submit(1, 1, fill(0, 10, 1));
    house.kick();
    assert_eq!((house.taken(), done(&mut house)), (0, vec![(1, None)]));
    let mut house = House::costly(Cost::NONE);
    house.image.source = FileSystem::Distributed;
    house.submit(1, 1, fill(0, 10, 1));
    house.kick();
    assert_eq!((house.taken(), done(&mut house)), (0, vec![(1, None)]), "reads take no threads there");

    let mut house = far();
    let each = |house: &mut House| {
        let changes = [fill(0, 10, 1), zero(4096, 10, true, false), trim(8192, 4096)];
        for (tag, change) in (1..).zip(changes) {
            house.submit(1, tag, change);
            house.kick();
        }
    };
    house.submit(2, 9, fill(90_000, 10, 1));
    house.kick();
    count_as(&mut house, false);
    each(&mut house);
    assert_eq!((house.taken(), done(&mut house)), (4, vec![]), "one flies");
    end_all(&mut house);
    assert_eq!(done(&mut house).len(), 4);

    count_as(&mut house, false);
    each(&mut house);
    assert_eq!((house.taken(), done(&mut house).len()), (0, 3));
    for tag in 1..4 {
        house.submit(1, tag, fill(u64::from(tag) * 10, 10, 1));
    }
    house.kick();
    assert_eq!((house.taken(), done(&mut house)), (2, vec![(1, None)]), "one in a kick");
    end_all(&mut house);
    assert_eq!(done(&mut house).len(), 2);

    count_as(&mut house, false);
    house.submit(2, 9, Action::Flush);
    house.kick();
    each(&mut house);
    assert_eq!((house.taken(), done(&mut house)), (4, vec![]), "an fdatasync runs");
    end_all(&mut house);
    assert_eq!(done(&mut house).len(), 4);
    house.submit(2, 9, fill(0, 0, 1));
    count_as(&mut house, true);
    house.kick();
    assert_eq!(done(&mut house), [(9, None)], "nothing is nothing");
}

#[test]
fn a_read_of_what_a_change_may_have_locked_is_the_kernels() {
    let mut house = far();
    house.engine.way = Way::InMemory;
    house.submit(1, 1, fill(70_000, 10, 1));
    house.kick();
    for (tag, offset, flies) in [(2, 0, false), (3, 65_530, true), (4, 131_072, false), (5, 131_071, true)] {
        house.submit(2, tag, read(offset, 10));
        house.submit(2, tag + 10, Action::Verify { offset, length: 10 });
        settle(&mut house);
        assert_eq!(done(&mut house).len(), if flies { 0 } else { 2 }, "{offset}");
    }
    assert_eq!(house.taken(), 5);
    end_all(&mut house);
    assert_eq!(done(&mut house).len(), 5);
}

#[test]
fn changes_that_fly_at_the_end_are_waited_for_if_they_are_short_and_else_left_to_the_kernel() {
    for is_over in [false, true] {
        let mut house = far();
        house.submit(1, 1, fill(0, 10, 1));
        house.submit(1, 2, fill(0, 10, 2));
        house.submit(2, 3, read(5000, 10));
        house.submit(2, 4, Action::Flush);
        house.kick();
        assert!(house.is_sync(0) && house.range(1) == (0, 10));
        if is_over {
            house.end(1, Ok(5));
        }
        assert_eq!(house.engine.leak(), !is_over);
        assert!(house.script.borrow().is_leaked);
        assert_eq!(house.taken(), if is_over { 2 } else { 3 }, "nothing new begins");
    }
}

/// A change that flies and a sync lock the file, and a mark would wait for them.
#[test]
fn a_mark_is_set_when_nothing_flies_and_what_comes_later_waits_for_it() {
    let mut house = far();
    if mark::set(&house.image, None).is_err() {
        // The file system of temporary files has no marks; the tests of migrations say so.
        return;
    }
    let mark = |house: &House| mark::get(&house.image).unwrap().map(|mark| String::from_utf8(mark).unwrap());
    house.submit(1, 0, fill(0, 4096, 7));
    house.kick();
    house.engine.submit_mark(9, 1, Some("first".into()), true);
    house.submit(1, 2, fill(8192, 4096, 7));
    house.kick();
    assert_eq!((house.taken(), house.engine.has_work(), mark(&house)), (1, false, None));
    house.end(0, Ok(4096));
    settle(&mut house);
    assert_eq!((done(&mut house), mark(&house).as_deref()), (vec![(0, None)], Some("first")));
    assert_eq!((0..house.taken()).filter(|&index| house.syncs_all(index)).count(), 1);
    let change = (0..2).find(|&index| !house.is_sync(index)).unwrap();
    house.end(change, Ok(4096));
    settle(&mut house);
    assert_eq!((done(&mut house), house.taken()), (vec![(2, None)], 1));

    // Behind the sync comes another mark, which need not be durable; one more is dropped with its owner.
    house.engine.submit_mark(9, 3, None, false);
    house.engine.submit_mark(8, 4, Some("dropped".into()), true);
    house.kick();
    house.engine.forget(8);
    assert_eq!((done(&mut house), house.engine.has_work()), (vec![(4, Some(ErrorKind::ConnectionAborted))], false));
    assert_eq!(mark(&house).as_deref(), Some("first"));
    house.end(0, Ok(0));
    settle(&mut house);
    assert_eq!((done(&mut house), mark(&house), house.taken()), (vec![(1, None), (3, None)], None, 0));
    house.submit(1, 5, Action::Flush);
    settle(&mut house);
    assert!(house.is_sync(0) && !house.syncs_all(0), "what need not be durable costs no fsync");
}
