//! Loss and generation of vectors.

use super::ContinuousTransformerWrapper;
use crate::{
    Error, ParamStore, Result, Tensor,
    config::{ContinuousAutoregressivePlan, ContinuousLoss, ContinuousTransformerWrapperConfig},
    error::{ErrorContext, ensure},
    nn::ForwardOptions,
};

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
    loss: ContinuousLoss,
}

impl ContinuousAutoregressiveWrapper {
    /// Creates a model from the options of the wrapped one; its parameters' names begin with `net.`.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination, or
    /// different numbers of input and output features.
    pub fn new(config: &ContinuousTransformerWrapperConfig, store: &ParamStore) -> Result<Self> {
        let net = config.plan().context("net")?;
        Self::from_plan(ContinuousAutoregressivePlan { net, loss: ContinuousLoss::default() }, store)
    }

    /// Creates a model from its plan, like [`ContinuousAutoregressiveWrapper::new`].
    ///
    /// Errors: different numbers of input and output features.
    pub fn from_plan(plan: ContinuousAutoregressivePlan, store: &ParamStore) -> Result<Self> {
        let dim = plan.net.layers.dim;
        let (dim_in, dim_out) = (plan.net.dim_in.unwrap_or(dim), plan.net.dim_out.unwrap_or(dim));
        ensure!(
            dim_in == dim_out,
            Error::option(
                "dim_out",
                format_args!("expected `dim_in` ({dim_in}), because predictions become inputs, got {dim_out}")
            )
            .context("net")
        );
        let net = ContinuousTransformerWrapper::from_plan(plan.net, &store.at("net")).context("net")?;
        Ok(Self { net, loss: plan.loss })
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
        if let Some(lens) = options.lens.take() {
            ensure!(options.mask.is_none(), Error::argument("lens", "cannot be used with a `mask`"));
            options.mask = Some(Tensor::arange(n, x.device())?.lt(&lens.unsqueeze(-1)?)?);
        }
        if let Some(mask) = options.mask.take() {
            let full = mask.rank() == 2 && mask.shape()[1] == n + 1;
            options.mask = Some(if full { mask.narrow(1, 0, n)? } else { mask });
        }
        let out = self.net.forward(&x.narrow(1, 0, n)?, &options).context("net")?.out;
        let precise = out.dtype().accumulator();
        let (out, target) = (out.to_dtype(precise)?, x.narrow(1, 1, n)?.to_dtype(precise)?);
        let error = self.error(&out, &target)?;
        let Some(mask) = &options.mask else { return error.mean(&[-1])?.mean(&[]) };
        if self.loss.equal_rows {
            // The sum over features and kept positions, divided by the number of positions.
            let sums = error.sum(&[-1])?.masked_fill(&mask.logical_not()?, 0.0)?.sum(&[1])?;
            let kept = mask.to_dtype(precise)?.sum(&[1])?;
            let none = kept.lt(&Tensor::ones((), precise, kept.device())?)?;
            return sums.div(&kept.masked_fill(&none, 1.0)?)?.mean(&[]);
        }
        let kept = mask.to_vec::<bool>()?.into_iter().filter(|&kept| kept).count();
        ensure!(kept > 0, Error::argument("mask", "masks every position, so the mean has no terms"));
        error.mean(&[-1])?.masked_fill(&mask.logical_not()?, 0.0)?.sum(&[])?.affine(1.0 / kept as f64, 0.0)
    }

    /// Returns the error of each predicted number, `[b, n, dim_out]`.
    fn error(&self, out: &Tensor, target: &Tensor) -> Result<Tensor> {
        if self.net.plan().probabilistic {
            // Negative log-likelihood of a normal distribution, without its constant.
            let [mean, variance] = [out.select(0, 0)?, out.select(0, 1)?];
            let square = mean.sub(target)?.square()?;
            return variance.ln()?.add(&square.div(&variance)?)?.affine(0.5, 0.0);
        }
        let difference = out.sub(target)?;
        match self.loss.l1 {
            true => difference.relu()?.add(&difference.neg()?.relu()?),
            false => difference.square(),
        }
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
        let window = self.net.plan().window();
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
