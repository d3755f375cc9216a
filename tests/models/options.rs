//! Every option parses, plans, runs forward and backward, and changes the model; every illegal one is an error.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use x_transformers::{
    DType, Device, Error, ErrorKind, ParamStore, Result, Tape, Tensor,
    config::{AttentionPath, Call, Config},
    models::{Model, RunOptions},
    ops::Activation,
};

/// A small model of this kind with these options of its layers.
fn wrapper(kind: &str, options: &Value) -> Value {
    let mut layers = json!({"kind": kind, "dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, "ff_mult": 1});
    merge(&mut layers, options);
    json!({"model": "TransformerWrapper", "num_tokens": 16, "max_seq_len": 12, "attn_layers": layers})
}

fn merge(into: &mut Value, from: &Value) {
    let empty = Map::new();
    for (key, value) in from.as_object().unwrap_or(&empty) {
        into[key] = value.clone();
    }
}

fn config(value: &Value) -> Result<Config> {
    Config::from_value(value.clone())
}

/// Every option of attention layers that is legal on its own, with the kind that it needs.
fn layer_options() -> Vec<(&'static str, Value)> {
    let decoder = |options: Value| ("Decoder", options);
    let encoder = |options: Value| ("Encoder", options);
    let mut options = vec![
        decoder(json!({"use_scalenorm": true})),
        decoder(json!({"use_rmsnorm": true})),
        decoder(json!({"use_rezero": true})),
        decoder(json!({"alibi_pos_bias": true})),
        decoder(json!({"alibi_pos_emb": true})),
        decoder(json!({"alibi_pos_bias": true, "alibi_num_heads": 3})),
        decoder(json!({"alibi_pos_bias": true, "alibi_learned": true})),
        decoder(json!({"rel_pos_bias": true})),
        encoder(json!({"rel_pos_bias": true, "rel_pos_num_buckets": 8, "rel_pos_max_distance": 16})),
        decoder(json!({"position_infused_attn": true})),
        decoder(json!({"rotary_pos_emb": true, "attn_dim_head": 36})),
        decoder(json!({"rotary_pos_emb": true, "rotary_emb_dim": 34, "attn_dim_head": 36})),
        decoder(json!({"rotary_pos_emb": true, "rotary_qk_only": true, "attn_dim_head": 32})),
        decoder(json!({"custom_layers": ["a", "f", "f", "a"]})),
        decoder(json!({"sandwich_coef": 1})),
        decoder(json!({"par_ratio": 4})),
        decoder(json!({"residual_attn": true})),
        decoder(json!({"macaron": true})),
        decoder(json!({"pre_norm": false})),
        decoder(json!({"gate_residual": true})),
        decoder(json!({"scale_residual": true})),
        decoder(json!({"shift_tokens": 1})),
        encoder(json!({"shift_tokens": [1, 0, 2, 1]})),
        decoder(json!({"sandwich_norm": true})),
        decoder(json!({"use_qk_norm_attn": true})),
        decoder(json!({"use_qk_norm_attn": true, "qk_norm_attn_seq_len": 64})),
        decoder(json!({"attn_qk_norm": true, "attn_scale_init_value": -1.0})),
        decoder(json!({"attn_talking_heads": true})),
        decoder(json!({"attn_head_scale": true})),
        decoder(json!({"attn_collab_heads": true})),
        decoder(json!({"attn_collab_heads": true, "attn_collab_compression": 0.5, "attn_num_mem_kv": 2})),
        decoder(json!({"attn_sparse_topk": 3})),
        decoder(json!({"attn_use_entmax15": true})),
        decoder(json!({"attn_num_mem_kv": 3})),
        decoder(json!({"attn_on_attn": true})),
        decoder(json!({"attn_on_attn": true, "zero_init_branch_output": true})),
        decoder(json!({"attn_zero_init_output": true, "ff_zero_init_output": true})),
        decoder(json!({"attn_gate_values": true})),
        decoder(json!({"attn_max_attend_past": 2})),
        decoder(json!({"ff_mult": 2.5})),
        decoder(json!({"ff_glu": true})),
        decoder(json!({"ff_post_act_ln": true})),
        decoder(json!({"heads": 2})),
        decoder(json!({"attn_dim_head": 12})),
    ];
    let activations = Activation::ALL.iter().filter_map(|activation| activation.option());
    let activated = |option| [false, true].map(|glu| decoder(json!({(format!("ff_{option}")): true, "ff_glu": glu})));
    options.extend(activations.flat_map(activated));
    options
}

/// Parameters away from their constants, so that no path is switched off.
fn model(config: &Config, dtype: DType) -> Result<Model> {
    let model = Model::new(config, &ParamStore::new(3, dtype, &Device::Cpu))?;
    let random = x_transformers::Philox::new(17, 0);
    for (index, (_, param)) in model.params().unique().enumerate() {
        let value = param.tensor().detach();
        let noise = Tensor::generate(*value.shape(), dtype, &Device::Cpu, |i| {
            0.1 * random.normal((index * 1_000_003 + i) as u64)
        })?;
        param.set(value.add(&noise)?)?;
    }
    Ok(model)
}

fn tokens(b: usize, n: usize) -> Result<Tensor> {
    let values: Vec<i64> = (0..b * n).map(|i| (i * i + 3 * i + i / 5) as i64 % 16).collect();
    Tensor::from_vec(values, [b, n], &Device::Cpu)
}

/// Outputs and gradients for tokens, a cotangent and perhaps a context.
fn run(config: &Config, dtype: DType, context: bool, options: RunOptions) -> Result<BTreeMap<String, Tensor>> {
    let (b, n) = (2, 9);
    let random = x_transformers::Philox::new(5, 1);
    let normal = |shape: [usize; 3]| Tensor::generate(shape, dtype, &Device::Cpu, |i| random.normal(i as u64));
    let mask: Vec<bool> = (0..b * n).map(|i| i != 3 && i < 15).collect();
    let mut inputs = BTreeMap::from([
        ("x".to_string(), tokens(b, n)?),
        ("mask".to_string(), Tensor::from_vec(mask, [b, n], &Device::Cpu)?),
        ("cotangent".to_string(), normal([b, n, 16])?),
    ]);
    if context {
        inputs.insert("context".to_string(), normal([b, 5, 32])?);
    }
    model(config, dtype)?.run(&inputs, &Call::default(), &RunOptions { gradients: true, ..options })
}

fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_f64_vec()?, b.to_f64_vec()?);
    let norm: f64 = b.iter().map(|x| x * x).sum();
    let sum: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
    Ok((sum / norm.max(1e-24)).sqrt())
}

