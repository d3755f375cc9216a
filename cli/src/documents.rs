//! Texts that become tokens: files, the records of JSONL and the rows of Parquet; which of them are for validation.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use clap::Args;
use rayon::prelude::*;
use serde_json::{Map, Value};
use x_transformers::train::ByteText;

use crate::{
    columns,
    failure::{Failure, Result},
    tokenizer::Tokenizer,
};

#[derive(Args)]
pub struct RecordArgs {
    /// Paths of JSONL files: a JSON object per line, whose --field is a document
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub jsonl: Vec<PathBuf>,

    /// Field of a record that holds its text
    #[arg(long, value_name = "NAME", default_value = "text", requires = "jsonl")]
    pub field: String,

    /// Paths of Parquet files: each row of their --column is a document (needs `xt` built with the feature `parquet`)
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "jsonl")]
    pub parquet: Vec<PathBuf>,

    /// Column of --parquet that holds the texts
    #[arg(long, value_name = "NAME", default_value = "text", requires = "parquet")]
    pub column: String,

    /// Text between the documents of a file of --text, such as <|endoftext|> [default: each file is a document]
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["jsonl", "parquet"])]
    pub separator: Option<String>,
}

/// Documents that can be read again and again.
pub enum Documents {
    Text { text: ByteText, separator: Option<String> },
    Records { paths: Vec<PathBuf>, field: String },
    Rows { paths: Vec<PathBuf>, column: String },
}

impl RecordArgs {
    /// Returns the documents of `--jsonl` or `--parquet`, if there are any.
    pub fn documents(&self) -> Result<Option<Documents>> {
        Ok(match (&self.jsonl[..], &self.parquet[..]) {
            ([], []) => None,
            ([], paths) => {
                columns::check()?;
                Some(Documents::Rows { paths: paths.to_vec(), column: self.column.clone() })
            }
            (paths, _) => Some(Documents::Records { paths: paths.to_vec(), field: self.field.clone() }),
        })
    }
}

/// Bytes that a line of JSONL may have.
const MAX_LINE: u64 = 1 << 30;

impl Documents {
    /// Returns the documents from their first on.
    pub fn iter(&self) -> Box<dyn Iterator<Item = Result<String>> + Send + '_> {
        match self {
            Self::Text { text, separator } => {
                Box::new(text.files().flat_map(move |(path, bytes)| parts(path, bytes, separator.as_deref())))
            }
            Self::Records { paths, field } => Box::new(paths.iter().flat_map(move |path| {
                lines(path, move |line| text_of(line, field)).map(|found| found.map(|(_, text)| text))
            })),
            Self::Rows { paths, column } => Box::new(paths.iter().flat_map(move |path| columns::texts(path, column))),
        }
    }
}

/// Returns the documents of a text file.
fn parts<'t>(
    path: &Path,
    bytes: &'t [u8],
    separator: Option<&'t str>,
) -> Box<dyn Iterator<Item = Result<String>> + Send + 't> {
    let text = match str::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            let why = format!("is not UTF-8 at byte {}; a tokenizer needs text", error.valid_up_to());
            return Box::new(std::iter::once(Err(Failure::new(why).within(path))));
        }
    };
    match separator {
        None => Box::new(std::iter::once(Ok(text.to_string()))),
        Some(separator) => {
            let parts = text.split(separator).map(str::trim).filter(|part| !part.is_empty());
            Box::new(parts.map(|part| Ok(part.to_string())))
        }
    }
}

/// Returns the records of a JSONL file as `parse` reads them, with their lines; an error names its line.
pub fn lines<'r, T>(
    path: &'r Path,
    parse: impl Fn(&[u8]) -> std::result::Result<T, String> + Send + 'r,
) -> impl Iterator<Item = Result<(u64, T)>> + Send + 'r {
    let mut reader = Some(File::open(path).map(BufReader::new));
    let mut number = 0u64;
    std::iter::from_fn(move || {
        loop {
            let file = match reader.as_mut()? {
                Ok(file) => file,
                Err(error) => {
                    let failure = Failure::io(path, error);
                    reader = None;
                    return Some(Err(failure));
                }
            };
            let mut line = Vec::new();
            number += 1;
            let wrong = |why: String| Failure::new(format_args!("line {number}: {why}")).within(path);
            let result = match file.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
                Err(error) => Err(Failure::io(path, &error)),
                Ok(0) => return None,
                Ok(_) if line.trim_ascii().is_empty() => continue,
                Ok(length) if length as u64 == MAX_LINE => Err(wrong(format!("has more than {MAX_LINE} bytes"))),
                Ok(_) => parse(&line).map(|parsed| (number, parsed)).map_err(wrong),
            };
            if result.is_err() {
                reader = None;
            }
            return Some(result);
        }
    })
}

