//! Multiply-add kernel: a tile of C in registers, compiled once per instruction level.
//!
//! Every element of C is one chain `c = a·b + c` over the depth of a block: tile sizes, and with them the
//! instruction level, do not change the order of additions. AVX2 and AVX-512 give the same bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, __m256d, __m512};

use super::{Order, PanelsA, PanelsB};
use crate::{
    DType,
    device::{Level, simd},
    dtype::Real,
    gemm::{
        matrix::{Beta, Tile, Window},
        simd::{Portable, Vector},
    },
};

/// Number of rows of the largest tile.
const MR: usize = 12;
const NR: usize = 32;

/// Returns the tile for sums of this type on this processor: two vectors wide, as tall as the registers allow. f64,
/// used for references and gradient checks, has no AVX-512 kernel.
pub(in crate::gemm) fn tile<R: Real>() -> Tile {
    let (mr, bytes) = match simd::level() {
        Level::Portable => (4, 32),
        level if level >= Level::Avx512 && R::DTYPE == DType::F32 => (MR, NR * size_of::<f32>()),
        _ => (6, 64),
    };
    Tile { mr, nr: bytes / size_of::<R>() }
}

/// Computes `C = beta + A·B` for one block of depth `kc`, on the calling thread.
pub(in crate::gemm) fn multiply<R: Real>(kc: usize, a: PanelsA<R>, b: PanelsB<R>, beta: Beta<R>, mut c: Window<R>) {
    let (m, n) = (c.rows(), c.columns());
    if m == 0 || n == 0 {
        return;
    }
    if kc == 0 {
        // Operands may be empty: there is no element to point to.
        return beta.fill(&mut c);
    }
    let Tile { mr, nr } = tile::<R>();
    a.check(m, mr, kc);
    let last_column = (n - 1) / nr * b.panel + nr - 1;
    assert!(last_column + (kc - 1) * b.row < b.data.len(), "B ends before its block");
    let (bias, beta) = match beta {
        Beta::Zero => (std::ptr::null(), Kind::Zero),
        Beta::One => (std::ptr::null(), Kind::One),
        Beta::Bias(bias) => {
            assert!(bias.len() >= n, "the bias ends before the columns");
            (bias.as_ptr(), Kind::Bias)
        }
    };
    let (c, c_row) = c.as_mut_ptr();
    let block = Block {
        m,
        n,
        kc,
        a: a.data.as_ptr().cast(),
        a_panel: a.panel,
        a_order: a.order,
        a_stride: a.stride,
        b: b.data.as_ptr().cast(),
        b_panel: b.panel,
        b_row: b.row,
        c: c.cast(),
        c_row,
        bias: bias.cast(),
        beta,
    };
    // SAFETY: the level is at most what was detected, the reach of the operands is checked above, C is a window, and
    // `R` is the only type with its dtype.
    unsafe {
        match (simd::level(), R::DTYPE) {
            (Level::Portable, DType::F64) => portable_f64(&block),
            (Level::Portable, _) => portable_f32(&block),
            #[cfg(target_arch = "x86_64")]
            (_, DType::F64) => avx2_f64(&block),
            #[cfg(target_arch = "x86_64")]
            (Level::Avx2, _) => avx2_f32(&block),
            #[cfg(target_arch = "x86_64")]
            _ => avx512_f32(&block),
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("a level of another architecture"),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Zero,
    Bias,
    One,
}

/// Arguments of [`multiply`] after its checks. The pointers have the accumulation type, the strides count elements.
struct Block {
    m: usize,
    n: usize,
    kc: usize,
    a: *const (),
    a_panel: usize,
    a_order: Order,
    a_stride: usize,
    b: *const (),
    b_panel: usize,
    b_row: usize,
    c: *mut (),
    c_row: usize,
    bias: *const (),
    beta: Kind,
}

/// Defines a function per level that walks the tiles of a block: a panel of B stays in the L1 cache while the panels of
/// A stream past.
macro_rules! levels {
    ($($(#[$meta:meta])* $name:ident: $vector:ty, $mr:literal = [$($rows:literal)*];)*) => {$(
        $(#[$meta])*
        unsafe fn $name(block: &Block) {
            for j in (0..block.n).step_by(2 * <$vector>::LANES) {
                for i in (0..block.m).step_by($mr) {
                    // SAFETY: the caller answers for the block, (i, j) lies inside.
                    unsafe {
                        match block.m - i {
                            $($rows => one_tile::<$vector, $rows>(block, i, i / $mr, j),)*
                            _ => one_tile::<$vector, $mr>(block, i, i / $mr, j),
                        }
                    }
                }
            }
        }
    )*};
}

levels! {
    portable_f32: Portable<f32, 4>, 4 = [1 2 3];
    portable_f64: Portable<f64, 2>, 4 = [1 2 3];
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    avx2_f32: __m256, 6 = [1 2 3 4 5];
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    avx2_f64: __m256d, 6 = [1 2 3 4 5];
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    avx512_f32: __m512, 12 = [1 2 3 4 5 6 7 8 9 10 11];
}

/// Sums of one tile.
type Sums<V, const ROWS: usize> = [[V; 2]; ROWS];

/// Computes the sums of a tile from A with contiguous columns of a panel.
///
/// # Safety
///
/// The processor has the instructions of `V`; the pointers reach as far as the sizes say.
#[inline(always)]
unsafe fn sums_of_rows<V: Vector, const ROWS: usize>(
    kc: usize,
    mut a: *const V::Scalar,
    stride: usize,
    mut b: *const V::Scalar,
    b_row: usize,
) -> Sums<V, ROWS> {
    // SAFETY: see above.
    unsafe {
        let mut sums = [[V::zero(); 2]; ROWS];
        for _ in 0..kc {
            let columns = [V::load(b), V::load(b.add(V::LANES))];
            for (index, sums) in sums.iter_mut().enumerate() {
                let a = V::splat(a.add(index));
                sums[0] = a.mul_add(columns[0], sums[0]);
                sums[1] = a.mul_add(columns[1], sums[1]);
            }
            // Wrapping: at the end the pointers may leave their slices.
            (a, b) = (a.wrapping_add(stride), b.wrapping_add(b_row));
        }
        sums
    }
}

/// Computes the sums of a tile from A with contiguous rows.
///
/// # Safety
///
/// As for [`sums_of_rows`].
#[inline(always)]
unsafe fn sums_of_depth<V: Vector, const ROWS: usize>(
    kc: usize,
    a: *const V::Scalar,
    row: usize,
    mut b: *const V::Scalar,
    b_row: usize,
) -> Sums<V, ROWS> {
    /// Number of rows addressed from one pointer: an address can hold a stride times 1 or 2, and three strides are kept
    /// in a register. With a pointer per row, or with accumulated strides, sums would spill from their registers.
    const REACHED: usize = 4;
    // SAFETY: see above.
    unsafe {
        let mut sums = [[V::zero(); 2]; ROWS];
        let mut groups = [0, 1, 2, 3].map(|group| a.wrapping_add(group * REACHED * row));
        let strides = [0, row, 2 * row, 3 * row];
        for _ in 0..kc {
            let columns = [V::load(b), V::load(b.add(V::LANES))];
            for (index, sums) in sums.iter_mut().enumerate() {
                let a = V::splat(groups[index / REACHED].add(strides[index % REACHED]));
                sums[0] = a.mul_add(columns[0], sums[0]);
                sums[1] = a.mul_add(columns[1], sums[1]);
            }
            // Wrapping: at the end the pointers may leave their slices.
            b = b.wrapping_add(b_row);
            groups = groups.map(|group| group.wrapping_add(1));
        }
        sums
    }
}

/// Computes the tile of `ROWS` rows at row `i`, which is panel `panel` of A, and column `j`.
///
/// # Safety
///
/// The processor has the instructions of `V`; the pointers of the block reach as far as its sizes say.
#[inline(always)]
unsafe fn one_tile<V: Vector, const ROWS: usize>(block: &Block, i: usize, panel: usize, j: usize) {
    // SAFETY: see above.
    unsafe {
        let a = block.a.cast::<V::Scalar>().add(panel * block.a_panel);
        let b = block.b.cast::<V::Scalar>().add(j / (2 * V::LANES) * block.b_panel);
        // Each order has its own loop, in which all strides but one are constants of the addresses.
        let sums = match block.a_order {
            Order::Rows => sums_of_rows::<V, ROWS>(block.kc, a, block.a_stride, b, block.b_row),
            Order::Depth => sums_of_depth::<V, ROWS>(block.kc, a, block.a_stride, b, block.b_row),
        };
        if block.n - j < 2 * V::LANES {
            let mut rows = [[V::Scalar::ZERO; NR]; ROWS];
            for (row, sums) in rows.iter_mut().zip(sums) {
                sums[0].store(row.as_mut_ptr());
                sums[1].store(row.as_mut_ptr().add(V::LANES));
            }
            return store_edge(block, i, j, &rows);
        }
        let c = block.c.cast::<V::Scalar>().add(i * block.c_row + j);
        let bias = block.bias.cast::<V::Scalar>().wrapping_add(j);
        for (row, sums) in sums.iter().enumerate() {
            for (half, &sum) in sums.iter().enumerate() {
                let c = c.add(row * block.c_row + half * V::LANES);
                let sum = match block.beta {
                    Kind::Zero => sum,
                    Kind::Bias => sum.add(V::load(bias.add(half * V::LANES))),
                    Kind::One => sum.add(V::load(c)),
                };
                sum.store(c);
            }
        }
    }
}

/// Stores rows of a tile at the edge of C. A separate function, shared by tiles of every height.
///
/// # Safety
///
/// The pointers of the block reach as far as its sizes say; the rows lie inside of C.
#[inline(never)]
unsafe fn store_edge<R: Real>(block: &Block, i: usize, j: usize, rows: &[[R; NR]]) {
    let columns = block.n - j;
    for (row, sums) in rows.iter().enumerate() {
        // SAFETY: see above.
        let (c, bias) = unsafe {
            let c = block.c.cast::<R>().add((i + row) * block.c_row + j);
            (std::slice::from_raw_parts_mut(c, columns), block.bias.cast::<R>().wrapping_add(j))
        };
        let beta = match block.beta {
            Kind::Zero => Beta::Zero,
            // SAFETY: as above.
            Kind::Bias => Beta::Bias(unsafe { std::slice::from_raw_parts(bias, columns) }),
            Kind::One => Beta::One,
        };
        beta.store(&sums[..columns], c);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    levels! {
        emulated_avx512: Portable<f32, 16>, 12 = [1 2 3 4 5 6 7 8 9 10 11];
    }

    /// Tests the AVX-512 tile with portable vectors, for every height and width of the last tile.
    #[test]
    fn microkernel_with_the_largest_tile() {
        let (mr, nr, kc) = (12, 32, 5);
        for (m, n) in (1..=25usize).map(|m| (m, 65usize)).chain((1..=65).map(|n| (13, n))) {
            let a: Vec<f32> = (0..m.div_ceil(mr) * mr * kc).map(|i| (i % 13) as f32 - 6.0).collect();
            let b: Vec<f32> = (0..n.div_ceil(nr) * nr * kc).map(|i| (i % 11) as f32 - 5.0).collect();
            let bias: Vec<f32> = (0..n).map(|j| j as f32).collect();
            let mut c = vec![100.0; m * n];
            for beta in [Kind::Zero, Kind::Bias, Kind::One] {
                let block = Block {
                    m,
                    n,
                    kc,
                    a: a.as_ptr().cast(),
                    a_panel: mr * kc,
                    a_order: Order::Rows,
                    a_stride: mr,
                    b: b.as_ptr().cast(),
                    b_panel: nr * kc,
                    b_row: nr,
                    c: c.as_mut_ptr().cast(),
                    c_row: n,
                    bias: bias.as_ptr().cast(),
                    beta,
                };
                let before = c.clone();
                // SAFETY: the operands are packed for these sizes, and the vectors are plain arrays.
                unsafe { emulated_avx512(&block) };
                for (index, (&c, &before)) in c.iter().zip(&before).enumerate() {
                    let (i, j) = (index / n, index % n);
                    let at = |panel: usize, index: usize, size: usize, p: usize| (panel * kc + p) * size + index;
                    let sum: f32 = (0..kc).map(|p| a[at(i / mr, i % mr, mr, p)] * b[at(j / nr, j % nr, nr, p)]).sum();
                    let beta = match beta {
                        Kind::Zero => 0.0,
                        Kind::Bias => bias[j],
                        Kind::One => before,
                    };
                    assert_eq!(c, beta + sum, "{m}x{n} at ({i}, {j})");
                }
            }
        }
    }
}
