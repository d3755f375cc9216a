//! A few rows times a matrix whose columns lie in memory, by AVX-512: B is read once, where it lies and in the order of
//! memory, and not packed. Reading it is all the cost for the first rows, and for more of them multiply-adds are.
//!
//! Squares of B are transposed in registers, so that lanes are columns; or, for more rows, each of its elements goes to all
//! lanes, which are rows. The order of additions is that of the packed product, whose bits these are.

use super::{
    cpu::{Matrix, STEPS},
    microkernel::{Start, Window},
    packing::Packing,
    skinny,
};
use crate::{device::scratch::aligned, dtype::Float};

/// At most this many rows are worth it.
const ROWS: usize = 2 * LANES;

/// Rows that are multiplied at a time while lanes are rows: two vectors.
const LANES: usize = 2 * COLUMNS;

/// Columns at a time, the lanes of a vector; remainders are not done.
pub(super) const COLUMNS: usize = 16;

/// Rows that are multiplied at a time while lanes are columns: their sums and a transposed square fill the registers.
const TOGETHER: usize = 12;

/// At most this many rows are worth it if lanes are columns.
const GROUPED: usize = 2 * TOGETHER;

/// What a lane of B is made from, and the instruction that multiplies it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lane {
    /// An f32, multiplied and added.
    F32,
    /// A bf16, widened to an f32.
    Bf16,
    /// An f16, widened to an f32.
    F16,
    /// Two steps in bf16: both products are added at a time.
    Pair,
}

impl Lane {
    /// Lanes of a block of steps.
    fn words(self, steps: usize) -> usize {
        if self == Self::Pair { steps.div_ceil(2) } else { steps }
    }

    /// Whether elements of B are lanes as they lie in memory.
    fn whole(self, k: usize) -> bool {
        match self {
            Self::F32 => true,
            Self::Pair => k.is_multiple_of(2),
            Self::Bf16 | Self::F16 => false,
        }
    }
}

/// How a product of so many rows is multiplied here, if it is.
pub(super) fn lane<T: Float, P: Packing<T>>(rows: usize, k: usize, b: Matrix<T>) -> Option<Lane> {
    let fits = cfg!(target_arch = "x86_64") && (1..=ROWS).contains(&rows) && k > 0 && b.row == 1;
    let fits = |lane: Lane| fits && (rows <= GROUPED || lane.whole(k));
    // Fewer columns at a time, which the other way takes, find more of theirs in the first-level cache: for as few rows of
    // f32 as wait for nothing but memory that counts for more than wider vectors.
    P::lane().filter(|&lane| fits(lane) && (lane != Lane::F32 || rows > skinny::TOGETHER))
}

/// Rows of A as bytes, lane after lane.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [u8],
    /// Bytes from one row to the next.
    row: usize,
}

impl<'a> Rows<'a> {
    /// Rows in place if they lie in memory as they are needed, else copied.
    fn new<T: Float>(lane: Lane, a: Matrix<'a, T>, rows: usize, k: usize, copy: &'a mut Vec<u64>) -> Self {
        if lane.whole(k) && a.col == 1 {
            return Self { data: bytemuck::cast_slice(a.data), row: a.row * size_of::<T>() };
        }
        let words = lane.words(k);
        let copy = aligned::<u32>(copy, rows * words);
        for (row, copy) in copy.chunks_exact_mut(words).enumerate() {
            let from = a.at(row * a.row);
            if lane == Lane::Pair {
                let halves: &mut [u16] = bytemuck::cast_slice_mut(copy);
                for (step, half) in halves.iter_mut().enumerate() {
                    *half = if step < k { half_bits(from.data[step * a.col]) } else { 0 };
                }
                continue;
            }
            let singles: &mut [f32] = bytemuck::cast_slice_mut(copy);
            if a.col == 1 {
                singles.iter_mut().zip(from.data).for_each(|(to, &value)| *to = single(value));
            } else {
                singles.iter_mut().enumerate().for_each(|(step, to)| *to = single(from.data[step * a.col]));
            }
        }
        Self { data: bytemuck::cast_slice(copy), row: 4 * words }
    }
}

