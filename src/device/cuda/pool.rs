//! A caching pool of memory blocks in size classes, so that training does not return memory to the system after
//! each op and pay for its pages again.

use std::{collections::BTreeMap, sync::Mutex};

use crate::{Error, Result, device::MemoryStats};

/// What a pool keeps. It gives itself back to the system when dropped.
pub(in crate::device) trait Reusable {
    /// Of two free blocks of one size, whether this one is to be used before one that became free earlier.
    fn goes_before(&self, earlier: &Self) -> bool;
}

/// Free blocks of one device by size class.
pub(in crate::device) struct Pool<Block> {
    state: Mutex<State<Block>>,
}

struct State<Block> {
    free: FreeBlocks<Block>,
    limit: usize,
    /// Whether blocks are kept whatever the limit.
    keep_all: bool,
    stats: MemoryStats,
}

/// The block to be used next is the last one.
pub(super) type FreeBlocks<Block> = BTreeMap<usize, Vec<Block>>;

/// A size that blocks are made in: eight steps per power of two, at least 64 bytes; at most 12.5 % is unused.
pub(super) fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(64);
    let step = (1usize << (usize::BITS - 1 - bytes.leading_zeros())) / 8;
    bytes.div_ceil(step).saturating_mul(step)
}

impl<Block> State<Block> {
    fn grow(&mut self, bytes: usize) {
        self.stats.live += bytes;
        self.stats.peak = self.stats.peak.max(self.stats.live);
    }

    /// Takes out a free block of this class.
    fn pop(&mut self, class: usize) -> Option<Block> {
        let block = self.free.get_mut(&class)?.pop()?;
        self.stats.cached -= class;
        Some(block)
    }
}

impl<Block: Reusable> Pool<Block> {
    pub fn new(limit: usize) -> Self {
        let state = State { free: FreeBlocks::new(), limit, keep_all: false, stats: MemoryStats::default() };
        Self { state: Mutex::new(state) }
    }

    /// A block of this class: a free one, or a new one from `make`. If that fails, what is kept for reuse goes back to
    /// the system and `make` is called once more.
    ///
    /// Errors: [`Error::OutOfMemory`].
    pub fn allocate(&self, class: usize, requested: usize, make: impl Fn() -> Option<Block>) -> Result<Block> {
        if let Some(block) = self.take(class) {
            return Ok(block);
        }
        // Counted once it exists: a request that fails must not leave its size in the peak.
        let make = || make().inspect(|_| self.made(class));
        make().map_or_else(
            || {
                let MemoryStats { live, cached, .. } = self.stats();
                self.trim();
                make().ok_or(Error::OutOfMemory { requested, live, cached })
            },
            Ok,
        )
    }

    /// A free block of this class, if there is one; it counts as live from now on.
    pub fn take(&self, class: usize) -> Option<Block> {
        let mut state = self.lock();
        let block = state.pop(class)?;
        state.grow(class);
        Some(block)
    }

    /// Counts a block that was made as live.
    fn made(&self, class: usize) {
        self.lock().grow(class);
    }

    /// Keeps a block for reuse, or drops it when the cache is full.
    pub fn give(&self, class: usize, block: Block) {
        let mut state = self.lock();
        state.stats.live -= class;
        if state.keep_all || state.stats.cached + class <= state.limit {
            state.stats.cached += class;
            let blocks = state.free.entry(class).or_default();
            let at = blocks.iter().rposition(|earlier| block.goes_before(earlier)).map_or(0, |last| last + 1);
            blocks.insert(at, block);
        }
    }

    pub fn trim(&self) {
        let mut state = self.lock();
        state.stats.cached = 0;
        let blocks = std::mem::take(&mut state.free);
        drop(state);
        drop(blocks);
    }

    /// Puts other blocks in the place of those that are kept for reuse. `keep_all`: from now on all are kept, whatever the
    /// limit.
    pub fn exchange(&self, blocks: &mut FreeBlocks<Block>, keep_all: bool) {
        let mut state = self.lock();
        state.keep_all = keep_all;
        std::mem::swap(&mut state.free, blocks);
        state.stats.cached = state.free.iter().map(|(class, blocks)| class * blocks.len()).sum();
    }

    pub fn set_limit(&self, bytes: usize) {
        self.lock().limit = bytes;
        if self.stats().cached > bytes {
            self.trim();
        }
    }

    /// Whether the limit is 0.
    pub fn keeps_nothing(&self) -> bool {
        self.lock().limit == 0
    }

    pub fn stats(&self) -> MemoryStats {
        self.lock().stats
    }

    pub fn reset_peak(&self) {
        let mut state = self.lock();
        state.stats.peak = state.stats.live;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State<Block>> {
        // The counters are plain numbers: a panic elsewhere while they were locked leaves them usable.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::size_class;

    #[test]
    fn pool_size_classes_waste_little() {
        for bytes in (1..5000).chain([1 << 20, (1 << 20) + 1, 123_456_789]) {
            let class = size_class(bytes);
            assert!(class >= bytes && class <= (bytes + bytes / 8 + 8).max(64), "{bytes} -> {class}");
            assert_eq!(size_class(class), class);
        }
    }
}
