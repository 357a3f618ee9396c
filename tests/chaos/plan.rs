//! What a seed decides: the image, who writes, where it goes, and what goes wrong on the way.

use crate::conversation::Style;
use crate::random::Random;
use crate::writer::Habits;

/// One round.
#[derive(Debug)]
pub struct Plan {
    /// The size of the image, in bytes.
    pub size: u64,
    /// What is in the image: the length of data, then of a hole, and so on.
    pub content: Vec<u64>,
    /// Where the writers' ranges begin, but for the first.
    pub borders: Vec<u64>,
    /// The writers.
    pub writers: Vec<Habits>,
    /// What the first server is like.
    pub first: Host,
    /// One migration after the other.
    pub hops: Vec<Hop>,
    /// How long writers go on behind the last one, in milliseconds.
    pub rest_ms: u64,
}

/// A server of the image.
#[derive(Debug, Clone, Copy)]
pub struct Host {
    /// Its disk.
    pub disk: Medium,
    /// Its oldstyle address is a UNIX socket; only of one that is no destination.
    pub is_local: bool,
}

/// What a disk is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// As fast as the machine's.
    Plain,
    /// Each write takes so many microseconds, each fdatasync a hundred times as long.
    Slow(u64),
    /// It has no room for more than so many bytes.
    Full(u64),
    /// No file on it may grow beyond so many bytes.
    Limited(u64),
}

impl Medium {
    /// True when there may be no room for the image.
    pub fn may_fail(self) -> bool {
        matches!(self, Self::Full(_) | Self::Limited(_))
    }
}

/// One migration, until the image has moved.
#[derive(Debug)]
pub struct Hop {
    /// The disks of the listeners: the next one when one has failed by its disk; the last is good.
    pub disks: Vec<Medium>,
    /// The listener goes on as the server (`--serve`). If not, its file is served by another one.
    pub serves: bool,
    /// The source deletes its file.
    pub unlinks: bool,
    /// Whoever starts the migration waits for its end.
    pub waits: bool,
    /// `--max-speed`.
    pub speed: u64,
    /// `--max-pause`.
    pub pause_ms: u64,
    /// What a listener gets that takes the place of one that has died.
    pub heir: Heir,
    /// What goes wrong, one after the other.
    pub troubles: Vec<Trouble>,
}

/// What a listener gets that takes the place of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heir {
    /// The file with all that was sent.
    SameFile,
    /// A file that holds none of it.
    OtherFile,
}

/// What goes wrong, and when.
#[derive(Debug, Clone, Copy)]
pub struct Trouble {
    /// When.
    pub moment: Moment,
    /// What.
    pub act: Act,
}

/// A side of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// None of it has passed.
    Before,
    /// Half of it has passed.
    Inside,
    /// It has passed.
    After,
}

/// A moment of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Before the source is greeted.
    Greeting,
    /// At a request, counted from 1.
    Request(When, u64),
    /// At a FLUSH: the first comes before the pause, the second in it.
    Flush(When, u32),
    /// At DISC.
    Disc(When),
    /// Before a reply.
    Reply(u64),
    /// Before the reply to a FLUSH.
    FlushReply(u32),
    /// So many milliseconds after the beginning of the hop.
    Time(u64),
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// The connection is cut on both sides.
    Cut,
    /// The same, and the destination is told DISC before.
    CutWithDisc,
    /// Nothing passes in this direction for so many milliseconds.
    Hold(u64),
    /// A signal to the listener, by its name.
    SignalListener(&'static str),
    /// A signal to the source.
    SignalSource(&'static str),
    /// The listener is stopped for so many milliseconds.
    StopListener(u64),
    /// The source is stopped.
    StopSource(u64),
    /// `break`; the migration is started again.
    Break,
    /// `mirror-speed`.
    Speed(u64),
    /// `acl` of the source: its TCP clients are cut, then let in again.
    List,
    /// `acl` of the listener: its sender is cut, then let in again.
    ListListener,
    /// Somebody else says DISC to the listener.
    Rogue,
}

impl Plan {
    /// What the seed says.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        // What is dirty is so in blocks of 64 KiB: most images have many of them.
        let most = random.pick(&[64 << 10, 1 << 20, 4 << 20, 4 << 20, 8 << 20]);
        let size = random.magnitude(4096..most) & !511;
        let writers = 1 + random.below(4).min(size / 4096 - 1);
        let mut borders: Vec<u64> = (1..writers).map(|_| random.within(1..size)).collect();
        borders.sort_unstable();
        borders.dedup();
        let mut content = Vec::new();
        let mut described = 0;
        while described < size {
            let length = random.magnitude(512..size + 512).min(size - described);
            content.push(length);
            described += length;
        }
        let writers = (0..=borders.len()).map(|_| habits(&mut random, size)).collect();
        let first = Host { disk: medium(&mut random, size, false), is_local: random.one_in(3) };
        let hops = (0..random.pick(&[1, 1, 2, 2, 3])).map(|_| hop(&mut random, size)).collect();
        let rest_ms = random.below(50);
        Self { size, content, borders, writers, first, hops, rest_ms }
    }
}

