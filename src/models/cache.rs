//! Wrappers that continue sequences: what the layers keep, behind memory tokens and positions.

use super::{ContinuousTransformerWrapper, TransformerWrapper, transformer::norm};
use crate::{
    DType, Error, Result, Tensor,
    error::{ErrorContext, ensure},
    nn::{AbsolutePositionalEmbedding, ForwardOptions, LayersCache},
};

/// Keys, values and whatever else a model keeps of sequences that grow: one per row, each of its own length.
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
    /// Tokens of each row.
    lengths: Vec<usize>,
    /// The same on the device, where a recorded graph finds others in each replay.
    followed: Option<Tensor>,
}

impl DecodeCache {
    fn new(layers: LayersCache, memory_tokens: usize) -> Self {
        Self { lengths: vec![0; layers.batch()], layers, memory_tokens, followed: None }
    }

    /// Rows.
    pub fn batch(&self) -> usize {
        self.layers.batch()
    }

    /// Tokens that fit into each row.
    pub fn capacity(&self) -> usize {
        self.layers.capacity() - self.memory_tokens
    }

    /// Tokens of each row.
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Forgets what is behind these lengths.
    ///
    /// Errors: another number of lengths than rows, or one that is longer than the sequence.
    pub fn truncate(&mut self, lengths: &[usize]) -> Result<()> {
        let started = self.layers.lengths().iter().any(|&length| length > 0);
        let prefix_len = if started { self.memory_tokens } else { 0 };
        let with_memory: Vec<usize> = lengths.iter().map(|length| length + prefix_len).collect();
        self.layers.truncate(&with_memory)?;
        self.lengths = lengths.to_vec();
        Ok(())
    }

    /// Takes these rows in this order; a row may be taken several times.
    ///
    /// Errors: no rows, or one that does not exist.
    pub fn select_rows(&mut self, rows: &[usize]) -> Result<()> {
        self.layers.select_rows(rows)?;
        self.lengths = rows.iter().map(|&row| self.lengths[row]).collect();
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.layers.lengths().iter().all(|&length| length == 0)
    }

