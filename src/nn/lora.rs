//! Low-rank updates of linear layers.

use std::ops::Range;

use super::Linear;
use crate::{Param, Result, Tensor, collect::CollectVec};

/// Low-rank update of a linear layer's weight `W [out, in]`: `W + scale · B A` with `A [r, in]` and `B [out, r]` (LoRA, Hu
/// et al., <https://arxiv.org/abs/2106.09685>).
///
/// A layer that computes several matrices of a checkpoint at once has an update for each, over its own rows.
#[derive(Clone, Debug)]
pub(crate) struct Lora {
    /// In the order of their rows, which do not overlap.
    pub parts: Vec<LoraPart>,
    /// Dropout of the update's input.
    pub dropout: f64,
}

/// Update of consecutive rows of a weight.
#[derive(Clone, Debug)]
pub(crate) struct LoraPart {
    pub rows: Range<usize>,
    /// `[r, in]`.
    pub a: Param,
    /// `[rows, r]`.
    pub b: Param,
    /// Length of each row of the updated weight, `[rows]` (DoRA, Liu et al., <https://arxiv.org/abs/2402.09353>).
    pub magnitude: Option<Param>,
    pub scale: f64,
}

impl LoraPart {
    /// Returns `scale · B A x`, `[.., rows]`.
    fn update(&self, x: &Tensor) -> Result<Tensor> {
        x.linear(&self.a.tensor(), None)?.affine(self.scale, 0.0)?.linear(&self.b.tensor(), None)
    }

    /// Returns the rows of the weight with the update, `[rows, in]`; `weight` are those without.
    pub fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        let wide = weight.detach().to_dtype(weight.dtype().accumulator())?;
        let product = |param: &Param| param.tensor().detach().to_dtype(wide.dtype());
        let updated = wide.add(&product(&self.b)?.matmul(&product(&self.a)?)?.affine(self.scale, 0.0)?)?;
        let updated = match &self.magnitude {
            None => updated,
            Some(magnitude) => {
                let factors = product(magnitude)?.div(&lengths(&updated)?)?;
                updated.mul(&factors.unsqueeze(1)?)?
            }
        };
        updated.to_dtype(weight.dtype())
    }

    /// Returns the factors by which DoRA multiplies the rows of the product, `[rows]`. The lengths are constants, as in the
    /// paper's section 4.3: gradients pass through the magnitude alone.
    fn factors(&self, magnitude: &Param, weight: &Tensor) -> Result<Tensor> {
        let dtype = magnitude.tensor().dtype();
        let wide = weight.detach().to_dtype(dtype.accumulator())?;
        let product = |param: &Param| param.tensor().detach().to_dtype(wide.dtype());
        let updated = wide.add(&product(&self.b)?.matmul(&product(&self.a)?)?.affine(self.scale, 0.0)?)?;
        magnitude.tensor().div(&lengths(&updated)?.to_dtype(dtype)?)
    }
}

/// Returns the length of each row of a matrix.
pub(crate) fn lengths(matrix: &Tensor) -> Result<Tensor> {
    matrix.square()?.sum(&[-1])?.sqrt()
}

impl Lora {
    /// Returns the output of a layer without bias, `[.., out]`; `y` is that without the update.
    pub fn apply(&self, layer: &Linear, x: &Tensor, y: Tensor) -> Result<Tensor> {
        let dropped = x.dropout(self.dropout)?;
        let (axis, width) = (y.rank() as isize - 1, y.shape()[y.rank() - 1]);
        let mut pieces = Vec::new();
        let mut at = 0;
        for part in &self.parts {
            if at < part.rows.start {
                pieces.push(y.narrow(axis, at, part.rows.start - at)?);
            }
            let own = y.narrow(axis, part.rows.start, part.rows.len())?;
            let update = part.update(&dropped)?;
            pieces.push(match &part.magnitude {
                None => own.add(&update)?,
                Some(magnitude) => {
                    let weight = layer.values()?.detach().narrow(0, part.rows.start, part.rows.len())?;
                    let factors = part.factors(magnitude, &weight)?;
                    // Of an input with dropout the product itself keeps the whole one, as in PEFT.
                    let base = if self.dropout > 0.0 { dropped.linear(&weight, None)? } else { own.clone() };
                    own.add(&base.mul(&factors.affine(1.0, -1.0)?)?)?.add(&update.mul(&factors)?)?
                }
            });
            at = part.rows.end;
        }
        if at < width {
            pieces.push(y.narrow(axis, at, width - at)?);
        }
        let pieces: Vec<&Tensor> = pieces.iter().collect_vec();
        if let [one] = pieces[..] { Ok(one.clone()) } else { Tensor::cat(&pieces, axis) }
    }

    /// Returns the weight with all updates.
    pub fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        let mut pieces = Vec::new();
        let mut at = 0;
        let rows = weight.dim(0)?;
        for part in &self.parts {
            if at < part.rows.start {
                pieces.push(weight.detach().narrow(0, at, part.rows.start - at)?);
            }
            pieces.push(part.merged(&weight.narrow(0, part.rows.start, part.rows.len())?)?);
            at = part.rows.end;
        }
        if at < rows {
            pieces.push(weight.detach().narrow(0, at, rows - at)?);
        }
        let pieces: Vec<&Tensor> = pieces.iter().collect_vec();
        Tensor::cat(&pieces, 0)
    }
}
