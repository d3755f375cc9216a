use x_transformers::ops::{DecodeSpec, Window, attention_decode};

use super::attention::sees;
use crate::case::{Array, Case, Input};

/// Sizes of a call, and the inputs that follow queries, keys and values.
#[derive(Clone, Default)]
struct Setup {
    prefix_len: usize,
    mem_keys: usize,
    window: Window,
    /// Lengths of the sequences before the call.
    lengths: Vec<f64>,
    /// Probability of a key that is kept.
    key_mask: Option<f64>,
    query_mask: bool,
    bias_by_distance: Option<usize>,
    unbiased_keys: usize,
    softclamp: Option<f64>,
    sink: bool,
}

fn float(shape: &[usize]) -> Input {
    Input::Float { shape: shape.to_vec(), low: -2.0, high: 2.0, grad: false }
}

/// `heads`: of queries and of keys.
fn case(name: &str, heads: [usize; 2], [queries, capacity, d, e]: [usize; 4], setup: Setup) -> Case {
    let batch = setup.lengths.len();
    let mut inputs = vec![
        float(&[batch, heads[0], queries, d]),
        float(&[batch, heads[1], capacity, d]),
        float(&[batch, heads[1], capacity, e]),
    ];
    // The lengths on the device do not depend on the layouts under test.
    let lengths = setup.lengths.clone();
    inputs.extend(setup.key_mask.map(|keep| Input::Bool { shape: vec![batch, capacity - setup.prefix_len], keep }));
    if setup.query_mask {
        inputs.push(Input::mask(&[batch, queries]));
    }
    inputs.extend(setup.bias_by_distance.map(|distances| float(&[heads[0], distances])));
    inputs.extend(setup.sink.then(|| float(&[heads[0]])));
    let reference = setup.clone();
    let run = move |x: &[x_transformers::Tensor]| {
        let mut rest = x[3..].iter();
        let lengths: Vec<i64> = lengths.iter().map(|&end| end as i64).collect();
        let lengths = x_transformers::Tensor::from_vec(lengths, [batch], x[0].device())?;
        let spec = DecodeSpec {
            scale: 0.6,
            prefix_len: setup.prefix_len,
            mem_keys: setup.mem_keys,
            window: setup.window,
            key_mask: setup.key_mask.and_then(|_| rest.next()),
            query_mask: setup.query_mask.then(|| rest.next()).flatten(),
            bias_by_distance: setup.bias_by_distance.and_then(|_| rest.next()),
            unbiased_keys: setup.unbiased_keys,
            softclamp: setup.softclamp,
            sink: setup.sink.then(|| rest.next()).flatten(),
        };
        attention_decode(&x[0], &x[1], &x[2], &lengths, &spec)
    };
    Case::new("attention_decode", name, inputs, run, move |x| reference.reference(x))
}

