//! Products of bf16 by instructions that multiply two pairs of bf16 numbers and add both products to an f32: twice the
//! rate of a multiply-add (`vdpbf16ps` of AVX-512 BF16).
//!
//! A is read by contiguous rows. B is in panels of [`NR`] columns in which the two elements of a pair are adjacent:
//! element (p, j) at `(p / 2 · NR + j) · 2 + p % 2`. Products and sums below f32's normal range (1.2e-38) count as
//! zero: the instruction flushes them.

use std::arch::x86_64::*;

use half::bf16;

use super::{Order, PanelsA, PanelsB};
use crate::{
    device::{Level, simd},
    gemm::{
        matrix::{Beta, Window},
        simd::as_pairs,
    },
};

/// Number of rows per tile, whose sums fill 24 of 32 registers.
pub(in crate::gemm) const MR: usize = 12;

/// Number of columns per panel: two registers of sums.
pub(in crate::gemm) const NR: usize = 32;

/// Computes `C = beta + A·B` for one block of depth `kc`, an even number, on the calling thread.
pub(in crate::gemm) fn multiply(kc: usize, a: PanelsA<bf16>, b: PanelsB<bf16>, beta: Beta<f32>, mut c: Window<f32>) {
    assert!(simd::level() >= Level::Avx512Bf16, "the processor has no products of pairs");
    assert!(kc.is_multiple_of(2) && a.order == Order::Depth, "operands that are not packed for products of pairs");
    let (m, n) = (c.rows(), c.columns());
    if m == 0 || n == 0 {
        return;
    }
    if kc > 0 {
        a.check(m, MR, kc);
        assert!((n - 1) / NR * b.panel + NR * kc <= b.data.len(), "B ends before its block");
    }
    if let Beta::Bias(bias) = beta {
        assert!(bias.len() >= n, "the bias ends before the columns");
    }
    for j in (0..n).step_by(NR) {
        let columns = NR.min(n - j);
        let b = b.data[j / NR * b.panel..].as_ptr();
        for i in (0..m).step_by(MR) {
            let a_rows = a.data[i / MR * a.panel..].as_ptr();
            let rows = MR.min(m - i);
            let tile = c.part(i, j, rows, columns);
            // SAFETY: the level has the instruction; the reach of both operands is checked above.
            unsafe { one_tile(rows, kc / 2, a_rows, a.stride, b, beta.of_block(0, j), tile) };
        }
    }
}

/// Computes `C = beta + A·B` for one tile of at most [`MR`] rows and [`NR`] columns.
///
/// # Safety
///
/// The processor has AVX-512 BF16; the pointers reach as far as the sizes say.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn one_tile(
    rows: usize,
    pairs: usize,
    a: *const bf16,
    stride: usize,
    b: *const bf16,
    beta: Beta<f32>,
    c: Window<f32>,
) {
    // SAFETY: the caller answers for the pointers.
    unsafe {
        match rows {
            1 => tile_of::<1>(pairs, a, stride, b, beta, c),
            2 => tile_of::<2>(pairs, a, stride, b, beta, c),
            3 => tile_of::<3>(pairs, a, stride, b, beta, c),
            4 => tile_of::<4>(pairs, a, stride, b, beta, c),
            5 => tile_of::<5>(pairs, a, stride, b, beta, c),
            6 => tile_of::<6>(pairs, a, stride, b, beta, c),
            7 => tile_of::<7>(pairs, a, stride, b, beta, c),
            8 => tile_of::<8>(pairs, a, stride, b, beta, c),
            9 => tile_of::<9>(pairs, a, stride, b, beta, c),
            10 => tile_of::<10>(pairs, a, stride, b, beta, c),
            11 => tile_of::<11>(pairs, a, stride, b, beta, c),
            _ => tile_of::<MR>(pairs, a, stride, b, beta, c),
        }
    }
}

/// # Safety
///
/// As for [`one_tile`]; C has `R` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn tile_of<const R: usize>(
    pairs: usize,
    a: *const bf16,
    stride: usize,
    b: *const bf16,
    beta: Beta<f32>,
    mut c: Window<f32>,
) {
    /// Number of rows addressed from one pointer, as in the other micro-kernel.
    const REACHED: usize = 4;
    // SAFETY: the caller answers for the pointers; rows of C are slices, whose ends the masks respect.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let mut groups = [0, 1, 2].map(|group| a.wrapping_add(group * REACHED * stride));
        let strides = [0, stride, 2 * stride, 3 * stride];
        let mut b = b;
        for _ in 0..pairs {
            let columns = [pairs_at(b), pairs_at(b.add(NR))];
            for (index, sums) in sums.iter_mut().enumerate() {
                let pair = groups[index / REACHED].wrapping_add(strides[index % REACHED]).cast::<i32>();
                let pair = as_pairs(_mm512_set1_epi32(pair.read_unaligned()));
                sums[0] = _mm512_dpbf16_ps(sums[0], pair, columns[0]);
                sums[1] = _mm512_dpbf16_ps(sums[1], pair, columns[1]);
            }
            // Wrapping: after the last pair the pointers may leave their slices.
            b = b.wrapping_add(2 * NR);
            groups = groups.map(|group| group.wrapping_add(2));
        }
        let columns = c.columns();
        let masks = [low_bits(columns), low_bits(columns.saturating_sub(16))];
        let bias = match beta {
            Beta::Bias(bias) => {
                let at = |half: usize| bias.as_ptr().wrapping_add(16 * half);
                [_mm512_maskz_loadu_ps(masks[0], at(0)), _mm512_maskz_loadu_ps(masks[1], at(1))]
            }
            _ => [_mm512_setzero_ps(); 2],
        };
        for (row, sums) in sums.iter().enumerate() {
            let to = c.row_mut(row).as_mut_ptr();
            for half in 0..2 {
                let (mask, to) = (masks[half], to.wrapping_add(16 * half));
                let sum = match beta {
                    Beta::Zero => sums[half],
                    Beta::Bias(_) => _mm512_add_ps(sums[half], bias[half]),
                    Beta::One => _mm512_add_ps(sums[half], _mm512_maskz_loadu_ps(mask, to)),
                };
                _mm512_mask_storeu_ps(to, mask, sum);
            }
        }
    }
}

/// Returns the mask of the first `lanes` lanes.
#[inline(always)]
fn low_bits(lanes: usize) -> u16 {
    if lanes >= 16 { u16::MAX } else { (1 << lanes) - 1 }
}

/// # Safety
///
/// 32 numbers are readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn pairs_at(from: *const bf16) -> __m512bh {
    // SAFETY: see above.
    as_pairs(unsafe { _mm512_loadu_si512(from.cast()) })
}
