//! The op that a case of the table names: as its first case in `cases` runs it, or with separate arguments.

use x_transformers::{
    Result, Shape, Tensor,
    ops::{Activation, AttentionSpec, DecodeSpec, attention, attention_decode},
};

use crate::case::Case;

/// Runs the op that a name starts with; the other words are its arguments.
pub fn run(name: &str, x: &[Tensor], cases: &[Case]) -> Result<Tensor> {
    let words: Vec<&str> = name.split(' ').collect();
    let word = |at: usize| words.get(at).copied().unwrap_or_default();
    let both = |(sum, normed): (Tensor, Tensor)| Tensor::cat(&[&sum, &normed], 0);
    match word(0) {
        "masked_fill" => x[0].masked_fill(&x[1], if word(1) == "max" { 65504.0 } else { word(1).parse().unwrap() }),
        "add_activation" => x[0].add_activation(&x[1], activation(word(1))),
        "glu" => x[0].glu(activation(word(1))),
        "add_glu" => x[0].add_glu(&x[1], activation(word(1))),
        "layer_norm" => x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5),
        "clamped_rms_norm" => x[0].clamped_rms_norm(&x[1], 1e-8),
        "rms_norm" => x[0].rms_norm(&x[1], 1e-6),
        "scale_norm" => x[0].scale_norm(&x[1], 1e-5),
        "add_layer_norm" => both(x[0].add_layer_norm(&x[1], Some(&x[2]), Some(&x[3]), 1e-5)?),
        "add_clamped_rms_norm" => both(x[0].add_clamped_rms_norm(&x[1], &x[2], 1e-8)?),
        "add_rms_norm" => both(x[0].add_rms_norm(&x[1], &x[2], 1e-6)?),
        "add_scale_norm" => both(x[0].add_scale_norm(&x[1], &x[2], 1e-5)?),
        "sum" => x[0].sum(&[if word(1) == "rows" { 0 } else { -1 }]),
        "sum_to" => x[0].sum_to(Shape::new(&x[0].shape()[1..])?),
        "mean" => x[0].mean(&[-1]),
        "max" => x[0].max(-1),
        "argmax" => x[0].argmax(-1),
        "top_k_mask" => x[0].top_k_mask(3),
        "cross_entropy" => x[0].cross_entropy(&x[1], -100),
        "linear_cross_entropy" => x[0].linear_cross_entropy(&x[1], Some(&x[2]), &x[3], -100),
        "matmul" => x[0].matmul(&x[1]),
        "linear" => x[0].linear(&x[1], Some(&x[2])),
        "attention" => {
            let spec = AttentionSpec { scale: 0.5, causal: word(1) == "causal", bias: x.get(3), ..Default::default() };
            attention(&x[0], &x[1], &x[2], &spec)
        }
        "attention_decode" => {
            let ends = Tensor::from_slice(&[2i64], [1], x[0].device())?;
            attention_decode(&x[0], &x[1], &x[2], &ends, &DecodeSpec { scale: 0.5, ..Default::default() })
        }
        "contiguous" => x[0].transpose(0, 1)?.contiguous(),
        "cat" => Tensor::cat(&[&x[0], &x[1]], 0),
        "to_dtype" => x[0].to_dtype(dtype(word(1))),
        "embedding" => x[0].embedding(&x[1]),
        "shift_tokens" => x[0].shift_tokens(&[1, 0], x.get(1)),
        "rotary" => {
            let frequencies = Tensor::from_slice(&[1.0f64, 0.25, 0.0625], [3], x[0].device())?;
            x[0].rotary(&frequencies, 0)
        }
        "relative_position_bias" => x[0].relative_position_bias(6, 7, true, 5, 1.5),
        "sinusoid" => x[0].sinusoid(2, 5, x[0].dtype()),
        "dropout" => x[0].dropout(0.0),
        "dropout_add" => x[0].dropout_add(&x[1], 0.0),
        other => {
            let case = cases.iter().find(|case| case.op == other);
            (case.unwrap_or_else(|| panic!("the table names an op `{other}` that has no case")).run)(x)
        }
    }
}

fn activation(name: &str) -> Activation {
    let activation = Activation::ALL.iter().find(|activation| activation.name() == name);
    *activation.unwrap_or_else(|| panic!("no activation `{name}`"))
}

fn dtype(name: &str) -> x_transformers::DType {
    use x_transformers::DType::{BF16, Bool, F16, F32, F64, I64};
    [BF16, Bool, F16, F32, F64, I64].into_iter().find(|dtype| dtype.name() == name).expect("a dtype")
}
