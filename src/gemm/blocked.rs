//! Loops over blocks on one thread: operands are packed block by block, so that they stay in the caches.

use std::mem::take;

use super::{
    matrix::{Beta, KC, Matrix, Window},
    pack::{Operand, Packing, panels::Fma},
    select,
};
use crate::{
    device::scratch::{User, aligned, lend},
    dtype::Float,
};

/// Number of rows and columns of the blocks that a thread packs for itself: both stay in the L2 cache.
const MC: usize = 168;
const NC: usize = 256;

/// Number of columns packed at a time for few rows: they stay in the L1 cache.
pub(super) const NC_OF_FEW: usize = 64;

/// Operands with at most this many rows (or columns) are divided only along the other side.
pub(super) const FEW: usize = 64;

/// Scratch memory of a thread for packed operands and sums.
#[derive(Default)]
pub(super) struct Scratch {
    a: Vec<u64>,
    b: Vec<u64>,
    pub sums: Vec<u64>,
}

impl Scratch {
    /// Calls `f` with the scratch memory of this thread, of unspecified content.
    pub fn with<R>(f: impl FnOnce(&mut Self) -> R) -> R {
        lend(User::Products, |areas| {
            let [a, b, sums] = take(areas);
            let mut scratch = Self { a, b, sums };
            let result = f(&mut scratch);
            *areas = [scratch.a, scratch.b, scratch.sums];
            result
        })
    }
}

/// Computes `C = beta + A·B` on the calling thread, for `k > 0`. Never inlined: each driver would have a copy.
#[inline(never)]
pub(super) fn multiply<T: Float>(
    kernel: &dyn Packing<T>,
    k: usize,
    a: Matrix<T>,
    b: Matrix<T>,
    beta: Beta<T::Acc>,
    mut c: Window<T::Acc>,
    scratch: &mut Scratch,
) {
    let (m, n) = (c.rows(), c.columns());
    let done = select::few_rows(kernel, m, k, b)
        .map_or(0, |way| way.multiply(k, a, b, beta, &mut c, [&mut scratch.a, &mut scratch.b]));
    let nc = if m <= FEW { NC_OF_FEW } else { NC };
    for jc in (done..n).step_by(nc) {
        let nc = nc.min(n - jc);
        for pc in (0..k).step_by(KC) {
            let kc = KC.min(k - pc);
            let beta = beta.of_block(pc, jc);
            let right = operand_b(kernel, b.from(pc, jc), m, nc, kc, &mut scratch.b);
            for ic in (0..m).step_by(MC) {
                let mc = MC.min(m - ic);
                let left = operand_a(kernel, a.from(ic, pc), mc, nc, kc, &mut scratch.a);
                let c = c.part(ic, jc, mc, nc);
                match (left, right) {
                    (Some(left), Some(right)) => kernel.multiply(kc, left, right, beta, c),
                    _ => out_of_range(kc, a.from(ic, pc), b.from(pc, jc), beta, c),
                }
            }
        }
    }
}

/// Computes `C = beta + A·B` for one block by multiply-adds, for values that other instructions compute incorrectly.
#[cold]
pub(super) fn out_of_range<T: Float>(kc: usize, a: Matrix<T>, b: Matrix<T>, beta: Beta<T::Acc>, c: Window<T::Acc>) {
    let mut scratch = Scratch::default();
    let (m, n) = (c.rows(), c.columns());
    let kernel: &dyn Packing<T> = &Fma;
    let right = operand_b(kernel, b, m, n, kc, &mut scratch.b);
    let left = operand_a(kernel, a, m, n, kc, &mut scratch.a);
    if let (Some(left), Some(right)) = (left, right) {
        kernel.multiply(kc, left, right, beta, c);
    }
}

/// Returns `m` rows of A for a kernel; `None` if they are out of its range.
fn operand_a<'a, T: Float>(
    kernel: &dyn Packing<T>,
    a: Matrix<'a, T>,
    m: usize,
    n: usize,
    kc: usize,
    area: &'a mut Vec<u64>,
) -> Option<Operand<'a, T>> {
    if kernel.reads_a(a, kc, n) {
        return Some(Operand::InPlace(a));
    }
    let packed = packed(kernel, m, kernel.tile().mr, kc, area);
    kernel.pack_a(a, m, kc, packed).then_some(Operand::Packed(packed))
}

/// Returns `n` columns of B for a kernel; `None` if they are out of its range.
fn operand_b<'a, T: Float>(
    kernel: &dyn Packing<T>,
    b: Matrix<'a, T>,
    m: usize,
    n: usize,
    kc: usize,
    area: &'a mut Vec<u64>,
) -> Option<Operand<'a, T>> {
    if kernel.reads_b(b, kc, m, n) {
        return Some(Operand::InPlace(b));
    }
    let packed = packed(kernel, n, kernel.tile().nr, kc, area);
    kernel.pack_b(b, n, kc, packed).then_some(Operand::Packed(packed))
}

/// Returns memory for panels of `width` rows or columns.
fn packed<'a, T: Float>(
    kernel: &dyn Packing<T>,
    count: usize,
    width: usize,
    kc: usize,
    area: &'a mut Vec<u64>,
) -> &'a mut [u8] {
    aligned(area, count.next_multiple_of(width) * kc.next_multiple_of(kernel.kr()) * kernel.packed_size())
}
