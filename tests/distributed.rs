//! Ranks as threads of one process: what they exchange, and sums of gradients with the bits of one process that
//! accumulates. `scripts/check-mpi` does the same with processes of MPI.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use serde_json::json;
use x_transformers::{
    DType, Device, ErrorKind, Gradients, Init, Param, ParamStore, Philox, Result, Tape, Tensor,
    config::{AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, Config, TransformerWrapperConfig},
    deferred_init,
    distributed::{Alone, Communicator, DataParallel},
    models::{AutoregressiveWrapper, ForwardOptions, LoraOptions},
    train::{
        BatchRequest, BatchSource, ByteText, DataPrint, LoraConfig, LoraModel, OptimizerKind, RankOptions, TokenBatch,
        TrainModel, TrainOptions, Trainer,
    },
};

#[path = "common/mod.rs"]
mod common;
#[path = "common/ranks.rs"]
mod threads;

use common::device;
use threads::ranks;

/// Values that differ between ranks.
fn values(rank: usize, shape: &[usize], dtype: DType) -> Tensor {
    let random = Philox::new(11, rank as u64);
    Tensor::generate(shape, dtype, device(), |i| random.normal(i as u64)).expect("memory")
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    tensor.to_f64_vec().expect("floats").into_iter().map(f64::to_bits).collect()
}

#[test]
fn sums_are_those_in_the_order_of_ranks() {
    for size in [1, 2, 3, 4] {
        for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
            // Ordinary, not divisible, one element, none, a scalar.
            for shape in [&[6, 5][..], &[7], &[1], &[0, 3], &[]] {
                let wide = |rank| values(rank, shape, dtype).to_dtype(dtype.accumulator()).expect("a float");
                let sum = (1..size).fold(wide(0), |sum, rank| sum.add(&wide(rank)).expect("equal shapes"));
                let expected = bits(&sum.to_dtype(dtype).expect("a float"));
                let sums = ranks(size, |ranks| ranks.all_reduce(&values(ranks.rank(), shape, dtype)));
                for sum in sums {
                    let sum = sum.expect("a sum");
                    assert_eq!((&sum.shape()[..], sum.dtype(), sum.device()), (shape, dtype, device()));
                    assert_eq!(bits(&sum), expected, "{size} ranks, {dtype}, {shape:?}");
                }
            }
        }
    }
}

#[test]
fn every_rank_gets_its_parts() {
    let results = ranks(3, |ranks| {
        let mine = |first: i64| Tensor::from_slice(&[first, first + 1, first + 2], [3, 1], device());
        let mine = mine(10 * ranks.rank() as i64)?;
        let parts = [ranks.all_gather(&mine)?, ranks.all_to_all(&mine)?, ranks.broadcast(&mine, 2)?];
        parts.iter().map(Tensor::to_vec::<i64>).collect::<Result<Vec<_>>>()
    });
    for (rank, parts) in results.into_iter().enumerate() {
        let rank = rank as i64;
        let gathered = vec![0, 1, 2, 10, 11, 12, 20, 21, 22];
        assert_eq!(parts.expect("parts"), [gathered, vec![rank, 10 + rank, 20 + rank], vec![20, 21, 22]]);
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let seven = values(0, &[7], DType::F32);
    for result in ranks(2, |ranks| ranks.reduce_scatter(&seven).map(|_| ()).or(ranks.broadcast(&seven, 2).map(|_| ())))
    {
        let message = result.expect_err("refused").to_string();
        assert!(message.contains("a rank below 2, got 2"), "{message}");
    }
    let message = ranks(2, |ranks| ranks.reduce_scatter(&seven)).remove(0).expect_err("refused").to_string();
    assert!(message.contains("divisible by 2 ranks, got 7"), "{message}");
    let scalar = Tensor::full([], 1.0, DType::F32, device()).expect("memory");
    assert!(matches!(Alone.all_gather(&scalar).expect_err("refused").kind(), ErrorKind::Shape { .. }));
    let integers = Tensor::from_slice(&[1i64], [1], device()).expect("memory");
    assert!(matches!(Alone.all_reduce(&integers).expect_err("refused").kind(), ErrorKind::DType { .. }));
}

const LENGTH: usize = 12;

/// A small model, and a parameter that no loss reaches.
fn model(seed: u64, dtype: DType) -> Result<(AutoregressiveWrapper, ParamStore, Param)> {
    let store = ParamStore::new(seed, dtype, device());
    let layers = AttentionLayersConfig { heads: 2, ..AttentionLayersConfig::decoder(16, 2) };
    let net = TransformerWrapperConfig::new(23, LENGTH, layers);
    let model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store)?;
    let spare = store.param("spare", [3], Init::Constant(1.0))?;
    Ok((model, store, spare))
}

