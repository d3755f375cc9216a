//! The files of a folder that describe its tokenizer.

use std::path::Path;

use serde_json::json;
use x_transformers::{
    Error, Result,
    io::{read_limited, read_text},
    pretrained::Family,
};

use super::{
    byte_level,
    described::Described,
    file_error,
    sentencepiece::{Customs, SentencePiece},
    settings::{Settings, Token},
    wordpiece,
};

/// Bytes that a file may have; the largest vocabularies have some ten million.
const MAX_FILE: u64 = 256 << 20;

/// The names that models of SentencePiece have.
const SENTENCE_PIECE: [&str; 3] = ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"];

/// The file in a folder that describes the tokenizer. `over` is a JSON object whose keys take precedence over those of
/// `tokenizer_config.json`, or empty.
pub fn of_folder(folder: &Path, family: Family, over: &str) -> Result<Described> {
    let names = ["tokenizer.json"].into_iter().chain(SENTENCE_PIECE).chain(["vocab.txt"]);
    if let Some(path) = names.map(|name| folder.join(name)).find(|path| path.is_file()) {
        return of_file(&path, family, over);
    }
    let [vocabulary, merges] = ["vocab.json", "merges.txt"].map(|name| folder.join(name));
    if vocabulary.is_file() && merges.is_file() {
        let settings = Settings::read(folder, over)?;
        return byte_level::of_files(
            (&vocabulary, &read_text(&vocabulary, MAX_FILE)?),
            &read_text(&merges, MAX_FILE)?,
            &settings,
            family,
        );
    }
    let why = "has no tokenizer: expected `tokenizer.json`, `tokenizer.model`, `spiece.model`, `vocab.txt`, or \
               `vocab.json` with `merges.txt`; add one or name it with `--tokenizer` (in transformers, \
               `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` writes `tokenizer.json`)";
    Err(file_error(folder, why))
}

/// `tokenizer.json`, a model of SentencePiece, or what `vocab.txt` stands for, with the settings beside it.
pub fn of_file(path: &Path, family: Family, over: &str) -> Result<Described> {
    let broken = |why: String| file_error(path, why);
    let settings = || Settings::read(path.parent().unwrap_or(Path::new("")), over);
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => Described::of_json(read_text(path, MAX_FILE)?, &settings()?, family),
        Some("model") => {
            let pieces = SentencePiece::parse(&read_limited(path, MAX_FILE)?).map_err(broken)?;
            of_sentence_piece(pieces, path, family, &settings()?)
        }
        Some("txt") => wordpiece::of_vocabulary(&read_text(path, MAX_FILE)?, path, &settings()?, family),
        _ => Err(broken("is not a tokenizer: expected a name that ends in .json, .model or .txt".to_string())),
    }
}

/// Describes a SentencePiece model as the tokenizers of `transformers` use it.
fn of_sentence_piece(pieces: SentencePiece, path: &Path, family: Family, settings: &Settings) -> Result<Described> {
    let broken = |why: String| file_error(path, why);
    let flag = |key: &str, default: bool| Ok::<bool, Error>(settings.flag(key)?.unwrap_or(default));
    if family.is_causal() {
        let end = |key: &str| match settings.named(key)? {
            None => Ok(None),
            Some(Token { content, .. }) => {
                let listed = settings.added.iter().find(|(_, token)| token.content == content).map(|(id, _)| *id);
                let id = listed.or(pieces.id(&content).map(|id| id as u64));
                let lacks = || settings.refuse(key, format_args!("is `{content}`, which is not in the vocabulary"));
                Ok::<_, Error>(Some((id.ok_or_else(lacks)?, content.clone())))
            }
        };
        let (start, last) = (flag("add_bos_token", true)?, flag("add_eos_token", false)?);
        let customs = Customs {
            start,
            end: last,
            ends: [if start { end("bos_token")? } else { None }, if last { end("eos_token")? } else { None }],
            prefix: settings.flag("add_prefix_space")?,
            // The class of today has it so; a folder without a class is read as it was before that class.
            prefix_once: !flag("legacy", settings.named_class() != Some("LlamaTokenizer"))?,
            ..Customs::default()
        };
        let defaults = [("unk_token", "<unk>"), ("bos_token", "<s>"), ("eos_token", "</s>")];
        let mut described = Described::with(pieces.json(customs).map_err(broken)?, settings, &defaults)?;
        // They are looked for in the text itself: normalized, they would begin with a space.
        described.added.iter_mut().for_each(|(_, token)| token.normalized = false);
        return Ok(described);
    }
    let class = settings.class(family);
    if !matches!(class, "AlbertTokenizer" | "BertTokenizer") {
        let why = format_args!(
            "is `{class}`, whose SentencePiece models are not supported; save a `tokenizer.json` with transformers"
        );
        return Err(settings.refuse("tokenizer_class", why));
    }
    let quotes = ["``", "''"].map(|quotes| json!({"type": "Replace", "pattern": {"String": quotes}, "content": "\""}));
    let mut normalizers = quotes.to_vec();
    if !flag("keep_accents", false)? {
        normalizers.extend([json!({"type": "NFKD"}), json!({"type": "StripAccents"})]);
    }
    if flag("do_lower_case", true)? {
        normalizers.push(json!({"type": "Lowercase"}));
    }
    // Words end at every kind of space, not only at those that the model's own rules make one of.
    normalizers.push(json!({"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}));
    let name = |key: &str, default: &str| {
        let token = settings.named(key)?;
        Ok::<String, Error>(token.map_or_else(|| default.to_string(), |token| token.content))
    };
    let names = [name("cls_token", "[CLS]")?, name("sep_token", "[SEP]")?];
    let [Some(start), Some(end)] = [&names[0], &names[1]].map(|name| pieces.id(name)) else {
        return Err(broken(format!("lacks the token {} or {}", names[0], names[1])));
    };
    let [first, last] = names;
    let ends = [Some((start as u64, first)), Some((end as u64, last))];
    let customs = Customs { start: true, end: true, ends, normalizers, ..Customs::default() };
    let defaults = [
        ("bos_token", "[CLS]"),
        ("eos_token", "[SEP]"),
        ("unk_token", "<unk>"),
        ("sep_token", "[SEP]"),
        ("pad_token", "<pad>"),
        ("cls_token", "[CLS]"),
        ("mask_token", "[MASK]"),
    ];
    Described::with(pieces.json(customs).map_err(broken)?, settings, &defaults)
}
