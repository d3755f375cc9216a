//! The processor's memory for tensors: a few large maps of which blocks are cut, and to which they return.
//!
//! Free neighbours join, so that what one size leaves behind serves every other: a training step finds all of its memory
//! where the one before it has left it, and no page is touched for the first time twice. A first touch costs as much as
//! writing the page, or a fifth of that with pages of 2 MiB, which these maps ask for.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    collections::{BTreeMap, BTreeSet},
    ptr::NonNull,
    sync::{Mutex, MutexGuard},
};

use memmap2::MmapMut;

use crate::{Error, Result};

/// Bytes to which blocks are aligned, and of which their sizes are multiples: a cache line, and the widest vector load.
pub(super) const ALIGNMENT: usize = 64;

/// Blocks below this many bytes are the allocator's: it is faster for them, and they are not worth keeping.
const TINY: usize = 4 << 10;

/// Blocks below this many bytes have maps of their own: many of them live long, and would lie in the way of larger ones.
const SMALL: usize = 1 << 20;

/// Bytes of a map, unless one block needs more. What is not touched costs nothing.
const MAP_OF_SMALL: usize = 16 << 20;
const MAP_OF_LARGE: usize = 1 << 30;

/// Pages that maps are made of, the large ones.
const LARGE_PAGE: usize = 2 << 20;

/// At least the bytes of a page: the end of a map that no block gets, so that the ranges of two maps never join.
const MARGIN: usize = 64 << 10;

/// Bytes of a device's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MemoryStats {
    /// In use by tensors.
    pub live: usize,
    /// Kept for reuse.
    pub cached: usize,
    /// The largest `live` since the start or the last reset.
    pub peak: usize,
}

/// The memory of all tensors on the processor.
pub(super) struct Heap {
    state: Mutex<State>,
}

struct State {
    small: Arena,
    large: Arena,
    /// Bytes that may be kept for reuse.
    limit: usize,
    /// Of these, `cached` is what the arenas say.
    stats: MemoryStats,
}

/// Initialised memory: `bytes` from `pointer` on, to be given back by [`Heap::give`].
pub(super) struct Block {
    pub pointer: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a block owns its memory exclusively, like a `Vec<u8>`.
unsafe impl Send for Block {}
// SAFETY: shared access only reads.
unsafe impl Sync for Block {}

impl Heap {
    /// `limit`: bytes that may be kept for reuse.
    pub fn new(limit: usize) -> Self {
        let (small, large) = (Arena::new(MAP_OF_SMALL), Arena::new(MAP_OF_LARGE));
        Self { state: Mutex::new(State { small, large, limit, stats: MemoryStats::default() }) }
    }

    /// At least so many bytes, of unspecified content. Where the system has no more, what is kept for reuse goes back to
    /// it, and it is asked once more.
    ///
    /// Errors: [`Error::OutOfMemory`].
    pub fn allocate(&self, requested: usize) -> Result<Block> {
        let mut state = self.lock();
        let block = requested.checked_next_multiple_of(ALIGNMENT).and_then(|bytes| {
            state.take(bytes.max(ALIGNMENT)).or_else(|| {
                state.trim();
                state.take(bytes.max(ALIGNMENT))
            })
        });
        block.ok_or_else(|| {
            let MemoryStats { live, cached, .. } = state.stats();
            Error::OutOfMemory { requested, live, cached }
        })
    }

    /// Takes a block back.
    pub fn give(&self, block: Block) {
        let mut state = self.lock();
        let Block { pointer, bytes } = block;
        state.stats.live -= bytes;
        let keep = state.cached() + bytes <= state.limit;
        match state.arena(bytes) {
            Some(arena) => arena.give(pointer.addr().get(), bytes, keep),
            // SAFETY: `take` has it from the allocator, with this layout.
            None => unsafe { dealloc(pointer.as_ptr(), layout(bytes)) },
        }
    }

    /// Gives all that is kept for reuse back to the system.
    pub fn trim(&self) {
        self.lock().trim();
    }

