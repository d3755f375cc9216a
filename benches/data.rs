//! The data path: sequences of 256 tokens a second that one core makes into batches, by source; how a token file of 20 GB
//! opens; and how long a training step of model D (`configs/decoder.json`, 1 × 1024 tokens, f32) waits for its batch.
//!
//!     cargo bench --bench data

use std::{
    collections::VecDeque,
    fs::{self, File},
    hint::black_box,
    io::Write,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use x_transformers::{
    Device, Philox, Result,
    config::Config,
    train::{
        BatchRequest, BatchSource, ByteText, Sequence, Sequences, TokenBatch, TokenData, TokenWriter, TrainOptions,
        Trainer,
    },
};

const NUM_TOKENS: usize = 50_304;
const SEQ_LEN: usize = 256;
const ROWS: usize = 32;
/// Mean number of tokens of a document.
const DOCUMENT: u64 = 400;
/// Bytes of the sparse file.
const SPARSE: u64 = 20_000_000_000;

/// Sizes of a run: tokens of the sources, how long each is measured, rounds, steps, tokens of a step.
struct Sizes {
    tokens: usize,
    time: Duration,
    rounds: usize,
    steps: u64,
    length: usize,
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Documents of random tokens, each after token 0.
fn tokens(count: usize) -> Vec<u32> {
    let random = Philox::new(0, 0);
    let token = |at: u64| match random.below(2 * at, DOCUMENT) {
        0 => 0,
        _ => 1 + random.below(2 * at + 1, NUM_TOKENS as u64 - 1) as u32,
    };
    (0..count as u64).map(token).collect()
}

fn options(shuffle: bool, document_mask: bool) -> TrainOptions {
    TrainOptions { batch_size: ROWS, seq_len: SEQ_LEN, shuffle, document_mask, ..Default::default() }
}

/// Returns sequences a second, the median of the rounds; all is computed by this thread.
fn rate(source: &dyn BatchSource<Batch = TokenBatch>, options: &TrainOptions, sizes: &Sizes) -> Result<f64> {
    let mut step = 0;
    let mut rates = Vec::new();
    for _ in 0..sizes.rounds {
        let (clock, mut rows) = (Instant::now(), 0);
        while rows == 0 || clock.elapsed() < sizes.time {
            let request: BatchRequest = options.request(step, 0, NUM_TOKENS);
            rows += black_box(source.batch(&request)?).tokens.shape()[0];
            step += 1;
        }
        rates.push(rows as f64 / clock.elapsed().as_secs_f64());
    }
    Ok(median(rates))
}

fn sources(folder: &Path, sizes: &Sizes) -> Result<()> {
    let all = tokens(sizes.tokens);
    let (train, validation) = all.split_at(all.len() / 10 * 9);
    let path = folder.join("train.tokens");
    let mut writer = TokenWriter::create(&path, NUM_TOKENS, Some(0))?;
    writer.write(&all.iter().map(|&token| i64::from(token)).collect::<Vec<_>>())?;
    writer.finish(None)?;
    let file = TokenData::open(&[&path])?;
    let text = ByteText::from_bytes(all.iter().map(|&token| token as u8).collect::<Vec<_>>())?;
    let memory = TokenData::from_tokens(train, validation, NUM_TOKENS, Some(0), None)?;
    let documents: Vec<Vec<i64>> = train
        .split(|&token| token == 0)
        .filter(|document| !document.is_empty())
        .map(|document| document.iter().map(|&token| i64::from(token)).collect())
        .collect();
    let validation = vec![Sequence::from(validation.iter().map(|&token| i64::from(token)).collect::<Vec<_>>())];
    let iterator = Sequences::new(
        "documents",
        move |_epoch| {
            // An iterator owns what it gives.
            let documents = VecDeque::from(documents.clone());
            documents.into_iter().map(|document| Ok(Sequence::from(document)))
        },
        validation,
    );
    let cases: [(&str, &dyn BatchSource<Batch = TokenBatch>, bool, bool); 8] = [
        ("token file, random offsets", &file, false, false),
        ("token file, `--shuffle`", &file, true, false),
        ("token file, `--shuffle --document-mask`", &file, true, true),
        ("text of bytes, random offsets", &text, false, false),
        ("text of bytes, `--shuffle`", &text, true, false),
        ("records of `--jsonl`, packed, `--shuffle`", &memory, true, false),
        ("records of `--jsonl`, packed, `--shuffle --document-mask`", &memory, true, true),
        ("an iterator of records (`Sequences`), packed", &iterator, false, true),
    ];
    println!("| source | sequences/s of one core |\n|---|---:|");
    for (name, source, shuffle, documents) in cases {
        println!("| {name} | {:.0} |", rate(source, &options(shuffle, documents), sizes)?);
    }
    Ok(())
}

/// Returns a field of this process's status in megabytes.
fn status(field: &str) -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kilobytes: f64 = line.trim_start_matches(':').trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024.0 * kilobytes / 1e6)
}

