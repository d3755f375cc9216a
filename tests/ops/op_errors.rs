//! Bad arguments of the fused ops: each is refused with an error that names what was expected and what came.

use std::sync::Mutex;

use crate::common::device;
use x_transformers::{DType, Error, ErrorKind, Result, Tape, Tensor, ops::Activation};

/// A GPU tells of a bad index to whoever reads values back next: tests that give it one go one after the other.
static INDICES: Mutex<()> = Mutex::new(());

fn floats(shape: &[usize]) -> Tensor {
    Tensor::generate(shape, DType::F32, device(), |i| i as f64).expect("a legal shape")
}

fn tokens(values: &[i64]) -> Tensor {
    Tensor::from_slice(values, [values.len()], device()).expect("a legal shape")
}

/// The message of an error, which must be of the given kind. A GPU tells of bad indices when values are read back.
#[track_caller]
fn refused(result: Result<Tensor>, kind: fn(&Error) -> bool, parts: &[&str]) {
    let error = result.and_then(|y| y.to_f64_vec()).expect_err("bad arguments must be refused");
    assert!(kind(&error), "another kind of error: {error:?}");
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "`{message}` does not say `{part}`");
    }
}

fn shape(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Shape { .. })
}

fn dtype(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::DType { .. })
}

fn argument(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Argument { .. })
}

