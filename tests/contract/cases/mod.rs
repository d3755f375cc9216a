//! The cases, one file per file of `src/ops`.

use super::case::Case;

mod copy;
mod matmul;
mod norm;
mod pointwise;
mod reduce;
mod softmax;

/// Every case of every op.
pub fn all() -> Vec<Case> {
    [copy::cases(), matmul::cases(), norm::cases(), pointwise::cases(), reduce::cases(), softmax::cases()]
        .into_iter()
        .flatten()
        .collect()
}
