//! The processor's memory for tensors: a few large maps of which blocks are cut, and to which they return.
//!
//! Adjacent free ranges merge, and memory of one size serves every other: a training step reuses all memory of the one
//! before it, and no page is touched for the first time twice. A first touch costs as much as writing the page, or a
//! fifth of that with pages of 2 MiB, which these maps request.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    ptr::NonNull,
    sync::{Arc, Mutex, MutexGuard},
};

use super::{
    map::{LARGE_PAGE, Map},
    ranges::Ranges,
    scratch::Scratch,
};
use crate::{Error, ErrorKind, Result, collect::CollectVec, ordered::OrderedMap};

/// Bytes to which blocks are aligned, and of which their sizes are multiples: a cache line, and the widest vector load.
pub(super) const ALIGNMENT: usize = 64;

/// Blocks below this many bytes are the allocator's: it is faster for them, and they are not worth keeping. With
/// `--cfg xt_separate_blocks` all are, so that sanitizers see where each of them ends.
const TINY: usize = if cfg!(xt_separate_blocks) { usize::MAX } else { 4 << 10 };

/// Blocks below this many bytes have maps of their own: many of them live long, and would lie in the way of larger
/// ones.
const SMALL: usize = 1 << 20;

/// Bytes of a map, unless one block needs more. What is not touched costs nothing, where the system has maps.
const MAP_OF_SMALL: usize = if UNTOUCHED_IS_FREE { 16 << 20 } else { 1 << 20 };
const MAP_OF_LARGE: usize = if UNTOUCHED_IS_FREE { 1 << 30 } else { 4 << 20 };
const UNTOUCHED_IS_FREE: bool = Map::UNTOUCHED_IS_FREE;

/// Memory statistics of a device, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct MemoryStats {
    /// Bytes in use by tensors.
    pub live: usize,
    /// Bytes kept for reuse by tensors.
    pub cached: usize,
    /// Bytes of working memory that CPU threads keep for matrix products and attention.
    pub scratch: usize,
    /// Largest `live` since the start or the last reset.
    pub peak: usize,
}

/// The memory of all tensors on the processor.
pub(super) struct Heap {
    state: Mutex<State>,
    /// Working memory of threads, which is also kept for reuse.
    scratch: Option<&'static Scratch>,
}

struct State {
    small: Arena,
    large: Arena,
    /// Bytes that may be kept for reuse.
    limit: usize,
    /// Of these, `cached` is what the arenas say, and `scratch` what the threads have.
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

/// The lock is held for bookkeeping alone: calls of the system, which may take long, happen without it, on memory that
/// no list has meanwhile.
impl Heap {
    /// `limit`: bytes that may be kept for reuse, those of `scratch` included.
    pub fn new(limit: usize, scratch: Option<&'static Scratch>) -> Self {
        let (small, large) = (Arena::new(MAP_OF_SMALL), Arena::new(MAP_OF_LARGE));
        let state = State { small, large, limit, stats: MemoryStats::default() };
        if let Some(scratch) = scratch {
            scratch.set_room(limit);
        }
        Self { state: Mutex::new(state), scratch }
    }

    /// Allocates at least this many bytes, of unspecified content. If the system has no more, returns the memory kept
    /// for reuse to it and tries once more.
    ///
    /// Errors: [`ErrorKind::OutOfMemory`].
    pub fn allocate(&self, requested: usize) -> Result<Block> {
        let block = requested.checked_next_multiple_of(ALIGNMENT).and_then(|bytes| {
            let bytes = bytes.max(ALIGNMENT);
            self.take(bytes).or_else(|| {
                self.trim();
                self.take(bytes)
            })
        });
        block.ok_or_else(|| {
            let MemoryStats { live, cached, .. } = self.stats();
            Error::new(ErrorKind::OutOfMemory { requested, live, cached })
        })
    }

    /// A block of this size, which is a multiple of the alignment, and not 0.
    fn take(&self, bytes: usize) -> Option<Block> {
        if bytes < TINY {
            // SAFETY: the size is not 0. Zeroed memory is initialised for every type that tensors hold.
            let pointer = NonNull::new(unsafe { alloc_zeroed(layout(bytes)?) })?;
            self.lock().count(bytes);
            return Some(Block { pointer, bytes });
        }
        let mut state = self.lock();
        let arena = state.arena(bytes);
        let pointer = match arena.take(bytes) {
            Some(pointer) => pointer,
            None => {
                let usual = arena.map_bytes;
                drop(state);
                let map = new_map(bytes, usual)?;
                state = self.lock();
                state.arena(bytes).add(map);
                state.arena(bytes).take(bytes)?
            }
        };
        state.count(bytes);
        self.set_room(&state);
        Some(Block { pointer, bytes })
    }

