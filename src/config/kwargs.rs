//! Keyword arguments: flat JSON keys with prefixes in, nested structs out, and back. Unknown keys are errors.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    AttentionLayersConfig, ContinuousTransformerWrapperConfig, SamplingConfig, TransformerWrapperConfig,
    ViTransformerWrapperConfig, later::is_later,
};
use crate::{Error, ErrorKind, Result, error::ensure};

/// A JSON object.
pub(super) type Map = serde_json::Map<String, Value>;

/// A struct whose fields are keyword arguments.
pub(super) trait Keywords: Default + Serialize + DeserializeOwned {
    /// Options without a default.
    const REQUIRED: &'static [&'static str];
    /// Prefixes, and the fields that hold the options with them.
    const GROUPS: &'static [(&'static str, &'static str)] = &[];
    /// Alternative names of options.
    const ALIASES: &'static [(&'static str, &'static str)] = &[];

    /// Returns the fields as JSON, with groups as nested objects.
    fn to_nested(&self) -> serde_json::Result<Value> {
        serde_json::to_value(self)
    }

    /// Inverts [`Keywords::to_nested`].
    fn from_nested(value: Value) -> serde_json::Result<Self> {
        serde_json::from_value(value)
    }
}

/// Reads keyword arguments.
///
/// Errors: [`ErrorKind::UnknownOption`]; [`ErrorKind::Option`] for a missing one or a value of another type.
pub(super) fn read<T: Keywords>(mut map: Map) -> Result<T> {
    let defaults = flat(&T::default());
    check(&mut map, &defaults, T::ALIASES, T::REQUIRED)?;
    build(map.clone()).map_err(|error| failing(map, &defaults, error, &|map| build::<T>(map).err()))
}

