//! Preferences against trl's DPOTrainer; see `tests/files/dpo/make.py`.

use std::{collections::BTreeMap, fs, path::PathBuf};

use x_transformers::{
    DType, Result, Tape,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    io::read_safetensors,
    models::LoraOptions,
    train::{
        Batch, BatchSource, ByteText, Checkpoint, DpoConfig, DpoModel, Group, GroupBatch, Groups, LoraConfig,
        LoraModel, Sequence, TrainModel, TrainOptions, Trainer,
    },
};

use crate::{Folder, common::device, off, resumed_alike};

fn files(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/files").join(name)
}

fn options(steps: u64) -> TrainOptions {
    TrainOptions {
        steps,
        batch_size: 3,
        seq_len: 32,
        lr: 0.01,
        warmup: 0,
        final_lr_ratio: 1.0,
        decay_all: true,
        ..Default::default()
    }
}

/// Losses, rewards, gradients and three steps, of all weights and of an adapter.
#[test]
fn preferences_are_learned_as_with_trl() -> Result<()> {
    let expected = read_safetensors(files("dpo/expected.safetensors"))?;
    let rows = |key: &str| -> Result<Vec<Vec<i64>>> {
        let width = expected[key].shape()[1];
        let values = expected[key].to_dtype(DType::I64)?.to_vec::<i64>()?;
        Ok(values.chunks(width).map(<[i64]>::to_vec).collect())
    };
    let (tokens, real, answers) = (rows("input_ids")?, rows("attention_mask")?, rows("completion_mask")?);
    let sequence = |row: usize| {
        let count = real[row].iter().filter(|&&real| real == 1).count();
        let loss_mask = answers[row][..count].iter().map(|&answer| answer == 1).collect();
        Sequence { tokens: tokens[row][..count].to_vec(), loss_mask }
    };
    // The preferred ones come first.
    let groups: Vec<Group> =
        (0..3).map(|row| Group { sequences: vec![sequence(row), sequence(row + 3)], score: None }).collect();
    for name in ["all", "adapter"] {
        let get = |key: &str| &expected[&format!("{name}.{key}")];
        let target_modules = vec!["q_proj".into(), "v_proj".into()];
        let lora = LoraOptions { r: 4, lora_alpha: 8.0, target_modules, ..Default::default() };
        let config = DpoConfig::new(files("llama"), (name == "adapter").then_some(lora), 0.1, 0)?;
        let source = Groups::new(groups.clone(), groups.clone())?;
        let mut trainer = match name {
            "all" => {
                let weights = config.state_dict()?;
                Trainer::<DpoModel>::start_from(config, &weights, options(3), source, device())?
            }
            _ => {
                let trainer = Trainer::<DpoModel>::start(config, options(3), source, device())?;
                let initial = expected.iter().filter_map(|(key, value)| Some((key.strip_prefix("initial.")?, value)));
                let initial: BTreeMap<_, _> = initial.map(|(key, value)| (key.to_string(), value.clone())).collect();
                trainer.params().load(&initial)?;
                trainer
            }
        };
        let batch = GroupBatch::of_groups(&groups.iter().collect::<Vec<_>>(), 32)?.to_device(device())?;
        let (losses, margins) = (get("losses").to_f64_vec()?, get("margins").to_f64_vec()?);
        let (rewards, accuracies) = (get("rewards").to_f64_vec()?, get("accuracies").to_f64_vec()?);
        for step in 0..3 {
            let own = trainer.model().rewards(&batch)?.to_f64_vec()?;
            let mean = |of: &dyn Fn(&[f64]) -> f64| own.chunks(2).map(of).sum::<f64>() / 3.0;
            assert!((mean(&|pair| pair[0] - pair[1]) - margins[step]).abs() < 5e-4, "{name} {own:?}");
            for side in 0..2 {
                assert!((mean(&|pair| pair[side]) - rewards[2 * step + side]).abs() < 5e-4, "{name} {own:?}");
            }
            assert!(
                (mean(&|pair| f64::from(u8::from(pair[0] > pair[1]))) - accuracies[step]).abs() < 1e-6 || step == 0
            );
            if step == 1 {
                let mut tape = Tape::train(0);
                let grads = tape.backward(&TrainModel::loss(trainer.model(), &batch)?)?;
                drop(tape);
                let mut tape = Tape::train(0);
                let again = tape.backward(&trainer.model().loss_recomputed(&batch)?)?;
                drop(tape);
                let start = format!("{name}.grad.");
                let all = expected.iter().filter_map(|(key, value)| Some((key.strip_prefix(&start)?, value)));
                let mut seen = 0;
                for (key, value) in all {
                    let own = match key {
                        "model.embed_tokens.weight" => "net.token_emb.weight",
                        "lm_head.weight" => "net.to_logits.weight",
                        "model.layers.0.self_attn.o_proj.weight" => "net.attn_layers.layers.0.1.to_out.weight",
                        "model.layers.1.mlp.down_proj.weight" => "net.attn_layers.layers.3.1.net.3.weight",
                        adapter => adapter,
                    };
                    let names = || trainer.params().iter().map(|(name, _)| name.to_string()).collect::<Vec<_>>();
                    let param = trainer.params().get(own).unwrap_or_else(|| panic!("{own}: {:?}", names())).tensor();
                    let grad = grads.get(&param).expect("a gradient");
                    assert!(off(grad, value)? < 2e-4, "{name} {key}: {}", off(grad, value)?);
                    assert!(off(grad, again.get(&param).expect("a gradient"))? == 0.0, "{name} {key}");
                    seen += 1;
                }
                assert!(seen >= 4);
            }
            let report = trainer.step()?;
            assert!((report.loss - losses[step]).abs() < 3e-4, "{name}: {} instead of {}", report.loss, losses[step]);
            assert_eq!(report.tokens, 3);
        }
        if name == "adapter" {
            for (key, value) in expected.iter().filter_map(|(key, value)| Some((key.strip_prefix("trained.")?, value)))
            {
                let own = trainer.params().get(key).expect("a parameter").tensor();
                assert!(off(&own, value)? < 2e-3, "{key}: {}", off(&own, value)?);
            }
        }
    }
    Ok(())
}

