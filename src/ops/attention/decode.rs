//! Attention of the last few tokens to a cache of keys and values: the attention of a decoding step.
//!
//! Each head's keys are split into parts of a fixed length, which are read once, in parallel, and whose sums are joined
//! in order: a sequence's result depends neither on the rest of its batch nor on the number of threads.

use std::ops::Range;

use bytemuck::{cast_slice, cast_slice_mut};
use half::{bf16, f16};

use super::{
    OP, Sizes, Window, check_clamp, expect_bool, packed_rows,
    position::expect_weights,
    tile::{clamp, mean_of},
};
use crate::{
    DType, Device, Error, Result, Tensor,
    autograd::{computed, discrete},
    device::{
        Gpu, Grid, args, cpu,
        f16_rows::widen,
        floats::Floats,
        rows::{Out, Sums, for_rows_of},
        simd::vectorized,
        size32,
    },
    dtype::{Float, Real, dispatch_real},
    error::ensure,
    shape::Shape,
    tensor::Storage,
};

/// Number of keys per part, on the CPU and, in `CUDA_PART`, on a GPU.
const PART: usize = 256;
const CUDA_PART: usize = 64;
/// Number of independent sums in a product of a query and a key.
const LANES: usize = 16;
/// Number of features whose sums stay in registers while the keys stream past.
const WIDE: usize = 64;

/// Options of [`attention_decode`]: how a cache of keys is read. The keys of the sequence may be preceded by a prefix
/// that every query may see.
#[derive(Clone, Copy, Debug, Default)]
pub struct DecodeSpec<'a> {
    /// Multiplies the products of queries and keys; usually `dim_head^-0.5`.
    pub scale: f64,
    /// Number of keys before the sequence: learned memory key/values and memories.
    pub prefix_len: usize,
    /// Number of learned memory keys at the start of that prefix, which padded queries see too.
    pub mem_keys: usize,
    /// Limits on the keys that a query sees.
    pub window: Window,
    /// Padding of the sequence's keys, Bool with `batch · positions` elements; true keeps.
    pub key_mask: Option<&'a Tensor>,
    /// Padding of the queries, Bool `[batch, query]`: a padded (false) query sees only the memory keys.
    pub query_mask: Option<&'a Tensor>,
    /// Added to the scaled products: float `[heads, distances]`, ideally in the accumulation type, indexed by how far
    /// the key is before the query's position. The last entry serves all larger distances.
    pub bias_by_distance: Option<&'a Tensor>,
    /// Number of leading keys that it leaves out.
    pub unbiased_keys: usize,
    /// Bound of the scores, `bound · tanh(score / bound)`, after biases and before masks.
    pub softclamp: Option<f64>,
    /// A score of each head whose weight goes to no value, float `[heads]`. A query without any key left then gives 0.
    pub sink: Option<&'a Tensor>,
}

/// Computes causal attention of new tokens to cached keys: query `i` of sequence `b` is at position `prefix_len +
/// lengths[b] + i` and sees the keys up to that position. The result is that of [`attention`](super::attention) for the
/// last rows.
///
/// Shapes: `q` `[batch, heads, query, d]`, caches `k` `[batch, kv_heads, capacity, d]` and `v` `[batch, kv_heads,
/// capacity, e]`, `lengths` `[batch]` I64 → `[batch, heads, query, e]`, which lies in memory as `[batch, query, heads,
/// e]`. `heads` is a multiple of `kv_heads`. Keys after a query's position are not read: the cache may be larger. A
/// query without any key left attends to all keys of its sequence equally; one whose scores are NaN, or all overflow,
/// gives NaN.
///
/// Errors: shapes, dtypes or devices that do not fit, or a tensor that requires a gradient: decoding has none.
pub fn attention_decode(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &Tensor, spec: &DecodeSpec) -> Result<Tensor> {
    let sizes = Sizes::new(q, k, v)?;
    discrete(OP, &[q, k, v])?;
    check(&sizes, q, lengths, spec)?;
    let Sizes { batch, heads, queries, keys, e, .. } = sizes;
    let merged = Shape::new(&[batch, queries, heads, e])?;
    if merged.numel() == 0 || keys == 0 {
        return Tensor::zeros(merged, q.dtype(), q.device())?.permute(&[0, 2, 1, 3]);
    }
    let (q, k, v) = (packed_rows(&q.detach())?, packed_rows(&k.detach())?, packed_rows(&v.detach())?);
    // All packed already, unless a caller passes tensors of its own.
    let packed = |x: Option<&Tensor>| x.map(Tensor::contiguous).transpose();
    let (lengths, key_mask, query_mask) = (lengths.contiguous()?, packed(spec.key_mask)?, packed(spec.query_mask)?);
    let acc = q.dtype().accumulator();
    let wide = |x: Option<&Tensor>| x.map(|x| x.detach().to_dtype(acc)?.contiguous()).transpose();
    let (bias_by_distance, sink) = (wide(spec.bias_by_distance)?, wide(spec.sink)?);
    let spec = &DecodeSpec {
        key_mask: key_mask.as_ref(),
        query_mask: query_mask.as_ref(),
        bias_by_distance: bias_by_distance.as_ref(),
        sink: sink.as_ref(),
        ..*spec
    };
    let call = Call { sizes, q: &q, k: &k, v: &v, lengths: &lengths, spec };
    let out = match *q.device() {
        Device::Cpu => dispatch_real!(q.dtype(), R, call.on_cpu::<R>(merged))?,
        Device::Gpu(gpu) => call.on_cuda(gpu, merged)?,
    };
    let out = computed(OP, out, &[&q, &k, &v])?;
    out.permute(&[0, 2, 1, 3])
}

