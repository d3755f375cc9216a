//! Packing with AVX2, for operands with contiguous rows or depth.

use std::arch::x86_64::{__m256, __m256d};

use half::{bf16, f16};

use crate::{
    DType,
    device::{Level, simd},
    dtype::Float,
    gemm::{
        matrix::Matrix,
        simd::{Square, Vector, Widen},
    },
};

/// Maximum width of a panel.
const WIDTH: usize = 32;

/// Packs like [`super::panels::pack`] if the processor and the layout allow it. The caller has checked the reach of
/// both sides.
pub(super) fn pack<T: Float>(from: Matrix<T>, m: usize, kc: usize, width: usize, to: &mut [T::Acc]) -> bool {
    if simd::level() < Level::Avx2 || (from.row != 1 && from.col != 1) {
        return false;
    }
    let Matrix { data, row, col } = from;
    let (from, to) = (data.as_ptr(), to.as_mut_ptr());
    // SAFETY: the level has AVX2; the caller has checked the reach of both sides; the casts go to the type that has the
    // dtype of `T`, or to bytes of elements of this dtype.
    unsafe {
        match (T::DTYPE, width) {
            (DType::F64, 6 | 8) if row != 1 => along_f64(from.cast(), [row * 8, width], m, kc, to.cast()),
            (dtype, 6 | 12 | 16 | 32) if row != 1 => {
                along_f32(dtype, from.cast(), [row * size_of::<T>(), width], m, kc, to.cast());
            }
            (DType::F32, 6) => across::<f32, __m256, 8, 6>(from.cast(), col, m, kc, to.cast()),
            (DType::F32, 12) => across::<f32, __m256, 8, 12>(from.cast(), col, m, kc, to.cast()),
            (DType::F32, 16) => across::<f32, __m256, 8, 16>(from.cast(), col, m, kc, to.cast()),
            (DType::F32, 32) => across::<f32, __m256, 8, 32>(from.cast(), col, m, kc, to.cast()),
            (DType::BF16, 6) => across::<bf16, __m256, 8, 6>(from.cast(), col, m, kc, to.cast()),
            (DType::BF16, 12) => across::<bf16, __m256, 8, 12>(from.cast(), col, m, kc, to.cast()),
            (DType::BF16, 16) => across::<bf16, __m256, 8, 16>(from.cast(), col, m, kc, to.cast()),
            (DType::BF16, 32) => across::<bf16, __m256, 8, 32>(from.cast(), col, m, kc, to.cast()),
            (DType::F16, 6) => across::<f16, __m256, 8, 6>(from.cast(), col, m, kc, to.cast()),
            (DType::F16, 12) => across::<f16, __m256, 8, 12>(from.cast(), col, m, kc, to.cast()),
            (DType::F16, 16) => across::<f16, __m256, 8, 16>(from.cast(), col, m, kc, to.cast()),
            (DType::F16, 32) => across::<f16, __m256, 8, 32>(from.cast(), col, m, kc, to.cast()),
            (DType::F64, 6) => across::<f64, __m256d, 4, 6>(from.cast(), col, m, kc, to.cast()),
            (DType::F64, 8) => across::<f64, __m256d, 4, 8>(from.cast(), col, m, kc, to.cast()),
            _ => return false,
        }
    }
    true
}

/// Packs panels of `WIDTH` adjacent rows: each depth is a line, which is divided into panels.
///
/// # Safety
///
/// AVX2 is there, and both pointers reach as far as the sizes say.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn across<T: Widen<V, N>, V: Square<N>, const N: usize, const WIDTH: usize>(
    from: *const T,
    col: usize,
    m: usize,
    kc: usize,
    to: *mut V::Scalar,
) {
    // Panels lie multiples of a page apart, in the same sets of a cache: few lines are written to one before the next.
    // Neighbouring panels take turns because they share the cache lines and pages that are read.
    const LINES: usize = 8;
    let together = 128 / WIDTH * WIDTH;
    // SAFETY: see above.
    unsafe {
        for start in (0..m).step_by(together) {
            for first in (0..kc).step_by(LINES) {
                for i in (start..m.min(start + together)).step_by(WIDTH) {
                    let whole = i + WIDTH.next_multiple_of(N) <= m;
                    for p in first..kc.min(first + LINES) {
                        let (from, to) = (from.add(p * col + i), to.add(i * kc + p * WIDTH));
                        if whole {
                            for part in (0..WIDTH).step_by(N) {
                                T::widen(from.add(part)).store_first(N.min(WIDTH - part), to.add(part));
                            }
                        } else {
                            edge::<T, V, N>(from, WIDTH.min(m - i), to);
                        }
                    }
                }
            }
        }
    }
}

/// Packs a line of a panel near the end of the operand. A separate function, shared by panels of every width.
///
/// # Safety
///
/// As for [`across`].
#[inline(never)]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn edge<T: Widen<V, N>, V: Square<N>, const N: usize>(from: *const T, count: usize, to: *mut V::Scalar) {
    // SAFETY: see above.
    unsafe {
        let whole = count - count % N;
        for part in (0..whole).step_by(N) {
            T::widen(from.add(part)).store(to.add(part));
        }
        for part in whole..count {
            *to.add(part) = (*from.add(part)).to_acc();
        }
    }
}

