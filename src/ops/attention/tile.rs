//! A tile: the scores of a block of queries against a block of keys, with every bias and mask, shared by the forward
//! and the backward pass.

use std::ops::Range;

use super::{
    OP, Problem, Sizes, Window,
    operand::{Rows, product, transposed},
};
use crate::{
    Philox, Result, Tensor,
    device::{
        floats::Floats,
        scratch::{User, aligned, lend},
        simd::vectorized,
    },
    dtype::{Float, Real},
    gemm::Multiply,
    ops::reduce::{LANES, join, sum_slice},
};

/// Number of queries per tile.
pub(super) const QUERIES: usize = 256;
/// Number of keys per tile, and the stride of its rows.
pub(super) const KEYS: usize = 128;

/// Tensor that broadcasts to the scores; its last dimension is packed or repeated.
struct Broadcast<V> {
    data: V,
    strides: [usize; 4],
}

impl<V> Broadcast<V> {
    fn new(x: &Tensor, sizes: &Sizes, data: impl FnOnce(usize) -> V) -> Result<Self> {
        let layout = x.layout().expand(sizes.scores()?);
        let mut strides = [0; 4];
        strides.copy_from_slice(layout.strides());
        Ok(Self { data: data(layout.offset), strides })
    }

    /// Returns the range of the entries of a run of keys: one each, or one for all of them.
    fn row(&self, index: [usize; 4], keys: usize) -> Range<usize> {
        let start: usize = index.iter().zip(&self.strides).map(|(index, stride)| index * stride).sum();
        start..start + if self.strides[3] == 1 { keys } else { 1 }
    }
}

impl Broadcast<Floats<'_>> {
    /// Adds the entries of a run of at most [`KEYS`] keys, the first of which is at `index`.
    fn add<A: Real>(&self, s: &mut [A], index: [usize; 4]) {
        let bias = self.data.range(self.row(index, s.len()));
        if let Some(bias) = bias.direct() {
            return add_bias(s, bias);
        }
        let mut memory = [A::ZERO; KEYS];
        let wide = &mut memory[..bias.len()];
        bias.read(wide);
        add_bias(s, wide);
    }
}

/// Position of a tile.
#[derive(Clone, Copy)]
pub(super) struct At {
    pub batch: usize,
    pub head: usize,
    /// First query.
    pub query: usize,
    pub queries: usize,
    /// First key.
    pub key: usize,
    pub keys: usize,
}

impl At {
    /// Returns the number of keys, rounded up to fill the last vector.
    pub fn width(&self) -> usize {
        self.keys.next_multiple_of(LANES)
    }
}

/// Reason why all scores of a query are −∞.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Empty {
    /// No key is left.
    Masked,
    /// The bias of every key left is −∞.
    Biased,
    /// Sums have overflowed.
    Overflown,
}

/// Inputs of all tiles of one call: operands of products in their type, all else in `A`.
pub(super) struct Tiles<'a, A> {
    pub sizes: Sizes,
    pub q: Rows<'a>,
    pub k: Rows<'a>,
    pub v: Rows<'a>,
    pub scale: A,
    /// Largest number of the tensors' type.
    pub largest: A,
    causal: bool,
    mask: Option<Broadcast<&'a [u8]>>,
    query_mask: Option<&'a [u8]>,
    key_mask: Option<&'a [u8]>,
    mem_keys: usize,
    window: Window,
    bias: Option<Broadcast<Floats<'a>>>,
    /// `[heads, queries + keys − 1]`.
    curves: Option<Vec<A>>,
    /// Number of leading keys that the curves leave out.
    unbiased: usize,
    softclamp: Option<A>,
    /// Per head.
    sinks: Option<Vec<f64>>,
    dropout: Option<super::Dropout>,
}

