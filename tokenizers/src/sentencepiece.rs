//! SentencePiece's models (Kudo and Richardson, <https://arxiv.org/abs/1808.06226>) in the form of `tokenizer.json`.
//!
//! A `tokenizer.model` is a message of Protocol Buffers of which the pieces and a dozen settings matter. GGUF files
//! keep the same pieces in lists.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};
use x_transformers::io::Metadata;

use super::{
    added_token,
    decoder::{BY_CHARACTER, OWN},
};

/// Stands for a space in pieces.
const SPACE: &str = "▁";

/// Pieces, and the rules for splitting texts into them.
pub struct SentencePiece {
    pieces: Vec<Piece>,
    /// Unigram model, the likeliest pieces; otherwise BPE, in the order of the scores.
    unigram: bool,
    /// Characters without a piece are split into the pieces of their bytes.
    byte_fallback: bool,
    unknown: Option<usize>,
    start: Option<usize>,
    end: Option<usize>,
    /// Compiled rules that characters are replaced by; empty for none.
    rules: Vec<u8>,
    /// A space in front of the text.
    prefix: bool,
    /// Spaces at the ends go, and of several in a row one stays.
    collapse: bool,
}

struct Piece {
    text: String,
    score: f32,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

impl Kind {
    fn new(number: u64) -> Result<Self, String> {
        Ok(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            other => return Err(format!("has a piece of type {other}, expected 1 to 6")),
        })
    }
}

/// Tokens around a text, and its normalization.
#[derive(Default)]
pub struct Customs {
    /// If `true`, the model's start token precedes the text.
    pub start: bool,
    /// If `true`, the model's end token follows the text.
    pub end: bool,
    /// Start and end tokens other than the model's, with their ids.
    pub ends: [Option<(u64, String)>; 2],
    /// If `Some(true)`, a space precedes the text, if `Some(false)` none does; `None`: as the model says.
    pub prefix: Option<bool>,
    /// If `true`, that space goes in front of the whole text only, not of what follows a token that was looked for.
    pub prefix_once: bool,
    /// Normalizers before those of the model.
    pub normalizers: Vec<Value>,
}

