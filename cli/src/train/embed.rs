//! `--task embed`: sentence embeddings from texts that belong together, or pairs with scores.

use std::path::{Path, PathBuf};

use indicatif::HumanCount;
use rayon::prelude::*;
use serde_json::{Map, Value};
use x_transformers::{
    Device, Result as LibraryResult,
    config::{Config, LayersPlan},
    pretrained::{Family, Pretrained},
    train::{
        Checkpoint, Embedder, EmbedderConfig, Group, GroupBatch, Groups, MaskedLmConfig, Sequence, TrainModel,
        TrainOptions, Trainer, spearman,
    },
};

use super::{
    RATES, TrainArgs, begin as begin_run, check_vocabulary,
    data::{About, Data, DataArgs, Own},
    fit, length,
    task::Task,
};
use crate::{
    documents::{fields_of, kind, lines},
    failure::{Failure, Result},
    files,
    metrics::Target,
    stored::{Origin, StoredTokenizer},
    tokenizer::{self, Tokenizer},
};

/// Names of the texts of a record, those of sentence-transformers' data sets.
const ANCHOR: [&str; 4] = ["anchor", "query", "question", "sentence1"];
const POSITIVE: [&str; 3] = ["positive", "answer", "sentence2"];
const NEGATIVE: &str = "negative";
const SCORE: [&str; 4] = ["score", "label", "scores", "labels"];

/// Begins a run that trains the encoder at a path.
pub fn begin(args: &TrainArgs, from: &Path, device: &Device) -> Result<()> {
    args.refuse_beside("embed", &["field"])?;
    if args.lora.options().is_some() {
        return Err(Failure::new("`--lora-rank` requires `--task lm` or `dpo`; an encoder is trained in full"));
    }
    let given = args.data.tokenizer();
    let (config, weights, tokenizer, stored) = if Pretrained::is_one(from) {
        let pretrained = Pretrained::open(from)?;
        let (config, weights) = EmbedderConfig::of_pretrained(&pretrained)?;
        if let (Some(name), None) = (&config.options.tokenizer_name, given) {
            let why = format!("uses the tokenizer of `{name}`; name its folder with `--tokenizer`");
            return Err(Failure::new(why).within(from));
        }
        let path = given.or(pretrained.folder()).unwrap_or(pretrained.file().path());
        let tokenizer = tokenizer::for_sentences(path, Some(pretrained.family()), &config.options)?;
        (config, weights, tokenizer, StoredTokenizer::of_pretrained(&pretrained, given)?)
    } else {
        let folder = files::checkpoint(from);
        let (config, weights) = if EmbedderConfig::read(&folder)?.is_some() {
            EmbedderConfig::load(&folder)?
        } else if MaskedLmConfig::read(&folder)?.is_some() {
            let (net, weights) = MaskedLmConfig::load_encoder(&folder)?;
            EmbedderConfig::of_encoder(net, weights)?
        } else {
            let why =
                "is not an encoder: expected a pretrained one such as MiniLM, or a run of `--task mlm` or `embed`";
            return Err(Failure::new(why).within(from));
        };
        let path = match given {
            Some(given) => given.to_path_buf(),
            None => kept(&folder)?,
        };
        let tokenizer = tokenizer::for_sentences(&path, family(&path)?, &config.options)?;
        (config, weights, tokenizer, StoredTokenizer::read(&path)?)
    };
    let Opened { data: Data { source, about }, negatives, pairs } = open(&args.data, &tokenizer, stored)?;
    check_vocabulary(&about, <Embedder as TrainModel>::num_tokens(&config))?;
    let longest =
        <Embedder as TrainModel>::max_seq_len(&config).min(config.options.max_seq_length.unwrap_or(usize::MAX));
    let options = args.train_options(length(longest), RATES[1]);
    if about.target == Target::Pair && negatives == 0 && options.batch_size < 2 {
        return Err(Failure::new("`--batch-size` must be at least 2: the other pairs of a batch are the negatives"));
    }
    if about.target == Target::Pair && options.batch_size > pairs {
        return Err(Failure::new(format_args!(
            "`--batch-size` ({}) must be at most the number of pairs to train on ({pairs}), or a batch has a pair twice",
            options.batch_size
        )));
    }
    let rows = options.batch_size.saturating_mul(2 + negatives);
    let sequences = TrainOptions { batch_size: rows, ..options.clone() };
    fit::check_as(args, &Config::from_value(config.net.clone())?, &sequences, device, &|store| {
        Embedder::build(&config, store).map(drop)
    })?;
    let trainer = args.build(|| Trainer::<Embedder>::start_from(config, &weights, options, source, device))?;
    drop(weights);
    begin_run(args, trainer, about, device)
}

