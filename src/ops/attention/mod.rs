//! Fused scaled dot-product attention in blocks with an online softmax: memory grows with the sequence, not with its
//! square (FlashAttention, Dao et al., <https://arxiv.org/abs/2205.14135>, <https://arxiv.org/abs/2307.08691>).
//!
//! This file holds what every device shares: the arguments, their checks, and what the backward pass keeps.

mod backward;
mod cpu;
mod cuda;
mod decode;
mod gradients;
mod operand;
mod outputs;
mod position;
mod rows;
mod tile;
mod window;

use crate::{
    DType, Device, Error, Philox, Result, Tensor,
    autograd::{Backward, InputGrads, MaskStream, mask_stream, needs, record},
    device::size32,
    error::ensure,
    profile::{self, BackwardCost, Cost},
    shape::Shape,
    tensor::same_kind,
};
use position::{Position, expect_weights};

pub use decode::{DecodeSpec, attention_decode};
pub use position::PositionBias;
pub(crate) use position::bucket as relative_bucket;
pub(super) use position::bucket;
pub use window::Window;

const OP: &str = "attention";

/// Options of [`attention`]: scale, masks, biases and dropout.
///
/// Masks replace scores with the most negative finite number: a query without any key left attends equally to all keys,
/// including future ones, and passes no gradient to its scores. A `bias` of −∞ is not a mask: a query for which the
/// bias of every key left is −∞ gives 0, without gradients, as PyTorch's `scaled_dot_product_attention` does; a query
/// whose scores all overflow to −∞, or one of whose scores is +∞ or NaN, gives NaN. An infinite value gives NaN even
/// where its weight is 0; in half types its gradients are NaN where some of PyTorch's are infinite.
///
/// ```
/// use x_transformers::{Device, Tensor, ops::{AttentionSpec, attention}};
/// # fn main() -> x_transformers::Result<()> {
/// let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0], [1, 1, 2, 2], &Device::Cpu)?;
/// let y = attention(&x, &x, &x, &AttentionSpec { causal: true, ..AttentionSpec::default() })?;
/// assert_eq!(y.to_vec::<f32>()?[..2], [1.0, 2.0]); // the first query sees the first key alone
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct AttentionSpec<'a> {
    /// Multiplies the products of queries and keys. Default 1; usually `dim_head^-0.5`.
    pub scale: f64,
    /// If `true`, masks the keys after each query. The last query is aligned with the last key: query `i` is at
    /// position `i + keys − queries`. Default `false`.
    pub causal: bool,
    /// Attention mask, Bool, broadcasts to `[batch, heads, query, key]`; `true` keeps.
    pub mask: Option<&'a Tensor>,
    /// Padding of the queries, Bool `[batch, query]`: a padded (`false`) query sees only the memory keys.
    pub query_mask: Option<&'a Tensor>,
    /// Padding of the keys, Bool `[batch, key]`, with or without the leading memory keys; `true` keeps.
    pub key_mask: Option<&'a Tensor>,
    /// Number of leading keys that `query_mask` and `key_mask` never mask (learned memory key/values). Default 0.
    pub mem_keys: usize,
    /// Limits on the keys that a query sees. Default: none.
    pub window: Window,
    /// Added to the scaled products: the dtype of the queries, broadcasts to `[batch, heads, query, key]`. Has a
    /// gradient, summed to its shape.
    pub bias: Option<&'a Tensor>,
    /// Added to the scaled products, generated block by block. Default: none.
    pub position_bias: Option<PositionBias>,
    /// Number of leading keys that `position_bias` leaves out (memory key/values). Default 0.
    pub unbiased_keys: usize,
    /// Bound of the scores: `bound · tanh(score / bound)`, after biases and before masks. Default: none.
    pub softclamp: Option<f64>,
    /// A score of each head whose weight goes to no value, float `[heads]`: one more term in the sum of the softmax,
    /// neither biased, clamped nor masked. A query without any key left then gives 0. Has a gradient.
    pub sink: Option<&'a Tensor>,
    /// Probability of dropping a weight after the softmax; acts under [`Tape::train`](crate::Tape::train). Default 0.
    pub dropout: f64,
}

