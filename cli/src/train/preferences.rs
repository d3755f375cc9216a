//! `--task dpo`: preferred and rejected answers.

use std::path::{Path, PathBuf};

use indicatif::HumanCount;
use rayon::prelude::*;
use serde_json::{Map, Value};
use x_transformers::{
    Device, Result as LibraryResult,
    config::LayersPlan,
    models::AutoregressiveWrapper,
    pretrained::Pretrained,
    train::{
        Checkpoint, DpoConfig, DpoModel, Group, GroupBatch, Groups, LoraConfig, Sequence, TrainModel, TrainOptions,
        Trainer,
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
    failure::{Failure, Result, warn},
    files,
    language::{Language, Turn},
    metrics::Target,
    tokenizer,
};

/// Fields of a record.
const PROMPT: &str = "prompt";
const ANSWERS: [&str; 2] = ["chosen", "rejected"];

/// Begins a run with the model at a path, in full or by an adapter.
pub fn begin(args: &TrainArgs, from: &Path, device: &Device) -> Result<()> {
    args.refuse_beside("dpo", &["field"])?;
    args.keep_reference(from)?;
    let lora = args.lora.options();
    let is_adapter = lora.is_some();
    let (base, own) = if Pretrained::is_one(from) {
        (from.to_path_buf(), Some(Own::of_pretrained(&Pretrained::open(from)?, args.data.tokenizer())?))
    } else {
        let folder = files::checkpoint(from);
        if LoraConfig::read(&folder)?.is_some() {
            let why = "trains an adapter, which cannot be the reference; export the merged model first";
            return Err(Failure::new(why).within(from));
        }
        let own = Own::of_run(&folder, &args.data)?;
        (folder, own)
    };
    let config = DpoConfig::new(base, lora, args.dpo_beta.unwrap_or(0.1), args.options.seed)?;
    let (longest, num_tokens) =
        (<DpoModel as TrainModel>::max_seq_len(&config), <DpoModel as TrainModel>::num_tokens(&config));
    let options = args.train_options(length(longest), RATES[if is_adapter { 2 } else { 1 }]);
    if !is_adapter {
        let rows = options.batch_size.saturating_mul(ANSWERS.len());
        fit::check(args, &config.base_config()?, &TrainOptions { batch_size: rows, ..options.clone() }, device)?;
    }
    let Data { source, about } = open(&args.data, own, options.seq_len, true)?;
    check_vocabulary(&about, num_tokens)?;
    let trainer = match is_adapter {
        true => args.build(|| Trainer::<DpoModel>::start(config, options, source, device))?,
        false => {
            let weights = config.state_dict()?;
            args.build(|| Trainer::<DpoModel>::start_from(config, &weights, options, source, device))?
        }
    };
    begin_run(args, trainer, about, device)
}

/// Reads the pairs.
fn open(args: &DataArgs, own: Option<Own>, seq_len: usize, warns: bool) -> Result<Data<GroupBatch>> {
    let paths = args.jsonl();
    if paths.is_empty() {
        return Err(Failure::new("preferences come from `--jsonl`, with the fields `prompt`, `chosen` and `rejected`"));
    }
    let (language, tokenizer) = own.map(Own::into_parts).unzip();
    let language = language.unwrap_or(Language::Bytes);
    let Pairs { groups, prompt, chats } = read(paths, &language)?;
    let [train, validation] = groups.parts().map(|part| HumanCount(part.len() as u64));
    let left_out = groups.left_out(seq_len);
    let all: usize = groups.parts().iter().map(|part| part.len()).sum();
    if warns && left_out > 0 && left_out < all {
        warn(format_args!(
            "{left_out} of {all} pairs are left out: their prompts fill {seq_len} tokens; `--seq-len` changes it"
        ));
    }
    let about = About {
        line: format!("{train} preferences to train on, {validation} to validate"),
        baseline: None,
        num_tokens: language.tokenizer().map(|tokenizer| tokenizer.num_tokens()),
        bytes_per_token: None,
        target: Target::Pair,
        prompt,
        chats,
        lengths: Vec::new(),
        tokenizer,
        language: Some(language),
    };
    Ok(Data { about, source: Box::new(groups) })
}

/// Preferences as groups.
struct Pairs {
    groups: Groups,
    /// Tokens of a prompt to validate on.
    prompt: Vec<i64>,
    chats: bool,
}

/// A record: texts, or turns of a chat.
enum Record {
    Texts { prompt: String, answers: [String; 2] },
    Chats { prompt: Vec<Turn>, answers: [Vec<Turn>; 2] },
}

/// Reads all records; every tenth is for validation.
fn read(paths: &[PathBuf], language: &Language) -> Result<Pairs> {
    let mut records = Vec::new();
    for path in paths {
        for found in lines(path, |line| record(&fields_of(line)?)) {
            let (line, record) = found?;
            records.push((path, line, record));
        }
    }
    let count = records.len();
    if count < 2 {
        return Err(Failure::new(format_args!(
            "found {count} records, expected at least 2: one to train on, one to validate on"
        )));
    }
    let encode = |(path, line, record): &(&PathBuf, u64, Record)| {
        let found = encoded(record, language);
        found.map_err(|why| Failure::new(format_args!("line {line}: {why}")).within(path))
    };
    let all: Vec<Group> = records.par_iter().map(encode).collect::<Result<_>>()?;
    let chats = records.iter().any(|(_, _, record)| matches!(record, Record::Chats { .. }));
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (index, group) in all.into_iter().enumerate() {
        let chosen = index % 10 == 9 || count < 10 && index + 1 == count;
        if chosen { &mut validation } else { &mut train }.push(group);
    }
    let Sequence { tokens, loss_mask } = &validation[0].sequences[0];
    let prompt = tokens.iter().zip(loss_mask).take_while(|(_, counts)| !**counts).map(|(token, _)| *token).collect();
    Ok(Pairs { groups: Groups::new(train, validation)?, prompt, chats })
}

/// Returns the texts or the turns in a record.
fn record(fields: &Map<String, Value>) -> std::result::Result<Record, String> {
    let names = || fields.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    let missing = |key: &str| format!("field `{key}` is missing; the record has {}", names());
    let get = |key: &'static str| fields.get(key).ok_or_else(|| missing(key));
    let values = [get(ANSWERS[0])?, get(ANSWERS[1])?];
    if let [Value::String(chosen), Value::String(rejected)] = values {
        let prompt = match get(PROMPT)? {
            Value::String(prompt) => prompt.clone(),
            other => return Err(format!("field `{PROMPT}` is {}, expected a string like the answers", kind(other))),
        };
        for (text, field) in [(&prompt, PROMPT), (chosen, ANSWERS[0]), (rejected, ANSWERS[1])] {
            if text.is_empty() {
                return Err(format!("field `{field}` is empty"));
            }
        }
        return Ok(Record::Texts { prompt, answers: [chosen.clone(), rejected.clone()] });
    }
    let turns = |key: &'static str| match get(key)? {
        Value::Array(list) if list.is_empty() => Err(format!("field `{key}` is empty")),
        Value::Array(list) => list.iter().zip(1..).map(|(turn, number)| self::turn(key, number, turn)).collect(),
        other => Err(format!("field `{key}` is {}, expected a list of messages like the other fields", kind(other))),
    };
    let mut answers: [Vec<Turn>; 2] = [turns(ANSWERS[0])?, turns(ANSWERS[1])?];
    let prompt = match fields.contains_key(PROMPT) {
        true => turns(PROMPT)?,
        // Whole chats: what both begin with.
        false => {
            let [chosen, rejected] = &answers;
            let shared = chosen.iter().zip(rejected).take_while(|(one, other)| one == other).count();
            if shared == 0 || shared == chosen.len() || shared == rejected.len() {
                return Err(format!(
                    "field `{PROMPT}` is missing, and `chosen` and `rejected` do not begin with the same messages and end with \
                     others"
                ));
            }
            let prompt = chosen[..shared].to_vec();
            answers.iter_mut().for_each(|answer| drop(answer.drain(..shared)));
            prompt
        }
    };
    Ok(Record::Chats { prompt, answers })
}

