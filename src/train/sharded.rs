//! Optimizers whose state is divided among ranks.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::Value;

use super::{Ema, Optimizer, StepInfo, checkpoint::EMA, divided::Divided, ema::Swapped, optimizer::check};
use crate::{
    DType, Device, Error, ErrorKind, Gradients, Param, ParamMap, ParamStore, Result, Tensor,
    collect::CollectVec,
    distributed::{BUCKET, Bucket, Communicator, Homes, Piece, Reducer, Sums},
    error::ensure,
    ops::adamw::{CHUNK, square_norms},
    ordered::{OrderedMap, ordered},
};

/// Optimizer of which each rank keeps the state of its part of the parameters: stages of ZeRO
/// (Rajbhandari et al., <https://arxiv.org/abs/1910.02054>).
///
/// Each rank updates its part of the weights and gathers those of the others. All ranks have the bits of the optimizer
/// alone (on a GPU up to the last bit of the norm that clips). It must update [each element by
/// itself](Optimizer::is_elementwise), as [`AdamW`](super::AdamW), [`Sgd`](super::Sgd) and [`Lion`](super::Lion) do.
///
/// - **Stage 1**: give it the gradients of [`DataParallel::reduce`](crate::distributed::DataParallel::reduce).
/// - **Stage 2**: give it those of [`Sharded::reduce`], which keeps only this rank's part of the sums.
/// - **Stage 3**, which divides weights too, is one of [`Trainer::with_ranks`](super::Trainer::with_ranks).
///
/// All ranks call its methods together, in the same order; [`Optimizer::state_dict`] returns the whole state on each.
///
/// ```
/// use std::sync::Arc;
/// use x_transformers::{
///     DType, Device, Init, ParamStore, Tape,
///     distributed::{Alone, DataParallel},
///     train::{AdamW, AdamWOptions, Optimizer, Sharded},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let weight = store.param("weight", [3], Init::Constant(1.0))?;
/// let params = store.params();
/// let parallel = DataParallel::new(&params, Arc::new(Alone))?;
/// let adamw = Box::new(AdamW::new(AdamWOptions::default())?);
/// let mut optimizer = Sharded::new(&params, parallel.ranks().clone(), adamw)?;
/// let mut tape = Tape::train(0);
/// let grads = tape.backward(&weight.tensor().square()?.sum(&[])?)?;
/// let grads = optimizer.reduce(grads)?; // stage 2; stage 1 would be parallel.reduce(grads)?
/// optimizer.step(&params, &grads, 0.1, Some(1.0))?;
/// assert!((weight.tensor().to_vec::<f32>()?[0] - 0.899).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
#[doc(alias = "ZeroRedundancyOptimizer")]
#[doc(alias = "ZeRO")]
pub struct Sharded {
    optimizer: Box<dyn Optimizer>,
    shards: Arc<Shards>,
    reducer: Mutex<Reducer>,
}

impl fmt::Debug for Sharded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { optimizer, shards, .. } = self;
        f.debug_struct("Sharded").field("optimizer", optimizer).field("ranks", &shards.ranks).finish_non_exhaustive()
    }
}

impl Sharded {
    /// Divides the state of an optimizer of these parameters, if it has one already.
    ///
    /// Errors: an optimizer that is not [elementwise](Optimizer::is_elementwise), such as
    /// [`Adafactor`](super::Adafactor) and [`Muon`](super::Muon), which need whole matrices; a state of other
    /// parameters; out of memory.
    pub fn new(params: &ParamMap, ranks: Arc<dyn Communicator>, optimizer: Box<dyn Optimizer>) -> Result<Self> {
        Self::by_buckets(params, ranks, optimizer, BUCKET, &Homes::default())
    }

    /// `most`: elements of a bucket. `homes`: parameters of which each rank keeps only its part, once they are
    /// [freed](Shards::free).
    pub(super) fn by_buckets(
        params: &ParamMap,
        ranks: Arc<dyn Communicator>,
        optimizer: Box<dyn Optimizer>,
        most: usize,
        homes: &Homes,
    ) -> Result<Self> {
        let json = optimizer.to_json();
        let name = json["name"].as_str().unwrap_or_default();
        ensure!(
            optimizer.is_elementwise(),
            Error::option("zero", format_args!("{name} needs whole matrices; use adamw, lion or sgd"))
        );
        let reducer = Reducer::new(params, ranks.clone(), false, most, homes)?;
        let shards = Arc::new(Shards::new(params, ranks, reducer.buckets().clone())?);
        let state = optimizer.state_dict()?;
        let mut sharded = Self { optimizer, shards, reducer: Mutex::new(reducer) };
        sharded.load_state_dict(params, &state)?;
        Ok(sharded)
    }

