//! Vectors in, vectors out.

use std::sync::Arc;

use super::{Output, transformer::check_length};
use crate::{
    Error, ParamStore, Result, Tensor,
    config::{ContinuousPlan, ContinuousTransformerWrapperConfig},
    error::{ErrorContext, ensure},
    nn::{AbsolutePositionalEmbedding, AttentionLayers, ForwardOptions, Linear, Norm},
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
    pos_emb: Option<AbsolutePositionalEmbedding>,
    attn_layers: AttentionLayers,
    norm: Option<Norm>,
    project_out: Option<Linear>,
}

impl ContinuousTransformerWrapper {
    /// Creates a model from its options, with parameters under the names of PyTorch's state dict.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination.
    pub fn new(config: &ContinuousTransformerWrapperConfig, store: &ParamStore) -> Result<Self> {
        let plan = config.plan()?;
        let dim = plan.layers.dim;
        let positions = || AbsolutePositionalEmbedding::new(dim, plan.max_seq_len, true, &store.at("pos_emb"));
        Ok(Self {
            project_in: plan.dim_in.map(|dim_in| Linear::new(&store.at("project_in"), dim_in, dim)).transpose()?,
            pos_emb: plan.absolute_positions.then(positions).transpose()?,
            attn_layers: AttentionLayers::new(&plan.layers, &store.at("attn_layers"))?,
            norm: plan.layers.final_norm.map(|norm| Norm::new(norm, dim, &store.at("norm"))).transpose()?,
            project_out: plan.dim_out.map(|dim_out| Linear::new(&store.at("project_out"), dim, dim_out)).transpose()?,
            plan: Arc::new(plan),
        })
    }

    /// Returns the plan that the model was built from.
    pub fn plan(&self) -> &ContinuousPlan {
        &self.plan
    }

    /// Computes the output, `[b, n, dim_in] → [b, n, dim_out]`, or what the options request.
    ///
    /// Errors: an input of another shape, longer than the table of absolute positions, or options that do not fit the
    /// model; this wrapper returns no memories.
    pub fn forward(&self, x: &Tensor, options: &ForwardOptions) -> Result<Output> {
        self.check_vectors(x)?;
        ensure!(
            !options.return_mems,
            Error::argument(
                "return_mems",
                "requires a TransformerWrapper; ContinuousTransformerWrapper returns no memories"
            )
        );
        let n = x.shape()[1];
        if self.plan.absolute_positions {
            check_length(n, self.plan.max_seq_len)?;
        }
        let x = self.embed_vectors(x, |positions| positions.forward(n))?;
        let layers = self.attn_layers.forward_normed(&x, options, self.norm.as_ref())?;
        let out = if options.return_embeddings { layers.out } else { self.outputs(layers.out)? };
        Ok(Output { out, mems: Vec::new(), attn: layers.attn })
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
        positions_of: impl FnOnce(&AbsolutePositionalEmbedding) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut x = match &self.project_in {
            Some(project) => project.forward(x).context("project_in")?,
            None => x.clone(),
        };
        if let Some(positions) = &self.pos_emb {
            x = x.add(&positions_of(positions)?).context("pos_emb")?;
        }
        x.dropout(self.plan.emb_dropout)
    }

    /// Returns the final norm.
    pub(super) fn norm(&self) -> Option<&Norm> {
        self.norm.as_ref()
    }

    /// Projects normed hidden states to outputs: `[.., dim] → [.., dim_out]`.
    pub(super) fn outputs(&self, normed: Tensor) -> Result<Tensor> {
        match &self.project_out {
            Some(project) => project.forward(&normed).context("project_out"),
            None => Ok(normed),
        }
    }
}

/// Predicts each vector of a sequence from those before it.
///
/// ```
/// use x_transformers::prelude::*;
/// let config = ContinuousTransformerWrapperConfig {
///     dim_in: Some(3),
///     dim_out: Some(3),
///     max_seq_len: 16,
///     attn_layers: AttentionLayersConfig::decoder(32, 1),
///     ..Default::default()
/// };
/// let model = ContinuousAutoregressiveWrapper::new(&config, &ParamStore::new(0, DType::F32, &Device::Cpu))?;
/// let x = Tensor::ones([1, 8, 3], DType::F32, &Device::Cpu)?;
/// assert!(model.loss(&x, &ForwardOptions::default())?.item()? >= 0.0);
/// assert_eq!(model.generate(&x, 4, &ForwardOptions::default())?.shape()[..], [1, 4, 3]);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ContinuousAutoregressiveWrapper {
    /// The wrapped model.
    pub net: ContinuousTransformerWrapper,
}

