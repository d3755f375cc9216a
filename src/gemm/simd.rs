//! Vector registers of floats as one trait: a loop is written once for every instruction level.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::dtype::{Float, Real};

/// Vector register of floats.
///
/// # Safety
///
/// The methods may be called only where the processor has the instructions, with pointers to `LANES` elements (one
/// for `splat`). They carry no alignment requirement.
pub(super) unsafe trait Vector: Copy {
    type Scalar: Real;
    const LANES: usize;
    unsafe fn zero() -> Self;
    /// Broadcasts one element to all lanes.
    unsafe fn splat(from: *const Self::Scalar) -> Self;
    unsafe fn load(from: *const Self::Scalar) -> Self;
    unsafe fn store(self, to: *mut Self::Scalar);
    unsafe fn add(self, other: Self) -> Self;
    /// Computes `self · factor + summand`.
    unsafe fn mul_add(self, factor: Self, summand: Self) -> Self;
}

macro_rules! x86_vectors {
    ($($vector:ty: $scalar:ty, $count:literal, $zero:ident, $splat:ident, $load:ident, $store:ident, $add:ident, $fma:ident;)*) => {$(
        // SAFETY: each method is one instruction, whose presence and pointers the caller answers for.
        #[cfg(target_arch = "x86_64")]
        unsafe impl Vector for $vector {
            type Scalar = $scalar;
            const LANES: usize = $count;
            #[inline(always)]
            unsafe fn zero() -> Self {
                // SAFETY: see the trait.
                unsafe { $zero() }
            }
            #[inline(always)]
            unsafe fn splat(from: *const $scalar) -> Self {
                // SAFETY: see the trait.
                unsafe { $splat(*from) }
            }
            #[inline(always)]
            unsafe fn load(from: *const $scalar) -> Self {
                // SAFETY: see the trait.
                unsafe { $load(from) }
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $scalar) {
                // SAFETY: see the trait.
                unsafe { $store(to, self) }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                // SAFETY: see the trait.
                unsafe { $add(self, other) }
            }
            #[inline(always)]
            unsafe fn mul_add(self, factor: Self, summand: Self) -> Self {
                // SAFETY: see the trait.
                unsafe { $fma(self, factor, summand) }
            }
        }
    )*};
}

x86_vectors! {
    __m256: f32, 8, _mm256_setzero_ps, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_add_ps, _mm256_fmadd_ps;
    __m256d: f64, 4, _mm256_setzero_pd, _mm256_set1_pd, _mm256_loadu_pd, _mm256_storeu_pd, _mm256_add_pd, _mm256_fmadd_pd;
    __m512: f32, 16, _mm512_setzero_ps, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_add_ps, _mm512_fmadd_ps;
    __m512d: f64, 8, _mm512_setzero_pd, _mm512_set1_pd, _mm512_loadu_pd, _mm512_storeu_pd, _mm512_add_pd, _mm512_fmadd_pd;
}

/// 128 bits, which every processor of the common architectures computes at once; the compiler vectorises the loops.
#[derive(Clone, Copy)]
pub(super) struct Portable<S, const N: usize>([S; N]);

macro_rules! portable_vectors {
    ($($scalar:ty, $count:literal;)*) => {$(
        // SAFETY: plain arithmetic; the caller answers for the pointers.
        unsafe impl Vector for Portable<$scalar, $count> {
            type Scalar = $scalar;
            const LANES: usize = $count;
            #[inline(always)]
            unsafe fn zero() -> Self {
                Self([0.0; $count])
            }
            #[inline(always)]
            unsafe fn splat(from: *const $scalar) -> Self {
                // SAFETY: see the trait.
                Self([unsafe { *from }; $count])
            }
            #[inline(always)]
            unsafe fn load(from: *const $scalar) -> Self {
                // SAFETY: see the trait; the array has the alignment of its elements.
                Self(unsafe { *from.cast() })
            }
            #[inline(always)]
            unsafe fn store(self, to: *mut $scalar) {
                // SAFETY: as in `load`.
                unsafe { *to.cast() = self.0 }
            }
            #[inline(always)]
            unsafe fn add(self, other: Self) -> Self {
                Self(std::array::from_fn(|lane| self.0[lane] + other.0[lane]))
            }
            #[inline(always)]
            unsafe fn mul_add(self, factor: Self, summand: Self) -> Self {
                Self(std::array::from_fn(|lane| {
                    if cfg!(target_arch = "aarch64") {
                        // Every processor of this architecture multiplies and adds in one instruction.
                        <$scalar>::mul_add(self.0[lane], factor.0[lane], summand.0[lane])
                    } else {
                        self.0[lane] * factor.0[lane] + summand.0[lane]
                    }
                }))
            }
        }
    )*};
}

portable_vectors! {
    f32, 4;
    f64, 2;
}

// The widest vectors, emulated for tests.
#[cfg(test)]
portable_vectors! {
    f32, 16;
}

