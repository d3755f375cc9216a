//! Train a small byte-level GPT inside a program, and let it write.
//!
//!     cargo run --release --example train_gpt [FILE]

use std::{env, io::Write, path::PathBuf};

use x_transformers::{
    Device, Result, Tensor,
    config::{AttentionLayersConfig, AutoregressiveConfig, TransformerWrapperConfig},
    models::GenerateOptions,
    train::{ByteText, TrainOptions, Trainer},
};

fn main() -> Result<()> {
    let device = Device::best();
    let text = match env::args_os().nth(1) {
        Some(path) => ByteText::from_paths(&[PathBuf::from(path)])?,
        None => ByteText::from_bytes("It was the best of times, it was the worst of times. ".repeat(100))?,
    };

    // Options have x-transformers' names; missing ones have their defaults.
    let net = TransformerWrapperConfig {
        num_tokens: 256,
        max_seq_len: 64,
        attn_layers: AttentionLayersConfig { heads: 2, ..AttentionLayersConfig::decoder(64, 2) },
        ..Default::default()
    };
    let config = AutoregressiveConfig { net, ..Default::default() };
    let options = TrainOptions { steps: 100, seq_len: 64, lr: 3e-3, warmup: 10, ..Default::default() };

    let mut trainer = Trainer::new(config, options, text, &device)?;
    println!("{} parameters on {device}", trainer.params().numel());
    while trainer.steps_done() < trainer.options().steps {
        let report = trainer.step()?;
        if trainer.steps_done() % 20 == 0 {
            println!("step {:3}: loss {:.3}, validation {:.3}", report.step, report.loss, trainer.validate()?);
        }
    }

    let prompt = Tensor::from_slice(b"It was", [6], &device)?;
    print!("It was");
    let _ = trainer.model().generate(&prompt, 100, &GenerateOptions::default(), &mut |bytes| {
        for &byte in bytes {
            print!("{}", char::from_u32(byte as u32).unwrap_or('?'));
        }
        // Generation goes on as long as there is someone to read.
        std::io::stdout().flush().is_ok()
    })?;
    println!();
    Ok(())
}
