//! One vector for a text.

use super::{TransformerWrapper, transformer::mean_over_tokens};
use crate::{Error, Result, Tensor, error::ensure, nn::ForwardOptions};

/// How the vectors of tokens become one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pooling {
    /// Their mean, padding left out.
    Mean,
    /// The first one.
    FirstToken,
    /// The first one through the model's pooled head, a linear layer and tanh.
    Pooler,
}

/// An encoder that gives one vector for each text (Reimers and Gurevych, <https://arxiv.org/abs/1908.10084>).
#[derive(Clone, Debug)]
pub struct SentenceEncoder {
    /// The model of tokens.
    pub model: TransformerWrapper,
    pooling: Pooling,
    normalize: bool,
}

impl SentenceEncoder {
    /// Around a model; `normalize` gives all vectors the length 1, so that products are cosines.
    ///
    /// Errors: a model that gives one vector already, or [`Pooling::Pooler`] of one that has no pooled head.
    pub fn new(model: TransformerWrapper, pooling: Pooling, normalize: bool) -> Result<Self> {
        ensure!(
            !model.plan().average_pool_embed,
            Error::option("average_pool_embed", "is on: the model gives one vector for a text already")
        );
        ensure!(
            pooling != Pooling::Pooler || model.plan().pooler,
            Error::option("pooler", "is off: the model has no pooled head")
        );
        Ok(Self { model, pooling, normalize })
    }

    /// Tokens `[b, n]` with a mask of those that are no padding, Bool `[b, n]`, to vectors `[b, dim]`.
    ///
    /// Errors: no token, and those of [`TransformerWrapper::forward`].
    pub fn embed(&self, tokens: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        ensure!(
            tokens.rank() == 2 && tokens.shape()[1] > 0,
            Error::shape("tokens", format!("expected i64 [batch, n] with n of at least 1, got {:?}", tokens.shape()))
        );
        let options = ForwardOptions { mask: mask.cloned(), return_embeddings: true, ..ForwardOptions::default() };
        let hidden = self.model.forward(tokens, &options)?.out;
        let pooled = match self.pooling {
            Pooling::Mean => mean_over_tokens(&hidden, mask)?,
            Pooling::FirstToken => hidden.select(1, 0)?,
            Pooling::Pooler => self.model.pooled(&hidden)?,
        };
        if !self.normalize {
            return Ok(pooled);
        }
        // The norm of `ScaleNorm` times √dim, which takes the root of the mean for the length.
        let scale = (pooled.dim(-1)? as f64).powf(-0.5);
        pooled.scale_norm(&Tensor::full([1], scale, pooled.dtype(), pooled.device())?, 1e-12 * scale)
    }
}
