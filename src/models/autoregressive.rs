//! Loss and generation of a decoder.

use super::{Output, TransformerWrapper, looped};
use crate::{
    DType, Error, ParamStore, Philox, QuantType, Result, Tensor,
    autograd::dropout_stream,
    config::{AutoregressiveConfig, AutoregressivePlan, LossPlan, TransformerPlan},
    error::{ErrorContext, ensure},
    nn::ForwardOptions,
    sort::order,
};

/// Language model: predicts each token from those before it.
///
/// ```
/// use x_transformers::{
///     DType, Device, ParamStore, Tape, Tensor,
///     config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
///     models::{AutoregressiveWrapper, ForwardOptions, GenerateOptions},
/// };
/// # fn main() -> x_transformers::Result<()> {
/// let net = TransformerWrapperConfig {
///     num_tokens: 256,
///     max_seq_len: 16,
///     attn_layers: AttentionLayersConfig::decoder(16, 1),
///     ..Default::default()
/// };
/// let config = AutoregressiveConfig { net, ..Default::default() };
/// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
/// let model = AutoregressiveWrapper::new(&config, &store)?;
///
/// let tokens = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6], [2, 3], &Device::Cpu)?;
/// let mut tape = Tape::train(0);
/// let loss = model.loss(&tokens, &ForwardOptions::default())?;
/// let grads = tape.backward(&loss)?;
/// assert!(grads.unused(&store.params()).is_empty());
///
/// let prompt = Tensor::from_slice(&[1i64, 2], [2], &Device::Cpu)?;
/// let new = model.generate(&prompt, 4, &GenerateOptions::default(), &mut |_| true)?;
/// assert_eq!(new.shape()[..], [4]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "GPT")]
#[doc(alias = "LanguageModel")]
pub struct AutoregressiveWrapper {
    /// The wrapped model.
    pub net: TransformerWrapper,
    loss: LossPlan,
}

impl AutoregressiveWrapper {
    /// Creates a model from its options; its parameters' names begin with `net.`.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination.
    pub fn new(config: &AutoregressiveConfig, store: &ParamStore) -> Result<Self> {
        Self::from_plan(config.plan()?, store)
    }

    /// Creates a model from its plan, like [`AutoregressiveWrapper::new`].
    ///
    /// Errors: a plan without logits for each token.
    pub fn from_plan(plan: AutoregressivePlan, store: &ParamStore) -> Result<Self> {
        check_logits(&plan.net)?;
        let net = TransformerWrapper::from_plan(plan.net, &store.at("net")).context("net")?;
        Ok(Self { net, loss: plan.loss })
    }

    /// Wraps an existing model, with the default `ignore_index` and `pad_value`. Its parameters keep their names,
    /// whereas those of [`AutoregressiveWrapper::new`] lie at `net`.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for a model without logits for each token.
    pub fn around(net: TransformerWrapper) -> Result<Self> {
        Self::with_loss(net, LossPlan::default())
    }

    /// Wraps an existing model, like [`AutoregressiveWrapper::around`], with this loss.
    ///
    /// Errors: a model without logits for each token.
    pub fn with_loss(net: TransformerWrapper, loss: LossPlan) -> Result<Self> {
        check_logits(net.plan())?;
        Ok(Self { net, loss })
    }

    /// Computes the mean cross-entropy of `tokens[:, 1:]` given `tokens[:, :-1]`, without targets equal to
    /// `ignore_index`: `[b, n + 1]` I64 to a scalar, in f32 for half precision.
    ///
    /// A mask as long as the tokens loses its last column; it does not mask the loss.
    ///
    /// Errors: fewer than two tokens, options that request more than the output, and those of
    /// [`TransformerWrapper::forward`].
    pub fn loss(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        Ok(self.loss_where(tokens, None, options)?.0)
    }

