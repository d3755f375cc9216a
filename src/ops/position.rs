//! Tensors that depend on positions alone: T5's relative bias and sinusoids.

use crate::{
    Error, Result, Tensor,
    core::{Backward, Contributions, Float, Real, Shape, discrete, dispatch_float, record},
    device::cpu,
    error::ensure,
};

/// How T5's relative position bias turns distances into rows of its table (Raffel et al.,
/// <https://arxiv.org/abs/1910.10683>).
///
/// With `r` the distance, `B` buckets and `e = B / 2`: bucket `r` if `r < e`, else
/// `min(B − 1, e + ⌊ln(r / e) / ln(max_distance / e) · (B − e)⌋)`. Causal: `r = max(query − key, 0)`. Otherwise
/// `B` is half of the count, `r = |query − key|`, and keys after the query use the second half.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Buckets {
    /// Whether keys after the query share bucket 0.
    pub causal: bool,
    /// All buckets: rows of the table.
    pub count: usize,
    /// Distance from which on all positions share the last bucket.
    pub max_distance: usize,
}

impl Buckets {
    /// The bucket of `query − key`.
    pub fn of(&self, distance: i64) -> usize {
        let (buckets, first, distance) = match self.causal {
            true => (self.count, 0, distance.max(0) as usize),
            false if distance < 0 => (self.count / 2, self.count / 2, distance.unsigned_abs() as usize),
            false => (self.count / 2, 0, distance as usize),
        };
        let exact = buckets / 2;
        if distance < exact {
            return first + distance;
        }
        // In f64, as powers of two fall exactly on the edges of buckets with the usual sizes.
        let exact_f = exact as f64;
        let share = libm::log(distance as f64 / exact_f) / libm::log(self.max_distance as f64 / exact_f);
        first + (exact + (share * (buckets - exact) as f64) as usize).min(buckets - 1)
    }

    /// The buckets of a matrix along its diagonals: entry `key − query + queries − 1`.
    fn diagonals(&self, queries: usize, keys: usize) -> Vec<usize> {
        let length = (queries + keys).saturating_sub(1);
        (0..length).map(|at| self.of(queries as i64 - 1 - at as i64)).collect()
    }
}

impl Tensor {
    /// T5's bias from its table: `y[h, i, j] = scale · table[bucket(i − j), h]`.
    ///
    /// Shapes: `[buckets, heads] → [heads, query, key]`. Saves nothing but sizes.
    /// Errors: a table whose rows are not the buckets, buckets too few to have an edge, or a dtype that is not float.
    pub fn relative_position_bias(&self, queries: usize, keys: usize, buckets: Buckets, scale: f64) -> Result<Tensor> {
        const OP: &str = "relative_position_bias";
        ensure!(
            self.rank() == 2 && self.shape()[0] == buckets.count,
            Error::shape(OP, format!("expected a table [{}, heads], got {:?}", buckets.count, self.shape()))
        );
        let least = if buckets.causal { 2 } else { 4 };
        ensure!(
            buckets.count >= least && buckets.max_distance > buckets.count / least,
            Error::argument(OP, format!("expected at least {least} buckets and a larger max_distance, got {buckets:?}"))
        );
        let heads = self.shape()[1];
        let table = self.transpose(0, 1)?.contiguous()?;
        let mut y = Tensor::uninit(Shape::new(&[heads, queries, keys])?, table.dtype(), table.device())?;
        let diagonals = buckets.diagonals(queries, keys);
        dispatch_float!(OP, table.dtype(), T, {
            let scale = <T as Float>::Acc::from_f64(scale);
            let values = table.values::<T>()?.chunks_exact(buckets.count);
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
        record(OP, y, &[&table], |_| RelativePositionBiasBackward { buckets, scale })
    }

    /// Sinusoids at `n` positions: `[sin(p · f) | cos(p · f)]` for `p` from `first` on, with these frequencies `f`.
    ///
    /// Shapes: `[frequencies] → [n, 2 · frequencies]`. Computed in f64.
    /// Errors: another rank, a dtype that is not float, or frequencies that require a gradient.
    pub fn sinusoid(&self, first: usize, n: usize) -> Result<Tensor> {
        const OP: &str = "sinusoid";
        discrete(OP, &[self])?;
        ensure!(
            self.rank() == 1,
            Error::shape(OP, format!("expected frequencies of one dimension, got {:?}", self.shape()))
        );
        let frequencies = self.contiguous()?;
        let half = frequencies.elements();
        let mut y = Tensor::uninit(Shape::new(&[n, 2 * half])?, self.dtype(), self.device())?;
        dispatch_float!(OP, self.dtype(), T, {
            let frequencies = frequencies.values::<T>()?;
            cpu::for_rows(y.values_mut::<T>()?, 2 * half, 64 * half, |row, rows| {
                for (index, y) in rows.chunks_exact_mut(2 * half).enumerate() {
                    let position = (first + row + index) as f64;
                    let (sines, cosines) = y.split_at_mut(half);
                    for ((sine, cosine), f) in sines.iter_mut().zip(cosines).zip(frequencies) {
                        let angle = position * f.to_acc().to_f64();
                        *sine = T::from_f64(libm::sin(angle));
                        *cosine = T::from_f64(libm::cos(angle));
                    }
                }
            });
            Ok(())
        })?;
        Ok(y)
    }
}

struct RelativePositionBiasBackward {
    buckets: Buckets,
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
        let diagonals = self.buckets.diagonals(queries, keys);
        let mut table = Tensor::zeros([heads, self.buckets.count], grad.dtype(), grad.device())?;
        dispatch_float!(self.name(), grad.dtype(), T, {
            let scale = <T as Float>::Acc::from_f64(self.scale);
            let g = grad.values::<T>()?;
            let count = self.buckets.count;
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
