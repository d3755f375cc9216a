//! Element types of files, and how their bytes become tensors.

use std::sync::{Mutex, PoisonError};

use half::{bf16, f16};

use super::{
    bytes::{Parsed, Reading},
    gather::gather,
    source::Source,
    tensor_file::Entry,
};
use crate::{DType, Device, Result, Tensor, core::Element, device::cpu};

/// How the values of a tensor lie in a file.
///
/// The types `Q…` are those of GGUF: blocks of 32 values with a common scale, read as f32.
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
    /// Read as [`DType::Bool`].
    Bool,
    /// `scale · q` with 8-bit `q`; read as [`DType::F32`].
    Q8_0,
    /// `scale · (q − 8)` with 4-bit `q`; read as [`DType::F32`].
    Q4_0,
    /// `scale · q + least` with 4-bit `q`; read as [`DType::F32`].
    Q4_1,
}

impl Stored {
    /// Values of a block, and its bytes.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F64 | Self::I64 => (1, 8),
            Self::F32 | Self::I32 => (1, 4),
            Self::BF16 | Self::F16 | Self::I16 => (1, 2),
            Self::I8 | Self::U8 | Self::Bool => (1, 1),
            Self::Q8_0 => (BLOCK, 34),
            Self::Q4_0 => (BLOCK, 18),
            Self::Q4_1 => (BLOCK, 20),
        }
    }

    /// The dtype of the tensor that is read.
    pub fn dtype(self) -> DType {
        match self {
            Self::F64 => DType::F64,
            Self::F32 | Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => DType::F32,
            Self::BF16 => DType::BF16,
            Self::F16 => DType::F16,
            Self::I64 | Self::I32 | Self::I16 | Self::I8 | Self::U8 => DType::I64,
            Self::Bool => DType::Bool,
        }
    }

    /// Bytes that so many values take, if whole blocks hold them.
    pub(super) fn bytes(self, elements: usize) -> Option<usize> {
        let (values, bytes) = self.block();
        elements.is_multiple_of(values).then(|| (elements / values).checked_mul(bytes))?
    }
}

/// Values of a block of a quantised type.
const BLOCK: usize = 32;

/// Bytes of the file that are held while values are converted, rounded down to whole blocks.
const CHUNK: usize = 1 << 18;

/// Reads a tensor into its own memory.
pub(super) fn read(source: &Source, entry: &Entry) -> Reading<Tensor> {
    match entry.stored {
        Stored::F64 => plain::<f64, 8>(source, entry),
        Stored::F32 => plain::<f32, 4>(source, entry),
        Stored::BF16 => plain::<bf16, 2>(source, entry),
        Stored::F16 => plain::<f16, 2>(source, entry),
        Stored::I64 => plain::<i64, 8>(source, entry),
        Stored::I32 => blocks(source, entry, |bytes: [u8; 4]| [i32::from_le_bytes(bytes) as i64]),
        Stored::I16 => blocks(source, entry, |bytes: [u8; 2]| [i16::from_le_bytes(bytes) as i64]),
        Stored::I8 => blocks(source, entry, |bytes: [u8; 1]| [i8::from_le_bytes(bytes) as i64]),
        Stored::U8 => blocks(source, entry, |[byte]: [u8; 1]| [byte as i64]),
        Stored::Bool => {
            let mut tensor = plain::<bool, 1>(source, entry)?;
            check_bool(tensor.values_mut::<bool>()?)?;
            Ok(tensor)
        }
        Stored::Q8_0 => blocks(source, entry, q8_0),
        Stored::Q4_0 => blocks(source, entry, q4_0),
        Stored::Q4_1 => blocks(source, entry, q4_1),
    }
}

fn check_bool(bytes: &[u8]) -> Parsed<()> {
    match bytes.iter().find(|&&byte| byte > 1) {
        Some(byte) => Err(format!("is BOOL but holds the byte {byte}, expected 0 or 1")),
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

/// Values from blocks of `N` bytes, `M` of each.
fn blocks<E: Element, const N: usize, const M: usize>(
    source: &Source,
    entry: &Entry,
    values: fn([u8; N]) -> [E; M],
) -> Reading<Tensor> {
    let mut tensor = Tensor::uninit(entry.shape, E::DTYPE, &Device::Cpu)?;
    let out = tensor.values_mut::<E>()?;
    if let Some(strides) = &entry.strides {
        // Only types with a value per block have strides.
        gather(source, entry.start, &entry.shape, strides, out, |bytes: [u8; N]| values(bytes)[0].to_stored())?;
        return Ok(tensor);
    }
    let mut chunk = vec![[0; N]; (CHUNK / N).min(out.len() / M)];
    let mut at = entry.start;
    for out in out.chunks_mut((CHUNK / N) * M) {
        let chunk = &mut chunk[..out.len() / M];
        source.read_at(at, chunk.as_flattened_mut())?;
        at += chunk.len() * N;
        for (to, block) in out.chunks_exact_mut(M).zip(chunk) {
            for (to, value) in to.iter_mut().zip(values(*block)) {
                *to = value.to_stored();
            }
        }
    }
    Ok(tensor)
}

/// The half that begins at this byte of a block.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q8_0(block: [u8; 34]) -> [f32; BLOCK] {
    let scale = half(&block, 0);
    std::array::from_fn(|i| scale * block[2 + i] as i8 as f32)
}

/// The 4-bit numbers of sixteen bytes: the low halves first, then the high ones.
fn nibble(bytes: &[u8], i: usize) -> u8 {
    if i < BLOCK / 2 { bytes[i] & 0xF } else { bytes[i - BLOCK / 2] >> 4 }
}

fn q4_0(block: [u8; 18]) -> [f32; BLOCK] {
    let scale = half(&block, 0);
    std::array::from_fn(|i| scale * (nibble(&block[2..], i) as f32 - 8.0))
}

fn q4_1(block: [u8; 20]) -> [f32; BLOCK] {
    let (scale, least) = (half(&block, 0), half(&block, 2));
    std::array::from_fn(|i| scale * nibble(&block[4..], i) as f32 + least)
}
