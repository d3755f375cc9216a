//! Tokens per second of greedy decoding, and the share of the memory bandwidth spent on reading the weights; then
//! attention of one query to long caches.
//!
//!     cargo bench --bench decode [-- FILTER]
//!
//! `--interleaved attention/f32 4096` runs one such attention for each line of standard input and prints its seconds,
//! for benches/peers/pretrained.py.

mod peak;

use std::{io::BufRead, time::Instant};

use peak::read_bytes;
use x_transformers::{
    DType, Device, ParamStore, Philox, QuantType, Result, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, SamplingConfig, TransformerWrapperConfig},
    models::{AutoregressiveWrapper, GenerateOptions},
    ops::{DecodeSpec, attention_decode},
};

const PROMPT: usize = 128;
const NEW: usize = 128;

/// Storage type of the weights.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Weights {
    F32,
    Bf16,
    Q8,
    Q4,
}

impl Weights {
    fn bytes(self) -> f64 {
        match self {
            Self::F32 => 4.0,
            Self::Bf16 => 2.0,
            Self::Q8 => 34.0 / 32.0,
            Self::Q4 => 18.0 / 32.0,
        }
    }
}

fn model(weights: Weights, tested: bool) -> Result<AutoregressiveWrapper> {
    let (dim, depth, heads, num_tokens) = if tested { (32, 1, 2, 100) } else { (512, 6, 8, 20_000) };
    let layers = AttentionLayersConfig { heads, ..AttentionLayersConfig::decoder(dim, depth) };
    let net = TransformerWrapperConfig::new(num_tokens, PROMPT + NEW, layers);
    let dtype = if weights == Weights::Bf16 { DType::BF16 } else { DType::F32 };
    let store = ParamStore::new(0, dtype, &Device::Cpu);
    let mut model = AutoregressiveWrapper::new(&AutoregressiveConfig { net, ..Default::default() }, &store)?;
    match weights {
        Weights::Q8 => model.quantize(QuantType::Q8_0)?,
        Weights::Q4 => model.quantize(QuantType::Q4_0)?,
        Weights::F32 | Weights::Bf16 => {}
    }
    Ok(model)
}

/// Weights read by each step: all except the embedding tables.
fn read_weights() -> usize {
    let (dim, depth, num_tokens) = (512, 6, 20_000);
    depth * (4 * dim * dim + 8 * dim * dim) + num_tokens * dim
}

/// Heads and features of the attention to long caches.
const HEADS: usize = 8;
const WIDTH: usize = 64;

/// One query per head and its number of keys.
fn long_attention(dtype: DType, keys: usize) -> Result<impl Fn() -> Result<f64>> {
    let random = |stream: u64, n: usize| -> Result<Tensor> {
        let random = Philox::new(1, stream);
        Tensor::generate([1, HEADS, n, WIDTH], dtype, &Device::Cpu, |i| random.normal(i as u64))
    };
    let (q, k, v) = (random(0, 1)?, random(1, keys)?, random(2, keys)?);
    let ends = Tensor::from_slice(&[keys as i64 - 1], [1], &Device::Cpu)?;
    let spec = DecodeSpec { scale: (WIDTH as f64).powf(-0.5), ..DecodeSpec::default() };
    Ok(move || {
        let clock = Instant::now();
        let out = attention_decode(&q, &k, &v, &ends, &spec)?;
        let seconds = clock.elapsed().as_secs_f64();
        drop(out);
        Ok(seconds)
    })
}

/// Every case of attention, by its name.
fn attentions(tested: bool) -> impl Iterator<Item = (String, DType, usize)> {
    let keys = if tested { [4, 300] } else { [4096, 16384] };
    let case = move |dtype: DType| keys.map(|keys| (format!("attention/{dtype} {keys}"), dtype, keys));
    [DType::F32, DType::BF16].into_iter().flat_map(case)
}

fn interleaved(name: &str) -> Result<()> {
    for (_, dtype, keys) in attentions(false).filter(|(id, ..)| id == name) {
        let run = long_attention(dtype, keys)?;
        for _ in std::io::stdin().lock().lines() {
            println!("{{\"seconds\": {}}}", run()?);
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    if let Some(name) = std::env::args().skip_while(|argument| argument != "--interleaved").nth(1) {
        return interleaved(&name);
    }
    let tested = std::env::args().any(|argument| argument == "--test");
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let bandwidth = if tested { 1.0 } else { read_bytes() };
    if !tested {
        println!("memory: {:.1} GB/s read by {} threads\n", bandwidth / 1e9, rayon::current_num_threads());
    }
    for weights in [Weights::F32, Weights::Bf16, Weights::Q8, Weights::Q4] {
        let model = model(weights, tested)?;
        for batch in [1, 8] {
            let id = format!("decode/{weights:?} batch {batch}").to_lowercase();
            if !id.contains(&filter) {
                continue;
            }
            let new = if tested { 2 } else { NEW };
            let prompt = Tensor::generate([batch, PROMPT], DType::I64, &Device::Cpu, |i| (i * 37 % 97) as f64)?;
            let sampling = SamplingConfig { temperature: 0.0, ..Default::default() };
            let options = GenerateOptions { sampling, ..Default::default() };
            // The whole call, and only the decoding: from the first new token to the last.
            let once = || -> Result<(f64, f64)> {
                let start = Instant::now();
                let mut first = None;
                let _ = model.generate(&prompt, new, &options, &mut |_| {
                    first.get_or_insert_with(Instant::now);
                    true
                })?;
                let decoding = first.map_or(0.0, |first| first.elapsed().as_secs_f64());
                Ok((start.elapsed().as_secs_f64(), decoding))
            };
            once()?;
            if tested {
                println!("{id}: ok");
                continue;
            }
            let times = (0..5).map(|_| once()).collect::<Result<Vec<_>>>()?;
            let (whole, decoding) = times
                .into_iter()
                .fold((f64::INFINITY, f64::INFINITY), |best, time| if time.0 < best.0 { time } else { best });
            let steps = (new - 1) as f64;
            let bytes = read_weights() as f64 * weights.bytes() * steps / decoding;
            println!(
                "{id}: {:.0} tokens/s, {whole:.3} s with the prompt, {:.2} ms a step, {:.1} GB/s of weights, {:.0} % of \
                 the bandwidth",
                batch as f64 * steps / decoding,
                1e3 * decoding / steps,
                bytes / 1e9,
                100.0 * bytes / bandwidth
            );
        }
    }
    for (id, dtype, keys) in attentions(tested).filter(|(id, ..)| id.contains(&filter)) {
        let run = long_attention(dtype, keys)?;
        if tested {
            run()?;
            println!("{id}: ok");
            continue;
        }
        let mut seconds = (0..201).map(|_| run()).collect::<Result<Vec<_>>>()?;
        seconds.sort_by(f64::total_cmp);
        let (median, bytes) = (seconds[seconds.len() / 2], (2 * HEADS * keys * WIDTH * dtype.size()) as f64);
        println!(
            "{id}: {:.3} ms, {:.1} GB/s, {:.0} % of the bandwidth",
            1e3 * median,
            bytes / median / 1e9,
            100.0 * bytes / median / bandwidth
        );
    }
    Ok(())
}