/// The bits of a type of two bytes.
fn half_bits<T: Float>(value: T) -> u16 {
    bytemuck::pod_read_unaligned(&bytemuck::bytes_of(&value)[..2])
}

/// A value in f32, which is the type of its sums.
fn single<T: Float>(value: T) -> f32 {
    bytemuck::pod_read_unaligned(&bytemuck::bytes_of(&value.to_acc())[..4])
}

/// `C = start + A·B` for the first columns; returns how many, a multiple of [`COLUMNS`]. `copy` is memory for rows of A.
pub(super) fn multiply<T: Float>(
    lane: Lane,
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    start: Start<T::Acc>,
    c: &mut Window<T::Acc>,
    copy: &mut Vec<u64>,
) -> usize {
    let (rows, done) = (c.rows(), c.columns() / COLUMNS * COLUMNS);
    if done == 0 || rows == 0 || k == 0 {
        return 0;
    }
    #[cfg(target_arch = "x86_64")]
    if rows > TOGETHER && lane.whole(k) {
        return multiply_by_rows(lane, k, a, b, start, c, copy);
    }
    let a = Rows::new(lane, a, rows, k, copy);
    let groups = rows.div_ceil(TOGETHER);
    let mut sums = [[0.0f32; COLUMNS]; TOGETHER];
    for j in (0..done).step_by(COLUMNS) {
        for step in (0..k).step_by(STEPS) {
            let steps = STEPS.min(k - step);
            let passed = lane.words(step);
            let start = start.of_block(step, j);
            for group in 0..groups {
                // Groups of about the same size.
                let (first, end) = (group * rows / groups, (group + 1) * rows / groups);
                let a = Rows { data: &a.data[first * a.row + 4 * passed..], ..a };
                let sums = &mut sums[..end - first];
                #[cfg(target_arch = "x86_64")]
                avx512::multiply(lane, a, steps, b.from(step, j), passed, sums);
                for (i, sums) in (first..end).zip(sums) {
                    start.add_to(bytemuck::cast_slice(sums), &mut c.row_mut(i)[j..]);
                }
            }
        }
    }
    done
}

/// As [`multiply`], with groups of rows in the lanes of one or two vectors.
#[cfg(target_arch = "x86_64")]
fn multiply_by_rows<T: Float>(
    lane: Lane,
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    start: Start<T::Acc>,
    c: &mut Window<T::Acc>,
    copy: &mut Vec<u64>,
) -> usize {
    let (rows, done) = (c.rows(), c.columns() / COLUMNS * COLUMNS);
    let words = lane.words(k);
    let groups = rows.div_ceil(LANES);
    // The first row and the end of each group, and vectors of a word: all are full but the last.
    let group = |group: usize| {
        let (first, end) = (group * LANES, rows.min((group + 1) * LANES));
        (first, end, (end - first).div_ceil(COLUMNS))
    };
    let packed = aligned::<[f32; COLUMNS]>(copy, words * (0..groups).map(|index| group(index).2).sum::<usize>());
    let mut rest = &mut *packed;
    for (first, end, vectors) in (0..groups).map(group) {
        let (of_group, others) = std::mem::take(&mut rest).split_at_mut(words * vectors);
        pack_words(lane, a.from(first, 0), end - first, k, of_group);
        rest = others;
    }
    let mut sums = [[0.0f32; COLUMNS]; LANES];
    for j in (0..done).step_by(COLUMNS) {
        for step in (0..k).step_by(STEPS) {
            let steps = STEPS.min(k - step);
            let passed = lane.words(step);
            let start = start.of_block(step, j);
            let mut a = &*packed;
            for (first, end, vectors) in (0..groups).map(group) {
                let sums = &mut sums[..vectors * COLUMNS];
                avx512::multiply_by_rows(lane, &a[passed * vectors..], steps, b.from(step, j), passed, sums);
                for (i, sums) in (first..end).zip(sums) {
                    start.add_to(bytemuck::cast_slice(sums), &mut c.row_mut(i)[j..]);
                }
                a = &a[words * vectors..];
            }
        }
    }
    done
}

