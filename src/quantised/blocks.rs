//! Blocks of 32 values with one scale.

use super::half;

/// Values of a block.
const BLOCK: usize = 32;

/// The 4-bit integers of sixteen bytes: the low halves first, then the high ones.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8]) -> [u8; BLOCK] {
    std::array::from_fn(|i| if i < BLOCK / 2 { bytes[i] & 0xF } else { bytes[i - BLOCK / 2] >> 4 })
}

/// The 5-bit integers of twenty bytes: the fifth bits of all are the bits of a number of 32 bits in front.
#[inline(always)]
pub(super) fn fives(bytes: &[u8]) -> [u8; BLOCK] {
    const BITS: [u8; 8] = [1, 2, 4, 8, 16, 32, 64, 128];
    let mut q = nibbles(&bytes[4..]);
    for (q, high) in q.as_chunks_mut::<8>().0.iter_mut().zip(bytes) {
        for (q, bit) in q.iter_mut().zip(BITS) {
            *q |= if high & bit == 0 { 0 } else { 16 };
        }
    }
    q
}

/// `scale · q` with 8-bit `q`.
#[inline(always)]
pub(super) fn q8_0(block: &[u8; 34], out: &mut [f32; BLOCK]) {
    let scale = half(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = scale * f32::from(q as i8);
    }
}

/// `scale · (q − middle)`, the scale in front.
#[inline(always)]
fn symmetric(block: &[u8], q: [u8; BLOCK], middle: i8, out: &mut [f32; BLOCK]) {
    let scale = half(block, 0);
    for (out, q) in out.iter_mut().zip(q) {
        *out = scale * f32::from(q as i8 - middle);
    }
}

/// `scale · q + least`, both in front.
#[inline(always)]
fn between(block: &[u8], q: [u8; BLOCK], out: &mut [f32; BLOCK]) {
    let (scale, least) = (half(block, 0), half(block, 2));
    for (out, q) in out.iter_mut().zip(q) {
        *out = scale * f32::from(q) + least;
    }
}

/// `scale · (q − 8)` with 4-bit `q`.
#[inline(always)]
pub(super) fn q4_0(block: &[u8; 18], out: &mut [f32; BLOCK]) {
    symmetric(block, nibbles(&block[2..]), 8, out);
}

/// `scale · q + least` with 4-bit `q`.
#[inline(always)]
pub(super) fn q4_1(block: &[u8; 20], out: &mut [f32; BLOCK]) {
    between(block, nibbles(&block[4..]), out);
}

/// `scale · (q − 16)` with 5-bit `q`.
#[inline(always)]
pub(super) fn q5_0(block: &[u8; 22], out: &mut [f32; BLOCK]) {
    symmetric(block, fives(&block[2..]), 16, out);
}

/// `scale · q + least` with 5-bit `q`.
#[inline(always)]
pub(super) fn q5_1(block: &[u8; 24], out: &mut [f32; BLOCK]) {
    between(block, fives(&block[4..]), out);
}

/// The sixteen values that 4-bit integers stand for: dense around 0, where most weights are.
pub(super) const LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// `scale · levels[q]` with 4-bit `q`.
#[inline(always)]
pub(super) fn iq4_nl(block: &[u8; 18], out: &mut [f32; BLOCK]) {
    let scale = half(block, 0);
    for (out, q) in out.iter_mut().zip(nibbles(&block[2..])) {
        *out = scale * f32::from(LEVELS[usize::from(q)]);
    }
}
