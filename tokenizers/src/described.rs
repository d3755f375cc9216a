//! A tokenizer as the files of a model describe it.

use tokenizers::{
    AddedToken, NormalizerWrapper,
    normalizers::{BertNormalizer, Lowercase, NFKD, Sequence, StripAccents},
};
use x_transformers::pretrained::Family;

use super::{
    checked::{Failure, Inner, Part},
    settings::{Settings, Token},
};

/// A tokenizer in the form of `tokenizer.json`, and what other files say beyond that.
#[derive(Default)]
pub struct Described {
    /// In the form of `tokenizer.json`.
    pub json: String,
    /// Tokens with the ids that the files give them, if they do.
    pub added: Vec<(Option<u64>, Token)>,
    /// Normalizer, if the settings of a class of `transformers` have the last word.
    pub normalizer: Option<Normalizer>,
    /// If `true`, texts are lower-cased first, even before the search for added tokens that are normalized.
    pub lowercase: bool,
    /// If `true`, the names of special tokens in texts are ordinary text.
    pub split_special: bool,
    /// Default number of tokens that a text is truncated to.
    pub max_length: Option<usize>,
    /// If `true`, truncation removes the beginning of a text.
    pub cut_left: bool,
}

/// Settings of a normalizer that take the place of those in `tokenizer.json`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Normalizer {
    /// BERT's normalizer.
    Bert { lowercase: bool, strip_accents: Option<bool>, chinese: bool },
    /// ALBERT's normalizer.
    Albert { lowercase: bool, keep_accents: bool },
}

impl Described {
    /// Creates a description with nothing beyond the form of `tokenizer.json`.
    pub fn new(json: String) -> Self {
        Self { json, ..Self::default() }
    }

    /// Creates a description with the tokens and the limits of the settings. `defaults` are the tokens that the
    /// tokenizer's class has where the settings do not name others.
    pub fn with(json: String, settings: &Settings, defaults: &[(&str, &str)]) -> x_transformers::Result<Self> {
        let mut added: Vec<(Option<u64>, Token)> =
            settings.added.iter().cloned().map(|(id, t)| (Some(id), t)).collect();
        let special = settings.special()?;
        for (_, token) in &mut added {
            token.special |= special.iter().any(|special| special.content == token.content);
        }
        let unnamed = |&&(name, _): &&(&str, &str)| matches!(settings.named(name), Ok(None));
        let defaults = defaults.iter().filter(unnamed).map(|(_, content)| Token::new(content, true));
        for token in special.into_iter().chain(defaults) {
            if !token.content.is_empty() && added.iter().all(|(_, known)| known.content != token.content) {
                added.push((None, token));
            }
        }
        let cut_left = match settings.text("truncation_side")? {
            None | Some("right") => false,
            Some("left") => true,
            Some(other) => {
                return Err(settings.refuse("truncation_side", format_args!("is `{other}`, expected left or right")));
            }
        };
        Ok(Self {
            json,
            added,
            normalizer: None,
            lowercase: false,
            split_special: settings.flag("split_special_tokens")?.unwrap_or(false),
            max_length: settings.max_length()?,
            cut_left,
        })
    }

    /// Returns the replacement of `tokenizer.json`'s normalizer, in the same form; `None` to keep it.
    pub(crate) fn instead_of(&self, old: Option<Part>) -> Result<Option<serde_json::Value>, Failure> {
        let (Some(normalizer), Some(old)) = (self.normalizer, old) else { return Ok(None) };
        let changed = normalizer.instead_of(&old.parse_text()?);
        Ok(changed.map(serde_json::to_value).transpose()?)
    }

    /// Adds the tokens that are not in the form of `tokenizer.json`, and returns them.
    ///
    /// Errors: a token whose id in the files is not its id in the vocabulary.
    pub(crate) fn extend(&self, to: &mut Inner) -> Result<Vec<AddedToken>, Failure> {
        let known = to.get_added_tokens_decoder();
        let tokens: Vec<AddedToken> = self.added.iter().map(|(_, token)| token.clone().into()).collect();
        let new: Vec<AddedToken> =
            tokens.into_iter().filter(|token| !known.values().any(|known| known == token)).collect();
        if !new.is_empty() {
            to.add_tokens(&new);
        }
        for (id, token) in &self.added {
            let Some(id) = id else { continue };
            let found = to.token_to_id(&token.content).map(u64::from);
            if found != Some(*id) {
                let found = found.map_or("none".to_string(), |found| found.to_string());
                let why = format!(
                    "the added token `{}` has the id {id} in the folder's files, but gets {found} after the vocabulary",
                    token.content
                );
                return Err(why.into());
            }
        }
        Ok(new)
    }

