//! A caching pool of memory blocks in size classes, so that training does not return memory to the system after
//! each op and pay for its pages again.

use std::{collections::BTreeMap, sync::Mutex};

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

/// A block of memory that gives itself back to the system when dropped.
pub(super) type Block = super::cpu::Block;

/// Free blocks by size class.
pub(super) struct Pool {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: BTreeMap<usize, Vec<Block>>,
    limit: usize,
    stats: MemoryStats,
    /// The largest `live` since the last [`Pool::trim`].
    most: usize,
}

impl State {
    fn grow(&mut self, bytes: usize) {
        self.stats.live += bytes;
        self.stats.peak = self.stats.peak.max(self.stats.live);
        self.most = self.most.max(self.stats.live);
    }

    /// Takes out a free block of this class.
    fn pop(&mut self, class: usize) -> Option<Block> {
        let block = self.free.get_mut(&class)?.pop()?;
        self.stats.cached -= class;
        Some(block)
    }
}

/// Bytes that blocks in use and free ones together may have beyond the largest use: free blocks of sizes that are not
/// asked for now, such as those of gradients while activations are made.
const SLACK: usize = 64 << 20;

impl Pool {
    pub fn new(limit: usize) -> Self {
        Self { state: Mutex::new(State { limit, ..State::default() }) }
    }

    /// A size that blocks are made in: eight steps per power of two, at least 64 bytes; at most 12.5 % is unused.
    pub fn size_class(bytes: usize) -> usize {
        let bytes = bytes.max(64);
        let step = (1usize << (usize::BITS - 1 - bytes.leading_zeros())) / 8;
        bytes.div_ceil(step).saturating_mul(step)
    }

    /// A free block of this class, if there is one; it counts as live from now on.
    pub fn take(&self, class: usize) -> Option<Block> {
        let mut state = self.lock();
        let block = state.pop(class)?;
        state.grow(class);
        Some(block)
    }

    /// Gives free blocks back to the system, if all blocks together would outgrow the largest use by more than
    /// [`SLACK`] with a new one of this class. Otherwise steps of other sizes would leave theirs behind.
    pub fn make_room(&self, class: usize) {
        let mut state = self.lock();
        let mut dropped = Vec::new();
        loop {
            let used = state.stats.live + class;
            let excess = (used + state.stats.cached).saturating_sub(used.max(state.most) + SLACK);
            let mut sizes = state.free.iter().filter(|(_, blocks)| !blocks.is_empty()).map(|(&size, _)| size);
            // The smallest one that is enough, else the largest.
            let size = sizes.clone().find(|&size| size >= excess).or_else(|| sizes.next_back());
            let Some(block) = size.filter(|_| excess > 0).and_then(|size| state.pop(size)) else { break };
            dropped.push(block);
        }
        drop(state);
    }

    /// Counts a block that was made as live.
    pub fn made(&self, class: usize) {
        self.lock().grow(class);
    }

    /// Keeps a block for reuse, or drops it when the cache is full.
    pub fn give(&self, class: usize, block: Block) {
        let mut state = self.lock();
        state.stats.live -= class;
        if state.stats.cached + class <= state.limit {
            state.stats.cached += class;
            state.free.entry(class).or_default().push(block);
        }
    }

    pub fn trim(&self) {
        let mut state = self.lock();
        state.stats.cached = 0;
        state.most = state.stats.live;
        let blocks = std::mem::take(&mut state.free);
        drop(state);
        drop(blocks);
    }

    pub fn set_limit(&self, bytes: usize) {
        self.lock().limit = bytes;
        if self.stats().cached > bytes {
            self.trim();
        }
    }

    pub fn stats(&self) -> MemoryStats {
        self.lock().stats
    }

    pub fn reset_peak(&self) {
        let mut state = self.lock();
        state.stats.peak = state.stats.live;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // The counters are plain numbers: a panic elsewhere while they were locked leaves them usable.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use super::Pool;

    #[test]
    fn pool_size_classes_waste_little() {
        for bytes in (1..5000).chain([1 << 20, (1 << 20) + 1, 123_456_789]) {
            let class = Pool::size_class(bytes);
            assert!(class >= bytes && class <= (bytes + bytes / 8 + 8).max(64), "{bytes} -> {class}");
            assert_eq!(Pool::size_class(class), class);
        }
    }
}