fn turn(key: &str, number: usize, turn: &Value) -> std::result::Result<Turn, String> {
    let Value::Object(fields) = turn else {
        return Err(format!("`{key}`: message {number} is {}, expected an object", kind(turn)));
    };
    let text = |field: &str| match fields.get(field) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(format!("`{key}`: message {number}: `{field}` is {}, expected a string", kind(other))),
        None => Err(format!("`{key}`: message {number}: `{field}` is missing")),
    };
    Ok(Turn { role: text("role")?, content: text("content")? })
}

/// Returns the tokens of both sequences, with the answers marked: what follows the tokens that they share with the prompt.
fn encoded(record: &Record, language: &Language) -> Result<Group> {
    let (prompt, wholes) = match record {
        Record::Texts { prompt, answers } => {
            let whole = |answer: &String| {
                let mut tokens = language.encode(&format!("{prompt}{answer}"))?;
                let end = language.end_of_turn().or(language.ends().first().copied());
                tokens.extend(end.filter(|end| tokens.last() != Some(end)));
                Ok(tokens)
            };
            (language.encode(prompt)?, answers.iter().map(whole).collect::<Result<Vec<_>>>()?)
        }
        Record::Chats { prompt, answers } => {
            let missing = || Failure::new("chats require a model with a tokenizer; this one reads bytes");
            let tokenizer = language.tokenizer().ok_or_else(missing)?;
            let whole = |answer: &Vec<Turn>| {
                let turns: Vec<Turn> = prompt.iter().chain(answer).cloned().collect();
                tokenizer::chat_up_to(tokenizer, &turns, false)
            };
            (tokenizer::chat_up_to(tokenizer, prompt, true)?, answers.iter().map(whole).collect::<Result<Vec<_>>>()?)
        }
    };
    let shared = |tokens: &Vec<i64>| tokens.iter().zip(&prompt).take_while(|(one, other)| one == other).count();
    let start = wholes.iter().map(shared).min().unwrap_or(0);
    let sequences = wholes.into_iter().zip(ANSWERS).map(|(tokens, field)| {
        if tokens.len() <= start.max(1) {
            return Err(Failure::new(format_args!("field `{field}` has no tokens after those of the prompt")));
        }
        let loss_mask = (0..tokens.len()).map(|at| at >= start).collect();
        Ok(Sequence { tokens, loss_mask })
    });
    Ok(Group { sequences: sequences.collect::<Result<_>>()?, score: None })
}