impl<'a, A: Real + Multiply> Tiles<'a, A> {
    /// Creates the tiles of a call; `operands` are queries, keys and values in the type of products.
    pub fn new(problem: &'a Problem, operands: &'a [Tensor; 3]) -> Result<Self> {
        let sizes = problem.sizes;
        let padding = |mask: &'a Option<Tensor>| mask.as_ref().map(|mask| mask.values::<bool>()).transpose();
        let [q, k, v] = operands;
        let of_mask = |mask: &'a Tensor| {
            let data = mask.storage::<bool>()?;
            Broadcast::new(mask, &sizes, |offset| &data[offset..])
        };
        let of_bias = |bias: &'a Tensor| {
            let data = bias.stored_floats(OP)?;
            Broadcast::new(bias, &sizes, |offset| data.range(offset..data.len()))
        };
        Ok(Self {
            sizes,
            q: Rows::new(q)?,
            k: Rows::new(k)?,
            v: Rows::new(v)?,
            scale: <A as Float>::from_f64(problem.scale),
            largest: <A as Float>::from_f64(-problem.q.dtype().lowest()),
            causal: problem.causal,
            mask: problem.mask.as_ref().map(of_mask).transpose()?,
            query_mask: padding(&problem.query_mask)?,
            key_mask: padding(&problem.key_mask)?,
            mem_keys: problem.mem_keys,
            window: problem.window,
            bias: problem.bias.as_ref().map(of_bias).transpose()?,
            curves: problem.position.as_ref().map(|position| position.curves()).transpose()?,
            unbiased: problem.unbiased,
            softclamp: problem.softclamp.map(<A as Float>::from_f64),
            sinks: problem.sink.as_ref().map(Tensor::to_f64_vec).transpose()?,
            dropout: problem.dropout.clone(),
        })
    }

    /// Returns `true` if products take operands that are rounded to bf16.
    pub fn rounds(&self) -> bool {
        self.q.rounds()
    }

    /// Returns the keys that causality, the window and the query mask leave to a query.
    fn kept(&self, batch: usize, query: usize) -> Range<usize> {
        let keys = self.sizes.keys;
        let position = query as i64 + keys as i64 - self.sizes.queries as i64;
        let mut end = if self.causal { (position + 1).clamp(0, keys as i64) as usize } else { keys };
        if self.query_mask.is_some_and(|mask| mask[batch * self.sizes.queries + query] == 0) {
            end = end.min(self.mem_keys);
        }
        let start = self.window.first_key(position).clamp(0, keys as i64) as usize;
        start.min(end)..end
    }

    /// Returns the tile narrowed to the queries, from the first to the last, that may keep one of its scores, or
    /// `None`; attention masks are not considered.
    pub fn reach(&self, at: At) -> Option<At> {
        let sees = |&query: &usize| {
            let kept = self.kept(at.batch, query);
            kept.start.max(at.key) < kept.end.min(at.key + at.keys)
        };
        if self.padding(at).is_some_and(|(free, mask)| free == 0 && mask.iter().all(|&keep| keep == 0)) {
            return None;
        }
        let mut queries = at.query..at.query + at.queries;
        let first = queries.find(sees)?;
        let last = queries.rfind(sees).unwrap_or(first);
        Some(At { query: first, queries: last + 1 - first, ..at })
    }

    /// Returns the number of leading keys of the tile that no padding masks, and the mask of the others.
    fn padding(&self, at: At) -> Option<(usize, &'a [u8])> {
        let mask = self.key_mask?;
        let length = mask.len() / self.sizes.batch;
        // The mask may leave out the memory keys.
        let skipped = self.sizes.keys - length;
        let free = self.mem_keys.saturating_sub(at.key).min(at.keys);
        let start = at.batch * length + (at.key + free).saturating_sub(skipped);
        Some((free, &mask[start..start + at.keys - free]))
    }

    /// Computes scores with biases, −∞ where masked; rows of `s` are [`KEYS`] apart. They are to be multiplied by the
    /// returned number, the scale if nothing but masks follows it: one pass less over the tile.
    pub fn scores(&self, at: At, s: &mut [A]) -> A {
        let q = self.q.block(at.batch, at.head, at.query);
        let k = self.k.block(at.batch, at.head / self.sizes.group(), at.key);
        product([at.queries, at.keys, self.sizes.d], q, transposed(k), false, s, KEYS);
        let s = &mut s[..at.queries * KEYS];
        let plain = self.curves.is_none() && self.bias.is_none() && self.softclamp.is_none();
        // A negative scale would change the order, and −∞ times 0 is NaN.
        let factor = if plain && self.scale > A::ZERO { self.scale } else { A::ONE };
        match &self.curves {
            None if factor == self.scale => {}
            None => scale_rows(s, at.keys, self.scale),
            Some(curves) => {
                let curve = self.curve(at);
                scale_rows_and_add(s, self.unbiased(at)..at.keys, self.scale, &curves[curve]);
            }
        }
        let padding = self.padding(at);
        for (row, s) in s.chunks_exact_mut(KEYS).enumerate() {
            let query = at.query + row;
            let (s, behind) = s.split_at_mut(at.keys);
            if let Some(bias) = &self.bias {
                bias.add(s, [at.batch, at.head, query, at.key]);
            }
            let kept = self.kept(at.batch, query);
            let kept = kept.start.saturating_sub(at.key).min(at.keys)..kept.end.saturating_sub(at.key).min(at.keys);
            if let Some(bound) = self.softclamp {
                clamp(&mut s[kept.clone()], bound);
            }
            if let Some(mask) = &self.mask {
                apply_mask(s, &mask.data[mask.row([at.batch, at.head, query, at.key], at.keys)]);
            }
            if let Some((free, mask)) = padding {
                apply_mask(&mut s[free..], mask);
            }
            s[..kept.start].fill(A::NEG_INFINITY);
            s[kept.end..].fill(A::NEG_INFINITY);
            behind.fill(A::NEG_INFINITY);
        }
        factor
    }

    /// Returns the tile, in halves along the keys if causality cuts it: [`reach`](Tiles::reach) leaves fewer queries to each.
    pub fn halves(&self, at: At) -> impl Iterator<Item = At> {
        const HALF: usize = KEYS / 2;
        let is_cut = self.causal && at.key + at.keys + self.sizes.queries > at.query + self.sizes.keys + 1;
        let step = if is_cut && at.queries >= HALF { HALF } else { KEYS };
        (0..at.keys).step_by(step).map(move |first| At { key: at.key + first, keys: step.min(at.keys - first), ..at })
    }

    /// Returns the part of the position bias that a tile reads: it starts with that of its last query and first key,
    /// and each query before it starts one element later.
    pub fn curve(&self, at: At) -> Range<usize> {
        let distances = self.sizes.queries + self.sizes.keys - 1;
        let start = at.head * distances + self.sizes.queries + at.key - at.query - at.queries;
        start..start + at.keys + at.queries - 1
    }

    /// Returns the number of leading keys of the tile that curves leave out.
    pub fn unbiased(&self, at: At) -> usize {
        self.unbiased.saturating_sub(at.key).min(at.keys)
    }

    /// Returns the soft clamp's bound.
    pub fn softclamp(&self) -> Option<A> {
        self.softclamp
    }

    /// Returns the largest score and the sum of exponentials that a query of the head starts with: those of the sink.
    pub fn start(&self, head: usize) -> [A; 2] {
        match self.sinks.as_ref().map(|sinks| sinks[head]) {
            Some(sink) if sink != f64::NEG_INFINITY => [<A as Float>::from_f64(sink), A::ONE],
            _ => [A::NEG_INFINITY, A::ZERO],
        }
    }

    /// Returns `true` if weights are dropped.
    pub fn drops(&self) -> bool {
        self.dropout.is_some()
    }

    /// Returns the factor of a kept weight.
    pub fn dropout_factor(&self) -> A {
        self.dropout.as_ref().map_or(A::ONE, |dropout| <A as Float>::from_f64(dropout.factor))
    }

    /// Writes the dropout factors of one query's weights, `kept` or 0; leaves them unchanged without dropout.
    pub fn dropout(&self, at: At, row: usize, kept: A, factors: &mut [A]) {
        let Some(dropout) = &self.dropout else { return };
        let Sizes { heads, queries, keys, .. } = self.sizes;
        let first = (((at.batch * heads + at.head) * queries + at.query + row) * keys + at.key) as u64;
        keep_factors(dropout.stream.random, first, dropout.threshold, kept, &mut factors[..at.keys]);
    }

    /// Applies dropout to the weights of a tile, multiplying what is kept.
    pub fn drop_weights(&self, at: At, kept: A, p: &mut [A], factors: &mut [A]) {
        if self.drops() {
            for (row, p) in p.chunks_exact_mut(KEYS).take(at.queries).enumerate() {
                self.dropout(at, row, kept, factors);
                multiply(&mut p[..at.keys], factors);
            }
        }
    }

    /// Returns the reason why a query has no weight.
    pub fn empty(&self, at: At, row: usize) -> Empty {
        let (query, keys) = (at.query + row, self.sizes.keys);
        let all = At { key: 0, keys, ..at };
        let (free, padding) = self.padding(all).unwrap_or((keys, &[]));
        let mask =
            self.mask.as_ref().map_or(&[1][..], |mask| &mask.data[mask.row([at.batch, at.head, query, 0], keys)]);
        let kept = |key: &usize| (*key < free || padding[*key - free] != 0) && mask[*key % mask.len()] != 0;
        let mut why = Empty::Masked;
        for key in self.kept(at.batch, query).filter(kept) {
            let mut bias = [A::ZERO];
            if let Some(added) = &self.bias {
                added.add(&mut bias, [at.batch, at.head, query, key]);
            }
            if bias != [A::NEG_INFINITY] {
                return Empty::Overflown;
            }
            why = Empty::Biased;
        }
        why
    }

    /// Writes the weights of fully masked queries, `1 / keys` for every key, times `part`, and applies dropout to them.
    pub fn spread(&self, at: At, masked: &dyn Fn(usize) -> bool, [part, kept]: [A; 2], p: &mut [A], factors: &mut [A]) {
        let weight = part / <A as Float>::from_f64(self.sizes.keys as f64);
        for (row, p) in p.chunks_exact_mut(KEYS).take(at.queries).enumerate().filter(|(row, _)| masked(*row)) {
            p[..at.keys].fill(weight);
            if self.drops() {
                self.dropout(at, row, kept, factors);
                multiply(&mut p[..at.keys], factors);
            }
        }
    }
}

