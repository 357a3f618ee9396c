//! Memory for bytes on their way between a socket and the disk.
//!
//! A [`Buffer`] is a fixed piece of memory, a window of which is filled. It is moved, never shared: a session fills it from
//! the socket, a disk operation owns it until it is done, the outbox owns it until the socket has taken its bytes.
//! A [`Pool`] hands out buffers and takes them back, and keeps the memory of all clients together under one cap.

/// The largest piece of a payload that is in memory at once, in bytes. Longer requests are streamed in slices.
pub const SLICE: usize = 256 << 10;

/// The largest buffer, in bytes, for the payload of a long WRITE: what came with one receive goes to the disk with one
/// call. See [`Pool::take_bulk`].
pub const BULK: usize = 1 << 20;

/// The sizes of buffers, in bytes: so few that a buffer given back soon fits another request.
const CLASSES: [usize; 5] = [4 << 10, 16 << 10, 64 << 10, SLICE, BULK];

/// What the memory of a buffer begins at a multiple of, in bytes. Some processors take three times as long to copy from a page
/// when the target begins a few bytes further from a page boundary than the source. An allocator returns just that: it puts
/// its own words, 16 bytes, in front of whole pages.
const ALIGNMENT: usize = 64;

/// A fixed piece of memory with a filled window `start..end`.
///
/// Invariant 1: `start <= end <= capacity`.
#[derive(Debug)]
pub struct Buffer {
    /// [`ALIGNMENT`] more than it can hold, or nothing.
    bytes: Box<[u8]>,
    /// Where in `bytes` it begins.
    base: usize,
    start: usize,
    end: usize,
}

impl Buffer {
    /// A buffer of `capacity` bytes that belongs to no pool. One of none takes no memory.
    pub fn with_capacity(capacity: usize) -> Self {
        let bytes = if capacity > 0 { capacity + ALIGNMENT } else { 0 };
        Self::over(vec![0; bytes].into_boxed_slice())
    }

    /// An empty buffer over this memory, which has [`ALIGNMENT`] bytes more than it will hold.
    fn over(bytes: Box<[u8]>) -> Self {
        let base = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { bytes, base, start: 0, end: 0 }
    }

    /// How many bytes it can hold.
    pub fn capacity(&self) -> usize {
        self.bytes.len().saturating_sub(ALIGNMENT)
    }

    fn memory(&self) -> &[u8] {
        self.bytes.get(self.base..self.base + self.capacity()).unwrap_or_default()
    }

    fn memory_mut(&mut self) -> &mut [u8] {
        let range = self.base..self.base + self.capacity();
        self.bytes.get_mut(range).unwrap_or_default()
    }

    /// How many bytes are filled and not consumed.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// True when nothing is filled.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The filled bytes.
    pub fn filled(&self) -> &[u8] {
        self.memory().get(self.start..self.end).unwrap_or_default()
    }

    /// The memory behind the filled bytes, to be written to; [`Buffer::advance`] then counts it as filled.
    pub fn spare(&mut self) -> &mut [u8] {
        let end = self.end;
        self.memory_mut().get_mut(end..).unwrap_or_default()
    }

    /// Counts `n` bytes written into [`Buffer::spare`] as filled.
    pub fn advance(&mut self, n: usize) {
        debug_assert!(n <= self.capacity() - self.end, "invariant 1");
        self.end = self.end.saturating_add(n).min(self.capacity());
    }

    /// Drops the first `n` filled bytes.
    pub fn consume(&mut self, n: usize) {
        debug_assert!(n <= self.len(), "invariant 1");
        self.start = self.start.saturating_add(n).min(self.end);
        if self.start == self.end {
            self.clear();
        }
    }

    /// Takes up to `n` filled bytes off the front.
    pub fn take(&mut self, n: usize) -> &[u8] {
        let (start, n) = (self.start, n.min(self.len()));
        self.consume(n);
        self.memory().get(start..start.saturating_add(n)).unwrap_or_default()
    }

