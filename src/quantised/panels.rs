//! Panels: sixteen packed rows as kernels read them.

use super::{QuantType, blocks::LEVELS, k_blocks::sixes};

/// Values of an input with a common scale, and of a part of a block.
pub(super) const GROUP: usize = 32;

/// Packed rows that are multiplied together.
pub(crate) const ROWS: usize = 16;

/// Values of a row that a lane of a register adds up at a time.
pub(super) const STEP: usize = 4;

/// Values of a row in a panel at most, which then stays in the L1 cache; whole blocks of every type.
pub(super) const DEPTH: usize = 1024;

/// Sixteen rows over at most [`DEPTH`] values.
pub(super) struct Panel<'a> {
    /// For each [`STEP`] values of depth, those of every row.
    pub integers: &'a mut [[[u8; STEP]; ROWS]],
    /// Of each group, or of both halves of each group.
    pub scales: &'a mut [[f32; ROWS]],
    /// Of each group, unless integers are signed.
    pub offsets: &'a mut [[f32; ROWS]],
}

/// Type of blocks that are multiplied as they are stored: groups of values `scale · q + offset`. Blocks of sixteen rows are
/// [interleaved](super::interleaved).
pub(super) trait Blocks {
    /// Bytes of a block.
    const BYTES: usize;
    /// Groups of a block.
    const GROUPS: usize;
    /// Scales of a group.
    const SCALES: usize;

    /// Returns the integers of a step of a group, of eight rows, signed ones by their bits.
    ///
    /// # Safety
    ///
    /// The pointer is that of the blocks of sixteen rows, or 32 bytes behind it for the last eight; the processor has the
    /// instructions of the vectors.
    unsafe fn integers<V: Bytes>(blocks: *const u8, group: usize, step: usize) -> V;

    /// Writes the scales and offsets of the blocks.
    ///
    /// # Safety
    ///
    /// The pointer is that of the blocks of sixteen rows; the processor has the instructions of the vectors.
    unsafe fn factors<V: Bytes>(blocks: *const u8, scales: &mut [[f32; ROWS]], offsets: &mut [[f32; ROWS]]);
}

/// The integers of a step, of eight rows, 32 bytes: what unpacking needs.
///
/// # Safety
///
/// The methods may be called only where the processor has the instructions, with pointers to the bytes that they read.
pub(super) unsafe trait Bytes: Copy {
    /// Loads 32 bytes.
    unsafe fn load(from: *const u8) -> Self;
    /// Stores them. The bits of `flip` are inverted.
    unsafe fn store(self, flip: u8, to: *mut u8);
    /// Shifts bytes to the right, and keeps the lowest bits in `mask`, which come from the same byte.
    unsafe fn bits(self, by: u32, mask: u8) -> Self;
    unsafe fn shifted_left(self, by: u32) -> Self;
    /// Spreads four bits of each number of 32 bits, those of a step: 16 where a bit is set.
    unsafe fn sixteens(self, step: usize) -> Self;
    unsafe fn or(self, other: Self) -> Self;
    unsafe fn minus(self, value: u8) -> Self;
    /// Looks up 4-bit integers.
    unsafe fn levels(self, table: &[i8; 16]) -> Self;
    /// Converts f16.
    unsafe fn halves(from: *const [u8; 2 * ROWS]) -> [f32; ROWS];
}

/// Loads the four bytes from `at` on of blocks of eight rows.
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(always)]
unsafe fn unit<V: Bytes>(blocks: *const u8, at: usize) -> V {
    // SAFETY: see above.
    unsafe { V::load(blocks.add(ROWS * at)) }
}

/// The 4-bit integers of a step of sixteen bytes: the low halves first, then the high ones.
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(always)]
unsafe fn nibbles<V: Bytes>(blocks: *const u8, at: usize, step: usize) -> V {
    // SAFETY: see above.
    unsafe { unit::<V>(blocks, at + STEP * (step % 4)).bits(4 * (step / 4) as u32, 0xF) }
}

/// The same, with the bits of the four bytes in front as their fifth bits.
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(always)]
unsafe fn nibbles_with_fifths<V: Bytes>(blocks: *const u8, at: usize, step: usize) -> V {
    // SAFETY: see above.
    unsafe { nibbles::<V>(blocks, at, step).or(unit::<V>(blocks, at - STEP).sixteens(step)) }
}

/// The f16 at byte `at` of the blocks of all rows.
///
/// # Safety
///
/// As for [`Blocks::factors`].
#[inline(always)]
unsafe fn halves<V: Bytes>(blocks: *const u8, at: usize) -> [f32; ROWS] {
    // SAFETY: see above.
    unsafe { V::halves(blocks.add(ROWS * at).cast()) }
}

