//! Options of the wrappers, with the names and defaults of x-transformers 2.31.

use super::{AttentionLayersConfig, fields::options};

options! {
    /// Options of `TransformerWrapper`: tokens in, logits out.
    ///
    /// ```
    /// use x_transformers::{DType, Device, ParamStore, models::TransformerWrapper};
    /// use x_transformers::config::v2::{AttentionLayersConfig, TransformerWrapperConfig};
    /// let config = TransformerWrapperConfig::new(256, 32, AttentionLayersConfig::decoder(16, 1));
    /// let store = ParamStore::new(0, DType::F32, &Device::Cpu);
    /// let model = TransformerWrapper::from_plan(config.plan()?, &store)?;
    /// assert!(store.params().get("token_emb.emb.weight").is_some());
    /// # let _ = model;
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub struct TransformerWrapperConfig {
        /// Size of the vocabulary. Required.
        num_tokens: usize = 0,
        /// Longest sequence; 0: no absolute positions, and no limit. Required.
        max_seq_len: usize = 0,
        /// Additional tables of embeddings: their names and sizes.
        embed_num_tokens: Vec<(String, usize)> = Vec::new(),
        /// Width of the embeddings. Default the width of the model.
        emb_dim: Option<usize> = None,
        /// Number of memories kept per layer for recurrence; 0 keeps none. <https://arxiv.org/abs/1901.02860>
        max_mem_len: usize = 0,
        /// Each layer reads the memory of the layer this many above it. <https://arxiv.org/abs/2012.15688>
        shift_mem_down: usize = 0,
        /// Dropout probability after the embeddings.
        emb_dropout: f64 = 0.0,
        /// If `true`, a LayerNorm follows the embeddings.
        post_emb_norm: bool = false,
        /// Number of learned memory tokens before the sequence. <https://arxiv.org/abs/2006.11527>
        num_memory_tokens: Option<usize> = None,
        /// If given, memory tokens come before each group of this many tokens.
        memory_tokens_interspersed_every: Option<usize> = None,
        /// If `true`, logits are computed with the embedding table.
        tie_embedding: bool = false,
        /// Factor of tied logits. Default `dim^-½`.
        tie_embedding_scale: Option<f64> = None,
        /// Number of logits. Default `num_tokens`.
        logits_dim: Option<usize> = None,
        /// If `true`, the model has no logits and returns embeddings.
        return_only_embed: bool = false,
        /// Number of heads, each with its own logits.
        num_output_heads: usize = 1,
        /// If `true`, adds absolute positions, unless the layers have a scheme of their own.
        use_abs_pos_emb: bool = true,
        /// If `true`, the absolute positions are sinusoids with a learned scale.
        scaled_sinu_pos_emb: bool = false,
        /// If `true`, token and position embeddings are normalised to length 1.
        l2norm_embed: bool = false,
        /// If `true`, the layers run several times, each pass from the embeddings and a projection of the output
        /// before. Earlier passes get no gradient, but training keeps their activations until the backward pass.
        /// <https://www.nature.com/articles/s41586-021-03819-2>
        recycling: bool = false,
        /// Largest number of these passes that training draws; the default of `recycle_steps` in other calls.
        train_max_recycle_steps: usize = 4,
        /// If `true`, the layers run several times, each pass from the output before (looped language model); needs
        /// `pre_and_post_norm`. <https://arxiv.org/abs/2510.25741>
        looped: bool = false,
        /// Number of these passes.
        max_looped_steps: usize = 4,
        /// If `true`, a small network predicts the embedding of the next token, too.
        add_continuous_pred_head: bool = false,
        /// Share of the gradient that reaches the embeddings. <https://arxiv.org/abs/2105.13290>
        emb_frac_gradient: f64 = 1.0,
        /// If `true`, the output is that of the mean over the tokens.
        average_pool_embed: bool = false,
        /// If `true`, the output is that of learned class tokens before the sequence.
        use_cls_token: bool = false,
        /// Number of class tokens.
        num_cls_tokens: usize = 1,
        /// If `true`, an encoder's output is pooled by attention of learned queries.
        attn_pool: bool = false,
        /// Number of these queries.
        num_pooled_tokens: usize = 1,
        /// Number of blocks of the pooling; more than 1 also have feedforwards.
        attn_pool_depth: usize = 1,
        /// Width of the pooled vectors. Default the width of the model.
        dim_pooled_tokens: Option<usize> = None,
        /// If `true`, the dimension of a single logit is squeezed.
        squeeze_out_last_dim: bool = false,
        /// If `true`, the output is the logarithm of a mixture of softmaxes. <https://arxiv.org/abs/1711.03953>
        mixture_of_softmax: bool = false,
        /// Number of these softmaxes.
        mixture_of_softmax_k: usize = 4,
        /// If `true`, adds the logarithm of their sigmoid to logits. <https://arxiv.org/abs/1805.10829>
        sigsoftmax_logits: bool = false,
    } with {
        /// The attention layers. Required.
        attn_layers: AttentionLayersConfig,
    }
}

