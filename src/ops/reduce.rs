//! Sums and means over dimensions.

use std::hint::black_box;

use half::f16;

use crate::{
    DType, Device, Element, Error, Result, Tensor,
    autograd::{Backward, InputGrads, LateSum, computed, discrete, record},
    collect::CollectVec,
    device::{
        Gpu, Grid, args, cpu, f16_rows,
        floats::{Floats, FloatsMut},
        rows::{In, Out, Sums, for_rows_of},
        simd::vectorized,
        size32,
    },
    dtype::{Float, Real, dispatch_float, dispatch_real},
    error::ensure,
    ops::many::{Group, by_device},
    shape::Shape,
};

impl Tensor {
    /// Sums over the given dimensions and removes them; over all of them if none is given. Negative ones count from the
    /// end; a scalar is treated as a vector of one element.
    ///
    /// Shapes: `[.., i, ..] → [.., ..]`. Accumulates in f32 (f64 for f64). i64 wraps around; the sum of bool is the
    /// number of true elements, as i64. Saves nothing. Errors: a dimension out of range or named twice.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert_eq!(x.sum(&[])?.item()?, 21.0);
    /// assert_eq!(x.sum(&[-1])?.to_vec::<f32>()?, [6.0, 15.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn sum(&self, dims: &[isize]) -> Result<Tensor> {
        match self.dtype() {
            DType::Bool => self.to_dtype(DType::I64)?.sum(dims),
            _ => self.reduce("sum", dims, |_| 1.0),
        }
    }

    /// Computes the mean over the given dimensions and removes them; over all of them if none is given. Negative ones
    /// count from the end.
    ///
    /// Shapes: `[.., i, ..] → [.., ..]`. Accumulates and divides in f32 (f64 for f64), so a half type overflows only if
    /// the mean does. The mean of no elements is NaN, as in PyTorch. Saves nothing.
    /// Errors: those of [`Tensor::sum`], or a dtype that is not float, as in PyTorch.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert_eq!(x.mean(&[0])?.to_vec::<f32>()?, [2.5, 3.5, 4.5]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn mean(&self, dims: &[isize]) -> Result<Tensor> {
        self.dtype().expect_float("mean")?;
        self.reduce("mean", dims, |count| count as f64)
    }

    /// Computes the sum divided by a function of the number of summands.
    fn reduce(&self, op: &'static str, dims: &[isize], divisor: fn(usize) -> f64) -> Result<Tensor> {
        let mut reduced = vec![dims.is_empty(); self.rank().max(1)];
        for &dim in dims {
            let dim = self.shape().dim_unless_scalar(dim, op)?.unwrap_or(0);
            let repeated = std::mem::replace(&mut reduced[dim], true);
            ensure!(!repeated, Error::argument(op, format_args!("dimension {dim} occurs twice in {dims:?}")));
        }
        let (gone, kept): (Vec<usize>, Vec<usize>) = (0..self.rank()).partition(|&dim| reduced[dim]);
        let shape = Shape::unchecked(&kept.iter().map(|&dim| self.shape()[dim]).collect_vec());
        let divisor = divisor(gone.iter().map(|&dim| self.shape()[dim]).product());
        let mut out = Tensor::uninit(shape, self.dtype(), self.device())?;
        let kept_is_last = gone.last() < kept.first();
        match *self.device() {
            Device::Cpu if self.dtype() == DType::I64 => {
                let x = self.detach().permute(&[kept, gone].concat())?.contiguous()?;
                sum_integers(x.values::<i64>()?, out.values_mut::<i64>()?);
            }
            Device::Cpu => {
                // Kept dimensions last: whole rows are added up without a transposed copy, over packed columns.
                // Otherwise they come first, so that each sum is one packed row.
                let x = self.detach();
                let x = if kept_is_last { x } else { x.permute(&[kept, gone].concat())? }.contiguous()?;
                let (x, width, out) = (x.floats(op)?, out.numel(), out.floats_mut(op)?);
                dispatch_real!(self.dtype(), R, {
                    let divisor = R::from_f64(divisor);
                    match kept_is_last {
                        true => sum_rows_together::<R>(x, width, out, divisor),
                        false => sum_each_row::<R>(x, out, divisor),
                    }
                });
            }
            Device::Gpu(gpu) => {
                // Adjacent dimensions are summed in place, others are moved to the end.
                let neighbours = gone.windows(2).all(|pair| pair[0] + 1 == pair[1]);
                let order = if neighbours { (0..self.rank()).collect() } else { [&kept[..], &gone].concat() };
                let x = self.detach().permute(&order)?.contiguous()?;
                let size = |dims: &[usize]| dims.iter().map(|&dim| self.shape()[dim]).product::<usize>();
                let before = if neighbours { kept.partition_point(|dim| Some(dim) < gone.first()) } else { kept.len() };
                let sums =
                    MiddleSums { outer: size(&kept[..before]), count: size(&gone), inner: size(&kept[before..]) };
                sums.launch(gpu, &mut out, &x, divisor)?;
            }
        }
        reduced.truncate(self.rank());
        record(op, out, &[self], |_| ReduceBackward { op, shape: *self.shape(), reduced, divisor })
    }

    /// Sums over the dimensions that broadcasting added or repeated: the transpose of [`Tensor::expand`].
    ///
    /// Errors: `shape` does not broadcast to this one.
    pub fn sum_to(&self, shape: Shape) -> Result<Tensor> {
        if shape == *self.shape() {
            return Ok(self.clone());
        }
        let fits = shape.broadcast(self.shape(), "sum_to").is_ok_and(|result| result == *self.shape());
        ensure!(
            fits,
            Error::shape(
                "sum_to",
                format_args!("cannot sum {:?} to {shape:?}: it does not broadcast back", self.shape())
            )
        );
        let added = self.rank() - shape.rank();
        let dims: Vec<isize> = (0..self.rank())
            .filter(|&dim| dim < added || shape[dim - added] != self.shape()[dim])
            .map(|dim| dim as isize)
            .collect_vec();
        if dims.is_empty() { self.reshape(shape) } else { self.sum(&dims)?.reshape(shape) }
    }
}