fn habits(random: &mut Random, size: u64) -> Habits {
    let area_max = if random.one_in(3) { size } else { random.magnitude(1..size) };
    Habits {
        seed: random.below(u64::MAX),
        style: random.pick(&[Style::Oldstyle, Style::Oldstyle, Style::Simple, Style::Structured, Style::Socket]),
        depth: random.magnitude(1..17),
        length_max: random.magnitude(1..256 << 10),
        area_max,
        every_us: random.pick(&[0, 200, 1_000, 5_000, 20_000]),
    }
}

fn medium(random: &mut Random, size: u64, may_fail: bool) -> Medium {
    match random.below(12) {
        0 | 1 => Medium::Slow(random.magnitude(50..2_000)),
        2 if may_fail => Medium::Full(random.below(size)),
        // The log needs some of it.
        3 if may_fail => Medium::Limited((64 << 10) + random.below(size)),
        _ => Medium::Plain,
    }
}

fn hop(random: &mut Random, size: u64) -> Hop {
    let mut disks = vec![medium(random, size, true)];
    while disks.last().is_some_and(|disk| disk.may_fail()) {
        disks.push(medium(random, size, true));
    }
    // So that the first pass takes up to half a second.
    let speed = if random.one_in(2) { 0 } else { (size * random.within(2..50)).max(1 << 20) };
    Hop {
        disks,
        serves: random.one_in(2),
        unlinks: random.one_in(3),
        waits: random.one_in(2),
        speed,
        pause_ms: random.pick(&[0, 20, 100, 100, 100, 1_000]),
        heir: random.pick(&[Heir::SameFile, Heir::OtherFile]),
        troubles: (0..random.below(5)).map(|_| trouble(random)).collect(),
    }
}

fn trouble(random: &mut Random) -> Trouble {
    let when = random.pick(&[When::Before, When::Inside, When::After]);
    let moment = match random.below(16) {
        0 => Moment::Greeting,
        1..=4 => Moment::Request(when, random.magnitude(1..64)),
        5 | 6 => Moment::Flush(when, 1),
        7 | 8 => Moment::Flush(when, 2),
        9 | 10 => Moment::Disc(when),
        11 => Moment::Reply(random.magnitude(1..64)),
        12 => Moment::FlushReply(1),
        13 => Moment::FlushReply(2),
        _ => Moment::Time(random.below(300)),
    };
    let signal = random.pick(&["KILL", "KILL", "TERM"]);
    let ms = random.pick(&[10, 50, 200, 600]);
    let act = match random.below(24) {
        0..=5 => Act::Cut,
        6 | 7 => Act::CutWithDisc,
        // Longer than the source waits.
        8 => Act::Hold(REQUEST_LIMIT_MS + 500),
        9 => Act::Hold(ms),
        10..=12 => Act::SignalListener(signal),
        13..=15 => Act::SignalSource(signal),
        16 => Act::StopListener(ms),
        17 => Act::StopSource(ms),
        18 | 19 => Act::Break,
        20 => Act::Speed(random.pick(&[0, 2 << 20, 8 << 20])),
        21 => Act::List,
        22 => Act::ListListener,
        _ => Act::Rogue,
    };
    let moment = match act {
        // A DISC is a lie as long as not everything was written.
        Act::CutWithDisc => Moment::Request(random.pick(&[When::Before, When::After]), random.magnitude(1..8)),
        // One sender at a time is let in.
        Act::Rogue => Moment::Time(random.pick(&[0, 0, 100])),
        _ => moment,
    };
    Trouble { moment, act }
}

/// After so many milliseconds without progress the sources take a request for lost.
pub const REQUEST_LIMIT_MS: u64 = 3_000;
