//! Models: from a word to its tokens.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use serde_json::Value;
use tokenizers::{
    Token,
    models::{TrainerWrapper, bpe::BpeTrainer},
};

use super::{
    Failure,
    bpe::{self, Bpe},
    unigram::{self, Unigram},
    vocabulary::{Vocabulary, shown},
};

/// Model of a tokenizer, with its vocabulary.
pub struct Model {
    vocabulary: Vocabulary,
    /// Length of the vocabulary in the file.
    size: usize,
    kind: Kind,
}

enum Kind {
    Bpe(Bpe),
    Unigram(Unigram),
    WordPiece { unknown: u32, prefix: String, longest_word: usize },
    WordLevel { unknown: u32 },
}

/// Scratch memory reused between words.
#[derive(Default)]
pub struct Scratch {
    bpe: bpe::Scratch,
    unigram: unigram::Scratch,
    piece: String,
}

impl Model {
    /// Reads the key `model` of `tokenizer.json`.
    pub fn of_json(mut model: Value) -> Result<Self, String> {
        let has = |key: &str| model.get(key).is_some();
        let kind = match model.get("type").and_then(Value::as_str) {
            Some(kind) => kind.to_string(),
            // Old files omit the type.
            None if has("merges") => "BPE".to_string(),
            None if has("max_input_chars_per_word") => "WordPiece".to_string(),
            None if matches!(model.get("vocab"), Some(Value::Array(_))) => "Unigram".to_string(),
            None => "WordLevel".to_string(),
        };
        let vocabulary = model.get_mut("vocab").map(Value::take).ok_or("model.vocab is missing")?;
        if kind == "Unigram" {
            return Self::unigram(&model, vocabulary);
        }
        let merges = model.get_mut("merges").map(Value::take);
        let vocabulary = Vocabulary::of_json(vocabulary)?;
        let unknown = |token: &str| {
            let found = vocabulary.id(token);
            found.ok_or_else(|| format!("model.unk_token: `{}` is not in the vocabulary", shown(token)))
        };
        let kind = match kind.as_str() {
            "BPE" => {
                let merges = merges.ok_or("model.merges is missing")?;
                Kind::Bpe(Bpe::new(&vocabulary, pairs(merges)?, Self::bpe_options(&model)?)?)
            }
            "WordPiece" => Kind::WordPiece {
                unknown: unknown(text(&model, "unk_token")?.ok_or("model.unk_token is missing")?)?,
                prefix: text(&model, "continuing_subword_prefix")?
                    .ok_or("model.continuing_subword_prefix is missing")?
                    .to_string(),
                longest_word: number(&model, "max_input_chars_per_word")?
                    .ok_or("model.max_input_chars_per_word is missing")?,
            },
            "WordLevel" => {
                Kind::WordLevel { unknown: unknown(text(&model, "unk_token")?.ok_or("model.unk_token is missing")?)? }
            }
            other => {
                let other = shown(other);
                return Err(format!("model.type is `{other}`, expected BPE, Unigram, WordPiece or WordLevel"));
            }
        };
        Ok(Self { size: vocabulary.len(), vocabulary, kind })
    }

    fn bpe_options(model: &Value) -> Result<bpe::Options, String> {
        if let Some(dropout) = model.get("dropout").and_then(Value::as_f64).filter(|&dropout| dropout != 0.0) {
            return Err(format!("model.dropout is {dropout}, which randomizes tokens for training; set it to null"));
        }
        let text = |key: &str| Ok::<_, String>(text(model, key)?.map(str::to_string));
        let affix = |key: &str| match text(key)? {
            Some(affix) if affix.len() > 64 => {
                Err(format!("model.{key} has {} bytes, expected at most 64", affix.len()))
            }
            affix => Ok(affix),
        };
        Ok(bpe::Options {
            unknown: text("unk_token")?,
            prefix: affix("continuing_subword_prefix")?,
            suffix: affix("end_of_word_suffix")?,
            fuse_unknown: flag(model, "fuse_unk")?,
            byte_fallback: flag(model, "byte_fallback")?,
            whole_words: flag(model, "ignore_merges")?,
        })
    }

    fn unigram(model: &Value, vocabulary: Value) -> Result<Self, String> {
        let Value::Array(pieces) = vocabulary else {
            return Err("model.vocab: expected a list of pieces and scores".to_string());
        };
        let piece = |(at, piece): (usize, Value)| match piece {
            Value::Array(mut pair) if pair.len() == 2 => match (pair[0].take(), pair[1].as_f64()) {
                (Value::String(piece), Some(score)) => Ok((piece, score)),
                _ => Err(format!("model.vocab: piece {at} is not a pair of string and score")),
            },
            _ => Err(format!("model.vocab: piece {at} is not a pair of string and score")),
        };
        let pieces: Vec<(String, f64)> = pieces.into_iter().enumerate().map(piece).collect::<Result<_, _>>()?;
        let mut vocabulary = Vocabulary::default();
        pieces.iter().zip(0..).for_each(|((piece, _), id)| vocabulary.add(piece, id));
        let unknown = number(model, "unk_id")?;
        let kind = Kind::Unigram(Unigram::new(&pieces, &vocabulary, unknown, flag(model, "byte_fallback")?)?);
        Ok(Self { size: pieces.len(), vocabulary, kind })
    }

