//! Panels: sixteen packed rows as kernels read them.

use std::ops::Range;

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

/// Type of blocks that are multiplied as they are stored: groups of values `scale · q + offset`.
pub(super) trait Blocks {
    /// Bytes of a block.
    const BYTES: usize;
    /// Groups of a block.
    const GROUPS: usize;
    /// Scales of a group.
    const SCALES: usize;

    /// Returns the integers of a group, signed ones by their bits.
    ///
    /// # Safety
    ///
    /// The pointer is that of a block; the processor has the instructions of the vectors.
    unsafe fn integers<V: Bytes>(block: *const u8, group: usize) -> V;

    /// Writes the scales and offsets of one block of each row.
    ///
    /// # Safety
    ///
    /// As for [`Blocks::integers`].
    unsafe fn factors<V: Bytes>(blocks: [*const u8; ROWS], scales: &mut [[f32; ROWS]], offsets: &mut [[f32; ROWS]]);
}

/// The integers of a group, 32 bytes: what unpacking needs.
///
/// # Safety
///
/// The methods may be called only where the processor has the instructions, with pointers to the bytes that they read.
pub(super) unsafe trait Bytes: Copy {
    /// If `true`, a value is a register, and rows are unpacked without calls.
    const IN_REGISTERS: bool;
    /// Fetches a cache line, of any address.
    unsafe fn prefetch(at: *const u8);
    /// Loads 32 bytes.
    unsafe fn load(from: *const u8) -> Self;
    /// Loads 16 bytes, for both halves.
    unsafe fn load_twice(from: *const u8) -> Self;
    /// Spreads 32 bits: 16 where a bit is set.
    unsafe fn sixteens(from: *const u8) -> Self;
    /// Shifts each half of the bytes to the right, and keeps the lowest bits in `mask`.
    unsafe fn bits(self, low: u32, high: u32, mask: u8) -> Self;
    unsafe fn shifted_left(self, by: u32) -> Self;
    unsafe fn or(self, other: Self) -> Self;
    unsafe fn minus(self, value: u8) -> Self;
    /// Looks up 4-bit integers.
    unsafe fn levels(self, table: &[i8; 16]) -> Self;
    /// Converts f16.
    unsafe fn halves(bits: [u16; ROWS]) -> [f32; ROWS];
    /// Writes eight rows into a panel, from `to` on, where steps are `4 · ROWS` bytes apart. The bits of `flip` are
    /// inverted.
    unsafe fn interleave(rows: [Self; 8], flip: u8, to: *mut u8);
}

/// The 4-bit integers of sixteen bytes: the low halves first, then the high ones.
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(always)]
unsafe fn nibbles<V: Bytes>(from: *const u8) -> V {
    // SAFETY: see above.
    unsafe { V::load_twice(from).bits(0, 4, 0xF) }
}

/// The same with a fifth bit.
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(always)]
unsafe fn nibbles_with<V: Bytes>(from: *const u8, fifth: V) -> V {
    // SAFETY: see above.
    unsafe { nibbles::<V>(from).or(fifth) }
}

