//! Biases of scores from the content of the tokens: forgetting, weighed curves of the distance, contextual positions.

use std::borrow::Cow;

use super::{Attention, AttentionInput};
use crate::{
    DType, Error, Init, Param, ParamStore, Result, Tensor,
    config::{AttentionPlan, Forget},
    error::{ErrorContext, ensure},
    nn::Linear,
};

/// Parameters of these biases.
#[derive(Clone, Debug, Default)]
pub(super) struct ContentBias {
    /// Gates of tokens (Lin et al., <https://openreview.net/forum?id=q2Lnyegkr8>).
    to_forget_gates: Option<Linear>,
    /// Weights of curves, and the curves, `[curves, distances]`.
    curves: Option<(Linear, Param)>,
    /// Learned positions, `[positions, d]`, and the mixture of scores across heads, `[heads, heads, 1, 1]`.
    cope: Option<(Param, Option<Param>)>,
}

impl ContentBias {
    pub fn new(plan: &AttentionPlan, store: &ParamStore) -> Result<Self> {
        let (dim, heads) = (plan.dim, plan.heads);
        let gates = store.at("data_dependent_alibi").at("to_forget_gates").at(0);
        let to_forget_gates = match plan.forget {
            Forget::None => None,
            Forget::Tokens => {
                let (width, init) = (if plan.causal { heads } else { 2 * heads }, Init::linear(dim));
                Some(Linear::with_init(&gates, dim, width, init, Some(Init::Constant(5.0)))?)
            }
            Forget::Rows(width) => Some(Linear::without_bias(&gates, dim, 2 * heads * width)?),
        };
        let curves = |[count, length]: [usize; 2]| -> Result<(Linear, Param)> {
            let place = store.at("rel_proj_pos_bias");
            let to_weights = Linear::new(&place.at("to_distance_weights").at(0), dim, heads * count)?;
            Ok((to_weights, place.param("distance_bank", [count, length], Init::Normal(0.02))?))
        };
        let place = store.at("attend").at("cope");
        let cope = match plan.cope {
            None => None,
            Some(cope) => {
                let table = place.param("pos_emb", [cope.positions, plan.dim_head], Init::Constant(0.0))?;
                let init = Init::linear(heads);
                let mixing = || place.at("talking_heads").param("weight", [heads, heads, 1, 1], init);
                Some((table, cope.talking.then(mixing).transpose()?))
            }
        };
        Ok(Self { to_forget_gates, curves: plan.rel_proj.map(curves).transpose()?, cope })
    }
}

/// Computes `ln sigmoid(x)`.
pub(crate) fn log_sigmoid(x: &Tensor) -> Result<Tensor> {
    // At +∞ the difference below is NaN; the result is 0.
    let infinite = x.detach().eq(&Tensor::full((), f64::INFINITY, x.dtype(), x.device())?)?;
    let x = x.masked_fill(&infinite, 0.0)?;
    // x/2 − |x|/2 is min(x, 0), but has the slope of the sigmoid at 0, where relu has none.
    let size = x.relu()?.add(&x.neg()?.relu()?)?;
    let below = x.affine(0.5, 0.0)?.sub(&size.affine(0.5, 0.0)?)?;
    below.sub(&size.neg()?.exp()?.affine(1.0, 1.0)?.ln()?)?.masked_fill(&infinite, 0.0)
}

/// Returns a matrix `[rows, columns]` of ones where the closure says so, and zeros.
fn ones_where(shape: [usize; 2], like: &Tensor, one: impl Fn(usize, usize) -> bool) -> Result<Tensor> {
    let columns = shape[1].max(1);
    let value = |at: usize| f64::from(u8::from(one(at / columns, at % columns)));
    Tensor::generate(shape, like.dtype(), like.device(), value)
}