fn pairs(count: i64) -> Vec<Group> {
    let answer = |index: i64, length: i64, first: i64| {
        let prompt = 2 + index % 4;
        let tokens = (0..prompt).map(|at| (at * index + 3) % 40).chain((0..length).map(|at| (first + at) % 40));
        Sequence { tokens: tokens.collect(), loss_mask: (0..prompt + length).map(|at| at >= prompt).collect() }
    };
    let group =
        |index: i64| Group { sequences: vec![answer(index, 3, 5), answer(index, 1 + index % 4, 17)], score: None };
    (0..count).map(group).collect()
}

/// Runs are resumed to the same bits, in full and by adapters; their models are read like others, and refuse another base.
#[test]
fn runs_of_preferences() -> Result<()> {
    let folder = Folder::new("dpo");
    let text = ByteText::from_bytes("It was the best of times, it was the worst of times. ".repeat(10))?;
    let net = TransformerWrapperConfig {
        emb_dropout: 0.1,
        ..TransformerWrapperConfig::new(256, 32, AttentionLayersConfig::decoder(16, 1))
    };
    let own = AutoregressiveConfig { net, ..Default::default() };
    let base = folder.0.join("base");
    Trainer::new(own, options(1), text, device())?.save(&base)?;
    let source = || Groups::new(pairs(13), pairs(4));
    for lora in [None, Some(LoraOptions { r: 2, lora_dropout: 0.2, ..Default::default() })] {
        for model in [base.clone(), files("qwen2")] {
            let run = folder.0.join("run");
            let options = TrainOptions { accumulate: 2, ..options(6) };
            let start = || {
                let config = DpoConfig::new(&model, lora.clone(), 0.3, 5)?;
                match &lora {
                    Some(_) => Trainer::<DpoModel>::start(config, options.clone(), source()?, device()),
                    None => {
                        let weights = config.state_dict()?;
                        Trainer::<DpoModel>::start_from(config, &weights, options.clone(), source()?, device())
                    }
                }
            };
            let (whole, parts) = (start()?, start()?);
            // Both models are the same, whatever dropout does to the one that learns.
            assert!((whole.validate()? - 2f64.ln()).abs() < 1e-6);
            let [whole, _] =
                resumed_alike([whole, parts], &run, None, || Trainer::resume_from(&run, source()?, device()))?;
            assert!(whole.validate()? < 2f64.ln());
            whole.save(&run)?;
            let config = DpoConfig::read(&run)?.expect("options of preferences");
            assert!(config.beta() == 0.3 && config.lora() == lora.as_ref());
            if lora.is_some() {
                assert!(LoraConfig::read(&run)?.is_some() && LoraModel::load(&run, DType::F32, device(), true).is_ok());
            } else {
                let (config, weights) = Checkpoint::load_averaged(&run)?;
                assert!(config.plan().is_ok() && weights.keys().all(|name| name.starts_with("net.")));
                assert!(LoraConfig::read(&run)?.is_none());
            }
            assert!(DpoConfig::read(&base)?.is_none());
        }
    }
    // A reference that is another one, and none.
    let copy = folder.0.join("copy");
    fs::create_dir_all(&copy).unwrap();
    for name in ["config.json", "model.safetensors", "optimizer.safetensors", "training.json"] {
        fs::copy(base.join(name), copy.join(name)).unwrap();
    }
    let config = DpoConfig::new(&copy, None, 0.1, 0)?;
    let weights = config.state_dict()?;
    let run = folder.0.join("changed");
    Trainer::<DpoModel>::start_from(config, &weights, options(2), source()?, device())?.save(&run)?;
    let text = ByteText::from_bytes("It was the best of times, it was the worst of times. ".repeat(10))?;
    let net = TransformerWrapperConfig::new(256, 32, AttentionLayersConfig::decoder(16, 1));
    let other = AutoregressiveConfig { net, ..Default::default() };
    Trainer::new(other, TrainOptions { seed: 9, ..options(1) }, text, device())?.save(&copy)?;
    let resume =
        || Trainer::<DpoModel>::resume_from(&run, source().unwrap(), device()).map(drop).unwrap_err().to_string();
    assert!(resume().contains("has changed since the run began with it"), "{}", resume());
    fs::remove_dir_all(&copy).unwrap();
    assert!(resume().contains("the reference of the run"), "{}", resume());
    Ok(())
}

