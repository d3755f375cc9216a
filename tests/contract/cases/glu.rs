use x_transformers::{Gradcheck, ops::Activation};

use crate::case::{Array, Case, Input};

/// The function itself.
pub fn activation(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Gelu => x * 0.5 * (1.0 + libm::erf(x / 2.0f64.sqrt())),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::ReluSquared => x.max(0.0).powi(2),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Relu => x.max(0.0),
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
    }
}

/// The step of differences: small where the slope has a kink, near which some of many elements lie.
pub fn step(function: Activation) -> f64 {
    if function == Activation::ReluSquared { 1e-6 } else { Gradcheck::default().step }
}

fn case(name: &str, input: Input, function: Activation) -> Case {
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
                x[0].at(i) * activation(function, x[0].at(&gate))
            })
        },
    )
}

/// The same of a sum.
fn sum(name: &str, shape: &[usize], function: Activation) -> Case {
    let features = shape.last().copied().unwrap_or(0);
    Case::new(
        "add_glu",
        format!("{function:?} {name}"),
        vec![Input::float(shape), Input::between(&[features], -1.0, 1.0)],
        move |x| x[0].add_glu(&x[1], function),
        move |x| {
            let (mut shape, dim, last) = (x[0].shape.clone(), features / 2, x[0].shape.len() - 1);
            shape[last] = dim;
            Array::from_fn(&shape, |i| {
                let mut gate = i.to_vec();
                gate[last] += dim;
                let at = |i: &[usize]| x[0].at(i) + x[1].at(i);
                at(i) * activation(function, at(&gate))
            })
        },
    )
    .step(step(function))
}

/// Those with a continuous derivative, of which no kink has to be avoided; squared ReLU has one too.
pub const SMOOTH: [Activation; 6] = [
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::ReluSquared,
    Activation::Sigmoid,
    Activation::Silu,
    Activation::QuickGelu,
];

pub fn cases() -> Vec<Case> {
    SMOOTH
        .into_iter()
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
