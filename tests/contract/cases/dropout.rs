use crate::case::{Array, Case, Input};

/// The suite runs without a training tape, where dropout hands its input on. `tests/ops/dropout.rs` has the masks.
pub fn cases() -> Vec<Case> {
    let case = |name: &str, shape: &[usize], p: f64| {
        Case::new("dropout", name, vec![Input::float(shape)], move |x| x[0].dropout(p), |x| x[0].clone())
    };
    let sum = |name: &str, shape: &[usize], p: f64| {
        Case::new(
            "dropout_add",
            name,
            vec![Input::float(shape), Input::float(shape)],
            move |x| x[0].dropout_add(&x[1], p),
            |x| Array::from_fn(&x[0].shape, |i| x[0].at(i) + x[1].at(i)),
        )
    };
    vec![
        case("outside of training", &[3, 37], 0.5),
        case("empty", &[0, 4], 1.0),
        case("scalar", &[], 0.1),
        sum("outside of training", &[3, 37], 0.5),
        sum("empty", &[0, 4], 1.0),
        sum("scalar", &[], 0.1),
    ]
}