    /// Appends as much of `bytes` as there is room for and says how much that was.
    pub fn append(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.spare().len());
        let (Some(to), Some(from)) = (self.spare().get_mut(..n), bytes.get(..n)) else { return 0 };
        to.copy_from_slice(from);
        self.advance(n);
        n
    }

    /// Moves the filled bytes to the front, so that the spare room is one piece as large as it can be.
    pub fn compact(&mut self) {
        let filled = self.start..self.end;
        self.memory_mut().copy_within(filled, 0);
        self.end -= self.start;
        self.start = 0;
    }

    /// Forgets what is filled.
    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }
}

/// Allocates for a pool: `source(bytes, left)` gives that many bytes, all zero, or `None` when they cannot be had, or
/// when fewer than `left` would remain after them.
pub type Source = fn(usize, usize) -> Option<Box<[u8]>>;

/// Hands out buffers and takes them back.
///
/// Invariant 2: `allocated` is the capacity of all buffers of this pool, handed out or free. It exceeds `cap` only by what
/// was taken beyond it ([`Pool::take_beyond`], [`Pool::take_reserve`]): for each connection at most one buffer to receive
/// into (16 KiB while it negotiates, else 4 KiB) and one for a payload (64 KiB for a READ with DF, else 4 KiB), and one
/// slice for the migration.
#[derive(Debug)]
pub struct Pool {
    free: [Vec<Buffer>; CLASSES.len()],
    allocated: usize,
    /// The part of it that is free.
    free_bytes: usize,
    cap: usize,
    source: Source,
    /// Memory that only buffers beyond the cap may use, in bytes.
    kept_back: usize,
    /// The source has refused since the last [`Pool::take_refusal`].
    is_refused: bool,
}

impl Pool {
    /// A pool of at most `cap` bytes. It owns none yet, and the program ends when there is no memory for it.
    pub fn new(cap: usize) -> Self {
        Self::with_source(cap, |bytes, _| Some(vec![0; bytes].into_boxed_slice()))
    }

    /// A pool of at most `cap` bytes, or of less when the source has no more. It owns none yet.
    pub fn with_source(cap: usize, source: Source) -> Self {
        Self {
            free: [const { Vec::new() }; CLASSES.len()],
            allocated: 0,
            free_bytes: 0,
            cap,
            source,
            kept_back: 0,
            is_refused: false,
        }
    }

    /// An empty buffer of at least `len` bytes (at most [`BULK`]), or `None` when the cap is reached or
    /// memory has run out.
    pub fn take(&mut self, len: usize) -> Option<Buffer> {
        let class = Self::class_for(len);
        if let Some(buffer) = self.free.get_mut(class).and_then(Vec::pop) {
            self.free_bytes -= buffer.capacity();
            return Some(buffer);
        }
        let capacity = *CLASSES.get(class)?;
        if self.make_room(capacity) {
            self.allocate(capacity, self.kept_back)
        } else {
            None
        }
    }

    /// Keeps so many bytes of memory for buffers beyond the cap, so that a connection without a buffer gets one even
    /// when the others have used up all other memory.
    pub fn keep_back(&mut self, bytes: usize) {
        self.kept_back = bytes;
    }

    /// An empty buffer of `len` bytes or, when memory is short, of as much as there is; `None` when there is none.
    pub fn take_up_to(&mut self, len: usize) -> Option<Buffer> {
        let largest = Self::class_for(len);
        self.take(len).or_else(|| CLASSES.iter().take(largest).rev().find_map(|&size| self.take(size)))
    }

    /// An empty buffer of [`BULK`] bytes, or `None` when more than a quarter of the cap would be handed out with it. While
    /// many clients write, the disk takes a slice of each at a time, so that a turn is short.
    pub fn take_bulk(&mut self) -> Option<Buffer> {
        let handed_out = self.allocated - self.free_bytes;
        (handed_out + BULK <= self.cap / 4).then(|| self.take(BULK)).flatten()
    }

    /// An empty buffer of at least `len` bytes, even beyond the cap. For whoever has to go on while others have all of the
    /// pool, and needs one buffer at a time: the migration, an option, a READ that must not be cut. `None` when memory has
    /// run out.
    pub fn take_beyond(&mut self, len: usize) -> Option<Buffer> {
        let capacity = *CLASSES.get(Self::class_for(len))?;
        self.take(len).or_else(|| self.allocate(capacity, 0))
    }

