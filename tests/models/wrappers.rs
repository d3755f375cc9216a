//! Guarantees of the models: validation, generation, memories, initial values.

use std::collections::BTreeMap;

use x_transformers::{
    DType, Device, ErrorKind, ParamStore, Result, Tape, Tensor,
    config::{
        AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, Call, Config, ContinuousTransformerWrapperConfig,
        FilterLogits, SamplingConfig, TransformerWrapperConfig, ViTransformerWrapperConfig,
    },
    models::{
        AutoregressiveWrapper, ContinuousAutoregressiveWrapper, EncoderDecoderOptions, ForwardOptions, GenerateOptions,
        Model, RunOptions, TransformerWrapper, ViTransformerWrapper, XTransformer, filter_probabilities,
    },
};

const CPU: Device = Device::Cpu;

fn layers(config: AttentionLayersConfig) -> AttentionLayersConfig {
    AttentionLayersConfig { heads: 2, attn: AttentionConfig { dim_head: 8, ..config.attn.clone() }, ..config }
}

fn decoder() -> AttentionLayersConfig {
    layers(AttentionLayersConfig::decoder(16, 2))
}

fn wrapper(attn_layers: AttentionLayersConfig) -> TransformerWrapperConfig {
    TransformerWrapperConfig { num_tokens: 20, max_seq_len: 10, attn_layers, ..Default::default() }
}

fn build(config: &TransformerWrapperConfig) -> Result<TransformerWrapper> {
    TransformerWrapper::new(config, &ParamStore::new(1, DType::F64, &CPU))
}

fn autoregressive(config: AutoregressiveConfig) -> Result<AutoregressiveWrapper> {
    AutoregressiveWrapper::new(&config, &ParamStore::new(1, DType::F32, &CPU))
}

fn ints(values: &[i64], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &CPU)
}

fn bools(values: &[bool], shape: &[usize]) -> Result<Tensor> {
    Tensor::from_slice(values, shape, &CPU)
}

fn tokens(b: usize, n: usize) -> Result<Tensor> {
    ints(&(0..b * n).map(|i| (i * i + 2 * i) as i64 % 20).collect::<Vec<_>>(), &[b, n])
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    let (a, b) = (a.to_f64_vec()?, b.to_f64_vec()?);
    assert_eq!(a.len(), b.len());
    Ok(a.iter()
        .zip(&b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst }))
}

