//! Generation: results with and without a cache, rows of several lengths, end tokens, beams, drafts.

mod common;
#[path = "common/draw.rs"]
mod draw;
#[path = "common/levels.rs"]
mod levels;
#[path = "generate/packed.rs"]
mod packed;
#[path = "generate/searches.rs"]
mod searches;

use std::collections::HashMap;

use common::device;
use draw::{Draw, VOCABULARY, draws, unsettle};
use levels::at_every_level;
use proptest::{
    prelude::*,
    test_runner::{Config as Runner, RngSeed},
};
use serde_json::{Value, json};
use x_transformers::{
    DType, Device, ErrorKind, ParamStore, Philox, QuantType, Result, Tape, Tensor,
    config::{AutoregressiveConfig, Config, FilterLogits, SamplingConfig},
    models::{
        AutoregressiveWrapper, BeamOptions, ContinuousAutoregressiveWrapper, EncoderDecoderOptions, ForwardOptions,
        GenerateOptions, Hypothesis, RowEnd, ViTransformerWrapper, XTransformer, filter_probabilities,
    },
    ops::PackedMatrix,
};

/// Few cases unless `PROPTEST_CASES` sets more: the emulated GPU is slow.
fn runner() -> Runner {
    let few = if *device() == Device::Cpu { 60 } else { 6 };
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(few);
    Runner { cases, failure_persistence: None, rng_seed: RngSeed::Fixed(31), ..Runner::default() }
}

fn model_of(net: Value, seed: u64) -> Result<AutoregressiveWrapper> {
    let Config::TransformerWrapper(net) = Config::from_value(net)? else { unreachable!() };
    let config = AutoregressiveConfig { net, pad_value: 0, ..AutoregressiveConfig::default() };
    let store = ParamStore::new(seed, DType::F64, device());
    let model = AutoregressiveWrapper::new(&config, &store)?;
    unsettle(&store.params(), seed)?;
    Ok(model)
}

fn decoder(vocabulary: usize, depth: usize, seed: u64) -> Result<AutoregressiveWrapper> {
    let layers =
        json!({"kind": "Decoder", "dim": 16, "depth": depth, "heads": 2, "attn_dim_head": 8, "rel_pos_bias": true});
    model_of(
        json!({"model": "TransformerWrapper", "num_tokens": vocabulary, "max_seq_len": 14, "attn_layers": layers}),
        seed,
    )
}

fn ints(values: &[i64], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, shape, device())
}

fn random_tokens(seed: u64, shape: &[usize], vocabulary: usize) -> Result<Tensor> {
    let random = Philox::new(seed, 1 << 40);
    let n: usize = shape.iter().product();
    let tokens: Vec<i64> = (0..n).map(|i| random.below(i as u64, vocabulary as u64) as i64).collect();
    ints(&tokens, shape)
}

fn greedy() -> SamplingConfig {
    SamplingConfig { temperature: 0.0, ..SamplingConfig::default() }
}

fn all_tokens(temperature: f64) -> SamplingConfig {
    SamplingConfig { filter_logits_fn: FilterLogits::None, temperature, ..SamplingConfig::default() }
}

fn run(model: &AutoregressiveWrapper, prompt: &Tensor, n: usize, options: &GenerateOptions) -> Result<Vec<Vec<i64>>> {
    let new = model.generate(prompt, n, options, &mut |_| true)?;
    let width = new.shape()[1];
    Ok(new.to_vec::<i64>()?.chunks(width.max(1)).map(<[i64]>::to_vec).collect())
}

