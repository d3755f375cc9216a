//! A caching pool of memory blocks in size classes, so that training does not return memory to the driver after each
//! op and wait for it. While a graph is recorded, the pool keeps its blocks apart; afterwards the graph holds every block
//! that its recorded work reads or writes, and a block returns to the pool when neither a tensor nor a graph has it.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Arc, Mutex, Weak},
};

use crate::device::MemoryStats;

/// A block of device memory.
pub(in crate::device) trait Memory {
    /// Its first byte.
    fn address(&self) -> u64;
    /// Its size, which is its size class.
    fn bytes(&self) -> usize;
    /// Frees a block that left the pool. Called without the pool's lock.
    fn free(block: Arc<Self>);
}

/// The blocks of one device.
///
/// Every handle of a block is cloned and dropped under this lock, so that the number of handles says who has it: one
/// in a list of free blocks or in a tensor, and one in each graph that uses the block.
pub(in crate::device) struct Pool<M>(Mutex<State<M>>);

struct State<M> {
    /// Blocks that are kept for reuse.
    free: FreeBlocks<M>,
    /// Every block that exists, by its first byte.
    all: BTreeMap<u64, Weak<M>>,
    recording: Option<Recording<M>>,
    limit: usize,
    stats: MemoryStats,
}

/// Free blocks by size class, in descending order of address: the block to be used next is the last one. Where the
/// tensors of a step are then depends on the step alone, not on the order in which those of the last one were freed,
/// and tables of addresses stay as they are.
type FreeBlocks<M> = BTreeMap<usize, Vec<Arc<M>>>;

/// The memory of a graph that is being recorded.
struct Recording<M> {
    /// Blocks that its tensors have freed, for its later tensors.
    free: FreeBlocks<M>,
    /// Blocks that were taken for it: they return to the list above.
    own: HashSet<u64>,
    /// Blocks that recorded work uses.
    used: BTreeMap<u64, Arc<M>>,
    source: Source,
}

/// Where the thread that records takes its blocks from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::device) enum Source {
    /// Blocks that its tensors have freed, else as below.
    Freed,
    /// Blocks that none of its tensors had yet; they belong to the recording from now on.
    Fresh,
    /// Blocks that none of its tensors had or will have.
    Aside,
}

/// On whose behalf memory is requested.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::device) enum Phase {
    /// No graph is being recorded by this thread.
    Eager,
    /// This thread runs what it will record.
    Warm,
    /// This thread's work is recorded.
    Capture,
}

/// A size that blocks are made in: eight steps per power of two, at least 64 bytes; at most 12.5 % is unused.
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
    /// Returns `true` if who asks in this phase gets the recording's own blocks.
    fn serves(&self, phase: Phase) -> bool {
        phase != Phase::Eager && self.source != Source::Aside
    }
}

impl<M: Memory> State<M> {
    fn grow(&mut self, bytes: usize) {
        self.stats.live += bytes;
        self.stats.peak = self.stats.peak.max(self.stats.live);
    }

    /// Keeps a block that nobody has, or returns it to be freed if the cache is full.
    fn keep(&mut self, block: Arc<M>) -> Option<Arc<M>> {
        if self.stats.cached + block.bytes() <= self.limit {
            self.stats.cached += block.bytes();
            put(&mut self.free, block);
            return None;
        }
        self.all.remove(&block.address());
        Some(block)
    }

    /// Does [`Pool::give`]; returns the block if it is to be freed.
    fn give(&mut self, block: Arc<M>) -> Option<Arc<M>> {
        if let Some(recording) = self.recording.as_mut().filter(|recording| recording.own.contains(&block.address())) {
            self.stats.live -= block.bytes();
            self.stats.cached += block.bytes();
            put(&mut recording.free, block);
            return None;
        }
        if Arc::strong_count(&block) > 1 {
            // Whoever has it still will give it back.
            return None;
        }
        self.stats.live -= block.bytes();
        self.keep(block)
    }

    /// Moves what a recording has left to the common blocks; returns those that are to be freed.
    fn merge(&mut self, free: FreeBlocks<M>) -> Vec<Arc<M>> {
        let mut surplus = Vec::new();
        for block in free.into_values().flatten() {
            self.stats.cached -= block.bytes();
            if Arc::strong_count(&block) > 1 {
                // A graph has it from now on.
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

    /// A free block of this class, if there is one; it is in use from now on.
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

    /// Registers a new block, which is in use from now on.
    pub fn insert(&self, block: &Arc<M>, phase: Phase) {
        let mut state = self.lock();
        state.all.insert(block.address(), Arc::downgrade(block));
        if let Some(recording) = state.recording.as_mut().filter(|recording| recording.serves(phase)) {
            recording.own.insert(block.address());
        }
        state.grow(block.bytes());
    }

    /// Takes back the block of a tensor or of a graph. It is kept for reuse unless somebody else has it or the cache
    /// is full.
    pub fn give(&self, block: Arc<M>) {
        let surplus = self.lock().give(block);
        if let Some(block) = surplus {
            M::free(block);
        }
    }

    /// Frees all blocks that are kept for reuse, but not those that a recording will need.
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

    /// Where the thread that records takes its blocks from, from now on.
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

    /// Adds the block that has this address to those that recorded work uses. `false` if no block has it.
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

    /// Ends a recording. The blocks that its work uses belong to the graph, which gives each back when it is gone.
    pub fn finish(&self) -> Vec<Arc<M>> {
        let mut state = self.lock();
        let Some(Recording { free, used, .. }) = state.recording.take() else { return Vec::new() };
        let surplus = state.merge(free);
        drop(state);
        surplus.into_iter().for_each(M::free);
        used.into_values().collect()
    }

    /// Ends a recording that failed. Its blocks are kept for reuse as any others.
    pub fn abandon(&self) {
        let mut state = self.lock();
        let Some(Recording { free, used, .. }) = state.recording.take() else { return };
        let mut surplus: Vec<_> = used.into_values().filter_map(|block| state.give(block)).collect();
        surplus.extend(state.merge(free));
        drop(state);
        surplus.into_iter().for_each(M::free);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State<M>> {
        // Nothing panics while the state is changed: a poisoned lock leaves it usable.
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

    /// A block that a graph uses is nobody else's until the graph is gone, whoever frees its tensor and when.
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
            // A tensor that was moved into the closure dies with the recording, a temporary one in it.
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

    /// Two graphs use one block; a recording that fails leaves everything as it was.
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
