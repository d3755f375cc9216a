//! The kernels of [`transposed`](super::transposed).

use std::arch::x86_64::*;

use super::transposed::{COLUMNS, Rows, Word};
use crate::{
    device::{Level, simd},
    dtype::Float,
    gemm::{
        matrix::Matrix,
        simd::{Square, as_pairs},
    },
};

/// Computes `sums[i][j] = Σ_p A[i, p] · B[p, j]` for one block of depth `kc`, which comes after `passed` words of the
/// same columns.
pub(super) fn multiply<T: Float>(
    word: Word,
    a: Rows,
    kc: usize,
    b: Matrix<T>,
    passed: usize,
    sums: &mut [[f32; COLUMNS]],
) {
    let (level, bytes) = if word == Word::Bf16Pair { (Level::Avx512Bf16, 2) } else { (Level::Avx512, size_of::<T>()) };
    assert!(simd::level() >= level && bytes == size_of::<T>(), "the processor has no such products");
    assert!(kc > 0 && kc - 1 + (COLUMNS - 1) * b.col < b.data.len(), "B ends before its block");
    assert!(word != Word::F32 || sums.len() > 4, "so few rows of f32 are streamed");
    let last = sums.len().saturating_sub(1);
    assert!(last * a.row + 4 * word.count(kc) <= a.data.len(), "A ends before its block");
    let block = Block {
        a: a.data.as_ptr(),
        row: a.row,
        kc,
        b: b.data.as_ptr().cast(),
        column: b.col * size_of::<T>(),
        passed,
        sums: sums.as_mut_ptr().cast(),
    };
    // SAFETY: the level has the instructions; the reach of the operands is checked above.
    unsafe {
        match word {
            Word::Bf16Pair => of_pairs(&block, sums.len()),
            word => of_singles(word, &block, sums.len()),
        }
    }
}

/// The arguments of [`multiply`] after its checks.
struct Block {
    a: *const u8,
    /// Bytes from one row of A to the next.
    row: usize,
    kc: usize,
    b: *const u8,
    /// Bytes from one column to the next.
    column: usize,
    passed: usize,
    sums: *mut f32,
}

/// Reads and multiplies words. The methods may be called only where the processor has the instructions, with pointers
/// to the bytes of a vector.
trait Words: Copy {
    /// Number of elements of a column in a word.
    const DEPTH: usize;
    /// Returns the number of bytes of a word in B.
    fn bytes(self) -> usize;
    /// Loads a vector of words of each of [`COLUMNS`] columns.
    unsafe fn load(self, from: *const u8, column: usize) -> [__m512; COLUMNS];
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512;
}

/// One element, in f32 or widened. Checking the type for each square is cheap: a copy of every kernel per type would
/// only add code.
#[derive(Clone, Copy)]
struct Singles(Word);

impl Words for Singles {
    const DEPTH: usize = 1;

    #[inline(always)]
    fn bytes(self) -> usize {
        if self.0 == Word::F32 { 4 } else { 2 }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const u8, column: usize) -> [__m512; COLUMNS] {
        // SAFETY: see the trait.
        unsafe {
            let mut square = [_mm512_setzero_ps(); COLUMNS];
            match self.0 {
                // bf16 are the upper halves of f32.
                Word::Bf16 => {
                    for (index, values) in square.iter_mut().enumerate() {
                        let bits = _mm256_loadu_si256(from.add(index * column).cast());
                        *values = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)));
                    }
                }
                Word::F16 => {
                    for (index, values) in square.iter_mut().enumerate() {
                        *values = _mm512_cvtph_ps(_mm256_loadu_si256(from.add(index * column).cast()));
                    }
                }
                _ => {
                    for (index, values) in square.iter_mut().enumerate() {
                        *values = _mm512_loadu_ps(from.add(index * column).cast());
                    }
                }
            }
            square
        }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: see the trait.
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }
}

/// Two elements in bf16.
#[derive(Clone, Copy)]
struct Pairs;

impl Words for Pairs {
    const DEPTH: usize = 2;

    #[inline(always)]
    fn bytes(self) -> usize {
        4
    }

    #[inline(always)]
    unsafe fn load(self, from: *const u8, column: usize) -> [__m512; COLUMNS] {
        // SAFETY: see the trait.
        unsafe { Singles(Word::F32).load(from, column) }
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: see the trait.
        unsafe { _mm512_dpbf16_ps(sum, as_pairs(_mm512_castps_si512(a)), as_pairs(_mm512_castps_si512(b))) }
    }
}

/// Instantiates a kernel per number of rows, for words of one kind.
macro_rules! by_rows {
    ($words:expr, $block:expr, $rows:expr, [$($count:literal)*] or $most:literal) => {
        match $rows {
            $($count => square_by_square::<_, $count>($words, $block),)*
            _ => square_by_square::<_, $most>($words, $block),
        }
    };
}

