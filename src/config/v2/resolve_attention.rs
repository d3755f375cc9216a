//! Options of attention and feedforward to their plans.

use super::{
    AttentionConfig, AttentionLayersConfig, FeedForwardConfig, LayersKind, PerLayer, json::inherited, resolve::rotary,
};
use crate::{
    Error, Result,
    collect::CollectVec,
    config::{
        AttentionPlan, CopePlan, FeedForwardPlan, Forget, GateForm, NormPlan, Normalize, PaddingPlan, QkNormPlan,
        RotaryPlan, ScoreResidual, TalkingHeads, Temperature, ValueGate, ValueResidual,
        options::FeedForwardConfig as Widths, ranges::at_least_one, resolve::feedforward,
    },
    error::ensure,
    ops::{Activation, Window},
};

impl AttentionLayersConfig {
    /// Returns the features per head that positions are resolved for: those of the first self-attention.
    pub(super) fn dim_head(&self) -> usize {
        match &self.attn {
            PerLayer::All(all) => all.dim_head,
            PerLayer::Each(each) => each.first().map_or(AttentionConfig::default().dim_head, |first| first.dim_head),
        }
    }
}

/// Returns the options of each of `count` sublayers.
fn each<T: Clone>(options: &PerLayer<T>, count: usize, kind: &str) -> Result<Vec<T>> {
    match options {
        PerLayer::All(all) => Ok(vec![all.clone(); count]),
        PerLayer::Each(each) => {
            ensure!(
                each.len() == count,
                Error::option(kind, format_args!("arrays have {} values, and there are {count} sublayers", each.len()))
            );
            Ok(each.clone())
        }
    }
}

/// Returns the plans of all self-attentions and all cross-attentions.
pub(super) fn attentions(
    config: &AttentionLayersConfig,
    causal: bool,
    [own, cross]: [usize; 2],
) -> Result<[Vec<AttentionPlan>; 2]> {
    let inherited = PerLayer::All(inherited(&config.attn));
    let cross_options = config.cross_attn.as_ref().unwrap_or(&inherited);
    let own_options = if own == 0 { Vec::new() } else { each(&config.attn, own, "attn_*")? };
    let cross_options = if cross == 0 { Vec::new() } else { each(cross_options, cross, "cross_attn_*")? };
    ensure!(own > 0 || !config.residual_attn, Error::option("residual_attn", "needs self-attention"));
    ensure!(cross > 0 || !config.cross_residual_attn, Error::option("cross_residual_attn", "needs cross-attention"));
    ensure!(
        own > 0 || matches!(config.attn, PerLayer::All(_)),
        Error::option("attn_*", "arrays have a value for each self-attention, and there is none")
    );
    let rotary = rotary(config, causal)?;
    let residual = |on: bool| if on { ScoreResidual::Masked } else { ScoreResidual::None };
    let own = own_options.iter().enumerate().map(|(index, options)| {
        let value_residual = match (config.add_value_residual, config.learned_value_residual_mix && index > 0) {
            (false, _) => ValueResidual::None,
            (true, false) => ValueResidual::Half,
            (true, true) => ValueResidual::Learned,
        };
        ensure!(
            !options.learned_value_residual_mix,
            Error::option(
                "attn_learned_value_residual_mix",
                "is set by `learned_value_residual_mix`, like in x-transformers; only `cross_attn_` takes it"
            )
        );
        let plan = attention(config, options, rotary.as_ref(), "attn_")?;
        ensure!(
            !options.inverted_attention,
            Error::option("attn_inverted_attention", "is for cross-attention: only `cross_attn_` takes it")
        );
        let causal = causal && config.kind != LayersKind::PrefixDecoder;
        let rotated_heads = plan.rotated_heads.or(config.rotate_num_heads);
        let all = rotated_heads.is_none_or(|rotated| rotated == plan.heads);
        ensure!(
            all || rotated_heads.is_some_and(|rotated| (1..plan.heads).contains(&rotated))
                && plan.kv_heads == plan.heads,
            Error::option("rotate_num_heads", "expected 1 to `heads`, and as many key heads as heads")
        );
        let rotated_heads = rotated_heads.filter(|_| !all);
        let own_bias = plan.forget != Forget::None;
        ensure!(
            !(own_bias && (config.alibi_pos_bias || config.rel_pos_bias || config.dynamic_pos_bias)),
            Error::option("attn_data_dependent_alibi", "cannot be used with a position bias")
        );
        let polar = config.polar_pos_emb;
        ensure!(
            !polar
                || (plan.kv_heads == plan.heads || plan.kv_heads == 1)
                    && plan.num_mem_kv == 0
                    && plan.dim_head == config.dim_head(),
            Error::option(
                "polar_pos_emb",
                "cannot be used with memory key/values, fewer key heads or heads of several widths, like x-transformers"
            )
        );
        let residual = residual(config.residual_attn);
        checked(AttentionPlan { causal, residual, value_residual, polar, rotated_heads, ..plan })
    });
    let own = own.try_collect_vec()?;
    let cross = cross_options.iter().map(|options| {
        ensure!(
            config.add_value_residual || !options.learned_value_residual_mix,
            Error::option("cross_attn_learned_value_residual_mix", "needs `add_value_residual` = true, which is off")
        );
        let value_residual = match (config.add_value_residual, options.learned_value_residual_mix) {
            (false, _) => ValueResidual::None,
            (true, false) => ValueResidual::Half,
            (true, true) => ValueResidual::Learned,
        };
        let plan = attention(config, options, rotary.as_ref(), "cross_attn_")?;
        ensure!(
            plan.forget == Forget::None,
            Error::option("cross_attn_data_dependent_alibi", "is for self-attention: set it to false")
        );
        let dim_context = options.dim_context.unwrap_or(config.dim);
        let residual = residual(config.cross_residual_attn);
        checked(AttentionPlan { dim_context, residual, value_residual, ..plan })
    });
    Ok([own, cross.try_collect_vec()?])
}

