//! Writing of GGUF, version 3.

use std::{collections::BTreeMap, io, path::Path};

use super::{gguf::MAGIC, stored::Stored, tensor_file::Metadata};
use crate::{Error, Result, atomic_file::write_atomically, error::ensure};

/// Alignment of tensors where the metadata name no other.
const ALIGNMENT: usize = 32;

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
/// Errors: those of `bytes`; bytes that do not fit the type and the shape; a type that is not written; an alignment other
/// than 32; [`ErrorKind::Io`](crate::ErrorKind::Io).
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
        put(&mut header, value);
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
        let row = shape.last().copied().unwrap_or(1);
        let size = stored.bytes(shape.iter().product()).filter(|_| row.is_multiple_of(stored.block().0));
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

/// The type of the elements of a list: one for all of them.
fn kind_of_elements(values: &[Metadata]) -> u32 {
    let kinds = || values.iter().map(kind);
    match kinds().next() {
        // Lists of small integers are signed.
        None => 5,
        Some(4 | 5) if kinds().all(|kind| [4, 5].contains(&kind)) => {
            let signed = |value: &Metadata| matches!(value, Metadata::Int(value) if i32::try_from(*value).is_ok());
            if values.iter().all(signed) { 5 } else { 11 }
        }
        Some(4 | 5 | 11) => 11,
        Some(kind) => kind,
    }
}

fn put(to: &mut Vec<u8>, value: &Metadata) {
    to.extend(kind(value).to_le_bytes());
    put_as(to, value, kind(value));
}

fn put_as(to: &mut Vec<u8>, value: &Metadata, kind: u32) {
    match value {
        Metadata::Int(value) if kind == 11 => to.extend(value.to_le_bytes()),
        Metadata::Int(value) => to.extend((*value as u32).to_le_bytes()),
        Metadata::Unsigned(value) => to.extend(value.to_le_bytes()),
        Metadata::Float(value) => to.extend((*value as f32).to_le_bytes()),
        Metadata::Bool(value) => to.push(u8::from(*value)),
        Metadata::Text(text) => put_text(to, text),
        Metadata::List(values) => {
            let kind = kind_of_elements(values);
            to.extend(kind.to_le_bytes());
            to.extend((values.len() as u64).to_le_bytes());
            values.iter().for_each(|value| put_as(to, value, kind));
        }
    }
}
