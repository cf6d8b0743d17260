//! How much memory a call needs: an allocator that counts, by thread.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

thread_local! {
    /// Bytes allocated by this thread and not freed by it.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    /// Most of them since [`peak`] began.
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn grow(bytes: usize) {
    LIVE.set(LIVE.get() + bytes as isize);
    PEAK.set(PEAK.get().max(LIVE.get()));
}

fn shrink(bytes: usize) {
    LIVE.set(LIVE.get() - bytes as isize);
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        shrink(layout.size());
        // SAFETY: passed on.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // both may be there for a while
        grow(new_size);
        shrink(layout.size());
        // SAFETY: passed on.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

/// What `f` gives. Panics when this thread had more than `bound` bytes beside those that it had before.
pub fn bounded<T>(bound: usize, f: impl FnOnce() -> T) -> T {
    let before = LIVE.get();
    PEAK.set(before);
    let out = f();
    let peak = PEAK.get() - before;
    assert!(peak <= bound as isize, "{peak} bytes were allocated, the bound is {bound}");
    out
}
