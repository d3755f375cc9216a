//! Every option parses, plans, runs forward and backward, and changes the model; every illegal one is an error.

mod illegal;

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
