//! Kernel launches of sampling.

use super::{Choice, SampleFilter};
use crate::{
    DType, Result, Tensor,
    device::{Arg, Gpu, Grid, args, size32},
    shape::Shape,
};

impl Choice {
    pub(super) fn launch(&self, gpu: &dyn Gpu, x: &Tensor, step: &Tensor, tokens: &mut Tensor) -> Result<()> {
        let Self { filter, scale, seed, columns, unit } = *self;
        let (rows, columns) = (x.shape()[0], size32(columns)?);
        // One block per row, up to the limit of the grid.
        let grid = Grid::new([rows.min(1 << 14) as u32, 1, 1], [512, 1, 1]);
        let dtype = [("DTYPE", x.dtype().name())];
        let mut totals = None;
        let mut numbers = (0, 0, 0u64, 0.0, 0.0);
        match filter {
            SampleFilter::All => {}
            SampleFilter::Best(count) => numbers = (1, 0, count as u64, 0.0, 0.0),
            SampleFilter::MassUpTo(mass) => numbers = (2, 1, 0, mass, 0.0),
            SampleFilter::MassBelow(mass) => numbers = (2, 0, 0, mass, 0.0),
            SampleFilter::TopA { power, ratio } => {
                let totals = totals.insert(Tensor::uninit(Shape::new(&[rows])?, DType::I64, x.device())?);
                let args = args![totals, x, rows as i64, columns, unit];
                gpu.kernel("sample_totals", &dtype)?.launch(grid, args)?;
                numbers = (3, 0, 0, ratio, power);
            }
            SampleFilter::MinP(ratio) => numbers = (4, 0, 0, ratio, 0.0),
            SampleFilter::Entmax => numbers = (5, 0, 0, 0.0, 0.0),
        }
        let (filter, closed, count, limit, power) = numbers;
        gpu.kernel("sample_token", &dtype)?.launch(
            grid,
            args![
                tokens,
                Arg::Output(gpu.faults()),
                x,
                totals.as_ref(),
                step,
                rows as i64,
                columns,
                filter,
                closed,
                count,
                seed,
                scale,
                limit,
                power,
                unit
            ],
        )
    }
}
