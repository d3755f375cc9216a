//! The profile of a step: every op of the model is in it, and the times add up to the step.

use std::collections::BTreeSet;

use serde_json::Value;
use x_transformers::{
    DType, ParamStore, Result, Tape, Tensor, checkpoint,
    config::{AutoregressiveConfig, Config},
    models::{AutoregressiveWrapper, ForwardOptions, GenerateOptions},
    profile::{OpProfile, Phase, Profile, Report},
    train::{AdamW, AdamWOptions, ByteText, Ema, Optimizer, TrainOptions, Trainer},
};

mod common;
use common::device;

fn gpt(layers: &str) -> AutoregressiveConfig {
    let json = format!(
        r#"{{"model": "AutoregressiveWrapper", "net": {{"num_tokens": 64, "max_seq_len": 32,
            "attn_layers": {{"kind": "Decoder", "dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 32{layers}}}}}}}"#
    );
    match Config::from_json(&json).expect("a legal config") {
        Config::AutoregressiveWrapper(config) => config,
        other => panic!("{other:?}"),
    }
}

/// A training step under a profile.
fn step(config: &AutoregressiveConfig, dtype: DType) -> Result<Report> {
    let device = device();
    let store = ParamStore::new(0, dtype, device);
    let model = AutoregressiveWrapper::new(config, &store)?;
    let tokens = Tensor::generate([2, 33], DType::I64, device, |i| (i * 7 % 64) as f64)?;
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    let mut ema = Ema::new(&store.params(), 0.9)?;
    let profile = Profile::with_trace()?;
    let mut tape = Tape::train(0);
    let loss = model.loss(&tokens, &ForwardOptions::default())?;
    let gradients = tape.backward(&loss)?;
    optimizer.step(&store.params(), &gradients, 1e-3, Some(1.0))?;
    ema.update(&store.params())?;
    loss.item()?;
    Ok(profile.finish())
}

fn op<'a>(report: &'a Report, phase: Phase, name: &str) -> &'a OpProfile {
    let found = report.ops().find(|op| op.phase == phase && op.name == name);
    found.unwrap_or_else(|| panic!("{name} in {}:\n{report}", phase.name()))
}

/// Calls by name.
fn calls(report: &Report, phase: Phase) -> Vec<(&'static str, u64)> {
    report.ops().filter(|op| op.phase == phase).map(|op| (op.name, op.calls)).collect()
}

#[test]
fn the_profile_has_every_op_of_a_plain_decoder() -> Result<()> {
    let report = step(&gpt(""), DType::F32)?;
    // Two layers: norm, three projections, attention, output; norm, two projections around an activation. Then a norm,
    // and logits with the loss in one. All norms but the first take a sum. A GPU computes the projections in one.
    let linears = if *device() == x_transformers::Device::Cpu { 6 } else { 4 };
    let forward = calls(&report, Phase::Forward);
    for (name, count) in [
        ("linear", 2 * linears + 1),
        ("attention", 2),
        ("add_activation", 2),
        ("add_layer_norm", 4),
        ("cross_entropy", 1),
    ] {
        let expected: u64 = forward.iter().filter(|(op, _)| op.contains(name)).map(|(_, calls)| calls).sum();
        assert_eq!(expected, count, "{name} in {forward:?}");
        let backward = calls(&report, Phase::Backward);
        let expected: u64 = backward.iter().filter(|(op, _)| op.contains(name)).map(|(_, calls)| calls).sum();
        assert_eq!(expected, count, "{name} in {backward:?}");
    }
    assert!(forward.iter().all(|(op, _)| *op != "cat"), "the loss is one op: {forward:?}");
    for name in ["embedding", "layer_norm"] {
        assert!(forward.iter().any(|(op, _)| op.contains(name)), "{name} in {forward:?}");
    }
    assert_eq!(calls(&report, Phase::Update), [("adamw", 1), ("ema", 1), ("gradient_norm", 1)]);
    assert!(op(&report, Phase::Read, "to_f64_vec").calls >= 1);
    Ok(())
}