/// Bytes of the block of a row, from a unit of four bytes on.
///
/// # Safety
///
/// As for [`Blocks::factors`].
#[inline(always)]
unsafe fn bytes<const N: usize>(blocks: *const u8, at: usize, row: usize) -> [u8; N] {
    // SAFETY: see above.
    std::array::from_fn(|i| unsafe { *blocks.add(ROWS * (at + i / STEP * STEP) + STEP * row + i % STEP) })
}

/// Term added to integers times their scale.
enum Offset {
    None,
    /// The scale times this factor.
    Times(f32),
    /// The number after the scale.
    Stored,
}

/// Defines the types with one scale for 32 values: integers of a block, and its offset.
macro_rules! blocks {
    ($($name:ident($blocks:ident, $step:ident): $integers:expr, $offset:expr;)*) => {$(
        struct $name;

        impl Blocks for $name {
            const BYTES: usize = QuantType::$name.block().1;
            const GROUPS: usize = 1;
            const SCALES: usize = 1;

            #[inline(always)]
            unsafe fn integers<V: Bytes>($blocks: *const u8, _group: usize, $step: usize) -> V {
                // SAFETY: see the trait.
                unsafe { $integers }
            }

            #[inline(always)]
            unsafe fn factors<V: Bytes>(
                blocks: *const u8,
                scales: &mut [[f32; ROWS]],
                offsets: &mut [[f32; ROWS]],
            ) {
                // SAFETY: see the trait.
                unsafe {
                    scales[0] = halves::<V>(blocks, 0);
                    match $offset {
                        Offset::None => {}
                        Offset::Times(factor) => offsets[0] = scales[0].map(|scale| factor * scale),
                        Offset::Stored => offsets[0] = halves::<V>(blocks, 2),
                    }
                }
            }
        }
    )*};
}

blocks! {
    Q8_0(blocks, step): unit(blocks, 2 + STEP * step), Offset::None;
    Q4_0(blocks, step): nibbles(blocks, 2, step), Offset::Times(-8.0);
    Q4_1(blocks, step): nibbles(blocks, 4, step), Offset::Stored;
    Q5_0(blocks, step): nibbles_with_fifths(blocks, 6, step), Offset::Times(-16.0);
    Q5_1(blocks, step): nibbles_with_fifths(blocks, 8, step), Offset::Stored;
    Iq4Nl(blocks, step): Bytes::levels(nibbles(blocks, 2, step), &LEVELS), Offset::None;
}

/// Defines the types whose scales and minima are 6-bit integers times those of the block.
macro_rules! k_blocks {
    ($($name:ident($blocks:ident, $group:ident, $step:ident): $integers:expr;)*) => {$(
        struct $name;

        impl Blocks for $name {
            const BYTES: usize = QuantType::$name.block().1;
            const GROUPS: usize = 8;
            const SCALES: usize = 1;

            #[inline(always)]
            unsafe fn integers<V: Bytes>($blocks: *const u8, $group: usize, $step: usize) -> V {
                // SAFETY: see the trait.
                unsafe { $integers }
            }

            #[inline(always)]
            unsafe fn factors<V: Bytes>(
                blocks: *const u8,
                scales: &mut [[f32; ROWS]],
                offsets: &mut [[f32; ROWS]],
            ) {
                // SAFETY: see the trait.
                let (of_blocks, least) = unsafe { (halves::<V>(blocks, 0), halves::<V>(blocks, 2)) };
                for row in 0..ROWS {
                    // SAFETY: as above.
                    let parts = sixes(&unsafe { bytes::<12>(blocks, 4, row) });
                    for ((scales, offsets), [scale, below]) in scales.iter_mut().zip(&mut *offsets).zip(parts) {
                        scales[row] = of_blocks[row] * f32::from(scale);
                        offsets[row] = -least[row] * f32::from(below);
                    }
                }
            }
        }
    )*};
}

/// The 4-bit integers of a step of a group: of two groups, the first in the lower halves of 32 bytes.
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(always)]
unsafe fn fours<V: Bytes>(blocks: *const u8, at: usize, group: usize, step: usize) -> V {
    // SAFETY: see above.
    unsafe { unit::<V>(blocks, at + GROUP * (group / 2) + STEP * step).bits(4 * (group % 2) as u32, 0xF) }
}

/// The 5-bit integers of a step of a group: the fifth bits of all groups, then the others like [`fours`].
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(always)]
unsafe fn fives<V: Bytes>(blocks: *const u8, at: usize, group: usize, step: usize) -> V {
    // SAFETY: see above.
    unsafe {
        let fifths = unit::<V>(blocks, at + STEP * step).bits(group as u32, 1).shifted_left(4);
        fours::<V>(blocks, at + GROUP, group, step).or(fifths)
    }
}

