//! Training: schedule, moving averages, text, options, and the loop, whose results do not depend on kills.

#[path = "training/deferred.rs"]
mod deferred;
#[path = "training/killed.rs"]
mod killed;
#[path = "training/text.rs"]
mod text;

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use x_transformers::{
    DType, Error, ErrorKind, Init, ParamMap, ParamStore, Philox, Result, Tape, Tensor,
    config::{
        AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, FeedForwardConfig, TransformerWrapperConfig,
    },
    io::{read_safetensors, write_safetensors},
    models::{AutoregressiveWrapper, ForwardOptions},
    train::{Batch, BatchSource, ByteText, Checkpoint, Ema, OptimizerKind, Schedule, TrainOptions, Trainer},
};

use super::Folder;
use crate::common::{device, name_of};

const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];

/// Normal numbers rounded to eight bits, so that every float type holds them exactly.
fn numbers(stream: u64, count: usize, scale: f64) -> Vec<f64> {
    let random = Philox::new(5, stream);
    (0..count).map(|i| half::bf16::from_f64(scale * random.normal(i as u64)).to_f64()).collect()
}

fn largest_error(actual: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let scale = expected.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    actual.iter().zip(expected).map(|(a, e)| (a - e).abs() / scale).fold(0.0, f64::max)
}

#[test]
fn schedule_values() {
    let schedule = Schedule { lr: 1e-3, warmup: 30, steps: 300, final_ratio: 0.1 };
    for step in 0..300u64 {
        let expected = if step < 30 {
            1e-3 * (step + 1) as f64 / 30.0
        } else {
            let cosine = (std::f64::consts::PI * (step - 30) as f64 / 270.0).cos();
            1e-3 * (0.1 + 0.9 * 0.5 * (1.0 + cosine))
        };
        assert!((schedule.at(step) - expected).abs() < 1e-17, "step {step}");
    }
    assert_eq!(schedule.at(29), 1e-3);
    assert_eq!(schedule.at(30), 1e-3);
    assert!((schedule.at(165) - 0.55e-3).abs() < 1e-15);
    for behind in [300, 301, u64::MAX] {
        assert!((schedule.at(behind) - 1e-4).abs() < 1e-17);
    }
    // No warm-up, and only warm-up.
    assert_eq!(Schedule { warmup: 0, ..schedule }.at(0), 1e-3);
    let only = Schedule { warmup: 300, ..schedule };
    assert_eq!((only.at(149), only.at(299)), (0.5e-3, 1e-3));
    assert!(only.at(300).is_finite() && Schedule { warmup: 400, ..schedule }.at(299).is_finite());
}

#[test]
fn ema_follows_its_formula_and_swaps() -> Result<()> {
    for dtype in FLOATS {
        let store = ParamStore::new(0, dtype, device());
        let param = store.param("p", [20_000], Init::Normal(1.0))?;
        let mut expected = param.tensor().to_f64_vec()?;
        let mut ema = Ema::new(&store.params(), 0.9)?;
        for step in 0..20 {
            let values = numbers(step, 20_000, 1.0);
            param.set(Tensor::from_slice(&values, [20_000], device())?.to_dtype(dtype)?)?;
            ema.update(&store.params())?;
            expected.iter_mut().zip(&values).for_each(|(average, value)| *average = 0.9 * *average + 0.1 * value);
        }
        let average = &ema.state_dict()["p"];
        assert_eq!(average.dtype(), if dtype == DType::F64 { DType::F64 } else { DType::F32 });
        let error = largest_error(&average.to_f64_vec()?, &expected);
        assert!(error < if dtype == DType::F64 { 1e-14 } else { 1e-6 }, "{dtype}: {error:e}");

        let last = param.tensor().to_f64_vec()?;
        let swapped = ema.swap_in(&store.params())?;
        assert_eq!(param.tensor().to_f64_vec()?, average.to_dtype(dtype)?.to_f64_vec()?);
        drop(swapped);
        assert_eq!(param.tensor().to_f64_vec()?, last);

        let mut other = Ema::new(&store.params(), 0.5)?;
        other.load_state_dict(&ema.state_dict())?;
        assert_eq!(other.state_dict()["p"].to_f64_vec()?, average.to_f64_vec()?);
        let wrong = BTreeMap::from([("q".to_string(), average.clone())]);
        match other.load_state_dict(&wrong).map_err(Error::into_kind) {
            Err(ErrorKind::Weights { missing, unused, .. }) => {
                assert_eq!((missing, unused), (vec!["p".to_string()], vec!["q".to_string()]));
            }
            result => panic!("{result:?}"),
        }
    }
    // Other parameters than those it was created for.
    let ema = Ema::new(&ParamMap::default(), 0.5)?;
    let store = ParamStore::new(0, DType::F32, device());
    store.param("p", [1], Init::Constant(0.0))?;
    assert!(ema.clone().update(&store.params()).is_err() && ema.swap_in(&store.params()).is_err());
    for decay in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(Ema::new(&store.params(), decay).map_err(Error::into_kind), Err(ErrorKind::Option { .. })));
    }
    Ok(())
}

