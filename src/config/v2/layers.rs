//! Options of attention layers, with the names and defaults of x-transformers 2.31.

use super::{
    super::options::{LayerType, ShiftTokens},
    fields::options,
};

/// Class of attention layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum LayersKind {
    /// Bidirectional, like BERT.
    #[default]
    Encoder,
    /// Causal, like GPT.
    Decoder,
    /// Causal but for a prefix that all tokens see.
    PrefixDecoder,
    /// Cross-attention and feedforward only.
    CrossAttender,
    /// Layers with a depth of 1 and no final norm by default, causal if `causal` says it.
    TransformerBlock,
}

impl LayersKind {
    pub(super) const ALL: [(&'static str, Self); 5] = [
        ("Encoder", Self::Encoder),
        ("Decoder", Self::Decoder),
        ("PrefixDecoder", Self::PrefixDecoder),
        ("CrossAttender", Self::CrossAttender),
        ("TransformerBlock", Self::TransformerBlock),
    ];

    /// Returns the name of the class.
    pub(super) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }
}

/// A switch that may be a factor, too.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
#[non_exhaustive]
pub enum SwitchOrFactor {
    /// `false`
    #[default]
    Off,
    /// `true`
    On,
    /// A number.
    Factor(f64),
}

impl From<bool> for SwitchOrFactor {
    fn from(on: bool) -> Self {
        if on { Self::On } else { Self::Off }
    }
}

impl SwitchOrFactor {
    /// Returns `true` unless the value is `false` or 0.
    pub(super) fn is_on(self) -> bool {
        !matches!(self, Self::Off | Self::Factor(0.0))
    }
}

/// Options of one kind of sublayer: the same for all, or one set for each.
#[derive(Clone, PartialEq, Debug)]
pub enum PerLayer<T> {
    /// The same options in every sublayer of the kind.
    All(T),
    /// Options of each sublayer of the kind, in order. In JSON an option is an array of its values.
    Each(Vec<T>),
}

impl<T: Default> Default for PerLayer<T> {
    fn default() -> Self {
        Self::All(T::default())
    }
}

