//! Positional encodings: embeddings, rotations, and biases on the scores.

use super::Embedding;
use crate::{
    Buffer, DType, Device, Error, Init, Param, ParamStore, Result, Tensor,
    collect::CollectVec,
    config::{PolarPlan, RotaryPlan},
    error::ensure,
};

/// Learned positional embeddings, optionally scaled by `dim^-½`.
#[derive(Clone, Debug)]
pub struct AbsolutePositionalEmbedding {
    emb: Embedding,
    scale: f64,
    normed: bool,
}

impl AbsolutePositionalEmbedding {
    /// Creates a table for sequences of up to `max_seq_len`. If `scaled` is `true`, it is multiplied by `dim^-½`.
    pub fn new(dim: usize, max_seq_len: usize, scaled: bool, store: &ParamStore) -> Result<Self> {
        let emb = Embedding::new(&store.at("emb"), max_seq_len, dim, Init::Normal(1.0))?;
        Ok(Self { emb, scale: if scaled { (dim as f64).powf(-0.5) } else { 1.0 }, normed: false })
    }

    /// Creates a table whose vectors are normalised to length 1.
    pub fn normed(dim: usize, max_seq_len: usize, store: &ParamStore) -> Result<Self> {
        let emb = Embedding::new(&store.at("emb"), max_seq_len, dim, Init::Normal(1e-5))?;
        Ok(Self { emb, scale: 1.0, normed: true })
    }

    /// Returns the embeddings of the first `n` positions, `[n, dim]`.
    ///
    /// Errors: a position past the end of the table.
    pub fn forward(&self, n: usize) -> Result<Tensor> {
        self.scaled(self.emb.table()?.narrow(0, 0, n)?)
    }

    /// Returns the embeddings of these positions: `[..] → [.., dim]`.
    ///
    /// Errors: a position past the end of the table.
    pub fn at(&self, positions: &Tensor) -> Result<Tensor> {
        self.scaled(self.emb.forward(positions)?)
    }

    fn scaled(&self, x: Tensor) -> Result<Tensor> {
        if self.normed { unit_length(&x) } else { x.affine(self.scale, 0.0) }
    }

    /// Returns the number of positions.
    pub(crate) fn len(&self) -> usize {
        self.emb.count()
    }
}

/// Normalises vectors to length 1; lengths below 1e-12 count as 1e-12.
pub(crate) fn unit_length(x: &Tensor) -> Result<Tensor> {
    let root = (x.dim(-1)? as f64).powf(-0.5);
    x.scale_norm(&Tensor::full([1], root, x.dtype(), x.device())?, 1e-12 * root)
}

/// Sinusoids times one learned number, in place of a table of positions.
#[derive(Clone, Debug)]
pub struct ScaledSinusoidalEmbedding {
    /// `[1]`
    scale: Param,
    /// Frequencies, `[dim / 2]`.
    frequencies: Tensor,
}

impl ScaledSinusoidalEmbedding {
    /// Creates the embedding of positions as vectors of an even width.
    pub fn new(dim: usize, store: &ParamStore) -> Result<Self> {
        let half = dim / 2;
        let frequency = |k: usize| f64::from(libm::pow(10000.0, -f64::from(k as f32 / half as f32)) as f32);
        let frequencies = Tensor::generate([half], DType::F32, store.device(), frequency)?;
        Ok(Self { scale: store.param("scale", [1], Init::Constant((dim as f64).powf(-0.5)))?, frequencies })
    }

    /// Returns the embeddings of `n` positions from `first` on, `[n, dim]`.
    pub fn forward(&self, first: usize, n: usize) -> Result<Tensor> {
        let scale = self.scale.tensor();
        self.frequencies.sinusoid(first, n, scale.dtype())?.mul(&scale)
    }

    /// Returns the embeddings of these positions: `[..] → [.., dim]`.
    pub fn at(&self, positions: &Tensor) -> Result<Tensor> {
        let last = positions.to_vec::<i64>()?.into_iter().max().unwrap_or(0).max(0) as usize;
        let scale = self.scale.tensor();
        self.frequencies.sinusoid(0, last + 1, scale.dtype())?.embedding(positions)?.mul(&scale)
    }
}

/// Rotary position embedding: its frequencies are the buffer `inv_freq`, `[⌈dim / 2⌉]`, xPos's scales the buffer
/// `scale`.
///
/// Both are f32 for every model dtype: half types would rotate distant positions by wrong angles.
#[derive(Clone, Debug)]
pub struct Rotation {
    inv_freq: Buffer,
    scale: Option<Buffer>,
    plan: RotaryPlan,
}

