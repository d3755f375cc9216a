//! Element types of files, and how their bytes become tensors.

use half::{bf16, f16};

use super::bytes::Parsed;
use crate::{DType, Device, Result, Shape, Tensor, core::Element};

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

/// Why a tensor could not be made of its bytes.
pub(super) enum Unreadable {
    Content(String),
    Tensor(crate::Error),
}

impl From<crate::Error> for Unreadable {
    fn from(error: crate::Error) -> Self {
        Self::Tensor(error)
    }
}

/// A tensor of bytes, exactly as many as shape and type say; they need no alignment.
pub(super) fn decode(bytes: &[u8], shape: Shape, stored: Stored) -> std::result::Result<Tensor, Unreadable> {
    debug_assert_eq!(Some(bytes.len()), stored.bytes(shape.elements()));
    match stored {
        Stored::F64 => Ok(plain::<f64>(bytes, shape)?),
        Stored::F32 => Ok(plain::<f32>(bytes, shape)?),
        Stored::BF16 => Ok(plain::<bf16>(bytes, shape)?),
        Stored::F16 => Ok(plain::<f16>(bytes, shape)?),
        Stored::I64 => Ok(plain::<i64>(bytes, shape)?),
        Stored::I32 => Ok(blocks(bytes, shape, |bytes: [u8; 4]| [i32::from_le_bytes(bytes) as i64])?),
        Stored::I16 => Ok(blocks(bytes, shape, |bytes: [u8; 2]| [i16::from_le_bytes(bytes) as i64])?),
        Stored::I8 => Ok(blocks(bytes, shape, |bytes: [u8; 1]| [i8::from_le_bytes(bytes) as i64])?),
        Stored::U8 => Ok(blocks(bytes, shape, |[byte]: [u8; 1]| [byte as i64])?),
        Stored::Bool => {
            check_bool(bytes).map_err(Unreadable::Content)?;
            Ok(plain::<bool>(bytes, shape)?)
        }
        Stored::Q8_0 => Ok(blocks(bytes, shape, q8_0)?),
        Stored::Q4_0 => Ok(blocks(bytes, shape, q4_0)?),
        Stored::Q4_1 => Ok(blocks(bytes, shape, q4_1)?),
    }
}

fn check_bool(bytes: &[u8]) -> Parsed<()> {
    match bytes.iter().find(|&&byte| byte > 1) {
        Some(byte) => Err(format!("is BOOL but holds the byte {byte}, expected 0 or 1")),
        None => Ok(()),
    }
}

/// Values that lie in the file as they do in memory.
fn plain<E: Element>(bytes: &[u8], shape: Shape) -> Result<Tensor> {
    let mut tensor = Tensor::uninit(shape, E::DTYPE, &Device::Cpu)?;
    bytemuck::cast_slice_mut(tensor.values_mut::<E>()?).copy_from_slice(bytes);
    Ok(tensor)
}

/// Values from blocks of `N` bytes, `M` of each.
fn blocks<E: Element, const N: usize, const M: usize>(
    bytes: &[u8],
    shape: Shape,
    values: fn([u8; N]) -> [E; M],
) -> Result<Tensor> {
    let mut tensor = Tensor::uninit(shape, E::DTYPE, &Device::Cpu)?;
    for (to, block) in tensor.values_mut::<E>()?.chunks_exact_mut(M).zip(bytes.as_chunks::<N>().0) {
        for (to, value) in to.iter_mut().zip(values(*block)) {
            *to = value.to_stored();
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
