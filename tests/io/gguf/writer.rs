//! Writes GGUF files of given metadata and tensors.

use super::*;

/// The metadata of a file changed: `pairs` take the room of a filler.
pub fn with_metadata(name: &str, pairs: &[Vec<u8>]) -> Vec<u8> {
    let bytes = fs::read(files(name)).unwrap();
    let filler = pair("zz.filler", 8, &text(&".".repeat(600)));
    let at = bytes.windows(filler.len()).position(|window| window == filler).unwrap();
    let added = pairs.concat();
    let rest = pair("zz.filler", 8, &text(&".".repeat(600 - added.len())));
    let mut changed = [&bytes[..at], &added, &rest, &bytes[at + filler.len()..]].concat();
    let count = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) + pairs.len() as u64;
    changed[16..24].copy_from_slice(&count.to_le_bytes());
    assert_eq!(changed.len(), bytes.len());
    changed
}

pub fn float(key: &str, value: f32) -> Vec<u8> {
    pair(key, 6, &value.to_le_bytes())
}

pub fn size(key: &str, value: u32) -> Vec<u8> {
    pair(key, 4, &value.to_le_bytes())
}

/// The number of a type in a file.
pub fn number(kind: QuantType) -> u32 {
    match kind {
        QuantType::Q4_0 => 2,
        QuantType::Q4_1 => 3,
        QuantType::Q5_0 => 6,
        QuantType::Q5_1 => 7,
        QuantType::Q8_0 => 8,
        QuantType::Q2K => 10,
        QuantType::Q3K => 11,
        QuantType::Q4K => 12,
        QuantType::Q5K => 13,
        QuantType::Q6K => 14,
        QuantType::Iq4Nl => 20,
        QuantType::Iq4Xs => 23,
        other => panic!("{other}"),
    }
}

pub fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A pair of metadata: its key, the number of its type, its value.
pub fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key)[..], &kind.to_le_bytes(), value].concat()
}

/// A file with these pairs of metadata, and tensors by name, dimensions from the innermost on, type and bytes.
pub fn gguf(pairs: &[Vec<u8>], tensors: &[(&str, &[u64], u32, Vec<u8>)]) -> Vec<u8> {
    let mut bytes = [b"GGUF".to_vec(), 3u32.to_le_bytes().to_vec()].concat();
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((pairs.len() as u64).to_le_bytes());
    bytes.extend(pairs.concat());
    let mut values = Vec::new();
    for (name, dims, kind, tensor) in tensors {
        bytes.extend(text(name));
        bytes.extend((dims.len() as u32).to_le_bytes());
        bytes.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend((values.len() as u64).to_le_bytes());
        values.extend(tensor);
        values.resize(values.len().next_multiple_of(32), 0);
    }
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    [bytes, values].concat()
}