/// Returns the text in a field of a record.
fn text_of(line: &[u8], field: &str) -> std::result::Result<String, String> {
    let mut fields = fields_of(line)?;
    match fields.remove(field) {
        Some(Value::String(text)) if text.is_empty() => Err(format!("field `{field}` is empty")),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("field `{field}` is {}, expected a string", kind(&other))),
        None => {
            let names: Vec<&str> = fields.keys().map(String::as_str).collect();
            Err(format!("field `{field}` is missing; the record has {}", names.join(", ")))
        }
    }
}

/// Returns the fields of a record.
pub fn fields_of(line: &[u8]) -> std::result::Result<Map<String, Value>, String> {
    match serde_json::from_slice(line).map_err(|why| format!("is not JSON: {why}"))? {
        Value::Object(fields) => Ok(fields),
        _ => Err("is not a JSON object".to_string()),
    }
}

pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Which documents are for validation: about a tenth of the text, spread over all of it.
pub struct Split {
    /// Of each document.
    validation: Vec<bool>,
    /// With too few documents for a tenth of the text: the byte at which the last one is cut in two.
    cut: Option<usize>,
}

impl Split {
    /// Reads all documents once.
    pub fn of(documents: &Documents) -> Result<Self> {
        let (mut validation, mut seen, mut taken) = (Vec::new(), 0, 0);
        let mut last = String::new();
        for document in documents.iter() {
            last = document?;
            let (length, before) = (last.len() as u64, seen);
            seen += length;
            // Whenever the share is below a tenth, whatever the length, so that short documents are not preferred; a
            // document that would make it half as much again is left out.
            let chosen = 10 * taken < before && 20 * (taken + length) <= 3 * seen;
            taken += if chosen { length } else { 0 };
            validation.push(chosen);
        }
        if validation.is_empty() {
            return Err(Failure::new("found no documents"));
        }
        let cut = (20 * taken < seen && validation.last() == Some(&false)).then(|| {
            let tail = (seen / 10 - taken).max(1).min(last.len() as u64 / 2) as usize;
            let near = last.floor_char_boundary(last.len() - tail);
            // At the end of a line, if there is one in the second half.
            last[..near].rfind('\n').map(|at| at + 1).filter(|&at| at >= last.len() / 2).unwrap_or(near)
        });
        Ok(Self { validation, cut })
    }

    /// Returns the number of documents.
    pub fn documents(&self) -> usize {
        self.validation.len()
    }

    /// Returns the parts of a document and whether each is for validation.
    fn parts(&self, index: usize, document: String) -> Vec<(bool, String)> {
        match self.cut.filter(|&cut| index + 1 == self.validation.len() && cut > 0 && document.is_char_boundary(cut)) {
            Some(cut) => vec![(false, document[..cut].to_string()), (true, document[cut..].to_string())],
            None => vec![(self.validation[index], document)],
        }
    }
}

