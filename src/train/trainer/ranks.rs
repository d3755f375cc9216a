//! Training by several ranks: each has its share of the micro-batches, and all have the same weights.

use std::{cell::Cell, collections::BTreeMap, path::Path, sync::Arc};

use serde_json::{Value, json};

use super::Trainer;
use crate::{
    Device, Error, Gradients, Result, Tape, Tensor,
    collect::CollectVec,
    distributed::{BUCKET, Communicator, Homes, Reducer, agree},
    error::ensure,
    hash::{FNV1A_START, fnv1a_from},
    ops::adamw::square_norms,
    ordered::OrderedMap,
    train::{
        Batch, Checkpoint, Ema, Sharded, TrainModel,
        blocks::{Blocks, Pass, homes},
        ema::Swapped,
        sharded::Shards,
    },
};

/// Options of a trainer that is one of several ranks. None changes any bit of what it computes, if the ranks [sum in
/// their order](Communicator::sums_in_rank_order).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RankOptions {
    /// If `true`, gradients are summed while the backward pass runs: on the CPU, where the ranks
    /// [take calls from any thread](Communicator::takes_any_thread) and sum in their order. Default `true`.
    pub overlap: bool,
    /// Stage of ZeRO: with 1 each rank keeps its part of the optimizer's state and of averaged weights, with 2 of the
    /// summed gradients too (see [`Sharded`]), with 3 of the weights of attention layers too: each layer's are gathered
    /// when a pass uses them, again in the backward pass by [`recompute`](crate::train::TrainOptions::recompute), which
    /// it requires. All ranks must run the same layers. Each rank holds all weights until [`Trainer::with_ranks`] divides
    /// them, unless the trainer was built within [`deferred_init`](crate::deferred_init). Default 0.
    pub zero: u8,
    /// Largest number of elements summed together; a larger parameter has a bucket of its own. Default 8,388,608: 32 MB
    /// of f32.
    pub bucket: usize,
}

impl Default for RankOptions {
    fn default() -> Self {
        Self { overlap: true, zero: 0, bucket: BUCKET }
    }
}

/// Ranks of a trainer.
#[derive(Default)]
pub(super) struct Ranks {
    /// `None` for a single process.
    reducer: Option<Reducer>,
    /// This rank's part of the parameters, from stage 1 of ZeRO on.
    shards: Option<Arc<Shards>>,
    /// If `true`, this rank keeps its part of the summed gradients: from stage 2 on.
    keeps_sums: bool,
    /// Layers whose weights are divided: stage 3.
    pub blocks: Option<Arc<Blocks>>,
    resumed: bool,
    /// Method that rank 0 calls, as received by [`Trainer::follow`].
    told: Cell<Option<Command>>,
    /// If this rank was asked to stop, and if any was before the last step.
    asked: Cell<[bool; 2]>,
}

/// Methods of a trainer that all ranks call together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Command {
    End,
    Step,
    Validate,
    Save,
    Evaluate,
}

impl Command {
    fn of(byte: u8) -> Option<Self> {
        let all = [Self::End, Self::Step, Self::Validate, Self::Save, Self::Evaluate];
        all.into_iter().find(|command| *command as u8 == byte)
    }

    fn name(byte: u8) -> &'static str {
        match Self::of(byte) {
            Some(Self::End) => "end_ranks",
            Some(Self::Step) => "step",
            Some(Self::Validate) => "validate",
            Some(Self::Save) => "save",
            Some(Self::Evaluate) => "evaluate",
            None => "something else",
        }
    }
}

/// Sums over the micro-batches of a step.
#[derive(Clone, Copy, Default)]
pub(super) struct Part {
    /// Losses times weights.
    pub loss: f64,
    pub weight: f64,
    pub targets: u64,
}

impl Part {
    /// Sums losses times weights, weights and targets of micro-batches in their order.
    pub fn of(parts: &[[f64; 3]]) -> Self {
        let counted = || parts.iter().filter(|[_, weight, _]| *weight != 0.0);
        Self {
            loss: counted().map(|[loss, ..]| loss).sum(),
            weight: counted().fold(0.0, |sum, [_, weight, _]| sum + weight),
            targets: counted().map(|[_, _, targets]| *targets as u64).sum(),
        }
    }
}

impl Ranks {
    pub fn resumed() -> Self {
        Self { resumed: true, ..Self::default() }
    }

