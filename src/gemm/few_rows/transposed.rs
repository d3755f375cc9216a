//! Few rows times a matrix with contiguous columns, by AVX-512: B is read once, in place and in the order of memory,
//! without packing. For a few rows reading B is all the cost, for more of them the multiply-adds are.
//!
//! Squares of B are transposed in registers, so that lanes are columns; or, for more rows, each of its elements is
//! broadcast to all lanes, which are rows. The order of additions, and so the bits, are those of the packed product.

#[cfg(target_arch = "x86_64")]
use super::avx512;
use crate::{
    DType,
    device::scratch::aligned,
    dtype::Float,
    gemm::matrix::{Beta, KC, Matrix, Window},
};

/// Maximum number of rows for which this is worth it.
pub(in crate::gemm) const ROWS: usize = 2 * LANES;

/// Number of rows multiplied at a time if lanes are rows: two vectors.
const LANES: usize = 2 * COLUMNS;

/// Number of columns at a time, the lanes of a vector; remainders are left out.
pub(super) const COLUMNS: usize = 16;

/// Number of rows multiplied at a time if lanes are columns: their sums and a transposed square fill the registers.
const TOGETHER: usize = 12;

/// Maximum number of rows for which columns as lanes are worth it.
pub(in crate::gemm) const GROUPED: usize = 2 * TOGETHER;

/// Content of a lane of B, which determines the instruction that multiplies it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::gemm) enum Word {
    /// An f32, multiplied and added.
    F32,
    /// A bf16, widened to an f32.
    Bf16,
    /// An f16, widened to an f32.
    F16,
    /// Two elements of a column in bf16: both products are added at a time.
    Bf16Pair,
}

impl Word {
    /// Returns the number of words in a block of depth `kc`.
    pub fn count(self, kc: usize) -> usize {
        if self == Self::Bf16Pair { kc.div_ceil(2) } else { kc }
    }

    /// Returns `true` if elements of B in memory already are words.
    pub fn is_stored(self, k: usize) -> bool {
        match self {
            Self::F32 => true,
            Self::Bf16Pair => k.is_multiple_of(2),
            Self::Bf16 | Self::F16 => false,
        }
    }
}

/// Rows of A as bytes, word after word.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub data: &'a [u8],
    /// Number of bytes from one row to the next.
    pub row: usize,
}

impl<'a> Rows<'a> {
    /// Uses rows in place if their layout allows it, else copies them.
    fn new<T: Float>(word: Word, a: Matrix<'a, T>, rows: usize, k: usize, copy: &'a mut Vec<u64>) -> Self {
        if word.is_stored(k) && a.col == 1 {
            return Self { data: bytemuck::cast_slice(a.data), row: a.row * size_of::<T>() };
        }
        let words = word.count(k);
        let copy = aligned::<u32>(copy, rows * words);
        for (row, copy) in copy.chunks_exact_mut(words).enumerate() {
            let from = a.at(row * a.row);
            if word == Word::Bf16Pair {
                let halves: &mut [u16] = bytemuck::cast_slice_mut(copy);
                for (p, half) in halves.iter_mut().enumerate() {
                    *half = if p < k { half_bits(from.data[p * a.col]) } else { 0 };
                }
                continue;
            }
            let singles: &mut [f32] = bytemuck::cast_slice_mut(copy);
            if a.col == 1 {
                singles.iter_mut().zip(from.data).for_each(|(to, &value)| *to = single(value));
            } else {
                singles.iter_mut().enumerate().for_each(|(p, to)| *to = single(from.data[p * a.col]));
            }
        }
        Self { data: bytemuck::cast_slice(copy), row: 4 * words }
    }
}

/// Returns the bits of a two-byte type.
fn half_bits<T: Float>(value: T) -> u16 {
    bytemuck::pod_read_unaligned(&bytemuck::bytes_of(&value)[..2])
}

/// Returns a value in f32, its accumulation type.
fn single<T: Float>(value: T) -> f32 {
    bytemuck::pod_read_unaligned(&bytemuck::bytes_of(&value.to_acc())[..4])
}

