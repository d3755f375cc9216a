//! Learning of a byte-level BPE vocabulary.

use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, TokenizerBuilder,
    TokenizerImpl,
    models::bpe::{BPE, BpeTrainer},
    pre_tokenizers::byte_level::ByteLevel,
};
use x_transformers::Error;

use super::refused;

/// Number of tokens for single bytes, which a vocabulary always has.
const BYTES: usize = 256;

/// Learns a byte-level BPE vocabulary of `num_tokens` tokens from texts, as GPT-2's was, and returns its `tokenizer.json`.
///
/// The first ids are the special tokens, which texts do not contain, then come the 256 bytes, then merges of pairs, the most
/// frequent first. Texts with few different pairs give fewer tokens. The vocabulary is that of `BpeTrainer` in the Python
/// package `tokenizers` with the pre-tokenizer `ByteLevel(add_prefix_space=False)` and its alphabet.
///
/// ```
/// use x_transformers_tokenizers::{Tokenizer, learn_byte_level_bpe};
/// # fn main() -> x_transformers::Result<()> {
/// let texts = ["the cat sat on the mat", "the hat is on the cat"].map(|text| x_transformers::Result::Ok(text.to_string()));
/// let tokenizer = Tokenizer::from_json(&learn_byte_level_bpe(texts, 270, &["<|endoftext|>"])?)?;
/// let tokens = tokenizer.encode("the cat")?;
/// assert!(tokens.len() < 7);
/// assert_eq!(tokenizer.decode(&tokens)?, "the cat");
/// # Ok(())
/// # }
/// ```
///
/// Errors: the first error of `texts`; fewer tokens than bytes and special tokens; a special token that is empty or twice in
/// the list.
pub fn learn_byte_level_bpe<I, E>(texts: I, num_tokens: usize, special: &[&str]) -> Result<String, E>
where
    I: IntoIterator<Item = Result<String, E>>,
    I::IntoIter: Send,
    E: From<Error> + Send,
{
    let least = BYTES + special.len();
    if num_tokens < least {
        let why = format!(
            "expected at least {least} tokens (256 bytes and {} special ones), got {num_tokens}",
            special.len()
        );
        return Err(refused(why).into());
    }
    if let Some(index) =
        (0..special.len()).find(|&index| special[index].is_empty() || special[..index].contains(&special[index]))
    {
        return Err(refused(format!("the special token `{}` is empty or given twice", special[index])).into());
    }
    let mut trainer = BpeTrainer::builder()
        .vocab_size(num_tokens)
        .show_progress(false)
        .special_tokens(special.iter().map(|&token| AddedToken::from(token, true)).collect())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut failed = None;
    let texts = texts.into_iter().map_while(|text| text.map_err(|error| failed = Some(error)).ok());
    let bytes = ByteLevel::new(false, true, true);
    let mut tokenizer: TokenizerImpl<
        BPE,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    > = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(bytes)))
        .with_decoder(Some(DecoderWrapper::ByteLevel(bytes)))
        .build()
        .map_err(refused)?;
    let learned = tokenizer.train(&mut trainer, texts).and_then(|tokenizer| tokenizer.to_string(true));
    match failed {
        Some(error) => Err(error),
        None => Ok(learned.map_err(refused)?),
    }
}
