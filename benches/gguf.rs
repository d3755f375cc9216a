//! Loading, prompts and decoding of a GGUF file, for benches/peers/cpu.py, which interleaves it with llama.cpp.
//!
//!     cargo bench --bench gguf -- FILE [--prompt N] [--new M] [--interleaved load|prompt|decode]
//!
//! Prints times and memory of the process as a line of JSON. With `--interleaved`, does a step for each line of standard
//! input and prints its seconds. `--dtype f32` replaces bf16 as the type of weights that are not kept as stored.

use std::{
    io::BufRead,
    path::{Path, PathBuf},
    time::Instant,
};

use x_transformers::{
    DType, Device, Result, Tensor,
    config::SamplingConfig,
    models::{AutoregressiveWrapper, GenerateOptions},
    pretrained::Pretrained,
};

/// File of the tests, for `--test`.
const SMALL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/files/llama.gguf");

struct Options {
    file: PathBuf,
    dtype: DType,
    prompt: usize,
    new: usize,
    interleaved: Option<String>,
}

impl Options {
    /// Returns `None` without a file.
    fn read() -> Option<Self> {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let after = |name: &str| arguments.iter().position(|argument| argument == name).map(|at| &arguments[at + 1]);
        let number = |name: &str, default: usize| after(name).map_or(default, |text| text.parse().expect(name));
        let tested = arguments.iter().any(|argument| argument == "--test");
        let file = arguments.iter().find(|argument| argument.ends_with(".gguf")).map(PathBuf::from);
        Some(Self {
            file: file.or_else(|| tested.then(|| SMALL.into()))?,
            dtype: if after("--dtype").is_some_and(|name| name == "f32") { DType::F32 } else { DType::BF16 },
            prompt: number("--prompt", if tested { 4 } else { 128 }),
            new: number("--new", if tested { 2 } else { 64 }),
            interleaved: after("--interleaved").cloned(),
        })
    }

    fn load(&self) -> Result<AutoregressiveWrapper> {
        Pretrained::open(&self.file)?.autoregressive(self.dtype, &Device::Cpu)
    }
}

/// Returns a line of `/proc/self/status` in bytes; 0 where there is none.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// A model and a meaningless prompt: speed does not depend on it.
struct Session {
    model: AutoregressiveWrapper,
    prompt: Tensor,
    options: GenerateOptions,
}

impl Session {
    fn new(options: &Options) -> Result<Self> {
        let vocabulary = Pretrained::open(&options.file)?.config().num_tokens as u64;
        let token = |i: usize| (i as u64 * 2_654_435_761 % vocabulary) as f64;
        let prompt = Tensor::generate([1, options.prompt], DType::I64, &Device::Cpu, token)?;
        let sampling = SamplingConfig { temperature: 0.0, ..SamplingConfig::default() };
        let model = options.load()?;
        Ok(Self { model, prompt, options: GenerateOptions { sampling, ..GenerateOptions::default() } })
    }

    /// Seconds until the first new token, and of the `new` tokens after it.
    fn times(&self, new: usize) -> Result<(f64, f64)> {
        let (clock, mut first) = (Instant::now(), None);
        let _ = self.model.generate(&self.prompt, new + 1, &self.options, &mut |_| {
            first.get_or_insert_with(|| clock.elapsed().as_secs_f64());
            true
        })?;
        let first = first.unwrap_or_default();
        Ok((first, clock.elapsed().as_secs_f64() - first))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(options: &Options) -> Result<()> {
    let clock = Instant::now();
    let _ = options.load()?;
    let load = clock.elapsed().as_secs_f64();
    let session = Session::new(options)?;
    let loaded = memory("VmRSS");
    let first = session.times(options.new)?.0;
    let rounds = (0..5).map(|_| session.times(options.new)).collect::<Result<Vec<_>>>()?;
    let (prompts, decodes): (Vec<_>, Vec<_>) = rounds.into_iter().unzip();
    println!(
        "{{\"file\": {:?}, \"file_bytes\": {}, \"threads\": {}, \"load_seconds\": {load:.4}, \
         \"loaded_resident_bytes\": {loaded}, \"resident_bytes\": {}, \"peak_resident_bytes\": {}, \
         \"prompt_tokens\": {}, \"first_prompt_seconds\": {first:.4}, \"prompt_seconds\": {:.4}, \"new_tokens\": {}, \
         \"decode_tokens_per_second\": {:.2}}}",
        options.file,
        Path::new(&options.file).metadata().map_or(0, |file| file.len()),
        rayon::current_num_threads(),
        memory("VmRSS"),
        memory("VmHWM"),
        options.prompt,
        median(prompts),
        options.new,
        options.new as f64 / median(decodes),
    );
    Ok(())
}

fn interleaved(options: &Options, kind: &str) -> Result<()> {
    let session = if kind == "load" { None } else { Some(Session::new(options)?) };
    for _ in std::io::stdin().lock().lines() {
        let seconds = match &session {
            None => {
                let clock = Instant::now();
                let _model = options.load()?;
                clock.elapsed().as_secs_f64()
            }
            Some(session) if kind == "prompt" => session.times(0)?.0,
            Some(session) => session.times(options.new)?.1,
        };
        println!("{{\"seconds\": {seconds:e}}}");
    }
    println!("{{\"peak_resident_bytes\": {}}}", memory("VmHWM"));
    Ok(())
}

fn main() -> Result<()> {
    let Some(options) = Options::read() else {
        println!("give a GGUF file: cargo bench --bench gguf -- FILE");
        return Ok(());
    };
    match options.interleaved.clone() {
        Some(kind) => interleaved(&options, &kind),
        None => report(&options),
    }
}
