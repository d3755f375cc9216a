//! Properties of models with random legal options.

use std::collections::BTreeMap;

use proptest::{
    prelude::*,
    test_runner::{Config as Runner, RngSeed},
};
use serde_json::{Map, Value, json};
use x_transformers::{
    DType, Device, Philox, Result, Store, Tensor,
    config::{Call, Config},
    models::{Model, RunOptions},
};

const CPU: Device = Device::Cpu;
const VOCABULARY: usize = 11;

/// Options of layers, each taken or left; those that do not go together are sorted out by the plan.
const OPTIONS: &[(&str, &str)] = &[
    ("use_scalenorm", "true"),
    ("use_rmsnorm", "true"),
    ("use_rezero", "true"),
    ("alibi_pos_bias", "true"),
    ("alibi_learned", "true"),
    ("rel_pos_bias", "true"),
    ("position_infused_attn", "true"),
    ("rotary_pos_emb", "true"),
    ("rotary_qk_only", "true"),
    ("sandwich_coef", "1"),
    ("par_ratio", "2"),
    ("residual_attn", "true"),
    ("macaron", "true"),
    ("pre_norm", "false"),
    ("gate_residual", "true"),
    ("scale_residual", "true"),
    ("shift_tokens", "1"),
    ("sandwich_norm", "true"),
    ("use_qk_norm_attn", "true"),
    ("attn_talking_heads", "true"),
    ("attn_head_scale", "true"),
    ("attn_collab_heads", "true"),
    ("attn_sparse_topk", "3"),
    ("attn_use_entmax15", "true"),
    ("attn_num_mem_kv", "2"),
    ("attn_on_attn", "true"),
    ("attn_gate_values", "true"),
    ("attn_max_attend_past", "2"),
    ("ff_glu", "true"),
    ("ff_relu_squared", "true"),
    ("ff_post_act_ln", "true"),
    ("cross_attend", "true"),
    ("cross_residual_attn", "true"),
];

/// A model and the sizes of its inputs.
#[derive(Debug, Clone)]
struct Draw {
    value: Value,
    batch: usize,
    n: usize,
    seed: u64,
}

impl Draw {
    fn has(&self, key: &str) -> bool {
        self.value["attn_layers"].get(key).is_some_and(|value| *value == json!(true))
    }

    /// Queries of cross-attention are aligned with the end of the context: a limit on the past then depends on their
    /// number.
    fn counts_queries(&self) -> bool {
        self.has("cross_attend") && self.value["attn_layers"].get("attn_max_attend_past").is_some()
    }

    fn is_causal(&self) -> bool {
        self.value["attn_layers"]["kind"] == json!("Decoder")
    }
}

/// Legal draws: about four options each.
fn draws() -> impl Strategy<Value = Draw> {
    let picks = proptest::collection::vec(0usize..OPTIONS.len(), 0..7);
    let wrapper = (any::<bool>(), any::<bool>(), 0usize..3);
    let sizes = (1usize..4, 1usize..9, 1usize..4, any::<u64>());
    (picks, any::<bool>(), wrapper, sizes).prop_filter_map("illegal together", |(picks, causal, wrapper, sizes)| {
        let mut layers = json!({"kind": if causal { "Decoder" } else { "Encoder" }, "dim": 14, "depth": 2,
                                "heads": sizes.2, "attn_dim_head": 5, "ff_mult": 1.5});
        for pick in picks {
            let (key, value) = OPTIONS[pick];
            layers[key] = serde_json::from_str(value).unwrap();
        }
        if layers.get("rotary_pos_emb").is_some() {
            layers["attn_dim_head"] = json!(33);
        }
        let mut value = json!({"model": "TransformerWrapper", "num_tokens": VOCABULARY, "max_seq_len": 9,
                               "attn_layers": layers});
        let mut options = Map::new();
        options.extend(wrapper.0.then(|| ("tie_embedding".to_string(), json!(true))));
        options.extend(wrapper.1.then(|| ("use_pos_emb".to_string(), json!(false))));
        options.extend((wrapper.2 > 0).then(|| ("num_memory_tokens".to_string(), json!(wrapper.2))));
        value.as_object_mut().unwrap().extend(options);
        let legal = Config::from_value(value.clone()).and_then(|config| config.layers()).is_ok();
        legal.then_some(Draw { value, batch: sizes.0, n: sizes.1, seed: sizes.3 })
    })
}

