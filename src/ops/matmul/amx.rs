//! Products of bf16 matrices on the tiles of AMX: one instruction multiplies 16 rows by 16 columns over 32 steps, at about
//! sixteen times the rate of multiply-adds (Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter 20).
//!
//! Four tiles of sums cover 32 rows and 32 columns; two tiles of A and two of B serve them. B is packed as
//! [`pairs`](super::pairs) does it, A lies by rows. The instructions are written in assembly: the compiler does not know
//! the tile registers, and thus does not touch them.
//!
//! An f32 number is the sum of three bf16 numbers up to its last bit. [`Split`] packs these parts and multiplies those of
//! them that matter, the smallest products first (Henry et al., "Leveraging the bfloat16 Artificial Intelligence
//! Datatype For Higher-Precision Computations", <https://arxiv.org/abs/1904.06376>).

use std::arch::asm;

use half::bf16;

use super::{
    cpu::Matrix,
    microkernel::{Left, Order, Right, Start, Tile, Window},
    packing::Packing,
    pairs::{COLUMNS, pack_columns, pack_rows},
};
use crate::{
    core::Float,
    device::{
        Level, Precision, float32_matmul_precision,
        simd::{self, vectorized},
    },
};

/// Rows of sums that are computed together.
const ROWS: usize = 32;

/// Steps of one instruction; a block of steps is filled up to a multiple.
const STEPS: usize = 32;

/// Bytes of a row of a tile.
const ROW_BYTES: usize = 64;

/// Whether tiles are in use.
fn available() -> bool {
    simd::level() >= Level::Amx
}

/// Whether the instructions do something. Tests emulate them.
fn can_run() -> bool {
    #[cfg(all(test, target_os = "linux"))]
    if super::amx_emulator::installed() {
        return true;
    }
    available()
}

/// The shape of each tile register, as `ldtilecfg` reads it.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_of_row: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// For products of `rows` rows: sums in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
    fn new(rows: usize) -> Self {
        let (upper, lower) = (rows.min(16) as u8, rows.saturating_sub(16) as u8);
        let heights = [upper, upper, lower, lower, upper, lower, 16, 16];
        let mut shapes = Self { palette: 1, start_row: 0, reserved: [0; 14], bytes_of_row: [0; 16], rows: [0; 16] };
        for (tile, height) in heights.into_iter().enumerate().filter(|(_, height)| *height > 0) {
            shapes.rows[tile] = height;
            shapes.bytes_of_row[tile] = ROW_BYTES as u16;
        }
        shapes
    }

    /// # Safety
    ///
    /// The processor has tiles, and the system permits their use.
    unsafe fn load(&self) {
        // SAFETY: 64 bytes are read; no register that the compiler uses changes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) self, options(nostack, readonly, preserves_flags)) }
    }
}

/// Gives the tile registers back: switching threads is faster without them.
///
/// # Safety
///
/// As for [`Shapes::load`].
unsafe fn release() {
    // SAFETY: no register that the compiler uses changes.
    unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) }
}

/// Operands in bf16.
pub(crate) struct Tiles;

impl Packing<bf16> for Tiles {
    type Packed = bf16;
    const STEPS: usize = STEPS;

    fn available() -> bool {
        available()
    }

    fn tile() -> Tile {
        Tile { rows: ROWS, columns: COLUMNS }
    }

