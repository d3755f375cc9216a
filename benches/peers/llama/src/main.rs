//! llama.cpp on a GGUF file: its times, its perplexity, its greedy tokens, and its quantiser.
//!
//! ```text
//! llama-peer FILE [--threads T] [--prompt N] [--new M] [--rounds R]   times, a line of JSON
//! llama-peer FILE --interleaved load|prompt|decode …                  a step for each line of standard input
//! llama-peer FILE --perplexity TEXT [--window N]                      loss of a text, a line of JSON
//! llama-peer FILE --check PROMPT [--new M]                            greedy tokens, a line of JSON
//! llama-peer --quantize IN OUT TYPE [--pure]                          Q8_0, Q4_0, Q4_1, …, Q4_K, F16, BF16, F32
//! ```
//!
//! llama.cpp keeps its own settings: the file is mapped, weights are repacked where it has a faster layout, the cache
//! is f16, flash attention is left to it. `--perplexity` cuts the text as `xt generate --score` does.

mod quantize;

use std::{
    error::Error,
    io::BufRead,
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Instant,
};

use llama_cpp_2::{
    context::{LlamaContext, params::LlamaContextParams},
    llama_backend::LlamaBackend,
    llama_batch::LlamaBatch,
    model::{LlamaModel, params::LlamaModelParams},
    token::LlamaToken,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Default)]
struct Options {
    files: Vec<String>,
    threads: Option<usize>,
    prompt: Option<usize>,
    new: Option<usize>,
    rounds: Option<usize>,
    window: Option<usize>,
    interleaved: Option<String>,
    perplexity: Option<PathBuf>,
    check: Option<String>,
    quantize: bool,
    pure: bool,
}

impl Options {
    fn read() -> Result<Self> {
        let (mut options, mut arguments) = (Self::default(), std::env::args().skip(1));
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
            let mut number = || -> Result<Option<usize>> { Ok(Some(value()?.parse()?)) };
            match argument.as_str() {
                "--threads" => options.threads = number()?,
                "--prompt" => options.prompt = number()?,
                "--new" => options.new = number()?,
                "--rounds" => options.rounds = number()?,
                "--window" => options.window = number()?,
                "--interleaved" => options.interleaved = Some(value()?),
                "--perplexity" => options.perplexity = Some(value()?.into()),
                "--check" => options.check = Some(value()?),
                "--quantize" => options.quantize = true,
                "--pure" => options.pure = true,
                option if option.starts_with("--") => return Err(format!("unknown option {option}").into()),
                file => options.files.push(file.into()),
            }
        }
        Ok(options)
    }

    fn threads(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |threads| threads.get()))
    }
}

/// Returns a line of `/proc/self/status` in bytes.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

fn context<'a>(
    backend: &LlamaBackend,
    model: &'a LlamaModel,
    options: &Options,
    length: usize,
) -> Result<LlamaContext<'a>> {
    let threads = options.threads() as i32;
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(length as u32))
        .with_n_batch(length.max(512) as u32)
        .with_n_threads(threads)
        .with_n_threads_batch(threads);
    Ok(model.new_context(backend, params)?)
}

/// Evaluates tokens after the first `position`; logits are wanted of the last one, or of all.
fn evaluate(context: &mut LlamaContext, tokens: &[LlamaToken], position: usize, all: bool) -> Result<()> {
    let mut batch = LlamaBatch::new(tokens.len(), 1);
    for (index, &token) in tokens.iter().enumerate() {
        batch.add(token, (position + index) as i32, &[0], all || index + 1 == tokens.len())?;
    }
    context.decode(&mut batch)?;
    context.synchronize();
    Ok(())
}

fn best(logits: &[f32]) -> LlamaToken {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    LlamaToken(best.map_or(0, |(index, _)| index as i32))
}

/// Adds `count` greedy tokens to a cache that holds `position` tokens and the logits of the last one.
fn continue_greedily(context: &mut LlamaContext, position: usize, count: usize) -> Result<Vec<LlamaToken>> {
    let mut tokens = vec![best(context.get_logits())];
    while tokens.len() < count {
        let last = tokens[tokens.len() - 1];
        evaluate(context, &[last], position + tokens.len() - 1, false)?;
        tokens.push(best(context.get_logits()));
    }
    Ok(tokens)
}