/// Tokens of all documents, each after the token that begins a document. `take` gets them in order, with `true` for those of
/// the validation, and the bytes of their text. Unless they are `plain`, the tokenizer puts its own tokens around a text too.
pub fn encode(
    documents: &Documents,
    split: &Split,
    tokenizer: &Tokenizer,
    (begin, plain): (i64, bool),
    mut take: impl FnMut(bool, &[i64], usize) -> Result<()>,
) -> Result<()> {
    /// Bytes that all processors work on at a time.
    const TOGETHER: usize = 4 << 20;
    let (mut together, mut bytes) = (Vec::new(), 0);
    let mut flush = |together: &mut Vec<(bool, String)>| -> Result<()> {
        let encoded: Vec<_> = together
            .par_iter()
            .map(|(_, text)| if plain { tokenizer.encode_plain(text) } else { tokenizer.encode(text) })
            .collect();
        for ((validation, text), tokens) in together.drain(..).zip(encoded) {
            take(validation, &[begin], 0)?;
            take(validation, &tokens?, text.len())?;
        }
        Ok(())
    };
    for (index, document) in documents.iter().enumerate() {
        for part in split.parts(index, document?) {
            bytes += part.1.len();
            together.push(part);
        }
        if bytes >= TOGETHER {
            bytes = 0;
            flush(&mut together)?;
        }
    }
    flush(&mut together)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(texts: &[&str]) -> Documents {
        let text = ByteText::from_bytes(texts.join("|")).expect("a text");
        Documents::Text { text, separator: Some("|".to_string()) }
    }

    #[test]
    fn a_tenth_of_the_text_is_for_validation() {
        let texts: Vec<String> = (0..200).map(|index| "x".repeat(1 + index * 37 % 90)).collect();
        let split = Split::of(&documents(&texts.iter().map(String::as_str).collect::<Vec<_>>())).expect("a split");
        let length = |wanted: bool| -> usize {
            let chosen = texts.iter().zip(&split.validation).filter(|(_, validation)| **validation == wanted);
            chosen.map(|(text, _)| text.len()).sum()
        };
        let share = length(true) as f64 / (length(true) + length(false)) as f64;
        assert!((0.09..0.11).contains(&share), "{share}");
        // Documents are as long as the others.
        let chosen = split.validation.iter().filter(|validation| **validation).count();
        let (mean, of_all) = (length(true) / chosen, (length(true) + length(false)) / texts.len());
        assert!(mean * 5 > of_all * 4 && mean * 4 < of_all * 5, "{mean} {of_all}");
        // In each quarter, not only at one end.
        for quarter in split.validation.chunks(50) {
            assert!((2..=9).contains(&quarter.iter().filter(|validation| **validation).count()));
        }
    }

    #[test]
    fn few_documents_are_cut() {
        let line = "äö is a line\n".repeat(20);
        for texts in [&[&*line][..], &[&*line, "short", &line], &["äöü"], &["abc", "d"]] {
            let documents = documents(texts);
            let split = Split::of(&documents).expect("a split");
            let parts: Vec<_> =
                documents.iter().enumerate().flat_map(|(at, text)| split.parts(at, text.expect("a text"))).collect();
            let text =
                |wanted: bool| -> usize { parts.iter().filter(|part| part.0 == wanted).map(|part| part.1.len()).sum() };
            assert_eq!(
                parts.iter().map(|part| &*part.1).collect::<String>(),
                texts.iter().map(|t| t.trim()).collect::<String>()
            );
            if texts.concat().len() > 100 {
                assert!(text(true) * 20 > text(false) && text(true) * 5 < text(false), "{parts:?}");
                assert!(parts[parts.len() - 2].1.ends_with('\n'));
            }
        }
    }

    #[test]
    fn records_are_named_in_errors() {
        for (line, expected) in [
            ("{\"text\": 1}", "field `text` is a number, expected a string"),
            ("{\"texts\": \"a\", \"b\": 0}", "field `text` is missing; the record has b, texts"),
            ("{\"text\": \"\"}", "field `text` is empty"),
            ("[1]", "is not a JSON object"),
            ("{\"text\": ", "is not JSON"),
        ] {
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("records.jsonl");
            std::fs::write(&path, format!("{{\"text\": \"a\"}}\n\n{line}\n{{\"text\": \"b\"}}\n")).expect("a file");
            let documents = Documents::Records { paths: vec![path], field: "text".to_string() };
            let found: Vec<_> = documents.iter().collect();
            assert_eq!(found.len(), 2, "nothing follows an error");
            assert!(matches!(&found[0], Ok(text) if text == "a"));
            let message = found[1].as_ref().expect_err("an error").to_string();
            assert!(message.contains("records.jsonl: line 3: ") && message.contains(expected), "{message}");
        }
        let missing = Documents::Records { paths: vec!["none.jsonl".into()], field: "text".to_string() };
        assert!(missing.iter().next().expect("an error").expect_err("an error").to_string().contains("none.jsonl"));
    }
}
