//! Tokenizers in the metadata of GGUF files, as llama.cpp reads them.

use std::{collections::BTreeMap, path::Path};

use serde_json::Value;
use x_transformers::{
    Result,
    io::{Format, Metadata},
    pretrained::{Family, Pretrained},
};

use super::{
    Tokenizer, checked::Checked, decoder, described::Described, file_error, gguf::of_gguf, known, pretokenizer,
};

/// Names of pre-tokenizers, one of each kind, the most common first.
const PRE_TOKENIZERS: [&str; 15] = [
    "llama-bpe",
    "qwen2",
    "smollm",
    "gpt-2",
    "tekken",
    "gpt-4o",
    "dbrx",
    "qwen35",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
    "bloom",
    "viking",
    "seed-coder",
    "bailingmoe",
];

/// Texts that the pre-tokenizers split differently.
const PROBES: [&str; 24] = [
    "",
    "Hello, world!",
    " leading and  double   spaces ",
    "I'm sure they'll say it's DON'T, We'Ve",
    "1 12 123 1234 12345 3.14159 1,000,000",
    "line\nbreaks\n\n\n and\r\n tabs\t\tend\n",
    "camelCaseWords and ALLCAPS snake_case kebab-case",
    "don\u{2019}t \u{201c}quote\u{201d} \u{2014} dash\u{2026}",
    "naïve café Straße ÀÉÎ",
    "Привет, мир! Ёлка",
    "你好，世界。今天是2026年",
    "こんにちは世界 カタカナ",
    "한국어 문장입니다",
    "مرحبا بالعالم ١٢٣",
    "हिन्दी में वाक्य ३२",
    "emoji 🙂👩‍👩‍👧 and 🇩🇪",
    "x = f(a[0], b->c) && !d; // comment",
    "<html><body class=\"x\">&amp;</body></html>",
    "http://example.com/a/b?c=d&e=f#g",
    "$100.50 50% #tag @name a/b\\c",
    "...!!!???---===___***",
    "½ ² ③ Ⅳ",
    "word\u{a0}with\u{3000}other\u{2009}spaces",
    "end of text 9",
];

/// Added tokens that are looked for in texts to compare two tokenizers.
const ADDED: usize = 64;

impl Tokenizer {
    /// Returns the metadata that describe the tokenizer of a model, or the one in the file or folder `given`, in a GGUF
    /// file that is written from it ([`Pretrained::write_quantized`]): vocabulary, merges or scores, special tokens and
    /// chat template. Empty for a GGUF file, whose metadata stay.
    ///
    /// Before it is returned the description is read back, and compared with the tokenizer on texts of many scripts. For a
    /// SentencePiece vocabulary these do not begin with a space, to which llama.cpp adds another.
    ///
    /// Errors: a tokenizer that llama.cpp has no name for, or that would split those texts differently; more tokens than
    /// the model has.
    pub fn gguf_metadata(pretrained: &Pretrained, given: Option<&Path>) -> Result<BTreeMap<String, Metadata>> {
        if pretrained.file().format() == Format::Gguf && given.is_none() {
            return Ok(BTreeMap::new());
        }
        let described = Self::described(pretrained, given, "")?;
        let path = given.or(pretrained.folder()).unwrap_or(pretrained.file().path());
        let ends = pretrained.end_tokens();
        Self::of(pretrained, given)?.gguf_metadata_of(&described, path, pretrained.config().num_tokens, ends)
    }

    /// Returns the metadata like [`Tokenizer::gguf_metadata`], for a model of this crate with this many tokens, and the
    /// tokenizer in a file or a folder; `end` is the token that ends a text.
    ///
    /// Errors: those of [`Tokenizer::open`] and [`Tokenizer::gguf_metadata`].
    pub fn gguf_metadata_of_file(
        path: impl AsRef<Path>,
        num_tokens: usize,
        end: Option<i64>,
    ) -> Result<BTreeMap<String, Metadata>> {
        let path = path.as_ref();
        let family = Family::Llama;
        let described =
            if path.is_dir() { known::of_folder(path, family, "") } else { known::of_file(path, family, "") }?;
        let ends: Vec<i64> = end.into_iter().collect();
        Self::open(path, family)?.gguf_metadata_of(&described, path, num_tokens, &ends)
    }