fn checked(plan: AttentionPlan) -> Result<AttentionPlan> {
    ensure!(
        plan.causal || !plan.selective,
        Error::option(
            "attn_selective",
            "is for causal attention: `kind` is not Decoder, or the attention is cross-attention"
        )
    );
    ensure!(
        !(plan.sink && plan.residual != ScoreResidual::None),
        Error::option("attn_head_learned_sink", "cannot be used with residual attention, whose scores have no sink")
    );
    ensure!(
        plan.causal || plan.cope.is_none() && !matches!(plan.forget, Forget::Rows(_)),
        Error::option("attn_use_cope", "and `attn_data_dependent_alibi_per_row` are for causal self-attention")
    );
    ensure!(
        plan.num_mem_kv == 0 || plan.rel_proj.is_none(),
        Error::option("attn_use_rel_proj_pos_bias", "cannot be used with `attn_num_mem_kv`, like in x-transformers")
    );
    ensure!(
        !(plan.polar && plan.cope.is_some()),
        Error::option("attn_use_cope", "cannot be used with `polar_pos_emb`, whose queries have more features")
    );
    plan.check()?;
    Ok(plan)
}

/// Returns the form of a gate.
fn gate_form(rank: Option<usize>, headwise: bool, silu: bool, key: &str) -> Result<GateForm> {
    ensure!(rank != Some(0), Error::option(key, "expected a rank of at least 1, got 0"));
    ensure!(!(headwise && rank.is_some()), Error::option(key, "a gate with one number per head has no rank"));
    Ok(GateForm { rank, headwise, silu: silu && rank.is_some() })
}

