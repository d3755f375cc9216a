//! Launches of kernels: the layout of their threads, and their arguments, in words that every backend shares.

use super::{gpu::Address, signature::Kind};
use crate::{Error, Result, dtype::DType, shape::Layout};

/// Blocks, and threads of each block.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    /// Blocks along x, y and z.
    pub blocks: [u32; 3],
    /// Threads of a block along x, y and z.
    pub threads: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// Blocks that a grid has at most: enough to fill any card several times. Kernels walk on from there, so that sizes
/// are not limited and each thread has work to pay for its start.
const MOST_BLOCKS: usize = 1 << 14;

impl Grid {
    /// Creates a grid without dynamic shared memory.
    pub fn new(blocks: [u32; 3], threads: [u32; 3]) -> Self {
        Self { blocks, threads, shared: 0 }
    }

    /// For kernels whose threads take elements a grid apart: 256 threads a block, at most 16384 blocks.
    pub fn elements(n: usize) -> Self {
        Self::new([n.div_ceil(256).min(MOST_BLOCKS) as u32, 1, 1], [256, 1, 1])
    }

    /// For kernels whose threads take 128-bit packets of elements of this type a grid apart.
    pub(crate) fn packets(n: usize, dtype: DType) -> Self {
        Self::elements(n.div_ceil(16 / dtype.size()))
    }

    /// For kernels whose threads take packets a grid apart, several under way at once (see `for_batches` in
    /// `kernels/common.cuh`): enough threads for each to have a few, once a card is full.
    pub(crate) fn batches(n: usize, dtype: DType) -> Self {
        let packets = n.div_ceil(16 / dtype.size());
        Self::elements(if packets >= 1 << 20 { packets.div_ceil(4) } else { packets })
    }

    /// For kernels that give a row to the threads with one `threadIdx.y` (see `for_row` in `kernels/common.cuh`): eight
    /// rows a block, each for one warp, or one long row for the whole block.
    pub(crate) fn rows(rows: usize, columns: usize) -> Self {
        let threads = match columns {
            0..=1024 => 32,
            1025..=4096 => 256,
            _ => 512,
        };
        Self::rows_by(rows, threads)
    }

    /// [`Grid::rows`] with this many threads for a row, a multiple of 32.
    pub(crate) fn rows_by(rows: usize, threads: usize) -> Self {
        let at_once = if threads == 32 { 8 } else { 1 };
        let blocks = rows.div_ceil(at_once).min(MOST_BLOCKS);
        Self::new([blocks as u32, 1, 1], [threads as u32, at_once as u32, 1])
    }

    /// Returns the grid of kernels that hold rows in registers (see `kernels/rows.cuh`), with enough threads a row to
    /// hold it at 32 elements each (16 for f64), where a block allows it.
    pub(crate) fn held_rows(rows: usize, columns: usize, dtype: DType) -> Self {
        const MOST_THREADS: usize = 256;
        let held = if dtype == DType::F64 { 16 } else { 32 };
        Self::rows_by(rows, columns.div_ceil(held).min(MOST_THREADS).next_power_of_two().max(32))
    }

    /// For kernels whose blocks, of 256 threads, take tiles a grid apart.
    pub(crate) fn tiles(tiles: usize) -> Self {
        Self::new([tiles.min(MOST_BLOCKS) as u32, 1, 1], [32, 8, 1])
    }

    /// For kernels that walk down the columns of chunks of rows (see `kernels/columns.cuh`).
    pub(crate) fn columns(columns: usize, chunks: usize, dtype: DType) -> Self {
        let tiles = columns.div_ceil(32 * 16 / dtype.size());
        Self::new([tiles.min(MOST_BLOCKS) as u32, chunks.min(u32::MAX as usize) as u32, 1], [32, 8, 1])
    }

    /// Rows of a chunk for those, and the number of chunks: enough of both to fill any card, and so few
    /// chunks that sums over them are small beside the rows.
    pub(crate) fn chunks(rows: usize, columns: usize, dtype: DType) -> (usize, usize) {
        const FEWEST_ROWS: usize = 32;
        let tiles = columns.div_ceil(32 * 16 / dtype.size()).max(1);
        // Several times what runs at once, so that the last of them leave little of the card idle.
        let most = (8192 / tiles).max(1);
        let rows_per_chunk = rows.div_ceil(most).max(FEWEST_ROWS);
        (rows_per_chunk, rows.div_ceil(rows_per_chunk))
    }

    /// Sets the number of bytes of dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes.min(u32::MAX as usize) as u32, ..self }
    }

    /// Returns `true` if it has no blocks.
    pub fn is_empty(&self) -> bool {
        self.blocks.contains(&0)
    }
}

/// One argument of a kernel. The variants are what `build.rs` finds in the kernel's parameter list.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Arg {
    /// An address that the kernel writes to.
    Output(Address),
    /// An address that the kernel reads from.
    Input(Address),
    /// `int`
    I32(i32),
    /// `unsigned int`
    U32(u32),
    /// `long long`
    I64(i64),
    /// `unsigned long long`
    U64(u64),
    /// `float`
    F32(f32),
    /// `double`
    F64(f64),
    /// Sizes and strides of a tensor.
    Layout(KernelLayout),
}