/// Sums over the middle of `[outer, count, inner]`, as `kernels/reduce.cu` takes them.
struct MiddleSums {
    outer: usize,
    count: usize,
    inner: usize,
}

impl MiddleSums {
    /// Computes `y = Σ x / divisor`; in two launches if there are too few sums to fill a card.
    fn launch(&self, gpu: &dyn Gpu, y: &mut Tensor, x: &Tensor, divisor: f64) -> Result<()> {
        let Self { outer, count, inner } = *self;
        let dtype = x.dtype();
        let option = [("DTYPE", dtype.name())];
        let (outer, inner) = (outer as i64, inner as i64);
        let (piece, pieces) = self.pieces();
        if pieces == 1 {
            let args = args![y, x, outer, count as i64, inner, divisor];
            return gpu.kernel("reduce_sum", &option)?.launch(self.grid(1, count), args);
        }
        let shape = Shape::new(&[self.outer, pieces, self.inner])?;
        let mut sums = Tensor::uninit(shape, dtype.accumulator(), x.device())?;
        let args = args![&mut sums, x, outer, count as i64, inner, piece as i64];
        gpu.kernel("reduce_pieces", &option)?.launch(self.grid(pieces, piece), args)?;
        let args = args![y, &sums, outer, pieces as i64, inner, divisor];
        gpu.kernel("reduce_finish", &option)?.launch(self.grid(1, pieces), args)
    }

    /// Returns the length and the number of the pieces of a sum: they depend only on the sizes, so results do not
    /// depend on the card.
    fn pieces(&self) -> (usize, usize) {
        // Enough blocks to fill a large card, each with enough work to pay for its start, but not so much that the
        // rounding error of its threads grows.
        const BLOCKS: usize = 1024;
        let (smallest, largest) = if self.inner == 1 { (4096, 1 << 16) } else { (64, 1 << 12) };
        let wanted = BLOCKS / (self.outer * self.tiles()).clamp(1, BLOCKS);
        let piece = self.count.div_ceil(wanted).clamp(smallest, largest);
        (piece, self.count.div_ceil(piece).max(1))
    }

