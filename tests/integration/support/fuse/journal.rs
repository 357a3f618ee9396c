//! PURE: What happened to a folder, what of it is durable, and what a power failure may leave.
//!
//! The disk promises as little as it may: changes become durable only by a sync that covers them, in any order, and
//! not at all once a sync that covered them has failed, for the kernel may count as clean what it could not write. A
//! change is there as a whole or not at all.

use super::folder::{Change, FileId, Folder};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;

/// With more changes than this that may or may not be there, not every set of them is tried.
const ALL_SETS_MAX: usize = 10;
/// How many sets are tried then, beside every beginning of the list.
const SETS: u64 = 200;

/// What a sync covers.
#[derive(Debug, Clone, Copy)]
pub enum Sync {
    /// fdatasync: the content and size of a file.
    Data(FileId),
    /// fsync: its extended attributes as well, but not its name.
    File(FileId),
    /// fsync of the folder: all names.
    Names,
}

impl Sync {
    fn covers(self, change: &Change) -> bool {
        match change {
            Change::Create { .. } | Change::Unlink { .. } | Change::Rename { .. } => matches!(self, Self::Names),
            Change::Write { file, .. } | Change::Fill { file, .. } | Change::Resize { file, .. } => {
                matches!(self, Self::Data(synced) | Self::File(synced) if synced == *file)
            }
            Change::SetXattr { file, .. } | Change::RemoveXattr { file, .. } => {
                matches!(self, Self::File(synced) if synced == *file)
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// No sync has covered it.
    Pending,
    /// A sync has covered it, and failed: no later one is about it.
    Doubtful,
    Durable,
}

struct Entry {
    change: Change,
    fate: Fate,
    text: Arc<str>,
}

/// A folder with its past.
pub struct Journal {
    /// As it is seen now.
    folder: Folder,
    /// What is durable for sure: all before the first of the entries.
    base: Folder,
    entries: VecDeque<Entry>,
    /// The last name of each file.
    names: BTreeMap<FileId, String>,
    log: Vec<Arc<str>>,
}

impl Journal {
    /// Begins with a folder that is durable as it is.
    pub fn new(folder: Folder) -> Self {
        let names = folder.names().map(|(name, file)| (file, name.to_owned())).collect();
        Self { base: folder.clone(), folder, entries: VecDeque::new(), names, log: Vec::new() }
    }

    /// The folder as it is now.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Carries out a change.
    pub fn change(&mut self, change: Change) {
        if let Change::Create { name, file } | Change::Rename { to: name, file, .. } = &change {
            self.names.insert(*file, name.clone());
        }
        let text = Arc::from(change.describe(|file| self.name(file)));
        self.folder.apply(&change);
        self.log.push(Arc::clone(&text));
        self.entries.push_back(Entry { change, fate: Fate::Pending, text });
    }

    /// Carries out changes that are durable at once and in no log: what was there before the test.
    pub fn furnish(&mut self, changes: &[Change]) {
        for change in changes {
            if let Change::Create { name, file } = change {
                self.names.insert(*file, name.clone());
            }
            self.folder.apply(change);
            self.base.apply(change);
        }
    }

    /// Forgets the content of a file that has no name and that nobody has open. What the disk may hold stays.
    pub fn forget(&mut self, file: FileId) {
        self.folder.forget(file);
    }

    /// Carries out a sync. The kernel begins none while a change of the same file is under way, nor the other way round.
    pub fn sync(&mut self, sync: Sync, went_well: bool) {
        let what = match sync {
            Sync::Data(file) => format!("fdatasync {}", self.name(file)),
            Sync::File(file) => format!("fsync {}", self.name(file)),
            Sync::Names => "fsync of the folder".to_owned(),
        };
        self.log.push(if went_well { what } else { format!("{what}, which fails") }.into());
        let fate = if went_well { Fate::Durable } else { Fate::Doubtful };
        for entry in &mut self.entries {
            if entry.fate == Fate::Pending && sync.covers(&entry.change) {
                entry.fate = fate;
            }
        }
        while self.entries.front().is_some_and(|entry| entry.fate == Fate::Durable) {
            self.base.apply(&self.entries.pop_front().unwrap().change);
        }
    }

    /// All changes and syncs, in their order.
    pub fn log(&self) -> Vec<String> {
        self.log.iter().map(ToString::to_string).collect()
    }

    /// The changes that are not durable, in their order.
    pub fn pending(&self) -> Vec<String> {
        let pending = self.entries.iter().filter(|entry| entry.fate != Fate::Durable);
        pending.map(|entry| entry.text.to_string()).collect()
    }

    /// What a power failure may leave: everything durable and any set of the other changes. All sets of up to 10
    /// changes; of more, every beginning of the list and 200 sets that the seed decides about.
    pub fn power_failures(&self, seed: u64) -> PowerFailures {
        let pending = self.entries.iter().filter(|entry| entry.fate != Fate::Durable).count();
        let sets: Vec<Set> = if pending <= ALL_SETS_MAX {
            (0..1_u64 << pending).map(Set::Exactly).collect()
        } else {
            let beginnings = (0..=pending).map(Set::First);
            beginnings
                .chain((0..SETS).map(|number| Set::Seeded(seed.wrapping_mul(SETS).wrapping_add(number))))
                .collect()
        };
        let changes = self.entries.iter().map(|entry| Recorded {
            change: entry.change.clone(),
            is_durable: entry.fate == Fate::Durable,
            text: Arc::clone(&entry.text),
        });
        let moment = Moment { bare: self.base.without_content(), base: self.base.clone(), changes: changes.collect() };
        PowerFailures { moment: Arc::new(moment), sets: sets.into_iter() }
    }

    fn name(&self, file: FileId) -> String {
        self.names.get(&file).cloned().unwrap_or_else(|| format!("#{file}"))
    }
}

/// A set of the changes that are not durable.
#[derive(Debug, Clone, Copy)]
enum Set {
    /// Bit n: the change number n.
    Exactly(u64),
    /// This many from the beginning.
    First(usize),
    /// Those that a generator with this seed chooses.
    Seeded(u64),
}

impl Set {
    /// Whether it holds a change.
    fn holds(self, number: usize) -> bool {
        match self {
            Self::Exactly(bits) => bits >> number & 1 == 1,
            Self::First(count) => number < count,
            // One bit of a hash (splitmix64).
            Self::Seeded(seed) => {
                let mut bits = (seed ^ ((number as u64) << 32)).wrapping_add(0x9e37_79b9_7f4a_7c15);
                bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
                (bits ^ bits >> 31) & 1 == 1
            }
        }
    }
}

struct Recorded {
    change: Change,
    is_durable: bool,
    text: Arc<str>,
}

/// What is on the disk, and what may be.
struct Moment {
    base: Folder,
    /// The same but for the content of files.
    bare: Folder,
    changes: Vec<Recorded>,
}

impl Moment {
    /// The changes, and whether they are there after a power failure that leaves this set.
    fn changes(&self, set: Set) -> impl Iterator<Item = (&Recorded, bool)> {
        let mut pending = 0..;
        self.changes.iter().map(move |recorded| {
            let is_there = recorded.is_durable || set.holds(pending.next().unwrap());
            (recorded, is_there)
        })
    }

    fn applied(&self, to: &Folder, set: Set, of: impl Fn(&Change) -> bool) -> Folder {
        let mut folder = to.clone();
        let there = self.changes(set).filter(|(recorded, is_there)| *is_there && of(&recorded.change));
        there.for_each(|(recorded, _)| folder.apply(&recorded.change));
        // Content whose name was lost is lost.
        folder.forget_nameless();
        folder
    }
}

/// What a power failure may leave, one possibility after the other.
pub struct PowerFailures {
    moment: Arc<Moment>,
    sets: std::vec::IntoIter<Set>,
}

impl Iterator for PowerFailures {
    type Item = Remains;

    fn next(&mut self) -> Option<Remains> {
        let (moment, set) = (Arc::clone(&self.moment), self.sets.next()?);
        let bare = moment.applied(&moment.bare, set, |change| !change.is_content());
        Some(Remains { moment, set, bare })
    }
}

/// A folder after a power failure. Its `Display` says what was lost. The content of files, which is most of the work, is put
/// together for those who look at it.
pub struct Remains {
    moment: Arc<Moment>,
    set: Set,
    /// Names and attributes.
    bare: Folder,
}

impl Remains {
    /// The names of the files.
    pub fn names(&self) -> Vec<&str> {
        self.bare.names().map(|(name, _)| name).collect()
    }

    /// All of it.
    pub(super) fn folder(&self) -> Folder {
        self.moment.applied(&self.moment.base, self.set, |_| true)
    }

    /// The content of a file, if it is there.
    pub fn content(&self, name: &str) -> Option<Vec<u8>> {
        let file = self.bare.id(name)?;
        let folder = self.folder();
        let file = folder.file(file)?;
        Some(file.read(0..file.size))
    }

    /// An extended attribute of a file, if both are there.
    pub fn xattr(&self, name: &str, key: &str) -> Option<&[u8]> {
        self.bare.file(self.bare.id(name)?)?.xattrs.get(key).map(Vec::as_slice)
    }
}

impl fmt::Display for Remains {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let lost = self.moment.changes(self.set).filter(|(_, is_there)| !is_there);
        let lost: Vec<&str> = lost.map(|(recorded, _)| &*recorded.text).collect();
        write!(f, "after a power failure that lost {lost:?}")
    }
}