/// Returns the plan of one attention from its own options.
pub(super) fn attention(
    config: &AttentionLayersConfig,
    options: &AttentionConfig,
    rotary: Option<&RotaryPlan>,
    prefix: &str,
) -> Result<AttentionPlan> {
    let error = |key: &str, why: String| Error::option(format!("{prefix}{key}"), why);
    let (heads, dim_head) = (config.heads, options.dim_head);
    ensure!(
        !(options.one_kv_head && options.kv_heads.is_some()),
        error("kv_heads", "cannot be used with `attn_one_kv_head`".to_string())
    );
    ensure!(
        !(options.qk_rmsnorm && options.k_rmsnorm),
        error("k_rmsnorm", "cannot be used with `attn_qk_rmsnorm`, which norms keys too".to_string())
    );
    ensure!(
        !(options.gumbel_softmax && options.flash),
        error("gumbel_softmax", "cannot be used with `attn_flash`, which leaves it out in x-transformers".to_string())
    );
    let weights = [
        ("sigmoid", options.sigmoid),
        ("hard", options.hard),
        ("gumbel_softmax", options.gumbel_softmax),
        ("l2_distance", options.l2_distance),
        ("sparse_topk", options.sparse_topk.is_some()),
    ];
    let mut weights = weights.into_iter().filter(|(_, on)| *on);
    if let (Some((first, _)), Some((second, _))) = (weights.next(), weights.next()) {
        return Err(error(first, format!("cannot be used with `attn_{second}`")));
    }
    ensure!(
        options.gate_values || options.output_gate || !options.swiglu_values,
        error("swiglu_values", "needs `attn_gate_values` = true, which is off".to_string())
    );
    for (key, on, width) in [
        ("dim_latent_q", options.use_latent_q, options.dim_latent_q),
        ("dim_latent_kv", options.use_latent_kv, options.dim_latent_kv),
    ] {
        ensure!(!on || width.is_some(), error(key, "is missing: the width of the latent vectors".to_string()));
        at_least_one(key, width.unwrap_or(1))?;
    }
    let latent_rope = options.latent_rope_subheads.unwrap_or(0);
    let inverted = options.inverted_attention;
    ensure!(
        !inverted
            || !(options.hard || options.gumbel_softmax || options.sparse_topk.is_some() || options.head_learned_sink),
        error("inverted_attention", "cannot be used with hard, noisy, top-k or sink attention".to_string())
    );
    for (key, size) in [
        ("rel_proj_num_distance_basis", options.rel_proj_num_distance_basis),
        ("rel_proj_max_dist", options.rel_proj_max_dist),
        ("cope_max_pos", options.cope_max_pos),
        ("data_dependent_alibi_per_row_dim_head", options.data_dependent_alibi_per_row_dim_head),
    ] {
        at_least_one(key, size)?;
    }
    let scale = (dim_head as f64).powf(-0.5);
    let qk_norm =
        options.qk_norm.then_some(QkNormPlan { groups: options.qk_norm_groups, scales: options.qk_norm_dim_scale });
    if let Some(norm) = qk_norm {
        let groups = norm.groups;
        ensure!(
            groups > 0 && dim_head.is_multiple_of(groups) && dim_head / groups > 2,
            error(
                "qk_norm_groups",
                format!("expected a divisor of {dim_head} with parts of more than 2, got {groups}")
            )
        );
    }
    for (key, on, bound) in [
        ("logit_softclamp_value", options.softclamp_logits, options.logit_softclamp_value),
        ("laser_softclamp_value", options.laser, options.laser_softclamp_value),
        ("gumbel_softmax_temp", options.gumbel_softmax, options.gumbel_softmax_temp),
    ] {
        ensure!(
            !on || bound > 0.0 && bound.is_finite(),
            error(key, format!("expected a finite number above 0, got {bound}"))
        );
    }
    let kv_heads = if options.one_kv_head { 1 } else { options.kv_heads.unwrap_or(heads) };
    ensure!(
        !options.value_rmsnorm || kv_heads == heads,
        error("value_rmsnorm", "needs as many key/value heads as heads".to_string())
    );
    ensure!(
        latent_rope == 0 || options.use_latent_kv && latent_rope < kv_heads && kv_heads == heads,
        error("latent_rope_subheads", "needs `attn_use_latent_kv`, and more key heads, one for each head".to_string())
    );
    let dim_value = options.value_dim_head.unwrap_or(dim_head);
    ensure!(
        dim_value == dim_head || !(options.value_rmsnorm || options.num_mem_kv > 0),
        error("value_dim_head", "cannot be used with `attn_num_mem_kv` or `attn_value_rmsnorm`".to_string())
    );
    let talks = [options.pre_talking_heads, options.post_talking_heads];
    let temperature = if options.qk_norm && !options.qk_norm_dim_scale { options.qk_norm_scale } else { scale };
    Ok(AttentionPlan {
        kv_heads,
        kv_interleaved: true,
        out_bias: false,
        project_out: heads > 1 || options.on_attn,
        dim_value,
        window: Window { max_attend_past: options.max_attend_past },
        padding: if options.flash { PaddingPlan::OutputCausal } else { PaddingPlan::Output },
        temperature: Temperature::Fixed(temperature),
        qk_norm,
        rms_norms: [options.qk_rmsnorm, options.qk_rmsnorm || options.k_rmsnorm, options.value_rmsnorm],
        rotary: rotary.cloned(),
        num_mem_kv: options.num_mem_kv,
        zero_kv: options.add_zero_kv,
        mem_kv_counted: false,
        talking_heads: if talks == [false; 2] { TalkingHeads::None } else { TalkingHeads::Convolutions(talks) },
        softclamp: options.softclamp_logits.then_some(options.logit_softclamp_value),
        sink: options.head_learned_sink,
        sparse_topk: options.sparse_topk,
        straight_through: options.sparse_topk_straight_through,
        gumbel: options.gumbel_softmax.then_some(options.gumbel_softmax_temp),
        normalize: match (options.hard || options.gumbel_softmax && options.gumbel_softmax_hard, options.sigmoid) {
            (true, _) => Normalize::Hard,
            (_, true) => Normalize::Sigmoid,
            _ => Normalize::Softmax,
        },
        l2_distance: options.l2_distance,
        cog_signed: options.cog_signed,
        selective: options.selective,
        dropout: options.dropout,
        sublayer_dropout: options.sublayer_dropout,
        laser: options.laser.then_some(options.laser_softclamp_value),
        head_scale: options.head_scale,
        gate_heads: options.gate_value_heads,
        gate_values: match (options.gate_values, options.swiglu_values) {
            (false, _) => ValueGate::None,
            (true, false) => ValueGate::Sigmoid,
            (true, true) => ValueGate::Silu,
        },
        silu_gates: options.swiglu_values,
        gate_form: gate_form(
            options.gate_values_rank,
            options.gate_values_headwise,
            options.low_rank_silu_gates,
            "attn_gate_values_rank",
        )?,
        output_gate: match options.output_gate {
            false => None,
            true => Some(gate_form(
                options.output_gate_rank,
                options.output_gate_headwise,
                options.low_rank_silu_gates,
                "attn_output_gate_rank",
            )?),
        },
        latent_q: options.dim_latent_q.filter(|_| options.use_latent_q),
        latent_kv: options.dim_latent_kv.filter(|_| options.use_latent_kv),
        latent_rope,
        rotated_heads: options.latent_rope_subheads,
        pre_scale: options.pre_scale_post_talking_heads,
        inverted,
        forget: match (options.data_dependent_alibi, options.data_dependent_alibi_per_row) {
            (false, _) => Forget::None,
            (true, false) => Forget::Tokens,
            (true, true) => Forget::Rows(options.data_dependent_alibi_per_row_dim_head),
        },
        rel_proj: options
            .use_rel_proj_pos_bias
            .then_some([options.rel_proj_num_distance_basis, options.rel_proj_max_dist]),
        cope: options
            .use_cope
            .then_some(CopePlan { positions: options.cope_max_pos, talking: options.cope_talking_heads }),
        on_attn: options.on_attn,
        zero_init: options.zero_init_output || config.zero_init_branch_output,
        ..AttentionPlan::new(config.dim, heads, dim_head)
    })
}