    /// Returns the number of blocks along `inner`, about a packet for each of 32 threads.
    fn tiles(&self) -> usize {
        self.inner.div_ceil(128)
    }

    fn grid(&self, pieces: usize, piece: usize) -> Grid {
        let rows = self.outer * pieces;
        match self.inner {
            1 => Grid::rows(rows, piece),
            _ => Grid::new([self.tiles().min(1 << 14) as u32, rows.min(1 << 14) as u32, 1], [32, 8, 1]),
        }
    }
}

/// Number of rows summed before their sum is added to the total: bounds the rounding error of long sums, and gives the
/// threads work to share.
const ROWS: usize = 256;

/// Computes `out[j] = Σ_i x[i, j] / divisor`, in blocks of rows.
fn sum_rows_together<R: Real>(x: Floats, width: usize, out: FloatsMut, divisor: R) {
    let rows = x.len().checked_div(width).unwrap_or(0);
    if rows <= ROWS {
        return for_rows_of::<R, 1, 0>([Out::new(out, 1)], [], Sums::none(), rows.max(1), &|start, [out], [], _| {
            sum_columns::<R>(x, width, start, out, divisor);
        });
    }
    let mut sums = vec![R::ZERO; rows.div_ceil(ROWS) * width];
    cpu::for_rows(&mut sums, width, ROWS * width, |block, sums| {
        for (block, sums) in (block..).zip(sums.chunks_exact_mut(width)) {
            let end = x.len().min((block + 1) * ROWS * width);
            sum_columns::<R>(x.range(block * ROWS * width..end), width, 0, sums, R::ONE);
        }
    });
    sum_rows_together::<R>(Floats::of(&sums), width, out, divisor);
}

/// Number of columns summed in one pass over the rows, so that their sums stay in the L1 cache.
const COLUMNS: usize = 512;

/// Number of rows after which the sums of a pass are added to its total, for the same reason as [`ROWS`].
const FEW: usize = 16;

/// Computes `out[j] = Σ_i x[i, start + j] / divisor`.
fn sum_columns<R: Real>(x: Floats, width: usize, start: usize, out: &mut [R], divisor: R) {
    for (block, out) in out.chunks_mut(COLUMNS).enumerate() {
        let start = start + block * COLUMNS;
        out.fill(R::ZERO);
        // Half types are read where they lie: through rows in f32, a sum would take twice its time.
        match x {
            Floats::F32(rows) => add_columns(rows, width, start, bytemuck::cast_slice_mut(out)),
            Floats::F64(rows) => add_columns(rows, width, start, bytemuck::cast_slice_mut(out)),
            Floats::BF16(rows) => add_columns(rows, width, start, bytemuck::cast_slice_mut(out)),
            Floats::F16(rows) => add_columns_of_f16(rows, width, start, bytemuck::cast_slice_mut(out)),
        }
        out.iter_mut().for_each(|out| *out = *out / divisor);
    }
}

/// Like [`add_columns`], with the same bits.
fn add_columns_of_f16(x: &[f16], width: usize, start: usize, totals: &mut [f32]) {
    for rows in x.chunks(FEW * width) {
        let mut sums = [0.0; COLUMNS];
        let sums = &mut sums[..totals.len()];
        for row in rows.chunks_exact(width) {
            f16_rows::add(&row[start..start + sums.len()], sums);
        }
        totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += *sum);
    }
}

