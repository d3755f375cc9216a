//! Products of bf16 on the tiles of AMX: one instruction multiplies 16 rows by 16 columns over a depth of 32, at about
//! sixteen times the rate of multiply-adds (Intel 64 and IA-32 Architectures Optimization Reference Manual, chapter 20).
//!
//! Four tiles of sums cover 32 rows and 32 columns; two tiles of A and two of B serve them. B lies as for
//! [`bf16_dot`](super::bf16_dot), A by rows. The instructions are written in assembly, and each piece lists the tile
//! registers that it changes. Sums stay in them from piece to piece: the compiler has no values that it could put there.
//!
//! An operand may have several planes, which add up to it ([`multiply_planes`]): two bf16 numbers have 16 bits of an f32
//! number.

use std::arch::asm;

use half::bf16;

use super::{Order, PanelsA, PanelsB};
use crate::{
    device::{
        Level,
        simd::{self, vectorized},
    },
    gemm::matrix::{Beta, Window},
};

/// Number of rows of sums computed together.
pub(in crate::gemm) const MR: usize = 32;

/// Number of columns per panel: two tiles.
pub(in crate::gemm) const NR: usize = 32;

/// Depth of one instruction; blocks are padded to a multiple.
pub(in crate::gemm) const KR: usize = 32;

/// Number of bytes per tile row.
const ROW_BYTES: usize = 64;

/// Set by tests that emulate the instructions.
#[cfg(test)]
pub(in crate::gemm) static EMULATED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// Returns `true` if the instructions can be executed.
fn can_run() -> bool {
    #[cfg(test)]
    if EMULATED.load(std::sync::atomic::Ordering::Acquire) {
        return true;
    }
    simd::level() >= Level::Amx
}

/// Shape of each tile register, in the layout of `ldtilecfg`.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_of_row: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// Returns the shapes for products of `rows` rows: sums in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
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

/// Releases the tile registers: switching threads is faster without them.
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

/// Computes `C = beta + A·B` for one block of depth `kc`, a multiple of [`KR`], on the calling thread.
pub(in crate::gemm) fn multiply(kc: usize, a: PanelsA<bf16>, b: PanelsB<bf16>, beta: Beta<f32>, c: Window<f32>) {
    let (m, n) = (c.rows(), c.columns());
    assert!(kc.is_multiple_of(KR) && a.order == Order::Depth, "operands that are not packed for tiles");
    if m == 0 || n == 0 {
        return;
    }
    if kc > 0 {
        a.check(m, MR, kc);
        assert!((n - 1) / NR * b.panel + NR * kc <= b.data.len(), "B ends before its block");
    }
    let a = Planes { data: a.data.as_ptr(), panel: a.panel, plane: 0, stride: a.stride };
    let b = Planes { data: b.data.as_ptr(), panel: b.panel, plane: 0, stride: 2 * NR };
    // SAFETY: the reach of the operands is checked above.
    unsafe { walk(kc, a, b, &[(0, 0)], beta, c) };
}

/// Like [`multiply`] for packed operands of `planes` planes: each panel holds its part of one plane after the other. C
/// gets the sum of the `products` of planes of A and B, in this order.
pub(in crate::gemm) fn multiply_planes(
    kc: usize,
    planes: usize,
    [a, b]: [&[bf16]; 2],
    products: &[(usize, usize)],
    beta: Beta<f32>,
    c: Window<f32>,
) {
    let (m, n) = (c.rows(), c.columns());
    assert!(kc.is_multiple_of(KR), "operands that are not packed for tiles");
    if m == 0 || n == 0 {
        return;
    }
    assert!(m.div_ceil(MR) * planes * MR * kc <= a.len(), "A ends before its block");
    assert!(n.div_ceil(NR) * planes * NR * kc <= b.len(), "B ends before its block");
    assert!(products.iter().all(|&(of_a, of_b)| of_a.max(of_b) < planes), "a product of planes that are not there");
    let a = Planes { data: a.as_ptr(), panel: planes * MR * kc, plane: MR * kc, stride: kc };
    let b = Planes { data: b.as_ptr(), panel: planes * NR * kc, plane: NR * kc, stride: 2 * NR };
    // SAFETY: the reach of the operands is checked above.
    unsafe { walk(kc, a, b, products, beta, c) };
}

/// Planes of an operand, with strides in elements.
#[derive(Clone, Copy)]
struct Planes {
    data: *const bf16,
    /// Stride from one panel to the next.
    panel: usize,
    /// Stride from one plane to the next.
    plane: usize,
    /// Stride from one tile row to the next.
    stride: usize,
}

