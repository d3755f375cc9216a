//! Scores of predictions.

use crate::collect::CollectVec;

/// Share of the predicted classes that are right.
///
/// ```
/// assert_eq!(x_transformers::train::accuracy(&[0, 1, 1, 2], &[0, 1, 2, 2]), 0.75);
/// ```
#[doc(alias = "accuracy_score")]
pub fn accuracy(predicted: &[usize], labels: &[usize]) -> f64 {
    let right = predicted.iter().zip(labels).filter(|(one, other)| one == other).count();
    right as f64 / labels.len().max(1) as f64
}

/// Mean over the classes that occur of the harmonic mean of precision and recall (macro F1), as in scikit-learn.
///
/// ```
/// let score = x_transformers::train::macro_f1(&[0, 1, 1, 2], &[0, 1, 2, 2]);
/// assert!((score - 7.0 / 9.0).abs() < 1e-12);
/// ```
#[doc(alias = "f1_score")]
pub fn macro_f1(predicted: &[usize], labels: &[usize]) -> f64 {
    let classes = predicted.iter().chain(labels).max().map_or(0, |&most| most + 1);
    let (mut sum, mut count) = (0.0, 0);
    for class in 0..classes {
        let of = |list: &[usize]| list.iter().filter(|&&own| own == class).count();
        let both = predicted.iter().zip(labels).filter(|&(&one, &other)| one == class && other == class).count();
        let all = of(predicted) + of(labels);
        if all > 0 {
            sum += 2.0 * both as f64 / all as f64;
            count += 1;
        }
    }
    sum / count.max(1) as f64
}

/// Correlation of ranks (Spearman's ρ), with the mean rank for equal values; 0 if either list has one value only.
///
/// ```
/// let score = x_transformers::train::spearman(&[1.0, 2.0, 3.0, 4.0], &[10.0, 30.0, 20.0, 40.0]);
/// assert!((score - 0.8).abs() < 1e-12);
/// ```
#[doc(alias = "spearmanr")]
pub fn spearman(one: &[f64], other: &[f64]) -> f64 {
    let ranks = |values: &[f64]| {
        let rank = |value: f64| {
            let less = values.iter().filter(|&&other| other < value).count();
            let same = values.iter().filter(|&&other| other == value).count();
            less as f64 + (same as f64 - 1.0) / 2.0
        };
        let ranks: Vec<f64> = values.iter().map(|&value| rank(value)).collect_vec();
        let mean = ranks.iter().sum::<f64>() / ranks.len().max(1) as f64;
        ranks.into_iter().map(|rank| rank - mean).collect_vec()
    };
    let (one, other): (Vec<f64>, Vec<f64>) = (ranks(one), ranks(other));
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let lengths = product(&one, &one) * product(&other, &other);
    if lengths > 0.0 { product(&one, &other) / lengths.sqrt() } else { 0.0 }
}