    fn left_in_place(a: Matrix<'_, bf16>, steps: usize, _columns: usize) -> Option<Left<'_, bf16>> {
        let fits = a.col == 1 && steps.is_multiple_of(STEPS);
        fits.then_some(Left { data: a.data, panel: ROWS * a.row, order: Order::Steps, stride: a.row })
    }

    fn right_in_place(_: Matrix<'_, bf16>, _: usize, _: usize, _: usize) -> Option<Right<'_, bf16>> {
        None
    }

    fn pack_left(a: Matrix<bf16>, rows: usize, steps: usize, to: &mut [bf16]) -> bool {
        pack_rows(a, rows, steps, steps.next_multiple_of(STEPS), to);
        true
    }

    fn pack_right(b: Matrix<bf16>, columns: usize, steps: usize, to: &mut [bf16]) -> bool {
        pack_columns(b, columns, steps, steps.next_multiple_of(STEPS), to);
        true
    }

    fn packed_left(packed: &[bf16], steps: usize) -> Left<'_, bf16> {
        let stride = steps.next_multiple_of(STEPS);
        Left { data: packed, panel: ROWS * stride, order: Order::Steps, stride }
    }

    fn multiply(steps: usize, a: Left<bf16>, b: Right<bf16>, start: Start<f32>, c: Window<f32>) {
        let (m, n) = (c.rows(), c.columns());
        if m == 0 || n == 0 {
            return;
        }
        let steps = steps.next_multiple_of(STEPS);
        if steps > 0 {
            let last_panel = (m - 1) / ROWS * a.panel + (m - 1) % ROWS * a.stride;
            let full_panel = (m / ROWS).saturating_sub(1) * a.panel + (ROWS.min(m) - 1) * a.stride;
            assert!(last_panel.max(full_panel) + steps <= a.data.len(), "A ends before its block");
            assert!((n - 1) / COLUMNS * b.panel + COLUMNS * steps <= b.data.len(), "B ends before its block");
        }
        let a = Planes { data: a.data.as_ptr(), panel: a.panel, plane: 0, stride: a.stride };
        let b = Planes { data: b.data.as_ptr(), panel: b.panel, plane: 0, stride: 2 * COLUMNS };
        // SAFETY: the reach of the operands is checked above.
        unsafe { walk(steps, a, b, &[(0, 0)], start, c) };
    }
}

/// Operands in f32 as the sums of three bf16 parts each.
///
/// [`Precision::Highest`] multiplies the six pairs of parts whose orders add up to at most two: what is left out is below
/// 2⁻²⁴ of the product. [`Precision::High`] leaves out the third parts: three pairs, 2⁻¹⁶. [`Precision::Medium`] has
/// the first pair alone, 2⁻⁸.
pub(crate) struct Split;

/// Parts of an f32 number.
const PARTS: usize = 3;

/// Pairs of parts, the smallest product first.
fn products() -> &'static [(usize, usize)] {
    const PRODUCTS: [(usize, usize); 6] = [(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)];
    match float32_matmul_precision() {
        Precision::Highest => &PRODUCTS,
        Precision::High => &PRODUCTS[3..],
        Precision::Medium => &PRODUCTS[5..],
    }
}

/// Magnitudes between which the largest element of an operand has to lie: products of parts then stay in the normal range,
/// beyond which tiles know nothing but zero and infinity.
const ORDINARY: std::ops::Range<f32> = 9.0e-13..1.0e18;

impl Packing<f32> for Split {
    type Packed = [u16; PARTS];
    const STEPS: usize = STEPS;

    fn available() -> bool {
        available()
    }

    fn tile() -> Tile {
        Tile { rows: ROWS, columns: COLUMNS }
    }

