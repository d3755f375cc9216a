//! Element types of files, and the conversion of their bytes to tensors.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

use half::{bf16, f16};

use super::{
    bytes::{Parsed, Reading},
    float8,
    gather::gather,
    source::Source,
    tensor_file::Entry,
};
use crate::{
    DType, Device, Error, ErrorKind, QuantType, Result, Shape, Tensor, device::cpu, dtype::Element, ops::PackedMatrix,
    quantised::decode,
};

/// Storage type of a tensor's values in a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Stored {
    /// Read as [`DType::F64`].
    F64,
    /// Read as [`DType::F32`].
    F32,
    /// Read as [`DType::BF16`].
    BF16,
    /// Read as [`DType::F16`].
    F16,
    /// Read as [`DType::I64`].
    I64,
    /// Read as [`DType::I64`].
    I32,
    /// Read as [`DType::I64`].
    I16,
    /// Read as [`DType::I64`].
    I8,
    /// Read as [`DType::I64`].
    U8,
    /// Read as [`DType::I64`].
    U16,
    /// Read as [`DType::I64`].
    U32,
    /// Read as [`DType::I64`], which holds values below 2⁶³.
    U64,
    /// Read as [`DType::Bool`].
    Bool,
    /// PyTorch's `float8_e4m3fn`; read as [`DType::F32`].
    F8E4M3,
    /// PyTorch's `float8_e5m2`; read as [`DType::F32`].
    F8E5M2,
    /// PyTorch's `float8_e4m3fnuz`; read as [`DType::F32`].
    F8E4M3Fnuz,
    /// PyTorch's `float8_e5m2fnuz`; read as [`DType::F32`].
    F8E5M2Fnuz,
    /// PyTorch's `float8_e8m0fnu`, powers of two; read as [`DType::F32`].
    F8E8M0,
    /// One of GGUF's quantised types: blocks of 32 or 256 values with common scales; read as [`DType::F32`].
    Quantized(QuantType),
}

impl Stored {
    /// Returns the numbers of values and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F64 | Self::I64 | Self::U64 => (1, 8),
            Self::F32 | Self::I32 | Self::U32 => (1, 4),
            Self::BF16 | Self::F16 | Self::I16 | Self::U16 => (1, 2),
            Self::I8 | Self::U8 | Self::Bool => (1, 1),
            Self::F8E4M3 | Self::F8E5M2 | Self::F8E4M3Fnuz | Self::F8E5M2Fnuz | Self::F8E8M0 => (1, 1),
            Self::Quantized(kind) => kind.block(),
        }
    }

    /// Returns the dtype of the tensor that is read.
    pub fn dtype(self) -> DType {
        match self {
            Self::F64 => DType::F64,
            Self::F8E4M3 | Self::F8E5M2 | Self::F8E4M3Fnuz | Self::F8E5M2Fnuz | Self::F8E8M0 => DType::F32,
            Self::F32 | Self::Quantized(_) => DType::F32,
            Self::BF16 => DType::BF16,
            Self::F16 => DType::F16,
            Self::I64 | Self::I32 | Self::I16 | Self::I8 => DType::I64,
            Self::U64 | Self::U32 | Self::U16 | Self::U8 => DType::I64,
            Self::Bool => DType::Bool,
        }
    }

    /// Bytes that this number of values takes, if whole blocks hold them.
    pub(super) fn bytes(self, elements: usize) -> Option<usize> {
        let (values, bytes) = self.block();
        elements.is_multiple_of(values).then(|| (elements / values).checked_mul(bytes))?
    }
}

/// The name in safetensors and GGUF files, `Q4_K` for instance.
impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::BF16 => "BF16",
            Self::F16 => "F16",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::U16 => "U16",
            Self::U32 => "U32",
            Self::U64 => "U64",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E4M3Fnuz => "F8_E4M3FNUZ",
            Self::F8E5M2Fnuz => "F8_E5M2FNUZ",
            Self::F8E8M0 => "F8_E8M0",
            Self::Bool => "BOOL",
            Self::Quantized(kind) => kind.name(),
        })
    }
}