    pub fn set_limit(&self, bytes: usize) {
        let mut state = self.lock();
        state.limit = bytes;
        if state.cached() > bytes {
            state.trim();
        }
    }

    pub fn stats(&self) -> MemoryStats {
        self.lock().stats()
    }

    pub fn reset_peak(&self) {
        let mut state = self.lock();
        state.stats.peak = state.stats.live;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way: a panic elsewhere while it was locked leaves it usable.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Of a block of the allocator's. Its size is a multiple of the alignment and below [`TINY`].
fn layout(bytes: usize) -> Layout {
    // SAFETY: the alignment is a power of two, and the size is far from the largest one.
    unsafe { Layout::from_size_align_unchecked(bytes, ALIGNMENT) }
}

impl State {
    /// The maps for blocks of this size; `None`: the allocator.
    fn arena(&mut self, bytes: usize) -> Option<&mut Arena> {
        match bytes {
            0..TINY => None,
            TINY..SMALL => Some(&mut self.small),
            _ => Some(&mut self.large),
        }
    }

    /// A block of this size, which is a multiple of the alignment, and not 0.
    fn take(&mut self, bytes: usize) -> Option<Block> {
        let pointer = match self.arena(bytes) {
            Some(arena) => arena.take(bytes)?,
            // SAFETY: the size is not 0. Zeroed memory is initialised for every type that tensors hold.
            None => NonNull::new(unsafe { alloc_zeroed(layout(bytes)) })?,
        };
        self.stats.live += bytes;
        self.stats.peak = self.stats.peak.max(self.stats.live);
        Some(Block { pointer, bytes })
    }

    fn trim(&mut self) {
        self.small.trim();
        self.large.trim();
    }

    fn cached(&self) -> usize {
        self.small.kept.bytes + self.large.kept.bytes
    }

    fn stats(&self) -> MemoryStats {
        MemoryStats { cached: self.cached(), ..self.stats }
    }
}

/// Maps and their free ranges.
struct Arena {
    /// By their first address.
    maps: BTreeMap<usize, MmapMut>,
    /// Bytes of a new map.
    map_bytes: usize,
    /// Free ranges whose pages are there.
    kept: Ranges,
    /// Free ranges that were never touched, or given back to the system.
    untouched: Ranges,
}

impl Arena {
    fn new(map_bytes: usize) -> Self {
        Self { maps: BTreeMap::new(), map_bytes, kept: Ranges::default(), untouched: Ranges::default() }
    }

    /// A range of so many bytes: the smallest kept one that is enough, else one with as few new pages as can be.
    fn take(&mut self, bytes: usize) -> Option<NonNull<u8>> {
        let start = self.take_kept(bytes).or_else(|| self.take_untouched(bytes));
        let start = match start {
            Some(start) => start,
            None => {
                self.map(bytes)?;
                self.take_untouched(bytes)?
            }
        };
        let (&first, map) = self.maps.range_mut(..=start).next_back()?;
        // SAFETY: ranges lie inside of the map that begins last before them.
        NonNull::new(unsafe { map.as_mut_ptr().add(start - first) })
    }

    fn take_kept(&mut self, bytes: usize) -> Option<usize> {
        let (start, found) = self.kept.smallest(bytes)?;
        self.kept.remove(start);
        self.kept.insert(start + bytes, found - bytes);
        Some(start)
    }

    /// A kept range that ends where an untouched one begins is taken first, and the rest behind it.
    fn take_untouched(&mut self, bytes: usize) -> Option<usize> {
        let whole = |(start, untouched): (usize, usize)| {
            let kept = self.kept.ending_at(start).map_or(0, |(_, kept)| kept);
            (kept + untouched >= bytes).then_some((kept, start, untouched))
        };
        // The one that needs the fewest new pages, and of those the one at the lowest address.
        let by_kept =
            self.untouched.iter().filter_map(whole).max_by_key(|&(kept, start, _)| (kept, usize::MAX - start));
        let (kept, start, untouched) = by_kept?;
        let first = start - kept;
        if kept > 0 {
            self.kept.remove(first);
        }
        let new = bytes - kept;
        self.untouched.remove(start);
        self.untouched.insert(start + new, untouched - new);
        Some(first)
    }

    /// Adds a map in which a block of this size fits.
    fn map(&mut self, bytes: usize) -> Option<()> {
        let needed = bytes.checked_add(MARGIN)?.checked_next_multiple_of(LARGE_PAGE)?;
        // A system that grants no more than it has may refuse the usual size.
        let map = MmapMut::map_anon(needed.max(self.map_bytes)).or_else(|_| MmapMut::map_anon(needed));
        let mut map = map.ok()?;
        // A wish that the system may decline.
        #[cfg(target_os = "linux")]
        map.advise(memmap2::Advice::HugePage).ok();
        let (start, len) = (map.as_mut_ptr().addr(), map.len() - MARGIN);
        self.maps.insert(start, map);
        self.untouched.insert(start, len);
        Some(())
    }

    /// Takes a range back; unless it is kept, its pages go back to the system.
    fn give(&mut self, start: usize, bytes: usize, keep: bool) {
        if keep {
            self.kept.insert(start, bytes);
        } else {
            self.discard(start, bytes);
        }
    }

    /// Gives the pages of a free range back to the system.
    fn discard(&mut self, start: usize, bytes: usize) {
        #[cfg(unix)]
        if let Some((&first, map)) = self.maps.range(..=start).next_back() {
            // Whole pages of any system.
            let (from, to) = (start.next_multiple_of(MARGIN), (start + bytes) / MARGIN * MARGIN);
            if from < to {
                // SAFETY: no block lies in a free range, and pages of an anonymous map come back as zeros. What the
                // system refuses stays as it is.
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from - first, to - from) }.ok();
            }
        }
        self.untouched.insert(start, bytes);
    }

