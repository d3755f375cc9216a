//! Tensors by name in a file, in the format of <https://github.com/huggingface/safetensors>: eight bytes with the
//! length of a JSON header, the header (dtype, shape and position of each tensor), then the values without gaps.
//!
//! Files are not trusted: everything that a file claims is checked against its size before memory is allocated.

use std::{
    collections::BTreeMap,
    fmt,
    io::{self, Write},
    path::Path,
};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error as _, MapAccess, Visitor},
};

use super::{
    bytes::{Parsed, Reading},
    mistaken,
    source::{MAX_HEADER, Source},
    stored::Stored,
    tensor_file::{Entry, Listed, Listing},
    write_atomically,
};
use crate::{
    DType, Device, Error, Result, Shape, Tensor,
    collect::CollectVec,
    error::ensure,
    ordered::{ordered, try_ordered},
    sort::{order, sort_by},
};

const _: () = assert!(cfg!(target_endian = "little"), "values are read and written without swapping their bytes");

/// Number of bytes before the header, which hold its length.
const LENGTH: usize = 8;

/// Entry of a header that is not a tensor.
const METADATA: &str = "__metadata__";

/// Reads every tensor of a safetensors file to the CPU.
///
/// F64, F32, BF16, F16, I64 and BOOL keep their type, other integers become [`DType::I64`], and 8-bit floats
/// [`DType::F32`].
///
/// Errors: [`ErrorKind::Io`](crate::ErrorKind::Io) if the file cannot be read;
/// [`ErrorKind::File`](crate::ErrorKind::File) with a description if it is not a regular file, is truncated, is not a
/// safetensors file, has a tensor of another dtype or more than six dimensions, or positions that overlap, leave gaps,
/// contradict shape and dtype, or lie past the end; or is written to while it is read.
#[doc(alias = "load_file")]
pub fn read_safetensors(path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    read_with_metadata(path.as_ref()).map(|(tensors, _)| tensors)
}

/// Like [`read_safetensors`], but also returns the metadata.
pub(crate) fn read_with_metadata(path: &Path) -> Result<(BTreeMap<String, Tensor>, BTreeMap<String, String>)> {
    let source = Source::open(path)?;
    let found = parse(&source);
    source.check_unchanged()?;
    let Found { tensors, metadata, values } = found.map_err(|why| why.within(&source))?;
    let tensors = tensors.into_iter().map(|(name, info)| {
        let entry = entry(&info, values).map_err(|why| Error::file(path, format_args!("tensor `{name}` {why}")))?;
        let tensor = entry.read(&source, &name)?;
        Ok((name, tensor))
    });
    Ok((try_ordered(tensors)?, metadata))
}

/// Returns the tensors and the metadata of a file.
pub(super) fn listing(source: &Source) -> Reading<Listing> {
    let Found { tensors, metadata, values } = parse(source)?;
    let metadata = ordered(metadata.into_iter().map(|(name, text)| (name, super::Metadata::Text(text))));
    let listed = tensors.into_iter().map(|(name, info)| {
        let listed = entry(&info, values).map_or_else(Listed::unreadable, Listed::Tensor);
        (name, listed)
    });
    Ok(Listing { listed: listed.collect(), metadata })
}

/// Content of a header, and the offset of the values.
struct Found {
    tensors: Vec<(String, TensorInfo)>,
    metadata: BTreeMap<String, String>,
    values: usize,
}

/// Reads a header and checks that the tensors cover the rest of the file without gaps.
fn parse(source: &Source) -> Reading<Found> {
    let total = source.len();
    let Some(left) = total.checked_sub(LENGTH) else {
        return Err(format!("has {total} bytes, too few for a safetensors file").into());
    };
    let mut beginning = vec![0; total.min(mistaken::BEGINNING)];
    source.read_at(0, &mut beginning)?;
    if let Some(what) = mistaken::not_weights(&beginning) {
        return Err(what.into());
    }
    let length = u64::from_le_bytes(source.array(0)?);
    let length = match usize::try_from(length) {
        Ok(length) if length <= MAX_HEADER => length,
        _ => {
            let why = format!("it starts with a header length of {length} bytes, expected at most {MAX_HEADER}");
            return Err(format!("is not a safetensors file: {why}").into());
        }
    };
    let Some(left) = left.checked_sub(length) else {
        return Err(format!("is truncated: its header has {length} bytes, but the file only {total}").into());
    };
    let values = LENGTH + length;
    let header = &source.part(LENGTH..values, "a header")?[..];
    let header: Header = serde_json::from_slice(header).map_err(|why| format!("has an invalid header: {why}"))?;
    let mut tensors = header.tensors;
    sort_by(&mut tensors, |a, b| a.1.data_offsets.cmp(&b.1.data_offsets));
    let described =
        Metadata::new(None, tensors.clone()).map_err(|why| format!("has an invalid header: {why}"))?.data_len();
    if described != left {
        return Err(format!(
            "is truncated or damaged: the header describes {described} bytes of values, but {left} follow"
        )
        .into());
    }
    Ok(Found { tensors, metadata: header.metadata.unwrap_or_default(), values })
}