#[test]
fn preferences_that_are_refused() -> Result<()> {
    let refused = |beta| DpoConfig::new(files("llama"), None, beta, 0).unwrap_err().to_string();
    assert!(refused(0.0).contains("dpo_beta") && refused(f64::NAN).contains("positive number"));
    assert!(DpoConfig::new(files("bert"), None, 0.1, 0).unwrap_err().to_string().contains("does not generate text"));
    let adapter = DpoConfig::new(files("llama"), Some(LoraOptions::default()), 0.1, 0)?;
    assert!(adapter.state_dict().unwrap_err().to_string().contains("lora"));
    // Prompts that fill the row are left out, and nothing is left.
    let source = Groups::new(pairs(13), pairs(4))?;
    let request = |seq_len| TrainOptions { seq_len, ..options(1) }.request(0, 0, 40);
    assert_eq!((source.left_out(32), source.left_out(4)), (0, 8));
    assert!(source.validation_batches(&request(4))?.iter().map(Batch::targets).sum::<u64>() == 2);
    let message = source.check(&request(2)).unwrap_err().to_string();
    assert!(message.contains("none to train on has a token that counts in its first 2 tokens"), "{message}");
    // Groups of three are no pairs.
    let three = |group: Group| Group { sequences: [&group.sequences[..], &group.sequences[..1]].concat(), score: None };
    let groups: Vec<Group> = pairs(2).into_iter().map(three).collect();
    let mut trainer = Trainer::<DpoModel>::start(adapter, options(1), Groups::new(groups.clone(), groups)?, device())?;
    assert!(trainer.step().unwrap_err().to_string().contains("expected [batch, 2, n]"));
    Ok(())
}
