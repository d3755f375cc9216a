//! A stack of sublayers: norm, branch, norm, residual, norm.

use std::sync::Arc;

use super::{
    Attention, AttentionInput, FeedForward, LayersCache, Linear, Norm, PositionBias, Residual, ScoreBias,
    cache::{DecodeStep, LayerCache, Tables},
    positions::inverse_frequencies,
    residual::Stream,
    wrap::Wrap,
};
use crate::{
    Buffer, DType, Error, ParamStore, Result, Tensor,
    autograd::dropout_stream,
    checkpoint,
    config::{BranchPlan, LayerPlan, LayerType, LayersPlan, RotaryPlan},
    error::{ErrorContext, ensure},
};

/// What a forward pass is given besides its input. The default is none of it.
#[derive(Clone, Debug, Default)]
pub struct ForwardOptions {
    /// Which tokens are no padding: `[b, n]` Bool, true keeps. With memories, those are all kept.
    pub mask: Option<Tensor>,
    /// What cross-attention attends to: `[b, m, dim]`.
    pub context: Option<Tensor>,
    /// Which of its positions are no padding: `[b, m]` Bool.
    pub context_mask: Option<Tensor>,
    /// Which pairs may meet in self-attention: Bool, `[i, j]`, `[heads, i, j]` or `[b, heads, i, j]`, sizes of 1
    /// broadcast. It covers memories, memory tokens and memory key/values too.
    pub attn_mask: Option<Tensor>,
    /// The memories that the previous segment gave, one `[b, memories, dim]` per self-attention, the first one first.
    pub mems: Option<Vec<Tensor>>,
    /// The type of each token, `[b, n]` I64, for models with `num_token_types`. Default all 0.
    pub token_types: Option<Tensor>,
    /// Give the normed hidden states instead of logits.
    pub return_embeddings: bool,
    /// Give new memories.
    pub return_mems: bool,
    /// Give the attention maps, `[b, heads, i, j]`, self- and cross-attention in the order of the layers.
    pub return_attn: bool,
    /// Keep only the inputs of sublayers for the backward pass, which runs each of them again.
    pub checkpoint_layers: bool,
    /// Compute every attention from its matrix of scores, even where the fused op would do. For comparisons.
    pub explicit_attention: bool,
}

impl ForwardOptions {
    /// Refuses to be asked for more than the output, by calls that give a loss or a continuation.
    pub(crate) fn ask_for_output_alone(&self, op: &'static str) -> Result<()> {
        let asked = [
            ("return_embeddings", self.return_embeddings),
            ("return_mems", self.return_mems),
            ("return_attn", self.return_attn),
        ];
        match asked.into_iter().find(|(_, asked)| *asked) {
            Some((name, _)) => {
                Err(Error::argument(op, format!("has no place for `{name}`; use `forward` of the wrapped model")))
            }
            None => Ok(()),
        }
    }
}

/// What attention layers give.
#[derive(Clone, Debug)]
pub struct LayersOutput {
    /// `[b, n, dim]`, without a final norm unless it was asked for.
    pub out: Tensor,
    /// The input of each self-attention sublayer before its norm, `[b, n, dim]`.
    pub hiddens: Vec<Tensor>,
    /// The attention maps, if they were asked for.
    pub attn: Vec<Tensor>,
}

/// An `Encoder`, `Decoder` or `CrossAttender`.
#[derive(Clone, Debug)]
pub struct AttentionLayers {
    plan: Arc<LayersPlan>,
    layers: Vec<Layer>,
    bias: PositionBias,
    /// Frequencies of the rotation, `[features / 2]`.
    rotary: Option<Buffer>,
    /// Frequencies of the sinusoids of position-infused attention, `[dim / 2]`.
    infused: Option<Buffer>,
}

/// One sublayer.
#[derive(Clone, Debug)]
struct Layer {
    norms: [Option<Norm>; 3],
    wrap: Wrap,
    branch: Branch,
    residual: Residual,
}

