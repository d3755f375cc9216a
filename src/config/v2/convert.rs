//! From options of x-transformers 0.22 to those of version 2 that compute the same numbers.

use super::{
    super::{
        self as config, AttentionPlan, FinalNorm, LayersPlan, ModelPlan, PaddingPlan, Positions, RotaryPlan, options,
    },
    AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, Config, ContinuousTransformerWrapperConfig,
    FeedForwardConfig, LayersKind, PerLayer, TransformerWrapperConfig, XTransformerConfig,
};
use crate::{
    Error, Result, Tensor,
    collect::CollectVec,
    config::{BranchPlan, Gain, NormPlan},
    error::{ErrorContext, ensure},
    ops::Activation,
};

/// Config of version 2 with the numbers of one of 0.22, and what changes in the state dict.
///
/// ```
/// use x_transformers::config::{Config, v2::Conversion};
/// # fn main() -> x_transformers::Result<()> {
/// let old = Config::from_json(
///     r#"{"model": "TransformerWrapper", "num_tokens": 256, "max_seq_len": 64, "logits_bias": false, "attn_layers": {
///         "kind": "Decoder", "dim": 32, "depth": 2, "use_rmsnorm": true, "final_norm": "same", "attn_out_bias": false}}"#,
/// )?;
/// let conversion = Conversion::new(&old)?;
/// assert_eq!(conversion.config().version(), "2");
/// assert_eq!(conversion.name("token_emb.weight"), "token_emb.emb.weight");
/// let norms = old.to_json().replace("\"use_rmsnorm\": true", "\"use_rmsnorm\": false");
/// assert!(Conversion::new(&Config::from_json(&norms)?).unwrap_err().to_string().contains("no bias"));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Conversion {
    config: config::Config,
    stacks: Vec<Stack>,
}

/// Changes in one stack of layers and its wrapper.
#[derive(Clone, Debug)]
struct Stack {
    /// Prefix of the wrapper's names.
    prefix: &'static str,
    /// Sublayer whose last norm is the wrapper's.
    last: Option<usize>,
    heads: usize,
    kv_heads: usize,
    dim_head: usize,
    /// Features per head that are rotated in halves, which version 2 rotates in neighbouring pairs.
    halves: usize,
    /// Divides the stored frequencies.
    interpolation: f64,
}

/// Reasons for which no config of version 2 has the numbers of one of 0.22.
#[derive(Default)]
struct Obstacles(Vec<String>);

impl Obstacles {
    fn refuse(&mut self, found: bool, option: &str, why: &str) {
        if found {
            self.0.push(format!("`{option}`: {why}"));
        }
    }
}

