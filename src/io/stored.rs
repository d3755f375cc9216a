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
    quantised,
    source::Source,
    tensor_file::Entry,
};
use crate::{DType, Device, Error, ErrorKind, Result, Tensor, device::cpu, dtype::Element};

/// Storage type of a tensor's values in a file.
///
/// The types `Q…` and `Iq…` are GGUF's quantised types: blocks of 32 or 256 values with common scales, each value read
/// as [`DType::F32`]. [`Stored::dequantize`] converts their bytes to values.
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
    /// `scale · q` with 8-bit `q`; read as [`DType::F32`].
    Q8_0,
    /// `scale · (q − 8)` with 4-bit `q`; read as [`DType::F32`].
    Q4_0,
    /// `scale · q + least` with 4-bit `q`; read as [`DType::F32`].
    Q4_1,
    /// `scale · (q − 16)` with 5-bit `q`; read as [`DType::F32`].
    Q5_0,
    /// `scale · q + least` with 5-bit `q`; read as [`DType::F32`].
    Q5_1,
    /// 2-bit integers, a scale and a minimum for each 16 values; read as [`DType::F32`].
    Q2K,
    /// 3-bit integers, a scale for each 16 values; read as [`DType::F32`].
    Q3K,
    /// 4-bit integers, a scale and a minimum for each 32 values; read as [`DType::F32`].
    Q4K,
    /// 5-bit integers, a scale and a minimum for each 32 values; read as [`DType::F32`].
    Q5K,
    /// 6-bit integers, a scale for each 16 values; read as [`DType::F32`].
    Q6K,
    /// 4-bit indices of a table of values, a scale for each 32; read as [`DType::F32`].
    Iq4Nl,
    /// The same with integer scales in blocks of 256; read as [`DType::F32`].
    Iq4Xs,
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
            Self::Q8_0 => (32, 34),
            Self::Q4_0 | Self::Iq4Nl => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
            Self::Iq4Xs => (256, 136),
        }
    }

    /// Returns the dtype of the tensor that is read.
    pub fn dtype(self) -> DType {
        match self {
            Self::F64 => DType::F64,
            Self::F8E4M3 | Self::F8E5M2 | Self::F8E4M3Fnuz | Self::F8E5M2Fnuz | Self::F8E8M0 => DType::F32,
            Self::F32
            | Self::Q8_0
            | Self::Q4_0
            | Self::Q4_1
            | Self::Q5_0
            | Self::Q5_1
            | Self::Q2K
            | Self::Q3K
            | Self::Q4K
            | Self::Q5K
            | Self::Q6K
            | Self::Iq4Nl
            | Self::Iq4Xs => DType::F32,
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
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Iq4Nl => "IQ4_NL",
            Self::Iq4Xs => "IQ4_XS",
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
        Stored::Q8_0
        | Stored::Q4_0
        | Stored::Q4_1
        | Stored::Q5_0
        | Stored::Q5_1
        | Stored::Q2K
        | Stored::Q3K
        | Stored::Q4K
        | Stored::Q5K
        | Stored::Q6K
        | Stored::Iq4Nl
        | Stored::Iq4Xs => quantised::read(source, entry),
    }
}

/// Refuses the values from 2⁶³ on, which the bits of an i64 make negative.
fn check_u64(values: &[i64]) -> Parsed<()> {
    match values.iter().find(|&&value| value < 0) {
        Some(&value) => Err(format!("contains {}, which exceeds the range of i64", value as u64)),
        None => Ok(()),
    }
}

/// Copies the bytes of a tensor as they lie in the file, which has them.
pub(super) fn raw(source: &Source, entry: &Entry) -> Reading<Vec<u8>> {
    if entry.strides.is_some() {
        return Err(
            "is a view that is not contiguous, so it has no bytes of its own; save it with `.contiguous()`".into()
        );
    }
    let size = entry.stored.bytes(entry.shape.numel()).ok_or("is too large")?;
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(size)
        .map_err(|_| Error::new(ErrorKind::OutOfMemory { requested: size, live: 0, cached: 0 }))?;
    bytes.resize(size, 0);
    read_parts(source, entry.start, &mut bytes)?;
    Ok(bytes)
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