impl Arg {
    /// Returns the address that the kernel reads or writes, if it is a pointer.
    pub fn address(&self) -> Option<Address> {
        match *self {
            Self::Output(address) | Self::Input(address) => Some(address),
            _ => None,
        }
    }

    /// Returns the kind of parameter that takes it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Output(_) => Kind::Output,
            Self::Input(_) => Kind::Input,
            Self::I32(_) | Self::U32(_) | Self::F32(_) => Kind::Scalar { bytes: 4 },
            Self::I64(_) | Self::U64(_) | Self::F64(_) => Kind::Scalar { bytes: 8 },
            Self::Layout(layout) => Kind::Scalar { bytes: size_of_val(layout) },
        }
    }
}

/// The struct `Layout` of `kernels/common.cuh`: the same fields in the same order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KernelLayout {
    rank: u32,
    dims: [u32; 6],
    unused: u32,
    strides: [i64; 6],
    offset: i64,
}

impl KernelLayout {
    /// Returns the sizes of the dimensions.
    pub fn dims(&self) -> &[u32] {
        &self.dims[..self.rank as usize]
    }

    /// Returns the strides of the dimensions, in elements.
    pub fn strides(&self) -> &[i64] {
        &self.strides[..self.rank as usize]
    }

    /// Returns the offset of the first element from the start of the storage.
    pub fn offset(&self) -> i64 {
        self.offset
    }
}

/// An argument of [`args!`].
pub(crate) trait IntoArg {
    fn into_arg(self) -> Result<Arg>;
}

macro_rules! scalar {
    ($($t:ty => $variant:ident),+) => {$(
        impl IntoArg for $t {
            fn into_arg(self) -> Result<Arg> {
                Ok(Arg::$variant(self))
            }
        }
    )+};
}

scalar!(i32 => I32, u32 => U32, i64 => I64, u64 => U64, f32 => F32, f64 => F64);

impl IntoArg for Arg {
    fn into_arg(self) -> Result<Arg> {
        Ok(self)
    }
}

/// The number of columns of a row, or another size that kernels count in 32 bits, with room for a step beyond the end.
///
/// Errors: 2³¹ or more.
pub(crate) fn size32(n: usize) -> Result<u32> {
    match u32::try_from(n) {
        Ok(size) if size < 1 << 31 => Ok(size),
        _ => Err(Error::shape("launch", format_args!("expected a size below 2^31, got {n}"))),
    }
}

impl IntoArg for &Layout {
    fn into_arg(self) -> Result<Arg> {
        let mut layout =
            KernelLayout { rank: self.shape.rank() as u32, dims: [1; 6], unused: 0, strides: [0; 6], offset: 0 };
        layout.offset = self.offset as i64;
        for (dim, &size) in self.shape.iter().enumerate() {
            layout.dims[dim] = u32::try_from(size).map_err(|_| {
                Error::shape("launch", format_args!("dimension {dim} of {:?} exceeds 2^32 - 1", self.shape))
            })?;
            layout.strides[dim] = self.strides[dim] as i64;
        }
        Ok(Arg::Layout(layout))
    }
}

/// The arguments of a kernel, in the order of its parameters: tensors (`&mut y` is written, `&x` is read), an `Option`
/// of one (none is a null pointer), `Storage(&x)` beside `x.layout()`, and numbers.
macro_rules! args {
    ($($arg:expr),* $(,)?) => {
        &[$($crate::device::launch::IntoArg::into_arg($arg)?),*]
    };
}
pub(crate) use args;

/// One operand of a [`Gemm`]: a matrix of which either the rows or the columns are packed.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Of the first element.
    pub address: Address,
    /// Elements from a row to the next, or from a column to the next if `transposed`.
    pub stride: usize,
    /// If `true`, its columns are packed and not its rows.
    pub transposed: bool,
    /// Elements from an item of the batch to the next.
    pub batch: usize,
}

/// `c[i] = a[i] · b[i] (+ c[i])` for every item of a batch; `c` `[batch, m, n]` is packed.
///
/// A backend gets the last two fields only if [`Gpu::fuses`](super::Gpu::fuses) has returned `true` for the product.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Type of the operands.
    pub dtype: DType,
    /// If `true`, `c` has the type of the sums, f32 for half types, and not that of the operands.
    pub sums: bool,
    /// Number of products.
    pub batch: usize,
    /// Rows of `a` and `c`.
    pub m: usize,
    /// Columns of `b` and `c`.
    pub n: usize,
    /// Columns of `a`, rows of `b`.
    pub k: usize,
    /// `[m, k]`
    pub a: Operand,
    /// `[k, n]`
    pub b: Operand,
    /// The first element of the result.
    pub c: Address,
    /// If `true`, `c` is added to instead of being overwritten.
    pub add: bool,
    /// `[n]` in the type of `c`: added to every row of the product before it is rounded.
    pub bias: Option<Address>,
    /// `[m]` in the type of `c`: gets the sum of each row of `a`. If `a` is the transposed gradient of a layer's output,
    /// this is the gradient of the bias.
    pub row_sums: Option<Address>,
}
