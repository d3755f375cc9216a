use x_transformers::{DType, Error, ErrorKind, Tensor};

use crate::{
    case::{Array, Case, Input},
    common::device,
    refused::{argument, dtype, floats, refused, shape, tokens},
};

fn reference(x: &[Array], ignore_index: i64) -> Array {
    let classes = x[0].shape.last().copied().unwrap_or(1);
    let (mut sum, mut count) = (0.0, 0.0);
    for (row, &target) in x[0].data.chunks(classes).zip(&x[1].data) {
        if target as i64 == ignore_index {
            continue;
        }
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let log_sum = max + row.iter().map(|v| (v - max).exp()).sum::<f64>().ln();
        sum += log_sum - row[target as usize];
        count += 1.0;
    }
    Array { shape: vec![], data: vec![sum / count] }
}

fn case(name: &str, logits: Input, ignore_index: i64) -> Case {
    let Input::Float { shape, .. } = &logits else { unreachable!("logits are floats") };
    let (classes, batch) = (shape[shape.len() - 1], shape[..shape.len() - 1].to_vec());
    Case::new(
        "cross_entropy",
        name,
        vec![logits, Input::int(&batch, classes as u64)],
        move |x| x[0].cross_entropy(&x[1], ignore_index),
        move |x| reference(x, ignore_index),
    )
}

pub fn cases() -> Vec<Case> {
    vec![
        case("ordinary", Input::float(&[2, 3, 16]), -100),
        case("odd", Input::float(&[7, 37]), -100),
        case("ignored class", Input::float(&[5, 9, 4]), 2),
        case("wide", Input::float(&[3, 1030]), -100),
        case("several tasks", Input::float(&[61, 123]), 5),
        case("large", Input::between(&[6, 19], -300.0, 300.0), -100),
        // The step of differences grows with the input.
        case("far from zero", Input::between(&[300, 19], 1000.0, 1016.0), -100).step(1e-6),
        case("one row", Input::float(&[11]), -100),
        // Repeated targets could all be the ignored one.
        case("two classes", Input::float(&[4, 2]), 1).distinct(),
    ]
}

#[test]
fn errors() {
    let _alone = crate::alone();
    let logits = floats(&[2, 4]);
    refused(floats(&[]).cross_entropy(&tokens(&[]), -100), shape, &["cross_entropy", "scalar"]);
    refused(logits.cross_entropy(&tokens(&[1, 2, 3]), -100), shape, &["cross_entropy", "[2]", "[3]", "[2, 4]"]);
    refused(logits.cross_entropy(&floats(&[2]), -100), dtype, &["cross_entropy", "i64", "f32"]);
    for (bad, message) in [(4, "class 4"), (-1, "class -1"), (i64::MIN, "class -9223372036854775808")] {
        let class = |error: &Error| matches!(error.kind(), ErrorKind::Index { what: "class", limit: 4, .. });
        refused(logits.cross_entropy(&tokens(&[0, bad]), -100), class, &["cross_entropy", message, "0 to 3"]);
    }
    refused(logits.cross_entropy(&tokens(&[7, 7]), 7), argument, &["cross_entropy", "2 targets", "`ignore_index` (7)"]);
    refused(floats(&[0, 4]).cross_entropy(&tokens(&[]), -100), argument, &["cross_entropy", "0 targets"]);
    let no_classes = |error: &Error| matches!(error.kind(), ErrorKind::Index { what: "class", limit: 0, .. });
    refused(floats(&[1, 0]).cross_entropy(&tokens(&[0]), -100), no_classes, &["cross_entropy"]);
    let integers = Tensor::zeros([2, 4], DType::I64, device()).expect("a legal shape");
    refused(integers.cross_entropy(&tokens(&[0, 1]), -100), dtype, &["cross_entropy", "i64"]);
}
