//! The kernels of [`streamed`](super::streamed).

use std::arch::x86_64::{__m256, _MM_HINT_T0, _mm_prefetch};

use half::{bf16, f16};

use crate::{
    DType,
    device::{Level, simd},
    dtype::{Float, Real},
    gemm::{
        matrix::Matrix,
        simd::{Square, Widen},
    },
};

/// Like `streamed::block`, but without its checks, which have been done.
pub(super) fn multiply<T: Float>(
    rows: usize,
    n: usize,
    kc: usize,
    a: &[T::Acc],
    b: Matrix<T>,
    passed: usize,
    sums: &mut [T::Acc],
) -> usize {
    if simd::level() < Level::Avx2 || (b.row != 1 && b.col != 1) {
        return 0;
    }
    let strides = [b.row, b.col, passed];
    let (a, b, sums) = (a.as_ptr(), b.data.as_ptr(), sums.as_mut_ptr());
    // SAFETY: the level has AVX2; the caller has checked the reach of the operands; the casts go to the type that
    // has the dtype of `T`.
    unsafe {
        match T::DTYPE {
            DType::F32 => columns::<f32, __m256, 8>(rows, n, kc, a.cast(), b.cast(), strides, sums.cast()),
            DType::BF16 => columns::<bf16, __m256, 8>(rows, n, kc, a.cast(), b.cast(), strides, sums.cast()),
            DType::F16 => columns::<f16, __m256, 8>(rows, n, kc, a.cast(), b.cast(), strides, sums.cast()),
            _ => 0,
        }
    }
}

/// # Safety
///
/// AVX2 is there, a stride of B is 1, and the pointers reach as far as the sizes say.
#[allow(clippy::too_many_arguments)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn columns<T: Widen<V, N>, V: Square<N>, const N: usize>(
    rows: usize,
    n: usize,
    kc: usize,
    a: *const V::Scalar,
    b: *const T,
    [row, col, passed]: [usize; 3],
    sums: *mut V::Scalar,
) -> usize {
    // SAFETY: see above.
    unsafe {
        match (row, rows) {
            (1, 1) if size_of::<T>() == 2 => columns_apart::<T, V, N, 1, 2>(n, kc, a, b, [col, passed], sums),
            (1, 2) if size_of::<T>() == 2 => columns_apart::<T, V, N, 2, 2>(n, kc, a, b, [col, passed], sums),
            (1, 1) => columns_apart::<T, V, N, 1, 1>(n, kc, a, b, [col, passed], sums),
            (1, 2) => columns_apart::<T, V, N, 2, 1>(n, kc, a, b, [col, passed], sums),
            (1, 3) => columns_apart::<T, V, N, 3, 1>(n, kc, a, b, [col, passed], sums),
            (1, 4) => columns_apart::<T, V, N, 4, 1>(n, kc, a, b, [col, passed], sums),
            (_, 1) => columns_together::<T, V, N, 1, 8>(n, kc, a, b, row, sums),
            (_, 2) => columns_together::<T, V, N, 2, 4>(n, kc, a, b, row, sums),
            (_, 3) => columns_together::<T, V, N, 3, 4>(n, kc, a, b, row, sums),
            (_, 4) => columns_together::<T, V, N, 4, 4>(n, kc, a, b, row, sums),
            _ => 0,
        }
    }
}

