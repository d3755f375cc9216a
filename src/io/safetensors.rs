//! Tensors by name in a file, in the format of <https://github.com/huggingface/safetensors>: eight bytes with the
//! length of a JSON header, the header (dtype, shape and position of each tensor), then the values without gaps.
//!
//! A file is not trusted: everything it says is checked against its size before memory is taken for it.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
};

use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{Error as _, MapAccess, Visitor},
};

use super::write_atomically;
use crate::{DType, Device, Error, Result, Shape, Tensor, core::Element, error::ensure};

const _: () = assert!(cfg!(target_endian = "little"), "values are read and written without swapping their bytes");

/// Bytes that a header may have: the limit of the format itself.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes that stand before the header: its length.
const LENGTH: u64 = 8;

/// The entry of a header that is no tensor.
const METADATA: &str = "__metadata__";

/// Reads every tensor of a safetensors file, on the CPU.
///
/// F64, F32, BF16, F16, I64 and BOOL come as they are, I32 and U8 as [`DType::I64`].
///
/// Errors: [`Error::Io`] if the file cannot be read; [`Error::File`], which says what is wrong, if it is no regular
/// file, truncated, not a safetensors file, has a tensor of another dtype or more than six dimensions, or positions
/// that overlap, leave gaps, contradict shape and dtype, or lie behind the end.
pub fn read_safetensors(path: impl AsRef<Path>) -> Result<BTreeMap<String, Tensor>> {
    read_with_metadata(path.as_ref()).map(|(tensors, _)| tensors)
}

/// As [`read_safetensors`], with the text about the tensors.
pub(crate) fn read_with_metadata(path: &Path) -> Result<(BTreeMap<String, Tensor>, BTreeMap<String, String>)> {
    let invalid = |why: String| Error::file(path, why);
    let broken = |source: io::Error| Error::io(path, source);
    // Asked before opening: opening a pipe would wait for a writer.
    let found = fs::metadata(path).map_err(broken)?;
    ensure!(found.is_file(), invalid("is not a regular file".into()));
    let mut file = File::open(path).map_err(broken)?;
    let total = file.metadata().map_err(broken)?.len();
    ensure!(total >= LENGTH, invalid(format!("has {total} bytes, which is too short for a safetensors file")));
    let mut length = [0; LENGTH as usize];
    file.read_exact(&mut length).map_err(broken)?;
    let length = u64::from_le_bytes(length);
    ensure!(
        length <= MAX_HEADER,
        invalid(format!("is not a safetensors file: a header of {length} bytes, at most {MAX_HEADER} are allowed"))
    );
    ensure!(
        length <= total - LENGTH,
        invalid(format!("is truncated: a header of {length} bytes in a file of {total}"))
    );
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(broken)?;
    let header: Header = serde_json::from_slice(&header).map_err(|why| invalid(format!("has a bad header: {why}")))?;
    let mut tensors: Vec<_> = header.tensors.into_iter().collect();
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let metadata = Metadata::new(None, tensors.clone()).map_err(|why| invalid(format!("has a bad header: {why}")))?;
    let (described, present) = (metadata.data_len() as u64, total - LENGTH - length);
    ensure!(
        described == present,
        invalid(format!(
            "is truncated or damaged: the header describes {described} bytes of values, there are {present}"
        ))
    );
    // The tensors cover the rest of the file without gaps, which was checked, so that reading goes straight on.
    let tensors = tensors
        .into_iter()
        .map(|(name, info)| {
            let shape = Shape::new(&info.shape).map_err(|why| invalid(format!("tensor `{name}`: {why}")))?;
            let tensor = read_tensor(&mut file, shape, info.dtype).map_err(|problem| match problem {
                Problem::Broken(source) => broken(source),
                Problem::Dtype => invalid(format!(
                    "tensor `{name}` is {:?}, expected one of F64, F32, BF16, F16, I64, I32, U8, BOOL",
                    info.dtype
                )),
                Problem::Bool(value) => {
                    invalid(format!("tensor `{name}` is BOOL but holds the byte {value}, expected 0 or 1"))
                }
                Problem::Tensor(error) => error.at(&name),
            })?;
            Ok((name, tensor))
        })
        .collect::<Result<_>>()?;
    Ok((tensors, header.metadata.unwrap_or_default()))
}

enum Problem {
    Broken(io::Error),
    Dtype,
    Bool(u8),
    Tensor(Error),
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::Tensor(error)
    }
}

