//! A caching pool of memory blocks in size classes, which avoids returning memory to the driver, and waiting for it,
//! after each op. While a graph is recorded, the pool keeps its blocks separate; afterwards the graph holds every block
//! that its recorded work reads or writes, and a block returns to the pool when no tensor and no graph holds it.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, Weak},
};

use crate::device::MemoryStats;

/// A block of device memory.
pub(in crate::device) trait Memory {
    /// Address of its first byte.
    fn address(&self) -> u64;
    /// Its size class.
    fn bytes(&self) -> usize;
    /// Frees a block that has left the pool. Called without holding the pool's lock.
    fn free(block: Arc<Self>);
}

/// The blocks of one device.
///
/// Every handle of a block is cloned and dropped under this lock, so that the reference count tells who holds it: one
/// handle in a list of free blocks or in a tensor, and one in each graph that uses the block.
pub(in crate::device) struct Pool<M>(Mutex<State<M>>);

struct State<M> {
    /// Free blocks, cached for reuse.
    free: FreeBlocks<M>,
    /// All existing blocks, by address.
    all: BTreeMap<u64, Weak<M>>,
    recording: Option<Recording<M>>,
    limit: usize,
    stats: MemoryStats,
}

/// Free blocks by size class, in descending order of address; the last one is used next. The addresses of a step's
/// tensors then depend only on the step, not on the order in which the previous step freed its tensors, and tables of
/// addresses stay unchanged.
type FreeBlocks<M> = BTreeMap<usize, Vec<Arc<M>>>;

/// Memory of the graph that is being recorded.
struct Recording<M> {
    /// Blocks freed by its tensors, for reuse by its later tensors.
    free: FreeBlocks<M>,
    /// Blocks taken for the recording, which return to the list above.
    own: HashSet<u64>,
    /// Blocks that recorded work uses.
    used: BTreeMap<u64, Arc<M>>,
    source: Source,
}

/// Source of blocks for the recording thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::device) enum Source {
    /// Blocks freed by its tensors; if there are none, fresh ones.
    Freed,
    /// Blocks that none of its tensors has used; they belong to the recording from now on.
    Fresh,
    /// Blocks that none of its tensors has used or will use.
    Aside,
}

/// Context of a memory request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::device) enum Phase {
    /// This thread records no graph.
    Eager,
    /// This thread runs the function that it will record.
    Warm,
    /// This thread's work is being recorded.
    Capture,
}

/// Size class of blocks: eight per power of two, at least 64 bytes, so that at most 12.5 % of a block is unused.
pub(super) fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(64);
    let step = (1usize << (usize::BITS - 1 - bytes.leading_zeros())) / 8;
    bytes.div_ceil(step).saturating_mul(step)
}

fn put<M: Memory>(free: &mut FreeBlocks<M>, block: Arc<M>) {
    let blocks = free.entry(block.bytes()).or_default();
    let at = blocks.partition_point(|other| other.address() > block.address());
    blocks.insert(at, block);
}

fn pop<M>(free: &mut FreeBlocks<M>, class: usize) -> Option<Arc<M>> {
    free.get_mut(&class)?.pop()
}

impl<M> Recording<M> {
    /// Returns `true` if requests in this phase are served from the recording's own blocks.
    fn serves(&self, phase: Phase) -> bool {
        phase != Phase::Eager && self.source != Source::Aside
    }
}

impl<M: Memory> State<M> {
    fn grow(&mut self, bytes: usize) {
        self.stats.live += bytes;
        self.stats.peak = self.stats.peak.max(self.stats.live);
    }

    /// Caches an unused block, or returns it to be freed if the cache is full.
    fn keep(&mut self, block: Arc<M>) -> Option<Arc<M>> {
        if self.stats.cached + block.bytes() <= self.limit {
            self.stats.cached += block.bytes();
            put(&mut self.free, block);
            return None;
        }
        self.all.remove(&block.address());
        Some(block)
    }

    /// Implements [`Pool::give`]; returns the block if the caller must free it.
    fn give(&mut self, block: Arc<M>) -> Option<Arc<M>> {
        if let Some(recording) = self.recording.as_mut().filter(|recording| recording.own.contains(&block.address())) {
            self.stats.live -= block.bytes();
            self.stats.cached += block.bytes();
            put(&mut recording.free, block);
            return None;
        }
        if Arc::strong_count(&block) > 1 {
            // The remaining holder will return it.
            return None;
        }
        self.stats.live -= block.bytes();
        self.keep(block)
    }

    /// Moves the remaining blocks of a recording to the common ones; returns those that the caller must free.
    fn merge(&mut self, free: FreeBlocks<M>) -> Vec<Arc<M>> {
        let mut surplus = Vec::new();
        for block in free.into_values().flatten() {
            self.stats.cached -= block.bytes();
            if Arc::strong_count(&block) > 1 {
                // Held by a graph from now on.
                self.grow(block.bytes());
            } else {
                surplus.extend(self.keep(block));
            }
        }
        surplus
    }
}