fn check(sizes: &Sizes, q: &Tensor, lengths: &Tensor, spec: &DecodeSpec) -> Result<()> {
    let Sizes { batch, heads, queries, keys, .. } = *sizes;
    ensure!(
        **lengths.shape() == [batch] && lengths.dtype() == DType::I64 && lengths.device() == q.device(),
        Error::shape(OP, format_args!("expected lengths [{batch}] of i64 on {}, got {lengths:?}", q.device()))
    );
    ensure!(
        spec.scale.is_finite()
            && spec.mem_keys <= spec.prefix_len
            && spec.unbiased_keys <= spec.prefix_len
            && spec.prefix_len <= keys,
        Error::argument(
            OP,
            format_args!(
                "expected a finite scale, and prefix_len, mem_keys and unbiased_keys within the keys, got {}, {}, {} and {}",
                spec.scale, spec.prefix_len, spec.mem_keys, spec.unbiased_keys
            )
        )
    );
    check_clamp(spec.softclamp)?;
    spec.sink.map_or(Ok(()), |sink| expect_weights("sink", sink, &[heads], q.device()))?;
    if let Some(mask) = spec.key_mask {
        expect_bool("key_mask", mask, q)?;
        ensure!(
            mask.numel() == batch * (keys - spec.prefix_len),
            Error::shape(
                OP,
                format_args!("expected key_mask [{batch}, {}], got {:?}", keys - spec.prefix_len, mask.shape())
            )
        );
    }
    if let Some(mask) = spec.query_mask {
        expect_bool("query_mask", mask, q)?;
        ensure!(
            **mask.shape() == [batch, queries],
            Error::shape(OP, format_args!("expected query_mask [{batch}, {queries}], got {:?}", mask.shape()))
        );
    }
    if let Some(bias) = spec.bias_by_distance {
        let shape = bias.shape();
        ensure!(
            bias.rank() == 2
                && shape[0] == heads
                && shape[1] > 0
                && bias.dtype().is_float()
                && bias.device() == q.device(),
            Error::shape(
                OP,
                format_args!("expected bias_by_distance [{heads}, distances], got {shape:?} {}", bias.dtype())
            )
        );
        if let Device::Gpu(_) = q.device() {
            size32(shape[1])?;
        }
    }
    Ok(())
}

/// One checked call.
struct Call<'a> {
    sizes: Sizes,
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    lengths: &'a Tensor,
    spec: &'a DecodeSpec<'a>,
}

