//! Memory that may run out, as it does under a limit of address space (`ulimit -v`).
//!
//! Most of what a program allocates is small, and Rust ends the program when it cannot have it. So [`Allocator`] has a
//! reserve: when an allocation fails, the reserve is given up, and whoever asked gets its memory after all. From then on the
//! program [`is_short`], and asks for no more than it has to until it has the reserve back ([`keep_reserve`]). What is large, or
//! as much as peers like, does not touch the reserve: it is asked for by [`zeroed`], which may say no, or after [`has_room`].

use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

/// What is kept back: more than what is small takes in one turn of a server with a hundred busy clients. It is not touched
/// while it is kept, so that it takes addresses and no memory.
const RESERVE: Layout = Layout::new::<[u8; 1 << 20]>();

/// How far [`zeroed`] looks ahead, in bytes.
const AHEAD: usize = 1 << 20;

/// The reserve of the program.
static OF_PROGRAM: Reserve = Reserve::none();

/// Memory that is kept back.
#[derive(Debug)]
struct Reserve {
    kept: AtomicPtr<u8>,
    is_given_up: AtomicBool,
}

impl Reserve {
    const fn none() -> Self {
        Self { kept: AtomicPtr::new(ptr::null_mut()), is_given_up: AtomicBool::new(false) }
    }

    fn keep(&self) -> bool {
        if self.kept.load(Ordering::Relaxed).is_null() {
            // SAFETY: the layout is not empty.
            let memory = unsafe { System.alloc(RESERVE) };
            if memory.is_null() {
                return false;
            }
            self.kept.store(memory, Ordering::Relaxed);
            self.is_given_up.store(false, Ordering::Relaxed);
        }
        true
    }

    /// Leaves the reserve to whoever allocates next; false when there is none.
    fn give_up(&self) -> bool {
        let kept = self.kept.swap(ptr::null_mut(), Ordering::Relaxed);
        if kept.is_null() {
            return false;
        }
        self.is_given_up.store(true, Ordering::Relaxed);
        // SAFETY: it came from the system with this layout, and the swap has left it to nobody else.
        unsafe { System.dealloc(kept, RESERVE) };
        true
    }

    /// Allocates, if need be with what was kept back for that.
    fn helps(&self, allocate: impl Fn() -> *mut u8) -> *mut u8 {
        let memory = allocate();
        if memory.is_null() && self.give_up() {
            return allocate();
        }
        memory
    }

    fn is_given_up(&self) -> bool {
        self.is_given_up.load(Ordering::Relaxed)
    }

    fn zeroed_beside(&self, bytes: usize) -> Option<Box<[u8]>> {
        let layout = Layout::array::<u8>(bytes).ok().filter(|layout| layout.size() > 0 && !self.is_given_up())?;
        // SAFETY: the layout is not empty.
        let memory = unsafe { System.alloc_zeroed(layout) };
        if memory.is_null() {
            return None;
        }
        // SAFETY: these are initialised bytes that nobody else has. The box will give them to the allocator of the program,
        // which is that of the system or one that hands everything on to it, so they end where they came from.
        Some(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(memory, bytes)) })
    }
}

/// The allocator of the system, and a reserve.
#[derive(Debug)]
pub struct Allocator(&'static Reserve);

impl Allocator {
    /// The one for `#[global_allocator]`. It has no reserve before [`keep_reserve`].
    pub const fn of_program() -> Self {
        Self(&OF_PROGRAM)
    }
}

// SAFETY: each call is handed on to the allocator of the system as it came, and once more only when that has returned
// nothing. So what the system's promises holds for this one.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the rules of this call, which are those of the system's.
        self.0.helps(|| unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        self.0.helps(|| unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as above; what could not grow is still there as it was.
        self.0.helps(|| unsafe { System.realloc(memory, layout, bytes) })
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as above; `memory` came from the system with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Makes sure that the program has its reserve; false when there is no memory for it.
pub fn keep_reserve() -> bool {
    OF_PROGRAM.keep()
}

/// True while the reserve is given up: memory has run out.
pub fn is_short() -> bool {
    OF_PROGRAM.is_given_up()
}

/// Gives the system back what is free. The C library keeps it: most of what reading the command line took.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no memory is passed, and nothing that is allocated moves.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// So many bytes, all zero; `None` when they cannot be had and as many as `left` after them, or the reserve is given up.
/// To look at what is left takes two system calls, so they look far enough ahead for many buffers.
pub fn zeroed(bytes: usize, left: usize) -> Option<Box<[u8]>> {
    let has_both = left == 0 || has_room_beside(bytes, left);
    has_both.then(|| OF_PROGRAM.zeroed_beside(bytes)).flatten()
}

/// True when so many bytes could be allocated now and as many as `left` after them.
fn has_room_beside(bytes: usize, left: usize) -> bool {
    // How many bytes may still be allocated before there is a reason to look again.
    static SEEN: AtomicUsize = AtomicUsize::new(0);
    let seen = SEEN.load(Ordering::Relaxed);
    let rest =
        seen.checked_sub(bytes).or_else(|| has_room(bytes.saturating_add(left).saturating_add(AHEAD)).then_some(AHEAD));
    SEEN.store(rest.unwrap_or(0), Ordering::Relaxed);
    rest.is_some() || has_room(bytes.saturating_add(left))
}

/// True when so many bytes could be allocated now, without the reserve.
pub fn has_room(bytes: usize) -> bool {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a mapping at an address that the kernel picks takes nobody's memory.
    let mapped = unsafe { libc::mmap(ptr::null_mut(), bytes.max(1), protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: that is the mapping made above, which nobody else knows.
    unsafe { libc::munmap(mapped, bytes.max(1)) };
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_goes_once_to_what_fails_and_can_be_had_again() {
        static OWN: Reserve = Reserve::none();
        let allocator = Allocator(&OWN);
        // SAFETY: the layout is not empty.
        let huge = || unsafe { allocator.alloc(Layout::array::<u8>(1 << 60).unwrap()) };
        // What nobody looks at need not even be asked for.
        let fails = || std::hint::black_box(huge()).is_null();
        assert!(fails() && !OWN.is_given_up(), "there was none");
        assert!(OWN.keep() && OWN.keep());
        assert_eq!(OWN.zeroed_beside(5000).unwrap(), vec![0; 5000].into());
        assert!([0, 1 << 60, usize::MAX].iter().all(|&bytes| OWN.zeroed_beside(bytes).is_none()));
        assert!(!OWN.is_given_up(), "what may be refused does not touch it");

        assert!(fails() && OWN.is_given_up() && !OWN.give_up());
        assert!(OWN.zeroed_beside(1).is_none(), "what there is now is for those that cannot be refused");
        let layout = Layout::new::<u64>();
        // SAFETY: the layout is not empty, and the memory is given back with the layout that it has by then.
        unsafe {
            let small = allocator.alloc_zeroed(layout);
            assert_eq!(small.read(), 0);
            let grown = allocator.realloc(small, layout, 64);
            assert!(!grown.is_null());
            allocator.dealloc(grown, Layout::from_size_align(64, layout.align()).unwrap());
        }
        assert!(OWN.keep() && !OWN.is_given_up() && OWN.give_up());
    }

    #[test]
    fn there_is_room_for_little_and_not_for_everything() {
        assert!(has_room(0) && has_room(1 << 20));
        assert!(!has_room(1 << 60));
    }
}
