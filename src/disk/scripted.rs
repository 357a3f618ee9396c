//! The engine over a ring that does as it is told: every order in which operations end, and every way.

#![allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]

use super::engine::Engine;
use super::image::Image;
use super::kernel::Kernel;
use super::mark;
use super::reads::Way;
use super::ring::{Cost, Flights};
use super::tests::{buffer, TempFile};
use crate::buffer::Buffer;
use crate::sys::pages::FileSystem;
use crate::sys::ring::Completion;
use crate::work::{Action, Op};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

pub(super) const SIZE: u64 = 1 << 20;

/// What was pushed.
#[derive(Debug)]
enum Pushed {
    Read { id: u32, buffer: Buffer, offset: u64, len: usize },
    Write { id: u32, buffer: Buffer, from: usize, offset: u64, len: usize },
    Punch { id: u32, offset: u64, length: u64 },
    Sync { id: u32, number: usize, all: bool },
}

/// What a ring was given, and what it is to say.
pub(super) struct Script {
    pushed: Vec<Pushed>,
    /// What the kernel has in hand.
    taken: Vec<Pushed>,
    ended: VecDeque<Completion>,
    /// How many operations there is room for.
    pub(super) room: usize,
    /// Whether the kernel takes what was pushed.
    takes: io::Result<bool>,
    pub(super) is_leaked: bool,
}

struct Told {
    script: Rc<RefCell<Script>>,
    notifier: UnixStream,
}

impl Script {
    fn push(&mut self, pushed: Pushed) -> Result<(), Pushed> {
        if self.pushed.len() + self.taken.len() + self.ended.len() >= self.room {
            return Err(pushed);
        }
        self.pushed.push(pushed);
        Ok(())
    }
}

impl Kernel for Told {
    fn push_read(&mut self, id: u32, buffer: Buffer, offset: u64, len: usize) -> Result<(), Buffer> {
        self.script.borrow_mut().push(Pushed::Read { id, buffer, offset, len }).map_err(|pushed| match pushed {
            Pushed::Read { buffer, .. } => buffer,
            _ => unreachable!(),
        })
    }

    fn push_write(&mut self, id: u32, buffer: Buffer, from: usize, offset: u64, len: usize) -> Result<(), Buffer> {
        self.script.borrow_mut().push(Pushed::Write { id, buffer, from, offset, len }).map_err(|pushed| match pushed {
            Pushed::Write { buffer, .. } => buffer,
            _ => unreachable!(),
        })
    }

    fn push_punch_hole(&mut self, id: u32, offset: u64, length: u64) -> bool {
        self.script.borrow_mut().push(Pushed::Punch { id, offset, length }).is_ok()
    }

    fn push_sync(&mut self, id: u32, number: usize, all: bool) -> bool {
        self.script.borrow_mut().push(Pushed::Sync { id, number, all }).is_ok()
    }

    fn enter(&mut self) -> io::Result<()> {
        let script = &mut *self.script.borrow_mut();
        match &script.takes {
            Ok(true) => script.taken.append(&mut script.pushed),
            Ok(false) => {}
            Err(error) => return Err(error.kind().into()),
        }
        Ok(())
    }

    fn pop(&mut self) -> Option<Completion> {
        self.script.borrow_mut().ended.pop_front()
    }

    fn is_stuck(&self) -> bool {
        let script = self.script.borrow();
        !script.pushed.is_empty() && script.taken.is_empty()
    }

    fn notifier(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }

    fn leak(self: Box<Self>) {
        self.script.borrow_mut().is_leaked = true;
    }
}

/// An engine on a file whose bytes tell where they are, and its ring.
pub(super) struct House {
    _temp: TempFile,
    pub(super) image: Image,
    pub(super) engine: Engine,
    pub(super) script: Rc<RefCell<Script>>,
}

/// The byte of the image at an offset.
pub(super) fn byte(offset: u64) -> u8 {
    (offset % 251) as u8 + 1
}