    /// Takes a block back.
    pub fn give(&self, block: Block) {
        let Block { pointer, bytes } = block;
        let mut state = self.lock();
        state.stats.live -= bytes;
        if bytes < TINY {
            drop(state);
            if let Some(layout) = layout(bytes) {
                // SAFETY: `take` has it from the allocator, with this layout.
                unsafe { dealloc(pointer.as_ptr(), layout) }
            }
            return;
        }
        let start = pointer.addr().get();
        if state.cached() + self.scratch_bytes() + bytes <= state.limit {
            state.arena(bytes).kept.insert(start, bytes);
            self.set_room(&state);
            return;
        }
        state.arena(bytes).untouched.insert(start, bytes);
        let pages = state.arena(bytes).claim(start, start + bytes);
        drop(state);
        if let Some(pages) = pages {
            pages.discard();
            self.lock().arena(bytes).untouched.insert(pages.start, pages.end - pages.start);
        }
    }

    /// Returns all memory kept for reuse to the system.
    pub fn trim(&self) {
        if let Some(scratch) = self.scratch {
            scratch.trim();
        }
        for bytes in [TINY, SMALL] {
            let pages = self.lock().arena(bytes).claim_kept();
            pages.iter().for_each(Pages::discard);
            let mut state = self.lock();
            let arena = state.arena(bytes);
            pages.iter().for_each(|pages| arena.untouched.insert(pages.start, pages.end - pages.start));
            // Maps without a block go.
            let unused = arena.remove_unused();
            self.set_room(&state);
            drop(state);
            drop((pages, unused));
        }
    }

    pub fn set_limit(&self, bytes: usize) {
        let mut state = self.lock();
        state.limit = bytes;
        self.set_room(&state);
        let exceeded = state.cached() + self.scratch_bytes() > bytes;
        drop(state);
        if exceeded {
            self.trim();
        }
    }

    pub fn stats(&self) -> MemoryStats {
        let state = self.lock();
        MemoryStats { cached: state.cached(), scratch: self.scratch_bytes(), ..state.stats }
    }

    pub fn reset_peak(&self) {
        let mut state = self.lock();
        state.stats.peak = state.stats.live;
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch.map_or(0, Scratch::bytes)
    }

    /// Tells threads how much of the limit tensors leave.
    fn set_room(&self, state: &State) {
        if let Some(scratch) = self.scratch {
            scratch.set_room(state.limit.saturating_sub(state.cached()));
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way: a panic elsewhere while it was locked leaves it usable.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Of a block of the allocator's. Its size is a multiple of the alignment and below [`TINY`].
fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes, ALIGNMENT).ok()
}

/// A map in which a block of this size fits, of the usual size if that is enough.
fn new_map(block: usize, usual: usize) -> Option<Map> {
    let needed = Map::needed(block)?.checked_next_multiple_of(LARGE_PAGE)?;
    // A system that grants no more than it has may refuse the usual size.
    Map::new(needed.max(usual)).or_else(|| Map::new(needed))
}

impl State {
    /// The maps for blocks of this size, which is at least [`TINY`].
    fn arena(&mut self, bytes: usize) -> &mut Arena {
        if bytes < SMALL { &mut self.small } else { &mut self.large }
    }

    fn count(&mut self, bytes: usize) {
        self.stats.live += bytes;
        self.stats.peak = self.stats.peak.max(self.stats.live);
    }

    fn cached(&self) -> usize {
        self.small.kept.bytes + self.large.kept.bytes
    }
}

/// Maps and their free ranges.
struct Arena {
    /// By the first address that is used.
    maps: OrderedMap<usize, Arc<Map>>,
    /// Bytes of a new map.
    map_bytes: usize,
    /// Free ranges whose pages are there.
    kept: Ranges,
    /// Free ranges that were never touched, or given back to the system; but of a page that blocks have a part of, the
    /// rest stays there.
    untouched: Ranges,
}

/// A free range whose pages go back to the system; no list has it.
struct Pages {
    map: Arc<Map>,
    start: usize,
    end: usize,
}

impl Pages {
    fn discard(&self) {
        // SAFETY: no block lies in a free range, and nobody can take one here, since no list has it.
        unsafe { self.map.discard(self.start, self.end) };
    }
}

impl Arena {
    fn new(map_bytes: usize) -> Self {
        Self { maps: OrderedMap::default(), map_bytes, kept: Ranges::default(), untouched: Ranges::default() }
    }