impl Conversion {
    /// Converts a `TransformerWrapper`, a `ContinuousTransformerWrapper`, an `AutoregressiveWrapper`, an `XTransformer`
    /// or attention layers.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) with everything that stands in the way.
    pub fn new(first: &config::Config) -> Result<Self> {
        let mut obstacles = Obstacles::default();
        let plan = first.plan()?;
        let second = match first {
            config::Config::TransformerWrapper(config) => Config::TransformerWrapper(wrapper(config, &mut obstacles)?),
            config::Config::AutoregressiveWrapper(config) => {
                let net = wrapper(&config.net, &mut obstacles).context("net")?;
                let (ignore_index, pad_value) = (config.ignore_index, config.pad_value);
                let config = AutoregressiveConfig { net, ignore_index, pad_value, ..AutoregressiveConfig::default() };
                Config::AutoregressiveWrapper(config)
            }
            config::Config::AttentionLayers(config) => {
                let layers = AttentionLayersConfig {
                    pre_norm_has_final_norm: Some(false),
                    ..layers(config, &LayersPlan::new(config)?, &mut obstacles)
                };
                Config::AttentionLayers(Box::new(layers))
            }
            config::Config::V2(_) => return Err(Error::option("version", "is already \"2\"")),
            config::Config::ContinuousTransformerWrapper(config) => {
                Config::ContinuousTransformerWrapper(continuous(config, &mut obstacles)?)
            }
            config::Config::XTransformer(config) => {
                let mut side = |config: &config::TransformerWrapperConfig, prefix: &str| {
                    let mut own = Obstacles::default();
                    let side = wrapper(config, &mut own);
                    // Obstacles begin with an option in backquotes.
                    obstacles.0.extend(own.0.into_iter().map(|why| format!("`{prefix}{}", &why[1..])));
                    side
                };
                // No logits, whose bias would stand in the way.
                let enc = config::TransformerWrapperConfig { return_only_embed: true, ..config.enc.clone() };
                Config::XTransformer(Box::new(XTransformerConfig {
                    tie_token_emb: config.tie_token_emb,
                    enc: side(&enc, "enc_").context("encoder")?,
                    dec: side(&config.dec, "dec_").context("decoder")?,
                    ..XTransformerConfig::default()
                }))
            }
            config::Config::ViTransformerWrapper(_) => {
                let why = "ViTransformerWrapper cannot have the same numbers in version 2, whose head is a linear layer on \
                           the mean of the patches: in 0.22 it is a feedforward on a class token";
                return Err(Error::option("model", why));
            }
            config::Config::SamplingFilter(_) => return Err(Error::option("model", "SamplingFilter has no weights")),
        };
        let why = obstacles.0.join("\n");
        ensure!(obstacles.0.is_empty(), Error::option("version", format!("2 cannot have the same numbers:\n{why}")));
        let config = config::Config::V2(Box::new(second));
        let (converted, wrapped) = (config.plan()?, !matches!(plan, ModelPlan::Layers(_)));
        let both = plan.layers().into_iter().zip(converted.layers());
        let stacks = both.map(|((place, old), (_, new))| Stack::new(place, old, new, wrapped)).try_collect_vec()?;
        Ok(Self { config, stacks })
    }

    /// Returns the config of version 2.
    pub fn config(&self) -> &config::Config {
        &self.config
    }

    /// Returns the name that a tensor of the state dict has in version 2.
    pub fn name(&self, name: &str) -> String {
        self.stack(name).map_or_else(|| name.to_string(), |stack| stack.name(name))
    }

    /// Returns `false` for a tensor of the state dict that version 2 does not have: the logits of an encoder, which
    /// nothing reads.
    pub fn keeps(&self, name: &str) -> bool {
        self.stacks.len() == 1 || !name.starts_with("encoder.to_logits.")
    }

    /// Returns the values of a tensor of the state dict, by its name in 0.22, in the order of version 2.
    ///
    /// Errors: a shape that the config does not give.
    pub fn tensor(&self, name: &str, tensor: &Tensor) -> Result<Tensor> {
        self.stack(name).map_or_else(|| Ok(tensor.clone()), |stack| stack.tensor(name, tensor))
    }

    fn stack(&self, name: &str) -> Option<&Stack> {
        self.stacks.iter().find(|stack| name.starts_with(stack.prefix))
    }
}

impl Stack {
    /// Compares the plans of layers at this place.
    ///
    /// Errors: plans that differ.
    fn new(place: &'static str, old: &LayersPlan, new: &LayersPlan, wrapped: bool) -> Result<Self> {
        if let Some(difference) = difference(old, new, wrapped) {
            let why = format!("2 cannot have the same numbers: {difference}");
            return Err(Error::option("version", why));
        }
        let attention = old.layers.iter().find_map(|layer| layer.branch.attention());
        let rotary = old.positions.rotary.as_ref();
        let moved = wrapped && old.final_norm.is_some() && new.final_norm.is_none();
        Ok(Self {
            prefix: place.strip_suffix("attn_layers").unwrap_or(""),
            last: moved.then(|| old.layers.len().saturating_sub(1)),
            heads: attention.map_or(1, |plan| plan.heads),
            kv_heads: attention.map_or(1, |plan| plan.kv_heads),
            dim_head: attention.map_or(1, |plan| plan.dim_head),
            halves: rotary.filter(|plan| !plan.interleaved).map_or(0, |plan| plan.dim),
            interpolation: rotary.map_or(1.0, |plan| plan.interpolation),
        })
    }

