//! A decoder of x-transformers' plain shape in fastnn, one step for each line of standard input.
//!
//! `fastnn-peer forward|train BATCH LENGTH VOCABULARY`: width 512, depth 6, 8 heads of 64. Prints a line of JSON with
//! the seconds of each step, and at the end of the input one with the peak of resident memory.

use std::{io::BufRead, time::Instant};

use fastnn::prelude::*;

const DIM: usize = 512;

struct Decoder {
    tokens: Embedding,
    positions: Embedding,
    layers: TransformerStack,
    logits: Linear,
}

impl Decoder {
    fn new(vocabulary: usize, length: usize) -> Self {
        Self {
            tokens: Embedding::new(vocabulary, DIM),
            positions: Embedding::new(length, DIM),
            // Ends with a norm; GELU and the norms before each part are its own.
            layers: TransformerStack::causal(DIM, 8, 4 * DIM, 6, 0.0),
            logits: Linear::new(DIM, vocabulary),
        }
    }

    fn forward(&self, tokens: &[Vec<usize>]) -> Tensor {
        let (batch, length) = (tokens.len(), tokens[0].len());
        let places: Vec<usize> = (0..length).collect();
        let positions = self.positions.lookup(&places).reshape(&[1, length as i64, -1]);
        let x = self.layers.forward(&self.tokens.lookup_batch(tokens).add(&positions));
        self.logits.forward(&x).reshape(&[(batch * length) as i64, -1])
    }

    fn parameters(&self) -> Vec<Param> {
        let parts: [&dyn Module; 4] = [&self.tokens, &self.positions, &self.layers, &self.logits];
        parts.into_iter().flat_map(|part| part.parameters()).collect()
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
    let model = Decoder::new(vocabulary, length);
    let mut optimizer = AdamW::new(model.parameters(), 1e-4);
    let token = |i: usize| (i as u64 * 2654435761 % vocabulary as u64) as usize;
    let rows = (0..batch).map(|row| (0..=length).map(|i| token(row * (length + 1) + i)).collect::<Vec<_>>());
    let rows: Vec<_> = rows.collect();
    let inputs: Vec<_> = rows.iter().map(|row| row[..length].to_vec()).collect();
    let targets: Vec<_> = rows.iter().flat_map(|row| row[1..].to_vec()).collect();
    for _ in std::io::stdin().lock().lines() {
        let clock = Instant::now();
        if train {
            let loss = cross_entropy(&model.forward(&inputs), &targets);
            optimizer.zero_grad();
            loss.backward();
            optimizer.step();
        } else {
            no_grad(|| model.forward(&inputs));
        }
        println!("{{\"seconds\": {}}}", clock.elapsed().as_secs_f64());
    }
    println!("{{\"peak_resident_bytes\": {}}}", peak().unwrap_or(0));
}