/// # Safety
///
/// The processor has the instructions; the pointers reach as far as the sizes say.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn of_singles(word: Word, block: &Block, rows: usize) {
    // SAFETY: see above.
    unsafe {
        match word {
            // With the type known at compile time: the fewer the rows, the more a choice per square would cost. So few rows
            // of f32 are streamed.
            Word::Bf16 if rows <= 4 => by_rows!(Singles(Word::Bf16), block, rows, [1 2 3] or 4),
            Word::F16 if rows <= 4 => by_rows!(Singles(Word::F16), block, rows, [1 2 3] or 4),
            word => by_rows!(Singles(word), block, rows, [5 6 7 8 9 10 11] or 12),
        }
    }
}

/// # Safety
///
/// As for [`of_singles`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn of_pairs(block: &Block, rows: usize) {
    // SAFETY: see above.
    unsafe { by_rows!(Pairs, block, rows, [1 2 3 4 5 6 7 8 9 10 11] or 12) }
}

/// # Safety
///
/// As for [`of_singles`]; A and the sums have `ROWS` rows.
#[inline(always)]
unsafe fn square_by_square<W: Words, const ROWS: usize>(kind: W, block: &Block) {
    /// Number of rows addressed from one pointer, as in the other micro-kernels.
    const REACHED: usize = 4;
    let &Block { a, row, kc, b, column, passed, .. } = block;
    let mut groups = [0, 1, 2].map(|group| a.wrapping_add(group * REACHED * row));
    let strides = [0, row, 2 * row, 3 * row];
    // SAFETY: see above.
    unsafe {
        let mut sums = [_mm512_setzero_ps(); ROWS];
        let bytes = kind.bytes();
        let words = kc / W::DEPTH;
        let whole = words / COLUMNS * COLUMNS;
        // The next columns follow these without a gap: they are fetched in the order of memory, whatever the order in which
        // they will be read.
        let next = b.wrapping_add(COLUMNS * column).wrapping_sub(passed * bytes);
        for word in (0..whole).step_by(COLUMNS) {
            let next = next.wrapping_add((passed + word) * bytes * COLUMNS).cast::<i8>();
            // The lines of a square of two bytes each, and those of one of four.
            for line in 0..8 {
                _mm_prefetch(next.wrapping_add(64 * line), _MM_HINT_T0);
            }
            if bytes == 4 {
                for line in 8..16 {
                    _mm_prefetch(next.wrapping_add(64 * line), _MM_HINT_T0);
                }
            }
            let square = __m512::transpose(kind.load(b.add(word * bytes), column));
            for (index, values) in square.into_iter().enumerate() {
                for (row, sum) in sums.iter_mut().enumerate() {
                    let factor = groups[row / REACHED].wrapping_add(strides[row % REACHED] + 4 * index).cast::<f32>();
                    *sum = W::multiply_add(_mm512_set1_ps(factor.read_unaligned()), values, *sum);
                }
            }
            // Wrapping: after the last square the pointers may leave their slices.
            groups = groups.map(|group| group.wrapping_add(4 * COLUMNS));
        }
        let rest = kc - whole * W::DEPTH;
        if rest > 0 {
            let mut square = [[0f32; COLUMNS]; COLUMNS];
            last_square(kind, b.add(whole * bytes), column, rest * bytes / W::DEPTH, &mut square);
            for (index, values) in square.iter().enumerate().take(rest.div_ceil(W::DEPTH)) {
                let values = _mm512_loadu_ps(values.as_ptr());
                for (row, sum) in sums.iter_mut().enumerate() {
                    let factor = groups[row / REACHED].wrapping_add(strides[row % REACHED] + 4 * index).cast::<f32>();
                    *sum = W::multiply_add(_mm512_set1_ps(factor.read_unaligned()), values, *sum);
                }
            }
        }
        for (row, sum) in sums.into_iter().enumerate() {
            _mm512_storeu_ps(block.sums.add(row * COLUMNS), sum);
        }
    }
}

/// Returns the transposed square of the last bytes of the columns, padded with zeros. A separate function, shared by
/// the kernels for every number of rows.
///
/// # Safety
///
/// As for [`of_singles`]: `bytes` bytes of [`COLUMNS`] columns are readable, at most a vector.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn last_square<W: Words>(
    kind: W,
    b: *const u8,
    column: usize,
    bytes: usize,
    to: &mut [[f32; COLUMNS]; COLUMNS],
) {
    const LINE: usize = 64;
    let mut lines = [[0u8; LINE]; COLUMNS];
    // SAFETY: see above.
    unsafe {
        for (index, line) in lines.iter_mut().enumerate() {
            std::ptr::copy_nonoverlapping(b.add(index * column), line.as_mut_ptr(), bytes.min(LINE));
        }
        let square = __m512::transpose(kind.load(lines.as_ptr().cast(), LINE));
        for (values, to) in square.into_iter().zip(to) {
            _mm512_storeu_ps(to.as_mut_ptr(), values);
        }
    }
}

