//! `--task seq2seq`: an encoder and a decoder on pairs of texts.

use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::HumanCount;
use rayon::prelude::*;
use serde_json::Value;
use x_transformers::{
    Device, Error, Result as LibraryResult, Tensor,
    config::{
        AttentionLayersConfig, Config, LayersKind, LayersPlan, ModelPlan, SamplingConfig, TransformerWrapperConfig,
        XTransformerConfig,
    },
    models::{EncoderDecoderOptions, GenerateOptions, XTransformer},
    train::{Pair, PairBatch, Pairs, TokenBatch, TrainModel, TrainOptions, Trainer},
};

use super::{
    RATES, TrainArgs,
    data::{About, Data, DataArgs, Own},
    fit,
    task::Task,
};
use crate::{
    documents::{fields_of, kind, lines},
    failure::{Failure, Result, warn},
    files,
    language::Language,
};

#[derive(Args)]
pub struct PairArgs {
    /// Paths of files of pairs for --task seq2seq: JSONL with the fields `source` and `target`, or, ending in .tsv, a source,
    /// a tab and a target per line; without --tokenizer the model reads bytes
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["text", "tokens", "jsonl", "parquet", "images",
          "separator"])]
    pub pairs: Vec<PathBuf>,
}

/// Token before and after a target of bytes, which no text has.
const BORDER: i64 = 0;
/// Pairs of the validation for which targets are generated.
const GENERATED: usize = 64;

impl PairArgs {
    /// Refuses pairs for a task that does not take them.
    pub fn refuse(&self) -> Result<()> {
        match self.pairs.is_empty() {
            true => Ok(()),
            false => Err(Failure::new("`--pairs` requires `--task seq2seq`")),
        }
    }

    /// Opens the pairs of a run, whose tokenizer is `own`.
    fn open(&self, own: Option<Own>) -> Result<(Pairs, About)> {
        if self.pairs.is_empty() {
            return Err(Failure::new("`--task seq2seq` requires `--pairs`, files of them"));
        }
        let mut records = Vec::new();
        for path in &self.pairs {
            let is_tsv = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("tsv"));
            let parse = move |line: &[u8]| if is_tsv { of_tsv(line) } else { two_texts(line, ["source", "target"]) };
            for found in lines(path, parse) {
                let (line, pair) = found?;
                records.push((path, line, pair));
            }
        }
        let count = records.len();
        if count < 2 {
            return Err(Failure::new(format_args!(
                "found {count} pairs, expected at least 2: one to train on, one to validate on"
            )));
        }
        let (tokens, border) = of_language(own.as_ref())?;
        let encode = |(path, line, texts): &(&PathBuf, u64, [String; 2])| {
            let wrong = |why: Failure| Failure::new(format_args!("line {line}: {why}")).within(path);
            let [source, target] = texts.each_ref().map(|text| tokens(text));
            let (source, target) = (source.map_err(wrong)?, target.map_err(wrong)?);
            match source.is_empty() || target.is_empty() {
                true => Err(wrong(Failure::new("the source or the target has no tokens"))),
                false => Ok(Pair { source, target }),
            }
        };
        let all: Vec<Pair> = records.par_iter().map(encode).collect::<Result<_>>()?;
        let (mut train, mut validation) = (Vec::new(), Vec::new());
        for (index, pair) in all.into_iter().enumerate() {
            let chosen = index % 10 == 9 || count < 10 && index + 1 == count;
            if chosen { &mut validation } else { &mut train }.push(pair);
        }
        let pairs = Pairs::new(train, validation, border)?;
        let [train, validation] = pairs.parts().map(|part| HumanCount(part.len() as u64));
        drop(tokens);
        let about = about(own, format!("{train} pairs to train on, {validation} to validate"))?;
        Ok((pairs, about))
    }
}

/// Function that returns the tokens of a text, without any around it.
type Encode<'o> = Box<dyn Fn(&str) -> Result<Vec<i64>> + Sync + 'o>;