fn same(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>, bound: f64, what: &str) -> Result<()> {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{what}");
    for (name, a) in a {
        let error = difference(a, &b[name])?;
        assert!(error <= bound, "{what}: {name} differs by {error:.2e}");
    }
    Ok(())
}

#[test]
fn options_each_changes_the_model_and_trains_every_parameter() -> Result<()> {
    let plain = |kind: &str| run(&config(&wrapper(kind, &json!({})))?, DType::F64, false, RunOptions::default());
    let plain = BTreeMap::from([("Decoder", plain("Decoder")?), ("Encoder", plain("Encoder")?)]);
    for (kind, options) in layer_options() {
        let config = config(&wrapper(kind, &options))?;
        let outputs = run(&config, DType::F64, false, RunOptions::default())?;
        let changed = difference(&outputs["out"], &plain[kind]["out"])?;
        assert!(changed > 1e-6, "{options} changes the output by {changed:.1e} only");
        for (name, _) in model(&config, DType::F64)?.params().unique() {
            assert!(outputs.contains_key(&format!("grad.{name}")), "{options}: no gradient for {name}");
        }
    }
    Ok(())
}

/// The README of x-transformers documents `alibi_pos_emb`, its code reads `alibi_pos_bias`: here they are one option.
#[test]
fn options_aliases() -> Result<()> {
    let named = |key: &str| config(&wrapper("Decoder", &json!({ key: true })));
    assert_eq!(named("alibi_pos_emb")?, named("alibi_pos_bias")?);
    let both = config(&wrapper("Decoder", &json!({"alibi_pos_emb": true, "alibi_pos_bias": true}))).unwrap_err();
    assert!(["`alibi_pos_emb`", "`alibi_pos_bias`"].iter().all(|key| both.to_string().contains(key)), "{both}");
    let pair = |key: &str| {
        let mut value = json!({"model": "XTransformer", "dim": 8, "enc_num_tokens": 4, "enc_max_seq_len": 8,
            "enc_depth": 1, "dec_num_tokens": 4, "dec_max_seq_len": 8, "dec_depth": 1});
        value[key] = json!(true);
        config(&value)
    };
    assert_eq!(pair("dec_alibi_pos_emb")?, pair("dec_alibi_pos_bias")?);
    Ok(())
}