proptest! {
    #![proptest_config(runner())]

    /// With a cache, with prompts in chunks and without any of it, past the window too, whatever the options.
    #[test]
    fn generated_tokens_do_not_depend_on_the_cache(draw in draws(), chunk in 1usize..7, extras in 0u8..4) {
        let draw = Draw { batch: draw.batch.max(2), ..draw };
        let mut value = draw.value.clone();
        value.as_object_mut().unwrap().insert("max_seq_len".into(), json!(12));
        let dim = value["attn_layers"]["dim"].as_u64().unwrap() as usize;
        let model = model_of(value, draw.seed).unwrap();
        let prompt = random_tokens(draw.seed, &[draw.batch, draw.n], VOCABULARY).unwrap();
        let mut forward = ForwardOptions::default();
        if draw.has("cross_attend") {
            let random = Philox::new(draw.seed, 2 << 40);
            let context = Tensor::generate([draw.batch, 4, dim], DType::F64, device(), |i| random.normal(i as u64));
            forward.context = Some(context.unwrap());
        }
        if extras == 1 {
            let random = Philox::new(draw.seed, 3 << 40);
            let kept: Vec<bool> = (0..draw.batch * draw.n).map(|i| random.uniform(i as u64) < 0.7).collect();
            forward.mask = Some(Tensor::from_vec(kept, [draw.batch, draw.n], device()).unwrap());
        }
        let lengths = (extras == 2).then(|| (0..draw.batch).map(|row| 1 + row % draw.n).collect());
        let options = GenerateOptions {
            sampling: all_tokens(1.0),
            prompt_lengths: lengths,
            left_padded: extras == 2 && draw.seed.is_multiple_of(2),
            repetition_penalty: 1.2,
            seed: draw.seed,
            forward,
            ..GenerateOptions::default()
        };
        let cached = run(&model, &prompt, 9, &options).unwrap();
        let chunked = run(&model, &prompt, 9, &GenerateOptions { prefill_chunk: chunk, ..options.clone() }).unwrap();
        let anew = run(&model, &prompt, 9, &GenerateOptions { recompute: true, ..options }).unwrap();
        prop_assert_eq!(&cached, &anew);
        prop_assert_eq!(&cached, &chunked);
    }
}

proptest! {
    #![proptest_config(Runner { cases: runner().cases / 2, ..runner() })]

    /// Beam search gives the same with and without a cache, and a draft changes no greedy token, whatever the options.
    #[test]
    fn beams_and_drafts_do_not_depend_on_the_cache(draw in draws(), ahead in 1usize..5, ragged: bool) {
        let draw = Draw { batch: draw.batch.max(2), ..draw };
        let mut value = draw.value.clone();
        value.as_object_mut().unwrap().insert("max_seq_len".into(), json!(12));
        let dim = value["attn_layers"]["dim"].as_u64().unwrap() as usize;
        let crossed = draw.has("cross_attend");
        let (model, draft) = (model_of(value.clone(), draw.seed).unwrap(), model_of(value, draw.seed ^ 1).unwrap());
        let prompt = random_tokens(draw.seed, &[draw.batch, draw.n], VOCABULARY).unwrap();
        let mut forward = ForwardOptions::default();
        if crossed {
            let random = Philox::new(draw.seed, 2 << 40);
            let context = Tensor::generate([draw.batch, 4, dim], DType::F64, device(), |i| random.normal(i as u64));
            forward.context = Some(context.unwrap());
        }
        let options = GenerateOptions {
            sampling: greedy(),
            prompt_lengths: ragged.then(|| (0..draw.batch).map(|row| 1 + row % draw.n).collect()),
            eos_tokens: vec![3],
            eos_in_prompt: false,
            repetition_penalty: 1.2,
            forward,
            ..GenerateOptions::default()
        };
        let beams = BeamOptions { beams: 3, length_penalty: 0.8 };
        let found = model.beam_search(&prompt, 7, &beams, &options).unwrap();
        let recompute = GenerateOptions { recompute: true, ..options.clone() };
        let anew = model.beam_search(&prompt, 7, &beams, &recompute).unwrap();
        for (a, b) in found.iter().flatten().zip(anew.iter().flatten()) {
            prop_assert!(a.tokens == b.tokens && (a.score - b.score).abs() < 1e-8, "{:?} {:?}", a, b);
        }
        prop_assert_eq!(found.iter().map(Vec::len).sum::<usize>(), anew.iter().map(Vec::len).sum::<usize>());
        let drafted = model.generate_with_draft(&draft, ahead, &prompt, 9, &options, &mut |_| true);
        // Not with a context, and not of a model that cannot have a cache.
        if let Err(error) = &drafted {
            prop_assert!(matches!(error.kind(), ErrorKind::Option { key, .. } if key == "draft"), "{}", error);
            prop_assert!(crossed || model.net.supports_kv_cache(&options.forward).is_err(), "{}", error);
        } else {
            let new = drafted.unwrap().0;
            let width = new.shape()[1];
            let rows: Vec<Vec<i64>> = new.to_vec::<i64>().unwrap().chunks(width.max(1)).map(<[i64]>::to_vec).collect();
            prop_assert_eq!(rows, run(&model, &prompt, 9, &options).unwrap());
        }
    }
}