pub(super) fn bytes(offset: u64, length: usize) -> Vec<u8> {
    (offset..offset + length as u64).map(byte).collect()
}

pub(super) fn read(offset: u64, length: usize) -> Action {
    Action::Read { offset, length, skip_hole: false, buffer: Buffer::with_capacity(length) }
}

pub(super) fn write(offset: u64, length: usize, fua: bool) -> Action {
    Action::Write { offset, payload: buffer(&bytes(offset, length)), fua, follows: false }
}

/// A done operation: its tag, and its error.
pub(super) type Outcome = (u32, Option<ErrorKind>);

impl House {
    /// Nothing counts as cached.
    pub(super) fn new() -> Self {
        Self::costly(Cost::NONE)
    }

    pub(super) fn costly(cost: Cost) -> Self {
        Self::build(cost, false)
    }

    /// The image is open twice.
    pub(super) fn twice() -> Self {
        Self::build(Cost::NONE, true)
    }

    fn build(cost: Cost, is_open_twice: bool) -> Self {
        let temp = TempFile::new("scripted");
        temp.file.write_all_at(&bytes(0, SIZE as usize), 0).unwrap();
        let again = is_open_twice.then(|| Rc::new(temp.file.try_clone().unwrap()));
        let image = Image { again, ..Image::of(&temp.file, SIZE) };
        let script = Script {
            pushed: Vec::new(),
            taken: Vec::new(),
            ended: VecDeque::new(),
            room: 1000,
            takes: Ok(true),
            is_leaked: false,
        };
        let script = Rc::new(RefCell::new(script));
        let kernel = Told { script: Rc::clone(&script), notifier: UnixStream::pair().unwrap().0 };
        let mut engine = Engine::new(&image, Some(Flights::of(Box::new(kernel), cost)));
        engine.way = Way::Blind;
        Self { _temp: temp, image, engine, script }
    }

    pub(super) fn submit(&mut self, owner: u64, tag: u32, action: Action) {
        self.engine.submit(Op { owner, tag, action });
    }

    pub(super) fn kick(&mut self) {
        self.engine.kick(&self.image);
    }

    /// How many operations the kernel has in hand.
    pub(super) fn taken(&self) -> usize {
        self.script.borrow().taken.len()
    }

    /// The range that an operation is about that the kernel has in hand; empty for an fdatasync.
    pub(super) fn range(&self, index: usize) -> (u64, usize) {
        match &self.script.borrow().taken[index] {
            Pushed::Read { offset, len, .. } | Pushed::Write { offset, len, .. } => (*offset, *len),
            Pushed::Punch { offset, length, .. } => (*offset, *length as usize),
            Pushed::Sync { .. } => (0, 0),
        }
    }

    pub(super) fn is_punch(&self, index: usize) -> bool {
        matches!(self.script.borrow().taken[index], Pushed::Punch { .. })
    }

    pub(super) fn is_sync(&self, index: usize) -> bool {
        matches!(self.script.borrow().taken[index], Pushed::Sync { .. })
    }

    /// The number of the open file that it is of.
    fn synced_file(&self, index: usize) -> usize {
        match self.script.borrow().taken[index] {
            Pushed::Sync { number, .. } => number,
            _ => panic!("it is no sync"),
        }
    }

    /// Whether that is an fsync.
    pub(super) fn syncs_all(&self, index: usize) -> bool {
        matches!(self.script.borrow().taken[index], Pushed::Sync { all: true, .. })
    }

