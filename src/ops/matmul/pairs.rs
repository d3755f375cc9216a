//! Products of bf16 matrices by instructions that multiply two pairs of bf16 numbers and add both products to an f32:
//! twice the rate of a multiply-add (`vdpbf16ps` of AVX-512 BF16).
//!
//! A is read by rows whose steps lie next to each other. B is packed in panels of [`COLUMNS`] columns in which the two
//! steps of a pair lie next to each other: element (step, column) at `(step / 2 · COLUMNS + column) · 2 + step % 2`.
//! Products and sums below f32's normal range (1.2e-38) count as zero: the instruction knows no others.

use std::arch::x86_64::*;

use half::bf16;

use super::{
    cpu::Matrix,
    few::Lane,
    lanes::{Square, as_pairs},
    microkernel::{Left, Order, Right, Start, Tile, Window},
    packing::Packing,
};
use crate::device::{Level, simd};

/// Columns of a panel: two registers of sums.
pub(super) const COLUMNS: usize = 32;

/// Rows of a tile, whose sums fill 24 of 32 registers.
const ROWS: usize = 12;

/// Pairs of bf16 numbers, on processors with the instruction.
pub(crate) struct Pairs;

impl Packing<bf16> for Pairs {
    type Packed = bf16;
    const STEPS: usize = 2;

    fn available() -> bool {
        simd::level() >= Level::Avx512Bf16
    }

    fn lane() -> Option<Lane> {
        Self::available().then_some(Lane::Pair)
    }

    fn tile() -> Tile {
        Tile { rows: ROWS, columns: COLUMNS }
    }