    /// Sums gradients over all ranks, and keeps this rank's part: gradients only for [`Optimizer::step`].
    ///
    /// Errors: a failed transfer; out of memory.
    pub fn reduce(&self, mut grads: Gradients) -> Result<Gradients> {
        let mut reducer = self.reducer();
        reducer.reset();
        reducer.round(&mut grads)?;
        self.shards.gradients(reducer.finish()?)
    }

    pub(super) fn shards(&self) -> &Arc<Shards> {
        &self.shards
    }

    /// This rank's part of the state and of an average, as they are in the file of all.
    pub(super) fn divided(&self, averages: BTreeMap<String, Tensor>) -> Result<Divided> {
        let mut own = self.optimizer.state_dict()?;
        own.extend(averages);
        self.shards.divided(&own)
    }

    fn reducer(&self) -> MutexGuard<'_, Reducer> {
        self.reducer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Optimizer for Sharded {
    fn step_scaled(
        &mut self,
        params: &ParamMap,
        grads: &Gradients,
        scale: f64,
        lr: f64,
        clip: Option<f64>,
    ) -> Result<StepInfo> {
        check(lr, clip)?;
        let shards = self.shards.clone();
        let grads = shards.own_part(grads)?;
        let (squares, updated) = shards.square_norms(params, &grads, self.steps())?;
        let grad_norm = scale * squares;
        let scale = scale * clip.map_or(1.0, |clip| (clip / (grad_norm + 1e-6)).min(1.0));
        shards.refresh()?;
        self.optimizer.step_scaled(&shards.params, &grads, scale, lr, None)?;
        shards.publish()?;
        Ok(StepInfo { grad_norm, updated })
    }

    fn steps(&self) -> u64 {
        self.optimizer.steps()
    }

    fn state_dict(&self) -> Result<BTreeMap<String, Tensor>> {
        self.shards.gather(&self.optimizer.state_dict()?)
    }

    fn load_state_dict(&mut self, _params: &ParamMap, dict: &BTreeMap<String, Tensor>) -> Result<()> {
        self.optimizer.load_state_dict(&self.shards.params, &self.shards.own_state(dict)?)
    }

    fn to_json(&self) -> Value {
        self.optimizer.to_json()
    }

    fn sharded(&self) -> Option<&Sharded> {
        Some(self)
    }
}

/// This rank's part of the parameters, as parameters of the same names.
pub(super) struct Shards {
    ranks: Arc<dyn Communicator>,
    buckets: Arc<Vec<Bucket>>,
    /// Pieces of this rank in each bucket, with their place in its part and their parameter.
    own: Vec<Vec<(Piece, usize, Param)>>,
    params: ParamMap,
}

impl Shards {
    pub fn new(params: &ParamMap, ranks: Arc<dyn Communicator>, buckets: Arc<Vec<Bucket>>) -> Result<Self> {
        let (mut own, mut by_leaf) = (Vec::new(), OrderedMap::default());
        for bucket in &*buckets {
            let mut pieces = Vec::new();
            if bucket.block.is_none() {
                bucket.params.iter().try_for_each(|(_, param)| param.materialize())?;
            }
            for (piece, at) in bucket.places(ranks.rank()) {
                let (_, param) = &bucket.params[piece.param];
                // A deferred parameter of a block is whole until its piece has been copied.
                let own = slice(&param.value()?, piece)?;
                let shard = Param::new(if bucket.block.is_some() { own.to_owned_copy()? } else { own })?;
                by_leaf.insert(param.leaf(), shard.clone());
                pieces.push((piece, at, shard));
            }
            own.push(pieces);
        }
        let store = ParamStore::zeros(DType::F32, &Device::Cpu);
        for (name, param) in params.iter() {
            by_leaf.get(&param.leaf()).map(|shard| store.tie(name, shard)).transpose()?;
        }
        let shards = Self { ranks, buckets, own, params: store.params() };
        shards.release()?;
        Ok(shards)
    }