#[derive(Clone, Debug)]
enum Branch {
    Attention(Box<Attention>),
    FeedForward(FeedForward),
}

/// What a sublayer gives: the stream before and behind it, and from attention the scores to hand on and the map.
struct LayerOutput {
    input: Tensor,
    stream: Stream,
    scores: Option<Tensor>,
    attn: Option<Tensor>,
}

impl Layer {
    fn new(plan: &LayerPlan, dim: usize, rotary: Option<&Buffer>, store: &ParamStore) -> Result<Self> {
        let norm =
            |place: usize| plan.norms[place].map(|norm| Norm::new(norm, dim, &store.at(0).at(place))).transpose();
        let (wrap, place) = Wrap::new(&plan.wrap, &store.at(1))?;
        let branch = match &plan.branch {
            BranchPlan::SelfAttention(plan) => Branch::Attention(Box::new(Attention::new(plan, rotary, &place)?)),
            BranchPlan::CrossAttention(plan) => Branch::Attention(Box::new(Attention::new(plan, None, &place)?)),
            BranchPlan::FeedForward(plan) => Branch::FeedForward(FeedForward::new(plan, &place)?),
        };
        let residual = Residual::new(plan.residual, dim, &store.at(2))?;
        Ok(Self { norms: [norm(0)?, norm(1)?, norm(2)?], wrap, branch, residual })
    }

    fn forward(&self, stream: Stream, input: &AttentionInput) -> Result<LayerOutput> {
        let (x, normed) = stream.normed(self.norms[0].as_ref()).context("0.0")?;
        let (out, scores, attn) = match &self.branch {
            Branch::Attention(attention) => {
                let normed = self.wrap.input(&normed, input.query_mask.as_ref()).context(1)?;
                let output = attention.forward(&normed, input).context(1)?;
                (output.out, output.scores, output.attn)
            }
            Branch::FeedForward(feedforward) => {
                let normed = self.wrap.input(&normed, None).context(1)?;
                (feedforward.forward(&normed).context(1)?, None, None)
            }
        };
        self.join(x, out, scores, attn)
    }

    /// As [`Layer::forward`] for the next positions of sequences.
    fn extend(
        &self,
        stream: Stream,
        input: &AttentionInput,
        cache: &mut LayerCache,
        tables: &Tables,
        step: &DecodeStep,
    ) -> Result<LayerOutput> {
        let (x, normed) = stream.normed(self.norms[0].as_ref()).context("0.0")?;
        let attends = matches!(self.branch, Branch::Attention(_));
        let normed = self.wrap.next_input(&normed, attends, cache, step).context(1)?;
        let (out, scores) = match &self.branch {
            Branch::Attention(attention) => {
                let output = attention.extend(&normed, input, &mut cache.attention, tables, step).context(1)?;
                (output.out, output.scores)
            }
            Branch::FeedForward(feedforward) => (feedforward.forward(&normed).context(1)?, None),
        };
        self.join(x, out, scores, None)
    }

    /// What follows the branch, of which `x` was the input before its norm.
    fn join(&self, x: Tensor, out: Tensor, scores: Option<Tensor>, attn: Option<Tensor>) -> Result<LayerOutput> {
        let out = Stream::Whole(self.wrap.output(out).context(1)?).normed(self.norms[1].as_ref()).context("0.1")?.1;
        let mut stream = self.residual.forward(out, x.clone()).context(2)?;
        if let Some(norm) = &self.norms[2] {
            stream = Stream::Whole(stream.normed(Some(norm)).context("0.2")?.1);
        }
        Ok(LayerOutput { input: x, stream, scores, attn })
    }

