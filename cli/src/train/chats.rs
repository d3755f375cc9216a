//! Chats of JSONL files, of which the assistant's turns are targets.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};
use x_transformers::train::{Examples, Sequence};

use crate::{
    documents::{fields_of, kind, lines},
    failure::{Failure, Result},
    language::Turn,
    tokenizer::{self, Tokenizer},
};

/// Field of a record that holds the turns of a chat.
pub const MESSAGES: &str = "messages";

/// Returns `true` if the first record of a file has the turns of a chat, and no field of this name.
pub fn is_first(path: &Path, field: &str) -> Result<bool> {
    // An error is reported when the records are read.
    let first = lines(path, fields_of).next().transpose()?;
    Ok(first.is_some_and(|(_, fields)| fields.contains_key(MESSAGES) && !fields.contains_key(field)))
}

/// Chats as examples.
pub struct Chats {
    pub examples: Examples,
    /// Tokens of a chat to validate on, up to where the first answer begins.
    pub prompt: Vec<i64>,
    /// Number of tokens, and of those that count.
    pub tokens: [usize; 2],
}

/// Reads all chats; every tenth is for validation.
pub fn read(paths: &[PathBuf], tokenizer: &Tokenizer) -> Result<Chats> {
    let mut chats = Vec::new();
    for path in paths {
        for found in lines(path, |line| turns_of(&fields_of(line)?)) {
            let (line, turns) = found?;
            chats.push((path, line, turns));
        }
    }
    let sequence = |(path, line, turns): &(&PathBuf, u64, Vec<Turn>)| {
        let found = tokenizer::chat_turns(tokenizer, turns);
        let (tokens, loss_mask) = found.map_err(|why| Failure::new(format_args!("line {line}: {why}")).within(path))?;
        Ok(Sequence { tokens, loss_mask })
    };
    let sequences: Vec<Sequence> = chats.par_iter().map(sequence).collect::<Result<_>>()?;
    let count = sequences.len();
    if count < 2 {
        return Err(Failure::new(format_args!(
            "found {count} chats, expected at least 2: one to train on, one to validate on"
        )));
    }
    let all = || sequences.iter();
    let tokens = [
        all().map(|sequence| sequence.tokens.len()).sum(),
        all().flat_map(|sequence| &sequence.loss_mask).filter(|&&counts| counts).count(),
    ];
    let (mut train, mut validation) = (Vec::new(), Vec::new());
    for (index, sequence) in sequences.into_iter().enumerate() {
        let chosen = index % 10 == 9 || count < 10 && index + 1 == count;
        if chosen { &mut validation } else { &mut train }.push(sequence);
    }
    let Sequence { tokens: first, loss_mask } = &validation[0];
    let answer = loss_mask.iter().position(|&counts| counts).unwrap_or(first.len());
    let prompt = first[..answer].to_vec();
    Ok(Chats { examples: Examples::new(train, validation)?, prompt, tokens })
}

/// The turns in a record.
fn turns_of(fields: &Map<String, Value>) -> std::result::Result<Vec<Turn>, String> {
    let turns = match fields.get(MESSAGES) {
        Some(Value::Array(turns)) if turns.is_empty() => return Err(format!("field `{MESSAGES}` is empty")),
        Some(Value::Array(turns)) => turns,
        Some(other) => return Err(format!("field `{MESSAGES}` is {}, expected a list", kind(other))),
        None => {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            return Err(format!("field `{MESSAGES}` is missing; the record has {}", names.join(", ")));
        }
    };
    let turn = |(index, turn): (usize, &Value)| {
        let number = index + 1;
        let Value::Object(turn) = turn else {
            return Err(format!("message {number} is {}, expected an object", kind(turn)));
        };
        let text = |field: &str| match turn.get(field) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => Err(format!("message {number}: `{field}` is {}, expected a string", kind(other))),
            None => Err(format!("message {number}: `{field}` is missing")),
        };
        Ok(Turn { role: text("role")?, content: text("content")? })
    };
    turns.iter().enumerate().map(turn).collect()
}