/// A prompt without meaning; speed does not depend on it.
fn prompt(model: &LlamaModel, length: usize) -> Vec<LlamaToken> {
    let vocabulary = model.n_vocab() as u64;
    (0..length as u64).map(|i| LlamaToken((i * 2654435761 % vocabulary) as i32)).collect()
}

/// Seconds of a prompt, and of the tokens after it.
fn times(context: &mut LlamaContext, prompt: &[LlamaToken], new: usize) -> Result<(f64, f64)> {
    context.clear_kv_cache();
    let clock = Instant::now();
    evaluate(context, prompt, 0, false)?;
    let before = clock.elapsed().as_secs_f64();
    // The first token comes from the prompt's own logits, so one more makes `new` steps.
    continue_greedily(context, prompt.len(), new + 1)?;
    Ok((before, clock.elapsed().as_secs_f64() - before))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn bench(backend: &LlamaBackend, path: &Path, options: &Options) -> Result<()> {
    let (length, new) = (options.prompt.unwrap_or(128), options.new.unwrap_or(64));
    let clock = Instant::now();
    let model = LlamaModel::load_from_file(backend, path, &LlamaModelParams::default())?;
    let mut context = context(backend, &model, options, length + new + 1)?;
    let load = clock.elapsed().as_secs_f64();
    let (loaded, prompt) = (memory("VmRSS"), prompt(&model, length));
    let first = times(&mut context, &prompt, new)?.0;
    let rounds = (0..options.rounds.unwrap_or(5).max(1)).map(|_| times(&mut context, &prompt, new));
    let (prompts, decodes): (Vec<_>, Vec<_>) = rounds.collect::<Result<Vec<_>>>()?.into_iter().unzip();
    println!(
        "{{\"file\": {path:?}, \"file_bytes\": {}, \"threads\": {}, \"load_seconds\": {load:.4}, \
         \"loaded_resident_bytes\": {loaded}, \"resident_bytes\": {}, \"peak_resident_bytes\": {}, \
         \"prompt_tokens\": {length}, \"first_prompt_seconds\": {first:.4}, \"prompt_seconds\": {:.4}, \
         \"new_tokens\": {new}, \"decode_tokens_per_second\": {:.2}}}",
        std::fs::metadata(path)?.len(),
        options.threads(),
        memory("VmRSS"),
        memory("VmHWM"),
        median(prompts),
        new as f64 / median(decodes),
    );
    Ok(())
}

fn interleaved(backend: &LlamaBackend, path: &Path, options: &Options, kind: &str) -> Result<()> {
    let (length, new) = (options.prompt.unwrap_or(128), options.new.unwrap_or(64));
    let lines = std::io::stdin().lock().lines();
    if kind == "load" {
        for line in lines {
            line?;
            let clock = Instant::now();
            let model = LlamaModel::load_from_file(backend, path, &LlamaModelParams::default())?;
            let _context = context(backend, &model, options, length + new + 1)?;
            println!("{{\"seconds\": {}}}", clock.elapsed().as_secs_f64());
        }
    } else {
        let model = LlamaModel::load_from_file(backend, path, &LlamaModelParams::default())?;
        let mut context = context(backend, &model, options, length + new + 1)?;
        let prompt = prompt(&model, length);
        for line in lines {
            line?;
            let (before, after) = times(&mut context, &prompt, if kind == "prompt" { 0 } else { new })?;
            println!("{{\"seconds\": {}}}", if kind == "prompt" { before } else { after });
        }
    }
    println!("{{\"peak_resident_bytes\": {}}}", memory("VmHWM"));
    Ok(())
}

/// Negative log-probability of a token, in nats.
fn surprise(logits: &[f32], token: LlamaToken) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    sum.ln() - f64::from(logits[token.0 as usize] - largest)
}