/// A model whose every parameter is away from constants.
fn model(draw: &Draw, dtype: DType) -> Result<Model> {
    let model = Model::new(&Config::from_value(draw.value.clone())?, &Store::new(draw.seed, dtype, &CPU))?;
    for (stream, (_, param)) in model.params().unique().enumerate() {
        let random = Philox::new(draw.seed, stream as u64);
        let noise = |i: usize| f64::from((0.2 * random.normal(i as u64)) as f32);
        let shape = *param.tensor().shape();
        param.set(param.tensor().detach().add(&Tensor::generate(shape, dtype, &CPU, noise)?)?)?;
    }
    Ok(model)
}

/// Tokens, and a context where there is cross-attention.
fn inputs(draw: &Draw) -> Result<BTreeMap<String, Tensor>> {
    let random = Philox::new(draw.seed, 1 << 40);
    let tokens: Vec<i64> = (0..draw.batch * draw.n).map(|i| random.below(i as u64, VOCABULARY as u64) as i64).collect();
    let mut inputs = BTreeMap::from([("x".to_string(), Tensor::from_vec(tokens, [draw.batch, draw.n], &CPU)?)]);
    if draw.has("cross_attend") {
        let random = Philox::new(draw.seed, 2 << 40);
        let context = Tensor::generate([draw.batch, 4, 14], DType::F64, &CPU, |i| random.normal(i as u64))?;
        inputs.insert("context".to_string(), context);
    }
    Ok(inputs)
}

fn out(model: &Model, inputs: &BTreeMap<String, Tensor>) -> Result<Tensor> {
    Ok(model.run(inputs, &Call::default(), &RunOptions::default())?.remove("out").unwrap())
}

fn close(a: &Tensor, b: &Tensor, bound: f64) -> Result<bool> {
    let (a, b) = (a.to_f64_vec()?, b.to_f64_vec()?);
    let largest = b.iter().fold(1.0f64, |most, x| most.max(x.abs()));
    Ok(a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= bound * largest))
}

/// The derivative along a random direction through all parameters, by the tape and by differences; and how much the
/// output changes when the parameters without a gradient move.
fn directional(draw: &Draw) -> Result<(f64, f64, f64)> {
    let model = model(draw, DType::F64)?;
    let mut inputs = inputs(draw)?;
    let random = Philox::new(draw.seed, 3 << 40);
    let shape = [draw.batch, draw.n, VOCABULARY];
    let cotangent = Tensor::generate(shape, DType::F64, &CPU, |i| random.normal(i as u64))?;
    inputs.insert("cotangent".to_string(), cotangent.clone());
    let outputs = model.run(&inputs, &Call::default(), &RunOptions { gradients: true, ..RunOptions::default() })?;
    let weights = cotangent.to_f64_vec()?;
    let (mut along, mut moves) = (0.0, Vec::new());
    for (stream, (name, param)) in model.params().unique().enumerate() {
        let start = param.tensor().detach();
        let random = Philox::new(draw.seed ^ 1, stream as u64);
        let direction = Tensor::generate(*start.shape(), DType::F64, &CPU, |i| random.normal(i as u64))?;
        let grad = outputs.get(&format!("grad.{name}"));
        if let Some(grad) = grad {
            along += grad.mul(&direction)?.sum(&[])?.item()?;
        }
        moves.push((param.clone(), start, direction, grad.is_none()));
    }
    let at = |step: f64, unused_alone: bool| -> Result<f64> {
        for (param, start, direction, unused) in &moves {
            let step = if unused_alone && !unused { 0.0 } else { step };
            param.set(start.add(&direction.affine(step, 0.0)?)?)?;
        }
        Ok(out(&model, &inputs)?.to_f64_vec()?.iter().zip(&weights).map(|(y, w)| y * w).sum())
    };
    let unused = (at(1e-2, true)? - at(0.0, true)?).abs();
    // Top-k, squared ReLU and entmax have kinks: a step that crosses one is followed by a smaller one.
    let mut numeric = f64::NAN;
    for step in [1e-5, 1e-6, 1e-7] {
        let at = |step: f64| at(step, false);
        let slope = (8.0 * (at(step)? - at(-step)?) - (at(2.0 * step)? - at(-2.0 * step)?)) / (12.0 * step);
        if !((numeric - along).abs() <= (slope - along).abs()) {
            numeric = slope;
        }
    }
    Ok((along, numeric, unused))
}