/// Walks over the tiles of C; `products` are the planes of A and B that are multiplied, in this order.
///
/// # Safety
///
/// A depth of `kc` of all rows of A and all panels of B are readable.
unsafe fn walk(kc: usize, a: Planes, b: Planes, products: &[(usize, usize)], beta: Beta<f32>, mut c: Window<f32>) {
    assert!(can_run(), "the processor has no tiles, or the system does not permit them");
    let (m, n) = (c.rows(), c.columns());
    if let Beta::Bias(bias) = beta {
        assert!(bias.len() >= n, "the bias ends before the columns");
    }
    let mut shaped = 0;
    let mut aside = [[0f32; NR]; MR];
    for j in (0..n).step_by(NR) {
        let columns = NR.min(n - j);
        for i in (0..m).step_by(MR) {
            let rows = MR.min(m - i);
            if shaped != rows {
                // SAFETY: tiles are there.
                unsafe { Shapes::new(rows).load() };
                shaped = rows;
            }
            let mut part = c.part(i, j, rows, columns);
            // Sums of several products start at zero in each block: adding up blocks is more accurate than one chain.
            let direct = products.len() == 1 && columns == NR && !matches!(beta, Beta::Bias(_));
            let (to, row) = if direct { part.as_mut_ptr() } else { (aside.as_flattened_mut().as_mut_ptr(), NR) };
            let clear = !direct || matches!(beta, Beta::Zero);
            let to = Sums { data: to, row_bytes: row * size_of::<f32>(), clear };
            let (a, b) = (a.at(i / MR), b.at(j / NR));
            // SAFETY: tiles are there and have the shapes of these rows; the caller answers for A and B, and C is a
            // window of as many rows and at least as many columns as the tiles.
            unsafe {
                if rows > 16 {
                    two_by_two(kc, a, b, products, to);
                } else {
                    one_by_two(kc, a, b, products, to);
                }
            }
            if !direct {
                for (row, sums) in aside[..rows].iter().enumerate() {
                    add_row(beta.of_block(0, j), &sums[..columns], part.row_mut(row));
                }
            }
        }
    }
    // SAFETY: tiles are there.
    unsafe { release() };
}

vectorized! {
    /// Computes `row = beta + sums`.
    fn add_row(beta: Beta<f32>, sums: &[f32], row: &mut [f32]) {
        beta.store(sums, row);
    }
}

impl Planes {
    /// Returns the operand from panel `index` on.
    fn at(self, index: usize) -> Self {
        Self { data: self.data.wrapping_add(index * self.panel), ..self }
    }

    /// Returns a plane of its first panel, from row `row` of a tile on.
    fn plane(&self, plane: usize, row: usize) -> *const bf16 {
        self.data.wrapping_add(plane * self.plane + row * self.stride)
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
    /// If `true`, the sums start at zero, otherwise at the current values.
    clear: bool,
}

/// Computes `C (+)= A·B` for 17 to 32 rows on four tiles of sums.
///
/// # Safety
///
/// Tiles are there, shaped for the rows; all rows of the operands and the whole depth are readable, and 32 columns of
/// the rows of C writable.
unsafe fn two_by_two(kc: usize, a: Planes, b: Planes, products: &[(usize, usize)], c: Sums) {
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
        for &(of_a, of_b) in products.iter().filter(|_| kc > 0) {
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
                upper = inout(reg) a.plane(of_a, 0) => _,
                lower = inout(reg) a.plane(of_a, 16) => _,
                b = inout(reg) b.plane(of_b, 0) => _,
                a_row = in(reg) a.stride_bytes(), b_row = in(reg) b.stride_bytes(),
                count = inout(reg) kc / KR => _,
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

/// Like [`two_by_two`], for at most 16 rows, on two tiles of sums.
///
/// # Safety
///
/// As for [`two_by_two`].
unsafe fn one_by_two(kc: usize, a: Planes, b: Planes, products: &[(usize, usize)], c: Sums) {
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
        for &(of_a, of_b) in products.iter().filter(|_| kc > 0) {
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
                a = inout(reg) a.plane(of_a, 0) => _,
                b = inout(reg) b.plane(of_b, 0) => _,
                a_row = in(reg) a.stride_bytes(), b_row = in(reg) b.stride_bytes(),
                count = inout(reg) kc / KR => _,
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