/// Replaces aliases by the options' own names, and rejects unknown and missing options.
fn check(map: &mut Map, defaults: &Map, aliases: &[(&str, &str)], required: &[&'static str]) -> Result<()> {
    for &(alias, key) in aliases {
        if let Some(value) = map.remove(alias) {
            let taken = map.insert(key.to_string(), value).is_some();
            ensure!(!taken, Error::option(alias, format_args!("is an alias of `{key}`, which is also set")));
        }
    }
    check_known(map, || defaults.keys().map(String::as_str).chain(aliases.iter().map(|alias| alias.0)))?;
    for &key in required {
        ensure!(map.contains_key(key), Error::missing_option(key));
    }
    Ok(())
}

/// Finds the key that caused an error. The message of serde names the expected and the actual value but not the key:
/// it is the key that fails by itself, or the one without which the others pass.
fn failing(
    map: Map,
    defaults: &Map,
    error: serde_json::Error,
    fails: &dyn Fn(Map) -> Option<serde_json::Error>,
) -> Error {
    let alone = |(key, value): (&String, &Value)| {
        let mut one = defaults.clone();
        one.insert(key.clone(), value.clone());
        fails(one).map(|error| Error::option(key, error.to_string()))
    };
    let contradicts = |key: &&String| {
        let mut others = map.clone();
        others.remove(*key);
        fails(others).is_none()
    };
    map.iter().find_map(alone).unwrap_or_else(|| match map.keys().find(contradicts) {
        Some(key) => Error::option(key, error.to_string()),
        None => Error::argument("config", error.to_string()),
    })
}

/// Returns the options that differ from their defaults, and the required ones.
pub(super) fn write<T: Keywords>(config: &T) -> Map {
    let defaults = flat(&T::default());
    let mut map = flat(config);
    map.retain(|key, value| T::REQUIRED.contains(&key.as_str()) || defaults.get(key) != Some(value));
    map
}

/// Returns every option with its value.
pub(super) fn flat<T: Keywords>(config: &T) -> Map {
    flattened(config.to_nested(), T::GROUPS)
}

fn flattened(nested: serde_json::Result<Value>, groups: &[(&str, &str)]) -> Map {
    let Ok(Value::Object(mut map)) = nested else { return Map::new() };
    for &(prefix, field) in groups {
        if let Some(Value::Object(group)) = map.remove(field) {
            map.extend(group.into_iter().map(|(key, value)| (format!("{prefix}{key}"), value)));
        }
    }
    map
}

fn build<T: Keywords>(map: Map) -> serde_json::Result<T> {
    T::from_nested(nested(map, T::GROUPS))
}

fn nested(map: Map, groups: &[(&str, &str)]) -> Value {
    let mut nested = Map::new();
    for &(_, field) in groups {
        nested.insert(field.to_string(), Value::Object(Map::new()));
    }
    for (key, value) in map {
        let group = groups.iter().find_map(|&(prefix, field)| Some((field, key.strip_prefix(prefix)?)));
        match group.and_then(|(field, key)| Some((nested.get_mut(field)?.as_object_mut()?, key))) {
            Some((group, key)) => group.insert(key.to_string(), value),
            None => nested.insert(key, value),
        };
    }
    Value::Object(nested)
}

/// Returns `true` if this is an option of a class of x-transformers 0.22, or one that this crate added to them.
pub(super) fn is_of_first(key: &str) -> bool {
    let of_stack = ["enc_", "dec_"].iter().find_map(|prefix| key.strip_prefix(prefix)).unwrap_or(key);
    let layers = flat(&AttentionLayersConfig::default());
    let wrappers = [
        flat(&TransformerWrapperConfig::default()),
        flat(&ContinuousTransformerWrapperConfig::default()),
        flat(&ViTransformerWrapperConfig::default()),
        flat(&SamplingConfig::default()),
    ];
    wrappers.iter().chain([&layers]).any(|known| known.contains_key(of_stack))
}

/// Rejects unknown keys.
pub(super) fn check_known<'a, I: Iterator<Item = &'a str> + Clone>(map: &Map, known: impl Fn() -> I) -> Result<()> {
    match map.keys().find(|&key| !known().any(|known| known == key)) {
        Some(key) => {
            let later = is_later(key);
            let nearest = if later { None } else { nearest(key, known()) };
            Err(Error::new(ErrorKind::UnknownOption { key: key.clone(), nearest, later }))
        }
        None => Ok(()),
    }
}

/// Returns the known key with the fewest edits if those are few; otherwise one that only has an additional prefix.
pub(super) fn nearest<'a>(key: &str, mut known: impl Iterator<Item = &'a str> + Clone) -> Option<String> {
    let (edits, nearest) = known.clone().map(|known| (edit_distance(key, known), known)).min()?;
    if edits <= 2.max(key.len() / 3) {
        return Some(nearest.to_string());
    }
    let has_prefix = |known: &&str| known.strip_suffix(key).is_some_and(|prefix| prefix.ends_with('_'));
    known.find(has_prefix).map(str::to_string)
}

/// Returns the Levenshtein distance: insertions, deletions and replacements of single characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, a) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, &b) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Returns the same error with a prefix on the keys that it names, and without its location.
pub(super) fn with_prefix(error: Error, prefix: &str) -> Error {
    Error::new(match error.into_kind() {
        ErrorKind::Option { key, why } => ErrorKind::Option { key: format!("{prefix}{key}"), why },
        ErrorKind::UnknownOption { key, nearest, later } => ErrorKind::UnknownOption {
            key: format!("{prefix}{key}"),
            nearest: nearest.map(|nearest| format!("{prefix}{nearest}")),
            later,
        },
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance_known_pairs() {
        for (a, b, distance) in [("", "abc", 3), ("kitten", "sitting", 3), ("heads", "head", 1), ("same", "same", 0)] {
            assert_eq!(edit_distance(a, b), distance, "{a} {b}");
            assert_eq!(edit_distance(b, a), distance, "{b} {a}");
        }
    }
}
