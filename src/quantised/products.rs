//! Products of packed rows with inputs, in integers.
//!
//! Inputs are rounded to 8 bits, with a scale for each [`GROUP`] values. The integers of sixteen interleaved rows at a time
//! are unpacked to a panel, so that a register holds those of all rows at the same depth, and multiplied by inputs as in any
//! matrix product. The sum of a group is exact; the scales, and what a type adds to its integers, are applied to it in f32,
//! group after group. So a product has the same bits whatever other rows and inputs there are, and at every level that
//! fuses multiplications and additions.

use super::{
    QuantType,
    kernels::{Instructions, Part},
    panels::{DEPTH, GROUP, Panel, ROWS, STEP, signed_parts},
};
use crate::device::{
    cpu,
    scratch::{User, aligned, lend},
    simd::vectorized,
};

/// Inputs rounded to integers from −127 to 127.
pub(crate) struct Activations {
    /// Values of an input.
    columns: usize,
    pub(super) integers: Vec<i8>,
    /// Of each group.
    pub(super) factors: Vec<Factors>,
}

/// Scale and sums of a group.
#[derive(Clone, Copy, Default)]
pub(super) struct Factors {
    pub scale: f32,
    /// The scale times the sum of the integers.
    pub sum: f32,
    /// The sum of the integers times -128: of all, or of both halves for types that scale these. Kernels that store signed
    /// integers 128 higher start with it.
    pub excess: [i32; 2],
}

impl Activations {
    /// Rounds inputs of `columns` values, which are whole groups, for rows of a type. A group with NaN or infinity gets a
    /// scale that makes every product NaN.
    pub fn new(x: &[f32], columns: usize, kind: QuantType) -> Self {
        let groups = x.len() / GROUP;
        let mut rounded =
            Self { columns, integers: vec![0; groups * GROUP], factors: vec![Factors::default(); groups] };
        let in_halves = signed_parts(kind) == Some(2);
        let Self { integers, factors, .. } = &mut rounded;
        cpu::for_rows2(integers, factors, (GROUP, 1), 4 * GROUP, &|first, integers, factors| {
            round(&x[first * GROUP..], integers, factors, in_halves);
        });
        rounded
    }

    /// Returns the number of inputs.
    fn count(&self) -> usize {
        self.integers.len().checked_div(self.columns).unwrap_or(0)
    }
}

vectorized! {
    fn round(x: &[f32], integers: &mut [i8], factors: &mut [Factors], in_halves: bool) {
        /// Added to a number below 2²², it leaves the nearest integer in the lowest bits.
        const ROUNDING: f32 = 12_582_912.0;
        let groups = x.as_chunks::<GROUP>().0.iter().zip(integers.as_chunks_mut::<GROUP>().0);
        for ((x, integers), factors) in groups.zip(factors) {
            // The bits of magnitudes are in their order, with NaN as the largest.
            let largest = f32::from_bits(x.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7FFF_FFFF)));
            let inverse = if largest > 0.0 { (127.0 / largest).min(f32::MAX) } else { 0.0 };
            for (integer, x) in integers.iter_mut().zip(x) {
                *integer = (x * inverse + ROUNDING).to_bits() as i8;
            }
            let [low, high] = [0, GROUP / 2].map(|half| {
                integers[half..half + GROUP / 2].iter().fold(0i32, |sum, &integer| sum + i32::from(integer))
            });
            let scale = if largest.is_finite() { largest / 127.0 } else { f32::NAN };
            let parts = if in_halves { [low, high] } else { [low + high, 0] };
            *factors = Factors { scale, sum: scale * (low + high) as f32, excess: parts.map(|sum| -128 * sum) };
        }
    }
}

/// Computes `products[panel][input][row] = Σ row · input` for [interleaved](super::interleaved) rows, [`ROWS`] to a panel,
/// of a type that [is packed](QuantType::is_packed).
pub(crate) fn multiply(kind: QuantType, rows: &[u8], x: &Activations, products: &mut [f32]) {
    by(Instructions::best(), kind, rows, x, products);
}

