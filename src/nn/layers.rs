//! Stacks of sublayers.

use std::sync::Arc;

use super::{
    AttentionInput, Branch, ForwardOptions, LayersCache, Linear, Norm, RelativePositionBias,
    cache::{Decode, LayerCache},
    layer::Layer,
    positions::rotary_frequencies,
    residual::Stream,
    step::{DecodeStep, Tables},
};
use crate::{
    Buffer, DType, Error, ParamStore, Result, Tensor,
    autograd::dropout_stream,
    collect::CollectVec,
    config::{BranchPlan, LayerPlan, LayersPlan, RotaryPlan},
    error::{ErrorContext, ensure},
    ops::{PositionBias, Window},
};

/// Output of attention layers.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LayersOutput {
    /// Hidden states, `[b, n, dim]`, without a final norm unless requested.
    pub out: Tensor,
    /// Input of each self-attention sublayer before its norm, `[b, n, dim]`.
    pub hiddens: Vec<Tensor>,
    /// Attention maps, if requested.
    pub attn: Vec<Tensor>,
}

/// Stack of attention layers: an `Encoder`, `Decoder` or `CrossAttender`.
///
/// ```
/// use x_transformers::{config::LayersPlan, nn::AttentionLayers, prelude::*};
/// let plan = LayersPlan::new(&AttentionLayersConfig::encoder(32, 2))?;
/// let layers = AttentionLayers::new(&plan, &ParamStore::new(0, DType::F32, &Device::Cpu))?;
/// let x = Tensor::ones([1, 5, 32], DType::F32, &Device::Cpu)?;
/// assert_eq!(layers.forward(&x, &ForwardOptions::default())?.out.shape()[..], [1, 5, 32]);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "Encoder")]
#[doc(alias = "Decoder")]
#[doc(alias = "CrossAttender")]
#[doc(alias = "TransformerEncoder")]
#[doc(alias = "TransformerDecoder")]
pub struct AttentionLayers {
    plan: Arc<LayersPlan>,
    layers: Vec<Layer>,
    bias: Option<RelativePositionBias>,
    /// Frequencies of the rotation, `[features / 2]`.
    rotary: Option<Buffer>,
    /// Frequencies of the sinusoids of position-infused attention, `[dim / 2]`.
    infused: Option<Buffer>,
}

/// Part of the cache that a call continues, and its step.
struct Decoding<'c> {
    caches: &'c mut [LayerCache],
    tables: &'c Tables,
    step: &'c DecodeStep,
}

/// The stream after the last layer, and the other outputs of the sublayers.
struct Walked {
    stream: Stream,
    hiddens: Vec<Tensor>,
    attn: Vec<Tensor>,
}

impl AttentionLayers {
    /// Creates the planned layers, with parameters at the store's place.
    pub fn new(plan: &LayersPlan, store: &ParamStore) -> Result<Self> {
        Self::with_branches(plan, store, |_, _, _| Ok(None))
    }