/// Rotated queries and keys only depend on distances; rotated values depend on positions, as in this version.
#[test]
fn options_rotary_of_queries_and_keys_is_relative() -> Result<()> {
    let moved = |options: Value| -> Result<f64> {
        let model = model(&config(&wrapper("Decoder", &options))?, DType::F64)?;
        let out = |inputs: BTreeMap<String, Tensor>| {
            Ok::<_, Error>(model.run(&inputs, &Call::default(), &RunOptions::default())?["out"].clone())
        };
        let x = tokens(2, 7)?;
        let mask: Vec<bool> = (0..2 * 9).map(|i| i % 9 >= 2).collect();
        let padded = Tensor::cat(&[&Tensor::ones([2, 2], DType::I64, &Device::Cpu)?, &x], 1)?;
        let padded = BTreeMap::from([
            ("x".to_string(), padded),
            ("mask".to_string(), Tensor::from_vec(mask, [2, 9], &Device::Cpu)?),
        ]);
        difference(&out(padded)?.narrow(1, 2, 7)?, &out(BTreeMap::from([("x".to_string(), x)]))?)
    };
    let rotary = |more: Value| {
        let mut options = json!({"rotary_pos_emb": true, "attn_dim_head": 32});
        merge(&mut options, &more);
        options
    };
    assert!(moved(rotary(json!({"rotary_qk_only": true})))? < 1e-12);
    assert!(moved(rotary(json!({})))? > 1e-3);
    Ok(())
}

#[test]
fn options_of_cross_attention_change_the_model() -> Result<()> {
    let out = |options: &Value| -> Result<BTreeMap<String, Tensor>> {
        let mut all = json!({"cross_attend": true});
        merge(&mut all, options);
        let config = config(&wrapper("Decoder", &all))?;
        let outputs = run(&config, DType::F64, true, RunOptions::default())?;
        for (name, _) in model(&config, DType::F64)?.params().unique() {
            assert!(outputs.contains_key(&format!("grad.{name}")), "{all}: no gradient for {name}");
        }
        Ok(outputs)
    };
    let mut seen = vec![("none".to_string(), out(&json!({}))?["out"].clone())];
    for options in [
        json!({"only_cross": true}),
        json!({"custom_layers": ["c", "a", "f", "c"]}),
        json!({"cross_residual_attn": true}),
        json!({"residual_attn": true, "cross_residual_attn": true}),
        json!({"sandwich_coef": 1}),
        json!({"par_ratio": 6}),
        json!({"macaron": true}),
        json!({"attn_num_mem_kv": 2, "attn_collab_heads": true}),
    ] {
        let changed = out(&options)?["out"].clone();
        for (other, seen) in &seen {
            let difference = difference(&changed, seen)?;
            assert!(difference > 1e-6, "{options} gives the output of {other}, but for {difference:.1e}");
        }
        seen.push((options.to_string(), changed));
    }
    Ok(())
}

#[test]
fn options_survive_json() -> Result<()> {
    for (kind, options) in layer_options() {
        let config = config(&wrapper(kind, &options))?;
        assert_eq!(Config::from_json(&config.to_json())?, config, "{options}");
    }
    let others = [
        json!({"model": "XTransformer", "dim": 32, "tie_token_emb": true, "enc_num_tokens": 8, "enc_max_seq_len": 9,
               "enc_depth": 1, "enc_num_memory_tokens": 2, "dec_num_tokens": 8, "dec_max_seq_len": 7, "dec_depth": 2,
               "dec_rel_pos_bias": true, "dec_emb_dropout": 0.25, "enc_attn_dim_head": 8, "dec_ff_glu": true}),
        json!({"model": "ViTransformerWrapper", "image_size": 8, "patch_size": 4, "num_classes": 3, "dropout": 0.5,
               "attn_layers": {"kind": "Encoder", "dim": 8, "depth": 1}}),
        json!({"model": "ContinuousTransformerWrapper", "max_seq_len": 8, "dim_in": 3, "use_pos_emb": false,
               "attn_layers": {"kind": "Decoder", "dim": 8, "depth": 1}}),
        json!({"model": "AutoregressiveWrapper", "pad_value": 3, "net": {"model": "TransformerWrapper",
               "num_tokens": 4, "max_seq_len": 8, "tie_embedding": true,
               "attn_layers": {"kind": "Decoder", "dim": 8, "depth": 1}}}),
        json!({"model": "CrossAttender", "dim": 8, "depth": 1, "shift_tokens": [1, 0]}),
        json!({"model": "SamplingFilter", "filter_logits_fn": "min_p", "min_p_ratio": 0.1}),
    ];
    for value in others {
        let config = config(&value)?;
        assert_eq!(config.to_value(), value);
        assert!(config.layers().is_ok(), "{value}");
    }
    Ok(())
}

