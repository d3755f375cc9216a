//! Sequences that grow in a cache have the same values as those computed at once, whatever the options.

mod common;
#[path = "common/draw.rs"]
mod draw;

use std::sync::{Mutex, MutexGuard};

use common::device;
use draw::{Draw, VOCABULARY, draws, unsettle};
use proptest::{
    prelude::*,
    test_runner::{Config as Runner, RngSeed},
};
use serde_json::json;
use x_transformers::{
    DType, Device, ParamStore, Philox, Result, Tensor,
    config::{Config, LayerType},
    models::{DecodeCache, ForwardOptions, TransformerWrapper},
};

/// Memory is measured for the whole process: tests of this file run one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Few cases unless `PROPTEST_CASES` sets more: the emulated GPU is slow.
fn runner() -> Runner {
    let few = if *device() == Device::Cpu { 150 } else { 25 };
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(few);
    Runner { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(7), ..Runner::default() }
}

fn model(draw: &Draw, dtype: DType) -> Result<TransformerWrapper> {
    let Config::TransformerWrapper(config) = Config::from_value(draw.value.clone())? else { unreachable!() };
    let store = ParamStore::new(draw.seed, dtype, device());
    let model = TransformerWrapper::new(&config, &store)?;
    unsettle(&store.params(), draw.seed)?;
    Ok(model)
}

fn random(draw: &Draw, stream: u64) -> Philox {
    Philox::new(draw.seed, stream << 40)
}

fn floats(shape: &[usize], dtype: DType, random: Philox) -> Result<Tensor> {
    Tensor::generate(shape, dtype, device(), |i| random.normal(i as u64))
}

fn bools(shape: &[usize], keep: impl Fn(usize) -> bool) -> Result<Tensor> {
    let values: Vec<bool> = (0..shape.iter().product()).map(keep).collect();
    Tensor::from_vec(values, shape, device())
}

/// Longer sequences than in the other properties: a causal model, with all inputs besides tokens.
fn prepare(draw: &Draw, dtype: DType, extras: u8) -> Result<(Draw, ForwardOptions)> {
    let mut draw = draw.clone();
    let wrapper = draw.value.as_object_mut().unwrap();
    wrapper.insert("max_seq_len".into(), json!(24));
    wrapper.insert("max_mem_len".into(), json!(0));
    let dim = wrapper["attn_layers"]["dim"].as_u64().unwrap() as usize;
    let mut options = ForwardOptions { explicit_attention: extras & 1 != 0, ..ForwardOptions::default() };
    if draw.has("cross_attend") {
        options.context = Some(floats(&[draw.batch, 4, dim], dtype, random(&draw, 2))?);
        if extras & 2 != 0 {
            let random = random(&draw, 3);
            options.context_mask = Some(bools(&[draw.batch, 4], |i| i % 4 == 0 || random.uniform(i as u64) < 0.6)?);
        }
    }
    if extras & 4 != 0 {
        let mem = |layer| floats(&[draw.batch, 3, dim], dtype, random(&draw, 10 + layer as u64));
        options.mems = Some((0..draw.count(LayerType::SelfAttention)).map(mem).collect::<Result<_>>()?);
    }
    Ok((draw, options))
}

fn tokens(draw: &Draw, n: usize) -> Result<Tensor> {
    let random = random(draw, 1);
    let tokens: Vec<i64> = (0..draw.batch * n).map(|i| random.below(i as u64, VOCABULARY as u64) as i64).collect();
    Tensor::from_vec(tokens, [draw.batch, n], device())
}

/// The largest difference relative to the largest number.
fn difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_f64_vec()?, b.to_f64_vec()?);
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(1.0f64, |most, x| most.max(x.abs()));
    Ok(a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / largest)
}

fn bound(dtype: DType) -> f64 {
    if dtype == DType::F64 { 1e-11 } else { 2e-4 }
}