    fn name(&self, name: &str) -> String {
        let Some(inner) = name.strip_prefix(self.prefix) else { return name.to_string() };
        let inner = match (inner.strip_prefix("norm."), self.last) {
            (Some(part), Some(last)) => format!("attn_layers.layers.{last}.0.2.{part}"),
            (Some(part), None) => format!("attn_layers.final_norm.{part}"),
            (None, _) if inner == "token_emb.weight" => "token_emb.emb.weight".to_string(),
            (None, _) => inner.replace(".net.0.", ".ff.0.").replace(".net.3.", ".ff.2."),
        };
        format!("{}{inner}", self.prefix)
    }

    fn tensor(&self, name: &str, tensor: &Tensor) -> Result<Tensor> {
        let rows = |order: Vec<i64>| -> Result<Tensor> {
            let order = Tensor::from_vec(order, [tensor.dim(0)?], tensor.device())?;
            tensor.embedding(&order).context(name.to_string())
        };
        let grouped = self.kv_heads < self.heads;
        if name.ends_with("to_q.weight") && (grouped || self.halves > 0) {
            return rows(self.rows(self.heads, &|head| self.old_head(head)));
        }
        if name.ends_with("to_k.weight") && self.halves > 0 {
            return rows(self.rows(self.kv_heads, &|head| head));
        }
        if name.ends_with("to_out.weight") && grouped {
            let columns = tensor.transpose(0, 1)?.contiguous()?;
            let width = columns.dim(0)? / self.heads;
            let order = (0..self.heads).flat_map(|head| {
                let first = self.old_head(head) * width;
                (first..first + width).map(|column| column as i64)
            });
            let order = Tensor::from_vec(order.collect_vec(), [columns.dim(0)?], tensor.device())?;
            return columns.embedding(&order).context(name.to_string())?.transpose(0, 1)?.contiguous();
        }
        if name.ends_with("rotary_pos_emb.inv_freq") && self.interpolation != 1.0 {
            return tensor.affine(self.interpolation, 0.0);
        }
        Ok(tensor.clone())
    }

    /// Head of 0.22 that is this one of version 2: `h / group` reads a key head there, `h % kv_heads` here.
    fn old_head(&self, head: usize) -> usize {
        head % self.kv_heads * (self.heads / self.kv_heads) + head / self.kv_heads
    }

    /// Rows of a projection of queries or keys in the order of version 2.
    fn rows(&self, heads: usize, old_head: &dyn Fn(usize) -> usize) -> Vec<i64> {
        let half = self.halves / 2;
        let old = |feature: usize| if feature < 2 * half { feature % 2 * half + feature / 2 } else { feature };
        let row = |head: usize| (0..self.dim_head).map(move |feature| (head, feature));
        let rows = (0..heads).flat_map(row);
        rows.map(|(head, feature)| (old_head(head) * self.dim_head + old(feature)) as i64).collect_vec()
    }
}

fn wrapper(first: &config::TransformerWrapperConfig, obstacles: &mut Obstacles) -> Result<TransformerWrapperConfig> {
    let plan = first.plan()?;
    let has_logits = !first.tie_embedding && !first.return_only_embed;
    for (found, option, why) in [
        (first.max_mem_len.is_some(), "max_mem_len", "memories of version 2 pass the norms of the layers"),
        (first.post_emb_norm, "post_emb_norm", "LayerNorm of version 2 has no bias"),
        (first.num_token_types > 0, "num_token_types", "tables of version 2 need their ids in each call"),
        (!first.scale_pos_emb && plan.absolute_positions.is_table(), "scale_pos_emb", "version 2 always scales them"),
        (first.pooler, "pooler", "version 2 has none"),
        (first.mlm_head, "mlm_head", "version 2 has none"),
        (plan.logits_bias && has_logits, "logits_bias", "logits of version 2 have no bias"),
    ] {
        obstacles.refuse(found, option, why);
    }
    let final_norm = first.attn_layers.final_norm;
    obstacles.refuse(
        final_norm == FinalNorm::Layer,
        "final_norm",
        "LayerNorm of version 2 has no bias: \"same\" is converted",
    );
    let has_final_norm = final_norm == FinalNorm::Same;
    Ok(TransformerWrapperConfig {
        num_tokens: first.num_tokens,
        max_seq_len: first.max_seq_len,
        emb_dim: first.emb_dim,
        shift_mem_down: first.shift_mem_down,
        emb_dropout: first.emb_dropout,
        num_memory_tokens: (first.num_memory_tokens > 0).then_some(first.num_memory_tokens),
        tie_embedding: first.tie_embedding,
        tie_embedding_scale: first.tie_embedding.then_some(1.0),
        return_only_embed: first.return_only_embed,
        use_abs_pos_emb: first.use_pos_emb,
        average_pool_embed: first.average_pool_embed,
        attn_layers: AttentionLayersConfig {
            pre_norm_has_final_norm: (!has_final_norm).then_some(false),
            ..layers(&first.attn_layers, &plan.layers, obstacles)
        },
        ..TransformerWrapperConfig::default()
    })
}

