//! Plans of the wrappers.

use super::{
    AttentionPlan, FeedForwardPlan, LayersKind, LayersPlan, LoopedLoss, NormPlan, Recurrence,
    options::FeedForwardConfig,
    ranges::{WIDEST, at_least_one, probability},
    resolve::feedforward,
    wrappers::{
        AutoregressiveConfig, ContinuousTransformerWrapperConfig, TransformerWrapperConfig, ViTransformerWrapperConfig,
        XTransformerConfig,
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
    /// Name of the table of token embeddings in a state dict.
    pub token_emb: String,
    /// If `true`, token embeddings are normalised to length 1.
    pub l2norm_embed: bool,
    /// Absolute positions.
    pub absolute_positions: AbsolutePositions,
    /// Dropout after the embeddings.
    pub emb_dropout: f64,
    /// Share of the gradient that reaches the embeddings.
    pub emb_frac_gradient: f64,
    /// Number of learned memory tokens before the sequence.
    pub num_memory_tokens: usize,
    /// If given, memory tokens come before each group of this many tokens.
    pub memory_tokens_every: Option<usize>,
    /// Number of class tokens before the sequence, whose output is the model's.
    pub num_cls_tokens: usize,
    /// If given, logits are computed with the embedding table and multiplied by this.
    pub tie_embedding: Option<f64>,
    /// The norm after the embeddings.
    pub post_emb_norm: Option<NormPlan>,
    /// Number of token types; 0: no table of them.
    pub num_token_types: usize,
    /// Additional tables of embeddings: names and numbers of vectors.
    pub embeds: Vec<(String, usize)>,
    /// Attention that pools the output.
    pub pool: Option<AttentionPoolPlan>,
    /// Heads: names below `to_logits`, empty for a single one, and numbers of logits.
    pub logits: Vec<(String, usize)>,
    /// Token that stands for a number: its embedding is multiplied by the number, and a head predicts numbers.
    pub numerical_token: Option<i64>,
    /// If `true`, the dimension of a single logit is squeezed.
    pub squeeze_logits: bool,
    /// Number of softmaxes whose mixture the output is the logarithm of.
    pub mixture: Option<usize>,
    /// If `true`, the logarithm of their sigmoid is added to logits.
    pub sigsoftmax: bool,
    /// Passes through the layers.
    pub recurrence: Recurrence,
    /// If `true`, a network predicts the embedding of the next token, too.
    pub next_embed: bool,
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
    /// Memories that are kept per layer.
    pub memories: MemoryPlan,
    /// Number of layers by which incoming memories are rotated to the left.
    pub shift_mem_down: usize,
    /// The attention layers.
    pub layers: LayersPlan,
}

/// Absolute positions of a wrapper.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum AbsolutePositions {
    /// None.
    None,
    /// A table, as it is.
    Table,
    /// A table, multiplied by `dim^-½`.
    ScaledTable,
    /// A table of vectors of length 1.
    UnitTable,
    /// Sinusoids with a learned scale.
    Sinusoids,
}

impl AbsolutePositions {
    /// Returns `true` if there is a table, whose length limits sequences.
    pub fn is_table(self) -> bool {
        matches!(self, Self::Table | Self::ScaledTable | Self::UnitTable)
    }
}

/// Memories that a wrapper returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum MemoryPlan {
    /// None: `return_mems` is an error.
    None,
    /// All.
    All,
    /// The last ones.
    Last(usize),
    /// The last ones of a call, to which older ones are not joined.
    LastOfCall(usize),
}

/// An [`AttentionPool`](crate::models::AttentionPool), resolved: learned queries attend to the tokens.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct AttentionPoolPlan {
    /// Width of the queries.
    pub dim: usize,
    /// Number of learned queries; 0: a call gives them.
    pub tokens: usize,
    /// If `true`, the queries are added to the output.
    pub residual: bool,
    /// If `true`, the output of one query is `[b, dim]`.
    pub squeeze: bool,
    /// If `false`, a wrapper does not use the pool: in x-transformers that of a decoder is for other callers.
    pub used: bool,
    /// The attention, or layers of cross-attention and feedforward.
    pub pooler: PoolerPlan,
}