vectorized! {
    /// Computes `totals[j] += Σ_i x[i, start + j]`.
    fn add_columns<T: Float>(x: &[T], width: usize, start: usize, totals: &mut [T::Acc]) {
        for rows in x.chunks(FEW * width) {
            let mut sums = [T::Acc::ZERO; COLUMNS];
            let sums = &mut sums[..totals.len()];
            for row in rows.chunks_exact(width) {
                for (sum, x) in sums.iter_mut().zip(&row[start..]) {
                    *sum += x.to_acc();
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total += *sum;
            }
        }
    }
}

/// Computes `out[i] = Σ_j x[i, j]`, which wraps around.
fn sum_integers(x: &[i64], out: &mut [i64]) {
    let width = x.len().checked_div(out.len()).unwrap_or(0);
    cpu::for_rows(out, 1, width, |row, out| {
        for (index, out) in out.iter_mut().enumerate() {
            *out = x[(row + index) * width..][..width].iter().fold(0, |sum: i64, &x| sum.wrapping_add(x));
        }
    });
}

/// Computes `out[i] = Σ_j x[i, j] / divisor`; rows that are long enough are shared between threads.
fn sum_each_row<R: Real>(x: Floats, mut out: FloatsMut, divisor: R) {
    let width = x.len().checked_div(out.len()).unwrap_or(0);
    if width < 2 * cpu::GRAIN {
        let ins = [In::new(x, width)];
        return for_rows_of::<R, 1, 1>([Out::new(out, 1)], ins, Sums::none(), width, &|_, [out], [x], _| {
            for (index, out) in out.iter_mut().enumerate() {
                *out = sum_row::<R>(&x[index * width..][..width]) / divisor;
            }
        });
    }
    let pieces = width.div_ceil(cpu::GRAIN);
    let mut sums = vec![R::ZERO; out.len() * pieces];
    cpu::for_rows(&mut sums, 1, cpu::GRAIN, |start, sums| {
        for (index, sum) in sums.iter_mut().enumerate() {
            let (row, piece) = ((start + index) / pieces, (start + index) % pieces);
            let first = row * width + piece * cpu::GRAIN;
            // Half types are read where they lie, as in `sum_columns`.
            *sum = R::from_f64(match x.range(first..(row * width + width).min(first + cpu::GRAIN)) {
                Floats::F32(x) => sum_row(x).into(),
                Floats::F64(x) => sum_row(x),
                Floats::BF16(x) => sum_row(x).into(),
                Floats::F16(x) => sum_f16(x).into(),
            });
        }
    });
    let sums: Vec<R> = sums.chunks_exact(pieces).map(|sums| sum_row::<R>(sums) / divisor).collect_vec();
    out.write(&sums);
}

/// Like [`sum_row`], by pieces in f32.
fn sum_f16(x: &[f16]) -> f32 {
    let mut piece = [0.0; BLOCK];
    x.chunks(BLOCK).fold(0.0, |total, x| {
        let piece = &mut piece[..x.len()];
        f16_rows::widen(x, piece);
        total + sum_row::<f32>(piece)
    })
}

vectorized! {
    fn sum_row<T: Float>(x: &[T]) -> T::Acc {
        sum_slice(x)
    }
}

/// Returns the sum of `[chunks, width]` on a GPU over the chunks, of some of its columns (the first, and their number),
/// to be computed by [`sum_chunks`] and rounded to a dtype.
pub(super) fn late_sum(partials: &Tensor, columns: [usize; 2], dtype: DType) -> LateSum {
    LateSum { partials: partials.clone(), columns, dtype, finish: sum_chunks }
}

/// Computes sums over chunks on one GPU, each `[columns]`: one launch for each pair from the same partial sums if these
/// are all there are, otherwise one for all of a dtype.
pub(super) fn sum_chunks(late: &[LateSum]) -> Result<Vec<Tensor>> {
    let room = |sum: &LateSum| Tensor::uninit(Shape::new(&[sum.columns[1]])?, sum.dtype, sum.partials.device());
    let mut sums: Vec<Tensor> = late.iter().map(room).try_collect_vec()?;
    if let Some((gpu, of_first)) = of_one(late)? {
        let LateSum { partials, dtype, .. } = &late[0];
        let (chunks, width) = (partials.dim(0)? as i64, size32(partials.dim(1)?)?);
        let grid = Grid::new([width.div_ceil(32), 1, 1], [32, 32, 1]);
        let (mut to_first, mut to_second) = (None, None);
        for (sum, to) in late.iter().zip(&mut sums) {
            *(if sum.columns[0] == 0 { &mut to_first } else { &mut to_second }) = Some(to);
        }
        let args = args![to_first, to_second, partials, chunks, width, size32(of_first)?];
        gpu.kernel("reduce_chunks", &[("DTYPE", dtype.name())])?.launch(grid, args)?;
        return Ok(sums);
    }
    let (_, groups) = by_device(late.iter().zip(&mut sums), |(sum, _)| (sum.partials.device().clone(), sum.dtype));
    for Group { gpu, key: dtype, items } in groups {
        let (mut rows, mut blocks) = (Vec::new(), 0);
        for (LateSum { partials, columns: [start, columns], .. }, to) in items {
            let (chunks, width) = (partials.dim(0)?, partials.dim(1)?);
            let from = partials.address()?.plus(start * partials.dtype().size());
            rows.extend([to.address_mut()?.get() as i64, from.get() as i64]);
            rows.extend([chunks, width, *columns, blocks].map(|size| size as i64));
            blocks += columns.div_ceil(32);
        }
        // Kernels count both with 32-bit integers.
        let (count, grid) = (size32(rows.len() / 6)?, Grid::new([size32(blocks)?, 1, 1], [32, 32, 1]));
        let table = Tensor::table_on(gpu, &format!("sums {dtype} {count}"), rows)?;
        gpu.kernel("reduce_many", &[("DTYPE", dtype.name())])?.launch(grid, args![&table, count])?;
    }
    Ok(sums)
}

/// Returns the GPU, and the number of columns of the first sum, if all sums are those of the first columns and of the
/// rest of the same partial sums, once each.
fn of_one(late: &[LateSum]) -> Result<Option<(&'static dyn Gpu, usize)>> {
    let Some(first) = late.first().filter(|_| late.len() <= 2) else { return Ok(None) };
    let Device::Gpu(gpu) = *first.partials.device() else { return Ok(None) };
    let width = first.partials.dim(1)?;
    let split = late.iter().map(|sum| if sum.columns[0] == 0 { sum.columns[1] } else { sum.columns[0] }).next();
    let split = split.unwrap_or(width);
    let fits = |sum: &LateSum| {
        let is_part = sum.columns == [0, split] || (split > 0 && sum.columns == [split, width - split]);
        is_part && sum.dtype == first.dtype && sum.partials.shares_storage(&first.partials)
    };
    let twice = late.len() == 2 && late[0].columns == late[1].columns;
    Ok((split <= width && late.iter().all(fits) && !twice).then_some((gpu, split)))
}

/// Sums a slice in sixteen lanes, which vectorises and keeps the error small; the order is fixed.
#[inline(always)]
pub(crate) fn sum_slice<T: Float>(x: &[T]) -> T::Acc {
    fold(x, T::Acc::ZERO, |x| x.to_acc())
}

/// Number of independent sums of a row, which fill the widest registers twice.
pub(crate) const LANES: usize = 16;

/// Number of elements after which the lanes are added to the total: bounds the rounding error of long rows.
pub(super) const BLOCK: usize = 1024;

/// Computes `start + Σ f(x)` in sixteen lanes.
#[inline(always)]
pub(crate) fn fold<T: Float>(x: &[T], start: T::Acc, f: impl Fn(T) -> T::Acc) -> T::Acc {
    fold2(x, x, start, |x, _| f(x))
}

/// Computes `start + Σ f(x, y)` over two slices of one length, in sixteen lanes.
#[inline(always)]
pub(crate) fn fold2<T: Float>(x: &[T], y: &[T], start: T::Acc, f: impl Fn(T, T) -> T::Acc) -> T::Acc {
    let mut total = start;
    for (x, y) in x.chunks(BLOCK).zip(y.chunks(BLOCK)) {
        let (packets, others) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
        let mut sum = T::Acc::ZERO;
        for (&x, &y) in packets.remainder().iter().zip(others.remainder()) {
            sum += f(x, y);
        }
        let mut lanes = [T::Acc::ZERO; LANES];
        for (x, y) in packets.zip(others) {
            for ((lane, &x), &y) in lanes.iter_mut().zip(x).zip(y) {
                *lane += f(x, y);
            }
        }
        total += sum + join(lanes, |a, b| a + b);
    }
    total
}

/// Reduces the lanes to one by halving, with constant lengths: a loop over lengths is two kilobytes of code.
#[inline(always)]
pub(crate) fn join<A: Real>(lanes: [A; LANES], both: impl Fn(A, A) -> A) -> A {
    // Through memory, where all lanes lie side by side: seeing how they are joined, the compiler would scatter them
    // over narrow registers, and the loop that fills them takes up to three times as long.
    let halves = halved::<A, LANES, 8>(black_box(lanes), &both);
    let [a, b] = halved::<A, 4, 2>(halved::<A, 8, 4>(halves, &both), &both);
    both(a, b)
}

#[inline(always)]
fn halved<A: Real, const N: usize, const HALF: usize>(lanes: [A; N], both: &impl Fn(A, A) -> A) -> [A; HALF] {
    let mut joined = [A::ZERO; HALF];
    for lane in 0..HALF {
        joined[lane] = both(lanes[lane], lanes[lane + HALF]);
    }
    joined
}

/// Returns the largest element, `−∞` for an empty slice; ignores NaN.
#[inline(always)]
pub(crate) fn max_slice<T: Float>(x: &[T]) -> T::Acc {
    let packets = x.chunks_exact(LANES);
    let max = packets.remainder().iter().fold(T::Acc::NEG_INFINITY, |max, x| max.max(x.to_acc()));
    let mut lanes = [T::Acc::NEG_INFINITY; LANES];
    for packet in packets {
        for (lane, x) in lanes.iter_mut().zip(packet) {
            *lane = lane.max(x.to_acc());
        }
    }
    max.max(join(lanes, T::Acc::max))
}

struct ReduceBackward {
    op: &'static str,
    shape: Shape,
    reduced: Vec<bool>,
    divisor: f64,
}

impl Backward for ReduceBackward {
    fn name(&self) -> &'static str {
        self.op
    }

    /// Every summand gets the gradient of its sum.
    fn backward(self: Box<Self>, mut grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        if self.divisor != 1.0 {
            grad = grad.affine(1.0 / self.divisor, 0.0)?;
        }
        for (dim, _) in self.reduced.iter().enumerate().filter(|(_, reduced)| **reduced) {
            grad = grad.unsqueeze(dim as isize)?;
        }
        grad.expand(self.shape).map(InputGrads::one)
    }
}

