//! Kernels of AVX2, AVX-VNNI and AVX-512 VNNI.

use std::arch::x86_64::*;

use super::{Activations, Bytes, Kernel, Panel, Part, ROWS, Rows, STEP, add, panels};

/// # Safety
///
/// The processor has AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
pub unsafe fn fill(rows: &Rows, flip: u8, panel: &mut Panel) {
    // SAFETY: see above.
    unsafe { panels::fill::<__m256i>(rows, flip, panel) }
}

// SAFETY: each method is a few instructions of AVX2 or F16C; the caller answers for them and for the pointers.
unsafe impl Bytes for __m256i {
    const IN_REGISTERS: bool = true;

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: see the trait.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: see the trait.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_twice(from: *const u8) -> Self {
        // SAFETY: see the trait.
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn sixteens(from: *const u8) -> Self {
        // SAFETY: see the trait.
        unsafe {
            let byte = |n: i64| n * 0x0101_0101_0101_0101;
            let spread = _mm256_set_epi64x(byte(3), byte(2), byte(1), 0);
            let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(from.cast::<i32>().read_unaligned()), spread);
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
            _mm256_and_si256(set, _mm256_set1_epi8(16))
        }
    }

    #[inline(always)]
    unsafe fn bits(self, low: u32, high: u32, mask: u8) -> Self {
        // SAFETY: see the trait.
        unsafe {
            let (low, high) = (i64::from(low), i64::from(high));
            let shifted = _mm256_srlv_epi64(self, _mm256_set_epi64x(high, high, low, low));
            _mm256_and_si256(shifted, _mm256_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    unsafe fn shifted_left(self, by: u32) -> Self {
        // SAFETY: see the trait.
        unsafe { _mm256_sllv_epi32(self, _mm256_set1_epi32(by as i32)) }
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        // SAFETY: see the trait.
        unsafe { _mm256_or_si256(self, other) }
    }

    #[inline(always)]
    unsafe fn minus(self, value: u8) -> Self {
        // SAFETY: see the trait.
        unsafe { _mm256_sub_epi8(self, _mm256_set1_epi8(value as i8)) }
    }

    #[inline(always)]
    unsafe fn levels(self, table: &[i8; 16]) -> Self {
        // SAFETY: see the trait.
        unsafe { _mm256_shuffle_epi8(Self::load_twice(table.as_ptr().cast()), self) }
    }

    #[inline(always)]
    unsafe fn halves(bits: [u16; ROWS]) -> [f32; ROWS] {
        // SAFETY: see the trait.
        unsafe {
            let mut values = [0.0; ROWS];
            for half in [0, 8] {
                let bits = _mm_loadu_si128(bits.as_ptr().add(half).cast());
                _mm256_storeu_ps(values.as_mut_ptr().add(half), _mm256_cvtph_ps(bits));
            }
            values
        }
    }

    #[inline(always)]
    unsafe fn interleave(rows: [Self; 8], flip: u8, to: *mut u8) {
        // SAFETY: see the trait.
        unsafe {
            let flip = _mm256_set1_epi8(flip as i8);
            let pairs = |row: usize| {
                let (a, b) = (rows[row], rows[row + 1]);
                [_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)]
            };
            let fours = |[a0, a1]: [Self; 2], [b0, b1]: [Self; 2]| {
                [
                    _mm256_unpacklo_epi64(a0, b0),
                    _mm256_unpackhi_epi64(a0, b0),
                    _mm256_unpacklo_epi64(a1, b1),
                    _mm256_unpackhi_epi64(a1, b1),
                ]
            };
            let (low, high) = (fours(pairs(0), pairs(2)), fours(pairs(4), pairs(6)));
            for step in 0..4 {
                let store = |step: usize, rows| {
                    _mm256_storeu_si256(to.add(STEP * ROWS * step).cast(), _mm256_xor_si256(rows, flip));
                };
                store(step, _mm256_permute2x128_si256::<0x20>(low[step], high[step]));
                store(step + 4, _mm256_permute2x128_si256::<0x31>(low[step], high[step]));
            }
        }
    }
}

macro_rules! kernels {
    ($($(#[$doc:meta])* $name:ident: $integers:ty, $floats:ty, $flips:literal, $splat:ident, $load:ident, $store:ident,
        $one:ident, $convert:ident, $mul:ident, $fma:ident, $dot:ident;)*) => {$(
        $(#[$doc])*
        struct $name;

        // SAFETY: each method is one instruction or a few, whose presence and pointers the caller answers for.
        unsafe impl Kernel for $name {
            type Integers = $integers;
            type Floats = $floats;
            const LANES: usize = size_of::<$floats>() / size_of::<f32>();
            const FLIPS: bool = $flips;

            #[inline(always)]
            unsafe fn splat(value: i32) -> $integers {
                // SAFETY: see the trait.
                unsafe { $splat(value) }
            }
            #[inline(always)]
            unsafe fn load(from: *const f32) -> $floats {
                // SAFETY: see the trait.
                unsafe { $load(from) }
            }
            #[inline(always)]
            unsafe fn load_one(value: f32) -> $floats {
                // SAFETY: see the trait.
                unsafe { $one(value) }
            }
            #[inline(always)]
            unsafe fn store(value: $floats, to: *mut f32) {
                // SAFETY: see the trait.
                unsafe { $store(to, value) }
            }
            #[inline(always)]
            unsafe fn convert(value: $integers) -> $floats {
                // SAFETY: see the trait.
                unsafe { $convert(value) }
            }
            #[inline(always)]
            unsafe fn times(a: $floats, b: f32) -> $floats {
                // SAFETY: see the trait.
                unsafe { $mul(a, $one(b)) }
            }
            #[inline(always)]
            unsafe fn multiply_add(a: $floats, b: $floats, sum: $floats) -> $floats {
                // SAFETY: see the trait.
                unsafe { $fma(a, b, sum) }
            }
            #[inline(always)]
            unsafe fn dot<const SIGNED: bool>(
                sum: $integers,
                rows: *const [[u8; STEP]; ROWS],
                x: *const [i8; STEP],
            ) -> $integers {
                // SAFETY: see the trait.
                unsafe { $dot::<SIGNED>(sum, rows, x) }
            }
        }
    )*};
}

kernels! {
    Avx2: __m256i, __m256, false, _mm256_set1_epi32, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps,
        _mm256_cvtepi32_ps, _mm256_mul_ps, _mm256_fmadd_ps, maddubs;
    AvxVnni: __m256i, __m256, true, _mm256_set1_epi32, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps,
        _mm256_cvtepi32_ps, _mm256_mul_ps, _mm256_fmadd_ps, dpbusd_avx;
    Avx512Vnni: __m512i, __m512, true, _mm512_set1_epi32, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps,
        _mm512_cvtepi32_ps, _mm512_mul_ps, _mm512_fmadd_ps, dpbusd;
}

#[inline(always)]
unsafe fn maddubs<const SIGNED: bool>(sum: __m256i, rows: *const [[u8; STEP]; ROWS], x: *const [i8; STEP]) -> __m256i {
    // SAFETY: see `Kernel`.
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let product = |step: usize| {
            let row = _mm256_loadu_si256(rows.add(step).cast());
            let x = _mm256_set1_epi32(x.add(step).cast::<i32>().read_unaligned());
            // One side has no sign: it goes to the other.
            if SIGNED {
                _mm256_maddubs_epi16(_mm256_abs_epi8(row), _mm256_sign_epi8(x, row))
            } else {
                _mm256_maddubs_epi16(row, x)
            }
        };
        if SIGNED {
            // Two products of up to 128 · 127 fit 16 bits, four do not.
            (0..STEP).fold(sum, |sum, step| _mm256_add_epi32(sum, _mm256_madd_epi16(product(step), ones)))
        } else {
            // Eight products of up to 31 · 127 do.
            let sums =
                _mm256_add_epi16(_mm256_add_epi16(product(0), product(1)), _mm256_add_epi16(product(2), product(3)));
            _mm256_add_epi32(sum, _mm256_madd_epi16(sums, ones))
        }
    }
}

#[inline(always)]
unsafe fn dpbusd_avx<const SIGNED: bool>(
    sum: __m256i,
    rows: *const [[u8; STEP]; ROWS],
    x: *const [i8; STEP],
) -> __m256i {
    // SAFETY: see `Kernel`.
    (0..STEP).fold(sum, |sum, step| unsafe {
        let x = _mm256_set1_epi32(x.add(step).cast::<i32>().read_unaligned());
        _mm256_dpbusd_avx_epi32(sum, _mm256_loadu_si256(rows.add(step).cast()), x)
    })
}

#[inline(always)]
unsafe fn dpbusd<const SIGNED: bool>(sum: __m512i, rows: *const [[u8; STEP]; ROWS], x: *const [i8; STEP]) -> __m512i {
    // SAFETY: see `Kernel`.
    (0..STEP).fold(sum, |sum, step| unsafe {
        let x = _mm512_set1_epi32(x.add(step).cast::<i32>().read_unaligned());
        _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(rows.add(step).cast()), x)
    })
}

macro_rules! compiled {
    ($($name:ident: $kernel:ident, $inputs:literal, $features:literal;)*) => {$(
        /// # Safety
        ///
        /// The processor has the instructions; the part has been checked.
        #[target_feature(enable = $features)]
        pub unsafe fn $name(panel: &Panel, part: Part, x: &Activations, sums: &mut [[f32; ROWS]]) {
            // SAFETY: see above.
            unsafe { add::<$kernel, $inputs>(panel, part, x, sums) }
        }
    )*};
}

compiled! {
    avx2: Avx2, 4, "avx2,fma";
    avx_vnni: AvxVnni, 4, "avx2,fma,avxvnni";
    avx512_vnni: Avx512Vnni, 8, "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni";
}