/// A row gets the same tokens as on its own, whatever the other rows and the side of its padding.
#[test]
fn generated_rows_equal_rows_generated_separately() -> Result<()> {
    let model = decoder(20, 2, 5)?;
    let rows = [vec![3, 1, 4, 1, 5], vec![9], vec![2, 6, 5]];
    let alone: Vec<Vec<i64>> = rows
        .iter()
        .enumerate()
        .map(|(row, tokens)| {
            let options = GenerateOptions {
                sampling: all_tokens(2.0),
                row_seeds: Some(vec![100 + row as u64]),
                ..GenerateOptions::default()
            };
            Ok(run(&model, &ints(tokens, &[1, tokens.len()])?, 12, &options)?.remove(0))
        })
        .collect::<Result<_>>()?;
    for left_padded in [false, true] {
        let padded = rows.iter().flat_map(|row| {
            let padding = vec![17; 5 - row.len()];
            if left_padded { [padding, row.clone()].concat() } else { [row.clone(), padding].concat() }
        });
        let prompt = ints(&padded.collect::<Vec<_>>(), &[3, 5])?;
        let options = GenerateOptions {
            sampling: all_tokens(2.0),
            row_seeds: Some(vec![100, 101, 102]),
            prompt_lengths: Some(rows.iter().map(Vec::len).collect()),
            left_padded,
            ..GenerateOptions::default()
        };
        assert_eq!(run(&model, &prompt, 12, &options)?, alone);
    }
    Ok(())
}

#[test]
fn generated_streams_end_row_by_row() -> Result<()> {
    let model = decoder(6, 1, 2)?;
    let prompt = ints(&[1, 2, 1, 3, 1, 4], &[3, 2])?;
    let options = GenerateOptions { sampling: all_tokens(3.0), eos_tokens: vec![5], seed: 3, ..Default::default() };
    let mut rows = vec![Vec::new(); 3];
    for tokens in model.stream(&prompt, 200, &options)? {
        rows.iter_mut().zip(tokens?).for_each(|(row, token)| row.push(token));
    }
    let end = |row: &Vec<i64>| row.iter().position(|&token| token == 5).expect("every row ends");
    let longest = rows.iter().map(end).max().unwrap();
    assert!(rows.iter().all(|row| row.len() == longest + 1 && row[end(row) + 1..].iter().all(|&token| token == 0)));
    assert!(rows.iter().any(|row| end(row) < longest), "{rows:?}");
    assert_eq!(run(&model, &prompt, 200, &options)?, rows);
    // Rows that end early do not change the others.
    for (at, row) in rows.iter().enumerate() {
        let options = GenerateOptions { row_seeds: Some(vec![3]), ..options.clone() };
        if at == 0 {
            assert_eq!(run(&model, &prompt.narrow(0, 0, 1)?, 200, &options)?[0], row[..=end(row)]);
        }
    }
    Ok(())
}

