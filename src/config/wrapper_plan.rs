//! Plans of the wrappers.

use super::{
    FeedForwardPlan, LayersKind, LayersPlan, NormPlan,
    options::FeedForwardConfig,
    ranges::{WIDEST, at_least_one, probability},
    resolve::feedforward,
    wrappers::{
        ContinuousTransformerWrapperConfig, TransformerWrapperConfig, ViTransformerWrapperConfig, XTransformerConfig,
    },
};
use crate::{
    Error, Result,
    error::{ErrorContext, ensure},
    ops::Activation,
};

/// A [`TransformerWrapper`](crate::models::TransformerWrapper), resolved.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct TransformerPlan {
    /// Size of the vocabulary.
    pub num_tokens: usize,
    /// Longest sequence of the table of absolute positions, and the context of generation; 0: no limit.
    pub max_seq_len: usize,
    /// Width of the embeddings.
    pub emb_dim: usize,
    /// If `true`, the model has a table of absolute positions.
    pub absolute_positions: bool,
    /// Dropout after the embeddings.
    pub emb_dropout: f64,
    /// Number of learned memory tokens before the sequence.
    pub num_memory_tokens: usize,
    /// If `true`, logits are computed with the embedding table.
    pub tie_embedding: bool,
    /// The norm after the embeddings.
    pub post_emb_norm: Option<NormPlan>,
    /// Number of token types; 0: no table of them.
    pub num_token_types: usize,
    /// If `true`, absolute positions are multiplied by `emb_dim^-½`.
    pub scale_pos_emb: bool,
    /// If `true`, the output is the mean over the tokens.
    pub average_pool_embed: bool,
    /// If `true`, the model has a pooler on the first token.
    pub pooler: bool,
    /// The activation and the norm of the masked-LM head.
    pub mlm_head: Option<(Activation, NormPlan)>,
    /// If `true`, the model has no logits.
    pub return_only_embed: bool,
    /// If `true`, the logit layer has a bias.
    pub logits_bias: bool,
    /// Number of memories kept per layer, 0 for all; `None`: the model returns none.
    pub max_mem_len: Option<usize>,
    /// Number of layers by which incoming memories are rotated to the left.
    pub shift_mem_down: usize,
    /// The attention layers.
    pub layers: LayersPlan,
}

/// Checks `max_seq_len`: a table of positions needs at least one; without a table 0 means no limit.
fn check_longest(max_seq_len: usize, table: bool) -> Result<()> {
    at_least_one("max_seq_len", if table { max_seq_len } else { max_seq_len.max(1) })
}

impl TransformerPlan {
    /// Returns the context of generation in tokens: `max_seq_len`, or all if that is 0, as in x-transformers.
    pub fn window(&self) -> usize {
        window(self.max_seq_len)
    }
}

impl ContinuousPlan {
    /// Returns the context of generation in vectors: `max_seq_len`, or all if that is 0, as in x-transformers.
    pub fn window(&self) -> usize {
        window(self.max_seq_len)
    }
}

fn window(max_seq_len: usize) -> usize {
    if max_seq_len == 0 { usize::MAX } else { max_seq_len }
}