/// Options that need the matrix of scores, and why; all others take the fused path.
#[test]
fn options_attention_paths() -> Result<()> {
    let explicit = [
        ("attn_talking_heads", "talking heads"),
        ("attn_sparse_topk", "top-k"),
        ("attn_use_entmax15", "entmax"),
        ("residual_attn", "residual attention"),
    ];
    for (kind, options) in layer_options() {
        let (_, plan) = config(&wrapper(kind, &options))?.layers()?.remove(0);
        let reason = explicit.iter().find(|(key, _)| options.get(key).is_some());
        for layer in plan.layers.iter().filter_map(|layer| layer.branch.attention()) {
            match (layer.path(), reason) {
                (AttentionPath::Fused, None) => {}
                (AttentionPath::Explicit(why), Some((_, expected))) => assert!(why.contains(expected), "{why}"),
                (path, _) => panic!("{options} takes the path {path}"),
            }
        }
    }
    Ok(())
}

/// Both paths give the same outputs and gradients wherever both apply.
#[test]
fn options_fused_equals_explicit() -> Result<()> {
    let explicit = RunOptions { explicit_attention: true, ..RunOptions::default() };
    for (kind, options) in layer_options() {
        for cross in [false, true] {
            let mut options = options.clone();
            if cross && options.get("custom_layers").is_none() && options["shift_tokens"].as_array().is_none() {
                merge(&mut options, &json!({"cross_attend": true}));
            }
            let context = options.get("cross_attend").is_some();
            let config = config(&wrapper(kind, &options))?;
            let fused = run(&config, DType::F64, context, RunOptions::default())?;
            same(&fused, &run(&config, DType::F64, context, explicit)?, 1e-11, &options.to_string())?;
        }
    }
    Ok(())
}

#[test]
fn options_checkpointed_equals_plain() -> Result<()> {
    let checkpointed = RunOptions { checkpoint_layers: true, ..RunOptions::default() };
    for (kind, options) in layer_options() {
        let config = config(&wrapper(kind, &options))?;
        let outcome = run(&config, DType::F64, false, checkpointed);
        if options.get("residual_attn").is_some() {
            assert!(matches!(outcome.unwrap_err().kind(), ErrorKind::Argument { .. }), "{options}");
            continue;
        }
        same(&run(&config, DType::F64, false, RunOptions::default())?, &outcome?, 1e-13, &options.to_string())?;
    }
    let cross = config(&wrapper("Decoder", &json!({"cross_attend": true, "rel_pos_bias": true})))?;
    let plain = run(&cross, DType::F64, true, RunOptions::default())?;
    same(&plain, &run(&cross, DType::F64, true, checkpointed)?, 1e-13, "cross-attention")
}

#[test]
fn options_precisions_agree() -> Result<()> {
    for (kind, options) in layer_options() {
        let config = config(&wrapper(kind, &options))?;
        // The weights are drawn in f64 and rounded, so that the noise differs: a comparison of the model, not of bits.
        let (wide, narrow) = (model(&config, DType::F64)?, model(&config, DType::F32)?);
        wide.params().load(&narrow.params().state_dict())?;
        let inputs = BTreeMap::from([("x".to_string(), tokens(2, 9)?)]);
        let out = |model: &Model| model.run(&inputs, &Call::default(), &RunOptions::default());
        let error = difference(&out(&narrow)?["out"], &out(&wide)?["out"])?;
        assert!(error < 2e-5, "{options}: {error:.1e}");
    }
    Ok(())
}