    fn left_in_place(_: Matrix<'_, f32>, _: usize, _: usize) -> Option<Left<'_, [u16; PARTS]>> {
        None
    }

    fn right_in_place(_: Matrix<'_, f32>, _: usize, _: usize, _: usize) -> Option<Right<'_, [u16; PARTS]>> {
        None
    }

    fn pack_left(a: Matrix<f32>, rows: usize, steps: usize, to: &mut [[u16; PARTS]]) -> bool {
        let padded = steps.next_multiple_of(STEPS);
        pack_parts(a, rows, steps, ROWS, to, ROWS * padded, &|a, rows, to| pack_rows(a, rows, steps, padded, to))
    }

    fn pack_right(b: Matrix<f32>, columns: usize, steps: usize, to: &mut [[u16; PARTS]]) -> bool {
        let padded = steps.next_multiple_of(STEPS);
        pack_parts(b.transposed(), columns, steps, COLUMNS, to, COLUMNS * padded, &|b, columns, to| {
            pack_columns(b.transposed(), columns, steps, padded, to);
        })
    }

    fn packed_left(packed: &[[u16; PARTS]], steps: usize) -> Left<'_, [u16; PARTS]> {
        let stride = steps.next_multiple_of(STEPS);
        Left { data: packed, panel: ROWS * stride, order: Order::Steps, stride }
    }

    fn multiply(steps: usize, a: Left<[u16; PARTS]>, b: Right<[u16; PARTS]>, start: Start<f32>, c: Window<f32>) {
        let (m, n) = (c.rows(), c.columns());
        if m == 0 || n == 0 {
            return;
        }
        let steps = steps.next_multiple_of(STEPS);
        assert!(m.div_ceil(ROWS) * a.panel <= a.data.len(), "A ends before its block");
        assert!(n.div_ceil(COLUMNS) * b.panel <= b.data.len(), "B ends before its block");
        assert!(ROWS * steps <= a.panel && COLUMNS * steps <= b.panel, "a panel ends before its block");
        let parts = |data: &[[u16; PARTS]], panel: usize, stride: usize| Planes {
            data: data.as_ptr().cast(),
            panel: PARTS * panel,
            plane: panel,
            stride,
        };
        let (a, b) = (parts(a.data, a.panel, a.stride), parts(b.data, b.panel, 2 * COLUMNS));
        // SAFETY: the reach of the operands is checked above.
        unsafe { walk(steps, a, b, products(), start, c) };
    }
}

/// Packs one part of as many lanes.
type PackPart<'a> = &'a dyn Fn(Matrix<bf16>, usize, &mut [bf16]);

/// Splits panels of `width` lanes and packs the parts of each one after the other, `panel` elements each. Gives whether the
/// operand is ordinary: of finite numbers, the largest of which is neither huge nor tiny.
fn pack_parts(
    from: Matrix<f32>,
    lanes: usize,
    steps: usize,
    width: usize,
    to: &mut [[u16; PARTS]],
    panel: usize,
    pack: PackPart,
) -> bool {
    if lanes == 0 || steps == 0 {
        return true;
    }
    let to: &mut [bf16] = bytemuck::cast_slice_mut(to);
    // The parts of one panel, in the order of the operand.
    let mut parts = vec![bf16::ZERO; PARTS * width * steps];
    let (mut largest, mut finite) = (0.0f32, true);
    for (index, to) in to.chunks_exact_mut(PARTS * panel).take(lanes.div_ceil(width)).enumerate() {
        let lanes = width.min(lanes - index * width);
        let from = from.from(index * width, 0);
        // Lines of elements that lie next to each other, lanes or steps.
        let (lines, length, stride) = if from.col == 1 { (lanes, steps, from.row) } else { (steps, lanes, from.col) };
        let (high, rest) = parts.split_at_mut(width * steps);
        let (middle, low) = rest.split_at_mut(width * steps);
        for line in 0..lines {
            let place = line * length..(line + 1) * length;
            let (high, middle, low) = (&mut high[place.clone()], &mut middle[place.clone()], &mut low[place]);
            if from.col == 1 || from.row == 1 {
                let from = &from.data[line * stride..line * stride + length];
                let found = split(from, high, middle, low);
                (largest, finite) = (largest.max(found.0), finite & found.1);
            } else {
                for at in 0..length {
                    let from = &from.data[line * stride + at * from.row..][..1];
                    let (high, middle, low) = (&mut high[at..=at], &mut middle[at..=at], &mut low[at..=at]);
                    let found = split(from, high, middle, low);
                    (largest, finite) = (largest.max(found.0), finite & found.1);
                }
            }
        }
        let (row, col) = if from.col == 1 { (length, 1) } else { (1, length) };
        for (part, to) in [&*high, &*middle, &*low].into_iter().zip(to.chunks_exact_mut(panel)) {
            pack(Matrix { data: &part[..lines * length], row, col }, lanes, to);
        }
    }
    finite && (largest == 0.0 || ORDINARY.contains(&largest))
}

vectorized! {
    /// The parts of f32 numbers; the largest magnitude, and whether all are finite.
    fn split(from: &[f32], high: &mut [bf16], middle: &mut [bf16], low: &mut [bf16]) -> (f32, bool) {
        let mut largest = 0u32;
        for (((&x, high), middle), low) in from.iter().zip(high).zip(middle).zip(low) {
            let magnitude = x.to_bits() & 0x7FFF_FFFF;
            largest = if magnitude > largest { magnitude } else { largest };
            *high = <bf16 as Float>::from_acc(x);
            let rest = x - high.to_acc();
            *middle = <bf16 as Float>::from_acc(rest);
            *low = <bf16 as Float>::from_acc(rest - middle.to_acc());
        }
        let largest = f32::from_bits(largest);
        (largest, largest < f32::INFINITY)
    }
}

/// Where the parts of an operand lie, in elements.
#[derive(Clone, Copy)]
struct Planes {
    data: *const bf16,
    /// From a panel to the next one.
    panel: usize,
    /// From a part to the next one.
    plane: usize,
    /// From a row of a tile to the next one.
    stride: usize,
}

/// Walks over the tiles of C; `products` are the parts of A and B that are multiplied, in this order.
///
/// # Safety
///
/// `steps` steps of all rows of A and all panels of B are readable.
unsafe fn walk(steps: usize, a: Planes, b: Planes, products: &[(usize, usize)], start: Start<f32>, mut c: Window<f32>) {
    assert!(can_run(), "the processor has no tiles, or the system does not permit them");
    let (m, n) = (c.rows(), c.columns());
    if let Start::Bias(bias) = start {
        assert!(bias.len() >= n, "the bias ends before the columns");
    }
    let mut shaped = 0;
    let mut aside = [[0f32; COLUMNS]; ROWS];
    for j in (0..n).step_by(COLUMNS) {
        let columns = COLUMNS.min(n - j);
        for i in (0..m).step_by(ROWS) {
            let rows = ROWS.min(m - i);
            if shaped != rows {
                // SAFETY: tiles are there.
                unsafe { Shapes::new(rows).load() };
                shaped = rows;
            }
            let mut part = c.part(i, j, rows, columns);
            // Sums of many products start at zero in each block of steps: adding blocks up is more exact than one chain.
            let direct = products.len() == 1 && columns == COLUMNS && !matches!(start, Start::Bias(_));
            let (to, row) = if direct { part.as_mut_ptr() } else { (aside.as_flattened_mut().as_mut_ptr(), COLUMNS) };
            let clear = !direct || matches!(start, Start::Zero);
            let to = Sums { data: to, row_bytes: row * size_of::<f32>(), clear };
            let (a, b) = (a.at(i / ROWS), b.at(j / COLUMNS));
            // SAFETY: tiles are there and have the shapes of these rows; the caller answers for A and B, and C is a
            // window of as many rows and at least as many columns as the tiles.
            unsafe {
                if rows > 16 {
                    two_by_two(steps, a, b, products, to);
                } else {
                    one_by_two(steps, a, b, products, to);
                }
            }
            if !direct {
                for (row, sums) in aside[..rows].iter().enumerate() {
                    add_row(start.of_block(0, j), &sums[..columns], part.row_mut(row));
                }
            }
        }
    }
    // SAFETY: tiles are there.
    unsafe { release() };
}

vectorized! {
    /// `row = start + sums`
    fn add_row(start: Start<f32>, sums: &[f32], row: &mut [f32]) {
        start.add_to(sums, row);
    }
}

impl Planes {
    /// The operand from panel `index` on.
    fn at(self, index: usize) -> Self {
        Self { data: self.data.wrapping_add(index * self.panel), ..self }
    }