vectorized! {
    fn scale_rows<A: Real>(s: &mut [A], keys: usize, scale: A) {
        for s in s.chunks_exact_mut(KEYS) {
            for s in &mut s[..keys] {
                *s *= scale;
            }
        }
    }
}

vectorized! {
    /// The curve of the last row comes first; keys before the `biased` ones have none.
    fn scale_rows_and_add<A: Real>(s: &mut [A], biased: Range<usize>, scale: A, curve: &[A]) {
        for (start, s) in s.chunks_exact_mut(KEYS).rev().enumerate() {
            let (unbiased, s) = s[..biased.end].split_at_mut(biased.start);
            for s in unbiased {
                *s *= scale;
            }
            for (s, curve) in s.iter_mut().zip(&curve[start + biased.start..]) {
                *s = *s * scale + *curve;
            }
        }
    }
}

vectorized! {
    /// Computes `bound · tanh(score / bound)`.
    pub(super) fn clamp<A: Real>(s: &mut [A], bound: A) {
        let part = A::ONE / bound;
        for s in s {
            *s = bound * (*s * part).fused_tanh::<FUSED>();
        }
    }
}

vectorized! {
    /// Computes the derivatives of [`clamp`] from its results, 0 at masked scores.
    pub(super) fn clamp_slopes<A: Real>(s: &[A], slopes: &mut [A], bound: A) {
        let part = A::ONE / bound;
        for (s, slope) in s.iter().zip(slopes) {
            let tanh = *s * part;
            *slope = (A::ONE - tanh * tanh).max(A::ZERO);
        }
    }
}

