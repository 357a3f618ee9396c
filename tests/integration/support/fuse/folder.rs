//! PURE: One folder of files in memory, and the changes that it can undergo.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// The unit in which a file has data or holes.
pub const PAGE: u64 = PAGE_LEN as u64;
const PAGE_LEN: usize = 4096;

/// The number by which a file is known, whatever its name.
pub type FileId = u64;
/// The number of the folder; those of the files are larger.
pub const FOLDER: FileId = 1;

/// Data of a file; copies of a file share it until one of them changes.
type Page = Arc<[u8; PAGE_LEN]>;

/// A file: where no page is, there is a hole.
#[derive(Clone, Default)]
pub struct File {
    /// Its length in bytes.
    pub size: u64,
    /// Its extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
    pages: BTreeMap<u64, Page>,
}

impl File {
    /// The bytes of a range, as far as the file goes.
    pub fn read(&self, range: Range<u64>) -> Vec<u8> {
        let end = range.end.min(self.size).max(range.start);
        let mut bytes = vec![0; (end - range.start) as usize];
        for (number, page) in self.pages_of(range.start..end) {
            let (within, at) = overlap(number, &(range.start..end));
            bytes[at..at + within.len()].copy_from_slice(&page[within]);
        }
        bytes
    }

    /// Where data begins at or after an offset.
    pub fn seek_data(&self, offset: u64) -> Result<u64, i32> {
        let data = self.pages.range(offset / PAGE..).next().map(|(number, _)| (number * PAGE).max(offset));
        data.filter(|&data| data < self.size).ok_or(libc::ENXIO)
    }

    /// Where a hole begins at or after an offset; there is one behind the end.
    pub fn seek_hole(&self, offset: u64) -> Result<u64, i32> {
        if offset >= self.size {
            return Err(libc::ENXIO);
        }
        let hole = page_numbers(&(offset..self.size)).find(|number| !self.pages.contains_key(number));
        Ok(hole.map_or(self.size, |number| (number * PAGE).max(offset)))
    }

    /// The bytes that its data takes.
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// The bytes that data in this range would take in addition.
    pub fn missing(&self, range: Range<u64>) -> u64 {
        (page_numbers(&range).count() - self.pages_of(range).count()) as u64 * PAGE
    }

    fn pages_of(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &Page)> {
        self.pages.range(page_numbers(&range)).map(|(&number, page)| (number, page))
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let range = offset..offset + bytes.len() as u64;
        for number in page_numbers(&range) {
            let (within, at) = overlap(number, &range);
            let length = within.len();
            self.page(number)[within].copy_from_slice(&bytes[at..at + length]);
        }
        self.size = self.size.max(range.end);
    }

    fn fill(&mut self, range: Range<u64>, fill: Fill) {
        for number in page_numbers(&range) {
            let (within, _) = overlap(number, &range);
            match fill {
                Fill::Punch if within.len() == PAGE_LEN => drop(self.pages.remove(&number)),
                // A hole is zero already.
                Fill::Punch if !self.pages.contains_key(&number) => {}
                Fill::Punch | Fill::Zero => self.page(number)[within].fill(0),
                Fill::Allocate => drop(self.page(number)),
            }
        }
    }

    fn resize(&mut self, size: u64) {
        if size < self.size {
            self.pages.split_off(&size.div_ceil(PAGE));
            self.fill(size..size.next_multiple_of(PAGE), Fill::Punch);
        }
        self.size = size;
    }

    fn page(&mut self, number: u64) -> &mut [u8; PAGE_LEN] {
        Arc::make_mut(self.pages.entry(number).or_insert_with(|| Arc::new([0; PAGE_LEN])))
    }
}

/// The numbers of the pages that a range touches.
fn page_numbers(range: &Range<u64>) -> Range<u64> {
    if range.is_empty() {
        return 0..0;
    }
    range.start / PAGE..range.end.div_ceil(PAGE)
}

/// What a page has of a range: where in the page, and from where in the range.
fn overlap(number: u64, range: &Range<u64>) -> (Range<usize>, usize) {
    let page = number * PAGE;
    let (start, end) = (range.start.max(page), range.end.min(page + PAGE));
    ((start - page) as usize..(end - page) as usize, (start - range.start) as usize)
}

/// What fallocate(2) makes of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// A hole.
    Punch,
    /// Zeroes that take room.
    Zero,
    /// Room; what was there stays.
    Allocate,
}

/// A folder of files.
#[derive(Clone, Default)]
pub struct Folder {
    names: BTreeMap<String, FileId>,
    files: BTreeMap<FileId, File>,
}