impl Call<'_> {
    fn on_cuda(&self, gpu: &dyn Gpu, merged: Shape) -> Result<Tensor> {
        let Sizes { batch, heads, queries, keys, .. } = self.sizes;
        let (q, spec) = (self.q, self.spec);
        ensure!(
            keys < i32::MAX as usize / 2 && batch * heads * queries <= i32::MAX as usize,
            Error::shape(
                OP,
                format_args!(
                    "{keys} keys, or {batch} × {heads} × {queries} queries, exceed the kernels' 32-bit positions"
                )
            )
        );
        let mut out = Tensor::uninit(merged, q.dtype(), q.device())?;
        let (kv_heads, e) = (self.k.shape()[1], self.sizes.e);
        // For each query and part of the keys: sums of values; the largest score and the sum of weights.
        let parts = keys.div_ceil(CUDA_PART);
        let scratch = |width: usize| {
            let shape = Shape::new(&[batch * heads * queries * parts, width])?;
            Tensor::uninit(shape, q.dtype().accumulator(), q.device())
        };
        let (mut sums, mut statistics) = (scratch(e)?, scratch(2)?);
        let distances = spec.bias_by_distance.map_or(1, |bias| bias.shape()[1]);
        // Queries that read the same keys: all heads that share them, times all new tokens.
        let sharing = heads / kv_heads * queries;
        let at_once = if sharing == 1 { 1 } else { 4 };
        let blocks = batch * kv_heads * sharing.div_ceil(at_once);
        // Enough to fill any card several times; block `i` takes every `side_by_side`-th part from `i` on.
        let side_by_side = (4096 / blocks).clamp(1, parts);
        let options = [("DTYPE", q.dtype().name()), ("QUERIES", if at_once == 1 { "1" } else { "4" })];
        gpu.kernel("attention_decode", &options)?.launch(
            Grid::new([size32(blocks)?, size32(side_by_side)?, 1], [128, 1, 1]),
            &[
                &args![
                    &mut sums,
                    &mut statistics,
                    Storage(q),
                    Storage(self.k),
                    Storage(self.v),
                    self.lengths,
                    spec.key_mask,
                    spec.query_mask,
                    spec.bias_by_distance,
                    q.layout(),
                    self.k.layout(),
                    self.v.layout(),
                    size32(spec.prefix_len)? as i32,
                    size32(spec.mem_keys)? as i32,
                ][..],
                &spec.window.values(keys)?,
                args![
                    size32(distances)? as i32,
                    size32(spec.unbiased_keys)? as i32,
                    size32(parts)? as i32,
                    spec.scale,
                    spec.softclamp.unwrap_or(0.0)
                ],
            ]
            .concat(),
        )?;
        gpu.kernel("attention_decode_join", &options)?.launch(
            Grid::new([size32(batch * heads * queries)?, 1, 1], [256, 1, 1]),
            args![
                &mut out,
                &sums,
                &statistics,
                Storage(self.v),
                self.lengths,
                spec.sink,
                self.v.layout(),
                size32(spec.prefix_len)? as i32,
                size32(heads)? as i32,
                size32(queries)? as i32,
                size32(parts)? as i32
            ],
        )?;
        Ok(out)
    }

    fn on_cpu<R: Real>(&self, merged: Shape) -> Result<Tensor> {
        let Sizes { batch, heads, queries, keys, d, e, .. } = self.sizes;
        let spec = self.spec;
        let acc = R::DTYPE;
        let lengths = self.lengths.values::<i64>()?;
        // The cache may be far larger than its contents.
        let held =
            lengths.iter().map(|&length| spec.prefix_len + length as usize + queries).max().unwrap_or(0).min(keys);
        let parts = held.div_ceil(PART).max(1);
        let cached = Cached::<R> {
            sizes: self.sizes,
            k: rows(self.k)?,
            v: rows(self.v)?,
            lengths,
            key_mask: spec.key_mask.map(Tensor::values::<bool>).transpose()?,
            query_mask: spec.query_mask.map(Tensor::values::<bool>).transpose()?,
            bias_by_distance: spec.bias_by_distance.map(Tensor::values::<R>).transpose()?,
            unbiased_keys: spec.unbiased_keys,
            softclamp: spec.softclamp.map(R::from_f64),
            scale: R::from_f64(spec.scale),
            prefix_len: spec.prefix_len,
            mem_keys: spec.mem_keys,
            window: spec.window,
        };
        // Queries in the compute type, `[batch, heads, query, d]`.
        let wide = self.q.to_dtype(acc)?.contiguous()?;
        let wide = wide.values::<R>()?;
        // For each part and query: sums, the maximum score and the sum of weights.
        let width = queries * (e + 2);
        let mut sums = Tensor::uninit(Shape::new(&[batch * heads * parts, width])?, acc, self.q.device())?;
        let cost = queries * PART.min(held) * (d + e);
        cpu::for_rows(sums.values_mut::<R>()?, width, cost, |first, rows| {
            for (index, sums) in rows.chunks_exact_mut(width).enumerate() {
                let (head, part) = ((first + index) / parts, (first + index) % parts);
                let q = &wide[head * queries * d..][..queries * d];
                cached.part(head / heads, head % heads, part, q, sums);
            }
        });
        let sums = sums.values::<R>()?;
        let mut out = Tensor::uninit(merged, self.q.dtype(), self.q.device())?;
        let largest = R::from_f64(-self.q.dtype().lowest());
        let sinks = spec.sink.map(Tensor::values::<R>).transpose()?;
        let outs = [Out::new(out.floats_mut(OP)?, e)];
        for_rows_of::<R, 1, 0>(outs, [], Sums::none(), parts * e, &|first, [rows], [], _| {
            for (index, out) in rows.chunks_exact_mut(e).enumerate() {
                let (at, head) = ((first + index) / heads, (first + index) % heads);
                let (b, i) = (at / queries, at % queries);
                let of_head = &sums[(b * heads + head) * parts * width..][..parts * width];
                if join(of_head, width, i * (e + 2), sinks.map(|sinks| sinks[head]), largest, out) {
                    cached.spread(b, head, largest, out);
                }
            }
        });
        Ok(out)
    }
}