/// Options that cannot work are an error when the config is planned, which names the option.
#[test]
fn options_illegal() {
    let cases = [
        ("Decoder", json!({"heads": 0}), "heads"),
        ("Decoder", json!({"dim": 0}), "dim"),
        ("Decoder", json!({"depth": 0}), "depth"),
        ("Decoder", json!({"depth": usize::MAX}), "depth"),
        ("Decoder", json!({"attn_dim_head": 0}), "attn_dim_head"),
        ("Decoder", json!({"attn_dim_head": usize::MAX / 2}), "attn_dim_head"),
        ("Decoder", json!({"attn_dropout": 1.5}), "attn_dropout"),
        ("Decoder", json!({"ff_dropout": -0.1}), "ff_dropout"),
        ("Decoder", json!({"ff_mult": 0.01}), "ff_mult"),
        ("Decoder", json!({"ff_mult": 1e300}), "ff_mult"),
        ("Decoder", json!({"only_cross": true}), "only_cross"),
        ("Decoder", json!({"pre_norm": false, "sandwich_norm": true}), "sandwich_norm"),
        ("Decoder", json!({"alibi_pos_bias": true, "rel_pos_bias": true}), "alibi_pos_bias"),
        ("Encoder", json!({"alibi_pos_bias": true}), "alibi_pos_bias"),
        ("Decoder", json!({"alibi_num_heads": 2}), "alibi_num_heads"),
        ("Decoder", json!({"alibi_learned": true}), "alibi_learned"),
        ("Decoder", json!({"alibi_pos_bias": true, "alibi_num_heads": 5}), "alibi_num_heads"),
        ("Decoder", json!({"alibi_pos_bias": true, "alibi_num_heads": 0}), "alibi_num_heads"),
        ("Decoder", json!({"rel_pos_num_buckets": 8}), "rel_pos_num_buckets"),
        ("Decoder", json!({"rel_pos_bias": true, "rel_pos_num_buckets": 1}), "rel_pos_num_buckets"),
        ("Encoder", json!({"rel_pos_bias": true, "rel_pos_num_buckets": 3}), "rel_pos_num_buckets"),
        ("Decoder", json!({"rel_pos_bias": true, "rel_pos_max_distance": 20}), "rel_pos_num_buckets"),
        ("Decoder", json!({"rotary_pos_emb": true}), "rotary_pos_emb"),
        ("Decoder", json!({"rotary_emb_dim": 32}), "rotary_emb_dim"),
        ("Decoder", json!({"rotary_interpolation_factor": 2.0}), "rotary_interpolation_factor"),
        ("Decoder", json!({"rotary_pos_emb": true, "rotary_interpolation_factor": 0.5}), "rotary_interpolation_factor"),
        ("Decoder", json!({"rotary_llama3_scaling": stretched(8.0, 0.25, 2.0, 16)}), "rotary_llama3_scaling"),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "rotary_llama3_scaling": stretched(0.5, 0.25, 2.0, 16)}),
            "rotary_llama3_scaling",
        ),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "rotary_llama3_scaling": stretched(8.0, 2.0, 2.0, 16)}),
            "rotary_llama3_scaling",
        ),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "rotary_llama3_scaling": stretched(8.0, 0.0, 2.0, 16)}),
            "rotary_llama3_scaling",
        ),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "rotary_llama3_scaling": stretched(8.0, 0.25, 2.0, 0)}),
            "rotary_llama3_scaling",
        ),
        ("Decoder", json!({"rotary_qk_only": true}), "rotary_qk_only"),
        ("Decoder", json!({"rotary_pos_emb": true, "attn_dim_head": 40, "rotary_emb_dim": 41}), "rotary_pos_emb"),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "attn_dim_head": 32, "attn_collab_heads": true, "attn_collab_compression": 0.2}),
            "rotary_pos_emb",
        ),
        ("Decoder", json!({"dim": 33, "position_infused_attn": true}), "position_infused_attn"),
        ("Decoder", json!({"custom_layers": []}), "custom_layers"),
        ("Decoder", json!({"custom_layers": ["a", "c"]}), "custom_layers"),
        ("Decoder", json!({"custom_layers": ["a", "f"], "cross_attend": true}), "cross_attend"),
        ("Decoder", json!({"sandwich_coef": 0}), "sandwich_coef"),
        ("Decoder", json!({"sandwich_coef": 3}), "sandwich_coef"),
        ("Decoder", json!({"par_ratio": 1}), "par_ratio"),
        ("Decoder", json!({"cross_residual_attn": true}), "cross_residual_attn"),
        ("CrossAttender", json!({"residual_attn": true}), "residual_attn"),
        ("CrossAttender", json!({"rotary_pos_emb": true}), "rotary_pos_emb"),
        ("Decoder", json!({"shift_tokens": 32}), "shift_tokens"),
        ("Encoder", json!({"shift_tokens": 16}), "shift_tokens"),
        ("Decoder", json!({"shift_tokens": [1, 2]}), "shift_tokens"),
        ("Decoder", json!({"qk_norm_attn_seq_len": 8}), "qk_norm_attn_seq_len"),
        ("Decoder", json!({"use_qk_norm_attn": true, "qk_norm_attn_seq_len": 1}), "qk_norm_attn_seq_len"),
        ("Decoder", json!({"attn_scale_init_value": -1.0}), "attn_scale_init_value"),
        ("Decoder", json!({"attn_sparse_topk": 0}), "attn_sparse_topk"),
        ("Decoder", json!({"attn_collab_compression": 0.5}), "attn_collab_compression"),
        ("Decoder", json!({"attn_collab_heads": true, "attn_collab_compression": 0.0}), "attn_collab_compression"),
    ];
    for (kind, options, key) in cases {
        let refused = config(&wrapper(kind, &options)).and_then(|config| config.layers()).unwrap_err();
        match refused.kind() {
            ErrorKind::Option { key: found, .. } => assert_eq!(found, key, "{options}: {refused}"),
            other => panic!("{options} gave {other}"),
        }
    }
}

