//! GGUF, the format of llama.cpp (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>), versions 2 and 3:
//! metadata by name, then where each tensor lies, then the tensors.

use std::collections::BTreeMap;

use super::{
    bytes::{Cursor, Parsed, Reading, parse_beginning},
    source::Source,
    stored::Stored,
    tensor_file::{Entry, Listed, Listing, Metadata},
};
use crate::{QuantType, Shape, collect::CollectVec, ordered::OrderedMap};

/// First bytes of every file.
pub(super) const MAGIC: &[u8] = b"GGUF";

/// Advice for files that no version of this reader knows.
const CONVERT: &str = "convert the model again with llama.cpp's `convert_hf_to_gguf.py`";

/// Values of all lists together; the largest vocabularies have about half a million entries with merges and scores.
const MAX_VALUES: usize = 4_000_000;
/// Bytes of a name, by the format.
const MAX_NAME: usize = 65535;
/// Tensors of a file.
const MAX_TENSORS: usize = 100_000;
/// Lists inside one another.
const MAX_DEPTH: usize = 4;

/// The tensors and the metadata of a file.
pub(super) fn listing(source: &Source) -> Reading<Listing> {
    parse_beginning(source, |cursor| Ok(header(cursor, source.len())?))
}

/// The same from a header; `total`: bytes of the file.
fn header(mut cursor: Cursor, total: usize) -> Parsed<Listing> {
    cursor.take(MAGIC.len())?;
    match cursor.u32()? {
        2 | 3 => {}
        1 => return Err(format!("is GGUF version 1, which is obsolete; {CONVERT}")),
        // The first versions of the other byte order.
        version if (1..256).contains(&version.swap_bytes()) => {
            return Err(format!(
                "is big-endian GGUF version {}, expected little-endian; convert it with `gguf-convert-endian FILE \
                 little` from the Python package gguf",
                version.swap_bytes()
            ));
        }
        version => return Err(format!("is GGUF version {version}, expected 2 or 3; {CONVERT}")),
    }
    // Bytes that the smallest description of a tensor and the smallest pair take.
    let tensors = cursor.count(24, "tensors")?;
    if tensors > MAX_TENSORS {
        return Err(format!("has {tensors} tensors, expected at most {MAX_TENSORS}"));
    }
    let pairs = cursor.count(13, "metadata entries")?;
    let mut values = Values { cursor, left: MAX_VALUES };
    let mut metadata = BTreeMap::new();
    for _ in 0..pairs {
        let name = name(&mut values.cursor)?;
        let value = values.value(&name)?;
        if metadata.insert(name.clone(), value).is_some() {
            return Err(format!("has metadata `{name}` twice"));
        }
    }
    let mut cursor = values.cursor;
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(&Metadata::Int(alignment @ 1..=65536)) if (alignment as usize).is_power_of_two() => alignment as usize,
        Some(other) => return Err(format!("has general.alignment {other:?}, expected a power of two up to 65536")),
    };
    let mut described = Vec::new();
    for _ in 0..tensors {
        described.push(tensor(&mut cursor)?);
    }
    let data = cursor.at().checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
    let mut listed = Vec::new();
    for (name, shape, stored, offset) in described {
        let size = stored.bytes(shape.numel()).ok_or_else(|| format!("tensor `{name}` is too large"))?;
        let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
        let Some(start) = start.filter(|&start| start.checked_add(size).is_some_and(|end| end <= total)) else {
            return Err(format!(
                "is truncated or damaged: tensor `{name}` has {size} bytes at byte {offset} of the values, but the \
                 file has only {total} bytes"
            ));
        };
        listed.push((name, Listed::Tensor(Entry { part: 0, stored, shape, strides: None, start })));
    }
    let listed = OrderedMap::unique(listed).map_err(|name| format!("has tensor `{name}` twice"))?;
    Ok(Listing { listed, metadata })
}

/// Name, shape, type and offset of a tensor.
fn tensor(cursor: &mut Cursor) -> Parsed<(String, Shape, Stored, u64)> {
    let name = name(cursor)?;
    let rank = cursor.u32()?;
    if rank > 6 {
        return Err(format!("tensor `{name}` has {rank} dimensions, expected at most 6"));
    }
    let mut dims = Vec::new();
    for _ in 0..rank {
        let dim = cursor.u64()?;
        dims.push(
            usize::try_from(dim)
                .map_err(|_| format!("tensor `{name}` has a dimension of size {dim}, which is too large"))?,
        );
    }
    let kind = cursor.u32()?;
    let stored = stored(kind).map_err(|kind| {
        format!(
            "tensor `{name}` is {kind}, expected one of {READ}; quantise the model again, for instance to Q4_K_M or \
             Q8_0"
        )
    })?;
    // Blocks lie along the first dimension, which is the last of a tensor here.
    let values = stored.block().0;
    let row = dims.first().copied().unwrap_or(1);
    if !row.is_multiple_of(values) {
        return Err(format!(
            "tensor `{name}` has rows of {row} values, expected a multiple of the block size {values}"
        ));
    }
    dims.reverse();
    let shape = Shape::new(&dims).map_err(|why| format!("tensor `{name}`: {why}"))?;
    Ok((name, shape, stored, cursor.u64()?))
}

