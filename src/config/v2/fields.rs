//! Options as tables: names, defaults, and readers and writers of JSON by the type of the value.

use serde_json::{Value, json};

use super::{
    super::{
        kwargs::Map,
        options::{LayerType, ShiftTokens},
    },
    SwitchOrFactor,
};
use crate::{Error, Result};

/// Value of an option.
pub(super) trait Field {
    /// Takes a JSON value; returns `false` if it has another type.
    fn read(&mut self, value: &Value) -> bool;
    /// Returns the value as JSON.
    fn write(&self) -> Value;
    /// Describes the values that it takes.
    fn expected(&self) -> &'static str;
}

/// Struct of options with defaults.
pub(super) trait Options: Clone + Default {
    /// Names of the options, in the order of [`Options::fields`].
    const NAMES: &'static [&'static str];

    /// Returns all values.
    fn fields(&self) -> Vec<&dyn Field>;

    /// Returns all values, to be changed.
    fn fields_mut(&mut self) -> Vec<&mut dyn Field>;
}

/// Declares a struct of options: each field is an option with its default.
macro_rules! options {
    ($(#[$meta:meta])* pub struct $Name:ident {
        $($(#[$doc:meta])* $field:ident: $Type:ty = $default:expr,)*
    } $(with { $($(#[$other_doc:meta])* $other:ident: $Other:ty,)* })?) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Debug)]
        pub struct $Name {
            $($(#[$doc])* pub $field: $Type,)*
            $($($(#[$other_doc])* pub $other: $Other,)*)?
        }

        impl Default for $Name {
            // Many places have some of its values.
            #[inline(never)]
            fn default() -> Self {
                Self { $($field: $default,)* $($($other: Default::default(),)*)? }
            }
        }

        impl $crate::config::v2::fields::Options for $Name {
            const NAMES: &'static [&'static str] = &[$(stringify!($field)),*];

            fn fields(&self) -> Vec<&dyn $crate::config::v2::fields::Field> {
                vec![$(&self.$field),*]
            }

            fn fields_mut(&mut self) -> Vec<&mut dyn $crate::config::v2::fields::Field> {
                vec![$(&mut self.$field),*]
            }
        }
    };
}
pub(super) use options;

/// Takes the options with a prefix out of a map.
///
/// Errors: a value of another type.
pub(super) fn take<T: Options>(into: &mut T, prefix: &str, map: &mut Map) -> Result<()> {
    take_fields(T::NAMES, into.fields_mut(), prefix, map)
}

fn take_fields(names: &[&str], fields: Vec<&mut dyn Field>, prefix: &str, map: &mut Map) -> Result<()> {
    for (name, field) in names.iter().zip(fields) {
        let key = format!("{prefix}{name}");
        if let Some(value) = map.remove(&key)
            && !field.read(&value)
        {
            return Err(Error::option(key, format_args!("expected {}, got {value}", field.expected())));
        }
    }
    Ok(())
}

/// Returns the options that differ from the others, with a prefix.
pub(super) fn differing<T: Options>(options: &T, others: &T, prefix: &str) -> Map {
    differing_fields(T::NAMES, &options.fields(), &others.fields(), prefix)
}

fn differing_fields(names: &[&str], fields: &[&dyn Field], others: &[&dyn Field], prefix: &str) -> Map {
    let mut map = Map::new();
    for ((name, field), other) in names.iter().zip(fields).zip(others) {
        let value = field.write();
        if value != other.write() {
            map.insert(format!("{prefix}{name}"), value);
        }
    }
    map
}

macro_rules! field {
    ($Type:ty, $expected:literal, $read:expr, |$value:ident| $write:expr) => {
        impl Field for $Type {
            fn read(&mut self, value: &Value) -> bool {
                let read: fn(&Value) -> Option<$Type> = $read;
                read(value).map(|read| *self = read).is_some()
            }

            fn write(&self) -> Value {
                let $value = self;
                $write
            }

            fn expected(&self) -> &'static str {
                $expected
            }
        }
    };
}

fn size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|value| usize::try_from(value).ok())
}

/// Reads `null` as `None`.
fn optional<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Option<T>> {
    if value.is_null() { Some(None) } else { read(value).map(Some) }
}

fn list<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    value.as_array()?.iter().map(read).collect()
}

fn letter(value: &Value) -> Option<LayerType> {
    use LayerType::{CrossAttention, FeedForward, SelfAttention};
    [SelfAttention, CrossAttention, FeedForward]
        .into_iter()
        .find(|kind| value.as_str() == Some(kind.letter().encode_utf8(&mut [0; 4])))
}

field!(bool, "true or false", Value::as_bool, |value| json!(value));
field!(usize, "a whole number of at least 0", size, |value| json!(value));
field!(i64, "a whole number", Value::as_i64, |value| json!(value));
field!(f64, "a number", Value::as_f64, |value| json!(value));
field!(Option<bool>, "true, false or null", |value| optional(value, Value::as_bool), |value| json!(value));
field!(Option<usize>, "a whole number of at least 0, or null", |value| optional(value, size), |value| json!(value));
field!(Option<f64>, "a number or null", |value| optional(value, Value::as_f64), |value| json!(value));
field!(
    SwitchOrFactor,
    "true, false or a number",
    |value| value.as_bool().map(SwitchOrFactor::from).or_else(|| value.as_f64().map(SwitchOrFactor::Factor)),
    |value| match value {
        SwitchOrFactor::Off => json!(false),
        SwitchOrFactor::On => json!(true),
        SwitchOrFactor::Factor(factor) => json!(factor),
    }
);
field!(
    Option<String>,
    "a name or null",
    |value| optional(value, |value| value.as_str().map(str::to_string)),
    |value| json!(value)
);
field!(
    Option<Vec<usize>>,
    "an array of whole numbers, or null",
    |value| optional(value, |value| list(value, size)),
    |value| json!(value)
);
field!(
    Option<Vec<LayerType>>,
    "an array of \"a\", \"c\" and \"f\", or null",
    |value| optional(value, |value| list(value, letter)),
    |value| match value {
        Some(types) => types.iter().map(|kind| json!(kind.letter().to_string())).collect(),
        None => Value::Null,
    }
);
field!(
    ShiftTokens,
    "a whole number, or an array of one per sublayer",
    |value| size(value).map(ShiftTokens::All).or_else(|| list(value, size).map(ShiftTokens::Each)),
    |value| match value {
        ShiftTokens::All(amount) => json!(amount),
        ShiftTokens::Each(amounts) => json!(amounts),
    }
);
field!(
    Vec<f64>,
    "a number, or an array of one per sublayer",
    |value| value.as_f64().map(|one| vec![one]).or_else(|| list(value, Value::as_f64)),
    |value| match &value[..] {
        [one] => json!(one),
        each => json!(each),
    }
);
field!(
    Vec<(String, usize)>,
    "an object of names and numbers",
    |value| value.as_object()?.iter().map(|(name, count)| Some((name.clone(), size(count)?))).collect(),
    |value| Value::Object(value.iter().map(|(name, count)| (name.clone(), json!(count))).collect())
);
