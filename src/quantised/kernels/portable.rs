//! Kernels in plain code.

use half::f16;

use super::{Bytes, GROUP, Kernel, ROWS, STEP};
use crate::dtype::Float;

// SAFETY: plain arithmetic; the caller answers for the pointers.
unsafe impl Bytes for [u8; GROUP] {
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: see the trait.
        unsafe { *from.cast() }
    }

    unsafe fn store(self, flip: u8, to: *mut u8) {
        // SAFETY: see the trait.
        unsafe { *to.cast() = self.map(|byte| byte ^ flip) }
    }

    unsafe fn bits(self, by: u32, mask: u8) -> Self {
        self.map(|byte| byte >> by & mask)
    }

    unsafe fn shifted_left(self, by: u32) -> Self {
        self.map(|byte| byte << by)
    }

    unsafe fn sixteens(self, step: usize) -> Self {
        std::array::from_fn(|i| (self[i / STEP * STEP + step / 2] >> (step % 2 * STEP + i % STEP) & 1) << 4)
    }

    unsafe fn or(self, other: Self) -> Self {
        std::array::from_fn(|i| self[i] | other[i])
    }

    unsafe fn minus(self, value: u8) -> Self {
        self.map(|byte| byte.wrapping_sub(value))
    }

    unsafe fn levels(self, table: &[i8; 16]) -> Self {
        self.map(|byte| table[usize::from(byte & 0xF)] as u8)
    }

    // Not once for each type.
    #[inline(never)]
    unsafe fn halves(from: *const [u8; 2 * ROWS]) -> [f32; ROWS] {
        // SAFETY: see the trait.
        let from = unsafe { &*from }.as_chunks().0;
        std::array::from_fn(|row| f16::from_le_bytes(from[row]).to_acc())
    }
}

/// Plain loops.
pub struct Loops;

// SAFETY: plain arithmetic; the caller answers for the pointers.
unsafe impl Kernel for Loops {
    type Integers = [i32; 8];
    type Floats = [f32; 8];
    const LANES: usize = 8;
    const FLIPS: bool = false;

    unsafe fn splat(value: i32) -> [i32; 8] {
        [value; 8]
    }

    unsafe fn load(from: *const f32) -> [f32; 8] {
        // SAFETY: see the trait.
        unsafe { *from.cast() }
    }

    unsafe fn load_one(value: f32) -> [f32; 8] {
        [value; 8]
    }

    unsafe fn store(value: [f32; 8], to: *mut f32) {
        // SAFETY: see the trait.
        unsafe { *to.cast() = value }
    }

    unsafe fn dot<const SIGNED: bool>(
        mut sum: [i32; 8],
        rows: *const [[u8; STEP]; ROWS],
        x: *const [i8; STEP],
    ) -> [i32; 8] {
        for step in 0..STEP {
            // SAFETY: see the trait; a step is eight rows.
            let (rows, x) = unsafe { (*rows.add(step).cast::<[[u8; STEP]; 8]>(), *x.add(step)) };
            for (sum, row) in sum.iter_mut().zip(rows) {
                for (q, x) in row.into_iter().zip(x) {
                    *sum += i32::from(x) * if SIGNED { i32::from(q as i8) } else { i32::from(q) };
                }
            }
        }
        sum
    }

    unsafe fn convert(value: [i32; 8]) -> [f32; 8] {
        value.map(|value| value as f32)
    }

    unsafe fn times(a: [f32; 8], b: f32) -> [f32; 8] {
        a.map(|a| a * b)
    }

    unsafe fn multiply_add(a: [f32; 8], b: [f32; 8], sum: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|lane| a[lane] * b[lane] + sum[lane])
    }
}
