//! Tuning on examples, in full and by adapters, against PEFT; see `tests/files/peft/make_tuned.py`.

use std::{fs, path::PathBuf};

use x_transformers::{
    DType, Device, Result, Tensor,
    io::{read_safetensors, write_safetensors},
    models::{AutoregressiveWrapper, ForwardOptions, LoraOptions},
    pretrained::Pretrained,
    train::{BatchSource, Checkpoint, Examples, LoraConfig, LoraModel, Sequence, TrainModel, TrainOptions, Trainer},
};

use crate::{Folder, common::device};

fn files(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(name)
}

fn example(tokens: &[i64], prompt: usize) -> Sequence {
    Sequence { tokens: tokens.to_vec(), loss_mask: (0..tokens.len()).map(|at| at >= prompt).collect() }
}

fn options(steps: u64) -> TrainOptions {
    TrainOptions {
        steps,
        batch_size: 2,
        accumulate: 2,
        seq_len: 16,
        lr: 0.02,
        warmup: 0,
        final_lr_ratio: 1.0,
        ..Default::default()
    }
}

/// Three steps of an adapter on rows of different lengths: losses and weights are PEFT's.
#[test]
fn adapters_are_trained_on_answers_as_with_peft() -> Result<()> {
    let expected = read_safetensors(files("peft/tuned.safetensors"))?;
    let prompts = expected["prompts"].to_vec::<i64>()?;
    let rows = prompts
        .iter()
        .enumerate()
        .map(|(index, &prompt)| Ok(example(&expected[&format!("row.{index}")].to_vec::<i64>()?, prompt as usize)));
    let rows: Vec<Sequence> = rows.collect::<Result<_>>()?;
    let source = Examples::new(rows.clone(), rows)?;
    let target_modules = vec!["q_proj".into(), "v_proj".into()];
    let lora = LoraOptions { r: 4, lora_alpha: 8.0, target_modules, ..Default::default() };
    let config = LoraConfig::new(files("llama"), lora, 0)?;
    let mut trainer = Trainer::<LoraModel>::start(config, options(3), source, device())?;
    let named = |start: &str| {
        let named = expected.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(start)?, tensor)));
        named.map(|(name, tensor)| (name.to_string(), tensor.clone())).collect::<std::collections::BTreeMap<_, _>>()
    };
    trainer.params().load(&named("initial."))?;
    for loss in expected["losses"].to_f64_vec()? {
        let report = trainer.step()?;
        assert!((report.loss - loss).abs() < 1e-4, "{} instead of {loss}", report.loss);
        assert_eq!(report.tokens, 15);
    }
    for (name, value) in named("trained.") {
        let own = trainer.params().get(&name).expect("a parameter").tensor().to_f64_vec()?;
        let off = own.iter().zip(value.to_f64_vec()?).map(|(one, other)| (one - other).abs()).fold(0.0, f64::max);
        assert!(off < 1e-3, "{name}: off by {off}");
    }
    Ok(())
}

fn source() -> Examples {
    let row = |index: i64| example(&(0..4 + index % 9).map(|at| (at * index + 3) % 40).collect::<Vec<_>>(), 2);
    Examples::new((0..12).map(row).collect(), (12..15).map(row).collect()).expect("examples")
}