options! {
    /// Options of `Encoder`, `Decoder`, `PrefixDecoder`, `CrossAttender` and `TransformerBlock`.
    ///
    /// ```
    /// use x_transformers::config::v2::{AttentionLayersConfig, FeedForwardConfig, PerLayer};
    /// let layers = AttentionLayersConfig {
    ///     rotary_pos_emb: true,
    ///     ff: PerLayer::All(FeedForwardConfig { glu: true, ..Default::default() }),
    ///     ..AttentionLayersConfig::decoder(512, 6)
    /// };
    /// assert!(layers.plan().is_ok());
    /// ```
    pub struct AttentionLayersConfig {
        /// Width of the model. Required.
        dim: usize = 0,
        /// Number of blocks. Required, unless `custom_layers` are given; 1 for a `TransformerBlock`.
        depth: Option<usize> = None,
        /// Number of attention heads.
        heads: usize = 8,
        /// Share of the context's tokens that each cross-attention leaves out in training, beside those left out
        /// before.
        cross_attn_tokens_dropout: f64 = 0.0,
        /// If `true`, a `TransformerBlock` is causal; other classes set it themselves.
        causal: bool = false,
        /// If `true`, each block has cross-attention.
        cross_attend: bool = false,
        /// If `true`, blocks have no self-attention.
        only_cross: bool = false,
        /// If `true`, blocks have no feedforward.
        only_attn: bool = false,
        /// ScaleNorm in place of LayerNorm. <https://arxiv.org/abs/1910.05895>
        use_scalenorm: bool = false,
        /// RMSNorm in place of LayerNorm. <https://arxiv.org/abs/1910.07467>
        use_rmsnorm: bool = false,
        /// RMSNorm without a scale in place of LayerNorm. <https://arxiv.org/abs/2307.14995>
        use_simple_rmsnorm: bool = false,
        /// Dynamic tanh in place of LayerNorm. <https://arxiv.org/abs/2503.10622>
        use_dynamic_tanh: bool = false,
        /// Initial factor before that tanh.
        dynamic_tanh_init_alpha: f64 = 1.0,
        /// If `true`, dynamic erf replaces LayerNorm. <https://arxiv.org/abs/2512.10938>
        use_derf: bool = false,
        /// LayerNorm whose scale is a function of a condition. <https://arxiv.org/abs/2212.09748>
        use_adaptive_layernorm: bool = false,
        /// RMSNorm whose scale is a function of a condition. <https://arxiv.org/abs/2212.09748>
        use_adaptive_rmsnorm: bool = false,
        /// Factors of each branch's features that are a function of a condition. <https://arxiv.org/abs/2212.09748>
        use_adaptive_layerscale: bool = false,
        /// If `true`, scales of norms are stored minus 1.
        norm_add_unit_offset: bool = true,
        /// Width of the condition. Default `dim`.
        dim_condition: Option<usize> = None,
        /// If `true`, a linear layer and SiLU precede all uses of the condition.
        adaptive_condition_mlp: bool = false,
        /// Ratio of its width to that of the condition.
        adaptive_condition_mlp_expansion: usize = 4,
        /// ALiBi: a bias that falls linearly with the distance, on both sides. <https://arxiv.org/abs/2108.12409>
        alibi_pos_bias: bool = false,
        /// Number of heads with ALiBi. Default all.
        alibi_num_heads: Option<usize> = None,
        /// T5's relative position bias. <https://arxiv.org/abs/1910.10683>
        rel_pos_bias: bool = false,
        /// Number of its buckets.
        rel_pos_num_buckets: usize = 32,
        /// Distance from which on all positions share a bucket.
        rel_pos_max_distance: usize = 128,
        /// Position bias from a small network on the distance. <https://arxiv.org/abs/2108.00154>
        dynamic_pos_bias: bool = false,
        /// If `true`, its input is the logarithm of the distance.
        dynamic_pos_bias_log_distance: bool = false,
        /// Number of its layers before the last.
        dynamic_pos_bias_mlp_depth: usize = 2,
        /// If `true`, norms follow its layers.
        dynamic_pos_bias_norm: bool = false,
        /// Rotary position embeddings of queries and keys. <https://arxiv.org/abs/2104.09864>
        rotary_pos_emb: bool = false,
        /// Number of features per head that are rotated. Default half of the head.
        rotary_emb_dim: Option<usize> = None,
        /// xPos: rotary embeddings whose features also decay with the distance. <https://arxiv.org/abs/2212.10554>
        rotary_xpos: bool = false,
        /// Divides positions. <https://arxiv.org/abs/2306.15595>
        rotary_interpolation_factor: f64 = 1.0,
        /// Positions per power of xPos's scales.
        rotary_xpos_scale_base: f64 = 512.0,
        /// Stretches the rotary wavelengths for contexts longer by this factor (NTK-aware scaling).
        rotary_base_rescale_factor: f64 = 1.0,
        /// Number of heads, the last ones, that rotate. Default all.
        rotate_num_heads: Option<usize> = None,
        /// Polar positions of queries and keys. <https://arxiv.org/abs/2509.10534>
        polar_pos_emb: bool = false,
        /// If `true`, all `depth` blocks share their weights. <https://arxiv.org/abs/1909.11942>
        weight_tie_layers: bool = false,
        /// Types of the sublayers, in place of `depth` blocks.
        custom_layers: Option<Vec<LayerType>> = None,
        /// Indices of the sublayers in the order in which they run; some may run several times.
        layers_execute_order: Option<Vec<usize>> = None,
        /// Sandwich order: number of attentions that come first, and of feedforwards that come last.
        /// <https://arxiv.org/abs/1911.03864>
        sandwich_coef: Option<usize> = None,
        /// Ratio of all sublayers to blocks with attention. <https://arxiv.org/abs/2009.04534>
        par_ratio: Option<usize> = None,
        /// If `true`, adds the scores of each self-attention to those of the next. <https://arxiv.org/abs/2012.11747>
        residual_attn: bool = false,
        /// If `true`, does the same for cross-attention.
        cross_residual_attn: bool = false,
        /// If `true`, adds a feedforward before each block and halves the output of all.
        /// <https://arxiv.org/abs/1906.02762>
        macaron: bool = false,
        /// If `true`, norms come before the branches, otherwise after the sums. <https://arxiv.org/abs/2002.04745>
        pre_norm: bool = true,
        /// If `true`, layers with norms before the branches have a final norm. Default true, but false for a
        /// `TransformerBlock`.
        pre_norm_has_final_norm: Option<bool> = None,
        /// If `true`, norms come before the branches and after the sums, without a final norm.
        pre_and_post_norm: bool = false,
        /// If `true`, a GRU cell joins each branch and its residual. <https://arxiv.org/abs/1910.06764>
        gate_residual: bool = false,
        /// If `true`, adds what is orthogonal to the residual, over whole sequences, of each branch.
        /// <https://arxiv.org/abs/2505.11881>
        orthog_residual: bool = false,
        /// Centred branches, and means of the stream that are mixed apart. <https://arxiv.org/abs/2605.06169>
        mv_split_residual: bool = false,
        /// If `true` or a number, multiplies the residual stream by a learned vector before each sum; a number
        /// multiplies each branch's output too.
        scale_residual: SwitchOrFactor = SwitchOrFactor::Off,
        /// If `true`, weights of the last layers of branches start the smaller the deeper they are; a number multiplies
        /// each branch's output.
        depth_scale_residual: SwitchOrFactor = SwitchOrFactor::Off,
        /// Multiplies the residual stream before each sum.
        scale_residual_constant: f64 = 1.0,
        /// Token shift: moves chunks of features along the sequence before each branch.
        shift_tokens: ShiftTokens = ShiftTokens::All(0),
        /// If `true`, adds a norm to each branch's output. <https://arxiv.org/abs/2105.13290>
        sandwich_norm: bool = false,
        /// If `true`, clamps the output softly before the final norm. <https://arxiv.org/abs/2408.00118>
        softclamp_output: bool = false,
        /// Bound of that clamp.
        softclamp_output_value: f64 = 30.0,
        /// If `true`, the last linear layer of each branch starts at 0.
        zero_init_branch_output: bool = false,
        /// Probability of leaving out each sublayer in training: a number, or one per sublayer.
        /// <https://arxiv.org/abs/1603.09382>
        layer_dropout: Vec<f64> = vec![0.0],
        /// If `true`, the wrapper leaves out its absolute positions. Default: with T5, rotary and polar positions.
        disable_abs_pos_emb: Option<bool> = None,
        /// If `true`, multiplies the features of each branch by learned factors. <https://arxiv.org/abs/2103.17239>
        use_layerscale: bool = false,
        /// Initial value of these factors.
        layerscale_init_value: f64 = 0.0,
        /// If `true`, blocks of the second half start from their input and that of a block of the first half.
        unet_skips: bool = false,
        /// If `true`, each sublayer reads a learned mixture of all hidden states before it.
        /// <https://arxiv.org/abs/2502.09245>
        integrate_layers: bool = false,
        /// If `true`, the weights of that mixture are a softmax, otherwise a ReLU.
        layer_integrate_use_softmax: bool = true,
        /// If `true`, each sublayer reads an attention to all hidden states before it.
        /// <https://arxiv.org/abs/2603.15031>
        attn_aggregated_residuals: bool = false,
        /// Arguments of that attention: `lora_rank`, the rank of the projection that makes its query, by default 64.
        attn_aggregated_residual_kwargs: Vec<(String, usize)> = Vec::new(),
        /// If `true`, adds a projection of the input of the layers to that of each sublayer.
        reinject_input: bool = false,
        /// If `true`, a learned gate multiplies that projection.
        learned_reinject_input_gate: bool = false,
        /// Number of residual streams, joined by hyper-connections. <https://arxiv.org/abs/2409.19606>
        num_residual_streams: usize = 1,
        /// If `true`, mixes the values of the first self-attention into those of later ones.
        /// <https://arxiv.org/abs/2410.17897>
        add_value_residual: bool = false,
        /// If `true`, the mixture is learned, otherwise both halves are equal.
        learned_value_residual_mix: bool = true,
    } with {
        /// Class of the layers.
        kind: LayersKind,
        /// Options `attn_*` of self-attention, and of cross-attention too unless they differ between layers.
        attn: PerLayer<AttentionConfig>,
        /// Options of cross-attention. In JSON the options `cross_attn_*`, which take precedence over `attn_*`.
        /// Default: those of self-attention.
        cross_attn: Option<PerLayer<AttentionConfig>>,
        /// Options `ff_*`.
        ff: PerLayer<FeedForwardConfig>,
    }
}

