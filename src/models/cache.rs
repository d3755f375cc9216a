//! KV caches of the wrappers: the caches of the layers, plus memory tokens and positions.

use super::{
    ContinuousTransformerWrapper, TransformerWrapper,
    positions::{Absolute, with_real_tokens},
    transformer::norm,
};
use crate::{
    DType, Error, Result, Tensor,
    collect::CollectVec,
    config::Recurrence,
    error::{ErrorContext, ensure},
    nn::{ForwardOptions, LayersCache},
};

/// Keys, values and other state that a model keeps of growing sequences: one per row, each of its own length.
///
/// ```
/// use x_transformers::{
///     DType, Device, ParamStore, Tensor,
///     config::{AttentionLayersConfig, TransformerWrapperConfig},
///     models::{ForwardOptions, TransformerWrapper},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let config = TransformerWrapperConfig::new(256, 32, AttentionLayersConfig::decoder(16, 1));
/// let model = TransformerWrapper::new(&config, &ParamStore::new(0, DType::F64, &Device::Cpu))?;
/// let tokens = Tensor::from_slice(&[1i64, 2, 3], [1, 3], &Device::Cpu)?;
/// let all = model.forward(&tokens, &ForwardOptions::default())?.out;
///
/// let mut cache = model.cache(1, 32, &ForwardOptions::default())?;
/// for at in 0..3 {
///     let hidden = model.extend(&tokens.narrow(1, at, 1)?, &[1], None, &mut cache)?;
///     let difference = model.logits(&hidden)?.sub(&all.narrow(1, at, 1)?)?;
///     assert!(difference.to_vec::<f64>()?.iter().all(|x| x.abs() < 1e-12));
/// }
/// assert_eq!(cache.lengths(), [3]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DecodeCache {
    layers: LayersCache,
    memory_tokens: usize,
    /// Number of tokens in each row.
    lengths: Vec<usize>,
    /// The same on the device, where a recorded graph finds new ones in each replay.
    followed: Option<Tensor>,
}

impl DecodeCache {
    fn new(layers: LayersCache, memory_tokens: usize) -> Self {
        Self { lengths: vec![0; layers.batch()], layers, memory_tokens, followed: None }
    }

    /// Returns the number of rows.
    pub fn batch(&self) -> usize {
        self.layers.batch()
    }

    /// Returns the maximum number of tokens per row.
    pub fn capacity(&self) -> usize {
        self.layers.capacity() - self.memory_tokens
    }

    /// Returns the number of tokens in each row.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Truncates the rows to these lengths.
    ///
    /// Errors: a number of lengths other than the number of rows, or a length beyond the sequence.
    pub fn truncate(&mut self, lengths: &[usize]) -> Result<()> {
        let started = self.layers.lengths().iter().any(|&length| length > 0);
        let prefix_len = if started { self.memory_tokens } else { 0 };
        let with_memory: Vec<usize> = lengths.iter().map(|length| length + prefix_len).collect_vec();
        self.layers.truncate(&with_memory)?;
        self.lengths = lengths.to_vec();
        Ok(())
    }

    /// Selects these rows in this order; a row may be selected several times.
    ///
    /// Errors: no rows, or a row that does not exist.
    pub fn select_rows(&mut self, rows: &[usize]) -> Result<()> {
        self.layers.select_rows(rows)?;
        self.lengths = rows.iter().map(|&row| self.lengths[row]).collect_vec();
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.layers.lengths().iter().all(|&length| length == 0)
    }

    /// Checks new tokens, `n` per row.
    fn check(&self, b: usize, n: usize, counts: &[usize], mask: Option<&Tensor>) -> Result<()> {
        let fits = |(&count, &length): (&usize, &usize)| count <= n && length + count <= self.capacity();
        ensure!(
            b == self.batch() && counts.len() == b && n > 0 && counts.iter().zip(&self.lengths).all(fits),
            Error::argument(
                "cache",
                format_args!(
                    "cannot append {counts:?} of {n} new tokens in {b} rows to {} sequences of lengths {:?} with \
                     capacity {}",
                    self.batch(),
                    self.lengths,
                    self.capacity()
                )
            )
        );
        if let Some(mask) = mask {
            ensure!(
                **mask.shape() == [b, n] && mask.dtype() == DType::Bool,
                Error::shape("mask", format_args!("expected bool [{b}, {n}], got {:?} {}", mask.shape(), mask.dtype()))
            );
        }
        Ok(())
    }