/// Checks that a call fails with a message that contains all of these.
fn refused<T: std::fmt::Debug>(outcome: Result<T>, parts: &[&str]) {
    let message = outcome.expect_err("accepted").to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` does not name `{part}`");
    }
}

#[test]
fn models_refuse_bad_tokens() -> Result<()> {
    let model = build(&wrapper(decoder()))?;
    let none = ForwardOptions::default();
    let outside = model.forward(&ints(&[1, 20, 3], &[1, 3])?, &none).unwrap_err();
    assert!(matches!(outside.kind(), ErrorKind::Index { index: 20, limit: 20, .. }), "{outside}");
    refused(model.forward(&ints(&[1, -1, 3], &[1, 3])?, &none), &["token_emb", "-1"]);
    refused(model.forward(&tokens(1, 11)?, &none), &["11", "max_seq_len", "10"]);
    refused(model.forward(&ints(&[1, 2], &[2])?, &none), &["tokens", "[2]"]);
    refused(model.forward(&Tensor::ones([1, 2], DType::F64, &CPU)?, &none), &["tokens", "f64"]);
    Ok(())
}

#[test]
fn models_refuse_bad_masks_and_contexts() -> Result<()> {
    let model = build(&wrapper(decoder()))?;
    let x = tokens(2, 5)?;
    let keep = |shape: &[usize]| Tensor::ones(shape, DType::Bool, &CPU);
    let context = Tensor::ones([2, 3, 16], DType::F64, &CPU)?;
    let none = ForwardOptions::default;
    let plain = [
        (ForwardOptions { mask: Some(keep(&[2, 4])?), ..none() }, vec!["mask", "[2, 5]", "[2, 4]"]),
        (ForwardOptions { mask: Some(tokens(2, 5)?), ..none() }, vec!["mask", "bool", "i64"]),
        (ForwardOptions { attn_mask: Some(keep(&[5, 4])?), ..none() }, vec!["attn_mask", "[2, 2, 5, 5]", "[5, 4]"]),
        (ForwardOptions { attn_mask: Some(keep(&[5])?), ..none() }, vec!["attn_mask", "[5]"]),
        (ForwardOptions { attn_mask: Some(tokens(5, 5)?), ..none() }, vec!["attn_mask", "bool", "i64"]),
        (ForwardOptions { context: Some(context.clone()), ..none() }, vec!["context", "layers with cross-attention"]),
        (
            ForwardOptions { context_mask: Some(keep(&[2, 3])?), ..none() },
            vec!["context_mask", "layers with cross-attention"],
        ),
        (ForwardOptions { mems: Some(vec![]), ..none() }, vec!["mems", "2", "0"]),
        (
            ForwardOptions { mems: Some(vec![context.clone(), Tensor::ones([1, 3, 16], DType::F64, &CPU)?]), ..none() },
            vec!["mems", "[2, memories, 16]", "[1, 3, 16]"],
        ),
        (ForwardOptions { return_mems: true, ..none() }, vec!["max_mem_len", "return_mems"]),
        (
            ForwardOptions { return_attn: true, checkpoint_layers: true, ..none() },
            vec!["checkpoint_layers", "return_attn"],
        ),
    ];
    for (options, parts) in plain {
        refused(model.forward(&x, &options), &parts);
    }
    let crossed = build(&wrapper(AttentionLayersConfig { cross_attend: true, ..decoder() }))?;
    let wide = Tensor::ones([2, 3, 12], DType::F64, &CPU)?;
    let narrow = context.to_dtype(DType::F32)?;
    let cases = [
        (none(), vec!["context", "missing"]),
        (ForwardOptions { context: Some(wide), ..none() }, vec!["context", "16", "12"]),
        (ForwardOptions { context: Some(narrow), ..none() }, vec!["context", "f64", "f32"]),
        (
            ForwardOptions { context: Some(context), context_mask: Some(keep(&[2, 4])?), ..none() },
            vec!["context_mask", "[2, 3]", "[2, 4]"],
        ),
    ];
    for (options, parts) in cases {
        refused(crossed.forward(&x, &options), &parts);
    }
    Ok(())
}

#[test]
fn models_loss_needs_targets() -> Result<()> {
    let model = autoregressive(AutoregressiveConfig { net: wrapper(decoder()), ..Default::default() })?;
    refused(model.loss(&tokens(2, 1)?, &ForwardOptions::default()), &["loss", "[2, 1]"]);
    refused(model.loss(&ints(&[1, 2], &[2])?, &ForwardOptions::default()), &["loss", "[2]"]);
    // Eleven tokens are ten inputs and ten targets.
    assert!(model.loss(&tokens(2, 11)?, &ForwardOptions::default())?.item()?.is_finite());
    refused(model.loss(&tokens(2, 12)?, &ForwardOptions::default()), &["net", "max_seq_len"]);
    Ok(())
}

/// Half precision ends before the logits: neither the logits nor the mean of many losses are rounded to it.
#[test]
fn models_losses_of_half_precision_are_f32() -> Result<()> {
    let continuous = ContinuousTransformerWrapperConfig {
        max_seq_len: 6,
        dim_in: Some(3),
        dim_out: Some(3),
        attn_layers: decoder(),
        ..Default::default()
    };
    let none = ForwardOptions::default();
    for dtype in [DType::BF16, DType::F16] {
        let stores = [ParamStore::new(1, dtype, &CPU), ParamStore::new(1, dtype, &CPU)];
        let config = AutoregressiveConfig { net: wrapper(decoder()), ..Default::default() };
        let tokenwise = AutoregressiveWrapper::new(&config, &stores[0])?;
        let vectorwise = ContinuousAutoregressiveWrapper::new(&continuous, &stores[1])?;
        let (x, vectors) = (tokens(2, 7)?, Tensor::generate([2, 5, 3], dtype, &CPU, |i| (i as f64).sin())?);

        let embeddings = ForwardOptions { return_embeddings: true, ..Default::default() };
        let embeddings = tokenwise.net.forward(&x.narrow(1, 0, 6)?, &embeddings)?.out.to_dtype(DType::F64)?;
        let params = stores[0].params();
        let exact = |name: &str| params.get(name).map(|param| param.tensor().detach().to_dtype(DType::F64)).transpose();
        let weight = exact("net.to_logits.weight")?.expect("a head");
        let logits = embeddings.linear(&weight, exact("net.to_logits.bias")?.as_ref())?;
        let token_loss = logits.cross_entropy(&x.narrow(1, 1, 6)?, -100)?.item()?;
        let predicted = vectorwise.net.forward(&vectors.narrow(1, 0, 4)?, &none)?.out.to_dtype(DType::F64)?;
        let targets = vectors.narrow(1, 1, 4)?.to_dtype(DType::F64)?;
        let vector_loss = predicted.sub(&targets)?.square()?.mean(&[])?.item()?;

        for (store, exact, loss) in [
            (&stores[0], token_loss, &(|| tokenwise.loss(&x, &none)) as &dyn Fn() -> Result<Tensor>),
            (&stores[1], vector_loss, &|| vectorwise.loss(&vectors, &none)),
        ] {
            let mut tape = Tape::grad();
            let loss = loss()?;
            assert_eq!((loss.dtype(), loss.rank()), (DType::F32, 0));
            // A rounding to eleven bits would be seen in the fourth digit.
            assert!((loss.item()? - exact).abs() < 1e-6 * exact, "{dtype}: {} instead of {exact}", loss.item()?);
            let grads = tape.backward(&loss)?;
            assert!(grads.unused(&store.params()).is_empty());
            assert!(grads.tensors().all(|grad| grad.dtype() == dtype));
        }
    }
    Ok(())
}

/// Requests that a loss or a continuation cannot return are an error, not dropped silently.
#[test]
fn models_losses_return_only_the_loss() -> Result<()> {
    let model = autoregressive(AutoregressiveConfig { net: wrapper(decoder()), ..Default::default() })?;
    let continuous =
        ContinuousTransformerWrapperConfig { max_seq_len: 6, attn_layers: decoder(), ..Default::default() };
    let vectorwise = ContinuousAutoregressiveWrapper::new(&continuous, &ParamStore::new(1, DType::F32, &CPU))?;
    let (x, vectors) = (tokens(1, 4)?, Tensor::ones([1, 4, 16], DType::F32, &CPU)?);
    let none = ForwardOptions::default;
    for (options, name) in [
        (ForwardOptions { return_embeddings: true, ..none() }, "return_embeddings"),
        (ForwardOptions { return_mems: true, ..none() }, "return_mems"),
        (ForwardOptions { return_attn: true, ..none() }, "return_attn"),
    ] {
        refused(model.loss(&x, &options), &["loss", name]);
        refused(vectorwise.loss(&vectors, &options), &["loss", name]);
        refused(vectorwise.generate(&vectors, 1, &options), &["generate", name]);
        let generate = GenerateOptions { forward: options, ..Default::default() };
        refused(model.generate(&x, 1, &generate, &mut |_| true), &["generate", name]);
    }
    Ok(())
}

/// A row without any key left attends to all keys equally, later ones included, on either path.
#[test]
fn models_fully_masked_rows_are_uniform() -> Result<()> {
    let key_values = |attn: AttentionConfig| AttentionConfig { num_mem_kv: 2, ..attn };
    let with_memory =
        |layers: AttentionLayersConfig| AttentionLayersConfig { attn: key_values(layers.attn.clone()), ..layers };
    let encoder = layers(AttentionLayersConfig::encoder(16, 2));
    for (layers, keys, seen) in [(encoder, 5, 5), (decoder(), 5, 5), (with_memory(decoder()), 7, 2)] {
        let model = build(&wrapper(layers))?;
        let padding = bools(&[false, true, true, true, true, false, false, false, false, false], &[2, 5])?;
        let masks = [
            (ForwardOptions { mask: Some(padding), ..Default::default() }, seen),
            (
                ForwardOptions { attn_mask: Some(Tensor::zeros([5, keys], DType::Bool, &CPU)?), ..Default::default() },
                keys,
            ),
        ];
        for (options, seen) in masks {
            let shown = model.forward(&tokens(2, 5)?, &ForwardOptions { return_attn: true, ..options.clone() })?;
            for attn in &shown.attn {
                // The first query of the second sequence sees nothing.
                let weights = attn.select(0, 1)?.select(1, 0)?.to_f64_vec()?;
                if seen == keys {
                    assert!(weights.iter().all(|weight| (weight - 1.0 / keys as f64).abs() < 1e-12), "{weights:?}");
                } else {
                    // Memory key/values are not masked by padding.
                    assert!(weights.chunks(keys).all(|row| (row[..seen].iter().sum::<f64>() - 1.0).abs() < 1e-12));
                }
            }
            assert!(largest_difference(&model.forward(&tokens(2, 5)?, &options)?.out, &shown.out)? < 1e-12);
        }
    }
    Ok(())
}

/// Rows without any key left are finite, and nothing is ever NaN.
#[test]
fn models_fully_masked_rows_are_finite() -> Result<()> {
    for layers in [decoder(), AttentionLayersConfig { residual_attn: true, ..decoder() }] {
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            let store = ParamStore::new(1, dtype, &CPU);
            let model = TransformerWrapper::new(&wrapper(layers.clone()), &store)?;
            let options = ForwardOptions {
                mask: Some(bools(&[false, true, true, false, false, false], &[2, 3])?),
                attn_mask: Some(bools(&[true, true, true, false, false, false, true, true, true], &[3, 3])?),
                ..Default::default()
            };
            let mut tape = Tape::grad();
            let out = model.forward(&tokens(2, 3)?, &options)?.out;
            let grads = tape.backward_with(&out, &Tensor::ones(*out.shape(), dtype, &CPU)?)?;
            assert!(out.to_f64_vec()?.iter().all(|x| x.is_finite()), "{dtype}");
            for grad in grads.tensors() {
                assert!(grad.to_f64_vec()?.iter().all(|x| x.is_finite()), "{dtype}");
            }
        }
    }
    Ok(())
}

#[test]
fn models_empty_batches_are_legal() -> Result<()> {
    let model =
        build(&wrapper(AttentionLayersConfig { shift_tokens: serde_json::from_str("1").unwrap(), ..decoder() }))?;
    for shape in [[0, 3], [2, 0]] {
        let out = model.forward(&ints(&[], &shape)?, &ForwardOptions::default())?.out;
        assert_eq!(out.shape()[..], [shape[0], shape[1], 20]);
    }
    Ok(())
}

/// Post-norm layers with ALiBi depend only on relative positions, and normalise nothing between memory and attention:
/// segments with memories are equivalent to one long sequence.
#[test]
fn models_segments_with_memories_equal_one_sequence() -> Result<()> {
    let layers = AttentionLayersConfig { alibi_pos_bias: true, pre_norm: false, ..decoder() };
    let config = TransformerWrapperConfig { max_mem_len: Some(0), use_pos_emb: false, ..wrapper(layers) };
    let model = build(&config)?;
    let x = tokens(2, 10)?;
    let whole = model.forward(&x, &ForwardOptions::default())?.out;
    let mut mems = None;
    for (start, len) in [(0, 4), (4, 1), (5, 5)] {
        let options = ForwardOptions { mems: mems.take(), return_mems: true, ..Default::default() };
        let output = model.forward(&x.narrow(1, start, len)?, &options)?;
        assert!(largest_difference(&output.out, &whole.narrow(1, start, len)?)? < 1e-12);
        assert_eq!(output.mems[0].shape()[..], [2, start + len, 16]);
        mems = Some(output.mems);
    }
    Ok(())
}

#[test]
fn models_memories_are_cut_and_masked_tokens_stay_out() -> Result<()> {
    let model = build(&TransformerWrapperConfig { max_mem_len: Some(3), ..wrapper(decoder()) })?;
    let mut options = ForwardOptions { return_mems: true, ..Default::default() };
    let first = model.forward(&tokens(1, 5)?, &options)?;
    assert!(first.mems.iter().all(|mem| mem.shape()[..] == [1, 3, 16]));
    options.mems = Some(first.mems);
    // A mask covers the tokens of the segment; memories are kept.
    let all = model.forward(&tokens(1, 4)?, &options)?.out;
    options.mask = Some(Tensor::ones([1, 4], DType::Bool, &CPU)?);
    assert!(largest_difference(&model.forward(&tokens(1, 4)?, &options)?.out, &all)? < 1e-12);
    options.mask = Some(bools(&[false, true, true, true], &[1, 4])?);
    assert!(largest_difference(&model.forward(&tokens(1, 4)?, &options)?.out, &all)? > 1e-6);
    Ok(())
}

/// Greedy generation by hand: the argmax after the last tokens that fit.
#[test]
fn models_generate_greedily() -> Result<()> {
    let model = autoregressive(AutoregressiveConfig { net: wrapper(decoder()), ..Default::default() })?;
    let greedy = SamplingConfig { temperature: 0.0, ..Default::default() };
    let options = GenerateOptions { sampling: greedy, ..Default::default() };
    let prompt = tokens(2, 4)?;
    let mut streamed = Vec::new();
    let new = model.generate(&prompt, 9, &options, &mut |tokens| {
        streamed.push(tokens.to_vec());
        true
    })?;
    let mut rows: Vec<Vec<i64>> = prompt.to_vec::<i64>()?.chunks(4).map(<[i64]>::to_vec).collect();
    for streamed in &streamed {
        let window: Vec<i64> = rows.iter().flat_map(|row| row[row.len().saturating_sub(10)..].to_vec()).collect();
        let n = window.len() / 2;
        let logits = model.net.forward(&ints(&window, &[2, n])?, &ForwardOptions::default())?.out;
        let best = logits.select(1, n - 1)?.argmax(-1)?.to_vec::<i64>()?;
        assert_eq!(*streamed, best);
        rows.iter_mut().zip(best).for_each(|(row, token)| row.push(token));
    }
    assert_eq!(streamed.len(), 9);
    assert_eq!(new.to_vec::<i64>()?, [&rows[0][4..], &rows[1][4..]].concat());
    // One-dimensional prompts give one-dimensional results, and rows do not depend on their batch.
    let alone = model.generate(&prompt.select(0, 1)?, 9, &options, &mut |_| true)?;
    assert_eq!(alone.shape()[..], [9]);
    assert_eq!(alone.to_vec::<i64>()?, rows[1][4..]);
    Ok(())
}

#[test]
fn models_generate_the_same_from_the_same_seed() -> Result<()> {
    let model = autoregressive(AutoregressiveConfig { net: wrapper(decoder()), ..Default::default() })?;
    let sampling = SamplingConfig { filter_logits_fn: FilterLogits::None, temperature: 5.0, ..Default::default() };
    let generate = |seed: u64, prompt: &Tensor| {
        let options = GenerateOptions { sampling: sampling.clone(), seed, ..Default::default() };
        model.generate(prompt, 12, &options, &mut |_| true)?.to_vec::<i64>()
    };
    let prompt = tokens(2, 3)?;
    let (one, two) = (generate(1, &prompt)?, generate(2, &prompt)?);
    assert_eq!(one, generate(1, &prompt)?);
    assert_ne!(one, two);
    assert_eq!(one[..12], generate(1, &prompt.narrow(0, 0, 1)?)?);
    Ok(())
}

#[test]
fn models_generate_stops() -> Result<()> {
    let model = autoregressive(AutoregressiveConfig { net: wrapper(decoder()), pad_value: 7, ..Default::default() })?;
    let all = SamplingConfig { filter_logits_fn: FilterLogits::None, temperature: 100.0, ..Default::default() };
    let prompt = tokens(2, 3)?;
    // The caller stops it.
    let mut calls = 0;
    let options = GenerateOptions { sampling: all.clone(), ..Default::default() };
    let new = model.generate(&prompt, 50, &options, &mut |_| {
        calls += 1;
        calls < 4
    })?;
    assert_eq!((new.shape()[1], calls), (4, 4));
    // Every row ends: tokens after the first end are padding.
    let options = GenerateOptions { sampling: all, eos_tokens: vec![5], ..Default::default() };
    let new = model.generate(&prompt, 400, &options, &mut |_| true)?;
    let n = new.shape()[1];
    assert!(n < 400);
    for row in new.to_vec::<i64>()?.chunks(n) {
        let end = row.iter().position(|&token| token == 5).expect("every row has ended");
        assert!(row[end + 1..].iter().all(|&token| token == 7), "{row:?}");
    }
    // The prompt counts: a row that has ended there is padded.
    let ended = ints(&[5, 1, 5, 2], &[2, 2])?;
    assert_eq!(model.generate(&ended, 9, &options, &mut |_| true)?.shape()[..], [2, 0]);
    let open = GenerateOptions { eos_tokens: vec![19], ..options.clone() };
    let new = model.generate(&ints(&[19, 3], &[2, 1])?, 2, &open, &mut |_| true)?.to_vec::<i64>()?;
    assert!(!new[2..].contains(&19) && new[..2] == [7, 7], "{new:?}");
    // Nothing to do, and nothing to start from.
    assert_eq!(model.generate(&prompt, 0, &options, &mut |_| true)?.shape()[..], [2, 0]);
    refused(model.generate(&ints(&[], &[2, 0])?, 3, &options, &mut |_| true), &["start_tokens", "[2, 0]"]);
    refused(model.generate(&ints(&[], &[0, 2])?, 3, &options, &mut |_| true), &["start_tokens", "[0, 2]"]);
    refused(model.generate(&ints(&[99], &[1])?, 3, &options, &mut |_| true), &["99"]);
    Ok(())
}

/// The prompt's mask grows with the tokens and slides with the window: padding in front never matters.
#[test]
fn models_generate_with_a_prompt_mask() -> Result<()> {
    let model = autoregressive(AutoregressiveConfig { net: wrapper(decoder()), ..Default::default() })?;
    let mask = bools(&[false, true, true, true], &[1, 4])?;
    let options = GenerateOptions {
        sampling: SamplingConfig { temperature: 0.0, ..Default::default() },
        forward: ForwardOptions { mask: Some(mask), ..Default::default() },
        ..Default::default()
    };
    let generate = |padding: i64, options: &GenerateOptions| {
        model.generate(&ints(&[padding, 4, 9, 2], &[1, 4])?, 12, options, &mut |_| true)?.to_vec::<i64>()
    };
    let padded = generate(5, &options)?;
    assert_eq!(padded, generate(17, &options)?);
    let seen = GenerateOptions { forward: ForwardOptions::default(), ..options };
    assert!((0..20).any(|token| generate(token, &seen).is_ok_and(|tokens| tokens != padded)));
    let short = bools(&[true], &[1, 1])?;
    let wrong =
        GenerateOptions { forward: ForwardOptions { mask: Some(short), ..Default::default() }, ..Default::default() };
    refused(model.generate(&tokens(1, 4)?, 2, &wrong, &mut |_| true), &["mask", "[1, 4]", "[1, 1]"]);
    Ok(())
}

#[test]
fn sampling_filters_keep_what_they_say() -> Result<()> {
    let probabilities = [0.5, 0.25, 0.15, 0.06, 0.04];
    let logits = vec![probabilities.iter().map(|p: &f64| p.ln()).collect::<Vec<_>>()];
    let kept = |config: SamplingConfig| -> Result<Vec<f64>> { Ok(filter_probabilities(&logits, &config)?.remove(0)) };
    let with = |filter_logits_fn: FilterLogits| SamplingConfig { filter_logits_fn, ..Default::default() };
    let normal = |n: usize| {
        let sum: f64 = probabilities[..n].iter().sum();
        (0..5).map(|i| if i < n { probabilities[i] / sum } else { 0.0 }).collect::<Vec<_>>()
    };
    let cases = [
        // 0.22.0: ⌈0.1 · 5⌉ tokens, and the mass 0.1.
        (with(FilterLogits::TopK), normal(1)),
        (SamplingConfig { filter_thres: 0.5, ..with(FilterLogits::TopK) }, normal(3)),
        (SamplingConfig { k: Some(2), ..with(FilterLogits::TopK) }, normal(2)),
        (SamplingConfig { k: Some(99), ..with(FilterLogits::TopK) }, normal(5)),
        (with(FilterLogits::TopP), normal(1)),
        (SamplingConfig { filter_thres: 0.3, ..with(FilterLogits::TopP) }, normal(2)),
        (with(FilterLogits::Nucleus), normal(3)),
        (SamplingConfig { filter_thres: 0.7, ..with(FilterLogits::Nucleus) }, normal(2)),
        (SamplingConfig { filter_thres: 1.0, ..with(FilterLogits::Nucleus) }, normal(5)),
        (SamplingConfig { min_p_ratio: 0.3, ..with(FilterLogits::MinP) }, normal(3)),
        (SamplingConfig { min_p_ratio: 1.0, ..with(FilterLogits::MinP) }, normal(1)),
        (with(FilterLogits::None), normal(5)),
        (SamplingConfig { temperature: 0.0, ..with(FilterLogits::None) }, normal(1)),
        (SamplingConfig { temperature: 1e-300, ..with(FilterLogits::None) }, normal(1)),
        (
            SamplingConfig { min_p_ratio: 0.5, ..with(FilterLogits::TopA) },
            vec![1.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.0, 0.0],
        ),
    ];
    for (config, expected) in cases {
        let actual = kept(config.clone())?;
        let close = actual.iter().zip(&expected).all(|(a, e)| (a - e).abs() < 1e-12);
        assert!(close, "{config:?} gave {actual:?}, expected {expected:?}");
    }
    for (config, key) in [
        (SamplingConfig { temperature: -1.0, ..Default::default() }, "temperature"),
        (SamplingConfig { temperature: f64::NAN, ..Default::default() }, "temperature"),
        (SamplingConfig { filter_thres: 1.5, ..Default::default() }, "filter_thres"),
        (SamplingConfig { k: Some(0), ..Default::default() }, "k"),
        (SamplingConfig { k: Some(3), ..with(FilterLogits::TopP) }, "k"),
        (SamplingConfig { min_p_ratio: -0.1, ..Default::default() }, "min_p_ratio"),
        (SamplingConfig { min_p_pow: f64::INFINITY, ..Default::default() }, "min_p_pow"),
    ] {
        assert!(
            matches!(kept(config).unwrap_err().kind(), ErrorKind::Option { key: found, .. } if found == key),
            "{key}"
        );
    }
    assert!(filter_probabilities(&[vec![f64::NAN, 1.0]], &SamplingConfig::default()).is_err());
    assert!(filter_probabilities(&[vec![]], &SamplingConfig::default()).is_err());
    Ok(())
}

/// Shares of drawn tokens come close to the distribution.
#[test]
fn sampling_draws_the_distribution() -> Result<()> {
    let net = TransformerWrapperConfig { num_tokens: 4, ..wrapper(decoder()) };
    let model = autoregressive(AutoregressiveConfig { net, ..Default::default() })?;
    let prompt = ints(&[0; 4000], &[4000, 1])?;
    let all = SamplingConfig { filter_logits_fn: FilterLogits::None, ..Default::default() };
    let options = GenerateOptions { sampling: all.clone(), seed: 9, ..Default::default() };
    let drawn = model.generate(&prompt, 1, &options, &mut |_| true)?.to_vec::<i64>()?;
    let logits = model.net.forward(&ints(&[0], &[1, 1])?, &ForwardOptions::default())?.out.to_f64_vec()?;
    for (token, p) in filter_probabilities(&[logits], &all)?[0].iter().enumerate() {
        let share = drawn.iter().filter(|&&drawn| drawn == token as i64).count() as f64 / 4000.0;
        // Four standard deviations.
        assert!((share - p).abs() < 4.0 * (p * (1.0 - p) / 4000.0).sqrt(), "token {token}: {share} instead of {p}");
    }
    Ok(())
}

#[test]
fn models_start_as_pytorch_does() -> Result<()> {
    let json = serde_json::json!({
        "model": "TransformerWrapper", "num_tokens": 300, "max_seq_len": 40, "num_memory_tokens": 3,
        "attn_layers": {
            "kind": "Decoder", "dim": 64, "depth": 1, "heads": 3, "attn_dim_head": 20, "use_rezero": true,
            "alibi_pos_bias": true, "alibi_learned": true, "gate_residual": true, "scale_residual": true,
            "attn_gate_values": true, "attn_head_scale": true, "use_qk_norm_attn": true, "qk_norm_attn_seq_len": 64,
            "attn_num_mem_kv": 5, "attn_talking_heads": true, "zero_init_branch_output": true
        }
    });
    let Config::TransformerWrapper(config) = Config::from_value(json)? else { panic!("another model") };
    let store = ParamStore::new(5, DType::F32, &CPU);
    TransformerWrapper::new(&config, &store)?;
    let params = store.params();
    let values = |name: &str| params.get(name).unwrap_or_else(|| panic!("no {name}")).tensor().to_f64_vec();
    let layer = |name: &str| format!("attn_layers.layers.0.{name}");
    let scale = -((64f64 * 64.0 - 64.0).log2().ln());
    for (name, expected) in [
        (layer("1.g"), 0.0),
        (layer("1.fn.to_v_gate.weight"), 0.0),
        (layer("1.fn.to_v_gate.bias"), 1.0),
        (layer("1.fn.head_scale_params"), 1.0),
        (layer("1.fn.scale"), scale),
        (layer("1.fn.to_out.weight"), 0.0),
        (layer("1.fn.to_out.bias"), 0.0),
        (layer("2.residual_scale"), 1.0),
        ("norm.weight".to_string(), 1.0),
        ("norm.bias".to_string(), 0.0),
    ] {
        assert!(values(&name)?.iter().all(|x| (x - expected).abs() < 1e-6), "{name}");
    }
    // 2^-4 and 2^-8 of two heads, then the first of four heads.
    let slopes: Vec<f64> = values("attn_layers.rel_pos.learned_logslopes")?.iter().map(|x| x.exp()).collect();
    assert!(slopes.iter().zip([1.0 / 16.0, 1.0 / 256.0, 0.25]).all(|(a, e)| (a - e).abs() < 1e-6), "{slopes:?}");
    // Normal ones by their deviation, uniform ones by their bound.
    for (name, deviation) in [
        ("token_emb.weight".to_string(), (2.0f64 / 64.0).sqrt()),
        ("pos_emb.emb.weight".to_string(), 1.0),
        ("memory_tokens".to_string(), 1.0),
        (layer("1.fn.mem_k"), 1.0),
    ] {
        let values = values(&name)?;
        let measured = (values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64).sqrt();
        assert!((measured / deviation - 1.0).abs() < 4.0 / (2.0 * values.len() as f64).sqrt(), "{name}: {measured}");
    }
    for (name, fan_in) in [
        (layer("1.fn.to_q.weight"), 64.0f64),
        (layer("2.gru.weight_hh"), 64.0),
        (layer("2.gru.bias_ih"), 64.0),
        ("to_logits.weight".to_string(), 64.0),
        ("to_logits.bias".to_string(), 64.0),
    ] {
        let largest = values(&name)?.iter().fold(0.0f64, |most, x| most.max(x.abs()));
        let bound = fan_in.powf(-0.5);
        assert!(largest <= bound && largest > 0.95 * bound, "{name}: {largest} for a bound of {bound}");
    }
    Ok(())
}

#[test]
fn vision_refuses_bad_images() -> Result<()> {
    let config = ViTransformerWrapperConfig {
        image_size: 8,
        patch_size: 4,
        attn_layers: layers(AttentionLayersConfig::encoder(16, 1)),
        ..Default::default()
    };
    let model = ViTransformerWrapper::new(&config, &ParamStore::new(1, DType::F32, &CPU))?;
    let image = |shape: [usize; 4]| Tensor::ones(shape, DType::F32, &CPU);
    // A smaller image has fewer patches; without a head the embeddings come back.
    assert_eq!(model.forward(&image([2, 3, 4, 8])?, false)?.shape()[..], [2, 3, 16]);
    refused(model.forward(&image([2, 3, 6, 8])?, false), &["img", "4 by 4", "6 by 8"]);
    refused(model.forward(&image([2, 3, 8, 12])?, false), &["img", "up to 4", "8 by 12"]);
    refused(model.forward(&image([2, 1, 8, 8])?, false), &["img", "[2, 1, 8, 8]"]);
    refused(model.forward(&Tensor::ones([3, 8, 8], DType::F32, &CPU)?, false), &["img", "[3, 8, 8]"]);
    Ok(())
}

/// Image to caption: the decoder attends to the embeddings of the image, whose transformer learns from its loss.
#[test]
fn vision_embeddings_are_a_context() -> Result<()> {
    let config = ViTransformerWrapperConfig {
        image_size: 8,
        patch_size: 4,
        attn_layers: layers(AttentionLayersConfig::encoder(16, 1)),
        ..Default::default()
    };
    let store = ParamStore::new(1, DType::F64, &CPU);
    let image = ViTransformerWrapper::new(&config, &store.at("image"))?;
    let net = wrapper(AttentionLayersConfig { cross_attend: true, ..decoder() });
    let caption =
        AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store.at("caption"))?;
    let pixels = Tensor::generate([2, 3, 8, 8], DType::F64, &CPU, |i| (i as f64 * 0.7).sin())?;
    let x = tokens(2, 6)?;

    let mut tape = Tape::grad();
    let context = image.forward(&pixels, true)?;
    assert_eq!(context.shape()[..], [2, 5, 16]);
    let options = |context: Tensor| ForwardOptions { context: Some(context), ..Default::default() };
    let loss = caption.loss(&x, &options(context))?;
    let grads = tape.backward(&loss)?;
    assert!(grads.unused(&store.params()).is_empty());
    drop(tape);
    // Each image has its own caption.
    let with = |pixels: &Tensor| caption.loss(&x, &options(image.forward(pixels, true)?))?.item();
    assert!((with(&pixels)? - loss.item()?).abs() < 1e-12);
    assert!((with(&pixels.affine(-1.0, 0.0)?)? - loss.item()?).abs() > 1e-6);
    let generate = |pixels: &Tensor| {
        let generate = GenerateOptions { forward: options(image.forward(pixels, true)?), ..Default::default() };
        caption.generate(&x.narrow(1, 0, 1)?, 4, &generate, &mut |_| true)
    };
    assert_eq!(generate(&pixels)?.shape()[..], [2, 4]);
    Ok(())
}

#[test]
fn continuous_sequences_are_predicted_and_continued() -> Result<()> {
    let config = ContinuousTransformerWrapperConfig {
        max_seq_len: 6,
        dim_in: Some(3),
        dim_out: Some(3),
        attn_layers: decoder(),
        ..Default::default()
    };
    let store = ParamStore::new(1, DType::F64, &CPU);
    let model = ContinuousAutoregressiveWrapper::new(&config, &store)?;
    let x = Tensor::generate([2, 5, 3], DType::F64, &CPU, |i| (i as f64).sin())?;
    let none = ForwardOptions::default();
    let out = model.net.forward(&x.narrow(1, 0, 4)?, &none)?.out.to_f64_vec()?;
    let targets = x.narrow(1, 1, 4)?.to_f64_vec()?;
    let errors: Vec<f64> = out.iter().zip(&targets).map(|(a, b)| (a - b).powi(2)).collect();
    assert!((model.loss(&x, &none)?.item()? - errors.iter().sum::<f64>() / 24.0).abs() < 1e-12);
    let mut tape = Tape::train(0);
    let grads = tape.backward(&model.loss(&x, &none)?)?;
    assert!(grads.unused(&store.params()).is_empty());
    drop(tape);
    // The last position is padding in the first row: causal attention of the others does not change.
    let mask = bools(&[true, true, true, false, false, true, true, true, true, true], &[2, 5])?;
    let masked = model.loss(&x, &ForwardOptions { mask: Some(mask), ..none.clone() })?.item()?;
    let kept: f64 = errors.iter().enumerate().filter(|(i, _)| i / 3 != 3).map(|(_, e)| e).sum();
    assert!((masked - kept / 21.0).abs() < 1e-12);

    let new = model.generate(&x, 4, &none)?;
    assert_eq!(new.shape()[..], [2, 4, 3]);
    let first = model.net.forward(&x, &none)?.out.narrow(1, 4, 1)?;
    assert!(largest_difference(&new.narrow(1, 0, 1)?, &first)? < 1e-12);
    assert_eq!(model.generate(&x.select(0, 1)?, 4, &none)?.shape()[..], [4, 3]);
    refused(model.loss(&x.narrow(1, 0, 1)?, &none), &["loss", "[2, 1, 3]"]);
    let wide = ContinuousTransformerWrapperConfig { dim_out: Some(4), ..config };
    refused(ContinuousAutoregressiveWrapper::new(&wide, &ParamStore::new(1, DType::F64, &CPU)), &["dim_out", "3", "4"]);
    Ok(())
}

#[test]
fn encoder_decoder_ties_its_tables() -> Result<()> {
    let side = |kind: AttentionLayersConfig| wrapper(layers(kind));
    let mut config = x_transformers::config::XTransformerConfig {
        enc: side(AttentionLayersConfig::encoder(16, 1)),
        dec: side(AttentionLayersConfig { cross_attend: true, ..AttentionLayersConfig::decoder(16, 1) }),
        tie_token_emb: true,
    };
    let store = ParamStore::new(1, DType::F32, &CPU);
    let model = XTransformer::new(&config, &store)?;
    let params = store.params();
    let leaf = |name: &str| params.get(name).map(|param| param.leaf());
    assert!(leaf("encoder.token_emb.weight").is_some());
    assert_eq!(leaf("encoder.token_emb.weight"), leaf("decoder.net.token_emb.weight"));
    let (src, tgt) = (tokens(2, 6)?, tokens(2, 5)?);
    let mut tape = Tape::train(0);
    let loss = model.loss(&src, &tgt, &EncoderDecoderOptions::default())?;
    let grads = tape.backward(&loss)?;
    // The encoder's own logits are never used.
    assert_eq!(grads.unused(&params), ["encoder.to_logits.bias", "encoder.to_logits.weight"]);
    let generate = GenerateOptions {
        forward: ForwardOptions { context: Some(Tensor::ones([2, 3, 16], DType::F32, &CPU)?), ..Default::default() },
        ..Default::default()
    };
    let outcome = model.generate(&src, &tgt, 2, &EncoderDecoderOptions::default(), &generate, &mut |_| true);
    refused(outcome, &["context", "encoder"]);
    refused(model.loss(&src, &tokens(3, 5)?, &EncoderDecoderOptions::default()), &["context", "[3, length, 16]"]);
    config.enc.tie_embedding = true;
    refused(config.plan(), &["enc", "num_tokens"]);
    Ok(())
}

/// Source masks act in the encoder, and in the decoder's attention to it.
#[test]
fn encoder_decoder_masks() -> Result<()> {
    let side = |kind: AttentionLayersConfig| wrapper(layers(kind));
    let config = x_transformers::config::XTransformerConfig {
        enc: side(AttentionLayersConfig::encoder(16, 1)),
        dec: side(AttentionLayersConfig { cross_attend: true, ..AttentionLayersConfig::decoder(16, 1) }),
        tie_token_emb: false,
    };
    let model = XTransformer::new(&config, &ParamStore::new(1, DType::F64, &CPU))?;
    let (src, tgt) = (tokens(2, 4)?, tokens(2, 5)?);
    let source = bools(&[true, true, true, false, true, true, false, false], &[2, 4])?;
    let target = bools(&[true, false, true, true, true, true, true, true, true, true], &[2, 5])?;
    let pairs = Tensor::arange(4, &CPU)?.unsqueeze(1)?.ge(&Tensor::arange(4, &CPU)?)?;
    let options = EncoderDecoderOptions {
        src_mask: Some(source.clone()),
        tgt_mask: Some(target.clone()),
        src_attn_mask: Some(pairs.clone()),
        ..Default::default()
    };
    let loss = model.loss(&src, &tgt, &options)?.item()?;
    // By hand.
    let encoder = ForwardOptions {
        mask: Some(source.clone()),
        attn_mask: Some(pairs),
        return_embeddings: true,
        ..Default::default()
    };
    let decoder = ForwardOptions {
        mask: Some(target),
        context: Some(model.encoder.forward(&src, &encoder)?.out),
        context_mask: Some(source),
        ..Default::default()
    };
    assert_eq!(model.decoder.loss(&tgt, &decoder)?.item()?, loss);
    let without = |options: EncoderDecoderOptions| model.loss(&src, &tgt, &options)?.item();
    for other in [
        EncoderDecoderOptions { src_mask: None, ..options.clone() },
        EncoderDecoderOptions { tgt_mask: None, ..options.clone() },
        EncoderDecoderOptions { src_attn_mask: None, ..options.clone() },
    ] {
        assert!((without(other)? - loss).abs() > 1e-9);
    }
    let short = Some(Tensor::ones([2, 3], DType::Bool, &CPU)?);
    let wrong = [
        (EncoderDecoderOptions { src_mask: short.clone(), ..Default::default() }, ["encoder", "mask"]),
        (EncoderDecoderOptions { tgt_mask: short.clone(), ..Default::default() }, ["decoder", "mask"]),
        (EncoderDecoderOptions { src_attn_mask: short, ..Default::default() }, ["encoder", "attn_mask"]),
    ];
    for (options, [place, mask]) in wrong {
        refused(model.loss(&src, &tgt, &options), &[place, mask, "[2, 3]"]);
    }
    Ok(())
}

#[test]
fn cross_entropy_of_any_model_equals_that_of_its_logits() -> Result<()> {
    let vision = ViTransformerWrapperConfig {
        image_size: 8,
        patch_size: 4,
        num_classes: Some(20),
        attn_layers: layers(AttentionLayersConfig::encoder(16, 1)),
        ..Default::default()
    };
    let encoder = wrapper(layers(AttentionLayersConfig::encoder(16, 1)));
    let none = RunOptions::default();
    let cases = [
        (
            Config::TransformerWrapper(encoder.clone()),
            vec![("x", tokens(2, 5)?), ("mask", bools(&[true; 10], &[2, 5])?)],
        ),
        (
            Config::TransformerWrapper(TransformerWrapperConfig { tie_embedding: true, ..encoder }),
            vec![("x", tokens(2, 5)?)],
        ),
        (Config::ViTransformerWrapper(vision), vec![("img", Tensor::ones([2, 3, 8, 8], DType::F64, &CPU)?)]),
    ];
    for (config, inputs) in cases {
        let model = Model::new(&config, &ParamStore::new(1, DType::F64, &CPU))?;
        let inputs: BTreeMap<String, Tensor> = inputs.into_iter().map(|(name, x)| (name.to_string(), x)).collect();
        let targets = if inputs.contains_key("img") { ints(&[3, 19], &[2])? } else { tokens(2, 5)? };
        let gradients = |loss: &dyn Fn() -> Result<Tensor>| -> Result<(f64, Vec<Tensor>)> {
            let mut tape = Tape::grad();
            let loss = loss()?;
            let gradients = tape.backward(&loss)?;
            let of_params = model.params().unique().filter_map(|(_, param)| gradients.param(param).cloned());
            Ok((loss.item()?, of_params.collect()))
        };
        let (loss, grads) = gradients(&|| model.cross_entropy(&inputs, &targets, -100, &none))?;
        let (expected, of_logits) =
            gradients(&|| model.forward(&inputs, &Call::default(), &none)?.cross_entropy(&targets, -100))?;
        assert!((loss - expected).abs() < 1e-12, "{loss} instead of {expected}");
        assert!(!grads.is_empty() && grads.len() == of_logits.len());
        for (grad, expected) in grads.iter().zip(&of_logits) {
            assert!(largest_difference(grad, expected)? < 1e-12);
        }
        refused(model.cross_entropy(&inputs, &tokens(1, 3)?, -100, &none), &["targets", "[1, 3]"]);
    }
    let layers = Model::new(&Config::AttentionLayers(decoder()), &ParamStore::new(1, DType::F64, &CPU))?;
    refused(layers.cross_entropy(&BTreeMap::new(), &tokens(1, 3)?, -100, &none), &["TransformerWrapper"]);
    Ok(())
}
