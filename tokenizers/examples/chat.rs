//! Answers a question with a pretrained chat model, a folder of `transformers` or a GGUF file.
//!
//!     cargo run --release -p x-transformers-tokenizers --example chat -- PATH QUESTION

use std::io::{Write, stdout};

use x_transformers::{Error, ErrorKind, prelude::*};
use x_transformers_tokenizers::{ChatOptions, Message, Tokenizer};

fn main() {
    if let Err(error) = run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

fn run() -> x_transformers::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, question] = arguments.as_slice() else {
        let message = "expected a model and a question".into();
        return Err(Error::new(ErrorKind::Argument { op: "chat", message }));
    };
    let device = Device::best();
    let pretrained = Pretrained::open(path)?; // reads the header
    let tokenizer = Tokenizer::of(&pretrained, None)?;
    let model = pretrained.autoregressive(DType::F32, &device)?; // reads the weights

    let prompt = tokenizer.chat(&[Message::user(question)], &ChatOptions::default())?;
    let tokens = Tensor::from_slice(&prompt, [prompt.len()], &device)?;
    let options = GenerateOptions {
        sampling: SamplingConfig { temperature: 0.0, ..Default::default() },
        eos_tokens: pretrained.end_tokens().to_vec(),
        eos_in_prompt: false, // each turn of a chat ends with one
        ..Default::default()
    };
    let mut text = tokenizer.stream(&prompt);
    for token in model.stream(&tokens, 200, &options)? {
        print!("{}", text.push(token?[0])?);
        stdout().flush().ok();
    }
    println!("{}", text.finish()?);
    Ok(())
}