/// Opens a file and reads what a run reads before its first step, in a process of its own.
fn open(path: &str) -> Result<()> {
    let before = status("VmHWM");
    let clock = Instant::now();
    let data = TokenData::open(&[path])?;
    let opened = clock.elapsed();
    let print = data.print()?;
    let known = clock.elapsed();
    let batch = data.batch(&options(true, false).request(0, 0, NUM_TOKENS))?;
    let read = clock.elapsed();
    let milliseconds = |time: Duration| 1e3 * time.as_secs_f64();
    let size = |size: Option<f64>| size.map_or("unknown".to_string(), |size| format!("{size:.1}"));
    println!(
        "| {} | {:.2} | {:.2} | {:.2} | {} | {} |",
        print.size + batch.tokens.shape()[0] as u64 - ROWS as u64,
        milliseconds(opened),
        milliseconds(known),
        milliseconds(read),
        size(status("VmHWM")),
        size(before)
    );
    Ok(())
}

fn sparse(folder: &Path, sizes: &Sizes) -> Result<()> {
    let path = folder.join("sparse.tokens");
    let numbers = [(SPARSE - 64) / 2, NUM_TOKENS as u64, 0, 0, 0].map(u64::to_le_bytes).concat();
    let header = [&b"XTTOKENS"[..], &1u32.to_le_bytes(), &2u32.to_le_bytes(), &numbers].concat();
    let made = File::create(&path).and_then(|mut file| file.write_all(&header).and_then(|()| file.set_len(SPARSE)));
    if let Err(error) = made {
        println!("no sparse file: {error}");
        return Ok(());
    }
    println!("\n| tokens | opened, ms | and known, ms | and a batch read, ms | peak of the process, MB | before, MB |");
    println!("|---:|---:|---:|---:|---:|---:|");
    for _ in 0..sizes.rounds {
        let program = std::env::current_exe().expect("a program");
        let done = Command::new(program).arg("--open").arg(&path).status().expect("a process");
        assert!(done.success());
    }
    Ok(())
}

/// A step of D beside the time of its batch, which a thread prepares ahead of it: even without that thread the step would not
/// wait longer.
fn waiting(folder: &Path, sizes: &Sizes) -> Result<()> {
    let config = Config::from_json(include_str!("configs/decoder.json"))?;
    let num_tokens = 20_000;
    let path = folder.join("small.tokens");
    let mut writer = TokenWriter::create(&path, num_tokens, Some(0))?;
    let all = tokens(sizes.tokens);
    writer.write(&all.iter().map(|&token| i64::from(token) % num_tokens as i64).collect::<Vec<_>>())?;
    writer.finish(None)?;
    let options = TrainOptions {
        batch_size: 1,
        seq_len: sizes.length,
        shuffle: true,
        steps: sizes.steps + 1,
        ..Default::default()
    };
    let source = TokenData::open(&[&path])?;
    let mut batches = Vec::new();
    for step in 0..100 {
        let clock = Instant::now();
        black_box(source.batch(&options.request(step, 0, num_tokens))?);
        batches.push(clock.elapsed().as_secs_f64());
    }
    let mut trainer = Trainer::new(config, options, source, &Device::Cpu)?;
    trainer.step()?;
    let mut steps = Vec::new();
    for _ in 0..sizes.steps {
        let clock = Instant::now();
        trainer.step()?;
        steps.push(clock.elapsed().as_secs_f64());
    }
    let (batch, step) = (median(batches), median(steps));
    println!("\n| step of D, ms | its batch, ms | share |\n|---:|---:|---:|");
    println!("| {:.1} | {:.4} | {:.5} % |", 1e3 * step, 1e3 * batch, 100.0 * batch / step);
    Ok(())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [first, path, ..] = &arguments[..]
        && first == "--open"
    {
        return open(path);
    }
    let sizes = match arguments.iter().any(|argument| argument == "--test") {
        true => Sizes { tokens: 1 << 16, time: Duration::ZERO, rounds: 1, steps: 1, length: 16 },
        false => Sizes { tokens: 1 << 25, time: Duration::from_millis(500), rounds: 5, steps: 7, length: 1024 },
    };
    let folder = std::env::temp_dir().join(format!("xt-bench-data-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let result =
        sources(&folder, &sizes).and_then(|()| sparse(&folder, &sizes)).and_then(|()| waiting(&folder, &sizes));
    fs::remove_dir_all(&folder).expect("removed");
    result
}
