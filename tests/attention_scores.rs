//! Attention at every finite score, and beyond: weights, gradients and classes of values against the f64 definition.

mod common;
#[path = "common/levels.rs"]
mod levels;
#[path = "attention_scores/overflow.rs"]
mod overflow;

use common::device;
use x_transformers::{
    DType, Device, Philox, Result, Tape, Tensor,
    ops::{AttentionSpec, DecodeSpec, PositionBias, attention, attention_decode},
};

const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::BF16, DType::F16];
const NAN: f64 = f64::NAN;
const INFINITY: f64 = f64::INFINITY;

/// Relative error of products in a type.
fn precision(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 1e-5,
        DType::F16 => 3e-3,
        _ => 2e-2,
    }
}

fn tensor(shape: &[usize], dtype: DType, f: impl FnMut(usize) -> f64) -> Tensor {
    Tensor::generate(shape, dtype, &Device::Cpu, f).unwrap().to_device(device()).unwrap()
}

fn leaf(shape: &[usize], dtype: DType, f: impl FnMut(usize) -> f64) -> Tensor {
    tensor(shape, dtype, f).requires_grad().unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    x.detach().contiguous().unwrap().to_f64_vec().unwrap()
}

/// Normal numbers, a stream for each operand.
fn normal(stream: u64) -> impl Fn(usize) -> f64 {
    let random = Philox::new(7, stream);
    move |i| random.normal(i as u64)
}

/// A call: operands `[batch, heads, n, width]` and a bias `[batch, heads, query, key]`, all with gradients.
struct Call {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Option<Tensor>,
    mask: Option<Tensor>,
    scale: f64,
    causal: bool,
    dropout: f64,
}

