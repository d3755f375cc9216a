//! Files of `torch.save`: a zip archive since PyTorch 1.6, before that pickles one after the other.

use std::ops::Range;

use super::{
    bytes::{Cursor, Parsed, Reading, parse_beginning},
    described::{Pickle, Value, View},
    globals::{Element, Global},
    source::Source,
    tensor_file::{Entry, Inert, Listed, Listing},
    zip,
};
use crate::{Shape, ordered::OrderedMap};

/// The number that an old file begins with, as the bytes of a Python integer.
const MAGIC: &[u8] = &[0x6C, 0xFC, 0x9C, 0x46, 0xF9, 0x20, 0x6A, 0xA8, 0x50, 0x19];
/// The version of the old format.
const VERSION: i64 = 1001;

/// Content of an archive's `byteorder` entry.
const LITTLE: &[u8] = b"little";

/// Dictionaries inside one another: a checkpoint has its state dict under a name such as `state_dict`.
const MAX_DEPTH: usize = 8;
/// Tensors of a file.
const MAX_TENSORS: usize = 100_000;
/// Bytes of a tensor's name.
const MAX_NAME: usize = 1024;

/// Returns `true` if a file begins like the old format: with a pickle of the magic number.
pub(super) fn is_legacy(bytes: &[u8]) -> bool {
    bytes.len() > 4 && bytes[0] == 0x80 && bytes[2..4] == [0x8A, MAGIC.len() as u8] && bytes[4..].starts_with(MAGIC)
}

/// The tensors of an archive.
pub(super) fn archive(source: &Source) -> Reading<Listing> {
    let files = zip::directory(source)?;
    let pickle = files.keys().iter().find_map(|name| name.strip_suffix("data.pkl").map(|folder| (folder, name)));
    let Some((folder, name)) = pickle.filter(|(folder, _)| folder.is_empty() || folder.ends_with('/')) else {
        return Err("is a zip archive without `data.pkl`, so it is not a PyTorch file".into());
    };
    if let Some(order) = files.get(&format!("{folder}byteorder"))
        && (order.len() != LITTLE.len() || source.part(order.clone(), "a byte order")? != LITTLE)
    {
        return Err("is big-endian, expected little-endian; save it again on a little-endian machine".into());
    }
    let bytes = source.part(files[name].clone(), "a pickle")?;
    let (pickle, top) = Pickle::load(&mut Cursor::new(&bytes, 0))?;
    let storage = |key: &str| files.get(&format!("{folder}data/{key}")).cloned();
    Ok(listing(&pickle, top, &storage)?)
}

/// The tensors of an old file.
pub(super) fn legacy(source: &Source) -> Reading<Listing> {
    parse_beginning(source, |cursor| pickles(cursor, source))
}

/// The same from the pickles at the beginning of the file; the storages follow them.
fn pickles(mut cursor: Cursor, source: &Source) -> Reading<Listing> {
    if Pickle::load(&mut cursor)?.1 != Value::Long(MAGIC) {
        return Err("does not start with the magic number of PyTorch's legacy format".into());
    }
    match Pickle::load(&mut cursor)?.1 {
        Value::Int(VERSION) => {}
        _ => return Err(format!("is not version {VERSION} of PyTorch's legacy format").into()),
    }
    let (machine, described) = Pickle::load(&mut cursor)?;
    let entries = machine.entries(described).unwrap_or_default();
    if entries.contains(&(Value::Text("little_endian"), Value::Bool(false))) {
        return Err("is big-endian, expected little-endian; save it again on a little-endian machine".into());
    }
    let (pickle, top) = Pickle::load(&mut cursor)?;
    let (keys, list) = Pickle::load(&mut cursor)?;
    let sizes: OrderedMap<&str, usize> =
        pickle.storages.iter().map(|storage| (storage.key, storage.values.bytes())).collect();
    let mut ranges = Vec::new();
    let mut at = cursor.at();
    for key in keys.items(list).ok_or("has no list of storages")? {
        let Value::Text(key) = *key else {
            return Err("has a list of storages with an entry that is not a name".into());
        };
        let size = sizes.get(key).ok_or_else(|| format!("has a storage `{key}` that no tensor uses"))?;
        let left = source.len().saturating_sub(at);
        let truncated =
            |count: u64| format!("is truncated: storage `{key}` has {count} values, but only {left} bytes are left");
        let values = left.checked_sub(8).ok_or_else(|| truncated(0))?;
        let count = u64::from_le_bytes(source.array(at)?);
        let bytes = usize::try_from(count).ok().and_then(|count| count.checked_mul(*size));
        let bytes = bytes.filter(|&bytes| bytes <= values).ok_or_else(|| truncated(count))?;
        ranges.push((key, at + 8..at + 8 + bytes));
        at += 8 + bytes;
    }
    let ranges: OrderedMap<&str, Range<usize>> = ranges.into_iter().collect();
    Ok(listing(&pickle, top, &|key| ranges.get(key).cloned())?)
}

