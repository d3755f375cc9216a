use x_transformers::ops::Activation;

use super::pointwise::{UNARY, Unary};
use crate::{
    case::{Array, Case, Input},
    refused::{dtype, floats, refused, shape, tokens},
};

/// Every activation with its definition.
pub fn activations() -> impl Iterator<Item = (Activation, Unary)> {
    let definition = |name: &str| UNARY.iter().find(|function| function.name == name).expect("a row of UNARY");
    Activation::ALL.iter().map(move |&activation| (activation, *definition(activation.name())))
}

fn case(name: &str, input: Input, (function, definition): (Activation, Unary)) -> Case {
    Case::new(
        "glu",
        format!("{function:?} {name}"),
        vec![input],
        move |x| x[0].glu(function),
        move |x| {
            let mut shape = x[0].shape.clone();
            let last = shape.len() - 1;
            shape[last] /= 2;
            let dim = shape[last];
            Array::from_fn(&shape, |i| {
                let mut gate = i.to_vec();
                gate[last] += dim;
                x[0].at(i) * (definition.reference)(x[0].at(&gate))
            })
        },
    )
    .step(definition.step())
}

/// The same of a sum.
fn sum(name: &str, shape: &[usize], (function, definition): (Activation, Unary)) -> Case {
    let features = shape.last().copied().unwrap_or(0);
    Case::new(
        "add_glu",
        format!("{function:?} {name}"),
        vec![Input::float(shape), definition.bias(features, -1.0, 1.0)],
        move |x| x[0].add_glu(&x[1], function),
        move |x| {
            let (mut shape, dim, last) = (x[0].shape.clone(), features / 2, x[0].shape.len() - 1);
            shape[last] = dim;
            Array::from_fn(&shape, |i| {
                let mut gate = i.to_vec();
                gate[last] += dim;
                let at = |i: &[usize]| x[0].at(i) + x[1].at(i);
                at(i) * (definition.reference)(at(&gate))
            })
        },
    )
    .step(definition.step())
}

pub fn cases() -> Vec<Case> {
    activations()
        .flat_map(|function| {
            [
                case("ordinary", Input::float(&[2, 3, 16]), function),
                case("odd half", Input::between(&[5, 74], -4.0, 4.0), function),
                case("vector", Input::float(&[6]), function),
                case("one", Input::float(&[3, 2]), function),
                case("wide", Input::float(&[1, 2060]), function),
                case("several tasks", Input::float(&[3, 41, 246]), function),
                case("empty batch", Input::float(&[0, 6]), function),
                case("no features", Input::float(&[3, 0]), function),
                sum("ordinary", &[2, 3, 16], function),
                sum("odd half", &[5, 74], function),
                sum("vector", &[6], function),
                sum("wide", &[1, 2060], function),
                sum("several tasks and chunks", &[3, 41, 528], function),
                sum("empty batch", &[0, 6], function),
                sum("no features", &[3, 0], function),
            ]
        })
        .collect()
}

#[test]
fn errors() {
    let _alone = crate::alone();
    refused(floats(&[2, 5]).glu(Activation::Gelu), shape, &["glu", "even", "[2, 5]"]);
    refused(floats(&[]).glu(Activation::Gelu), shape, &["glu"]);
    refused(tokens(&[1, 2]).glu(Activation::Sigmoid), dtype, &["glu", "i64"]);
    refused(floats(&[2, 4]).add_glu(&floats(&[2]), Activation::Gelu), shape, &["add_glu", "bias", "[4]", "[2]"]);
    refused(floats(&[2, 3]).add_glu(&floats(&[3]), Activation::Gelu), shape, &["add_glu", "even", "[2, 3]"]);
}
