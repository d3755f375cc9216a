//! `xt embed`: texts as vectors.

use std::path::PathBuf;

use clap::Args;
use x_transformers::{
    DType, Device, Tensor,
    io::{Pretrained, write_safetensors},
    train::Checkpoint,
};

use crate::{
    failure::{Failure, Result, print},
    files,
    tokenizer::Tokenizer,
    unused::StrictArgs,
};

#[derive(Args)]
pub struct EmbedArgs {
    /// Folder with a pretrained encoder, such as MiniLM: config.json, weights and tokenizer
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,

    /// The tokenizer, if it is not beside the weights: a folder, or a .json, .model or .txt in it
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,

    /// A text; several give a table of their cosines
    #[arg(long, value_name = "TEXT", required = true)]
    text: Vec<String>,

    /// Write the vectors here, as the tensor `embeddings` of a safetensors file
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    #[command(flatten)]
    strict: StrictArgs,

    /// Where to compute: auto, cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

/// Embeds texts: prints the vector of one, the cosines of several, or writes all.
pub fn run(args: EmbedArgs) -> Result<()> {
    let device = &Device::parse(&args.device)?;
    let texts = &args.text;
    if Checkpoint::load_config(files::checkpoint(&args.checkpoint)).is_ok() {
        let why = "holds what `xt train` wrote, which continues texts; give an encoder of `transformers`, or use `xt generate`";
        return Err(Failure::new(why).within(&args.checkpoint));
    }
    let pretrained = Pretrained::open(&args.checkpoint)?;
    args.strict.check(&pretrained, &args.checkpoint)?;
    let tokenizer = Tokenizer::of(&pretrained, args.tokenizer.as_deref())?;
    let rows = texts.iter().map(|text| Ok(tokenizer.encode(text)?)).collect::<Result<Vec<_>>>()?;
    let window = pretrained.config().max_seq_len;
    for (text, row) in texts.iter().zip(&rows) {
        if row.is_empty() || row.len() > window {
            let start: String = text.chars().take(40).collect();
            let why = format!("the text `{start}` has {} tokens, the model takes 1 to {window}", row.len());
            return Err(Failure::new(why));
        }
    }
    let encoder = pretrained.sentence_encoder(DType::F32, device)?;
    let width = rows.iter().map(Vec::len).max().unwrap_or(0);
    let padded = |fill: fn(Option<&i64>) -> i64| -> Vec<i64> {
        rows.iter().flat_map(|row| (0..width).map(move |at| fill(row.get(at)))).collect()
    };
    let tokens = Tensor::from_vec(padded(|token| token.copied().unwrap_or(0)), [rows.len(), width], device)?;
    let kept: Vec<bool> = padded(|token| token.is_some().into()).iter().map(|&kept| kept == 1).collect();
    let mask = Tensor::from_vec(kept, [rows.len(), width], device)?;
    let vectors = encoder.embed(&tokens, Some(&mask))?.to_device(&Device::Cpu)?;
    let dim = vectors.dim(1)?;
    let values = vectors.to_f64_vec()?;
    let values: Vec<&[f64]> = values.chunks(dim).collect();
    if let Some(output) = &args.output {
        write_safetensors(output, &[("embeddings".to_string(), vectors)].into(), &Default::default())?;
        print(format_args!("{} x {dim} values in {}\n", texts.len(), output.display()))?;
    }
    match &values[..] {
        [one] if args.output.is_none() => {
            print(one.iter().map(|x| format!("{x:.6}")).collect::<Vec<_>>().join(" "))?;
            print("\n")
        }
        [_] => Ok(()),
        _ => print(cosines(texts, &values)),
    }
}

/// A table of the cosines of all pairs.
fn cosines(texts: &[String], vectors: &[&[f64]]) -> String {
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = |a: &[f64], b: &[f64]| product(a, b) / (product(a, a) * product(b, b)).sqrt().max(1e-12);
    let mut table = String::from("cosine");
    (1..=vectors.len()).for_each(|number| table += &format!(" {number:>6}"));
    table.push('\n');
    for (number, (text, vector)) in texts.iter().zip(vectors).enumerate() {
        table += &format!("{:>6}", number + 1);
        vectors.iter().for_each(|other| table += &format!(" {:>6.3}", cosine(vector, other)));
        let shown: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(60).collect();
        table += &format!("  {shown}\n");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::cosines;

    #[test]
    fn cosines_do_not_depend_on_lengths() {
        let texts = ["a".to_string(), "b\nb".to_string()];
        let table = cosines(&texts, &[&[3.0, 4.0], &[0.0, 10.0]]);
        assert_eq!(table, "cosine      1      2\n     1  1.000  0.800  a\n     2  0.800  1.000  b b\n");
    }
}
