//! Tokens in, logits out.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use super::{AttentionPool, embeddings::Embedded, positions::Absolute};
use crate::{
    DType, Error, Init, Param, ParamStore, QuantType, Result, Tensor,
    autograd::dropout_stream,
    collect::CollectVec,
    config::{
        AttentionPoolPlan, LayerPlan, MemoryPlan, NormPlan, Recurrence, TransformerPlan, TransformerWrapperConfig,
    },
    error::{ErrorContext, ensure},
    nn::{AttentionLayers, Branch, Embedding, ForwardOptions, LayersOutput, Linear, Norm, Packer, log_sigmoid},
    ops::{Activation, PackedMatrix},
};

/// Output of a wrapper.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Output {
    /// Logits `[b, n, num_tokens]`, or normed hidden states `[b, n, dim]`.
    pub out: Tensor,
    /// Logits of the other heads of a model with several.
    pub others: Vec<Tensor>,
    /// Normed hidden states, if `return_logits_and_embeddings`.
    pub embeddings: Option<Tensor>,
    /// New memories, if `return_mems`: one `[b, memories, dim]` per self-attention, detached.
    pub mems: Vec<Tensor>,
    /// Attention maps, if `return_attn`: `[b, heads, i, j]` in the order of the layers.
    pub attn: Vec<Tensor>,
    /// Masked scores of attention, if `return_scores`: `[b, heads, i, j]` in the order of the layers.
    pub scores: Vec<Tensor>,
}

/// Transformer on tokens: token embeddings, positions, attention layers, a LayerNorm and logits.
///
/// ```
/// use x_transformers::{
///     DType, Device, ParamStore, Tensor,
///     config::{AttentionLayersConfig, TransformerWrapperConfig},
///     models::{ForwardOptions, TransformerWrapper},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let config = TransformerWrapperConfig {
///     num_tokens: 256,
///     max_seq_len: 32,
///     attn_layers: AttentionLayersConfig::decoder(16, 1),
///     ..Default::default()
/// };
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let model = TransformerWrapper::new(&config, &store)?;
/// let tokens = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6], [2, 3], &Device::Cpu)?;
/// let logits = model.forward(&tokens, &ForwardOptions::default())?.out;
/// assert_eq!(logits.shape()[..], [2, 3, 256]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "BERT")]
#[doc(alias = "Transformer")]
pub struct TransformerWrapper {
    pub(super) plan: Arc<TransformerPlan>,
    pub(super) token_emb: Embedding,
    pub(super) pos_emb: Option<Absolute>,
    pub(super) project_emb: Option<Linear>,
    pub(super) memory_tokens: Option<Param>,
    pub(super) cls_token: Option<Param>,
    attn_layers: AttentionLayers,
    attn_pool: Option<AttentionPool>,
    pub(super) token_type_emb: Option<Embedding>,
    pub(super) embeds: Vec<(String, Embedding)>,
    pub(super) post_emb_norm: Option<Norm>,
    norm: Option<Norm>,
    /// One for each head.
    to_logits: Vec<Linear>,
    /// Head that predicts numbers.
    to_numbers: Option<Linear>,
    /// From hidden states to those of several softmaxes, and to the weights of these.
    mixture: Option<[Linear; 2]>,
    mlm_head: Option<MaskedHead>,
    pooler: Option<Linear>,
    /// Between passes: the projection of the output before.
    recycled_proj: Option<Linear>,
    /// After passes: the gate that says whether to stop.
    pub(super) exit_gate: Option<Linear>,
    /// From hidden states to the embeddings of the next tokens.
    to_next_embed: Option<[Linear; 2]>,
}

/// BERT's masked-LM head, before the embedding table.
#[derive(Clone, Debug)]
struct MaskedHead {
    dense: Linear,
    activation: Activation,
    norm: Norm,
    /// Bias of the logits, `[num_tokens]`.
    bias: Param,
}

impl MaskedHead {
    fn new(plan: &TransformerPlan, activation: Activation, norm: NormPlan, store: &ParamStore) -> Result<Self> {
        Ok(Self {
            dense: Linear::new(&store.at("dense"), plan.layers.dim, plan.emb_dim)?,
            activation,
            norm: Norm::new(norm, plan.emb_dim, &store.at("norm"))?,
            bias: store.param("bias", [plan.num_tokens], Init::Constant(0.0))?,
        })
    }