    fn trim(&mut self) {
        for (start, bytes) in std::mem::take(&mut self.kept).iter() {
            self.discard(start, bytes);
        }
        // Maps without a block go.
        let Self { maps, untouched, .. } = self;
        maps.retain(|&start, map| {
            let used = untouched.starting_at(start) != Some(map.len() - MARGIN);
            if !used {
                untouched.remove(start);
            }
            used
        });
    }
}

/// Ranges of addresses that do not touch each other.
#[derive(Default)]
struct Ranges {
    by_start: BTreeMap<usize, usize>,
    /// Sizes and starts.
    by_size: BTreeSet<(usize, usize)>,
    /// Of all ranges together.
    bytes: usize,
}

impl Ranges {
    /// Adds a range, joined with those that it touches.
    fn insert(&mut self, mut start: usize, mut bytes: usize) {
        if bytes == 0 {
            return;
        }
        if let Some((before, len)) = self.ending_at(start) {
            self.remove(before);
            (start, bytes) = (before, len + bytes);
        }
        if let Some(len) = self.starting_at(start + bytes) {
            self.remove(start + bytes);
            bytes += len;
        }
        self.by_start.insert(start, bytes);
        self.by_size.insert((bytes, start));
        self.bytes += bytes;
    }

    fn remove(&mut self, start: usize) {
        if let Some(bytes) = self.by_start.remove(&start) {
            self.by_size.remove(&(bytes, start));
            self.bytes -= bytes;
        }
    }

    /// The smallest range of at least so many bytes; of equal ones that at the lowest address.
    fn smallest(&self, bytes: usize) -> Option<(usize, usize)> {
        self.by_size.range((bytes, 0)..).next().map(|&(len, start)| (start, len))
    }

    fn starting_at(&self, start: usize) -> Option<usize> {
        self.by_start.get(&start).copied()
    }

    fn ending_at(&self, end: usize) -> Option<(usize, usize)> {
        let (&start, &len) = self.by_start.range(..end).next_back()?;
        (start + len == end).then_some((start, len))
    }

    fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.by_start.iter().map(|(&start, &len)| (start, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heap_ranges_join_with_their_neighbours() {
        let mut ranges = Ranges::default();
        for (start, bytes) in [(100, 50), (200, 50), (300, 10), (0, 0)] {
            ranges.insert(start, bytes);
        }
        assert_eq!(ranges.smallest(11), Some((100, 50)));
        ranges.insert(150, 50);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(100, 150), (300, 10)]);
        ranges.insert(250, 50);
        assert_eq!(ranges.iter().collect::<Vec<_>>(), [(100, 210)]);
        assert_eq!((ranges.bytes, ranges.smallest(211)), (210, None));
        ranges.remove(100);
        assert_eq!((ranges.bytes, ranges.by_size.len()), (0, 0));
    }

    /// Blocks of all sizes never overlap, and the memory of them all is one range again at the end.
    #[test]
    fn heap_blocks_never_overlap() -> Result<()> {
        for limit in [0, 10 << 20, usize::MAX] {
            let heap = Heap::new(limit);
            let mut held: Vec<(Block, u8)> = Vec::new();
            let mut state = 1u64;
            for round in 0..2000u32 {
                // A linear congruential generator.
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let bytes = (state >> 40) as usize % (3usize << ((state >> 33) % 21));
                let (block, mark) = (heap.allocate(bytes)?, round as u8);
                assert!(block.bytes >= bytes && block.pointer.addr().get().is_multiple_of(ALIGNMENT));
                // SAFETY: this test owns the block.
                unsafe { block.pointer.write_bytes(mark, block.bytes) };
                held.push((block, mark));
                if held.len() > 24 {
                    let (block, mark) = held.swap_remove((state >> 50) as usize % 24);
                    // SAFETY: as above; the bytes were written.
                    let bytes = unsafe { std::slice::from_raw_parts(block.pointer.as_ptr(), block.bytes) };
                    assert!(bytes.iter().all(|&byte| byte == mark));
                    heap.give(block);
                }
                assert!(heap.stats().cached <= limit);
                if round % 500 == 0 {
                    heap.trim();
                    assert_eq!(heap.stats().cached, 0);
                }
            }
            held.into_iter().for_each(|(block, _)| heap.give(block));
            assert_eq!(heap.stats().live, 0);
            {
                let state = heap.lock();
                for arena in [&state.small, &state.large] {
                    let free = arena.kept.bytes + arena.untouched.bytes;
                    let mapped: usize = arena.maps.values().map(|map| map.len() - MARGIN).sum();
                    assert_eq!(free, mapped);
                }
            }
            heap.trim();
            let state = heap.lock();
            assert!(state.small.maps.is_empty() && state.large.maps.is_empty());
        }
        Ok(())
    }

    /// What smaller blocks leave serves a larger one, which takes as few new pages as can be.
    #[test]
    fn heap_sizes_share_their_memory() -> Result<()> {
        let heap = Heap::new(usize::MAX);
        let blocks = (0..64).map(|_| heap.allocate(1 << 20)).collect::<Result<Vec<_>>>()?;
        blocks.into_iter().for_each(|block| heap.give(block));
        assert_eq!(heap.stats().cached, 64 << 20);
        let half = heap.allocate(32 << 20)?;
        assert_eq!(heap.stats().cached, 32 << 20);
        // The last 32 MiB are in front of memory that was never used.
        let more = heap.allocate(40 << 20)?;
        assert_eq!((heap.stats().cached, heap.stats().live), (0, 72 << 20));
        heap.give(half);
        heap.give(more);
        assert_eq!(heap.stats().cached, 72 << 20);
        Ok(())
    }

    #[test]
    fn heap_refuses_what_no_machine_has() {
        let heap = Heap::new(1 << 20);
        for bytes in [1 << 55, usize::MAX, usize::MAX - 63] {
            assert!(matches!(heap.allocate(bytes), Err(Error::OutOfMemory { .. })), "{bytes}");
        }
        assert_eq!(heap.stats(), MemoryStats::default());
    }
}
