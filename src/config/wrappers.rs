//! Options of the wrappers around attention layers, with the names and defaults of x-transformers 0.22.0.

use serde::{Deserialize, Serialize};

use super::{AttentionLayersConfig, kwargs::keywords};

/// Options of [`TransformerWrapper`](crate::models::TransformerWrapper).
///
/// ```
/// use x_transformers::config::{AttentionLayersConfig, TransformerWrapperConfig};
/// let layers = AttentionLayersConfig::decoder(512, 6);
/// let config = TransformerWrapperConfig { emb_dropout: 0.1, ..TransformerWrapperConfig::new(256, 1024, layers) };
/// assert!(config.plan().is_ok());
/// ```
#[derive(Clone, PartialEq, Debug)]
pub struct TransformerWrapperConfig {
    /// Size of the vocabulary. Required.
    pub num_tokens: usize,
    /// Longest sequence of the table of absolute positions. Layers with positions of their own accept longer ones; for
    /// them it only limits the context of generation, and 0 means no limit. Required.
    pub max_seq_len: usize,
    /// The attention layers. Required.
    pub attn_layers: AttentionLayersConfig,
    /// Width of the embeddings. Default the width of the model; for other widths a linear layer follows them.
    pub emb_dim: Option<usize>,
    /// Number of memories kept per layer for recurrence; 0 keeps all. <https://arxiv.org/abs/1901.02860>
    pub max_mem_len: Option<usize>,
    /// Each layer reads the memory of the layer this many above it. <https://arxiv.org/abs/2012.15688>
    pub shift_mem_down: usize,
    /// Dropout probability after the embeddings.
    pub emb_dropout: f64,
    /// Number of learned memory tokens before the sequence. <https://arxiv.org/abs/2006.11527>
    pub num_memory_tokens: usize,
    /// If `true`, logits are computed with the transposed embedding table.
    pub tie_embedding: bool,
    /// If `true`, a LayerNorm follows embeddings and positions.
    pub post_emb_norm: bool,
    /// Number of token types, each with a learned embedding that is added to the token's: BERT has two, for the first
    /// and the second sentence. Default 0.
    pub num_token_types: usize,
    /// If `true`, absolute position embeddings are multiplied by `emb_dim^-½`. Default true.
    pub scale_pos_emb: bool,
    /// If `true`, the output is the mean over the tokens that are not padding.
    pub average_pool_embed: bool,
    /// If `true`, adds BERT's pooler: a linear layer and tanh on the first token. <https://arxiv.org/abs/1810.04805>
    pub pooler: bool,
    /// If `true`, adds BERT's masked-LM head: a linear layer to `emb_dim`, the feedforward's activation, a LayerNorm,
    /// and logits from the embedding table with a bias. Requires `tie_embedding`, and allows another `emb_dim` with it.
    pub mlm_head: bool,
    /// If `true`, the model has no logits and returns embeddings.
    pub return_only_embed: bool,
    /// If `true`, the logit layer has a bias, unless it is tied. Default true.
    pub logits_bias: bool,
    /// If `true`, adds learned absolute positions, unless the layers have a scheme of their own. Default true.
    pub use_pos_emb: bool,
}

impl Default for TransformerWrapperConfig {
    fn default() -> Self {
        Self {
            num_tokens: 0,
            max_seq_len: 0,
            attn_layers: AttentionLayersConfig::default(),
            emb_dim: None,
            max_mem_len: None,
            shift_mem_down: 0,
            emb_dropout: 0.0,
            num_memory_tokens: 0,
            tie_embedding: false,
            post_emb_norm: false,
            num_token_types: 0,
            scale_pos_emb: true,
            average_pool_embed: false,
            pooler: false,
            mlm_head: false,
            return_only_embed: false,
            logits_bias: true,
            use_pos_emb: true,
        }
    }
}

impl TransformerWrapperConfig {
    /// Creates options with this vocabulary size, longest sequence and layers, and defaults for the rest.
    pub fn new(num_tokens: usize, max_seq_len: usize, attn_layers: AttentionLayersConfig) -> Self {
        Self { num_tokens, max_seq_len, attn_layers, ..Self::default() }
    }
}

keywords! {
    TransformerWrapperConfig {
        required { num_tokens, max_seq_len }
        nested { attn_layers }
        options {
            emb_dim, max_mem_len, shift_mem_down, emb_dropout, num_memory_tokens, tie_embedding, post_emb_norm,
            num_token_types, scale_pos_emb, average_pool_embed, pooler, mlm_head, return_only_embed, logits_bias,
            use_pos_emb,
        }
    }
}

/// Options of [`ContinuousTransformerWrapper`](crate::models::ContinuousTransformerWrapper).
#[derive(Clone, PartialEq, Debug)]
pub struct ContinuousTransformerWrapperConfig {
    /// Longest sequence of the table of absolute positions. Layers with positions of their own accept longer ones; for
    /// them it only limits the context of generation, and 0 means no limit. Required.
    pub max_seq_len: usize,
    /// The attention layers. Required.
    pub attn_layers: AttentionLayersConfig,
    /// Number of input features. Default the width of the model, without a projection.
    pub dim_in: Option<usize>,
    /// Number of output features. Default the width of the model, without a projection.
    pub dim_out: Option<usize>,
    /// Dropout probability after the positions.
    pub emb_dropout: f64,
    /// If `true`, adds learned absolute positions, unless the layers have a scheme of their own. Default true.
    pub use_pos_emb: bool,
}

impl Default for ContinuousTransformerWrapperConfig {
    fn default() -> Self {
        Self {
            max_seq_len: 0,
            attn_layers: AttentionLayersConfig::default(),
            dim_in: None,
            dim_out: None,
            emb_dropout: 0.0,
            use_pos_emb: true,
        }
    }
}