#[test]
fn options_are_checked() {
    let fine = TrainOptions::default();
    assert!(fine.check(256).is_ok());
    let cases = [
        ("batch_size", TrainOptions { batch_size: 0, ..fine.clone() }),
        ("accumulate", TrainOptions { accumulate: 0, ..fine.clone() }),
        ("accumulate", TrainOptions { accumulate: usize::MAX, ..fine.clone() }),
        ("steps", TrainOptions { steps: u64::MAX, ..fine.clone() }),
        ("seq_len", TrainOptions { seq_len: 0, ..fine.clone() }),
        ("seq_len", TrainOptions { seq_len: 257, ..fine.clone() }),
        ("lr", TrainOptions { lr: f64::NAN, ..fine.clone() }),
        ("lr", TrainOptions { lr: f64::INFINITY, ..fine.clone() }),
        ("lr", TrainOptions { lr: 0.0, ..fine.clone() }),
        ("lr", TrainOptions { lr: -1.0, ..fine.clone() }),
        ("clip", TrainOptions { clip: 0.0, ..fine.clone() }),
        ("clip", TrainOptions { clip: f64::NAN, ..fine.clone() }),
        ("final_lr_ratio", TrainOptions { final_lr_ratio: 1.5, ..fine.clone() }),
        ("ema_decay", TrainOptions { ema_decay: Some(2.0), ..fine.clone() }),
        ("weight_decay", TrainOptions { weight_decay: -1.0, ..fine.clone() }),
        ("beta1", TrainOptions { beta1: 1.0, ..fine.clone() }),
        ("beta2", TrainOptions { beta2: f64::NAN, ..fine.clone() }),
        ("eps", TrainOptions { eps: -1.0, ..fine.clone() }),
        ("momentum", TrainOptions { momentum: Some(0.9), ..fine.clone() }),
        ("momentum", TrainOptions { optimizer: OptimizerKind::Muon, momentum: Some(1.0), ..fine.clone() }),
        ("beta1", TrainOptions { optimizer: OptimizerKind::Lion, beta1: 1.0, ..fine.clone() }),
        ("dtype", TrainOptions { dtype: DType::I64, ..fine.clone() }),
    ];
    for (name, options) in cases {
        match options.check(256).map_err(Error::into_kind) {
            Err(ErrorKind::Option { key, why }) => assert_eq!(key, name, "{why}"),
            other => panic!("{name}: {other:?}"),
        }
    }
    let json = serde_json::to_string(&fine).unwrap();
    assert_eq!(serde_json::from_str::<TrainOptions>(&json).unwrap(), fine);
    assert!(serde_json::from_str::<TrainOptions>(r#"{"learning_rate": 1}"#).is_err());
}

/// A text with something to learn.
fn text() -> ByteText {
    let words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "it"];
    let random = Philox::new(1, 1);
    let text: Vec<&str> = (0..2000).map(|i| words[random.below(i, words.len() as u64) as usize]).collect();
    ByteText::from_bytes(text.join(" ")).expect("a text")
}

/// A small decoder.
fn config(dropout: f64) -> AutoregressiveConfig {
    let attn_layers = AttentionLayersConfig {
        heads: 2,
        attn: AttentionConfig { dim_head: 16, dropout, ..Default::default() },
        ff: FeedForwardConfig { dropout, ..Default::default() },
        ..AttentionLayersConfig::decoder(32, 1)
    };
    let net = TransformerWrapperConfig { num_tokens: 128, max_seq_len: 32, attn_layers, ..Default::default() };
    AutoregressiveConfig { net, ..Default::default() }
}

fn options(steps: u64) -> TrainOptions {
    TrainOptions { steps, warmup: 3, lr: 1e-2, batch_size: 4, seq_len: 24, ..Default::default() }
}

fn trainer(dropout: f64, options: TrainOptions) -> Result<Trainer> {
    Trainer::new(config(dropout), options, text(), device())
}

/// The bits of everything that a run has learned.
fn bits(trainer: &Trainer, folder: &Path) -> (Vec<u8>, Vec<u8>) {
    trainer.save(folder).expect("a checkpoint");
    files(folder)
}

fn files(folder: &Path) -> (Vec<u8>, Vec<u8>) {
    let read = |name| fs::read(folder.join(name)).expect(name);
    (read("model.safetensors"), read("optimizer.safetensors"))
}

#[test]
fn trainer_learns() -> Result<()> {
    let (plain, averaged) =
        ([DType::F32, DType::BF16, DType::F16, DType::F64].map(|dtype| (dtype, None)), (DType::F32, Some(0.8)));
    for (dtype, ema_decay) in plain.into_iter().chain([averaged]) {
        let mut trainer = trainer(0.0, TrainOptions { dtype, ema_decay, ..options(40) })?;
        let start = trainer.validate()?;
        // An untrained model guesses among 128 bytes.
        assert!((start - 128f64.ln()).abs() < 0.7, "{start}");
        let mut losses = Vec::new();
        while trainer.steps_done() < trainer.options().steps {
            let report = trainer.step()?;
            assert_eq!(report.step + 1, trainer.steps_done());
            assert_eq!(report.tokens, 4 * 24);
            assert_eq!(report.lr, trainer.options().schedule().at(report.step));
            // Gradients of an ordinary loss do not overflow f16 anywhere near the initial scale of a run.
            assert!(report.grad_norm > 0.0 && report.grad_norm.is_finite() && !report.skipped);
            losses.push(report.loss);
        }
        let end = trainer.validate()?;
        assert!(end < 0.75 * start, "{dtype}: validation from {start} to {end}");
        assert!(losses[39] < 0.75 * losses[0], "{dtype}: {losses:?}");
        let seen = trainer.losses();
        assert_eq!((seen.last, seen.last_validation), (Some(losses[39]), Some(end)));
        assert_eq!(seen.best, losses.iter().copied().reduce(f64::min));
        assert_eq!(seen.best_validation, Some(end.min(start)));
    }
    Ok(())
}

/// A step is the mean gradient over the micro-batches, clipped, then the optimizer.
#[test]
fn trainer_step_is_its_definition() -> Result<()> {
    for (dtype, tolerance) in [(DType::F64, 1e-12), (DType::F32, 1e-4)] {
        let options = TrainOptions { accumulate: 3, clip: 0.5, dtype, seed: 11, ..options(10) };
        let mut trainer = trainer(0.0, options.clone())?;
        let store = ParamStore::new(11, dtype, device());
        let model = AutoregressiveWrapper::new(&config(0.0), &store)?;
        let mut optimizer = options.build_optimizer(&store.params())?;
        for step in 0..3 {
            let report = trainer.step()?;
            let mut tape = Tape::grad();
            let mut mean: Option<Tensor> = None;
            for micro in 0..3 {
                let request = options.request(step, micro, 128);
                let tokens = text().batch(&request)?.tokens.to_device(device())?;
                let loss = model.loss(&tokens, &ForwardOptions::default())?.affine(1.0 / 3.0, 0.0)?;
                mean = Some(match mean {
                    Some(mean) => mean.add(&loss)?,
                    None => loss,
                });
            }
            let mean = mean.expect("three losses");
            assert!((mean.item()? - report.loss).abs() <= 10.0 * tolerance);
            let grads = tape.backward(&mean)?;
            let info = optimizer.step(&store.params(), &grads, options.schedule().at(step), Some(0.5))?;
            assert!((info.grad_norm - report.grad_norm).abs() <= tolerance * info.grad_norm, "{step} {dtype}");
        }
        for (name, param) in store.params().iter() {
            let (expected, actual) = (param.tensor(), trainer.params().get(name).expect(name).tensor());
            // Adam divides by the size of a gradient: where that is all rounding, so is the update.
            let error = largest_error(&actual.to_f64_vec()?, &expected.to_f64_vec()?);
            assert!(error <= 100.0 * tolerance, "{dtype} {name}: {error:e}");
        }
    }
    Ok(())
}

fn with_threads<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool").install(f)
}