k_blocks! {
    Q4K(blocks, group, step): fours(blocks, 16, group, step);
    Q5K(blocks, group, step): fives(blocks, 16, group, step);
}

struct Q6K;

impl Blocks for Q6K {
    const BYTES: usize = QuantType::Q6K.block().1;
    const GROUPS: usize = 8;
    const SCALES: usize = 2;

    #[inline(always)]
    unsafe fn integers<V: Bytes>(blocks: *const u8, group: usize, step: usize) -> V {
        // 64 bytes of low halves and 32 bytes of the upper two bits hold four groups.
        let (half, part) = (group / 4, group % 4);
        let (low, high) = (64 * half + 32 * (part % 2) + STEP * step, 128 + 32 * half + STEP * step);
        // SAFETY: see the trait.
        unsafe {
            let upper = unit::<V>(blocks, high).bits(2 * part as u32, 3).shifted_left(4);
            unit::<V>(blocks, low).bits(4 * (part / 2) as u32, 0xF).or(upper).minus(32)
        }
    }

    #[inline(always)]
    unsafe fn factors<V: Bytes>(blocks: *const u8, scales: &mut [[f32; ROWS]], _offsets: &mut [[f32; ROWS]]) {
        // SAFETY: see the trait.
        let of_blocks = unsafe { halves::<V>(blocks, 208) };
        for row in 0..ROWS {
            // SAFETY: as above.
            let parts = unsafe { bytes::<16>(blocks, 192, row) };
            for (scales, part) in scales.iter_mut().zip(parts) {
                scales[row] = of_blocks[row] * f32::from(part as i8);
            }
        }
    }
}

/// Returns the number of scales of a group of signed integers; `None` for types of unsigned ones.
pub(super) fn signed_parts(kind: QuantType) -> Option<usize> {
    match kind {
        QuantType::Q8_0 | QuantType::Iq4Nl => Some(1),
        QuantType::Q6K => Some(2),
        _ => None,
    }
}

/// Fills a panel from interleaved blocks of sixteen rows. The bits of `flip` are inverted in every integer.
///
/// # Safety
///
/// The processor has the instructions of the vectors.
#[inline(always)]
pub(super) unsafe fn fill<V: Bytes>(kind: QuantType, blocks: &[u8], flip: u8, panel: &mut Panel) {
    // SAFETY: see above.
    unsafe {
        match kind {
            QuantType::Q8_0 => fill_with::<V, Q8_0>(blocks, flip, panel),
            QuantType::Q4_0 => fill_with::<V, Q4_0>(blocks, flip, panel),
            QuantType::Q4_1 => fill_with::<V, Q4_1>(blocks, flip, panel),
            QuantType::Q5_0 => fill_with::<V, Q5_0>(blocks, flip, panel),
            QuantType::Q5_1 => fill_with::<V, Q5_1>(blocks, flip, panel),
            QuantType::Q4K => fill_with::<V, Q4K>(blocks, flip, panel),
            QuantType::Q5K => fill_with::<V, Q5K>(blocks, flip, panel),
            QuantType::Q6K => fill_with::<V, Q6K>(blocks, flip, panel),
            QuantType::Iq4Nl => fill_with::<V, Iq4Nl>(blocks, flip, panel),
            // Callers have refused these.
            QuantType::Q2K | QuantType::Q3K | QuantType::Iq4Xs => panel.scales.as_flattened_mut().fill(f32::NAN),
        }
    }
}

/// # Safety
///
/// As for [`fill`].
#[inline(always)]
unsafe fn fill_with<V: Bytes, B: Blocks>(blocks: &[u8], flip: u8, panel: &mut Panel) {
    let blocks = blocks.chunks_exact(ROWS * B::BYTES);
    let integers = panel.integers.chunks_exact_mut(B::GROUPS * GROUP / STEP);
    let factors = panel.scales.chunks_exact_mut(B::GROUPS * B::SCALES).zip(panel.offsets.chunks_exact_mut(B::GROUPS));
    assert!(blocks.len() <= integers.len().min(factors.len()), "a panel ends before its blocks");
    for ((blocks, integers), (scales, offsets)) in blocks.zip(integers).zip(factors) {
        let blocks = blocks.as_ptr();
        // SAFETY: the blocks are whole, those of sixteen rows; the panel has room for a step of each.
        unsafe {
            B::factors::<V>(blocks, scales, offsets);
            for (at, rows) in integers.iter_mut().enumerate() {
                let (group, step) = (at / (GROUP / STEP), at % (GROUP / STEP));
                let to = rows.as_mut_ptr().cast::<u8>();
                B::integers::<V>(blocks, group, step).store(flip, to);
                B::integers::<V>(blocks.add(size_of::<V>()), group, step).store(flip, to.add(size_of::<V>()));
            }
        }
    }
}