fn continuous(
    first: &config::ContinuousTransformerWrapperConfig,
    obstacles: &mut Obstacles,
) -> Result<ContinuousTransformerWrapperConfig> {
    let plan = first.plan()?;
    let final_norm = first.attn_layers.final_norm;
    for (found, option, why) in [
        (first.dim_in.is_some(), "dim_in", "projections of version 2 have no bias"),
        (first.dim_out.is_some(), "dim_out", "projections of version 2 have no bias"),
        (final_norm == FinalNorm::Layer, "final_norm", "LayerNorm of version 2 has no bias: \"same\" is converted"),
    ] {
        obstacles.refuse(found, option, why);
    }
    Ok(ContinuousTransformerWrapperConfig {
        max_seq_len: Some(first.max_seq_len),
        emb_dropout: first.emb_dropout,
        use_abs_pos_emb: first.use_pos_emb,
        attn_layers: AttentionLayersConfig {
            pre_norm_has_final_norm: (final_norm != FinalNorm::Same).then_some(false),
            ..layers(&first.attn_layers, &plan.layers, obstacles)
        },
        ..ContinuousTransformerWrapperConfig::default()
    })
}

fn layers(
    first: &options::AttentionLayersConfig,
    plan: &LayersPlan,
    obstacles: &mut Obstacles,
) -> AttentionLayersConfig {
    let attn = &first.attn;
    let norms = plan.layers.iter().flat_map(|layer| &layer.norms).flatten();
    let layer_norm = norms.clone().any(|norm| matches!(norm, NormPlan::Layer(_)));
    let grouped = attn.kv_heads.is_some_and(|kv_heads| kv_heads < first.heads);
    let by_head = first.alibi_pos_bias || first.rel_pos_bias || attn.head_scale || attn.num_mem_kv > 0;
    let by_position = first.alibi_pos_bias || first.rel_pos_bias || attn.max_attend_past.is_some();
    let rotary = plan.positions.rotary.as_ref();
    for (found, option, why) in [
        (layer_norm, "use_rmsnorm", "is off, and LayerNorm of version 2 has no bias"),
        (first.norm_eps.is_some(), "norm_eps", "norms of version 2 have no eps to set"),
        (first.use_rezero, "use_rezero", "version 2 has none"),
        (first.alibi_learned, "alibi_learned", "version 2 has none"),
        (first.position_infused_attn, "position_infused_attn", "version 2 has none"),
        (rotary.is_some_and(|plan| plan.values), "rotary_qk_only", "is off, and version 2 does not rotate values"),
        (first.rotary_llama3_scaling.is_some(), "rotary_llama3_scaling", "version 2 has none"),
        (first.rotary_yarn_scaling.is_some(), "rotary_yarn_scaling", "version 2 has none"),
        (first.rotary_freq_factors.is_some(), "rotary_freq_factors", "version 2 has none"),
        (first.residual_attn, "residual_attn", "version 2 passes on scores with their biases and masks"),
        (first.cross_residual_attn, "cross_residual_attn", "version 2 passes on scores with their masks"),
        (first.use_qk_norm_attn, "use_qk_norm_attn", "version 2 has no learned temperature"),
        (attn.qk_norm, "attn_qk_norm", "version 2 has no learned temperature"),
        (attn.qkv_bias, "attn_qkv_bias", "version 2 has none"),
        (attn.out_bias, "attn_out_bias", "is on, and the output projection of version 2 has no bias"),
        (first.heads == 1 && !attn.on_attn, "heads", "is 1, for which version 2 has no output projection"),
        (attn.talking_heads, "attn_talking_heads", "version 2 adds the mixture before the softmax to the scores"),
        (attn.collab_heads, "attn_collab_heads", "version 2 has none"),
        (attn.sparse_topk.is_some(), "attn_sparse_topk", "version 2 does not count masked keys"),
        (attn.use_entmax15, "attn_use_entmax15", "version 2 has none"),
        (attn.gate_values, "attn_gate_values", "the gate of version 2 has no bias"),
        (attn.num_mem_kv > 0 && by_position, "attn_num_mem_kv", "has no position in version 2"),
        (
            attn.num_mem_kv > 0 && rotary.is_some_and(|plan| !plan.interleaved),
            "attn_num_mem_kv",
            "cannot be converted with rotations in halves",
        ),
        (
            grouped && by_head,
            "attn_kv_heads",
            "orders heads otherwise in version 2, which other options of heads do not",
        ),
        (first.ff.no_bias && first.ff.glu, "ff_no_bias", "leaves the bias of a gated layer in version 2"),
        (
            first.weight_tie_layers && !first.pre_norm && first.final_norm == FinalNorm::Same,
            "final_norm",
            "is that of one of the tied layers in version 2",
        ),
        (first.ff.post_act_ln, "ff_post_act_ln", "LayerNorm of version 2 has no bias"),
    ] {
        obstacles.refuse(found, option, why);
    }
    let activation = first.ff.activation;
    let custom = ![Activation::Gelu, Activation::Silu, Activation::ReluSquared].contains(&activation);
    AttentionLayersConfig {
        kind: match first.kind {
            options::LayersKind::Encoder => LayersKind::Encoder,
            options::LayersKind::Decoder => LayersKind::Decoder,
            options::LayersKind::CrossAttender => LayersKind::CrossAttender,
        },
        dim: first.dim,
        depth: Some(first.depth),
        heads: first.heads,
        cross_attend: first.cross_attend,
        only_cross: first.only_cross,
        use_rmsnorm: first.use_rmsnorm,
        use_scalenorm: first.use_scalenorm && !first.use_rmsnorm,
        norm_add_unit_offset: false,
        alibi_pos_bias: first.alibi_pos_bias,
        alibi_num_heads: first.alibi_num_heads,
        rel_pos_bias: first.rel_pos_bias,
        rel_pos_num_buckets: first.rel_pos_num_buckets,
        rel_pos_max_distance: first.rel_pos_max_distance,
        rotary_pos_emb: first.rotary_pos_emb,
        rotary_emb_dim: rotary.map(|plan| plan.dim),
        rotary_interpolation_factor: first.rotary_interpolation_factor,
        rotary_base_rescale_factor: rotary.map_or(1.0, rescale),
        weight_tie_layers: first.weight_tie_layers,
        custom_layers: first.custom_layers.clone(),
        sandwich_coef: first.sandwich_coef,
        par_ratio: first.par_ratio,
        macaron: first.macaron,
        pre_norm: first.pre_norm,
        gate_residual: first.gate_residual,
        scale_residual: first.scale_residual.into(),
        shift_tokens: first.shift_tokens.clone(),
        sandwich_norm: first.sandwich_norm,
        zero_init_branch_output: first.zero_init_branch_output,
        attn: PerLayer::All(AttentionConfig {
            dim_head: attn.dim_head,
            kv_heads: attn.kv_heads,
            head_scale: attn.head_scale,
            num_mem_kv: attn.num_mem_kv,
            dropout: attn.dropout,
            on_attn: attn.on_attn,
            zero_init_output: attn.zero_init_output,
            max_attend_past: attn.max_attend_past,
            ..AttentionConfig::default()
        }),
        ff: PerLayer::All(FeedForwardConfig {
            mult: first.ff.mult,
            glu: first.ff.glu,
            swish: activation == Activation::Silu,
            relu_squared: activation == Activation::ReluSquared,
            custom_activation: custom.then(|| activation.name().to_string()),
            no_bias: first.ff.no_bias,
            dropout: first.ff.dropout,
            zero_init_output: first.ff.zero_init_output,
            ..FeedForwardConfig::default()
        }),
        ..AttentionLayersConfig::default()
    }
}