/// Square block of a matrix: one register per lane of a register.
///
/// # Safety
///
/// As for [`Vector`].
pub(super) unsafe trait Square<const N: usize>: Vector {
    /// Transposes rows to columns.
    unsafe fn transpose(rows: [Self; N]) -> [Self; N];
    /// Stores the first `count` lanes.
    unsafe fn store_first(self, count: usize, to: *mut Self::Scalar);
}

/// Stored type that is converted to its accumulation type, a vector at a time.
///
/// # Safety
///
/// As for [`Vector`]; `from` points to as many elements as the vector has lanes.
pub(super) unsafe trait Widen<V: Square<N>, const N: usize>: Float<Acc = V::Scalar> {
    unsafe fn widen(from: *const Self) -> V;

    /// Loads the columns of the square block whose rows start `row` elements apart.
    #[inline(always)]
    unsafe fn columns(from: *const Self, row: usize) -> [V; N] {
        // SAFETY: see the trait.
        unsafe {
            let mut rows = [V::zero(); N];
            for (index, values) in rows.iter_mut().enumerate() {
                *values = Self::widen(from.add(index * row));
            }
            V::transpose(rows)
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use half::{bf16, f16};

    use super::*;

    // SAFETY: AVX2 instructions only, whose presence and pointers the caller answers for.
    unsafe impl Square<8> for __m256 {
        #[inline(always)]
        unsafe fn transpose(r: [Self; 8]) -> [Self; 8] {
            // SAFETY: see the trait.
            unsafe {
                // Pairs of rows, then fours, in each half of 128 bits; then the halves.
                let (mut low, mut high) = ([_mm256_setzero_ps(); 4], [_mm256_setzero_ps(); 4]);
                for i in 0..4 {
                    low[i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                    high[i] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
                }
                let mut fours = [[_mm256_setzero_ps(); 4]; 2];
                for i in 0..2 {
                    fours[i] = [
                        _mm256_shuffle_ps::<0x44>(low[2 * i], low[2 * i + 1]),
                        _mm256_shuffle_ps::<0xEE>(low[2 * i], low[2 * i + 1]),
                        _mm256_shuffle_ps::<0x44>(high[2 * i], high[2 * i + 1]),
                        _mm256_shuffle_ps::<0xEE>(high[2 * i], high[2 * i + 1]),
                    ];
                }
                let mut columns = [_mm256_setzero_ps(); 8];
                for i in 0..4 {
                    columns[i] = _mm256_permute2f128_ps::<0x20>(fours[0][i], fours[1][i]);
                    columns[i + 4] = _mm256_permute2f128_ps::<0x31>(fours[0][i], fours[1][i]);
                }
                columns
            }
        }
        #[inline(always)]
        unsafe fn store_first(self, count: usize, to: *mut f32) {
            // SAFETY: see the trait.
            unsafe {
                match count {
                    8 => _mm256_storeu_ps(to, self),
                    4 => _mm_storeu_ps(to, _mm256_castps256_ps128(self)),
                    6 => {
                        _mm_storeu_ps(to, _mm256_castps256_ps128(self));
                        _mm_storel_pd(to.add(4).cast(), _mm_castps_pd(_mm256_extractf128_ps::<1>(self)));
                    }
                    _ => {
                        let mut all = [0.0; 8];
                        _mm256_storeu_ps(all.as_mut_ptr(), self);
                        to.copy_from_nonoverlapping(all.as_ptr(), count.min(8));
                    }
                }
            }
        }
    }

    // SAFETY: as above.
    unsafe impl Square<4> for __m256d {
        #[inline(always)]
        unsafe fn transpose(r: [Self; 4]) -> [Self; 4] {
            // SAFETY: see the trait.
            unsafe {
                let (low, high) = (_mm256_unpacklo_pd(r[0], r[1]), _mm256_unpackhi_pd(r[0], r[1]));
                let (low2, high2) = (_mm256_unpacklo_pd(r[2], r[3]), _mm256_unpackhi_pd(r[2], r[3]));
                [
                    _mm256_permute2f128_pd::<0x20>(low, low2),
                    _mm256_permute2f128_pd::<0x20>(high, high2),
                    _mm256_permute2f128_pd::<0x31>(low, low2),
                    _mm256_permute2f128_pd::<0x31>(high, high2),
                ]
            }
        }
        #[inline(always)]
        unsafe fn store_first(self, count: usize, to: *mut f64) {
            // SAFETY: see the trait.
            unsafe {
                match count {
                    4 => _mm256_storeu_pd(to, self),
                    2 => _mm_storeu_pd(to, _mm256_castpd256_pd128(self)),
                    _ => {
                        let mut all = [0.0; 4];
                        _mm256_storeu_pd(all.as_mut_ptr(), self);
                        to.copy_from_nonoverlapping(all.as_ptr(), count.min(4));
                    }
                }
            }
        }
    }

    // SAFETY: as above.
    unsafe impl Widen<__m256, 8> for f32 {
        #[inline(always)]
        unsafe fn widen(from: *const f32) -> __m256 {
            // SAFETY: see the trait.
            unsafe { _mm256_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn columns(from: *const f32, row: usize) -> [__m256; 8] {
            // SAFETY: see the trait.
            unsafe {
                let mut columns = [_mm256_setzero_ps(); 8];
                for half in 0..2 {
                    let mut r = [_mm256_setzero_ps(); 4];
                    for (i, r) in r.iter_mut().enumerate() {
                        let low = _mm_loadu_ps(from.add(i * row + 4 * half));
                        let high = _mm_loadu_ps(from.add((i + 4) * row + 4 * half));
                        *r = _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high);
                    }
                    let (a, b) = (_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
                    let (c, d) = (_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
                    columns[4 * half] = _mm256_shuffle_ps::<0x44>(a, c);
                    columns[4 * half + 1] = _mm256_shuffle_ps::<0xEE>(a, c);
                    columns[4 * half + 2] = _mm256_shuffle_ps::<0x44>(b, d);
                    columns[4 * half + 3] = _mm256_shuffle_ps::<0xEE>(b, d);
                }
                columns
            }
        }
    }

    // SAFETY: as above.
    unsafe impl Widen<__m256d, 4> for f64 {
        #[inline(always)]
        unsafe fn widen(from: *const f64) -> __m256d {
            // SAFETY: see the trait.
            unsafe { _mm256_loadu_pd(from) }
        }
    }

    // SAFETY: as above.
    unsafe impl Widen<__m256, 8> for bf16 {
        /// Shifts the bits into the upper half of an f32.
        #[inline(always)]
        unsafe fn widen(from: *const bf16) -> __m256 {
            // SAFETY: see the trait.
            unsafe {
                let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
            }
        }
    }

    // SAFETY: as above.
    unsafe impl Widen<__m256, 8> for f16 {
        #[inline(always)]
        unsafe fn widen(from: *const f16) -> __m256 {
            // SAFETY: see the trait; each processor with AVX2 has F16C, which the level asks for.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::as_pairs;

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::*;

    // SAFETY: AVX-512 instructions only, whose presence and pointers the caller answers for.
    unsafe impl Square<16> for __m512 {
        #[inline(always)]
        unsafe fn transpose(r: [Self; 16]) -> [Self; 16] {
            // SAFETY: see the trait.
            unsafe {
                let zero = _mm512_setzero_ps();
                let double = |x| _mm512_castps_pd(x);
                // Pairs of rows, then fours, in each part of 128 bits.
                let (mut low, mut high) = ([zero; 8], [zero; 8]);
                for i in 0..8 {
                    low[i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                    high[i] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
                }
                let mut fours = [[zero; 4]; 4];
                for i in 0..4 {
                    fours[i] = [
                        _mm512_unpacklo_pd(double(low[2 * i]), double(low[2 * i + 1])),
                        _mm512_unpackhi_pd(double(low[2 * i]), double(low[2 * i + 1])),
                        _mm512_unpacklo_pd(double(high[2 * i]), double(high[2 * i + 1])),
                        _mm512_unpackhi_pd(double(high[2 * i]), double(high[2 * i + 1])),
                    ]
                    .map(|x| _mm512_castpd_ps(x));
                }
                // Then the parts: even and odd ones of two fours, and of all.
                let mut columns = [zero; 16];
                for i in 0..4 {
                    let even = _mm512_shuffle_f32x4::<0x88>(fours[0][i], fours[1][i]);
                    let odd = _mm512_shuffle_f32x4::<0xDD>(fours[0][i], fours[1][i]);
                    let even2 = _mm512_shuffle_f32x4::<0x88>(fours[2][i], fours[3][i]);
                    let odd2 = _mm512_shuffle_f32x4::<0xDD>(fours[2][i], fours[3][i]);
                    columns[i] = _mm512_shuffle_f32x4::<0x88>(even, even2);
                    columns[i + 4] = _mm512_shuffle_f32x4::<0x88>(odd, odd2);
                    columns[i + 8] = _mm512_shuffle_f32x4::<0xDD>(even, even2);
                    columns[i + 12] = _mm512_shuffle_f32x4::<0xDD>(odd, odd2);
                }
                columns
            }
        }
        #[inline(always)]
        unsafe fn store_first(self, count: usize, to: *mut f32) {
            // SAFETY: see the trait.
            unsafe { _mm512_mask_storeu_ps(to, ((1u32 << count.min(16)) - 1) as u16, self) }
        }
    }

    /// Bits as pairs of bf16 numbers.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(in super::super) fn as_pairs(x: __m512i) -> __m512bh {
        // SAFETY: both are 512 bits in which every pattern is a value.
        unsafe { std::mem::transmute(x) }
    }
}