/// The f16 at the same place of sixteen blocks.
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(always)]
unsafe fn halves<V: Bytes>(blocks: [*const u8; ROWS], at: usize) -> [f32; ROWS] {
    // SAFETY: see above.
    unsafe { V::halves(blocks.map(|block| u16::from_le_bytes(*block.add(at).cast()))) }
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
    ($($name:ident($block:ident): $integers:expr, $offset:expr;)*) => {$(
        struct $name;

        impl Blocks for $name {
            const BYTES: usize = QuantType::$name.block().1;
            const GROUPS: usize = 1;
            const SCALES: usize = 1;

            #[inline(always)]
            unsafe fn integers<V: Bytes>($block: *const u8, _group: usize) -> V {
                // SAFETY: see the trait.
                unsafe { $integers }
            }

            #[inline(always)]
            unsafe fn factors<V: Bytes>(
                blocks: [*const u8; ROWS],
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
    Q8_0(block): Bytes::load(block.add(2)), Offset::None;
    Q4_0(block): nibbles(block.add(2)), Offset::Times(-8.0);
    Q4_1(block): nibbles(block.add(4)), Offset::Stored;
    Q5_0(block): nibbles_with(block.add(6), Bytes::sixteens(block.add(2))), Offset::Times(-16.0);
    Q5_1(block): nibbles_with(block.add(8), Bytes::sixteens(block.add(4))), Offset::Stored;
    Iq4Nl(block): Bytes::levels(nibbles(block.add(2)), &LEVELS), Offset::None;
}

/// Defines the types whose scales and minima are 6-bit integers times those of the block.
macro_rules! k_blocks {
    ($($name:ident($block:ident, $group:ident): $integers:expr;)*) => {$(
        struct $name;

        impl Blocks for $name {
            const BYTES: usize = QuantType::$name.block().1;
            const GROUPS: usize = 8;
            const SCALES: usize = 1;

            #[inline(always)]
            unsafe fn integers<V: Bytes>($block: *const u8, $group: usize) -> V {
                // SAFETY: see the trait.
                unsafe { $integers }
            }

            #[inline(always)]
            unsafe fn factors<V: Bytes>(
                blocks: [*const u8; ROWS],
                scales: &mut [[f32; ROWS]],
                offsets: &mut [[f32; ROWS]],
            ) {
                // SAFETY: see the trait.
                let (of_blocks, least) = unsafe { (halves::<V>(blocks, 0), halves::<V>(blocks, 2)) };
                for (row, block) in blocks.into_iter().enumerate() {
                    // SAFETY: as above.
                    let parts = sixes(unsafe { &*block.add(4).cast::<[u8; 12]>() });
                    for ((scales, offsets), [scale, below]) in scales.iter_mut().zip(&mut *offsets).zip(parts) {
                        scales[row] = of_blocks[row] * f32::from(scale);
                        offsets[row] = -least[row] * f32::from(below);
                    }
                }
            }
        }
    )*};
}

/// The 4-bit integers of a group: of two groups, the first in the lower halves of 32 bytes.
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(always)]
unsafe fn fours<V: Bytes>(from: *const u8, group: usize) -> V {
    let shift = 4 * (group % 2) as u32;
    // SAFETY: see above.
    unsafe { V::load(from.add(32 * (group / 2))).bits(shift, shift, 0xF) }
}

/// The 5-bit integers of a group: the fifth bits of all groups, then the others like [`fours`].
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(always)]
unsafe fn fives<V: Bytes>(from: *const u8, group: usize) -> V {
    let shift = group as u32;
    // SAFETY: see above.
    unsafe { fours::<V>(from.add(32), group).or(V::load(from).bits(shift, shift, 1).shifted_left(4)) }
}

k_blocks! {
    Q4K(block, group): fours(block.add(16), group);
    Q5K(block, group): fives(block.add(16), group);
}

struct Q6K;

impl Blocks for Q6K {
    const BYTES: usize = QuantType::Q6K.block().1;
    const GROUPS: usize = 8;
    const SCALES: usize = 2;

    #[inline(always)]
    unsafe fn integers<V: Bytes>(block: *const u8, group: usize) -> V {
        // 64 bytes of low halves and 32 bytes of the upper two bits hold four groups.
        let (half, part) = (group / 4, group % 4);
        let (low, high) = (4 * (part / 2) as u32, 2 * part as u32);
        // SAFETY: see the trait.
        unsafe {
            let upper = V::load(block.add(128 + 32 * half)).bits(high, high, 3).shifted_left(4);
            V::load(block.add(64 * half + 32 * (part % 2))).bits(low, low, 0xF).or(upper).minus(32)
        }
    }

    #[inline(always)]
    unsafe fn factors<V: Bytes>(blocks: [*const u8; ROWS], scales: &mut [[f32; ROWS]], _offsets: &mut [[f32; ROWS]]) {
        // SAFETY: see the trait.
        let of_blocks = unsafe { halves::<V>(blocks, 208) };
        for (row, block) in blocks.into_iter().enumerate() {
            // SAFETY: as above.
            let parts = unsafe { *block.add(192).cast::<[i8; 16]>() };
            for (scales, scale) in scales.iter_mut().zip(parts) {
                scales[row] = of_blocks[row] * f32::from(scale);
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

/// Packed rows from the first of a panel to the last of the matrix, and the bytes of each that the panel holds.
pub(super) struct Rows<'a> {
    pub kind: QuantType,
    pub bytes: &'a [u8],
    pub row_bytes: usize,
    pub part: Range<usize>,
    /// Distance of a block to the one in its place in the panel that is filled next.
    pub ahead: usize,
}

impl Rows<'_> {
    /// Returns the first block of each row. Once, and not for each type.
    #[inline(never)]
    fn starts(&self) -> [*const u8; ROWS] {
        let last = (self.bytes.len() / self.row_bytes).min(ROWS) - 1;
        std::array::from_fn(|row| self.bytes[row.min(last) * self.row_bytes + self.part.start..].as_ptr())
    }
}

/// Fills a panel. The bits of `flip` are inverted in every integer. Rows that the matrix does not have are copies of its
/// last.
///
/// # Safety
///
/// The processor has the instructions of the vectors.
#[inline(always)]
pub(super) unsafe fn fill<V: Bytes>(rows: &Rows, flip: u8, panel: &mut Panel) {
    // SAFETY: see above.
    unsafe {
        match rows.kind {
            QuantType::Q8_0 => fill_with::<V, Q8_0>(rows, flip, panel),
            QuantType::Q4_0 => fill_with::<V, Q4_0>(rows, flip, panel),
            QuantType::Q4_1 => fill_with::<V, Q4_1>(rows, flip, panel),
            QuantType::Q5_0 => fill_with::<V, Q5_0>(rows, flip, panel),
            QuantType::Q5_1 => fill_with::<V, Q5_1>(rows, flip, panel),
            QuantType::Q4K => fill_with::<V, Q4K>(rows, flip, panel),
            QuantType::Q5K => fill_with::<V, Q5K>(rows, flip, panel),
            QuantType::Q6K => fill_with::<V, Q6K>(rows, flip, panel),
            QuantType::Iq4Nl => fill_with::<V, Iq4Nl>(rows, flip, panel),
            // Callers have refused these.
            QuantType::Q2K | QuantType::Q3K | QuantType::Iq4Xs => panel.scales.as_flattened_mut().fill(f32::NAN),
        }
    }
}

/// Returns the integers of a group by a call, once for each type.
///
/// # Safety
///
/// As for [`Blocks::integers`].
#[inline(never)]
unsafe fn integers_in_memory<V: Bytes, B: Blocks>(block: *const u8, group: usize) -> V {
    // SAFETY: see above.
    unsafe { B::integers(block, group) }
}

/// # Safety
///
/// As for [`fill`].
#[inline(always)]
unsafe fn fill_with<V: Bytes, B: Blocks>(rows: &Rows, flip: u8, panel: &mut Panel) {
    let (count, groups) = (rows.part.len() / B::BYTES, rows.part.len() / B::BYTES * B::GROUPS);
    assert!(rows.part.end <= rows.row_bytes && groups * GROUP / STEP <= panel.integers.len());
    let mut blocks = rows.starts();
    let mut to = panel.integers.as_mut_ptr().cast::<u8>();
    let of_panel = panel.scales.chunks_exact_mut(B::GROUPS * B::SCALES).zip(panel.offsets.chunks_exact_mut(B::GROUPS));
    for (scales, offsets) in of_panel.take(count) {
        // SAFETY: each row has as many blocks, and the panel as many groups.
        unsafe {
            B::factors::<V>(blocks, scales, offsets);
            for group in 0..B::GROUPS {
                // Processors do not see sixteen interleaved streams coming.
                let line = 64 * group;
                if line < B::BYTES {
                    for block in blocks {
                        V::prefetch(block.wrapping_add(rows.ahead + line));
                    }
                }
                for first in [0, 8] {
                    // Without a closure, which would not have the instructions of this function.
                    let [a, b, c, d, e, f, g, h] = [0, 1, 2, 3, 4, 5, 6, 7].map(|row| blocks[first + row]);
                    let rows = if V::IN_REGISTERS {
                        [
                            B::integers::<V>(a, group),
                            B::integers::<V>(b, group),
                            B::integers::<V>(c, group),
                            B::integers::<V>(d, group),
                            B::integers::<V>(e, group),
                            B::integers::<V>(f, group),
                            B::integers::<V>(g, group),
                            B::integers::<V>(h, group),
                        ]
                    } else {
                        [a, b, c, d, e, f, g, h].map(|block| integers_in_memory::<V, B>(block, group))
                    };
                    V::interleave(rows, flip, to.add(STEP * first));
                }
                to = to.add(GROUP * ROWS);
            }
            blocks = blocks.map(|block| block.wrapping_add(B::BYTES));
        }
    }
}
