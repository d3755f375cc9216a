//! Blocks of layers whose weights are divided among ranks: stage 3 of ZeRO.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::sharded::Shards;
use crate::{
    Error, ParamMap, Result,
    collect::CollectVec,
    distributed::{Bucket, Communicator, Gatherer, Gathering, Homes},
    error::ensure,
    ordered::OrderedMap,
    params::{Block, Keeper},
    tensor::LeafId,
};

/// Blocks of a model, each gathered before it is used and freed after that.
///
/// All ranks run the same passes: gathering is an operation of all. The order of the blocks in a pass is that of the
/// last pass of its kind, so that the next block can be gathered ahead.
pub(super) struct Blocks {
    /// This rank's part of the trained parameters, and of the frozen ones.
    shards: Vec<Arc<Shards>>,
    /// Shards and bucket of each block's parameters.
    homes: Vec<Vec<(usize, usize)>>,
    gatherer: Gatherer,
    state: Mutex<State>,
}

/// Use of the weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pass {
    Train,
    Validate,
}

#[derive(Default)]
struct State {
    /// `None` between passes.
    pass: Option<Pass>,
    /// If `true`, all weights are here.
    open: bool,
    /// Blocks used in this pass, and in the last of each kind.
    used: Vec<usize>,
    last: [Vec<usize>; 2],
    /// If `true`, this pass has used the blocks of the last one so far.
    alike: bool,
    /// The block that is gathered ahead.
    ahead: Option<(usize, Vec<Gathering>)>,
}

/// Guard of a pass, in which blocks are gathered as they are used.
#[must_use = "dropping it ends the pass"]
pub(super) struct Passing<'b>(&'b Blocks);

/// Guard of weights that are all here.
pub(super) struct Opened<'b>(&'b Blocks);

/// Returns the blocks of these parameters, and the number of each parameter's block. A parameter that is used outside of its
/// block too, under another name or in another block, is not divided.
///
/// Errors: no block; one that a pass may leave out.
pub(super) fn homes(params: &ParamMap, frozen: &ParamMap) -> Result<(Vec<Block>, Homes)> {
    let blocks = params.blocks().iter().chain(frozen.blocks()).cloned().collect_vec();
    ensure!(!blocks.is_empty(), Error::option("zero", "stage 3 divides attention layers, of which the model has none"));
    ensure!(
        !blocks.iter().any(Block::may_be_skipped),
        Error::option(
            "zero",
            "stage 3 cannot be used with `layer_dropout`, which leaves out other layers on each rank"
        )
    );
    let mut homes: OrderedMap<LeafId, usize> = OrderedMap::default();
    let mut shared: OrderedMap<LeafId, ()> = OrderedMap::default();
    for (number, block) in blocks.iter().enumerate() {
        for param in block.params() {
            if homes.get(&param.leaf()).is_some_and(|home| *home != number) {
                shared.insert(param.leaf(), ());
            }
            homes.insert(param.leaf(), number);
        }
    }
    for (name, param) in params.iter().chain(frozen.iter()) {
        if homes.get(&param.leaf()).is_some_and(|home| !name.starts_with(blocks[*home].place())) {
            shared.insert(param.leaf(), ());
        }
    }
    for leaf in shared.keys() {
        homes.remove(leaf);
    }
    Ok((blocks, homes))
}

impl Blocks {
    /// Frees the weights of the blocks, of which each rank keeps its part from now on. `trained`: its part of the
    /// parameters with gradients.
    pub fn new(
        blocks: &[Block],
        trained: Arc<Shards>,
        frozen: &ParamMap,
        homes: &Homes,
        ranks: &Arc<dyn Communicator>,
        gatherer: Gatherer,
    ) -> Result<Arc<Self>> {
        let mut buckets = Bucket::all(frozen, ranks.size(), usize::MAX, homes);
        buckets.retain(|bucket| bucket.block.is_some());
        let mut outside = frozen.unique().filter(|(_, param)| !homes.contains_key(&param.leaf()));
        outside.try_for_each(|(_, param)| param.materialize())?;
        let frozen = Arc::new(Shards::new(frozen, ranks.clone(), Arc::new(buckets))?);
        let shards = vec![trained, frozen];
        let mut homes = blocks.iter().map(|_| Vec::new()).collect_vec();
        for (at, shards) in shards.iter().enumerate() {
            for (block, bucket) in shards.blocks() {
                homes[block].push((at, bucket));
            }
        }
        let kept = Arc::new(Self { shards, homes, gatherer, state: Mutex::default() });
        for (number, block) in blocks.iter().enumerate() {
            kept.free(number)?;
            block.keep(kept.clone(), number);
        }
        Ok(kept)
    }

