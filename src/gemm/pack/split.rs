//! f32 operands split into two bf16 parts each, for [`amx`] below full precision: their sum has 16 bits of an f32 number.
//! The kernel multiplies the parts that matter, smallest products first (Henry et al., "Leveraging the bfloat16 Artificial
//! Intelligence Datatype For Higher-Precision Computations", <https://arxiv.org/abs/1904.06376>).
//!
//! Full precision needs three parts and six products, which on a Sapphire Rapids took as long as multiply-adds or, when
//! the processor slowed its tiles down, half as long again: there it is left to those.

use half::bf16;

use super::{
    Arithmetic, Operand, Packing,
    bf16::{pack_columns, pack_rows},
};
use crate::{
    device::{Precision, float32_matmul_precision, simd::vectorized},
    dtype::Float,
    gemm::{
        kernels::amx::{self, KR, MR, NR},
        matrix::{Beta, Matrix, Tile, Window},
    },
};

/// Products of parts on tiles.
///
/// [`Precision::High`] multiplies all pairs of parts but that of the two small ones: the error is below 2⁻¹⁵ of the
/// product. [`Precision::Medium`] multiplies only the first pair, 2⁻⁷.
pub(in crate::gemm) struct Split;

/// Parts of an f32 number.
pub(in crate::gemm) const PARTS: usize = 2;

/// Pairs of parts, smallest product first.
fn products() -> &'static [(usize, usize)] {
    const PRODUCTS: [(usize, usize); 3] = [(1, 0), (0, 1), (0, 0)];
    match float32_matmul_precision() {
        Precision::Medium => &PRODUCTS[2..],
        _ => &PRODUCTS,
    }
}

/// Range of the largest magnitude in an operand for which products of parts stay in the normal range; outside of it,
/// tiles produce only zero and infinity.
const ORDINARY: std::ops::Range<f32> = 9.0e-13..1.0e18;

impl Packing<f32> for Split {
    fn arithmetic(&self) -> Arithmetic {
        Arithmetic::Amx
    }

    fn is_exact_enough(&self) -> bool {
        float32_matmul_precision() != Precision::Highest
    }

    fn tile(&self) -> Tile {
        Tile { mr: MR, nr: NR }
    }

    fn kr(&self) -> usize {
        KR
    }

    fn packed_size(&self) -> usize {
        PARTS * size_of::<bf16>()
    }

    fn pack_a(&self, a: Matrix<f32>, m: usize, kc: usize, to: &mut [u8]) -> bool {
        let padded = kc.next_multiple_of(KR);
        pack_parts(a, m, kc, MR, to, MR * padded, &|a, m, to| pack_rows(a, m, kc, padded, to))
    }

    fn pack_b(&self, b: Matrix<f32>, n: usize, kc: usize, to: &mut [u8]) -> bool {
        let padded = kc.next_multiple_of(KR);
        pack_parts(b.transposed(), n, kc, NR, to, NR * padded, &|b, n, to| {
            pack_columns(b.transposed(), n, kc, padded, to);
        })
    }

    fn multiply(&self, kc: usize, a: Operand<f32>, b: Operand<f32>, beta: Beta<f32>, c: Window<f32>) {
        amx::multiply_planes(kc.next_multiple_of(KR), PARTS, [a.packed(), b.packed()], products(), beta, c);
    }
}

/// Packs one part of the rows.
type PackPart<'a> = &'a dyn Fn(Matrix<bf16>, usize, &mut [bf16]);

/// Splits panels of `width` rows and packs the parts of each panel consecutively, `panel` elements each. Returns `true`
/// if all numbers are finite and the largest magnitude is neither huge nor tiny.
fn pack_parts(
    from: Matrix<f32>,
    rows: usize,
    kc: usize,
    width: usize,
    to: &mut [u8],
    panel: usize,
    pack: PackPart,
) -> bool {
    if rows == 0 || kc == 0 {
        return true;
    }
    let to: &mut [bf16] = bytemuck::cast_slice_mut(to);
    // Parts of one panel, in the order of the operand.
    let mut parts = vec![bf16::ZERO; PARTS * width * kc];
    let (mut largest, mut finite) = (0.0f32, true);
    for (index, to) in to.chunks_exact_mut(PARTS * panel).take(rows.div_ceil(width)).enumerate() {
        let rows = width.min(rows - index * width);
        let from = from.from(index * width, 0);
        // Contiguous lines of elements: rows or columns.
        let (lines, length, stride) = if from.col == 1 { (rows, kc, from.row) } else { (kc, rows, from.col) };
        let (high, low) = parts.split_at_mut(width * kc);
        for line in 0..lines {
            let place = line * length..(line + 1) * length;
            let (high, low) = (&mut high[place.clone()], &mut low[place]);
            if from.col == 1 || from.row == 1 {
                let from = &from.data[line * stride..line * stride + length];
                let found = split(from, high, low);
                (largest, finite) = (largest.max(found.0), finite & found.1);
            } else {
                for at in 0..length {
                    let from = &from.data[line * stride + at * from.row..][..1];
                    let found = split(from, &mut high[at..=at], &mut low[at..=at]);
                    (largest, finite) = (largest.max(found.0), finite & found.1);
                }
            }
        }
        let (row, col) = if from.col == 1 { (length, 1) } else { (1, length) };
        for (part, to) in [&*high, &*low].into_iter().zip(to.chunks_exact_mut(panel)) {
            pack(Matrix { data: &part[..lines * length], row, col }, rows, to);
        }
    }
    finite && (largest == 0.0 || ORDINARY.contains(&largest))
}

vectorized! {
    /// Splits f32 numbers into their parts. Returns the largest magnitude, and `true` if all are finite.
    fn split(from: &[f32], high: &mut [bf16], low: &mut [bf16]) -> (f32, bool) {
        let mut largest = 0u32;
        for ((&x, high), low) in from.iter().zip(high).zip(low) {
            let magnitude = x.to_bits() & 0x7FFF_FFFF;
            largest = if magnitude > largest { magnitude } else { largest };
            *high = <bf16 as Float>::from_acc(x);
            *low = <bf16 as Float>::from_acc(x - high.to_acc());
        }
        let largest = f32::from_bits(largest);
        (largest, largest < f32::INFINITY)
    }
}