impl Default for AttentionSpec<'_> {
    fn default() -> Self {
        Self {
            scale: 1.0,
            causal: false,
            mask: None,
            query_mask: None,
            key_mask: None,
            mem_keys: 0,
            window: Window::default(),
            bias: None,
            position_bias: None,
            unbiased_keys: 0,
            softclamp: None,
            sink: None,
            dropout: 0.0,
        }
    }
}

/// Computes attention, `softmax(clamp(scale · q kᵀ + biases)) v`, with masked scores replaced by the lowest finite number.
///
/// Shapes: `q` `[batch, heads, query, d]`, `k` `[batch, kv_heads, key, d]`, `v` `[batch, kv_heads, key, e]` → `[batch,
/// heads, query, e]`. `heads` is a multiple of `kv_heads`; query head `h` uses key head `h / (heads / kv_heads)`
/// (grouped queries, <https://arxiv.org/abs/2305.13245>). Any strides: rows with a packed last dimension are read in
/// place. The result is stored as `[batch, query, heads, e]`, so merging the heads is a view.
///
/// Products, statistics and sums are in f32 (f64 for f64); a product of a query and a key overflows before `scale` is
/// applied. Weights are correct for all finite scores, forward and backward. A mean of finite values is finite. Without
/// keys the result is zero. Saves: `q`, `k`, `v`, the output, two numbers per query, and for half types the rounding
/// error of the output. Errors: shapes, dtypes or devices that do not fit, or a value outside of its domain.
#[doc(alias = "SDPA")]
#[doc(alias = "scaled_dot_product_attention")]
#[doc(alias = "flash_attention")]
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, spec: &AttentionSpec) -> Result<Tensor> {
    let sizes = Sizes::new(q, k, v)?;
    spec.check(&sizes, q)?;
    let position = |bias| Position::new(bias, &sizes, spec.unbiased_keys, q.device());
    let position = spec.position_bias.as_ref().map(position).transpose()?;
    let (q, k, v) = (packed_rows(q)?, packed_rows(k)?, packed_rows(v)?);
    let bias = spec.bias.map(packed_rows).transpose()?;
    let problem = Problem {
        sizes,
        q: q.detach(),
        k: k.detach(),
        v: v.detach(),
        scale: spec.scale,
        causal: spec.causal,
        mask: spec.mask.map(packed_rows).transpose()?,
        query_mask: spec.query_mask.map(Tensor::contiguous).transpose()?,
        key_mask: spec.key_mask.map(Tensor::contiguous).transpose()?,
        mem_keys: spec.mem_keys,
        window: spec.window,
        bias: bias.as_ref().map(Tensor::detach),
        position,
        unbiased: spec.unbiased_keys,
        softclamp: spec.softclamp,
        sink: spec.sink.map(|sink| sink.detach().contiguous()).transpose()?,
        dropout: if spec.dropout > 0.0 {
            mask_stream(q.device())?.map(|stream| Dropout::new(stream, spec.dropout))
        } else {
            None
        },
    };
    let mut inputs = vec![&q, &k, &v];
    inputs.extend(&bias);
    let weights = spec.position_bias.as_ref().map(PositionBias::weights);
    inputs.extend(weights);
    inputs.extend(spec.sink);
    let [bias, weights, sink] = [bias.as_ref(), weights, spec.sink].map(|x| x.unwrap_or(&q));
    let (out, kept) = problem.forward(needs(OP, [&q, &k, &v, bias, weights, sink])?.contains(&true))?;
    // The scores are recomputed, and each product of the forward pass has two in the backward pass.
    let backward = BackwardCost::Times(2.5);
    profile::cost(|| Cost { operations: sizes.operations(spec.causal, spec.window), backward });
    record(OP, out, &inputs, |out| AttentionBackward { problem, out: out.detach(), kept })
}

/// Returns `Some(reason)` if a GPU computes heads with this number of features faster from the matrix of scores: its
/// fused tensor-core kernels hold their sums in registers. The CPU has no such limit, and [`attention`] itself takes
/// any width.
pub fn gpu_needs_scores(features: usize) -> Option<&'static str> {
    (features > 128).then_some("the fused kernels support at most 128 features per head")
}

