//! Kernel launches: the forward pass, and two variants of the backward pass.

use super::{Form, Spec, backward::NormBackward, forward::Forward, packed, reuse, rows};
use crate::{
    DType, Result, Tensor,
    device::{Gpu, Grid, args, size32},
    shape::Shape,
};

impl Forward {
    pub(super) fn cuda(&mut self, gpu: &dyn Gpu, x: &Tensor, residual: Option<&Tensor>, spec: &Spec) -> Result<()> {
        let (rows, columns) = (rows(x)?, x.dim(-1)?);
        let (weight, bias) = (packed(spec.weight)?, packed(spec.bias)?);
        let weights = weight.as_ref().map_or(0, Tensor::numel);
        let form = spec.form.code();
        let args = args![
            &mut self.y,
            self.sum.as_mut(),
            &mut self.statistics,
            x,
            residual,
            weight.as_ref(),
            bias.as_ref(),
            rows as i64,
            size32(columns)?,
            size32(weights)?,
            form,
            spec.eps
        ];
        gpu.kernel("norm_fwd", &[("DTYPE", x.dtype().name())])?.launch(Grid::held_rows(rows, columns, x.dtype()), args)
    }
}

/// Minimum number of rows per chunk of the sums for weight and bias on a GPU, and maximum number of chunks: two for
/// each multiprocessor of a large card, which also bounds their memory.
const ROWS_PER_CHUNK: usize = 8;
const MOST_CHUNKS: usize = 264;

/// Returns the threads per row and rows per block of `norm_bwd_whole`, in which each thread handles a packet of columns
/// and four rows at once; `None` for rows that it does not support.
fn whole_threads(columns: usize, dtype: DType) -> Option<(usize, usize)> {
    const MOST_THREADS: usize = 512;
    let lanes = 16 / dtype.size();
    let threads = columns.div_ceil(lanes).next_multiple_of(32).max(32);
    (columns.is_multiple_of(lanes) && threads <= MOST_THREADS).then_some((threads, (256 / threads).max(1)))
}

/// Returns the same values, aligned for reads of 16-byte packets.
fn aligned(x: &Tensor) -> Result<Tensor> {
    if x.address()?.get().is_multiple_of(16) { Ok(x.clone()) } else { x.packed_copy() }
}

impl NormBackward {
    /// Computes [`NormBackward::backward_rows`] on a GPU.
    pub(super) fn backward_cuda(
        &self,
        gpu: &dyn Gpu,
        grad: Tensor,
        wanted: (bool, bool),
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Self { x, statistics, eps, .. } = self;
        let (rows, columns) = (rows(x)?, x.dim(-1)?);
        let (centred, dtype) = (u32::from(self.form == Form::Centred), [("DTYPE", x.dtype().name())]);
        let (weight, onto) = (packed(self.weight.as_ref())?, packed(self.onto.as_ref())?);
        let (weight, onto) = (weight.as_ref(), onto.as_ref());
        let weights = size32(weight.map_or(0, Tensor::numel))?;
        let sizes = (rows as i64, size32(columns)?);
        let whole = if wanted == (true, true) { whole_threads(columns, x.dtype()) } else { None };
        let at_once = whole.map_or(1, |(_, groups)| 4 * groups);
        let rows_per_chunk = rows.div_ceil(MOST_CHUNKS).max(ROWS_PER_CHUNK).next_multiple_of(at_once);
        let (chunks, per_chunk) = (rows.div_ceil(rows_per_chunk), rows_per_chunk as i64);
        let sums = || Tensor::uninit(Shape::new(&[chunks, 2 * columns])?, statistics.dtype(), x.device());

        let (mut dx, source) = reuse(grad)?;
        if let Some((threads, groups)) = whole {
            let (x, onto) = (aligned(x)?, onto.map(aligned).transpose()?);
            let (mut dx, source) = match source {
                Some(source) => (dx, Some(aligned(&source)?)),
                None if dx.address()?.get().is_multiple_of(16) => (dx, None),
                None => (x.uninit_like()?, Some(dx.packed_copy()?)),
            };
            let mut partials = sums()?;
            let grid = Grid::new([size32(chunks)?, 1, 1], [threads as u32, groups as u32, 1]);
            let args = args![
                &mut dx,
                &mut partials,
                &x,
                source.as_ref().unwrap_or(&dx),
                onto.as_ref(),
                weight,
                statistics,
                sizes.0,
                per_chunk,
                sizes.1,
                weights,
                centred,
                *eps
            ];
            gpu.kernel("norm_bwd_whole", &dtype)?.launch(grid, args)?;
            return Ok((Some(dx), Some(partials)));
        }
        // The sums first: the gradient of the output may be overwritten afterwards.
        let partials = wanted.1.then(|| {
            let mut partials = sums()?;
            let grid = Grid::columns(columns, chunks, x.dtype());
            let g = source.as_ref().unwrap_or(&dx);
            let args = args![&mut partials, x, g, statistics, sizes.0, per_chunk, sizes.1, centred];
            gpu.kernel("norm_bwd_sums", &dtype)?.launch(grid, args)?;
            Ok(partials)
        });
        let partials = partials.transpose()?;
        if !wanted.0 {
            return Ok((None, partials));
        }
        let args = args![
            &mut dx,
            x,
            source.as_ref().unwrap_or(&dx),
            onto,
            weight,
            statistics,
            sizes.0,
            sizes.1,
            weights,
            centred,
            *eps
        ];
        gpu.kernel("norm_bwd", &dtype)?.launch(Grid::held_rows(rows, columns, x.dtype()), args)?;
        Ok((Some(dx), partials))
    }
}