    fn forward(&self, x: &Tensor, table: &Embedding) -> Result<Tensor> {
        let x = self.activation.of(&self.dense.forward(x).context("dense")?)?;
        table.logits(&self.norm.forward(&x).context("norm")?, Some(&self.bias.tensor()))
    }
}

impl TransformerWrapper {
    /// Creates a model from its options, with parameters under the names of PyTorch's state dict.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination.
    pub fn new(config: &TransformerWrapperConfig, store: &ParamStore) -> Result<Self> {
        Self::from_plan(config.plan()?, store)
    }

    /// Creates a model from its plan, with parameters under the names of PyTorch's state dict.
    ///
    /// Errors: those of the layers.
    pub fn from_plan(plan: TransformerPlan, store: &ParamStore) -> Result<Self> {
        Self::tied(plan, store, None)
    }

    /// Creates a model in which some layers have custom branches; see [`AttentionLayers::with_branches`]. Generation,
    /// caches, recomputation and losses work as for any other model.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination,
    /// and those of `branches`.
    pub fn with_branches(
        config: &TransformerWrapperConfig,
        store: &ParamStore,
        branches: impl FnMut(usize, &LayerPlan, &ParamStore) -> Result<Option<Arc<dyn Branch>>>,
    ) -> Result<Self> {
        Self::build(config.plan()?, store, None, branches)
    }

    /// Builds a model from its plan, with the token embeddings of another one if given.
    pub(super) fn tied(plan: TransformerPlan, store: &ParamStore, tied: Option<&Embedding>) -> Result<Self> {
        Self::build(plan, store, tied, |_, _, _| Ok(None))
    }

    fn build(
        mut plan: TransformerPlan,
        store: &ParamStore,
        tied: Option<&Embedding>,
        branches: impl FnMut(usize, &LayerPlan, &ParamStore) -> Result<Option<Arc<dyn Branch>>>,
    ) -> Result<Self> {
        let attn_layers = AttentionLayers::with_branches(&plan.layers, &store.at("attn_layers"), branches)?;
        plan.layers = attn_layers.plan().clone();
        let plan = Arc::new(plan);
        let dim = plan.layers.dim;
        let token_store = store.at(&plan.token_emb);
        let start = if plan.l2norm_embed { Init::Normal(1e-5) } else { Init::kaiming_normal(plan.emb_dim) };
        let token_emb = match tied {
            Some(other) => Embedding::tied(&token_store, other)?,
            None => Embedding::new(&token_store, plan.num_tokens, plan.emb_dim, start)?,
        };
        let project_emb = || Linear::new(&store.at("project_emb"), plan.emb_dim, dim);
        let memory = || store.param("memory_tokens", [plan.num_memory_tokens, dim], Init::Normal(1.0));
        let head = |(name, width): &(String, usize)| {
            let place = store.at("to_logits");
            let place = if name.is_empty() { place } else { place.at(name) };
            Linear::maybe_biased(&place, dim, *width, plan.logits_bias)
        };
        let heads = if plan.tie_embedding.is_some() || plan.return_only_embed { &[][..] } else { &plan.logits[..] };
        let numbers = || Linear::new(&store.at("to_numerical_output").at(0), dim, 1);
        let mixture = |count: usize| -> Result<[Linear; 2]> {
            let states = Linear::without_bias(&store.at("to_mixture").at(0), dim, dim * count)?;
            Ok([states, Linear::without_bias(&store.at("combine_mixture"), dim, count)?])
        };
        let cls_token = || store.param("cls_token", [plan.num_cls_tokens, dim], Init::Normal(0.02));
        let embeds = plan.embeds.iter().map(|(name, count)| {
            let place = store.at("embeds").at(format_args!("{name}_embed"));
            Ok((name.clone(), Embedding::new(&place, *count, plan.emb_dim, Init::Normal(1.0))?))
        });
        let types = || {
            let init = Init::kaiming_normal(plan.emb_dim);
            Embedding::new(&store.at("token_type_emb"), plan.num_token_types, plan.emb_dim, init)
        };
        let norm = |norm: Option<NormPlan>, name: &str, dim: usize| {
            norm.map(|norm| Norm::new(norm, dim, &store.at(name))).transpose()
        };
        let next_embed = || -> Result<[Linear; 2]> {
            let place = store.at("to_next_embed_pred");
            Ok([Linear::without_bias(&place.at(0), dim, dim)?, Linear::without_bias(&place.at(2), dim, dim)?])
        };
        let recycled = || Linear::without_bias(&store.at("recycled_proj"), dim, dim);
        let gate = || Linear::without_bias(&store.at("exit_gate"), dim, 1);
        let mlm_head = |(activation, norm)| MaskedHead::new(&plan, activation, norm, &store.at("mlm_head"));
        Ok(Self {
            token_emb,
            pos_emb: Absolute::new(plan.absolute_positions, plan.emb_dim, plan.max_seq_len, store)?,
            project_emb: (plan.emb_dim != dim).then(project_emb).transpose()?,
            memory_tokens: (plan.num_memory_tokens > 0).then(memory).transpose()?,
            cls_token: (plan.num_cls_tokens > 0).then(cls_token).transpose()?,
            attn_layers,
            attn_pool: plan.pool.as_ref().map(|pool| AttentionPool::new(pool, &store.at("attn_pool"))).transpose()?,
            embeds: embeds.try_collect_vec()?,
            token_type_emb: (plan.num_token_types > 0).then(types).transpose()?,
            post_emb_norm: norm(plan.post_emb_norm, "post_emb_norm", plan.emb_dim)?,
            norm: norm(plan.layers.final_norm.filter(|_| !plan.layers.owns_final_norm), "norm", dim)?,
            mlm_head: plan.mlm_head.map(mlm_head).transpose()?,
            pooler: plan.pooler.then(|| Linear::new(&store.at("pooler"), dim, dim)).transpose()?,
            to_logits: heads.iter().map(head).try_collect_vec()?,
            mixture: plan.mixture.map(mixture).transpose()?,
            recycled_proj: matches!(plan.recurrence, Recurrence::Recycled(_)).then(recycled).transpose()?,
            exit_gate: matches!(plan.recurrence, Recurrence::Looped(_)).then(gate).transpose()?,
            to_next_embed: plan.next_embed.then(next_embed).transpose()?,
            to_numbers: plan.numerical_token.map(|_| numbers()).transpose()?,
            plan,
        })
    }