    /// Returns the pieces of this rank, with the number of their bucket.
    fn each(&self) -> impl Iterator<Item = (usize, &(Piece, usize, Param))> {
        self.own.iter().enumerate().flat_map(|(bucket, pieces)| pieces.iter().map(move |piece| (bucket, piece)))
    }

    /// Gradients of this rank's part from its sums.
    pub fn gradients(&self, sums: Sums) -> Result<Gradients> {
        let mut grads = Gradients::default();
        for (bucket, (piece, at, shard)) in
            self.each().filter(|(bucket, (piece, ..))| sums.reached[*bucket][piece.param])
        {
            let part = sums.parts[bucket].narrow(0, *at, piece.len)?;
            grads.replace(shard.leaf(), part.contiguous()?.reshape(*shard.tensor().shape())?);
        }
        Ok(grads)
    }

    /// Gradients of this rank's part: those that it is given, or else slices of whole ones.
    fn own_part(&self, given: &Gradients) -> Result<Gradients> {
        let mut grads = Gradients::default();
        for (bucket, (piece, _, shard)) in self.each() {
            let (_, param) = &self.buckets[bucket].params[piece.param];
            let part =
                given.param(shard).cloned().map(Ok).or_else(|| given.param(param).map(|grad| slice(grad, *piece)));
            part.transpose()?.into_iter().for_each(|part| grads.replace(shard.leaf(), part));
        }
        Ok(grads)
    }

    /// Returns the norm of all gradients and the number of parameters that have one. The sums are those of whole
    /// parameters: by chunks, and then in the order of names.
    fn square_norms(&self, params: &ParamMap, grads: &Gradients, step: u64) -> Result<(f64, usize)> {
        const NONE: f64 = -1.0;
        let (mut chunks, mut filled) = (Vec::new(), Vec::new());
        for (_, (piece, _, shard)) in self.each() {
            let count = piece.len.div_ceil(CHUNK);
            filled.extend(std::iter::repeat_n(grads.param(shard).is_some(), count));
            let Some(grad) = grads.param(shard) else { continue };
            let flat = grad.detach().contiguous()?.reshape([piece.len])?;
            for start in (0..piece.len).step_by(CHUNK) {
                chunks.push(flat.narrow(0, start, CHUNK.min(piece.len - start))?);
            }
        }
        let mut squares = square_norms(&chunks)?.into_iter();
        let mine = filled.into_iter().map(|filled| if filled { squares.next().unwrap_or(NONE) } else { NONE });
        let mine = mine.flat_map(f64::to_le_bytes).collect::<Vec<u8>>();
        let counts = |rank: usize| {
            let pieces = self.buckets.iter().flat_map(move |bucket| &bucket.parts[rank]);
            pieces.map(|piece| piece.len.div_ceil(CHUNK)).sum::<usize>()
        };
        let most = (0..self.ranks.size()).map(counts).max().unwrap_or(0);
        let all = self.gather_bytes(mine, 8 * most)?;
        let mut at = (0..self.ranks.size()).map(|rank| rank * 8 * most).collect_vec();
        // In the order of elements within each parameter, which is that of ranks.
        let mut totals = OrderedMap::default();
        for bucket in &*self.buckets {
            for (rank, part) in bucket.parts.iter().enumerate() {
                for piece in part {
                    for _ in 0..piece.len.div_ceil(CHUNK) {
                        let square = f64::from_le_bytes(std::array::from_fn(|byte| all[at[rank] + byte]));
                        at[rank] += 8;
                        if square != NONE {
                            *totals.or_insert(bucket.params[piece.param].1.leaf(), 0.0) += square;
                        }
                    }
                }
            }
        }
        let in_order = params.unique().filter_map(|(name, param)| Some((name, *totals.get(&param.leaf())?)));
        let squares = in_order.collect_vec();
        let norm = squares.iter().map(|(_, square)| square).sum::<f64>().sqrt();
        if !norm.is_finite() {
            let culprit = squares.iter().find(|(_, square)| !square.is_finite());
            let culprit = culprit.or_else(|| squares.iter().max_by(|a, b| a.1.total_cmp(&b.1)));
            let what = culprit.map_or("gradient norm".to_string(), |(name, _)| format!("gradient of {name}"));
            return Err(Error::new(ErrorKind::NonFinite { step, what }));
        }
        Ok((norm, squares.len()))
    }