/// Runs of an adapter are saved without their base, resumed to the same bits, and refuse another base.
#[test]
fn runs_of_adapters() -> Result<()> {
    let folder = Folder::new("adapter");
    // A base that packs some of its weights, and one in a folder.
    let base = folder.0.join("base");
    fs::create_dir_all(&base).expect("a folder");
    for name in ["config.json", "model.safetensors"] {
        fs::copy(files("qwen2").join(name), base.join(name)).expect("a file");
    }
    for (dora, use_rslora, lora_dropout) in [(false, true, 0.2), (true, false, 0.0)] {
        let lora = LoraOptions { r: 2, use_dora: dora, use_rslora, lora_dropout, ..Default::default() };
        let start = || {
            let config = LoraConfig::new(&base, lora.clone(), 3)?;
            Trainer::<LoraModel>::start(config, options(6), source(), device())
        };
        let (mut whole, mut parts) = (start()?, start()?);
        let run = folder.0.join("run");
        for step in 0..6 {
            let report = whole.step()?;
            assert_eq!(parts.step()?, report);
            if step == 2 {
                parts.save(&run)?;
                parts = Trainer::resume_from(&run, source(), device())?;
            }
        }
        let bits = |trainer: &Trainer<LoraModel>| -> Result<Vec<Vec<f64>>> {
            trainer.params().iter().map(|(_, param)| param.tensor().to_f64_vec()).collect()
        };
        assert!(bits(&whole)? == bits(&parts)?);
        parts.save(&run)?;
        let saved = Checkpoint::<LoraConfig>::load_as(&run)?;
        assert!(saved.model.keys().all(|name| name.contains("lora_")), "the base is not saved");
        // Merged, the weights compute what the run does.
        let tokens = Tensor::arange(16, device())?.reshape([1, 16])?;
        let logits =
            |model: &AutoregressiveWrapper| model.net.forward(&tokens, &ForwardOptions::default())?.out.to_f64_vec();
        let (merged, params) = LoraModel::load(&run, DType::F32, device(), true)?.merged()?;
        let off = logits(&merged)?.iter().zip(logits(whole.model())?).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-4, "{off}");
        assert!(params.get("net.attn_layers.layers.0.1.to_q.weight").is_some());
    }
    let run = folder.0.join("run");
    assert!(LoraConfig::read(&run)?.is_some_and(|config| config.lora.r == 2));
    assert!(Checkpoint::load_model(&run).is_err());
    // A base with other weights, and none.
    let path = base.join("model.safetensors");
    let mut weights = read_safetensors(&path)?;
    let name = "model.layers.0.self_attn.q_proj.weight";
    weights.insert(name.to_string(), weights[name].affine(1.5, 0.0)?);
    write_safetensors(&path, &weights, &Default::default())?;
    let resume = || Trainer::<LoraModel>::resume_from(&run, source(), &Device::Cpu).map(drop).unwrap_err().to_string();
    assert!(resume().contains("has changed since the adapter was trained"), "{}", resume());
    fs::remove_dir_all(&base).expect("removed");
    assert!(resume().contains("the base of the adapter") && resume().contains("base"), "{}", resume());
    let wrong = LoraOptions { target_modules: vec!["q_projection".into()], ..Default::default() };
    let config = LoraConfig::new(files("llama"), wrong, 0)?;
    let error = Trainer::<LoraModel>::start(config, options(1), source(), &Device::Cpu).map(drop).unwrap_err();
    assert!(error.to_string().contains("no linear layer has the name `q_projection`"), "{error}");
    let error = LoraConfig::new(files("bert"), LoraOptions::default(), 0).unwrap_err().to_string();
    assert!(error.contains("does not generate text"), "{error}");
    Ok(())
}

/// In full, a pretrained model begins with its own loss, which becomes lower.
#[test]
fn a_pretrained_model_is_tuned_in_full() -> Result<()> {
    for name in ["llama", "mistral", "qwen2", "llama.gguf"] {
        let pretrained = Pretrained::open(files(name))?;
        let (config, weights) = pretrained.state_dict()?;
        let options = TrainOptions { lr: 2e-3, ..options(8) };
        let mut trainer =
            Trainer::<AutoregressiveWrapper>::start_from(config.into(), &weights, options.clone(), source(), device())?;
        let model = pretrained.dequantized().autoregressive(DType::F32, device())?;
        let before = trainer.validate()?;
        let batch = &source().validation_batches(&options.request(0, 0, 40))?;
        let (mut sum, mut targets) = (0.0, 0.0);
        for batch in batch {
            let moved = x_transformers::train::Batch::to_device(batch, device())?;
            let count = moved.loss_mask.as_ref().expect("a mask").to_dtype(DType::F32)?.narrow(
                1,
                1,
                moved.tokens.dim(1)? - 1,
            )?;
            let count = count.sum(&[])?.item()?;
            sum += TrainModel::loss(&model, &moved)?.item()? * count;
            targets += count;
        }
        assert!((before - sum / targets).abs() < 1e-4, "{name}: {before} instead of {}", sum / targets);
        while trainer.steps_done() < 8 {
            trainer.step()?;
        }
        assert!(trainer.validate()? < before, "{name}");
    }
    Ok(())
}