/// A token that no row can get ends none: it is a mistake.
#[test]
fn ends_are_tokens() -> Result<()> {
    let model = decoder(6, 1, 2)?;
    let prompt = ints(&[1, 2], &[1, 2])?;
    for eos in [6, -1, i64::MAX, i64::MIN] {
        let options = GenerateOptions { eos_tokens: vec![eos], ..Default::default() };
        let errors = [
            model.generate(&prompt, 2, &options, &mut |_| true).err(),
            model.beam_search(&prompt, 2, &BeamOptions { beams: 2, length_penalty: 1.0 }, &options).err(),
            model.generate_with_draft(&model, 2, &prompt, 2, &options, &mut |_| true).err(),
        ];
        for error in errors {
            let message = error.expect("no such token").to_string();
            assert!(message.contains("eos_tokens") && message.contains("0..6"), "{message}");
        }
    }
    Ok(())
}

/// The turns of a chat end with the token that ends a text.
#[test]
fn ends_in_prompts_count_or_not() -> Result<()> {
    let model = decoder(6, 1, 2)?;
    let prompt = ints(&[1, 5, 2, 3], &[2, 2])?;
    let counted = GenerateOptions { sampling: greedy(), eos_tokens: vec![5], ..Default::default() };
    let open = GenerateOptions { eos_in_prompt: false, ..counted.clone() };
    let plain = GenerateOptions { eos_tokens: vec![], ..counted.clone() };
    let free = run(&model, &prompt, 6, &plain)?;
    let until = |row: &[i64]| row.iter().take_while(|&&token| token != 5).copied().collect::<Vec<_>>();
    let both = |options: &GenerateOptions| -> Result<[Vec<Vec<i64>>; 3]> {
        let one = BeamOptions { beams: 1, length_penalty: 0.0 };
        let beams = model.beam_search(&prompt, 6, &one, options)?;
        let beams = beams.into_iter().map(|row| until(&row[0].tokens)).collect();
        let (drafted, _) = model.generate_with_draft(&model, 2, &prompt, 6, options, &mut |_| true)?;
        let width = drafted.shape()[1].max(1);
        let drafted = drafted.to_vec::<i64>()?.chunks(width).map(until).collect();
        Ok([run(&model, &prompt, 6, options)?.iter().map(|row| until(row)).collect(), beams, drafted])
    };
    for way in both(&open)? {
        assert_eq!(way, free.iter().map(|row| until(row)).collect::<Vec<_>>());
    }
    let [stream, beams, drafted] = both(&counted)?;
    // Rows that have ended are padded, or empty if each row has its own length.
    assert!(stream[0].iter().all(|&token| token == 0) && drafted[0].iter().all(|&token| token == 0));
    assert!(beams[0].is_empty() && beams[1] == until(&free[1]) && stream[1] == beams[1] && drafted[1] == beams[1]);
    Ok(())
}

/// A row ends after one token that directly follows another.
#[derive(Clone, Debug)]
struct PairEnd {
    pair: [i64; 2],
    last: Option<i64>,
}

impl RowEnd for PairEnd {
    fn push(&mut self, token: i64) -> Result<bool> {
        let ended = self.last == Some(self.pair[0]) && token == self.pair[1];
        self.last = Some(token);
        Ok(ended)
    }

    fn boxed_clone(&self) -> Box<dyn RowEnd> {
        Box::new(self.clone())
    }
}

