//! Tokens in, logits out.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use crate::{
    DType, Error, Init, Param, ParamStore, QuantType, Result, Tensor,
    collect::CollectVec,
    config::{LayerPlan, NormPlan, TransformerPlan, TransformerWrapperConfig},
    error::{ErrorContext, ensure},
    nn::{AbsolutePositionalEmbedding, AttentionLayers, Branch, Embedding, ForwardOptions, Linear, Norm, Packer},
    ops::{Activation, PackedMatrix},
};

/// Output of a wrapper.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Output {
    /// Logits `[b, n, num_tokens]`, or normed hidden states `[b, n, dim]`.
    pub out: Tensor,
    /// New memories, if `return_mems`: one `[b, memories, dim]` per self-attention, detached.
    pub mems: Vec<Tensor>,
    /// Attention maps, if `return_attn`: `[b, heads, i, j]` in the order of the layers.
    pub attn: Vec<Tensor>,
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
    plan: Arc<TransformerPlan>,
    token_emb: Embedding,
    pos_emb: Option<AbsolutePositionalEmbedding>,
    project_emb: Option<Linear>,
    memory_tokens: Option<Param>,
    attn_layers: AttentionLayers,
    token_type_emb: Option<Embedding>,
    post_emb_norm: Option<Norm>,
    norm: Option<Norm>,
    to_logits: Option<Linear>,
    mlm_head: Option<MaskedHead>,
    pooler: Option<Linear>,
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
        Self::from_plan(config.plan()?, store, None)
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
    pub(super) fn from_plan(plan: TransformerPlan, store: &ParamStore, tied: Option<&Embedding>) -> Result<Self> {
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
        let token_store = store.at("token_emb");
        let token_emb = match tied {
            Some(other) => Embedding::tied(&token_store, other)?,
            None => Embedding::new(&token_store, plan.num_tokens, plan.emb_dim, Init::kaiming_normal(plan.emb_dim))?,
        };
        let positions = || {
            AbsolutePositionalEmbedding::new(plan.emb_dim, plan.max_seq_len, plan.scale_pos_emb, &store.at("pos_emb"))
        };
        let project_emb = || Linear::new(&store.at("project_emb"), plan.emb_dim, dim);
        let memory = || store.param("memory_tokens", [plan.num_memory_tokens, dim], Init::Normal(1.0));
        let to_logits = || Linear::maybe_biased(&store.at("to_logits"), dim, plan.num_tokens, plan.logits_bias);
        let types = || {
            let init = Init::kaiming_normal(plan.emb_dim);
            Embedding::new(&store.at("token_type_emb"), plan.num_token_types, plan.emb_dim, init)
        };
        let norm = |norm: Option<NormPlan>, name: &str, dim: usize| {
            norm.map(|norm| Norm::new(norm, dim, &store.at(name))).transpose()
        };
        let mlm_head = |(activation, norm)| MaskedHead::new(&plan, activation, norm, &store.at("mlm_head"));
        Ok(Self {
            token_emb,
            pos_emb: plan.absolute_positions.then(positions).transpose()?,
            project_emb: (plan.emb_dim != dim).then(project_emb).transpose()?,
            memory_tokens: (plan.num_memory_tokens > 0).then(memory).transpose()?,
            attn_layers,
            token_type_emb: (plan.num_token_types > 0).then(types).transpose()?,
            post_emb_norm: norm(plan.post_emb_norm, "post_emb_norm", plan.emb_dim)?,
            norm: norm(plan.layers.final_norm, "norm", dim)?,
            mlm_head: plan.mlm_head.map(mlm_head).transpose()?,
            pooler: plan.pooler.then(|| Linear::new(&store.at("pooler"), dim, dim)).transpose()?,
            to_logits: (!plan.tie_embedding && !plan.return_only_embed).then(to_logits).transpose()?,
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

    /// Rounds the weights of linear layers and the table of token embeddings to a quantised type; norms, gates and biases
    /// stay as they are. Rows that are not whole blocks take the type of [`QuantType::for_rows_of`], or stay floats.
    ///
    /// The packed weights have no gradients and are in no map of parameters; the model of another clone keeps its own. See
    /// [`PackedMatrix`] for what their products compute.
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
        let x = self.embed(tokens, options)?;
        let memory_tokens = self.plan.num_memory_tokens;
        let mask = options.mask.clone();
        let options = self.layers_options(options)?;
        let layers = self.attn_layers.forward_normed(&x, &options, self.norm.as_ref())?;
        let mut x = layers.out.narrow(1, memory_tokens, tokens.dim(1)?)?;
        if self.plan.average_pool_embed {
            x = mean_over_tokens(&x, mask.as_ref())?;
        }
        let mems = if options.return_mems { self.new_mems(&layers.hiddens, options.mems.as_deref())? } else { vec![] };
        let out = if options.return_embeddings || self.plan.return_only_embed { x } else { self.logits(&x)? };
        Ok(Output { out, mems, attn: layers.attn })
    }

    /// Computes the mean cross-entropy of the logits of normed hidden states, `[.., dim]` with targets `[..]`. Logits
    /// are computed in blocks of rows and not kept; see [`Tensor::linear_cross_entropy`].
    ///
    /// Errors: those of [`TransformerWrapper::logits`] and [`Tensor::cross_entropy`].
    pub fn cross_entropy(&self, embeddings: &Tensor, targets: &Tensor, ignore_index: i64) -> Result<Tensor> {
        match (&self.mlm_head, &self.to_logits) {
            (None, Some(to_logits)) => to_logits.cross_entropy(embeddings, targets, ignore_index).context("to_logits"),
            (None, None) if !self.plan.return_only_embed => embeddings
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
        match &self.to_logits {
            Some(to_logits) => to_logits.forward(embeddings).context("to_logits"),
            None => self.token_emb.logits(embeddings, None).context("to_logits"),
        }
    }

    /// Applies the pooler to the first token of normed hidden states: `[b, n, dim] → [b, dim]`.
    ///
    /// Errors: a model without `pooler`, or no tokens.
    pub fn pooled(&self, embeddings: &Tensor) -> Result<Tensor> {
        let none = || Error::option("pooler", "must be true to compute pooled embeddings");
        let pooler = self.pooler.as_ref().ok_or_else(none)?;
        pooler.forward(&embeddings.select(1, 0)?).context("pooler")?.tanh()
    }

    /// Computes the input of the layers: `[b, n] → [b, memory tokens + n, dim]`.
    fn embed(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        self.check_tokens(tokens)?;
        let n = tokens.shape()[1];
        if self.pos_emb.is_some() {
            check_length(n, self.plan.max_seq_len)?;
        }
        let x = self.embed_tokens(tokens, options.token_types.as_ref(), |positions| positions.forward(n))?;
        if self.memory_tokens.is_some() { self.prepend_memory_tokens(&x) } else { Ok(x) }
    }

    /// Checks that `tokens` is an i64 tensor of shape `[batch, n]`.
    pub(super) fn check_tokens(&self, tokens: &Tensor) -> Result<()> {
        ensure!(
            tokens.rank() == 2 && tokens.dtype() == DType::I64,
            Error::shape(
                "tokens",
                format_args!("expected i64 [batch, n], got {:?} {}", tokens.shape(), tokens.dtype())
            )
        );
        Ok(())
    }

    /// Embeds tokens of these types, with the positions that the closure takes from the table: `[b, n] → [b, n, dim]`.
    pub(super) fn embed_tokens(
        &self,
        tokens: &Tensor,
        types: Option<&Tensor>,
        positions_of: impl FnOnce(&AbsolutePositionalEmbedding) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut x = self.token_emb.forward(tokens).context("token_emb")?;
        if let Some(positions) = &self.pos_emb {
            x = x.add(&positions_of(positions)?).context("pos_emb")?;
        }
        if let Some(types) = self.token_types(tokens, types)? {
            x = x.add(&types)?;
        }
        if let Some(norm) = &self.post_emb_norm {
            x = norm.forward(&x).context("post_emb_norm")?;
        }
        x = x.dropout(self.plan.emb_dropout)?;
        match &self.project_emb {
            Some(project) => project.forward(&x).context("project_emb"),
            None => Ok(x),
        }
    }

    /// Prepends memory tokens to embedded ones, if there are any.
    pub(super) fn prepend_memory_tokens(&self, x: &Tensor) -> Result<Tensor> {
        let Some(memory) = &self.memory_tokens else { return Ok(x.clone()) };
        let memory = memory.tensor();
        let memory = memory.expand([x.dim(0)?, memory.dim(0)?, memory.dim(1)?])?;
        Tensor::cat(&[&memory, x], 1)
    }

    /// Prepends memory tokens, which are not padding, to a padding mask.
    pub(super) fn mask_with_memory_tokens(&self, mask: Option<&Tensor>) -> Result<Option<Tensor>> {
        let (Some(mask), true) = (mask, self.memory_tokens.is_some()) else { return Ok(mask.cloned()) };
        ensure!(
            mask.rank() == 2 && mask.dtype() == DType::Bool,
            Error::shape("mask", format_args!("expected bool [batch, n], got {:?} {}", mask.shape(), mask.dtype()))
        );
        let kept = Tensor::ones([mask.dim(0)?, self.plan.num_memory_tokens], DType::Bool, mask.device())?;
        Tensor::cat(&[&kept, mask], 1).map(Some)
    }

    /// Returns the embeddings of token types, if the model has them: `[b, n, dim]`, or `[1, dim]` if all types are 0.
    fn token_types(&self, tokens: &Tensor, types: Option<&Tensor>) -> Result<Option<Tensor>> {
        let (table, types) = match (&self.token_type_emb, types) {
            (Some(table), Some(types)) => (table, types),
            (Some(table), None) => return table.table()?.narrow(0, 0, 1).map(Some),
            (None, None) => return Ok(None),
            (None, Some(_)) => {
                return Err(Error::argument("token_types", "require a model with `num_token_types` above 0"));
            }
        };
        ensure!(
            types.shape() == tokens.shape() && types.dtype() == DType::I64,
            Error::shape(
                "token_types",
                format_args!(
                    "expected i64 {:?}, the shape of the tokens, got {:?} {}",
                    tokens.shape(),
                    types.shape(),
                    types.dtype()
                )
            )
        );
        table.forward(types).context("token_type_emb").map(Some)
    }

    /// Returns the options of the layers: the mask covers memory tokens, memories are rotated.
    pub(super) fn layers_options(&self, options: &ForwardOptions) -> Result<ForwardOptions> {
        let mut options = options.clone();
        options.mask = self.mask_with_memory_tokens(options.mask.as_ref())?;
        ensure!(
            !options.return_mems || self.plan.max_mem_len.is_some(),
            Error::option("max_mem_len", "must be set for `return_mems`: the number of memories to keep, 0 for all")
        );
        if let Some(mems) = &mut options.mems {
            // Too few to rotate are too few for the layers, which return the error.
            let down = self.plan.shift_mem_down.min(mems.len());
            mems.rotate_left(down);
        }
        Ok(options)
    }

    /// Concatenates old memories and these hidden states, and truncates them.
    fn new_mems(&self, hiddens: &[Tensor], mems: Option<&[Tensor]>) -> Result<Vec<Tensor>> {
        let keep = self.plan.max_mem_len.filter(|&most| most > 0).unwrap_or(usize::MAX);
        let join = |(index, hidden): (usize, &Tensor)| {
            let hidden = hidden.detach();
            let joined = match mems.and_then(|mems| mems.get(index)) {
                Some(mem) => Tensor::cat(&[&mem.detach(), &hidden], 1)?,
                None => hidden,
            };
            let length = joined.dim(1)?;
            let kept = length.min(keep);
            joined.narrow(1, length - kept, kept)
        };
        hiddens.iter().enumerate().map(join).try_collect_vec()
    }
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

/// Rejects a sequence that is too long.
pub(super) fn check_length(n: usize, max_seq_len: usize) -> Result<()> {
    ensure!(
        n <= max_seq_len,
        Error::argument("sequence", format_args!("expected at most `max_seq_len` ({max_seq_len}) positions, got {n}"))
    );
    Ok(())
}
