//! A decoder of x-transformers' plain shape in candle, one step for each line of standard input.
//!
//! `candle-peer forward|train BATCH LENGTH VOCABULARY`: width 512, depth 6, 8 heads of 64. Prints a line of JSON with
//! the seconds of each step, and at the end of the input one with the peak of resident memory.

use std::{io::BufRead, time::Instant};

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{
    AdamW, Embedding, LayerNorm, Linear, Module, Optimizer, VarBuilder, VarMap, embedding, layer_norm, linear,
    linear_no_bias, loss, ops,
};

const DIM: usize = 512;
const DEPTH: usize = 6;
const HEADS: usize = 8;
const HEAD: usize = 64;

struct Layer {
    attention_norm: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    feedforward_norm: LayerNorm,
    wide: Linear,
    narrow: Linear,
}

impl Layer {
    fn new(store: VarBuilder) -> Result<Self> {
        let inner = HEADS * HEAD;
        Ok(Self {
            attention_norm: layer_norm(DIM, 1e-5, store.pp("attention_norm"))?,
            query: linear_no_bias(DIM, inner, store.pp("query"))?,
            key: linear_no_bias(DIM, inner, store.pp("key"))?,
            value: linear_no_bias(DIM, inner, store.pp("value"))?,
            output: linear(inner, DIM, store.pp("output"))?,
            feedforward_norm: layer_norm(DIM, 1e-5, store.pp("feedforward_norm"))?,
            wide: linear(DIM, 4 * DIM, store.pp("wide"))?,
            narrow: linear(4 * DIM, DIM, store.pp("narrow"))?,
        })
    }

    fn forward(&self, x: &Tensor, bias: &Tensor, train: bool) -> Result<Tensor> {
        let (batch, length, _) = x.dims3()?;
        let normed = norm(&self.attention_norm, x, train)?;
        let heads = |layer: &Linear| {
            layer.forward(&normed)?.reshape((batch, length, HEADS, HEAD))?.transpose(1, 2)?.contiguous()
        };
        let (query, key, value) = (heads(&self.query)?, heads(&self.key)?, heads(&self.value)?);
        let scores = (query.matmul(&key.t()?)? * (HEAD as f64).powf(-0.5))?.broadcast_add(bias)?;
        // The faster one has no gradient.
        let weights = if train { ops::softmax(&scores, D::Minus1)? } else { ops::softmax_last_dim(&scores)? };
        let mixed = weights.matmul(&value)?.transpose(1, 2)?.reshape((batch, length, HEADS * HEAD))?;
        let x = (x + self.output.forward(&mixed)?)?;
        let hidden = self.wide.forward(&norm(&self.feedforward_norm, &x, train)?)?.gelu_erf()?;
        x + self.narrow.forward(&hidden)?
    }
}

/// candle's fused layer norm has no gradient either.
fn norm(layer: &LayerNorm, x: &Tensor, train: bool) -> Result<Tensor> {
    match layer.bias() {
        Some(bias) if train => ops::layer_norm_slow(x, layer.weight(), bias, layer.eps() as f32),
        _ => layer.forward(x),
    }
}

struct Decoder {
    tokens: Embedding,
    positions: Embedding,
    layers: Vec<Layer>,
    norm: LayerNorm,
    logits: Linear,
    places: Tensor,
    bias: Tensor,
}

impl Decoder {
    fn new(vocabulary: usize, length: usize, store: VarBuilder) -> Result<Self> {
        let device = store.device();
        let bias = (0..length * length).map(|i| if i % length > i / length { f32::NEG_INFINITY } else { 0.0 });
        Ok(Self {
            tokens: embedding(vocabulary, DIM, store.pp("tokens"))?,
            positions: embedding(length, DIM, store.pp("positions"))?,
            layers: (0..DEPTH).map(|i| Layer::new(store.pp(format!("layers.{i}")))).collect::<Result<_>>()?,
            norm: layer_norm(DIM, 1e-5, store.pp("norm"))?,
            logits: linear(DIM, vocabulary, store.pp("logits"))?,
            places: Tensor::arange(0, length as u32, device)?,
            bias: Tensor::from_iter(bias, device)?.reshape((length, length))?,
        })
    }

    fn forward(&self, tokens: &Tensor, train: bool) -> Result<Tensor> {
        let positions = (self.positions.forward(&self.places)? * (DIM as f64).powf(-0.5))?;
        let mut x = self.tokens.forward(tokens)?.broadcast_add(&positions)?;
        for layer in &self.layers {
            x = layer.forward(&x, &self.bias, train)?;
        }
        self.logits.forward(&norm(&self.norm, &x, train)?)
    }
}

fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| arguments.get(index).and_then(|text| text.parse::<usize>().ok()).unwrap_or(1);
    let train = arguments.first().is_some_and(|mode| mode == "train");
    let (batch, length, vocabulary) = (number(1), number(2), number(3));
    let device = Device::Cpu;
    let variables = VarMap::new();
    let model = Decoder::new(vocabulary, length, VarBuilder::from_varmap(&variables, DType::F32, &device))?;
    let mut optimizer = AdamW::new_lr(variables.all_vars(), 1e-4)?;
    let tokens: Vec<u32> =
        (0..(batch * (length + 1)) as u64).map(|i| ((i * 2654435761) % vocabulary as u64) as u32).collect();
    let tokens = Tensor::from_vec(tokens, (batch, length + 1), &device)?;
    let (inputs, targets) = (tokens.narrow(1, 0, length)?.contiguous()?, tokens.narrow(1, 1, length)?);
    let targets = targets.contiguous()?.flatten_all()?;
    for line in std::io::stdin().lock().lines() {
        line?;
        let clock = Instant::now();
        let logits = model.forward(&inputs, train)?;
        if train {
            let loss = loss::cross_entropy(&logits.flatten_to(1)?, &targets)?;
            optimizer.backward_step(&loss)?;
        }
        println!("{{\"seconds\": {}}}", clock.elapsed().as_secs_f64());
    }
    println!("{{\"peak_resident_bytes\": {}}}", peak().unwrap_or(0));
    Ok(())
}
