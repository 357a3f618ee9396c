//! The engine that carries out every operation in the thread that calls [`Engine::kick`], with pread, pwrite, fallocate and
//! fdatasync. A cold read or an fdatasync makes that thread wait: the price of simplicity.
//!
//! Invariant 1: an operation is in `queue`, in `committing` or, as its `Done`, in `done`; `committing` is empty between
//! two kicks.
//!
//! Invariant 2: a step stays inside what is left of its range.

use super::commit::Commit;
use super::image::Image;
use super::sparse;
use super::verify;
use super::zero::Zeroes;
use crate::buffer::Buffer;
use crate::sys;
use crate::work::{Action, Done, Extent, Op};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// After so many operations that need more steps or walk through the file, a kick leaves the rest of the queue to the next
/// one: it takes as long as writing 16 MiB of zeroes, however many long ranges there are.
const SLOW_PER_KICK_MAX: usize = 16;

/// An operation on its way. The range in the action of a long one is what is left of it.
struct Job {
    op: Op,
    touched: Option<Range<u64>>,
    extents: Vec<Extent>,
}

impl Job {
    fn finish(self, result: io::Result<()>) -> Done {
        let Op { owner, tag, action } = self.op;
        let buffer = match action {
            Action::Read { buffer, .. } | Action::Write { payload: buffer, .. } => Some(buffer),
            _ => None,
        };
        Done { owner, tag, buffer, touched: self.touched, extents: self.extents, result }
    }
}

#[derive(Default)]
pub(super) struct Engine {
    queue: VecDeque<Job>,
    /// Done but for the fdatasync that they share.
    committing: Vec<Job>,
    done: VecDeque<Done>,
    zeroes: Zeroes,
    commit: Commit,
}

impl Engine {
    pub(super) fn submit(&mut self, op: Op) {
        let touched = op.action.touches();
        self.queue.push_back(Job { op, touched, extents: Vec::new() });
    }

    /// Takes each queued operation one step further, then calls fdatasync for all that wait for it.
    pub(super) fn kick(&mut self, image: &Image) {
        debug_assert!(self.committing.is_empty(), "invariant 1");
        let mut slow = 0;
        for _ in 0..self.queue.len() {
            let Some(mut job) = self.queue.pop_front() else { break };
            slow += usize::from(matches!(job.op.action, Action::Map { .. }));
            match self.step(image, &mut job.op.action, &mut job.extents) {
                Ok(false) => {
                    self.queue.push_back(job);
                    slow += 1;
                }
                Ok(true) if job.op.action.wants_sync() => self.committing.push(job),
                Ok(true) => self.done.push_back(job.finish(Ok(()))),
                Err(error) => self.done.push_back(job.finish(Err(error))),
            }
            if slow == SLOW_PER_KICK_MAX {
                break;
            }
        }
        if !self.committing.is_empty() {
            let synced = self.commit.sync(image);
            let jobs = self.committing.drain(..);
            self.done.extend(jobs.map(|job| job.finish(synced.map_err(io::Error::from_raw_os_error))));
        }
    }

    /// True when a kick would move something.
    pub(super) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    pub(super) fn pop_done(&mut self) -> Option<Done> {
        self.done.pop_front()
    }

    pub(super) fn syncs(&self) -> u64 {
        self.commit.syncs()
    }

    /// Carries out one step of an action; returns whether that was the last.
    fn step(&mut self, image: &Image, action: &mut Action, extents: &mut Vec<Extent>) -> io::Result<bool> {
        match action {
            Action::Read { offset, length, skip_hole, buffer } => {
                let (mut offset, mut length) = (*offset, *length);
                if *skip_hole {
                    let hole = sparse::hole(image, offset..offset + length as u64);
                    let skipped = hole.as_ref().map_or(0, Extent::length);
                    extents.extend(hole);
                    (offset, length) = (offset + skipped, length - usize::try_from(skipped).unwrap_or(length));
                }
                read(&image.file, offset, length, buffer).map(|()| true)
            }
            Action::Write { offset, payload, .. } => sparse::write(image, *offset, payload.filled()).map(|()| true),
            Action::Zero { offset, length, no_hole, fast, .. } => {
                let done = self.zeroes.zero_step(image, *offset, *length, *no_hole, *fast)?;
                Ok(proceed(offset, length, done))
            }
            Action::Trim { offset, length, .. } => {
                let done = self.zeroes.trim_step(image, *offset, *length)?;
                Ok(proceed(offset, length, done))
            }
            Action::Flush => Ok(true),
            Action::Cache { offset, length } => {
                // It is a hint: no harm if the kernel does not take it.
                let _ = sys::file::will_need(&image.file, *offset, *length);
                Ok(true)
            }
            Action::Verify { offset, length } => {
                let done = verify::step(image, *offset, *length)?;
                Ok(proceed(offset, length, done))
            }
            Action::Map { offset, length, most } => {
                extents.extend(sparse::map(image, *offset..*offset + *length).take(*most));
                Ok(true)
            }
        }
    }
}

