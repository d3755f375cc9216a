//! Tensors that depend only on positions: T5's relative bias and sinusoids.

use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, computed, discrete, record},
    collect::CollectVec,
    device::{Gpu, Grid, args, cpu, size32},
    dtype::{Float, Real, dispatch_float},
    error::ensure,
    ops::attention::bucket,
    shape::Shape,
};

/// Matrix of buckets: the row of the table for each distance.
#[derive(Clone, Copy)]
struct Buckets {
    queries: usize,
    keys: usize,
    causal: bool,
    count: usize,
    max_distance: usize,
}

impl Buckets {
    /// Returns the number of diagonals.
    fn length(&self) -> usize {
        (self.queries + self.keys).saturating_sub(1)
    }

    /// Returns the bucket of each diagonal: entry `key − query + queries − 1`.
    fn of_diagonals(&self) -> Vec<usize> {
        (0..self.length()).map(|at| self.at(self.queries as i64 - 1 - at as i64)).collect()
    }

    /// Returns the buckets on a GPU, as a part of a table that serves many sizes.
    fn on(&self, gpu: &'static dyn Gpu) -> Result<Tensor> {
        let Self { queries, keys, causal, count, max_distance } = *self;
        let reach = queries.max(keys).next_power_of_two();
        let name = format!("relative_position_bias {causal} {count} {max_distance} {reach}");
        let distances = (1 - reach as i64..reach as i64).rev();
        let table = Tensor::constant_on(gpu, &name, 2 * reach - 1, || {
            Ok(distances.map(|distance| self.at(distance) as i64).collect_vec())
        })?;
        table.narrow(0, reach - queries, self.length())
    }

    fn at(&self, distance: i64) -> usize {
        bucket(distance, self.causal, self.count, self.max_distance)
    }
}

impl Tensor {
    /// Computes T5's bias from its table: `y[h, i, j] = scale · table[bucket(i − j), h]`, the buckets being those of
    /// [`PositionBias::T5`](crate::ops::PositionBias::T5).
    ///
    /// Shapes: `[buckets, heads] → [heads, query, key]`. Saves nothing but sizes.
    /// Errors: a table of another rank, too few buckets or too small a `max_distance` to have an edge, or a dtype that
    /// is not float.
    pub fn relative_position_bias(
        &self,
        queries: usize,
        keys: usize,
        causal: bool,
        max_distance: usize,
        scale: f64,
    ) -> Result<Tensor> {
        const OP: &str = "relative_position_bias";
        let &[buckets, heads] = &**self.shape() else {
            return Err(Error::shape(OP, format_args!("expected a table [buckets, heads], got {:?}", self.shape())));
        };
        self.dtype().expect_float(OP)?;
        let least = if causal { 2 } else { 4 };
        ensure!(
            buckets >= least && max_distance > buckets / least,
            Error::argument(
                OP,
                format_args!(
                    "expected at least {least} buckets and a max_distance above {}, got {buckets} and {max_distance}",
                    buckets / least
                )
            )
        );
        let table = self.transpose(0, 1)?.contiguous()?;
        let mut y = Tensor::uninit(Shape::new(&[heads, queries, keys])?, table.dtype(), table.device())?;
        let of = Buckets { queries, keys, causal, count: buckets, max_distance };
        match table.device() {
            Device::Cpu => dispatch_float!(OP, table.dtype(), T, {
                let scale = <T as Float>::Acc::from_f64(scale);
                let diagonals = of.of_diagonals();
                let values = table.values::<T>()?.chunks_exact(buckets);
                let lines: Vec<Vec<T>> = values
                    .map(|row| diagonals.iter().map(|&bucket| T::from_acc(row[bucket].to_acc() * scale)).collect())
                    .collect_vec();
                cpu::for_rows(y.values_mut::<T>()?, keys, keys, |row, rows| {
                    for (index, y) in rows.chunks_exact_mut(keys).enumerate() {
                        let (head, query) = ((row + index) / queries, (row + index) % queries);
                        y.copy_from_slice(&lines[head][queries - 1 - query..][..keys]);
                    }
                });
                Ok(())
            })?,
            Device::Gpu(gpu) => {
                let rows = heads * queries;
                let sizes = (rows as i64, size32(queries)?, size32(keys)?, size32(buckets)?);
                gpu.kernel("position_bias_fwd", &[("DTYPE", table.dtype().name())])?.launch(
                    Grid::rows(if keys == 0 { 0 } else { rows }, keys),
                    args![&mut y, &table, &of.on(*gpu)?, sizes.0, sizes.1, sizes.2, sizes.3, scale],
                )?;
            }
        }
        record(OP, y, &[&table], |_| RelativePositionBiasBackward { of, scale })
    }

