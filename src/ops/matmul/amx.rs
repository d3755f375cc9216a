//! Products of bf16 matrices on the tiles of AMX: one instruction multiplies 16 rows by 16 columns over 32 steps, at about
//! sixteen times the rate of multiply-adds (Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter 20).
//!
//! Four tiles of sums cover 32 rows and 32 columns; two tiles of A and two of B serve them. B is packed as
//! [`pairs`](super::pairs) does it, A lies by rows. The instructions are written in assembly, and each piece lists the tile
//! registers that it changes. Sums stay in them from piece to piece: the compiler has no values that it could put there.
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
    device::{
        Level, Precision, float32_matmul_precision,
        simd::{self, vectorized},
    },
    dtype::Float,
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
        // SAFETY: 64 bytes are read.
        unsafe {
            asm!(
                "ldtilecfg [{}]",
                in(reg) self,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly, preserves_flags),
            );
        }
    }
}

/// Gives the tile registers back: switching threads is faster without them.
///
/// # Safety
///
/// As for [`Shapes::load`].
unsafe fn release() {
    // SAFETY: nothing but tile registers changes.
    unsafe {
        asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, nomem, preserves_flags),
        );
    }
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
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nostack, nomem),
            );
        } else {
            asm!(
                "tileloadd tmm0, [{upper} + {row}]",
                "tileloadd tmm1, [{upper} + {row} + 64]",
                "tileloadd tmm2, [{lower} + {row}]",
                "tileloadd tmm3, [{lower} + {row} + 64]",
                upper = in(reg) c.data, lower = in(reg) lower, row = in(reg) c.row_bytes,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
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
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
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
            asm!("tilezero tmm0", "tilezero tmm1", out("tmm0") _, out("tmm1") _, options(nostack, nomem));
        } else {
            asm!(
                "tileloadd tmm0, [{c} + {row}]",
                "tileloadd tmm1, [{c} + {row} + 64]",
                c = in(reg) c.data, row = in(reg) c.row_bytes,
                out("tmm0") _, out("tmm1") _,
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
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
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
#[path = "amx_tests.rs"]
mod tests;