/// Output and gradients of queries, keys, values and bias.
type Results = Vec<(&'static str, Vec<f64>)>;

impl Call {
    fn new(q: Tensor, k: Tensor, v: Tensor) -> Self {
        Self { q, k, v, bias: None, mask: None, scale: 1.0, causal: false, dropout: 0.0 }
    }

    /// One head with normal values, its queries and keys given by functions of position and feature.
    fn head(
        dtype: DType,
        [queries, keys, d, e]: [usize; 4],
        q: impl Fn(usize, usize) -> f64,
        k: impl Fn(usize, usize) -> f64,
    ) -> Self {
        Self::new(
            leaf(&[1, 1, queries, d], dtype, |i| q(i / d, i % d)),
            leaf(&[1, 1, keys, d], dtype, |i| k(i / d, i % d)),
            leaf(&[1, 1, keys, e], dtype, normal(3)),
        )
    }

    fn spec(&self) -> AttentionSpec<'_> {
        AttentionSpec {
            scale: self.scale,
            causal: self.causal,
            mask: self.mask.as_ref(),
            bias: self.bias.as_ref(),
            dropout: self.dropout,
            ..AttentionSpec::default()
        }
    }

    fn cotangent(&self) -> Tensor {
        let [batch, heads, queries, e] = [self.q.shape()[0], self.q.shape()[1], self.q.shape()[2], self.v.shape()[3]];
        tensor(&[batch, heads, queries, e], self.q.dtype(), normal(4))
    }

    fn run(&self) -> Results {
        self.run_with(&self.cotangent())
    }

    fn run_with(&self, cotangent: &Tensor) -> Results {
        let mut tape = Tape::train(11);
        let out = attention(&self.q, &self.k, &self.v, &self.spec()).unwrap();
        let grads = tape.backward_with(&out, cotangent).unwrap();
        let mut results = vec![("out", values(&out))];
        for (name, x) in [("dq", &self.q), ("dk", &self.k), ("dv", &self.v)]
            .into_iter()
            .chain(self.bias.iter().map(|x| ("dbias", x)))
        {
            results.push((name, values(grads.get(x).unwrap())));
        }
        results
    }

    /// Returns the factors by which dropout multiplies the weights, read off with an identity matrix as values.
    fn factors(&self) -> Vec<f64> {
        let [batch, heads, queries, keys] =
            [self.q.shape()[0], self.q.shape()[1], self.q.shape()[2], self.k.shape()[2]];
        if self.dropout == 0.0 {
            return vec![1.0; batch * heads * queries * keys];
        }
        let zeros = |n: usize| tensor(&[batch, heads, n, 1], DType::F64, |_| 0.0);
        let identity = tensor(&[batch, heads, keys, keys], DType::F64, |i| (i / keys % keys == i % keys) as u8 as f64);
        let _tape = Tape::train(11);
        let spec = AttentionSpec { dropout: self.dropout, ..AttentionSpec::default() };
        let kept = values(&attention(&zeros(queries), &zeros(keys), &identity, &spec).unwrap());
        kept.iter().map(|&weight| if weight == 0.0 { 0.0 } else { 1.0 / (1.0 - self.dropout) }).collect()
    }

    /// The definition, in f64, without differences of nearly equal sums.
    fn exact(&self) -> Results {
        let [q, k, v, g] = [&self.q, &self.k, &self.v, &self.cotangent()].map(values);
        let [batch, heads, queries, d] = [0, 1, 2, 3].map(|dim| self.q.shape()[dim]);
        let [kv_heads, keys, e] = [self.k.shape()[1], self.k.shape()[2], self.v.shape()[3]];
        let bias = self.bias.as_ref().map_or(vec![0.0; batch * heads * queries * keys], values);
        let mask = self.mask.as_ref().map(values);
        let factors = self.factors();
        let (mut out, mut dq) = (vec![0.0; g.len()], vec![0.0; q.len()]);
        let (mut dk, mut dv, mut dbias) = (vec![0.0; k.len()], vec![0.0; v.len()], vec![0.0; bias.len()]);
        for row in 0..batch * heads * queries {
            let (head, i) = (row / queries, row % queries);
            let first = (head / heads * kv_heads + head % heads / (heads / kv_heads)) * keys;
            let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
            let (q_row, g_row) = (&q[row * d..][..d], &g[row * e..][..e]);
            let kept = |j: usize| {
                mask.as_ref().is_none_or(|mask| mask[row % (mask.len() / keys) * keys + j] != 0.0)
                    && (!self.causal || j + queries <= i + keys)
            };
            let score = |j: usize| self.scale * dot(q_row, &k[(first + j) * d..][..d]) + bias[row * keys + j];
            let blind = !(0..keys).any(kept);
            let scores: Vec<f64> = (0..keys)
                .map(|j| {
                    if blind {
                        0.0
                    } else if kept(j) {
                        score(j)
                    } else {
                        -INFINITY
                    }
                })
                .collect();
            let max = scores.iter().copied().fold(-INFINITY, f64::max);
            let powers: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = powers.iter().sum();
            let p: Vec<f64> = powers.iter().map(|power| power / sum).collect();
            let factor = |j: usize| factors[row * keys + j];
            let dp: Vec<f64> = (0..keys).map(|j| factor(j) * dot(g_row, &v[(first + j) * e..][..e])).collect();
            for j in 0..keys {
                for f in 0..e {
                    out[row * e + f] += p[j] * factor(j) * v[(first + j) * e + f];
                    dv[(first + j) * e + f] += p[j] * factor(j) * g_row[f];
                }
                if blind {
                    continue;
                }
                let ds = p[j] * (0..keys).map(|l| p[l] * (dp[j] - dp[l])).sum::<f64>();
                dbias[row * keys + j] += ds;
                for f in 0..d {
                    dq[row * d + f] += self.scale * ds * k[(first + j) * d + f];
                    dk[(first + j) * d + f] += self.scale * ds * q_row[f];
                }
            }
        }
        let mut results = vec![("out", out), ("dq", dq), ("dk", dk), ("dv", dv)];
        results.extend(self.bias.is_some().then_some(("dbias", dbias)));
        results
    }

    /// Compares the named results with the definition; errors are relative to the norm of each.
    fn check(&self, what: &str, names: &[&str], allowed: f64) {
        for ((name, got), (_, exact)) in self.run().iter().zip(&self.exact()) {
            if !names.contains(name) {
                continue;
            }
            let error = got.iter().zip(exact).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
            let size = exact.iter().map(|b| b * b).sum::<f64>().sqrt();
            assert!(error <= allowed * size, "{what}: {name}: error {error:e} of {size:e}, allowed {allowed:e}");
        }
    }
}

const ALL: [&str; 5] = ["out", "dq", "dk", "dv", "dbias"];

/// Rounds a number to a type.
fn rounded(x: f64, dtype: DType) -> f64 {
    values(&Tensor::generate([1], dtype, &Device::Cpu, |_| x).unwrap())[0]
}