    fn gguf_metadata_of(
        &self,
        described: &Described,
        path: &Path,
        num_tokens: usize,
        ends: &[i64],
    ) -> Result<BTreeMap<String, Metadata>> {
        let json: Value = serde_json::from_str(&described.json).map_err(|why| file_error(path, why))?;
        let broken = |why: &str| file_error(path, format_args!("the tokenizer {why}"));
        let mut metadata = vocabulary(self, &json["model"], num_tokens).map_err(|why| broken(&why))?;
        metadata.extend(special(self, ends));
        let bytes = metadata.get(MODEL).and_then(Metadata::as_str) == Some("gpt2");
        let candidates: Vec<(&str, Metadata)> = if bytes {
            // Texts need not show whether words that are tokens go before merges: that is known from the description.
            let whole_words = json["model"]["ignore_merges"].as_bool().unwrap_or(false);
            let alike = |name: &&str| {
                pretokenizer::of(name).is_some_and(|pre_tokenizer| pre_tokenizer.ignore_merges == whole_words)
            };
            let named = PRE_TOKENIZERS.into_iter().filter(alike);
            named.map(|name| ("tokenizer.ggml.pre", Metadata::Text(name.to_string()))).collect()
        } else {
            [true, false].map(|prefix| ("tokenizer.ggml.add_space_prefix", Metadata::Bool(prefix))).to_vec()
        };
        let probes = probes(self, bytes);
        let mut differing = None;
        for (key, value) in candidates {
            metadata.insert(key.to_string(), value);
            let found = differs(&metadata, &self.shared.inner, &probes)?;
            if found.is_none() {
                return Ok(metadata);
            }
            differing = differing.or(found);
        }
        let text = differing.unwrap_or_default();
        Err(broken(&format!("splits {text:?} differently from every pre-tokenizer that llama.cpp knows")))
    }

    /// Returns the metadata of a GGUF file whose tokens are bytes, with a vocabulary of this size, which may be less or
    /// more than 256.
    ///
    /// ```
    /// use x_transformers::io::Metadata;
    /// use x_transformers_tokenizers::Tokenizer;
    /// let metadata = Tokenizer::gguf_metadata_of_bytes(256);
    /// assert_eq!(metadata["tokenizer.ggml.model"], Metadata::Text("gpt2".to_string()));
    /// ```
    pub fn gguf_metadata_of_bytes(vocabulary: usize) -> BTreeMap<String, Metadata> {
        let letters = (0..=255u8).map(|byte| byte_letter(byte).to_string());
        let tokens = padded(letters.map(|letter| (letter, NORMAL)).take(vocabulary).collect(), vocabulary);
        let mut metadata = listed(tokens);
        metadata.insert(MODEL.to_string(), Metadata::Text("gpt2".to_string()));
        metadata.insert("tokenizer.ggml.pre".to_string(), Metadata::Text("gpt-2".to_string()));
        metadata.insert("tokenizer.ggml.merges".to_string(), Metadata::List(Vec::new()));
        metadata.insert("tokenizer.ggml.add_bos_token".to_string(), Metadata::Bool(false));
        metadata
    }
}

const MODEL: &str = "tokenizer.ggml.model";

// Kinds of tokens in GGUF.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// Returns the letter that stands for a byte in byte-level vocabularies.
fn byte_letter(byte: u8) -> char {
    ('!'..='\u{143}').find(|&letter| decoder::byte(letter) == Some(byte)).unwrap_or_default()
}