/// Few cases, unless `PROPTEST_CASES` asks for more.
fn runner() -> Runner {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(80);
    Runner { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(22), ..Runner::default() }
}

proptest! {
    #![proptest_config(runner())]

    #[test]
    fn random_options_gradients_are_those_of_differences(draw in draws()) {
        let (along, numeric, unused) = directional(&draw).unwrap();
        prop_assert!((along - numeric).abs() <= 1e-6 * along.abs().max(1.0), "{along} by the tape, {numeric} by differences");
        // Where a parameter has no gradient, for instance because nothing that counts sees it, it does nothing.
        prop_assert!(unused <= 1e-12, "parameters without a gradient change the output by {unused}");
    }

    #[test]
    fn random_options_fused_and_explicit_attention_agree(draw in draws()) {
        let model = model(&draw, DType::F64).unwrap();
        let inputs = inputs(&draw).unwrap();
        let explicit = RunOptions { explicit_attention: true, ..RunOptions::default() };
        let explicit = model.run(&inputs, &Call::default(), &explicit).unwrap();
        prop_assert!(close(&out(&model, &inputs).unwrap(), &explicit["out"], 1e-11).unwrap());
    }

    #[test]
    fn random_options_rows_of_a_batch_are_independent(draw in draws()) {
        let model = model(&draw, DType::F64).unwrap();
        let inputs = inputs(&draw).unwrap();
        let all = out(&model, &inputs).unwrap();
        for row in 0..draw.batch {
            let alone = inputs.iter().map(|(name, tensor)| (name.clone(), tensor.narrow(0, row, 1).unwrap())).collect();
            prop_assert!(close(&out(&model, &alone).unwrap(), &all.narrow(0, row, 1).unwrap(), 1e-11).unwrap());
        }
    }

    #[test]
    fn random_options_causal_models_ignore_the_future(draw in draws().prop_filter("not causal", Draw::is_causal)) {
        prop_assume!(!draw.counts_queries());
        let model = model(&draw, DType::F64).unwrap();
        let mut inputs = inputs(&draw).unwrap();
        let all = out(&model, &inputs).unwrap();
        for n in 1..draw.n {
            let x = inputs["x"].narrow(1, 0, n).unwrap();
            let whole = inputs.insert("x".to_string(), x).unwrap();
            prop_assert!(close(&out(&model, &inputs).unwrap(), &all.narrow(1, 0, n).unwrap(), 1e-11).unwrap(), "{n} tokens");
            inputs.insert("x".to_string(), whole);
        }
    }

    #[test]
    fn random_options_padding_does_not_matter(draw in draws()) {
        // What is padded is seen by nobody; a feedforward's token shift does not know the mask.
        prop_assume!(draw.value["attn_layers"].get("shift_tokens").is_none() && !draw.counts_queries());
        // T5's queries count from 0 and memory tokens stand in front, both alike with padding at the end.
        let model = model(&draw, DType::F64).unwrap();
        let mut inputs = inputs(&draw).unwrap();
        let kept = out(&model, &inputs).unwrap();
        prop_assume!(draw.n < 9);
        let pad = Tensor::ones([draw.batch, 1], DType::I64, &CPU).unwrap();
        let padded = Tensor::cat(&[&inputs["x"], &pad], 1).unwrap();
        let mask: Vec<bool> = (0..draw.batch * (draw.n + 1)).map(|i| i % (draw.n + 1) < draw.n).collect();
        inputs.insert("x".to_string(), padded);
        inputs.insert("mask".to_string(), Tensor::from_vec(mask, [draw.batch, draw.n + 1], &CPU).unwrap());
        let all = out(&model, &inputs).unwrap();
        prop_assert!(close(&all.narrow(1, 0, draw.n).unwrap(), &kept, 1e-10).unwrap());
    }

    #[test]
    fn random_options_precisions_agree(draw in draws()) {
        // Top-k decides between scores that may differ by less than f32 tells apart.
        prop_assume!(draw.value["attn_layers"].get("attn_sparse_topk").is_none());
        let (wide, narrow) = (model(&draw, DType::F64).unwrap(), model(&draw, DType::F32).unwrap());
        wide.params().load(&narrow.params().state_dict()).unwrap();
        let inputs = inputs(&draw).unwrap();
        prop_assert!(close(&out(&narrow, &inputs).unwrap(), &out(&wide, &inputs).unwrap(), 2e-4).unwrap());
    }
}
