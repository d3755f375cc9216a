//! Quantised weights: GGUF's blocks of values with common scales, their values and their products.
//!
//! Every value has the bits that the Python package `gguf` gives it (`gguf.quants.dequantize`): the same products in the
//! same order, each rounded to f32.

mod blocks;
mod encode;
mod interleaved;
mod k_blocks;
mod kernels;
mod panels;
mod products;

use std::fmt;

use half::f16;

pub(crate) use self::{
    interleaved::{copy_row, interleave},
    panels::ROWS,
    products::{Activations, multiply},
};

use crate::{Error, Result, device::simd::vectorized, dtype::Float, error::ensure};

/// Quantised type of GGUF: blocks of 32 or 256 values with common scales.
///
/// ```
/// use x_transformers::QuantType;
/// # fn main() -> x_transformers::Result<()> {
/// // A scale of 0.5 as f16, then 32 integers of 8 bits.
/// let mut block = vec![0x00, 0x38];
/// block.extend(0..32);
/// let mut values = [0.0; 32];
/// QuantType::Q8_0.dequantize(&block, &mut values)?;
/// assert_eq!(values[..4], [0.0, 0.5, 1.0, 1.5]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[doc(alias = "GgmlDType")]
#[non_exhaustive]
pub enum QuantType {
    /// `scale · q` with 8-bit `q`.
    Q8_0,
    /// `scale · (q − 8)` with 4-bit `q`.
    Q4_0,
    /// `scale · q + least` with 4-bit `q`.
    Q4_1,
    /// `scale · (q − 16)` with 5-bit `q`.
    Q5_0,
    /// `scale · q + least` with 5-bit `q`.
    Q5_1,
    /// 2-bit integers, a scale and a minimum for each 16 values.
    Q2K,
    /// 3-bit integers, a scale for each 16 values.
    Q3K,
    /// 4-bit integers, a scale and a minimum for each 32 values.
    Q4K,
    /// 5-bit integers, a scale and a minimum for each 32 values.
    Q5K,
    /// 6-bit integers, a scale for each 16 values.
    Q6K,
    /// 4-bit indices of a table of values, a scale for each 32.
    Iq4Nl,
    /// The same with integer scales in blocks of 256.
    Iq4Xs,
}

impl QuantType {
    /// All types.
    pub const ALL: [Self; 12] = [
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Iq4Xs,
    ];

    /// Returns the numbers of values and bytes of a block.
    pub const fn block(self) -> (usize, usize) {
        match self {
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

    /// Returns the name in GGUF files, `Q4_K` for instance.
    pub const fn name(self) -> &'static str {
        match self {
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
        }
    }

    /// Returns the number in GGUF files.
    pub(crate) const fn number(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Iq4Nl => 20,
            Self::Iq4Xs => 23,
        }
    }

    /// Returns the type for rows of `columns` values: this one, or else the one that llama.cpp takes instead, which has
    /// blocks of 32 values; `None` if the rows are not whole blocks of those either.
    pub const fn for_rows_of(self, columns: usize) -> Option<Self> {
        let narrow = match self {
            Self::Q2K | Self::Q3K | Self::Iq4Xs => Self::Iq4Nl,
            Self::Q4K => Self::Q5_0,
            Self::Q5K => Self::Q5_1,
            Self::Q6K => Self::Q8_0,
            kind => kind,
        };
        if columns.is_multiple_of(self.block().0) {
            Some(self)
        } else if columns.is_multiple_of(narrow.block().0) {
            Some(narrow)
        } else {
            None
        }
    }

    /// Returns `true` if a [`PackedMatrix`](crate::ops::PackedMatrix) can have this type: its blocks are multiplied as they
    /// are stored. Weights of the other types, Q2_K, Q3_K and IQ4_XS, are dequantised when they are loaded.
    pub const fn is_packed(self) -> bool {
        !matches!(self, Self::Q2K | Self::Q3K | Self::Iq4Xs)
    }