    /// Computes [`AutoregressiveWrapper::loss`] and the logits of all tokens but the last, `[b, n, num_tokens]`.
    ///
    /// Errors: those of [`AutoregressiveWrapper::loss`].
    pub fn loss_and_logits(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<(Tensor, Tensor)> {
        let (loss, hidden) = self.loss_where(tokens, None, options)?;
        Ok((loss, self.net.logits(&hidden).context("net")?))
    }

    /// Computes [`AutoregressiveWrapper::loss`] over the tokens that a mask marks as targets with `true`,
    /// `[b, n + 1]` Bool, whose first column does not matter: the answers of a chat, for instance.
    ///
    /// Errors: those of [`AutoregressiveWrapper::loss`]; a mask of another shape.
    pub fn masked_loss(&self, tokens: &Tensor, targets: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        ensure!(
            targets.shape() == tokens.shape(),
            Error::shape(
                "masked_loss",
                format_args!("expected a mask {:?} like the tokens, got {:?}", tokens.shape(), targets.shape())
            )
        );
        Ok(self.loss_where(tokens, Some(targets), options)?.0)
    }

    /// Returns `tokens[:, 1:]`, with `ignore_index` where a mask has no target.
    fn targets(&self, tokens: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let n = tokens.dim(1)? - 1;
        let targets = tokens.narrow(1, 1, n)?;
        let Some(mask) = mask else { return Ok(targets) };
        let ignored = Tensor::full((), self.loss.ignore_index as f64, DType::I64, tokens.device())?;
        mask.narrow(1, 1, n)?.where_cond(&targets, &ignored)
    }

    /// Returns the loss, and the normed hidden states that predict the targets.
    fn loss_where(&self, tokens: &Tensor, mask: Option<&Tensor>, options: &ForwardOptions) -> Result<(Tensor, Tensor)> {
        ensure!(
            tokens.rank() == 2 && tokens.shape()[1] >= 2,
            Error::shape(
                "loss",
                format_args!("expected tokens [batch, n] with n of at least 2, got {:?}", tokens.shape())
            )
        );
        options.check_output_only("loss")?;
        if self.loss.reads_all {
            return self.loss_of_all(tokens, mask, options);
        }
        let n = tokens.shape()[1] - 1;
        let targets = self.targets(tokens, mask)?;
        let mut options = options.clone();
        if let Some(mask) = options.mask.take() {
            let full = mask.rank() == 2 && mask.shape()[1] == n + 1;
            options.mask = Some(if full { mask.narrow(1, 0, n)? } else { mask });
        }
        options.return_embeddings = true;
        let Output { out, .. } = self.net.forward(&tokens.narrow(1, 0, n)?, &options).context("net")?;
        Ok((self.net.cross_entropy(&out, &targets, self.loss.ignore_index).context("net")?, out))
    }

    /// Computes the loss of a model that reads the last token too.
    fn loss_of_all(
        &self,
        tokens: &Tensor,
        mask: Option<&Tensor>,
        options: &ForwardOptions,
    ) -> Result<(Tensor, Tensor)> {
        let LossPlan { ignore_index, pad_value, .. } = self.loss;
        let constant = |value: i64| Tensor::full((), value as f64, DType::I64, tokens.device());
        let n = tokens.dim(1)?;
        let mut options = options.clone();
        let mut tokens = tokens.clone();
        if let Some(lens) = options.lens.take() {
            let kept = Tensor::arange(n, tokens.device())?.lt(&lens.unsqueeze(-1)?)?;
            tokens = kept.where_cond(&tokens, &constant(ignore_index)?)?;
        }
        let read = tokens.eq(&constant(ignore_index)?)?.where_cond(&constant(pad_value)?, &tokens)?;
        options.return_embeddings = true;
        options.excise_prepend_embeds = true;
        options.return_scores = self.loss.attn_z_loss;
        if let (true, Some(draws)) = (self.loss.mask_prob > 0.0, dropout_stream("mask_prob")) {
            options.self_attn_kv_mask = Some(drawn_mask(&read, self.loss.mask_prob, draws)?);
        }
        if self.net.exit_gate.is_some() {
            let targets = self.targets(&tokens, mask)?;
            return looped::loss(&self.net, &read, &targets, &self.loss, &options);
        }
        let Output { out, scores, .. } = self.net.forward(&read, &options).context("net")?;
        let (out, targets) = (out.narrow(1, 0, n - 1)?, self.targets(&tokens, mask)?);
        let mut loss = self.net.cross_entropy(&out, &targets, ignore_index).context("net")?;
        if let Some(predicted) = self.net.next_embeddings(&out).context("net")? {
            let error = self.next_embed_error(&predicted, &read, &targets, &options)?;
            loss = loss.add(&error.affine(self.loss.next_embed, 0.0)?.to_dtype(loss.dtype())?)?;
        }
        Ok(match self.loss.attn_z_loss {
            true => (loss.add(&z_loss(&scores, options.attn_z_loss_weight)?.to_dtype(loss.dtype())?)?, out),
            false => (loss, out),
        })
    }

    /// Returns the mean absolute error of predicted embeddings of the targets, `[b, n - 1, dim]`.
    fn next_embed_error(
        &self,
        predicted: &Tensor,
        tokens: &Tensor,
        targets: &Tensor,
        options: &ForwardOptions,
    ) -> Result<Tensor> {
        ensure!(
            options.prepend_embeds.is_none(),
            Error::argument("prepend_embeds", "cannot be used with `add_continuous_pred_head`, like in x-transformers")
        );
        let n = targets.dim(1)?;
        let own = self.net.initial(tokens, options).context("net")?.narrow(1, 1, n)?.detach();
        let error = predicted.sub(&own).context("to_next_embed_pred")?;
        let error = error.relu()?.add(&error.neg()?.relu()?)?.mean(&[-1])?;
        let ignored = Tensor::full((), self.loss.ignore_index as f64, DType::I64, targets.device())?;
        mean_where(&error, &targets.ne(&ignored)?)
    }

    /// Rounds weights to a quantised type like [`TransformerWrapper::quantize`].
    ///
    /// Errors: weights that are not finite; a type that [is not packed](QuantType::is_packed).
    #[doc(alias = "quantize_dynamic")]
    pub fn quantize(&mut self, kind: QuantType) -> Result<()> {
        self.net.quantize(kind).context("net")
    }

    /// Returns how many tokens of a row of this many the model reads to compute the loss.
    pub(crate) fn tokens_read(&self, row: usize) -> usize {
        if self.loss.reads_all { row } else { row - 1 }
    }

    /// Returns the token that fills a row after its end.
    pub(super) fn pad_value(&self) -> i64 {
        self.loss.pad_value
    }
}

/// Masks a share of the keys of each row, but not the first (<https://arxiv.org/abs/2210.13432>).
fn drawn_mask(tokens: &Tensor, share: f64, draws: Philox) -> Result<Tensor> {
    let (b, n) = (tokens.dim(0)?, tokens.dim(1)?);
    let masked = ((n as f64 * share) as usize).min(n - 1);
    let mut keep = vec![true; b * n];
    for (row, keep) in keep.chunks_mut(n).enumerate() {
        let draw = |at: usize| draws.uniform((row * n + 1 + at) as u64);
        let order = order(n - 1, |a, b| draw(a).total_cmp(&draw(b)));
        order.into_iter().take(masked).for_each(|at| keep[1 + at] = false);
    }
    Tensor::from_vec(keep, [b, n], tokens.device())
}

/// Returns the mean of the elements that a mask keeps, NaN if it keeps none.
pub(super) fn mean_where(x: &Tensor, keep: &Tensor) -> Result<Tensor> {
    let kept = keep.to_vec::<bool>()?.into_iter().filter(|&keep| keep).count();
    x.masked_fill(&keep.logical_not()?, 0.0)?.sum(&[])?.affine(1.0 / kept as f64, 0.0)
}

/// Computes the z-loss of the scores of all attentions: a weight, 1e-4 by default, times the mean over queries of the
/// sum over heads of the squared sum over layers of `ln Σ exp(score)` (<https://arxiv.org/abs/2202.08906>).
pub(super) fn z_loss(scores: &[Tensor], weight: Option<f64>) -> Result<Tensor> {
    let mut sum: Option<Tensor> = None;
    for scores in scores {
        let largest = scores.detach().max(-1)?.unsqueeze(-1)?;
        let log_sum = scores.sub(&largest)?.exp()?.sum(&[-1])?.ln()?.add(&largest.squeeze(-1)?)?;
        sum = Some(match sum {
            Some(sum) => sum.add(&log_sum)?,
            None => log_sum,
        });
    }
    let sum = sum.ok_or_else(|| Error::option("add_attn_z_loss", "needs attention"))?;
    sum.square()?.sum(&[1])?.mean(&[])?.affine(weight.unwrap_or(1e-4), 0.0)
}

/// Checks that the model has logits for each token.
fn check_logits(plan: &TransformerPlan) -> Result<()> {
    let pooled = [
        ("average_pool_embed", plan.average_pool_embed),
        ("return_only_embed", plan.return_only_embed),
        ("use_cls_token", plan.num_cls_tokens > 0),
        ("num_output_heads", plan.logits.len() > 1),
    ];
    match pooled.into_iter().find(|(_, on)| *on) {
        Some((key, _)) => {
            Err(Error::option(key, "cannot be used with AutoregressiveWrapper, which needs logits for every token")
                .context("net"))
        }
        None => Ok(()),
    }
}
