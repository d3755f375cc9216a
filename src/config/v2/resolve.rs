//! Options of attention layers to their plan.

use super::{
    AttentionLayersConfig, LayersKind, SwitchOrFactor,
    resolve_attention::{attentions, feedforwards},
};
use crate::{
    Error, Result,
    collect::CollectVec,
    config::{
        AlibiPlan, AttentionPlan, BranchPlan, ConditionPlan, DropPlan, DynamicPlan, FeedForwardPlan, Gain, HyperPlan,
        LayerPlan, LayerScalePlan, LayerType, LayersPlan, LinkPlan, NormPlan, PolarPlan, PositionBiasPlan, Positions,
        ResidualPlan, RotaryPlan, ShiftTokens, T5Plan, WrapPlan, options,
        order::layer_order,
        ranges::{WIDEST, at_least_one, probability, without},
    },
    error::ensure,
};

pub(super) fn layers(config: &AttentionLayersConfig) -> Result<LayersPlan> {
    use LayerType::{CrossAttention, FeedForward, SelfAttention};
    at_least_one("dim", config.dim)?;
    at_least_one("heads", config.heads)?;
    at_most_one_norm(config)?;
    let block = config.kind == LayersKind::TransformerBlock;
    ensure!(block || !config.causal, Error::option("causal", "is set by the class: only a TransformerBlock takes it"));
    let causal = config.kind == LayersKind::Decoder || config.causal;
    let crosses = config.cross_attend || config.kind == LayersKind::CrossAttender;
    without("only_cross", config.only_cross && !crosses, "cross_attend")?;
    ensure!(
        config.pre_norm || !config.sandwich_norm,
        Error::option("sandwich_norm", "cannot be used with `pre_norm` = false, which puts norms after the sums")
    );
    let types = types(config, crosses)?;
    let modules = match (&config.layers_execute_order, config.weight_tie_layers) {
        (None, false) => (0..types.len()).collect_vec(),
        (None, true) => {
            ensure!(
                config.custom_layers.is_none() && config.par_ratio.is_none() && config.sandwich_coef.is_none(),
                Error::option(
                    "weight_tie_layers",
                    "needs blocks that are alike: no `custom_layers`, `sandwich_coef` or `par_ratio`"
                )
            );
            let block = types.len() / depth(config)?;
            (0..types.len()).map(|index| index % block).collect_vec()
        }
        (Some(_), true) => {
            return Err(Error::option("layers_execute_order", "cannot be used with `weight_tie_layers`"));
        }
        (Some(order), false) => {
            let legal = !order.is_empty() && order.iter().all(|&index| index < types.len());
            ensure!(
                legal,
                Error::option(
                    "layers_execute_order",
                    format_args!("expected indices below the number of sublayers, {}, got {order:?}", types.len())
                )
            );
            order.clone()
        }
    };
    let own_types = if config.weight_tie_layers { &types[..types.len() / depth(config)?] } else { &types[..] };
    let count = |kind: LayerType| own_types.iter().filter(|&&other| other == kind).count();
    let [own, cross] = attentions(config, causal, [count(SelfAttention), count(CrossAttention)])?;
    let forward = feedforwards(config, count(FeedForward))?;
    let norm = norm(config);
    let shifts = shifts(config, own_types.len(), causal)?;
    let condition = condition(config);
    // One sublayer is a block if their order is given.
    let regular = config.custom_layers.is_none() && config.par_ratio.is_none() && config.sandwich_coef.is_none();
    let block_len = if regular { types.len() / depth(config)? } else { 1 };
    let plans = own_types.iter().enumerate().map(|(index, &kind)| {
        let at = own_types[..index].iter().filter(|&&other| other == kind).count();
        let deep = config.depth_scale_residual == SwitchOrFactor::On && !config.attn_aggregated_residuals;
        let output_depth = deep.then_some(index / block_len + 1);
        let branch = match kind {
            SelfAttention => BranchPlan::SelfAttention(AttentionPlan { output_depth, ..own[at].clone() }),
            CrossAttention => BranchPlan::CrossAttention(AttentionPlan { output_depth, ..cross[at].clone() }),
            FeedForward => BranchPlan::FeedForward(FeedForwardPlan { output_depth, ..forward[at].clone() }),
        };
        let norms = [config.pre_norm, config.sandwich_norm, !config.pre_norm || config.pre_and_post_norm];
        let layer_scale = layer_scale(config, condition);
        let half = config.macaron && kind == FeedForward;
        let scale = match (config.depth_scale_residual, config.scale_residual) {
            _ if config.attn_aggregated_residuals => None,
            (SwitchOrFactor::Factor(factor), _) | (_, SwitchOrFactor::Factor(factor)) => Some(factor),
            _ => None,
        };
        let scale = scale.filter(|&factor| factor != 1.0);
        let wrap = WrapPlan { layer_scale, shifts: shifts[index].clone(), half, scale, ..WrapPlan::default() };
        let streams = config.num_residual_streams;
        let residual = ResidualPlan {
            gated: config.gate_residual,
            scaled: config.scale_residual.is_on() && !config.mv_split_residual,
            orthogonal: config.orthog_residual,
            constant: if config.gate_residual || config.mv_split_residual || config.orthog_residual {
                1.0
            } else {
                config.scale_residual_constant
            },
            split: config.mv_split_residual,
            hyper: (streams > 1).then_some(HyperPlan { streams, layer: index }),
        };
        LayerPlan { branch, norms: norms.map(|on| on.then_some(norm)), wrap, residual }
    });
    let plans: Vec<LayerPlan> = plans.collect_vec();
    let links = links(config, own_types, block_len)?;
    check_residual(config)?;
    let final_norm = (config.pre_norm && has_final_norm(config) && !config.pre_and_post_norm).then_some(norm);
    let (positions, layers) = (positions(config, causal)?, modules.iter().map(|&at| plans[at].clone()).collect_vec());
    let idle = plans.into_iter().enumerate().filter(|(index, _)| !modules.contains(index)).collect_vec();
    Ok(LayersPlan {
        dim: config.dim,
        cross_attend: crosses,
        positions,
        layers,
        modules,
        idle,
        links,
        softclamp: config.softclamp_output.then_some(config.softclamp_output_value),
        final_norm,
        owns_final_norm: true,
        norms_memories: true,
        condition,
        streams: config.num_residual_streams,
        prefix: config.kind == LayersKind::PrefixDecoder,
        drops: DropPlan {
            layers: layer_dropout(config, own_types.len())?,
            cross_attn_tokens: tokens_dropout(config.cross_attn_tokens_dropout)?,
        },
    })
}

