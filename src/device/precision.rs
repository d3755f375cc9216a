//! How exact products of f32 matrices are.

use std::sync::atomic::{AtomicU8, Ordering};

/// How exact products of f32 matrices are, in PyTorch's words.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Precision {
    /// Operands and sums in f32, or as exact as that: tiles of AMX multiply the parts that f32 numbers are the sums of,
    /// six products for one. The default.
    #[default]
    Highest,
    /// A GPU rounds operands to TF32 (ten bits of mantissa), AMX takes three products (sixteen bits); other processors
    /// compute as in [`Precision::Highest`]. Sums stay in f32.
    High,
    /// AMX rounds operands to bf16 (seven bits); all else computes as in [`Precision::High`].
    Medium,
}

static PRECISION: AtomicU8 = AtomicU8::new(Precision::Highest as u8);

/// Sets how exact products of f32 matrices are, for the whole process, as PyTorch's function of this name does.
pub fn set_float32_matmul_precision(precision: Precision) {
    PRECISION.store(precision as u8, Ordering::Relaxed);
}

/// What [`set_float32_matmul_precision`] has set.
pub fn float32_matmul_precision() -> Precision {
    match PRECISION.load(Ordering::Relaxed) {
        value if value == Precision::High as u8 => Precision::High,
        value if value == Precision::Medium as u8 => Precision::Medium,
        _ => Precision::Highest,
    }
}