/// Rows of a cache `[batch, heads, capacity, features]`.
struct CacheRows<'a> {
    data: Floats<'a>,
    batch: usize,
    head: usize,
    row: usize,
}

fn rows(x: &Tensor) -> Result<CacheRows<'_>> {
    let (layout, storage) = (x.layout(), x.stored_floats(OP)?);
    let strides = layout.strides();
    let data = storage.range(layout.offset..storage.len());
    Ok(CacheRows { data, batch: strides[0], head: strides[1], row: strides[2] })
}

impl<'a> CacheRows<'a> {
    fn from(&self, batch: usize, head: usize, row: usize) -> Floats<'a> {
        self.data.range(batch * self.batch + head * self.head + row * self.row..self.data.len())
    }
}

/// Inputs of all parts.
struct Cached<'a, R> {
    sizes: Sizes,
    k: CacheRows<'a>,
    v: CacheRows<'a>,
    lengths: &'a [i64],
    key_mask: Option<&'a [u8]>,
    query_mask: Option<&'a [u8]>,
    bias_by_distance: Option<&'a [R]>,
    unbiased_keys: usize,
    softclamp: Option<R>,
    scale: R,
    prefix_len: usize,
    mem_keys: usize,
    window: Window,
}

impl<R: Real> Cached<'_, R> {
    /// Returns the keys that causality, the window and the query mask leave to a query at a position.
    fn kept(&self, b: usize, i: usize, position: usize) -> Range<usize> {
        let mut end = (position + 1).min(self.sizes.keys);
        if self.query_mask.is_some_and(|mask| mask[b * self.sizes.queries + i] == 0) {
            end = end.min(self.mem_keys);
        }
        let start = self.window.first_key(position as i64).max(0) as usize;
        start.min(end)..end
    }

    /// Computes for each query the weighted sum of the part's values, the largest score, and the sum of the weights
    /// relative to it, which is 0 only if no key was kept.
    fn part(&self, b: usize, head: usize, part: usize, q: &[R], sums: &mut [R]) {
        let Sizes { d, e, keys, .. } = self.sizes;
        let kv_head = head / self.sizes.group();
        let mut scores = [R::ZERO; PART];
        for (i, sums) in sums.chunks_exact_mut(e + 2).enumerate() {
            let (sums, statistics) = sums.split_at_mut(e);
            sums.fill(R::ZERO);
            statistics.copy_from_slice(&[R::NEG_INFINITY, R::ZERO]);
            let position = self.prefix_len + self.lengths[b] as usize + i;
            let kept = self.kept(b, i, position);
            let (start, end) = (kept.start.max(part * PART), kept.end.min((part + 1) * PART));
            if start >= end {
                continue;
            }
            let scores = &mut scores[..end - start];
            products_of(&q[i * d..][..d], self.k.from(b, kv_head, start), self.k.row, self.scale, scores);
            if let Some(bias) = self.bias_by_distance {
                let distances = bias.len() / self.sizes.heads;
                let curve = &bias[head * distances..][..distances];
                let unbiased = self.unbiased_keys.saturating_sub(start);
                for (at, score) in scores.iter_mut().enumerate().skip(unbiased) {
                    *score += curve[(position - start - at).min(distances - 1)];
                }
            }
            if let Some(bound) = self.softclamp {
                clamp(scores, bound);
            }
            let mask = self.key_mask.map(|mask| &mask[b * (keys - self.prefix_len)..]);
            if let Some(mask) = mask {
                for (key, score) in (start..end).zip(&mut *scores) {
                    if key >= self.prefix_len && mask[key - self.prefix_len] == 0 {
                        *score = R::NEG_INFINITY;
                    }
                }
            }
            let (max, sum) = exponentials(scores, R::from_f64(1.0 / PART as f64));
            if sum != R::ZERO {
                add_weighted_of(scores, self.v.from(b, kv_head, start), self.v.row, sums);
            }
            // Scores may be −∞ without a mask.
            let kept = |key: usize| key < self.prefix_len || mask.is_none_or(|mask| mask[key - self.prefix_len] != 0);
            let overflown = sum == R::ZERO && (start..end).any(kept);
            statistics.copy_from_slice(&[max, if overflown { R::ONE } else { sum }]);
        }
    }

    /// Writes the mean of all values of a sequence.
    fn spread(&self, b: usize, head: usize, largest: R, out: &mut [R]) {
        let Sizes { queries, keys, e, .. } = self.sizes;
        let kv_head = head / self.sizes.group();
        let held = (self.prefix_len + self.lengths[b] as usize + queries).min(keys);
        let (mut sums, mut value) = (vec![R::ZERO; e], vec![R::ZERO; e]);
        let part = part_of(held);
        for key in 0..held {
            self.v.from(b, kv_head, key).range(0..e).read(&mut value);
            for (sum, value) in sums.iter_mut().zip(&value) {
                *sum += *value * part;
            }
        }
        mean(&sums, R::ONE / (R::from_f64(held as f64) * part), largest, out);
    }
}