/// Describes the kernels with which a GPU computes [`attention`] for queries and keys of `d` and values of `e`
/// features, and why it uses no faster ones; `None` on the CPU. `XT_ATTENTION=plain` selects the plain kernels;
/// `XT_ATTENTION=wgmma` asks for those of sm_90a, which no card has run yet; calls with a soft clamp, a sink, slopes
/// on both sides or unbiased keys use the next lower ones.
pub fn attention_rung(device: &Device, dtype: DType, d: usize, e: usize) -> Option<String> {
    match device {
        Device::Cpu => None,
        Device::Gpu(gpu) => Some(cuda::rung(*gpu, dtype, [d, e], false).to_string()),
    }
}

/// Returns `Some(reason)` if the device of these operands should compute their matrix of scores instead.
pub(crate) fn needs_scores(q: &Tensor, v: &Tensor) -> Option<&'static str> {
    let features = [q, v].iter().filter_map(|x| x.shape().last()).max();
    features.filter(|_| *q.device() != Device::Cpu).and_then(|&features| gpu_needs_scores(features))
}

/// Returns the tensor itself if its last dimension is packed, else a packed copy.
fn packed_rows(x: &Tensor) -> Result<Tensor> {
    if x.layout().has_packed_rows() { Ok(x.clone()) } else { x.contiguous() }
}

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    /// Number of features of a query and a key.
    d: usize,
    /// Number of features of a value.
    e: usize,
}

impl Sizes {
    /// Returns the floating-point operations of scores and sums, for all pairs that causality and the window leave,
    /// regardless of masks.
    fn operations(&self, causal: bool, window: Window) -> f64 {
        let seen = |query: usize| {
            let behind = (self.keys + query + 1).saturating_sub(self.queries);
            let first = window.first_key(behind as i64 - 1).max(0) as usize;
            if causal { behind.min(self.keys) - first } else { self.keys - first }
        };
        let pairs: usize = (0..self.queries).map(seen).sum();
        2.0 * (self.batch * self.heads) as f64 * pairs as f64 * (self.d + self.e) as f64
    }

    fn new(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Self> {
        same_kind(OP, q, k)?;
        same_kind(OP, q, v)?;
        ensure!(
            q.dtype().is_float(),
            Error::dtype(OP, format_args!("expected float queries, keys and values, got {}", q.dtype()))
        );
        let (&[batch, heads, queries, d], &[k_batch, kv_heads, keys, k_d], &[v_batch, v_heads, v_keys, e]) =
            (&q.shape()[..], &k.shape()[..], &v.shape()[..])
        else {
            return Err(Error::shape(
                OP,
                format_args!(
                    "expected four dimensions [batch, heads, sequence, features] each, got q {:?}, k {:?}, v {:?}",
                    q.shape(),
                    k.shape(),
                    v.shape()
                ),
            ));
        };
        ensure!(
            k_batch == batch && v_batch == batch && v_heads == kv_heads && v_keys == keys && k_d == d,
            Error::shape(
                OP,
                format_args!(
                    "expected q [batch, heads, query, d], k [batch, kv_heads, key, d], v [batch, kv_heads, key, e], \
                     got q {:?}, k {:?}, v {:?}",
                    q.shape(),
                    k.shape(),
                    v.shape()
                )
            )
        );
        ensure!(
            heads == kv_heads || (kv_heads > 0 && heads.is_multiple_of(kv_heads)),
            Error::shape(
                OP,
                format_args!("the heads of q ({heads}) must be a multiple of the heads of k and v ({kv_heads})")
            )
        );
        if let Device::Gpu(_) = q.device() {
            // Kernels read them from layouts as 32-bit integers.
            for size in [batch, heads, kv_heads, queries, keys, d, e] {
                size32(size)?;
            }
        }
        Ok(Self { batch, heads, kv_heads, queries, keys, d, e })
    }

    /// Returns the number of query heads that share one key head.
    fn group(&self) -> usize {
        self.heads.checked_div(self.kv_heads).unwrap_or(1)
    }

    /// Returns the shape of the scores, which are never allocated.
    fn scores(&self) -> Result<Shape> {
        Shape::new(&[self.batch, self.heads, self.queries, self.keys])
    }
}

impl AttentionSpec<'_> {
    fn check(&self, sizes: &Sizes, q: &Tensor) -> Result<()> {
        ensure!(
            self.scale.is_finite(),
            Error::argument(OP, format_args!("expected a finite scale, got {}", self.scale))
        );
        ensure!(
            (0.0..=1.0).contains(&self.dropout),
            Error::argument(OP, format_args!("expected dropout from 0 to 1, got {}", self.dropout))
        );
        ensure!(
            self.mem_keys <= sizes.keys,
            Error::argument(OP, format_args!("mem_keys is {}, but there are only {} keys", self.mem_keys, sizes.keys))
        );
        ensure!(
            self.unbiased_keys <= sizes.keys,
            Error::argument(
                OP,
                format_args!("unbiased_keys is {}, but there are only {} keys", self.unbiased_keys, sizes.keys)
            )
        );
        check_clamp(self.softclamp)?;
        self.sink.map_or(Ok(()), |sink| expect_weights("sink", sink, &[sizes.heads], q.device()))?;
        if let Some(mask) = self.mask {
            expect_bool("mask", mask, q)?;
            expect_scores("mask", mask, sizes)?;
        }
        if let Some(bias) = self.bias {
            same_kind(OP, q, bias)?;
            expect_scores("bias", bias, sizes)?;
        }
        if let Some(mask) = self.query_mask {
            expect_bool("query_mask", mask, q)?;
            expect_padding("query_mask [batch, query]", mask, sizes.batch, &[sizes.queries])?;
        }
        if let Some(mask) = self.key_mask {
            expect_bool("key_mask", mask, q)?;
            expect_padding("key_mask [batch, key]", mask, sizes.batch, &[sizes.keys, sizes.keys - self.mem_keys])?;
        }
        Ok(())
    }
}

