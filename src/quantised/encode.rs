//! Rounding of values to blocks.
//!
//! The types of 32 values have the bits that the Python package `gguf` gives them. The others, and IQ4_NL, search for the
//! scale with the least squared error, where larger values count more.

use half::f16;

use super::{QuantType, blocks::LEVELS};
use crate::device::cpu;

/// Rounds finite values, which are whole blocks, to a type that [is packed](QuantType::is_packed).
pub(super) fn encode(kind: QuantType, values: &[f32]) -> Vec<u8> {
    match kind {
        QuantType::Q8_0 => each(values, q8_0),
        QuantType::Q4_0 => each(values, |x| packed::<18>(symmetric::<16>(x))),
        QuantType::Q4_1 => each(values, |x| packed::<20>(between::<16>(x))),
        QuantType::Q5_0 => each(values, |x| packed::<22>(symmetric::<32>(x))),
        QuantType::Q5_1 => each(values, |x| packed::<24>(between::<32>(x))),
        QuantType::Iq4Nl => each(values, iq4_nl),
        QuantType::Q4K => each(values, q4_k),
        QuantType::Q5K => each(values, q5_k),
        QuantType::Q6K => each(values, q6_k),
        // Callers have refused these.
        QuantType::Q2K | QuantType::Q3K | QuantType::Iq4Xs => Vec::new(),
    }
}

/// Rounds each block, on all threads.
fn each<const N: usize, const M: usize>(values: &[f32], one: impl Fn(&[f32; M]) -> [u8; N] + Sync) -> Vec<u8> {
    let mut bytes = vec![0; values.len() / M * N];
    cpu::for_rows(&mut bytes, N, 64 * M, |first, bytes| {
        let blocks = &values.as_chunks::<M>().0[first..];
        bytes.as_chunks_mut().0.iter_mut().zip(blocks).for_each(|(to, block)| *to = one(block));
    });
    bytes
}

/// Scale, offset and integers of a block.
struct Rounded {
    scale: f32,
    offset: f32,
    q: [u8; 32],
}

fn half_bytes(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The value of the largest magnitude, the first of several.
fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most: f32, &x| if x.abs() > most.abs() { x } else { most })
}

/// Scale times `LEVELS` integers around zero; the value of the largest magnitude gets the lowest of them.
fn symmetric<const LEVELS: u8>(x: &[f32; 32]) -> Rounded {
    let middle = f32::from(LEVELS / 2);
    let scale = largest(x) / -middle;
    let inverse = inverse(scale);
    let q = x.map(|x| ((x * inverse + (middle + 0.5)) as u8).min(LEVELS - 1));
    Rounded { scale, offset: 0.0, q }
}

/// `LEVELS` steps from the smallest value to the largest.
fn between<const LEVELS: u8>(x: &[f32; 32]) -> Rounded {
    let (least, most) = x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
    let scale = (most - least) / f32::from(LEVELS - 1);
    let inverse = inverse(scale);
    let q = x.map(|x| (((x - least) * inverse + 0.5) as u8).min(LEVELS - 1));
    Rounded { scale, offset: least, q }
}

/// A block of `N` bytes: the scale, the offset of types that store it, fifth bits of types that have them, and the lower
/// four bits.
fn packed<const N: usize>(Rounded { scale, offset, q }: Rounded) -> [u8; N] {
    let mut block = [0; N];
    block[..2].copy_from_slice(&half_bytes(scale));
    // Eighteen bytes with neither; two more for the offset, four for the fifth bits.
    let (with_offset, with_fifth) = ((N - 18) & 2 != 0, (N - 18) & 4 != 0);
    if with_offset {
        block[2..4].copy_from_slice(&half_bytes(offset));
    }
    if with_fifth {
        let bits = q.iter().enumerate().fold(0u32, |bits, (i, q)| bits | u32::from(q >> 4) << i);
        block[N - 20..N - 16].copy_from_slice(&bits.to_le_bytes());
    }
    for (i, byte) in block[N - 16..].iter_mut().enumerate() {
        *byte = q[i] & 0xF | q[i + 16] << 4;
    }
    block
}