impl Folder {
    /// The names in it, and the files they are of.
    pub fn names(&self) -> impl Iterator<Item = (&str, FileId)> {
        self.names.iter().map(|(name, &file)| (name.as_str(), file))
    }

    /// The file of a name.
    pub fn id(&self, name: &str) -> Option<FileId> {
        self.names.get(name).copied()
    }

    /// A file by its number; it may have no name any more.
    pub fn file(&self, file: FileId) -> Option<&File> {
        self.files.get(&file)
    }

    /// The largest number of a file in it; that of the folder itself if there is none.
    pub fn last_id(&self) -> FileId {
        self.files.last_key_value().map_or(FOLDER, |(&file, _)| file)
    }

    /// The bytes that the data of all files takes.
    pub fn allocated(&self) -> u64 {
        self.files.values().map(File::allocated).sum()
    }

    /// Removes the data of a file without a name.
    pub fn forget(&mut self, file: FileId) {
        if !self.names.values().any(|&named| named == file) {
            self.files.remove(&file);
        }
    }

    /// Removes the data of all files without a name.
    pub fn forget_nameless(&mut self) {
        let named: BTreeSet<FileId> = self.names.values().copied().collect();
        self.files.retain(|file, _| named.contains(file));
    }

    /// The same names and attributes, with files of the same size that are holes.
    pub fn without_content(&self) -> Self {
        let mut bare = self.clone();
        bare.files.values_mut().for_each(|file| file.pages.clear());
        bare
    }

    /// Carries out a change. What it is about may be missing, when an earlier change was lost with the power: content
    /// then belongs to a file without a name, and a name that is not there needs no removal.
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Create { name, file } => {
                self.names.insert(name.clone(), *file);
                self.files.entry(*file).or_default();
            }
            Change::Unlink { name, file } => {
                if self.names.get(name) == Some(file) {
                    self.names.remove(name);
                }
            }
            Change::Rename { from, to, file } => {
                if self.names.get(from) == Some(file) {
                    self.names.remove(from);
                }
                self.names.insert(to.clone(), *file);
                self.files.entry(*file).or_default();
            }
            Change::Write { file, offset, bytes } => self.files.entry(*file).or_default().write(*offset, bytes),
            Change::Fill { file, range, fill, grow } => {
                let file = self.files.entry(*file).or_default();
                file.fill(range.clone(), *fill);
                if *grow {
                    file.size = file.size.max(range.end);
                }
            }
            Change::Resize { file, size } => self.files.entry(*file).or_default().resize(*size),
            Change::SetXattr { file, key, value } => {
                self.files.entry(*file).or_default().xattrs.insert(key.clone(), value.clone());
            }
            Change::RemoveXattr { file, key } => {
                self.files.entry(*file).or_default().xattrs.remove(key);
            }
        }
    }
}

/// What can happen to a folder. A name goes with its file, so that each change has a meaning without those before.
#[derive(Debug, Clone)]
pub enum Change {
    Create { name: String, file: FileId },
    Unlink { name: String, file: FileId },
    Rename { from: String, to: String, file: FileId },
    Write { file: FileId, offset: u64, bytes: Vec<u8> },
    Fill { file: FileId, range: Range<u64>, fill: Fill, grow: bool },
    Resize { file: FileId, size: u64 },
    SetXattr { file: FileId, key: String, value: Vec<u8> },
    RemoveXattr { file: FileId, key: String },
}

impl Change {
    /// True when only the content of a file changes, its size included.
    pub fn is_content(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Fill { .. } | Self::Resize { .. })
    }

    /// How a log calls it. `name` tells the name of a file.
    pub fn describe(&self, name: impl Fn(FileId) -> String) -> String {
        match self {
            Self::Create { name, .. } => format!("create {name}"),
            Self::Unlink { name, .. } => format!("unlink {name}"),
            Self::Rename { from, to, .. } => format!("rename {from} {to}"),
            Self::Write { file, offset, bytes } => {
                format!("write {} {offset}..{}", name(*file), offset + bytes.len() as u64)
            }
            Self::Fill { file, range, fill, .. } => format!("{fill} {} {range:?}", name(*file)),
            Self::Resize { file, size } => format!("resize {} {size}", name(*file)),
            Self::SetXattr { file, key, .. } => format!("setxattr {} {key}", name(*file)),
            Self::RemoveXattr { file, key } => format!("removexattr {} {key}", name(*file)),
        }
    }
}

impl fmt::Display for Fill {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Punch => "punch",
            Self::Zero => "zero",
            Self::Allocate => "allocate",
        })
    }
}
