//! From texts to vectors: a tokenizer, an encoder, and the settings of a sentence-transformers folder.

use std::{collections::BTreeMap, path::Path};

use x_transformers::{
    DType, Device, Result, Tensor,
    models::SentenceEncoder,
    pretrained::{Pretrained, SentenceOptions, Similarity},
};

use super::{Tokenizer, file_error, refused};

/// Number of texts per batch.
const BATCH: usize = 32;

/// Sentence embedding model with its tokenizer.
///
/// ```no_run
/// use x_transformers::{DType, Device};
/// use x_transformers_tokenizers::SentencePipeline;
/// # fn main() -> x_transformers::Result<()> {
/// let pipeline = SentencePipeline::open("all-MiniLM-L6-v2", DType::F32, &Device::Cpu)?;
/// let vectors = pipeline.embed(&["A man is eating food.", "The girl is carrying a baby."])?;
/// assert_eq!(vectors.shape()[..], [2, 384]);
/// # Ok(())
/// # }
/// ```
pub struct SentencePipeline {
    tokenizer: Tokenizer,
    encoder: SentenceEncoder,
    options: SentenceOptions,
    device: Device,
    /// Number of tokens that a text is truncated to.
    most: usize,
    /// Maximum number of tokens of the model.
    window: usize,
}

/// Prompt before each text.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[non_exhaustive]
pub enum Prompt<'p> {
    /// The folder's default prompt, if any.
    #[default]
    Default,
    /// No prompt.
    None,
    /// A prompt of the folder, by name.
    Named(&'p str),
    /// This prompt.
    Text(&'p str),
}

/// Embeddings of texts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Embedded {
    /// Vectors, `[texts, dim]`.
    pub vectors: Tensor,
    /// Texts that were truncated, in order.
    pub cut: Vec<Cut>,
}

/// Text that was truncated to the number of tokens that the model was trained with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    /// Index of the text.
    pub text: usize,
    /// Number of its tokens, including the prompt and special tokens.
    pub tokens: usize,
    /// Number of tokens that were kept.
    pub kept: usize,
}

/// Tokens of a text.
struct Row {
    ids: Vec<i64>,
    text: usize,
}

impl SentencePipeline {
    /// Opens a folder with an encoder: a sentence-transformers model of any family, or a BERT or ALBERT, with mean
    /// pooling.
    ///
    /// Errors: those of [`Pretrained::open`], [`Tokenizer::of`] and [`Pretrained::sentence_encoder`].
    pub fn open(path: impl AsRef<Path>, dtype: DType, device: &Device) -> Result<Self> {
        Self::of(&Pretrained::open(path)?, None, dtype, device)
    }

    /// Creates the pipeline of an opened model; `tokenizer` is another path of its tokenizer, see [`Tokenizer::of`].
    ///
    /// Errors: those of [`Tokenizer::of`] and [`Pretrained::sentence_encoder`].
    pub fn of(pretrained: &Pretrained, tokenizer: Option<&Path>, dtype: DType, device: &Device) -> Result<Self> {
        let options = pretrained.sentence_options()?;
        if let (Some(name), None) = (&options.tokenizer_name, tokenizer) {
            let why = format!("uses the tokenizer of `{name}`; name its folder with `--tokenizer`");
            return Err(file_error(pretrained.file().path(), why));
        }
        let tokenizer = Tokenizer::with_settings(pretrained, tokenizer, &options.tokenizer, options.do_lower_case)?;
        let encoder = pretrained.sentence_encoder(dtype, device)?;
        Ok(Self::new(tokenizer, encoder, options, device))
    }

    /// Creates the pipeline of an encoder on a device, such as one that was trained
    /// ([`Embedder`](x_transformers::train::Embedder)), from its parts; the tokenizer is that of
    /// [`Tokenizer::for_sentences`].
    pub fn new(tokenizer: Tokenizer, encoder: SentenceEncoder, options: SentenceOptions, device: &Device) -> Self {
        let window = match encoder.model.plan().max_seq_len {
            0 => usize::MAX,
            window => window,
        };
        // Where the options have the tokenizer's own bound, it takes precedence.
        let most = match (options.max_seq_length, tokenizer.shared.inner.max_length()) {
            (Some(most), _) if !options.tokenizer.contains("\"model_max_length\"") => most,
            (_, own) if options.tokenizer.contains("\"model_max_length\"") => own.unwrap_or(usize::MAX),
            (_, own) => own.unwrap_or(usize::MAX).min(window),
        };
        Self { tokenizer, encoder, options, device: device.clone(), most, window }
    }

    /// Returns the tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Returns the model with its modules.
    pub fn encoder(&self) -> &SentenceEncoder {
        &self.encoder
    }

    /// Returns the prompts of the folder by name.
    pub fn prompts(&self) -> &BTreeMap<String, String> {
        &self.options.prompts
    }

    /// Returns the similarity function that the vectors are meant for.
    pub fn similarity(&self) -> Similarity {
        self.options.similarity
    }