    /// Rounds values to whole blocks.
    ///
    /// Q8_0 and the types of 32 values with plain scales have the bits of the package `gguf`; the others search for the best
    /// scales.
    ///
    /// Errors: a type that [is not packed](Self::is_packed); values that are not whole blocks, or not finite.
    ///
    /// ```
    /// use x_transformers::QuantType;
    /// # fn main() -> x_transformers::Result<()> {
    /// let values: Vec<f32> = (0..256).map(|i| (i as f32).sin()).collect();
    /// let blocks = QuantType::Q4K.quantize(&values)?;
    /// let mut near = vec![0.0; 256];
    /// QuantType::Q4K.dequantize(&blocks, &mut near)?;
    /// assert!(values.iter().zip(&near).all(|(value, near)| (value - near).abs() < 0.1));
    /// # Ok(())
    /// # }
    /// ```
    pub fn quantize(self, values: &[f32]) -> Result<Vec<u8>> {
        const OP: &str = "quantize";
        ensure!(
            self.is_packed(),
            Error::argument(
                OP,
                format_args!("values are not rounded to {self}; choose Q8_0, Q4_0 or Q4_K, for instance")
            )
        );
        ensure!(
            values.len().is_multiple_of(self.block().0),
            Error::argument(
                OP,
                format_args!("expected whole blocks of {} values of {self}, got {}", self.block().0, values.len())
            )
        );
        ensure!(
            values.iter().all(|value| value.is_finite()),
            Error::argument(OP, "expected finite values, got NaN or infinity")
        );
        Ok(encode::encode(self, values))
    }

    /// Returns where the f16 scales lie in a block of a type that [is packed](Self::is_packed).
    pub(crate) const fn scales(self) -> &'static [usize] {
        match self {
            Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K => &[0, 2],
            Self::Q6K => &[208],
            _ => &[0],
        }
    }

    /// Writes the values of whole blocks to `out`.
    ///
    /// Errors: bytes that are not whole blocks; an output that has not exactly their values.
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) -> Result<()> {
        const OP: &str = "dequantize";
        let (values, bytes) = self.block();
        ensure!(
            blocks.len().is_multiple_of(bytes),
            Error::argument(
                OP,
                format_args!("expected whole blocks of {bytes} bytes of {self}, got {} bytes", blocks.len())
            )
        );
        let expected = blocks.len() / bytes * values;
        ensure!(
            out.len() == expected,
            Error::argument(OP, format_args!("expected an output of {expected} values, got {}", out.len()))
        );
        decode(self, blocks, out);
        Ok(())
    }
}

impl fmt::Display for QuantType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

vectorized! {
    /// Writes the values of whole blocks.
    pub(crate) fn decode(kind: QuantType, bytes: &[u8], out: &mut [f32]) {
        match kind {
            QuantType::Q8_0 => each(bytes, out, blocks::q8_0),
            QuantType::Q4_0 => each(bytes, out, blocks::q4_0),
            QuantType::Q4_1 => each(bytes, out, blocks::q4_1),
            QuantType::Q5_0 => each(bytes, out, blocks::q5_0),
            QuantType::Q5_1 => each(bytes, out, blocks::q5_1),
            QuantType::Iq4Nl => each(bytes, out, blocks::iq4_nl),
            QuantType::Q2K => each(bytes, out, k_blocks::q2_k),
            QuantType::Q3K => each(bytes, out, k_blocks::q3_k),
            QuantType::Q4K => each(bytes, out, k_blocks::q4_k),
            QuantType::Q5K => each(bytes, out, k_blocks::q5_k),
            QuantType::Q6K => each(bytes, out, k_blocks::q6_k),
            QuantType::Iq4Xs => each(bytes, out, k_blocks::iq4_xs),
        }
    }
}

#[inline(always)]
fn each<const N: usize, const M: usize>(bytes: &[u8], out: &mut [f32], one: impl Fn(&[u8; N], &mut [f32; M])) {
    for (block, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        one(block, out);
    }
}

/// The f16 that begins at this byte of a block.
#[inline(always)]
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_acc()
}