    /// Takes a range of this many bytes: the smallest kept one that is large enough, else one with the fewest new
    /// pages.
    fn take(&mut self, bytes: usize) -> Option<NonNull<u8>> {
        let start = self.take_kept(bytes).or_else(|| self.take_untouched(bytes))?;
        self.map_of(start)?.at(start)
    }

    /// The map with this address.
    fn map_of(&self, address: usize) -> Option<&Arc<Map>> {
        self.maps.last_up_to(&address)
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

    fn add(&mut self, map: Map) {
        self.untouched.insert(map.start(), map.bytes());
        self.maps.insert(map.start(), Arc::new(map));
    }

    /// Takes part of an untouched range out of the list, together with all other free bytes of its first and last page,
    /// which may already have memory: bytes returned while the rest of the page was in use.
    fn claim(&mut self, start: usize, end: usize) -> Option<Pages> {
        let (first, bytes) = self.untouched.containing(start)?;
        let behind = first + bytes;
        let (start, end) = (first.max(start / LARGE_PAGE * LARGE_PAGE), behind.min(end.next_multiple_of(LARGE_PAGE)));
        self.untouched.remove(first);
        self.untouched.insert(first, start - first);
        self.untouched.insert(end, behind - end);
        let map = self.map_of(start)?.clone();
        Some(Pages { map, start, end })
    }

    /// Takes all kept ranges out of their list.
    fn claim_kept(&mut self) -> Vec<Pages> {
        let kept = std::mem::take(&mut self.kept);
        kept.iter().for_each(|(start, bytes)| self.untouched.insert(start, bytes));
        let mut done = 0;
        let claim = |(start, bytes): (usize, usize)| {
            // The page before may have reached into this range.
            let (start, end) = (done.max(start), start + bytes);
            let pages = if start < end { self.claim(start, end) } else { None };
            done = pages.as_ref().map_or(done, |pages| pages.end);
            pages
        };
        kept.iter().filter_map(claim).collect_vec()
    }

    /// Takes out maps without a block.
    fn remove_unused(&mut self) -> Vec<Arc<Map>> {
        let Self { maps, untouched, .. } = self;
        let is_unused = |start: &usize, map: &Arc<Map>| untouched.starting_at(*start) == Some(map.bytes());
        let unused: Vec<usize> =
            maps.iter().filter(|(start, map)| is_unused(start, map)).map(|(&at, _)| at).collect_vec();
        unused.iter().for_each(|&start| untouched.remove(start));
        unused.iter().filter_map(|start| maps.remove(start)).collect_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of all sizes never overlap, and the memory of them all is one range again at the end.
    #[test]
    fn heap_blocks_never_overlap() -> Result<()> {
        for limit in [0, 10 << 20, usize::MAX] {
            let heap = Heap::new(limit, None);
            let mut held: Vec<(Block, u8)> = Vec::new();
            let mut state = 1u64;
            for round in 0..if cfg!(miri) { 100 } else { 2000u32 } {
                // A linear congruential generator.
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let largest = if cfg!(miri) { 17 } else { 21 };
                let bytes = (state >> 40) as usize % (3usize << ((state >> 33) % largest));
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
                    let mapped: usize = arena.maps.values().iter().map(|map| map.bytes()).sum();
                    assert_eq!(free, mapped);
                }
            }
            heap.trim();
            let state = heap.lock();
            assert!(state.small.maps.is_empty() && state.large.maps.is_empty());
        }
        Ok(())
    }

    /// Memory freed by smaller blocks serves a larger one, which takes as few new pages as possible.
    #[test]
    fn heap_sizes_share_their_memory() -> Result<()> {
        let heap = Heap::new(usize::MAX, None);
        // All of them in one map.
        let unit = if cfg!(miri) { 4 << 10 } else { 1 << 20 };
        let blocks = (0..64).map(|_| heap.allocate(unit)).collect::<Result<Vec<_>>>()?;
        blocks.into_iter().for_each(|block| heap.give(block));
        assert_eq!(heap.stats().cached, 64 * unit);
        let half = heap.allocate(32 * unit)?;
        assert_eq!(heap.stats().cached, 32 * unit);
        // The last 32 are in front of memory that was never used.
        let more = heap.allocate(40 * unit)?;
        assert_eq!((heap.stats().cached, heap.stats().live), (0, 72 * unit));
        heap.give(half);
        heap.give(more);
        assert_eq!(heap.stats().cached, 72 * unit);
        Ok(())
    }

    /// With nothing kept, the last piece of a page takes the page along, in whatever order they go.
    #[cfg(all(target_os = "linux", not(miri)))]
    #[test]
    fn heap_keeps_no_piece_beyond_its_limit() -> Result<()> {
        use super::super::map::PAGE;
        let heap = Heap::new(0, None);
        let resident = |heap: &Heap| -> usize {
            let state = heap.lock();
            let count = |map: &Arc<Map>| {
                let mut pages = vec![0u8; map.bytes().div_ceil(4096)];
                let start = map.at(map.start()).map_or(std::ptr::null_mut(), NonNull::as_ptr);
                // SAFETY: the range is that of a map, and there is a byte for each of its pages.
                let found = unsafe { libc::mincore(start.cast(), map.bytes(), pages.as_mut_ptr()) };
                assert_eq!(found, 0);
                4096 * pages.iter().filter(|page| *page & 1 == 1).count()
            };
            state.small.maps.values().iter().chain(state.large.maps.values()).map(count).sum()
        };
        for step in [1, 7, 97] {
            let mut blocks = (0..1024).map(|index| heap.allocate(4096 + 64 * index)).collect::<Result<Vec<_>>>()?;
            for block in &blocks {
                // SAFETY: this test owns the block.
                unsafe { block.pointer.write_bytes(1, block.bytes) };
            }
            let used: usize = blocks.iter().map(|block| block.bytes).sum();
            assert!(resident(&heap) >= used);
            // One in sixteen stays: no more than the pages that it has a part of.
            let mut kept = Vec::new();
            for index in 0..1024 {
                let block = blocks.swap_remove(index * step % blocks.len());
                if index % 16 == 0 { kept.push(block) } else { heap.give(block) }
            }
            assert!(resident(&heap) <= kept.iter().map(|block| block.bytes + 2 * PAGE).sum());
            kept.into_iter().for_each(|block| heap.give(block));
            assert_eq!((resident(&heap), heap.stats()), (0, MemoryStats { peak: used, ..Default::default() }));
            heap.reset_peak();
        }
        // What was kept goes as a whole too.
        heap.set_limit(usize::MAX);
        let blocks = (0..300).map(|index| heap.allocate(5000 + 640 * index)).collect::<Result<Vec<_>>>()?;
        // SAFETY: as above.
        blocks.iter().for_each(|block| unsafe { block.pointer.write_bytes(1, block.bytes) });
        let mut held = None;
        for (index, block) in blocks.into_iter().enumerate() {
            if index == 150 { held = Some(block) } else { heap.give(block) }
        }
        heap.trim();
        let held = held.expect("a block");
        assert!(resident(&heap) <= held.bytes + 2 * PAGE);
        heap.give(held);
        Ok(())
    }

    /// Threads that allocate, give back and trim at once never get the same memory.
    #[test]
    fn heap_is_shared_by_threads() {
        let heap = Heap::new(1 << 20, None);
        std::thread::scope(|scope| {
            for mark in 1..=4u8 {
                let heap = &heap;
                scope.spawn(move || {
                    for round in 0..if cfg!(miri) { 8 } else { 400usize } {
                        let sizes = [100, 5000, 70_000, 1 << 20].map(|size| size * (1 + round % 3));
                        let sizes = if cfg!(miri) { &sizes[..2] } else { &sizes[..] };
                        let blocks: Vec<_> = sizes.iter().map(|&size| heap.allocate(size).unwrap()).collect();
                        for block in &blocks {
                            // SAFETY: this thread owns the block.
                            unsafe { block.pointer.write_bytes(mark, block.bytes) };
                        }
                        if round % 16 == usize::from(mark) {
                            heap.trim();
                        }
                        for block in blocks {
                            // SAFETY: as above; the bytes were written.
                            let bytes = unsafe { std::slice::from_raw_parts(block.pointer.as_ptr(), block.bytes) };
                            assert!(bytes.iter().all(|&byte| byte == mark));
                            heap.give(block);
                        }
                    }
                });
            }
        });
        heap.trim();
        assert_eq!((heap.stats().live, heap.stats().cached), (0, 0));
        assert!(heap.lock().small.maps.is_empty() && heap.lock().large.maps.is_empty());
    }

    #[test]
    fn heap_refuses_what_no_machine_has() {
        let heap = Heap::new(1 << 20, None);
        for bytes in [1 << 55, usize::MAX, usize::MAX - 63] {
            assert!(
                matches!(heap.allocate(bytes).map_err(Error::into_kind), Err(ErrorKind::OutOfMemory { .. })),
                "{bytes}"
            );
        }
        assert_eq!(heap.stats(), MemoryStats::default());
    }
}