    /// Ends what the kernel has in hand at an index: so many bytes, or an error number.
    pub(super) fn end(&mut self, index: usize, result: Result<usize, i32>) {
        let script = &mut *self.script.borrow_mut();
        let (id, buffer) = match script.taken.remove(index) {
            Pushed::Read { id, mut buffer, offset, .. } => {
                let n = result.unwrap_or(0);
                buffer.spare()[..n].copy_from_slice(&bytes(offset, n));
                (id, Some(buffer))
            }
            Pushed::Write { id, buffer, from, offset, .. } => {
                let n = result.unwrap_or(0);
                self.image.file.write_all_at(&buffer.filled()[from..][..n], offset).unwrap();
                (id, Some(buffer))
            }
            Pushed::Punch { id, offset, length } => {
                let end = (offset + length).min(SIZE);
                let n = if result.is_ok() { end.saturating_sub(offset) } else { 0 };
                self.image.file.write_all_at(&vec![0; n as usize], offset).unwrap();
                (id, None)
            }
            Pushed::Sync { id, .. } => (id, None),
        };
        let result = result.map_err(io::Error::from_raw_os_error);
        script.ended.push_back(Completion { id, result, buffer });
    }

    /// What is done, in order. What was read is right.
    pub(super) fn done(&mut self) -> Vec<Outcome> {
        let done = std::iter::from_fn(|| self.engine.pop_done());
        done.map(|done| {
            if let (Some(buffer), Ok(())) = (&done.buffer, &done.result) {
                let first = buffer.filled().first().map_or(0, |&first| u64::from(first) - 1);
                assert!(buffer.filled() == bytes(first, buffer.len()), "operation {}", done.tag);
            }
            (done.tag, done.result.err().map(|error| error.kind()))
        })
        .collect()
    }

    /// The kinds of the errors of `count` groups, one after the other, with an fdatasync each that ends like this.
    fn sync(&mut self, result: Result<usize, i32>) -> Vec<Outcome> {
        self.submit(1, 100, Action::Flush);
        self.submit(2, 101, write(0, 10, true));
        self.kick();
        assert!(self.taken() == 1 && self.is_sync(0) && self.done().is_empty());
        self.end(0, result);
        self.kick();
        self.done()
    }
}

#[test]
fn operations_end_in_every_order() {
    const FLIGHTS: usize = 5;
    for mut order in 0..120 {
        let mut house = House::new();
        for tag in 0..4 {
            house.submit(u64::from(tag % 2), tag, read(u64::from(tag) * 5000, 4096));
        }
        house.submit(3, 4, Action::Flush);
        house.kick();
        assert_eq!((house.taken(), house.engine.has_work()), (FLIGHTS, false));
        for left in (1..=FLIGHTS).rev() {
            let index = order % left;
            order /= left;
            let (range, is_sync) = (house.range(index), house.is_sync(index));
            let tag = if is_sync { 4 } else { (range.0 / 5000) as u32 };
            house.end(index, Ok(range.1));
            house.kick();
            assert_eq!(house.done(), [(tag, None)]);
            assert_eq!((house.taken(), house.engine.has_work()), (left - 1, false));
        }
        assert!(house.engine.flying().is_empty());
    }
}

#[test]
fn a_read_that_ends_short_goes_on_with_the_rest() {
    const LENGTH: usize = 40;
    for first in 1..LENGTH {
        for second in 1..=LENGTH - first {
            let mut house = House::new();
            house.submit(1, 7, read(123, LENGTH));
            house.kick();
            house.end(0, Ok(first));
            house.kick();
            assert!(house.done().is_empty());
            if house.taken() == 0 {
                assert!(house.engine.has_work());
                house.kick();
            }
            assert_eq!(house.range(0), (123 + first as u64, LENGTH - first));
            house.end(0, Ok(second));
            house.kick();
            house.kick();
            let rest = LENGTH - first - second;
            if rest > 0 {
                assert_eq!(house.range(0), (123 + (first + second) as u64, rest));
                house.end(0, Ok(rest));
                house.kick();
            }
            let done = house.engine.pop_done().unwrap();
            assert!(done.result.is_ok() && done.buffer.unwrap().filled() == bytes(123, LENGTH));
            assert!(house.taken() == 0 && !house.engine.has_work());
        }
    }
}