/// Values of an operand with contiguous depth.
///
/// # Safety
///
/// As for [`across`].
unsafe trait Source<const N: usize>: Copy {
    type Vector: Square<N>;
    /// Returns a square from depth `p` on.
    unsafe fn square(self, rows: &[*const u8; N], p: usize) -> [Self::Vector; N];
    unsafe fn value(self, row: *const u8, p: usize) -> <Self::Vector as Vector>::Scalar;
}

/// Elements of a dtype that is widened to f32. The dtype is checked for each square, which is cheap; a copy of the loop
/// per type would only add code.
#[derive(Clone, Copy)]
struct Singles(DType);

// SAFETY: AVX2 instructions only, whose presence and pointers the caller answers for.
unsafe impl Source<8> for Singles {
    type Vector = __m256;

    #[inline(always)]
    unsafe fn square(self, rows: &[*const u8; 8], p: usize) -> [__m256; 8] {
        // SAFETY: see the trait.
        unsafe {
            match self.0 {
                DType::BF16 => widened::<bf16, __m256, 8>(rows, p),
                DType::F16 => widened::<f16, __m256, 8>(rows, p),
                _ => widened::<f32, __m256, 8>(rows, p),
            }
        }
    }

    #[inline(always)]
    unsafe fn value(self, row: *const u8, p: usize) -> f32 {
        // SAFETY: see the trait.
        unsafe {
            match self.0 {
                DType::BF16 => (*row.cast::<bf16>().add(p)).to_acc(),
                DType::F16 => (*row.cast::<f16>().add(p)).to_acc(),
                _ => *row.cast::<f32>().add(p),
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Doubles;

// SAFETY: as above.
unsafe impl Source<4> for Doubles {
    type Vector = __m256d;

    #[inline(always)]
    unsafe fn square(self, rows: &[*const u8; 4], p: usize) -> [__m256d; 4] {
        // SAFETY: see the trait.
        unsafe { widened::<f64, __m256d, 4>(rows, p) }
    }

    #[inline(always)]
    unsafe fn value(self, row: *const u8, p: usize) -> f64 {
        // SAFETY: see the trait.
        unsafe { *row.cast::<f64>().add(p) }
    }
}

/// # Safety
///
/// As for [`Source`].
#[inline(always)]
unsafe fn widened<T: Widen<V, N>, V: Square<N>, const N: usize>(rows: &[*const u8; N], p: usize) -> [V; N] {
    // SAFETY: see above.
    unsafe {
        let mut square = [V::zero(); N];
        for (values, row) in square.iter_mut().zip(rows) {
            *values = T::widen(row.cast::<T>().add(p));
        }
        square
    }
}

/// Packs panels of `width` rows with contiguous depth. `strides` are the row stride of the operand in bytes, and the
/// width of a panel.
///
/// # Safety
///
/// As for [`across`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn along_f32(dtype: DType, from: *const u8, strides: [usize; 2], m: usize, kc: usize, to: *mut f32) {
    // SAFETY: see above.
    unsafe { along(Singles(dtype), from, strides, m, kc, to) }
}

/// Like [`along_f32`], in f64.
///
/// # Safety
///
/// As for [`across`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn along_f64(from: *const u8, strides: [usize; 2], m: usize, kc: usize, to: *mut f64) {
    // SAFETY: see above.
    unsafe { along(Doubles, from, strides, m, kc, to) }
}

/// Transposes squares in registers.
///
/// # Safety
///
/// As for [`across`].
#[inline(always)]
unsafe fn along<S: Source<N>, const N: usize>(
    source: S,
    from: *const u8,
    [row, width]: [usize; 2],
    m: usize,
    kc: usize,
    to: *mut <S::Vector as Vector>::Scalar,
) {
    // Two squares fill a cache line, which is used up before the next: rows that lie a power of two apart share few sets
    // of the cache.
    let whole = kc - kc % (2 * N);
    for first in (0..m).step_by(width) {
        // Rows past the last repeat it: their places in the panel are not used.
        let last = (m - 1).min(first + width - 1);
        let mut rows = [from; WIDTH];
        for (i, place) in rows.iter_mut().enumerate() {
            *place = from.wrapping_add((first + i).min(last) * row);
        }
        let (groups, _) = rows.as_chunks::<N>();
        // SAFETY: see above.
        unsafe {
            let to = to.add(first * kc);
            for pair in (0..whole).step_by(2 * N) {
                for (rows, part) in groups.iter().zip((0..width).step_by(N)) {
                    for p in [pair, pair + N] {
                        let columns = S::Vector::transpose(source.square(rows, p));
                        let to = to.add(p * width + part);
                        let count = width - part;
                        for (index, column) in columns.into_iter().enumerate() {
                            if count >= N {
                                column.store_first(N, to.add(index * width));
                            } else {
                                column.store_first(count, to.add(index * width));
                            }
                        }
                    }
                }
            }
            for p in whole..kc {
                for (i, &row) in rows.iter().enumerate().take(last + 1 - first) {
                    *to.add(p * width + i) = source.value(row, p);
                }
            }
        }
    }
}