/// The new tokens of each row up to its end, one by one and with a draft. Those of beams end there too, if not elsewhere.
fn every_way(
    model: &AutoregressiveWrapper,
    prompt: &Tensor,
    options: &GenerateOptions,
    until: &dyn Fn(usize, &[i64]) -> usize,
) -> Result<[Vec<Vec<i64>>; 2]> {
    let cut = |(number, row): (usize, &[i64])| row[..until(number, row)].to_vec();
    let stream = run(model, prompt, 40, options)?.iter().map(Vec::as_slice).enumerate().map(cut).collect();
    let (drafted, _) = model.generate_with_draft(&decoder(8, 1, 8)?, 3, prompt, 40, options, &mut |_| true)?;
    let width = drafted.shape()[1].max(1);
    let mut closed = 0;
    for beams in [1, 4] {
        let found = model.beam_search(prompt, 12, &BeamOptions { beams, length_penalty: 1.0 }, options)?;
        for (number, row) in found.iter().enumerate() {
            for Hypothesis { tokens, .. } in row {
                assert_eq!(until(number, tokens), tokens.len(), "{tokens:?} of row {number} goes on after its end");
                closed += usize::from(tokens.len() < 12);
            }
        }
    }
    assert!(closed > 0, "no beam has ended");
    Ok([stream, drafted.to_vec::<i64>()?.chunks(width).enumerate().map(cut).collect()])
}

/// Each row ends at the first of several tokens, however it is generated.
#[test]
fn rows_end_at_the_first_of_several_tokens() -> Result<()> {
    let model = decoder(8, 1, 3)?;
    let prompt = ints(&[1, 2, 3, 4, 5, 6, 1, 7], &[4, 2])?;
    let free = GenerateOptions { sampling: greedy(), repetition_penalty: 1.5, ..Default::default() };
    let rows = run(&model, &prompt, 40, &free)?;
    let mut ends = std::collections::BTreeSet::new();
    for eos_tokens in [vec![6, 0], vec![0, 6, 3], vec![2, 5], vec![7, 7]] {
        let until = |_: usize, row: &[i64]| {
            row.iter().position(|token| eos_tokens.contains(token)).map_or(row.len(), |at| at + 1)
        };
        let options = GenerateOptions { eos_tokens: eos_tokens.clone(), eos_in_prompt: false, ..free.clone() };
        let expected: Vec<Vec<i64>> = rows.iter().map(|row| row[..until(0, row)].to_vec()).collect();
        ends.extend(expected.iter().filter(|row| row.len() < 40).filter_map(|row| row.last().copied()));
        for way in every_way(&model, &prompt, &options, &until)? {
            assert_eq!(way, expected, "{eos_tokens:?}");
        }
        // A prompt that has one of them has ended, if prompts count.
        let counted = GenerateOptions { eos_in_prompt: true, ..options };
        let filled = run(&model, &prompt, 40, &counted)?;
        for (row, tokens) in filled.iter().enumerate() {
            let begins = prompt.to_vec::<i64>()?[2 * row..][..2].iter().any(|token| eos_tokens.contains(token));
            assert_eq!(tokens.iter().all(|&token| token == 0), begins || tokens.is_empty(), "{row}: {tokens:?}");
        }
    }
    assert!(ends.len() >= 3, "only {ends:?} ended rows");
    Ok(())
}

/// Rows end at their own end tokens, each at another place; beams with a common beginning have separate states.
#[test]
fn rows_end_at_their_own_end_tokens() -> Result<()> {
    let model = decoder(8, 1, 3)?;
    let prompt = ints(&[1, 2, 3, 4, 5, 6], &[3, 2])?;
    let free = GenerateOptions { sampling: greedy(), repetition_penalty: 1.5, ..Default::default() };
    let rows = run(&model, &prompt, 40, &free)?;
    let pairs: Vec<[i64; 2]> = rows.iter().zip([3, 7, 1]).map(|(row, at)| [row[at], row[at + 1]]).collect();
    let end = |pair: &[i64; 2]| Box::new(PairEnd { pair: *pair, last: None }) as Box<dyn RowEnd>;
    let options = GenerateOptions { row_ends: pairs.iter().map(end).collect(), ..free.clone() };
    let of_row =
        |pair: &[i64; 2], row: &[i64]| row.windows(2).position(|two| two == pair).map_or(row.len(), |at| at + 2);
    let expected: Vec<Vec<i64>> =
        rows.iter().zip(&pairs).map(|(row, pair)| row[..of_row(pair, row)].to_vec()).collect();
    assert!(expected.iter().all(|row| row.len() < 20), "{expected:?}");
    for way in every_way(&model, &prompt, &options, &|number, row| of_row(&pairs[number], row))? {
        assert_eq!(way, expected);
    }
    // Tokens after an end are padding.
    for (row, own) in run(&model, &prompt, 40, &options)?.iter().zip(&expected) {
        assert!(row[own.len()..].iter().all(|&token| token == 0), "{row:?}");
    }
    let fewer = GenerateOptions { row_ends: vec![end(&pairs[0])], ..free };
    let message = model.generate(&prompt, 2, &fewer, &mut |_| true).expect_err("two are missing").to_string();
    assert!(message.contains("row_ends") && message.contains("none or 3"), "{message}");
    Ok(())
}

