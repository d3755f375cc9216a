//! Projections from the input of a layer to queries, keys and values.

use super::{Attention, AttentionInput, soft_clamp};
use crate::{Error, Result, Tensor, error::ErrorContext, nn::unit_length};

impl Attention {
    /// Returns the operands of the scores: queries `[b, heads, i, d]`, keys and values of `j` positions; also the
    /// values as projected.
    pub(super) fn operands(&self, x: &Tensor, input: &AttentionInput) -> Result<([Tensor; 3], Option<Tensor>)> {
        let ([q, k, v], values) = self.project(x, input)?;
        let [q, k, v] = self.rotate(q, k, v, input)?;
        let [k, v] = self.prepend_memory(k, v, input)?;
        let v = self.exponentials(v)?;
        let [k, v] = if self.plan.zero_kv { [zero_first(&k)?, zero_first(&v)?] } else { [k, v] };
        Ok(([self.scale_queries(q)?, self.normalize_length(k)?, v], values))
    }

    /// Projects queries, keys and values of each head: `[b, heads, i, d]`, twice `[b, heads, j, d]`; also returns the
    /// values before they are mixed with those of another layer.
    pub(super) fn project(&self, x: &Tensor, input: &AttentionInput) -> Result<([Tensor; 3], Option<Tensor>)> {
        let source = input.context.as_ref().unwrap_or(x);
        let source = match &input.mem {
            Some(mem) => Tensor::cat(&[mem, source], 1).context("mems")?,
            None => source.clone(),
        };
        let of = |at: usize| match (&input.sources, &input.mem) {
            (None, _) => Ok(source.clone()),
            (Some(sources), Some(mem)) => Tensor::cat(&[mem, &sources[at]], 1).context("mems"),
            (Some(sources), None) => Ok(sources[at].clone()),
        };
        let (mut queries, mut keys, values) = (x.clone(), of(0)?, of(1)?);
        if let Some(sinusoids) = &input.sinusoids {
            let (i, j) = (x.dim(1)?, source.dim(1)?);
            queries = queries.add(&sinusoids.narrow(0, first_query(i, j)?, i)?)?;
            keys = keys.add(&sinusoids.narrow(0, 0, j)?)?;
        }
        let [q, k, v] = self.linears([&queries, &keys, &values])?;
        let k =
            if self.collab_mixing.is_some() { self.all_heads(&k.unsqueeze(1)?)? } else { self.key_heads(&k, &keys)? };
        let v = self.split_heads(&v, self.plan.dim_value)?;
        let mixed = self.mix_values(x, &v, input)?;
        let [q, k] = [self.norm_queries(self.queries(&q)?)?, self.norm_keys(k)?];
        Ok(([q, k, self.norm_heads(mixed, 2)?], Some(v)))
    }

    /// Applies the projections of queries, keys and values, from latent vectors if there are any.
    pub(super) fn linears(&self, [queries, keys, values]: [&Tensor; 3]) -> Result<[Tensor; 3]> {
        let latent =
            self.to_latents[1].as_ref().map(|latent| latent.forward(keys).context("to_latent_kv")).transpose()?;
        let (keys, values) = (latent.as_ref().unwrap_or(keys), latent.as_ref().unwrap_or(values));
        if keys.is_same(values) {
            let all = queries.is_same(keys) && self.to_latents[0].is_none();
            let layers = [&self.to_q, &self.to_k, &self.to_v];
            let layers = if all { &layers[..] } else { &layers[1..] };
            if let Some(projected) = super::joint::forward(layers, keys).context("to_k")? {
                match <[Tensor; 3]>::try_from(projected) {
                    Ok(all) => return Ok(all),
                    Err(projected) => {
                        if let Ok([k, v]) = <[Tensor; 2]>::try_from(projected) {
                            return Ok([self.query_projection(queries)?, k, v]);
                        }
                    }
                }
            }
        }
        Ok([
            self.query_projection(queries)?,
            self.to_k.forward(keys).context("to_k")?,
            self.to_v.forward(values).context("to_v")?,
        ])
    }

    /// Applies the projection of queries alone.
    pub(super) fn query_projection(&self, x: &Tensor) -> Result<Tensor> {
        let latent = self.to_latents[0].as_ref().map(|latent| latent.forward(x).context("to_latent_q")).transpose()?;
        self.to_q.forward(latent.as_ref().unwrap_or(x)).context("to_q")
    }

