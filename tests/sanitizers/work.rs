//! Threads that share models: some train one, some generate with it, some train their own models, some write and read
//! checkpoints and load them into the shared model, some read files, trim memory and multiply matrices.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
};

use x_transformers::{
    DType, Device, ParamMap, ParamStore, Philox, Result, Tape, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    io::{TensorFile, read_safetensors, write_safetensors},
    models::{AutoregressiveWrapper, ForwardOptions, GenerateOptions},
    train::{AdamW, AdamWOptions, Optimizer},
};

const CPU: Device = Device::Cpu;
const TOKENS: usize = 64;

fn model(seed: u64) -> Result<(AutoregressiveWrapper, ParamMap)> {
    let layers = AttentionLayersConfig { heads: 2, ..AttentionLayersConfig::decoder(32, 1) };
    let net = TransformerWrapperConfig {
        num_tokens: TOKENS,
        max_seq_len: 48,
        attn_layers: layers,
        ..TransformerWrapperConfig::default()
    };
    let store = ParamStore::new(seed, DType::F32, &CPU);
    let model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store)?;
    Ok((model, store.params()))
}

fn tokens(rows: usize, length: usize, seed: u64) -> Result<Tensor> {
    let random = Philox::new(seed, 1);
    Tensor::generate([rows, length], DType::I64, &CPU, |i| random.below(i as u64, TOKENS as u64) as f64)
}

/// Steps of training; every loss must be a number.
fn train(model: &AutoregressiveWrapper, params: &ParamMap, rounds: usize, seed: u64) -> Result<()> {
    let mut optimizer = AdamW::new(AdamWOptions::default())?;
    for round in 0..rounds {
        let mut tape = Tape::train(seed + round as u64);
        let loss = model.loss(&tokens(4, 40, seed + round as u64)?, &ForwardOptions::default())?;
        assert!(loss.to_f64_vec()?[0].is_finite());
        let grads = tape.backward(&loss)?;
        optimizer.step(params, &grads, 1e-3, Some(1.0))?;
    }
    Ok(())
}

/// Runs the work of one thread.
fn one(thread: usize, rounds: usize, shared: &(AutoregressiveWrapper, ParamMap), folder: &Path) -> Result<()> {
    let (model_of_all, params) = shared;
    let seed = 1000 * thread as u64;
    match thread % 8 {
        0 => train(model_of_all, params, rounds, seed),
        1..=3 => {
            for round in 0..rounds {
                let prompt = tokens(1, 5, seed + round as u64)?.select(0, 0)?;
                let mut count = 0;
                let _ = model_of_all.generate(&prompt, 12, &GenerateOptions::default(), &mut |tokens| {
                    count += tokens.len();
                    true
                })?;
                assert_eq!(count, 12);
            }
            Ok(())
        }
        4 | 5 => {
            let (model, params) = model(seed)?;
            train(&model, &params, rounds, seed)
        }
        6 => {
            let path = folder.join(format!("{thread}.safetensors"));
            for _ in 0..rounds {
                let state: BTreeMap<String, Tensor> =
                    params.iter().map(|(name, param)| (name.to_string(), param.tensor().detach())).collect();
                write_safetensors(&path, &state, &BTreeMap::new())?;
                params.load(&read_safetensors(&path)?)?;
            }
            Ok(())
        }
        _ => {
            let files = Path::new(env!("CARGO_MANIFEST_DIR"));
            let files = files.ancestors().map(|folder| folder.join("tests/files")).find(|files| files.is_dir());
            let files = files.expect("the files of the tests");
            for round in 0..rounds {
                for name in ["archive.pt", "legacy.pt", "quantised.gguf", "parts.safetensors.index.json"] {
                    TensorFile::open(files.join(name))?.tensors()?;
                }
                // Products of every kind: few rows, many, half types, no steps.
                for dtype in [DType::F32, DType::BF16, DType::F64] {
                    for [m, k, n] in [[1, 300, 90], [70, 40, 130], [300, 530, 70], [13, 0, 5]] {
                        let (a, b) = (Tensor::ones([m, k], dtype, &CPU)?, Tensor::ones([n, k], dtype, &CPU)?);
                        let y = a.matmul(&b.transpose(0, 1)?)?.to_f64_vec()?;
                        assert!(y.iter().all(|&y| (y - k as f64).abs() <= 4.0), "{m}x{k}x{n} {dtype}");
                    }
                }
                if round % 2 == 1 {
                    CPU.trim();
                }
            }
            Ok(())
        }
    }
}

/// Runs a number of threads for a number of rounds each.
pub fn run(threads: usize, rounds: usize) -> Result<()> {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("xt-many-threads-{}-{call}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder for checkpoints");
    let shared = model(7)?;
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let (shared, folder) = (&shared, &folder);
        let start = |thread| scope.spawn(move || one(thread, rounds, shared, folder));
        let started: Vec<_> = (0..threads).map(start).collect();
        started.into_iter().map(|thread| thread.join().expect("no thread panics")).collect()
    });
    std::fs::remove_dir_all(&folder).expect("the folder is removed");
    results.into_iter().collect()
}
