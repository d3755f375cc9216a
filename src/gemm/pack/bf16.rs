//! Packing of bf16 operands with an even row or panel stride, for [`bf16_dot`](crate::gemm::kernels::bf16_dot) and
//! [`amx`](crate::gemm::kernels::amx).

use std::arch::x86_64::*;

use half::bf16;

use super::{Arithmetic, Operand, Packing};
use crate::{
    device::{Level, simd},
    gemm::{
        kernels::{Order, PanelsA, PanelsB, amx, bf16_dot},
        matrix::{Beta, Matrix, Tile, Window},
        simd::Square,
    },
};

/// Number of columns per panel of B, for both kernels.
const NR: usize = bf16_dot::NR;
const _: () = assert!(NR == amx::NR);

/// Kernel of bf16 pair products.
pub(in crate::gemm) struct Bf16Dot;

/// Kernel of products on AMX tiles.
pub(in crate::gemm) struct Tiles;

/// Both read rows of A and panels of pairs of B; they differ in the height of a tile and the depth of an instruction.
macro_rules! packing {
    ($($packing:ident: $arithmetic:ident, $kernel:path, $mr:expr, $kr:expr;)*) => {$(
        impl Packing<bf16> for $packing {
            fn arithmetic(&self) -> Arithmetic {
                Arithmetic::$arithmetic
            }

            fn tile(&self) -> Tile {
                Tile { mr: $mr, nr: NR }
            }

            fn kr(&self) -> usize {
                $kr
            }

            fn packed_size(&self) -> usize {
                size_of::<bf16>()
            }

            fn reads_a(&self, a: Matrix<bf16>, kc: usize, _n: usize) -> bool {
                a.col == 1 && kc.is_multiple_of($kr)
            }

            fn pack_a(&self, a: Matrix<bf16>, m: usize, kc: usize, to: &mut [u8]) -> bool {
                pack_rows(a, m, kc, kc.next_multiple_of($kr), bytemuck::cast_slice_mut(to));
                true
            }

            fn pack_b(&self, b: Matrix<bf16>, n: usize, kc: usize, to: &mut [u8]) -> bool {
                pack_columns(b, n, kc, kc.next_multiple_of($kr), bytemuck::cast_slice_mut(to));
                true
            }

            fn multiply(&self, kc: usize, a: Operand<bf16>, b: Operand<bf16>, beta: Beta<f32>, c: Window<f32>) {
                let kc = kc.next_multiple_of($kr);
                let (data, stride) = match a {
                    Operand::InPlace(a) => (a.data, a.row),
                    Operand::Packed(bytes) => (bytemuck::cast_slice(bytes), kc),
                };
                let a = PanelsA { data, panel: $mr * stride, order: Order::Depth, stride };
                let b = PanelsB { data: b.packed(), panel: NR * kc, row: NR };
                $kernel(kc, a, b, beta, c);
            }
        }
    )*};
}

packing! {
    Bf16Dot: Bf16Dot, bf16_dot::multiply, bf16_dot::MR, 2;
    Tiles: Amx, amx::multiply, amx::MR, amx::KR;
}

/// Copies rows so that their depth is contiguous; they start `stride` apart, padded with zeros.
pub(super) fn pack_rows(a: Matrix<bf16>, m: usize, kc: usize, stride: usize, to: &mut [bf16]) {
    assert!(kc <= stride && m * stride <= to.len(), "the packed rows exceed their memory");
    if m == 0 || kc == 0 {
        return;
    }
    assert!(a.holds(m, kc), "A ends before its block");
    let vectors = a.row == 1 && simd::level() >= Level::Avx512;
    let (whole_rows, whole_depth) = if vectors { (m / 16 * 16, kc / 16 * 16) } else { (0, 0) };
    if vectors {
        // SAFETY: the level has AVX-512, and the whole blocks lie inside of both operands, as checked above.
        unsafe { transpose_rows(a.data.as_ptr(), a.col, whole_rows, whole_depth, to.as_mut_ptr(), stride) };
    }
    for (row, to) in to.chunks_exact_mut(stride).take(m).enumerate() {
        let first = if row < whole_rows { whole_depth } else { 0 };
        let from = a.at(row * a.row);
        if a.col == 1 {
            to[first..kc].copy_from_slice(&from.data[first..kc]);
        } else {
            for (p, to) in to[..kc].iter_mut().enumerate().skip(first) {
                *to = from.data[p * a.col];
            }
        }
        to[kc..].fill(bf16::ZERO);
    }
}

