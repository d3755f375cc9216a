//! Few rows times a matrix that streams through the registers once: each element of B is used once per row. B is not
//! packed.

use crate::{
    device::scratch::aligned,
    dtype::Float,
    gemm::{
        matrix::{Beta, KC, Matrix, Window},
        pack::panels::pack,
    },
};

/// Maximum number of rows for which this is worth it.
pub(in crate::gemm) const ROWS: usize = 8;

/// Number of rows multiplied at a time.
pub(in crate::gemm) const TOGETHER: usize = 4;

/// Returns the number of columns whose whole depth is read before the next ones; all of them are computed, for any
/// number of rows. Few columns fill the sets of the L1 cache evenly, even if they are a power of two apart. Half types
/// take as long as f32 for half the bytes: twice the columns hide the latency of a chain.
fn strip<T>() -> usize {
    if size_of::<T>() == 2 { 16 } else { 8 }
}

/// Computes `C = beta + A·B` for the first columns; returns their number.
pub(super) fn multiply<T: Float>(
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    beta: Beta<T::Acc>,
    c: &mut Window<T::Acc>,
    [rows_of_a, sums]: [&mut Vec<u64>; 2],
) -> usize {
    let (m, n) = (c.rows(), c.columns());
    if m == 0 || n == 0 {
        return 0;
    }
    // The rows of A over the whole depth, by blocks of depth, and in them by groups of rows.
    let packed = aligned::<T::Acc>(rows_of_a, m * k);
    for p in (0..k).step_by(KC) {
        let kc = KC.min(k - p);
        for first in (0..m).step_by(TOGETHER) {
            let rows = TOGETHER.min(m - first);
            pack(a.from(first, p), rows, kc, rows, &mut packed[p * m + first * kc..][..rows * kc]);
        }
    }
    // Contiguous columns are read to the end before the next ones; and each group of rows must reach the same column.
    let width = if b.row == 1 { strip::<T>() } else { n };
    let end = if m > TOGETHER { n - n % strip::<T>() } else { n };
    let mut done = 0;
    for j in (0..end).step_by(width) {
        let width = width.min(end - j);
        let mut of_strip = 0;
        for p in (0..k).step_by(KC) {
            let kc = KC.min(k - p);
            for first in (0..m).step_by(TOGETHER) {
                let rows = TOGETHER.min(m - first);
                let packed = &packed[p * m + first * kc..][..rows * kc];
                let sums = aligned::<T::Acc>(sums, rows * width);
                of_strip = block(rows, width, kc, packed, b.from(p, j), p, sums);
                if of_strip == 0 {
                    return done;
                }
                let beta = beta.of_block(p, j);
                for (i, sums) in sums.chunks_exact(width).enumerate() {
                    beta.store(&sums[..of_strip], &mut c.row_mut(first + i)[j..]);
                }
            }
        }
        done += of_strip;
        if of_strip < width {
            break;
        }
    }
    done
}

/// Computes `sums[i * n + j] = Σ_p A[i, p] · B[p, j]` for one block of depth `kc`, `rows` rows and the first of `n`
/// columns; returns their number, 0 if the processor or the layout does not allow it. Element (i, p) of A is `a[p *
/// rows + i]`; the block comes after a depth of `passed` in the same columns.
// Other processors leave these arguments unused.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
fn block<T: Float>(
    rows: usize,
    n: usize,
    kc: usize,
    a: &[T::Acc],
    b: Matrix<T>,
    passed: usize,
    sums: &mut [T::Acc],
) -> usize {
    assert!(rows * kc <= a.len() && rows * n <= sums.len(), "A or the sums end before their block");
    assert!(b.holds(kc, n), "B ends before its block");
    #[cfg(target_arch = "x86_64")]
    {
        super::avx2::multiply(rows, n, kc, a, b, passed, sums)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        0
    }
}
