//! Texts with labels in JSONL files, for `--task classify` and `--task regress`.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};
use x_transformers::train::{Label, LabelledText, LabelledTexts};

use crate::{
    documents::{fields_of, kind, lines},
    failure::{Failure, Result},
    tokenizer::Tokenizer,
};

/// Field of a record that holds the label.
const LABEL: &str = "label";

/// Label as a record has it.
#[derive(Clone, PartialEq)]
enum Found {
    Name(String),
    Index(u64),
    Value(f64),
}

/// A record, and where it is.
struct Record<'p> {
    path: &'p Path,
    line: u64,
    text: String,
    label: Found,
}

impl Record<'_> {
    fn failure(&self, why: impl std::fmt::Display) -> Failure {
        Failure::new(format_args!("line {}: {why}", self.line)).within(self.path)
    }
}

/// Names of the classes, and the texts.
pub struct Labelled {
    pub texts: LabelledTexts,
    pub labels: Vec<String>,
}

/// Reads texts with classes. `labels` are the names of the classes; without any, they are those that occur.
pub fn classes(paths: &[PathBuf], field: &str, labels: &[String], tokenizer: &Tokenizer) -> Result<Labelled> {
    let records = read(paths, field, &|label| match label {
        Value::String(name) => Ok(Found::Name(name.clone())),
        Value::Number(number) => match number.as_u64() {
            Some(index) => Ok(Found::Index(index)),
            None => Err(format!("field `{LABEL}` is {number}, expected a name or the index of a class")),
        },
        other => Err(format!("field `{LABEL}` is {}, expected a name or the index of a class", kind(other))),
    })?;
    let mut names = labels.to_vec();
    if names.is_empty() {
        let mut indices = 0;
        for record in &records {
            match &record.label {
                Found::Name(name) => names.push(name.clone()),
                Found::Index(index) => indices = indices.max(index + 1),
                Found::Value(_) => {}
            }
        }
        if indices > 0 && !names.is_empty() {
            let mixed = records.iter().find(|record| matches!(record.label, Found::Index(_)));
            let why = "the label is an index, others are names; use one kind, or name the classes with `--labels`";
            return Err(mixed.map_or_else(|| Failure::new(why), |record| record.failure(why)));
        }
        names.sort();
        names.dedup();
        if indices > MOST {
            return Err(Failure::new(format_args!("found the class {}, expected at most {MOST}", indices - 1)));
        }
        names.extend((0..indices).map(|index| index.to_string()));
    }
    if names.len() < 2 {
        return Err(Failure::new(format_args!("found the class {} alone, expected at least 2", names.join(", "))));
    }
    let label = |record: &Record| match &record.label {
        Found::Name(name) => {
            let unknown = || record.failure(format_args!("label `{name}` is unknown, expected {}", names.join(", ")));
            names.iter().position(|own| own == name).map(Label::Class).ok_or_else(unknown)
        }
        Found::Index(index) if *index < names.len() as u64 => Ok(Label::Class(*index as usize)),
        Found::Index(index) => {
            Err(record.failure(format_args!("label {index} is out of range, expected 0 to {}", names.len() - 1)))
        }
        Found::Value(_) => Err(record.failure("expected a class")),
    };
    let texts = texts(&records, &label, names.len(), tokenizer)?;
    Ok(Labelled { texts, labels: names })
}

/// Number of classes that indices may name.
const MOST: u64 = 1 << 16;

/// Reads texts with numbers.
pub fn values(paths: &[PathBuf], field: &str, tokenizer: &Tokenizer) -> Result<Labelled> {
    let records = read(paths, field, &|label| match label.as_f64() {
        Some(value) => Ok(Found::Value(value)),
        None => Err(format!("field `{LABEL}` is {}, expected a number", kind(label))),
    })?;
    let label = |record: &Record| match record.label {
        Found::Value(value) => Ok(Label::Value(value)),
        _ => Err(record.failure("expected a number")),
    };
    Ok(Labelled { texts: texts(&records, &label, 0, tokenizer)?, labels: Vec::new() })
}

fn read<'p>(
    paths: &'p [PathBuf],
    field: &str,
    label: &(dyn Fn(&Value) -> std::result::Result<Found, String> + Sync),
) -> Result<Vec<Record<'p>>> {
    let parse = |fields: Map<String, Value>| {
        let get = |key: &str| {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            fields.get(key).ok_or_else(|| format!("field `{key}` is missing; the record has {}", names.join(", ")))
        };
        let text = match get(field)? {
            Value::String(text) if text.is_empty() => return Err(format!("field `{field}` is empty")),
            Value::String(text) => text.clone(),
            other => return Err(format!("field `{field}` is {}, expected a string", kind(other))),
        };
        Ok((text, label(get(LABEL)?)?))
    };
    let mut records = Vec::new();
    for path in paths {
        for found in lines(path, |line| parse(fields_of(line)?)) {
            let (line, (text, label)) = found?;
            records.push(Record { path, line, text, label });
        }
    }
    if records.len() < 2 {
        let count = records.len();
        return Err(Failure::new(format_args!(
            "found {count} records, expected at least 2: one to train on, one to validate on"
        )));
    }
    Ok(records)
}

/// The texts as tokens; every tenth is for validation.
fn texts(
    records: &[Record],
    label: &(dyn Fn(&Record) -> Result<Label> + Sync),
    classes: usize,
    tokenizer: &Tokenizer,
) -> Result<LabelledTexts> {
    let encode = |record: &Record| {
        let tokens = tokenizer.encode(&record.text).map_err(|why| record.failure(why))?;
        Ok(LabelledText { tokens, label: label(record)? })
    };
    let all: Vec<LabelledText> = records.par_iter().map(encode).collect::<Result<_>>()?;
    let count = all.len();
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (index, text) in all.into_iter().enumerate() {
        let chosen = index % 10 == 9 || count < 10 && index + 1 == count;
        if chosen { &mut validation } else { &mut train }.push(text);
    }
    Ok(LabelledTexts::new(train, validation, classes)?)
}