impl AttentionLayersConfig {
    /// Creates the options of an encoder of this width and depth, with defaults for the rest.
    pub fn encoder(dim: usize, depth: usize) -> Self {
        Self { kind: LayersKind::Encoder, dim, depth: Some(depth), ..Self::default() }
    }

    /// Creates the options of a decoder of this width and depth, with defaults for the rest.
    pub fn decoder(dim: usize, depth: usize) -> Self {
        Self { kind: LayersKind::Decoder, ..Self::encoder(dim, depth) }
    }

    /// Creates the options of a cross-attender of this width and depth, with defaults for the rest.
    pub fn cross_attender(dim: usize, depth: usize) -> Self {
        Self { kind: LayersKind::CrossAttender, ..Self::encoder(dim, depth) }
    }
}

options! {
    /// Options of attention, with the prefix `attn_` among the options of the layers.
    pub struct AttentionConfig {
        /// Number of features per head of queries and keys.
        dim_head: usize = 64,
        /// Width of the context of cross-attention. Default `dim`.
        dim_context: Option<usize> = None,
        /// If `true`, a mixture of scores across heads is added before the softmax. <https://arxiv.org/abs/2003.02436>
        pre_talking_heads: bool = false,
        /// If `true`, mixes weights across heads after the softmax. <https://arxiv.org/abs/2003.02436>
        post_talking_heads: bool = false,
        /// If `true`, multiplies each head's output by a learned factor. <https://arxiv.org/abs/2110.09456>
        head_scale: bool = false,
        /// Number of highest-scoring keys that each query attends to. <https://arxiv.org/abs/1912.11637>
        sparse_topk: Option<usize> = None,
        /// If `true`, the gradient of top-k is that of the softmax of all scores. <https://arxiv.org/abs/2505.22074>
        sparse_topk_straight_through: bool = false,
        /// Number of learned memory keys and values before the others. <https://arxiv.org/abs/1907.01470>
        num_mem_kv: usize = 0,
        /// Dropout probability of attention weights.
        dropout: f64 = 0.0,
        /// Dropout probability of the output.
        sublayer_dropout: f64 = 0.0,
        /// If `true`, adds attention on attention, a gated output projection. <https://arxiv.org/abs/1908.06954>
        on_attn: bool = false,
        /// If `true`, weights are multiplied by a mixture across heads of the scores before them.
        pre_scale_post_talking_heads: bool = false,
        /// If `true`, gates each head's output by the layer's input. <https://arxiv.org/abs/2306.12929>
        gate_value_heads: bool = false,
        /// If `true`, gates the aggregated values by a function of the layer's input.
        gate_values: bool = false,
        /// If `true`, that gate is a SiLU in place of a sigmoid.
        swiglu_values: bool = false,
        /// Rank of that gate's projection. Default: full.
        gate_values_rank: Option<usize> = None,
        /// If `true`, that gate has one number per head.
        gate_values_headwise: bool = false,
        /// If `true`, a function of the aggregated values adds to that gate before its activation.
        output_gate: bool = false,
        /// Rank of that function. Default: full.
        output_gate_rank: Option<usize> = None,
        /// If `true`, that function has one number per head.
        output_gate_headwise: bool = false,
        /// If `true`, gates of low rank have a SiLU between their two layers.
        low_rank_silu_gates: bool = true,
        /// If `true`, queries compete for each key of a cross-attention; `cross_attn_` only.
        /// <https://arxiv.org/abs/2006.15055>
        inverted_attention: bool = false,
        /// If `true`, gates of the tokens between a key and its query lower its score (forgetting).
        /// <https://openreview.net/forum?id=q2Lnyegkr8>
        data_dependent_alibi: bool = false,
        /// If `true`, each query has gates of its own.
        data_dependent_alibi_per_row: bool = false,
        /// Features per head of these gates.
        data_dependent_alibi_per_row_dim_head: usize = 8,
        /// If `true`, each query weighs learned curves of the distance that are added to its scores.
        use_rel_proj_pos_bias: bool = false,
        /// Number of these curves.
        rel_proj_num_distance_basis: usize = 16,
        /// Length of these curves; greater distances have no bias.
        rel_proj_max_dist: usize = 1024,
        /// If `true`, positions are counted by what the query attends to (CoPE). <https://arxiv.org/abs/2405.18719>
        use_cope: bool = false,
        /// Number of these positions.
        cope_max_pos: usize = 16,
        /// If `true`, scores are mixed across heads before positions are counted.
        cope_talking_heads: bool = false,
        /// If `true`, queries are projected from a latent vector. <https://arxiv.org/abs/2405.04434>
        use_latent_q: bool = false,
        /// Width of that vector. Required with it.
        dim_latent_q: Option<usize> = None,
        /// If `true`, keys and values are projected from a latent vector. <https://arxiv.org/abs/2405.04434>
        use_latent_kv: bool = false,
        /// Width of that vector. Required with it.
        dim_latent_kv: Option<usize> = None,
        /// Number of heads whose keys come from the input and rotate; the others do not.
        latent_rope_subheads: Option<usize> = None,
        /// If `true`, the mixture of values is learned in cross-attention too; self-attention has the option of the
        /// layers.
        learned_value_residual_mix: bool = false,
        /// If `true`, the output projection starts at 0.
        zero_init_output: bool = false,
        /// If `true`, all weight is on the highest score, with the gradient of the softmax.
        hard: bool = false,
        /// If `true`, adds Gumbel noise to the scores in training, where x-transformers does it always; without noise
        /// `gumbel_softmax_hard` takes the highest score. <https://arxiv.org/abs/1611.01144>
        gumbel_softmax: bool = false,
        /// Divides scores and noise.
        gumbel_softmax_temp: f64 = 1.0,
        /// If `true`, all weight is on the highest sum, with the gradient of the softmax.
        gumbel_softmax_hard: bool = true,
        /// If `true`, weights are sigmoids of the scores in place of their softmax. <https://arxiv.org/abs/2409.04431>
        sigmoid: bool = false,
        /// If `true`, scores are negative squared distances in place of products. <https://arxiv.org/abs/2006.04710>
        l2_distance: bool = false,
        /// If `true`, weights have the signs of their scores. <https://arxiv.org/abs/2411.07176>
        cog_signed: bool = false,
        /// If `true`, tokens can lower the scores of earlier ones for all later queries; causal models only.
        /// <https://arxiv.org/abs/2410.02703>
        selective: bool = false,
        /// Maximum distance to the past; keys further back are masked.
        max_attend_past: Option<usize> = None,
        /// If `true`, normalises queries and keys to length 1. <https://arxiv.org/abs/2010.04245>
        qk_norm: bool = false,
        /// Number of parts of a head that are normalised separately.
        qk_norm_groups: usize = 1,
        /// Factor of the scores of normalised queries and keys.
        qk_norm_scale: f64 = 10.0,
        /// If `true`, learned vectors take the place of that factor. <https://arxiv.org/abs/2302.05442>
        qk_norm_dim_scale: bool = false,
        /// If `true`, an RMSNorm with a scale per head follows queries and keys. <https://arxiv.org/abs/2302.05442>
        qk_rmsnorm: bool = false,
        /// If `true`, an RMSNorm with a scale per head follows the keys.
        k_rmsnorm: bool = false,
        /// If `true`, an RMSNorm with a scale per head follows the values.
        value_rmsnorm: bool = false,
        /// If `true`, all heads share one key and value head. <https://arxiv.org/abs/1911.02150>
        one_kv_head: bool = false,
        /// Number of key and value heads: query head `h` uses `h % kv_heads`. Default `heads`.
        /// <https://arxiv.org/abs/2305.13245>
        kv_heads: Option<usize> = None,
        /// Number of features per head of the values. Default `dim_head`.
        value_dim_head: Option<usize> = None,
        /// If `true`, adds a key and value of zeros, to attend to nothing.
        add_zero_kv: bool = false,
        /// If `true`, each head has a learned score whose weight goes to no value. <https://arxiv.org/abs/2508.10925>
        head_learned_sink: bool = false,
        /// If `true`, clamps scores softly. <https://arxiv.org/abs/2408.00118>
        softclamp_logits: bool = false,
        /// Bound of that clamp.
        logit_softclamp_value: f64 = 50.0,
        /// If `true`, averages exponentials of the values and takes the logarithm. <https://arxiv.org/abs/2411.03493>
        laser: bool = false,
        /// Bound of a soft clamp of the values before that.
        laser_softclamp_value: f64 = 15.0,
        /// Asks PyTorch for its fused attention. Changes no number, except that a query to which masks and causality
        /// together leave no key has the output 0.
        flash: bool = false,
    }
}