    /// Returns the positions of the next `n` tokens; positions of padding stay below the limit. `None` at the start.
    fn positions(&self, n: usize, limit: usize, like: &Tensor) -> Result<Option<Tensor>> {
        if self.is_empty() {
            return Ok(None);
        }
        if let Some(lengths) = self.followed.as_ref().filter(|_| n == 1) {
            return lengths.reshape([self.lengths.len(), 1]).map(Some);
        }
        let row = |&length: &usize| (0..n).map(move |i| (length + i).min(limit.saturating_sub(1)) as i64);
        let positions: Vec<i64> = self.lengths.iter().flat_map(row).collect_vec();
        Tensor::from_vec(positions, [self.lengths.len(), n], like.device()).map(Some)
    }

    /// Returns the lengths as the layers count them, and in tokens, for [`DecodeCache::follow`].
    #[cfg(feature = "cuda")]
    pub(super) fn lengths_to_follow(&self) -> [Vec<i64>; 2] {
        [self.layers.lengths(), &self.lengths].map(|lengths| lengths.iter().map(|&length| length as i64).collect_vec())
    }

    /// Reads lengths from these tensors, `[b]` I64 each, until the next call.
    #[cfg(feature = "cuda")]
    pub(super) fn follow(&mut self, lengths: Option<[Tensor; 2]>) {
        let (of_layers, of_tokens) = lengths.map(|[of_layers, of_tokens]| (of_layers, of_tokens)).unzip();
        self.layers.follow(of_layers);
        self.followed = of_tokens;
    }

    /// Returns `true` if nothing else shares the memory that a step writes in place.
    #[cfg(feature = "cuda")]
    pub(super) fn is_unique(&mut self) -> bool {
        self.layers.is_unique()
    }

    /// Counts a token in each row, added by a graph.
    #[cfg(feature = "cuda")]
    pub(super) fn count_one(&mut self) {
        let ones = vec![1; self.lengths.len()];
        self.layers.advance(&ones);
        self.advance(&ones);
    }

    fn advance(&mut self, counts: &[usize]) {
        self.lengths.iter_mut().zip(counts).for_each(|(length, count)| *length += count);
    }
}

/// Returns the absolute positions of new tokens.
fn positions_of(embedding: &Absolute, cache: &DecodeCache, n: usize, like: &Tensor) -> Result<Tensor> {
    match cache.positions(n, embedding.limit(), like)? {
        Some(positions) => embedding.at(&positions),
        None => embedding.first(n),
    }
}

