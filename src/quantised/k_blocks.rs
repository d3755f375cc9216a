//! Blocks of 256 values in parts of 16 or 32, whose scales are integers times a scale of the block.

use super::{blocks::LEVELS, half};

/// Values of a block.
const BLOCK: usize = 256;

/// `scale · scales[i / 16] · q − least · leasts[i / 16]` with 2-bit `q` and both factors of a part in one byte.
#[inline(always)]
pub(super) fn q2_k(block: &[u8; 84], out: &mut [f32; BLOCK]) {
    let (parts, q) = (&block[..16], &block[16..80]);
    let (scale, least) = (half(block, 80), half(block, 82));
    for (i, (out, part)) in out.as_chunks_mut::<16>().0.iter_mut().zip(parts).enumerate() {
        let (scale, least) = (scale * f32::from(part & 0xF), least * f32::from(part >> 4));
        for (out, q) in out.iter_mut().zip(twos(q, i)) {
            *out = scale * f32::from(q) - least;
        }
    }
}

/// `scale · (scales[i / 16] − 32) · q` with 3-bit `q` from −4 on, whose third bits lie apart, and 6-bit scales.
#[inline(always)]
pub(super) fn q3_k(block: &[u8; 110], out: &mut [f32; BLOCK]) {
    let (high, q, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let scale = half(block, 108);
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = if i < 8 { scales[i] & 0xF } else { scales[i - 8] >> 4 };
        let part = low | (scales[8 + i % 4] >> (2 * (i / 4)) & 3) << 4;
        let scale = scale * f32::from(part as i8 - 32);
        let high = &high[16 * (i % 2)..];
        for ((out, q), high) in out.iter_mut().zip(twos(q, i)).zip(high) {
            let below = if high >> (i / 2) & 1 == 0 { 4 } else { 0 };
            *out = scale * f32::from(q as i8 - below);
        }
    }
}

/// The 4-bit integers of part `i` of 32 values: of 64 values, the first 32 in the lower halves of as many bytes.
#[inline(always)]
pub(super) fn fours(bytes: &[u8], i: usize) -> [u8; 32] {
    let bytes = &bytes[32 * (i / 2)..][..32];
    std::array::from_fn(|l| bytes[l] >> (4 * (i % 2)) & 0xF)
}

/// The 5-bit integers of part `i`: the fifth bits of all in front, then the others like [`fours`].
#[inline(always)]
pub(super) fn fives(bytes: &[u8], i: usize) -> [u8; 32] {
    let (high, low) = (&bytes[..32], fours(&bytes[32..], i));
    std::array::from_fn(|l| low[l] | (high[l] >> i & 1) << 4)
}

/// `scale · scales[i / 32] · q − least · leasts[i / 32]` with 4-bit `q` and 6-bit factors.
#[inline(always)]
pub(super) fn q4_k(block: &[u8; 144], out: &mut [f32; BLOCK]) {
    with_minima(block, out, fours);
}

/// Like [`q4_k`], but with 5-bit `q`.
#[inline(always)]
pub(super) fn q5_k(block: &[u8; 176], out: &mut [f32; BLOCK]) {
    with_minima(block, out, fives);
}

#[inline(always)]
fn with_minima(block: &[u8], out: &mut [f32; BLOCK], integers: impl Fn(&[u8], usize) -> [u8; 32]) {
    let (scale, least, parts) = (half(block, 0), half(block, 2), sixes(&block[4..16]));
    for (i, (out, part)) in out.as_chunks_mut::<32>().0.iter_mut().zip(parts).enumerate() {
        let (scale, least) = (scale * f32::from(part[0]), least * f32::from(part[1]));
        for (out, q) in out.iter_mut().zip(integers(&block[16..], i)) {
            *out = scale * f32::from(q) - least;
        }
    }
}

/// The 6-bit integers of part `i` of 32 values, from −32 on: 64 bytes of low halves and 32 bytes of the upper two bits
/// hold 128 values.
#[inline(always)]
pub(super) fn signed_sixes(block: &[u8; 210], i: usize) -> [i8; 32] {
    let (half, part) = (i / 4, i % 4);
    let (low, high) = (&block[64 * half + 32 * (part % 2)..][..32], &block[128 + 32 * half..][..32]);
    let (low_shift, high_shift) = (4 * (part / 2), 2 * part);
    std::array::from_fn(|l| (low[l] >> low_shift & 0xF | (high[l] >> high_shift & 3) << 4) as i8 - 32)
}

/// `scale · scales[i / 16] · (q − 32)` with 6-bit `q` and 8-bit scales.
#[inline(always)]
pub(super) fn q6_k(block: &[u8; 210], out: &mut [f32; BLOCK]) {
    let (scale, scales) = (half(block, 208), &block[192..208]);
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let q = signed_sixes(block, i);
        for ((out, q), &part) in out.as_chunks_mut::<16>().0.iter_mut().zip(q.as_chunks::<16>().0).zip(&scales[2 * i..])
        {
            let scale = scale * f32::from(part as i8);
            for (out, &q) in out.iter_mut().zip(q) {
                *out = scale * f32::from(q);
            }
        }
    }
}

/// `scale · (scales[i / 32] − 32) · levels[q]` with 4-bit `q` and 6-bit scales.
#[inline(always)]
pub(super) fn iq4_xs(block: &[u8; 136], out: &mut [f32; BLOCK]) {
    let (scale, high) = (half(block, 0), u16::from_le_bytes([block[2], block[3]]));
    let (low, q) = (&block[4..8], &block[8..]);
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let part = low[i / 2] >> (4 * (i % 2)) & 0xF | ((high >> (2 * i) & 3) as u8) << 4;
        let scale = scale * f32::from(part as i8 - 32);
        let q = &q[16 * i..];
        for (l, out) in out.iter_mut().enumerate() {
            let q = if l < 16 { q[l] & 0xF } else { q[l - 16] >> 4 };
            *out = scale * f32::from(LEVELS[usize::from(q)]);
        }
    }
}

/// The 2-bit integers of part `i` of sixteen values: 32 bytes hold 128 of them, the first 32 in their lowest bits.
#[inline(always)]
fn twos(bytes: &[u8], i: usize) -> impl Iterator<Item = u8> {
    let shift = 2 * (i / 2 % 4);
    bytes[32 * (i / 8) + 16 * (i % 2)..].iter().take(16).map(move |byte| byte >> shift & 3)
}

/// Eight pairs of 6-bit integers, a scale and a minimum each: the first four of either in the low bits of a byte, of
/// the others the upper two bits in the high bits of these.
#[inline(always)]
pub(super) fn sixes(bytes: &[u8]) -> [[u8; 2]; 8] {
    std::array::from_fn(|i| {
        if i < 4 {
            [bytes[i] & 0x3F, bytes[4 + i] & 0x3F]
        } else {
            let rest = bytes[4 + i];
            [rest & 0xF | bytes[i - 4] >> 2 & 0x30, rest >> 4 | bytes[i] >> 2 & 0x30]
        }
    })
}
