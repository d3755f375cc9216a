//! Sources of batches: mixtures, iterators, masks, resumed runs of every source, and the threads ahead of the step.

mod documents;

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use x_transformers::{
    DType, Device, Error, ErrorKind, ParamStore, Philox, Result, Tensor,
    config::{
        AttentionConfig, AttentionLayersConfig, AutoregressiveConfig, Config, FeedForwardConfig, ShiftTokens,
        TransformerWrapperConfig,
    },
    models::{AutoregressiveWrapper, ForwardOptions},
    train::{
        Batch, BatchRequest, BatchSource, ByteText, DataPrint, Examples, Mixture, Sequence, Sequences, TokenBatch,
        TokenData, TokenWriter, TrainModel, TrainOptions, Trainer,
    },
};

use super::Folder;
use crate::common::{device, name_of};

type Source = Box<dyn BatchSource<Batch = TokenBatch>>;

pub const VOCABULARY: usize = 128;
/// The token that begins each document.
pub const END: i64 = 0;

/// Tokens with something to learn: documents of words from a small list.
pub fn tokens(stream: u64, count: usize) -> Vec<i64> {
    let random = Philox::new(9, stream);
    let mut tokens = Vec::new();
    for draw in 0.. {
        if tokens.len() >= count {
            break;
        }
        match random.below(draw, 12) {
            0 => tokens.push(END),
            word => tokens.extend([word * 7 % 100 + 1, word * 3 % 50 + 1].map(|token| token as i64)),
        }
    }
    tokens.truncate(count);
    tokens
}

pub fn write(path: &Path, num_tokens: usize, tokens: &[i64]) {
    let mut writer = TokenWriter::create(path, num_tokens, Some(END)).expect("a writer");
    tokens.chunks(1000).for_each(|part| writer.write(part).expect("tokens"));
    assert_eq!(writer.len(), tokens.len() as u64);
    writer.finish(Some(3 * tokens.len() as u64)).expect("a file");
}

pub fn options(steps: u64) -> TrainOptions {
    TrainOptions { steps, warmup: 3, lr: 1e-2, batch_size: 4, seq_len: 24, accumulate: 2, ..Default::default() }
}

pub fn request(options: &TrainOptions, step: u64, micro: u64) -> BatchRequest {
    options.request(step, micro, VOCABULARY)
}

pub fn rows(batch: &TokenBatch) -> Vec<Vec<i64>> {
    let width = batch.tokens.shape()[1];
    batch.tokens.to_vec::<i64>().expect("tokens").chunks(width).map(<[i64]>::to_vec).collect()
}

/// Sequences of an iterator: the alphabet's letters over and over, so that rows show what was skipped.
fn numbers(lengths: &'static [usize], epochs: Arc<AtomicU64>) -> Sequences {
    let make = move |epoch| {
        epochs.fetch_max(epoch + 1, Ordering::Relaxed);
        let mut next = 100 * epoch as i64;
        lengths.iter().map(move |&length| {
            next += length as i64;
            Ok((next - length as i64..next).collect::<Vec<_>>().into())
        })
    };
    Sequences::new("numbers", make, vec![(0..9).collect::<Vec<_>>().into(), (0..10).collect::<Vec<_>>().into()])
}

