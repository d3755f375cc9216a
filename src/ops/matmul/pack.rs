//! Copies of an operand in the order in which the micro-kernel reads it, converted to the type of the sums.

use super::cpu::Matrix;
use crate::dtype::Float;

/// Packs `lanes` rows of a matrix with `steps` columns into panels of `width` rows: element (lane, step) goes to
/// `to[lane / width * width * steps + step * width + lane % width]`. What the last panel has beyond `lanes` is
/// unspecified.
///
/// A is packed by its rows; B by its columns, that is as the rows of its transpose.
pub(super) fn pack<T: Float>(from: Matrix<T>, lanes: usize, steps: usize, width: usize, to: &mut [T::Acc]) {
    if lanes == 0 || steps == 0 {
        return;
    }
    let to = &mut to[..lanes.next_multiple_of(width) * steps];
    assert!((lanes - 1) * from.row + (steps - 1) * from.col < from.data.len(), "an operand ends before its block");
    #[cfg(target_arch = "x86_64")]
    if avx2::pack(from, lanes, steps, width, to) {
        return;
    }
    for (panel, to) in to.chunks_exact_mut(width * steps).enumerate() {
        let first = panel * width;
        for (step, to) in to.chunks_exact_mut(width).enumerate() {
            for (lane, to) in to.iter_mut().take(lanes - first).enumerate() {
                *to = from.data[(first + lane) * from.row + step * from.col].to_acc();
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{__m256, __m256d};

    use half::{bf16, f16};

    use super::{
        super::lanes::{Square, Widen},
        Float, Matrix,
    };
    use crate::{
        DType,
        device::{Level, simd},
    };

    /// Packs if the processor and the layout allow it.
    pub fn pack<T: Float>(from: Matrix<T>, lanes: usize, steps: usize, width: usize, to: &mut [T::Acc]) -> bool {
        if simd::level() < Level::Avx2 || (from.row != 1 && from.col != 1) {
            return false;
        }
        let Matrix { data, row, col } = from;
        let (from, to) = (data.as_ptr(), to.as_mut_ptr());
        // SAFETY: the level has AVX2; the caller has checked the reach of both sides; the casts go to the type that
        // has the dtype of `T`.
        unsafe {
            match (T::DTYPE, width) {
                (DType::F32, 6) => panels::<f32, __m256, 8, 6>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F32, 12) => panels::<f32, __m256, 8, 12>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F32, 16) => panels::<f32, __m256, 8, 16>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F32, 32) => panels::<f32, __m256, 8, 32>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::BF16, 6) => panels::<bf16, __m256, 8, 6>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::BF16, 12) => panels::<bf16, __m256, 8, 12>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::BF16, 16) => panels::<bf16, __m256, 8, 16>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::BF16, 32) => panels::<bf16, __m256, 8, 32>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F16, 6) => panels::<f16, __m256, 8, 6>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F16, 12) => panels::<f16, __m256, 8, 12>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F16, 16) => panels::<f16, __m256, 8, 16>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F16, 32) => panels::<f16, __m256, 8, 32>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F64, 6) => panels::<f64, __m256d, 4, 6>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F64, 8) => panels::<f64, __m256d, 4, 8>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F64, 12) => panels::<f64, __m256d, 4, 12>(from.cast(), row, col, lanes, steps, to.cast()),
                (DType::F64, 16) => panels::<f64, __m256d, 4, 16>(from.cast(), row, col, lanes, steps, to.cast()),
                _ => return false,
            }
        }
        true
    }

    /// Panels of `WIDTH` lanes.
    ///
    /// # Safety
    ///
    /// AVX2 is there, one stride is 1, and both pointers reach as far as the sizes say.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn panels<T: Widen<V, N>, V: Square<N>, const N: usize, const WIDTH: usize>(
        from: *const T,
        row: usize,
        col: usize,
        lanes: usize,
        steps: usize,
        to: *mut V::Scalar,
    ) {
        // SAFETY: see above.
        unsafe {
            if row == 1 {
                rows_of_lanes::<T, V, N, WIDTH>(from, col, lanes, steps, to);
            } else {
                for lane in (0..lanes).step_by(WIDTH) {
                    rows_of_steps::<T, V, N, WIDTH>(
                        from.add(lane * row),
                        row,
                        lanes - lane,
                        steps,
                        to.add(lane * steps),
                    );
                }
            }
        }
    }

    /// Lanes lie next to each other: each step is a row, which is cut into panels.
    #[inline(always)]
    unsafe fn rows_of_lanes<T: Widen<V, N>, V: Square<N>, const N: usize, const WIDTH: usize>(
        from: *const T,
        col: usize,
        lanes: usize,
        steps: usize,
        to: *mut V::Scalar,
    ) {
        // Panels lie multiples of a page apart, in the same sets of a cache: few steps are written to one before the
        // next. Neighbouring panels take turns because they share the cache lines and pages that are read.
        const STEPS: usize = 8;
        let together = 128 / WIDTH * WIDTH;
        // SAFETY: as for `panels`.
        unsafe {
            for start in (0..lanes).step_by(together) {
                for first in (0..steps).step_by(STEPS) {
                    for lane in (start..lanes.min(start + together)).step_by(WIDTH) {
                        for step in first..steps.min(first + STEPS) {
                            let (from, to) = (from.add(step * col + lane), to.add(lane * steps + step * WIDTH));
                            for part in (0..WIDTH).step_by(N) {
                                let count = N.min(WIDTH - part);
                                if lane + part + N <= lanes {
                                    T::widen(from.add(part)).store_first(count, to.add(part));
                                } else {
                                    for part in part..(part + count).min(lanes - lane) {
                                        *to.add(part) = (*from.add(part)).to_acc();
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    /// Steps lie next to each other: square blocks are transposed in registers.
    #[inline(always)]
    unsafe fn rows_of_steps<T: Widen<V, N>, V: Square<N>, const N: usize, const WIDTH: usize>(
        from: *const T,
        row: usize,
        lanes: usize,
        steps: usize,
        to: *mut V::Scalar,
    ) {
        // SAFETY: as for `panels`.
        unsafe {
            // Two blocks of steps fill a cache line, which is used up before the next: lanes that lie a power of two
            // apart share few sets of the cache.
            let whole = steps - steps % (2 * N);
            for pair in (0..whole).step_by(2 * N) {
                for part in (0..WIDTH).step_by(N) {
                    for step in [pair, pair + N] {
                        // Lanes beyond the last repeat it: their columns of the tile are not used.
                        let mut block = [V::zero(); N];
                        for (lane, values) in block.iter_mut().enumerate() {
                            *values = T::widen(from.add((part + lane).min(lanes - 1).min(WIDTH - 1) * row + step));
                        }
                        for (index, column) in V::transpose(block).into_iter().enumerate() {
                            column.store_first(N.min(WIDTH - part), to.add((step + index) * WIDTH + part));
                        }
                    }
                }
            }
            for step in whole..steps {
                for lane in 0..WIDTH.min(lanes) {
                    *to.add(step * WIDTH + lane) = (*from.add(lane * row + step)).to_acc();
                }
            }
        }
    }
}