    /// Returns the plan that the model was built from.
    pub fn plan(&self) -> &TransformerPlan {
        &self.plan
    }

    /// Returns the table of token embeddings.
    pub(super) fn token_emb(&self) -> &Embedding {
        &self.token_emb
    }

    /// Rounds the weights of linear layers and the table of token embeddings to a quantised type; norms, gates and
    /// biases stay as they are. Rows that are not whole blocks take the type of [`QuantType::for_rows_of`], or stay
    /// floats.
    ///
    /// The packed weights have no gradients and are in no map of parameters; the model of another clone keeps its own.
    /// See [`PackedMatrix`] for what their products compute.
    ///
    /// Errors: weights that are not finite; a type that [is not packed](QuantType::is_packed).
    #[doc(alias = "quantize_dynamic")]
    #[doc(alias = "int8")]
    pub fn quantize(&mut self, kind: QuantType) -> Result<()> {
        // Tied layers share what replaces their weights.
        let mut packed = HashMap::new();
        self.pack(&mut |param| {
            let weight = param.tensor();
            let &[_, columns] = &weight.shape()[..] else { return Ok(None) };
            let Some(kind) = kind.for_rows_of(columns) else { return Ok(None) };
            Ok(Some(match packed.entry(param.leaf()) {
                Entry::Occupied(entry) => PackedMatrix::clone(entry.get()),
                Entry::Vacant(entry) => entry.insert(PackedMatrix::quantize(&weight, kind)?).clone(),
            }))
        })
    }

    /// Replaces weights by packed ones: those of linear layers, and the table of token embeddings.
    pub(crate) fn pack(&mut self, packer: Packer) -> Result<()> {
        self.token_emb.pack(packer).context("token_emb")?;
        self.for_linears(&mut |linear| linear.pack(packer))?;
        self.to_logits.iter_mut().try_for_each(|linear| linear.pack(packer)).context("to_logits")
    }

    /// Calls `f` with each linear layer but that of the logits.
    pub(super) fn for_linears(&mut self, f: &mut dyn FnMut(&mut Linear) -> Result<()>) -> Result<()> {
        self.attn_layers.for_linears(f).context("attn_layers")?;
        self.project_emb.iter_mut().try_for_each(f).context("project_emb")
    }