    /// Returns the pieces of parameters that every rank has as a whole.
    fn whole(&self) -> impl Iterator<Item = (usize, &(Piece, usize, Param))> {
        self.each().filter(|(bucket, _)| self.buckets[*bucket].block.is_none())
    }

    /// Takes this rank's part of the weights over.
    fn refresh(&self) -> Result<()> {
        for (bucket, (piece, _, shard)) in self.whole() {
            shard.replace(slice(&self.buckets[bucket].params[piece.param].1.tensor(), *piece)?)?;
        }
        Ok(())
    }

    /// Frees the weights of this rank's part, which [`Shards::refresh`] takes over again.
    fn release(&self) -> Result<()> {
        self.whole().try_for_each(|(_, (.., shard))| shard.replace(shard.tensor().absent()))
    }

    /// Returns the blocks, with their numbers and buckets.
    pub fn blocks(&self) -> impl Iterator<Item = (usize, usize)> {
        self.buckets.iter().enumerate().filter_map(|(at, bucket)| Some((bucket.block?, at)))
    }

    /// Returns the weights of this rank's part of the divided parameters.
    pub fn divided_weights(&self) -> impl Iterator<Item = (&str, Piece, &Param)> {
        let divided = self.each().filter(|(bucket, _)| self.buckets[*bucket].block.is_some());
        divided.map(|(bucket, (piece, _, shard))| (self.buckets[bucket].params[piece.param].0.as_str(), *piece, shard))
    }

    /// Frees the parameters of a block's bucket, of which this rank keeps its part.
    pub fn free(&self, bucket: usize) -> Result<()> {
        let mut params = self.buckets[bucket].params.iter();
        params.try_for_each(|(_, param)| param.replace(param.tensor().absent()))
    }

    /// Gives all ranks the weights of all parts.
    fn publish(&self) -> Result<()> {
        for bucket in (0..self.buckets.len()).filter(|&bucket| self.buckets[bucket].block.is_none()) {
            self.fill(bucket, &self.ranks.all_gather(&self.part(bucket)?)?)?;
        }
        self.release()
    }

    /// Returns this rank's part of the weights of a bucket: `[len]`.
    pub fn part(&self, bucket: usize) -> Result<Tensor> {
        let (own, bucket) = (&self.own[bucket], &self.buckets[bucket]);
        bucket.part(&bucket.parts[self.ranks.rank()], bucket.dtype, |piece| {
            own.iter().find(|(at, ..)| at == piece).map(|(.., shard)| flat(&shard.tensor())).transpose()
        })
    }

    /// Sets the parameters of a bucket from all parts: `[ranks · len]`.
    pub fn fill(&self, bucket: usize, all: &Tensor) -> Result<()> {
        let bucket = &self.buckets[bucket];
        let mut params = bucket.params.iter().zip(bucket.whole(all)?);
        params.try_for_each(|((_, param), value)| param.replace(value))
    }

    /// Returns this rank's part of an average.
    pub fn own_average(&self, ema: &Ema) -> Result<Ema> {
        let named = |(name, average)| (format!("{EMA}{name}"), average);
        let own = self.own_state(&ordered(ema.state_dict().into_iter().map(named)))?;
        let mut averages = BTreeMap::new();
        for (name, average) in own {
            let name = &name[EMA.len()..];
            let device = self.params.get(name).map_or(Device::Cpu, |shard| shard.tensor().device().clone());
            averages.insert(name.to_string(), average.to_device(&device)?);
        }
        ema.with_averages(averages)
    }

    /// Returns this rank's part of an average that starts at the present weights.
    pub fn first_average(&self, decay: f64) -> Result<Ema> {
        self.refresh()?;
        let ema = Ema::new(&self.params, decay)?;
        self.release()?;
        Ok(ema)
    }

    /// Updates this rank's part of an average with the present weights.
    pub fn average(&self, ema: &mut Ema) -> Result<()> {
        self.refresh()?;
        ema.update(&self.params)?;
        self.release()
    }

