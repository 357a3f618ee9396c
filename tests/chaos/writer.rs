//! Clients that change the image all the time, several requests at once, and know what has to be in it.

use crate::conversation::{Conversation, Style};
use crate::place::Place;
use crate::random::Random;
use crate::shadow::{Change, Shadow};
use crate::support::{flag, kind, SOON};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How one writer behaves.
#[derive(Debug)]
pub struct Habits {
    /// Decides what it does.
    pub seed: u64,
    /// How it connects.
    pub style: Style,
    /// The most requests under way at once.
    pub depth: u64,
    /// The most bytes of one request.
    pub length_max: u64,
    /// It changes no more than so many bytes, those at the beginning of its own.
    pub area_max: u64,
    /// The average time between two requests, in microseconds.
    pub every_us: u64,
}

/// A client that changes a range of the image of its own, and follows the image from server to server.
pub struct Writer {
    shadow: Arc<Mutex<Shadow>>,
    place: Arc<Place>,
    thread: Option<JoinHandle<u64>>,
}

impl Writer {
    /// Starts one that knows what is in its range.
    pub fn start(habits: &Habits, place: &Arc<Place>, shadow: Shadow) -> Self {
        let shadow = Arc::new(Mutex::new(shadow));
        let mut work = Work {
            random: Random::new(habits.seed),
            style: habits.style,
            depth: habits.depth,
            length_max: habits.length_max,
            area_max: habits.area_max,
            every_us: habits.every_us,
            place: Arc::clone(place),
            shadow: Arc::clone(&shadow),
            requests: 0,
        };
        let name = thread::current().name().unwrap_or_default().to_owned();
        let thread = thread::Builder::new().name(format!("{name} writer")).spawn(move || work.run()).unwrap();
        Self { shadow, place: Arc::clone(place), thread: Some(thread) }
    }

    /// Fails unless an image that nobody writes any more holds all that was acknowledged.
    #[track_caller]
    pub fn check(&self, image: &Path) {
        let shadow = self.shadow.lock().unwrap_or_else(PoisonError::into_inner);
        let place = shadow.place();
        let mut found = vec![0; (place.end - place.start) as usize];
        File::open(image).unwrap().read_exact_at(&mut found, place.start).unwrap();
        shadow.check(0, &found, &format!("{} on the disk", image.display()));
    }

    /// Waits for its end, which [`Place::end`] has asked for, and returns how many requests were answered.
    #[track_caller]
    pub fn join(&mut self) -> u64 {
        match self.thread.take().unwrap().join() {
            Ok(requests) => requests,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Of a round that has failed.
        self.place.end();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Tells the round when a writer fails.
struct Alarm(Arc<Place>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail();
        }
    }
}

struct Work {
    random: Random,
    style: Style,
    depth: u64,
    length_max: u64,
    area_max: u64,
    every_us: u64,
    place: Arc<Place>,
    shadow: Arc<Mutex<Shadow>>,
    requests: u64,
}

impl Work {
    fn run(&mut self) -> u64 {
        let _alarm = Alarm(Arc::clone(&self.place));
        let mut last_door = None;
        let mut refused_since: Option<(u64, Instant)> = None;
        while let Some(door) = self.place.wait() {
            let lists = self.place.lists();
            // Nobody is let in by a list that is about to change, or by a server that has ended unseen. The port of that
            // may be somebody else's by now; of one that still answers, it cannot.
            let opened = Conversation::open(&door, self.style).ok().filter(|_| door.answers());
            let Some(mut conversation) = opened else {
                let same = refused_since.filter(|(number, _)| *number == door.number);
                let (_, since) = *refused_since.insert(same.unwrap_or((door.number, Instant::now())));
                assert!(since.elapsed() < SOON, "a writer is not let in");
                thread::sleep(Duration::from_millis(5));
                continue;
            };
            refused_since = None;
            let ended = self.look_around(&mut conversation, last_door.replace(door.number) != Some(door.number));
            let ended = ended.and_then(|()| self.work(&mut conversation));
            let Err(error) = ended else { break };
            self.shadow().disconnected();
            let is_silent = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            assert!(!is_silent, "a writer had no answer within {SOON:?}");
            let is_excused = self.place.lists() != lists;
            assert!(is_excused || !door.goes_on(), "a writer was cut off by a server that goes on: {error}");
        }
        self.requests
    }

