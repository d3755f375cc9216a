//! Properties of models with random legal options.

use std::collections::BTreeMap;

use crate::draw::{CPU, Draw, OPTIONS, VOCABULARY, draws, option, unsettle};
use proptest::{
    prelude::*,
    test_runner::{Config as Runner, RngSeed},
};
use serde_json::{Value, json};
use x_transformers::{
    DType, ParamStore, Philox, Result, Tensor,
    config::{Call, Config, LayerType},
    models::{Model, RunOptions},
};

/// A model whose every parameter is away from constants.
fn model(draw: &Draw, dtype: DType) -> Result<Model> {
    let model = Model::new(&Config::from_value(draw.value.clone())?, &ParamStore::new(draw.seed, dtype, &CPU))?;
    unsettle(model.params(), draw.seed)?;
    Ok(model)
}

/// Tokens, and a context where there is cross-attention.
fn inputs(draw: &Draw) -> Result<BTreeMap<String, Tensor>> {
    let random = Philox::new(draw.seed, 1 << 40);
    let tokens: Vec<i64> = (0..draw.batch * draw.n).map(|i| random.below(i as u64, VOCABULARY as u64) as i64).collect();
    let mut inputs = BTreeMap::from([("x".to_string(), Tensor::from_vec(tokens, [draw.batch, draw.n], &CPU)?)]);
    if draw.has("cross_attend") {
        let random = Philox::new(draw.seed, 2 << 40);
        let dim = draw.layers()["dim"].as_u64().unwrap() as usize;
        let context = Tensor::generate([draw.batch, 4, dim], DType::F64, &CPU, |i| random.normal(i as u64))?;
        inputs.insert("context".to_string(), context);
    }
    Ok(inputs)
}

/// Masks that leave some queries without a key.
fn masks(draw: &Draw) -> Result<BTreeMap<String, Tensor>> {
    let size = |from: &Value, key: &str| from.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
    let queries = draw.n + size(&draw.value, "num_memory_tokens");
    let keys = queries + size(draw.layers(), "attn_num_mem_kv");
    let mut masks = BTreeMap::new();
    let mut mask = |name: &str, stream: u64, shape: [usize; 2]| -> Result<()> {
        let random = Philox::new(draw.seed, stream << 40);
        let keep: Vec<bool> =
            (0..shape[0] * shape[1]).map(|i| i >= shape[1] && random.uniform(i as u64) < 0.6).collect();
        masks.insert(name.to_string(), Tensor::from_vec(keep, shape, &CPU)?);
        Ok(())
    };
    mask("mask", 4, [draw.batch, draw.n])?;
    if draw.count(LayerType::SelfAttention) > 0 {
        mask("attn_mask", 5, [queries, keys])?;
    }
    if draw.has("cross_attend") {
        mask("context_mask", 6, [draw.batch, 4])?;
    }
    Ok(masks)
}

/// A cotangent for the output.
fn cotangent(draw: &Draw) -> Result<Tensor> {
    let random = Philox::new(draw.seed, 3 << 40);
    Tensor::generate([draw.batch, draw.n, VOCABULARY], DType::F64, &CPU, |i| random.normal(i as u64))
}

fn out(model: &Model, inputs: &BTreeMap<String, Tensor>) -> Result<Tensor> {
    Ok(model.run(inputs, &Call::default(), &RunOptions::default())?.remove("out").unwrap())
}

fn close(a: &Tensor, b: &Tensor, bound: f64) -> Result<bool> {
    let (a, b) = (a.to_f64_vec()?, b.to_f64_vec()?);
    let largest = b.iter().fold(1.0f64, |most, x| most.max(x.abs()));
    Ok(a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= bound * largest))
}