/// Returns the function for tokens of texts, and the token that begins and ends those that a decoder writes; without a
/// tokenizer they are bytes.
pub fn of_language(own: Option<&Own>) -> Result<(Encode<'_>, i64)> {
    let Some(own) = own else {
        let encode = |text: &str| match text.contains('\0') {
            true => Err(Failure::new("has the byte 0, which begins and ends a text; remove it, or use `--tokenizer`")),
            false => Ok(text.bytes().map(i64::from).collect()),
        };
        return Ok((Box::new(encode), BORDER));
    };
    let tokenizer = own.tokenizer()?;
    Ok((Box::new(|text| Ok(tokenizer.encode_plain(text)?)), own.begin()?))
}

/// Returns the description of data of texts.
pub fn about(own: Option<Own>, line: String) -> Result<About> {
    let num_tokens = own.as_ref().map_or(Ok(256), |own| Ok::<_, Failure>(own.tokenizer()?.num_tokens()))?;
    let (language, tokenizer) = own.map(Own::into_parts).unzip();
    let language = Some(language.unwrap_or(Language::Bytes));
    Ok(About { line, num_tokens: Some(num_tokens), language, tokenizer, ..About::of_nothing() })
}

/// Returns two texts of a record, neither of them empty.
pub fn two_texts(line: &[u8], names: [&str; 2]) -> std::result::Result<[String; 2], String> {
    let fields = fields_of(line)?;
    let text = |field: &str| match fields.get(field) {
        Some(Value::String(text)) if text.is_empty() => Err(format!("field `{field}` is empty")),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("field `{field}` is {}, expected a string", kind(other))),
        None => {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            Err(format!("field `{field}` is missing; the record has {}", names.join(", ")))
        }
    };
    let [first, second] = names;
    Ok([text(first)?, text(second)?])
}

/// Returns the two columns of a line.
fn of_tsv(line: &[u8]) -> std::result::Result<[String; 2], String> {
    let text = str::from_utf8(line).map_err(|why| format!("is not UTF-8: {why}"))?;
    let columns: Vec<&str> = text.trim_end_matches(['\n', '\r']).split('\t').collect();
    match columns[..] {
        [source, target] if !source.is_empty() && !target.is_empty() => Ok([source.to_string(), target.to_string()]),
        [_, _] => Err("has an empty column, expected a source and a target".to_string()),
        _ => Err(format!("has {} columns, expected 2: a source, a tab and a target", columns.len())),
    }
}

/// Begins a run.
pub fn begin(args: &TrainArgs, device: &Device) -> Result<()> {
    args.refuse_beside("seq2seq", &["from", "lora-rank", "preset"])?;
    let own = args.data.tokenizer().map(Own::open).transpose()?;
    let (pairs, about) = args.data.pairs.open(own)?;
    let num_tokens = about.num_tokens.unwrap_or_default();
    let config = match &args.config {
        Some(path) => {
            let broken = |error: Error| Failure::from(error).within(path);
            let config = Config::from_json(&files::config(path)?).map_err(broken)?;
            if !matches!(config.plan().map_err(broken)?, ModelPlan::EncoderDecoder(_)) {
                return Err(Failure::new("expected an XTransformer").within(path));
            }
            config
        }
        None => {
            let max_seq_len = args.options.seq_len.unwrap_or(TrainOptions::default().seq_len);
            let layers = args.model.layers(false);
            let side = |attn_layers: AttentionLayersConfig| TransformerWrapperConfig {
                num_tokens,
                max_seq_len,
                attn_layers,
                ..Default::default()
            };
            let enc = side(AttentionLayersConfig { kind: LayersKind::Encoder, ..layers.clone() });
            let dec = side(AttentionLayersConfig { cross_attend: true, ..layers });
            Config::XTransformer(Box::new(XTransformerConfig { enc, dec, tie_token_emb: true }))
        }
    };
    let config = args.keywords.apply(config)?;
    super::check_vocabulary(&about, <XTransformer as TrainModel>::num_tokens(&config))?;
    let options = args.train_options(super::length(<XTransformer as TrainModel>::max_seq_len(&config)), RATES[0]);
    fit::check_as(args, &config, &options, device, &|store| {
        <XTransformer as TrainModel>::build(&config, store).map(drop)
    })?;
    let (cut, count) = (pairs.cut(options.seq_len), pairs.parts().map(<[Pair]>::len).iter().sum::<usize>());
    if cut > 0 {
        let length = options.seq_len;
        warn(format_args!("{cut} of {count} pairs are cut to {length} tokens a side; `--seq-len` changes it"));
    }
    super::begin(args, args.build(|| Trainer::<XTransformer>::start(config, options, pairs, device))?, about, device)
}

