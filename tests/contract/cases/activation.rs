use x_transformers::{DType, ops::Activation};

use super::{glu::activations, pointwise::Unary};
use crate::{
    case::{Array, Case, Input},
    refused::{dtype, floats, refused, shape, tokens},
};

fn case(name: &str, shape: &[usize], range: (f64, f64), (function, definition): (Activation, Unary)) -> Case {
    let features = shape.last().copied().unwrap_or(0);
    Case::new(
        "add_activation",
        format!("{function:?} {name}"),
        vec![Input::between(shape, range.0, range.1), definition.bias(features, 0.0, 1.0)],
        move |x| x[0].add_activation(&x[1], function),
        move |x| Array::from_fn(&x[0].shape, |i| (definition.reference)(x[0].at(i) + x[1].at(i))),
    )
    .step(definition.step())
}

pub fn cases() -> Vec<Case> {
    activations()
        .flat_map(|function| {
            // Below, GELU cancels and a single element cannot hold a relative bound.
            let range = (-1.5, 3.0);
            [
                case("ordinary", &[2, 3, 16], range, function),
                case("odd", &[5, 37], range, function),
                case("vector", &[6], range, function),
                case("one feature", &[3, 1], range, function),
                case("wide", &[2, 1030], range, function),
                case("several tasks and chunks", &[3, 41, 264], range, function),
                case("empty batch", &[0, 6], range, function),
                case("no features", &[3, 0], range, function),
            ]
        })
        .collect()
}

#[test]
fn errors() {
    let _alone = crate::alone();
    let (x, bias) = (floats(&[2, 4]), floats(&[4]));
    refused(floats(&[]).add_activation(&bias, Activation::Gelu), shape, &["add_activation", "scalar"]);
    refused(x.add_activation(&floats(&[2]), Activation::Gelu), shape, &["add_activation", "[4]", "[2]"]);
    refused(tokens(&[1, 2]).add_activation(&tokens(&[1, 2]), Activation::Gelu), dtype, &["add_activation", "i64"]);
    let half = bias.to_dtype(DType::F16).expect("a conversion");
    refused(x.add_activation(&half, Activation::Sigmoid), dtype, &["add_activation", "f32", "f16"]);
}
