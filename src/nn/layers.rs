//! Stacks of sublayers.

use std::sync::Arc;

use super::{
    AttentionInput, Branch, ForwardOptions, LayersCache, Linear, Norm, RelativePositionBias, Rotation,
    attention::{causal_mask, soft_clamp},
    cache::{Decode, LayerCache},
    key_masks::{drop_tokens, key_mask},
    layer::Layer,
    links::Links,
    positions::{PolarEmbedding, Turn},
    residual::Stream,
    step::{DecodeStep, Tables},
};
use crate::{
    DType, Error, Init, Param, ParamStore, Result, Tensor,
    autograd::dropout_stream,
    collect::CollectVec,
    config::{BranchPlan, Forget, LayerPlan, LayersPlan, RotaryPlan, ScoreResidual, ValueResidual},
    error::{ErrorContext, ensure},
    ops::Window,
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
    /// Masked scores of attention, if requested.
    pub scores: Vec<Tensor>,
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
    rotary: Option<Rotation>,
    /// Frequencies of the sinusoids of position-infused attention, `[dim / 2]`.
    infused: Option<Rotation>,
    polar: Option<PolarEmbedding>,
    /// Network on the condition.
    adaptive_mlp: Option<Linear>,
    /// Added to the input in each residual stream, `[streams, dim]`.
    stream_emb: Option<Param>,
    /// Final norm, unless it is the wrapper's.
    final_norm: Option<Norm>,
    links: Links,
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
    scores: Vec<Tensor>,
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
        let rotary = rotary.map(|plan| Rotation::new(plan, &store.at("rotary_pos_emb"))).transpose()?;
        let polar = plan.positions.polar;
        let polar = polar.map(|plan| PolarEmbedding::new(plan, &store.at("polar_pos_emb"))).transpose()?;
        let infused = plan.positions.infused.then(|| RotaryPlan::plain(plan.dim));
        let infused = infused.map(|plan| Rotation::new(&plan, &store.at("pia_pos_emb"))).transpose()?;
        let mut layer = |(index, layer): (usize, &LayerPlan)| {
            let custom = |store: &ParamStore| branches(index, layer, store);
            let place = store.at("layers").at(index);
            let dropped = plan.drops.of(index) > 0.0;
            Layer::new(layer, plan.dim, plan.norms_memories, rotary.as_ref(), &place, dropped, custom)
        };
        let count = plan.modules.len() + plan.idle.len();
        let mut modules = Vec::with_capacity(count);
        for index in 0..count {
            // Repeated layers share a module.
            let at = plan.modules.iter().position(|&module| module == index);
            let idle = || plan.idle.iter().find(|(module, _)| *module == index).map(|(_, layer)| layer);
            let Some(own) = at.map(|at| &plan.layers[at]).or_else(idle) else { break };
            modules.push(layer((index, own))?);
        }
        let layers: Vec<Layer> = plan.modules.iter().map(|&index| modules[index].clone()).collect_vec();
        let bias = RelativePositionBias::new(plan.positions.bias, &store.at("rel_pos"))?;
        let own_norm = plan.final_norm.filter(|_| plan.owns_final_norm);
        let final_norm = own_norm.map(|norm| Norm::new(norm, plan.dim, &store.at("final_norm"))).transpose()?;
        let network = plan.condition.and_then(|condition| Some((condition.dim, condition.inner?)));
        let network = network
            .map(|(dim, inner)| Linear::without_bias(&store.at("adaptive_mlp").at(0), dim, inner))
            .transpose()?;
        let streams = plan.streams > 1;
        let stream_emb =
            streams.then(|| store.param("stream_emb", [plan.streams, plan.dim], Init::Constant(0.0))).transpose()?;
        let links = Links::new(plan, store)?;
        let mut plan = plan.clone();
        for (plan, layer) in plan.layers.iter_mut().zip(&layers) {
            if layer.custom().is_some() {
                plan.branch = BranchPlan::Custom;
            }
        }
        let plan = Arc::new(plan);
        Ok(Self { plan, layers, bias, rotary, infused, polar, adaptive_mlp: network, stream_emb, final_norm, links })
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
        if let Some(order) = &options.layers_execute_order {
            let options = ForwardOptions { layers_execute_order: None, ..options.clone() };
            return self.in_order(order)?.forward(x, &options);
        }
        options.check(x, &self.plan)?;
        let options = self.complete(x, options)?;
        let Walked { stream, hiddens, attn, scores } = self.walk(x, &options, None)?;
        Ok(LayersOutput { out: self.finish(stream, None, &options)?, hiddens, attn, scores })
    }

    /// Runs [`AttentionLayers::forward`] and the norm that a wrapper has after its layers. Errors name the wrapper's
    /// places.
    pub(crate) fn forward_normed(
        &self,
        x: &Tensor,
        options: &ForwardOptions,
        norm: Option<&Norm>,
    ) -> Result<LayersOutput> {
        if let Some(order) = &options.layers_execute_order {
            let options = ForwardOptions { layers_execute_order: None, ..options.clone() };
            return self.in_order(order).context("attn_layers")?.forward_normed(x, &options, norm);
        }
        let walk = || {
            options.check(x, &self.plan)?;
            let options = self.complete(x, options)?;
            Ok((self.walk(x, &options, None)?, options))
        };
        let (Walked { stream, hiddens, attn, scores }, options) = walk().context("attn_layers")?;
        Ok(LayersOutput { out: self.finish(stream, norm, &options)?, hiddens, attn, scores })
    }

    /// Returns the layers with the sublayers of these numbers, in this order.
    ///
    /// Errors: no sublayer, one that the plan does not run, or layers that read those before them.
    fn in_order(&self, order: &[usize]) -> Result<Self> {
        const NAME: &str = "layers_execute_order";
        let links = &self.plan.links;
        ensure!(
            links.skips.is_empty() && links.integrate.is_none(),
            Error::argument(NAME, "cannot be used with `unet_skips` or `integrate_layers`")
        );
        let modules = &self.plan.modules;
        let missing = || {
            Error::argument(NAME, format_args!("expected some of {modules:?}, which the config runs, got {order:?}"))
        };
        let place = |number: &usize| modules.iter().position(|module| module == number).ok_or_else(missing);
        let places = order.iter().map(place).try_collect_vec()?;
        ensure!(!places.is_empty(), missing());
        let mut plan = LayersPlan::clone(&self.plan);
        plan.layers = places.iter().map(|&at| self.plan.layers[at].clone()).collect_vec();
        plan.modules = order.to_vec();
        let layers = places.iter().map(|&at| self.layers[at].clone()).collect_vec();
        Ok(Self { plan: Arc::new(plan), layers, ..self.clone() })
    }

    /// Applies what follows the last sublayer: the soft clamp, the sum of the streams, and the final norm, which may be
    /// a wrapper's.
    fn finish(&self, stream: Stream, norm: Option<&Norm>, options: &ForwardOptions) -> Result<Tensor> {
        let mut stream = stream;
        if let Some(bound) = self.plan.softclamp {
            stream = Stream::Whole(soft_clamp(&stream.whole()?, bound)?);
        }
        if self.plan.streams > 1 {
            stream = Stream::Whole(stream.whole()?.sum(&[2])?);
        }
        let (norm, place) = match &self.final_norm {
            Some(norm) => (Some(norm), "attn_layers.final_norm"),
            None => (norm, "norm"),
        };
        Ok(stream.normed(norm, options.condition.as_ref()).context(place)?.1)
    }

    /// Applies the network on the condition, `[b, dim_condition]` or `[b, n, dim_condition]`.
    fn complete_condition(&self, options: &ForwardOptions) -> Result<Option<Tensor>> {
        let condition = match (&options.condition, &self.plan.condition) {
            (None, None) => return Ok(None),
            (Some(condition), Some(plan)) if condition.shape().last() == Some(&plan.dim) => condition,
            (None, Some(_)) => return Err(Error::argument("condition", "is missing: norms or scales are adaptive")),
            (Some(condition), plan) => {
                let expected = plan.map_or_else(|| "none".to_string(), |plan| format!("[batch, {}]", plan.dim));
                let why = format_args!("expected {expected}, got {:?}", condition.shape()).to_string();
                return Err(Error::shape("condition", why));
            }
        };
        let condition = if condition.rank() == 2 { condition.unsqueeze(1)? } else { condition.clone() };
        Ok(Some(match &self.adaptive_mlp {
            Some(network) => network.forward(&condition).context("adaptive_mlp.0")?.silu()?,
            None => condition,
        }))
    }

    /// Completes the options: the network on the condition, the masks of prefixes and of left padding.
    fn complete(&self, x: &Tensor, options: &ForwardOptions) -> Result<ForwardOptions> {
        let mut options = ForwardOptions { condition: self.complete_condition(options)?, ..options.clone() };
        let n = x.dim(1)?;
        if self.plan.prefix {
            let mut mask = causal_mask(n, n, x)?;
            if let Some(lengths) = &options.prefix_attn_len {
                let within = Tensor::arange(n, x.device())?.lt(&lengths.reshape([lengths.numel(), 1, 1, 1])?)?;
                mask = mask.logical_or(&within)?;
            }
            options.attn_mask = Some(match &options.attn_mask {
                Some(given) => mask.logical_and(given)?,
                None => mask,
            });
        }
        if let Some(start) = &options.seq_start_pos {
            let kept = Tensor::arange(n, x.device())?.ge(&start.unsqueeze(-1)?)?;
            options.self_attn_kv_mask = Some(match &options.self_attn_kv_mask {
                Some(given) => kept.logical_and(given)?,
                None => kept,
            });
        }
        Ok(options)
    }

    /// Runs the sublayers in order, on whole sequences or on the next positions of those in a cache.
    fn walk(&self, x: &Tensor, options: &ForwardOptions, mut decoding: Option<Decoding<'_>>) -> Result<Walked> {
        let begins = decoding.as_ref().is_none_or(|decoding| decoding.step.first);
        let n = x.dim(1)?;
        let mut own = AttentionInput {
            query_mask: options.mask.clone(),
            attn_mask: options.attn_mask.clone(),
            return_attn: options.return_attn,
            return_scores: options.return_scores,
            sinusoids: if begins { self.sinusoids(x, options)? } else { None },
            explicit: options.explicit_attention,
            condition: options.condition.clone(),
            ..AttentionInput::default()
        };
        let turns = if begins { self.turns(x, options)? } else { None };
        let mut cross = AttentionInput {
            context: options.context.clone(),
            key_mask: options.context_mask.clone(),
            keys_may_be_empty: options.context_mask.is_some(),
            attn_mask: None,
            sinusoids: None,
            turns: self.context_turns(x, options)?,
            ..own.clone()
        };
        own.turns = turns;
        own.polar = self.polar.as_ref().map(|polar| polar.turn(x, options.pos.as_ref())).transpose()?;
        if begins {
            self.add_bias(&mut own, x, options)?;
        }
        let x = match &self.stream_emb {
            Some(streams) => x.unsqueeze(2)?.add(&streams.tensor())?,
            None => x.clone(),
        };
        let mut walked = Walked { stream: Stream::Whole(x), hiddens: Vec::new(), attn: Vec::new(), scores: Vec::new() };
        // Scores of the last self- and cross-attention, for the next one that adds them to its own.
        let (mut own_scores, mut cross_scores) = (None, None);
        // Values of the first ones, which later ones mix into their own.
        let (mut own_values, mut cross_values) = (None, None);
        let mut mems = options.mems.iter().flatten();
        let mut mem_masks = options.mem_masks.iter().flatten();
        let mut linked = self.links.start(&walked.stream)?;
        for (index, (layer, plan)) in self.layers.iter().zip(&self.plan.layers).enumerate() {
            let (module, share) = (self.plan.modules[index], self.plan.drops.cross_attn_tokens);
            let dropped = self.drops(module);
            let branch_inputs;
            (walked.stream, branch_inputs) = self.links.join(walked.stream, &mut linked, module, dropped)?;
            if dropped {
                continue;
            }
            if let (BranchPlan::CrossAttention(_), true, Some(context)) = (&plan.branch, share > 0.0, &options.context)
            {
                let kept = drop_tokens(context, cross.key_mask.as_ref(), share, options.context_mask.is_some())?;
                cross.key_mask = kept.or(cross.key_mask);
            }
            let (input, handed_on) = match &plan.branch {
                BranchPlan::SelfAttention(attention) => {
                    let mem = mems.next().cloned();
                    let key_mask = match &options.self_attn_kv_mask {
                        Some(mask) => Some(mask.clone()),
                        None => key_mask(options.mask.as_ref(), mem.as_ref(), mem_masks.next(), n)?,
                    };
                    let prev = own_scores.take();
                    let mixes = attention.value_residual != ValueResidual::None;
                    let value_residual = own_values.clone().filter(|_| mixes);
                    let keys_may_be_empty = options.self_attn_kv_mask.is_some();
                    let input =
                        AttentionInput { key_mask, mem, prev, value_residual, keys_may_be_empty, ..own.clone() };
                    (input, Some((&mut own_scores, &mut own_values)))
                }
                BranchPlan::CrossAttention(attention) => {
                    let mixes = attention.value_residual != ValueResidual::None;
                    let value_residual = cross_values.clone().filter(|_| mixes);
                    let input = AttentionInput { prev: cross_scores.take(), value_residual, ..cross.clone() };
                    (input, Some((&mut cross_scores, &mut cross_values)))
                }
                BranchPlan::FeedForward(_) | BranchPlan::Custom => {
                    let condition = options.condition.clone();
                    let query_mask = options.mask.clone();
                    (AttentionInput { query_mask, condition, ..AttentionInput::default() }, None)
                }
            };
            let input = AttentionInput { branch_inputs, ..input };
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
            if let Some((scores, values)) = handed_on {
                walked.scores.extend(output.scores.clone().filter(|_| options.return_scores));
                let chained = plan.branch.attention().is_some_and(|plan| plan.residual != ScoreResidual::None);
                *scores = output.scores.filter(|_| chained);
                if values.is_none() {
                    *values = output.values;
                }
            }
        }
        Ok(walked)
    }

    /// Returns `true` if training leaves this module out, by a draw from the tape (stochastic depth, Huang et al.,
    /// <https://arxiv.org/abs/1603.09382>).
    fn drops(&self, module: usize) -> bool {
        let probability = self.plan.drops.of(module);
        probability > 0.0 && dropout_stream("layer_dropout").is_some_and(|draws| draws.uniform(0) < probability)
    }

    /// Returns `Ok` if a KV cache gives the same numbers as [`AttentionLayers::forward`].
    ///
    /// Errors: the reason why growing sequences must be recomputed in each step.
    pub fn supports_kv_cache(&self, options: &ForwardOptions) -> std::result::Result<(), &'static str> {
        if self.plan.prefix {
            return Err("`prefix_attn_len` lets tokens see those after them: `kind` is PrefixDecoder");
        }
        let branches = || self.plan.layers.iter().map(|layer| &layer.branch);
        let own = branches().filter(|branch| matches!(branch, BranchPlan::SelfAttention(_)));
        if own.filter_map(BranchPlan::attention).any(|plan| !plan.causal) {
            return Err("tokens attend to later tokens: `kind` is not Decoder");
        }
        let shifts = || self.plan.layers.iter().filter_map(|layer| layer.wrap.shifts.as_ref());
        if shifts().flatten().any(|&amount| amount < 0) {
            return Err("`shift_tokens` shifts later tokens backwards: `kind` is not Decoder");
        }
        let cross = || {
            let cross = branches().filter(|branch| matches!(branch, BranchPlan::CrossAttention(_)));
            cross.filter_map(BranchPlan::attention)
        };
        if cross().any(|plan| plan.window != Window::default()) {
            return Err("`attn_max_attend_past` in cross-attention counts from the last token");
        }
        self.layers.iter().filter_map(Layer::custom).try_for_each(Branch::supports_kv_cache)?;
        if branches().filter_map(BranchPlan::attention).any(|plan| plan.selective) {
            return Err("`attn_selective` reads the scores of earlier queries");
        }
        if branches().filter_map(BranchPlan::attention).any(|plan| plan.forget != Forget::None) {
            return Err("`attn_data_dependent_alibi` reads the gates of all tokens");
        }
        if branches().filter_map(BranchPlan::attention).any(|plan| plan.rel_proj.is_some() || plan.cope.is_some()) {
            return Err("`attn_use_rel_proj_pos_bias` and `attn_use_cope` are computed for whole sequences");
        }
        if cross().any(|plan| plan.inverted) {
            return Err("`cross_attn_inverted_attention` lets all queries compete for a key");
        }
        if self.plan.layers.iter().any(|layer| layer.residual.orthogonal) {
            return Err("`orthog_residual` projects branches onto whole sequences");
        }
        if self.plan.layers.iter().any(|layer| layer.residual.split) {
            return Err("`mv_split_residual` reads the mean of all tokens");
        }
        if self.rotary.as_ref().is_some_and(Rotation::scales) {
            return Err("`rotary_xpos` scales keys by their distance from the middle of the sequence");
        }
        if self.plan.positions.polar.is_some() {
            return Err("`polar_pos_emb` turns all keys of a call at once");
        }
        if options.token_types.is_some() {
            return Err("`token_types` cover only the tokens of the prompt");
        }
        let of_all_tokens = [&options.pos, &options.sum_embeds, &options.attn_bias, &options.self_attn_kv_mask];
        let condition = options.condition.as_ref().is_some_and(|condition| condition.rank() == 3);
        if of_all_tokens.into_iter().any(Option::is_some) || condition || !options.embed_ids.is_empty() {
            return Err("an input of the call has a row for each token that is there");
        }
        let before = [&options.prepend_embeds, &options.seq_start_pos, &options.prefix_attn_len, &options.lens];
        if before.into_iter().any(Option::is_some) || options.mem_masks.is_some() || options.context_pos.is_some() {
            return Err("an input of the call is about all tokens at once");
        }
        if options.layers_execute_order.is_some() {
            return Err("`layers_execute_order` of a call is that of whole sequences");
        }
        if options.attn_mask.is_some() {
            return Err("`attn_mask` is given for the whole sequence");
        }
        if options.mask.is_some() && shifts().next().is_some() {
            return Err("`shift_tokens` mixes padding, which attends to later tokens, into other positions");
        }
        match dropout_stream("cache") {
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
            condition: self.complete_condition(options)?,
            ..ForwardOptions::default()
        };
        let memories = options.mems.iter().flatten().filter_map(|mem| mem.dim(1).ok()).max().unwrap_or(0);
        let positions = capacity.saturating_add(memories);
        let bias = self.bias.clone();
        let bias = bias.map(|bias| (bias, self.plan.positions.relative));
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
        self.finish(stream, None, &options)
    }

    /// Adds the bias on the scores of self-attention, if there is one.
    fn add_bias(&self, own: &mut AttentionInput, x: &Tensor, options: &ForwardOptions) -> Result<()> {
        let Some(bias) = self.bias.as_ref().filter(|_| self.plan.self_attentions() > 0) else {
            own.dense_bias = options.attn_bias.clone();
            return Ok(());
        };
        ensure!(
            options.attn_bias.is_none(),
            Error::argument("attn_bias", "cannot be used with a position bias of the layers")
        );
        if !self.plan.positions.relative {
            own.bias = Some(bias.forward().context("rel_pos")?);
            return Ok(());
        }
        let n = x.dim(1)?;
        let memories = options.mems.iter().flatten().map(|mem| mem.shape()[1]).max().unwrap_or(0);
        // T5's buckets of the fused op count queries and keys from 0.
        let plain = self.plan.layers.iter().all(|layer| match &layer.branch {
            BranchPlan::SelfAttention(plan) => plan.prefix_len() == 0,
            _ => true,
        });
        match &options.pos {
            Some(positions) => own.dense_bias = Some(bias.at(positions, x.dtype()).context("rel_pos")?),
            None => own.bias = Some(bias.relative(n, memories + n, plain, x.dtype()).context("rel_pos")?),
        }
        Ok(())
    }

    /// Returns the turns of queries and keys at explicit positions, or if features are scaled too.
    fn turns(&self, x: &Tensor, options: &ForwardOptions) -> Result<Option<[Turn; 2]>> {
        let Some(rotation) = self.rotary.as_ref().filter(|rotation| options.pos.is_some() || rotation.scales()) else {
            return Ok(None);
        };
        ensure!(
            options.mems.is_none() || options.pos.is_none(),
            Error::argument("mems", "cannot be used with `pos`, whose positions are those of the tokens")
        );
        let n = x.dim(1)?;
        let memories = options.mems.iter().flatten().map(|mem| mem.shape()[1]).max().unwrap_or(0);
        let counted = || {
            let first = Tensor::full((), memories as f64, DType::I64, x.device())?;
            Tensor::arange(memories + n, x.device())?.sub(&first)
        };
        let positions = options.pos.clone().map_or_else(counted, Ok)?;
        let [queries, keys] = rotation.turns(&positions, x)?;
        Ok(Some([if memories == 0 { queries } else { queries.last(n)? }, keys]))
    }

    /// Returns the turns of queries and of the keys of a context with positions.
    fn context_turns(&self, x: &Tensor, options: &ForwardOptions) -> Result<Option<[Turn; 2]>> {
        let Some(context) = &options.context_pos else { return Ok(None) };
        let none = || Error::argument("context_pos", "is given, but the layers have no rotation");
        let rotation = self.rotary.as_ref().ok_or_else(none)?;
        let own = options.pos.clone().map_or_else(|| Tensor::arange(x.dim(1)?, x.device()), Ok)?;
        let ([queries, _], [_, keys]) = (rotation.turns(&own, x)?, rotation.turns(context, x)?);
        Ok(Some([queries, keys]))
    }

    /// Returns sinusoids for the longest row of keys, shared by the layers.
    fn sinusoids(&self, x: &Tensor, options: &ForwardOptions) -> Result<Option<Tensor>> {
        let Some(rotation) = &self.infused else { return Ok(None) };
        let memories = options.mems.iter().flatten().map(|mem| mem.shape()[1]).max().unwrap_or(0);
        rotation.frequencies()?.sinusoid(0, memories + x.dim(1)?, x.dtype()).map(Some)
    }
}