options! {
    /// Options of the feedforward, with the prefix `ff_` among the options of the layers.
    pub struct FeedForwardConfig {
        /// Ratio of the inner width, which is rounded down, to the width of the model.
        mult: f64 = 4.0,
        /// Width of the output. Default and only value: `dim`, since the output is added to the input.
        dim_out: Option<usize> = None,
        /// If `true`, gates the activation (GLU). <https://arxiv.org/abs/2002.05202>
        glu: bool = false,
        /// If `true`, the gated activation is multiplied by a learned vector.
        glu_mult_bias: bool = false,
        /// If `true`, the activation is SiLU in place of GELU.
        swish: bool = false,
        /// If `true`, the activation is a squared ReLU. <https://arxiv.org/abs/2109.08668>
        relu_squared: bool = false,
        /// Name of another activation: `relu`, `silu`, `gelu`, `gelu_tanh`, `tanh` or `sigmoid`.
        custom_activation: Option<String> = None,
        /// If `true`, the activation is SoLU: `x` times its softmax, and a LayerNorm.
        solu: bool = false,
        /// Bound of a soft clamp before the activation of a feedforward without a gate.
        softclamp_value: Option<f64> = None,
        /// If `true`, soft clamps bound both factors of a gated feedforward with GELU or SiLU.
        glu_softclamp: bool = false,
        /// Bound of the gate.
        glu_gate_softclamp_value: f64 = 4.0,
        /// Bound of the other factor.
        glu_up_softclamp_value: f64 = 25.0,
        /// If `true`, a LayerNorm follows the activation. <https://arxiv.org/abs/2110.09456>
        post_act_ln: bool = false,
        /// Dropout probability before the output layer.
        dropout: f64 = 0.0,
        /// Dropout probability of the output.
        sublayer_dropout: f64 = 0.0,
        /// If `true`, neither layer has a bias; with `glu` the first keeps it.
        no_bias: bool = false,
        /// If `true`, the output layer starts at 0.
        zero_init_output: bool = false,
    }
}