    /// Splits the heads of keys, and appends those that are projected from their source itself.
    pub(super) fn key_heads(&self, k: &Tensor, source: &Tensor) -> Result<Tensor> {
        let k = self.split_heads(k, self.plan.dim_head)?;
        let Some(to_rotateable_k) = &self.to_rotateable_k else { return Ok(k) };
        let rotating = to_rotateable_k.forward(source).context("to_rotateable_k")?;
        Tensor::cat(&[&k, &self.split_heads(&rotating, self.plan.dim_head)?], 1)
    }

    /// Applies a rotation to the heads that rotate, the last ones.
    pub(super) fn rotated(&self, x: Tensor, turn: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let Some(count) = self.plan.rotated_heads else { return turn(&x) };
        let rest = x.dim(1)? - count;
        Tensor::cat(&[&x.narrow(1, 0, rest)?, &turn(&x.narrow(1, rest, count)?)?], 1)
    }

    /// Mixes values with those of the first layer (Zhou et al., <https://arxiv.org/abs/2410.17897>).
    pub(super) fn mix_values(&self, x: &Tensor, v: &Tensor, input: &AttentionInput) -> Result<Tensor> {
        let Some(first) = &input.value_residual else { return Ok(v.clone()) };
        let difference = v.sub(first)?;
        let mixed = match &self.to_value_residual_mix {
            Some(mix) => {
                let mix = mix.forward(x).context("to_value_residual_mix.0")?.sigmoid()?;
                difference.mul(&mix.transpose(1, 2)?.unsqueeze(-1)?)?
            }
            None => difference.affine(0.5, 0.0)?,
        };
        first.add(&mixed)
    }

    /// Applies the L2 norm with its learned scale, and the RMS norm, to queries.
    pub(super) fn norm_queries(&self, q: Tensor) -> Result<Tensor> {
        let q = self.norm_groups(q)?;
        let q = match &self.qk_scales {
            Some([scale, _]) => q.mul(&scale.tensor())?,
            None => q,
        };
        self.norm_heads(q, 0)
    }

    /// Applies the L2 norm with its learned scale, and the RMS norm, to keys.
    pub(super) fn norm_keys(&self, k: Tensor) -> Result<Tensor> {
        let k = self.scaled_keys(self.norm_groups(k)?)?;
        self.norm_heads(k, 1)
    }

    fn scaled_keys(&self, k: Tensor) -> Result<Tensor> {
        match &self.qk_scales {
            Some([_, scale]) => k.mul(&scale.tensor()),
            None => Ok(k),
        }
    }

    /// Normalises parts of the heads to length 1.
    fn norm_groups(&self, x: Tensor) -> Result<Tensor> {
        let Some(norm) = self.plan.qk_norm else { return Ok(x) };
        let mut shape = x.shape().to_vec();
        let last = shape.len() - 1;
        let width = shape[last] / norm.groups;
        shape.splice(last.., [norm.groups, width]);
        unit_length(&x.reshape(&shape[..])?)?.reshape(*x.shape())
    }

    /// Applies the RMS norm of queries (0), keys (1) or values (2) with a scale per head.
    pub(super) fn norm_heads(&self, x: Tensor, at: usize) -> Result<Tensor> {
        let Some(gamma) = &self.rms_gammas[at] else { return Ok(x) };
        let dim = x.dim(-1)?;
        let one = Tensor::ones([dim], x.dtype(), x.device())?;
        x.clamped_rms_norm(&one, 1e-12 * (dim as f64).powf(-0.5))?.mul(&gamma.tensor().affine(1.0, 1.0)?)
    }

    /// Returns the exponentials of clamped values, of which LASER takes the mean (<https://arxiv.org/abs/2411.03493>).
    pub(super) fn exponentials(&self, v: Tensor) -> Result<Tensor> {
        match self.plan.laser {
            Some(bound) => soft_clamp(&v, bound)?.exp(),
            None => Ok(v),
        }
    }

    /// Returns the queries of each head, mixed from shared ones: `[b, n, width] → [b, heads, n, d]`.
    pub(super) fn queries(&self, q: &Tensor) -> Result<Tensor> {
        match &self.collab_mixing {
            None => self.split_heads(q, self.plan.dim_head),
            Some(mixing) => q.unsqueeze(1)?.mul(&mixing.tensor().unsqueeze(1)?),
        }
    }