    /// A part of its first panel, from row `row` of a tile on.
    fn part(&self, part: usize, row: usize) -> *const bf16 {
        self.data.wrapping_add(part * self.plane + row * self.stride)
    }

    fn stride_bytes(&self) -> usize {
        self.stride * size_of::<bf16>()
    }
}

/// A tile of sums.
#[derive(Clone, Copy)]
struct Sums {
    data: *mut f32,
    row_bytes: usize,
    /// Whether the sums start at zero rather than at what is there.
    clear: bool,
}

/// 17 to 32 rows: `C (+)= A·B` on four tiles of sums.
///
/// # Safety
///
/// Tiles are there, shaped for the rows; all rows and steps of the operands are readable, and 32 columns of the rows of C
/// writable.
unsafe fn two_by_two(steps: usize, a: Planes, b: Planes, products: &[(usize, usize)], c: Sums) {
    let lower = c.data.wrapping_byte_add(16 * c.row_bytes);
    // SAFETY: the caller answers for the pointers; nothing but memory of C and tile registers changes.
    unsafe {
        if c.clear {
            asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem));
        } else {
            asm!(
                "tileloadd tmm0, [{upper} + {row}]",
                "tileloadd tmm1, [{upper} + {row} + 64]",
                "tileloadd tmm2, [{lower} + {row}]",
                "tileloadd tmm3, [{lower} + {row} + 64]",
                upper = in(reg) c.data, lower = in(reg) lower, row = in(reg) c.row_bytes,
                options(nostack, readonly, preserves_flags),
            );
        }
        for &(of_a, of_b) in products.iter().filter(|_| steps > 0) {
            asm!(
                "2:",
                "tileloadd tmm4, [{upper} + {a_row}]",
                "tileloadd tmm6, [{b} + {b_row}]",
                "tileloadd tmm7, [{b} + {b_row} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{lower} + {a_row}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {upper}, 64",
                "add {lower}, 64",
                "add {b}, 2048",
                "dec {count}",
                "jnz 2b",
                upper = inout(reg) a.part(of_a, 0) => _,
                lower = inout(reg) a.part(of_a, 16) => _,
                b = inout(reg) b.part(of_b, 0) => _,
                a_row = in(reg) a.stride_bytes(), b_row = in(reg) b.stride_bytes(),
                count = inout(reg) steps / STEPS => _,
                options(nostack, readonly),
            );
        }
        asm!(
            "tilestored [{upper} + {row}], tmm0",
            "tilestored [{upper} + {row} + 64], tmm1",
            "tilestored [{lower} + {row}], tmm2",
            "tilestored [{lower} + {row} + 64], tmm3",
            upper = in(reg) c.data, lower = in(reg) lower, row = in(reg) c.row_bytes,
            options(nostack, preserves_flags),
        );
    }
}