impl ContinuousAutoregressiveWrapper {
    /// Creates a model from the options of the wrapped one; its parameters' names begin with `net.`.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination, or
    /// different numbers of input and output features.
    pub fn new(config: &ContinuousTransformerWrapperConfig, store: &ParamStore) -> Result<Self> {
        let net = ContinuousTransformerWrapper::new(config, &store.at("net")).context("net")?;
        let dim = net.plan.layers.dim;
        let (dim_in, dim_out) = (net.plan.dim_in.unwrap_or(dim), net.plan.dim_out.unwrap_or(dim));
        ensure!(
            dim_in == dim_out,
            Error::option(
                "dim_out",
                format_args!("expected `dim_in` ({dim_in}), because predictions become inputs, got {dim_out}")
            )
            .context("net")
        );
        Ok(Self { net })
    }

    /// Computes the mean squared error of the predictions of `x[:, 1:]` from `x[:, :-1]`: `[b, n + 1, dim_in]` to a
    /// scalar, in f32 for half precision.
    ///
    /// A mask as long as the sequence loses its last column. Predictions from masked positions are ignored.
    ///
    /// Errors: fewer than two vectors, no unmasked position, options that request more than the output, and those of
    /// [`ContinuousTransformerWrapper::forward`].
    pub fn loss(&self, x: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        ensure!(
            x.rank() == 3 && x.shape()[1] >= 2,
            Error::shape(
                "loss",
                format_args!("expected [batch, n, features] with n of at least 2, got {:?}", x.shape())
            )
        );
        options.check_output_only("loss")?;
        let n = x.shape()[1] - 1;
        let mut options = options.clone();
        if let Some(mask) = options.mask.take() {
            let full = mask.rank() == 2 && mask.shape()[1] == n + 1;
            options.mask = Some(if full { mask.narrow(1, 0, n)? } else { mask });
        }
        let out = self.net.forward(&x.narrow(1, 0, n)?, &options).context("net")?.out;
        let precise = out.dtype().accumulator();
        let error = out.to_dtype(precise)?.sub(&x.narrow(1, 1, n)?.to_dtype(precise)?)?.square()?.mean(&[-1])?;
        let Some(mask) = &options.mask else { return error.mean(&[]) };
        let kept = mask.to_vec::<bool>()?.into_iter().filter(|&kept| kept).count();
        ensure!(kept > 0, Error::argument("mask", "masks every position, so the mean has no terms"));
        error.masked_fill(&mask.logical_not()?, 0.0)?.sum(&[])?.affine(1.0 / kept as f64, 0.0)
    }

    /// Continues a sequence, `[b, t, dim_in]` or `[t, dim_in]`, by `seq_len` vectors, and returns only those.
    ///
    /// The context is the last `max_seq_len` vectors; the options apply to the forward pass of every step.
    ///
    /// Errors: an empty sequence, and those of [`ContinuousTransformerWrapper::forward`].
    pub fn generate(&self, start: &Tensor, seq_len: usize, options: &ForwardOptions) -> Result<Tensor> {
        options.check_output_only("generate")?;
        let flat = start.rank() == 2;
        let mut all = if flat { start.unsqueeze(0)? } else { start.clone() }.detach();
        ensure!(
            all.rank() == 3 && all.shape()[1] > 0,
            Error::shape(
                "start",
                format_args!("expected [batch, n, features] or [n, features], got {:?}", start.shape())
            )
        );
        let (b, prompt) = (all.dim(0)?, all.dim(1)?);
        let window = self.net.plan.window();
        let longest = prompt.saturating_add(seq_len);
        let fits = b > 0 && prompt <= window && options.mask.is_none() && self.net.supports_kv_cache(options).is_ok();
        let mut cache = fits.then(|| self.net.cache(b, longest, all.dtype(), options)).transpose()?;
        for _ in 0..seq_len {
            let length = all.dim(1)?;
            let out = match &mut cache {
                // Beyond the window every vector gets a new position and a new past in each step.
                Some(cache) if length <= window => {
                    let new = length - cache.lengths()[0];
                    self.net.extend(&all.narrow(1, length - new, new)?.detach(), &vec![new; b], None, cache)
                }
                _ => {
                    let seen = length.min(window);
                    self.net.forward(&all.narrow(1, length - seen, seen)?, options).map(|output| output.out)
                }
            };
            let out = out.context("net")?;
            all = Tensor::cat(&[&all, &out.narrow(1, out.dim(1)? - 1, 1)?.detach()], 1)?;
        }
        let new = all.narrow(1, prompt, seq_len)?;
        if flat { new.squeeze(0) } else { Ok(new) }
    }
}
