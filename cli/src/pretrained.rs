//! Pretrained models of other families on the command line: their tokenizers, and what they write or embed.

use std::path::{Path, PathBuf};

use x_transformers::{
    DType, Device, Tensor,
    io::{Pretrained, write_safetensors},
    models::{AutoregressiveWrapper, GenerateOptions},
};

use crate::{
    failure::{Failure, Result, print},
    text::Decoder,
    tokenizer::Tokenizer,
};

/// What continues a text with a pretrained model.
pub struct Continue<'a> {
    pub prompt: &'a str,
    /// The prompt is what a person says, and the answer is wanted.
    pub chat: bool,
    /// Tokens to add.
    pub length: usize,
    pub options: GenerateOptions,
}

/// Continues a prompt and shows the text as it is produced. What is not special is shown as the tokenizer decodes it.
pub fn generate(path: &Path, asked: Continue, device: &Device) -> Result<()> {
    let pretrained = Pretrained::open(path)?;
    let tokenizer = Tokenizer::of(&pretrained)?;
    let prompt = if asked.chat { tokenizer.chat(asked.prompt)? } else { asked.prompt.to_string() };
    let tokens = tokenizer.encode(&prompt)?;
    let window = pretrained.config().max_seq_len;
    if tokens.is_empty() {
        return Err(Failure::new("the prompt has no token; give some text"));
    }
    if tokens.len() >= window {
        return Err(Failure::new(format_args!(
            "the prompt has {} tokens, the model sees {window}; give a shorter one",
            tokens.len()
        )));
    }
    let model = pretrained.autoregressive(DType::F32, device)?;
    if !asked.chat {
        show(&mut Decoder::default(), &prompt)?;
    }
    let length = asked.length.min(window - tokens.len());
    stream(&model, &tokenizer, &tokens, length, pretrained.end_token(), &asked.options, device)?;
    print("\n")
}

fn stream(
    model: &AutoregressiveWrapper,
    tokenizer: &Tokenizer,
    tokens: &[i64],
    length: usize,
    end: Option<i64>,
    options: &GenerateOptions,
    device: &Device,
) -> Result<()> {
    let (mut new, mut shown, mut decoder) = (Vec::new(), 0, Decoder::default());
    let mut result = Ok(());
    let mut on_token = |tokens: &[i64]| {
        // Not `eos_token`, which the turns of a chat in the prompt end with too.
        if end.is_some_and(|end| tokens.contains(&end)) {
            return false;
        }
        new.extend_from_slice(tokens);
        result = tokenizer.decode(&new).and_then(|text| {
            // A character whose bytes are spread over tokens is not whole yet.
            let whole = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
            let fresh = whole.get(shown..).unwrap_or_default();
            shown += fresh.len();
            show(&mut decoder, fresh)
        });
        result.is_ok()
    };
    model.generate(&Tensor::from_slice(tokens, [tokens.len()], device)?, length, options, &mut on_token)?;
    result
}

/// Text that cannot move the cursor of a terminal.
fn show(decoder: &mut Decoder, text: &str) -> Result<()> {
    print(text.bytes().map(|byte| decoder.push(byte)).collect::<String>())
}

/// Embeds texts: prints the vector of one, the cosines of several, or writes all.
pub fn embed(path: &Path, texts: &[String], output: Option<&PathBuf>, device: &Device) -> Result<()> {
    let pretrained = Pretrained::open(path)?;
    let tokenizer = Tokenizer::of(&pretrained)?;
    let rows = texts.iter().map(|text| tokenizer.encode(text)).collect::<Result<Vec<_>>>()?;
    let window = pretrained.config().max_seq_len;
    for (text, row) in texts.iter().zip(&rows) {
        if row.is_empty() || row.len() > window {
            let start: String = text.chars().take(40).collect();
            let why = format!("the text `{start}` has {} tokens, the model takes 1 to {window}", row.len());
            return Err(Failure::new(why));
        }
    }
    let encoder = pretrained.sentence_encoder(DType::F32, device)?;
    let width = rows.iter().map(Vec::len).max().unwrap_or(0);
    let padded = |fill: fn(Option<&i64>) -> i64| -> Vec<i64> {
        rows.iter().flat_map(|row| (0..width).map(move |at| fill(row.get(at)))).collect()
    };
    let tokens = Tensor::from_vec(padded(|token| token.copied().unwrap_or(0)), [rows.len(), width], device)?;
    let kept: Vec<bool> = padded(|token| token.is_some().into()).iter().map(|&kept| kept == 1).collect();
    let mask = Tensor::from_vec(kept, [rows.len(), width], device)?;
    let vectors = encoder.embed(&tokens, Some(&mask))?.to_device(&Device::Cpu)?;
    let dim = vectors.dim(1)?;
    let values = vectors.to_f64_vec()?;
    let values: Vec<&[f64]> = values.chunks(dim).collect();
    if let Some(output) = output {
        write_safetensors(output, &[("embeddings".to_string(), vectors)].into(), &Default::default())?;
        print(format_args!("{} x {dim} values in {}\n", texts.len(), output.display()))?;
    }
    match &values[..] {
        [one] if output.is_none() => {
            print(one.iter().map(|x| format!("{x:.6}")).collect::<Vec<_>>().join(" "))?;
            print("\n")
        }
        [_] => Ok(()),
        _ => print(cosines(texts, &values)),
    }
}

/// A table of the cosines of all pairs.
fn cosines(texts: &[String], vectors: &[&[f64]]) -> String {
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = |a: &[f64], b: &[f64]| product(a, b) / (product(a, a) * product(b, b)).sqrt().max(1e-12);
    let mut table = String::from("cosine");
    (1..=vectors.len()).for_each(|number| table += &format!(" {number:>6}"));
    table.push('\n');
    for (number, (text, vector)) in texts.iter().zip(vectors).enumerate() {
        table += &format!("{:>6}", number + 1);
        vectors.iter().for_each(|other| table += &format!(" {:>6.3}", cosine(vector, other)));
        let shown: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(60).collect();
        table += &format!("  {shown}\n");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::cosines;

    #[test]
    fn cosines_do_not_depend_on_lengths() {
        let texts = ["a".to_string(), "b\nb".to_string()];
        let table = cosines(&texts, &[&[3.0, 4.0], &[0.0, 10.0]]);
        assert_eq!(table, "cosine      1      2\n     1  1.000  0.800  a\n     2  0.800  1.000  b b\n");
    }
}