impl TransformerWrapperConfig {
    /// Creates options with this vocabulary size, longest sequence and layers, and defaults for the rest.
    pub fn new(num_tokens: usize, max_seq_len: usize, attn_layers: AttentionLayersConfig) -> Self {
        Self { num_tokens, max_seq_len, attn_layers, ..Self::default() }
    }
}

options! {
    /// Options of `ContinuousTransformerWrapper`: vectors in, vectors out.
    pub struct ContinuousTransformerWrapperConfig {
        /// Longest sequence. Default: no absolute positions, and no limit.
        max_seq_len: Option<usize> = None,
        /// Number of input features. Default the width of the model, without a projection.
        dim_in: Option<usize> = None,
        /// Number of output features. Default the width of the model, without a projection.
        dim_out: Option<usize> = None,
        /// Number of memories kept per layer; 0 keeps none.
        max_mem_len: usize = 0,
        /// Number of learned memory tokens before the sequence.
        num_memory_tokens: Option<usize> = None,
        /// If `true`, a LayerNorm follows the positions.
        post_emb_norm: bool = false,
        /// Dropout probability after the positions.
        emb_dropout: f64 = 0.0,
        /// If `true`, adds absolute positions, unless the layers have a scheme of their own.
        use_abs_pos_emb: bool = true,
        /// If `true`, the absolute positions are sinusoids with a learned scale.
        scaled_sinu_pos_emb: bool = false,
        /// If `true`, the output is the mean over the vectors.
        average_pool_embed: bool = false,
        /// If `true`, the output is a mean and a variance for each feature.
        probabilistic: bool = false,
        /// If `true`, features of the model's width are not projected.
        use_identity_if_same_dim: bool = false,
    } with {
        /// The attention layers. Required.
        attn_layers: AttentionLayersConfig,
    }
}

options! {
    /// Options of `ViTransformerWrapper`: images in, classes out.
    pub struct ViTransformerWrapperConfig {
        /// Side of the largest image, in pixels. Required.
        image_size: usize = 0,
        /// Side of a patch, in pixels. Required.
        patch_size: usize = 0,
        /// Number of channels.
        channels: usize = 3,
        /// Number of classes. Default none: the model returns the mean embedding.
        num_classes: Option<usize> = None,
        /// If `true`, a LayerNorm follows the positions.
        post_emb_norm: bool = false,
        /// Number of learned register tokens after the patches. <https://arxiv.org/abs/2309.16588>
        num_register_tokens: usize = 0,
        /// Dropout probability after the positions.
        emb_dropout: f64 = 0.0,
    } with {
        /// The attention layers, an encoder. Required.
        attn_layers: AttentionLayersConfig,
    }
}

options! {
    /// Options of `XTransformer`, an encoder and a decoder.
    ///
    /// In JSON the keys of both sides are flat and begin with `enc_` and `dec_`.
    pub struct XTransformerConfig {
        /// If `true`, encoder and decoder share one table of token embeddings.
        tie_token_emb: bool = false,
        /// Target value that is ignored in the loss.
        ignore_index: i64 = -100,
        /// Token that fills a generated row after its end.
        pad_value: i64 = 0,
        /// Share of the encoder's tokens that training hides from the decoder.
        cross_attn_tokens_dropout: f64 = 0.0,
    } with {
        /// Options of the encoder.
        enc: TransformerWrapperConfig,
        /// Options of the decoder; `cross_attend` is implied.
        dec: TransformerWrapperConfig,
    }
}

options! {
    /// Options of `AutoregressiveWrapper`: a decoder with its loss and its sampling.
    pub struct AutoregressiveConfig {
        /// Target value that is ignored in the loss.
        ignore_index: i64 = -100,
        /// Token that fills a generated row after its end.
        pad_value: i64 = 0,
        /// Share of the keys that training masks in each row. <https://arxiv.org/abs/2210.13432>
        mask_prob: f64 = 0.0,
        /// If `true`, adds the z-loss of the scores of attention. <https://arxiv.org/abs/2202.08906>
        add_attn_z_loss: bool = false,
        /// Weight of the error of predicted embeddings.
        next_embed_loss_weight: f64 = 0.1,
        /// For a looped model: gain of another pass, in nats, at which it is as good to stop as to go on.
        looped_loss_threshold_exit: f64 = 0.05,
        /// Slope of the sigmoid that turns gains into targets of the gate that stops.
        looped_loss_slope: f64 = 50.0,
        /// Weight of the loss of that gate.
        looped_exit_loss_weight: f64 = 1.0,
    } with {
        /// Options of the wrapped model. Required.
        net: TransformerWrapperConfig,
    }
}

