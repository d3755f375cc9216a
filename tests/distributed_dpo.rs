//! Runs that learn preferences in stage 3 of ZeRO: the checkpoint of one process, with a frozen copy as the reference or the
//! base of an adapter.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use x_transformers::{
    Result,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    deferred_init,
    models::LoraOptions,
    train::{ByteText, DpoConfig, DpoModel, Group, Groups, RankOptions, Sequence, TrainOptions, Trainer},
};

#[path = "common/mod.rs"]
mod common;
#[path = "common/ranks.rs"]
mod threads;

use common::device;
use threads::ranks;

const LENGTH: usize = 12;

fn options(accumulate: usize) -> TrainOptions {
    let options = TrainOptions { steps: 2, accumulate, warmup: 1, recompute: true, ..Default::default() };
    TrainOptions { batch_size: 2, seq_len: LENGTH, ema_decay: Some(0.9), ..options }
}

/// Saves the model whose answers are compared.
fn save_base(folder: &Path) -> Result<()> {
    let layers = AttentionLayersConfig { heads: 2, ..AttentionLayersConfig::decoder(32, 2) };
    let net = TransformerWrapperConfig::new(128, LENGTH, layers);
    let text = ByteText::from_bytes("It was the best of times, it was the worst of times. ".repeat(10))?;
    Trainer::new(AutoregressiveConfig { net, ..Default::default() }, options(1), text, device())?.save(folder)
}

fn pairs() -> Result<Groups> {
    let answer = |start: i64, token: i64| Sequence {
        tokens: vec![start, 2, 3, token, 7],
        loss_mask: vec![false, false, false, true, true],
    };
    let pair = |start| Group { sequences: vec![answer(start, 20 + start), answer(start, 90 - start)], score: None };
    Groups::new((0..24).map(pair).collect(), (24..30).map(pair).collect())
}

/// A run of all weights, or of an adapter.
fn begin(base: &Path, lora: bool, accumulate: usize) -> Result<Trainer<DpoModel>> {
    let lora = lora.then(|| LoraOptions { r: 4, ..Default::default() });
    let is_adapter = lora.is_some();
    let config = DpoConfig::new(base, lora, 0.1, 3)?;
    if is_adapter {
        return Trainer::start(config, options(accumulate), pairs()?, device());
    }
    let weights = config.state_dict()?;
    Trainer::start_from(config, &weights, options(accumulate), pairs()?, device())
}

fn go_on(trainer: &mut Trainer<DpoModel>, steps: u64, folder: &Path) -> Result<()> {
    while trainer.steps_done() < steps {
        trainer.step()?;
    }
    trainer.validate()?;
    trainer.save(folder)
}

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    entries.map(|path| (path.file_name().expect("a name").into(), fs::read(&path).expect("read"))).collect()
}

#[test]
fn preferences_have_the_bits_of_one_process() {
    let folder = std::env::temp_dir().join(format!("xt-ranks-dpo-{}", std::process::id()));
    let base = folder.join("base");
    save_base(&base).expect("saved");
    for lora in [false, true] {
        let expected = folder.join("expected");
        go_on(&mut begin(&base, lora, 4).expect("a run"), 2, &expected).expect("trained");
        for deferred in [false, true] {
            let results = ranks(2, |ranks| {
                let (saved, options) =
                    (folder.join(ranks.rank().to_string()), RankOptions { zero: 3, ..Default::default() });
                let start = || begin(&base, lora, 2);
                let trainer = if deferred { deferred_init(start) } else { start() };
                go_on(&mut trainer?.with_ranks(ranks.clone(), options)?, 1, &saved)?;
                // The others read what rank 0 has written.
                let saved = folder.join("0");
                let resume = || Trainer::<DpoModel>::resume_from(&saved, pairs()?, device());
                let trainer = if deferred { deferred_init(resume) } else { resume() };
                ranks.barrier()?;
                go_on(&mut trainer?.with_ranks(ranks, options)?, 2, &saved)
            });
            results.into_iter().for_each(|result| result.expect("trained"));
            let (mut own, mut expected) = (files(&folder.join("0")), files(&expected));
            // It counts the validation in the middle.
            let [own_state, state] = [&mut own, &mut expected].map(|files| files.remove(Path::new("training.json")));
            assert!(own_state.is_some() && state.is_some() && own.len() == 3);
            assert!(own == expected, "adapter {lora}, deferred {deferred}");
        }
    }
    let _ = fs::remove_dir_all(&folder);
}
