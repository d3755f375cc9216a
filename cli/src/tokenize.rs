//! `xt tokenize`: a vocabulary learned from texts, and texts as token files.

use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::HumanCount;
use x_transformers::{
    io::{create_folders, write_atomically},
    train::{ByteText, TokenWriter},
};

use crate::{
    documents::{Documents, RecordArgs, Split, encode},
    failure::{Failure, Result, print},
    files::quoted,
    progress::bytes,
    stored::StoredTokenizer,
    tokenizer::{self, Tokenizer},
    typed,
};

#[derive(Args)]
pub struct TokenizeArgs {
    /// Paths of text files or folders
    #[arg(long, value_name = "FILE|DIR", num_args = 1.., required_unless_present_any = ["jsonl", "parquet"],
          conflicts_with_all = ["jsonl", "parquet"])]
    text: Vec<PathBuf>,

    #[command(flatten)]
    records: RecordArgs,

    /// Learn a byte-level BPE vocabulary of N tokens from all documents: 256 bytes, <|endoftext|> and merges
    #[arg(long, value_name = "N", required_unless_present = "tokenizer", conflicts_with = "tokenizer")]
    train_bpe: Option<usize>,

    /// Path of an existing tokenizer: its folder, or a .json, .model or .txt file in it
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,

    /// Folder to write tokenizer.json, train.tokens and validation.tokens to
    #[arg(long, value_name = "DIR")]
    output: PathBuf,

    /// Replace the token files in --output
    #[arg(long)]
    overwrite: bool,
}

pub const TRAIN: &str = "train.tokens";
pub const VALIDATION: &str = "validation.tokens";
/// The token that begins each document in learned vocabularies.
const END_OF_TEXT: &str = "<|endoftext|>";

pub fn run(args: TokenizeArgs) -> Result<()> {
    let output = &args.output;
    let documents = match args.records.documents()? {
        Some(documents) => documents,
        None => {
            let text = ByteText::from_paths(&args.text)?;
            crate::train::warn_of_skipped(&text);
            Documents::Text { text, separator: args.records.separator.clone() }
        }
    };
    create_folders(output)?;
    for name in [TRAIN, VALIDATION, "tokenizer.json"] {
        let path = output.join(name);
        let own = args.tokenizer.as_deref().is_some_and(|given| same(given, &path) || same(given, output));
        if path.exists() && !args.overwrite && !(own && name == "tokenizer.json") {
            return Err(
                Failure::new("already exists; replace it with `--overwrite`, or choose another folder").within(&path)
            );
        }
    }
    let split = Split::of(&documents)?;
    let path = match (args.train_bpe, &args.tokenizer) {
        (Some(num_tokens), _) => {
            let json = tokenizer::learn(documents.iter(), num_tokens, END_OF_TEXT)?;
            // With it, `AutoTokenizer` of transformers reads the folder.
            let config = format!(
                "{{\n  \"tokenizer_class\": \"PreTrainedTokenizerFast\",\n  \"eos_token\": \"{END_OF_TEXT}\"\n}}\n"
            );
            for (name, content) in [("tokenizer.json", &json), ("tokenizer_config.json", &config)] {
                write_atomically(output.join(name), |file| file.write_all(content.as_bytes()))?;
            }
            output
        }
        (None, Some(given)) => {
            if !same(given, output) && !given.parent().is_some_and(|folder| same(folder, output)) {
                StoredTokenizer::read(given)?.write(output)?;
            }
            given
        }
        (None, None) => return Err(Failure::new("expected `--train-bpe` or `--tokenizer`")),
    };
    let tokenizer = tokenizer::open(path)?;
    let begin = begin(&tokenizer).map_err(|failure| failure.within(path))?;
    let count = tokenizer.num_tokens();
    let create = |name: &str| TokenWriter::create(output.join(name), count, Some(begin));
    let mut writers = [create(TRAIN)?, create(VALIDATION)?];
    let mut lengths = [0; 2];
    encode(&documents, &split, &tokenizer, (begin, true), |validation, tokens, length| {
        let part = usize::from(validation);
        lengths[part] += length as u64;
        Ok(writers[part].write(tokens)?)
    })?;
    print(format_args!("documents   {}\n", HumanCount(split.documents() as u64)))?;
    print(format_args!("vocabulary  {} tokens\n", HumanCount(count as u64)))?;
    for ((writer, name), length) in writers.into_iter().zip([TRAIN, VALIDATION]).zip(lengths) {
        let tokens = writer.len();
        writer.finish(Some(length))?;
        print(format_args!(
            "{name:<18} {} tokens of {}, {:.2} bytes per token\n",
            HumanCount(tokens),
            bytes(length),
            length as f64 / tokens.max(1) as f64
        ))?;
    }
    let (xt, dir) = (typed::program(), quoted(output));
    print(format_args!("try         {xt} train --tokens {dir}\n"))
}

fn same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

/// Returns the token that begins each document: the one that ends a text by the tokenizer's files, or by its name.
pub fn begin(tokenizer: &Tokenizer) -> Result<i64> {
    const NAMES: [&str; 5] = [END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]"];
    let named = || NAMES.iter().find_map(|name| tokenizer.token(name));
    let missing =
        || Failure::new("the tokenizer names no token that ends a text; set `eos_token` in tokenizer_config.json");
    tokenizer.end_token().or_else(named).ok_or_else(missing)
}