    /// Embeds texts, `[texts, dim]`, independently of each other, with the folder's default prompt before each. Texts
    /// that are too long are truncated, as in sentence-transformers; [`SentencePipeline::embed_with`] returns which.
    ///
    /// Errors: no texts, or one without a token.
    pub fn embed(&self, texts: &[&str]) -> Result<Tensor> {
        Ok(self.embed_with(texts, Prompt::Default)?.vectors)
    }

    /// Embeds texts with a prompt before each; also returns which texts were truncated.
    ///
    /// Errors: those of [`SentencePipeline::embed`], or a prompt that the folder does not have.
    ///
    /// ```no_run
    /// use x_transformers::{DType, Device};
    /// use x_transformers_tokenizers::{Prompt, SentencePipeline};
    /// # fn main() -> x_transformers::Result<()> {
    /// let pipeline = SentencePipeline::open("multilingual-e5-small", DType::F32, &Device::Cpu)?;
    /// let embedded = pipeline.embed_with(&["How is tea made?"], Prompt::Named("query"))?;
    /// for cut in &embedded.cut {
    ///     println!("text {}: {} of {} tokens", cut.text, cut.kept, cut.tokens);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn embed_with(&self, texts: &[&str], prompt: Prompt) -> Result<Embedded> {
        if texts.is_empty() {
            return Err(refused("expected at least one text, got none"));
        }
        let prompt = self.prompt(prompt)?;
        let prompt_len = self.length_of_prompt(prompt)?;
        let mut cut = Vec::new();
        let mut rows = Vec::with_capacity(texts.len());
        for (text, content) in texts.iter().enumerate() {
            let encoded = self.tokenizer.shared.inner.encode_within(&[prompt, content].concat(), self.most)?;
            let kept = encoded.ids.len();
            if kept == 0 || kept > self.window {
                let start: String = content.chars().take(40).collect();
                let why = format!("the text `{start}` has {kept} tokens, expected 1 to {}", self.window);
                return Err(refused(why));
            }
            if kept < encoded.whole {
                cut.push(Cut { text, tokens: encoded.whole, kept });
            }
            rows.push(Row { ids: encoded.ids.into_iter().map(i64::from).collect(), text });
        }
        // Texts of about the same length together, so that little is padding.
        rows.sort_by_key(|row| row.ids.len());
        let parts = rows.chunks(BATCH).map(|rows| self.vectors(rows, prompt_len)).collect::<Result<Vec<_>>>()?;
        let vectors = Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0)?;
        let mut places = vec![0; rows.len()];
        rows.iter().enumerate().for_each(|(place, row)| places[row.text] = place);
        if places.is_sorted() {
            return Ok(Embedded { vectors, cut });
        }
        let in_order = places.iter().map(|&place| vectors.narrow(0, place, 1)).collect::<Result<Vec<_>>>()?;
        Ok(Embedded { vectors: Tensor::cat(&in_order.iter().collect::<Vec<_>>(), 0)?, cut })
    }

    /// Returns the text of a prompt.
    fn prompt<'p>(&'p self, prompt: Prompt<'p>) -> Result<&'p str> {
        let name = match prompt {
            Prompt::None => return Ok(""),
            Prompt::Text(text) => return Ok(text),
            Prompt::Named(name) => name,
            Prompt::Default => match &self.options.default_prompt {
                Some(name) => name,
                None => return Ok(""),
            },
        };
        self.options.prompts.get(name).map(String::as_str).ok_or_else(|| {
            let known = self.options.prompts.keys().map(|name| format!("`{name}`")).collect::<Vec<_>>();
            let known = if known.is_empty() { "none".to_string() } else { known.join(", ") };
            refused(format!("the model has no prompt `{name}`, expected one of: {known}"))
        })
    }

    /// Returns the number of tokens that a prompt adds to the beginning of texts: its own, without the end token.
    fn length_of_prompt(&self, prompt: &str) -> Result<usize> {
        if prompt.is_empty() {
            return Ok(0);
        }
        let ids = self.tokenizer.shared.inner.encode_within(prompt, self.most)?.ids;
        let ended = ids.last().is_some_and(|&id| self.tokenizer.shared.inner.is_special(id));
        Ok(ids.len() - usize::from(ended))
    }

    /// Embeds a batch of texts, padded to the longest.
    fn vectors(&self, rows: &[Row], prompt_len: usize) -> Result<Tensor> {
        let width = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let shape = [rows.len(), width];
        let padded = |row: &Row| (0..width).map(|at| row.ids.get(at).copied()).collect::<Vec<_>>();
        let tokens: Vec<Option<i64>> = rows.iter().flat_map(padded).collect();
        let mask: Vec<bool> = tokens.iter().map(Option::is_some).collect();
        let tokens = tokens.into_iter().map(|token| token.unwrap_or(0)).collect();
        let tokens = Tensor::from_vec::<i64>(tokens, shape, &self.device)?;
        let mask = Tensor::from_vec(mask, shape, &self.device)?;
        self.encoder.embed_after(&tokens, Some(&mask), prompt_len)
    }
}