#[test]
fn the_profile_has_every_op_of_the_options() -> Result<()> {
    for (options, names) in [
        (r#", "rotary_pos_emb": true"#, &["rotary"][..]),
        (r#", "ff_glu": true"#, &["add_glu"]),
        (r#", "use_rmsnorm": true"#, &["clamped_rms_norm", "add_clamped_rms_norm"]),
        (r#", "use_rmsnorm": true, "norm_eps": 1e-6"#, &["rms_norm", "add_rms_norm"]),
        (r#", "use_scalenorm": true"#, &["scale_norm", "add_scale_norm"]),
        (r#", "attn_dropout": 0.1, "ff_dropout": 0.1"#, &["dropout"]),
        (r#", "gate_residual": true"#, &["gru_gate"]),
        (r#", "shift_tokens": 1"#, &["shift_tokens"]),
        (r#", "attn_talking_heads": true"#, &["matmul", "softmax", "where_cond"]),
        (r#", "attn_sparse_topk": 4"#, &["top_k_mask", "softmax"]),
        (r#", "attn_use_entmax15": true"#, &["entmax15"]),
        (r#", "attn_gate_values": true"#, &["sigmoid"]),
    ] {
        let report = step(&gpt(options), DType::F32)?;
        for name in names {
            let found = calls(&report, Phase::Forward);
            assert!(found.iter().any(|(op, _)| op.contains(name)), "{options}: {name} in {found:?}");
            let differentiable = *name != "top_k_mask";
            let found = calls(&report, Phase::Backward);
            assert_eq!(found.iter().any(|(op, _)| op.contains(name)), differentiable, "{options}: {name} in {found:?}");
        }
    }
    Ok(())
}

#[test]
fn times_add_up_to_the_step() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let report = step(&gpt(""), dtype)?;
        let ops: f64 = report.ops().map(|op| op.seconds).sum();
        let whole = report.seconds();
        assert!((ops + report.outside() - whole).abs() < 1e-6 * whole + 1e-6, "{ops} of {whole}");
        assert!(0.0 < ops && ops <= whole * (1.0 + 1e-6) && report.outside() > 0.0, "{ops} of {whole}:\n{report}");
        assert!(report.ops().all(|op| op.calls > 0 && op.seconds > 0.0 && op.bytes > 0.0), "{report}");
    }
    Ok(())
}

#[test]
fn operations_of_products_are_exact() -> Result<()> {
    let report = step(&gpt(""), DType::F32)?;
    let linears = |phase| -> f64 {
        report.ops().filter(|op| op.phase == phase && op.name.contains("linear")).map(|op| op.operations).sum()
    };
    // Per layer four projections to or from twice the width, and two of four times the width.
    let layers = 2.0 * 64.0 * (2.0 * (4.0 * 32.0 * 64.0 + 8.0 * 32.0 * 32.0));
    // Logits, whose gradients are computed in place.
    let logits = 2.0 * 64.0 * 32.0 * 64.0;
    assert_eq!((linears(Phase::Forward), linears(Phase::Backward)), (layers + 3.0 * logits, 2.0 * layers));
    // Scores and sums of two layers, two sequences, two heads, and the pairs that causality keeps.
    let attention = 2.0 * 2.0 * 2.0 * (32.0 * 33.0 / 2.0) * 4.0 * 32.0;
    assert_eq!(op(&report, Phase::Forward, "attention").operations, attention);
    assert_eq!(op(&report, Phase::Backward, "attention").operations, 2.5 * attention);
    Ok(())
}

/// A segment that runs again is counted by its ops.
#[test]
fn a_checkpointed_segment_runs_forward_twice() -> Result<()> {
    let device = device();
    let x = Tensor::ones([8, 8], DType::F32, device)?.requires_grad()?;
    let profile = Profile::start()?;
    let mut tape = Tape::grad();
    let y = checkpoint(|x| x[0].softmax()?.exp(), &[&x])?.sum(&[])?;
    let _ = tape.backward(&y)?;
    let report = profile.finish();
    assert_eq!(op(&report, Phase::Forward, "softmax").calls, 2);
    assert_eq!(op(&report, Phase::Backward, "softmax").calls, 1);
    assert_eq!(op(&report, Phase::Backward, "checkpoint").calls, 1);
    Ok(())
}

#[test]
fn generation_reads_and_samples() -> Result<()> {
    let device = device();
    let store = ParamStore::new(0, DType::F32, device);
    let model = AutoregressiveWrapper::new(&gpt(""), &store)?;
    let prompt = Tensor::from_slice(&[1i64, 2, 3], [3], device)?;
    let profile = Profile::start()?;
    let _ = model.generate(&prompt, 4, &GenerateOptions::default(), &mut |_| true)?;
    let report = profile.finish();
    assert_eq!(op(&report, Phase::Forward, "sample").calls, 4);
    assert!(calls(&report, Phase::Backward).is_empty());
    Ok(())
}

#[test]
fn one_profile_at_a_time() -> Result<()> {
    let x = Tensor::ones([2, 2], DType::F32, device())?;
    let profile = Profile::start()?;
    let message = Profile::start().map(drop).unwrap_err().to_string();
    assert!(message.contains("already"), "{message}");
    // Another thread has its own.
    std::thread::spawn(|| Profile::start().map(drop)).join().expect("no panic")?;
    let _ = x.exp()?;
    assert_eq!(calls(&profile.finish(), Phase::Forward), [("exp", 1)]);
    // One that is dropped is over.
    drop(Profile::start()?);
    let _ = x.exp()?;
    assert!(Profile::start()?.finish().ops().next().is_none());
    Ok(())
}

/// An error in a backward rule leaves the profile usable.
#[test]
fn errors_keep_the_profile_intact() -> Result<()> {
    let x = Tensor::ones([2, 2], DType::F32, device())?.requires_grad()?;
    let profile = Profile::start()?;
    let mut tape = Tape::grad();
    assert!(tape.backward(&x.exp()?).is_err());
    drop(tape);
    let mut tape = Tape::grad();
    let _ = tape.backward(&x.exp()?.sum(&[])?)?;
    let report = profile.finish();
    assert_eq!(op(&report, Phase::Forward, "exp").calls, 2);
    assert_eq!(op(&report, Phase::Backward, "exp").calls, 1);
    Ok(())
}

#[test]
fn reports_add_up_and_become_traces() -> Result<()> {
    let mut total = step(&gpt(""), DType::F32)?;
    let (once, seconds) = (op(&total, Phase::Forward, "attention").calls, total.seconds());
    total.add(step(&gpt(""), DType::F32)?);
    assert_eq!(op(&total, Phase::Forward, "attention").calls, 2 * once);
    assert!(total.seconds() > seconds);

    let mut trace = Vec::new();
    total.write_trace(&mut trace).expect("memory is large enough");
    let trace: Value = serde_json::from_slice(&trace).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    assert_eq!(events.len() as u64, total.ops().map(|op| op.calls).sum::<u64>());
    let mut end = 0.0;
    for event in events {
        let [start, time] = ["ts", "dur"].map(|key| event[key].as_f64().expect("a number"));
        assert!(start >= end - 1.0 && time >= 0.0, "{event}");
        end = start + time;
        assert_eq!(event["ph"], "X");
    }
    let phases: BTreeSet<&str> = events.iter().filter_map(|event| event["cat"].as_str()).collect();
    assert_eq!(phases, BTreeSet::from(["forward", "backward", "update", "read"]));

    let table = total.to_string();
    for part in ["FLOP/s", "bytes/s", "forward", "backward", "update", "adamw", "outside of ops", "whole"] {
        assert!(table.contains(part), "{part} in\n{table}");
    }
    Ok(())
}

#[test]
fn a_trainer_is_watched() -> Result<()> {
    let options = TrainOptions { steps: 2, warmup: 1, seq_len: 16, batch_size: 2, ..Default::default() };
    let text = ByteText::from_bytes("0123456789+-*/ ".repeat(40))?;
    let mut trainer = Trainer::new(gpt(""), options, text, device())?;
    let profile = Profile::start()?;
    trainer.step()?;
    let report = profile.finish();
    assert_eq!(op(&report, Phase::Update, "adamw").calls, 1);
    Ok(())
}