/// Name of an activation.
const TANH: &str = "tanh";

/// Returns the plans of all feedforwards.
pub(super) fn feedforwards(config: &AttentionLayersConfig, count: usize) -> Result<Vec<FeedForwardPlan>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let plan = |options: &FeedForwardConfig| {
        let dim_out = options.dim_out.unwrap_or(config.dim);
        ensure!(
            dim_out == config.dim,
            Error::option(
                "ff_dim_out",
                format_args!("expected {}, `dim`: the output is added to the input, got {dim_out}", config.dim)
            )
        );
        let other = options.custom_activation.is_some() || options.relu_squared;
        ensure!(!(options.solu && other), Error::option("ff_solu", "cannot be used with another activation"));
        ensure!(
            !(options.glu && options.glu_softclamp && (other || options.solu)),
            Error::option("ff_glu_softclamp", "needs GELU or SiLU")
        );
        let (gate, up) = (options.glu_gate_softclamp_value, options.glu_up_softclamp_value);
        let bounds = [options.softclamp_value.unwrap_or(1.0), gate, up];
        ensure!(
            bounds.iter().all(|&bound| bound > 0.0 && bound.is_finite()),
            Error::option("ff_softclamp_value", format_args!("and those of gates: expected above 0, got {bounds:?}"))
        );
        let widths = Widths { mult: options.mult, dropout: options.dropout, ..Widths::default() };
        let zero_init = options.zero_init_output || config.zero_init_branch_output;
        let plan = FeedForwardPlan {
            activation: activation(options)?,
            tanh: options.custom_activation.as_deref() == Some(TANH),
            solu: options.solu,
            softclamp: options.softclamp_value.filter(|_| !options.glu),
            glu_softclamp: (options.glu && options.glu_softclamp)
                .then_some([options.glu_gate_softclamp_value, options.glu_up_softclamp_value]),
            glu: options.glu,
            bias: [options.glu || !options.no_bias, !options.no_bias],
            mult_bias: options.glu && options.glu_mult_bias,
            norm: options.post_act_ln.then_some(NormPlan::Gamma { eps: 1e-5, offset: 0.0 }),
            sublayer_dropout: options.sublayer_dropout,
            place: ("ff", if options.post_act_ln { 3 } else { 2 }),
            ..feedforward(config.dim, dim_out, &widths, zero_init)?
        };
        plan.check()?;
        Ok(plan)
    };
    each(&config.ff, count, "ff_*")?.iter().map(plan).try_collect_vec()
}

/// Returns the activation; for tanh, which is none of the fused ones, any.
fn activation(options: &FeedForwardConfig) -> Result<Activation> {
    if options.custom_activation.as_deref() == Some(TANH) {
        return Ok(Activation::Gelu);
    }
    if let Some(name) = &options.custom_activation {
        let found = Activation::ALL.iter().find(|activation| activation.name() == name);
        let names = || Activation::ALL.iter().map(|activation| activation.name()).collect_vec().join(", ");
        let unknown =
            || Error::option("ff_custom_activation", format_args!("expected one of {}, {TANH}, got `{name}`", names()));
        return found.copied().ok_or_else(unknown);
    }
    Ok(match (options.relu_squared, options.swish) {
        (true, _) => Activation::ReluSquared,
        (false, true) => Activation::Silu,
        (false, false) => Activation::Gelu,
    })
}
