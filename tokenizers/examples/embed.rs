//! Similarities of sentences by a pretrained encoder such as MiniLM: a whole program, whose size
//! `benches/results/build.md` records.
//!
//! `cargo run --release -p x-transformers-tokenizers --example embed -- FOLDER TEXT TEXT…`

use x_transformers::{DType, Device, Error, ErrorKind, Result};
use x_transformers_tokenizers::SentencePipeline;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((folder, texts)) = arguments.split_first().filter(|(_, texts)| !texts.is_empty()) else {
        return Err(Error::new(ErrorKind::Argument { op: "embed", message: "expected a folder and texts".into() }));
    };
    let pipeline = SentencePipeline::open(folder, DType::F32, &Device::Cpu)?;
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let vectors = pipeline.embed(&texts)?;
    let similarities = vectors.matmul(&vectors.transpose(0, 1)?)?.to_vec::<f32>()?;
    for (text, row) in texts.iter().zip(similarities.chunks(texts.len())) {
        let row: Vec<String> = row.iter().map(|similarity| format!("{similarity:.3}")).collect();
        println!("{}  {text}", row.join(" "));
    }
    Ok(())
}