impl Task for XTransformer {
    type Seen = Exact;

    fn data(args: &DataArgs, own: Option<Own>, _: &Path) -> Result<Data<PairBatch>> {
        let (pairs, about) = args.pairs.open(own)?;
        Ok(Data { source: Box::new(pairs), about })
    }

    fn layers(&self) -> &LayersPlan {
        &self.encoder.plan().layers
    }

    fn hint(dir: &str, _: &About) -> Option<String> {
        Some(format!("generate --checkpoint {dir} --prompt \"…\""))
    }

    fn see(&self, batch: &Self::Batch, seen: &mut Exact) -> LibraryResult<()> {
        let source = EncoderDecoderOptions { src_mask: Some(batch.source_mask.clone()), ..Default::default() };
        seen.see(&batch.target, &mut |start, length, options| {
            self.generate(&batch.source, start, length, &source, options, &mut |_| true)
        })
    }

    fn scores(&self, seen: Exact, loss: f64) -> Vec<(&'static str, f64)> {
        seen.scores(loss)
    }
}

/// Targets that a model was asked to write, and those that it wrote exactly.
#[derive(Default)]
pub struct Exact {
    seen: usize,
    right: usize,
}

impl Exact {
    /// Adds those of a batch, until there are enough.
    pub fn see(&mut self, target: &TokenBatch, generate: Generate) -> LibraryResult<()> {
        if self.seen < GENERATED {
            let matches = exact(target, generate)?;
            self.seen += matches.len();
            self.right += matches.iter().filter(|&&matches| matches).count();
        }
        Ok(())
    }

    /// Returns the perplexity, and the share of targets that the model writes exactly.
    pub fn scores(&self, loss: f64) -> Vec<(&'static str, f64)> {
        vec![("perplexity", loss.exp()), ("exact_match", self.right as f64 / self.seen.max(1) as f64)]
    }
}

/// Function that continues the beginning of each row by a number of tokens.
type Generate<'g> = &'g mut dyn FnMut(&Tensor, usize, &GenerateOptions) -> LibraryResult<Tensor>;

/// Returns for each target if it is what is generated by taking the most likely token each time.
fn exact(target: &TokenBatch, generate: Generate) -> LibraryResult<Vec<bool>> {
    let tokens = &target.tokens;
    let (rows, width) = (tokens.dim(0)?, tokens.dim(1)?);
    let expected = tokens.to_vec::<i64>()?;
    let border = expected[0];
    let start = Tensor::full([rows, 1], border as f64, tokens.dtype(), tokens.device())?;
    let options = GenerateOptions {
        sampling: SamplingConfig { temperature: 0.0, ..Default::default() },
        eos_tokens: vec![border],
        eos_in_prompt: false,
        ..Default::default()
    };
    let found = generate(&start, width - 1, &options)?;
    let (found, count) = (found.to_vec::<i64>()?, found.dim(1)?);
    // Up to the end, or as far as the row was kept.
    let until = |row: &[i64]| row.iter().position(|&token| token == border).unwrap_or(row.len());
    let same = |row: usize| {
        let (one, other) = (&expected[row * width + 1..(row + 1) * width], &found[row * count..(row + 1) * count]);
        one[..until(one)] == other[..until(other)]
    };
    Ok((0..rows).map(same).collect())
}