    /// Begins a pass, which all ranks run.
    pub fn pass(&self, pass: Pass) -> Passing<'_> {
        let mut state = self.state();
        (state.pass, state.alike) = (Some(pass), true);
        state.used.clear();
        Passing(self)
    }

    /// Gathers the weights of all blocks, of which this rank keeps them whole if it is to.
    pub fn open(&self, keep: bool) -> Result<Opened<'_>> {
        self.state().open = true;
        let opened = Opened(self);
        for block in 0..self.homes.len() {
            let all = self.start(block)?;
            if keep {
                self.fill(block, all)?;
            } else {
                all.into_iter().try_for_each(|all| all.finish().map(drop))?;
            }
        }
        Ok(opened)
    }

    /// This rank's part of the weights, trained ones first.
    pub fn shards(&self) -> &[Arc<Shards>] {
        &self.shards
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, block: usize) -> Result<Vec<Gathering>> {
        let parts = self.homes[block].iter().map(|&(at, bucket)| self.gatherer.start(self.shards[at].part(bucket)?));
        parts.try_collect_vec()
    }

    fn fill(&self, block: usize, all: Vec<Gathering>) -> Result<()> {
        let mut parts = self.homes[block].iter().zip(all);
        parts.try_for_each(|(&(at, bucket), all)| self.shards[at].fill(bucket, &all.finish()?))
    }

    fn free(&self, block: usize) -> Result<()> {
        self.homes[block].iter().try_for_each(|&(at, bucket)| self.shards[at].free(bucket))
    }
}

impl Keeper for Blocks {
    fn gather(&self, block: usize) -> Result<bool> {
        let mut state = self.state();
        if state.open {
            return Ok(false);
        }
        let Some(pass) = state.pass else {
            return Err(Error::argument(
                "weights",
                "are divided among ranks (ZeRO 3); use the model within `Trainer::evaluate`, which gathers them",
            ));
        };
        let ahead = state.ahead.take().filter(|(number, _)| *number == block);
        let all = ahead.map_or_else(|| self.start(block), |(_, all)| Ok(all))?;
        let (at, last) = (state.used.len(), &state.last[pass as usize]);
        let alike = state.alike && last.get(at) == Some(&block);
        let next = last.get(at + 1).copied().filter(|_| alike && self.gatherer.is_ahead());
        state.alike = alike;
        state.used.push(block);
        state.ahead = next.map(|next| Ok::<_, Error>((next, self.start(next)?))).transpose()?;
        drop(state);
        self.fill(block, all)?;
        Ok(true)
    }

    fn release(&self, block: usize) {
        // Their shapes are those of the parameters: nothing can fail.
        let _ = self.free(block);
    }
}

impl Passing<'_> {
    /// Ends a pass that has not failed.
    pub fn end(self) -> Result<()> {
        let mut state = self.0.state();
        let ahead = state.ahead.take();
        if let Some(pass) = state.pass {
            state.last[pass as usize] = std::mem::take(&mut state.used);
        }
        drop(state);
        // The thread of the sums must not exchange anything while this one does.
        ahead.into_iter().flat_map(|(_, all)| all).try_for_each(|all| all.finish().map(drop))
    }
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        (state.pass, state.ahead) = (None, None);
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.0.state().open = false;
        for block in 0..self.0.homes.len() {
            self.0.release(block);
        }
    }
}