fn q8_0(x: &[f32; 32]) -> [u8; 34] {
    let scale = largest(x).abs() / 127.0;
    let inverse = inverse(scale);
    let mut block = [0; 34];
    block[..2].copy_from_slice(&half_bytes(scale));
    block[2..].copy_from_slice(&x.map(|x| (x * inverse).round() as i8 as u8));
    block
}

fn iq4_nl(x: &[f32; 32]) -> [u8; 18] {
    let nearest = |x: f32| {
        let distance = |level: i8| (x - f32::from(level)).abs();
        (1..16u8).fold(0u8, |best, i| {
            if distance(LEVELS[usize::from(i)]) < distance(LEVELS[usize::from(best)]) { i } else { best }
        })
    };
    let (scale, q) = best_scale(x, |step| -127.0 + 4.0 * step, nearest, |q| f32::from(LEVELS[usize::from(*q)]));
    packed(Rounded { scale, offset: 0.0, q })
}

/// Searches for the scale of values whose weight is their square: tries 19 that give the value of the largest magnitude
/// the level `extreme(step)`, and returns the best with its integers.
fn best_scale<T: Copy, const N: usize>(
    x: &[f32; N],
    extreme: impl Fn(f32) -> f32,
    nearest: impl Fn(f32) -> T,
    level: impl Fn(&T) -> f32,
) -> (f32, [T; N]) {
    let top = largest(x);
    let round = |scale: f32| x.map(|x| nearest(x * inverse(scale)));
    let mut best = (0.0, f32::NEG_INFINITY);
    for step in -9..=9 {
        let q = round(top / extreme(step as f32));
        let (mut product, mut square) = (0.0, 0.0);
        for (x, q) in x.iter().zip(&q) {
            let (level, weight) = (level(q), x * x);
            product += weight * x * level;
            square += weight * level * level;
        }
        // The error of the best scale for these integers is that of zeros less this.
        if square > 0.0 && product * product / square > best.1 {
            best = (product / square, product * product / square);
        }
    }
    (best.0, round(best.0))
}

/// Searches for the scale and the offset, which is at most zero, of values from 0 to `most` steps; the weight of a value
/// grows with its magnitude.
fn best_line(x: &[f32; 32], most: f32) -> [f32; 2] {
    let (least, top) = x.iter().fold((0.0f32, f32::NEG_INFINITY), |(a, b), &x| (a.min(x), b.max(x)));
    if top <= least {
        return [0.0, least];
    }
    let mean = (x.iter().map(|x| x * x).sum::<f32>() / 32.0).sqrt();
    let (mut best, mut smallest) = ([(top - least) / most, least], f32::INFINITY);
    for step in 0..=12 {
        let inverse = (most - 1.0 + 0.15 * step as f32) / (top - least);
        let q = x.map(|x| ((x - least) * inverse).round().clamp(0.0, most));
        // Sums of weights and of weighted q, q², x and x q.
        let [mut w, mut wq, mut wqq, mut wx, mut wxq] = [0.0f32; 5];
        for (&x, &q) in x.iter().zip(&q) {
            let weight = mean + x.abs();
            w += weight;
            wq += weight * q;
            wqq += weight * q * q;
            wx += weight * x;
            wxq += weight * x * q;
        }
        let determinant = w * wqq - wq * wq;
        if determinant <= 0.0 {
            continue;
        }
        let mut line = [(w * wxq - wx * wq) / determinant, (wqq * wx - wq * wxq) / determinant];
        if line[1] > 0.0 {
            line = [wxq / wqq, 0.0];
        }
        let error = |(&x, &q): (&f32, &f32)| (mean + x.abs()) * (line[0] * q + line[1] - x).powi(2);
        let error = x.iter().zip(&q).map(error).sum::<f32>();
        if error < smallest {
            (best, smallest) = (line, error);
        }
    }
    best
}

