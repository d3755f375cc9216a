//! Descriptions of tokenizers in the form of `tokenizer.json`.

use std::path::Path;

use serde_json::{Map, Value, json};
use x_transformers::{
    Result,
    io::{Family, read_limited, read_text},
};

use super::{
    added_token, file_error,
    sentencepiece::{Customs, SentencePiece},
};

/// Bytes that a file may have; the largest vocabularies have some ten million.
const MAX_FILE: u64 = 256 << 20;

/// The names that models of SentencePiece have.
const SENTENCE_PIECE: [&str; 3] = ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"];

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    read_limited(path, MAX_FILE)
}

fn read(path: &Path) -> Result<String> {
    read_text(path, MAX_FILE)
}

/// What the folder says about its tokenizer.
fn tokenizer_config(folder: &Path) -> Result<Value> {
    let path = folder.join("tokenizer_config.json");
    if !path.is_file() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&read(&path)?).map_err(|error| file_error(&path, error))
}

/// The file in a folder that describes the tokenizer.
pub fn of_folder(folder: &Path, family: Family) -> Result<String> {
    let names = ["tokenizer.json"].into_iter().chain(SENTENCE_PIECE).chain(["vocab.txt"]);
    if let Some(path) = names.map(|name| folder.join(name)).find(|path| path.is_file()) {
        return of_file(&path, family);
    }
    let merges = if folder.join("vocab.json").is_file() {
        " `vocab.json` is there, which this command does not read."
    } else {
        ""
    };
    let why = format!(
        "has no tokenizer: no `tokenizer.json`, no `tokenizer.model`, no `spiece.model` and no `vocab.txt`.{merges} \
         Put one of them there or name it by `--tokenizer`; \
         `AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)` of transformers writes the first"
    );
    Err(file_error(folder, why))
}

/// `tokenizer.json`, a model of SentencePiece, or what `vocab.txt` stands for: word pieces, or the symbols of SMILES.
pub fn of_file(path: &Path, family: Family) -> Result<String> {
    let broken = |why: String| file_error(path, why);
    let config = || tokenizer_config(path.parent().unwrap_or(Path::new("")));
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("json") => read(path),
        Some("model") => {
            let pieces = SentencePiece::parse(&read_bytes(path)?).map_err(broken)?;
            of_sentence_piece(pieces, family, &config()?).map_err(broken)
        }
        Some("txt") => {
            let text = read(path)?;
            let pieces = Pieces::new(&text).map_err(broken)?;
            if text.lines().all(is_symbol) {
                return Ok(pieces.symbols());
            }
            // Where nothing says it, a vocabulary with large letters tells them from small ones.
            let lowercase = config()?["do_lower_case"].as_bool().unwrap_or(!pieces.has_capitals());
            Ok(pieces.words(lowercase))
        }
        _ => Err(broken("is no tokenizer: expected a name that ends in .json, .model or .txt".to_string())),
    }
}

/// What the tokenizers of `transformers` do with a model of SentencePiece.
fn of_sentence_piece(pieces: SentencePiece, family: Family, config: &Value) -> std::result::Result<String, String> {
    let flag = |key: &str, default: bool| config[key].as_bool().unwrap_or(default);
    if family.is_causal() {
        let customs =
            Customs { start: flag("add_bos_token", true), end: flag("add_eos_token", false), ..Customs::default() };
        return pieces.json(customs);
    }
    let (Some(start), Some(end)) = (pieces.id("[CLS]"), pieces.id("[SEP]")) else {
        return Err("lacks [CLS] or [SEP]".to_string());
    };
    let quotes = ["``", "''"].map(|quotes| json!({"type": "Replace", "pattern": {"String": quotes}, "content": "\""}));
    let mut normalizers = quotes.to_vec();
    if !flag("keep_accents", false) {
        normalizers.extend([json!({"type": "NFKD"}), json!({"type": "StripAccents"})]);
    }
    if flag("do_lower_case", true) {
        normalizers.push(json!({"type": "Lowercase"}));
    }
    pieces.with_ends(start, end).json(Customs { start: true, end: true, normalizers })
}