    /// Drops what is left of a step that failed.
    pub fn reset(&mut self) {
        self.reducer.iter_mut().for_each(Reducer::reset);
    }

    fn communicator(&self) -> Option<&Arc<dyn Communicator>> {
        self.reducer.as_ref().map(Reducer::ranks)
    }

    /// Returns `true` if there are several ranks.
    #[cfg(feature = "cuda")]
    pub fn exchanges(&self) -> bool {
        self.communicator().is_some()
    }

    fn place(&self) -> [u64; 2] {
        self.communicator().map_or([0, 1], |ranks| [ranks.rank(), ranks.size()].map(|number| number as u64))
    }

    /// Returns the first parameter of whose divided weights this rank's part has NaN or infinity.
    pub fn divided_not_finite(&self) -> Result<Option<String>> {
        let Some(shards) = self.blocks.as_ref().map(|blocks| &blocks.shards()[0]) else { return Ok(None) };
        let (names, tensors): (Vec<_>, Vec<_>) =
            shards.divided_weights().map(|(name, _, shard)| (name, shard.tensor().detach())).unzip();
        let squares = square_norms(&tensors)?;
        Ok(squares.iter().position(|square| !square.is_finite()).map(|at| names[at].to_string()))
    }

    /// Returns `true` if the micro-batch of this number in its step is this rank's.
    pub fn has(&self, micro: u64) -> bool {
        let [rank, size] = self.place();
        micro % size == rank
    }
}

/// Loss of a micro-batch, its weight and number of targets; `None` if no target counts.
pub(super) type Micro = Option<(Tensor, f64, u64)>;

impl<M: TrainModel> Trainer<M> {
    /// Trains with the other ranks: all create the same trainer, call this, and then the same methods in the same
    /// order, or all but rank 0 call [`Trainer::follow`].
    ///
    /// Each rank does [`accumulate`](crate::train::TrainOptions::accumulate) micro-batches a step; the options and
    /// checkpoints then have the number of all ranks together. The micro-batches of a step go to the ranks in turn, and
    /// gradients are summed in the order of micro-batches: N ranks give the bits of one process with N times as many, if
    /// they [sum in their order](Communicator::sums_in_rank_order); otherwise the results differ by rounding. A run may be
    /// resumed with another number of ranks, up to one for each micro-batch of a step.
    ///
    /// Validation is shared too, and [`Trainer::save`] writes on rank 0.
    ///
    /// Errors: a stage of ZeRO that does not exist, or that the optimizer or the model cannot have; ranks of other versions,
    /// options, data, checkpoints or weights, which are named; more ranks than micro-batches in a step of a resumed
    /// run; a failed transfer.
    pub fn with_ranks(mut self, ranks: Arc<dyn Communicator>, options: RankOptions) -> Result<Self> {
        const OP: &str = "ranks";
        let size = ranks.size();
        let RankOptions { overlap, zero, bucket } = options;
        ensure!(zero <= 3, Error::option("zero", format_args!("expected 0, 1, 2 or 3, got {zero}")));
        let frozen = self.model.frozen_params();
        let (layers, homes) = if zero == 3 {
            ensure!(
                self.options.recompute,
                Error::option("zero", "stage 3 computes layers again in the backward pass: requires `recompute`")
            );
            homes(&self.params, &frozen)?
        } else {
            (Vec::new(), Homes::default())
        };
        self.same_as_first(&*ranks, options)?;
        if zero < 3 || size == 1 {
            self.materialize(&frozen)?;
        }
        let mut print = FNV1A_START;
        let mut add = |name: &str, tensor: Tensor| {
            print = fnv1a_from(print, name.as_bytes());
            print = words(print, tensor.detach().contiguous()?.to_device(&Device::Cpu)?.bytes()?);
            Ok::<_, Error>(())
        };
        // One at a time: of deferred parameters none stays.
        self.params.iter().try_for_each(|(name, param)| add(name, param.value()?))?;
        self.params.buffers().try_for_each(|(name, buffer)| add(name, buffer))?;
        agree(&*ranks, print, "other weights")?;
        let accumulate = self.options.accumulate;
        if self.ranks.resumed {
            ensure!(
                size <= accumulate,
                Error::option(
                    OP,
                    format_args!(
                        "a step of the run has {accumulate} micro-batches, for at most as many ranks; got {size}"
                    )
                )
            );
        } else {
            self.options.accumulate = accumulate.saturating_mul(size);
            self.options.check(M::max_seq_len(&self.config))?;
        }
        let resumed = self.ranks.resumed;
        if size == 1 {
            return Ok(self);
        }
        let mut shards = None;
        if zero > 0 {
            let sharded = Sharded::by_buckets(&self.params, ranks.clone(), self.optimizer, bucket, &homes)?;
            let own = sharded.shards().clone();
            let average = |ema: Ema| match ema.is_deferred() {
                true => own.first_average(ema.decay()),
                false => own.own_average(&ema),
            };
            self.ema = self.ema.map(average).transpose()?;
            (shards, self.optimizer) = (Some(own), Box::new(sharded));
            self.load_deferred()?;
        }
        let reducer = Reducer::new(&self.params, ranks.clone(), overlap, bucket, &homes)?;
        let reducer = if zero >= 2 { reducer.eagerly() } else { reducer };
        let blocks = match shards.clone().filter(|_| zero == 3) {
            Some(own) => Some(Blocks::new(&layers, own, &frozen, &homes, &ranks, reducer.gatherer())?),
            None => None,
        };
        let reducer = Some(reducer);
        self.ranks = Ranks { reducer, shards, keeps_sums: zero >= 2, blocks, resumed, ..Ranks::default() };
        Ok(self)
    }