    /// Checks new tokens, `n` a row.
    fn check(&self, b: usize, n: usize, counts: &[usize], mask: Option<&Tensor>) -> Result<()> {
        let fits = |(&count, &length): (&usize, &usize)| count <= n && length + count <= self.capacity();
        ensure!(
            b == self.batch() && counts.len() == b && n > 0 && counts.iter().zip(&self.lengths).all(fits),
            Error::argument(
                "cache",
                format_args!(
                    "{counts:?} of {n} new tokens in {b} rows do not fit {} sequences of {:?}, up to {}",
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

    /// Positions of the next `n` tokens; those that will be forgotten stay below the limit. `None` at the start.
    fn positions(&self, n: usize, limit: usize, like: &Tensor) -> Result<Option<Tensor>> {
        if self.is_empty() {
            return Ok(None);
        }
        if let Some(lengths) = self.followed.as_ref().filter(|_| n == 1) {
            return lengths.reshape([self.lengths.len(), 1]).map(Some);
        }
        let row = |&length: &usize| (0..n).map(move |i| (length + i).min(limit.saturating_sub(1)) as i64);
        let positions: Vec<i64> = self.lengths.iter().flat_map(row).collect();
        Tensor::from_vec(positions, [self.lengths.len(), n], like.device()).map(Some)
    }

    /// Lengths as the layers count them, and as tokens are counted, for [`DecodeCache::follow`].
    #[cfg(feature = "cuda")]
    pub(super) fn lengths_to_follow(&self) -> [Vec<i64>; 2] {
        [self.layers.lengths(), &self.lengths].map(|lengths| lengths.iter().map(|&length| length as i64).collect())
    }

    /// Takes lengths from these tensors, `[b]` I64 each, until it is told otherwise.
    #[cfg(feature = "cuda")]
    pub(super) fn follow(&mut self, lengths: Option<[Tensor; 2]>) {
        let (of_layers, of_tokens) = lengths.map(|[of_layers, of_tokens]| (of_layers, of_tokens)).unzip();
        self.layers.follow(of_layers);
        self.followed = of_tokens;
    }

    /// Returns `true` if nothing else shares what a step writes in place.
    #[cfg(feature = "cuda")]
    pub(super) fn is_unique(&mut self) -> bool {
        self.layers.is_unique()
    }

    /// Counts a token in each row, which a graph has added.
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

/// Absolute positions of new tokens.
fn positions_of(
    embedding: &AbsolutePositionalEmbedding,
    cache: &DecodeCache,
    n: usize,
    like: &Tensor,
) -> Result<Tensor> {
    match cache.positions(n, embedding.len(), like)? {
        Some(positions) => embedding.at(&positions),
        None => embedding.forward(n),
    }
}

impl TransformerWrapper {
    /// As [`AttentionLayers::supports_kv_cache`](crate::nn::AttentionLayers::supports_kv_cache).
    pub fn supports_kv_cache(&self, options: &ForwardOptions) -> std::result::Result<(), &'static str> {
        self.attn_layers().supports_kv_cache(options)
    }

    /// An empty cache for `batch` sequences of up to `capacity` tokens, at most `max_seq_len`, with the context and the
    /// memories of these options.
    ///
    /// Errors: [`TransformerWrapper::supports_kv_cache`], or no rows or tokens.
    pub fn cache(&self, batch: usize, capacity: usize, options: &ForwardOptions) -> Result<DecodeCache> {
        let options = self.layers_options(&ForwardOptions { mask: None, ..options.clone() })?;
        let memory_tokens = self.plan().num_memory_tokens;
        let capacity = capacity.min(self.plan().window()).saturating_add(memory_tokens);
        let dtype = self.token_emb().table().dtype();
        let layers = self.attn_layers().cache(batch, capacity, dtype, &options).context("attn_layers")?;
        Ok(DecodeCache::new(layers, memory_tokens))
    }

    /// Adds the tokens `[b, n]` to sequences and gives their normed hidden states, `[b, n, dim]`, the input of
    /// [`TransformerWrapper::logits`].
    ///
    /// Of each row the first `counts[b]` tokens count; what is behind them is computed and forgotten, so that rows of
    /// different lengths go together. `mask` `[b, n]`: which of them are no padding.
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
        let mut x = self.embed_tokens(tokens, None, |emb| positions_of(emb, cache, n, tokens))?;
        let (mut counts_of_layers, mut layers_mask) = (counts.to_vec(), mask.cloned());
        let prefix_len = if first { self.plan().num_memory_tokens } else { 0 };
        if first && prefix_len > 0 {
            x = self.prepend_memory_tokens(&x)?;
            counts_of_layers.iter_mut().for_each(|count| *count += prefix_len);
            layers_mask = self.mask_with_memory_tokens(mask)?;
        }
        let layers = &mut cache.layers;
        let x =
            self.attn_layers().extend(&x, &counts_of_layers, layers_mask.as_ref(), layers).context("attn_layers")?;
        cache.advance(counts);
        norm(self.norm(), x.narrow(1, prefix_len, n)?)
    }
}

impl ContinuousTransformerWrapper {
    /// As [`AttentionLayers::supports_kv_cache`](crate::nn::AttentionLayers::supports_kv_cache).
    pub fn supports_kv_cache(&self, options: &ForwardOptions) -> std::result::Result<(), &'static str> {
        self.attn_layers().supports_kv_cache(options)
    }

    /// As [`TransformerWrapper::cache`].
    ///
    /// Errors: [`ContinuousTransformerWrapper::supports_kv_cache`], or no rows or vectors.
    pub fn cache(&self, batch: usize, capacity: usize, dtype: DType, options: &ForwardOptions) -> Result<DecodeCache> {
        let capacity = capacity.min(self.plan().window());
        let layers = self.attn_layers().cache(batch, capacity, dtype, options).context("attn_layers")?;
        Ok(DecodeCache::new(layers, 0))
    }

    /// Adds vectors `[b, n, dim_in]` to sequences and gives the outputs, `[b, n, dim_out]`, as
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
