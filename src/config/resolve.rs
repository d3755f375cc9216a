//! Options to plans: the only place that knows which options can be combined.

use super::{
    branch_plan::{AttentionPlan, FeedForwardPlan, Normalize, ScoreResidual, TalkingHeads, Temperature, ValueGate},
    options::{
        AttentionConfig, AttentionLayersConfig, FeedForwardConfig, FinalNorm, LayerType, LayersKind, ShiftTokens,
    },
    order::layer_order,
    plan::{
        AlibiPlan, BranchPlan, DropPlan, LayerPlan, LayersPlan, LinkPlan, NormPlan, PositionBiasPlan, Positions,
        ResidualPlan, T5Plan, WrapPlan,
    },
    ranges::{WIDEST, at_least_one, probability, without},
    rotary::RotaryPlan,
};
use crate::{Error, Result, collect::CollectVec, error::ensure, ops::Window};

impl LayersPlan {
    /// Resolves options.
    ///
    /// Errors: [`ErrorKind::Option`](crate::ErrorKind::Option) for the first one that is illegal, alone or with
    /// another.
    pub fn new(config: &AttentionLayersConfig) -> Result<Self> {
        layers(config)
    }
}

fn layers(config: &AttentionLayersConfig) -> Result<LayersPlan> {
    at_least_one("dim", config.dim)?;
    at_least_one("heads", config.heads)?;
    let causal = config.kind == LayersKind::Decoder;
    let cross_attend = config.cross_attend || config.kind == LayersKind::CrossAttender;
    without("only_cross", config.only_cross && !cross_attend, "cross_attend")?;
    ensure!(
        config.pre_norm || !config.sandwich_norm,
        Error::option(
            "sandwich_norm",
            "cannot be used with `pre_norm = false`, which puts the norms after the residual sums"
        )
    );
    let order = layer_order(config)?;
    check_branches(config, &order, cross_attend)?;
    let attention = attention(config)?;
    let positions = positions(config, &order, causal, attention.dim_qk())?;
    let temperature = rotated_temperature(attention.temperature, positions.rotary.as_ref())?;
    let feedforward = feedforward(config.dim, config.dim, &config.ff, config.zero_init_branch_output)?;
    let shifts = shifts(config, order.len(), causal)?;
    let norm = norm(config)?;
    // With post-norm the wrapper's norm is the norm of the last sum.
    let last = (config.final_norm != FinalNorm::None).then_some(order.len() - 1);
    let distinct = distinct(config, &order)?;
    let scores = |residual: bool| if residual { ScoreResidual::Scaled } else { ScoreResidual::None };
    let layer = |(index, (&kind, shifts)): (usize, (&LayerType, Option<Vec<isize>>))| {
        let branch = match kind {
            LayerType::SelfAttention => BranchPlan::SelfAttention(AttentionPlan {
                causal,
                rotary: positions.rotary.clone(),
                temperature,
                residual: scores(config.residual_attn),
                ..attention.clone()
            }),
            LayerType::CrossAttention => BranchPlan::CrossAttention(AttentionPlan {
                residual: scores(config.cross_residual_attn),
                ..attention.clone()
            }),
            LayerType::FeedForward => BranchPlan::FeedForward(feedforward.clone()),
        };
        let is_feedforward = kind == LayerType::FeedForward;
        let cosine = config.use_qk_norm_attn && !is_feedforward;
        let norms = [
            norm.filter(|_| config.pre_norm && !cosine),
            norm.filter(|_| config.sandwich_norm || cosine),
            norm.filter(|_| !config.pre_norm && Some(index) != last),
        ];
        let half = config.macaron && is_feedforward;
        let wrap = WrapPlan { rezero: config.use_rezero, shifts, half, ..WrapPlan::default() };
        let residual =
            ResidualPlan { gated: config.gate_residual, scaled: config.scale_residual, ..ResidualPlan::default() };
        LayerPlan { branch, norms, wrap, residual }
    };
    let modules = (0..order.len()).map(|index| index % distinct).collect_vec();
    let layers = order.iter().zip(shifts).enumerate().map(layer).collect_vec();
    let final_norm = match config.final_norm {
        FinalNorm::Layer => Some(NormPlan::Layer(config.norm_eps.unwrap_or(1e-5))),
        FinalNorm::Same => norm,
        FinalNorm::None => None,
    };
    Ok(LayersPlan {
        dim: config.dim,
        cross_attend,
        positions,
        layers,
        modules,
        idle: Vec::new(),
        links: LinkPlan::default(),
        softclamp: None,
        final_norm,
        owns_final_norm: false,
        norms_memories: false,
        condition: None,
        streams: 1,
        prefix: false,
        drops: DropPlan::default(),
    })
}

