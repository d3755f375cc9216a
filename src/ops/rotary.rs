//! Rotary position embedding.

use super::norm::reuse;
use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{Backward, InputGrads, discrete, record},
    device::{
        Gpu, Grid, args, cpu,
        floats::Floats,
        rows::{Out, Sums, for_rows_of},
        simd::vectorized,
        size32,
    },
    dtype::{Float, Real, dispatch_float, dispatch_real},
    error::ensure,
    shape::{Layout, Shape},
    tensor::Storage,
};

impl Tensor {
    /// Rotates pairs of features by angles that grow with the position (Su et al., RoFormer,
    /// <https://arxiv.org/abs/2104.09864>): feature `k` and feature `k + r/2` by `position · inv_freq[k]`.
    ///
    /// Shapes: `[.., position, d]`, usually `[batch, heads, position, d]`, and `inv_freq` `[r/2]` with `r ≤ d`, of any
    /// float dtype → the shape of the input. Positions count from `first_position`; features from `r` on are unchanged.
    /// Angles, sines and cosines are computed in f64 and rounded once. Saves: the frequencies.
    ///
    /// Errors: rank below 2, frequencies that are not a vector, are more than half of the features or require a
    /// gradient, or a dtype that is not float.
    ///
    /// ```
    /// use x_transformers::{Device, Tensor};
    /// # fn main() -> x_transformers::Result<()> {
    /// let x = Tensor::from_slice(&[1.0f64, 0.0, 7.0, 1.0, 0.0, 7.0], [2, 3], &Device::Cpu)?;
    /// let quarter_turn = Tensor::from_slice(&[std::f64::consts::FRAC_PI_2], [1], &Device::Cpu)?;
    /// let y = x.rotary(&quarter_turn, 0)?.to_vec::<f64>()?;
    /// assert_eq!(y[..3], [1.0, 0.0, 7.0]);
    /// assert!(y[3].abs() < 1e-15 && y[4] == 1.0 && y[5] == 7.0);
    /// # Ok(())
    /// # }
    /// ```
    #[doc(alias = "rope")]
    pub fn rotary(&self, inv_freq: &Tensor, first_position: usize) -> Result<Tensor> {
        const OP: &str = "rotary";
        let (rank, shape) = (self.rank(), self.shape());
        ensure!(rank >= 2, Error::shape(OP, format_args!("expected at least [position, d], got {shape:?}")));
        ensure!(
            inv_freq.rank() == 1 && 2 * inv_freq.numel() <= shape[rank - 1],
            Error::shape(
                OP,
                format_args!(
                    "expected inv_freq of shape [r/2] with r at most {} (the last dimension of {shape:?}), got {:?}",
                    shape[rank - 1],
                    inv_freq.shape()
                )
            )
        );
        for tensor in [self, inv_freq] {
            let dtype = tensor.dtype();
            ensure!(dtype.is_float(), Error::dtype(OP, format_args!("expected float tensors, got {dtype}")));
        }
        ensure!(
            self.device() == inv_freq.device(),
            Error::device(
                OP,
                format_args!(
                    "the input is on {} but inv_freq is on {}; move one with `to_device`",
                    self.device(),
                    inv_freq.device()
                )
            )
        );
        discrete(OP, &[inv_freq])?;
        let turn = Turn { inv_freq: inv_freq.detach().contiguous()?, first_position };
        // Heads that are still interleaved after a projection are packed on the way.
        let x = if self.layout().has_packed_rows() { self.clone() } else { self.contiguous()? };
        let mut y = x.uninit_like()?;
        turn.apply(Some(&x), 1.0, &mut y)?;
        record(OP, y, &[&x], |_| RotaryBackward { turn })
    }
}

