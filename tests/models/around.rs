//! Models around others: ends of rows, and random draws.

use serde_json::{Value, json};
use x_transformers::{
    DType, Device, ParamStore, Result, Tape, Tensor,
    config::{AroundPlan, Config, MaskedCall, v2},
    models::{ForwardOptions, Model, NonAutoregressiveWrapper, RunOptions},
};

fn device() -> Device {
    Device::parse(&std::env::var("XT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_string())).unwrap()
}

fn model(config: Value, device: &Device) -> Result<Model> {
    Model::new(&Config::from_value(config)?, &ParamStore::new(4, DType::F64, device))
}

fn net(kind: &str) -> Value {
    json!({"num_tokens": 9, "max_seq_len": 8, "max_mem_len": 8,
        "attn_layers": {"kind": kind, "dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8}})
}

/// Rows of segments are padded after their end tokens once all have one.
#[test]
fn rows_of_segments_end() -> Result<()> {
    let mut config = json!({"version": "2", "model": "XLAutoregressiveWrapper", "pad_value": 7, "net": net("Decoder"),
        "call": {"method": "generate", "seq_len": 12, "filter_logits_fn": "top_k", "filter_kwargs": {"k": 9}}});
    let prompt = Tensor::from_vec(vec![1i64, 2, 3, 1], [2, 2], &Device::Cpu)?;
    let inputs = [("start_tokens".to_string(), prompt)].into();
    let run = |config: &Value| -> Result<Vec<Vec<i64>>> {
        let (config, call) = Config::with_call(&config.to_string())?;
        let model = Model::new(&config, &ParamStore::new(4, DType::F64, &device()))?;
        let new = model.run(&inputs, &call, &RunOptions::default())?.remove("out").unwrap();
        let width = new.dim(1)?;
        Ok(new.to_vec::<i64>()?.chunks(width).map(<[i64]>::to_vec).collect())
    };
    let open = run(&config)?;
    let end = |eos: i64| open.iter().map(|row| row.iter().position(|&token| token == eos)).collect::<Option<Vec<_>>>();
    // A token that all rows draw, at different steps.
    let (eos, ends) = (0..7).find_map(|eos| Some((eos, end(eos).filter(|ends| ends[0] != ends[1])?))).unwrap();
    config["call"]["eos_token"] = json!(eos);
    let ended = run(&config)?;
    let length = ends.iter().max().unwrap() + 1;
    for ((open, ended), end) in open.iter().zip(&ended).zip(ends) {
        assert_eq!(ended[..=end], open[..=end]);
        assert!(ended.len() == length && ended[end + 1..].iter().all(|&token| token == 7), "{ended:?}");
    }
    Ok(())
}

/// Masks, noise and tokens depend on the seed alone, on every device.
#[test]
fn masked_tokens_are_drawn_from_the_seed() -> Result<()> {
    let config = v2::NonAutoregressiveConfig {
        mask_id: 8,
        steps: 4,
        self_cond: true,
        self_token_critic: true,
        ..Default::default()
    };
    let Config::V2(wrapped) = Config::from_value({
        let mut net = net("Encoder");
        net["version"] = json!("2");
        net["model"] = json!("TransformerWrapper");
        net
    })?
    else {
        panic!("a config of version 2")
    };
    let v2::Config::TransformerWrapper(net) = *wrapped else { panic!("a TransformerWrapper") };
    let config = v2::NonAutoregressiveConfig { net, ..config };
    let build = |device: &Device| -> Result<NonAutoregressiveWrapper> {
        let AroundPlan::Masked(net, plan) = config.plan()? else { panic!("masked tokens") };
        NonAutoregressiveWrapper::new(net, *plan, &ParamStore::new(4, DType::F64, device))
    };
    let (model, other) = (build(&device())?, build(&Device::Cpu)?);
    let options = ForwardOptions::default();
    let tokens = |device: &Device| Tensor::from_vec((0..24i64).map(|i| i * i % 8).collect(), [3, 8], device);
    let mut losses = Vec::new();
    for seed in 0..6 {
        let loss = model.loss(&tokens(&device())?, seed, &options)?.to_f64_vec()?[0];
        let again = other.loss(&tokens(&Device::Cpu)?, seed, &options)?.to_f64_vec()?[0];
        assert!((loss - again).abs() < 1e-9 && loss > 0.0, "{loss}, {again}");
        losses.push(loss);
        let new = model.generate(2, &MaskedCall::default(), seed, &options)?.to_vec::<i64>()?;
        assert_eq!(new, other.generate(2, &MaskedCall::default(), seed, &options)?.to_vec::<i64>()?);
        assert!(new.len() == 16 && new.iter().any(|&token| token != 8), "{new:?}");
    }
    assert!(losses.windows(2).all(|pair| pair[0] != pair[1]), "{losses:?}");
    Ok(())
}

/// Numbers follow their tokens: 0 for tokens that stand for none.
#[test]
fn numbers_are_generated_with_their_tokens() -> Result<()> {
    let mut net = net("Decoder");
    net["numerical_token_id"] = json!(3);
    let config = json!({"version": "2", "model": "XValAutoregressiveWrapper", "net": net});
    let model = model(config, &device())?;
    let inputs = [
        ("start_tokens".to_string(), Tensor::from_vec(vec![3i64, 1, 3, 2], [2, 2], &Device::Cpu)?),
        ("start_numbers".to_string(), Tensor::from_vec(vec![0.5, 0.0, -2.0, 0.0], [2, 2], &Device::Cpu)?),
    ];
    let (_, call) = Config::with_call(
        &json!({"version": "2", "model": "SamplingFilter", "call": {"method": "generate", "seq_len": 30, "temperature": 3.0,
            "filter_logits_fn": "top_k", "filter_kwargs": {"k": 9}}})
        .to_string(),
    )?;
    let out = model.run(&inputs.into(), &call, &RunOptions::default())?;
    let (tokens, numbers) = (out["out"].to_vec::<i64>()?, out["numbers"].to_f64_vec()?);
    assert!(tokens.contains(&3) && tokens.iter().any(|&token| token != 3), "{tokens:?}");
    for (token, number) in tokens.into_iter().zip(numbers) {
        assert_eq!(token == 3, number != 0.0);
    }
    Ok(())
}

/// In training the hard weights of Gumbel noise are draws from the softmax of the scores; the same on every device.
#[test]
fn gumbel_noise_draws_from_the_softmax() -> Result<()> {
    let config = |options: Value| {
        let mut config =
            json!({"version": "2", "model": "Encoder", "dim": 16, "depth": 1, "heads": 1, "attn_dim_head": 16});
        config.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        config
    };
    let x = Tensor::generate([1, 5, 16], DType::F64, &Device::Cpu, |i| 2.0 * ((i * 7) as f64).sin())?;
    let inputs = std::collections::BTreeMap::from([("x".to_string(), x)]);
    let (_, call) = Config::with_call(&config(json!({"call": {"return_attn": true}})).to_string())?;
    let map = |model: &Model| model.run(&inputs, &call, &RunOptions::default())?["attn.0"].to_f64_vec();
    let expected = map(&model(config(json!({})), &device())?)?;
    let hard = model(config(json!({"attn_gumbel_softmax": true, "attn_gumbel_softmax_temp": 0.3})), &device())?;
    let other = model(config(json!({"attn_gumbel_softmax": true, "attn_gumbel_softmax_temp": 0.3})), &Device::Cpu)?;
    let mut counts = [0.0; 25];
    const DRAWS: u64 = 300;
    for seed in 0..DRAWS {
        let drawn = {
            let _tape = Tape::train(seed);
            map(&hard)?
        };
        let again = {
            let _tape = Tape::train(seed);
            map(&other)?
        };
        assert!(drawn.iter().zip(again).all(|(a, b)| (a - b).abs() < 1e-9));
        assert!(drawn.chunks(5).all(|row| row.iter().filter(|&&weight| (weight - 1.0).abs() < 1e-9).count() == 1));
        counts.iter_mut().zip(drawn).for_each(|(count, weight)| *count += weight);
    }
    for (count, p) in counts.into_iter().zip(&expected) {
        let deviation = (DRAWS as f64 * p * (1.0 - p)).sqrt();
        assert!((count - DRAWS as f64 * p).abs() <= 4.5 * deviation + 1.0, "{count} of {DRAWS} draws, expected {p}");
    }
    // Outside of training all weight is on the highest score.
    let best = |row: &[f64]| row.iter().copied().fold(0.0, f64::max);
    for (weights, scores) in map(&hard)?.chunks(5).zip(expected.chunks(5)) {
        assert!(weights.iter().zip(scores).all(|(weight, score)| (*weight > 0.5) == (*score == best(scores))));
    }
    // Queries that see no key attend to all alike, even where a divisor below 1 would make their scores infinite.
    let options =
        json!({"attn_gumbel_softmax": true, "attn_gumbel_softmax_hard": false, "attn_gumbel_softmax_temp": 0.5});
    let mut masked = inputs.clone();
    masked.insert("mask".to_string(), Tensor::from_vec(vec![false; 5], [1, 5], &Device::Cpu)?);
    let weights =
        model(config(options), &device())?.run(&masked, &call, &RunOptions::default())?["attn.0"].to_f64_vec()?;
    assert!(weights.iter().all(|weight| (weight - 0.2).abs() < 1e-9), "{weights:?}");
    // Weights of the softmax without noise are not random, and sum to 1.
    let soft = model(config(json!({"attn_gumbel_softmax": true, "attn_gumbel_softmax_hard": false})), &device())?;
    let _tape = Tape::train(1);
    let weights = map(&soft)?;
    assert!(weights.chunks(5).all(|row| (row.iter().sum::<f64>() - 1.0).abs() < 1e-9 && best(row) < 1.0));
    Ok(())
}

/// Training draws how often the layers run, from 1 to the most; recycled outputs have no gradient.
#[test]
fn recycled_passes_are_drawn() -> Result<()> {
    let mut net = net("Decoder");
    net["recycling"] = json!(true);
    net["train_max_recycle_steps"] = json!(3);
    net["version"] = json!("2");
    net["model"] = json!("TransformerWrapper");
    let model = model(net, &device())?;
    let tokens = Tensor::from_vec(vec![1i64, 2, 3, 4], [1, 4], &Device::Cpu)?;
    let inputs = [("x".to_string(), tokens)].into();
    let run = |steps: Option<usize>| {
        let call = x_transformers::config::Call { recycle_steps: steps, ..Default::default() };
        model.run(&inputs, &call, &RunOptions::default())?["out"].to_f64_vec()
    };
    assert!(run(None).unwrap_err().to_string().contains("recycle_steps"));
    let known = (1..=3).map(|steps| run(Some(steps))).collect::<Result<Vec<_>>>()?;
    // Losses and generated text outside of training take all passes.
    assert_eq!(model.forward(&inputs, &Default::default(), &RunOptions::default())?.to_f64_vec()?, known[2]);
    let mut counts = [0; 3];
    for seed in 0..90 {
        let _tape = Tape::train(seed);
        let drawn = run(None)?;
        let at = known.iter().position(|known| known.iter().zip(&drawn).all(|(a, b)| (a - b).abs() < 1e-12));
        counts[at.unwrap()] += 1;
    }
    assert!(counts.iter().all(|count| (12..=48).contains(count)), "{counts:?}");
    Ok(())
}

/// Training leaves out half of the styles; styles are normal draws of the seed.
#[test]
fn styles_are_drawn_and_left_out() -> Result<()> {
    let config = |dropped: f64| {
        json!({"version": "2", "model": "GPTVAE", "num_tokens": 9, "dim": 16, "depth": 1, "enc_depth": 1, "max_seq_len": 8,
            "heads": 2, "attn_dim_head": 8, "dim_latent": 4, "pad_id": 0, "latents_dropout_prob": dropped,
            "vae_kl_loss_weight": 0.0})
    };
    let tokens = Tensor::from_vec(vec![1i64, 2, 3, 4, 5], [1, 5], &Device::Cpu)?;
    let mut inputs = std::collections::BTreeMap::from([("seq".to_string(), tokens)]);
    let loss = |model: &Model, inputs: &std::collections::BTreeMap<String, Tensor>, seed: u64| {
        let options = RunOptions { seed, ..RunOptions::default() };
        Ok(model.run(inputs, &Default::default(), &options)?["loss"].to_f64_vec()?[0])
    };
    let (half, none, all) =
        (model(config(0.5), &device())?, model(config(0.0), &device())?, model(config(1.0), &device())?);
    let drawn = (0..4).map(|seed| loss(&half, &inputs, seed)).collect::<Result<Vec<f64>>>()?;
    assert!(drawn.windows(2).all(|pair| (pair[0] - pair[1]).abs() > 1e-9), "{drawn:?}");
    inputs.insert("noise".to_string(), Tensor::zeros([1, 4], DType::F64, &Device::Cpu)?);
    let mut counts = [0; 2];
    for seed in 0..64 {
        let trained = |model: &Model| {
            let _tape = Tape::train(seed);
            loss(model, &inputs, 0)
        };
        let (half, none, all) = (trained(&half)?, trained(&none)?, trained(&all)?);
        assert!((none - all).abs() > 1e-9);
        counts[if (half - none).abs() < 1e-12 { 0 } else { 1 }] += 1;
        assert!((half - none).abs() < 1e-12 || (half - all).abs() < 1e-12, "{half}, {none}, {all}");
    }
    assert!(counts.iter().all(|&count| count >= 16), "{counts:?}");
    Ok(())
}

/// Options that a model would ignore, or that contradict each other, are errors that name them.
#[test]
fn ignored_options_are_named() -> Result<()> {
    let mut looped = net("Decoder");
    looped["attn_layers"]["pre_and_post_norm"] = json!(true);
    looped["looped"] = json!(true);
    looped["add_continuous_pred_head"] = json!(true);
    let config = json!({"version": "2", "model": "AutoregressiveWrapper", "net": looped});
    assert!(model(config, &device()).unwrap_err().to_string().contains("add_continuous_pred_head"));
    let vae = json!({"version": "2", "model": "GPTVAE", "num_tokens": 9, "dim": 16, "depth": 1, "enc_depth": 1,
        "max_seq_len": 8, "heads": 2, "attn_dim_head": 8, "dim_latent": 4, "pad_id": 0});
    let belief = json!({"version": "2", "model": "BeliefStateWrapper", "forward_decoder": net("Decoder")});
    let tokens = Tensor::from_vec(vec![1i64, 2, 3], [1, 3], &Device::Cpu)?;
    let inputs = std::collections::BTreeMap::from([("prompts".to_string(), tokens)]);
    for (mut config, call, name) in [
        (vae.clone(), json!({"recycle_steps": 2}), "recycle_steps"),
        (vae.clone(), json!({"looped_steps": 2}), "looped_steps"),
        (vae.clone(), json!({"layers_execute_order": [0]}), "layers_execute_order"),
        (vae.clone(), json!({"method": "generate_with_suffix_cond", "seq_len": 2}), "generate_with_suffix_cond"),
        (belief.clone(), json!({"method": "generate", "seq_len": 2, "eos_token": 1}), "eos_token"),
        (
            belief,
            json!({"method": "generate", "seq_len": 2, "restrict_to_max_seq_len": false}),
            "restrict_to_max_seq_len",
        ),
    ] {
        config["call"] = call;
        let (config, call) = Config::with_call(&config.to_string())?;
        let model = Model::new(&config, &ParamStore::new(4, DType::F64, &device()))?;
        let error = model.run(&inputs, &call, &RunOptions::default()).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    Ok(())
}

/// A prompt without a batch dimension has a style, too.
#[test]
fn one_prompt_has_a_style() -> Result<()> {
    let config = json!({"version": "2", "model": "GPTVAE", "num_tokens": 9, "dim": 16, "depth": 1, "enc_depth": 1,
        "max_seq_len": 8, "heads": 2, "attn_dim_head": 8, "dim_latent": 4, "pad_id": 0,
        "call": {"method": "generate", "seq_len": 3, "temperature": 0.0, "cache_kv": false}});
    let (config, call) = Config::with_call(&config.to_string())?;
    let model = Model::new(&config, &ParamStore::new(4, DType::F64, &device()))?;
    let run = |shape: &[usize], styles: usize| {
        let prompts = Tensor::from_vec(vec![1i64, 2, 3], shape, &Device::Cpu)?;
        let latents = Tensor::generate([styles, 4], DType::F64, &Device::Cpu, |at| at as f64)?;
        let inputs = [("prompts".to_string(), prompts), ("latents".to_string(), latents)].into();
        model.run(&inputs, &call, &RunOptions::default())?["out"].to_vec::<i64>()
    };
    assert_eq!(run(&[3], 1)?, run(&[1, 3], 1)?);
    assert!(run(&[3], 3).unwrap_err().to_string().contains("latents"));
    Ok(())
}