fn check_clamp(bound: Option<f64>) -> Result<()> {
    ensure!(
        bound.is_none_or(|bound| bound > 0.0 && bound.is_finite()),
        Error::argument(OP, format_args!("expected a softclamp above 0 and finite, got {}", bound.unwrap_or_default()))
    );
    Ok(())
}

fn expect_bool(name: &str, mask: &Tensor, q: &Tensor) -> Result<()> {
    ensure!(
        mask.dtype() == DType::Bool,
        Error::dtype(OP, format_args!("expected {name} of bool (true keeps), got {}", mask.dtype()))
    );
    ensure!(
        mask.device() == q.device(),
        Error::device(
            OP,
            format_args!("{name} is on {} but q is on {}; move one with `to_device`", mask.device(), q.device())
        )
    );
    Ok(())
}

fn expect_scores(name: &str, x: &Tensor, sizes: &Sizes) -> Result<()> {
    let scores = sizes.scores()?;
    ensure!(
        x.shape().broadcast(&scores, OP).is_ok_and(|shape| shape == scores),
        Error::shape(
            OP,
            format_args!("{name} {:?} does not broadcast to [batch, heads, query, key] = {scores:?}", x.shape())
        )
    );
    Ok(())
}

fn expect_padding(name: &str, mask: &Tensor, batch: usize, lengths: &[usize]) -> Result<()> {
    ensure!(
        lengths.iter().any(|&length| mask.shape()[..] == [batch, length]),
        Error::shape(OP, format_args!("expected {name} of shape {:?}, got {:?}", [batch, lengths[0]], mask.shape()))
    );
    Ok(())
}

/// Dropout mask of the weights: a function of the position in `[batch, heads, query, key]`.
#[derive(Clone)]
struct Dropout {
    stream: MaskStream,
    threshold: u64,
    /// Factor of a kept weight: `1 / (1 − p)`.
    factor: f64,
}

impl Dropout {
    fn new(stream: MaskStream, p: f64) -> Self {
        // With p = 1 nothing is kept.
        let factor = if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 };
        Self { stream, threshold: Philox::drop_threshold(p), factor }
    }
}

/// One checked call: its operands, as constants with packed rows, and its spec.
struct Problem {
    sizes: Sizes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: f64,
    causal: bool,
    mask: Option<Tensor>,
    query_mask: Option<Tensor>,
    key_mask: Option<Tensor>,
    mem_keys: usize,
    window: Window,
    bias: Option<Tensor>,
    position: Option<Position>,
    /// Number of leading keys without a position bias.
    unbiased: usize,
    softclamp: Option<f64>,
    /// `[heads]`
    sink: Option<Tensor>,
    dropout: Option<Dropout>,
}