/// Compares the tokens of all rows from `start` on, in steps of these sizes, with the whole.
fn grow(
    model: &TransformerWrapper,
    x: &Tensor,
    options: &ForwardOptions,
    steps: &[usize],
    dtype: DType,
) -> Result<Option<String>> {
    let (b, n) = (x.dim(0)?, x.dim(1)?);
    let whole = model.forward(x, options)?.out;
    let mut cache = model.cache(b, n, options)?;
    let mut start = 0;
    for &step in steps.iter().cycle() {
        let step = step.min(n - start);
        let mask = options.mask.as_ref().map(|mask| mask.narrow(1, start, step)).transpose()?;
        let hidden = model.extend(&x.narrow(1, start, step)?, &vec![step; b], mask.as_ref(), &mut cache)?;
        let error = difference(&model.logits(&hidden)?, &whole.narrow(1, start, step)?)?;
        if error > bound(dtype) {
            return Ok(Some(format!("{error} at {start} of {n}, {step} new")));
        }
        start += step;
        if start == n {
            return Ok(None);
        }
    }
    Ok(None)
}

/// Compares prompts of different lengths, then tokens one by one, with each row on its own.
fn ragged(model: &TransformerWrapper, draw: &Draw, options: &ForwardOptions, dtype: DType) -> Result<Option<String>> {
    let (n, more) = (draw.n + 3, 5);
    let random = random(draw, 20);
    let prompts: Vec<usize> = (0..draw.batch).map(|row| 1 + random.below(row as u64, n as u64) as usize).collect();
    let x = tokens(draw, n + more)?;
    let mut cache = model.cache(draw.batch, n + more, options)?;
    // In two chunks, the second of which some rows may not need.
    let first = n / 2;
    let mut counts: Vec<usize> = prompts.iter().map(|&prompt| prompt.min(first)).collect();
    let mut hidden = model.extend(&x.narrow(1, 0, first)?, &counts, None, &mut cache)?;
    let mut of_row = rows_at(&model.logits(&hidden)?, &counts)?;
    counts = prompts.iter().map(|&prompt| prompt.saturating_sub(first)).collect();
    hidden = model.extend(&x.narrow(1, first, n - first)?, &counts, None, &mut cache)?;
    let later = rows_at(&model.logits(&hidden)?, &counts)?;
    for (row, &count) in counts.iter().enumerate() {
        if count > 0 {
            of_row[row] = later[row].clone();
        }
    }
    for step in 0..=more {
        if step > 0 {
            let at = |row: usize| x.select(0, row)?.narrow(0, prompts[row] + step - 1, 1)?.unsqueeze(0);
            let new: Vec<Tensor> = (0..draw.batch).map(at).collect::<Result<_>>()?;
            let new = Tensor::cat(&new.iter().collect::<Vec<_>>(), 0)?;
            hidden = model.extend(&new, &vec![1; draw.batch], None, &mut cache)?;
            of_row = rows_at(&model.logits(&hidden)?, &vec![1; draw.batch])?;
        }
        for row in 0..draw.batch {
            let pick = |x: &Option<Tensor>| x.as_ref().map(|x| x.narrow(0, row, 1)).transpose();
            let alone = ForwardOptions {
                context: pick(&options.context)?,
                context_mask: pick(&options.context_mask)?,
                mems: options
                    .mems
                    .as_ref()
                    .map(|mems| mems.iter().map(|mem| mem.narrow(0, row, 1)).collect())
                    .transpose()?,
                ..options.clone()
            };
            let length = prompts[row] + step;
            let whole = model.forward(&x.narrow(0, row, 1)?.narrow(1, 0, length)?, &alone)?.out;
            let error = difference(&of_row[row], &whole.narrow(1, length - 1, 1)?)?;
            if error > bound(dtype) {
                return Ok(Some(format!("{error} in row {row} of {prompts:?} after {step} tokens")));
            }
        }
    }
    Ok(None)
}

