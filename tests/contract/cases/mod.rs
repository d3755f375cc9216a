//! The cases, one file per file of `src/ops`.

use super::case::Case;

mod copy;
mod cross_entropy;
mod dropout;
mod embedding;
mod glu;
mod norm;
mod pointwise;
mod reduce;
mod rotary;
mod softmax;

/// Every case of every op.
pub fn all() -> Vec<Case> {
    [
        copy::cases(),
        cross_entropy::cases(),
        dropout::cases(),
        embedding::cases(),
        glu::cases(),
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