#[test]
fn sequences_are_packed_and_skipped() -> Result<()> {
    let epochs = Arc::new(AtomicU64::new(0));
    let source = numbers(&[3, 1, 20, 6], epochs.clone());
    let options = TrainOptions { batch_size: 2, seq_len: 4, accumulate: 1, ..Default::default() };
    let ask = |step| options.request(step, 0, 1000);
    // Three epochs of 30 tokens each.
    let stream: Vec<i64> = [0..30, 100..130, 200..230].into_iter().flatten().collect();
    let expected =
        |step: usize| -> Vec<Vec<i64>> { (0..2).map(|row| stream[(2 * step + row) * 4..][..5].to_vec()).collect() };
    for step in 0..10 {
        assert_eq!(rows(&source.batch(&ask(step))?), expected(step as usize), "step {step}");
    }
    assert_eq!(epochs.load(Ordering::Relaxed), 3);
    // In any order: back and forth.
    for step in [9, 0, 3, 3, 7, 1] {
        assert_eq!(rows(&source.batch(&ask(step))?), expected(step as usize), "step {step}");
    }
    assert!(source.in_order());
    // 19 tokens to validate on: four rows of four targets.
    let validation: Vec<Vec<i64>> = source.validation_batches(&ask(0))?.iter().flat_map(rows).collect();
    assert_eq!(validation, [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 0, 1, 2, 3], [3, 4, 5, 6, 7]]);

    // Borders: the first token of a document follows nothing.
    let bordered = TrainOptions { document_mask: true, ..options.clone() };
    let batch = source.batch(&bordered.request(0, 0, 1000))?;
    let documents = batch.documents.clone().expect("documents").to_vec::<i64>()?;
    assert_eq!(documents, [1, 1, 1, 2, 3, 3, 3, 3, 3, 3]);
    let mask = batch.loss_mask.clone().expect("a mask").to_vec::<bool>()?;
    assert_eq!(mask, [true, true, true, false, false, true, true, true, true, true]);
    assert_eq!((batch.targets(), batch.weight()), (6, 1.5));

    for (wrong, part) in [
        (TrainOptions { shuffle: true, ..options.clone() }, "shuffle"),
        (TrainOptions { seq_len: 19, ..options.clone() }, "19 tokens to validate on"),
    ] {
        let message = source.check(&wrong.request(0, 0, 1000)).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    let message = source.batch(&options.request(0, 0, 8)).unwrap_err().to_string();
    assert!(message.contains("0..8") && message.contains("got 8"), "{message}");
    Ok(())
}

#[test]
fn errors_of_an_iterator() -> Result<()> {
    let validation = || vec![(0..50).collect::<Vec<i64>>().into()];
    let ask = |step| TrainOptions { batch_size: 1, seq_len: 4, ..Default::default() }.request(step, 0, 100);
    let message = |source: &Sequences, step| source.batch(&ask(step)).map(drop).unwrap_err().to_string();
    let empty = Sequences::new("empty", |_| Vec::<Result<Sequence>>::new(), validation());
    assert!(message(&empty, 0).contains("epoch 1 has no sequences"));
    let nothing = Sequences::new("nothing", |_| vec![Ok(vec![1, 2].into()), Ok(Sequence::default())], validation());
    assert!(message(&nothing, 0).contains("sequence 2 of epoch 1"), "{}", message(&nothing, 0));
    let ragged = || Sequence { tokens: vec![1, 2, 3], loss_mask: vec![true] };
    let ragged = Sequences::new("ragged", move |_| vec![Ok(ragged())], validation());
    assert!(message(&ragged, 0).contains("loss_mask") && message(&ragged, 0).contains("expected 3"));
    // An error leaves the rows before it as they were, and is not forgotten.
    let broken = |_| {
        let failed = Error::new(ErrorKind::Option { key: "line".into(), why: "is broken".into() });
        vec![Ok((0..10).collect::<Vec<i64>>().into()), Err(failed)]
    };
    let broken = Sequences::new("broken", broken, validation());
    for _ in 0..2 {
        assert_eq!(rows(&broken.batch(&ask(0))?), [[0, 1, 2, 3, 4]]);
        assert!(message(&broken, 2).contains("is broken") && message(&broken, 2).contains("sequence 2"));
        assert_eq!(rows(&broken.batch(&ask(1))?), [[4, 5, 6, 7, 8]]);
    }
    Ok(())
}

/// A source whose rows are numbered.
struct Numbered(i64);

impl BatchSource for Numbered {
    type Batch = TokenBatch;

    fn batch(&self, request: &BatchRequest) -> Result<TokenBatch> {
        let numbers = (request.first..).take(request.rows).flat_map(|row| [self.0, row as i64]);
        TokenBatch::new(Tensor::from_vec(numbers.collect(), [request.rows, 2], &Device::Cpu)?)
    }

    fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
        Ok(vec![self.batch(request)?])
    }

    fn check(&self, request: &BatchRequest) -> Result<()> {
        match request.seq_len {
            1 => Ok(()),
            _ => Err(Error::new(ErrorKind::Option { key: "seq_len".into(), why: "expected 1".into() })),
        }
    }

    fn print(&self) -> Result<DataPrint> {
        Ok(DataPrint::new("numbers", 10, self.0 as u64))
    }
}

