//! Projections from the input of a layer to queries, keys and values.

use super::{Attention, AttentionInput};
use crate::{Error, Result, Tensor, error::ErrorContext};

impl Attention {
    /// Returns the operands of the scores: queries `[b, heads, i, d]`, keys and values of `j` positions.
    pub(super) fn operands(&self, x: &Tensor, input: &AttentionInput) -> Result<[Tensor; 3]> {
        let [q, k, v] = self.project(x, input)?;
        let [q, k, v] = self.rotate(q, k, v)?;
        let [k, v] = self.prepend_memory(k, v)?;
        Ok([self.scale_queries(q)?, self.normalize_length(k)?, v])
    }

    /// Projects queries, keys and values of each head: `[b, heads, i, d]`, twice `[b, heads, j, d]`.
    pub(super) fn project(&self, x: &Tensor, input: &AttentionInput) -> Result<[Tensor; 3]> {
        let source = input.context.as_ref().unwrap_or(x);
        let source = match &input.mem {
            Some(mem) => Tensor::cat(&[mem, source], 1).context("mems")?,
            None => source.clone(),
        };
        let (mut queries, mut keys) = (x.clone(), source.clone());
        if let Some(sinusoids) = &input.sinusoids {
            let (i, j) = (x.dim(1)?, source.dim(1)?);
            queries = queries.add(&sinusoids.narrow(0, first_query(i, j)?, i)?)?;
            keys = keys.add(&sinusoids.narrow(0, 0, j)?)?;
        }
        let q = self.to_q.forward(&queries).context("to_q")?;
        let k = self.to_k.forward(&keys).context("to_k")?;
        let v = self.to_v.forward(&source).context("to_v")?;
        let k = if self.collab_mixing.is_some() { self.all_heads(&k.unsqueeze(1)?)? } else { self.split_heads(&k)? };
        Ok([self.queries(&q)?, k, self.split_heads(&v)?])
    }

    /// Returns the queries of each head, mixed from shared ones: `[b, n, width] → [b, heads, n, d]`.
    pub(super) fn queries(&self, q: &Tensor) -> Result<Tensor> {
        match &self.collab_mixing {
            None => self.split_heads(q),
            Some(mixing) => q.unsqueeze(1)?.mul(&mixing.tensor().unsqueeze(1)?),
        }
    }

    /// Splits heads: `[b, n, heads · d] → [b, heads, n, d]`; keys and values have their own number of heads.
    pub(super) fn split_heads(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, width) = (x.dim(0)?, x.dim(1)?, x.dim(2)?);
        x.reshape([b, n, width / self.plan.dim_head, self.plan.dim_head])?.transpose(1, 2)
    }

    /// Expands shared keys to all heads.
    pub(super) fn all_heads(&self, k: &Tensor) -> Result<Tensor> {
        if self.plan.shared.is_none() || k.dim(1)? == self.plan.heads {
            return Ok(k.clone());
        }
        k.expand([k.dim(0)?, self.plan.heads, k.dim(2)?, k.dim(3)?])
    }

    /// Reorders features paired with their neighbours into the order of `Tensor::rotary`, which pairs the two halves.
    /// Queries and keys are reordered alike, so their products do not change.
    pub(super) fn pairs_as_halves(&self, x: Tensor) -> Result<Tensor> {
        let Some(plan) = self.plan.rotary.as_ref().filter(|plan| plan.interleaved) else { return Ok(x) };
        let (last, features) = (x.rank() - 1, plan.features());
        let axis = last as isize;
        let mut shape = x.shape().to_vec();
        shape[last] = features / 2;
        shape.push(2);
        let turned = x.narrow(-1, 0, features)?.reshape(&shape[..])?.transpose(-1, -2)?.flatten(axis, axis + 1)?;
        let rest = x.dim(-1)? - features;
        if rest == 0 { Ok(turned) } else { Tensor::cat(&[&turned, &x.narrow(-1, features, rest)?], axis) }
    }

    /// Keys count from 0, memories included; queries are the last of them.
    pub(super) fn rotate(&self, q: Tensor, k: Tensor, v: Tensor) -> Result<[Tensor; 3]> {
        let (Some(frequencies), Some(plan)) = (&self.rotary, &self.plan.rotary) else { return Ok([q, k, v]) };
        let frequencies = &frequencies.tensor();
        let first = first_query(q.dim(2)?, k.dim(2)?)?;
        let v = if plan.values { v.rotary(frequencies, 0)? } else { v };
        let (q, k) = (self.pairs_as_halves(q)?, self.pairs_as_halves(k)?);
        Ok([q.rotary(frequencies, first)?, k.rotary(frequencies, 0)?, v])
    }

    /// Prepends learned keys and values.
    pub(super) fn prepend_memory(&self, k: Tensor, v: Tensor) -> Result<[Tensor; 2]> {
        let Some([mem_k, mem_v]) = &self.memory else { return Ok([k, v]) };
        let batch = k.dim(0)?;
        let prepend = |memory: Tensor, x: &Tensor| {
            let shape = [batch, memory.dim(0)?, memory.dim(1)?, memory.dim(2)?];
            Tensor::cat(&[&memory.expand(shape)?, x], 2)
        };
        Ok([prepend(self.pairs_as_halves(mem_k.tensor())?, &k)?, prepend(mem_v.tensor(), &v)?])
    }

    /// Divides the queries by the learned temperature, if there is one: there are fewer queries than scores.
    pub(super) fn scale_queries(&self, q: Tensor) -> Result<Tensor> {
        let Some(learned) = &self.temperature else { return Ok(q) };
        let scale = learned.scale.tensor().exp()?;
        let floor = Tensor::full((), 1e-2, scale.dtype(), scale.device())?;
        let low = scale.detach().lt(&floor)?;
        self.normalize_length(q)?.div(&low.where_cond(&floor, &scale)?)
    }

    /// Normalises every vector to length 1, if the temperature is learned; lengths below 1e-12 count as 1e-12.
    pub(super) fn normalize_length(&self, x: Tensor) -> Result<Tensor> {
        match &self.temperature {
            Some(learned) => x.scale_norm(&learned.unit, 1e-12 * (self.plan.dim_qk() as f64).powf(-0.5)),
            None => Ok(x),
        }
    }
}

/// Returns the position of the first of `queries`, which are the last of `keys`.
fn first_query(queries: usize, keys: usize) -> Result<usize> {
    let why = || {
        Error::shape("attention", format_args!("expected at most {keys} queries (the number of keys), got {queries}"))
    };
    keys.checked_sub(queries).ok_or_else(why)
}