    /// An empty buffer of the smallest size, even beyond the cap. For a connection without any other buffer, so that each
    /// goes on, in small steps, while others have all of the pool. `None` when memory has run out.
    pub fn take_reserve(&mut self) -> Option<Buffer> {
        self.take_beyond(1)
    }

    /// Takes a buffer back.
    pub fn give(&mut self, mut buffer: Buffer) {
        buffer.clear();
        let class = CLASSES.iter().position(|&size| size == buffer.capacity());
        match class.and_then(|class| self.free.get_mut(class)) {
            Some(free) if self.allocated <= self.cap => {
                self.free_bytes += buffer.capacity();
                free.push(buffer);
            }
            Some(_) => self.allocated = self.allocated.saturating_sub(buffer.capacity()),
            None => debug_assert!(false, "invariant 2: not a buffer of a pool"),
        }
    }

    /// Moves the filled bytes to the smallest buffer in which they fit, so that a few do not occupy a large one.
    pub fn shrink(&mut self, buffer: Buffer) -> Buffer {
        self.resize(buffer.len(), buffer)
    }

    /// Moves the filled bytes to a buffer of at least `len` bytes, if there is one; else returns the same one, compacted.
    pub fn grow(&mut self, len: usize, buffer: Buffer) -> Buffer {
        self.resize(len.max(buffer.len()), buffer)
    }

    fn resize(&mut self, len: usize, mut buffer: Buffer) -> Buffer {
        let fits = CLASSES.get(Self::class_for(len)) == Some(&buffer.capacity());
        let Some(mut other) = (!fits).then(|| self.take(len)).flatten() else {
            buffer.compact();
            return buffer;
        };
        other.append(buffer.filled());
        self.give(buffer);
        other
    }

    /// How many bytes could be handed out now.
    pub fn available(&self) -> usize {
        self.cap.saturating_sub(self.allocated) + self.free_bytes
    }

    fn class_for(len: usize) -> usize {
        debug_assert!(len <= BULK, "no buffer is larger");
        CLASSES.iter().position(|&size| len <= size).unwrap_or(CLASSES.len() - 1)
    }

    /// True when the source has refused since the last call. Whoever got no memory may ask again after a while.
    pub fn take_refusal(&mut self) -> bool {
        std::mem::take(&mut self.is_refused)
    }

    /// True when the source has refused since the last [`Pool::take_refusal`].
    pub fn is_refused(&self) -> bool {
        self.is_refused
    }

    /// Gives the memory of free buffers back to where it came from.
    pub fn drop_free(&mut self) {
        while self.drop_one() {}
    }

    /// Allocates a buffer. While the source refuses, drops free buffers to make room for it.
    fn allocate(&mut self, capacity: usize, left: usize) -> Option<Buffer> {
        loop {
            if let Some(bytes) = (self.source)(capacity + ALIGNMENT, left) {
                self.allocated += capacity;
                return Some(Buffer::over(bytes));
            }
            if !self.drop_one() {
                self.is_refused = true;
                return None;
            }
        }
    }

    /// Drops free buffers of other sizes until `capacity` more bytes fit under the cap.
    fn make_room(&mut self, capacity: usize) -> bool {
        while self.allocated + capacity > self.cap {
            if !self.drop_one() {
                return false;
            }
        }
        true
    }