/// Fills a vocabulary up to the number of tokens that the model has.
fn padded(mut tokens: Vec<(String, i64)>, count: usize) -> Vec<(String, i64)> {
    for id in tokens.len()..count {
        tokens.push((format!("[PAD{id}]"), UNUSED));
    }
    tokens
}

/// The lists of tokens and of their kinds.
fn listed(tokens: Vec<(String, i64)>) -> BTreeMap<String, Metadata> {
    let (tokens, kinds) = tokens.into_iter().map(|(text, kind)| (Metadata::Text(text), Metadata::Int(kind))).unzip();
    BTreeMap::from([
        ("tokenizer.ggml.tokens".to_string(), Metadata::List(tokens)),
        ("tokenizer.ggml.token_type".to_string(), Metadata::List(kinds)),
    ])
}

/// Vocabulary with merges of a byte-level model, or with scores of a SentencePiece one.
fn vocabulary(
    tokenizer: &Tokenizer,
    model: &Value,
    count: usize,
) -> std::result::Result<BTreeMap<String, Metadata>, String> {
    let merges = model["merges"].as_array().ok_or("is not BPE, the only kind that GGUF files of this family have")?;
    let pair = |merge: &Value| -> Option<(String, String)> {
        if let Some(text) = merge.as_str() {
            let (first, second) = text.split_once(' ')?;
            return Some((first.to_string(), second.to_string()));
        }
        let pair = merge.as_array().filter(|pair| pair.len() == 2)?;
        Some((pair[0].as_str()?.to_string(), pair[1].as_str()?.to_string()))
    };
    let merges: Vec<(String, String)> =
        merges.iter().map(pair).collect::<Option<_>>().ok_or("has a merge that is not a pair of tokens")?;
    let pieces = model["byte_fallback"].as_bool() == Some(true);
    let raw = tokenizer.shared.inner.raw();
    let added = raw.get_added_tokens_decoder();
    let unknown = model["unk_token"].as_str().and_then(|token| raw.token_to_id(token));
    let mut tokens: Vec<Option<(String, i64)>> = vec![None; count];
    for (text, id) in raw.get_vocab(true) {
        let place = tokens.get_mut(id as usize);
        let place =
            place.ok_or_else(|| format!("has the token `{text}` with id {id}, but the model {count} tokens"))?;
        let kind = match added.get(&id) {
            _ if unknown == Some(id) && pieces => UNKNOWN,
            Some(added) if added.special => CONTROL,
            Some(_) => USER_DEFINED,
            None if pieces && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>') => BYTE,
            None => NORMAL,
        };
        *place = Some((text, kind));
    }
    let fill = |(id, token): (usize, Option<(String, i64)>)| token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED));
    let tokens: Vec<(String, i64)> = tokens.into_iter().enumerate().map(fill).collect();
    if !pieces {
        let mut metadata = listed(tokens);
        let merges = merges.iter().map(|(first, second)| Metadata::Text(format!("{first} {second}"))).collect();
        metadata.insert("tokenizer.ggml.merges".to_string(), Metadata::List(merges));
        metadata.insert(MODEL.to_string(), Metadata::Text("gpt2".to_string()));
        return Ok(metadata);
    }
    // llama.cpp joins the pair with the best score: the earlier a merge, the better.
    let mut ranks = std::collections::HashMap::new();
    for (rank, (first, second)) in merges.iter().enumerate() {
        ranks.entry(format!("{first}{second}")).or_insert(rank);
    }
    let score = |(id, (text, kind)): (usize, &(String, i64))| {
        let rank = ranks.get(text).copied().unwrap_or(merges.len() + id);
        Metadata::Float(if *kind == NORMAL { -(rank as f64) } else { 0.0 })
    };
    let scores = tokens.iter().enumerate().map(score).collect();
    let mut metadata = listed(tokens);
    metadata.insert("tokenizer.ggml.scores".to_string(), Metadata::List(scores));
    metadata.insert(MODEL.to_string(), Metadata::Text("llama".to_string()));
    metadata.insert("tokenizer.ggml.pre".to_string(), Metadata::Text("default".to_string()));
    Ok(metadata)
}