/// Options that exclude each other: the message names both.
#[test]
fn options_that_exclude_each_other() {
    let cases = [
        ("Decoder", json!({"only_cross": true}), ["only_cross", "cross_attend"]),
        ("Decoder", json!({"pre_norm": false, "sandwich_norm": true}), ["sandwich_norm", "pre_norm"]),
        ("Decoder", json!({"alibi_pos_bias": true, "rel_pos_bias": true}), ["alibi_pos_bias", "rel_pos_bias"]),
        ("Encoder", json!({"alibi_pos_bias": true}), ["alibi_pos_bias", "kind"]),
        ("Decoder", json!({"alibi_learned": true}), ["alibi_learned", "alibi_pos_bias"]),
        ("Decoder", json!({"rel_pos_max_distance": 256}), ["rel_pos_max_distance", "rel_pos_bias"]),
        ("Decoder", json!({"rotary_pos_emb": true}), ["rotary_pos_emb", "attn_dim_head"]),
        ("Decoder", json!({"rotary_qk_only": true}), ["rotary_qk_only", "rotary_pos_emb"]),
        (
            "Decoder",
            json!({"rotary_pos_emb": true, "attn_dim_head": 32, "attn_collab_heads": true, "attn_collab_compression": 0.2}),
            ["rotary_pos_emb", "attn_collab_heads"],
        ),
        ("Decoder", json!({"cross_attend": true, "custom_layers": ["a", "f"]}), ["cross_attend", "layer order"]),
        ("Decoder", json!({"custom_layers": ["c"]}), ["custom_layers", "cross_attend"]),
        ("Decoder", json!({"cross_residual_attn": true}), ["cross_residual_attn", "cross_attend"]),
        ("Decoder", json!({"dim": 33, "position_infused_attn": true}), ["position_infused_attn", "dim"]),
        ("Decoder", json!({"attn_collab_compression": 0.5}), ["attn_collab_compression", "attn_collab_heads"]),
        ("Decoder", json!({"qk_norm_attn_seq_len": 8}), ["qk_norm_attn_seq_len", "use_qk_norm_attn"]),
        ("Decoder", json!({"ff_swish": true, "ff_glu": true, "ff_relu": true}), ["ff_relu", "ff_swish"]),
        (
            "Decoder",
            json!({"use_qk_norm_attn": true, "attn_qk_norm": true, "attn_scale_init_value": -1.0}),
            ["attn_scale_init_value", "use_qk_norm_attn"],
        ),
    ];
    for (kind, options, names) in cases {
        // If one of them is illegal on its own, this does not test the combination.
        let refused = config(&wrapper(kind, &options)).and_then(|config| config.layers()).unwrap_err();
        assert!(matches!(refused.kind(), ErrorKind::Option { .. }), "{refused}");
        for name in names {
            assert!(refused.to_string().contains(name), "{options}: `{refused}` does not name {name}");
        }
    }
}