fn read_tensor(file: &mut File, shape: Shape, dtype: Dtype) -> std::result::Result<Tensor, Problem> {
    match dtype {
        Dtype::F64 => read_values::<f64>(file, shape),
        Dtype::F32 => read_values::<f32>(file, shape),
        Dtype::BF16 => read_values::<half::bf16>(file, shape),
        Dtype::F16 => read_values::<half::f16>(file, shape),
        Dtype::I64 => read_values::<i64>(file, shape),
        Dtype::I32 => read_widened(file, shape, |bytes: [u8; 4]| i32::from_le_bytes(bytes) as i64),
        Dtype::U8 => read_widened(file, shape, |[byte]: [u8; 1]| byte as i64),
        Dtype::BOOL => {
            let tensor = read_values::<bool>(file, shape)?;
            match tensor.values::<bool>()?.iter().find(|&&byte| byte > 1) {
                Some(&byte) => Err(Problem::Bool(byte)),
                None => Ok(tensor),
            }
        }
        _ => Err(Problem::Dtype),
    }
}

/// Reads straight into the tensor's memory.
fn read_values<E: Element>(file: &mut File, shape: Shape) -> std::result::Result<Tensor, Problem> {
    let mut tensor = Tensor::uninit(shape, E::DTYPE, &Device::Cpu)?;
    file.read_exact(bytemuck::cast_slice_mut(tensor.values_mut::<E>()?))?;
    Ok(tensor)
}

/// Reads integers of `N` bytes, a block at a time.
fn read_widened<const N: usize>(
    file: &mut File,
    shape: Shape,
    widen: fn([u8; N]) -> i64,
) -> std::result::Result<Tensor, Problem> {
    let mut tensor = Tensor::uninit(shape, DType::I64, &Device::Cpu)?;
    let mut block = [[0; N]; 4096];
    for values in tensor.values_mut::<i64>()?.chunks_mut(block.len()) {
        let block = &mut block[..values.len()];
        file.read_exact(block.as_flattened_mut())?;
        for (value, bytes) in values.iter_mut().zip(block) {
            *value = widen(*bytes);
        }
    }
    Ok(tensor)
}

/// What a header says. Parsed here and not by the safetensors crate, which keeps the last of several entries
/// with one name and sets memory aside for fields that it does not know.
struct Header {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: Option<BTreeMap<String, String>>,
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with an entry per tensor")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let (mut tensors, mut metadata) = (BTreeMap::new(), None);
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        if metadata.replace(map.next_value()?).is_some() {
                            return Err(A::Error::custom("`__metadata__` occurs twice"));
                        }
                        continue;
                    }
                    let info = map.next_value().map_err(|why| A::Error::custom(format!("tensor `{name}`: {why}")))?;
                    match tensors.entry(name) {
                        Entry::Vacant(entry) => drop(entry.insert(info)),
                        Entry::Occupied(entry) => {
                            return Err(A::Error::custom(format!("tensor `{}` occurs twice", entry.key())));
                        }
                    }
                }
                Ok(Header { tensors, metadata })
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

/// Writes tensors and some text about them to a safetensors file, replacing it in one step
/// ([`write_atomically`]). The same tensors give the same bytes.
///
/// Errors: a tensor named `__metadata__`, which the format reserves, or [`Error::Io`]; the old file stays then.
pub fn write_safetensors(
    path: impl AsRef<Path>,
    tensors: &BTreeMap<String, Tensor>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    ensure!(
        !tensors.contains_key(METADATA),
        Error::argument("write_safetensors", format!("the name `{METADATA}` is reserved by the format"))
    );
    let mut packed = tensors
        .iter()
        .map(|(name, tensor)| Ok((name.as_str(), tensor.detach().contiguous()?.to_device(&Device::Cpu)?)))
        .collect::<Result<Vec<_>>>()?;
    // Wide elements first, so that every tensor is aligned to its element; by name among equals.
    packed.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype().size()));
    let mut header = BTreeMap::new();
    if !metadata.is_empty() {
        header.insert(METADATA, Described::Metadata(metadata));
    }
    let mut start = 0;
    for (name, tensor) in &packed {
        let end = start + tensor.elements() * tensor.dtype().size();
        let info = TensorInfo {
            dtype: stored_dtype(tensor.dtype()),
            shape: tensor.shape().to_vec(),
            data_offsets: (start, end),
        };
        header.insert(name, Described::Tensor(info));
        start = end;
    }
    let mut header = serde_json::to_vec(&header).map_err(|error| Error::io(path, error.into()))?;
    header.resize(header.len().next_multiple_of(LENGTH as usize), b' ');
    ensure!(
        header.len() as u64 <= MAX_HEADER,
        Error::file(path, format!("would get a header of {} bytes, at most {MAX_HEADER} are allowed", header.len()))
    );
    let bytes = packed.iter().map(|(_, tensor)| tensor.bytes()).collect::<Result<Vec<_>>>()?;
    write_atomically(path, |file: &mut dyn Write| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        bytes.iter().try_for_each(|bytes| file.write_all(bytes))
    })
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
