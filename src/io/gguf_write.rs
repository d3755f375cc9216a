//! Writing of GGUF, version 3.

use std::{collections::BTreeMap, io, path::Path};

use super::{gguf::MAGIC, stored::Stored, tensor_file::Metadata};
use crate::{Error, Result, atomic_file::write_atomically, error::ensure};

/// Alignment of tensors where the metadata name no other.
const ALIGNMENT: usize = 32;

/// Maximum number of dimensions that llama.cpp reads.
const RANK: usize = 4;

/// Tensor of a file to be written.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// Name, for instance `blk.0.attn_q.weight`.
    pub name: String,
    /// Sizes, as of a [`Tensor`](crate::Tensor): rows first.
    pub shape: Vec<usize>,
    /// Type of the values: F32, F16, BF16 or a quantised one.
    pub stored: Stored,
}

/// Writes a GGUF file in one step, see [`write_atomically`]; `bytes(i)` returns the content of tensor `i`, of which one is
/// held at a time.
///
/// Numbers of metadata get the types that llama.cpp expects: integers 32 bits where they fit, floats f32.
///
/// Errors: those of `bytes`; bytes that do not fit the type and the shape; a type that is not written; more than four
/// dimensions; lists of values of several types; an alignment other than 32; [`ErrorKind::Io`](crate::ErrorKind::Io).
pub fn write_gguf(
    path: impl AsRef<Path>,
    metadata: &BTreeMap<String, Metadata>,
    tensors: &[GgufTensor],
    mut bytes: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let path = path.as_ref();
    ensure!(
        metadata.get("general.alignment").is_none_or(|value| *value == Metadata::Int(ALIGNMENT as i64)),
        Error::file(path, format_args!("`general.alignment` is not {ALIGNMENT}"))
    );
    let mut sizes = Vec::new();
    let mut header = [MAGIC, &3u32.to_le_bytes()].concat();
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (name, value) in metadata {
        put_text(&mut header, name);
        ensure!(
            put(&mut header, value).is_some(),
            Error::file(path, format_args!("metadata `{name}` has a list of values of several types, expected one"))
        );
    }
    let mut offset = 0;
    for GgufTensor { name, shape, stored } in tensors {
        let kind = match stored {
            Stored::F32 => 0,
            Stored::F16 => 1,
            Stored::BF16 => 30,
            Stored::Quantized(kind) => kind.number(),
            other => return Err(Error::file(path, format_args!("`{name}` is {other}, which is not written"))),
        };
        ensure!(
            shape.len() <= RANK,
            Error::file(path, format_args!("`{name}` has {} dimensions, expected at most {RANK}", shape.len()))
        );
        let row = shape.last().copied().unwrap_or(1);
        let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
        let size = count.and_then(|count| stored.bytes(count)).filter(|_| row.is_multiple_of(stored.block().0));
        let Some(size) = size else {
            return Err(Error::file(
                path,
                format_args!("`{name}` has rows of {row} values, not whole blocks of {stored}"),
            ));
        };
        put_text(&mut header, name);
        header.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&size| header.extend((size as u64).to_le_bytes()));
        header.extend(u32::to_le_bytes(kind));
        header.extend((offset as u64).to_le_bytes());
        offset += size.next_multiple_of(ALIGNMENT);
        sizes.push(size);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    let mut failed = None;
    let written = write_atomically(path, |file| {
        file.write_all(&header)?;
        for (index, &size) in sizes.iter().enumerate() {
            let mut content = bytes(index).and_then(|content| {
                let name = &tensors[index].name;
                ensure!(
                    content.len() == size,
                    Error::file(path, format_args!("`{name}` has {} bytes, expected {size}", content.len()))
                );
                Ok(content)
            });
            match &mut content {
                Ok(content) => {
                    content.resize(size.next_multiple_of(ALIGNMENT), 0);
                    file.write_all(content)?;
                }
                Err(_) => {
                    failed = content.err();
                    return Err(io::Error::other("a tensor cannot be had"));
                }
            }
        }
        Ok(())
    });
    failed.map_or(written, Err)
}

fn put_text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

