//! Tensors that depend on positions alone: T5's relative bias and sinusoids.

use crate::{
    DType, Error, Result, Tensor,
    core::{Backward, Contributions, Float, Real, Shape, discrete, dispatch_float, record},
    device::cpu,
    error::ensure,
    ops::attention::bucket,
};

/// The buckets of a matrix along its diagonals: entry `key − query + queries − 1`.
fn diagonals(queries: usize, keys: usize, causal: bool, buckets: usize, max_distance: usize) -> Vec<usize> {
    let length = (queries + keys).saturating_sub(1);
    (0..length).map(|at| bucket(queries as i64 - 1 - at as i64, causal, buckets, max_distance)).collect()
}

impl Tensor {
    /// T5's bias from its table: `y[h, i, j] = scale · table[bucket(i − j), h]`, the buckets being those of
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
            return Err(Error::shape(OP, format!("expected a table [buckets, heads], got {:?}", self.shape())));
        };
        let least = if causal { 2 } else { 4 };
        ensure!(
            buckets >= least && max_distance > buckets / least,
            Error::argument(
                OP,
                format!(
                    "expected at least {least} buckets and a max_distance above {}, got {buckets} and {max_distance}",
                    buckets / least
                )
            )
        );
        let table = self.transpose(0, 1)?.contiguous()?;
        let mut y = Tensor::uninit(Shape::new(&[heads, queries, keys])?, table.dtype(), table.device())?;
        let diagonals = diagonals(queries, keys, causal, buckets, max_distance);
        dispatch_float!(OP, table.dtype(), T, {
            let scale = <T as Float>::Acc::from_f64(scale);
            let values = table.values::<T>()?.chunks_exact(buckets);
            let lines: Vec<Vec<T>> = values
                .map(|row| diagonals.iter().map(|&bucket| T::from_acc(row[bucket].to_acc() * scale)).collect())
                .collect();
            cpu::for_rows(y.values_mut::<T>()?, keys, keys, |row, rows| {
                for (index, y) in rows.chunks_exact_mut(keys).enumerate() {
                    let (head, query) = ((row + index) / queries, (row + index) % queries);
                    y.copy_from_slice(&lines[head][queries - 1 - query..][..keys]);
                }
            });
            Ok(())
        })?;
        record(OP, y, &[&table], |_| RelativePositionBiasBackward { diagonals, buckets, scale })
    }

    /// Sinusoids at `n` positions: `[sin(p · f) | cos(p · f)]` for `p` from `first` on, with these frequencies `f`.
    ///
    /// Shapes: `[frequencies] → [n, 2 · frequencies]` of the given dtype. Computed in f64, rounded once.
    /// Errors: another rank, a dtype that is not float, or frequencies that require a gradient.
    pub fn sinusoid(&self, first: usize, n: usize, dtype: DType) -> Result<Tensor> {
        const OP: &str = "sinusoid";
        discrete(OP, &[self])?;
        ensure!(
            self.rank() == 1 && self.dtype().is_float(),
            Error::shape(OP, format!("expected float frequencies [n], got {:?} {}", self.shape(), self.dtype()))
        );
        let frequencies = self.to_f64_vec()?;
        let half = frequencies.len();
        let mut y = Tensor::uninit(Shape::new(&[n, 2 * half])?, dtype, self.device())?;
        dispatch_float!(OP, dtype, T, {
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
        })?;
        Ok(y)
    }
}

struct RelativePositionBiasBackward {
    diagonals: Vec<usize>,
    buckets: usize,
    scale: f64,
}

impl Backward for RelativePositionBiasBackward {
    fn name(&self) -> &'static str {
        "relative_position_bias"
    }

    /// Sums along diagonals, then over the diagonals of a bucket.
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<Contributions> {
        let grad = grad.contiguous()?;
        let (heads, queries, keys) = (grad.shape()[0], grad.shape()[1], grad.shape()[2]);
        let (diagonals, count) = (&self.diagonals, self.buckets);
        let mut table = Tensor::zeros([heads, count], grad.dtype(), grad.device())?;
        dispatch_float!(self.name(), grad.dtype(), T, {
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
        Ok(Contributions::one(table))
    }
}