    /// Returns the layers.
    pub(super) fn attn_layers(&self) -> &AttentionLayers {
        &self.attn_layers
    }

    /// Returns the final norm.
    pub(super) fn norm(&self) -> Option<&Norm> {
        self.norm.as_ref()
    }

    /// Computes logits `[b, n, num_tokens]` of tokens `[b, n]`, or what the options request. With `average_pool_embed`
    /// the output is that of the mean over the tokens that the mask keeps, `[b, ..]`.
    ///
    /// Errors: tokens of another rank or dtype, out of the vocabulary ([`ErrorKind::Index`](crate::ErrorKind::Index)),
    /// or more than `max_seq_len` with a table of absolute positions; options that do not fit the model.
    pub fn forward(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<Output> {
        let Embedded { x, mask } = self.embed(tokens, options)?;
        let pooled_mask = options.mask.clone();
        let layers_options = self.layers_options(ForwardOptions { mask: mask.clone(), ..options.clone() })?;
        let layers = self.attend(&x, &layers_options, &mut |_| ())?;
        let mut x = self.without_memory_tokens(layers.out, tokens.dim(1)?, options)?;
        if self.plan.average_pool_embed {
            x = mean_over_tokens(&x, pooled_mask.as_ref())?;
        }
        if self.cls_token.is_some() {
            let classes = self.plan.num_cls_tokens;
            x = if classes == 1 { x.select(1, 0)? } else { x.narrow(1, 0, classes)? };
        }
        let mems = if options.return_mems { self.new_mems(&layers.hiddens, &layers_options)? } else { vec![] };
        let only_embeddings = options.return_embeddings || self.plan.return_only_embed;
        let prepended = match &options.prepend_embeds {
            Some(embeds) if options.excise_prepend_embeds => embeds.dim(1)?,
            _ => 0,
        };
        if prepended > 0 {
            x = x.narrow(1, prepended, x.dim(1)? - prepended)?;
        }
        let (attn, scores) = (layers.attn, layers.scores);
        let mut output = Output { out: x.clone(), others: Vec::new(), embeddings: None, mems, attn, scores };
        if only_embeddings {
            return Ok(output);
        }
        let pools = !options.return_logits_and_embeddings;
        if let (Some(pool), Some(AttentionPoolPlan { used: true, .. }), true) =
            (&self.attn_pool, &self.plan.pool, pools)
        {
            output.out = pool.forward(&x, mask.as_ref(), None).context("attn_pool")?;
            return Ok(output);
        }
        output.out = self.logits(&x)?;
        output.others = self.to_logits.iter().skip(1).map(|head| self.squeezed(head.forward(&x)?)).try_collect_vec()?;
        if let Some(to_numbers) = &self.to_numbers {
            output.others.push(to_numbers.forward(&x).context("to_numerical_output.0")?.squeeze(-1)?);
        }
        output.embeddings = options.return_logits_and_embeddings.then_some(x);
        Ok(output)
    }

    /// Passes through the layers as often as the options say; `each` gets the output of every pass.
    fn attend(&self, x: &Tensor, options: &ForwardOptions, each: &mut dyn FnMut(&Tensor)) -> Result<LayersOutput> {
        for (name, given, on) in [
            ("recycle_steps", options.recycle_steps, self.recycled_proj.is_some()),
            ("looped_steps", options.looped_steps, self.exit_gate.is_some()),
        ] {
            let legal = given.is_none_or(|steps| on && steps > 0);
            ensure!(legal, Error::argument(name, "expected at least 1, and a model with `recycling` or `looped`"));
        }
        let steps = match self.plan.recurrence {
            Recurrence::Once => 1,
            Recurrence::Looped(steps) => options.looped_steps.unwrap_or(steps),
            Recurrence::Recycled(most) => {
                let drawn = || dropout_stream("recycle_steps").map(|draws| 1 + draws.below(0, most as u64) as usize);
                options.recycle_steps.or_else(drawn).unwrap_or(most)
            }
        };
        let pass = |x: &Tensor| self.attn_layers.forward_normed(x, options, self.norm.as_ref());
        let mut output = pass(x)?;
        each(&output.out);
        for _ in 1..steps {
            output = match &self.recycled_proj {
                Some(project) => pass(&x.add(&project.forward(&output.out.detach()).context("recycled_proj")?)?)?,
                None => pass(&output.out)?,
            };
            each(&output.out);
        }
        Ok(output)
    }

    /// Returns the outputs of all passes through the layers, `[b, n, dim]` each.
    ///
    /// Errors: memory tokens or embeddings before the tokens, which x-transformers does not leave out of them.
    pub(super) fn passes(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<Vec<Tensor>> {
        ensure!(
            self.plan.num_memory_tokens == 0 && options.prepend_embeds.is_none(),
            Error::option("looped", "has no loss with `num_memory_tokens` or `prepend_embeds`, like in x-transformers")
        );
        let Embedded { x, mask } = self.embed(tokens, options)?;
        let options = self.layers_options(ForwardOptions { mask, ..options.clone() })?;
        let mut passes = Vec::new();
        let _ = self.attend(&x, &options, &mut |out| passes.push(out.clone()))?;
        Ok(passes)
    }

    /// Returns the predicted embeddings of the tokens after normed hidden states, `[b, n, dim]`, if the model has them.
    pub(super) fn next_embeddings(&self, hidden: &Tensor) -> Result<Option<Tensor>> {
        let Some([inner, outer]) = &self.to_next_embed else { return Ok(None) };
        outer.forward(&inner.forward(hidden)?.silu()?).context("to_next_embed_pred").map(Some)
    }

    /// Computes the mean cross-entropy of the logits of normed hidden states, `[.., dim]` with targets `[..]`. Logits
    /// are computed in blocks of rows and not kept; see [`Tensor::linear_cross_entropy`].
    ///
    /// Errors: those of [`TransformerWrapper::logits`] and [`Tensor::cross_entropy`].
    pub fn cross_entropy(&self, embeddings: &Tensor, targets: &Tensor, ignore_index: i64) -> Result<Tensor> {
        if self.mixture.is_some() || self.plan.sigsoftmax {
            return self.logits(embeddings)?.cross_entropy(targets, ignore_index);
        }
        match (&self.mlm_head, self.to_logits.first()) {
            (None, Some(to_logits)) => to_logits.cross_entropy(embeddings, targets, ignore_index).context("to_logits"),
            (None, None) if !self.plan.return_only_embed => self
                .for_tied_logits(embeddings)?
                .linear_cross_entropy(&self.token_emb.table()?, None, targets, ignore_index)
                .context("to_logits"),
            _ => self.logits(embeddings)?.cross_entropy(targets, ignore_index),
        }
    }

    /// Computes logits `[.., num_tokens]` of normed hidden states `[.., dim]`.
    pub fn logits(&self, embeddings: &Tensor) -> Result<Tensor> {
        ensure!(!self.plan.return_only_embed, Error::option("return_only_embed", "must be false to compute logits"));
        if let Some(head) = &self.mlm_head {
            return head.forward(embeddings, &self.token_emb).context("mlm_head");
        }
        let Some([to_mixture, combine]) = &self.mixture else { return self.squeezed(self.one_softmax(embeddings)?) };
        let weights = combine.forward(embeddings).context("combine_mixture")?.softmax()?;
        let mut shape = embeddings.shape().to_vec();
        let at = shape.len() - 1;
        shape.insert(at, weights.dim(-1)?);
        let states = to_mixture.forward(embeddings).context("to_mixture.0")?.reshape(&shape[..])?;
        let mixed = weights.unsqueeze(-2)?.matmul(&self.one_softmax(&states)?.softmax()?)?.squeeze(-2)?;
        // A probability of 0 has no logarithm.
        let least = Tensor::full((), 1e-20, mixed.dtype(), mixed.device())?;
        self.squeezed(mixed.detach().lt(&least)?.where_cond(&least, &mixed)?.ln()?)
    }

    /// Computes the logits of one softmax.
    fn one_softmax(&self, embeddings: &Tensor) -> Result<Tensor> {
        let logits = match self.to_logits.first() {
            Some(to_logits) => to_logits.forward(embeddings),
            None => self.token_emb.logits(&self.for_tied_logits(embeddings)?, None),
        };
        let logits = logits.context("to_logits")?;
        // ln sigmoid, of Kanai et al., <https://arxiv.org/abs/1805.10829>
        if self.plan.sigsoftmax { logits.add(&log_sigmoid(&logits)?) } else { Ok(logits) }
    }

    /// Scales hidden states, of which there are fewer than of logits, for tied logits.
    fn for_tied_logits(&self, embeddings: &Tensor) -> Result<Tensor> {
        match self.plan.tie_embedding {
            Some(scale) if scale != 1.0 => embeddings.affine(scale, 0.0),
            _ => Ok(embeddings.clone()),
        }
    }

    fn squeezed(&self, logits: Tensor) -> Result<Tensor> {
        if self.plan.squeeze_logits && logits.dim(-1)? == 1 { logits.squeeze(-1) } else { Ok(logits) }
    }

    /// Applies the pooler to the first token of normed hidden states: `[b, n, dim] → [b, dim]`.
    ///
    /// Errors: a model without `pooler`, or no tokens.
    pub fn pooled(&self, embeddings: &Tensor) -> Result<Tensor> {
        let none = || Error::option("pooler", "must be true to compute pooled embeddings");
        let pooler = self.pooler.as_ref().ok_or_else(none)?;
        pooler.forward(&embeddings.select(1, 0)?).context("pooler")?.tanh()
    }

    /// Returns the options of the layers: memories are rotated, and positions are those of tokens.
    pub(super) fn layers_options(&self, mut options: ForwardOptions) -> Result<ForwardOptions> {
        ensure!(
            !options.return_mems || self.plan.memories != MemoryPlan::None,
            Error::option("max_mem_len", "must be set for `return_mems`: the number of memories to keep, 0 for all")
        );
        options.pos = options.pos.filter(|pos| !pos.dtype().is_float());
        if let Some(mems) = &mut options.mems {
            // Too few to rotate are too few for the layers, which return the error.
            let down = self.plan.shift_mem_down.min(mems.len());
            mems.rotate_left(down);
        }
        Ok(options)
    }

    /// Concatenates old memories and these hidden states, and truncates them.
    fn new_mems(&self, hiddens: &[Tensor], options: &ForwardOptions) -> Result<Vec<Tensor>> {
        let join = |(index, hidden): (usize, &Tensor)| {
            let joined = match options.mems.as_ref().and_then(|mems| mems.get(index)) {
                Some(mem) if !matches!(self.plan.memories, MemoryPlan::LastOfCall(_)) => {
                    Tensor::cat(&[mem, hidden], 1)?
                }
                _ => hidden.clone(),
            };
            let kept = last_memories(&joined, self.plan.memories)?;
            Ok(if options.attached_mems { kept } else { kept.detach() })
        };
        hiddens.iter().enumerate().map(join).try_collect_vec()
    }
}

/// Returns the memories that are kept of `[b, n, dim]`.
pub(super) fn last_memories(hiddens: &Tensor, plan: MemoryPlan) -> Result<Tensor> {
    let length = hiddens.dim(1)?;
    let kept = match plan {
        MemoryPlan::Last(most) | MemoryPlan::LastOfCall(most) => length.min(most),
        MemoryPlan::None | MemoryPlan::All => length,
    };
    hiddens.narrow(1, length - kept, kept)
}

/// Applies the final norm, if there is one.
pub(super) fn norm(norm: Option<&Norm>, x: Tensor) -> Result<Tensor> {
    norm.map_or(Ok(x.clone()), |norm| norm.forward(&x).context("norm"))
}

/// Computes the mean of the vectors that the mask keeps, zero if it keeps none: `[b, n, dim] → [b, dim]`.
///
/// Errors: a mask of another shape or dtype.
pub(crate) fn mean_over_tokens(x: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let Some(mask) = mask else { return x.mean(&[1]) };
    ensure!(
        mask.rank() == 2 && mask.shape()[..] == x.shape()[..2] && mask.dtype() == DType::Bool,
        Error::shape(
            "mask",
            format_args!("expected bool {:?}, got {:?} {}", &x.shape()[..2], mask.shape(), mask.dtype())
        )
    );
    let n = x.dim(1)?;
    let weights: Vec<f64> = mask
        .to_vec::<bool>()?
        .chunks(n.max(1))
        .flat_map(|row| {
            let kept = row.iter().filter(|&&kept| kept).count().max(1) as f64;
            row.iter().map(move |&keep| if keep { 1.0 / kept } else { 0.0 })
        })
        .collect_vec();
    let weights = Tensor::from_vec(weights, [x.dim(0)?, 1, n], x.device())?.to_dtype(x.dtype())?;
    weights.matmul(x)?.squeeze(1)
}