/// Returns a share of tokens to leave out.
pub(super) fn tokens_dropout(share: f64) -> Result<f64> {
    let some = (0.0..1.0).contains(&share);
    ensure!(
        some,
        Error::option("cross_attn_tokens_dropout", format_args!("expected at least 0 and below 1, got {share}"))
    );
    Ok(share)
}

/// Returns `true` unless the options or the class leave the final norm out.
fn has_final_norm(config: &AttentionLayersConfig) -> bool {
    config.pre_norm_has_final_norm.unwrap_or(config.kind != LayersKind::TransformerBlock)
}

fn depth(config: &AttentionLayersConfig) -> Result<usize> {
    let block = config.kind == LayersKind::TransformerBlock;
    let given = config.depth.or(block.then_some(1)).or(config.custom_layers.is_some().then_some(1));
    given.ok_or_else(|| Error::missing_option("depth"))
}

/// Returns the types of the sublayers in order.
fn types(config: &AttentionLayersConfig, crosses: bool) -> Result<Vec<LayerType>> {
    let kind = match config.kind {
        LayersKind::CrossAttender => options::LayersKind::CrossAttender,
        _ => options::LayersKind::Encoder,
    };
    let order = layer_order(&options::AttentionLayersConfig {
        kind,
        dim: config.dim,
        depth: depth(config)?,
        cross_attend: crosses,
        only_cross: config.only_cross,
        macaron: config.macaron,
        custom_layers: config.custom_layers.clone(),
        par_ratio: config.par_ratio,
        sandwich_coef: config.sandwich_coef,
        ..options::AttentionLayersConfig::default()
    })?;
    let order: Vec<LayerType> =
        order.into_iter().filter(|&kind| !(config.only_attn && kind == LayerType::FeedForward)).collect_vec();
    ensure!(!order.is_empty(), Error::option("only_attn", "leaves no sublayer"));
    ensure!(
        crosses || !order.contains(&LayerType::CrossAttention),
        Error::option("custom_layers", "has a cross-attention `c`, which needs `cross_attend` = true")
    );
    Ok(order)
}

