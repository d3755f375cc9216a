//! Memory of this program outside of tensors: where there is none left, one line says so and the exit code is 1.
//!
//! The library reports missing memory of tensors as an error. Strings, tables and what dependencies allocate cannot
//! fail in stable Rust: the standard library aborts with a core dump, and there is no stable hook for it.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io::{self, Write},
    process,
    sync::atomic::{AtomicBool, Ordering},
};

/// The system's allocator, which ends the process in an orderly way where that one refuses.
pub struct OrExit;

impl OrExit {
    fn check(block: *mut u8, bytes: usize) -> *mut u8 {
        static ENDING: AtomicBool = AtomicBool::new(false);
        // A refusal while the process ends must not end it again.
        if block.is_null() && !ENDING.swap(true, Ordering::Relaxed) {
            // Standard error has no buffer, and nothing here allocates.
            let _ = writeln!(
                io::stderr(),
                "xt: out of memory: allocating {bytes} bytes failed; give the process more memory, or use a smaller \
                 model or text"
            );
            process::exit(1);
        }
        block
    }
}

/// Returns to the system what was freed, where its allocator keeps such memory: a vocabulary is read through several times
/// its size, and a process is as large as it was at its largest.
pub fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(padding: usize) -> std::ffi::c_int;
        }
        // SAFETY: the function of glibc takes any number, and touches no memory that is in use.
        unsafe { malloc_trim(0) };
    }
}

// SAFETY: every call goes to the system's allocator with the caller's own arguments, and its answer is passed on; the
// caller's promises are the ones that it asks for.
unsafe impl GlobalAlloc for OrExit {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        Self::check(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        Self::check(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as above.
        Self::check(unsafe { System.realloc(block, layout, bytes) }, bytes)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}