#[test]
fn mixtures_keep_their_shares() -> Result<()> {
    let weights = [5.0, 0.3, 2.7, 2.0];
    let mix = |weights: &[f64]| {
        Mixture::new(weights.iter().zip(0..).map(|(&weight, at)| (weight, Box::new(Numbered(at)) as Source)).collect())
    };
    let mixture = mix(&weights)?;
    for batch_size in [1usize, 3, 8] {
        let options = TrainOptions { batch_size, seq_len: 1, ..Default::default() };
        let mut taken = [0u64; 4];
        let mut rows_so_far = 0;
        for step in 0..600 {
            let batch = mixture.batch(&options.request(step, 0, 1 << 30))?;
            let found = rows(&batch);
            assert_eq!(found.len(), batch_size);
            rows_so_far += batch_size as u64;
            for row in found {
                // Each source is taken in order, without a gap.
                assert_eq!(row[1] as u64, taken[row[0] as usize], "step {step}");
                taken[row[0] as usize] += 1;
            }
            // As evenly as possible at any time.
            for (share, &count) in weights.iter().zip(&taken) {
                let expected = share / 10.0 * rows_so_far as f64;
                assert!((count as f64 - expected).abs() < 3.0, "{taken:?} after {rows_so_far} rows");
            }
        }
    }
    assert_eq!(
        mixture.validation_batches(&TrainOptions { seq_len: 1, ..Default::default() }.request(0, 0, 9))?.len(),
        4
    );
    assert!(!mixture.in_order() && mixture.bytes_per_token().is_none());
    assert_eq!(mixture.print()?.size, 40);
    assert_ne!(mixture.print()?, mix(&[5.0, 0.3, 2.7, 2.5])?.print()?);
    for wrong in [&[][..], &[0.0], &[1.0, -1.0], &[f64::NAN], &[f64::INFINITY]] {
        assert!(matches!(mix(wrong).map(drop).map_err(Error::into_kind), Err(ErrorKind::Option { .. })), "{wrong:?}");
    }
    let message = mixture.check(&TrainOptions::default().request(0, 0, 9)).unwrap_err().to_string();
    assert!(message.contains("source 1") && message.contains("seq_len"), "{message}");
    // Parts with masks and without: those without count wholly.
    let part = |masked: bool| -> Result<TokenBatch> {
        let batch = TokenBatch::new(Tensor::from_vec(vec![1i64, 2, 3], [1, 3], &Device::Cpu)?)?;
        if !masked {
            return Ok(batch);
        }
        let mask = Tensor::from_vec(vec![true, false, true], [1, 3], &Device::Cpu)?;
        batch.with_loss_mask(mask)?.with_documents(Tensor::from_vec(vec![7i64, 7, 8], [1, 3], &Device::Cpu)?)
    };
    let joined = TokenBatch::concat(&[part(false)?, part(true)?])?;
    assert_eq!((joined.targets(), joined.weight()), (3, 1.5));
    assert_eq!(joined.loss_mask.expect("a mask").to_vec::<bool>()?, [true, true, true, true, false, true]);
    assert_eq!(joined.documents.expect("documents").to_vec::<i64>()?, [0, 0, 0, 7, 7, 8]);
    assert!(TokenBatch::concat(&[]).is_err());
    Ok(())
}

/// A small decoder with rotary positions.
fn config(dropout: f64) -> AutoregressiveConfig {
    let attn_layers = AttentionLayersConfig {
        heads: 2,
        rotary_pos_emb: true,
        rotary_qk_only: true,
        attn: AttentionConfig { dim_head: 32, dropout, ..Default::default() },
        ff: FeedForwardConfig { dropout, ..Default::default() },
        ..AttentionLayersConfig::decoder(32, 1)
    };
    let net = TransformerWrapperConfig { num_tokens: VOCABULARY, max_seq_len: 32, attn_layers, ..Default::default() };
    AutoregressiveConfig { net, ..Default::default() }
}