    /// Computes sinusoids at `n` positions: `[sin(p · f) | cos(p · f)]` for `p` from `first` on, with these frequencies
    /// `f`.
    ///
    /// Shapes: `[frequencies] → [n, 2 · frequencies]` of the given dtype. Computed in f64, rounded once.
    /// Errors: another rank, a dtype that is not float, or frequencies that require a gradient.
    pub fn sinusoid(&self, first: usize, n: usize, dtype: DType) -> Result<Tensor> {
        const OP: &str = "sinusoid";
        discrete(OP, &[self])?;
        ensure!(
            self.rank() == 1 && self.dtype().is_float(),
            Error::shape(OP, format_args!("expected float frequencies [n], got {:?} {}", self.shape(), self.dtype()))
        );
        dtype.expect_float(OP)?;
        let half = self.numel();
        let mut y = Tensor::uninit(Shape::new(&[n, 2 * half])?, dtype, self.device())?;
        match self.device() {
            Device::Cpu => dispatch_float!(OP, dtype, T, {
                let frequencies = self.to_f64_vec()?;
                cpu::for_rows(y.values_mut::<T>()?, 2 * half, 64 * half, |row, rows| {
                    for (index, y) in rows.chunks_exact_mut(2 * half).enumerate() {
                        let position = (first + row + index) as f64;
                        let (sines, cosines) = y.split_at_mut(half);
                        for ((sine, cosine), f) in sines.iter_mut().zip(cosines).zip(&frequencies) {
                            *sine = T::from_f64(libm::sin(position * f));
                            *cosine = T::from_f64(libm::cos(position * f));
                        }
                    }
                });
                Ok(())
            })?,
            Device::Gpu(gpu) => {
                let frequencies = self.detach().to_dtype(DType::F64)?.contiguous()?;
                gpu.kernel("position_sinusoid", &[("DTYPE", dtype.name())])?.launch(
                    Grid::elements(n * half),
                    args![&mut y, &frequencies, first as i64, n as i64, size32(half)?],
                )?;
            }
        }
        computed(OP, y, &[self])
    }
}

struct RelativePositionBiasBackward {
    of: Buckets,
    scale: f64,
}

impl Backward for RelativePositionBiasBackward {
    fn name(&self) -> &'static str {
        "relative_position_bias"
    }

    /// Sums along diagonals, then over the diagonals of each bucket.
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let grad = grad.contiguous()?;
        let table = match grad.device() {
            Device::Cpu => self.backward_rows(&grad)?,
            Device::Gpu(gpu) => self.backward_cuda(*gpu, &grad)?,
        };
        Ok(InputGrads::one(table))
    }
}

/// Number of queries over which a GPU thread sums one diagonal.
const CHUNK: usize = 128;

impl RelativePositionBiasBackward {
    /// Computes the gradient of the table, `[heads, buckets]`.
    fn backward_rows(&self, grad: &Tensor) -> Result<Tensor> {
        let Buckets { queries, keys, count, .. } = self.of;
        let diagonals = self.of.of_diagonals();
        let mut table = Tensor::zeros([grad.shape()[0], count], grad.dtype(), grad.device())?;
        dispatch_float!("relative_position_bias", grad.dtype(), T, {
            let scale = <T as Float>::Acc::from_f64(self.scale);
            let g = grad.values::<T>()?;
            cpu::for_rows(table.values_mut::<T>()?, count, queries * keys, |head, rows| {
                for (index, table) in rows.chunks_exact_mut(count).enumerate() {
                    let mut sums = vec![<T as Float>::Acc::ZERO; diagonals.len()];
                    for query in 0..queries {
                        let g = &g[((head + index) * queries + query) * keys..][..keys];
                        for (sum, g) in sums[queries - 1 - query..].iter_mut().zip(g) {
                            *sum += g.to_acc();
                        }
                    }
                    let mut totals = vec![<T as Float>::Acc::ZERO; count];
                    for (&bucket, &sum) in diagonals.iter().zip(&sums) {
                        totals[bucket] += sum;
                    }
                    for (table, total) in table.iter_mut().zip(totals) {
                        *table = T::from_acc(total * scale);
                    }
                }
            });
            Ok(())
        })?;
        Ok(table)
    }

    /// Computes [`RelativePositionBiasBackward::backward_rows`] on a GPU.
    fn backward_cuda(&self, gpu: &'static dyn Gpu, grad: &Tensor) -> Result<Tensor> {
        let Buckets { queries, keys, count, .. } = self.of;
        let (heads, length, chunks) = (grad.shape()[0], self.of.length(), queries.div_ceil(CHUNK));
        if grad.numel() == 0 {
            return Tensor::zeros([heads, count], grad.dtype(), grad.device());
        }
        let dtype = [("DTYPE", grad.dtype().name())];
        let shape = Shape::new(&[heads, chunks, length])?;
        let mut sums = Tensor::uninit(shape, grad.dtype().accumulator(), grad.device())?;
        gpu.kernel("position_bias_bwd_sums", &dtype)?.launch(
            Grid::new([size32(length.div_ceil(256))?, size32(chunks)?, size32(heads)?], [256, 1, 1]),
            args![&mut sums, grad, size32(queries)?, size32(keys)?, CHUNK as u32],
        )?;
        let mut table = Tensor::uninit(Shape::new(&[heads, count])?, grad.dtype(), grad.device())?;
        gpu.kernel("position_bias_bwd", &dtype)?.launch(
            Grid::new([size32(count)?, size32(heads)?, 1], [256, 1, 1]),
            args![&mut table, &sums, &self.of.on(gpu)?, size32(length)?, size32(chunks)?, self.scale],
        )?;
        Ok(table)
    }
}
