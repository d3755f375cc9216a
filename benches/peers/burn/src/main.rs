//! A decoder of x-transformers' plain shape in burn, one step for each line of standard input.
//!
//! `burn-peer forward|train BATCH LENGTH VOCABULARY`: width 512, depth 6, 8 heads of 64. Prints a line of JSON with
//! the seconds of each step, and at the end of the input one with the peak of resident memory.

use std::{io::BufRead, time::Instant};

use burn::{
    nn::{
        Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig,
        attention::generate_autoregressive_mask,
        loss::CrossEntropyLossConfig,
        transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput},
    },
    optim::{AdamWConfig, GradientsParams},
    prelude::*,
};

const DIM: usize = 512;

#[derive(Module, Debug)]
struct Decoder {
    tokens: Embedding,
    positions: Embedding,
    layers: TransformerEncoder,
    norm: LayerNorm,
    logits: Linear,
}

impl Decoder {
    fn new(vocabulary: usize, length: usize, device: &Device) -> Self {
        let layers = TransformerEncoderConfig::new(DIM, 4 * DIM, 8, 6).with_dropout(0.0).with_norm_first(true);
        Self {
            tokens: EmbeddingConfig::new(vocabulary, DIM).init(device),
            positions: EmbeddingConfig::new(length, DIM).init(device),
            layers: layers.init(device),
            norm: LayerNormConfig::new(DIM).init(device),
            logits: LinearConfig::new(DIM, vocabulary).init(device),
        }
    }

    fn forward(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        let device = tokens.device();
        let [batch, length] = tokens.dims();
        let places = Tensor::<1, Int>::arange(0..length as i64, &device).unsqueeze::<2>();
        let x = self.tokens.forward(tokens) + self.positions.forward(places);
        let mask = generate_autoregressive_mask(batch, length, &device);
        let x = self.layers.forward(TransformerEncoderInput::new(x).mask_attn(mask));
        self.logits.forward(self.norm.forward(x))
    }
}

fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |index: usize| arguments.get(index).and_then(|text| text.parse::<usize>().ok()).unwrap_or(1);
    let train = arguments.first().is_some_and(|mode| mode == "train");
    let (batch, length, vocabulary) = (number(1), number(2), number(3));
    let device = if train { Device::flex().autodiff() } else { Device::flex() };
    let mut model = Decoder::new(vocabulary, length, &device);
    let mut optimizer = AdamWConfig::new().init();
    let tokens: Vec<i64> = (0..(batch * (length + 1)) as i64).map(|i| (i * 2654435761) % vocabulary as i64).collect();
    let tokens = Tensor::<1, Int>::from_data(tokens.as_slice(), &device).reshape([batch, length + 1]);
    let inputs = tokens.clone().slice([0..batch, 0..length]);
    let targets = tokens.slice([0..batch, 1..length + 1]).reshape([batch * length]);
    let loss = CrossEntropyLossConfig::new().init(&device);
    for _ in std::io::stdin().lock().lines() {
        let clock = Instant::now();
        let logits = model.forward(inputs.clone());
        if train {
            let logits = logits.reshape([batch * length, vocabulary]);
            let gradients = loss.forward(logits, targets.clone()).backward();
            let gradients = GradientsParams::from_grads(gradients, &model);
            model = optimizer.step(1e-4, model, gradients);
        } else {
            // Whatever is lazy has to happen.
            let _ = logits.into_data();
        }
        println!("{{\"seconds\": {}}}", clock.elapsed().as_secs_f64());
    }
    println!("{{\"peak_resident_bytes\": {}}}", peak().unwrap_or(0));
}