/// Scale, minimum and their 6-bit factors as they are stored, and the integers of each group.
fn k_block(x: &[f32; 256], most: f32) -> ([u8; 16], [[u8; 32]; 8]) {
    let groups = x.as_chunks::<32>().0;
    let lines: [[f32; 2]; 8] = std::array::from_fn(|group| best_line(&groups[group], most));
    let most_of = |part: usize| lines.iter().fold(0.0f32, |most, line| most.max(line[part].abs()));
    let factors = [0, 1].map(|part| f16::from_f32(most_of(part) / 63.0).to_f32());
    let sixes =
        lines.map(|line| [0, 1].map(|part| (line[part].abs() * inverse(factors[part])).round().clamp(0.0, 63.0) as u8));
    let mut header = [0; 16];
    header[..2].copy_from_slice(&half_bytes(factors[0]));
    header[2..4].copy_from_slice(&half_bytes(factors[1]));
    for (i, [scale, least]) in sixes.into_iter().enumerate() {
        if i < 4 {
            header[4 + i] |= scale;
            header[8 + i] |= least;
        } else {
            header[8 + i] = scale & 0xF | least << 4;
            header[i] |= scale >> 4 << 6;
            header[4 + i] |= least >> 4 << 6;
        }
    }
    let q = std::array::from_fn(|group| {
        let [scale, least] = [0, 1].map(|part| factors[part] * f32::from(sixes[group][part]));
        groups[group].map(|x| ((x + least) * inverse(scale)).round().clamp(0.0, most) as u8)
    });
    (header, q)
}

/// The lower four bits of eight groups, two to 32 bytes.
fn fours(q: &[[u8; 32]; 8]) -> impl Iterator<Item = u8> {
    q.as_chunks::<2>().0.iter().flat_map(|[low, high]| low.iter().zip(high).map(|(low, high)| low & 0xF | high << 4))
}

fn q4_k(x: &[f32; 256]) -> [u8; 144] {
    let (header, q) = k_block(x, 15.0);
    let mut bytes = header.into_iter().chain(fours(&q));
    std::array::from_fn(|_| bytes.next().unwrap_or_default())
}

fn q5_k(x: &[f32; 256]) -> [u8; 176] {
    let (header, q) = k_block(x, 31.0);
    let fifths = (0..32).map(|i| (0..8).fold(0, |bits, group| bits | q[group][i] >> 4 << group));
    let mut bytes = header.into_iter().chain(fifths).chain(fours(&q));
    std::array::from_fn(|_| bytes.next().unwrap_or_default())
}

fn q6_k(x: &[f32; 256]) -> [u8; 210] {
    let parts = x.as_chunks::<16>().0;
    let six = |x: f32| x.round().clamp(-32.0, 31.0) as i8;
    let scales: [f32; 16] =
        std::array::from_fn(|part| best_scale(&parts[part], |step| -32.0 + 0.1 * step, six, |&q| f32::from(q)).0);
    let scale = f16::from_f32(largest(&scales) / -128.0).to_f32();
    let factors = scales.map(|part| (part * inverse(scale)).round().clamp(-128.0, 127.0) as i8);
    let mut block = [0; 210];
    for (i, &x) in x.iter().enumerate() {
        let q = (six(x * inverse(scale * f32::from(factors[i / 16]))) + 32) as u8;
        let (half, part, at) = (i / 128, i % 128 / 32, i % 32);
        block[64 * half + 32 * (part % 2) + at] |= (q & 0xF) << (4 * (part / 2));
        block[128 + 32 * half + at] |= q >> 4 << (2 * part);
    }
    block[192..208].copy_from_slice(&factors.map(|factor| factor as u8));
    block[208..].copy_from_slice(&half_bytes(scale));
    block
}