/// Values at the last position of each row.
fn rows_at(logits: &Tensor, counts: &[usize]) -> Result<Vec<Tensor>> {
    let at = |(row, &count): (usize, &usize)| logits.narrow(0, row, 1)?.narrow(1, count.max(1) - 1, 1);
    counts.iter().enumerate().map(at).collect()
}

fn cacheable(draw: &Draw) -> bool {
    draw.is_causal() && !draw.counts_queries()
}

proptest! {
    #![proptest_config(runner())]

    #[test]
    fn cached_logits_equal_those_of_a_full_pass(
        draw in draws().prop_filter("not causal", cacheable),
        extras in 0u8..8,
        steps in proptest::collection::vec(1usize..6, 1..5),
        wide: bool,
    ) {
        let _alone = alone();
        let dtype = if wide { DType::F64 } else { DType::F32 };
        // Top-k decides between scores that may differ by less than the precision of f32.
        let dtype = if draw.given("attn_sparse_topk") { DType::F64 } else { dtype };
        let (draw, options) = prepare(&draw, dtype, extras).unwrap();
        let model = model(&draw, dtype).unwrap();
        let x = tokens(&draw, draw.n + 12).unwrap();
        prop_assert_eq!(grow(&model, &x, &options, &steps, dtype).unwrap(), None);
    }

    #[test]
    fn cached_rows_of_several_lengths_equal_separate_rows(
        draw in draws().prop_filter("not causal", cacheable),
        extras in 0u8..8,
    ) {
        let _alone = alone();
        let (draw, options) = prepare(&draw, DType::F64, extras).unwrap();
        let model = model(&draw, DType::F64).unwrap();
        prop_assert_eq!(ragged(&model, &draw, &options, DType::F64).unwrap(), None);
    }

    #[test]
    fn cached_logits_know_padding(
        draw in draws().prop_filter("not causal", cacheable),
        extras in 0u8..8,
        steps in proptest::collection::vec(1usize..6, 1..5),
    ) {
        let _alone = alone();
        prop_assume!(!draw.given("shift_tokens"));
        let (draw, mut options) = prepare(&draw, DType::F64, extras).unwrap();
        let n = draw.n + 8;
        let random = random(&draw, 4);
        // Later tokens change a padded query without any key; nobody sees it, so only the others are compared.
        let kept: Vec<bool> = (0..draw.batch * n).map(|i| random.uniform(i as u64) < 0.7).collect();
        options.mask = Some(bools(&[draw.batch, n], |i| kept[i]).unwrap());
        let model = model(&draw, DType::F64).unwrap();
        let x = tokens(&draw, n).unwrap();
        let whole = model.forward(&x, &options).unwrap().out;
        let mut cache = model.cache(draw.batch, n, &options).unwrap();
        let mut start = 0;
        for &step in steps.iter().cycle() {
            let step = step.min(n - start);
            let mask = options.mask.as_ref().unwrap().narrow(1, start, step).unwrap();
            let counts = vec![step; draw.batch];
            let x = x.narrow(1, start, step).unwrap();
            let logits = model.logits(&model.extend(&x, &counts, Some(&mask), &mut cache).unwrap()).unwrap();
            for (row, at) in (0..draw.batch).flat_map(|row| (0..step).map(move |at| (row, at))) {
                if kept[row * n + start + at] {
                    let of = |x: &Tensor, at: usize| x.narrow(0, row, 1).unwrap().narrow(1, at, 1).unwrap();
                    let error = difference(&of(&logits, at), &of(&whole, start + at)).unwrap();
                    prop_assert!(error <= 1e-11, "{} at {} of row {}", error, start + at, row);
                }
            }
            start += step;
            if start == n {
                break;
            }
        }
    }
}