/// Bytes of the file that are held while integers are converted.
const CHUNK: usize = 1 << 18;

/// Reads a tensor into its own memory.
pub(super) fn read(source: &Source, entry: &Entry) -> Reading<Tensor> {
    match entry.stored {
        Stored::F64 => plain::<f64, 8>(source, entry),
        Stored::F32 => plain::<f32, 4>(source, entry),
        Stored::BF16 => plain::<bf16, 2>(source, entry),
        Stored::F16 => plain::<f16, 2>(source, entry),
        Stored::I64 => plain::<i64, 8>(source, entry),
        Stored::I32 => converted(source, entry, |bytes: [u8; 4]| i32::from_le_bytes(bytes) as i64),
        Stored::I16 => converted(source, entry, |bytes: [u8; 2]| i16::from_le_bytes(bytes) as i64),
        Stored::I8 => converted(source, entry, |bytes: [u8; 1]| i8::from_le_bytes(bytes) as i64),
        Stored::U8 => converted(source, entry, |[byte]: [u8; 1]| byte as i64),
        Stored::U16 => converted(source, entry, |bytes: [u8; 2]| u16::from_le_bytes(bytes) as i64),
        Stored::U32 => converted(source, entry, |bytes: [u8; 4]| u32::from_le_bytes(bytes) as i64),
        Stored::U64 => {
            let mut tensor = plain::<i64, 8>(source, entry)?;
            check_u64(tensor.values_mut::<i64>()?)?;
            Ok(tensor)
        }
        Stored::F8E4M3 => converted(source, entry, |[byte]: [u8; 1]| float8::e4m3(byte)),
        Stored::F8E5M2 => converted(source, entry, |[byte]: [u8; 1]| float8::e5m2(byte)),
        Stored::F8E4M3Fnuz => converted(source, entry, |[byte]: [u8; 1]| float8::e4m3_fnuz(byte)),
        Stored::F8E5M2Fnuz => converted(source, entry, |[byte]: [u8; 1]| float8::e5m2_fnuz(byte)),
        Stored::F8E8M0 => converted(source, entry, |[byte]: [u8; 1]| float8::e8m0(byte)),
        Stored::Bool => {
            let mut tensor = plain::<bool, 1>(source, entry)?;
            check_bool(tensor.values_mut::<bool>()?)?;
            Ok(tensor)
        }
        Stored::Quantized(kind) => dequantized(source, entry, kind),
    }
}

/// Refuses the values from 2⁶³ on, which the bits of an i64 make negative.
fn check_u64(values: &[i64]) -> Parsed<()> {
    match values.iter().find(|&&value| value < 0) {
        Some(&value) => Err(format!("contains {}, which exceeds the range of i64", value as u64)),
        None => Ok(()),
    }
}

/// Copies the bytes of a tensor as they lie in the file, up to a limit.
pub(super) fn raw(source: &Source, entry: &Entry, most: usize) -> Reading<Vec<u8>> {
    if entry.strides.is_some() {
        return Err(
            "is a view that is not contiguous, so it has no bytes of its own; save it with `.contiguous()`".into()
        );
    }
    let size = entry.stored.bytes(entry.shape.numel()).ok_or("is too large")?.min(most);
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(size)
        .map_err(|_| Error::new(ErrorKind::OutOfMemory { requested: size, live: 0, cached: 0 }))?;
    bytes.resize(size, 0);
    read_parts(source, entry.start, &mut bytes)?;
    Ok(bytes)
}

/// Reads the blocks of a matrix of a quantised type as they lie in the file, and makes a matrix of other rows of them.
pub(super) fn packed(source: &Source, entry: &Entry, rows: &dyn Fn(Tensor) -> Result<Tensor>) -> Reading<PackedMatrix> {
    let (Stored::Quantized(kind), &[count, columns]) = (entry.stored, &entry.shape[..]) else {
        return Err(format!("is {} {:?}, not a matrix of a quantised type", entry.stored, entry.shape).into());
    };
    if !kind.is_packed() {
        return Err(format!("is {kind}, which is not multiplied packed; dequantise it").into());
    }
    let (values, bytes) = kind.block();
    let mut blocks = Tensor::uninit(Shape::new(&[count, columns / values * bytes])?, DType::Bool, &Device::Cpu)?;
    read_parts(source, entry.start, blocks.values_mut::<bool>()?)?;
    PackedMatrix::of_blocks(kind, columns, rows(blocks)?).map_err(|_| "holds NaN or infinity".into())
}

