use x_transformers::{
    DType, Result, Tape, Tensor,
    ops::{AttentionSpec, PositionBias, Window, attention},
};

use crate::{
    case::{Array, Case, Input},
    common::device,
};

/// A spec whose tensors are positions among the inputs of the case.
#[derive(Clone, Default)]
struct Setup {
    scale: f64,
    causal: bool,
    mask: Option<usize>,
    query_mask: Option<usize>,
    key_mask: Option<usize>,
    mem_keys: usize,
    window: Window,
    bias: Option<usize>,
    position: Position,
    unbiased_keys: usize,
    softclamp: Option<f64>,
    sink: Option<usize>,
}

#[derive(Clone, Copy, Default)]
enum Position {
    #[default]
    None,
    Alibi(usize),
    SymmetricAlibi(usize),
    ByDistance(usize),
    T5 {
        table: usize,
        scale: f64,
        causal: bool,
        max_distance: usize,
    },
}

impl Setup {
    fn run(&self, x: &[Tensor]) -> Result<Tensor> {
        let spec = AttentionSpec {
            scale: self.scale,
            causal: self.causal,
            mask: self.mask.map(|at| &x[at]),
            query_mask: self.query_mask.map(|at| &x[at]),
            key_mask: self.key_mask.map(|at| &x[at]),
            mem_keys: self.mem_keys,
            window: self.window,
            bias: self.bias.map(|at| &x[at]),
            position_bias: match self.position {
                Position::None => None,
                Position::Alibi(slopes) => Some(PositionBias::Alibi { slopes: x[slopes].clone() }),
                Position::SymmetricAlibi(slopes) => Some(PositionBias::SymmetricAlibi { slopes: x[slopes].clone() }),
                Position::ByDistance(table) => Some(PositionBias::ByDistance { table: x[table].clone() }),
                Position::T5 { table, scale, causal, max_distance } => {
                    Some(PositionBias::T5 { table: x[table].clone(), scale, causal, max_distance })
                }
            },
            unbiased_keys: self.unbiased_keys,
            softclamp: self.softclamp,
            sink: self.sink.map(|at| &x[at]),
            dropout: 0.0,
        };
        attention(&x[0], &x[1], &x[2], &spec)
    }

    /// The formulas, one score at a time.
    fn reference(&self, x: &[Array]) -> Array {
        let (q, k, v) = (&x[0], &x[1], &x[2]);
        let [batch, heads, queries, d] = [0, 1, 2, 3].map(|dim| q.shape[dim]);
        let (kv_heads, keys, e) = (k.shape[1], k.shape[2], v.shape[3]);
        let mut out = Array::from_fn(&[batch, heads, queries, e], |_| 0.0);
        for (b, h, i) in indices(batch, heads, queries) {
            let kv = h / (heads / kv_heads);
            let scores: Vec<f64> = (0..keys)
                .map(|j| {
                    if !self.keeps(x, [b, h, i, j], queries, keys) {
                        return f64::MIN;
                    }
                    let dot: f64 = (0..d).map(|f| q.at(&[b, h, i, f]) * k.at(&[b, kv, j, f])).sum();
                    let bias = self.bias.map_or(0.0, |at| x[at].at(&[b, h, i, j]));
                    let score = dot * self.scale + bias + self.position_bias(x, h, [i, j], queries, keys);
                    self.softclamp.map_or(score, |bound| bound * (score / bound).tanh())
                })
                .collect();
            let sink = self.sink.map(|at| x[at].data[h]);
            let max = scores.iter().chain(&sink).copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().chain(&sink).map(|score| (score - max).exp()).sum();
            for f in 0..e {
                let mean: f64 = (0..keys).map(|j| (scores[j] - max).exp() / sum * v.at(&[b, kv, j, f])).sum();
                out.data[((b * heads + h) * queries + i) * e + f] = mean;
            }
        }
        out
    }

    fn keeps(&self, x: &[Array], [b, h, i, j]: [usize; 4], queries: usize, keys: usize) -> bool {
        let on = |at: Option<usize>, index: &[usize]| at.is_none_or(|at| x[at].at(index) != 0.0);
        let position = i as i64 + keys as i64 - queries as i64;
        let key_index = self.key_mask.map_or(j, |at| (x[at].shape[1] + j).wrapping_sub(keys));
        let padding = j < self.mem_keys || on(self.query_mask, &[b, i]) && on(self.key_mask, &[b, key_index]);
        padding
            && on(self.mask, &[b, h, i, j])
            && sees(self.window, position.into(), j as i128)
            && (!self.causal || j as i64 <= position)
    }