/// Computes `C = beta + A·B` for the first columns; returns their number, a multiple of [`COLUMNS`]. `copy` is memory
/// for rows of A.
// Other processors leave these arguments unused.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables))]
pub(super) fn multiply<T: Float>(
    word: Word,
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    beta: Beta<T::Acc>,
    c: &mut Window<T::Acc>,
    copy: &mut Vec<u64>,
) -> usize {
    let (rows, done) = (c.rows(), c.columns() / COLUMNS * COLUMNS);
    if done == 0 || rows == 0 || k == 0 {
        return 0;
    }
    // A compile-time constant: the compiler removes the other branches.
    let word = match T::DTYPE {
        DType::F32 => Word::F32,
        DType::F16 => Word::F16,
        _ => word,
    };
    #[cfg(target_arch = "x86_64")]
    if rows > TOGETHER && word.is_stored(k) {
        return multiply_by_rows(word, k, a, b, beta, c, copy);
    }
    let a = Rows::new(word, a, rows, k, copy);
    let groups = rows.div_ceil(TOGETHER);
    let mut sums = [[0.0f32; COLUMNS]; TOGETHER];
    for j in (0..done).step_by(COLUMNS) {
        for p in (0..k).step_by(KC) {
            let kc = KC.min(k - p);
            let passed = word.count(p);
            let beta = beta.of_block(p, j);
            for group in 0..groups {
                // Groups of about equal size.
                let (first, end) = (group * rows / groups, (group + 1) * rows / groups);
                let a = Rows { data: &a.data[first * a.row + 4 * passed..], ..a };
                let sums = &mut sums[..end - first];
                #[cfg(target_arch = "x86_64")]
                avx512::multiply(word, a, kc, b.from(p, j), passed, sums);
                for (i, sums) in (first..end).zip(sums) {
                    beta.store(bytemuck::cast_slice(sums), &mut c.row_mut(i)[j..]);
                }
            }
        }
    }
    done
}

/// Like [`multiply`], with groups of rows in the lanes of one or two vectors.
#[cfg(target_arch = "x86_64")]
fn multiply_by_rows<T: Float>(
    word: Word,
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    beta: Beta<T::Acc>,
    c: &mut Window<T::Acc>,
    copy: &mut Vec<u64>,
) -> usize {
    let (rows, done) = (c.rows(), c.columns() / COLUMNS * COLUMNS);
    let words = word.count(k);
    let groups = rows.div_ceil(LANES);
    // First row, end and vectors per word of each group: all are full but the last.
    let group = |group: usize| {
        let (first, end) = (group * LANES, rows.min((group + 1) * LANES));
        (first, end, (end - first).div_ceil(COLUMNS))
    };
    let packed = aligned::<[f32; COLUMNS]>(copy, words * (0..groups).map(|index| group(index).2).sum::<usize>());
    let mut rest = &mut *packed;
    for (first, end, vectors) in (0..groups).map(group) {
        let (of_group, others) = std::mem::take(&mut rest).split_at_mut(words * vectors);
        pack_words(word, a.from(first, 0), end - first, k, of_group);
        rest = others;
    }
    let mut sums = [[0.0f32; COLUMNS]; LANES];
    for j in (0..done).step_by(COLUMNS) {
        for p in (0..k).step_by(KC) {
            let kc = KC.min(k - p);
            let passed = word.count(p);
            let beta = beta.of_block(p, j);
            let mut a = &*packed;
            for (first, end, vectors) in (0..groups).map(group) {
                let sums = &mut sums[..vectors * COLUMNS];
                avx512::multiply_by_rows(word, &a[passed * vectors..], kc, b.from(p, j), passed, sums);
                for (i, sums) in (first..end).zip(sums) {
                    beta.store(bytemuck::cast_slice(sums), &mut c.row_mut(i)[j..]);
                }
                a = &a[words * vectors..];
            }
        }
    }
    done
}

/// Packs rows of A into vectors: all rows of each word, padded with zeros.
#[cfg(target_arch = "x86_64")]
fn pack_words<T: Float>(word: Word, a: Matrix<T>, rows: usize, k: usize, to: &mut [[f32; COLUMNS]]) {
    let whole = avx512::pack(word, a, rows, k, to);
    let value = |row: usize, at: usize| match word {
        _ if row >= rows => 0.0,
        Word::Bf16Pair => {
            let half = |p: usize| u32::from(half_bits(a.data[row * a.row + p * a.col]));
            f32::from_bits(half(2 * at) | half(2 * at + 1) << 16)
        }
        _ => single(a.data[row * a.row + at * a.col]),
    };
    let lanes = rows.next_multiple_of(COLUMNS);
    for (index, of_word) in to.as_flattened_mut().chunks_exact_mut(lanes).enumerate().skip(whole) {
        of_word.iter_mut().enumerate().for_each(|(row, to)| *to = value(row, index));
    }
}