impl<M: Memory> Pool<M> {
    pub fn new(limit: usize) -> Self {
        Self(Mutex::new(State {
            free: FreeBlocks::new(),
            all: BTreeMap::new(),
            recording: None,
            limit,
            stats: MemoryStats::default(),
        }))
    }

    /// Takes a free block of this class, if there is one.
    pub fn take(&self, class: usize, phase: Phase) -> Option<Arc<M>> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let recording = state.recording.as_mut().filter(|recording| recording.serves(phase));
        let block = match recording {
            None => pop(&mut state.free, class)?,
            Some(Recording { free, used, .. }) if phase == Phase::Capture => {
                let block = pop(free, class)?;
                used.insert(block.address(), block.clone());
                block
            }
            Some(Recording { free, own, source, .. }) => {
                let freed = if *source == Source::Freed { pop(free, class) } else { None };
                let block = freed.or_else(|| pop(&mut state.free, class))?;
                own.insert(block.address());
                block
            }
        };
        state.stats.cached -= class;
        state.grow(class);
        Some(block)
    }

    /// Registers a new block as used.
    pub fn insert(&self, block: &Arc<M>, phase: Phase) {
        let mut state = self.lock();
        state.all.insert(block.address(), Arc::downgrade(block));
        if let Some(recording) = state.recording.as_mut().filter(|recording| recording.serves(phase)) {
            recording.own.insert(block.address());
        }
        state.grow(block.bytes());
    }

    /// Takes back the block of a tensor or of a graph, and caches it for reuse unless it has another holder or the
    /// cache is full.
    pub fn give(&self, block: Arc<M>) {
        let surplus = self.lock().give(block);
        if let Some(block) = surplus {
            M::free(block);
        }
    }

    /// Frees all cached blocks, except those that a recording will need.
    pub fn trim(&self) {
        let mut state = self.lock();
        let blocks: Vec<_> = std::mem::take(&mut state.free).into_values().flatten().collect();
        for block in &blocks {
            state.stats.cached -= block.bytes();
            state.all.remove(&block.address());
        }
        drop(state);
        blocks.into_iter().for_each(M::free);
    }

    pub fn set_limit(&self, bytes: usize) {
        self.lock().limit = bytes;
        if self.stats().cached > bytes {
            self.trim();
        }
    }

    /// Returns `true` if the limit is 0.
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

    /// Begins a recording, which ends with [`Pool::finish`] or [`Pool::abandon`].
    pub fn record(&self) {
        self.lock().recording = Some(Recording {
            free: FreeBlocks::new(),
            own: HashSet::new(),
            used: BTreeMap::new(),
            source: Source::Freed,
        });
    }

    /// Sets the source of blocks for the recording thread.
    pub fn set_source(&self, source: Source) {
        if let Some(recording) = &mut self.lock().recording {
            recording.source = source;
        }
    }

    /// Returns the size classes of the recording's blocks that tensors still hold.
    pub fn escaped(&self) -> Vec<usize> {
        let state = self.lock();
        let Some(Recording { free, own, .. }) = &state.recording else { return Vec::new() };
        let free: HashSet<u64> = free.values().flatten().map(|block| block.address()).collect();
        let escaped = own.difference(&free).filter_map(|address| state.all.get(address)?.upgrade());
        escaped.map(|block| block.bytes()).collect()
    }

    /// Adds the block at this address to those that recorded work uses. Returns `false` if there is no such block.
    pub fn hold(&self, address: u64) -> bool {
        let mut guard = self.lock();
        let state = &mut *guard;
        let below = state.all.range(..=address).next_back();
        let block = below
            .and_then(|(_, block)| block.upgrade())
            .filter(|block| address - block.address() < block.bytes() as u64);
        match (block, &mut state.recording) {
            (Some(block), Some(recording)) => {
                recording.used.insert(block.address(), block);
                true
            }
            _ => false,
        }
    }

    /// Ends a recording. The blocks that its work uses belong to the graph, which returns them when it is dropped.
    pub fn finish(&self) -> Vec<Arc<M>> {
        let mut state = self.lock();
        let Some(Recording { free, used, .. }) = state.recording.take() else { return Vec::new() };
        let surplus = state.merge(free);
        drop(state);
        surplus.into_iter().for_each(M::free);
        used.into_values().collect()
    }

    /// Ends a failed recording. Its blocks are cached for reuse like any others.
    pub fn abandon(&self) {
        let mut state = self.lock();
        let Some(Recording { free, used, .. }) = state.recording.take() else { return };
        let mut surplus: Vec<_> = used.into_values().filter_map(|block| state.give(block)).collect();
        surplus.extend(state.merge(free));
        drop(state);
        surplus.into_iter().for_each(M::free);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State<M>> {
        // No code panics while it changes the state, so the state is valid even if the lock is poisoned.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, sync::Arc};

    use super::{Memory, Phase, Pool, Source, size_class};

    thread_local! {
        static FREED: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    }

    #[derive(Debug)]
    struct Block(u64);

    impl Memory for Block {
        fn address(&self) -> u64 {
            self.0
        }

        fn bytes(&self) -> usize {
            64
        }

        fn free(block: Arc<Self>) {
            assert_eq!(Arc::strong_count(&block), 1, "block {} is freed while somebody has it", block.0);
            FREED.with_borrow_mut(|freed| freed.push(block.0));
        }
    }

    fn freed() -> Vec<u64> {
        FREED.take()
    }

    fn take(pool: &Pool<Block>, phase: Phase) -> Arc<Block> {
        pool.take(64, phase).expect("a free block")
    }

    fn make(pool: &Pool<Block>, address: u64, phase: Phase) -> Arc<Block> {
        let block = Arc::new(Block(address));
        pool.insert(&block, phase);
        block
    }

    #[test]
    fn pool_size_classes_waste_little() {
        for bytes in (1..5000).chain([1 << 20, (1 << 20) + 1, 123_456_789]) {
            let class = size_class(bytes);
            assert!(class >= bytes && class <= (bytes + bytes / 8 + 8).max(64), "{bytes} -> {class}");
            assert_eq!(size_class(class), class);
        }
    }

    #[test]
    fn pool_reuses_blocks_in_order_of_address() {
        let pool = Pool::new(2 * 64);
        let blocks = [300, 100, 200].map(|address| make(&pool, address, Phase::Eager));
        blocks.into_iter().for_each(|block| pool.give(block));
        assert_eq!(freed(), [200], "the cache was full");
        assert_eq!([take(&pool, Phase::Eager).0, take(&pool, Phase::Eager).0], [100, 300]);
        assert!(pool.take(64, Phase::Eager).is_none());
        assert_eq!((pool.stats().live, pool.stats().cached), (2 * 64, 0));
    }

    /// A block that a graph uses is not reused before the graph is dropped, no matter who frees its tensor and when.
    #[test]
    fn pool_leaves_a_block_with_its_graph() {
        for limit in [0, usize::MAX] {
            let pool = Pool::new(limit);
            let weight = make(&pool, 1000, Phase::Eager);
            pool.record();
            let [temporary, escaped, unused] = [2000, 3000, 4000].map(|address| make(&pool, address, Phase::Warm));
            for block in [temporary, escaped, unused] {
                pool.give(block);
            }
            assert!(pool.take(64, Phase::Eager).is_none(), "other threads do not get what the recording needs");
            assert_eq!(pool.escaped(), [0; 0]);
            let (temporary, escaped) = (take(&pool, Phase::Capture), take(&pool, Phase::Capture));
            assert_eq!(pool.escaped(), [64; 2]);
            assert!(pool.hold(1010) && !pool.hold(1064) && !pool.hold(999) && !pool.hold(0));
            // A tensor moved into the closure is dropped after the recording, a temporary one during it.
            pool.give(weight);
            pool.give(temporary);
            let again = take(&pool, Phase::Capture);
            assert_eq!(again.0, 2000, "later tensors of the recording take the place of earlier ones");
            pool.give(again);
            let mut graph = pool.finish();
            assert_eq!(graph.iter().map(|block| block.0).collect::<Vec<_>>(), [1000, 2000, 3000]);
            assert_eq!(freed(), if limit == 0 { vec![4000] } else { vec![] });
            pool.give(escaped);
            pool.trim();
            freed();
            assert!(pool.take(64, Phase::Eager).is_none(), "the graph has them all");
            assert_eq!(pool.stats().live, 3 * 64);
            graph.drain(..).for_each(|block| pool.give(block));
            assert_eq!(pool.stats().live, 0);
            assert_eq!(pool.stats().cached, if limit == 0 { 0 } else { 3 * 64 });
            assert_eq!(freed(), if limit == 0 { vec![1000, 2000, 3000] } else { vec![] });
        }
    }

    /// Two graphs share a block; a failed recording restores the previous state.
    #[test]
    fn pool_counts_the_graphs_of_a_block() {
        let pool = Pool::new(usize::MAX);
        let weight = make(&pool, 1000, Phase::Eager);
        let graphs = [(); 2].map(|()| {
            pool.record();
            assert!(pool.hold(1000));
            pool.finish()
        });
        pool.record();
        let block = make(&pool, 2000, Phase::Warm);
        pool.set_source(Source::Aside);
        let table = make(&pool, 3000, Phase::Warm);
        pool.set_source(Source::Freed);
        pool.give(block);
        let block = take(&pool, Phase::Capture);
        assert!(pool.hold(1000));
        pool.give(weight);
        pool.give(block);
        pool.abandon();
        pool.give(table);
        assert_eq!((pool.stats().live, pool.stats().cached), (64, 2 * 64), "the graphs have the weight");
        for graph in graphs {
            assert!(!pool.lock().free[&64].iter().any(|block| block.0 == 1000));
            graph.into_iter().for_each(|block| pool.give(block));
        }
        assert_eq!((pool.stats().live, pool.stats().cached), (0, 3 * 64));
        assert_eq!(freed(), [0; 0]);
    }
}