vectorized! {
    fn add_bias<A: Real>(s: &mut [A], bias: &[A]) {
        if let [bias] = bias {
            for s in s {
                *s += *bias;
            }
        } else {
            for (s, bias) in s.iter_mut().zip(bias) {
                *s += *bias;
            }
        }
    }
}

vectorized! {
    fn apply_mask<A: Real>(s: &mut [A], mask: &[u8]) {
        if let [keep] = mask {
            if *keep == 0 {
                s.fill(A::NEG_INFINITY);
            }
        } else {
            for (s, keep) in s.iter_mut().zip(mask) {
                *s = if *keep != 0 { *s } else { A::NEG_INFINITY };
            }
        }
    }
}

vectorized! {
    /// Word `first + n` of the stream decides whether element `n` is kept.
    fn keep_factors<A: Real>(stream: Philox, first: u64, threshold: u64, factor: A, factors: &mut [A]) {
        const GROUP: u64 = Philox::GROUP as u64;
        let (mut words, skip) = ([0; KEYS + Philox::GROUP], (first % GROUP) as usize);
        let groups = (skip + factors.len()).div_ceil(Philox::GROUP);
        for (group, words) in words.as_chunks_mut().0.iter_mut().take(groups).enumerate() {
            stream.group(first / GROUP + group as u64, words);
        }
        // Where every word is below the threshold, 2³², the factor is zero.
        let threshold = threshold.min(u32::MAX.into()) as u32;
        for (factor_of, word) in factors.iter_mut().zip(&words[skip..]) {
            *factor_of = if *word >= threshold { factor } else { A::ZERO };
        }
    }
}