/// Special tokens, which of them surround a text, and the chat template.
fn special(tokenizer: &Tokenizer, ends: &[i64]) -> BTreeMap<String, Metadata> {
    let mut metadata = BTreeMap::new();
    let mut put = |key: &str, value: Metadata| drop(metadata.insert(format!("tokenizer.{key}"), value));
    let named = |name: &str| {
        let (_, spelling) = tokenizer.templates.special.iter().find(|(known, _)| *known == name)?;
        tokenizer.token(spelling)
    };
    let end = named("eos_token").or(ends.first().copied());
    for (key, id) in [
        ("ggml.bos_token_id", named("bos_token")),
        ("ggml.eos_token_id", end),
        ("ggml.eot_token_id", ends.iter().copied().find(|&id| Some(id) != end)),
        ("ggml.unknown_token_id", named("unk_token")),
        ("ggml.padding_token_id", named("pad_token")),
    ] {
        if let Some(id) = id {
            put(key, Metadata::Int(id));
        }
    }
    let around = tokenizer.encode("").unwrap_or_default();
    let starts = around.first().is_some_and(|&id| Some(id) == named("bos_token"));
    put("ggml.add_bos_token", Metadata::Bool(starts));
    let ends_with = around.len() > usize::from(starts) && around.last().is_some_and(|&id| Some(id) == end);
    put("ggml.add_eos_token", Metadata::Bool(ends_with));
    let template = tokenizer.templates.named.iter().find(|template| template.name == "default");
    if let Some(template) = template {
        put("chat_template", Metadata::Text(template.source.clone()));
    }
    metadata
}

/// Texts to compare two tokenizers on. llama.cpp and `transformers` do not agree on spaces at the beginning of texts and
/// beside added tokens if a vocabulary is SentencePiece's; there these are left out.
fn probes(tokenizer: &Tokenizer, bytes: bool) -> Vec<String> {
    let compared = PROBES.iter().filter(|text| bytes || !text.starts_with(' '));
    let mut probes: Vec<String> = compared.map(|text| text.to_string()).collect();
    if bytes {
        let added = tokenizer.shared.inner.raw().get_added_tokens_decoder();
        let mut added: Vec<_> = added.into_iter().collect();
        added.sort_by_key(|(id, _)| *id);
        probes.extend(added.iter().take(ADDED).map(|(_, token)| format!("a {} b{}c", token.content, token.content)));
    }
    probes
}

/// Returns a text that the tokenizer which these metadata describe splits otherwise.
fn differs<'p>(metadata: &BTreeMap<String, Metadata>, own: &Checked, probes: &'p [String]) -> Result<Option<&'p str>> {
    let path = Path::new("GGUF");
    let json = of_gguf(metadata).map_err(|why| file_error(path, why))?;
    let other = Checked::parse(path, &Described::new(json))?;
    for probe in probes {
        if other.encode(probe, true)? != own.encode(probe, true)? {
            return Ok(Some(probe));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The letters of bytes are those of GPT-2's vocabulary.
    #[test]
    fn bytes_have_the_letters_of_gpt_2() {
        let letters: String = [0, 9, 10, 32, 33, 126, 127, 160, 161, 173, 174, 255].map(byte_letter).iter().collect();
        assert_eq!(letters, "ĀĉĊĠ!~ġł¡Ń®ÿ");
        let json = of_gguf(&Tokenizer::gguf_metadata_of_bytes(300)).unwrap();
        let tokenizer = Tokenizer::from_json(&json).unwrap();
        for probe in PROBES {
            let bytes: Vec<i64> = probe.bytes().map(i64::from).collect();
            assert_eq!(tokenizer.encode(probe).unwrap(), bytes, "{probe:?}");
            assert_eq!(tokenizer.decode(&bytes).unwrap(), probe);
        }
    }
}