#[test]
fn each_error_is_one_of_its_own_operation() {
    for errno in (1..134).filter(|errno| ![libc::EAGAIN, libc::EINTR, libc::ECANCELED].contains(errno)) {
        let mut house = House::new();
        house.submit(1, 1, read(0, 4096));
        house.submit(1, 2, read(4096, 4096));
        house.kick();
        house.end(0, Err(errno));
        house.end(0, Ok(4096));
        house.kick();
        assert_eq!(house.done(), [(1, Some(io::Error::from_raw_os_error(errno).kind())), (2, None)], "{errno}");
    }
    let mut house = House::new();
    house.submit(1, 1, read(0, 4096));
    house.kick();
    house.end(0, Ok(0));
    house.kick();
    assert_eq!(house.done(), [(1, Some(ErrorKind::UnexpectedEof))], "the file was cut short");
}

#[test]
fn what_was_not_tried_is_tried_again() {
    for errno in [libc::EAGAIN, libc::EINTR] {
        let mut house = House::new();
        house.submit(1, 1, read(0, 4096));
        house.kick();
        house.end(0, Ok(96));
        house.kick();
        house.kick();
        for _ in 0..3 {
            house.end(0, Err(errno));
            house.kick();
            house.kick();
            assert_eq!((house.done(), house.taken(), house.range(0)), (vec![], 1, (96, 4000)));
        }
        house.end(0, Ok(4000));
        house.kick();
        assert_eq!(house.done(), [(1, None)]);
    }
    // The kernel had no thread, and will have none soon.
    let mut house = House::new();
    house.submit(1, 1, read(0, 4096));
    house.submit(1, 2, Action::Verify { offset: 0, length: 4096 });
    house.kick();
    house.end(0, Err(libc::ECANCELED));
    house.end(0, Err(libc::ECANCELED));
    house.kick();
    assert_eq!((house.done(), house.taken()), (vec![(1, None), (2, None)], 0));
}

#[test]
fn one_fdatasync_runs_at_a_time_and_the_next_begins_in_a_later_kick() {
    let mut house = House::new();
    house.submit(1, 1, write(0, 10, true));
    house.submit(2, 2, Action::Flush);
    house.kick();
    assert!(house.taken() == 1 && house.is_sync(0) && house.done().is_empty());
    for tag in 3..6 {
        house.submit(1, tag, write(20, 10, true));
        house.submit(2, 10 + tag, write(40, 10, false));
        house.kick();
        assert_eq!((house.taken(), house.done()), (1, vec![(10 + tag, None)]));
        assert!(!house.engine.has_work(), "what waits for an fdatasync is no work");
    }
    assert_eq!((house.engine.syncs(), house.engine.flying()), (1, vec![1, 2]));
    house.end(0, Ok(0));
    house.submit(1, 6, write(0, 10, true));
    house.kick();
    assert_eq!((house.done(), house.taken()), (vec![(1, None), (2, None)], 0));
    assert!(house.engine.has_work(), "the next group");
    house.submit(2, 7, Action::Flush);
    house.kick();
    assert_eq!((house.taken(), house.engine.syncs()), (1, 2));
    house.end(0, Ok(0));
    house.kick();
    assert_eq!(house.done(), [3, 4, 5, 6, 7].map(|tag| (tag, None)));
    assert!(!house.engine.has_work() && house.engine.flying().is_empty());
}

