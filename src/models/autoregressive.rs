//! Loss and generation of a decoder.

use super::{Output, TransformerWrapper};
use crate::{
    Error, ParamStore, QuantType, Result, Tensor,
    config::AutoregressiveConfig,
    error::{ErrorContext, ensure},
    nn::ForwardOptions,
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
    ignore_index: i64,
    pad_value: i64,
}

impl AutoregressiveWrapper {
    /// Creates a model from its options; its parameters' names begin with `net.`.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination.
    pub fn new(config: &AutoregressiveConfig, store: &ParamStore) -> Result<Self> {
        check_logits(config.net.average_pool_embed, config.net.return_only_embed)?;
        let net = TransformerWrapper::new(&config.net, &store.at("net")).context("net")?;
        Ok(Self { net, ignore_index: config.ignore_index, pad_value: config.pad_value })
    }

    /// Wraps an existing model, with the default `ignore_index` and `pad_value`. Its parameters keep their names,
    /// whereas those of [`AutoregressiveWrapper::new`] lie at `net`.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for a model without logits for each token.
    pub fn around(net: TransformerWrapper) -> Result<Self> {
        check_logits(net.plan().average_pool_embed, net.plan().return_only_embed)?;
        let AutoregressiveConfig { ignore_index, pad_value, .. } = AutoregressiveConfig::default();
        Ok(Self { net, ignore_index, pad_value })
    }

    /// Computes the mean cross-entropy of `tokens[:, 1:]` given `tokens[:, :-1]`, without targets equal to
    /// `ignore_index`: `[b, n + 1]` I64 to a scalar, in f32 for half precision.
    ///
    /// A mask as long as the tokens loses its last column; it does not mask the loss.
    ///
    /// Errors: fewer than two tokens, options that request more than the output, and those of
    /// [`TransformerWrapper::forward`].
    pub fn loss(&self, tokens: &Tensor, options: &ForwardOptions) -> Result<Tensor> {
        ensure!(
            tokens.rank() == 2 && tokens.shape()[1] >= 2,
            Error::shape(
                "loss",
                format_args!("expected tokens [batch, n] with n of at least 2, got {:?}", tokens.shape())
            )
        );
        options.check_output_only("loss")?;
        let n = tokens.shape()[1] - 1;
        let mut options = options.clone();
        if let Some(mask) = options.mask.take() {
            let full = mask.rank() == 2 && mask.shape()[1] == n + 1;
            options.mask = Some(if full { mask.narrow(1, 0, n)? } else { mask });
        }
        options.return_embeddings = true;
        let Output { out, .. } = self.net.forward(&tokens.narrow(1, 0, n)?, &options).context("net")?;
        self.net.cross_entropy(&out, &tokens.narrow(1, 1, n)?, self.ignore_index).context("net")
    }

    /// Rounds weights to a quantised type like [`TransformerWrapper::quantize`].
    ///
    /// Errors: weights that are not finite; a type that [is not packed](QuantType::is_packed).
    #[doc(alias = "quantize_dynamic")]
    pub fn quantize(&mut self, kind: QuantType) -> Result<()> {
        self.net.quantize(kind).context("net")
    }

    /// Returns the token that fills a row after its end.
    pub(super) fn pad_value(&self) -> i64 {
        self.pad_value
    }
}

/// Checks that the model has logits for each token.
fn check_logits(average_pool_embed: bool, return_only_embed: bool) -> Result<()> {
    let pooled = [("average_pool_embed", average_pool_embed), ("return_only_embed", return_only_embed)];
    match pooled.into_iter().find(|(_, on)| *on) {
        Some((key, _)) => {
            Err(Error::option(key, "cannot be used with AutoregressiveWrapper, which needs logits for every token")
                .context("net"))
        }
        None => Ok(()),
    }
}
