//! Embedding lookup.

use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, record},
    device::{Arg, Gpu, Grid, args, cpu, simd::vectorized, size32},
    dtype::{Float, Real, dispatch_float},
    error::ensure,
    shape::Shape,
};

impl Tensor {
    /// Looks up rows of this table: `y[.., j] = table[indices[..], j]`.
    ///
    /// Shapes: table `[tokens, dim]`, indices `[..]` of [`DType::I64`] → `[.., dim]`. Saves: the indices. The gradient
    /// of a row is the sum over its uses in order, in f32 (f64 for f64).
    ///
    /// Errors: an index outside of the table ([`ErrorKind::Index`](crate::ErrorKind::Index); on a GPU when values are
    /// next read back), a table that is not a float matrix, indices of another dtype or of rank 6.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// # fn main() -> x_transformers::Result<()> {
    /// let table = Tensor::from_slice(&[0.0f32, 0.5, 1.0, 1.5], [2, 2], &Device::Cpu)?;
    /// let tokens = Tensor::from_slice(&[1i64, 0, 1], [3], &Device::Cpu)?;
    /// assert_eq!(table.embedding(&tokens)?.to_vec::<f32>()?, [1.0, 1.5, 0.0, 0.5, 1.0, 1.5]);
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "index_select")]
    #[doc(alias = "gather")]
    pub fn embedding(&self, indices: &Tensor) -> Result<Tensor> {
        const OP: &str = "embedding";
        let &[tokens, dim] = &**self.shape() else {
            return Err(Error::shape(
                OP,
                format_args!("expected a table of shape [tokens, dim], got {:?}", self.shape()),
            ));
        };
        self.dtype().expect_float(OP)?;
        ensure!(
            indices.dtype() == DType::I64,
            Error::dtype(OP, format_args!("expected indices of i64, got {}", indices.dtype()))
        );
        ensure!(
            self.device() == indices.device(),
            Error::device(
                OP,
                format_args!(
                    "the table is on {} but the indices are on {}; move one with `to_device`",
                    self.device(),
                    indices.device()
                )
            )
        );
        let (table, indices) = (self.contiguous()?, indices.contiguous()?);
        let shape = Shape::new(&[&**indices.shape(), &[dim]].concat())?;
        let mut y = Tensor::uninit(shape, table.dtype(), table.device())?;
        match table.device() {
            Device::Cpu => dispatch_float!(OP, table.dtype(), T, {
                let (table, at) = (table.values::<T>()?, indices.values::<i64>()?);
                // A negative index becomes a large number.
                if let Some(&index) = at.iter().find(|&&index| index as u64 >= tokens as u64) {
                    return Err(Error::index(OP, "token", index, tokens));
                }
                cpu::for_rows(y.values_mut::<T>()?, dim, dim, |row, y| {
                    for (y, &index) in y.chunks_exact_mut(dim).zip(&at[row..]) {
                        y.copy_from_slice(&table[index as usize * dim..][..dim]);
                    }
                });
                Ok(())
            })?,
            Device::Gpu(gpu) => {
                let (count, sizes) = (indices.numel(), (tokens as i64, size32(dim)?));
                gpu.kernel("embedding_fwd", &[("DTYPE", table.dtype().name())])?.launch(
                    Grid::rows(count, dim),
                    args![&mut y, Arg::Output(gpu.faults()), &table, &indices, count as i64, sizes.0, sizes.1],
                )?;
            }
        }
        record(OP, y, &[&table], |_| EmbeddingBackward { indices: indices.clone(), shape: *table.shape() })
    }
}

struct EmbeddingBackward {
    indices: Tensor,
    /// Shape of the table.
    shape: Shape,
}