    /// Creates the planned layers with custom [`Branch`]es: `branches` receives each sublayer's index, its plan and the
    /// place of its branch's parameters, and returns a branch, or `None` for the planned one. Norms, residuals and
    /// wrappers around a branch stay as planned. With tied layers all blocks share the branches of the first.
    ///
    /// Errors: those of `branches`.
    pub fn with_branches(
        plan: &LayersPlan,
        store: &ParamStore,
        mut branches: impl FnMut(usize, &LayerPlan, &ParamStore) -> Result<Option<Arc<dyn Branch>>>,
    ) -> Result<Self> {
        let rotary = plan.positions.rotary.as_ref();
        let rotary = rotary.map(|plan| rotary_frequencies(plan, &store.at("rotary_pos_emb"))).transpose()?;
        let infused = plan.positions.infused.then(|| RotaryPlan::plain(plan.dim));
        let infused = infused.map(|plan| rotary_frequencies(&plan, &store.at("pia_pos_emb"))).transpose()?;
        let mut layer = |(index, layer): (usize, &LayerPlan)| {
            let custom = |store: &ParamStore| branches(index, layer, store);
            Layer::new(layer, plan.dim, rotary.as_ref(), &store.at("layers").at(index), custom)
        };
        let distinct: Vec<Layer> =
            plan.layers.iter().take(plan.distinct).enumerate().map(&mut layer).try_collect_vec()?;
        // Tied layers repeat the same modules.
        let layers: Vec<Layer> = distinct.iter().cycle().take(plan.layers.len()).cloned().collect_vec();
        let bias = RelativePositionBias::new(plan.positions.bias, &store.at("rel_pos"))?;
        let mut plan = plan.clone();
        for (plan, layer) in plan.layers.iter_mut().zip(&layers) {
            if layer.custom().is_some() {
                plan.branch = BranchPlan::Custom;
            }
        }
        Ok(Self { plan: Arc::new(plan), layers, bias, rotary, infused })
    }

    /// Calls `f` with each linear layer of the branches; those of norms, gates and custom branches are not among them.
    pub(crate) fn for_linears(&mut self, f: &mut dyn FnMut(&mut Linear) -> Result<()>) -> Result<()> {
        let mut layers = self.layers.iter_mut().enumerate();
        layers.try_for_each(|(index, layer)| layer.for_linears(f).context(format_args!("layers.{index}")))
    }

    /// Returns the plan of the layers, in which custom branches are [`BranchPlan::Custom`].
    pub fn plan(&self) -> &LayersPlan {
        &self.plan
    }

    /// Computes the layers: `[b, n, dim] → [b, n, dim]`.
    ///
    /// `return_embeddings` and `return_mems` are options of the wrappers and ignored here: the output contains both.
    ///
    /// Errors: a missing or unexpected context, or tensors whose shapes or dtypes do not match the options.
    pub fn forward(&self, x: &Tensor, options: &ForwardOptions) -> Result<LayersOutput> {
        options.check(x, &self.plan)?;
        let Walked { stream, hiddens, attn } = self.walk(x, options, None)?;
        Ok(LayersOutput { out: stream.whole()?, hiddens, attn })
    }

    /// Runs [`AttentionLayers::forward`] and the norm that a wrapper has after its layers. Errors name the wrapper's
    /// places.
    pub(crate) fn forward_normed(
        &self,
        x: &Tensor,
        options: &ForwardOptions,
        norm: Option<&Norm>,
    ) -> Result<LayersOutput> {
        let walk = || {
            options.check(x, &self.plan)?;
            self.walk(x, options, None)
        };
        let Walked { stream, hiddens, attn } = walk().context("attn_layers")?;
        Ok(LayersOutput { out: stream.normed(norm).context("norm")?.1, hiddens, attn })
    }