impl TransformerWrapper {
    /// Checks that these options allow a KV cache, like
    /// [`AttentionLayers::supports_kv_cache`](crate::nn::AttentionLayers::supports_kv_cache).
    pub fn supports_kv_cache(&self, options: &ForwardOptions) -> std::result::Result<(), &'static str> {
        if self.plan().memory_tokens_every.is_some() {
            return Err("`memory_tokens_interspersed_every` fills up the last group of tokens");
        }
        match self.plan().recurrence {
            Recurrence::Once => {}
            Recurrence::Recycled(_) => return Err("`recycling` reads the output of a whole pass before"),
            Recurrence::Looped(_) => return Err("`looped` has keys of its own in each pass"),
        }
        if self.plan().num_cls_tokens > 0 || self.plan().pool.as_ref().is_some_and(|pool| pool.used) {
            return Err("class tokens and pooled tokens read the whole sequence");
        }
        if self.plan().numerical_token.is_some() {
            return Err("`x_num` are the numbers of the tokens that are there");
        }
        if !self.plan().embeds.is_empty() {
            return Err("`embed_ids` are those of the tokens that are there");
        }
        self.attn_layers().supports_kv_cache(options)
    }

    /// Creates an empty cache for `batch` sequences of up to `capacity` tokens, at most `max_seq_len`, with the context
    /// and the memories of these options.
    ///
    /// Errors: [`TransformerWrapper::supports_kv_cache`], or no rows or tokens.
    pub fn cache(&self, batch: usize, capacity: usize, options: &ForwardOptions) -> Result<DecodeCache> {
        let options = self.layers_options(ForwardOptions { mask: None, ..options.clone() })?;
        let memory_tokens = self.plan().num_memory_tokens;
        let capacity = capacity.min(self.plan().window()).saturating_add(memory_tokens);
        let dtype = self.token_emb().dtype();
        let layers = self.attn_layers().cache(batch, capacity, dtype, &options).context("attn_layers")?;
        Ok(DecodeCache::new(layers, memory_tokens))
    }

    /// Appends the tokens `[b, n]` to sequences and returns their normed hidden states, `[b, n, dim]`, the input of
    /// [`TransformerWrapper::logits`].
    ///
    /// Only the first `counts[b]` tokens of each row count; the rest is padding, which allows rows of different
    /// lengths. `mask`, `[b, n]` Bool: `true` marks a real token.
    ///
    /// Errors: sequences that outgrow the cache, or tensors that do not fit.
    pub fn extend(
        &self,
        tokens: &Tensor,
        counts: &[usize],
        mask: Option<&Tensor>,
        cache: &mut DecodeCache,
    ) -> Result<Tensor> {
        self.check_tokens(tokens)?;
        let (b, n) = (tokens.shape()[0], tokens.shape()[1]);
        cache.check(b, n, counts, mask)?;
        let first = cache.is_empty();
        let mut x = self.embed_tokens(tokens, |emb| positions_of(emb, cache, n, tokens))?;
        let (mut counts_of_layers, mut layers_mask) = (counts.to_vec(), mask.cloned());
        let prefix_len = if first { self.plan().num_memory_tokens } else { 0 };
        if first && prefix_len > 0 {
            x = self.prepend_memory_tokens(&x)?;
            counts_of_layers.iter_mut().for_each(|count| *count += prefix_len);
            layers_mask = with_real_tokens(mask, prefix_len)?;
        }
        let layers = &mut cache.layers;
        let x =
            self.attn_layers().extend(&x, &counts_of_layers, layers_mask.as_ref(), layers).context("attn_layers")?;
        cache.advance(counts);
        norm(self.norm(), x.narrow(1, prefix_len, n)?)
    }
}

impl ContinuousTransformerWrapper {
    /// Checks that these options allow a KV cache, like
    /// [`AttentionLayers::supports_kv_cache`](crate::nn::AttentionLayers::supports_kv_cache).
    pub fn supports_kv_cache(&self, options: &ForwardOptions) -> std::result::Result<(), &'static str> {
        self.attn_layers().supports_kv_cache(options)
    }

    /// Creates an empty cache like [`TransformerWrapper::cache`].
    ///
    /// Errors: [`ContinuousTransformerWrapper::supports_kv_cache`], or no rows or vectors.
    pub fn cache(&self, batch: usize, capacity: usize, dtype: DType, options: &ForwardOptions) -> Result<DecodeCache> {
        let capacity = capacity.min(self.plan().window());
        let layers = self.attn_layers().cache(batch, capacity, dtype, options).context("attn_layers")?;
        Ok(DecodeCache::new(layers, 0))
    }

    /// Appends vectors `[b, n, dim_in]` to sequences and returns the outputs, `[b, n, dim_out]`, like
    /// [`TransformerWrapper::extend`].
    ///
    /// Errors: sequences that outgrow the cache, or tensors that do not fit.
    pub fn extend(
        &self,
        x: &Tensor,
        counts: &[usize],
        mask: Option<&Tensor>,
        cache: &mut DecodeCache,
    ) -> Result<Tensor> {
        self.check_vectors(x)?;
        let (b, n) = (x.shape()[0], x.shape()[1]);
        cache.check(b, n, counts, mask)?;
        let x = self.embed_vectors(x, |emb| positions_of(emb, cache, n, x))?;
        let x = self.attn_layers().extend(&x, counts, mask, &mut cache.layers).context("attn_layers")?;
        cache.advance(counts);
        self.outputs(norm(self.norm(), x)?)
    }
}
