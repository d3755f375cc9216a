use x_transformers::{
    Philox, Tensor,
    ops::{SampleFilter, SampleSpec},
};

use crate::case::{Array, Case, Input};

const SEED: u64 = 17;
const STEP: u64 = 5;

/// The share of each token, from the words of the filter's documentation.
fn shares(row: &[f64], filter: SampleFilter, temperature: f64) -> Vec<f64> {
    let softmax = |temperature: f64, keep: &dyn Fn(usize) -> bool| -> Vec<f64> {
        let best = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let power = |j: usize| if keep(j) { ((row[j] - best) / temperature).exp() } else { 0.0 };
        let sum: f64 = (0..row.len()).map(power).sum();
        (0..row.len()).map(|j| power(j) / sum).collect()
    };
    let plain = softmax(1.0, &|_| true);
    let highest = plain.iter().copied().fold(0.0, f64::max);
    // Tokens that are better: larger, or equal and earlier.
    let betters = |j: usize| (0..row.len()).filter(move |&i| row[i] > row[j] || (row[i] == row[j] && i < j));
    let mass = |j: usize| betters(j).map(|i| plain[i]).sum::<f64>();
    let first = |j: usize| betters(j).next().is_none();
    match filter {
        SampleFilter::Best(count) => softmax(temperature, &|j| betters(j).count() < count),
        SampleFilter::MassUpTo(limit) => softmax(temperature, &|j| first(j) || mass(j) <= limit),
        SampleFilter::MassBelow(limit) => softmax(temperature, &|j| first(j) || mass(j) < limit),
        SampleFilter::MinP(ratio) => softmax(temperature, &|j| plain[j] >= ratio * highest),
        SampleFilter::All => softmax(temperature, &|_| true),
        SampleFilter::TopA { .. } | SampleFilter::Entmax => unreachable!("tests/sampling.rs has these"),
    }
}

fn reference(x: &Array, filter: SampleFilter, temperature: f64) -> Array {
    let width = x.shape[1];
    let token = |(at, row): (usize, &[f64])| {
        if temperature == 0.0 {
            return (0..width).fold(0, |best, j| if row[j] > row[best] { j } else { best }) as f64;
        }
        let draw = Philox::new(SEED, at as u64).uniform(STEP);
        let shares = shares(row, filter, temperature);
        (0..width).position(|j| shares[..=j].iter().sum::<f64>() > draw).unwrap_or(width - 1) as f64
    };
    Array { shape: vec![x.shape[0]], data: x.data.chunks(width).enumerate().map(token).collect() }
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize], filter: SampleFilter, temperature: f64| {
        let input = Input::Float { shape: shape.to_vec(), low: -4.0, high: 4.0, grad: false };
        let run = move |x: &[Tensor]| {
            let step = Tensor::scalar(STEP as i64, x[0].device())?;
            x[0].sample(&SampleSpec { filter, temperature, seed: SEED }, &step)
        };
        Case::new("sample", name, vec![input], run, move |x| reference(&x[0], filter, temperature))
    };
    vec![
        case("best", &[7, 13], SampleFilter::All, 0.0),
        case("all", &[7, 13], SampleFilter::All, 0.7),
        case("one token", &[3, 1], SampleFilter::Best(2), 1.0),
        case("top k", &[5, 33], SampleFilter::Best(6), 1.3),
        case("top p", &[5, 33], SampleFilter::MassUpTo(0.8), 0.5),
        case("nucleus", &[5, 33], SampleFilter::MassBelow(0.8), 1.0),
        case("min p", &[5, 33], SampleFilter::MinP(0.1), 2.0),
        case("wide", &[3, 1301], SampleFilter::Best(300), 1.0),
        case("no rows", &[0, 4], SampleFilter::All, 1.0),
    ]
}