fn at_most_one_norm(config: &AttentionLayersConfig) -> Result<()> {
    let norms = [
        ("use_scalenorm", config.use_scalenorm),
        ("use_rmsnorm", config.use_rmsnorm),
        ("use_simple_rmsnorm", config.use_simple_rmsnorm),
        ("use_dynamic_tanh", config.use_dynamic_tanh),
        ("use_derf", config.use_derf),
        ("use_adaptive_layernorm", config.use_adaptive_layernorm),
        ("use_adaptive_rmsnorm", config.use_adaptive_rmsnorm),
    ];
    let mut on = norms.into_iter().filter(|(_, on)| *on);
    match (on.next(), on.next()) {
        (Some((first, _)), Some((second, _))) => {
            Err(Error::option(second, format_args!("cannot be used with `{first}`: choose one norm")))
        }
        _ => Ok(()),
    }
}

fn norm(config: &AttentionLayersConfig) -> NormPlan {
    let offset = if config.norm_add_unit_offset { 1.0 } else { 0.0 };
    let unit = |gain: Gain| NormPlan::Unit { gain, offset };
    let dim_condition = condition(config).map_or(config.dim, |condition| condition.inner.unwrap_or(condition.dim));
    if config.use_adaptive_layernorm || config.use_adaptive_rmsnorm {
        return NormPlan::Adaptive { layer: config.use_adaptive_layernorm, dim_condition };
    }
    if config.use_dynamic_tanh {
        let (alpha, stored_offset) = (config.dynamic_tanh_init_alpha, config.norm_add_unit_offset);
        return NormPlan::Tanh { alpha, stored_offset };
    }
    if config.use_derf {
        return NormPlan::Erf { offset };
    }
    match (config.use_scalenorm, config.use_rmsnorm, config.use_simple_rmsnorm) {
        (true, ..) => unit(Gain::One),
        (_, true, _) => unit(Gain::Each),
        (.., true) => unit(Gain::None),
        _ => NormPlan::Gamma { eps: 1e-5, offset },
    }
}

/// Returns the condition of adaptive norms and scales, if there are any.
fn condition(config: &AttentionLayersConfig) -> Option<ConditionPlan> {
    let adaptive = [config.use_adaptive_layernorm, config.use_adaptive_rmsnorm, config.use_adaptive_layerscale];
    let dim = config.dim_condition.unwrap_or(config.dim);
    let inner = config.adaptive_condition_mlp.then_some(dim * config.adaptive_condition_mlp_expansion);
    adaptive.contains(&true).then_some(ConditionPlan { dim, inner })
}

fn layer_scale(config: &AttentionLayersConfig, condition: Option<ConditionPlan>) -> Option<LayerScalePlan> {
    let offset = if config.norm_add_unit_offset { 1.0 } else { 0.0 };
    if let (true, Some(condition)) = (config.use_adaptive_layerscale, condition) {
        return Some(LayerScalePlan::Adaptive(condition.inner.unwrap_or(condition.dim)));
    }
    config.use_layerscale.then_some(LayerScalePlan::Fixed { start: config.layerscale_init_value, offset })
}