#[test]
fn trainer_same_bits_for_any_number_of_threads() {
    let folder = Folder::new("threads");
    let run = |threads: usize| {
        with_threads(threads, || {
            let mut trainer = trainer(0.1, TrainOptions { accumulate: 2, ..options(5) }).expect("a trainer");
            for _ in 0..4 {
                trainer.step().expect("a step");
            }
            bits(&trainer, &folder.0.join(threads.to_string()))
        })
    };
    let one = run(1);
    assert!(run(2) == one && run(5) == one);
}

/// A run that is saved, dropped and resumed every few steps has the same bits as an uninterrupted one, with dropout,
/// averaged weights, several micro-batches, every type and every optimizer.
#[test]
fn trainer_resume_is_exact() -> Result<()> {
    let folder = Folder::new("resume");
    let optimizers = OptimizerKind::ALL.map(|optimizer| (DType::F32, optimizer));
    for (dtype, optimizer) in FLOATS.map(|dtype| (dtype, OptimizerKind::AdamW)).into_iter().chain(optimizers) {
        let own = TrainOptions { dtype, optimizer, ..options(9) };
        let options = TrainOptions { accumulate: 2, ema_decay: Some(0.9), lr: 1.0 / 300.0, ..own };
        let mut whole = trainer(0.1, options.clone())?;
        let mut parts = trainer(0.1, options)?;
        let run = folder.0.join(dtype.name());
        for step in 0..9 {
            whole.step()?;
            parts.step()?;
            if step % 3 == 1 {
                parts.validate()?;
                parts.save(&run)?;
                let before = parts.losses();
                parts = Trainer::resume(&run, text(), device())?;
                assert_eq!((parts.steps_done(), parts.losses()), (step + 1, before));
            }
        }
        assert!(whole.validate()? == parts.validate()?);
        // The averaged weights are the ones to use.
        let run = folder.0.join("averaged");
        whole.save(&run)?;
        let (averaged, last) = (Checkpoint::load_averaged(&run)?.1, Checkpoint::load_model(&run)?.1);
        assert!(averaged.keys().eq(last.keys()));
        whole.evaluate(|_| {
            let mut params = whole.params().unique();
            params.try_for_each(|(name, param)| {
                let average = averaged[name].to_dtype(dtype)?.to_device(device())?;
                assert!(average.to_f64_vec()? == param.tensor().to_f64_vec()?, "{name}");
                assert!(averaged[name].to_f64_vec()? != last[name].to_f64_vec()?, "{name}");
                Ok(())
            })
        })?;
        assert!(bits(&whole, &folder.0.join("whole")) == bits(&parts, &folder.0.join("parts")), "{dtype}");
    }
    Ok(())
}

