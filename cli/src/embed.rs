//! `xt embed`: texts as vectors.

use std::{
    io::{Write, stderr},
    path::{Path, PathBuf},
};

use clap::Args;
use x_transformers::{
    DType, Device,
    io::write_safetensors,
    pretrained::{Pretrained, Similarity},
    train::{Checkpoint, Embedder, EmbedderConfig},
};

use crate::{
    failure::{Failure, Result, print},
    files,
    tokenizer::{self, Prompt, SentencePipeline},
    train,
    unused::StrictArgs,
};

#[derive(Args)]
pub struct EmbedArgs {
    /// Path of the checkpoint: a `transformers` or sentence-transformers folder with an encoder such as MiniLM, or a run of `xt
    /// train --task embed`
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,

    /// Path of the tokenizer: its folder, or a .json, .model or .txt file in it [default: beside the weights]
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,

    /// Text to embed; repeat it to print a table of pairwise similarities (cosine, unless the model specifies another
    /// measure)
    #[arg(long, value_name = "TEXT", required = true)]
    text: Vec<String>,

    /// Name of the model's prompt to prepend to each text, such as query or passage [default: the model's default
    /// prompt]
    #[arg(long, value_name = "NAME", conflicts_with = "prompt")]
    prompt_name: Option<String>,

    /// Text to prepend to each text in place of a prompt of the model; empty for none
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,

    /// Path of a safetensors file to write the embeddings to, as the tensor `embeddings`
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    #[command(flatten)]
    strict: StrictArgs,

    /// Device: auto (a GPU if there is one), cpu or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

/// Embeds texts: prints the vector of one, the similarities of several, or writes all.
pub fn run(args: EmbedArgs) -> Result<()> {
    let device = &Device::parse(&args.device)?;
    let texts = &args.text;
    if Checkpoint::load_config(files::checkpoint(&args.checkpoint)).is_ok() {
        let why = "contains a model of `xt train`, which generates text; use a transformers encoder, or `xt generate`";
        return Err(Failure::new(why).within(&args.checkpoint));
    }
    let pipeline = match run_of(&args.checkpoint)? {
        Some(_) if args.strict.is_given() => {
            let why = "is a run of `xt train`, whose weights are all used; omit `--strict`";
            return Err(Failure::new(why).within(&args.checkpoint));
        }
        Some((folder, config)) => {
            let tokenizer = match &args.tokenizer {
                Some(path) => tokenizer::for_sentences(path, None, &config.options)?,
                None => train::embed::of_run(&folder, &config)?,
            };
            let encoder = Embedder::load(&folder, DType::F32, device)?.sentence_encoder()?;
            SentencePipeline::new(tokenizer, encoder, config.options, device)
        }
        None => {
            let pretrained = Pretrained::open(&args.checkpoint)?;
            args.strict.check(&pretrained, &args.checkpoint)?;
            SentencePipeline::of(&pretrained, args.tokenizer.as_deref(), DType::F32, device)?
        }
    };
    let prompt = match (&args.prompt, &args.prompt_name) {
        (Some(text), _) => Prompt::Text(text),
        (None, Some(name)) => Prompt::Named(name),
        (None, None) => Prompt::Default,
    };
    let embedded = pipeline.embed_with(&texts.iter().map(String::as_str).collect::<Vec<_>>(), prompt)?;
    for cut in &embedded.cut {
        let start: String = texts[cut.text].chars().take(40).collect();
        let warning = Failure::new(format_args!(
            "the text `{start}` is truncated: it has {} tokens, but the model takes {}; its vector ignores the rest",
            cut.tokens, cut.kept
        ));
        // A warning that nobody can read must not stop the run.
        drop(writeln!(stderr(), "xt: warning: {warning}"));
    }
    let vectors = embedded.vectors.to_device(&Device::Cpu)?;
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
        _ => print(similarities(pipeline.similarity(), texts, &values)),
    }
}

/// Returns the checkpoint of a run of `--task embed`, and its options; `None` for other paths.
fn run_of(path: &Path) -> Result<Option<(PathBuf, EmbedderConfig)>> {
    let folder = files::checkpoint(path);
    if Pretrained::is_one(&folder) || !Checkpoint::is_in(&folder) {
        return Ok(None);
    }
    match EmbedderConfig::read(&folder)? {
        Some(config) => Ok(Some((folder, config))),
        None => Err(Failure::new("is a run of another task than `xt train --task embed`").within(path)),
    }
}

/// Returns a table of the similarities of all pairs.
fn similarities(similarity: Similarity, texts: &[String], vectors: &[&[f64]]) -> String {
    let number = |a: &[f64], b: &[f64]| format!("{:.3}", similarity.of(a, b));
    let rows: Vec<Vec<String>> = vectors.iter().map(|a| vectors.iter().map(|b| number(a, b)).collect()).collect();
    let name = similarity.to_string();
    let width = rows.iter().flatten().map(String::len).max().unwrap_or(0).max(6);
    let mut table = format!("{name:>6}");
    (1..=vectors.len()).for_each(|number| table += &format!(" {number:>width$}"));
    table.push('\n');
    for (number, (text, row)) in texts.iter().zip(&rows).enumerate() {
        table += &format!("{:>1$}", number + 1, name.len().max(6));
        row.iter().for_each(|number| table += &format!(" {number:>width$}"));
        let shown: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(60).collect();
        table += &format!("  {shown}\n");
    }
    table
}

#[cfg(test)]
mod tests {
    use x_transformers::pretrained::Similarity;

    use super::similarities;

    #[test]
    fn cosines_do_not_depend_on_lengths() {
        let texts = ["a".to_string(), "b\nb".to_string()];
        let table = similarities(Similarity::Cosine, &texts, &[&[3.0, 4.0], &[0.0, 10.0]]);
        assert_eq!(table, "cosine      1      2\n     1  1.000  0.800  a\n     2  0.800  1.000  b b\n");
    }

    #[test]
    fn columns_are_as_wide_as_their_numbers() {
        let texts = ["a".to_string(), "b".to_string()];
        let table = similarities(Similarity::Manhattan, &texts, &[&[3.0, 4.0], &[0.0, 2000.0]]);
        let expected =
            "manhattan         1         2\n        1     0.000 -1999.000  a\n        2 -1999.000     0.000  b\n";
        assert_eq!(table, expected);
    }
}
