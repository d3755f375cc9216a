use x_transformers::{DType, Error, ErrorKind, Tensor};

use crate::{
    case::{Array, Case, Input},
    refused::{argument, dtype, floats, refused, shape, tokens},
};

fn reference(x: &[Array], bias: Option<&Array>, ignore_index: i64) -> Array {
    let [classes, inputs] = x[1].shape[..] else { panic!("a weight has two dimensions") };
    let (mut sum, mut count) = (0.0, 0.0);
    for (row, &target) in x[2].data.iter().enumerate() {
        if target as i64 == ignore_index {
            continue;
        }
        let x_row = &x[0].data[row * inputs..][..inputs];
        let logit = |class: usize| {
            let weight = &x[1].data[class * inputs..][..inputs];
            x_row.iter().zip(weight).map(|(x, w)| x * w).sum::<f64>() + bias.map_or(0.0, |bias| bias.data[class])
        };
        let logits: Vec<f64> = (0..classes).map(logit).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        sum += max + logits.iter().map(|v| (v - max).exp()).sum::<f64>().ln() - logits[target as usize];
        count += 1.0;
    }
    Array { shape: vec![], data: vec![sum / count] }
}

/// `rows`: number of rows of a block and of its parts, if not chosen by the size of the logits.
fn case(name: &str, x: &[usize], classes: usize, bias: bool, ignore_index: i64, rows: Option<[usize; 2]>) -> Case {
    let (inputs, batch) = (x[x.len() - 1], &x[..x.len() - 1]);
    let mut all = vec![Input::float(x), Input::float(&[classes, inputs]), Input::int(batch, classes as u64)];
    if bias {
        all.push(Input::float(&[classes]));
    }
    Case::new(
        "linear_cross_entropy",
        name,
        all,
        move |x| match rows {
            Some(rows) => x[0].linear_cross_entropy_by(&x[1], x.get(3), &x[2], ignore_index, rows),
            None => x[0].linear_cross_entropy(&x[1], x.get(3), &x[2], ignore_index),
        },
        move |x| reference(x, x.get(3), ignore_index),
    )
    // Where all rows of the weight are one, the gradient of x is a sum of terms that cancel.
    .distinct()
}

pub fn cases() -> Vec<Case> {
    vec![
        case("ordinary", &[2, 8, 16], 24, false, -100, None),
        case("odd", &[7, 13], 37, true, -100, None),
        case("one row", &[5], 11, true, -100, None),
        case("one at a time", &[3, 5], 9, true, -100, Some([1, 1])),
        case("blocks", &[2, 11, 6], 17, false, -100, Some([8, 3])),
        case("blocks with an ignored class", &[23, 6], 3, true, 2, Some([5, 4])),
        case("wide", &[6, 3], 1030, false, -100, Some([4, 2])),
        case("no inputs", &[4, 0], 3, true, -100, Some([3, 5])),
    ]
}

#[test]
fn errors() {
    let _alone = crate::alone();
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
    refused(x.linear_cross_entropy(&weight, None, &tokens(&[7, 7]), 7), argument, &["2 targets", "`ignore_index` (7)"]);
    refused(loss(&floats(&[0, 3]), &weight, None, &tokens(&[])), argument, &["0 targets"]);
    refused(x.linear_cross_entropy_by(&weight, None, &tokens(&[0, 1]), -100, [0, 1]), argument, &[OP, "one row"]);
}