impl Tensor {
    /// Returns the largest value along a dimension and removes the dimension; the gradient goes to the first of equal
    /// values.
    ///
    /// NaN counts as the largest, as in PyTorch; i64 and bool work too, and a scalar is treated as a vector of one
    /// element. Saves: the position of each maximum. Errors: the dimension is out of range or empty.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert_eq!(x.max(-1)?.to_vec::<f32>()?, [3.0, 6.0]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn max(&self, dim: isize) -> Result<Tensor> {
        let Some(dim) = self.shape().dim_unless_scalar(dim, "max")? else { return self.unsqueeze(0)?.max(0) };
        if self.dtype() == DType::Bool {
            return self.to_dtype(DType::I64)?.max(dim as isize)?.to_dtype(DType::Bool);
        }
        let mut out = Tensor::uninit(self.shape().without(dim), self.dtype(), self.device())?;
        let index = self.detach().largest("max", dim, Some(&mut out))?;
        record("max", out, &[self], |_| MaxBackward { index, dim, shape: *self.shape() })
    }

    /// Returns the position of the largest value along a dimension, as I64, and removes the dimension; the first of
    /// equal values, and NaN counts as the largest. A scalar is treated as a vector of one element.
    ///
    /// Errors: the dimension is out of range or empty, a bool tensor, as in PyTorch, or one that requires a gradient.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3], &Device::Cpu)?;
    /// assert_eq!(x.argmax(-1)?.to_vec::<i64>()?, [2, 2]);
    /// # Ok::<(), x_transformers::Error>(())
    /// ```
    pub fn argmax(&self, dim: isize) -> Result<Tensor> {
        discrete("argmax", &[self])?;
        let Some(dim) = self.shape().dim_unless_scalar(dim, "argmax")? else { return self.unsqueeze(0)?.argmax(0) };
        computed("argmax", self.largest("argmax", dim, None)?, &[self])
    }

    /// Returns the positions of the largest values along a dimension; writes the values to `out`.
    fn largest(&self, op: &'static str, dim: usize, out: Option<&mut Tensor>) -> Result<Tensor> {
        let known = self.dtype().is_float() || self.dtype() == DType::I64;
        ensure!(
            known,
            Error::dtype(op, format_args!("expected floats or i64, got {}; convert with `to_dtype`", self.dtype()))
        );
        let width = self.shape()[dim];
        ensure!(width > 0, Error::shape(op, format_args!("dimension {dim} of shape {:?} is empty", self.shape())));
        let x = self.dim_last(dim)?;
        let mut index = Tensor::uninit(self.shape().without(dim), DType::I64, x.device())?;
        match x.device() {
            Device::Cpu if x.dtype() == DType::I64 => largest_of_rows::<i64>(&x, width, &mut index, out)?,
            Device::Cpu => dispatch_float!(op, x.dtype(), T, largest_of_rows::<T>(&x, width, &mut index, out))?,
            Device::Gpu(gpu) => {
                let rows = index.numel();
                gpu.kernel("reduce_largest", &[("DTYPE", x.dtype().name())])?
                    .launch(Grid::rows(rows, width), args![&mut index, out, &x, rows as i64, size32(width)?])?;
            }
        }
        Ok(index)
    }

    /// Returns a packed copy with a dimension moved to the end, so that each slice along it is a row.
    fn dim_last(&self, dim: usize) -> Result<Tensor> {
        let order: Vec<usize> = (0..self.rank()).filter(|&other| other != dim).chain([dim]).collect_vec();
        self.permute(&order)?.contiguous()
    }
}