/// A run that began before there were optimizers to choose goes on as it was: AdamW that decays everything.
#[test]
fn trainer_resumes_runs_from_before_groups() -> Result<()> {
    let folder = Folder::new("before-groups");
    let run = folder.0.join("run");
    let decays = |decay_all| TrainOptions { weight_decay: 1.0, decay_all, ..options(4) };
    let (mut whole, mut new) = (trainer(0.0, decays(true))?, trainer(0.0, decays(false))?);
    for step in 0..4 {
        whole.step()?;
        new.step()?;
        if step == 1 {
            whole.save(&run)?;
        }
    }
    let path = run.join("training.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for key in ["optimizer", "decay_all", "momentum", "groups"] {
        assert!(json["options"].as_object_mut().unwrap().remove(key).is_some(), "{key}");
    }
    fs::write(&path, json.to_string()).unwrap();
    let mut resumed = Trainer::resume(&run, text(), device())?;
    (0..2).try_for_each(|_| resumed.step().map(drop))?;
    let state = bits(&whole, &folder.0.join("whole"));
    assert!(bits(&resumed, &folder.0.join("resumed")) == state);
    assert!(bits(&new, &folder.0.join("new")) != state, "the default decays vectors too");
    Ok(())
}

/// A run whose number of steps is changed continues as if it had started with that number.
#[test]
fn trainer_changes_its_number_of_steps() -> Result<()> {
    let folder = Folder::new("moved");
    // Where the learning rate depends on the end, the steps before it was moved would differ.
    let constant = |steps| TrainOptions { warmup: 0, final_lr_ratio: 1.0, ..options(steps) };
    let (mut whole, mut parts) = (trainer(0.1, constant(5))?, trainer(0.1, constant(2))?);
    (0..5).try_for_each(|_| whole.step().map(drop))?;
    (0..2).try_for_each(|_| parts.step().map(drop))?;
    let run = folder.0.join("run");
    parts.save(&run)?;
    let mut parts = Trainer::resume(&run, text(), device())?;
    for steps in [1, u64::MAX] {
        let message = parts.set_steps(steps).unwrap_err().to_string();
        assert!(message.contains("steps") && message.contains("expected 2 (the steps done)"), "{message}");
    }
    parts.set_steps(5)?;
    assert_eq!(parts.options(), whole.options());
    (0..3).try_for_each(|_| parts.step().map(drop))?;
    assert!(bits(&whole, &folder.0.join("whole")) == bits(&parts, &folder.0.join("parts")));
    // The learning rate is that of the new end.
    let falling = TrainOptions { warmup: 0, ..options(2) };
    let mut short = trainer(0.0, falling.clone())?;
    short.step()?;
    short.set_steps(8)?;
    assert_eq!(short.step()?.lr, TrainOptions { steps: 8, ..falling }.schedule().at(1));
    Ok(())
}

