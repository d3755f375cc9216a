//! Vectors in, vectors out.

use std::sync::Arc;

use super::{
    Output,
    positions::{Absolute, add_positions, prepend, with_real_tokens},
    transformer::{last_memories, mean_over_tokens},
};
use crate::{
    Error, Init, Param, ParamStore, Result, Tensor,
    collect::CollectVec,
    config::{ContinuousPlan, ContinuousTransformerWrapperConfig, MemoryPlan, NormPlan},
    error::{ErrorContext, ensure},
    nn::{AttentionLayers, ForwardOptions, Linear, Norm},
};

/// Transformer on vectors: a projection, positions, attention layers, a LayerNorm and a projection.
///
/// ```
/// use x_transformers::prelude::*;
/// let config = ContinuousTransformerWrapperConfig {
///     dim_in: Some(3),
///     dim_out: Some(2),
///     max_seq_len: 16,
///     attn_layers: AttentionLayersConfig::encoder(32, 1),
///     ..Default::default()
/// };
/// let model = ContinuousTransformerWrapper::new(&config, &ParamStore::new(0, DType::F32, &Device::Cpu))?;
/// let x = Tensor::ones([1, 16, 3], DType::F32, &Device::Cpu)?;
/// assert_eq!(model.forward(&x, &ForwardOptions::default())?.out.shape()[..], [1, 16, 2]);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ContinuousTransformerWrapper {
    plan: Arc<ContinuousPlan>,
    project_in: Option<Linear>,
    pos_emb: Option<Absolute>,
    post_emb_norm: Option<Norm>,
    memory_tokens: Option<Param>,
    attn_layers: AttentionLayers,
    norm: Option<Norm>,
    project_out: Option<Linear>,
}

impl ContinuousTransformerWrapper {
    /// Creates a model from its options, with parameters under the names of PyTorch's state dict.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination.
    pub fn new(config: &ContinuousTransformerWrapperConfig, store: &ParamStore) -> Result<Self> {
        Self::from_plan(config.plan()?, store)
    }

    /// Creates a model from its plan, with parameters under the names of PyTorch's state dict.
    ///
    /// Errors: those of the layers.
    pub fn from_plan(plan: ContinuousPlan, store: &ParamStore) -> Result<Self> {
        let dim = plan.layers.dim;
        let linear = |name: &str, from: usize, to: usize| Linear::maybe_biased(&store.at(name), from, to, plan.bias);
        let norm =
            |norm: Option<NormPlan>, name: &str| norm.map(|norm| Norm::new(norm, dim, &store.at(name))).transpose();
        let width = if plan.probabilistic { 2 } else { 1 };
        let memory = || store.param("memory_tokens", [plan.num_memory_tokens, dim], Init::Normal(1.0));
        Ok(Self {
            project_in: plan.dim_in.map(|dim_in| linear("project_in", dim_in, dim)).transpose()?,
            pos_emb: Absolute::new(plan.absolute_positions, dim, plan.max_seq_len, store)?,
            post_emb_norm: norm(plan.post_emb_norm, "post_emb_norm")?,
            memory_tokens: (plan.num_memory_tokens > 0).then(memory).transpose()?,
            attn_layers: AttentionLayers::new(&plan.layers, &store.at("attn_layers"))?,
            norm: norm(plan.layers.final_norm.filter(|_| !plan.layers.owns_final_norm), "norm")?,
            project_out: plan.dim_out.map(|dim_out| linear("project_out", dim, width * dim_out)).transpose()?,
            plan: Arc::new(plan),
        })
    }

    /// Returns the plan that the model was built from.
    pub fn plan(&self) -> &ContinuousPlan {
        &self.plan
    }

