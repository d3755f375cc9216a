//! A sequence in, another one out.

use super::{AutoregressiveWrapper, GenerateOptions, TransformerWrapper, positions::with_real_tokens};
use crate::{
    Error, ParamStore, Result, Tensor,
    config::{XTransformerConfig, XTransformerPlan},
    error::{ErrorContext, ensure},
    nn::{ForwardOptions, drop_tokens},
};

/// An encoder, and a decoder that attends to its output (Vaswani et al., <https://arxiv.org/abs/1706.03762>).
///
/// ```
/// use x_transformers::prelude::*;
/// let wrapper = |layers| TransformerWrapperConfig::new(256, 64, layers);
/// let config = XTransformerConfig {
///     enc: wrapper(AttentionLayersConfig::encoder(32, 1)),
///     dec: wrapper(AttentionLayersConfig { cross_attend: true, ..AttentionLayersConfig::decoder(32, 1) }),
///     tie_token_emb: false,
/// };
/// let model = XTransformer::new(&config, &ParamStore::new(0, DType::F32, &Device::Cpu))?;
/// let tokens = Tensor::arange(16, &Device::Cpu)?.unsqueeze(0)?;
/// assert!(model.loss(&tokens, &tokens, &EncoderDecoderOptions::default())?.item()? > 0.0);
/// # Ok::<(), x_transformers::Error>(())
/// ```
#[derive(Clone, Debug)]
#[doc(alias = "EncoderDecoder")]
#[doc(alias = "seq2seq")]
pub struct XTransformer {
    /// The encoder.
    pub encoder: TransformerWrapper,
    /// The decoder with its loss and its sampling.
    pub decoder: AutoregressiveWrapper,
    /// Share of the encoder's tokens that training hides from the decoder.
    tokens_dropout: f64,
}

/// Inputs of [`XTransformer::loss`] besides source and target. Default none.
#[derive(Clone, Debug, Default)]
pub struct EncoderDecoderOptions {
    /// Padding mask of the source, `[b, n]` Bool; `true` marks a real token.
    pub src_mask: Option<Tensor>,
    /// Padding mask of the target, `[b, m]` Bool; `true` marks a real token.
    pub tgt_mask: Option<Tensor>,
    /// Attention mask of the encoder, like [`ForwardOptions::attn_mask`].
    pub src_attn_mask: Option<Tensor>,
    /// Embeddings before those of the source, `[b, p, dim]`; the mask of the source does not cover them.
    pub src_prepend_embeds: Option<Tensor>,
    /// Like [`ForwardOptions::checkpoint_layers`], on both sides.
    pub checkpoint_layers: bool,
    /// Like [`ForwardOptions::explicit_attention`], on both sides.
    pub explicit_attention: bool,
}

impl XTransformer {
    /// Creates a model from its options; its parameters' names begin with `encoder.` and `decoder.net.`.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for options that are illegal alone or in combination.
    pub fn new(config: &XTransformerConfig, store: &ParamStore) -> Result<Self> {
        Self::from_plan(config.plan()?, store)
    }

    /// Creates a model from its plan, like [`XTransformer::new`].
    ///
    /// Errors: those of the layers.
    pub fn from_plan(plan: XTransformerPlan, store: &ParamStore) -> Result<Self> {
        let tokens_dropout = plan.tokens_dropout;
        let encoder = TransformerWrapper::from_plan(plan.enc, &store.at("encoder"))?;
        let tied = plan.tie_token_emb.then(|| encoder.token_emb());
        let decoder = TransformerWrapper::tied(plan.dec, &store.at("decoder").at("net"), tied)?;
        Ok(Self { decoder: AutoregressiveWrapper::with_loss(decoder, plan.loss)?, encoder, tokens_dropout })
    }

    /// Computes the decoder's loss, a scalar, on `tgt [b, m]` given `src [b, n]`.
    ///
    /// Errors: tokens or masks that do not fit.
    pub fn loss(&self, src: &Tensor, tgt: &Tensor, options: &EncoderDecoderOptions) -> Result<Tensor> {
        let decoder = ForwardOptions { mask: options.tgt_mask.clone(), ..self.encode(src, options)? };
        self.decoder.loss(tgt, &decoder).context("decoder")
    }

    /// Computes [`XTransformer::loss`] over the tokens of `tgt` that a mask marks with `true`, `[b, m]` Bool, like
    /// [`AutoregressiveWrapper::masked_loss`].
    ///
    /// Errors: those of [`XTransformer::loss`]; a mask of another shape.
    pub fn masked_loss(
        &self,
        src: &Tensor,
        tgt: &Tensor,
        targets: &Tensor,
        options: &EncoderDecoderOptions,
    ) -> Result<Tensor> {
        let decoder = ForwardOptions { mask: options.tgt_mask.clone(), ..self.encode(src, options)? };
        self.decoder.masked_loss(tgt, targets, &decoder).context("decoder")
    }

    /// Continues `seq_out_start`, `[b, t]` or `[t]`, given `seq_in [b, n]`, like [`AutoregressiveWrapper::generate`].
    ///
    /// The source is encoded once. Of `options.forward` only the mask of the prompt is used.
    ///
    /// Errors: those of [`AutoregressiveWrapper::generate`], or a context in the options, which the encoder computes.
    pub fn generate(
        &self,
        seq_in: &Tensor,
        seq_out_start: &Tensor,
        seq_len: usize,
        source: &EncoderDecoderOptions,
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(&[i64]) -> bool,
    ) -> Result<Tensor> {
        ensure!(
            options.forward.context.is_none() && options.forward.context_mask.is_none(),
            Error::argument("context", "must not be set; it comes from the encoder")
        );
        let encoded = self.encode(seq_in, source)?;
        let forward =
            ForwardOptions { context: encoded.context, context_mask: encoded.context_mask, ..options.forward.clone() };
        let options = GenerateOptions { forward, ..options.clone() };
        self.decoder.generate(seq_out_start, seq_len, &options, on_token).context("decoder")
    }

    /// Returns the decoder's options, with the encoded source as context.
    fn encode(&self, src: &Tensor, options: &EncoderDecoderOptions) -> Result<ForwardOptions> {
        let encoder = ForwardOptions {
            mask: options.src_mask.clone(),
            attn_mask: options.src_attn_mask.clone(),
            prepend_embeds: options.src_prepend_embeds.clone(),
            return_embeddings: true,
            checkpoint_layers: options.checkpoint_layers,
            explicit_attention: options.explicit_attention,
            ..ForwardOptions::default()
        };
        let context = self.encoder.forward(src, &encoder).context("encoder")?.out;
        let prepended = options.src_prepend_embeds.as_ref().map_or(Ok(0), |embeds| embeds.dim(1))?;
        let mut context_mask = with_real_tokens(options.src_mask.as_ref(), prepended)?;
        if self.tokens_dropout > 0.0 {
            let padded = context_mask.is_some();
            let kept = drop_tokens(&context, context_mask.as_ref(), self.tokens_dropout, padded)?;
            context_mask = kept.or(context_mask);
        }
        Ok(ForwardOptions {
            context: Some(context),
            context_mask,
            checkpoint_layers: options.checkpoint_layers,
            explicit_attention: options.explicit_attention,
            ..ForwardOptions::default()
        })
    }
}