#[test]
fn norm_errors() {
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
fn cross_entropy_errors() {
    let _alone = INDICES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let logits = floats(&[2, 4]);
    refused(floats(&[]).cross_entropy(&tokens(&[]), -100), shape, &["cross_entropy", "scalar"]);
    refused(logits.cross_entropy(&tokens(&[1, 2, 3]), -100), shape, &["cross_entropy", "[2]", "[3]", "[2, 4]"]);
    refused(logits.cross_entropy(&floats(&[2]), -100), dtype, &["cross_entropy", "i64", "f32"]);
    for (bad, message) in [(4, "class 4"), (-1, "class -1"), (i64::MIN, "class -9223372036854775808")] {
        let class = |error: &Error| matches!(error.kind(), ErrorKind::Index { what: "class", limit: 4, .. });
        refused(logits.cross_entropy(&tokens(&[0, bad]), -100), class, &["cross_entropy", message, "0 to 3"]);
    }
    refused(logits.cross_entropy(&tokens(&[7, 7]), 7), argument, &["cross_entropy", "2 targets", "ignore_index 7"]);
    refused(floats(&[0, 4]).cross_entropy(&tokens(&[]), -100), argument, &["cross_entropy", "0 targets"]);
    let no_classes = |error: &Error| matches!(error.kind(), ErrorKind::Index { what: "class", limit: 0, .. });
    refused(floats(&[1, 0]).cross_entropy(&tokens(&[0]), -100), no_classes, &["cross_entropy"]);
    let integers = Tensor::zeros([2, 4], DType::I64, device()).expect("a legal shape");
    refused(integers.cross_entropy(&tokens(&[0, 1]), -100), dtype, &["cross_entropy", "i64"]);
}

#[test]
fn linear_cross_entropy_errors() {
    let _alone = INDICES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    const OP: &str = "linear_cross_entropy";
    let (x, weight) = (floats(&[2, 3]), floats(&[4, 3]));
    let loss = |x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, targets: &Tensor| {
        x.linear_cross_entropy(weight, bias, targets, -100)
    };
    refused(loss(&x, &floats(&[4, 2]), None, &tokens(&[0, 1])), shape, &[OP, "[2, 3]", "[4, 2]"]);
    refused(loss(&floats(&[]), &weight, None, &tokens(&[0])), shape, &[OP, "[]"]);
    refused(loss(&x, &weight, Some(&floats(&[3])), &tokens(&[0, 1])), shape, &[OP, "bias [4]", "[3]"]);
    refused(loss(&x, &weight, None, &tokens(&[0, 1, 2])), shape, &[OP, "[2]", "[3]"]);
    refused(loss(&x, &weight, None, &floats(&[2])), dtype, &[OP, "i64", "f32"]);
    let half = weight.to_dtype(DType::F16).expect("a conversion");
    refused(loss(&x, &half, None, &tokens(&[0, 1])), dtype, &[OP, "f32", "f16"]);
    let class = |error: &Error| matches!(error.kind(), ErrorKind::Index { what: "class", limit: 4, .. });
    refused(loss(&x, &weight, None, &tokens(&[0, 4])), class, &["class 4", "0 to 3"]);
    refused(x.linear_cross_entropy(&weight, None, &tokens(&[7, 7]), 7), argument, &["2 targets", "ignore_index 7"]);
    refused(loss(&floats(&[0, 3]), &weight, None, &tokens(&[])), argument, &["0 targets"]);
    refused(x.linear_cross_entropy_by(&weight, None, &tokens(&[0, 1]), -100, [0, 1]), argument, &[OP, "one row"]);
}

#[test]
fn embedding_errors() {
    let _alone = INDICES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let table = floats(&[5, 3]);
    for (bad, message) in [(5, "token 5"), (-1, "token -1")] {
        let token = |error: &Error| matches!(error.kind(), ErrorKind::Index { what: "token", limit: 5, .. });
        refused(table.embedding(&tokens(&[0, bad])), token, &["embedding", message, "0 to 4"]);
    }
    refused(
        floats(&[0, 3]).embedding(&tokens(&[0])),
        |error| matches!(error.kind(), ErrorKind::Index { .. }),
        &["token 0"],
    );
    refused(table.embedding(&floats(&[2])), dtype, &["embedding", "i64", "f32"]);
    refused(floats(&[5]).embedding(&tokens(&[0])), shape, &["embedding", "[tokens, dim]", "[5]"]);
    refused(tokens(&[1]).unsqueeze(0).and_then(|x| x.embedding(&tokens(&[0]))), dtype, &["embedding", "i64"]);
    let deep = tokens(&[1]).reshape([1; 6]).expect("six dimensions");
    refused(table.embedding(&deep), shape, &["7 dimensions"]);
}

#[test]
fn glu_errors() {
    refused(floats(&[2, 5]).glu(Activation::Gelu), shape, &["glu", "even", "[2, 5]"]);
    refused(floats(&[]).glu(Activation::Gelu), shape, &["glu"]);
    refused(tokens(&[1, 2]).glu(Activation::Sigmoid), dtype, &["glu", "i64"]);
    refused(floats(&[2, 4]).add_glu(&floats(&[2]), Activation::Gelu), shape, &["add_glu", "bias", "[4]", "[2]"]);
    refused(floats(&[2, 3]).add_glu(&floats(&[3]), Activation::Gelu), shape, &["add_glu", "even", "[2, 3]"]);
}

#[test]
fn activation_errors() {
    let (x, bias) = (floats(&[2, 4]), floats(&[4]));
    refused(floats(&[]).add_activation(&bias, Activation::Gelu), shape, &["add_activation", "scalar"]);
    refused(x.add_activation(&floats(&[2]), Activation::Gelu), shape, &["add_activation", "[4]", "[2]"]);
    refused(tokens(&[1, 2]).add_activation(&tokens(&[1, 2]), Activation::Gelu), dtype, &["add_activation", "i64"]);
    let half = bias.to_dtype(DType::F16).expect("a conversion");
    refused(x.add_activation(&half, Activation::Sigmoid), dtype, &["add_activation", "f32", "f16"]);
}

#[test]
fn rotary_errors() {
    let x = floats(&[3, 4]);
    refused(floats(&[4]).rotary(&floats(&[2]), 0), shape, &["rotary", "[4]"]);
    refused(x.rotary(&floats(&[3]), 0), shape, &["rotary", "at most 4", "[3]"]);
    refused(x.rotary(&floats(&[1, 2]), 0), shape, &["rotary", "[1, 2]"]);
    refused(x.rotary(&tokens(&[1, 2]), 0), dtype, &["rotary", "i64"]);
    let learned = floats(&[2]).requires_grad().expect("a float tensor");
    let _tape = Tape::grad();
    refused(x.rotary(&learned, 0), |error| matches!(error.kind(), ErrorKind::NoGradient { .. }), &["rotary"]);
}

#[test]
fn dropout_errors() {
    for p in [-0.1, 1.1, f64::NAN] {
        refused(floats(&[3]).dropout(p), argument, &["dropout", "between 0 and 1"]);
    }
    // Not only where it acts.
    refused(tokens(&[1]).dropout(0.0), dtype, &["dropout", "i64"]);
    let x = floats(&[3]);
    refused(x.dropout_add(&x, 1.5), argument, &["dropout_add", "between 0 and 1", "1.5"]);
    refused(x.dropout_add(&floats(&[1]), 0.5), shape, &["dropout_add", "[3]", "[1]"]);
    refused(x.dropout_add(&x.to_dtype(DType::F64).expect("f64"), 0.5), dtype, &["dropout_add", "f32", "f64"]);
}

#[test]
fn ops_refuse_tensors_of_another_tape() {
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