#[test]
fn generated_repetitions_are_penalised() -> Result<()> {
    let model = decoder(30, 1, 4)?;
    let prompt = ints(&[7], &[1, 1])?;
    let options = GenerateOptions { sampling: greedy(), repetition_penalty: 1e9, ..Default::default() };
    let row = run(&model, &prompt, 10, &options)?.remove(0);
    let mut seen = vec![7];
    for token in row {
        // A negative logit that is multiplied is never the best as long as another one exists.
        assert!(!seen.contains(&token), "{token} after {seen:?}");
        seen.push(token);
    }
    let wrong = |penalty| GenerateOptions { repetition_penalty: penalty, ..GenerateOptions::default() };
    for penalty in [0.0, -1.0, f64::NAN] {
        let error = model.stream(&prompt, 1, &wrong(penalty)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Option { key, .. } if key == "repetition_penalty"), "{error}");
    }
    Ok(())
}

#[test]
fn generation_refuses_incompatible_options() -> Result<()> {
    let model = decoder(20, 1, 5)?;
    let prompt = ints(&[1, 2, 3, 4], &[2, 2])?;
    let defaults = GenerateOptions::default;
    let mask = ForwardOptions { mask: Some(Tensor::ones([2, 2], DType::Bool, device())?), ..Default::default() };
    for (options, key) in [
        (GenerateOptions { prompt_lengths: Some(vec![1]), ..defaults() }, "prompt_lengths"),
        (GenerateOptions { prompt_lengths: Some(vec![0, 1]), ..defaults() }, "prompt_lengths"),
        (GenerateOptions { prompt_lengths: Some(vec![3, 1]), ..defaults() }, "prompt_lengths"),
        (GenerateOptions { prompt_lengths: Some(vec![1, 1]), forward: mask, ..defaults() }, "prompt_lengths"),
        (GenerateOptions { left_padded: true, ..defaults() }, "left_padded"),
        (GenerateOptions { prefill_chunk: 0, ..defaults() }, "prefill_chunk"),
        (GenerateOptions { row_seeds: Some(vec![1]), ..defaults() }, "row_seeds"),
    ] {
        let error = model.stream(&prompt, 1, &options).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Option { key: found, .. } if found == key), "{error}");
    }
    let none = BeamOptions { beams: 0, ..Default::default() };
    let error = model.beam_search(&prompt, 3, &none, &defaults()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Option { key, .. } if key == "beams"), "{error}");
    let nan = BeamOptions { length_penalty: f64::NAN, ..Default::default() };
    let error = model.beam_search(&prompt, 3, &nan, &defaults()).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Option { key, .. } if key == "length_penalty"), "{error}");
    let other = decoder(19, 1, 5)?;
    let error = model.generate_with_draft(&other, 3, &prompt, 4, &defaults(), &mut |_| true).unwrap_err().to_string();
    assert!(error.contains("draft") && error.contains("19"), "{error}");
    let error = model.generate_with_draft(&model, 0, &prompt, 4, &defaults(), &mut |_| true).unwrap_err().to_string();
    assert!(error.contains("`ahead`: expected at least 1, got 0"), "{error}");
    Ok(())
}