    /// Drops a free buffer; false when there is none.
    fn drop_one(&mut self) -> bool {
        let Some(dropped) = self.free.iter_mut().rev().find_map(Vec::pop) else { return false };
        self.allocated -= dropped.capacity();
        self.free_bytes -= dropped.capacity();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_where_the_processor_copies_fast() {
        let is_aligned = |buffer: &Buffer| buffer.filled().as_ptr() as usize % ALIGNMENT == 0;
        assert_eq!(Buffer::with_capacity(0).append(b"a"), 0);
        for capacity in [1, 8, 4096, SLICE, BULK] {
            let mut buffer = Buffer::with_capacity(capacity);
            assert!(is_aligned(&buffer) && buffer.capacity() == capacity);
            assert_eq!(buffer.append(&vec![7; capacity + 1]), capacity);
        }
        let mut pool = Pool::new(8 << 20);
        for &size in &CLASSES {
            let buffer = pool.take(size).unwrap();
            assert!(is_aligned(&buffer) && buffer.capacity() == size);
        }
    }

    #[test]
    fn a_window_moves_through_the_buffer() {
        let mut buffer = Buffer::with_capacity(8);
        assert_eq!(buffer.append(b"abcdefghij"), 8);
        buffer.consume(5);
        assert_eq!(buffer.filled(), b"fgh");
        assert!(buffer.spare().is_empty());
        buffer.compact();
        assert_eq!(buffer.spare().len(), 5);
        assert_eq!(buffer.append(b"xy"), 2);
        assert_eq!(buffer.filled(), b"fghxy");
        assert_eq!(buffer.take(2), b"fg");
        assert_eq!(buffer.take(100), b"hxy");
        assert_eq!(buffer.spare().len(), 8);
        assert!(buffer.take(1).is_empty());
    }

    #[test]
    fn the_cap_holds_whatever_sizes_are_asked_for() {
        let mut pool = Pool::new(SLICE);
        let small: Vec<_> = (0..64).filter_map(|_| pool.take(4096)).collect();
        assert_eq!((small.len(), pool.available()), (64, 0));
        assert!(pool.take(1).is_none());
        let reserve = pool.take_reserve().unwrap();
        assert_eq!(reserve.capacity(), 4096);
        pool.give(reserve);
        assert_eq!(pool.available(), 0);
        for buffer in small {
            pool.give(buffer);
        }
        assert_eq!(pool.take(SLICE).map(|buffer| buffer.capacity()), Some(SLICE), "free buffers make room for others");
        assert!(pool.take(1).is_none());
    }

    #[test]
    fn where_memory_has_run_out_free_buffers_make_room_and_then_nobody_gets_one() {
        thread_local!(static LEFT: std::cell::Cell<usize> = const { std::cell::Cell::new(0) });
        let mut pool = Pool::with_source(64 * SLICE, |bytes, left| {
            LEFT.set(LEFT.get().checked_sub(1).filter(|&rest| rest >= left)?);
            Some(vec![0; bytes].into())
        });
        LEFT.set(2);
        pool.keep_back(1);
        let large = pool.take(SLICE).unwrap();
        assert!(!pool.is_refused());
        assert!(pool.take(1).is_none() && pool.take_refusal());
        assert_eq!(pool.take_reserve().map(|buffer| buffer.capacity()), Some(4096));
        pool.keep_back(0);
        assert!(pool.take(1).is_none() && pool.take_up_to(SLICE).is_none());
        assert!(pool.take_beyond(1).is_none() && pool.take_reserve().is_none());
        assert!(pool.is_refused() && pool.take_refusal() && !pool.take_refusal());
        pool.give(large);
        LEFT.set(1);
        assert_eq!(pool.take(1).map(|buffer| buffer.capacity()), Some(4096));
        let available = pool.available();
        LEFT.set(0);
        assert!(pool.take(1).is_none());
        assert_eq!(pool.available(), available, "the free slice was given back before that was said");
    }

    #[test]
    fn large_buffers_are_for_few() {
        let mut pool = Pool::new(16 * BULK);
        let small = pool.take(1).unwrap();
        let bulk: Vec<_> = std::iter::from_fn(|| pool.take_bulk()).collect();
        assert_eq!((bulk.len(), bulk[0].capacity()), (3, BULK), "a quarter, with what others have");
        pool.give(small);
        let last = pool.take_bulk().unwrap();
        assert!(pool.take_bulk().is_none());
        for buffer in bulk.into_iter().chain([last]) {
            pool.give(buffer);
        }
        assert_eq!(pool.available(), 16 * BULK);
        let slices: Vec<_> = std::iter::from_fn(|| pool.take(SLICE)).collect();
        assert_eq!((slices.len(), pool.available()), (64, 0), "what is free makes room");
        assert!(Pool::new(BULK).take_bulk().is_none());
    }

    #[test]
    fn a_returned_buffer_comes_back_empty() {
        let mut pool = Pool::new(SLICE);
        let mut buffer = pool.take(10).unwrap();
        buffer.append(b"secret");
        pool.give(buffer);
        assert!(pool.take(10).unwrap().is_empty());
    }
}