impl Backward for EmbeddingBackward {
    fn name(&self) -> &'static str {
        "embedding"
    }

    /// Computes `dtable[t] = Σ g[i]` over the positions `i` that hold `t`, in their order.
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let grad = grad.contiguous()?;
        let (tokens, dim) = (self.shape[0], self.shape[1]);
        let mut dtable = Tensor::uninit(self.shape, grad.dtype(), grad.device())?;
        match grad.device() {
            Device::Cpu => dispatch_float!("embedding", grad.dtype(), T, {
                let g = grad.values::<T>()?;
                // Each task owns rows of the table, so that no two threads add to one row.
                let uses = Uses::new(self.indices.values::<i64>()?, tokens);
                let uses_per_token = uses.positions.len().div_ceil(tokens.max(1));
                cpu::for_rows(dtable.values_mut::<T>()?, dim, dim * (1 + uses_per_token), |row, dtable| {
                    let mut sum = vec![<T as Float>::Acc::ZERO; dim];
                    for (token, dtable) in dtable.chunks_exact_mut(dim).enumerate() {
                        add_up::<T>(g, uses.of(row + token), &mut sum, dtable);
                    }
                });
                Ok(())
            })?,
            Device::Gpu(gpu) => {
                let keys = sorted_keys(*gpu, &self.indices, tokens, grad.dtype())?;
                // Eight rows a block, and a packet of columns for each of 32 threads.
                let columns = dim.div_ceil(32 * 16 / grad.dtype().size());
                let grid =
                    Grid::new([tokens.div_ceil(8).min(1 << 20) as u32, columns.min(1 << 14) as u32, 1], [32, 8, 1]);
                let sizes = (self.indices.numel() as i64, tokens as i64, size32(dim)?);
                gpu.kernel("embedding_bwd", &[("DTYPE", grad.dtype().name())])?
                    .launch(grid, args![&mut dtable, &grad, &keys, sizes.0, sizes.1, sizes.2])?;
            }
        }
        Ok(InputGrads::one(dtable))
    }
}

/// Returns keys `token · 2³² + position`, sorted: the uses of each token are adjacent and in order.
fn sorted_keys(gpu: &dyn Gpu, indices: &Tensor, tokens: usize, dtype: DType) -> Result<Tensor> {
    /// Number of keys that a block sorts, as in `kernels/embedding.cu`.
    const TILE: usize = 2048;
    let option = [("DTYPE", dtype.name())];
    let (count, tokens) = (size32(indices.numel())?, size32(tokens)?);
    let padded = (count as usize).next_power_of_two().max(TILE);
    let mut keys = Tensor::uninit(Shape::new(&[padded])?, DType::I64, indices.device())?;
    let tiles = Grid::new([(padded / TILE).min(1 << 14) as u32, 1, 1], [512, 1, 1]);
    gpu.kernel("embedding_sort_tiles", &option)?
        .launch(tiles, args![&mut keys, indices, count as i64, padded as i64, tokens as i64])?;
    let (step, merge) = (gpu.kernel("embedding_sort_step", &option)?, gpu.kernel("embedding_sort_merge", &option)?);
    let mut size = 2 * TILE;
    while size <= padded {
        let mut distance = size / 2;
        while distance >= TILE {
            step.launch(Grid::elements(padded / 2), args![&mut keys, padded as i64, size as i64, distance as i64])?;
            distance /= 2;
        }
        merge.launch(tiles, args![&mut keys, padded as i64, size as i64])?;
        size *= 2;
    }
    Ok(keys)
}

/// Positions of each token, in order.
struct Uses {
    positions: Vec<usize>,
    /// End of each token's positions.
    ends: Vec<usize>,
}

impl Uses {
    /// Sorts by counting, which keeps the order within a token.
    fn new(indices: &[i64], tokens: usize) -> Self {
        let mut ends = vec![0; tokens];
        for &index in indices {
            ends[index as usize] += 1;
        }
        let mut start = 0;
        for end in &mut ends {
            start += std::mem::replace(end, start);
        }
        // Each entry is where its token's next position goes, and so becomes the end.
        let mut positions = vec![0; indices.len()];
        for (position, &index) in indices.iter().enumerate() {
            positions[ends[index as usize]] = position;
            ends[index as usize] += 1;
        }
        Self { positions, ends }
    }

    fn of(&self, token: usize) -> &[usize] {
        let start = token.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.positions[start..self.ends[token]]
    }
}

vectorized! {
    /// Computes `out = Σ g[position]`; `sum` is scratch of the same width.
    fn add_up<T: Float>(g: &[T], positions: &[usize], sum: &mut [T::Acc], out: &mut [T]) {
        if positions.is_empty() {
            return out.fill(T::from_acc(T::Acc::ZERO));
        }
        sum.fill(T::Acc::ZERO);
        let width = sum.len();
        for &position in positions {
            for (sum, g) in sum.iter_mut().zip(&g[position * width..][..width]) {
                *sum += g.to_acc();
            }
        }
        for (out, &sum) in out.iter_mut().zip(&*sum) {
            *out = T::from_acc(sum);
        }
    }
}