/// Computes [`products`] of keys of any type with compute type `R`.
fn products_of<R: Real>(q: &[R], k: Floats, row: usize, scale: R, s: &mut [R]) {
    match k {
        Floats::BF16(k) => products::<bf16>(cast_slice(q), k, row, scale.to_f32(), cast_slice_mut(s)),
        Floats::F16(k) => {
            let (q, s) = (cast_slice::<R, f32>(q), cast_slice_mut::<R, f32>(s));
            for_f16_rows(k, row, q.len(), s.len(), &mut |range, k| {
                products::<f32>(q, k, q.len(), scale.to_f32(), &mut s[range]);
            });
        }
        Floats::F32(k) => products::<R>(q, cast_slice(k), row, scale, s),
        Floats::F64(k) => products::<R>(q, cast_slice(k), row, scale, s),
    }
}

/// Calls `body` with packed rows in f32, some at a time: the first `len` values of `count` rows that are `row` apart.
fn for_f16_rows(x: &[f16], row: usize, len: usize, count: usize, body: &mut dyn FnMut(Range<usize>, &[f32])) {
    const TOGETHER: usize = 8;
    let mut memory = vec![0.0; TOGETHER * len];
    for first in (0..count).step_by(TOGETHER) {
        let range = first..count.min(first + TOGETHER);
        for (index, to) in range.clone().zip(memory.chunks_exact_mut(len.max(1))) {
            widen(&x[index * row..][..len], to);
        }
        body(range.clone(), &memory[..range.len() * len]);
    }
}

/// Computes [`add_weighted`] of values of any type.
fn add_weighted_of<R: Real>(p: &[R], v: Floats, row: usize, out: &mut [R]) {
    match v {
        Floats::BF16(v) => add_weighted::<bf16>(cast_slice(p), v, row, cast_slice_mut(out)),
        Floats::F16(v) => {
            let (p, out) = (cast_slice::<R, f32>(p), cast_slice_mut::<R, f32>(out));
            for_f16_rows(v, row, out.len(), p.len(), &mut |range, v| {
                add_weighted::<f32>(&p[range], v, out.len(), out);
            });
        }
        Floats::F32(v) => add_weighted::<R>(p, cast_slice(v), row, out),
        Floats::F64(v) => add_weighted::<R>(p, cast_slice(v), row, out),
    }
}

vectorized! {
    /// Computes `s[j] = scale · q·k[j]`, the rows of `k` being `row` apart.
    fn products<T: Float>(q: &[T::Acc], k: &[T], row: usize, scale: T::Acc, s: &mut [T::Acc]) {
        for (j, s) in s.iter_mut().enumerate() {
            *s = product::<T, FUSED>(q, &k[j * row..][..q.len()]) * scale;
        }
    }
}

