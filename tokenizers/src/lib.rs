//! Tokenizers of pretrained models: from text to the tokens that a model was taught, and back.

use std::{fmt::Display, path::Path};

use x_transformers::{
    Error, Result,
    io::{Family, Pretrained},
};

use self::described::Described;

mod byte_level;
mod checked;
mod described;
mod gguf;
mod known;
mod sentence;
mod sentencepiece;
mod settings;
mod stream;
mod wordpiece;

pub use sentence::{Cut, Embedded, Prompt, SentencePipeline};
pub use stream::TextStream;

/// The tokenizer of a pretrained model.
pub struct Tokenizer {
    inner: checked::Checked,
}

impl Tokenizer {
    /// That of the model's files: `tokenizer.json`, a `vocab.txt`, a model of SentencePiece, or the vocabulary in a GGUF
    /// file; or one in another file or folder.
    pub fn of(pretrained: &Pretrained, given: Option<&Path>) -> Result<Self> {
        Self::with_settings(pretrained, given, "")
    }

    /// The same with settings, a JSON object or nothing, that take precedence over those of `tokenizer_config.json`.
    fn with_settings(pretrained: &Pretrained, given: Option<&Path>, settings: &str) -> Result<Self> {
        let file = given.unwrap_or(pretrained.file().path());
        let described = match given.or(pretrained.folder()) {
            Some(folder) if given.is_none() || folder.is_dir() => {
                known::of_folder(folder, pretrained.family(), settings)
            }
            Some(file) => known::of_file(file, pretrained.family(), settings),
            None => gguf::of_gguf(pretrained.file()).map(Described::new).map_err(|why| file_error(file, why)),
        }?;
        Ok(Self { inner: checked::Checked::parse(file, &described)? })
    }

    /// The tokenizer in a file or a folder, for models of a family.
    ///
    /// Errors: a file that cannot be read, is damaged, or asks for what is not supported.
    pub fn open(path: impl AsRef<Path>, family: Family) -> Result<Self> {
        let path = path.as_ref();
        let described =
            if path.is_dir() { known::of_folder(path, family, "") } else { known::of_file(path, family, "") }?;
        Ok(Self { inner: checked::Checked::parse(path, &described)? })
    }

    /// The tokenizer that the text of a `tokenizer.json` describes; errors name `path`.
    ///
    /// Errors: a description that is damaged, or asks for what is not supported.
    pub fn parse(path: impl AsRef<Path>, json: &str) -> Result<Self> {
        Ok(Self { inner: checked::Checked::parse(path.as_ref(), &Described::new(json.to_string()))? })
    }

    /// Tokens of a text, with those that the model expects around it.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        Ok(self.inner.encode(text, true)?.into_iter().map(i64::from).collect())
    }

    /// The text of tokens, special ones left out.
    pub fn decode(&self, tokens: &[i64]) -> Result<String> {
        let ids: Vec<u32> = tokens.iter().filter_map(|&token| u32::try_from(token).ok()).collect();
        self.inner.decode(&ids)
    }

    /// Text of tokens that come one at a time behind a prompt.
    pub fn stream(&self, prompt: &[i64]) -> TextStream<'_> {
        TextStream::new(self, prompt)
    }

    /// A question in the form of a chat, up to where the answer begins.
    pub fn chat(&self, question: &str) -> Result<String> {
        if self.inner.id("<|im_start|>").is_none() {
            return Err(refused("the model has no tokens of a chat (`<|im_start|>`); leave out `--chat`"));
        }
        // What a person types cannot end their turn.
        let question = question.replace("<|im_", "<|im\u{200b}_");
        Ok(format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"))
    }
}

/// An error about a file.
fn file_error(path: &Path, why: impl Display) -> Error {
    Error::File { path: path.to_path_buf(), why: why.to_string() }
}

/// A text or tokens that the tokenizer does not take.
fn refused(why: impl Display) -> Error {
    Error::Argument { op: "tokenizer", message: why.to_string() }
}

/// In the form of `tokenizer.json`: a token that is looked for in the text as it is, and left out of decoded text.
fn added_token(token: &str, id: u64) -> Option<serde_json::Value> {
    Some(serde_json::json!({
        "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true,
    }))
}