vectorized! {
    /// Performs one step of the online softmax: turns the scores of a tile, times `factor`, into `exp(score − max)`, where
    /// `max` is that of all tiles so far, and brings the sums so far (`sum`, and rows of `acc`) to that maximum.
    pub(super) fn softmax_step<A: Real>(
        s: &mut [A],
        width: usize, factor: A,
        max: &mut [A],
        sum: &mut [A],
        acc: &mut [A],
    ) {
        let e = acc.len() / max.len();
        for (row, s) in s.chunks_exact_mut(KEYS).take(max.len()).enumerate() {
            let s = &mut s[..width];
            let mut lanes = [A::NEG_INFINITY; LANES];
            for s in s.chunks_exact(LANES) {
                for (lane, s) in lanes.iter_mut().zip(s) {
                    *lane = lane.max(*s);
                }
            }
            let largest = lanes.iter().fold(max[row], |max, lane| max.max(*lane * factor));
            // With no key kept so far, every exponential must be 0 and not NaN.
            let shift = if largest == A::NEG_INFINITY { A::ZERO } else { largest };
            let mut lanes = [A::ZERO; LANES];
            for s in s.chunks_exact_mut(LANES) {
                for (lane, s) in lanes.iter_mut().zip(s) {
                    *s = (*s * factor - shift).probability::<FUSED>();
                    *lane += *s;
                }
            }
            let correction = (max[row] - shift).probability::<FUSED>();
            sum[row] = sum[row] * correction + join(lanes, |a, b| a + b);
            if largest != max[row] {
                for acc in &mut acc[row * e..(row + 1) * e] {
                    *acc *= correction;
                }
            }
            max[row] = largest;
        }
    }
}

vectorized! {
    /// Weights from scores, times `factor`: `exp(score − largest)`, times the row's share and `part`.
    pub(super) fn weights<A: Real>(s: &mut [A], width: usize, factor: A, part: A, statistics: &[[A; 2]]) {
        for (s, [largest, share]) in s.chunks_exact_mut(KEYS).zip(statistics) {
            let share = *share * part;
            for s in &mut s[..width] {
                *s = (*s * factor - *largest).probability::<FUSED>() * share;
            }
        }
    }
}

/// Returns the weight that multiplies the gradient of a score: a key with all the weight passes none, since `dp −
/// delta` is only rounding error there. A product with 0 keeps NaN and infinities.
#[inline(always)]
fn slope<A: Real>(p: A) -> A {
    if p == A::ONE { A::ZERO } else { p }
}