impl TransformerWrapperConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<TransformerPlan> {
        at_least_one("num_tokens", self.num_tokens)?;
        probability("emb_dropout", self.emb_dropout)?;
        let layers = LayersPlan::new(&self.attn_layers).context("attn_layers")?;
        let absolute_positions = self.use_pos_emb && !layers.positions.replace_absolute();
        check_longest(self.max_seq_len, absolute_positions)?;
        let emb_dim = self.emb_dim.unwrap_or(layers.dim);
        at_least_one("emb_dim", emb_dim)?;
        ensure!(
            !self.tie_embedding || self.mlm_head || emb_dim == layers.dim,
            Error::option(
                "tie_embedding",
                format_args!("requires `emb_dim` equal to `dim`, got {emb_dim} and {}", layers.dim)
            )
        );
        ensure!(
            !self.mlm_head || self.tie_embedding,
            Error::option(
                "mlm_head",
                "requires `tie_embedding = true`: its logits are computed with the embedding table"
            )
        );
        ensure!(
            !(self.return_only_embed && self.tie_embedding),
            Error::option("return_only_embed", "cannot be used with `tie_embedding`, which applies only to logits")
        );
        ensure!(
            self.logits_bias || !self.return_only_embed,
            Error::option("logits_bias", "applies to the logit layer, which `return_only_embed` omits")
        );
        ensure!(
            self.logits_bias || !self.tie_embedding,
            Error::option("logits_bias", "applies to the logit layer, which `tie_embedding` omits")
        );
        ensure!(
            self.num_token_types <= WIDEST,
            Error::option("num_token_types", format_args!("expected at most {WIDEST}, got {}", self.num_token_types))
        );
        let norm = NormPlan::Layer(self.attn_layers.norm_eps.unwrap_or(1e-5));
        let activation =
            feedforward(layers.dim, layers.dim, &self.attn_layers.ff, false).context("attn_layers")?.activation;
        let memories = layers.self_attentions();
        ensure!(
            self.shift_mem_down <= memories,
            Error::option(
                "shift_mem_down",
                format_args!(
                    "expected at most {memories} (the number of self-attention layers), got {}",
                    self.shift_mem_down
                )
            )
        );
        ensure!(
            self.num_memory_tokens <= WIDEST,
            Error::option(
                "num_memory_tokens",
                format_args!("expected at most {WIDEST}, got {}", self.num_memory_tokens)
            )
        );
        Ok(TransformerPlan {
            num_tokens: self.num_tokens,
            max_seq_len: self.max_seq_len,
            emb_dim,
            absolute_positions,
            emb_dropout: self.emb_dropout,
            num_memory_tokens: self.num_memory_tokens,
            tie_embedding: self.tie_embedding,
            post_emb_norm: self.post_emb_norm.then_some(norm),
            num_token_types: self.num_token_types,
            scale_pos_emb: self.scale_pos_emb,
            average_pool_embed: self.average_pool_embed,
            pooler: self.pooler,
            mlm_head: self.mlm_head.then_some((activation, norm)),
            return_only_embed: self.return_only_embed,
            logits_bias: self.logits_bias,
            max_mem_len: self.max_mem_len,
            shift_mem_down: self.shift_mem_down,
            layers,
        })
    }
}

/// A [`ContinuousTransformerWrapper`](crate::models::ContinuousTransformerWrapper), resolved.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct ContinuousPlan {
    /// Longest sequence of the table of absolute positions, and the context of generation; 0: no limit.
    pub max_seq_len: usize,
    /// Number of input features, if they are projected.
    pub dim_in: Option<usize>,
    /// Number of output features, if they are projected.
    pub dim_out: Option<usize>,
    /// If `true`, the model has a table of absolute positions.
    pub absolute_positions: bool,
    /// Dropout after the positions.
    pub emb_dropout: f64,
    /// The attention layers.
    pub layers: LayersPlan,
}

impl ContinuousTransformerWrapperConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<ContinuousPlan> {
        at_least_one("dim_in", self.dim_in.unwrap_or(1))?;
        at_least_one("dim_out", self.dim_out.unwrap_or(1))?;
        probability("emb_dropout", self.emb_dropout)?;
        let layers = LayersPlan::new(&self.attn_layers).context("attn_layers")?;
        let absolute_positions = self.use_pos_emb && !layers.positions.replace_absolute();
        check_longest(self.max_seq_len, absolute_positions)?;
        Ok(ContinuousPlan {
            max_seq_len: self.max_seq_len,
            dim_in: self.dim_in,
            dim_out: self.dim_out,
            absolute_positions,
            emb_dropout: self.emb_dropout,
            layers,
        })
    }
}

/// A [`ViTransformerWrapper`](crate::models::ViTransformerWrapper), resolved.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct ViTransformerPlan {
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Number of patches of the largest image.
    pub patches: usize,
    /// Head on the class token.
    pub head: Option<FeedForwardPlan>,
    /// Dropout after the positions.
    pub emb_dropout: f64,
    /// The attention layers.
    pub layers: LayersPlan,
}

