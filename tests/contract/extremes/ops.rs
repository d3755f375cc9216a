//! The op that a case of the table names.

use x_transformers::{
    Result, Shape, Tensor,
    ops::{Activation, AttentionSpec, DecodeSpec, attention, attention_decode},
};

/// Runs the op that a name starts with, which its other words are arguments of.
pub fn run(name: &str, x: &[Tensor]) -> Result<Tensor> {
    let words: Vec<&str> = name.split(' ').collect();
    let word = |at: usize| words.get(at).copied().unwrap_or_default();
    let both = |(sum, normed): (Tensor, Tensor)| Tensor::cat(&[&sum, &normed], 0);
    match word(0) {
        "neg" => x[0].neg(),
        "exp" => x[0].exp(),
        "ln" => x[0].ln(),
        "sqrt" => x[0].sqrt(),
        "square" => x[0].square(),
        "sigmoid" => x[0].sigmoid(),
        "tanh" => x[0].tanh(),
        "relu" => x[0].relu(),
        "relu_squared" => x[0].relu_squared(),
        "gelu" => x[0].gelu(),
        "gelu_tanh" => x[0].gelu_tanh(),
        "silu" => x[0].silu(),
        "affine" => x[0].affine(1.5, -0.25),
        "add" => x[0].add(&x[1]),
        "sub" => x[0].sub(&x[1]),
        "mul" => x[0].mul(&x[1]),
        "div" => x[0].div(&x[1]),
        "eq" => x[0].eq(&x[1]),
        "ne" => x[0].ne(&x[1]),
        "lt" => x[0].lt(&x[1]),
        "le" => x[0].le(&x[1]),
        "gt" => x[0].gt(&x[1]),
        "ge" => x[0].ge(&x[1]),
        "where_cond" => x[0].where_cond(&x[1], &x[2]),
        "masked_fill" => x[0].masked_fill(&x[1], if word(1) == "max" { 65504.0 } else { word(1).parse().unwrap() }),
        "add_activation" => x[0].add_activation(&x[1], activation(word(1))),
        "glu" => x[0].glu(activation(word(1))),
        "add_glu" => x[0].add_glu(&x[1], activation(word(1))),
        "gru_gate" => x[0].gru_gate(&x[1], &x[2]),
        "layer_norm" => x[0].layer_norm(Some(&x[1]), Some(&x[2]), 1e-5),
        "clamped_rms_norm" => x[0].clamped_rms_norm(&x[1], 1e-8),
        "rms_norm" => x[0].rms_norm(&x[1], 1e-6),
        "scale_norm" => x[0].scale_norm(&x[1], 1e-5),
        "add_layer_norm" => both(x[0].add_layer_norm(&x[1], Some(&x[2]), Some(&x[3]), 1e-5)?),
        "add_clamped_rms_norm" => both(x[0].add_clamped_rms_norm(&x[1], &x[2], 1e-8)?),
        "add_rms_norm" => both(x[0].add_rms_norm(&x[1], &x[2], 1e-6)?),
        "add_scale_norm" => both(x[0].add_scale_norm(&x[1], &x[2], 1e-5)?),
        "softmax" => x[0].softmax(),
        "entmax15" => x[0].entmax15(),
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
        other => panic!("the table names an op `{other}` that nothing here runs"),
    }
}

fn activation(name: &str) -> Activation {
    match name {
        "gelu" => Activation::Gelu,
        "gelu_tanh" => Activation::GeluTanh,
        "relu_squared" => Activation::ReluSquared,
        "sigmoid" => Activation::Sigmoid,
        "silu" => Activation::Silu,
        other => panic!("no activation `{other}`"),
    }
}

fn dtype(name: &str) -> x_transformers::DType {
    use x_transformers::DType::{BF16, Bool, F16, F32, F64, I64};
    [BF16, Bool, F16, F32, F64, I64].into_iter().find(|dtype| dtype.name() == name).expect("a dtype")
}