/// Returns the number of sublayers with weights of their own: if they are tied, those of the first block.
fn distinct(config: &AttentionLayersConfig, order: &[LayerType]) -> Result<usize> {
    if !config.weight_tie_layers {
        return Ok(order.len());
    }
    const KEY: &str = "weight_tie_layers";
    let block = order.len() / config.depth.max(1);
    let repeats =
        block > 0 && order.len().is_multiple_of(block) && order.chunks(block).all(|blocks| *blocks == order[..block]);
    ensure!(
        config.custom_layers.is_none() && repeats,
        Error::option(KEY, "requires identical blocks: no `custom_layers`, `sandwich_coef` or `par_ratio`")
    );
    ensure!(
        config.pre_norm || config.final_norm == FinalNorm::None,
        Error::option(
            KEY,
            "requires `final_norm = \"none\"` with `pre_norm = false`, because the last block must have the same norms \
             as the others"
        )
    );
    ensure!(
        matches!(config.shift_tokens, ShiftTokens::All(_)),
        Error::option(KEY, "requires a single number for `shift_tokens`")
    );
    Ok(block)
}

/// Returns the branch norm. ReZero replaces all of them; RMSNorm takes precedence over ScaleNorm.
fn norm(config: &AttentionLayersConfig) -> Result<Option<NormPlan>> {
    let eps = config.norm_eps;
    if let Some(eps) = eps {
        // Written so that NaN is rejected.
        ensure!(
            eps > 0.0 && eps < 1.0,
            Error::option("norm_eps", format_args!("expected a number between 0 and 1, got {eps}"))
        );
    }
    Ok(match (config.use_rezero, config.use_rmsnorm, config.use_scalenorm) {
        (true, ..) => None,
        (false, true, _) => Some(eps.map_or(NormPlan::ClampedRms(1e-8), NormPlan::Rms)),
        (false, false, true) => Some(NormPlan::Scale(eps.unwrap_or(1e-5))),
        (false, false, false) => Some(NormPlan::Layer(eps.unwrap_or(1e-5))),
    })
}

/// Rejects options of a kind of sublayer that the layers do not have.
fn check_branches(config: &AttentionLayersConfig, order: &[LayerType], cross_attend: bool) -> Result<()> {
    let cross = order.contains(&LayerType::CrossAttention);
    ensure!(
        cross_attend || !cross,
        Error::option("custom_layers", "contains cross-attention (`c`), which requires `cross_attend = true`")
    );
    ensure!(
        !cross_attend || cross,
        Error::option("cross_attend", "is true, but the layer order has no cross-attention (`c`)")
    );
    ensure!(
        cross || !config.cross_residual_attn,
        Error::option("cross_residual_attn", "requires cross-attention (`cross_attend = true`)")
    );
    let own = order.contains(&LayerType::SelfAttention);
    let needs_own = [
        ("residual_attn", config.residual_attn),
        ("rotary_pos_emb", config.rotary_pos_emb),
        ("position_infused_attn", config.position_infused_attn),
        ("rel_pos_bias", config.rel_pos_bias),
        ("alibi_pos_bias", config.alibi_pos_bias),
    ];
    needs_own.into_iter().try_for_each(|(key, on)| {
        let legal = own || !on;
        ensure!(legal, Error::option(key, "applies to self-attention, but the layer order has none"));
        Ok(())
    })
}

fn positions(config: &AttentionLayersConfig, order: &[LayerType], causal: bool, dim_qk: usize) -> Result<Positions> {
    debug_assert!(!order.is_empty());
    let dim_head = config.attn.dim_head;
    if config.position_infused_attn {
        let even = config.dim.is_multiple_of(2);
        ensure!(
            even,
            Error::option(
                "position_infused_attn",
                format_args!("requires an even `dim` (half sines, half cosines), got {}", config.dim)
            )
        );
    }
    Ok(Positions {
        infused: config.position_infused_attn,
        rotary: RotaryPlan::new(config, dim_head, dim_qk)?,
        bias: bias(config, causal)?,
        ..Positions::default()
    })
}