#[test]
fn examples_have_the_shape_of_their_batch() -> Result<()> {
    let options = |seq_len| TrainOptions { batch_size: 3, seq_len, ..Default::default() };
    let rows = vec![example(&[1, 2, 3], 2), example(&[4, 5, 6, 7, 8], 1), example(&[9, 8, 7, 6, 5, 4], 5)];
    let source = Examples::new(rows.clone(), rows.clone())?;
    let batch = source.batch(&options(10).request(0, 0, 10))?;
    assert_eq!(batch.tokens.shape(), [3, 6]);
    let mask = batch.loss_mask.expect("a mask").to_vec::<bool>()?;
    let counted: Vec<i64> = batch
        .tokens
        .to_vec::<i64>()?
        .into_iter()
        .zip(&mask)
        .filter(|(_, counts)| **counts)
        .map(|(token, _)| token)
        .collect();
    let mut sorted = counted.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, [3, 4, 5, 6, 7, 8]);
    // Each epoch has all rows, in another order somewhere.
    let order =
        |step| source.batch(&options(10).request(step, 0, 10)).map(|batch| batch.tokens.to_vec::<i64>().unwrap());
    assert!((1..9).any(|step| order(step).unwrap() != order(0).unwrap()));
    // The third has its target behind the cut.
    assert_eq!((source.cut(10), source.cut(4), source.cut(3)), ((0, 0), (2, 2), (4, 2)));
    let batch = source.batch(&options(4).request(0, 0, 10))?;
    assert!(!batch.tokens.to_vec::<i64>()?.contains(&9));
    let refused = |source: Result<Examples>, seq_len, num_tokens| {
        source.and_then(|source| source.batch(&options(seq_len).request(0, 0, num_tokens))).unwrap_err().to_string()
    };
    let make = || Examples::new(rows.clone(), rows.clone());
    assert!(
        refused(Examples::new(rows[..1].to_vec(), rows.clone()), 1, 10)
            .contains("none to train on has a target in its first 2 tokens")
    );
    assert!(refused(make(), 9, 9).contains("example 3 has the token 9, expected tokens in 0..9"));
    let ragged = Sequence { tokens: vec![1, 2], loss_mask: vec![true] };
    assert!(refused(Examples::new(vec![ragged], rows.clone()), 9, 9).contains("example 1 has 1 values, expected 2"));
    Ok(())
}

/// Activations that are computed again change no bit, with dropout, masks and adapters; a model that cannot says so.
#[test]
fn recomputed_steps_have_the_same_bits() -> Result<()> {
    let lora = LoraOptions { r: 2, lora_dropout: 0.3, ..Default::default() };
    let run = |recompute: bool| -> Result<(Vec<f64>, f64)> {
        let config = LoraConfig::new(files("llama"), lora.clone(), 3)?;
        let options = TrainOptions { recompute, ..options(3) };
        let mut trainer = Trainer::<LoraModel>::start(config, options, source(), device())?;
        let mut losses = Vec::new();
        for _ in 0..3 {
            losses.push(trainer.step()?.loss);
        }
        Ok((losses, trainer.validate()?))
    };
    assert_eq!(run(true)?, run(false)?);
    Ok(())
}