vectorized! {
    /// Computes `ds = p ⊙ (dp − delta)`, over `dp`.
    pub(super) fn score_gradients<A: Real>(p: &[A], dp: &mut [A], width: usize, delta: &[A]) {
        for ((p, dp), delta) in p.chunks_exact(KEYS).zip(dp.chunks_exact_mut(KEYS)).zip(delta) {
            for (p, dp) in p[..width].iter().zip(&mut dp[..width]) {
                *dp = slope(*p) * (*dp - *delta);
            }
        }
    }
}

vectorized! {
    /// Like [`score_gradients`], but for one row with dropout: leaves the weights as they multiply the values.
    pub(super) fn score_gradients_dropped<A: Real>(p: &mut [A], dp: &mut [A], factors: &[A], delta: A) {
        for ((p, dp), factor) in p.iter_mut().zip(dp).zip(factors) {
            *dp = slope(*p) * (*dp * *factor - delta);
            *p *= *factor;
        }
    }
}

vectorized! {
    pub(super) fn dot<T: Float>(x: &[T], y: &[T]) -> T::Acc {
        let (x, y) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
        let mut rest = T::Acc::ZERO;
        for (x, y) in x.remainder().iter().zip(y.remainder()) {
            rest += x.to_acc() * y.to_acc();
        }
        let mut lanes = [T::Acc::ZERO; LANES];
        for (x, y) in x.zip(y) {
            for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
                *lane += x.to_acc() * y.to_acc();
            }
        }
        rest + join(lanes, |a, b| a + b)
    }
}

vectorized! {
    /// Returns `true` if there is neither an infinity nor NaN.
    pub(super) fn finite<A: Real>(x: &[A]) -> bool {
        let mut lanes = [A::ZERO; LANES];
        let (groups, rest) = x.as_chunks::<LANES>();
        for x in groups {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane += *x * A::ZERO;
            }
        }
        join(lanes, |a, b| a + b) == A::ZERO && rest.iter().all(|x| *x * A::ZERO == A::ZERO)
    }
}

/// Computes `sum · factor`, the mean of values up to `largest`: only rounding can say that it is larger.
#[inline(always)]
pub(super) fn mean_of<A: Real>(sum: A, factor: A, largest: A) -> A {
    let mean = sum * factor;
    if sum * A::ZERO != A::ZERO {
        mean
    } else if mean > largest {
        largest
    } else if mean < -largest {
        -largest
    } else {
        mean
    }
}

vectorized! {
    pub(super) fn sum<A: Real>(x: &[A]) -> A {
        sum_slice::<A>(x)
    }
}

vectorized! {
    /// Computes `to = factor · Σ rows`, rows being `step` apart.
    pub(super) fn sum_rows<A: Real>(rows: &[A], step: usize, count: usize, factor: A, to: &mut [A]) {
        for (column, to) in to.iter_mut().enumerate() {
            let mut sum = rows[column];
            for row in 1..count {
                sum += rows[row * step + column];
            }
            *to = sum * factor;
        }
    }
}

vectorized! {
    pub(super) fn multiply<A: Real>(x: &mut [A], factors: &[A]) {
        for (x, factor) in x.iter_mut().zip(factors) {
            *x *= *factor;
        }
    }
}

vectorized! {
    pub(super) fn add<A: Real>(sum: &mut [A], x: &[A]) {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += *x;
        }
    }
}

/// Calls the closure with pieces of this thread's scratch memory, of unspecified content.
pub(super) fn with_scratch<A: Real, const N: usize, R>(
    lengths: [usize; N],
    body: impl FnOnce([&mut [A]; N]) -> R,
) -> R {
    // Pieces start at 64-byte cache lines.
    let line = 64 / size_of::<A>();
    let total: usize = lengths.iter().map(|length| length.next_multiple_of(line)).sum();
    lend(User::Attention, |[memory, ..]| {
        let mut rest: &mut [A] = aligned(memory, total);
        body(lengths.map(|length| {
            let (piece, behind) = std::mem::take(&mut rest).split_at_mut(length.next_multiple_of(line));
            rest = behind;
            &mut piece[..length]
        }))
    })
}