fn by(instructions: Instructions, kind: QuantType, bytes: &[u8], x: &Activations, products: &mut [f32]) {
    let (values, size) = kind.block();
    let (columns, count) = (x.columns, x.count());
    let (row_bytes, width) = (columns / values * size, ROWS * count);
    cpu::for_rows(products, width, ROWS * columns * (1 + count), |first, products| {
        lend(User::Products, |[integers, scales, offsets]| {
            let integers = aligned::<u8>(integers, DEPTH * ROWS);
            let scales = aligned::<f32>(scales, 2 * DEPTH / GROUP * ROWS);
            let offsets = aligned::<f32>(offsets, DEPTH / GROUP * ROWS);
            let mut panel = Panel {
                integers: integers.as_chunks_mut::<STEP>().0.as_chunks_mut().0,
                scales: scales.as_chunks_mut().0,
                offsets: offsets.as_chunks_mut().0,
            };
            for (index, products) in products.chunks_exact_mut(width).enumerate() {
                products.fill(0.0);
                for depth in (0..columns).step_by(DEPTH) {
                    let end = columns.min(depth + DEPTH);
                    let at = |depth: usize| ROWS * ((first + index) * row_bytes + depth / values * size);
                    instructions.fill(kind, &bytes[at(depth)..at(end)], &mut panel);
                    let part = Part { first: depth / GROUP, groups: (end - depth) / GROUP, signed: signed_parts(kind) };
                    instructions.add(&panel, part, x, products.as_chunks_mut().0);
                }
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        philox::Philox,
        quantised::{decode, interleave},
    };

    /// Products of every type by all instructions of this processor: those of the rounded inputs with the dequantised
    /// weights, with the same bits by each vector instruction and for any number of inputs.
    #[test]
    fn packed_products_equal_those_of_their_values() {
        let random = Philox::new(7, 0);
        for kind in QuantType::ALL.into_iter().filter(|kind| kind.is_packed()) {
            let (columns, rows, count) = (1024 + 256, 21, 11);
            let (values, size) = kind.block();
            let mut packed: Vec<u8> =
                (0..rows * columns / values * size).map(|i| random.below(i as u64, 256) as u8).collect();
            for block in packed.chunks_exact_mut(size) {
                // Exponents between 2⁻⁵ and 2⁻².
                kind.scales().iter().for_each(|&at| block[at + 1] = block[at + 1] & 0x83 | 0x28);
            }
            let mut weights = vec![0.0; rows * columns];
            decode(kind, &packed, &mut weights);
            let mut panels = packed.clone();
            panels.resize(rows.next_multiple_of(ROWS) * columns / values * size, 0);
            interleave(kind, columns / values * size, &mut panels);
            let x: Vec<f32> = (0..count * columns).map(|i| random.below(i as u64, 2000) as f32 / 999.0 - 1.0).collect();
            let rounded = Activations::new(&x, columns, kind);
            let scale = |at: usize| f64::from(rounded.factors[at / GROUP].scale);
            let value = |at: usize| f64::from(rounded.integers[at]) * scale(at);
            assert!(x.iter().enumerate().all(|(at, x)| (f64::from(*x) - value(at)).abs() <= 0.501 * scale(at)));
            let mut of_vectors: Option<Vec<f32>> = None;
            for instructions in Instructions::usable() {
                let run = |x: &Activations| {
                    let mut products = vec![f32::NAN; rows.next_multiple_of(ROWS) * x.count()];
                    by(instructions, kind, &panels, x, &mut products);
                    let at = |row: usize, input: usize| (row / ROWS * x.count() + input) * ROWS + row % ROWS;
                    (0..x.count()).map(|input| (0..rows).map(|row| products[at(row, input)]).collect()).collect()
                };
                let products: Vec<Vec<f32>> = run(&rounded);
                for (input, products) in products.iter().enumerate() {
                    for (row, &product) in products.iter().enumerate() {
                        let (mut expected, mut size) = (0.0, 0.0);
                        for k in 0..columns {
                            let term = f64::from(weights[row * columns + k]) * value(input * columns + k);
                            (expected, size) = (expected + term, size + term.abs());
                        }
                        let error = (f64::from(product) - expected).abs();
                        assert!(error <= 2e-6 * size, "{kind} {instructions:?}: {product}, expected {expected}");
                    }
                    let alone = Activations::new(&x[input * columns..][..columns], columns, kind);
                    assert_eq!(run(&alone), std::slice::from_ref(products), "{kind} {instructions:?}");
                }
                if instructions != Instructions::Portable {
                    let products = products.concat();
                    assert_eq!(of_vectors.get_or_insert(products.clone()), &products, "{kind} {instructions:?}");
                }
            }
        }
    }

    /// Values that are not finite, zeros, and the smallest and largest numbers.
    #[test]
    fn inputs_of_every_size_are_rounded() {
        let mut x = [0.0f32; 128];
        (x[0], x[33], x[64]) = (f32::NAN, f32::NEG_INFINITY, 1e-45);
        x[96..].copy_from_slice(&std::array::from_fn::<_, 32, _>(|i| 3e38 * (i as f32 / 16.0 - 1.0)));
        let rounded = Activations::new(&x, 128, QuantType::Q4_0);
        let scale = |group: usize| rounded.factors[group].scale;
        assert!(scale(0).is_nan() && scale(1).is_nan() && scale(2).is_finite());
        assert_eq!((rounded.integers[96], rounded.integers[112]), (-127, 0));
    }
}
