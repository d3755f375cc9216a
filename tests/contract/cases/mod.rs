//! The cases, one file per file of `src/ops`.

use super::case::Case;

mod activation;
mod attention;
mod attention_decode;
mod copy;
mod cross_entropy;
mod dropout;
mod embedding;
mod entmax;
mod glu;
mod gru;
mod linear_cross_entropy;
mod matmul;
mod norm;
mod packed;
mod pointwise;
mod position;
mod reduce;
mod rotary;
mod sample;
mod shift;
mod softmax;
mod topk;

/// Every case of every op.
pub fn all() -> Vec<Case> {
    [
        activation::cases(),
        attention::cases(),
        attention_decode::cases(),
        copy::cases(),
        cross_entropy::cases(),
        dropout::cases(),
        embedding::cases(),
        entmax::cases(),
        glu::cases(),
        gru::cases(),
        linear_cross_entropy::cases(),
        matmul::cases(),
        norm::cases(),
        packed::cases(),
        pointwise::cases(),
        position::cases(),
        reduce::cases(),
        rotary::cases(),
        sample::cases(),
        shift::cases(),
        softmax::cases(),
        topk::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