/// The kinds of sources, with the options of their runs.
const SOURCES: [&str; 7] = ["text", "tokens", "shuffled", "documents", "iterator", "examples", "mixture"];

/// A source of one of these kinds, whose files lie in a folder.
fn source(kind: &str, folder: &Path) -> Source {
    let path = folder.join("data.tokens");
    if !path.exists() {
        write(&path, VOCABULARY, &tokens(1, 3000));
    }
    let text =
        || ByteText::from_bytes("it was the best of times, it was the worst of times; ".repeat(40)).expect("a text");
    let files = || TokenData::open(&[&path]).expect("a file");
    let iterator = || {
        let make = |epoch| {
            (0..40u64).map(move |index| {
                let tokens = tokens(100 * epoch + index, 5 + index as usize % 30);
                let loss_mask = tokens.iter().map(|token| token % 3 != 0).collect();
                Ok(Sequence { tokens, loss_mask })
            })
        };
        Sequences::new("drawn", make, vec![tokens(2, 100).into()])
    };
    match kind {
        "text" => Box::new(text()),
        "tokens" | "shuffled" | "documents" => Box::new(files()),
        "iterator" => Box::new(iterator()),
        "examples" => {
            let example = |index: u64| {
                let tokens = tokens(index % 5, 3 + index as usize % 30);
                let loss_mask = (0..tokens.len()).map(|at| at > 1).collect();
                Sequence { tokens, loss_mask }
            };
            Box::new(Examples::new((0..23).map(example).collect(), (0..5).map(example).collect()).expect("examples"))
        }
        _ => {
            let parts: Vec<(f64, Source)> =
                vec![(1.0, Box::new(text())), (2.5, Box::new(files())), (0.7, Box::new(iterator()))];
            Box::new(Mixture::new(parts).expect("a mixture"))
        }
    }
}

fn options_of(kind: &str, steps: u64) -> TrainOptions {
    TrainOptions { shuffle: kind == "shuffled", document_mask: kind == "documents", ..options(steps) }
}

fn bits(trainer: &Trainer) -> Vec<Vec<u32>> {
    let values = |tensor: &Tensor| tensor.to_vec::<f32>().expect("f32").into_iter().map(f32::to_bits).collect();
    trainer.params().iter().map(|(_, param)| values(&param.tensor())).collect()
}

/// For every source, a run that is saved and resumed has the bits of an uninterrupted one, with any number of threads that
/// prepare batches.
#[test]
fn every_source_resumes_exactly() -> Result<()> {
    for kind in SOURCES {
        let folder = Folder::new(&format!("resume-{kind}"));
        let make = || source(kind, &folder.0);
        let start = || Trainer::new(config(0.1), options_of(kind, 9), make(), device());
        let (mut whole, mut parts, mut alone) = (start()?, start()?, start()?);
        alone.set_workers(0);
        let before = whole.validate()?;
        let run = folder.0.join("run");
        for step in 0..9 {
            let report = whole.step()?;
            assert_eq!(alone.step()?, report, "{kind}");
            assert_eq!(parts.step()?, report, "{kind}");
            if step % 3 == 1 {
                parts.save(&run)?;
                parts = Trainer::resume(&run, make(), device())?;
                parts.set_workers(step as usize);
            }
        }
        assert!(bits(&whole) == bits(&parts) && bits(&whole) == bits(&alone), "{kind}");
        assert!(whole.validate()? == parts.validate()? && whole.validate()? < before, "{kind}");
        assert_eq!(whole.data().print()?, whole.state().data);
        // Other data.
        let other = ByteText::from_bytes("other ".repeat(300))?;
        let message = match kind {
            "documents" | "shuffled" | "tokens" => {
                write(&folder.0.join("data.tokens"), VOCABULARY, &tokens(3, 3000));
                Trainer::resume(&run, make(), device()).map(drop).unwrap_err().to_string()
            }
            _ => Trainer::resume(&run, other, device()).map(drop).unwrap_err().to_string(),
        };
        assert!(message.contains("use the same data") && message.contains("fingerprint"), "{message}");
    }
    Ok(())
}