/// Copies columns into panels of [`NR`] with adjacent pairs, padded with zeros to a depth of `padded` and to whole
/// panels.
pub(super) fn pack_columns(b: Matrix<bf16>, n: usize, kc: usize, padded: usize, to: &mut [bf16]) {
    let panel = NR * padded;
    let panels = n.div_ceil(NR);
    assert!(kc <= padded && panels * panel <= to.len(), "the packed columns exceed their memory");
    if n == 0 || kc == 0 {
        return;
    }
    assert!(b.holds(kc, n), "B ends before its block");
    let vectors = simd::level() >= Level::Avx512;
    for (index, to) in to.chunks_exact_mut(panel).take(panels).enumerate() {
        let from = b.from(0, index * NR);
        let columns = NR.min(n - index * NR);
        let whole = match (vectors && columns == NR, b.col, b.row) {
            (true, 1, _) => kc / 2 * 2,
            (true, _, 1) => kc / 16 * 16,
            _ => 0,
        };
        if whole > 0 {
            // SAFETY: the level has AVX-512, and the whole panel of depth `whole` lies inside of both operands.
            unsafe {
                match b.col {
                    1 => panel_of_rows(from.data.as_ptr(), b.row, whole, to.as_mut_ptr()),
                    _ => panel_of_columns(from.data.as_ptr(), b.col, whole, to.as_mut_ptr()),
                }
            }
        }
        for (pair, to) in to.chunks_exact_mut(2 * NR).enumerate().skip(whole / 2) {
            for (index, to) in to.iter_mut().enumerate() {
                let (p, column) = (2 * pair + index % 2, index / 2);
                let inside = p < kc && column < columns;
                *to = if inside { from.data[p * b.row + column * b.col] } else { bf16::ZERO };
            }
        }
    }
}

/// Packs one panel of B with contiguous rows: two rows are interleaved.
///
/// # Safety
///
/// AVX-512 is there; [`NR`] elements of `kc` rows, an even number, are readable, and as many are writable.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn panel_of_rows(from: *const bf16, row: usize, kc: usize, to: *mut bf16) {
    let mut first = [0u16; 32];
    for (index, first) in first.iter_mut().enumerate() {
        // Columns 0 to 15; an index of 32 and more takes from the second row.
        *first = (index / 2 + index % 2 * 32) as u16;
    }
    let second = first.map(|index| index + 16);
    // SAFETY: see above.
    unsafe {
        let (first, second) = (_mm512_loadu_si512(first.as_ptr().cast()), _mm512_loadu_si512(second.as_ptr().cast()));
        for p in (0..kc).step_by(2) {
            let even = _mm512_loadu_si512(from.add(p * row).cast());
            let odd = _mm512_loadu_si512(from.add((p + 1) * row).cast());
            let to = to.add(p * NR);
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(even, first, odd));
            _mm512_storeu_si512(to.add(NR).cast(), _mm512_permutex2var_epi16(even, second, odd));
        }
    }
}

/// Packs one panel of B with contiguous columns: squares of pairs are transposed in registers.
///
/// # Safety
///
/// AVX-512 is there; `kc` elements, a multiple of 16, of [`NR`] columns are readable, and as many writable.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
unsafe fn panel_of_columns(from: *const bf16, column: usize, kc: usize, to: *mut bf16) {
    // SAFETY: see above.
    unsafe {
        for p in (0..kc).step_by(16) {
            for part in (0..NR).step_by(8) {
                let mut square = [_mm256_setzero_ps(); 8];
                for (index, pairs) in square.iter_mut().enumerate() {
                    *pairs = _mm256_loadu_ps(from.add((part + index) * column + p).cast());
                }
                for (pair, columns) in __m256::transpose(square).into_iter().enumerate() {
                    _mm256_storeu_ps(to.add(((p / 2 + pair) * NR + part) * 2).cast(), columns);
                }
            }
        }
    }
}

/// Packs rows of A whose depth is not contiguous: two columns are interleaved, and squares of pairs are transposed in
/// registers.
///
/// # Safety
///
/// AVX-512 is there; `rows` elements of `kc` columns, multiples of 16, are readable, and as many writable.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
unsafe fn transpose_rows(from: *const bf16, column: usize, rows: usize, kc: usize, to: *mut bf16, stride: usize) {
    let mut index = [0u16; 16];
    for (place, index) in index.iter_mut().enumerate() {
        *index = (place / 2 + place % 2 * 16) as u16;
    }
    let other = index.map(|index| index + 8);
    // SAFETY: see above.
    unsafe {
        let (index, other) = (_mm256_loadu_si256(index.as_ptr().cast()), _mm256_loadu_si256(other.as_ptr().cast()));
        for p in (0..kc).step_by(16) {
            for row in (0..rows).step_by(16) {
                let mut squares = [[_mm256_setzero_ps(); 8]; 2];
                let [first, second] = &mut squares;
                for (pair, (first, second)) in first.iter_mut().zip(second).enumerate() {
                    let from = from.add((p + 2 * pair) * column + row);
                    let even = _mm256_loadu_si256(from.cast());
                    let odd = _mm256_loadu_si256(from.add(column).cast());
                    *first = _mm256_castsi256_ps(_mm256_permutex2var_epi16(even, index, odd));
                    *second = _mm256_castsi256_ps(_mm256_permutex2var_epi16(even, other, odd));
                }
                for (half, square) in squares.into_iter().enumerate() {
                    for (lane, pairs) in __m256::transpose(square).into_iter().enumerate() {
                        _mm256_storeu_ps(to.add((row + 8 * half + lane) * stride + p).cast(), pairs);
                    }
                }
            }
        }
    }
}
