//! Precision of f32 matrix products.

use std::sync::atomic::{AtomicU8, Ordering};

/// Precision of f32 matrix products, with PyTorch's names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Precision {
    /// Operands and sums in f32. The default.
    #[default]
    Highest,
    /// GPUs round operands to TF32 (10 mantissa bits), AMX splits each into two bf16 parts and takes three products of
    /// those for one (16 bits); other processors compute as with [`Precision::Highest`]. Sums stay in f32.
    High,
    /// AMX rounds operands to bf16 (7 mantissa bits); everything else computes as with [`Precision::High`].
    Medium,
}

static PRECISION: AtomicU8 = AtomicU8::new(Precision::Highest as u8);

/// Sets the precision of f32 matrix products for the whole process, like PyTorch's function of this name.
pub fn set_float32_matmul_precision(precision: Precision) {
    PRECISION.store(precision as u8, Ordering::Relaxed);
}

/// Returns the precision set by [`set_float32_matmul_precision`].
pub fn float32_matmul_precision() -> Precision {
    match PRECISION.load(Ordering::Relaxed) {
        value if value == Precision::High as u8 => Precision::High,
        value if value == Precision::Medium as u8 => Precision::Medium,
        _ => Precision::Highest,
    }
}