/// Returns the place of a tensor, or the reason why it is not read.
fn entry(info: &TensorInfo, values: usize) -> Parsed<Entry> {
    let stored = match info.dtype {
        Dtype::F64 => Stored::F64,
        Dtype::F32 => Stored::F32,
        Dtype::BF16 => Stored::BF16,
        Dtype::F16 => Stored::F16,
        Dtype::F8_E4M3 => Stored::F8E4M3,
        Dtype::F8_E5M2 => Stored::F8E5M2,
        Dtype::F8_E4M3FNUZ => Stored::F8E4M3Fnuz,
        Dtype::F8_E5M2FNUZ => Stored::F8E5M2Fnuz,
        Dtype::F8_E8M0 => Stored::F8E8M0,
        Dtype::I64 => Stored::I64,
        Dtype::I32 => Stored::I32,
        Dtype::I16 => Stored::I16,
        Dtype::I8 => Stored::I8,
        Dtype::U64 => Stored::U64,
        Dtype::U32 => Stored::U32,
        Dtype::U16 => Stored::U16,
        Dtype::U8 => Stored::U8,
        Dtype::BOOL => Stored::Bool,
        other => {
            return Err(format!(
                "is {other:?}, expected one of F64, F32, BF16, F16, the F8 types, I64, I32, I16, I8, U64, U32, U16, U8, BOOL"
            ));
        }
    };
    let shape = Shape::new(&info.shape).map_err(|why| why.to_string())?;
    Ok(Entry { part: 0, stored, shape, strides: None, start: values + info.data_offsets.0 })
}

/// Content of a header. Parsed here and not by the safetensors crate, which keeps the last of several entries with
/// the same name and allocates memory for fields that it does not know.
struct Header {
    tensors: Vec<(String, TensorInfo)>,
    metadata: Option<BTreeMap<String, String>>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with one entry per tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let (mut tensors, mut metadata) = (Vec::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        if metadata.replace(map.next_value()?).is_some() {
                            return Err(A::Error::custom("`__metadata__` occurs twice"));
                        }
                        continue;
                    }
                    let info = map.next_value().map_err(|why| A::Error::custom(format!("tensor `{name}`: {why}")))?;
                    tensors.push((name, info));
                }
                let names = order(tensors.len(), |a, b| tensors[a].0.cmp(&tensors[b].0));
                match names.windows(2).find(|two| tensors[two[0]].0 == tensors[two[1]].0) {
                    Some(twice) => Err(A::Error::custom(format!("tensor `{}` occurs twice", tensors[twice[0]].0))),
                    None => Ok(Header { tensors, metadata }),
                }
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// An entry of a header to be written.
#[derive(Serialize)]
#[serde(untagged)]
enum Described<'a> {
    Metadata(&'a BTreeMap<String, String>),
    Tensor(TensorInfo),
}

/// Writes tensors and metadata to a safetensors file, replacing it atomically ([`write_atomically`]). The same tensors
/// give the same bytes.
///
/// Errors, with the old file intact: a tensor named `__metadata__`, which the format reserves, or
/// [`ErrorKind::Io`](crate::ErrorKind::Io).
#[doc(alias = "save_file")]
pub fn write_safetensors(
    path: impl AsRef<Path>,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    pack(path, tensors, metadata, |write| write_atomically(path, write))
}

/// Gives `deliver` what writes the content of a safetensors file.
///
/// Errors: those of [`write_safetensors`] and `deliver`.
pub(crate) fn pack(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
    deliver: impl FnOnce(&dyn Fn(&mut dyn Write) -> io::Result<()>) -> Result<()>,
) -> Result<()> {
    let described = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.dtype(), *tensor.shape())).collect_vec();
    let Places { header, tensors: places, .. } = places(path, described, metadata)?;
    let packed = places.iter().map(|(name, ..)| tensors[*name].detach().contiguous()?.to_device(&Device::Cpu));
    let packed = packed.try_collect_vec()?;
    let bytes = packed.iter().map(Tensor::bytes).try_collect_vec()?;
    deliver(&|file| {
        file.write_all(&header)?;
        bytes.iter().try_for_each(|bytes| file.write_all(bytes))
    })
}

/// Beginning of a safetensors file, and the place of each tensor in the file, in the order of places.
pub(crate) struct Places<'a> {
    pub header: Vec<u8>,
    pub tensors: Vec<(&'a str, usize)>,
    /// Bytes of the file.
    pub bytes: usize,
}

/// Places tensors, given in the order of their names.
///
/// Errors: those of [`write_safetensors`].
pub(crate) fn places<'a>(
    path: &Path,
    mut tensors: Vec<(&'a str, DType, Shape)>,
    metadata: &BTreeMap<String, String>,
) -> Result<Places<'a>> {
    ensure!(
        tensors.iter().all(|(name, ..)| *name != METADATA),
        Error::argument("write_safetensors", format_args!("the name `{METADATA}` is reserved by the format"))
    );
    // Wide elements first, so that every tensor is aligned to its element; by name among equals.
    sort_by(&mut tensors, |a, b| b.1.size().cmp(&a.1.size()));
    let mut header = BTreeMap::new();
    if !metadata.is_empty() {
        header.insert(METADATA, Described::Metadata(metadata));
    }
    let mut start = 0;
    let mut places = Vec::with_capacity(tensors.len());
    for (name, dtype, shape) in tensors {
        let end = start + shape.numel() * dtype.size();
        let info = TensorInfo { dtype: stored_dtype(dtype), shape: shape.to_vec(), data_offsets: (start, end) };
        header.insert(name, Described::Tensor(info));
        places.push((name, start));
        start = end;
    }
    let mut header = serde_json::to_vec(&header).map_err(|error| Error::io(path, error.into()))?;
    header.resize(header.len().next_multiple_of(LENGTH), b' ');
    ensure!(
        header.len() <= MAX_HEADER,
        Error::file(path, format_args!("would have a header of {} bytes, expected at most {MAX_HEADER}", header.len()))
    );
    let header = [&(header.len() as u64).to_le_bytes(), &header[..]].concat();
    places.iter_mut().for_each(|(_, start)| *start += header.len());
    Ok(Places { bytes: header.len() + start, header, tensors: places })
}

fn stored_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::I64 => Dtype::I64,
        DType::Bool => Dtype::BOOL,
    }
}