options! {
    /// Options of `ContinuousAutoregressiveWrapper`: predicts vectors.
    pub struct ContinuousAutoregressiveConfig {
        /// If `true`, the loss is the absolute error in place of the squared one.
        use_l1_loss: bool = false,
        /// If `true`, rows of a batch count equally, whatever their mask.
        equal_loss_weight_batch: bool = false,
    } with {
        /// Options of the wrapped model. Required.
        net: ContinuousTransformerWrapperConfig,
    }
}

options! {
    /// Options of `AttentionPool`: learned queries attend to a sequence.
    pub struct AttentionPoolConfig {
        /// Width of the queries. Required.
        dim: usize = 0,
        /// Number of learned queries; 0: a call gives them.
        num_pooled_tokens: usize = 1,
        /// Width of the sequence. Default `dim`.
        dim_context: Option<usize> = None,
        /// If `true`, adds the queries to the output.
        add_residual: bool = false,
        /// Number of blocks; more than 1 also have feedforwards.
        depth: usize = 1,
        /// Number of heads.
        heads: usize = 8,
        /// Number of features per head.
        dim_head: usize = 64,
        /// If `true`, the pool has blocks with feedforwards. Default: if `depth` is above 1.
        use_transformer_blocks: Option<bool> = None,
        /// If `true`, the output of one query has no dimension of queries.
        squeeze_output: Option<bool> = None,
    }
}

options! {
    /// Options of sampling: a filter of the next-token distribution, and the temperature.
    pub struct SamplingConfig {
        /// Filter: `top_k`, `top_p`, `top_a` or `min_p`. Default `top_k`.
        filter_logits_fn: Option<String> = None,
        /// Divides the logits; 0 always takes the most likely token.
        temperature: f64 = 1.0,
    } with {
        /// Arguments of the filter, in JSON the object `filter_kwargs`.
        filter: FilterConfig,
    }
}

options! {
    /// Arguments of filters.
    pub struct FilterConfig {
        /// `top_k`: share of the tokens that are kept.
        frac_num_tokens: Option<f64> = None,
        /// `top_k`: number of tokens that are kept, in place of a share.
        k: Option<usize> = None,
        /// `top_p`: probability that the kept tokens have together.
        thres: Option<f64> = None,
        /// `top_a`: exponent of the largest probability.
        min_p_pow: Option<f64> = None,
        /// `top_a`: factor of the largest probability.
        min_p_ratio: Option<f64> = None,
        /// `min_p`: least probability of a token as a share of the largest.
        min_p: Option<f64> = None,
    }
}

options! {
    /// Options of `MultiInputTransformerWrapper`: several rows of tokens in, logits of each out.
    pub struct MultiInputConfig {
        /// Inputs: names and sizes of their vocabularies. Required.
        num_tokens: Vec<(String, usize)> = Vec::new(),
        /// Longest sequence; 0: no absolute positions, and no limit. Required.
        max_seq_len: usize = 0,
        /// Width of the embeddings. Default the width of the model.
        emb_dim: Option<usize> = None,
        /// Number of memories kept per layer; 0 keeps none.
        max_mem_len: usize = 0,
        /// Each layer reads the memory of the layer this many above it.
        shift_mem_down: usize = 0,
        /// Dropout probability after the embeddings.
        emb_dropout: f64 = 0.0,
        /// If `true`, a LayerNorm follows the embeddings.
        post_emb_norm: bool = false,
        /// Number of learned memory tokens before the sequence.
        num_memory_tokens: Option<usize> = None,
        /// If given, memory tokens come before each group of this many tokens.
        memory_tokens_interspersed_every: Option<usize> = None,
        /// If `true`, the model has no logits and returns embeddings.
        return_only_embed: bool = false,
        /// If `true`, adds absolute positions, unless the layers have a scheme of their own.
        use_abs_pos_emb: bool = true,
        /// If `true`, the absolute positions are sinusoids with a learned scale.
        scaled_sinu_pos_emb: bool = false,
        /// Share of the gradient that reaches the embeddings.
        emb_frac_gradient: f64 = 1.0,
    } with {
        /// The attention layers. Required.
        attn_layers: AttentionLayersConfig,
    }
}

