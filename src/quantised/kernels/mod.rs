//! Kernels: a panel times inputs, by the instructions that the processor has for products of bytes.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;

use super::{
    QuantType,
    panels::{self, Bytes, GROUP, Panel, ROWS, STEP},
    products::Activations,
};

/// Instructions that multiply bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Instructions {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

impl Instructions {
    /// Returns those of this processor at the level in use, the fastest first.
    pub fn usable() -> Vec<Self> {
        let mut usable = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            use crate::device::{Level, simd};
            if simd::level() >= Level::Avx512 && is_x86_feature_detected!("avx512vnni") {
                usable.push(Self::Avx512Vnni);
            }
            if simd::level() >= Level::Avx2 {
                if is_x86_feature_detected!("avxvnni") {
                    usable.push(Self::AvxVnni);
                }
                usable.push(Self::Avx2);
            }
        }
        usable.push(Self::Portable);
        usable
    }

    pub fn best() -> Self {
        static BEST: OnceLock<Instructions> = OnceLock::new();
        *BEST.get_or_init(|| Self::usable()[0])
    }

    /// Fills a panel from interleaved blocks as [`Instructions::add`] reads it.
    pub fn fill(self, kind: QuantType, blocks: &[u8], panel: &mut Panel) {
        match self {
            // SAFETY: every processor has these instructions.
            Self::Portable => unsafe { panels::fill::<[u8; GROUP]>(kind, blocks, 0, panel) },
            // SAFETY: `usable` names only instructions that the processor has.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { x86::fill(kind, blocks, 0, panel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni | Self::Avx512Vnni => {
                let flip = if panels::signed_parts(kind).is_some() { 0x80 } else { 0 };
                unsafe { x86::fill(kind, blocks, flip, panel) }
            }
        }
    }

    /// Adds the products of a panel and all inputs from this group on: `sums[input][row]`.
    pub fn add(self, panel: &Panel, part: Part, x: &Activations, sums: &mut [[f32; ROWS]]) {
        part.check(panel, x, sums);
        match self {
            // SAFETY: the sizes have been checked; every processor has these instructions.
            Self::Portable => unsafe { add::<portable::Loops, 1>(panel, part, x, sums) },
            // SAFETY: the sizes have been checked; `usable` names only instructions that the processor has.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { x86::avx2(panel, part, x, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => unsafe { x86::avx_vnni(panel, part, x, sums) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => unsafe { x86::avx512_vnni(panel, part, x, sums) },
        }
    }
}

/// The part of the inputs that a panel is multiplied by.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub first: usize,
    pub groups: usize,
    /// Scales of a group of signed integers; `None` for unsigned ones.
    pub signed: Option<usize>,
}

impl Part {
    /// Panics unless a panel, inputs and sums reach as far as the part.
    fn check(self, panel: &Panel, x: &Activations, sums: &[[f32; ROWS]]) {
        let Self { first, groups, signed } = self;
        let of_inputs = x.factors.len() / sums.len().max(1);
        assert!(
            first + groups <= of_inputs
                && x.integers.len() >= sums.len() * of_inputs * GROUP
                && panel.integers.len() >= groups * GROUP / STEP
                && panel.scales.len() >= groups * signed.unwrap_or(1)
                && (signed.is_some() || panel.offsets.len() >= groups),
            "a panel or its inputs end before the product"
        );
    }
}

/// Registers of integers and floats, a lane for each row.
///
/// # Safety
///
/// The methods may be called only where the processor has the instructions, with pointers to what they name.
unsafe trait Kernel {
    type Integers: Copy;
    type Floats: Copy;
    const LANES: usize;
    /// If `true`, both signs are stored 128 higher.
    const FLIPS: bool;
    unsafe fn splat(value: i32) -> Self::Integers;
    unsafe fn load(from: *const f32) -> Self::Floats;
    unsafe fn load_one(value: f32) -> Self::Floats;
    unsafe fn store(value: Self::Floats, to: *mut f32);
    /// Adds the products of [`STEP`] steps, of all rows, with as many values of an input.
    unsafe fn dot<const SIGNED: bool>(
        sum: Self::Integers,
        rows: *const [[u8; STEP]; ROWS],
        x: *const [i8; STEP],
    ) -> Self::Integers;
    unsafe fn convert(value: Self::Integers) -> Self::Floats;
    unsafe fn times(a: Self::Floats, b: f32) -> Self::Floats;
    unsafe fn multiply_add(a: Self::Floats, b: Self::Floats, sum: Self::Floats) -> Self::Floats;
}