/// Scores that all keys share change no weight, however large they are.
#[test]
fn common_scores_change_no_weight() {
    for dtype in FLOATS {
        let mut sizes = vec![1e4, 6e4];
        if dtype != DType::F16 {
            sizes.extend([1e5, 1e7, 1e9, 1e20, 1e30]);
        }
        if dtype == DType::F64 {
            sizes.extend([1e12, 1e17, 1e100, 1e300]);
        }
        for (size, keys) in sizes.iter().flat_map(|&size| [1, 4, 70].map(|keys| (size, keys))) {
            for (score, causal) in [(size, false), (-size, true)] {
                let mut call = Call::head(
                    dtype,
                    [keys, keys, 8, 8],
                    |_, f| if f == 0 { score } else { 0.0 },
                    |_, f| {
                        if f == 0 { 1.0 } else { 0.0 }
                    },
                );
                call.causal = causal;
                call.check(&format!("{dtype}, {keys} keys, score {score:e}"), &["out", "dv"], precision(dtype));
            }
        }
    }
}

/// The same for a bias common to a row, like an additive mask on padded queries.
#[test]
fn common_biases_change_no_weight() {
    for dtype in FLOATS {
        let lowest = dtype.lowest();
        for bias in [-1e4, -6e4, -1e9, 1e9, lowest].map(|bias| bias.max(lowest).min(-lowest)) {
            for (queries, keys) in [(3, 1), (5, 200)] {
                let mut call =
                    Call::head(dtype, [queries, keys, 8, 8], |i, f| normal(1)(i * 8 + f), |j, f| normal(2)(j * 8 + f));
                // Queries whose scores would not survive the sum have none.
                call.q = leaf(&[1, 1, queries, 8], dtype, |i| if i / 8 % 2 == 0 { normal(1)(i) } else { 0.0 });
                call.bias = Some(leaf(&[1, 1, queries, keys], dtype, |i| if i / keys % 2 == 0 { 0.0 } else { bias }));
                call.check(&format!("{dtype}, {keys} keys, bias {bias:e}"), &ALL, precision(dtype));
            }
        }
    }
}

/// Differences of scores have the same effect next to a large common part.
#[test]
fn common_scores_keep_differences() {
    for (dtype, sizes) in
        [(DType::F64, [1e4, 1e9]), (DType::F32, [1e4, 1e6]), (DType::BF16, [1e3, 1e6]), (DType::F16, [1e3, 3e4])]
    {
        for size in sizes {
            let size = rounded(size, dtype);
            let mut call = Call::head(
                dtype,
                [40, 140, 8, 24],
                |i, f| [size, (i % 3) as f64, 1.0, 0.0][f.min(3)],
                |j, f| [1.0, (j % 2) as f64, (j % 4) as f64, 0.0][f.min(3)],
            );
            call.causal = true;
            // A key's common feature is multiplied by the sum of a row's gradients, which is 0 up to rounding.
            call.check(&format!("{dtype}, scores about {size:e}"), &["out", "dv", "dq"], 3.0 * precision(dtype));
        }
    }
}

/// Keys with a common direction, which must cancel in the gradient of the query.
#[test]
fn common_directions_cancel() {
    for dtype in FLOATS {
        for (of_query, of_key) in [(10.0, 10.0), (32.0, 32.0), (100.0, 100.0), (1.0, 1e4)] {
            for (n, d) in [(64, 16), (150, 64), (70, 128)] {
                let call = Call::head(
                    dtype,
                    [n, n, d, d],
                    |i, f| if f == 0 { of_query } else { normal(1)(i * d + f) * 0.5 },
                    |j, f| if f == 0 { of_key } else { normal(2)(j * d + f) * 0.5 },
                );
                let scores = of_query * of_key;
                // Precision that scores lose to their common part.
                let lost = scores * 2e-7 * (d as f64 / 16.0).sqrt();
                let allowed = match dtype {
                    DType::F64 => 1e-12 + lost * 1e-8,
                    DType::F32 => lost,
                    DType::F16 => 2e-3 + lost,
                    _ => 5e-3 + lost,
                };
                call.check(&format!("{dtype}, {n} keys of {d} features, scores of {scores}"), &["dq"], allowed);
            }
        }
    }
}

/// A query with nearly all of its weight on one key passes on the remaining gradient.
#[test]
fn sharp_queries_keep_their_gradient() {
    for dtype in FLOATS {
        for gap in [2.0, 4.0, 6.0, 8.0, 10.0] {
            let mut call = Call::head(dtype, [1, 2, 1, 1], |_, _| 1.0, |j, _| [gap, 0.0][j]);
            call.v = leaf(&[1, 1, 2, 1], dtype, |j| [1.0, -1.0][j]);
            call.check(&format!("{dtype}, gap {gap}"), &ALL, 0.01);
            // Several tiles of keys, one of which stands out.
            let mut call = Call::head(
                dtype,
                [20, 150, 8, 16],
                |_, f| (f == 0) as u8 as f64,
                |j, f| {
                    if f == 0 { gap * (j == 140) as u8 as f64 } else { normal(2)(j * 8 + f) }
                },
            );
            let allowed = precision(dtype).max(1e-4);
            call.check(&format!("{dtype}, gap {gap} among many"), &ALL, allowed);
            call.dropout = 0.3;
            call.check(&format!("{dtype}, gap {gap} among many, dropped"), &ALL, allowed);
        }
    }
}