/// Computes `q·k`.
#[inline(always)]
fn product<T: Float, const FUSED: bool>(q: &[T::Acc], k: &[T]) -> T::Acc {
    let mut lanes = [T::Acc::ZERO; LANES];
    let (q, q_rest) = q.as_chunks::<LANES>();
    let (k, k_rest) = k.as_chunks::<LANES>();
    for (q, k) in q.iter().zip(k) {
        for lane in 0..LANES {
            lanes[lane] = q[lane].fma::<FUSED>(k[lane].to_acc(), lanes[lane]);
        }
    }
    let mut rest = T::Acc::ZERO;
    for (q, k) in q_rest.iter().zip(k_rest) {
        rest = q.fma::<FUSED>(k.to_acc(), rest);
    }
    let [even, odd]: [T::Acc; 2] = halved::<T::Acc, 4, 2>(halved::<T::Acc, 8, 4>(halved::<T::Acc, LANES, 8>(lanes)));
    (even + odd) + rest
}

/// Adds both halves: constant lengths keep them in registers.
#[inline(always)]
fn halved<A: Real, const N: usize, const HALF: usize>(lanes: [A; N]) -> [A; HALF] {
    let mut sums = [A::ZERO; HALF];
    for lane in 0..HALF {
        sums[lane] = lanes[lane] + lanes[lane + HALF];
    }
    sums
}

vectorized! {
    /// Computes `out += Σ_j p[j] · v[j]`, the rows of `v` being `row` apart.
    fn add_weighted<T: Float>(p: &[T::Acc], v: &[T], row: usize, out: &mut [T::Acc]) {
        let (wide, rest) = out.as_chunks_mut::<WIDE>();
        let narrow = wide.len() * WIDE;
        for (index, out) in wide.iter_mut().enumerate() {
            let mut sums = *out;
            for (j, p) in p.iter().enumerate() {
                let v = &v[j * row + index * WIDE..][..WIDE];
                for lane in 0..WIDE {
                    sums[lane] = p.fma::<FUSED>(v[lane].to_acc(), sums[lane]);
                }
            }
            *out = sums;
        }
        for (j, p) in p.iter().enumerate() {
            for (out, v) in rest.iter_mut().zip(&v[j * row + narrow..]) {
                *out = p.fma::<FUSED>(v.to_acc(), *out);
            }
        }
    }
}

vectorized! {
    /// Replaces scores with `part · exp(score − max)`; returns the maximum and the sum.
    fn exponentials<A: Real>(s: &mut [A], part: A) -> (A, A) {
        let mut max = A::NEG_INFINITY;
        for s in &*s {
            max = max.max(*s);
        }
        // With no key kept, every exponential must be 0 and not NaN.
        let shift = if max == A::NEG_INFINITY { A::ZERO } else { max };
        for s in &mut *s {
            *s = (*s - shift).probability::<FUSED>() * part;
        }
        let mut sum = A::ZERO;
        for s in &*s {
            sum += *s;
        }
        (max, sum)
    }
}

/// Returns the power of two that keeps a sum of `count` numbers in their range without losing a digit.
fn part_of<A: Real>(count: usize) -> A {
    A::from_f64(1.0 / count.next_power_of_two() as f64)
}

/// Computes `out = sums · factor`, a mean of values.
fn mean<R: Real>(sums: &[R], factor: R, largest: R, out: &mut [R]) {
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = mean_of(*sum, factor, largest);
    }
}

/// Joins the parts of one query, whose entries start at `at` in each row of `width`, and the sink; returns `true` if no
/// key was kept and there is none.
fn join<R: Real>(parts: &[R], width: usize, at: usize, sink: Option<R>, largest: R, out: &mut [R]) -> bool {
    let e = out.len();
    let of = |part: &[R]| (part[at + e], part[at + e + 1]);
    let max = parts.chunks_exact(width).fold(sink.unwrap_or(R::NEG_INFINITY), |max, part| max.max(of(part).0));
    if max == R::NEG_INFINITY {
        out.fill(R::from_f64(f64::NAN));
        return parts.chunks_exact(width).all(|part| of(part).1 == R::ZERO);
    }
    if parts.len() == width && sink.is_none() {
        mean(&parts[at..][..e], R::ONE / of(parts).1, largest, out);
        return false;
    }
    let share = part_of::<R>(parts.len() / width);
    // Weights of parts are divided by their length.
    let alone = |sink: R| (sink - max).exp() * share * R::from_f64(1.0 / PART as f64);
    let mut total = sink.map_or(R::ZERO, alone);
    let mut sums = vec![R::ZERO; e];
    for part in parts.chunks_exact(width) {
        let factor = (of(part).0 - max).exp() * share;
        total += of(part).1 * factor;
        for (sum, of_part) in sums.iter_mut().zip(&part[at..]) {
            *sum += *of_part * factor;
        }
    }
    mean(&sums, R::ONE / total, largest, out);
    false
}