#[test]
fn of_an_image_that_is_open_twice_two_groups_are_synced_at_once_and_the_third_waits() {
    for first in [0, 1] {
        let mut house = House::twice();
        for tag in 1..=3 {
            house.submit(u64::from(tag), tag, write(0, 10, true));
            house.kick();
            assert!(house.done().is_empty());
        }
        assert_eq!((house.taken(), house.synced_file(0), house.synced_file(1)), (2, 0, 1));
        assert_eq!((house.engine.has_work(), house.engine.flying()), (false, vec![1, 2]));
        house.end(first, Ok(0));
        house.kick();
        assert_eq!((house.done(), house.taken()), (vec![(1 + first as u32, None)], 1), "none begins in the same kick");
        assert!(house.engine.has_work());
        house.kick();
        assert_eq!((house.taken(), house.synced_file(1)), (2, first), "the file on which none runs");
        house.end(0, Ok(0));
        house.end(0, Ok(0));
        house.kick();
        let mut done = house.done();
        done.sort_unstable_by_key(|&(tag, _)| tag);
        assert_eq!(done, [(2 - first as u32, None), (3, None)]);
        assert!(house.engine.flying().is_empty() && !house.engine.has_work());
        assert_eq!(house.engine.syncs(), 3);
    }
}

#[test]
fn when_one_of_two_fdatasyncs_fails_the_other_does_too_whatever_its_end() {
    let failed = Some(io::Error::from_raw_os_error(libc::EIO).kind());
    for (first, other) in [(0, Ok(0)), (1, Ok(0)), (0, Err(libc::EIO)), (1, Err(libc::ECANCELED))] {
        let mut house = House::twice();
        for tag in 0..3 {
            house.submit(1, tag, write(0, 10, true));
            house.kick();
        }
        house.end(first, Err(libc::EIO));
        house.kick();
        assert_eq!(house.done(), [(first as u32, failed)]);
        house.kick();
        assert_eq!((house.done(), house.taken()), (vec![(2, failed)], 1), "none begins for the third");
        house.end(0, other);
        house.kick();
        assert_eq!(house.done(), [(1 - first as u32, failed)]);
    }
    // One that has ended well before was about other writes.
    let mut house = House::twice();
    for tag in 0..2 {
        house.submit(1, tag, write(0, 10, true));
        house.kick();
    }
    house.end(0, Ok(0));
    house.end(0, Err(libc::EIO));
    house.kick();
    assert_eq!(house.done(), [(0, None), (1, failed)]);
}

#[test]
fn while_an_fdatasync_runs_this_thread_does_none_on_the_other_file() {
    let mut house = House::twice();
    house.engine.way = Way::InMemory;
    for tag in 0..70 {
        house.submit(1, tag, read(0, 10));
    }
    house.kick();
    assert_eq!(house.done().len(), 70);
    // Its bytes are too many for this thread to wait for; the next is alone and short.
    house.submit(1, 100, write(0, 64 << 10, true));
    house.kick();
    house.submit(1, 101, write(0, 10, true));
    house.kick();
    assert_eq!((house.taken(), house.done()), (2, vec![]));
}

#[test]
fn a_mark_has_its_moment_beside_two_groups_without_end() {
    let mut house = House::twice();
    if mark::set(&house.image, None).is_err() {
        // The file system of temporary files has no marks; the tests of migrations say so.
        return;
    }
    for tag in 0..2 {
        house.submit(1, tag, write(0, 10, true));
        house.kick();
    }
    house.engine.submit_mark(9, 100, Some("moved".into()), true);
    for tag in 2..4 {
        house.submit(1, tag, write(0, 10, true));
        house.end(0, Ok(0));
        house.kick();
        house.kick();
    }
    assert_eq!(mark::get(&house.image).unwrap().unwrap(), b"moved");
    assert_eq!((house.taken(), house.syncs_all(0)), (1, true), "one group, with the mark");
    house.end(0, Ok(0));
    house.kick();
    assert_eq!(house.done(), [0, 1, 2, 3, 100].map(|tag| (tag, None)));
}