fn simple() -> Result<(Draw, TransformerWrapper)> {
    let value = json!({"model": "TransformerWrapper", "num_tokens": VOCABULARY, "max_seq_len": 700, "num_memory_tokens": 1,
        "attn_layers": {"kind": "Decoder", "dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 20, "rel_pos_bias": true,
                        "attn_num_mem_kv": 1}});
    let draw = Draw { value, picks: vec![], batch: 2, n: 4, seed: 3 };
    let model = model(&draw, DType::F64)?;
    Ok((draw, model))
}

/// Options of pretrained models beyond 0.22, combined as in Llama and one by one.
#[test]
fn cached_logits_with_options_beyond_022() -> Result<()> {
    let _alone = alone();
    let llama = json!({"attn_kv_heads": 2, "attn_out_bias": false, "use_rmsnorm": true, "norm_eps": 1e-3,
        "final_norm": "same", "rotary_pos_emb": true, "rotary_emb_dim": 8, "rotary_qk_only": true, "rotary_base": 500.0,
        "ff_glu": true, "ff_swish": true, "ff_no_bias": true});
    let more = [
        json!({}),
        json!({"attn_qkv_bias": true, "attn_out_bias": true, "rotary_interleaved": true, "rotary_interpolation_factor": 2.5,
            "rotary_llama3_scaling": {"factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0,
                "original_max_position_embeddings": 12}}),
        json!({"rotary_freq_factors": [1.0, 2.5, 8.0, 8.0], "rotary_yarn_scaling": {"factor": 4.0,
            "original_max_position_embeddings": 12, "attention_factor": 1.25, "beta_fast": 4.0, "beta_slow": 0.5,
            "truncate": false}}),
        json!({"attn_kv_heads": 1, "attn_num_mem_kv": 2, "attn_qkv_bias": true, "weight_tie_layers": true}),
        json!({"attn_talking_heads": true, "final_norm": "none", "ff_gelu_tanh": true, "ff_swish": false, "attn_qk_norm": true}),
    ];
    for (seed, more) in (0..).zip(more) {
        let mut layers = json!({"kind": "Decoder", "dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8});
        for options in [&llama, &more] {
            layers.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        }
        let value = json!({"model": "TransformerWrapper", "num_tokens": VOCABULARY, "max_seq_len": 24,
            "use_pos_emb": false, "post_emb_norm": seed == 3, "attn_layers": layers});
        let draw = Draw { value, picks: vec![], batch: 3, n: 6, seed };
        for (dtype, explicit_attention) in [(DType::F64, false), (DType::F32, false), (DType::F64, true)] {
            let (model, x) = (model(&draw, dtype)?, tokens(&draw, 18)?);
            let options = ForwardOptions { explicit_attention, ..ForwardOptions::default() };
            assert_eq!(grow(&model, &x, &options, &[5, 1, 1, 2], dtype)?, None, "{more}");
            assert_eq!(ragged(&model, &draw, &options, dtype)?, None, "{more}");
        }
    }
    Ok(())
}

/// Caches that hold several parts of keys, and one of the largest gaps between capacity and use.
#[test]
fn cached_sequences_may_be_long() -> Result<()> {
    let _alone = alone();
    let (draw, model) = simple()?;
    let long = if *device() == Device::Cpu { 640 } else { 270 };
    let x = tokens(&draw, long)?;
    assert_eq!(grow(&model, &x, &ForwardOptions::default(), &[long - 3, 1, 2], DType::F64)?, None);
    Ok(())
}

/// Rows can be truncated, repeated and swapped.
#[test]
fn cached_sequences_can_be_cut_and_chosen() -> Result<()> {
    let _alone = alone();
    let (draw, model) = simple()?;
    let x = tokens(&draw, 8)?;
    let mut cache = model.cache(2, 12, &ForwardOptions::default())?;
    let _ = model.extend(&x.narrow(1, 0, 6)?, &[6, 4], None, &mut cache)?;
    cache.truncate(&[3, 4])?;
    cache.select_rows(&[1, 0, 1])?;
    assert_eq!(cache.lengths(), [4, 3, 4]);
    let row = |row: usize, start: usize, n: usize| x.narrow(0, row, 1)?.narrow(1, start, n);
    let new = Tensor::cat(&[&row(1, 4, 2)?, &row(0, 3, 2)?, &row(0, 0, 2)?], 0)?;
    let logits = model.logits(&model.extend(&new, &[2, 2, 2], None, &mut cache)?)?;
    let sequences = [row(1, 0, 6)?, row(0, 0, 5)?, Tensor::cat(&[&row(1, 0, 4)?, &row(0, 0, 2)?], 1)?];
    for (at, sequence) in sequences.iter().enumerate() {
        let n = sequence.dim(1)?;
        let whole = model.forward(sequence, &ForwardOptions::default())?.out.narrow(1, n - 2, 2)?;
        assert!(difference(&logits.narrow(0, at, 1)?, &whole)? < 1e-11, "row {at}");
    }
    Ok(())
}

/// Buffers are written in place and kept from step to step.
#[test]
fn cached_steps_allocate_nothing_that_grows() -> Result<()> {
    let _alone = alone();
    let (draw, model) = simple()?;
    let x = tokens(&draw, 80)?;
    let mut cache = model.cache(2, 600, &ForwardOptions::default())?;
    let _ = model.extend(&x.narrow(1, 0, 10)?, &[10, 10], None, &mut cache)?;
    let step = |at: usize, cache: &mut DecodeCache| model.extend(&x.narrow(1, at, 1)?, &[1, 1], None, cache);
    for at in 10..20 {
        let _ = step(at, &mut cache)?;
    }
    let before = device().memory();
    device().reset_peak_memory();
    for at in 20..80 {
        let _ = step(at, &mut cache)?;
    }
    let after = device().memory();
    assert_eq!(after.live, before.live);
    // A copy of the keys of one layer would show.
    assert!(after.peak - before.live < 2 * 2 * 600 * 20 * 8, "{before:?} {after:?}");
    Ok(())
}

#[test]
fn cached_sequences_that_do_not_fit_are_refused() -> Result<()> {
    let _alone = alone();
    let (draw, model) = simple()?;
    let x = tokens(&draw, 8)?;
    let mut cache = model.cache(2, 8, &ForwardOptions::default())?;
    let _ = model.extend(&x, &[8, 7], None, &mut cache)?;
    for (n, counts) in [(1, vec![1, 1]), (1, vec![0]), (2, vec![0, 3])] {
        let error = model.extend(&x.narrow(1, 0, n)?, &counts, None, &mut cache).unwrap_err().to_string();
        assert!(error.contains("cache") && error.contains(&format!("{counts:?}")), "{n} {counts:?}: {error}");
    }
    for lengths in [&[8, 8][..], &[8]] {
        let error = cache.truncate(lengths).unwrap_err().to_string();
        assert!(error.contains("cannot shorten sequences of lengths ["), "{error}");
    }
    for rows in [&[][..], &[2]] {
        let error = cache.select_rows(rows).unwrap_err().to_string();
        assert!(error.contains(&format!("cannot select rows {rows:?} from 2")), "{error}");
    }
    let _ = model.extend(&x.narrow(1, 0, 1)?, &[0, 1], None, &mut cache)?;
    let error = model.cache(0, 3, &ForwardOptions::default()).unwrap_err().to_string();
    assert!(error.contains("expected at least one row and one position, got 0 and"), "{error}");
    let encoder = json!({"model": "TransformerWrapper", "num_tokens": VOCABULARY, "max_seq_len": 9,
        "attn_layers": {"kind": "Encoder", "dim": 16, "depth": 1, "heads": 2}});
    let encoder = self::model(&Draw { value: encoder, ..draw }, DType::F64)?;
    let error = encoder.cache(1, 3, &ForwardOptions::default()).unwrap_err().to_string();
    assert!(error.contains("kind"), "{error}");
    Ok(())
}