fn read(file: &File, offset: u64, length: usize, buffer: &mut Buffer) -> io::Result<()> {
    let room = buffer.spare().get_mut(..length).ok_or(ErrorKind::InvalidInput)?;
    file.read_exact_at(room, offset)?;
    buffer.advance(length);
    Ok(())
}

/// Takes `done` bytes off the front of a range; returns whether it is empty now.
fn proceed(offset: &mut u64, length: &mut u64, done: u64) -> bool {
    debug_assert!(done <= *length, "invariant 2");
    *offset = offset.saturating_add(done);
    *length = length.saturating_sub(done);
    *length == 0
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "of sizes that the tests chose")]
mod tests {
    use super::super::tests::{buffer, Random, TempFile};
    use super::super::zero::FILE_STEP;
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    fn image(temp: &TempFile, size: u64) -> Image {
        temp.file.set_len(size).unwrap();
        Image { file: temp.file.try_clone().unwrap(), size, is_device: false }
    }

    fn special(path: &str) -> Image {
        let file = File::options().read(true).write(true).open(path).unwrap();
        Image { file, size: 1 << 20, is_device: false }
    }

    fn op(tag: u32, action: Action) -> Op {
        Op { owner: 1, tag, action }
    }

    fn write(offset: u64, bytes: &[u8], fua: bool) -> Action {
        Action::Write { offset, payload: buffer(bytes), fua }
    }

    fn zero(offset: u64, length: u64) -> Action {
        Action::Zero { offset, length, fua: false, no_hole: false, fast: false }
    }

    /// The tags that are done, in order, with the kinds of their errors.
    fn done(engine: &mut Engine) -> Vec<(u32, Option<ErrorKind>)> {
        std::iter::from_fn(|| engine.pop_done()).map(|d| (d.tag, d.result.err().map(|e| e.kind()))).collect()
    }

    /// Kicks until one operation is done.
    fn run(engine: &mut Engine, image: &Image, action: Action) -> Done {
        engine.submit(op(0, action));
        loop {
            engine.kick(image);
            if let Some(done) = engine.pop_done() {
                return done;
            }
        }
    }

    /// Random operations at odd offsets against a plain vector.
    fn agrees_with_a_model(image: &Image, mut engine: Engine, seed: u64) {
        let mut model = vec![0_u8; image.size as usize];
        let mut random = Random::new(seed);
        for round in 0..800 {
            let offset = random.below(image.size);
            let longest = if random.below(20) == 0 { image.size } else { 20_000 };
            let length = random.below((image.size - offset).min(longest) + 1);
            let range = offset as usize..(offset + length) as usize;
            let fua = random.below(16) == 0;
            let is_read = random.below(3) == 0;
            let action = match random.below(4) {
                _ if is_read => Action::Read {
                    offset,
                    length: range.len(),
                    skip_hole: false,
                    buffer: Buffer::with_capacity(range.len() + 5),
                },
                0 => Action::Flush,
                1 => {
                    let bytes: Vec<u8> = range.clone().map(|_| random.below(256) as u8).collect();
                    model[range.clone()].copy_from_slice(&bytes);
                    write(offset, &bytes, fua)
                }
                2 => {
                    model[range.clone()].fill(0);
                    Action::Zero { offset, length, fua, no_hole: random.below(2) == 0, fast: false }
                }
                _ => Action::Trim { offset, length, fua },
            };
            let (is_trim, touches) = (matches!(action, Action::Trim { .. }), action.touches());
            let answer = run(&mut engine, image, action);
            answer.result.unwrap();
            assert_eq!(answer.touched, touches, "seed {seed}, round {round}");
            if is_read {
                assert_eq!(answer.buffer.unwrap().filled(), &model[range], "seed {seed}, round {round}");
            } else if is_trim {
                // What a trimmed byte reads as is open, but only zero or as before.
                let mut now = vec![0; range.len()];
                image.file.read_exact_at(&mut now, offset).unwrap();
                assert!(now.iter().zip(&model[range.clone()]).all(|(now, was)| now == was || *now == 0));
                model[range].copy_from_slice(&now);
            }
        }
        let mut all = vec![0; model.len()];
        image.file.read_exact_at(&mut all, 0).unwrap();
        assert!(all == model, "seed {seed}");
    }

