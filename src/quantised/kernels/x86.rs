//! Kernels of AVX2, AVX-VNNI and AVX-512 VNNI.

use std::arch::x86_64::*;

use super::{Activations, Bytes, Kernel, Panel, Part, QuantType, ROWS, STEP, add, panels};

/// # Safety
///
/// The processor has AVX2 and F16C.
#[target_feature(enable = "avx2,f16c")]
pub unsafe fn fill(kind: QuantType, blocks: &[u8], flip: u8, panel: &mut Panel) {
    // SAFETY: see above.
    unsafe { panels::fill::<__m256i>(kind, blocks, flip, panel) }
}

// SAFETY: each method is a few instructions of AVX2 or F16C; the caller answers for them and for the pointers.
unsafe impl Bytes for __m256i {
    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: see the trait.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(self, flip: u8, to: *mut u8) {
        // SAFETY: see the trait.
        unsafe { _mm256_storeu_si256(to.cast(), _mm256_xor_si256(self, _mm256_set1_epi8(flip as i8))) }
    }

    #[inline(always)]
    unsafe fn bits(self, by: u32, mask: u8) -> Self {
        // SAFETY: see the trait.
        unsafe {
            let shifted = _mm256_srl_epi32(self, _mm_cvtsi32_si128(by as i32));
            _mm256_and_si256(shifted, _mm256_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    unsafe fn shifted_left(self, by: u32) -> Self {
        // SAFETY: see the trait.
        unsafe { _mm256_sll_epi32(self, _mm_cvtsi32_si128(by as i32)) }
    }

    #[inline(always)]
    unsafe fn sixteens(self, step: usize) -> Self {
        // SAFETY: see the trait.
        unsafe {
            let first =
                _mm256_set_epi32(0x0C0C_0C0C, 0x0808_0808, 0x0404_0404, 0, 0x0C0C_0C0C, 0x0808_0808, 0x0404_0404, 0);
            let spread = _mm256_add_epi8(first, _mm256_set1_epi8((step / 2) as i8));
            let bit = _mm256_set1_epi32(0x0804_0201 << (step % 2 * STEP));
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(_mm256_shuffle_epi8(self, spread), bit), bit);
            _mm256_and_si256(set, _mm256_set1_epi8(16))
        }
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
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, self)
        }
    }

    #[inline(always)]
    unsafe fn halves(from: *const [u8; 2 * ROWS]) -> [f32; ROWS] {
        // SAFETY: see the trait.
        unsafe {
            let mut values = [0.0; ROWS];
            for half in [0, 8] {
                let bits = _mm_loadu_si128(from.cast::<u16>().add(half).cast());
                _mm256_storeu_ps(values.as_mut_ptr().add(half), _mm256_cvtph_ps(bits));
            }
            values
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
