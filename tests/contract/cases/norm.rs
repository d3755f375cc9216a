use x_transformers::{DType, ErrorKind, Result, Tape, Tensor, ops::Activation};

use crate::{
    case::{Array, Case, Input},
    refused::{argument, dtype, floats, refused, shape, tokens},
};

/// Statistics that normalise a row: the mean to subtract and the divisor.
type Statistics = fn(&[f64], f64) -> (f64, f64);

fn centred(row: &[f64], eps: f64) -> (f64, f64) {
    let n = row.len() as f64;
    let mean = row.iter().sum::<f64>() / n;
    let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    (mean, (variance + eps).sqrt())
}

fn floored(row: &[f64], eps: f64) -> (f64, f64) {
    let norm = row.iter().map(|v| v * v).sum::<f64>().sqrt();
    (0.0, (norm * (row.len() as f64).powf(-0.5)).max(eps))
}

fn mean_square(row: &[f64], eps: f64) -> (f64, f64) {
    (0.0, (row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64 + eps).sqrt())
}

/// `(x − mean) / divisor · weight + bias`; a weight of one element serves all features.
fn reference(x: &Array, weight: Option<&Array>, bias: Option<&Array>, statistics: Statistics, eps: f64) -> Array {
    let mut out = x.clone();
    for row in out.data.chunks_mut(x.shape.last().copied().unwrap_or(1).max(1)) {
        let (mean, divisor) = statistics(row, eps);
        for (j, value) in row.iter_mut().enumerate() {
            let (weight, bias) = (weight.map_or(1.0, |w| w.at(&[j])), bias.map_or(0.0, |b| b.at(&[j])));
            *value = (*value - mean) / divisor * weight + bias;
        }
    }
    out
}

fn layer(name: &str, x: Input, dim: usize) -> Case {
    Case::new(
        "layer_norm",
        name,
        vec![x, Input::float(&[dim]), Input::float(&[dim])],
        |x| x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5),
        |x| reference(&x[0], Some(&x[1]), Some(&x[2]), centred, 1e-5),
    )
}

fn rms(name: &str, x: Input, dim: usize, eps: f64) -> Case {
    Case::new(
        "clamped_rms_norm",
        name,
        vec![x, Input::float(&[dim])],
        move |x| x[0].clamped_rms_norm(&x[1], eps),
        move |x| reference(&x[0], Some(&x[1]), None, floored, eps),
    )
}

fn summed(name: &str, x: Input, dim: usize, eps: f64) -> Case {
    Case::new(
        "rms_norm",
        name,
        vec![x, Input::float(&[dim])],
        move |x| x[0].rms_norm(&x[1], eps),
        move |x| reference(&x[0], Some(&x[1]), None, mean_square, eps),
    )
}

fn scale(name: &str, x: Input, eps: f64) -> Case {
    Case::new(
        "scale_norm",
        name,
        vec![x, Input::float(&[1])],
        move |x| x[0].scale_norm(&x[1], eps),
        move |x| reference(&x[0], Some(&x[1]), None, floored, eps),
    )
}

/// A norm of a sum, as one tensor: the sum and then its norm, which gradients flow into both.
fn sum(
    op: &'static str,
    name: &str,
    shape: &[usize],
    parameters: &[usize],
    run: impl Fn(&[Tensor]) -> Result<(Tensor, Tensor)> + 'static,
    norm: impl Fn(&Array, &[Array]) -> Array + 'static,
) -> Case {
    // Rows of sums near 0 would have gradients beyond f16.
    let mut inputs = vec![Input::between(shape, -0.5, 0.5), Input::between(shape, 1.0, 2.0)];
    inputs.extend(parameters.iter().map(|&size| Input::float(&[size])));
    Case::new(
        op,
        name,
        inputs,
        move |x| {
            let (sum, normed) = run(x)?;
            Tensor::cat(&[&sum, &normed], 0)
        },
        move |x| {
            let sum = Array::from_fn(&x[0].shape, |i| x[0].at(i) + x[1].at(i));
            let mut both = norm(&sum, &x[2..]);
            both.shape[0] *= 2;
            both.data = [sum.data, both.data].concat();
            both
        },
    )
}