keywords! {
    ContinuousTransformerWrapperConfig {
        required { max_seq_len }
        nested { attn_layers }
        options { dim_in, dim_out, emb_dropout, use_pos_emb }
    }
}

/// Options of [`ViTransformerWrapper`](crate::models::ViTransformerWrapper).
#[derive(Clone, PartialEq, Debug, Default)]
pub struct ViTransformerWrapperConfig {
    /// Side of the largest image, in pixels. Required.
    pub image_size: usize,
    /// Side of a patch, in pixels. Required.
    pub patch_size: usize,
    /// The attention layers, an encoder. Required.
    pub attn_layers: AttentionLayersConfig,
    /// Number of classes of the head. Default none: the model returns embeddings.
    pub num_classes: Option<usize>,
    /// Dropout probability in the head.
    pub dropout: f64,
    /// Dropout probability after the positions.
    pub emb_dropout: f64,
}

keywords! {
    ViTransformerWrapperConfig {
        required { image_size, patch_size }
        nested { attn_layers }
        options { num_classes, dropout, emb_dropout }
    }
}

/// Options of [`XTransformer`](crate::models::XTransformer), an encoder and a decoder.
///
/// Its wrapper options are `num_tokens`, `max_seq_len`, `emb_dropout` and, for the encoder, `num_memory_tokens`. In
/// JSON the keys are flat and begin with `enc_` and `dec_`.
#[derive(Clone, PartialEq, Debug)]
pub struct XTransformerConfig {
    /// Options of the encoder.
    pub enc: TransformerWrapperConfig,
    /// Options of the decoder; `cross_attend` is implied.
    pub dec: TransformerWrapperConfig,
    /// If `true`, encoder and decoder share one table of token embeddings.
    pub tie_token_emb: bool,
}

/// Options of [`AutoregressiveWrapper`](crate::models::AutoregressiveWrapper).
#[derive(Clone, PartialEq, Debug)]
pub struct AutoregressiveConfig {
    /// Options of the wrapped model. Required.
    pub net: TransformerWrapperConfig,
    /// Target value that is ignored in the loss. Default -100.
    pub ignore_index: i64,
    /// Token that fills a generated row after its end token. Default 0.
    pub pad_value: i64,
}

impl Default for AutoregressiveConfig {
    fn default() -> Self {
        Self { net: TransformerWrapperConfig::default(), ignore_index: -100, pad_value: 0 }
    }
}

keywords! {
    AutoregressiveConfig {
        nested { net }
        options { ignore_index, pad_value }
    }
}

/// Filter of the next-token distribution before sampling.
///
/// The first four have the names and the meaning of x-transformers 0.22.0. Prefer [`FilterLogits::Nucleus`] to
/// `TopP` and [`FilterLogits::MinP`] to `TopA`: they compute what the papers describe.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FilterLogits {
    /// The `k` most likely tokens; default `⌈(1 − filter_thres) · num_tokens⌉`.
    #[default]
    TopK,
    /// The smallest set of most likely tokens with a cumulative probability above `1 − filter_thres`.
    TopP,
    /// Tokens with a probability of at least `max p ^ min_p_pow · min_p_ratio`, all equally likely; the maximum is over
    /// the batch.
    TopA,
    /// 1.3-entmax in place of softmax. <https://arxiv.org/abs/1905.05702>
    Entmax,
    /// The smallest set of most likely tokens with a cumulative probability of at least `filter_thres`.
    /// <https://arxiv.org/abs/1904.09751>
    #[doc(alias = "top_p")]
    Nucleus,
    /// Tokens with at least `min_p_ratio` times the probability of the row's most likely one.
    /// <https://arxiv.org/abs/2407.01082>
    MinP,
    /// The `⌈filter_thres · num_tokens⌉` most likely tokens.
    TopShare,
    /// Tokens with a probability of at least `max p ^ min_p_pow · min_p_ratio`, where the maximum is the row's; they
    /// keep their logits.
    RowTopA,
    /// All tokens.
    None,
}

/// Options of sampling: those of `generate` in x-transformers 0.22.0, and `k`.
///
/// ```
/// use x_transformers::config::{FilterLogits, SamplingConfig};
/// let greedy = SamplingConfig { temperature: 0.0, ..Default::default() };
/// let top_40 = SamplingConfig { k: Some(40), ..Default::default() };
/// let nucleus = SamplingConfig { filter_logits_fn: FilterLogits::Nucleus, filter_thres: 0.95, ..Default::default() };
/// # let _ = (greedy, top_40, nucleus);
/// ```
#[derive(Clone, PartialEq, Debug)]
pub struct SamplingConfig {
    /// Filter. Default top-k.
    pub filter_logits_fn: FilterLogits,
    /// Threshold of `top_k`, `top_p`, `nucleus` and `top_share`. Default 0.9.
    pub filter_thres: f64,
    /// For `top_k`: number of tokens to keep, in place of `filter_thres`. Default none.
    pub k: Option<usize>,
    /// For `top_a` and `row_top_a`: exponent of the largest probability. Default 2.
    pub min_p_pow: f64,
    /// For `top_a`, `row_top_a` and `min_p`: factor on the largest probability. Default 0.02.
    pub min_p_ratio: f64,
    /// Divides the logits; 0 always takes the most likely token. Default 1.
    pub temperature: f64,
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            filter_logits_fn: FilterLogits::TopK,
            filter_thres: 0.9,
            k: None,
            min_p_pow: 2.0,
            min_p_ratio: 0.02,
            temperature: 1.0,
        }
    }
}

keywords! {
    SamplingConfig {
        options { filter_logits_fn, filter_thres, k, min_p_pow, min_p_ratio, temperature }
    }
}
