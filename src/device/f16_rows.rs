//! f16 through f32: by F16C, which loops in plain Rust have no name for. Computing in f32 on the stack takes less time than
//! shifting bits in the loops of each op, and needs no copies of them.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use half::f16;

#[cfg(target_arch = "x86_64")]
use super::{Level, simd};
use crate::dtype::{DType, Float};

/// Number of values converted at a time: operands stay in the L1 cache.
const PIECE: usize = 512;

/// Initialises no more than is used: runs may be short.
fn zeros(memory: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    memory.fill(MaybeUninit::new(0.0));
    // SAFETY: every value has been written.
    unsafe { memory.assume_init_mut() }
}

/// Returns `true` for f16: a constant that leaves loops over f16 uncompiled.
pub(crate) const fn is_f16<T: Float>() -> bool {
    matches!(T::DTYPE, DType::F16)
}

/// Computes `body(y, inputs)` in f32. An input has one number per result, one for all, or none; `y` holds its values before
/// if `over` is `true`.
///
/// Panics unless `T` is f16.
pub(crate) fn in_f32<T: Float, const N: usize>(
    y: &mut [T],
    over: bool,
    inputs: [&[T]; N],
    body: impl Fn(&mut [f32], [&[f32]; N]),
) {
    assert!(is_f16::<T>());
    let (y, inputs) = (bytemuck::cast_slice_mut::<T, f16>(y), inputs.map(bytemuck::cast_slice::<T, f16>));
    let mut memory = [[const { MaybeUninit::uninit() }; PIECE]; N];
    let mut out = [const { MaybeUninit::uninit() }; PIECE];
    let (whole, pieces) = (y.len(), y.chunks_mut(PIECE));
    for (index, y) in pieces.enumerate() {
        let first = index * PIECE;
        let mut rest = memory.iter_mut();
        let inputs = inputs.map(|x| {
            let x = if x.len() == whole { &x[first..first + y.len()] } else { x };
            let to = rest.next().map_or(&mut [][..], |to| zeros(&mut to[..x.len()]));
            widen(x, to);
            &*to
        });
        let out = zeros(&mut out[..y.len()]);
        if over {
            widen(y, out);
        }
        body(out, inputs);
        narrow(out, y);
    }
}

/// Defines a function that reads f16 into f32, for each level.
macro_rules! reading {
    ($(#[$doc:meta])* $name:ident, |$to:ident, $x:ident| $one:expr, $of_8:expr, $of_16:expr) => {
        $(#[$doc])*
        pub(crate) fn $name(from: &[f16], to: &mut [f32]) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx,f16c")]
                fn avx2(from: &[f16], to: &mut [f32]) {
                    let (from, rest) = from.as_chunks::<8>();
                    let (to, of_rest) = to.as_chunks_mut::<8>();
                    for (from, to) in from.iter().zip(to) {
                        let to = to.as_mut_ptr();
                        // SAFETY: eight values are read and written.
                        unsafe { _mm256_storeu_ps(to, $of_8(to, _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast())))) };
                    }
                    one_by_one(rest, of_rest);
                }
                #[target_feature(enable = "avx,f16c,avx512f")]
                fn avx512(from: &[f16], to: &mut [f32]) {
                    let (from, rest) = from.as_chunks::<16>();
                    let (to, of_rest) = to.as_chunks_mut::<16>();
                    for (from, to) in from.iter().zip(to) {
                        let to = to.as_mut_ptr();
                        // SAFETY: sixteen values are read and written.
                        unsafe { _mm512_storeu_ps(to, $of_16(to, _mm512_cvtph_ps(_mm256_loadu_si256(from.as_ptr().cast())))) };
                    }
                    avx2(rest, of_rest);
                }
                if simd::level() >= Level::Avx512 {
                    // SAFETY: the level has the instructions.
                    return unsafe { avx512(from, to) };
                }
                if simd::level() >= Level::Avx2 {
                    // SAFETY: as above.
                    return unsafe { avx2(from, to) };
                }
            }
            fn one_by_one(from: &[f16], to: &mut [f32]) {
                for ($to, from) in to.iter_mut().zip(from) {
                    let $x = from.to_acc();
                    $one;
                }
            }
            one_by_one(from, to);
        }
    };
}

reading! {
    /// Converts to a slice of the same length.
    widen, |to, x| *to = x, |_, x| x, |_, x| x
}

reading! {
    /// Adds to a slice of the same length.
    add, |to, x| *to += x, |to, x| _mm256_add_ps(_mm256_loadu_ps(to), x), |to, x| _mm512_add_ps(_mm512_loadu_ps(to), x)
}

/// Rounds to a slice of the same length.
pub(crate) fn narrow(from: &[f32], to: &mut [f16]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx,f16c")]
        fn avx2(from: &[f32], to: &mut [f16]) {
            let (from, rest) = from.as_chunks::<8>();
            let (to, of_rest) = to.as_chunks_mut::<8>();
            for (from, to) in from.iter().zip(to) {
                // SAFETY: eight values are read and written.
                unsafe {
                    let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(from.as_ptr()));
                    _mm_storeu_si128(to.as_mut_ptr().cast(), rounded);
                }
            }
            one_by_one(rest, of_rest);
        }
        if simd::level() >= Level::Avx2 {
            // SAFETY: the level has the instructions.
            return unsafe { avx2(from, to) };
        }
    }
    fn one_by_one(from: &[f32], to: &mut [f16]) {
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = f16::from_acc(from));
    }
    one_by_one(from, to);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every f16, numbers halfway between two, beyond the largest, and NaN, at lengths with and without a rest.
    #[test]
    fn f16_conversions_are_those_of_the_type() {
        let values: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let mut wide = vec![0.0; values.len()];
        widen(&values, &mut wide);
        for (wide, value) in wide.iter().zip(&values) {
            let expected = value.to_acc();
            assert!(wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan());
        }
        for len in [3, 8, 1003] {
            let between: Vec<f32> =
                (0..len).map(|i| f32::from_bits((i as u32).wrapping_mul(0x9E37_79B9) ^ 0x1000)).collect();
            let mut narrowed = vec![f16::ZERO; len];
            narrow(&between, &mut narrowed);
            for (narrowed, x) in narrowed.iter().zip(&between) {
                assert!(narrowed.to_bits() == f16::from_acc(*x).to_bits() || narrowed.is_nan() && x.is_nan(), "{x:e}");
            }
        }
    }

    #[test]
    fn f16_pieces_cover_inputs_of_every_length() {
        for len in [1, 7, 512, 1300] {
            let of = |scale: usize| (0..len).map(|i| f16::from_f32((i % 64 * scale) as f32)).collect::<Vec<_>>();
            let mut y = of(1);
            in_f32(&mut y, true, [&of(2), &[f16::ONE], &[]], |y, [a, b, c]| {
                assert!(c.is_empty());
                y.iter_mut().zip(a).for_each(|(y, a)| *y += a + b[0]);
            });
            assert!(y.iter().enumerate().all(|(i, y)| y.to_f32() == (3 * (i % 64) + 1) as f32));
        }
    }
}