fn sums() -> Vec<Case> {
    let layer = |name: &str, shape: &[usize], dim: usize| {
        sum(
            "add_layer_norm",
            name,
            shape,
            &[dim, dim],
            |x| x[0].add_layer_norm(&x[1], Some(&x[2]), Some(&x[3]), 1e-5),
            |sum, x| reference(sum, Some(&x[0]), Some(&x[1]), centred, 1e-5),
        )
    };
    let rms = |name: &str, shape: &[usize], dim: usize, eps: f64| {
        sum(
            "add_clamped_rms_norm",
            name,
            shape,
            &[dim],
            move |x| x[0].add_clamped_rms_norm(&x[1], &x[2], eps),
            move |sum, x| reference(sum, Some(&x[0]), None, floored, eps),
        )
    };
    let summed = |name: &str, shape: &[usize], dim: usize, eps: f64| {
        sum(
            "add_rms_norm",
            name,
            shape,
            &[dim],
            move |x| x[0].add_rms_norm(&x[1], &x[2], eps),
            move |sum, x| reference(sum, Some(&x[0]), None, mean_square, eps),
        )
    };
    let scale = |name: &str, shape: &[usize]| {
        sum(
            "add_scale_norm",
            name,
            shape,
            &[1],
            |x| x[0].add_scale_norm(&x[1], &x[2], 1e-5),
            |sum, x| reference(sum, Some(&x[0]), None, floored, 1e-5),
        )
    };
    vec![
        layer("ordinary", &[2, 3, 16], 16),
        layer("odd", &[7, 37], 37),
        layer("vector", &[123], 123),
        layer("several blocks", &[3, 111, 37], 37),
        layer("several warps a row", &[21, 1030], 1030),
        layer("more than registers hold", &[2, 4100], 4100),
        layer("empty batch", &[0, 5], 5),
        layer("empty rows", &[3, 0], 0),
        sum(
            "add_layer_norm",
            "plain",
            &[5, 9],
            &[],
            |x| x[0].add_layer_norm(&x[1], None, None, 0.5),
            |sum, _| reference(sum, None, None, centred, 0.5),
        ),
        rms("ordinary", &[2, 3, 16], 16, 1e-8),
        rms("odd", &[7, 37], 37, 1e-8),
        // All sums are below it.
        rms("below the floor", &[5, 37], 37, 2.5),
        rms("several warps a row", &[3, 600], 600, 1e-8),
        rms("empty batch", &[2, 0, 5], 5, 1e-8),
        summed("ordinary", &[2, 3, 16], 16, 1e-6),
        summed("odd", &[7, 37], 37, 0.5),
        summed("several warps a row", &[3, 600], 600, 1e-6),
        summed("empty batch", &[2, 0, 5], 5, 1e-6),
        scale("ordinary", &[2, 3, 16]),
        scale("odd", &[5, 39]),
        scale("several blocks", &[211, 37]),
        scale("empty batch", &[0, 5]),
    ]
}

pub fn cases() -> Vec<Case> {
    // A floor of 1 acts on all of ±0.5 and on nothing with a root mean square above 1.
    let small = |shape: &[usize]| Input::between(shape, -0.5, 0.5);
    let mut cases = sums();
    cases.extend([
        layer("ordinary", Input::float(&[2, 3, 16]), 16),
        layer("odd", Input::float(&[7, 37]), 37),
        layer("vector", Input::float(&[123]), 123),
        layer("several blocks", Input::float(&[3, 111, 37]), 37),
        layer("several chunks and tiles", Input::float(&[130, 264]), 264),
        layer("several warps a row", Input::float(&[21, 1030]), 1030),
        layer("packets of several warps a row", Input::float(&[21, 1040]), 1040),
        layer("more than registers hold", Input::float(&[2, 8208]), 8208),
        // bf16 inputs near 100 are multiples of 0.5, so that the variance stays well above their rounding.
        layer("far from zero", Input::between(&[4, 33], 96.0, 104.0), 33),
        layer("empty batch", Input::float(&[0, 5]), 5),
        layer("empty rows", Input::float(&[3, 0]), 0),
        Case::new(
            "layer_norm",
            "one feature",
            // The deviation is zero: the output is the bias, whatever the input.
            vec![Input::float(&[4, 1]), Input::float(&[1]), Input::float(&[1])],
            |x| x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5),
            |x| Array::from_fn(&[4, 1], |_| x[2].at(&[0])),
        ),
        Case::new(
            "layer_norm",
            "plain wide",
            vec![Input::float(&[1, 1030])],
            |x| x[0].layer_norm(None, None, 1e-5),
            |x| reference(&x[0], None, None, centred, 1e-5),
        ),
        Case::new(
            "layer_norm",
            "weight alone",
            vec![Input::float(&[5, 9]), Input::float(&[9])],
            |x| x[0].layer_norm(Some(&x[1]), None, 0.5),
            |x| reference(&x[0], Some(&x[1]), None, centred, 0.5),
        ),
        Case::new(
            "layer_norm",
            "bias alone",
            vec![Input::float(&[5, 9]), Input::float(&[9])],
            |x| x[0].layer_norm(None, Some(&x[1]), 0.0),
            |x| reference(&x[0], None, Some(&x[1]), centred, 0.0),
        ),
        rms("ordinary", Input::float(&[2, 3, 16]), 16, 1e-8),
        rms("odd", Input::float(&[7, 37]), 37, 1e-8),
        rms("wide", Input::float(&[1, 1030]), 1030, 1e-8),
        rms("several blocks", Input::float(&[211, 37]), 37, 1e-8),
        rms("vector", Input::float(&[17]), 17, 1e-8),
        rms("two features above the floor", Input::between(&[5, 2], 1.25, 2.0), 2, 1.0),
        rms("below the floor", small(&[5, 37]), 37, 1.0),
        rms("some rows below the floor", Input::between(&[16, 3], -2.0, 2.0), 3, 1.0),
        rms("empty batch", Input::float(&[2, 0, 5]), 5, 1e-8),
        rms("empty rows", Input::float(&[3, 0]), 0, 1e-8),
        summed("ordinary", Input::float(&[2, 3, 16]), 16, 1e-6),
        summed("odd", Input::float(&[7, 37]), 37, 1e-6),
        summed("wide", Input::float(&[1, 1030]), 1030, 1e-6),
        summed("several blocks", Input::float(&[211, 37]), 37, 1e-6),
        summed("vector", Input::float(&[17]), 17, 0.0),
        // Rows that a floor would make constant.
        summed("a large summand", small(&[5, 37]), 37, 1.0),
        summed("more than registers hold", Input::float(&[2, 4100]), 4100, 1e-6),
        summed("empty batch", Input::float(&[2, 0, 5]), 5, 1e-6),
        summed("empty rows", Input::float(&[3, 0]), 0, 1e-6),
        scale("ordinary", Input::float(&[2, 3, 16]), 1e-5),
        scale("odd", Input::float(&[7, 37]), 1e-5),
        scale("wide", Input::float(&[1, 1030]), 1e-5),
        scale("several blocks", Input::float(&[211, 37]), 1e-5),
        scale("below the floor", small(&[5, 37]), 1.0),
        scale("one feature below the floor", small(&[6, 1]), 1.0),
        scale("empty batch", Input::float(&[0, 5]), 1e-5),
    ]);
    cases
}