impl Setup {
    /// The formulas, one score at a time.
    fn reference(&self, x: &[Array]) -> Array {
        let (q, k, v) = (&x[0], &x[1], &x[2]);
        let [batch, heads, queries, d] = [0, 1, 2, 3].map(|dim| q.shape[dim]);
        let (group, capacity, e) = (heads / k.shape[1].max(1), k.shape[2], v.shape[3]);
        let mut rest = x[3..].iter();
        let key_mask = self.key_mask.map(|_| rest.next().unwrap());
        let query_mask = self.query_mask.then(|| rest.next().unwrap());
        let bias_by_distance = self.bias_by_distance.map(|_| rest.next().unwrap());
        let sink = self.sink.then(|| rest.next().unwrap());
        Array::from_fn(&[batch, heads, queries, e], |at| {
            let [b, h, i, f] = [at[0], at[1], at[2], at[3]];
            let position = self.prefix_len + self.lengths[b] as usize + i;
            let held = (self.prefix_len + self.lengths[b] as usize + queries).min(capacity);
            let padded = query_mask.is_some_and(|mask| mask.at(&[b, i]) == 0.0);
            let keeps = |j: usize| {
                let masked =
                    j >= self.prefix_len && key_mask.is_some_and(|mask| mask.at(&[b, j - self.prefix_len]) == 0.0);
                j <= position
                    && (j < self.mem_keys || !padded)
                    && !masked
                    && sees(self.window, position as i128, j as i128)
            };
            let score = |j: usize| {
                let dot: f64 = (0..d).map(|c| q.at(&[b, h, i, c]) * k.at(&[b, h / group, j, c])).sum();
                let bias = bias_by_distance.filter(|_| j >= self.unbiased_keys).map_or(0.0, |bias_by_distance| {
                    bias_by_distance.at(&[h, (position - j).min(bias_by_distance.shape[1] - 1)])
                });
                let score = 0.6 * dot + bias;
                self.softclamp.map_or(score, |bound| bound * (score / bound).tanh())
            };
            let mut kept: Vec<usize> = (0..held).filter(|&j| keeps(j)).collect();
            let blind = kept.is_empty() && sink.is_none();
            if blind {
                kept = (0..held).collect();
            }
            let scores: Vec<f64> = kept.iter().map(|&j| if blind { 0.0 } else { score(j) }).collect();
            let sink = sink.map(|sink| sink.data[h]);
            let max = scores.iter().chain(&sink).copied().fold(f64::MIN, f64::max);
            let sum: f64 = scores.iter().chain(&sink).map(|s| (s - max).exp()).sum();
            kept.iter().zip(&scores).map(|(&j, s)| (s - max).exp() / sum * v.at(&[b, h / group, j, f])).sum()
        })
    }
}

pub fn cases() -> Vec<Case> {
    let at = |lengths: &[f64]| Setup { lengths: lengths.to_vec(), ..Setup::default() };
    let full = |lengths: &[f64]| Setup {
        prefix_len: 3,
        mem_keys: 2,
        key_mask: Some(0.7),
        query_mask: true,
        bias_by_distance: Some(6),
        ..at(lengths)
    };
    vec![
        case("one query", [2, 2], [1, 9, 8, 8], at(&[4.0, 8.0])),
        case("odd widths", [3, 3], [2, 12, 5, 7], at(&[3.0, 9.0])),
        case("wide heads", [1, 1], [1, 6, 70, 300], at(&[5.0])),
        case("grouped", [4, 2], [3, 20, 16, 16], at(&[0.0, 17.0, 5.0])),
        case("shared keys", [4, 1], [1, 10, 33, 17], at(&[6.0])),
        case("limited past", [2, 2], [2, 30, 8, 8], Setup { window: Window::past(4), ..at(&[20.0, 1.0]) }),
        case("padding", [2, 2], [3, 14, 8, 8], full(&[8.0, 2.0])),
        case("padding of several parts", [2, 2], [2, 600, 17, 9], full(&[590.0, 300.0, 250.0])),
        case("all padding", [2, 1], [1, 9, 8, 8], Setup { key_mask: Some(0.0), ..at(&[4.0, 8.0]) }),
        // Sums of 1100 weights, which a GPU adds one by one.
        case("long", [2, 1], [1, 1100, 64, 64], at(&[1099.0, 255.0])).tolerance(2.0),
        case("parts without a key", [1, 1], [1, 800, 8, 8], Setup { window: Window::past(10), ..at(&[700.0]) }),
        case("clamp", [4, 2], [2, 300, 8, 8], Setup { softclamp: Some(1.5), ..at(&[280.0, 3.0]) }),
        case("sink", [2, 2], [1, 9, 8, 8], Setup { sink: true, ..at(&[4.0, 8.0]) }),
        case("sink of several parts", [4, 1], [2, 600, 16, 16], Setup { sink: true, ..at(&[590.0, 0.0]) }),
        case("sink without a key", [2, 1], [1, 9, 8, 8], Setup { sink: true, key_mask: Some(0.0), ..at(&[4.0, 8.0]) }),
        case(
            "everything, clamped with a sink",
            [2, 2],
            [2, 600, 17, 9],
            Setup { unbiased_keys: 2, softclamp: Some(2.5), sink: true, ..full(&[590.0, 300.0, 250.0]) },
        ),
        case("no features of values", [2, 2], [1, 9, 8, 0], at(&[4.0])),
        case("empty batch", [2, 2], [1, 9, 8, 8], at(&[])),
    ]
}