    fn position_bias(&self, x: &[Array], h: usize, [i, j]: [usize; 2], queries: usize, keys: usize) -> f64 {
        let distance = (i + keys) as f64 - (queries + j) as f64;
        match self.position {
            _ if j < self.unbiased_keys => 0.0,
            Position::None => 0.0,
            Position::Alibi(slopes) => -x[slopes].data[h] * distance,
            Position::SymmetricAlibi(slopes) => -x[slopes].data[h] * distance.abs(),
            Position::ByDistance(table) => x[table].at(&[i + keys - 1 - j, h]),
            Position::T5 { table, scale, causal, max_distance } => {
                let table = &x[table];
                scale * table.at(&[bucket(i as f64 - j as f64, causal, table.shape[0], max_distance as f64), h])
            }
        }
    }
}

fn indices(a: usize, b: usize, c: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..a * b * c).map(move |n| (n / c / b, n / c % b, n % c))
}

fn bucket(mut r: f64, causal: bool, buckets: usize, max_distance: f64) -> usize {
    let mut first = 0;
    let mut buckets = buckets;
    if causal {
        r = r.max(0.0);
    } else {
        buckets /= 2;
        if r < 0.0 {
            first = buckets;
        }
        r = r.abs();
    }
    let exact = (buckets / 2) as f64;
    let far = exact + ((r / exact).ln() / (max_distance / exact).ln() * (buckets as f64 - exact)).floor();
    first + if r < exact { r } else { far.min(buckets as f64 - 1.0) } as usize
}

/// Queries, keys and values.
fn qkv(batch: usize, heads: [usize; 2], queries: usize, keys: usize, d: usize, e: usize) -> Vec<Input> {
    vec![
        Input::float(&[batch, heads[0], queries, d]),
        Input::float(&[batch, heads[1], keys, d]),
        Input::float(&[batch, heads[1], keys, e]),
    ]
}

fn case(name: &str, mut inputs: Vec<Input>, more: impl IntoIterator<Item = Input>, setup: Setup) -> Case {
    inputs.extend(more);
    let reference = setup.clone();
    Case::new("attention", name, inputs, move |x| setup.run(x), move |x| reference.reference(x))
}

/// If `true`, the window of a query at this position has key `j`.
pub fn sees(window: Window, position: i128, j: i128) -> bool {
    window.max_attend_past.is_none_or(|past| position - j <= past as i128)
}

pub fn cases() -> Vec<Case> {
    let plain = Setup { scale: 0.6, ..Setup::default() };
    let causal = Setup { causal: true, ..plain.clone() };
    let groups =
        [ordinary(&plain, &causal), masked(&plain, &causal), biased(&plain, &causal), extended(&plain, &causal)];
    groups.into_iter().flatten().collect()
}

fn ordinary(plain: &Setup, causal: &Setup) -> Vec<Case> {
    let (plain, causal) = (|| plain.clone(), || causal.clone());
    vec![
        case("plain", qkv(2, [3, 3], 5, 7, 4, 4), [], plain()),
        case("one of each", qkv(1, [1, 1], 1, 1, 1, 1), [], plain()),
        case("single query", qkv(2, [2, 2], 1, 9, 4, 3), [], causal()),
        case("other value width", qkv(1, [2, 2], 6, 6, 3, 5), [], plain()),
        case("grouped heads", qkv(2, [6, 2], 4, 5, 3, 2), [], causal()),
        case("one key head", qkv(1, [3, 1], 4, 5, 3, 3), [], plain()),
        case("causal", qkv(1, [2, 2], 9, 9, 3, 3), [], causal()),
        case("causal with memory", qkv(1, [2, 2], 4, 9, 3, 3), [], causal()),
        case("causal with blind queries", qkv(2, [2, 1], 9, 4, 3, 3), [], causal()),
        // Where the values of a key are one number, `grad vᵀ − D` cancels in the gradient of the keys.
        case("odd blocks", qkv(1, [1, 1], 37, 131, 3, 2), [], plain()).tolerance(1.5),
        case("several blocks", qkv(1, [2, 1], 131, 261, 2, 1), [], causal()),
        case("several blocks with blind queries", qkv(1, [1, 1], 261, 131, 2, 3), [], causal()),
        // On processors that multiply bf16, weights and gradients of scores are rounded to it before their products.
        case("wide heads", qkv(1, [2, 2], 70, 150, 32, 24), [], causal()).tolerance(1.5),
        case("no queries", qkv(1, [2, 2], 0, 3, 2, 2), [], plain()),
        case("no keys", qkv(1, [2, 2], 3, 0, 2, 2), [], causal()),
        case("no batch", qkv(0, [2, 2], 3, 3, 2, 2), [], plain()),
        case("no features", qkv(1, [2, 2], 3, 4, 0, 2), [], causal()),
        case("no value features", qkv(1, [2, 2], 3, 4, 2, 0), [], plain()),
        case("large scores", qkv(1, [1, 1], 5, 140, 4, 2), [], Setup { scale: 3.0, ..plain() }),
    ]
}

