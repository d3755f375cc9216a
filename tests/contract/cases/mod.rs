//! The cases, one file per file of `src/ops`.

use super::case::Case;

mod attention;
mod copy;
mod cross_entropy;
mod dropout;
mod embedding;
mod glu;
mod matmul;
mod norm;
mod pointwise;
mod reduce;
mod rotary;
mod softmax;

/// Every case of every op.
pub fn all() -> Vec<Case> {
    [
        attention::cases(),
        copy::cases(),
        cross_entropy::cases(),
        dropout::cases(),
        embedding::cases(),
        glu::cases(),
        matmul::cases(),
        norm::cases(),
        pointwise::cases(),
        reduce::cases(),
        rotary::cases(),
        softmax::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