    fn shadow(&self) -> std::sync::MutexGuard<'_, Shadow> {
        self.shadow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads all that is there. What a server that is gone has not answered is known then.
    fn look_around(&mut self, conversation: &mut Conversation, is_new: bool) -> io::Result<()> {
        let place = self.shadow().place();
        conversation.send(kind::READ, 0, place.start, (place.end - place.start) as u32, &[])?;
        let found = loop {
            if let Some(answer) = conversation.receive()? {
                break answer.data;
            }
        };
        let mut shadow = self.shadow();
        if is_new {
            shadow.settle(found, "what a new server says");
        } else {
            shadow.check(0, &found, "what the same server says later");
        }
        Ok(())
    }

    /// Works until it is over, which is no error, or the connection ends.
    fn work(&mut self, conversation: &mut Conversation) -> io::Result<()> {
        while !self.place.is_over() {
            let is_idle = conversation.unanswered() == 0;
            if is_idle || (conversation.unanswered() as u64) < self.depth && self.random.one_in(2) {
                self.ask(conversation)?;
            } else {
                self.take_answer(conversation)?;
            }
        }
        while conversation.unanswered() > 0 {
            self.take_answer(conversation)?;
        }
        Ok(())
    }

    fn take_answer(&mut self, conversation: &mut Conversation) -> io::Result<()> {
        let Some(answer) = conversation.receive()? else { return Ok(()) };
        self.requests += 1;
        let mut shadow = self.shadow();
        if answer.kind == kind::READ {
            let at = (answer.offset - shadow.place().start) as usize;
            shadow.check(at, &answer.data, "what a server says");
        }
        shadow.answered(answer.cookie);
        Ok(())
    }

    /// Sends one request, unless something else is under way with these bytes.
    fn ask(&mut self, conversation: &mut Conversation) -> io::Result<()> {
        thread::sleep(Duration::from_micros(self.random.below(2 * self.every_us)));
        let range = self.range();
        let offset = self.shadow().place().start + range.start as u64;
        let length = range.len() as u32;
        if self.shadow().is_changing(&range) || conversation.is_reading(offset..offset + u64::from(length)) {
            return if conversation.unanswered() > 0 { self.take_answer(conversation) } else { Ok(()) };
        }
        let fua = if self.random.one_in(8) { flag::FUA } else { 0 };
        let no_hole = if self.random.one_in(2) { flag::NO_HOLE } else { 0 };
        let cookie = conversation.next_cookie();
        match self.random.below(16) {
            0 => conversation.send(kind::FLUSH, 0, 0, 0, &[]),
            1..=3 => conversation.send(kind::READ, 0, offset, length, &[]),
            4 => {
                self.shadow().send(cookie, range, Change::Trim);
                conversation.send(kind::TRIM, fua, offset, length, &[])
            }
            5 | 6 => {
                self.shadow().send(cookie, range, Change::Zeroes);
                conversation.send(kind::WRITE_ZEROES, fua | no_hole, offset, length, &[])
            }
            _ => {
                // Never zero, and hardly ever what was there.
                let first = self.random.below(255) as u8;
                let bytes: Vec<u8> = (0..range.len()).map(|at| ((usize::from(first) + at) % 255) as u8 + 1).collect();
                self.shadow().send(cookie, range, Change::Bytes(bytes.clone()));
                conversation.send(kind::WRITE, fua, offset, length, &bytes)
            }
        }
    }

    /// Somewhere in its bytes; mostly blocks, as file systems do.
    fn range(&mut self) -> Range<usize> {
        let all = self.shadow().place();
        let size = self.area_max.min(all.end - all.start);
        let most = self.length_max.min(size);
        let length = if self.random.one_in(3) { most } else { 1 + self.random.below(most) };
        let start = self.random.below(size - length + 1);
        if self.random.one_in(4) {
            return start as usize..(start + length) as usize;
        }
        // Whole blocks of the image, as far as they are its own.
        let from = ((all.start + start) & !4095).max(all.start);
        let to = (all.start + start + length).next_multiple_of(4096).min(all.end);
        (from - all.start) as usize..(to - all.start) as usize
    }
}

/// Fails unless all writers agree with the image of a server that is not served now.
#[track_caller]
pub fn check_all(writers: &[Writer], image: &Path) {
    for writer in writers {
        writer.check(image);
    }
}