#[test]
fn options_illegal_wrappers() {
    let layers = json!({"kind": "Decoder", "dim": 8, "depth": 1});
    let encoder = json!({"kind": "Encoder", "dim": 8, "depth": 1});
    let token = |options: Value| {
        let mut value =
            json!({"model": "TransformerWrapper", "num_tokens": 4, "max_seq_len": 8, "attn_layers": layers});
        merge(&mut value, &options);
        value
    };
    let pair = |options: Value| {
        let mut value = json!({"model": "XTransformer", "dim": 8, "enc_num_tokens": 4, "enc_max_seq_len": 8,
            "enc_depth": 1, "dec_num_tokens": 4, "dec_max_seq_len": 8, "dec_depth": 1});
        merge(&mut value, &options);
        value
    };
    let vision = |image: usize, patch: usize, layers: &Value| json!({"model": "ViTransformerWrapper", "image_size": image, "patch_size": patch, "attn_layers": layers});
    let cases = [
        (token(json!({"num_tokens": 0})), "num_tokens"),
        (token(json!({"max_seq_len": 0})), "max_seq_len"),
        (token(json!({"emb_dim": 0})), "emb_dim"),
        (token(json!({"emb_dim": 6, "tie_embedding": true})), "tie_embedding"),
        (token(json!({"emb_dropout": 2.0})), "emb_dropout"),
        (token(json!({"shift_mem_down": 2})), "shift_mem_down"),
        (token(json!({"num_tokens": "many"})), "num_tokens"),
        (token(json!({"num_tokens": -4})), "num_tokens"),
        (token(json!({"attn_layers": 3})), "attn_layers"),
        (pair(json!({"dim": 0})), "dim"),
        (pair(json!({"tie_token_emb": true, "dec_num_tokens": 5})), "tie_token_emb"),
        (pair(json!({"enc_heads": 0})), "heads"),
        (pair(json!({"dec_depth": "two"})), "dec_depth"),
        (vision(10, 4, &encoder), "patch_size"),
        (vision(8, 0, &encoder), "patch_size"),
        (vision(8, 4, &layers), "kind"),
        (json!({"num_tokens": 4}), "model"),
        (json!({"model": "Transformer"}), "model"),
        (json!({"model": "AutoregressiveWrapper"}), "net"),
        (json!({"model": "Encoder", "dim": 8}), "depth"),
        (json!({"model": "SamplingFilter", "filter_logits_fn": "best"}), "filter_logits_fn"),
        (json!({"model": "AutoregressiveWrapper", "net": {"model": "ViTransformerWrapper"}}), "model"),
    ];
    for (value, key) in cases {
        let refused = config(&value).and_then(|config| config.layers()).unwrap_err();
        match refused.kind() {
            ErrorKind::Option { key: found, .. } => assert_eq!(found, key, "{value}: {refused}"),
            other => panic!("{value} gave {other}"),
        }
    }
}

#[test]
fn options_unknown() {
    let cases = [
        (wrapper("Decoder", &json!({"rotary_pos_embed": true})), "rotary_pos_embed", Some("rotary_pos_emb")),
        (wrapper("Decoder", &json!({"attn_talking_head": true})), "attn_talking_head", Some("attn_talking_heads")),
        (wrapper("Decoder", &json!({"ff_gul": true})), "ff_gul", Some("ff_glu")),
        (wrapper("Decoder", &json!({"collab_heads": true})), "collab_heads", Some("attn_collab_heads")),
        (wrapper("Decoder", &json!({"glu": true})), "glu", Some("ff_glu")),
        (wrapper("Decoder", &json!({"dropout_of_everything": 1})), "dropout_of_everything", None),
        (json!({"model": "Decoder", "dim": 8, "depht": 1}), "depht", Some("depth")),
        (
            json!({"model": "XTransformer", "dim": 8, "dec_num_memory_tokens": 2}),
            "dec_num_memory_tokens",
            Some("enc_num_memory_tokens"),
        ),
        (json!({"model": "XTransformer", "dim": 8, "enc_hedas": 2}), "enc_hedas", Some("enc_heads")),
        (json!({"model": "XTransformer", "dim": 8, "num_tokens": 2}), "num_tokens", Some("enc_num_tokens")),
        (
            json!({"model": "TransformerWrapper", "tie_embeddings": true, "attn_layers": {"kind": "Decoder", "dim": 8,
                "depth": 1}}),
            "tie_embeddings",
            Some("tie_embedding"),
        ),
        (
            json!({"model": "ContinuousTransformerWrapper", "max_seq_len": 4, "emb_dim": 8, "attn_layers": {"kind":
                "Decoder", "dim": 8, "depth": 1}}),
            "emb_dim",
            None,
        ),
        (
            json!({"model": "ViTransformerWrapper", "image_sise": 4, "attn_layers": {"kind": "Encoder", "dim": 8,
                "depth": 1}}),
            "image_sise",
            Some("image_size"),
        ),
        (
            json!({"model": "AutoregressiveWrapper", "ignore_idx": 4, "net": wrapper("Decoder", &json!({}))}),
            "ignore_idx",
            Some("ignore_index"),
        ),
        (json!({"model": "SamplingFilter", "filter_thresh": 0.5}), "filter_thresh", Some("filter_thres")),
    ];
    for (value, key, nearest) in cases {
        match config(&value).unwrap_err().kind() {
            ErrorKind::UnknownOption { key: found, nearest: near, .. } => {
                assert_eq!((found.as_str(), near.as_deref()), (key, nearest), "{value}");
            }
            other => panic!("{value} gave {other}"),
        }
    }
}