/// The types by their numbers, or the name of one that is not read.
fn stored(kind: u32) -> Result<Stored, String> {
    if let Some(&quantized) = QuantType::ALL.iter().find(|quantized| quantized.number() == kind) {
        return Ok(Stored::Quantized(quantized));
    }
    Ok(match kind {
        0 => Stored::F32,
        1 => Stored::F16,
        24 => Stored::I8,
        25 => Stored::I16,
        26 => Stored::I32,
        27 => Stored::I64,
        28 => Stored::F64,
        30 => Stored::BF16,
        other => {
            let name = UNREAD.iter().find(|(kind, _)| *kind == other).map(|(_, name)| name.to_string());
            return Err(name.unwrap_or_else(|| format!("of the unknown type {other}")));
        }
    })
}

/// The names of types that are not read: those of computations, of one to three bits, and of other families.
const UNREAD: [(u32, &str); 20] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (36, "IQ4_NL_4_4"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

/// The names of the types that are read.
const READ: &str = "F32, F16, BF16, F64, I8, I16, I32, I64, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, \
    IQ4_NL, IQ4_XS";

fn name(cursor: &mut Cursor) -> Parsed<String> {
    let name = text(cursor)?;
    if name.len() > MAX_NAME {
        return Err(format!("has a name of {} bytes, expected at most {MAX_NAME}", name.len()));
    }
    Ok(name)
}

fn text(cursor: &mut Cursor) -> Parsed<String> {
    let length = cursor.count(1, "bytes of text")?;
    let at = cursor.at();
    let bytes = cursor.take(length)?;
    str::from_utf8(bytes).map(str::to_string).map_err(|_| format!("has invalid UTF-8 at byte {at}"))
}

/// The values of metadata, limited in number.
struct Values<'a> {
    cursor: Cursor<'a>,
    left: usize,
}

impl Values<'_> {
    fn value(&mut self, name: &str) -> Parsed<Metadata> {
        let kind = self.cursor.u32()?;
        self.of_kind(kind, name, 0)
    }

    fn of_kind(&mut self, kind: u32, name: &str, depth: usize) -> Parsed<Metadata> {
        let Some(left) = self.left.checked_sub(1) else {
            return Err(format!("has more than {MAX_VALUES} metadata values"));
        };
        self.left = left;
        let cursor = &mut self.cursor;
        Ok(match kind {
            0 => Metadata::Int(cursor.u8()?.into()),
            1 => Metadata::Int((cursor.u8()? as i8).into()),
            2 => Metadata::Int(cursor.u16()?.into()),
            3 => Metadata::Int((cursor.u16()? as i16).into()),
            4 => Metadata::Int(cursor.u32()?.into()),
            5 => Metadata::Int((cursor.u32()? as i32).into()),
            6 => Metadata::Float(f32::from_bits(cursor.u32()?).into()),
            7 => match cursor.u8()? {
                0 => Metadata::Bool(false),
                1 => Metadata::Bool(true),
                other => return Err(format!("has metadata `{name}` with the boolean {other}, expected 0 or 1")),
            },
            8 => Metadata::Text(text(cursor)?),
            9 => {
                if depth == MAX_DEPTH {
                    return Err(format!("has metadata `{name}` with lists nested more than {MAX_DEPTH} deep"));
                }
                let kind = cursor.u32()?;
                let least = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    9 => 12,
                    _ => 8,
                };
                let count = cursor.count(least, "values")?;
                let values = (0..count).map(|_| self.of_kind(kind, name, depth + 1));
                Metadata::List(values.try_collect_vec()?)
            }
            10 => {
                let value = cursor.u64()?;
                i64::try_from(value).map_or(Metadata::Unsigned(value), Metadata::Int)
            }
            11 => Metadata::Int(cursor.u64()? as i64),
            12 => Metadata::Float(f64::from_bits(cursor.u64()?)),
            other => return Err(format!("has metadata `{name}` of the unknown type {other}")),
        })
    }
}