#[test]
fn a_failed_fdatasync_sticks_whatever_its_error_is() {
    let brief = [libc::EAGAIN, libc::EINTR, libc::ECANCELED];
    for errno in (1..134).filter(|errno| !brief.contains(errno)) {
        let mut house = House::new();
        assert_eq!(house.sync(Ok(0)), [(100, None), (101, None)]);
        house.submit(3, 1, write(30, 10, true));
        house.submit(4, 2, Action::Flush);
        house.kick();
        // These wait for the next one, which is none.
        house.submit(3, 3, write(30, 10, true));
        house.kick();
        let kind = Some(io::Error::from_raw_os_error(errno).kind());
        house.end(0, Err(errno));
        house.kick();
        assert_eq!(house.done(), [(1, kind), (2, kind)]);
        house.submit(4, 4, Action::Flush);
        house.submit(4, 5, write(30, 10, false));
        house.kick();
        assert_eq!((house.done(), house.taken()), (vec![(5, None), (3, kind), (4, kind)], 0));
        assert_eq!(house.engine.syncs(), 2);
    }
}

#[test]
fn an_fdatasync_that_the_kernel_gave_up_is_no_verdict() {
    for errno in [libc::EAGAIN, libc::EINTR, libc::ECANCELED] {
        let mut house = House::new();
        // This thread does it then, and the file is well.
        assert_eq!(house.sync(Err(errno)), [(100, None), (101, None)]);
        assert_eq!(house.sync(Ok(0)), [(100, None), (101, None)]);
        assert_eq!(house.sync(Err(libc::EIO)).len(), 2);
        house.submit(1, 1, Action::Flush);
        house.kick();
        assert!(house.done()[0].1.is_some());
    }
}

#[test]
fn more_than_may_fly_wait_and_each_owner_has_its_turn() {
    let mut house = House::new();
    for tag in 0..200 {
        house.submit(1, tag, read(u64::from(tag), 10));
    }
    house.kick();
    house.submit(2, 1000, read(7, 10));
    house.submit(3, 1001, Action::Flush);
    house.kick();
    assert_eq!((house.taken(), house.engine.has_work()), (129, false), "an fdatasync has a place of its own");
    assert!(house.is_sync(128));
    house.end(5, Ok(10));
    house.end(5, Ok(10));
    house.kick();
    house.kick();
    assert_eq!((house.done(), house.taken()), (vec![(5, None), (6, None)], 129));
    let is_flying = house.engine.flying().iter().filter(|&&owner| owner == 2).count();
    assert_eq!(is_flying, 1, "it did not wait for the other 70");
    while house.taken() > 0 {
        let length = house.range(0).1;
        house.end(0, Ok(length));
        house.kick();
        if house.engine.has_work() {
            house.kick();
        }
    }
    assert_eq!(house.done().len(), 200);
}

#[test]
fn where_each_read_takes_a_thread_no_owner_takes_all_of_them() {
    let mut house = House::costly(Cost::THREAD);
    for tag in 0..40 {
        house.submit(1, tag, read(u64::from(tag), 10));
        house.submit(1, 50 + tag, Action::Verify { offset: 0, length: 10 });
    }
    house.kick();
    assert_eq!((house.taken(), house.engine.has_work()), (18, false));
    house.submit(2, 100, read(100, 10));
    house.submit(2, 101, Action::Verify { offset: 101, length: 10 });
    house.kick();
    assert_eq!((house.taken(), house.range(18), house.range(19)), (20, (100, 10), (101, 10)));
    while house.taken() > 0 {
        house.end(0, Ok(10));
        house.kick();
        while house.engine.has_work() {
            house.kick();
            assert!(house.taken() <= 20);
        }
    }
    assert_eq!(house.done().len(), 82);
}

#[test]
fn who_comes_back_again_and_again_to_a_disk_that_hangs_leaves_threads_for_others() {
    let mut house = House::costly(Cost::THREAD);
    let mut taken = Vec::new();
    for owner in 1..=5 {
        for tag in 0..40 {
            house.submit(owner, tag, read(u64::from(tag), 10));
        }
        house.kick();
        taken.push(house.taken());
        house.engine.forget(owner);
    }
    assert_eq!(taken, [18, 24, 26, 27, 28]);
    house.submit(6, 0, read(0, 10));
    house.kick();
    assert_eq!(house.taken(), 29, "the kernel has it, and the next thread is for it");
}

