//! The tokenizer of a model, or what stands in for it in a build without tokenizers.

#[cfg(feature = "tokenizers")]
pub use x_transformers_tokenizers::{Prompt, SentencePipeline, TextStream, Tokenizer};

#[cfg(feature = "tokenizers")]
mod with {
    use std::{
        path::Path,
        time::{Duration, UNIX_EPOCH},
    };

    use x_transformers::{
        models::RowEnd,
        pretrained::{Family, SentenceOptions},
    };
    use x_transformers_tokenizers::{ChatOptions, ChatTurns, Message, Tokenizer, learn_byte_level_bpe};

    use crate::{failure::Result, language::Turn, stored::Origin};

    fn messages(turns: &[Turn]) -> Vec<Message> {
        turns.iter().map(|turn| Message::new(&turn.role, &turn.content)).collect()
    }

    /// Tokens of a chat in the form of the model's chats, up to where the answer begins.
    pub fn chat(tokenizer: &Tokenizer, turns: &[Turn]) -> Result<Vec<i64>> {
        Ok(tokenizer.chat(&messages(turns), &ChatOptions::default())?)
    }

    /// Tokens of a whole chat, and which of them are the assistant's.
    pub fn chat_turns(tokenizer: &Tokenizer, turns: &[Turn]) -> Result<(Vec<i64>, Vec<bool>)> {
        // The date of Llama 3's template without a clock: a run has the same tokens when it is resumed on another day.
        let now = Some(UNIX_EPOCH + Duration::from_secs(1_721_995_200));
        let ChatTurns { tokens, answers } =
            tokenizer.chat_turns(&messages(turns), &ChatOptions { now, ..ChatOptions::default() })?;
        Ok((tokens, answers))
    }

    /// Tokens of a chat up to where an answer begins, or of a whole one; the same on every day.
    pub fn chat_up_to(tokenizer: &Tokenizer, turns: &[Turn], add_generation_prompt: bool) -> Result<Vec<i64>> {
        let now = Some(UNIX_EPOCH + Duration::from_secs(1_721_995_200));
        let options = ChatOptions { now, add_generation_prompt, ..ChatOptions::default() };
        Ok(tokenizer.chat(&messages(turns), &options)?)
    }

    /// The tokenizer in a folder or a file, of a sentence embedding model.
    pub fn for_sentences(path: &Path, family: Option<Family>, options: &SentenceOptions) -> Result<Tokenizer> {
        Ok(Tokenizer::for_sentences(path, family.unwrap_or(Family::Llama), options)?)
    }

    /// The tokenizer in a folder or a file, of a model of `xt train`.
    pub fn open(path: &Path) -> Result<Tokenizer> {
        // A folder that names no class of tokenizers is read like those of this family.
        let family = Origin::read(path)?.map_or(Family::Llama, |origin| origin.family);
        Ok(Tokenizer::open(path, family)?)
    }

    /// Learns a byte-level BPE vocabulary, and gives its `tokenizer.json`.
    pub fn learn(
        documents: impl Iterator<Item = Result<String>> + Send,
        num_tokens: usize,
        special: &str,
    ) -> Result<String> {
        learn_byte_level_bpe(documents, num_tokens, &[special])
    }

    /// The end of a row at a stop string.
    pub fn stop_end(tokenizer: &Tokenizer, stops: &[String], prompt: &[i64]) -> Result<Box<dyn RowEnd>> {
        Ok(Box::new(tokenizer.stop_strings(stops, prompt)?))
    }
}
#[cfg(feature = "tokenizers")]
pub use with::{chat, chat_turns, chat_up_to, for_sentences, learn, open, stop_end};

#[cfg(not(feature = "tokenizers"))]
mod without {
    use std::{collections::BTreeMap, convert::Infallible, path::Path};

    use x_transformers::{
        DType, Device, Tensor,
        io::{Format, Metadata},
        models::{RowEnd, SentenceEncoder},
        pretrained::{Family, Pretrained, SentenceOptions, Similarity},
    };

    use crate::{
        failure::{Failure, Result},
        language::Turn,
    };

    /// A tokenizer that cannot be had.
    pub struct Tokenizer(Infallible);