    /// Sets the parameters to their averages, of which each rank has its part, until the guards are dropped.
    pub fn swap_in(&self, ema: &Ema) -> Result<[Swapped; 2]> {
        let own = ema.swap_in(&self.params)?;
        let mut swapped = Swapped::none();
        // Blocks are gathered from these parts.
        for bucket in (0..self.buckets.len()).filter(|&bucket| self.buckets[bucket].block.is_none()) {
            let all = self.ranks.all_gather(&self.part(bucket)?)?;
            let bucket = &self.buckets[bucket];
            for ((_, param), average) in bucket.params.iter().zip(bucket.whole(&all)?) {
                swapped.set(param, param.tensor().detach(), average)?;
            }
        }
        Ok([swapped, own])
    }

    /// This rank's part of a state: of the tensors of each parameter, and the numbers beside them.
    fn own_state(&self, dict: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
        let mut places = OrderedMap::default();
        for (bucket, (piece, ..)) in self.each() {
            let (name, _) = &self.buckets[bucket].params[piece.param];
            places.insert(name.as_str(), *piece);
        }
        let all = self.buckets.iter().flat_map(|bucket| &bucket.params);
        let all = all.map(|(name, param)| (name.as_str(), param)).collect::<OrderedMap<_, _>>();
        let (mut own, mut mismatched) = (BTreeMap::new(), Vec::new());
        for (key, tensor) in dict {
            let known = key.split_once('.').and_then(|(kind, name)| Some((kind, name, *all.get(name)?)));
            let Some((kind, name, param)) = known else {
                own.insert(key.clone(), tensor.clone());
                continue;
            };
            // All ranks see all shapes, and fail together.
            if kind != "step" && tensor.shape() != param.tensor().shape() {
                mismatched.push((key.clone(), param.tensor().shape().to_vec(), tensor.shape().to_vec()));
                continue;
            }
            // Those without a place are another rank's.
            if let Some(piece) = places.get(name) {
                own.insert(key.clone(), if kind == "step" { tensor.clone() } else { slice(tensor, *piece)? });
            }
        }
        let (missing, unused) = (Vec::new(), Vec::new());
        ensure!(mismatched.is_empty(), Error::new(ErrorKind::Weights { missing, unused, mismatched }));
        Ok(own)
    }

    /// The whole state from this rank's part of it.
    fn gather(&self, own: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
        let Inventory { mut numbers, tensors } = self.inventory(own)?;
        for (bucket, kind, params) in tensors {
            let bucket = &self.buckets[bucket];
            let part = bucket.part(&bucket.parts[self.ranks.rank()], bucket.dtype.accumulator(), |piece| {
                own.get(&format!("{kind}.{}", bucket.params[piece.param].0)).map(flat).transpose()
            });
            let whole = bucket.whole(&self.ranks.all_gather(&part?)?)?;
            for (param, tensor) in whole.into_iter().enumerate().filter(|(param, _)| params.contains(param)) {
                numbers.insert(format!("{kind}.{}", bucket.params[param].0), tensor);
            }
        }
        Ok(numbers)
    }

    /// This rank's part of the state, as it is in the file of all.
    fn divided(&self, own: &BTreeMap<String, Tensor>) -> Result<Divided> {
        let Inventory { numbers, tensors } = self.inventory(own)?;
        let mut divided = Divided { whole: numbers, shapes: BTreeMap::new(), own: Vec::new() };
        for (at, kind, params) in tensors {
            let bucket = &self.buckets[at];
            for param in params {
                let (name, value) = &bucket.params[param];
                let shape = (bucket.dtype.accumulator(), *value.tensor().shape());
                divided.shapes.insert(format!("{kind}.{name}"), shape);
            }
            for (piece, ..) in &self.own[at] {
                let key = format!("{kind}.{}", bucket.params[piece.param].0);
                if let Some(tensor) = own.get(&key) {
                    divided.own.push((key, piece.start, tensor.clone()));
                }
            }
        }
        Ok(divided)
    }