/// Gradients of a part of a batch, times a weight.
fn part(model: &AutoregressiveWrapper, rank: usize, weight: f64) -> Result<Gradients> {
    let random = Philox::new(3, rank as u64);
    let tokens = Tensor::generate([2, LENGTH + 1], DType::I64, device(), |i| random.below(i as u64, 23) as f64)?;
    let mut tape = Tape::train(rank as u64);
    let loss = model.loss(&tokens, &ForwardOptions::default())?;
    let start = Tensor::full(*loss.shape(), weight, loss.dtype(), loss.device())?;
    tape.backward_with(&loss, &start)
}

#[test]
fn ranks_add_the_bits_of_one_process_that_accumulates() {
    for dtype in [DType::F32, DType::F64] {
        for size in [1, 2, 3] {
            let (one, store, spare) = model(1, dtype).expect("a model");
            let mut sum = Gradients::default();
            for rank in 0..size {
                sum.accumulate(part(&one, rank, 1.0 / size as f64).expect("gradients")).expect("equal shapes");
            }
            let expected: Vec<Vec<u64>> = sum.tensors().map(bits).collect();
            assert!(expected.len() > 10 && sum.param(&spare).is_none());
            let names: Vec<String> = store.params().iter().map(|(name, _)| name.to_string()).collect();
            let results = ranks(size, |ranks| {
                // Weights of their own, until they get those of rank 0.
                let (model, store, spare) = model(1 + ranks.rank() as u64, dtype)?;
                let parallel = DataParallel::new(&store.params(), ranks.clone())?;
                let grads = parallel.reduce(part(&model, ranks.rank(), 1.0 / size as f64)?)?;
                assert!(grads.param(&spare).is_none());
                Ok::<_, x_transformers::Error>(grads.tensors().map(bits).collect::<Vec<_>>())
            });
            for (rank, grads) in results.into_iter().enumerate() {
                assert_eq!(grads.expect("gradients"), expected, "rank {rank} of {size}, {dtype}: {names:?}");
            }
        }
    }
}

#[test]
fn a_parameter_that_one_rank_reaches_counts_as_zero_on_the_others() {
    let results = ranks(2, |ranks| {
        let store = ParamStore::new(0, DType::BF16, device());
        let both = store.param("both", [2], Init::Constant(3.0))?;
        let first = store.param("first", [2], Init::Constant(2.0))?;
        let parallel = DataParallel::new(&store.params(), ranks.clone())?;
        let mut tape = Tape::train(0);
        let mut loss = both.tensor().square()?.sum(&[])?;
        if ranks.rank() == 0 {
            loss = loss.add(&first.tensor().square()?.sum(&[])?)?;
        }
        let grads = parallel.reduce(tape.backward(&loss)?)?;
        let of = |param: &Param| grads.param(param).expect("a gradient").to_vec::<f32>();
        Ok::<_, x_transformers::Error>([of(&both)?, of(&first)?])
    });
    for grads in results {
        assert_eq!(grads.expect("gradients of half types in f32"), [[12.0, 12.0], [4.0, 4.0]]);
    }
}

