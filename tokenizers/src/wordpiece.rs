//! Vocabularies of one piece a line, `vocab.txt`: BERT's word pieces, and the symbols of SMILES.

use std::path::Path;

use serde_json::{Map, Value, json};
use x_transformers::{Result, pretrained::Family};

use super::{
    described::{Described, WORD_PIECES},
    file_error,
    settings::Settings,
};

/// The named tokens of BERT.
const SPECIAL: [(&str, &str); 5] = [
    ("unk_token", "[UNK]"),
    ("sep_token", "[SEP]"),
    ("pad_token", "[PAD]"),
    ("cls_token", "[CLS]"),
    ("mask_token", "[MASK]"),
];

/// Describes the tokenizer of a `vocab.txt`, with the settings beside it.
///
/// Errors: a vocabulary without the tokens that texts need, or a class of tokenizer that splits texts otherwise.
pub fn of_vocabulary(text: &str, path: &Path, settings: &Settings, family: Family) -> Result<Described> {
    let pieces = Pieces::new(text, settings).map_err(|why| file_error(path, why))?;
    if text.lines().all(is_symbol) {
        // No tokenizer of `transformers`: its vocabulary says all.
        return Ok(Described { added: Vec::new(), ..Described::with(pieces.symbols(), settings, &[])? });
    }
    let class = settings.class(family);
    let albert = class == "AlbertTokenizer" && family == Family::Albert;
    if !albert && !WORD_PIECES.contains(&class) {
        let why = format_args!(
            "is `{class}`, which does not split text like BERT; save a `tokenizer.json` with transformers"
        );
        return Err(settings.refuse("tokenizer_class", why));
    }
    if let Some(prefix) = settings.text("wordpieces_prefix")?.filter(|&prefix| prefix != "##") {
        return Err(settings.refuse("wordpieces_prefix", format_args!("is `{prefix}`, expected ##")));
    }
    // Without settings, a vocabulary with large letters tells them from small ones.
    let sentences = path.parent().is_some_and(|folder| folder.join("modules.json").is_file());
    let default = settings.exist || sentences || !pieces.has_capitals();
    let lowercase = settings.flag("do_lower_case")?.unwrap_or(default);
    let json = pieces.words(lowercase, settings)?;
    Described::with(json, settings, &SPECIAL)
}

/// A symbol of SMILES, as the tokenizer of rxnmapper splits them (Schwaller et al., <https://doi.org/10.1126/sciadv.abe4166>).
const SYMBOL: &str =
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]";

/// If `true`, a piece is one symbol of SMILES; names in brackets such as `[CLS]` look like atoms.
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
    unknown: String,
    /// The tokens that the class names, in the form of `tokenizer.json`.
    added: Vec<Value>,
    /// A token before a text and one after it.
    around: Value,
}

impl Pieces {
    fn new(text: &str, settings: &Settings) -> std::result::Result<Self, String> {
        let vocabulary: Map<String, Value> =
            text.lines().enumerate().map(|(id, piece)| (piece.to_string(), json!(id))).collect();
        let name = |(name, default): (&str, &str)| match settings.named(name) {
            Ok(token) => Ok(token.map_or_else(|| default.to_string(), |token| token.content)),
            Err(why) => Err(why.to_string()),
        };
        let [unknown, end, _, start, _] = SPECIAL.map(name);
        let (unknown, start, end) = (unknown?, start?, end?);
        let id = |token: &str| vocabulary.get(token).and_then(Value::as_u64);
        let (Some(_), Some(first), Some(last)) = (id(&unknown), id(&start), id(&end)) else {
            return Err(format!("lacks one of the tokens {unknown}, {start} and {end}"));
        };
        let added = SPECIAL.iter().filter_map(|(_, token)| super::added_token(token, id(token)?)).collect();
        let around = json!({"type": "BertProcessing", "sep": [end, last], "cls": [start, first]});
        Ok(Self { vocabulary, unknown, added, around })
    }

    /// If `true`, a piece other than the names in brackets has a large letter.
    fn has_capitals(&self) -> bool {
        let mut pieces = self.vocabulary.keys().filter(|piece| !piece.starts_with('['));
        pieces.any(|piece| piece.chars().any(char::is_uppercase))
    }

    /// BERT's tokenizer.
    fn words(&self, lowercase: bool, settings: &Settings) -> Result<String> {
        Ok(json!({
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {
                "type": "BertNormalizer", "clean_text": true,
                "handle_chinese_chars": settings.flag("tokenize_chinese_chars")?.unwrap_or(true),
                "strip_accents": settings.flag("strip_accents")?, "lowercase": lowercase,
            },
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "post_processor": self.around,
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
            "model": {
                "type": "WordPiece", "unk_token": self.unknown, "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": self.vocabulary,
            },
        })
        .to_string())
    }

    /// A tokenizer of molecules and reactions: each symbol is a token, what is none is left out.
    fn symbols(&self) -> String {
        json!({
            "version": "1.0",
            "added_tokens": self.added,
            "normalizer": null,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": SYMBOL}, "behavior": "Removed", "invert": true},
            "post_processor": self.around,
            "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "unk_token": self.unknown, "vocab": self.vocabulary},
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::{Pieces, Settings, is_symbol};

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
        let nothing = Settings::read(tempfile::tempdir().unwrap().path(), "").unwrap();
        let vocabulary = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nC\nCl\n[Na+]\n>>\n%10\n1\n";
        let tokenizer: tokenizers::Tokenizer = Pieces::new(vocabulary, &nothing).unwrap().symbols().parse().unwrap();
        let ids = |text: &str| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        // Oxygen is a symbol that the vocabulary lacks; a space is none.
        assert_eq!(ids("CCl [Na+]>>O%101[MASK]"), [2, 5, 6, 7, 8, 1, 9, 10, 4, 3]);
        assert_eq!(ids(""), [2, 3]);
        assert!(Pieces::new("C\nO\n", &nothing).is_err());
    }
}