/// Returns the inputs of sublayers other than the stream.
fn links(config: &AttentionLayersConfig, types: &[LayerType], block: usize) -> Result<LinkPlan> {
    let linked = [
        ("unet_skips", config.unet_skips),
        ("integrate_layers", config.integrate_layers),
        ("attn_aggregated_residuals", config.attn_aggregated_residuals),
        ("reinject_input", config.reinject_input),
    ];
    if let Some((key, _)) = linked.into_iter().find(|(_, on)| *on) {
        let reordered = config.layers_execute_order.is_some() || config.weight_tie_layers;
        ensure!(
            config.num_residual_streams == 1
                && !(reordered && key != "reinject_input" && key != "attn_aggregated_residuals"),
            Error::option(key, "cannot be used with residual streams, tied layers or an order of execution")
        );
    }
    ensure!(
        config.reinject_input || !config.learned_reinject_input_gate,
        Error::option("learned_reinject_input_gate", "needs `reinject_input` = true, which is off")
    );
    ensure!(
        !config.integrate_layers || config.shift_tokens == ShiftTokens::All(0),
        Error::option("integrate_layers", "cannot be used with `shift_tokens`")
    );
    let kwargs = &config.attn_aggregated_residual_kwargs;
    if let Some((key, _)) = kwargs.iter().find(|(key, _)| key != "lora_rank") {
        let why = format_args!("expected `lora_rank`, got `{key}`").to_string();
        return Err(Error::option("attn_aggregated_residual_kwargs", why));
    }
    let rank = kwargs.first().map_or(64, |(_, rank)| *rank);
    let aggregate = config.attn_aggregated_residuals.then_some(rank);
    ensure!(
        aggregate.is_none() || (1..config.dim).contains(&rank),
        Error::option(
            "attn_aggregated_residual_kwargs",
            format_args!("expected a `lora_rank` of at least 1 and below `dim` = {}, got {rank}", config.dim)
        )
    );
    ensure!(
        aggregate.is_none() || !config.integrate_layers,
        Error::option("attn_aggregated_residuals", "cannot be used with `integrate_layers`")
    );
    let mut skips = Vec::new();
    if config.unet_skips {
        let depth = depth(config)?;
        let mut open = (0..depth / block).map(|index| index * block).collect_vec();
        for index in 0..types.len() {
            let joins = index.is_multiple_of(block) && 2 * (index / block) >= depth;
            let none =
                || Error::option("unet_skips", "leaves blocks of the second half without one, like in x-transformers");
            skips.push(if joins { Some(open.pop().ok_or_else(none)?) } else { None });
        }
    }
    Ok(LinkPlan {
        skips,
        aggregate,
        integrate: config.integrate_layers.then_some(config.layer_integrate_use_softmax),
        reinject: config.reinject_input.then_some(config.learned_reinject_input_gate),
    })
}

fn check_residual(config: &AttentionLayersConfig) -> Result<()> {
    at_least_one("num_residual_streams", config.num_residual_streams)?;
    let of_one = [
        ("gate_residual", config.gate_residual),
        ("orthog_residual", config.orthog_residual),
        ("mv_split_residual", config.mv_split_residual),
        ("scale_residual", config.scale_residual.is_on()),
    ];
    let other = of_one.into_iter().find(|(_, on)| *on && config.num_residual_streams > 1);
    if let Some((other, _)) = other {
        return Err(Error::option("num_residual_streams", format_args!("cannot be used with `{other}`")));
    }
    let ways = [
        ("gate_residual", config.gate_residual),
        ("attn_aggregated_residuals", config.attn_aggregated_residuals),
        ("orthog_residual", config.orthog_residual),
        ("mv_split_residual", config.mv_split_residual),
    ];
    let mut ways = ways.into_iter().filter(|(_, on)| *on);
    if let (Some((first, _)), Some((second, _))) = (ways.next(), ways.next()) {
        return Err(Error::option(second, format_args!("cannot be used with `{first}`")));
    }
    ensure!(
        !(config.use_layerscale && config.use_adaptive_layerscale),
        Error::option("use_layerscale", "cannot be used with `use_adaptive_layerscale`")
    );
    let bound = config.softclamp_output_value;
    ensure!(
        bound > 0.0 && bound.is_finite(),
        Error::option("softclamp_output_value", format_args!("expected a finite number above 0, got {bound}"))
    );
    Ok(())
}

/// Returns the plans of token shift, one per sublayer.
fn shifts(config: &AttentionLayersConfig, layers: usize, causal: bool) -> Result<Vec<Option<Vec<isize>>>> {
    let shift_tokens = match &config.shift_tokens {
        ShiftTokens::All(amount) => ShiftTokens::All(*amount),
        ShiftTokens::Each(amounts) => ShiftTokens::Each(amounts.clone()),
    };
    let config = options::AttentionLayersConfig { dim: config.dim, shift_tokens, ..Default::default() };
    crate::config::resolve::shifts(&config, layers, causal)
}

fn positions(config: &AttentionLayersConfig, causal: bool) -> Result<Positions> {
    Ok(Positions {
        rotary: rotary(config, causal)?,
        polar: polar(config)?,
        bias: bias(config, causal)?,
        relative: true,
        disable_absolute: config.disable_abs_pos_emb,
        ..Positions::default()
    })
}

