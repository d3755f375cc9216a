//! Kernel selection: the only place that chooses the kernel of a product, from its shape and the processor.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::pack::{
    bf16::{Bf16Dot, Tiles},
    split::Split,
};
use super::{
    few_rows::{
        FewRows, streamed,
        transposed::{self, Word},
    },
    matrix::Matrix,
    pack::{Arithmetic, Packing, panels::Fma},
};
use crate::{
    DType,
    device::{Level, simd},
    dtype::Float,
};

/// Kernel that is faster than multiply-adds.
pub(crate) struct Candidate<T: Float> {
    /// Lowest level that has its instructions.
    level: Level,
    /// Minimum number of rows of C for which it is used. AMX tiles add in their own order, and products of few rows
    /// must have the same bits for any number of rows.
    rows: usize,
    kernel: &'static dyn Packing<T>,
}

/// Element type of matrix products.
pub(crate) trait Multiply: Float {
    /// Returns the kernels besides multiply-adds, fastest first.
    fn candidates() -> &'static [Candidate<Self>];

    /// Returns `true` if the processor has faster instructions than multiply-adds for this type.
    fn is_fast() -> bool {
        kernel::<Self>(usize::MAX).arithmetic() != Arithmetic::Fma
    }
}

macro_rules! multiply {
    ($($float:ty: [$($level:ident from $rows:expr => $kernel:expr),*];)*) => {$(
        impl Multiply for $float {
            fn candidates() -> &'static [Candidate<Self>] {
                #[cfg(target_arch = "x86_64")]
                return &[$(Candidate { level: Level::$level, rows: $rows, kernel: &$kernel }),*];
                #[cfg(not(target_arch = "x86_64"))]
                &[]
            }
        }
    )*};
}

multiply! {
    f64: [];
    f32: [Amx from streamed::ROWS + 1 => Split];
    f16: [];
    bf16: [Amx from streamed::ROWS + 1 => Tiles, Avx512Bf16 from 0 => Bf16Dot];
}

/// Returns the packed kernel for products of one matrix B with this number of rows.
pub(super) fn kernel<T: Multiply>(rows: usize) -> &'static dyn Packing<T> {
    let usable = |candidate: &&Candidate<T>| {
        simd::level() >= candidate.level && rows >= candidate.rows && candidate.kernel.is_exact_enough()
    };
    T::candidates().iter().find(usable).map_or(&Fma, |candidate| candidate.kernel)
}

/// Returns the method of multiplying `m` rows by columns of depth `k` with the bits of a kernel but without packing B;
/// `None` if packing is as fast.
pub(super) fn few_rows<T: Float>(kernel: &dyn Packing<T>, m: usize, k: usize, b: Matrix<T>) -> Option<FewRows> {
    if m == 0 || k == 0 || !cfg!(target_arch = "x86_64") || T::DTYPE == DType::F64 {
        // f64 is only used for references and gradient checks.
        return None;
    }
    let level = simd::level();
    let word = match (kernel.arithmetic(), T::DTYPE) {
        (Arithmetic::Bf16Dot, _) => Some(Word::Bf16Pair),
        (Arithmetic::Fma, _) if level < Level::Avx512 => None,
        // Fewer columns at a time, which streaming takes, find more of theirs in the first-level cache: for rows so few that
        // they wait for nothing but memory that counts for more than wider vectors.
        (Arithmetic::Fma, DType::F32) => (m > streamed::TOGETHER).then_some(Word::F32),
        (Arithmetic::Fma, DType::BF16) => Some(Word::Bf16),
        (Arithmetic::Fma, DType::F16) => Some(Word::F16),
        _ => None,
    };
    let fits = |word: &Word| b.row == 1 && m <= if word.is_stored(k) { transposed::ROWS } else { transposed::GROUPED };
    if let Some(word) = word.filter(fits) {
        return Some(FewRows::Transposed(word));
    }
    let streams = m <= streamed::ROWS
        && kernel.arithmetic() == Arithmetic::Fma
        && level >= Level::Avx2
        && (b.row == 1 || b.col == 1);
    streams.then_some(FewRows::Streamed)
}