/// A symbol of SMILES, as the tokenizer of rxnmapper splits them (Schwaller et al., <https://doi.org/10.1126/sciadv.abe4166>).
const SYMBOL: &str =
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]";

/// Whether a piece is one symbol of SMILES; names in brackets such as `[CLS]` look like atoms.
fn is_symbol(piece: &str) -> bool {
    const ATOMS: [&str; 16] = ["B", "Br", "C", "Cl", "N", "O", "S", "P", "F", "I", "b", "c", "n", "o", "s", "p"];
    let bracket = piece.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let digits = |text: &str, count: usize| text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit());
    bracket.is_some_and(|inner| !inner.is_empty() && !inner.contains(']'))
        || ATOMS.contains(&piece)
        || piece == ">>"
        || piece.len() == 1 && "().=#-+\\/:~@?>*$".contains(piece)
        || digits(piece, 1)
        || piece.strip_prefix('%').is_some_and(|number| digits(number, 2))
}

/// A vocabulary of one piece a line, with BERT's special tokens.
struct Pieces {
    vocabulary: Map<String, Value>,
    added: Vec<Value>,
    /// `[CLS]` before a text and `[SEP]` behind it.
    around: Value,
}

impl Pieces {
    fn new(text: &str) -> std::result::Result<Self, String> {
        let vocabulary: Map<String, Value> =
            text.lines().enumerate().map(|(id, piece)| (piece.to_string(), json!(id))).collect();
        let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
        let ids = special.map(|token| vocabulary.get(token).and_then(Value::as_u64));
        let [_, Some(_), Some(start), Some(end), _] = ids else {
            return Err("lacks one of [UNK], [CLS] and [SEP]".to_string());
        };
        let added = special.iter().zip(ids).filter_map(|(token, id)| added_token(token, id?)).collect();
        let around = json!({"type": "BertProcessing", "sep": ["[SEP]", end], "cls": ["[CLS]", start]});
        Ok(Self { vocabulary, added, around })
    }

    /// Whether a piece other than the names in brackets has a large letter.
    fn has_capitals(&self) -> bool {
        let mut pieces = self.vocabulary.keys().filter(|piece| !piece.starts_with('['));
        pieces.any(|piece| piece.chars().any(char::is_uppercase))
    }

    /// BERT's tokenizer.
    fn words(self, lowercase: bool) -> String {
        json!({
            "version": "1.0",
            "added_tokens": self.added,
            "normalizer": {
                "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                "lowercase": lowercase,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": self.around,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {
                "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": self.vocabulary,
            },
        })
        .to_string()
    }

    /// A tokenizer of molecules and reactions: each symbol is a token, what is none is left out.
    fn symbols(self) -> String {
        json!({
            "version": "1.0",
            "added_tokens": self.added,
            "normalizer": null,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": SYMBOL}, "behavior": "Removed", "invert": true},
            "post_processor": self.around,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "unk_token": "[UNK]", "vocab": self.vocabulary},
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::{Pieces, is_symbol};

    #[test]
    fn symbols_of_reactions_are_told_from_words() {
        for symbol in ["[PAD]", "[unused1]", "Cl", "c", "[C@@H]", ">>", ">", "%12", "7", "\\", "(", "*"] {
            assert!(is_symbol(symbol), "{symbol}");
        }
        for word in ["", "##s", "the", "A", "[]", "[a]b]", "%1", "%123", "12", "=="] {
            assert!(!is_symbol(word), "{word}");
        }
    }

    #[test]
    fn reactions_are_split_into_symbols() {
        let vocabulary = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nC\nCl\n[Na+]\n>>\n%10\n1\n";
        let tokenizer: tokenizers::Tokenizer = Pieces::new(vocabulary).unwrap().symbols().parse().unwrap();
        let ids = |text: &str| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        // Oxygen is a symbol that the vocabulary lacks; a space is none.
        assert_eq!(ids("CCl [Na+]>>O%101[MASK]"), [2, 5, 6, 7, 8, 1, 9, 10, 4, 3]);
        assert_eq!(ids(""), [2, 3]);
        assert!(Pieces::new("C\nO\n").is_err());
    }
}