    /// Appends the tokens of a word.
    pub fn split(&self, word: &str, scratch: &mut Scratch, tokens: &mut Vec<u32>) -> Result<(), Failure> {
        let vocabulary = &self.vocabulary;
        match &self.kind {
            Kind::Bpe(bpe) => bpe.split(word, vocabulary, &mut scratch.bpe, tokens),
            Kind::Unigram(unigram) => unigram.split(word, vocabulary, &mut scratch.unigram, tokens)?,
            Kind::WordPiece { unknown, prefix, longest_word } => {
                let start = tokens.len();
                let fits = word.len() <= *longest_word || word.chars().count() <= *longest_word;
                if !fits || !self.word_pieces(word, prefix, &mut scratch.piece, tokens) {
                    tokens.truncate(start);
                    tokens.push(*unknown);
                }
            }
            Kind::WordLevel { unknown } => tokens.push(vocabulary.id(word).unwrap_or(*unknown)),
        }
        Ok(())
    }

    /// Matches the longest pieces from left to right; returns `false` if some position has none.
    fn word_pieces(&self, word: &str, prefix: &str, piece: &mut String, tokens: &mut Vec<u32>) -> bool {
        let mut start = 0;
        while start < word.len() {
            piece.clear();
            if start > 0 {
                piece.push_str(prefix);
            }
            let skipped = piece.len();
            let rest = &word[start..];
            // No token is longer.
            let longest = self.vocabulary.longest().saturating_sub(skipped).min(rest.len());
            piece.push_str(&rest[..rest.floor_char_boundary(longest)]);
            loop {
                if piece.len() <= skipped {
                    return false;
                }
                if let Some(id) = self.vocabulary.id(piece) {
                    tokens.push(id);
                    break;
                }
                piece.pop();
            }
            start += piece.len() - skipped;
        }
        true
    }
}

/// Returns the pairs of the key `merges`: lists of two texts, or two texts separated by a space.
fn pairs(merges: Value) -> Result<Vec<(String, String)>, String> {
    let Value::Array(merges) = merges else {
        return Err("model.merges: expected a list".to_string());
    };
    let pair = |(at, merge): (usize, Value)| {
        let pair = match merge {
            Value::Array(pair) => match <[Value; 2]>::try_from(pair) {
                Ok([Value::String(first), Value::String(second)]) => Some((first, second)),
                _ => None,
            },
            Value::String(pair) => {
                let parts = pair.split_once(' ').filter(|(_, second)| !second.contains(' '));
                parts.map(|(first, second)| (first.to_string(), second.to_string()))
            }
            _ => None,
        };
        pair.ok_or_else(|| format!("model.merges: merge {at} is not a pair of tokens"))
    };
    let is_comment = |merge: &Value| merge.as_str().is_some_and(|line| line.starts_with("#version"));
    merges.into_iter().filter(|merge| !is_comment(merge)).enumerate().map(pair).collect()
}

fn text<'j>(model: &'j Value, key: &str) -> Result<Option<&'j str>, String> {
    match model.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("model.{key}: expected a string")),
    }
}

fn flag(model: &Value, key: &str) -> Result<bool, String> {
    match model.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(_) => Err(format!("model.{key}: expected true or false")),
    }
}

fn number(model: &Value, key: &str) -> Result<Option<usize>, String> {
    match model.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(number) => {
            let number = number.as_u64().and_then(|number| usize::try_from(number).ok());
            number.map(Some).ok_or_else(|| format!("model.{key}: expected an integer of at least 0"))
        }
    }
}

/// Implements the model interface of the crate `tokenizers`.
impl tokenizers::Model for Model {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, word: &str) -> tokenizers::Result<Vec<Token>> {
        let mut tokens = Vec::new();
        self.split(word, &mut Scratch::default(), &mut tokens)?;
        // Offsets are not used.
        let token = |id| Token::new(id, self.id_to_token(id).unwrap_or_default(), (0, 0));
        Ok(tokens.into_iter().map(token).collect())
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.vocabulary.id(token)
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.vocabulary.token(id).map(str::to_string)
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.vocabulary.iter().map(|(token, id)| (token.to_string(), id)).collect()
    }

    fn get_vocab_size(&self) -> usize {
        self.size
    }

    fn save(&self, _folder: &Path, _name: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("saving is not supported".into())
    }

    fn get_trainer(&self) -> TrainerWrapper {
        BpeTrainer::default().into()
    }
}