/// Returns the rotation of queries and keys.
pub(super) fn rotary(config: &AttentionLayersConfig, causal: bool) -> Result<Option<RotaryPlan>> {
    if !(config.rotary_pos_emb || config.rotary_xpos) {
        return Ok(None);
    }
    ensure!(causal || !config.rotary_xpos, Error::option("rotary_xpos", "needs a causal model: `kind` = Decoder"));
    let dim_head = config.dim_head();
    let dim = config.rotary_emb_dim.unwrap_or(dim_head / 2);
    let plan = RotaryPlan::plain(dim);
    ensure!(
        dim > 0 && plan.features() <= dim_head,
        Error::option("rotary_emb_dim", format_args!("expected 1 to the features of a head, {dim_head}, got {dim}"))
    );
    let divisor = config.rotary_interpolation_factor;
    ensure!(
        divisor >= 1.0 && divisor.is_finite(),
        Error::option("rotary_interpolation_factor", format_args!("expected a number of at least 1, got {divisor}"))
    );
    let factor = config.rotary_base_rescale_factor;
    ensure!(
        factor > 0.0 && factor.is_finite() && (factor == 1.0 || dim != 2),
        Error::option(
            "rotary_base_rescale_factor",
            format_args!("expected a finite number above 0 and more than 2 features, got {factor} and {dim}")
        )
    );
    let base = if factor == 1.0 { plan.base } else { plan.base * libm::pow(factor, dim as f64 / (dim as f64 - 2.0)) };
    let xpos = config.rotary_xpos.then_some(config.rotary_xpos_scale_base);
    Ok(Some(RotaryPlan { base, position_divisor: divisor, xpos, interleaved: true, ..plan }))
}

/// Returns the polar positions, whose bias is that of all heads.
fn polar(config: &AttentionLayersConfig) -> Result<Option<PolarPlan>> {
    const KEY: &str = "polar_pos_emb";
    ensure!(
        !config.polar_pos_emb || !(config.rotary_pos_emb || config.rotary_xpos),
        Error::option(KEY, "cannot be used with rotary positions")
    );
    Ok(config.polar_pos_emb.then(|| PolarPlan { heads: config.heads, dim: config.dim_head() }))
}

/// Returns the probabilities of leaving out sublayers, none if all are 0.
fn layer_dropout(config: &AttentionLayersConfig, layers: usize) -> Result<Vec<f64>> {
    let given = &config.layer_dropout;
    given.iter().try_for_each(|&p| probability("layer_dropout", p))?;
    ensure!(
        given.len() == 1 || given.len() == layers,
        Error::option("layer_dropout", format_args!("expected one number or {layers}, got {}", given.len()))
    );
    Ok(if given.iter().all(|&p| p == 0.0) { Vec::new() } else { given.clone() })
}

fn bias(config: &AttentionLayersConfig, causal: bool) -> Result<PositionBiasPlan> {
    let heads = config.heads;
    match (config.rel_pos_bias, config.dynamic_pos_bias, config.alibi_pos_bias) {
        (false, false, false) => Ok(PositionBiasPlan::None),
        (true, false, false) => {
            let (buckets, max_distance) = (config.rel_pos_num_buckets, config.rel_pos_max_distance);
            let least = if causal { 2 } else { 4 };
            ensure!(
                (least..=WIDEST).contains(&buckets) && buckets <= max_distance,
                Error::option(
                    "rel_pos_num_buckets",
                    format_args!("expected {least} to `rel_pos_max_distance` = {max_distance}, got {buckets}")
                )
            );
            let scale = (config.dim_head() as f64).sqrt();
            Ok(PositionBiasPlan::T5(T5Plan { heads, scale, buckets, max_distance, causal }))
        }
        (false, true, false) => {
            let depth = config.dynamic_pos_bias_mlp_depth;
            at_least_one("dynamic_pos_bias_mlp_depth", depth)?;
            at_least_one("dim", config.dim / 4)?;
            Ok(PositionBiasPlan::Dynamic(DynamicPlan {
                heads,
                dim: config.dim / 4,
                depth,
                log_distance: config.dynamic_pos_bias_log_distance,
                norm: config.dynamic_pos_bias_norm,
            }))
        }
        (false, false, true) => {
            let sloped = config.alibi_num_heads.unwrap_or(heads);
            ensure!(
                (1..=heads).contains(&sloped),
                Error::option("alibi_num_heads", format_args!("expected 1 to `heads` = {heads}, got {sloped}"))
            );
            Ok(PositionBiasPlan::Alibi(AlibiPlan { heads, sloped, learned: false }))
        }
        _ => Err(Error::option(
            "rel_pos_bias",
            "cannot be used with another position bias: choose one of `rel_pos_bias`, `alibi_pos_bias` and `dynamic_pos_bias`",
        )),
    }
}