#[test]
fn all_ranks_start_from_the_state_of_the_first() {
    let results = ranks(3, |ranks| {
        let store = ParamStore::new(0, DType::F32, device());
        let own = ranks.rank() as f64;
        let weight = store.param("weight", [2], Init::Constant(own))?;
        store.tie("tied", &weight)?;
        let buffer = store.buffer("buffer", Tensor::full([2], 10.0 + own, DType::F32, device())?)?;
        DataParallel::new(&store.params(), ranks)?;
        Ok::<_, x_transformers::Error>([weight.tensor().to_vec::<f32>()?, buffer.tensor().to_vec::<f32>()?])
    });
    for state in results {
        assert_eq!(state.expect("the state"), [[0.0; 2], [10.0; 2]]);
    }
}

#[test]
fn ranks_with_other_parameters_are_refused() {
    let results = ranks(3, |ranks| {
        let store = ParamStore::new(0, DType::F32, &Device::Cpu);
        store.param("weight", [2 + ranks.rank() / 2], Init::Constant(0.0))?;
        DataParallel::new(&store.params(), ranks).map(|_| ())
    });
    for result in results {
        let message = result.expect_err("refused").to_string();
        assert!(message.contains("rank 2 has parameters of other names, shapes or dtypes"), "{message}");
    }
}

/// Folder that is removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("xt-ranks-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    fn at(&self, name: impl std::fmt::Display) -> PathBuf {
        self.0.join(name.to_string())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry"));
    entries
        .map(|entry| (entry.file_name().into_string().expect("UTF-8"), fs::read(entry.path()).expect("read")))
        .collect()
}

fn text() -> ByteText {
    ByteText::from_bytes((0..4000u32).map(|i| b' ' + (i * i % 61 + i % 7) as u8).collect::<Vec<u8>>()).expect("a text")
}

fn options(steps: u64, accumulate: usize, dtype: DType) -> TrainOptions {
    let options = TrainOptions { steps, accumulate, dtype, warmup: 2, ..Default::default() };
    TrainOptions { batch_size: 2, seq_len: LENGTH, ema_decay: Some(0.9), clip: 0.3, shuffle: true, ..options }
}

/// A run with dropout. Its parameters have more elements than a chunk together.
fn begin(options: TrainOptions) -> Result<Trainer> {
    let attn = AttentionConfig { dropout: 0.2, ..Default::default() };
    let layers = AttentionLayersConfig { heads: 2, attn, ..AttentionLayersConfig::decoder(64, 2) };
    let net = TransformerWrapperConfig::new(128, LENGTH, layers);
    Trainer::new(AutoregressiveConfig { net, ..Default::default() }, options, text(), device())
}

/// Steps until a number are done, a validation, and a checkpoint.
fn go_on<M: TrainModel>(trainer: &mut Trainer<M>, steps: u64, folder: &Path) -> Result<()> {
    while trainer.steps_done() < steps {
        trainer.step()?;
    }
    trainer.validate()?;
    trainer.save(folder)
}