impl ViTransformerWrapperConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<ViTransformerPlan> {
        /// Largest side; three channels of a patch of this size are still addressable.
        const LARGEST: usize = 1 << 14;
        ensure!(
            (1..=LARGEST).contains(&self.image_size),
            Error::option("image_size", format_args!("expected 1 to {LARGEST} pixels, got {}", self.image_size))
        );
        ensure!(
            self.patch_size > 0 && self.image_size.is_multiple_of(self.patch_size),
            Error::option(
                "patch_size",
                format_args!("expected a divisor of `image_size` ({}), got {}", self.image_size, self.patch_size)
            )
        );
        ensure!(
            self.attn_layers.kind == LayersKind::Encoder,
            Error::option("kind", format_args!("expected Encoder, got {:?}", self.attn_layers.kind))
                .context("attn_layers")
        );
        probability("dropout", self.dropout)?;
        probability("emb_dropout", self.emb_dropout)?;
        let layers = LayersPlan::new(&self.attn_layers).context("attn_layers")?;
        ensure!(
            !layers.cross_attend,
            Error::option("cross_attend", "a ViTransformerWrapper has no context to attend to").context("attn_layers")
        );
        let head = |classes: usize| {
            at_least_one("num_classes", classes)?;
            let options = FeedForwardConfig { dropout: self.dropout, ..FeedForwardConfig::default() };
            feedforward(layers.dim, classes, &options, false)
        };
        let head = self.num_classes.map(head).transpose()?;
        ensure!(
            head.is_some() || self.dropout == 0.0,
            Error::option("dropout", "applies to the head, which requires `num_classes`")
        );
        let side = self.image_size / self.patch_size;
        let emb_dropout = self.emb_dropout;
        Ok(ViTransformerPlan { patch_size: self.patch_size, patches: side * side, head, emb_dropout, layers })
    }
}

/// An [`XTransformer`](crate::models::XTransformer), resolved.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct XTransformerPlan {
    /// The encoder.
    pub enc: TransformerPlan,
    /// The decoder.
    pub dec: TransformerPlan,
    /// If `true`, encoder and decoder share the table of token embeddings.
    pub tie_token_emb: bool,
}

impl XTransformerConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<XTransformerPlan> {
        for (side, config) in [("enc", &self.enc), ("dec", &self.dec)] {
            let taken = TransformerWrapperConfig {
                num_tokens: config.num_tokens,
                max_seq_len: config.max_seq_len,
                emb_dropout: config.emb_dropout,
                num_memory_tokens: if side == "enc" { config.num_memory_tokens } else { 0 },
                attn_layers: config.attn_layers.clone(),
                ..Default::default()
            };
            let why = "of a wrapper's options, XTransformer takes only num_tokens, max_seq_len, emb_dropout and \
                       enc_num_memory_tokens";
            ensure!(*config == taken, Error::option(side, why));
        }
        let (enc, dec) = (&self.enc.attn_layers, &self.dec.attn_layers);
        ensure!(
            enc.kind == LayersKind::Encoder && !enc.cross_attend,
            Error::option("enc", format_args!("expected an Encoder without `cross_attend`, got {:?}", enc.kind))
        );
        ensure!(
            dec.kind == LayersKind::Decoder && dec.cross_attend,
            Error::option("dec", format_args!("expected a Decoder with `cross_attend = true`, got {:?}", dec.kind))
        );
        ensure!(
            enc.dim == dec.dim,
            Error::option(
                "dim",
                format_args!("encoder and decoder must have the same width, got {} and {}", enc.dim, dec.dim)
            )
        );
        let (encoder, decoder) = (self.enc.num_tokens, self.dec.num_tokens);
        ensure!(
            !self.tie_token_emb || encoder == decoder,
            Error::option(
                "tie_token_emb",
                format_args!("requires `enc_num_tokens` equal to `dec_num_tokens`, got {encoder} and {decoder}")
            )
        );
        Ok(XTransformerPlan {
            enc: self.enc.plan().context("encoder")?,
            dec: self.dec.plan().context("decoder.net")?,
            tie_token_emb: self.tie_token_emb,
        })
    }
}
