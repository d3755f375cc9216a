//! Low-rank updates of linear layers.

use std::ops::Range;

use super::Linear;
use crate::{Param, Result, Tensor, collect::CollectVec};

/// Low-rank update of a linear layer's weight `W [out, in]`: `W + scale · B A` with `A [r, in]` and `B [out, r]` (LoRA,
/// Hu et al., <https://arxiv.org/abs/2106.09685>).
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

    /// Returns these rows of the weight with `scale · B A` added, in the type that sums have; `weight` are those
    /// without.
    fn updated(&self, weight: &Tensor) -> Result<Tensor> {
        let wide = weight.detach().to_dtype(weight.dtype().accumulator())?;
        let [b, a] = [&self.b, &self.a].map(|param| param.tensor().detach().to_dtype(wide.dtype()));
        wide.add(&b?.matmul(&a?)?.affine(self.scale, 0.0)?)
    }

    /// Returns these rows with the update and, with a magnitude, of its lengths, `[rows, in]`.
    fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        let mut updated = self.updated(weight)?;
        if let Some(magnitude) = &self.magnitude {
            let factors = magnitude.tensor().detach().to_dtype(updated.dtype())?.div(&lengths(&updated)?)?;
            updated = updated.mul(&factors.unsqueeze(1)?)?;
        }
        updated.to_dtype(weight.dtype())
    }

    /// Returns the factors by which DoRA multiplies the rows of the product, `[rows]`. The lengths are constants, as in
    /// the paper's section 4.3: gradients pass through the magnitude alone.
    fn factors(&self, magnitude: &Param, weight: &Tensor) -> Result<Tensor> {
        let magnitude = magnitude.tensor();
        magnitude.div(&lengths(&self.updated(weight)?)?.to_dtype(magnitude.dtype())?)
    }
}

/// Returns the length of each row of a matrix.
pub(crate) fn lengths(matrix: &Tensor) -> Result<Tensor> {
    matrix.square()?.sum(&[-1])?.sqrt()
}

impl Lora {
    /// Returns the output of a layer without bias, `[.., out]`; `y` is that without the update.
    pub fn apply(&self, layer: &Linear, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let dropped = x.dropout(self.dropout)?;
        // DoRA needs the weight, of which a packed one is dequantised.
        let scales = self.parts.iter().any(|part| part.magnitude.is_some());
        let weight = if scales { Some(layer.weight()?.detach()) } else { None };
        self.by_rows(y, -1, |part, own| {
            let update = part.update(&dropped)?;
            let (Some(magnitude), Some(weight)) = (&part.magnitude, &weight) else { return own.add(&update) };
            let weight = weight.narrow(0, part.rows.start, part.rows.len())?;
            let factors = part.factors(magnitude, &weight)?;
            // Of an input with dropout the product itself keeps the whole one, as in PEFT.
            let base = if self.dropout > 0.0 { dropped.linear(&weight, None)? } else { own.clone() };
            own.add(&base.mul(&factors.affine(1.0, -1.0)?)?)?.add(&update.mul(&factors)?)
        })
    }

    /// Returns the weight with all updates.
    pub fn merged(&self, weight: &Tensor) -> Result<Tensor> {
        self.by_rows(&weight.detach(), 0, LoraPart::merged)
    }

    /// Replaces the rows of each part, which lie along `dim`, by what `f` returns for them; the others stay.
    fn by_rows(&self, whole: &Tensor, dim: isize, f: impl Fn(&LoraPart, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let size = whole.dim(dim)?;
        let (mut pieces, mut at) = (Vec::new(), 0);
        for part in &self.parts {
            if at < part.rows.start {
                pieces.push(whole.narrow(dim, at, part.rows.start - at)?);
            }
            pieces.push(f(part, &whole.narrow(dim, part.rows.start, part.rows.len())?)?);
            at = part.rows.end;
        }
        if at < size {
            pieces.push(whole.narrow(dim, at, size - at)?);
        }
        let pieces: Vec<&Tensor> = pieces.iter().collect_vec();
        if let [one] = pieces[..] { Ok(one.clone()) } else { Tensor::cat(&pieces, dim) }
    }
}