/// Finds the first largest element of each row: position and value.
fn largest_of_rows<T: Element<Stored = T> + PartialOrd>(
    x: &Tensor,
    width: usize,
    index: &mut Tensor,
    out: Option<&mut Tensor>,
) -> Result<()> {
    let x = x.values::<T>()?;
    cpu::for_rows(index.values_mut::<i64>()?, 1, width, |row, out| {
        for (x, out) in x[row * width..].chunks_exact(width).zip(out) {
            *out = first_largest(x) as i64;
        }
    });
    if let Some(out) = out {
        let rows = x.chunks_exact(width).zip(index.values::<i64>()?);
        for (out, (x, &at)) in out.values_mut::<T>()?.iter_mut().zip(rows) {
            *out = x[at as usize];
        }
    }
    Ok(())
}

fn first_largest<T: Copy + PartialOrd>(x: &[T]) -> usize {
    let is_nan = |x: T| x.partial_cmp(&x).is_none();
    let mut best = 0;
    for (index, &value) in x.iter().enumerate() {
        if value > x[best] || (is_nan(value) && !is_nan(x[best])) {
            best = index;
        }
    }
    best
}

struct MaxBackward {
    index: Tensor,
    dim: usize,
    shape: Shape,
}

impl Backward for MaxBackward {
    fn name(&self) -> &'static str {
        "max"
    }

    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let positions = Tensor::arange(self.shape[self.dim], grad.device())?;
        let hit = self.index.unsqueeze(-1)?.eq(&positions)?;
        let zero = Tensor::zeros((), grad.dtype(), grad.device())?;
        let spread = hit.where_cond(&grad.unsqueeze(-1)?, &zero)?;
        // The inverse of `dim_last`.
        let mut order: Vec<usize> = (0..self.shape.rank() - 1).collect_vec();
        order.insert(self.dim, self.shape.rank() - 1);
        spread.permute(&order).map(InputGrads::one)
    }
}