/// The tensors below the top value, each with its place in the file.
fn listing(pickle: &Pickle, top: Value, storage: &dyn Fn(&str) -> Option<Range<usize>>) -> Parsed<Listing> {
    let mut found = Vec::new();
    let mut seen = vec![false; pickle.dicts.len()];
    // Dictionaries to look into, with their names and depths. One that occurs twice, inside itself for instance, is
    // looked into once.
    let mut open = vec![(String::new(), top, 0)];
    while let Some((prefix, dict, depth)) = open.pop() {
        let Value::Dict(index) = dict else { return Err(no_dictionary(pickle, dict)) };
        let seen = &mut seen[index as usize];
        if std::mem::replace(seen, true) || depth > MAX_DEPTH {
            continue;
        }
        for &(key, value) in pickle.entries(dict).unwrap_or_default() {
            let name = match key {
                Value::Text(key) if prefix.len() + key.len() > MAX_NAME => {
                    return Err(format!("has a tensor with a name of more than {MAX_NAME} bytes"));
                }
                Value::Text(key) => format!("{prefix}{key}"),
                Value::Int(key) => format!("{prefix}{key}"),
                _ => continue,
            };
            // Of several entries with one key the last counts.
            match value {
                Value::Dict(_) => open.push((format!("{name}."), value, depth + 1)),
                Value::Tensor(index) => {
                    let view = pickle.tensor(index).ok_or("refers to a missing tensor")?;
                    let place = place(pickle, view, storage).map_err(|why| format!("tensor `{name}`: {why}"))?;
                    found.push((name, place.map_or_else(Listed::unreadable, Listed::Tensor)));
                }
                Value::Object(index) => {
                    let (module, maker) = pickle.maker(index);
                    let tensor = module.starts_with("torch.") && maker.starts_with("_rebuild");
                    let why = format!("is created by `{module}.{maker}`, which is not executed");
                    found.push((name, Listed::Inert(Inert { why, tensor })));
                }
                // Steps, options and the like.
                _ => {}
            }
            if found.len() > MAX_TENSORS {
                return Err(format!("has more than {MAX_TENSORS} tensors"));
            }
        }
    }
    Ok(Listing { listed: found.into_iter().collect(), ..Listing::default() })
}

fn no_dictionary(pickle: &Pickle, top: Value) -> String {
    const EXPECTED: &str = "expected a dictionary of tensors; save `model.state_dict()`";
    match top {
        Value::Object(index) | Value::Global(Global::Other(index)) => {
            let (module, name) = pickle.maker(index);
            format!("contains a `{module}.{name}` object (nothing was executed), {EXPECTED}")
        }
        Value::Tensor(_) => format!("contains a single unnamed tensor, {EXPECTED}"),
        _ => format!("contains no dictionary, {EXPECTED}"),
    }
}

/// Where the values of a view lie, or why they are not read.
fn place(
    pickle: &Pickle,
    view: &View,
    storage: &dyn Fn(&str) -> Option<Range<usize>>,
) -> Parsed<std::result::Result<Entry, String>> {
    let of = pickle.storages.get(view.storage as usize).ok_or("has no storage")?;
    let range = storage(of.key).ok_or_else(|| format!("its storage `{}` is not in the file", of.key))?;
    let stored = match view.element {
        Element::Read(stored) => stored,
        Element::Unread(name, _) => return Ok(Err(format!("is {name}, which is not supported"))),
    };
    let size = stored.block().1;
    let shape = match Shape::new(&view.shape) {
        Ok(shape) => shape,
        Err(why) => return Ok(Err(why.to_string())),
    };
    if view.strides.len() != view.shape.len() {
        return Err(format!("has {} dimensions but {} strides", view.shape.len(), view.strides.len()));
    }
    // The bytes of the storage, and where it begins.
    let [length, first] = [of.elements, of.first].map(|count| count.checked_mul(of.values.bytes()));
    // The last value of the view, counted from the start of the storage.
    let reach = view
        .shape
        .iter()
        .zip(&view.strides)
        .try_fold(0usize, |reach, (&dim, &stride)| reach.checked_add(dim.saturating_sub(1).checked_mul(stride)?));
    let values = if shape.numel() == 0 { Some(0) } else { reach.and_then(|reach| reach.checked_add(1)) };
    let end = values.and_then(|values| view.offset.checked_add(values)?.checked_mul(size));
    let inside = end.zip(length).is_some_and(|(end, length)| end <= length);
    let start = first.and_then(|first| first.checked_add(view.offset.checked_mul(size)?));
    let bytes = values.and_then(|values| values.checked_mul(size));
    let last = start.zip(bytes).and_then(|(start, bytes)| start.checked_add(bytes));
    let (Some(start), true) = (start, inside && last.is_some_and(|last| last <= range.len())) else {
        return Err(format!(
            "shape {:?}, strides {:?}, offset {} exceed the storage of {} values ({} bytes in the file)",
            view.shape,
            view.strides,
            view.offset,
            of.elements,
            range.len()
        ));
    };
    let packed = packed(&view.shape, &view.strides);
    let strides = (!packed).then(|| view.strides.clone());
    Ok(Ok(Entry { part: 0, stored, shape, strides, start: range.start + start }))
}

/// Returns `true` if values are contiguous: in the order of the shape, without gaps.
fn packed(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1usize;
    shape.iter().zip(strides).rev().all(|(&dim, &stride)| {
        let fits = dim <= 1 || stride == expected;
        expected = expected.saturating_mul(dim);
        fits
    }) || shape.contains(&0)
}