    /// This rank's part of the weights that are divided, and the others as a whole.
    pub fn divided_model(&self, params: &ParamMap) -> Result<Divided> {
        let mut divided = Divided { whole: params.state_dict(), shapes: BTreeMap::new(), own: Vec::new() };
        divided.whole.retain(|_, tensor| !tensor.is_absent());
        let names =
            |leaf| params.iter().filter(move |(_, param)| param.leaf() == leaf).map(|(name, _)| name.to_string());
        for bucket in self.buckets.iter().filter(|bucket| bucket.block.is_some()) {
            for (_, param) in &bucket.params {
                let shape = (bucket.dtype, *param.tensor().shape());
                divided.shapes.extend(names(param.leaf()).map(|name| (name, shape)));
            }
        }
        for (bucket, (piece, _, shard)) in self.each().filter(|(bucket, _)| self.buckets[*bucket].block.is_some()) {
            let leaf = self.buckets[bucket].params[piece.param].1.leaf();
            divided.own.extend(names(leaf).map(|name| (name, piece.start, shard.tensor())));
        }
        Ok(divided)
    }

    /// Returns the names and shapes that make up the state of all ranks.
    fn inventory(&self, own: &BTreeMap<String, Tensor>) -> Result<Inventory> {
        let kinds = own.keys().filter_map(|key| Some(key.split_once('.')?.0)).filter(|kind| *kind != "step");
        // A rank that has no part does not know them.
        const ROOM: usize = 512;
        let names = kinds.map(|kind| (kind, ())).collect::<OrderedMap<_, _>>().keys().join(" ");
        let names = self.gather_bytes(names.into_bytes(), ROOM)?;
        let names = names.split(|byte| matches!(byte, 0 | b' ')).filter(|name| !name.is_empty());
        let names = names.map(|name| (String::from_utf8_lossy(name).into_owned(), ()));
        let kinds = names.collect::<OrderedMap<_, _>>();
        let (mut numbers, mut tensors) = (BTreeMap::new(), Vec::new());
        numbers.extend(own.get("steps").map(|steps| ("steps".to_string(), steps.clone())));
        for (at, bucket) in self.buckets.iter().enumerate() {
            // The number of steps of each parameter plus 1, and which tensors there are.
            let mut found: Vec<u64> = Vec::new();
            for (name, _) in &bucket.params {
                let step = own.get(&format!("step.{name}")).map(|step| step.to_vec::<i64>()).transpose()?;
                found.push(step.map_or(0, |step| step[0] as u64 + 1));
                found.extend(kinds.keys().iter().map(|kind| u64::from(own.contains_key(&format!("{kind}.{name}")))));
            }
            let (width, each) = (8 * found.len(), 1 + kinds.len());
            let all = self.gather_bytes(found.into_iter().flat_map(u64::to_le_bytes).collect(), width)?;
            let number = |at: usize| {
                let of_rank = |rank: &[u8]| u64::from_le_bytes(std::array::from_fn(|byte| rank[8 * at + byte]));
                all.chunks_exact(width).map(of_rank).max().unwrap_or(0)
            };
            for (param, (name, _)) in bucket.params.iter().enumerate() {
                if let Some(steps) = number(each * param).checked_sub(1) {
                    numbers.insert(format!("step.{name}"), Tensor::scalar(steps as i64, &Device::Cpu)?);
                }
            }
            for (kind, name) in kinds.keys().iter().enumerate() {
                let params =
                    (0..bucket.params.len()).filter(|param| number(each * param + 1 + kind) == 1).collect_vec();
                tensors.push((at, name.clone(), params));
            }
        }
        Ok(Inventory { numbers, tensors })
    }

    fn gather_bytes(&self, mut mine: Vec<u8>, width: usize) -> Result<Vec<u8>> {
        mine.resize(width, 0);
        let mut all = vec![0; width * self.ranks.size()];
        self.ranks.all_gather_bytes(&mine, &mut all)?;
        Ok(all)
    }
}

/// Names and numbers that make up the state of all ranks.
struct Inventory {
    /// Numbers of steps.
    numbers: BTreeMap<String, Tensor>,
    /// Bucket, name of the tensor, and the bucket's parameters that have it.
    tensors: Vec<(usize, String, Vec<usize>)>,
}

fn flat(tensor: &Tensor) -> Result<Tensor> {
    tensor.detach().contiguous()?.reshape([tensor.numel()])
}

/// Elements of a piece, `[len]`, or `[len, 1]` of a matrix: groups of parameters tell them by their dimensions.
fn slice(tensor: &Tensor, piece: Piece) -> Result<Tensor> {
    let elements = flat(tensor)?.narrow(0, piece.start, piece.len)?.contiguous()?;
    if tensor.rank() > 1 { elements.reshape([piece.len, 1]) } else { Ok(elements) }
}