/// Factors by which explicit positions turn pairs of features, `[b or 1, 1, n, pairs]` each.
#[derive(Clone, Debug)]
pub struct Turn {
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    /// Registers the planned frequencies at the store's place.
    pub fn new(plan: &RotaryPlan, store: &ParamStore) -> Result<Self> {
        let buffer = |name: &str, value: &dyn Fn(usize) -> f64| {
            let values = Tensor::generate([plan.dim.div_ceil(2)], DType::F32, store.device(), value)?;
            store.buffer(name, values)
        };
        Ok(Self {
            inv_freq: buffer("inv_freq", &|k| plan.frequency(k))?,
            scale: plan.xpos.map(|_| buffer("scale", &|k| plan.xpos_scale(k))).transpose()?,
            plan: plan.clone(),
        })
    }

    /// Returns the frequencies, `[⌈dim / 2⌉]`.
    pub(super) fn frequencies(&self) -> Result<Tensor> {
        let stored = self.inv_freq.tensor();
        match self.plan.position_divisor {
            1.0 => Ok(stored),
            divisor => stored.affine(1.0 / divisor, 0.0),
        }
    }

    /// Returns `true` if positions are always explicit: xPos scales features too.
    pub(super) fn scales(&self) -> bool {
        self.scale.is_some()
    }

    /// Returns the factors for queries and keys at these positions, I64 `[n]` or `[b, n]`.
    pub fn turns(&self, positions: &Tensor, like: &Tensor) -> Result<[Turn; 2]> {
        ensure!(
            (1..=2).contains(&positions.rank()) && positions.dtype() == DType::I64,
            Error::shape(
                "pos",
                format_args!("expected i64 [n] or [batch, n], got {:?} {}", positions.shape(), positions.dtype())
            )
        );
        let frequencies = self.frequencies()?.to_f64_vec()?;
        let scales = self.scale.as_ref().map(|scale| scale.tensor().to_f64_vec()).transpose()?;
        let positions_of = positions.to_vec::<i64>()?;
        let middle = (positions_of.iter().copied().max().unwrap_or(0) + 1).div_euclid(2);
        let base = self.plan.xpos.unwrap_or(1.0);
        let rows = if positions.rank() == 2 { positions.dim(0)? } else { 1 };
        let shape = [rows, 1, positions.dim(-1)?, frequencies.len()];
        // The factor of feature pair `k` at a position; `power` is 1 for queries, −1 for keys.
        let factors = |power: f64, wave: fn(f64) -> f64| -> Result<Tensor> {
            let values: Vec<f64> = positions_of
                .iter()
                .flat_map(|&position| {
                    let scales = &scales;
                    frequencies.iter().enumerate().map(move |(k, frequency)| {
                        let exponent = power * (position - middle) as f64 / base;
                        let scale = scales.as_ref().map_or(1.0, |scales| libm::pow(scales[k], exponent));
                        wave(position as f64 * frequency) * scale
                    })
                })
                .collect_vec();
            Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(like.dtype())?.to_device(like.device())
        };
        let turn = |power: f64| Ok(Turn { cos: factors(power, libm::cos)?, sin: factors(power, libm::sin)? });
        Ok([turn(1.0)?, turn(-1.0)?])
    }
}

impl Turn {
    /// Returns the turn of the last `n` positions.
    pub(super) fn last(&self, n: usize) -> Result<Self> {
        let last = |x: &Tensor| x.narrow(2, x.dim(2)? - n, n);
        Ok(Self { cos: last(&self.cos)?, sin: last(&self.sin)? })
    }

    /// Turns features `k` and `k + pairs` of `[b, heads, n, d]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let pairs = self.cos.dim(-1)?;
        let (a, b) = (x.narrow(-1, 0, pairs)?, x.narrow(-1, pairs, pairs)?);
        let first = a.mul(&self.cos)?.sub(&b.mul(&self.sin)?)?;
        let second = b.mul(&self.cos)?.add(&a.mul(&self.sin)?)?;
        let rest = x.dim(-1)? - 2 * pairs;
        match rest {
            0 => Tensor::cat(&[&first, &second], -1),
            _ => Tensor::cat(&[&first, &second, &x.narrow(-1, 2 * pairs, rest)?], -1),
        }
    }
}

/// Polar positions: softplus of queries and keys as lengths, positions and a learned bias of the keys as angles
/// (<https://arxiv.org/abs/2509.10534>).
#[derive(Clone, Debug)]
pub struct PolarEmbedding {
    /// `[dim]`
    inv_freq: Buffer,
    /// Angles of the keys, `[heads, 1, dim]`; they act between −2π and 0.
    learned_bias: Param,
}