/// Every way to generate, which must all fail.
fn all_fail(model: &AutoregressiveWrapper, prompt: &Tensor, expected: &str) -> Result<()> {
    let by_rows = GenerateOptions { repetition_penalty: 1.2, ..Default::default() };
    let first = GenerateOptions { sampling: greedy(), ..Default::default() };
    for options in [GenerateOptions { sampling: all_tokens(1.0), ..Default::default() }, first, by_rows] {
        let beams = BeamOptions::default();
        let errors = [
            model.generate(prompt, 3, &options, &mut |_| true).err(),
            model.beam_search(prompt, 3, &beams, &options).err(),
            model.generate_with_draft(model, 2, prompt, 3, &options, &mut |_| true).err(),
        ];
        for (way, error) in errors.into_iter().enumerate() {
            let error = error.map_or("none".to_string(), |error| error.to_string());
            assert!(error.contains(expected), "{way} {:?}: {error}", options.sampling);
        }
    }
    Ok(())
}

#[test]
fn invalid_prompts_are_refused() -> Result<()> {
    let model = decoder(20, 1, 5)?;
    for shape in [&[0][..], &[1, 0], &[0, 3]] {
        all_fail(&model, &ints(&[], shape)?, "expected at least one token")?;
    }
    all_fail(&model, &ints(&[1; 4], &[1, 2, 2])?, "[batch, n] or [n]")?;
    all_fail(&model, &Tensor::ones([1, 2], DType::F32, device())?, "expected i64")?;
    all_fail(&model, &ints(&[1, 20], &[2])?, "20")?;
    all_fail(&model, &ints(&[-1, 2], &[2])?, "-1")
}

/// NaN weights give an error that says so, not tokens.
#[test]
fn broken_weights_are_reported() -> Result<()> {
    let layers = json!({"kind": "Decoder", "dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8});
    let value = json!({"model": "TransformerWrapper", "num_tokens": 20, "max_seq_len": 14, "attn_layers": layers});
    let Config::TransformerWrapper(net) = Config::from_value(value)? else { unreachable!() };
    let store = ParamStore::new(1, DType::F64, device());
    let model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..AutoregressiveConfig::default() }, &store)?;
    let params = store.params();
    let table = params.get("net.token_emb.weight").expect("a table of tokens");
    table.set(Tensor::full(*table.tensor().shape(), f64::NAN, DType::F64, device())?)?;
    all_fail(&model, &ints(&[1, 2], &[2])?, "weights are broken")
}

/// Inside a tape, generation records nothing for a backward pass.
#[test]
fn generation_works_inside_of_a_tape() -> Result<()> {
    let model = decoder(20, 2, 5)?;
    let prompt = ints(&[1, 2, 3], &[1, 3])?;
    let options = GenerateOptions { sampling: greedy(), ..Default::default() };
    let outside = run(&model, &prompt, 9, &options)?;
    let _tape = Tape::grad();
    assert_eq!(run(&model, &prompt, 9, &options)?, outside);
    Ok(())
}

#[test]
fn encoder_decoders_generate_with_a_cache() -> Result<()> {
    let side = |kind: &str| json!({"num_tokens": 12, "max_seq_len": 10, "depth": 2, "heads": 2, "attn_dim_head": 8, "kind": kind});
    let flat = |prefix: &str, side: Value| {
        let side = side.as_object().unwrap().clone().into_iter().filter(|(key, _)| key != "kind");
        side.map(|(key, value)| (format!("{prefix}{key}"), value)).collect::<Vec<_>>()
    };
    let mut value = json!({"model": "XTransformer", "dim": 16});
    value.as_object_mut().unwrap().extend(flat("enc_", side("Encoder")));
    value.as_object_mut().unwrap().extend(flat("dec_", side("Decoder")));
    let Config::XTransformer(config) = Config::from_value(value)? else { unreachable!() };
    let store = ParamStore::new(4, DType::F64, device());
    let model = XTransformer::new(&config, &store)?;
    unsettle(&store.params(), 4)?;
    let (source, start) = (random_tokens(1, &[2, 7], 12)?, ints(&[1, 1], &[2, 1])?);
    let mask: Vec<bool> = (0..14).map(|i| i < 11).collect();
    let masks =
        EncoderDecoderOptions { src_mask: Some(Tensor::from_vec(mask, [2, 7], device())?), ..Default::default() };
    let generate = |recompute: bool| {
        let options = GenerateOptions { sampling: greedy(), recompute, ..Default::default() };
        model.generate(&source, &start, 14, &masks, &options, &mut |_| true)?.to_vec::<i64>()
    };
    assert_eq!(generate(false)?, generate(true)?);
    Ok(())
}