options! {
    /// Options of `XValTransformerWrapper`: tokens and numbers in, logits and numbers out.
    /// <https://arxiv.org/abs/2310.02989>
    pub struct XValConfig {
        /// Size of the vocabulary. Required.
        num_tokens: usize = 0,
        /// Longest sequence. Required.
        max_seq_len: usize = 0,
        /// Token that stands for a number. Required.
        numerical_token_id: usize = 0,
        /// Number of logits. Default `num_tokens`.
        logits_dim: Option<usize> = None,
        /// If `true`, logits are computed with the embedding table.
        tie_embedding: bool = false,
        /// Number of memories kept per layer; 0 keeps none.
        max_mem_len: usize = 0,
        /// Number of learned memory tokens before the sequence.
        num_memory_tokens: Option<usize> = None,
        /// Dropout probability after the embeddings.
        emb_dropout: f64 = 0.0,
        /// If `true`, adds absolute positions, unless the layers have a scheme of their own.
        use_abs_pos_emb: bool = true,
        /// If `true`, the absolute positions are sinusoids with a learned scale.
        scaled_sinu_pos_emb: bool = false,
    } with {
        /// The attention layers. Required.
        attn_layers: AttentionLayersConfig,
    }
}

options! {
    /// Options of `XValAutoregressiveWrapper`: the loss of tokens and numbers.
    pub struct XValAutoregressiveConfig {
        /// Target value that is ignored in the loss.
        ignore_index: i64 = -100,
        /// Token that fills a generated row after its end.
        pad_value: i64 = 0,
        /// Weight of the numbers' squared error.
        numerical_loss_weight: f64 = 1.0,
    } with {
        /// Options of the wrapped model. Required.
        net: XValConfig,
    }
}

options! {
    /// Options of `XLAutoregressiveWrapper`: long sequences in segments with memories.
    /// <https://arxiv.org/abs/1901.02860>
    pub struct XlAutoregressiveConfig {
        /// Target value that is ignored in the loss.
        ignore_index: i64 = -100,
        /// Token that fills a generated row after its end.
        pad_value: i64 = 0,
        /// Number of segments that gradients pass.
        tbptt_steps: usize = 1,
    } with {
        /// Options of the wrapped model. Required.
        net: TransformerWrapperConfig,
    }
}

options! {
    /// Options of `NonAutoregressiveWrapper`: masked tokens that are filled in (MaskGIT).
    /// <https://arxiv.org/abs/2202.04200>
    pub struct NonAutoregressiveConfig {
        /// Token of masked positions. Required.
        mask_id: usize = 0,
        /// Number of steps of generation.
        steps: usize = 18,
        /// If `true`, embeddings of a step are added to those of the tokens in the next one.
        self_cond: bool = false,
        /// Share of training steps whose embeddings are those of a pass before.
        self_cond_train_prob: f64 = 0.75,
        /// Share of the masked tokens that half of the training steps leave as they are.
        no_replace_prob: f64 = 0.15,
        /// Share of the masked tokens that half of the training steps replace at random.
        random_token_prob: f64 = 0.1,
        /// Masked share at each time: `linear` or `cosine`. Default `linear`.
        schedule: Option<String> = None,
        /// If `true`, a step of generation may mask tokens that an earlier one has kept.
        can_mask_prev_unmasked: bool = false,
        /// If `true`, a linear layer on the model's own embeddings is a critic of the generated tokens.
        self_token_critic: bool = false,
        /// Weight of the critic's loss.
        critic_loss_weight: f64 = 1.0,
        /// If `true`, losses have the weights of masked diffusion, positive as in the paper; those of x-transformers
        /// 2.31 are negative. <https://arxiv.org/abs/2406.07524>
        use_simple_mdlm_loss_weight: bool = true,
    } with {
        /// Options of the wrapped model. Required.
        net: TransformerWrapperConfig,
        /// Options of a critic of the generated tokens, with a `logits_dim` of 1.
        token_critic: Option<TransformerWrapperConfig>,
    }
}

options! {
    /// Options of `DPO`: direct preference optimization. <https://arxiv.org/abs/2305.18290>
    pub struct DpoConfig {
        /// Factor of the log-ratios.
        beta: f64 = 0.1,
        /// Token that is padding. Default none.
        pad_id: Option<usize> = None,
    } with {
        /// Options of the model. Required.
        net: TransformerWrapperConfig,
    }
}