    /// Runs the sublayers in order, on whole sequences or on the next positions of those in a cache.
    fn walk(&self, x: &Tensor, options: &ForwardOptions, mut decoding: Option<Decoding<'_>>) -> Result<Walked> {
        let begins = decoding.as_ref().is_none_or(|decoding| decoding.step.first);
        let own = AttentionInput {
            query_mask: options.mask.clone(),
            attn_mask: options.attn_mask.clone(),
            return_attn: options.return_attn,
            bias: if begins { self.position_bias()? } else { None },
            sinusoids: if begins { self.sinusoids(x, options)? } else { None },
            explicit: options.explicit_attention,
            ..AttentionInput::default()
        };
        let cross = AttentionInput {
            context: options.context.clone(),
            key_mask: options.context_mask.clone(),
            attn_mask: None,
            bias: None,
            sinusoids: None,
            ..own.clone()
        };
        let mut walked = Walked { stream: Stream::Whole(x.clone()), hiddens: Vec::new(), attn: Vec::new() };
        // Scores of the last self- and cross-attention, for the next one that adds them to its own.
        let (mut own_scores, mut cross_scores) = (None, None);
        let mut mems = options.mems.iter().flatten();
        for (index, (layer, plan)) in self.layers.iter().zip(&self.plan.layers).enumerate() {
            let (input, scores) = match &plan.branch {
                BranchPlan::SelfAttention(_) => {
                    let mem = mems.next().cloned();
                    let key_mask = key_mask(options.mask.as_ref(), mem.as_ref())?;
                    (AttentionInput { key_mask, mem, prev: own_scores.take(), ..own.clone() }, Some(&mut own_scores))
                }
                BranchPlan::CrossAttention(_) => {
                    (AttentionInput { prev: cross_scores.take(), ..cross.clone() }, Some(&mut cross_scores))
                }
                BranchPlan::FeedForward(_) | BranchPlan::Custom => {
                    (AttentionInput { query_mask: options.mask.clone(), ..AttentionInput::default() }, None)
                }
            };
            let output = match &mut decoding {
                None if options.checkpoint_layers => layer.forward_checkpointed(walked.stream, &input),
                None => layer.forward(walked.stream, &input, None),
                Some(Decoding { caches, tables, step }) => {
                    layer.forward(walked.stream, &input, Some(Decode { cache: &mut caches[index], tables, step }))
                }
            };
            let output = output.context(format_args!("layers.{index}"))?;
            walked.stream = output.stream;
            walked.attn.extend(output.attn);
            if decoding.is_none() && matches!(plan.branch, BranchPlan::SelfAttention(_)) {
                walked.hiddens.push(output.input);
            }
            if let Some(scores) = scores {
                *scores = output.scores;
            }
        }
        Ok(walked)
    }

