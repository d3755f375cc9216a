//! Guarantees of the models: validation, generation, memories, initial values.

mod encoder_decoder;
mod generation;

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