#[test]
fn a_ring_that_is_full_or_takes_nothing_loses_nothing() {
    let mut house = House::new();
    house.script.borrow_mut().room = 3;
    for tag in 0..5 {
        house.submit(1, tag, read(u64::from(tag), 10));
    }
    house.kick();
    house.submit(2, 9, Action::Flush);
    house.kick();
    assert_eq!((house.taken(), house.done()), (3, vec![(9, None)]), "this thread has done what could not wait");
    for _ in 0..5 {
        house.end(0, Ok(10));
        house.kick();
        house.kick();
    }
    assert_eq!(house.done(), [0, 1, 2, 3, 4].map(|tag| (tag, None)));

    let mut house = House::new();
    for takes in [Ok(false), Err(ErrorKind::OutOfMemory.into())] {
        house.script.borrow_mut().takes = takes;
        house.submit(1, 1, read(0, 10));
        house.kick();
        assert!(house.taken() == 0 && house.engine.has_work(), "nothing else says when it may go on");
        house.script.borrow_mut().takes = Ok(true);
        house.kick();
        assert!(house.taken() == 1 && !house.engine.has_work());
        house.end(0, Ok(10));
        house.kick();
        assert_eq!(house.done(), [(1, None)]);
    }
}

#[test]
fn what_flies_of_an_owner_that_is_gone_comes_back_and_goes_no_further() {
    let mut house = House::new();
    for tag in 0..130 {
        house.submit(1, tag, read(u64::from(tag), 10));
    }
    house.submit(2, 500, read(500, 10));
    house.submit(1, 501, Action::Flush);
    house.kick();
    let flying = house.engine.flying();
    assert_eq!(flying.iter().filter(|&&owner| owner == 1).count(), 128, "127 reads and a flush");
    house.engine.forget(1);
    assert_eq!(house.done().len(), 3, "what waited is done at once");
    assert_eq!(house.engine.flying(), flying, "what flies flies on");
    // A short one, a whole one, an error, one that was not tried.
    for (tag, end) in [(0, Ok(3)), (1, Ok(10)), (2, Err(libc::EIO)), (3, Err(libc::EAGAIN)), (4, Err(libc::ECANCELED))]
    {
        let index = (0..house.taken()).find(|&index| !house.is_sync(index) && house.range(index).0 == u64::from(tag));
        house.end(index.unwrap(), end);
        house.kick();
        house.kick();
        let done = house.engine.pop_done().unwrap();
        assert_eq!((done.tag, done.result.unwrap_err().kind()), (tag, ErrorKind::ConnectionAborted));
        let buffer = done.buffer.unwrap();
        assert!(buffer.is_empty() && buffer.capacity() == 10, "its memory is back");
    }
    assert_eq!(house.taken(), 129 - 5, "none of them flies again");
    while house.taken() > 0 {
        let length = house.range(0).1;
        house.end(0, Ok(length));
        house.kick();
    }
    let done = house.done();
    assert_eq!(done.iter().filter(|(_, error)| error.is_none()).count(), 2, "the other's, and the flush");
    assert!(done.contains(&(500, None)) && house.engine.flying().is_empty() && !house.engine.has_work());
}