/// # Safety
///
/// As for [`Kernel`]; `part` has been checked.
#[inline(always)]
unsafe fn add<K: Kernel, const INPUTS: usize>(panel: &Panel, part: Part, x: &Activations, sums: &mut [[f32; ROWS]]) {
    let mut first = 0;
    // SAFETY: see above.
    unsafe {
        while first < sums.len() {
            let few = sums.len() - first < INPUTS;
            match (part.signed, few) {
                (Some(parts), true) => tile::<K, true, 1>(panel, part, parts, x, first, sums),
                (Some(parts), false) => tile::<K, true, INPUTS>(panel, part, parts, x, first, sums),
                (None, true) => tile::<K, false, 1>(panel, part, 1, x, first, sums),
                (None, false) => tile::<K, false, INPUTS>(panel, part, 1, x, first, sums),
            }
            first += if few { 1 } else { INPUTS };
        }
    }
}

/// Adds the products of a panel and of `INPUTS` inputs.
///
/// # Safety
///
/// As for [`add`].
#[inline(always)]
unsafe fn tile<K: Kernel, const SIGNED: bool, const INPUTS: usize>(
    panel: &Panel,
    part: Part,
    parts: usize,
    x: &Activations,
    input: usize,
    sums: &mut [[f32; ROWS]],
) {
    /// Values of four steps.
    const VALUES: usize = STEP * STEP;
    let of_inputs = x.factors.len() / sums.len();
    // SAFETY: the part lies inside of panel, inputs and sums.
    unsafe {
        let at = input * of_inputs + part.first;
        let (integers, factors) = (x.integers.as_ptr().add(at * GROUP), x.factors.as_ptr().add(at));
        for lane in (0..ROWS).step_by(K::LANES) {
            let mut results: [K::Floats; INPUTS] =
                std::array::from_fn(|i| K::load(sums.as_ptr().add(input + i).cast::<f32>().add(lane)));
            for group in 0..part.groups {
                for half in 0..parts {
                    let mut dots = [K::splat(0); INPUTS];
                    if SIGNED && K::FLIPS {
                        for (i, dot) in dots.iter_mut().enumerate() {
                            *dot = K::splat((*factors.add(i * of_inputs + group)).excess[half]);
                        }
                    }
                    let depth = group * GROUP + half * VALUES;
                    for depth in (depth..depth + GROUP / parts).step_by(VALUES) {
                        let rows = panel.integers.as_ptr().add(depth / STEP).cast::<[u8; STEP]>().add(lane).cast();
                        for (i, dot) in dots.iter_mut().enumerate() {
                            let x = integers.add(i * of_inputs * GROUP + depth);
                            *dot = K::dot::<SIGNED>(*dot, rows, x.cast());
                        }
                    }
                    let of_rows = K::load(panel.scales.as_ptr().add(group * parts + half).cast::<f32>().add(lane));
                    for (i, (result, dot)) in results.iter_mut().zip(dots).enumerate() {
                        let scale = K::times(of_rows, (*factors.add(i * of_inputs + group)).scale);
                        *result = K::multiply_add(K::convert(dot), scale, *result);
                    }
                }
                if !SIGNED {
                    let offsets = K::load(panel.offsets.as_ptr().add(group).cast::<f32>().add(lane));
                    for (i, result) in results.iter_mut().enumerate() {
                        let sum = K::load_one((*factors.add(i * of_inputs + group)).sum);
                        *result = K::multiply_add(offsets, sum, *result);
                    }
                }
            }
            for (i, result) in results.into_iter().enumerate() {
                K::store(result, sums.as_mut_ptr().add(input + i).cast::<f32>().add(lane));
            }
        }
    }
}