/// Modules between learned queries and the tokens that they pool.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub enum PoolerPlan {
    /// One attention.
    Attention(AttentionPlan),
    /// Layers.
    Layers(LayersPlan),
}

/// Checks `max_seq_len`: a table of positions needs at least one; without a table 0 means no limit.
pub(super) fn check_longest(max_seq_len: usize, table: bool) -> Result<()> {
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
            token_emb: "token_emb".to_string(),
            l2norm_embed: false,
            absolute_positions: match (absolute_positions, self.scale_pos_emb) {
                (false, _) => AbsolutePositions::None,
                (true, false) => AbsolutePositions::Table,
                (true, true) => AbsolutePositions::ScaledTable,
            },
            emb_dropout: self.emb_dropout,
            emb_frac_gradient: 1.0,
            num_memory_tokens: self.num_memory_tokens,
            memory_tokens_every: None,
            num_cls_tokens: 0,
            tie_embedding: self.tie_embedding.then_some(1.0),
            post_emb_norm: self.post_emb_norm.then_some(norm),
            num_token_types: self.num_token_types,
            embeds: Vec::new(),
            pool: None,
            logits: vec![(String::new(), self.num_tokens)],
            numerical_token: None,
            squeeze_logits: false,
            mixture: None,
            sigsoftmax: false,
            recurrence: Recurrence::Once,
            next_embed: false,
            average_pool_embed: self.average_pool_embed,
            pooler: self.pooler,
            mlm_head: self.mlm_head.then_some((activation, norm)),
            return_only_embed: self.return_only_embed,
            logits_bias: self.logits_bias,
            memories: match self.max_mem_len {
                None => MemoryPlan::None,
                Some(0) => MemoryPlan::All,
                Some(last) => MemoryPlan::Last(last),
            },
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
    /// If `true`, the projections have biases.
    pub bias: bool,
    /// Absolute positions.
    pub absolute_positions: AbsolutePositions,
    /// The norm after the positions.
    pub post_emb_norm: Option<NormPlan>,
    /// Dropout after the positions.
    pub emb_dropout: f64,
    /// Number of learned memory tokens before the sequence.
    pub num_memory_tokens: usize,
    /// If `true`, the output is the mean over the vectors.
    pub average_pool_embed: bool,
    /// If `true`, the output is a mean and a variance for each feature, `[2, .., dim_out]`.
    pub probabilistic: bool,
    /// Memories that are kept per layer; older ones than those of a call are not joined to them.
    pub memories: MemoryPlan,
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
            bias: true,
            absolute_positions: if absolute_positions {
                AbsolutePositions::ScaledTable
            } else {
                AbsolutePositions::None
            },
            post_emb_norm: None,
            emb_dropout: self.emb_dropout,
            num_memory_tokens: 0,
            average_pool_embed: false,
            probabilistic: false,
            memories: MemoryPlan::None,
            layers,
        })
    }
}

/// A [`ContinuousAutoregressiveWrapper`](crate::models::ContinuousAutoregressiveWrapper), resolved.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct ContinuousAutoregressivePlan {
    /// The wrapped model.
    pub net: ContinuousPlan,
    /// The loss.
    pub loss: ContinuousLoss,
}

/// Loss of predicted vectors.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ContinuousLoss {
    /// If `true`, absolute errors, otherwise squares.
    pub l1: bool,
    /// If `true`, every masked row counts equally.
    pub equal_rows: bool,
}