impl Problem {
    /// Returns the compute type.
    fn acc(&self) -> DType {
        if self.q.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// Computes the output, a view `[batch, heads, query, e]` of memory `[batch, query, heads, e]`, and the other
    /// values that the backward pass needs; all of them only if `tracked`.
    fn forward(&self, tracked: bool) -> Result<(Tensor, Kept)> {
        let Sizes { batch, heads, queries, keys, e, .. } = self.sizes;
        let (dtype, device) = (self.q.dtype(), self.q.device());
        let merged = Shape::new(&[batch, queries, heads, e])?;
        let per_query = Shape::new(&[batch, heads, queries, 2])?;
        if merged.numel() == 0 || keys == 0 {
            let kept = Kept { statistics: Tensor::zeros(per_query, self.acc(), device)?, residual: None };
            return Ok((Tensor::zeros(merged, dtype, device)?.permute(&[0, 2, 1, 3])?, kept));
        }
        let mut out = Tensor::uninit(merged, dtype, device)?;
        let rounded = tracked && dtype != self.acc();
        let residual = rounded.then(|| Tensor::uninit(merged, dtype, device)).transpose()?;
        let mut kept = Kept { statistics: Tensor::uninit(per_query, self.acc(), device)?, residual };
        match device {
            Device::Cpu => cpu::forward(self, &mut out, &mut kept)?,
            Device::Gpu(gpu) => cuda::forward(*gpu, self, &mut out, &mut kept)?,
        }
        kept.residual = kept.residual.map(|residual| residual.permute(&[0, 2, 1, 3])).transpose()?;
        Ok((out.permute(&[0, 2, 1, 3])?, kept))
    }
}

/// Values that the forward pass keeps for the backward pass, besides the output.
struct Kept {
    /// For each query the largest score and the reciprocal of `Σ exp(score − largest)`, `[batch, heads, query, 2]`.
    /// They are not merged into a log-sum-exp, which would lose the logarithm of the sum next to a large score. `[∞,
    /// 0]` where every key is masked, `[0, 0]` where the bias of every unmasked key is −∞.
    statistics: Tensor,
    /// Error of rounding the output to a half type, times [`residual_scale`], laid out like the output: without it, `Σ
    /// grad ⊙ out` is not exact enough for a query with most of its weight on one key.
    residual: Option<Tensor>,
}

/// Returns the scale of an output's residual: the inverse of the type's relative precision, so that the residual is
/// neither too small for the type nor larger than the output.
fn residual_scale(dtype: DType) -> f64 {
    if dtype == DType::F16 { 2048.0 } else { 256.0 }
}

/// Gradients that are wanted.
#[derive(Clone, Copy)]
struct Needed {
    /// Of queries, keys and values.
    operands: [bool; 3],
    bias: bool,
    position: bool,
    sink: bool,
}

impl Needed {
    fn new(problem: &Problem, need: &[bool]) -> Self {
        let mut rest = need[3..].iter();
        let mut next = |given: bool| given && rest.next().is_some_and(|&need| need);
        Self {
            operands: [need[0], need[1], need[2]],
            bias: next(problem.bias.is_some()),
            position: next(problem.position.is_some()),
            sink: next(problem.sink.is_some()),
        }
    }
}

struct AttentionBackward {
    problem: Problem,
    out: Tensor,
    kept: Kept,
}

impl Backward for AttentionBackward {
    fn name(&self) -> &'static str {
        OP
    }

    /// With `P` the weights, `D = Σ_e grad ⊙ out`: `dV = Pᵀ grad`, `dS = P ⊙ (grad Vᵀ − D)`, `dQ = scale · dS K`,
    /// `dK = scale · dSᵀ Q`; the biases get the sums of `dS`, times `1 − (score / bound)²` with a soft clamp; the sink gets
    /// `−Σ P_sink D`.
    fn backward(self: Box<Self>, grad: Tensor, need: &[bool]) -> Result<InputGrads> {
        let needed = Needed::new(&self.problem, need);
        backward::backward(&self.problem, &self.out, &self.kept, &grad, needed).map(InputGrads::whole)
    }
}