    /// A `tokenizer.json` with the settings beside it.
    pub fn of_json(json: String, settings: &Settings, family: Family) -> x_transformers::Result<Self> {
        let class = settings.class(family);
        let flag = |key: &str, default: bool| Ok::<bool, x_transformers::Error>(settings.flag(key)?.unwrap_or(default));
        let normalizer = if WORD_PIECES.contains(&class) {
            Some(Normalizer::Bert {
                lowercase: flag("do_lower_case", true)?,
                strip_accents: settings.flag("strip_accents")?,
                chinese: flag("tokenize_chinese_chars", true)?,
            })
        } else if class == "AlbertTokenizer" {
            Some(Normalizer::Albert {
                lowercase: flag("do_lower_case", true)?,
                keep_accents: flag("keep_accents", false)?,
            })
        } else {
            None
        };
        Ok(Self { normalizer, ..Self::with(json, settings, &[])? })
    }
}

impl From<Token> for AddedToken {
    fn from(token: Token) -> Self {
        let Token { content, single_word, lstrip, rstrip, normalized, special } = token;
        Self { content, single_word, lstrip, rstrip, normalized, special }
    }
}

impl Normalizer {
    /// Returns the replacement of a normalizer that the settings override and that differs from them.
    fn instead_of(self, old: &NormalizerWrapper) -> Option<NormalizerWrapper> {
        match (self, old) {
            (Self::Bert { lowercase, strip_accents, chinese }, NormalizerWrapper::BertNormalizer(old)) => {
                let new = BertNormalizer::new(old.clean_text, chinese, strip_accents, lowercase);
                let same = (old.handle_chinese_chars, old.strip_accents, old.lowercase);
                (same != (chinese, strip_accents, lowercase)).then_some(new.into())
            }
            (Self::Albert { lowercase, keep_accents }, NormalizerWrapper::Sequence(old)) => {
                let old: &[NormalizerWrapper] = old.as_ref();
                let has = |wanted: fn(&NormalizerWrapper) -> bool| old.iter().any(wanted);
                let lowers = has(|normalizer| matches!(normalizer, NormalizerWrapper::Lowercase(_)));
                let strips = has(|normalizer| matches!(normalizer, NormalizerWrapper::StripAccents(_)));
                if (lowers, strips) == (lowercase, !keep_accents) {
                    return None;
                }
                let rest = old.iter().filter(|normalizer| {
                    use NormalizerWrapper::{Lowercase, NFKD, StripAccents};
                    !matches!(normalizer, Lowercase(_) | NFKD(_) | StripAccents(_))
                });
                let mut new: Vec<NormalizerWrapper> = rest.cloned().collect();
                // After the quotes that it replaces.
                let at =
                    new.iter().take_while(|normalizer| matches!(normalizer, NormalizerWrapper::Replace(_))).count();
                let mut own: Vec<NormalizerWrapper> = Vec::new();
                if !keep_accents {
                    own.extend([NormalizerWrapper::from(NFKD), StripAccents.into()]);
                }
                own.extend(lowercase.then(|| Lowercase.into()));
                new.splice(at..at, own);
                Some(Sequence::new(new).into())
            }
            _ => None,
        }
    }
}

/// Classes of `transformers` that split texts as BERT does.
pub const WORD_PIECES: [&str; 9] = [
    "BertTokenizer",
    "ConvBertTokenizer",
    "DistilBertTokenizer",
    "ElectraTokenizer",
    "LayoutLMTokenizer",
    "LxmertTokenizer",
    "MobileBertTokenizer",
    "RetriBertTokenizer",
    "SqueezeBertTokenizer",
];