/// As [`two_by_two`] for at most 16 rows, on two tiles of sums.
///
/// # Safety
///
/// As for [`two_by_two`].
unsafe fn one_by_two(steps: usize, a: Planes, b: Planes, products: &[(usize, usize)], c: Sums) {
    // SAFETY: as in `two_by_two`.
    unsafe {
        if c.clear {
            asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem));
        } else {
            asm!(
                "tileloadd tmm0, [{c} + {row}]",
                "tileloadd tmm1, [{c} + {row} + 64]",
                c = in(reg) c.data, row = in(reg) c.row_bytes,
                options(nostack, readonly, preserves_flags),
            );
        }
        for &(of_a, of_b) in products.iter().filter(|_| steps > 0) {
            asm!(
                "2:",
                "tileloadd tmm4, [{a} + {a_row}]",
                "tileloadd tmm6, [{b} + {b_row}]",
                "tileloadd tmm7, [{b} + {b_row} + 64]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 64",
                "add {b}, 2048",
                "dec {count}",
                "jnz 2b",
                a = inout(reg) a.part(of_a, 0) => _,
                b = inout(reg) b.part(of_b, 0) => _,
                a_row = in(reg) a.stride_bytes(), b_row = in(reg) b.stride_bytes(),
                count = inout(reg) steps / STEPS => _,
                options(nostack, readonly),
            );
        }
        asm!(
            "tilestored [{c} + {row}], tmm0",
            "tilestored [{c} + {row} + 64], tmm1",
            c = in(reg) c.data, row = in(reg) c.row_bytes,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::{
        Philox, Result,
        ops::matmul::{
            amx_emulator,
            cpu::{Product, gemm_by},
            packing::MultiplyAdd,
        },
    };

    /// A product of random numbers, `turned` being operands that lie by columns.
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

        fn steps(&self) -> [[usize; 2]; 2] {
            let [m, n, k] = self.sizes;
            [if self.turned[0] { [1, m] } else { [k, 1] }, if self.turned[1] { [1, k] } else { [n, 1] }]
        }

        fn run<P: Packing<T>>(&self) -> Result<Vec<T>> {
            let [m, n, k] = self.sizes;
            let [[a_row, a_col], [b_row, b_col]] = self.steps();
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
            gemm_by::<T, P>(&product, &mut out)?;
            Ok(out)
        }

        /// The largest error, as a share of the sum of the products' magnitudes.
        fn error<P: Packing<T>>(&self) -> Result<f64> {
            let [m, n, k] = self.sizes;
            let [[a_row, a_col], [b_row, b_col]] = self.steps();
            let value = |x: T| crate::core::Real::to_f64(x.to_acc());
            let out = self.run::<P>()?;
            let mut worst = 0.0f64;
            // Every element of small products, some of large ones.
            for index in (0..m * n).step_by((m * n).div_ceil(4096).max(1)) {
                let (i, j) = (index / n, index % n);
                let bias = self.bias.as_ref().map_or(0.0, |bias| value(bias[j]));
                let terms = (0..k).map(|s| value(self.a[i * a_row + s * a_col]) * value(self.b[s * b_row + j * b_col]));
                let (sum, size) = terms.fold((bias, bias.abs()), |(sum, size), x| (sum + x, size + x.abs()));
                let error = (value(out[index]) - sum).abs();
                assert!(error.is_finite(), "{:?} at ({i}, {j})", self.sizes);
                worst = worst.max(error / size.max(f64::MIN_POSITIVE));
            }
            Ok(worst)
        }
    }

    /// Edges of tiles, panels and blocks of steps.
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
            let error = Case::<bf16>::new(sizes, turned, bias).error::<Tiles>()?;
            // The result is rounded to eight bits.
            assert!(error <= 4.0e-3, "{sizes:?} {turned:?}: error {error:e}");
            Ok(())
        })
    }

    #[test]
    fn amx_products_of_split_f32() -> Result<()> {
        every_form(|sizes, turned, bias| {
            let error = Case::<f32>::new(sizes, turned, bias).error::<Split>()?;
            assert!(error <= 4.0e-7, "{sizes:?} {turned:?}: error {error:e}");
            Ok(())
        })
    }

    /// The claim of [`Precision::Highest`]: no worse than multiply-adds.
    #[test]
    fn amx_six_products_are_as_exact_as_multiply_adds() -> Result<()> {
        amx_emulator::install();
        for k in [512, 2048] {
            let case = Case::<f32>::new([48, 40, k], [false, true], false);
            let (tiles, adds) = (case.error::<Split>()?, case.error::<MultiplyAdd>()?);
            assert!(tiles <= adds, "K = {k}: error {tiles:e} against {adds:e}");
        }
        Ok(())
    }

    /// What tiles cannot represent comes out as multiply-adds give it, bit for bit.
    #[test]
    fn amx_leaves_extreme_numbers_to_multiply_adds() -> Result<()> {
        amx_emulator::install();
        for sizes in [[40, 50, 60], [130, 260, 530]] {
            for extreme in [f32::INFINITY, f32::NAN, 1e30, f32::MAX] {
                let mut case = Case::<f32>::new(sizes, [false, true], false);
                case.a[77] = extreme;
                let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                assert_eq!(bits(case.run::<Split>()?), bits(case.run::<MultiplyAdd>()?), "{extreme}");
            }
            let mut case = Case::<f32>::new(sizes, [true, false], false);
            case.b.iter_mut().for_each(|b| *b *= 1e-38);
            assert_eq!(case.run::<Split>()?, case.run::<MultiplyAdd>()?, "numbers below the normal range");
        }
        Ok(())
    }

    /// Steps, rows and columns of odd strides.
    #[test]
    fn amx_packs_any_strides() {
        let data: Vec<f32> = (0..40 * 50 * 3).map(|i| i as f32).collect();
        let from = Matrix { data: &data[..], row: 150, col: 3 };
        let mut packed = vec![[0u16; PARTS]; 64 * 64];
        assert!(Split::pack_left(from, 40, 50, &mut packed));
        let parts: &[bf16] = bytemuck::cast_slice(&packed);
        for (row, step) in [(0, 0), (31, 49), (32, 1), (39, 7)] {
            let at = row / ROWS * PARTS * ROWS * 64 + row % ROWS * 64 + step;
            let sum: f32 = (0..PARTS).map(|part| parts[at + part * ROWS * 64].to_acc()).sum();
            assert_eq!(sum, data[row * 150 + step * 3]);
        }
    }
}