/// A key with all the weight passes exactly zero gradient to its score, since keys may be large.
#[test]
fn one_key_passes_no_gradient() {
    let large = |dtype: DType| match dtype {
        DType::F64 => 1e100,
        DType::F32 | DType::BF16 => 1e30,
        _ => 1e4,
    };
    for dtype in FLOATS {
        for (d, e) in [(8, 64), (17, 5), (64, 64), (40, 128)] {
            for dropout in [0.0, 0.3] {
                // The only key.
                let mut call = Call::head(dtype, [3, 1, d, e], |i, f| normal(1)(i * d + f), |_, _| large(dtype));
                call.dropout = dropout;
                none(&call, &format!("{dtype}, one key of {d} and {e} features, dropout {dropout}"));
                // The only one that is not masked.
                let mut call = Call::head(dtype, [2, 70, d, e], |i, f| normal(1)(i * d + f), |_, _| large(dtype));
                call.mask = Some(
                    Tensor::from_vec((0..140).map(|i| i % 70 == 66).collect::<Vec<bool>>(), [2, 70], device()).unwrap(),
                );
                call.dropout = dropout;
                none(&call, &format!("{dtype}, one key left of {d} and {e} features, dropout {dropout}"));
            }
            // One next to which the others are negligible.
            let key = if dtype == DType::F16 { 1e4 } else { 1e10 };
            let call = Call::head(dtype, [2, 70, d, e], |_, _| 1.0, |j, _| if j == 3 { key } else { -key });
            none(&call, &format!("{dtype}, one key above all of {d} and {e} features"));
        }
        // The first rows of causal sequences.
        let mut call =
            Call::head(dtype, [70, 70, 8, 24], |i, f| normal(1)(i * 8 + f), |j, f| normal(2)(j * 8 + f) * large(dtype));
        call.causal = true;
        let dq = call.run().swap_remove(1).1;
        assert!(dq[..8].iter().all(|&x| x == 0.0), "{dtype}: {:?}", &dq[..8]);
    }

    fn none(call: &Call, what: &str) {
        for (name, got) in &call.run()[1..3] {
            assert!(got.iter().all(|&x| x == 0.0), "{what}: {name} {:?}", &got[..4]);
        }
    }
}

/// Shared key heads, masks, causality, biases and dropout with offsets of every size, in several tiles of odd sizes.
#[test]
fn everything_with_large_biases() {
    for dtype in FLOATS {
        for (causal, dropout, masked) in [(true, 0.0, false), (false, 0.2, true), (true, 0.2, true)] {
            let ([queries, keys, d, e], heads, kv_heads) = ([45, 131, 24, 40], 4, 2);
            let mut call = Call::new(
                leaf(&[1, heads, queries, d], dtype, |i| if i / d % 3 == 1 { 0.0 } else { normal(1)(i) }),
                leaf(&[1, kv_heads, keys, d], dtype, normal(2)),
                leaf(&[1, kv_heads, keys, e], dtype, normal(3)),
            );
            // Every third query is padding.
            let bias = if dtype == DType::F16 { -6e4 } else { -1e9 };
            call.bias =
                Some(leaf(&[1, heads, queries, keys], dtype, |i| if i / keys % 3 == 1 { bias } else { normal(5)(i) }));
            if masked {
                let keep = (0..queries * keys).map(|i| i % 5 != 0 && i / keys != 7).collect::<Vec<bool>>();
                call.mask = Some(Tensor::from_vec(keep, [queries, keys], device()).unwrap());
            }
            (call.scale, call.causal, call.dropout) = (0.2, causal, dropout);
            call.check(&format!("{dtype}, causal {causal}, dropout {dropout}"), &ALL, precision(dtype));
        }
    }
}