/// Dropout acts only under `Tape::train`, the same for the same seed, on either path.
#[test]
fn options_dropouts() -> Result<()> {
    let layers = |kind: &str| json!({"kind": kind, "dim": 32, "depth": 1, "heads": 2, "attn_dim_head": 8});
    let floats = |name: &str, shape: &[usize]| -> Result<BTreeMap<String, Tensor>> {
        let values = Tensor::generate(shape, DType::F32, &Device::Cpu, |i| (i as f64).sin())?;
        Ok(BTreeMap::from([(name.to_string(), values)]))
    };
    let tokens = || Ok::<_, Error>(BTreeMap::from([("x".to_string(), tokens(2, 9)?)]));
    let image = json!({"model": "ViTransformerWrapper", "image_size": 8, "patch_size": 4, "num_classes": 16,
                       "attn_layers": layers("Encoder")});
    let continuous =
        json!({"model": "ContinuousTransformerWrapper", "max_seq_len": 9, "attn_layers": layers("Decoder")});
    let with = |mut value: Value, key: &str| {
        value[key] = json!(0.3);
        value
    };
    let cases = [
        ("attn_dropout", wrapper("Decoder", &json!({"attn_dropout": 0.3})), tokens()?),
        ("ff_dropout", wrapper("Decoder", &json!({"ff_dropout": 0.3})), tokens()?),
        ("emb_dropout", with(wrapper("Decoder", &json!({})), "emb_dropout"), tokens()?),
        ("continuous emb_dropout", with(continuous, "emb_dropout"), floats("x", &[2, 9, 32])?),
        ("image emb_dropout", with(image.clone(), "emb_dropout"), floats("img", &[2, 3, 8, 8])?),
        ("image dropout", with(image, "dropout"), floats("img", &[2, 3, 8, 8])?),
    ];
    for (key, value, inputs) in cases {
        let config = config(&value)?;
        let model = model(&config, DType::F32)?;
        let out = |tape: Option<Tape>, explicit_attention: bool| -> Result<Vec<f64>> {
            let options = RunOptions { explicit_attention, ..RunOptions::default() };
            let out = model.run(&inputs, &Call::default(), &options)?["out"].to_f64_vec();
            drop(tape);
            out
        };
        let plain = out(None, false)?;
        // Element by element the same mask: only the order of additions differs.
        let paths = [false, true].map(|explicit| out(Some(Tape::train(1)), explicit));
        let [fused, explicit] = paths;
        let apart = fused?.iter().zip(explicit?).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(apart < 1e-4, "{key}: the paths differ by {apart:.1e}");
        for explicit in [false, true] {
            let dropped = out(Some(Tape::train(1)), explicit)?;
            assert_ne!(dropped, plain, "{key}");
            assert_eq!(dropped, out(Some(Tape::train(1)), explicit)?, "{key}");
            assert_ne!(dropped, out(Some(Tape::train(2)), explicit)?, "{key}");
        }
        assert_eq!(out(Some(Tape::grad()), false)?, plain, "{key}");
    }
    Ok(())
}

fn stretched(factor: f64, low: f64, high: f64, tokens: usize) -> Value {
    json!({"factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": tokens})
}