/// The names under which this program runs itself as a child.
pub const CHILD: &str = "XT_TEST_DATA_CHILD";
const KIND: &str = "XT_TEST_DATA_KIND";

/// Not a separate test: trains and saves until the run is done, or kills itself in the middle of a step.
#[test]
fn data_child() {
    let Some(folder) = env::var_os(CHILD).map(PathBuf::from) else { return };
    let kind = env::var(KIND).expect("a kind");
    let run = folder.join("run");
    let mut trainer = match Trainer::resume(&run, source(&kind, &folder), device()) {
        Ok(trainer) => trainer,
        Err(error) => {
            assert!(!run.join("config.json").exists(), "{error}");
            Trainer::new(config(0.1), options_of(&kind, 12), source(&kind, &folder), device()).expect("a trainer")
        }
    };
    let until = trainer.steps_done() + 5;
    while trainer.steps_done() < trainer.options().steps {
        trainer.step().expect("a step");
        if trainer.steps_done().is_multiple_of(2) {
            trainer.save(&run).expect("a checkpoint");
        }
        if trainer.steps_done() == until && env::var_os("XT_TEST_DATA_ABORT").is_some() {
            // As sudden as a kill; batches of later steps are being prepared.
            std::process::abort();
        }
    }
    println!("done");
}

/// Like `trainer_killed_at_any_moment_ends_with_the_same_bits`, for every source.
#[test]
fn every_source_survives_a_kill() {
    for kind in SOURCES {
        let run = |name: &str, abort: bool| {
            let folder = Folder(env::temp_dir().join(format!("xt-data-kill-{kind}-{name}-{}", std::process::id())));
            fs::create_dir_all(&folder.0).expect("a folder");
            for round in 0.. {
                let mut command = Command::new(env::current_exe().expect("this program"));
                command
                    .args([&*name_of(module_path!(), "data_child"), "--exact", "--nocapture", "--test-threads=1"])
                    .env(CHILD, &folder.0)
                    .env(KIND, kind)
                    .stderr(Stdio::null());
                if abort {
                    command.env("XT_TEST_DATA_ABORT", "1");
                }
                let output = command.output().expect("the child runs");
                if String::from_utf8_lossy(&output.stdout).contains("done") {
                    assert_eq!(round, if abort { 2 } else { 0 }, "{kind}: kills");
                    break;
                }
                assert!(abort && round < 2, "{kind}: {output:?}");
            }
            ["model.safetensors", "optimizer.safetensors"]
                .map(|name| fs::read(folder.0.join("run").join(name)).expect(name))
        };
        assert!(run("whole", false) == run("parts", true), "{kind}");
    }
}

#[test]
fn sources_that_fail_or_panic() -> Result<()> {
    struct Failing(ByteText, u64, bool);
    impl BatchSource for Failing {
        type Batch = TokenBatch;
        fn batch(&self, request: &BatchRequest) -> Result<TokenBatch> {
            if request.step >= self.1 {
                assert!(!self.2, "a source that panics");
                return Err(Error::new(ErrorKind::Option { key: "line".into(), why: "is broken".into() }));
            }
            self.0.batch(request)
        }
        fn validation_batches(&self, request: &BatchRequest) -> Result<Vec<TokenBatch>> {
            self.0.validation_batches(request)
        }
        fn check(&self, request: &BatchRequest) -> Result<()> {
            self.0.check(request)
        }
        fn print(&self) -> Result<DataPrint> {
            self.0.print()
        }
    }
    let text = ByteText::from_bytes("to be or not to be, ".repeat(60))?;
    for panics in [false, true] {
        let data = Failing(text.clone(), 3, panics);
        let mut trainer = Trainer::new(config(0.0), options(10), data, device())?;
        // Batches of the step that fails are prepared before, and are no trouble until then.
        for _ in 0..3 {
            trainer.step()?;
        }
        let before = bits(&trainer);
        for _ in 0..2 {
            let message = trainer.step().unwrap_err().to_string();
            assert!(message.contains(if panics { "panicked" } else { "is broken" }), "{message}");
            assert!(trainer.steps_done() == 3 && bits(&trainer) == before);
        }
        assert!(trainer.validate()?.is_finite());
    }
    Ok(())
}