/// A run in f16 whose loss scale is far too large skips steps, and halves the scale each time, until the gradients are
/// finite. A resumed run continues as if it had never stopped.
#[test]
fn trainer_skips_steps_until_the_scaled_gradients_are_finite() -> Result<()> {
    let folder = Folder::new("scaled");
    let (start, run) = (folder.0.join("start"), folder.0.join("run"));
    let options = TrainOptions { dtype: DType::F16, ema_decay: Some(0.5), accumulate: 2, ..options(40) };
    trainer(0.1, options)?.save(&start)?;
    let json = fs::read_to_string(start.join("training.json")).unwrap();
    let huge = 2f64.powi(40);
    assert!(json.contains("\"scale\": 65536.0"), "{json}");
    fs::write(start.join("training.json"), json.replace("65536.0", &format!("{huge:?}"))).unwrap();

    let mut trainer = Trainer::resume(&start, text(), device())?;
    // The files also say after which step they were written.
    let weights = |folder: &Path| -> Result<Vec<Vec<f64>>> {
        read_safetensors(folder.join("model.safetensors"))?.values().map(Tensor::to_f64_vec).collect()
    };
    let before = weights(&start)?;
    let mut skipped = 0;
    loop {
        let scale = trainer.grad_scaler().unwrap().scale();
        assert_eq!(scale, huge / 2f64.powi(skipped as i32));
        let report = trainer.step()?;
        assert!(report.loss.is_finite());
        if !report.skipped {
            assert!(report.grad_norm.is_finite() && report.grad_norm < 100.0, "{}", report.grad_norm);
            break;
        }
        skipped += 1;
        assert!(skipped < 40 && report.grad_norm == f64::INFINITY);
        assert_eq!(trainer.grad_scaler().unwrap().skipped(), skipped);
        trainer.save(&run)?;
        assert!(weights(&run)? == before, "step {skipped} changed weights");
        trainer = Trainer::resume(&run, text(), device())?;
    }
    // Nothing near 2^40 fits, and the scale of an ordinary run does.
    assert!((8..=24).contains(&skipped), "{skipped}");
    let mut whole = Trainer::resume(&start, text(), device())?;
    while whole.steps_done() < trainer.steps_done() {
        whole.step()?;
    }
    assert_eq!(whole.grad_scaler(), trainer.grad_scaler());
    assert!(bits(&whole, &folder.0.join("whole")) == bits(&trainer, &folder.0.join("parts")));
    // State that no run writes.
    let json = fs::read_to_string(run.join("training.json")).unwrap();
    for (from, to) in [("\"scale\": ", "\"scale\": -"), ("\"skipped\": ", "\"skipped\": 1")] {
        fs::write(run.join("training.json"), json.replacen(from, to, 1)).unwrap();
        let message = Trainer::resume(&run, text(), device()).map(drop).unwrap_err().to_string();
        assert!(message.contains(if to.ends_with('-') { "scale" } else { "skipped" }), "{message}");
    }
    Ok(())
}