    /// Returns `true` if the weights for inference are put together from the parts of all ranks.
    pub(super) fn gathers(&self) -> bool {
        self.ranks.shards.is_some() && self.ema.is_some() || self.ranks.blocks.is_some()
    }

    /// Returns the ranks that train together, if there are several.
    pub fn ranks(&self) -> Option<&Arc<dyn Communicator>> {
        self.ranks.communicator()
    }

    /// Fails unless all ranks are to do the same; says what differs.
    fn same_as_first(&self, ranks: &dyn Communicator, options: RankOptions) -> Result<()> {
        let mut mine = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "model": M::config_to_json(&self.config),
            "checkpoint": json!(self.state()),
            "optimizer": self.optimizer.to_json(),
            "zero": options.zero,
            "bucket": options.bucket,
        });
        // By names of their own, so that a message is about the option.
        for key in ["options", "data"] {
            mine[key] = mine["checkpoint"][key].take();
        }
        let text = mine.to_string();
        let mut length = (text.len() as u64).to_le_bytes();
        ranks.broadcast_bytes(&mut length, 0)?;
        let mut first = text.into_bytes();
        first.resize(u64::from_le_bytes(length) as usize, 0);
        ranks.broadcast_bytes(&mut first, 0)?;
        let other = serde_json::from_slice(&first).ok();
        let unread = || Some("sent an unreadable description; use the same version on all ranks".to_string());
        let difference = other.map_or_else(unread, |first: Value| differs("", &first, &mine));
        // All ranks fail, with the words of the first that differs.
        const ROOM: usize = 1024;
        let mut words = difference.unwrap_or_default().into_bytes();
        words.resize(ROOM, 0);
        let mut all = vec![0; ROOM * ranks.size()];
        ranks.all_gather_bytes(&words, &mut all)?;
        let said = all.chunks_exact(ROOM).enumerate().find(|(_, words)| words[0] != 0);
        said.map_or(Ok(()), |(rank, words)| {
            let words = String::from_utf8_lossy(words);
            let words = words.trim_end_matches('\0');
            Err(Error::argument("ranks", format_args!("rank {rank} {words}; start all ranks with the same command")))
        })
    }

    /// Tells the other ranks what this one does, or checks that it does what rank 0 does.
    pub(super) fn lead(&self, command: Command) -> Result<()> {
        let Some(ranks) = self.ranks.communicator() else { return Ok(()) };
        let byte = match self.ranks.told.take() {
            Some(told) => told as u8,
            None => {
                let mut byte = [command as u8];
                ranks.broadcast_bytes(&mut byte, 0)?;
                byte[0]
            }
        };
        ensure!(
            byte == command as u8,
            Error::argument(
                "ranks",
                format_args!(
                    "rank 0 called {}, but rank {} {}; all ranks call the same methods in the same order",
                    Command::name(byte),
                    ranks.rank(),
                    Command::name(command as u8)
                )
            )
        );
        Ok(())
    }

    /// Does what rank 0 does, until it calls [`Trainer::end_ranks`]; `stop` says if this rank was asked to stop, which
    /// rank 0 reads from [`Trainer::asked_to_stop`].
    ///
    /// Errors: those of the methods that rank 0 calls; a call on rank 0, or without ranks.
    pub fn follow(&mut self, stop: &dyn Fn() -> bool) -> Result<()> {
        let ranks = self.ranks.communicator().filter(|ranks| ranks.rank() > 0).cloned();
        let ranks = ranks.ok_or_else(|| Error::argument("follow", "expected a rank above 0; rank 0 leads"))?;
        loop {
            let mut byte = [0];
            ranks.broadcast_bytes(&mut byte, 0)?;
            let command = Command::of(byte[0]);
            self.ranks.told.set(command);
            if stop() {
                self.ask_to_stop();
            }
            match command {
                Some(Command::End) => break self.end_ranks(),
                Some(Command::Step) => self.step().map(drop)?,
                Some(Command::Validate) => self.validate().map(drop)?,
                Some(Command::Save) => self.save("")?,
                Some(Command::Evaluate) => self.assist()?,
                None => {
                    let why = "rank 0 sent an unknown command; use the same version on all ranks";
                    return Err(Error::argument("ranks", why));
                }
            }
        }
    }

    /// Ends [`Trainer::follow`] on the other ranks.
    ///
    /// Errors: a failed transfer.
    pub fn end_ranks(&self) -> Result<()> {
        self.lead(Command::End)
    }

    /// Asks all ranks to stop: from the next step on, [`Trainer::asked_to_stop`] is `true` on all.
    pub fn ask_to_stop(&self) {
        self.ranks.asked.set([true, self.ranks.asked.get()[1]]);
    }

    /// Returns `true` if any rank was asked to stop before the last step. All ranks know the same.
    pub fn asked_to_stop(&self) -> bool {
        self.ranks.asked.get()[1]
    }

    /// The micro-batches of this rank in each step.
    pub(super) fn micros(&self) -> Vec<u64> {
        (0..self.options.accumulate as u64).filter(|&micro| self.ranks.has(micro)).collect_vec()
    }

    /// Runs a backward pass. Returns the gradients, unless they are summed over ranks.
    pub(super) fn backward(&mut self, tape: &mut Tape, output: &Tensor, start: &Tensor) -> Result<Option<Gradients>> {
        match &mut self.ranks.reducer {
            Some(reducer) => reducer.backward(tape, output, start).map(|()| None),
            None => tape.backward_with(output, start).map(Some),
        }
    }

    /// Returns a batch for passes that do not count, in stage 3 of ZeRO: the first of the step with targets, as there is no
    /// loss without. It is not requested ahead, which is in the order of this rank's batches.
    ///
    /// Errors: no target of the step counts. All ranks find that in their first micro-batch, before any waits for a pass of
    /// the others.
    pub(super) fn stand_in(&self) -> Result<Option<M::Batch>> {
        if self.ranks.blocks.is_none() {
            return Ok(None);
        }
        for micro in 0..self.options.accumulate as u64 {
            let request = self.options.request(self.step, micro, M::num_tokens(&self.config));
            let batch = self.data.source().batch(&request)?;
            if batch.weight() > 0.0 {
                return batch.to_device(&self.device).map(Some);
            }
        }
        Err(self.no_target())
    }

    pub(super) fn no_target(&self) -> Error {
        Error::argument("data", format_args!("no target of step {} counts; use larger batches", self.step))
    }

    /// Takes part in a round without gradients. In stage 3 of ZeRO that is a pass of any batch with targets, as the other
    /// ranks gather the weights of this one.
    pub(super) fn skip_round(&mut self, batch: Option<&M::Batch>) -> Result<()> {
        let Some(reducer) = &mut self.ranks.reducer else { return Ok(()) };
        let (Some(blocks), Some(batch)) = (&self.ranks.blocks, batch) else {
            return reducer.round(&mut Gradients::default());
        };
        let mut tape = Tape::train(0);
        let pass = blocks.pass(Pass::Train);
        let output = self.model.loss_recomputed(batch)?;
        let start = Tensor::ones(*output.shape(), output.dtype(), output.device())?;
        reducer.backward_muted(&mut tape, &output, &start)?;
        pass.end()
    }

    /// Sums losses and gradients over all ranks, in the order of the micro-batches. `batch`: any with targets, for rounds in
    /// which this rank has none.
    pub(super) fn sum(&mut self, micros: &[Micro], grads: &mut Gradients, batch: Option<&M::Batch>) -> Result<Part> {
        let of = |micro: &Micro| match micro {
            Some((loss, weight, targets)) => Ok([loss.item()? * weight, *weight, *targets as f64]),
            None => Ok([0.0; 3]),
        };
        let mut parts = micros.iter().map(of).try_collect_vec()?;
        let ranks = self.ranks.communicator().cloned();
        if let Some(ranks) = ranks {
            let rounds = self.options.accumulate.div_ceil(ranks.size());
            while parts.len() < rounds {
                self.skip_round(batch)?;
                parts.push([0.0; 3]);
            }
            if let Some(reducer) = &mut self.ranks.reducer {
                let sums = reducer.finish()?;
                match self.ranks.shards.as_ref().filter(|_| self.ranks.keeps_sums) {
                    Some(shards) => *grads = shards.gradients(sums)?,
                    None => reducer.gather(sums, grads)?,
                }
            }
            let asked = self.ranks.asked.get()[0];
            let mut mine = vec![u8::from(asked)];
            mine.extend(parts.iter().flatten().flat_map(|value| value.to_le_bytes()));
            let mut all = vec![0; mine.len() * ranks.size()];
            ranks.all_gather_bytes(&mine, &mut all)?;
            let of_rank = all.chunks_exact(mine.len()).collect_vec();
            self.ranks.asked.set([asked, of_rank.iter().any(|bytes| bytes[0] == 1)]);
            let value = |bytes: &[u8]| f64::from_le_bytes(std::array::from_fn(|at| bytes[at]));
            let of_round = |round: usize| of_rank.iter().map(move |bytes| &bytes[1 + 24 * round..]);
            let part = |bytes: &[u8]| [0, 8, 16].map(|at| value(&bytes[at..]));
            parts = (0..rounds).flat_map(|round| of_round(round).map(part).collect_vec()).collect_vec();
        }
        Ok(Part::of(&parts))
    }

    /// Returns `true` if this rank computes the number at an index: one in turn.
    pub(super) fn is_mine(&self, index: usize) -> bool {
        let [rank, size] = self.ranks.place().map(|number| number as usize);
        index % size == rank
    }

    /// Returns `true` if other ranks compute one number more of `count` than this one.
    pub(super) fn is_short_of(&self, count: usize) -> bool {
        let [rank, size] = self.ranks.place().map(|number| number as usize);
        (1..=rank).contains(&(count % size))
    }

    /// Returns `true` if it is on any rank.
    pub(super) fn any(&self, own: bool) -> Result<bool> {
        let Some(ranks) = self.ranks.communicator() else { return Ok(own) };
        let mut all = vec![0; ranks.size()];
        ranks.all_gather_bytes(&[u8::from(own)], &mut all)?;
        Ok(all.contains(&1))
    }

    /// Returns all numbers, `mine` of which this rank has computed.
    pub(super) fn gathered(&self, count: usize, mine: Vec<f64>) -> Result<Vec<f64>> {
        let [_, size] = self.ranks.place().map(|number| number as usize);
        let Some(ranks) = self.ranks.communicator() else { return Ok(mine) };
        let mut bytes = mine.into_iter().flat_map(f64::to_le_bytes).collect::<Vec<u8>>();
        bytes.resize(8 * count.div_ceil(size), 0);
        let mut all = vec![0; bytes.len() * size];
        ranks.all_gather_bytes(&bytes, &mut all)?;
        let value = |index: usize| {
            let at = index % size * bytes.len() + index / size * 8;
            f64::from_le_bytes(std::array::from_fn(|byte| all[at + byte]))
        };
        Ok((0..count).map(value).collect_vec())
    }

    /// Returns the first name that any rank has found in its part of the weights, if they are divided.
    pub(super) fn first_of_all(&self, found: Option<String>) -> Result<Option<String>> {
        let (Some(ranks), Some(_)) = (self.ranks.communicator(), &self.ranks.blocks) else { return Ok(found) };
        const ROOM: usize = 512;
        let mut name = found.unwrap_or_default().into_bytes();
        name.resize(ROOM, 0);
        let mut all = vec![0; ROOM * ranks.size()];
        ranks.all_gather_bytes(&name, &mut all)?;
        let name = all.chunks_exact(ROOM).find(|name| name[0] != 0);
        Ok(name.map(|name| String::from_utf8_lossy(name).trim_end_matches('\0').to_string()))
    }

    /// Returns the weights that this rank has as a whole.
    pub(super) fn whole_weights(&self) -> BTreeMap<String, Tensor> {
        let mut weights = self.params.state_dict();
        weights.retain(|_, tensor| !tensor.is_absent());
        weights
    }

    /// Takes part in [`Trainer::evaluate`] of another rank.
    fn assist(&self) -> Result<()> {
        self.lead(Command::Evaluate)?;
        let _swapped = self.swap_in()?;
        self.ranks.blocks.as_ref().map_or(Ok(()), |blocks| blocks.open(false).map(drop))
    }

    /// Updates the averaged weights, if there are any.
    pub(super) fn average(&mut self) -> Result<()> {
        match (&mut self.ema, &self.ranks.shards) {
            (Some(ema), Some(shards)) => shards.average(ema),
            (Some(ema), None) => ema.update(&self.params),
            (None, _) => Ok(()),
        }
    }

    /// Sets the parameters to the averaged weights, if there are any, until the guards are dropped.
    pub(super) fn swap_in(&self) -> Result<Vec<Swapped>> {
        Ok(match (&self.ema, &self.ranks.shards) {
            (Some(ema), Some(shards)) => shards.swap_in(ema)?.into(),
            (Some(ema), None) => vec![ema.swap_in(&self.params)?],
            (None, _) => Vec::new(),
        })
    }

    /// Saves a checkpoint whose optimizer's state is divided: each rank writes its part.
    pub(super) fn save_divided(
        &self,
        ranks: &dyn Communicator,
        sharded: &Sharded,
        checkpoint: &Checkpoint<Value>,
        averages: BTreeMap<String, Tensor>,
        folder: &Path,
    ) -> Result<()> {
        let own = self.ranks.shards.is_some();
        let (own, whole) = if own { (averages, BTreeMap::new()) } else { (BTreeMap::new(), averages) };
        let mut divided = sharded.divided(own)?;
        divided.whole.extend(whole);
        let model = match &self.ranks.blocks {
            Some(blocks) => Some(blocks.shards()[0].divided_model(&self.params)?),
            None => None,
        };
        let saved = divided.save(checkpoint, model.as_ref(), folder, ranks);
        if ranks.rank() == 0 { self.by_first(|| saved) } else { saved.and(self.by_first(|| Ok(()))) }
    }

    /// Calls `write` on rank 0; the others wait for it.
    pub(super) fn by_first(&self, write: impl FnOnce() -> Result<()>) -> Result<()> {
        let Some(ranks) = self.ranks.communicator() else { return write() };
        let mut done = [0];
        let mut result = Ok(());
        if ranks.rank() == 0 {
            result = write();
            done = [u8::from(result.is_ok())];
        }
        ranks.broadcast_bytes(&mut done, 0)?;
        result?;
        ensure!(done == [1], Error::argument("ranks", "rank 0 could not save; its message says why"));
        Ok(())
    }
}

/// Says in which value two trees differ, if they do.
fn differs(name: &str, first: &Value, mine: &Value) -> Option<String> {
    match (first, mine) {
        (Value::Object(first), Value::Object(mine)) => {
            let keys = first.keys().chain(mine.keys()).map(|key| (key, ())).collect::<OrderedMap<_, _>>();
            keys.keys().iter().find_map(|&key| {
                let of = |tree: &serde_json::Map<String, Value>| tree.get(key).cloned().unwrap_or_default();
                differs(&format!("{name}{}{key}", if name.is_empty() { "" } else { "." }), &of(first), &of(mine))
            })
        }
        _ => {
            let short = |value: &Value| value.to_string().chars().take(200).collect::<String>();
            (first != mine).then(|| format!("has `{name}` = {}, rank 0 {}", short(mine), short(first)))
        }
    }
}

/// Hashes bytes eight at a time.
fn words(print: u64, bytes: &[u8]) -> u64 {
    let mix = |print: u64, word: u64| (print ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    let chunks = bytes.chunks_exact(8);
    let print = fnv1a_from(print, chunks.remainder());
    chunks.fold(print, |print, word| mix(print, u64::from_le_bytes(std::array::from_fn(|at| word[at]))))
}
