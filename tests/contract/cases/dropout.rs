use x_transformers::DType;

use crate::{
    case::{Array, Case, Input},
    refused::{argument, dtype, floats, refused, shape, tokens},
};

/// The suite runs without a training tape, where dropout returns its input. `tests/ops/dropout.rs` tests the masks.
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

#[test]
fn errors() {
    let _alone = crate::alone();
    for p in [-0.1, 1.1, f64::NAN] {
        refused(floats(&[3]).dropout(p), argument, &["dropout", "from 0 to 1"]);
    }
    // Not only where it acts.
    refused(tokens(&[1]).dropout(0.0), dtype, &["dropout", "i64"]);
    let x = floats(&[3]);
    refused(x.dropout_add(&x, 1.5), argument, &["dropout_add", "from 0 to 1", "1.5"]);
    refused(x.dropout_add(&floats(&[1]), 0.5), shape, &["dropout_add", "[3]", "[1]"]);
    refused(x.dropout_add(&x.to_dtype(DType::F64).expect("f64"), 0.5), dtype, &["dropout_add", "f32", "f64"]);
}
