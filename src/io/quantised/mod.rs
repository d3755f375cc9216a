//! GGUF's quantised types: blocks of values with common scales, turned into f32.
//!
//! Every value has the bits that the Python package `gguf` gives it (`gguf.quants.dequantize`): the same products in the
//! same order, each rounded to f32.

mod blocks;
mod k_blocks;

use std::sync::{Mutex, PoisonError};

use super::{bytes::Reading, source::Source, stored::Stored, tensor_file::Entry};
use crate::{
    DType, Device, Error, Result, Tensor,
    device::{cpu, simd::vectorized},
    error::ensure,
};

/// Bytes of the file that a thread holds while it converts them, rounded down to whole blocks.
const CHUNK: usize = 1 << 16;

/// Element operations per value, for dividing the work among threads.
const COST: usize = 4;

impl Stored {
    /// Returns `true` if values lie in blocks with common scales and are read as [`DType::F32`].
    pub fn is_quantized(self) -> bool {
        self.block().0 > 1
    }

    /// Writes the values of whole blocks of a quantised type to `out`.
    ///
    /// Errors: a type that is not quantised; bytes that are not whole blocks; an output that has not exactly their
    /// values.
    ///
    /// ```
    /// use x_transformers::io::Stored;
    /// # fn main() -> x_transformers::Result<()> {
    /// // A scale of 0.5 as f16, then 32 integers of 8 bits.
    /// let mut block = vec![0x00, 0x38];
    /// block.extend(0..32);
    /// let mut values = [0.0; 32];
    /// Stored::Q8_0.dequantize(&block, &mut values)?;
    /// assert_eq!(values[..4], [0.0, 0.5, 1.0, 1.5]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) -> Result<()> {
        const OP: &str = "dequantize";
        ensure!(self.is_quantized(), Error::argument(OP, format_args!("{self} is not a quantised type")));
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

/// Reads a tensor of a quantised type as f32, each thread its own blocks.
pub(super) fn read(source: &Source, entry: &Entry) -> Reading<Tensor> {
    let stored = entry.stored;
    let mut tensor = Tensor::uninit(entry.shape, DType::F32, &Device::Cpu)?;
    let (values, bytes) = stored.block();
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
            decode(stored, chunk, out);
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error.into()),
        None => Ok(tensor),
    }
}

vectorized! {
    /// Writes the values of whole blocks of a quantised type.
    fn decode(stored: Stored, bytes: &[u8], out: &mut [f32]) {
        match stored {
            Stored::Q8_0 => each(bytes, out, blocks::q8_0),
            Stored::Q4_0 => each(bytes, out, blocks::q4_0),
            Stored::Q4_1 => each(bytes, out, blocks::q4_1),
            Stored::Q5_0 => each(bytes, out, blocks::q5_0),
            Stored::Q5_1 => each(bytes, out, blocks::q5_1),
            Stored::Iq4Nl => each(bytes, out, blocks::iq4_nl),
            Stored::Q2K => each(bytes, out, k_blocks::q2_k),
            Stored::Q3K => each(bytes, out, k_blocks::q3_k),
            Stored::Q4K => each(bytes, out, k_blocks::q4_k),
            Stored::Q5K => each(bytes, out, k_blocks::q5_k),
            Stored::Q6K => each(bytes, out, k_blocks::q6_k),
            Stored::Iq4Xs => each(bytes, out, k_blocks::iq4_xs),
            // Callers have refused these.
            _ => out.fill(0.0),
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
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}