/// Returns the derivative along a random direction through all parameters, by the tape and by differences, and the
/// change of the output when the parameters without a gradient move.
fn directional(draw: &Draw) -> Result<(f64, f64, f64)> {
    let model = model(draw, DType::F64)?;
    let mut inputs = inputs(draw)?;
    let cotangent = cotangent(draw)?;
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

/// Few cases unless `PROPTEST_CASES` sets more.
fn runner() -> Runner {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(80);
    Runner { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(22), ..Runner::default() }
}

proptest! {
    #![proptest_config(runner())]

    #[test]
    fn random_options_gradients_match_differences(draw in draws()) {
        let (along, numeric, unused) = directional(&draw).unwrap();
        prop_assert!((along - numeric).abs() <= 1e-6 * along.abs().max(1.0), "{along} by the tape, {numeric} by differences");
        // A parameter without a gradient, for instance because no visible position uses it, has no effect.
        prop_assert!(unused <= 1e-12, "parameters without a gradient change the output by {unused}");
    }

    #[test]
    fn random_options_fused_and_explicit_attention_agree(draw in draws()) {
        let model = model(&draw, DType::F64).unwrap();
        let mut given = inputs(&draw).unwrap();
        given.insert("cotangent".to_string(), cotangent(&draw).unwrap());
        for masks in [BTreeMap::new(), masks(&draw).unwrap()] {
            given.extend(masks);
            let run = |explicit_attention: bool| {
                let options = RunOptions { gradients: true, explicit_attention, ..RunOptions::default() };
                model.run(&given, &Call::default(), &options).unwrap()
            };
            let (fused, explicit) = (run(false), run(true));
            for name in fused.keys().chain(explicit.keys()) {
                // A gradient that is zero on one path may be a rounding error on the other.
                let [fused, explicit] = [&fused, &explicit].map(|outputs| outputs.get(name));
                let zeros = fused.or(explicit).map(|x| x.affine(0.0, 0.0).unwrap()).unwrap();
                let agree = close(fused.unwrap_or(&zeros), explicit.unwrap_or(&zeros), 1e-11).unwrap();
                prop_assert!(agree, "{name}");
            }
        }
    }

    #[test]
    fn random_options_change_the_output(draw in draws()) {
        let draw = Draw { n: 9, ..draw };
        let with = model(&draw, DType::F64).unwrap();
        let all = out(&with, &inputs(&draw).unwrap()).unwrap();
        for &pick in &draw.picks {
            let less = draw.without(pick);
            let option = option(pick);
            // An option that another pick also enables is not off now.
            let is_off = !option.keys().any(|key| key != "attn_dim_head" && less.given(key));
            if !is_off || !less.is_legal() || !draw.acts(&option) {
                continue;
            }
            let without = model(&less, DType::F64).unwrap();
            for (name, param) in without.params().unique() {
                if let Some(same) = with.params().get(name).filter(|same| same.tensor().shape() == param.tensor().shape()) {
                    param.set(same.tensor()).unwrap();
                }
            }
            let changed = out(&without, &inputs(&less).unwrap()).unwrap();
            prop_assert!(!close(&changed, &all, 1e-9).unwrap(), "{} does nothing", OPTIONS[pick]);
        }
    }

    #[test]
    fn random_options_are_finite_whatever_is_masked(draw in draws()) {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let model = model(&draw, dtype).unwrap();
            let mut given = inputs(&draw).unwrap();
            given.extend(masks(&draw).unwrap());
            given.insert("cotangent".to_string(), cotangent(&draw).unwrap());
            let options = RunOptions { gradients: true, ..RunOptions::default() };
            for (name, tensor) in model.run(&given, &Call::default(), &options).unwrap() {
                prop_assert!(tensor.to_f64_vec().unwrap().iter().all(|x| x.is_finite()), "{dtype}: {name}");
            }
        }
    }

    /// A memory is put in front of the keys unchanged. If nothing is normalised before attention, and positions are
    /// relative or count memories, segments are equivalent to one long sequence.
    #[test]
    fn random_options_segments_are_one_sequence(draw in draws().prop_filter("not causal", Draw::is_causal), cut: usize) {
        let mut draw = Draw { n: 9, ..draw };
        let wrapper = draw.value.as_object_mut().unwrap();
        wrapper.remove("num_memory_tokens");
        wrapper.extend([("use_pos_emb".to_string(), json!(false)), ("max_mem_len".to_string(), json!(0))]);
        let layers = wrapper["attn_layers"].as_object_mut().unwrap();
        // T5's queries count from 0 even after memories; tokens are not shifted across segments.
        let local = ["shift_tokens", "rel_pos_bias", "rel_pos_num_buckets", "rel_pos_max_distance", "sandwich_norm"];
        local.iter().for_each(|key| drop(layers.remove(*key)));
        layers.insert("pre_norm".to_string(), json!(false));
        prop_assume!(!draw.counts_queries() && draw.is_legal());
        let memories = draw.count(LayerType::SelfAttention);
        prop_assume!(memories > 0);

        let model = model(&draw, DType::F64).unwrap();
        let mut given = inputs(&draw).unwrap();
        let whole = out(&model, &given).unwrap();
        let x = given["x"].clone();
        let first = 1 + cut % 7;
        let call = Call { return_mems: true, ..Call::default() };
        for (start, len) in [(0, first), (first, 1), (first + 1, 8 - first)] {
            given.insert("x".to_string(), x.narrow(1, start, len).unwrap());
            let mut outputs = model.run(&given, &call, &RunOptions::default()).unwrap();
            let out = outputs.remove("out").unwrap();
            prop_assert!(close(&out, &whole.narrow(1, start, len).unwrap(), 1e-10).unwrap(), "{len} tokens from {start}");
            prop_assert_eq!(outputs.len(), memories);
            given.extend(outputs);
        }
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
        // Nobody sees padding; a feedforward's token shift does not know the mask.
        prop_assume!(!draw.given("shift_tokens") && !draw.counts_queries());
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
        if let Some(context) = inputs.get("context").cloned() {
            let noise = context.narrow(1, 0, 2).unwrap().affine(-3.0, 1.0).unwrap();
            inputs.insert("context".to_string(), Tensor::cat(&[&context, &noise], 1).unwrap());
            let mask: Vec<bool> = (0..draw.batch * 6).map(|i| i % 6 < 4).collect();
            inputs.insert("context_mask".to_string(), Tensor::from_vec(mask, [draw.batch, 6], &CPU).unwrap());
        }
        let all = out(&model, &inputs).unwrap();
        prop_assert!(close(&all.narrow(1, 0, draw.n).unwrap(), &kept, 1e-10).unwrap());
    }

    #[test]
    fn random_options_precisions_agree(draw in draws()) {
        // Top-k decides between scores that may differ by less than the precision of f32.
        prop_assume!(!draw.given("attn_sparse_topk"));
        let (wide, narrow) = (model(&draw, DType::F64).unwrap(), model(&draw, DType::F32).unwrap());
        wide.params().load(&narrow.params().state_dict()).unwrap();
        let inputs = inputs(&draw).unwrap();
        prop_assert!(close(&out(&narrow, &inputs).unwrap(), &out(&wide, &inputs).unwrap(), 2e-4).unwrap());
    }
}