    #[test]
    fn every_action_agrees_with_a_model() {
        for (seed, can_punch, can_zero_range, is_device) in
            [(11, true, true, false), (12, false, true, false), (13, false, false, false), (14, true, true, true)]
        {
            let temp = TempFile::new("model");
            let image = Image { is_device, ..image(&temp, 3_000_832) };
            agrees_with_a_model(
                &image,
                Engine { zeroes: Zeroes { can_punch, can_zero_range, ..Zeroes::default() }, ..Engine::default() },
                seed,
            );
        }
    }

    #[test]
    fn a_file_system_that_lacks_a_call_is_asked_once() {
        // A tmpfs, if there is one, punches holes and cannot zero a range.
        let shm = Path::new("/dev/shm").to_owned();
        let folder = if shm.is_dir() { shm } else { std::env::temp_dir() };
        let temp = TempFile::within(&folder, "lacks");
        let image = image(&temp, 2_000_384);
        agrees_with_a_model(&image, Engine::default(), 21);
        // No file system does it for this one.
        let mut engine = Engine::default();
        let null = special("/dev/null");
        run(&mut engine, &null, zero(0, 10)).result.unwrap();
        assert!(!engine.zeroes.can_punch && !engine.zeroes.can_zero_range);
        run(&mut engine, &null, Action::Trim { offset: 0, length: 10, fua: false }).result.unwrap();
    }

    #[test]
    fn zeroing_makes_a_hole_or_keeps_the_range() {
        let temp = TempFile::new("holes");
        let image = image(&temp, 1 << 20);
        let mut engine = Engine::default();
        let allocated = || temp.file.metadata().unwrap().blocks() * 512;
        image.file.write_all_at(&vec![9; 1 << 20], 0).unwrap();
        run(&mut engine, &image, zero(0, 1 << 19)).result.unwrap();
        assert_eq!(allocated(), 1 << 19);
        run(&mut engine, &image, Action::Trim { offset: 1 << 19, length: 1 << 18, fua: false }).result.unwrap();
        assert_eq!(allocated(), 1 << 18);
        let keep = Action::Zero { offset: 0, length: 1 << 20, fua: false, no_hole: true, fast: false };
        run(&mut engine, &image, keep).result.unwrap();
        assert_eq!(allocated(), 1 << 20);
        assert_eq!(temp.file.metadata().unwrap().len(), 1 << 20);
    }