impl SentencePiece {
    /// Reads a `tokenizer.model` or `spiece.model`.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut model = Self {
            pieces: Vec::new(),
            unigram: true,
            byte_fallback: false,
            unknown: Some(0),
            start: Some(1),
            end: Some(2),
            rules: Vec::new(),
            prefix: true,
            collapse: true,
        };
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(piece)) => model.pieces.push(Piece::parse(piece)?),
                (2, Field::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Field::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                _ => {}
            }
        }
        model.checked()
    }

    fn read_trainer(&mut self, trainer: &[u8]) -> Result<(), String> {
        // Ids of tokens that are not there are -1.
        let id = |number: u64| usize::try_from(number as i64).ok();
        for field in Fields(trainer) {
            match field? {
                (3, Field::Number(1)) => self.unigram = true,
                (3, Field::Number(2)) => self.unigram = false,
                (3, Field::Number(_)) => {
                    return Err("is a word or character model, expected unigram or BPE".to_string());
                }
                (24, Field::Number(suffix)) if suffix != 0 => {
                    return Err(
                        "puts spaces after words (`treat_whitespace_as_suffix`), which is not supported".to_string()
                    );
                }
                (35, Field::Number(fallback)) => self.byte_fallback = fallback != 0,
                (40, Field::Number(number)) => self.unknown = id(number),
                (41, Field::Number(number)) => self.start = id(number),
                (42, Field::Number(number)) => self.end = id(number),
                _ => {}
            }
        }
        Ok(())
    }

    fn read_normalizer(&mut self, normalizer: &[u8]) -> Result<(), String> {
        for field in Fields(normalizer) {
            match field? {
                (2, Field::Bytes(rules)) => self.rules = rules.to_vec(),
                (3, Field::Number(prefix)) => self.prefix = prefix != 0,
                (4, Field::Number(collapse)) => self.collapse = collapse != 0,
                (5, Field::Number(0)) => {
                    return Err("does not escape whitespace (`escape_whitespaces` is false), which is not supported"
                        .to_string());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The vocabulary of a GGUF file whose tokenizer is of the model `llama`, and what it puts around texts.
    pub fn of_gguf(all: &BTreeMap<String, Metadata>) -> Result<(Self, Customs), String> {
        let metadata = |key: &str| all.get(&format!("tokenizer.ggml.{key}"));
        let list = |key: &str| {
            let found = metadata(key).and_then(Metadata::as_list);
            found.ok_or_else(|| format!("has no tokenizer: missing list `tokenizer.ggml.{key}`"))
        };
        let flag = |key: &str, default: bool| match metadata(key) {
            None => Ok(default),
            Some(Metadata::Bool(flag)) => Ok(*flag),
            Some(_) => Err(format!("`tokenizer.ggml.{key}` is not a boolean")),
        };
        let id = |key: &str| metadata(key).and_then(Metadata::as_usize);
        let (tokens, scores) = (list("tokens")?, list("scores")?);
        // Files may leave the kinds out: pieces of bytes are told by their spelling then, the others by their ids.
        let kinds = metadata("token_type").map_or(Ok(None), |_| list("token_type").map(Some))?;
        // Those of llama.cpp where a file names none.
        let [unknown, start, end] = [("unknown_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)]
            .map(|(key, usual)| id(key).unwrap_or(usual));
        let rules = match metadata("precompiled_charsmap") {
            None => Vec::new(),
            Some(rules) => of_bytes(rules).ok_or("`tokenizer.ggml.precompiled_charsmap` is not a list of bytes")?,
        };
        let count = kinds.map_or(tokens.len(), <[_]>::len);
        if scores.len() != tokens.len() || count != tokens.len() {
            let (tokens, scores, kinds) = (tokens.len(), scores.len(), count);
            return Err(format!(
                "has {tokens} tokens, {scores} scores and {kinds} token types, expected the same number of each"
            ));
        }
        let piece = |(index, (token, score)): (usize, (&Metadata, &Metadata))| {
            let text = token.as_str().ok_or("has a token that is not a string")?.to_string();
            let score = match *score {
                Metadata::Float(score) => score as f32,
                Metadata::Int(score) => score as f32,
                _ => return Err("has a score that is not a number".to_string()),
            };
            let kind = match kinds {
                // Tokens that fill up a vocabulary are like all others to llama.cpp.
                Some(kinds) => match Kind::new(kinds[index].as_usize().unwrap_or(0) as u64)? {
                    Kind::Unused => Kind::Normal,
                    kind => kind,
                },
                None if index == unknown => Kind::Unknown,
                None if index == start || index == end => Kind::Control,
                None if text.len() == 6 && text.starts_with("<0x") && text.ends_with('>') => Kind::Byte,
                None => Kind::Normal,
            };
            Ok(Piece { text, score, kind })
        };
        let model = Self {
            pieces: tokens.iter().zip(scores).enumerate().map(piece).collect::<Result<_, String>>()?,
            unigram: false,
            byte_fallback: true,
            unknown: Some(unknown),
            start: Some(start),
            end: Some(end),
            rules,
            prefix: flag("add_space_prefix", true)?,
            collapse: flag("remove_extra_whitespaces", false)?,
        };
        let customs =
            Customs { start: flag("add_bos_token", true)?, end: flag("add_eos_token", false)?, ..Customs::default() };
        Ok((model.checked()?, customs))
    }

    fn checked(self) -> Result<Self, String> {
        let kind = |kind: Kind| self.pieces.iter().find(|piece| piece.kind == kind);
        if self.pieces.is_empty() {
            return Err("has no pieces, so it is not a SentencePiece model".to_string());
        }
        if let Some(piece) = kind(Kind::Unused) {
            return Err(format!("has unused pieces, such as `{}`, which are not supported", piece.text));
        }
        if let Some(piece) = self.pieces.iter().find(|piece| !piece.score.is_finite()) {
            return Err(format!("has the score {} for `{}`, expected a finite number", piece.score, piece.text));
        }
        if let Some(id) = self.unknown.filter(|&id| id >= self.pieces.len()) {
            return Err(format!("has {} pieces, but its unknown piece has the id {id}", self.pieces.len()));
        }
        if self.byte_fallback && self.pieces.iter().filter(|piece| piece.kind == Kind::Byte).count() != 256 {
            return Err("uses byte fallback but lacks some of the 256 byte pieces".to_string());
        }
        Ok(self)
    }

    /// Returns the id of a piece.
    pub fn id(&self, text: &str) -> Option<usize> {
        self.pieces.iter().position(|piece| piece.text == text)
    }

    /// Converts the model to the form of `tokenizer.json`.
    pub fn json(&self, customs: Customs) -> Result<String, String> {
        let mut normalizers = customs.normalizers;
        let replace =
            |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        if !self.rules.is_empty() {
            normalizers.push(json!({"type": "Precompiled", "precompiled_charsmap": base64(&self.rules)}));
        }
        if self.collapse {
            normalizers.push(replace(json!({"Regex": "^ +|[ ▁]+$"}), ""));
            normalizers.push(replace(json!({"Regex": " {2,}"}), " "));
        }
        let prefix = customs.prefix.unwrap_or(self.prefix);
        let mut pre_tokenizer = Value::Null;
        if prefix && customs.prefix_once {
            let scheme = json!({"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": false});
            pre_tokenizer = scheme;
        } else {
            normalizers.extend(prefix.then(|| json!({"type": "Prepend", "prepend": SPACE})));
            normalizers.push(replace(json!({"String": " "}), SPACE));
        }
        let mut decoders = vec![
            replace(json!({"String": SPACE}), " "),
            json!({"type": "ByteFallback", OWN: BY_CHARACTER}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let mut added = Vec::new();
        for (id, piece) in self.pieces.iter().enumerate() {
            if let Kind::Control | Kind::UserDefined | Kind::Unknown = piece.kind {
                added.extend(added_token(&piece.text, id as u64).map(|mut token| {
                    token["special"] = json!(piece.kind != Kind::UserDefined);
                    token
                }));
            }
        }
        Ok(json!({
            "version": "1.0",
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.around(customs.start, customs.end, customs.ends)?,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": if self.unigram { self.unigrams() } else { self.merges()? },
        })
        .to_string())
    }

    /// The template of a text between the tokens for its start and its end.
    fn around(&self, start: bool, end: bool, others: [Option<(u64, String)>; 2]) -> Result<Value, String> {
        let token = |wanted: bool, id: Option<usize>, name: &str, other: Option<(u64, String)>| {
            let piece = other.or_else(|| id.and_then(|id| Some((id as u64, self.pieces.get(id)?.text.clone()))));
            if wanted && piece.is_none() {
                Err(format!("has no token for the {name} of a text"))
            } else {
                Ok(piece.filter(|_| wanted))
            }
        };
        let [first, last] = others;
        let (start, end) = (token(start, self.start, "start", first)?, token(end, self.end, "end", last)?);
        let special = |(_, text): &(u64, String)| json!({"SpecialToken": {"id": text, "type_id": 0}});
        let of = |name: &str| -> Vec<Value> {
            let text = json!({"Sequence": {"id": name, "type_id": 0}});
            start.iter().map(special).chain([text]).chain(end.iter().map(special)).collect()
        };
        let tokens = start.iter().chain(&end);
        let tokens: Map<String, Value> =
            tokens.map(|(id, text)| (text.clone(), json!({"id": text, "ids": [id], "tokens": [text]}))).collect();
        let pair = [of("A"), of("B")].concat();
        Ok(json!({
            "type": "TemplateProcessing", "single": of("A"), "pair": pair,
            "special_tokens": tokens,
        }))
    }

    fn unigrams(&self) -> Value {
        let pieces: Vec<Value> = self.pieces.iter().map(|piece| json!([piece.text, piece.score])).collect();
        json!({"type": "Unigram", "unk_id": self.unknown, "vocab": pieces, "byte_fallback": self.byte_fallback})
    }

    /// Pairs of pieces that make a piece, those with the highest score first.
    fn merges(&self) -> Result<Value, String> {
        let mut ids = HashMap::new();
        for (id, piece) in self.pieces.iter().enumerate() {
            if ids.insert(piece.text.as_str(), id).is_some() {
                return Err(format!("has the piece `{}` twice", piece.text));
            }
        }
        let mut merges = Vec::new();
        for piece in self.pieces.iter().filter(|piece| piece.kind == Kind::Normal) {
            for (at, _) in piece.text.char_indices().skip(1) {
                let (left, right) = piece.text.split_at(at);
                if ids.contains_key(left) && ids.contains_key(right) {
                    merges.push((piece.score, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.len().cmp(&a.1.len())));
        let merges: Vec<Value> = merges.into_iter().map(|(_, left, right)| json!([left, right])).collect();
        let unknown = self.unknown.map(|id| self.pieces[id].text.as_str());
        Ok(json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": self.byte_fallback, "vocab": ids,
            "merges": merges,
        }))
    }
}

/// A list of integers of 8 bits, with or without a sign.
fn of_bytes(list: &Metadata) -> Option<Vec<u8>> {
    let byte = |value: &Metadata| match *value {
        Metadata::Int(value @ -128..=255) => Some(value as u8),
        _ => None,
    };
    list.as_list()?.iter().map(byte).collect()
}

impl Piece {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut piece = Self { text: String::new(), score: 0.0, kind: Kind::Normal };
        for field in Fields(bytes) {
            match field? {
                (1, Field::Bytes(text)) => {
                    piece.text = str::from_utf8(text).map_err(|_| "has a piece that is not UTF-8")?.to_string();
                }
                (2, Field::Fixed32(score)) => piece.score = f32::from_bits(score),
                (3, Field::Number(kind)) => piece.kind = Kind::new(kind)?,
                _ => {}
            }
        }
        Ok(piece)
    }
}

/// The fields of a message of Protocol Buffers, with their numbers.
struct Fields<'a>(&'a [u8]);

enum Field<'a> {
    Number(u64),
    Fixed32(u32),
    Fixed64,
    Bytes(&'a [u8]),
}

impl<'a> Fields<'a> {
    fn take(&mut self, count: u64) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(count).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(number);
            }
        }
        None
    }

    fn field(&mut self) -> Option<(u64, Field<'a>)> {
        let key = self.number()?;
        let field = match key & 7 {
            0 => Field::Number(self.number()?),
            1 => self.take(8).map(|_| Field::Fixed64)?,
            2 => {
                let length = self.number()?;
                Field::Bytes(self.take(length)?)
            }
            5 => Field::Fixed32(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, field))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Field<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| "is truncated or not a SentencePiece model".to_string()))
    }
}

/// As `tokenizer.json` has bytes (RFC 4648).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let number = (0..3).fold(0, |number, at| number << 8 | u32::from(group.get(at).copied().unwrap_or(0)));
        for at in 0..4 {
            let digit = char::from(DIGITS[(number >> (18 - 6 * at)) as usize & 63]);
            text.push(if at <= group.len() { digit } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use x_transformers::io::TensorFile;

    use super::{
        super::{Tokenizer, gguf::of_gguf},
        Customs, SentencePiece, base64,
    };

    #[test]
    fn bytes_in_base64() {
        for (bytes, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg==")] {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
    }

    /// Compares with the tokens of the Python package `sentencepiece`; see `tests/sentencepiece/make.py`.
    fn agrees(model: &[u8], cases: &str, decodes: bool) {
        let model = SentencePiece::parse(model).expect("a model");
        let tokenizer: tokenizers::Tokenizer = model.json(Customs::default()).unwrap().parse().unwrap();
        let cases: Vec<Value> = serde_json::from_str(cases).unwrap();
        assert!(cases.len() > 90);
        let mut wrong = Vec::new();
        for case in &cases {
            let text = case["text"].as_str().unwrap();
            let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
            if json!(ids) != case["ids"] {
                wrong.push(format!("{text:?}: {ids:?}, {}", case["ids"]));
            }
            if decodes {
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), case["decoded"].as_str().unwrap(), "{text:?}");
            }
        }
        assert!(wrong.is_empty(), "{} of {} differ\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    }

    #[test]
    fn pairs_are_merged_as_sentencepiece_does() {
        let model = include_bytes!("../tests/sentencepiece/bpe.model");
        agrees(model, include_str!("../tests/sentencepiece/bpe.json"), true);
    }

    #[test]
    fn pieces_are_the_likeliest_as_in_sentencepiece() {
        let model = include_bytes!("../tests/sentencepiece/unigram.model");
        // Unknown characters are shown as a mark there, and left out here.
        agrees(model, include_str!("../tests/sentencepiece/unigram.json"), false);
    }

    /// A continuation keeps the space in front of its first word, which a text of its own would not have.
    #[test]
    fn continuations_keep_their_space() {
        let model = SentencePiece::parse(include_bytes!("../tests/sentencepiece/bpe.model")).unwrap();
        let json = model.json(Customs { start: true, ..Customs::default() }).unwrap();
        let tokenizer = Tokenizer::from_json(&json).unwrap();
        let mut compared = 0;
        for text in ["the tensor of a tape", "a 語 b", "  two"] {
            let tokens = tokenizer.encode(text).unwrap();
            for split in 1..tokens.len() {
                let (prompt, new) = tokens.split_at(split);
                let mut shown = tokenizer.stream(prompt);
                let pieces: String = new.iter().map(|&token| shown.push(token).unwrap()).collect();
                // Not in the middle of a character.
                if let Some(rest) = text.strip_prefix(&tokenizer.decode(prompt).unwrap()) {
                    assert_eq!(pieces + &shown.finish().unwrap(), rest, "{text} after {split}");
                    compared += 1;
                }
            }
        }
        assert!(compared > 10, "{compared}");
    }

    /// A GGUF file has the same pieces.
    #[test]
    fn pieces_of_gguf_files() {
        let model = SentencePiece::parse(include_bytes!("../tests/sentencepiece/bpe.model")).unwrap();
        let text = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
        let list = |key: &str, kind: u32, values: Vec<Vec<u8>>| {
            let head = [9u32.to_le_bytes(), kind.to_le_bytes()].concat();
            [text(key), head, (values.len() as u64).to_le_bytes().to_vec(), values.concat()].concat()
        };
        let gguf = |scores: usize| {
            let pieces = || model.pieces.iter();
            let entries = [
                [text("tokenizer.ggml.model"), 8u32.to_le_bytes().to_vec(), text("llama")].concat(),
                list("tokenizer.ggml.tokens", 8, pieces().map(|piece| text(&piece.text)).collect()),
                list(
                    "tokenizer.ggml.scores",
                    6,
                    pieces().take(scores).map(|piece| piece.score.to_le_bytes().to_vec()).collect(),
                ),
                list(
                    "tokenizer.ggml.token_type",
                    5,
                    pieces().map(|piece| (piece.kind as i32 + 1).to_le_bytes().to_vec()).collect(),
                ),
                [text("tokenizer.ggml.bos_token_id"), 4u32.to_le_bytes().to_vec(), 1u32.to_le_bytes().to_vec()]
                    .concat(),
            ];
            let count = (entries.len() as u64).to_le_bytes();
            let bytes = [b"GGUF", &3u32.to_le_bytes()[..], &0u64.to_le_bytes(), &count, &entries.concat()].concat();
            let file = tempfile::Builder::new().suffix(".gguf").tempfile().unwrap();
            std::fs::write(file.path(), bytes).unwrap();
            of_gguf(TensorFile::open(file.path()).unwrap().metadata())
        };
        let tokenizer: tokenizers::Tokenizer = gguf(600).unwrap().parse().unwrap();
        let same = model.json(Customs { start: true, ..Customs::default() }).unwrap();
        let same: tokenizers::Tokenizer = same.parse().unwrap();
        for text in ["the tensor of a tape", "  two\n", "語 <tool> a"] {
            let ids = |tokenizer: &tokenizers::Tokenizer| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
            assert_eq!(ids(&tokenizer), ids(&same));
        }
        assert!(gguf(7).unwrap_err().contains("600 tokens, 7 scores"));
    }

    /// The tokens around a text are those of the model.
    #[test]
    fn ends_surround_the_text() {
        let model = SentencePiece::parse(include_bytes!("../tests/sentencepiece/bpe.model")).unwrap();
        let ids = |start, end| {
            let json = model.json(Customs { start, end, ..Customs::default() }).unwrap();
            let tokenizer: tokenizers::Tokenizer = json.parse().unwrap();
            tokenizer.encode("a", true).unwrap().get_ids().to_vec()
        };
        let inner = ids(false, false);
        assert_eq!(ids(true, false), [&[1], &inner[..]].concat());
        assert_eq!(ids(true, true), [&[1], &inner[..], &[2]].concat());
    }

    /// Every beginning of a model, and every changed byte, is a model or an error.
    #[test]
    fn damaged_models_are_refused() {
        let model = include_bytes!("../tests/sentencepiece/unigram.model");
        for end in 0..model.len() {
            let _ = SentencePiece::parse(&model[..end]).map(|model| model.json(Default::default()));
        }
        for at in (0..model.len()).step_by(7) {
            let mut damaged = model.to_vec();
            damaged[at] ^= 0x85;
            let _ = SentencePiece::parse(&damaged).map(|model| model.json(Default::default()));
        }
        assert!(SentencePiece::parse(b"").is_err());
        assert!(SentencePiece::parse(b"no model").is_err());
    }
}
