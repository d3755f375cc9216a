//! `xt embed`: texts as vectors.

use std::path::PathBuf;

use clap::Args;
use x_transformers::Device;

use crate::{failure::Result, pretrained};

#[derive(Args)]
pub struct EmbedArgs {
    /// Folder with a pretrained encoder, such as MiniLM: config.json, weights and tokenizer
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,

    /// A text; several give a table of their cosines
    #[arg(long, value_name = "TEXT", required = true)]
    text: Vec<String>,

    /// Write the vectors here, as the tensor `embeddings` of a safetensors file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

pub fn run(args: EmbedArgs) -> Result<()> {
    let device = Device::parse(&args.device)?;
    pretrained::embed(&args.checkpoint, &args.text, args.output.as_ref(), &device)
}