    /// Splits heads of `d` features: `[b, n, heads · d] → [b, heads, n, d]`; keys and values have their own number of
    /// heads.
    pub(super) fn split_heads(&self, x: &Tensor, d: usize) -> Result<Tensor> {
        let (b, n, width) = (x.dim(0)?, x.dim(1)?, x.dim(2)?);
        x.reshape([b, n, width / d, d])?.transpose(1, 2)
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

    /// Turns queries and keys, at explicit positions if they are given. Otherwise keys count from 0, memories included;
    /// queries are the last of them.
    pub(super) fn rotate(&self, q: Tensor, k: Tensor, v: Tensor, input: &AttentionInput) -> Result<[Tensor; 3]> {
        if let Some(polar) = &input.polar {
            return Ok([polar.queries(&q)?, polar.keys(&self.repeat_heads(&k)?)?, self.repeat_heads(&v)?]);
        }
        if let Some([of_queries, of_keys]) = &input.turns {
            let (q, k) = (self.pairs_as_halves(q)?, self.pairs_as_halves(k)?);
            return Ok([self.rotated(q, |q| of_queries.apply(q))?, self.rotated(k, |k| of_keys.apply(k))?, v]);
        }
        let (Some(rotation), Some(plan)) = (&self.rotary, &self.plan.rotary) else { return Ok([q, k, v]) };
        if input.context.is_some() {
            return Ok([q, k, v]);
        }
        let frequencies = &rotation.frequencies()?;
        let first = first_query(q.dim(2)?, k.dim(2)?)?;
        let v = if plan.values { v.rotary(frequencies, 0)? } else { v };
        let (q, k) = (self.pairs_as_halves(q)?, self.pairs_as_halves(k)?);
        Ok([self.rotated(q, |q| q.rotary(frequencies, first))?, self.rotated(k, |k| k.rotary(frequencies, 0))?, v])
    }

    /// Prepends learned keys and values.
    pub(super) fn prepend_memory(&self, k: Tensor, v: Tensor, input: &AttentionInput) -> Result<[Tensor; 2]> {
        let Some([mem_k, mem_v]) = &self.memory else { return Ok([k, v]) };
        let batch = k.dim(0)?;
        let prepend = |memory: Tensor, x: &Tensor| {
            let shape = [batch, memory.dim(0)?, memory.dim(1)?, memory.dim(2)?];
            Tensor::cat(&[&memory.expand(shape)?, x], 2)
        };
        let mem_k = self.scaled_keys(self.norm_groups(mem_k.tensor())?)?;
        Ok([prepend(self.turned_memory(mem_k, input)?, &k)?, prepend(mem_v.tensor(), &v)?])
    }

    /// Orders the features of memory keys `[kv_heads, m, d]` like those of keys that were turned. They lie at the
    /// position of the first token, which memories shift.
    fn turned_memory(&self, mem_k: Tensor, input: &AttentionInput) -> Result<Tensor> {
        if input.context.is_some() && input.turns.is_none() {
            return Ok(mem_k);
        }
        let mem_k = self.pairs_as_halves(mem_k)?;
        match (&self.rotary, &input.mem) {
            (Some(rotation), Some(mem))
                if self.plan.rotary.is_some() && !self.plan.mem_kv_counted && input.turns.is_none() =>
            {
                let (frequencies, first) = (rotation.frequencies()?, mem.dim(1)?);
                // [1, kv_heads, m, d], each at one position.
                let turn = |k: &Tensor| k.transpose(0, 2)?.rotary(&frequencies, first)?.transpose(0, 2);
                self.rotated(mem_k.unsqueeze(0)?, |k| turn(&k.contiguous()?))?.squeeze(0)
            }
            _ => Ok(mem_k),
        }
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

/// Puts a vector of zeros in front of those of each head.
pub(super) fn zero_first(x: &Tensor) -> Result<Tensor> {
    let zero = Tensor::zeros([x.dim(0)?, x.dim(1)?, 1, x.dim(3)?], x.dtype(), x.device())?;
    Tensor::cat(&[&zero, x], 2)
}

/// Returns the position of the first of `queries`, which are the last of `keys`.
fn first_query(queries: usize, keys: usize) -> Result<usize> {
    let why = || {
        Error::shape("attention", format_args!("expected at most {keys} queries (the number of keys), got {queries}"))
    };
    keys.checked_sub(queries).ok_or_else(why)
}
