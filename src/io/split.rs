//! GGUF models in several files, as split by llama.cpp's `gguf-split`: `NAME-00001-of-00003.gguf` and its siblings.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{Metadata, TensorFile, tensor_file::Listed};
use crate::{Error, Result, error::ensure};

/// Maximum number of parts of a model; the names have five digits.
const MAX_PARTS: usize = 99_999;

/// Parses the file name of a part into name, number (from 1) and count.
pub(super) fn part_of(path: &Path) -> Option<(&str, usize, usize)> {
    let (rest, count) = path.file_name()?.to_str()?.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (name, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let parse = |text: &str| text.parse().ok().filter(|_| digits(text));
    Some((name, parse(number)?, parse(count)?))
}

/// Returns the first of several files if all are parts of one model.
pub(super) fn first_of(found: &[PathBuf]) -> Option<&PathBuf> {
    let first = found.first()?;
    let (name, _, count) = part_of(first)?;
    let same = |path: &PathBuf| matches!(part_of(path), Some((other, _, parts)) if (other, parts) == (name, count));
    found.iter().all(same).then_some(first)
}

/// Returns the number of parts and the index of this one, for a file whose metadata says that it is a part.
fn numbers(path: &Path, metadata: &BTreeMap<String, Metadata>) -> Result<Option<(usize, usize)>> {
    let number = |key: &str| match metadata.get(key) {
        None => Ok(None),
        Some(value) => match value.as_usize().filter(|&value| value <= MAX_PARTS) {
            None => Err(Error::file(path, format_args!("`{key}` is {value:?}, expected 0 to {MAX_PARTS}"))),
            some => Ok(some),
        },
    };
    let count = number("split.count")?.unwrap_or(0);
    if count < 2 {
        return Ok(None);
    }
    let part = number("split.no")?.unwrap_or(0);
    ensure!(part < count, Error::file(path, format_args!("claims to be part {} of {count}", part + 1)));
    Ok(Some((count, part)))
}

/// Opens the other parts of a model of which one part is open; leaves a model in one file unchanged.
///
/// Errors: a part is missing or belongs to another model; a tensor is in two parts or in none.
pub(super) fn complete(opened: TensorFile, open: impl Fn(&Path) -> Result<TensorFile>) -> Result<TensorFile> {
    let path = opened.path.clone();
    let Some((count, part)) = numbers(&path, &opened.metadata)? else { return Ok(opened) };
    let Some((name, ..)) = part_of(&path).filter(|&(_, number, parts)| (number, parts) == (part + 1, count)) else {
        let ending = format!("-{:05}-of-{count:05}.gguf", part + 1);
        let why = format!("is part {} of {count} of a model, so its name must end in `{ending}`", part + 1);
        return Err(Error::file(path, why));
    };
    let place = |part: usize| path.with_file_name(format!("{name}-{:05}-of-{count:05}.gguf", part + 1));
    let mut others = Vec::new();
    for other in (0..count).filter(|&other| other != part) {
        let place = place(other);
        ensure!(
            place.is_file(),
            Error::file(&place, format_args!("is missing (part {} of {count} of the model)", other + 1))
        );
        let file = open(&place)?;
        ensure!(
            numbers(&place, &file.metadata)? == Some((count, other)),
            Error::file(&place, format_args!("is named as part {} of {count}, but its metadata disagrees", other + 1))
        );
        others.push(file);
    }
    others.insert(part, opened);
    let mut whole = others.remove(0);
    for file in others {
        let first = whole.parts.len();
        if let Some(twice) = file.listed.keys().iter().find(|&tensor| whole.listed.contains_key(tensor)) {
            return Err(Error::file(&file.path, format_args!("has tensor `{twice}`, which is also in another part")));
        }
        let moved = file.listed.into_iter().map(|(tensor, mut listed)| {
            if let Listed::Tensor(entry) = &mut listed {
                entry.part += first;
            }
            (tensor, listed)
        });
        whole.listed = std::mem::take(&mut whole.listed).into_iter().chain(moved).collect();
        // The first part has the model's metadata, the others only their own numbers.
        for (key, value) in file.metadata {
            whole.metadata.entry(key).or_insert(value);
        }
        whole.parts.extend(file.parts);
    }
    if let Some(expected) = whole.metadata.get("split.tensors.count").and_then(Metadata::as_usize) {
        let found = whole.listed.len();
        let why = format!("says that the model has {expected} tensors, but its {count} parts have {found} in total");
        ensure!(found == expected, Error::file(&whole.path, why));
    }
    Ok(whole)
}