fn perplexity(backend: &LlamaBackend, path: &Path, options: &Options, text: &Path) -> Result<()> {
    let model = LlamaModel::load_from_file(backend, path, &LlamaModelParams::default())?;
    let text = std::fs::read(text)?;
    let tokens = model.vocab().tokenize(&text, false, false);
    if tokens.len() < 2 {
        return Err("a text of two tokens at least is needed".into());
    }
    let width = options.window.unwrap_or(1024).min(model.n_ctx_train() as usize);
    let mut context = context(backend, &model, options, width)?;
    let (mut nats, mut start) = (0.0, 0);
    // A window ends with the token that the next one begins with.
    while start + 1 < tokens.len() {
        let count = width.min(tokens.len() - 1 - start);
        context.clear_kv_cache();
        evaluate(&mut context, &tokens[start..start + count], 0, true)?;
        for index in 0..count {
            nats += surprise(context.get_logits_ith(index as i32), tokens[start + index + 1]);
        }
        start += count;
    }
    let predicted = (tokens.len() - 1) as f64;
    let first = model.vocab().token_to_piece(tokens[0], true, None).len();
    println!(
        "{{\"file\": {path:?}, \"tokens\": {}, \"window\": {width}, \"nats_per_token\": {:.6}, \
         \"perplexity\": {:.4}, \"bits_per_byte\": {:.5}}}",
        tokens.len(),
        nats / predicted,
        (nats / predicted).exp(),
        nats / (text.len() - first) as f64 / std::f64::consts::LN_2,
    );
    Ok(())
}

fn check(backend: &LlamaBackend, path: &Path, options: &Options, text: &str) -> Result<()> {
    let model = LlamaModel::load_from_file(backend, path, &LlamaModelParams::default())?;
    let vocabulary = model.vocab();
    let prompt = vocabulary.tokenize(text.as_bytes(), true, true);
    let new = options.new.unwrap_or(32).max(1);
    let mut context = context(backend, &model, options, prompt.len() + new)?;
    evaluate(&mut context, &prompt, 0, false)?;
    let tokens = continue_greedily(&mut context, prompt.len(), new)?;
    let bytes: Vec<u8> = tokens.iter().flat_map(|&token| vocabulary.token_to_piece(token, true, None)).collect();
    let numbers = |tokens: &[LlamaToken]| tokens.iter().map(|token| token.0).collect::<Vec<_>>();
    println!(
        "{{\"file\": {path:?}, \"prompt\": {:?}, \"tokens\": {:?}, \"text\": {}}}",
        numbers(&prompt),
        numbers(&tokens),
        json(&String::from_utf8_lossy(&bytes)),
    );
    Ok(())
}

/// A string of JSON.
fn json(text: &str) -> String {
    let escaped = text.chars().map(|letter| match letter {
        '"' | '\\' => format!("\\{letter}"),
        control if control < ' ' => format!("\\u{:04x}", control as u32),
        other => other.to_string(),
    });
    format!("\"{}\"", escaped.collect::<String>())
}

fn main() -> Result<()> {
    let options = Options::read()?;
    let mut backend = LlamaBackend::init()?;
    backend.void_logs();
    if options.quantize {
        let [input, output, name] = &options.files[..] else { return Err("--quantize takes IN OUT TYPE".into()) };
        return quantize::run(input, output, name, options.threads(), options.pure);
    }
    let [path] = &options.files[..] else { return Err("one GGUF file is needed".into()) };
    let path = Path::new(path);
    if !path.exists() {
        return Err(format!("{} does not exist", path.display()).into());
    }
    if let Some(text) = &options.perplexity {
        return perplexity(&backend, path, &options, text);
    }
    if let Some(text) = &options.check {
        return check(&backend, path, &options, text);
    }
    match options.interleaved.as_deref() {
        None => bench(&backend, path, &options),
        Some(kind @ ("load" | "prompt" | "decode")) => interleaved(&backend, path, &options, kind),
        Some(kind) => Err(format!("--interleaved {kind} is none of load, prompt and decode").into()),
    }
}