fn masked(plain: &Setup, causal: &Setup) -> Vec<Case> {
    let (plain, causal) = (|| plain.clone(), || causal.clone());
    let mask = |setup: Setup| Setup { mask: Some(3), ..setup };
    let sparse = |shape: &[usize]| Input::Bool { shape: shape.to_vec(), keep: 0.3 };
    let padded = |setup: Setup| Setup { query_mask: Some(3), key_mask: Some(4), ..setup };
    let small = || qkv(2, [2, 2], 5, 6, 3, 3);
    let blocks = || qkv(2, [2, 1], 70, 140, 2, 2);
    vec![
        case("mask", small(), [Input::mask(&[2, 2, 5, 6])], mask(plain())),
        case("mask of keys", small(), [Input::mask(&[6])], mask(causal())),
        case("mask of queries", small(), [Input::mask(&[5, 1])], mask(plain())),
        case("mask of heads", small(), [Input::mask(&[2, 5, 6])], mask(causal())),
        case("mask of the batch", small(), [Input::mask(&[2, 1, 1, 6])], mask(plain())),
        case("mask, blocks", blocks(), [sparse(&[70, 140])], mask(causal())),
        case("nothing kept", small(), [Input::Bool { shape: vec![], keep: 0.0 }], mask(causal())),
        case("most rows without keys", blocks(), [Input::Bool { shape: vec![70, 1], keep: 0.2 }], mask(causal())),
        case("padding", small(), [Input::mask(&[2, 5]), Input::mask(&[2, 6])], padded(plain())),
        case("padding, causal", blocks(), [Input::mask(&[2, 70]), sparse(&[2, 140])], padded(causal())),
        case("padded queries", small(), [Input::mask(&[2, 5])], Setup { query_mask: Some(3), ..plain() }),
        case("padded keys", small(), [Input::mask(&[2, 6])], Setup { key_mask: Some(3), ..causal() }),
        case(
            "padding everything",
            blocks(),
            [Input::Bool { shape: vec![2, 70], keep: 0.5 }, Input::Bool { shape: vec![2, 140], keep: 0.0 }],
            padded(plain()),
        ),
        case("memory keys", small(), [sparse(&[2, 5]), sparse(&[2, 6])], Setup { mem_keys: 2, ..padded(plain()) }),
        case(
            "memory keys outside of the mask",
            blocks(),
            [sparse(&[2, 70]), sparse(&[2, 9])],
            Setup { mem_keys: 131, ..padded(causal()) },
        ),
        case(
            "all keys are memory",
            small(),
            [sparse(&[2, 5]), sparse(&[2, 0])],
            Setup { mem_keys: 6, ..padded(plain()) },
        ),
        case("past", small(), [], Setup { window: Window::past(1), ..plain() }),
        case("past, causal", blocks(), [], Setup { window: Window::past(20), ..causal() }),
        case("no past", blocks(), [], Setup { window: Window::past(0), ..causal() }),
        case("past of blind queries", qkv(1, [1, 1], 7, 3, 2, 2), [], Setup { window: Window::past(1), ..causal() }),
        case("endless past", small(), [], Setup { window: Window::past(usize::MAX), ..causal() }),
        case(
            "every mask",
            blocks(),
            [Input::mask(&[2, 70]), Input::mask(&[2, 140]), Input::mask(&[2, 1, 70, 140])],
            Setup { mask: Some(5), mem_keys: 3, window: Window::past(60), ..padded(causal()) },
        ),
    ]
}

