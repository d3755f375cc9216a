//! Products on tiles, whose instructions are emulated where the processor has none.

mod amx_emulator;

use half::bf16;

use super::{
    Product, gemm_by,
    kernels::amx::MR,
    matrix::Matrix,
    pack::{
        Arithmetic, Packing,
        bf16::Tiles,
        panels::Fma,
        split::{PARTS, Split},
    },
    select,
};
use crate::{Philox, Result, dtype::Float};

/// Product of random numbers; operands marked in `turned` are stored by columns.
struct Case<T> {
    sizes: [usize; 3],
    turned: [bool; 2],
    a: Vec<T>,
    b: Vec<T>,
    bias: Option<Vec<T>>,
}

impl<T: Float> Case<T> {
    fn new(sizes: [usize; 3], turned: [bool; 2], bias: bool) -> Self {
        let [m, n, k] = sizes;
        let draw = |count: usize, stream: u64| {
            let random = Philox::new(7, stream);
            (0..count).map(|i| <T as Float>::from_f64(2.0 * random.uniform(i as u64) - 1.0)).collect::<Vec<T>>()
        };
        Self { sizes, turned, a: draw(m * k, 0), b: draw(k * n, 1), bias: bias.then(|| draw(n, 2)) }
    }

    fn strides(&self) -> [[usize; 2]; 2] {
        let [m, n, k] = self.sizes;
        [if self.turned[0] { [1, m] } else { [k, 1] }, if self.turned[1] { [1, k] } else { [n, 1] }]
    }

    fn run(&self, kernel: &dyn Packing<T>) -> Result<Vec<T>> {
        let [m, n, k] = self.sizes;
        let [[a_row, a_col], [b_row, b_col]] = self.strides();
        let mut out = vec![<T as Float>::from_f64(0.0); m * n];
        let product = Product {
            batch: 1,
            m,
            n,
            k,
            rows: m,
            a: Matrix { data: &self.a[..], row: a_row, col: a_col },
            b: Matrix { data: &self.b[..], row: b_row, col: b_col },
            offsets: &|_| (0, 0),
            bias: self.bias.as_deref(),
        };
        gemm_by(kernel, &product, &mut out)?;
        Ok(out)
    }

    /// Returns the largest error, relative to the sum of the products' magnitudes.
    fn error(&self, kernel: &dyn Packing<T>) -> Result<f64> {
        let [m, n, k] = self.sizes;
        let [[a_row, a_col], [b_row, b_col]] = self.strides();
        let value = |x: T| crate::dtype::Real::to_f64(x.to_acc());
        let out = self.run(kernel)?;
        let mut worst = 0.0f64;
        // Every element of small products, some of large ones.
        for index in (0..m * n).step_by((m * n).div_ceil(4096).max(1)) {
            let (i, j) = (index / n, index % n);
            let bias = self.bias.as_ref().map_or(0.0, |bias| value(bias[j]));
            let terms = (0..k).map(|p| value(self.a[i * a_row + p * a_col]) * value(self.b[p * b_row + j * b_col]));
            let (sum, size) = terms.fold((bias, bias.abs()), |(sum, size), x| (sum + x, size + x.abs()));
            let error = (value(out[index]) - sum).abs();
            assert!(error.is_finite(), "{:?} at ({i}, {j})", self.sizes);
            worst = worst.max(error / size.max(f64::MIN_POSITIVE));
        }
        Ok(worst)
    }
}

/// Edges of tiles, panels and blocks of depth.
const SIZES: [[usize; 3]; 15] = [
    [5, 1, 1],
    [16, 32, 32],
    [17, 33, 31],
    [32, 64, 64],
    [33, 31, 256],
    [31, 65, 257],
    [48, 96, 300],
    [70, 130, 512],
    [5, 200, 40],
    [6, 40, 0],
    [70, 130, 0],
    [0, 40, 64],
    [40, 0, 64],
    [300, 70, 33],
    [130, 260, 530],
];

fn every_form(body: impl Fn([usize; 3], [bool; 2], bool) -> Result<()>) -> Result<()> {
    amx_emulator::install();
    for sizes in SIZES {
        for turned in [[false, false], [false, true], [true, false], [true, true]] {
            for bias in [false, true] {
                body(sizes, turned, bias)?;
            }
        }
    }
    Ok(())
}

#[test]
fn amx_products_of_bf16() -> Result<()> {
    every_form(|sizes, turned, bias| {
        let error = Case::<bf16>::new(sizes, turned, bias).error(&Tiles)?;
        // The result is rounded to eight bits.
        assert!(error <= 4.0e-3, "{sizes:?} {turned:?}: error {error:e}");
        Ok(())
    })
}

#[test]
fn amx_products_of_split_f32() -> Result<()> {
    every_form(|sizes, turned, bias| {
        let error = Case::<f32>::new(sizes, turned, bias).error(&Split)?;
        assert!(error <= 1.6e-5, "{sizes:?} {turned:?}: error {error:e}");
        Ok(())
    })
}

/// At the default precision, f32 products are multiply-adds on every processor.
#[test]
fn full_precision_is_left_to_multiply_adds() {
    assert!(select::kernel::<f32>(usize::MAX).arithmetic() == Arithmetic::Fma);
    assert!(!Split.is_exact_enough());
}

/// Values that tiles cannot represent give the bits of multiply-adds.
#[test]
fn amx_leaves_extreme_numbers_to_multiply_adds() -> Result<()> {
    amx_emulator::install();
    for sizes in [[40, 50, 60], [130, 260, 530]] {
        for extreme in [f32::INFINITY, f32::NAN, 1e30, f32::MAX] {
            let mut case = Case::<f32>::new(sizes, [false, true], false);
            case.a[77] = extreme;
            let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert_eq!(bits(case.run(&Split)?), bits(case.run(&Fma)?), "{extreme}");
        }
        let mut case = Case::<f32>::new(sizes, [true, false], false);
        case.b.iter_mut().for_each(|b| *b *= 1e-38);
        assert_eq!(case.run(&Split)?, case.run(&Fma)?, "numbers below the normal range");
    }
    Ok(())
}

/// Rows and columns of odd strides.
#[test]
fn amx_packs_any_strides() {
    let data: Vec<f32> = (0..40 * 50 * 3).map(|i| i as f32).collect();
    let from = Matrix { data: &data[..], row: 150, col: 3 };
    let mut parts = vec![bf16::ZERO; PARTS * 64 * 64];
    assert!(Split.pack_a(from, 40, 50, bytemuck::cast_slice_mut(&mut parts)));
    for (row, p) in [(0, 0), (31, 49), (32, 1), (39, 7)] {
        let at = row / MR * PARTS * MR * 64 + row % MR * 64 + p;
        let sum: f32 = (0..PARTS).map(|part| parts[at + part * MR * 64].to_acc()).sum();
        assert_eq!(sum, data[row * 150 + p * 3]);
    }
}