#[test]
fn ranks_write_the_checkpoint_of_one_process() {
    let (folder, mut left_out) = (Folder::new("bits"), 0);
    let kinds = [DType::F32, DType::BF16, DType::F16].map(|dtype| [(dtype, false), (dtype, true)]);
    // They take minutes there: a part of them, of all dtypes and stages.
    let emulated = *device() != Device::Cpu;
    for (dtype, recompute) in kinds.into_iter().flatten() {
        // Micro-batches of a step, and ranks that share them.
        for (all, sizes) in [(2, &[1, 2][..]), (6, &[1, 2, 3]), (5, &[1])] {
            if all != 6 && dtype != DType::F32 {
                continue;
            }
            if emulated && all != 6 {
                left_out += sizes.len();
                continue;
            }
            let expected = folder.at("expected");
            let of = |accumulate| TrainOptions { recompute, ..options(3, accumulate, dtype) };
            go_on(&mut begin(of(all)).expect("a run"), 3, &expected).expect("trained");
            let expected = files(&expected);
            assert_eq!(expected.len(), 4);
            for &size in sizes {
                let stages = [(false, 0), (true, 0), (true, 1), (false, 2), (true, 2), (false, 3), (true, 3)];
                for (overlap, zero) in stages {
                    // Stage 3 recomputes.
                    if zero == 3 && !recompute || zero < 3 && recompute && dtype != DType::F32 {
                        continue;
                    }
                    if emulated && ((size, overlap) != (3, true) || recompute && zero < 3) {
                        left_out += 1;
                        continue;
                    }
                    let results = ranks(size, |ranks| {
                        let rank = ranks.rank();
                        let start = || begin(of(all / size));
                        let trainer = if overlap { deferred_init(start) } else { start() };
                        let mut trainer = trainer?.with_ranks(
                            ranks,
                            RankOptions { overlap, zero, bucket: [1, 20_000, 1 << 20, 1 << 20][zero as usize] },
                        )?;
                        go_on(&mut trainer, 3, &folder.at(rank))
                    });
                    results.into_iter().for_each(|result| result.expect("trained"));
                    let same = files(&folder.at(0)) == expected;
                    let how = format!("overlap {overlap}, ZeRO {zero}, recompute {recompute}");
                    assert!(same, "{dtype}, {all} micro-batches, {size} ranks, {how}");
                    assert!((1..size).all(|rank| !folder.at(rank).exists()), "rank 0 alone writes");
                }
            }
        }
    }
    println!("{left_out} runs left out");
}

#[test]
fn any_number_of_ranks_goes_on_with_the_next_batches() {
    let folder = Folder::new("resumed");
    let (expected, saved) = (folder.at("expected"), folder.at("saved"));
    let options = |accumulate| TrainOptions { recompute: true, ..options(6, accumulate, DType::F32) };
    go_on(&mut begin(options(5)).expect("a run"), 6, &expected).expect("trained");
    // The validation of the pause counts too.
    let mut one = begin(options(5)).expect("a run");
    go_on(&mut one, 2, &saved).expect("trained");
    go_on(&mut one, 4, &saved).expect("trained");
    go_on(&mut one, 6, &expected).expect("trained");
    let all = [[2, 3], [5, 1], [4, 2]];
    let some = if *device() == Device::Cpu { &all[..] } else { &all[..1] };
    println!("{} of {} orders of ranks", some.len(), all.len());
    for &sizes in some {
        let mut one = begin(options(5)).expect("a run");
        go_on(&mut one, 2, &saved).expect("trained");
        for (size, steps) in sizes.into_iter().zip([4, 6]) {
            let results = ranks(size, |ranks| {
                let resume = || Trainer::resume(&saved, text(), device());
                let mut trainer = if size != 3 { deferred_init(resume)? } else { resume()? };
                // All have read before any writes.
                ranks.barrier()?;
                trainer = trainer
                    .with_ranks(ranks, RankOptions { zero: if size == 4 { 1 } else { 3 }, ..Default::default() })?;
                go_on(&mut trainer, steps, &saved)
            });
            results.into_iter().for_each(|result| result.expect("trained"));
        }
        assert!(files(&saved) == files(&expected), "{sizes:?}");
    }
    let results = ranks(6, |ranks| {
        Trainer::resume(&saved, text(), device())?.with_ranks(ranks, RankOptions::default()).map(drop)
    });
    let message = results.into_iter().next().expect("six").expect_err("refused").to_string();
    assert!(message.contains("5 micro-batches") && message.contains("got 6"), "{message}");
}