/// Packs the words of all rows that fill squares, each with the lanes of all rows; returns their number per row.
pub(super) fn pack<T: Float>(word: Word, a: Matrix<T>, rows: usize, k: usize, to: &mut [[f32; COLUMNS]]) -> usize {
    let whole = word.count(k) / COLUMNS * COLUMNS;
    if a.col != 1 || whole == 0 {
        return 0;
    }
    let vectors = rows.div_ceil(COLUMNS);
    assert!(word.is_stored(k) && simd::level() >= Level::Avx512, "rows that are not packed by squares");
    assert!((rows - 1) * a.row + k <= a.data.len() && vectors * whole <= to.len(), "the rows exceed their memory");
    // SAFETY: the level has AVX-512, and `whole` words of every row lie inside of both operands.
    unsafe { squares(a.data.as_ptr().cast(), a.row * size_of::<T>(), rows, whole, to.as_mut_ptr().cast()) };
    whole
}

/// # Safety
///
/// AVX-512 is there; `words` words, a multiple of [`COLUMNS`], of all rows are readable, and a vector per word writable
/// for each [`COLUMNS`] rows.
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

/// Like [`multiply`], for rows in the lanes of packed words.
pub(super) fn multiply_by_rows<T: Float>(
    word: Word,
    a: &[[f32; COLUMNS]],
    kc: usize,
    b: Matrix<T>,
    passed: usize,
    sums: &mut [[f32; COLUMNS]],
) {
    let level = if word == Word::Bf16Pair { Level::Avx512Bf16 } else { Level::Avx512 };
    let bytes = if word == Word::Bf16Pair { 2 } else { 4 };
    assert!(simd::level() >= level && bytes == size_of::<T>() && word.is_stored(kc), "no such products");
    assert!(kc > 0 && kc - 1 + (COLUMNS - 1) * b.col < b.data.len(), "B ends before its block");
    let vectors = sums.len() / COLUMNS;
    assert!(word.count(kc) * vectors <= a.len(), "A ends before its block");
    let block = Block {
        a: a.as_ptr().cast(),
        row: 4 * COLUMNS,
        kc,
        b: b.data.as_ptr().cast(),
        column: b.col * size_of::<T>(),
        passed,
        sums: sums.as_mut_ptr().cast(),
    };
    // SAFETY: the level has the instructions; the reach of the operands is checked above.
    unsafe {
        match (word, vectors) {
            (Word::Bf16Pair, 1) => rows_of_pairs::<1, COLUMNS>(&block),
            (Word::Bf16Pair, 2) => rows_of_pairs::<2, { COLUMNS / 2 }>(&block),
            (Word::F32, 1) => rows_of_f32::<1, COLUMNS>(&block),
            (Word::F32, 2) => rows_of_f32::<2, { COLUMNS / 2 }>(&block),
            _ => unreachable!("{word:?} is not stored, or {vectors} vectors are too many"),
        }
    }
}

/// # Safety
///
/// As for [`of_singles`].
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

/// Processes some columns at a time, broadcasting their words to all lanes.
///
/// # Safety
///
/// As for the functions that call it.
#[inline(always)]
unsafe fn word_by_word<W: Words, const VECTORS: usize, const TOGETHER: usize>(block: &Block) {
    /// Number of bytes of a word in memory.
    const BYTES: usize = 4;
    /// Number of columns addressed from one pointer.
    const REACHED: usize = 4;
    let &Block { a, kc, b, column, passed, .. } = block;
    let words = kc / W::DEPTH;
    let strides = [0, column, 2 * column, 3 * column];
    // SAFETY: see above.
    unsafe {
        // As in `square_by_square`.
        let next = b.wrapping_add(COLUMNS * column).wrapping_sub(passed * BYTES);
        let next = next.wrapping_add(passed * BYTES * COLUMNS).cast::<i8>();
        let mut squares = [[_mm512_setzero_ps(); COLUMNS]; VECTORS];
        for first in (0..COLUMNS).step_by(TOGETHER) {
            let mut sums = [[_mm512_setzero_ps(); VECTORS]; TOGETHER];
            let mut groups = [0, 1, 2, 3].map(|group| b.wrapping_add((first + group * REACHED) * column));
            let lines = words * BYTES * TOGETHER / 64;
            for word in 0..words {
                if word < lines {
                    _mm_prefetch(next.wrapping_add((first * words * BYTES) + 64 * word), _MM_HINT_T0);
                }
                let mut rows = [_mm512_setzero_ps(); VECTORS];
                for (vector, rows) in rows.iter_mut().enumerate() {
                    *rows = _mm512_loadu_ps(a.add((word * VECTORS + vector) * 4 * COLUMNS).cast());
                }
                for (index, sums) in sums.iter_mut().enumerate() {
                    let factor = groups[index / REACHED].wrapping_add(strides[index % REACHED]).cast::<f32>();
                    let factor = _mm512_set1_ps(factor.read_unaligned());
                    for (sum, rows) in sums.iter_mut().zip(rows) {
                        *sum = W::multiply_add(rows, factor, *sum);
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