/// Multiplies contiguous columns: transposes `BLOCKS` square blocks at a time in registers, so that lanes are columns.
#[inline(always)]
unsafe fn columns_apart<T: Widen<V, N>, V: Square<N>, const N: usize, const ROWS: usize, const BLOCKS: usize>(
    n: usize,
    kc: usize,
    a: *const V::Scalar,
    b: *const T,
    [col, passed]: [usize; 2],
    sums: *mut V::Scalar,
) -> usize {
    let done = n - n % (N * BLOCKS);
    // SAFETY: as for `columns`.
    unsafe {
        for first in (0..done).step_by(N * BLOCKS) {
            let b = b.add(first * col);
            let mut chains = [[V::zero(); ROWS]; BLOCKS];
            let mut lines = [[[V::zero(); BLOCKS]; N]; 2];
            // Two square blocks fill a cache line, which is used up before the next: columns that lie a power of
            // two apart share few sets of the cache. All blocks are transposed before their chains go on, since
            // the links of one chain wait for each other.
            let whole = kc - kc % (2 * N);
            // The next columns follow these ones without a gap: they are fetched in the order
            // of memory, whatever the order in which they will be read.
            let next = b.wrapping_add(N * BLOCKS * col).wrapping_sub(passed);
            for pair in (0..whole).step_by(2 * N) {
                let next = next.wrapping_add((passed + pair) * N * BLOCKS).cast::<i8>();
                for line in 0..2 * N * N * BLOCKS * size_of::<T>() / 64 {
                    _mm_prefetch(next.wrapping_add(64 * line), _MM_HINT_T0);
                }
                for block in 0..BLOCKS {
                    for (half, lines) in lines.iter_mut().enumerate() {
                        let b = b.add(block * N * col + pair + half * N);
                        for (line, column) in lines.iter_mut().zip(T::columns(b, col)) {
                            line[block] = column;
                        }
                    }
                }
                for (index, line) in lines.as_flattened().iter().enumerate() {
                    for (chains, &column) in chains.iter_mut().zip(line) {
                        for (row, chain) in chains.iter_mut().enumerate() {
                            *chain = V::splat(a.add((pair + index) * ROWS + row)).mul_add(column, *chain);
                        }
                    }
                }
            }
            for p in whole..kc {
                for (block, chains) in chains.iter_mut().enumerate() {
                    let b = b.add(block * N * col + p);
                    let mut column = [V::Scalar::ZERO; N];
                    for (lane, value) in column.iter_mut().enumerate() {
                        *value = (*b.add(lane * col)).to_acc();
                    }
                    for (row, chain) in chains.iter_mut().enumerate() {
                        *chain = V::splat(a.add(p * ROWS + row)).mul_add(V::load(column.as_ptr()), *chain);
                    }
                }
            }
            for (block, chains) in chains.iter().enumerate() {
                for (row, chain) in chains.iter().enumerate() {
                    chain.store(sums.add(row * n + first + block * N));
                }
            }
        }
    }
    done
}

/// Multiplies contiguous rows: adds `DEPTH` rows of B at a time to sums in the L1 cache.
#[inline(always)]
unsafe fn columns_together<T: Widen<V, N>, V: Square<N>, const N: usize, const ROWS: usize, const DEPTH: usize>(
    n: usize,
    kc: usize,
    a: *const V::Scalar,
    b: *const T,
    row: usize,
    sums: *mut V::Scalar,
) -> usize {
    /// Number of columns at a time.
    const STRIP: usize = 1024;
    let done = n - n % N;
    // SAFETY: as for `columns`.
    unsafe {
        for start in (0..done).step_by(STRIP) {
            let end = done.min(start + STRIP);
            for row in 0..ROWS {
                std::slice::from_raw_parts_mut(sums.add(row * n + start), end - start).fill(V::Scalar::ZERO);
            }
            let whole = kc - kc % DEPTH;
            for p in (0..whole).step_by(DEPTH) {
                of_strip::<T, V, N, ROWS, DEPTH>(start, end, n, a.add(p * ROWS), b.add(p * row), row, sums);
            }
            for p in whole..kc {
                of_strip::<T, V, N, ROWS, 1>(start, end, n, a.add(p * ROWS), b.add(p * row), row, sums);
            }
        }
    }
    done
}

#[inline(always)]
unsafe fn of_strip<T: Widen<V, N>, V: Square<N>, const N: usize, const ROWS: usize, const DEPTH: usize>(
    start: usize,
    end: usize,
    n: usize,
    a: *const V::Scalar,
    b: *const T,
    row: usize,
    sums: *mut V::Scalar,
) {
    // SAFETY: as for `columns`.
    unsafe {
        let mut factors = [[V::zero(); ROWS]; DEPTH];
        for (p, factors) in factors.iter_mut().enumerate() {
            for (row, factor) in factors.iter_mut().enumerate() {
                *factor = V::splat(a.add(p * ROWS + row));
            }
        }
        for column in (start..end).step_by(N) {
            let mut columns = [V::zero(); DEPTH];
            for (p, values) in columns.iter_mut().enumerate() {
                *values = T::widen(b.add(p * row + column));
            }
            for row in 0..ROWS {
                let at = sums.add(row * n + column);
                let mut chain = V::load(at);
                for (factors, column) in factors.iter().zip(columns) {
                    chain = factors[row].mul_add(column, chain);
                }
                chain.store(at);
            }
        }
    }
}