    /// Computes the output, `[b, n, dim_in] → [b, n, dim_out]`, or what the options request. A probabilistic model
    /// returns means and variances, `[2, b, n, dim_out]`.
    ///
    /// Errors: an input of another shape, longer than the table of absolute positions, or options that do not fit the
    /// model.
    pub fn forward(&self, x: &Tensor, options: &ForwardOptions) -> Result<Output> {
        self.check_vectors(x)?;
        ensure!(
            !options.return_mems || self.plan.memories != MemoryPlan::None,
            Error::argument(
                "return_mems",
                "requires a TransformerWrapper; ContinuousTransformerWrapper returns no memories"
            )
        );
        let memory_tokens = self.plan.num_memory_tokens;
        ensure!(
            memory_tokens == 0 || options.prepend_embeds.is_none(),
            Error::argument(
                "prepend_embeds",
                "cannot be used with `num_memory_tokens`: x-transformers cuts wrong rows"
            )
        );
        let mut options = options.clone();
        let pooled_mask = options.mask.clone();
        if let Some(lens) = &options.lens {
            ensure!(options.mask.is_none(), Error::argument("lens", "cannot be used with a `mask`"));
            options.mask = Some(Tensor::arange(x.dim(1)?, x.device())?.lt(&lens.unsqueeze(-1)?)?);
        }
        let x = add_positions(self.projected(x)?, self.pos_emb.as_ref(), &options)?;
        let x = self.with_memory_tokens(&self.summed(x, &options)?)?;
        options.mask = with_real_tokens(options.mask.as_ref(), memory_tokens)?;
        let mut mask = options.mask.take();
        let x = prepend(x, &mut mask, &options)?.dropout(self.plan.emb_dropout)?;
        options.mask = mask;
        // Like in x-transformers, positions are those of the table alone.
        (options.pos, options.seq_start_pos) = (None, None);
        let layers = self.attn_layers.forward_normed(&x, &options, self.norm.as_ref())?;
        let mut out = layers.out;
        if memory_tokens > 0 {
            out = out.narrow(1, memory_tokens, out.dim(1)? - memory_tokens)?;
        }
        if self.plan.average_pool_embed {
            out = mean_over_tokens(&out, pooled_mask.as_ref())?;
        }
        let mems = match options.return_mems {
            true => layers
                .hiddens
                .iter()
                .map(|hidden| last_memories(&hidden.detach(), self.plan.memories))
                .try_collect_vec(),
            false => Ok(Vec::new()),
        };
        let out = if options.return_embeddings { out } else { self.outputs(out)? };
        let (attn, scores) = (layers.attn, layers.scores);
        Ok(Output { out, others: Vec::new(), embeddings: None, mems: mems?, attn, scores })
    }

    fn projected(&self, x: &Tensor) -> Result<Tensor> {
        match &self.project_in {
            Some(project) => project.forward(x).context("project_in"),
            None => Ok(x.clone()),
        }
    }

    /// Adds other embeddings, and applies the norm after them.
    fn summed(&self, x: Tensor, options: &ForwardOptions) -> Result<Tensor> {
        let x = match &options.sum_embeds {
            Some(embeds) => x.add(embeds).context("sum_embeds")?,
            None => x,
        };
        match &self.post_emb_norm {
            Some(norm) => norm.forward(&x).context("post_emb_norm"),
            None => Ok(x),
        }
    }

    fn with_memory_tokens(&self, x: &Tensor) -> Result<Tensor> {
        let Some(memory) = &self.memory_tokens else { return Ok(x.clone()) };
        let memory = memory.tensor();
        Tensor::cat(&[&memory.expand([x.dim(0)?, memory.dim(0)?, memory.dim(1)?])?, x], 1)
    }

    /// Returns the layers.
    pub(super) fn attn_layers(&self) -> &AttentionLayers {
        &self.attn_layers
    }

    /// Checks that `x` is a float tensor of shape `[b, n, dim_in]`.
    pub(super) fn check_vectors(&self, x: &Tensor) -> Result<()> {
        let features = self.plan.dim_in.unwrap_or(self.plan.layers.dim);
        ensure!(
            x.rank() == 3 && x.shape()[2] == features && x.dtype().is_float(),
            Error::shape(
                "x",
                format_args!("expected floats [batch, n, {features}], got {:?} {}", x.shape(), x.dtype())
            )
        );
        Ok(())
    }

    /// Embeds vectors with the positions that the closure takes from the table: `[b, n, dim_in] → [b, n, dim]`.
    pub(super) fn embed_vectors(
        &self,
        x: &Tensor,
        positions_of: impl FnOnce(&Absolute) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut x = self.projected(x)?;
        if let Some(positions) = &self.pos_emb {
            x = x.add(&positions_of(positions)?).context("pos_emb")?;
        }
        self.summed(x, &ForwardOptions::default())?.dropout(self.plan.emb_dropout)
    }

    /// Returns the final norm.
    pub(super) fn norm(&self) -> Option<&Norm> {
        self.norm.as_ref()
    }

    /// Projects normed hidden states to outputs: `[.., dim] → [.., dim_out]`.
    pub(super) fn outputs(&self, normed: Tensor) -> Result<Tensor> {
        let out = match &self.project_out {
            Some(project) => project.forward(&normed).context("project_out")?,
            None => normed,
        };
        if !self.plan.probabilistic {
            return Ok(out);
        }
        // Neighbours are the mean and the logarithm of the variance.
        let mut shape = out.shape().to_vec();
        let last = shape.len() - 1;
        shape[last] /= 2;
        shape.push(2);
        let pairs = out.reshape(&shape[..])?;
        let [mean, variance] = [pairs.select(-1, 0)?, pairs.select(-1, 1)?.exp()?];
        Tensor::cat(&[&mean.unsqueeze(0)?, &variance.unsqueeze(0)?], 0)
    }
}