/// Factor of the base from which version 2 computes the base of these frequencies.
fn rescale(plan: &RotaryPlan) -> f64 {
    let dim = plan.dim as f64;
    if plan.base == 10000.0 { 1.0 } else { libm::pow(plan.base / 10000.0, (dim - 2.0) / dim) }
}

/// Returns the first difference between plans, besides what a conversion of options and weights takes care of.
fn difference(old: &LayersPlan, new: &LayersPlan, wrapped: bool) -> Option<String> {
    let mut old = old.clone();
    let final_norm = old.final_norm.take().filter(|_| wrapped);
    match old.layers.last_mut() {
        // After the last sum, where version 2 has no other norm.
        Some(last) if new.final_norm.is_none() && final_norm.is_some() => last.norms[2] = final_norm,
        _ => old.final_norm = final_norm,
    }
    let [old, new] = [&old, new].map(canonical);
    if old.layers.len() != new.layers.len() || old.modules != new.modules {
        return Some("the sublayers have another order".to_string());
    }
    let layers = old.layers.iter().zip(&new.layers).enumerate();
    let mut differing = layers.filter(|(_, (old, new))| old != new);
    if let Some((index, (old, new))) = differing.next() {
        return Some(format!("sublayer {index} would be\n{new:?}\ninstead of\n{old:?}"));
    }
    (old != new).then(|| "positions or norms of the layers differ".to_string())
}