fn bias(config: &AttentionLayersConfig, causal: bool) -> Result<PositionBiasPlan> {
    let defaults = AttentionLayersConfig::default();
    if !config.alibi_pos_bias {
        without("alibi_num_heads", config.alibi_num_heads.is_some(), "alibi_pos_bias")?;
        without("alibi_learned", config.alibi_learned, "alibi_pos_bias")?;
    }
    if !config.rel_pos_bias {
        let (buckets, distance) = (config.rel_pos_num_buckets, config.rel_pos_max_distance);
        without("rel_pos_num_buckets", buckets != defaults.rel_pos_num_buckets, "rel_pos_bias")?;
        without("rel_pos_max_distance", distance != defaults.rel_pos_max_distance, "rel_pos_bias")?;
    }
    match (config.alibi_pos_bias, config.rel_pos_bias) {
        (false, false) => Ok(PositionBiasPlan::None),
        (true, true) => Err(Error::option("alibi_pos_bias", "cannot be used with `rel_pos_bias`: choose one")),
        (false, true) => t5(config, causal).map(PositionBiasPlan::T5),
        (true, false) => {
            ensure!(causal, Error::option("alibi_pos_bias", "requires a causal model (`kind = \"Decoder\"`)"));
            let sloped = config.alibi_num_heads.unwrap_or(config.heads);
            ensure!(
                (1..=config.heads).contains(&sloped),
                Error::option(
                    "alibi_num_heads",
                    format_args!("expected 1 to `heads` ({}), got {sloped}", config.heads)
                )
            );
            Ok(PositionBiasPlan::Alibi(AlibiPlan { heads: config.heads, sloped, learned: config.alibi_learned }))
        }
    }
}

fn t5(config: &AttentionLayersConfig, causal: bool) -> Result<T5Plan> {
    let (buckets, distance) = (config.rel_pos_num_buckets, config.rel_pos_max_distance);
    let least = if causal { 2 } else { 4 };
    ensure!(
        (least..=WIDEST).contains(&buckets),
        Error::option("rel_pos_num_buckets", format_args!("expected at least {least}, got {buckets}"))
    );
    ensure!(
        buckets <= distance,
        Error::option(
            "rel_pos_num_buckets",
            format_args!("expected at most `rel_pos_max_distance` ({distance}), got {buckets}")
        )
    );
    let scale = (config.attn.dim_head as f64).sqrt();
    Ok(T5Plan { heads: config.heads, scale, buckets, max_distance: distance, causal })
}

/// Returns the plans of token shift, one per sublayer.
pub(super) fn shifts(config: &AttentionLayersConfig, layers: usize, causal: bool) -> Result<Vec<Option<Vec<isize>>>> {
    let amounts = match &config.shift_tokens {
        ShiftTokens::All(amount) => vec![*amount; layers],
        ShiftTokens::Each(amounts) => {
            ensure!(
                amounts.len() == layers,
                Error::option(
                    "shift_tokens",
                    format_args!("expected {layers} numbers, one per sublayer, got {}", amounts.len())
                )
            );
            amounts.clone()
        }
    };
    let most = if causal { config.dim - 1 } else { (config.dim - 1) / 2 };
    let plan = |amount: usize| {
        ensure!(
            amount <= most,
            Error::option(
                "shift_tokens",
                format_args!("expected at most {most} (each shift takes at least one feature), got {amount}")
            )
        );
        let amount = amount as isize;
        Ok((amount > 0).then(|| (if causal { 0 } else { -amount }..=amount).collect_vec()))
    };
    amounts.into_iter().map(plan).try_collect_vec()
}

/// Returns the plan of cross-attention; self-attention adds causality, positions and its own chain of scores.
fn attention(config: &AttentionLayersConfig) -> Result<AttentionPlan> {
    let attn = &config.attn;
    let kv_heads = attn.kv_heads.unwrap_or(config.heads);
    let plan = AttentionPlan {
        kv_heads,
        qkv_bias: attn.qkv_bias,
        out_bias: attn.out_bias,
        window: Window { max_attend_past: attn.max_attend_past },
        num_mem_kv: attn.num_mem_kv,
        talking_heads: if attn.talking_heads { TalkingHeads::Matrices } else { TalkingHeads::None },
        sparse_topk: attn.sparse_topk,
        normalize: if attn.use_entmax15 { Normalize::Entmax15 } else { Normalize::Softmax },
        dropout: attn.dropout,
        head_scale: attn.head_scale,
        gate_values: if attn.gate_values { ValueGate::Biased } else { ValueGate::None },
        on_attn: attn.on_attn,
        zero_init: attn.zero_init_output || config.zero_init_branch_output,
        ..AttentionPlan::new(config.dim, config.heads, attn.dim_head)
    };
    plan.check()?;
    let shared = shared_width(attn, attn.dim_head * config.heads)?;
    let plan = AttentionPlan { shared, temperature: temperature(config)?, ..plan };
    plan.check()?;
    Ok(plan)
}