fn biased(plain: &Setup, causal: &Setup) -> Vec<Case> {
    let (plain, causal) = (|| plain.clone(), || causal.clone());
    let bias = |setup: Setup| Setup { bias: Some(3), ..setup };
    let t5 = |causal: bool, setup: Setup| Setup {
        position: Position::T5 { table: 3, scale: 1.7, causal, max_distance: 20 },
        ..setup
    };
    // A softmax ignores a constant added to a whole row: the gradient is 0, with no magnitude to relate errors to.
    let per_query = |shape: &[usize]| Input::Float { shape: shape.to_vec(), low: -2.0, high: 2.0, grad: false };
    let small = || qkv(2, [2, 2], 5, 6, 3, 3);
    let blocks = || qkv(2, [2, 1], 70, 140, 2, 2);
    vec![
        case("bias", small(), [Input::float(&[2, 2, 5, 6])], bias(plain())),
        case("bias of heads", small(), [Input::float(&[2, 5, 6])], bias(causal())),
        case("bias of keys", small(), [Input::float(&[6])], bias(plain())),
        case("bias of queries", small(), [per_query(&[2, 1, 5, 1])], bias(causal())),
        case("one bias", small(), [per_query(&[])], bias(plain())),
        case("bias of keys, blocks", blocks(), [Input::float(&[2, 1, 140])], bias(causal())),
        case("bias of queries, blocks", blocks(), [per_query(&[70, 1])], bias(causal())),
        case("bias, blocks", qkv(1, [2, 1], 66, 30, 2, 2), [Input::float(&[66, 30])], bias(causal())),
        case("bias, wide", blocks(), [Input::float(&[2, 1, 70, 140])], bias(causal())),
        case("alibi", small(), [Input::float(&[2])], Setup { position: Position::Alibi(3), ..causal() }),
        case("alibi, not causal", small(), [Input::float(&[2])], Setup { position: Position::Alibi(3), ..plain() }),
        case(
            "alibi, blocks",
            blocks(),
            [Input::between(&[2], 0.0, 0.1)],
            Setup { position: Position::Alibi(3), ..causal() },
        ),
        case(
            "alibi with blind queries",
            qkv(1, [2, 2], 9, 4, 2, 2),
            [Input::float(&[2])],
            Setup { position: Position::Alibi(3), ..causal() },
        ),
        case("t5", small(), [Input::float(&[8, 2])], t5(true, causal())),
        case("t5, both sides", small(), [Input::float(&[8, 2])], t5(false, plain())),
        case("t5, few buckets", small(), [Input::float(&[2, 2])], t5(true, plain())),
        case("t5, odd buckets", blocks(), [Input::float(&[9, 2])], t5(false, plain())),
        case("t5, blocks", blocks(), [Input::float(&[12, 2])], t5(false, causal())),
        case("t5 of an empty batch", qkv(0, [2, 2], 3, 4, 2, 2), [Input::float(&[8, 2])], t5(true, causal())),
        case(
            "everything",
            blocks(),
            [
                Input::float(&[8, 2]),
                Input::float(&[2, 70, 140]),
                Input::mask(&[2, 70]),
                Input::mask(&[2, 140]),
                Input::mask(&[70, 140]),
            ],
            Setup {
                bias: Some(4),
                query_mask: Some(5),
                key_mask: Some(6),
                mask: Some(7),
                mem_keys: 2,
                window: Window::past(90),
                ..t5(false, causal())
            },
        ),
    ]
}