#[test]
fn ranks_with_other_options_texts_or_weights_are_refused() {
    type Change = fn(usize) -> Result<Trainer>;
    let cases: [(&str, Change); 4] = [
        ("`options.lr` = 0.5, rank 0 0.001", |rank| {
            let lr = if rank == 1 { 0.5 } else { 1e-3 };
            begin(TrainOptions { lr, ..options(3, 1, DType::F32) })
        }),
        ("`options.accumulate` = 2, rank 0 1", |rank| begin(options(3, 1 + rank, DType::F32))),
        ("`data.fingerprint`", |rank| {
            let config = AttentionLayersConfig { heads: 1, ..AttentionLayersConfig::decoder(8, 1) };
            let text = ByteText::from_bytes([b'a' + rank as u8; 400].to_vec())?;
            let net = TransformerWrapperConfig::new(256, LENGTH, config);
            Trainer::new(AutoregressiveConfig { net, ..Default::default() }, options(3, 1, DType::F32), text, device())
        }),
        ("other weights", |rank| {
            let trainer = begin(options(3, 1, DType::F32))?;
            let (_, param) = trainer.params().iter().next().expect("a parameter");
            param.set(param.tensor().affine(1.0, rank as f64)?)?;
            Ok(trainer)
        }),
    ];
    for (expected, change) in cases {
        for result in ranks(2, |ranks| change(ranks.rank())?.with_ranks(ranks, RankOptions::default()).map(drop)) {
            let message = result.expect_err("refused").to_string();
            assert!(message.contains("rank 1") && message.contains(expected), "{expected}: {message}");
        }
    }
}

#[test]
fn followers_do_what_the_first_does() {
    let folder = Folder::new("follow");
    let of = |accumulate| begin(TrainOptions { recompute: true, ..options(3, accumulate, DType::F32) });
    let mut one = of(2).expect("a run");
    go_on(&mut one, 3, &folder.at("expected")).expect("trained");
    let loss = |model: &AutoregressiveWrapper| {
        let tokens = Tensor::zeros([1, LENGTH], DType::I64, device())?;
        model.loss(&tokens, &ForwardOptions::default())?.item()
    };
    let expected = one.evaluate(loss).expect("a loss");
    for zero in [0, 1, 3] {
        let results = ranks(2, |ranks| {
            let options = RankOptions { zero, ..Default::default() };
            let mut trainer = of(1)?.with_ranks(ranks.clone(), options)?;
            if ranks.rank() == 0 {
                go_on(&mut trainer, 3, &folder.at("saved"))?;
                assert_eq!(trainer.evaluate(loss)?, expected, "stage {zero}");
                assert!(trainer.asked_to_stop(), "the other rank was asked");
                trainer.end_ranks()?;
            } else {
                trainer.follow(&|| true)?;
            }
            Ok::<_, x_transformers::Error>(trainer.steps_done())
        });
        assert_eq!(results.into_iter().map(|steps| steps.expect("trained")).collect::<Vec<_>>(), [3, 3]);
        assert!(files(&folder.at("saved")) == files(&folder.at("expected")), "stage {zero}");
    }
}

#[test]
fn ranks_that_call_other_methods_are_told() {
    let results = ranks(2, |ranks| {
        let mut trainer = begin(options(3, 1, DType::F32))?.with_ranks(ranks.clone(), RankOptions::default())?;
        if ranks.rank() == 0 { trainer.end_ranks() } else { trainer.step().map(drop) }
    });
    let message = results[1].as_ref().expect_err("refused").to_string();
    assert!(message.contains("rank 0 called end_ranks, but rank 1 step"), "{message}");
}

/// Gradients that overflow in a single rank's batch are skipped on all, and a loss that is not finite ends all.
#[test]
fn guards_agree() {
    let results = ranks(2, |ranks| {
        let mut trainer =
            begin(TrainOptions { lr: 1e30, ..options(9, 1, DType::F32) })?.with_ranks(ranks, RankOptions::default())?;
        for _ in 0..9 {
            if let Err(error) = trainer.step() {
                return Ok(Some(error.to_string()));
            }
        }
        Ok::<_, x_transformers::Error>(None)
    });
    let said: Vec<_> = results.into_iter().map(|result| result.expect("no other error").expect("not finite")).collect();
    assert_eq!(said[0], said[1]);
}