#[test]
fn a_verification_goes_piece_by_piece_and_few_fly_at_once() {
    const MIB: u64 = 1 << 20;
    let mut house = House::new();
    for tag in 0..20 {
        house.submit(u64::from(tag % 2), tag, Action::Verify { offset: 0, length: MIB });
    }
    house.submit(3, 99, read(0, 10));
    house.kick();
    assert_eq!(house.taken(), 9, "8 and a read");
    let held: usize = (0..9).map(|index| house.range(index).1).sum();
    assert!(held <= (1 << 20) + 10, "{held}");
    let mut pieces = 0;
    while house.taken() > 0 {
        let (offset, length) = house.range(0);
        assert!(offset + length as u64 <= MIB);
        house.end(0, Ok(length));
        pieces += usize::from(length > 10);
        house.kick();
        while house.engine.has_work() {
            house.kick();
        }
    }
    assert_eq!((house.done().len(), pieces), (21, 20 * 8));

    // What the last byte is worth.
    for (end, kind) in [(Ok(0), ErrorKind::UnexpectedEof), (Err(libc::EIO), io::Error::from_raw_os_error(5).kind())] {
        house.submit(1, 1, Action::Verify { offset: 0, length: MIB });
        house.kick();
        house.end(0, Ok(100));
        house.kick();
        house.kick();
        assert_eq!(house.range(0).0, 100);
        house.end(0, end);
        house.kick();
        assert_eq!(house.done(), [(1, Some(kind))]);
    }
}

#[test]
fn what_of_a_verification_can_be_had_at_once_is_read_by_this_thread() {
    let mut house = House::new();
    house.engine.way = Way::InMemory;
    house.submit(1, 1, Action::Verify { offset: 5, length: 700_000 });
    for _ in 0..100 {
        house.kick();
    }
    assert_eq!((house.done(), house.taken()), (vec![(1, None)], 0));
    // Its end is the kernel's to find.
    house.image.file.set_len(600_000).unwrap();
    house.submit(1, 1, Action::Verify { offset: 0, length: 700_000 });
    for _ in 0..100 {
        house.kick();
    }
    assert_eq!(house.range(0), (600_000, 100_000));
}

#[test]
fn this_thread_syncs_for_a_lone_writer_and_for_nobody_else() {
    // What comes before, and whether the kernel does the fdatasync.
    let by_ring = |source: FileSystem, before: &dyn Fn(&mut House), length: usize| {
        let mut house = House::new();
        house.image.source = source;
        before(&mut house);
        house.submit(1, 70, write(0, length, true));
        house.kick();
        assert_eq!(house.engine.syncs(), 1);
        let taken = (0..house.taken()).filter(|&index| house.is_sync(index)).count();
        taken == 1
    };
    let reads = |house: &mut House, owner: u64, count: u32| {
        house.engine.way = Way::InMemory;
        for tag in 0..count {
            house.submit(owner, tag, read(0, 10));
        }
        house.kick();
        house.engine.way = Way::Blind;
    };
    let local = FileSystem::Local;
    assert!(!by_ring(local, &|house| reads(house, 1, 63), 4096), "alone");
    assert!(by_ring(local, &|house| reads(house, 1, 62), 4096), "not long enough");
    assert!(by_ring(local, &|house| reads(house, 2, 63), 4096), "another");
    assert!(!by_ring(local, &|house| reads(house, 1, 63), (64 << 10) - 1));
    assert!(by_ring(local, &|house| reads(house, 1, 63), 64 << 10), "much to write");
    let flying = |house: &mut House| {
        reads(house, 1, 63);
        house.submit(1, 60, read(0, 10));
    };
    assert!(by_ring(local, &flying, 4096), "a read flies");
    assert!(by_ring(FileSystem::Distributed, &|house| reads(house, 1, 100), 10), "nobody knows how long it takes");
    assert!(!by_ring(FileSystem::Memory, &|house| reads(house, 2, 3), 1 << 19), "it costs nothing");
}

#[test]
fn what_flies_at_the_end_is_left_to_the_kernel() {
    let mut house = House::new();
    house.submit(1, 1, read(0, 10));
    house.submit(1, 2, Action::Flush);
    house.kick();
    house.engine.leak();
    assert!(house.script.borrow().is_leaked && house.taken() == 2);
    drop(house);
}