    /// Text of a tokenizer that cannot be had.
    pub struct TextStream<'t>(&'t Tokenizer);

    impl TextStream<'_> {
        pub fn push(&mut self, _: i64) -> Result<String> {
            match self.0.0 {}
        }

        pub fn finish(self) -> Result<String> {
            match self.0.0 {}
        }
    }

    /// A text in front of each text, which is none without a tokenizer.
    pub enum Prompt<'p> {
        Default,
        Named(#[expect(dead_code, reason = "there is nothing to put it in front of")] &'p str),
        Text(#[expect(dead_code, reason = "there is nothing to put it in front of")] &'p str),
    }

    /// A pipeline of a tokenizer that cannot be had.
    pub struct SentencePipeline(Infallible);

    /// Vectors of a tokenizer that cannot be had.
    pub struct Embedded {
        pub vectors: Tensor,
        pub cut: Vec<Cut>,
    }

    /// A text that was cut.
    pub struct Cut {
        pub text: usize,
        pub tokens: usize,
        pub kept: usize,
    }

    fn missing() -> Failure {
        Failure::new("this `xt` was built without tokenizers; rebuild it with `--features tokenizers`")
    }

    impl SentencePipeline {
        pub fn of(_: &Pretrained, _: Option<&Path>, _: DType, _: &Device) -> Result<Self> {
            Err(missing())
        }

        pub fn new(tokenizer: Tokenizer, _: SentenceEncoder, _: SentenceOptions, _: &Device) -> Self {
            match tokenizer.0 {}
        }

        pub fn embed_with(&self, _: &[&str], _: Prompt) -> Result<Embedded> {
            match self.0 {}
        }

        pub fn similarity(&self) -> Similarity {
            match self.0 {}
        }
    }

    impl Tokenizer {
        pub fn of(_: &Pretrained, _: Option<&Path>) -> Result<Self> {
            Err(missing())
        }

        pub fn folder_files(_: &Pretrained) -> Result<Vec<(String, Vec<u8>)>> {
            Err(missing())
        }

        /// A GGUF file needs no description of its tokenizer: it has one.
        pub fn gguf_metadata(pretrained: &Pretrained, _: Option<&Path>) -> Result<BTreeMap<String, Metadata>> {
            if pretrained.file().format() == Format::Gguf { Ok(BTreeMap::new()) } else { Err(missing()) }
        }

        pub fn gguf_metadata_of_file(_: &Path, _: usize, _: Option<i64>) -> Result<BTreeMap<String, Metadata>> {
            Err(missing())
        }

        pub fn gguf_metadata_of_bytes(_: usize) -> BTreeMap<String, Metadata> {
            BTreeMap::new()
        }

        pub fn encode(&self, _: &str) -> Result<Vec<i64>> {
            match self.0 {}
        }

        pub fn encode_plain(&self, _: &str) -> Result<Vec<i64>> {
            match self.0 {}
        }

        pub fn special_tokens(&self) -> Vec<i64> {
            match self.0 {}
        }

        pub fn num_tokens(&self) -> usize {
            match self.0 {}
        }

        pub fn decode(&self, _: &[i64]) -> Result<String> {
            match self.0 {}
        }

        pub fn stream(&self, _: &[i64]) -> TextStream<'_> {
            match self.0 {}
        }

        pub fn token(&self, _: &str) -> Option<i64> {
            match self.0 {}
        }

        pub fn end_token(&self) -> Option<i64> {
            match self.0 {}
        }

        pub fn has_chat_template(&self) -> bool {
            match self.0 {}
        }
    }

    pub fn open(_: &Path) -> Result<Tokenizer> {
        Err(missing())
    }

    pub fn learn(_: impl Iterator<Item = Result<String>> + Send, _: usize, _: &str) -> Result<String> {
        Err(missing())
    }

    pub fn chat(tokenizer: &Tokenizer, _: &[Turn]) -> Result<Vec<i64>> {
        match tokenizer.0 {}
    }

    pub fn chat_turns(tokenizer: &Tokenizer, _: &[Turn]) -> Result<(Vec<i64>, Vec<bool>)> {
        match tokenizer.0 {}
    }

    pub fn chat_up_to(tokenizer: &Tokenizer, _: &[Turn], _: bool) -> Result<Vec<i64>> {
        match tokenizer.0 {}
    }

    pub fn for_sentences(_: &Path, _: Option<Family>, _: &SentenceOptions) -> Result<Tokenizer> {
        Err(missing())
    }

    pub fn stop_end(tokenizer: &Tokenizer, _: &[String], _: &[i64]) -> Result<Box<dyn RowEnd>> {
        match tokenizer.0 {}
    }
}
#[cfg(not(feature = "tokenizers"))]
pub use without::{
    Prompt, SentencePipeline, TextStream, Tokenizer, chat, chat_turns, chat_up_to, for_sentences, learn, open, stop_end,
};