/// Returns the table that [`Tensor::rotary`] rotates by: for each of the first positions the cosines of all
/// frequencies, then the sines, `[positions, 2 · frequencies]` in f32 or f64.
///
/// Errors: frequencies that are not a vector of floats, or out of memory.
pub(crate) fn rotary_table(inv_freq: &Tensor, positions: usize, dtype: DType) -> Result<Tensor> {
    ensure!(
        inv_freq.rank() == 1 && inv_freq.dtype().is_float(),
        Error::shape("rotary", format_args!("expected inv_freq of shape [r/2], got {:?}", inv_freq.shape()))
    );
    let turn = Turn { inv_freq: inv_freq.detach().contiguous()?, first_position: 0 };
    match *inv_freq.device() {
        Device::Gpu(gpu) => turn.table_cuda(gpu, positions, dtype, 1.0),
        Device::Cpu => dispatch_float!("rotary", dtype, T, {
            let table = turn.table::<<T as Float>::Acc>(positions, 1.0)?;
            Tensor::from_vec(table, [positions, 2 * inv_freq.numel()], &Device::Cpu)
        }),
    }
}

/// Angles of a rotation.
struct Turn {
    inv_freq: Tensor,
    first_position: usize,
}

impl Turn {
    /// Rotates `source`, or `out` in place, by the angle times `direction`.
    fn apply(&self, source: Option<&Tensor>, direction: f64, out: &mut Tensor) -> Result<()> {
        if let Device::Gpu(gpu) = *out.device() {
            return self.apply_cuda(gpu, source, direction, out);
        }
        let (positions, dim, pairs) = (out.dim(-2)?, out.dim(-1)?, self.inv_freq.numel());
        let dtype = out.dtype();
        let source = source.map(|x| Ok((x.stored_floats("rotary")?, x.layout()))).transpose()?;
        let values = out.floats_mut("rotary")?;
        let out = if source.is_some() { Out::new(values, dim) } else { Out::over(values, dim, None) };
        dispatch_real!(dtype, R, {
            let table = self.table::<R>(positions, direction)?;
            for_rows_of::<R, 1, 0>([out], [], Sums::none(), 4 * dim, &|first, [out], [], _| {
                if let Some((from, layout)) = source {
                    copy_rows(from, layout, first, dim, out);
                }
                rotate_rows::<R>(&table, pairs, positions, first, dim, out);
            });
        });
        Ok(())
    }

    fn apply_cuda(&self, gpu: &dyn Gpu, source: Option<&Tensor>, direction: f64, out: &mut Tensor) -> Result<()> {
        let (positions, dim, pairs) = (out.dim(-2)?, out.dim(-1)?, self.inv_freq.numel());
        let heads = if out.rank() > 2 { out.dim(-3)? } else { 1 };
        let outer = out.numel().checked_div(heads * positions * dim).unwrap_or(0);
        let table = self.table_cuda(gpu, positions, out.dtype().accumulator(), direction)?;
        let layout = *source.unwrap_or(out).layout();
        let storage = source.map(Storage);
        // Packets of a row, or single pairs.
        let lanes = 16 / out.dtype().size();
        let across = (dim - pairs).div_ceil(lanes).next_power_of_two().min(32);
        let at_once = 256 / across;
        let blocks = |n: usize| n.min(65_535) as u32;
        let grid = [blocks(positions.div_ceil(at_once)), blocks(heads.div_ceil(4)), blocks(outer)];
        let sizes = (outer as i64, size32(heads)?, size32(positions)?, size32(dim)?, size32(pairs)?);
        gpu.kernel("rotary_turn", &[("DTYPE", out.dtype().name())])?.launch(
            Grid::new(grid, [across as u32, at_once as u32, 1]),
            args![out, storage, &table, &layout, sizes.0, sizes.1, sizes.2, sizes.3, sizes.4],
        )
    }

    /// Computes [`Turn::table`] on a GPU, in this dtype.
    fn table_cuda(&self, gpu: &dyn Gpu, positions: usize, dtype: DType, direction: f64) -> Result<Tensor> {
        let pairs = self.inv_freq.numel();
        let mut table = Tensor::uninit(Shape::new(&[positions, 2 * pairs])?, dtype, self.inv_freq.device())?;
        let first = self.first_position as i64;
        gpu.kernel("rotary_table", &[("DTYPE", self.inv_freq.dtype().name()), ("TABLE", dtype.name())])?.launch(
            Grid::elements(positions * pairs),
            args![&mut table, &self.inv_freq, first, positions as i64, size32(pairs)?, direction],
        )?;
        Ok(table)
    }