#[test]
fn errors() {
    let _alone = crate::alone();
    let (x, g) = (floats(&[2, 4]), floats(&[4]));
    refused(floats(&[]).layer_norm(None, None, 1e-5), shape, &["layer_norm", "scalar"]);
    refused(tokens(&[1, 2]).layer_norm(None, None, 1e-5), dtype, &["layer_norm", "i64"]);
    refused(x.layer_norm(Some(&floats(&[5])), None, 1e-5), shape, &["layer_norm", "weight", "[4]", "[5]"]);
    refused(x.layer_norm(Some(&g), Some(&floats(&[1, 4])), 1e-5), shape, &["layer_norm", "bias", "[4]", "[1, 4]"]);
    let half = g.to_dtype(DType::BF16).expect("a conversion");
    refused(x.layer_norm(Some(&half), None, 1e-5), dtype, &["layer_norm", "f32", "bf16"]);
    refused(x.layer_norm(None, None, -1.0), argument, &["layer_norm", "eps", "-1"]);
    refused(x.layer_norm(None, None, f64::NAN), argument, &["layer_norm", "eps", "NaN"]);
    refused(x.clamped_rms_norm(&floats(&[1]), 1e-8), shape, &["clamped_rms_norm", "[4]", "[1]"]);
    refused(x.clamped_rms_norm(&half, 1e-8), dtype, &["clamped_rms_norm"]);
    refused(x.rms_norm(&floats(&[1]), 1e-6), shape, &["rms_norm", "[4]", "[1]"]);
    refused(x.add_rms_norm(&floats(&[4]), &g, 1e-6).map(|y| y.0), shape, &["add_rms_norm", "[2, 4]"]);
    refused(x.scale_norm(&g, 1e-5), shape, &["scale_norm", "[1]", "[4]"]);
    refused(x.scale_norm(&floats(&[1]), f64::INFINITY), argument, &["scale_norm", "inf"]);
    let other = floats(&[4]);
    refused(x.add_layer_norm(&other, None, None, 1e-5).map(|y| y.0), shape, &["add_layer_norm", "[2, 4]", "[4]"]);
    let half = x.to_dtype(DType::F16).expect("a conversion");
    refused(x.add_clamped_rms_norm(&half, &g, 1e-8).map(|y| y.0), dtype, &["add_clamped_rms_norm", "f32", "f16"]);
    refused(x.add_scale_norm(&x, &g, 1e-5).map(|y| y.0), shape, &["add_scale_norm", "[1]", "[4]"]);
}

#[test]
fn ops_refuse_tensors_of_another_tape() {
    let _alone = crate::alone();
    let x = floats(&[2, 4]).requires_grad().expect("a float tensor");
    let stale = {
        let _tape = Tape::grad();
        x.glu(Activation::Gelu).expect("a legal call")
    };
    let _tape = Tape::grad();
    refused(
        stale.layer_norm(None, None, 1e-5),
        |error| matches!(error.kind(), ErrorKind::StaleTape { .. }),
        &["layer_norm"],
    );
}