/// Cosines and sines of one call's polar positions.
#[derive(Clone, Debug)]
pub struct PolarTurn {
    /// `[b or 1, 1, n, dim]` each.
    waves: [Tensor; 2],
    /// Those of the keys' bias, `[heads, 1, dim]` each.
    bias: [Tensor; 2],
}

impl PolarEmbedding {
    /// Creates the planned positions: the buffer `inv_freq` and the parameter `learned_bias`.
    pub fn new(plan: PolarPlan, store: &ParamStore) -> Result<Self> {
        let rotary = RotaryPlan::plain(2 * plan.dim);
        let values = Tensor::generate([plan.dim], DType::F32, store.device(), |k| rotary.frequency(k))?;
        let learned_bias = store.param("learned_bias", [plan.heads, 1, plan.dim], Init::Constant(0.0))?;
        Ok(Self { inv_freq: store.buffer("inv_freq", values)?, learned_bias })
    }

    /// Returns the turns of a call on `x [b, n, dim]`, at these positions or counted from 0.
    pub(super) fn turn(&self, x: &Tensor, positions: Option<&Tensor>) -> Result<PolarTurn> {
        let positions = positions.cloned().map_or_else(|| Tensor::arange(x.dim(1)?, x.device()), Ok)?;
        let rows = if positions.rank() == 2 { positions.dim(0)? } else { 1 };
        let frequencies = self.inv_freq.tensor().to_f64_vec()?;
        let shape = [rows, 1, positions.dim(-1)?, frequencies.len()];
        let positions = positions.to_vec::<i64>()?;
        let placed = |values: Vec<f64>, shape: &[usize]| {
            Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(x.dtype())?.to_device(x.device())
        };
        let wave = |wave: fn(f64) -> f64| {
            let angles = positions.iter().flat_map(|&p| frequencies.iter().map(move |frequency| p as f64 * frequency));
            placed(angles.map(wave).collect_vec(), &shape)
        };
        let bias = self.learned_bias.tensor();
        let lowest = -std::f64::consts::TAU;
        let values: Vec<f64> = bias.to_f64_vec()?.into_iter().map(|angle| angle.clamp(lowest, 0.0)).collect_vec();
        let of_bias =
            |wave: fn(f64) -> f64| placed(values.iter().map(|&angle| wave(angle)).collect_vec(), bias.shape());
        let (cos, sin) = (of_bias(libm::cos)?, of_bias(libm::sin)?);
        // A difference that is 0 and has the gradient of the angle, where the bounds let it through.
        let bounds = |limit: f64| Tensor::full((), limit, bias.dtype(), bias.device());
        let inside = bias.detach().ge(&bounds(lowest)?)?.logical_and(&bias.detach().le(&bounds(0.0)?)?)?;
        let angle = bias.sub(&bias.detach())?.masked_fill(&inside.logical_not()?, 0.0)?;
        Ok(PolarTurn {
            waves: [wave(libm::cos)?, wave(libm::sin)?],
            bias: [cos.sub(&sin.mul(&angle)?)?, sin.add(&cos.mul(&angle)?)?],
        })
    }
}

impl PolarTurn {
    /// Turns queries: `[b, heads, n, d] → [b, heads, n, 2 d]`.
    pub fn queries(&self, x: &Tensor) -> Result<Tensor> {
        let length = softplus(x)?;
        let [cos, sin] = &self.waves;
        Tensor::cat(&[&length.mul(cos)?, &length.mul(sin)?], -1)
    }

    /// Turns keys, by their bias too: `[b, heads, n, d] → [b, heads, n, 2 d]`.
    pub fn keys(&self, x: &Tensor) -> Result<Tensor> {
        let length = softplus(x)?;
        let ([cos, sin], [bias_cos, bias_sin]) = (&self.waves, &self.bias);
        let real = cos.mul(bias_cos)?.sub(&sin.mul(bias_sin)?)?;
        let imaginary = sin.mul(bias_cos)?.add(&cos.mul(bias_sin)?)?;
        Tensor::cat(&[&length.mul(&real)?, &length.mul(&imaginary)?], -1)
    }
}

/// Computes `ln(1 + e^x)` without overflow.
fn softplus(x: &Tensor) -> Result<Tensor> {
    let (positive, negative) = (x.relu()?, x.neg()?.relu()?);
    let power = positive.add(&negative)?.neg()?.exp()?;
    positive.add(&power.affine(1.0, 1.0)?.ln()?)
}