/// Returns the path of the tokenizer in a checkpoint.
fn kept(checkpoint: &Path) -> Result<PathBuf> {
    let missing = || Failure::new("has no tokenizer: its tokens are bytes").within(checkpoint);
    Ok(checkpoint.join(Checkpoint::load_training(checkpoint)?.tokenizer.ok_or_else(missing)?))
}

/// Returns the tokenizer of a run whose model has these options.
pub fn of_run(checkpoint: &Path, config: &EmbedderConfig) -> Result<Tokenizer> {
    let path = kept(checkpoint)?;
    tokenizer::for_sentences(&path, family(&path)?, &config.options)
}

fn family(path: &Path) -> Result<Option<Family>> {
    Ok(Origin::read(path)?.map(|origin| origin.family))
}

/// Groups of texts.
struct Opened {
    data: Data<GroupBatch>,
    /// Number of negatives of each.
    negatives: usize,
    /// Number of groups to train on.
    pairs: usize,
}

/// Reads the groups of texts.
fn open(args: &DataArgs, tokenizer: &Tokenizer, stored: StoredTokenizer) -> Result<Opened> {
    let paths = args.jsonl();
    if paths.is_empty() {
        return Err(Failure::new(
            "texts that belong together come from `--jsonl`, with fields such as `anchor` and `positive`",
        ));
    }
    let (columns, groups) = read(paths, tokenizer)?;
    let [pairs, validated] = groups.parts().map(<[Group]>::len);
    let negatives = columns.texts.len() - 2;
    if columns.score.is_none() && negatives == 0 && validated < 2 {
        return Err(Failure::new("found fewer than 2 pairs to validate on, expected at least 20 records"));
    }
    let [train, validation] = [pairs, validated].map(|count| HumanCount(count as u64));
    let what = match (&columns.score, negatives) {
        (Some(_), _) => "pairs with scores",
        (None, 0) => "pairs",
        (None, 1) => "pairs with a negative",
        (None, _) => "pairs with negatives",
    };
    let about = About {
        line: format!("{train} {what} to train on, {validation} to validate"),
        baseline: None,
        num_tokens: Some(tokenizer.num_tokens()),
        bytes_per_token: None,
        target: if columns.score.is_some() { Target::Score } else { Target::Pair },
        prompt: Vec::new(),
        chats: false,
        lengths: Vec::new(),
        tokenizer: Some(stored),
        language: None,
    };
    Ok(Opened { data: Data { about, source: Box::new(groups) }, negatives, pairs })
}

/// Fields of the records.
#[derive(PartialEq)]
struct Columns {
    texts: Vec<String>,
    score: Option<String>,
}

impl Columns {
    /// Returns the fields of a record.
    fn of(fields: &Map<String, Value>) -> std::result::Result<Self, String> {
        let names = || fields.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let one = |known: &[&str]| {
            let found = known.iter().find(|name| fields.contains_key(**name));
            found.map(ToString::to_string).ok_or_else(|| {
                let known = known.join(", ");
                format!("expected a field of the names {known}; the record has {}", names())
            })
        };
        let mut negatives: Vec<&String> = fields.keys().filter(|name| is_negative(name)).collect();
        negatives.sort_by_key(|name| (name.len(), name.as_str()));
        let score = one(&SCORE).ok();
        if let (Some(score), Some(negative)) = (&score, negatives.first()) {
            return Err(format!("has `{score}` and `{negative}`; expected pairs with scores, or with negatives"));
        }
        let texts = [one(&ANCHOR)?, one(&POSITIVE)?].into_iter().chain(negatives.into_iter().cloned()).collect();
        Ok(Self { texts, score })
    }
}

/// Returns `true` for the names `negative`, `negative_N` and `negativeN`.
fn is_negative(name: &str) -> bool {
    let number =
        name.strip_prefix(NEGATIVE).map(|rest| rest.strip_prefix('_').filter(|n| !n.is_empty()).unwrap_or(rest));
    number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A record, and where it is.
struct Record<'p> {
    path: &'p Path,
    line: u64,
    texts: Vec<String>,
    score: Option<f64>,
}