/// Packs rows of A into vectors: of each word all rows, filled up with zeros.
#[cfg(target_arch = "x86_64")]
fn pack_words<T: Float>(lane: Lane, a: Matrix<T>, rows: usize, k: usize, to: &mut [[f32; COLUMNS]]) {
    let whole = avx512::pack(lane, a, rows, k, to);
    let word = |row: usize, word: usize| match lane {
        _ if row >= rows => 0.0,
        Lane::Pair => {
            let half = |step: usize| u32::from(half_bits(a.data[row * a.row + step * a.col]));
            f32::from_bits(half(2 * word) | half(2 * word + 1) << 16)
        }
        _ => single(a.data[row * a.row + word * a.col]),
    };
    let lanes = rows.next_multiple_of(COLUMNS);
    for (index, of_word) in to.as_flattened_mut().chunks_exact_mut(lanes).enumerate().skip(whole) {
        of_word.iter_mut().enumerate().for_each(|(row, to)| *to = word(row, index));
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{
        super::lanes::{Square, as_pairs},
        COLUMNS, Float, Lane, Matrix, Rows,
    };
    use crate::device::{Level, simd};

    /// `sums[i][j] = Σ_step A[i, step] · B[step, j]` for one block of steps, which comes after `passed` words of the same
    /// columns.
    pub fn multiply<T: Float>(
        lane: Lane,
        a: Rows,
        steps: usize,
        b: Matrix<T>,
        passed: usize,
        sums: &mut [[f32; COLUMNS]],
    ) {
        let (level, bytes) = if lane == Lane::Pair { (Level::Avx512Bf16, 2) } else { (Level::Avx512, size_of::<T>()) };
        assert!(simd::level() >= level && bytes == size_of::<T>(), "the processor has no such products");
        assert!(steps > 0 && steps - 1 + (COLUMNS - 1) * b.col < b.data.len(), "B ends before its block");
        let last = sums.len().saturating_sub(1);
        assert!(last * a.row + 4 * lane.words(steps) <= a.data.len(), "A ends before its block");
        let block = Block {
            a: a.data.as_ptr(),
            row: a.row,
            steps,
            b: b.data.as_ptr().cast(),
            column: b.col * size_of::<T>(),
            passed,
            sums: sums.as_mut_ptr().cast(),
        };
        // SAFETY: the level has the instructions; the reach of the operands is checked above.
        unsafe {
            match lane {
                Lane::F32 => of_f32(&block, sums.len()),
                Lane::Bf16 => of_bf16(&block, sums.len()),
                Lane::F16 => of_f16(&block, sums.len()),
                Lane::Pair => of_pairs(&block, sums.len()),
            }
        }
    }

    /// The arguments of [`multiply`] after its checks.
    struct Block {
        a: *const u8,
        /// Bytes from one row of A to the next.
        row: usize,
        steps: usize,
        b: *const u8,
        /// Bytes from one column to the next.
        column: usize,
        passed: usize,
        sums: *mut f32,
    }

    /// How a vector of lanes is read and multiplied. The methods may be called only where the processor has the
    /// instructions, with pointers to as many bytes as the lanes have.
    trait Lanes {
        /// Bytes of a lane in B.
        const BYTES: usize;
        /// Steps in a lane.
        const STEPS: usize;
        unsafe fn load(from: *const u8) -> __m512;
        unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512;
    }

    macro_rules! lanes {
        ($($(#[$meta:meta])* $name:ident, $of:ident: $bytes:literal bytes, $steps:literal steps, $features:literal,
            |$from:ident| $load:expr, |$a:ident, $b:ident, $sum:ident| $multiply:expr;)*) => {$(
            $(#[$meta])*
            struct $name;

            impl Lanes for $name {
                const BYTES: usize = $bytes;
                const STEPS: usize = $steps;
                #[inline(always)]
                unsafe fn load($from: *const u8) -> __m512 {
                    // SAFETY: see the trait.
                    unsafe { $load }
                }
                #[inline(always)]
                unsafe fn multiply_add($a: __m512, $b: __m512, $sum: __m512) -> __m512 {
                    // SAFETY: see the trait.
                    unsafe { $multiply }
                }
            }

            /// # Safety
            ///
            /// The processor has the instructions; the pointers reach as far as the sizes say.
            #[target_feature(enable = $features)]
            unsafe fn $of(block: &Block, rows: usize) {
                // SAFETY: see above.
                unsafe {
                    match rows {
                        1 => square_by_square::<$name, 1>(block),
                        2 => square_by_square::<$name, 2>(block),
                        3 => square_by_square::<$name, 3>(block),
                        4 => square_by_square::<$name, 4>(block),
                        5 => square_by_square::<$name, 5>(block),
                        6 => square_by_square::<$name, 6>(block),
                        7 => square_by_square::<$name, 7>(block),
                        8 => square_by_square::<$name, 8>(block),
                        9 => square_by_square::<$name, 9>(block),
                        10 => square_by_square::<$name, 10>(block),
                        11 => square_by_square::<$name, 11>(block),
                        _ => square_by_square::<$name, 12>(block),
                    }
                }
            }
        )*};
    }

    lanes! {
        Singles, of_f32: 4 bytes, 1 steps, "avx512f,avx512bw,avx512dq,avx512vl",
            |from| _mm512_loadu_ps(from.cast()), |a, b, sum| _mm512_fmadd_ps(a, b, sum);
        /// The upper halves of f32.
        Bf16s, of_bf16: 2 bytes, 1 steps, "avx512f,avx512bw,avx512dq,avx512vl",
            |from| {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            },
            |a, b, sum| _mm512_fmadd_ps(a, b, sum);
        F16s, of_f16: 2 bytes, 1 steps, "avx512f,avx512bw,avx512dq,avx512vl",
            |from| _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())), |a, b, sum| _mm512_fmadd_ps(a, b, sum);
        Pairs, of_pairs: 4 bytes, 2 steps, "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16",
            |from| _mm512_loadu_ps(from.cast()),
            |a, b, sum| _mm512_dpbf16_ps(sum, as_pairs(_mm512_castps_si512(a)), as_pairs(_mm512_castps_si512(b)));
    }

    /// # Safety
    ///
    /// As for the functions that call it; A and the sums have `ROWS` rows.
    #[inline(always)]
    unsafe fn square_by_square<L: Lanes, const ROWS: usize>(block: &Block) {
        /// Rows that are reached from one pointer, as in the other micro-kernels.
        const REACHED: usize = 4;
        let &Block { a, row, steps, b, column, passed, .. } = block;
        let mut groups = [0, 1, 2].map(|group| a.wrapping_add(group * REACHED * row));
        let strides = [0, row, 2 * row, 3 * row];
        let mut sums = [unsafe { _mm512_setzero_ps() }; ROWS];
        let words = steps / L::STEPS;
        let whole = words / COLUMNS * COLUMNS;
        // SAFETY: see above.
        unsafe {
            // The next columns lie behind these without a gap: they are fetched in the order of memory, whatever the order
            // in which they will be read.
            let next = b.wrapping_add(COLUMNS * column).wrapping_sub(passed * L::BYTES);
            for word in (0..whole).step_by(COLUMNS) {
                let next = next.wrapping_add((passed + word) * L::BYTES * COLUMNS).cast::<i8>();
                for line in 0..COLUMNS * COLUMNS * L::BYTES / 64 {
                    _mm_prefetch(next.wrapping_add(64 * line), _MM_HINT_T0);
                }
                let mut square = [_mm512_setzero_ps(); COLUMNS];
                for (index, values) in square.iter_mut().enumerate() {
                    *values = L::load(b.add(index * column + word * L::BYTES));
                }
                for (index, values) in __m512::transpose(square).into_iter().enumerate() {
                    for (row, sum) in sums.iter_mut().enumerate() {
                        let factor =
                            groups[row / REACHED].wrapping_add(strides[row % REACHED] + 4 * index).cast::<f32>();
                        *sum = L::multiply_add(_mm512_set1_ps(factor.read_unaligned()), values, *sum);
                    }
                }
                // Wrapping: after the last square the pointers may leave their slices.
                groups = groups.map(|group| group.wrapping_add(4 * COLUMNS));
            }
            // What is left of the steps, filled up to a square.
            let rest = steps - whole * L::STEPS;
            if rest > 0 {
                let mut lines = [[0u8; 64]; COLUMNS];
                for (index, line) in lines.iter_mut().enumerate() {
                    let from = b.add(index * column + whole * L::BYTES);
                    std::ptr::copy_nonoverlapping(from, line.as_mut_ptr(), rest * L::BYTES / L::STEPS);
                }
                let square = __m512::transpose(lines.map(|line| L::load(line.as_ptr())));
                for (index, &values) in square.iter().enumerate().take(rest.div_ceil(L::STEPS)) {
                    for (row, sum) in sums.iter_mut().enumerate() {
                        let factor =
                            groups[row / REACHED].wrapping_add(strides[row % REACHED] + 4 * index).cast::<f32>();
                        *sum = L::multiply_add(_mm512_set1_ps(factor.read_unaligned()), values, *sum);
                    }
                }
            }
            for (row, sum) in sums.into_iter().enumerate() {
                _mm512_storeu_ps(block.sums.add(row * COLUMNS), sum);
            }
        }
    }
    /// Packs as many words of all rows as squares hold, each with the lanes of all rows; returns how many.
    pub fn pack<T: Float>(lane: Lane, a: Matrix<T>, rows: usize, k: usize, to: &mut [[f32; COLUMNS]]) -> usize {
        let whole = lane.words(k) / COLUMNS * COLUMNS;
        if a.col != 1 || whole == 0 {
            return 0;
        }
        let vectors = rows.div_ceil(COLUMNS);
        assert!(lane.whole(k) && simd::level() >= Level::Avx512, "rows that are not packed by squares");
        assert!((rows - 1) * a.row + k <= a.data.len() && vectors * whole <= to.len(), "the rows exceed their memory");
        // SAFETY: the level has AVX-512, and `whole` words of every row lie inside of both operands.
        unsafe { squares(a.data.as_ptr().cast(), a.row * size_of::<T>(), rows, whole, to.as_mut_ptr().cast()) };
        whole
    }

    /// # Safety
    ///
    /// AVX-512 is there; `words` words, a multiple of [`COLUMNS`], of all rows are readable, and as many vectors writable for
    /// each [`COLUMNS`] rows.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn squares(from: *const u8, row: usize, rows: usize, words: usize, to: *mut f32) {
        let vectors = rows.div_ceil(COLUMNS);
        // SAFETY: see above.
        unsafe {
            for vector in 0..vectors {
                let rows = COLUMNS.min(rows - vector * COLUMNS);
                for word in (0..words).step_by(COLUMNS) {
                    let mut square = [_mm512_setzero_ps(); COLUMNS];
                    for (index, values) in square.iter_mut().enumerate().take(rows) {
                        *values = _mm512_loadu_ps(from.add((vector * COLUMNS + index) * row + 4 * word).cast());
                    }
                    for (index, values) in __m512::transpose(square).into_iter().enumerate() {
                        _mm512_storeu_ps(to.add(((word + index) * vectors + vector) * COLUMNS), values);
                    }
                }
            }
        }
    }

    /// As [`multiply`] for rows in the lanes of packed words.
    pub fn multiply_by_rows<T: Float>(
        lane: Lane,
        a: &[[f32; COLUMNS]],
        steps: usize,
        b: Matrix<T>,
        passed: usize,
        sums: &mut [[f32; COLUMNS]],
    ) {
        let level = if lane == Lane::Pair { Level::Avx512Bf16 } else { Level::Avx512 };
        let bytes = if lane == Lane::Pair { 2 } else { 4 };
        assert!(simd::level() >= level && bytes == size_of::<T>() && lane.whole(steps), "no such products");
        assert!(steps > 0 && steps - 1 + (COLUMNS - 1) * b.col < b.data.len(), "B ends before its block");
        let vectors = sums.len() / COLUMNS;
        assert!(lane.words(steps) * vectors <= a.len(), "A ends before its block");
        let block = Block {
            a: a.as_ptr().cast(),
            row: 4 * COLUMNS,
            steps,
            b: b.data.as_ptr().cast(),
            column: b.col * size_of::<T>(),
            passed,
            sums: sums.as_mut_ptr().cast(),
        };
        // SAFETY: the level has the instructions; the reach of the operands is checked above.
        unsafe {
            match (lane, vectors) {
                (Lane::Pair, 1) => rows_of_pairs::<1, COLUMNS>(&block),
                (Lane::Pair, 2) => rows_of_pairs::<2, { COLUMNS / 2 }>(&block),
                (Lane::F32, 1) => rows_of_f32::<1, COLUMNS>(&block),
                (Lane::F32, 2) => rows_of_f32::<2, { COLUMNS / 2 }>(&block),
                _ => unreachable!("{lane:?} is not whole, or {vectors} vectors are too many"),
            }
        }
    }

    /// # Safety
    ///
    /// As for [`of_f32`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn rows_of_f32<const VECTORS: usize, const TOGETHER: usize>(block: &Block) {
        // SAFETY: see above.
        unsafe { word_by_word::<Singles, VECTORS, TOGETHER>(block) }
    }

    /// # Safety
    ///
    /// As for [`of_pairs`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn rows_of_pairs<const VECTORS: usize, const TOGETHER: usize>(block: &Block) {
        // SAFETY: see above.
        unsafe { word_by_word::<Pairs, VECTORS, TOGETHER>(block) }
    }

    /// Some columns at a time, whose words go to all lanes.
    ///
    /// # Safety
    ///
    /// As for the functions that call it.
    #[inline(always)]
    unsafe fn word_by_word<L: Lanes, const VECTORS: usize, const TOGETHER: usize>(block: &Block) {
        /// Columns that are reached from one pointer.
        const REACHED: usize = 4;
        let &Block { a, steps, b, column, passed, .. } = block;
        let words = steps / L::STEPS;
        let strides = [0, column, 2 * column, 3 * column];
        // SAFETY: see above.
        unsafe {
            // As in the other way.
            let next = b.wrapping_add(COLUMNS * column).wrapping_sub(passed * L::BYTES);
            let next = next.wrapping_add(passed * L::BYTES * COLUMNS).cast::<i8>();
            let mut squares = [[_mm512_setzero_ps(); COLUMNS]; VECTORS];
            for first in (0..COLUMNS).step_by(TOGETHER) {
                let mut sums = [[_mm512_setzero_ps(); VECTORS]; TOGETHER];
                let mut groups = [0, 1, 2, 3].map(|group| b.wrapping_add((first + group * REACHED) * column));
                let lines = words * L::BYTES * TOGETHER / 64;
                for word in 0..words {
                    if word < lines {
                        _mm_prefetch(next.wrapping_add((first * words * L::BYTES) + 64 * word), _MM_HINT_T0);
                    }
                    let mut rows = [_mm512_setzero_ps(); VECTORS];
                    for (vector, rows) in rows.iter_mut().enumerate() {
                        *rows = _mm512_loadu_ps(a.add((word * VECTORS + vector) * 4 * COLUMNS).cast());
                    }
                    for (index, sums) in sums.iter_mut().enumerate() {
                        let factor = groups[index / REACHED].wrapping_add(strides[index % REACHED]).cast::<f32>();
                        let factor = _mm512_set1_ps(factor.read_unaligned());
                        for (sum, rows) in sums.iter_mut().zip(rows) {
                            *sum = L::multiply_add(rows, factor, *sum);
                        }
                    }
                    // Wrapping: after the last word the pointers may leave their slices.
                    groups = groups.map(|group| group.wrapping_add(4));
                }
                for (index, sums) in sums.into_iter().enumerate() {
                    for (square, sum) in squares.iter_mut().zip(sums) {
                        square[first + index] = sum;
                    }
                }
            }
            for (vector, square) in squares.into_iter().enumerate() {
                for (row, values) in __m512::transpose(square).into_iter().enumerate() {
                    _mm512_storeu_ps(block.sums.add((vector * COLUMNS + row) * COLUMNS), values);
                }
            }
        }
    }
}