fn check_bool(bytes: &[u8]) -> Parsed<()> {
    match bytes.iter().find(|&&byte| byte > 1) {
        Some(byte) => Err(format!("is BOOL but contains the byte {byte}, expected 0 or 1")),
        None => Ok(()),
    }
}

/// Values that lie in the file as they do in memory, `N` bytes each.
fn plain<E: Element, const N: usize>(source: &Source, entry: &Entry) -> Reading<Tensor> {
    let mut tensor = Tensor::uninit(entry.shape, E::DTYPE, &Device::Cpu)?;
    let out = tensor.values_mut::<E>()?;
    match &entry.strides {
        None => read_parts(source, entry.start, bytemuck::cast_slice_mut(out))?,
        Some(strides) => gather(source, entry.start, &entry.shape, strides, out, |bytes: [u8; N]| {
            bytemuck::pod_read_unaligned(&bytes)
        })?,
    }
    Ok(tensor)
}

/// Reads bytes on all threads: of the copy out of the system's cache each has its part of the memory's speed.
fn read_parts(source: &Source, start: usize, to: &mut [u8]) -> Result<()> {
    /// Bytes and cost of a row: a thread gets at least half a MiB.
    const ROW: usize = 1 << 10;
    const COST: usize = 64;
    let failure = Mutex::new(None);
    cpu::for_rows(to, ROW, COST, |row, part| {
        if let Err(error) = source.read_at(start + row * ROW, part) {
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Values of `N` bytes each that have another type in memory.
fn converted<E: Element, const N: usize>(source: &Source, entry: &Entry, value: fn([u8; N]) -> E) -> Reading<Tensor> {
    let mut tensor = Tensor::uninit(entry.shape, E::DTYPE, &Device::Cpu)?;
    let out = tensor.values_mut::<E>()?;
    if let Some(strides) = &entry.strides {
        gather(source, entry.start, &entry.shape, strides, out, |bytes: [u8; N]| value(bytes).to_stored())?;
        return Ok(tensor);
    }
    let mut chunk = vec![[0; N]; (CHUNK / N).min(out.len())];
    let mut at = entry.start;
    for out in out.chunks_mut(CHUNK / N) {
        let chunk = &mut chunk[..out.len()];
        source.read_at(at, chunk.as_flattened_mut())?;
        at += chunk.len() * N;
        for (to, bytes) in out.iter_mut().zip(chunk) {
            *to = value(*bytes).to_stored();
        }
    }
    Ok(tensor)
}

/// Reads a tensor of a quantised type as f32, each thread its own blocks.
fn dequantized(source: &Source, entry: &Entry, kind: QuantType) -> Reading<Tensor> {
    /// Bytes of the file that a thread holds while it converts them, rounded down to whole blocks.
    const CHUNK: usize = 1 << 16;
    /// Element operations per value, for dividing the work among threads.
    const COST: usize = 4;
    let mut tensor = Tensor::uninit(entry.shape, DType::F32, &Device::Cpu)?;
    let (values, bytes) = kind.block();
    let failure = Mutex::new(None);
    cpu::for_rows(tensor.values_mut::<f32>()?, values, COST * values, |first, out| {
        let mut chunk = vec![0; (CHUNK / bytes).min(out.len() / values) * bytes];
        let mut at = entry.start + first * bytes;
        for out in out.chunks_mut((CHUNK / bytes) * values) {
            let chunk = &mut chunk[..out.len() / values * bytes];
            if let Err(error) = source.read_at(at, chunk) {
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                return;
            }
            at += chunk.len();
            decode(kind, chunk, out);
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error.into()),
        None => Ok(tensor),
    }
}
