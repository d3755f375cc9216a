//! Cache of growing sequences: keys, values, past inputs for token shift, and rows of custom branches.

use super::{
    ForwardOptions,
    attention::AttentionCache,
    step::{DecodeStep, Tables},
};
use crate::{
    DType, Device, Error, Result, Tensor,
    collect::CollectVec,
    error::{ErrorContext, ensure},
};

/// Cache of [`AttentionLayers::extend`](super::AttentionLayers::extend): one sequence per row of a batch, each with its
/// own length. Buffers are allocated once and written in place.
#[derive(Clone, Debug)]
pub struct LayersCache {
    /// Context, memories and path of attention, for all steps.
    pub(super) options: ForwardOptions,
    pub(super) layers: Vec<LayerCache>,
    pub(super) tables: Tables,
    batch: usize,
    capacity: usize,
    lengths: Vec<usize>,
    /// Lengths that steps read instead of the field above: a recorded graph reads new ones in each replay.
    followed: Option<Tensor>,
    /// Padding mask of all positions, `[b, 1, capacity, 1]`, once any position is padding.
    mask: Option<Tensor>,
    /// The same mask by rows.
    kept: Option<Vec<Vec<bool>>>,
}

/// Part of the cache that belongs to one sublayer.
#[derive(Clone, Debug, Default)]
pub(super) struct LayerCache {
    /// Inputs after the norm, `[b, 1, capacity, dim]`, if tokens are shifted.
    pub history: Option<Tensor>,
    pub attention: AttentionCache,
    /// Rows that a custom branch keeps, `[b, 1, capacity or more, width]` each: see [`Past`](super::Past).
    pub slots: Vec<Option<Tensor>>,
}

/// Call that continues sequences, as seen by one sublayer.
#[derive(Debug)]
pub(super) struct Decode<'c> {
    pub cache: &'c mut LayerCache,
    pub tables: &'c Tables,
    pub step: &'c DecodeStep,
}

impl LayersCache {
    pub(super) fn new(
        batch: usize,
        capacity: usize,
        layers: usize,
        tables: Tables,
        options: ForwardOptions,
    ) -> Result<Self> {
        ensure!(
            batch > 0 && capacity > 0,
            Error::argument(
                "cache",
                format_args!("expected at least one row and one position, got {batch} and {capacity}")
            )
        );
        Ok(Self {
            options,
            layers: vec![LayerCache::default(); layers],
            tables,
            batch,
            capacity,
            lengths: vec![0; batch],
            followed: None,
            mask: None,
            kept: None,
        })
    }

    /// Returns the number of rows.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Returns the maximum length of a sequence.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Returns the length of each row's sequence.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Truncates sequences: positions after the new lengths will be overwritten.
    ///
    /// Errors: the number of lengths differs from the number of rows, or a length exceeds that of its sequence.
    pub fn truncate(&mut self, lengths: &[usize]) -> Result<()> {
        ensure!(
            lengths.len() == self.batch && lengths.iter().zip(&self.lengths).all(|(new, old)| new <= old),
            Error::argument(
                "cache",
                format_args!("cannot shorten sequences of lengths {:?} to {lengths:?}", self.lengths)
            )
        );
        self.lengths.copy_from_slice(lengths);
        Ok(())
    }

    /// Reads lengths from this tensor, `[b]` I64, until the next call.
    #[cfg(feature = "cuda")]
    pub(crate) fn follow(&mut self, lengths: Option<Tensor>) {
        self.followed = lengths;
    }

    /// Returns `true` if nothing else shares the tensors that a step writes in place: keys, values, histories and
    /// masks.
    #[cfg(feature = "cuda")]
    pub(crate) fn is_unique(&mut self) -> bool {
        let of_layer = |layer: &mut LayerCache| {
            let LayerCache { history, attention: AttentionCache { keys_values, grows, .. }, slots } = layer;
            let keys_values = keys_values.iter_mut().flatten().filter(|_| *grows);
            keys_values.chain(history).chain(slots.iter_mut().flatten()).all(Tensor::is_unique)
        };
        self.layers.iter_mut().all(of_layer) && self.mask.as_mut().is_none_or(Tensor::is_unique)
    }

    /// Advances each row's length by the number of positions of the last call that belong to its sequence.
    pub(crate) fn advance(&mut self, counts: &[usize]) {
        self.lengths.iter_mut().zip(counts).for_each(|(length, count)| *length += count);
    }

