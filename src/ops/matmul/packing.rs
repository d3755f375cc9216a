//! How operands lie in memory while they are multiplied, and by which instructions.

use bytemuck::Pod;
use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::{
    amx::{Split, Tiles},
    pairs::Pairs,
};
use super::{
    cpu::{Matrix, as_sums},
    few::Lane,
    microkernel::{Left, Order, Right, Start, Tile, Window, multiply, tile},
    pack::pack,
};
use crate::{
    DType,
    device::{Level, simd},
    dtype::Float,
};

/// Elements of an operand that lie so close together that packing them first gains nothing.
const CLOSE: usize = 1 << 15;

/// Columns up to which rows of A that lie close together are read in place.
const NARROW: usize = 128;

/// Rows up to which columns of B that lie close together are read in place.
const LOW: usize = 128;

/// A type that matrices are multiplied in, and the ways to do it besides [`MultiplyAdd`], the fastest first.
pub(crate) trait Multiply: Float {
    /// On tiles of registers.
    type Tiled: Packing<Self>;
    /// Two numbers at a time.
    type Paired: Packing<Self>;

    /// Whether the processor has more than multiply-adds for this type.
    fn fast() -> bool {
        Self::Tiled::available() || Self::Paired::available()
    }
}

/// A way that no processor has.
pub(crate) struct Never;

macro_rules! multiply {
    ($($float:ty: $tiled:ty, $paired:ty;)*) => {$(
        #[cfg(target_arch = "x86_64")]
        impl Multiply for $float {
            type Tiled = $tiled;
            type Paired = $paired;
        }
        #[cfg(not(target_arch = "x86_64"))]
        impl Multiply for $float {
            type Tiled = Never;
            type Paired = Never;
        }
    )*};
}

multiply! {
    f64: Never, Never;
    f32: Split, Never;
    f16: Never, Never;
    bf16: Tiles, Pairs;
}

/// A way to multiply matrices of `T` with sums in [`Float::Acc`].
pub(crate) trait Packing<T: Float>: Send + Sync {
    /// An element of a packed operand.
    type Packed: Pod + Send + Sync;

    /// Blocks of steps are packed in multiples of this, filled up with zeros.
    const STEPS: usize;

    /// Whether products of a few rows may be left to [`skinny`](super::skinny), which has the same order of additions.
    const STREAMS: bool = false;

    /// How [`few`](super::few) multiplies a few rows in the same order, where the processor can.
    fn lane() -> Option<Lane> {
        None
    }

    /// Whether the processor has the instructions.
    fn available() -> bool;

    /// Rows and columns of the panels.
    fn tile() -> Tile;

    /// A block of A as it lies in memory, if reading it there is as fast as packing it for so many columns.
    fn left_in_place(a: Matrix<'_, T>, steps: usize, columns: usize) -> Option<Left<'_, Self::Packed>>;

    /// A block of B as it lies in memory, if reading it there is as fast as packing it for so many rows.
    fn right_in_place(b: Matrix<'_, T>, steps: usize, rows: usize, columns: usize) -> Option<Right<'_, Self::Packed>>;

    /// Packs rows of A in whole panels. Gives whether their values are in the range of the instructions; if not, only
    /// [`MultiplyAdd`] gets them right.
    #[must_use]
    fn pack_left(a: Matrix<T>, rows: usize, steps: usize, to: &mut [Self::Packed]) -> bool;

    /// Packs columns of B in whole panels, as [`Packing::pack_left`].
    #[must_use]
    fn pack_right(b: Matrix<T>, columns: usize, steps: usize, to: &mut [Self::Packed]) -> bool;

    /// What [`Packing::pack_left`] has packed.
    fn packed_left(packed: &[Self::Packed], steps: usize) -> Left<'_, Self::Packed>;

    /// What [`Packing::pack_right`] has packed.
    fn packed_right(packed: &[Self::Packed], steps: usize) -> Right<'_, Self::Packed> {
        let Tile { columns, .. } = Self::tile();
        Right { data: packed, panel: columns * steps.next_multiple_of(Self::STEPS), step: columns }
    }

    /// `C = start + A·B` for one block of steps, at least one.
    fn multiply(steps: usize, a: Left<Self::Packed>, b: Right<Self::Packed>, start: Start<T::Acc>, c: Window<T::Acc>);
}

/// Operands in the type of the sums, one multiply-add per element.
pub(crate) struct MultiplyAdd;

impl<T: Float> Packing<T> for MultiplyAdd {
    type Packed = T::Acc;
    const STEPS: usize = 1;
    const STREAMS: bool = true;