/// A [`ViTransformerWrapper`](crate::models::ViTransformerWrapper), resolved.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct ViTransformerPlan {
    /// Side of a patch, in pixels.
    pub patch_size: usize,
    /// Number of patches of the largest image.
    pub patches: usize,
    /// Number of channels.
    pub channels: usize,
    /// If `true`, a class token precedes the patches, and LayerNorms neither precede nor follow their projection.
    pub class_token: bool,
    /// Number of learned register tokens after the patches.
    pub registers: usize,
    /// The norm after the positions.
    pub post_emb_norm: Option<NormPlan>,
    /// Head on the class token, or on the mean of the patches.
    pub head: VisionHead,
    /// Dropout after the positions.
    pub emb_dropout: f64,
    /// The attention layers.
    pub layers: LayersPlan,
}

/// Head of a vision transformer.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub enum VisionHead {
    /// None: the embeddings of all tokens.
    None,
    /// A feedforward on the class token.
    FeedForward(FeedForwardPlan),
    /// Mean of the patches, and a linear layer to so many classes if given.
    Mean(Option<usize>),
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
        Ok(ViTransformerPlan {
            patch_size: self.patch_size,
            patches: side * side,
            channels: 3,
            class_token: true,
            registers: 0,
            post_emb_norm: None,
            head: head.map_or(VisionHead::None, VisionHead::FeedForward),
            emb_dropout: self.emb_dropout,
            layers,
        })
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
    /// Share of the encoder's tokens that the decoder does not see, in training.
    pub tokens_dropout: f64,
    /// The decoder's loss.
    pub loss: LossPlan,
    /// Names of the padding mask and the attention mask of the source among the inputs.
    pub masks: [&'static str; 2],
}

/// Loss of predicted tokens.
#[derive(Clone, Copy, PartialEq, Debug)]
#[non_exhaustive]
pub struct LossPlan {
    /// Target that is ignored.
    pub ignore_index: i64,
    /// Token that fills a generated row after its end.
    pub pad_value: i64,
    /// If `true`, the model reads the last token too, whose prediction is left out; `ignore_index` among the tokens
    /// becomes `pad_value`.
    pub reads_all: bool,
    /// Share of the keys that are masked, in training.
    pub mask_prob: f64,
    /// If `true`, adds the z-loss of the scores of attention.
    pub attn_z_loss: bool,
    /// Weight of the error of predicted embeddings, of a model that predicts them.
    pub next_embed: f64,
    /// Loss of a looped model.
    pub looped: LoopedLoss,
}

impl Default for LossPlan {
    fn default() -> Self {
        Self {
            ignore_index: -100,
            pad_value: 0,
            reads_all: false,
            mask_prob: 0.0,
            attn_z_loss: false,
            next_embed: 0.1,
            looped: LoopedLoss::default(),
        }
    }
}

/// An [`AutoregressiveWrapper`](crate::models::AutoregressiveWrapper), resolved.
#[derive(Clone, PartialEq, Debug)]
#[non_exhaustive]
pub struct AutoregressivePlan {
    /// The wrapped model.
    pub net: TransformerPlan,
    /// The loss.
    pub loss: LossPlan,
}

impl AutoregressiveConfig {
    /// Resolves the options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first option that is illegal, alone or in
    /// combination.
    pub fn plan(&self) -> Result<AutoregressivePlan> {
        let loss = LossPlan { ignore_index: self.ignore_index, pad_value: self.pad_value, ..LossPlan::default() };
        Ok(AutoregressivePlan { net: self.net.plan().context("net")?, loss })
    }
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
                logits_bias: side == "enc" || config.logits_bias,
                attn_layers: config.attn_layers.clone(),
                ..Default::default()
            };
            let why = "of a wrapper's options, XTransformer takes only num_tokens, max_seq_len, emb_dropout, \
                       enc_num_memory_tokens and dec_logits_bias";
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
            tokens_dropout: 0.0,
            loss: LossPlan::default(),
            masks: ["src_mask", "src_attn_mask"],
        })
    }
}
