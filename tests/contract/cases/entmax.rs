use crate::case::{Array, Case, Input};

/// `max(x / 2 − τ, 0)²`, with `τ` found by bisection.
fn reference(x: &[Array]) -> Array {
    let mut out = x[0].clone();
    let width = x[0].shape.last().copied().unwrap_or(1);
    for row in out.data.chunks_mut(width.max(1)) {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weight = |x: f64, threshold: f64| ((x - max) / 2.0 - threshold).max(0.0).powi(2);
        let (mut low, mut high) = (-1.0, 0.0);
        for _ in 0..200 {
            let middle = (low + high) / 2.0;
            let sum: f64 = row.iter().map(|&x| weight(x, middle)).sum();
            if sum > 1.0 { low = middle } else { high = middle }
        }
        row.iter_mut().for_each(|x| *x = weight(*x, low));
    }
    out
}

pub fn cases() -> Vec<Case> {
    let case = |name: &str, input: Input| Case::new("entmax15", name, vec![input], |x| x[0].entmax15(), reference);
    let masked: Vec<f64> = vec![0.5, f64::from(f32::MIN), 1.25, -0.75, f64::from(f32::MIN), 0.25];
    vec![
        case("dense", Input::between(&[2, 3, 9], -0.5, 0.5)),
        // Small steps: a larger one crosses the threshold, where the derivative has a bend.
        case("sparse", Input::between(&[3, 40], -6.0, 6.0)).step(1e-5),
        case("wide", Input::between(&[2, 1030], -30.0, 30.0)).step(1e-5),
        case("one", Input::float(&[4, 1])),
        case("masked", Input::Values { shape: vec![1, 6], values: masked }),
        case("all equal", Input::Values { shape: vec![2, 5], values: vec![-3.0; 10] }),
        case("empty rows", Input::float(&[0, 5])),
        case("empty columns", Input::float(&[3, 0])),
    ]
}