    /// As [`Layer::forward`], keeping nothing but the inputs for the backward pass.
    fn forward_checkpointed(&self, x: &Tensor, input: &AttentionInput) -> Result<Tensor> {
        let mut input = input.clone();
        // What gradients flow into has to be an input of the checkpoint; the closure captures the rest.
        let flowing: Vec<Tensor> = flowing_mut(&mut input).map(|tensor| tensor.clone()).collect();
        let inputs: Vec<&Tensor> = std::iter::once(x).chain(&flowing).collect();
        let layer = self.clone();
        let run = move |given: &[Tensor]| {
            let mut input = input.clone();
            for (slot, given) in flowing_mut(&mut input).zip(&given[1..]) {
                *slot = given.clone();
            }
            layer.forward(Stream::Whole(given[0].clone()), &input)?.stream.whole()
        };
        checkpoint(run, &inputs)
    }
}

/// The inputs of attention that gradients flow into.
fn flowing_mut(input: &mut AttentionInput) -> impl Iterator<Item = &mut Tensor> {
    let bias = input.bias.as_mut().map(ScoreBias::weights_mut);
    [input.context.as_mut(), input.mem.as_mut(), bias].into_iter().flatten()
}

impl AttentionLayers {
    /// As planned; the place is that of the layers.
    pub fn new(plan: &LayersPlan, store: &ParamStore) -> Result<Self> {
        let rotary = plan.positions.rotary.as_ref();
        let rotary = rotary.map(|plan| inverse_frequencies(plan, &store.at("rotary_pos_emb"))).transpose()?;
        let infused = plan.positions.infused.then(|| RotaryPlan::plain(plan.dim));
        let infused = infused.map(|plan| inverse_frequencies(&plan, &store.at("pia_pos_emb"))).transpose()?;
        let layer = |(index, layer)| Layer::new(layer, plan.dim, rotary.as_ref(), &store.at("layers").at(index));
        let mut layers: Vec<_> =
            plan.layers.iter().take(plan.distinct).enumerate().map(layer).collect::<Result<_>>()?;
        // Tied ones are the same modules again.
        layers = layers.iter().cycle().take(plan.layers.len()).cloned().collect();
        let bias = PositionBias::new(plan.positions.bias, &store.at("rel_pos"))?;
        Ok(Self { plan: Arc::new(plan.clone()), layers, bias, rotary, infused })
    }

