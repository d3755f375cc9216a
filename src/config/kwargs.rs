//! Keyword arguments: flat JSON keys with prefixes in, nested structs out, and back. Unknown keys are errors.

use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::{
    AttentionLayersConfig, ContinuousTransformerWrapperConfig, SamplingConfig, TransformerWrapperConfig,
    ViTransformerWrapperConfig, later::is_later,
};
use crate::{
    Error, ErrorKind, Result,
    collect::CollectVec,
    error::{ErrorContext, ensure},
};

/// A JSON object.
pub(super) type Map = serde_json::Map<String, Value>;

/// A struct whose fields are keyword arguments, read and written by one function for all structs.
pub(super) trait Keywords {
    /// Options without a default.
    fn required(&self) -> &'static [&'static str];
    /// Alternative names of options.
    fn aliases(&self) -> &'static [(&'static str, &'static str)];
    /// Every option with its default, like [`flat`].
    fn defaults(&self) -> Map;
    /// Calls a function with each option and its field.
    fn fields(&mut self, visit: &mut Visit<'_>);
}

pub(super) type Visit<'a> = dyn FnMut(&str, Field<'_>) + 'a;

/// Field of an option.
pub(super) enum Field<'a> {
    One(&'a mut dyn Json),
    /// Options of another struct, as a JSON object.
    Nested(&'a mut dyn Keywords),
}

/// Value of an option.
pub(super) trait Json {
    fn get(&self) -> Value;
    fn set(&mut self, value: Value) -> serde_json::Result<()>;
}

impl<T: Serialize + DeserializeOwned> Json for T {
    fn get(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    fn set(&mut self, value: Value) -> serde_json::Result<()> {
        *self = serde_json::from_value(value)?;
        Ok(())
    }
}

/// Implements [`Keywords`], `Serialize` and `Deserialize` for a struct from all of its fields: required and other
/// options, options of another struct with a prefix or as an object, and fields for which `special` visits.
macro_rules! keywords {
    (
        $Type:ident {
            $(required { $($required:ident),* $(,)? })?
            $(nested { $($nested:ident),* $(,)? })?
            $(options { $($option:ident),* $(,)? })?
            $(groups { $($prefix:literal $group:ident),* $(,)? })?
            $(aliases { $($alias:literal $aliased:literal),* $(,)? })?
            $(special { $($special:ident $by:path),* $(,)? })?
        }
    ) => {
        impl $crate::config::kwargs::Keywords for $Type {
            fn required(&self) -> &'static [&'static str] {
                &[$($(stringify!($nested),)*)? $($(stringify!($required),)*)?]
            }

            fn aliases(&self) -> &'static [(&'static str, &'static str)] {
                &[$($(($alias, $aliased)),*)?]
            }

            fn defaults(&self) -> $crate::config::kwargs::Map {
                $crate::config::kwargs::flat(&mut Self::default())
            }

            fn fields(&mut self, visit: &mut $crate::config::kwargs::Visit<'_>) {
                use $crate::config::kwargs::Field;
                let Self { $($($required,)*)? $($($nested,)*)? $($($option,)*)? $($($group,)*)? $($($special,)*)? } = self;
                $($(visit(stringify!($required), Field::One($required));)*)?
                $($(visit(stringify!($nested), Field::Nested($nested));)*)?
                $($(visit(stringify!($option), Field::One($option));)*)?
                $($($group.fields(&mut |key, field| visit(&format!(concat!($prefix, "{}"), key), field));)*)?
                $($($by($special, visit);)*)?
            }
        }

        impl serde::Serialize for $Type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
                serde::Serialize::serialize(&$crate::config::kwargs::write(self), serializer)
            }
        }

        impl<'de> serde::Deserialize<'de> for $Type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                $crate::config::kwargs::read(serde::Deserialize::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(super) use keywords;

/// Returns the object of an option.
pub(super) fn object(name: &str, value: Value) -> Result<Map> {
    match value {
        Value::Object(map) => Ok(map),
        other => Err(Error::option(name, format_args!("expected a JSON object, got {other}"))),
    }
}

/// Reads keyword arguments.
///
/// Errors: [`ErrorKind::UnknownOption`]; [`ErrorKind::Option`] for a missing one or a value of another type.
pub(super) fn read<T: Keywords + Default>(map: Map) -> Result<T> {
    let mut config = T::default();
    set(&mut config, map)?;
    Ok(config)
}

/// Sets fields, and leaves those without an argument as they are.
fn set(config: &mut dyn Keywords, mut map: Map) -> Result<()> {
    let aliases = config.aliases();
    for &(alias, key) in aliases {
        if let Some(value) = map.remove(alias) {
            let taken = map.insert(key.to_string(), value).is_some();
            ensure!(!taken, Error::option(alias, format_args!("is an alias of `{key}`, which is also set")));
        }
    }
    let mut known: Vec<String> = aliases.iter().map(|alias| alias.0.to_string()).collect_vec();
    config.fields(&mut |key, _| known.push(key.to_string()));
    check_known(&map, &known)?;
    for &key in config.required() {
        ensure!(map.contains_key(key), Error::missing_option(key));
    }
    // The first key in alphabetical order with an error.
    let mut first: Option<(String, Error)> = None;
    config.fields(&mut |key, field| {
        let Some(value) = map.remove(key) else { return };
        let done = match field {
            Field::One(field) => field.set(value).map_err(|why| Error::option(key, why.to_string())),
            Field::Nested(field) => object(key, value).and_then(|map| set(field, map).context(key)),
        };
        if let Err(error) = done
            && first.as_ref().is_none_or(|(before, _)| key < before.as_str())
        {
            first = Some((key.to_string(), error));
        }
    });
    first.map_or(Ok(()), |(_, error)| Err(error))
}

/// Returns the options that differ from their defaults, and the required ones.
pub(super) fn write<T: Keywords + Clone>(config: &T) -> Map {
    written(&mut config.clone())
}

fn written(config: &mut dyn Keywords) -> Map {
    let (defaults, required) = (config.defaults(), config.required());
    let mut map = flat(config);
    map.retain(|key, value| required.contains(&key.as_str()) || defaults.get(key) != Some(value));
    map
}

/// Returns every option with its value.
pub(super) fn flat(config: &mut dyn Keywords) -> Map {
    let mut map = Map::new();
    config.fields(&mut |key, field| {
        let value = match field {
            Field::One(field) => field.get(),
            Field::Nested(field) => Value::Object(written(field)),
        };
        map.insert(key.to_string(), value);
    });
    map
}

/// Returns `true` if this is an option of a class of x-transformers 0.22, or one that this crate added to them.
pub(super) fn is_of_first(key: &str) -> bool {
    let of_stack = ["enc_", "dec_"].iter().find_map(|prefix| key.strip_prefix(prefix)).unwrap_or(key);
    let configs: [&mut dyn Keywords; 5] = [
        &mut AttentionLayersConfig::default(),
        &mut TransformerWrapperConfig::default(),
        &mut ContinuousTransformerWrapperConfig::default(),
        &mut ViTransformerWrapperConfig::default(),
        &mut SamplingConfig::default(),
    ];
    configs.into_iter().any(|config| flat(config).contains_key(of_stack))
}

/// Rejects unknown keys.
pub(super) fn check_known(map: &Map, known: &[String]) -> Result<()> {
    match map.keys().find(|&key| !known.contains(key)) {
        Some(key) => {
            let later = is_later(key);
            let nearest = if later { None } else { nearest(key, known) };
            Err(Error::new(ErrorKind::UnknownOption { key: key.clone(), nearest, later }))
        }
        None => Ok(()),
    }
}

/// Returns the known key with the fewest edits if those are few; otherwise one that only has an additional prefix.
pub(super) fn nearest(key: &str, known: &[String]) -> Option<String> {
    let (edits, nearest) = known.iter().map(|known| (edit_distance(key, known), known)).min()?;
    if edits <= 2.max(key.len() / 3) {
        return Some(nearest.clone());
    }
    let has_prefix = |known: &&String| known.strip_suffix(key).is_some_and(|prefix| prefix.ends_with('_'));
    known.iter().find(has_prefix).cloned()
}

/// Returns the Levenshtein distance: insertions, deletions and replacements of single characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect_vec();
    let mut row: Vec<usize> = (0..=b.len()).collect_vec();
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