#[test]
fn optimizers_of_elements_can_be_sharded() {
    let folder = Folder::new("optimizers");
    let kinds = [OptimizerKind::Sgd, OptimizerKind::Lion, OptimizerKind::Adafactor, OptimizerKind::Muon];
    for optimizer in kinds {
        let of = |accumulate| begin(TrainOptions { optimizer, ..options(2, accumulate, DType::F32) });
        go_on(&mut of(3).expect("a run"), 2, &folder.at("expected")).expect("trained");
        let whole = matches!(optimizer, OptimizerKind::Adafactor | OptimizerKind::Muon);
        let results = ranks(3, |ranks| {
            let saved = folder.at(ranks.rank());
            let mut trainer = of(1)?.with_ranks(ranks, RankOptions { zero: u8::from(!whole), ..Default::default() })?;
            go_on(&mut trainer, 2, &saved)
        });
        results.into_iter().for_each(|result| result.expect("trained"));
        assert!(files(&folder.at(0)) == files(&folder.at("expected")), "{optimizer}");
        let results =
            ranks(2, |ranks| of(1)?.with_ranks(ranks, RankOptions { zero: 2, ..Default::default() }).map(drop));
        for result in results.into_iter().filter(|_| whole) {
            let message = result.expect_err("refused").to_string();
            assert!(message.contains("needs whole matrices") && message.contains(optimizer.name()), "{message}");
        }
    }
}

/// The frozen weights of a base are divided too; the adapter is not.
#[test]
fn adapters_learn_on_a_divided_base() {
    let folder = Folder::new("adapters");
    begin(options(1, 1, DType::F32)).expect("a run").save(folder.at("base")).expect("saved");
    let of = |accumulate, dtype| {
        let lora = LoraOptions { r: 4, ..Default::default() };
        let config = LoraConfig::new(folder.at("base"), lora, 5)?;
        let options = TrainOptions { recompute: true, ..options(2, accumulate, dtype) };
        Trainer::<LoraModel>::start(config, options, text(), device())
    };
    for dtype in [DType::F32, DType::BF16] {
        go_on(&mut of(4, dtype).expect("a run"), 2, &folder.at("expected")).expect("trained");
        let results = ranks(2, |ranks| {
            let saved = folder.at(ranks.rank());
            let start = || of(2, dtype);
            let trainer = if dtype == DType::F32 { deferred_init(start) } else { start() };
            let mut trainer = trainer?.with_ranks(ranks, RankOptions { zero: 3, ..Default::default() })?;
            let base = trainer.model().frozen_params();
            let divided = base.iter().filter(|(_, param)| param.tensor().to_f64_vec().is_err()).count();
            assert!(divided > 10 && divided < base.iter().count(), "{divided}");
            go_on(&mut trainer, 2, &saved)
        });
        results.into_iter().for_each(|result| result.expect("trained"));
        assert!(files(&folder.at(0)) == files(&folder.at("expected")), "{dtype}");
    }
}

/// Weights that are with other ranks are errors, never numbers, and within `evaluate` all are there.
#[test]
fn divided_weights_are_gathered_or_refused() {
    let folder = Folder::new("divided");
    let of = |accumulate| {
        let options = TrainOptions { ema_decay: None, ..options(2, accumulate, DType::F32) };
        begin(TrainOptions { recompute: true, ..options })
    };
    let mut one = of(2).expect("a run");
    go_on(&mut one, 2, &folder.at("expected")).expect("trained");
    let tokens = Tensor::zeros([1, LENGTH], DType::I64, device()).expect("memory");
    let loss = |model: &AutoregressiveWrapper| model.loss(&tokens, &ForwardOptions::default())?.item();
    let (expected, whole) = (loss(one.model()).expect("a loss").to_bits(), one.params().state_dict());
    let results = ranks(2, |ranks| {
        let mut trainer = of(1)?.with_ranks(ranks.clone(), RankOptions { zero: 3, ..Default::default() })?;
        go_on(&mut trainer, 2, &folder.at(ranks.rank()))?;
        assert_eq!(trainer.evaluate(|model| loss(model))?.to_bits(), expected);
        let mut messages = vec![loss(trainer.model()).map(drop)];
        let state = trainer.params().state_dict();
        let name = state.keys().find(|name| name.contains(".layers.0.")).expect("a layer");
        messages.push(state[name].to_f64_vec().map(drop));
        messages.push(state[name].affine(1.0, 0.0).map(drop));
        let param = trainer.params().get(name).expect("a parameter");
        messages.push(Tensor::zeros(*param.tensor().shape(), DType::F32, device()).and_then(|zeros| param.set(zeros)));
        messages.push(trainer.params().load(&whole));
        for message in messages {
            let message = message.expect_err("refused").to_string();
            assert!(message.contains("divided among ranks (ZeRO 3)"), "{message}");
        }
        let inside = trainer.evaluate(|_| trainer.params().get(name).expect("a parameter").tensor().to_f64_vec())?;
        assert_eq!(inside, whole[name].to_f64_vec()?);
        assert!(trainer.params().get(name).expect("a parameter").tensor().to_f64_vec().is_err());
        // Metrics of a caller's, with all weights.
        let mut seen = 0;
        trainer.validate_each(&mut |model, _| {
            seen += 1;
            assert_eq!(loss(model)?.to_bits(), expected);
            Ok(())
        })?;
        assert!(seen > 0);
        Ok::<_, x_transformers::Error>(())
    });
    results.into_iter().for_each(|result| result.expect("the weights of one process"));
    assert!(files(&folder.at(0)) == files(&folder.at("expected")));
}