    /// Computes for each position the cosines of all frequencies, then the sines.
    ///
    /// Position `64 a + b` comes from the exact values at `64 a` and at `b` by the addition theorem: it takes few
    /// evaluations of sine and cosine, and a value depends only on its position, not on where the call starts.
    fn table<R: Real>(&self, positions: usize, direction: f64) -> Result<Vec<R>> {
        const BLOCK: usize = 64;
        let inv_freq = self.inv_freq.to_f64_vec()?;
        let pairs = inv_freq.len();
        let angles =
            |position: f64| inv_freq.iter().map(move |&frequency| libm::sincos(direction * position * frequency));
        let near: Vec<(f64, f64)> = (0..BLOCK).flat_map(|position| angles(position as f64)).collect();
        let mut table = vec![R::ZERO; 2 * pairs * positions];
        cpu::for_rows(&mut table, 2 * pairs, 16 * pairs, |row, table| {
            let mut block = usize::MAX;
            let mut far = Vec::new();
            for (index, table) in table.chunks_exact_mut(2 * pairs).enumerate() {
                let position = self.first_position.saturating_add(row + index);
                if position / BLOCK != block {
                    block = position / BLOCK;
                    far = angles((block * BLOCK) as f64).collect();
                }
                let near = &near[position % BLOCK * pairs..][..pairs];
                let (cosines, sines) = table.split_at_mut(pairs);
                for (((cos, sin), a), b) in cosines.iter_mut().zip(sines).zip(&far).zip(near) {
                    *cos = R::from_f64(a.1 * b.1 - a.0 * b.0);
                    *sin = R::from_f64(a.0 * b.1 + a.1 * b.0);
                }
            }
        });
        Ok(table)
    }
}

/// Reads rows of a tensor whose rows are packed; `first` counts them over all dimensions but the last.
fn copy_rows<R: Real>(from: Floats, layout: &Layout, first: usize, width: usize, out: &mut [R]) {
    let positions = layout.shape[layout.shape.rank() - 2];
    let stride = layout.strides[layout.shape.rank() - 2];
    let mut start = 0;
    for (index, out) in out.chunks_exact_mut(width).enumerate() {
        // Along the position dimension a row is one stride after the previous one.
        let row = first + index;
        start = if index == 0 || row.is_multiple_of(positions) { layout.row_offset(row) } else { start + stride };
        from.range(start..start + width).read(out);
    }
}

vectorized! {
    fn rotate_rows<T: Float>(
        table: &[T::Acc],
        pairs: usize,
        positions: usize,
        first: usize,
        width: usize,
        out: &mut [T],
    ) {
        for (index, out) in out.chunks_exact_mut(width).enumerate() {
            let position = (first + index) % positions;
            let (cosines, sines) = table[2 * pairs * position..][..2 * pairs].split_at(pairs);
            let (a, b) = out[..2 * pairs].split_at_mut(pairs);
            for (((a, b), &cos), &sin) in a.iter_mut().zip(b).zip(cosines).zip(sines) {
                let (x, y) = (a.to_acc(), b.to_acc());
                *a = T::from_acc(x * cos - y * sin);
                *b = T::from_acc(y * cos + x * sin);
            }
        }
    }
}

struct RotaryBackward {
    turn: Turn,
}

impl Backward for RotaryBackward {
    fn name(&self) -> &'static str {
        "rotary"
    }

    /// The inverse of a rotation is its transpose: the gradient rotates back.
    fn backward(self: Box<Self>, grad: Tensor, _need: &[bool]) -> Result<InputGrads> {
        let (mut dx, source) = reuse(grad)?;
        self.turn.apply(source.as_ref(), -1.0, &mut dx)?;
        Ok(InputGrads::one(dx))
    }
}