/// The number of the narrowest type that llama.cpp takes for a value.
fn kind(value: &Metadata) -> u32 {
    match value {
        Metadata::Int(value) if u32::try_from(*value).is_ok() => 4,
        Metadata::Int(value) if i32::try_from(*value).is_ok() => 5,
        Metadata::Int(_) => 11,
        Metadata::Unsigned(_) => 10,
        Metadata::Float(_) => 6,
        Metadata::Bool(_) => 7,
        Metadata::Text(_) => 8,
        Metadata::List(_) => 9,
    }
}

/// The type of the elements of a list, one for all of them; `None` if there is none.
fn kind_of_elements(values: &[Metadata]) -> Option<u32> {
    let all = |fits: fn(&Metadata) -> bool| values.iter().all(fits);
    // An empty list is one of texts: llama.cpp takes no other for the merges of a vocabulary that has none.
    let Some(first) = values.first().map(kind) else { return Some(8) };
    if all(|value| matches!(value, Metadata::Int(value) if i32::try_from(*value).is_ok())) {
        // Lists of small integers are signed.
        Some(5)
    } else if all(|value| matches!(value, Metadata::Int(_))) {
        Some(11)
    } else if all(|value| matches!(value, Metadata::Unsigned(_) | Metadata::Int(0..))) {
        Some(10)
    } else {
        values.iter().all(|value| kind(value) == first).then_some(first)
    }
}

fn put(to: &mut Vec<u8>, value: &Metadata) -> Option<()> {
    to.extend(kind(value).to_le_bytes());
    put_as(to, value, kind(value))
}

/// Returns `None` for a list without a type of its elements.
fn put_as(to: &mut Vec<u8>, value: &Metadata, kind: u32) -> Option<()> {
    match value {
        Metadata::Int(value) if kind == 10 || kind == 11 => to.extend(value.to_le_bytes()),
        Metadata::Int(value) => to.extend((*value as u32).to_le_bytes()),
        Metadata::Unsigned(value) => to.extend(value.to_le_bytes()),
        Metadata::Float(value) => to.extend((*value as f32).to_le_bytes()),
        Metadata::Bool(value) => to.push(u8::from(*value)),
        Metadata::Text(text) => put_text(to, text),
        Metadata::List(values) => {
            let kind = kind_of_elements(values)?;
            to.extend(kind.to_le_bytes());
            to.extend((values.len() as u64).to_le_bytes());
            values.iter().try_for_each(|value| put_as(to, value, kind))?;
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::TensorFile;

    /// Lists keep their values whatever their widths, and a list of several types, a shape whose size overflows and one of
    /// five dimensions are refused.
    #[test]
    fn metadata_of_every_type_is_read_back_or_refused() {
        let path = std::env::temp_dir().join(format!("xt-gguf-write-{}.gguf", std::process::id()));
        let (int, unsigned) = (Metadata::Int, Metadata::Unsigned);
        let write = |value: &Metadata, shape: Vec<usize>| {
            let metadata = BTreeMap::from([("a.list".to_string(), value.clone())]);
            let tensor = GgufTensor { name: "x".to_string(), shape, stored: Stored::F32 };
            write_gguf(&path, &metadata, &[tensor], |_| Ok(vec![0; 8]))
        };
        for list in [
            vec![int(-1), int(5)],
            vec![int(5), int(1 << 40)],
            vec![int(5), unsigned(u64::MAX)],
            vec![unsigned(u64::MAX), int(5)],
            vec![Metadata::Text("a".to_string()), Metadata::Text(String::new())],
            vec![Metadata::Bool(true), Metadata::Bool(false)],
        ] {
            let list = Metadata::List(list);
            write(&list, vec![2]).unwrap();
            assert_eq!(TensorFile::open(&path).unwrap().metadata().get("a.list"), Some(&list));
        }
        for list in [vec![int(1), Metadata::Bool(true)], vec![int(-1), unsigned(u64::MAX)]] {
            assert!(write(&Metadata::List(list), vec![2]).unwrap_err().to_string().contains("several types"));
        }
        assert!(write(&int(1), vec![1 << 40, 1 << 40]).is_err());
        assert!(write(&int(1), vec![1, 1, 1, 1, 2]).unwrap_err().to_string().contains("5 dimensions"));
        std::fs::remove_file(&path).ok();
    }
}