    fn left_in_place(a: Matrix<'_, bf16>, steps: usize, _columns: usize) -> Option<Left<'_, bf16>> {
        let fits = a.col == 1 && steps.is_multiple_of(2);
        fits.then_some(Left { data: a.data, panel: ROWS * a.row, order: Order::Steps, stride: a.row })
    }

    fn right_in_place(_: Matrix<'_, bf16>, _: usize, _: usize, _: usize) -> Option<Right<'_, bf16>> {
        None
    }

    fn pack_left(a: Matrix<bf16>, rows: usize, steps: usize, to: &mut [bf16]) -> bool {
        pack_rows(a, rows, steps, steps.next_multiple_of(2), to);
        true
    }

    fn pack_right(b: Matrix<bf16>, columns: usize, steps: usize, to: &mut [bf16]) -> bool {
        pack_columns(b, columns, steps, steps.next_multiple_of(2), to);
        true
    }

    fn packed_left(packed: &[bf16], steps: usize) -> Left<'_, bf16> {
        let stride = steps.next_multiple_of(2);
        Left { data: packed, panel: ROWS * stride, order: Order::Steps, stride }
    }

    fn multiply(steps: usize, a: Left<bf16>, b: Right<bf16>, start: Start<f32>, mut c: Window<f32>) {
        assert!(Self::available(), "the processor has no products of pairs");
        let (m, n) = (c.rows(), c.columns());
        if m == 0 || n == 0 {
            return;
        }
        let steps = steps.next_multiple_of(2);
        if steps > 0 {
            let last_panel = (m - 1) / ROWS * a.panel + (m - 1) % ROWS * a.stride;
            let full_panel = (m / ROWS).saturating_sub(1) * a.panel + (ROWS.min(m) - 1) * a.stride;
            assert!(last_panel.max(full_panel) + steps <= a.data.len(), "A ends before its block");
            assert!((n - 1) / COLUMNS * b.panel + COLUMNS * steps <= b.data.len(), "B ends before its block");
        }
        if let Start::Bias(bias) = start {
            assert!(bias.len() >= n, "the bias ends before the columns");
        }
        for j in (0..n).step_by(COLUMNS) {
            let columns = COLUMNS.min(n - j);
            let b = b.data[j / COLUMNS * b.panel..].as_ptr();
            for i in (0..m).step_by(ROWS) {
                let a_rows = a.data[i / ROWS * a.panel..].as_ptr();
                let rows = ROWS.min(m - i);
                let tile = c.part(i, j, rows, columns);
                // SAFETY: the level has the instruction; the reach of both operands is checked above.
                unsafe { one_tile(rows, steps / 2, a_rows, a.stride, b, start.of_block(0, j), tile) };
            }
        }
    }
}

/// Copies rows so that their steps lie next to each other; they start `stride` apart, filled up with zeros.
pub(super) fn pack_rows(a: Matrix<bf16>, rows: usize, steps: usize, stride: usize, to: &mut [bf16]) {
    assert!(steps <= stride && rows * stride <= to.len(), "the packed rows exceed their memory");
    if rows == 0 || steps == 0 {
        return;
    }
    assert!((rows - 1) * a.row + (steps - 1) * a.col < a.data.len(), "A ends before its block");
    let vectors = a.row == 1 && simd::level() >= Level::Avx512;
    let (whole_rows, whole_steps) = if vectors { (rows / 16 * 16, steps / 16 * 16) } else { (0, 0) };
    if vectors {
        // SAFETY: the level has AVX-512, and the whole blocks lie inside of both operands, as checked above.
        unsafe { rows_of_lanes(a.data.as_ptr(), a.col, whole_rows, whole_steps, to.as_mut_ptr(), stride) };
    }
    for (row, to) in to.chunks_exact_mut(stride).take(rows).enumerate() {
        let first = if row < whole_rows { whole_steps } else { 0 };
        let from = a.at(row * a.row);
        if a.col == 1 {
            to[first..steps].copy_from_slice(&from.data[first..steps]);
        } else {
            for (step, to) in to[..steps].iter_mut().enumerate().skip(first) {
                *to = from.data[step * a.col];
            }
        }
        to[steps..].fill(bf16::ZERO);
    }
}

/// Copies columns into panels of [`COLUMNS`], the two steps of a pair next to each other, filled up to `padded` steps and
/// whole panels with zeros.
pub(super) fn pack_columns(b: Matrix<bf16>, columns: usize, steps: usize, padded: usize, to: &mut [bf16]) {
    let panel = COLUMNS * padded;
    let panels = columns.div_ceil(COLUMNS);
    assert!(steps <= padded && panels * panel <= to.len(), "the packed columns exceed their memory");
    if columns == 0 || steps == 0 {
        return;
    }
    assert!((steps - 1) * b.row + (columns - 1) * b.col < b.data.len(), "B ends before its block");
    let vectors = simd::level() >= Level::Avx512;
    for (index, to) in to.chunks_exact_mut(panel).take(panels).enumerate() {
        let from = b.from(0, index * COLUMNS);
        let columns = COLUMNS.min(columns - index * COLUMNS);
        let whole = match (vectors && columns == COLUMNS, b.col, b.row) {
            (true, 1, _) => steps / 2 * 2,
            (true, _, 1) => steps / 16 * 16,
            _ => 0,
        };
        if whole > 0 {
            // SAFETY: the level has AVX-512, and the whole panel of `whole` steps lies inside of both operands.
            unsafe {
                match b.col {
                    1 => panel_of_rows(from.data.as_ptr(), b.row, whole, to.as_mut_ptr()),
                    _ => panel_of_columns(from.data.as_ptr(), b.col, whole, to.as_mut_ptr()),
                }
            }
        }
        for (pair, to) in to.chunks_exact_mut(2 * COLUMNS).enumerate().skip(whole / 2) {
            for (index, to) in to.iter_mut().enumerate() {
                let (step, column) = (2 * pair + index % 2, index / 2);
                let inside = step < steps && column < columns;
                *to = if inside { from.data[step * b.row + column * b.col] } else { bf16::ZERO };
            }
        }
    }
}

/// `C = start + A·B` for one tile of at most [`ROWS`] rows and [`COLUMNS`] columns.
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
    start: Start<f32>,
    c: Window<f32>,
) {
    // SAFETY: the caller answers for the pointers.
    unsafe {
        match rows {
            1 => tile_of::<1>(pairs, a, stride, b, start, c),
            2 => tile_of::<2>(pairs, a, stride, b, start, c),
            3 => tile_of::<3>(pairs, a, stride, b, start, c),
            4 => tile_of::<4>(pairs, a, stride, b, start, c),
            5 => tile_of::<5>(pairs, a, stride, b, start, c),
            6 => tile_of::<6>(pairs, a, stride, b, start, c),
            7 => tile_of::<7>(pairs, a, stride, b, start, c),
            8 => tile_of::<8>(pairs, a, stride, b, start, c),
            9 => tile_of::<9>(pairs, a, stride, b, start, c),
            10 => tile_of::<10>(pairs, a, stride, b, start, c),
            11 => tile_of::<11>(pairs, a, stride, b, start, c),
            _ => tile_of::<ROWS>(pairs, a, stride, b, start, c),
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
    start: Start<f32>,
    mut c: Window<f32>,
) {
    /// Rows that are reached from one pointer, as in the other micro-kernel.
    const REACHED: usize = 4;
    // SAFETY: the caller answers for the pointers; rows of C are slices, whose ends the masks respect.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        let mut groups = [0, 1, 2].map(|group| a.wrapping_add(group * REACHED * stride));
        let strides = [0, stride, 2 * stride, 3 * stride];
        let mut b = b;
        for _ in 0..pairs {
            let columns = [pairs_at(b), pairs_at(b.add(COLUMNS))];
            for (index, sums) in sums.iter_mut().enumerate() {
                let pair = groups[index / REACHED].wrapping_add(strides[index % REACHED]).cast::<i32>();
                let pair = as_pairs(_mm512_set1_epi32(pair.read_unaligned()));
                sums[0] = _mm512_dpbf16_ps(sums[0], pair, columns[0]);
                sums[1] = _mm512_dpbf16_ps(sums[1], pair, columns[1]);
            }
            // Wrapping: after the last pair the pointers may leave their slices.
            b = b.wrapping_add(2 * COLUMNS);
            groups = groups.map(|group| group.wrapping_add(2));
        }
        let columns = c.columns();
        let masks = [low_bits(columns), low_bits(columns.saturating_sub(16))];
        let bias = match start {
            Start::Bias(bias) => {
                let at = |half: usize| bias.as_ptr().wrapping_add(16 * half);
                [_mm512_maskz_loadu_ps(masks[0], at(0)), _mm512_maskz_loadu_ps(masks[1], at(1))]
            }
            _ => [_mm512_setzero_ps(); 2],
        };
        for (row, sums) in sums.iter().enumerate() {
            let to = c.row_mut(row).as_mut_ptr();
            for half in 0..2 {
                let (mask, to) = (masks[half], to.wrapping_add(16 * half));
                let sum = match start {
                    Start::Zero => sums[half],
                    Start::Bias(_) => _mm512_add_ps(sums[half], bias[half]),
                    Start::Previous => _mm512_add_ps(sums[half], _mm512_maskz_loadu_ps(mask, to)),
                };
                _mm512_mask_storeu_ps(to, mask, sum);
            }
        }
    }
}

/// A mask of the first lanes.
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

/// One panel of B whose rows lie in memory: two rows are shuffled into one another.
///
/// # Safety
///
/// AVX-512 is there; [`COLUMNS`] elements of `steps` rows, an even number, are readable, and as many are writable.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn panel_of_rows(from: *const bf16, row: usize, steps: usize, to: *mut bf16) {
    let mut first = [0u16; 32];
    for (index, first) in first.iter_mut().enumerate() {
        // Columns 0 to 15; an index of 32 and more takes from the second row.
        *first = (index / 2 + index % 2 * 32) as u16;
    }
    let second = first.map(|index| index + 16);
    // SAFETY: see above.
    unsafe {
        let (first, second) = (_mm512_loadu_si512(first.as_ptr().cast()), _mm512_loadu_si512(second.as_ptr().cast()));
        for step in (0..steps).step_by(2) {
            let even = _mm512_loadu_si512(from.add(step * row).cast());
            let odd = _mm512_loadu_si512(from.add((step + 1) * row).cast());
            let to = to.add(step * COLUMNS);
            _mm512_storeu_si512(to.cast(), _mm512_permutex2var_epi16(even, first, odd));
            _mm512_storeu_si512(to.add(COLUMNS).cast(), _mm512_permutex2var_epi16(even, second, odd));
        }
    }
}

