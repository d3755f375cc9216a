//! Memory from the system in large pieces, of which the heap cuts blocks: anonymous maps where the system has them, the
//! allocator's elsewhere and under Miri.

use std::ptr::NonNull;

/// Bytes in which memory goes back to the system: whole pages of any system.
pub(super) const PAGE: usize = 64 << 10;

/// Pages that maps are made of, if the system grants the wish for large ones.
pub(super) const LARGE_PAGE: usize = if Map::UNTOUCHED_IS_FREE { 2 << 20 } else { PAGE };

/// Memory that nobody refers to but by pointers: blocks of it are lent out, so that a reference to the whole would
/// alias them.
pub(super) struct Map(imp::Map);

impl Map {
    /// If `true`, no page of a map is there before it is touched.
    pub const UNTOUCHED_IS_FREE: bool = cfg!(all(any(unix, windows), not(miri)));

    /// Initialised memory of at least this many bytes, of which no page is there yet if the system can do that.
    pub fn new(bytes: usize) -> Option<Self> {
        imp::Map::new(bytes).map(Self)
    }

    /// The address of the first byte that is used, the first of a [`PAGE`].
    pub fn start(&self) -> usize {
        self.0.pointer().addr().next_multiple_of(PAGE)
    }

    /// Bytes that are used. Something is left at the end, so that what is used of two maps is never adjacent.
    pub fn bytes(&self) -> usize {
        let end = self.0.pointer().addr() + self.0.len();
        (end - 1) / PAGE * PAGE - self.start()
    }

    /// Bytes that a map must have for one block of this size.
    pub fn needed(block: usize) -> Option<usize> {
        block.checked_add(3 * PAGE)
    }

    /// A pointer to the byte at an address inside of the map.
    pub fn at(&self, address: usize) -> Option<NonNull<u8>> {
        let start = self.0.pointer();
        let offset = address.checked_sub(start.addr()).filter(|&offset| offset < self.0.len())?;
        NonNull::new(start.wrapping_add(offset))
    }

    /// Gives the whole pages between two addresses inside of the map back to the system, as far as it takes them.
    ///
    /// # Safety
    ///
    /// Nobody uses this memory. Its content is unspecified afterwards.
    pub unsafe fn discard(&self, start: usize, end: usize) {
        let (from, to) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
        if from < to {
            // SAFETY: the caller's promise.
            unsafe { self.0.discard(from - self.0.pointer().addr(), to - from) };
        }
    }
}

#[cfg(all(any(unix, windows), not(miri)))]
mod imp {
    use memmap2::{MmapMut, MmapRaw};

    pub struct Map(MmapRaw);

    impl Map {
        pub fn new(bytes: usize) -> Option<Self> {
            let map = MmapRaw::from(MmapMut::map_anon(bytes).ok()?);
            // A wish that the system may decline.
            #[cfg(target_os = "linux")]
            map.advise(memmap2::Advice::HugePage).ok();
            Some(Self(map))
        }

        pub fn pointer(&self) -> *mut u8 {
            self.0.as_mut_ptr()
        }

        pub fn len(&self) -> usize {
            self.0.len()
        }

        /// # Safety
        ///
        /// Nobody uses this part of the map.
        pub unsafe fn discard(&self, _offset: usize, _bytes: usize) {
            // SAFETY: nobody uses it, and pages of an anonymous map come back as zeros. What the system refuses stays.
            #[cfg(unix)]
            unsafe { self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, _offset, _bytes) }.ok();
        }
    }
}

#[cfg(not(all(any(unix, windows), not(miri))))]
mod imp {
    use std::alloc::{Layout, alloc_zeroed, dealloc};

    pub struct Map {
        pointer: *mut u8,
        layout: Layout,
    }

    // SAFETY: a map owns its memory, like a `Vec<u8>`.
    unsafe impl Send for Map {}
    // SAFETY: through a shared map nothing but its address is reached.
    unsafe impl Sync for Map {}

    impl Map {
        pub fn new(bytes: usize) -> Option<Self> {
            let layout = Layout::from_size_align(bytes, 4096).ok().filter(|layout| layout.size() > 0)?;
            // SAFETY: the size is not 0.
            let pointer = unsafe { alloc_zeroed(layout) };
            (!pointer.is_null()).then_some(Self { pointer, layout })
        }

        pub fn pointer(&self) -> *mut u8 {
            self.pointer
        }

        pub fn len(&self) -> usize {
            self.layout.size()
        }

        /// # Safety
        ///
        /// Nobody uses this part of the map.
        pub unsafe fn discard(&self, _offset: usize, _bytes: usize) {}
    }

    impl Drop for Map {
        fn drop(&mut self) {
            // SAFETY: allocated with this layout.
            unsafe { dealloc(self.pointer, self.layout) }
        }
    }
}