#[test]
fn trainer_stops_at_non_finite_values() -> Result<()> {
    let folder = Folder::new("nan");
    let mut trainer = trainer(0.0, options(10))?;
    trainer.step()?;
    trainer.save(&folder.0)?;
    let saved = files(&folder.0);
    let name = "net.attn_layers.layers.0.1.to_q.weight";
    let poisoned = trainer.params().get(name).expect(name).clone();
    let fine = poisoned.tensor().detach();
    for bad in [f64::NAN, f64::INFINITY] {
        poisoned.set(Tensor::full(*fine.shape(), bad, DType::F32, device())?)?;
        match trainer.step().map_err(Error::into_kind) {
            Err(ErrorKind::NonFinite { step: 1, what }) => {
                assert!(what.contains("loss") && what.contains(name), "{what}")
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(trainer.validate().map_err(Error::into_kind), Err(ErrorKind::NonFinite { step: 1, .. })));
        assert!(
            matches!(trainer.save(&folder.0).map_err(Error::into_kind), Err(ErrorKind::NonFinite { what, .. }) if what.contains(name))
        );
    }
    // Every weight is finite, but what they compute is not.
    let logits = trainer.params().get("net.to_logits.weight").expect("logits").clone();
    let weights = logits.tensor().detach();
    poisoned.set(fine)?;
    logits.set(Tensor::full(*weights.shape(), 3e38, DType::F32, device())?)?;
    match trainer.step().map_err(Error::into_kind) {
        Err(ErrorKind::NonFinite { step: 1, what }) => {
            assert!(what.contains("loss") && what.contains("net."), "{what}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(trainer.steps_done(), 1);
    // The checkpoint is the one from before, and the run goes on from it.
    assert!(files(&folder.0) == saved);
    Trainer::resume(&folder.0, text(), device())?.step()?;
    Ok(())
}

#[test]
fn trainer_refuses_invalid_options() -> Result<()> {
    let key = |result: Result<Trainer>| match result.map(drop).map_err(Error::into_kind) {
        Err(ErrorKind::Option { key, .. }) => key,
        other => panic!("{other:?}"),
    };
    assert_eq!(key(trainer(0.0, TrainOptions { batch_size: 0, ..options(1) })), "batch_size");
    assert_eq!(key(trainer(0.0, TrainOptions { seq_len: 33, ..options(1) })), "seq_len");
    assert_eq!(key(trainer(0.0, TrainOptions { lr: f64::NAN, ..options(1) })), "lr");
    let short = ByteText::from_bytes("too short")?;
    assert_eq!(key(Trainer::new(config(0.0), options(1), short, device())), "text");
    let other = ByteText::from_bytes(vec![200u8; 5000])?;
    assert_eq!(key(Trainer::new(config(0.0), options(1), other, device())), "num_tokens");
    Ok(())
}

#[test]
fn trainer_resume_refuses_mismatched_runs() -> Result<()> {
    let folder = Folder::new("unfit");
    let run = &folder.0;
    let mut first = trainer(0.0, TrainOptions { ema_decay: Some(0.5), ..options(5) })?;
    first.step()?;
    first.save(run)?;
    let resume = |text: ByteText| Trainer::resume(run, text, device()).map(drop).map_err(|error| error.to_string());
    assert!(resume(text()).is_ok());
    // Another text, of the same length.
    let mut bytes = text().bytes().to_vec();
    bytes[0] ^= 1;
    let message = resume(ByteText::from_bytes(bytes)?).unwrap_err();
    assert!(message.contains("text") && message.contains("fingerprint"), "{message}");

    // The config of another model.
    let json = fs::read_to_string(run.join("config.json")).unwrap();
    let with = |name: &str, from: &str, to: &str, expected: &[&str]| {
        let content = fs::read_to_string(run.join(name)).unwrap();
        assert!(content.contains(from), "{content}");
        fs::write(run.join(name), content.replacen(from, to, 1)).unwrap();
        let message = resume(text()).unwrap_err();
        assert!(expected.iter().all(|part| message.contains(part)), "{to}: {message}");
        fs::write(run.join(name), content).unwrap();
    };
    with("config.json", "\"dim\": 32", "\"dim\": 48", &["shape mismatch", "model.safetensors"]);
    with("config.json", "\"depth\": 1", "\"depth\": 2", &["missing"]);
    with("config.json", "\"depth\": 1", "\"depht\": 1", &["depht", "depth"]);
    with("config.json", "\"max_seq_len\": 32", "\"max_seq_len\": 8", &["seq_len"]);
    let decoder = r#"{"model": "Decoder", "dim": 32, "depth": 1}"#;
    fs::write(run.join("config.json"), decoder).unwrap();
    assert!(resume(text()).unwrap_err().contains("AutoregressiveWrapper"));
    fs::write(run.join("config.json"), json).unwrap();
    // Options that contradict the files.
    with("training.json", "\"dtype\": \"f32\"", "\"dtype\": \"bf16\"", &["f32", "bf16"]);
    with("training.json", "\"ema_decay\": 0.5", "\"ema_decay\": null", &["unused", "ema."]);
    with("training.json", "\"batch_size\": 4", "\"batch_size\": 0", &["batch_size"]);
    with("training.json", "\"step\": 1", "\"step\": 2", &["step"]);
    // Files that agree with each other, but not with what they hold.
    let change = |name: &str, change: &dyn Fn(&mut BTreeMap<String, Tensor>), expected: &str| -> Result<()> {
        let original = fs::read(run.join(name)).unwrap();
        let mut tensors = read_safetensors(run.join(name))?;
        change(&mut tensors);
        write_safetensors(run.join(name), &tensors, &BTreeMap::new())?;
        let message = resume(text()).unwrap_err();
        assert!(message.contains(expected) && message.contains(run.to_str().unwrap()), "{message}");
        fs::write(run.join(name), original).unwrap();
        Ok(())
    };
    let five = Tensor::scalar(5i64, device())?;
    change("optimizer.safetensors", &|state| drop(state.insert("steps".into(), five.clone())), "5 steps")?;
    change("optimizer.safetensors", &|state| drop(state.pop_first()), "missing")?;
    change("optimizer.safetensors", &|state| state.retain(|name, _| !name.starts_with("ema.")), "missing")?;
    change("model.safetensors", &|model| drop(model.pop_last()), "missing")?;
    change("model.safetensors", &|model| drop(model.insert("more".into(), five.clone())), "unused")?;
    assert!(resume(text()).is_ok());
    Ok(())
}