    /// Selects these rows in this order; a row may be selected several times.
    ///
    /// Errors: no rows, or a row that does not exist.
    pub fn select_rows(&mut self, rows: &[usize]) -> Result<()> {
        ensure!(
            !rows.is_empty() && rows.iter().all(|&row| row < self.batch),
            Error::argument("cache", format_args!("cannot select rows {rows:?} from {}", self.batch))
        );
        let device =
            self.layers.iter_mut().flat_map(LayerCache::tensors_mut).next().map(|tensor| tensor.device().clone());
        self.batch = rows.len();
        self.lengths = rows.iter().map(|&row| self.lengths[row]).collect_vec();
        self.kept = self.kept.as_ref().map(|kept| rows.iter().map(|&row| kept[row].clone()).collect_vec());
        let Some(device) = device else { return Ok(()) };
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect_vec();
        let rows = Tensor::from_vec(rows, [self.batch], &device)?;
        let tensors = self.layers.iter_mut().flat_map(LayerCache::tensors_mut);
        tensors.chain(self.options.context.as_mut()).try_for_each(|tensor| select(tensor, &rows))?;
        let masks = self.mask.iter_mut().chain(self.options.context_mask.as_mut());
        masks.chain(self.options.mems.iter_mut().flatten()).try_for_each(|mask| select(mask, &rows))
    }

    /// Creates the step of the next `n` positions of every row.
    pub(super) fn step(&mut self, n: usize, mask: Option<&Tensor>, device: &Device) -> Result<DecodeStep> {
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        ensure!(n > 0, Error::argument("cache", "expected at least one new position"));
        let device_lengths = match &self.followed {
            Some(lengths) => lengths.clone(),
            None => {
                let lengths: Vec<i64> = self.lengths.iter().map(|&length| length as i64).collect_vec();
                Tensor::from_vec(lengths, [self.batch], device)?
            }
        };
        if mask.is_some() || self.mask.is_some() {
            self.write_mask(n, mask, &device_lengths)?;
        }
        let mask = match (mask, &self.mask) {
            (None, Some(_)) => Some(Tensor::ones([self.batch, n], DType::Bool, device)?),
            (mask, _) => mask.map(Tensor::contiguous).transpose()?,
        };
        Ok(DecodeStep {
            device_lengths,
            lengths: self.lengths.clone(),
            n,
            capacity: self.capacity,
            first: longest == 0,
            mask,
            whole_mask: self.mask.clone(),
            kept: self.kept.clone(),
        })
    }

    fn write_mask(&mut self, n: usize, mask: Option<&Tensor>, lengths: &Tensor) -> Result<()> {
        let (batch, capacity) = (self.batch, self.capacity);
        let new = match mask {
            Some(mask) => mask.to_vec::<bool>()?,
            None => vec![true; batch * n],
        };
        let kept = self.kept.get_or_insert_with(|| vec![vec![true; capacity]; batch]);
        for ((kept, &length), new) in kept.iter_mut().zip(&self.lengths).zip(new.chunks(n)) {
            kept.iter_mut().skip(length).zip(new).for_each(|(kept, &new)| *kept = new);
        }
        let mut whole = match self.mask.take() {
            Some(whole) => whole,
            None => Tensor::ones([batch, 1, capacity, 1], DType::Bool, lengths.device())?,
        };
        let new = Tensor::from_vec(new, [batch, 1, n, 1], lengths.device())?;
        whole.write_rows(&new, lengths, 0).context("mask")?;
        self.mask = Some(whole);
        Ok(())
    }
}

/// Selects rows of the first dimension into new packed storage.
fn select(tensor: &mut Tensor, rows: &Tensor) -> Result<()> {
    let mut shape = tensor.shape().to_vec();
    shape[0] = rows.numel();
    let width: usize = shape[1..].iter().product();
    let old_rows = tensor.shape()[0];
    let dtype = tensor.dtype();
    // Rows are looked up as in an embedding table, which must be float.
    let table = if dtype.is_float() { tensor.clone() } else { tensor.to_dtype(DType::F32)? };
    *tensor = table.reshape([old_rows, width])?.embedding(rows)?.to_dtype(dtype)?.reshape(shape)?;
    Ok(())
}

impl LayerCache {
    fn tensors_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let keys_values = self.attention.keys_values.iter_mut().flatten();
        keys_values.chain(&mut self.history).chain(self.slots.iter_mut().flatten())
    }

    /// Stores the inputs of a step; returns all inputs.
    pub fn remember(&mut self, x: &Tensor, step: &DecodeStep) -> Result<&Tensor> {
        let (batch, dim) = (x.dim(0)?, x.dim(2)?);
        let mut history = match self.history.take() {
            Some(history) => history,
            None => Tensor::zeros([batch, 1, step.capacity, dim], x.dtype(), x.device())?,
        };
        history.write_rows(&x.unsqueeze(1)?, &step.device_lengths, 0)?;
        Ok(self.history.insert(history))
    }
}