/// Curves by distance, clamped scores and sinks.
fn extended(plain: &Setup, causal: &Setup) -> Vec<Case> {
    let (plain, causal) = (|| plain.clone(), || causal.clone());
    let clamp = |setup: Setup| Setup { softclamp: Some(1.5), ..setup };
    let sink = |setup: Setup| Setup { sink: Some(3), ..setup };
    let position = |position: Position, setup: Setup| Setup { position, ..setup };
    let symmetric = Position::SymmetricAlibi(3);
    let by_distance = Position::ByDistance(3);
    let sparse = |shape: &[usize]| Input::Bool { shape: shape.to_vec(), keep: 0.3 };
    let small = || qkv(2, [2, 2], 5, 6, 3, 3);
    let blocks = || qkv(2, [2, 1], 70, 140, 2, 2);
    vec![
        case("clamp", small(), [], clamp(plain())),
        case("clamp, causal", qkv(1, [2, 2], 70, 140, 16, 16), [], clamp(causal())).tolerance(1.5),
        case("clamp, masked", blocks(), [sparse(&[70, 140])], Setup { mask: Some(3), ..clamp(causal()) }),
        case("clamp of biased scores", small(), [Input::float(&[2, 5, 6])], Setup { bias: Some(3), ..clamp(plain()) }),
        // A GPU takes the derivative from the logarithms of weights.
        case("clamp of slopes", blocks(), [Input::between(&[2], 0.0, 0.1)], position(symmetric, clamp(plain())))
            .tolerance(2.0)
            // A slope is multiplied by distances of up to 139.
            .step(1e-4),
        case(
            "clamp with blind queries",
            qkv(1, [2, 2], 9, 4, 2, 2),
            [Input::float(&[2])],
            position(Position::Alibi(3), clamp(causal())),
        )
        .tolerance(1.5),
        case("sink", small(), [Input::float(&[2])], sink(plain())),
        case("sink, causal", blocks(), [Input::float(&[2])], sink(causal())),
        case("sink of wide heads", qkv(1, [2, 1], 70, 150, 32, 24), [Input::float(&[2])], sink(causal()))
            .tolerance(1.5),
        case("sink with blind queries", qkv(2, [2, 1], 9, 4, 3, 3), [Input::float(&[2])], sink(causal())),
        case(
            "sink with masked queries",
            small(),
            [Input::float(&[2]), Input::Bool { shape: vec![5, 1], keep: 0.5 }],
            Setup { mask: Some(4), ..sink(plain()) },
        ),
        case("sink without keys", qkv(1, [2, 2], 3, 0, 2, 2), [Input::float(&[2])], sink(causal())),
        case("large sink", small(), [Input::between(&[2], 20.0, 30.0)], sink(plain())),
        case("symmetric alibi", small(), [Input::float(&[2])], position(symmetric, plain())),
        case("symmetric alibi, causal", small(), [Input::float(&[2])], position(symmetric, causal())),
        case("symmetric alibi, blocks", blocks(), [Input::between(&[2], 0.0, 0.1)], position(symmetric, plain())),
        case(
            "symmetric alibi, unbiased keys",
            qkv(1, [2, 1], 70, 73, 8, 8),
            [Input::between(&[2], 0.0, 0.1)],
            Setup { unbiased_keys: 3, ..position(symmetric, plain()) },
        ),
        case("curve", small(), [Input::float(&[10, 2])], position(by_distance, plain())),
        case("curve, causal", blocks(), [Input::float(&[209, 2])], position(by_distance, causal())),
        case(
            "curve, unbiased keys",
            qkv(2, [4, 2], 70, 140, 8, 8),
            [Input::float(&[139, 4])],
            Setup { unbiased_keys: 70, ..position(by_distance, plain()) },
        ),
        case(
            "curve, all keys unbiased",
            small(),
            [Input::Float { shape: vec![5, 2], low: -2.0, high: 2.0, grad: false }],
            Setup { unbiased_keys: 6, ..position(by_distance, plain()) },
        ),
        case(
            "curve of an empty batch",
            qkv(0, [2, 2], 3, 4, 2, 2),
            [Input::float(&[6, 2])],
            position(by_distance, plain()),
        ),
        case(
            "everything, clamped with a sink",
            blocks(),
            [
                Input::float(&[206, 2]),
                Input::float(&[2, 70, 140]),
                Input::mask(&[2, 70]),
                Input::mask(&[2, 140]),
                Input::mask(&[70, 140]),
                Input::float(&[2]),
            ],
            Setup {
                bias: Some(4),
                query_mask: Some(5),
                key_mask: Some(6),
                mask: Some(7),
                mem_keys: 3,
                unbiased_keys: 3,
                window: Window::past(90),
                sink: Some(8),
                ..position(by_distance, clamp(causal()))
            },
        ),
    ]
}

/// Values whose sums overflow meet the same dropout mask as small ones.
#[test]
fn dropout_of_large_values() {
    let _alone = crate::alone();
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        // A power of two, so that all else is the same: a quarter of the largest number.
        let size = (-dtype.lowest() / 4.0).log2().floor().exp2();
        let out = |size: f64| {
            let tensor = |value: f64| Tensor::full([1, 2, 70, 4], value, dtype, device()).expect("a tensor");
            let _tape = Tape::train(3);
            let spec = AttentionSpec { dropout: 0.5, ..AttentionSpec::default() };
            let out = attention(&tensor(0.5), &tensor(0.5), &tensor(size), &spec).expect("legal arguments");
            out.to_f64_vec().expect("floats")
        };
        let (small, large) = (out(1.0), out(size));
        assert!(small.iter().any(|x| (x - 1.0).abs() > 0.01), "nothing is dropped");
        for (small, large) in small.iter().zip(&large) {
            assert!((small - large / size).abs() <= 0.02, "{dtype}: {large:e} is not {size:e} times {small}");
        }
    }
}