/// Reads all records; every tenth is for validation.
fn read(paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<(Columns, Groups)> {
    let mut columns: Option<Columns> = None;
    let mut records = Vec::new();
    for path in paths {
        for found in lines(path, fields_of) {
            let (line, fields) = found?;
            let wrong = |why: String| Failure::new(format_args!("line {line}: {why}")).within(path);
            let first = match &columns {
                Some(columns) => columns,
                None => &*columns.insert(Columns::of(&fields).map_err(wrong)?),
            };
            let (texts, score) = values(&fields, first).map_err(wrong)?;
            records.push(Record { path, line, texts, score });
        }
    }
    let count = records.len();
    let Some(columns) = columns.filter(|_| count >= 2) else {
        return Err(Failure::new(format_args!(
            "found {count} records, expected at least 2: one to train on, one to validate on"
        )));
    };
    if columns.score.is_some() && records.iter().all(|record| record.score == records[0].score) {
        let score = records[0].score.unwrap_or_default();
        return Err(Failure::new(format_args!("all records have the score {score}, expected scores that differ")));
    }
    let encode = |record: &Record| {
        let sequences = record.texts.iter().zip(&columns.texts).map(|(text, field)| {
            let wrong = |why: String| Failure::new(format_args!("line {}: {why}", record.line)).within(record.path);
            let tokens = tokenizer.encode(text).map_err(|why| wrong(why.to_string()))?;
            if tokens.is_empty() {
                Err(wrong(format!("field `{field}` has no tokens")))
            } else {
                Ok(Sequence::from(tokens))
            }
        });
        Ok(Group { sequences: sequences.collect::<Result<_>>()?, score: record.score })
    };
    let all: Vec<Group> = records.par_iter().map(encode).collect::<Result<_>>()?;
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (index, group) in all.into_iter().enumerate() {
        let chosen = index % 10 == 9 || count < 10 && index + 1 == count;
        if chosen { &mut validation } else { &mut train }.push(group);
    }
    Ok((columns, Groups::new(train, validation)?))
}

/// Returns the texts and the score of a record, which has the fields of the first.
fn values(fields: &Map<String, Value>, columns: &Columns) -> std::result::Result<(Vec<String>, Option<f64>), String> {
    let get = |key: &String| {
        let names: Vec<&str> = fields.keys().map(String::as_str).collect();
        fields.get(key).ok_or_else(|| format!("field `{key}` is missing; the record has {}", names.join(", ")))
    };
    let text = |key: &String| match get(key)? {
        Value::String(text) if text.is_empty() => Err(format!("field `{key}` is empty")),
        Value::String(text) => Ok(text.clone()),
        other => Err(format!("field `{key}` is {}, expected a string", kind(other))),
    };
    let texts = columns.texts.iter().map(text).collect::<std::result::Result<_, _>>()?;
    if let Some(extra) = fields.keys().find(|name| is_negative(name) && !columns.texts.contains(name)) {
        return Err(format!(
            "has the field `{extra}`, which the first record has not; all need the same number of negatives"
        ));
    }
    if columns.score.is_none()
        && let Some(score) = SCORE.iter().find(|name| fields.contains_key(**name))
    {
        return Err(format!("has the field `{score}`, which the first record has not; all need a score, or none"));
    }
    let score = |key: &String| {
        let value = get(key)?;
        let number = value.as_f64().filter(|number| (*number as f32).is_finite());
        number.ok_or_else(|| format!("field `{key}` is {}, expected a number", kind(value)))
    };
    Ok((texts, columns.score.as_ref().map(score).transpose()?))
}

/// Cosines of pairs with their scores, or places of the right text among all.
#[derive(Default)]
pub struct Seen {
    cosines: Vec<f64>,
    scores: Vec<f64>,
    places: Vec<usize>,
}

impl Task for Embedder {
    type Seen = Seen;

    fn data(args: &DataArgs, _: Option<Own>, checkpoint: &Path) -> Result<Data<GroupBatch>> {
        let missing = || Failure::new("is not a run of `--task embed`").within(checkpoint);
        let config = EmbedderConfig::read(checkpoint)?.ok_or_else(missing)?;
        Ok(open(args, &of_run(checkpoint, &config)?, StoredTokenizer::read(&kept(checkpoint)?)?)?.data)
    }

    fn layers(&self) -> &LayersPlan {
        &self.net().plan().layers
    }

    fn hint(dir: &str, _: &About) -> Option<String> {
        Some(format!("embed --checkpoint {dir} --text \"…\" --text \"…\""))
    }

    fn see(&self, batch: &Self::Batch, seen: &mut Seen) -> LibraryResult<()> {
        let values = self.cosines(batch)?.to_f64_vec()?;
        if let Some(own) = &batch.scores {
            seen.cosines.extend(values);
            seen.scores.extend(own.to_f64_vec()?);
            return Ok(());
        }
        let rows = batch.tokens.dim(0)?;
        for (own, row) in values.chunks(values.len() / rows).enumerate() {
            // Equal cosines count against the model: vectors that are all alike find nothing.
            let before = |&(at, &cosine): &(usize, &f64)| at != own && cosine >= row[own];
            seen.places.push(row.iter().enumerate().filter(before).count() + 1);
        }
        Ok(())
    }

    fn scores(&self, Seen { cosines, scores, places }: Seen, _: f64) -> Vec<(&'static str, f64)> {
        if !scores.is_empty() {
            return vec![("spearman", spearman(&cosines, &scores))];
        }
        let count = places.len().max(1) as f64;
        let first = places.iter().filter(|&&place| place == 1).count() as f64 / count;
        let reciprocal = places.iter().map(|&place| 1.0 / place as f64).sum::<f64>() / count;
        vec![("recall@1", first), ("mrr", reciprocal)]
    }
}