/// Returns a plan in which everything that may differ in a conversion is the same.
fn canonical(plan: &LayersPlan) -> LayersPlan {
    let mut plan = plan.clone();
    let rotation = |rotary: &mut Option<RotaryPlan>| {
        if let Some(rotary) = rotary {
            let interpolation = rotary.interpolation * rotary.position_divisor;
            *rotary = RotaryPlan {
                // Of a base that was rescaled, the last digits differ.
                base: libm::round(libm::log(rotary.base) * 1e9),
                interpolation,
                position_divisor: 1.0,
                interleaved: true,
                ..rotary.clone()
            };
        }
    };
    rotation(&mut plan.positions.rotary);
    let disable_absolute = Some(plan.positions.replace_absolute());
    plan.positions = Positions { relative: true, disable_absolute, ..plan.positions };
    (plan.owns_final_norm, plan.norms_memories) = (true, true);
    let norm = |norm: &mut Option<NormPlan>| match norm {
        Some(NormPlan::ClampedRms(_)) => *norm = Some(NormPlan::Unit { gain: Gain::Each, offset: 0.0 }),
        Some(NormPlan::Scale(_)) => *norm = Some(NormPlan::Unit { gain: Gain::One, offset: 0.0 }),
        _ => {}
    };
    norm(&mut plan.final_norm);
    for layer in &mut plan.layers {
        layer.norms.iter_mut().for_each(norm);
        match &mut layer.branch {
            BranchPlan::SelfAttention(attention) => {
                rotation(&mut attention.rotary);
                canonical_attention(attention);
            }
            BranchPlan::CrossAttention(attention) => {
                // Without positions of the context, which 0.22 does not take, nothing rotates.
                attention.rotary = None;
                canonical_attention(attention);
            }
            BranchPlan::FeedForward(feedforward) => feedforward.place = ("ff", 2),
            BranchPlan::Custom => {}
        }
    }
    plan
}

fn canonical_attention(plan: &mut AttentionPlan) {
    plan.padding = PaddingPlan::Output;
    plan.kv_interleaved = true;
    plan.mem_kv_counted = false;
}
