//! Every supported option of version 2, moved off its default, changes what a model computes.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Map, Value, json};
use x_transformers::{
    DType, Device, ParamStore, Result, Tape, Tensor,
    config::{Call, Config, ModelPlan},
    models::{Model, RunOptions},
};

const CPU: Device = Device::Cpu;

/// An option, a value, and the options that it needs, of the layers and of the wrapper.
type Row = (&'static str, Value, Value, Value);

fn of_layers() -> Vec<Row> {
    let row = |name, value| (name, value, json!({}), json!({}));
    let with = |name, value, layers| (name, value, layers, json!({}));
    vec![
        row("dim", json!(20)),
        row("depth", json!(3)),
        row("heads", json!(2)),
        with("causal", json!(true), json!({"kind": "TransformerBlock"})),
        row("cross_attend", json!(true)),
        with("only_cross", json!(true), json!({"cross_attend": true})),
        row("only_attn", json!(true)),
        row("use_scalenorm", json!(true)),
        row("use_rmsnorm", json!(true)),
        row("use_simple_rmsnorm", json!(true)),
        row("use_dynamic_tanh", json!(true)),
        row("use_derf", json!(true)),
        with("dynamic_tanh_init_alpha", json!(0.5), json!({"use_dynamic_tanh": true})),
        row("use_adaptive_layernorm", json!(true)),
        row("use_adaptive_rmsnorm", json!(true)),
        row("use_adaptive_layerscale", json!(true)),
        row("norm_add_unit_offset", json!(false)),
        with("dim_condition", json!(6), json!({"use_adaptive_layernorm": true})),
        with("adaptive_condition_mlp", json!(true), json!({"use_adaptive_layernorm": true})),
        with(
            "adaptive_condition_mlp_expansion",
            json!(2),
            json!({"use_adaptive_layernorm": true, "adaptive_condition_mlp": true}),
        ),
        row("alibi_pos_bias", json!(true)),
        with("alibi_num_heads", json!(2), json!({"alibi_pos_bias": true})),
        row("rel_pos_bias", json!(true)),
        with("rel_pos_num_buckets", json!(4), json!({"rel_pos_bias": true})),
        with("rel_pos_max_distance", json!(4), json!({"rel_pos_bias": true, "rel_pos_num_buckets": 4})),
        row("dynamic_pos_bias", json!(true)),
        with("dynamic_pos_bias_log_distance", json!(true), json!({"dynamic_pos_bias": true})),
        with("dynamic_pos_bias_mlp_depth", json!(1), json!({"dynamic_pos_bias": true})),
        with("dynamic_pos_bias_norm", json!(true), json!({"dynamic_pos_bias": true})),
        row("rotary_pos_emb", json!(true)),
        with("rotary_emb_dim", json!(8), json!({"rotary_pos_emb": true})),
        row("rotary_xpos", json!(true)),
        with("rotary_interpolation_factor", json!(3.0), json!({"rotary_pos_emb": true})),
        with("rotary_xpos_scale_base", json!(8.0), json!({"rotary_xpos": true})),
        with("rotary_base_rescale_factor", json!(3.0), json!({"rotary_pos_emb": true})),
        with("rotate_num_heads", json!(1), json!({"rotary_pos_emb": true})),
        row("polar_pos_emb", json!(true)),
        row("weight_tie_layers", json!(true)),
        row("custom_layers", json!(["a", "a", "f"])),
        row("layers_execute_order", json!([0, 1, 2, 3, 0, 1])),
        row("sandwich_coef", json!(1)),
        with("par_ratio", json!(4), json!({"depth": 4})),
        row("residual_attn", json!(true)),
        with("cross_residual_attn", json!(true), json!({"cross_attend": true})),
        row("macaron", json!(true)),
        row("pre_norm", json!(false)),
        row("pre_norm_has_final_norm", json!(false)),
        row("pre_and_post_norm", json!(true)),
        row("gate_residual", json!(true)),
        row("orthog_residual", json!(true)),
        with("attn_aggregated_residuals", json!(true), json!({"attn_aggregated_residual_kwargs": {"lora_rank": 3}})),
        with(
            "attn_aggregated_residual_kwargs",
            json!({"lora_rank": 4}),
            json!({"attn_aggregated_residuals": true, "attn_aggregated_residual_kwargs": {"lora_rank": 3}}),
        ),
        row("mv_split_residual", json!(true)),
        row("scale_residual", json!(true)),
        row("depth_scale_residual", json!(0.5)),
        row("depth_scale_residual", json!(true)),
        row("unet_skips", json!(true)),
        row("integrate_layers", json!(true)),
        with("layer_integrate_use_softmax", json!(false), json!({"integrate_layers": true})),
        row("reinject_input", json!(true)),
        with("learned_reinject_input_gate", json!(true), json!({"reinject_input": true})),
        row("scale_residual_constant", json!(1.5)),
        row("shift_tokens", json!(1)),
        row("sandwich_norm", json!(true)),
        row("softclamp_output", json!(true)),
        with("softclamp_output_value", json!(1.0), json!({"softclamp_output": true})),
        row("zero_init_branch_output", json!(true)),
        row("layer_dropout", json!(1.0)),
        row("disable_abs_pos_emb", json!(true)),
        with("cross_attn_tokens_dropout", json!(0.5), json!({"cross_attend": true})),
        row("use_layerscale", json!(true)),
        with("layerscale_init_value", json!(0.5), json!({"use_layerscale": true})),
        row("num_residual_streams", json!(2)),
        row("add_value_residual", json!(true)),
        with("learned_value_residual_mix", json!(false), json!({"add_value_residual": true})),
    ]
}

fn of_attention() -> Vec<Row> {
    let row = |name, value| (name, value, json!({}), json!({}));
    let with = |name, value, layers| (name, value, layers, json!({}));
    vec![
        row("dim_head", json!(12)),
        with("dim_context", json!(10), json!({"cross_attend": true})),
        row("pre_talking_heads", json!(true)),
        row("post_talking_heads", json!(true)),
        row("head_scale", json!(true)),
        row("sparse_topk", json!(2)),
        row("num_mem_kv", json!(2)),
        row("dropout", json!(0.5)),
        row("sublayer_dropout", json!(0.5)),
        row("on_attn", json!(true)),
        row("gate_value_heads", json!(true)),
        row("gate_values", json!(true)),
        with("swiglu_values", json!(true), json!({"attn_gate_values": true})),
        with("gate_values_rank", json!(3), json!({"attn_gate_values": true})),
        with("gate_values_headwise", json!(true), json!({"attn_gate_values": true})),
        row("output_gate", json!(true)),
        with("output_gate_rank", json!(3), json!({"attn_output_gate": true})),
        with("output_gate_headwise", json!(true), json!({"attn_output_gate": true})),
        with("low_rank_silu_gates", json!(false), json!({"attn_output_gate": true, "attn_output_gate_rank": 3})),
        row("pre_scale_post_talking_heads", json!(true)),
        row("data_dependent_alibi", json!(true)),
        with("data_dependent_alibi_per_row", json!(true), json!({"attn_data_dependent_alibi": true})),
        with(
            "data_dependent_alibi_per_row_dim_head",
            json!(3),
            json!({"attn_data_dependent_alibi": true, "attn_data_dependent_alibi_per_row": true}),
        ),
        row("use_rel_proj_pos_bias", json!(true)),
        with("rel_proj_num_distance_basis", json!(3), json!({"attn_use_rel_proj_pos_bias": true})),
        with("rel_proj_max_dist", json!(3), json!({"attn_use_rel_proj_pos_bias": true})),
        row("use_cope", json!(true)),
        with("cope_max_pos", json!(2), json!({"attn_use_cope": true})),
        with("cope_talking_heads", json!(true), json!({"attn_use_cope": true})),
        with("use_latent_q", json!(true), json!({"attn_dim_latent_q": 6})),
        with("dim_latent_q", json!(5), json!({"attn_use_latent_q": true, "attn_dim_latent_q": 6})),
        with("use_latent_kv", json!(true), json!({"attn_dim_latent_kv": 6})),
        with("dim_latent_kv", json!(5), json!({"attn_use_latent_kv": true, "attn_dim_latent_kv": 6})),
        with(
            "latent_rope_subheads",
            json!(1),
            json!({"attn_use_latent_kv": true, "attn_dim_latent_kv": 6, "rotary_pos_emb": true}),
        ),
        row("zero_init_output", json!(true)),
        row("hard", json!(true)),
        row("gumbel_softmax", json!(true)),
        with(
            "gumbel_softmax_temp",
            json!(0.5),
            json!({"attn_gumbel_softmax": true, "attn_gumbel_softmax_hard": false}),
        ),
        with("gumbel_softmax_hard", json!(false), json!({"attn_gumbel_softmax": true})),
        row("sigmoid", json!(true)),
        row("l2_distance", json!(true)),
        row("cog_signed", json!(true)),
        row("selective", json!(true)),
        row("max_attend_past", json!(1)),
        row("qk_norm", json!(true)),
        with("qk_norm_groups", json!(2), json!({"attn_qk_norm": true})),
        with("qk_norm_scale", json!(3.0), json!({"attn_qk_norm": true})),
        with("qk_norm_dim_scale", json!(true), json!({"attn_qk_norm": true})),
        row("qk_rmsnorm", json!(true)),
        row("k_rmsnorm", json!(true)),
        row("value_rmsnorm", json!(true)),
        row("one_kv_head", json!(true)),
        row("kv_heads", json!(2)),
        row("value_dim_head", json!(12)),
        row("add_zero_kv", json!(true)),
        row("head_learned_sink", json!(true)),
        row("softclamp_logits", json!(true)),
        with("logit_softclamp_value", json!(0.5), json!({"attn_softclamp_logits": true})),
        row("laser", json!(true)),
        with("laser_softclamp_value", json!(0.5), json!({"attn_laser": true})),
    ]
}

fn of_feedforward() -> Vec<Row> {
    let row = |name, value| (name, value, json!({}), json!({}));
    vec![
        row("mult", json!(2.0)),
        row("glu", json!(true)),
        ("glu_mult_bias", json!(true), json!({"ff_glu": true}), json!({})),
        row("swish", json!(true)),
        row("relu_squared", json!(true)),
        row("custom_activation", json!("tanh")),
        row("solu", json!(true)),
        row("softclamp_value", json!(0.1)),
        ("glu_softclamp", json!(true), json!({"ff_glu": true}), json!({})),
        ("glu_gate_softclamp_value", json!(0.1), json!({"ff_glu": true, "ff_glu_softclamp": true}), json!({})),
        ("glu_up_softclamp_value", json!(0.1), json!({"ff_glu": true, "ff_glu_softclamp": true}), json!({})),
        row("post_act_ln", json!(true)),
        row("dropout", json!(0.5)),
        row("sublayer_dropout", json!(0.5)),
        row("no_bias", json!(true)),
        row("zero_init_output", json!(true)),
    ]
}

fn of_wrapper() -> Vec<Row> {
    let row = |name, value| (name, value, json!({}), json!({}));
    let with = |name, value, wrapper| (name, value, json!({}), wrapper);
    let encoder = json!({"kind": "Encoder"});
    vec![
        row("num_tokens", json!(12)),
        row("max_seq_len", json!(0)),
        row("embed_num_tokens", json!({"a": 3})),
        row("emb_dim", json!(8)),
        row("max_mem_len", json!(3)),
        with("shift_mem_down", json!(1), json!({"max_mem_len": 3})),
        row("emb_dropout", json!(0.5)),
        row("post_emb_norm", json!(true)),
        row("num_memory_tokens", json!(2)),
        with("memory_tokens_interspersed_every", json!(3), json!({"num_memory_tokens": 2})),
        row("tie_embedding", json!(true)),
        with("tie_embedding_scale", json!(0.5), json!({"tie_embedding": true})),
        row("logits_dim", json!(5)),
        row("return_only_embed", json!(true)),
        row("num_output_heads", json!(2)),
        row("use_abs_pos_emb", json!(false)),
        row("scaled_sinu_pos_emb", json!(true)),
        row("l2norm_embed", json!(true)),
        row("average_pool_embed", json!(true)),
        row("use_cls_token", json!(true)),
        with("num_cls_tokens", json!(2), json!({"use_cls_token": true})),
        ("attn_pool", json!(true), encoder.clone(), json!({})),
        ("num_pooled_tokens", json!(2), encoder.clone(), json!({"attn_pool": true})),
        ("attn_pool_depth", json!(2), encoder.clone(), json!({"attn_pool": true})),
        ("dim_pooled_tokens", json!(12), encoder, json!({"attn_pool": true})),
        with("squeeze_out_last_dim", json!(true), json!({"logits_dim": 1})),
        row("recycling", json!(true)),
        with("train_max_recycle_steps", json!(1), json!({"recycling": true, "train_max_recycle_steps": 50})),
        ("looped", json!(true), json!({"pre_and_post_norm": true}), json!({})),
        ("max_looped_steps", json!(2), json!({"pre_and_post_norm": true}), json!({"looped": true})),
        row("mixture_of_softmax", json!(true)),
        with("mixture_of_softmax_k", json!(2), json!({"mixture_of_softmax": true})),
        row("sigsoftmax_logits", json!(true)),
    ]
}

/// Options that act only on gradients or losses, or where masks and causality together leave no key, or in
/// cross-attention; and `dim_out`, which has one value.
const ELSEWHERE: [&str; 7] = [
    "dim_out",
    "add_continuous_pred_head",
    "emb_frac_gradient",
    "sparse_topk_straight_through",
    "flash",
    "learned_value_residual_mix",
    "inverted_attention",
];

fn extend(into: &mut Value, more: &Value) {
    let more: Map<String, Value> = more.as_object().unwrap().clone();
    into.as_object_mut().unwrap().extend(more);
}

fn config(layers: &Value, wrapper: &Value) -> Value {
    let mut config = json!({"version": "2", "model": "TransformerWrapper", "num_tokens": 9, "max_seq_len": 8,
        "attn_layers": {"kind": "Decoder", "dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "ff_mult": 1}});
    extend(&mut config, wrapper);
    extend(&mut config["attn_layers"], layers);
    config
}

fn wave(shape: &[usize], step: usize) -> Result<Tensor> {
    Tensor::generate(shape, DType::F64, &CPU, |index| ((index * 7 + step) as f64).sin())
}

/// Returns the outputs of a model with its initial weights, or with those of another that have its names and shapes.
fn outputs(config: &Value, of: Option<&Value>) -> Result<BTreeMap<String, Tensor>> {
    let build = |value: &Value| {
        let config = Config::from_value(value.clone())?;
        let model = Model::new(&config, &ParamStore::new(1, DType::F64, &CPU))?;
        Ok((config, model))
    };
    let (parsed, model) = build(config)?;
    if let Some(of) = of {
        let other = build(of)?.1;
        for (index, (name, param)) in model.params().unique().enumerate() {
            let own = param.tensor().detach();
            let value = match other.params().get(name).map(|other| other.tensor().detach()) {
                Some(value) if value.shape() == own.shape() => value,
                _ => own,
            };
            param.set(value.add(&wave(value.shape(), index)?.affine(0.1, 0.0)?)?)?;
        }
    }
    let ModelPlan::Transformer(plan) = parsed.plan()? else { panic!("{config}") };
    let tokens = Tensor::from_vec(vec![1i64, 5, 3, 8, 2, 7, 4, 0, 6, 1, 3, 5], [2, 6], &CPU)?;
    let mut inputs = BTreeMap::from([("x".to_string(), tokens.clone())]);
    if plan.layers.cross_attend {
        let attention = plan.layers.layers.iter().filter_map(|layer| layer.branch.attention());
        let width = attention.map(|attention| attention.dim_context).find(|&width| width != plan.layers.dim);
        inputs.insert("context".to_string(), wave(&[2, 5, width.unwrap_or(plan.layers.dim)], 3)?);
    }
    if let Some(condition) = plan.layers.condition {
        inputs.insert("condition".to_string(), wave(&[2, condition.dim], 4)?);
    }
    for (name, count) in &plan.embeds {
        let ids = Tensor::from_vec((0..12i64).map(|i| i % *count as i64).collect(), [2, 6], &CPU)?;
        inputs.insert(format!("embed_ids.{name}"), ids);
    }
    let mut call = Call::default();
    if config["max_mem_len"].is_u64() {
        call.return_mems = true;
        for index in 0..plan.layers.self_attentions() {
            inputs.insert(format!("mems.{index}"), wave(&[2, 3, plan.layers.dim], 20 + index)?);
        }
    }
    let _tape = Tape::train(5);
    model.run(&inputs, &call, &RunOptions::default())
}

fn differs(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) -> Result<bool> {
    if !a.keys().eq(b.keys()) {
        return Ok(true);
    }
    for (name, a) in a {
        let b = &b[name];
        if a.shape() != b.shape() {
            return Ok(true);
        }
        let (a, b) = (a.to_f64_vec()?, b.to_f64_vec()?);
        if a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-9) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn every_option_changes_an_output() -> Result<()> {
    let groups = [("", of_layers()), ("attn_", of_attention()), ("ff_", of_feedforward()), ("wrapper", of_wrapper())];
    for (prefix, rows) in &groups {
        for (name, value, layers, wrapper) in rows {
            let (mut own_layers, mut own_wrapper) = (layers.clone(), wrapper.clone());
            match *prefix {
                "wrapper" => own_wrapper[*name] = value.clone(),
                prefix => own_layers[format!("{prefix}{name}")] = value.clone(),
            }
            let (base, changed) = (config(layers, wrapper), config(&own_layers, &own_wrapper));
            let fresh = differs(&outputs(&base, None)?, &outputs(&changed, None)?)?;
            let changes = fresh || differs(&outputs(&base, Some(&base))?, &outputs(&changed, Some(&base))?)?;
            assert!(changes, "{prefix} {name} = {value} changes nothing");
        }
    }
    let other = Config::from_value(config(&json!({"ff_dim_out": 12}), &json!({})))?.plan().unwrap_err().to_string();
    assert!(other.contains("`ff_dim_out`") && other.contains("expected 16") && other.contains("got 12"), "{other}");
    // No option is left out.
    let path = |file: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("src/config/v2").join(file);
    let read = |file: &str, class: &str| {
        let text = fs::read_to_string(path(file)).unwrap();
        let start = text.find(&format!("pub struct {class} {{")).unwrap();
        let body = text[start..].lines().skip(1).take_while(|line| !line.starts_with("    }")).map(str::trim);
        let names = body.filter(|line| !line.starts_with("///") && line.contains(" = "));
        names.map(|line| line.split(':').next().unwrap().to_string()).collect::<Vec<_>>()
    };
    for ((_, rows), (file, class)) in groups.iter().zip([
        ("layers.rs", "AttentionLayersConfig"),
        ("layers.rs", "AttentionConfig"),
        ("layers.rs", "FeedForwardConfig"),
        ("wrappers.rs", "TransformerWrapperConfig"),
    ]) {
        for name in read(file, class) {
            let known = ELSEWHERE.contains(&name.as_str()) || rows.iter().any(|row| row.0 == name);
            assert!(known, "{class}: no row for {name}");
        }
    }
    Ok(())
}

/// Options that act on scores by themselves leave attention fused; the others say why not.
#[test]
fn what_acts_on_scores_runs_fused() -> Result<()> {
    let plan = |layers: Value| -> Result<String> {
        let ModelPlan::Transformer(plan) = Config::from_value(config(&layers, &json!({})))?.plan()? else {
            panic!("{layers}")
        };
        Ok(plan.layers.to_string())
    };
    for layers in [
        json!({"attn_softclamp_logits": true}),
        json!({"attn_head_learned_sink": true, "attn_kv_heads": 2}),
        json!({"attn_add_zero_kv": true, "attn_num_mem_kv": 2}),
        json!({"attn_softclamp_logits": true, "attn_head_learned_sink": true, "attn_add_zero_kv": true}),
    ] {
        let text = plan(layers.clone())?;
        assert!(text.contains("; fused") && !text.contains("explicit"), "{layers}: {text}");
    }
    for bias in ["alibi_pos_bias", "rel_pos_bias", "dynamic_pos_bias"] {
        let text = plan(json!({bias: true, "attn_num_mem_kv": 2}))?;
        assert!(text.contains("; fused") && text.contains("position bias: "), "{bias}: {text}");
    }
    let text = plan(json!({"attn_head_learned_sink": true, "attn_cog_signed": true}))?;
    assert!(text.contains("explicit: weights have the signs"), "{text}");
    Ok(())
}

/// Training leaves half of the context's tokens out, each as often as any other; a mask's padding counts for none.
#[test]
fn tokens_of_the_context_are_left_out_in_training() -> Result<()> {
    let config = config(&json!({"cross_attend": true, "depth": 1, "cross_attn_tokens_dropout": 0.5}), &json!({}));
    let model = Model::new(&Config::from_value(config)?, &ParamStore::new(1, DType::F64, &CPU))?;
    let x = Tensor::from_vec((0..6i64).collect::<Vec<_>>(), [1, 6], &CPU)?;
    let mut inputs = BTreeMap::from([("x".to_string(), x), ("context".to_string(), wave(&[1, 8, 16], 3)?)]);
    let call = Call { return_attn: true, ..Call::default() };
    let seen = |inputs: &BTreeMap<String, Tensor>| -> Result<Vec<bool>> {
        let weights = model.run(inputs, &call, &RunOptions::default())?["attn.1"].to_f64_vec()?;
        // The same tokens for all heads and queries.
        let seen = |row: &[f64]| row.iter().map(|&weight| weight > 0.0).collect::<Vec<_>>();
        assert!(weights.chunks(8).all(|row| seen(row) == seen(&weights[..8])));
        Ok(seen(&weights[..8]))
    };
    let kept = |seen: &[bool]| seen.iter().filter(|&&seen| seen).count();
    let mut counts = [0; 8];
    for seed in 0..64 {
        let _tape = Tape::train(seed);
        let seen = seen(&inputs)?;
        assert_eq!(kept(&seen), 4);
        counts.iter_mut().zip(seen).for_each(|(count, seen)| *count += usize::from(seen));
    }
    // Four standard deviations around 32.
    assert!(counts.iter().all(|count| (16..=48).contains(count)), "{counts:?}");
    assert_eq!(kept(&seen(&inputs)?), 8);
    let mask = Tensor::from_vec((0..8).map(|at| at < 5).collect::<Vec<_>>(), [1, 8], &CPU)?;
    inputs.insert("context_mask".to_string(), mask);
    let _tape = Tape::train(1);
    let seen = seen(&inputs)?;
    assert!(kept(&seen) == 3 && kept(&seen[5..]) == 0, "{seen:?}");
    Ok(())
}