impl Task for DpoModel {
    /// Margins between the rewards of the chosen and the rejected answers.
    type Seen = Vec<f64>;

    fn data(args: &DataArgs, own: Option<Own>, checkpoint: &Path) -> Result<Data<GroupBatch>> {
        open(args, own, Checkpoint::load_training(checkpoint)?.options.seq_len, false)
    }

    fn layers(&self) -> &LayersPlan {
        &self.net.plan().layers
    }

    fn generator(&self) -> Option<&AutoregressiveWrapper> {
        Some(self)
    }

    fn describe(trainer: &Trainer<Self>) -> String {
        let trained = HumanCount(trainer.params().numel() as u64);
        match trainer.model().adapter() {
            None => format!("{trained} parameters, with a frozen copy as the reference"),
            Some(adapter) => {
                let (rank, layers) = (adapter.options().r, adapter.places().len());
                format!("{trained} parameters of an adapter of rank {rank} on {layers} layers, the others frozen")
            }
        }
    }

    fn see(&self, batch: &Self::Batch, margins: &mut Self::Seen) -> LibraryResult<()> {
        margins.extend(self.rewards(batch)?.to_f64_vec()?.chunks(2).map(|pair| pair[0] - pair[1]));
        Ok(())
    }

    fn scores(&self, margins: Self::Seen, _: f64) -> Vec<(&'static str, f64)> {
        let count = margins.len().max(1) as f64;
        let right = margins.iter().filter(|&&margin| margin > 0.0).count() as f64;
        vec![("rewards/accuracies", right / count), ("rewards/margins", margins.iter().sum::<f64>() / count)]
    }
}