#[test]
fn stage_3_refuses_what_it_cannot_do() {
    let of = |dropout: f64, recompute| {
        let layers = json!({"kind": "Decoder", "dim": 16, "depth": 2, "heads": 2, "layer_dropout": dropout});
        let net = json!({"num_tokens": 128, "max_seq_len": LENGTH + 1, "attn_layers": layers});
        let config = json!({"model": "AutoregressiveWrapper", "version": "2", "net": net});
        let options = TrainOptions { recompute, ..options(2, 1, DType::F32) };
        Trainer::new(Config::from_value(config)?, options, text(), device())
    };
    for (dropout, recompute, zero, expected) in [
        (0.0, false, 3, "requires `recompute`"),
        (0.5, true, 3, "`layer_dropout`"),
        (0.0, true, 4, "0, 1, 2 or 3, got 4"),
    ] {
        let results = ranks(2, |ranks| {
            of(dropout, recompute)?.with_ranks(ranks, RankOptions { zero, ..Default::default() }).map(drop)
        });
        for result in results {
            let message = result.expect_err("refused").to_string();
            assert!(message.contains(expected), "{expected}: {message}");
        }
    }
}

/// The text, without a target in some micro-batches of each step.
struct Masked {
    text: ByteText,
    without: &'static [&'static [u64]],
}

impl BatchSource for Masked {
    type Batch = TokenBatch;

    fn batch(&self, request: &BatchRequest) -> Result<TokenBatch> {
        let batch = self.text.batch(request)?;
        let without = self.without.get(request.step as usize).copied().unwrap_or_default();
        let counts = |at: u64| !without.contains(&request.micro) && !(at + request.micro).is_multiple_of(3);
        let shape = *batch.tokens.shape();
        let mask: Vec<bool> = (0..shape.numel() as u64).map(counts).collect();
        batch.with_loss_mask(Tensor::from_vec(mask, shape, &Device::Cpu)?)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
        self.text.validation_batches(request)
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        self.text.check(request)
    }

    fn print(&self) -> Result<DataPrint> {
        self.text.print()
    }
}

/// A model on a text with masks, with recomputation.
fn begin_masked(without: &'static [&'static [u64]], accumulate: usize) -> Result<Trainer> {
    let layers = AttentionLayersConfig { heads: 2, ..AttentionLayersConfig::decoder(64, 2) };
    let config = AutoregressiveConfig { net: TransformerWrapperConfig::new(128, LENGTH, layers), ..Default::default() };
    let options = TrainOptions { recompute: true, ..options(4, accumulate, DType::F32) };
    Trainer::new(config, options, Masked { text: text(), without }, device())
}