    fn lane() -> Option<Lane> {
        let lane = match T::DTYPE {
            DType::F32 => Lane::F32,
            DType::BF16 => Lane::Bf16,
            DType::F16 => Lane::F16,
            _ => return None,
        };
        (simd::level() >= Level::Avx512).then_some(lane)
    }

    fn available() -> bool {
        true
    }

    fn tile() -> Tile {
        tile::<T::Acc>()
    }

    fn left_in_place(a: Matrix<'_, T>, steps: usize, columns: usize) -> Option<Left<'_, T::Acc>> {
        // Steps next to each other are read along cache lines; others only if few lines serve all rows and columns.
        let near = a.col == 1 || (a.row == 1 && steps * a.col <= CLOSE && columns <= NARROW);
        let data = as_sums(a.data).filter(|_| near)?;
        let (order, stride) = if a.row == 1 { (Order::Rows, a.col) } else { (Order::Steps, a.row) };
        Some(Left { data, panel: tile::<T::Acc>().rows * a.row, order, stride })
    }

    fn right_in_place(b: Matrix<'_, T>, steps: usize, rows: usize, columns: usize) -> Option<Right<'_, T::Acc>> {
        let wide = tile::<T::Acc>().columns;
        let near = b.col == 1 && steps * b.row <= CLOSE && rows <= LOW && columns.is_multiple_of(wide);
        as_sums(b.data).filter(|_| near).map(|data| Right { data, panel: wide, step: b.row })
    }

    fn pack_left(a: Matrix<T>, rows: usize, steps: usize, to: &mut [T::Acc]) -> bool {
        pack(a, rows, steps, tile::<T::Acc>().rows, to);
        true
    }

    fn pack_right(b: Matrix<T>, columns: usize, steps: usize, to: &mut [T::Acc]) -> bool {
        pack(b.transposed(), columns, steps, tile::<T::Acc>().columns, to);
        true
    }

    fn packed_left(packed: &[T::Acc], steps: usize) -> Left<'_, T::Acc> {
        let rows = tile::<T::Acc>().rows;
        Left { data: packed, panel: rows * steps, order: Order::Rows, stride: rows }
    }

    fn multiply(steps: usize, a: Left<T::Acc>, b: Right<T::Acc>, start: Start<T::Acc>, c: Window<T::Acc>) {
        multiply(steps, a, b, start, c);
    }
}

impl<T: Float> Packing<T> for Never {
    type Packed = u8;
    const STEPS: usize = 1;

    fn available() -> bool {
        false
    }

    fn tile() -> Tile {
        Tile { rows: 1, columns: 1 }
    }

    fn left_in_place(_: Matrix<'_, T>, _: usize, _: usize) -> Option<Left<'_, u8>> {
        None
    }

    fn right_in_place(_: Matrix<'_, T>, _: usize, _: usize, _: usize) -> Option<Right<'_, u8>> {
        None
    }

    fn pack_left(_: Matrix<T>, _: usize, _: usize, _: &mut [u8]) -> bool {
        false
    }

    fn pack_right(_: Matrix<T>, _: usize, _: usize, _: &mut [u8]) -> bool {
        false
    }

    fn packed_left(packed: &[u8], _: usize) -> Left<'_, u8> {
        Left { data: packed, panel: 1, order: Order::Rows, stride: 1 }
    }

    fn multiply(_: usize, _: Left<u8>, _: Right<u8>, _: Start<T::Acc>, _: Window<T::Acc>) {}
}