impl Attention {
    /// Adds the biases that depend on the layer's input `x`, for scores of `i` queries and `j` keys without memory
    /// key/values.
    pub(super) fn with_content_bias<'i>(
        &self,
        x: &Tensor,
        j: usize,
        input: &'i AttentionInput,
    ) -> Result<Cow<'i, AttentionInput>> {
        let mut added: Option<Tensor> = None;
        if self.content.to_forget_gates.is_some() {
            ensure!(
                input.dense_bias.is_none() && j == x.dim(1)?,
                Error::option("attn_data_dependent_alibi", "cannot be used with `attn_bias` or `mems`")
            );
            added = Some(self.forgetting(x).context("data_dependent_alibi")?);
        }
        if let Some((to_weights, bank)) = &self.content.curves {
            let curves = self.weighed_curves(x, j, to_weights, bank).context("rel_proj_pos_bias")?;
            added = Some(match added {
                Some(added) => added.add(&curves)?,
                None => curves,
            });
        }
        let Some(mut bias) = added else { return Ok(Cow::Borrowed(input)) };
        let mut input = input.clone();
        if let Some(given) = input.bias.take() {
            bias = bias.add(&given.dense(x.dim(1)?, j, x.dtype())?)?;
        }
        if let Some(given) = input.dense_bias.take() {
            bias = bias.add(&given)?;
        }
        input.dense_bias = Some(bias);
        Ok(Cow::Owned(input))
    }

    /// Returns the sums of the logarithms of gates between queries and keys, `[b, heads, n, n]`.
    fn forgetting(&self, x: &Tensor) -> Result<Tensor> {
        let Some(to_gates) = &self.content.to_forget_gates else { return Err(Error::argument("gates", "are missing")) };
        let (b, n, heads) = (x.dim(0)?, x.dim(1)?, self.plan.heads);
        let gates = to_gates.forward(x).context("to_forget_gates.0")?;
        if let Forget::Rows(width) = self.plan.forget {
            let parts = gates.reshape([b, n, 2, heads, width])?.permute(&[2, 0, 3, 1, 4])?;
            let (q, k) = (parts.select(0, 0)?.contiguous()?, parts.select(0, 1)?.contiguous()?);
            let scores = q.affine((width as f64).powf(-0.5), 0.0)?.matmul(&k.transpose(-1, -2)?)?;
            let earlier = log_sigmoid(&scores)?.mul(&ones_where([n, n], x, |row, column| column < row)?)?;
            // Sums from each key on.
            return earlier.matmul(&ones_where([n, n], x, |row, column| row >= column)?);
        }
        // Sums up to each token.
        let logs = log_sigmoid(&gates.transpose(1, 2)?.contiguous()?)?;
        let sums = logs.matmul(&ones_where([n, n], x, |row, column| row <= column)?)?;
        let between = |first: usize| -> Result<Tensor> {
            let sums = sums.narrow(1, first, heads)?;
            sums.unsqueeze(-1)?.sub(&sums.unsqueeze(-2)?)
        };
        if self.plan.causal {
            return between(0);
        }
        let before = between(0)?.mul(&ones_where([n, n], x, |row, column| column <= row)?)?;
        before.sub(&between(heads)?.mul(&ones_where([n, n], x, |row, column| column >= row)?)?)
    }

    /// Returns the curves of the distance that queries weigh, `[b, heads, i, j]`.
    fn weighed_curves(&self, x: &Tensor, j: usize, to_weights: &Linear, bank: &Param) -> Result<Tensor> {
        let (b, i, heads) = (x.dim(0)?, x.dim(1)?, self.plan.heads);
        let bank = bank.tensor();
        let (count, length) = (bank.dim(0)?, bank.dim(1)?);
        // One more curve value, 0, for distances without bias.
        let zero = Tensor::zeros([1, count], bank.dtype(), bank.device())?;
        let table = Tensor::cat(&[&bank.transpose(0, 1)?, &zero], 0)?;
        let distance = |at: usize| {
            // A context may be shorter than the queries, whose positions then begin below 0.
            let (query, key) = (at / j + j, at % j + i);
            query.checked_sub(key).filter(|&distance| distance < length).unwrap_or(length) as i64
        };
        let index = Tensor::from_vec((0..i * j).map(distance).collect(), [i, j], x.device())?;
        // [i, j, count]
        let curves = table.embedding(&index)?;
        let weights = to_weights.forward(x).context("to_distance_weights.0")?.reshape([b, i, heads, count])?;
        let weights = weights.permute(&[1, 0, 2, 3])?.reshape([i, b * heads, count])?;
        weights.matmul(&curves.transpose(-1, -2)?)?.reshape([i, b, heads, j])?.permute(&[1, 2, 0, 3])?.contiguous()
    }

    /// Adds contextual positions to masked scores `[b, heads, i, j]` (Golovneva et al.,
    /// <https://arxiv.org/abs/2405.18719>): a key's position is the sum of the sigmoids of its score and of those after
    /// it.
    pub(super) fn with_contextual_positions(&self, q: &Tensor, scores: Tensor) -> Result<Tensor> {
        let (Some((table, mixing)), Some(plan)) = (&self.content.cope, self.plan.cope) else { return Ok(scores) };
        let (i, j) = (scores.dim(2)?, scores.dim(3)?);
        let mut gates = scores.clone();
        if let Some(mixing) = mixing {
            let later = ones_where([i, j], &gates, |row, column| column > row + j - i)?.to_dtype(DType::Bool)?;
            gates = self.convolve_heads(&gates, mixing)?.masked_fill(&later, gates.dtype().lowest())?;
        }
        let sums = gates.sigmoid()?.matmul(&ones_where([j, j], q, |row, column| row >= column)?)?;
        let last = plan.positions as f64 - 1.0;
        let positions = sums.sub(&sums.affine(1.0, -last)?.relu()?)?.unsqueeze(-1)?;
        let whole = Tensor::generate([plan.positions], q.dtype(), q.device(), |at| at as f64)?;
        let offset = positions.sub(&whole)?;
        let distance = offset.relu()?.add(&offset.neg()?.relu()?)?;
        // The two nearest positions, interpolated.
        let weights = distance.affine(-1.0, 1.0)?.relu()?;
        // [b, heads, i, positions]
        let table = self.pairs_as_halves(table.tensor())?;
        let of_positions = q.matmul(&table.transpose(0, 1)?)?;
        let added = weights.matmul(&of_positions.unsqueeze(-1)?)?.squeeze(-1)?;
        scores.add(&added)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Tape};

    #[test]
    fn log_sigmoid_is_finite_at_infinity() -> Result<()> {
        let x = Tensor::from_slice(&[f64::INFINITY, 0.0, f64::NEG_INFINITY, 2.0], [4], &Device::Cpu)?;
        let x = x.requires_grad()?;
        let mut tape = Tape::grad();
        let y = log_sigmoid(&x)?;
        let values = y.to_vec::<f64>()?;
        assert_eq!([values[0], values[2]], [0.0, f64::NEG_INFINITY]);
        assert!((values[1] + std::f64::consts::LN_2).abs() < 1e-14, "{values:?}");
        assert!((values[3] + (-2f64).exp().ln_1p()).abs() < 1e-14, "{values:?}");
        let grads = tape.backward(&y.narrow(0, 0, 2)?.sum(&[])?)?;
        let grad = grads.get(&x).map(Tensor::to_vec::<f64>).transpose()?;
        assert_eq!(grad.map(|grad| [grad[0], grad[1]]), Some([0.0, 0.5]));
        Ok(())
    }
}