/// A pass on a batch without targets has no loss, but the other ranks wait for it in stage 3.
#[test]
fn micro_batches_without_targets_hold_nobody_up() {
    let folder = Folder::new("masked");
    let (saved, expected) = (folder.at("saved"), folder.at("expected"));
    let without: &[&[u64]] = &[&[], &[0, 1], &[1, 3], &[0, 2, 3, 4]];
    let mut one = begin_masked(without, 5).expect("a run");
    go_on(&mut one, 1, &saved).expect("trained");
    go_on(&mut one, 4, &expected).expect("trained");
    let all = [(2, 0), (2, 2), (2, 3), (3, 3), (5, 3)];
    let some = if *device() == Device::Cpu { &all[..] } else { &all[2..3] };
    println!("{} of {} numbers of ranks and stages", some.len(), all.len());
    for &(size, zero) in some {
        for overlap in [false, true] {
            let results = ranks(size, |ranks| {
                let rank = ranks.rank();
                let trainer = Trainer::resume(&saved, Masked { text: text(), without }, device())?;
                let mut trainer = trainer.with_ranks(ranks, RankOptions { overlap, zero, ..Default::default() })?;
                go_on(&mut trainer, 4, &folder.at(rank))
            });
            results.into_iter().for_each(|result| result.expect("trained"));
            assert!(files(&folder.at(0)) == files(&expected), "{size} ranks, stage {zero}, overlap {overlap}");
        }
    }
}

#[test]
fn steps_without_targets_are_errors_on_all_ranks() {
    for zero in [0, 3] {
        let results = ranks(2, |ranks| {
            let trainer = begin_masked(&[&[0], &[0, 1, 2, 3]], 2)?;
            let mut trainer = trainer.with_ranks(ranks, RankOptions { zero, ..Default::default() })?;
            trainer.step()?;
            Ok::<_, x_transformers::Error>(trainer.step().map(drop))
        });
        for result in results {
            let message = result.expect("a step").expect_err("refused").to_string();
            assert!(message.contains("no target of step 1 counts"), "stage {zero}: {message}");
        }
    }
}

/// A rank that loses the others: its next gather is an error, and those after it are never answered.
#[derive(Debug)]
struct Lost {
    ranks: Arc<dyn Communicator>,
    /// 0 before the others are lost, then one more than the number of gathers since.
    since: AtomicUsize,
}

impl Communicator for Lost {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }

    fn size(&self) -> usize {
        self.ranks.size()
    }

    fn barrier(&self) -> Result<()> {
        self.ranks.barrier()
    }

    fn broadcast_bytes(&self, bytes: &mut [u8], root: usize) -> Result<()> {
        self.ranks.broadcast_bytes(bytes, root)
    }

    fn all_gather_bytes(&self, mine: &[u8], all: &mut [u8]) -> Result<()> {
        let lost = |since: usize| (since > 0).then_some(since + 1);
        match self.since.fetch_update(Ordering::SeqCst, Ordering::SeqCst, lost) {
            Err(_) => self.ranks.all_gather_bytes(mine, all),
            Ok(1) => Alone.all_gather_bytes(mine, &mut []),
            Ok(_) => loop {
                std::thread::park();
            },
        }
    }

    fn all_to_all_bytes(&self, sent: &[u8], received: &mut [u8]) -> Result<()> {
        self.ranks.all_to_all_bytes(sent, received)
    }
}

/// The next layer is gathered ahead when a pass fails; nobody waits for it when the trainer is dropped.
#[test]
fn a_pass_that_fails_leaves_what_it_gathers_ahead() {
    let results = ranks(2, |ranks| {
        let lost = Arc::new(Lost { ranks, since: AtomicUsize::new(0) });
        let trainer = begin_masked(&[], 1)?;
        let mut trainer = trainer.with_ranks(lost.clone(), RankOptions { zero: 3, ..Default::default() })?;
        trainer.step()?;
        lost.since.store(1, Ordering::SeqCst);
        let failed = trainer.step().map(drop);
        drop(trainer);
        Ok::<_, x_transformers::Error>((failed, lost.since.load(Ordering::SeqCst)))
    });
    for result in results {
        let (failed, since) = result.expect("a step");
        failed.expect_err("lost");
        println!("{} gathers", since - 1);
    }
}