/// One panel of B whose columns lie in memory: squares of pairs are transposed in registers.
///
/// # Safety
///
/// AVX-512 is there; `steps` elements, a multiple of 16, of [`COLUMNS`] columns are readable, and as many writable.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw")]
unsafe fn panel_of_columns(from: *const bf16, column: usize, steps: usize, to: *mut bf16) {
    // SAFETY: see above.
    unsafe {
        for step in (0..steps).step_by(16) {
            for part in (0..COLUMNS).step_by(8) {
                let mut square = [_mm256_setzero_ps(); 8];
                for (index, pairs) in square.iter_mut().enumerate() {
                    *pairs = _mm256_loadu_ps(from.add((part + index) * column + step).cast());
                }
                for (pair, columns) in __m256::transpose(square).into_iter().enumerate() {
                    _mm256_storeu_ps(to.add(((step / 2 + pair) * COLUMNS + part) * 2).cast(), columns);
                }
            }
        }
    }
}

/// Rows of A that lie next to each other, step after step: pairs of steps are shuffled into one another, and squares of
/// pairs transposed in registers.
///
/// # Safety
///
/// AVX-512 is there; `rows` elements of `steps` steps, multiples of 16, are readable, and as many writable.
#[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
unsafe fn rows_of_lanes(
    from: *const bf16,
    step_stride: usize,
    rows: usize,
    steps: usize,
    to: *mut bf16,
    stride: usize,
) {
    let mut index = [0u16; 16];
    for (place, index) in index.iter_mut().enumerate() {
        *index = (place / 2 + place % 2 * 16) as u16;
    }
    let other = index.map(|index| index + 8);
    // SAFETY: see above.
    unsafe {
        let (index, other) = (_mm256_loadu_si256(index.as_ptr().cast()), _mm256_loadu_si256(other.as_ptr().cast()));
        for step in (0..steps).step_by(16) {
            for row in (0..rows).step_by(16) {
                let mut squares = [[_mm256_setzero_ps(); 8]; 2];
                let [first, second] = &mut squares;
                for (pair, (first, second)) in first.iter_mut().zip(second).enumerate() {
                    let from = from.add((step + 2 * pair) * step_stride + row);
                    let even = _mm256_loadu_si256(from.cast());
                    let odd = _mm256_loadu_si256(from.add(step_stride).cast());
                    *first = _mm256_castsi256_ps(_mm256_permutex2var_epi16(even, index, odd));
                    *second = _mm256_castsi256_ps(_mm256_permutex2var_epi16(even, other, odd));
                }
                for (half, square) in squares.into_iter().enumerate() {
                    for (lane, pairs) in __m256::transpose(square).into_iter().enumerate() {
                        _mm256_storeu_ps(to.add((row + 8 * half + lane) * stride + step).cast(), pairs);
                    }
                }
            }
        }
    }
}