    #[test]
    fn written_zeroes_keep_holes_too() {
        let temp = TempFile::new("written");
        let image = image(&temp, 8 << 20);
        let mut engine = Engine { zeroes: Zeroes::unable(), ..Engine::default() };
        run(&mut engine, &image, zero(0, 8 << 20)).result.unwrap();
        assert_eq!(temp.file.metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn fast_never_writes() {
        let temp = TempFile::new("fast");
        let image = image(&temp, 1 << 20);
        let fast = |no_hole| Action::Zero { offset: 0, length: 1 << 20, fua: false, no_hole, fast: true };
        let mut poor = Engine { zeroes: Zeroes::unable(), ..Engine::default() };
        for no_hole in [false, true] {
            let refused = run(&mut poor, &image, fast(no_hole));
            assert_eq!(refused.result.unwrap_err().kind(), ErrorKind::Unsupported);
        }
        run(&mut Engine::default(), &image, fast(false)).result.unwrap();
        let device = Image { is_device: true, ..image };
        let refused = run(&mut Engine::default(), &device, fast(true));
        assert_eq!(refused.result.unwrap_err().kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn a_long_range_lets_others_through() {
        let temp = TempFile::new("long");
        let image = image(&temp, 4 << 30);
        image.file.write_all_at(b"x", (4 << 30) - 1).unwrap();
        let mut engine = Engine::default();
        engine.submit(op(1, zero(1, (4 << 30) - 1)));
        engine.submit(op(2, write(0, b"y", false)));
        engine.kick(&image);
        assert_eq!(done(&mut engine), [(2, None)]);
        let mut kicks = 1;
        while engine.done.is_empty() {
            engine.kick(&image);
            kicks += 1;
        }
        assert_eq!(kicks, (4_u64 << 30).div_ceil(FILE_STEP));
        assert_eq!(engine.pop_done().unwrap().touched, Some(1..4 << 30));
        let mut last = [1];
        image.file.read_exact_at(&mut last, (4 << 30) - 1).unwrap();
        assert_eq!(last, [0]);
    }

    #[test]
    fn many_long_ranges_do_not_hold_one_kick() {
        let temp = TempFile::new("many");
        let image = image(&temp, 64 << 20);
        let mut engine = Engine { zeroes: Zeroes::unable(), ..Engine::default() };
        for tag in 0..40 {
            let keep = Action::Zero { offset: 0, length: 2 << 20, fua: false, no_hole: true, fast: false };
            engine.submit(op(tag, keep));
        }
        engine.kick(&image);
        assert_eq!(temp.file.metadata().unwrap().blocks() * 512, (1 << 20), "all wrote the same");
        assert_eq!((engine.queue.len(), engine.done.len()), (40, 0));
        assert!(engine.queue.iter().take(24).all(|job| matches!(job.op.action, Action::Zero { offset: 0, .. })));
        while engine.done.len() < 40 {
            engine.kick(&image);
        }
        assert!(engine.queue.is_empty());
    }

    #[test]
    fn one_sync_serves_all_that_ask() {
        let temp = TempFile::new("group");
        let image = image(&temp, 1 << 20);
        let mut engine = Engine::default();
        engine.submit(op(1, Action::Flush));
        engine.submit(op(2, write(0, b"abc", true)));
        engine.submit(op(3, write(9, b"abc", false)));
        engine.submit(op(4, Action::Zero { offset: 5, length: 9, fua: true, no_hole: false, fast: false }));
        engine.submit(op(5, Action::Trim { offset: 0, length: 9, fua: true }));
        engine.submit(op(6, Action::Flush));
        engine.kick(&image);
        let order: Vec<u32> = done(&mut engine).into_iter().map(|d| d.0).collect();
        assert_eq!(order, [3, 1, 2, 4, 5, 6], "done after the sync");
        assert_eq!(engine.syncs(), 1);
        engine.submit(op(7, write(0, b"abc", false)));
        engine.kick(&image);
        assert_eq!(engine.syncs(), 1, "nobody asked");
    }

    #[test]
    fn a_failed_sync_fails_all_that_ask_for_ever() {
        // It takes every write and knows no fdatasync.
        let null = special("/dev/null");
        let mut engine = Engine::default();
        engine.submit(op(1, write(0, b"abc", true)));
        engine.submit(op(2, Action::Flush));
        engine.submit(op(3, write(0, b"abc", false)));
        engine.kick(&null);
        let invalid = Some(ErrorKind::InvalidInput);
        assert_eq!(done(&mut engine), [(3, None), (1, invalid), (2, invalid)]);

        // Even where it would succeed now.
        let temp = TempFile::new("sticky");
        let image = image(&temp, 1 << 20);
        engine.submit(op(4, Action::Flush));
        engine.submit(op(5, write(0, b"abc", false)));
        engine.submit(op(6, write(3, b"def", true)));
        engine.kick(&image);
        assert_eq!(done(&mut engine), [(5, None), (4, invalid), (6, invalid)]);
        assert_eq!(engine.syncs(), 1);
    }

    #[test]
    fn an_operation_that_fails_says_what_it_may_have_touched() {
        let full = special("/dev/full");
        let mut engine = Engine::default();
        let failed = run(&mut engine, &full, write(512, b"abc", true));
        assert_eq!(failed.result.unwrap_err().kind(), ErrorKind::StorageFull);
        assert_eq!(failed.touched, Some(512..515));
        assert_eq!(failed.buffer.unwrap().filled(), b"abc");
        assert_eq!(engine.syncs(), 0, "there is nothing to put on stable storage");
        let failed = run(&mut engine, &full, zero(0, 4096));
        assert_eq!(failed.result.unwrap_err().kind(), ErrorKind::StorageFull);
    }

    #[test]
    fn what_is_verified_can_be_read_to_its_last_byte() {
        let temp = TempFile::new("verify");
        let image = image(&temp, 1 << 20);
        for (offset, length, end) in [(0, 1 << 20, 1 << 20), (5, 300_000, 300_005), (7, 1, 8)] {
            temp.file.set_len(end).unwrap();
            run(&mut Engine::default(), &image, Action::Verify { offset, length }).result.unwrap();
            temp.file.set_len(end - 1).unwrap();
            let failed = run(&mut Engine::default(), &image, Action::Verify { offset, length });
            assert_eq!(failed.result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn a_read_past_the_end_of_a_file_cut_short_is_an_error() {
        let temp = TempFile::new("short");
        let image = image(&temp, 1 << 20);
        temp.file.set_len(1000).unwrap();
        let read = Action::Read { offset: 990, length: 20, skip_hole: false, buffer: Buffer::with_capacity(20) };
        let failed = run(&mut Engine::default(), &image, read);
        assert_eq!(failed.result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert!(failed.buffer.unwrap().is_empty());
    }
}