/// A learned position bias gets the sum of the scores' gradients: for T5's buckets and for slopes.
#[test]
fn position_biases_with_large_offsets() {
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let (heads, n, d) = (2, 70, 16);
        let table = leaf(&[8, heads], DType::F32, |i| (i % 5) as f64 * 0.25 - 0.5);
        let slopes = leaf(&[heads], DType::F32, |i| [0.25, 0.0625][i]);
        for (what, weights) in [("t5", &table), ("slopes", &slopes)] {
            let run = |offset: f64| {
                let [q, k, v] =
                    [1, 2, 3].map(|stream| leaf(&[1, heads, n, d], dtype, |i| (normal(stream)(i) * 2.0).round() / 4.0));
                let bias = tensor(&[n, 1], dtype, |_| offset);
                let position_bias = if what == "t5" {
                    PositionBias::T5 { table: weights.clone(), scale: 2.0, causal: true, max_distance: 32 }
                } else {
                    PositionBias::Alibi { slopes: weights.clone() }
                };
                let spec = AttentionSpec {
                    scale: 0.25,
                    causal: true,
                    bias: Some(&bias),
                    position_bias: Some(position_bias),
                    ..AttentionSpec::default()
                };
                let mut tape = Tape::grad();
                let out = attention(&q, &k, &v, &spec).unwrap();
                let grads = tape.backward_with(&out, &tensor(&[1, heads, n, d], dtype, normal(4))).unwrap();
                [values(&out), values(grads.get(weights).unwrap()), values(grads.get(&v).unwrap())]
            };
            // Scores are multiples of 2⁻⁸, exact next to the offset.
            for (got, plain) in run(-8192.0).iter().zip(&run(0.0)) {
                let error = got.iter().zip(plain).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
                let size = plain.iter().map(|b| b * b).sum::<f64>().sqrt();
                assert!(error <= precision(dtype) * size, "{dtype}, {what}: error {error:e} of {size:e}");
            }
        }
    }
}

/// Output of a query `q` of one feature for keys and values of one feature.
fn single(dtype: DType, q: f64, k: &[f64], v: &[f64], spec: &AttentionSpec) -> (f64, [f64; 3]) {
    let [q, k, v] = [&[q][..], k, v].map(|x| leaf(&[1, 1, x.len(), 1], dtype, |i| x[i]));
    let mut tape = Tape::grad();
    let out = attention(&q, &k, &v, spec).unwrap();
    let grads = tape.backward_with(&out, &tensor(&[1, 1, 1, 1], dtype, |_| 1.0)).unwrap();
    (values(&out)[0], [&q, &k, &v].map(|x| values(grads.get(x).unwrap())[0]))
}

/// A softmax of the matrix of scores, which layers that need the weights use, is right at the same scores.
#[test]
fn the_matrix_of_scores_is_right_too() {
    for dtype in FLOATS {
        for (size, gap) in [(0.0, 8.0), (3e4, 0.0), (1e9, 0.0)] {
            let size = if dtype == DType::F16 { f64::min(size, 3e4) } else { size };
            let call = {
                let mut call = Call::head(dtype, [1, 4, 1, 1], |_, _| 1.0, |j, _| size + gap * (j == 1) as u8 as f64);
                call.v = leaf(&[1, 1, 4, 1], dtype, |j| [1.0, -1.0, 0.5, 2.0][j]);
                call
            };
            let mut tape = Tape::grad();
            let scores = call.q.matmul(&call.k.transpose(2, 3).unwrap()).unwrap();
            let out = scores.softmax().unwrap().matmul(&call.v).unwrap();
            let grads = tape.backward_with(&out, &call.cotangent()).unwrap();
            let exact = call.exact();
            let got = [values(&out), values(grads.get(&call.v).unwrap())];
            for (got, (name, exact)) in got.iter().zip([&exact[0], &exact[3]]) {
                for (got, exact) in got.iter().zip(exact) {
                    assert!(
                        (got - exact).abs() <= precision(dtype) * exact.abs().max(1e-3),
                        "{dtype}, {size:e}: {name} {got} {exact}"
                    );
                }
            }
        }
    }
}

/// Repeats all of this on the CPU with every set of vector instructions.
#[test]
fn scores_at_every_level() {
    if *device() != Device::Cpu {
        return;
    }
    for test in [
        "common_scores_change_no_weight",
        "common_biases_change_no_weight",
        "common_directions_cancel",
        "common_scores_keep_differences",
        "sharp_queries_keep_their_gradient",
        "one_key_passes_no_gradient",
        "everything_with_large_biases",
        "position_biases_with_large_offsets",
        "overflow::overflow_is_not_a_mask",
        "overflow::means_of_large_values_are_finite",
        "overflow::decoding_hides_no_nan",
    ] {
        levels::at_every_level(module_path!(), test);
    }
}