/// Returns the shared width of collaborative heads: `⌊compression · heads · dim_head⌋`.
fn shared_width(attn: &AttentionConfig, width: usize) -> Result<Option<usize>> {
    let compression = attn.collab_compression;
    if !attn.collab_heads {
        let changed = compression != AttentionConfig::default().collab_compression;
        without("attn_collab_compression", changed, "attn_collab_heads")?;
        return Ok(None);
    }
    let shared = compression * width as f64;
    // Written so that NaN is rejected.
    ensure!(
        (1.0..=WIDEST as f64).contains(&shared),
        Error::option(
            "attn_collab_compression",
            format_args!("expected a factor that leaves at least one of {width} features, got {compression}")
        )
    );
    Ok(Some(shared as usize))
}

fn temperature(config: &AttentionLayersConfig) -> Result<Temperature> {
    let attn = &config.attn;
    without(
        "qk_norm_attn_seq_len",
        config.qk_norm_attn_seq_len.is_some() && !config.use_qk_norm_attn,
        "use_qk_norm_attn",
    )?;
    without("attn_scale_init_value", attn.scale_init_value.is_some() && !attn.qk_norm, "attn_qk_norm")?;
    ensure!(
        !(attn.scale_init_value.is_some() && config.use_qk_norm_attn),
        Error::option(
            "attn_scale_init_value",
            "cannot be used with `use_qk_norm_attn`; set `qk_norm_attn_seq_len` instead"
        )
    );
    if let Some(length) = config.qk_norm_attn_seq_len {
        ensure!(length >= 2, Error::option("qk_norm_attn_seq_len", format_args!("expected at least 2, got {length}")));
        let length = length as f64;
        return Ok(Temperature::Learned(-(length * length - length).log2().ln()));
    }
    if !(attn.qk_norm || config.use_qk_norm_attn) {
        return Ok(Temperature::Fixed((attn.dim_head as f64).powf(-0.5)));
    }
    let start = attn.scale_init_value.unwrap_or(-3.0);
    ensure!(
        start.is_finite(),
        Error::option("attn_scale_init_value", format_args!("expected a finite number, got {start}"))
    );
    Ok(Temperature::Learned(start))
}

/// Returns the factor on the logits of rotated queries and keys.
fn rotated_temperature(temperature: Temperature, rotary: Option<&RotaryPlan>) -> Result<Temperature> {
    let factor = rotary.map_or(1.0, RotaryPlan::score_factor);
    match temperature {
        Temperature::Fixed(scale) => Ok(Temperature::Fixed(scale * factor)),
        Temperature::Learned(_) if factor != 1.0 => Err(Error::option(
            "rotary_yarn_scaling",
            "cannot be used with normalized queries and keys (`attn_qk_norm`, `use_qk_norm_attn`)",
        )),
        learned => Ok(learned),
    }
}

/// Returns the plan of a feedforward from `dim` to `dim_out` features.
pub(super) fn feedforward(
    dim: usize,
    dim_out: usize,
    config: &FeedForwardConfig,
    zero_init: bool,
) -> Result<FeedForwardPlan> {
    let inner = dim as f64 * config.mult;
    // Written so that NaN is rejected.
    ensure!(
        (1.0..=WIDEST as f64).contains(&inner),
        Error::option(
            "ff_mult",
            format_args!("expected a factor that gives 1 to {WIDEST} inner features, got {}", config.mult)
        )
    );
    probability("ff_dropout", config.dropout)?;
    Ok(FeedForwardPlan {
        dim_out,
        activation: config.activation,
        glu: config.glu,
        bias: [!config.no_bias; 2],
        norm: config.post_act_ln.then_some(NormPlan::LAYER),
        dropout: config.dropout,
        zero_init: config.zero_init_output || zero_init,
        ..FeedForwardPlan::new(dim, inner as usize)
    })
}