/// The embeddings of an image are the context of a decoder; beams keep it.
#[test]
fn images_are_captioned_with_a_cache() -> Result<()> {
    let vision = json!({"model": "ViTransformerWrapper", "image_size": 16, "patch_size": 8,
        "attn_layers": {"kind": "Encoder", "dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8}});
    let Config::ViTransformerWrapper(vision) = Config::from_value(vision)? else { unreachable!() };
    let encoder = ViTransformerWrapper::new(&vision, &ParamStore::new(1, DType::F64, device()))?;
    let layers =
        json!({"kind": "Decoder", "dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8, "cross_attend": true});
    let decoder =
        model_of(json!({"model": "TransformerWrapper", "num_tokens": 12, "max_seq_len": 8, "attn_layers": layers}), 2)?;
    let images = Tensor::generate([2, 3, 16, 16], DType::F64, device(), |i| ((i * 37 % 11) as f64 - 5.0) / 3.0)?;
    let forward = ForwardOptions { context: Some(encoder.forward(&images, true)?), ..Default::default() };
    let options = GenerateOptions { sampling: greedy(), forward, ..Default::default() };
    let start = ints(&[1, 1], &[2, 1])?;
    let anew = GenerateOptions { recompute: true, ..options.clone() };
    assert_eq!(run(&decoder, &start, 12, &options)?, run(&decoder, &start, 12, &anew)?);
    let beams = BeamOptions { beams: 3, ..Default::default() };
    let tokens = |options: &GenerateOptions| -> Result<Vec<Vec<i64>>> {
        let found = decoder.beam_search(&start, 6, &beams, options)?;
        Ok(found.into_iter().flatten().map(|hypothesis| hypothesis.tokens).collect())
    };
    assert_eq!(tokens(&options)?, tokens(&anew)?);
    Ok(())
}

#[test]
fn continuous_sequences_grow_in_a_cache() -> Result<()> {
    let layers = json!({"kind": "Decoder", "dim": 16, "depth": 2, "heads": 2, "attn_dim_head": 8, "rel_pos_bias": true,
                        "shift_tokens": 1});
    let value = json!({"model": "ContinuousTransformerWrapper", "dim_in": 3, "dim_out": 3, "max_seq_len": 10,
                       "attn_layers": layers});
    let Config::ContinuousTransformerWrapper(config) = Config::from_value(value)? else { unreachable!() };
    let store = ParamStore::new(4, DType::F64, device());
    let model = ContinuousAutoregressiveWrapper::new(&config, &store)?;
    unsettle(&store.params(), 4)?;
    let start = Tensor::generate([2, 4, 3], DType::F64, device(), |i| (i as f64).sin())?;
    let new = model.generate(&start, 11, &ForwardOptions::default())?;
    let mut all = start;
    for step in 0..11 {
        let seen = all.dim(1)?.min(10);
        let window = all.narrow(1, all.dim(1)? - seen, seen)?;
        let out = model.net.forward(&window, &ForwardOptions::default())?.out.narrow(1, seen - 1, 1)?;
        let (a, b) = (out.to_f64_vec()?, new.narrow(1, step, 1)?.to_f64_vec()?);
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-10), "step {step}");
        all = Tensor::cat(&[&all, &out], 1)?;
    }
    Ok(())
}
