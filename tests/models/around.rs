//! Models around others: ends of rows, and random draws.

use serde_json::{Value, json};
use x_transformers::{
    DType, Device, ParamStore, Result, Tensor,
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
