//! all-MiniLM-L6-v2 with random weights in candle, one forward pass for each line of standard input.
//!
//! `minilm BATCH LENGTH` prints a line of JSON with the seconds of each pass.

use std::{io::BufRead, time::Instant};

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::bert::{BertModel, Config};

fn main() -> Result<()> {
    let arguments: Vec<usize> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
    let &[batch, length] = &arguments[..] else { panic!("usage: minilm BATCH LENGTH") };
    let config = Config { hidden_size: 384, num_hidden_layers: 6, intermediate_size: 1536, ..Default::default() };
    let device = Device::Cpu;
    let variables = VarMap::new();
    let model = BertModel::load(VarBuilder::from_varmap(&variables, DType::F32, &device), &config)?;
    let count = batch * length;
    let tokens: Vec<u32> = (0..count as u64).map(|i| ((i * 2654435761) % config.vocab_size as u64) as u32).collect();
    let tokens = Tensor::from_vec(tokens, (batch, length), &device)?;
    let (types, mask) = (tokens.zeros_like()?, tokens.ones_like()?);
    for line in std::io::stdin().lock().lines() {
        line?;
        let clock = Instant::now();
        model.forward(&tokens, &types, Some(&mask))?;
        println!("{{\"seconds\": {}}}", clock.elapsed().as_secs_f64());
    }
    Ok(())
}
