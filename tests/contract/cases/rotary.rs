use x_transformers::{ErrorKind, Tape, Tensor};

use crate::{
    case::{Array, Case, Input},
    refused::{dtype, floats, refused, shape, tokens},
};

/// The frequencies of the paper for `r` rotated features.
fn frequencies(r: usize) -> Vec<f64> {
    (0..r / 2).map(|k| 10000f64.powf(-2.0 * k as f64 / r as f64)).collect()
}

/// Rotates the first `r` features.
fn case(name: &str, shape: &[usize], r: usize, first: usize) -> Case {
    Case::new(
        "rotary",
        name,
        vec![Input::float(shape)],
        move |x| x[0].rotary(&Tensor::from_vec(frequencies(r), [r / 2], x[0].device())?, first),
        move |x| {
            let (frequencies, rank) = (frequencies(r), x[0].shape.len());
            Array::from_fn(&x[0].shape, |i| {
                let (position, k) = (first + i[rank - 2], i[rank - 1]);
                if k >= r {
                    return x[0].at(i);
                }
                let angle = position as f64 * frequencies[k % (r / 2)];
                let (own, mut partner) = (x[0].at(i), i.to_vec());
                if k < r / 2 {
                    partner[rank - 1] = k + r / 2;
                    own * angle.cos() - x[0].at(&partner) * angle.sin()
                } else {
                    partner[rank - 1] = k - r / 2;
                    own * angle.cos() + x[0].at(&partner) * angle.sin()
                }
            })
        },
    )
}

pub fn cases() -> Vec<Case> {
    vec![
        case("ordinary", &[2, 3, 7, 16], 16, 0),
        case("packets of several heads", &[2, 5, 9, 40], 32, 3),
        case("some features", &[2, 3, 7, 11], 6, 0),
        case("later positions", &[1, 2, 70, 10], 8, 1000),
        case("matrix", &[5, 4], 4, 3),
        case("one position", &[3, 1, 6], 6, 129),
        case("several tasks", &[2, 4, 123, 37], 32, 0),
        case("wide", &[2, 1030], 1030, 0),
        case("no features rotated", &[3, 4], 0, 0),
        case("empty batch", &[0, 4, 8], 8, 0),
        case("no positions", &[2, 0, 8], 8, 0),
        case("no features", &[2, 3, 0], 0, 0),
    ]
}

#[test]
fn errors() {
    let _alone = crate::alone();
    let x = floats(&[3, 4]);
    refused(floats(&[4]).rotary(&floats(&[2]), 0), shape, &["rotary", "[4]"]);
    refused(x.rotary(&floats(&[3]), 0), shape, &["rotary", "at most 4", "[3]"]);
    refused(x.rotary(&floats(&[1, 2]), 0), shape, &["rotary", "[1, 2]"]);
    refused(x.rotary(&tokens(&[1, 2]), 0), dtype, &["rotary", "i64"]);
    let learned = floats(&[2]).requires_grad().expect("a float tensor");
    let _tape = Tape::grad();
    refused(x.rotary(&learned, 0), |error| matches!(error.kind(), ErrorKind::NoGradient { .. }), &["rotary"]);
}