    /// Computes with the weights of all linear layers in eight bits from now on; norms and gates stay as they are.
    ///
    /// Errors: weights that are not finite.
    pub fn quantize_int8(&mut self) -> Result<()> {
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let quantized = match &mut layer.branch {
                Branch::Attention(attention) => attention.linears_mut().try_for_each(Linear::quantize_int8),
                Branch::FeedForward(feedforward) => feedforward.linears_mut().try_for_each(Linear::quantize_int8),
            };
            quantized.context(format_args!("layers.{index}"))?;
        }
        Ok(())
    }

    /// What was built.
    pub fn plan(&self) -> &LayersPlan {
        &self.plan
    }

    /// `[b, n, dim] → [b, n, dim]`.
    ///
    /// `return_embeddings` and `return_mems` are for the wrappers, and ignored here: the output has both.
    ///
    /// Errors: a context that is missing or not wanted, or tensors of other shapes or dtypes than the options say.
    pub fn forward(&self, x: &Tensor, options: &ForwardOptions) -> Result<LayersOutput> {
        let (stream, output) = self.walk(x, options)?;
        Ok(output(stream.whole()?))
    }

    /// As [`AttentionLayers::forward`], with the norm that a wrapper has behind its layers. Errors name the wrapper's
    /// places.
    pub(crate) fn forward_normed(
        &self,
        x: &Tensor,
        options: &ForwardOptions,
        norm: Option<&Norm>,
    ) -> Result<LayersOutput> {
        let (stream, output) = self.walk(x, options).context("attn_layers")?;
        Ok(output(stream.normed(norm).context("norm")?.1))
    }

    /// What leaves the last layer, and what an output is made of with it.
    fn walk(
        &self,
        x: &Tensor,
        options: &ForwardOptions,
    ) -> Result<(Stream, impl FnOnce(Tensor) -> LayersOutput + use<>)> {
        self.check(x, options)?;
        let mut stream = Stream::Whole(x.clone());
        let (mut hiddens, mut attn) = (Vec::new(), Vec::new());
        let (mut prev, mut prev_cross) = (None, None);
        let mut mems = options.mems.iter().flatten();
        let own = AttentionInput {
            query_mask: options.mask.clone(),
            attn_mask: options.attn_mask.clone(),
            return_attn: options.return_attn,
            bias: self.bias.forward().context("rel_pos")?,
            sinusoids: self.sinusoids(x, options)?,
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
        for (index, (layer, plan)) in self.layers.iter().zip(&self.plan.layers).enumerate() {
            let input = match &plan.branch {
                BranchPlan::SelfAttention(_) => {
                    let mem = mems.next().cloned();
                    let key_mask = key_mask(options.mask.as_ref(), mem.as_ref())?;
                    AttentionInput { key_mask, mem, prev: prev.take(), ..own.clone() }
                }
                BranchPlan::CrossAttention(_) => AttentionInput { prev: prev_cross.take(), ..cross.clone() },
                BranchPlan::FeedForward(_) => AttentionInput::default(),
            };
            let place = format_args!("layers.{index}");
            let own = plan.branch.layer_type() == LayerType::SelfAttention;
            if options.checkpoint_layers {
                let x = stream.whole()?;
                hiddens.extend(own.then(|| x.clone()));
                stream = Stream::Whole(layer.forward_checkpointed(&x, &input).context(place)?);
                continue;
            }
            let output = layer.forward(stream, &input).context(place)?;
            stream = output.stream;
            hiddens.extend(own.then_some(output.input));
            attn.extend(output.attn);
            match plan.branch.layer_type() {
                LayerType::SelfAttention => prev = output.scores,
                LayerType::CrossAttention => prev_cross = output.scores,
                LayerType::FeedForward => {}
            }
        }
        Ok((stream, |out| LayersOutput { out, hiddens, attn }))
    }

    /// Returns `Ok` if a key/value cache gives the numbers of [`AttentionLayers::forward`].
    ///
    /// Errors: the reason why growing sequences must be computed anew in each step.
    pub fn supports_kv_cache(&self, options: &ForwardOptions) -> std::result::Result<(), &'static str> {
        let branches = || self.plan.layers.iter().map(|layer| &layer.branch);
        let own = branches().filter(|branch| matches!(branch, BranchPlan::SelfAttention(_)));
        if own.filter_map(BranchPlan::attention).any(|plan| !plan.causal) {
            return Err("tokens see those after them: `kind` is not Decoder");
        }
        let shifts = || self.plan.layers.iter().filter_map(|layer| layer.wrap.shifts.as_ref());
        if shifts().flatten().any(|&amount| amount < 0) {
            return Err("`shift_tokens` moves tokens to the front: `kind` is not Decoder");
        }
        let cross = branches().filter(|branch| matches!(branch, BranchPlan::CrossAttention(_)));
        if cross.filter_map(BranchPlan::attention).any(|plan| plan.max_attend_past.is_some()) {
            return Err("`attn_max_attend_past` in cross-attention counts from the last token");
        }
        if options.token_types.is_some() {
            return Err("`token_types` are those of the tokens that are there");
        }
        if options.attn_mask.is_some() {
            return Err("`attn_mask` is about all tokens at once");
        }
        if options.mask.is_some() && shifts().next().is_some() {
            return Err("`shift_tokens` mixes padded positions, which see what follows them, into others");
        }
        match dropout_stream() {
            Some(_) => Err("the tape draws dropout for whole sequences"),
            None => Ok(()),
        }
    }

    /// An empty cache for `batch` sequences of up to `capacity` positions, with the context and the memories of these
    /// options.
    ///
    /// Errors: [`AttentionLayers::supports_kv_cache`], or no rows or positions.
    pub fn cache(&self, batch: usize, capacity: usize, dtype: DType, options: &ForwardOptions) -> Result<LayersCache> {
        if let Err(why) = self.supports_kv_cache(options) {
            return Err(Error::argument("cache", format!("cannot be used: {why}")));
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
        let bias = self.bias.forward().context("rel_pos")?;
        let tables = Tables::new(positions, self.rotary.as_ref(), self.infused.as_ref(), bias, dtype)?;
        LayersCache::new(batch, capacity, self.layers.len(), tables, options)
    }

    /// As [`AttentionLayers::forward`] for the next `n` positions of every sequence: `[b, n, dim] → [b, n, dim]`.
    ///
    /// Of each row the first `counts[b]` positions join its sequence; what is behind them is computed and forgotten, so
    /// that rows of different lengths go together. `mask` `[b, n]`: which of them are no padding.
    ///
    /// Errors: sequences that outgrow the cache, or tensors that do not fit.
    pub fn extend(
        &self,
        x: &Tensor,
        counts: &[usize],
        mask: Option<&Tensor>,
        cache: &mut LayersCache,
    ) -> Result<Tensor> {
        let first = cache.lengths().iter().all(|&length| length == 0);
        let mut options = cache.options.clone();
        options.mask = mask.cloned();
        // What follows was checked with the first positions.
        if !first {
            options.mems = None;
        }
        self.check(x, &options)?;
        let (b, n) = (x.shape()[0], x.shape()[1]);
        let fits = |(&count, &length): (&usize, &usize)| count <= n && length + count <= cache.capacity();
        ensure!(
            b == cache.batch() && counts.len() == b && counts.iter().zip(cache.lengths()).all(fits),
            Error::shape(
                "cache",
                format!(
                    "{counts:?} of {n} new positions in {b} rows do not fit {} sequences of {:?} of {} positions",
                    cache.batch(),
                    cache.lengths(),
                    cache.capacity()
                )
            )
        );
        let step = cache.step(n, mask, x.device())?;
        let mut stream = Stream::Whole(x.clone());
        let (mut prev, mut prev_cross) = (None, None);
        let mut mems = options.mems.iter().flatten();
        let own = AttentionInput {
            query_mask: step.mask.clone(),
            bias: if first { cache.tables.bias.clone() } else { None },
            sinusoids: if first { self.sinusoids(x, &options)? } else { None },
            explicit: options.explicit_attention,
            ..AttentionInput::default()
        };
        let cross = AttentionInput {
            context: options.context.clone(),
            key_mask: options.context_mask.clone(),
            bias: None,
            sinusoids: None,
            ..own.clone()
        };
        let LayersCache { layers: caches, tables, .. } = cache;
        for (index, (layer, (plan, cache))) in self.layers.iter().zip(self.plan.layers.iter().zip(caches)).enumerate() {
            let input = match &plan.branch {
                BranchPlan::SelfAttention(_) => {
                    let mem = mems.next().cloned();
                    let key_mask = key_mask(step.mask.as_ref(), mem.as_ref())?;
                    AttentionInput { key_mask, mem, prev: prev.take(), ..own.clone() }
                }
                BranchPlan::CrossAttention(_) => AttentionInput { prev: prev_cross.take(), ..cross.clone() },
                BranchPlan::FeedForward(_) => AttentionInput::default(),
            };
            let output = layer.extend(stream, &input, cache, tables, &step).context(format_args!("layers.{index}"))?;
            stream = output.stream;
            match plan.branch.layer_type() {
                LayerType::SelfAttention => prev = output.scores,
                LayerType::CrossAttention => prev_cross = output.scores,
                LayerType::FeedForward => {}
            }
        }
        drop(step);
        cache.advance(counts);
        stream.whole()
    }

    /// Sinusoids for the longest row of keys, shared by the layers.
    fn sinusoids(&self, x: &Tensor, options: &ForwardOptions) -> Result<Option<Tensor>> {
        let Some(frequencies) = &self.infused else { return Ok(None) };
        let memories = options.mems.iter().flatten().map(|mem| mem.shape()[1]).max().unwrap_or(0);
        frequencies.tensor().sinusoid(0, memories + x.dim(1)?, x.dtype()).map(Some)
    }

    fn check(&self, x: &Tensor, options: &ForwardOptions) -> Result<()> {
        const OP: &str = "attention layers";
        let dim = self.plan.dim;
        ensure!(
            x.rank() == 3 && x.shape()[2] == dim && x.dtype().is_float(),
            Error::shape(OP, format!("expected a float tensor [batch, n, {dim}], got {:?} {}", x.shape(), x.dtype()))
        );
        let (b, n) = (x.shape()[0], x.shape()[1]);
        check_mask("mask", options.mask.as_ref(), b, n)?;
        match (&options.context, self.plan.cross_attend) {
            (None, true) => return Err(Error::argument("context", "is missing: the layers have cross-attention")),
            (Some(_), false) => {
                return Err(Error::argument("context", "is given, but the layers have no cross-attention to use it"));
            }
            (None, false) => ensure!(
                options.context_mask.is_none(),
                Error::argument("context_mask", "is given, but the layers have no cross-attention to use it")
            ),
            (Some(context), true) => {
                let shape = context.shape();
                ensure!(
                    context.rank() == 3 && shape[0] == b && shape[2] == dim && context.dtype() == x.dtype(),
                    Error::shape(
                        "context",
                        format!("expected [{b}, length, {dim}] {}, got {shape:?} {}", x.dtype(), context.dtype())
                    )
                );
                check_mask("context_mask", options.context_mask.as_ref(), b, shape[1])?;
            }
        }
        self.check_mems(x, options)?;
        let scores = self.plan.layers.iter().filter_map(|layer| layer.branch.attention()).any(|plan| plan.residual);
        ensure!(
            !(options.checkpoint_layers && (scores || options.return_attn)),
            Error::argument(
                "checkpoint_layers",
                "cannot be used with residual_attn, cross_residual_attn or return_attn: scores leave the layers there"
            )
        );
        let own = self.plan.self_attentions() > 0;
        ensure!(
            own || options.attn_mask.is_none(),
            Error::argument("attn_mask", "is given, but the layers have no self-attention to use it")
        );
        Ok(())
    }

    fn check_mems(&self, x: &Tensor, options: &ForwardOptions) -> Result<()> {
        let Some(mems) = &options.mems else { return Ok(()) };
        let (expected, b, dim) = (self.plan.self_attentions(), x.shape()[0], self.plan.dim);
        ensure!(
            mems.len() == expected,
            Error::argument("mems", format!("expected one per self-attention layer, {expected}, got {}", mems.len()))
        );
        let fits =
            |mem: &Tensor| mem.rank() == 3 && mem.shape()[0] == b && mem.shape()[2] == dim && mem.dtype() == x.dtype();
        match mems.iter().find(|mem| !fits(mem)) {
            Some(mem) => Err(Error::shape(
                "mems",
                format!("expected [{b}, memories, {dim}] {}, got {:?} {}", x.dtype(), mem.shape(), mem.dtype()),
            )),
            None => Ok(()),
        }
    }
}

fn check_mask(name: &'static str, mask: Option<&Tensor>, b: usize, n: usize) -> Result<()> {
    let Some(mask) = mask else { return Ok(()) };
    ensure!(
        **mask.shape() == [b, n],
        Error::shape(name, format!("expected [{b}, {n}], one value per token, got {:?}", mask.shape()))
    );
    ensure!(
        mask.dtype() == DType::Bool,
        Error::dtype(name, format!("expected bool, true for tokens that are no padding, got {}", mask.dtype()))
    );
    Ok(())
}

/// The mask of keys: that of the tokens, memories in front kept.
fn key_mask(mask: Option<&Tensor>, mem: Option<&Tensor>) -> Result<Option<Tensor>> {
    match (mask, mem) {
        (Some(mask), Some(mem)) => {
            let kept = Tensor::ones([mem.dim(0)?, mem.dim(1)?], DType::Bool, mem.device())?;
            Tensor::cat(&[&kept, mask], 1).map(Some)
        }
        (mask, _) => Ok(mask.cloned()),
    }
}