    /// Returns `Ok` if a KV cache gives the same numbers as [`AttentionLayers::forward`].
    ///
    /// Errors: the reason why growing sequences must be recomputed in each step.
    pub fn supports_kv_cache(&self, options: &ForwardOptions) -> std::result::Result<(), &'static str> {
        let branches = || self.plan.layers.iter().map(|layer| &layer.branch);
        let own = branches().filter(|branch| matches!(branch, BranchPlan::SelfAttention(_)));
        if own.filter_map(BranchPlan::attention).any(|plan| !plan.causal) {
            return Err("tokens attend to later tokens: `kind` is not Decoder");
        }
        let shifts = || self.plan.layers.iter().filter_map(|layer| layer.wrap.shifts.as_ref());
        if shifts().flatten().any(|&amount| amount < 0) {
            return Err("`shift_tokens` shifts later tokens backwards: `kind` is not Decoder");
        }
        let cross = branches().filter(|branch| matches!(branch, BranchPlan::CrossAttention(_)));
        if cross.filter_map(BranchPlan::attention).any(|plan| plan.window != Window::default()) {
            return Err("`attn_max_attend_past` in cross-attention counts from the last token");
        }
        self.layers.iter().filter_map(Layer::custom).try_for_each(Branch::supports_kv_cache)?;
        if options.token_types.is_some() {
            return Err("`token_types` cover only the tokens of the prompt");
        }
        if options.attn_mask.is_some() {
            return Err("`attn_mask` is given for the whole sequence");
        }
        if options.mask.is_some() && shifts().next().is_some() {
            return Err("`shift_tokens` mixes padding, which attends to later tokens, into other positions");
        }
        match dropout_stream() {
            Some(_) => Err("dropout is drawn for whole sequences"),
            None => Ok(()),
        }
    }

    /// Creates an empty cache for `batch` sequences of up to `capacity` positions, with the context and the memories of
    /// these options.
    ///
    /// Errors: those of [`AttentionLayers::supports_kv_cache`], or no rows or positions.
    pub fn cache(&self, batch: usize, capacity: usize, dtype: DType, options: &ForwardOptions) -> Result<LayersCache> {
        if let Err(why) = self.supports_kv_cache(options) {
            return Err(Error::argument("cache", format_args!("cannot be used: {why}")));
        }
        let options = ForwardOptions {
            context: options.context.clone(),
            context_mask: options.context_mask.clone(),
            mems: options.mems.clone(),
            explicit_attention: options.explicit_attention,
            ..ForwardOptions::default()
        };
        let memories = options.mems.iter().flatten().filter_map(|mem| mem.dim(1).ok()).max().unwrap_or(0);
        let positions = capacity.saturating_add(memories);
        let bias = self.position_bias()?;
        let tables = Tables::new(positions, self.rotary.as_ref(), self.infused.as_ref(), bias, dtype)?;
        LayersCache::new(batch, capacity, self.layers.len(), tables, options)
    }

    /// Computes the next `n` positions of every sequence as [`AttentionLayers::forward`] would: `[b, n, dim] → [b, n,
    /// dim]`.
    ///
    /// The first `counts[b]` positions of each row are appended to its sequence; later ones are computed and discarded,
    /// so that rows of different lengths can share a batch. `mask`: padding mask, `[b, n]`; `true` marks a real token.
    ///
    /// Errors: sequences that exceed the cache's capacity, or tensors that do not match.
    pub fn extend(
        &self,
        x: &Tensor,
        counts: &[usize],
        mask: Option<&Tensor>,
        cache: &mut LayersCache,
    ) -> Result<Tensor> {
        let mut options = ForwardOptions { mask: mask.cloned(), ..cache.options.clone() };
        if cache.lengths().iter().any(|&length| length > 0) {
            // Memories were added with the first positions.
            options.mems = None;
        }
        options.check(x, &self.plan)?;
        let (b, n) = (x.shape()[0], x.shape()[1]);
        let fits = |(&count, &length): (&usize, &usize)| count <= n && length + count <= cache.capacity();
        ensure!(
            b == cache.batch() && counts.len() == b && counts.iter().zip(cache.lengths()).all(fits),
            Error::shape(
                "cache",
                format_args!(
                    "cannot append {counts:?} of {n} new positions in {b} rows to {} sequences of lengths {:?} with \
                     capacity {}",
                    cache.batch(),
                    cache.lengths(),
                    cache.capacity()
                )
            )
        );
        let step = cache.step(n, mask, x.device())?;
        options.mask = step.mask.clone();
        let decoding = Decoding { caches: &mut cache.layers, tables: &cache.tables, step: &step };
        let Walked { stream, .. } = self.walk(x, &options, Some(decoding))?;
        drop(step);
        cache.advance(counts);
        stream.whole()
    }

    /// Returns the bias on the scores of self-attention, if there is one.
    fn position_bias(&self) -> Result<Option<PositionBias>> {
        self.bias.as_ref().map(RelativePositionBias::forward).transpose().context("rel_pos")
    }

    /// Returns sinusoids for the longest row of keys, shared by the layers.
    fn sinusoids(&self, x: &Tensor, options: &ForwardOptions) -> Result<Option<Tensor>> {
        let Some(frequencies) = &self.infused else { return Ok(None) };
        let memories = options.mems.iter().flatten().map(|mem| mem.shape()[1]).max().unwrap_or(0);
        frequencies.tensor().sinusoid(0, memories + x.dim(1)?, x.dtype()).map(Some)
    }
}

/// Returns the mask of the keys: that of the tokens, preceded by `true` for memories.
fn key_mask(mask: Option<&Tensor>, mem: Option<&Tensor>) -> Result<Option<Tensor>> {
    match (mask, mem) {
        (Some(mask), Some(mem)) => {
            let kept = Tensor::ones([mem.dim(0)?, mem.dim(1)?], DType::Bool, mem.device())?;
            Tensor::cat(&[&kept, mask], 1).map(Some)
        }
        (mask, _) => Ok(mask.cloned()),
    }
}
