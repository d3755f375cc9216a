//! Steps of generation as one CUDA graph.

use std::cell::RefCell;

use super::{DecodeCache, TransformerWrapper, sample_tokens};
use crate::{DType, Device, Error, Graph, ParamMap, Result, Tensor, config::SamplingConfig, error::ensure};

/// Decoding step as a CUDA graph: appends a token per row to a cache and draws the next one. Recorded once and
/// replayed with one driver call.
///
/// Tokens, lengths and the number of the step are inputs of the graph; nothing is read back. The tokens are the same
/// as with [`TransformerWrapper::extend`] and [`sample_tokens`].
#[derive(Debug)]
pub struct RecordedDecode {
    graph: Graph<Tensor>,
    cache: DecodeCache,
}

impl RecordedDecode {
    /// Records the step for this cache, which already holds the prompt. `params` are the model's. The graph keeps the
    /// memory of all weights: the model may be dropped.
    ///
    /// Errors: a cache that is empty, full or on the CPU; options whose steps do not run entirely on the device, such
    /// as attention that returns its scores; and those of [`Graph::capture`].
    pub fn new(
        model: &TransformerWrapper,
        params: &ParamMap,
        cache: DecodeCache,
        sampling: &SamplingConfig,
        seed: u64,
    ) -> Result<Self> {
        let device = model.token_emb().device();
        ensure!(device != Device::Cpu, Error::argument("graph", "expected a model on a GPU"));
        ensure!(!cache.is_empty(), Error::argument("graph", "expected a cache with a prompt; call `extend` first"));
        let batch = cache.batch();
        let tokens = Tensor::zeros([batch], DType::I64, &device)?;
        let inputs = inputs(&tokens, &cache, 0)?;
        let lengths = cache.lengths().to_vec();
        let cache = RefCell::new(cache);
        let graph = Graph::capture(&inputs, params, |inputs| {
            let [tokens, of_layers, of_tokens, step] = inputs else {
                return Err(Error::argument("graph", "expected four inputs"));
            };
            let mut cache = cache.borrow_mut();
            cache.follow(Some([of_layers.clone(), of_tokens.clone()]));
            let hidden = model.extend(&tokens.reshape([batch, 1])?, &vec![1; batch], None, &mut cache);
            cache.follow(None);
            let hidden = hidden?;
            // The first replay will overwrite the results of this run.
            cache.truncate(&lengths)?;
            let logits = model.logits(&hidden.select(1, 0)?)?;
            sample_tokens(&logits.detach(), sampling, seed, step)
        })?;
        Ok(Self { graph, cache: cache.into_inner() })
    }

    /// Appends `tokens`, `[b]` I64, to the rows and returns the next ones, `[b]`, sampled with draw `step` of each
    /// row's stream; they can be the input of the next call.
    ///
    /// Errors: a cache that is full, or shared with a clone that still exists, and those of [`Graph::replay`]; errors
    /// of the model and of the draws surface at the next read-back.
    pub fn step(&mut self, tokens: &Tensor, step: u64) -> Result<Tensor> {
        let longest = self.cache.lengths().iter().copied().max().unwrap_or(0);
        ensure!(
            longest < self.cache.capacity(),
            Error::argument("cache", format_args!("is full: a row already has {longest} tokens"))
        );
        ensure!(
            self.cache.is_unique(),
            Error::argument("cache", "a clone shares the sequences that the step overwrites; drop the clone")
        );
        let inputs = inputs(tokens, &self.cache, step)?;
        let next = self.graph.replay(&inputs)?.to_owned_copy()?;
        self.cache.count_one();
        Ok(next)
    }

    /// Returns the cache with all tokens so far.
    pub fn cache(&self) -> &DecodeCache {
        &self.cache
    }

    /// Returns the cache, to continue without the graph.
    pub fn into_cache(self) -> DecodeCache {
        self.cache
    }
}

/// Returns the inputs of the graph: tokens, both kinds of lengths, and the number of the step.
fn inputs(tokens: &Tensor, cache: &DecodeCache, step: u64) -> Result<[Tensor; 4]> {
    let device = tokens.device();
    let [of_layers, of_tokens] = cache.lengths_to_follow().map(|lengths| {
        let batch = lengths.len();
        Tensor::from_vec(lengths, [batch], device)
    });
    Ok([tokens.clone(), of_layers?, of_tokens?, Tensor::full([1], step as f64, DType::I64, device)?])
}
