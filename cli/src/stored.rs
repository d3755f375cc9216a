//! The files of a tokenizer, which a run keeps beside its checkpoint.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use x_transformers::{
    io::{create_folders, read_limited, write_atomically},
    pretrained::{Family, Pretrained},
};

use crate::{
    failure::{Failure, Result},
    tokenizer::Tokenizer,
};

/// Vocabularies, the first of which counts.
const VOCABULARIES: [&str; 6] =
    ["tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json"];
/// Settings, merges and templates beside a vocabulary.
const MORE: [&str; 7] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    PRETRAINED,
];
/// Says that the tokenizer is that of a pretrained model, and what the tokenizer's own files do not say.
const PRETRAINED: &str = "pretrained.json";
/// Bytes that such a file may have.
const MAX_FILE: u64 = 256 << 20;
/// Beginning of the names of their folders in a checkpoint.
const PREFIX: &str = "tokenizer-";

/// The files of a tokenizer, in memory.
pub struct StoredTokenizer {
    files: Vec<(String, Vec<u8>)>,
}

impl StoredTokenizer {
    /// Reads those in a folder, or a vocabulary and what lies beside it.
    pub fn read(path: &Path) -> Result<Self> {
        let (folder, vocabulary) = match path.is_dir() {
            true => {
                let found = VOCABULARIES.iter().map(|name| path.join(name)).find(|path| path.is_file());
                let why = || Failure::new("has no tokenizer: expected tokenizer.json, tokenizer.model or vocab.txt");
                (path.to_path_buf(), found.ok_or_else(|| why().within(path))?)
            }
            false => (path.parent().unwrap_or(Path::new("")).to_path_buf(), path.to_path_buf()),
        };
        let beside = MORE.iter().map(|name| folder.join(name)).filter(|path| path.is_file());
        let read = |path: PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok((name, read_limited(&path, MAX_FILE)?))
        };
        Ok(Self { files: std::iter::once(vocabulary).chain(beside).map(read).collect::<Result<_>>()? })
    }

    /// The tokenizer of a pretrained model, or the one in the file or folder `given`.
    pub fn of_pretrained(pretrained: &Pretrained, given: Option<&Path>) -> Result<Self> {
        let mut stored = match given.or(pretrained.folder()) {
            Some(folder) => Self::read(folder)?,
            None => Self { files: Tokenizer::folder_files(pretrained)? },
        };
        let origin = Origin { family: pretrained.family(), ends: pretrained.end_tokens().to_vec() };
        stored.files.retain(|(name, _)| name != PRETRAINED);
        stored.files.push((PRETRAINED.to_string(), origin.to_json().into_bytes()));
        Ok(stored)
    }

    /// The files of the tokenizer alone.
    pub fn without_origin(mut self) -> Self {
        self.files.retain(|(name, _)| name != PRETRAINED);
        self
    }

    /// Writes the files to a folder, which is created if missing.
    pub fn write(&self, folder: &Path) -> Result<()> {
        create_folders(folder)?;
        for (name, content) in &self.files {
            write_atomically(folder.join(name), |file| file.write_all(content))?;
        }
        Ok(())
    }

    /// Returns the name of a folder for the files: other files, another name.
    pub fn name(&self) -> String {
        let bytes =
            self.files.iter().flat_map(|(name, content)| name.bytes().chain([0]).chain(content.iter().copied()));
        // FNV-1a.
        let hash =
            bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        format!("{PREFIX}{hash:016x}")
    }
}

/// The pretrained model that a tokenizer comes from.
pub struct Origin {
    pub family: Family,
    /// Tokens that end a text or a turn.
    pub ends: Vec<i64>,
}

impl Origin {
    /// Reads it in the folder of a checkpoint's tokenizer; `None` if the tokenizer is not that of a pretrained model.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(PRETRAINED);
        if !path.is_file() {
            return Ok(None);
        }
        let value: Value = serde_json::from_slice(&read_limited(&path, MAX_FILE)?).unwrap_or_default();
        let family = Family::ALL.iter().find(|family| value["family"] == family.to_string());
        let ends = value["end_tokens"].as_array().and_then(|ends| ends.iter().map(Value::as_i64).collect());
        match (family, ends) {
            (Some(&family), Some(ends)) => Ok(Some(Self { family, ends })),
            _ => Err(Failure::new("is damaged: expected a `family` and `end_tokens`").within(&path)),
        }
    }

    fn to_json(&self) -> String {
        format!("{:#}\n", json!({"family": self.family.to_string(), "end_tokens": self.ends}))
    }
}

/// Removes the tokenizers of earlier runs from a checkpoint.
pub fn remove_others(checkpoint: &Path, kept: Option<&str>) {
    let Ok(entries) = fs::read_dir(checkpoint) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let old = name.to_str().is_some_and(|name| name.starts_with(PREFIX) && Some(name) != kept);
        if old && entry.path().is_dir() {
            // Nobody reads them; the next run tries again.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
